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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NoReturn

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.pickle_records import Global, Inert, Limits, describe
from ckpt_tool.checkpoint.pieces import Numbers, Piece, tiling_fault
from ckpt_tool.checkpoint.tensor_names import name_fault
from ckpt_tool.checkpoint.torch_state import unsafe_problems
from ckpt_tool.checkpoint.unpickle import Machine
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all, printable

METADATA = ".metadata"
DATA = ".distcp"
METADATA_BYTES = 1 << 30
DIMENSIONS = 16
# A model of half a million tensors has a few hundred opcodes for each; memory is that of the file many times
# over.
LIMITS = Limits(opcodes=400_000_000, memo=100_000_000, tensors=0, memory=4 << 30)
_FILE = re.compile(r"[\w.-]{1,255}", re.ASCII)
_DTYPES = {d.torch: d.name for d in DTYPES.values()}
# Written by Megatron for each module, and what an optimizer knows of each parameter.
EXTRA_STATE = re.compile(r"(.*[._])?_extra_state(/shard_[\d._]+)?", re.ASCII)
# Megatron flattens its tensors into buckets with gaps between them.
OPTIMIZER = re.compile(r"(.*\.)?optim\w*\.", re.ASCII)


@dataclass(frozen=True, slots=True)
class Item:
    """The bytes of one piece: `length` from `offset` on of the file `path` of the folder."""

    path: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Told:
    """A tensor as `.metadata` tells it; `dtype` is a name of DTYPES."""

    name: str
    dtype: str
    shape: Numbers
    pieces: tuple[Piece[Item], ...]


@dataclass
class Metadata:
    """`objects` are the entries that are no tensors, each with its bytes; `odd` tensors of a dtype that is
    not read, by name, `unfit` those of the optimizer that are not whole."""

    tensors: dict[str, Told] = field(default_factory=dict)
    objects: dict[str, Item] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)
    unfit: list[str] = field(default_factory=list)
    imports: tuple[str, ...] = ()
    version: str | None = None


def read_metadata(data: bytes, *, file: str) -> Metadata:
    """What the bytes of a `.metadata` say, checked: every tensor is made up of its pieces, each element once,
    and every piece has its bytes, in a file of the folder. Fails with every problem found: kinds of
    `read_pickle`, `wrong-format`, `unsafe-pickle`, `bad-name`, `size-mismatch`, `shard-conflict`,
    `missing-shard`, `missing-record`, `unsupported`."""
    machine = Machine(data, file=file, limits=LIMITS)
    try:
        pickled = machine.run()
    except CkptToolError as error:
        raise CkptToolError(*unsafe_problems(machine, file), *error.problems) from None
    fail_all(unsafe_problems(pickled, file))
    if pickled.end != len(data):
        extra = len(data) - pickled.end
        fail(
            "trailing-data",
            f"expected the end of the pickle at byte {pickled.end}, found {extra} more",
            file=file,
        )
    return _Reader(file).read(pickled.value, tuple(map(str, pickled.imports)))


class _Reader:
    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []

    def fault(self, message: str, where: str | None = None, kind: str = "bad-pickle") -> NoReturn:
        fail(kind, message, file=self.file, where=where)

    def fields(self, value: object, what: str, where: str | None = None) -> Mapping[str, object]:
        if type(value) is not Inert or not value.fields:
            self.fault(f"expected {what}, found {describe(value)}", where)
        return value.fields

    def read(self, root: object, imports: tuple[str, ...]) -> Metadata:
        told = root.fields if type(root) is Inert else {}
        state, storage = told.get("state_dict_metadata"), told.get("storage_data")
        if type(state) is not dict or type(storage) is not dict:
            self.fault(
                f"expected state_dict_metadata and storage_data of a torch.distributed checkpoint, found "
                f"{describe(root)}",
                kind="wrong-format",
            )
        items = self.items(storage)
        version = told.get("version")
        found = Metadata(imports=imports, version=version if type(version) is str else None)
        for name, entry in state.items():
            fault = name_fault(name) if type(name) is str else "expected a name, found none"
            if fault is not None:
                self.problems.append(Problem("bad-name", fault, self.file))
                continue
            own = items.pop(name, {})
            chunks = entry.fields.get("chunks") if type(entry) is Inert else None
            if chunks is None:
                self.other(name, entry, own, found)
            else:
                self.tensor(name, self.fields(entry, "a tensor's entry", name), own, found)
        fail_all(self.problems)
        return found

    def items(self, storage: Mapping[object, object]) -> dict[str, dict[Numbers | None, Item]]:
        """By name and first element, None for entries that are no tensors."""
        found: dict[str, dict[Numbers | None, Item]] = {}
        owners: dict[tuple[str, int], str] = {}
        for key, value in storage.items():
            index = self.fields(key, "the index of a piece")
            name, start = index.get("fqn"), index.get("offset")
            if type(name) is not str:
                self.fault(f"expected the name of a piece, found {describe(name)}")
            first = None if start is None else self.numbers(start, "the first element of a piece", name)
            item = self.item(self.fields(value, "the place of a piece", name), name)
            if found.setdefault(name, {}).setdefault(first, item) is not item:
                message = f"expected one place for each piece, found two for the one at {first}"
                self.problems.append(Problem("shard-conflict", message, self.file, name))
            elif (item.path, item.offset) in owners:
                other = printable(owners[item.path, item.offset])
                message = f"expected bytes of its own for each piece, found those of {other}"
                self.problems.append(Problem("shard-conflict", message, self.file, name))
            owners[item.path, item.offset] = name
        return found

    def item(self, told: Mapping[str, object], name: str) -> Item:
        path, offset, length = (told.get(k) for k in ("relative_path", "offset", "length"))
        if type(path) is not str or type(offset) is not int or type(length) is not int:
            self.fault("expected a file, an offset and a length, found other values", name)
        if not _FILE.fullmatch(path) or path in (".", ".."):
            self.fault(
                f"expected the name of a file of the folder, found {printable(path)!r}", name, "bad-input"
            )
        if told.get("transform_descriptors"):
            what = f"{printable(str(told['transform_descriptors']), 60)}"
            self.fault(
                f"expected plain bytes, found ones that the writer transformed ({what})", name, "unsupported"
            )
        if offset < 0 or length < 0 or offset + length >= 1 << 63:
            self.fault(f"expected a place in a file, found {length} bytes at {offset}", name, "size-mismatch")
        return Item(path, offset, length)

    def numbers(self, value: object, what: str, name: str) -> Numbers:
        if type(value) is not tuple or len(value) > DIMENSIONS or any(type(n) is not int for n in value):
            self.fault(
                f"expected {what} in at most {DIMENSIONS} whole numbers, found {describe(value)}", name
            )
        return value

    def other(self, name: str, told: object, own: Mapping[Numbers | None, Item], found: Metadata) -> None:
        """An entry that is no tensor."""
        item = own.get(None) or next(iter(own.values()), None)
        if type(told) is not Inert or item is None:
            self.problems.append(Problem("missing-record", "expected its bytes, found none", self.file, name))
            return
        found.objects[name] = item

    def tensor(
        self, name: str, told: Mapping[str, object], own: Mapping[Numbers | None, Item], found: Metadata
    ) -> None:
        shape = self.numbers(told.get("size"), "a shape", name)
        chunks = told.get("chunks")
        if not isinstance(chunks, list):
            self.fault(f"expected a list of pieces, found {describe(chunks)}", name)
        if min((0, *shape)) < 0 or prod(max(n, 1) for n in shape) > 1 << 62:
            self.fault(f"expected a shape of at most 2^62 elements, found {shape}", name, "size-mismatch")
        pieces = list(self.pieces(name, chunks, own))
        dtype = self.dtype(told.get("properties"), name)
        if dtype not in _DTYPES:
            found.odd[name] = dtype
            return
        if len(pieces) < len(chunks):
            return  # said by `pieces`
        if (fault := tiling_fault(shape, pieces)) is not None and OPTIMIZER.match(name):
            found.unfit.append(name)
            return
        if fault is not None:
            self.problems.append(Problem(fault[0], fault[1], self.file, name))
            return
        pieces.sort(key=lambda p: p.start)
        found.tensors[name] = Told(name, _DTYPES[dtype], shape, tuple(pieces))

    def pieces(
        self, name: str, chunks: list[object], own: Mapping[Numbers | None, Item]
    ) -> Iterator[Piece[Item]]:
        for chunk in chunks:
            box = self.fields(chunk, "the box of a piece", name)
            start = self.numbers(box.get("offsets"), "the first element of a piece", name)
            size = self.numbers(box.get("sizes"), "the size of a piece", name)
            item = own.get(start)
            if item is None:
                message = f"expected the bytes of the piece at {list(start)}, found no place for them"
                self.problems.append(Problem("missing-record", message, self.file, name))
                continue
            yield Piece(start, size, item)

    def dtype(self, properties: object, name: str) -> str:
        """The torch name; the properties are a tuple that begins with it, or in old releases fields."""
        state = properties.state if type(properties) is Inert else None
        named = state[0] if type(state) is tuple and state else None
        if type(named) is not Global and type(properties) is Inert:
            named = properties.fields.get("dtype")
        if type(named) is not Global or named.module != "torch":
            self.fault(f"expected a torch dtype, found {describe(named)}", name)
        return named.name
