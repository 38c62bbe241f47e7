"""CRC-32 of data that is seen in pieces and in any order.

A CRC is the remainder of a polynomial over GF(2); appending n bytes multiplies it by x^(8n) modulo the
generator. So the checksum of two runs follows from their checksums and the length of the second (zlib's
crc32_combine, whose result this equals). Bits are reflected: the highest bit of a number is the coefficient
of x^0.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache

Combine = Callable[[int, int, int], int]


class Generator:
    """The polynomial that a CRC of 32 bits divides by: `reflected`, without x^32."""

    def __init__(self, reflected: int) -> None:
        self.reflected = reflected
        power = 1 << 31
        for _ in range(8):
            power = self.times_x(power)
        self._bytes = [power]  # x^(8 * 2^k) for k = 0, 1, ...; enough for any length below 2^64
        for _ in range(63):
            self._bytes.append(self.product(self._bytes[-1], self._bytes[-1]))
        self._shift = lru_cache(maxsize=256)(self._tables)

    def times_x(self, a: int) -> int:
        return (a >> 1) ^ self.reflected if a & 1 else a >> 1

    def product(self, a: int, b: int) -> int:
        """a * b modulo the generator."""
        result = 0
        for bit in range(31, -1, -1):
            if a >> bit & 1:
                result ^= b
            b = self.times_x(b)
        return result

    def _tables(self, length: int) -> tuple[tuple[int, ...], ...]:
        """Multiplication by x^(8 * length), as one table for each nibble of the other factor, lowest
        first."""
        factor, k = 1 << 31, 0
        while length >> k:
            if length >> k & 1:
                factor = self.product(factor, self._bytes[k])
            k += 1
        bits = [factor]  # the products with 1 << 31, 1 << 30, ..., 1
        for _ in range(31):
            bits.append(self.times_x(bits[-1]))
        tables = []
        for low in range(0, 32, 4):
            table = [0]
            for bit in range(low, low + 4):
                table += [entry ^ bits[31 - bit] for entry in table]
            tables.append(tuple(table))
        return tuple(tables)

    def combine(self, crc_a: int, crc_b: int, length_b: int) -> int:
        """The CRC of A followed by B, from those of A and B and the number of bytes in B.

        About a microsecond where `length_b` is one of the last 256 lengths used, else about 50.
        """
        t0, t1, t2, t3, t4, t5, t6, t7 = self._shift(length_b)
        return (
            t0[crc_a & 15]
            ^ t1[crc_a >> 4 & 15]
            ^ t2[crc_a >> 8 & 15]
            ^ t3[crc_a >> 12 & 15]
            ^ t4[crc_a >> 16 & 15]
            ^ t5[crc_a >> 20 & 15]
            ^ t6[crc_a >> 24 & 15]
            ^ t7[crc_a >> 28]
            ^ crc_b
        )


combine: Combine = Generator(0xEDB88320).combine  # of zlib's CRC-32


class IntervalCrc:
    """Collects the checksums of byte ranges, in any order and from any thread, until they make one whole.

    Neighbours are joined at once, so memory grows with the number of holes and not of ranges."""

    _lock = (
        threading.Lock()
    )  # one for all, since a checkpoint has many tensors and it is held for microseconds

    def __init__(self, combine: Combine = combine) -> None:
        self._combine = combine
        self._from: dict[int, tuple[int, int]] = {}  # first byte -> (byte after the last, crc)
        self._until: dict[int, int] = {}  # byte after the last -> first byte
        self._overlap = False

    def add(self, offset: int, length: int, crc: int) -> None:
        """Bytes `offset` to `offset + length` have the checksum `crc`. Each byte may come once."""
        if not length:
            return
        start, stop = offset, offset + length
        with self._lock:
            if start in self._from or stop in self._until:
                self._overlap = True
                return
            if start in self._until:
                before = self._until.pop(start)
                _, left = self._from.pop(before)
                start, crc = before, self._combine(left, crc, length)
            if stop in self._from:
                after, right = self._from.pop(stop)
                del self._until[after]
                crc = self._combine(crc, right, after - stop)
                stop = after
            self._from[start] = (stop, crc)
            self._until[stop] = start

    def holes(self, total: int) -> list[tuple[int, int]] | None:
        """What of bytes 0 to `total` did not come, as (first byte, bytes); None where some came twice, which
        cannot be mended."""
        with self._lock:
            if self._overlap:
                return None
            found, at = [], 0
            for start, (stop, _) in sorted(self._from.items()):
                if start < at:
                    return None
                if start > at:
                    found.append((at, start - at))
                at = stop
        return found if at == total else [*found, (at, total - at)] if at < total else None

    def value(self, total: int) -> int | None:
        """The checksum of bytes 0 to `total`, or None unless every byte of them came exactly once."""
        with self._lock:
            if self._overlap:
                return None
            if not total:
                return 0 if not self._from else None
            stop, crc = self._from.get(0, (0, 0))
            return crc if stop == total and len(self._from) == 1 else None
