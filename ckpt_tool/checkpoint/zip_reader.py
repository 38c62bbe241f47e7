"""Zip archives, read by rules that leave one meaning to every byte.

The central directory and the local headers must say the same, members must follow each other without overlap
or holes, nothing may stand before the first or after the end record, and no size is believed before the file
is known to hold it. Nothing is ever extracted; a member name is an identifier and never a path.

Layout: PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.3. What torch writes: 64-bit end records always, data
descriptors after the data, padding in the local extra field so that data starts at a multiple of 64 bytes
(miniz 3.0.2).
"""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import zip_longest
from threading import Event
from typing import NamedTuple, NoReturn
from zlib import MAX_WBITS

from ckpt_tool.checkpoint.ahead import ahead
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.crc32 import combine
from ckpt_tool.checkpoint.remote_path import RemotePath
from ckpt_tool.checkpoint.spool import Spool
from ckpt_tool.checkpoint.zlibs import InflateError, crc32, decompressobj
from ckpt_tool.errors import fail, printable

STORED, DEFLATED = 0, 8
MEMBER_LIMIT = 100_000
DIRECTORY_LIMIT = 64 << 20
RATIO_LIMIT = 200
_BEFORE = 64  # bytes before a local header that are looked at: what ends the member before it
PADDING_LIMIT = 4096  # zero bytes between two members, as alignment tools leave them
_BLOCK = 256 << 10
AT_ONCE = 1 << 20  # packed bytes of a member that are not worth a thread

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_WIDE, _NARROW = struct.Struct("<4sL2Q"), struct.Struct("<4s3L")  # data descriptors with a signature
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTOR, _UTF8 = 0x0008, 0x0800
_ALLOWED_FLAGS = 0x0006 | _DESCRIPTOR | _UTF8  # and the deflate level
_SAID_TWICE = ("flags", "method", "crc32", "packed size", "size")
# Names in which nothing is to be checked, as torch writes them.
_PLAIN = re.compile(rb"\w[\w.-]*(?:/\w[\w.-]*)*")
_FOLDER = 0x10  # in the external attributes; torch reads such a member as if it had no bytes
_DRIVE = re.compile(r"[A-Za-z]:")


class Member(NamedTuple):
    """One member. Offsets count from the start of the archive; `crc32` is of the inflated bytes, 0 may mean
    that the writer did not compute it."""

    name: str
    method: int
    flags: int
    crc32: int
    packed: int  # bytes in the file
    size: int  # bytes inflated
    header: int
    data: int

    @property
    def stored(self) -> bool:
        return self.method == STORED

    @property
    def checksum(self) -> int | None:
        """The CRC-32, or None where the writer left it out."""
        return None if self.crc32 == 0 and self.size else self.crc32


class _Entry(NamedTuple):
    """A central directory entry."""

    name: str
    raw_name: bytes
    method: int
    flags: int
    crc32: int
    packed: int
    size: int
    header: int


def _usual_head(entry: _Entry) -> int:
    """The bytes of a local header with its name and a usual extra field, which come with one read."""
    return _LOCAL.size + len(entry.raw_name) + 64


class ZipArchive:
    """The archive that `source` holds from its first byte to its last.

    Kinds: `wrong-format` (no zip), `truncated`, `trailing-data`, `bad-zip`, `zip-limit`.
    """

    def __init__(self, source: ByteRange) -> None:
        self.source = source
        self.name = source.name
        self.notes: tuple[str, ...] = ()  # what was read otherwise than it stands
        if source.head(4) not in (b"PK\x03\x04", b"PK\x05\x06"):
            fail(
                "wrong-format",
                f"expected a zip archive, found {source.head(4)!r} at its start",
                file=self.name,
            )
        entries, start = self._directory()
        self.members: dict[str, Member] = {m.name: m for m in self._check_layout(entries, start)}

    def _bad(self, message: str, where: str | None = None, hint: str | None = None) -> NoReturn:
        fail("bad-zip", message, file=self.name, where=where, hint=hint)

    # The end records and the central directory

    def _directory(self) -> tuple[list[_Entry], int]:
        """The entries in the order of the directory, and the offset at which it starts."""
        at, fields = self._end_record()
        disk, start_disk, here, count, size, start = fields
        stop, locator = at, b""
        if at >= _LOCATOR.size:
            locator = self.source.read(at - _LOCATOR.size, _LOCATOR.size)
        if locator[:4] == b"PK\x06\x07":
            stop, wide = self._end_record64(at - _LOCATOR.size, locator)
            narrow = zip(fields, wide, (_FULL16,) * 4 + (_FULL32,) * 2, strict=True)
            for short, long, full in narrow:
                if short not in (long, full):
                    self._bad(f"expected equal numbers in both end records, found {short} and {long}")
            disk, start_disk, here, count, size, start = wide
        if disk or start_disk or here != count:
            self._bad(f"expected one part, found part {disk} with {here} of {count} members")
        if count > MEMBER_LIMIT:
            fail("zip-limit", f"expected at most {MEMBER_LIMIT} members, found {count}", file=self.name)
        if size > DIRECTORY_LIMIT:
            fail(
                "zip-limit",
                f"expected at most {DIRECTORY_LIMIT} bytes of directory, found {size}",
                file=self.name,
            )
        if start + size != stop:
            self._bad(f"expected the directory to end at byte {stop}, found it at {start} to {start + size}")
        return self._entries(self.source.read(start, size), count), start

    def _end_record(self) -> tuple[int, tuple[int, ...]]:
        """(offset, fields) of the one end record, which must reach to the last byte."""
        total = self.source.size
        tail_at = max(0, total - _END.size - _FULL16)
        tail = self.source.read(tail_at, total - tail_at)
        found: list[int] = []
        longer = -1  # where a record ends after which there is something else
        at = tail.rfind(b"PK\x05\x06")
        while at >= 0:
            if at + _END.size <= len(tail):
                end = at + _END.size + int.from_bytes(tail[at + 20 : at + 22], "little")
                if end == len(tail):
                    found.append(at)
                elif end < len(tail) and longer < 0:
                    longer = end
            at = tail.rfind(b"PK\x05\x06", 0, at)
        if len(found) > 1:
            self._bad("expected one end record, found another in its comment")
        if not found and longer >= 0:
            extra = len(tail) - longer
            fail(
                "trailing-data", f"expected the end of the archive, found {extra} bytes more", file=self.name
            )
        if not found:
            message = f"expected an end record in the last {len(tail)} bytes, found none"
            fail("truncated", message, file=self.name)
        _, *fields, _ = _END.unpack_from(tail, found[0])
        return tail_at + found[0], tuple(fields)

    def _end_record64(self, stop: int, locator: bytes) -> tuple[int, tuple[int, ...]]:
        _, disk, at, disks = _LOCATOR.unpack(locator)
        if disk or disks > 1:
            self._bad(f"expected one part, found part {disk} of {disks}")
        if at + _END64.size != stop:
            self._bad(
                f"expected a 64-bit end record at byte {stop - _END64.size}, found its place given as {at}"
            )
        magic, length, _, _, *wide = _END64.unpack(self.source.read(at, _END64.size))
        if magic != b"PK\x06\x06" or length != _END64.size - 12:
            self._bad(f"expected a 64-bit end record at byte {at}, found another record")
        return at, tuple(wide)

    def _entries(self, directory: bytes, count: int) -> list[_Entry]:
        entries: list[_Entry] = []
        names: set[str] = set()
        at = 0
        while at < len(directory):
            if len(entries) == count or at + _CENTRAL.size > len(directory):
                self._bad(
                    f"expected {count} entries in the directory, found other bytes after {len(entries)}"
                )
            entry, at = self._entry(directory, at)
            if entry.name in names:
                self._bad("expected each member once, found it twice", entry.name)
            names.add(entry.name)
            entries.append(entry)
        if len(entries) != count:
            self._bad(f"expected {count} entries in the directory, found {len(entries)}")
        return entries

    def _entry(self, directory: bytes, at: int) -> tuple[_Entry, int]:
        fields = _CENTRAL.unpack_from(directory, at)
        (
            magic,
            made_by,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            n_name,
            n_extra,
            n_note,
            disk,
            _,
            attrs,
            header,
        ) = fields
        end = at + _CENTRAL.size + n_name + n_extra + n_note
        if magic != b"PK\x01\x02" or end > len(directory):
            self._bad(f"expected a directory entry at its byte {at}, found {directory[at : at + 4]!r}")
        raw = directory[at + _CENTRAL.size : at + _CENTRAL.size + n_name]
        name = self._checked_name(raw, flags)
        if made_by >> 8 == 3 and stat.S_IFMT(attrs >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            self._bad("expected a plain file, found a link or a special file", name)
        if name.endswith("/") != bool(attrs & _FOLDER) and (attrs & _FOLDER or size):
            self._bad("expected a folder's name to end in `/` and no other's, found it otherwise", name)
        if flags & ~_ALLOWED_FLAGS:
            what = "an encrypted one" if flags & 0x2041 else f"flags {flags:#06x}"
            self._bad(f"expected a plain member, found {what}", name)
        if method not in (STORED, DEFLATED):
            self._bad(f"expected a stored or deflated member, found compression method {method}", name)
        if n_extra:
            extra = directory[at + _CENTRAL.size + n_name : end - n_note]
            wanted = [v for v, full in ((size, _FULL32), (packed, _FULL32), (header, _FULL32)) if v == full]
            wide = self._wide_numbers(extra, len(wanted), name, exact=True)
            numbers = iter(wide)
            size = next(numbers, size) if size == _FULL32 else size
            packed = next(numbers, packed) if packed == _FULL32 else packed
            header = next(numbers, header) if header == _FULL32 else header
        if disk not in (0, _FULL16):
            self._bad(f"expected one part, found the member in part {disk}", name)
        if method == STORED and packed != size:
            self._bad(f"expected equal sizes of a stored member, found {packed} and {size}", name)
        return _Entry(name, raw, method, flags, crc, packed, size, header), end

    def _checked_name(self, raw: bytes, flags: int) -> str:
        if _PLAIN.fullmatch(raw):
            return raw.decode("ascii")
        try:
            name = raw.decode("utf-8" if flags & _UTF8 or raw.isascii() else "cp437")
        except UnicodeDecodeError:
            self._bad(f"expected a member name in UTF-8, found {raw[:80]!r}")
        if "\\" in name:  # as some writers on Windows part it, against APPNOTE 4.4.17
            name = name.replace("\\", "/")
            self.notes = (
                f"member names such as {printable(raw.decode('cp437'), 80)} were read with / for \\",
            )
        parts = name.removesuffix("/").split("/")
        if any(p in ("", ".", "..") for p in parts) or _DRIVE.match(name) or not name.isprintable():
            message = "expected a relative member name of visible characters, found another"
            self._bad(message, name, "unpack the archive and give the folder")
        return name

    def _wide_numbers(self, extra: bytes, count: int, name: str, *, exact: bool) -> list[int]:
        """The first `count` numbers of the zip64 extra field; [] where it is not needed or absent."""
        found: bytes | None = None
        at = 0
        while at + 4 <= len(extra):
            kind, size = struct.unpack_from("<2H", extra, at)
            if at + 4 + size > len(extra):
                self._bad(f"expected an extra field of {size} bytes, found {len(extra) - at - 4}", name)
            if kind == 1:
                if found is not None:
                    self._bad("expected one zip64 field, found two", name)
                found = extra[at + 4 : at + 4 + size]
            at += 4 + size
        if extra[at:].strip(b"\0"):
            self._bad("expected whole extra fields, found bytes after the last", name)
        if not count or found is None:
            return []
        if len(found) < 8 * count or (exact and len(found) not in (8 * count, 8 * count + 4)):
            self._bad(f"expected {count} numbers in the zip64 field, found {len(found)} bytes", name)
        return list(struct.unpack_from(f"<{count}Q", found))

    # The local headers

    def _check_layout(self, entries: list[_Entry], directory: int) -> Iterator[Member]:
        """Members in file order; every byte up to the directory is a header, data, a descriptor or zero
        padding."""
        ordered = sorted(entries, key=lambda e: e.header)
        if (ordered[0].header if ordered else directory) != 0:
            where = ordered[0].name if ordered else None
            found = ordered[0].header if ordered else directory
            self._bad(f"expected the first member at byte 0, found {found} bytes before it", where)
        if ordered and ordered[-1].header >= directory:
            last = ordered[-1]
            self._bad(
                f"expected a header before byte {directory}, found its place given as {last.header}",
                last.name,
            )
        self.source.expect(
            (
                max(0, e.header - _BEFORE),
                min(_BEFORE + _LOCAL.size + len(e.raw_name) + 64, directory - e.header),
            )
            for e in ordered
        )
        head = b""  # of the member, where it was read with what stands before it
        for entry, follower in zip_longest(ordered, ordered[1:]):
            limit = directory if follower is None else follower.header
            member = self._member(entry, limit, head)
            end, head = member.data + member.packed, b""
            if entry.flags & _DESCRIPTOR:
                wanted = _WIDE.size
                if follower is not None and limit - end <= _BEFORE:
                    wanted = limit - end + _usual_head(follower)
                tail = self.source.read(end, min(wanted, directory - end))
                end, head = end + self._descriptor(entry, end, limit, tail[: _WIDE.size]), tail[limit - end :]
            if end != limit:
                gap = self.source.read(end, min(limit - end, PADDING_LIMIT + 1))
                if len(gap) > PADDING_LIMIT or gap.strip(b"\0"):
                    after = "the directory" if follower is None else printable(follower.name)
                    self._bad(f"expected {after} at byte {end}, found other bytes up to {limit}", entry.name)
            yield member

    def _member(self, entry: _Entry, limit: int, head: bytes) -> Member:
        name = entry.name
        start = entry.header + _LOCAL.size + len(entry.raw_name)
        if start > limit:
            self._bad(
                f"expected {start - entry.header} bytes of header, found an overlap at byte {limit}", name
            )
        head = head or self.source.read(entry.header, min(_usual_head(entry), limit - entry.header))
        magic, _, flags, method, _, _, crc, packed, size, n_name, n_extra = _LOCAL.unpack_from(head)
        if magic != b"PK\x03\x04":
            self._bad(f"expected a local header at byte {entry.header}, found {magic!r}", name)
        data = start + n_extra
        raw = head[_LOCAL.size : _LOCAL.size + len(entry.raw_name)]
        if n_name != len(entry.raw_name) or raw != entry.raw_name:
            self._bad(f"expected the name of the directory in the local header, found {raw[:80]!r}", name)
        if data + entry.packed > limit:
            self._bad(
                f"expected {entry.packed} bytes from byte {data}, found an overlap at byte {limit}", name
            )
        if n_extra:
            at = start - entry.header
            extra = head[at : at + n_extra]
            if len(extra) < n_extra:
                extra = self.source.read(start, n_extra)
            if size == _FULL32 or packed == _FULL32:
                wide = iter(
                    self._wide_numbers(extra, (size == _FULL32) + (packed == _FULL32), name, exact=False)
                )
                size = next(wide, size) if size == _FULL32 else size
                packed = next(wide, packed) if packed == _FULL32 else packed
        wanted = (entry.flags, entry.method, entry.crc32, entry.packed, entry.size)
        found = (flags, method, crc, packed, size)
        for what, local, central in zip(_SAID_TWICE, found, wanted, strict=True) if found != wanted else ():
            later = entry.flags & _DESCRIPTOR and what not in ("flags", "method")  # said after the data
            if local != central and not (later and local in (0, _FULL32)):
                self._bad(
                    f"expected {what} {central} as in the directory, found {local} in the local header", name
                )
        return Member(
            name, entry.method, entry.flags, entry.crc32, entry.packed, entry.size, entry.header, data
        )

    def _descriptor(self, entry: _Entry, at: int, limit: int, raw: bytes) -> int:
        """The length of the data descriptor at `at`: with or without signature, 32 or 64 bits wide. `raw` are
        at most 24 bytes from there on."""
        usual = {_WIDE.size: _WIDE, _NARROW.size: _NARROW}.get(limit - at)
        told = (entry.crc32, entry.packed, entry.size)
        if usual and max(told) <= _FULL32 and raw.startswith(usual.pack(b"PK\x07\x08", *told)):
            return usual.size  # as torch writes it
        raw = raw[: max(0, limit - at)]
        matching = [
            len(form)
            for magic in (b"PK\x07\x08", b"")
            for width in (4, 8)
            if max(entry.packed, entry.size) < 1 << (8 * width)
            and raw.startswith(
                form := magic
                + entry.crc32.to_bytes(4, "little")
                + entry.packed.to_bytes(width, "little")
                + entry.size.to_bytes(width, "little")
            )
        ]
        if not matching:
            message = (
                f"expected a data descriptor with crc32 {entry.crc32} and size {entry.size} at byte {at}"
            )
            self._bad(f"{message}, found {raw[:24].hex()}", entry.name)
        exact = [n for n in matching if at + n == limit]
        return (exact or matching)[0]

    # Contents

    def read(self, member: Member, limit: int) -> bytes:
        """A small member whole, its checksum compared; refuses more than `limit` bytes before reading."""
        if member.size > limit:
            fail(
                "zip-limit",
                f"expected at most {limit} bytes, found {member.size}",
                file=self.name,
                where=member.name,
            )
        return b"".join(self.blocks(member))

    def blocks(self, member: Member) -> Generator[bytes, None, None]:
        """The inflated bytes of a member in blocks of at most 256 KiB; the last comes only after the checksum
        has been compared. Kinds: `zip-limit` (a ratio above 200, more than the declared size), `bad-zip`,
        `checksum`."""
        crc, last = 0, b""
        for block in self._stored(member) if member.stored else self._inflated(member):
            if last:
                yield last
            crc, last = crc32(block, crc), block
        self._compare(member, crc)
        if last:
            yield last

    def _compare(self, member: Member, crc: int) -> None:
        if member.checksum is not None and crc != member.crc32:
            message = f"expected crc32 {member.crc32:#010x}, found {crc:#010x}"
            fail("checksum", message, file=self.name, where=member.name)

    def check(self, member: Member, known: Iterable[tuple[int, int, int]] = ()) -> None:
        """Read a member through and compare its checksum, a large stored one on this machine on two cores.
        What is `known` of a stored one is not read again: (first byte of the member, bytes, their CRC-32).
        Kinds: those of `blocks`."""
        if member.stored and (runs := sorted(known)):
            self._compare(member, self._joined(member, runs))
            return
        if not member.stored or member.packed <= AT_ONCE or isinstance(self.source.path, RemotePath):
            for _ in self.blocks(member):
                pass
            return
        from concurrent.futures import ThreadPoolExecutor

        middle, left = member.packed // 2, Event()
        with ThreadPoolExecutor(1) as other:
            try:
                try:
                    right = other.submit(self._crc, member, middle, member.packed, left).result
                except RuntimeError:  # a limit of threads
                    right = partial(self._crc, member, middle, member.packed, left)
                crc = self._crc(member, 0, middle, left)
                self._compare(member, combine(crc, right(), member.packed - middle))
            finally:
                left.set()  # a failure or a signal does not wait for the other half

    def _joined(self, member: Member, runs: Iterable[tuple[int, int, int]]) -> int:
        """The checksum of a stored member of which these `runs` are known; of two that overlap the first."""
        at = crc = 0
        for start, size, own in (*runs, (member.size, 0, 0)):
            if at <= start <= member.size - size:
                between = self._crc(member, at, start, Event())
                crc = combine(combine(crc, between, start - at), own, size)
                at = start + size
        return crc

    def _crc(self, member: Member, start: int, stop: int, left: Event) -> int:
        """Of bytes `start` to `stop` of a stored member; nothing is read any more once nobody asks for it."""
        crc, room = 0, memoryview(bytearray(_BLOCK))
        for at in range(start, stop, _BLOCK):
            if left.is_set():
                break
            block = room[: min(_BLOCK, stop - at)]
            self.source.read_into(member.data + at, block, member.name)
            crc = crc32(block, crc)
        return crc

    def _stored(self, member: Member) -> Iterator[bytes]:
        for at in range(0, member.packed, _BLOCK):
            yield self.source.read(member.data + at, min(_BLOCK, member.packed - at))

    def _inflated(self, member: Member) -> Iterator[bytes]:
        name = member.name
        if member.size > RATIO_LIMIT * member.packed:
            message = (
                f"expected at most {RATIO_LIMIT} times the {member.packed} packed bytes, found {member.size}"
            )
            fail("zip-limit", message, file=self.name, where=name)
        stream = decompressobj(-MAX_WBITS)
        made = 0
        for packed in self._stored(member):
            while packed:
                try:
                    block = stream.decompress(packed, _BLOCK)
                except InflateError as error:
                    self._bad(f"expected deflated data, found an error after {made} bytes: {error}", name)
                made += len(block)
                if made > member.size:
                    message = f"expected {member.size} bytes inflated, found more"
                    fail("zip-limit", message, file=self.name, where=name)
                if block:
                    yield block
                if stream.unused_data:
                    self._bad("expected the deflated data to fill the member, found bytes after it", name)
                packed = stream.unconsumed_tail
        # What the window still holds, when the input ended with a block full to the brim.
        while not stream.eof and (block := stream.decompress(b"", _BLOCK)):
            made += len(block)
            if made > member.size:
                fail(
                    "zip-limit",
                    f"expected {member.size} bytes inflated, found more",
                    file=self.name,
                    where=name,
                )
            yield block
        if not stream.eof or made != member.size:
            self._bad(f"expected {member.size} bytes inflated, found {made}", name)

    def inflate(self, member: Member, spool: Spool) -> None:
        """Append a member to `spool`, its checksum compared. A large one is inflated while what is inflated
        already is written."""
        large = member.packed > AT_ONCE
        blocks = ahead(lambda: self.blocks(member)) if large else self.blocks(member)
        with closing(blocks):
            for block in blocks:
                spool.write(block)

    def spool(self, member: Member) -> ByteRange:
        """A deflated member inflated once into a temporary file without a name, its checksum compared."""
        spool = Spool()
        try:
            self.inflate(member, spool)
            return ByteRange(spool.path, self.name)  # which opens the file for itself
        finally:
            spool.close()
