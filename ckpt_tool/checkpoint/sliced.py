"""Files of flat buffers, seen as parts: `BUFFER[128:640]` are elements 128 to 640 of the tensor BUFFER."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod

from ckpt_tool.checkpoint.base import DTYPES, TensorFile, TensorInfo, View

_PART = re.compile(r"(?P<buffer>.+)\[(?P<first>\d{1,18}):(?P<stop>\d{1,18})\]", re.ASCII)


def part_of(buffer: str, first: int, stop: int) -> str:
    """The name of a part."""
    return f"{buffer}[{first}:{stop}]"


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
