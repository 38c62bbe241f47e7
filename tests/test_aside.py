"""Files beside their place: processes that are killed at any call leave nothing that the next one keeps."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckpt_tool import report_files
from ckpt_tool.convert import aside, disk
from ckpt_tool.verify.report import Report


def killed(work: Callable[[], object], module: object, call: str, number: int) -> bool:
    """Whether a child that does `work` was killed when its call of that number began; else it ended well."""
    pid = os.fork()
    if pid == 0:
        real, count = getattr(module, call), 0

        def counting(*arguments: object, **more: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        setattr(module, call, counting)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize(
    ("module", "call"), [(os, "open"), (disk, "pwrite"), (disk, "fsync"), (os, "replace"), (os, "unlink")]
)
def test_a_certificate_or_report_is_whole_or_the_earlier_one(
    module: object, call: str, tmp_path: Path
) -> None:
    place = tmp_path / "certificate.json"
    for number in range(1, 9):
        place.write_bytes(b"earlier")
        there = killed(lambda: report_files.write_whole(str(place), [b"new ", b"one"]), module, call, number)
        assert place.read_bytes() in (b"earlier", b"new one") and (there or place.read_bytes() == b"new one")
        report_files.write_whole(str(place), b"next")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["certificate.json"]
        if not there:
            return
    pytest.fail(f"more than 8 calls of {call}")


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    with aside.file(str(tmp_path)) as (path, _), aside.folder(str(tmp_path)) as folder:
        aside.sweep(str(tmp_path))
        assert Path(path).exists() and folder.is_dir()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_process_is_about_to_remove_is_made_anew(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for what killed ones left, and came between making and locking."""
    sweeping: list[tuple[str, int]] = []
    locked = aside._locked

    def slow(descriptor: int) -> bool | None:
        if not sweeping:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            sweeping.append((path, os.open(path, os.O_RDONLY)))
            assert locked(sweeping[0][1])
        return locked(descriptor)

    monkeypatch.setattr(aside, "_locked", slow)
    held = aside.file(str(tmp_path)) if kind == "file" else aside.folder(str(tmp_path))
    with held as made:
        path = Path(made[0] if isinstance(made, tuple) else made)
        assert os.fspath(path) != sweeping[0][0] and [*tmp_path.iterdir()] == [path]
    os.close(sweeping[0][1])
    assert not list(tmp_path.iterdir())


def test_only_names_of_ours_are_removed_and_no_links_are_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (tmp_path / f"{aside.PREFIX}{'0' * 16}").symlink_to(outside)
    (tmp_path / f"{aside.PREFIX}{'0' * 15}x").touch()
    (tmp_path / f"{aside.PREFIX}{'1' * 16}").mkdir()
    aside.sweep(str(tmp_path))
    assert (outside / "kept").exists() and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("module", "call"), [(os, "mkdir"), (disk, "fsync"), (os, "link"), (os, "replace")])
def test_a_graph_is_never_published_by_halves(
    module: object, call: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps on the disk of a right export, without the export."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from ckpt_tool.verify import onnx_made

    def export(
        found: object, task: object, asked: object, folder: Path, name: str, prompts: object
    ) -> list[object]:
        (folder / name).write_bytes(b"graph")
        (folder / f"{name}{onnx_made.DATA}").write_bytes(b"weights")
        return []

    monkeypatch.setattr(onnx_made, "_export", export)
    monkeypatch.setattr(onnx_made, "source_of", lambda *a: nullcontext(SimpleNamespace(config={})))
    monkeypatch.setattr(onnx_made, "chosen_task", lambda *a, **more: "task")
    monkeypatch.setattr(onnx_made, "verify_file", lambda *a, **more: Report("x"))
    monkeypatch.setattr(Report, "status", "pass")
    place, both = tmp_path / "model.onnx", ["model.onnx", "model.onnx.data"]
    asked = onnx_made.Asked(overwrite=overwrite)
    for number in range(1, 9):
        there = killed(lambda: onnx_made.export_onnx("in", place, asked=asked), module, call, number)
        shown = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))
        assert place.name not in shown or shown == both
        if place.exists():
            assert not there or (module, call) == (os, "replace")
            place.unlink()
            (tmp_path / both[1]).unlink()
        onnx_made.export_onnx("in", place, asked=asked)
        assert sorted(p.name for p in tmp_path.iterdir()) == both
        for name in both:
            (tmp_path / name).unlink()
        if not there:
            return
    pytest.fail(f"more than 8 calls of {call}")
