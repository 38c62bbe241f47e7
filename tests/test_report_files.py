"""The files of reports: what is wrong with them is told before any work, and they are written in one step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tool.errors import CkptToolError
from ckpt_tool.report_files import ReportFiles

Written = Callable[[str], Path]
VARIANT = "mistral-float32"


@pytest.fixture
def work(conversions: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(conversions(VARIANT), tmp_path / "out")
    (tmp_path / "prompts.json").write_text("[[1, 2]]")
    (tmp_path / "link").symlink_to("prompts.json")
    (tmp_path / "folder").mkdir()
    return tmp_path


def problems(**files: str) -> dict[str, str]:
    """The kinds of problems by option."""
    with pytest.raises(CkptToolError) as caught:
        ReportFiles({f"--{k}": v for k, v in files.items()}).check(["out", "prompts.json", "hf://a/b"])
    return {str(p.where): p.kind for p in caught.value.problems}


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("", "output-failed"),
        ("nowhere/x.xml", "output-failed"),
        ("prompts.json/x.xml", "output-failed"),
        ("folder", "output-failed"),
        ("new/", "output-failed"),
        (".", "output-failed"),
        ("n" * 300, "output-failed"),
        ("a\0b", "output-failed"),
        ("prompts.json", "output-conflict"),
        ("link", "output-conflict"),
        ("folder/../prompts.json", "output-conflict"),
        ("out", "output-conflict"),
        ("out/config.json", "output-conflict"),
        ("out/model.safetensors", "output-conflict"),
        ("out/adapter.bin/../ckpt-tool.json", "output-conflict"),
        ("out/chat_template.json", "output-conflict"),  # not there yet, and read if it were
    ],
)
def test_files_that_cannot_be_reports(file: str, kind: str, work: Path) -> None:
    before = sorted(map(str, work.rglob("*")))
    assert problems(html=file) == {"--html": kind}
    assert sorted(map(str, work.rglob("*"))) == before


@pytest.mark.parametrize("file", ["new.xml", "out/report.html", "/dev/null", "folder/../new.xml", "-new"])
def test_files_that_can(file: str, work: Path) -> None:
    ReportFiles({"--html": file}).check(["out", "prompts.json"])


def test_a_read_only_place_is_told_before(work: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(work / "folder")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        assert problems(html="folder/x") == {"--html": "output-failed"}
    finally:
        subprocess.run(["umount", str(work / "folder")], check=True)


def program(*arguments: str, cwd: Path, setup: str = "") -> subprocess.CompletedProcess[str]:
    script = f"{setup}\nfrom ckpt_tool.program import main\nmain()"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_all_problems_come_together_and_before_the_work(work: Path) -> None:
    setup = (
        "import ckpt_tool.api as m\ndef opened(*a, **k): raise AssertionError('opened')\nm.verify = opened"
    )
    files = ["--junit", "nowhere/a", "--html", "out/config.json", "--markdown", "same", "--json", "same"]
    done = program("verify", "out", "--no-source", *files, cwd=work, setup=setup)
    assert done.returncode == 2 and done.stderr.count("error[output-") == 3
    for option in ("--junit", "--html", "--json"):
        assert f": {option}: expected" in done.stderr
    (work / "parity.toml").write_text('[[check]]\nname = "a"\nout = "out"\nlevels = ["coverage"]\n')
    for file in ("parity.toml", "out/config.json"):
        before = (work / file).read_bytes()
        refused = program("gate", "parity.toml", "--json", file, cwd=work)
        assert refused.returncode == 2 and "error[output-conflict]" in refused.stderr
        assert (work / file).read_bytes() == before


def test_reports_are_written_whole_with_the_modes_of_files(work: Path) -> None:
    (work / "kept.json").write_text("old")
    (work / "kept.json").chmod(0o640)
    (work / "a link").symlink_to("folder/real.html")
    files = ["--json", "kept.json", "--junit", "new.xml", "--html", "a link", "--markdown", "/dev/stdout"]
    done = program("verify", "out", "--no-source", "--level", "coverage", *files, cwd=work)
    assert done.returncode == 0, done.stderr
    assert json.loads((work / "kept.json").read_text())["status"] == "pass"
    assert (work / "kept.json").stat().st_mode & 0o777 == 0o640
    mask = os.umask(0)
    os.umask(mask)
    assert (work / "new.xml").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (work / "a link").is_symlink() and "<html" in (work / "folder" / "real.html").read_text()
    assert done.stdout.startswith("#")
    assert not [p for p in work.rglob(".ckpt-tool-*")]


def test_a_report_that_cannot_be_written_leaves_the_old_one_and_shows_the_verdict(work: Path) -> None:
    (work / "kept.json").write_text("old")
    setup = (
        "import errno\nfrom ckpt_tool.convert import disk\n"
        "def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')\ndisk.write_at = full"
    )
    files = ["--json", "kept.json", "--html", "new.html"]
    done = program("verify", "out", "--no-source", "--level", "coverage", *files, cwd=work, setup=setup)
    assert done.returncode == 2 and done.stderr.count("error[disk-full]") == 2
    assert "ckpt-tool verify: pass" in done.stdout
    assert (work / "kept.json").read_text() == "old" and not (work / "new.html").exists()
    assert not [p for p in work.rglob(".ckpt-tool-*")]


def test_reports_are_written_also_where_nobody_reads_the_terminal(work: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ckpt_tool", "verify", "out", "--no-source", "--level", "coverage"]
    done = subprocess.run([*command, "--junit", "new.xml"], cwd=work, stdout=writer, check=False)
    os.close(writer)
    assert done.returncode == 141 and "<testsuite" in (work / "new.xml").read_text()
