"""Learning rate schedules: the factor on the rate at each step of the optimizer, counted from 0.

Source: transformers 4.37.2 and 5.23.0 (optimization.py), which agree but where a docstring says otherwise.
With a warm-up of W steps the factor grows from 0 as s / W, so that the first step of the optimizer changes
nothing; T is the number of all steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Schedule = Callable[[int], float]
SCALE = 10_000  # of the inverse square root without a warm-up, in 5.23.0


def constant() -> Schedule:
    return lambda step: 1.0


def constant_with_warmup(warmup: int) -> Schedule:
    return _warmed(warmup, lambda step: 1.0)


def linear(warmup: int, total: int) -> Schedule:
    """To 0 at `total`, and 0 from there on."""
    return _warmed(warmup, lambda step: max(0.0, (total - step) / max(1, total - warmup)))


def cosine(warmup: int, total: int, cycles: float = 0.5) -> Schedule:
    """`cycles` waves of a cosine between 1 and 0; the usual half one ends at 0 and rises again afterwards."""

    def after(step: int) -> float:
        return max(0.0, (1.0 + math.cos(math.pi * cycles * 2.0 * _progress(step, warmup, total))) / 2)

    return _warmed(warmup, after)


def cosine_with_restarts(warmup: int, total: int, cycles: float = 1) -> Schedule:
    """Half a wave from 1 to 0, `cycles` times, and 0 from `total` on."""

    def after(step: int) -> float:
        part = _progress(step, warmup, total)
        return 0.0 if part >= 1.0 else max(0.0, (1.0 + math.cos(math.pi * ((cycles * part) % 1.0))) / 2)

    return _warmed(warmup, after)


def polynomial(warmup: int, total: int, *, rate: float, end: float = 1e-7, power: float = 1.0) -> Schedule:
    """From `rate` to `end`, which are rates themselves, by a power of what is left. ValueError where `end` is
    not below `rate`, and where the warm-up takes all steps, of which transformers has a division by zero."""
    if not rate > end:
        raise ValueError(f"expected end below the rate {rate}, found {end}")
    if warmup >= total:
        raise ValueError(f"expected a warm-up shorter than {total} steps, found {warmup}")

    def after(step: int) -> float:
        if step > total:
            return end / rate
        left = 1 - (step - warmup) / (total - warmup)
        return float((rate - end) * left**power + end) / rate

    return _warmed(warmup, after)


def inverse_square_root(warmup: int, scale: int | None = None) -> Schedule:
    """1 / sqrt of the steps since the warm-up, counted in `scale`, which is the warm-up if there is one.
    Without either 5.23.0 takes 10,000, and 4.37.2 divides by zero."""
    width = scale or warmup or SCALE
    return _warmed(warmup, lambda step: 1.0 / math.sqrt((step + width - warmup) / width))


# By what `lr_scheduler_type` of TrainingArguments calls them.
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "constant_with_warmup": constant_with_warmup,
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_square_root,
}


def schedule(name: str, **numbers: Any) -> Schedule:
    """That of `SCHEDULES` with its numbers; ValueError for another name."""
    if name not in SCHEDULES:
        raise ValueError(f"expected a schedule of {', '.join(SCHEDULES)}, found {name!r}")
    return SCHEDULES[name](**numbers)


def _warmed(warmup: int, after: Schedule) -> Schedule:
    return lambda step: step / max(1, warmup) if step < warmup else after(step)


def _progress(step: int, warmup: int, total: int) -> float:
    return (step - warmup) / max(1, total - warmup)
