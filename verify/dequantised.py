"""The numbers of quantised weights once more, to hold a conversion against: by the formula of each format in
float64, number by number, and shared with nothing that converts.

A recipe names the order of rounding: "fp32-product" is the product of the code and the float32 scale,
rounded to float32 and then to the dtype of the result; "bf16-scale" takes the scale rounded to bfloat16.
Sources: Open Compute Project, OFP8 1.0 section 5 and Microscaling Formats 1.0 sections 5.3 and 5.4;
DeepSeek-V3 inference/kernel.py (weight_dequant_kernel); compressed-tensors 0.20.1 (pack_quantized, nvfp4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorFile
from ckpt_tool.convert.quantised import INT4, MXFP4, NVFP4, Inventory, Quantised
from ckpt_tool.convert.quantised_numbers import Dequantised
from ckpt_tool.convert.quantised_view import dequantised

Array = np.ndarray[Any, Any]

WORDS_HAVE = 8  # codes of four bits in a word of 32


class Recomputed(Dequantised):
    """A view of a file in which quantised weights are numbers, as this module computes them."""

    def _rows(self, weight: Quantised, row: int, column: int, out: Array) -> None:
        rows, columns = np.arange(row, row + len(out)), np.arange(column, column + out.shape[1])
        codes = self._codes(weight, rows)[:, columns]
        scales = self._scale_of_each(weight, rows, columns)
        out[...] = to_dtype(codes * scales, self.dtype)

    def _codes(self, weight: Quantised, rows: Array) -> Array:
        """The numbers that whole rows of codes stand for, float64 (rows, columns)."""
        width = weight.shape[-1]
        if weight.kind == INT4:
            each = -(-width // WORDS_HAVE)
            words = self._read(weight.codes, int(rows[0]) * each, len(rows) * each).reshape(len(rows), each)
            shifts = 4 * np.arange(WORDS_HAVE, dtype="<u4")
            codes: Array = (words[..., None] >> shifts & 15).astype("<f8").reshape(len(rows), -1)[:, :width]
            return codes - self._middle(weight, rows)
        if weight.kind in (MXFP4, NVFP4):
            half = width // 2
            data = self._read(weight.codes, int(rows[0]) * half, len(rows) * half).reshape(len(rows), half)
            return np.stack([e2m1(data & 15), e2m1(data >> 4)], axis=-1).reshape(len(rows), width)
        return e4m3(self._read(weight.codes, int(rows[0]) * width, len(rows) * width)).reshape(-1, width)

    def _middle(self, weight: Quantised, rows: Array) -> Array:
        """The code of four bits that stands for zero: 8, or that of each row and group."""
        if "zeros" not in weight.others:
            return np.full((1, 1), 8.0)
        grid, group = weight.scales.shape[-1], weight.block[1]
        first, last = int(rows[0]) // WORDS_HAVE, int(rows[-1]) // WORDS_HAVE + 1
        words = self._read(weight.others["zeros"], first * grid, (last - first) * grid).reshape(-1, grid)
        shifts = 4 * np.arange(WORDS_HAVE, dtype="<u4")
        each = (words[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, grid)
        unpacked = each[rows - first * WORDS_HAVE]
        return np.asarray(unpacked.astype("<f8")[:, np.arange(weight.shape[-1]) // group])

    def _scale_of_each(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        """The scale that goes with each code, as the recipe takes it, float64."""
        if weight.scales.numel == 1:
            return self._numbers(weight, 0, 1)
        high, wide = weight.block
        lead, inside = np.divmod(rows, weight.shape[-2])
        lines = lead * -(-weight.shape[-2] // high) + inside // high
        grid = -(-weight.shape[-1] // wide)
        first = int(lines[0])
        found = self._numbers(weight, first * grid, (int(lines[-1]) - first + 1) * grid).reshape(-1, grid)
        each: Array = found[lines - first][:, columns // wide]
        return each

    def _numbers(self, weight: Quantised, first: int, count: int) -> Array:
        bits = self._read(weight.scales, first, count)
        kind = weight.scales.dtype
        if kind in ("U8", "F8_E8M0"):
            return np.where(bits == 255, np.nan, 2.0 ** (bits.astype("<f8") - 127))
        made = e4m3(bits) if kind == "F8_E4M3" else _of_floats(bits, kind)
        if weight.kind == NVFP4:
            second = self._read(weight.others["second"], 0, 1).view("<f4")
            one = made.astype("<f4")
            both: Array = one * second if weight.form.multiplied else one / second
            return both.astype("<f8")
        return of_bfloat16(to_dtype(made, "BF16")) if self.recipe == "bf16-scale" else made


def _of_floats(bits: Array, kind: str) -> Array:
    if kind == "BF16":
        return of_bfloat16(bits)
    return bits.view(np.dtype(DTYPES[kind].value)).astype("<f8")


def of_bfloat16(bits: Array) -> Array:
    wide: Array = bits.astype("<u4") << 16
    return wide.view("<f4").astype("<f8")


def e4m3(codes: Array) -> Array:
    """float64 of E4M3: sign, four bits of exponent from 7, three of fraction; no infinity, one NaN."""
    sign = np.where(codes & 128, -1.0, 1.0)
    exponent, fraction = (codes >> 3 & 15).astype("<i4"), (codes & 7).astype("<f8")
    size = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))
    return np.asarray(sign * np.where(codes & 127 == 127, np.nan, size))


def e2m1(codes: Array) -> Array:
    """float64 of E2M1: sign, two bits of exponent from 1, one of fraction."""
    sign = np.where(codes & 8, -1.0, 1.0)
    exponent, fraction = (codes >> 1 & 3).astype("<i4"), (codes & 1).astype("<f8")
    return np.asarray(sign * np.where(exponent == 0, fraction / 2, (2 + fraction) * 2.0 ** (exponent - 2.0)))


def to_dtype(numbers: Array, dtype: str) -> Array:
    """Raw bits of float64 `numbers` rounded to float32, and that to `dtype`."""
    with np.errstate(all="ignore"):
        single = np.ascontiguousarray(numbers, dtype="<f4")
        if dtype == "F32":
            return single.view("<u4")
        if dtype == "F16":
            return single.astype("<f2").view("<u2")
    bits = single.view("<u4")
    whole, rest = bits >> 16, bits & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (whole & 1 == 1))
    return np.where(np.isnan(single), 0xFFFF, whole + up).astype("<u2")


def recomputed(checkpoint: Checkpoint, inventory: Inventory, dtype: str, recipe: str) -> Checkpoint:
    """`checkpoint` with numbers in place of codes, as this module computes them."""
    seen = dequantised(checkpoint, inventory, dtype, recipe)
    files: Mapping[str, TensorFile] = {
        name: Recomputed(file, inventory, dtype, recipe) for name, file in checkpoint.files.items()
    }
    return replace(seen, files=dict(files))
