"""Torch files once their headers are read: where each storage lies, and tensors as dense bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckpt_tool.checkpoint.base import DTYPES, TensorFile, TensorInfo, tensor_infos
from ckpt_tool.checkpoint.byte_range import ByteRange, Wanted, Window
from ckpt_tool.checkpoint.pickle_records import StorageRef, TensorRecord
from ckpt_tool.checkpoint.torch_state import State, dtype_of

_BLOCK = 4 << 20  # dense bytes of a strided tensor that are gathered at once
_SPAN = 1 << 20  # storage bytes read at once while gathering
_SMALL = 16 << 10  # reading so many bytes costs no more than the call itself

Bits = npt.NDArray[np.unsignedinteger]
Dims = tuple[tuple[int, int], ...]  # (size, stride in elements), outermost first


class _Place(NamedTuple):
    """A tensor in its storage: first element as a byte offset, its dense bytes, and its axes; () where it is
    one dense run."""

    key: str
    start: int
    size: int
    dims: Dims


class TorchFile(TensorFile):
    """A torch checkpoint whose tensors are views of storages; subclasses say where the storages are."""

    def __init__(self, data: ByteRange, state: State) -> None:
        self._bytes = data
        self.path = data.path
        self.name = data.name
        self.metadata = state.metadata
        self.imports = state.imports
        self.notes = state.notes
        self.others = state.others
        held = state.tensors.values()
        fields = map(dtype_of, held), (t.shape for t in held), repeat(data.name)
        self.tensors: Mapping[str, TensorInfo] = dict(
            zip(state.tensors, tensor_infos(state.tensors, *fields), strict=True)
        )
        self._places = {name: _place(t) for name, t in state.tensors.items()}
        self._local = threading.local()

    def _storage(self, key: str) -> tuple[ByteRange, int]:
        """The bytes that hold storage `key`, and its offset in them."""
        raise KeyError(key)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        info, place = self.tensors[name], self._places[name]
        if offset < 0 or offset + len(buffer) > info.nbytes:
            raise ValueError(f"{name}: bytes {offset} to {offset + len(buffer)} of {info.nbytes}")
        if not len(buffer):
            return
        if not place.dims:
            source, start = self._storage(place.key)
            source.read_into(start + place.start + offset, buffer, name)
            return
        done = 0
        while done < len(buffer):
            block, skip = divmod(offset + done, _BLOCK)
            piece = self._gathered(name, block)[skip : skip + len(buffer) - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def read_whole(self, tensors: Sequence[tuple[str, memoryview]]) -> None:
        plain: dict[int, tuple[ByteRange, list[Wanted]]] = {}
        for name, buffer in tensors:
            key, first, size, dims = self._places[name]
            if dims or len(buffer) != size:
                self.read_into(name, 0, buffer)
                continue
            source, start = self._storage(key)
            plain.setdefault(id(source), (source, []))[1].append((start + first, buffer, name))
        for source, pieces in plain.values():
            source.read_each(pieces)

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Of tensors that lie in one run; those of other strides are read by blocks of their own. All of a
        source are told at once, so that small neighbours come with one request."""
        told: dict[int, tuple[ByteRange, list[Window]]] = {}
        for name, offset, size in ranges:
            place = self._places[name]
            if not place.dims:
                source, start = self._storage(place.key)
                told.setdefault(id(source), (source, []))[1].append((start + place.start + offset, size))
        for source, windows in told.values():
            source.expect(windows)

    def _gathered(self, name: str, block: int) -> memoryview:
        """Dense block number `block` of a strided tensor. Each thread keeps its last one, as callers ask for
        smaller pieces in order."""
        if getattr(self._local, "held", None) != (name, block):
            info, place = self.tensors[name], self._places[name]
            itemsize = DTYPES[info.dtype].itemsize
            first = block * (_BLOCK // itemsize)
            last = min(first + _BLOCK // itemsize, info.numel)
            source, start = self._storage(place.key)

            def read(element: int, out: Bits) -> None:
                at = start + place.start + element * itemsize
                source.read_into(at, out.data.cast("B"), name)

            dense: Bits = np.empty(last - first, DTYPES[info.dtype].bits)
            _gather(read, dense, 0, place.dims, first, last)
            self._local.dense = dense.data.cast("B")
            self._local.held = (name, block)
        dense_bytes: memoryview = self._local.dense
        return dense_bytes

    def extent(self, name: str) -> tuple[int, int] | None:
        place = self._places[name]
        if place.dims:
            return None
        source, start = self._storage(place.key)
        return source.descriptor, source.base + start + place.start

    def check_unchanged(self) -> None:
        self._bytes.check_unchanged()

    def close(self) -> None:
        self._local = threading.local()
        self._bytes.close()


def storage_bytes(ref: StorageRef, dtypes: Mapping[str, int]) -> int | None:
    """The size of a storage in bytes; None for an element type that `dtypes` (name to bytes) does not
    list."""
    itemsize = 1 if ref.dtype is None else dtypes.get(ref.dtype)
    return None if itemsize is None else ref.numel * itemsize


def _place(t: TensorRecord) -> _Place:
    if t.storage is None:
        raise ValueError("a tensor without a storage has no place")
    begin = t.storage.view[1] if t.storage.view is not None else 0
    offset = begin + t.offset if 0 not in t.shape else 0  # nothing is read of one without elements
    itemsize, size, dims = _laid_out(dtype_of(t), t.shape, t.strides)
    return _Place(t.storage.key, offset * itemsize, size, dims)


@lru_cache(maxsize=1024)  # layers are alike
def _laid_out(dtype: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, Dims]:
    """Bytes of an element and of all, and the axes as `_Place` has them."""
    itemsize, numel, dims = DTYPES[dtype].itemsize, prod(shape), _merged(shape, strides)
    dense = not numel or not dims or (len(dims) == 1 and dims[0][1] == 1)
    return itemsize, numel * itemsize, () if dense else dims


def _merged(shape: tuple[int, ...], strides: tuple[int, ...]) -> Dims:
    """The axes without those of size 1, neighbours joined where the outer steps over the inner exactly."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return tuple(dims)


ReadRun = Callable[[int, Bits], None]  # fill the array with the storage's elements from a given one on


def _gather(read: ReadRun, out: Bits, base: int, dims: Dims, first: int, last: int) -> None:
    """Elements `first` to `last` of the row-major order of `dims`, whose element 0 is the storage's
    `base`."""
    if not dims:
        read(base, out)
        return
    inner = prod(size for size, _ in dims[1:])
    stride = dims[0][1]
    row, skip = divmod(first, inner)
    end_row, tail = divmod(last, inner)
    done = 0
    if skip:  # the rest of a row
        stop = min(inner, skip + len(out))
        _gather(read, out[: stop - skip], base + row * stride, dims[1:], skip, stop)
        done = stop - skip
        row += 1
    if row < end_row:
        rows = out[done : done + (end_row - row) * inner]
        sizes = (end_row - row, *(size for size, _ in dims[1:]))
        _gather_box(read, rows.reshape(sizes), base + row * stride, tuple(step for _, step in dims))
        done += rows.size
    if done < len(out):  # the beginning of a row
        _gather(read, out[done:], base + end_row * stride, dims[1:], 0, tail)


def _gather_box(read: ReadRun, out: Bits, base: int, strides: tuple[int, ...]) -> None:
    """A whole block of axes. Where it is dense enough in the storage, its span is read at once; else it is
    halved along the axis that reaches farthest."""
    reach = [(size - 1) * stride for size, stride in zip(out.shape, strides, strict=True)]
    span = 1 + sum(reach)
    if span * out.itemsize <= min(_SPAN, max(_SMALL, 4 * out.nbytes)):
        run: Bits = np.empty(span, out.dtype)
        read(base, run)
        out[...] = np.ndarray(out.shape, out.dtype, run, strides=[s * out.itemsize for s in strides])
        return
    axis = reach.index(max(reach))
    half = out.shape[axis] // 2
    outer = (slice(None),) * axis
    _gather_box(read, out[(*outer, slice(half))], base, strides)
    _gather_box(read, out[(*outer, slice(half, None))], base + half * strides[axis], strides)
