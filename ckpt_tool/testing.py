"""For tests of one's own: `assert_parity` fails with the report where `verify` does not pass."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_tool.verify.report import Finding, Report


def assert_parity(
    out: str | os.PathLike[str], source: str | os.PathLike[str] | None = None, **asked: Any
) -> Report:
    """Verify `out` against `source` and return the report; `asked` are the arguments of
    `ckpt_tool.verify.verify`. AssertionError with the findings where it does not pass, and `CkptToolError`
    where it cannot be opened."""
    from ckpt_tool.verify import verify

    report = verify(out, source, **asked)
    if report.status != "pass":
        raise AssertionError(as_text(report))
    return report


def as_text(report: Report) -> str:
    """The report as a terminal of 100 columns has it, without what passed."""
    from rich.console import Console

    from ckpt_tool.verify.report import Report as Shown

    told = Shown(
        report.title, report.facts, list(_of_interest(report.findings)), report.could_not_run, report.claim
    )
    screen = Console(file=io.StringIO(), width=100, highlight=False, color_system=None)
    told.render(screen)
    text: str = screen.file.getvalue()  # type: ignore[attr-defined]
    return f"{report.status}: {report.headline}\n\n{text}"


def _of_interest(findings: Iterable[Finding]) -> Iterable[Finding]:
    return (f for f in findings if f.status not in ("pass", "note") or f.level == "diagnosis")
