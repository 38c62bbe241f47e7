"""Carrying out a plan: the only code that writes tensors.

Output files that no step connects are independent groups. Each group is made by a few workers in blocks,
forced to the disk and noted in a journal, so that a run that was stopped can go on; documents and the
manifest come last, then one rename shows the result. What must be equal (copies on several ranks, tied
tensors) is compared after it is written; checksums of the sources are compared with what was read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ckpt_tool import __version__
from ckpt_tool.checkpoint.base import Checkpoint, Record, TensorInfo
from ckpt_tool.checkpoint.crc32 import IntervalCrc
from ckpt_tool.checkpoint.crc32c import combine_c, crc32c
from ckpt_tool.checkpoint.tf_names import bundle_of
from ckpt_tool.checkpoint.zlibs import crc32
from ckpt_tool.convert import disk
from ckpt_tool.convert.carry import CHUNK, Bound, Carrier, Lane, Source, Target, Targets, batches
from ckpt_tool.convert.comparing import measure
from ckpt_tool.convert.containers import layout_of
from ckpt_tool.convert.durable import Identity, Staging, is_thread_limit, locked, resumable
from ckpt_tool.convert.fingerprints import fingerprints, way_to
from ckpt_tool.convert.journal import Entry
from ckpt_tool.convert.layout import Block
from ckpt_tool.convert.manifest import MANIFEST, Finding, as_document, headers_digest, manifest
from ckpt_tool.convert.meanwhile import beside
from ckpt_tool.convert.places import free_place, replaced_by
from ckpt_tool.convert.plan import OutputDocument, OutputFile, Plan
from ckpt_tool.convert.quantised_scales import odd_scales
from ckpt_tool.convert.read_ahead import ReadAhead, Work
from ckpt_tool.convert.replaceable import Replace
from ckpt_tool.convert.shares import first_readers, groups
from ckpt_tool.convert.small import Smalls, Together
from ckpt_tool.convert.source_checks import Hole, Key, check_records, holes, repeated_shares
from ckpt_tool.convert.stale import stale
from ckpt_tool.convert.steps import as_steps
from ckpt_tool.convert.turns import turns
from ckpt_tool.convert.verdicts import of_copies, of_values, refused
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all
from ckpt_tool.records import dataclass

T = TypeVar("T")
Extra = Callable[[Mapping[str, Any]], Iterable[OutputDocument]]  # more documents, of the manifest
REFRESH = 0.1  # seconds between two calls of `progress`


@dataclass(frozen=True)
class Progress:
    """How far a run is. `stage` is "copy", "check" or "finish"; bytes are of tensors in the output."""

    stage: str
    file: str
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class Outcome:
    """What a run did. Digests are of dense little-endian bytes: `targets` and `sources` are CRC32s by (file,
    tensor), `sha256` of target tensors where asked for. `resumed` names files an earlier run had finished."""

    out: Path
    bytes_read: int
    bytes_written: int
    targets: Mapping[Key, int]
    sources: Mapping[Key, int]
    sha256: Mapping[Key, str]
    findings: tuple[Finding, ...]
    manifest: Mapping[str, Any]
    resumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ending:
    """What is written last: documents, and the manifest with its text."""

    documents: Sequence[OutputDocument]
    manifest: Mapping[str, Any]
    written: bytes


def execute(
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    jobs: int = 2,
    overwrite: bool = False,
    overwrite_foreign: bool = False,
    resume: bool = False,
    sha256: bool = False,
    strict: bool = False,
    progress: Callable[[Progress], None] | None = None,
    extra_documents: Extra | None = None,
    address: str | None = None,
    keep: Callable[[Path, Identity, Replace], Staging] = Staging,
) -> Outcome:
    """Write what `plan` says into the folder `out`, which appears complete or not at all.

    `jobs` workers; `resume` goes on with what an interrupted run of the same plan left; `strict` refuses
    values that are not finite instead of recording them; `extra_documents` makes more files from the
    manifest; `address` is where a source that is not on this machine came from; `keep` makes what takes the
    files until all are there. `progress` is called from the calling thread. Raises `CkptToolError` (kinds of
    durable.py, `checksum`, `tied-mismatch`, `shard-conflict`, `non-finite`, `input-changed`, `read-failed`).
    """
    files = [p for f in checkpoint.files.values() for p in f.paths if not p.is_relative_to("/proc")]
    replace_what = replaced_by(overwrite, overwrite_foreign)
    place = free_place(out, [checkpoint.path, *files], replace=replace_what)
    digests = {f.name: headers_digest(f) for f in checkpoint.files.values()}
    identity = Identity(__version__, plan.digest(), fingerprints(checkpoint, digests))
    with locked(place):
        staging = keep(place, identity, replace_what)
        run = Run(
            plan, checkpoint, staging, digests, max(1, jobs), sha256, strict, progress or (lambda _: None),
            address or way_to(place, checkpoint.path),
        )  # fmt: skip
        staging.begin(resume=resume, belongs=run.belongs)
        try:
            outcome = run.carry_out(extra_documents)
            staging.publish()
        except BaseException as error:
            run.ahead.stop()
            run.stop()
            kept = resumable(error) and bool(staging.entries) and not staging.published
            staging.leave(keep=kept)
            raise_as_told(error, kept)
        finally:
            run.stop()
    return replace(outcome, out=out)


def raise_as_told(error: BaseException, kept: bool, how: str = "run again with --resume to go on") -> None:
    """`error` as the user should see it, with the hint `how` to go on where something was kept."""
    hint = f"finished files are kept: {how}" if kept else None
    if isinstance(error, CkptToolError) and kept:
        problems = [replace(p, hint="; ".join(h for h in (p.hint, hint) if h)) for p in error.problems]
        raise CkptToolError(*problems, exit_code=error.exit_code) from None
    if isinstance(error, MemoryError):
        fail("out-of-memory", "expected enough memory for the buffers, found the limit reached", hint=hint)
    if isinstance(error, RuntimeError) and is_thread_limit(error):
        ways = "; ".join(filter(None, ("--jobs 1 needs fewer", hint)))
        fail("limits", "expected to start a worker thread, found no room for one", hint=ways)
    number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else getattr(error, "number", None)
    if kept and number is not None:  # a signal handler's exception says which signal it was
        name = signal.Signals(number).name
        problem = Problem("interrupted", f"stopped by {name} before the work was done", hint=hint)
        raise CkptToolError(problem, exit_code=128 + int(number)) from None
    raise error


@dataclass
class Run:
    """One execution: the workers, and what has been learnt so far."""

    plan: Plan
    checkpoint: Checkpoint
    staging: Staging
    headers: Mapping[str, str]
    jobs: int
    sha256: bool
    strict: bool
    progress: Callable[[Progress], None]
    origin: str | None  # the address of the source, or its path from the output
    targets: dict[str, dict[str, int]] = field(default_factory=dict)
    sources: dict[Key, int] = field(default_factory=dict)
    crcs_c: dict[Key, IntervalCrc] = field(default_factory=dict)  # of sources that carry a CRC-32C
    known_c: dict[Key, int] = field(default_factory=dict)  # of those that were moved whole
    hashes: dict[Key, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    # by output file, source tensors to be read whole with it where the steps have read a part or nothing
    whole: Mapping[str, Sequence[Key]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.carrier, self.ahead = Carrier(self.checkpoint), ReadAhead(self.checkpoint)
        self.lanes = [Lane() for _ in range(self.jobs)]
        self.pool = ThreadPoolExecutor(self.jobs, thread_name_prefix="ckpt-tool")
        self.stopping = threading.Event()
        self.steps = as_steps(self.plan.steps)
        self.first_readers = first_readers(self.steps)
        self.layouts = {f.name: layout_of(f) for f in self.plan.outputs}
        self.resumed_bytes = 0
        self.bytes_out = self.plan.bytes_out

    def stop(self) -> None:
        self.stopping.set()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def carry_out(self, extra: Extra | None) -> Outcome:
        made: list[Ending] = []
        self.make_files(lambda: made.append(self._ending(extra)))
        return self._ended(made[0] if made else self._ending(extra))

    def make_files(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Write the output files, but for those that an earlier run finished; `meanwhile` is done while the
        last of them go to the disk, where any is written."""
        parts = groups(self.plan)
        finished = [self._taken_up(files) for files, _ in parts]
        fail_all(self.refused(self.findings))  # which an earlier run may have been told only to record
        missing = [f for (files, _), there in zip(parts, finished, strict=True) if not there for f in files]
        self.staging.check_space(
            sum(self.layouts[f.name].size for f in missing) + sum(d.size for d in self.plan.documents)
        )
        left = [part for part, there in zip(parts, finished, strict=True) if not there]
        for k, (files, steps) in enumerate(left, 1):
            self._make(files, steps, meanwhile if k == len(left) else lambda: None)

    def conclude(self) -> Outcome:
        """What all files of the plan are needed for: checks of the source, documents, the manifest."""
        return self._ended(self._ending(None))

    def _ending(self, extra: Extra | None) -> Ending:
        """The checks of the source, and what is written last; nothing on the disk is changed."""
        self._check_sources()
        self.findings += stale(self.checkpoint, self.plan)
        self.findings += odd_scales(self.plan.quantised, dequantised="dequantize" in self.plan.asked)
        self._say("finish", "")
        return self._documents(extra)

    def _ended(self, ending: Ending) -> Outcome:
        """Write the documents and, last of all files, the manifest."""
        for document in ending.documents:
            self.staging.write(document.name, document.pieces())
        self.staging.write(MANIFEST, ending.written)
        self.checkpoint.check_unchanged()
        return self.outcome(ending.manifest)

    def outcome(self, made: Mapping[str, Any]) -> Outcome:
        """What was done, with the manifest `made` of it."""
        return Outcome(
            out=self.staging.place,
            bytes_read=sum(lane.read_bytes for lane in self.lanes),
            bytes_written=sum(lane.written_bytes for lane in self.lanes),
            targets={(f, t): crc for f, crcs in self.targets.items() for t, crc in crcs.items()},
            sources=dict(self.sources),
            sha256=dict(self.hashes),
            findings=tuple(self.findings),
            manifest=made,
            resumed=tuple(self.resumed),
        )

    # --- one group ---

    def _make(self, files: list[OutputFile], indices: list[int], meanwhile: Callable[[], object]) -> None:
        """Write, compare, check, force to the disk and note the files of one group. `meanwhile` is done while
        they go to the disk; should it fail, they are noted all the same."""
        with contextlib.ExitStack() as stack:
            opened: dict[str, int] = {}
            for file in files:
                opened[file.name] = self.staging.create(file.name, self.layouts[file.name].size)
                stack.callback(os.close, opened[file.name])
                self._write_all(file.name, opened[file.name], self.layouts[file.name].header_writes())
            small = Smalls(
                self.checkpoint,
                self.steps,
                opened,
                {f.name: self.layouts[f.name].offsets for f in files},
                self._has_c if self._records_c else None,
            )
            targets = Targets(files, opened, small.begins)
            crcs, findings = self._moved(files, indices, targets, small)
            for file in files:
                tail = self.layouts[file.name].finish(self.targets[file.name])
                self._write_all(file.name, opened[file.name], tail)
            if self.sha256:
                self._hash(targets)
            with beside(partial(self.staging.seal_all, opened)) as sealed:
                entry = self._learnt(files, crcs, small, findings)
                try:
                    entry.line  # noqa: B018 - which makes it
                    meanwhile()
                finally:
                    sealed()
                    self.staging.record(entry)

    def _moved(
        self, files: list[OutputFile], indices: list[int], targets: Targets, small: Smalls
    ) -> tuple[dict[Key, IntervalCrc | None], list[Finding]]:
        """Carry out the steps of a group; the sources whose checksums were taken, and what is odd."""
        crcs: dict[Key, IntervalCrc | None] = {}
        bound = self._bound(indices, targets, crcs, small)
        few, moved = small.together(indices, self.first_readers), [b for b in bound if not b.step.compare]
        work = turns(few, moved, self.jobs)
        if self.ahead.fetchers:  # what comes from elsewhere is fetched in this order
            work = [self.ahead.of(chain(few, batches(moved)))]
        self._each(work, partial(self._carry, small), "copy", files[0].name)
        findings = self._look_at(targets, small)
        findings += self._compare([b for b in bound if b.step.compare])
        for file in files:
            self.targets[file.name] = {
                t.name: small.targets[key]
                if (key := (file.name, t.name)) in small.targets
                else _total(targets[key])
                for t in file.tensors
            }
        return crcs, findings

    def _learnt(
        self,
        files: list[OutputFile],
        crcs: Mapping[Key, IntervalCrc | None],
        small: Smalls,
        findings: Sequence[Finding],
    ) -> Entry:
        """What is noted of a group, and known from now on."""
        known = self._known_sources(crcs, small)
        self.known_c |= small.sources_c
        wanted = (k for f in files for k in self.whole.get(f.name, ()))
        known |= self._read_whole([k for k in wanted if k not in known and k not in self.sources])
        self.sources.update(known)
        self.findings += findings
        keys = [(f.name, t.name) for f in files for t in f.tensors] if self.sha256 else []
        return Entry(
            {f.name: self.targets[f.name] for f in files},
            known,
            {key: self.hashes[key] for key in keys if key in self.hashes},
            tuple(findings),
        )

    def _carry(self, small: Smalls, work: Work, lane: Lane) -> None:
        if isinstance(work, Together):
            small.carry(work, lane)
        else:
            self.carrier.carry_all(work, lane)

    def _bound(
        self, indices: Iterable[int], targets: Targets, crcs: dict[Key, IntervalCrc | None], small: Smalls
    ) -> list[Bound]:
        """The steps that are carried out one by one. `crcs` gets the sources whose checksums are taken, in
        the order of the steps; those that `small` takes without a place for it."""
        bound = []
        for k in indices:
            if not small.has(k):
                bound.append(self._bind(k, targets, crcs))
            elif (k, 0) in self.first_readers:
                crcs[small.source(k)] = None
        return bound

    def _known_sources(self, crcs: Mapping[Key, IntervalCrc | None], small: Smalls) -> dict[Key, int]:
        """The CRC32s of those that were read whole, or nearly: what no step read of them (rows of padding) is
        read here."""

        def read(hole: Hole, lane: Lane) -> None:
            hole[1].add(*hole[2:], self.carrier.crc_of(hole[0], *hole[2:], lane))

        self._each([iter(holes(self.checkpoint, crcs))], read, "check", "")
        known = {}
        for key, crc in crcs.items():
            if crc is None:
                known[key] = small.sources[key]
            elif (total := crc.value(self.checkpoint.files[key[0]].tensors[key[1]].nbytes)) is not None:
                known[key] = total
        return known

    def _bind(self, index: int, targets: Targets, crcs: dict[Key, IntervalCrc | None]) -> Bound:
        step = self.steps[index]
        sources = []
        for i, part in enumerate(step.sources):
            info = self.checkpoint.files[part.file].tensors[part.name]
            crc = None
            if (index, i) in self.first_readers:
                crc = crcs[part.file, part.name] = IntervalCrc()
            sources.append(Source(info, crc, None if crc is None else self._crc_c(part.file, part.name)))
        return Bound(step, sources, [targets[p.file, p.name] for p in step.targets])

    def _crc_c(self, file: str, name: str) -> IntervalCrc | None:
        """Where the CRC-32C of a source tensor is collected, if its file has one of it to compare with."""
        if not self._has_c(file, name):
            return None
        return self.crcs_c.setdefault((file, name), IntervalCrc(combine_c))

    def _has_c(self, file: str, name: str) -> bool:
        """Whether the file of a source tensor has a CRC-32C of it."""
        if file not in self._records_c:
            return False
        record = self.checkpoint.files[file].record_of(name)
        return record is not None and self._records_c[file][record[0]].crc32c is not None

    @cached_property
    def _records_c(self) -> dict[str, Mapping[str, Record]]:
        """The records of the files whose format has such checksums."""
        return {f.name: f.records() for f in self.checkpoint.files.values() if f.format == "tf-bundle"}

    def _write_all(self, name: str, descriptor: int, writes: Iterable[tuple[int, bytes]]) -> None:
        for offset, data in writes:
            try:
                disk.write_at(descriptor, data, offset)
            except OSError as error:
                raise disk.failure(error, name, offset=offset) from None

    def _look_at(self, targets: Targets, small: Smalls) -> list[Finding]:
        """What is odd about the values; with `strict`, values that are not finite are refused."""
        found = []
        for key in targets.every():
            file, name = key
            if key in small.targets and key not in small.odd:
                continue
            if self.plan.unread and re.fullmatch(self.plan.unread, name):
                continue
            values = small.odd.get(key) or targets[key].values
            if (said := of_values(values, targets[key].info.shape, file, name)) is not None:
                found.append(said)
        fail_all(self.refused(found))
        return found

    def refused(self, findings: Iterable[Finding]) -> Iterator[Problem]:
        """Those of the findings that this run refuses."""
        return refused(findings, strict=self.strict, strict_replicas=self.plan.strict_replicas)

    def _compare(self, bound: list[Bound]) -> list[Finding]:
        """Compare what must be equal with what was written; small differences of copies are findings."""
        different: set[int] = set()
        place = {id(b): k for k, b in enumerate(bound)}

        def compare(batch: list[tuple[Bound, Block]], lane: Lane) -> None:
            for b, block in batch:
                if place[id(b)] not in different and not self.carrier.same(b, block, lane):
                    different.add(place[id(b)])

        self._each([self.ahead.of(batches(bound, copy_bytes=CHUNK))], compare, "check", "")
        apart = (bound[k] for k in sorted(different))
        verdicts = [of_copies(self.plan, b.step, measure(self.carrier, b, self.lanes[0])) for b in apart]
        fail_all(v for v in verdicts if isinstance(v, Problem))
        return [v for v in verdicts if isinstance(v, Finding)]

    def _hash(self, targets: Targets) -> None:
        def work(key: Key, lane: Lane) -> None:
            target, digest = targets[key], hashlib.sha256()
            for data in _chunks(target, lane):
                digest.update(data)
            self.hashes[key] = digest.hexdigest()

        self._each([targets.every()], work, "check", "")

    # --- going on ---

    @cached_property
    def _known(self) -> tuple[set[frozenset[str]], dict[str, set[Key]], set[Key]]:
        """The names of each group of files, the tensors of each file, and all tensors of the source."""
        return (
            {frozenset(f.name for f in files) for files, _ in groups(self.plan)},
            {f.name: {(f.name, t.name) for t in f.tensors} for f in self.plan.outputs},
            {(f.name, t) for f in self.checkpoint.files.values() for t in f.tensors},
        )

    def belongs(self, entry: Entry) -> bool:
        """Whether a line of the journal speaks of one group of this plan, of tensors it writes and reads."""
        named, held, sources = self._known
        if frozenset(entry.files) not in named:
            return False
        written = set().union(*(held[f] for f in entry.files))
        return (
            {(f, t) for f, crcs in entry.files.items() for t in crcs} == written
            and entry.sources.keys() <= sources
            and entry.sha256.keys() <= written
            and {(f.file, f.tensor) for f in entry.findings} <= written | sources
        )

    def _taken_up(self, files: list[OutputFile]) -> bool:
        """Whether an earlier run finished this group and every byte of it is still right; else what is left
        of it is removed."""
        names = [f.name for f in files]
        entry = next((e for e in self.staging.entries if e.files.keys() == set(names)), None)
        if entry is None:
            self.staging.discard(names)
            return False
        complete = not self.sha256 or entry.sha256.keys() == {
            (f.name, t.name) for f in files for t in f.tensors
        }
        if not complete or not all(self.is_intact(f, entry.files[f.name]) for f in files):
            self.staging.discard(names)
            self.staging.entries.remove(entry)
            return False
        self.targets.update({f: dict(crcs) for f, crcs in entry.files.items()})
        self.sources.update(entry.sources)
        self.hashes.update(entry.sha256 if self.sha256 else {})
        self.findings += entry.findings
        self.resumed += names
        self.resumed_bytes += sum(t.nbytes for f in files for t in f.tensors)
        return True

    def has_headers(self, file: OutputFile, crcs: Mapping[str, int]) -> bool:
        """Whether a finished file is there with its size and all that is not tensor data."""
        layout = self.layouts[file.name]
        try:
            descriptor = self.staging.reopen(file.name)
        except OSError:
            return False
        try:
            if os.fstat(descriptor).st_size != layout.size or set(crcs) != {t.name for t in file.tensors}:
                return False
            expected = (*layout.header_writes(), *layout.finish(crcs))
            return all(os.pread(descriptor, len(data), offset) == data for offset, data in expected)
        finally:
            os.close(descriptor)

    def is_intact(self, file: OutputFile, crcs: Mapping[str, int]) -> bool:
        if not self.has_headers(file, crcs):
            return False
        layout = self.layouts[file.name]
        with contextlib.ExitStack() as stack:
            descriptor = self.staging.reopen(file.name)
            stack.callback(os.close, descriptor)
            wrong: list[str] = []

            def work(info: TensorInfo, lane: Lane) -> None:
                crc = 0
                for data in _chunks(Target(info, descriptor, layout.offsets[info.name]), lane):
                    crc = crc32(data, crc)
                if crc != crcs[info.name]:
                    wrong.append(info.name)

            self._each([iter(file.tensors)], work, "check", file.name)
            return not wrong

    # --- the end ---

    def _check_sources(self) -> None:
        """Checksums of source tensors that no step read whole and in full, and of the files' records."""
        unread = [(f, n) for f, own in self.steps.read().items() for n in own if (f, n) not in self.sources]
        self.sources |= self._read_whole(sorted(unread))
        known_c = self.known_c | {
            key: crc
            for key, collected in self.crcs_c.items()
            if (crc := collected.value(self.checkpoint.files[key[0]].tensors[key[1]].nbytes)) is not None
        }
        found = check_records(self.checkpoint, self.sources, known_c)
        problems = [*found.wrong, *repeated_shares(self.plan.steps, self.checkpoint, self.sources)]

        def check(place: tuple[str, str], _: Lane) -> None:
            try:
                self.checkpoint.files[place[0]].check_record(place[1])
            except CkptToolError as error:
                problems.extend(error.problems)

        self._each([iter(found.unread)], check, "check", "")
        try:
            self.checkpoint.check_whole(self.sources)
        except CkptToolError as error:
            problems.extend(error.problems)
        fail_all(problems)
        for file, count in found.unchecked.items():
            text = f"expected a checksum for each record, found none for {count}: damage would not be noticed"
            self.findings.append(Finding("unchecked-records", text, file, None, {"count": count}))

    def _read_whole(self, keys: Iterable[Key]) -> dict[Key, int]:
        """The CRC32s of source tensors, read from the first byte to the last."""
        found: dict[Key, int] = {}

        def read(key: Key, lane: Lane) -> None:
            found[key] = self.carrier.crc_of(
                key, 0, self.checkpoint.files[key[0]].tensors[key[1]].nbytes, lane
            )

        self._each([iter(keys)], read, "check", "")
        return found

    def _documents(self, extra: Extra | None) -> Ending:
        """The documents and the manifest."""

        def made(documents: Iterable[OutputDocument]) -> dict[str, Any]:
            return manifest(
                self.plan,
                self.checkpoint,
                plan_digest=self.staging.identity.plan,
                headers=self.headers,
                sources=dict(sorted(self.sources.items())),
                targets=self.targets,
                sizes={name: layout.size for name, layout in self.layouts.items()},
                sha256=self.hashes,
                findings=self.findings,
                documents=documents,
                source=self.origin,
            )

        documents = [*self.plan.documents, *self._indexes()]
        if extra is not None:
            documents += extra(made(documents))
        content = made(documents)
        return Ending(documents, content, as_document(content))

    def _indexes(self) -> Iterator[OutputDocument]:
        """The index of each TensorFlow bundle, of the checksums of what was written."""
        bundles: dict[str, list[OutputFile]] = {}
        for file in sorted(self.plan.outputs, key=lambda f: f.name):
            if file.format == "tf-bundle":
                bundles.setdefault(bundle_of(file.name), []).append(file)
        for prefix, files in bundles.items():
            crcs: dict[str, int] = {}
            for file in files:
                crcs |= self._castagnoli(file)
            from ckpt_tool.checkpoint.tf_bundle_writer import index_of

            listed = [[(t.name, t.dtype, t.shape) for t in f.tensors] for f in files]
            yield OutputDocument(f"{prefix}.index", index_of(listed, crcs), "the list of tensors")

    def _castagnoli(self, file: OutputFile) -> dict[str, int]:
        """The CRC-32C of each tensor of a finished file. Read back: only they are wanted of bundles, and what
        an interrupted run left has none."""
        found: dict[str, int] = {}
        with contextlib.ExitStack() as stack:
            descriptor = self.staging.reopen(file.name)
            stack.callback(os.close, descriptor)

            def work(info: TensorInfo, lane: Lane) -> None:
                crc = 0
                target = Target(info, descriptor, self.layouts[file.name].offsets[info.name])
                for data in _chunks(target, lane):
                    crc = crc32c(data, crc)
                found[info.name] = crc

            self._each([iter(file.tensors)], work, "finish", file.name)
        return found

    # --- the workers ---

    def _each(
        self, kinds: Sequence[Iterator[T]], work: Callable[[T, Lane], object], stage: str, file: str
    ) -> None:
        """`work` on every item, by all workers; the first failure stops them and is raised here. Of several
        kinds of items each worker begins with another: what is Python for the most part and what is the disk
        do not wait for one another."""
        guard = threading.Lock()

        def loop(lane: Lane, first: int) -> None:
            for own in (*kinds[first:], *kinds[:first]):
                while not self.stopping.is_set():
                    with guard:
                        item = next(own, None)
                    if item is None:
                        break
                    try:
                        work(item, lane)
                    except BaseException:
                        self.stopping.set()
                        raise
            if not self.stopping.is_set():
                lane.outbox.flush()

        futures = [self.pool.submit(loop, lane, k % len(kinds)) for k, lane in enumerate(self.lanes)]
        waiting = set(futures)
        while waiting:
            _, waiting = wait(waiting, timeout=REFRESH, return_when=FIRST_EXCEPTION)
            self._say(stage, file)
        for future in futures:
            future.result()

    def _say(self, stage: str, file: str) -> None:
        done = self.resumed_bytes + sum(lane.written_bytes for lane in self.lanes)
        self.progress(Progress(stage, file, done, self.bytes_out))


def _chunks(target: Target, lane: Lane) -> Iterator[memoryview]:
    """The bytes of an output tensor in order; each piece is valid until the next."""
    for start in range(0, target.info.nbytes, CHUNK):
        data = lane.room("there", min(CHUNK, target.info.nbytes - start), np.dtype("u1")).data
        target.read(data, start)
        yield data


def _total(target: Target) -> int:
    crc = target.crc.value(target.info.nbytes)
    if crc is None:
        raise RuntimeError(f"the plan's steps left bytes of {target.info.name} unwritten")
    return crc
