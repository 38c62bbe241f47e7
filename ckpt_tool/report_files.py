"""The files that reports are written to: checked before any work, written complete or not at all."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress

from ckpt_tool.checkpoint.remote_path import scheme_of
from ckpt_tool.convert import aside, disk
from ckpt_tool.convert.replaceable import is_model_file
from ckpt_tool.errors import CkptToolError, Problem, fail_all
from ckpt_tool.records import dataclass

NAME_BYTES = 255


@dataclass(frozen=True)
class ReportFiles:
    """`files` by the option that named them."""

    files: Mapping[str, str]

    def check(self, inputs: Iterable[str | os.PathLike[str]]) -> None:
        """Fail with every problem of the files: no folder to write into, no permission, or a file that is
        read, for which `inputs` are the files and folders that are."""
        read = [os.path.realpath(p) for p in inputs if scheme_of(os.fspath(p)) is None]
        problems = [p for option, file in self.files.items() for p in _problems(option, file, read)]
        taken: dict[str, str] = {}
        for option, file in self.files.items():
            if any(p.where == option for p in problems):
                continue
            other = taken.setdefault(os.path.realpath(file), option)
            if other != option and not _is_stream(file):
                text = f"expected a file of its own, found the file of {other}"
                problems.append(Problem("output-conflict", text, file, option))
        fail_all(problems)

    def write(self, forms: Mapping[str, Callable[[], str]]) -> list[Problem]:
        """Write each file's form; what could not be written."""
        problems: list[Problem] = []
        for option, file in self.files.items():
            try:
                write_whole(file, forms[option]().encode("utf-8", "backslashreplace"))
            except BrokenPipeError:
                raise
            except OSError as error:
                problems += disk.failure(error, file).problems
            except CkptToolError as error:
                problems += error.problems
        return problems


def _problems(option: str, file: str, read: list[str]) -> Iterator[Problem]:
    def problem(kind: str, expected: str, found: str, hint: str | None = None) -> Problem:
        return Problem(kind, f"expected {expected}, found {found}", file, option, hint)

    if not file or "\0" in file:
        yield problem("output-failed", "the name of a file", "none")
        return
    real = os.path.realpath(file)
    folder, name = os.path.split(real)
    for path in read:
        if real == path:
            yield problem("output-conflict", "a file of its own", "an input")
            return
        around = os.path.dirname(path) if os.path.isfile(path) else path  # a shard is opened with its set
        if is_model_file(name) and f"{folder}/".startswith(f"{around}/"):
            yield problem("output-conflict", "a name that no model file has", f"one in the input {around}")
            return
    if os.path.isdir(real) or file.endswith("/"):
        yield problem("output-failed", "the name of a file", "a folder")
    elif _is_stream(file):
        if not os.access(file, os.W_OK):
            yield problem("output-failed", "to be allowed to write into it", "that it is read-only")
    elif not os.path.isdir(folder):
        there = os.path.lexists(folder)
        hint = None if there else f"mkdir -p {shlex.quote(folder)}"
        yield problem("output-failed", f"an existing folder {folder}", "a file" if there else "none", hint)
    elif len(os.fsencode(name)) > NAME_BYTES:
        yield problem("output-failed", f"a name of at most {NAME_BYTES} bytes", str(len(os.fsencode(name))))
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield problem("output-failed", f"to be allowed to write into {folder}", "that it is read-only")


def _is_stream(file: str) -> bool:
    """Whether `file` is there and is written into, not replaced: /dev/null, /dev/stdout, a pipe of the
    shell."""
    if os.path.abspath(file).startswith(("/dev/", "/proc/")):
        return os.path.exists(file)
    try:
        mode = os.stat(file).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_whole(file: str, data: bytes | Iterable[bytes]) -> None:
    """All of `data` (or of its pieces) in one step: whoever reads `file` sees it whole, or what was there
    before."""
    pieces = (data,) if isinstance(data, bytes) else data
    if _is_stream(file):
        with open(file, "wb") as stream:
            stream.writelines(pieces)
        return
    folder, name = os.path.split(os.path.realpath(file))
    aside.sweep(folder)
    with aside.file(folder) as (hidden, descriptor):  # the name may be as long as names can be
        with suppress(FileNotFoundError):
            os.fchmod(descriptor, stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode))
        at = 0
        for piece in filter(None, pieces):
            disk.write_at(descriptor, piece, at)
            at += len(piece)
        disk.fsync(descriptor)
        os.replace(hidden, os.path.join(folder, name))
