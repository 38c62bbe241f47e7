"""Processes of the program that begin where it has been loaded: a fork of a process that has just refused a
conversion, with limits, folder, streams and mask of its own. As real as any other process, and in a tenth of
the time. What happens while the program loads is for a process that does load it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

MOMENT = 0.003  # seconds between two looks at a child

LOADED = """
import contextlib, io, json, os, resource, sys
from ckpt_tool.program import main, run

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    assert run(["convert", "auto", "--in", "/nowhere", "--out", "/nowhere/out", "--json"]) == 2
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(job["cwd"])
        os.umask(job["umask"])
        resource.setrlimit(resource.RLIMIT_AS, (job["space"],) * 2)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        for stream, path in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
            os.dup2(os.open(path, flags if stream else os.O_RDONLY, 0o666), stream)
        os.closerange(3, 256)
        sys.argv = ["ckpt-tool", *job["arguments"]]
        try:
            main()
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        finally:
            os._exit(70)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Forker:
    """The process that has loaded the program."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", LOADED]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0)  # `ended` selects

    def start(self, arguments: list[str], cwd: Path, space: int) -> int:
        """Start `ckpt-tool` in the folder `cwd`, where files "stdout" and "stderr" get what it says, with an
        address space of so many bytes; its process id. One at a time: ask `ended` until it says so."""
        mask = os.umask(0)
        os.umask(mask)
        job = {"arguments": arguments, "cwd": str(cwd), "umask": mask, "space": space}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended(self) -> int | None:
        """Its exit code, negative for a signal; None where it still runs after a moment."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], MOMENT)[0]:
            return None
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate(timeout=60)
