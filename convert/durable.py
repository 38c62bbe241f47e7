"""Output that is either complete and on the disk, or not there: a hidden folder beside the place asked for
takes everything, a journal says which files of it are finished, and one rename publishes it.

For `out/NAME` there may be, next to it: `.NAME.ckpt-tool.lock` (held while a run works, harmless when
stale), `.NAME.ckpt-tool-partial-PLAN` (the folder) and `.NAME.ckpt-tool-partial-PLAN.journal`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt_tool.convert import disk
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all

SPARE_BYTES = 64 << 20  # left free besides 1 % of what is written: metadata of the file system, other writers


@dataclass(frozen=True)
class Identity:
    """What a run makes, as far as a later run must agree to go on with its work. `source` maps file names
    to sizes, times and digests of headers; any JSON values do."""

    version: str
    plan: str
    source: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"version": self.version, "plan": self.plan, "source": dict(self.source)}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """In words, what in `other` (the JSON of another identity) is not as here."""
        found = [
            f"{what} (it was {other.get(what)}, it is {mine})"
            for what, mine in (("version", self.version), ("plan", self.plan))
            if other.get(what) != mine
        ]
        theirs = other.get("source")
        if theirs != dict(self.source):
            before = theirs if isinstance(theirs, dict) else {}
            names = [n for n in sorted({*before, *self.source}) if before.get(n) != dict(self.source).get(n)]
            found.append(f"source ({', '.join(names)})")
        return found


# --- where the output may go ----------------------------------------------------------------------------


def place_for(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> Path:
    """`out` with its parent resolved, after everything that can be said before any work: kinds
    `output-conflict`, `output-exists`, `output-failed`. `inputs` are the files and folders read."""
    try:
        absolute = Path(os.path.abspath(out))
        if absolute.is_symlink():
            fail("output-conflict", "expected a free name or a folder, found a symbolic link", file=out)
        real = Path(os.path.realpath(absolute))
        home = Path(os.path.realpath(Path.home())) if os.environ.get("HOME") else None
        if real == Path(real.anchor) or real == home:
            fail("output-conflict", "expected a folder of its own, found `/` or the home folder", file=out)
        conflicts = (_conflict(out, real, Path(os.path.realpath(p)), p) for p in inputs)
        fail_all(p for p in conflicts if p is not None)
        if os.path.lexists(absolute) and not overwrite:
            _refuse_existing(out)
        parent = absolute.parent
        if not parent.exists():
            fail("output-failed", f"expected an existing folder {parent}, found none", file=out)
        if not parent.is_dir():
            fail("output-failed", f"expected {parent} to be a folder, found a file", file=out)
        return parent.resolve() / absolute.name
    except OSError as error:
        fail("output-failed", f"cannot be made: {error.strerror or error}", file=out)
    except RuntimeError as error:  # a loop of symbolic links
        fail("output-failed", f"cannot be made: {error}", file=out)


def _refuse_existing(out: Path) -> None:
    fail(
        "output-exists",
        "expected a free name, found a file or folder",
        file=out,
        hint="--overwrite replaces it",
    )


def _conflict(out: Path, real: Path, source: Path, shown: Path) -> Problem | None:
    if real == source:
        relation = "the input itself"
    elif source in real.parents:
        relation = f"a place inside the input {shown}"
    elif real in source.parents:
        relation = f"a folder that holds the input {shown}"
    else:
        return None
    return Problem("output-conflict", f"expected a place apart from the input, found {relation}", str(out))


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Exclude other runs into `place`; `output-busy` when one is at work. The lock goes with the process,
    and the file is removed while it is still held."""
    path = place.with_name(f".{place.name}.ckpt-tool.lock")
    descriptor = _lock(path, place)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


def _lock(path: Path, place: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            fail("output-failed", f"cannot be made beside {path.name}: {error.strerror}", file=place)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                fail("output-busy", "expected to be the only run into this output, found another", file=place)
            fail("output-failed", f"cannot be locked: {error.strerror}", file=place)
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # its last owner removed it between our opening and locking: once more


# --- the hidden folder ----------------------------------------------------------------------------------


@dataclass
class Staging:
    """The hidden folder of one run into `place`, for a caller who holds the lock.

    `begin`, then files by `create`, `seal` and `record`, then `write`, then `publish`; on any failure
    `leave`. Errors are `disk-full`, `limits`, `write-failed`, `resume-mismatch`, `output-exists`.
    """

    place: Path
    identity: Identity
    overwrite: bool = False
    entries: list[dict[str, Any]] = field(default_factory=list)  # the journal, oldest first
    published: bool = False
    _folder: int = -1
    _journal: int = -1
    _journal_size: int = 0

    @property
    def path(self) -> Path:
        return self.place.with_name(f"{self._prefix}{self.identity.plan[:16]}")

    @property
    def _journal_path(self) -> Path:
        return self.path.with_name(self.path.name + ".journal")

    @property
    def _prefix(self) -> str:
        return f".{self.place.name}.ckpt-tool-partial-"

    @property
    def _aside(self) -> Path:
        return self.place.with_name(f".{self.place.name}.ckpt-tool-old")

    def begin(self, *, resume: bool) -> None:
        """Make the folder, or with `resume` take up what an interrupted run left: then `entries` is what its
        journal says, still to be checked against the files, and files it does not name are gone."""
        self._mend_exchange()
        if os.path.lexists(self.place) and not self.overwrite:
            _refuse_existing(self.place)
        try:
            if resume and self._take_up():
                return
            for name in self._leftovers():
                _remove(self.place.with_name(name))
            disk.mkdir(self.path, 0o777)
            self._folder = _open_folder(self.path)
            self._journal = os.open(
                self._journal_path,
                os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o666,
            )
            self._append(self.identity.to_json())
            disk.fsync(self._folder)
            self._sync_parent()
        except OSError as error:
            self.leave(keep=False)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk.failure(error, str(self.place)) from None
            fail("output-failed", f"cannot be made: {error.strerror or error}", file=self.place)

    def check_space(self, size: int) -> None:
        """`disk-full` unless `size` bytes and something to spare are free."""
        found = disk.statvfs(self.place.parent)
        free = found.f_bavail * found.f_frsize
        needed = size + size // 100 + SPARE_BYTES
        if free < needed:
            fail("disk-full", f"expected {needed} bytes free, found {free}", file=self.place)

    def create(self, name: str, size: int) -> int:
        """A new file of `size` bytes, `name` or `name` in one or two folders; the descriptor is then
        the caller's."""
        *folders, last = name.split("/")
        if len(folders) > 2 or any(p in ("", ".", "..") for p in (*folders, last)):
            raise ValueError(f"not the name of an output file: {name!r}")
        descriptor = -1
        try:
            with contextlib.ExitStack() as stack:
                inner = self._folder
                for folder in folders:
                    around, inner = inner, stack.enter_context(_inner(inner, folder))
                    disk.fsync(around)
                descriptor = disk.create(inner, last)
                if folders:
                    disk.fsync(inner)
            disk.reserve(descriptor, size)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise disk.failure(error, name, doing=f"made with {size} bytes") from None
        return descriptor

    def reopen(self, name: str) -> int:
        """A finished file, for reading."""
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder)

    def seal(self, descriptor: int, name: str) -> None:
        """Force a file to the disk; the caller closes it."""
        try:
            disk.fsync(descriptor)
        except OSError as error:
            raise disk.failure(error, name, doing="forced to the disk") from None

    def record(self, entry: dict[str, Any]) -> None:
        """Note in the journal that the files an entry speaks of are finished and on the disk."""
        try:
            disk.fsync(self._folder)
            self._append(entry)
        except OSError as error:
            raise disk.failure(error, self._journal_path.name) from None
        self.entries.append(entry)

    def discard(self, names: Iterable[str]) -> None:
        """Remove files of the folder, where they exist."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                disk.unlink(name, dir_fd=self._folder)

    def write(self, name: str, content: bytes) -> None:
        """A small file, complete and on the disk when this returns."""
        descriptor = self.create(name, 0)
        try:
            if content:
                disk.write_at(descriptor, content, 0)
            disk.fsync(descriptor)
        except OSError as error:
            raise disk.failure(error, name) from None
        finally:
            os.close(descriptor)

    def publish(self) -> None:
        """Give the folder its name. What stood there before, with `overwrite`, is then removed."""
        replaces = False
        try:
            disk.fsync(self._folder)
            replaces = self.overwrite and os.path.lexists(self.place)
            self._rename(replaces)
        except FileExistsError:
            _refuse_existing(self.place)
        except OSError as error:
            raise disk.failure(error, str(self.place), doing="published") from None
        self.published = True
        self._close()
        with contextlib.suppress(OSError):
            os.unlink(self._journal_path)
            if replaces:
                _remove(self.path)

    def _rename(self, replaces: bool) -> None:
        def swap() -> None:
            disk.exchange(self.path, self.place, self._aside)

        if replaces:
            swap()
        else:
            disk.rename_new(self.path, self.place)
        try:
            self._sync_parent()
        except OSError:  # nobody knows what the disk holds now: as it was before
            if replaces:
                swap()
            else:
                disk.rename_new(self.place, self.path)
            raise

    def leave(self, *, keep: bool) -> None:
        """Close everything after a failure; remove the folder and its journal unless `keep`."""
        self._close()
        if not keep and not self.published:
            with contextlib.suppress(OSError):
                _remove(self.path)
            with contextlib.suppress(OSError):
                os.unlink(self._journal_path)

    # --- what a run before this one left ---

    def _leftovers(self) -> list[str]:
        pattern = re.compile(re.escape(self._prefix) + r"[0-9a-f]{16}(\.journal)?")
        return [n for n in os.listdir(self.place.parent) if pattern.fullmatch(n)]

    def _take_up(self) -> bool:
        found = self._leftovers()
        if self.path.name not in found or self._journal_path.name not in found:
            others = [n for n in found if not n.endswith(".journal") and n != self.path.name]
            if others:
                plans = ", ".join(n.removeprefix(self._prefix) for n in others)
                fail(
                    "resume-mismatch",
                    f"expected unfinished work of plan {self.identity.plan[:16]}, found some of {plans}",
                    file=self.place,
                    hint="without --resume it is removed and the work starts from the beginning",
                )
            return False
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        lines, self._journal_size = _journal_lines(self._journal)
        if not lines:
            os.close(self._journal)
            self._journal = -1
            return False
        differences = self.identity.differences(lines[0])
        if differences:
            self._close()
            fail(
                "resume-mismatch",
                f"expected unfinished work of the same run, found another {' and '.join(differences)}",
                file=self.place,
                hint="without --resume it is removed and the work starts from the beginning",
            )
        self.entries = lines[1:]
        self._folder = _open_folder(self.path)
        os.ftruncate(self._journal, self._journal_size)
        kept = {name for entry in self.entries for name in entry.get("files", ())}
        for folder, folders, files in os.walk(self.path):
            for name in (*files, *(n for n in folders if os.path.islink(os.path.join(folder, n)))):
                path = Path(folder, name)
                if path.relative_to(self.path).as_posix() not in kept:
                    os.unlink(path)
        return True

    def _mend_exchange(self) -> None:
        """The machine stopped while the fallback of `disk.exchange` was at work: the old output comes back,
        or goes if the new one is in place."""
        with contextlib.suppress(OSError):
            if os.path.lexists(self._aside):
                if os.path.lexists(self.place):
                    _remove(self._aside)
                else:
                    os.rename(self._aside, self.place)

    # --- small things ---

    def _append(self, entry: Mapping[str, Any]) -> None:
        text = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        disk.write_at(self._journal, line, self._journal_size)
        disk.fdatasync(self._journal)
        self._journal_size += len(line)

    def _sync_parent(self) -> None:
        parent = _open_folder(self.place.parent)
        try:
            disk.fsync(parent)
        finally:
            os.close(parent)

    def _close(self) -> None:
        for descriptor in (self._folder, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._folder = self._journal = -1


@contextlib.contextmanager
def _inner(folder: int, name: str) -> Iterator[int]:
    """The folder `name` in `folder`, made if need be."""
    with contextlib.suppress(FileExistsError):
        disk.mkdir(name, 0o777, dir_fd=folder)
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        yield inner
    finally:
        os.close(inner)


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _journal_lines(descriptor: int) -> tuple[list[dict[str, Any]], int]:
    """The lines whose own checksum is right, up to the first that is not, and their length in bytes."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        data = file.read()
    lines: list[dict[str, Any]] = []
    size = 0
    for line in data.splitlines(keepends=True):
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
            break
        lines.append(json.loads(text))
        size += len(line)
    return lines, size


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)


def resumable(error: BaseException) -> bool:
    """Whether running again could go on where this failure stopped: the disk or the user, not the data."""
    if isinstance(error, CkptToolError):
        return error.kind in ("disk-full", "write-failed", "limits", "read-failed", "out-of-memory")
    return isinstance(error, KeyboardInterrupt)
