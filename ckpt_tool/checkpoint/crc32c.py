"""CRC-32C (Castagnoli), the checksum of TensorFlow's files, in numpy: about 2 GB/s on one core.

zlib has only the other CRC-32, and one byte after another in Python gives 7 MB/s. A multiple of the generator
with few terms makes long data short instead: where x^a + x^b + x^c + 1 is divisible by it, x^a may be
replaced by x^b + x^c + 1, so a run of leading bytes is XORed onto three places further on and forgotten. With
exponents multiplied by 8 (squaring over GF(2) doubles each) the places are whole bytes; by larger powers of
two, the runs are long enough for numpy. What is left of about a kilobyte is the sum of the remainders of its
bits.

The method is that of zlib-ng's Chorba CRC-32 (2024); the multiples were searched for, and the tests divide
them. Parameters: RFC 3720, appendix B.4. Masked checksums: LevelDB's util/crc32c.h.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ckpt_tool.checkpoint.crc32 import Combine, Generator

_GENERATOR = Generator(0x82F63B78)
combine_c: Combine = _GENERATOR.combine
# Exponents of multiples of the generator, the constant 1 last.
MULTIPLES = ((5685, 1362, 426, 0), (290, 136, 113, 107, 32, 0))
# (multiple, bytes that stand for x^1) in the order of their use; the factor is a power of two.
_FOLDS = tuple(
    (multiple[0] * unit, tuple((multiple[0] - k) * unit for k in multiple[1:]))
    for multiple, unit in (
        (MULTIPLES[0], 32),
        (MULTIPLES[0], 4),
        (MULTIPLES[0], 1),
        (MULTIPLES[1], 8),
        (MULTIPLES[1], 4),
    )
)
_LEFT = _FOLDS[-1][0]  # bytes that no fold makes fewer
PIECE = 256 * 1024  # bytes folded at a time: they stay in the cache
_MASK = 0xA282EAD8


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """The checksum of bytes with the checksum `crc` followed by `data`; long calls release the interpreter's
    lock most of the time."""
    view = memoryview(data).cast("B")
    for start in range(0, len(view), PIECE):
        crc = _piece(view[start : start + PIECE], crc)
    return crc


def _piece(data: memoryview, crc: int) -> int:
    # What the data before left behind counts as if it were XORed onto the first four bytes.
    left = (crc ^ 0xFFFFFFFF).to_bytes(4, "little")
    if len(data) < 4:
        return _few(data, crc)
    work = np.frombuffer(data, np.uint8).copy()
    work[:4] ^= np.frombuffer(left, np.uint8)
    at = 0
    for degree, gaps in _FOLDS:
        while work.size - at > degree:
            count = min(gaps[0], work.size - at - degree)
            leading = work[at : at + count]
            for gap in gaps:
                there = work[at + gap : at + gap + count]
                np.bitwise_xor(there, leading, out=there)
            at += count
    bits = np.unpackbits(work[at:], bitorder="little").view(np.bool_)
    remainders = _remainders()
    return int(np.bitwise_xor.reduce(remainders[remainders.size - bits.size :][bits])) ^ 0xFFFFFFFF


def _few(data: memoryview, crc: int) -> int:
    """Bit by bit."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = _GENERATOR.times_x(crc)
    return crc ^ 0xFFFFFFFF


@lru_cache(maxsize=1)
def _remainders() -> np.ndarray:
    """What each bit of the last `_LEFT` bytes adds to the checksum: x^(32 + bits after it)."""
    power = 1 << 31
    for _ in range(32):
        power = _GENERATOR.times_x(power)
    found = []
    for _ in range(8 * _LEFT):
        found.append(power)
        power = _GENERATOR.times_x(power)
    return np.array(found[::-1], dtype=np.uint32)


def masked(crc: int) -> int:
    """A checksum as it is stored beside the data it is of, so that a checksum over both says something."""
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def unmasked(stored: int) -> int:
    """The checksum that is stored as `stored`."""
    turned = (stored - _MASK) & 0xFFFFFFFF
    return (turned >> 17 | turned << 15) & 0xFFFFFFFF
