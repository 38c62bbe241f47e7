"""How long the levels take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

OTHER = "other"  # what is no level's: opening, planning, loading torch


@contextmanager
def timed(seconds: dict[str, float], level: str) -> Iterator[None]:
    """Add the seconds that pass inside to those of a level."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[level] = seconds.get(level, 0.0) + time.monotonic() - began
