"""Level 3: do they compute the same? The original layout's own reading against the Hugging Face layout's, in
lockstep.

Each layer of both sides is fed the original's input to that layer, so the first layer that differs is named
and errors do not pile up; a second run lets the converted side run free, as a user of it would. Every bar
comes from the noise floor measured in the same run (verify.noise), and mistakes planted in memory must be
caught at that bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.reference.phases import Tree, mapped
from ckpt_tool.verify import equivalence, foretold, logits
from ckpt_tool.verify.binomial import interval
from ckpt_tool.verify.diagnose import Diagnosis, diagnose
from ckpt_tool.verify.measure import CAPS, Bar, Distance, bar_for, wider
from ckpt_tool.verify.mistakes import to_plant
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.prompts import ENTITIES, Prompt, table_rows
from ckpt_tool.verify.report import Finding, Status, Table, number
from ckpt_tool.verify.sides import (
    BROKEN,
    Change,
    Phase,
    Sample,
    Side,
    Tensors,
    holds_numbers,
    phase_text,
    same,
    tensors,
)
from ckpt_tool.verify.subject import Subject

LEVEL = "parity"
EVERY_ROW = "every row"  # the sweep over the embedding, beside the prompts
EVERY_ENTITY = "every entity"
PLACES = "entity_embeddings.position_embeddings.weight"  # positions where entities are mentioned
SWEEP = 512  # ids at once
DIAGNOSED = 3  # differing phases that are looked into


class NoPass(Exception):
    """The original's own pass cannot run; the message says so as a user is told it."""


@dataclass
class Run:
    """One prompt on its way through the phases: its ids and further inputs, the original's activations, the
    converted side's own, and the original's with reversed sums. `free` is None once the converted side could
    not go on. `made` has these three for each head."""

    name: str
    ids: Tensor
    given: dict[str, Tensor]
    x: Tree
    free: Tree
    noisy: Tree
    made: dict[str, tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=dict)


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


@dataclass
class Parity:
    """All that the lockstep run measured."""

    steps: list[Step] = field(default_factory=list)
    controls: list[Planted] = field(default_factory=list)
    foretold: list[foretold.Met] = field(default_factory=list)
    diagnoses: list[Diagnosis] = field(default_factory=list)
    logits: dict[str, dict[str, logits.Logits]] = field(default_factory=dict)  # by head, by prompt


def lockstep(
    subject: Subject,
    original: Side,
    converted: Side,
    prompts: Mapping[str, Prompt],
    progress: Callable[[str], None] | None = None,
) -> Parity:
    """Run both sides phase by phase over all prompts, one phase's weights in memory at a time. NoPass where
    the original's tensors or numbers do not fit together."""
    result = Parity()
    weights = original.weights[0]
    runs = []
    for name, prompt in prompts.items():
        ids, given = tensors(prompt, weights.device)
        runs.append(Run(name, ids, given, ids, ids, ids))
    last = original.config.n_layers - 1
    expected = foretold.expected(subject)
    kinds = original.kinds([{}, *(r.given for r in runs)])
    heads = [str(phase) for phase, kind in kinds.items() if kind == "head"]
    for phase in kinds:
        if progress is not None:
            progress(f"parity: {phase_text(phase)} of {original.config.n_layers} layers")
        with ExitStack() as stack:
            stack.enter_context(original.keep())
            stack.enter_context(converted.keep())
            known = expected.get(phase)
            side = foretold.taken_back(converted, known)
            own = _wanted(original, phase, runs)
            if not own:
                continue  # a head of what no prompt has
            step, shapes, samples = _phase(original, side, phase, own, weights.dtype)
            if phase == "embed":
                for rows in _sweeps(original, side, shapes):
                    _sweep(original, side, step, samples, rows)
            result.steps.append(step)
            if known is not None and step.broken is None:
                met = foretold.measure(known, converted, phase, samples, step.bar, step.holds)
                result.foretold.append(met)
            if not step.holds and len(result.diagnoses) < DIAGNOSED:
                cause = diagnose(subject, original, side, phase, shapes, samples, step.bar)
                result.diagnoses.append(cause)
            elif (isinstance(phase, str) or phase in (0, last)) and step.holds:
                changes = to_plant(phase, subject.plan, shapes, side)
                result.controls += _control(side, phase, changes, samples, step.bar)
    for head in heads:
        passes = []
        for r in runs:
            if head in r.made:
                wanted, free, noisy = r.made[head]
                passes.append(logits.Pass(r.name, Sample(r.ids, wanted, r.given), free, noisy))
        if passes:
            kind = logits.kind_of(head, passes[0].sample.wanted, converted.vocabulary)
            result.logits[head] = logits.by_prompt(passes, weights.dtype, kind)
    return result


def _wanted(original: Side, phase: Phase, runs: list[Run]) -> list[tuple[Run, Tree]]:
    """The runs that have this phase, and what the original makes of it; a head may be of what only some
    prompts have, such as entities."""
    made = [(r, _own(original, phase, r.x, r.given)) for r in runs if original.has(phase, r.given)]
    return made if isinstance(phase, int) else [(r, y) for r, y in made if holds_numbers(y)]


def _phase(
    original: Side, converted: Side, phase: Phase, own: list[tuple[Run, Tree]], dtype: torch.dtype
) -> tuple[Step, dict[str, tuple[int, ...]], dict[str, Sample]]:
    """One phase for every prompt that has it; moves the runs on, unless it is a head. Also the shapes of the
    converted tensors that it read, and the samples by prompt."""
    noise, distances, broken = [], {}, None
    before = converted.weights[0].used.copy()
    converted.weights[0].used.clear()
    runs, wanted = [r for r, _ in own], [y for _, y in own]
    variances = logits.variances_of_each(wanted)
    samples = {r.name: Sample(r.x, y, r.given, v) for r, y, v in zip(runs, wanted, variances, strict=True)}
    for r, sample in zip(runs, samples.values(), strict=True):
        with ReversedSums():
            noise.append(sample.of(_own(original, phase, r.x, r.given)))
            noisy = _own(original, phase, r.noisy, r.given)
        try:
            distances[r.name] = sample.of(converted.run(phase, r.x, r.given))
        except BROKEN as error:
            broken = f"{type(error).__name__}: {error}"
            distances[r.name] = Distance(math.inf, math.inf, 0, sample.of(sample.wanted).magnitude)
        free = None
        if r.free is not None:
            with suppress(*BROKEN):
                free = converted.run(phase, r.free, r.given)
        if original.reading(r.given)[phase].kind == "head":
            r.made[str(phase)] = sample.wanted, free, noisy
        else:
            r.x, r.free, r.noisy = sample.wanted, free, noisy
    used = converted.weights[0].used
    shapes = {n: i.shape for n, i in converted.weights[0].tensors.items() if n in used}
    used |= before
    return Step(phase, bar_for(noise, dtype), distances, broken), shapes, samples


def _own(original: Side, phase: Phase, x: Tree, given: Tensors) -> Tree:
    try:
        return original.run(phase, x, given)
    except BROKEN as error:
        text = f"the original's own pass cannot run: {type(error).__name__}: {error}"
        raise NoPass(text) from error


@dataclass(frozen=True)
class Sweep:
    """A table whose rows are each sent through the embedding: `inputs` makes a batch of ids (B, 1) and the
    further inputs of a prompt each out of numbers of rows (B, 1)."""

    name: str
    rows: int
    inputs: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


def _sweeps(original: Side, converted: Side, shapes: Mapping[str, tuple[int, ...]]) -> list[Sweep]:
    """Of the words, and of the entities where a pass takes them. Where ids are hashed to fewer rows, each row
    has one of twice as many ids that follow each other."""
    table = max((shape[0] for shape in shapes.values() if shape), default=0)
    made = [Sweep(EVERY_ROW, min(converted.vocabulary, 2 * table), lambda ids: (ids, {}))]
    named = converted.raw.get("entity_vocab_size")
    if type(named) is int and set(ENTITIES) <= {*original.inputs} & {*converted.inputs}:
        places = max((shape[0] for n, shape in shapes.items() if n.endswith(PLACES)), default=1)
        as_entities = partial(_as_entities, named=named, places=places)
        made.append(Sweep(EVERY_ENTITY, max(named, places), as_entities))
    return made


def _as_entities(rows: Tensor, named: int, places: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Prompts of the first word alone, each with an entity, and each somewhere else: all of both tables."""
    zeros = torch.zeros_like(rows)
    positions = (rows % places)[..., None]
    return zeros, {"entity_ids": rows % named, "entity_mask": zeros + 1, "entity_positions": positions}


def _sweep(original: Side, converted: Side, step: Step, samples: dict[str, Sample], rows: Sweep) -> None:
    """Every row of a table, whether a prompt uses it or not, each as a prompt of its own. The first block
    that differs joins the samples for the diagnosis."""
    device = original.weights[0].device
    for start in range(0, rows.rows, SWEEP):
        at = torch.arange(start, min(start + SWEEP, rows.rows), device=device).view(-1, 1)
        ids, given = rows.inputs(at)
        try:
            sample = Sample(ids, original.run("embed", ids, given), given)
            one_row = [mapped(_as_one_row, y) for y in (sample.wanted, converted.run("embed", ids, given))]
            d = Sample(ids, one_row[0]).of(one_row[1])
        except BROKEN as error:
            step.broken = step.broken or f"{type(error).__name__}: {error}"
            return
        worst = step.distances.get(rows.name)
        if worst is None or d.nmse > worst.nmse:
            step.distances[rows.name] = Distance(d.max_delta, d.nmse, start + d.worst, d.magnitude)
        if not step.bar.holds(d) and rows.name not in samples:
            samples[rows.name] = sample


def _as_one_row(y: Tensor) -> Tensor:
    """(B, 1, C), a batch of prompts of one token each, as one prompt of B tokens."""
    return y.transpose(0, 1) if y.ndim > 2 else y


def _control(
    converted: Side,
    phase: Phase,
    changes: list[Change],
    samples: Mapping[str, Sample],
    bar: Bar,
) -> list[Planted]:
    """Plant each mistake, run the phase on all prompts until one shows it; those that none shows are looked
    at in wider precisions."""
    made, missed = [], []
    for change in changes:
        if not _alters(converted, change):
            continue
        changed = converted.changed(change)
        if change.config and not _reaches(converted, changed, phase, samples):
            continue
        worst, caught = 0.0, False
        for sample in sorted(samples.values(), key=lambda s: s.tokens):
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


def _alters(side: Side, change: Change) -> bool:
    """Whether a change changes anything: exchanging equal tensors, say, is no mistake."""
    try:
        made = change.tensors(side.ranks[0])
        config = side.changed(change).config
    except (KeyError, ValueError, RuntimeError):
        return False
    return config != side.config or any(not torch.equal(x, side.ranks[0][n]) for n, x in made.items())


def _reaches(side: Side, changed: Side, phase: Phase, samples: Mapping[str, Sample]) -> bool:
    """Whether a phase depends on what was changed at all: a gelu is not in every head."""
    for sample in sorted(samples.values(), key=lambda s: s.tokens):
        try:
            one, other = (s.run(phase, sample.x, sample.given) for s in (side, changed))
        except BROKEN:
            return True
        if not same(one, other):
            return True
    return False


# --- findings -------------------------------------------------------------------------------------------


def finding(check: str, status: Status, message: str, where: str | None = None, **more: Any) -> Finding:
    return Finding(LEVEL, check, status, message, where, **more)


def findings(
    result: Parity,
    original: Side,
    converted: Side,
    prompts: Mapping[str, Prompt],
    accepted: Collection[str] = (),
) -> list[Finding]:
    """The level's findings, with the diagnosis of what differs; `accepted` are the names of foretold
    differences."""
    dtype = original.weights[0].dtype
    whole = [
        logits.finding(
            LEVEL, f"{_of(head, found)} of the whole pass", found, dtype, None if head == "head" else head
        )
        for head, found in result.logits.items()
    ]
    name = str(dtype).removeprefix("torch.")
    taken_back = list(dict.fromkeys(m.foretold.name for m in result.foretold))
    made = [_layers(result, name), *whole]
    made += equivalence.findings(LEVEL, result.logits.get("head", {}), name, taken_back)
    made += [*foretold.findings(LEVEL, result.foretold, accepted), *_controls(result, dtype)]
    if original.config.n_layers != converted.config.n_layers:
        text = f"expected {original.config.n_layers} layers, found {converted.config.n_layers} in config.json"
        made.insert(0, finding("layers", "fail", text, data={"exactness": "differs"}))
    made += [*_unasked(original, converted, prompts, result), *_unseen(converted, prompts)]
    return [*made, *(d.finding() for d in result.diagnoses)]


def _of(head: str, found: Mapping[str, logits.Logits]) -> str:
    first = "last hidden state" if all(x.logits is None for x in found.values()) else "logits"
    return first if head == "head" else head.replace("_", " ")


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
        return finding("lockstep", "undecided", text, tables=(table,))
    worst = max(result.steps, key=lambda s: s.worst[1].nmse)
    d = worst.worst[1]
    layers = sum(isinstance(s.phase, int) for s in result.steps)
    heads = "head" if len(result.logits) == 1 else f"{len(result.logits)} heads"
    apart = [s.phase for s in result.steps if isinstance(s.phase, str)]
    stages = "".join(f", {p}" for p in apart if p != "embed" and p not in result.logits)
    exactness = "bit-identical" if d.max_delta == 0 else "within noise floor"
    text = (
        f"embedding, {layers} layers{stages} and {heads} agree on {len(result.logits['head'])} prompts, "
        f"{dtype}; largest NMSE in {phase_text(worst.phase)} over a noise floor of "
        f"{number(worst.bar.noise.nmse)}"
    )
    if result.foretold:
        names = ", ".join(dict.fromkeys(m.foretold.name for m in result.foretold))
        text += f"; with {names} taken back in {', '.join(phase_text(m.phase) for m in result.foretold)}"
    data = {"exactness": exactness, "phases": len(result.steps)}
    return finding("lockstep", "pass", text, measured=d.nmse, bar=worst.bar.nmse, data=data, tables=(table,))


def _controls(result: Parity, dtype: torch.dtype) -> list[Finding]:
    planted = result.controls
    if not planted:
        reason = "no phase agreed, so there is no right side to plant a mistake in"
        return [finding("negative control", "skipped", reason)]
    hardest = sorted(planted, key=lambda p: (p.caught, p.nmse))
    table = Table(
        ("planted in", "mistake (smallest effect first)", "NMSE", "caught"),
        tuple((phase_text(p.phase), p.name, p.nmse, p.words) for p in hardest),
        brief=6,
    )
    caught = sum(p.caught for p in planted)
    missed = [p for p in planted if not p.caught and not p.blind]
    blind = [p for p in planted if p.blind]
    low, high = interval(caught, len(planted))
    text = (
        f"{caught} of {len(planted)} planted mistakes are caught at these bars (95 % interval of the rate "
        f"{low:.1%} to {high:.1%})"
    )
    if missed:
        text += f"; not caught: {_named(missed)}"
    if blind:
        text += f"; {_precision(blind, str(dtype).removeprefix('torch.'))}"
    rate = caught / len(planted)
    status: Status = "fail" if missed else "undecided" if blind else "pass"
    data = {
        "rate": rate,
        "interval": [round(low, 6), round(high, 6)],
        "more_is_better": True,
        "blind": [[phase_text(p.phase), p.name, p.seen_in] for p in blind],
    }
    return [finding("negative control", status, text, measured=rate, bar=1.0, data=data, tables=(table,))]


def _named(planted: list[Planted]) -> str:
    more = f" and {len(planted) - 3} more" if len(planted) > 3 else ""
    return ", ".join(f"{p.name} ({phase_text(p.phase)})" for p in planted[:3]) + more


def _precision(blind: list[Planted], dtype: str) -> str:
    """Which mistakes a precision is too coarse for, and which one is not."""
    seen = [p.seen_in for p in blind if p.seen_in is not None]
    text = f"{dtype} cannot see {len(blind)}: {_named(blind)}"
    if not seen:
        return f"{text}; nor can a wider one: they have no effect on these prompts"
    widest = max(seen, key=wider(dtype).index)
    return f"{text}; --compute-dtype {widest} sees {'them' if len(blind) > 1 else 'it'}"


def _unasked(original: Side, converted: Side, prompts: Mapping[str, Prompt], result: Parity) -> list[Finding]:
    """Heads, and inputs of both sides, that no prompt has reached."""
    made = []
    held = dict.fromkeys([*original.heads(), *converted.heads()])
    if silent := [head for head in held if head not in result.logits]:
        text = f"not compared, as the other side or every prompt lacks it: {', '.join(silent)}"
        made.append(finding("unseen", "note", text, data={"heads": silent}))
    taken = {*original.inputs} & {*converted.inputs}
    if converted.raw.get("type_vocab_size") in (0, 1):
        taken -= {"token_types"}  # there is one type
    if missed := sorted(taken - {name for p in prompts.values() for name in p.given}):
        text = f"no prompt has {', '.join(missed)}: what a pass makes of it was not compared"
        made.append(finding("unseen", "note", text, data={"inputs": missed}))
    return made


def _unseen(converted: Side, prompts: Mapping[str, Prompt]) -> list[Finding]:
    """What these prompts cannot show; the bits level can."""
    made = []
    weights = converted.weights[0]
    rows = [row for prompt in prompts.values() for row in prompt.ids]
    ids = {i for row in rows for i in row}
    vocabulary = converted.vocabulary
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
    longest, window = max(map(len, rows)), max(converted.windows or (), default=0)
    if longest <= window:
        text = f"the longest prompt has {longest} tokens and cannot see the sliding window of {window}"
        made.append(finding("unseen", "note", text))
    return [*made, *_beyond(converted, longest)]


def _beyond(converted: Side, longest: int) -> Iterator[Finding]:
    """Positions after the end of the longest prompt; those of entities are all compared with the entities."""
    for name, info in converted.weights[0].tensors.items():
        rows = table_rows(info, bool(converted.raw.get("use_chunking")))
        if rows is not None and not name.endswith(PLACES) and longest < (most := converted.fits(rows)):
            text = f"the longest prompt has {longest:,} tokens: others of {most:,} positions were not seen"
            yield finding("unseen", "note", text, name, data={"positions": longest, "table": most})
            return
