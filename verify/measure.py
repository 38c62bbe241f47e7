"""Distances between two results over all positions, and the bars they are held against."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ckpt_tool.records import dataclass

MARGIN = 10.0  # times the noise floor, for |delta|; its square for NMSE
CAPS = {"float64": 1e-18, "float32": 1e-10, "float16": 1e-4, "bfloat16": 1e-2}  # NMSE, whatever the noise
ABSOLUTE_CAPS = {"float64": 1e-9}  # max |delta|
BLOCK = 1 << 18  # numbers that are compared at once: they stay in a cache of the processor
CHUNK = 64  # positions whose distributions are held in float64 at once, at most
HELD = 1 << 20  # numbers of one of them that are


def wider(dtype: str) -> list[str]:
    """The precisions that a computation in `dtype` may be judged by, narrowest first."""
    return {"float64": [], "float32": ["float64"]}.get(dtype, ["float32", "float64"])


@dataclass(frozen=True)
class Distance:
    """`nmse` is MSE / var(reference); `worst` the position of `max_delta` in its prompt; `magnitude` max
    |reference|."""

    max_delta: float
    nmse: float
    worst: int
    magnitude: float


@dataclass(frozen=True)
class Spread:
    """What a distance asks of a reference: the variance of its numbers, and the largest of them."""

    variance: float
    magnitude: float


def spread(reference: Tensor) -> Spread:
    """Of (B, T, C), some positions at a time."""
    moments, magnitude = Moments(), 0.0
    for x in _parts(reference):
        low, high = x.aminmax()
        magnitude = max(magnitude, -float(low), float(high))
        moments.add(x)
    return Spread(moments.variance, magnitude)


def distance(
    found: Tensor, reference: Tensor, variance: float | None = None, known: Spread | None = None
) -> Distance:
    """Over all positions and channels of (B, T, C); infinite where anything is not finite or shapes differ.
    `variance` is given where these are too few numbers to have one of their own, `known` where the spread of
    the reference was measured before. Some positions at a time, so that no copy of all is made."""
    if found.shape != reference.shape:
        return Distance(math.inf, math.inf, 0, float(reference.abs().max()))
    known = spread(reference) if known is None else known
    variance = known.variance if variance is None else variance
    if math.isfinite(known.magnitude) and torch.equal(found, reference):
        return Distance(0.0, 0.0, 0, known.magnitude)
    squares, tops = 0.0, []
    for a, b in zip(_parts(reference), _parts(found), strict=True):
        delta = (b - a).abs_()
        tops.append(delta.amax(dim=(0, -1)))
        squares += _squares(delta, float(tops[-1].max()))
    top = torch.cat(tops)
    if not math.isfinite(squares):
        bad = (~torch.isfinite(top)).nonzero()
        return Distance(math.inf, math.inf, int(bad[0]) if len(bad) else 0, known.magnitude)
    mse = squares / reference.numel()
    nmse = 0.0 if mse == 0 else math.inf if variance == 0 else mse / variance
    return Distance(float(top.max()), nmse, int(top.argmax()), known.magnitude)


def _parts(x: Tensor) -> Iterator[Tensor]:
    """Positions that are together BLOCK numbers."""
    rows = max(1, BLOCK // max(1, x.shape[0] * x.shape[-1]))
    return (x[:, start : start + rows] for start in range(0, x.shape[1], rows))


def _squares(delta: Tensor, top: float) -> float:
    """The sum of squares of numbers up to `top`, by which they are divided first: squares of small ones have
    no exponent in float32."""
    if top == 0 or not math.isfinite(top):
        return top
    x = (wide(delta) / top).flatten()
    return float(x @ x) * top * top


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class Moments:
    """Mean and variance of numbers that come in parts (Chan, Golub and LeVeque 1983)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # of the distances from the mean

    def add(self, x: Tensor) -> None:
        n, x = x.numel(), wide(x)
        mean = float(x.mean())
        rest = (x - mean).flatten()
        apart, whole = mean - self.mean, self.count + n
        self.squares += float(rest @ rest) + apart**2 * self.count * n / whole
        self.mean += apart * n / whole
        self.count = whole

    @property
    def variance(self) -> float:
        return self.squares / self.count


def farthest(distances: Iterable[Distance]) -> Distance:
    """Of several tensors that belong together: the largest of each number, `worst` that of `max_delta`."""
    made = list(distances)
    first = max(made, key=lambda d: d.max_delta)
    return replace(first, nmse=max(d.nmse for d in made), magnitude=max(d.magnitude for d in made))


@dataclass(frozen=True)
class LogitDistance:
    """`kls` are KL(reference || found) of each position in nats, over the whole vocabulary; `top1` the share
    of positions with the same most probable token, not counting ties nearer than the bar; `top5` the mean
    share of the five most probable that both have; `loss` the difference of mean next-token cross entropy."""

    kls: tuple[float, ...]
    top1: float
    top5: float
    loss: float
    ties: int

    @property
    def kl(self) -> float:
        """The largest of any position."""
        return max(self.kls, default=0.0)


def logit_distance(found: Tensor, reference: Tensor, ids: Tensor | None, tie: float) -> LogitDistance:
    """Logits (1, T, V) of one prompt; `ids` (1, T), or None where the logits are not of tokens. Two tokens
    whose reference logits are nearer than `tie` may change places."""
    kls: list[float] = []
    same, ties, shared = 0, 0, 0.0
    positions, words = reference.shape[1:]
    k, some = min(5, words), at_once(words)
    for start in range(0, positions, some):
        p, q = (x[0, start : start + some].double() for x in (reference, found))
        kls += divergence(p.log_softmax(-1), q.log_softmax(-1)).nan_to_num(nan=math.inf).tolist()
        best, other = p.argmax(-1, keepdim=True), q.argmax(-1, keepdim=True)
        near = (p.gather(-1, best) - p.gather(-1, other)).squeeze(-1) <= tie
        agree = (best == other).squeeze(-1)
        same += int((agree | near).sum())
        ties += int((~agree & near).sum())
        top_p, top_q = p.topk(k).indices, q.topk(k).indices
        shared += float((top_p[:, :, None] == top_q[:, None, :]).any(-1).double().mean(-1).sum())
    loss = 0.0
    if ids is not None and positions > 1:
        loss = abs(_loss(found, ids) - _loss(reference, ids))
    return LogitDistance(tuple(kls), same / positions, shared / positions, loss, ties)


def divergence(p_log: Tensor, q_log: Tensor) -> Tensor:
    """KL(p || q) in nats of each row of log probabilities (T, V), float64.

    As the sum of p (q/p - 1 - log q/p), which is the same for probabilities that sum to one: every term is
    positive, and where p and q differ by rounding the terms of first order, which would drown the result, are
    not there."""
    delta = q_log - p_log
    near = p_log.exp() * (delta.expm1() - delta)
    far = q_log.exp() - p_log.exp() * (1 + delta)  # q/p itself may be too large for a float
    ruled_out = p_log.isneginf()  # p log(q/p) is 0 there
    return torch.where(ruled_out, q_log.exp(), torch.where(delta < 1, near, far)).sum(-1)


def at_once(words: int) -> int:
    """Positions whose logits of so many words are looked at together."""
    return min(CHUNK, max(1, HELD // max(1, words)))


def _loss(logits: Tensor, ids: Tensor) -> float:
    some, last = at_once(logits.shape[-1]), logits.shape[1] - 1
    parts = (
        cross_entropy(
            logits[0, k : min(k + some, last)].double(), ids[0, k + 1 : k + 1 + some], reduction="sum"
        )
        for k in range(0, last, some)
    )
    return float(sum(parts)) / last


@dataclass(frozen=True)
class Bar:
    """What a phase may differ by: `nmse` and `max_delta`, both to be met; `noise` is the floor they came
    from.

    `bar` is MARGIN times the measured noise (MARGIN squared for NMSE), at least a few roundings of the
    numbers themselves (a floor measured as zero must not forbid those), at most the cap of the policy."""

    nmse: float
    max_delta: float
    noise: Distance

    def holds(self, d: Distance) -> bool:
        return d.nmse <= self.nmse and d.max_delta <= self.max_delta

    def cannot_tell(self, d: Distance) -> bool:
        """Over a cap, but no further from zero than noise alone: this precision cannot decide. Large numbers
        are over the absolute one by their own rounding."""
        if self.holds(d):
            return False
        if d.nmse <= MARGIN**2 * self.noise.nmse and self.noise.nmse > self.nmse / 10:
            return True
        rounding = 8 * torch.finfo(torch.float64).eps * self.noise.magnitude
        return d.nmse <= self.nmse and d.max_delta <= max(MARGIN * self.noise.max_delta, rounding)


def cap_of(dtype: str) -> str:
    """The caps of a precision, in words."""
    absolute = ABSOLUTE_CAPS.get(dtype)
    also = "" if absolute is None else f" (or |delta| {absolute:g})"
    return f"the cap {CAPS[dtype]:g}{also} for {dtype}"


def bar_for(noise: list[Distance], dtype: torch.dtype) -> Bar:
    """The bar for one phase from the noise of every prompt."""
    name = str(dtype).removeprefix("torch.")
    eps = torch.finfo(dtype).eps
    worst = max(noise, key=lambda d: d.nmse)
    delta = max(d.max_delta for d in noise)
    magnitude = max(d.magnitude for d in noise)
    floor = Distance(delta, worst.nmse, worst.worst, magnitude)
    nmse = min(CAPS[name], max(MARGIN**2 * worst.nmse, (4 * eps) ** 2))
    absolute = min(ABSOLUTE_CAPS.get(name, math.inf), max(MARGIN * delta, 8 * eps * magnitude))
    return Bar(nmse, absolute, floor)
