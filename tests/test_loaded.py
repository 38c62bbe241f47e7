"""A Python that has loaded a release answers as one that loads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import loaded

RELEASE = "tf4.37"
SAYS = """
import json, os, sys, transformers
where = [transformers.__version__, transformers.__file__, sys.argv, os.getcwd()]
seeks = [s.seekable() for s in (sys.stdin, sys.stdout, sys.stderr)]
print(json.dumps([*where, os.environ.get("TOLD"), __name__, sys.stdin.read(), seeks]))
print("aside", file=sys.stderr)
"""
ENDS = {"falls off": "", "a code": "sys.exit(3)", "words": "sys.exit('no')", "nothing": "sys.exit()",
        "an error": "import no_such_module"}  # fmt: skip


def both(arguments: list[str], cwd: Path, given: str) -> list[Any]:
    """Exit code, output and last line of errors: of the loaded Python and of one that loads."""
    own = {**os.environ, "TOLD": "x y"}
    programs = {
        loaded.python(RELEASE): own,
        sys.executable: {**own, "PYTHONPATH": str(loaded.ROOT / ".judges" / RELEASE)},
    }
    runs = [
        subprocess.run([p, *arguments], cwd=cwd, env=e, input=given, capture_output=True, text=True)
        for p, e in programs.items()
    ]
    return [(run.returncode, run.stdout, run.stderr.splitlines()[-1:]) for run in runs]


def test_it_has_arguments_streams_folder_and_environment_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'beside'")
    (tmp_path / "script.py").write_text("import beside\n" + SAYS)
    one, other = both(["-W", "ignore", str(tmp_path / "script.py"), "a b", "-c"], Path("/"), "given")
    assert one == other
    version, _, arguments, folder, told, name, given, seeks = json.loads(one[1])
    assert version.startswith("4.37.") and arguments[1:] == ["a b", "-c"] and folder == "/"
    assert (told, name, given, one[2]) == ("x y", "__main__", "given", ["aside"])
    assert seeks == [False] * 3  # pipes, whatever the process had that has loaded it


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_as_any_other(end: str, tmp_path: Path) -> None:
    text = f"import sys\nprint(sys.argv)\n{ENDS[end]}"
    given = ["-c", text, "x"] if end == "nothing" else ["-", "x"]
    one, other = both(given, tmp_path, text)
    assert one == other and one[0] == (3 if end == "a code" else end in ("words", "an error"))
