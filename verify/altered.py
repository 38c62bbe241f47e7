"""What became of single values: zeroed, no numbers, another dtype on the way, one bit. Each says so only
where it accounts for every element that differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import sqrt

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.convert.casting import CASTABLE, converted
from ckpt_tool.verify.rowmaps import span

MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
NARROWER = {"F32": ("BF16", "F16"), "F64": ("F32", "BF16", "F16"), "BF16": ("F16",), "F16": ("BF16",)}
SPELLED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


CHUNK = 1 << 20  # elements looked at at a time
SAMPLE = 4096  # differing elements by which most kinds are ruled out

Holds = Callable[[np.ndarray, np.ndarray], np.ndarray]  # for each pair of right and found elements


def alteration(expected: np.ndarray, found: np.ndarray, dtype: str, sizes: frozenset[int]) -> str | None:
    """Raw bits of one shape that differ; `sizes` are those that a factor may be the root of."""
    if dtype not in CASTABLE:
        return None
    right, ours = expected.reshape(-1), found.reshape(-1)
    a, b = _sample(right, ours)
    at = ""
    for words, holds in _kinds(a, b, dtype, sizes):
        if holds(a, b).all() and all(
            holds(right[k : k + CHUNK], ours[k : k + CHUNK]).all() for k in range(0, right.size, CHUNK)
        ):
            at = at or place(expected != found)
            return "all zeros" if words == "zeros" and at == "every element" else _told(words, at)
    return None


def _told(words: str, at: str) -> str:
    """The place is of interest where the kind concerns single elements."""
    if words == "sign flipped" and at == "every element":
        return "negated"
    single = words in SINGLE or words.startswith(("bit ", "holds "))
    return f"{words} in {at}" if single else words


def _sample(right: np.ndarray, ours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first elements that differ."""
    places: list[np.ndarray] = []
    for start in range(0, right.size, CHUNK):
        chunk = slice(start, start + CHUNK)
        places.append(start + np.flatnonzero(right[chunk] != ours[chunk]))
        if sum(map(len, places)) >= SAMPLE:
            break
    kept = np.concatenate(places)[:SAMPLE]
    return right[kept], ours[kept]


def place(wrong: np.ndarray) -> str:
    """Where elements differ: one, rows, columns, or a count with the first."""
    count = int(wrong.sum())
    first = tuple(int(k) for k in np.unravel_index(int(wrong.argmax()), wrong.shape))
    at = first[0] if len(first) == 1 else first
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


SINGLE = ("zeros", "NaN", "infinity", "sign flipped", "one unit in the last place off")


def _kinds(a: np.ndarray, b: np.ndarray, dtype: str, sizes: frozenset[int]) -> Iterator[tuple[str, Holds]]:
    """The kinds in question for a sample of differing elements; the simplest first."""
    top = ((1 << (_sign(dtype) - MANTISSA[dtype])) - 1) << MANTISSA[dtype]  # the bits of infinity
    sign = a.dtype.type(1 << _sign(dtype))
    yield "zeros", lambda x, y: (_magnitude(y, dtype) == 0) | (x == y)
    if a.size > 2 and (b == b[0]).all():
        value = float(converted(b[:1], dtype, "F64").view("<f8")[0])
        if np.isfinite(value):
            yield f"holds {value:g}", lambda x, y: (y == b[0]) | (x == y)
    yield "NaN", lambda x, y: (_magnitude(y, dtype) > top) | (x == y)
    yield "infinity", lambda x, y: (_magnitude(y, dtype) == top) | (x == y)
    rounded = list(_rounded(dtype))
    if a.size > 1:
        yield from rounded
    yield "sign flipped", lambda x, y: ((x ^ y) == sign) | (x == y)
    yield "one unit in the last place off", lambda x, y: _apart(x, y, sign) <= 1
    bits = a[0] ^ b[0]
    if int(bits).bit_count() == 1:
        yield f"bit {int(bits).bit_length() - 1} flipped", lambda x, y: ((x ^ y) == bits) | (x == y)
    yield "bytes in the other order", lambda x, y: x.byteswap() == y
    yield from _scaled(a, b, dtype, sizes)
    if a.size == 1:
        yield from rounded


def _apart(x: np.ndarray, y: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """By how many units two elements differ; many where one is negative and the other not."""
    units = np.where(x > y, x - y, y - x)
    return np.asarray(np.where(((x ^ y) & sign) != 0, 2, units))


def _rounded(dtype: str) -> Iterator[tuple[str, Holds]]:
    for other in NARROWER[dtype]:
        yield (
            f"rounded to {SPELLED[other]} on the way",
            lambda x, y, other=other: converted(converted(x, dtype, other), other, dtype) == y,  # type: ignore[misc]
        )
    if dtype == "F32":
        yield (
            "rounded to float16 and then bfloat16 on the way",
            lambda x, y: converted(_twice(converted(x, dtype, "F16")), "BF16", dtype) == y,
        )
        yield "cut off to bfloat16 on the way", lambda x, y: (x & np.uint32(0xFFFF0000)) == y


def _twice(half: np.ndarray) -> np.ndarray:
    return converted(half, "F16", "BF16")


def _scaled(a: np.ndarray, b: np.ndarray, dtype: str, sizes: frozenset[int]) -> Iterator[tuple[str, Holds]]:
    """Multiplied by a factor that a size gives; 1 added or taken away."""
    right, ours = (converted(x, dtype, "F64").view("<f8") for x in (a, b))
    largest = int(np.nan_to_num(np.abs(right)).argmax())
    with np.errstate(all="ignore"):
        ratio = float(ours[largest] / right[largest])
    for words, factor in _factors(sizes):
        if abs(factor - ratio) < 0.01 * abs(factor):
            yield f"multiplied by {words}", partial(_computed, lambda v, f: v * f, factor, dtype)
    for words, by in (("1 added to every element", 1.0), ("1 taken from every element", -1.0)):
        yield words, partial(_computed, lambda v, f: v + f, by, dtype)


def _computed(
    make: Callable[[np.ndarray, float], np.ndarray], by: float, dtype: str, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    with np.errstate(all="ignore"):
        made = make(converted(x, dtype, "F64").view("<f8"), by)
    return np.asarray(converted(made.view("<u8"), "F64", dtype) == y)


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
