"""`python -m ckpt_tool.annotations parity.json`: what failed or stayed open in a gate's JSON report, as
annotations of a GitHub workflow run.

Source: docs.github.com, workflow commands for GitHub Actions: `::error title=T::message`, in which %, CR and
LF are escaped, in a property also : and ,.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MOST = 10  # annotations of one kind that a step shows
KINDS = {"fail": "error", "undecided": "warning"}


def annotated(data: Mapping[str, Any]) -> Iterator[str]:
    """One line for each check that did not pass, with its headline, then its findings."""
    for report in data.get("reports", [data]):
        kind = KINDS.get(report["status"])
        if kind is None:
            continue
        title = str(report["title"])
        yield command(kind, title, f"{report['status']}: {report.get('headline', '')}")
        for f in report["findings"]:
            if f["status"] in KINDS:
                where = f"{f['where']}: " if f["where"] else ""
                yield command(KINDS[f["status"]], f"{title}: {f['check']}", where + f["message"])


def command(kind: str, title: str, message: str) -> str:
    return f"::{kind} title={_escaped(title, ':,')}::{_escaped(message)}"


def _escaped(text: str, more: str = "") -> str:
    return "".join(f"%{ord(c):02X}" if c in "%\r\n" + more else c for c in text)


def main() -> None:
    data = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for number, line in enumerate(annotated(data)):
        if number < MOST:
            print(line)


if __name__ == "__main__":
    main()
