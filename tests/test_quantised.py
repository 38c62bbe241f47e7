"""Quantised weights: one thing of codes and scales, made numbers by a recipe that is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert import quantised_values as values
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.quantised_view import as_asked

CASES = Path(__file__).parents[2] / "shared" / "cases"
ALL = np.arange(256, dtype=np.uint8)


def exact(code: int) -> float:
    """An E4M3 code by the formula of OFP8 1.0, section 5.2."""
    exponent, fraction = code >> 3 & 15, code & 7
    size = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
    return float("nan") if code & 127 == 127 else -size if code & 128 else size


def bfloat16(numbers: np.ndarray) -> np.ndarray:
    """To nearest, ties to even, through the two neighbours of each number."""
    bits = numbers.astype("<f4").view("<u4")
    low = (bits & 0xFFFF0000).view("<f4").astype("<f8")
    high = ((bits & 0xFFFF0000) + 0x10000).view("<f4").astype("<f8")
    middle = (low + high) / 2
    up = np.where(numbers == middle, bits >> 16 & 1, np.abs(numbers) > np.abs(middle))
    return ((bits >> 16) + up).astype("<u2")


def test_every_code_of_e4m3_is_its_number_signs_of_zero_included() -> None:
    expected = np.array([exact(int(c)) for c in ALL], "<f4")
    found = values.e4m3(ALL)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found[[0, 128]]), [False, True])


@pytest.mark.parametrize("scale", [1e-4, 0.75, 3.1e-39, 129.5, -2.25, 1e30])
def test_a_product_is_rounded_once(scale: float) -> None:
    codes = ALL[(ALL & 127) != 127][None]
    factor = np.array([[scale]], "<f4")
    numbers = np.array([[exact(int(c)) for c in codes[0]]]) * factor.astype("<f8")
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = {"F32": numbers.astype("<f4").view("<u4"), "BF16": bfloat16(numbers)}
        wanted["F16"] = numbers.astype("<f4").astype("<f2").view("<u2")
    for dtype, bits in wanted.items():
        made = np.empty(codes.shape, bits.dtype)
        values.fp8_rows(codes, factor, made, dtype)
        inside = np.abs(numbers) < 3e38
        assert np.array_equal(made[inside], bits[inside]), dtype


def test_every_byte_of_mxfp4_with_every_scale() -> None:
    halves = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table = np.array([*halves, *(-x for x in map(float, halves))])
    codes, scales = np.repeat(ALL[None, :], 253, 0).reshape(-1, 16), np.repeat(ALL[:253], 16)
    pairs = np.stack([table[codes & 15], table[codes >> 4]], -1).reshape(len(codes), 32)
    numbers = pairs * 2.0 ** (scales.astype("<f8")[:, None] - 127)
    for dtype, kind in (("BF16", "<u2"), ("F32", "<u4")):
        made = np.empty(codes.size * 2, kind)
        values.mxfp4(codes, scales, made, dtype)
        found = made.view("<f4") if dtype == "F32" else (made.astype("<u4") << 16).view("<f4")
        assert np.array_equal(found.reshape(numbers.shape), numbers), dtype
        assert np.array_equal(np.signbit(found.reshape(numbers.shape)), np.signbit(numbers)), dtype


# --- the case with blocks that are not square, and last blocks that are short ---------------------------

BLOCK = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}}
SHARED = pytest.mark.skipif(not CASES.exists(), reason="the shared cases are not beside the repository")


@SHARED
@pytest.mark.parametrize("folder", ["hf", "ragged.safetensors"])
@pytest.mark.parametrize("recipe", values.RECIPES)
def test_blocks_are_those_of_the_config_and_the_recipe_the_one_asked_for(folder: str, recipe: str) -> None:
    options = Options(dequantize="BF16", recipe=recipe, settings=BLOCK)
    case, before = CASES / "fp8-block-tiny", recipe.replace("-", "_")
    with open_checkpoint(case / folder) as stored, open_checkpoint(case / "expected.safetensors") as wanted:
        seen = as_asked(stored, options)
        made = [n for n in seen.names() if f"{before}.{n}" in wanted]
        assert len(made) == (7 if folder == "hf" else 3)
        for name in made:
            (found,), (expected,) = seen.find(name), wanted.find(f"{before}.{name}")
            assert np.array_equal(seen.read(found), wanted.read(expected)), name
            whole = seen.read(found).reshape(-1).view(np.uint8)
            for first, last in ((1, 2), (3, 67), (whole.size // 2 - 1, whole.size)):  # any range of its bytes
                some = np.empty(last - first, np.uint8)
                seen.read_into(found, first, some.data)
                assert np.array_equal(some, whole[first:last])
