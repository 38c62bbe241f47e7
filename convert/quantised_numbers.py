"""Quantised weights as numbers: the bytes of a tensor of the asked dtype are made when they are read, a few
rows at a time, from codes and the scales of just those rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, TensorFile, TensorInfo
from ckpt_tool.convert import quantised_values as values
from ckpt_tool.convert.quantised import (
    FP8_ROWS,
    FP8_TENSOR,
    INT4,
    INT8,
    MX_GROUP,
    MXFP4,
    NVFP4,
    Inventory,
    Quantised,
)
from ckpt_tool.convert.quantised_view import Quantising

PIECE = 1 << 17  # numbers made at a time: they and what they are made of stay in the cache
IN_GROUPS = (MXFP4, INT4, INT8, NVFP4)  # of a row, of which whole ones are made at a time
STRIP = 4 << 20  # bytes of columns that are made rows at a time
ABREAST = 64  # rows that become columns at a time: whole lines of the cache
TOGETHER = 1 << 14  # numbers up to which rows of a block are multiplied as one: shorter ones cost the calls
SCALES = 1 << 12  # that are read at a time


@dataclass(frozen=True)
class Line:
    """The scales of `rows` rows of numbers, of each number one, or a single one of all."""

    factors: values.Factors
    rows: int

    def part(self, first: int, count: int) -> values.Factors:
        numbers = self.factors.numbers
        if count == numbers.size:
            return self.factors
        return replace(self.factors, numbers=numbers[first : first + count])


class Dequantised(Quantising):
    """A view in which quantised weights are numbers of the dtype asked for, by the recipe."""

    def __init__(self, stored: TensorFile, inventory: Inventory, dtype: str, recipe: str) -> None:
        self.dtype, self.recipe = dtype, recipe
        self._kept = threading.local()
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
        itemsize = DTYPES[self.dtype].itemsize
        first, last = offset // itemsize, -(-(offset + len(buffer)) // itemsize)
        if offset % itemsize or len(buffer) % itemsize:
            made = np.empty(last - first, DTYPES[self.dtype].bits)
            self._fill(weight, first, made)
            skipped = offset - first * itemsize
            buffer[:] = made.data.cast("B")[skipped : skipped + len(buffer)]
        else:
            self._fill(weight, first, np.frombuffer(buffer, DTYPES[self.dtype].bits))

    def _fill(self, weight: Quantised, first: int, out: np.ndarray) -> None:
        """Fill flat `out` with the numbers from number `first` on: of whole rows a few at once, and of the
        rows that are not whole by itself what is wanted of them."""
        if weight.kind not in IN_GROUPS:
            self._fp8(weight, first, out)
            return
        columns, at = weight.shape[-1], 0
        while weight.form.turned and at < out.size:
            piece = self._turned(weight, first + at)[: out.size - at]
            out[at : at + piece.size] = piece
            at += piece.size
        while at < out.size:
            row, column = divmod(first + at, columns)
            if column or out.size - at < columns:
                rows, size = 1, min(columns - column, out.size - at)
            else:
                rows, size = min(max(1, PIECE // columns), (out.size - at) // columns), columns
            piece = out[at : at + rows * size].reshape(rows, size)
            self._rows(weight, row, column, piece)
            at += rows * size

    def _turned(self, weight: Quantised, first: int) -> np.ndarray:
        """Numbers from `first` on with columns for rows, some of one matrix. A strip of columns is made at a
        time, from all rows of codes, and kept: a tensor is read in order."""
        rows, columns = weight.shape[-2:]
        lead, inside = divmod(first, rows * columns)
        group, itemsize = weight.block[1], DTYPES[self.dtype].itemsize
        count = min(max(STRIP // (rows * itemsize * group), 1) * group, columns)
        strip, inside = divmod(inside, count * rows)
        key, begin = (weight.name, lead, strip), strip * count
        last: tuple[tuple[str, int, int], np.ndarray] | None = getattr(self._kept, "strip", None)
        if last is None or last[0] != key:
            self._kept.strip = last = None  # never two of them
            made = np.empty((min(count, columns - begin), rows), DTYPES[self.dtype].bits)
            for row in range(0, rows, ABREAST):
                lines = np.empty((min(ABREAST, rows - row), len(made)), made.dtype)
                self._columns(weight, lead * rows + row, begin, lines)
                made[:, row : row + ABREAST] = lines.T
            self._kept.strip = last = key, made.reshape(-1)
        return last[1][inside:]

    def _columns(self, weight: Quantised, row: int, begin: int, out: np.ndarray) -> None:
        """Whole groups of several rows of MXFP4; all of their codes are read."""
        groups = weight.shape[-1] // MX_GROUP
        some = slice(begin // MX_GROUP, (begin + out.shape[1]) // MX_GROUP)
        codes = self._read(weight.codes, row * groups * 16, len(out) * groups * 16)
        scales = self._read(weight.scales, row * groups, len(out) * groups).reshape(-1, groups)[:, some]
        wanted = codes.reshape(-1, groups, 16)[:, some].reshape(-1, 16)
        values.mxfp4(wanted, scales.reshape(-1), out.reshape(-1), self.dtype)

    def _rows(self, weight: Quantised, row: int, column: int, out: np.ndarray) -> None:
        """Fill `out` (rows, columns) from there on; rows are counted over all leading dimensions."""
        self._four_bits(weight, row, column, out)

    def _fp8(self, weight: Quantised, first: int, out: np.ndarray) -> None:
        """Any run of numbers: rows matter to nothing but the scales."""
        for start in range(0, out.size, PIECE):
            piece = out[start : start + PIECE]
            codes = self._read(weight.codes, first + start, piece.size)
            values.fp8(codes, list(self._spans(weight, first + start, piece.size)), piece, self.dtype)

    def _spans(self, weight: Quantised, first: int, count: int) -> Iterator[values.Span]:
        """`count` numbers from `first` on by the scales that go with them: parts of a row, and rows."""
        width, high, at = weight.shape[-1], weight.block[0], 0
        if weight.kind == FP8_TENSOR:
            yield values.Span(0, (count,), self._line(weight, 0).part(0, 1))
            return
        while at < count:
            row, column = divmod(first + at, width)
            size, rows = min(width - column, count - at), 1
            if size == width:
                rows = (count - at) // width
            if weight.kind == FP8_ROWS:
                scales = values.factors(self._scales(weight, row, rows)[:, None])
                yield values.Span(at, (rows, size), scales)
            else:
                lead, inside = divmod(row, weight.shape[-2])
                line = self._line(weight, lead * -(-weight.shape[-2] // high) + inside // high)
                rows = min(rows, high - inside % high, weight.shape[-2] - inside)
                each = line.rows if rows >= line.rows else 1
                rows -= rows % each
                yield values.Span(at, (rows // each, each * size), line.part(column, each * size))
            at += rows * size

    def _line(self, weight: Quantised, line: int) -> Line:
        """The scales of each column in one line of blocks. The last one is kept: a tensor is read in order,
        a part of a line at a time."""
        key = weight.name, line
        last: tuple[tuple[str, int], Line] | None = getattr(self._kept, "line", None)
        if last is None or last[0] != key:
            scales, half_up = self._grid(weight, line)
            width, (high, wide) = weight.shape[-1], weight.block
            found, rows = values.factors(scales, half_up), 1
            if weight.kind != FP8_TENSOR:
                rows = max(1, min(high, TOGETHER // width))
                row = np.repeat(found.numbers, wide)[:width]
                found = replace(found, numbers=np.tile(row, rows) if rows > 1 else row)
            self._kept.line = last = key, Line(found, rows)
        return last[1]

    def _grid(self, weight: Quantised, line: int) -> tuple[np.ndarray, bool]:
        """The scales of one line of blocks, float32, and whether they let round half up. Those of its
        neighbours are read and looked at along with them: a line has few."""
        wide = -(-weight.shape[-1] // weight.block[1])
        lines = max(1, SCALES // wide)
        key = weight.name, line // lines
        last: tuple[tuple[str, int], np.ndarray, np.ndarray] | None = getattr(self._kept, "grid", None)
        if last is None or last[0] != key:
            first = line - line % lines
            count = min(lines, weight.scales.numel // wide - first)
            scales = self._scales(weight, first * wide, count * wide).reshape(count, wide)
            last = key, scales, values.rounds_half_up(scales)
            self._kept.grid = last
        return last[1][line % lines], bool(last[2][line % lines])

    def _four_bits(self, weight: Quantised, row: int, column: int, out: np.ndarray) -> None:
        """Of whole groups, from which what is wanted is cut."""
        width, group = weight.shape[-1], weight.block[1]
        begin = column // group * group
        end = min(-(-(column + out.shape[1]) // group) * group, width)
        whole = out if (begin, end) == (column, column + out.shape[1]) else None
        made = np.empty((len(out), end - begin), out.dtype) if whole is None else whole
        if weight.kind == MXFP4:
            first, count = (row * width + begin) // group, made.size // group
            codes = self._read(weight.codes, first * 16, count * 16).reshape(-1, 16)
            scales = self._read(weight.scales, first, count)
            values.mxfp4(codes, scales, made.reshape(-1), self.dtype)
        else:
            self._groups(weight, row, begin, made)
        if whole is None:
            out[...] = made[:, column - begin : column - begin + out.shape[1]]

    def _groups(self, weight: Quantised, row: int, begin: int, out: np.ndarray) -> None:
        """A part of rows that begins with a group: of several rows all columns, of one any."""
        rows, columns = out.shape
        width, group = weight.shape[-1], weight.block[1]
        grid = -(-width // group)
        lines = -(-columns // group)
        scales = self._each(weight, row * grid + begin // group, (rows, lines))
        if weight.kind in (INT4, INT8):
            numbers = self._integers(weight, row, begin, out.shape)
        else:
            pairs = self._read(weight.codes, (row * width + begin) // 2, rows * columns // 2)
            numbers = values.nibbles(pairs.reshape(rows, -1), "e2m1")
            second = self._read(weight.others["second"], 0, 1).view("<f4")
            with np.errstate(all="ignore"):
                scales = scales * second if weight.form.multiplied else scales / second
        values.grouped(numbers, scales, group, out, self.dtype)

    def _each(self, weight: Quantised, first: int, shape: tuple[int, int]) -> np.ndarray:
        """Scales of some rows and groups, float32; one of the whole broadcasts to them."""
        if weight.of_all:
            return self._scales(weight, 0, 1).reshape(1, 1)
        return self._scales(weight, first, shape[0] * shape[1]).reshape(shape)

    def _integers(self, weight: Quantised, row: int, begin: int, shape: tuple[int, int]) -> np.ndarray:
        """What codes of integers stand for without scales, float32 (rows, columns)."""
        (rows, columns), (width, group) = shape, (weight.shape[-1], weight.block[1])
        each = weight.together
        words = -(-width // each)
        first, last = begin // each, -(-(begin + columns) // each)
        codes = self._read(weight.codes, row * words + first, rows * (last - first))
        data = codes.view(np.uint8).reshape(rows, -1)
        shifted = "zeros" in weight.others
        if weight.kind == INT4:
            numbers = values.nibbles(data, "uint4" if shifted else "int4")
        else:
            numbers = values.bytes_of(data, "int8" if not weight.form.packed else "uint8")
        numbers = numbers[:, begin - each * first :][:, :columns]
        if shifted:
            grid, lines = -(-width // group), -(-columns // group)
            zeros = self._zeros(weight, row, rows, grid)[:, begin // group :][:, :lines]
            numbers -= zeros if lines == 1 else np.repeat(zeros, group, axis=1)[:, :columns]
        elif weight.kind == INT8 and weight.form.packed:
            numbers -= np.float32(128)
        return numbers

    def _zeros(self, weight: Quantised, row: int, rows: int, grid: int) -> np.ndarray:
        """The zero points of some rows, float32 (rows, grid): in words, codes of several rows each."""
        tensor, each = weight.others["zeros"], weight.together
        if not weight.form.packed:
            count = 1 if weight.of_all else rows * grid
            found = self._read(tensor, 0 if weight.of_all else row * grid, count)
            return np.asarray(found.view(np.int8).astype("<f4").reshape(-1, grid))
        lines = np.arange(row, row + rows, dtype="<u4")
        first, last = row // each, (row + rows - 1) // each + 1
        words = self._read(tensor, first * grid, (last - first) * grid).reshape(-1, grid)
        bits = 32 // each
        codes = words[lines // each - first] >> (bits * (lines % each))[:, None] & np.uint32((1 << bits) - 1)
        return np.asarray(codes.astype("<f4"))

    def _scales(self, weight: Quantised, first: int, count: int) -> np.ndarray:
        bits = self._read(weight.scales, first, count)
        return values.scale_numbers(bits, weight.scales.dtype, self.recipe)

    def _read(self, tensor: TensorInfo, first: int, count: int) -> np.ndarray:
        """Raw elements of a stored tensor."""
        stored = DTYPES[tensor.dtype]
        out = np.empty(count, stored.bits)
        file = self.inventory.checkpoint.files[tensor.file]
        file.read_into(tensor.name, first * stored.itemsize, out.data.cast("B"))
        return out
