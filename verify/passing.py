"""What the bytes of the output tell while they pass in a comparison with the source, so that none is read
once more to take its checksum and to look at its values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import field
from functools import partial

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.checkpoint.crc32 import IntervalCrc
from ckpt_tool.checkpoint.zlibs import crc32
from ckpt_tool.convert.values import Values
from ckpt_tool.records import dataclass
from ckpt_tool.verify.coverage import Scan, scan_one
from ckpt_tool.verify.in_order import in_order

Run = tuple[int, int, int]  # first byte, bytes, CRC32
CHUNK = 256 << 10  # bytes that are looked at while the cache has them


@dataclass
class _Seen:
    """Of one tensor."""

    values: Values
    crc: IntervalCrc = field(default_factory=IntervalCrc)


class Passing:
    """What was seen of the tensors of `output`, by several threads."""

    def __init__(self, output: Checkpoint) -> None:
        self.output = output
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], _Seen] = {}  # in part
        self._whole: dict[tuple[str, str], Scan | None] = {}  # None: of more than that, which tells nothing

    def look(self, tensor: TensorInfo, offsets: Sequence[int], bits: np.ndarray) -> None:
        """Take in equal runs of elements, which lie one after another in the flat `bits` and begin at
        `offsets` of the tensor."""
        if not bits.size:
            return
        self._learn(tensor, *_looked_at(tensor.dtype, offsets, bits))

    def following(self, tensor: TensorInfo, start: int) -> Following:
        """For what is read of a tensor from element `start` on."""
        return Following(partial(self._learn, tensor), tensor, start)

    def _learn(self, tensor: TensorInfo, values: Values, runs: Sequence[Run]) -> None:
        key = (tensor.file, tensor.name)
        with self._lock:
            if key in self._whole:
                self._whole[key] = None
                return
            seen = self._seen.get(key)
            if seen is None:
                seen = self._seen[key] = _Seen(Values(tensor.dtype))
            seen.values.merge(values)
        for start, nbytes, crc in runs:
            seen.crc.add(start, nbytes, crc)
        total = seen.crc.value(tensor.nbytes)
        if total is not None:
            with self._lock:
                self._seen.pop(key, None)
                self._whole[key] = Scan(tensor, total, seen.values)

    def scans(self) -> list[Scan]:
        """Those of all tensors, in order; one of which not every element came just once is read for it."""
        return list(in_order(self._scan, self.output, self.output, size=lambda tensor: tensor.nbytes))

    def _scan(self, tensor: TensorInfo) -> Scan:
        return self._whole.get((tensor.file, tensor.name)) or scan_one(self.output, tensor)


class Following:
    """Elements of one tensor that come one after another, in pieces of any size: what they tell is learnt at
    their end."""

    def __init__(
        self, learn: Callable[[Values, Sequence[Run]], None], tensor: TensorInfo, start: int
    ) -> None:
        self._learn, self._itemsize = learn, DTYPES[tensor.dtype].itemsize
        self._start = self._at = start
        self._values, self._crc = Values(tensor.dtype), 0

    def take(self, bits: np.ndarray) -> None:
        """The next, flat."""
        place = self._values.look(bits)
        if place is not None:
            self._values.found_at(self._at + place)
        self._crc = crc32(bits.data.cast("B"), self._crc)
        self._at += bits.size

    def end(self) -> None:
        """No more come."""
        first, stop = self._start * self._itemsize, self._at * self._itemsize
        if stop > first:
            self._learn(self._values, [(first, stop - first, self._crc)])


def _looked_at(dtype: str, offsets: Sequence[int], bits: np.ndarray) -> tuple[Values, list[Run]]:
    """The values of equal runs, and of each run its first byte, its bytes and their CRC32."""
    values, length, itemsize = Values(dtype), bits.size // len(offsets), bits.itemsize
    step, runs = CHUNK // itemsize, []
    if length < step:  # several are looked at together
        for start in range(0, bits.size, step):
            place = values.look(bits[start : start + step])
            if place is not None:
                run, rest = divmod(start + place, length)
                values.found_at(offsets[run] + rest)
    for k, offset in enumerate(offsets):
        own, crc = bits[k * length : (k + 1) * length], 0
        for start in range(0, length, step):
            chunk = own[start : start + step]
            place = values.look(chunk) if length >= step else None
            if place is not None:
                values.found_at(offset + start + place)
            crc = crc32(chunk.data.cast("B"), crc)
        runs.append((offset * itemsize, own.nbytes, crc))
    return values, runs
