"""Tokenizer files: from an original download to a Hugging Face folder, and back.

The original file always stays in the folder, byte for byte, so the way back copies it. The Hugging Face
side is made from it by recipe, without its library: `sentencepiece`, `tekken` and `tiktoken` hold one
format each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ckpt_tool.convert.tokenizers import sentencepiece, tekken, tiktoken
from ckpt_tool.convert.tokenizers.hf_files import TokenizerResult
from ckpt_tool.errors import fail

__all__ = ["MAX_BYTES", "TokenizerResult", "original_tokenizer_documents", "tokenizer_documents"]

MAX_BYTES = tekken.MAX_BYTES  # no tokenizer file may be larger; real ones go up to 19 MB
_ORIGINAL = re.compile(r"tokenizer\.model(?:\.v[0-9]+(?:m[0-9]+)?)?|tekken\.json", re.ASCII)


def tokenizer_documents(
    documents: Mapping[str, bytes], *, family: str, config: Mapping[str, Any]
) -> TokenizerResult:
    """The tokenizer of a download as a Hugging Face folder holds it.

    `documents` may hold other files; `tokenizer.model`, `tokenizer.model.vN` and `tekken.json` count.
    `config` is params.json or config.json as far as known: `vocab_size` (absent or -1: not checked), the
    context length, and whether rotary frequencies are scaled. Fails with `bad-tokenizer` for a file that is
    none of the known formats, that contradicts itself or `vocab_size`, or when two different tokenizers are
    there. Without any tokenizer the result is empty and a note says so.
    """
    found = {name: data for name, data in documents.items() if _ORIGINAL.fullmatch(name)}
    if not found:
        return TokenizerResult({}, ["the download has no tokenizer file; none was written"], 0)
    results = {
        name: _convert(name, data, family, config)
        for name, data in sorted(found.items())
        if not any(data == found[other] and other > name for other in found)
    }
    rows = config.get("vocab_size")
    known = isinstance(rows, int) and not isinstance(rows, bool) and rows > 0
    fitting = {name: r for name, r in results.items() if not known or r.vocab_size == rows}
    if not fitting:
        sizes = " and ".join(f"{r.vocab_size} in {name}" for name, r in results.items())
        fail(
            "bad-tokenizer",
            f"expected a tokenizer of {rows} ids, as many as the embedding has rows, found {sizes}",
            file=next(iter(results)),
            hint="a tokenizer of another release is not a part of this one: ids mean other pieces",
        )
    if len(fitting) > 1:
        fail(
            "bad-tokenizer",
            f"expected one tokenizer, found {len(fitting)} that differ: {', '.join(fitting)}",
            hint="keep the one that belongs to the weights",
        )
    name, result = next(iter(fitting.items()))
    for other in found.keys() - {name}:
        if found[other] == found[name]:
            result.documents[other] = found[other]
        else:
            result.notes.append(f"{other} is left out: it does not fit the vocabulary of {rows}")
    return result


def _convert(name: str, data: bytes, family: str, config: Mapping[str, Any]) -> TokenizerResult:
    if len(data) > MAX_BYTES:
        fail("bad-tokenizer", f"expected at most {MAX_BYTES} bytes, found {len(data)}", file=name)
    if name == "tekken.json":
        return tekken.convert(data, file=name)
    if sentencepiece.looks_like(data):
        return sentencepiece.convert(data, file=name)
    if tiktoken.looks_like(data):
        if family != "llama":
            fail(
                "bad-tokenizer",
                f"expected a sentencepiece model for family {family}, found a list of tiktoken ranks",
                file=name,
                hint="such a list does not say how to split text; that of Llama 3 is known",
            )
        return tiktoken.convert(data, file=name, config=config)
    fail(
        "bad-tokenizer",
        f"expected a sentencepiece model or a list of tiktoken ranks, found {data[:16]!r}",
        file=name,
    )


def original_tokenizer_documents(hf_documents: Mapping[str, bytes]) -> dict[str, bytes]:
    """The original tokenizer files in a Hugging Face folder, under the names a download has them by.

    Empty when the folder has none, as when it was made by another tool: an original cannot be rebuilt from
    tokenizer.json, which holds no scores.
    """
    found = {name: data for name, data in hf_documents.items() if _ORIGINAL.fullmatch(name)}
    kept = hf_documents.get("original/tokenizer.model")
    if kept is not None:
        found.setdefault("tokenizer.model", kept)
    versioned = [name for name in found if name.startswith("tokenizer.model.")]
    if any(found[name] == found.get("tokenizer.model") for name in versioned):
        del found["tokenizer.model"]  # the copy that Hugging Face classes look for
    return found
