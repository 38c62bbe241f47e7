"""Means over raw bits of floating numbers, for the one conversion that computes: fewer key/value heads.

The definition: the values as float32 numbers (float64 ones stay so), added in order, divided by their count,
rounded once to the dtype asked for, to nearest with ties to even (Ainslie et al., "GQA", 2023, section 2.1).
"""

from __future__ import annotations

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.convert.casting import cast


def mean(bits: np.ndarray, count: int, source: str, target: str, out: np.ndarray | None = None) -> np.ndarray:
    """The means of `count` arrays that lie one after the other in flat `bits` of dtype `source`, as bits of
    dtype `target`, in `out` where it is given. Both are dtype names of `casting.CASTABLE`."""
    wide = "F64" if source == "F64" else "F32"
    number = np.dtype(DTYPES[wide].value)
    rows = bits.reshape(count, -1)
    row = np.empty(rows.shape[1], dtype=DTYPES[wide].bits)
    total = np.zeros(rows.shape[1], dtype=number)
    made = np.empty(rows.shape[1], dtype=DTYPES[target].bits) if out is None else out
    with np.errstate(all="ignore"):  # infinities and NaNs are found where values are looked at
        for one in rows:
            cast(one, source, wide, row)
            total += row.view(number)
        total /= count
    cast(total.view(DTYPES[wide].bits), wide, target, made)
    return made
