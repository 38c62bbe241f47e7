"""Casts between floating types on raw bits, in numpy alone: nearest value, ties to the even one (IEEE 754).

NaN stays NaN with its sign, infinities stay, and a finite value too large for the target becomes infinite as
the rounding rule says. bfloat16 is the upper half of a float32, so it is reached by rounding bits.
"""

from __future__ import annotations

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.convert.widths import CASTABLE as CASTABLE
from ckpt_tool.convert.widths import common as common
from ckpt_tool.convert.widths import rounds as rounds

_CHUNK = 64 * 1024  # elements; bounds the temporaries and keeps them in the cache

_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_INFINITY = np.uint32(0x7F80_0000)


def cast(bits: np.ndarray, source: str, target: str, out: np.ndarray) -> None:
    """Fill flat `out` with the values of flat `bits` in another floating type. Both arrays hold raw bits
    (`DTYPES[...].bits`); `source` and `target` are dtype names of `CASTABLE`, or equal."""
    if source == target:
        out[...] = bits
        return
    if source not in CASTABLE or target not in CASTABLE:
        raise ValueError(f"no cast from {source} to {target}")
    with np.errstate(all="ignore"):  # overflow to infinity and signalling NaNs are not news here
        for start in range(0, bits.size, _CHUNK):
            piece = bits[start : start + _CHUNK]
            _cast_piece(piece, source, target, out[start : start + _CHUNK])


def converted(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    """What `cast` makes of raw bits of any shape, as a new flat array; a flat one of the same dtype as it
    is."""
    if source == target and bits.ndim == 1:
        return bits
    out = np.empty(bits.size, dtype=DTYPES[target].bits)
    cast(np.ascontiguousarray(bits).reshape(-1), source, target, out)
    return out


def _cast_piece(bits: np.ndarray, source: str, target: str, out: np.ndarray) -> None:
    if source == "BF16":
        wide = bits.astype("<u4")
        wide <<= np.uint32(16)
        values = wide.view("<f4")
    else:
        values = bits.view(np.dtype(DTYPES[source].value))
    if target != "BF16":
        out.view(np.dtype(DTYPES[target].value))[...] = values
    elif source == "F64":
        out[...] = _round_to_bfloat16(_float32_rounded_to_odd(values))
    else:
        out[...] = _round_to_bfloat16(values.astype("<f4").view("<u4"))


def _round_to_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The upper halves of float32 `bits` (a fresh array, used up), rounded: adding 0x7FFF plus the lowest
    kept bit carries exactly when the lower half is above one half, or equal to it and the kept part odd."""
    nan = (bits & _MAGNITUDE) > _INFINITY
    quiet = (bits[nan] >> np.uint32(16)) | np.uint32(0x40)  # the payload may lie in the lost half
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    bits >>= np.uint32(16)
    if quiet.size:
        bits[nan] = quiet
    return bits


def _float32_rounded_to_odd(values: np.ndarray) -> np.ndarray:
    """float32 bits of float64 `values`, inexact ones rounded towards zero with the last bit set. Rounding
    that to a shorter type gives what rounding `values` once would give, which rounding to nearest twice
    does not (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008)."""
    near = values.astype("<f4")
    back = near.astype("<f8")
    bits: np.ndarray = near.view("<u4")
    inexact = (back != values) & ~np.isnan(values)
    bits -= (inexact & (np.abs(back) > np.abs(values))).astype("<u4")
    bits |= inexact.astype("<u4")
    return bits
