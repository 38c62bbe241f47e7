"""CRC-32C (Castagnoli), the checksum of TensorFlow's files, in numpy: about 4 GB/s on one core, and half of
that for 64 KiB. Where google-crc32c is installed with its C code, that takes it: about 17 GB/s.

zlib has only the other CRC-32, and one byte after another in Python gives 7 MB/s. A multiple of the generator
with few terms makes long data short instead: where x^a + x^b + x^c + 1 is divisible by it, x^a may be
replaced by x^b + x^c + 1, so a run of leading bytes is XORed onto three places further on and forgotten. With
exponents multiplied by 8 (squaring over GF(2) doubles each) the places are whole bytes; by larger powers of
two, the runs are long enough for numpy. What is left, about two kilobytes, is looked up byte by byte: the
remainder of a sum is the sum of the remainders.

The method is that of zlib-ng's Chorba CRC-32 (2024); the multiples were searched for, and the tests divide
them. Parameters: RFC 3720, appendix B.4. Masked checksums: LevelDB's util/crc32c.h.
"""

from __future__ import annotations

import threading
import warnings
from bisect import bisect_right
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.crc32 import Combine, Generator

_GENERATOR = Generator(0x82F63B78)
combine_c: Combine = _GENERATOR.combine
# Exponents of multiples of the generator, the constant 1 last.
MULTIPLES = ((6777, 484, 100, 0), (290, 136, 113, 107, 32, 0))
# (multiple, bytes that stand for x^1) in the order of their use; the factor is a power of two.
_FOLDS = ((MULTIPLES[0], 32), (MULTIPLES[0], 4), (MULTIPLES[0], 1), (MULTIPLES[1], 8))
_LEFT = 290 * 8  # bytes that no fold makes fewer
PIECE = 256 * 1024  # bytes folded at a time: they stay in the cache
_MASK = 0xA282EAD8
_local = threading.local()


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """The checksum of bytes with the checksum `crc` followed by `data`."""
    view = memoryview(data).cast("B")
    library = _library()
    if library is not None:
        for start in range(0, len(view), PIECE):
            crc = library(crc, np.frombuffer(view[start : start + PIECE], np.uint8))
        return crc
    return _folded(view, crc)


@cache
def _library() -> Callable[[int, Any], int] | None:
    """The function of google-crc32c, if it is there, no Python, and takes an array, which needs no copy as
    bytes do (a memoryview it refuses)."""
    try:
        with warnings.catch_warnings(action="ignore"):
            found = import_module("google_crc32c")
    except ImportError:
        return None
    extend: Callable[[int, Any], int] = found.extend
    try:
        extend(0, np.zeros(1, np.uint8))
    except TypeError:
        return None
    return extend if found.implementation == "c" else None


def _folded(view: memoryview, crc: int) -> int:
    """The same in numpy."""
    folding: _Folding | None = getattr(_local, "folding", None)
    if folding is None:
        folding = _local.folding = _Folding()
    for start in range(0, len(view), PIECE):
        piece = view[start : start + PIECE]
        crc = folding.crc(piece, crc) if len(piece) >= 4 else _few(piece, crc)
    return crc


class _Folding:
    """The folds of one piece in a buffer that one thread reuses. Data stands at its end, so that every fold
    has a place of its own; zeros before data change nothing."""

    def __init__(self) -> None:
        self._buffer = buffer = np.zeros(PIECE, np.uint8)
        self._starts: list[int] = []  # the first byte of the run that each fold takes away
        self._folds: list[list[tuple[np.ndarray, np.ndarray]]] = []  # (place further on, run)
        at = 0
        for multiple, unit in _FOLDS:
            gaps = [(multiple[0] - k) * unit for k in multiple[1:]]
            while (rest := PIECE - at - multiple[0] * unit) > 0:
                count = min(gaps[0], rest)
                run = buffer[at : at + count]
                self._starts.append(at)
                self._folds.append([(buffer[at + gap : at + gap + count], run) for gap in gaps])
                at += count
        self._starts.append(at)
        self._rest = buffer[at:]
        self._table, self._rows = _remainders().ravel(), np.arange(_LEFT) * 256
        self._places = np.empty(_LEFT, np.intp)

    def crc(self, data: memoryview, crc: int) -> int:
        """Of 4 to PIECE bytes after others with the checksum `crc`, which counts as if it were XORed onto the
        first four."""
        start = PIECE - len(data)
        self._buffer[start:] = np.frombuffer(data, np.uint8)
        self._buffer[start : start + 4] ^= np.frombuffer((crc ^ 0xFFFFFFFF).to_bytes(4, "little"), np.uint8)
        first = bisect_right(self._starts, start) - 1
        self._buffer[self._starts[first] : start] = 0
        for fold in self._folds[first:]:
            for place, run in fold:
                np.bitwise_xor(place, run, place)
        np.add(self._rows, self._rest, self._places)
        return int(np.bitwise_xor.reduce(self._table[self._places])) ^ 0xFFFFFFFF


def _few(data: bytes | memoryview, crc: int) -> int:
    """Bit by bit."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = _GENERATOR.times_x(crc)
    return crc ^ 0xFFFFFFFF


@lru_cache(maxsize=1)
def _remainders() -> np.ndarray:
    """(_LEFT, 256): what each value of each of the last `_LEFT` bytes adds to the checksum."""
    last = [_few(bytes([value]), 0xFFFFFFFF) ^ 0xFFFFFFFF for value in range(256)]  # from a remainder of 0
    made = np.empty((_LEFT, 256), np.uint32)
    made[-1] = last
    for k in range(_LEFT - 1, 0, -1):  # one zero byte more behind it
        made[k - 1] = made[-1][made[k] & 0xFF] ^ (made[k] >> 8)
    return made


def masked(crc: int) -> int:
    """A checksum as it is stored beside the data it is of, so that a checksum over both says something."""
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def unmasked(stored: int) -> int:
    """The checksum that is stored as `stored`."""
    turned = (stored - _MASK) & 0xFFFFFFFF
    return (turned >> 17 | turned << 15) & 0xFFFFFFFF
