"""How many rows of a Megatron vocabulary are words, and the tokenizer that says so; the rest is padding.

Megatron pads the vocabulary to a multiple of `--make-vocab-size-divisible-by` for each rank
(NVIDIA/Megatron-LM, tokenizer/tokenizer.py), and files do not say where the words end.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.weight_sets import is_tokenizer, vocabulary_kind
from ckpt_tool.convert.dialects.megatron_names import Run
from ckpt_tool.convert.dialects.vocabulary import files_beside_or_asked
from ckpt_tool.convert.params import Facts
from ckpt_tool.convert.plan import Options, Value
from ckpt_tool.convert.tokenizers import TokenizerResult, tokenizer_documents


class Published(NamedTuple):
    name: str
    heads: int
    words: int


# The published files, which may hold no args: (layers, width, feed-forward width, positions, rows of words).
PUBLISHED = {
    (24, 1024, 4096, 1024, 50304): Published("GPT-2 345M v0.0", 16, 50257),
    (24, 1024, 4096, 512, 30592): Published("BERT 345M v0.1 uncased", 16, 30522),
    (24, 1024, 4096, 512, 29056): Published("BERT 345M v0.1 cased", 16, 28996),
}
DIVISOR = 128  # --make-vocab-size-divisible-by, by default
LARGEST_RANKS = 64  # over which a vocabulary was padded, when args do not say


def count_words(
    run: Run,
    facts: Facts,
    options: Options,
    rows: Value,
    tokenizer: TokenizerResult,
    known: Published | None,
) -> Value:
    """How many rows of the vocabulary are words and not padding. A `known` model is known only without args:
    others of its sizes may have been trained on other words."""
    if "vocab_size" in facts.settings:
        words = facts.integer("vocab_size")
    elif options.family_options.get("keep_padding"):
        words = Value(rows.value, f"--keep-padding: {rows.source}")
    elif facts.given("orig_vocab_size"):
        words = facts.integer("vocab_size", "orig_vocab_size")
    elif tokenizer.vocab_size:
        where = "--tokenizer" if options.tokenizer is not None else "the tokenizer beside the weights"
        words = Value(tokenizer.vocab_size, f"{where}: its number of ids")
        _check_padding(facts, words, rows)
    elif known is not None and run.args is None:
        words = Value(known.words, f"rule: the sizes are those of {known.name}")
    else:
        words = Value(rows.value, rows.source)
    if words.value > rows.value:
        message = f"expected at most {rows.value} words ({rows.source}), found {words.value}"
        facts.refuse("config-mismatch", message, "vocab_size")
    if tokenizer.vocab_size > words.value:
        message = f"expected a tokenizer of at most {words.value} ids ({words.source}), "
        facts.refuse("bad-tokenizer", f"{message}found {tokenizer.vocab_size}", "vocab_size")
    facts.check()
    return words


def padding_notes(words: Value, rows: Value, tensors: str) -> list[str]:
    left = rows.value - words.value
    if left:
        return [f"{left} rows of padding, after the {words.value} words, are left out of {tensors}"]
    if words.source == rows.source:
        return [
            f"all {rows.value} rows of the vocabulary are kept, padding too if there is some: nothing tells "
            "how many are words (--tokenizer, --set vocab_size=N)"
        ]
    return []


def _check_padding(facts: Facts, words: Value, rows: Value) -> None:
    """A tokenizer that leaves more rows over than padding explains is of another model: the archives of the
    cased and the uncased BERT were confused once."""
    args = facts.document or {}
    divisor = args.get("make_vocab_size_divisible_by")
    divisor = divisor if isinstance(divisor, int) and divisor > 0 else DIVISOR
    left = rows.value - words.value
    padded = {-(-words.value // (divisor * k)) * divisor * k for k in range(1, LARGEST_RANKS + 1)}
    if left >= divisor and rows.value not in padded:
        facts.refuse(
            "bad-tokenizer",
            f"expected about {rows.value} ids ({rows.source}; padding goes up to a multiple of {divisor} for "
            f"each rank), found {words.value} in the tokenizer",
            "vocab_size",
            "give the right one with --tokenizer, or --set vocab_size=N if it is",
        )


def read_tokenizer(
    run: Run, options: Options, *, family: str, rows: Value, positions: Value
) -> TokenizerResult:
    """The vocabulary files beside the weights, or those the user points to, converted."""
    args = run.args or {}
    config = {
        "padded_vocab_size": rows.value,
        "max_position_embeddings": positions.value,
        "tokenizer_type": args.get("tokenizer_type"),
    }
    files = tokenizer_files(run.source.checkpoint, options)
    return tokenizer_documents(files, family=family, config=config)


def tokenizer_files(checkpoint: Checkpoint, options: Options) -> dict[str, bytes]:
    return files_beside_or_asked(checkpoint, options, _is_vocabulary, _with_other_half)


def _with_other_half(path: Path) -> dict[str, Path]:
    """The file, and the other one of vocab.json and merges.txt; any other name is taken for vocab.txt."""
    kind = vocabulary_kind(path.name)
    if kind in (None, "vocab.txt"):
        return {path.name if kind else "vocab.txt": path}
    before = path.name.removesuffix(kind or "")
    pair = [path.with_name(before + half) for half in ("vocab.json", "merges.txt")]
    return {p.name: p for p in pair if p == path or p.is_file()}


def _is_vocabulary(name: str) -> bool:
    return vocabulary_kind(name) is not None or is_tokenizer(name)
