"""The system calls that change the disk, in one place, so that a test can make any of them fail or stop.

They raise plain `OSError`; `failure` turns one into the error a user reads.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from ckpt_tool.errors import CkptToolError, Problem

pwrite = os.pwrite
fsync = os.fsync
fdatasync = os.fdatasync
fallocate = os.posix_fallocate
mkdir = os.mkdir
unlink = os.unlink
statvfs = os.statvfs

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2  # linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2
WORTH_WRITING = 128 * 1024  # bytes; asking for less costs more than it saves
AT_ONCE = 256 * 1024  # bytes of a write: larger ones can take eight times as long (benchmarks/profiles.md)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)
# What renameat2 answers where the kernel or the file system does not know the flag.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)

_libc = ctypes.CDLL(None, use_errno=True)


def failure(error: OSError, file: str, *, offset: int | None = None, doing: str = "written") -> CkptToolError:
    """`disk-full`, `limits` or `write-failed`, with the file and the byte where it happened."""
    at = "" if offset is None else f" at byte {offset}"
    kind = "disk-full" if error.errno in _FULL else "limits" if error.errno in _TOO_MANY else "write-failed"
    return CkptToolError(Problem(kind, f"cannot be {doing}{at}: {error.strerror or error}", file))


def create(folder: int, name: str) -> int:
    """A new file in the open folder, for reading and writing; never an existing one or through a link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o666, dir_fd=folder)


def write_at(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """All of `data`, at most `AT_ONCE` bytes a call; a short write is continued."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += pwrite(descriptor, view[done : done + AT_ONCE], offset + done)


def reserve(descriptor: int, size: int) -> None:
    """Room for `size` bytes, zero until written; where the file system cannot reserve, just the length."""
    if size == 0:
        return
    try:
        fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        os.ftruncate(descriptor, size)


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Ask the kernel to begin writing these dirty pages, without waiting: the disk then works while we
    copy, and the fsync at the end has little left to do. A hint, so failures do not matter."""
    call = getattr(_libc, "sync_file_range", None)
    if call is not None:
        call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def _renameat2(source: Path, target: Path, flag: int) -> None:
    call = getattr(_libc, "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flag)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def rename_new(source: Path, target: Path) -> None:
    """Rename; FileExistsError if `target` exists, also where the kernel cannot check and rename at once."""
    try:
        _renameat2(source, target, _RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(source, target)


def exchange(source: Path, target: Path, aside: Path) -> None:
    """`source` and `target` change names in one step. Where that cannot be done, the old `target` moves to
    `aside` first and is left under the name `source` afterwards, as the exchange would leave it; should the
    machine stop in between, `aside` holds it."""
    try:
        _renameat2(source, target, _RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        os.rename(target, aside)
        try:
            os.rename(source, target)
        except OSError:
            os.rename(aside, target)
            raise
        os.rename(aside, source)
