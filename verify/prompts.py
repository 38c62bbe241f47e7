"""The prompts of one verification: the fixed ones, one longer than the sliding window, a sentence with a
masked word, a padded batch for models that take one, and the user's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.strict_json import parse
from ckpt_tool.convert.facts import class_of, classes
from ckpt_tool.errors import fail, fail_unread
from ckpt_tool.fixtures.prompts import prompts as fixed
from ckpt_tool.verify.report import Finding

Prompts = Mapping[str, Sequence[int]] | Sequence[Sequence[int]]

WINDOW_LIMIT = 8192  # tokens; a prompt longer than a wider window costs more than it shows
BEYOND = 64  # tokens after the first that no longer sees position 0


MASKS = ("[MASK]", "<mask>")
MASKED_TEXT = "The capital of France is {}."  # the example of most documentations of such models
BATCH = 40  # tokens of the longer row of the padded batch
TIMES = 3  # the multiple of the trained length that a far text goes past
FARTHEST = 1 << 22  # whose multiples float32 still counts one by one

# Tables of positions by the end of their names in any layout, and the rows at their beginning that no token
# has: fairseq keeps the first two for padding, and OPT with it.
TABLES = {
    "embed_positions.weight": 2,
    "wpe.weight": 0,
    "position_embeddings.weight": 0,  # also Megatron's `embedding.position_embeddings`
    "position_embeddings": 0,  # a variable of TensorFlow
}
# A vector of biases by relative position, from the farthest before to the farthest after.
RELATIVE = ".rel_pos_bias"


@dataclass(frozen=True)
class Prompt:
    """Rows of token ids of one length, run in one pass. `given` are further inputs by name, nested lists
    whose first axis is that of the rows (reference/__init__.py has their shapes)."""

    ids: list[list[int]]
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Lengths:
    """What the readings say of lengths: `fits` gives the largest number of tokens, up to the one that it is
    asked about, that a pass takes (0: none), `padded` how many of so many tokens a row may have that is
    padded to a longer one."""

    fits: Callable[[int], int] = lambda tokens: tokens
    padded: Callable[[int, int], int] = lambda tokens, longest: tokens

    def cut(self, rows: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """The rows that there are at the lengths that fit."""
        fitted = {name: row[: self.fits(len(row))] for name, row in rows.items()}
        return {name: row for name, row in fitted.items() if row}


def padding_of(config: Mapping[str, Any]) -> int | None:
    """The id that fills rows, as the class reads config.json: some have one where it says none."""
    kind = class_of(config)
    usual = {} if kind is None else classes()[kind].identity
    found = {**usual, **config}.get("pad_token_id")
    return found if type(found) is int else None


def with_inputs(
    rows: Mapping[str, list[int]],
    inputs: Iterable[str],
    config: Mapping[str, Any],
    lengths: Lengths = Lengths(),
) -> dict[str, Prompt]:
    """Each row alone, and for a model that takes them two segments, two entities, and a batch of two rows of
    which one is padded, in words and entities."""
    made = {name: Prompt([row], {}) for name, row in rows.items()}
    taken = set(inputs) - ({"token_types"} if config.get("type_vocab_size") in (0, 1) else set())
    if not taken or not {"long", "other"} <= rows.keys():
        return made
    pad = padding_of(config) or 0
    one, two = rows["long"][:BATCH], rows["other"]
    one = _without(pad, one[: lengths.fits(len(one))])
    two = _without(pad, two[: max(1, len(one) * 2 // 3)])  # where a short table cut both, still the shorter
    two = two[: lengths.padded(len(two), len(one))]
    padding = len(one) - len(two)
    given: dict[str, Any] = {
        "token_types": [_halves(one), _halves(two) + [0] * padding],
        "mask": [[1] * len(one), [1] * len(two) + [0] * padding],
    }
    if taken >= set(ENTITIES):
        given |= entities(len(one), len(two), config.get("entity_vocab_size"))
    own = {name: x for name, x in given.items() if name in taken}
    if "positions" in taken and (start := _far(config)) is not None:
        made["far"] = Prompt([one], {"positions": [list(range(start, start + len(one)))]})
    if "token_types" in own:
        made["segments"] = Prompt([one], {"token_types": own["token_types"][:1]})
    if "entity_ids" in own:
        alone = {name: [x[0][:2]] for name, x in own.items() if name.startswith("entity_")}
        made["entities"] = Prompt([one], alone)
    if "mask" in own and padding > 0 and two:
        made["padded"] = Prompt([one, two + [pad] * padding], own)
    return made


def _far(config: Mapping[str, Any]) -> int | None:
    """Where a text begins that lies beyond the length the model was trained for, and goes past a multiple of
    it; None where config.json has no such length."""
    found = config.get("rope_parameters") or config.get("rope_scaling")
    length = found.get("original_max_position_embeddings") if isinstance(found, Mapping) else None
    if type(length) is not int or not 0 < length <= FARTHEST:
        return None
    return max(0, TIMES * length - BATCH // 2)


ENTITIES = ("entity_ids", "entity_mask", "entity_positions")
PLACES = 5  # tokens that a mention may have; one more than the longest has
SHORTEST = 8  # tokens that leave room for the mentions


def entities(longer: int, shorter: int, vocabulary: Any) -> dict[str, Any]:
    """Entities of two rows of so many tokens: three in the first, mentions of one, three and four tokens; in
    the second one, and two of padding. Nothing where there is no vocabulary of entities, or no room."""
    if type(vocabulary) is not int or vocabulary < 2 or shorter < SHORTEST:
        return {}
    ids = [(17 + 7919 * k * k + 31 * k) % vocabulary for k in range(1, 5)]
    spans = [(longer // 3, 1), (longer // 2, 3), (1, 4)]
    return {
        "entity_ids": [ids[:3], [ids[3], 0, 0]],
        "entity_mask": [[1, 1, 1], [1, 0, 0]],
        "entity_positions": [
            [_mention(*span) for span in spans],
            [_mention(shorter // 2, 2), *[_mention(0, 0)] * 2],
        ],
        # the first and the last token of each
        "entity_start": [[first for first, _ in spans], [shorter // 2, 0, 0]],
        "entity_end": [[first + count - 1 for first, count in spans], [shorter // 2 + 1, 0, 0]],
    }


def _mention(first: int, tokens: int) -> list[int]:
    return [*range(first, first + tokens), *[-1] * (PLACES - tokens)]


def _without(pad: int, row: list[int]) -> list[int]:
    """The row with another token where it has that of padding, which some models tell by its id alone."""
    other = next((i for i in row if i != pad), pad)
    return [other if i == pad else i for i in row]


def _halves(row: list[int]) -> list[int]:
    """Token types of two segments, of which the first is the shorter."""
    first = len(row) // 3
    return [0] * first + [1] * (len(row) - first)


def masked_row(tokenizer: Any) -> dict[str, list[int]]:
    """The prompt of a masked word for a tokenizer that has a token for it."""
    word = (
        None if tokenizer is None else next((m for m in MASKS if tokenizer.token_to_id(m) is not None), None)
    )
    return {} if word is None else {"masked": list(tokenizer.encode(MASKED_TEXT.format(word)).ids)}


def tokenizer_of(checkpoint: Checkpoint | None) -> Any:
    """tokenizer.json of the Hugging Face side through the `tokenizers` library; None without either."""
    if checkpoint is None or "tokenizer.json" not in checkpoint.documents:
        return None
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(checkpoint.documents["tokenizer.json"].read(64 << 20).decode())
    except Exception:  # the library raises bare Exception for a file that it cannot read
        return None


def prompts_for(
    config: Mapping[str, Any],
    more: str | os.PathLike[str] | Prompts | None,
    tokenizer: Any = None,
    *,
    table: int | None = None,
    lengths: Lengths = Lengths(),
) -> dict[str, list[int]]:
    """Rows of token ids by name, for the vocabulary of `config`; none where it does not say its size. The
    fixed ones are cut to `table` tokens (None: what `config` says) and to lengths that fit; those of the user
    that would have to be cut are refused."""
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 2:
        return {}
    bos = config.get("bos_token_id")
    rows = fixed(vocabulary, bos=bos if isinstance(bos, int) else None)
    window = config.get("sliding_window")
    longest = max(map(len, rows.values()))
    if isinstance(window, int) and longest <= window < WINDOW_LIMIT:
        more_ids = window + BEYOND - longest
        rows["window"] = rows["long"] + [(17 + 7919 * k * k + 31 * k) % vocabulary for k in range(more_ids)]
    rows |= {n: row for n, row in masked_row(tokenizer).items() if max(row, default=vocabulary) < vocabulary}
    table = _positions(config) if table is None else table
    rows = lengths.cut({name: row[:table] for name, row in rows.items()})
    if more is not None:
        for name, row in named_prompts(more).items():
            if not row or not all(type(i) is int and 0 <= i < vocabulary for i in row):
                text = f"expected token ids from 0 to {vocabulary - 1}, found others"
                fail("usage", text, where=f"prompt {name}")
            if table is not None and len(row) > table:
                text = f"expected at most {table} tokens, as many as there are positions, found {len(row)}"
                fail("usage", text, where=f"prompt {name}")
            if (fitting := lengths.fits(len(row))) != len(row):
                near = f"{fitting} are the most below" if fitting else "as no shorter one does either"
                text = f"expected a number of tokens that the model takes, found {len(row)} ({near})"
                fail("usage", text, where=f"prompt {name}")
            rows[name] = list(row)
    return rows


def named_prompts(more: str | os.PathLike[str] | Prompts | None) -> Mapping[str, Sequence[int]]:
    """The rows of the user by their names, or by their numbers where they have none."""
    given = read_prompts(more) if isinstance(more, str | os.PathLike) else more or ()
    return given if isinstance(given, Mapping) else {f"given {k}": r for k, r in enumerate(given)}


def positions(config: Mapping[str, Any], *sides: Checkpoint | None) -> int | None:
    """How many tokens a prompt may have: the rows of the shortest table of positions that a side holds, or
    fewer where config.json says so; None where positions have no end. A config that claims more than the
    table has is not believed."""
    chunked = bool(config.get("use_chunking"))
    rows = [
        n for side in sides if side is not None for t in side if (n := table_rows(t, chunked)) is not None
    ]
    said = _positions(config)
    if rows and said is None:
        claimed = config.get("max_position_embeddings")
        said = claimed if type(claimed) is int and claimed > 0 else None
    return min([*rows, *([] if said is None else [said])], default=None)


def table_rows(tensor: TensorInfo, chunked: bool) -> int | None:
    """The tokens that a table of positions has rows for; None for any other tensor, and for biases that are
    of the positions in a chunk, of which a prompt may have many."""
    for name, unused in TABLES.items():
        if tensor.name.endswith(name) and len(tensor.shape) == 2 and tensor.shape[0] > unused:
            return tensor.shape[0] - unused
    if tensor.name.endswith(RELATIVE) and len(tensor.shape) == 1 and not chunked:
        return (tensor.shape[0] + 1) // 2
    return None


def _positions(config: Mapping[str, Any]) -> int | None:
    """What config.json says: CodeGen and GPT-J have n_positions rotary turns instead of a table."""
    learned = config.get("position_embedding_type") == "absolute"
    found = config.get("n_positions", config.get("max_position_embeddings") if learned else None)
    return found if type(found) is int and found > 0 else None


def cut(rows: Mapping[str, list[int]], config: Mapping[str, Any], table: int | None) -> list[Finding]:
    """A note of what the table of positions, and the lengths that a pass takes, left of the fixed prompts."""
    whole = prompts_for(config, None, table=sys.maxsize)
    left = {n: (len(row), len(rows.get(n, ()))) for n, row in whole.items()}
    short = [f"{n} {had} to {kept}" for n, (had, kept) in left.items() if kept < had]
    if not short:
        return []
    tables = [kept for _, kept in left.values() if kept == table]
    why = f"the {table} positions there are" if tables else "lengths that the pass takes"
    text = f"cut to {why}: {', '.join(short)} tokens; what is longer was not compared"
    return [Finding("parity", "prompts", "note", text, data={"positions": table})]


def read_prompts(path: str | os.PathLike[str]) -> Prompts:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        fail_unread(error, path)
    found = parse(data, file=os.fspath(path), kind="usage")
    rows = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) for r in rows):
        fail("usage", 'expected rows of token ids, [[1, 2], ...] or {"name": [1, 2], ...}', file=path)
    made: Prompts = found
    return made
