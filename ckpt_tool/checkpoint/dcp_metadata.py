"""`.metadata` of a torch.distributed.checkpoint folder: a pickle that says which tensors there are, of which
pieces, and which bytes of which file each piece is.

It is read as data, by the names of fields: releases of torch and Megatron call the classes differently
(Metadata, MCoreMetadata) and write fields that nobody needs here (plans, paths of the machine that saved it).
Pieces are matched with their bytes by (name, first element); the third number of an index is a hint, which
Megatron leaves out.

Source: torch 2.13.0 (distributed/checkpoint/metadata.py, filesystem.py), megatron-core 0.12.3 to 0.19.2
(dist_checkpointing/strategies/torch.py).
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from dataclasses import field
from functools import cached_property
from itertools import groupby, repeat
from math import prod
from operator import itemgetter
from typing import NoReturn, cast

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, OtherTensor, TensorInfo, tensor_infos
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.dcp_listing import BOX, Chunks, Listing
from ckpt_tool.checkpoint.dcp_places import MOST, Ints, Item, Listed, Table
from ckpt_tool.checkpoint.pickle_bytes import WINDOW
from ckpt_tool.checkpoint.pickle_records import Global, Inert, Limits, describe
from ckpt_tool.checkpoint.pickle_rows import fields_of
from ckpt_tool.checkpoint.pieces import Boxes, Numbers, tiling_fault
from ckpt_tool.checkpoint.tensor_names import faultless, name_fault
from ckpt_tool.checkpoint.torch_state import unsafe_problems
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all
from ckpt_tool.records import dataclass

METADATA_BYTES = 1 << 30
HELD = 32 << 20  # bytes that are read once; of more, a part at a time, twice
# A model of half a million tensors has a few hundred opcodes for each.
LIMITS = Limits(opcodes=400_000_000, memo=100_000_000, tensors=0, memory=2 << 30)
_DTYPES = {d.torch: d.name for d in DTYPES.values()}
# Written by Megatron for each module, and what an optimizer knows of each parameter.
EXTRA_STATE = re.compile(r"(.*[._])?_extra_state(/shard_[\d._]+)?", re.ASCII)
# Megatron flattens its tensors into buckets with gaps between them.
OPTIMIZER = re.compile(r"(.*\.)?optim\w*\.", re.ASCII)
ALIKE = 256  # entries that are remembered, as others may be the same
# A tensor's dtype as torch calls it, its shape and pieces; and the box of the one that is all of it.
Entry = tuple[str, Numbers, Chunks, tuple[Ints, Ints] | None]


@dataclass(frozen=True, slots=True)
class Told:
    """A tensor as `.metadata` tells it; `dtype` is a name of DTYPES."""

    name: str
    dtype: str
    shape: Numbers
    pieces: Boxes


@dataclass
class Metadata:
    """`table` says where the pieces of `tensors` are, by their numbers; in the order of the tensors, `kinds`
    has the boxes of the pieces of each and `firsts` the number of the first. `objects` are the entries that
    are no tensors, each with its bytes; `odd` tensors of a dtype that is not read, by name, `unfit` those of
    the optimizer that are not whole. `ends` are the files that any of them are in, and how long each is at
    least."""

    table: Table
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    kinds: list[tuple[Ints, Ints]] = field(default_factory=list)
    firsts: array[int] = field(default_factory=lambda: array("q"))
    objects: dict[str, Item] = field(default_factory=dict)
    odd: dict[str, OtherTensor] = field(default_factory=dict)
    unfit: list[str] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    version: str | None = None
    shared: list[Problem] = field(default_factory=list)  # pieces that have bytes together

    def add(self, tensor: TensorInfo, boxes: tuple[Ints, Ints], first: int) -> None:
        self.tensors[tensor.name] = tensor
        self.kinds.append(boxes)
        self.firsts.append(first)

    @cached_property
    def _order(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.tensors)}

    @cached_property
    def _names(self) -> list[str]:
        return list(self.tensors)

    def told(self, name: str) -> Told:
        k, tensor = self._order[name], self.tensors[name]
        return Told(name, tensor.dtype, tensor.shape, Boxes(*self.kinds[k], self.firsts[k]))

    def owner(self, number: int) -> Told:
        """The tensor that a piece is of."""
        return self.told(self._names[bisect_right(self.firsts, number) - 1])


def read_metadata(source: ByteRange, *, file: str) -> Metadata:
    """What a `.metadata` says, checked: every tensor is made up of its pieces, each element once, and every
    piece has its bytes, in a file of the folder; those that share them are `shared`. Fails with every problem
    found: kinds of `read_pickle`, `wrong-format`, `unsafe-pickle`, `bad-name`, `size-mismatch`,
    `shard-conflict`, `missing-shard`, `missing-record`, `unsupported`."""
    size = source.size
    held = source.read(0, size) if size <= HELD else b""

    def feed(offset: int) -> bytes:
        count = min(WINDOW, size - offset)
        return held[offset : offset + count] if held else source.read(offset, count)

    listed = Listed(file)
    machine = Listing(feed(0), file=file, limits=LIMITS, end=size, feed=feed, pairs=listed.take)
    try:
        pickled = machine.run()
    except CkptToolError as error:
        raise CkptToolError(*unsafe_problems(machine, file), *error.problems) from None
    fail_all(unsafe_problems(pickled, file))
    if pickled.end != size:
        extra = size - pickled.end
        fail(
            "trailing-data",
            f"expected the end of the pickle at byte {pickled.end}, found {extra} more",
            file=file,
        )
    imports = tuple(map(str, pickled.imports))
    root = pickled.value
    del machine, pickled
    return _Reader(file, listed).read(root, imports)


class _Reader:
    def __init__(self, file: str, listed: Listed) -> None:
        self.file = file
        self.listed = listed
        self.fault = listed.fault
        self.problems: list[Problem] = []
        self.numbers = array("q")  # of the places, in the order of the tensors' pieces
        self.pieces = 0
        self.entries: dict[int, tuple[object, Entry]] = {}  # by identity, each held

    def read(self, root: object, imports: tuple[str, ...]) -> Metadata:
        state, storage, version = fields_of(root, ("state_dict_metadata", "storage_data", "version"))
        if type(state) is not dict or type(storage) is not dict:
            self.fault(
                f"expected state_dict_metadata and storage_data of a torch.distributed checkpoint, found "
                f"{describe(root)}",
                kind="wrong-format",
            )
        if storage or len(self.listed.dicts.keys() | {id(storage)}) > 1:
            what = "others beside them" if storage else "another dict of them"
            self.fault(f"expected the places of pieces in storage_data alone, found {what}")
        found = Metadata(self.listed.table(), imports=imports)
        found.version = version if type(version) is str else None
        found.shared = list(self.listed.conflicts())
        self.places = self.listed.by_name()
        for _, alike in groupby(zip(state, map(id, state.values()), strict=True), key=itemgetter(1)):
            self.column([name for name, _ in alike], state, found)
        state.clear()
        fail_all([*found.shared, *self.problems] if self.problems else [])
        found.table = found.table.taken(np.array(self.numbers, np.int64))
        found.ends = found.table.ends()
        for item in found.objects.values():
            found.ends[item.path] = max(found.ends.get(item.path, 0), item.offset + item.length)
        return found

    def column(self, names: list[object], state: dict[object, object], found: Metadata) -> None:
        """Names that stand beside each other and have one entry."""
        entry = state[names[0]]
        if len(names) > 1 and self.wholes(names, entry, found):
            return
        for name in names:
            fault = name_fault(name) if type(name) is str else "expected a name, found none"
            if fault is not None:
                self.problems.append(Problem("bad-name", fault, self.file))
            elif type(name) is not str or (
                id(entry) not in self.entries and fields_of(entry, ("chunks",))[0] is None
            ):
                self.other(str(name), entry, found)
            else:
                self.tensor(name, entry, found)

    def wholes(self, named: list[object], entry: object, found: Metadata) -> bool:
        """The same of tensors that are in one piece each; False, and nothing done, where one is not."""
        if {*map(type, named)} != {str} or fields_of(entry, ("chunks",))[0] is None:
            return False
        names = cast(list[str], named)
        if not faultless(names):
            return False
        dtype, shape, _, whole = self.entry(names[0], entry)
        rows = self.places.alone(names, len(shape))
        if whole is None or rows is None or dtype not in _DTYPES:
            return False
        made = tensor_infos(names, repeat(_DTYPES[dtype]), repeat(shape), repeat(self.file))
        found.tensors.update(zip(names, made, strict=True))
        found.kinds.extend(repeat(whole, len(names)))
        found.firsts.extend(range(self.pieces, self.pieces + len(names)))
        self.numbers.frombytes(rows.tobytes())
        self.pieces += len(names)
        return True

    def other(self, name: str, told: object, found: Metadata) -> None:
        """An entry that is no tensor."""
        rows = self.places.rows(name)
        if type(told) is not Inert or not len(rows):
            self.problems.append(Problem("missing-record", "expected its bytes, found none", self.file, name))
            return
        bare = rows[self.places.axes[rows] < 0]
        found.objects[name] = found.table.item(int((bare if len(bare) else rows)[0]))

    def tensor(self, name: str, entry: object, found: Metadata) -> None:
        dtype, shape, chunks, whole = self.entry(name, entry)
        rows = None if whole is None else self.places.alone((name,), len(shape))
        if whole is not None and rows is not None and dtype in _DTYPES:
            found.add(TensorInfo(name, _DTYPES[dtype], shape, self.file), whole, self.pieces)
            self.numbers.append(int(rows[0]))
            self.pieces += 1
            return
        starts, sizes, numbers = self.matched(name, chunks)
        if dtype not in _DTYPES:
            stored = int(found.table.length[self.places.rows(name)].sum())
            found.odd[name] = OtherTensor(name, dtype, shape, self.file, stored)
            return
        if numbers is None:
            return  # said by `matched`
        fault = tiling_fault(shape, Boxes(starts, sizes, self.pieces))
        if fault is not None and OPTIMIZER.match(name):
            found.unfit.append(name)
        elif fault is not None:
            self.problems.append(Problem(fault[0], fault[1], self.file, name))
        else:
            found.add(TensorInfo(name, _DTYPES[dtype], shape, self.file), (starts, sizes), self.pieces)
            self.numbers.extend(numbers.tolist())
            self.pieces += len(numbers)

    def entry(self, name: str, entry: object) -> Entry:
        """What it says, which tensors that are alike share."""
        known = self.entries.get(id(entry))
        if known is not None:
            return known[1]
        size, chunks, properties = fields_of(entry, ("size", "chunks", "properties"))
        shape = self.listed.numbers(size, "a shape", name)
        if min((0, *shape)) < 0 or prod(max(n, 1) for n in shape) > 1 << 62:
            self.fault(f"expected a shape of at most 2^62 elements, found {shape}", name, "size-mismatch")
        if type(chunks) is not Chunks:
            self.malformed(chunks, name, shape)
        whole = None
        if chunks.count == 1 and chunks.numbers.tolist() == [*(0 for _ in shape), *shape]:
            sizes = np.array([shape], np.int64)
            whole = np.zeros_like(sizes), sizes
        made = self.dtype(properties, name), shape, chunks, whole
        if len(self.entries) >= ALIKE:
            self.entries.clear()
        self.entries[id(entry)] = entry, made
        return made

    def malformed(self, chunks: object, name: str, shape: Numbers) -> NoReturn:
        """Of chunks that could not be packed."""
        if type(chunks) is not list:
            self.fault(f"expected a list of pieces, found {describe(chunks)}", name)
        for chunk in chunks:
            start, size = fields_of(chunk, BOX)
            start = self.listed.numbers(start, "the first element of a piece", name)
            size = self.listed.numbers(size, "the size of a piece", name)
            if not len(start) == len(size) == len(shape):
                found = f"one of {list(size)} at {list(start)}"
                self.fault(f"expected pieces inside {list(shape)}, found {found}", name, "size-mismatch")
        self.fault(f"expected pieces, found {len(chunks)} others", name)

    def matched(self, name: str, chunks: Chunks) -> tuple[Ints, Ints, Ints | None]:
        """The first elements, sizes and places of a tensor's pieces, in the order of their first elements;
        None where some have no place, or two."""
        axes = chunks.axes
        boxes = np.array(chunks.numbers, np.int64).reshape(chunks.count, 2, axes)
        starts, sizes = boxes[:, 0], boxes[:, 1]
        rows = self.places.rows(name)
        own = rows[self.places.axes[rows] == axes]
        there = self.places.starts(own, axes)
        here, other = _order(starts), _order(there)
        starts, sizes, there, own = starts[here], sizes[here], there[other], own[other]
        again = (there[1:] == there[:-1]).all(axis=1) if len(there) else np.zeros(0, bool)
        if again.any():
            first = tuple(there[int(np.argmax(again))].tolist())
            message = f"expected one place for each piece, found two for the one at {first}"
            self.problems.append(Problem("shard-conflict", message, self.file, name))
            return starts, sizes, None
        if len(own) == chunks.count and bool((there == starts).all()):
            return starts, sizes, own
        known = {tuple(s): k for k, s in enumerate(there.tolist())}
        gone = [s for s in starts.tolist() if tuple(s) not in known]
        for start in gone[:MOST]:
            message = f"expected the bytes of the piece at {start}, found no place for them"
            self.problems.append(Problem("missing-record", message, self.file, name))
        at = [known.get(tuple(s), 0) for s in starts.tolist()]
        return starts, sizes, None if gone else own[np.array(at, np.int64)]

    def dtype(self, properties: object, name: str) -> str:
        """The torch name; the properties are a tuple that begins with it, or in old releases fields."""
        state = properties.state if type(properties) is Inert else None
        named = state[0] if type(state) is tuple and state else None
        if type(named) is not Global and type(properties) is Inert:
            named = properties.fields.get("dtype")
        if type(named) is not Global or named.module != "torch":
            self.fault(f"expected a torch dtype, found {describe(named)}", name)
        return named.name


def _order(starts: Ints) -> Ints:
    """That in which the first elements come one after the other."""
    if not starts.shape[1]:
        return np.arange(len(starts))
    return np.lexsort(tuple(starts[:, k] for k in reversed(range(starts.shape[1]))))
