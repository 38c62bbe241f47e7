"""Torch zip files laid out before their tensors are known, for writing in any order.

The layout says where each tensor's bytes go; whoever has them writes them there. When all checksums are
known, `finish` gives the headers in between. `torch.load(weights_only=True)` reads the result, mapped or not:
a dict of tensors, each with a storage of its own. Equal tensor lists and checksums give equal bytes.

Structure of data.pkl and of the archive: torch/serialization.py and caffe2/serialize/inline_container.cc,
2.13. The optional records that promise the exact offsets of torch's own writer (`.format_version`) are left
out.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.tensor_names import name_problems
from ckpt_tool.errors import fail_all
from ckpt_tool.records import dataclass

ALIGNMENT = 64
TENSOR_LIMIT = 99_000  # in one file: a member each beside a few others, see zip_reader.MEMBER_LIMIT
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_UTF8 = 0x0800
_DATE = 1 << 5 | 1  # 1980-01-01, the first that a zip can say
_PADDING_FIELD = 0x4246  # the extra field that torch pads with

# The storage class of each dtype; the others are stored untyped, with the dtype beside each tensor.
_STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}


@dataclass(frozen=True)
class Namespace:
    """An argparse.Namespace, to be written beside the tensors."""

    fields: Mapping[str, object]


@dataclass(frozen=True)
class Held:
    """A tensor of the file by its name, where it stands in a value beside the tensors: as an entry of a list,
    or of a dict by numbers."""

    name: str


@dataclass(frozen=True)
class _Part:
    """One member: its header at `header`, its data at `data`."""

    name: bytes
    header: int
    data: int
    size: int
    content: bytes | None  # None for a tensor, which somebody else writes


def in_json(value: object) -> object:
    """A value beside the tensors as JSON has it."""
    match value:
        case Namespace():
            return dict(value.fields)
        case Held():
            return {"tensor": value.name}
        case list():
            return [in_json(v) for v in value]
        case Mapping():
            return {str(k): in_json(v) for k, v in value.items()}
    return value


class TorchZipLayout:
    """Where everything goes in a torch zip of `tensors`, a list of (name, dtype of DTYPES, shape).

    `offsets` are file offsets of the tensors' first bytes, multiples of 64; the bytes are dense and
    little-endian. `size` is the whole file's. `root` names the folder inside the archive that torch gives
    every member. A tensor whose name starts with one of `dicts` and a dot stands in a dict of that name,
    under the rest of its own: `a.b.c.d` with `dicts` `a` and `a.b` is at `["a"]["b"]["c.d"]`. `beside` are
    plain values and `Namespace`s of the outermost dict; a tensor that they have `Held` is there and nowhere
    else. `constants` are further tensors whose bytes are known
    already: name to (dtype, shape, bytes). Fails with `bad-name`.
    """

    def __init__(
        self,
        tensors: Sequence[tuple[str, str, tuple[int, ...]]],
        *,
        root: str = "archive",
        dicts: Iterable[str] = (),
        beside: Mapping[str, object] | None = None,
        constants: Mapping[str, tuple[str, tuple[int, ...], bytes]] | None = None,
        document: bytes | None = None,
    ) -> None:
        known = constants or {}
        listed = [*tensors, *((name, dtype, shape) for name, (dtype, shape, _) in known.items())]
        fail_all(name_problems((name for name, _, _ in listed), file=root))
        if len({name for name, _, _ in listed}) != len(listed):
            raise ValueError("a tensor name is given twice")
        self._parts: dict[str, _Part] = {}  # tensor name -> its member
        self._others: list[_Part] = []
        self._end = 0
        self._root = root
        held = _pickle(listed, dicts, beside or {}) if document is None else document
        self._others.append(self._place("data.pkl", held))
        self._others.append(self._place("byteorder", b"little"))
        for index, (name, dtype, shape) in enumerate(tensors):
            size = prod(shape) * DTYPES[dtype].itemsize
            self._parts[name] = self._place(f"data/{index}", None, size)
        for index, (_, _, content) in enumerate(known.values(), len(tensors)):
            self._others.append(self._place(f"data/{index}", content))
        self._others.append(self._place("version", b"3\n"))
        self.offsets = {name: part.data for name, part in self._parts.items()}
        self.directory_offset = self._end
        self.size = self._end + len(self._directory(dict.fromkeys(self._parts, 0)))

    def _place(self, name: str, content: bytes | None, size: int = 0) -> _Part:
        raw = f"{self._root}/{name}".encode()
        size = size if content is None else len(content)
        least = self._end + 30 + len(raw) + (20 if size >= _FULL32 else 0) + 4
        data = -(-least // ALIGNMENT) * ALIGNMENT
        part = _Part(raw, self._end, data, size, content)
        self._end = data + size
        return part

    def header_writes(self) -> Iterator[tuple[int, bytes]]:
        """What can be written before the tensors: nothing, every header here holds a checksum."""
        return iter(())

    def finish(self, crcs: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """(file offset, bytes) of everything but the tensors, in order; `crcs` has the CRC-32 of each
        tensor's bytes. Together with the tensors these fill the file to `size`, without holes."""
        checksums = {name: 0 if not part.size else crcs[name] for name, part in self._parts.items()}
        for part, crc in self._in_order(checksums):
            yield part.header, _local_header(part, crc) + (part.content or b"")
        yield self.directory_offset, self._directory(checksums)

    def _in_order(self, checksums: Mapping[str, int]) -> list[tuple[_Part, int]]:
        pairs = [(p, zlib.crc32(p.content or b"")) for p in self._others]
        pairs += [(part, checksums[name]) for name, part in self._parts.items()]
        return sorted(pairs, key=lambda pair: pair[0].header)

    def _directory(self, checksums: Mapping[str, int]) -> bytes:
        entries = [_central_header(part, crc) for part, crc in self._in_order(checksums)]
        directory = b"".join(entries)
        start, size, count = self.directory_offset, len(directory), len(entries)
        if start >= _FULL32 or size >= _FULL32 or count >= _FULL16:
            wide = struct.pack(
                "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start
            ) + struct.pack("<4sLQL", b"PK\x06\x07", 0, start + size, 1)
            directory += wide
        short = min(count, _FULL16)
        return directory + struct.pack(
            "<4s4H2LH", b"PK\x05\x06", 0, 0, short, short, min(size, _FULL32), min(start, _FULL32), 0
        )


def _local_header(part: _Part, crc: int) -> bytes:
    large = part.size >= _FULL32
    size = _FULL32 if large else part.size
    extra = struct.pack("<2H2Q", 1, 16, part.size, part.size) if large else b""
    padding = part.data - part.header - 30 - len(part.name) - len(extra) - 4
    extra += struct.pack("<2H", _PADDING_FIELD, padding) + bytes(padding)
    numbers = (45 if large else 20, _UTF8, 0, 0, _DATE, crc, size, size, len(part.name), len(extra))
    return struct.pack("<4s5H3L2H", b"PK\x03\x04", *numbers) + part.name + extra


def _central_header(part: _Part, crc: int) -> bytes:
    wide = [n for n in (part.size, part.size, part.header) if n >= _FULL32]
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version = 45 if wide else 20
    size, header = min(part.size, _FULL32), min(part.header, _FULL32)
    numbers = (version, version, _UTF8, 0, 0, _DATE, crc, size, size, len(part.name), len(extra))
    return struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *numbers, 0, 0, 0, 0, header) + part.name + extra


# The pickle of a dict of tensors, protocol 2 and without memo: PROTO, EMPTY_DICT, MARK, items, SETITEMS,
# STOP. Opcodes: Python's Lib/pickletools.py.


def _pickle(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], dicts: Iterable[str], beside: Mapping[str, object]
) -> bytes:
    known = {name: _tensor(str(index), dtype, shape) for index, (name, dtype, shape) in enumerate(tensors)}
    placed: set[str] = set()
    tree: dict[str, Any] = {k: _filled(v, known, placed) for k, v in beside.items()}
    prefixes = sorted(set(dicts), key=len)
    for name in (n for n in known if n not in placed):
        inner, done = tree, 0
        for prefix in prefixes:
            if name.startswith(prefix + ".") and prefix.startswith(name[:done]):
                inner = inner.setdefault(prefix[done:], {})
                done = len(prefix) + 1
        if name[done:] in inner:
            raise ValueError(f"{name}: something else stands there already")
        inner[name[done:]] = _Pickled(known[name])
    return plain_pickle(tree)


def _filled(value: object, known: Mapping[str, bytes], placed: set[str]) -> object:
    """`value` with the opcodes of each tensor that it has `Held`; these are `placed`."""
    match value:
        case Held():
            placed.add(value.name)
            return _Pickled(known[value.name])
        case list():
            return [_filled(v, known, placed) for v in value]
        case Mapping():
            return {k: _filled(v, known, placed) for k, v in value.items()}
    return value


def whole_zip(value: object, *, root: str = "archive") -> bytes:
    """A torch zip of a plain value without tensors, `Namespace`s in it."""
    layout = TorchZipLayout([], root=root, document=plain_pickle(value))
    made = bytearray(layout.size)
    for offset, data in layout.finish({}):
        made[offset : offset + len(data)] = data
    return bytes(made)


def bare_tensor(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The pickle of one tensor and nothing around it, the first of its file."""
    return b"\x80\x02" + _tensor("0", dtype, shape) + b"."


def plain_pickle(value: object) -> bytes:
    """A pickle of its own of a plain value, `Namespace`s in it, as `beside` may hold them."""
    return b"\x80\x02" + _value(value) + b"."


class _Pickled(bytes):
    """A value in its opcodes."""


def _value(value: object) -> bytes:
    match value:
        case _Pickled():
            return bytes(value)
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return _integer(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return _text(value)
        case list() | tuple():
            ends = (b"](", b"e") if isinstance(value, list) else (b"(", b"t")
            return ends[0] + b"".join(map(_value, value)) + ends[1]
        case Mapping():
            items = b"".join(_key(k) + _value(v) for k, v in value.items())
            return b"}(" + items + b"u" if items else b"}"
        case Namespace():
            return _global("argparse", "Namespace") + b")\x81" + _value(value.fields) + b"b"
    raise TypeError(f"expected a plain value, found a {type(value).__name__}")


def _key(key: object) -> bytes:
    return _integer(key) if type(key) is int else _text(str(key))


def _tensor(key: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    typed = _STORAGES.get(dtype)
    numel = prod(shape) * (1 if typed else DTYPES[dtype].itemsize)
    kind = _global("torch", typed) if typed else _global("torch.storage", "UntypedStorage")
    storage = b"(" + _text("storage") + kind + _text(key) + _text("cpu") + _integer(numel) + b"tQ"
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if not prod(shape):
        strides = [prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape))]
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = storage + _integer(0) + _integers(shape) + _integers(strides) + b"\x89" + hooks
    if typed:
        return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"
    element = _global("torch", DTYPES[dtype].torch)
    return _global("torch._utils", "_rebuild_tensor_v3") + b"(" + arguments + element + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def _integers(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"


def _integer(n: int) -> bytes:
    if n < 0:
        size = n.bit_length() // 8 + 1
        return b"\x8a" + size.to_bytes(1, "little") + n.to_bytes(size, "little", signed=True)
    if n < 0x100:
        return b"K" + n.to_bytes(1, "little")
    if n < 0x10000:
        return b"M" + n.to_bytes(2, "little")
    if n < 1 << 31:
        return b"J" + n.to_bytes(4, "little")
    size = n.bit_length() // 8 + 1
    return b"\x8a" + size.to_bytes(1, "little") + n.to_bytes(size, "little")
