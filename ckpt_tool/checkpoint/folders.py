"""Where a checkpoint's files lie: a directory, or an archive read as if it were one."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, BinaryIO

from ckpt_tool.checkpoint.base import Check, Document
from ckpt_tool.checkpoint.byte_range import ByteRange, Window
from ckpt_tool.checkpoint.hub_cache import blob_of, repository_of
from ckpt_tool.checkpoint.weight_sets import ORIGINAL_FOLDER, TEMPLATE_FOLDER, is_weights
from ckpt_tool.errors import CkptToolError, fail, near
from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from ckpt_tool.checkpoint.no_weights import Around

CHECKED_BYTES = 64 << 20
_BUFFER = 1 << 20
SURVEYED = 20_000  # files; a message needs no more
NEAR = 2000  # names that are compared with one that is not there
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Place:
    """The bytes of one file: all of the file at `path`, or the part `window` of it."""

    path: Path
    size: int
    window: Window | None = None
    check: Check = lambda known: None


@dataclass(frozen=True)
class ArchivedDocument(Document):
    """A document that lies inside the file at `path`."""

    window: Window = (0, 0)

    def read(self, limit: int = 16 << 20) -> bytes:
        if self.size > limit:
            fail("bad-config", f"expected at most {limit} bytes, found {self.size}", file=self.name)
        data = ByteRange(self.path, self.name, self.window)
        try:
            found = data.read(0, self.size)
        finally:
            data.close()
        self.refuse_stand_in(found)
        return found

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Raw(ByteRange(self.path, self.name, self.window)), _BUFFER)


class _Raw(io.RawIOBase):
    """A range as an open file."""

    def __init__(self, data: ByteRange) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), self._data.size - self._at)
        self._data.read_into(self._at, view[:count])
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = min(offset + (0, self._at, self._data.size)[whence], self._data.size)
        return self._at

    def close(self) -> None:
        self._data.close()
        super().close()


class Folder(ABC):
    """Files by name, with `/` between the parts of a name."""

    label: str  # how messages call it
    around: Around | None = None  # how to speak of it, where it is neither a directory nor an archive

    @abstractmethod
    def names(self) -> list[str]:
        """The files directly in it, and those in its folders `original` and `additional_chat_templates`."""

    def has(self, name: str) -> bool:
        """Whether the file `name` is directly in it."""
        return name in self.names()

    def is_link(self, name: str) -> bool:
        """Whether the file or folder `name` is a link; in an archive none is."""
        return False

    @abstractmethod
    def below(self, enter: Callable[[str], bool], depth: int = 2) -> list[str]:
        """The files in the folders in it, down to `depth` levels, in folders whose names `enter` accepts."""

    @abstractmethod
    def survey(self) -> list[str]:
        """The files in it and in the folders in it, down to four levels, as far as they can be listed: to say
        what a folder without weights is."""

    @abstractmethod
    def place(self, name: str) -> Place:
        """Where the file `name` lies; it is a regular file."""

    def outer(self) -> Folder | None:
        """The folder around it, if there is one that may hold files of the same checkpoint."""
        return None

    def document(self, name: str, called: str | None = None) -> Document:
        """The file `name` as a document, listed as `called`."""
        place = self.place(name)
        if place.window is None:
            return Document(called or name, place.path, place.size)
        if place.size <= CHECKED_BYTES:  # nobody reads a larger document
            place.check(())
        return ArchivedDocument(called or name, place.path, place.size, place.window)

    def close(self) -> None:
        """Give back what it holds open."""
        return None


class Directory(Folder):
    """A directory of the file system; links are followed for reading."""

    def __init__(self, path: Path) -> None:
        self.path, self.label = path, path.name or str(path)

    def names(self) -> list[str]:
        found = self._list(self.path)
        for folder in (ORIGINAL_FOLDER, TEMPLATE_FOLDER):
            if folder[:-1] in found and (self.path / folder).is_dir():
                found += [folder + name for name in self._list(self.path / folder)]
        return found

    def below(self, enter: Callable[[str], bool], depth: int = 2) -> list[str]:
        found: list[str] = []
        for name in self._list(self.path) if depth else []:
            if enter(name) and (self.path / name).is_dir():
                inner = Directory(self.path / name)
                files = [n for n in inner._list(inner.path) if not (inner.path / n).is_dir()]
                found += [f"{name}/{n}" for n in (*files, *inner.below(enter, depth - 1))]
        return found

    def survey(self) -> list[str]:
        found: list[str] = []
        level = [""]
        for _ in range(5):
            deeper: list[str] = []
            for prefix in level:
                try:
                    entries = sorted(os.scandir(self.path / prefix), key=lambda e: e.name)
                except OSError:
                    continue
                folders = {e.name for e in entries if _is_folder(e)}
                found += [prefix + e.name for e in entries if e.name not in folders]
                deeper += [f"{prefix}{e.name}/" for e in entries if e.name in folders - {".git"}]
                if len(found) + len(deeper) > SURVEYED:
                    return found
            level = deeper
        return found

    def _list(self, path: Path) -> list[str]:
        try:
            return sorted(os.listdir(path))
        except OSError as error:
            fail("read-failed", f"the folder cannot be listed: {error.strerror}", file=self.label)

    def place(self, name: str) -> Place:
        path = self.path / name
        status = status_of(path, name)
        if not stat.S_ISREG(status.st_mode):
            # zero_to_fp32.py takes the name of a file for that of a folder since DeepSpeed 0.15.3
            inner = stat.S_ISDIR(status.st_mode) and any(map(is_weights, os.listdir(path)))
            hint = f"put what belongs to the model beside the weights in it, and give --in {quote(str(path))}"
            message = f"expected a file, found {kind_of(status)}{' of weights' * inner}"
            fail("wrong-format", message, file=name, hint=hint if inner else None)
        blob = blob_of(path, status.st_size)
        return Place(path, status.st_size) if blob is None else Place(blob, blob.stat().st_size)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def is_link(self, name: str) -> bool:
        return (self.path / name).is_symlink()

    def outer(self) -> Folder | None:
        parent = Path(os.path.abspath(self.path)).parent
        return Directory(parent) if parent != self.path else None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links, say
        return False


def status_of(path: Path, name: str) -> os.stat_result:
    """What `path` leads to, links followed. Kinds: `not-found`, `bad-input` (a loop of links, a link to
    nothing, no valid path), `read-failed`."""
    try:
        return os.stat(path)
    except ValueError:
        fail("bad-input", "expected a path, found a NUL character in it", file=name)
    except OSError as error:
        if error.errno == errno.ELOOP:
            fail("bad-input", "expected a file, found a loop of symbolic links", file=name)
        if error.errno == errno.ENOENT and path.is_symlink():
            cached = repository_of(path.absolute())
            fail(
                "bad-input",
                f"expected a file, found a link to {os.readlink(path)}, which is not there",
                file=name,
                hint=None if cached is None else f"`hf download {cached}` fetches it into the cache again",
            )
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            fail("not-found", "expected a checkpoint, found nothing of that name", file=name)
        if error.errno == errno.ENAMETOOLONG:
            fail("bad-input", "expected a path, found one that is too long", file=name)
        fail("read-failed", f"cannot be read: {error.strerror}", file=name)


def status_given(given: Path, text: str) -> os.stat_result:
    """What the path that a user gave as `text` leads to; where nothing is there, with what may have been
    meant."""
    try:
        return status_of(given, text)
    except CkptToolError as error:
        if error.kind != "not-found":
            raise
        hint = near(given.name, _beside(given.parent))
        if hint is None and _HUB_NAME.fullmatch(text):
            hint = f"hf://{text} is the repository of that name on the Hub"
        raise CkptToolError(*(replace(p, hint=hint) for p in error.problems)) from None


def _beside(path: Path) -> list[str]:
    try:
        return os.listdir(path)[:NEAR]
    except OSError:
        return []


def kind_of(status: os.stat_result) -> str:
    """What a path leads to, in words."""
    tests = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    )
    return next((words for test, words in tests if test(status.st_mode)), "a regular file")
