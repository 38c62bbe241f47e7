"""Which known mistake explains a difference: each is taken back on the differing phase, and the one that
makes the difference vanish is the answer, with the numbers before and after."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ckpt_tool.verify.bits import compare
from ckpt_tool.verify.measure import Bar, Distance
from ckpt_tool.verify.mistakes import short, to_undo
from ckpt_tool.verify.report import Finding, Table
from ckpt_tool.verify.sides import Phase, Sample, Side, phase_text
from ckpt_tool.verify.subject import Subject

ROWS = 8  # wrong embedding rows that are looked up in the original's table
TABLE_BLOCK = 4096  # rows of that table held at a time
SHOWN = 5


@dataclass(frozen=True)
class Attempt:
    """One mistake taken back: what the distance becomes. `exact` when it then meets the bar."""

    name: str
    after: Distance
    exact: bool
    config: tuple[str, ...] = ()  # the values of config.json that were changed


@dataclass
class Diagnosis:
    """`before` is the distance as found, `attempts` all that were made, nearest first. `rows` says where in
    the embedding the rows stand that differ, `bits` which of the phase's tensors are not what the source
    gives, `foretold` the plan's notes about the value of config.json that explains the difference."""

    phase: Phase
    before: Distance
    attempts: list[Attempt]
    rows: str | None
    bits: str | None
    foretold: tuple[str, ...] = ()

    @property
    def cause(self) -> str | None:
        return next((a.name for a in self.attempts if a.exact), None) or self.rows

    def finding(self) -> Finding:
        table = Table(
            ("taken back", "NMSE before", "NMSE after", "max |delta| after", "explains"),
            tuple(
                (a.name, self.before.nmse, a.after.nmse, a.after.max_delta, "yes" if a.exact else "no")
                for a in self.attempts[:SHOWN]
            ),
        )
        where = phase_text(self.phase)
        explaining = [a.name for a in self.attempts if a.exact]
        if self.cause is not None:
            also = [c for c in [*explaining, self.rows] if c not in (None, self.cause)]
            text = f"cause: {self.cause}" + (f" (as well: {'; '.join(map(str, also[:3]))})" if also else "")
        else:
            text = f"none of {len(self.attempts)} known mistakes explains the difference"
            if self.attempts and self.attempts[0].after.nmse < self.before.nmse / 10:
                text += f"; nearest: {self.attempts[0].name}"
        text += "".join(f"; the plan says: {note}" for note in self.foretold)
        text += f"; {self.bits}" if self.bits and not self.foretold else ""
        data = {"cause": self.cause, "also": explaining[1:], "rows": self.rows, "bits": self.bits}
        tables = (table,) if self.attempts else ()
        return Finding("diagnosis", "known mistakes", "note", text, where, data=data, tables=tables)


def diagnose(
    subject: Subject,
    original: Side,
    converted: Side,
    phase: Phase,
    shapes: Mapping[str, tuple[int, ...]],
    samples: Mapping[str, Sample],
    bar: Bar,
) -> Diagnosis:
    """`samples` has the original's activations around the phase by prompt, `shapes` the converted tensors
    that the phase read."""
    order = sorted(samples.values(), key=lambda s: s.tokens)
    probe, before = order[-1], Distance(0.0, 0.0, 0, 0.0)
    for sample in order:  # the shortest prompt that shows the difference is where attempts are made
        probe, before = sample, _measure(converted, phase, sample)
        if not bar.holds(before):
            break
    attempts = []
    for change in to_undo(phase, subject.plan, shapes, subject.config):
        try:
            changed = converted.changed(change)
        except (KeyError, ValueError, IndexError, RuntimeError):
            continue  # does not apply here: another shape, no such tensor
        after = _measure(changed, phase, probe)
        exact = bar.holds(after) and all(
            bar.holds(_measure(changed, phase, s)) for s in order if s is not probe
        )
        attempts.append(Attempt(change.name, after, exact, tuple(change.config)))
    attempts += _other_layers(original, converted, phase, probe, bar)
    attempts.sort(key=lambda a: (not a.exact, a.after.nmse))
    rows = _rows(original, converted, samples.values()) if phase == "embed" else None
    keys = {key for a in attempts if a.exact for key in a.config}
    notes = subject.plan.notes if subject.plan is not None else ()
    foretold = tuple(n for n in notes if keys & set(re.findall(r"\w+", n)))
    return Diagnosis(phase, before, attempts, rows, _bits(subject, shapes), foretold)


def _measure(side: Side, phase: Phase, sample: Sample) -> Distance:
    try:
        return sample.of(side.run(phase, sample.x, sample.given))
    except (KeyError, ValueError, IndexError, RuntimeError):
        return Distance(math.inf, math.inf, 0, 0.0)


def _other_layers(original: Side, converted: Side, phase: Phase, sample: Sample, bar: Bar) -> list[Attempt]:
    """Does this layer compute what another layer of the original computes? Neighbours, the first and the last
    are tried: each is read for it."""
    if not isinstance(phase, int):
        return []
    n = original.config.n_layers
    made = []
    for other in sorted({phase - 2, phase - 1, phase + 1, phase + 2, 0, n - 1} & set(range(n)) - {phase}):
        theirs = replace(sample, wanted=original.run(other, sample.x, sample.given))
        d = _measure(converted, phase, theirs)
        made.append(Attempt(f"holds the weights of the original's layer {other}", d, bar.holds(d)))
    return made


def _bits(subject: Subject, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which of the tensors that the phase read hold other bits than the source gives."""
    if subject.plan is None:
        return None
    forward = subject.direction == "to-hf"
    steps = [
        s
        for s in subject.plan.steps
        if {p.name for p in (s.targets if forward else s.sources)} & shapes.keys()
    ]
    result = compare(subject, steps)
    if result.missing:
        return None
    if not result.differences:
        why = "a value of config.json is at fault"
        return f"all {len(steps)} tensors hold the bits that the source gives, so {why}"
    names = [short(d.against.name if forward else d.tensor.name) for d in result.differences]
    shown = ", ".join(
        f"{n} ({d.count:,} elements)" for n, d in zip(names[:4], result.differences, strict=False)
    )
    return f"{len(names)} of {len(steps)} tensors differ from what the source gives: {shown}"


def _rows(original: Side, converted: Side, samples: Iterable[Sample]) -> str | None:
    """For tokens whose embedding differs: which of the original's rows the converted table holds instead."""
    device = original.weights[0].device
    ids = torch.tensor(sorted({i for s in samples for i in s.x.flatten().tolist()}), device=device)
    a, b = (side.run("embed", ids[:, None])[:, 0] for side in (original, converted))
    wrong = (a != b).any(-1).nonzero().flatten()
    sought = wrong[:ROWS]
    vocabulary = int(converted.raw.get("vocab_size") or 0)
    found: dict[int, int] = {}
    for start in range(0, vocabulary, TABLE_BLOCK):
        block = torch.arange(start, min(start + TABLE_BLOCK, vocabulary), device=device)
        try:
            table = original.run("embed", block[:, None])[:, 0]
        except (IndexError, RuntimeError):
            break
        for k in sought.tolist():
            hit = (table == b[k]).all(-1).nonzero()
            if len(hit):
                found.setdefault(k, start + int(hit[0]))
    pairs = [f"token {int(ids[k])} has the row of token {row}" for k, row in found.items()]
    if pairs:
        more = f", {len(wrong)} rows differ in all" if len(wrong) > len(pairs) else ""
        return f"embedding rows stand elsewhere: {', '.join(pairs)}{more}"
    if len(wrong):
        return f"{len(wrong)} embedding rows differ, the first of token {int(ids[wrong[0]])}"
    return None
