"""A gate against an earlier run of it: what failed then and is no worse now is a note, and what was better
then fails, also where it is within its bars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.errors import fail
from ckpt_tool.verify.claims import CLASSES, Claim
from ckpt_tool.verify.report import Finding, Report

LEVEL = "baseline"
LIMIT = 64 << 20
SLACK = 1e-6  # relative; the same computation gives the same number
Key = tuple[str, str, str | None]


@dataclass(frozen=True)
class Recorded:
    """One report of the earlier run: its class, and status and number of each finding. The same question
    asked several times has the best of its answers."""

    exactness: str | None
    findings: Mapping[Key, tuple[str, float | None]] = field(default_factory=dict)


def read_baseline(path: Path) -> dict[str, Recorded]:
    """The reports by their titles. Kinds: `read-failed`, `bad-config`."""
    try:
        with open(path, "rb") as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        fail("read-failed", f"cannot be read: {error.strerror}", file=path, where="--baseline")
    content = parse_object(data, file=path.name)
    reports = content.get("reports")
    if not isinstance(reports, list) or not all(isinstance(r, dict) for r in reports):
        hint = "`ckpt-tool gate PARITY.TOML --json FILE` writes one"
        message = "expected the JSON report of a gate, found another file"
        fail("bad-config", message, file=path.name, where="--baseline", hint=hint)
    return {str(r.get("title")): _recorded(r) for r in reports}


def _recorded(report: Mapping[str, Any]) -> Recorded:
    found: dict[Key, tuple[str, float | None]] = {}
    for f in report.get("findings") or []:
        if isinstance(f, dict):
            measured = f.get("measured")
            number = float(measured) if isinstance(measured, int | float) else None
            key = (str(f.get("level")), str(f.get("check")), f.get("where"))
            found.setdefault(key, (str(f.get("status")), number))
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
    report.findings = [*made, *_worse(now, before)]


def _as_before(f: Finding, before: Recorded) -> Finding:
    then = before.findings.get((f.level, f.check, f.where))
    if f.status not in ("fail", "undecided") or then is None or then[0] != f.status:
        return f
    number = then[1]
    if f.measured is not None and (number is None or f.measured > number * (1 + SLACK)):
        return f
    data = {k: v for k, v in f.data.items() if k != "exactness"}
    return replace(f, status="note", message=f"as in the baseline ({f.status}): {f.message}", data=data)


def _worse(now: str | None, before: Recorded) -> list[Finding]:
    """Whether the class of the result is another than it was."""
    then = before.exactness
    if then is None or then == "differs":
        return []
    worse = now is None or CLASSES.index(now) < CLASSES.index(then)
    text = f"{then} in the baseline, {now or 'not compared'} now"
    return [Finding(LEVEL, "exactness", "fail" if worse else "pass", text)]
