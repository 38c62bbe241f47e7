"""Tokenizer files: from an original download to a Hugging Face folder, and back.

The original file always stays in the folder, byte for byte, so the way back copies it. The Hugging Face
side is made from it by recipe, without its library: `sentencepiece`, `tekken`, `tiktoken`, `wordpiece`,
`gpt2` and `codepoints` hold one format each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from ckpt_tool.checkpoint.signs import DOWNLOAD, SERVER_BYTES, of_server
from ckpt_tool.convert.families import family as family_of
from ckpt_tool.convert.tokenizers.hf_files import ADDED, MAP, More, TokenizerResult, read_more
from ckpt_tool.convert.vocabularies import Vocabulary
from ckpt_tool.errors import fail

__all__ = [
    "ADDED",
    "MAP",
    "MAX_BYTES",
    "TokenizerResult",
    "original_tokenizer_documents",
    "tokenizer_documents",
]

MAX_BYTES = 64 << 20  # no tokenizer file may be larger; real ones go up to 19 MB
_ORIGINAL = re.compile(r"tokenizer\.model(?:\.v[0-9]+(?:m[0-9]+)?)?|tekken\.json", re.ASCII)
# Publishers put the name of the model before these: bert-large-uncased-vocab.txt, gpt2-vocab.json
_VOCABULARY = re.compile(
    r"(?P<model>(?:[\w.-]{1,80}[-_.])?)(?P<kind>vocab\.txt|vocab\.json|merges\.txt)", re.ASCII
)


def tokenizer_documents(
    documents: Mapping[str, bytes], *, family: str, config: Mapping[str, Any]
) -> TokenizerResult:
    """The tokenizer of a download as a Hugging Face folder holds it.

    `documents` may hold other files; which count is told by the `vocabulary` that the family declares:
    `tokenizer.model`, `tokenizer.model.vN` and `tekken.json`, or `vocab.txt` and `*-vocab.txt`, or
    `vocab.json` with `merges.txt`, also with the same word before both; added_tokens.json beside it goes on
    where the vocabulary ends. `config` is params.json or config.json as far as known: `vocab_size`, the rows
    of the embedding (absent or -1: not checked), of which a note says how many have no id, or
    `padded_vocab_size`, where rows without an id are padding; the context length, whether rotary frequencies
    are scaled, `tokenizer_type` of Megatron's args and `added_tokens` (to ids) where no file tells them.
    Fails with `bad-tokenizer` for a file that is none of the known formats, that contradicts itself or has
    more ids than there are rows, or when two different tokenizers fit. Without any tokenizer the result is
    empty and a note says so.
    """
    vocabulary = family_of(family).vocabulary
    if vocabulary.kind == "codepoints":
        from ckpt_tool.convert.tokenizers import codepoints

        return codepoints.convert(config)
    found = _candidates(documents, vocabulary)
    if not found:
        return TokenizerResult({}, ["the download has no tokenizer file; none was written"], 0)
    more = read_more(documents) if ADDED in documents else More(config.get("added_tokens", {}))
    results = {
        name: _convert(name, data, vocabulary, config, family, more)
        for name, data in sorted(found.items())
        if not any(data == found[other] and other > name for other in found)
    }
    rows, most = _count(config, "vocab_size"), _count(config, "padded_vocab_size")
    name = _fitting({n: r.vocab_size for n, r in results.items()}, rows, most)
    result = results[name]
    for other in found.keys() - {name}:
        if found[other] != found[name]:
            result.notes.append(f"{other} is left out: it does not fit the vocabulary of {rows or most}")
        elif _ORIGINAL.fullmatch(other):
            result.documents[other] = found[other][0]
    if ADDED in documents:
        result.documents[ADDED] = documents[ADDED]
    if rows is not None:
        result.notes.extend(rows_without_ids(rows, result.vocab_size, name))
    return result


def _fitting(sizes: Mapping[str, int], rows: int | None, most: int | None) -> str:
    """The one tokenizer whose ids all have a row; of several the one that has an id for each row."""
    limit = most if rows is None else rows
    fitting = [n for n, ids in sizes.items() if limit is None or ids <= limit]
    if limit is not None and not fitting:
        found = " and ".join(f"{ids} in {name}" for name, ids in sizes.items())
        too_many_ids(limit, found, next(iter(sizes)))
    exact = [n for n in fitting if sizes[n] == rows] or fitting
    if len(exact) > 1:
        fail(
            "bad-tokenizer",
            f"expected one tokenizer, found {len(exact)} that differ: {', '.join(exact)}",
            hint="--tokenizer FILE says which of them belongs to the weights",
        )
    return exact[0]


def too_many_ids(rows: int, found: str, file: str) -> NoReturn:
    """A model would look up ids past its embedding."""
    fail(
        "bad-tokenizer",
        f"expected a tokenizer of at most {rows} ids, one for each row of the embedding, found {found}",
        file=file,
        hint="--tokenizer PATH gives the one of these weights",
    )


def rows_without_ids(rows: int, ids: int, file: str) -> list[str]:
    """Rows that a vocabulary was rounded up by, or that somebody added without saying what for."""
    left = rows - ids
    if left < 1:
        return []
    return [f"{left} of {rows} embedding rows {'has' if left == 1 else 'have'} no id in {file} ({ids} ids)"]


def _candidates(documents: Mapping[str, bytes], vocabulary: Vocabulary) -> dict[str, tuple[bytes, ...]]:
    """The files of each tokenizer there is, under the name of the first."""
    named = {name: m for name in documents if (m := _VOCABULARY.fullmatch(name))}
    if vocabulary.kind == "wordpiece":
        return {name: (documents[name],) for name, m in named.items() if m["kind"] == "vocab.txt"}
    if vocabulary.kind == "byte-level":
        found: dict[str, tuple[bytes, ...]] = {}
        for model in {m["model"] for m in named.values() if m["kind"] != "vocab.txt"}:
            vocab, merges = f"{model}vocab.json", f"{model}merges.txt"
            for one, other in ((vocab, merges), (merges, vocab)):
                if other not in documents:
                    fail("bad-tokenizer", f"expected {other} beside it, found none", file=one)
            found[vocab] = (documents[vocab], documents[merges])
        return found
    return {name: (data,) for name, data in documents.items() if _ORIGINAL.fullmatch(name)}


def _count(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _convert(
    name: str,
    contents: tuple[bytes, ...],
    vocabulary: Vocabulary,
    config: Mapping[str, Any],
    family: str,
    more: More,
) -> TokenizerResult:
    for content in contents:
        if len(content) > MAX_BYTES:
            fail("bad-tokenizer", f"expected at most {MAX_BYTES} bytes, found {len(content)}", file=name)
    if vocabulary.kind == "byte-level":
        vocab, merges = contents
        from ckpt_tool.convert.tokenizers import gpt2

        files = (name, name.removesuffix("vocab.json") + "merges.txt")
        return gpt2.convert(vocab, merges, files=files, config=config, use=vocabulary, more_tokens=more)
    (data,) = contents
    if vocabulary.kind == "wordpiece":
        from ckpt_tool.convert.tokenizers import wordpiece

        return wordpiece.convert(data, file=name, config=config, more_tokens=more)
    if name == "tekken.json":
        from ckpt_tool.convert.tokenizers import tekken

        return tekken.convert(data, file=name, more_tokens=more)
    from ckpt_tool.convert.tokenizers import sentencepiece, tiktoken

    if sentencepiece.looks_like(data):
        return sentencepiece.convert(data, file=name, more_tokens=more)
    if tiktoken.looks_like(data):
        if not vocabulary.ranks:
            fail(
                "bad-tokenizer",
                f"expected a sentencepiece model for family {family}, found a list of tiktoken ranks",
                file=name,
                hint="such a list does not say how to split text; that of Llama 3 is known",
            )
        return tiktoken.convert(data, file=name, config=config, more_tokens=more)
    fail(
        "bad-tokenizer",
        f"expected a sentencepiece model or a list of tiktoken ranks, found {data[:16]!r}",
        file=name,
        hint=DOWNLOAD if not data or of_server(data[:SERVER_BYTES]) else None,
    )


def original_tokenizer_documents(
    hf_documents: Mapping[str, bytes], *, family: str | None = None
) -> dict[str, bytes]:
    """The original tokenizer files in a Hugging Face folder, under the names a download has them by; those
    of WordPiece and GPT-2, which any folder may have, only for a `family` that writes them.

    Empty when the folder has none, as when it was made by another tool: an original cannot be rebuilt from
    tokenizer.json, which holds no scores.
    """
    kind = "sentencepiece" if family is None else family_of(family).vocabulary.kind
    more = {ADDED: hf_documents[ADDED]} if ADDED in hf_documents else {}
    if kind == "codepoints":
        return {}
    if kind != "sentencepiece":
        names = ("vocab.txt",) if kind == "wordpiece" else ("vocab.json", "merges.txt")
        held = all(name in hf_documents for name in names)
        return {**{name: hf_documents[name] for name in names}, **more} if held else {}
    found = {name: data for name, data in hf_documents.items() if _ORIGINAL.fullmatch(name)}
    kept = hf_documents.get("original/tokenizer.model")
    if kept is not None:
        found.setdefault("tokenizer.model", kept)
    versioned = [name for name in found if name.startswith("tokenizer.model.")]
    if any(found[name] == found.get("tokenizer.model") for name in versioned):
        del found["tokenizer.model"]  # the copy that Hugging Face classes look for
    return {**found, **more} if found else {}
