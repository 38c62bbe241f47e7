"""Where an output may go: what is refused from the path alone, before anything is opened or read."""

from __future__ import annotations

import os
import pwd
import shlex
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ckpt_tool.checkpoint.hub_cache import cache_around
from ckpt_tool.checkpoint.remote_path import scheme_of
from ckpt_tool.convert.replaceable import Replace, look, mounts_below, refuse_existing
from ckpt_tool.errors import Problem, fail

ELSEWHERE = "name a folder of its own that does not exist yet"


def replaced_by(overwrite: bool, overwrite_foreign: bool) -> Replace:
    """What these two flags let an output replace; the second is enough alone."""
    return "models" if overwrite_foreign else "outputs" if overwrite else "nothing"


def check_output(
    out: Path,
    source: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    overwrite_foreign: bool = False,
    beside: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Fail with `output-conflict`, `output-exists`, `not-replaceable` or `output-failed` before anything is
    opened. `beside` are other files that are read."""
    inputs = [Path(p) for p in (source, *beside) if scheme_of(os.fspath(p)) is None]
    free_place(out, inputs, replace=replaced_by(overwrite, overwrite_foreign))


def place_for(out: Path, inputs: Iterable[Path], *, make_parents: bool = False) -> Path:
    """`out` with its parent resolved, where it is a place for an output at all, whatever stands there: kinds
    `output-conflict`, `output-failed`. `inputs` are the files and folders read; `make_parents`: the caller
    makes missing folders."""
    try:
        place = resolved(out)
        if (problem := _conflict(out, place, inputs)) is not None:
            fail(problem.kind, problem.message, file=problem.file, hint=ELSEWHERE)
        _check_parent(out, place.parent, make_parents)
        _lstat(place)
        return place
    except OSError as error:
        fail("output-failed", f"cannot be made: {error.strerror or error}", file=out)
    except (RuntimeError, ValueError) as error:  # a loop of symbolic links; a null byte
        fail("output-failed", f"cannot be made: {error}", file=out)


def free_place(
    out: Path,
    inputs: Iterable[Path],
    *,
    replace: Replace = "nothing",
    make_parents: bool = False,
    flags: bool = True,
) -> Path:
    """`place_for`, where nothing stands or what `replace` allows; else `output-exists`, `not-replaceable`.
    `flags` says that the command has options that replace what stands there."""
    place = place_for(out, inputs, make_parents=make_parents)
    if (found := _lstat(place)) is not None:
        if replace == "nothing":
            refuse_existing(place, out, found, flags=flags)
        look(place, replace, shown=out)
    return place


def resolved(path: Path) -> Path:
    """`path` as the kernel finds its folder; the last name is kept, it may be a link or not exist."""
    absolute = Path(os.path.join(os.getcwd(), path))
    if absolute.name in ("", ".."):
        return Path(os.path.realpath(absolute))
    return Path(os.path.realpath(absolute.parent)) / absolute.name


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _check_parent(out: Path, parent: Path, make_parents: bool) -> None:
    while make_parents and not os.path.lexists(parent):
        parent = parent.parent
    if not parent.exists():
        hint = f"mkdir -p {shlex.quote(str(parent))}"
        fail("output-failed", f"expected an existing folder {parent}, found none", file=out, hint=hint)
    if not parent.is_dir():
        fail("output-failed", f"expected {parent} to be a folder, found a file", file=out)
    if not os.access(parent, os.W_OK | os.X_OK):
        fail("output-failed", f"expected to be allowed to write into {parent}, found it read-only", file=out)


# --- what an output must keep apart from ----------------------------------------------------------------


def _conflict(out: Path, place: Path, inputs: Iterable[Path]) -> Problem | None:
    """Why this place is never one for an output, whatever the caller allows."""

    def conflict(expected: str, found: str) -> Problem:
        return Problem("output-conflict", f"expected {expected}, found {found}", str(out))

    status = _lstat(place)
    if status is not None and stat.S_ISLNK(status.st_mode):
        return conflict("a free name or a folder", "a symbolic link")
    if place == Path(place.anchor):
        return conflict("a folder of its own", "the root of the file system")
    for what, path in _guarded():
        if place == path:
            return conflict("a folder of its own", what)
        if place in path.parents:
            return conflict("a folder of its own", f"one that holds {what} {path}")
    if (cache := cache_around(place)) is not None:
        return conflict("a place that nobody else tidies", f"one in the Hub's cache, {cache}")
    for shown in inputs:
        if (relation := _relation(place, shown)) is not None:
            return conflict("a place apart from the input", relation)
    if status is not None and place in mounts_below(place):
        return conflict("a folder that can be renamed", "a mount point")
    return None


def _guarded() -> Iterator[tuple[str, Path]]:
    """Folders that nobody means to replace, in words and resolved."""
    yield "the working folder", Path(os.path.realpath(os.getcwd()))
    homes = [os.environ.get("HOME", "")]
    with suppress(KeyError):  # a user without an entry, as in some containers
        homes.append(pwd.getpwuid(os.getuid()).pw_dir)
    for home in homes:
        if home.startswith("/"):
            yield "the home folder", Path(os.path.realpath(home))


def _relation(place: Path, source: Path) -> str | None:
    """How `place` touches an input, in words. Links on the way to the input count too: a folder that holds
    one of them is not apart from it."""
    for way in _ways(source):
        if place == way:
            return "the input itself"
        if place in way.parents:
            return f"a folder that holds the input {source}"
    if Path(os.path.realpath(source)) in place.parents:
        return f"a place inside the input {source}"
    return None


def _ways(path: Path) -> Iterator[Path]:
    """The resolved path, and every link that the path as given goes through."""
    yield Path(os.path.realpath(path))
    given = Path(os.path.join(os.getcwd(), path))
    for part in (given, *given.parents):
        if part.is_symlink():
            yield resolved(part)
