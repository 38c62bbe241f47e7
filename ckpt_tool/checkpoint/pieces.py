"""A tensor that lies in pieces: boxes of a whole, each in a place of its own, read as one dense tensor.

Files of many processes hold boxes (offset and size along each axis) and nothing says that they make a whole:
it is checked, exactly, before any of them is read.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from ckpt_tool.records import dataclass

Numbers = tuple[int, ...]
Bits = npt.NDArray[np.unsignedinteger]
P = TypeVar("P")  # where a piece lies

CELLS = 1 << 22  # of the grid that the borders of all pieces of one tensor make
BLOCK = 4 << 20  # dense bytes that are put together at once
LONG = 64 << 10  # bytes that, of a tensor with one axis, are read as they are asked for


@dataclass(frozen=True, slots=True)
class Piece(Generic[P]):
    """A box of a tensor: its first element and its size along each axis, in elements."""

    start: Numbers
    size: Numbers
    place: P

    def __str__(self) -> str:
        return box(self.start, tuple(a + n for a, n in zip(self.start, self.size, strict=True)))


@dataclass(frozen=True, slots=True)
class Boxes(Sequence[Piece[int]]):
    """The pieces of one tensor without an object for each, in the order of their first elements: `starts` and
    `sizes` are int64 arrays [pieces, axes]. The place of a piece is its number, that of the first `first`."""

    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    first: int

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, key: int) -> Piece[int]: ...
    @overload
    def __getitem__(self, key: slice) -> list[Piece[int]]: ...
    def __getitem__(self, key: int | slice) -> Piece[int] | list[Piece[int]]:
        if isinstance(key, slice):
            return [self[k] for k in range(*key.indices(len(self)))]
        k = range(len(self))[key]
        return Piece(tuple(self.starts[k].tolist()), tuple(self.sizes[k].tolist()), self.first + k)

    def near(self, first: int, last: int) -> list[Piece[int]]:
        """Those that may have some of the rows `first` to `last` of the first axis."""
        rows = self.starts[:, 0]
        low, high = np.searchsorted(rows, (first - int(self.sizes[:, 0].max()), last), "right")
        return self[int(low) : int(high)]


def _row(p: Piece[P]) -> int:
    return p.start[0]


def _near(pieces: Sequence[Piece[P]], first: int, last: int) -> Sequence[Piece[P]]:
    if isinstance(pieces, Boxes):
        return pieces.near(first, last)  # type: ignore[return-value]
    widest = max(p.size[0] for p in pieces)
    low = bisect_right(pieces, first - widest, key=_row)
    return pieces[low : bisect_right(pieces, last, key=_row)]


def box(first: Numbers, stop: Numbers) -> str:
    """`[0:3, 4:8]`."""
    return f"[{', '.join(f'{a}:{b}' for a, b in zip(first, stop, strict=True))}]"


def tiling_fault(shape: Numbers, pieces: Sequence[Piece[P]]) -> tuple[str, str] | None:
    """What keeps `pieces` from making up a tensor of `shape`, each element once: the kind of the error, and
    the first place of it in words. None where they do."""
    for p in () if isinstance(pieces, Boxes) else pieces:
        if not len(p.start) == len(p.size) == len(shape) or max((0, *p.start, *p.size, *shape)) >= 1 << 63:
            return _outside(shape, p)
    if len(pieces) == 1 and pieces[0].size == shape and not any(pieces[0].start):
        return None
    if isinstance(pieces, Boxes):
        starts, sizes = pieces.starts, pieces.sizes
    else:
        numbers = np.array([(*p.start, *p.size) for p in pieces], np.int64).reshape(
            len(pieces), 2, len(shape)
        )
        starts, sizes = numbers[:, 0], numbers[:, 1]
    if starts.shape[1] != len(shape):
        return _outside(shape, pieces[0])
    whole = np.array(shape, np.int64)
    inside = ((starts >= 0) & (sizes >= 0) & (starts <= whole) & (sizes <= whole - starts)).all(axis=1)
    if not inside.all():
        return _outside(shape, pieces[int(np.argmin(inside))])
    if prod(shape) == 0:
        return None
    solid = np.flatnonzero((sizes > 0).all(axis=1))
    return _covering_fault(shape, starts[solid], sizes[solid])


def _outside(shape: Numbers, piece: Piece[P]) -> tuple[str, str]:
    return "size-mismatch", f"expected pieces inside {list(shape)}, found {piece}"


def _covering_fault(
    shape: Numbers, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> tuple[str, str] | None:
    """As `tiling_fault`, for boxes with elements that lie inside. Their borders make a grid, and each covers
    a box of its cells."""
    ends = starts + sizes
    borders = [np.unique(np.concatenate(([0, n], starts[:, k], ends[:, k]))) for k, n in enumerate(shape)]
    cells = [len(b) - 1 for b in borders]
    if prod(cells) > CELLS:
        return "limits", f"expected pieces that border on at most {CELLS} cells, found {prod(cells)}"
    low = np.stack([np.searchsorted(b, starts[:, k]) for k, b in enumerate(borders)], 1) if shape else starts
    high = np.stack([np.searchsorted(b, ends[:, k]) for k, b in enumerate(borders)], 1) if shape else ends
    covered = np.zeros(cells, np.uint8)
    each = bool(shape) and bool((high == low + 1).all())  # a cell each, as almost always
    numbers = np.ravel_multi_index(tuple(low.T), tuple(cells)) if each else low[:, 0:0]
    if each and len(np.unique(numbers)) == len(numbers):
        covered.reshape(-1)[numbers] = 1
    else:
        for k, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
            where = tuple(map(slice, a, b))
            if covered[where].any():
                return "shard-conflict", _overlap(starts, ends, k)
            covered[where] = 1
    if covered.all():
        return None
    hole = [int(k) for k in np.argwhere(covered == 0)[0]]
    first = tuple(int(b[k]) for b, k in zip(borders, hole, strict=True))
    stop = tuple(int(b[k + 1]) for b, k in zip(borders, hole, strict=True))
    return "missing-shard", f"expected a piece for {box(first, stop)} of {list(shape)}, found none"


def _overlap(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], k: int) -> str:
    """That piece `k` has elements of an earlier one."""
    meet = (np.maximum(starts[:k], starts[k]) < np.minimum(ends[:k], ends[k])).all(axis=1)
    one, other = (box(tuple(starts[i].tolist()), tuple(ends[i].tolist())) for i in (int(np.argmax(meet)), k))
    return f"expected pieces apart from each other, found {one} and {other}"


Read = Callable[[P, int, Bits], None]  # fill the array with a piece's dense elements from a given one on


class Joined(Generic[P]):
    """Tensors in pieces as dense bytes. `read` reads of one piece; each thread keeps the last block that it
    put together, as callers ask for smaller parts in order."""

    def __init__(self, read: Read[P]) -> None:
        self._read = read
        self._local = threading.local()

    def read_into(
        self,
        name: str,
        shape: Numbers,
        pieces: Sequence[Piece[P]],
        bits: str,
        offset: int,
        buffer: memoryview,
    ) -> None:
        """Fill `buffer` with the bytes from `offset` on of the row-major tensor `name`; `bits` is the numpy
        type of an element's bits, `pieces` make the tensor up and are in the order of their first
        elements."""
        itemsize = np.dtype(bits).itemsize
        if len(shape) == 1 and len(buffer) >= LONG and not (offset % itemsize or len(buffer) % itemsize):
            dense: Bits = np.frombuffer(buffer, np.dtype(bits))
            self._fill(dense, shape, pieces, offset // itemsize)
            return
        per_block = BLOCK // itemsize
        done = 0
        while done < len(buffer):
            number, skip = divmod(offset + done, per_block * itemsize)
            if getattr(self._local, "held", None) != (name, number):
                first = number * per_block
                dense = np.empty(min(per_block, prod(shape) - first), np.dtype(bits))
                self._fill(dense, shape, pieces, first)
                self._local.dense, self._local.held = dense.data.cast("B"), (name, number)
            part = self._local.dense[skip : skip + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def forget(self) -> None:
        self._local = threading.local()

    def _fill(self, out: Bits, shape: Numbers, pieces: Sequence[Piece[P]], first: int) -> None:
        """The elements from `first` on."""
        if not shape:
            self._read(pieces[0].place, 0, out)
            return
        done = 0
        for corner, rows in runs(shape, first, first + len(out)):
            last = corner[0] + (rows - 1 if len(corner) == 1 else 0)
            depth = len(corner) - 1
            sizes = (rows, *shape[depth + 1 :])
            room = out[done : done + prod(sizes)].reshape(sizes)
            for p in _near(pieces, corner[0], last):
                self._copy(p, corner, room)
            done += room.size

    def _copy(self, p: Piece[P], corner: Numbers, room: Bits) -> None:
        """What `p` has of a box of whole rows: `room` begins at `corner`, which fixes all axes before the
        last of it; the axes after that are whole."""
        *fixed, row = corner
        depth = len(fixed)
        if not all(a <= x < a + n for x, a, n in zip(fixed, p.start, p.size, strict=False)):
            return
        low, high = max(row, p.start[depth]), min(row + len(room), p.start[depth] + p.size[depth])
        inner = p.size[depth + 1 :]
        if low >= high or not prod(inner):
            return
        at = 0  # of the first row in the piece, counted in rows
        for x, a, n in zip((*fixed, low), p.start, p.size, strict=False):
            at = at * n + x - a
        columns = (slice(a, a + n) for a, n in zip(p.start[depth + 1 :], inner, strict=True))
        part = room[(slice(low - row, high - row), *columns)]
        if part.flags.c_contiguous:
            self._read(p.place, at * prod(inner), part.reshape(-1))
            return
        dense: Bits = np.empty(part.shape, part.dtype)
        self._read(p.place, at * prod(inner), dense.reshape(-1))
        part[...] = dense


def runs(shape: Numbers, first: int, last: int) -> Iterator[tuple[Numbers, int]]:
    """Elements `first` to `last` of the row-major order as boxes of whole rows, in order: each as the index
    of its first row, which is as long as the axes that it counts through, and how many rows along the last of
    these axes."""
    if first >= last:
        return
    if not shape:
        yield (0,), 1
        return
    inner = prod(shape[1:])
    row, skip = divmod(first, inner)
    end_row, tail = divmod(last, inner)
    if row == end_row:
        yield from (((row, *corner), n) for corner, n in runs(shape[1:], skip, tail))
        return
    if skip:
        yield from (((row, *corner), n) for corner, n in runs(shape[1:], skip, inner))
        row += 1
    if row < end_row:
        yield (row,), end_row - row
    if tail:
        yield from (((end_row, *corner), n) for corner, n in runs(shape[1:], 0, tail))
