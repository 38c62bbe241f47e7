"""Moving the blocks of a plan: read, reorder, cast, look at, checksum, write - in buffers that are reused.

A block of 256 KiB stays in the cache from the read to the write (measured in benchmarks/profiles.md),
so each byte crosses the memory once in each direction. All calls that do work release the interpreter's lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.checkpoint.crc32 import IntervalCrc
from ckpt_tool.checkpoint.crc32c import crc32c
from ckpt_tool.checkpoint.zlibs import crc32
from ckpt_tool.convert import disk
from ckpt_tool.convert.casting import cast, common
from ckpt_tool.convert.layout import Access, Block, Runs, Step
from ckpt_tool.convert.outbox import Outbox
from ckpt_tool.convert.plan import OutputFile
from ckpt_tool.convert.pooling import mean
from ckpt_tool.convert.strips import assign, slabs
from ckpt_tool.convert.values import Values
from ckpt_tool.records import dataclass

CHUNK = 256 * 1024  # bytes moved at a time by a plain copy
BLOCK = 1 << 20  # bytes of a block that joins or cuts tensors: fewer, larger pieces (benchmarks/profiles.md)
PIECE = 16 << 20  # bytes of one plain copy that one worker does in a row
BATCH = 4 << 20  # bytes of small blocks handed to a worker together
RUN_C = 4 << 10  # bytes of a run from which on its CRC-32C is worth the call; else it is taken in order later
TILE = 16 << 20  # bytes of a block that exchanges inner axes: its runs get longer with its size

Run = tuple[int, int, int]  # first byte, bytes, CRC32


class Source:
    """A tensor as one step reads it. `crc` is None where another step already takes its checksum; `crc32c`
    collects the other one, where its file has that to compare with."""

    def __init__(self, info: TensorInfo, crc: IntervalCrc | None, crc32c: IntervalCrc | None = None) -> None:
        self.info, self.crc, self.crc32c = info, crc, crc32c
        self.itemsize = DTYPES[info.dtype].itemsize
        self.bits = np.dtype(DTYPES[info.dtype].bits)


class Target:
    """A tensor of an output file: its bytes start at `offset` of the open `descriptor`."""

    def __init__(self, info: TensorInfo, descriptor: int, offset: int) -> None:
        self.info, self.descriptor, self.offset = info, descriptor, offset
        self.itemsize = DTYPES[info.dtype].itemsize
        self.bits = np.dtype(DTYPES[info.dtype].bits)
        self.crc = IntervalCrc()
        self.values = Values(info.dtype)

    def write(self, data: memoryview, start: int, outbox: Outbox) -> None:
        outbox.put(self.info.file, self.descriptor, self.offset + start, data)

    def read(self, buffer: memoryview, start: int) -> None:
        """Bytes written earlier."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[done:]], self.offset + start + done)
            except OSError as error:
                at = self.offset + start + done
                raise disk.failure(error, self.info.file, offset=at, doing="read back") from None
            if count == 0:
                raise disk.failure(OSError(0, "end of file"), self.info.file, offset=self.offset + start)
            done += count


class Targets(dict[tuple[str, str], Target]):
    """The tensors of the open files `opened` by file and name, each made when it is asked for; `begins` has
    their first bytes."""

    def __init__(
        self,
        files: Sequence[OutputFile],
        opened: Mapping[str, int],
        begins: Mapping[str, Mapping[str, int]],
    ) -> None:
        super().__init__()
        self._files, self._opened, self._begins = files, opened, begins

    @cached_property
    def _infos(self) -> dict[tuple[str, str], TensorInfo]:
        return {(f.name, t.name): t for f in self._files for t in f.tensors}

    def every(self) -> Iterator[tuple[str, str]]:
        """The file and name of each."""
        return ((f.name, t.name) for f in self._files for t in f.tensors)

    def __missing__(self, key: tuple[str, str]) -> Target:
        file, name = key
        found = self[key] = Target(self._infos[key], self._opened[file], self._begins[file][name])
        return found


@dataclass
class Bound:
    """A step with its tensors found."""

    step: Step
    sources: Sequence[Source]
    targets: Sequence[Target]

    @cached_property
    def moved(self) -> str:
        """The dtype in which elements are reordered: it holds those of every source as they are."""
        return common(p.dtype for p in self.step.sources)

    @property
    def made(self) -> str:
        """The dtype of the result; that of a comparison may be wider than the target's own."""
        return self.step.targets[0].dtype


@dataclass
class Lane:
    """What one worker has for itself: buffers that grow to what is needed and stay, and its counts."""

    read_bytes: int = 0
    written_bytes: int = 0
    outbox: Outbox = field(default_factory=Outbox)
    _rooms: dict[str, np.ndarray] = field(default_factory=dict)

    def room(self, purpose: str, count: int, bits: np.dtype[Any]) -> np.ndarray:
        """`count` elements of scratch memory, unset; valid until the purpose is asked for again."""
        size = count * bits.itemsize
        found = self._rooms.get(purpose)
        if found is None or found.size < size:
            found = self._rooms[purpose] = np.empty(max(size, CHUNK), dtype=np.uint8)
        return found[:size].view(bits)


class Carrier:
    """Carries blocks from a checkpoint to output files; `lock` guards what the workers learn in common."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.lock = threading.Lock()

    def carry_all(self, batch: Iterable[tuple[Bound, Block]], lane: Lane) -> None:
        for bound, block in batch:
            self.carry(bound, block, lane)
        lane.outbox.flush()

    def carry(self, bound: Bound, block: Block, lane: Lane) -> None:
        if block.is_copy:
            self._copy(bound, block, lane)
        else:
            self._reorder(bound, block, lane)

    def _copy(self, bound: Bound, block: Block, lane: Lane) -> None:
        """One run to one run: chunk by chunk, one checksum for both sides unless the dtype changes."""
        read, write = block.reads[0], block.writes[0]
        source, target = bound.sources[read.part], bound.targets[write.part]
        start_in, start_out = read.runs.base * source.itemsize, write.runs.base * target.itemsize
        same = source.info.dtype == target.info.dtype
        step = CHUNK // max(source.itemsize, target.itemsize)
        room = lane.room("in", min(step, read.numel), source.bits)
        cast_room = room if same else lane.room("cast", room.size, target.bits)
        values = Values(target.info.dtype)
        crc_in = crc_out = crc_c = 0
        for start in range(0, read.numel, step):
            bits = room[: read.numel - start]
            data = bits.data.cast("B")
            self.checkpoint.read_into(source.info, start_in + start * source.itemsize, data)
            crc_in = crc32(data, crc_in)
            if source.crc32c is not None:
                crc_c = crc32c(data, crc_c)
            if not same:
                bits = cast_room[: bits.size]
                cast(room[: bits.size], source.info.dtype, target.info.dtype, bits)
                data = bits.data.cast("B")
                crc_out = crc32(data, crc_out)
            place = values.look(bits)
            if place is not None:
                values.found_at(write.runs.base + start + place)
            target.write(data, start_out + start * target.itemsize, lane.outbox)
        size_in, size_out = read.numel * source.itemsize, read.numel * target.itemsize
        self._learn_source(source, [(start_in, size_in, crc_in)], [(start_in, size_in, crc_c)])
        self._learn_target(target, [(start_out, size_out, crc_in if same else crc_out)], values)
        lane.read_bytes += size_in
        lane.written_bytes += size_out

    def _exchange(self, bound: Bound, block: Block, lane: Lane) -> None:
        """A block that is one run on either side and keeps its dtype: what is written is made slab by slab,
        so that the second-level cache still has it when it is looked at, summed and written."""
        (read,), (write,) = block.reads, block.writes
        target = bound.targets[write.part]
        stored = lane.room("in", read.numel, target.bits)
        self._read(bound.sources[read.part], read, stored, bound.moved, lane)
        turned = stored.reshape(read.shape).transpose(block.moves[0][4])
        values, crc = Values(target.info.dtype), 0
        for start, piece in slabs(turned, BLOCK // target.itemsize):
            bits = lane.room("out", piece.size, target.bits)
            assign(bits.reshape(piece.shape), piece)
            crc = self._write_run(target, bits, write.runs.base + start, values, lane, crc)[2]
        self._learn_target(target, [(write.runs.base * target.itemsize, stored.nbytes, crc)], values)
        lane.written_bytes += stored.nbytes

    def _reorder(self, bound: Bound, block: Block, lane: Lane) -> None:
        if block.is_exchange and bound.moved == bound.made == bound.targets[block.writes[0].part].info.dtype:
            self._exchange(bound, block, lane)
            return
        for access, bits in self._gathered(bound, block, lane):
            target = bound.targets[access.part]
            values, step = Values(target.info.dtype), CHUNK // target.itemsize
            offsets, length = access.runs.offsets(), access.runs.length
            runs: list[Run] = []
            if length < step:  # several runs are looked at together
                for start in range(0, bits.size, step):
                    place = values.look(bits[start : start + step])
                    if place is not None:
                        run, rest = divmod(start + place, length)
                        values.found_at(offsets[run] + rest)
            for k, offset in enumerate(offsets):
                part = bits[k * length : (k + 1) * length]
                looked = values if length >= step else None
                runs.append(self._write_run(target, part, offset, looked, lane))
            self._learn_target(target, runs, values)
            lane.written_bytes += bits.nbytes

    def _write_run(
        self, target: Target, bits: np.ndarray, offset: int, values: Values | None, lane: Lane, crc: int = 0
    ) -> Run:
        """One run of elements: each chunk is looked at (for `values`), summed (after what has `crc`) and
        written while the cache has it."""
        step = CHUNK // target.itemsize
        for start in range(0, bits.size, step):
            chunk = bits[start : start + step]
            place = None if values is None else values.look(chunk)
            if values is not None and place is not None:
                values.found_at(offset + start + place)
            data = chunk.data.cast("B")
            crc = crc32(data, crc)
            target.write(data, (offset + start) * target.itemsize, lane.outbox)
        return offset * target.itemsize, bits.nbytes, crc

    def crc_of(self, key: tuple[str, str], start: int, size: int, lane: Lane) -> int:
        """The CRC32 of bytes of a source tensor, given by file and name, that are read for it alone."""
        info, crc = self.checkpoint.files[key[0]].tensors[key[1]], 0
        for at in range(start, start + size, CHUNK):
            room = lane.room("in", min(CHUNK, start + size - at), np.dtype("u1")).data
            self.checkpoint.read_into(info, at, room)
            crc = crc32(room, crc)
            lane.read_bytes += len(room)
        return crc

    def same(self, bound: Bound, block: Block, lane: Lane) -> bool:
        """Whether the targets, already written, hold what the block would write."""
        return all(np.array_equal(made, there) for made, there, _ in self.compared(bound, block, lane))

    def compared(
        self, bound: Bound, block: Block, lane: Lane
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Access]]:
        """For each target: the bits the block would write, the bits that are there, and where."""
        for access, bits in self._gathered(bound, block, lane):
            target = bound.targets[access.part]
            there = lane.room("there", bits.size, target.bits)
            data, size = there.data.cast("B"), access.runs.length * target.itemsize
            for k, offset in enumerate(access.runs.offsets()):
                target.read(data[k * size : (k + 1) * size], offset * target.itemsize)
            if target.info.dtype != bound.made:
                wide = lane.room("there as compared", bits.size, bits.dtype)
                cast(there, target.info.dtype, bound.made, wide)
                there = wide
            yield bits, there, access

    def _gathered(self, bound: Bound, block: Block, lane: Lane) -> list[tuple[Access, np.ndarray]]:
        """The block's writes with their bits, read from the sources, in order and in the step's dtype."""
        from_bits, to_bits = (np.dtype(DTYPES[d].bits) for d in (bound.moved, bound.made))
        inputs = _shares(lane, "in", [a.numel for a in block.reads], from_bits)
        for access, bits in zip(block.reads, inputs, strict=True):
            self._read(bound.sources[access.part], access, bits, bound.moved, lane)
        outputs = inputs
        if not block.is_copy:
            outputs = _shares(lane, "out", block.filled, from_bits)
            block.shuffle(inputs, outputs)
        if bound.moved != bound.made or block.mean:
            made = _shares(lane, "cast", [a.numel for a in block.writes], to_bits)
            for a, b in zip(outputs, made, strict=True):
                if block.mean:
                    mean(a, block.mean, bound.moved, bound.made, b)
                else:
                    cast(a, bound.moved, bound.made, b)
            outputs = made
        return list(zip(block.writes, outputs, strict=True))

    def _read(self, source: Source, access: Access, bits: np.ndarray, dtype: str, lane: Lane) -> None:
        """Fill `bits`, of `dtype`, from a source that may be of a narrower one."""
        same = source.info.dtype == dtype
        stored = bits if same else lane.room("as stored", bits.size, source.bits)
        data, size = stored.data.cast("B"), access.runs.length * source.itemsize
        runs: list[Run] = []
        runs_c: list[Run] = []
        for k, offset in enumerate(access.runs.offsets()):
            part = data[k * size : (k + 1) * size]
            self.checkpoint.read_into(source.info, offset * source.itemsize, part)
            if source.crc is not None:
                runs.append((offset * source.itemsize, size, crc32(part)))
            if source.crc32c is not None and (size >= RUN_C or size == source.info.nbytes):
                runs_c.append((offset * source.itemsize, size, crc32c(part)))
        self._learn_source(source, runs, runs_c)
        lane.read_bytes += len(data)
        if not same:
            cast(stored, source.info.dtype, dtype, bits)

    def _learn_source(self, source: Source, runs: Iterable[Run], runs_c: Iterable[Run]) -> None:
        for crc, known in ((source.crc, runs), (source.crc32c, runs_c)):
            if crc is not None:
                for run in known:
                    crc.add(*run)

    def _learn_target(self, target: Target, runs: Iterable[Run], values: Values) -> None:
        with self.lock:
            target.values.merge(values)
        for run in runs:
            target.crc.add(*run)


def _shares(lane: Lane, purpose: str, sizes: Sequence[int], bits: np.dtype[Any]) -> list[np.ndarray]:
    room, shares, at = lane.room(purpose, sum(sizes), bits), [], 0
    for size in sizes:
        shares.append(room[at : at + size])
        at += size
    return shares


def pieces(step: Step, *, copy_bytes: int = PIECE) -> Iterator[Block]:
    """The blocks of a step, its plain copies cut into pieces of at most `copy_bytes`."""
    longest = copy_bytes // DTYPES[step.sources[0].dtype].itemsize
    for block in step.blocks(BLOCK, TILE):
        if not block.is_copy or block.reads[0].numel <= longest:
            yield block
            continue
        read, write = block.reads[0], block.writes[0]
        for start in range(0, read.numel, longest):
            n = min(longest, read.numel - start)
            yield Block((_run(read, start, n),), (_run(write, start, n),), (_STRAIGHT,))


_STRAIGHT = (0, 0, (slice(None),), (slice(None),), (0,))


def _run(access: Access, start: int, length: int) -> Access:
    return Access(access.part, Runs(access.runs.base + start, (), (), length), (length,))


def batches(steps: Iterable[Bound], *, copy_bytes: int = PIECE) -> Iterator[list[tuple[Bound, Block]]]:
    """The blocks of all steps in order, in bundles that are worth handing to a worker."""
    batch: list[tuple[Bound, Block]] = []
    size = 0
    for bound in steps:
        itemsize = bound.sources[0].itemsize
        for block in pieces(bound.step, copy_bytes=copy_bytes):
            batch.append((bound, block))
            size += itemsize * sum(a.numel for a in block.reads)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
