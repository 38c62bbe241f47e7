"""Known mistakes with the codes and scales of quantised weights: each made once more from the source, to see
whether it is what an output holds.

Seen in public: scales left out, applied twice or as divisors; taken from a transposed or shifted grid, or
from blocks of another size (rows divided by rows of scales); exponent bytes taken as numbers; the two codes
of a byte exchanged; zero points left out; the scale rounded before the product. Of codes and scales that are
carried, the same of the tensors themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorFile, TensorInfo, View
from ckpt_tool.convert.quantised import INT4, INT8, MXFP4, NVFP4, Inventory, Quantised
from ckpt_tool.convert.quantised_config import RECIPES
from ckpt_tool.records import dataclass
from ckpt_tool.verify.dequantised import Array, Recomputed, e4m3, middle_code, of_bfloat16, to_dtype

DROPPED = "the codes were taken as numbers, without the scales"
TWICE = "the scales were applied twice"
INVERTED = "the codes were divided by the scales"
TRANSPOSED = "the grid of scales was transposed"
ROWS_OFF = "the scales were taken one block off along the rows"
COLUMNS_OFF = "the scales were taken one block off along the columns"
PLAIN = "the exponent bytes of the scales were taken as numbers"
EXCHANGED = "the two codes of a byte were exchanged"
SIGNED = "the codes were taken as numbers with a sign, and count from the middle one"
UNSIGNED = "the codes were taken as numbers without a sign"
MULTIPLIED = "the global scale was multiplied, and is a divisor"
DIVIDED_BY = "the second scale was taken as a divisor, and is a factor"
DIVIDED = "blocks of another size were taken, rows divided by rows of scales"
TURNED = "rows and columns of a block were exchanged"
HALVED = "blocks of half the size were taken"
ROUNDED = "the scale was rounded to bfloat16 before the product (recipe bf16-scale)"
UNSHIFTED = "the zero points were left out"
ORDER = {
    "bf16-scale": ROUNDED,
    "fp32-product": "the scale was taken in float32, and the product rounded once (recipe fp32-product)",
}


@dataclass(frozen=True)
class Mistake:
    """`words` say what was done; `scales` makes other scales of the right ones of a whole weight (as raw bits
    of its grid, and the weight), `codes` other numbers of those that whole rows of codes stand for. `power`
    is how often the scales count, `inverse` says that the second one counts the other way round, as a factor
    where it is a divisor and as a divisor where it is a factor."""

    words: str
    scales: Callable[[Array, Quantised], Array | None] = lambda grid, weight: grid
    codes: Callable[[Array, Quantised], Array] = lambda codes, weight: codes
    power: int = 1
    inverse: bool = False
    plain: bool = False  # exponent bytes are numbers
    rounded: bool = False  # the quotient of a scale and the global one is
    symmetric: bool = False  # zero points are left out
    block: Callable[[Quantised], tuple[int, int] | None] | None = None


def _transposed(grid: Array, weight: Quantised) -> Array | None:
    """The numbers of the transposed grid in the shape that it had."""
    return grid.swapaxes(-1, -2).reshape(grid.shape) if grid.ndim > 1 and min(grid.shape[-2:]) > 1 else None


def _shifted(axis: int) -> Callable[[Array, Quantised], Array | None]:
    def make(grid: Array, weight: Quantised) -> Array | None:
        return np.roll(grid, 1, axis) if grid.ndim >= -axis and grid.shape[axis] > 1 else None

    return make


def _exchanged(codes: Array, weight: Quantised) -> Array:
    """Of each pair of columns the one for the other."""
    if weight.kind not in FOUR_BITS:
        return codes
    other, even = codes.copy(), codes.shape[1] // 2 * 2
    other[:, 0:even:2], other[:, 1:even:2] = codes[:, 1:even:2], codes[:, 0:even:2]
    return other


def _signed(codes: Array, weight: Quantised) -> Array:
    middle = middle_code(weight)
    if weight.kind not in (INT4, INT8) or not middle or "zeros" in weight.others:
        return codes
    return np.where(codes >= 0, codes - middle, codes + middle)


def _unsigned(codes: Array, weight: Quantised) -> Array:
    if weight.kind != INT8 or weight.form.packed or "zeros" in weight.others:
        return codes
    return np.where(codes < 0, codes + 256, codes)


def _divided(weight: Quantised) -> tuple[int, int]:
    """As if the grid had no short blocks."""
    rows, columns = weight.scales.shape[-2:] if len(weight.scales.shape) > 1 else (1, 1)
    return max(1, weight.shape[-2] // rows), max(1, weight.shape[-1] // columns)


def _turned(weight: Quantised) -> tuple[int, int] | None:
    return weight.block[::-1] if min(weight.block) > 1 else None


def _halved(weight: Quantised) -> tuple[int, int] | None:
    grid = weight.scales.shape[-2:]
    return halved(weight.block, (grid[0], grid[1])) if len(grid) > 1 else None


def halved(block: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Half a block along the columns, or along the rows where a row has one; the same where neither has
    two."""
    high, wide = block
    if grid[1] > 1 and wide > 1:
        return high, wide // 2
    return (high // 2, wide) if grid[0] > 1 and high > 1 else block


FOUR_BITS = (MXFP4, NVFP4, INT4)
MISTAKES = (
    Mistake(DROPPED, power=0),
    Mistake(TWICE, power=2),
    Mistake(INVERTED, power=-1),
    Mistake(TRANSPOSED, _transposed),
    Mistake(ROWS_OFF, _shifted(-2)),
    Mistake(COLUMNS_OFF, _shifted(-1)),
    Mistake(PLAIN, plain=True),
    Mistake(EXCHANGED, codes=_exchanged),
    Mistake(SIGNED, codes=_signed),
    Mistake(MULTIPLIED, inverse=True),
    Mistake(DIVIDED, block=_divided),
    Mistake(TURNED, block=_turned),
    Mistake(HALVED, block=_halved),
    Mistake(ROUNDED, rounded=True),
    Mistake(UNSHIFTED, symmetric=True),
    Mistake(UNSIGNED, codes=_unsigned),
)


class Mistaken(Recomputed):
    """A view of a file as a converter with that mistake reads it."""

    mistake: Mistake = MISTAKES[0]

    def codes(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        return self.mistake.codes(super().codes(weight, rows, columns), weight)

    def _middle(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        left_out = self.mistake.symmetric
        return np.full((1, 1), middle_code(weight)) if left_out else super()._middle(weight, rows, columns)

    def scale_of_each(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        one = self.mistake
        block = None if one.block is None else one.block(weight)
        if weight.scales.numel == 1 or block is None:
            made = super().scale_of_each(weight, rows, columns)
        else:
            made = self._other_blocks(replace(weight, block=block), rows, columns)
        if one.rounded and weight.kind == NVFP4:
            made = of_bfloat16(to_dtype(made, "BF16"))
        with np.errstate(all="ignore"):
            made = made**one.power
            if one.inverse and "second" in weight.others:
                second = self._read(weight.others["second"], 0, 1).view("<f4")
                made = made * second ** (-2.0 if weight.form.multiplied else 2.0)
            return np.asarray(made)

    def _other_blocks(self, weight: Quantised, rows: Array, columns: Array) -> Array:
        grid = self._numbers(weight, 0, weight.scales.numel).reshape(weight.scales.shape)
        lead, inside = np.divmod(rows, weight.shape[-2])
        flat = grid.reshape(-1, *grid.shape[-2:])
        i = np.minimum(inside // weight.block[0], grid.shape[-2] - 1)
        j = np.minimum(columns // weight.block[1], grid.shape[-1] - 1)
        return np.asarray(flat[lead[:, None], i[:, None], j[None, :]])

    def _numbers(self, weight: Quantised, first: int, count: int) -> Array:
        if self.mistake.plain and weight.scales.dtype in EXPONENTS:
            return self._read(weight.scales, first, count).astype("<f8")
        grid = self._grid(weight)
        if grid is None:
            return super()._numbers(weight, first, count)
        return self.taken(weight, grid[first : first + count])

    _other: tuple[str, Array | None] = "", None

    def _grid(self, weight: Quantised) -> Array | None:
        """Raw bits of other scales, flat; None where they are the right ones. The last are kept: rows are
        read a few at a time."""
        last = self._other  # of this call: other threads put theirs there
        if last[0] != weight.name:
            right = self.read_scales(weight, 0, weight.scales.numel).reshape(weight.scales.shape)
            made = self.mistake.scales(right, weight)
            other = made is not None and made is not right and made.shape == right.shape
            last = weight.name, np.ascontiguousarray(made).reshape(-1) if other else None
            self._other = last
        return last[1]


def readings(
    stored: Checkpoint, inventory: Inventory, dtype: str, recipe: str
) -> Iterator[tuple[str, Mapping[str, TensorFile]]]:
    """Each wrong way to make numbers of the codes in `stored`, in words, with the files as it reads them; the
    other recipe first."""
    for other in RECIPES:
        if other != recipe:
            yield ORDER[other], {n: Recomputed(f, inventory, dtype, other) for n, f in stored.files.items()}
    factors = any(w.form.multiplied for w in inventory.weights.values())
    for mistake in MISTAKES:
        kind = type("_Mistaken", (Mistaken,), {"mistake": mistake})
        words = DIVIDED_BY if mistake.inverse and factors else mistake.words
        yield words, {n: kind(f, inventory, dtype, recipe) for n, f in stored.files.items()}


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
    for words, made in other_bits(bits, weight, part):
        data = np.ascontiguousarray(made).astype(bits.dtype, copy=False).tobytes()
        yield words, {**checkpoint.files, part.file: _Altered(checkpoint.files[part.file], part.name, data)}


def other_bits(bits: Array, weight: Quantised, part: TensorInfo) -> Iterator[tuple[str, Array]]:
    """The raw bits of one of a weight's tensors as wrong converters leave it, in words."""
    ways = _of_codes(bits, weight) if part.name == weight.codes.name else ()
    if part.name == weight.scales.name:
        ways = _of_scales(bits, weight, part.dtype)
    elif part.name == getattr(weight.others.get("second"), "name", None):
        ways = ((of_second(weight), _of_numbers(1 / _numbers(bits, part.dtype), part.dtype)),)
    elif part.name == getattr(weight.others.get("zeros"), "name", None):
        ways = _of_zeros(bits, weight)
    for words, made in ways:
        if made is not None and made.size == bits.size and not np.array_equal(made.reshape(bits.shape), bits):
            yield words, made.reshape(bits.shape)


Ways = Iterable[tuple[str, Array | None]]


def of_second(weight: Quantised) -> str:
    """What is said where the second scale counts the other way round."""
    return DIVIDED_BY if weight.form.multiplied else MULTIPLIED


# Codes that stand for zero, as bytes are full of them: two of four bits, one of eight without or with a sign.
MIDDLES = {8.0: 0x88, 128.0: 0x80, 0.0: 0}


def _of_zeros(bits: Array, weight: Quantised) -> Ways:
    """In words, those of several rows each."""
    data = np.ascontiguousarray(bits).view(np.uint8)
    yield UNSHIFTED, np.full(data.shape, MIDDLES[middle_code(weight)], np.uint8).view(bits.dtype)
    if weight.kind == INT4:
        yield EXCHANGED, (data << 4 | data >> 4).view(bits.dtype)
    if bits.ndim:
        yield COLUMNS_OFF, np.roll(bits, 1, -1)


def _of_codes(bits: Array, weight: Quantised) -> Ways:
    if weight.kind in FOUR_BITS:
        data = np.ascontiguousarray(bits).view(np.uint8)
        yield EXCHANGED, (data << 4 | data >> 4).view(bits.dtype)
    if weight.kind in (INT4, INT8) and (middle := MIDDLES[middle_code(weight)]):
        yield SIGNED, (np.ascontiguousarray(bits).view(np.uint8) ^ np.uint8(middle)).view(bits.dtype)


def _of_scales(bits: Array, weight: Quantised, dtype: str) -> Ways:
    for mistake in MISTAKES[3:6]:
        yield mistake.words, mistake.scales(bits, weight)
    for axis, words in ((-1, "columns"), (-2, "rows")):
        if bits.ndim >= -axis and bits.shape[axis] > 1:
            n, lead = bits.shape[axis], np.arange(bits.shape[axis])
            yield f"{HALVED} along the {words}", bits.take(lead // 2, axis)
            yield f"blocks of twice the size were taken along the {words}", bits.take(lead * 2 % n, axis)
    if dtype in EXPONENTS:
        yield from _of_exponents(bits)
        return
    numbers = _numbers(bits, dtype)
    with np.errstate(all="ignore"):
        yield "every scale is one", _of_numbers(np.ones(bits.shape), dtype)
        yield "the scales are squared", _of_numbers(numbers**2, dtype)
        yield "the scales are inverted", _of_numbers(1 / numbers, dtype)
        yield "the scales are twice as large", _of_numbers(2 * numbers, dtype)
        yield "the scales are half as large", _of_numbers(numbers / 2, dtype)
        yield "the scales are powers of two", _of_numbers(2.0 ** np.ceil(np.log2(numbers)), dtype)
        for size in dict.fromkeys((127, 240, 448)):
            yield f"the scales are {size} times as large", _of_numbers(numbers * size, dtype)
            yield f"the scales are those of 1/{size}", _of_numbers(numbers / size, dtype)
    rounded = to_dtype(numbers, "BF16").astype("<u4") << 16
    yield "the scales are rounded to bfloat16", rounded if dtype == "F32" else None


def _of_exponents(bits: Array) -> Ways:
    """Bytes of exponents from 127 on; those beyond a byte are cut off."""
    own = bits.astype("<i4")

    def held(exponents: Array) -> Array:
        return exponents.clip(0, 255).astype(bits.dtype)

    yield "every scale is one", held(np.full(bits.shape, 127))
    yield "the scales are squared", held(2 * own - 127)
    yield "the scales are inverted", held(254 - own)
    yield "the scales are twice as large", held(own + 1)
    yield "the scales are half as large", held(own - 1)
    yield "the scales are exponents from 0 on", (own - 127).astype(bits.dtype)
    for words, made in (("nearest", np.rint), ("lower", np.floor), ("higher", np.ceil)):
        with np.errstate(all="ignore"):
            powers = made(np.log2(np.maximum(own, 1e-30)))
        yield f"{PLAIN} (the {words} power of two of each)", held(powers + 127)


EXPONENTS = ("U8", "F8_E8M0")


def _numbers(bits: Array, dtype: str) -> Array:
    if dtype == "F8_E4M3":
        return e4m3(bits)
    if dtype == "BF16":
        return np.asarray((bits.astype("<u4") << 16).view("<f4").astype("<f8"))
    value: Any = DTYPES[dtype].value
    return np.asarray(bits.view(value).astype("<f8"))


def _of_numbers(numbers: Array, dtype: str) -> Array | None:
    if dtype == "F8_E4M3":
        return _nearest_code(numbers)
    return to_dtype(numbers, dtype) if dtype in ("F32", "BF16", "F16") else None


def _nearest_code(numbers: Array) -> Array:
    """Of E4M3, whose largest stands for all that is larger."""
    known = e4m3(np.arange(127, dtype="u1"))
    code = np.searchsorted((known[1:] + known[:-1]) / 2, np.abs(np.nan_to_num(numbers)))
    return np.asarray(code + 128 * np.signbit(numbers), "u1")
