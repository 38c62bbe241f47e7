"""`vocab.json` and `merges.txt` of GPT-2: token to id, and the merges of a byte-level BPE in their order.

How text is split before, and the characters that stand for bytes, are in openai/gpt-2, encoder.py, of which
Megatron-LM has a copy (megatron/tokenizer/gpt2_tokenization.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_tool.checkpoint.strict_json import parse
from ckpt_tool.convert.plan import Value
from ckpt_tool.convert.tokenizers.byte_level import spell
from ckpt_tool.convert.tokenizers.hf_files import (
    NO_MORE,
    AddedToken,
    More,
    TokenizerResult,
    bos_template,
    config_documents,
    tokenizer_json,
)
from ckpt_tool.convert.vocabularies import END_OF_TEXT, Vocabulary
from ckpt_tool.errors import Problem, fail, fail_all

MAX_TOKENS = 1_000_000


def read_vocabulary(data: bytes, file: str, named: Iterable[str] = (END_OF_TEXT,)) -> dict[str, int]:
    """Token to id, ids 0 to n-1, `named` tokens among them; `bad-tokenizer` for anything else."""
    found = parse(data, file=file, kind="bad-tokenizer")
    if not isinstance(found, dict) or not 0 < len(found) <= MAX_TOKENS:
        fail(
            "bad-tokenizer",
            f"expected an object of 1 to {MAX_TOKENS} tokens, found something else",
            file=file,
        )
    ids = sorted(found.values()) if all(type(i) is int for i in found.values()) else []
    if ids != list(range(len(found))):
        odd = next((i for i, wanted in zip(ids, range(len(found)), strict=False) if i != wanted), "no number")
        fail("bad-tokenizer", f"expected each id from 0 to {len(found) - 1} once, found {odd}", file=file)
    missing = [byte for byte in range(256) if spell(bytes([byte])) not in found]
    problems = []
    if missing:
        lacking = f"{len(missing)}, first 0x{missing[0]:02x}"
        message = f"expected a token for each of the 256 bytes, found none for {lacking}"
        problems.append(Problem("bad-tokenizer", message, file))
    for token in dict.fromkeys(named):
        if token not in found:
            problems.append(Problem("bad-tokenizer", f"expected the token {token}, found none", file))
    fail_all(problems)
    return found


def read_merges(data: bytes, file: str, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges in order. As the original's reader does, the first line is taken for a version and what
    follows the last line break for nothing. `bad-tokenizer` for a merge of or to what is no token."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        fail("bad-tokenizer", f"expected UTF-8, found byte {error.start} to break it", file=file)
    lines = text.replace("\r\n", "\n").split("\n")
    if not lines[0].startswith("#version"):
        found = f"expected a line with #version first, found `{lines[0][:40]}`"
        fail("bad-tokenizer", found, file=file, where="line 1")
    if lines[-1]:
        fail("bad-tokenizer", "expected a line break at the end, found the file cut off", file=file)
    problems, merges, seen = [], [], set()
    for number, line in enumerate(lines[1:-1], 2):
        left, _, right = line.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            message = f"expected two tokens that make a token, found `{line[:40]}`"
        elif line in seen:
            message = f"expected each merge once, found `{line[:40]}` again"
        else:
            seen.add(line)
            merges.append((left, right))
            continue
        problems.append(Problem("bad-tokenizer", message, file, f"line {number}"))
    fail_all(problems[:20])
    return merges


def framed(named: Mapping[str, str], vocab: Mapping[str, int]) -> dict[str, Any]:
    """The post-processor of RoBERTa: cls_token, a text, sep_token, and sep_token, a text, sep_token again for
    a second one."""
    ends = {word: [named[f"{word}_token"], vocab[named[f"{word}_token"]]] for word in ("sep", "cls")}
    return {"type": "RobertaProcessing", **ends, "trim_offsets": True, "add_prefix_space": False}


def convert(
    vocab_data: bytes,
    merges_data: bytes,
    *,
    files: tuple[str, str],
    config: Mapping[str, Any],
    use: Vocabulary,
    more_tokens: More = NO_MORE,
) -> TokenizerResult:
    """The Hugging Face files of such a vocabulary, which stays beside them as `vocab.json` and `merges.txt`.

    `config` may have the number of positions, `n_positions` or `max_position_embeddings`. `more_tokens`
    follow the vocabulary; text is searched for them before anything else."""
    vocab = read_vocabulary(vocab_data, files[0], use.named.values())
    merges = read_merges(merges_data, files[1], vocab)
    mask = use.named.get("mask_token") if use.frames else None
    added = [AddedToken(vocab[text], text, lstrip=text == mask) for text in dict.fromkeys(use.named.values())]
    later = more_tokens.after(vocab, len(vocab))
    added = sorted([*added, *later], key=lambda token: token.id)
    named = {**more_tokens.named(later), **use.named}
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    after: dict[str, Any] = {**byte_level, "trim_offsets": False, "use_regex": True}
    more: dict[str, Any] = {"padding_side": "right", "add_prefix_space": False}
    begin = use.named["bos_token"]
    if use.begins:
        template = bos_template(AddedToken(vocab[begin], begin))
        after = {"type": "Sequence", "processors": [after, template]}
        more["add_bos_token"] = True
    if use.frames:
        after = framed(use.named, vocab)
        more["tokenizer_class"] = use.classes[0]
    length = config.get("n_positions", config.get("max_position_embeddings"))
    if isinstance(length, int) and not isinstance(length, bool) and length > 0:
        more["model_max_length"] = length
    documents = {
        "tokenizer.json": tokenizer_json(
            vocab=vocab,
            merges=merges,
            added=added,
            normalizer=None,
            pre_tokenizer={**byte_level, "use_regex": True},
            post_processor=after,
            decoder={**byte_level, "use_regex": True},
            model={"unk_token": None, "fuse_unk": False, "byte_fallback": False},
        ),
        **config_documents(named, added, more),
        "vocab.json": vocab_data,
        "merges.txt": merges_data,
    }
    spelled = " or ".join(dict.fromkeys(use.named.values()))
    notes = [f"text that spells {spelled} becomes that token; the original splits it as any other text"]
    facts = {
        f"{name}_id": Value(vocab[text], f"{files[0]}: {text}")
        for name, text in use.named.items()
        if name != "unk_token"
    }
    return TokenizerResult(documents, notes, len(vocab) + len(later), facts)
