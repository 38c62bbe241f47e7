"""Which mistake explains tensors that hold other bits than the source gives: told from the bits alone.

Each tensor is held against the one that the plan makes, against the others of its layer and against its
namesakes in other layers. A mistake is stated as a cause only where it gives every element that was found;
what no known mistake gives is located instead. No family is named here: heads, experts and ranks are axes of
the plan's rows."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from itertools import permutations
from math import prod
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, TensorInfo
from ckpt_tool.checkpoint.tensor_names import layer_of, short, words_of
from ckpt_tool.convert.casting import common, converted
from ckpt_tool.convert.copies import joined
from ckpt_tool.convert.layout import COPIED, Part, Step, apply
from ckpt_tool.records import dataclass
from ckpt_tool.verify.altered import alteration, place
from ckpt_tool.verify.explain_packed import of_codes
from ckpt_tool.verify.orders import Belief, Fused, Reorder, beliefs, fused, reorders
from ckpt_tool.verify.rowmaps import Rows, hashes, span
from ckpt_tool.verify.subject import Subject

LIMIT = 1 << 30  # bytes of a tensor that is explained, a quarter of the room; a larger one is only located
ROOM = 4 * LIMIT  # bytes of memory, unless the user says otherwise
HEADS = ("num_attention_heads", "n_head")
READ = (".q_proj", ".k_proj", ".v_proj", ".query", "_query", ".key", ".value")  # heads along their rows
MIXED = (".o_proj", ".out_proj", ".attention.output.dense")  # and along their columns
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
ROLES = 9  # above the places of query, key and value in a layer's order
AXES = 4  # of a tensor whose axes are tried in other orders
KEPT = 256 << 20  # bytes of made tensors kept for the next question
Changed = Mapping[str, tuple[np.ndarray, np.ndarray]]  # by name: expected and found


@dataclass(frozen=True)
class Cause:
    words: str
    tensors: tuple[str, ...]


@dataclass
class Explanation:
    """`causes` together account for all that differs where `open` is empty; `open` says of each tensor that
    no known mistake explains where it differs. `differing` counts the elements by tensor, of `compared`;
    `left` were not compared, `unlooked` differ and found no room to be looked into, and `missing` are tensors
    of the whole model that the output lacks."""

    causes: list[Cause] = field(default_factory=list)
    open: dict[str, str] = field(default_factory=dict)
    differing: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    left: int = 0
    unlooked: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def cause(self) -> str | None:
        """All that was found, in one line; None where a part is unexplained."""
        open_ = self.open or self.unlooked or not self.causes
        return None if open_ else "; ".join(c.words for c in self.causes)

    @property
    def text(self) -> str | None:
        """What the diagnosis says about the bits."""
        if not self.differing:
            return None
        told = [c.words for c in self.causes] if self.open or self.unlooked else []
        told += [f"no known mistake explains {where}" for where in self.open.values()]
        listed = [f"{short(n)} ({count:,} elements)" for n, count in self.differing.items()]
        more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
        told.append(
            f"{len(listed)} of {self.compared} tensors differ from what the source gives: "
            f"{', '.join(listed[:4])}{more}"
        )
        if self.unlooked:
            told.append(f"{len(self.unlooked)} of them not looked into for want of memory: --memory gives it")
        return "; ".join(told)


class Evidence:
    """The Hugging Face side's tensors twice: as they should be and as they are, whichever of the two sides
    was written. Tensors are raw bits."""

    def __init__(self, subject: Subject) -> None:
        assert subject.plan is not None and subject.source is not None
        self.subject, self.plan = subject, subject.plan
        self.forward = subject.direction == "to-hf"
        self.where: dict[str, tuple[Step, Part]] = {}
        for step in self._steps(subject.plan.steps):
            self.where |= {p.name: (step, p) for p in step.targets}
        self._made: dict[int, list[np.ndarray]] = {}

    def _steps(self, planned: Sequence[Step]) -> list[Step]:
        """Those that make the Hugging Face side's tensors out of the original's."""
        if self.forward:
            return [s for s in planned if not s.compare]
        return joined([s.inverse() for s in planned if not s.mean and s.compare in ("", COPIED)])

    def info(self, name: str) -> TensorInfo | None:
        """The tensor as it lies on the Hugging Face side."""
        _, part = self.where[name]
        if self.forward:
            return self.subject.target(part.file, name)
        assert self.subject.source is not None
        return self.subject.source.files[part.file].tensors.get(name)

    def made_of(self, name: str) -> int:
        """Bytes of what the step takes that makes a tensor; it gives as many."""
        step, _ = self.where[name]
        return sum(prod(p.shape(step.sizes)) * DTYPES[p.dtype].itemsize for p in step.sources)

    def expected(self, name: str) -> np.ndarray:
        return self._through_plan(name) if self.forward else self._read(name)

    def found(self, name: str) -> np.ndarray:
        return self._read(name) if self.forward else self._through_plan(name)

    def _read(self, name: str) -> np.ndarray:
        info, checkpoint = self.info(name), self.subject.output if self.forward else self.subject.source
        if info is None or checkpoint is None:
            raise KeyError(name)
        return checkpoint.read(info)

    def _through_plan(self, name: str) -> np.ndarray:
        """Made by the plan's step from the original's tensors."""
        step, part = self.where[name]
        if id(step) not in self._made:
            moved = common(p.dtype for p in step.sources)
            arrays = [_recast(self._original(p), p.dtype, moved) for p in step.sources]
            made = apply(step, arrays)
            if not step.mean:
                made = [_recast(x, moved, p.dtype) for x, p in zip(made, step.targets, strict=True)]
            if sum(x.nbytes for held in self._made.values() for x in held) > KEPT:
                self._made.clear()
            self._made[id(step)] = made
        return self._made[id(step)][step.targets.index(part)]

    def _original(self, part: Part) -> np.ndarray:
        if self.forward:
            assert self.subject.source is not None
            return self.subject.source.read(self.subject.source.files[part.file].tensors[part.name])
        info = self.subject.target(part.file, part.name)
        if info is None:
            raise KeyError(part.name)
        return self.subject.output.read(info)

    def pair(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self.expected(name), self.found(name)

    def shape(self, name: str) -> tuple[int, ...]:
        step, part = self.where[name]
        return part.shape(step.sizes)

    def axes(self, name: str) -> list[tuple[tuple[str, int], ...]]:
        """Those of each dimension, outer first, with their sizes."""
        step, part = self.where[name]
        box = part.box(step.sizes)
        groups = [[(a, box[a][1] - box[a][0]) for a in g] for g in part.dims]
        return [self._with_heads(name, dim, group) for dim, group in enumerate(groups)]

    def _with_heads(self, name: str, dim: int, group: list[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
        """Heads and experts where the table's axes have other names: where it has all channels of attention
        in one axis, config.json knows the heads; query heads come in groups; `e` is a width in layers
        without experts."""
        config, words = self.subject.config, [a for a, _ in group]
        heads = next((int(config[k]) for k in HEADS if isinstance(config.get(k), int)), 0)
        wide = [n for _, n in group if n > 1]
        alone = len(wide) == 1 and not {"n", "k", "g", "h"} & set(words) and dim == _along_heads(name)
        if alone and heads > 1 and wide[0] % heads == 0:
            return (("n", heads), ("h", wide[0] // heads))
        if len(group) == 2 and dim == _along_heads(name) and words[1] == "h" and words[0] not in ("n", "k"):
            return (("n", group[0][1]), group[1])  # an axis of the heads of queries, keys and values
        if words in (["g", "s", "h"], ["k", "s", "h"]):
            return (("n", group[0][1] * group[1][1]), group[2])
        experts = {config.get(k) for k in EXPERTS}
        return tuple(("width", n) if a == "e" and n not in experts else (a, n) for a, n in group)

    def ranks(self, name: str, dim: int) -> int:
        """Into how many shares of that dimension the original is dealt out."""
        step, part = self.where[name]
        outer = next(
            (a for a in part.dims[dim] if part.box(step.sizes)[a][1] - part.box(step.sizes)[a][0] > 1), ""
        )
        return len({p.box(step.sizes)[outer] for p in step.sources}) if outer else 1


def _along_heads(name: str) -> int | None:
    """Which dimension of a layer's tensor has the heads, as its name tells."""
    module, _, kind = name.rpartition(".")
    if layer_of(name) is None or not module.endswith((*READ, *MIXED)):
        return None
    return 0 if module.endswith(READ) else 1 if kind == "weight" else None


def _recast(x: np.ndarray, source: str, target: str) -> np.ndarray:
    return converted(x.reshape(-1), source, target).reshape(x.shape)


def explain(evidence: Evidence, names: Sequence[str], room: int | None = None) -> Explanation:
    """The mistakes in some tensors of the Hugging Face side, as a rule those of one layer, in `room` bytes of
    memory (None: what is usual): pairs of what was expected and found take half of it, and what is made of
    them as much again."""
    room = ROOM if room is None else room
    held, limit = 0, min(LIMIT, room // 4)
    made = Explanation(missing=[n for n in evidence.where if evidence.info(n) is None])
    changed: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in sorted(n for n in names if n in evidence.where):
        info = evidence.info(name)
        if info is None or info.nbytes > limit or evidence.made_of(name) > room // 2:
            made.left += 1  # neither compared nor explained here: the bits level does
            continue
        try:
            expected, found = evidence.pair(name)
        except KeyError:
            made.left += 1
            continue
        made.compared += 1
        if expected.shape != found.shape or expected.dtype != found.dtype:
            made.differing[name] = found.size
            if expected.dtype == found.dtype and np.array_equal(expected.T, found):
                made.causes.append(Cause(f"{short(name)} transposed", (name,)))
            else:
                made.open[name] = f"{short(name)}: expected {expected.shape}, found {found.shape}"
        elif not np.array_equal(expected, found):
            made.differing[name] = int((expected != found).sum())
            if held + expected.nbytes + found.nbytes > room // 2:
                made.unlooked.append(name)
            else:
                changed[name] = expected, found
                held += expected.nbytes + found.nbytes
    rest = dict(changed)
    layer = layer_of(next(iter(rest))) if rest else None
    for cause in _together(evidence, rest, layer, names):
        made.causes.append(cause)
        for name in cause.tensors:
            rest.pop(name, None)
    made.causes += _alone(evidence, rest, layer)
    told = {n for c in made.causes for n in c.tensors}
    for name, (expected, found) in rest.items():
        if name not in told:
            made.open[name] = f"{short(name)}: {located(evidence, name, expected, found)}"
    return made


def located(evidence: Evidence, name: str, expected: np.ndarray, found: np.ndarray) -> str:
    """Where a tensor differs: the elements, and the head, expert or rank that they all are in."""
    wrong = expected != found
    text = f"{int(wrong.sum()):,} elements differ, {place(wrong)}"
    for dim, axes in enumerate(evidence.axes(name)):
        touched = np.flatnonzero(np.moveaxis(wrong, dim, 0).reshape(wrong.shape[dim], -1).any(1))
        shares, noun = evidence.ranks(name, dim), _noun(wrong.ndim, dim)
        rows = Rows(np.empty(wrong.shape[dim]), np.empty(0), axes, shares, noun)
        for word, outer, blocks, size in rows.levels:
            share = {int(t) // size for t in touched}
            if size > 1 and len(share) == 1 and outer * blocks > 1:
                return f"{text}, all in {word} {share.pop()}"
    return text


def _noun(axes: int, dim: int) -> str:
    """What lies along one axis of a tensor of so many: of a convolution's kernel, say."""
    return "element" if axes == 1 else ("row", "column")[dim] if axes == 2 else f"axis-{dim + 1} slice"


# --- several tensors at once ----------------------------------------------------------------------------


def _together(evidence: Evidence, rest: Changed, layer: int | None, names: Sequence[str]) -> Iterator[Cause]:
    """Causes that involve more than one tensor; each accounts for all elements of its tensors."""
    if not rest:
        return
    packed = list(of_codes(evidence.subject, evidence.where, rest))
    for words, own in packed:
        if len(own) > 1:  # one grid of few numbers may be another's by chance
            yield Cause(f"{_listed(sorted(own, key=_rank))}: {words}", tuple(own))
            rest = {n: pair for n, pair in rest.items() if n not in own}
    origin = _origins(evidence, rest, names)
    layers = defaultdict(list)
    for name, other in origin.items():
        if layer is not None and layer_of(other) not in (None, layer):
            layers[layer_of(other)].append(name)
    for j, own in layers.items():
        if j is not None:
            yield _from_layer(evidence, own, j, rest, names)
    inside = {n: o for n, o in origin.items() if layer_of(o) == layer or layer is None or layer_of(o) is None}
    yield from _moved(inside)
    left = {n: pair for n, pair in rest.items() if n not in origin}
    for words, own in packed:
        if len(own) == 1 and own[0] in left:
            yield Cause(f"{short(own[0])}: {words}", tuple(own))
            del left[own[0]]
    for cause in _misread(evidence, left, layer):
        yield cause
        left = {n: pair for n, pair in left.items() if n not in cause.tensors}
    for cause in _regrouped(evidence, left):
        yield cause
        left = {n: pair for n, pair in left.items() if n not in cause.tensors}
    yield from _interleaved(evidence, left)


def _digest(x: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(x).data.cast("B"), digest_size=16).digest() if x.size else b""


def _origins(evidence: Evidence, rest: Changed, names: Sequence[str]) -> dict[str, str]:
    """For tensors that hold exactly what another should: which. Looked for in the same layer, then among the
    namesakes of other layers, then among the tensors outside of the layers."""
    sought = {n: _digest(found) for n, (_, found) in rest.items() if found.reshape(-1)[:64].any()}
    known: dict[str, bytes] = {}
    made: dict[str, str] = {}

    def holds(name: str, other: str) -> bool:
        if other == name or evidence.shape(other) != evidence.shape(name):
            return False
        if other not in known:
            known[other] = _digest(evidence.expected(other))
        return known[other] == sought[name]

    outside = [n for n in evidence.where if layer_of(n) is None]
    own = [n for n in names if n in evidence.where]
    for name in sought:
        near = [*_namesakes(name, own), *own]
        others = [*near, *_in_other_layers(evidence, name), *outside]
        other = next((o for o in others if holds(name, o)), None)
        if other is not None:
            made[name] = other
    return made


def _namesakes(name: str, names: Iterable[str]) -> list[str]:
    """Tensors of the layer whose names differ in one word, such as the same matrix of other experts."""
    parts = words_of(name)
    return [
        n
        for n in names
        if len(p := words_of(n)) == len(parts) and sum(a != b for a, b in zip(p, parts, strict=True)) == 1
    ]


def _in_other_layers(evidence: Evidence, name: str) -> list[str]:
    own = layer_of(name)
    if own is None:
        return []
    parts = words_of(name)
    at = parts.index(str(own))
    found = [
        n for n in evidence.where if (p := words_of(n))[:at] == parts[:at] and p[at + 1 :] == parts[at + 1 :]
    ]
    return sorted(found, key=lambda n: abs((layer_of(n) or 0) - own))


def _from_layer(evidence: Evidence, own: list[str], other: int, rest: Changed, names: Sequence[str]) -> Cause:
    everything = [n for n in names if n in evidence.where]
    if (
        len(own) == len([n for n in everything if n in rest])
        and len(own) > 1
        and len(own) >= len(everything) - 2
    ):
        return Cause(f"holds the weights of the original's layer {other}", tuple(own))
    stems = {n.rsplit(".", 2)[0] for n in own}
    if len(stems) == 1 and len(own) > 1 and next(iter(stems)).rsplit(".", 1)[-1].isdecimal():
        expert = next(iter(stems)).rsplit(".", 1)[-1]
        return Cause(f"expert {expert} holds the weights of the original's layer {other}", tuple(own))
    return Cause(
        f"{_listed(own)} hold{'s' * (len(own) == 1)} that of the original's layer {other}", tuple(own)
    )


def _listed(names: Sequence[str], most: int = 4) -> str:
    told = [short(n) for n in names]
    if len(told) > most:
        return f"{', '.join(told[:most])} and {len(told) - most} more"
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"


def _moved(origin: Mapping[str, str]) -> Iterator[Cause]:
    """Tensors of a layer that stand in one another's places."""
    pairs = [(a, b) for a, b in origin.items() if origin.get(b) == a and a < b]
    experts: dict[tuple[str, str, str], list[tuple[str, str]]] = defaultdict(list)
    stems: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for a, b in pairs:
        p, q = words_of(a), words_of(b)
        unlike = [k for k, (x, y) in enumerate(zip(p, q, strict=False)) if x != y]
        if len(p) == len(q) and len(unlike) == 1 and p[unlike[0]].isdecimal() and q[unlike[0]].isdecimal():
            k = unlike[0]
            experts[(".".join(p[:k]), *sorted((p[k], q[k]), key=int))].append((a, b))  # type: ignore[index]
        else:
            stems[(a.rsplit(".", 1)[0], b.rsplit(".", 1)[0])].append((a, b))
    for (_, a, b), own in experts.items():
        flat = tuple(n for pair in own for n in pair)
        if len(own) > 1:
            yield Cause(f"experts {a} and {b} exchanged", flat)
        else:
            yield Cause(f"{short(own[0][0])} and {short(own[0][1])} exchanged", flat)
    for own in stems.values():
        a, b = own[0]
        flat = tuple(n for pair in own for n in pair)
        both = {n.rsplit(".", 1)[1] for n in flat} == {"weight", "bias"}
        names = sorted((a, b)) if not both else sorted((a.rsplit(".", 1)[0], b.rsplit(".", 1)[0]))
        words = f"{short(names[0])} and {short(names[1])} exchanged"
        yield Cause(words + (", weight and bias" if both else ""), flat)
    done = {n for pair in pairs for n in pair}
    alone = [n for n in origin if n not in done]
    cyclic = [n for n in alone if origin[n] in alone]
    whole = _experts_moved({n: origin[n] for n in cyclic})
    if whole is not None:
        yield Cause(whole, tuple(cyclic))
        alone = [n for n in alone if n not in cyclic]
    elif len(cyclic) > 2:
        ordered = sorted(cyclic, key=_rank)
        weights = [n for n in ordered if not n.endswith(".bias")] or ordered
        words = f"{_listed(weights, 6)} hold {_listed([origin[n] for n in weights], 6)}"
        words += ", weight and bias" if len(weights) * 2 == len(ordered) else ""
        yield Cause(words, tuple(cyclic))
        alone = [n for n in alone if n not in cyclic]
    for n in alone:
        yield Cause(f"{short(n)} holds {short(origin[n])}", (n,))


def _experts_moved(origin: Mapping[str, str]) -> str | None:
    """Whole experts in other places: which holds which."""
    came: dict[int, set[int]] = defaultdict(set)
    for name, other in origin.items():
        p, q = words_of(name), words_of(other)
        unlike = [(x, y) for x, y in zip(p, q, strict=False) if x != y]
        if len(p) != len(q) or len(unlike) != 1 or not all(x.isdecimal() for x in unlike[0]):
            return None
        came[int(unlike[0][0])].add(int(unlike[0][1]))
    if len(came) < 3 or any(len(theirs) > 1 for theirs in came.values()):
        return None
    order = {e: theirs.pop() for e, theirs in sorted(came.items())}
    steps = {(e - other) % len(order) for e, other in order.items()}
    if len(steps) == 1 and sorted(order) == list(range(len(order))):
        by = steps.pop()
        return f"experts shifted by {by - len(order) if by > len(order) // 2 else by:+d}"
    listed = list(order.items())
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return f"experts in another order: {', '.join(f'{e} holds {other}' for e, other in listed[:4])}{more}"


def _misread(evidence: Evidence, rest: Changed, layer: int | None) -> Iterator[Cause]:
    """Query, key and value read in another order; of the weight and the bias together where both were."""
    made: dict[str, list[Fused]] = defaultdict(list)
    found_fused = fused(evidence.plan, layer)
    for f in found_fused:
        if not any(n in rest for n in f.names):
            continue
        pairs = [rest[n] if n in rest else (evidence.expected(n),) * 2 for n in f.names]
        right, found = (
            hashes(np.moveaxis(np.concatenate(x, axis=f.dim), f.dim, 0)) for x in zip(*pairs, strict=True)
        )
        words = next((w for w, rows in f.mistakes if np.array_equal(right[rows], found)), None)
        if words is not None:
            made[words].append(f)
    several = len(found_fused) > 1
    for words, own in made.items():
        names = tuple(n for f in own for n in f.names if n in rest)
        alone = f"{short(own[0].names[0])}: " if len(own) == 1 and several else ""
        yield Cause(alone + words, names)


def _regrouped(evidence: Evidence, rest: Changed) -> Iterator[Cause]:
    """Query, key and value cut flat from rows that lie in groups, each key/value head after its query heads,
    or in groups from rows that lie flat."""
    said = (evidence.subject.config.get(key) for key in ("num_key_value_heads", *HEADS))
    groups = next((n for n in said if type(n) is int), 0)
    if groups < 2:
        return
    for kind in ("weight", "bias"):
        own = [n for n in rest if n.endswith(kind) and _rank(n)[1] < ROLES]
        names = sorted(own, key=_rank)
        pairs = [rest[n] for n in names]
        if len(names) != 3 or any(len(x) % groups or x.shape[1:] != pairs[0][0].shape[1:] for x, _ in pairs):
            continue
        right, found = (np.concatenate([hashes(pair[k]) for pair in pairs]) for k in (0, 1))
        ends = np.cumsum([len(x) for x, _ in pairs])[:-1]
        shares = [x.reshape(groups, -1) for x in np.split(np.arange(len(right)), ends)]
        order = np.concatenate(shares, 1).reshape(-1)
        if np.array_equal(right[order], found):
            yield Cause(f"{_listed(names)} cut flat from rows in {groups} groups of heads", tuple(names))
        elif np.array_equal(right[np.argsort(order)], found):
            yield Cause(f"{_listed(names)} cut in {groups} groups of heads from flat rows", tuple(names))


def _interleaved(evidence: Evidence, rest: Changed) -> Iterator[Cause]:
    """Two matrices of one shape mixed row by row or block by block: taken apart, or put together, wrongly."""
    names = sorted(rest)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if rest[a][0].shape != rest[b][0].shape or rest[a][0].ndim != 2 or b not in _namesakes(a, names):
                continue
            right, found = (np.concatenate([hashes(rest[a][k]), hashes(rest[b][k])]) for k in (0, 1))
            words = _mixed(right, found)
            if words is None and rest[a][0].shape[1] > 1:
                right, found = (np.concatenate([hashes(rest[a][k].T), hashes(rest[b][k].T)]) for k in (0, 1))
                words = _mixed(right, found)
                words = words and words.replace("row", "column")
            if words is not None:
                yield Cause(f"{short(a)} and {short(b)} {words}", (a, b))


def _mixed(right: np.ndarray, found: np.ndarray) -> str | None:
    n = len(right) // 2
    for blocks in (b for b in range(n, 1, -1) if n % b == 0):
        size = n // blocks
        order = np.arange(2 * n).reshape(2, blocks, size).swapaxes(0, 1).reshape(-1)
        each = "row by row" if size == 1 else f"in blocks of {size} rows"
        if np.array_equal(right[order], found):
            return f"interleaved {each}"
        if np.array_equal(right[np.argsort(order)], found):
            return f"taken apart {each}, as if they were interleaved"
    return None


# --- one tensor -----------------------------------------------------------------------------------------


def _alone(evidence: Evidence, rest: Changed, layer: int | None) -> list[Cause]:
    """Causes that lie in one tensor; tensors of which the same can be said are named together."""
    rows = reorders(evidence.plan, layer)
    by_words: dict[str, list[str]] = defaultdict(list)
    for name, (expected, found) in rest.items():
        words = _single(evidence, name, expected, found, rows)
        if words is not None:
            by_words[words].append(name)
    return [
        Cause(f"{_listed(sorted(names, key=lambda n: _rank(n)))} {words}", tuple(names))
        for words, names in by_words.items()
    ]


def _rank(name: str) -> tuple[bool, int, str]:
    """Query before key before value, weights before biases."""
    place = next((i for i, w in enumerate(("q_", "query", "k_", "key", "v_", "value")) if w in name), ROLES)
    return name.endswith("bias"), place, name


def _single(
    evidence: Evidence, name: str, expected: np.ndarray, found: np.ndarray, table: Sequence[Reorder]
) -> str | None:
    own = next((r for r in table if r.name == name), None)
    if own is not None and (words := _reordered(evidence, own, expected, found, table)):
        return words
    if expected.ndim == 0:
        return None
    if words := _transposed(expected, found):
        return words
    if words := _needlessly(evidence, name, expected, found, own):
        return words
    dtype = evidence.where[name][1].dtype
    if words := alteration(expected, found, dtype, _sizes(evidence, name)):
        return words
    return _by_rows(evidence, name, expected, found, own)


def _transposed(expected: np.ndarray, found: np.ndarray) -> str | None:
    """The axes in another order, in the shape they had; a kernel has three of which the source may reverse
    all."""
    n = expected.ndim
    for order in permutations(range(n)) if 1 < n <= AXES else ():
        moved = np.ascontiguousarray(expected.transpose(order)).reshape(expected.shape)
        if order != tuple(range(n)) and np.array_equal(moved, found):
            return "transposed" if n == 2 else f"transposed: axes {' '.join(str(k + 1) for k in order)}"
    return None


def _reordered(
    evidence: Evidence, own: Reorder, expected: np.ndarray, found: np.ndarray, table: Sequence[Reorder]
) -> str | None:
    """What a converter believed about a tensor that the plan reorders. On the way back to the original the
    order that was forgotten is made once more by the plan's way here."""
    forgot, *others = beliefs(own, table)
    twice = np.array_equal(_relaid(expected, own.sizes, own.left, own.right), found)
    once = np.array_equal(_believed(expected, own, forgot), found)
    if once or twice:
        return forgot.words if once == evidence.forward or once == twice else "permuted twice"
    return next((b.words for b in others if np.array_equal(_believed(expected, own, b), found)), None)


def _relaid(
    x: np.ndarray, sizes: Mapping[str, int], stored: Sequence[str], wanted: Sequence[str]
) -> np.ndarray:
    split = x.reshape([sizes[a] for a in stored])
    return split.transpose([list(stored).index(a) for a in wanted]).reshape(x.shape)


def _believed(x: np.ndarray, r: Reorder, b: Belief) -> np.ndarray:
    """The tensor as a converter with that belief writes it."""
    source = _relaid(x, r.sizes, r.right, r.left)
    return _relaid(source, b.sizes, b.order, r.right)


def _sizes(evidence: Evidence, name: str) -> frozenset[int]:
    """Sizes that a factor may follow from: the head's width, the model's."""
    config: Mapping[str, Any] = evidence.subject.config
    heads = {int(config[k]) for k in HEADS if isinstance(config.get(k), int)}
    width = {int(config[k]) for k in ("hidden_size", "n_embd") if isinstance(config.get(k), int)}
    inner = {w // h for w in width for h in heads if h and w % h == 0}
    inner |= {int(config["head_dim"])} if isinstance(config.get("head_dim"), int) else set()
    axes = {n for group in evidence.axes(name) for _, n in group}
    return frozenset(n for n in {*width, *inner, *axes} if n > 1)


def _needlessly(
    evidence: Evidence, name: str, expected: np.ndarray, found: np.ndarray, own: Reorder | None
) -> str | None:
    """Rows permuted as rotary ones are, where the plan leaves them: pairs taken for halves."""
    if (own is not None and own.rotary) or "norm" in name:
        return None
    axes = [(a, n) for a, n in evidence.axes(name)[0] if n > 1]
    counts = [axes[0][1]] if len(axes) > 1 else []
    config = evidence.subject.config
    keys = ("num_attention_heads", "num_key_value_heads", "n_head")
    counts += [
        int(config[k]) for k in keys if isinstance(config.get(k), int) and int(config[k]) not in counts
    ]
    right, wrong = hashes(expected), hashes(found)
    for count in counts:
        if count < 1 or len(right) % (2 * count) or len(right) // count < 4:
            continue
        rows = np.arange(len(right))
        halves = rows.reshape(count, -1, 2).swapaxes(1, 2).reshape(-1)
        pairs = rows.reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)
        if np.array_equal(right[halves], wrong):
            return f"permuted for rotary, which is not called for here ({count} heads)"
        if np.array_equal(right[pairs], wrong):
            return f"interleaved as for rotary, which is not called for here ({count} heads)"
    return None


def _by_rows(
    evidence: Evidence, name: str, expected: np.ndarray, found: np.ndarray, own: Reorder | None
) -> str | None:
    axes = evidence.axes(name)
    for dim in range(expected.ndim):
        right, wrong = (np.moveaxis(x, dim, 0) for x in (expected, found))
        noun, shares = _noun(expected.ndim, dim), evidence.ranks(name, dim)
        rotary = own is not None and own.rotary
        rows = Rows(hashes(right), hashes(wrong), axes[dim], shares, noun, rotary)
        if words := rows.words():
            return words
    return _from_others(evidence, name, expected, found)


def _from_others(evidence: Evidence, name: str, expected: np.ndarray, found: np.ndarray) -> str | None:
    """Rows that are those of another tensor of the layer."""
    if expected.ndim != 2:
        return None
    layer = layer_of(name)
    wanted, own = hashes(found), hashes(expected)
    wrong = np.flatnonzero(wanted != own)
    if not len(wrong) or int(wrong[-1] - wrong[0]) + 1 != len(wrong):
        return None
    block = wanted[wrong[0] : wrong[-1] + 1]
    near = [n for n in evidence.where if layer_of(n) == layer and n != name]
    for other in [*near, *_in_other_layers(evidence, name)]:
        shape = evidence.shape(other)
        if len(shape) != 2 or shape[1] != expected.shape[1] or shape[0] < len(block):
            continue
        theirs = hashes(evidence.expected(other))
        for start in np.flatnonzero(theirs == block[0])[:4].tolist():
            if np.array_equal(theirs[start : start + len(block)], block):
                whose = short(other) if layer_of(other) == layer else f"layer {layer_of(other)}"
                return (
                    f"rows {span(int(wrong[0]), len(block))} hold rows {span(start, len(block))} of {whose}"
                )
    return None
