"""How many rows of a Megatron vocabulary are words, and the tokenizer that says so; the rest is padding.

Megatron pads the vocabulary to a multiple of `--make-vocab-size-divisible-by` for each rank
(NVIDIA/Megatron-LM, tokenizer/tokenizer.py), and files do not say where the words end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ckpt_tool.checkpoint.weight_sets import is_tokenizer, vocabulary_kind
from ckpt_tool.convert.dialects.megatron_ranks import DIVISOR, Run, args_of
from ckpt_tool.convert.dialects.vocabulary import files_beside_or_asked
from ckpt_tool.convert.numbers import Field, Known, count
from ckpt_tool.convert.plan import Options, Value
from ckpt_tool.convert.tokenizers import ADDED, MAP, TokenizerResult, tokenizer_documents
from ckpt_tool.convert.vocabularies import Vocabulary as Vocabulary

LARGEST_RANKS = 64  # over which a vocabulary was padded, when args do not say


class Published(NamedTuple):
    """A published model, whose files may hold no args."""

    name: str
    heads: int
    words: int


# (layers, width, feed-forward width, positions, rows of words) -> the published model of these sizes
Sizes = Mapping[tuple[int, int, int, int, int], Published]


def published_as(known: Known, published: Sizes) -> Published | None:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "max_position_embeddings", "rows")
    layers, width, ffn, positions, rows = (known[name] for name in names)
    return published.get((layers, width, ffn, positions, rows))


def words(published: Sizes) -> Field:
    """vocab_size counts the rows that are words and not padding. A published model is known only without
    args: others of its sizes may have been trained on other words."""

    def keys(known: Known) -> tuple[str, ...]:
        return () if known.options.family_options.get("keep_padding") else ("orig_vocab_size",)

    def rule(known: Known) -> Value:
        rows, ids = known.value("rows"), known.told["ids"].value
        if known.options.family_options.get("keep_padding"):
            return Value(rows.value, f"--keep-padding: {rows.source}")
        if ids:
            _check_padding(known, ids, rows)
            return Value(ids, known.told["ids"].source)
        model = published_as(known, published)
        if model is not None and known.source.told is None:
            return Value(model.words, f"rule: the sizes are those of {model.name}")
        return rows

    return count("vocab_size", read=keys, rule=rule, check=_words_fit)


def _words_fit(known: Known, found: Value) -> Value:
    if known.back:
        return found
    rows, ids = known.value("rows"), known.told["ids"].value
    if found.value > rows.value:
        message = f"expected at most {rows.value} words ({rows.source}), found {found.value}"
        known.refuse("config-mismatch", message, "vocab_size")
    if ids > found.value:
        message = f"expected a tokenizer of at most {found.value} ids ({found.source}), found {ids}"
        known.refuse("bad-tokenizer", message, "vocab_size")
    return found


def _check_padding(known: Known, ids: int, rows: Value) -> None:
    """A tokenizer that leaves more rows over than padding explains is of another model: the archives of the
    cased and the uncased BERT were confused once."""
    divisor = args_of(known).get("make_vocab_size_divisible_by")
    divisor = divisor if isinstance(divisor, int) and divisor > 0 else DIVISOR
    padded = {-(-ids // (divisor * k)) * divisor * k for k in range(1, LARGEST_RANKS + 1)}
    if rows.value - ids >= divisor and rows.value not in padded:
        known.refuse(
            "bad-tokenizer",
            f"expected about {rows.value} ids ({rows.source}; padding goes up to a multiple of {divisor} for "
            f"each rank), found {ids} in the tokenizer",
            "vocab_size",
            "give the right one with --tokenizer, or --set vocab_size=N if it is",
        )


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


# --- the tokenizer --------------------------------------------------------------------------------------


def read_tokenizer(family: str, run: Run, options: Options, *, rows: int, positions: int) -> TokenizerResult:
    """The vocabulary files beside the weights, or those the user points to, converted."""
    config = {
        "padded_vocab_size": rows,
        "max_position_embeddings": positions,
        "tokenizer_type": run.args.get("tokenizer_type"),
    }
    files = files_beside_or_asked(run.checkpoint, options, _is_vocabulary, _with_other_half)
    return tokenizer_documents(files, family=family, config=config)


def _with_other_half(path: Path) -> dict[str, Path]:
    """The file, and the other one of vocab.json and merges.txt; any other name is taken for vocab.txt."""
    kind = vocabulary_kind(path.name)
    if kind in (None, "vocab.txt"):
        return {path.name if kind else "vocab.txt": path}
    before = path.name.removesuffix(kind or "")
    pair = [path.with_name(before + half) for half in ("vocab.json", "merges.txt")]
    return {p.name: p for p in pair if p == path or p.is_file()}


def _is_vocabulary(name: str) -> bool:
    return vocabulary_kind(name) is not None or is_tokenizer(name) or name in (ADDED, MAP)
