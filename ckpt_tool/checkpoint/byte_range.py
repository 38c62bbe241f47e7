"""A run of bytes of an open file: the whole file, or the place where an archive keeps a member.

Everything is read with pread into the caller's memory; nothing is mapped, so a file that shrinks while it
is read gives an error and not a signal.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path

from ckpt_tool.checkpoint.base import Fingerprint
from ckpt_tool.checkpoint.remote_path import RemotePath
from ckpt_tool.errors import fail

Window = tuple[int, int]  # (offset of the first byte in the file, number of bytes)
Wanted = tuple[int, memoryview, str | None]  # (offset, what is to be filled, its name in an error)
NEIGHBOURS = 400  # pieces that one call fills: the kernel takes 1024 buffers, and gaps have one too
_GAP = memoryview(bytearray(4096))  # what lies between two neighbours, which nobody looks at


class ByteRange:
    """`size` bytes of the file at `path`, addressed from 0; `name` is how messages call it. One whose path is
    remote is a `RemoteRange`."""

    def __new__(cls, path: Path | ByteRange, *_: object, **__: object) -> ByteRange:
        """The class that reads from `path`."""
        return super().__new__(RemoteRange if isinstance(path, RemotePath) else cls)

    def __init__(self, path: Path, name: str, window: Window | None = None) -> None:
        self.path = path
        self.name = name
        try:
            # O_NONBLOCK: a FIFO that took the file's place must not hang the opening.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            kind = "limits" if error.errno in (errno.EMFILE, errno.ENFILE) else "read-failed"
            fail(kind, f"cannot be opened: {error.strerror}", file=name)
        self.fingerprint = Fingerprint.of(self.descriptor)
        self.base, self.size = (0, self.fingerprint.size) if window is None else window
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            self.close()
            fail("wrong-format", "expected a regular file, found something else", file=name)
        if self.base + self.size > self.fingerprint.size:
            self.close()
            fail(
                "truncated",
                f"expected at least {self.base + self.size} bytes, found {self.fingerprint.size}",
                file=name,
            )

    def read_into(self, offset: int, buffer: memoryview, where: str | None = None) -> None:
        """Fill `buffer` (bytes) from `offset` on; `where` names the tensor or member in an error."""
        if offset < 0 or offset + len(buffer) > self.size:
            raise ValueError(f"bytes {offset} to {offset + len(buffer)} are outside 0 to {self.size}")
        done, at = 0, self.base + offset
        while done < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[done:]], at + done)
            except OSError as error:
                fail(
                    "read-failed",
                    f"cannot be read at byte {at + done}: {error.strerror}",
                    file=self.name,
                    where=where,
                )
            if count == 0:
                fail(
                    "input-changed",
                    f"expected {len(buffer)} bytes at {at}, found the end of the file after {done}",
                    file=self.name,
                    where=where,
                )
            done += count

    def read_each(self, pieces: Iterable[Wanted]) -> None:
        """Fill each buffer from its offset on, neighbours in the file with one call."""
        near: list[Wanted] = []
        rooms: list[memoryview] = []
        start = end = 0
        for piece in sorted(pieces, key=itemgetter(0)):
            at, room, _ = piece
            gap = at - end
            if near and not (0 <= gap <= len(_GAP) and len(near) < NEIGHBOURS):
                self._read_near(near, rooms, start, end)
                near, rooms = [], []
            if not near:
                start = at
            elif gap:
                rooms.append(_GAP[:gap])
            near.append(piece)
            rooms.append(room)
            end = at + len(room)
        if near:
            self._read_near(near, rooms, start, end)

    def _read_near(self, near: Iterable[Wanted], rooms: Sequence[memoryview], start: int, end: int) -> None:
        """Fill neighbours, which are all in `rooms` with what lies between them."""
        if start < 0 or end > self.size or self._preadv(rooms, start) != end - start:
            for piece in near:  # which says what is wrong, and where
                self.read_into(*piece)

    def _preadv(self, rooms: Sequence[memoryview], offset: int) -> int:
        """The bytes that were read into `rooms`; none where that fails."""
        try:
            return os.preadv(self.descriptor, rooms, self.base + offset)
        except OSError:
            return -1

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes; the caller bounds `size`."""
        if offset + size <= self.size:
            try:
                data = os.pread(self.descriptor, size, self.base + offset)
            except OSError as error:
                at = self.base + offset
                fail("read-failed", f"cannot be read at byte {at}: {error.strerror}", file=self.name)
            if len(data) == size:
                return data  # the usual case, without a second copy
        buffer = bytearray(size)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def expect(self, ranges: Iterable[Window]) -> None:
        """These windows will be read soon. What is on this machine needs no preparation."""

    def head(self, size: int) -> bytes:
        """The first `size` bytes, or all there are."""
        return self.read(0, min(size, self.size))

    def check_unchanged(self) -> None:
        """Fail with `input-changed` when the open file, or what its path leads to, is another than before."""
        now = Fingerprint.of(self.descriptor)
        try:
            there: os.stat_result | None = os.stat(self.path)
        except OSError:
            there = None
        same_place = there is not None and (there.st_dev, there.st_ino) == (now.device, now.inode)
        if not self.fingerprint.still(now) or not same_place:
            before = self.fingerprint
            held = f"{now.size} bytes" if now.size != before.size else "as many that were touched since"
            hint = "nothing else may write to the input while it is read"
            if (now.size, now.mtime_ns) == (before.size, before.mtime_ns):
                held += ", though the time of the last write is as it was"
                hint += ", nor set its times or attributes, nor link it for a while, which look alike"
            fail(
                "input-changed",
                f"expected the file as it was opened ({before.size} bytes, inode {before.inode}), "
                f"found {held if same_place else 'another file'}",
                file=self.name,
                hint=hint if same_place else "nothing else may replace the input while it is read",
            )

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class RemoteRange(ByteRange):
    """Bytes of a file that is read over the network. It has no descriptor, and what it holds open belongs to
    whoever opened the checkpoint."""

    path: RemotePath

    def __init__(self, path: Path, name: str, window: Window | None = None) -> None:
        assert isinstance(path, RemotePath)
        self.path, self.name, self.descriptor = path, name, -1
        served = path.remote.size
        known = zlib.crc32(repr(sorted(path.remote.stamp.items())).encode())
        self.fingerprint = Fingerprint(-1, known, served, 0)
        self.base, self.size = (0, served) if window is None else window
        if self.base + self.size > served:
            message = f"expected at least {self.base + self.size} bytes, found {served}"
            fail("truncated", message, file=name)

    def read_into(self, offset: int, buffer: memoryview, where: str | None = None) -> None:
        if offset < 0 or offset + len(buffer) > self.size:
            raise ValueError(f"bytes {offset} to {offset + len(buffer)} are outside 0 to {self.size}")
        self.path.remote.read_into(self.base + offset, buffer, self.name, where)

    def read_each(self, pieces: Iterable[Wanted]) -> None:
        for piece in pieces:
            self.read_into(*piece)

    def read(self, offset: int, size: int) -> bytes:
        buffer = bytearray(size)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def expect(self, ranges: Iterable[Window]) -> None:
        self.path.remote.expect((self.base + offset, size) for offset, size in ranges)

    def check_unchanged(self) -> None:
        self.path.remote.check_unchanged(self.name)

    def close(self) -> None:
        """Nothing: the connections are closed with the checkpoint."""


class Part(ByteRange):
    """A part of an open range, for which the range stays responsible: closing it does nothing."""

    def __new__(cls, *_: object, **__: object) -> Part:
        return object.__new__(cls)

    def __init__(self, whole: ByteRange, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > whole.size:
            message = f"expected at least {offset + size} bytes, found {whole.size}"
            fail("truncated", message, file=whole.name)
        self.path, self.name = whole.path, whole.name
        self.descriptor, self.fingerprint = whole.descriptor, whole.fingerprint
        self.base, self.size = whole.base + offset, size
        self._whole, self._offset = whole, offset

    def read_into(self, offset: int, buffer: memoryview, where: str | None = None) -> None:
        if offset < 0 or offset + len(buffer) > self.size:
            raise ValueError(f"bytes {offset} to {offset + len(buffer)} are outside 0 to {self.size}")
        self._whole.read_into(self._offset + offset, buffer, where)

    def read_each(self, pieces: Iterable[Wanted]) -> None:
        for piece in pieces:
            self.read_into(*piece)

    def read(self, offset: int, size: int) -> bytes:
        if offset + size > self.size:
            raise ValueError(f"bytes {offset} to {offset + size} are outside 0 to {self.size}")
        return self._whole.read(self._offset + offset, size)

    def expect(self, ranges: Iterable[Window]) -> None:
        self._whole.expect((self._offset + offset, size) for offset, size in ranges)

    def close(self) -> None:
        """Nothing: the whole is closed by who opened it."""
