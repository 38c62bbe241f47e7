"""Casts agree with torch where torch rounds once, with the definition of rounding where it does not."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.convert.casting import CASTABLE, cast

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
WIDE_TO_SHORT = [("BF16", 1 + 2**-8 + 2**-40, 0x3F81), ("F16", 1 + 2**-11 + 2**-40, 0x3C01)]
PAIRS = list(itertools.permutations(CASTABLE, 2))


def casted(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    out = np.zeros(bits.size, dtype=DTYPES[target].bits)
    cast(bits, source, target, out)
    return out


def by_torch(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    whole = torch.from_numpy(bits.view(f"<i{bits.itemsize}").copy())
    made = whole.view(TORCH[source]).to(TORCH[target])
    return made.view(SIGNED[DTYPES[target].itemsize]).numpy().view(DTYPES[target].bits)


def is_nan(bits: np.ndarray, dtype: str) -> np.ndarray:
    wide = np.zeros(bits.size, dtype="<u8")
    if dtype == "F64":
        wide[:] = bits
    else:
        cast(bits, dtype, "F64", wide)
    return np.isnan(wide.view("<f8"))


def samples(dtype: str) -> np.ndarray:
    """All 16-bit patterns; of the wider types every exponent with telling and random low bits."""
    if DTYPES[dtype].itemsize == 2:
        return np.arange(1 << 16, dtype="<u2")
    rng = np.random.default_rng(0)
    size = DTYPES[dtype].itemsize * 8
    top = np.arange(1 << 16, dtype="<u8") << np.uint64(size - 16)
    half = np.uint64(1 << (size - 17))
    lows = [np.uint64(0), np.uint64(1), half, half - np.uint64(1), half + np.uint64(1)]
    parts = [top | low for low in lows]
    parts.append(top | rng.integers(0, 1 << (size - 16), top.size, dtype="<u8"))
    return np.concatenate(parts).astype(DTYPES[dtype].bits)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_values_are_those_of_torch(source: str, target: str) -> None:
    bits = samples(source)
    mine, torchs = casted(bits, source, target), by_torch(bits, source, target)
    nan = is_nan(bits, source)
    assert is_nan(mine[nan], target).all(), "NaN stays NaN"
    same = mine[~nan] == torchs[~nan]
    if source != "F64" or target == "F32":  # torch rounds float64 to 16 bits twice, by way of float32
        assert same.all()
    assert same.mean() > 0.99


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_nan_keeps_its_sign(source: str, target: str) -> None:
    bits = samples(source)
    bits = bits[is_nan(bits, source)]
    sign_in = bits >> DTYPES[source].itemsize * 8 - 1
    sign_out = casted(bits, source, target) >> DTYPES[target].itemsize * 8 - 1
    assert bits.size and (sign_in == sign_out).all()


@pytest.mark.parametrize(
    ("source", "target"), [p for p in PAIRS if DTYPES[p[0]].itemsize < DTYPES[p[1]].itemsize]
)
def test_widening_and_back_is_the_identity(source: str, target: str) -> None:
    bits = samples(source)
    bits = bits[~is_nan(bits, source)]
    assert (casted(casted(bits, source, target), target, source) == bits).all()


def bfloat16_value(bits: int) -> Fraction:
    return Fraction(float(np.array([bits << 16], dtype="<u4").view("<f4")[0]))


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-3e38, max_value=3e38))
def test_float64_to_bfloat16_is_rounded_once(value: float) -> None:
    (made,) = casted(np.array([value]).view("<u8"), "F64", "BF16").tolist()
    exact, near = Fraction(value), bfloat16_value(made)
    for other in (made - 1, made + 1):
        if other >> 15 == made >> 15 and other & 0x7FFF < 0x7F80:
            distance = abs(bfloat16_value(other) - exact)
            assert abs(near - exact) < distance or (abs(near - exact) == distance and made % 2 == 0)


@pytest.mark.parametrize(("target", "value", "expected"), WIDE_TO_SHORT)
def test_a_value_just_above_a_tie_is_not_rounded_twice(target: str, value: float, expected: int) -> None:
    """float32 would drop the last term and make it a tie."""
    assert casted(np.array([value]).view("<u8"), "F64", target).tolist() == [expected]


def test_many_elements_are_cast_piece_by_piece() -> None:
    bits = np.random.default_rng(1).integers(0, 1 << 32, 200_003, dtype="<u8").astype("<u4")
    assert (casted(bits, "F32", "BF16") == by_torch(bits, "F32", "BF16"))[~is_nan(bits, "F32")].all()


def test_equal_dtypes_and_unknown_ones() -> None:
    bits = np.arange(5, dtype="<u2")
    assert (casted(bits, "F16", "F16") == bits).all()
    with pytest.raises(ValueError, match="no cast from I16 to F32"):
        casted(bits, "I16", "F32")
