"""Pythons that have loaded torch and a release of transformers: forks of one process for each release, which
all workers of a run share. To a test they are a program like another Python, with arguments, folder,
environment, streams and exit code of its own; importing the two takes longer than most of what is asked of
them. What happens while a release loads is for a Python that does load it.

    PYTHONPATH=RELEASE python loaded.py SOCKET OWNER

answers at SOCKET until that or the process OWNER is gone. Not a test module.
"""

from __future__ import annotations

import marshal
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
HOME = "CKPT_TOOL_TEST_PYTHONS"  # the folder of this run's sockets and programs
OWNER = "CKPT_TOOL_TEST_OWNER"  # the process that begins and ends the run
CURRENT = "tf5"
MOMENT = 1.0  # seconds between two looks whether the run goes on
LENGTH = 8  # bytes of a request's length
EXIT = 4  # bytes of an answer, the exit code

CLIENT = """
import marshal, os, socket, sys
with socket.socket(socket.AF_UNIX) as to:
    to.connect(sys.argv[1])
    asked = marshal.dumps((sys.argv[2:], os.getcwd(), dict(os.environ)))
    socket.send_fds(to, [len(asked).to_bytes(8, "little")], [0, 1, 2])
    to.sendall(asked)
    code = to.recv(4)
if not code:
    sys.exit("a process of a loaded Python ended without an exit code: " + sys.argv[1] + ".log")
sys.exit(int.from_bytes(code, "little"))
"""


def begin() -> None:
    """A folder for the Pythons of this run; workers find it in the environment."""
    if HOME not in os.environ:
        os.environ |= {HOME: tempfile.mkdtemp(prefix="ckpt-tool-tests-"), OWNER: str(os.getpid())}


def end() -> None:
    if os.environ.get(OWNER) == str(os.getpid()):
        shutil.rmtree(os.environ.pop(HOME), ignore_errors=True)  # their Pythons look for it, and end
        del os.environ[OWNER]


def python(release: str) -> str:
    """The path of a Python that has loaded this release; where that is not set up, the test is skipped."""
    import pytest  # which the Pythons themselves do not load

    folder = ROOT / ".judges" / release
    if release == CURRENT:
        pytest.importorskip("transformers")
    elif not folder.is_dir():
        pytest.skip(f"{release} is not set up; `make test` does it")
    home = Path(os.environ[HOME])
    program, at = home / release, home / f"{release}.socket"
    if not program.exists():
        more = {} if release == CURRENT else {"PYTHONPATH": str(folder)}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}
        begun = [sys.executable, "-W", "ignore", __file__, str(at), os.environ[OWNER]]
        subprocess.run(begun, env=environment, check=True)
        made = home / f"{release}.{os.getpid()}"
        made.write_text(f"#!/bin/sh\nexec '{sys.executable}' -ISc '{CLIENT}' '{at}' \"$@\"\n")
        made.chmod(0o755)
        made.rename(program)
    return str(program)


# --- the process that has loaded a release -----------------------------------------------------------------


def load() -> None:
    """What the questions of tests import: the library's parts come when they are first named."""
    import safetensors.torch  # noqa: F401
    import torch._dynamo  # noqa: F401 - release 4 looks in it whether it is at work
    import transformers
    from transformers import AutoModel, AutoTokenizer, GenerationConfig, modeling_utils  # noqa: F401

    _ = transformers.PreTrainedTokenizerFast


def serve(at: str, owner: int) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        own = f"{at}.{os.getpid()}"
        server.bind(own)
        server.listen(64)  # before anybody finds it
        try:
            os.link(own, at)
        except FileExistsError:  # another worker was first
            return
        finally:
            os.unlink(own)
        if os.fork():
            return
        os.setsid()
        log = os.open(f"{at}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for stream, to in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(to, stream)
        try:
            load()
            answer_all(server, at, owner)
        finally:
            Path(at).unlink(missing_ok=True)


def answer_all(server: socket.socket, at: str, owner: int) -> None:
    server.settimeout(MOMENT)
    while os.path.exists(at) and lives(owner):
        with suppress(TimeoutError):
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                answer(connection)
            connection.close()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def lives(process: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def answer(connection: socket.socket) -> None:
    """As the process that was asked for: its end is the end of this one."""
    code = 70
    try:
        connection.settimeout(None)
        head, streams, _, _ = socket.recv_fds(connection, LENGTH, 3)
        asked = b""
        while len(asked) < int.from_bytes(head, "little"):
            asked += connection.recv(1 << 16)
        arguments, folder, environment = marshal.loads(asked)
        for stream, to in zip(streams, (0, 1, 2), strict=True):
            os.dup2(stream, to)
            os.close(stream)
        sys.stdin = os.fdopen(0, closefd=False)  # those that were there know of other files, which could seek
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        code = ended(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        connection.sendall(code.to_bytes(EXIT, "little"))
        os._exit(code)


def ended(arguments: list[str]) -> int:
    """The exit code of `python *arguments`."""
    while arguments[0] == "-W":
        warnings.simplefilter(arguments[1])  # type: ignore[arg-type]
        arguments = arguments[2:]
    more = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    sys.path[0:1] = ["", *more]  # the folder of this file is nobody else's
    try:
        run(arguments)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(arguments: list[str]) -> None:
    what, *rest = arguments
    if what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what in ("-c", "-"):
        text = rest.pop(0) if what == "-c" else sys.stdin.read()
        sys.argv = [what, *rest]
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(text, "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(what).parent)
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
