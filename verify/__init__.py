"""Proving a conversion right, in levels that ask different questions.

    coverage    is everything there, and does it fit?
    bits        does the plan's inverse give the source back, byte for byte?
    parity      does it compute the same, layer by layer, as the original layout's own reading?
    documented  does it give the values its publishers documented?
    training    does it learn the same from one step? (where it is asked for by name)
    generation  does it go on from prompts with the same tokens? (where it is asked for by name)

What only one level needs, torch first of all, is imported when that is asked for: every conversion ends with
coverage, which is a third of the modules.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tool.errors import fail
from ckpt_tool.loading import loading
from ckpt_tool.verify.accepting import check_names, unneeded, without_coverage
from ckpt_tool.verify.claims import MODES, Against, Asked, Claim, Mode, words_for
from ckpt_tool.verify.provenance import origin
from ckpt_tool.verify.report import Finding, Report, Reports
from ckpt_tool.verify.seen import READ, SHARED, Joined, Seen, Walk
from ckpt_tool.verify.subject import Subject, opened
from ckpt_tool.verify.timing import OTHER, timed

if TYPE_CHECKING:
    from ckpt_tool.convert.shares import Worker
    from ckpt_tool.verify.expectations import Expectation
    from ckpt_tool.verify.prompts import Prompts

__all__ = ["ASKED_FOR", "DTYPES", "LEVELS", "Finding", "Report", "Reports", "Seen", "verify", "verify_part"]

LEVELS = ("coverage", "bits", "parity", "documented")
QUICK = LEVELS[:3]
ASKED_FOR = (*LEVELS, "training", "generation")
DTYPES = ("float64", "float32", "bfloat16", "float16")
JUDGES = ("transformers",)


def verify(
    out: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    levels: str | Iterable[str] | None = None,
    no_source: bool = False,
    accept: Iterable[str] = (),
    against: str | None = None,
    prompts: str | os.PathLike[str] | Prompts | None = None,
    compute_dtype: str = "float32",
    device: str = "cpu",
    checkpoint_id: str | None = None,
    settings: Mapping[str, Any] | None = None,
    transformers_python: str | os.PathLike[str] | None = None,
    expectations: str | os.PathLike[str] | None = None,
    mode: Mode = "default",
    memory: int | None = None,
    progress: Callable[[str], None] | None = None,
    joined: bool | Joined = False,
    then: Callable[[Subject, Report], None] = lambda subject, report: None,
) -> Report:
    """Verify the converted checkpoint `out`, against the `source` it was made from; without one given, the
    source that the manifest records is used where it still lies there.

    `levels` (None: all, or QUICK) and everything else that is asked for by name must run for the report to
    pass. `no_source` says that there is none to compare with: the report passes then where the output is
    consistent with its manifest. `accept` names foretold differences (of plan or report), which then do not
    fail.

    `prompts` (rows of token ids, or a JSON file of them) are added to the fixed ones. `checkpoint_id` is a
    published name, to find documented values by. `settings` are facts that the source's files do not hold,
    under their Hugging Face names; those recorded in the output's manifest are known already.
    `transformers_python` is a Python, or a folder of packages, whose transformers judges what the installed
    one lacks (None: CKPT_TOOL_TRANSFORMERS). `expectations` is a file of values that a trusted run recorded
    (`recording`), to be held against instead of the documented ones. `mode` is how much of parity runs:
    "quick" a layer of each kind, "thorough" everything, "default" what `verify.effort` says. `memory` is how
    many bytes parity may take (None: 4 GiB), as far as it is computed on the CPU. `joined`: coverage, bits
    and parity go by what workers (`verify_part`) saw, or by what was seen already. `then` has the report
    while both sides are open. Raises `CkptToolError` for what cannot be opened; all else is a finding."""
    named = (levels,) if isinstance(levels, str) else tuple(dict.fromkeys(levels or ()))
    asked = (QUICK if mode == "quick" else LEVELS) if levels is None else named
    _check_choices(asked, against, compute_dtype, device, mode)
    _check_one(source, no_source)
    check_names(accepted := tuple(accept))
    recorded = None if expectations is None else _recorded(expectations)
    asked = asked if recorded is None or "documented" in asked else (*asked, "documented")
    prompts = _prompts(prompts)  # before anything large is in memory
    wanted = Asked(
        asked, against, prompts, compute_dtype, device, checkpoint_id, accepted, transformers_python,
        recorded, mode, memory,
    )  # fmt: skip
    began, report = time.monotonic(), Report("ckpt-tool verify")
    with opened(out, source, settings, look_for_source=not no_source) as subject:
        report.facts |= _facts(subject, out, source, no_source)
        report.claim = _claim(subject, named, against, checkpoint_id, no_source, expectations)
        _levels(subject, out, wanted, report, progress or (lambda text: None), joined)
        then(subject, report)
    _took(report, time.monotonic() - began)
    return report


def _levels(
    subject: Subject,
    out: str | os.PathLike[str],
    asked: Asked,
    report: Report,
    tell: Callable[[str], None],
    joined: bool | Joined,
) -> None:
    """All that was asked for, into `report`."""
    if asked.mode != "default":
        report.facts["mode"] = f"{asked.mode}; levels: {', '.join(asked.levels)}"
    subject.accepted = asked.accept
    if subject.packed is not None and subject.packed.dtype is not None:
        from ckpt_tool.verify.bits import recognise_recipe

        recognise_recipe(subject)
    with timed(report.seconds, next((level for level in ("bits", *SHARED) if level in asked.levels), OTHER)):
        seen = _seen(subject, out, asked.levels, tell, joined)
    _run(subject, asked, seen, report, tell)
    report.facts |= seen.facts
    report.origin = origin(subject)
    if seen.paths:
        from ckpt_tool.verify.parts import remove

        remove(seen.paths)


def _prompts(given: str | os.PathLike[str] | Prompts | None) -> Prompts | None:
    """What a file of prompts holds."""
    if not isinstance(given, str | os.PathLike):
        return given
    from ckpt_tool.verify.prompts import read_prompts

    return read_prompts(given)


def _recorded(file: str | os.PathLike[str]) -> tuple[Expectation, ...]:
    """The values in a file of them."""
    from ckpt_tool.verify.expectations import read_file

    return read_file(file)


def _took(report: Report, seconds: float) -> None:
    report.facts["seconds"] = f"{seconds:.1f}"
    report.seconds[OTHER] = max(0.0, seconds - sum(report.seconds.values()))


def _run(subject: Subject, asked: Asked, seen: Joined, report: Report, tell: Callable[[str], None]) -> None:
    """All levels that were asked for, into `report`."""
    if "coverage" in asked.levels:
        from ckpt_tool.verify.confirm import confirm
        from ckpt_tool.verify.coverage import coverage
        from ckpt_tool.verify.documents import documents

        with timed(report.seconds, "coverage"):
            report.findings += [*coverage(subject, seen.scans), *documents(subject), *confirm(subject)]
            if subject.direction == "to-original":
                from ckpt_tool.verify.written_args import written_args

                report.findings += written_args(subject)
    else:
        report.findings += without_coverage(subject)
    report.findings += unneeded(subject, asked.accept)
    from ckpt_tool.verify.confirm import said

    report.findings += said(subject, confirmed="coverage" in asked.levels)
    if "bits" in asked.levels:
        from ckpt_tool.verify.bits import bits

        with timed(report.seconds, "bits"):
            report.findings += bits(subject, seen.scans, seen.compared)
            report.findings += _carried(subject)
    if {"parity", "documented", "training", "generation"} & set(asked.levels) or asked.against is not None:
        report.findings += _computed(subject, asked, report, tell, seen.walks)
    if subject.plan is not None and subject.source is not None:
        from ckpt_tool.verify.by_bits import by_bits

        report.findings += by_bits(subject, report.findings, asked.memory)


def _carried(subject: Subject) -> list[Finding]:
    """What there is to say of an optimizer, with its readers, where one was carried or lies there."""
    if subject.carried is None and not os.path.isdir(os.path.join(subject.output.path, "optimizer")):
        return []
    from ckpt_tool.verify.carried_bits import carried_bits

    return carried_bits(subject)


def verify_part(
    out: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    worker: Worker,
    *,
    levels: Iterable[str] | None = None,
    no_source: bool = False,
    prompts: str | os.PathLike[str] | Prompts | None = None,
    compute_dtype: str = "float32",
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
    mode: Mode = "default",
    memory: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Seen:
    """Look at a worker's share of what coverage, bits and parity look at, as one of several processes on
    machines that share a file system. What it saw is written down beside `out`, for `verify(joined=True)`,
    which must be given the same `prompts`, `compute_dtype`, `device` and `mode`; `memory` is each process's
    own."""
    asked = _shared(SHARED if levels is None else tuple(levels))
    _check_choices(asked, None, compute_dtype, device, mode)
    _check_one(source, no_source)
    prompts = _prompts(prompts)
    tell = progress or (lambda text: None)
    from ckpt_tool.verify.parts import look

    with opened(out, source, settings, look_for_source=not no_source) as subject:
        wanted = Asked(asked, None, prompts, compute_dtype, device, None, mode=mode, memory=memory)
        return look(subject, out, worker, asked, tell, _walk_of(subject, wanted, worker, tell))


def _walk_of(subject: Subject, asked: Asked, worker: Worker, tell: Callable[[str], None]) -> Walk | None:
    """What takes the worker's prompts through parity; None where that is not asked for, or torch is not
    installed, which the report will say."""
    if "parity" not in asked.levels:
        return None
    try:
        with loading():
            from ckpt_tool.verify.compute import walk_share
    except ImportError:
        return None
    return partial(walk_share, subject, asked, worker, tell)


def _shared(levels: Iterable[str]) -> tuple[str, ...]:
    """Those of the levels that workers share; `usage` for none."""
    _check_choices(levels, None, "float32", "cpu")
    found = tuple(level for level in levels if level in SHARED)
    if not found:
        words = " or ".join(SHARED)
        message = f"expected a level that workers share ({words}), found {', '.join(levels) or 'none'}"
        fail("usage", message, where="levels")
    return found


def _seen(
    subject: Subject,
    out: str | os.PathLike[str],
    asked: Iterable[str],
    tell: Callable[[str], None],
    joined: bool | Joined,
) -> Joined:
    """What the levels that look at every byte of the output share."""
    if isinstance(joined, Joined):
        return joined
    if joined:
        from ckpt_tool.verify.parts import join

        tell("joining what the workers saw")
        return join(subject, out, _shared(asked), tell)
    if not READ & set(asked):
        return Joined()
    if "bits" in asked and subject.source is not None and subject.plan is not None:
        from ckpt_tool.verify.bits import compare as compare_steps  # `compare` is a module beside this
        from ckpt_tool.verify.passing import Passing

        tell("bits: comparing with the source")  # which reads the output, too
        passing = Passing(subject.output)
        compared = compare_steps(subject, subject.plan.steps, passing)
        return Joined(passing.scans(), compared)
    from ckpt_tool.verify.coverage import scan

    tell("reading the output")
    return Joined(list(scan(subject.output)))


def _computed(
    subject: Subject,
    asked: Asked,
    report: Report,
    tell: Callable[[str], None],
    walks: Sequence[tuple[Mapping[str, Any], Path]],
) -> list[Finding]:
    """The levels that need torch; without it the others still say what they say."""
    try:
        with loading():
            from ckpt_tool.verify.compute import compute
    except ImportError as error:
        from ckpt_tool.verify.missing import not_computed

        return not_computed(error, asked.levels, asked.against)
    return compute(subject, asked, report, tell, walks)


def _check_one(source: str | os.PathLike[str] | None, no_source: bool) -> None:
    if no_source and source is not None:
        fail("usage", "expected a source to compare with, or none, found both", where="no_source")


def _check_choices(
    levels: Iterable[str], against: str | None, compute_dtype: str, device: str, mode: str = "default"
) -> None:
    for label, values, known in (
        ("levels", levels, ASKED_FOR),
        ("against", (against,) if against else (), JUDGES),
        ("compute_dtype", (compute_dtype,), DTYPES),
        ("mode", (mode,), MODES),
    ):
        for value in values:
            if value not in known:
                fail("usage", f"expected {' or '.join(known)}, found {value!r}", where=label)
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device, re.ASCII):
        fail("usage", f"expected cpu, cuda or cuda:N, found {device!r}", where="device")


def _facts(
    subject: Subject, out: str | os.PathLike[str], source: str | os.PathLike[str] | None, no_source: bool
) -> dict[str, str]:
    total = sum(t.nbytes for t in subject.output)
    made = {"output": f"{os.fspath(out)} ({sum(1 for _ in subject.output)} tensors, {total:,} bytes)"}
    recorded = subject.manifest.source if subject.manifest is not None else None
    if source is not None:
        made["source"] = os.fspath(source)
    elif subject.found is not None:
        made["source"] = f"{os.path.normpath(subject.found)} (as the manifest records, its headers unchanged)"
    elif recorded is not None and not no_source:
        made["source"] = f"none given; {recorded}, as the manifest records, is not there as it was"
    else:
        made["source"] = "none given"
    if subject.family is not None:
        made["family"] = f"{subject.family.name}, {subject.direction}"
    return made


def _claim(
    subject: Subject,
    levels: tuple[str, ...],
    against: str | None,
    checkpoint_id: str | None,
    no_source: bool,
    expectations: object,
) -> Claim:
    """What the caller asked to be shown, by name."""
    asked = [*words_for(levels, against, checkpoint_id)]
    if expectations is not None:
        asked.append(("documented", "--expectations"))
    found: Against = "manifest" if subject.manifest is not None else "nothing"
    return Claim("source" if subject.source is not None else found, tuple(dict(asked).items()), no_source)
