"""Level 3: do they compute the same? The original layout's own reading against the Hugging Face layout's, in
lockstep.

Each layer of both sides is fed the original's input to that layer, so the first layer that differs is named
and errors do not pile up; a second run lets the converted side run free, as a user of it would. Every bar
comes from the noise floor measured in the same run (verify.noise), and mistakes planted in memory must be
caught at that bar."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.records import dataclass
from ckpt_tool.reference.phases import Tree, leaves, mapped
from ckpt_tool.verify import equivalence, foretold, logits
from ckpt_tool.verify.binomial import interval
from ckpt_tool.verify.controls import Planted, Wider, control
from ckpt_tool.verify.diagnose import Diagnosis, diagnose
from ckpt_tool.verify.effort import THOROUGH, Effort, layers_text, sampled
from ckpt_tool.verify.measure import Bar, Distance, bar_for, cap_of, wider
from ckpt_tool.verify.mistakes import to_plant
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.pace import Pace
from ckpt_tool.verify.prompts import Prompt, table_rows
from ckpt_tool.verify.report import Finding, Status, Table, number
from ckpt_tool.verify.sides import (
    BROKEN,
    Phase,
    Sample,
    Side,
    Tensors,
    holds_numbers,
    phase_text,
    tensors,
)
from ckpt_tool.verify.steps import Step
from ckpt_tool.verify.subject import Subject
from ckpt_tool.verify.sweeps import PLACES, sweep, sweeps

LEVEL = "parity"
DIAGNOSED = 3  # differing phases that are looked into


# By prompt, of those that went through every layer: what each head of the original gives, and the same with
# reversed sums.
WholePasses = Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]


class NoPass(Exception):
    """The original's own pass cannot run; the message says so as a user is told it."""


@dataclass
class Run:
    """One prompt on its way through the phases: its ids and further inputs, the original's activations, the
    converted side's own, and the original's with reversed sums. The last two are there where the prompt
    `is_free`, and `free` is None once the converted side could not go on. `made` has these three for each
    head."""

    name: str
    ids: Tensor
    given: dict[str, Tensor]
    x: Tree
    free: Tree
    noisy: Tree
    is_free: bool = True
    made: dict[str, tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=dict)


@dataclass
class Parity:
    """All that the lockstep run measured."""

    steps: list[Step] = field(default_factory=list)
    controls: list[Planted] = field(default_factory=list)
    foretold: list[foretold.Met] = field(default_factory=list)
    diagnoses: list[Diagnosis] = field(default_factory=list)
    logits: dict[str, dict[str, logits.Logits]] = field(default_factory=dict)  # by head, by prompt
    effort: Effort = THOROUGH
    layers: int = 0  # that the original has
    prompts: int = 0  # that ran
    heads: tuple[str, ...] = ()  # that a prompt reached
    whole: WholePasses = field(default_factory=dict)


def lockstep(
    subject: Subject,
    original: Side,
    converted: Side,
    prompts: Mapping[str, Prompt],
    progress: Callable[[str], None] | None = None,
    effort: Effort = THOROUGH,
    pace: Pace | None = None,
) -> Parity:
    """Run both sides phase by phase over all prompts, as far as `effort` says, with the weights of one phase
    of one side in memory at a time. NoPass where the original's tensors or numbers do not fit together."""
    result = Parity(effort=effort, layers=original.config.n_layers)
    runs = runs_of(original, prompts, effort)
    result.prompts = sum(effort.has("embed", r.name) for r in runs)
    expected = foretold.expected(subject)
    kinds = original.kinds([{}, *(r.given for r in runs)])
    for phase in kinds:
        taken = [r for r in runs if effort.has(phase, r.name)]
        if not taken:
            continue
        if progress is not None:
            left = pace.left() if pace is not None else ""
            progress(f"parity: {phase_text(phase)} of {result.layers} layers{left}")
        with ExitStack() as stack:
            swept = stack.enter_context(ExitStack())
            if phase == "embed":
                swept.enter_context(original.keep())  # which the sweeps run many times
            stack.enter_context(converted.keep())
            known = expected.get(phase)
            side = foretold.taken_back(converted, known)
            own = originals(original, phase, taken, effort)
            if not own:
                continue  # a head of what no prompt has
            step, shapes = compared(original, side, phase, own)
            samples = {m.run.name: m.sample for m in own}
            if phase == "embed":
                for rows in sweeps(original, side, shapes):
                    sweep(original, side, step, samples, rows)
            swept.close()  # before mistakes are planted, which makes copies of the other side's
            result.steps.append(step)
            if known is not None and step.broken is None:
                met = foretold.measure(known, converted, phase, samples, step.bar, step.holds)
                result.foretold.append(met)
            if not step.holds and len(result.diagnoses) < DIAGNOSED:
                with original.keep():
                    cause = diagnose(subject, original, side, phase, shapes, samples, step.bar)
                result.diagnoses.append(cause)
            elif effort.plants(phase, result.layers) and step.holds:
                changes = effort.chosen(to_plant(phase, subject.plan, shapes, side, subject.packed))
                result.controls += control(original, side, phase, changes, samples, step.bar)
        if pace is not None:
            pace.add(phase)
    ran = {str(s.phase) for s in result.steps}
    result.heads = tuple(str(p) for p, kind in kinds.items() if kind == "head" and str(p) in ran)
    whole(result, runs, converted, original.weights[0].dtype)
    return result


def runs_of(original: Side, prompts: Mapping[str, Prompt], effort: Effort) -> list[Run]:
    made = []
    for name, prompt in prompts.items():
        ids, given = tensors(prompt, original.weights[0].device)
        is_free = effort.frees(name)
        own = ids if is_free else None
        made.append(Run(name, ids, given, ids, own, own, is_free))
    return made


def whole(result: Parity, runs: list[Run], converted: Side, dtype: torch.dtype) -> None:
    """The results of every head at the end of the free runs."""
    if result.effort.layers is None:
        result.whole = {
            r.name: {head: (wanted, noisy) for head, (wanted, _, noisy) in r.made.items()}
            for r in runs
            if r.made and r.name not in result.effort.reach
        }
    for head in result.heads:
        passes = []
        for r in runs:
            if head in r.made:
                wanted, free, noisy = r.made[head]
                passes.append(logits.Pass(r.name, Sample(r.ids, wanted, r.given), free, noisy))
        if passes:
            kind = logits.kind_of(head, passes[0].sample.wanted, converted.vocabulary)
            result.logits[head] = logits.by_prompt(passes, dtype, kind)


@dataclass
class Made:
    """What the original makes of one prompt at one phase. `noise` is how far it moves with reversed sums,
    None where that was not measured; `noisy` what that gives of the run with reversed sums."""

    run: Run
    sample: Sample
    noise: Distance | None = None
    noisy: Tree = None


def originals(
    original: Side, phase: Phase, runs: list[Run], effort: Effort, going_on: Sequence[Run] = ()
) -> list[Made]:
    """The original's own share of a phase; its weights are let go of afterwards. Those `going_on` are moved
    on only."""
    with original.keep():
        for r in going_on:
            r.x = _own(original, phase, r.x, r.given)
        own = _wanted(original, phase, runs)
        variances = logits.variances_of_each([y for _, y in own])
        made = []
        for (r, y), v in zip(own, variances, strict=True):
            m = Made(r, Sample(r.x, y, r.given, v))
            if effort.measures(r.name):
                _noise(original, phase, m)
            elif r.is_free:
                with ReversedSums():
                    m.noisy = _own(original, phase, r.noisy, r.given)
            made.append(m)
    return made


def _noise(original: Side, phase: Phase, m: Made) -> None:
    """The phase with reversed sums: of the original's own activations and, of a prompt that is still on its
    way to the phase, of those that had them before."""
    r, x, given = m.run, m.sample.x, m.run.given
    with ReversedSums():
        if r.is_free and r.x is x and r.noisy is not x:
            again, m.noisy = _both(partial(_own, original, phase, given=given), x, r.noisy, given)
        else:
            again = _own(original, phase, x, given)
            m.noisy = again if r.is_free and m.noisy is None else m.noisy
    m.noise = m.sample.of(again)


def _both(run: Callable[[Tree], Tree], x: Tree, y: Tree, given: Tensors) -> tuple[Tree, Tree]:
    """What a phase makes of two inputs: in one pass over its weights, where an input is one tensor alone and
    all that is made of it is by the batch."""
    if given or not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.shape != y.shape:
        return run(x), run(y)
    made, n = run(torch.cat([x, y])), len(x)
    if any(t.ndim == 0 or len(t) != 2 * n for t in leaves(made)):
        return run(x), run(y)
    return mapped(lambda t: t[:n], made), mapped(lambda t: t[n:], made)


def _wanted(original: Side, phase: Phase, runs: list[Run]) -> list[tuple[Run, Tree]]:
    """The runs that have this phase, and what the original makes of it; a head may be of what only some
    prompts have, such as entities."""
    made = [(r, _own(original, phase, r.x, r.given)) for r in runs if original.has(phase, r.given)]
    return made if isinstance(phase, int) else [(r, y) for r, y in made if holds_numbers(y)]


def compared(
    original: Side, converted: Side, phase: Phase, own: list[Made]
) -> tuple[Step, dict[str, tuple[int, ...]]]:
    """The converted side's share of a phase; moves the runs on, unless it is a head. Also the shapes of the
    converted tensors that it read."""
    distances, broken = {}, None
    before = converted.weights[0].used.copy()
    converted.weights[0].used.clear()
    for m in own:
        r, sample = m.run, m.sample
        found = free = None
        try:
            found, free = _found(converted, phase, r)
            distances[r.name] = sample.of(found)
        except BROKEN as error:
            broken = f"{type(error).__name__}: {error}"
            distances[r.name] = Distance(math.inf, math.inf, 0, sample.of(sample.wanted).magnitude)
        if original.reading(r.given)[phase].kind != "head":
            alike = distances[r.name].max_delta == 0 and free is found and found is not None
            r.x, r.noisy = sample.wanted, m.noisy
            r.free = sample.wanted if alike else free
        elif r.is_free:
            r.made[str(phase)] = sample.wanted, free, m.noisy
    used = converted.weights[0].used
    shapes = {n: i.shape for n, i in converted.weights[0].tensors.items() if n in used}
    used |= before
    return Step(phase, _bar(original, phase, own, distances), distances, broken), shapes


def _found(converted: Side, phase: Phase, r: Run) -> tuple[Tree, Tree]:
    """What the converted side makes of the original's activations and, where it runs free, of its own: these
    are the same one until it makes anything else."""
    run = partial(converted.run, phase, given=r.given)
    if not r.is_free or r.free is None:
        return run(r.x), None
    if r.free is r.x:
        found = run(r.x)
        return found, found
    with suppress(*BROKEN):
        return _both(run, r.x, r.free, r.given)
    return run(r.x), None  # its own activations do not go on


def _bar(original: Side, phase: Phase, own: list[Made], distances: Mapping[str, Distance]) -> Bar:
    """From the noise that was measured; a prompt that is over it, and of which it was not, has it measured
    before anything is said of it."""
    dtype = original.weights[0].dtype
    bar = bar_for(
        [m.noise for m in own if m.noise is not None] or [_first_noise(original, phase, own)], dtype
    )
    for m in own:
        if (
            m.noise is None
            and not bar.holds(distances[m.run.name])
            and math.isfinite(distances[m.run.name].nmse)
        ):
            _noise(original, phase, m)
            bar = bar_for([m.noise for m in own if m.noise is not None], dtype)
    return bar


def _first_noise(original: Side, phase: Phase, own: list[Made]) -> Distance:
    """That of the shortest prompt, where a phase has only such as are not measured in any case."""
    m = min(own, key=lambda m: m.sample.tokens)
    _noise(original, phase, m)
    assert m.noise is not None
    return m.noise


def _own(original: Side, phase: Phase, x: Tree, given: Tensors) -> Tree:
    try:
        return original.run(phase, x, given)
    except BROKEN as error:
        text = f"the original's own pass cannot run: {type(error).__name__}: {error}"
        raise NoPass(text) from error


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
    made += [*_left_out(result.effort), *_unasked(original, converted, prompts, result)]
    ran = {n: p for n, p in prompts.items() if result.effort.has("embed", n)}
    made += _unseen(converted, ran, sampled(result.effort, result.layers) is not None)
    return [*made, *(d.finding() for d in result.diagnoses)]


def _left_out(effort: Effort) -> list[Finding]:
    """What the mode left out; `--thorough` leaves nothing out."""
    if not effort.left_out:
        return []
    text = f"{effort.mode}: {'; '.join(effort.left_out)} (--thorough runs all)"
    return [finding("left out", "note", text, data={"mode": effort.mode, "left_out": list(effort.left_out)})]


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
        text = f"{phase_text(unsure[0].phase)} is over {cap_of(dtype)}, {logits.CANNOT_TELL}"
        if math.isinf(unsure[0].bar.noise.max_delta):
            text = (
                f"{phase_text(unsure[0].phase)} of the original itself gives what is not finite: not compared"
            )
        return finding("lockstep", "undecided", text, tables=(table,))
    return _agreed(result, dtype, table)


def _agreed(result: Parity, dtype: str, table: Table) -> Finding:
    """Every phase that ran is within its bar."""
    worst = max(result.steps, key=lambda s: s.worst[1].nmse)
    d = worst.worst[1]
    numbered = [s.phase for s in result.steps if isinstance(s.phase, int)]
    part = sampled(result.effort, result.layers)
    layers = f"{len(numbered)} layers" if part is None else f"{layers_text(numbered)} of {result.layers}"
    heads = "head" if len(result.heads) == 1 else f"{len(result.heads)} heads"
    apart = [s.phase for s in result.steps if isinstance(s.phase, str)]
    stages = "".join(f", {p}" for p in apart if p != "embed" and p not in result.heads)
    exactness = "bit-identical" if d.max_delta == 0 else "within noise floor"
    prompts = f"{result.prompts} prompt{'s' * (result.prompts != 1)}"
    text = (
        f"embedding, {layers}{stages} and {heads} agree on {prompts}, "
        f"{dtype}; largest NMSE in {phase_text(worst.phase)} over a noise floor of "
        f"{number(worst.bar.noise.nmse)}"
    )
    if result.foretold:
        names = ", ".join(dict.fromkeys(m.foretold.name for m in result.foretold))
        text += f"; with {names} taken back in {', '.join(phase_text(m.phase) for m in result.foretold)}"
    data: dict[str, Any] = {"exactness": exactness, "phases": len(result.steps)}
    if part is not None:
        data |= {"sampled": f"{part} layers", "layers": numbered}
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
    wide = list(dict.fromkeys(p.wider for p in planted if p.wider is not None))
    if elsewhere := [p for p in planted if p.caught and p.wider is not None]:
        text += f"; {len(elsewhere)} of them, which {_name(dtype)} cannot see, in {wide[0].dtype}: "
        text += f"{_named(elsewhere)}; {_agreed_there([w for w in wide if w.holds])}"
    if missed:
        text += f"; not caught: {_named(missed)}"
    if blind:
        text += f"; {_precision(blind, _name(dtype))}"
    rate = caught / len(planted)
    status: Status = "fail" if missed else "undecided" if blind else "pass"
    data = {
        "rate": rate,
        "interval": [round(low, 6), round(high, 6)],
        "more_is_better": True,
        "blind": [[phase_text(p.phase), p.name, p.seen_in] for p in blind],
        "judged_in": [_there(w) for w in wide],
    }
    made = [finding("negative control", status, text, measured=rate, bar=1.0, data=data, tables=(table,))]
    return [*(_differs_there(w, _name(dtype)) for w in wide if w.differs), *made]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _there(wide: Wider) -> dict[str, Any]:
    return {
        "phase": phase_text(wide.phase), "dtype": wide.dtype, "prompts": list(wide.prompts),
        "nmse": wide.worst.nmse, "bar": wide.bar.nmse, "max_delta": wide.worst.max_delta,
        "agrees": wide.holds,
    }  # fmt: skip


def _agreed_there(wide: list[Wider]) -> str:
    """Where both sides were held against each other in another precision, and came to the same."""
    phases, prompts = (", ".join(phase_text(w.phase) for w in wide), ", ".join(wide[0].prompts))
    nmse = number(max(w.worst.nmse for w in wide))
    return (
        f"both sides agree in {phases} there, on {prompts} (NMSE up to {nmse}), and were compared in no other"
    )


def _differs_there(wide: Wider, dtype: str) -> Finding:
    text = (
        f"both sides differ in {wide.dtype}, by less than {dtype} can see, on {', '.join(wide.prompts)}; "
        f"--compute-dtype {wide.dtype} looks for the cause"
    )
    return finding(
        f"lockstep in {wide.dtype}", "fail", text, phase_text(wide.phase), measured=wide.worst.nmse,
        bar=wide.bar.nmse, data={"exactness": "differs", **_there(wide)},
    )  # fmt: skip


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
    if silent := [head for head in held if head not in result.heads]:
        text = f"not compared, as the other side or every prompt lacks it: {', '.join(silent)}"
        made.append(finding("unseen", "note", text, data={"heads": silent}))
    taken = {*original.inputs} & {*converted.inputs}
    if converted.raw.get("type_vocab_size") in (0, 1):
        taken -= {"token_types"}  # there is one type
    if missed := sorted(taken - {name for p in prompts.values() for name in p.given}):
        text = f"no prompt has {', '.join(missed)}: what a pass makes of it was not compared"
        made.append(finding("unseen", "note", text, data={"inputs": missed}))
    return made


def _unseen(converted: Side, prompts: Mapping[str, Prompt], in_part: bool) -> list[Finding]:
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
    for words, pattern in getattr(converted.module, "UNREAD", {}).items():
        own = [n for n in unread if re.fullmatch(pattern, n)]
        if own:
            text = f"{words}: {len(own)} tensors are read by no pass here, bits alone compare them"
            made.append(finding("unseen", "note", text, own[0], data={"unread": len(own), "part": words}))
            unread = [n for n in unread if n not in {*own}]
    if unread:
        why = "layers that did not run, experts never chosen, or unused"
        why = why if in_part else "experts never chosen, or unused"
        text = f"{len(unread)} of {len(weights)} tensors were not read by any prompt ({why})"
        data: dict[str, Any] = {"tensors": unread[:100]}
        if not in_part:  # which the headline says of itself
            data["part"] = f"what no prompt reached ({len(unread)} of {len(weights)} tensors)"
        made.append(finding("unseen", "note", text, ", ".join(unread[:3]), data=data))
    longest, window = max(map(len, rows)), max(converted.windows or (), default=0)
    if longest <= window:
        text = f"the longest prompt has {longest} tokens and cannot see the sliding window of {window}"
        made.append(finding("unseen", "note", text))
    return [*made, *_far(prompts, longest), *_beyond(converted, longest)]


def _far(prompts: Mapping[str, Prompt], longest: int) -> Iterator[Finding]:
    """Positions that no prompt has, before those that one says it begins with."""
    for name, prompt in prompts.items():
        if "positions" in prompt.given and (row := prompt.given["positions"][0])[0] > longest:
            text = f"prompt {name} has positions {row[0]:,} to {row[-1]:,}, others those below {longest:,}"
            yield finding(
                "unseen",
                "note",
                f"{text}: no position between them was seen",
                data={"positions": [row[0], row[-1]]},
            )


def _beyond(converted: Side, longest: int) -> Iterator[Finding]:
    """Positions after the end of the longest prompt; those of entities are all compared with the entities."""
    for name, info in converted.weights[0].tensors.items():
        rows = table_rows(info, bool(converted.raw.get("use_chunking")))
        if rows is not None and not name.endswith(PLACES) and longest < (most := converted.fits(rows)):
            text = f"the longest prompt has {longest:,} tokens: others of {most:,} positions were not seen"
            yield finding("unseen", "note", text, name, data={"positions": longest, "table": most})
            return
