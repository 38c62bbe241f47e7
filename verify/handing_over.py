"""A check and its report as lines of text, from one process to another, with nothing lost on the way."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from ckpt_tool.verify.claims import Claim
from ckpt_tool.verify.gate import Check
from ckpt_tool.verify.report import Finding, Report, Table

TUPLES = [f.name for f in fields(Check) if str(f.type).startswith("tuple")]


def check_line(check: Check) -> str:
    return json.dumps(asdict(check))


def check_of(line: str) -> Check:
    said = json.loads(line)
    for name in TUPLES:
        said[name] = None if said[name] is None else tuple(said[name])
    return Check(**said)


def report_line(report: Report) -> str:
    """NaN and infinities are written as Python's json does, which reads them again."""
    return json.dumps({**asdict(report), "findings": [asdict(f) for f in report.findings]})


def report_of(line: str) -> Report:
    said = json.loads(line)
    claim = said.pop("claim")
    asked = tuple((str(level), str(words)) for level, words in claim["asked"])
    said["claim"] = Claim(claim["against"], asked, claim["no_source"])
    said["findings"] = [_finding(f) for f in said["findings"]]
    return Report(**said)


def _finding(said: dict[str, Any]) -> Finding:
    tables = [
        Table(tuple(t["columns"]), tuple(tuple(row) for row in t["rows"]), t["brief"]) for t in said["tables"]
    ]
    return Finding(**{**said, "tables": tuple(tables)})
