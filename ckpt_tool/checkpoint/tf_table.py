"""The sorted table of keys and values that TensorFlow's `.index` files are: LevelDB's, in blocks that each
carry a checksum, read one after another and never whole.

    [block][5 bytes] ... [metaindex block][5 bytes] [index block][5 bytes] [footer of 48 bytes]

A block is entries (length shared with the key before, length of the rest, length of the value, rest, value),
the places of some of them and their count. The 5 bytes are how it is compressed and its masked CRC-32C. The
index block has for each block a key not below any of its keys, and the place. Sources: LevelDB's
doc/table_format.md; TensorFlow's tsl/lib/io/{format,block,table_builder}.cc.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NoReturn

from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.crc32c import crc32c, masked
from ckpt_tool.checkpoint.signs import TABLE_END
from ckpt_tool.checkpoint.tf_coding import to_varint, varint
from ckpt_tool.errors import fail, printable

FOOTER = 48
TRAILER = 5
BLOCK_LIMIT = 16 << 20  # bytes; TensorFlow closes a block after 256 KiB
BLOCK_TARGET = 256 << 10
RESTART = 16  # entries between two keys that share nothing with the one before
KEY_LIMIT = 8 << 10  # bytes
_DAMAGED = "the file is damaged or was cut: download it again"

Entry = tuple[bytes, bytes]


def entries(data: ByteRange) -> Iterator[Entry]:
    """(key, value) of every entry of a table in order; memory is one block. Kinds: `truncated`, `bad-bundle`,
    `checksum`, `unsupported` (a compressed block)."""
    last: bytes | None = None
    after = 0
    for separator, handle in _block_entries(data, *_index_block(data)):
        try:
            offset, at = varint(handle, 0)
            size, at = varint(handle, at)
        except ValueError as error:
            _bad(data, f"expected the place of a block, found {error}")
        if at != len(handle):
            _bad(data, f"expected the place of a block in {at} bytes, found {len(handle)}")
        if offset < after:
            _bad(data, f"expected a block from byte {after} on, found one at {offset}")
        after = offset + size + TRAILER
        for key, value in _block_entries(data, offset, size):
            if last is not None and key <= last:
                shown = f"{_shown(key)} after {_shown(last)}"
                _bad(data, f"expected keys in order, found {shown} in the block at byte {offset}")
            last = key
            yield key, value
        if last is not None and last > separator:
            _bad(data, f"expected keys up to {_shown(separator)} in the block at byte {offset}, found more")


def _index_block(data: ByteRange) -> tuple[int, int]:
    """Place and size of the index block, from the footer."""
    if data.size < FOOTER + 2 * TRAILER:
        fail("truncated", f"expected a table, found {data.size} bytes", file=data.name, hint=_DAMAGED)
    footer = data.read(data.size - FOOTER, FOOTER)
    if not footer.endswith(TABLE_END):
        message = f"expected the end of a table ({TABLE_END.hex()}), found {footer[-8:].hex()}"
        fail("truncated", message, file=data.name, hint=_DAMAGED)
    try:
        meta, at = varint(footer, 0)
        meta_size, at = varint(footer, at)
        offset, at = varint(footer, at)
        size, at = varint(footer, at)
    except ValueError as error:
        _bad(data, f"expected the places of two blocks in the footer, found {error}")
    _block(data, meta, meta_size)  # names of filters, of which TensorFlow has none
    return offset, size


def _block_entries(data: ByteRange, offset: int, size: int) -> Iterator[Entry]:
    block = _block(data, offset, size)
    place = f"the block at byte {offset}"
    restarts = int.from_bytes(block[-4:], "little")
    end = size - 4 - 4 * restarts
    if end < 0:
        _bad(data, f"expected at most {(size - 4) // 4} restarts in {place}, found {restarts}")
    key, at = b"", 0
    while at < end:
        start = at
        try:
            shared, at = varint(block, at)
            rest, at = varint(block, at)
            length, at = varint(block, at)
        except ValueError as error:
            _bad(data, f"expected three lengths at byte {start} of {place}, found {error}")
        if shared > len(key):
            _bad(data, f"expected at most {len(key)} shared bytes at byte {start} of {place}, found {shared}")
        if rest > end - at or length > end - at - rest:
            _bad(data, f"expected entries within {place}, found one of {rest} + {length} bytes at {start}")
        if shared + rest > KEY_LIMIT:
            _bad(data, f"expected keys of at most {KEY_LIMIT} bytes, found one of {shared + rest}")
        key = key[:shared] + block[at : at + rest]
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def _block(data: ByteRange, offset: int, size: int) -> bytes:
    """The content of a block, its checksum compared."""
    place = f"block of {size} bytes at byte {offset}"
    if offset + size + TRAILER > data.size - FOOTER:
        _bad(data, f"expected blocks within {data.size - FOOTER} bytes, found a {place}")
    if size < 4:
        _bad(data, f"expected a block of at least 4 bytes, found a {place}")
    if size > BLOCK_LIMIT:
        fail(
            "header-limit", f"expected blocks of at most {BLOCK_LIMIT} bytes, found a {place}", file=data.name
        )
    stored = data.read(offset, size + TRAILER)
    kind, told = stored[size], int.from_bytes(stored[size + 1 :], "little")
    found = masked(crc32c(memoryview(stored)[: size + 1]))
    if found != told:
        message = f"expected CRC-32C {told:08x} (masked) of the {place}, found {found:08x}"
        fail("checksum", message, file=data.name, hint=_DAMAGED)
    if kind == 1:
        fail(
            "unsupported",
            f"expected blocks as they are, found the {place} compressed with Snappy",
            file=data.name,
            hint="a tf.train.Saver of TensorFlow 2 that restores it and saves it again writes plain blocks",
        )
    if kind:
        _bad(data, f"expected 0 for a plain block, found {kind} after the {place}")
    return stored[:size]


def _shown(key: bytes) -> str:
    return f"`{printable(key.decode('utf-8', 'backslashreplace'), 60)}`"


def _bad(data: ByteRange, message: str) -> NoReturn:
    fail("bad-bundle", message, file=data.name, hint=_DAMAGED)


# --- writing --------------------------------------------------------------------------------------------


def table(items: Iterable[Entry]) -> bytes:
    """The table of `items`, whose keys must be in order: byte for byte what TensorFlow's own writer makes."""
    out, index = bytearray(), _Block(every=1)
    block = _Block()
    last: bytes | None = None
    for key, value in items:
        if last is not None and key <= last:
            raise ValueError(f"key {key!r} after {last!r}")
        if last is not None and block.size >= BLOCK_TARGET:
            index.add(_between(last, key), _append(out, block.finish()))
            block = _Block()
        block.add(key, value)
        last = key
    if last is not None:
        index.add(_after(last), _append(out, block.finish()))
    footer = _append(out, _Block().finish())
    footer += _append(out, index.finish())
    return bytes(out + footer.ljust(FOOTER - len(TABLE_END), b"\0") + TABLE_END)


def _between(low: bytes, high: bytes) -> bytes:
    """A short key from `low` on and below `high`."""
    at = _shared(low, high)
    if at < len(low) and low[at] + 1 < high[at]:
        return low[:at] + bytes([low[at] + 1])
    return low


def _after(key: bytes) -> bytes:
    """A short key that is not below `key`."""
    for at, byte in enumerate(key):
        if byte < 0xFF:
            return key[:at] + bytes([byte + 1])
    return key


def _shared(a: bytes, b: bytes) -> int:
    """How many bytes both begin with."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _append(out: bytearray, content: bytes) -> bytes:
    """Put a block at the end of `out`; its place."""
    handle = to_varint(len(out)) + to_varint(len(content))
    stored = content + b"\0"
    out += stored + masked(crc32c(stored)).to_bytes(4, "little")
    return handle


class _Block:
    """A block that is filled; every so many entries a key stands whole."""

    def __init__(self, every: int = RESTART) -> None:
        self.every, self.count, self._last = every, 0, b""
        self._out = bytearray()
        self._restarts = [0]

    @property
    def size(self) -> int:
        return len(self._out) + 4 * len(self._restarts) + 4

    def add(self, key: bytes, value: bytes) -> None:
        shared = 0
        if self.count % self.every:
            shared = _shared(key, self._last)
        elif self.count:
            self._restarts.append(len(self._out))
        self._out += to_varint(shared) + to_varint(len(key) - shared) + to_varint(len(value))
        self._out += key[shared:] + value
        self._last = key
        self.count += 1

    def finish(self) -> bytes:
        tail = b"".join(r.to_bytes(4, "little") for r in (*self._restarts, len(self._restarts)))
        return bytes(self._out) + tail
