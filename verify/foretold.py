"""Differences that the plan foretells, measured: where config.json has one value for what the original
computes in two ways, the phase is compared with that value as it would have to be, and must agree then at the
ordinary bar. What the difference itself may be is bounded for these weights by the layout's own reading (its
`bounds`, see docs/tolerances.md)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from inspect import signature

import torch

from ckpt_tool.convert.plan import Foretold
from ckpt_tool.records import dataclass
from ckpt_tool.reference.phases import Tree, leaves
from ckpt_tool.verify.measure import Bar, Distance
from ckpt_tool.verify.report import Finding, Status, Table, number
from ckpt_tool.verify.sides import NOTHING, Change, Phase, Sample, Side, Tensors, phase_text
from ckpt_tool.verify.subject import Subject


@dataclass(frozen=True)
class Raw:
    """How far one prompt's result is from the original's as config.json has it. `bound` is the largest that
    the bound allows at any place, `share` the largest part of it that was used, `inside` whether every place
    is within its bound and the ordinary bar besides."""

    distance: Distance
    bound: float
    share: float
    inside: bool


@dataclass(frozen=True)
class Met:
    """A foretold difference at one phase, by prompt; `alone` when the phase agrees with it taken back."""

    foretold: Foretold
    phase: Phase
    raw: dict[str, Raw]
    bar: Bar
    alone: bool

    @property
    def differs(self) -> bool:
        return any(not self.bar.holds(r.distance) for r in self.raw.values())

    @property
    def inside(self) -> bool:
        return all(r.inside for r in self.raw.values())

    @property
    def worst(self) -> Raw:
        return max(self.raw.values(), key=lambda r: (r.distance.max_delta, r.share))


EVERY_LAYER = "layer"  # stands for each of them among the phases of a foretold difference


def expected(subject: Subject) -> dict[Phase, Foretold]:
    """The foretold difference of each phase that has one."""
    if subject.plan is None:
        return {}
    layers: Iterable[Phase] = range(int(subject.config.get("num_hidden_layers") or 0))
    return {
        phase: f
        for f in subject.plan.foretold
        for where in f.where
        for phase in (layers if where == EVERY_LAYER else (where,))
    }


def taken_back(side: Side, known: Foretold | None) -> Side:
    """The side with the values of config.json that the phase would need."""
    return side if known is None else side.changed(Change(known.name, config=known.values))


def bound_of(side: Side, phase: Phase, x: Tree, given: Tensors = NOTHING) -> Tree | None:
    """By how much the result of the phase may be off at each place, in a tree of its tensors; None where the
    reading has no bound. That of numbered layers is called "layer", and takes the number too; each takes
    those of the further inputs that it has a parameter for."""
    known = getattr(side.module, "bounds", {})
    found = known.get(phase, known.get("layer") if isinstance(phase, int) else None)
    if found is None:
        return None
    asked = {"i": phase, **given}
    more = {name: value for name, value in asked.items() if name in signature(found).parameters}
    with torch.inference_mode():
        return found(x, ranks=side.ranks, c=side.config, **more)


def raw(side: Side, phase: Phase, sample: Sample, found: Tree, slack: float) -> Raw:
    """`found` against the sample's reference and the bound for its input; `slack` is for rounding."""
    bound, distance = bound_of(side, phase, sample.x, sample.given), sample.of(found)
    limits, wanted, its = ([] if y is None else leaves(y) for y in (bound, sample.wanted, found))
    alike = len(limits) == len(wanted) and all(
        b.shape == y.shape for b, y in zip(limits, wanted, strict=True)
    )
    if not alike or not math.isfinite(distance.max_delta):
        return Raw(distance, math.nan, math.inf, False)
    largest, share, inside = 0.0, 0.0, True
    for b, y, z in zip(limits, wanted, its, strict=True):
        if y.is_floating_point() and y.numel():
            delta, most = sample.real((z - y).abs()), sample.real(b)
            inside &= bool((delta <= most + slack).all())
            largest = max(largest, float(most.max()))
            share = max(share, float((delta / (most + slack)).max()))
    return Raw(distance, largest, share, inside)


def measure(
    known: Foretold, side: Side, phase: Phase, samples: Mapping[str, Sample], bar: Bar, alone: bool
) -> Met:
    """`side` is the converted one as config.json has it, `bar` the phase's ordinary one."""
    made = {
        name: raw(side, phase, s, side.run(phase, s.x, s.given), bar.max_delta) for name, s in samples.items()
    }
    return Met(known, phase, made, bar, alone)


def of_the_whole(level: str, known: Foretold, size: str, accepted: bool) -> Finding:
    """What a difference in the phases before the heads comes to at the end of a pass, in words, where nothing
    bounds it."""
    text = (
        f"{known.name}, as accepted: {known.reason}; {size}; level parity holds each phase to its bound"
        if accepted
        else f"differs as foretold: {known.reason}; {size}; all else agrees; --accept {known.name} accepts it"
    )
    exactness = "within the foretold difference" if accepted else "differs"
    data = {"foretold": known.name, "exactness": exactness}
    return Finding(level, "foretold", "note" if accepted else "fail", text, data=data)


def findings(level: str, met: Iterable[Met], accepted: Collection[str]) -> list[Finding]:
    return [_finding(level, m, m.foretold.name in accepted) for m in met]


def _finding(level: str, m: Met, accepted: bool) -> Finding:
    name, where = m.foretold.name, phase_text(m.phase)
    columns = ("prompt", "NMSE", "|delta|", "bound", "of it", "|value|", "")
    rows = tuple(
        (
            prompt, r.distance.nmse, r.distance.max_delta, r.bound, f"{r.share:.1%}", r.distance.magnitude,
            "inside" if r.inside else "outside",
        )
        for prompt, r in m.raw.items()
    )  # fmt: skip
    worst = m.worst
    size = (
        f"largest |delta| {number(worst.distance.max_delta)} of values up to "
        f"{number(worst.distance.magnitude)}"
    )
    status: Status = "fail"
    data = {"foretold": name, "max_delta": worst.distance.max_delta, "bound": worst.bound}
    if not m.alone:
        status, text = "note", f"{name} does not explain what differs here ({m.foretold.reason})"
    elif not m.differs:
        status, text = "note", f"{name} was foretold, and nothing differs"
    elif not m.inside:
        text = f"{name}: expected at most the bound computed for these weights, found more: {size}"
        data["exactness"] = "differs"
    elif not accepted:
        text = (
            f"differs as foretold: {m.foretold.reason}; {size}, inside the bound for these weights; all else "
            f"agrees; --accept {name} accepts it"
        )
        data["exactness"] = "differs"
    else:
        status = "pass"
        text = f"{name}, as accepted: {m.foretold.reason}; {size}, inside the bound for these weights"
        data["exactness"] = "within the foretold difference"
    return Finding(
        level, "foretold", status, text, where,
        measured=worst.distance.max_delta, bar=worst.bound, data=data, tables=(Table(columns, rows),),
    )  # fmt: skip
