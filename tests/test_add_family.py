"""The family on the page CONTRIBUTING.md is real: its files, added to a copy of the tree, give a green row of
`ckpt-tool table`, and with one of its traits left out a red one."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests import loaded

ROOT = Path(__file__).parents[1]
ROOMS = ("convert", "fixtures", "reference", "verify")


def example() -> dict[str, str]:
    """The files of the page, by path: code blocks that begin with a comment that names one."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^( *)```python\n +# (\S+\.py)\n(.*?)^ *```$", page, re.DOTALL | re.MULTILINE)
    return {path: re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, path, text in blocks}


def lines_of_code(text: str) -> int:
    """Lines that are no blank, no comment and no docstring."""
    said = [
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
    ]
    docs = {k for n in said for k in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
    listed = enumerate(text.splitlines(), start=1)
    return sum(
        k not in docs and line.strip() != "" and not line.strip().startswith("#") for k, line in listed
    )


def row(folder: Path, files: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """Exit code and the row of `ckpt-tool table` from a copy of the tree with these files in it."""
    tree = folder / "ckpt_tool"
    shutil.copytree(ROOT / "ckpt_tool", tree)
    for room in ROOMS:
        shutil.copytree(ROOT / room, tree / room)
    for path, text in files.items():
        assert not (tree / path).exists()
        (tree / path).write_text(text, encoding="utf-8")
    python = loaded.python(loaded.CURRENT)
    program = "from ckpt_tool.program import main; main(whole=False)"  # the process was loaded before
    command = [python, "-W", "ignore", "-c", program, "table", "--only", "seed-oss", "--json"]
    env = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=folder)
    assert run.returncode in (0, 1), run.stderr[-2000:]
    (found,) = json.loads(run.stdout)
    return run.returncode, found


def test_the_example_is_four_files_of_about_forty_lines() -> None:
    files = example()
    assert sorted(files) == [
        "convert/families/seed_oss.py",
        "fixtures/families/seed_oss.py",
        "reference/hf_seed_oss.py",
        "reference/seed_oss.py",
    ]
    assert sum(map(lines_of_code, files.values())) <= 45


def test_the_example_gets_its_green_row(tmp_path: Path) -> None:
    code, found = row(tmp_path, example())
    assert (code, found["bits"], found["round_trip"], found["verdict"]) == (0, "pass", "equal", "pass")
    assert found["parity_nmse"] < 1e-10 > found["judge_nmse"]


def test_a_trait_left_out_gives_a_red_one(tmp_path: Path) -> None:
    files = example()
    path = "reference/seed_oss.py"
    files[path] = files[path].replace('{"biased": ("qkv",)}', "{}")
    code, found = row(tmp_path, files)
    assert code == 1 and found["verdict"] != "pass"
