"""The layout algebra: how the elements of some tensors become the elements of others.

A tensor is a *box* in a space of named axes, written out in some order of those axes. A `Step` says which
boxes (source tensors) become which other boxes (target tensors) of the same space; swapping the two sides
inverts it, so the two directions cannot disagree. A family writes `rule`s, rows of a table with templates
for names; `expand` (expanding.py) fills in layers, experts and model-parallel ranks.

    rule("layers.{i}.attention.wq.weight", "model.layers.{i}.self_attn.q_proj.weight",
         "(n half two) d -> (n two half) d", split="n")

reads: the rows of the source are heads of pairs, those of the target heads of two halves, and
model-parallel ranks share out the heads.

`Step.blocks` cuts a step into pieces of bounded size. Each piece reads runs of elements, reorders them in
memory and writes runs of elements; offsets and lengths count elements, so the caller's item size applies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    import numpy as np

Dims = tuple[tuple[str, ...], ...]
Box = dict[str, tuple[int, int]]
# Where a tensor of a table is: its file and dtype, and its name there where that is another than the table's.
Home = tuple[str, str] | tuple[str, str, str]
Ranges = tuple[tuple[str, int, int], ...]
Place = tuple[Dims, Ranges, Ranges]

# A run shorter than this is gathered through memory, a longer one is copied file to file.
COPY_RUN = 32 * 1024  # bytes
SMALL_STEP = 4 << 20  # bytes of a step of few blocks: they are made once for all layers
COPIED = "copied"  # why the way back of a copy compares


def parse_dims(text: str) -> Dims:
    """`"(n half two) d"` to `(("n", "half", "two"), ("d",))`: one group of axes for each dimension."""
    if not re.fullmatch(r"\s*((\(\s*[a-z]\w*(\s+[a-z]\w*)*\s*\)|[a-z]\w*)\s*)*", text):
        raise ValueError(f"not a layout: {text!r}")
    groups = tuple(tuple(g.strip("()").split()) for g in re.findall(r"\([^)]*\)|\w+", text))
    axes = [a for g in groups for a in g]
    if len(set(axes)) != len(axes):
        raise ValueError(f"an axis stands twice in {text!r}")
    return groups


@lru_cache(maxsize=1024)  # the layers of a model differ in names only
def _order(dims: Dims) -> tuple[str, ...]:
    return tuple(a for g in dims for a in g)


@lru_cache(maxsize=1024)
def dims_text(dims: Dims) -> str:
    return " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in dims)


@lru_cache(maxsize=4096)  # the experts of every layer
def _lengths(ranges: Ranges) -> Ranges:
    return tuple([(a, 0, hi - lo) for a, lo, hi in ranges])


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor's place in a step: its axis order grouped into dimensions, and the ranges of those axes
    of which it holds only a share (a rank's heads, one expert). A step uses all of it, or what lies in the
    ranges `taken` (one row, which it repeats elsewhere)."""

    file: str
    name: str
    dtype: str
    dims: Dims
    ranges: Ranges = ()
    taken: Ranges = ()

    @property
    def order(self) -> tuple[str, ...]:
        return _order(self.dims)

    @property
    def place(self) -> Place:
        """What is not its name: parts of different layers differ in nothing else."""
        return self.dims, self.ranges, self.taken

    def whole(self, axes: Mapping[str, int]) -> Box:
        """Where the tensor lies in the space; a copy of one row may reach beyond it."""
        box = {a: (0, axes[a]) for a in self.order}
        box.update({a: (lo, hi) for a, lo, hi in self.ranges})
        return box

    def box(self, axes: Mapping[str, int]) -> Box:
        """The part of it that the step uses."""
        return {**self.whole(axes), **{a: (lo, hi) for a, lo, hi in self.taken}}

    def shape(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        own = {**axes, **{a: hi - lo for a, lo, hi in self.ranges}}
        return tuple([prod([own[a] for a in g]) for g in self.dims])

    @property
    def sized(self) -> tuple[Dims, Ranges]:
        """What its shape depends on, beside the sizes of axes: the experts of a layer differ in no more."""
        return self.dims, _lengths(self.ranges)

    def stride(self, axis: str, axes: Mapping[str, int]) -> int:
        """Elements from one to the next along `axis`, 0 where it does not have that."""
        if axis not in self.order:
            return 0
        own = self.whole(axes)
        return prod(own[a][1] - own[a][0] for a in self.order[self.order.index(axis) + 1 :])

    def at_home(self, file: str) -> Part:
        """The same in another file."""
        return Part(file, self.name, self.dtype, self.dims, self.ranges, self.taken)

    def called(self, name: str) -> Part:
        """The same under another name."""
        return Part(self.file, name, self.dtype, self.dims, self.ranges, self.taken)


@dataclass(frozen=True)
class Runs:
    """Equal runs of neighbouring elements in one tensor: `length` elements at each of `offsets()`."""

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    length: int

    @property
    def count(self) -> int:
        return prod(self.shape)

    def offsets(self) -> list[int]:
        """Element offset of every run, in the order in which the runs stand in a dense buffer."""
        at = [self.base]
        for n, stride in zip(self.shape, self.strides, strict=True):
            steps = [k * stride for k in range(n)]
            at = [o + step for o in at for step in steps]
        return at


@dataclass(frozen=True)
class Access:
    """The share of one tensor (index `part` in its side of the step) that a block touches. `shape`
    is the share as an array in the tensor's own axis order."""

    part: int
    runs: Runs
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def further(self, by: int) -> Access:
        """The same `by` elements of the tensor further on."""
        r = self.runs
        return Access(self.part, Runs(r.base + by, r.shape, r.strides, r.length), self.shape)


Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Block:
    """One bounded piece of a step. `moves` lists (read, write, read slices, write slices, axis
    permutation from the read's order to the write's). Where each element written is the mean of several,
    `mean` counts them, and `shuffle` fills an array of `mean` x elements for each write."""

    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    moves: tuple[tuple[int, int, Slices, Slices, tuple[int, ...]], ...]
    mean: int = 0

    @cached_property
    def filled(self) -> list[int]:
        """How many elements `shuffle` puts into each of its outputs."""
        return [a.numel * (self.mean or 1) for a in self.writes]

    @cached_property
    def is_copy(self) -> bool:
        """One run becomes one run with its elements in the same order: bytes can be copied as they are."""
        if len(self.reads) != 1 or len(self.writes) != 1 or self.mean:
            return False
        read, write = self.reads[0], self.writes[0]
        kept = [p for p in self.moves[0][4] if read.shape[p] > 1]
        return read.runs.count == 1 and write.runs.count == 1 and kept == sorted(kept)

    @cached_property
    def is_exchange(self) -> bool:
        """All of one run becomes all of one other with its elements in another order."""
        if len(self.reads) != 1 or len(self.writes) != 1 or len(self.moves) != 1 or self.mean:
            return False
        (_, _, *cuts, _), ends = self.moves[0], (self.reads[0], self.writes[0])
        return all(
            end.runs.count == 1 and [(c.start, c.stop) for c in cut] == [(0, n) for n in end.shape]
            for cut, end in zip(cuts, ends, strict=True)
        )

    def shuffle(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Fill the flat `outputs` (one array per write) from the flat `inputs` (one per read)."""
        from ckpt_tool.convert.strips import assign

        several = (self.mean,) if self.mean else ()
        sources = [x.reshape(a.shape) for x, a in zip(inputs, self.reads, strict=True)]
        targets = [y.reshape(several + a.shape) for y, a in zip(outputs, self.writes, strict=True)]
        for i, j, source_slices, target_slices, permutation in self.moves:
            assign(targets[j][target_slices], sources[i][source_slices].transpose(permutation))

    def shuffle_each(self, inputs: np.ndarray, outputs: np.ndarray) -> None:
        """The same of several at once, rows of both matrices, for a block with one read and one write."""
        from ckpt_tool.convert.strips import assign

        sources = inputs.reshape(-1, *self.reads[0].shape)
        targets = outputs.reshape(-1, *self.writes[0].shape)
        for _, _, source_slices, target_slices, permutation in self.moves:
            order = (0, *(p + 1 for p in permutation))
            assign(targets[:, *target_slices], sources[:, *source_slices].transpose(order))


@dataclass(frozen=True, slots=True)
class Step:
    """Source tensors become target tensors. With `compare` set (a reason: "tied", "replicated") nothing is
    written: the target, produced by another step, must already hold these elements. With `mean` the targets
    lack that axis and hold the mean over it (pooling.py), which has no way back. `copied` says that the
    targets repeat what others hold: the way back compares. `hint` says what to do where the comparison fails;
    it is no part of what is done."""

    axes: tuple[tuple[str, int], ...]
    sources: tuple[Part, ...]
    targets: tuple[Part, ...]
    note: str = ""
    compare: str = ""
    mean: str = ""
    copied: bool = False
    hint: str = ""

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.axes)

    def source_shapes(self) -> list[tuple[int, ...]]:
        """That of each source; experts, which are sized alike, are measured once."""
        sizes, known = self.sizes, dict[tuple[Dims, Ranges], tuple[int, ...]]()
        shapes = []
        for part in self.sources:
            if (shape := known.get(part.sized)) is None:
                shape = known[part.sized] = part.shape(sizes)
            shapes.append(shape)
        return shapes

    def between(self, sources: tuple[Part, ...], targets: tuple[Part, ...]) -> Step:
        """The same with others; quicker than `replace`, which counts where there are thousands."""
        return Step(self.axes, sources, targets, self.note, self.compare, self.mean, self.copied, self.hint)

    def with_targets(self, targets: tuple[Part, ...]) -> Step:
        """The same with others."""
        return self.between(self.sources, targets)

    def inverse(self) -> Step:
        """The way back: targets become sources. A comparison's inverse writes (each copy gets its bytes), and
        that of a copy compares."""
        if self.mean:
            raise ValueError(f"{self.targets[0].name}: a mean cannot be taken back")
        compare = COPIED if self.copied and not self.compare else ""
        return replace(self, sources=self.targets, targets=self.sources, compare=compare)

    @property
    def reached(self) -> tuple[Part, ...]:
        """The targets in the whole space: with the axis that a mean runs over in front."""
        if not self.mean:
            return self.targets
        return tuple(replace(p, dims=((self.mean,), *p.dims)) for p in self.targets)

    def domain(self) -> Box:
        """The part of the space this step is about: what both sides reach."""
        hulls = []
        for side in (self.sources, self.reached):
            boxes = [p.box(self.sizes) for p in side]
            hulls.append({a: (min(b[a][0] for b in boxes), max(b[a][1] for b in boxes)) for a in boxes[0]})
        return {a: (max(h[a][0] for h in hulls), min(h[a][1] for h in hulls)) for a in hulls[0]}

    def defects(self) -> list[str]:
        """Why this step would lose or repeat elements; empty when each side tiles the domain exactly."""
        return list(_defects(self.axes, *self._places(self.reached)))

    def _places(self, targets: tuple[Part, ...]) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
        """Those of both sides."""
        return tuple(p.place for p in self.sources), tuple(p.place for p in targets)

    def blocks(self, block_bytes: int = 256 * 1024, tile_bytes: int = 8 << 20) -> Iterator[Block]:
        """Cut the step into blocks. A block that stays in one run on each side holds at most about
        `block_bytes` (plain copies are not cut); one that must exchange inner axes (a transpose) at most
        `tile_bytes`, since its runs get longer with its size."""
        itemsize = DTYPES[self.sources[0].dtype].itemsize
        sizes = block_bytes // itemsize, tile_bytes // itemsize, COPY_RUN // itemsize
        size = prod(n for _, n in self.axes) * itemsize
        if size <= SMALL_STEP:
            yield from _few_blocks(self.axes, *self._places(self.targets), self.mean, *sizes)
        else:
            yield from self._all_blocks(*sizes)

    def _all_blocks(self, block: int, tile: int, copy_run: int) -> Iterator[Block]:
        """See `blocks`; sizes in elements."""
        domain = self.domain()
        if all(hi > lo for lo, hi in domain.values()):
            yield from self._walk(domain, block, tile, copy_run)

    def _walk(self, box: Box, block: int, tile: int, copy_run: int) -> Iterator[Block]:
        copies = None if self.mean else self._copies(box, copy_run)
        if copies is not None:
            yield from copies
            return
        size = prod(hi - lo for lo, hi in box.values())
        axis, aligned = self._cut_axis(box, tile)
        limit = block if aligned else tile
        if size <= limit or axis is None:
            yield self._block(box)
            return
        lo, hi = box[axis]
        step = max(1, limit // (size // (hi - lo)))
        edges = sorted(
            {lo, hi, *(e for p in (*self.sources, *self.reached) for e in p.box(self.sizes)[axis])}
        )
        for left, right in zip(edges, edges[1:], strict=False):
            if left < lo or right > hi:
                continue
            first: list[Block] = []  # of the first piece: those of others as long lie further on
            for start in range(left, right, step):
                if first and start + step <= right:
                    yield from self._further(first, axis, start - left)
                    continue
                piece = {**box, axis: (start, min(right, start + step))}
                made = self._walk(piece, block, tile, copy_run)
                if start == left and left + 2 * step <= right and step * size // (hi - lo) <= limit:
                    made = iter(first := [*made])
                yield from made

    def _further(self, blocks: Iterable[Block], axis: str, by: int) -> Iterator[Block]:
        """The same blocks `by` elements further along `axis`, where no tensor begins or ends on the way: in a
        fifth of the time that it takes to make them."""
        reads = [by * p.stride(axis, self.sizes) for p in self.sources]
        writes = [by * p.stride(axis, self.sizes) for p in self.targets]
        for b in blocks:
            yield Block(
                tuple([a.further(reads[a.part]) for a in b.reads]),
                tuple([a.further(writes[a.part]) for a in b.writes]),
                b.moves,
                b.mean,
            )

    def _copies(self, box: Box, copy_run: int) -> list[Block] | None:
        """The box as plain copies, one for each run; None where runs would be short or out of order."""
        found: list[Block] = []
        for i, source in enumerate(self.sources):
            for j, target in enumerate(self.targets):
                shared = _meet(_meet(source.box(self.sizes), target.box(self.sizes)), box)
                if any(hi <= lo for lo, hi in shared.values()):
                    continue
                wide = [a for a in source.order if shared[a][1] - shared[a][0] > 1]
                if wide != [a for a in target.order if a in wide]:
                    return None
                read, write = self._runs(source, shared), self._runs(target, shared)
                count, length = max(read.count, write.count), min(read.length, write.length)
                if count > 1 and length < copy_run:
                    return None
                # the shorter run divides the longer: both end at the same axis boundary or inside it
                starts = zip(_split(read, length), _split(write, length), strict=True)
                identity = tuple(range(1))
                whole = (slice(None),)
                found += [
                    Block(
                        (Access(i, Runs(r, (), (), length), (length,)),),
                        (Access(j, Runs(w, (), (), length), (length,)),),
                        ((0, 0, whole, whole, identity),),
                    )
                    for r, w in starts
                ]
        return found

    def _cut_axis(self, box: Box, tile: int) -> tuple[str | None, bool]:
        """The axis to cut `box` along, and whether every tensor keeps one run in each piece; where none does,
        that whose pieces of `tile` elements have the longest runs. What goes into one mean stays together."""
        orders = []
        for part in (*self.sources, *self.reached):
            shared = _meet(part.box(self.sizes), box)
            if all(hi > lo for lo, hi in shared.values()):
                orders.append([a for a in part.order if shared[a][1] - shared[a][0] > 1 and a != self.mean])
        wide = [a for a in box if box[a][1] - box[a][0] > 1 and a != self.mean]
        for axis in wide:
            if all(not o or o[0] == axis or axis not in o for o in orders) and any(axis in o for o in orders):
                return axis, True
        first = next((o for o in orders if o), wide)
        extents = {a: hi - lo for a, (lo, hi) in box.items()}
        return max(first, key=lambda a: _run_length(extents, orders, a, tile), default=None), False

    def _block(self, box: Box) -> Block:
        sides = []
        for parts in (self.sources, self.reached):
            accesses, boxes = [], []
            for k, part in enumerate(parts):
                shared = _meet(part.box(self.sizes), box)
                if any(hi <= lo for lo, hi in shared.values()):
                    continue
                shape = tuple(shared[a][1] - shared[a][0] for a in part.order)
                accesses.append(Access(k, self._runs(part, shared), shape))
                boxes.append((part.order, shared))
            sides.append((accesses, boxes))
        (reads, read_boxes), (writes, write_boxes) = sides
        moves = []
        for i, (read_order, read_box) in enumerate(read_boxes):
            for j, (write_order, write_box) in enumerate(write_boxes):
                both = _meet(read_box, write_box)
                if all(hi > lo for lo, hi in both.values()):
                    cut = [
                        tuple(slice(both[a][0] - b[a][0], both[a][1] - b[a][0]) for a in order)
                        for order, b in ((read_order, read_box), (write_order, write_box))
                    ]
                    moves.append((i, j, cut[0], cut[1], tuple(read_order.index(a) for a in write_order)))
        if self.mean:  # the elements are written without that axis
            pairs = zip(writes, (b for _, b in write_boxes), strict=True)
            writes = [Access(a.part, self._runs(self.targets[a.part], b), a.shape[1:]) for a, b in pairs]
        return Block(tuple(reads), tuple(writes), tuple(moves), self.sizes.get(self.mean, 0))

    def _runs(self, part: Part, box: Box) -> Runs:
        """Where the elements of `box` stand in `part`, which contains it."""
        own = part.whole(self.sizes)
        strides, stride = {}, 1
        for a in reversed(part.order):
            strides[a] = stride
            stride *= own[a][1] - own[a][0]
        base = sum((box[a][0] - own[a][0]) * strides[a] for a in part.order)
        length, outer = 1, list(part.order)
        while outer:
            a = outer.pop()
            extent = box[a][1] - box[a][0]
            length *= extent
            if extent != own[a][1] - own[a][0]:
                break
        outer = [a for a in outer if box[a][1] - box[a][0] > 1]
        return Runs(
            base, tuple(box[a][1] - box[a][0] for a in outer), tuple(strides[a] for a in outer), length
        )


@lru_cache(maxsize=1024)  # the layers of a model differ in names only
def _defects(
    axes: tuple[tuple[str, int], ...], sources: tuple[Place, ...], targets: tuple[Place, ...]
) -> tuple[str, ...]:
    """See `Step.defects`; a place is a part's dims, ranges and what is taken of it."""
    step = _nameless(axes, sources, targets)
    found = []
    names = {frozenset(p.order) for p in (*step.sources, *step.targets)}
    if len(names) != 1 or not names <= {frozenset(step.sizes)}:
        return ("the two sides do not name the same axes",)
    domain = step.domain()
    size = prod(hi - lo for lo, hi in domain.values())
    for label, side in (("source", step.sources), ("target", step.targets)):
        boxes = [_meet(p.box(step.sizes), domain) for p in side]
        covered = sum(prod(max(0, hi - lo) for lo, hi in b.values()) for b in boxes)
        overlap = _overlap([b for b in boxes if all(hi > lo for lo, hi in b.values())])
        if overlap or covered != size:
            found.append(f"the {label} tensors hold {covered} elements of {size}" + " twice" * overlap)
    return tuple(found)


def _overlap(boxes: Sequence[Box]) -> bool:
    """Whether two of the boxes, none of them empty, have an element in common. Almost always they follow one
    another along an axis, which is seen without comparing each with each (experts come by the hundred)."""
    for axis in boxes[0] if boxes else ():
        spans = sorted(b[axis] for b in boxes)
        if all(before[1] <= after[0] for before, after in pairwise(spans)):
            return False
    return any(
        all(hi > lo for lo, hi in _meet(a, b).values()) for k, a in enumerate(boxes) for b in boxes[:k]
    )


@lru_cache(maxsize=128)
def _few_blocks(
    axes: tuple[tuple[str, int], ...],
    sources: tuple[Place, ...],
    targets: tuple[Place, ...],
    mean: str,
    *sizes: int,
) -> tuple[Block, ...]:
    """The blocks of a small step, the same for all layers."""
    return tuple(_nameless(axes, sources, targets, mean)._all_blocks(*sizes))


def _nameless(
    axes: tuple[tuple[str, int], ...], sources: tuple[Place, ...], targets: tuple[Place, ...], mean: str = ""
) -> Step:
    reads, writes = (tuple(Part("", "", "", *place) for place in side) for side in (sources, targets))
    return Step(axes, reads, writes, mean=mean)


def _run_length(extents: Mapping[str, int], orders: Iterable[Sequence[str]], axis: str, tile: int) -> int:
    """The elements of the shortest runs that tensors with axes in these `orders` have in pieces of `tile`
    elements, of a box of these `extents` that is cut along `axis`."""
    step = max(1, tile * extents[axis] // prod(extents.values()))
    inner = (prod(extents[a] for a in o[o.index(axis) + 1 :]) for o in orders if axis in o)
    return step * min(inner, default=1)


def _meet(a: Box, b: Box) -> Box:
    return {k: (max(a[k][0], b[k][0]), min(a[k][1], b[k][1])) for k in a}


def _split(runs: Runs, length: int) -> list[int]:
    """Offsets of the runs after cutting each into pieces of `length`, which divides them."""
    return [o + k for o in runs.offsets() for k in range(0, runs.length, length)]


def without_padding(step: Step, axis: str, kept: int) -> Step:
    """`step` with targets that hold only the first `kept` of `axis`: what the sources hold beyond is padding
    and not read."""
    if step.sizes.get(axis, kept) == kept:
        return step
    return replace(step, targets=tuple(replace(p, ranges=(*p.ranges, (axis, 0, kept))) for p in step.targets))


def with_padding(step: Step, axis: str, held: int) -> Step:
    """`step` with sources that hold only the first `held` of `axis`: the targets' padding repeats them from
    the first on."""
    size = step.sizes.get(axis, held)
    again = [
        replace(p, ranges=(*p.ranges, (axis, start, start + held)))
        for start in range(0, size, held)
        for p in step.sources
    ]
    return step if size == held else replace(step, sources=tuple(again))


def with_mean(step: Step, axis: str, groups: int) -> Step:
    """`step` with targets that hold `groups` of `axis`, each the mean of as many neighbours in the sources.
    The size of `axis` divides by `groups`, and a source holds whole groups or a share of one."""
    each = step.sizes[axis] // groups

    def range_in_groups(name: str, start: int, stop: int) -> tuple[tuple[str, int, int], ...]:
        if name != axis:
            return ((name, start, stop),)
        group = start // each
        if start % each == 0 and stop % each == 0:
            return ((axis, group, stop // each),)
        if stop > (group + 1) * each:
            raise ValueError(f"{axis} {start} to {stop} are neither groups of {each} nor a part of one")
        return ((axis, group, group + 1), ("mean", start - group * each, stop - group * each))

    sources = tuple(
        replace(
            p,
            dims=tuple(tuple(x for a in g for x in ((a, "mean") if a == axis else (a,))) for g in p.dims),
            ranges=tuple(x for r in p.ranges for x in range_in_groups(*r)),
        )
        for p in step.sources
    )
    axes = (*((a, groups if a == axis else n) for a, n in step.axes), ("mean", each))
    note = f"mean over {each} of {axis}"
    return replace(step, axes=axes, sources=sources, note=note, mean="mean")


def apply(step: Step, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The targets of `step` from whole source arrays in memory: for tests and small tensors. Elements are
    only moved and the result has the sources' numpy type, but for a mean, which is made of raw bits of the
    sources' dtype and comes in those of the targets'."""
    import numpy as np

    from ckpt_tool.convert.pooling import mean

    flat = [np.ascontiguousarray(x).reshape(-1) for x in arrays]
    kind = np.dtype(DTYPES[step.targets[0].dtype].bits) if step.mean else flat[0].dtype
    out = [np.empty(prod(p.shape(step.sizes)), dtype=kind) for p in step.targets]
    for block in step.blocks():
        inputs = [_gather(flat[a.part], a) for a in block.reads]
        outputs = [np.empty(n, dtype=flat[0].dtype) for n in block.filled]
        block.shuffle(inputs, outputs)
        if block.mean:
            dtypes = step.sources[0].dtype, step.targets[0].dtype
            outputs = [mean(x, block.mean, *dtypes) for x in outputs]
        for access, values in zip(block.writes, outputs, strict=True):
            for k, o in enumerate(access.runs.offsets()):
                n = access.runs.length
                out[access.part][o : o + n] = values[k * n : (k + 1) * n]
    return [x.reshape(p.shape(step.sizes)) for x, p in zip(out, step.targets, strict=True)]


def _gather(flat: np.ndarray, access: Access) -> np.ndarray:
    import numpy as np

    n = access.runs.length
    return np.concatenate([flat[o : o + n] for o in access.runs.offsets()])


# --- the table ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One row of a family's table. `source` and `target` are name templates; see `rule`."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    left: Dims
    right: Dims
    cut: str | None
    cut_sizes: tuple[int | str, ...]
    split: str | None
    compare: str
    note: str
    copied: bool = False


def rule(
    source: str | tuple[str, ...],
    target: str | tuple[str, ...],
    pattern: str,
    *,
    cut: str | tuple[str, tuple[int | str, ...]] | None = None,
    split: str | None = None,
    tied: bool = False,
    copied: bool = False,
    note: str = "",
) -> Rule:
    """A row of a family's table, read left to right to convert and right to left to invert.

    `pattern` is `"LAYOUT -> LAYOUT"`, or one layout where nothing is reordered. Several names on one side
    are shares of the axis `cut=("s", (r, 1, 1))` (sizes, or names of axes sizes); a name that carries an
    index the other side lacks (`{e}`) is one share of size 1 for each value: `cut="e"`. `split` names the
    axis that model-parallel ranks of the source share out; without it they hold copies (compared). `tied`
    rows do not write: their target comes from another row and must be equal. A `copied` row writes once more
    what another row writes too; the way back compares.
    """
    left, _, right = pattern.partition("->")
    axis, sizes = (cut, ()) if isinstance(cut, str) or cut is None else cut
    made = Rule(
        (source,) if isinstance(source, str) else source,
        (target,) if isinstance(target, str) else target,
        parse_dims(left),
        parse_dims(right or left),
        axis,
        sizes,
        split,
        "tied" if tied else "",
        note,
        copied,
    )
    if {a for g in made.left for a in g} != {a for g in made.right for a in g}:
        raise ValueError(f"{pattern!r}: the two sides name different axes")
    return made
