"""The numbers of quantised weights once more, to hold a conversion against: by the formula of each format in
float64, number by number, and shared with nothing that converts.

A recipe names the order of rounding: "fp32-product" is the product of the code and the float32 scale,
rounded to float32 and then to the dtype of the result; "bf16-scale" takes the scale rounded to bfloat16.
Sources: Open Compute Project, OFP8 1.0 section 5 and Microscaling Formats 1.0 sections 5.3 and 5.4;
DeepSeek-V3 inference/kernel.py (weight_dequant_kernel); compressed-tensors 0.20.1 (pack_quantized, nvfp4).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorFile, TensorInfo
from ckpt_tool.convert.quantised import FP8_BLOCKS, INT4, INT8, MXFP4, NVFP4, Inventory, Quantised
from ckpt_tool.convert.quantised_view import Quantising, dequantised
from ckpt_tool.verify.packed_groups import codes_of

Array = np.ndarray[Any, Any]

WORDS_HAVE = 8  # codes of four bits in a word of 32
STRIP = 1 << 16  # numbers that are computed at a time, of whole rows or of a part of one
KEPT = 1 << 21  # numbers of the columns that are kept where columns are rows
NO_EXPONENT = 255  # of E8M0


class Recomputed(Quantising):
    """A view of a file in which quantised weights are numbers, as this module computes them."""

    def __init__(self, stored: TensorFile, inventory: Inventory, dtype: str, recipe: str) -> None:
        self.dtype, self.recipe = dtype, recipe
        self._last = threading.local()
        super().__init__(stored, inventory)

    def dtype_of(self, weight: Quantised) -> str:
        return self.dtype

    def shape_of(self, weight: Quantised) -> tuple[int, ...]:
        *lead, rows, columns = weight.shape
        return (*lead, columns, rows) if weight.form.turned else weight.shape

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        weight = self.by_name.get(name)
        if weight is None:
            self.stored.read_into(name, offset, buffer)
            return
        size = DTYPES[self.dtype].itemsize
        end = offset + len(buffer)
        at, last = offset // size, -(-end // size)
        while at < last:
            some = self._columns_from(weight, at) if weight.form.turned else self._from(weight, at, last)
            some = some[: last - at]
            first, stop = max(offset, at * size), min(end, (at + some.size) * size)
            buffer[first - offset : stop - offset] = some.data.cast("B")[first - at * size : stop - at * size]
            at += some.size

    def _from(self, weight: Quantised, first: int, last: int) -> Array:
        """Raw bits of numbers from `first` on, as many as are made at once, flat."""
        width = weight.shape[-1]
        row, column = divmod(first, width)
        if not column and width <= min(STRIP, last - first):
            count = min(STRIP, last - first) // width
            return self.bits_of(weight, np.arange(row, row + count), np.arange(width)).reshape(-1)
        begin = column - column % WORDS_HAVE
        columns = np.arange(begin, min(begin + STRIP, width, column + last - first))
        return self.bits_of(weight, np.arange(row, row + 1), columns)[0, column - begin :]

    def _columns_from(self, weight: Quantised, first: int) -> Array:
        """The same of a weight whose columns are the rows of its numbers. What is made for it is kept: a
        tensor is read in order."""
        rows, width = weight.shape[-2:]
        lead, inside = divmod(first, rows * width)
        count = max(KEPT // rows // WORDS_HAVE, 1) * WORDS_HAVE
        begin = inside // rows // count * count
        key = weight.name, lead, begin
        found: tuple[tuple[str, int, int], Array] | None = getattr(self._last, "columns", None)
        if found is None or found[0] != key:
            self._last.columns = found = None
            columns, step = np.arange(begin, min(begin + count, width)), max(1, STRIP // width)
            made = np.empty((len(columns), rows), DTYPES[self.dtype].bits)
            for row in range(0, rows, step):
                some = np.arange(lead * rows + row, lead * rows + min(row + step, rows))
                made[:, row : row + step] = self.bits_of(weight, some, columns).T
            self._last.columns = found = key, made.reshape(-1)
        return found[1][inside - begin * rows :]

    def bits_of(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        """Raw bits of the numbers in neighbouring rows, counted over all leading dimensions, and columns."""
        with np.errstate(all="ignore"):
            product = self.codes(weight, rows, columns) * self.scale_of_each(weight, rows, columns)
        return to_dtype(product, self.dtype)

    def codes(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        """The numbers that codes stand for, float64 (rows, columns). The first column is one that a word
        begins with."""
        if weight.kind == INT4:
            found = self._nibbles(weight, rows, columns).astype("<f8")
            found -= self._middle(weight, rows, columns)
            return found
        if weight.kind == INT8:
            return self._bytes(weight, rows, columns) - self._middle(weight, rows, columns)
        if weight.kind in (MXFP4, NVFP4):
            return e2m1(self._nibbles(weight, rows, columns))
        return e4m3(self._elements(weight.codes, weight.shape[-1], rows, columns))

    def _nibbles(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        """Codes of four bits, one a byte, (rows, columns)."""
        each = WORDS_HAVE if weight.kind == INT4 else 2
        one, other = int(columns[0]) // each, int(columns[-1]) // each + 1
        packed = self._elements(weight.codes, -(-weight.shape[-1] // each), rows, np.arange(one, other))
        data = np.ascontiguousarray(packed).view("u1")  # words begin with their lowest byte
        made = np.empty((len(rows), 2 * data.shape[1]), "u1")
        np.bitwise_and(data, 15, out=made[:, 0::2])
        np.right_shift(data, 4, out=made[:, 1::2])
        return made[:, : len(columns)]

    def _bytes(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        """Codes of eight bits as float64 (rows, columns): with a sign where each is an element, and without
        one where four are in a word."""
        if not weight.form.packed:
            signed = self._elements(weight.codes, weight.shape[-1], rows, columns)
            return np.asarray(np.ascontiguousarray(signed).view("i1").astype("<f8"))
        one, other = int(columns[0]) // 4, int(columns[-1]) // 4 + 1
        words = self._elements(weight.codes, -(-weight.shape[-1] // 4), rows, np.arange(one, other))
        return np.asarray(np.ascontiguousarray(words).view("u1")[:, : len(columns)].astype("<f8"))

    def _elements(self, tensor: TensorInfo, width: int, rows: Array, columns: Array) -> Array:
        """Raw elements of a stored matrix of rows of `width`."""
        first, begin, count = int(rows[0]), int(columns[0]), len(columns)
        if len(rows) == 1:
            return self._read(tensor, first * width + begin, count).reshape(1, count)
        return self._read(tensor, first * width, len(rows) * width).reshape(-1, width)[:, begin:][:, :count]

    def _middle(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        """The code that stands for zero: the middle one, or that of each row and group."""
        if "zeros" not in weight.others:
            return np.full((1, 1), middle_code(weight))
        if weight.scales.numel == 1:
            return np.asarray(self._read(weight.others["zeros"], 0, 1).view("i1").astype("<f8").reshape(1, 1))
        grid, group = weight.scales.shape[-1], weight.block[1]
        if not weight.form.packed:
            some = self._read(weight.others["zeros"], int(rows[0]) * grid, len(rows) * grid).view("i1")
            return np.asarray(some.astype("<f8").reshape(-1, grid).take(columns // group, axis=1))
        bits = 4 if weight.kind == INT4 else 8
        have = 32 // bits
        first, last = int(rows[0]) // have, int(rows[-1]) // have + 1
        words = self._read(weight.others["zeros"], first * grid, (last - first) * grid).reshape(-1, grid)
        shifts = bits * np.arange(have, dtype="<u4")
        each = (words[:, None, :] >> shifts[None, :, None] & ((1 << bits) - 1)).reshape(-1, grid)
        unpacked = each[rows - first * have]
        return np.asarray(unpacked.astype("<f8").take(columns // group, axis=1))

    def scale_of_each(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        """The scale that goes with each code, as the recipe takes it, float64 that broadcasts to them."""
        if weight.scales.numel == 1:
            return self._numbers(weight, 0, 1)
        high, wide = weight.block
        lead, inside = np.divmod(rows, weight.shape[-2])
        lines = lead * -(-weight.shape[-2] // high) + inside // high
        grid = -(-weight.shape[-1] // wide)
        first = int(lines[0])
        found = self._numbers(weight, first * grid, (int(lines[-1]) - first + 1) * grid).reshape(-1, grid)
        if grid > 1:
            found = found.take(columns // wide, axis=1)
        return found if high == 1 else found.take(lines - first, axis=0)

    def _numbers(self, weight: Quantised, first: int, count: int) -> Array:
        return self.taken(weight, self.read_scales(weight, first, count))

    def read_codes(self, weight: Quantised, first: int, count: int) -> Array:
        """Raw elements of its codes."""
        return self._read(weight.codes, first, count)

    def read_scales(self, weight: Quantised, first: int, count: int) -> Array:
        """Raw bits of its scales."""
        return self._read(weight.scales, first, count)

    def taken(self, weight: Quantised, bits: Array) -> Array:
        """float64 of raw bits of scales, as the recipe takes them."""
        kind = weight.scales.dtype
        if kind in ("U8", "F8_E8M0"):
            powers = np.ldexp(1.0, bits.astype("<i4") - 127)
            return np.where(bits == NO_EXPONENT, np.nan, powers)
        made = e4m3(bits) if kind == "F8_E4M3" else _of_floats(bits, kind)
        if weight.kind == NVFP4:
            second = self._read(weight.others["second"], 0, 1).view("<f4")
            with np.errstate(all="ignore"):
                one = made.astype("<f4")
                both: Array = one * second if weight.form.multiplied else one / second
            return both.astype("<f8")
        return of_bfloat16(to_dtype(made, "BF16")) if self.recipe == "bf16-scale" else made

    def _read(self, tensor: TensorInfo, first: int, count: int) -> Array:
        """Raw elements of a stored tensor, flat."""
        kind = DTYPES[tensor.dtype]
        out = np.empty(count, kind.bits)
        file = self.inventory.checkpoint.files[tensor.file]
        file.read_into(tensor.name, first * kind.itemsize, out.data.cast("B"))
        return out


def middle_code(weight: Quantised) -> float:
    """What stands for zero where nothing says so: the middle of the codes in words, and 0 of those that have
    a sign of their own."""
    return 0.0 if not weight.form.packed else 8.0 if weight.kind == INT4 else 128.0


def _of_floats(bits: Array, kind: str) -> Array:
    if kind == "BF16":
        return of_bfloat16(bits)
    return bits.view(np.dtype(DTYPES[kind].value)).astype("<f8")


def of_bfloat16(bits: Array) -> Array:
    wide: Array = bits.astype("<u4") << 16
    return wide.view("<f4").astype("<f8")


def _all_of_e4m3() -> Array:
    """float64 of E4M3: sign, four bits of exponent from 7, three of fraction; no infinity, one NaN."""
    codes = np.arange(256)
    sign = np.where(codes & 128, -1.0, 1.0)
    exponent, fraction = codes >> 3 & 15, (codes & 7).astype("<f8")
    size = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))
    return np.asarray(sign * np.where(codes & 127 == 127, np.nan, size))


def _all_of_e2m1() -> Array:
    """float64 of E2M1: sign, two bits of exponent from 1, one of fraction."""
    codes = np.arange(16)
    sign = np.where(codes & 8, -1.0, 1.0)
    exponent, fraction = codes >> 1 & 3, (codes & 1).astype("<f8")
    return np.asarray(sign * np.where(exponent == 0, fraction / 2, (2 + fraction) * 2.0 ** (exponent - 2.0)))


_E4M3, _E2M1 = _all_of_e4m3(), _all_of_e2m1()


def e4m3(codes: Array) -> Array:
    """float64 of E4M3 codes of any shape."""
    return np.asarray(_E4M3.take(codes))


def e2m1(codes: Array) -> Array:
    """float64 of E2M1 codes, one a byte, of any shape."""
    return np.asarray(_E2M1.take(codes))


def to_dtype(numbers: Array, dtype: str) -> Array:
    """Raw bits of float64 `numbers` rounded to float32, and that to `dtype`."""
    with np.errstate(all="ignore"):
        single = np.ascontiguousarray(numbers, dtype="<f4")
        if dtype == "F32":
            return single.view("<u4")
        if dtype == "F16":
            return single.astype("<f2").view("<u2")
    bits = single.view("<u4")
    whole = (bits >> 16).astype("<u2")
    rest = (bits & 0xFFFF) + (whole & 1)  # half is rounded up where what stays is odd
    whole += rest > 0x8000
    nan = np.isnan(single)
    if nan.any():
        whole[nan] = 0xFFFF
    return whole


def recomputed(checkpoint: Checkpoint, inventory: Inventory, dtype: str, recipe: str) -> Checkpoint:
    """`checkpoint` with numbers in place of codes, as this module computes them."""
    seen = dequantised(checkpoint, inventory, dtype, recipe)
    inventory = _with_own_groups(inventory)
    files: Mapping[str, TensorFile] = {
        name: Recomputed(file, inventory, dtype, recipe) for name, file in checkpoint.files.items()
    }
    return replace(seen, files=dict(files))


def _with_own_groups(inventory: Inventory) -> Inventory:
    """Where weights are quantised in several ways, each with the block that its group says."""
    if not inventory.scheme.groups:
        return inventory
    weights = {}
    for name, w in inventory.weights.items():
        said, block = codes_of(inventory.scheme, name), w.block
        if w.kind == FP8_BLOCKS and said.block is not None:
            block = said.block
        elif w.kind in (INT4, INT8) and not w.of_all:
            block = (1, said.group or w.shape[-1])
        weights[name] = replace(w, block=block)
    return replace(inventory, weights=weights)
