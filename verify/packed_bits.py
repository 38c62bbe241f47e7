"""What the bits of quantised weights tell: which known mistake a difference is, which recipe somebody else's
numbers were made by, and whether the codes come back from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorFile, TensorInfo
from ckpt_tool.convert.layout import Step
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.quantised import FP8_TENSOR, INT4, INT8, Quantised
from ckpt_tool.convert.quantised_asked import lossy_words
from ckpt_tool.convert.quantised_config import RECIPES
from ckpt_tool.verify.dequantised import Array, Recomputed, e2m1, e4m3, of_bfloat16, recomputed, to_dtype
from ckpt_tool.verify.packed_mistakes import altered, readings
from ckpt_tool.verify.report import Finding

if TYPE_CHECKING:
    from ckpt_tool.verify.subject import Subject

TRIED = 8  # tensors whose differences are explained; others differ alike
LARGEST = 1 << 28  # bytes of a tensor that is made once more whole
SMALLEST = 4  # of the quantised tensors, by which a recipe is told
PIECE = 1 << 16  # numbers, or scales, that are looked at together
SHORT = 2  # bytes of a scale of which each kind is looked at once

EXACT, INVERTIBLE, ROUNDED = "exact", "invertible with the scales", "rounded"
NAN_LOST = f"{INVERTIBLE} but for codes that are NaN"  # of which there are two, and one NaN for both


def explained(
    subject: Subject, sources: Sequence[TensorInfo], differs: Callable[[Checkpoint], bool]
) -> str | None:
    """The known mistake that makes of the source what the output holds, in words; `differs` compares what a
    step gives of another source."""
    packed = subject.packed
    if packed is None or packed.inventory is None or packed.stored is None or packed.tried >= TRIED:
        return None
    if sum(t.nbytes for t in sources) > LARGEST or subject.source is None:
        return None
    packed.tried += 1
    if packed.dtype is not None:
        names = packed.inventory.weights
        if not any(t.name in names for t in sources):
            return None
        ways = readings(packed.stored, packed.inventory, packed.dtype, packed.recipe)
    else:
        ways = _altered(packed.stored, packed.parts, sources)
    return next((words for words, files in ways if not differs(subject.source.with_files(dict(files)))), None)


def _altered(
    stored: Checkpoint,
    parts: Mapping[tuple[str, str], Quantised],
    sources: Sequence[TensorInfo],
) -> Iterator[tuple[str, Mapping[str, TensorFile]]]:
    for t in sources:
        weight = parts.get((t.file, t.name))
        if weight is not None:
            yield from altered(stored, weight, stored.files[t.file].tensors[t.name])


# --- which recipe ---------------------------------------------------------------------------------------


def recognised(subject: Subject, differs: Callable[[Step, Checkpoint], bool]) -> None:
    """Of numbers that nothing says were asked for: the recipe they are made by, if it is a known one, for
    what follows to go by."""
    packed, plan = subject.packed, subject.plan
    if packed is None or packed.declared or packed.dtype is None or plan is None or subject.source is None:
        return
    assert packed.inventory is not None and packed.stored is not None
    names = packed.inventory.weights
    size = {n: w.codes.nbytes for n, w in names.items()}
    steps = [s for s in plan.steps if not s.compare and any(p.name in names for p in s.sources)]
    steps.sort(key=lambda s: sum(size.get(p.name, 0) for p in s.sources))
    for recipe in RECIPES:
        source = recomputed(packed.stored, packed.inventory, packed.dtype, recipe)
        if steps and not any(differs(s, source) for s in steps[:SMALLEST]):
            packed.recipe, packed.known = recipe, True
            subject.source = source
            if subject.direction == "to-hf":
                subject.original = source
            options = replace(Options(), dequantize=packed.dtype, recipe=recipe)
            lossy = [w for w in plan.lossy if not w.startswith("--dequantize")]
            subject.plan = replace(plan, lossy=(*lossy, *lossy_words(source, options)))
            return


# --- do the codes come back -----------------------------------------------------------------------------


def exactness(subject: Subject, wrong: Collection[str]) -> Iterator[Finding]:
    """Of numbers that are right: whether they are the products themselves, and whether the codes come back
    from them with the scales. `wrong` are names of weights whose numbers are not those of the recipe."""
    packed, source = subject.packed, subject.source
    if packed is None or packed.dtype is None or packed.inventory is None or source is None:
        return
    told: dict[str, str] = {}
    for name, weight in packed.inventory.weights.items():
        view = _recomputed_of(source, weight)
        if view is not None and name not in wrong:
            kind = _exactness(view, weight)
            told[name] = NAN_LOST if kind == INVERTIBLE and _has_nan(view, weight) else kind
    counts = Counter(told.values())
    parts = [f"{counts[kind]} {kind}" for kind in (EXACT, INVERTIBLE, NAN_LOST, ROUNDED) if counts[kind]]
    if not parts:
        return
    dtype = DTYPES[packed.dtype].torch
    text = f"of {len(told)} quantised weights as {dtype} by the recipe {packed.recipe}: {', '.join(parts)}"
    data = {"recipe": packed.recipe, "weights": dict(list(told.items())[:1000])}
    yield Finding("bits", "dequantised", "note", text, data=data)


def _recomputed_of(source: Checkpoint, weight: Quantised) -> Recomputed | None:
    file: object = source.files.get(weight.codes.file)
    while file is not None and not isinstance(file, Recomputed):
        file = getattr(file, "stored", None)
    return file


def _exactness(view: Recomputed, weight: Quantised) -> str:
    """Of all its numbers the worst. Of most weights every code with every scale tells, which are fewer than
    the numbers; where those do not, or are not all exact, it is looked at what is there."""
    every = _of_every_code(view, weight)
    if every == EXACT:
        return every
    width = weight.shape[-1]
    rows, step = int(np.prod(weight.shape[:-1])), max(1, PIECE // width)
    found, starts = EXACT, product(range(0, rows, step), range(0, width, PIECE))
    for first, begin in starts:
        lines = np.arange(first, min(rows, first + step))
        columns = np.arange(begin, min(width, begin + PIECE))
        codes, scales = view.codes(weight, lines, columns), view.scale_of_each(weight, lines, columns)
        one = _of_products(codes, scales, view.dtype, weight, look=every != INVERTIBLE)
        if one in (ROUNDED, every):
            return one  # no other number makes it worse
        found = found if one == EXACT else one
    return found


def _has_nan(view: Recomputed, weight: Quantised) -> bool:
    """Whether any of its codes stands for no number, as those of eight bits may."""
    if not weight.kind.startswith(FP8_TENSOR[:3]):
        return False
    total = weight.codes.numel
    return any(
        bool(((view.read_codes(weight, at, min(PIECE, total - at)) & 0x7F) == 0x7F).any())
        for at in range(0, total, PIECE)
    )


def _of_every_code(view: Recomputed, weight: Quantised) -> str:
    """The same of all codes of the format with all scales that the weight has, whether they meet or not."""
    codes = _known(weight)
    codes = np.concatenate([-codes[::-1], codes])
    found = EXACT
    for bits in _scales_of(view, weight, PIECE // len(codes)):
        scales = view.taken(weight, bits)[:, None]
        one = _of_products(codes[None], scales, view.dtype, weight)
        if one == ROUNDED:
            return one
        found = found if one == EXACT else one
    return found


def _scales_of(view: Recomputed, weight: Quantised, count: int) -> Iterator[Array]:
    """Raw bits of the scales of a weight, each once where they are short, at most `count` at a time."""
    kind, total = DTYPES[weight.scales.dtype], weight.scales.numel
    there = np.zeros(1 << 8 * kind.itemsize if kind.itemsize <= SHORT else 0, bool)
    for first in range(0, total, PIECE if there.size else count):
        bits = view.read_scales(weight, first, min(PIECE if there.size else count, total - first))
        if there.size:
            there[bits] = True
        else:
            yield np.unique(bits)
    each = np.flatnonzero(there).astype(kind.bits)
    yield from (each[first : first + count] for first in range(0, each.size, count))


def _of_products(codes: Array, scales: Array, dtype: str, weight: Quantised, *, look: bool = True) -> str:
    """What rounding makes of the products of numbers that codes stand for and scales, float64; `look` says
    that it is not known to leave the codes to be told."""
    with np.errstate(all="ignore"):
        products = codes * scales
        numbers = _float64(to_dtype(products, dtype), dtype)
        if np.array_equal(numbers, products, equal_nan=True):
            return EXACT
        numbers /= scales
    there = np.broadcast_to(codes, products.shape)
    return INVERTIBLE if not look or _come_back(numbers, there, weight) else ROUNDED


def _come_back(quotients: Array, codes: Array, weight: Quantised) -> bool:
    """Whether the nearest code of each quotient is the one that it was made of, the sign of zero included."""
    known, size = _known(weight), np.abs(quotients)
    middle = (known[1:] + known[:-1]) / 2
    near = known[np.minimum(np.searchsorted(middle, size), len(known) - 1)]
    same = (near == np.abs(codes)) & np.isfinite(size) & (np.signbit(quotients) == np.signbit(codes))
    return bool(np.all(same | np.isnan(codes) & np.isnan(quotients)))


def _known(weight: Quantised) -> Array:
    """The numbers from zero on that codes stand for."""
    if weight.kind == INT4:
        return np.arange(16.0)
    if weight.kind == INT8:
        return np.arange(256.0)
    if weight.kind.startswith(FP8_TENSOR[:3]):
        return e4m3(np.arange(127, dtype="u1"))
    return e2m1(np.arange(8, dtype="u1"))


def _float64(bits: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return of_bfloat16(bits)
    return np.asarray(bits.view(np.dtype(DTYPES[dtype].value)).astype("<f8"))
