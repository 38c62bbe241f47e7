"""The negative control: known mistakes planted in memory, which must be caught at the bar in use."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_tool.reference.phases import Tree, mapped
from ckpt_tool.verify.measure import CAPS, Bar, bar_for, wider
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.sides import BROKEN, Change, Phase, Sample, Side, Tensors, same
from ckpt_tool.verify.streamed import Streamed

FEW = 1 << 16  # numbers of a tensor that are compared first


@dataclass(frozen=True)
class Planted:
    """One mistake planted in memory, and the NMSE it caused. One that was not caught is `blind` when another
    precision shows that it is too small for this one: `seen_in` names that precision, None where none sees
    it."""

    phase: Phase
    name: str
    nmse: float
    caught: bool
    blind: bool = False
    seen_in: str | None = None

    @property
    def words(self) -> str:
        if self.caught:
            return "yes"
        return f"blind; {self.seen_in or 'no precision'} sees it" if self.blind else "NO"


def control(
    converted: Side, phase: Phase, changes: list[Change], samples: Mapping[str, Sample], bar: Bar
) -> list[Planted]:
    """Plant each mistake, run the phase on all prompts until one shows it, the shortest first; those that
    none shows are looked at in wider precisions."""
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
        if caught:
            made.append(Planted(phase, change.name, worst, True))
        else:
            missed.append((change, worst))
    return made + _missed(converted, phase, missed, samples)


def _missed(
    side: Side, phase: Phase, missed: list[tuple[Change, float]], samples: Mapping[str, Sample]
) -> list[Planted]:
    """What wider precisions make of mistakes that this one did not show. A mistake that moves the result by
    more than the cap of this precision should have been seen: the bar is at fault and not the precision."""
    if not missed:
        return []
    name = str(side.weights[0].dtype).removeprefix("torch.")
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
    return made


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
    if x.numel() > FEW and x.shape == before.shape and not isinstance(x, Streamed):
        rows = max(1, FEW * len(x) // x.numel())
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
