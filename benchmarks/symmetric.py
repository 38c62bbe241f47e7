"""Wrong rows of a family's own table, the same on the way in and on the way back: what no round trip shows.

Each is an edit of the plan's steps, made wherever the family plans: a conversion with it is undone by the
same plan, byte for byte, and only another reading of the original can tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from ckpt_tool.api import Options, convert
from ckpt_tool.checkpoint.tensor_names import layer_of, short, words_of
from ckpt_tool.convert.families import family
from ckpt_tool.convert.layout import Part, Step
from ckpt_tool.convert.plan import Plan

PREFIX = "symmetric: "
LAYER = 1
EXCHANGES = 4  # of a layer, that of any two tensors whose names differ in a word
Rename = Callable[[Part], Part]


@dataclass(frozen=True)
class Wrong:
    """`tensors` are those that it touches, in the Hugging Face layout; `edit` alters their parts."""

    name: str
    tensors: tuple[str, ...]
    edit: Rename

    def names(self, cause: str) -> bool:
        """Whether a cause is this one: the layers that change places, or the tensors."""
        if self.name.startswith("layers "):
            return "holds the weights of the original's layer" in cause
        return all(short(t) in cause for t in self.tensors)

    def step(self, step: Step, side: str) -> Step:
        return replace(step, **{side: tuple(map(self.edit, getattr(step, side)))})

    def plan(self, made: Plan) -> Plan:
        side = "targets" if made.direction == "to-hf" else "sources"
        return replace(made, steps=tuple(self.step(s, side) for s in made.steps))


def found(made: Plan) -> list[Wrong]:
    """The mistakes that the rows of layer LAYER, and those outside of the layers, can hold."""
    parts: dict[str, tuple[Part, tuple[int, ...], Mapping[str, int]]] = {}
    for s in made.steps:
        if not s.compare and not s.mean:
            parts |= {p.name: (p, p.shape(s.sizes), s.sizes) for p in s.targets if not p.taken}
    tied = {
        p.name for s in made.steps if s.compare not in ("", "replicated") for p in (*s.targets, *s.sources)
    }
    own = {n: p for n, p in parts.items() if layer_of(n) in (LAYER, None) and n not in tied}
    listed = [*_orders(own), *_exchanges({n: p for n, p in own.items() if layer_of(n) == LAYER})]
    listed += _layers(parts)
    return listed


def _everywhere(name: str, parts: Mapping[str, object]) -> tuple[str, ...]:
    """The namesakes of a tensor in all layers: a row of the table is that of them all."""
    number = layer_of(name)
    if number is None:
        return (name,)
    words = words_of(name)
    at = words.index(str(number))
    return tuple(n for n in parts if (w := words_of(n))[:at] == words[:at] and w[at + 1 :] == words[at + 1 :])


def _orders(own: Mapping[str, tuple[Part, tuple[int, ...], Mapping[str, int]]]) -> Iterator[Wrong]:
    """The axes within a dimension in the other order, and a square matrix the wrong way round."""
    for name, (part, shape, sizes) in own.items():
        box = part.box(sizes)
        for k, group in enumerate(part.dims):
            wide = [a for a in group if box[a][1] - box[a][0] > 1]
            if len(wide) > 1 and not part.ranges:
                dims = (*part.dims[:k], tuple(reversed(group)), *part.dims[k + 1 :])
                words = f"{short(name)} with ({' '.join(reversed(group))}) for ({' '.join(group)})"
                yield Wrong(words, (name,), _dims({name: dims}))
        if len(shape) == 2 and shape[0] == shape[1] and not part.ranges:
            yield Wrong(f"{short(name)} transposed", (name,), _dims({name: part.dims[::-1]}))


def _dims(wanted: Mapping[str, tuple[tuple[str, ...], ...]]) -> Rename:
    return lambda p: replace(p, dims=wanted[p.name]) if p.name in wanted else p


def _exchanges(own: Mapping[str, tuple[Part, tuple[int, ...], Mapping[str, int]]]) -> Iterator[Wrong]:
    """Tensors of one shape in each other's places."""
    by_shape: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, (part, shape, _) in own.items():
        by_shape[(shape, part.dtype)].append(name)
    pairs = [p for names in by_shape.values() for p in combinations(sorted(names), 2) if _alike(*p)]
    for a, b in pairs[:EXCHANGES]:
        yield Wrong(f"{short(a)} and {short(b)} exchanged", (a, b), _places({a: b, b: a}, own))


def _alike(a: str, b: str) -> bool:
    p, q = words_of(a), words_of(b)
    return len(p) == len(q) and sum(x != y for x, y in zip(p, q, strict=True)) == 1


def _layers(parts: Mapping[str, tuple[Part, tuple[int, ...], Mapping[str, int]]]) -> Iterator[Wrong]:
    """Two neighbouring layers in each other's places."""
    moved: dict[str, str] = {}
    for name in parts:
        if layer_of(name) != LAYER:
            continue
        others = [n for n in _everywhere(name, parts) if layer_of(n) == LAYER + 1]
        if len(others) == 1 and parts[name][1] == parts[others[0]][1]:
            moved |= {name: others[0], others[0]: name}
    if moved:
        yield Wrong(f"layers {LAYER} and {LAYER + 1} exchanged", tuple(moved), _places(moved, parts))


def _places(
    moved: Mapping[str, str], parts: Mapping[str, tuple[Part, tuple[int, ...], Mapping[str, int]]]
) -> Rename:
    def edit(p: Part) -> Part:
        if p.name not in moved:
            return p
        there = parts[moved[p.name]][0]
        return replace(p, name=there.name, file=there.file if p.file else p.file)

    return edit


@contextmanager
def believed(name: str, wrong: Wrong) -> Iterator[None]:
    """Inside, the family called `name` plans with the wrong row, either way."""
    chosen = family(name)
    right = {"plan": chosen.plan, "plan_original": chosen.plan_original}
    try:
        for attribute, make in right.items():
            object.__setattr__(chosen, attribute, lambda c, o, make=make: wrong.plan(make(c, o)))
        yield
    finally:
        for attribute, make in right.items():
            object.__setattr__(chosen, attribute, make)


def listed(name: str, source: Path, options: Options) -> list[Wrong]:
    from ckpt_tool.api import open_for

    with open_for(source, "hf") as checkpoint:
        return found(family(name).plan(checkpoint, options))


def written(
    name: str, source: Path, right: Path, out: Path, options: Options, wrong: Wrong, back: bool
) -> Path:
    """The conversion with the wrong row, to the Hugging Face layout or, `back`, from a right one of it to the
    original; returns what it is to be compared with."""
    with believed(name, wrong):
        if back:
            convert(right, out, family=name, to="original", check=False)
            return right
        convert(source, out, family=name, options=options)
        return source
