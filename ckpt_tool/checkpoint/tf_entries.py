"""What the index of a TensorFlow bundle says: how many data files there are, and of each tensor its type,
shape and place, or the slices that it is kept in.

Sources: TensorFlow's core/protobuf/tensor_bundle.proto,
core/framework/{types,tensor_shape,tensor_slice}.proto and core/util/tensor_bundle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from functools import lru_cache
from math import prod
from typing import NamedTuple

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.crc32c import unmasked
from ckpt_tool.checkpoint.safetensors import DIMENSION_LIMIT, ELEMENT_LIMIT, TENSOR_LIMIT
from ckpt_tool.checkpoint.tf_coding import (
    BYTES,
    FIXED32,
    VARINT,
    Box,
    fields,
    fixed32_field,
    message_field,
    number_field,
    signed,
    single,
    slice_name,
    varint,
)
from ckpt_tool.checkpoint.tf_table import entries
from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass

SHARD_LIMIT = 99_999  # what five digits can say
SLICE_LIMIT = 4096  # of one tensor
ENTRY_LIMIT = 4 * TENSOR_LIMIT  # tensors and slices
VERSION = 1  # of the format, the only one so far

# types.proto: the number of a type -> (its name, that in DTYPES or None, bytes of an element or 0).
TYPES: Mapping[int, tuple[str, str | None, int]] = {
    1: ("float32", "F32", 4),
    2: ("float64", "F64", 8),
    3: ("int32", "I32", 4),
    4: ("uint8", "U8", 1),
    5: ("int16", "I16", 2),
    6: ("int8", "I8", 1),
    7: ("string", None, 0),
    8: ("complex64", None, 8),
    9: ("int64", "I64", 8),
    10: ("bool", "BOOL", 1),
    11: ("qint8", None, 1),
    12: ("quint8", None, 1),
    13: ("qint32", None, 4),
    14: ("bfloat16", "BF16", 2),
    15: ("qint16", None, 2),
    16: ("quint16", None, 2),
    17: ("uint16", "U16", 2),
    18: ("complex128", None, 16),
    19: ("float16", "F16", 2),
    20: ("resource", None, 0),
    21: ("variant", None, 0),
    22: ("uint32", "U32", 4),
    23: ("uint64", "U64", 8),
    24: ("float8_e5m2", "F8_E5M2", 1),
    25: ("float8_e4m3fn", "F8_E4M3", 1),
    26: ("float8_e4m3fnuz", None, 1),
    27: ("float8_e4m3b11fnuz", None, 1),
    28: ("float8_e5m2fnuz", None, 1),
    29: ("int4", None, 1),
    30: ("uint4", None, 1),
    31: ("int2", None, 1),
    32: ("uint2", None, 1),
    33: ("float4_e2m1fn", None, 1),
}
NUMBER_OF = {dtype: number for number, (_, dtype, _) in TYPES.items() if dtype is not None}
assert all(size == DTYPES[dtype].itemsize for _, dtype, size in TYPES.values() if dtype is not None)


class Entry(NamedTuple):
    """A tensor, or a slice of one: `size` bytes at `offset` of data file `shard`. `crc32c` is of the stored
    bytes. One that is kept in `slices` has no bytes of its own."""

    type: int
    shape: tuple[int, ...]
    shard: int = 0
    offset: int = 0
    size: int = 0
    crc32c: int = 0
    slices: tuple[Box, ...] = ()

    @property
    def dtype(self) -> str | None:
        """As in DTYPES; None for what cannot be moved as numbers."""
        return TYPES[self.type][1]

    def message(self) -> bytes:
        from ckpt_tool.checkpoint.crc32c import masked

        shape = b"".join(message_field(2, number_field(1, n)) for n in self.shape)
        made = number_field(1, self.type) + message_field(2, shape)
        if self.slices:
            return made + b"".join(message_field(7, _box_message(box)) for box in self.slices)
        made += number_field(3, self.shard) + number_field(4, self.offset) + number_field(5, self.size)
        return made + fixed32_field(6, masked(self.crc32c))


@dataclass
class Index:
    """An index, read: `tensors` by name, and the slices by their keys."""

    shards: int
    tensors: dict[str, Entry] = field(default_factory=dict)
    slices: dict[bytes, Entry] = field(default_factory=dict)


def header(shards: int) -> bytes:
    """The message under the empty key."""
    return number_field(1, shards) + message_field(3, number_field(1, VERSION))


def read_index(data: ByteRange) -> Index:
    """The index in `data`. Kinds: those of `tf_table.entries`, `header-limit`, `bad-name`,
    `unsupported-byteorder`, `unsupported-dtype`."""
    index: Index | None = None
    for key, value in entries(data):
        if index is None:
            index = Index(_shards(key, value, data.name))
            continue
        name = _name(key, data.name)
        try:
            entry = _entry(value)
        except ValueError as error:
            fail("bad-bundle", f"expected the entry of a tensor, found {error}", file=data.name, where=name)
        if len(index.tensors) + len(index.slices) == ENTRY_LIMIT or len(index.tensors) == TENSOR_LIMIT:
            fail("header-limit", f"expected at most {TENSOR_LIMIT} tensors, found more", file=data.name)
        if key.startswith(b"\0"):
            index.slices[key] = entry
        else:
            index.tensors[name] = entry
    if index is None:
        fail("bad-bundle", "expected a header and tensors, found an empty table", file=data.name)
    _check_shards(index, data.name)
    return index


def _name(key: bytes, file: str) -> str:
    """How a key is shown and, of a tensor, its name."""
    if key.startswith(b"\0"):
        return f"slice of {slice_name(key)}"
    try:
        return key.decode()
    except UnicodeDecodeError:
        shown = key.decode("utf-8", "backslashreplace")
        fail("bad-name", "expected a tensor name in UTF-8, found other bytes", file=file, where=shown)


def _shards(key: bytes, value: bytes, file: str) -> int:
    """The number of data files, from the first entry."""
    if key:
        fail("bad-bundle", "expected the header of a bundle first, found a tensor", file=file)
    try:
        found = single(value, {1: VARINT, 2: VARINT, 3: BYTES})
        shards, order = _last(found[1]), _last(found[2])
        versions = single(_message(found[3]), {1: VARINT, 2: VARINT, 3: VARINT})
        least, bad = _last(versions[2]), versions[3]
    except ValueError as error:
        fail("bad-bundle", f"expected the header of a bundle, found {error}", file=file)
    if order:
        fail(
            "unsupported-byteorder",
            "expected a little-endian bundle, found one that a big-endian machine wrote",
            file=file,
        )
    if least > VERSION or VERSION in bad:
        fail("unsupported", f"expected a bundle of version {VERSION}, found one for {least}", file=file)
    if not 1 <= shards <= SHARD_LIMIT:
        fail("bad-bundle", f"expected 1 to {SHARD_LIMIT} data files, found {shards}", file=file)
    return shards


def _entry(value: bytes) -> Entry:
    entry = _usual(value) or _any(value)
    kind, slices = entry.type, entry.slices
    itemsize = TYPES[kind][2]
    wanted = prod(entry.shape) * itemsize
    if slices:
        if entry.size:
            raise ValueError(f"{entry.size} bytes of a tensor that is kept in slices")
        if any(len(box) != len(entry.shape) for box in slices):
            raise ValueError(f"a slice with another number of axes than the shape {entry.shape}")
    elif itemsize and wanted != entry.size:
        text = f"{entry.size} bytes for {TYPES[kind][0]} of shape {entry.shape}, which takes {wanted}"
        raise ValueError(text)
    return entry


# The fields of a whole tensor in the order of their numbers, as nearly all writers have them: the type, the
# length of the shape that follows, and what comes after it.
_TYPE = re.compile(rb"\x08([\0-\x7f])\x12([\0-\x40])", re.S)
_PLACE = re.compile(
    rb"(?:\x18%b)?(?:\x20%b)?(?:\x28%b)?\x35(.{4})" % ((rb"([\x80-\xff]{0,7}[\0-\x7f])",) * 3), re.S
)


def _usual(value: bytes) -> Entry | None:
    """One whose fields come in that order, none of them twice; None for others, right or wrong."""
    head = _TYPE.match(value)
    if head is None or head[1][0] not in TYPES:
        return None
    shape = head.end() + head[2][0]
    place = _PLACE.fullmatch(value, shape)
    if place is None:
        return None
    shard, offset, size, crc = place.groups()
    return Entry(
        head[1][0],
        _shape(value[head.end() : shape]),
        0 if shard is None else varint(shard, 0)[0],
        0 if offset is None else varint(offset, 0)[0],
        0 if size is None else varint(size, 0)[0],
        unmasked(int.from_bytes(crc, "little")),
    )


def _any(value: bytes) -> Entry:
    numbers = {1: VARINT, 2: BYTES, 3: VARINT, 4: VARINT, 5: VARINT, 6: FIXED32, 7: BYTES}
    found = single(value, numbers)
    kind = _last(found[1])
    if kind not in TYPES:
        raise ValueError(f"the type {kind}, which TensorFlow 2.21 does not have")
    slices = tuple(_box(m) for m in found[7] if isinstance(m, bytes))
    if len(slices) > SLICE_LIMIT:
        raise ValueError(f"{len(slices)} slices, more than {SLICE_LIMIT}")
    return Entry(
        kind,
        _shape(_message(found[2])),
        _last(found[3]),
        _last(found[4]),
        _last(found[5]),
        unmasked(_last(found[6])),
        slices,
    )


def _shape(message: bytes) -> tuple[int, ...]:
    return _common_shape(message) if len(message) <= 64 else _any_shape(message)


def _any_shape(message: bytes) -> tuple[int, ...]:
    shape: list[int] = []
    for number, wire, value in fields(message):
        if number == 3 and value:
            raise ValueError("a shape of unknown rank")
        if number != 2:
            continue
        if wire != BYTES or not isinstance(value, bytes):
            raise ValueError(f"a dimension as wire type {wire}")
        size = signed(_last(single(value, {1: VARINT})[1]))
        if size < 0:
            raise ValueError(f"a dimension of {size}")
        shape.append(size)
        if len(shape) > DIMENSION_LIMIT:
            raise ValueError(f"more than {DIMENSION_LIMIT} dimensions")
    if prod(max(n, 1) for n in shape) > ELEMENT_LIMIT:
        raise ValueError("a shape of more than 2^56 elements")
    return tuple(shape)


_common_shape = lru_cache(maxsize=256)(_any_shape)  # the layers of a model have few


def _box(message: bytes) -> Box:
    """A TensorSliceProto; an extent without a length is all of its axis."""
    found: list[tuple[int, int | None]] = []
    for value in single(message, {1: BYTES})[1]:
        extent = single(value if isinstance(value, bytes) else b"", {1: VARINT, 2: VARINT})
        start = signed(_last(extent[1]))
        length = signed(_last(extent[2])) if extent[2] else None
        if start < 0 or (length is not None and length < 1):
            raise ValueError(f"a slice that begins at {start} and has {length}")
        found.append((start, length))
        if len(found) > DIMENSION_LIMIT:
            raise ValueError(f"more than {DIMENSION_LIMIT} axes of a slice")
    return tuple(found)


def _box_message(box: Box) -> bytes:
    return b"".join(
        message_field(1, number_field(1, start) + (b"" if length is None else number_field(2, length)))
        for start, length in box
    )


def _last(values: list[int | bytes]) -> int:
    """The number of a field, of which the last counts; 0 for one that is absent."""
    value = values[-1] if values else 0
    return value if isinstance(value, int) else 0


def _message(values: list[int | bytes]) -> bytes:
    """The message of a field; one that comes in several parts is their sum."""
    return b"".join(v for v in values if isinstance(v, bytes))


def _check_shards(index: Index, file: str) -> None:
    held: Iterable[tuple[str, Entry]] = (
        *index.tensors.items(),
        *((f"slice of {slice_name(k)}", e) for k, e in index.slices.items()),
    )
    for name, entry in held:
        if entry.shard >= index.shards:
            message = f"expected one of {index.shards} data files, found number {entry.shard}"
            fail("bad-bundle", message, file=file, where=name)
