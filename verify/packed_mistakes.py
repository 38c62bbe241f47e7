"""Known mistakes with the codes and scales of quantised weights: each made once more from the source, to see
whether it is what an output holds.

Seen in public: scales left out, applied twice or as divisors; taken from a transposed or shifted grid, or
from blocks of another size (rows divided by rows of scales); exponent bytes taken as numbers; the two codes
of a byte exchanged; the scale rounded before the product. Of codes and scales that are carried, the same of
the tensors themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorFile, TensorInfo, View
from ckpt_tool.convert.quantised import INT4, MXFP4, NVFP4, Inventory, Quantised
from ckpt_tool.convert.quantised_config import RECIPES
from ckpt_tool.verify.dequantised import Array, Recomputed, e4m3, to_dtype

ORDER = {
    "bf16-scale": "the scale was rounded to bfloat16 before the product (recipe bf16-scale)",
    "fp32-product": "the scale was taken in float32, and the product rounded once (recipe fp32-product)",
}


@dataclass(frozen=True)
class Mistake:
    """`words` say what was done; `scales` makes other scales of the right ones of a whole weight (as raw bits
    of its grid, and the weight), `codes` other codes of raw ones. `power` is how often the scales count."""

    words: str
    scales: Callable[[Array, Quantised], Array | None] = lambda grid, weight: grid
    codes: Callable[[Array, Quantised], Array | None] = lambda codes, weight: codes
    power: int = 1
    plain: bool = False  # exponent bytes are numbers
    symmetric: bool = False  # zero points are left out
    block: Callable[[Quantised], tuple[int, int]] | None = None


def _transposed(grid: Array, weight: Quantised) -> Array | None:
    return grid.swapaxes(-1, -2) if grid.ndim > 1 and grid.shape[-1] == grid.shape[-2] > 1 else None


def _shifted(axis: int) -> Callable[[Array, Quantised], Array | None]:
    def make(grid: Array, weight: Quantised) -> Array | None:
        return np.roll(grid, 1, axis) if grid.ndim >= -axis and grid.shape[axis] > 1 else None

    return make


def _exchanged(codes: Array, weight: Quantised) -> Array | None:
    if weight.kind not in (MXFP4, NVFP4, INT4):
        return None
    data = np.ascontiguousarray(codes).view(np.uint8)
    return (data << 4 | data >> 4).view(codes.dtype)


def _divided(weight: Quantised) -> tuple[int, int]:
    """As if the grid had no short blocks."""
    rows, columns = weight.scales.shape[-2:] if len(weight.scales.shape) > 1 else (1, 1)
    return max(1, weight.shape[-2] // rows), max(1, weight.shape[-1] // columns)


def _turned(weight: Quantised) -> tuple[int, int]:
    return weight.block[1], weight.block[0]


MISTAKES = (
    Mistake("its codes were taken as numbers, without the scales", power=0),
    Mistake("the scales were applied twice", power=2),
    Mistake("it was divided by the scales", power=-1),
    Mistake("the grid of scales was transposed", _transposed),
    Mistake("the scales were taken one block off along the rows", _shifted(-2)),
    Mistake("the scales were taken one block off along the columns", _shifted(-1)),
    Mistake("the exponent bytes of the scales were taken as numbers", plain=True),
    Mistake("the two codes of a byte were exchanged", codes=_exchanged),
    Mistake("blocks of another size were taken, rows divided by rows of scales", block=_divided),
    Mistake("rows and columns of a block were exchanged", block=_turned),
    Mistake("the zero points were left out", symmetric=True),
)


class Mistaken(Recomputed):
    """A view of a file as a converter with that mistake reads it."""

    mistake: Mistake = MISTAKES[0]

    def _codes(self, weight: Quantised, rows: Array) -> Array:
        """Exchanged codes are those of each pair of columns."""
        right = super()._codes(weight, rows)
        if self.mistake.codes is not _exchanged or weight.kind not in (MXFP4, NVFP4, INT4):
            return right
        other = right.copy()
        even = right.shape[1] // 2 * 2
        other[:, 0:even:2], other[:, 1:even:2] = right[:, 1:even:2], right[:, 0:even:2]
        return other

    def _middle(self, weight: Quantised, rows: Array) -> Array:
        return np.full((1, 1), 8.0) if self.mistake.symmetric else super()._middle(weight, rows)

    def _scale_of_each(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        one, seen = self.mistake, weight
        if one.block is not None:
            seen = replace(weight, block=one.block(weight))
        if weight.scales.numel == 1 or one.block is None:
            made = super()._scale_of_each(weight, rows, columns)
        else:
            made = self._other_blocks(seen, rows, columns)
        with np.errstate(all="ignore"):
            return np.asarray(made**one.power)

    def _other_blocks(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        grid = self._numbers(weight, 0, weight.scales.numel).reshape(weight.scales.shape)
        lead, inside = np.divmod(rows, weight.shape[-2])
        flat = grid.reshape(-1, *grid.shape[-2:])
        i = np.minimum(inside // weight.block[0], grid.shape[-2] - 1)
        j = np.minimum(columns // weight.block[1], grid.shape[-1] - 1)
        return np.asarray(flat[lead[:, None], i[:, None], j[None, :]])

    def _numbers(self, weight: Quantised, first: int, count: int) -> Array:
        if self.mistake.plain and weight.scales.dtype in ("U8", "F8_E8M0"):
            return self._read(weight.scales, first, count).astype("<f8")
        grid = self.mistake.scales(self._raw(weight), weight)
        if grid is None or grid.shape != weight.scales.shape:
            return super()._numbers(weight, first, count)
        kept, self._held = self._held, (weight.scales.name, grid.reshape(-1)[first : first + count])
        try:
            return super()._numbers(weight, first, count)
        finally:
            self._held = kept

    _held: tuple[str, Array] | None = None

    def _raw(self, weight: Quantised) -> Array:
        return super()._read(weight.scales, 0, weight.scales.numel).reshape(weight.scales.shape)

    def _read(self, tensor: TensorInfo, first: int, count: int) -> Array:
        if self._held is not None and self._held[0] == tensor.name:
            return np.ascontiguousarray(self._held[1])
        return super()._read(tensor, first, count)


def readings(
    stored: Checkpoint, inventory: Inventory, dtype: str, recipe: str
) -> Iterator[tuple[str, Mapping[str, TensorFile]]]:
    """Each wrong way to make numbers of the codes in `stored`, in words, with the files as it reads them; the
    other recipe first."""
    for other in RECIPES:
        if other != recipe:
            yield ORDER[other], {n: Recomputed(f, inventory, dtype, other) for n, f in stored.files.items()}
    for mistake in MISTAKES:
        kind = type("_Mistaken", (Mistaken,), {"mistake": mistake})
        yield mistake.words, {n: kind(f, inventory, dtype, recipe) for n, f in stored.files.items()}


# --- codes and scales that are carried ------------------------------------------------------------------


class _Altered(View):
    """A file in which one tensor holds other bytes."""

    def __init__(self, stored: TensorFile, name: str, data: bytes) -> None:
        super().__init__(stored)
        self.tensors, self.altered, self.data = stored.tensors, name, data

    def extent(self, name: str) -> tuple[int, int] | None:
        return None if name == self.altered else self.stored.extent(name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name != self.altered:
            self.stored.read_into(name, offset, buffer)
        else:
            buffer[:] = self.data[offset : offset + len(buffer)]


def altered(
    checkpoint: Checkpoint, weight: Quantised, part: TensorInfo
) -> Iterator[tuple[str, Mapping[str, TensorFile]]]:
    """Each wrong way to carry one of a weight's tensors, in words, with the files as if it were right."""
    bits = checkpoint.read(part)
    for words, made in _other_bits(bits, weight, part):
        if made is None or made.shape != bits.shape or np.array_equal(made, bits):
            continue
        data = np.ascontiguousarray(made).astype(bits.dtype, copy=False).tobytes()
        yield words, {**checkpoint.files, part.file: _Altered(checkpoint.files[part.file], part.name, data)}


def _other_bits(bits: Array, weight: Quantised, part: TensorInfo) -> Iterator[tuple[str, Array | None]]:
    if part == weight.codes:
        yield "the two codes of a byte were exchanged", _exchanged(bits, weight)
        return
    if part != weight.scales:
        return
    for mistake in MISTAKES[3:6]:
        yield mistake.words, mistake.scales(bits, weight)
    yield "every scale is one", _of_numbers(np.ones(bits.shape), part.dtype)
    if part.dtype not in ("U8", "F8_E8M0"):
        numbers = _numbers(bits, part.dtype)
        with np.errstate(all="ignore"):
            yield "the scales are squared", _of_numbers(numbers**2, part.dtype)
            yield "the scales are inverted", _of_numbers(1 / numbers, part.dtype)
        rounded = to_dtype(numbers, "BF16").astype("<u4") << 16
        yield "the scales are rounded to bfloat16", rounded if part.dtype == "F32" else None


def _numbers(bits: Array, dtype: str) -> Array:
    if dtype == "F8_E4M3":
        return e4m3(bits)
    if dtype == "BF16":
        return np.asarray((bits.astype("<u4") << 16).view("<f4").astype("<f8"))
    value: Any = DTYPES[dtype].value
    return np.asarray(bits.view(value).astype("<f8"))


def _of_numbers(numbers: Array, dtype: str) -> Array | None:
    if dtype in ("U8", "F8_E8M0"):
        return np.full(numbers.shape, 127, "u1")
    return to_dtype(numbers, dtype) if dtype in ("F32", "BF16", "F16") else None
