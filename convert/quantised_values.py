"""Numbers of quantised weights: from codes and scales to float32, bfloat16 or float16.

The *recipe* says in which order is rounded. "fp32-product" is fp32(code) x scale, rounded once to the dtype
asked for; "bf16-scale" rounds the scale to bfloat16 first. Sources: Open Compute Project, OFP8 1.0 (E4M3 has
no infinities, 0x7F and 0xFF are NaN) and Microscaling Formats 1.0 (E2M1, E8M0); transformers 5.23.0
(finegrained_fp8, mxfp4), compressed-tensors 0.20.1.

All functions take arrays of raw bits and fill raw bits; nothing here reads a file.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.convert.casting import cast
from ckpt_tool.convert.quantised_config import NO_NUMBER, RECIPES, TARGETS
from ckpt_tool.records import dataclass

_TINY = np.float32(2.0**120)  # what e4m3's bits in a float32 lack: the exponents count from 7 and from 127
_LARGE = np.float32(2.0**7)  # a scale below stays finite times that
_SMALL = np.float32(2.0**-100)  # and one above makes no subnormal numbers
_EIGHTS = np.arange(8, 16, dtype="<f4")  # the fractions of E4M3
_SIGN_AND_SEVEN = np.uint32(0x87F0_0000).view(np.int32)  # of a float32: where the eight bits come to stand
_HALF, _SIXTEEN = np.uint32(0x8000), np.uint32(16)  # of the bits that bfloat16 lacks
_NAN_BFLOAT16 = np.uint16(0xFFFF)  # as torch rounds NaN on the CPU

Array = np.ndarray[Any, Any]


def e8m0(codes: Array) -> Array:
    """float32 powers of two of E8M0 codes: 0 is 2^-127, a subnormal, and 255 NaN."""
    return np.asarray(_E8M0[codes])


def _e8m0_table() -> Array:
    made = np.ldexp(np.float32(1), np.arange(256) - 127).astype("<f4")
    made[NO_NUMBER] = np.nan
    return made


with np.errstate(over="ignore"):
    _E8M0 = _e8m0_table()

# The signs of zero are those of the codes: code 8 is -0.
_HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array([*_HALVES, *(-x for x in _HALVES)], dtype="<f4")


def e4m3(codes: Array) -> Array:
    """float32 values of E4M3 codes of any shape."""
    made = _tiny(codes, np.empty(codes.shape, "<f4"))
    made *= _TINY
    made[(codes & np.uint8(0x7F)) == 0x7F] = np.nan
    return made


def _tiny(codes: Array, out: Array) -> Array:
    """`out` (float32) with the values of codes times 2^-120, NaN codes as if they were 480."""
    bits = out.view("<i4")
    bits[...] = codes.view(np.int8)
    bits <<= np.int32(20)  # the sign fills all bits above
    bits &= _SIGN_AND_SEVEN
    return out


def scale_numbers(bits: Array, dtype: str, recipe: str = RECIPES[0]) -> Array:
    """float32 numbers of the raw bits of scales as the recipe takes them; U8 are E8M0 codes."""
    if dtype in ("U8", "F8_E8M0"):
        return e8m0(bits)  # powers of two, which bfloat16 holds
    if dtype == "F8_E4M3":
        return e4m3(bits)
    made = np.empty(bits.size, "<u4")
    cast(np.ascontiguousarray(bits).reshape(-1), dtype, "F32", made)
    if recipe == "bf16-scale":
        rounded = np.empty(bits.size, "<u2")
        cast(made, "F32", "BF16", rounded)
        cast(rounded, "BF16", "F32", made)
    return made.view("<f4").reshape(bits.shape)


# --- fp8 ------------------------------------------------------------------------------------------------


_rooms = threading.local()


def _room(purpose: str, shape: tuple[int, ...], kind: str = "<f4") -> Array:
    """Scratch of this thread, unset: fresh memory for each piece costs more than what is done in it."""
    count = prod(shape)
    found: Array | None = getattr(_rooms, purpose, None)
    if found is None or found.size < count:
        found = np.empty(max(count, 1 << 15), kind)
        setattr(_rooms, purpose, found)
    return found[:count].reshape(shape)


@dataclass(frozen=True, slots=True)
class Factors:
    """Float32 scales as codes are multiplied by them. `lifted` ones are times 2^120 already: codes are that
    much too small at first, and such a factor is exact. `half_up` is that of `rounds_half_up`."""

    numbers: Array
    lifted: bool
    half_up: bool
    finite: bool


@dataclass(frozen=True, slots=True)
class Span:
    """Codes that are multiplied together: from place `begin` on as many as `shape` has, to which the factors
    broadcast."""

    begin: int
    shape: tuple[int, ...]
    factors: Factors


def factors(scales: Array, half_up: bool = False) -> Factors:
    """The factors of float32 scales of any shape."""
    if half_up or bool((np.abs(scales) < _LARGE).all()):
        return Factors(scales * _TINY, True, half_up, True)
    return Factors(scales, False, False, bool(np.isfinite(scales).all()))


def rounds_half_up(scales: Array) -> Array:
    """For each row of float32 scales (rows, n) whether, of the products of any E4M3 codes with them, none
    lies in the middle of two bfloat16 numbers of which the lower one is even, so that rounding half up is
    rounding to nearest even. Eight numbers tell for each scale: codes are these times powers of two."""
    size = np.abs(scales)
    inside = ((size > _SMALL) & (size < _LARGE)).all(axis=1)
    with np.errstate(all="ignore"):
        low = (size[..., None] * _EIGHTS).view("<u4") & np.uint32(0x1FFFF)
    return np.asarray(inside & ~(low == 0x8000).any(axis=(1, 2)))


def fp8(codes: Array, spans: Sequence[Span], out: Array, dtype: str) -> None:
    """Fill flat `out`, raw bits of `dtype`, with flat E4M3 `codes` times the factors of `spans`, which share
    all of them out. One pass a step over numbers that stay in the cache, and no new memory."""
    product = _tiny(codes, out.view("<f4") if dtype == "F32" else _room("product", codes.shape))
    number = not _has_nan(codes)
    if not number:
        product[(codes & np.uint8(0x7F)) == 0x7F] = np.nan
    for span in spans:
        part = product[span.begin : span.begin + prod(span.shape)].reshape(span.shape)
        if span.factors.lifted:
            part *= span.factors.numbers  # one rounding
        else:
            with np.errstate(all="ignore"):
                part *= _TINY
                part *= span.factors.numbers
    if number and dtype == "BF16" and all(s.factors.half_up for s in spans):
        bits = product.view("<u4")
        bits += _HALF
        bits >>= _SIXTEEN
        out[...] = bits
    else:
        rounded(product, out, dtype, plain=number and all(s.factors.finite for s in spans))


def _has_nan(codes: Array) -> bool:
    """Whether 0x7F or 0xFF is there: the largest of signed and of unsigned bytes, which nothing is above."""
    if not codes.size:
        return False
    return int(codes.max()) == 0xFF or int(codes.view(np.int8).max()) == 0x7F


def rounded(values: Array, out: Array, dtype: str, *, plain: bool = False) -> None:
    """Fill `out`, raw bits of `dtype`, with float32 `values`, which are used up; `plain` says that none of
    them is NaN."""
    if dtype == "F32":
        if not np.shares_memory(values, out):
            out.view("<f4")[...] = values
    elif dtype == "F16":
        with np.errstate(all="ignore"):
            out.view("<f2")[...] = values
    else:
        _to_bfloat16(values, out, plain)


def _to_bfloat16(values: Array, out: Array, plain: bool) -> None:
    """To nearest, ties to even: adding 0x7FFF plus the lowest kept bit carries where that rounds up."""
    bits = values.view("<u4")
    nan = None if plain else np.isnan(values)
    low = _room("low", bits.shape).view("<u4")
    np.right_shift(bits, np.uint32(16), out=low)
    low &= np.uint32(1)
    low += np.uint32(0x7FFF)
    bits += low
    bits >>= np.uint32(16)
    out[...] = bits
    if nan is not None and nan.any():
        out[nan] = _NAN_BFLOAT16


# --- four bits ------------------------------------------------------------------------------------------


@lru_cache(maxsize=len(TARGETS))
def _mxfp4_table(dtype: str) -> Array:
    """By E8M0 code x 256 + byte: the two values of a byte, that of the low nibble first, as one number."""
    byte = np.arange(256)
    two = np.stack([E2M1[byte & 15], E2M1[byte >> 4]], axis=-1)
    with np.errstate(all="ignore"):
        values = (two[None] * _E8M0[:, None, None]).astype("<f4")
    made = np.empty(values.shape, DTYPES[dtype].bits)
    rounded(values, made, dtype)
    return np.ascontiguousarray(made).view(f"<u{2 * made.dtype.itemsize}").reshape(-1)


_EACH_HIGH_BYTE = np.uint64(0x0100_0100_0100_0100)  # times a byte: that byte in four numbers of 16 bits


def mxfp4(codes: Array, scales: Array, out: Array, dtype: str) -> None:
    """Fill flat `out`, raw bits of `dtype`, with the values of MXFP4 blocks: `codes` (blocks, 16) of two
    nibbles a byte, the low one first, and `scales` (blocks,) E8M0 codes. Exact in bfloat16 and float32 but
    for scales near the ends (2^126 and above overflow)."""
    table = _mxfp4_table(dtype)
    pairs = _room("pairs", codes.shape, "<u2")
    high = pairs.view("<u8")
    wide = scales.astype("<u8")
    wide *= _EACH_HIGH_BYTE
    for k in range(high.shape[1]):
        high[:, k] = wide
    pairs |= codes
    index = _room("index", codes.shape, "<i8")
    index[...] = pairs  # here, since `take` makes itself new memory for it
    np.take(table, index.reshape(-1), out=out.view(table.dtype), mode="wrap")


def _pairs_of(table: Array) -> Array:
    """The two numbers of every byte by a table for each nibble, the low one first, as one of 64 bits."""
    byte = np.arange(256)
    two = np.stack([table[byte & 15], table[byte >> 4]], axis=-1)
    return np.ascontiguousarray(two, dtype="<f4").view("<u8").reshape(-1)


_PAIRS = {"e2m1": _pairs_of(E2M1), "int4": _pairs_of(np.arange(-8, 8)), "uint4": _pairs_of(np.arange(16))}


def nibbles(data: Array, kind: str) -> Array:
    """float32 of the two codes in each byte of `data` (rows, n), the low one first: (rows, 2n). They are
    valid until the next call in this thread."""
    index = _room("index", data.shape, "<i8")
    index[...] = data
    made = _room("product", (data.shape[0], 2 * data.shape[1]))
    np.take(_PAIRS[kind], index.reshape(-1), out=made.reshape(-1).view("<u8"), mode="wrap")
    return made


def bytes_of(data: Array, kind: str) -> Array:
    """float32 of bytes (rows, n) as numbers with a sign ("int8") or without ("uint8"). They are valid until
    the next call in this thread."""
    made = _room("product", data.shape)
    made[...] = data.view(np.int8) if kind == "int8" else data
    return made


def grouped(values: Array, scales: Array, group: int, out: Array, dtype: str) -> None:
    """Fill `out` (rows, columns) with float32 `values` (rows, columns) times `scales` (rows, groups), each
    of which is that of `group` neighbours in a row; a last group may be short."""
    with np.errstate(all="ignore"):
        values *= scales if scales.shape[1] == 1 else np.repeat(scales, group, axis=1)[:, : values.shape[1]]
    rounded(values, out, dtype, plain=bool(np.isfinite(scales).all()))
