"""How the program ends: whatever happens becomes one exit code and one clear text.

0 done and everything asked for holds; 1 verification found a difference, and nothing else; 2 could not run;
128 + N stopped by signal N, of which 141 is a closed pipe. The standard library and loading.py only are
imported until the command runs, so that an interrupt while the rest is loading is told like any other.
"""

from __future__ import annotations

import atexit
import gc
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from ckpt_tool.loading import ONE_THREAD, loading

if TYPE_CHECKING:
    import click

    from ckpt_tool.errors import CkptToolError, Problem

CLOSED_PIPE = 128 + signal.SIGPIPE
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 1.0  # seconds in which the same signal again is still the first: a group of processes gets it twice
TRACEBACK = "CKPT_TOOL_TRACEBACK"
# The commands whose --json may name a file.
REPORTING = ("verify", "diagnose", "gate")
# Commands whose objects nearly all live until the end: to look for cycles among them after every 700 new ones
# takes a fifth of the time of a model of thousands of tensors. Not those that compute with a model.
KEEPING = ("convert", "inspect", "families", "plan", "fixtures", "--help", "-h", "--version")
SELDOM = (500_000, 20, 20)
# Bytes of addresses that numpy 2.4 takes while it is loaded, with one such thread, and a little more.
NUMPY = 84 << 20


class Interrupted(BaseException):
    """A signal asked the program to stop; raised in the main thread so that `finally` clauses clean up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(*, whole: bool = True) -> NoReturn:
    """Entry point of `ckpt-tool`. `whole`: the process is this program's and may end at once; else it ends by
    SystemExit."""
    listen()
    keeping = sys.argv[1:2] and sys.argv[1] in KEEPING
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if keeping or limited:
        os.environ.setdefault(ONE_THREAD, "1")  # none of these multiplies much with numpy
    if limited:
        sys.meta_path.insert(0, RoomForNumpy())
    try:
        code = flush(run(sys.argv[1:]))
        if whole and threading.active_count() == 1:
            leave(code)
        gc.freeze()  # or the interpreter's end would look for cycles among all there is
    except (KeyboardInterrupt, Interrupted) as stop:  # while the end was told, or came
        code = 128 + getattr(stop, "number", signal.SIGINT)
    if _came:
        for number in SIGNALS:  # the interpreter's own end has no handlers: the code would be lost
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


class RoomForNumpy:
    """Looks, where addresses are limited (`ulimit -v`), whether numpy will find the room that it needs. Its
    library for matrices would end the process with exit code 1, which is that of a difference."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """MemoryError where there is too little; never finds anything."""
        if name == "numpy":
            import mmap

            try:
                mmap.mmap(-1, NUMPY, flags=mmap.MAP_PRIVATE).close()
            except OSError:
                raise MemoryError("no room to load numpy") from None


def leave(code: int) -> NoReturn:
    """End as `sys.exit` does, but for taking apart every module and object: that is a tenth of the time of a
    small conversion. What was registered for the end (`atexit`) is done, standard streams are flushed."""
    atexit._run_exitfuncs()
    os._exit(flush(code))


def run(arguments: list[str]) -> int:
    """Run the command line; what went wrong is told on stderr, or as JSON on stdout where that was asked."""
    try:
        open_streams()
        if arguments[:1] and arguments[0] in KEEPING:
            gc.set_threshold(*SELDOM)
        with loading():
            from ckpt_tool.cli import cli

            if "_CKPT_TOOL_COMPLETE" in os.environ:
                from ckpt_tool.completion import prepare

                prepare(cli)
        return int(cli.main(arguments, prog_name="ckpt-tool", standalone_mode=False) or 0)
    except BaseException as error:
        return ended(error, arguments)


# --- signals --------------------------------------------------------------------------------------------


def listen() -> None:
    """Turn signals that ask for an end into exceptions; one that is ignored (nohup, a job in the background)
    stays ignored. A second one, later than `GRACE`, ends the program at once, as a kill would."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)


_came: list[tuple[int, float]] = []  # the first signal, and when it came


def _stop(number: int, _frame: FrameType | None) -> None:
    if _came:
        if time.monotonic() - _came[0][1] > GRACE:
            os._exit(128 + number)
        return
    _came.append((number, time.monotonic()))
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Interrupted(number)


# --- streams --------------------------------------------------------------------------------------------


def open_streams() -> None:
    """Nothing that is opened later may get the number of a standard stream that was closed at the start: the
    first file would be taken for it. stdout becomes a pipe that nobody reads, since its reader is gone."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _fill(number)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the locale cannot say ends nothing


def _fill(number: int) -> None:
    """Give the closed descriptor `number` something: a pipe without a reader for stdout, else nothing."""
    opened = os.pipe() if number == 1 else (os.open(os.devnull, os.O_RDWR),)
    if opened[-1] != number:
        os.dup2(opened[-1], number)  # which closes the reader, should it be there
    for descriptor in opened:
        if descriptor != number:
            os.close(descriptor)


def flush(code: int) -> int:
    """Write out what is buffered, and the exit code after that. A stream that cannot be written leads nowhere
    from here on, since the interpreter tries once more at its end."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            code = CLOSED_PIPE if isinstance(error, BrokenPipeError) else code or 2
            _nowhere(number)
            if number == 1 and not isinstance(error, BrokenPipeError):
                _say(_not_written(error))
    return code


def _stdout_is_stuck() -> bool:
    """Whether stdout takes not even the end of a line; it then leads nowhere."""
    try:
        print(flush=True)
    except (OSError, ValueError):
        _nowhere(1)
        return True
    return False


def _not_written(error: Exception) -> str:
    return f"error[write-failed]: stdout: cannot be written: {getattr(error, 'strerror', error)}"


def _nowhere(number: int) -> None:
    opened = os.open(os.devnull, os.O_WRONLY)
    os.dup2(opened, number)
    os.close(opened)


def _say(text: str) -> bool:
    """Write `text` to stderr; whether that has a reader."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError) as error:
        _nowhere(2)
        return not isinstance(error, BrokenPipeError)
    return True


def _is_closed_pipe(error: BaseException) -> bool:
    """Whether `error` is about a standard stream whose reader went away. Libraries turn that into an exit of
    their own: rich while it leads stdout nowhere, click without a context."""
    broken = any(isinstance(e, BrokenPipeError) for e in _chain(error))
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, select.POLLERR)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    return (broken and gone) or (isinstance(error, SystemExit) and (broken or gone))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


# --- the end --------------------------------------------------------------------------------------------


def ended(error: BaseException, arguments: list[str]) -> int:
    """Tell what `error` was, and the exit code for it."""
    from ckpt_tool.errors import CkptToolError

    if _is_closed_pipe(error):
        _nowhere(1)
        return CLOSED_PIPE
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return 0
    if isinstance(error, OSError) and error.filename is None and not _came and _stdout_is_stuck():
        return 2 if _say(_not_written(error)) else CLOSED_PIPE
    told = in_words_of(arguments, error if isinstance(error, CkptToolError) else as_told(error))
    if TRACEBACK in os.environ or (told.kind in ("internal", "system") and _verbose(arguments)):
        import traceback

        _say("".join(traceback.format_exception(error)).rstrip())
    if not wants_json(arguments) and type(error).__name__ == "NoArgsIsHelpError":
        return told.exit_code if _say(str(error).rstrip()) else CLOSED_PIPE  # the help, as it is laid out
    if not wants_json(arguments):
        return told.exit_code if _say(told.text()) else CLOSED_PIPE
    import json

    try:
        print(json.dumps(told.to_json(), indent=2), flush=True)
    except BrokenPipeError:
        _nowhere(1)
        return CLOSED_PIPE
    except (OSError, ValueError):
        _nowhere(1)
        _say(told.text())
    return told.exit_code


# The commands whose input is --in; of others it is an argument, --source or a line of a file.
GIVEN_BY_IN = ("convert", "plan")


def in_words_of(arguments: list[str], told: CkptToolError) -> CkptToolError:
    """`told` with hints that name the option of this command where they have that of `convert` for a path."""
    command = next((a for a in arguments if not a.startswith("-")), "")
    if command in GIVEN_BY_IN or not any("--in " in (p.hint or "") for p in told.problems):
        return told
    import re
    from dataclasses import replace

    from ckpt_tool.errors import CkptToolError

    def said(found: re.Match[str]) -> str:
        option = "--source " if _is_of_source(found["path"], arguments) else ""
        verb = "" if option or found["before"].endswith((": ", "give ")) else "give "
        return f"{found['before']}{verb}{option}{found['path']}"

    path = re.compile(r"(?P<before>(?:^|.*?[ (]))--in (?P<path>'[^']*'|[^\s)]+)")
    problems = (p if p.hint is None else replace(p, hint=path.sub(said, p.hint)) for p in told.problems)
    return CkptToolError(*problems, exit_code=told.exit_code)


def _is_of_source(quoted: str, arguments: list[str]) -> bool:
    """Whether a path is the value of --source, or lies in or around it, and not in another argument's."""
    from shlex import split

    def alike(given: str) -> bool:
        one, other = (os.path.abspath(p) + os.sep for p in (given, path))
        return one.startswith(other) or other.startswith(one)

    try:
        path = (split(quoted) or [""])[0]
    except ValueError:  # a name inside an archive, as it stands there
        path = quoted
    pairs = list(zip(["", *arguments], arguments, strict=False))
    of_source = [
        b.removeprefix("--source=") for a, b in pairs if a == "--source" or b.startswith("--source=")
    ]
    others = [
        b for a, b in pairs[1:] if not b.startswith("-") and not a.startswith("-") and b not in of_source
    ]
    return any(map(alike, of_source)) and not any(map(alike, others))


def as_told(error: BaseException) -> CkptToolError:
    """Any other exception as one of ours."""
    from ckpt_tool.errors import CkptToolError, Problem, has_no_room, missing_package

    click = sys.modules.get("click")  # it may be what is missing
    if _came or isinstance(error, KeyboardInterrupt | Interrupted):
        # whatever a library made of a signal that came
        number = signal.Signals(_came[0][0] if _came else getattr(error, "number", signal.SIGINT))
        return CkptToolError(Problem("interrupted", f"stopped by {number.name}"), exit_code=128 + number)
    if click is not None and isinstance(error, click.exceptions.Abort):
        return CkptToolError(Problem("interrupted", "stopped by SIGINT"), exit_code=128 + signal.SIGINT)
    if click is not None and isinstance(error, click.ClickException):
        return CkptToolError(Problem("usage", error.format_message(), hint=_help_of(error)))
    if isinstance(error, MemoryError) or has_no_room(error) or _is_torch_without_memory(error):
        text = "expected enough memory for the work, found the limit reached"
        return CkptToolError(Problem("out-of-memory", text))
    if isinstance(error, ImportError) and (missing := missing_package(error)) is not None:
        return CkptToolError(missing)
    if isinstance(error, OSError) and error.errno is not None:
        file = None if error.filename is None else os.fsdecode(error.filename)
        return CkptToolError(Problem("system", error.strerror or str(error), file=file))
    return CkptToolError(_defect(error))


def _help_of(error: click.ClickException) -> str | None:
    """Where the command's words are told, unless the message has the one that was meant."""
    context = getattr(error, "ctx", None)
    if context is None or "did you mean" in error.format_message().lower():
        return None
    wanted = [p for p in context.command.params if p.required]
    # make_metavar takes the context from click 8.2 on, and nothing before
    words = [p.human_readable_name for p in wanted if p.param_type_name == "argument"]
    words += [f"{p.opts[0]} {p.metavar or 'VALUE'}" for p in wanted if p.param_type_name == "option"]
    return f"{' '.join([context.command_path, *words])} ...; `{context.command_path} --help` tells more"


def _is_torch_without_memory(error: BaseException) -> bool:
    """Which on the CPU is a RuntimeError like any other."""
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, RuntimeError) and (named or "can't allocate memory" in str(error))


def _defect(error: BaseException) -> Problem:
    import traceback

    from ckpt_tool.errors import Problem

    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "ckpt_tool" in f.filename or f.filename.startswith(home)]
    place = f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""
    said = f": {error}" if str(error) else ""
    return Problem(
        "internal",
        f"expected to go on, found {type(error).__name__}{said}{place}",
        hint=f"a defect of ckpt-tool: please report the command, and what it prints with {TRACEBACK}=1",
    )


def _verbose(arguments: list[str]) -> bool:
    return "--verbose" in arguments or "-v" in arguments


def wants_json(arguments: list[str]) -> bool:
    """Whether JSON on stdout was asked for; `--json FILE` of a report is not that."""
    for k, argument in enumerate(arguments):
        if argument in ("--json", "--json=-"):
            after = arguments[k + 1] if k + 1 < len(arguments) else "-"
            names_file = argument == "--json" and after != "-" and not after.startswith("-")
            return not (names_file and any(command in arguments[:k] for command in REPORTING))
    return False
