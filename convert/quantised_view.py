"""A checkpoint with quantised weights as the families see it: each weight under its plain name.

Where it is carried (`Whole`) that name stands for all of its tensors, and weave.py turns the steps of the
name into steps of each. Where it is dequantised (`Dequantised`) it is a tensor of the asked dtype like any
other, whose bytes are made when they are read: a few rows at a time, from codes and the scales of just those
rows.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, Given, Record, TensorFile, TensorInfo, View
from ckpt_tool.convert import quantised_values as values
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.quantised import (
    FP8_BLOCKS,
    FP8_TENSOR,
    INT4,
    MXFP4,
    NVFP4,
    Inventory,
    Quantised,
    found_in,
)
from ckpt_tool.convert.quantised_config import CONFIG, IN_PARAMS, KEY, OTHER_KEYS, PARAMS
from ckpt_tool.errors import fail

PIECE = 1 << 16  # numbers made at a time: they and what they are made of stay in the cache


class Quantising(View):
    """A view of a file in which quantised weights have their plain names, and their parts are hidden."""

    def __init__(self, stored: TensorFile, inventory: Inventory) -> None:
        super().__init__(stored)
        self.inventory = inventory
        whole = [w for w in inventory.weights.values() if self.takes(w)]
        self.own = {w.codes.name: w for w in whole if w.codes.file == stored.name}
        self.by_name = {w.name: w for w in self.own.values()}
        self.tensors = dict(self._seen({(t.file, t.name) for w in whole for t in w.parts}))

    def _seen(self, hidden: Container[tuple[str, str]]) -> Iterator[tuple[str, TensorInfo]]:
        for t in self.stored.tensors.values():
            weight = self.own.get(t.name)
            if weight is not None:
                yield weight.name, TensorInfo(weight.name, self.dtype_of(weight), weight.shape, t.file)
            elif (t.file, t.name) not in hidden:
                yield t.name, t

    def takes(self, weight: Quantised) -> bool:
        """Whether it has its plain name here."""
        return True

    def dtype_of(self, weight: Quantised) -> str:
        raise NotImplementedError

    def absent(self, name: str) -> str | None:
        weight = self.by_name.get(name)
        if weight is None:
            return self.stored.absent(name)
        files = self.inventory.checkpoint.files
        found = (files[t.file].absent(t.name) for t in weight.parts)
        return next((f for f in found if f is not None), None)

    def extent(self, name: str) -> tuple[int, int] | None:
        return None if name in self.by_name else self.stored.extent(name)

    def record_of(self, name: str) -> tuple[str, int] | None:
        return None if name in self.by_name else self.stored.record_of(name)

    def records(self, of: Container[str] | None = None) -> Mapping[str, Record]:
        """A record of codes is that of its weight; those of scales are looked at by themselves."""
        wanted = None if of is None else {w.codes.name for n, w in self.by_name.items() if n in of}
        wanted = None if wanted is None else wanted | {n for n in self.stored.tensors if n in (of or ())}
        return {k: replace(r, of=None) for k, r in self.stored.records(wanted).items()}

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        self.stored.expect(r for r in ranges if r[0] not in self.by_name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.stored.read_into(name, offset, buffer)


class Whole(Quantising):
    """A view for planning what is carried: nothing is read under the plain names, whose dtype is that of the
    codes. Weights for whose codes and scales a family has rows stay as they are."""

    def takes(self, weight: Quantised) -> bool:
        return not weight.form.own_rows

    def dtype_of(self, weight: Quantised) -> str:
        return weight.codes.dtype


class Dequantised(Quantising):
    """A view in which quantised weights are numbers of the dtype asked for, by the recipe."""

    def __init__(self, stored: TensorFile, inventory: Inventory, dtype: str, recipe: str) -> None:
        self.dtype, self.recipe = dtype, recipe
        super().__init__(stored, inventory)

    def dtype_of(self, weight: Quantised) -> str:
        return self.dtype

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
        columns, at = weight.shape[-1], 0
        while at < out.size:
            row, column = divmod(first + at, columns)
            if column or out.size - at < columns:
                rows, size = 1, min(columns - column, out.size - at)
            else:
                rows, size = min(max(1, PIECE // columns), (out.size - at) // columns), columns
            piece = out[at : at + rows * size].reshape(rows, size)
            self._rows(weight, row, column, piece)
            at += rows * size

    def _rows(self, weight: Quantised, row: int, column: int, out: np.ndarray) -> None:
        """Fill `out` (rows, columns) from there on; rows are counted over all leading dimensions."""
        if weight.kind in (MXFP4, INT4, NVFP4):
            self._four_bits(weight, row, column, out)
            return
        width = weight.shape[-1]
        codes = self._read(weight.codes, row * width + column, out.size).reshape(out.shape)
        if weight.kind == FP8_TENSOR:
            (scale,) = self._scales(weight, 0, 1)
            values.fp8_of_one_scale(codes.reshape(-1), float(scale), out.reshape(-1), self.dtype)
            return
        if weight.kind != FP8_BLOCKS:
            scales = self._scales(weight, row, len(out))[:, None]
            values.fp8_rows(codes, scales, out, self.dtype)
            return
        high, wide = weight.block
        grid = -(-width // wide)
        for start, stop, line in _lines(row, len(out), weight.shape[-2], high):
            scales = self._scales(weight, line * grid + column // wide, grid - column // wide)
            spread = np.repeat(scales, wide)[column % wide :][: out.shape[1]]
            values.fp8_rows(codes[start:stop], spread[None], out[start:stop], self.dtype)

    def _four_bits(self, weight: Quantised, row: int, column: int, out: np.ndarray) -> None:
        """Of whole groups, from which what is wanted is cut."""
        width, group = weight.shape[-1], weight.block[1]
        if weight.kind == INT4 or out.shape[1] != width:
            begin, end = column // group * group, min(-(-(column + out.shape[1]) // group) * group, width)
        else:
            begin, end = 0, width
        whole = out if (begin, end) == (column, column + out.shape[1]) else None
        made = np.empty((len(out), end - begin), out.dtype) if whole is None else whole
        if weight.kind == MXFP4:
            first, count = (row * width + begin) // group, made.size // group
            codes = self._read(weight.codes, first * 16, count * 16).reshape(-1, 16)
            scales = self._read(weight.scales, first, count)
            values.mxfp4(codes, scales, made.reshape(-1), self.dtype)
        else:
            for k in range(len(made)):
                self._row_of_groups(weight, row + k, begin, made[k : k + 1])
        if whole is None:
            out[...] = made[:, column - begin : column - begin + out.shape[1]]

    def _row_of_groups(self, weight: Quantised, row: int, begin: int, out: np.ndarray) -> None:
        """A part of one row that begins with a group."""
        width, group = weight.shape[-1], weight.block[1]
        grid = -(-width // group)
        scales = self._scales(weight, row * grid + begin // group, -(-out.shape[1] // group))[None]
        if weight.kind == INT4:
            words = -(-width // 8)
            first, last = begin // 8, -(-(begin + out.shape[1]) // 8)
            codes = values.nibbles(self._read(weight.codes, row * words + first, last - first)[None])
            numbers = codes.astype("<f4") - np.float32(8)
            numbers = numbers[:, begin - 8 * first :][:, : out.shape[1]]
        else:
            pairs = self._read(weight.codes, (row * width + begin) // 2, out.shape[1] // 2)
            numbers = values.E2M1[values.nibbles(pairs[None])]
            second = self._read(weight.others["second"], 0, 1).view("<f4")
            scales = scales / second
        values.grouped(np.ascontiguousarray(numbers), scales, group, out, self.dtype)

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


def _lines(row: int, count: int, rows: int, high: int) -> Iterator[tuple[int, int, int]]:
    """Of `count` rows from `row` on those that share a line of the grid: where they begin and end among
    them, and the line, counted over all leading dimensions of `rows` rows each."""
    grid, at = -(-rows // high), 0
    while at < count:
        lead, inside = divmod(row + at, rows)
        stop = min(count, at + min((inside // high + 1) * high, rows) - inside)
        yield at, stop, lead * grid + inside // high
        at = stop


# --- a whole checkpoint ---------------------------------------------------------------------------------


def as_asked(checkpoint: Checkpoint, options: Options) -> Checkpoint:
    """`checkpoint` as a plan with these options sees it: itself where nothing in it is quantised, or where it
    is such a view. Kinds: those of `found_in`; `usage` for --dequantize of what is not quantised."""
    if quantised_of(checkpoint) is not None:
        return checkpoint
    inventory = found_in(checkpoint, options.settings)
    if options.dequantize is not None:
        if inventory is None:
            message = "expected quantised weights (codes with scales beside them), found none"
            fail("usage", message, where="--dequantize", hint="--dtype casts plain weights")
        return dequantised(checkpoint, inventory, options.dequantize, options.recipe)
    if inventory is None:
        return checkpoint
    return _viewed(checkpoint, {n: Whole(f, inventory) for n, f in checkpoint.files.items()})


def as_read(checkpoint: Checkpoint, options: Options) -> Checkpoint:
    """`checkpoint` as a plan with these options is carried out: its own tensors, but for what is
    dequantised."""
    if quantised_of(checkpoint) is not None:
        return checkpoint
    return checkpoint if options.dequantize is None else as_asked(checkpoint, options)


def dequantised(checkpoint: Checkpoint, inventory: Inventory, dtype: str, recipe: str) -> Checkpoint:
    """The view in which weights are numbers; config.json says nothing of codes there."""
    files = {n: Dequantised(f, inventory, dtype, recipe) for n, f in checkpoint.files.items()}
    made = _viewed(checkpoint, files)
    documents = dict(made.documents)
    for name, keys in ((CONFIG, (KEY, *OTHER_KEYS)), (PARAMS, (IN_PARAMS,))):
        if name in documents and documents[name].size and (found := _without(made, name, keys)) is not None:
            documents[name] = found
    return replace(made, documents=documents)


def _without(checkpoint: Checkpoint, name: str, keys: Iterable[str]) -> Given | None:
    content = checkpoint.json(name)
    if not any(k in content for k in keys):
        return None
    text = (json.dumps({k: v for k, v in content.items() if k not in keys}, indent=2) + "\n").encode()
    return Given(name, checkpoint.documents[name].path, len(text), text)


def _viewed(checkpoint: Checkpoint, files: Mapping[str, TensorFile]) -> Checkpoint:
    return checkpoint.with_files(dict(files))


def view_in(file: TensorFile) -> Quantising | None:
    """The view of quantised weights that a file is, or is a view of."""
    while not isinstance(file, Quantising):
        if not isinstance(file, View):
            return None
        file = file.stored
    return file


def quantised_of(checkpoint: Checkpoint) -> Inventory | None:
    """What is quantised in the files of which `checkpoint` shows a view of the whole or of the numbers."""
    first = next((v for f in checkpoint.files.values() if (v := view_in(f)) is not None), None)
    return None if first is None else first.inventory


def carried_of(checkpoint: Checkpoint) -> Inventory | None:
    """What is quantised and carried as it is."""
    first = next((v for f in checkpoint.files.values() if (v := view_in(f)) is not None), None)
    return first.inventory if isinstance(first, Whole) else None
