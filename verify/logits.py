"""What the heads of whole passes give, prompt by prompt, and the verdict over it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ckpt_tool.records import dataclass
from ckpt_tool.reference.phases import Tree, leaves
from ckpt_tool.verify.measure import Bar, Distance, LogitDistance, bar_for, cap_of, distance, logit_distance
from ckpt_tool.verify.positions import Positions, drawn, positions
from ckpt_tool.verify.report import Finding, Status, Table, number
from ckpt_tool.verify.sides import Sample

NOT_DECIDED = "this dtype cannot decide, a wider --compute-dtype can"
CANNOT_TELL = f"and so is noise alone: {NOT_DECIDED}"


# What a head gives: logits of the token at each position, logits of other things (classes, entities), or
# values that are no logits (hidden states).
Kind = Literal["words", "classes", "values"]


def kind_of(head: str, result: Tensor, vocabulary: int) -> Kind:
    """Of what a head of that name, by transformers' names for outputs, has given."""
    if head == "head":
        return "words" if result.shape[-1] >= vocabulary else "values"
    return "classes" if head.endswith("logits") else "values"


@dataclass(frozen=True)
class Logits:
    """One prompt's result, with the bar from its own noise floor; `logits` is None where it has none."""

    distance: Distance
    logits: LogitDistance | None
    bar: Bar
    tokens: int
    positions: Positions | None = None  # where it has logits of tokens
    narrow: bool = False  # computed in a dtype of 16 bits

    @property
    def _alike(self) -> bool:
        return self.logits is None or self.logits.top1 == 1.0

    @property
    def holds(self) -> bool:
        return self.bar.holds(self.distance) and self._alike

    @property
    def cannot_tell(self) -> bool:
        return (self.bar.cannot_tell(self.distance) or self.lone) and self._alike

    @property
    def lone(self) -> bool:
        """Whether only single numbers of a narrow dtype are over the bar, and their mean square is not. Such
        products are summed in float32 and rounded once, so reversed sums move next to nothing, while the
        order of operations, whose roundings all layers carry on, is no mistake."""
        return self.narrow and self.distance.nmse <= self.bar.nmse and not self.bar.holds(self.distance)


@dataclass(frozen=True)
class Pass:
    """One head's logits of one prompt, `Sample.x` being its ids and `Sample.wanted` the reference's: those
    found (None where there are none), and the reference's with reversed sums."""

    name: str
    sample: Sample
    found: Tensor | None
    noisy: Tensor


def by_prompt(passes: list[Pass], dtype: torch.dtype, kind: Kind = "words") -> dict[str, Logits]:
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
        wanted, real, noisy = s.real(s.wanted), s.real(found), s.real(p.noisy)
        bar = bar_for(shared or [distance(noisy, wanted)], dtype)
        far = s.of(found) if shared else distance(real, wanted)
        ids = s.real(s.x[..., None])[..., 0] if kind == "words" and not shared else None
        likely = None if kind == "values" else logit_distance(real, wanted, ids, 2 * bar.max_delta)
        narrow = torch.finfo(dtype).bits < 32
        made[p.name] = Logits(far, likely, bar, wanted.shape[1], narrow=narrow)
        if ids is not None:
            seen = positions(real, wanted, tokens=not made[p.name].holds)
            made[p.name] = replace(made[p.name], positions=seen)
    return made


def variances_of(results: list[Tree]) -> tuple[float | None, ...]:
    """For each tensor of the results: the variance over all prompts where it has one row (C,) for each row of
    a prompt, which is too few numbers to have one alone, else None."""
    made: list[float | None] = []
    for ys in zip(*map(leaves, results), strict=True):
        few = any(y.numel() for y in ys) and all(y.ndim <= 2 and y.is_floating_point() for y in ys)
        whole = torch.cat([y.flatten() for y in ys]).double() if few else None
        made.append(None if whole is None else float(whole.var(correction=0)))
    return tuple(made)


def variances_of_each(results: list[Tree]) -> list[tuple[float | None, ...]]:
    """Those of each result, among the results that have as many tensors of as many axes: without entities,
    say, there is none of them."""
    kinds = [tuple(y.ndim for y in leaves(result)) for result in results]
    known = {k: variances_of([r for r, own in zip(results, kinds, strict=True) if own == k]) for k in kinds}
    return [known[kind] for kind in kinds]


def finding(
    level: str,
    subject: str,
    results: Mapping[str, Logits],
    dtype: torch.dtype,
    where: str | None = None,
) -> Finding:
    """The verdict, and the table behind it; `subject` says whose logits, against which, `where` of which head
    if it is not the first."""
    columns: tuple[str, ...] = (
        "prompt", "tokens", "NMSE", "bar", "noise", "|delta|", "|logit|", "at",
        "KL", "top-1", "top-5", "loss",
    )  # fmt: skip
    likely = {name: x.logits for name, x in results.items() if x.logits is not None}
    rows: list[tuple[str | float | None, ...]] = []
    for name, x in results.items():
        d, p = x.distance, x.logits
        row = (name, x.tokens, d.nmse, x.bar.nmse, x.bar.noise.nmse, d.max_delta, d.magnitude, d.worst)
        rows.append(row if p is None else (*row, p.kl, f"{p.top1:.2%}", f"{p.top5:.2%}", p.loss))
    if not likely:
        columns = tuple(c.replace("logit", "value") for c in columns[:8])
    name, worst = max(results.items(), key=lambda item: item[1].distance.nmse)
    data: dict[str, Any] = {"nmse": worst.distance.nmse, "max_delta": worst.distance.max_delta}
    text, values = f"{subject}: ", "values"
    if likely:
        data |= {"top1": min(p.top1 for p in likely.values()), "kl": max(p.kl for p in likely.values())}
        ties = sum(p.ties for p in likely.values())
        tied = f" ({ties} ties nearer than the bar)" if ties else ""
        text += f"top-1 agreement {data['top1']:.2%}{tied}, max KL {number(data['kl'])} nats, "
        values = "logits"
    text += (
        f"max |delta| {number(worst.distance.max_delta)} of {values} up to "
        f"{number(worst.distance.magnitude)}; worst prompt {name}"
    )
    over = [x for x in results.values() if not x.holds]
    status: Status = "pass" if not over else "undecided" if all(x.cannot_tell for x in over) else "fail"
    if status == "undecided":
        cap = f"over {cap_of(str(dtype).removeprefix('torch.'))}, {CANNOT_TELL}"
        lone = f"single {values} are over the bar for {dtype}, their mean square is not: {NOT_DECIDED}"
        text = f"{text}; {lone if any(x.lone for x in over) else cap}"
    else:
        data["exactness"] = "within noise floor" if status == "pass" else "differs"
    seen = {n: x.positions for n, x in results.items() if x.positions is not None}
    return Finding(
        level, "logits", status, text, where,
        measured=worst.distance.nmse, bar=worst.bar.nmse, data=data, tables=(Table(columns, tuple(rows)),),
        drawn=drawn(seen, name, worst.bar.max_delta),
    )  # fmt: skip
