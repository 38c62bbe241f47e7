"""The levels that run a model: which readings there are, and what each level makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.hub import parts
from ckpt_tool.checkpoint.remote_path import scheme_of
from ckpt_tool.convert.shares import Worker
from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass
from ckpt_tool.reference import NotComputed
from ckpt_tool.verify import device as devices
from ckpt_tool.verify.buffers import memory_at_hand
from ckpt_tool.verify.claims import Asked
from ckpt_tool.verify.effort import Effort, effort_for
from ckpt_tool.verify.expectations import archived
from ckpt_tool.verify.pace import TOLD, duration, is_light, limit, pace
from ckpt_tool.verify.parity import NoPass, WholePasses, findings, lockstep
from ckpt_tool.verify.positions import spelled
from ckpt_tool.verify.prompts import (
    WINDOW_LIMIT,
    Lengths,
    Prompt,
    cut,
    named_prompts,
    padding_of,
    positions,
    prompts_for,
    tokenizer_of,
    with_inputs,
)
from ckpt_tool.verify.report import Finding, Report, Status
from ckpt_tool.verify.sides import BROKEN, Side, converted_side, original_side
from ckpt_tool.verify.spread import Walked, from_json, joined, key_of, to_json, walk
from ckpt_tool.verify.subject import Subject
from ckpt_tool.verify.timing import timed
from ckpt_tool.verify.weights import reused

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
TINY = 4_000_000  # weights
UNREADABLE = (*BROKEN, TypeError)  # what numbers that are missing, or are no numbers, raise in a reading

ONE_READING = (
    "both sides have Hugging Face names, and one reading computes them: it shows that nothing was lost, not "
    "that the model is right; --against transformers and documented values judge that"
)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Readings:
    """Both sides, as far as they can be read; `reason` says why there is no parity, and with which status."""

    original: Side | None
    converted: Side | None
    reason: tuple[Status, str] | None


@dataclass(frozen=True)
class Prepared:
    """The readings, and the prompts that both take. `rows` are those of the prompts with one row, `config` is
    config.json as both read it, `table` the positions that there are."""

    readings: Readings
    rows: Mapping[str, list[int]]
    prompts: Mapping[str, Prompt]
    config: Mapping[str, Any]
    lengths: Lengths
    table: int | None


def _prepared(subject: Subject, asked: Asked) -> Prepared:
    table = positions(subject.config, subject.hf, subject.original)
    readings = _readings(subject, asked)
    sides = [s for s in (readings.original, readings.converted) if s is not None]
    config, lengths = as_read(subject.config, sides), lengths_of(sides)
    rows = prompts_for(config, asked.prompts, tokenizer_of(subject.hf), table=table, lengths=lengths)
    inputs = set.intersection(*(set(s.inputs) for s in sides)) if sides else set()
    prompts = with_inputs(rows, inputs, config, lengths)
    return Prepared(_asked_of(readings, config, prompts), rows, prompts, config, lengths, table)


def compute(
    subject: Subject,
    asked: Asked,
    report: Report,
    tell: Tell,
    walks: Sequence[tuple[Mapping[str, Any], Path]] = (),
) -> list[Finding]:
    """The findings of parity, documented values and the outside judge, as far as asked for; their
    circumstances and seconds into `report`. `walks` are what workers wrote down of parity, each with the
    place of its inputs."""
    facts, seconds = report.facts, report.seconds
    with computing_for(subject.output):
        threads = torch.get_num_threads()
        made = _prepared(subject, asked)
        where = devices.described(asked.device)
        facts["computed"] = f"{asked.dtype} on {where}, torch {torch.__version__}, threads: {threads}"
        found: list[Finding] = []
        whole: WholePasses = {}
        if "parity" in asked.levels:
            found += cut(made.rows, made.config, made.table)
            with timed(seconds, "parity"):
                own, whole = _parity(subject, made, facts, tell, asked, walks)
            found += own
            if asked.against is None:
                whole = {}  # results of large vocabularies, which nobody else asks for
        if "training" in asked.levels:
            with timed(seconds, "training"):
                found += _training(subject, made, asked, tell)
        if "generation" in asked.levels:
            with timed(seconds, "generation"):
                found += _generation(subject, made, asked, tell)
        if "documented" in asked.levels:
            from ckpt_tool.verify.documented import documented

            recorded = subject.manifest.checkpoint_id if subject.manifest else None
            ids = [i for i in (asked.checkpoint_id or recorded or _named(subject),) if i]
            with timed(seconds, "documented"):
                found += documented(
                    subject,
                    made.readings.converted,
                    ids,
                    dtype=asked.dtype,
                    device=asked.device,
                    recorded=asked.recorded,
                    progress=tell,
                )
        if asked.against is not None:
            with timed(seconds, asked.against):
                found += _judged(subject, asked, made, whole, tell)
        return found


def walk_share(
    subject: Subject, asked: Asked, worker: Worker, tell: Tell, before: Mapping[str, Any] | None, path: Path
) -> dict[str, Any] | None:
    """What a worker's prompts show, to be written down; its inputs go to `path`. None where that is what it
    wrote down `before`."""
    with computing_for(subject.output):
        made = _prepared(subject, asked)
        key = _key(subject, made, asked)
        if before is not None and before.get("key") == key and from_json(before, path) is not None:
            return None
        sides = made.readings.original, made.readings.converted
        if made.readings.reason is not None or sides[0] is None or sides[1] is None:
            return to_json(Walked(alone="a side cannot be computed"), key, path)
        effort = _effort(asked, sides[0], sides[1], made.prompts)
        tell(f"parity: needs {limit(sides[0], sides[1], made.prompts, effort, asked.memory)}")
        walked = walk(subject, sides[0], sides[1], made.prompts, effort, worker, tell)
        return to_json(walked, key, path)


def _key(subject: Subject, made: Prepared, asked: Asked) -> str:
    return key_of(made.prompts, asked.dtype, asked.device, asked.mode, subject.settings)


def _effort(asked: Asked, original: Side, converted: Side, prompts: Mapping[str, Prompt]) -> Effort:
    return effort_for(asked.mode, original, converted, prompts, frozenset(named_prompts(asked.prompts)))


def _with_vocabulary(config: Mapping[str, Any], sides: list[Side]) -> dict[str, Any]:
    """config.json with the ids that all sides have: some models have no vocab_size, some originals fewer."""
    said = [s.vocabulary for s in sides if s.vocabulary > 0]
    return {**config, "vocab_size": min(said)} if said else dict(config)


def _with_window(config: Mapping[str, Any], sides: list[Side]) -> dict[str, Any]:
    """config.json with the widest window that a layer of either side has, if a prompt can go beyond: it may
    be turned off beside its width, and one side may lack what the other has."""
    known = [own for s in sides if (own := s.windows) is not None]
    if not known or len(known) < len(sides):
        return dict(config)
    widths = [w for own in known for w in own if w < WINDOW_LIMIT]
    return {**config, "sliding_window": max(widths, default=None)}


def as_read(config: Mapping[str, Any], sides: list[Side]) -> dict[str, Any]:
    """config.json as far as all sides read it alike: what prompts may be made of."""
    return _with_window(_with_vocabulary(config, sides), sides)


def lengths_of(sides: list[Side]) -> Lengths:
    """What every side takes."""

    def fits(tokens: int) -> int:
        before = -1
        while sides and 0 < tokens != before:
            before, tokens = tokens, min(s.fits(tokens) for s in sides)
        return max(tokens, 0)

    def padded(tokens: int, longest: int) -> int:
        before = -1
        while sides and 0 < tokens != before:
            before, tokens = tokens, min(s.padded(tokens, longest) for s in sides)
        return max(tokens, 0)

    return Lengths(fits, padded)


def _asked_of(readings: Readings, config: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> Readings:
    """The readings, or why there is no prompt for them."""
    if prompts or not config:
        return readings
    if type(config.get("vocab_size")) is not int:
        reason: tuple[Status, str] = (
            "fail",
            "expected vocab_size in config.json, found none: there are no prompts",
        )
    elif readings.reason is not None and readings.reason[0] != "undecided":
        return readings
    else:
        reason = "skipped", "expected a prompt of a length that both passes take, found none"
    return replace(readings, reason=reason)


_IN_CACHE = re.compile(r"models--(?P<organisation>[^/]{1,96})--(?P<name>[^/]{1,96})")


def _named(subject: Subject) -> str | None:
    """The checkpoint that the source's file is published as, where its name and the vocabulary agree; or that
    a download of the Hub is of, by the folder that it lies in or the address that the manifest records."""
    sides = [c for c in (subject.source, subject.output) if c is not None]
    words = subject.config.get("vocab_size")
    known = archived(subject.source.path.name, words) if subject.source is not None else None
    address = subject.manifest.source if subject.manifest is not None else None
    if known is None and address is not None and scheme_of(address) == "hf":
        known = parts(address)[0]
    for part in (x for c in sides for x in c.path.absolute().parts):
        if known is None and (found := _IN_CACHE.fullmatch(part)) is not None:
            known = f"{found['organisation']}/{found['name']}"
    return known


@contextmanager
def computing_for(checkpoint: Checkpoint) -> Iterator[None]:
    """How it is computed inside: products are exact (`device.exact`), and a tiny model has one thread, since
    waking others takes longer than the work, far longer on a busy machine."""
    before = torch.get_num_threads()
    if sum(t.numel for t in checkpoint) < TINY:
        torch.set_num_threads(1)
    try:
        with devices.exact():
            yield
    finally:
        torch.set_num_threads(before)


def _readings(subject: Subject, asked: Asked) -> Readings:
    dtype = getattr(torch, asked.dtype)
    devices.check(asked.device)
    original = converted = None
    reason: tuple[Status, str] | None = None
    if subject.original is None:
        reason = "skipped", "no source was given to compare with"
    elif subject.family is None:
        reason = "skipped", subject.problems[0].message
    elif (problem := next((p for p in subject.problems if p.where in subject.settings), None)) is not None:
        reason = "skipped", f"the source contradicts a fact that was given: {problem.message}"
    else:
        try:
            original = original_side(subject, dtype, asked.device)
        except NotComputed as error:
            reason = "skipped", f"the original is not computed here: {error}"
        except UNREADABLE as error:
            reason = "skipped", f"the original cannot be read without more facts (--set): {_said(error)}"
    if subject.hf is None:
        reason = "skipped", "neither side is in the Hugging Face layout"
    else:
        try:
            converted = converted_side(subject, dtype, asked.device)
        except NotComputed as error:
            reason = reason or ("skipped", f"the converted model is not computed here: {error}")
        except UNREADABLE as error:
            reason = "fail", f"the converted model cannot be read: {_said(error)}"
            if subject.keeps_layout and original is None:  # what the source says as well
                reason = "skipped", f"the model is not computed here: {_said(error)}"
    if reason is None and asked.dtype in ("float16", "bfloat16") and any(map(subject.config.get, EXPERTS)):
        why = "near-ties change the experts"
        reason = "undecided", f"experts are compared in float32 or float64 only: in {asked.dtype} {why}"
    return Readings(original, converted, reason)


def _said(error: Exception) -> str:
    """A KeyError is about a tensor or value that the reading asks for, and says only its name."""
    return f"expected `{error.args[0]}`, found none" if isinstance(error, KeyError) else str(error)


def _parity(
    subject: Subject,
    made: Prepared,
    facts: dict[str, str],
    tell: Tell,
    asked: Asked,
    walks: Sequence[tuple[Mapping[str, Any], Path]],
) -> tuple[list[Finding], WholePasses]:
    """The level's findings, and the original's passes that it made."""
    original, converted, prompts = made.readings.original, made.readings.converted, made.prompts
    if made.readings.reason is not None or original is None or converted is None:
        status, text = made.readings.reason or ("skipped", "a side cannot be read")
        return [Finding("parity", "lockstep", status, text)], {}
    effort = _effort(asked, original, converted, prompts)
    needs = limit(original, converted, prompts, effort, asked.memory)
    foretold = pace(original, converted, prompts, effort)
    if foretold.seconds >= TOLD:
        needs = f"{needs}, {duration(foretold.seconds)}"
    facts["needs"] = needs
    shared = _walks(walks, _key(subject, made, asked))
    try:
        light = is_light(original, converted, prompts, effort)
        with reused(*original.weights, *converted.weights), memory_at_hand() if light else nullcontext():
            result = joined(subject, original, converted, prompts, effort, shared, tell) if shared else None
            if result is None:
                tell(f"parity: needs {needs}")
                result = lockstep(subject, original, converted, prompts, tell, effort, foretold)
    except NoPass as error:
        return [Finding("parity", "lockstep", "undecided", str(error))], {}
    tokenizer = tokenizer_of(subject.hf)
    found = findings(result, original, converted, prompts, asked.accept)
    found = [replace(f, drawn=spelled(f.drawn, tokenizer)) if "top5" in f.drawn else f for f in found]
    if subject.keeps_layout:
        found.append(Finding("parity", "reading", "note", ONE_READING))
    return found, result.whole


def _walks(said: Sequence[tuple[Mapping[str, Any], Path]], key: str) -> list[Walked]:
    """What the workers wrote down; `resume-mismatch` where they were asked something else."""
    found = []
    for number, (content, path) in enumerate(said, start=1):
        walked = from_json(content, path)
        if walked is None or content.get("key") != key:
            what = "nothing that can be read" if walked is None else "another of them, or other facts (--set)"
            message = (
                f"expected worker {number}/{len(said)} to have computed these prompts in this precision, on "
                f"this device and in this mode, found {what}"
            )
            hint = f"give every worker the same options, and run again: --worker {number}/{len(said)}"
            fail("resume-mismatch", message, hint=hint)
        found.append(walked)
    return found


def _training(subject: Subject, made: Prepared, asked: Asked, tell: Tell) -> list[Finding]:
    original, converted = made.readings.original, made.readings.converted
    if made.readings.reason is not None or original is None or converted is None:
        status, text = made.readings.reason or ("skipped", "a side cannot be read")
        return [Finding("training", "gradients", status, text)]
    from ckpt_tool.verify.training import training  # and all that computes gradients: few ask for them

    return training(
        subject, original, converted, made.prompts, memory=asked.memory, against=asked.against, tell=tell
    )


def _generation(subject: Subject, made: Prepared, asked: Asked, tell: Tell) -> list[Finding]:
    readings = made.readings
    original, converted = readings.original, readings.converted
    if readings.reason is not None or original is None or converted is None:
        return [Finding("generation", "tokens", *(readings.reason or ("skipped", "a side cannot be read")))]
    from ckpt_tool.verify.generated import generated

    return generated(
        subject, original, converted, made.rows,
        dtype=asked.dtype, device=asked.device, lengths=made.lengths, table=made.table, tell=tell,
    )  # fmt: skip


def _judged(subject: Subject, asked: Asked, made: Prepared, whole: WholePasses, tell: Tell) -> list[Finding]:
    from ckpt_tool.verify.against_transformers import Judged, against_transformers

    readings, prompts = made.readings, made.prompts
    judge = readings.original or readings.converted
    if judge is None or subject.family is None or not prompts:
        text = "neither side can be read, so there is nothing to hold transformers against"
        return [Finding("transformers", "logits", "skipped", text)]
    if readings.original is not None and readings.reason is not None and readings.reason[0] != "fail":
        return [Finding("transformers", "logits", *readings.reason)]
    converted = None if judge is readings.converted else readings.converted
    padding = padding_of(subject.config)
    judged = Judged(judge, converted, asked.accept, asked.elsewhere, padding, whole)
    wanted = (converted or judge).needed
    prompts = {name: p for name, p in prompts.items() if wanted <= p.given.keys()}
    return against_transformers(
        subject, judged, prompts, dtype=asked.dtype, device=asked.device, progress=tell
    )
