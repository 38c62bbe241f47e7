"""What makes thousands of small tensors cheap: blocks made once for all layers, neighbours written together,
checksums from quicker libraries. None of it may change a byte."""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from ckpt_tool.api import convert
from ckpt_tool.checkpoint import crc32c as castagnoli
from ckpt_tool.checkpoint import zlibs
from ckpt_tool.checkpoint.base import DTYPES, TensorInfo
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.crc32c import crc32c
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert import carry, disk, small, turns, values
from ckpt_tool.convert.carry import Bound, Lane, Source, Target
from ckpt_tool.convert.durable import Staging
from ckpt_tool.convert.execute import Run
from ckpt_tool.convert.journal import Entry, line
from ckpt_tool.convert.layout import SMALL_STEP, Part, Step, parse_dims, with_mean
from ckpt_tool.convert.outbox import HELD, SMALL, Outbox
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.strips import assign
from ckpt_tool.errors import CkptToolError

Writes = list[tuple[int, int]]  # (first byte, bytes)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    """Each write to an output file, as it comes."""
    made: Writes = []
    pwrite = disk.pwrite

    def counted(descriptor: int, data: bytes, offset: int) -> int:
        made.append((offset, len(data)))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(disk, "pwrite", counted)
    return made


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


# --- reordering together ---


@pytest.mark.parametrize("begins", [[8], [0, 24, 48, 72], [0, 24, 60, 84, 108, 140]], ids=str)
def test_alike_tensors_are_reordered_at_once_wherever_they_are(begins: list[int]) -> None:
    step = Step(
        (("n", 3), ("h", 2), ("d", 4)),
        (Part("a", "", "F16", parse_dims("(n h) d")),),
        (Part("b", "", "F16", parse_dims("d (h n)")),),
    )
    (block,) = step.blocks(SMALL_STEP, SMALL_STEP)
    room = np.arange(200, dtype="<u2")
    wanted = room.copy()
    for begin in begins:
        block.shuffle([room[begin : begin + 24]], [wanted[begin : begin + 24]])
    runs = [*small._evenly(begins)]
    assert [b for run in runs for b in run] == begins and len(runs) == (3 if 60 in begins else 1)
    for run in runs:
        rows = small._rows(room, run, 24)
        made = np.empty(rows.shape, rows.dtype)
        block.shuffle_each(rows, made)
        rows[...] = made
    assert np.array_equal(room, wanted) and not np.array_equal(room, np.arange(200))


# --- writing together -----------------------------------------------------------------------------------


def test_neighbours_are_one_write_and_what_is_large_goes_at_once(descriptor: int, writes: Writes) -> None:
    outbox, content = Outbox(), bytearray(random.Random(1).randbytes(3 * HELD))
    for start in range(0, 1000, 10):
        outbox.put("f", descriptor, start, memoryview(content)[start : start + 10])
    assert not writes
    outbox.put("f", descriptor, 1000, memoryview(content)[1000 : 1001 + SMALL])
    assert writes == [(0, 1000), (1000, SMALL + 1)]
    outbox.put("f", descriptor, 5000 + SMALL, memoryview(content)[5000 + SMALL : 5010 + SMALL])
    outbox.put("f", descriptor, 4000 + SMALL, memoryview(content)[4000 + SMALL : 4010 + SMALL])
    outbox.flush()
    assert writes[2:] == [(5000 + SMALL, 10), (4000 + SMALL, 10)]
    outbox.flush()
    assert len(writes) == 4


def test_any_order_of_pieces_gives_the_same_bytes(tmp_path: Path, writes: Writes) -> None:
    chance = random.Random(4)
    content = [chance.randbytes(5 * HELD) for _ in range(2)]
    borders = [sorted({0, len(c), *(chance.randrange(len(c)) for _ in range(300))}) for c in content]
    pieces = [(k, a, b) for k in (0, 1) for a, b in zip(borders[k], borders[k][1:], strict=False)]
    for order in (pieces, chance.sample(pieces, len(pieces))):
        opened = [os.open(tmp_path / str(k), os.O_RDWR | os.O_CREAT | os.O_TRUNC) for k in (0, 1)]
        outbox, scratch = Outbox(), bytearray(5 * HELD)
        for k, a, b in order:
            scratch[: b - a] = content[k][a:b]  # what is put may be overwritten afterwards
            outbox.put(str(k), opened[k], a, memoryview(scratch)[: b - a])
        outbox.flush()
        assert [os.pread(d, 6 * HELD, 0) for d in opened] == content
        for d in opened:
            os.close(d)
        if order is pieces:
            assert len(writes) < len(pieces) / 2
        writes.clear()


def test_a_full_disk_is_told_of_the_file_and_byte_that_were_held(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    outbox = Outbox()
    outbox.put("first", descriptor, 64, memoryview(b"abcd"))
    monkeypatch.setattr(disk, "pwrite", full)
    with pytest.raises(CkptToolError) as raised:
        outbox.put("second", descriptor, 0, memoryview(bytes(SMALL + 1)))
    (problem,) = raised.value.problems
    assert (problem.kind, problem.file) == ("disk-full", "first") and "at byte 64" in problem.message


def test_a_model_of_small_tensors_takes_few_writes(
    originals: Callable[[str], Path], conversions: Callable[[str], Path], tmp_path: Path, writes: Writes
) -> None:
    done = convert(
        originals("mobilebert-uncased"), tmp_path / "out", family="mobilebert", jobs=1, check=False
    )
    (output,) = done.plan.outputs
    small = sum(t.nbytes <= SMALL for t in output.tensors)
    assert small > 80 and len(writes) < small / 4
    made = (tmp_path / "out" / output.name).read_bytes()
    assert made == (conversions("mobilebert-uncased") / output.name).read_bytes()
    with open_checkpoint(tmp_path / "out") as there:
        assert {(t.file, t.name): zlib.crc32(there.read(t).tobytes()) for t in there} == done.outcome.targets


# --- moved together -------------------------------------------------------------------------------------


def test_tensors_that_are_moved_together_give_the_bytes_the_manifest_and_the_journal_of_one_by_one(
    originals: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journals: dict[str, list[bytes]] = {}

    def noted(self: Staging, entry: Entry) -> None:
        journals.setdefault(self.place.name, []).append(line(entry.to_json()))

    monkeypatch.setattr(Staging, "record", noted)
    calls: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, b, at: calls.append(d) or preadv(d, b, at))
    counts, made = [], []
    options = Options(max_shard_bytes=200_000)
    for largest in (small.LARGEST, 0):
        monkeypatch.setattr(small, "LARGEST", largest)
        calls.clear()
        for family, variant in (("mobilebert", "mobilebert-uncased"), ("mistral", "mistral-7b-v0.1")):
            out = tmp_path / str(largest) / family
            out.parent.mkdir(exist_ok=True)
            convert(originals(variant), out, family=family, options=options, jobs=1, check=False)
        counts.append(len(calls))
        files = {p.relative_to(out.parent): p.read_bytes() for p in sorted(out.parent.rglob("*.*"))}
        made.append((files, journals.copy()))
        journals.clear()
    together, apart = made
    assert together == apart and len(apart[0]) > 6 and sum(map(len, apart[1].values())) > 2
    assert counts[0] < counts[1] / 3


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I32", "BOOL"])
def test_odd_tensors_among_neighbours_are_those_that_a_look_at_each_finds(dtype: str) -> None:
    bits = np.dtype(DTYPES[dtype].bits)
    chance = np.random.default_rng(1)
    telling = [0, 1, 1 << (8 * bits.itemsize - 1), (1 << (8 * bits.itemsize - 1)) - 1, -1, 3]
    known = values._FORMATS.get(dtype)
    telling += (
        [] if known is None else [known.normal, known.normal - 1, known.non_finite, known.non_finite - 1]
    )
    one = [np.array([x & ((1 << 8 * bits.itemsize) - 1)] * 2, dtype=bits) for x in telling]
    tensors = [*one, *(chance.choice(np.concatenate(one), chance.integers(1, 5)) for _ in range(200))]
    begins = np.cumsum([0, *map(len, tensors)])[:-1].tolist()
    expected = []
    for k, tensor in enumerate(tensors):
        looked = values.Values(dtype)
        looked.look(tensor)
        if looked.non_finite or looked.all_zero or looked.denormal_only:
            expected.append(k)
    assert values.odd_ones(dtype, np.concatenate(tensors), begins) == expected
    assert (known is None) == (not expected)


def test_neighbours_are_read_with_one_call_and_what_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(2).randbytes(100_000)
    (tmp_path / "file").write_bytes(content)
    chance = random.Random(3)
    begins = [
        0,
        10,
        10,
        5,
        90_000,
        20_000,
        20_100,
        24_300,
        99_999,
        *(chance.randrange(99_000) for _ in range(900)),
    ]
    wanted = [(at, memoryview(bytearray(min(chance.randrange(60), 100_000 - at))), "x") for at in begins]
    calls: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, b, at: calls.append(at) or preadv(d, b, at))
    with closing(ByteRange(tmp_path / "file", "file", (7, 99_993))) as source:
        source.read_each([(at - 7, buffer, name) for at, buffer, name in wanted if at >= 7])
        assert len(calls) < 400  # those that overlap are read by themselves
        for at, buffer, _ in wanted:
            assert at < 7 or buffer == content[at : at + len(buffer)]
        os.truncate(tmp_path / "file", 50_000)
        with pytest.raises(CkptToolError, match="input-changed.*file.*there"):
            source.read_each(
                [(49_980, memoryview(bytearray(9)), "here"), (49_990, memoryview(bytearray(9)), "there")]
            )


# --- blocks ---------------------------------------------------------------------------------------------


def part(name: str, dims: str, *ranges: tuple[str, int, int]) -> Part:
    return Part("f", name, "F32", parse_dims(dims), ranges)


STEPS = {
    "rename": Step((("a", 6), ("b", 8)), (part("x", "a b"),), (part("y", "a b"),)),
    "transpose": Step((("a", 60), ("b", 40)), (part("x", "a b"),), (part("y", "b a"),)),
    "rotary": Step((("n", 4), ("h", 3), ("t", 2)), (part("x", "(n h t)"),), (part("y", "(n t h)"),)),
    "fused": Step(
        (("s", 3), ("a", 7), ("b", 5)),
        tuple(part(name, "(s a) b", ("s", k, k + 1)) for k, name in enumerate("qkv")),
        (part("qkv", "b (s a)"),),
    ),
    "mean": with_mean(Step((("n", 8), ("h", 3)), (part("x", "n h"),), (part("y", "n h"),)), "n", 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", STEPS)
def test_the_blocks_of_a_layer_are_those_of_another(kind: str) -> None:
    step = STEPS[kind]
    sizes = (100, 1000, 8192)  # elements
    made = list(step.blocks(400, 4000))
    assert made and made == list(step._all_blocks(*sizes))
    other = step.with_targets(tuple(p.at_home("g") for p in step.targets))
    assert all(a is b for a, b in zip(made, other.blocks(400, 4000), strict=True))
    assert list(step.blocks(80, 160)) != made or kind in ("rename", "rotary", "mean")


def test_blocks_of_a_large_step_are_not_kept() -> None:
    rows = SMALL_STEP // 4 // 64
    step = Step((("a", rows + 1), ("b", 64)), (part("x", "a b"),), (part("y", "b a"),))
    assert next(step.blocks()) is not next(step.blocks())


@pytest.mark.parametrize(
    "shape", [(33, 50), (2, 33, 50), (1, 70, 1, 40), (3, 300, 260), (5,), (1, 1), (4, 0)]
)
def test_strips_move_what_plain_assignment_moves(shape: tuple[int, ...]) -> None:
    source = np.random.default_rng(0).integers(0, 1 << 31, shape, dtype=np.uint32)
    for turned in (source.T, np.moveaxis(source, -1, 0), np.swapaxes(source, 0, -1), source):
        target = np.zeros(turned.shape, np.uint32)
        assign(target, turned)
        assert np.array_equal(target, turned)


# --- checksums ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3, 4, 512, 70_000, 262_144, 600_001])
def test_both_ways_to_a_castagnoli_checksum_agree(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(size).randbytes(size)
    folded = castagnoli._folded(memoryview(data), 7)
    asked: list[int] = []

    def extend(crc: int, chunk: bytes) -> int:
        asked.append(len(chunk))
        return castagnoli._folded(memoryview(chunk), crc)

    monkeypatch.setattr(castagnoli, "_library", lambda: extend)
    assert crc32c(data, 7) == crc32c(memoryview(bytearray(data)), 7) == folded
    assert sum(asked) == 2 * size and max(asked, default=0) <= castagnoli.PIECE


@pytest.mark.parametrize(("implementation", "used"), [("c", True), ("python", False), (None, False)])
def test_google_crc32c_is_used_where_it_is_compiled(
    implementation: str | None, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("google_crc32c")
    module.__dict__.update(implementation=implementation, extend=lambda crc, chunk: 0)
    monkeypatch.setitem(sys.modules, "google_crc32c", module if implementation else None)
    assert (castagnoli._library.__wrapped__() is not None) == used


def test_the_installed_google_crc32c_agrees() -> None:
    library = pytest.importorskip("google_crc32c")
    data = random.Random(3).randbytes(100_001)
    assert library.extend(9, data) == castagnoli._folded(memoryview(data), 9)
    assert library.value(b"123456789") == 0xE3069283


def test_zlib_serves_where_zlib_ng_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zlib_ng.zlib_ng", None)
    assert zlibs._module() is zlib


def test_the_checksum_and_inflate_in_use_are_those_of_zlib() -> None:
    data = random.Random(5).randbytes(50_000) + bytes(50_000)
    for start in (0, 1, 49_999):
        assert zlibs.crc32(memoryview(data)[start:], 77) == zlib.crc32(data[start:], 77)
    packed = zlib.compress(data)
    stream = zlibs.decompressobj(zlib.MAX_WBITS)
    assert stream.decompress(packed, 60_000) + stream.decompress(stream.unconsumed_tail) == data
    assert stream.eof and stream.unused_data == b""
    with pytest.raises(zlibs.InflateError):
        zlibs.decompressobj(zlib.MAX_WBITS).decompress(b"\x78\x9cnothing of the kind")


# --- two kinds of work ----------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_worker_begins_with_another_kind_of_work_and_all_is_done_once(jobs: int) -> None:
    together, done = threading.Barrier(jobs), dict[int, list[str]]()

    def work(item: str, lane: Lane) -> None:
        if not done.setdefault(id(lane), []):
            together.wait(10)  # until every worker has its first item
        done[id(lane)].append(item)

    lanes = [Lane() for _ in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        run = SimpleNamespace(stopping=threading.Event(), pool=pool, lanes=lanes, _say=lambda *_: None)
        Run._each(run, [iter("abcd"), iter("ABCD")], work, "copy", "")  # type: ignore[arg-type]
    assert sorted(sum(done.values(), [])) == sorted("abcdABCD")
    assert {items[0] for items in done.values()} == set("aA"[:jobs])
    assert jobs > 1 or done[id(lanes[0])] == list("abcdABCD")


def bound(name: str, rows: int, to: str) -> Bound:
    """A step that moves a matrix of `rows` x 8 numbers of 16 bits, its axes in the order `to`."""
    sizes, dims = (("n", rows), ("d", 8)), {"n d": (rows, 8), "d n": (8, rows)}
    source, target = Part("a", name, "F16", parse_dims("n d")), Part("b", name, "F16", parse_dims(to))
    ends = TensorInfo(name, "F16", (rows, 8), "a"), TensorInfo(name, "F16", dims[to], "b")
    return Bound(Step(sizes, (source,), (target,)), [Source(ends[0], None)], [Target(ends[1], -1, 0)])


@pytest.mark.parametrize(
    ("order", "lead", "begun"),
    [
        ("n d", 1, ["copy"]),  # of one worker, and as many of every other
        ("n d", 1024, ["copy", "copy"]),
        ("n d", 1 << 20, ["copy", "copy", "copy", "second"]),  # all copies up to what is none
        ("d n", 1 << 20, []),
    ],
)
def test_all_workers_begin_with_copies_until_the_disk_has_enough(
    order: str, lead: int, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pieces of the first matrix, a small copy, one that exchanges axes, another copy."""
    monkeypatch.setattr(turns, "LEAD", lead)
    monkeypatch.setattr(carry, "BATCH", 1)
    monkeypatch.setattr(carry.pieces, "__kwdefaults__", {"copy_bytes": 512})
    monkeypatch.setattr(carry.batches, "__kwdefaults__", {"copy_bytes": 512})
    steps = [bound("copy", 96, order), bound("second", 16, "n d"), bound("turned", 24, "d n")]
    steps.append(bound("last", 16, "n d"))
    few = iter([small.Together(targets=["few"])])
    one, other = turns.turns(few, steps, 2)
    names = [
        work.targets[0] if isinstance(work, small.Together) else work[0][0].targets[0].info.name
        for work in one
    ]
    assert names == [*begun, "few"]
    rest = [work[0][0].targets[0].info.name for work in other]  # type: ignore[index]
    assert begun + rest == [*["copy"] * (3 if order == "n d" else 1), "second", "turned", "last"]
