"""Level 2: are they the same bits? The plan's inverse, applied to the output block by block, must give the
source back byte for byte; where a cast or a mean over heads was asked for, it is made from the source once
more and compared with the output instead. Checksums in the manifest are compared too, which needs no
source."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from functools import partial
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.checkpoint.remote_path import remote_of
from ckpt_tool.convert.carry import pieces
from ckpt_tool.convert.casting import CASTABLE, common, converted, rounds
from ckpt_tool.convert.comparing import Difference as Drift
from ckpt_tool.convert.copies import DROPPED
from ckpt_tool.convert.layout import COPIED, Access, Block, Runs, Step
from ckpt_tool.convert.pooling import mean
from ckpt_tool.errors import printable
from ckpt_tool.records import dataclass
from ckpt_tool.verify.claims import WITHOUT_COPIES
from ckpt_tool.verify.coverage import SHOWN, Scan, capped
from ckpt_tool.verify.in_order import in_order
from ckpt_tool.verify.packed_bits import exactness, explained, recognised
from ckpt_tool.verify.passing import Passing
from ckpt_tool.verify.report import Finding, Status
from ckpt_tool.verify.rounding import other_roundings
from ckpt_tool.verify.strips import strip
from ckpt_tool.verify.subject import Subject

LEVEL = "bits"
DOCUMENT_LIMIT = 1 << 30  # bytes of a file beside the weights: a list of entities has a hundred million
ROWS = 1 << 22  # of a tensor, which are told apart
SMALLEST = 5e-324
PIECE = 2 << 20  # bytes of a long run that are moved or compared at a time
KEPT = 2 << 20  # bytes of an array that is used again for the next block
# Of each thread, arrays that it uses for one step after another: of new ones every page is given and zeroed.
_kept = threading.local()


@dataclass
class Difference:
    """How one tensor differs from what it should be; `first` is the lowest element seen to differ."""

    tensor: TensorInfo
    against: TensorInfo
    dtype: str  # in which they are compared: wider than the tensor's own where its copy is
    count: int = 0
    first: int | None = None
    values: tuple[float, float] = (0.0, 0.0)  # at `first`: expected, found
    max_delta: float = 0.0
    drift: Drift = field(
        default_factory=Drift
    )  # by which small differences between copies are told from others
    roundings: set[str] | None = None  # after a cast: other ways to round that give what was found
    rows: np.ndarray | None = None  # while it is compared: the largest |difference| of each row
    strip: dict[str, Any] | None = None  # that in little memory, see strips

    def round_otherwise(self, before: np.ndarray, source: str, found: np.ndarray) -> None:
        """Take in what other roundings of a block make of it: raw bits `before` the cast, and as found."""
        ways = other_roundings(before, source, self.dtype)
        fitting = {words for words, bits in ways if np.array_equal(bits, found)}
        self.roundings = fitting if self.roundings is None else self.roundings & fitting

    def add_runs(self, access: Access, expected: np.ndarray, found: np.ndarray) -> None:
        """Take in the runs of `access`, which lie one after another in the raw bits."""
        n = access.runs.length
        for k, start in enumerate(access.runs.offsets()):
            run = slice(k * n, (k + 1) * n)
            self.add(start, expected[run], found[run])

    def add(self, start: int, expected: np.ndarray, found: np.ndarray) -> None:
        """Take in a run of raw bits that begins at element `start`."""
        places = np.flatnonzero(expected != found)
        if not places.size:
            return
        self.count += places.size
        a, b = (_numbers(x[places], self.dtype) for x in (expected, found))
        with np.errstate(invalid="ignore"):
            delta = np.abs(a - b)
        delta = np.where(np.isnan(delta), np.inf, delta)
        self.max_delta = max(self.max_delta, float(delta.max()))
        self._add_rows(start + places, delta)
        if self.first is None or start + places[0] < self.first:
            self.first = start + int(places[0])
            self.values = float(a[0]), float(b[0])

    def _add_rows(self, elements: np.ndarray, delta: np.ndarray) -> None:
        """Numbers may be equal whose bits are not (0 and -0): these have the smallest difference there is."""
        if len(self.tensor.shape) < 1 or self.tensor.shape[0] > ROWS:
            return
        if self.rows is None:
            self.rows = np.zeros(self.tensor.shape[0])
        width = self.tensor.numel // self.tensor.shape[0]
        np.maximum.at(self.rows, elements // width, np.maximum(delta, SMALLEST))

    def compared(self) -> Difference:
        """When all of the tensor was."""
        if self.rows is not None:
            self.strip, self.rows = strip(self.rows), None
        return self


def _numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits as float64 numbers; as whole numbers where the type is none that numpy can cast."""
    if dtype in CASTABLE:
        return converted(bits, dtype, "F64").view("<f8")
    return bits.astype("<f8")


@dataclass
class Comparison:
    """What comparing all steps of a plan found."""

    differences: list[Difference] = field(default_factory=list)
    copies: list[Difference] = field(default_factory=list)  # small differences between copies of one tensor
    compared: int = 0  # bytes of the source
    cast: int = 0  # tensors compared after a cast
    pooled: int = 0  # tensors compared with the mean over the source's heads
    missing: list[str] = field(default_factory=list)

    def add(self, other: Comparison) -> None:
        """Take in what comparing further steps found."""
        self.differences += other.differences
        self.copies += other.copies
        self.compared += other.compared
        self.cast += other.cast
        self.pooled += other.pooled
        self.missing += other.missing


def compare(subject: Subject, steps: Iterable[Step], passing: Passing | None = None) -> Comparison:
    """Walk steps of the plan, which is there as is the source. `passing` takes in what is read of the
    output."""
    assert subject.source is not None
    result, files = Comparison(), subject.source.files
    work = partial(compare_step, subject, passing=passing)

    def size(step: Step) -> int:
        return sum(files[p.file].tensors[p.name].nbytes for p in step.sources)

    for found in in_order(work, steps, subject.source, subject.output, size=size):
        result.add(found)
    _kept.__dict__.clear()  # of other threads, they end with them
    return result


def recognise_recipe(subject: Subject) -> None:
    """Of numbers that nobody says were asked for, the recipe by which the output has them."""

    def differs(step: Step, source: Checkpoint) -> bool:
        found = [t for p in step.targets if (t := subject.target(p.file, p.name)) is not None]
        inputs = [source.files[p.file].tensors[p.name] for p in step.sources]
        fits = [t.shape for t in found] == [p.shape(step.sizes) for p in step.targets]
        if not fits or {t.dtype for t in found} != {step.targets[0].dtype}:
            return True
        to = step.targets[0].dtype
        return bool(_compare_step(step, source, inputs, subject.output, found, False, to))

    recognised(subject, differs)


def compare_step(subject: Subject, step: Step, passing: Passing | None = None) -> Comparison:
    """What one step of the plan gives against what is there."""
    assert subject.source is not None
    result = Comparison()
    sources = [subject.source.files[p.file].tensors[p.name] for p in step.sources]
    targets = [subject.target(p.file, p.name) for p in step.targets]
    if any(t is None for t in targets):
        result.missing += [p.name for p, t in zip(step.targets, targets, strict=True) if t is None]
        return result
    found = [t for t in targets if t is not None]
    fits = all(t.shape == p.shape(step.sizes) for p, t in zip(step.targets, found, strict=True))
    dtypes, wanted = {t.dtype for t in found}, {p.dtype for p in step.targets}
    if not fits or (dtypes != wanted and not step.compare):  # what a copy is compared with is also written
        result.missing += [f"{t.name} ({t.dtype} {t.shape})" for t in found]
        return result
    same = wanted == dtypes == {t.dtype for t in sources} and not step.mean

    def differences(source: Checkpoint, passing: Passing | None = None) -> list[Difference]:
        is_copy, output = bool(step.compare), subject.output
        if same:
            return _compare_step(step.inverse(), output, found, source, sources, is_copy, None, passing)
        return _compare_step(step, source, sources, output, found, is_copy, min(wanted), passing)

    made = differences(subject.source, None if step.compare else passing)
    if made and (words := explained(subject, sources, lambda other: bool(differences(other)))) is not None:
        for d in made:
            d.roundings = {words}
    if not same:
        exact = bool(step.compare) and not any(rounds(t.dtype, step.targets[0].dtype) for t in sources)
        result.cast += not step.mean and not exact
        result.pooled += bool(step.mean)
    for d in made:
        drifted = step.compare not in ("", COPIED) and not d.drift.is_large
        (result.copies if drifted else result.differences).append(d)
    result.compared += sum(t.nbytes for t in sources)
    return result


def _compare_step(
    step: Step,
    made_from: Checkpoint,
    inputs: Sequence[TensorInfo],
    held_by: Checkpoint,
    wanted: Sequence[TensorInfo],
    is_copy: bool,
    cast_to: str | None = None,
    passing: Passing | None = None,
) -> list[Difference]:
    """`step` applied to `inputs` against what `wanted` hold; differences name the tensors of `wanted`. What
    is read of the output, on either side, goes to `passing`."""
    dtype = cast_to or wanted[0].dtype
    moved = common(t.dtype for t in inputs)
    differences = [Difference(w, inputs[0], dtype) for w in wanted]
    rooms = _kept.__dict__.setdefault("rooms", ({}, {}))
    reading, holding = _Reader(made_from, passing, rooms[0]), _Reader(held_by, passing, rooms[1])
    as_it_is = cast_to is None and not is_copy and {t.dtype for t in (*inputs, *wanted)} == {dtype}
    for block in pieces(step, copy_bytes=sys.maxsize if as_it_is else PIECE):
        if as_it_is and block.is_copy:
            read, write = block.reads[0], block.writes[0]
            ends = (inputs[read.part], read.runs.base), (wanted[write.part], write.runs.base)
            _compare_run(reading, holding, *ends, read.numel, differences[write.part])
            continue
        made = _apply(block, reading, inputs, cast_to)
        for whole, all_values in zip(block.writes, made, strict=True):
            difference = differences[whole.part]
            for first, access in _parts(whole, all_values.itemsize):
                values = all_values[first : first + access.numel]
                held = holding.read(wanted[access.part], access, dtype)
                if is_copy:
                    difference.drift.add(values, held, dtype)
                if not reading.equal(values, held):
                    if cast_to is not None and not block.mean:
                        k = block.writes.index(whole)
                        before = _apply(block, _Reader(made_from), inputs, None)[k]
                        difference.round_otherwise(before[first : first + access.numel], moved, held)
                    right, left = (held, values) if cast_to is None else (values, held)
                    difference.add_runs(access, right, left)  # the source is right
    return [d.compared() for d in differences if d.count]


def _compare_run(
    reading: _Reader,
    holding: _Reader,
    made: tuple[TensorInfo, int],
    wanted: tuple[TensorInfo, int],
    numel: int,
    difference: Difference,
) -> None:
    """Compare `numel` neighbouring elements of two tensors of one dtype, each given with the first of them.
    Nearly all of a model is that, so little is done beside the reading, and in few calls: threads wait for
    one another between them."""
    longest = PIECE // DTYPES[made[0].dtype].itemsize
    with reading.following(*made) as read, holding.following(*wanted) as held:
        for start in range(0, numel, longest):
            n = min(longest, numel - start)
            values, right = read(n), held(n)
            if not reading.equal(values, right):
                difference.add(wanted[1] + start, right, values)


def _parts(access: Access, itemsize: int) -> Iterator[tuple[int, Access]]:
    """One long run in parts of at most `PIECE` bytes: of each the first element of the run, and its place."""
    longest = PIECE // itemsize
    if access.runs.count != 1 or access.numel <= longest:
        yield 0, access
        return
    for start in range(0, access.numel, longest):
        n = min(longest, access.numel - start)
        yield start, Access(access.part, Runs(access.runs.base + start, (), (), n), (n,))


class _Reader:
    """Reads of one checkpoint for one thread, into small arrays that are used again: what was read is good
    until the next is read for the same purpose. `passing` takes in what is read of its output."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        passing: Passing | None = None,
        rooms: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self._passing = passing if passing is not None and passing.output is checkpoint else None
        self._rooms: dict[str, np.ndarray] = {} if rooms is None else rooms

    def room(self, purpose: str, count: int, dtype: str) -> np.ndarray:
        """`count` elements, unset."""
        bits = np.dtype(DTYPES[dtype].bits)
        size = count * bits.itemsize
        if size > KEPT:
            return np.empty(count, bits)
        found = self._rooms.get(purpose)
        if found is None or found.size < size:
            found = self._rooms[purpose] = np.empty(KEPT, np.uint8)
        return found[:size].view(bits)

    def equal(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Whether all bits are the same."""
        if a.dtype != b.dtype or a.nbytes != b.nbytes or a.nbytes % 8:
            return np.array_equal(a, b)
        same = self.room("equal", a.nbytes // 8, "BOOL").view(np.bool_)
        np.equal(a.view(np.uint64), b.view(np.uint64), out=same)
        return bool(same.all())

    @contextmanager
    def following(self, tensor: TensorInfo, start: int) -> Iterator[Callable[[int], np.ndarray]]:
        """What reads so many elements of `tensor` at a time, one after another from element `start` on."""
        itemsize, at = DTYPES[tensor.dtype].itemsize, start
        look = None if self._passing is None else self._passing.following(tensor, start)

        def read(count: int) -> np.ndarray:
            nonlocal at
            bits = self.room("following", count, tensor.dtype)
            self.checkpoint.read_into(tensor, at * itemsize, bits.data.cast("B"))
            at += count
            if look is not None:
                look.take(bits)
            return bits

        yield read
        if look is not None:
            look.end()

    def read(self, tensor: TensorInfo, access: Access, dtype: str, purpose: str = "read") -> np.ndarray:
        """In `dtype`, which is the tensor's or a wider one."""
        out = self.room(purpose, access.numel, tensor.dtype)
        data = out.data.cast("B")
        size = access.runs.length * out.itemsize
        offsets = access.runs.offsets()
        for k, start in enumerate(offsets):
            self.checkpoint.read_into(tensor, start * out.itemsize, data[k * size : (k + 1) * size])
        if self._passing is not None:
            self._passing.look(tensor, offsets, out)
        return converted(out, tensor.dtype, dtype)


def moved(
    step: Step, source: Checkpoint, inputs: Sequence[TensorInfo], dtype: str
) -> Iterator[tuple[Access, np.ndarray]]:
    """What `step` makes of `inputs`, piece by piece: where it goes, and its raw bits in `dtype`."""
    for block in pieces(step, copy_bytes=PIECE):
        yield from zip(block.writes, _apply(block, _Reader(source), inputs, dtype), strict=True)


def _apply(
    block: Block, reader: _Reader, inputs: Sequence[TensorInfo], cast_to: str | None
) -> list[np.ndarray]:
    """What the block makes of `inputs`, one array for each of its writes."""
    dtype = common(t.dtype for t in inputs)
    read = [reader.read(inputs[a.part], a, dtype, f"read {k}") for k, a in enumerate(block.reads)]
    if block.is_copy:
        return [converted(x, dtype, cast_to or dtype) for x in read]
    made = [reader.room(f"made {k}", n, dtype) for k, n in enumerate(block.filled)]
    block.shuffle(read, made)
    if block.mean:
        return [mean(x, block.mean, dtype, cast_to or dtype) for x in made]
    return [converted(x, dtype, cast_to or dtype) for x in made]


# --- findings -------------------------------------------------------------------------------------------


def finding(check: str, status: Status, message: str, where: str | None = None, **more: Any) -> Finding:
    return Finding(LEVEL, check, status, message, where, **more)


def bits(subject: Subject, scans: list[Scan], compared: Comparison | None = None) -> list[Finding]:
    """The findings of this level; `scans` are those of the whole output, `compared` what comparing all steps
    of the plan found where that was done already."""
    found = [*_checksums(subject, scans), *capped([*_headers(subject)])]
    if subject.source is None:
        return [finding("round trip", "skipped", "no source was given to compare with"), *found]
    if subject.plan is None:
        return [finding("round trip", "skipped", "the source could not be planned: see coverage"), *found]
    result = compare(subject, subject.plan.steps) if compared is None else compared
    wrong = {d.tensor.name for d in result.differences} | {d.against.name for d in result.differences}
    numbers = exactness(subject, wrong)
    return [*_round_trip(subject, result), *numbers, *_accounting(subject, result), *found]


def _round_trip(subject: Subject, result: Comparison) -> Iterator[Finding]:
    assert subject.plan is not None
    recorded = subject.manifest.drift if subject.manifest else frozenset()
    wrong, notes = [_difference(d) for d in result.differences], []
    for d in result.copies:
        known = "recorded in the manifest" if d.tensor.name in recorded else "not recorded in a manifest"
        text = (
            f"{d.count:,} of {d.tensor.numel:,} elements differ from the copy that was taken, max |delta| "
            f"{d.max_delta:.3g}, relative {d.drift.relative_rms:.2g}: drift between copies, {known}"
        )
        notes.append(finding("replicated", "note", text, f"{d.tensor.file}: {d.tensor.name}"))
    for name in result.missing[:SHOWN]:
        text = "expected a tensor of the planned shape and dtype to compare with, found none"
        wrong.append(finding("round trip", "fail", text, name, data={"exactness": "differs"}))
    yield from capped(wrong)
    yield from capped(notes)
    if wrong:
        return
    exactness = "identical after cast" if result.cast or result.pooled else "bit-identical"
    dtypes = ", ".join(sorted({p.dtype for step in subject.plan.steps for p in step.targets}))
    words = "the plan's inverse gives the source back"
    packed = subject.packed
    if packed is not None and packed.dtype is not None:
        exactness = "identical after cast"
        words = f"the output is what the source's codes and scales stand for by the recipe {packed.recipe}"
    elif result.cast:
        words = f"the output is the source cast to {dtypes}"
    if result.pooled:
        pooled = f"the means over heads in {result.pooled} steps are those of the source"
        words = f"{pooled}, and {words}" if result.cast else f"{pooled}; for the rest {words}"
    if any(n.startswith(DROPPED) for n in subject.plan.lossy):
        words += ", but for the copies that were left out and compared with nothing"
        exactness = WITHOUT_COPIES
    yield finding(
        "round trip",
        "pass",
        f"{words}, byte for byte: {result.compared:,} bytes in {len(subject.plan.steps)} steps",
        data={"exactness": exactness, "bytes": result.compared},
    )


def _difference(d: Difference) -> Finding:
    assert d.first is not None
    at = tuple(int(k) for k in np.unravel_index(d.first, d.tensor.shape or (1,)))
    made_of = f"{d.tensor.file}: {d.tensor.name}"
    expected, found = d.values
    text = (
        f"{d.against.name} differs from it in {d.count:,} of {d.tensor.numel:,} elements, the first at {at}: "
        f"expected {expected!r}, found {found!r}, max |delta| {d.max_delta:.3g}"
    )
    if d.roundings:
        text += f"; every element is the source's, but {min(d.roundings)}"
    data = {
        "exactness": "differs",
        "count": d.count,
        "first": list(at),
        "element": d.first,
        "counterpart": d.against.name,
        "max_delta": d.max_delta,
    }
    drawn = {} if d.strip is None else {"rows": d.strip}
    return finding("round trip", "fail", text, made_of, measured=d.max_delta, bar=0.0, data=data, drawn=drawn)


def _accounting(subject: Subject, result: Comparison) -> Iterator[Finding]:
    """Where every byte of the source files is: moved, compared as a copy, dropped, or not tensor data at
    all."""
    assert subject.plan is not None and subject.source is not None
    own = subject.carried.plan if subject.carried is not None else None
    steps = [*subject.plan.steps, *(own.steps if own is not None else ())]
    copies = {(p.file, p.name) for s in steps if s.compare for p in s.sources}
    moved = {(p.file, p.name) for s in steps if not s.compare for p in s.sources}
    moved |= subject.carried.buckets if subject.carried is not None else set()
    size = Counter[str]()
    weights = subject.packed.by_name if subject.packed is not None else {}
    for t in (*subject.source, *(left.tensor for left in subject.source.left_out)):
        key = (t.file, t.name)
        stored = weights[t.name].parts if t.name in weights else (t,)
        size["used" if key in moved else "copies" if key in copies else "dropped"] += sum(
            p.nbytes for p in stored
        )
    planned_drop = sum(d.tensor.nbytes for d in subject.plan.dropped)
    paths = {p for f in subject.source.files.values() for p in f.paths}
    served = [remote.size for p in paths if (remote := remote_of(p)) is not None]
    whole = sum(served) + sum(p.stat().st_size for p in paths if p.is_file())
    rest = whole - sum(size.values())
    parts = [f"{size['used']:,} used"]
    parts += [f"{size['copies']:,} in copies that were compared"] if size["copies"] else []
    parts += [f"{size['dropped']:,} dropped with a reason"] if size["dropped"] else []
    parts += (
        [f"{rest:,} headers and padding"] if rest >= 0 else ["some read more than once, from shared storage"]
    )
    status: Status = "pass" if size["dropped"] == planned_drop else "fail"
    text = f"of {whole:,} bytes in the source's files {', '.join(parts)}"
    yield finding("bytes", status, text, data={**size, "files": whole, "rest": rest})


def _headers(subject: Subject) -> Iterator[Finding]:
    """Text of safetensors headers, which no bits of tensors show. Release 4 of transformers (4.37.2, 4.57.6)
    takes its `format` for the program that wrote the file and refuses text without it; 5 reads none."""
    for name, file in subject.output.files.items() if subject.direction == "to-hf" else ():
        said = file.metadata.get("format")
        if file.format != "safetensors" or dict(file.metadata) == {"format": "pt"}:
            continue
        if said == "pt":
            text = f"the header has keys besides format, which nothing compared: {_keys(file.metadata)}"
        else:
            found = "none" if said is None else f"format {printable(said, 40)}"
            text = f"expected format pt in the header's __metadata__, found {found}"
            text += ": releases 4 of transformers may refuse the file, 5 does not look"
        yield finding("header", "note", text, name)


def _keys(metadata: Mapping[str, Any]) -> str:
    others = sorted(k for k in metadata if k != "format")
    return ", ".join(printable(k, 40) for k in others[:8]) + (", ..." if len(others) > 8 else "")


def _checksums(subject: Subject, scans: list[Scan]) -> Iterator[Finding]:
    """The manifest's word on every tensor and document of the output; needs no source."""
    if subject.manifest is None:
        yield finding("checksums", "skipped", "the output has no manifest (ckpt-tool.json) with checksums")
        return
    crcs = {(subject.named(file), name): crc for (file, name), crc in subject.manifest.crcs.items()}
    wrong = []
    for s in scans:
        want = crcs.pop((subject.named(s.tensor.file), s.tensor.name), None)
        if want is None:
            text = "expected a checksum in the manifest, found none"
            wrong.append(finding("checksums", "fail", text, s.tensor.name))
        elif want != s.crc32:
            text = f"expected CRC32 {want:08x} as in the manifest, found {s.crc32:08x}"
            wrong.append(finding("checksums", "fail", text, s.tensor.name, data={"exactness": "differs"}))
    for _, name in crcs:
        wrong.append(finding("checksums", "fail", "expected this tensor of the manifest, found none", name))
    for name, sha256 in subject.manifest.documents.items():
        document = subject.output.documents.get(name)
        if document is None:
            continue  # not among the files that opening knows
        if document.sha256(DOCUMENT_LIMIT) != sha256:
            text = "expected the SHA-256 that the manifest has for this file, found another"
            wrong.append(finding("checksums", "fail", text, name))
    yield from capped(wrong)
    if not wrong:
        text = f"CRC32 of all {len(scans)} tensors and SHA-256 of the files beside them are the manifest's"
        yield finding("checksums", "pass", text)
