"""Whatever stops a conversion (a full disk, an error, a kill), the output is complete or absent."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from ckpt_tool.api import Options, convert
from ckpt_tool.convert import disk, durable, execute
from ckpt_tool.convert.durable import Identity, Staging, locked
from ckpt_tool.convert.journal import Entry
from ckpt_tool.convert.meanwhile import beside
from ckpt_tool.convert.places import free_place
from ckpt_tool.errors import CkptToolError, fail
from tests.conftest import SYNCS

CHILD = Path(__file__).with_name("crash_child.py")
KILLS = int(os.environ.get("CKPT_TOOL_KILLS", "12"))  # the release run sets 60
SHARDS = Options(max_shard_bytes=60_000)
ID = Identity("1", "a" * 64, {"x": {"size": 1}})
DONE = Entry({"done": {}})
Written = Callable[[str], Path]


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here what is written goes to the disk."""
    for name, call in SYNCS.items():
        monkeypatch.setattr(os, name, call)
        monkeypatch.setattr(disk, name, call)


@pytest.fixture
def source(originals: Written, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals("mistral-7b-v0.3"), tmp_path / "in"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of the manifest all but the way to the source, which another place has another of."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if "ckpt-tool.json" in found:
        found["ckpt-tool.json"] = re.sub(rb'\n "source": .*', b"", found["ckpt-tool.json"])
    return found


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, bytes]:
    convert(source, tmp_path / "right", options=SHARDS, check=False)
    found = contents(tmp_path / "right")
    shutil.rmtree(tmp_path / "right")
    assert sum(name.endswith(".safetensors") for name in found) >= 4
    return found


# --- where an output may go -----------------------------------------------------------------------------


def kind_of(call: Callable[[], object]) -> str:
    with pytest.raises(CkptToolError) as caught:
        call()
    return caught.value.kind


def test_places_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cases = {
        "in": "output-conflict",
        "in/deep/out": "output-conflict",
        "link": "output-conflict",
        "link/out": "output-conflict",
        "dangling": "output-conflict",
        ".": "output-conflict",
        "/": "output-conflict",
        "home": "output-conflict",
        "file": "output-exists",
        "file/out": "output-failed",
        "missing/out": "output-failed",
        "loop/out": "output-failed",
        "n" * 300: "output-failed",
    }
    for name, kind in cases.items():
        assert kind_of(lambda p=tmp_path / name: free_place(p, [source])) == kind, name  # type: ignore[misc]
    assert free_place(tmp_path / "in2", [source]) == tmp_path / "in2"


def test_a_linked_parent_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert free_place(tmp_path / "link" / "out", []) == tmp_path / "real" / "out"


def test_a_read_only_parent_is_refused_before_work(tmp_path: Path) -> None:
    mounted(tmp_path / "disk", "size=1m,ro")
    try:
        with pytest.raises(CkptToolError) as caught, locked(tmp_path / "disk" / "out"):
            pass
    finally:
        unmount(tmp_path / "disk")
    assert caught.value.kind == "output-failed"


# --- the lock -------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_at_once_and_a_stale_lock_does_no_harm(tmp_path: Path) -> None:
    place = tmp_path / "out"
    (tmp_path / ".out.ckpt-tool.lock").write_text("left by a machine that lost power")
    with locked(place):
        assert kind_of(lambda: locked(place).__enter__()) == "output-busy"
    assert hidden(tmp_path) == []


CONTENDER = """
import os, sys
from pathlib import Path
from ckpt_tool.convert.durable import locked
from ckpt_tool.errors import CkptToolError, fail

place = Path(sys.argv[1])
held = 0
for _ in range(400):
    try:
        with locked(place):
            os.close(os.open(place.with_name("inside"), os.O_CREAT | os.O_EXCL))  # fails if another is in
            os.unlink(place.with_name("inside"))
            held += 1
    except CkptToolError as error:
        assert error.kind == "output-busy"
print(held)
"""


def test_two_processes_never_hold_the_lock_together(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONTENDER, str(tmp_path / "out")]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    held = [c.communicate()[0] for c in children]
    assert [c.returncode for c in children] == [0, 0, 0]
    assert sum(map(int, held)) > 0
    assert hidden(tmp_path) == []


# --- the folder -----------------------------------------------------------------------------------------


def test_a_published_folder_holds_what_was_written_and_nothing_is_left(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out", ID)
    staging.begin(resume=False)
    staging.write("a", b"1")
    staging.write("inner/b", b"2")
    assert not (tmp_path / "out").exists()
    staging.publish()
    assert contents(tmp_path / "out") == {"a": b"1", "inner/b": b"2"} and hidden(tmp_path) == []


@pytest.mark.parametrize("name", ["../a", "/a", "", "a/../b", "a/b/c/d", ".."])
def test_output_names_are_names(name: str, tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out", ID)
    staging.begin(resume=False)
    with pytest.raises(ValueError, match="not the name"):
        staging.create(name, 0)
    staging.leave(keep=False)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("supported", [True, False], ids=["renameat2", "plain rename"])
def test_an_output_that_appears_meanwhile_is_not_replaced(
    supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not supported:
        monkeypatch.setattr(disk, "_renameat2", unsupported)
    staging = Staging(tmp_path / "out", ID)
    staging.begin(resume=False)
    (tmp_path / "out").mkdir()
    assert kind_of(staging.publish) == "output-exists"
    staging.leave(keep=False)
    assert contents(tmp_path / "out") == {} and hidden(tmp_path) == []


@pytest.mark.parametrize("supported", [True, False], ids=["renameat2", "plain rename"])
@pytest.mark.parametrize("old", [(), ("model.safetensors", "config.json")], ids=["empty", "weights"])
def test_overwriting_exchanges_and_then_removes_the_old(
    old: tuple[str, ...], supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not supported:
        monkeypatch.setattr(disk, "_renameat2", unsupported)
    out = tmp_path / "out"
    out.mkdir()
    for name in old:
        (out / name).write_text("old")
    staging = Staging(out, ID, "models" if old else "outputs")
    staging.begin(resume=False)
    staging.write("new", b"new")
    staging.publish()
    assert contents(out) == {"new": b"new"} and hidden(tmp_path) == []


def unsupported(*_: object) -> None:
    raise OSError(errno.EINVAL, "the file system does not know it")


def test_the_old_output_comes_back_if_the_machine_stopped_within_the_fallback(tmp_path: Path) -> None:
    (tmp_path / ".out.ckpt-tool-old").mkdir()
    (tmp_path / ".out.ckpt-tool-old" / "old").write_text("old")
    assert kind_of(lambda: Staging(tmp_path / "out", ID).begin(resume=False)) == "output-exists"
    assert contents(tmp_path / "out") == {"old": b"old"}


def interrupted(tmp_path: Path, identity: Identity = ID) -> None:
    staging = Staging(tmp_path / "out", identity)
    staging.begin(resume=False)
    staging.write("done", b"1")
    staging.record(DONE)
    staging.write("half", b"2")
    staging.leave(keep=True)


def test_resuming_keeps_finished_files_only(tmp_path: Path) -> None:
    interrupted(tmp_path)
    staging = Staging(tmp_path / "out", ID)
    staging.begin(resume=True)
    assert staging.entries == [DONE]
    assert contents(staging.path) == {"done": b"1"}
    staging.write("half", b"3")
    staging.publish()
    assert contents(tmp_path / "out") == {"done": b"1", "half": b"3"} and hidden(tmp_path) == []


def test_without_resume_what_was_left_is_removed(tmp_path: Path) -> None:
    interrupted(tmp_path)
    interrupted(tmp_path, Identity("1", "b" * 64, {}))
    staging = Staging(tmp_path / "out", Identity("1", "c" * 64, {}))
    staging.begin(resume=False)
    assert len(hidden(tmp_path)) == 2 and contents(staging.path) == {}
    staging.leave(keep=False)


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (Identity("2", ID.plan, ID.source), "version"),
        (Identity("1", ID.plan, {"x": {"size": 2}}), "source (x)"),
        (Identity("1", "b" * 64, ID.source), "bbbb"),
    ],
)
def test_resuming_other_work_is_refused_and_says_what_differs(
    other: Identity, word: str, tmp_path: Path
) -> None:
    interrupted(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CkptToolError) as caught:
        Staging(tmp_path / "out", other).begin(resume=True)
    assert caught.value.kind == "resume-mismatch" and word in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", [b"", b"00000000 {}\n", b"\xff\xfe", b"deadbeef"])
def test_a_damaged_journal_is_believed_only_up_to_the_damage(damage: bytes, tmp_path: Path) -> None:
    interrupted(tmp_path)
    journal = next(tmp_path.glob(".*.journal"))
    first, second = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + damage + second[:-1])
    staging = Staging(tmp_path / "out", ID)
    staging.begin(resume=True)
    assert staging.entries == [] and contents(staging.path) == {}
    again = Entry({"again": {}})
    staging.record(again)
    staging.leave(keep=True)
    staging = Staging(tmp_path / "out", ID)
    staging.begin(resume=True)
    assert staging.entries == [again]
    staging.leave(keep=False)


# --- errors at any call ---------------------------------------------------------------------------------


class Injected:
    """Makes call number `at` of a function of `disk` fail."""

    def __init__(self, name: str, at: int, number: int) -> None:
        self.call, self.at, self.number, self.count = getattr(disk, name), at, number, 0

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        self.count += 1
        if self.count == self.at:
            raise OSError(self.number, os.strerror(self.number))
        return self.call(*arguments, **more)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize(
    "name", ["pwrite", "fsync", "fdatasync", "fallocate", "mkdir", "create", "rename_new"]
)
def test_an_error_at_any_call_publishes_nothing_and_can_be_resumed(
    name: str,
    code: int,
    source: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    at = failures = 0
    while True:
        at += 1 if name != "pwrite" else 7  # there are many writes
        with monkeypatch.context() as patch:
            injected = Injected(name, at, code)
            patch.setattr(disk, name, injected)
            try:
                convert(source, out, options=SHARDS, check=False, resume=failures % 2 == 1)
                break
            except CkptToolError as error:
                failures += 1
                kinds = {"disk-full"} if code == errno.ENOSPC else {"write-failed", "output-failed"}
                assert error.kind in kinds, error
                kept = "--resume" in str(error)
                assert not out.exists()
                assert len(hidden(tmp_path)) == (2 if kept else 0)
                assert "Traceback" not in str(error)
    assert failures > 0 and injected.count < at
    assert contents(out) == expected and hidden(tmp_path) == []


def test_with_overwrite_the_old_output_survives_errors(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(source, out, options=Options(dtype="F32"), check=False)
    old = contents(out)
    fsyncs = 0

    def last_fsync(descriptor: int) -> None:
        nonlocal fsyncs
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path):
            fsyncs += 1
            if fsyncs == 2:  # of the folder around the output, right after the exchange
                raise OSError(errno.EIO, "lost")
        os.fsync(descriptor)

    monkeypatch.setattr(disk, "fsync", last_fsync)
    with pytest.raises(CkptToolError) as caught:
        convert(source, out, overwrite=True, check=False)
    assert caught.value.kind == "write-failed"
    assert contents(out) == old
    convert(source, out, overwrite=True, resume=True, check=False)
    assert contents(out) != old and hidden(tmp_path) == []


def test_nothing_is_renamed_while_something_is_unsynced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dirty: set[str] = set()
    renamed = []

    def name_of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        dirty.add(name_of(descriptor))
        return os.pwrite(descriptor, data, offset)

    def fsync(descriptor: int) -> None:
        dirty.discard(name_of(descriptor))
        os.fsync(descriptor)

    def create(folder: int, name: str) -> int:
        dirty.add(name_of(folder))
        return real_create(folder, name)

    def rename(old: Path, new: Path) -> None:
        renamed.append((old, new, set(dirty)))
        real_rename(old, new)

    real_rename, real_create = disk.rename_new, disk.create
    for name, call in {
        "pwrite": pwrite, "fsync": fsync, "fdatasync": fsync, "create": create, "rename_new": rename
    }.items():  # fmt: skip
        monkeypatch.setattr(disk, name, call)
    convert(source, tmp_path / "out", options=SHARDS, check=False)
    ((_, new, unsynced),) = renamed
    assert new == tmp_path / "out" and not unsynced


# --- a disk that is really full -------------------------------------------------------------------------


def mounted(folder: Path, options: str) -> None:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting is not permitted here")


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted(tmp_path / "disk", "size=300k")
    yield tmp_path / "disk"
    unmount(tmp_path / "disk")


def test_too_little_space_is_said_before_the_first_byte(source: Path, small_disk: Path) -> None:
    with pytest.raises(CkptToolError) as caught:
        convert(source, small_disk / "out", check=False)
    assert caught.value.kind == "disk-full"
    assert "expected" in str(caught.value) and "bytes free, found" in str(caught.value)
    assert caught.value.problems[0].hint == "make room there, or write to another disk: --out"
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_is_resumed_when_there_is_room(
    source: Path, small_disk: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "SPARE_BYTES", -(1 << 40))
    with pytest.raises(CkptToolError) as caught:
        convert(source, small_disk / "out", options=SHARDS, check=False)
    assert caught.value.kind == "disk-full" and "--resume" in str(caught.value)
    assert hidden(small_disk) and not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    done = convert(source, small_disk / "out", options=SHARDS, check=False, resume=True)
    assert done.outcome.resumed and contents(small_disk / "out") == expected


# --- the end --------------------------------------------------------------------------------------------


def test_the_manifest_is_made_while_the_weights_go_to_the_disk_and_noted_after_that(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, events, real = threading.Event(), list[str](), execute.as_document

    def as_document(content: Any) -> bytes:
        events.append("manifest made")
        made.set()
        return real(content)

    def call(name: str, of: Callable[..., Any]) -> Callable[..., Any]:
        def calling(descriptor: int, *more: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if name == "fsync" and path.endswith(".safetensors"):
                assert made.wait(60)
            result = of(descriptor, *more)
            if "-partial-" in path and (name != "fsync") == path.endswith(".journal"):
                events.append(f"{name} {Path(path).suffix.partition('-partial-')[0]}")
            return result

        return calling

    monkeypatch.setattr(execute, "as_document", as_document)
    for name in ("pwrite", "fsync", "fdatasync"):
        monkeypatch.setattr(disk, name, call(name, getattr(disk, name)))
    convert(source, tmp_path / "out", check=False)
    weights, noted = events.index("fsync .safetensors"), events.index("fdatasync .journal")
    assert events.index("manifest made") < weights < noted < events.index("fsync .json")
    _whose, line = (k for k, e in enumerate(events) if e == "pwrite .journal")
    assert weights < line < noted  # the system may write it to the disk before it is asked to


@pytest.mark.parametrize(
    ("kind", "kept"), [("read-failed", True), ("checksum", False)], ids=["the disk", "the data"]
)
def test_what_is_wrong_with_the_source_is_told_after_the_weights_are_noted(
    kind: str,
    kept: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, bytes],
) -> None:
    check = execute.Run._check_sources
    monkeypatch.setattr(execute.Run, "_check_sources", lambda self: fail(kind, "told", file="x"))
    assert kind_of(lambda: convert(source, tmp_path / "out", options=SHARDS, check=False)) == kind
    assert bool(hidden(tmp_path)) == kept
    monkeypatch.setattr(execute.Run, "_check_sources", check)
    done = convert(source, tmp_path / "out", options=SHARDS, check=False, resume=True)
    assert len(done.outcome.resumed) == kept * len([n for n in expected if n.endswith(".safetensors")])
    assert contents(tmp_path / "out") == expected


def test_work_beside_the_body_is_waited_for_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, order = threading.Event(), list[str]()

    def work() -> None:
        assert gate.wait(60)
        order.append("work")
        raise OSError("from beside")

    with pytest.raises(OSError, match="from beside"), beside(work) as done:
        order.append("body")
        gate.set()
        done()
    with pytest.raises(OSError, match="from beside") as told, beside(work):
        raise KeyError("from the body")
    assert isinstance(told.value.__context__, KeyError)
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
    with beside(lambda: order.append("work first")):
        order.append("then the body")
    assert order == ["body", "work", "work", "work first", "then the body"]
    with pytest.raises(OSError, match="alone"), beside(Mock(side_effect=OSError("alone"))):
        order.append("never")
    assert order[-1] == "then the body"


def test_an_interrupt_does_not_leave_what_is_beside_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Python 3.11 a `join` that is interrupted takes the thread for ended: the files would be closed and
    removed while they go to the disk."""
    came, left, seen = threading.Event(), threading.Event(), list[bool]()

    def interrupted(*_: object) -> None:
        came.set()
        raise KeyboardInterrupt

    def work() -> None:
        assert waits.wait(60)
        for _ in range(60):  # one that comes just before the wait begins is not seen until that ends
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            if came.wait(1):
                break
        assert came.is_set()
        seen.append(left.wait(0.05))

    waits, before = threading.Event(), signal.signal(signal.SIGUSR1, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt), beside(work) as done:
            waits.set()
            done()
        left.set()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [False]
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), beside(lambda: seen.append(True)):
        seen.append(True)
    assert seen == [False]


# --- kills ----------------------------------------------------------------------------------------------


def killed_at(source: Path, folder: Path, *points: int) -> dict[str, Any]:
    command = [sys.executable, str(CHILD), str(source), str(folder), *map(str, points)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_kill_at_any_point_leaves_no_output_and_the_next_run_ends_equal(
    source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    folder = tmp_path / "outs"
    folder.mkdir()
    calls = killed_at(source, folder)["calls"]
    points = random.Random(0).sample(range(1, calls + 1), min(KILLS, calls))
    found = killed_at(source, folder, *points)
    for point in points:
        assert contents(folder / str(point)) == expected
    # only the last call, of the sync after the rename, finds the output there; a lock and a journal then stay
    assert [int(p) for p, there in found["there"].items() if there] == [p for p in points if p == calls]
    assert len(hidden(folder)) == 2 * (calls in points)


def test_large_data_is_written_in_parts_and_a_short_write_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, sizes = os.urandom(2 * disk.AT_ONCE + 1000), list[int]()

    def short(descriptor: int, part: memoryview, offset: int) -> int:
        sizes.append(len(part))
        return os.pwrite(descriptor, part[: disk.AT_ONCE - 24], offset)

    monkeypatch.setattr(disk, "pwrite", short)
    with open(tmp_path / "file", "wb") as file:
        disk.write_at(file.fileno(), data, 5)
        disk.write_at(file.fileno(), b"", 0)
    assert (tmp_path / "file").read_bytes() == bytes(5) + data
    assert sizes == [disk.AT_ONCE, disk.AT_ONCE, 1048]
