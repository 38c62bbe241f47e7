"""How TensorFlow's bundles spell numbers, messages and keys: varints and protocol buffer fields, and the
"ordered code" of the keys under which slices of a tensor stand, whose bytes sort as the values do.

Sources: protobuf's encoding guide; TensorFlow's tsl/lib/strings/ordered_code.cc and
core/util/saved_tensor_slice_util.cc (EncodeTensorNameSlice). Everything here raises `ValueError` with what
was found; callers say where.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Box = tuple[tuple[int, int | None], ...]  # (start, length) along each axis; None is all of the axis
_UINT64 = (1 << 64) - 1


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(number below 2^64, place after it)."""
    if at < len(data) and data[at] < 0x80:
        return data[at], at + 1  # almost all are
    value = 0
    for k in range(10):
        if at + k >= len(data):
            raise ValueError("a number that goes on after the end")
        byte = data[at + k]
        value |= (byte & 0x7F) << (7 * k)
        if byte < 0x80:
            if value > _UINT64:
                raise ValueError("a number of more than 64 bits")
            return value, at + k + 1
    raise ValueError("a number of more than 10 bytes")


def to_varint(value: int) -> bytes:
    """A number from 0, or a negative one of 64 bits."""
    value &= _UINT64
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# --- messages -------------------------------------------------------------------------------------------

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def fields(message: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(field number, wire type, value) of each field in order; bytes for a string or message in it."""
    at, end = 0, len(message)
    while at < end:
        tag = message[at]
        if tag < 0x80:  # almost all are
            at += 1
        else:
            tag, at = varint(message, at)
        number, wire = tag >> 3, tag & 7
        if not number:
            raise ValueError("a field of number 0")
        if wire in (VARINT, BYTES):
            size = message[at] if at < end else 0x80
            if size < 0x80:
                at += 1
            else:
                size, at = varint(message, at)
            if wire == VARINT:
                yield number, wire, size
                continue
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"a field of wire type {wire}")
        if size > end - at:
            raise ValueError(f"a field of {size} bytes where {end - at} are left")
        run = message[at : at + size]
        yield number, wire, run if wire == BYTES else int.from_bytes(run, "little")
        at += size


def single(message: bytes, numbers: dict[int, int]) -> dict[int, list[int | bytes]]:
    """The values of the fields `numbers` (number to wire type), which must be of these types; others are
    passed over, as readers of an older version do."""
    found: dict[int, list[int | bytes]] = {number: [] for number in numbers}
    for number, wire, value in fields(message):
        if number not in numbers:
            continue
        if wire != numbers[number]:
            raise ValueError(f"field {number} as wire type {wire}, not {numbers[number]}")
        found[number].append(value)
    return found


def signed(value: int) -> int:
    """A varint as the int64 that it stands for."""
    return value - (1 << 64) if value >> 63 else value


def message_field(number: int, content: bytes) -> bytes:
    return to_varint(number << 3 | BYTES) + to_varint(len(content)) + content


def number_field(number: int, value: int) -> bytes:
    """Nothing for 0, which silence means."""
    return to_varint(number << 3 | VARINT) + to_varint(value) if value else b""


def fixed32_field(number: int, value: int) -> bytes:
    return to_varint(number << 3 | FIXED32) + value.to_bytes(4, "little")


# --- keys of slices -------------------------------------------------------------------------------------


def slice_key(name: str, box: Box) -> bytes:
    """The key under which the part `box` of the tensor `name` stands."""
    made = _ordered_number(0) + _ordered_text(name.encode()) + _ordered_number(len(box))
    for start, length in box:
        made += _ordered_signed(start) + _ordered_signed(-1 if length is None else length)
    return made


def whole_box(box: Box, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(starts, lengths) of a slice of a tensor of `shape`, with the lengths that it leaves out."""
    lengths = tuple(size - s if n is None else n for (s, n), size in zip(box, shape, strict=True))
    return tuple(s for s, _ in box), lengths


def slice_name(key: bytes) -> str | None:
    """The name of the tensor that a key of a slice speaks of, for messages; None where there is none."""
    end = key.find(b"\x00\x01", 1)
    if not key.startswith(b"\0") or end < 0:
        return None
    return key[1:end].replace(b"\x00\xff", b"\0").replace(b"\xff\x00", b"\xff").decode("utf-8", "replace")


def _ordered_number(value: int) -> bytes:
    size = (value.bit_length() + 7) // 8
    return bytes([size]) + value.to_bytes(size, "big")


def _ordered_text(text: bytes) -> bytes:
    return text.replace(b"\xff", b"\xff\x00").replace(b"\x00", b"\x00\xff") + b"\x00\x01"


def _ordered_signed(value: int) -> bytes:
    """Two's complement in n bytes whose n highest bits are n ones and a zero, counted into them, for a
    number from 0; all of that turned over for a negative one."""
    magnitude = value if value >= 0 else ~value
    size = magnitude.bit_length() // 7 + 1
    if size > 9:
        raise ValueError(f"a number of more than 62 bits: {value}")
    header = ((1 << size) - 1) << (8 * size - size)
    spelled = magnitude | header
    if value < 0:
        spelled ^= (1 << 8 * size) - 1
    return spelled.to_bytes(size, "big")


# --- names of objects -----------------------------------------------------------------------------------

VARIABLE = "/.ATTRIBUTES/VARIABLE_VALUE"
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


def object_path(key: str) -> tuple[str, ...] | None:
    """The attributes that lead to a variable of `tf.train.Checkpoint`, by its key; None for other keys. In
    them `..` stands for `.` and `.S` for `/`."""
    path, mark, _ = key.partition("/.ATTRIBUTES/")
    if not mark:
        return None
    return tuple(_unescaped(part) for part in path.split("/"))


def _unescaped(part: str) -> str:
    pieces = part.split("..")
    return ".".join(piece.replace(".S", "/") for piece in pieces)


def by_start(boxes: Sequence[Box]) -> list[Box]:
    """In the order in which TensorFlow keeps slices: by where they begin."""
    return sorted(boxes, key=lambda box: [start for start, _ in box])
