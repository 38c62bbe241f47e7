"""The command line without a process of its own, for tests of what it says and not of how a process ends: of
a tiny command, starting Python takes most of the time."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from ckpt_tool.program import run

TERMINAL = ("COLUMNS", "NO_COLOR", "FORCE_COLOR")  # what the tests' own terminal would add


def program(*arguments: str, cwd: Path, columns: int | None = None) -> CompletedProcess[str]:
    """What `ckpt-tool` ends with and says in the folder `cwd`, its output redirected."""
    environment = {k: v for k, v in os.environ.items() if k not in TERMINAL}
    if columns is not None:
        environment["COLUMNS"] = str(columns)
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = run(list(arguments))
    return CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
