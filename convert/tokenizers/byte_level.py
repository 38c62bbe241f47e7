"""Byte-level BPE: bytes spelled as printable characters (the GPT-2 table), and merges read off the ranks.

Shared by the two formats that keep tokens as bytes with a rank and a split pattern: tiktoken and tekken.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_tool.convert.tokenizers.hf_files import AddedToken, bos_template, tokenizer_json
from ckpt_tool.errors import Problem

MAX_TOKEN_BYTES = 4096
MAX_PATTERN = 4096

# The byte alphabet of GPT-2 (openai/gpt-2 encoder.py): printable Latin-1 stands for itself, the other 68
# bytes follow from U+0100 on, in order.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHER = [byte for byte in range(256) if byte not in _PRINTABLE]
_ALPHABET = {byte: 0x100 + position for position, byte in enumerate(_OTHER)}


def spell(token: bytes) -> str:
    """The bytes of `token`, each as its printable character."""
    return token.decode("latin-1").translate(_ALPHABET)


def decode_base64(text: str | bytes) -> bytes | None:
    """The bytes, or None when `text` is not canonical base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def token_problems(tokens: Sequence[bytes], file: str) -> list[Problem]:
    """What is wrong with a list of tokens in rank order: empty, too long, twice, or bytes that no token
    spells."""
    problems = []
    first: dict[bytes, int] = {}
    for rank, token in enumerate(tokens):
        where = f"rank {rank}"
        if not 0 < len(token) <= MAX_TOKEN_BYTES:
            message = f"expected a token of 1 to {MAX_TOKEN_BYTES} bytes, found {len(token)}"
            problems.append(Problem("bad-tokenizer", message, file, where))
        elif first.setdefault(token, rank) != rank:
            message = f"expected each token once, found {token[:40]!r} at ranks {first[token]} and {rank}"
            problems.append(Problem("bad-tokenizer", message, file, where))
    missing = [byte for byte in range(256) if bytes([byte]) not in first]
    if missing:
        lacking = f"{len(missing)}, first 0x{missing[0]:02x}"
        message = f"expected a token for each of the 256 bytes, found none for {lacking}"
        problems.append(Problem("bad-tokenizer", message, file))
    return problems


def merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """The merge list that makes a BPE by merge rank do what a BPE by token rank does.

    A BPE by token rank joins the adjacent pair whose concatenation has the lowest rank, however that token
    is cut; so each token brings all its cuts into two tokens, in rank order.
    """
    spelled = {token: spell(token) for token in ranks}
    found: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        cuts = []
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                cuts.append((ranks[left], ranks[right], left, right))
        cuts.sort()
        found.extend((spelled[left], spelled[right]) for _, _, left, right in cuts)
    return found


def tokenizer_document(
    ranks: Mapping[bytes, int],
    *,
    first_id: int,
    pattern: str,
    added: Sequence[AddedToken],
    bos: AddedToken,
    listed: Sequence[AddedToken] = (),
) -> bytes:
    """tokenizer.json of a byte-level BPE whose token of rank r has the id `first_id` + r.

    `listed` tokens also stand in the model's vocabulary: those whose ids come before `first_id` must,
    because the library gives a token it does not find there the next free id.
    """
    vocab = {token.text: token.id for token in listed}
    vocab.update((spell(token), first_id + rank) for token, rank in ranks.items())
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return tokenizer_json(
        vocab=vocab,
        merges=merges(ranks),
        added=added,
        normalizer=None,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {**byte_level, "use_regex": False},
            ],
        },
        post_processor={
            "type": "Sequence",
            "processors": [{**byte_level, "trim_offsets": False, "use_regex": False}, bos_template(bos)],
        },
        decoder={**byte_level, "use_regex": False},
        # A split that is a token stays whole even where no merges lead to it, as in tiktoken. tokenizers
        # 0.15.2 does not know the option and skips it; tokens that merges reach come out the same.
        model={"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True},
    )


def ids_by_text(ranks: Mapping[bytes, int], first_id: int, special: Sequence[AddedToken]) -> dict[str, int]:
    """Every token of a vocabulary as tokenizer.json writes it, to its id."""
    vocab = {spell(token): first_id + rank for token, rank in ranks.items()}
    return {**vocab, **{token.text: token.id for token in special}}


def name_clashes(ranks: Mapping[bytes, int], special: Sequence[str], file: str) -> list[Problem]:
    """Special tokens that cannot be told from an ordinary token, or from each other, by their text."""
    spelled = {spell(token) for token in ranks}
    problems = []
    seen: set[str] = set()
    for text in special:
        if text in spelled:
            message = f"expected special tokens that no ordinary token spells, found `{text}` as both"
            problems.append(Problem("bad-tokenizer", message, file))
        elif text in seen:
            message = f"expected each special token once, found `{text}` twice"
            problems.append(Problem("bad-tokenizer", message, file))
        seen.add(text)
    return problems
