"""Whether tensors have the shapes that steps expect: asked of many at once, a thousand experts a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from ckpt_tool.checkpoint.base import TensorInfo

Expected = tuple[tuple[int, ...], Mapping[str, TensorInfo]]  # a shape, and the tensors of the file it is in
Alike = tuple[Expected, int, int]  # what neighbours have in common; the first of them and the first behind


def expected_alike(parts: Iterable[Expected]) -> list[Alike]:
    """Neighbouring parts of a step that expect one shape in one file as one."""
    found: list[Alike] = []
    for k, (shape, tensors) in enumerate(parts):
        if found and found[-1][0][0] == shape and found[-1][0][1] is tensors:
            found[-1] = (found[-1][0], found[-1][1], k + 1)
        else:
            found.append(((shape, tensors), k, k + 1))
    return found


def fit(expected: Iterable[Alike], columns: Sequence[Sequence[str]]) -> bool:
    """Whether those of the named tensors that are there have their shapes. A column has the names of one part
    in all steps of a template."""
    for (shape, tensors), first, stop in expected:
        named = map(tensors.get, chain.from_iterable(columns[first:stop]))
        if not {t.shape for t in named if t is not None} <= {shape}:
            return False
    return True
