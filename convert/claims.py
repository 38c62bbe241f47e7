"""Who is at work on a part of an output, where several machines share a file system.

Locks of the kernel reach from machine to machine on some shared file systems and not on others, so a claim is
a file: made with O_EXCL, which NFS and cluster file systems do in one step, and rewritten every few seconds
while its owner lives. A claim whose owner is gone is taken over under the next number; of two who try, one
finds the number taken. On the owner's own machine its process tells whether it lives, elsewhere the claim is
watched. Should an owner wake up after its claim was taken over, it stops at the next file; what it wrote
until then is what the other writes too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ckpt_tool.errors import fail, printable
from ckpt_tool.records import dataclass

BEAT = 5.0  # seconds between two signs of life
PATIENCE = 30.0  # seconds without one, after which an owner on another machine is given up
WATCH = 0.5  # seconds between two looks
_SIZE = 512  # bytes of a claim

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Owner:
    """Who made a claim. `machine` is of one boot and one namespace of processes; None where that cannot be
    told, or the claim is not written yet."""

    host: str = "another machine"
    machine: str | None = None
    process: int = 0
    started: str = ""

    def __str__(self) -> str:
        return f"process {self.process} on {printable(self.host, 80)}"


class Claim:
    """The claim numbered `number` on `stem`, kept alive until `release`."""

    def __init__(self, stem: Path, number: int, what: str) -> None:
        self.stem, self.number, self.what = stem, number, what
        self._descriptor = os.open(
            _path(stem, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
        )
        self._released = threading.Event()
        try:
            self._write(0)
        except OSError:
            os.close(self._descriptor)
            os.unlink(_path(stem, number))
            raise
        self._beats = threading.Thread(target=self._beat, name="ckpt-tool-claim", daemon=True)
        self._beats.start()

    @property
    def lost(self) -> bool:
        """Whether another run has taken this claim over."""
        return max(_numbers(self.stem), default=0) != self.number

    def check(self) -> None:
        """`output-busy` where the claim is lost."""
        if self.lost:
            fail(
                "output-busy", f"expected to be the only run of {self.what}, found that another took it over"
            )

    def release(self) -> None:
        self._released.set()
        self._beats.join()
        os.close(self._descriptor)
        with contextlib.suppress(OSError):
            os.unlink(_path(self.stem, self.number))

    def _beat(self) -> None:
        count = 0
        while not self._released.wait(BEAT):
            count += 1
            with contextlib.suppress(OSError):  # a claim that cannot be written is taken over in the end
                self._write(count)

    def _write(self, beat: int) -> None:
        fields = {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid(), "beat": beat}
        text = json.dumps({**fields, "started": _started(os.getpid())})
        os.pwrite(self._descriptor, text.encode()[:_SIZE].ljust(_SIZE), 0)
        os.fsync(self._descriptor)


@contextmanager
def claimed(stem: Path, what: str, tell: Tell = lambda _: None) -> Iterator[Claim]:
    """Hold the claim on `stem`, a path whose folder exists; `output-busy` where one who lives has it, and
    `output-failed` where no claim can be made. `what` says in words whose work it is; `tell` is called where
    it has to be watched for long."""
    claim = _claim(stem, what, tell)
    try:
        yield claim
    finally:
        claim.release()


def _claim(stem: Path, what: str, tell: Tell) -> Claim:
    while True:
        try:
            newest = max(_numbers(stem), default=0)
            if newest and (owner := at_work(stem, tell)) is not None:
                fail("output-busy", f"expected to be the only run of {what}, found {owner} at it")
            claim = Claim(stem, newest + 1, what)
        except FileExistsError:
            time.sleep(WATCH)  # another was faster, or this machine's list of the folder is old
            continue
        except OSError as error:
            fail("output-failed", f"cannot be claimed: {error.strerror or error}", file=stem)
        for number in _numbers(stem):
            if number < claim.number:
                with contextlib.suppress(OSError):
                    os.unlink(_path(stem, number))
        return claim


def at_work(stem: Path, tell: Tell = lambda _: None) -> Owner | None:
    """Who holds the claim on `stem` and lives."""
    newest = max(_numbers(stem), default=0)
    first = _read(_path(stem, newest)) if newest else None
    if first is None:
        return None
    owner = _owner(first)
    if owner.machine is not None and owner.machine == _machine():
        return owner if _started(owner.process) == owner.started else None
    tell(f"{owner} may be at work: watching for {PATIENCE:.0f} s")
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(WATCH)
        now = _read(_path(stem, newest))
        if now is None:
            return at_work(stem, tell)
        if now != first:
            return _owner(now)
    return None


def remove_claims(stem: Path) -> None:
    """Remove claims that nobody holds any more."""
    for number in _numbers(stem):
        with contextlib.suppress(OSError):
            os.unlink(_path(stem, number))


def _path(stem: Path, number: int) -> Path:
    return stem.with_name(f"{stem.name}.claim-{number}")


def _numbers(stem: Path) -> list[int]:
    pattern = re.compile(re.escape(stem.name) + r"\.claim-([0-9]{1,9})")
    return [int(m[1]) for name in os.listdir(stem.parent) if (m := pattern.fullmatch(name))]


def _read(path: Path) -> bytes | None:
    """What a claim says; None where it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.pread(descriptor, _SIZE, 0)
    finally:
        os.close(descriptor)


def _owner(content: bytes) -> Owner:
    try:
        said: dict[str, Any] = json.loads(content)
        return Owner(str(said["host"]), said["machine"], int(said["process"]), str(said["started"]))
    except (ValueError, KeyError, TypeError, OverflowError):  # the last of a number that is infinite
        return Owner()


@lru_cache(maxsize=1)
def _machine() -> str | None:
    """This boot of this machine, as the processes that can see each other have it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(process: int) -> str:
    """When a process of this machine began, by which it is told from a later one of its number; empty for one
    that is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
