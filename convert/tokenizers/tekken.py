"""Mistral `tekken.json`: byte tokens with ranks, a split pattern, and the special tokens that come first.

Facts from mistral_common 1.13.1, tokens/tokenizers/tekken.py: special tokens have the ids 0 to n-1, the
token of rank r the id n + r, and of the listed tokens only as many count as `default_vocab_size` leaves
room for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tool.checkpoint import strict_json
from ckpt_tool.convert.plan import Value
from ckpt_tool.convert.tokenizers import byte_level
from ckpt_tool.convert.tokenizers.hf_files import (
    NO_MORE,
    AddedToken,
    More,
    TokenizerResult,
    config_documents,
)
from ckpt_tool.errors import Problem, fail, fail_all

MAX_BYTES = 64 << 20
MAX_TOKENS = 1_000_000

# The split pattern of every tekken file published so far
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# What a file of version v7 or earlier without a list of its own means (mistral_common, as above)
DEFAULT_SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
_LAST_VERSION_WITH_DEFAULTS = 7
_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class Tekken:
    """A tekken file, read: `ranks` without the listed tokens that do not count, `special` in id order."""

    pattern: str
    ranks: Mapping[bytes, int]
    special: tuple[AddedToken, ...]


def looks_like(data: bytes) -> bool:
    """Whether this is a JSON object; what it holds is for `read` to say."""
    return data[:64].lstrip()[:1] == b"{"


def read(data: bytes, file: str) -> Tekken:
    """The file's content; `bad-tokenizer` when it is not a tekken file or contradicts itself."""
    found: dict[str, Any] = {}
    for key, value in strict_json.members(data, file=file, kind="bad-tokenizer", max_bytes=MAX_BYTES):
        if key in found:
            fail("bad-tokenizer", "expected each key once, found it twice", file=file, where=key)
        found[key] = value
    config, vocab, listed = found.get("config"), found.get("vocab"), found.get("special_tokens")
    fail_all(
        Problem("bad-tokenizer", f"expected {expected}, found {type(value).__name__}", file, key)
        for key, value, kind, expected in (
            ("config", config, dict, "an object"),
            ("vocab", vocab, list, "a list"),
            ("special_tokens", listed, list | None, "a list or nothing"),
        )
        if not isinstance(value, kind)
    )
    assert isinstance(config, dict) and isinstance(vocab, list)
    total = _count(config, "default_vocab_size", file)
    special_total = _count(config, "default_num_special_tokens", file)
    pattern = config.get("pattern")
    if not isinstance(pattern, str) or not 0 < len(pattern) <= byte_level.MAX_PATTERN:
        fail(
            "bad-tokenizer",
            f"expected a regular expression of at most {byte_level.MAX_PATTERN} characters, "
            f"found {type(pattern).__name__}",
            file=file,
            where="config.pattern",
        )
    ordinary = total - special_total
    if not 0 < ordinary <= min(len(vocab), MAX_TOKENS):
        fail(
            "bad-tokenizer",
            f"expected 1 to {min(len(vocab), MAX_TOKENS)} ordinary tokens (as many as `vocab` has), found "
            f"default_vocab_size {total} - default_num_special_tokens {special_total} = {ordinary}",
            file=file,
            where="config",
        )
    tokens = _tokens(vocab[:ordinary], file)
    special = _special(listed, special_total, str(config.get("version")), file)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    fail_all(
        byte_level.token_problems(tokens, file)
        + byte_level.name_clashes(ranks, [token.text for token in special], file)
    )
    return Tekken(pattern, ranks, special)


def _count(config: Mapping[str, Any], key: str, file: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value <= MAX_TOKENS:
        fail(
            "bad-tokenizer",
            f"expected an integer from 1 to {MAX_TOKENS}, found {value!r:.40}",
            file=file,
            where=f"config.{key}",
        )
    return value


def _tokens(entries: list[Any], file: str) -> list[bytes]:
    tokens = []
    for position, entry in enumerate(entries):
        text = entry.get("token_bytes") if isinstance(entry, dict) else None
        token = byte_level.decode_base64(text) if isinstance(text, str) and text.isascii() else None
        if token is None or entry.get("rank") != position:
            fail(
                "bad-tokenizer",
                f"expected rank {position} and base64 token_bytes, found {entry!r:.80}",
                file=file,
                where=f"vocab[{position}]",
            )
        tokens.append(token)
    return tokens


def _special(listed: list[Any] | None, total: int, version: str, file: str) -> tuple[AddedToken, ...]:
    """`total` special tokens: the listed ones in rank order, or the default ones, then numbered fillers."""
    if listed is None:
        number = re.fullmatch(r"v([0-9]{1,3})(?:m[0-9]{1,3})?", version)
        if number is None or int(number[1]) > _LAST_VERSION_WITH_DEFAULTS:
            fail(
                "bad-tokenizer",
                f"expected a list of special tokens in a file of version {version:.20}, found none",
                file=file,
                where="special_tokens",
            )
        tokens = [AddedToken(rank, text) for rank, text in enumerate(DEFAULT_SPECIAL)]
    else:
        tokens = []
        for position, entry in enumerate(listed):
            entry = entry if isinstance(entry, dict) else {}
            text, control = entry.get("token_str"), entry.get("is_control", True)
            if entry.get("rank") != position or not isinstance(text, str) or not 0 < len(text) <= 512:
                fail(
                    "bad-tokenizer",
                    f"expected rank {position} and a token_str, found {listed[position]!r:.80}",
                    file=file,
                    where=f"special_tokens[{position}]",
                )
            tokens.append(AddedToken(position, text, control=control is not False))
    if len(tokens) > total:
        fail(
            "bad-tokenizer",
            f"expected at most {total} special tokens (default_num_special_tokens), found {len(tokens)}",
            file=file,
            where="special_tokens",
        )
    tokens += [AddedToken(rank, f"<SPECIAL_{rank}>") for rank in range(len(tokens), total)]
    return tuple(tokens)


def convert(data: bytes, *, file: str, more_tokens: More = NO_MORE) -> TokenizerResult:
    """The Hugging Face files of a tekken tokenizer, `more_tokens` after its ids; `tekken.json` itself is
    kept, as mistral_common and vLLM read it (and transformers 5 prefers it where mistral_common is
    installed)."""
    tekken = read(data, file)
    ids = {token.text: token for token in tekken.special}
    bos, eos = ids.get("<s>"), ids.get("</s>")
    if bos is None or eos is None:
        fail("bad-tokenizer", "expected the special tokens <s> and </s>, found not both", file=file)
    first = len(tekken.special)
    vocab = byte_level.ids_by_text(tekken.ranks, first, tekken.special) if more_tokens.ids else {}
    added = [*tekken.special, *more_tokens.after(vocab, len(vocab))]
    named = {name: text for name, text in _NAMED.items() if text in ids}
    more: dict[str, Any] = {}
    if tekken.pattern == PATTERN:
        # Transformers 5 warns that the pattern of any large Mistral tokenizer is wrong (files converted by
        # an older release had another one) unless told to put in this very pattern
        more["fix_mistral_regex"] = True
    documents = {
        "tokenizer.json": byte_level.tokenizer_document(
            tekken.ranks,
            first_id=first,
            pattern=tekken.pattern,
            added=added,
            bos=bos,
            listed=tekken.special,
        ),
        **config_documents({**more_tokens.named(added), **named}, added, more),
        "tekken.json": data,
    }
    notes = [
        "text that spells a special token, such as [INST], becomes that token; "
        "the original reads it as plain text"
    ]
    facts = {
        "bos_token_id": Value(bos.id, f"{file}: special token <s>"),
        "eos_token_id": Value(eos.id, f"{file}: special token </s>"),
    }
    return TokenizerResult(documents, notes, len(added) + len(tekken.ranks), facts)
