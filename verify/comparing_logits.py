"""Two checkpoints through one reading, phase by phase: B is given A's input to each layer, so that what each
layer changes is told apart, and runs free beside it, as its user would see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch

import ckpt_tool.reference as reference
from ckpt_tool.reference import NotComputed
from ckpt_tool.verify import logits
from ckpt_tool.verify.as_hf import Shown
from ckpt_tool.verify.compute import as_read, computing_for, lengths_of
from ckpt_tool.verify.measure import CAPS, Bar, Distance, bar_for
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.prompts import Prompt, positions, prompts_for, tokenizer_of, with_inputs
from ckpt_tool.verify.report import Finding, Table, number
from ckpt_tool.verify.sides import BROKEN, Sample, Side, phase_text, side_of, tensors
from ckpt_tool.verify.weights import ranks_of

LEVEL = "numbers"
ROUNDED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
Row = tuple[str | float | None, ...]


def numbers(
    one: Shown, other: Shown, only_cast: bool, dtype: str, device: str, tell: Callable[[str], None]
) -> Iterator[Finding]:
    """The findings. `only_cast`: all tensors of one are those of the other rounded, whose cap is then the
    bar."""
    try:
        a, b = (_side(s, getattr(torch, dtype), device) for s in (one, other))
    except NotComputed as error:
        yield Finding(LEVEL, "lockstep", "skipped", f"not computed here: {error}", data={"open": True})
        return
    except (*BROKEN, TypeError) as error:
        text = f"a side cannot be read: {type(error).__name__}: {error}"
        yield Finding(LEVEL, "lockstep", "skipped", text, data={"open": True})
        return
    prompts = _prompts(one, a, b)
    if not prompts:
        yield Finding(LEVEL, "lockstep", "skipped", "no prompt suits both", data={"open": True})
        return
    bar = _cap(one, other) if only_cast else None
    try:
        with computing_for(one.checkpoint):
            yield from _run(a, b, prompts, bar, dtype, tell)
    except (*BROKEN, TypeError) as error:  # B's own are told phase by phase
        text = f"A cannot be computed: {type(error).__name__}: {error}"
        yield Finding(LEVEL, "lockstep", "skipped", text[:300], data={"open": True})


def _side(shown: Shown, dtype: torch.dtype, device: str) -> Side:
    (architecture, *_) = shown.config.get("architectures") or [""]
    module = reference.converted(str(architecture))
    config = module.Config.from_hf(shown.config)
    ranks = ranks_of(shown.checkpoint)
    return side_of(module, config, shown.checkpoint, ranks, dtype, device, shown.config)


def _prompts(one: Shown, a: Side, b: Side) -> dict[str, Prompt]:
    sides = [a, b]
    config, lengths = as_read(one.config, sides), lengths_of(sides)
    table = positions(dict(one.config), one.checkpoint)
    rows = prompts_for(config, None, tokenizer_of(one.checkpoint), table=table, lengths=lengths)
    return with_inputs(rows, set(a.inputs) & set(b.inputs), config, lengths)


def _cap(one: Shown, other: Shown) -> tuple[str, float]:
    """The NMSE that rounding of weights to the narrowest dtype of either side may cause, by policy."""
    held = {t.dtype for s in (one, other) for t in s.checkpoint} & ROUNDED.keys()
    narrowest = max((ROUNDED[d] for d in held), key=lambda d: CAPS[d])
    return narrowest, CAPS[narrowest]


def _run(
    a: Side, b: Side, prompts: dict[str, Prompt], cap: tuple[str, float] | None, dtype: str,
    tell: Callable[[str], None],
) -> Iterator[Finding]:  # fmt: skip
    given = {name: tensors(p, a.weights[0].device) for name, p in prompts.items()}
    x = {name: ids for name, (ids, _) in given.items()}
    free: dict[str, object] = dict(x)
    noisy = dict(x)
    rows: list[Row] = []
    failed = False
    for phase, kind in a.kinds([g for _, g in given.values()]).items():
        if kind == "head" and phase != "head":
            continue
        tell(f"numbers: {phase_text(phase)}")
        with ExitStack() as stack:
            stack.enter_context(a.keep())
            stack.enter_context(b.keep())
            worst, noise = Distance(0.0, 0.0, 0, 0.0), []
            for name, (_, more) in given.items():
                wanted = a.run(phase, x[name], more)
                sample = Sample(x[name], wanted, more)
                with ReversedSums():
                    noise.append(sample.of(a.run(phase, x[name], more)))
                    noisy[name] = a.run(phase, noisy[name], more)
                found = sample.of(_tried(b, phase, x[name], more))
                worst = max(worst, found, key=lambda d: (d.nmse, d.max_delta))
                free[name] = _tried(b, phase, free[name], more)
                x[name] = wanted
        bar = bar_for(noise, getattr(torch, dtype))
        holds = _holds(bar, worst, cap)
        failed |= not holds
        shown_bar = bar.nmse if cap is None else max(bar.nmse, cap[1])
        rows.append((phase_text(phase), worst.nmse, shown_bar, worst.max_delta, "" if holds else "differs"))
    yield _lockstep(rows, failed, cap)
    passes = [
        logits.Pass(n, Sample(ids, x[n], more), _tensor(free[n]), noisy[n])
        for n, (ids, more) in given.items()
    ]
    yield _logits(a, passes, cap, getattr(torch, dtype))


def _tried(side: Side, phase: int | str, x: object, given: dict[str, torch.Tensor]) -> object:
    if x is None:
        return None
    try:
        return side.run(phase, x, given)
    except BROKEN:
        return None


def _tensor(x: object) -> torch.Tensor | None:
    return x if isinstance(x, torch.Tensor) else None


def _holds(bar: Bar, found: Distance, cap: tuple[str, float] | None) -> bool:
    return bar.holds(found) or (cap is not None and found.nmse <= cap[1])


def _lockstep(rows: list[Row], failed: bool, cap: tuple[str, float] | None) -> Finding:
    differing = [str(r[0]) for r in rows if r[4]]
    columns = ("phase", "NMSE", "bar", "|delta|", "")
    tables = (Table(columns, tuple(rows)),)
    if failed:
        text = f"{len(differing)} of {len(rows)} phases differ on the same input, first {differing[0]}"
        return Finding(LEVEL, "lockstep", "fail", text, tables=tables, data={"exactness": "differs"})
    policy = f", within what rounding to {cap[0]} may change ({number(cap[1])})" if cap else ""
    text = f"all {len(rows)} phases make the same values of the same input{policy}"
    return Finding(LEVEL, "lockstep", "pass", text, tables=tables)


def _logits(a: Side, passes: list[logits.Pass], cap: tuple[str, float] | None, dtype: torch.dtype) -> Finding:
    kind = logits.kind_of("head", passes[0].sample.wanted, a.vocabulary)
    found = logits.finding(LEVEL, "the whole pass", logits.by_prompt(passes, dtype, kind), dtype)
    worst = found.measured if found.measured is not None else math.inf
    if cap is not None and worst <= cap[1]:
        text = f"{found.message}; within what rounding to {cap[0]} may change"
        return Finding(
            LEVEL, "logits", "pass", text, measured=worst, bar=cap[1],
            data={k: v for k, v in found.data.items() if k != "exactness"}, tables=found.tables,
            drawn=found.drawn,
        )  # fmt: skip
    return found
