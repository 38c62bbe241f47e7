"""The prompts of one verification: the fixed ones, one longer than the sliding window, and the user's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.strict_json import parse
from ckpt_tool.errors import fail
from ckpt_tool.fixtures.prompts import prompts as fixed

Prompts = Mapping[str, Sequence[int]] | Sequence[Sequence[int]]

WINDOW_LIMIT = 8192  # tokens; a prompt longer than a wider window costs more than it shows
BEYOND = 64  # tokens after the first that no longer sees position 0


def prompts_for(
    config: Mapping[str, Any], more: str | os.PathLike[str] | Prompts | None
) -> dict[str, list[int]]:
    """Rows of token ids by name, for the vocabulary of `config`; none where it does not say its size."""
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 2:
        return {}
    bos = config.get("bos_token_id")
    rows = fixed(vocabulary, bos=bos if isinstance(bos, int) else None)
    window = config.get("sliding_window")
    longest = max(map(len, rows.values()))
    if isinstance(window, int) and longest <= window < WINDOW_LIMIT:
        more_ids = window + BEYOND - longest
        rows["window"] = rows["long"] + [(17 + 7919 * k * k + 31 * k) % vocabulary for k in range(more_ids)]
    given = _read(more) if isinstance(more, str | os.PathLike) else more
    if given is not None:
        named = given if isinstance(given, Mapping) else {f"given {k}": r for k, r in enumerate(given)}
        for name, row in named.items():
            if not row or not all(type(i) is int and 0 <= i < vocabulary for i in row):
                text = f"expected token ids from 0 to {vocabulary - 1}, found others"
                fail("usage", text, where=f"prompt {name}")
            rows[name] = list(row)
    return rows


def _read(path: str | os.PathLike[str]) -> Prompts:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        fail("read-failed", f"cannot be read: {error.strerror}", file=path)
    found = parse(data, file=os.fspath(path), kind="usage")
    rows = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) for r in rows):
        fail("usage", 'expected rows of token ids, [[1, 2], ...] or {"name": [1, 2], ...}', file=path)
    made: Prompts = found
    return made
