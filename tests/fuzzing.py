"""Fuzzing of every reader: right inputs are changed, and what is read or refused is looked at.

    python -m tests.fuzzing --seconds 120            # every target in turns, as `make fuzz` runs them
    python -m tests.fuzzing --executions 1000000     # a long run; --target NAME, --jobs 2
    python -m tests.fuzzing --corpus                 # write down what reached something new

An input passes if it is read, or refused with an error of ours that names a file and says something, in less
than TIME seconds and within SPACE bytes of new address space, and if no file is left beside it. Where an
outside reader (torch, safetensors) reads it too, both must have read the same bytes.

What is kept to be changed further is what was refused at a line where nothing was refused before, or read
after more than one change: the places where errors are raised stand for the branches of the readers, and
cost nothing to watch. An input is known by its recipe, the numbers of the changes made one after another to
the right input of its target: equal recipes give equal bytes, and the corpus (data/fuzz.txt) holds recipes.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ckpt_tool.errors import CkptToolError

TIME = 10.0  # seconds for one input
SPACE = 512 << 20
KEPT = 400  # inputs of a target that are changed further
CORPUS = Path(__file__).parent / "data" / "fuzz.txt"
MEMORY_FOLDER = Path("/dev/shm")  # files in memory, where the system has that

Read = Mapping[str, bytes]  # what was read: dtype, shape and bytes by name
Files = dict[str, bytes]
Change = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Target:
    """One reader. `files` are a right input, of which those in `changed` are changed; `read` reads the whole
    of what lies in a folder. `inner` changes what is inside of a file and packs it again, with right
    checksums. `outside` reads the same by another library: None where it refuses. `words` are put in."""

    name: str
    files: Files
    changed: tuple[str, ...]
    read: Callable[[Path], Read | None]
    inner: Callable[[bytes, random.Random, Change], bytes] | None = None
    outside: Callable[[Path], Read | None] | None = None
    words: tuple[bytes, ...] = ()


class Fault(Exception):
    """An input that did not pass."""


class _TooLong(BaseException):
    """Above Exception, that no reader takes it for an error of its own."""


# --- changes --------------------------------------------------------------------------------------------

_NUMBERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
_DIGITS = re.compile(rb"-?\d+")
_TEXTS = (
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"true",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"18446744073709551616",
    b"1.5",
)


def changed(data: bytes, chance: random.Random, words: Sequence[bytes] = ()) -> bytes:
    """`data` with one to four small changes."""
    held = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice(_CHANGES)(held, chance, words)
    return bytes(held)


def _bit(held: bytearray, chance: random.Random, words: Sequence[bytes]) -> None:
    if held:
        held[chance.randrange(len(held))] ^= 1 << chance.randrange(8)


def _byte(held: bytearray, chance: random.Random, words: Sequence[bytes]) -> None:
    if held:
        held[chance.randrange(len(held))] = chance.choice((0, 0x20, 0x7F, 0x80, 0xFF, chance.randrange(256)))


def _integer(held: bytearray, chance: random.Random, words: Sequence[bytes]) -> None:
    width = chance.choice((2, 4, 8))
    if len(held) >= width:
        at, number = chance.randrange(len(held) - width + 1), chance.choice(_NUMBERS)
        held[at : at + width] = (number & (1 << 8 * width) - 1).to_bytes(width, "little")


def _near(held: bytearray, chance: random.Random, words: Sequence[bytes]) -> None:
    """A number a little larger or smaller."""
    width = chance.choice((1, 2, 4, 8))
    if len(held) >= width:
        at = chance.randrange(len(held) - width + 1)
        number = int.from_bytes(held[at : at + width], "little") + chance.randint(-3, 3)
        held[at : at + width] = (number & (1 << 8 * width) - 1).to_bytes(width, "little")


def _cut(held: bytearray, chance: random.Random, words: Sequence[bytes]) -> None:
    at = chance.randrange(len(held) + 1)
    del held[at : at + chance.choice((1, 2, 4, 16, len(held)))]


def _again(held: bytearray, chance: random.Random, words: Sequence[bytes]) -> None:
    """A piece once more, somewhere."""
    start = chance.randrange(len(held) + 1)
    piece = held[start : start + chance.choice((1, 2, 8, 32, 128))]
    at = chance.randrange(len(held) + 1)
    held[at:at] = piece


def _moved(held: bytearray, chance: random.Random, words: Sequence[bytes]) -> None:
    """A piece over another."""
    start, size = chance.randrange(len(held) + 1), chance.choice((1, 4, 16, 64))
    piece = held[start : start + size]
    at = chance.randrange(len(held) + 1)
    held[at : at + len(piece)] = piece


def _digits(held: bytearray, chance: random.Random, words: Sequence[bytes]) -> None:
    """A number that is text is another."""
    found = list(_DIGITS.finditer(held[: 1 << 16]))
    if found:
        chosen = chance.choice(found)
        number = int(chosen[0]) if len(chosen[0]) < 20 else 0
        other = b"%d" % chance.choice((number + 1, number - 1, number * 2, -number, 1 << 31, 1 << 63))
        held[chosen.start() : chosen.end()] = chance.choice((other, *_TEXTS))


def _word(held: bytearray, chance: random.Random, words: Sequence[bytes]) -> None:
    if words:
        at = chance.randrange(len(held) + 1)
        word = chance.choice(words)
        held[at : at + chance.choice((0, len(word)))] = word


_CHANGES = (_bit, _bit, _byte, _integer, _near, _cut, _again, _moved, _digits, _word)


def made(target: Target, recipe: Sequence[int]) -> Files:
    """The input of that recipe."""
    files = dict(target.files)
    for number in recipe:
        chance = random.Random(number)
        name = chance.choice(target.changed)

        def change(data: bytes, chance: random.Random = chance) -> bytes:
            return changed(data, chance, target.words)

        if target.inner is not None and chance.random() < 0.6:
            try:
                files[name] = target.inner(files[name], chance, change)
                continue
            except Exception:  # it is too broken by now to be unpacked
                pass
        files[name] = change(files[name])
    return files


# --- one input ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What became of an input: read or not, where it was refused, and whether an outside reader agreed."""

    read: bool
    place: tuple[str, ...]
    both: bool = False


@contextmanager
def bounded() -> Iterator[None]:
    """Within SPACE more bytes of addresses than now, and within the time."""

    def stop(signal_number: int, frame: FrameType | None) -> NoReturn:
        raise _TooLong

    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + SPACE, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def look(target: Target, files: Files, folder: Path) -> Seen:
    """Read it from a `folder` that holds nothing else; Fault where it does not pass."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    signal.setitimer(signal.ITIMER_REAL, TIME)
    try:
        found = target.read(folder)
    except CkptToolError as error:
        if not all(p.message and p.kind != "internal" for p in error.problems):
            raise Fault(f"refused without a word: {error}") from error
        return Seen(False, (error.kind, _said(error.problems[0].message), *_lines(error)))
    except _TooLong:
        raise Fault(f"not read within {TIME:g} seconds") from None
    except Exception as error:
        raise Fault("".join(traceback.format_exception(error))[-3000:]) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        left = set(os.listdir(folder)) - set(files)
    if left:
        raise Fault(f"left behind: {', '.join(sorted(left))}")
    other = None if target.outside is None or found is None else target.outside(folder)
    if other is not None and found is not None and dict(other) != dict(found):
        raise Fault(f"read otherwise by the outside reader: {_difference(found, other)}")
    return Seen(True, (), other is not None)


def _said(message: str) -> str:
    """What is expected, without the numbers and names of this input: one line raises many errors at once."""
    return " ".join(re.findall(r"\b[a-z]+\b", re.sub(r"`[^`]*`|'[^']*'", "", message.partition("found")[0])))


def _lines(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "/errors.py" not in f.filename]


def _difference(ours: Read, theirs: Read) -> str:
    names = sorted({*ours, *theirs})
    wrong = [n for n in names if ours.get(n) != theirs.get(n)]
    first = wrong[0]
    return f"{first!r} of {len(wrong)}: {ours.get(first, b'')[:60]!r}, {theirs.get(first, b'')[:60]!r}"


# --- runs -----------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a run of one target did."""

    target: str
    executions: int = 0
    read: int = 0
    both: int = 0
    places: set[tuple[str, ...]] = field(default_factory=set)
    recipes: list[tuple[int, ...]] = field(default_factory=list)  # each reached something new
    faults: list[tuple[tuple[int, ...], str]] = field(default_factory=list)

    def line(self) -> str:
        counts = f"{self.executions:9,} inputs, {self.read:8,} read, {self.both:8,} by both"
        return f"{self.target:14} {counts}, {len(self.places):4} refusals, {len(self.faults)} faults"


def fuzz(
    target: Target, seed: int, *, executions: int | None = None, seconds: float | None = None, faults: int = 5
) -> Tally:
    """Change and look, until so many inputs or seconds are over, or there are so many faults. The same seed
    and number of executions make the same inputs."""
    tally, ends = Tally(target.name), None if seconds is None else time.monotonic() + seconds
    chance = random.Random(f"{target.name} {seed}")
    pool: list[tuple[int, ...]] = [()]
    parents: dict[tuple[int, ...], Files] = {(): target.files}
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None))
    try:
        with bounded():
            while (executions is None or tally.executions < executions) and len(tally.faults) < faults:
                if ends is not None and time.monotonic() > ends:
                    break
                parent = () if chance.random() < 0.3 else chance.choice(pool)
                recipe = (*parent, chance.getrandbits(48))
                _step(target, recipe, parents[parent], folder, tally, pool, parents)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return tally


def _step(
    target: Target,
    recipe: tuple[int, ...],
    parent: Files,
    folder: Path,
    tally: Tally,
    pool: list[tuple[int, ...]],
    parents: dict[tuple[int, ...], Files],
) -> None:
    files = made(
        Target(target.name, parent, target.changed, target.read, target.inner, None, target.words),
        recipe[-1:],
    )
    tally.executions += 1
    try:
        seen = look(target, files, folder)
    except Fault as fault:
        tally.faults.append((recipe, str(fault)))
        return
    tally.read += seen.read
    tally.both += seen.both
    new = seen.place not in tally.places if not seen.read else len(recipe) < 4 and tally.read % 50 == 1
    if new and len(recipe) < 12:
        if not seen.read:
            tally.places.add(seen.place)
            tally.recipes.append(recipe)
        if len(pool) < KEPT:
            pool.append(recipe)
            parents[recipe] = files


def recipes(path: Path = CORPUS) -> dict[str, list[tuple[int, ...]]]:
    """The corpus: recipes by target, a line `TARGET NUMBER...` each."""
    held: dict[str, list[tuple[int, ...]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, *numbers = line.split()
        if not name.startswith("#"):
            held.setdefault(name, []).append(tuple(map(int, numbers)))
    return held


def write_corpus(tallies: Sequence[Tally], path: Path = CORPUS) -> None:
    """The shortest recipe of each place where an input was refused; targets that did not run keep theirs."""
    ran = {t.target for t in tallies}
    kept = {name: held for name, held in recipes(path).items() if name not in ran}
    lines = [
        "# TARGET and the numbers of a recipe, see fuzzing.py: one for each place where inputs are refused."
    ]
    for name, held in (kept | {t.target: t.recipes for t in tallies}).items():
        shortest = sorted(set(held), key=lambda r: (len(r), r))
        lines += [f"{name} {' '.join(map(str, r))}" for r in shortest]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _of_a_name(task: tuple[str, int, int | None, float | None]) -> Tally:
    from tests.fuzz_targets import TARGETS

    name, seed, executions, seconds = task
    return fuzz(TARGETS[name](), seed, executions=executions, seconds=seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    from tests.fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--seconds", type=float, help="for all targets together")
    parser.add_argument("--executions", type=int, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--corpus", action="store_true", help=f"write the recipes to {CORPUS.name}")
    asked = parser.parse_args(arguments)
    names = asked.target or list(TARGETS)
    each = None if asked.executions is None else -(-asked.executions // len(names))
    share = None if asked.seconds is None else asked.seconds * asked.jobs / len(names)
    if each is None and share is None:
        parser.error("expected --seconds or --executions, found neither")
    tallies = []
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
        for tally in pool.map(_of_a_name, [(n, asked.seed, each, share) for n in names]):
            print(tally.line(), flush=True)
            for recipe, what in tally.faults:
                print(f"FAULT {tally.target} {' '.join(map(str, recipe))}\n{what}", flush=True)
            tallies.append(tally)
    total = Counter(executions=sum(t.executions for t in tallies), faults=sum(len(t.faults) for t in tallies))
    print(f"{total['executions']:,} inputs of {len(tallies)} readers, {total['faults']} faults")
    if asked.corpus:
        write_corpus(tallies)
    return int(total["faults"] > 0)


if __name__ == "__main__":
    sys.exit(main())
