"""A torch.distributed.checkpoint folder (DCP: torch, FSDP 2, Megatron's `torch_dist`, NeMo 2) as one file of
whole tensors.

`.metadata` says which bytes of which `.distcp` file are which box of which tensor (dcp_metadata.py); each
such item is a whole torch zip of one bare tensor, with strides of its own, which begins at any byte. Files
are found by the names that the metadata gives, never by their own: how many there are differs from writer to
writer.

With `SerializationFormat.SAFETENSORS` torch writes the tensors of a file as one of safetensors, behind what
is no tensor, and lists each as if it began there; it cannot load that itself. They are slices (hf_slices.py).

Source: torch 2.13.0 (distributed/checkpoint/filesystem.py).
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, LeftOut, Record, TensorFile, TensorInfo
from ckpt_tool.checkpoint.byte_range import ByteRange, Part
from ckpt_tool.checkpoint.crc32 import IntervalCrc
from ckpt_tool.checkpoint.dcp_metadata import (
    EXTRA_STATE,
    METADATA_BYTES,
    Metadata,
    Told,
    read_metadata,
)
from ckpt_tool.checkpoint.dcp_names import FORMAT, METADATA
from ckpt_tool.checkpoint.dcp_places import Item
from ckpt_tool.checkpoint.folders import Place
from ckpt_tool.checkpoint.hf_slices import SlicedFile, open_slices
from ckpt_tool.checkpoint.open_files import Files
from ckpt_tool.checkpoint.pickle_records import Inert
from ckpt_tool.checkpoint.pieces import Bits, Boxes, Joined
from ckpt_tool.checkpoint.safetensors import HEADER_LIMIT
from ckpt_tool.checkpoint.signs import pointer
from ckpt_tool.checkpoint.torch_zip import TorchZipFile, torch_zip, zip_value
from ckpt_tool.checkpoint.zip_reader import ZipArchive
from ckpt_tool.checkpoint.zlibs import crc32
from ckpt_tool.errors import HINTS, CkptToolError, Problem, fail, fail_all
from ckpt_tool.records import dataclass

COMMON_STATE = re.compile(r"common_state/shard_0_1")
RUN = ("args", "checkpoint_version", "iteration")
_BARE = "tensor"
_HEAD = 4096
BLOCK = 4 << 20
# What every `.metadata` names.
_USUAL = ("torch.distributed.checkpoint.", "torch.", "pathlib.")
_ALL = "every process saves its own files: copy those of all machines into the folder of .metadata"
_MIXED = "files of two steps are in one folder: get those of one"
_RANK = re.compile(r"__(\d+)_\d+\.distcp", re.ASCII)


@dataclass(frozen=True, slots=True)
class Laid:
    """How a piece lies in its item: the place of its first byte in the file, None where its elements are not
    one run of plain bytes, and the record that it begins in, at byte `start`."""

    at: int | None
    record: Record | None
    start: int


class DcpFile(TensorFile):
    """The tensors of a folder with a `.metadata`. An item is parsed once, when it is first read, so that
    opening costs what the metadata costs. Each piece read in full, in any order, has its CRC-32 compared at
    the end without being read again."""

    format = FORMAT

    def __init__(self, own: ByteRange, told: Metadata, places: Mapping[str, Place]) -> None:
        self.path, self.name = own.path, own.name
        self._own, self._told = own, told
        self.tensors: Mapping[str, TensorInfo] = told.tensors
        self.metadata: Mapping[str, object] = {}
        self.imports = tuple(n for n in told.imports if not n.startswith(_USUAL))
        self._files = Files(places)
        # By the number of a piece.
        self._places: dict[int, Laid] = {}
        self._seen: dict[int, IntervalCrc] = {}
        self._lock = threading.Lock()
        self._joined: Joined[int] = Joined(self._collected)
        self.notes = tuple(counts(told))

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((self.path, *(p.path for p in self._files.places.values()))))

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Tensors of a dtype that is not read."""
        reason = "of a dtype that no weights have"
        return tuple(LeftOut(tensor, reason) for tensor in self._told.odd.values())

    # --- items ---

    def _item(self, number: int) -> Item:
        return self._told.table.item(number)

    def _owner(self, number: int) -> Told:
        """The tensor that a piece is of."""
        return self._told.owner(number)

    def _laid(self, number: int) -> Laid:
        found = self._places.get(number)
        if found is None:
            item = self._item(number)
            with self._files.use(item.path) as data:
                opened = self._parsed(number, item, data)
                extent, place = opened.extent(_BARE), opened.record_of(_BARE)
                record = None if place is None else opened.records()[place[0]]
                plain = extent is not None and record is not None
                found = Laid(extent[1] if extent and plain else None, record, place[1] if place else 0)
                opened.close()
            self._places[number] = found
        return found

    def _parsed(self, number: int, item: Item, data: ByteRange) -> TorchZipFile:
        """The zip of a piece, which must be what the metadata says of it."""
        told = self._owner(number)
        size = told.pieces[number - told.pieces.first].size
        try:
            opened = torch_zip(ZipArchive(Part(data, item.offset, item.length)), _BARE)
        except CkptToolError as error:
            raise _of(error, item, told) from None
        there = opened.tensors.get(_BARE)
        if there is None or len(opened.tensors) != 1:
            found = f"{len(opened.tensors)} others"
            fail("wrong-format", f"expected one tensor, found {found}", file=item.path, where=told.name)
        if (there.dtype, there.shape) != (told.dtype, size):
            fail(
                "size-mismatch",
                f"expected {told.dtype} {list(size)} as .metadata says, found {there.dtype} "
                f"{list(there.shape)}",
                file=item.path,
                where=told.name,
            )
        return opened

    def _read(self, number: int, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the dense bytes of a piece from `start` on."""
        laid, item = self._laid(number), self._item(number)
        with self._files.use(item.path) as data:
            if laid.at is not None:
                data.read_into(laid.at - data.base + start, buffer, self._owner(number).name)
                return
            opened = self._parsed(number, item, data)
            opened.read_into(_BARE, start, buffer)
            opened.close()

    def _collected(self, number: int, first: int, out: Bits) -> None:
        """Elements of a piece from `first` on, their checksum kept."""
        data, start = out.data.cast("B"), first * out.itemsize
        self._read(number, start, data)
        if self._laid(number).record is not None:
            with self._lock:
                seen = self._seen.setdefault(number, IntervalCrc())
            seen.add(start, len(data), crc32(data))

    # --- tensors ---

    def _single(self, name: str) -> int | None:
        """The piece that is the whole tensor, row by row."""
        pieces = self._told.told(name).pieces
        whole = len(pieces) == 1 and self._laid(pieces.first).at is not None
        return pieces.first if whole else None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        told: Told = self._told.told(name)
        if offset < 0 or offset + len(buffer) > self.tensors[name].nbytes:
            raise ValueError(
                f"{name}: bytes {offset} to {offset + len(buffer)} of {self.tensors[name].nbytes}"
            )
        if not len(buffer):
            return
        if (number := self._single(name)) is not None:
            self._read(number, offset, buffer)
            return
        bits = DTYPES[told.dtype].bits
        self._joined.read_into(name, told.shape, told.pieces, bits, offset, buffer)

    def extent(self, name: str) -> None:
        """None: files are opened while they are read, for a folder may have thousands of them."""

    def records(self, of: Container[str] | None = None) -> Mapping[str, Record]:
        """By the number of the piece, which is parsed for it, once."""
        return {
            str(number): record._replace(key=str(number), of=name)
            for name in self.tensors
            if of is None or name in of
            for number in _numbers(self._told.told(name).pieces)
            if (record := self._laid(number).record) is not None
        }

    def record_of(self, name: str) -> tuple[str, int] | None:
        number = self._single(name)
        return None if number is None else (str(number), self._laid(number).start)

    def check_record(self, key: str) -> bool:
        number = int(key)
        record = self._laid(number).record
        if record is None:
            raise KeyError(key)
        seen = self._seen.get(number)
        crc = None if seen is None else seen.value(record.size)
        if crc is not None and crc == record.crc32:
            return True
        item = self._item(number)
        with self._files.use(item.path) as data:
            opened = self._parsed(number, item, data)
            try:
                return opened.check_record(record.key)
            except CkptToolError as error:
                raise _of(error, item, self._owner(number)) from None
            finally:
                opened.close()

    def told(self) -> Iterator[object]:
        """What `.metadata` says, which names each piece and its bytes; no piece is opened for it."""
        digest = hashlib.sha256()
        for at in range(0, self._own.size, BLOCK):
            digest.update(self._own.read(at, min(BLOCK, self._own.size - at)))
        yield digest.hexdigest()

    # --- beside the tensors ---

    def common_state(self) -> Mapping[str, object]:
        """What Megatron-Core from 0.17 keeps of the run in an entry that is no tensor, a list of one dict; in
        its formats without shards (torch_dcp, fsdp_dtensor) each value is an entry."""
        item = next((i for n, i in self._told.objects.items() if COMMON_STATE.fullmatch(n)), None)
        if item is None:
            return {n: self._value(self._told.objects[n]) for n in RUN if n in self._told.objects}
        value = self._value(item)
        inner = value[0] if type(value) is list and len(value) == 1 else value
        found = inner.fields if type(inner) is Inert else inner
        return {k: v for k, v in found.items() if type(k) is str} if isinstance(found, Mapping) else {}

    def boxes(self, name: str) -> Boxes:
        """The pieces of a tensor, which make it up."""
        return self._told.told(name).pieces

    def entry(self, name: str) -> object:
        """An entry that is no tensor, as data; None where there is none of that name. Kinds: those of reading
        a torch file."""
        item = self._told.objects.get(name)
        return None if item is None else self._value(item)

    def _value(self, item: Item) -> object:
        with self._files.use(item.path) as data:
            return zip_value(ZipArchive(Part(data, item.offset, item.length)))

    def check_unchanged(self) -> None:
        self._own.check_unchanged()
        self._files.check_unchanged()

    def close(self) -> None:
        self._joined.forget()
        self._files.close()
        self._own.close()


def _numbers(pieces: Boxes) -> range:
    return range(pieces.first, pieces.first + len(pieces))


def _of(error: CkptToolError, item: Item, told: Told) -> CkptToolError:
    """`error` as one of a piece."""
    return CkptToolError(*(replace(p, file=item.path, where=told.name) for p in error.problems))


def counts(told: Metadata) -> list[str]:
    """What the folder holds besides tensors that are read."""
    states = sum(EXTRA_STATE.fullmatch(n) is not None for n in told.objects)
    others = sorted(
        n
        for n in told.objects
        if not EXTRA_STATE.fullmatch(n) and not COMMON_STATE.fullmatch(n) and n not in RUN
    )
    made = [f"{states} entries of extra state (of fp8 scaling, or empty) were left out"] if states else []
    if others:
        shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
        are = "entry is no tensor and was" if len(others) == 1 else "entries are no tensors and were"
        made.append(f"{len(others)} {are} left out: {shown}")
    if unfit := len(told.unfit):
        made.append(f"{unfit} tensors of the optimizer were left out: not every element of them is there")
    for name, tensor in sorted(told.odd.items()):
        made.append(f"{name} is of dtype {tensor.dtype}, which no weights have: left out")
    return made


def open_dcp(place: Callable[[str], Place], name: str = METADATA) -> DcpFile | SlicedFile:
    """The folder whose files `place` finds, opened: `.metadata` is read, and the files that it names must be
    there and long enough. Kinds: those of `read_metadata`, `missing-shard`, `shard-conflict`, `truncated`,
    and those of `open_slices` where the files hold safetensors."""
    there = place(name)
    own = ByteRange(there.path, name, there.window)
    try:
        if own.size > METADATA_BYTES:
            fail("pickle-limit", f"expected at most {METADATA_BYTES} bytes, found {own.size}", file=name)
        if (sign := pointer(own.head(_HEAD))) is not None:
            fail("wrong-format", f"expected a list of tensors, found {sign.what}", file=name, hint=sign.hint)
        if not own.size:
            fail("truncated", "expected a list of tensors, found an empty file", file=name)
        told = read_metadata(own, file=name)
        places: dict[str, Place] = {}
        problems = list(_missing(told, place, places))
        if not problems and (parts := _in_safetensors(told, places)):
            file = open_slices(parts.__getitem__, list(parts), HEADER_LIMIT, _joined(told))
            file.notes = (*file.notes, *counts(told))
            own.close()
            return file
        fail_all([*told.shared, *problems])
        return DcpFile(own, told, places)
    except BaseException:
        own.close()
        raise


def _in_safetensors(told: Metadata, places: Mapping[str, Place]) -> dict[str, Place]:
    """The files of tensors, each from where it is one of safetensors to its end: all of its pieces are said
    to begin there. Empty where the first one is no such file."""
    table, found = told.table, dict[str, Place]()
    for k in np.unique(table.path).tolist():
        path, begins = table.paths[k], np.unique(table.offset[table.path == k]).tolist()
        there = places[path]
        base, at = (there.window or (0, 0))[0], begins[0]
        if not found:
            with closing(ByteRange(there.path, path, there.window)) as data:
                head = data.read(at, min(9, data.size - at))
            if head[8:] != b"{" or int.from_bytes(head[:8], "little") > there.size - at:
                return {}
        if len(begins) > 1:
            return {}
        found[path] = Place(there.path, there.size - at, (base + at, there.size - at))
    return found


def _joined(told: Metadata) -> Callable[[Mapping[str, TensorInfo]], Iterator[Problem]]:
    """What slices lack of being all that `.metadata` lists."""

    def lacking(found: Mapping[str, TensorInfo]) -> Iterator[Problem]:
        for name in found.keys() - told.tensors.keys():
            message = "expected tensors that .metadata lists, found another"
            yield Problem("shard-conflict", message, found[name].file, name, _MIXED)
        for name, tensor in told.tensors.items():
            shape = None if name not in found else found[name].shape
            if shape != tensor.shape:
                here = "none" if shape is None else f"{list(shape)}"
                message = f"expected slices of {list(tensor.shape)} as .metadata says, found {here}"
                yield Problem("missing-shard", message, METADATA, name, _ALL)

    return lacking


def _missing(told: Metadata, place: Callable[[str], Place], found: dict[str, Place]) -> Iterable[Problem]:
    """Files that are named and not there, or too short; the others are `found`."""
    for path, end in sorted(told.ends.items()):
        try:
            there = found[path] = place(path)
        except CkptToolError as error:
            if error.kind != "not-found":
                raise
            rank = _RANK.fullmatch(path)
            whose = "" if rank is None else f", which rank {rank[1]} wrote"
            yield Problem("missing-shard", f"expected {path}{whose}, found no such file", METADATA, hint=_ALL)
            continue
        if there.size < end:
            with closing(ByteRange(there.path, path, there.window)) as data:
                sign = pointer(data.head(64))
            if sign is not None:
                message = f"expected data of tensors, found {sign.what}"
                yield Problem("wrong-format", message, path, hint=sign.hint)
                continue
            message = f"expected at least {end} bytes, found {there.size}"
            yield Problem("truncated", message, path, hint=HINTS["truncated"])
