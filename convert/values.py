"""A look at the values of a tensor while its bytes pass: is any infinite or not a number, are all zero?

It costs a fraction of the copy itself, since two maxima over the raw bits tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.records import dataclass


@dataclass(frozen=True)
class _Format:
    """Magnitudes (bits without the sign) at which a floating type's normal and non-finite values begin."""

    normal: int
    non_finite: int


_FORMATS = {
    "F64": _Format(0x0010_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": _Format(0x0080_0000, 0x7F80_0000),
    "F16": _Format(0x0400, 0x7C00),
    "BF16": _Format(0x0080, 0x7F80),
    "F8_E4M3": _Format(0x08, 0x7F),  # no infinities; all ones is NaN
    "F8_E5M2": _Format(0x04, 0x7C),
}


_BITS = {d.name: (np.dtype(d.bits), np.dtype(d.bits.replace("u", "i"))) for d in DTYPES.values()}


_largest = np.maximum.reduce  # what `max` of an array is, without the layers of Python around it


class Values:
    """What the values of one tensor of floating type `dtype` are like, gathered piece by piece."""

    __slots__ = ("first", "format", "largest", "non_finite", "seen", "sign", "signed", "unsigned")

    def __init__(self, dtype: str) -> None:
        self.format = _FORMATS.get(dtype)
        self.unsigned, self.signed = _BITS[dtype]
        self.sign = 1 << (8 * self.unsigned.itemsize - 1)
        self.largest = 0  # magnitude bits
        self.seen = 0
        self.non_finite = 0
        self.first: int | None = None  # element index of the first non-finite value

    def look(self, bits: np.ndarray) -> int | None:
        """Take in flat `bits`; the place in them of the first value that is not finite, for `found_at`. Two
        maxima, as signed and as unsigned numbers, bound the magnitudes without a copy."""
        if self.format is None or bits.size == 0:
            return None
        positive = int(_largest(bits.view(self.signed)))
        negative = int(_largest(bits)) - self.sign
        largest = max(positive, negative, 0)
        self.seen += bits.size
        self.largest = max(self.largest, largest)
        if largest < self.format.non_finite:
            return None
        magnitudes = bits & self.unsigned.type(self.sign - 1)
        places = np.flatnonzero(magnitudes >= self.format.non_finite)
        self.non_finite += places.size
        return int(places[0])

    def found_at(self, index: int) -> None:
        """Element `index` of the tensor is not finite."""
        self.first = index if self.first is None else min(index, self.first)

    def merge(self, other: Values) -> None:
        self.seen += other.seen
        self.largest = max(self.largest, other.largest)
        self.non_finite += other.non_finite
        if other.first is not None:
            self.found_at(other.first)

    @property
    def all_zero(self) -> bool:
        return self.format is not None and self.seen > 0 and self.largest == 0

    @property
    def denormal_only(self) -> bool:
        return self.format is not None and 0 < self.largest < self.format.normal


def odd_ones(dtype: str, bits: np.ndarray, begins: Sequence[int]) -> list[int]:
    """The numbers of those among tensors of `dtype`, which begin in flat `bits` at these places, that
    `Values` has something to say of: not finite, all zero or denormal only. None of them is empty."""
    known = _FORMATS.get(dtype)
    if known is None:
        return []
    unsigned, signed = _BITS[dtype]
    positive = np.maximum.reduceat(bits.view(signed), begins)
    negative = np.maximum.reduceat(bits, begins) & unsigned.type((1 << (8 * unsigned.itemsize - 1)) - 1)
    largest = np.maximum(np.maximum(positive, 0).view(unsigned), negative)
    return np.flatnonzero((largest < known.normal) | (largest >= known.non_finite)).tolist()
