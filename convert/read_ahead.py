"""Telling remote files what the next blocks of a plan will read, while earlier ones are worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TypeVar

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.remote_file import AHEAD, Fetcher, RemoteFile
from ckpt_tool.checkpoint.remote_path import remote_of
from ckpt_tool.convert.carry import Bound
from ckpt_tool.convert.layout import Block
from ckpt_tool.convert.small import Together

Work = list[tuple[Bound, Block]] | Together  # of one worker at a time
W = TypeVar("W", bound=Work)


class ReadAhead:
    """Of a checkpoint whose files are all on this machine, nothing is told to anybody."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        found = {remote_of(p) for file in checkpoint.files.values() for p in file.paths}
        self.fetchers: set[Fetcher] = {r.fetcher for r in found if isinstance(r, RemoteFile)}

    def of(self, batches: Iterator[W]) -> Iterator[W]:
        """The same batches in the same order; those to come are announced as far as there is room."""
        return self._announced(batches) if self.fetchers else batches

    def _announced(self, batches: Iterator[W]) -> Iterator[W]:
        waiting: deque[W] = deque()
        more = True
        while more or waiting:
            while more and (not waiting or sum(f.ahead for f in self.fetchers) < AHEAD):
                batch = next(batches, None)
                if batch is None:
                    more = False
                    break
                self._announce(batch)
                waiting.append(batch)
            if waiting:
                yield waiting.popleft()

    def _announce(self, batch: Work) -> None:
        ranges: dict[str, list[tuple[str, int, int]]] = {}
        for file, wanted in batch.ranges() if isinstance(batch, Together) else _reads(batch):
            ranges.setdefault(file, []).append(wanted)
        for file, all_ in ranges.items():
            self.checkpoint.files[file].expect(all_)

    def stop(self) -> None:
        """Give up what is on its way: nothing will be read any more."""
        for fetcher in self.fetchers:
            fetcher.stop()


def _reads(batch: list[tuple[Bound, Block]]) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """Each run that is read: its file, the tensor, the first byte in that, and how many."""
    for bound, block in batch:
        for access in block.reads:
            source = bound.sources[access.part]
            size = access.runs.length * source.itemsize
            for at in access.runs.offsets():
                yield source.info.file, (source.info.name, at * source.itemsize, size)
