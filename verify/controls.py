"""The negative control: known mistakes planted in memory, which must be caught at the bar in use."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from ckpt_tool.records import dataclass
from ckpt_tool.reference.phases import Tree, mapped
from ckpt_tool.verify.measure import CAPS, Bar, Distance, bar_for, farthest, wider
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.sides import BROKEN, Change, Phase, Sample, Side, Tensors, same
from ckpt_tool.verify.streamed import Streamed

FIRST = 1 << 16  # numbers of a tensor that are compared first
JUDGED_IN = {"float32": "float64"}  # what is too small for one precision is judged in the other
FEW = 2  # prompts, the shortest, on which that is done


@dataclass(frozen=True)
class Wider:
    """One phase of both sides once more, in a precision that sees what the one of the run does not. `worst`
    is the farther of the `prompts`."""

    phase: Phase
    dtype: str
    prompts: tuple[str, ...]
    worst: Distance
    bar: Bar

    @property
    def holds(self) -> bool:
        return self.bar.holds(self.worst)

    @property
    def differs(self) -> bool:
        """By more than noise can make of it."""
        return not self.holds and not self.bar.cannot_tell(self.worst)


@dataclass(frozen=True)
class Planted:
    """One mistake planted in memory, and the NMSE it caused. One that was not caught is `blind` when another
    precision shows that it is too small for this one: `seen_in` names that precision, None where none sees
    it. `wider` is what both sides were held against there; caught by that counts where they agree."""

    phase: Phase
    name: str
    nmse: float
    caught: bool
    blind: bool = False
    seen_in: str | None = None
    wider: Wider | None = None

    @property
    def words(self) -> str:
        if self.caught:
            return "yes" if self.wider is None else f"yes, in {self.wider.dtype}"
        return f"blind; {self.seen_in or 'no precision'} sees it" if self.blind else "NO"


def control(
    original: Side,
    converted: Side,
    phase: Phase,
    changes: list[Change],
    samples: Mapping[str, Sample],
    bar: Bar,
) -> list[Planted]:
    """Plant each mistake in the converted side, run the phase on all prompts until one shows it, the shortest
    first; those that none shows are looked at in wider precisions."""
    made, missed = [], []
    order = sorted(samples.values(), key=lambda s: s.tokens)
    right = _Right(converted, phase)
    for change in changes:
        changed = _changed(converted, change)
        if changed is None or (change.config and not right.reached_by(changed, order)):
            continue
        worst, caught = 0.0, False
        for sample in order:
            try:
                d = sample.of(changed.run(phase, sample.x, sample.given))
            except BROKEN:
                worst, caught = math.inf, True
                break
            worst = max(worst, d.nmse)
            caught = not bar.holds(d)
            if caught:
                break
        del changed  # or its copies of matrices are there while the next one makes its own
        if caught:
            made.append(Planted(phase, change.name, worst, True))
        else:
            missed.append((change, worst))
    return made + _missed(original, converted, phase, missed, samples)


def _missed(
    original: Side,
    side: Side,
    phase: Phase,
    missed: list[tuple[Change, float]],
    samples: Mapping[str, Sample],
) -> list[Planted]:
    """What wider precisions make of mistakes that this one did not show. A mistake that moves the result by
    more than the cap of this precision should have been seen: the bar is at fault and not the precision."""
    if not missed:
        return []
    name = str(side.weights[0].dtype).removeprefix("torch.")
    for w in side.weights:
        w.let_go()  # or they were held in both precisions
    seen: dict[str, tuple[str, float]] = {}
    for dtype in wider(name):
        with ExitStack() as stack:
            wide = side.computed_in(getattr(torch, dtype))
            stack.enter_context(wide.keep())
            for change, _ in missed:
                if change.name not in seen:
                    effect, shown = _effect(wide, change, phase, samples)
                    if shown:
                        seen[change.name] = dtype, effect
    made = []
    for change, nmse in missed:
        seen_in, effect = seen.get(change.name, (None, nmse))
        made.append(Planted(phase, change.name, nmse, False, effect <= 2 * CAPS[name], seen_in))
    judge = JUDGED_IN.get(name)
    names = {p.name for p in made if p.blind and p.seen_in is not None and p.seen_in == judge}
    if judge is None or not names:
        return made
    again, caught = _judged(original, side, phase, [c for c, _ in missed if c.name in names], samples, judge)
    return [
        replace(p, wider=again, caught=p.name in caught, blind=p.name not in caught) if p.name in names else p
        for p in made
    ]


def _judged(
    original: Side,
    converted: Side,
    phase: Phase,
    changes: list[Change],
    samples: Mapping[str, Sample],
    dtype: str,
) -> tuple[Wider | None, set[str]]:
    """The phase of both sides in another precision, on a few short prompts and one side at a time, and which
    of the changes are caught at the bar of that; none where the sides do not agree. None where there is no
    such operation."""
    kind: torch.dtype = getattr(torch, dtype)
    few = sorted(samples.items(), key=lambda item: item[1].tokens)[:FEW]
    try:
        own, noise = {}, []
        side = original.computed_in(kind)
        with side.keep():
            for name, s in few:
                x = mapped(lambda t: t.to(kind) if t.is_floating_point() else t, s.x)
                own[name] = Sample(x, side.run(phase, x, s.given), s.given, s.variances)
                with ReversedSums():
                    noise.append(own[name].of(side.run(phase, x, s.given)))
        bar, side = bar_for(noise, kind), converted.computed_in(kind)
        with side.keep():
            worst = farthest([s.of(side.run(phase, s.x, s.given)) for s in own.values()])
            wide = Wider(phase, dtype, tuple(own), worst, bar)
            caught = {c.name for c in changes if wide.holds and _shown(side, c, phase, own.values(), bar)}
    except BROKEN:
        return None, set()
    return wide, caught


def _shown(side: Side, change: Change, phase: Phase, samples: Iterable[Sample], bar: Bar) -> bool:
    changed = side.changed(change)
    return any(not bar.holds(s.of(changed.run(phase, s.x, s.given))) for s in samples)


def _effect(side: Side, change: Change, phase: Phase, samples: Mapping[str, Sample]) -> tuple[float, bool]:
    """By how much a mistake moves the phase, against the side itself, and whether that is over the bar that
    its own noise makes. Up to the first prompt that shows it."""
    changed, dtype, worst = side.changed(change), side.weights[0].dtype, 0.0
    for s in sorted(samples.values(), key=lambda s: s.tokens):
        x = mapped(lambda t: t.to(dtype) if t.is_floating_point() else t, s.x)
        try:
            sample = Sample(x, side.run(phase, x, s.given), s.given, s.variances)
            with ReversedSums():
                bar = bar_for([sample.of(side.run(phase, x, s.given))], dtype)
            d = sample.of(changed.run(phase, x, s.given))
        except BROKEN:
            continue  # this precision has no such operation
        worst = max(worst, d.nmse)
        if not bar.holds(d):
            return worst, True
    return worst, False


def _changed(side: Side, change: Change) -> Side | None:
    """The side with the change made to it; None where it cannot be made, or changes nothing: exchanging equal
    tensors, say, is no mistake."""
    try:
        changed = side.changed(change)
    except (KeyError, ValueError, RuntimeError):
        return None
    own = side.ranks[0]
    made = changed.ranks[0]
    altered = made.maps[0] if isinstance(made, ChainMap) else {}
    other = changed.config != side.config or any(_differs(x, own, n) for n, x in altered.items())
    return changed if other else None


def _differs(x: Any, own: Tensors, name: str) -> bool:
    """Whether a tensor is another one than before; one that is made bit by bit, or of codes, is. Of a large
    one the first numbers tell as a rule."""
    if not isinstance(x, torch.Tensor) or name not in own:
        return True
    before = own[name]
    if x.numel() > FIRST and x.shape == before.shape and not isinstance(x, Streamed):
        rows = max(1, FIRST * len(x) // x.numel())
        if not torch.equal(x[:rows], before[:rows]):
            return True
    return not torch.equal(x, before)


class _Right:
    """What the side itself makes of each prompt at one phase, computed once."""

    def __init__(self, side: Side, phase: Phase) -> None:
        self.side, self.phase = side, phase
        self._made: dict[int, Tree] = {}

    def reached_by(self, changed: Side, samples: list[Sample]) -> bool:
        """Whether the phase depends on what was changed at all: a gelu is not in every head."""
        for sample in samples:
            try:
                if id(sample) not in self._made:
                    self._made[id(sample)] = self.side.run(self.phase, sample.x, sample.given)
                other = changed.run(self.phase, sample.x, sample.given)
            except BROKEN:
                return True
            if not same(self._made[id(sample)], other):
                return True
        return False
