"""Exchanging axes in memory, in an order that the caches can bear."""

from __future__ import annotations

import threading

import numpy as np
from numpy.lib.stride_tricks import as_strided

LARGE = (
    512 * 1024
)  # bytes of a matrix that no longer stays in the second-level cache together with its result
TILE = 256
_local = threading.local()


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, where the inner axes are exchanged in strips of 16 along the target's innermost
    one: a strip reads 16 rows of the source side by side and fills half a cache line of each target row.
    numpy alone touches a cache line for every element (benchmarks/README.md: 0.5 against 1.5 to 2.6 GB/s).
    A large matrix goes tile by tile."""
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
    target, source = np.moveaxis(target, inner, 0), np.moveaxis(source, inner, 0)
    for start in range(0, len(target), 16):
        target[start : start + 16] = source[start : start + 16]


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
