"""Other ways to round than to the nearest, ties to even: how a tensor that is no cast of its source may have
been cast all the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.convert.casting import CASTABLE, converted


def other_roundings(bits: np.ndarray, source: str, target: str) -> Iterator[tuple[str, np.ndarray]]:
    """Raw `bits` of dtype `source` as raw bits of `target` by each other way, with words for it."""
    if source not in CASTABLE or target not in CASTABLE:
        return
    nearest = converted(bits, source, target)
    exact = converted(bits, source, "F64").view("<f8")
    with np.errstate(invalid="ignore"):
        over = np.abs(converted(nearest, target, "F64").view("<f8")) > np.abs(exact)
    yield "rounded toward zero", nearest - over.astype(nearest.dtype)  # the next smaller magnitude
    for between in ("F16", "BF16"):
        if between not in (source, target):
            words = f"rounded to {DTYPES[between].torch} first"
            yield words, converted(converted(bits, source, between), between, target)
    if (source, target) == ("F32", "BF16"):
        yield "rounded with ties away from zero", ((bits + np.uint32(0x8000)) >> 16).astype(nearest.dtype)
    if target == "F16":
        denormal = (nearest & 0x7C00) == 0
        yield "with denormal values made zero", np.where(denormal, nearest & 0x8000, nearest)
