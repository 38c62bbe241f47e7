"""What a number of trials says of a share, exactly: intervals without an approximation."""

from __future__ import annotations

import math
from collections.abc import Callable

CONFIDENCE = 0.95


def interval(hits: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact interval of a share of which `hits` of `trials` were seen (Clopper and Pearson, Biometrika
    26, 1934)."""
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _solve(lambda p: 1 - _at_most(hits - 1, trials, p), tail)
    high = 1.0 if hits == trials else _solve(lambda p: 1 - _at_most(hits, trials, p), 1 - tail)
    return low, high


def _at_most(k: int, n: int, p: float) -> float:
    """The chance of at most `k` hits in `n` trials of chance `p`."""
    if p <= 0 or p >= 1:
        return 1.0 if p <= 0 or k >= n else 0.0
    choose = math.lgamma(n + 1)
    return math.fsum(
        math.exp(
            choose - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        )
        for i in range(k + 1)
    )


def _solve(grows: Callable[[float], float], wanted: float) -> float:
    """Where a function that grows from 0 to 1 takes the value `wanted`."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if grows(middle) < wanted else (low, middle)
    return (low + high) / 2


def excluded(leaves: int, checked: int, confidence: float = CONFIDENCE) -> int:
    """The most wrong ones that `leaves` can hold, if `checked` of them, chosen at random, are all right: a
    larger number would have shown itself with this confidence. Exact, without replacement."""
    wrong = 0
    while wrong < leaves - checked and _unseen(leaves, wrong + 1, checked) > 1 - confidence:
        wrong += 1
    return wrong


def _unseen(leaves: int, wrong: int, checked: int) -> float:
    """The chance that none of `wrong` leaves is among `checked` ones."""
    if checked > leaves - wrong:
        return 0.0
    return math.exp(
        math.lgamma(leaves - wrong + 1)
        - math.lgamma(leaves - wrong - checked + 1)
        - math.lgamma(leaves + 1)
        + math.lgamma(leaves - checked + 1)
    )
