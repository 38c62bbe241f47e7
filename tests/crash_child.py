"""Converts a folder again and again, killed each time at another call that changes the disk. Run by
test_durable.py; forking here, where no thread runs, costs one start of Python for all of them.

    python crash_child.py SOURCE FOLDER POINT...

The output of the run that dies (SIGKILL) when call number POINT begins is FOLDER/POINT. A second run into the
same place, every other time resuming, must end well. Prints as JSON, for each point, whether the output was
there after the kill; without points, the number of calls of a whole run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckpt_tool.api import Options, convert
from ckpt_tool.convert import disk

CALLS = ("pwrite", "fsync", "fdatasync", "fallocate", "mkdir", "unlink", "rename_new")


def run(source: Path, out: Path, last: int, resume: bool) -> int:
    """One conversion; the number of calls it made."""
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **more)

        return counting

    for name in CALLS:
        setattr(disk, name, counted(getattr(disk, name)))
    convert(source, out, options=Options(max_shard_bytes=60_000), jobs=1, check=False, resume=resume)
    return count


def forked(source: Path, out: Path, last: int, resume: bool) -> int:
    """The exit code of a child that converts; minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            run(source, out, last, resume)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    source, folder, points = Path(sys.argv[1]), Path(sys.argv[2]), [int(a) for a in sys.argv[3:]]
    published = {}
    for k, point in enumerate(points):
        out = folder / str(point)
        code = forked(source, out, point, resume=False)
        if code != -signal.SIGKILL:
            raise SystemExit(f"point {point}: expected a kill, found exit code {code}")
        published[point] = out.exists()
        if not published[point] and (code := forked(source, out, 0, resume=k % 2 == 0)) != 0:
            raise SystemExit(f"after point {point}: exit code {code}")
    print(json.dumps({"calls": None if points else run(source, folder / "0", 0, False), "there": published}))


if __name__ == "__main__":
    main()
