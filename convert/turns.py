"""In which order the workers take the work of a group of files, so that the disk never waits for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from ckpt_tool.convert.carry import Bound, batches, pieces
from ckpt_tool.convert.layout import Block
from ckpt_tool.convert.read_ahead import Work
from ckpt_tool.convert.small import Together

Batch = list[tuple[Bound, Block]]
LEAD = 128 << 20  # bytes that a worker copies before it turns to small tensors (benchmarks/profiles.md)


def turns(few: Iterator[Together], steps: Sequence[Bound], jobs: int) -> list[Iterator[Work]]:
    """What `jobs` workers begin with in turn: the small tensors `few`, and `steps`. Plain copies that stand
    before all other steps come faster than the disk takes them: all begin with those, until it has enough
    before it for the time in which some of them are busy with small tensors."""
    first, rest = _parted(steps, LEAD * jobs)
    return [chain(_until(first, LEAD), few), chain(first, rest)]


def _parted(steps: Sequence[Bound], size: int) -> tuple[Iterator[Batch], Iterator[Batch]]:
    """The batches of the plain copies in front, as far as `size` bytes need, and those of the rest. Others
    than copies take much room of each worker that has some."""
    count = 0
    while count < len(steps) and size > 0:
        if not all(block.is_copy for block in islice(pieces(steps[count].step), 1)):  # an empty one has none
            break
        size -= sum(t.info.nbytes for t in steps[count].targets)
        count += 1
    return batches(steps[:count]), batches(steps[count:])


def _until(work: Iterator[Batch], size: int) -> Iterator[Batch]:
    """`work` until it has come to `size` bytes of what is written."""
    while size > 0 and (batch := next(work, None)) is not None:
        yield batch
        size -= sum(a.numel * b.targets[a.part].itemsize for b, block in batch for a in block.writes)
