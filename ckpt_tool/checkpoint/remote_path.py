"""A file that is read over the network, where containers expect the path of one.

Readers of containers know `ByteRange` and paths. A `RemotePath` is a path that leads nowhere on this machine
and carries what serves its bytes, so that no reader of a container knows the difference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PosixPath
from typing import Any, Literal, Protocol

Way = Literal["stream", "download"]  # how repositories of the Hub are read

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://")
_COLLAPSED = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")  # what a path makes of `//`


class Remote(Protocol):
    """A file that somebody serves. `stamp` is what tells this version of it from another, as JSON values."""

    size: int

    @property
    def stamp(self) -> Mapping[str, Any]: ...

    def read_into(self, at: int, buffer: memoryview, name: str, where: str | None) -> None:
        """Fill `buffer` from byte `at` on; `name` and `where` say in an error what was read."""

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """These (first byte, bytes) will be read soon: begin to fetch them."""

    def check_unchanged(self, name: str) -> None:
        """Fail with `input-changed` where another version is served now."""


class RemotePath(PosixPath):
    """`PosixPath` of an address. Paths made from it (`parent`, `/`) carry no file."""

    _remote: Remote | None = None

    @classmethod
    def to(cls, address: str, remote: Remote | None = None) -> RemotePath:
        made = cls(address)
        made._remote = remote
        return made

    @property
    def remote(self) -> Remote:
        if self._remote is None:
            raise ValueError(f"nothing serves {self}")
        return self._remote

    def __str__(self) -> str:
        return _COLLAPSED.sub(r"\1://", super().__str__())

    # Nothing of it is on this machine, whatever a folder here may be called.

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        raise FileNotFoundError(2, os.strerror(2), str(self))

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return False

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return False

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return False

    def is_symlink(self) -> bool:
        return False

    def resolve(self, strict: bool = False) -> RemotePath:
        return self

    def absolute(self) -> RemotePath:
        return self


def remote_of(path: Path) -> Remote | None:
    """What serves the file, where it is not on this machine."""
    return path.remote if isinstance(path, RemotePath) else None


def scheme_of(text: str) -> str | None:
    """`hf` of `hf://org/name`; None for a path."""
    found = _SCHEME.match(text)
    return None if found is None else found["scheme"].lower()


def without_secrets(address: str) -> str:
    """An address as it may be shown and kept: without the name and password before its host, and without what
    follows a `?` of http (which signs an address for whoever holds it)."""
    found = _SCHEME.match(address)
    if found is None:
        return address
    rest = address[found.end() :]
    if found["scheme"].lower() in ("http", "https"):
        rest = rest.partition("?")[0].partition("#")[0]
    host, slash, path = rest.partition("/")
    return found[0] + (host.rpartition("@")[2] if found["scheme"].lower() != "hf" else host) + slash + path
