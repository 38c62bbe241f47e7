"""Parity by several processes: each measures its share and writes that down; one joins it, and plants the
mistakes at the bars of all prompts.

What a prompt shows depends on no other prompt, but for the bar of a phase, which is that of all of them. So a
prompt that is run free goes through all phases with one worker. Of one that is not, the long ones of large
models, all workers make the original's own pass, and each the comparison of some phases. The one who joins
computes alone where that is not so (results of a few numbers are measured by their variance over all
prompts), where a phase differs, of which the cause is looked for in all prompts, and where a difference is
foretold: the report is that of one process in every case.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckpt_tool.convert.shares import Worker
from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass
from ckpt_tool.verify import foretold, logits, parity
from ckpt_tool.verify.controls import control
from ckpt_tool.verify.effort import Effort
from ckpt_tool.verify.measure import Bar, Distance, LogitDistance, bar_for
from ckpt_tool.verify.mistakes import to_plant
from ckpt_tool.verify.parity import NoPass, Parity
from ckpt_tool.verify.positions import Positions
from ckpt_tool.verify.prompts import Prompt
from ckpt_tool.verify.sides import Phase, Sample, Side, phase_text, tensors
from ckpt_tool.verify.steps import Step
from ckpt_tool.verify.subject import Subject
from ckpt_tool.verify.sweeps import sweep, sweeps

Tell = Callable[[str], None]
ALONE = "parity: all prompts are computed here, as"


class Alone(Exception):
    """One process must take all prompts; the message says why."""


@dataclass(frozen=True)
class Passed:
    """What prompts showed at one phase: `noise` of those of which it is measured in any case. `names` are the
    converted tensors that it read."""

    phase: Phase
    noise: Mapping[str, Distance]
    distances: Mapping[str, Distance]
    broken: str | None
    names: tuple[str, ...]
    compared: tuple[str, ...] = ()  # prompts, beside the rows of tables


@dataclass
class Walked:
    """What one worker's prompts showed. `inputs` has, for phases in which mistakes are planted, what the
    original gives them, by phase and prompt; `alone` says why it counts for nothing."""

    passed: list[Passed] = field(default_factory=list)
    logits: Mapping[str, logits.Logits] = field(default_factory=dict)
    inputs: dict[tuple[Phase, str], Tensor] = field(default_factory=dict)
    alone: str | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """Those of which anything was compared."""
        return tuple(dict.fromkeys(n for p in self.passed for n in p.compared))


# --- one worker -----------------------------------------------------------------------------------------


def dealt(prompts: Mapping[str, Prompt], effort: Effort, count: int) -> list[list[str]]:
    """The prompts of each worker that are run free: the longest first, each to who has least to do."""
    cost = {n: sum(map(len, p.ids)) for n, p in prompts.items() if effort.frees(n)}
    found: list[list[str]] = [[] for _ in range(count)]
    load = [0] * count
    for name in sorted(cost, key=lambda n: -cost[n]):
        least = min(range(count), key=load.__getitem__)
        found[least].append(name)
        load[least] += cost[name]
    return found


def walk(
    subject: Subject,
    original: Side,
    converted: Side,
    prompts: Mapping[str, Prompt],
    effort: Effort,
    worker: Worker,
    tell: Tell,
) -> Walked:
    """Take a worker's prompts through all phases of both sides."""
    result = Walked()
    try:
        _refuse_alone(subject, original, prompts)
        _walk(result, original, converted, prompts, effort, worker, tell)
    except (Alone, NoPass) as error:
        return Walked(alone=str(error))
    return result


def _refuse_alone(subject: Subject, original: Side, prompts: Mapping[str, Prompt]) -> None:
    if foretold.expected(subject):
        raise Alone("a difference is foretold, which is measured over all of them")
    if any(p.given for p in prompts.values()) or original.heads():
        raise Alone("the model has several heads or inputs, which are measured over all of them")


def _walk(
    result: Walked,
    original: Side,
    converted: Side,
    prompts: Mapping[str, Prompt],
    effort: Effort,
    worker: Worker,
    tell: Tell,
) -> None:
    shares, me = dealt(prompts, effort, worker.count), worker.number - 1
    mine = {n: p for n, p in prompts.items() if not effort.frees(n) or n in shares[me]}
    runs = parity.runs_of(original, mine, effort)
    kinds, seen = original.kinds(), Parity()
    for number, phase in enumerate(kinds):
        there = [r for r in runs if effort.has(phase, r.name)]
        taken = [r for r in there if r.is_free or number % worker.count == me]
        going_on = [r for r in there if r not in taken and kinds[phase] != "head"]
        tell(f"parity: {phase_text(phase)} of {original.config.n_layers} layers")
        with ExitStack() as stack:
            if phase == "embed":
                stack.enter_context(original.keep())
            stack.enter_context(converted.keep())
            own = parity.originals(original, phase, taken, effort, going_on)
            if not own:
                continue
            step, shapes = parity.compared(original, converted, phase, own)
            samples = {m.run.name: m.sample for m in own}
            if phase == "embed":
                for share in _of_sweeps(prompts, effort, worker):
                    for rows in sweeps(original, converted, shapes):
                        sweep(original, converted, step, samples, rows, share)
        if any(v is not None for m in own for v in m.sample.variances):
            raise Alone("the model gives a few numbers for a prompt, which are measured over all of them")
        noise = {m.run.name: m.noise for m in own if effort.measures(m.run.name)}
        known = {n: d for n, d in noise.items() if d is not None}
        result.passed.append(
            Passed(phase, known, step.distances, step.broken, tuple(shapes), tuple(m.run.name for m in own))
        )
        if effort.plants(phase, original.config.n_layers) and phase != "embed":
            result.inputs |= {(phase, m.run.name): _one_tensor(m.sample.x) for m in own}
    seen.heads = ("head",)
    parity.whole(seen, runs, converted, original.weights[0].dtype)
    result.logits = seen.logits.get("head", {})


def _of_sweeps(prompts: Mapping[str, Prompt], effort: Effort, worker: Worker) -> list[tuple[int, int]]:
    """Which of how many shares of the tables a worker compares: those who compare any prompt there, but for
    the one with the longest where there are others."""
    free = [k for k, own in enumerate(dealt(prompts, effort, worker.count)) if own]
    alone = not all(effort.frees(n) for n in prompts)  # the first phase's, of prompts that are not run free
    able = sorted({*free, *([0] if alone else [])})
    able = able[1:] or able
    return [(k, len(able)) for k, number in enumerate(able) if number == worker.number - 1]


def _one_tensor(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise Alone("its layers hand on more than one tensor")
    return x


# --- all of them ----------------------------------------------------------------------------------------


def joined(
    subject: Subject,
    original: Side,
    converted: Side,
    prompts: Mapping[str, Prompt],
    effort: Effort,
    walks: Sequence[Walked],
    tell: Tell,
) -> Parity | None:
    """What a lockstep run over all prompts shows; None where one process must make it."""
    try:
        result = _joined(original, prompts, effort, walks)
    except Alone as error:
        tell(f"{ALONE} {error}")
        return None
    inputs = {key: x for w in walks for key, x in w.inputs.items()}
    names = {n for w in walks for p in w.passed for n in p.names}
    for step in result.steps:
        if not effort.plants(step.phase, original.config.n_layers):
            continue
        tell(f"parity: mistakes in {phase_text(step.phase)}")
        read = {n for w in walks for p in w.passed if p.phase == step.phase for n in p.names}
        shapes = {n: i.shape for n, i in converted.weights[0].tensors.items() if n in read}
        with converted.keep():
            samples = _samples(original, step.phase, prompts, inputs, effort)
            changes = effort.chosen(to_plant(step.phase, subject.plan, shapes, converted, subject.packed))
            result.controls += control(original, converted, step.phase, changes, samples, step.bar)
    converted.weights[0].used |= names
    return result


def _joined(original: Side, prompts: Mapping[str, Prompt], effort: Effort, walks: Sequence[Walked]) -> Parity:
    """The steps and logits, without the mistakes."""
    if (why := next((w.alone for w in walks if w.alone is not None), None)) is not None:
        raise Alone(why)
    result = Parity(effort=effort, layers=original.config.n_layers)
    result.prompts = sum(effort.has("embed", name) for name in prompts)
    for phase in original.kinds():
        found = [p for w in walks for p in w.passed if p.phase == phase]
        if not found:
            continue
        told = {n for p in found for n in p.distances}
        if not told >= {n for n in prompts if effort.has(phase, n)}:
            raise Alone(f"not all of them went through {phase_text(phase)}")
        noise = {n: d for p in found for n, d in p.noise.items()}
        measured = [noise[n] for n in prompts if n in noise]
        if not measured:
            raise Alone(f"no noise was measured in {phase_text(phase)}")
        bar = bar_for(measured, original.weights[0].dtype)
        step = Step(phase, bar, _in_order(found, prompts), next((p.broken for p in found if p.broken), None))
        if not step.holds:
            raise Alone(f"{phase_text(phase)} differs")
        result.steps.append(step)
    ran = {str(s.phase) for s in result.steps}
    result.heads = tuple(h for h in ("head",) if h in ran)
    made = {n: x for w in walks for n, x in w.logits.items()}
    if not all(x.holds for x in made.values()):
        raise Alone("a whole pass differs")
    if made:
        result.logits["head"] = {n: made[n] for n in prompts if n in made}
    return result


def _in_order(found: Sequence[Passed], prompts: Mapping[str, Prompt]) -> dict[str, Distance]:
    """Those of all prompts, then the worst of each sweep, the first where several are as bad."""
    every = [(n, d) for p in found for n, d in p.distances.items()]
    made = {n: d for name in prompts for n, d in every if n == name}
    for name in dict.fromkeys(n for n, _ in every if n not in prompts):
        made[name] = min((d for n, d in every if n == name), key=lambda d: (-d.nmse, d.worst))
    return made


def _samples(
    original: Side,
    phase: Phase,
    prompts: Mapping[str, Prompt],
    inputs: Mapping[tuple[Phase, str], Tensor],
    effort: Effort,
) -> dict[str, Sample]:
    made, device = {}, original.weights[0].device
    with original.keep():
        for name, prompt in prompts.items():
            if effort.has(phase, name):
                x = tensors(prompt, device)[0] if phase == "embed" else inputs[phase, name].to(device)
                made[name] = Sample(x, original.run(phase, x))
    variances = logits.variances_of_each([s.wanted for s in made.values()])
    return {n: replace(s, variances=v) for (n, s), v in zip(made.items(), variances, strict=True)}


# --- what is written down -------------------------------------------------------------------------------


def key_of(
    prompts: Mapping[str, Prompt], dtype: str, device: str, mode: str, settings: Mapping[str, Any]
) -> str:
    """What workers must have in common beside the two checkpoints."""
    rows = {name: [p.ids, {k: v for k, v in sorted(p.given.items())}] for name, p in prompts.items()}
    told = [torch.__version__, dtype, device, mode, rows, dict(settings)]
    return sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def to_json(walked: Walked, key: str, path: Path) -> dict[str, Any]:
    """What was measured; the inputs go to the file at `path`."""
    return {
        "key": key,
        "alone": walked.alone,
        "prompts": list(walked.prompts),
        "steps": [
            [p.phase, _distances(p.noise), _distances(p.distances), p.broken, list(p.names)]
            for p in walked.passed
        ],
        "logits": {n: _logits(x) for n, x in walked.logits.items()},
        "inputs": _saved(walked.inputs, path),
    }


def from_json(said: Mapping[str, Any], path: Path) -> Walked | None:
    """None for what is not whole, or not of such a worker."""
    try:
        walked = Walked(alone=None if said["alone"] is None else str(said["alone"]))
        for phase, noise, distances, broken, names in said["steps"]:
            far = [{str(n): _distance(d) for n, d in found.items()} for found in (noise, distances)]
            own = broken if broken is None else str(broken)
            walked.passed.append(Passed(phase, far[0], far[1], own, tuple(map(str, names))))
        walked.logits = {str(n): _logits_of(x) for n, x in said["logits"].items()}
        if said["inputs"] is not None:
            if zlib.crc32(path.read_bytes()) != said["inputs"]:
                return None
            walked.inputs = {_place(k): x for k, x in load_file(path).items()}
    except (ValueError, TypeError, KeyError, AttributeError, OSError, SafetensorError):
        return None
    return walked


def _saved(inputs: Mapping[tuple[Phase, str], Tensor], path: Path) -> int | None:
    if not inputs:
        return None
    named = {json.dumps(key): x.detach().cpu().contiguous().clone() for key, x in inputs.items()}
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(named, part)
        data = part.read_bytes()
        os.replace(part, path)
    except OSError as error:
        fail("write-failed", f"cannot be written: {error.strerror}", file=path)
    return zlib.crc32(data)


def _place(key: str) -> tuple[Phase, str]:
    phase, name = json.loads(key)
    return phase, str(name)


def _distances(found: Mapping[str, Distance]) -> dict[str, list[Any]]:
    return {n: _numbers(d) for n, d in found.items()}


def _numbers(d: Distance) -> list[Any]:
    return [d.max_delta.hex(), d.nmse.hex(), d.worst, d.magnitude.hex()]


def _distance(said: Sequence[Any]) -> Distance:
    delta, nmse, worst, magnitude = said
    return Distance(float.fromhex(delta), float.fromhex(nmse), int(worst), float.fromhex(magnitude))


def _logits(x: logits.Logits) -> list[Any]:
    p, seen = x.logits, x.positions
    likely = None if p is None else [[v.hex() for v in (*p.kls, p.top1, p.top5, float(p.loss))], p.ties]
    drawn = None if seen is None else [[v.hex() for v in seen.delta], seen.differing, list(seen.top5)]
    bar = [x.bar.nmse.hex(), x.bar.max_delta.hex(), _numbers(x.bar.noise)]
    return [_numbers(x.distance), likely, bar, x.tokens, drawn]


def _logits_of(said: Sequence[Any]) -> logits.Logits:
    far, likely, (nmse, delta, noise), tokens, drawn = said
    found = seen = None
    if likely is not None:
        *kls, top1, top5, loss = map(float.fromhex, likely[0])
        found = LogitDistance(tuple(kls), top1, top5, loss, int(likely[1]))
    if drawn is not None:
        seen = Positions(tuple(map(float.fromhex, drawn[0])), int(drawn[1]), tuple(drawn[2]))
    bar = Bar(float.fromhex(nmse), float.fromhex(delta), _distance(noise))
    return logits.Logits(_distance(far), found, bar, int(tokens), seen)
