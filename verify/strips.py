"""Which rows of a tensor differ, in little memory: as runs of rows, with the worst ones."""

from __future__ import annotations

from typing import Any

import numpy as np

RUNS = 400  # more are seen several rows at a time
WORST = 5


def strip(by_row: np.ndarray, *, worst: bool = True) -> dict[str, Any]:
    """What `pictures` draws of the largest |difference| of each row (0 where it is the same); `runs` are
    (first row, row after the last), `worst` (row, |difference|), where these are known."""
    rows, every = by_row > 0, 1
    if len(_runs(rows)) > RUNS:
        every = -(-len(by_row) // RUNS)
        rows = np.repeat(np.logical_or.reduceat(rows, np.arange(0, len(rows), every)), every)[: len(by_row)]
    order = np.argsort(-by_row, kind="stable")[: WORST if worst else 0]
    return {
        "of": len(by_row),
        "count": int((by_row > 0).sum()),
        "every": every,
        "runs": _runs(rows),
        "worst": [[int(k), float(by_row[k])] for k in order if by_row[k] > 0],
    }


def _runs(rows: np.ndarray) -> list[list[int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], rows, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2).tolist()
