"""Equivalence, and not only that no difference was seen: an upper confidence bound of the KL divergence of a
token, held against a margin that was set before.

No bound of a mean holds for every distribution without an end (Bahadur and Savage, Ann. Math. Statist. 27,
1956), so what is assumed is said in the finding. Neighbouring tokens depend on each other, so blocks
of consecutive ones are the unit, taken to be alike and independent; and no block is taken to be worse than
twice the worst that was seen. Under that the empirical Bernstein bound (Maurer and Pontil, COLT 2009, theorem
4) holds for any number of blocks. Where values have heavy tails and depend on those before (log-normal up to
sigma 2, Pareto from exponent 1.5, correlations up to 0.97) it was above the true mean in at least 95 of 100
draws, Student's t and the bootstrap-t in 50 to 94. What is so rare that no prompt shows it no bound excludes;
how rare that must be is said beside it, whatever the tails (Wilks, Ann. Math. Statist. 12, 1941)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, variance

from ckpt_tool.records import dataclass
from ckpt_tool.verify.logits import Logits
from ckpt_tool.verify.report import Finding, Status, Table, number

CHECK = "equivalence"
CONFIDENCE = 0.95
BLOCK = 32  # tokens
RANGE = 2.0  # times the worst block: none is taken to be worse
LEAST = 2  # blocks without which there is no variance
# Nats a token, by the dtype of the computation. To second order the KL is half the variance of the logits'
# differences, so half the NMSE times the variance of the logits; the margin is that at the NMSE's cap, for
# logits of variance 20. That of bfloat16 is below every bar that others publish for 16-bit conversions.
MARGINS = {"float64": 1e-17, "float32": 1e-9, "float16": 1e-3, "bfloat16": 5e-3}


@dataclass(frozen=True)
class Bound:
    """Of tokens in `blocks` blocks: `mean`, `p95` and `largest` of those seen, `upper` bound of the mean with
    CONFIDENCE (infinite where there are too few blocks), and `worse`, the share of blocks that may be worse
    than the worst seen with the same confidence."""

    tokens: int
    blocks: int
    mean: float
    p95: float
    largest: float
    upper: float
    worse: float


def blocks_of(prompts: Iterable[Sequence[float]], size: int = BLOCK) -> list[float]:
    """The mean of each block of consecutive tokens: each prompt is cut into equal parts of about `size`."""
    made = []
    for values in prompts:
        parts = max(1, round(len(values) / size))
        edges = [len(values) * k // parts for k in range(parts + 1)]
        made += [fmean(values[a:b]) for a, b in zip(edges, edges[1:], strict=False) if b > a]
    return made


def bound(prompts: Mapping[str, Sequence[float]]) -> Bound:
    """That of the KL of each token of each prompt."""
    every = sorted(x for values in prompts.values() for x in values)
    means = blocks_of(prompts.values())
    mean, p95 = fmean(every), every[math.ceil(CONFIDENCE * len(every)) - 1]
    worse = 1 - (1 - CONFIDENCE) ** (1 / len(means))
    return Bound(len(every), len(means), mean, p95, every[-1], max(mean, _upper(means)), worse)


def _upper(means: Sequence[float]) -> float:
    n = len(means)
    if n < LEAST or not all(map(math.isfinite, means)):
        return math.inf
    doubt = math.log(2 / (1 - CONFIDENCE))
    spread = math.sqrt(2 * variance(means) * doubt / n)
    return fmean(means) + spread + 7 * RANGE * max(means) * doubt / (3 * (n - 1))


def findings(
    level: str, results: Mapping[str, Logits], dtype: str, taken_back: Collection[str] = ()
) -> list[Finding]:
    """What the logits of words of each prompt show; nothing where there are none. `taken_back` are the
    foretold differences that were taken back first."""
    kls = {name: x.logits.kls for name, x in results.items() if x.logits is not None and x.logits.kls}
    if not kls:
        return []
    found, margin = bound(kls), MARGINS[dtype]
    agree = all(x.holds for x in results.values())
    status: Status = "note" if not agree else "pass" if found.upper <= margin else "undecided"
    text = (
        f"KL(source || output){_without(taken_back)} of {found.tokens:,} tokens of {len(kls)} prompts, nats: "
        f"mean {number(found.mean)}, 95 % of them up to {number(found.p95)}, largest "
        f"{number(found.largest)}; {_claimed(found, status)}"
    )
    data = {**asdict(found), "margin": margin, "confidence": CONFIDENCE}
    tables = (histogram(kls),)
    measured = found.upper if agree else None
    return [Finding(level, CHECK, status, text, measured=measured, bar=margin, data=data, tables=tables)]


def _without(taken_back: Collection[str]) -> str:
    return f", {' and '.join(taken_back)} taken back," if taken_back else ""


def _claimed(found: Bound, status: Status) -> str:
    if status == "note":
        return "no bound, as the logits differ"
    if not math.isfinite(found.upper):
        return "too few tokens for a bound of the mean of others"
    text = (
        f"the mean of tokens of this kind is at most {number(found.upper)}, {CONFIDENCE:.0%} confidence "
        f"(empirical Bernstein over {found.blocks} blocks of about {BLOCK} tokens, if none is worse than "
        f"twice the worst); up to {found.worse:.0%} of such blocks may be worse than the worst of these"
    )
    return text if status == "pass" else f"{text}; that it is below the margin is not shown"


def histogram(kls: Mapping[str, Sequence[float]]) -> Table:
    """How many tokens have which KL, by powers of ten; those of 0 first, last what is not finite."""
    every = [x for values in kls.values() for x in values]
    powers = [math.floor(math.log10(x)) for x in every if 0 < x < math.inf]
    rows: list[tuple[str | float | None, ...]] = []
    if zeros := sum(x <= 0 for x in every):
        rows.append((0, 0, zeros))
    for power in range(min(powers), max(powers) + 1) if powers else ():
        rows.append((10.0**power, 10.0 ** (power + 1), powers.count(power)))
    if beyond := sum(not x < math.inf for x in every):
        rows.append((math.inf, math.inf, beyond))
    return Table(("KL from", "to", "tokens"), tuple(rows), brief=0)
