"""Differences that a user may accept by name: those that the plan of a family foretells, and casts that
nothing records as asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ckpt_tool.checkpoint.base import DTYPES, FLOATS
from ckpt_tool.convert.casting import CASTABLE
from ckpt_tool.convert.families import FAMILIES, family
from ckpt_tool.convert.layout import Step
from ckpt_tool.convert.quantised_config import TARGETS
from ckpt_tool.errors import fail
from ckpt_tool.verify.casted import loses
from ckpt_tool.verify.claims import CAST_FIRST
from ckpt_tool.verify.report import Finding
from ckpt_tool.verify.subject import Subject


def cast_name(dtype: str) -> str:
    """`cast-to-bfloat16` for BF16."""
    return f"cast-to-{DTYPES[dtype].torch}"


def dequantised_name(dtype: str) -> str:
    """`dequantised-to-bfloat16` for BF16."""
    return f"dequantised-to-{DTYPES[dtype].torch}"


def known_names() -> list[str]:
    """All that can be accepted, whatever the checkpoint."""
    foretold = [name for f in FAMILIES for name in family(f).foretold]
    return sorted({*foretold, *map(cast_name, CASTABLE), *map(dequantised_name, TARGETS)})


def check_names(accept: Collection[str]) -> None:
    """Raises `usage` for a name that nothing is called."""
    if not accept:
        return  # known names are those of all families
    known = known_names()
    for name in accept:
        if name not in known:
            fail("usage", f"expected {' or '.join(known)}, found {name!r}", where="--accept")


def undeclared_cast(subject: Subject) -> Iterator[Finding]:
    """What a cast is that nothing records as asked for. One to a wider dtype keeps every value and needs no
    acceptance: whether they are kept, the bits show."""
    to, plan = subject.undeclared_cast, subject.plan
    if to is None or plan is None:
        return
    held = [t for f in plan.outputs for t in f.tensors if t.dtype in FLOATS]
    cast = {(p.file, p.name) for s in plan.steps if not s.compare for p in s.targets if _is_cast(s)}
    count = sum((t.file, t.name) in cast for t in held)
    which = f"all {count}" if count == len(held) else f"{count} of {len(held)}"
    name, data = cast_name(to), dict[str, object](cast=DTYPES[to].torch)
    text = f"{which} floating tensors are cast to {DTYPES[to].torch}, which nothing records as asked for"
    if not loses(plan):
        data |= {"wider": f"{which} floating tensors to {DTYPES[to].torch}"}
        yield Finding("coverage", "dtype", "note", f"{text}: it holds every value of the source", data=data)
    elif name in subject.accepted:
        data |= {CAST_FIRST: True}
        yield Finding("coverage", "dtype", "note", f"{text}; accepted as {name}", data=data)
    else:
        text = f"expected the source's dtypes, found a cast: {text}; --accept {name} accepts it"
        yield Finding("coverage", "dtype", "fail", text, data={**data, "exactness": "differs"})


def undeclared(subject: Subject) -> Iterator[Finding]:
    """That an output has numbers for the source's codes, which nothing records as asked for."""
    packed = subject.packed
    if packed is None or packed.declared or packed.dtype is None or packed.inventory is None:
        return
    dtype, count = DTYPES[packed.dtype].torch, len(packed.inventory.weights)
    how = f"by the recipe {packed.recipe}" if packed.known else "by no recipe that is known here"
    text = f"{count} quantised weights ({', '.join(packed.inventory.words)}) are {dtype} numbers, {how}"
    name, data = dequantised_name(packed.dtype), {"dequantised": dtype, "recipe": packed.recipe}
    if name in subject.accepted:
        yield Finding("coverage", "dtype", "note", f"{text}; accepted as {name}", data=data)
    else:
        text = f"expected codes and scales, or a record that numbers were asked for: {text}"
        more = {**data, "exactness": "differs"}
        yield Finding("coverage", "dtype", "fail", f"{text}; --accept {name} accepts it", data=more)


def without_coverage(subject: Subject) -> Iterator[Finding]:
    """What coverage says of dtypes, where it was not asked for: every level compares with a source that was
    cast, or made numbers, as the output is. What is recorded as asked for (a cast that rounds, heads that are
    pooled) is named all the same."""
    yield from undeclared_cast(subject)
    yield from undeclared(subject)
    if cast_as_recorded(subject):
        text = "the source is compared as it is once it is cast or pooled, as recorded"
        yield Finding("coverage", "dtype", "note", text, data={CAST_FIRST: True})


def cast_as_recorded(subject: Subject) -> bool:
    """Whether the source is rounded or pooled, as is recorded, before anything is compared with it."""
    plan = subject.plan
    if plan is None or subject.undeclared_cast is not None:
        return False
    return loses(plan) or any(s.mean for s in plan.steps)


def _is_cast(step: Step) -> bool:
    return {p.dtype for p in step.sources} != {step.targets[0].dtype}


def unneeded(subject: Subject, accept: Collection[str]) -> list[Finding]:
    """A note for each accepted name that this output does not need."""
    needed = {f.name for f in subject.plan.foretold} if subject.plan is not None else set()
    if subject.undeclared_cast is not None:
        needed.add(cast_name(subject.undeclared_cast))
    if subject.packed is not None and subject.packed.dtype is not None and not subject.packed.declared:
        needed.add(dequantised_name(subject.packed.dtype))
    return [
        Finding("coverage", "accept", "note", f"nothing here is called {name}: --accept had no effect")
        for name in dict.fromkeys(accept)
        if name not in needed
    ]
