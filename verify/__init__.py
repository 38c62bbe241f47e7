"""Proving a conversion right, in levels that ask different questions.

    coverage    is everything there, and does it fit?
    bits        does the plan's inverse give the source back, byte for byte?
    parity      does it compute the same, layer by layer, as the original layout's own reading?
    documented  does it give the values its publishers documented?

Torch is imported when a level that computes is asked for, not before.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ckpt_tool.errors import fail
from ckpt_tool.verify.accepting import check_names, unneeded
from ckpt_tool.verify.bits import bits
from ckpt_tool.verify.by_bits import by_bits
from ckpt_tool.verify.claims import Against, Asked, Claim
from ckpt_tool.verify.confirm import confirm
from ckpt_tool.verify.coverage import Scan, coverage, scan
from ckpt_tool.verify.documents import documents
from ckpt_tool.verify.missing import not_computed
from ckpt_tool.verify.prompts import Prompts, read_prompts
from ckpt_tool.verify.report import Finding, Report, Reports
from ckpt_tool.verify.subject import Subject, opened

__all__ = ["DTYPES", "LEVELS", "Finding", "Report", "Reports", "verify"]

LEVELS = ("coverage", "bits", "parity", "documented")
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
    progress: Callable[[str], None] | None = None,
    scans: list[Scan] | None = None,
) -> Report:
    """Verify the converted checkpoint `out`, against the `source` it was made from; without one given, the
    source that the manifest records is used where it still lies there.

    `levels` (None: all) and everything else that is asked for by name must run for the report to pass.
    `no_source` says that there is none to compare with: the report passes then where the output is consistent
    with its manifest. `accept` names foretold differences, which then do not fail.

    `prompts` (rows of token ids, or a JSON file of them) are added to the fixed ones. `checkpoint_id` is a
    published name, to find documented values by. `settings` are facts that the source's files do not hold,
    under their Hugging Face names; those recorded in the output's manifest are known already.
    `transformers_python` is a Python, or a folder of packages, whose transformers judges what the installed
    one lacks (None: CKPT_TOOL_TRANSFORMERS). `scans` is what `scan` gave for the output, if that was read
    already. Raises `CkptToolError` for what cannot be opened; all else is a finding."""
    named = (levels,) if isinstance(levels, str) else tuple(dict.fromkeys(levels or ()))
    asked = LEVELS if levels is None else named
    _check_choices(asked, against, compute_dtype, device)
    _check_one(source, no_source)
    accepted, elsewhere = tuple(accept), transformers_python
    check_names(accepted)
    if isinstance(prompts, str | os.PathLike):
        prompts = read_prompts(prompts)  # before anything large is in memory
    began = time.monotonic()
    tell = progress or (lambda text: None)
    report = Report("ckpt-tool verify")
    with opened(out, source, settings, look_for_source=not no_source) as subject:
        report.facts |= _facts(subject, out, source, no_source)
        subject.accepted = accepted
        report.claim = _claim(subject, named, against, checkpoint_id, no_source)
        scans = _scanned(subject, asked, tell) if scans is None else scans
        if "coverage" in asked:
            report.findings += coverage(subject, scans)
            report.findings += documents(subject)
            report.findings += confirm(subject)
        report.findings += unneeded(subject, accepted)
        if "bits" in asked:
            tell("bits: comparing with the source")
            report.findings += bits(subject, scans)
        if {"parity", "documented"} & set(asked) or against is not None:
            wanted = Asked(asked, against, prompts, compute_dtype, device, checkpoint_id, accepted, elsewhere)
            report.findings += _computed(subject, wanted, report.facts, tell)
        report.findings += by_bits(subject, report.findings)
    report.facts["seconds"] = f"{time.monotonic() - began:.1f}"
    return report


def _scanned(subject: Subject, asked: Iterable[str], tell: Callable[[str], None]) -> list[Scan]:
    """What the levels that look at every byte of the output share."""
    if not {"coverage", "bits"} & set(asked):
        return []
    tell("reading the output")
    return list(scan(subject.output))


def _computed(
    subject: Subject, asked: Asked, facts: dict[str, str], tell: Callable[[str], None]
) -> list[Finding]:
    """The levels that need torch; without it the others still say what they say."""
    try:
        from ckpt_tool.verify.compute import compute
    except ImportError as error:
        return not_computed(error, asked.levels, asked.against)
    return compute(subject, asked, facts, tell)


def _check_one(source: str | os.PathLike[str] | None, no_source: bool) -> None:
    if no_source and source is not None:
        fail("usage", "expected a source to compare with, or none, found both", where="no_source")


def _check_choices(levels: Iterable[str], against: str | None, compute_dtype: str, device: str) -> None:
    for label, values, known in (
        ("levels", levels, LEVELS),
        ("against", (against,) if against else (), JUDGES),
        ("compute_dtype", (compute_dtype,), DTYPES),
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
    subject: Subject, levels: tuple[str, ...], against: str | None, checkpoint_id: str | None, no_source: bool
) -> Claim:
    """What the caller asked to be shown, by name."""
    asked = [(level, f"level {level}") for level in levels]
    if against is not None:
        asked.append((against, f"--against {against}"))
    if checkpoint_id is not None:
        asked.append(("documented", f"--checkpoint-id {checkpoint_id}"))
    found: Against = "manifest" if subject.manifest is not None else "nothing"
    return Claim("source" if subject.source is not None else found, tuple(dict(asked).items()), no_source)
