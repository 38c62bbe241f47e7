"""The prompts of one verification: the fixed ones, one longer than the sliding window, a sentence with a
masked word, a padded batch for models that take one, and the user's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.strict_json import parse
from ckpt_tool.errors import fail
from ckpt_tool.fixtures.prompts import prompts as fixed
from ckpt_tool.verify.report import Finding

Prompts = Mapping[str, Sequence[int]] | Sequence[Sequence[int]]

WINDOW_LIMIT = 8192  # tokens; a prompt longer than a wider window costs more than it shows
BEYOND = 64  # tokens after the first that no longer sees position 0


MASKS = ("[MASK]", "<mask>")
MASKED_TEXT = "The capital of France is {}."  # the example of most documentations of such models
BATCH = 40  # tokens of the longer row of the padded batch

# Tables of positions by the end of their names in any layout, and the rows at their beginning that no token
# has: fairseq keeps the first two for padding, and OPT with it.
TABLES = {
    "embed_positions.weight": 2,
    "wpe.weight": 0,
    "position_embeddings.weight": 0,  # also Megatron's `embedding.position_embeddings`
}


@dataclass(frozen=True)
class Prompt:
    """Rows of token ids of one length, run in one pass. `given` are further inputs of the same shape:
    `token_types`, and `mask`, which is 1 for tokens and 0 for padding."""

    ids: list[list[int]]
    given: Mapping[str, list[list[int]]]


def with_inputs(
    rows: Mapping[str, list[int]], inputs: Iterable[str], config: Mapping[str, Any]
) -> dict[str, Prompt]:
    """Each row alone, and for a model that takes them two segments, and a batch of two rows of which one is
    padded."""
    made = {name: Prompt([row], {}) for name, row in rows.items()}
    taken = set(inputs) - ({"token_types"} if config.get("type_vocab_size") in (0, 1) else set())
    if not taken or not {"long", "other"} <= rows.keys():
        return made
    one, two = rows["long"][:BATCH], rows["other"]
    two = two[: max(1, len(one) * 2 // 3)]  # where a short table of positions cut both, still the shorter
    padding = len(one) - len(two)
    types, mask = (
        [_halves(one), _halves(two) + [0] * padding],
        [[1] * len(one), [1] * len(two) + [0] * padding],
    )
    if "token_types" in taken:
        made["segments"] = Prompt([one], {"token_types": types[:1]})
    if "mask" in taken and padding > 0:
        pad = config.get("pad_token_id")
        filled = two + [pad if isinstance(pad, int) else 0] * padding
        given = {"token_types": types, "mask": mask}
        made["padded"] = Prompt([one, filled], {k: v for k, v in given.items() if k in taken})
    return made


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
) -> dict[str, list[int]]:
    """Rows of token ids by name, for the vocabulary of `config`; none where it does not say its size. The
    fixed ones are cut to `table` tokens (None: what `config` says), longer ones of the user are refused."""
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
    rows = {name: row[:table] for name, row in rows.items()}
    given = read_prompts(more) if isinstance(more, str | os.PathLike) else more
    if given is not None:
        named = given if isinstance(given, Mapping) else {f"given {k}": r for k, r in enumerate(given)}
        for name, row in named.items():
            if not row or not all(type(i) is int and 0 <= i < vocabulary for i in row):
                text = f"expected token ids from 0 to {vocabulary - 1}, found others"
                fail("usage", text, where=f"prompt {name}")
            if table is not None and len(row) > table:
                text = f"expected at most {table} tokens, as many as there are positions, found {len(row)}"
                fail("usage", text, where=f"prompt {name}")
            rows[name] = list(row)
    return rows


def positions(config: Mapping[str, Any], *sides: Checkpoint | None) -> int | None:
    """How many tokens a prompt may have: the rows of the shortest table of positions that a side holds, or
    fewer where config.json says so; None where positions have no end. A config that claims more than the
    table has is not believed."""
    rows = [n for side in sides if side is not None for t in side if (n := _rows(t)) is not None]
    said = _positions(config)
    if rows and said is None:
        claimed = config.get("max_position_embeddings")
        said = claimed if type(claimed) is int and claimed > 0 else None
    return min([*rows, *([] if said is None else [said])], default=None)


def _rows(tensor: TensorInfo) -> int | None:
    """The tokens that a table of positions has rows for; None for any other tensor."""
    for name, unused in TABLES.items():
        if tensor.name.endswith(name) and len(tensor.shape) == 2 and tensor.shape[0] > unused:
            return tensor.shape[0] - unused
    return None


def _positions(config: Mapping[str, Any]) -> int | None:
    """What config.json says: CodeGen and GPT-J have n_positions rotary turns instead of a table."""
    learned = config.get("position_embedding_type") == "absolute"
    found = config.get("n_positions", config.get("max_position_embeddings") if learned else None)
    return found if type(found) is int and found > 0 else None


def cut(rows: Mapping[str, list[int]], config: Mapping[str, Any], table: int | None) -> list[Finding]:
    """A note of what the table of positions left of the fixed prompts."""
    whole = prompts_for(config, None, table=sys.maxsize) if table is not None else {}
    short = [
        f"{n} {len(whole[n])} to {len(rows[n])}" for n in whole if n in rows and len(rows[n]) < len(whole[n])
    ]
    if not short:
        return []
    text = (
        f"cut to the {table} positions there are: {', '.join(short)} tokens; what is longer was not compared"
    )
    return [Finding("parity", "prompts", "note", text, data={"positions": table})]


def read_prompts(path: str | os.PathLike[str]) -> Prompts:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        fail("read-failed", f"cannot be read: {error.strerror}", file=path)
    found = parse(data, file=os.fspath(path), kind="usage")
    rows = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) for r in rows):
        fail("usage", 'expected rows of token ids, [[1, 2], ...] or {"name": [1, 2], ...}', file=path)
    made: Prompts = found
    return made
