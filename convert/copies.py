"""Tables that the Hugging Face layout makes longer by copies of some of their own rows, such as tokens that
start from the embedding of others. Converting copies the rows; the way back leaves them out, and first
compares each with the row that it was copied from, since an original has a place for one of the two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ckpt_tool.convert.layout import COPIED, Part, Step

DROPPED = "--drop-copies"  # what a plan that leaves copies out without comparing them calls lossy


def with_copies(step: Step, axis: str, held: int, rows: Sequence[int]) -> Step:
    """`step` with targets that hold, beyond the `held` first of `axis` which are the sources' own, a copy of
    each of `rows` in order. Steps without that axis stay as they are."""
    if axis not in step.sizes or not rows:
        return step
    axes = tuple((a, held + len(rows) if a == axis else n) for a, n in step.axes)
    own = tuple(replace(p, ranges=(*p.ranges, (axis, 0, held))) for p in step.sources)
    again = tuple(_again(p, axis, held, at, row) for at, row in enumerate(rows, held) for p in step.sources)
    return replace(step, axes=axes, sources=(*own, *again))


def _again(part: Part, axis: str, held: int, at: int, row: int) -> Part:
    """The tensor so that its `row` lies at `at`, and only that counts."""
    first = at - row
    return replace(part, ranges=(*part.ranges, (axis, first, first + held)), taken=((axis, at, at + 1),))


def apart(step: Step, *, compared: bool = True) -> Iterator[Step]:
    """A step with copies as one that has the sources' own rows alone and, if they are to be `compared` on the
    way back, one for each copy. Other steps as they are."""
    own = tuple(p for p in step.sources if not p.taken)
    if len(own) == len(step.sources):
        yield step
        return
    copies = [p for p in step.sources if p.taken]
    (axis, at, _), *_ = copies[0].taken
    yield replace(step, sources=own, targets=_taking(step.targets, axis, 0, at))
    for place in dict.fromkeys(p.taken for p in copies) if compared and not step.compare else ():
        sources = tuple(p for p in copies if p.taken == place)
        ((_, start, stop),) = place
        yield replace(step, sources=sources, targets=_taking(step.targets, axis, start, stop), copied=True)


def _taking(parts: Sequence[Part], axis: str, start: int, stop: int) -> tuple[Part, ...]:
    return tuple(replace(p, taken=((axis, start, stop),)) for p in parts)


def in_words(step: Step) -> str:
    """Which rows a step copies, or compares as copies; empty where it does neither."""
    found: dict[int, int] = {}
    for p in (*step.sources, *step.targets):
        for axis, at, stop in p.taken:
            for a, first, _ in p.ranges:
                if a == axis and stop - at == 1:
                    found[at] = at - first
    told = ", ".join(f"row {at} a copy of row {row}" for at, row in found.items())
    if step.compare == COPIED:
        return f"compared: {told or 'a copy'}"
    return told or ("a copy" if step.copied else "")


def copied_rows(steps: Sequence[Step]) -> dict[str, list[int]]:
    """By the name of an original's tensor, the rows of it that the converted one holds once more after the
    last, in order."""
    found: dict[str, dict[int, int]] = {}
    for step in (s for s in steps if s.compare in ("", COPIED)):
        for p in (*step.sources, *step.targets):
            for axis, at, _ in p.taken:
                for first in (lo for a, lo, _ in p.ranges if a == axis and lo):
                    found.setdefault(p.name, {})[at] = at - first
    return {name: [rows[at] for at in sorted(rows)] for name, rows in found.items() if rows}


def joined(steps: Sequence[Step]) -> list[Step]:
    """Steps that `apart` has made, and others, as they were before."""
    made: dict[tuple[str, ...], Step] = {}
    for k, step in enumerate(steps):
        cut = any(p.taken for p in step.targets)
        key = tuple(p.file + "\0" + p.name for p in step.targets) if cut else (str(k),)
        first = made.get(key)
        if first is None:
            whole = tuple(replace(p, taken=()) for p in step.targets)
            made[key] = replace(step, targets=whole) if cut else step
        else:
            made[key] = replace(first, sources=(*first.sources, *step.sources))
    return list(made.values())
