"""Logits of whole passes, prompt by prompt, and the verdict over them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.reference.phases import Tree, leaves
from ckpt_tool.verify.measure import CAPS, Bar, Distance, LogitDistance, bar_for, distance, logit_distance
from ckpt_tool.verify.report import Finding, Status, Table, number
from ckpt_tool.verify.sides import Sample

CANNOT_TELL = "and so is noise alone: this dtype cannot decide, a wider --compute-dtype can"


@dataclass(frozen=True)
class Logits:
    """One prompt's logits, with the bar from its own noise floor."""

    distance: Distance
    logits: LogitDistance
    bar: Bar
    tokens: int

    @property
    def holds(self) -> bool:
        return self.bar.holds(self.distance) and self.logits.top1 == 1.0

    @property
    def cannot_tell(self) -> bool:
        return self.bar.cannot_tell(self.distance) and self.logits.top1 == 1.0


def compare(found: Tensor, reference: Tensor, noisy: Tensor, ids: Tensor, dtype: torch.dtype) -> Logits:
    """`noisy` is the reference run with its sums reversed; all (1, T, V)."""
    bar = bar_for([distance(noisy, reference)], dtype)
    measured = logit_distance(found, reference, ids, 2 * bar.max_delta)
    return Logits(distance(found, reference), measured, bar, ids.shape[1])


@dataclass(frozen=True)
class Pass:
    """One head's logits of one prompt, `Sample.x` being its ids and `Sample.wanted` the reference's: those
    found (None where there are none), and the reference's with reversed sums."""

    name: str
    sample: Sample
    found: Tensor | None
    noisy: Tensor


def by_prompt(passes: list[Pass], dtype: torch.dtype) -> dict[str, Logits]:
    """The comparison of each prompt; padding is left out. Where a head gives one result for each row, the
    noise of a prompt is that of a few numbers, so all prompts share a bar."""
    made: dict[str, Logits] = {}
    variances = variances_of([p.sample.wanted for p in passes])
    samples = [replace(p.sample, variances=variances) for p in passes]
    shared = [] if None in variances else [s.of(p.noisy) for s, p in zip(samples, passes, strict=True)]
    for p, s in zip(passes, samples, strict=True):
        found = p.found
        if found is None or found.shape != s.wanted.shape:
            found = torch.full_like(s.wanted, math.nan)
        wanted, real = s.real(s.wanted), s.real(found)
        if shared:
            bar = bar_for(shared, dtype)
            measured = logit_distance(real, wanted, None, 2 * bar.max_delta)
            made[p.name] = Logits(s.of(found), measured, bar, wanted.shape[1])
        else:
            ids = s.real(s.x[..., None])[..., 0]
            made[p.name] = compare(real, wanted, s.real(p.noisy), ids, dtype)
    return made


def variances_of(results: list[Tree]) -> tuple[float | None, ...]:
    """For each tensor of the results: the variance over all prompts where it has one row (C,) for each row of
    a prompt, which is too few numbers to have one alone, else None."""
    made: list[float | None] = []
    for ys in zip(*map(leaves, results), strict=True):
        whole = torch.cat([y.flatten() for y in ys]).double()
        few = len(whole) > 0 and all(y.ndim <= 2 and y.is_floating_point() for y in ys)
        made.append(float(whole.var(correction=0)) if few else None)
    return tuple(made)


def finding(
    level: str,
    subject: str,
    results: Mapping[str, Logits],
    dtype: torch.dtype,
    where: str | None = None,
) -> Finding:
    """The verdict, and the table behind it; `subject` says whose logits, against which, `where` of which head
    if it is not the first."""
    columns = (
        "prompt", "tokens", "NMSE", "bar", "noise", "|delta|", "|logit|", "at",
        "KL", "top-1", "top-5", "loss",
    )  # fmt: skip
    rows = tuple(
        (
            name, x.tokens, x.distance.nmse, x.bar.nmse, x.bar.noise.nmse, x.distance.max_delta,
            x.distance.magnitude, x.distance.worst,
            x.logits.kl, f"{x.logits.top1:.2%}", f"{x.logits.top5:.2%}", x.logits.loss,
        )
        for name, x in results.items()
    )  # fmt: skip
    name, worst = max(results.items(), key=lambda item: item[1].distance.nmse)
    top1 = min(x.logits.top1 for x in results.values())
    kl = max(x.logits.kl for x in results.values())
    ties = sum(x.logits.ties for x in results.values())
    tied = f" ({ties} ties nearer than the bar)" if ties else ""
    text = (
        f"{subject}: top-1 agreement {top1:.2%}{tied}, max KL {number(kl)} nats, "
        f"max |delta| {number(worst.distance.max_delta)} of logits up to {number(worst.distance.magnitude)}; "
        f"worst prompt {name}"
    )
    over = [x for x in results.values() if not x.holds]
    status: Status = "pass" if not over else "undecided" if all(x.cannot_tell for x in over) else "fail"
    data: dict[str, Any] = {
        "top1": top1,
        "kl": kl,
        "nmse": worst.distance.nmse,
        "max_delta": worst.distance.max_delta,
    }
    if status == "undecided":
        text = f"{text}; over the cap {CAPS[str(dtype).removeprefix('torch.')]:g} for {dtype}, {CANNOT_TELL}"
    else:
        data["exactness"] = "within noise floor" if status == "pass" else "differs"
    return Finding(
        level, "logits", status, text, where,
        measured=worst.distance.nmse, bar=worst.bar.nmse, data=data, tables=(Table(columns, rows),),
    )  # fmt: skip
