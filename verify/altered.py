"""What became of single values: zeroed, no numbers, another dtype on the way, one bit. Each says so only
where it accounts for every element that differs."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.convert.casting import CASTABLE, cast
from ckpt_tool.verify.rowmaps import span

MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
NARROWER = {"F32": ("BF16", "F16"), "F64": ("F32", "BF16", "F16"), "BF16": ("F16",), "F16": ("BF16",)}
SPELLED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def alteration(expected: np.ndarray, found: np.ndarray, dtype: str, sizes: frozenset[int]) -> str | None:
    """Raw bits of one shape; `sizes` are those that a factor may be the root of."""
    if dtype not in CASTABLE:
        return None
    wrong = expected != found
    places = np.flatnonzero(wrong)
    a, b = expected.reshape(-1)[places], found.reshape(-1)[places]
    at = place(wrong)
    for words in (_zeros(b, at, dtype), _no_numbers(b, at, dtype)):
        if words:
            return words
    rounded = _rounded(expected.reshape(-1), found.reshape(-1), dtype)
    if rounded and places.size > 1:
        return rounded
    if words := _bits(a, b, at, dtype):
        return words
    if np.array_equal(expected.byteswap(), found):
        return "bytes in the other order"
    return next(_wholes(expected, found, dtype, sizes), None)


def place(wrong: np.ndarray) -> str:
    """Where elements differ: one, rows, columns, or a count with the first."""
    count = int(wrong.sum())
    first = tuple(int(k) for k in np.unravel_index(int(wrong.argmax()), wrong.shape))
    at = first if len(first) > 1 else first[0]
    if count == wrong.size:
        return "every element"
    if count == 1:
        return f"element {at}"
    if wrong.ndim == 2:
        rows, columns = wrong.any(1), wrong.any(0)
        touched, across = np.flatnonzero(rows), np.flatnonzero(columns)
        if count > 0.9 * len(touched) * wrong.shape[1] and _solid(touched):
            return f"row{'s' * (len(touched) > 1)} {span(int(touched[0]), len(touched))}"
        if count > 0.9 * len(across) * wrong.shape[0] and _solid(across):
            return f"column{'s' * (len(across) > 1)} {span(int(across[0]), len(across))}"
        inside = f" in rows {touched[0]} to {touched[-1]}, columns {across[0]} to {across[-1]}"
        return f"{count:,} elements, the first {at},{inside}"
    return f"{count:,} elements, the first {at}"


def _solid(indices: np.ndarray) -> bool:
    return bool(len(indices)) and int(indices[-1] - indices[0]) + 1 == len(indices)


def _sign(dtype: str) -> int:
    return int(DTYPES[dtype].itemsize) * 8 - 1


def _magnitude(bits: np.ndarray, dtype: str) -> np.ndarray:
    made: np.ndarray = bits & bits.dtype.type((1 << _sign(dtype)) - 1)
    return made


def _zeros(b: np.ndarray, at: str, dtype: str) -> str | None:
    if _magnitude(b, dtype).any():
        return None
    return "all zeros" if at == "every element" else f"zeros in {at}"


def _no_numbers(b: np.ndarray, at: str, dtype: str) -> str | None:
    infinity = ((1 << (_sign(dtype) - MANTISSA[dtype])) - 1) << MANTISSA[dtype]
    size = _magnitude(b, dtype)
    if (size > infinity).all():
        return f"NaN in {at}"
    return f"infinity in {at}" if (size == infinity).all() else None


def _bits(a: np.ndarray, b: np.ndarray, at: str, dtype: str) -> str | None:
    turned = a ^ b
    sign = turned.dtype.type(1 << _sign(dtype))
    if (turned == sign).all():
        return "negated" if at == "every element" else f"sign flipped in {at}"
    apart = np.where(a > b, a - b, b - a)
    if not (turned & sign).any() and (apart == 1).all():
        return f"one unit in the last place off in {at}"
    if int(turned.min()) == int(turned.max()) and int(turned[0]).bit_count() == 1:
        return f"bit {int(turned[0]).bit_length() - 1} flipped in {at}"
    return None


def _rounded(flat: np.ndarray, wanted: np.ndarray, dtype: str) -> str | None:
    for other in NARROWER[dtype]:
        if np.array_equal(recast(recast(flat, dtype, other), other, dtype), wanted):
            return f"rounded to {SPELLED[other]} on the way"
    if dtype == "F32" and np.array_equal(flat & np.uint32(0xFFFF0000), wanted):
        return "cut off to bfloat16 on the way"
    return None


def _wholes(expected: np.ndarray, found: np.ndarray, dtype: str, sizes: frozenset[int]) -> Iterator[str]:
    flat, wanted = expected.reshape(-1), found.reshape(-1)
    with np.errstate(all="ignore"):
        right, ours = (recast(x, dtype, "F64").view("<f8") for x in (flat, wanted))
        largest = int(np.abs(right).argmax())
        ratio = float(ours[largest] / right[largest]) if right[largest] else 0.0
        for words, factor in _factors(sizes):
            near = ratio != 0 and abs(factor / ratio - 1) < 0.01
            if near and np.array_equal(recast((right * factor).view("<u8"), "F64", dtype), wanted):
                yield f"multiplied by {words}"
        for by in (1.0, -1.0):
            if np.array_equal(recast((right + by).view("<u8"), "F64", dtype), wanted):
                yield "1 added to every element" if by > 0 else "1 taken from every element"


def _factors(sizes: frozenset[int]) -> Iterator[tuple[str, float]]:
    for n in (2, 4, 8, 16):
        yield str(n), float(n)
        yield f"1/{n}", 1 / n
    yield "-1", -1.0
    for n in sorted(sizes):
        yield f"1/sqrt({n})", 1 / sqrt(n)
        yield f"sqrt({n})", sqrt(n)
        yield f"1/{n}", 1 / n
        yield f"{n}^(-1/4)", n**-0.25


def recast(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    out = np.empty(bits.size, dtype=DTYPES[target].bits)
    cast(np.ascontiguousarray(bits), source, target, out)
    return out
