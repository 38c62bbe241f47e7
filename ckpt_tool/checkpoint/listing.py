"""A checkpoint as a table for a notebook: tensors whose names differ only in their numbers in one row."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from ckpt_tool.checkpoint.base import DTYPES, TensorInfo
from ckpt_tool.checkpoint.tensor_names import fold_key, folded_name
from ckpt_tool.errors import printable

if TYPE_CHECKING:
    from ckpt_tool.checkpoint.base import Checkpoint

ROWS = 200


def as_html(checkpoint: Checkpoint) -> str:
    """Names, types and shapes; what a file says stays text."""
    tensors = list(checkpoint)
    size = sum(t.nbytes for t in tensors)
    rows = list(_rows(tensors))
    left = f"<p>and {len(rows) - ROWS} more rows</p>" if len(rows) > ROWS else ""
    head = "".join(f"<th>{c}</th>" for c in ("tensors", "name", "dtype", "shape"))
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[:ROWS])
    words = f"{printable(checkpoint.path)}: {len(tensors):,} tensors, {size:,} bytes"
    return (
        f"<div><p>{escape(words)} in {len(checkpoint.files)} files</p>"
        f'<div style="overflow-x:auto"><table><tr>{head}</tr>{body}</table></div>{left}</div>'
    )


def _rows(tensors: list[TensorInfo]) -> Iterator[tuple[str, str, str, str]]:
    groups: dict[tuple[object, ...], list[TensorInfo]] = {}
    for t in tensors:
        groups.setdefault((fold_key(t.name), t.dtype, t.shape), []).append(t)
    for group in groups.values():
        name = printable(folded_name(list(dict.fromkeys(t.name for t in group))))
        yield str(len(group)), name, DTYPES[group[0].dtype].torch, "x".join(map(str, group[0].shape))
