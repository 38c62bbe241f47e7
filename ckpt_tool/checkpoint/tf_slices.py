"""A tensor that a bundle keeps in slices, read as if it were whole: any run of its bytes, from the slices
that hold a part of it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from ckpt_tool.checkpoint.tf_coding import Box

Read = Callable[[int, memoryview], None]  # (first byte in the slice, what to fill)


@dataclass(frozen=True)
class Slice:
    """The part of a tensor of `shape` that begins at `starts` and is `lengths` long, row-major as the tensor
    is; `itemsize` bytes an element, `read` fills a run of its bytes."""

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    itemsize: int
    read: Read

    @cached_property
    def _outer(self) -> int:
        """How many leading axes are walked: the last of them is the first after which the slice has all of
        each axis, so along it and those after it the slice's elements lie together in the tensor."""
        k = len(self.shape)
        while k > 0 and self.lengths[k - 1] == self.shape[k - 1]:
            k -= 1
        return max(k - 1, 0)

    @cached_property
    def _run(self) -> int:
        """Bytes that lie together in the tensor and in the slice."""
        return prod(self.lengths[self._outer :]) * self.itemsize

    @cached_property
    def _count(self) -> int:
        return prod(self.lengths[: self._outer])

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        return tuple(prod(self.shape[k + 1 :]) * self.itemsize for k in range(len(self.shape)))

    def _place(self, run: int) -> int:
        """The first byte in the tensor of one of the runs."""
        at = sum(s * stride for s, stride in zip(self.starts, self._strides, strict=True))
        for k in range(self._outer - 1, -1, -1):
            run, index = divmod(run, self.lengths[k])
            at += index * self._strides[k]
        return at

    def fill(self, offset: int, buffer: memoryview) -> None:
        """Put what this slice has of the tensor's bytes from `offset` on into `buffer`, in one read."""
        if not self._run or not self._count:
            return
        end, runs = offset + len(buffer), range(self._count)
        if self._place(0) >= end or self._place(self._count - 1) + self._run <= offset:
            return
        first = bisect_right(runs, offset - self._run, key=self._place)
        last = bisect_left(runs, end, key=self._place) - 1
        if first > last:
            return
        skipped = max(0, offset - self._place(first))
        kept = min(self._run, end - self._place(last))
        start, stop = first * self._run + skipped, last * self._run + kept
        if first == last:
            at = self._place(first) + skipped - offset
            self.read(start, buffer[at : at + stop - start])
            return
        held = np.empty(stop - start, np.uint8).data
        self.read(start, held)
        for run in range(first, last + 1):
            begin = max(run * self._run, start)
            finish = min((run + 1) * self._run, stop)
            at = self._place(run) + begin - run * self._run - offset
            buffer[at : at + finish - begin] = held[begin - start : finish - start]


def whole_box(box: Box, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(starts, lengths) of a slice of a tensor of `shape`, with the lengths that it leaves out."""
    lengths = tuple(size - s if n is None else n for (s, n), size in zip(box, shape, strict=True))
    return tuple(s for s, _ in box), lengths


def fault(shape: tuple[int, ...], parts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> str | None:
    """Why slices, as (starts, lengths), do not make up a tensor of `shape`: what was found in words, or None
    where each element is in one of them."""
    for starts, lengths in parts:
        if any(s + n > size for s, n, size in zip(starts, lengths, shape, strict=True)):
            return f"a slice {shown(starts, lengths)} outside it"
    lows = np.array([s for s, _ in parts], dtype=np.int64).reshape(len(parts), len(shape))
    highs = lows + np.array([n for _, n in parts], dtype=np.int64).reshape(len(parts), len(shape))
    for k in range(len(parts) - 1):
        common = ((lows[k + 1 :] < highs[k]) & (lows[k] < highs[k + 1 :])).all(axis=1)
        if common.any():
            other = parts[k + 1 + int(common.argmax())]
            return f"slices that overlap: {shown(*parts[k])} and {shown(*other)}"
    held = sum(prod(lengths) for _, lengths in parts)
    if held != prod(shape):
        return f"slices that hold {held} of its {prod(shape)} elements"
    return None


def shown(starts: Sequence[int], lengths: Sequence[int]) -> str:
    """`[3:5, 0:2]`."""
    return f"[{', '.join(f'{s}:{s + n}' for s, n in zip(starts, lengths, strict=True))}]"
