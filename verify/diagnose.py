"""Which known mistake explains a difference: each is taken back on the differing phase, and the one that
makes the difference vanish is the answer, with the numbers before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod

import numpy as np
import torch

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.tensor_names import layer_of, short, stack_of
from ckpt_tool.records import dataclass
from ckpt_tool.reference.phases import leaves
from ckpt_tool.verify.explain import Evidence, Explanation, explain
from ckpt_tool.verify.measure import Bar, Distance
from ckpt_tool.verify.mistakes import to_undo
from ckpt_tool.verify.packed_weights import PackedWeights
from ckpt_tool.verify.report import Finding, Table
from ckpt_tool.verify.sides import BROKEN, Change, Phase, Sample, Side, Tensors, phase_text
from ckpt_tool.verify.streamed import Streamed
from ckpt_tool.verify.streamed import held as as_stored
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


@dataclass
class Diagnosis:
    """`before` is the distance as found, `attempts` all that were made, those that explain it first.
    `explanation` is what the bits of the phase's tensors tell, `rows` where in the embedding the rows stand
    that differ."""

    phase: Phase
    before: Distance
    attempts: list[Attempt]
    rows: str | None
    explanation: Explanation | None

    @property
    def explaining(self) -> list[str]:
        return [a.name for a in self.attempts if a.exact]

    @property
    def cause(self) -> str | None:
        return next(iter(self.explaining), None) or self.rows

    def finding(self) -> Finding:
        table = Table(
            ("taken back", "NMSE before", "NMSE after", "max |delta| after", "explains"),
            tuple(
                (a.name, self.before.nmse, a.after.nmse, a.after.max_delta, "yes" if a.exact else "no")
                for a in self.attempts[:SHOWN]
            ),
        )
        where = phase_text(self.phase)
        if self.cause is not None:
            also = [c for c in [*self.explaining, self.rows] if c not in (None, self.cause)]
            text = f"cause: {self.cause}" + (f" (as well: {'; '.join(map(str, also[:3]))})" if also else "")
        else:
            text = f"none of {len(self.attempts)} known mistakes explains the difference"
            if self.attempts and self.attempts[0].after.nmse < self.before.nmse / 10:
                text += f"; nearest: {self.attempts[0].name}"
        bits = self._bits()
        text += f"; {bits}" if bits else ""
        differing = list(self.explanation.differing) if self.explanation is not None else []
        data = {
            "cause": self.cause, "also": self.explaining[1:], "rows": self.rows, "bits": bits,
            "tensor": differing, "phase": where,
        }  # fmt: skip
        tables = (table,) if self.attempts else ()
        return Finding("diagnosis", "known mistakes", "note", text, where, data=data, tables=tables)

    def _bits(self) -> str | None:
        e = self.explanation
        if e is None:
            return None
        if e.differing:
            return e.text
        if e.missing:
            more = f" and {len(e.missing) - 1} more" if len(e.missing) > 1 else ""
            return f"the output lacks {short(e.missing[0])}{more}"
        if not e.compared:
            return None
        why = "" if e.left else ", so a value of config.json is at fault, or the table that both ways go by"
        return (
            f"all {e.compared} tensors {'compared ' * bool(e.left)}hold the bits that the source gives{why}"
        )


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
    that the phase read. What the bits tell comes first; values of config.json, and mistakes taken back one
    at a time, are for what is left."""
    order = sorted(samples.values(), key=lambda s: s.tokens)
    probe, before = order[-1], Distance(0.0, 0.0, 0, 0.0)
    for sample in order:  # the shortest prompt that shows the difference is where attempts are made
        probe, before = sample, _measure(converted, phase, sample)
        if not bar.holds(before):
            break
    evidence = Evidence(subject) if subject.plan is not None and subject.source is not None else None
    for held in (*original.weights, *converted.weights):
        held.let_go()  # tensors whose bits are looked into are there twice, and more
    explanation = None
    if evidence is not None:
        explanation = explain(evidence, _all_of(phase, shapes, evidence), converted.weights[0].at_hand)
    side, bits = converted, None
    attempts: list[Attempt] = []
    forward = evidence is not None and evidence.forward
    if evidence is not None and explanation is not None and _is_put_right(evidence, explanation, converted):
        bits = explanation.cause or f"{_counted(explanation)} put right"
        side = converted.changed(Change(bits, _right(evidence, explanation, converted)))
        after = _measure(side, phase, probe)
        attempts.append(
            Attempt(bits, after, _exact(side, phase, probe, order, bar) and explanation.cause is not None)
        )
    elif explanation is not None and explanation.cause is not None and not forward:
        bits = explanation.cause
        attempts.append(Attempt(bits, Distance(0.0, 0.0, 0, 0.0), True))
    if bits is None or not bar.holds(attempts[0].after):
        attempts += _taken_back(
            subject,
            side,
            phase,
            shapes,
            probe,
            order,
            bar,
            bits if explanation and explanation.cause else None,
        )
        if bits is None:
            attempts += _other_layers(original, converted, phase, probe, bar)
    elif not attempts[0].exact:
        attempts += _taken_back(subject, converted, phase, shapes, probe, order, bar, None)
    place = {id(a): k for k, a in enumerate(attempts)}
    attempts.sort(key=lambda a: (not a.exact, place[id(a)] if a.exact else a.after.nmse))
    rows = None
    if phase == "embed" and explanation is None:
        rows = _rows(original, converted, samples.values())
    return Diagnosis(phase, before, attempts, rows, explanation)


def _all_of(phase: Phase, shapes: Mapping[str, tuple[int, ...]], evidence: Evidence) -> list[str]:
    """The tensors of the phase: those that it read, and those of its layer that no token was sent to."""
    stacks = {stack_of(name) for name in shapes} - {None}
    if isinstance(phase, int) and not stacks:
        return [n for n in evidence.where if layer_of(n) == phase]
    return [n for n in evidence.where if n in shapes or (isinstance(phase, int) and stack_of(n) in stacks)]


def _counted(explanation: Explanation) -> str:
    names = [short(n) for n in explanation.differing]
    return f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _is_put_right(evidence: Evidence, explanation: Explanation, side: Side) -> bool:
    """Whether tensors differ that can be made anew beside those that are held, in half of the room."""
    if not explanation.differing or not evidence.forward:
        return False
    (weights,) = side.weights
    item, room = weights.dtype.itemsize, weights.at_hand
    return room is None or sum(prod(evidence.shape(n)) for n in explanation.differing) * item <= room // 2


def _right(
    evidence: Evidence, explanation: Explanation, side: Side
) -> Callable[[Tensors], dict[str, torch.Tensor]]:
    """The tensors that differ, as the source gives them."""
    (weights,) = side.weights

    def make(w: Tensors) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        parts: dict[str, torch.Tensor] = {}
        for name in explanation.differing:
            dtype = getattr(torch, DTYPES[evidence.where[name][1].dtype].torch)
            bits = np.ascontiguousarray(evidence.expected(name))
            x = torch.frombuffer(bytearray(bits), dtype=dtype).view(bits.shape)
            own = None if name not in weights.tensors else weights[name]
            if isinstance(weights, PackedWeights) and name in weights.of_codes:
                parts[name] = x
            elif isinstance(own, Streamed):
                made[name] = as_stored(x, own)
            else:
                made[name] = x.to(weights.device, weights.dtype if dtype.is_floating_point else dtype)
        return {**made, **weights.with_parts(parts)} if isinstance(weights, PackedWeights) else made

    return make


def _exact(side: Side, phase: Phase, probe: Sample, order: Iterable[Sample], bar: Bar) -> bool:
    return all(bar.holds(_measure(side, phase, s)) for s in (probe, *(s for s in order if s is not probe)))


def _taken_back(
    subject: Subject,
    side: Side,
    phase: Phase,
    shapes: Mapping[str, tuple[int, ...]],
    probe: Sample,
    order: Iterable[Sample],
    bar: Bar,
    besides: str | None,
) -> list[Attempt]:
    """Each known mistake taken back; `besides` is what the bits have explained already."""
    attempts = []
    for change in to_undo(phase, subject.plan, shapes, side):
        if besides is not None and not change.config:
            continue
        try:
            changed = side.changed(change)
        except BROKEN:
            continue  # does not apply here: another shape, no such tensor
        after = _measure(changed, phase, probe)
        exact = bar.holds(after) and _exact(changed, phase, probe, order, bar)
        name = change.name if besides is None else f"{besides}; {change.name}"
        attempts.append(Attempt(name, after, exact))
    return attempts


def _measure(side: Side, phase: Phase, sample: Sample) -> Distance:
    try:
        return sample.of(side.run(phase, sample.x, sample.given))
    except BROKEN:
        return Distance(math.inf, math.inf, 0, 0.0)


def _other_layers(original: Side, converted: Side, phase: Phase, sample: Sample, bar: Bar) -> list[Attempt]:
    """Does this layer compute what another layer of the original computes? Neighbours, the first and the last
    are tried: each is read for it."""
    if not isinstance(phase, int):
        return []
    n = original.config.n_layers
    made = []
    for other in sorted({phase - 2, phase - 1, phase + 1, phase + 2, 0, n - 1} & set(range(n)) - {phase}):
        try:
            wanted = original.run(other, sample.x, sample.given)
        except BROKEN:
            continue  # this layer cannot run at all, which parity tells when it comes there
        d = _measure(converted, phase, replace(sample, wanted=wanted))
        made.append(Attempt(f"holds the weights of the original's layer {other}", d, bar.holds(d)))
    return made


def _rows(original: Side, converted: Side, samples: Iterable[Sample]) -> str | None:
    """For tokens whose embedding differs: which of the original's rows the converted table holds instead."""
    device = original.weights[0].device
    ids = torch.tensor(sorted({i for s in samples for i in s.x.flatten().tolist()}), device=device)
    try:
        a, b = (_embedded(side, ids) for side in (original, converted))
    except BROKEN:
        return None
    wrong = (a != b).any(-1).nonzero().flatten()
    sought = wrong[:ROWS]
    vocabulary = converted.vocabulary
    found: dict[int, int] = {}
    for start in range(0, vocabulary, TABLE_BLOCK):
        block = torch.arange(start, min(start + TABLE_BLOCK, vocabulary), device=device)
        try:
            table = _embedded(original, block)
        except BROKEN:
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


def _embedded(side: Side, ids: torch.Tensor) -> torch.Tensor:
    """All that the embedding makes of each of these ids, in one row."""
    return torch.cat([y.flatten(1) for y in leaves(side.run("embed", ids[:, None]))], dim=1)
