"""Two checkpoints of which no family recognises one at least, compared under the names that their tensors are
stored by: when that is done, and what is said beside the tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.convert.params import NO_CONFIG
from ckpt_tool.errors import CkptToolError, Problem, printable
from ckpt_tool.verify.as_hf import Shown
from ckpt_tool.verify.report import Finding

CONFIG = "config.json"
LEFT_OUT = "left out"
NO_FAMILY = "as no family recognises them, nothing of their layout or of what they compute is claimed"
NAMED = 5  # keys in a sentence, before the rest is counted
DUPLICATES = "files of ranks are compared one by one: give a file on either side"


def unrecognised(error: CkptToolError) -> bool:
    """Whether a side could be opened and no family knows it, or none without its config.json."""
    return error.kind == "unknown-family" or any(p.hint == NO_CONFIG for p in error.problems)


def check_matched(one: Shown, other: Shown, error: CkptToolError) -> None:
    """Fail, with `error` and the reason, where names do not tell which tensor is which: of several files that
    have the same name, as ranks do, or where no name is on both sides."""
    for side in (one, other):
        counts = Counter(t.name for t in side.checkpoint)
        if (double := next((n for n, k in counts.items() if k > 1), None)) is not None:
            text = f"expected one tensor of each name, to compare them as stored, found {counts[double]}"
            label = side.checkpoint.path.name
            raise CkptToolError(*error.problems, Problem(error.kind, text, label, double, DUPLICATES))
    here, there = ({t.name for t in s.checkpoint} for s in (one, other))
    if here.isdisjoint(there):
        text = "expected names that are in both, to compare the tensors as stored, found none"
        raise CkptToolError(*error.problems, Problem(error.kind, text))


def unread(there: Shown, alone: list[TensorInfo]) -> list[TensorInfo]:
    """Of tensors that the other side has `alone` those that are not in the files `there` either."""
    left = {t.tensor.name for t in there.checkpoint.left_out}
    return [t for t in alone if t.name not in left]


def beside(one: Shown, other: Shown) -> Iterator[Finding]:
    """The tensors in the files that are not read, each by its reason; they were not compared."""
    for label, side in (("A", one), ("B", other)):
        reasons: dict[str, list[str]] = {}
        for left in side.checkpoint.left_out:
            reasons.setdefault(left.reason, []).append(left.tensor.name)
        for reason, names in reasons.items():
            yield _left_out(label, reason, names)


def states(one: Shown, other: Shown) -> Iterator[Finding]:
    """What a run of training left beside the model, of which alone a family's reading speaks."""
    for label, side in (("A", one), ("B", other)):
        if side.states:
            yield _left_out(label, "states of a training run", list(side.states))


def _left_out(label: str, reason: str, names: list[str]) -> Finding:
    text = f"not compared: {_some(names)} of {label}, left out ({reason})"
    data = {"count": len(names), "tensors": names[:100]}
    return Finding("tensors", LEFT_OUT, "skipped", text, data=data)


def documents(one: Shown, other: Shown) -> Iterator[Finding]:
    """config.json by its values, as nothing tells here what they mean."""
    there = [CONFIG in s.documents for s in (one, other)]
    if not all(there):
        if any(there):
            text = f"{'AB'[there.index(True)]} alone has a {CONFIG}"
            yield Finding("config", "config", "skipped", text, data={"open": True})
        return
    a, b = (s.checkpoint.json(CONFIG) for s in (one, other))
    keys = [k for k in sorted(a.keys() | b.keys()) if (k in a, a.get(k)) != (k in b, b.get(k))]
    if keys:
        text = f"other values for {_some(keys)}"
        yield Finding("config", "config", "fail", text, CONFIG)
    else:
        yield Finding("config", "config", "pass", f"{CONFIG} has the same values")


def _some(names: list[str]) -> str:
    shown = ", ".join(printable(n, 60) for n in names[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
