"""What a run learnt of values and of copies, in words: findings that are recorded, problems that stop it, and
which findings a strict run refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ckpt_tool.convert.comparing import Difference
from ckpt_tool.convert.copies import in_words
from ckpt_tool.convert.layout import COPIED, Part, Step
from ckpt_tool.convert.manifest import Finding
from ckpt_tool.convert.plan import Plan
from ckpt_tool.convert.values import Values
from ckpt_tool.errors import Problem

REFUSED = ("non-finite", "shard-conflict")  # kinds of what --strict and --strict-replicas refuse


def of_values(values: Values, shape: tuple[int, ...], file: str, name: str) -> Finding | None:
    """What is odd about the values of a tensor, if anything."""
    if values.non_finite:
        first = [int(k) for k in np.unravel_index(values.first or 0, shape or (1,))]
        text = f"expected finite values, found {values.non_finite} that are not, the first at {first}"
        return Finding("non-finite", text, file, name, {"count": values.non_finite, "first": first})
    if values.all_zero:
        return Finding("all-zero", "expected values, found only zeros", file, name)
    if values.denormal_only:
        return Finding("denormal-only", "expected values, found only denormal ones", file, name)
    return None


def of_copies(plan: Plan, step: Step, found: Difference) -> Problem | Finding:
    """What to say of a step of `plan` that compares, and found what should be equal to differ."""
    part, kept = step.sources[0], _kept(plan, step)
    text = (
        f"{found.count} of {found.elements} values differ, max |delta| {found.max_delta:.3g}, "
        f"relative {found.relative_rms:.3g}"
    )
    if step.compare == "tied":
        rows = f"; {int(found.rows.sum())} of {found.rows.size} rows" if len(part.dims) > 1 else ""
        message = f"expected the values of {kept.name} as the config ties them, found {text}{rows}"
        return Problem("tied-mismatch", message, part.file, part.name, step.hint or None)
    if step.compare == COPIED:
        target = step.targets[0]
        message = f"expected what {target.name} is made from, {in_words(step)}, found {text}"
        return Problem("tied-mismatch", message, part.file, part.name, step.hint or None)
    message = f"expected the copy in {kept.file}, found {text}"
    if plan.strict_replicas or found.is_large:
        hint = None if found.is_large else "without --strict-replicas it is only recorded"
        return Problem("shard-conflict", message, part.file, part.name, hint)
    details = {
        "kept": kept.file,
        "count": found.count,
        "elements": found.elements,
        "max_delta": found.max_delta,
        "relative_rms": found.relative_rms,
    }
    return Finding("replica-difference", message, part.file, part.name, details)


def _kept(plan: Plan, step: Step) -> Part:
    """The source of what was written where `step` compares."""
    target = step.targets[0]
    held = (target.file, target.name)
    writers = (
        s.sources[0] for s in plan.steps if not s.compare and any((t.file, t.name) == held for t in s.targets)
    )
    return next(writers, target)


def refused(findings: Iterable[Finding], *, strict: bool, strict_replicas: bool) -> Iterator[Problem]:
    """Those of the findings that `strict`, or a plan that is strict about replicas, refuses."""
    for f in findings:
        if f.kind == "non-finite" and strict:
            hint = "without --strict it is only recorded"
            yield Problem("non-finite", f.message, f.file, f.tensor, hint)
        elif f.kind == "replica-difference" and strict_replicas:
            hint = "without --strict-replicas it is only recorded"
            yield Problem("shard-conflict", f.message, f.file, f.tensor, hint)
