"""One plan carried out by several processes, on as many machines as share a file system.

Worker I of N makes its share of the output files (shares.py) in a hidden folder that all of them fill,
`.NAME.ckpt-tool-partial-PLAN-of-N`, and keeps a journal of its own beside it; a worker that was stopped goes
on from there when it is started again. Whoever publishes takes the journals together, does what needs all
files (checks of the source, documents, the manifest), and renames the folder: the same bytes as one process
writes. That all of them work on the same plan of the same source is in each journal.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from ckpt_tool import __version__
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert import claims, disk, journal
from ckpt_tool.convert.claims import Claim, claimed
from ckpt_tool.convert.durable import Identity, Staging, open_folder, partial_prefix, resumable
from ckpt_tool.convert.execute import (
    Outcome,
    Progress,
    Run,
    raise_as_told,
)
from ckpt_tool.convert.fingerprints import fingerprints, way_to
from ckpt_tool.convert.journal import Entry
from ckpt_tool.convert.manifest import Finding, headers_digest
from ckpt_tool.convert.places import free_place, replaced_by
from ckpt_tool.convert.plan import OutputFile, Plan
from ckpt_tool.convert.replaceable import Replace
from ckpt_tool.convert.shares import Worker, groups, restricted, shares, whole_reads
from ckpt_tool.convert.source_checks import Key
from ckpt_tool.convert.verdicts import REFUSED
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all

ENDING = 5.0  # seconds that a worker may take to end once its journal is complete
SAME = "give every worker the same command but for --worker"


@dataclass(frozen=True)
class Settings:
    """How a plan is carried out, see `execute`; all processes of one plan should be given the same."""

    jobs: int = 2
    overwrite: bool = False
    overwrite_foreign: bool = False
    sha256: bool = False
    strict: bool = False
    progress: Callable[[Progress], None] = lambda _: None
    tell: Callable[[str], None] = lambda _: None
    address: str | None = None

    @property
    def replaces(self) -> Replace:
        return replaced_by(self.overwrite, self.overwrite_foreign)


@dataclass(frozen=True)
class Part:
    """What one worker did; `missing` are the workers that had not finished when it ended."""

    worker: Worker
    files: tuple[OutputFile, ...]
    outcome: Outcome
    missing: tuple[int, ...]


def carry_part(plan: Plan, checkpoint: Checkpoint, out: Path, worker: Worker, settings: Settings) -> Part:
    """Make the files of `plan` that are `worker`'s share, or go on with them. Raises as `execute` does,
    `resume-mismatch` where another plan or number of workers is at this output, and `output-busy`."""
    place, identity, digests, before = _begun(plan, checkpoint, out, settings)
    own = shares(plan, worker.count)[worker.number - 1]
    folder = _folder(place, identity.plan, worker.count)
    _refuse_others(place, folder)
    with claimed(_stem(folder, worker.number), f"worker {worker}", settings.tell) as claim:
        _refuse_publisher(folder, settings.tell)  # who holds claim 0 looks for this claim after that
        _refuse_published(place, before)
        staging = PartStaging(place, identity, settings.replaces, worker, own, claim)
        run = _run(restricted(plan, own), checkpoint, staging, digests, settings)
        run.whole = whole_reads(plan, own)
        staging.begin(resume=True, belongs=run.belongs)
        try:
            run.make_files()
            checkpoint.check_unchanged()
            run.progress(Progress("finish", "", run.bytes_out, run.bytes_out))
            staging.leave(keep=True)
        except BaseException as error:
            run.ahead.stop()
            run.stop()
            keep = resumable(error) and bool(staging.entries)
            staging.leave(keep=keep)
            raise_as_told(error, keep, how="run it again to go on")
        finally:
            run.stop()
    missing = tuple(k for k, p in _journals(plan, folder, identity, worker.count).items() if p.missing)
    return Part(worker, own, run.outcome({}), missing)


def publish(
    plan: Plan, checkpoint: Checkpoint, out: Path, settings: Settings, *, count: int | None = None
) -> Outcome:
    """Check the parts that all workers (`count` of them, else as many as the parts say) have made, add what
    is not theirs, and give the whole its name. Raises `missing-parts` where some are not done, `output-busy`
    while one is at work."""
    place, identity, digests, before = _begun(plan, checkpoint, out, settings)
    folder = _folder(place, identity.plan, count) if count else _found(place, identity.plan)
    _refuse_others(place, folder)
    number = int(folder.name.rpartition("-")[2])
    with claimed(_stem(folder, 0), "what publishes this output", settings.tell):
        _refuse_published(place, before)
        _wait_for_workers(folder, number, settings.tell)
        parts = _journals(plan, folder, identity, number)
        fail_all(_problems(parts, number))
        staging = WholeStaging(place, identity, settings.replaces, folder, plan.outputs, number)
        run = _run(plan, checkpoint, staging, digests, settings)
        staging.begin()
        try:
            _take_together(run, [e for p in parts.values() for e in p.entries], number, staging.is_doubtful)
            staging.clear()
            outcome = run.conclude()
            staging.publish()
        except BaseException as error:
            run.ahead.stop()
            run.stop()
            keep = (resumable(error) or _may_be_made_good(error)) and not staging.published
            staging.leave(keep=keep)
            raise_as_told(error, keep, how="run it again with --finish to go on")
        finally:
            run.stop()
    return replace(outcome, out=out)


def _may_be_made_good(error: BaseException) -> bool:
    """Whether what --finish was refused leaves the parts worth keeping: some are missing, or one of the
    options that only refuse was given to it and not to the workers."""
    return isinstance(error, CkptToolError) and error.kind in ("missing-parts", *REFUSED)


def _begun(
    plan: Plan, checkpoint: Checkpoint, out: Path, settings: Settings
) -> tuple[Path, Identity, dict[str, str], int]:
    """The place, whose work it is, the digests of the source's headers, and what stands at the place."""
    files = [p for f in checkpoint.files.values() for p in f.paths if not p.is_relative_to("/proc")]
    place = free_place(out, [checkpoint.path, *files], replace=settings.replaces)
    digests = {f.name: headers_digest(f) for f in checkpoint.files.values()}
    before = _inode(place)
    return place, Identity(__version__, plan.digest(), fingerprints(checkpoint, digests)), digests, before


def _inode(place: Path) -> int:
    """0 where nothing stands."""
    try:
        return os.lstat(place).st_ino
    except OSError:
        return 0


def _refuse_published(place: Path, before: int) -> None:
    """`output-exists` where another process has published since this one began: its parts are gone then, and
    nobody waits for new ones."""
    if _inode(place) not in (0, before):
        message = "expected the place as it was a moment ago, found that another process has published there"
        fail("output-exists", message, file=place, hint="--overwrite makes it anew")


def _run(
    plan: Plan, checkpoint: Checkpoint, staging: Staging, digests: Mapping[str, str], settings: Settings
) -> Run:
    origin = settings.address or way_to(staging.place, checkpoint.path)
    jobs = max(1, settings.jobs)
    return Run(
        plan, checkpoint, staging, digests, jobs, settings.sha256, settings.strict, settings.progress, origin
    )


# --- names beside the output ----------------------------------------------------------------------------


def _folder(place: Path, plan: str, count: int) -> Path:
    return place.with_name(f"{partial_prefix(place)}{plan[:16]}-of-{count}")


def _stem(folder: Path, number: int) -> Path:
    """What the names of a worker's journal and claims begin with; number 0 is who publishes."""
    return folder.with_name(f"{folder.name}.{number}")


def _journal_of(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}.{number}.journal")


def _folders(place: Path) -> list[Path]:
    """The folders of parts beside `place`, of any plan."""
    pattern = re.compile(re.escape(partial_prefix(place)) + r"[0-9a-f]{16}-of-[1-9][0-9]{0,3}")
    return [place.with_name(n) for n in sorted(os.listdir(place.parent)) if pattern.fullmatch(n)]


def _in_words(place: Path, folder: Path) -> str:
    plan, _, count = folder.name.removeprefix(partial_prefix(place)).partition("-of-")
    return f"plan {plan} by {count} worker{'s' * (count != '1')}"


def _refuse_others(place: Path, folder: Path) -> None:
    others = [f for f in _folders(place) if f != folder]
    if others:
        fail(
            "resume-mismatch",
            f"expected parts of {_in_words(place, folder)}, found some of {_in_words(place, others[0])}",
            file=place,
            hint=f"{SAME}; parts that nobody wants any more: rm -r {quote(str(others[0]))}*",
        )


def _found(place: Path, plan: str) -> Path:
    """The folder of this plan's parts."""
    found = _folders(place)
    own = [f for f in found if f.name.startswith(f"{partial_prefix(place)}{plan[:16]}-")]
    if own:
        return own[0]
    if found:  # of another plan, which is refused by the name that ours would have
        return _folder(place, plan, int(found[0].name.rpartition("-")[2]))
    message = "expected the parts that workers have made, found none beside it"
    fail("missing-parts", message, file=place, hint="--worker 1/N to --worker N/N make them")


# --- parts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Journal:
    """What a worker's journal says: the files still `missing` of those it should make, and what is off."""

    files: tuple[OutputFile, ...]
    entries: tuple[Entry, ...] = ()
    there: bool = False
    differences: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        done = {name for e in self.entries for name in e.files}
        found = [f.name for f in self.files if f.name not in done]
        return found if self.there and not self.differences else found or ["its journal"]


def _journals(plan: Plan, folder: Path, identity: Identity, count: int) -> dict[int, _Journal]:
    known = {f.name: {t.name for t in f.tensors} for f in plan.outputs}
    return {
        k: _read_journal(_journal_of(folder, k), files, identity, known)
        for k, files in enumerate(shares(plan, count), start=1)
    }


def _read_journal(
    path: Path, files: tuple[OutputFile, ...], identity: Identity, known: Mapping[str, set[str]]
) -> _Journal:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return _Journal(files)
    own = {f.name for f in files}
    entries: list[Entry] = []
    try:
        lines = journal.read(descriptor)
        first, _ = next(lines, ({}, 0))
        if not Identity.is_one(first):
            return _Journal(files)
        if differences := identity.differences(first):
            return _Journal(files, there=True, differences=tuple(differences))
        for content, _ in lines:
            entry = Entry.from_json(content)
            if not entry.files.keys() <= own or any(known[n] != set(c) for n, c in entry.files.items()):
                break
            entries.append(entry)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass  # as where the line is damaged: what comes before counts
    finally:
        os.close(descriptor)
    return _Journal(files, tuple(entries), there=True)


def _problems(parts: Mapping[int, _Journal], count: int) -> Iterator[Problem]:
    """What keeps the parts from being the whole."""
    other = {k: p.differences for k, p in parts.items() if p.differences}
    for k, differences in other.items():
        message = f"expected the part of worker {k}/{count} to be of the same run, found another "
        yield Problem("resume-mismatch", message + " and ".join(differences), hint=SAME)
    none = [f"{k}/{count}" for k, p in parts.items() if not p.there]
    some = [
        f"worker {k}/{count} ({len(p.files) - len(p.missing)} of {len(p.files)} files)"
        for k, p in parts.items()
        if p.there and not p.differences and p.missing
    ]
    found = [f"none of worker{'s' * (len(none) > 1)} {', '.join(none)}"] if none else []
    found += [f"unfinished ones of {', '.join(some)}"] if some else []
    if found:
        message = f"expected the parts of all {count} workers, found {' and '.join(found)}"
        again = [f"--worker {k}/{count}" for k, p in parts.items() if p.missing and not p.differences]
        yield Problem(
            "missing-parts", message, hint=f"run again: {', '.join(again[:8])}" + " ..." * (len(again) > 8)
        )


def _refuse_publisher(folder: Path, tell: Callable[[str], None]) -> None:
    """`output-busy` while the parts are being published: nothing in the folder may change now."""
    if (owner := claims.at_work(_stem(folder, 0), tell)) is not None:
        message = f"expected nobody to publish this output yet, found {owner} at it"
        fail("output-busy", message, hint="wait for it, or stop it")


def _wait_for_workers(folder: Path, count: int, tell: Callable[[str], None]) -> None:
    """`output-busy` while a worker is at work; one that is just ending is waited for."""
    end = time.monotonic() + ENDING
    for k in range(1, count + 1):
        while (owner := claims.at_work(_stem(folder, k), tell)) is not None:
            if time.monotonic() > end:
                message = f"expected every worker to have ended, found worker {k}/{count} at work: {owner}"
                fail("output-busy", message, hint="wait for it, or stop it")
            time.sleep(0.1)


def _take_together(run: Run, entries: Sequence[Entry], count: int, read: bool) -> None:
    """What all workers learnt, as if one process had; every file must be there with its size and headers, or,
    where they are to be `read`, with all its bytes, and workers that read the same source tensor must have
    read the same."""
    problems = []
    for entry in entries:
        run.targets.update({f: dict(crcs) for f, crcs in entry.files.items()})
        for key, crc in entry.sources.items():
            if run.sources.setdefault(key, crc) != crc:
                message = f"expected CRC32 {run.sources[key]:08x} as another worker read it, found {crc:08x}"
                problems.append(Problem("input-changed", message, *key))
        run.hashes.update(entry.sha256 if run.sha256 else {})
        run.findings += entry.findings
    run.findings.sort(key=_in_order(run.plan))
    made_by = {f.name: k for k, own in enumerate(shares(run.plan, count), start=1) for f in own}
    for file in run.plan.outputs:
        problems += _file_problems(run, file, f"run again: --worker {made_by[file.name]}/{count}", read)
    fail_all([*problems, *run.refused(run.findings)])
    run.resumed_bytes = run.bytes_out


def _file_problems(run: Run, file: OutputFile, again: str, read: bool) -> Iterator[Problem]:
    if run.sha256 and any((file.name, t.name) not in run.hashes for t in file.tensors):
        message = "expected the SHA-256 of every tensor, found none of its worker's"
        yield Problem("missing-parts", message, file.name, hint=f"{again} with --sha256")
    elif not (run.is_intact if read else run.has_headers)(file, run.targets[file.name]):
        message = "expected the file as its worker left it, found another or none"
        yield Problem("missing-parts", message, file.name, hint=again)


def _in_order(plan: Plan) -> Callable[[Finding], tuple[int, ...]]:
    """The order in which one process comes upon findings: group by group, first what its files hold, then
    the copies that differ."""
    at: dict[str, tuple[int, int]] = {}
    tensors: dict[Key, int] = {}
    copies: dict[Key, tuple[int, int]] = {}
    for g, (files, steps) in enumerate(groups(plan)):
        for f, file in enumerate(files):
            at[file.name] = g, f
            tensors |= {(file.name, t.name): k for k, t in enumerate(file.tensors)}
        for k in steps:
            if plan.steps[k].compare:
                part = plan.steps[k].sources[0]
                copies.setdefault((part.file, part.name), (g, k))

    def place(found: Finding) -> tuple[int, ...]:
        key = found.file, found.tensor or ""
        if found.kind == "replica-difference":
            group, step = copies[key]
            return group, 1, step, 0
        return at[found.file][0], 0, at[found.file][1], tensors[key]

    return place


# --- the hidden folder ----------------------------------------------------------------------------------


class PartStaging(Staging):
    """The folder as one worker has it: it makes and removes files of its own share only."""

    def __init__(
        self,
        place: Path,
        identity: Identity,
        replace: Replace,
        worker: Worker,
        files: Iterable[OutputFile],
        claim: Claim,
    ) -> None:
        super().__init__(place, identity, replace)
        self.worker, self.own, self.claim = worker, {f.name for f in files}, claim

    @property
    def path(self) -> Path:
        return _folder(self.place, self.identity.plan, self.worker.count)

    @property
    def _journal_path(self) -> Path:
        return _journal_of(self.path, self.worker.number)

    def _make_folder(self) -> None:
        with contextlib.suppress(FileExistsError):
            disk.mkdir(self.path, 0o777)

    def _remove_leftovers(self) -> None:
        """Only what this worker made: the folder is not its own."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._journal_path)
        for name in self.own:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path / name)

    def _can_take_up(self) -> bool:
        return self.path.is_dir() and os.path.lexists(self._journal_path)

    def _is_leftover(self, name: str) -> bool:
        return name in self.own

    def create(self, name: str, size: int) -> int:
        self.claim.check()
        return super().create(name, size)

    def record(self, entry: Entry) -> None:
        self.claim.check()
        super().record(entry)

    @property
    def afresh(self) -> str:
        return f"parts that nobody wants any more: rm -r {quote(str(self.path))}*"

    def leave(self, *, keep: bool) -> None:
        self._close()
        if not keep and not self.claim.lost:
            with contextlib.suppress(OSError):
                self._remove_leftovers()
            for folder, _, _ in os.walk(self.path, topdown=False):
                with contextlib.suppress(OSError):  # others may have files in it
                    os.rmdir(folder)


class WholeStaging(Staging):
    """The folder as whoever publishes it has it: all of it."""

    def __init__(
        self,
        place: Path,
        identity: Identity,
        replace: Replace,
        folder: Path,
        files: Iterable[OutputFile],
        count: int,
    ) -> None:
        super().__init__(place, identity, replace)
        self._path, self._weights, self._count = folder, {f.name for f in files}, count

    @property
    def path(self) -> Path:
        return self._path

    def begin(self, *, resume: bool = True, belongs: Callable[[Entry], bool] = lambda _: True) -> None:
        """Take the folder."""
        self._look_at_place()
        try:
            self._folder = open_folder(self.path)
        except OSError as error:
            fail("output-failed", f"cannot be made: {error.strerror or error}", file=self.place)

    @property
    def is_doubtful(self) -> bool:
        """Whether there is more in the folder than workers write. An earlier try to publish then came to its
        documents, and perhaps to the very end: what is here may be the output that it replaced, of the same
        names, sizes and headers."""
        return bool(self._others())

    def clear(self) -> None:
        """Remove the documents that an earlier try left, and whatever else is no part."""
        try:
            for path in self._others():
                (os.rmdir if path.is_dir() and not path.is_symlink() else os.unlink)(path)
        except OSError as error:
            raise disk.failure(error, str(self.place), doing="cleared of documents") from None

    def _others(self) -> list[Path]:
        """What is neither a weight file nor a folder of some, what folders hold before them."""
        weights = [self.path / name for name in self._weights]
        known = {*weights, *(folder for path in weights for folder in path.parents)}
        return [path for path in sorted(self.path.rglob("*"), reverse=True) if path not in known]

    def _forget(self) -> None:
        """Remove the workers' journals, and claims that nobody holds: before the output that was replaced,
        which now has the folder's name and is none of their parts."""
        for k in range(1, self._count + 1):
            with contextlib.suppress(OSError):
                os.unlink(_journal_of(self.path, k))
            claims.remove_claims(_stem(self.path, k))
