"""`checkpoint["name"]`: one tensor of an opened checkpoint as an array that is read when it is asked for, as
much of it as is.

numpy has no bfloat16 and no 8-bit floats: those come as float32, which holds each of their values exactly;
`bits` gives them as they are stored. Sources of the 8-bit types: Open Compute Project, OFP8 1.0 (E4M3 has no
infinities, E5M2 is the upper byte of a float16) and Microscaling Formats 1.0 (E8M0 is a power of two)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, TensorInfo
from ckpt_tool.errors import printable

if TYPE_CHECKING:
    from ckpt_tool.checkpoint.base import Checkpoint

PIECE = 1 << 22  # elements decoded at a time


@dataclass(frozen=True)
class Tensor:
    """`info` says what it is; `numpy()`, `tensor[10:20]` and `numpy.asarray(tensor)` read it. The checkpoint
    must still be open."""

    checkpoint: Checkpoint
    info: TensorInfo

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> str:
        """As it is stored, by the name that safetensors has for it."""
        return self.info.dtype

    @property
    def nbytes(self) -> int:
        return self.info.nbytes

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a scalar has no length")
        return self.shape[0]

    def numpy(self) -> np.ndarray:
        """All of it, in numbers that numpy has."""
        return self._rows(0, self._count, decoded=True).reshape(self.shape)

    def bits(self) -> np.ndarray:
        """All of it as it is stored, as unsigned integers."""
        return self._rows(0, self._count, decoded=False).reshape(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        """As numpy indexes an array; of the first axis only those rows are read that lie between the first
        and the last that are asked for."""
        if not self.shape:
            return np.asarray(self.numpy()[index])
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        if isinstance(first, slice):
            rows = range(self.shape[0])[first]
        elif isinstance(first, int | np.integer) and not isinstance(first, bool):
            rows = range(self.shape[0])[int(first) : int(first) + 1 or None]
            if not rows:
                raise IndexError(f"expected a row below {self.shape[0]}, found {int(first)}")
        else:
            return np.asarray(self.numpy()[index])
        if not rows:
            return np.asarray(np.empty((0, *self.shape[1:]), _number_type(self.dtype))[(slice(None), *rest)])
        low = min(rows[0], rows[-1])
        read = self._rows(low, max(rows[0], rows[-1]) + 1, decoded=True)
        step = slice(None, None, rows.step) if isinstance(first, slice) else 0
        return np.asarray(read[(step, *rest)])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a tensor of a file is always read into a new array")
        made = self.numpy()
        return made if dtype is None else made.astype(dtype)

    def __repr__(self) -> str:
        stored = DTYPES[self.dtype]
        read = "" if stored.value is not None else ", read as float32"
        place = f"{self.nbytes:,} bytes in {printable(self.info.file)}"
        return f"<{printable(self.name)}: {stored.torch} {list(self.shape)}, {place}{read}>"

    @property
    def _count(self) -> int:
        return self.shape[0] if self.shape else 1

    def _rows(self, start: int, stop: int, *, decoded: bool) -> np.ndarray:
        """A piece at a time, so that little is there twice."""
        stored = DTYPES[self.dtype]
        row = prod(self.shape[1:])
        out = np.empty((stop - start) * row, _number_type(self.dtype) if decoded else stored.bits)
        plain = not decoded or stored.value is not None
        raw = out if plain else np.empty(min(PIECE, out.size), stored.bits)
        step = max(1, out.size if plain else raw.size)
        for at in range(0, out.size, step):
            piece = raw[: min(step, out.size - at)]
            self.checkpoint.read_into(self.info, (start * row + at) * stored.itemsize, piece.data.cast("B"))
            if not plain:
                out[at : at + piece.size] = _widened(piece, self.dtype)
        return out.reshape(stop - start, *self.shape[1:])


def _number_type(dtype: str) -> str:
    return DTYPES[dtype].value or "<f4"


def _widened(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits of a type that numpy lacks as the same values in float32."""
    if dtype == "BF16":
        return np.asarray((bits.astype("<u4") << 16).view("<f4"))
    if dtype == "F8_E5M2":
        return np.asarray((bits.astype("<u2") << 8).view("<f2").astype("<f4"))
    if dtype == "F8_E8M0":
        return np.where(bits == 255, np.nan, np.ldexp(np.float32(1), bits.astype("<i4") - 127)).astype("<f4")
    exponent, fraction = (bits >> 3 & 15).astype("<i4"), (bits & 7).astype("<f4")
    size = np.where(exponent > 0, np.ldexp(1 + fraction / 8, exponent - 7), np.ldexp(fraction / 8, -6))
    size = np.where(bits & 127 == 127, np.nan, size)
    return np.asarray(np.copysign(size, np.where(bits & 128, -1, 1)).astype("<f4"))
