"""Known mistakes with quantised weights, planted into the converted side in memory: a weight of the layer is
made once more of its codes and scales, wrongly.

Each starts from what the codes alone stand for by the layout's own formula, and goes wrong from there on in
the computation's dtype; nothing here is shared with what converts, or with what names a mistake from bits
(packed_mistakes.py), but the words."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.checkpoint.tensor_names import short
from ckpt_tool.convert.layout import Step, apply
from ckpt_tool.convert.plan import Plan
from ckpt_tool.convert.quantised import INT4, INT8, MXFP4, NVFP4, Quantised, found_in
from ckpt_tool.convert.quantised_config import RECIPES
from ckpt_tool.convert.quantised_view import quantised_of
from ckpt_tool.errors import CkptToolError
from ckpt_tool.records import dataclass
from ckpt_tool.reference import hf_quantised, quantised
from ckpt_tool.verify import packed_mistakes as known
from ckpt_tool.verify.dequantised import middle_code
from ckpt_tool.verify.packed import Packed
from ckpt_tool.verify.packed_groups import codes_of
from ckpt_tool.verify.packed_weights import PackedWeights
from ckpt_tool.verify.sides import Change, Side, Tensors
from ckpt_tool.verify.weights import Weights

EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
# What zero points of symmetric codes are as they are stored, by the code that stands for zero: words full of
# it, and 0 of codes with a sign of their own.
SYMMETRIC = {m: int.from_bytes(bytes([code] * 4), "little", signed=True) for m, code in known.MIDDLES.items()}
Block = tuple[int, int]


@dataclass(frozen=True)
class Parts:
    """One matrix of a weight: what its codes stand for alone, (rows, columns), its grid of scales as the
    recipe takes them, the same unrounded and as it is stored, and the block that each scale is of. `second`
    is what a scale of the whole made of the grid; `symmetric` are the codes without their zero points."""

    kind: str
    codes: Tensor
    grid: Tensor
    unrounded: Tensor
    stored: Tensor
    block: Block
    second: Tensor | None = None
    factor: bool = False  # that it multiplied
    symmetric: Tensor | None = None
    middle: float = 0.0  # the code in words that stands for zero, where nothing says so

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def each(self, grid: Tensor, block: Block | None = None) -> Tensor:
        """The scale of each number: that of its block, or of the last one where blocks do not reach."""
        high, wide = block or self.block
        i = (torch.arange(self.shape[0]) // max(1, high)).clamp(max=grid.shape[0] - 1)
        j = (torch.arange(self.shape[1]) // max(1, wide)).clamp(max=grid.shape[1] - 1)
        return grid[i][:, j]

    @property
    def right(self) -> Tensor:
        return self.codes * self.each(self.grid)


class NoMistake(ValueError):
    """What cannot be done to this weight."""


Make = Callable[[Parts], Tensor]


def _scaled(alter: Callable[[Tensor], Tensor]) -> Make:
    return lambda p: p.codes * p.each(alter(p.grid))


def _exponents(p: Parts) -> Tensor:
    if p.stored.dtype not in EXPONENTS:
        raise NoMistake("scales that are no exponents")
    return p.codes * p.each(p.stored.view(torch.uint8).to(p.grid.dtype))


def _exchanged(p: Parts) -> Tensor:
    if p.kind not in (MXFP4, NVFP4, INT4):
        raise NoMistake("one code in a byte")
    even = p.shape[1] // 2 * 2
    order = torch.arange(p.shape[1])
    order[:even] = order[:even].view(-1, 2).flip(1).flatten()
    return p.codes[:, order] * p.each(p.grid)


def _signed(p: Parts) -> Tensor:
    if not p.middle or p.symmetric is not None:
        raise NoMistake("codes that do not count from the middle one")
    return torch.where(p.codes >= 0, p.codes - p.middle, p.codes + p.middle) * p.each(p.grid)


def _unsigned(p: Parts) -> Tensor:
    if p.kind != INT8 or p.middle or p.symmetric is not None:
        raise NoMistake("codes without a sign of their own")
    return torch.where(p.codes < 0, p.codes + 256, p.codes) * p.each(p.grid)


def _inverse(factor: bool) -> Make:
    """The second scale the other way round than it counts, which is as a factor or as a divisor."""

    def make(p: Parts) -> Tensor:
        if p.second is None or p.factor != factor:
            raise NoMistake("no such second scale")
        return p.codes * p.each(p.grid / p.second.square())

    return make


def _unshifted(p: Parts) -> Tensor:
    if p.symmetric is None:
        raise NoMistake("codes without zero points")
    return p.symmetric * p.each(p.grid)


def _halved(p: Parts) -> Tensor:
    return p.codes * p.each(p.grid, known.halved(p.block, (p.grid.shape[0], p.grid.shape[1])))


def _divided(p: Parts) -> Tensor:
    rows, columns = p.grid.shape
    return p.codes * p.each(p.grid, (p.shape[0] // rows, p.shape[1] // columns))


def _turned(p: Parts) -> Tensor:
    if min(*p.grid.shape, *p.block) == 1:
        raise NoMistake("blocks along one dimension")
    return p.codes * p.each(p.grid, p.block[::-1])


WRONG: Mapping[str, Make] = {
    known.DROPPED: lambda p: p.codes,
    known.TWICE: _scaled(torch.square),
    known.INVERTED: _scaled(torch.reciprocal),
    known.TRANSPOSED: _scaled(lambda grid: grid.T.reshape(grid.shape)),
    known.ROWS_OFF: _scaled(lambda grid: grid.roll(1, 0)),
    known.COLUMNS_OFF: _scaled(lambda grid: grid.roll(1, 1)),
    known.PLAIN: _exponents,
    known.EXCHANGED: _exchanged,
    known.SIGNED: _signed,
    known.MULTIPLIED: _inverse(factor=False),
    known.DIVIDED_BY: _inverse(factor=True),
    known.UNSHIFTED: _unshifted,
    known.UNSIGNED: _unsigned,
    known.DIVIDED: _divided,
    known.TURNED: _turned,
    known.HALVED: _halved,
    known.ORDER["bf16-scale"]: _scaled(lambda grid: grid.bfloat16().to(grid.dtype)),
    known.ORDER["fp32-product"]: lambda p: p.codes * p.each(p.unrounded),
}


# --- where codes are ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coded:
    """A weight in the files that have its codes, with the reading of their layout."""

    checkpoint: Checkpoint
    weight: Quantised
    block: Block | None
    group: int | None
    original: bool = False
    recipe: str = RECIPES[0]
    rounded: torch.dtype | None = None  # what the numbers of the converted side were rounded to

    @property
    def matrices(self) -> int | None:
        """How many there are, of experts; None: it is one."""
        return self.weight.shape[0] if len(self.weight.shape) == 3 else None

    @property
    def turned(self) -> bool:
        """Whether the formula gives columns for rows, as the class has them."""
        return self.weight.form.turned and not self.original

    @cached_property
    def _formula(self) -> Any:
        skipped = 0 if self.matrices is None else 1
        shapes = {t.name: (t.dtype, t.shape[skipped:]) for t in self._tensors}
        module: Any = quantised if self.original else hf_quantised
        (made,) = module.packed(shapes, self.block, self.group, 8 if self.weight.kind == INT8 else 4).values()
        return made

    @property
    def _tensors(self) -> tuple[TensorInfo, ...]:
        others = {n: t for n, t in self.weight.others.items() if n in ("shape", "second", "zeros")}
        return self.weight.codes, self.weight.scales, *others.values()

    def parts(self, e: int | None, dtype: torch.dtype) -> Parts:
        """Those of matrix `e`."""
        wide = torch.promote_types(dtype, torch.float32)
        held = {t.name: self._read(t, e) for t in self._tensors}
        codes, scales = held[self.weight.codes.name], self.weight.scales.name
        stored = held[scales].reshape(-1, held[scales].shape[-1] if held[scales].ndim > 1 else 1)
        grid, second = _numbers(stored, wide), None
        if "second" in self.weight.others:
            name = self.weight.others["second"].name
            one, held[name] = held[name].to(wide), torch.ones_like(held[name])
            second = one if self.weight.form.multiplied else one.reciprocal()
            grid = grid * one if self.weight.form.multiplied else grid / one
        ones = {**held, scales: torch.ones(held[scales].shape)}
        ones[self.weight.codes.name] = codes
        plain, symmetric, middle = self._plain(ones, wide), None, middle_code(self.weight)
        middle = middle if self.weight.kind in (INT4, INT8) else 0.0
        if "zeros" in self.weight.others:
            name = self.weight.others["zeros"].name
            symmetric = self._plain({**ones, name: torch.full_like(ones[name], SYMMETRIC[middle])}, wide)
        first = self.recipe == "bf16-scale" and second is None
        taken = grid.bfloat16().to(wide) if first else grid
        kind, block, factor = self.weight.kind, self.weight.block, self.weight.form.multiplied
        return Parts(kind, plain, taken, grid, stored, block, second, factor, symmetric, middle)

    def _plain(self, held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """By the formula, (rows, columns)."""
        made: Tensor = self._formula.numbers(held, dtype)
        return made.T if self.turned else made[:, : self.weight.shape[-1]]

    def _read(self, t: TensorInfo, e: int | None) -> Tensor:
        shape = t.shape if e is None else t.shape[1:]
        out = torch.empty(shape, dtype=getattr(torch, DTYPES[t.dtype].torch))
        data = out.view(-1).view(torch.uint8).numpy().data
        self.checkpoint.read_into(t, (e or 0) * len(data), data)
        return out

    def wrong(self, make: Make, e: int | None, dtype: torch.dtype) -> Tensor:
        """The matrix with the mistake, as its formula has it."""
        made = make(self.parts(e, dtype))
        made = made if self.rounded is None else made.to(self.rounded).to(made.dtype)
        return made.T if self.turned else made


def _numbers(stored: Tensor, dtype: torch.dtype) -> Tensor:
    if stored.dtype in EXPONENTS:
        return torch.exp2(stored.view(torch.uint8).double() - 127).to(dtype)
    return stored.to(dtype)


class Each:
    """Matrices of experts, each made when it is asked for."""

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        self.make = make

    def __getitem__(self, e: int) -> Tensor:
        return self.make(e)


# --- what to plant --------------------------------------------------------------------------------------


def to_plant(
    packed: Packed | None, plan: Plan | None, shapes: Mapping[str, tuple[int, ...]], side: Side
) -> list[Change]:
    """Each mistake with one of the weights that a phase has read, the smallest of those with a grid: what is
    seen there is seen in a larger share of the layer. `packed` says what became of the source's codes."""
    found = next(_candidates(packed, plan, shapes, side), None)
    if found is None:
        return []
    coded, name, step = found
    parts = coded.parts(None if coded.matrices is None else 0, torch.float32)
    return [
        Change(f"{short(name)}: {words}", _planted(coded, name, step, make))
        for words, make in WRONG.items()
        if _applies(parts, make)
    ]


def _applies(parts: Parts, make: Make) -> bool:
    try:
        return not torch.equal(make(parts), parts.right)
    except NoMistake:
        return False


def _planted(
    coded: Coded, name: str, step: Step | None, make: Make
) -> Callable[[Tensors], dict[str, Tensor]]:
    def plant(w: Tensors) -> dict[str, Tensor]:
        own = w.maps[-1] if isinstance(w, ChainMap) else w
        assert isinstance(own, Weights)

        def made(e: int | None) -> Tensor:
            return _through(step, coded.wrong(make, e, own.dtype)).to(own.device, own.dtype)

        each: Any = Each(made) if coded.matrices is not None else made(None)
        return {name: each}

    return plant


def _through(step: Step | None, x: Tensor) -> Tensor:
    """The matrix as the plan lays it out in the converted tensor."""
    if step is None:
        return x
    lead = step.sources[0].dims[0][0] if len(step.sources[0].dims) == 3 else None
    bits = x.contiguous().numpy().view(np.uint32 if x.dtype == torch.float32 else np.uint64)
    source, target = (replace(p, dtype="F32" if x.dtype == torch.float32 else "F64") for p in _ends(step))
    axes = tuple((a, 1 if a == lead else n) for a, n in step.axes)
    (made,) = apply(replace(step, axes=axes, sources=(source,), targets=(target,)), [bits])
    numbers = torch.from_numpy(made.view(np.float32 if x.dtype == torch.float32 else np.float64))
    return numbers if lead is None else numbers[0]


def _ends(step: Step) -> tuple[Any, Any]:
    return step.sources[0], step.targets[0]


def _candidates(
    packed: Packed | None, plan: Plan | None, shapes: Mapping[str, tuple[int, ...]], side: Side
) -> Iterator[tuple[Coded, str, Step | None]]:
    """Weights that may be planted in, with their names on the converted side, and the step that makes numbers
    of that side out of the source's; the best first."""
    own = side.weights[0]
    if packed is not None and packed.dtype is not None and packed.inventory is not None and plan is not None:
        yield from _of_the_source(packed, plan, shapes)
        return
    inventory = own.inventory if isinstance(own, PackedWeights) else None
    if inventory is None and quantised_of(own.checkpoint) is None:
        try:
            inventory = found_in(own.checkpoint, packed.settings if packed is not None else {})
        except CkptToolError:
            return  # coverage says what codes lack
    if inventory is None:
        return
    scheme = inventory.scheme
    used = [w for w in inventory.weights.values() if w.name in shapes or w.codes.name in shapes]
    for w in sorted(used, key=lambda w: _order(w, w.name, shapes)):
        said = codes_of(scheme, w.name)
        yield Coded(own.checkpoint, w, said.block, said.group), w.name, None


def _of_the_source(
    packed: Packed, plan: Plan, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[Coded, str, Step | None]]:
    assert packed.inventory is not None and packed.stored is not None and packed.dtype is not None
    scheme, weights = packed.inventory.scheme, packed.inventory.weights
    steps = {}
    for s in plan.steps:
        whole = len(s.sources) == len(s.targets) == 1 and not s.targets[0].taken
        if whole and not s.compare and s.sources[0].name in weights and s.targets[0].name in shapes:
            steps[s.sources[0].name] = s
    for w in sorted(
        (weights[n] for n in steps), key=lambda w: _order(w, steps[w.name].targets[0].name, shapes)
    ):
        original = w.form.name in ("qscale", "mxfp4-dotted")
        step, rounded = steps[w.name], getattr(torch, DTYPES[packed.dtype].torch)
        said = codes_of(scheme, w.name)
        coded = Coded(packed.stored, w, said.block, said.group, original, packed.recipe, rounded)
        yield coded, step.targets[0].name, step


def _order(w: Quantised, name: str, shapes: Collection[str]) -> tuple[bool, int, int, str]:
    """Those with a grid of several rows and columns first, and then the smaller ones; last of all what is
    normed at once, as keys may be: a scale of the whole is not seen there."""
    normed = name.replace("_proj.", "_norm.") in set(shapes) - {name}
    return normed, -sum(n > 1 for n in w.scales.shape[-2:]), int(np.prod(w.shape)), w.name
