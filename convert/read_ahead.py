"""Telling remote files what the next blocks of a plan will read, while earlier ones are worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.remote_file import AHEAD, Fetcher, RemoteFile
from ckpt_tool.checkpoint.remote_path import remote_of
from ckpt_tool.convert.carry import Bound
from ckpt_tool.convert.layout import Block

Batch = list[tuple[Bound, Block]]


class ReadAhead:
    """Of a checkpoint whose files are all on this machine, nothing is told to anybody."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        found = {remote_of(p) for file in checkpoint.files.values() for p in file.paths}
        self.fetchers: set[Fetcher] = {r.fetcher for r in found if isinstance(r, RemoteFile)}

    def of(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches in the same order; those to come are announced as far as there is room."""
        return self._announced(batches) if self.fetchers else batches

    def _announced(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        waiting: deque[Batch] = deque()
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

    def _announce(self, batch: Batch) -> None:
        ranges: dict[str, list[tuple[str, int, int]]] = {}
        for bound, block in batch:
            for access in block.reads:
                source = bound.sources[access.part]
                own, size = ranges.setdefault(source.info.file, []), access.runs.length * source.itemsize
                own += [(source.info.name, at * source.itemsize, size) for at in access.runs.offsets()]
        for file, wanted in ranges.items():
            self.checkpoint.files[file].expect(wanted)

    def stop(self) -> None:
        """Give up what is on its way: nothing will be read any more."""
        for fetcher in self.fetchers:
            fetcher.stop()
