"""What a report says of levels whose package is not installed: they were not shown, and how they would be."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_tool.errors import missing_package
from ckpt_tool.verify.report import Finding

# The check that each level would have answered first.
CHECKS = {
    "parity": "lockstep",
    "training": "gradients",
    "documented": "documented values",
    "transformers": "logits",
}


def not_run(level: str, check: str, error: ImportError) -> Finding:
    """The finding of a check that the missing package keeps from running; raises `error` itself where it is
    about no package that an install may lack."""
    problem = missing_package(error)
    if problem is None:
        raise error
    text = f"{problem.message}: {problem.hint}"
    return Finding(level, check, "skipped", text, data={"kind": problem.kind, "open": True})


def not_computed(error: ImportError, levels: Sequence[str], against: str | None) -> list[Finding]:
    """Of every level that computes and was asked for, that it did not run."""
    wanted = [level for level in (*levels, against) if level in CHECKS]
    return [not_run(str(level), CHECKS[str(level)], error) for level in wanted]
