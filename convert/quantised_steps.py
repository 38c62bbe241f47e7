"""Carrying a quantised weight: the step of its plain name becomes steps of its codes, its scales and what
else belongs to it, all or none.

A step moves numbers; it moves scales as well only where whole blocks of numbers, which share a scale, become
whole blocks. A permutation of rows inside of a block leaves the scales as they are, one of whole blocks
permutes them, a cut falls on the edge of a block; a scale of the whole tensor goes with each share of it, and
tensors become one only if their scales are equal. Anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.convert.layout import Dims, Part, Place, Ranges, Step, dims_text
from ckpt_tool.convert.quantised import (
    CACHES,
    FP8_ROWS,
    NUMBERS,
    QSCALE,
    TRANSFORMERS,
    VLLM,
    Inventory,
    QuantFormat,
    Quantised,
    scaled_by_rows,
)
from ckpt_tool.convert.quantised_asked import WAY_OUT
from ckpt_tool.convert.quantised_view import carried_of, view_in
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import Problem
from ckpt_tool.records import dataclass

Axes = tuple[tuple[str, int], ...]


class Torn(Exception):
    """A step would tear blocks apart."""

    kind, hint = "unsupported", WAY_OUT


class OtherShape(Torn):
    """There are no such codes as the step takes."""

    kind, hint = "shape-mismatch", ""


def physical(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with the tensors that stand in its files, for carrying out what is carried."""
    if carried_of(checkpoint) is None:
        return checkpoint
    files = {n: f if (v := view_in(f)) is None else v.stored for n, f in checkpoint.files.items()}
    return replace(checkpoint, files=files)


def of_all_parts(
    steps: Steps, checkpoint: Checkpoint, side: str, form: QuantFormat | None = None
) -> tuple[Steps, list[Problem]]:
    """The steps with those of quantised weights, which `checkpoint` holds on the `side` "sources" or
    "targets", taken apart; and what stands in the way. `form` is how the tensors are called on the other
    side, None as they are here."""
    inventory = carried_of(checkpoint)
    if inventory is None:
        return steps, []
    if inventory.beside and (side == "sources" or form is None):
        steps = _with_caches(steps, inventory, side)
    torn: dict[tuple[type[Torn], str], list[Part]] = {}
    by_rows = scaled_by_rows(inventory)

    def here(step: Step) -> tuple[Part, ...]:
        return step.sources if side == "sources" else step.targets

    def apart(step: Step) -> Iterable[Step]:
        units = [inventory.weights.get(p.name) for p in here(step)]
        if not any(units):
            return [step]
        try:
            _as_large(step, units, here(step))
            return list(_apart(step, [*map(_known, units, here(step))], side, form, by_rows))
        except Torn as why:
            first = next(p for p in here(step) if p.name in inventory.weights)
            torn.setdefault((type(why), str(why)), []).append(first)
            return [step]

    dtypes = {w.codes.dtype for w in inventory.weights.values() if not w.form.own_rows}
    made = steps.changed(apart, where=lambda s: any(p.dtype in dtypes for p in here(s)))
    problems = [_refused(*why, parts) for why, parts in torn.items()]
    return made, problems or list(_unlike(made, {*dtypes, *NUMBERS}))


def _with_caches(steps: Steps, inventory: Inventory, side: str) -> Steps:
    """The steps with those of scales of caches that plain projections fill: each goes where its projection
    goes, under the name that it has, where that is whole on both sides."""

    def here(step: Step) -> Part:
        return (step.sources if side == "sources" else step.targets)[0]

    def along(step: Step) -> Iterator[Step]:
        yield step
        weight = here(step).name
        (other,) = step.targets if side == "sources" else step.sources
        for t in inventory.beside.get(weight, ()) if other.name.endswith(".weight") else ():
            within = t.name.startswith(weight.removesuffix("weight"))
            outer = 1 if within else 2
            stem, own = (n.rsplit(".", outer)[0] for n in (other.name, weight))
            axes = tuple((f"x{k}", n) for k, n in enumerate(t.shape))
            dims: Dims = tuple((a,) for a, _ in axes)
            mine = Part(t.file, t.name, t.dtype, dims)
            theirs = Part(other.file, stem + t.name.removeprefix(own), t.dtype, dims)
            sources, targets = (mine, theirs) if side == "sources" else (theirs, mine)
            yield replace(step, axes=axes, sources=(sources,), targets=(targets,))

    def alone(step: Step) -> bool:
        return len(step.sources) == len(step.targets) == 1 and not step.compare and not step.mean

    return steps.changed(along, where=alone)


def _unlike(steps: Steps, dtypes: Collection[str]) -> Iterator[Problem]:
    """Of tensors that are compared with others as they are tied, those that are codes where the others are
    numbers, or the other way round."""
    compared = list(steps.where(lambda s: s.compare == "tied"))
    if not compared:
        return
    written = {(p.file, p.name): p.dtype for s in steps if not s.compare for p in s.targets}
    for step in compared:
        source, target = step.sources[0], step.targets[0]
        found = written.get((target.file, target.name))
        plain = found in NUMBERS and source.dtype in NUMBERS
        if found != source.dtype and not plain and source.dtype in dtypes:
            message = (
                f"expected numbers or codes of both, as the config ties them, found {source.dtype} here and "
                f"{found or 'none'} in {target.name}"
            )
            yield Problem("tied-mismatch", message, source.file, source.name, step.hint)


def _known(unit: Quantised | None, part: Part) -> Quantised:
    if unit is None:
        raise Torn(f"expected {part.name} to be quantised as what it is joined with is, found {part.dtype}")
    return unit


def _as_large(step: Step, units: Sequence[Quantised | None], parts: Sequence[Part]) -> None:
    """Words of codes are as many for one column less: their own tensor says how many count."""
    sizes = step.sizes
    for unit, part in zip(units, parts, strict=True):
        if unit is not None and "shape" in unit.others and unit.shape != part.shape(sizes):
            said = f"found {unit.shape} in {unit.others['shape'].name}"
            raise OtherShape(f"expected codes of shape {part.shape(sizes)}, {said}")


def _refused(how: type[Torn], why: str, parts: Sequence[Part]) -> Problem:
    """One for all of which the same is to be said."""
    first, more = parts[0], f"; {len(parts) - 1} more weights alike" * (len(parts) > 1)
    return Problem(how.kind, why + more, first.file, first.name, how.hint or None)


def _apart(
    step: Step, units: list[Quantised], side: str, form: QuantFormat | None, by_rows: bool
) -> Iterator[Step]:
    first = units[0]
    for u in units[1:]:
        if (u.kind, u.block, u.form, [*u.others]) != (first.kind, first.block, first.form, [*first.others]):
            raise Torn(f"expected {u.name} to be quantised as {first.name} ({first.words}), found {u.words}")
    if step.mean:
        raise Torn(f"expected plain weights to take the mean of, found {first.words}")
    named = _Named(step, units, side, form or _hugging_face(first.form, side, by_rows))
    yield named.codes()
    if first.of_all:
        yield from named.numbers("scales")
    else:
        yield named.of_rows() if first.kind == FP8_ROWS else named.on_grid("scales", first.block)
    for what, tensor in first.others.items():
        if what == "shape" and (len(units) > 1 or len(named.others) > 1):
            raise Torn("expected codes in words of their own row to stay one tensor, found a cut or a join")
        if what == "zeros" and first.form.packed:  # those of several rows in a word
            yield named.on_grid("zeros", (first.together, first.block[1]), packed=True)
        elif what == "zeros" and not first.of_all:
            yield named.on_grid("zeros", first.block)
        else:
            yield from named.numbers(what, tensor.shape)


def _hugging_face(form: QuantFormat, side: str, by_rows: bool) -> QuantFormat:
    """How the tensors are called there that are called so in an original, and are read so on the way back:
    scales of rows as compressed-tensors has them, whose loaders alone know those."""
    if form is not QSCALE or side != "sources":
        return form
    return VLLM if by_rows else TRANSFORMERS


# How many dimensions the scale of inputs has beside scales of rows: none in an original,
# and (1,) as compressed-tensors makes room for it.
_ONE = {QSCALE.name: 0, VLLM.name: 1}


@dataclass(frozen=True)
class _Named:
    """A step of plain names with what they stand for."""

    step: Step
    units: list[Quantised]
    side: str
    form: QuantFormat

    @property
    def others(self) -> tuple[Part, ...]:
        """The parts of the side that is to be written."""
        return self.step.targets if self.side == "sources" else self.step.sources

    @property
    def here(self) -> tuple[Part, ...]:
        return self.step.sources if self.side == "sources" else self.step.targets

    @property
    def renamed(self) -> bool:
        """Whether the other side has names of its own."""
        return self.form is not self.units[0].form

    def called(self, what: str) -> tuple[list[TensorInfo], list[str]]:
        """The tensors that are there, and the names of those to be written."""
        held = [getattr(u, what) if what in ("codes", "scales") else u.others[what] for u in self.units]
        plain, end = self.form.plain, self.form.end(what)
        if not end:
            found = f"found {held[0].name}"
            raise Torn(f"expected what the other layout has a name for, {found}; --drop {held[0].name}")
        unit, names = self.units[0], []
        stem = unit.codes.name[: len(unit.codes.name) - len(unit.form.codes)]
        outer = what in CACHES and not held[0].name.startswith(f"{stem}.")
        for part in self.others:
            if not part.name.endswith(plain):
                raise Torn(f"expected a name that ends in {plain or 'a word'} for {what}, found {part.name}")
            made = part.name[: len(part.name) - len(plain)]
            names.append((made.rpartition(".")[0] if outer else made) + end)
        return held, names

    def codes(self) -> Step:
        unit = self.units[0]
        if unit.form.packed:
            return self.on_grid("codes", (1, unit.together), packed=True)
        held, names = self.called("codes")
        mine, theirs = (
            ([p.dims for p in side], [p.ranges for p in side]) for side in (self.here, self.others)
        )
        return self._between(self.step.axes, *mine, *theirs, held, names)

    def of_rows(self) -> Step:
        """The step of scales of whole rows, as they are; where the other layout has names of its own, (rows,)
        in an original are (rows, 1) as compressed-tensors has them."""
        held, names = self.called("scales")
        wide = len(held[0].shape) > 1
        becomes = {QSCALE.name: False, VLLM.name: True}.get(self.form.name, wide) if self.renamed else wide
        axes, left, right = self._of_blocks((1, 0), True, False)
        (mine, my_ranges), (theirs, their_ranges) = left, right
        column: Dims = ((),)
        mine = [(*dims, *column * wide) for dims in mine]
        theirs = [(*dims, *column * becomes) for dims in theirs]
        return self._between(axes, mine, my_ranges, theirs, their_ranges, held, names)

    def on_grid(self, what: str, block: tuple[int, int], *, packed: bool = False) -> Step:
        """The step of what has one element for each block; `packed` with all of a block in it, in order, and
        not one number for them."""
        held, names = self.called(what)
        axes, left, right = self._of_blocks(block, False, packed)
        if what == "scales" and self.units[0].form.spread:
            left, right = (_spread(left), _spread(right))
        return self._between(axes, *left, *right, held, names)

    def _of_blocks(self, block: tuple[int, int], flat: bool, packed: bool) -> tuple[Axes, Side, Side]:
        """See `_grid`."""
        if any(p.taken for p in (*self.here, *self.others)):
            raise Torn("expected whole quantised tensors, found rows that are written twice")
        mine, theirs = (tuple(p.place for p in side) for side in (self.here, self.others))
        return _grid(self.step.axes, mine, theirs, block, flat, packed)

    def numbers(self, what: str, shape: tuple[int, ...] | None = None) -> Iterator[Step]:
        """The steps of what belongs to a whole tensor: each share has it, and what is joined must agree."""
        held, names = self.called(what)
        shape = held[0].shape if shape is None else shape
        if len(held) > 1 and len(names) > 1:
            raise Torn("expected scales of one tensor for several, or the other way round, found neither")
        axes = tuple((f"x{k}", n) for k, n in enumerate(shape))
        dims: Dims = tuple((a,) for a, _ in axes)
        becomes = dims
        rows = self.units[0].kind == FP8_ROWS
        if rows and what == "activation" and self.form.name in _ONE and self.renamed:
            axes, dims, becomes = (), ((),) * len(shape), ((),) * _ONE[self.form.name]
        for k, (tensor, name) in enumerate((t, n) for t in held for n in names):
            made = self._between(axes, [dims], [()], [becomes], [()], [tensor], [name])
            if k and len(held) > 1:
                hint = f"the scales differ: {WAY_OUT}"
                compared = {"compare": "tied"} if self.side == "sources" else {"copied": True}
                made = replace(made, note="one scale", hint=hint, **compared)
            yield made

    def _between(
        self,
        axes: Axes,
        here_dims: Sequence[Dims],
        here_ranges: Sequence[Ranges],
        other_dims: Sequence[Dims],
        other_ranges: Sequence[Ranges],
        held: Sequence[TensorInfo],
        names: Sequence[str],
    ) -> Step:
        mine = tuple(
            Part(t.file, t.name, t.dtype, d, r) for t, d, r in zip(held, here_dims, here_ranges, strict=True)
        )
        files = [p.file for p in self.others]
        theirs = tuple(
            Part(f, n, held[0].dtype, d, r)
            for f, n, d, r in zip(files, names, other_dims, other_ranges, strict=False)
        )
        sources, targets = (mine, theirs) if self.side == "sources" else (theirs, mine)
        return replace(self.step, axes=axes, sources=sources, targets=targets)


# --- blocks ---------------------------------------------------------------------------------------------

Side = tuple[list[Dims], list[Ranges]]


@lru_cache(maxsize=1024)  # the layers of a model differ in names only
def _grid(
    axes: Axes,
    here: tuple[Place, ...],
    others: tuple[Place, ...],
    block: tuple[int, int],
    flat: bool,
    packed: bool = False,
) -> tuple[Axes, Side, Side]:
    """The axes of a grid of blocks, and for each part of either side its dims and ranges on them. `block` is
    that of the last two dimensions of the parts `here`; 0 takes all of one. Raises `Torn`."""
    sizes = dict(axes)
    dims, other = here[0][0], others[0][0]
    ranged = {a for _, ranges, _ in (*here, *others) for a, _, _ in ranges}
    if any(p[0] != dims for p in here) or any(p[0] != other for p in others) or len(dims) < 2:
        raise Torn("expected matrices of one layout, found several")
    made: dict[str, int] = {a: n for g in dims[:-2] for a in g for n in [sizes[a]]}
    merged: dict[str, tuple[str, int, int]] = {}  # axis with ranges -> axis of the grid, stride, block
    orders: dict[frozenset[str], tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for k, each in ((-2, block[0]), (-1, block[1])):
        group = dims[k]
        match = next((g for g in other if set(g) == set(group)), None)
        total = prod(sizes[a] for a in group)
        if match is None or (each != 1 and (len(other) != len(dims) or other[k] != match)):
            raise Torn(_words(dims, other, block))
        size = each or total
        blocks = _blocks(group, match, sizes, size, ranged, packed) if size > 1 else None
        if blocks is None:
            made |= {a: sizes[a] for a in group}
            orders[frozenset(group)] = (group, match)
            continue
        kept, (name, count), strides = blocks
        made |= {a: sizes[a] for a in kept[0]} | {name: count}
        merged |= {a: (name, stride, size) for a, stride in strides.items()}
        orders[frozenset(group)] = ((*kept[0], name), (*kept[1], name))
    if flat:
        made.pop(orders[frozenset(dims[-1])][0][-1])
    left, right = (_sides(side, k, orders, merged, flat, sizes) for k, side in ((0, here), (1, others)))
    return tuple(made.items()), left, right


def _spread(side: Side) -> Side:
    """Dims (rows, columns) as (rows, 1, columns, 1)."""
    made: list[Dims] = [(d[0], (), d[1], ()) for d in side[0]]
    return made, side[1]


def _words(dims: Dims, other: Dims, block: tuple[int, int]) -> str:
    size = " x ".join(str(n or "all") for n in block)
    change = f"{dims_text(dims)} -> {dims_text(other)}"
    return f"expected whole blocks of {size} to become whole blocks, found {change}"


Blocks = tuple[tuple[tuple[str, ...], tuple[str, ...]], tuple[str, int], dict[str, int]]


def _blocks(
    group: tuple[str, ...],
    match: tuple[str, ...],
    sizes: Mapping[str, int],
    block: int,
    ranged: set[str],
    packed: bool,
) -> Blocks:
    """One dimension, whose axes are `group` here and `match` there, in blocks: the axes before the merged
    ones, either way round, the merged one with its size, and of an axis in it that is shared out how many
    numbers lie between two of its places."""
    same = next((k for k, (a, b) in enumerate(zip(group, match, strict=True)) if a != b), len(group))
    back = zip(group[::-1], match[::-1], strict=True)
    end = next((k for k, (a, b) in enumerate(back) if a != b), len(group))
    inner = prod(sizes[a] for a in group[same:])  # permuted: inside of a block, or block by block
    if same < len(group) and (packed or block % inner or ranged & set(group[same:])):
        tail = group[len(group) - end :]
        count = prod(sizes[a] for a in tail)
        if not end or count % block or ranged & set(tail):
            raise Torn(_torn(group, match, sizes, block))
        kept = group[: len(group) - end], match[: len(match) - end]
        return kept, (f"{tail[0]}_blocks", count // block), {}
    return _in_order(group, sizes, block, ranged, min(same + 1, len(group)))


def _in_order(
    group: tuple[str, ...], sizes: Mapping[str, int], block: int, ranged: set[str], movable: int
) -> Blocks:
    """The first `movable` axes in the order that both sides have, and the rest inside of a block."""
    last = max((k for k, a in enumerate(group) if a in ranged), default=0)
    for first in (last, last + 1) if last or group[0] in ranged else (0,):
        if first >= movable:
            break
        count = prod(sizes[a] for a in group[first:])
        whole = count % block == 0 or all(sizes[a] == 1 for a in group[:first])
        if not whole:
            continue
        stride = count // sizes[group[first]]
        strides = {group[first]: stride} if group[first] in ranged else {}
        kept = group[:first]
        return (kept, kept), (f"{group[first]}_blocks", -(-count // block)), strides
    raise Torn(_torn(group, group, sizes, block))


def _torn(group: Sequence[str], match: Sequence[str], sizes: Mapping[str, int], block: int) -> str:
    shown = " ".join(f"{a}={sizes[a]}" for a in group)
    change = "a cut" if tuple(group) == tuple(match) else f"({shown}) -> ({' '.join(match)})"
    inside = f" of ({shown})" if change == "a cut" else ""
    return f"expected whole blocks of {block} to become whole blocks, found {change}{inside}"


def _sides(
    parts: tuple[Place, ...],
    which: int,
    orders: Mapping[frozenset[str], tuple[tuple[str, ...], tuple[str, ...]]],
    merged: Mapping[str, tuple[str, int, int]],
    flat: bool,
    sizes: Mapping[str, int],
) -> Side:
    all_dims, all_ranges = [], []
    for dims, ranges, _ in parts:
        groups = tuple(orders[frozenset(g)][which] if frozenset(g) in orders else g for g in dims)
        held = []
        for axis, lo, hi in ranges:
            if axis not in merged:
                held.append((axis, lo, hi))
                continue
            name, stride, block = merged[axis]
            if lo * stride % block or (hi * stride % block and hi != sizes[axis]):
                raise Torn(
                    f"expected a cut at whole blocks of {block}, found one at {lo * stride} to {hi * stride}"
                )
            held.append((name, lo * stride // block, -(-hi * stride // block)))
        all_dims.append(groups[:-1] if flat else groups)
        all_ranges.append(tuple(held))
    return all_dims, all_ranges
