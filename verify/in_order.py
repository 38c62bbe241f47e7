"""Work on many tensors by a few threads, with results in the order of the tensors. Reading, checksums and
comparisons of blocks leave Python to the other threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from ckpt_tool.checkpoint.base import Checkpoint

WORTH = 64 << 20  # bytes of tensors, below which threads take longer to start than they gain
WINDOW = 64  # items that are under way or done before the first of them is taken
MOST = 4  # threads: more wait for the disk

A = TypeVar("A")
B = TypeVar("B")


def in_order(function: Callable[[A], B], items: Iterable[A], *read: Checkpoint) -> Iterator[B]:
    """What `function` makes of each item. `read` are what it reads from: by several threads where these are
    plain bytes in files, which a place tells, and by one where they come out of a stream."""
    threads = min(MOST, len(os.sched_getaffinity(0)))
    if threads < 2 or sum(t.nbytes for c in read for t in c) < WORTH or not all(map(_apart, read)):
        yield from map(function, items)
        return
    left = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        while window := list(islice(left, WINDOW)):
            yield from pool.map(function, window)


def _apart(checkpoint: Checkpoint) -> bool:
    return all(
        t.nbytes == 0 or f.extent(t.name) is not None
        for f in checkpoint.files.values()
        for t in f.tensors.values()
    )
