"""Files and folders that are written beside their place and moved there when they are whole.

Each is locked while the process that writes it lives. One that is killed leaves it, unlocked, and the next
that writes into the same folder removes it. Where a file system has no locks nothing is removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".ckpt-tool-aside-"
_NAME = re.compile(re.escape(PREFIX) + r"[0-9a-f]{16}", re.ASCII)


@contextmanager
def file(parent: str) -> Iterator[tuple[str, int]]:
    """The path and descriptor of a new file in `parent`; at the end it is gone, unless it was moved."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with _held(parent, lambda path: os.open(path, flags, 0o666)) as (path, descriptor):
        try:
            yield path, descriptor
        finally:
            with suppress(OSError):
                os.unlink(path)


@contextmanager
def folder(parent: str) -> Iterator[Path]:
    """The path of a new folder in `parent`; at the end it is gone, with what is still in it."""

    def make(path: str) -> int:
        os.mkdir(path)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    with _held(parent, make) as (path, _):
        try:
            yield Path(path)
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _held(parent: str, make: Callable[[str], int]) -> Iterator[tuple[str, int]]:
    while True:
        path = os.path.join(parent, PREFIX + os.urandom(8).hex())
        descriptor = make(path)
        locked = _locked(descriptor)
        if locked is None or (locked and _is_at(path, descriptor)):
            break
        os.close(descriptor)  # another process found it before it was locked: it took it away, or is about to
        with suppress(OSError):
            (os.rmdir if os.path.isdir(path) else os.unlink)(path)
    try:
        yield path, descriptor
    finally:
        os.close(descriptor)


def sweep(parent: str, first: Callable[[Path], object] = lambda path: None) -> None:
    """Remove what killed processes of this user left in `parent`; `first` sees each before it goes."""
    with suppress(OSError):
        for entry in list(os.scandir(parent)):
            if _NAME.fullmatch(entry.name) and not entry.is_symlink():
                with suppress(OSError):
                    _remove_stale(Path(entry.path), first)


def _remove_stale(path: Path, first: Callable[[Path], object]) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mine = os.fstat(descriptor).st_uid == os.geteuid()
        if not mine or not _locked(descriptor) or not _is_at(os.fspath(path), descriptor):
            return
        first(path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool | None:
    """Whether the lock could be had; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(path: str, descriptor: int) -> bool:
    with suppress(OSError):
        there, own = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
        return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)
    return False
