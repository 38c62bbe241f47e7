"""Small tensors, each moved whole, many at once: thousands of them cost by the tensor and not by the byte.

A step that makes one tensor of one, all of it in one block, is not bound by itself: its template says what is
done, and neighbours are read, summed, looked at and written together.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from itertools import accumulate, compress, pairwise
from math import prod

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint
from ckpt_tool.checkpoint.crc32c import crc32c
from ckpt_tool.checkpoint.zlibs import crc32
from ckpt_tool.convert.carry import Lane, pieces
from ckpt_tool.convert.layout import Block, Step
from ckpt_tool.convert.outbox import SMALL
from ckpt_tool.convert.source_checks import Key
from ckpt_tool.convert.steps import Steps
from ckpt_tool.convert.values import Values, odd_ones
from ckpt_tool.records import dataclass

LARGEST = 256 * 1024  # bytes of a tensor
TOGETHER = 512 * 1024  # bytes that are moved at once


@dataclass(frozen=True)
class Kind:
    """What the steps of one template do: a tensor of the file `source` becomes one of `target`, by `block`
    where its elements change places."""

    source: str
    target: str
    dtype: str
    numel: int
    block: Block | None

    @cached_property
    def size(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


def kind_of(template: Step) -> Kind | None:
    """None for steps that are carried out one by one."""
    if template.compare or template.mean or len(template.sources) != 1 or len(template.targets) != 1:
        return None
    source, target = template.sources[0], template.targets[0]
    numel = prod(source.shape(template.sizes))
    if source.dtype != target.dtype or not 0 < numel * DTYPES[source.dtype].itemsize <= LARGEST:
        return None
    block, *more = pieces(template)
    ends = [*block.reads, *block.writes]
    whole = all((a.numel, a.runs.base, a.runs.count) == (numel, 0, 1) for a in ends)
    if more or len(ends) != 2 or not whole or prod(target.shape(template.sizes)) != numel:
        return None
    return Kind(source.file, target.file, source.dtype, numel, None if block.is_copy else block)


@dataclass
class Together:
    """Neighbours of one dtype, in the order of the steps."""

    kinds: list[Kind] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    summed: list[bool] = field(default_factory=list)  # whether what is read counts for the source's checksum
    size: int = 0

    def ranges(self) -> Iterator[tuple[str, tuple[str, int, int]]]:
        """For each tensor its file, and what of it is read."""
        for kind, name in zip(self.kinds, self.sources, strict=True):
            yield kind.source, (name, 0, kind.size)


@dataclass
class Smalls:
    """The small tensors of one group of files: how they are moved, and what was learnt of them.

    `begins` has the first byte of each tensor of the open files `opened`; `has_c` says of which source
    tensors, by file and name, the CRC-32C is taken too, None where it is of none."""

    checkpoint: Checkpoint
    steps: Steps
    opened: Mapping[str, int]
    begins: Mapping[str, Mapping[str, int]]
    has_c: Callable[[str, str], bool] | None
    sources: dict[Key, int] = field(default_factory=dict)  # CRC32s
    sources_c: dict[Key, int] = field(default_factory=dict)  # CRC-32Cs
    targets: dict[Key, int] = field(default_factory=dict)
    odd: dict[Key, Values] = field(default_factory=dict)  # what is not as in nearly every tensor

    def __post_init__(self) -> None:
        self.kinds = [kind_of(t) for t in self.steps.templates]

    def has(self, index: int) -> bool:
        """Whether the step of that number is one of them."""
        return self.kinds[self.steps.kinds[index]] is not None

    def source(self, index: int) -> Key:
        """That of a step which is one of them."""
        kind = self.kinds[self.steps.kinds[index]]
        assert kind is not None
        return kind.source, self.steps.names[self.steps.starts[index]]

    def together(self, indices: Iterable[int], first: Container[tuple[int, int]]) -> Iterator[Together]:
        """Those of the steps that are some, in runs; `first` are the readings that count for checksums."""
        run = Together()
        for k in indices:
            kind = self.kinds[self.steps.kinds[k]]
            if kind is None:
                continue
            other = run.kinds and run.kinds[0].dtype != kind.dtype
            if other or run.size + kind.size > TOGETHER:
                yield run
                run = Together()
            at = self.steps.starts[k]
            run.kinds.append(kind)
            run.sources.append(self.steps.names[at])
            run.targets.append(self.steps.names[at + 1])
            run.summed.append((k, 0) in first)
            run.size += kind.size
        if run.kinds:
            yield run

    def carry(self, run: Together, lane: Lane) -> None:
        """Move the tensors of `run`."""
        bits = np.dtype(DTYPES[run.kinds[0].dtype].bits)
        room = lane.room("together", run.size // bits.itemsize, bits)
        data, edges = room.data.cast("B"), [*accumulate([k.size for k in run.kinds], initial=0)]
        views = [data[start:stop] for start, stop in pairwise(edges)]
        begins = [start // bits.itemsize for start in edges[:-1]]
        self._read(run, views, lane)
        crcs = [*map(crc32, views)]
        self._learn_sources(run, views, crcs)
        for k in odd_ones(run.kinds[0].dtype, room, begins):
            kind, name = run.kinds[k], run.targets[k]
            values = self.odd[kind.target, name] = Values(kind.dtype)
            made = _made(kind, room[begins[k] : begins[k] + kind.numel], lane)
            if (place := values.look(made)) is not None:
                values.found_at(place)
        self._write(run, data, edges, self._reorder(run, room, begins, crcs, lane), lane)
        self.targets.update(
            zip(zip([k.target for k in run.kinds], run.targets, strict=True), crcs, strict=True)
        )
        lane.written_bytes += run.size

    def _read(self, run: Together, views: Sequence[memoryview], lane: Lane) -> None:
        wanted: dict[str, list[tuple[str, memoryview]]] = {}
        for kind, name, view in zip(run.kinds, run.sources, views, strict=True):
            wanted.setdefault(kind.source, []).append((name, view))
        for file, tensors in wanted.items():
            self.checkpoint.files[file].read_whole(tensors)
        lane.read_bytes += run.size

    def _learn_sources(self, run: Together, views: Sequence[memoryview], crcs: Sequence[int]) -> None:
        keys = [(kind.source, name) for kind, name in zip(run.kinds, run.sources, strict=True)]
        self.sources.update(compress(zip(keys, crcs, strict=True), run.summed))
        if (has_c := self.has_c) is not None:
            for key, view, summed in zip(keys, views, run.summed, strict=True):
                if summed and has_c(*key):
                    self.sources_c[key] = crc32c(view)

    def _reorder(
        self, run: Together, room: np.ndarray, begins: Sequence[int], crcs: list[int], lane: Lane
    ) -> set[int]:
        """Put the elements of tensors in their new order where they are, those of one kind at once, and their
        new checksums into `crcs`. Larger tensors are written; the numbers of these."""
        alike: dict[int, list[int]] = {}
        for k, kind in enumerate(run.kinds):
            if kind.block is not None:
                alike.setdefault(id(kind), []).append(k)
        written: set[int] = set()
        for own in alike.values():
            kind = run.kinds[own[0]]
            assert kind.block is not None
            if kind.size <= SMALL:
                for some in _evenly([begins[k] for k in own]):
                    rows = _rows(room, some, kind.numel)
                    made = lane.room("out", rows.size, room.dtype).reshape(rows.shape)
                    kind.block.shuffle_each(rows, made)
                    rows[...] = made
                for k in own:
                    crcs[k] = crc32(room[begins[k] : begins[k] + kind.numel].data.cast("B"))
                continue
            for k in own:
                data = _made(kind, room[begins[k] : begins[k] + kind.numel], lane).data.cast("B")
                crcs[k], at = crc32(data), self.begins[kind.target][run.targets[k]]
                lane.outbox.put(kind.target, self.opened[kind.target], at, data)
                written.add(k)
        return written

    def _write(
        self, run: Together, data: memoryview, edges: Sequence[int], written: Container[int], lane: Lane
    ) -> None:
        """What follows one another here and in the file goes there at once."""
        held = ("", 0, 0, 0)  # file, its byte, first byte here, byte after the last
        for k, (kind, name) in enumerate(zip(run.kinds, run.targets, strict=True)):
            if k in written:
                continue
            offset, start, stop = self.begins[kind.target][name], edges[k], edges[k + 1]
            file, at, first, last = held
            if last == start and at + last - first == offset and file == kind.target:
                held = (file, at, first, stop)
                continue
            self._put(held, data, lane)
            held = (kind.target, offset, start, stop)
        self._put(held, data, lane)
        lane.outbox.write_held()  # the disk is asked for more at once

    def _put(self, held: tuple[str, int, int, int], data: memoryview, lane: Lane) -> None:
        file, at, first, last = held
        if last > first:
            lane.outbox.put(file, self.opened[file], at, data[first:last])


def _evenly(places: Sequence[int]) -> Iterator[Sequence[int]]:
    """The places, which rise, in runs that are equally far apart."""
    start = 0
    for k in range(2, len(places) + 1):
        if k == len(places) or (
            k - start > 1 and places[k] - places[k - 1] != places[start + 1] - places[start]
        ):
            yield places[start:k]
            start = k
    if start < len(places):
        yield places[start:]


def _rows(room: np.ndarray, begins: Sequence[int], numel: int) -> np.ndarray:
    """The runs of `numel` elements of flat `room` that begin there, equally far apart, as a matrix."""
    step = begins[1] - begins[0] if len(begins) > 1 else numel
    first, itemsize = begins[0] * room.itemsize, room.itemsize
    return np.ndarray((len(begins), numel), room.dtype, room.data, first, (step * itemsize, itemsize))


def _made(kind: Kind, bits: np.ndarray, lane: Lane) -> np.ndarray:
    """The elements of a tensor as they are written."""
    if kind.block is None:
        return bits
    room = lane.room("out", kind.numel, bits.dtype)
    kind.block.shuffle([bits], [room])
    return room
