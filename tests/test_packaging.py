"""The wheel holds the tree, all of it and nothing else, under one name."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("convert", "reference", "verify", "fixtures")


def tree() -> set[str]:
    """The files of the working tree as they should install."""
    found = {
        str(p.relative_to(ROOT)) for p in (ROOT / "ckpt_tool").rglob("*") if p.suffix in (".py", ".typed")
    }
    for folder in FOLDERS:
        for p in (ROOT / folder).rglob("*"):
            if p.suffix in (".py", ".json"):
                found.add(f"ckpt_tool/{p.relative_to(ROOT)}")
    return {f for f in found if "__pycache__" not in f}


def test_the_wheel_holds_exactly_the_tree(tmp_path: Path) -> None:
    copy = tmp_path / "source"  # setuptools leaves build/ in the tree it builds from
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            str(tmp_path),
            str(copy),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        info = {n.split("/")[-1] for n in archive.namelist() if ".dist-info/" in n}
    assert names == tree()
    assert {n.split("/")[0] for n in names} == {"ckpt_tool"}
    assert "LICENSE" in info and "entry_points.txt" in info
