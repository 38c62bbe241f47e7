"""In which dtype each tensor of a plan is written: its own, or the one that the user asked for.

Nothing is cast that nobody asked to cast. Training in mixed precision leaves norms, routers or heads in
float32 beside 16-bit matrices, and either layout can hold that. Only tensors that become one must agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ckpt_tool.checkpoint.base import DTYPES, FLOATS
from ckpt_tool.convert.layout import Part, Step
from ckpt_tool.convert.steps import Steps
from ckpt_tool.convert.widths import CASTABLE, common, rounds
from ckpt_tool.errors import Problem


def typed(steps: Steps, dtype: str | None) -> Steps:
    """The steps with the dtype of every target: that of its sources, or `dtype` where these are floating. The
    targets of a comparison are in the dtype that it is made in: the asked one, else the narrowest that holds
    every value of both sides, so that nothing is rounded to make it equal."""
    made = steps.alike(lambda step: step if step.compare else _in(step, _asked(step.sources, dtype)))
    compares: dict[str, set[str]] = {}  # names by file
    for part in (p for step in made.where(lambda s: s.compare) for p in step.targets):
        compares.setdefault(part.file, set()).add(part.name)
    written: dict[tuple[str, str], str] = {}
    for kind, columns in made.runs() if compares else ():
        step = made.templates[kind]
        for p, names in () if step.compare else zip(step.targets, columns[len(step.sources) :], strict=True):
            for name in compares.get(p.file, set()).intersection(names):
                written[p.file, name] = p.dtype

    def compared(step: Step) -> Step:
        both = [*_dtypes(step.sources), *(written.get((p.file, p.name), p.dtype) for p in step.targets)]
        return _in(step, _asked(step.sources, dtype) if dtype is not None else common(both))

    return made.changed(compared, where=lambda s: s.compare)


def _in(step: Step, dtype: str) -> Step:
    if all(p.dtype == dtype for p in step.targets):
        return step
    return step.with_targets(tuple(replace(p, dtype=dtype) for p in step.targets))


def _asked(sources: Sequence[Part], dtype: str | None) -> str:
    return dtype if dtype is not None and sources[0].dtype in FLOATS else sources[0].dtype


def _dtypes(parts: Iterable[Part]) -> list[str]:
    return list(dict.fromkeys(p.dtype for p in parts))


def mixed(steps: Steps, dtype: str | None) -> Iterator[Problem]:
    """Tensors that are to become one and differ in dtype, where nobody said which it shall have."""

    def is_mixed(step: Step) -> bool:
        found = _dtypes(step.sources)
        return len(found) > 1 and not step.compare and (dtype is None or not set(found) <= set(CASTABLE))

    for step in steps.where(is_mixed):
        found = _dtypes(step.sources)
        most, _ = Counter(p.dtype for p in step.sources).most_common(1)[0]
        odd = next(p for p in step.sources if p.dtype != most)
        other = next(p for p in step.sources if p.dtype == most)
        wide = DTYPES[common(found)].torch
        yield Problem(
            "dtype-mismatch",
            f"expected {most} as in {other.name}, with which it becomes one tensor, found {odd.dtype}",
            odd.file,
            odd.name,
            f"--dtype {wide} casts all tensors, which loses nothing" if set(found) <= set(CASTABLE) else None,
        )


CAST, WIDENED = "--dtype: floating tensors cast from ", "--dtype: floating tensors widened from "


def words(
    steps: Steps, dtype: str | None, written: Counter[str], *, loaded: bool
) -> tuple[list[str], list[str]]:
    """Notes on the dtypes of a plan, see `kept_words`, and what the asked cast loses."""
    widened, rounded = cast_words(steps, dtype)
    return [*widened, *kept_words(written, loaded=loaded)], rounded


def cast_words(steps: Steps, dtype: str | None) -> tuple[list[str], list[str]]:
    """What the asked cast does, in words: a note where the dtype holds every value of the others, else what
    it loses; neither where every tensor has that dtype."""
    cast = sorted({p.dtype for s in steps.templates for p in s.sources if p.dtype in FLOATS} - {dtype})
    if dtype is None or not cast:
        return [], []
    told = f"{', '.join(cast)} to {dtype}"
    if any(rounds(each, dtype) for each in cast):
        return [], [CAST + told]
    return [f"{WIDENED}{told}, which loses no value"], []


def that_lose(told: Iterable[str]) -> list[str]:
    """Those that tell of a loss: older manifests call every cast one."""
    return [text for text in told if not (text.startswith(CAST) and not _loses(text.removeprefix(CAST)))]


def _loses(told: str) -> bool:
    before, _, after = told.partition(" to ")
    return any(rounds(each, after) for each in before.split(", "))


def kept_words(written: Counter[str], *, loaded: bool) -> list[str]:
    """A note on tensors of several dtypes, of which so many are `written`; `loaded` for a model that
    transformers loads: it gives all of them one dtype, that of the config unless it is told another."""
    counts = Counter({dtype: n for dtype, n in written.items() if dtype in FLOATS})
    if len(counts) < 2 or "F8_E4M3" in counts:  # of codes and their scales
        return []
    told = ", ".join(f"{n} {DTYPES[d].torch}" for d, n in counts.most_common())
    hint = f"; loaded in {DTYPES[common(counts)].torch}, no value is rounded" if loaded else ""
    return [f"each tensor keeps its dtype ({told}){hint}"]
