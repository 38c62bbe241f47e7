"""A torch.distributed.checkpoint folder (DCP: torch, FSDP 2, Megatron's `torch_dist`, NeMo 2) as one file of
whole tensors.

`.metadata` says which bytes of which `.distcp` file are which box of which tensor (dcp_metadata.py); each
such item is a whole torch zip of one bare tensor, with strides of its own, which begins at any byte. Files
are found by the names that the metadata gives, never by their own: how many there are differs from writer to
writer.

Source: torch 2.13.0 (distributed/checkpoint/filesystem.py).
"""

from __future__ import annotations

import hashlib
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ckpt_tool.checkpoint.base import DTYPES, Record, TensorFile, TensorInfo
from ckpt_tool.checkpoint.byte_range import ByteRange, Part
from ckpt_tool.checkpoint.crc32 import IntervalCrc
from ckpt_tool.checkpoint.dcp_metadata import (
    EXTRA_STATE,
    METADATA,
    METADATA_BYTES,
    Item,
    Metadata,
    Told,
    read_metadata,
)
from ckpt_tool.checkpoint.folders import Place
from ckpt_tool.checkpoint.pickle_records import Inert
from ckpt_tool.checkpoint.pieces import Bits, Joined, Piece
from ckpt_tool.checkpoint.torch_zip import TorchZipFile, torch_zip, zip_value
from ckpt_tool.checkpoint.zip_reader import ZipArchive
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all

FORMAT = "dcp"
HELD = 64  # items whose headers are kept parsed
COMMON_STATE = re.compile(r"common_state/shard_0_1")
SHOWN = 1 << 20  # bytes of an entry that is no tensor, which is read for what it says
_BARE = "tensor"
# What every `.metadata` names.
_USUAL = ("torch.distributed.checkpoint.", "torch.", "pathlib.")
_RANK = re.compile(r"__(\d+)_\d+\.distcp", re.ASCII)


class DcpFile(TensorFile):
    """The tensors of a folder with a `.metadata`. An item is parsed when it is first read, so that opening
    costs what the metadata costs. Each piece read in full, in any order, has its CRC-32 compared at the end
    without being read again."""

    format = FORMAT

    def __init__(
        self, own: ByteRange, told: Metadata, digest: str, open_data: Callable[[str], ByteRange]
    ) -> None:
        self.path, self.name = own.path, own.name
        self._own, self._told, self.digest = own, told, digest
        self._open = open_data
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, t.dtype, t.shape, own.name) for name, t in told.tensors.items()
        }
        self.metadata: Mapping[str, object] = {}
        self.imports = tuple(n for n in told.imports if not n.startswith(_USUAL))
        self._data: dict[str, ByteRange] = {}
        self._items: OrderedDict[Item, TorchZipFile] = OrderedDict()
        self._owners = {p.place: (t, p) for t in told.tensors.values() for p in t.pieces}
        self._keys = {_key(item): item for item in self._owners}
        self._seen: dict[Item, IntervalCrc] = {}
        self._lock = threading.Lock()
        self._joined: Joined[Item] = Joined(self._read)
        self.notes = tuple(self._counts())

    def _counts(self) -> list[str]:
        """What the folder holds besides tensors that are read."""
        states = sum(EXTRA_STATE.fullmatch(n) is not None for n in self._told.objects)
        others = sorted(
            n for n in self._told.objects if not EXTRA_STATE.fullmatch(n) and not COMMON_STATE.fullmatch(n)
        )
        made = [f"{states} entries of extra state (of fp8 scaling, or empty) were left out"] if states else []
        if others:
            shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
            are = "entry is no tensor and was" if len(others) == 1 else "entries are no tensors and were"
            made.append(f"{len(others)} {are} left out: {shown}")
        for name, dtype in sorted(self._told.odd.items()):
            made.append(f"{name} is of dtype {dtype}, which no weights have: left out")
        return made

    # --- items ---

    def data(self, path: str) -> ByteRange:
        """The file of that name, opened once."""
        with self._lock:
            if path not in self._data:
                self._data[path] = self._open(path)
            return self._data[path]

    def _item(self, item: Item) -> TorchZipFile:
        with self._lock:
            found = self._items.get(item)
            if found is not None:
                self._items.move_to_end(item)
                return found
        opened = self._parsed(item)
        with self._lock:
            self._items[item] = opened
            while len(self._items) > HELD:
                self._items.popitem(last=False)
        return opened

    def _parsed(self, item: Item) -> TorchZipFile:
        """The zip of a piece, which must be what the metadata says of it."""
        told, piece = self._owners[item]
        try:
            opened = torch_zip(ZipArchive(Part(self.data(item.path), item.offset, item.length)), _BARE)
        except CkptToolError as error:
            problems = [replace(p, file=item.path, where=told.name) for p in error.problems]
            raise CkptToolError(*problems) from None
        there = opened.tensors.get(_BARE)
        if there is None or len(opened.tensors) != 1:
            found = f"{len(opened.tensors)} others"
            fail("wrong-format", f"expected one tensor, found {found}", file=item.path, where=told.name)
        if (there.dtype, there.shape) != (told.dtype, piece.size):
            fail(
                "size-mismatch",
                f"expected {told.dtype} {list(piece.size)} as .metadata says, found {there.dtype} "
                f"{list(there.shape)}",
                file=item.path,
                where=told.name,
            )
        return opened

    def _read(self, item: Item, first: int, out: Bits) -> None:
        opened = self._item(item)
        data = out.data.cast("B")
        start = first * out.itemsize
        opened.read_into(_BARE, start, data)
        if opened.record_of(_BARE) is not None:
            with self._lock:
                seen = self._seen.setdefault(item, IntervalCrc())
            seen.add(start, len(data), zlib.crc32(data))

    # --- tensors ---

    def _single(self, name: str) -> TorchZipFile | None:
        """The item that is the whole tensor."""
        pieces = self._told.tensors[name].pieces
        return self._item(pieces[0].place) if len(pieces) == 1 else None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        told: Told = self._told.tensors[name]
        if offset < 0 or offset + len(buffer) > self.tensors[name].nbytes:
            raise ValueError(
                f"{name}: bytes {offset} to {offset + len(buffer)} of {self.tensors[name].nbytes}"
            )
        if not len(buffer):
            return
        if len(told.pieces) == 1:
            self._item(told.pieces[0].place).read_into(_BARE, offset, buffer)
            return
        bits = DTYPES[told.dtype].bits
        self._joined.read_into(name, told.shape, told.pieces, bits, offset, buffer)

    def extent(self, name: str) -> tuple[int, int] | None:
        single = self._single(name)
        return None if single is None or not self.tensors[name].nbytes else single.extent(_BARE)

    def records(self) -> Mapping[str, Record]:
        """Those of all items, by file and place: every item is parsed for it."""
        found = {}
        for key, item in self._keys.items():
            for record in self._item(item).records().values():
                found[key] = replace(record, key=key)
        return found

    def record_of(self, name: str) -> tuple[str, int] | None:
        single = self._single(name)
        place = None if single is None else single.record_of(_BARE)
        return None if place is None else (_key(self._told.tensors[name].pieces[0].place), place[1])

    def check_record(self, key: str) -> bool:
        item = self._keys[key]
        opened = self._item(item)
        (record,) = opened.records().values()
        seen = self._seen.get(item)
        crc = None if seen is None else seen.value(record.size)
        if crc is not None and crc == record.crc32:
            return True
        try:
            (inner,) = opened.records()
            return opened.check_record(inner)
        except CkptToolError as error:
            name = self._owners[item][0].name
            raise CkptToolError(*(replace(p, file=item.path, where=name) for p in error.problems)) from None

    # --- beside the tensors ---

    def common_state(self) -> Mapping[str, object]:
        """What Megatron-Core from 0.17 keeps of the run in an entry that is no tensor: a list of one dict."""
        item = next((i for n, i in self._told.objects.items() if COMMON_STATE.fullmatch(n)), None)
        if item is None:
            return {}
        archive = ZipArchive(Part(self.data(item.path), item.offset, item.length))
        value = zip_value(archive)
        inner = value[0] if type(value) is list and len(value) == 1 else value
        found = inner.fields if type(inner) is Inert else inner
        return {k: v for k, v in found.items() if type(k) is str} if isinstance(found, Mapping) else {}

    def check_unchanged(self) -> None:
        self._own.check_unchanged()
        for data in list(self._data.values()):
            data.check_unchanged()

    def close(self) -> None:
        self._joined.forget()
        for data in self._data.values():
            data.close()
        self._own.close()


def _key(item: Item) -> str:
    return f"{item.path}@{item.offset}"


def open_dcp(place: Callable[[str], Place], name: str = METADATA) -> DcpFile:
    """The folder whose files `place` finds, opened: `.metadata` is read, and the files that it names must be
    there and long enough. Kinds: those of `read_metadata`, `missing-shard`, `truncated`."""
    there = place(name)
    own = ByteRange(there.path, name, there.window)
    try:
        if own.size > METADATA_BYTES:
            fail("pickle-limit", f"expected at most {METADATA_BYTES} bytes, found {own.size}", file=name)
        data = own.read(0, own.size)
        told = read_metadata(data, file=name)
        fail_all(_missing(told, place))

        def opened(path: str) -> ByteRange:
            found = place(path)
            return ByteRange(found.path, path, found.window)

        return DcpFile(own, told, hashlib.sha256(data).hexdigest(), opened)
    except BaseException:
        own.close()
        raise


def _missing(told: Metadata, place: Callable[[str], Place]) -> Iterable[Problem]:
    """Files that are named and not there, or too short."""
    ends: dict[str, int] = {}
    pieces: list[Piece[Item]] = [p for t in told.tensors.values() for p in t.pieces]
    for item in (*(p.place for p in pieces), *told.objects.values()):
        ends[item.path] = max(ends.get(item.path, 0), item.offset + item.length)
    for path, end in sorted(ends.items()):
        try:
            size = place(path).size
        except CkptToolError as error:
            if error.kind != "not-found":
                raise
            rank = _RANK.fullmatch(path)
            whose = "" if rank is None else f", which rank {rank[1]} wrote"
            yield Problem("missing-shard", f"expected {path}{whose}, found no such file", METADATA)
            continue
        if size < end:
            yield Problem("truncated", f"expected at least {end} bytes, found {size}", path)
