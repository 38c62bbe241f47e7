"""Weights that a graph has but for the lesser part of their numbers: what folds something in changes all of
them, and of rows that no prompt has no result tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import numpy as np
from torch import Tensor

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.onnx_file import OnnxFile

RUNS, RUN = 16, 64  # of a tensor that is looked at before all of it is read: places, and numbers from each on


def in_part(
    file: OnnxFile, tensors: Mapping[str, Tensor], missing: Sequence[str], loose: Iterable[str]
) -> Iterator[str]:
    """In words, for each of `missing` (names of `tensors`) of which one of the graph's tensors `loose` is the
    greater part. A few numbers of each of these are read once, and all of those alone that have some in
    common: where hundreds have one shape and nothing fits, no pair is read."""
    shapes = {shape for n in missing for shape in (tuple(tensors[n].shape), tuple(tensors[n].shape[::-1]))}
    own = [n for n in loose if file.tensors[n].dtype in ("F32", "F16") and file.tensors[n].shape in shapes]
    few = {n: _few(file, n) for n in own}
    for name in missing:
        x = tensors[name].numpy()
        said = (_said(file, n, name, x) for n in own if _common(few[n], file.tensors[n].shape, x))
        text = next((text for text in said if text), None)
        if text is not None:
            yield text


def _few(file: OnnxFile, name: str) -> np.ndarray:
    """The numbers of `_places` of one of the graph's tensors."""
    t = file.tensors[name]
    dtype = np.dtype(DTYPES[t.dtype].value)
    runs = []
    for run in _places(prod(t.shape)):
        found = np.empty(len(run), dtype)
        file.read_into(name, int(run[0]) * dtype.itemsize, found.view(np.uint8).data)
        runs.append(found)
    return np.concatenate(runs)


def _places(count: int) -> list[np.ndarray]:
    """Runs of neighbours all over `count` numbers; all of these where they are few."""
    if count <= RUNS * RUN:
        return [np.arange(count)]
    return [int(start) + np.arange(RUN) for start in np.linspace(0, count - RUN, RUNS)]


def _views(x: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """`x` as it is and transposed, as far as that has the shape."""
    return [y for y in ((x, x.T) if x.ndim == 2 else (x,)) if y.shape == shape]


def _common(few: np.ndarray, shape: tuple[int, ...], x: np.ndarray) -> bool:
    """Whether some of the numbers of `few` are where they are in `x`. Far less than the half that is asked
    for in the end: of all places that differ many may be among these."""
    at = np.unravel_index(np.concatenate(_places(prod(shape))), shape)
    found = (_counted(few, y[at]) for y in _views(x, shape))
    return any(16 * same >= full for _, same, full in found)


def _counted(found: np.ndarray, wanted: np.ndarray) -> tuple[int, int, int]:
    """How many numbers differ, are the same and are not 0, which no factor changes, and are not 0."""
    with np.errstate(over="ignore"):
        rounded = wanted.astype(found.dtype)
    same = rounded.view(f"u{found.itemsize}") == found.view(f"u{found.itemsize}")
    full = wanted != 0
    return int((~same).sum()), int((same & full).sum()), int(full.sum())


def _said(file: OnnxFile, n: str, name: str, x: np.ndarray) -> str | None:
    t = file.tensors[n]
    found = np.empty(t.shape, DTYPES[t.dtype].value)
    file.read_into(n, 0, found.reshape(-1).view(np.uint8).data)
    for wanted in _views(x, t.shape):
        other, same, full = _counted(found, wanted)
        if other and 2 * same > full:
            return f"{n} holds {name} but for {other:,} of its {found.size:,} numbers"
    return None
