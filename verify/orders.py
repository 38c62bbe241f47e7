"""What the family's own table tells of the ways in which a converter can go wrong: orders of axes that it can
forget, take for others, or cut into other numbers. No family is named here, and nothing is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import permutations

import numpy as np

from ckpt_tool.checkpoint.tensor_names import layer_of
from ckpt_tool.convert.layout import Step
from ckpt_tool.convert.plan import Plan
from ckpt_tool.records import dataclass

WRITTEN_AXES = 4  # of a converted tensor whose other orders are tried


@dataclass(frozen=True)
class Reorder:
    """A row of the plan that changes the order of a converted tensor's elements: the axes as the original has
    them (`left`) and as the converted tensor has them (`right`), with their sizes."""

    name: str
    left: tuple[str, ...]
    right: tuple[str, ...]
    sizes: dict[str, int]
    group: tuple[str, ...]  # the axes of `left` that share its reordered dimension

    @property
    def rotary(self) -> bool:
        return {"half", "two"} <= set(self.group)


def reorders(plan: Plan | None, layer: int | None) -> list[Reorder]:
    """Those of one layer, from the steps between the original and the Hugging Face layout."""
    found = []
    for step in plan.steps if plan else ():
        to_hf = step if plan is not None and plan.direction == "to-hf" else step.inverse()
        if not step.compare:
            found += list(_reorders(to_hf, layer))
    return found


def _reorders(step: Step, layer: int | None) -> Iterator[Reorder]:
    for target in step.targets:
        left = tuple(tuple(a for a in g if a != step.mean) for g in step.sources[0].dims)
        box = target.box(step.sizes)
        sizes = {a: hi - lo for a, (lo, hi) in box.items()}
        long = {a for a, size in sizes.items() if size > 1}  # the others have no order
        if layer_of(target.name) != layer or [a for g in left for a in g if a in long] == [
            a for a in target.order if a in long
        ]:
            continue
        group = max(left, key=len)
        yield Reorder(target.name, tuple(a for g in left for a in g), target.order, sizes, group)


@dataclass(frozen=True)
class Belief:
    """What a wrong converter took the original's axes for, and the words for it."""

    words: str
    order: tuple[str, ...]
    sizes: dict[str, int]


def beliefs(r: Reorder, others: Iterable[Reorder]) -> list[Belief]:
    """The wrong ideas about one reordered tensor: first the likeliest."""
    forgot = "rows not permuted for rotary" if r.rotary else "left in the original's order"
    made = [Belief(forgot, r.right, r.sizes)]
    if set(r.group) == THIRDS:
        return made  # the rest is `Fused`
    head = r.group[0]
    counts = {o.sizes[o.group[0]] for o in others if o.group} - {r.sizes[head]}
    if len(r.group) > 1:
        inner = r.group[1]
        rows = r.sizes[head] * r.sizes[inner]
        for count in sorted(
            {*counts, 1, *(r.sizes[head] * k for k in (2, 4)), *(r.sizes[head] // k for k in (2, 4))}
            - {r.sizes[head]}
        ):
            if count and rows % count == 0 and rows // count > 1:
                sizes = {**r.sizes, head: count, inner: rows // count}
                words = f"permuted with {count} heads where there are {r.sizes[head]}"
                made.append(Belief(words, r.left, sizes))
    start = r.left.index(head) if len(r.group) > 1 else 0
    for order in permutations(r.group):
        believed = r.left[:start] + order + r.left[start + len(order) :]
        if believed not in (r.left, r.right):
            made.append(Belief(f"original read as ({' '.join(order)})", believed, r.sizes))
    return made


def layouts(r: Reorder) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Other orders of the same axes in the converted tensor, each with its words: what a wrong row of the
    table itself can have in place of the right one."""
    places = [k for k, a in enumerate(r.right) if a in r.group]
    now = tuple(r.right[k] for k in places)
    for order in permutations(now) if len(now) <= WRITTEN_AXES else ():
        if order != now:
            there = dict(zip(places, order, strict=True))
            words = f"written as ({' '.join(now)}) where it should be ({' '.join(order)})"
            yield words, tuple(there.get(k, a) for k, a in enumerate(r.right))


# --- query, key and value in one ------------------------------------------------------------------------

THIRDS = {"t", "n", "h"}  # the axes: query, key and value; heads; channels of a head
VERSIONS = {("t", "n", "h"): "0", ("n", "h", "t"): "1.0", ("n", "t", "h"): "2.0"}  # Megatron's


@dataclass(frozen=True)
class Fused:
    """A row of the plan by which the original's rows of query, key and value, which are one tensor there in
    the axis order `order`, become `names`: side by side along `dim` these hold (t n h). Each of `ranks`
    tensors of the original has its share of the heads."""

    names: tuple[str, ...]
    dim: int
    order: tuple[str, ...]
    sizes: dict[str, int]
    ranks: int

    def taken_for(self, order: tuple[str, ...], heads: int, ranks: int) -> np.ndarray:
        """Which of the right rows stands where when the original is taken to be of another order or to have
        another number of heads, on each of `ranks` shares: indices into (t n h)."""
        n, h = self.sizes["n"], self.sizes["h"]
        right = np.arange(3 * n * h).reshape(3, ranks, n // ranks, h)
        believed = {"t": 3, "n": heads // ranks, "h": n * h // heads}
        shares = []
        for rank in range(ranks):
            stored = right[:, rank].transpose([("t", "n", "h").index(a) for a in self.order]).reshape(-1)
            split = stored.reshape([believed[a] for a in order])
            shares.append(split.transpose([order.index(a) for a in ("t", "n", "h")]))
        return np.concatenate(shares, axis=1).reshape(-1)

    @cached_property
    def mistakes(self) -> list[tuple[str, np.ndarray]]:
        """Ways to misread the original that lead to other rows, each with its words."""
        n = self.sizes["n"]
        found: list[tuple[str, np.ndarray]] = []
        orders = [o for o in VERSIONS if o != self.order] + [
            o for o in permutations(("t", "n", "h")) if o not in VERSIONS and o != self.order
        ]
        for ranks in sorted({1, self.ranks}, reverse=True):
            as_one = ", all ranks as one" if ranks != self.ranks else ""
            for order in orders:
                words = f"query, key and value read in the order ({' '.join(order)})"
                if order in VERSIONS:
                    words += f" of checkpoint_version {VERSIONS[order]}"
                words += f" where it is ({' '.join(self.order)}){as_one}"
                found.append((words, self.taken_for(order, n, ranks)))
        for heads in (2 * n, n // 2, 1):
            if heads > 0 and heads % self.ranks == 0 and (n * self.sizes["h"]) % heads == 0:
                words = f"query, key and value of {n} heads read as of {heads}"
                found.append((words, self.taken_for(self.order, heads, self.ranks)))
        right, seen = np.arange(3 * n * self.sizes["h"]), list[np.ndarray]()
        kept = []
        for words, rows in found:
            if not any(np.array_equal(rows, other) for other in [right, *seen]):
                seen.append(rows)
                kept.append((words, rows))
        return kept


def fused(plan: Plan | None, layer: int | None) -> list[Fused]:
    """Those of one layer: of the weight, and of the bias."""
    made = []
    for step in plan.steps if plan else ():
        to_hf = step if plan is not None and plan.direction == "to-hf" else step.inverse()
        if to_hf.compare or to_hf.mean or {layer_of(t.name) for t in to_hf.targets} != {layer}:
            continue
        group = next((g for g in to_hf.sources[0].dims if set(g) == THIRDS), None)
        targets = sorted(to_hf.targets, key=lambda t: t.box(to_hf.sizes).get("t", (0, 0)))
        dim = next((k for k, g in enumerate(targets[0].dims) if {"n", "h"} <= set(g)), None)
        if group is None or dim is None or to_hf.sizes["t"] != 3:
            continue
        ranks = len({p.box(to_hf.sizes)["n"] for p in to_hf.sources})
        names = tuple(t.name for t in targets)
        made.append(Fused(names, dim, tuple(group), {a: to_hf.sizes[a] for a in "nh"}, ranks))
    return made
