"""Level 1: is everything there, and does it fit? Every source and target tensor has its place, shapes and
dtypes agree with the plan and config.json, values are numbers, and what changes the result has a source."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, FLOATS, Checkpoint, TensorInfo
from ckpt_tool.checkpoint.safetensors import COMPLEX
from ckpt_tool.checkpoint.wrapping import unwrapped
from ckpt_tool.checkpoint.zlibs import crc32
from ckpt_tool.convert import canonical
from ckpt_tool.convert.dtypes import WIDENED
from ckpt_tool.convert.facts import class_of, classes
from ckpt_tool.convert.plan import ASKED, Options
from ckpt_tool.convert.values import Values
from ckpt_tool.errors import CkptToolError, Problem
from ckpt_tool.records import dataclass
from ckpt_tool.verify.accepting import cast_as_recorded, undeclared, undeclared_cast
from ckpt_tool.verify.claims import AS_SOURCE, CAST_FIRST
from ckpt_tool.verify.in_order import in_order
from ckpt_tool.verify.left_over import explained, is_table, left_over
from ckpt_tool.verify.listed import leaves_out, listed
from ckpt_tool.verify.meanings import WITHOUT_EFFECT, config
from ckpt_tool.verify.prefixed import NOTE
from ckpt_tool.verify.report import Finding, Status
from ckpt_tool.verify.subject import Subject

__all__ = ["WITHOUT_EFFECT", "Scan", "coverage", "scan"]

LEVEL = "coverage"
BLOCK = 1 << 20  # bytes looked at at a time
UNDECIDED = ("missing-fact", "unknown-family")  # problems that say nothing about the output
WAY_BACK = "way back"
SHOWN = 20  # findings of one kind before the rest is counted


@dataclass(frozen=True)
class Scan:
    """What one reading of a tensor's bytes tells."""

    tensor: TensorInfo
    crc32: int
    values: Values


def scan(checkpoint: Checkpoint, progress: Callable[[int], None] | None = None) -> Iterator[Scan]:
    """Read every tensor once, block by block."""
    yield from in_order(
        lambda tensor: scan_one(checkpoint, tensor, progress), checkpoint, checkpoint, size=_nbytes
    )


def _nbytes(tensor: TensorInfo) -> int:
    return tensor.nbytes


def scan_one(
    checkpoint: Checkpoint, tensor: TensorInfo, progress: Callable[[int], None] | None = None
) -> Scan:
    """Read one tensor."""
    values, crc = Values(tensor.dtype), 0
    itemsize = DTYPES[tensor.dtype].itemsize
    buffer = np.empty(min(BLOCK, tensor.nbytes) // itemsize, dtype=DTYPES[tensor.dtype].bits)
    for start in range(0, tensor.numel, max(1, len(buffer))):
        piece = buffer[: min(len(buffer), tensor.numel - start)]
        data = piece.data.cast("B")
        checkpoint.read_into(tensor, start * itemsize, data)
        crc = crc32(data, crc)
        at = values.look(piece)
        if at is not None:
            values.found_at(start + at)
        if progress is not None:
            progress(len(data))
    return Scan(tensor, crc, values)


def coverage(subject: Subject, scans: list[Scan]) -> list[Finding]:
    """The findings of this level; `scans` are those of the whole output."""
    findings = [*_planned(subject), *_way_back(subject)] if subject.source else [*_replanned(subject)]
    told = (text for text in subject.output.readings if not leaves_out(subject, text))
    findings += [finding("target tensors", "note", text) for text in told]
    findings += [*_wrapped(subject.output), *_complex(subject.output)]
    return [*findings, *listed(subject), *_values(subject, scans), *config(subject)]


def _wrapped(output: Checkpoint) -> Iterator[Finding]:
    """Words before the names of the output, which no loader takes off."""
    try:
        words = unwrapped(output.files, label=output.path.name).before
    except CkptToolError as error:
        yield from _problems("target tensors", error.problems)
        return
    if words:
        text = f"expected names that loaders know, found `{words}` before every one of them"
        yield finding("target tensors", "fail", text)


def _complex(output: Checkpoint) -> Iterator[Finding]:
    """Tensors of numbers that no model here has; reading leaves them out, and no plan hears of them."""
    odd = [t.tensor for t in output.left_out if t.tensor.dtype in COMPLEX]
    yield from capped(
        [
            finding("target tensors", "fail", f"expected no tensor of type {t.dtype}, found one", t.name)
            for t in odd
        ]
    )


def finding(check: str, status: Status, message: str, where: str | None = None, **more: Any) -> Finding:
    return Finding(LEVEL, check, status, message, where, **more)


def capped(findings: list[Finding]) -> Iterator[Finding]:
    """The first findings of a kind, and a count of the rest."""
    yield from findings[:SHOWN]
    if len(findings) > SHOWN:
        first = findings[0]
        yield Finding(first.level, first.check, first.status, f"{len(findings) - SHOWN} more of this kind")


def _problems(check: str, problems: tuple[Problem, ...]) -> Iterator[Finding]:
    made = []
    for p in problems:
        where = ": ".join(x for x in (p.file, p.where) if x) or None
        status: Status = "skipped" if p.kind in UNDECIDED else "fail"
        made.append(finding(check, status, p.message, where, data={"kind": p.kind}))
    yield from capped(made)


def _not_there(name: str, subject: Subject) -> str:
    """That a tensor is missing, and what has its values where another is made of the same."""
    steps = [s for s in subject.plan.steps if not s.compare] if subject.plan is not None else []
    made_of = [s.sources for s in steps if name in {p.name for p in s.targets}]
    twins = (p.name for s in steps if s.sources in made_of for p in s.targets if p.name != name)
    twin = next((t for t in twins if subject.output.find(t)), None)
    if twin is None:
        return "expected this tensor, found none"
    return (
        f"expected this tensor, found none: {twin} has its values, and a release of transformers that ties "
        "the two on loading leaves it out on saving; one that does not tie them makes up numbers for it"
    )


def _of_two_classes(output: Checkpoint) -> Iterator[Finding]:
    """A config.json whose model_type and class are of two models, which can be why there is no plan."""
    config = output.json("config.json") if "config.json" in output.documents else {}
    said, named = class_of(config), class_of({"architectures": config.get("architectures")})
    if said is not None and named is not None and classes()[said].name != classes()[named].name:
        text = f"expected {named}, as its class {config['architectures'][0]} has it, found {said}"
        yield finding("config", "fail", text, "config.json: model_type", data={"exactness": "differs"})


def _planned(subject: Subject) -> Iterator[Finding]:
    """Against the plan that the family makes from the source."""
    plan = subject.plan
    if plan is None:
        yield from _problems("plan", subject.problems)
        yield from _of_two_classes(subject.output)
        return
    assert subject.source is not None
    total = sum(1 for _ in subject.source) + len(subject.source.left_out)
    claimed = {(p.file, p.name) for s in plan.steps for p in s.sources}
    dropped = "".join(f", {d.tensor.name} dropped ({d.reason})" for d in plan.dropped[:3])
    more = f" and {len(plan.dropped) - 3} more" if len(plan.dropped) > 3 else ""
    yield finding(
        "source tensors",
        "pass",
        f"all {total} tensors of the source are accounted for: {len(claimed)} carried over{dropped}{more}",
        data={"carried": len(claimed), "dropped": len(plan.dropped)},
    )
    wrong, expected = [], {}
    for want in (t for f in plan.outputs for t in f.held):
        found = subject.target(want.file, want.name)
        if found is None:
            wrong.append(finding("target tensors", "fail", _not_there(want.name, subject), want.name))
            continue
        expected[found.file, found.name] = want
        if found.shape != want.shape:
            text = f"expected shape {want.shape}, found {found.shape}"
            wrong.append(finding("target tensors", "fail", text, want.name))
        if found.dtype != want.dtype:
            text = f"expected dtype {want.dtype}, found {found.dtype}"
            wrong.append(finding("target tensors", "fail", text, want.name))
    for note in (n for n in subject.output.notes if n.startswith(NOTE.partition("{")[0])):
        yield finding("target tensors", "note", note)
    unplanned = [t for t in subject.output if (t.file, t.name) not in expected]
    explained, named = left_over(subject, unplanned) if subject.direction == "to-hf" else ([], set())
    for t in unplanned:
        if t.name not in named:
            text = "expected only tensors of the plan, found this one too"
            wrong.append(finding("target tensors", "fail", text, t.name))
    yield from capped(wrong)
    yield from capped([f for f in explained if f.status == "fail"])
    yield from (f for f in explained if f.status != "fail")
    if not wrong:
        others = "no others" if not named else f"{len(named)} that are left over"
        text = f"all {len(expected)} tensors of the plan are there with their shapes and dtypes, and {others}"
        yield finding("target tensors", "pass", text)
    yield from _left_out(subject)
    yield from undeclared_cast(subject)
    yield from undeclared(subject)
    for note in (n for n in plan.notes if n.startswith(WIDENED)):
        yield finding("dtype", "note", note)
    data = {CAST_FIRST: True} if cast_as_recorded(subject) else {}
    for note in plan.lossy:
        yield finding("dtype", "note", note, data=data)


def _left_out(subject: Subject) -> Iterator[Finding]:
    """Tables of a source of the same layout that loading makes anew: whether they hold what is made. What the
    user had left out by name is said elsewhere, whatever it holds."""
    if not subject.keeps_layout or subject.plan is None or subject.source is None:
        return
    dropped = [d.tensor for d in subject.plan.dropped if d.reason != ASKED]
    wrong, _ = explained(subject.source, subject.source.json("config.json"), dropped)
    yield from capped([finding("source tensors", "fail", f"left out: {w}", n) for n, w in wrong.items()])


def _way_back_problems(subject: Subject) -> tuple[list[Problem], list[Problem]]:
    """What a plan of the way back says, which names and checks all of the output: what is wrong with the
    output, and what is right in it and the original's layout cannot say or share out."""
    assert subject.family is not None
    try:
        subject.family.plan_original(subject.planned(subject.output), Options())
    except CkptToolError as error:
        back = [p for p in error.problems if p.kind == "unsupported" or _cannot_be_shared(p)]
        return [p for p in error.problems if p not in back], back
    return [], []


def _cannot_be_shared(p: Problem) -> bool:
    """Whether a number does not divide by the ranks or stages that would be written."""
    return p.kind == "config-mismatch" and (p.where or "").startswith("--")


def _no_way_back(problems: list[Problem]) -> Iterator[Finding]:
    """A conversion is not wrong because the original cannot be written again."""
    for p in problems:
        text = f"`--to original` is not possible: {p.message}"
        yield finding(WAY_BACK, "note", text, p.where, data={"kind": p.kind})


def _way_back(subject: Subject) -> Iterator[Finding]:
    if subject.family is not None and subject.plan is not None and subject.direction == "to-hf":
        yield from _no_way_back(_way_back_problems(subject)[1])


def _replanned(subject: Subject) -> Iterator[Finding]:
    """Without the source: the family's table and the output's own config say which tensors there must be."""
    family, wrong, back = subject.family, list[Problem](), list[Problem]()
    if family is None:
        yield from _problems("plan", subject.problems)
        return
    if subject.direction == "to-hf":
        wrong, back = _way_back_problems(subject)
        if subject.manifest is None and {p.kind for p in wrong} == {"missing-fact"}:  # of an original's
            wrong, back = [], wrong + back
    else:
        try:
            family.plan(subject.planned(subject.output), Options(settings=subject.settings))
        except CkptToolError as error:
            wrong = list(error.problems)
    yield from _problems("target tensors", tuple(wrong))
    yield from _no_way_back(back)
    if wrong:
        return
    if back:
        yield from _as_recorded(subject) if subject.manifest is not None else _as_its_class(subject)
    else:
        count = sum(1 for _ in subject.output)
        text = f"all {count} tensors are those that family {family.name} expects for this config"
        yield finding("target tensors", "pass", text)
    if subject.direction == "to-hf":
        yield from capped(left_over(subject, [*subject.output])[0])
    yield finding("source tensors", "skipped", "no source was given to account for")


def _as_its_class(subject: Subject) -> Iterator[Finding]:
    """Where no original could be written, of this head or with these values: what its class has."""
    assert subject.family is not None
    try:
        made = canonical.canonical(subject.planned(subject.output), subject.family, Options())
    except CkptToolError as error:
        yield from _problems("target tensors", error.problems)
        return
    names = [str(n) for n in subject.config.get("architectures") or [subject.family.name]]
    count = sum(len(f.tensors) for f in made.outputs)
    text = f"all {count} tensors that {', '.join(names)} has for this config are there"
    yield finding("target tensors", "pass", text)


def _as_recorded(subject: Subject) -> Iterator[Finding]:
    """Where no plan of the way back tells which tensors there must be: those that the manifest lists."""
    there = {(t.file, t.name) for t in subject.output}
    listed = set() if subject.manifest is None else set(subject.manifest.crcs)
    if not listed:
        text = "neither a plan of the way back nor a manifest says which tensors there must be"
        yield finding("target tensors", "skipped", text, data={"open": True})
        return
    odd = [("expected this tensor of the manifest, found none", n) for _, n in sorted(listed - there)]
    odd += [
        ("expected only tensors of the manifest, found this one too", n) for _, n in sorted(there - listed)
    ]
    yield from capped([finding("target tensors", "fail", text, name) for text, name in odd])
    if not odd:
        yield finding("target tensors", "pass", f"all {len(there)} tensors are those of the manifest")


def _odd(subject: Subject, tensor: TensorInfo, text: str, data: dict[str, Any], look: bool) -> Finding:
    """A tensor that cannot be what anybody trained: a fault, which may be the source's own; `look` says to
    find out."""
    from ckpt_tool.verify.bits import compare  # whose module is above this one

    plan = subject.plan if subject.source is not None else None
    steps = (
        []
        if plan is None or not look
        else [s for s in plan.steps if tensor.name in [p.name for p in s.targets]]
    )
    if steps:
        found = compare(subject, steps)
        if not found.differences and not found.missing:
            text, data = f"{text}, {AS_SOURCE}", {**data, AS_SOURCE: True}
    return finding("values", "fail", text, tensor.name, data=data)


def _values(subject: Subject, scans: list[Scan]) -> Iterator[Finding]:
    wrong, notes = list[Finding](), list[Finding]()
    for s in scans:
        name, values = s.tensor.name, s.values
        if is_table(name):
            continue  # compared with what it should be, or told as a stranger
        if subject.family is not None and re.fullmatch(subject.family.unread or "$.", name):
            continue
        if values.non_finite:
            assert values.first is not None
            at = tuple(int(k) for k in np.unravel_index(values.first, s.tensor.shape or (1,)))
            text = f"expected finite values, found {values.non_finite} that are not, the first at {at}"
            data = {"kind": "non-finite", "count": values.non_finite, "first": list(at)}
            wrong.append(_odd(subject, s.tensor, text, data, len(wrong) < SHOWN))
        elif values.all_zero and name.endswith("bias"):
            notes.append(finding("values", "note", "all values are zero", name))
        elif values.all_zero or values.denormal_only:
            what = "only zeros" if values.all_zero else "only denormal values"
            text = f"expected weights, found {what} ({s.tensor.numel} elements)"
            wrong.append(_odd(subject, s.tensor, text, {"kind": "non-finite"}, len(wrong) < SHOWN))
    told = [*capped(wrong)]
    if len(wrong) > SHOWN and all(f.data.get(AS_SOURCE) for f in wrong[:SHOWN]):
        told[-1] = replace(told[-1], data={AS_SOURCE: True})  # of those that were not looked at the bits tell
    yield from told
    yield from capped(notes)
    floating = sum(s.tensor.dtype in FLOATS for s in scans)
    if not wrong:
        yield finding(
            "values", "pass", f"all values of {floating} floating tensors are finite; none is all zero"
        )
