"""Level 3: do they compute the same? The original layout's own reading against the Hugging Face layout's, in
lockstep.

Each layer of both sides is fed the original's input to that layer, so the first layer that differs is named
and errors do not pile up; a second run lets the converted side run free, as a user of it would. Every bar
comes from the noise floor measured in the same run (verify.noise), and mistakes planted in memory must be
caught at that bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.verify import logits
from ckpt_tool.verify.diagnose import Diagnosis, diagnose
from ckpt_tool.verify.measure import CAPS, Bar, Distance, bar_for, distance
from ckpt_tool.verify.mistakes import to_plant
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.report import Finding, Status, Table, number
from ckpt_tool.verify.sides import Change, Phase, Side, phase_text
from ckpt_tool.verify.subject import Subject

LEVEL = "parity"
EVERY_ROW = "every row"  # the sweep over the embedding, beside the prompts
SWEEP = 512  # ids in a row of it
DIAGNOSED = 3  # differing phases that are looked into
BROKEN = (KeyError, IndexError, RuntimeError, ValueError)  # what a pass over tensors that do not fit raises


@dataclass
class Run:
    """One prompt on its way through the phases: the original's activations, the converted side's own, and the
    original's with reversed sums. `free` is None once the converted side could not go on."""

    name: str
    ids: Tensor
    x: Tensor
    free: Tensor | None
    noisy: Tensor


@dataclass
class Step:
    """What one phase showed. `distances` is by prompt; `broken` says why the converted side could not run
    it."""

    phase: Phase
    bar: Bar
    distances: dict[str, Distance]
    broken: str | None = None

    @property
    def holds(self) -> bool:
        return self.broken is None and all(self.bar.holds(d) for d in self.distances.values())

    @property
    def cannot_tell(self) -> bool:
        """Everything that is over its bar may be noise."""
        over = [d for d in self.distances.values() if not self.bar.holds(d)]
        return self.broken is None and bool(over) and all(self.bar.cannot_tell(d) for d in over)

    @property
    def worst(self) -> tuple[str, Distance]:
        return max(self.distances.items(), key=lambda item: (item[1].nmse, item[1].max_delta))


@dataclass
class Controls:
    """Mistakes planted in memory: (phase, name, NMSE it caused, caught)."""

    planted: list[tuple[Phase, str, float, bool]] = field(default_factory=list)

    @property
    def caught(self) -> int:
        return sum(caught for *_, caught in self.planted)


@dataclass
class Parity:
    """All that the lockstep run measured."""

    steps: list[Step] = field(default_factory=list)
    controls: Controls = field(default_factory=Controls)
    diagnoses: list[Diagnosis] = field(default_factory=list)
    logits: dict[str, logits.Logits] = field(default_factory=dict)


def lockstep(
    subject: Subject,
    original: Side,
    converted: Side,
    prompts: Mapping[str, list[int]],
    progress: Callable[[str], None] | None = None,
) -> Parity:
    """Run both sides phase by phase over all prompts, one phase's weights in memory at a time."""
    result = Parity()
    weights = original.weights[0]
    runs = []
    for name, row in prompts.items():
        ids = torch.tensor([row], device=weights.device)
        runs.append(Run(name, ids, ids, ids, ids))
    last = original.config.n_layers - 1
    for phase in original.phases:
        if progress is not None:
            progress(f"parity: {phase_text(phase)} of {original.config.n_layers} layers")
        with ExitStack() as stack:
            stack.enter_context(original.keep())
            stack.enter_context(converted.keep())
            inputs = {r.name: r.x for r in runs}
            step, shapes = _phase(original, converted, phase, runs, weights.dtype)
            outputs = {r.name: r.x for r in runs}
            if phase == "embed":
                _sweep(original, converted, step, inputs, outputs)
            result.steps.append(step)
            if not step.holds and len(result.diagnoses) < DIAGNOSED:
                cause = diagnose(subject, original, converted, phase, shapes, inputs, outputs, step.bar)
                result.diagnoses.append(cause)
            elif phase in ("embed", 0, last, "head") and step.holds:
                changes = to_plant(phase, subject.plan, shapes, subject.config)
                _control(result.controls, converted, phase, changes, inputs, outputs, step.bar)
    for r in runs:
        found = torch.full_like(r.x, math.nan) if r.free is None or r.free.shape != r.x.shape else r.free
        result.logits[r.name] = logits.compare(found, r.x, r.noisy, r.ids, weights.dtype)
    return result


def _phase(
    original: Side, converted: Side, phase: Phase, runs: list[Run], dtype: torch.dtype
) -> tuple[Step, dict[str, tuple[int, ...]]]:
    """One phase for every prompt; moves the runs on. Also the shapes of the converted tensors that it
    read."""
    noise, distances, broken = [], {}, None
    before = converted.weights[0].used.copy()
    converted.weights[0].used.clear()
    for r in runs:
        y = original.run(phase, r.x)
        with ReversedSums():
            noise.append(distance(original.run(phase, r.x), y))
            r.noisy = original.run(phase, r.noisy)
        try:
            distances[r.name] = distance(converted.run(phase, r.x), y)
        except BROKEN as error:
            broken = f"{type(error).__name__}: {error}"
            distances[r.name] = Distance(math.inf, math.inf, 0, float(y.abs().max()))
        if r.free is not None:
            try:
                r.free = converted.run(phase, r.free)
            except BROKEN:
                r.free = None
        r.x = y
    used = converted.weights[0].used
    shapes = {n: i.shape for n, i in converted.weights[0].tensors.items() if n in used}
    used |= before
    return Step(phase, bar_for(noise, dtype), distances, broken), shapes


def _sweep(
    original: Side, converted: Side, step: Step, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> None:
    """Every row of the embedding, whether a prompt uses it or not, in rows of a length that any model takes.
    The first block that differs joins `inputs` and `outputs` for the diagnosis."""
    vocabulary = int(converted.raw.get("vocab_size") or 0)
    device = original.weights[0].device
    for start in range(0, vocabulary, SWEEP):
        ids = torch.arange(start, min(start + SWEEP, vocabulary), device=device).view(1, -1)
        try:
            y = original.run("embed", ids)
            d = distance(converted.run("embed", ids), y)
        except BROKEN as error:
            step.broken = step.broken or f"{type(error).__name__}: {error}"
            return
        worst = step.distances.get(EVERY_ROW)
        if worst is None or d.nmse > worst.nmse:
            step.distances[EVERY_ROW] = Distance(d.max_delta, d.nmse, start + d.worst, d.magnitude)
        if not step.bar.holds(d) and EVERY_ROW not in inputs:
            inputs[EVERY_ROW], outputs[EVERY_ROW] = ids, y


def _control(
    controls: Controls,
    converted: Side,
    phase: Phase,
    changes: list[Change],
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    bar: Bar,
) -> None:
    """Plant each mistake, run the phase on all prompts until one shows it."""
    for change in changes:
        if not _alters(converted, change):
            continue
        changed = converted.changed(change)
        worst, caught = 0.0, False
        for name in sorted(inputs, key=lambda n: inputs[n].shape[1]):
            try:
                d = distance(changed.run(phase, inputs[name]), outputs[name])
            except BROKEN:
                worst, caught = math.inf, True
                break
            worst = max(worst, d.nmse)
            caught = not bar.holds(d)
            if caught:
                break
        controls.planted.append((phase, change.name, worst, caught))


def _alters(side: Side, change: Change) -> bool:
    """Whether a change changes anything: exchanging equal tensors, say, is no mistake."""
    try:
        made = change.tensors(side.ranks[0])
        config = side.changed(change).config
    except (KeyError, ValueError, RuntimeError):
        return False
    return config != side.config or any(not torch.equal(x, side.ranks[0][n]) for n, x in made.items())


# --- findings -------------------------------------------------------------------------------------------


def finding(check: str, status: Status, message: str, where: str | None = None, **more: Any) -> Finding:
    return Finding(LEVEL, check, status, message, where, **more)


def findings(
    result: Parity, original: Side, converted: Side, prompts: Mapping[str, list[int]]
) -> list[Finding]:
    """The level's findings, with the diagnosis of what differs."""
    dtype = original.weights[0].dtype
    whole = logits.finding(LEVEL, "logits of the whole pass", result.logits, dtype)
    made = [_layers(result, str(dtype).removeprefix("torch.")), whole, _controls(result)]
    if original.config.n_layers != converted.config.n_layers:
        text = f"expected {original.config.n_layers} layers, found {converted.config.n_layers} in config.json"
        made.insert(0, finding("layers", "fail", text, data={"exactness": "differs"}))
    return [*made, *_unseen(converted, prompts), *(d.finding() for d in result.diagnoses)]


def _layers(result: Parity, dtype: str) -> Finding:
    rows: list[tuple[str | float | None, ...]] = []
    for s in result.steps:
        prompt, d = s.worst
        words = "ok" if s.holds else "could not run" if s.broken else "differs"
        noise = s.bar.noise
        rows.append(
            (
                phase_text(s.phase), d.nmse, s.bar.nmse, noise.nmse, d.max_delta, s.bar.max_delta,
                d.magnitude, f"{prompt}[{d.worst}]", words,
            )
        )  # fmt: skip
    columns = ("phase", "NMSE", "bar", "noise", "|delta|", "bar", "|value|", "at", "")
    table = Table(columns, tuple(rows))
    failed = [s for s in result.steps if not s.holds and not s.cannot_tell]
    unsure = [s for s in result.steps if s.cannot_tell]
    if failed:
        first = failed[0]
        prompt, d = first.worst
        reason = f" ({first.broken})" if first.broken else ""
        others = f"{len(failed) - 1} later ones differ too" if len(failed) > 1 else "no other does"
        text = (
            f"the first phase that differs{reason}, {others}; worst in prompt {prompt} at position {d.worst}"
        )
        return finding(
            "lockstep", "fail", text, phase_text(first.phase),
            measured=d.nmse, bar=first.bar.nmse, tables=(table,),
            data={"exactness": "differs", "first": phase_text(first.phase),
                  "differing": [phase_text(s.phase) for s in failed]},
        )  # fmt: skip
    if unsure:
        text = (
            f"{phase_text(unsure[0].phase)} is over the cap {CAPS[dtype]:g} for {dtype}, {logits.CANNOT_TELL}"
        )
        return finding("lockstep", "skipped", text, tables=(table,))
    worst = max(result.steps, key=lambda s: s.worst[1].nmse)
    d = worst.worst[1]
    exactness = "bit-identical" if d.max_delta == 0 else "within noise floor"
    text = (
        f"embedding, {len(result.steps) - 2} layers and head agree on {len(result.logits)} prompts, {dtype}; "
        f"largest NMSE in {phase_text(worst.phase)} over a noise floor of {number(worst.bar.noise.nmse)}"
    )
    data = {"exactness": exactness, "phases": len(result.steps)}
    return finding("lockstep", "pass", text, measured=d.nmse, bar=worst.bar.nmse, data=data, tables=(table,))


def _controls(result: Parity) -> Finding:
    planted = result.controls.planted
    if not planted:
        reason = "no phase agreed, so there is no right side to plant a mistake in"
        return finding("negative control", "skipped", reason)
    hardest = sorted(planted, key=lambda row: (row[3], row[2]))
    table = Table(
        ("planted in", "mistake (smallest effect first)", "NMSE", "caught"),
        tuple((phase_text(p), name, x, "yes" if c else "NO") for p, name, x, c in hardest),
        brief=6,
    )
    missed = [f"{name} ({phase_text(p)})" for p, name, _, c in planted if not c]
    rate = result.controls.caught / len(planted)
    text = f"{result.controls.caught} of {len(planted)} planted mistakes are caught at these bars"
    if missed:
        text += f"; not caught: {', '.join(missed[:5])}"
    status: Status = "pass" if not missed else "fail"
    return finding(
        "negative control", status, text, measured=rate, bar=1.0, data={"rate": rate}, tables=(table,)
    )


def _unseen(converted: Side, prompts: Mapping[str, list[int]]) -> list[Finding]:
    """What these prompts cannot show; the bits level can."""
    made = []
    weights = converted.weights[0]
    ids = {i for row in prompts.values() for i in row}
    vocabulary = int(converted.raw.get("vocab_size") or 0)
    if len(ids) < vocabulary:
        text = (
            f"prompts send {len(ids):,} of {vocabulary:,} embedding rows through the layers; all rows were "
            "compared as they leave the embedding"
        )
        made.append(finding("unseen", "note", text, data={"rows": len(ids), "vocabulary": vocabulary}))
    unread = [n for n in weights if n not in weights.used]
    if unread:
        why = "experts never chosen, or unused"
        text = f"{len(unread)} of {len(weights)} tensors were not read by any prompt ({why})"
        made.append(finding("unseen", "note", text, ", ".join(unread[:3]), data={"tensors": unread[:100]}))
    window = converted.raw.get("sliding_window")
    longest = max(map(len, prompts.values()))
    if isinstance(window, int) and longest <= window:
        text = f"the longest prompt has {longest} tokens and cannot see the sliding window of {window}"
        made.append(finding("unseen", "note", text))
    return made
