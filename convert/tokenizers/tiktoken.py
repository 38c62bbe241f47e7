"""Llama 3 `tokenizer.model`: a text file of byte tokens and ranks, as tiktoken reads it.

The file holds the ordinary tokens only. The split pattern and the 256 special tokens stand in Meta's code:
meta-llama/llama-models, models/llama3/tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tool.convert.plan import Value
from ckpt_tool.convert.tokenizers import byte_level
from ckpt_tool.convert.tokenizers.hf_files import (
    NO_MORE,
    AddedToken,
    More,
    TokenizerResult,
    config_documents,
)
from ckpt_tool.errors import fail, fail_all

MAX_BYTES = 32 << 20
MAX_TOKENS = 1_000_000
SPECIAL_TOKENS = 256

# meta-llama/llama-models, models/llama3/tokenizer.py
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# Offsets from the first special id; the others are reserved and numbered in order
_NAMES_3_0 = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_NAMES_3_1 = {**_NAMES_3_0, 4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}


def looks_like(data: bytes) -> bool:
    """Whether the first line is a base64 token and a rank."""
    fields = data[:8192].split(b"\n", 1)[0].split()
    return len(fields) == 2 and fields[1].isdigit() and byte_level.decode_base64(fields[0]) is not None


def read_ranks(data: bytes, file: str) -> dict[bytes, int]:
    """Byte token to rank, ranks 0 to n-1 in any order of lines, as tiktoken makes a dictionary of them;
    `bad-tokenizer` for anything else."""
    if len(data) > MAX_BYTES:
        fail("bad-tokenizer", f"expected at most {MAX_BYTES} bytes, found {len(data)}", file=file)
    found: list[tuple[int, int, bytes]] = []  # rank, line, token
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        fields = line.split()
        token = byte_level.decode_base64(fields[0]) if len(fields) == 2 else None
        if token is None or not fields[1].isdigit() or len(fields[1]) > 9:
            message = f"expected a base64 token and a rank, found {line[:40]!r}"
            fail("bad-tokenizer", message, file=file, where=f"line {number}")
        found.append((int(fields[1]), number, token))
        if len(found) > MAX_TOKENS:
            fail("bad-tokenizer", f"expected at most {MAX_TOKENS} tokens, found more", file=file)
    found.sort()
    for expected, (rank, number, _) in enumerate(found):
        if rank != expected:
            message = f"expected rank {expected}, found {rank}{' again' * (rank < expected)}"
            fail("bad-tokenizer", message, file=file, where=f"line {number}")
    tokens = [token for _, _, token in found]
    fail_all(byte_level.token_problems(tokens, file))
    return {token: rank for rank, token in enumerate(tokens)}


def special_names(*, scaled_rope: bool) -> list[str]:
    """The special tokens in id order, as Llama 3 names them, or Llama 3.1 and later (`scaled_rope`)."""
    names = _NAMES_3_1 if scaled_rope else _NAMES_3_0
    reserved = iter(range(SPECIAL_TOKENS))
    return [
        f"<|{names[offset]}|>" if offset in names else f"<|reserved_special_token_{next(reserved)}|>"
        for offset in range(SPECIAL_TOKENS)
    ]


def has_scaled_rope(config: Mapping[str, Any]) -> bool:
    """Llama 3.1 and later scale their rotary frequencies; Llama 3 does not. params.json or config.json
    names."""
    parameters = config.get("rope_parameters")
    return bool(
        config.get("use_scaled_rope")
        or config.get("rope_scaling")
        or (isinstance(parameters, Mapping) and parameters.get("rope_type", "default") != "default")
    )


def convert(
    data: bytes, *, file: str, config: Mapping[str, Any], more_tokens: More = NO_MORE
) -> TokenizerResult:
    """The Hugging Face files of a Llama 3 tokenizer, `more_tokens` after its ids; the original is kept as
    `original/tokenizer.model`, where Meta's own Hub folders have it and where no sentencepiece reader looks
    for it."""
    ranks = read_ranks(data, file)
    scaled = has_scaled_rope(config)
    special = [AddedToken(len(ranks) + i, text) for i, text in enumerate(special_names(scaled_rope=scaled))]
    fail_all(byte_level.name_clashes(ranks, [token.text for token in special], file))
    bos, eos = special[0], special[1]
    vocab = byte_level.ids_by_text(ranks, 0, special) if more_tokens.ids else {}
    added = [*special, *more_tokens.after(vocab, len(vocab))]
    named = {**more_tokens.named(added), "bos_token": bos.text, "eos_token": eos.text}
    generation = "3.1 and later, as rotary scaling is on" if scaled else "3.0, as rotary scaling is off"
    length = config.get("max_position_embeddings")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        length = 131072 if scaled else 8192
    documents = {
        "tokenizer.json": byte_level.tokenizer_document(
            ranks, first_id=0, pattern=PATTERN, added=added, bos=bos
        ),
        **config_documents(named, added, {"model_max_length": length}),
        "original/tokenizer.model": data,
    }
    notes = [
        f"the {SPECIAL_TOKENS} special tokens are named as in Llama {generation}",
        f"eos_token is {eos.text}; instruction-tuned models end a turn with {special[9].text}, "
        "and no file of the download tells them from base models",
        "text that spells a special token, such as <|eot_id|>, becomes that token; "
        "the original does so only for text it is told to trust",
        "tokenizers before 0.19 (transformers before 4.40) skip `ignore_merges` and split some tokens "
        "further, 588 of the 128000 of Llama 3",
        "Meta's encoder cuts its input every 400000 characters and within runs of more than 25000 spaces or "
        "non-spaces; this one does not",
    ]
    facts = {
        "bos_token_id": Value(bos.id, f"{file}: {bos.text}"),
        "eos_token_id": Value(eos.id, f"{file}: {eos.text}"),
    }
    return TokenizerResult(documents, notes, len(ranks) + len(added), facts)
