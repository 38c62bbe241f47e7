"""Coverage, bits and parity by several processes: each looks at its share of the tensors of the output, of
the steps of the plan and of the prompts, and writes down what it saw beside the output; one joins what all
saw into one report.

For an output NAME that is `.NAME.ckpt-tool-verify-of-N.I`: a journal (convert/journal.py) with a line for
each tensor and step, so that a worker that was stopped goes on, and one for all its prompts
(verify/spread.py), whose activations stand in `.NAME.ckpt-tool-verify-of-N.I.inputs`. Its first line says
what was compared, headers, sizes and times of both sides among it; what was seen of other files, or not by
all workers, counts for nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any

from ckpt_tool import __version__
from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.checkpoint.remote_path import scheme_of
from ckpt_tool.convert import journal
from ckpt_tool.convert.claims import at_work, claimed, remove_claims
from ckpt_tool.convert.comparing import Difference as Drift
from ckpt_tool.convert.durable import Identity
from ckpt_tool.convert.fingerprints import fingerprints
from ckpt_tool.convert.fingerprints import same as is_same
from ckpt_tool.convert.layout import Step
from ckpt_tool.convert.manifest import headers_digest
from ckpt_tool.convert.shares import Worker
from ckpt_tool.convert.source_checks import Key
from ckpt_tool.convert.values import Values
from ckpt_tool.errors import fail, printable
from ckpt_tool.records import dataclass
from ckpt_tool.verify.bits import Comparison, Difference, compare_step
from ckpt_tool.verify.coverage import Scan, scan_one
from ckpt_tool.verify.seen import READ, Joined, Line, Seen, Tell, Walk
from ckpt_tool.verify.subject import Subject

PARITY = "parity"  # the key of the line for it
SHOWN = 3
SAME = "give every worker the same output and source"


# --- shares ---------------------------------------------------------------------------------------------


@dataclass
class Work:
    """One worker's share: tensors of the output, and steps of the plan with their places in it."""

    tensors: list[TensorInfo] = field(default_factory=list)
    steps: list[tuple[int, Step]] = field(default_factory=list)

    def is_done(self, scans: Container[Key], steps: Container[int]) -> bool:
        return all((t.file, t.name) in scans for t in self.tensors) and all(k in steps for k, _ in self.steps)


def deal(subject: Subject, count: int, levels: Collection[str]) -> list[Work]:
    """The shares of all workers, of the tensors and, where bits are among the `levels`, of the steps."""
    found = [Work() for _ in range(count)]
    tensors = list(subject.output) if READ & set(levels) else []
    for tensor, home in zip(tensors, homes([t.nbytes for t in tensors], count), strict=True):
        found[home].tensors.append(tensor)
    if subject.plan is not None and subject.source is not None and "bits" in levels:
        steps, files = subject.plan.steps, subject.source.files
        sizes = [sum(files[p.file].tensors[p.name].nbytes for p in s.sources) for s in steps]
        for k, home in enumerate(homes(sizes, count)):
            found[home].steps.append((k, steps[k]))
    return found


def homes(sizes: Sequence[int], count: int) -> Iterator[int]:
    """For things of these sizes in a row, whose of `count` equal stretches of the row its middle is in."""
    total, before = max(1, sum(sizes)), 0
    for size in sizes:
        yield min(count - 1, (2 * before + size) * count // (2 * total))
        before += size


# --- one worker -----------------------------------------------------------------------------------------


def look(
    subject: Subject,
    out: str | os.PathLike[str],
    worker: Worker,
    levels: Collection[str],
    tell: Tell,
    walk: Walk | None = None,
) -> Seen:
    """Look at a worker's share of the output, or go on with it: at tensors, and at steps where bits are among
    the `levels`; then `walk` its prompts through parity. Raises `output-busy` where another process is at it,
    and `output-failed` where nothing can be written beside the output."""
    path = _path(out, worker)
    _refuse_sets(path, worker.count)
    identity, dealt = _identity(subject), deal(subject, worker.count, levels)
    work = dealt[worker.number - 1]
    with claimed(path, f"worker {worker}", tell), _opened(path, identity) as (written, append):
        scans, steps = _read(subject, written)
        resumed = len(scans) + len(steps)
        for tensor in work.tensors:
            key = (tensor.file, tensor.name)
            if key not in scans:
                scans[key] = scan_one(subject.output, tensor)
                append(_scan_line(scans[key]))
        for k, step in work.steps:
            if k not in steps:
                steps[k] = compare_step(subject, step)
                append(_step_line(k, steps[k]))
        walked = _walked(written)
        if walk is not None and (line := walk(walked, _inputs(path))) is not None:
            walked = line
            append({PARITY: line})
    missing = []
    for k, share in enumerate(dealt, start=1):
        first, lines = _lines(_path(out, Worker(k, worker.count)))
        same = Identity.is_one(first) and not identity.differences(first)
        done = same and share.is_done(*_read(subject, lines))
        if not done or (walk is not None and _walked(lines) is None):
            missing.append(k)
    prompts = None if walk is None or walked is None else tuple(map(str, walked["prompts"]))
    return Seen(worker, tuple(scans.values()), steps, resumed, tuple(missing), prompts)


# --- all of them ----------------------------------------------------------------------------------------


def join(
    subject: Subject,
    out: str | os.PathLike[str],
    levels: Collection[str],
    tell: Tell,
) -> Joined:
    """What all workers saw of this output and source; `missing-parts`, `resume-mismatch` or `output-busy`
    where that is not all there is to see."""
    number = _count(out)
    identity = _identity(subject)
    scans: dict[Key, Scan] = {}
    steps: dict[int, Comparison] = {}
    unfinished, paths = [], []
    walks: dict[Worker, tuple[Line, Path]] = {}
    for k, share in enumerate(deal(subject, number, levels), start=1):
        worker = Worker(k, number)
        path = _path(out, worker)
        _refuse_sets(path, number)
        if (owner := at_work(path, tell)) is not None:
            message = f"expected every worker to have ended, found worker {worker} at work: {owner}"
            fail("output-busy", message, hint="wait for it, or stop it")
        first, lines = _lines(path)
        if Identity.is_one(first) and (others := _others_seen(identity, first)):
            message = f"expected worker {worker} to have seen these files, found another {', '.join(others)}"
            hint = f"{SAME}, and run again: --worker {worker}"
            fail("resume-mismatch", message, hint=hint)
        own_scans, own_steps = _read(subject, lines) if Identity.is_one(first) else ({}, {})
        if not Identity.is_one(first) or not share.is_done(own_scans, own_steps):
            unfinished.append(f"{worker}")
        scans |= own_scans
        steps |= own_steps
        paths.append(path)
        if PARITY in levels and (line := _walked(lines)) is not None:
            walks[worker] = line, _inputs(path)
    if walks:  # where nobody has, it is computed now
        every = (Worker(k, number) for k in range(1, number + 1))
        unfinished = list(dict.fromkeys([*unfinished, *(f"{w}" for w in every if w not in walks)]))
    if unfinished:
        message = (
            f"expected what all {number} workers saw, found nothing or not all of {', '.join(unfinished)}"
        )
        fail("missing-parts", message, hint=f"run again: --worker {', --worker '.join(unfinished[:8])}")
    compared = None
    if subject.plan is not None and subject.source is not None and "bits" in levels:
        compared = Comparison()
        for k in range(len(subject.plan.steps)):
            compared.add(steps[k])
    read = [scans[t.file, t.name] for t in subject.output] if READ & set(levels) else []
    return Joined(read, compared, number, paths, list(walks.values()))


# --- what is written down -------------------------------------------------------------------------------


def _path(out: str | os.PathLike[str], worker: Worker) -> Path:
    if (scheme := scheme_of(os.fspath(out))) is not None:
        message = f"expected an output on a file system that all workers share, found one at {scheme}://"
        fail("usage", message, where="--worker", hint="download it first")
    place = Path(os.path.realpath(out))
    return place.with_name(f".{place.name}.ckpt-tool-verify-of-{worker.count}.{worker.number}")


def remove(paths: Iterable[Path]) -> None:
    """Remove what the workers wrote down."""
    for path in paths:
        remove_claims(path)
        for own in (path, _inputs(path)):
            with contextlib.suppress(OSError):
                os.unlink(own)


def _inputs(path: Path) -> Path:
    """Where a worker keeps activations that mistakes are planted at, beside what it writes down."""
    return path.with_name(f"{path.name}.inputs")


def _sets(path: Path) -> dict[int, Path]:
    """By number of workers, a file of such a set beside the output."""
    stem = path.name.rpartition("-of-")[0]
    pattern = re.compile(re.escape(stem) + r"-of-([1-9][0-9]{0,3})\.[1-9][0-9]{0,3}")
    names = sorted(os.listdir(path.parent))
    return {int(m[1]): path.with_name(n) for n in names if (m := pattern.fullmatch(n))}


def _refuse_sets(path: Path, count: int) -> None:
    for other, file in _sets(path).items():
        if other != count:
            message = f"expected what {count} workers saw, found some of {other} workers"
            stem = str(file).rpartition(".")[0]
            hint = f"give every worker the same N; what nobody wants any more: rm {stem}.*"
            fail("resume-mismatch", message, file=file.name, hint=hint)


def _count(out: str | os.PathLike[str]) -> int:
    found = _sets(_path(out, Worker(1, 1)))
    if not found:
        message = "expected what workers have seen of it, found nothing beside it"
        fail("missing-parts", message, file=out, hint="--worker 1/N to --worker N/N look at it")
    return min(found)


def _identity(subject: Subject) -> Identity:
    """What was compared."""
    seen: dict[str, Any] = {}
    for what, side in (("output", subject.output), ("source", subject.source)):
        if side is not None:
            digests = {f.name: headers_digest(f) for f in side.files.values()}
            seen |= {f"{what} {name}": stamp for name, stamp in fingerprints(side, digests).items()}
    return Identity(__version__, "" if subject.plan is None else subject.plan.digest(), seen)


def _others_seen(identity: Identity, first: Line) -> list[str]:
    """In words, what a worker has seen that is not there now."""
    before, now = first["source"], dict(identity.source)
    names = [n for n in sorted({*before, *now}) if not is_same(before.get(n), now.get(n))]
    same = Identity(identity.version, identity.plan, before).differences(first)
    return [*same, *(printable(n) for n in names[:SHOWN])]


@contextmanager
def _opened(path: Path, identity: Identity) -> Iterator[tuple[list[Line], Callable[[Line], None]]]:
    """The lines that are there, and what appends one; another output's or a damaged end is cut off."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        fail("output-failed", f"cannot be made: {error.strerror}", file=path)
    try:
        read = list(journal.read(descriptor))
        mine = bool(read) and Identity.is_one(read[0][0]) and not identity.differences(read[0][0])
        at = read[-1][1] if mine else 0
        os.ftruncate(descriptor, at)

        def append(content: Line) -> None:
            nonlocal at
            data = journal.line(content)
            try:
                at += os.pwrite(descriptor, data, at)
            except OSError as error:
                fail("write-failed", f"cannot be written: {error.strerror}", file=path)

        if not mine:
            append(identity.to_json())
        yield [content for content, _ in read[1:]] if mine else [], append
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lines(path: Path) -> tuple[dict[str, Any], list[Line]]:
    """The first line and the others of what a worker wrote down; nothing where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return {}, []
    try:
        read = [content for content, _ in journal.read(descriptor)]
    finally:
        os.close(descriptor)
    return (read[0], list(read[1:])) if read else ({}, [])


def _scan_line(scan: Scan) -> Line:
    v = scan.values
    return {
        "scan": [scan.tensor.file, scan.tensor.name],
        "crc32": scan.crc32,
        "values": [v.largest, v.seen, v.non_finite, v.first],
    }


def _step_line(index: int, found: Comparison) -> Line:
    return {
        "step": index,
        "differences": [_difference_json(d) for d in found.differences],
        "copies": [_difference_json(d) for d in found.copies],
        "counts": [found.compared, found.cast, found.pooled],
        "missing": found.missing,
    }


def _difference_json(d: Difference) -> dict[str, Any]:
    return {
        "tensors": [[t.name, t.dtype, list(t.shape), t.file] for t in (d.tensor, d.against)],
        "dtype": d.dtype,
        "places": [d.count, d.first],
        "values": [x.hex() for x in (*d.values, d.max_delta)],
        "drift": d.drift.to_json(),
        "roundings": None if d.roundings is None else sorted(d.roundings),
        "rows": d.strip and {**d.strip, "worst": [[row, float(x).hex()] for row, x in d.strip["worst"]]},
    }


def _read(subject: Subject, lines: Iterable[Line]) -> tuple[dict[Key, Scan], dict[int, Comparison]]:
    """What the lines say, up to the first that says nothing of these two checkpoints."""
    scans: dict[Key, Scan] = {}
    steps: dict[int, Comparison] = {}
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, IndexError):
        for content in lines:
            if "scan" in content:
                file, name = content["scan"]
                scans[file, name] = _scan(subject.output.files[file].tensors[name], content)
            elif PARITY not in content:
                steps[int(content["step"])] = _comparison(content)
    return scans, steps


def _walked(lines: Iterable[Line]) -> Line | None:
    """What a worker last wrote down of parity."""
    found = [line[PARITY] for line in lines if isinstance(line.get(PARITY), dict)]
    return found[-1] if found else None


def _scan(tensor: TensorInfo, content: Line) -> Scan:
    values = Values(tensor.dtype)
    largest, seen, non_finite, first = content["values"]
    values.largest, values.seen, values.non_finite = int(largest), int(seen), int(non_finite)
    values.first = None if first is None else int(first)
    return Scan(tensor, int(content["crc32"]), values)


def _comparison(content: Line) -> Comparison:
    compared, cast, pooled = content["counts"]
    return Comparison(
        [_difference(d) for d in content["differences"]],
        [_difference(d) for d in content["copies"]],
        int(compared),
        int(cast),
        int(pooled),
        [str(name) for name in content["missing"]],
    )


def _difference(said: Line) -> Difference:
    count, first = said["places"]
    expected, found, delta = map(float.fromhex, said["values"])
    roundings = None if said["roundings"] is None else set(map(str, said["roundings"]))
    rows = said["rows"]
    tensor, against = map(_tensor, said["tensors"])
    return Difference(
        tensor,
        against,
        dtype=str(said["dtype"]),
        count=int(count),
        first=None if first is None else int(first),
        values=(expected, found),
        max_delta=delta,
        drift=Drift.from_json(said["drift"]),
        roundings=roundings,
        strip=rows and {**rows, "worst": [[int(row), float.fromhex(x)] for row, x in rows["worst"]]},
    )


def _tensor(said: Sequence[Any]) -> TensorInfo:
    name, dtype, shape, file = said
    return TensorInfo(str(name), str(dtype), tuple(map(int, shape)), str(file))
