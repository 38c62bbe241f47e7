"""tar and tar.gz, read without extracting: where each regular member's bytes lie.

Headers are those of POSIX.1-2017 pax ("ustar Interchange Format", "pax Extended Header") and GNU tar's long
names. A plain .tar is used in place. A .tar.gz is inflated in one pass, and the members asked for go to one
unlinked temporary file; its memory is some buffers, whatever the members' sizes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import NoReturn, Protocol

from ckpt_tool.checkpoint.ahead import ahead
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.signs import TAR_BLOCK as BLOCK
from ckpt_tool.checkpoint.signs import is_tar_header
from ckpt_tool.checkpoint.spool import Spool
from ckpt_tool.checkpoint.zlibs import InflateError, decompressobj
from ckpt_tool.errors import fail, printable
from ckpt_tool.records import dataclass

MEMBER_LIMIT = 100_000
NAME_LIMIT = 4096  # bytes of a long name
PAX_LIMIT = 64 << 10  # bytes of an extended header
RATIO_LIMIT = 200
RATIO_GRACE = 1 << 20  # a few kilobytes of zeros may inflate more than RATIO_LIMIT times
BUFFER = 256 << 10
AT_ONCE = 1 << 20  # bytes of a file that is not worth a thread

_REGULAR = (b"0", b"\0", b"7")
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"S": "a sparse file",
}


@dataclass(frozen=True)
class TarMember:
    """A regular file of a tar: its bytes are `size` from `offset` on, in the file at `path`."""

    name: str
    path: Path
    offset: int
    size: int


class _Stream(Protocol):
    """Bytes in order; `position` counts those passed."""

    position: int

    def take(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""

    def skip(self, size: int, spool: Spool | None) -> None:
        """Pass over `size` bytes, copying them to `spool` if there is one."""


class _PlainStream:
    def __init__(self, data: ByteRange) -> None:
        self.data, self.position = data, 0

    def take(self, size: int) -> bytes:
        found = self.data.read(self.position, min(size, self.data.size - self.position))
        self.position += len(found)
        return found

    def skip(self, size: int, spool: Spool | None) -> None:
        if self.position + size > self.data.size:
            fail(
                "truncated",
                f"expected a member of {size} bytes at {self.position}, found the end at {self.data.size}",
                file=self.data.name,
            )
        self.position += size


class _Inflating:
    """The inflated bytes of a gzip file of one or several parts (RFC 1952); zlib checks each part's CRC."""

    def __init__(self, data: ByteRange) -> None:
        self.data = data
        self._read = 0
        self._pending = b""
        self._zlib = decompressobj(31)

    def pieces(self) -> Generator[tuple[bytes, int], None, None]:
        """Pieces of at most BUFFER bytes, with how much of the file has been read for them."""
        while piece := self._piece():
            yield piece, self._read

    def _piece(self) -> bytes:
        """The next of them; nothing at the end."""
        while True:
            if self._zlib.eof:
                rest = self._zlib.unused_data + self._rest_of_file(2 - len(self._zlib.unused_data))
                if not rest.strip(b"\0") and self._read == self.data.size:
                    return b""
                if rest[:2] != b"\x1f\x8b":
                    fail(
                        "trailing-data", "expected the end of the gzip file, found more", file=self.data.name
                    )
                self._zlib, self._pending = decompressobj(31), rest
            if not self._pending:
                self._pending = self._rest_of_file(BUFFER)
                if not self._pending:
                    fail(
                        "truncated",
                        "expected the end of the gzip stream, found the file's",
                        file=self.data.name,
                    )
            try:
                piece: bytes = self._zlib.decompress(self._pending, BUFFER)
            except InflateError as error:
                fail(
                    "checksum",
                    f"the gzip stream is damaged before byte {self._read} ({error})",
                    file=self.data.name,
                )
            self._pending = self._zlib.unconsumed_tail
            if piece:
                return piece

    def _rest_of_file(self, size: int) -> bytes:
        found = self.data.read(self._read, max(0, min(size, self.data.size - self._read)))
        self._read += len(found)
        return found


class _GzipStream:
    """A tar out of a gzip file; one of some size is inflated ahead, while what is inflated already is
    written. To be closed."""

    def __init__(self, data: ByteRange) -> None:
        self.data, self.position = data, 0
        inflating = _Inflating(data)
        self._pieces = ahead(inflating.pieces) if data.size > AT_ONCE else inflating.pieces()
        self._read = 0  # of the file, for the piece that is ready
        self._ready, self._used = b"", 0

    def close(self) -> None:
        self._pieces.close()

    def _next(self, size: int) -> bytes:
        """At most `size` of the next bytes; nothing at the end."""
        if self._used == len(self._ready):
            (self._ready, self._read), self._used = next(self._pieces, (b"", self._read)), 0
        found = self._ready[self._used : self._used + size]
        self._used += len(found)
        self.position += len(found)
        if self.position > RATIO_GRACE + RATIO_LIMIT * self._read:
            fail(
                "bad-tar",
                f"expected data that inflates at most {RATIO_LIMIT} times, found more at byte {self._read}",
                file=self.data.name,
            )
        return found

    def take(self, size: int) -> bytes:
        pieces = []
        while size and (piece := self._next(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def skip(self, size: int, spool: Spool | None) -> None:
        while size:
            piece = self._next(min(size, BUFFER))
            if not piece:
                fail("truncated", f"expected {size} more bytes of a member, found none", file=self.data.name)
            if spool is not None:
                spool.write(piece)
            size -= len(piece)


def read_tar(data: ByteRange) -> list[TarMember]:
    """The regular members of a plain tar, to be read in place."""
    members = _members(_PlainStream(data), data)
    return [TarMember(name, data.path, data.base + offset, size) for name, offset, size in members]


def read_tar_gz(
    data: ByteRange, wanted: Callable[[str], bool], spool: Spool
) -> tuple[list[TarMember], list[str]]:
    """Inflate once: (the members whose name is `wanted`, now in `spool`; the names of all members)."""
    kept: list[TarMember] = []
    names: list[str] = []

    def place(name: str, size: int) -> Spool | None:
        if not wanted(name):
            return None
        kept.append(TarMember(name, spool.path, spool.size, size))
        return spool

    with closing(_GzipStream(data)) as stream:
        for name, *_ in _members(stream, data, place):
            names.append(name)
    return kept, names


def _members(
    stream: _Stream, data: ByteRange, place: Callable[[str, int], Spool | None] = lambda name, size: None
) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each regular member, all headers checked up to the end of the file."""

    def bad(message: str, where: str | None = None, kind: str = "bad-tar") -> NoReturn:
        fail(kind, message, file=data.name, where=where)

    seen: set[str] = set()
    count = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        at = stream.position
        block = stream.take(BLOCK)
        if len(block) < BLOCK:
            bad(f"expected a header of {BLOCK} bytes at {at}, found {len(block)}", kind="truncated")
        if not block.strip(b"\0"):
            break
        header = _header(block, at, bad)
        count += 1
        if count > MEMBER_LIMIT:
            bad(f"expected at most {MEMBER_LIMIT} members, found more")
        name = pax.get("path", long_name or header.name)
        size = _pax_size(pax, header.size, bad)
        if header.type in (b"x", b"g", b"L", b"K"):
            limit = PAX_LIMIT if header.type in (b"x", b"g") else NAME_LIMIT
            if header.size > limit:
                bad(f"expected an extended header of at most {limit} bytes, found {header.size}", header.name)
            text = _take_padded(stream, header.size, bad)
            if header.type == b"L":
                long_name = _text(text.rstrip(b"\0"), bad)
            elif header.type == b"x":
                pax = _pax(text, bad)
            elif header.type == b"g" and _pax(text, bad).keys() & {"path", "size", "linkpath"}:
                bad("expected a global header without names and sizes, found some")
            continue
        if header.type in _REFUSED:
            bad(f"expected regular files and folders, found {_REFUSED[header.type]}", name)
        if any(key.startswith("GNU.sparse") for key in pax):
            bad("expected regular files and folders, found a sparse file", name)
        long_name, pax = None, {}
        if header.type == b"5":
            if size:
                bad(f"expected a folder to have no bytes, found {size}", name)
            continue
        if header.type not in _REGULAR:
            bad(f"expected regular files and folders, found type {printable(ascii(header.type)[1:])}", name)
        name = _plain_name(name, bad)
        if name in seen:
            bad("expected each member once, found it twice", name)
        seen.add(name)
        offset = stream.position
        stream.skip(size, place(name, size))
        if len(stream.take(-size % BLOCK)) != -size % BLOCK:
            bad("expected the member padded to 512 bytes, found the end of the file", name, "truncated")
        yield name, offset, size
    if long_name is not None or pax:
        bad("expected a member after its extended header, found the end")
    _check_end(stream, at, bad)


def _check_end(stream: _Stream, at: int, bad: _Bad) -> None:
    """Nothing but whole blocks of zeros, two or more, from `at` on."""
    while rest := stream.take(BUFFER):
        if rest.strip(b"\0"):
            text = f"expected zeros after the last member, found data near {stream.position}"
            bad(text, kind="trailing-data")
    end = stream.position - at
    if end < 2 * BLOCK or end % BLOCK:
        bad(f"expected two or more blocks of zeros at the end, found {end} bytes", kind="truncated")


@dataclass(frozen=True)
class _Header:
    name: str
    size: int
    type: bytes


class _Bad(Protocol):
    def __call__(self, message: str, where: str | None = None, kind: str = "bad-tar") -> NoReturn: ...


def _header(block: bytes, at: int, bad: _Bad) -> _Header:
    if not is_tar_header(block):
        bad(f"expected a header whose checksum is right at {at}, found another", kind="checksum")
    name = block[:100].split(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    return _Header(_text(name, bad), _number(block[124:136], bad), block[156:157])


def _number(text: bytes, bad: _Bad) -> int:
    """A size: octal digits, or GNU's base 256 with the first bit set."""
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    try:
        number = int(text.strip(b" \0") or b"0", 8)
    except ValueError:
        bad(f"expected an octal size, found {printable(ascii(text)[1:])}")
    if number < 0:
        bad(f"expected a size from 0, found {number}")
    return number


def _text(name: bytes, bad: _Bad) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        bad(f"expected member names in UTF-8, found {printable(ascii(name)[1:])}")


def _take_padded(stream: _Stream, size: int, bad: _Bad) -> bytes:
    text = stream.take(size + -size % BLOCK)
    if len(text) < size:
        bad(f"expected an extended header of {size} bytes, found {len(text)}", kind="truncated")
    return text[:size]


def _pax(text: bytes, bad: _Bad) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of an extended header."""
    records: dict[str, str] = {}
    while text:
        digits, space, _ = text.partition(b" ")
        length = int(digits) if space and digits.isdigit() and len(digits) < 7 else 0
        record = text[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            bad(f"expected records of an extended header, found {printable(ascii(text[:40])[1:])}")
        # Other keys (times, owners, comments) may hold bytes of any encoding and are not used.
        if key in (b"path", b"size", b"linkpath") or key.startswith(b"GNU.sparse"):
            records[_text(key, bad)] = _text(value[:-1], bad)
        text = text[length:]
    return records


def _pax_size(pax: dict[str, str], size: int, bad: _Bad) -> int:
    stated = pax.get("size")
    if stated is None:
        return size
    if not (stated.isascii() and stated.isdigit() and len(stated) < 20):
        bad(f"expected a decimal size in the extended header, found {printable(stated)}")
    return int(stated)


def _plain_name(name: str, bad: _Bad) -> str:
    """`name` without a leading `./`; refuses one that would leave the folder."""
    plain = name.removeprefix("./")
    parts = plain.split("/")
    if (
        not plain
        or "\\" in plain
        or "\0" in plain
        or plain.startswith("/")
        or plain[1:2] == ":"
        or ".." in parts
    ):
        bad("expected a name inside the archive, found one that leads elsewhere", name)
    if len(plain.encode("utf-8", "replace")) > NAME_LIMIT:
        bad(f"expected a name of at most {NAME_LIMIT} bytes, found a longer one", name)
    return os.path.normpath(plain)
