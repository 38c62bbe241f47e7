"""Tensors that should be copies of one another, and are not: how far apart, and whether that may pass.

Model-parallel shards repeat the tensors that every rank needs. Published ones (Llama 3 70B) differ there in
the last bits, since each rank trained its own copy: harmless, but recorded. A shard of another model, or two
ranks exchanged, differ by the size of the values themselves: never harmless.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field
from math import prod

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.convert.carry import CHUNK, Bound, Carrier, Lane, pieces
from ckpt_tool.convert.casting import CASTABLE, cast
from ckpt_tool.convert.layout import Access, Part, Step
from ckpt_tool.records import dataclass

# bfloat16 has 8 bits of precision: rounding alone moves a value by up to 0.4 %, a few steps of training drift
# by a few of those. Norm weights of neighbouring layers, the most alike of what could be mixed up, differ by
# more.
LARGEST_RELATIVE_RMS = 1e-2  # root mean square of the differences, over that of the values
LARGEST_RELATIVE_DELTA = 2.0**-4  # any single difference, over the largest value


@dataclass
class Difference:
    """How a tensor differs from the copy of it that was kept: over all elements of one step. `rows` are the
    indices of a matrix's first axis, true where anything differs."""

    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool), repr=False)
    count: int = 0
    elements: int = 0
    max_delta: float = 0.0
    largest: float = 0.0
    _squares: float = field(default=0.0, repr=False)
    _delta_squares: float = field(default=0.0, repr=False)

    @property
    def relative_rms(self) -> float:
        if self._delta_squares == 0.0:
            return 0.0
        return float(np.sqrt(self._delta_squares / self._squares)) if self._squares else float("inf")

    @property
    def is_large(self) -> bool:
        """Not what drift between copies explains; also where values are not numbers."""
        return not (
            self.relative_rms <= LARGEST_RELATIVE_RMS
            and self.max_delta <= LARGEST_RELATIVE_DELTA * self.largest
        )

    def to_json(self) -> list[int | str]:
        """Everything but `rows`, exactly."""
        sums = (self.max_delta, self.largest, self._squares, self._delta_squares)
        return [self.count, self.elements, *(x.hex() for x in sums)]

    @classmethod
    def from_json(cls, data: Sequence[int | str]) -> Difference:
        """Raises ValueError or TypeError for anything but what `to_json` gives."""
        count, elements, *sums = data
        found = cls(count=int(count), elements=int(elements))
        numbers = [float.fromhex(str(x)) for x in sums]
        found.max_delta, found.largest, found._squares, found._delta_squares = numbers
        return found

    def add(self, made: np.ndarray, there: np.ndarray, dtype: str) -> None:
        a, b = _values(made, dtype), _values(there, dtype)
        differ = made != there
        self.count += int(np.count_nonzero(differ))
        self.elements += made.size
        with np.errstate(all="ignore"):
            delta = np.where(differ, np.abs(a - b), 0.0)
            delta[np.isnan(delta)] = np.inf
            self.max_delta = max(self.max_delta, float(delta.max(initial=0.0)))
            finite = np.abs(b[np.isfinite(b)])
            self.largest = max(self.largest, float(finite.max(initial=0.0)))
            self._squares += float(np.square(finite).sum())
            self._delta_squares += float(np.square(delta).sum())


def _values(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in CASTABLE:
        out = np.empty(bits.size, dtype="<u8")
        cast(bits, dtype, "F64", out)
        return out.view("<f8")
    value = DTYPES[dtype].value
    return (bits if value is None else bits.view(value)).astype("<f8")  # float8: bits stand for values


def measure(carrier: Carrier, bound: Bound, lane: Lane) -> Difference:
    """Compare a step with its targets, which are already written."""
    step, dtype = bound.step, bound.step.targets[0].dtype
    found = Difference(rows=np.zeros(prod(step.sizes[a] for a in _first(step.targets[0])), dtype=bool))
    for made, there, access, start in _pairs(carrier, bound, lane):
        found.add(made, there, dtype)
        _mark(found.rows, step, access, np.flatnonzero(made != there) + start)
    return found


def _first(part: Part) -> tuple[str, ...]:
    return part.dims[0] if part.dims else ()


def _mark(rows: np.ndarray, step: Step, access: Access, places: np.ndarray) -> None:
    """Mark the rows of the whole matrix in which `places` of a block's write lie."""
    part = step.targets[access.part]
    shape, first = part.shape(step.sizes), _first(part)
    if not first or not places.size:
        return
    begin = part.whole(step.sizes)[first[0]][0] * prod(step.sizes[a] for a in first[1:])
    run, rest = np.divmod(places, access.runs.length)
    rows[begin + (np.array(access.runs.offsets())[run] + rest) // prod(shape[1:])] = True


def _pairs(
    carrier: Carrier, bound: Bound, lane: Lane
) -> Iterator[tuple[np.ndarray, np.ndarray, Access, int]]:
    """What is made and what is there, a chunk of a block's write at a time, with where in it."""
    for block in pieces(bound.step, copy_bytes=CHUNK):
        for made, there, access in carrier.compared(bound, block, lane):
            for start in range(0, made.size, CHUNK):
                yield made[start : start + CHUNK], there[start : start + CHUNK], access, start
