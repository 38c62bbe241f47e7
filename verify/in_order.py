"""Work on many tensors by a few threads, with results in the order of the tensors. Reading, checksums and
comparisons of blocks leave Python to the other threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from ckpt_tool.checkpoint.base import Checkpoint

WORTH = 64 << 20  # bytes of tensors, below which threads take longer to start than they gain
WINDOW = 64  # items that are under way or done before the first of them is taken
MOST = 4  # threads: more wait for the disk

A = TypeVar("A")
B = TypeVar("B")


def in_order(
    function: Callable[[A], B], items: Iterable[A], *read: Checkpoint, size: Callable[[A], int]
) -> Iterator[B]:
    """What `function` makes of each item. `read` are what it reads from: by several threads where these are
    plain bytes in files, which a place tells, and by one where they come out of a stream. `size` of an item
    tells what is begun first: on a large head that comes last one thread would work alone."""
    threads = min(MOST, len(os.sched_getaffinity(0)))
    if threads < 2 or sum(t.nbytes for c in read for t in c) < WORTH or not all(map(_apart, read)):
        yield from map(function, items)
        return
    from concurrent.futures import ThreadPoolExecutor  # 5 ms, which a small model does without

    left = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        while window := list(islice(left, WINDOW)):
            sizes = list(map(size, window))
            begun = sorted(range(len(window)), key=sizes.__getitem__, reverse=True)
            futures = {k: pool.submit(function, window[k]) for k in begun}
            try:
                for k in range(len(window)):
                    yield futures.pop(k).result()
            finally:  # of a failure, nothing that waits is begun any more
                for future in futures.values():
                    future.cancel()


def _apart(checkpoint: Checkpoint) -> bool:
    return all(
        t.nbytes == 0 or f.extent(t.name) is not None
        for f in checkpoint.files.values()
        for t in f.tensors.values()
    )
