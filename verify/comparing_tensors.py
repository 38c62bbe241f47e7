"""Two sets of tensors under the same names, held against each other: equal, equal once the wider one is cast,
or how many elements differ, where, by how much, and whether they are the same rows in another order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.convert.casting import CASTABLE, converted
from ckpt_tool.verify.rowmaps import Rows, hashes, span

PIECE = 1 << 18  # elements compared at a time
ROWS = 1 << 17  # rows that are told apart by hashes
NARROW = {"F64": 3, "F32": 2, "F16": 1, "BF16": 1}


@dataclass
class Pair:
    """What comparing one tensor of A with that of B found. `cast` is the dtype in which they are compared
    where they have different ones; `first` the first element that differs."""

    a: TensorInfo
    b: TensorInfo
    cast: str | None = None
    count: int = 0
    first: int | None = None
    values: tuple[float, float] = (0.0, 0.0)
    max_delta: float = 0.0
    moved: float = 0.0  # sum of squares of the difference
    size: float = 0.0  # sum of squares of A
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    order: str | None = None  # in words, where B has A's rows in another order

    @property
    def comparable(self) -> bool:
        return self.a.shape == self.b.shape and (
            self.a.dtype == self.b.dtype or {self.a.dtype, self.b.dtype} <= set(CASTABLE)
        )

    @property
    def equal(self) -> bool:
        return self.comparable and self.count == 0

    @property
    def relative(self) -> float:
        """The size of the difference against that of A's tensor, as Frobenius norms."""
        if not math.isfinite(self.moved):  # of values that are not finite, or whose squares are not
            return math.inf
        return math.sqrt(self.moved / self.size) if self.size else math.inf if self.moved else 0.0

    def where(self) -> str:
        """Which rows differ, in words."""
        rows = np.flatnonzero(self.rows)
        total = len(self.rows)
        if len(rows) in (0, total) or total == 1:
            return "in every row" if total > 1 else ""
        last = int(rows[-1])
        if last - int(rows[0]) + 1 == len(rows):
            return f"in row{'s' * (len(rows) > 1)} {span(int(rows[0]), len(rows))} of {total:,}"
        return f"in {len(rows):,} of {total:,} rows, the first {int(rows[0]):,}"


def compared(a: Checkpoint, b: Checkpoint, one: TensorInfo, other: TensorInfo) -> Pair:
    """Compare tensor `one` of `a` with `other` of `b`, in pieces."""
    found = [_in(a, b, one, other, dtype) for dtype in _ways(one.dtype, other.dtype)[:1]]
    if found[0].count:  # two types of 16 bits: either may have been made of the other
        found += [_in(a, b, one, other, dtype) for dtype in _ways(one.dtype, other.dtype)[1:]]
    return min(found, key=lambda p: p.count)


def _ways(one: str, other: str) -> list[str | None]:
    """The dtypes that both may be compared in, None for their own: the one that holds fewer values, or each
    where neither holds the other."""
    if one == other or not {one, other} <= NARROW.keys():
        return [None]
    if NARROW[one] == NARROW[other]:
        return [other, one]
    return [min(one, other, key=NARROW.__getitem__)]


def _in(a: Checkpoint, b: Checkpoint, one: TensorInfo, other: TensorInfo, dtype: str | None) -> Pair:
    pair = Pair(one, other, dtype)
    if not pair.comparable:
        return pair
    row = prod(one.shape[1:]) if one.shape else 1
    pair.rows = np.zeros(one.shape[0] if one.shape else 1, bool)
    for start, x, y in _pieces(a, b, one, other, pair.cast):
        _add(pair, start, x, y, max(row, 1))
    same_rows = len(one.shape) > 1 and pair.count and pair.cast is None
    if same_rows and len(pair.rows) <= ROWS and pair.rows.sum() > 1:
        pair.order = _order(a, b, one, other)
    return pair


def _pieces(
    a: Checkpoint, b: Checkpoint, one: TensorInfo, other: TensorInfo, dtype: str | None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for start in range(0, one.numel, PIECE):
        n = min(PIECE, one.numel - start)
        x, y = _read(a, one, start, n), _read(b, other, start, n)
        if dtype is None:
            yield start, x, y
        else:
            yield start, converted(x, one.dtype, dtype), converted(y, other.dtype, dtype)


def _read(checkpoint: Checkpoint, tensor: TensorInfo, start: int, n: int) -> np.ndarray:
    out = np.empty(n, dtype=DTYPES[tensor.dtype].bits)
    checkpoint.read_into(tensor, start * out.itemsize, out.data.cast("B"))
    return out


def _numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values as float64; integers as they are."""
    if dtype in CASTABLE:
        return converted(bits, dtype, "F64").view("<f8")
    if dtype in EIGHTS:
        return np.asarray(EIGHTS[dtype][bits])
    return bits.view("u1" if dtype == "BOOL" else DTYPES[dtype].value or DTYPES[dtype].bits)


def _eights(exponents: int, bias: int) -> np.ndarray:
    """What each of the 256 numbers of 8 bits is; those beyond the largest one are set by the caller."""
    bits = np.arange(256)
    mantissas = 7 - exponents
    e, m = (bits & 127) >> mantissas, (bits & ((1 << mantissas) - 1)) / (1 << mantissas)
    made = np.where(e == 0, m * 2.0 ** (1 - bias), (1 + m) * 2.0 ** (e - float(bias)))
    return np.where(bits & 128, -made, made)


def _eights_of_both() -> dict[str, np.ndarray]:
    """Micikevicius et al., arXiv 2209.05433, table 1: E4M3 has no infinities and one NaN of each sign."""
    e4m3, e5m2 = _eights(4, 7), _eights(5, 15)
    e4m3[[0x7F, 0xFF]] = np.nan
    e5m2[[0x7C, 0xFC]] = np.inf, -np.inf
    e5m2[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return {"F8_E4M3": e4m3, "F8_E5M2": e5m2}


EIGHTS = _eights_of_both()


def _apart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """|u - v| as float64, infinite where it is no number; of integers without what float64 cannot hold."""
    if u.dtype.kind in "iu":
        return np.asarray(np.maximum(u, v).astype("<u8") - np.minimum(u, v).astype("<u8"), "<f8")
    with np.errstate(all="ignore"):
        delta = np.abs(u - v)
    return np.where(np.isfinite(delta), delta, np.inf)


def _add(pair: Pair, start: int, x: np.ndarray, y: np.ndarray, row: int) -> None:
    dtype = pair.cast or pair.a.dtype
    places = np.flatnonzero(x != y)
    one = _numbers(x, dtype)
    with np.errstate(all="ignore"):
        pair.size += float(np.square(one[np.isfinite(one)], dtype="<f8").sum())
    if not places.size:
        return
    u, v = one[places], _numbers(y[places], dtype)
    delta = _apart(u, v)
    with np.errstate(all="ignore"):
        pair.moved += float(np.square(delta).sum())
    pair.max_delta = max(pair.max_delta, float(delta.max()))
    pair.rows[np.unique((start + places) // row)] = True
    pair.count += places.size
    if pair.first is None:
        pair.first, pair.values = start + int(places[0]), (u[0].item(), v[0].item())


def _order(a: Checkpoint, b: Checkpoint, one: TensorInfo, other: TensorInfo) -> str | None:
    expected, found = (_hashed(c, t) for c, t in ((a, one), (b, other)))
    if not np.array_equal(np.sort(expected), np.sort(found)):
        return None
    return Rows(expected, found, (), 1, "row").words() or "the same rows in another order"


def _hashed(checkpoint: Checkpoint, tensor: TensorInfo) -> np.ndarray:
    row = prod(tensor.shape[1:])
    step = max(1, 4 * PIECE // max(row, 1))
    made = [
        hashes(_read(checkpoint, tensor, k * row, min(step, tensor.shape[0] - k) * row).reshape(-1, row))
        for k in range(0, tensor.shape[0], step)
    ]
    return np.concatenate(made)
