"""Folders of torch.distributed.checkpoint to be written: data files laid out before their tensors are known,
and the `.metadata` that says what is in them, which no checksum of a tensor is part of.

`.metadata` has the fields that torch 2.13 writes, but for what is different in every save (its id, the path
that it was given) and the plans of the ranks, which no reader needs: equal folders have equal bytes.

Source: torch 2.13.0 (distributed/checkpoint/metadata.py, filesystem.py); opcodes: Python's
Lib/pickletools.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.dcp_places import Item
from ckpt_tool.checkpoint.pieces import Numbers, Piece
from ckpt_tool.checkpoint.tensor_names import name_problems
from ckpt_tool.checkpoint.torch_zip_writer import TorchZipLayout, bare_tensor
from ckpt_tool.errors import fail_all

Header = tuple[str, str, Numbers]  # name, dtype of DTYPES, shape
VERSION = "1.0.0"
_TENSOR = "tensor"


class DistLayout:
    """Where everything goes in one data file of `tensors`: for each in order a whole torch zip of it alone,
    without padding between them. `offsets` are those of the tensors' first bytes, `items` (offset, length) of
    their zips, `size` is the whole file's. A tensor has the shape of its piece. Fails with `bad-name`."""

    def __init__(self, tensors: Sequence[Header]) -> None:
        fail_all(name_problems((name for name, _, _ in tensors), file="data"))
        self._tensors = tensors
        self.offsets: dict[str, int] = {}
        self.items: dict[str, tuple[int, int]] = {}
        self.size = 0
        for name, dtype, shape in tensors:
            if name in self.items:
                raise ValueError(f"a tensor name is given twice: {name}")
            zipped = _zip(dtype, shape)
            self.items[name] = self.size, zipped.size
            self.offsets[name] = self.size + zipped.offsets[_TENSOR]
            self.size += zipped.size

    def header_writes(self) -> Iterator[tuple[int, bytes]]:
        """What can be written before the tensors: nothing, every header here holds a checksum."""
        return iter(())

    def finish(self, crcs: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """See `TorchZipLayout.finish`."""
        for name, dtype, shape in self._tensors:
            crc = {_TENSOR: crcs[name]} if name in crcs else {}  # of an empty one nothing is known
            for offset, data in _zip(dtype, shape).finish(crc):
                yield self.items[name][0] + offset, data


@lru_cache(maxsize=1024)
def _zip(dtype: str, shape: Numbers) -> TorchZipLayout:
    return TorchZipLayout([(_TENSOR, dtype, shape)], document=bare_tensor(dtype, shape))


@dataclass(frozen=True)
class Stored:
    """A tensor of the folder: its dtype (of DTYPES), its shape, and its pieces, each in an item."""

    dtype: str
    shape: Numbers
    pieces: Sequence[Piece[Item]]


def metadata_of(tensors: Mapping[str, Stored], objects: Mapping[str, Item]) -> bytes:
    """The content of `.metadata`; `objects` are entries that are no tensors."""
    p = _Metadata()
    held: list[tuple[Write, Write]] = [
        (partial(p.text, name), partial(p.tensor, told)) for name, told in tensors.items()
    ]
    held += [(partial(p.text, name), partial(p.new, "BytesStorageMetadata")) for name in objects]
    lies: list[tuple[Write, Write]] = [
        (partial(p.index, name, x.start), partial(p.item, x.place))
        for name, told in tensors.items()
        for x in told.pieces
    ]
    lies += [(partial(p.index, name, None), partial(p.item, item)) for name, item in objects.items()]
    p.object(
        "Metadata",
        state_dict_metadata=partial(p.dict_of, held),
        planner_data=partial(p.constant, None),
        storage_data=partial(p.dict_of, lies),
        storage_meta=partial(p.constant, None),
        version=partial(p.text, VERSION),
    )
    return p.done()


Write = Callable[[], None]
_MODULE = "torch.distributed.checkpoint."
_MODULES = {"_StorageInfo": _MODULE + "filesystem"}


class _Pickle:
    """A pickle of protocol 4, written value by value. Texts and classes that come again are remembered."""

    def __init__(self) -> None:
        self._parts: list[bytes] = [b"\x80\x04"]
        self._memo: dict[object, int] = {}

    def done(self) -> bytes:
        return b"".join((*self._parts, b"."))

    def _once(self, what: object, write: Write) -> None:
        number = self._memo.get(what)
        if number is None:
            write()
            self._parts.append(b"\x94")  # MEMOIZE, under the number of entries so far
            self._memo[what] = len(self._memo)
        else:
            wide = number > 255
            self._parts.append((b"j" if wide else b"h") + number.to_bytes(4 if wide else 1, "little"))

    def text(self, text: str) -> None:
        raw = text.encode()
        head = b"\x8c" + bytes([len(raw)]) if len(raw) < 256 else b"X" + len(raw).to_bytes(4, "little")
        self._once(text, lambda: self._parts.append(head + raw))

    def name(self, module: str, name: str) -> None:
        def write() -> None:
            self.text(module)
            self.text(name)
            self._parts.append(b"\x93")

        self._once((module, name), write)

    def constant(self, value: bool | None) -> None:
        self._parts.append({None: b"N", True: b"\x88", False: b"\x89"}[value])

    def integer(self, n: int) -> None:
        assert n >= 0
        if n < 1 << 31:
            wide = 1 if n < 1 << 8 else 2 if n < 1 << 16 else 4
            self._parts.append({1: b"K", 2: b"M", 4: b"J"}[wide] + n.to_bytes(wide, "little"))
        else:
            wide = n.bit_length() // 8 + 1
            self._parts.append(b"\x8a" + bytes([wide]) + n.to_bytes(wide, "little"))

    def size(self, numbers: Numbers) -> None:
        """A torch.Size, which is made of one tuple."""

        def write() -> None:
            self.name("torch", "Size")
            self.tuple_of(*(partial(self.integer, n) for n in numbers))
            self._parts.append(b"\x85R")

        self._once(numbers, write)

    def called(self, module: str, name: str, argument: Write) -> None:
        def write() -> None:
            self.name(module, name)
            argument()
            self._parts.append(b"\x85R")

        self._once((module, name, "called"), write)

    def tuple_of(self, *values: Write) -> None:
        self._parts.append(b"(")
        for write in values:
            write()
        self._parts.append(b"t")

    def list_of(self, values: Iterable[Write]) -> None:
        self._parts.append(b"](")
        for write in values:
            write()
        self._parts.append(b"e")

    def dict_of(self, items: Iterable[tuple[Write, Write]]) -> None:
        self._parts.append(b"}(")
        for key, value in items:
            key()
            value()
        self._parts.append(b"u")

    def new(self, name: str) -> None:
        """An object of a class of torch's, made without arguments."""
        self.name(_MODULES.get(name, f"{_MODULE}metadata"), name)
        self._parts.append(b")\x81")

    def build(self) -> None:
        self._parts.append(b"b")

    def object(self, name: str, **fields: Write) -> None:
        self.new(name)
        self.dict_of((partial(self.text, key), write) for key, write in fields.items())
        self.build()


class _Metadata(_Pickle):
    """The objects that `.metadata` is made of."""

    def tensor(self, told: Stored) -> None:
        self.object(
            "TensorStorageMetadata",
            properties=partial(self.properties, told.dtype),
            size=partial(self.size, told.shape),
            chunks=partial(self.list_of, [partial(self.chunk, x) for x in told.pieces]),
        )

    def properties(self, dtype: str) -> None:
        """Its state is a tuple: dtype, layout, requires_grad, memory format, pin_memory."""
        self.new("TensorProperties")
        self.tuple_of(
            partial(self.name, "torch", DTYPES[dtype].torch),
            partial(self.called, "torch.serialization", "_get_layout", partial(self.text, "torch.strided")),
            partial(self.constant, False),
            partial(self.called, f"{_MODULE}metadata", "_MEM_FORMAT_ENCODING", partial(self.integer, 0)),
            partial(self.constant, False),
        )
        self.build()

    def chunk(self, piece: Piece[Item]) -> None:
        self.object(
            "ChunkStorageMetadata",
            offsets=partial(self.size, piece.start),
            sizes=partial(self.size, piece.size),
        )

    def item(self, item: Item) -> None:
        self.object(
            "_StorageInfo",
            relative_path=partial(self.text, item.path),
            offset=partial(self.integer, item.offset),
            length=partial(self.integer, item.length),
        )

    def index(self, name: str, start: Numbers | None) -> None:
        own = {} if start is None else {"offset": partial(self.size, start)}
        self.object("MetadataIndex", fqn=partial(self.text, name), **own, index=partial(self.constant, None))
