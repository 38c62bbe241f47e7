"""The weights that DeepSpeed's ZeRO deals out to ranks, as one file of whole tensors.

ZeRO 3 cuts each parameter, flat, into as many parts as there are ranks, of which the last is filled up with
padding; a rank has its parts one after another, in sub-groups. ZeRO 1 and 2 lay the parameters of a group one
after another and cut that whole row. Either way a tensor is some runs of elements in files of several ranks.

Source: DeepSpeed 0.19.8, see zero_ranks.py.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TypeVar

from ckpt_tool.checkpoint.base import DTYPES, LeftOut, Record, TensorFile, TensorInfo
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.crc32 import IntervalCrc
from ckpt_tool.checkpoint.deepspeed import ALL, Shares, check_one_rank
from ckpt_tool.checkpoint.folders import Place
from ckpt_tool.checkpoint.open_files import Files
from ckpt_tool.checkpoint.tensor_names import name_problems
from ckpt_tool.checkpoint.zero_ranks import (
    WHOLE,
    Flat,
    Model,
    Partition,
    Shape,
    read_model,
    read_partition,
)
from ckpt_tool.checkpoint.zlibs import crc32
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all, printable
from ckpt_tool.records import dataclass

FORMAT = "deepspeed-zero"
_BLOCK = 4 << 20
_MASTERS = ("F32", "BF16", "F16")  # 16 bits where a run keeps its master weights in them
_LOOKED_AT, _FEW = 64 << 10, 8  # bytes of a partition, and different numbers in them
_MIXED = "take away what another run or step left in the folder, or get the files of one step"
# MiCS, parameters on NVMe and the like.
_OTHERWISE = f"the run kept the weights in another way than this release of DeepSpeed does; {WHOLE}"
T = TypeVar("T")


class Row:
    """Flat tensors one after another, as one vector."""

    def __init__(self, flats: Sequence[Flat]) -> None:
        self.flats = [f for f in flats if f.numel]
        self.ends = list(accumulate(f.numel for f in self.flats))
        self.numel = self.ends[-1] if self.ends else 0

    def at(self, element: int) -> tuple[Flat, int, int]:
        """Where an element lies: in which flat tensor, at which place, and how many follow it there, itself
        counted."""
        k = bisect_right(self.ends, element)
        flat = self.flats[k]
        return flat, flat.numel - (self.ends[k] - element), self.ends[k] - element


@dataclass(frozen=True, slots=True)
class Dealt:
    """A tensor in `rows`, of which each has `share` elements, the last as many as are left, from its
    element `first` on. `alias` is another name of one that is listed already."""

    rows: Sequence[Row]
    first: int
    share: int
    alias: bool = False

    def runs(self, start: int, stop: int) -> Iterator[tuple[Flat, int, int]]:
        """Elements `start` to `stop` as (flat tensor, first element in it, elements)."""
        while start < stop:
            row, inside = divmod(start, self.share)
            flat, at, left = self.rows[row].at(self.first + inside)
            count = min(left, self.share - inside, stop - start)
            yield flat, at, count
            start += count


class ZeroFile(TensorFile):
    """The tensors of all ranks. Files are opened while they are read; of each partition the CRC-32 of what is
    read is kept, so that it is compared in the end without being read again, but for the padding."""

    format = FORMAT

    def __init__(self, files: Files, shares: Shares, made: Layout) -> None:
        self._files, self.shares = files, shares
        self.name = next(iter(shares.optimizers.values()))
        self.path = files.places[self.name].path
        self.metadata: Mapping[str, object] = made.metadata
        self._dealt = made.dealt
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, made.dtypes[name], made.shapes[name], self.name) for name in made.dealt
        }
        self.imports = made.imports
        self.left_out = made.left_out
        self.notes = tuple(made.notes)
        self._records = {_key(f): f for f in _flats(self._dealt.values())}
        self._seen = {key: IntervalCrc() for key in self._records}
        self._lock = threading.Lock()

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(p.path for p in self._files.places.values()))

    @property
    def places(self) -> Mapping[str, Place]:
        """Where each file of the ranks lies, by its name."""
        return self._files.places

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        told, dealt = self.tensors[name], self._dealt[name]
        if offset < 0 or offset + len(buffer) > told.nbytes:
            raise ValueError(f"{name}: bytes {offset} to {offset + len(buffer)} of {told.nbytes}")
        size = DTYPES[told.dtype].itemsize
        first, skip = divmod(offset, size)
        if skip or len(buffer) % size:  # in the middle of an element: nobody who copies does so
            last = -(-(offset + len(buffer)) // size)
            whole = bytearray((last - first) * size)
            self._fill(name, dealt, first, memoryview(whole), size, alias=True)
            buffer[:] = memoryview(whole)[skip : skip + len(buffer)]
            return
        self._fill(name, dealt, first, buffer, size, alias=dealt.alias)

    def _fill(
        self, name: str, dealt: Dealt, first: int, buffer: memoryview, size: int, *, alias: bool
    ) -> None:
        done = 0
        for flat, at, count in dealt.runs(first, first + len(buffer) // size):
            part = buffer[done : done + count * size]
            with self._files.use(flat.file) as data:
                data.read_into(flat.at + at * size, part, name)
            if not alias:
                start = flat.at + at * size - flat.begin
                self._seen[_key(flat)].add(start, len(part), crc32(part))
            done += len(part)

    def extent(self, name: str) -> None:
        """None: a tensor is runs of several files."""

    def records(self, of: Container[str] | None = None) -> Mapping[str, Record]:
        if of is None:
            return {key: f.record._replace(key=key) for key, f in self._records.items()}
        keys = set(map(_key, _flats(d for n, d in self._dealt.items() if n in of)))
        return {k: f.record._replace(key=k) for k, f in self._records.items() if k in keys}

    def told(self) -> Iterator[object]:
        """The records with their checksums, and where in them each tensor begins."""
        yield from super().told()
        for name, dealt in self._dealt.items():
            yield name, dealt.first, dealt.share, [f.file for f in dealt.rows[0].flats[:1]]

    def check_record(self, key: str) -> bool:
        flat, seen = self._records[key], self._seen[key]
        record = flat.record
        if record.crc32 is None:
            return False
        holes = seen.holes(record.size)
        if holes is None or sum(n for _, n in holes) > record.size // 2:
            seen, holes = IntervalCrc(), [(0, record.size)]
        for at, size in holes:
            for start in range(at, at + size, _BLOCK):
                part = bytearray(min(_BLOCK, at + size - start))
                with self._files.use(flat.file) as data:
                    data.read_into(flat.begin + start, memoryview(part))
                seen.add(start, len(part), crc32(part))
        crc = seen.value(record.size)
        if crc != record.crc32:
            message = f"expected CRC32 {record.crc32:08x} as the file says, found {crc or 0:08x}"
            hint = "the file is damaged: download it again"
            fail("checksum", message, file=flat.file, where=f"data/{record.key}", hint=hint)
        return True

    def check_unchanged(self) -> None:
        self._files.check_unchanged()

    def close(self) -> None:
        self._files.close()


def _flats(dealt: Iterable[Dealt]) -> Iterator[Flat]:
    """Those of all rows, which many tensors have in common."""
    rows = {id(row): row for some in {id(d.rows): d.rows for d in dealt}.values() for row in some}
    return (flat for row in rows.values() for flat in row.flats)


def _key(flat: Flat) -> str:
    """The name of its record among those of all files."""
    return f"{flat.file}:{flat.record.key}"


@dataclass
class Layout:
    """Where every tensor lies, of all ranks together."""

    dealt: dict[str, Dealt]
    shapes: dict[str, Shape]
    dtypes: dict[str, str]
    notes: list[str]
    metadata: Mapping[str, object]
    imports: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def open_zero(place: Callable[[str], Place], shares: Shares) -> ZeroFile:
    """The files of all ranks as one. Kinds: those of `read_partition` and `read_model`, `missing-shard`,
    `shard-conflict`, `size-mismatch`, `shape-mismatch`, `dtype-mismatch`, `duplicate-tensor`,
    `missing-tensor`, `unsupported`."""
    names = [*shares.optimizers.values(), *shares.models.values()]
    files = Files({name: place(shares.within + name) for name in names})
    try:
        partitions: dict[int, Partition] = {}
        models: dict[int, Model] = {}
        problems: list[Problem] = []
        for rank, name in shares.optimizers.items():
            with files.use(name) as data:
                problems += _kept(partitions, rank, partial(read_partition, data))
        for rank, name in shares.models.items():
            with files.use(name) as data:
                like = next(iter(models.values()), None)
                problems += _kept(models, rank, partial(_like, like, data))
        fail_all(problems)
        fail_all(_against(shares, partitions, models))
        fail_all(_twice(files, partitions.values()))
        return ZeroFile(files, shares, _laid_out(list(partitions.values()), list(models.values())))
    except BaseException:
        files.close()
        raise


def _kept(found: dict[int, T], rank: int, read: Callable[[], T]) -> Sequence[Problem]:
    try:
        found[rank] = read()
    except CkptToolError as error:
        return error.problems
    return ()


def _like(first: Model | None, data: ByteRange) -> Model:
    """The model states in `data`, without what nobody asks of them but of the `first` rank's, whose shapes
    they share: there may be hundreds."""
    model = read_model(data)
    if first is None:
        return model
    same = _in_order(model) == _in_order(first)
    shapes, frozen = (first.shapes, first.frozen) if same else (model.shapes, model.frozen)
    return replace(model, shapes=shapes, frozen=frozen, held={}, metadata={})


def _in_order(model: Model) -> object:
    return [list(group.items()) for group in model.shapes], model.frozen


def _against(
    shares: Shares, partitions: Mapping[int, Partition], models: Mapping[int, Model]
) -> Iterator[Problem]:
    """What the ranks' files say against being all of one step of one run."""
    first = next(iter(partitions.values()))
    for p in partitions.values():
        if p.stage != first.stage or p.counts != first.counts:
            message = f"expected {_shared(first)} as {first.file} says, found {_shared(p)}"
            yield Problem("shard-conflict", message, p.file, "partition_count", _MIXED)
            return
        if p.steps != first.steps:
            message = f"expected step {_shown(first.steps)} as in {first.file}, found {_shown(p.steps)}"
            yield Problem("shard-conflict", message, p.file, "step", _MIXED)
        if p.stage != 3 and None not in (p.gaps, first.gaps) and p.gaps != first.gaps:
            message = f"expected the padding after each parameter as in {first.file}, found another"
            yield Problem("shard-conflict", message, p.file, "param_alignment_paddings", _MIXED)
    if len(set(first.counts)) > 1:
        message = f"expected as many ranks for each group, found {_shared(first)}"
        yield Problem("unsupported", message, first.file, "partition_count", WHOLE)
        return
    world = first.counts[0]
    held = [(shares.optimizers, first.file)]
    if first.stage == 3:
        held.append((shares.models, next(iter(models.values())).file))
    for files, like in held:
        lost = [r for r in range(world) if r not in files]
        for rank in () if files is shares.models and _enough(models) else lost[:8]:
            wanted = shares.called(like, rank)
            message = f"expected {wanted}, of the {world} ranks that shared the weights, found no such file"
            yield Problem("missing-shard", message, first.file, hint=ALL)
        for rank in [r for r in files if r >= world][:8]:
            message = f"expected files of {world} ranks as partition_count says, found one of rank {rank}"
            yield Problem("shard-conflict", message, files[rank], "partition_count", _MIXED)
    yield from _between(list(models.values()))


def _enough(models: Mapping[int, Model]) -> bool:
    """Whether the states of rank 0 tell all: other ranks' have parts of what is frozen alone, and a run that
    began with `load_universal` does not save them. Source: deepspeedai/DeepSpeed#7546."""
    return 0 in models and not any(m.frozen for m in models.values())


def _twice(files: Files, partitions: Collection[Partition]) -> Iterator[Problem]:
    """Files with the very bytes of another rank's: one file under two numbers."""
    first: dict[tuple[tuple[int | None, int], ...], str] = {}
    for p in partitions:
        held = tuple((g.record.crc32, g.record.size) for g in p.groups if g.numel)
        other = first.setdefault(held, p.file)
        if other != p.file and all(crc is not None for crc, _ in held) and _tells(files, p):
            message = (
                f"expected other weights than in {other}, found the same bytes in all {len(held)} groups"
            )
            hint = "one file is there under two numbers: get the one that is missing"
            yield Problem("shard-conflict", message, p.file, hint=hint)


def _tells(files: Files, p: Partition) -> bool:
    """Whether the numbers of a rank can be no other's: the few of fresh norms and biases can."""
    longest = max(p.groups, key=lambda g: g.numel)
    with files.use(p.file) as data:
        raw = data.read(longest.at, min(longest.numel * DTYPES[longest.dtype].itemsize, _LOOKED_AT))
    return len({raw[k : k + 4] for k in range(0, len(raw), 4)}) > _FEW


def _between(models: Sequence[Model]) -> Iterator[Problem]:
    first = models[0]
    check_one_rank(first.metadata, file=first.file)
    for m in models[1:]:
        if m.step != first.step:
            message = f"expected global_steps {first.step} as in {first.file}, found {m.step}"
            yield Problem("shard-conflict", message, m.file, "global_steps", _MIXED)
        elif _in_order(m) != _in_order(first):
            message = f"expected the parameters of {first.file}, in their order, found others"
            yield Problem("shard-conflict", message, m.file, "param_shapes", _MIXED)


def _shared(p: Partition) -> str:
    counts = " and ".join(map(str, dict.fromkeys(p.counts)))
    return f"{'ZeRO 3' if p.stage == 3 else 'ZeRO 1 or 2'} of {counts} ranks"


def _shown(steps: Collection[int]) -> str:
    return ", ".join(map(str, sorted(steps)[:4])) or "none"


# --- where tensors lie ----------------------------------------------------------------------------------


def _laid_out(partitions: Sequence[Partition], models: Sequence[Model]) -> Layout:
    first = models[0]
    dtypes = sorted({g.dtype for p in partitions for g in p.groups})
    if len(dtypes) != 1:
        message = f"expected partitions of one dtype, found {' and '.join(dtypes) or 'none'}"
        fail("dtype-mismatch", message, file=partitions[0].file)
    if dtypes[0] not in _MASTERS:
        message = f"expected partitions of {', '.join(_MASTERS)}, found {dtypes[0]}"
        fail("dtype-mismatch", message, file=partitions[0].file)
    shapes: dict[str, Shape] = {}
    problems = []
    for name, shape in ((n, s) for g in (*first.shapes, first.frozen) for n, s in g.items()):
        if name in shapes:
            message = "expected each parameter in one group, found it in two"
            problems.append(Problem("duplicate-tensor", message, first.file, name))
        shapes[name] = shape
    fail_all(problems)
    three = partitions[0].stage == 3
    dealt = _cut_each(partitions, first) if three else _cut_rows(partitions, first)
    dealt |= dict(_frozen(models) if three else _whole_frozen(first))
    notes, order = _others(first, dealt, shapes, three=three)
    fail_all(_shaped_otherwise(first, shapes))
    fail_all(name_problems(order, file=first.file))
    ranks = f"{len(partitions)} rank{'s' * (len(partitions) > 1)}"
    what = f"the {DTYPES[dtypes[0]].torch} weights of DeepSpeed's optimizer on {ranks} were joined"
    if three and (lost := len(partitions) - len(models)):
        notes.append(f"model states of {lost} ranks are not there: nothing is frozen, so they add nothing")
    held: list[Model | Partition] = [*models, *partitions]
    return Layout(
        {n: dealt[n] for n in order},
        shapes,
        {n: dealt[n].rows[0].flats[0].dtype if dealt[n].rows[0].flats else dtypes[0] for n in order},
        [what, *notes],
        first.metadata,
        tuple(dict.fromkeys(n for own in held for n in own.imports)),
        (*_of_training(partitions), *_in_half(first, dealt)),
    )


def _of_training(partitions: Sequence[Partition]) -> Iterator[LeftOut]:
    for p in partitions:
        yield from (LeftOut(t, "state of the optimizer: only training needs it") for t in p.others)


def _in_half(model: Model, dealt: Mapping[str, Dealt]) -> Iterator[LeftOut]:
    """Weights of the model's own file that the optimizer has in float32."""
    reason = "what the model computes with; the optimizer's float32 weights were taken"
    for name, (shape, flat) in model.held.items():
        if flat is not None and flat not in dealt[name].rows[0].flats[:1]:
            yield LeftOut(TensorInfo(f"module.{name}", flat.dtype, shape, model.file), reason)


def _cut_each(partitions: Sequence[Partition], model: Model) -> dict[str, Dealt]:
    """ZeRO 3: each parameter is dealt out on its own, to all ranks."""
    world, at = len(partitions), 0
    rows = [Row(p.groups) for p in partitions]
    dealt: dict[str, Dealt] = {}
    for name, shape in ((n, s) for group in model.shapes for n, s in group.items()):
        share = -(-prod(shape) // world)
        dealt[name] = Dealt(rows, at, max(share, 1))
        at += share
    for p, row in zip(partitions, rows, strict=True):
        if row.numel != at:
            message = f"expected {at} elements for the parameters of param_shapes, found {row.numel}"
            fail("size-mismatch", message, file=p.file, where="fp32_flat_groups", hint=_OTHERWISE)
    return dealt


def _cut_rows(partitions: Sequence[Partition], model: Model) -> dict[str, Dealt]:
    """ZeRO 1 and 2: the parameters of a group follow one another, and that row is cut."""
    world, where = len(partitions), "single_partition_of_fp32_groups"
    dealt: dict[str, Dealt] = {}
    for p in partitions:
        if len(p.groups) != len(model.shapes):
            message = f"expected {len(model.shapes)} groups as param_shapes has, found {len(p.groups)}"
            fail("size-mismatch", message, file=p.file, where=where, hint=_OTHERWISE)
    gaps = partitions[0].gaps
    for k, group in enumerate(model.shapes):
        row, at = Row([p.groups[k] for p in partitions]), 0
        after = gaps[k] if gaps is not None and k < len(gaps) else (0,) * len(group)
        if len(after) != len(group):
            message = f"expected the padding after each of {len(group)} parameters, found {len(after)}"
            fail("size-mismatch", message, file=partitions[0].file, where="param_alignment_paddings")
        for (name, shape), gap in zip(group.items(), after, strict=True):
            dealt[name] = Dealt((row,), at, max(prod(shape), 1))
            at += prod(shape) + gap
        fail_all(_ends(row.numel, (at - (after[-1] if after else 0), at), 2 * world, k, partitions))
        fail_all(_misplaced(k, group, dealt, partitions))
    return dealt


def _ends(
    there: int, wanted: tuple[int, int], aligned: int, k: int, held: Sequence[Partition]
) -> Iterator[Problem]:
    """A row has padding at its end, or had, so much that ranks have even shares. `wanted` is how long it is
    without and with that of its last parameter."""
    if wanted[0] <= there <= -(-wanted[1] // aligned) * aligned:
        return
    message = f"expected {wanted[0]} elements in group {k} and less than {aligned} of padding, found {there}"
    where = "single_partition_of_fp32_groups"
    yield Problem("size-mismatch", message, held[0].file, where, _OTHERWISE)


def _misplaced(
    k: int, group: Mapping[str, Shape], dealt: Mapping[str, Dealt], partitions: Sequence[Partition]
) -> Iterator[Problem]:
    """Parts of parameters that do not lie where the rank itself says: the files of two ranks were swapped, or
    another run's order is beside them."""
    begin = 0
    for p in partitions:
        end = begin + p.groups[k].numel
        slices = p.slices[k] if p.slices is not None and k < len(p.slices) else {}
        for name, said in slices.items():
            if name not in group:
                continue
            first = dealt[name].first
            low, high = max(first, begin), min(first + prod(group[name]), end)
            if said != (low - begin, high - low):
                message = (
                    f"expected {said[1]} elements of it from {said[0]} on as this rank says, found "
                    f"{max(high - low, 0)} from {low - begin} on by the order of the files"
                )
                yield Problem("shard-conflict", message, p.file, name, _MIXED)
                return
        begin = end


def _frozen(models: Sequence[Model]) -> Iterator[tuple[str, Dealt]]:
    """ZeRO 3: what is not trained is dealt out as the rest, in a tensor of its own for each rank."""
    for name, shape in models[0].frozen.items():
        share = -(-prod(shape) // len(models))
        rows: list[Row] = []
        for m in models:
            flat = m.fragments.get(name)
            if flat is None:
                message = "expected the part of a rank in frozen_param_fragments, found none"
                fail("missing-tensor", message, file=m.file, where=name, hint=_MIXED)
            if flat.numel != share:
                message = f"expected {share} elements of {list(shape)}, found {flat.numel}"
                fail("size-mismatch", message, file=m.file, where=name, hint=_OTHERWISE)
            if rows and rows[0].flats and flat.dtype != rows[0].flats[0].dtype:
                message = f"expected {rows[0].flats[0].dtype} as rank 0 has, found {flat.dtype}"
                fail("dtype-mismatch", message, file=m.file, where=name)
            rows.append(Row([flat]))
        yield name, Dealt(rows, 0, max(share, 1))


def _whole_frozen(model: Model) -> Iterator[tuple[str, Dealt]]:
    """ZeRO 1 and 2: what is not trained is whole."""
    for name, shape in model.frozen.items():
        flat = model.fragments.get(name) or model.held.get(name, ((), None))[1]
        found = 0 if flat is None else flat.numel
        if found != prod(shape):
            message = f"expected {prod(shape)} elements of {list(shape)}, found {found}"
            fail("size-mismatch", message, file=model.file, where=name)
        yield name, Dealt((Row([flat] if flat else []),), 0, max(found, 1))


def _shaped_otherwise(model: Model, shapes: Mapping[str, Shape]) -> Iterator[Problem]:
    """Weights that the model's own file has in another shape than the one they are read with."""
    for name, (own, flat) in model.held.items():
        if flat is not None and name in shapes and shapes[name] != own:
            message = f"expected shape {list(own)} as in module, found {list(shapes[name])}"
            yield Problem("shape-mismatch", message, model.file, name)


def _others(
    model: Model, dealt: dict[str, Dealt], shapes: dict[str, Shape], *, three: bool
) -> tuple[list[str], list[str]]:
    """Add buffers, and other names of shared parameters; notes, and all names in the model's order."""
    notes: list[str] = []
    shared = model.shared or {}
    known = dealt.keys() | {name for name, of in shared.items() if of in dealt}
    buffers = [n for n, (_, flat) in model.held.items() if flat is not None and n not in known]
    for name in buffers:
        shapes[name], flat = model.held[name]
        assert flat is not None
        dealt[name] = Dealt((Row([flat]),), 0, flat.numel)
    if buffers and not three:
        shown = ", ".join(map(printable, buffers[:4])) + ", ..." * (len(buffers) > 4)
        notes.append(f"{len(buffers)} tensors that no optimizer has are as the model has them: {shown}")
    for name, of in shared.items():
        if of in dealt and name not in dealt:
            alias = dealt[of]
            dealt[name], shapes[name] = Dealt(alias.rows, alias.first, alias.share, True), shapes[of]
    lost = [n for n, (shape, _) in model.held.items() if n not in dealt]
    if lost and model.shared is None:
        shown = ", ".join(map(printable, lost[:4])) + ", ..." * (len(lost) > 4)
        notes.append(f"this release does not say which parameters are shared; left out, as none has: {shown}")
        lost = []
    hint = f"neither trained by a group of the optimizer nor frozen, so no rank saved it; {WHOLE}"
    message = "expected its numbers in the partitions of the ranks, found them in none"
    fail_all(Problem("missing-tensor", message, model.file, n, hint) for n in lost)
    return notes, [n for n in dict.fromkeys((*model.held, *dealt)) if n in dealt]
