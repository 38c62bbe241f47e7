"""Numbers of quantised weights: from codes and scales to float32, bfloat16 or float16.

The *recipe* says in which order is rounded. "fp32-product" is fp32(code) x scale, rounded once to the dtype
asked for; "bf16-scale" rounds the scale to bfloat16 first. Sources: Open Compute Project, OFP8 1.0 (E4M3 has
no infinities, 0x7F and 0xFF are NaN) and Microscaling Formats 1.0 (E2M1, E8M0); transformers 5.23.0
(finegrained_fp8, mxfp4), compressed-tensors 0.20.1.

All functions take arrays of raw bits and fill raw bits; nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.convert.casting import cast

RECIPES = ("fp32-product", "bf16-scale")
TARGETS = ("BF16", "F32", "F16")
NO_NUMBER = 255  # the E8M0 code that is NaN

_TINY = np.float32(2.0**120)  # what e4m3's bits in a float32 lack: the exponents count from 7 and from 127
_LARGE = np.float32(2.0**7)  # a scale below stays finite times that
_SIGN_AND_SEVEN = np.uint32(0x87F0_0000).view(np.int32)  # of a float32: where the eight bits come to stand
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


def fp8_rows(codes: Array, scales: Array, out: Array, dtype: str, room: Array | None = None) -> None:
    """Fill `out` (rows, columns), raw bits of `dtype`, with E4M3 `codes` (rows, columns) times `scales`,
    float32 that broadcast to them. `room` is float32 scratch of as many elements."""
    product = np.empty(codes.shape, "<f4") if room is None else room[: codes.size].reshape(codes.shape)
    _tiny(codes, product)
    plain = bool(np.isfinite(scales).all()) and not bool(((codes & np.uint8(0x7F)) == 0x7F).any())
    with np.errstate(all="ignore"):
        if plain and bool((np.abs(scales) < _LARGE).all()):
            product *= scales * _TINY  # one rounding: the second factor is exact
        else:
            product *= _TINY
            if not plain:
                product[(codes & np.uint8(0x7F)) == 0x7F] = np.nan
            product *= scales
    rounded(product, out, dtype, plain=plain)


def rounded(values: Array, out: Array, dtype: str, *, plain: bool = False) -> None:
    """Fill `out`, raw bits of `dtype`, with float32 `values`, which are used up; `plain` says that none of
    them is NaN."""
    if dtype == "F32":
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
    low = bits >> np.uint32(16)
    low &= np.uint32(1)
    low += np.uint32(0x7FFF)
    bits += low
    bits >>= np.uint32(16)
    out[...] = bits
    if nan is not None and nan.any():
        out[nan] = _NAN_BFLOAT16


@lru_cache(maxsize=8)
def _pairs_of_fp8(scale: float, dtype: str) -> Array:
    """Two values of `dtype` for each two codes, the first of them in the lower byte."""
    one = np.empty((1, 256), DTYPES[dtype].bits)
    fp8_rows(np.arange(256, dtype="u1")[None], np.float32(scale).reshape(1, 1), one, dtype)
    return _both(one[0], one[0])


def _both(first: Array, second: Array) -> Array:
    """A table by 16-bit index of the pairs (first[low byte], second[high byte]), as one number each."""
    made = np.empty((256, 256, 2), first.dtype)
    made[..., 0], made[..., 1] = first[None, :], second[:, None]
    return np.ascontiguousarray(made).view(f"<u{2 * first.dtype.itemsize}").reshape(-1)


def fp8_of_one_scale(codes: Array, scale: float, out: Array, dtype: str) -> None:
    """The same of flat codes that share one scale: two at a time, by table."""
    if dtype == "F32" or codes.size % 2 or codes.size < 1 << 16:
        fp8_rows(codes.reshape(1, -1), np.float32(scale).reshape(1, 1), out.reshape(1, -1), dtype)
        return
    table = _pairs_of_fp8(scale, dtype)
    np.take(table, codes.view("<u2"), out=out.view(table.dtype), mode="clip")


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


def mxfp4(codes: Array, scales: Array, out: Array, dtype: str) -> None:
    """Fill flat `out`, raw bits of `dtype`, with the values of MXFP4 blocks: `codes` (blocks, 16) of two
    nibbles a byte, the low one first, and `scales` (blocks,) E8M0 codes. Exact in bfloat16 and float32 but
    for scales near the ends (2^126 and above overflow)."""
    table = _mxfp4_table(dtype)
    index = np.empty(codes.shape, "<u2")
    index[...] = codes
    index |= (scales.astype("<u2") << np.uint16(8))[:, None]
    np.take(table, index.reshape(-1), out=out.view(table.dtype), mode="clip")


def nibbles(words: Array) -> Array:
    """The unsigned four-bit codes of the bytes of little-endian `words` (rows, n), in order: (rows, all)."""
    data = np.ascontiguousarray(words).view(np.uint8)
    made = np.empty((*data.shape, 2), np.uint8)
    made[..., 0], made[..., 1] = data & 15, data >> 4
    return made.reshape(*data.shape[:-1], -1)


def grouped(values: Array, scales: Array, group: int, out: Array, dtype: str) -> None:
    """Fill `out` (rows, columns) with float32 `values` (rows, columns) times `scales` (rows, groups), each
    of which is that of `group` neighbours in a row; a last group may be short."""
    with np.errstate(all="ignore"):
        values *= np.repeat(scales, group, axis=1)[:, : values.shape[1]]
    rounded(values, out, dtype)


Decode = Callable[..., None]
