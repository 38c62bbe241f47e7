"""Exchanging axes in memory, in an order that the caches can bear."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import gcd, prod

import numpy as np
from numpy.lib.stride_tricks import as_strided

LARGE = 512 * 1024  # bytes of a matrix that no longer stays in the second-level cache beside its result
TILE = 256
_local = threading.local()


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, where the inner axes are exchanged in strips along the target's innermost one:
    each reads some rows of the source side by side and fills a part of each target row. numpy alone touches
    a cache line for every element (benchmarks/profiles.md: 0.5 against 1.5 to 2.6 GB/s). A large matrix goes
    tile by tile."""
    wide = [a for a in range(target.ndim) if target.shape[a] > 1]
    inner = wide[-1] if wide else None
    if inner is None or source.strides[inner] == source.itemsize:
        target[...] = source
        return
    if len(wide) > 2 and (fewer := _as_one(target, source, wide)) is not None:
        assign(*fewer)
        return
    across = min(wide, key=lambda a: source.strides[a])  # the source's innermost
    if len(wide) > 2 and target.shape[inner] * target.shape[across] >= 64 * 1024:
        # matrix by matrix: among more axes numpy would not keep to one strip
        outer = next(a for a in wide if a not in (inner, across))
        for k in range(target.shape[outer]):
            at = tuple(slice(k, k + 1) if a == outer else slice(None) for a in range(target.ndim))
            assign(target[at], source[at])
        return
    if len(wide) == 2 and across != inner and target.nbytes >= LARGE:
        matrix = tuple(slice(None) if a in wide else 0 for a in range(target.ndim))
        _in_tiles(target[matrix], source[matrix])
        return
    order = (inner, *(a for a in range(target.ndim) if a != inner))
    target, source = target.transpose(order), source.transpose(order)
    rows = side_by_side(source.strides[0])
    for start in range(0, len(target), rows):
        target[start : start + rows] = source[start : start + rows]


def slabs(source: np.ndarray, most: int) -> Iterator[tuple[int, np.ndarray]]:
    """`source` cut along its outer axes into pieces of at most `most` elements, or of one row of the
    innermost axis: the place of the first element of each in the dense order, and the piece."""
    row = prod(source.shape[1:])
    if row > most:
        for k, part in enumerate(source):
            for at, piece in slabs(part, most):
                yield k * row + at, piece
        return
    rows = max(1, most // row)
    for k in range(0, len(source), rows):
        yield k * row, source[k : k + rows]


def side_by_side(stride: int) -> int:
    """How many rows `stride` bytes apart the first-level cache holds a line of each: a cache of 8 lines for
    every place within 4 KiB, where a stride that divides that comes back to the same places."""
    return max(8, min(64, 8 * 4096 // gcd(stride, 4096)))


def _as_one(target: np.ndarray, source: np.ndarray, wide: list[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Both with neighbouring axes as one where the elements lie so in both; None where no axes do."""
    axes: list[list[int]] = []  # (elements, bytes to the next in the target, in the source)
    for a in wide:
        n, *steps = target.shape[a], target.strides[a], source.strides[a]
        if axes and axes[-1][1:] == [n * s for s in steps]:
            axes[-1] = [axes[-1][0] * n, *steps]
        else:
            axes.append([n, *steps])
    if len(axes) == len(wide):
        return None
    shape = [n for n, _, _ in axes]
    return as_strided(target, shape, [t for _, t, _ in axes]), as_strided(
        source, shape, [s for *_, s in axes]
    )


def _in_tiles(target: np.ndarray, source: np.ndarray) -> None:
    """The same for matrices, of which the target's second axis is dense and the source's first. Rows that
    lie a power of two apart would push one another out of the caches: a tile is first copied to where they
    do not."""
    room = getattr(_local, "room", None)
    if room is None or room.dtype != target.dtype:
        room = _local.room = np.empty((TILE, TILE + 64 // target.itemsize), target.dtype)
    columns, rows = target.shape
    for c in range(0, columns, TILE):
        for r in range(0, rows, TILE):
            part = target[c : c + TILE, r : r + TILE]
            tile = room[: part.shape[1], : part.shape[0]].T
            tile[...] = source[c : c + TILE, r : r + TILE]
            part[...] = tile
