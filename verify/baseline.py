"""A gate against an earlier run of it: what failed then and is no worse now is a note, and what was better
then fails, also where it is within its bars. What has no number is no worse where it says the same. Where a
note stands for a failure, what passed then and is not shown now leaves the verdict undecided."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.errors import fail, fail_unread
from ckpt_tool.verify.claims import CLASSES, Claim
from ckpt_tool.verify.report import Finding, Report

LEVEL = "baseline"
LIMIT = 64 << 20
SLACK = 1e-6  # relative; the same computation gives the same number
DIGEST = re.compile(r"\b[0-9a-f]{8,}\b")  # says that something is another, not by how much
Key = tuple[str, str, str | None]
MORE = "more_is_better"  # in a finding's data, where it is so of its number


@dataclass(frozen=True)
class Answer:
    """What a finding said, with its number and the phases that differ where it has them."""

    status: str
    measured: float | None
    words: str
    differing: frozenset[str]


@dataclass(frozen=True)
class Recorded:
    """One report of the earlier run: its class, and of each finding what it said. A question that
    was asked several times has all of its answers."""

    exactness: str | None
    findings: Mapping[Key, list[Answer]] = field(default_factory=dict)


def read_baseline(path: Path) -> dict[str, Recorded]:
    """The reports by their titles. Kinds: those of `fail_unread`, `bad-config`."""
    try:
        with open(path, "rb") as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        fail_unread(error, path, "--baseline")
    content = parse_object(data, file=path.name)
    reports = content.get("reports")
    if not isinstance(reports, list) or not all(isinstance(r, dict) for r in reports):
        hint = "`ckpt-tool gate PARITY.TOML --json FILE` writes one"
        message = "expected the JSON report of a gate, found another file"
        fail("bad-config", message, file=path.name, where="--baseline", hint=hint)
    return {str(r.get("title")): _recorded(r) for r in reports}


def _recorded(report: Mapping[str, Any]) -> Recorded:
    found: dict[Key, list[Answer]] = {}
    for f in report.get("findings") or []:
        if isinstance(f, dict):
            key = (str(f.get("level")), str(f.get("check")), str(f["where"]) if f.get("where") else None)
            found.setdefault(key, []).append(_answer(f))
    exactness = report.get("exactness")
    return Recorded(exactness if exactness in CLASSES else None, found)


def hold_against(report: Report, recorded: Mapping[str, Recorded]) -> None:
    """Change the findings of `report` to what the earlier run lets stand of them, and its claim where that is
    then all that it shows."""
    before = recorded.get(report.title)
    if before is None:
        text = "the baseline has no check of this name: it is judged by itself"
        report.findings.append(Finding(LEVEL, "recorded", "note", text))
        return
    now = report.exactness
    made = [_as_before(f, before) for f in report.findings]
    if made != report.findings:
        report.claim = Claim("baseline")
        made += _not_shown(made, before)
    report.findings = [*made, *_worse(now, before)]


def _answer(f: Mapping[str, Any]) -> Answer:
    value, data = f.get("measured"), f.get("data")
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    measured = float(str(value)) if plain or value in ("inf", "nan") else None  # JSON has words for these
    phases = data.get("differing") if isinstance(data, dict) else None
    differing = frozenset(map(str, phases)) if isinstance(phases, list) else frozenset()
    return Answer(str(f.get("status")), measured, str(f.get("message")), differing)


def _as_before(f: Finding, before: Recorded) -> Finding:
    if f.status not in ("fail", "undecided"):
        return f
    plain = f.to_json()
    now = _answer(plain)
    then = before.findings.get((f.level, f.check, plain["where"]), ())
    if not any(_no_worse(now, a, bool(f.data.get(MORE))) for a in then):
        return f
    data = {k: v for k, v in f.data.items() if k != "exactness"}
    return replace(f, status="note", message=f"as in the baseline ({f.status}): {f.message}", data=data)


def _no_worse(now: Answer, then: Answer, more: bool) -> bool:
    """Whether an answer is no worse than an earlier one; `more`: the larger number is the better one."""
    if now.status != then.status or not now.differing <= then.differing:
        return False
    x, y = now.measured, then.measured
    if x is None or y is None or math.isnan(x) or math.isnan(y):
        return DIGEST.sub("", now.words) == DIGEST.sub("", then.words)
    return x >= y * (1 - SLACK) if more else x <= y * (1 + SLACK)


def _not_shown(made: list[Finding], before: Recorded) -> list[Finding]:
    """The checks that passed then and do not run now: of none is it known whether it is worse."""
    passed = {key[:2]: None for key, each in before.findings.items() if any(a.status == "pass" for a in each)}
    answered = {(f.level, f.check) for f in made if f.status != "skipped"}
    text = "passed in the baseline, and was not shown now"
    lost = [key for key in passed if key not in answered and key[0] != LEVEL]
    return [Finding(LEVEL, "shown", "undecided", f"{level}: {check} {text}") for level, check in lost]


def _worse(now: str | None, before: Recorded) -> list[Finding]:
    """Whether the class of the result is another than it was."""
    then = before.exactness
    if then is None or then == "differs":
        return []
    worse = now is None or CLASSES.index(now) < CLASSES.index(then)
    text = f"{then} in the baseline, {now or 'not compared'} now"
    return [Finding(LEVEL, "exactness", "fail" if worse else "pass", text)]
