"""Output that is either complete and on the disk, or not there: a hidden folder beside the place asked for
takes everything, a journal says which files of it are finished, and one rename publishes it.

For `out/NAME` there may be, next to it: `.NAME.ckpt-tool.lock` (held while a run works, harmless when
stale), `.NAME.ckpt-tool-partial-PLAN` (the folder) and `.NAME.ckpt-tool-partial-PLAN.journal`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from ckpt_tool.convert import disk, journal
from ckpt_tool.convert.fingerprints import same
from ckpt_tool.convert.journal import Entry
from ckpt_tool.convert.replaceable import Contents, Replace, contents, look, refuse_existing, remove
from ckpt_tool.errors import CkptToolError, fail, printable
from ckpt_tool.records import dataclass

RESUMABLE = (
    "disk-full",
    "write-failed",
    "limits",
    "read-failed",
    "download-failed",
    "upload-failed",
    "out-of-memory",
    "interrupted",
    "output-changed",
    "output-exists",
)
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

    @staticmethod
    def is_one(data: Mapping[str, Any]) -> bool:
        """Whether this is the JSON of an identity."""
        types = {"version": str, "plan": str, "source": dict}
        return data.keys() == types.keys() and all(isinstance(data[k], t) for k, t in types.items())

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """In words, what in `other`, the JSON of an identity, is not as here."""
        found = [
            f"{what} (it was {printable(other[what])}, it is {mine})"
            for what, mine in (("version", self.version), ("plan", self.plan))
            if other[what] != mine
        ]
        before = other["source"]
        names = [n for n in sorted({*before, *self.source}) if not same(before.get(n), self.source.get(n))]
        if names:
            found.append(f"source ({', '.join(map(printable, names))})")
        return found


# --- one run at a time -----------------------------------------------------------------------------------


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


def left_beside(place: Path) -> list[str]:
    """Names of the hidden folders and journals beside `place` of other runs into it, also by workers: work
    that was stopped, and that nobody looks for any more once the output is there."""
    try:
        return sorted(n for n in os.listdir(place.parent) if n.startswith(partial_prefix(place)))
    except OSError:
        return []


def partial_prefix(place: Path) -> str:
    return f".{place.name}.ckpt-tool-partial-"


# --- the hidden folder ----------------------------------------------------------------------------------


@dataclass
class Staging:
    """The hidden folder of one run into `place`, for a caller who holds the lock.

    `begin`, then files by `create`, `seal` and `record`, then `write`, then `publish`; on any failure
    `leave`. Errors are `disk-full`, `limits`, `write-failed`, `resume-mismatch`, `output-exists`,
    `not-replaceable`, `output-changed`.
    """

    place: Path
    identity: Identity
    replace: Replace = "nothing"
    entries: list[Entry] = field(default_factory=list)  # the journal, oldest first
    published: bool = False
    _old: Contents | None = None  # of the folder that will be replaced, as it was when the run began
    _folder: int = -1
    _journal: int = -1
    _journal_size: int = 0
    _noted: bool = False  # whether what stands beside the place would be found after a loss of power

    @property
    def afresh(self) -> str:
        """How to begin again where what is left cannot be gone on with."""
        return "without --resume it is removed and the work starts from the beginning"

    @property
    def path(self) -> Path:
        return self.place.with_name(f"{partial_prefix(self.place)}{self.identity.plan[:16]}")

    @property
    def _journal_path(self) -> Path:
        return self.path.with_name(self.path.name + ".journal")

    @property
    def _aside(self) -> Path:
        return self.place.with_name(f".{self.place.name}.ckpt-tool-old")

    def begin(self, *, resume: bool, belongs: Callable[[Entry], bool] = lambda _: True) -> None:
        """Make the folder, or with `resume` take up what an interrupted run left: then `entries` is what its
        journal says up to the first line that is damaged or does not `belong`, still to be checked against
        the files, and files it does not name are gone."""
        self._look_at_place()
        try:
            if resume and self._take_up(belongs):
                return
            self._remove_leftovers()
            self._make_folder()
            self._folder = open_folder(self.path)
            self._journal = os.open(
                self._journal_path,
                os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o666,
            )
            # It goes to the disk with the first entry, as the names do.
            self._append(journal.line(self.identity.to_json()))
        except OSError as error:
            self.leave(keep=False)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk.failure(error, str(self.place)) from None
            fail("output-failed", f"cannot be made: {error.strerror or error}", file=self.place)

    def _look_at_place(self) -> None:
        self._mend_exchange()
        if os.path.lexists(self.place):
            if self.replace == "nothing":
                refuse_existing(self.place, self.place, os.lstat(self.place))
            self._old = look(self.place, self.replace)

    def _make_folder(self) -> None:
        disk.mkdir(self.path, 0o777)

    def check_space(self, size: int) -> None:
        """`disk-full` unless `size` bytes and something to spare are free."""
        found = disk.statvfs(self.place.parent)
        free = found.f_bavail * found.f_frsize
        needed = size + size // 100 + SPARE_BYTES
        if free < needed:
            message = f"expected {needed:,} bytes free, found {free:,}"
            hint = "make room there, or write to another disk: --out"
            fail("disk-full", message, file=self.place, hint=hint)

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

    def seal_all(self, opened: Mapping[str, int]) -> None:
        """Force these files to the disk, and all names that a reader of the journal has to find."""
        for name, descriptor in opened.items():
            self.seal(descriptor, name)
        try:
            disk.fsync(self._folder)
            if not self._noted:
                self._sync_parent()  # the names of the folder and of the journal
        except OSError as error:
            raise disk.failure(error, self._journal_path.name) from None
        self._noted = True

    def record(self, entry: Entry) -> None:
        """Note in the journal that the files an entry speaks of are finished and sealed."""
        try:
            self._append(entry.line)
            disk.fdatasync(self._journal)
        except OSError as error:
            raise disk.failure(error, self._journal_path.name) from None
        self.entries.append(entry)

    def discard(self, names: Iterable[str]) -> None:
        """Remove files of the folder, where they exist."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                disk.unlink(name, dir_fd=self._folder)

    def write(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """A file beside the weights, or the pieces of it, complete and on the disk when this returns."""
        descriptor = self.create(name, 0)
        try:
            at = 0
            for piece in (content,) if isinstance(content, bytes) else content:
                disk.write_at(descriptor, piece, at)
                at += len(piece)
            disk.fsync(descriptor)
        except OSError as error:
            raise disk.failure(error, name) from None
        finally:
            os.close(descriptor)

    def publish(self) -> None:
        """Give the folder its name. What stood there before and was looked at is then removed; a folder that
        is no longer as it was then stays where it is, with `output-changed`."""
        replaces = False
        try:
            disk.fsync(self._folder)
            replaces = self._old is not None and os.path.lexists(self.place)
            if replaces:
                self._check_old(self.place)
            self._rename(replaces)
        except FileExistsError:
            refuse_existing(self.place, self.place, os.lstat(self.place))
        except OSError as error:
            raise disk.failure(error, str(self.place), doing="published") from None
        self.published = True
        self._close()
        self._forget()
        if replaces:
            self._remove_old()

    def _check_old(self, folder: Path) -> None:
        try:
            now: Contents | None = contents(folder)
        except (OSError, ValueError):
            now = None
        if now != self._old:
            names = {*(now or {}).items()} ^ {*(self._old or {}).items()}
            found = ", ".join(sorted({printable(name) for name, _ in names})[:3]) or "another"
            fail(
                "output-changed",
                f"expected the folder to replace as it was when the work began, found changes: {found}",
                file=self.place,
                hint="move it away",
            )

    def _remove_old(self) -> None:
        """Remove the folder that was replaced, which now has the hidden name. Should a file have come into it
        at the last moment, that stays, beside the output."""
        if remove(self.path, self._old or {}):
            return
        for k in range(1, 1000):
            with contextlib.suppress(OSError):
                disk.rename_new(self.path, self.place.with_name(f"{self.place.name}.replaced-{k}"))
                return

    def _rename(self, replaces: bool) -> None:
        def swap() -> None:
            disk.exchange(self.path, self.place, self._aside)

        if replaces:
            swap()
            try:
                self._check_old(self.path)  # once more, now that nobody finds it under its name
            except CkptToolError:
                swap()
                raise
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
                remove_tree(self.path)
            self._forget()

    def _forget(self) -> None:
        """Remove the journal."""
        with contextlib.suppress(OSError):
            os.unlink(self._journal_path)

    # --- what a run before this one left ---

    def _leftovers(self) -> list[str]:
        pattern = re.compile(re.escape(partial_prefix(self.place)) + r"[0-9a-f]{16}(\.journal)?")
        return [n for n in os.listdir(self.place.parent) if pattern.fullmatch(n)]

    def _remove_leftovers(self) -> None:
        for name in self._leftovers():
            remove_tree(self.place.with_name(name))

    def _can_take_up(self) -> bool:
        """Whether this plan's folder and journal are there; `resume-mismatch` where another plan's are."""
        found = self._leftovers()
        if self.path.name not in found or self._journal_path.name not in found:
            others = [n for n in found if not n.endswith(".journal") and n != self.path.name]
            if others:
                plans = ", ".join(n.removeprefix(partial_prefix(self.place)) for n in others)
                fail(
                    "resume-mismatch",
                    f"expected unfinished work of plan {self.identity.plan[:16]}, found some of {plans}",
                    file=self.place,
                    hint=self.afresh,
                )
            return False
        return True

    def _is_leftover(self, name: str) -> bool:
        """Whether a file of the folder that no entry speaks of may be removed."""
        return True

    def _take_up(self, belongs: Callable[[Entry], bool]) -> bool:
        if not self._can_take_up():
            return False
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self._journal = os.open(self._journal_path, flags)
            self._folder = open_folder(self.path)
        except OSError:  # a link, a folder for a file: nothing that a run left
            self._close()
            return False
        lines = journal.read(self._journal)
        identity, self._journal_size = next(lines, ({}, 0))
        if not Identity.is_one(identity):
            self._close()
            return False
        differences = self.identity.differences(identity)
        if differences:
            self._close()
            fail(
                "resume-mismatch",
                f"expected unfinished work of the same run, found another {' and '.join(differences)}",
                file=self.place,
                hint=self.afresh,
            )
        self._read_entries(lines, belongs)
        os.ftruncate(self._journal, self._journal_size)
        kept = {name for entry in self.entries for name in entry.files}
        for folder, folders, files in os.walk(self.path):
            for name in (*files, *(n for n in folders if os.path.islink(os.path.join(folder, n)))):
                path = Path(folder, name)
                known = path.relative_to(self.path).as_posix()
                if known not in kept and self._is_leftover(known):
                    os.unlink(path)
        return True

    def _read_entries(
        self, lines: Iterator[tuple[dict[str, Any], int]], belongs: Callable[[Entry], bool]
    ) -> None:
        """The journal's entries up to the first that cannot be believed; a file stands in one at most."""
        self.entries = []
        for content, end in lines:
            try:
                entry = Entry.from_json(content)
            except (ValueError, TypeError, KeyError, AttributeError):
                return
            if any(entry.files.keys() & known.files.keys() for known in self.entries) or not belongs(entry):
                return
            self.entries.append(entry)
            self._journal_size = end

    def _mend_exchange(self) -> None:
        """The machine stopped while the fallback of `disk.exchange` was at work: the old output comes back,
        or goes if the new one is in place."""
        with contextlib.suppress(OSError):
            if os.path.lexists(self._aside):
                if os.path.lexists(self.place):
                    remove_tree(self._aside)
                else:
                    os.rename(self._aside, self.place)

    # --- small things ---

    def _append(self, line: bytes) -> None:
        disk.write_at(self._journal, line, self._journal_size)
        self._journal_size += len(line)

    def _sync_parent(self) -> None:
        parent = open_folder(self.place.parent)
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


def open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)


def is_thread_limit(error: RuntimeError) -> bool:
    """Whether this is how Python says that there is no room for another thread."""
    return "new thread" in str(error)


def resumable(error: BaseException) -> bool:
    """Whether running again could go on where this failure stopped: the disk, the machine or the user stopped
    it, not the data."""
    if isinstance(error, CkptToolError):
        return error.kind in RESUMABLE
    if isinstance(error, RuntimeError) and is_thread_limit(error):
        return True
    # KeyboardInterrupt and what a signal or a closed pipe raises: as a kill would leave it
    return isinstance(error, MemoryError | BrokenPipeError) or not isinstance(error, Exception)
