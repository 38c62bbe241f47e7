"""Files of flat buffers, seen as parts: `BUFFER[128:640]` are elements 128 to 640 of the tensor BUFFER, and
`A[0:64] + B[0:64] along 1` are two such parts side by side along axis 1."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from math import prod

from ckpt_tool.checkpoint.base import DTYPES, Record, TensorFile, TensorInfo, View
from ckpt_tool.checkpoint.pieces import Bits, Joined, Piece

_PART = re.compile(r"(?P<buffer>.+)\[(?P<first>\d{1,18}):(?P<stop>\d{1,18})\]", re.ASCII)
_AND = " + "
_JOINED = re.compile(r"(?P<parts>.+) along (?P<axis>\d)", re.ASCII)


def part_of(buffer: str, first: int, stop: int) -> str:
    """The name of a part."""
    return f"{buffer}[{first}:{stop}]"


def joined_of(parts: Sequence[str], axis: int) -> str:
    """The name of parts side by side, of buffers without ` + ` in their names."""
    return parts[0] if len(parts) == 1 else f"{_AND.join(parts)} along {axis}"


class Sliced(View):
    """A view of a file by parts of its tensors: `shapes` gives for each its shape, of as many elements."""

    def __init__(self, stored: TensorFile, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        super().__init__(stored)
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[str, int]] = {}
        for name, shape in shapes:
            m = _PART.fullmatch(name)
            assert m is not None and int(m["stop"]) - int(m["first"]) == prod(shape), name
            whole = stored.tensors[m["buffer"]]
            assert int(m["stop"]) <= whole.numel, name
            self.tensors[name] = TensorInfo(name, whole.dtype, shape, stored.name)
            self._places[name] = m["buffer"], int(m["first"]) * DTYPES[whole.dtype].itemsize

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.tensors[name].nbytes:
            raise ValueError(f"{name}: bytes {offset} to {offset + len(buffer)}")
        whole, start = self._places[name]
        self.stored.read_into(whole, start + offset, buffer)

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        places = ((self._places[name], offset, size) for name, offset, size in ranges)
        self.stored.expect((whole, start + offset, size) for (whole, start), offset, size in places)

    def extent(self, name: str) -> tuple[int, int] | None:
        whole, start = self._places[name]
        found = self.stored.extent(whole)
        return None if found is None else (found[0], found[1] + start)

    def record_of(self, name: str) -> tuple[str, int] | None:
        whole, start = self._places[name]
        found = self.stored.record_of(whole)
        return None if found is None else (found[0], found[1] + start)


Place = tuple[str, int]  # a buffer, and the first element in it


class Pieced(View):
    """A view of a file by parts side by side: `shapes` gives for each name of `joined_of` its shape. Parts
    share an axis out by their elements."""

    def __init__(self, stored: TensorFile, shapes: Iterable[tuple[str, tuple[int, ...]]], label: str) -> None:
        super().__init__(stored)
        self.name = label
        self._parts: dict[str, list[Piece[Place]]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, shape in shapes:
            self._parts[name] = _pieces(name, shape, stored)
            dtype = stored.tensors[self._parts[name][0].place[0]].dtype
            self.tensors[name] = TensorInfo(name, dtype, shape, label)
        self._joined: Joined[Place] = Joined(self._read)

    def _read(self, place: Place, first: int, out: Bits) -> None:
        self.stored.read_into(place[0], (place[1] + first) * out.itemsize, out.data.cast("B"))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        pieces, t = self._parts[name], self.tensors[name]
        if offset < 0 or offset + len(buffer) > t.nbytes:
            raise ValueError(f"{name}: bytes {offset} to {offset + len(buffer)} of {t.nbytes}")
        if len(pieces) > 1:
            self._joined.read_into(name, t.shape, pieces, DTYPES[t.dtype].bits, offset, buffer)
            return
        whole, first = pieces[0].place
        self.stored.read_into(whole, first * DTYPES[t.dtype].itemsize + offset, buffer)

    def records(self, of: Container[str] | None = None) -> Mapping[str, Record]:
        """That of a buffer is of the first of its parts."""
        first: dict[str, str] = {}
        for name, pieces in self._parts.items():
            for p in pieces if of is None or name in of else ():
                first.setdefault(p.place[0], name)
        found = self.stored.records(first)
        return {key: r if r.of is None else r._replace(of=first[r.of]) for key, r in found.items()}

    def extent(self, name: str) -> None:
        """None: it may be parts of many."""

    def close(self) -> None:
        self._joined.forget()
        super().close()


def buffers_of(name: str) -> list[str]:
    """The buffers that parts side by side are of."""
    along = _JOINED.fullmatch(name)
    parts = along["parts"].split(_AND) if along else [name]
    return [m["buffer"] for m in map(_PART.fullmatch, parts) if m is not None]


def _pieces(name: str, shape: tuple[int, ...], stored: TensorFile) -> list[Piece[Place]]:
    along = _JOINED.fullmatch(name)
    axis = int(along["axis"]) if along else 0
    unit = prod(shape) // max(shape[axis], 1) if shape else 1
    made, at = [], 0
    for part in along["parts"].split(_AND) if along else [name]:
        m = _PART.fullmatch(part)
        assert m is not None and int(m["stop"]) <= stored.tensors[m["buffer"]].numel, part
        size, rest = divmod(int(m["stop"]) - int(m["first"]), max(unit, 1))
        assert not rest, name
        box = tuple(size if k == axis else n for k, n in enumerate(shape))
        made.append(
            Piece(
                tuple(at if k == axis else 0 for k in range(len(shape))), box, (m["buffer"], int(m["first"]))
            )
        )
        at += size
    assert not shape or at == shape[axis], name
    return made
