"""A family's rows filled in: from templates for names to the steps of a model, with all its layers, experts
and model-parallel ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import lru_cache
from itertools import accumulate, chain, groupby

from ckpt_tool.convert.layout import Home, Part, Ranges, Rule, Step, dims_text
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import Problem
from ckpt_tool.records import dataclass

# Of a part all but its name and its dims: its file, its dtype and the share of the axes that it holds.
Held = tuple[str, str, Ranges]


# Of many tensors at once: the file and the dtype of each, and what it is called there.
Column = tuple[Sequence[tuple[str, str]], Sequence[str]]
Columns = Callable[[Sequence[str]], Column | None]  # None: they are to be looked for one by one
MANY = 8  # names of one side of a step, from which on they are looked for together


def template_indices(names: Iterable[str]) -> list[str]:
    return sorted({k for n in names for k in re.findall(r"\{(\w+)\}", n)})


@dataclass
class Expansion:
    """The steps of a table with every index filled in, and what stood in the way."""

    steps: Steps = field(default_factory=Steps)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Filling:
    """A row that is being filled in: its indices, its axes with their sizes, and the templates of its steps
    so far by what they are made of."""

    row: Rule
    indices: list[str]
    axes: tuple[tuple[str, int], ...]
    kinds: dict[object, int] = field(default_factory=dict)


def expand(
    table: Iterable[Rule],
    *,
    axes: Mapping[str, int],
    indices: Mapping[str, int],
    original: Callable[[str], Sequence[Home]],
    converted: Callable[[str], Home | None],
    originals: Columns | None = None,
    converteds: Columns | None = None,
) -> Expansion:
    """Fill in a table, original side to the left. `axes` gives the size of every axis, `indices` how many
    values each template index has (`{"i": 32}`). `original(name)` lists where the tensor is in the order of
    the model-parallel ranks; a file may have another name for it (pipeline stages count their own layers).
    `converted(name)` says the same for the Hugging Face side, which has one file for a tensor. An empty
    answer becomes a `missing-tensor` problem. `originals` and `converteds` say the same of many names, those
    that differ in one index. Neighbouring rows of layers `{i}` are filled in layer by layer, so that a
    layer's tensors stand together as they do in the files."""
    out = Expansion()
    shared = [Filling(row, template_indices((*row.source, *row.target)), _axes(row, axes)) for row in table]
    for layered, rows in groupby(shared, key=lambda f: "i" in f.indices):
        together = list(rows)
        if layered and _expand_layers(together, indices["i"], originals, converteds, out):
            continue
        for outer in [{"i": n} for n in range(indices["i"])] if layered else [{}]:
            for filling in together:
                values, own = [outer], [k for k in filling.indices if k not in ("i", filling.row.cut)]
                for k in own[:-1]:
                    values = [{**v, k: n} for v in values for n in range(indices[k])]
                for v in values:
                    last = own[-1] if own else ""
                    if last and _expand_together(filling, v, last, indices[last], originals, converteds, out):
                        continue
                    for w in [{**v, last: n} for n in range(indices[last])] if last else [v]:
                        _expand_row(filling, w, axes, original, converted, converteds, out)
    out.problems[:] = dict.fromkeys(out.problems)  # two rows may ask for one tensor
    return out


def _expand_layers(
    together: Sequence[Filling],
    count: int,
    originals: Columns | None,
    converteds: Columns | None,
    out: Expansion,
) -> bool:
    """The steps of neighbouring rows of `count` layers, all at once; False, and nothing done, where not every
    one is between one whole tensor and another."""
    homes: list[Sequence[tuple[str, str]]] = []
    names: list[Sequence[str]] = []
    for filling in together:
        found = _columns(filling, {}, "i", count, originals, converteds) if filling.indices == ["i"] else None
        if found is None:
            return False
        homes += [found[0][0], found[1][0]]
        names += [found[0][1], found[1][1]]
    if all(own.count(own[0]) == count for own in homes):
        pairs = zip(together, homes[::2], homes[1::2], strict=True)
        kinds = [_plain_kind(f, place[0], home[0], out) for f, place, home in pairs] * count
    else:
        layers = zip(*homes, strict=True)
        kinds = [
            _plain_kind(f, place, home, out)
            for layer in layers
            for f, place, home in zip(together, layer[::2], layer[1::2], strict=True)
        ]
    out.steps.add_pairs(kinds, list(chain.from_iterable(zip(*names, strict=True))))
    return True


def _expand_together(
    filling: Filling,
    v: dict[str, int],
    index: str,
    count: int,
    originals: Columns | None,
    converteds: Columns | None,
    out: Expansion,
) -> bool:
    """The steps of a row for each value of its last index, all at once; False, and nothing done, where not
    every one is between one whole tensor and another."""
    found = _columns(filling, v, index, count, originals, converteds)
    if found is None:
        return False
    (places, names), (homes, made) = found
    alike = places.count(places[0]) == homes.count(homes[0]) == count
    for place, home, own, new in (
        [(places[0], homes[0], names, made)]
        if alike
        else zip(places, homes, zip(names), zip(made), strict=True)
    ):
        out.steps.add_alike(_plain_kind(filling, place, home, out), own, new)
    return True


def _columns(
    filling: Filling,
    v: Mapping[str, int],
    index: str,
    count: int,
    originals: Columns | None,
    converteds: Columns | None,
) -> tuple[Column, Column] | None:
    """Both sides of a row for each value of one index, where every one is between one whole tensor and
    another."""
    row = filling.row
    plain = row.cut is None and len(row.source) == len(row.target) == 1
    if not plain or not originals or not converteds or not count:
        return None
    digits = [*map(str, range(count))]
    left, right = (side[0].format_map({**v, index: "\0"}).split("\0") for side in (row.source, row.target))
    sources = originals([n.join(left) for n in digits])
    targets = None if sources is None else converteds([n.join(right) for n in digits])
    return None if sources is None or targets is None else (sources, targets)


def _axes(row: Rule, axes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Those of its space with their sizes, once for all layers."""
    return tuple((a, axes[a]) for g in row.left for a in g)


@lru_cache(maxsize=4096)  # the experts of every layer
def _range(axis: str, start: int, stop: int) -> Ranges:
    return ((axis, start, stop),)


def _names(
    row: Rule, side: tuple[str, ...], v: dict[str, int], axes: Mapping[str, int]
) -> list[tuple[str, Ranges]]:
    """Tensor names of one side with the range of the cut axis that each holds."""
    if row.cut is None:
        return [(n.format_map(v), ()) for n in side]
    if any(f"{{{row.cut}}}" in n for n in side):
        ways = [n.format_map({**v, row.cut: "\0"}).split("\0") for n in side]
        each = [(str(e), _range(row.cut, e, e + 1)) for e in range(axes[row.cut])]
        return [(digits.join(way), share) for way in ways for digits, share in each]
    if len(side) > 1:
        sizes = [axes[s] if isinstance(s, str) else s for s in row.cut_sizes]
        edges = [*accumulate(sizes, initial=0)]
        return [
            (n.format(**v), _range(row.cut, a, b))
            for n, a, b in zip(side, edges[:-1], edges[1:], strict=True)
        ]
    return [(n.format_map(v), ()) for n in side]


def _expand_row(
    filling: Filling,
    v: dict[str, int],
    axes: Mapping[str, int],
    original: Callable[[str], Sequence[Home]],
    converted: Callable[[str], Home | None],
    converteds: Columns | None,
    out: Expansion,
) -> None:
    row = filling.row
    if row.cut is None and len(row.source) == len(row.target) == 1:
        name, target = row.source[0].format_map(v), row.target[0].format_map(v)
        places, home = original(name), converted(target)
        if len(places) == 1 and home is not None:
            _add_plain(filling, name, places[0], target, home, out)
            return
    wanted = _names(row, row.target, v, axes)
    targets: list[Held] = []
    made: list[str] = []
    column = converteds([n for n, _ in wanted]) if converteds and len(wanted) >= MANY else None
    if column is not None:
        targets = [(*place, ranges) for place, (_, ranges) in zip(column[0], wanted, strict=True)]
        wanted, made = [], [*column[1]]
    for name, ranges in wanted:
        found = converted(name)
        if found is None:
            out.problems.append(Problem("missing-tensor", "expected this tensor, found none", where=name))
            return
        targets.append((found[0], found[1], ranges))
        made.append(found[2] if len(found) > 2 else name)
    by_rank: list[tuple[list[Held], list[str]]] = []
    for name, ranges in _names(row, row.source, v, axes):
        places = original(name)
        if not places:
            out.problems.append(Problem("missing-tensor", "expected this tensor, found none", where=name))
            continue
        for rank, (file, dtype, *own) in enumerate(places):
            if rank == len(by_rank):
                by_rank.append(([], []))
            share = ranges + _share(row, rank, len(places), axes, name, out)
            by_rank[rank][0].append((file, dtype, share))
            by_rank[rank][1].append(own[0] if own else name)
    for compare, held, names in _written_and_compared(row, by_rank):
        key = (compare, *held, None, *targets)
        if (kind := filling.kinds.get(key)) is None:
            kind = filling.kinds[key] = out.steps.kind(_template(filling, held, targets, compare))
        out.steps.add(kind, names + made)


def _add_plain(filling: Filling, name: str, place: Home, target: str, home: Home, out: Expansion) -> None:
    """The step of a row between one whole tensor and another, as nearly all are."""
    kind = _plain_kind(filling, place, home, out)
    names = (place[2] if len(place) > 2 else name, home[2] if len(home) > 2 else target)
    out.steps.add(kind, names)


def _plain_kind(filling: Filling, place: Home, home: Home, out: Expansion) -> int:
    """The template of such a step."""
    key = (place[0], place[1], home[0], home[1])
    if (kind := filling.kinds.get(key)) is None:
        held: list[Held] = [(place[0], place[1], ())]
        made: list[Held] = [(home[0], home[1], ())]
        kind = filling.kinds[key] = out.steps.kind(_template(filling, held, made, None))
    return kind


def _written_and_compared(
    row: Rule, by_rank: list[tuple[list[Held], list[str]]]
) -> Iterator[tuple[str | None, list[Held], list[str]]]:
    """The sources of the step that writes, with their names, and those of steps that compare, with the
    reason. Ranks whose shares repeat an earlier rank's (copies, or fewer key/value heads than ranks) are
    compared."""
    if len(by_rank) < 2:
        yield from ((None, *rank) for rank in by_rank)
        return
    first: set[Ranges] = set()
    writers: tuple[list[Held], list[str]] = [], []
    copies = []
    for parts, names in by_rank:
        key = parts[0][2]
        if key in first:
            copies.append((row.compare or "replicated", parts, names))
        else:
            first.add(key)
            writers[0].extend(parts)
            writers[1].extend(names)
    yield None, *writers
    yield from copies


def _template(filling: Filling, sources: list[Held], targets: list[Held], compare: str | None) -> Step:
    """That of a step: `compare` says why it only compares, None for the one that does what the row says."""
    row = filling.row
    left, right = (
        tuple(Part(file, "", dtype, dims, ranges) for file, dtype, ranges in side)
        for side, dims in ((sources, row.left), (targets, row.right))
    )
    note = row.note or _describe(row)
    if compare is not None:
        return Step(filling.axes, left, right, note, compare)
    return Step(filling.axes, left, right, note, row.compare, copied=row.copied)


def _share(row: Rule, rank: int, ranks: int, axes: Mapping[str, int], name: str, out: Expansion) -> Ranges:
    if row.split is None or ranks == 1:
        return ()
    n = axes[row.split]
    if n % ranks and ranks % n:
        message = f"expected {n} {row.split} to divide by {ranks} ranks, found a rest"
        out.problems.append(Problem("config-mismatch", message, where=name))
        return ()
    start = rank * n // ranks
    return _range(row.split, start, start + max(1, n // ranks))


@lru_cache(maxsize=256)
def _describe(row: Rule) -> str:
    if row.left == row.right and row.cut is None:
        return "rename"
    change = f"{dims_text(row.left)} -> {dims_text(row.right)}"
    return change if row.cut is None else f"{change}, cut {row.cut}"
