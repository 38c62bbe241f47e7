"""What makes a conversion quick and a result does not show: how large matrices are turned, how a step is
cut, what the disk is asked for, what is loaded. None of it may change a byte."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tarfile
import threading
import weakref
import zipfile
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import pytest

from ckpt_tool import program
from ckpt_tool.checkpoint import crc32c as castagnoli
from ckpt_tool.checkpoint import zip_reader
from ckpt_tool.checkpoint.ahead import AHEAD, ahead
from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.spool import Spool
from ckpt_tool.checkpoint.tar import read_tar_gz
from ckpt_tool.checkpoint.zip_reader import ZipArchive
from ckpt_tool.checkpoint.zlibs import crc32
from ckpt_tool.convert import carry, disk
from ckpt_tool.convert.carry import Bound, Carrier, Lane, Source, Target, pieces
from ckpt_tool.convert.layout import Part, Step, apply, parse_dims
from ckpt_tool.convert.manifest import as_document
from ckpt_tool.convert.outbox import WINDOW, Outbox
from ckpt_tool.convert.strips import LARGE, TILE, assign, side_by_side, slabs
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.loading import ONE_THREAD, loading

# --- turning in memory ----------------------------------------------------------------------------------

SHAPES = ((1024, 700), (3, TILE + 1, 2 * TILE - 1), (300, 3, 1024), (1, 513, 1, 1025), (8, 16, 300, 40))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", ["u1", "<u2", "<u4", "<u8"])
def test_large_matrices_are_turned_as_numpy_turns_them(shape: tuple[int, ...], bits: str) -> None:
    drawn = np.random.default_rng(3).integers(0, 256, (*shape, np.dtype(bits).itemsize), np.uint8)
    source = drawn.view(bits).reshape(shape)
    assert source.nbytes * 8 > LARGE * np.dtype(bits).itemsize
    for order in itertools.permutations(range(len(shape))):
        turned = source.transpose(order)
        around = np.zeros([n + 2 for n in turned.shape], bits)
        target = around[tuple(slice(1, -1) for _ in shape)]
        assign(target, turned)
        assert np.array_equal(target, turned)
        target[...] = 0
        assert not around.any()  # nothing was written beside it


# --- cutting --------------------------------------------------------------------------------------------


def step_of(pattern: str, sizes: dict[str, int]) -> Step:
    left, right = map(parse_dims, pattern.split("->"))
    axes = tuple((a, sizes[a]) for group in left for a in group)
    return Step(axes, (Part("a", "x", "F32", left),), (Part("b", "y", "F32", right),))


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("(k i) o -> o i k", {"k": 4, "i": 1536, "o": 768}),  # the convolution at the end of a CANINE
        ("o i k -> (k i) o", {"k": 4, "i": 1536, "o": 768}),
        ("v d -> d v", {"v": 30522, "d": 384}),
        ("d v -> v d", {"v": 30522, "d": 384}),
        ("i o -> o i", {"i": 12288, "o": 4096}),
    ],
)
def test_a_step_is_cut_where_runs_stay_long(pattern: str, sizes: dict[str, int]) -> None:
    step = step_of(pattern, sizes)
    total = np.prod(list(sizes.values()))
    blocks = list(pieces(step))
    for side in ("reads", "writes"):
        accesses = [a for b in blocks for a in getattr(b, side)]
        assert sum(a.numel for a in accesses) == total
        runs = sum(a.runs.count for a in accesses)
        assert total / runs > 256, f"{side}: {runs} runs"  # of a kilobyte and more


# --- asking the disk ------------------------------------------------------------------------------------


def test_the_disk_is_asked_once_for_what_was_written_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(disk, "start_writeback", lambda _, at, size: asked.append((at, size)))
    descriptor, data = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT), memoryview(bytes(200_000))
    outbox = Outbox()
    for at in (1_000_000, 3_000_000, 500_000):
        outbox.put("f", descriptor, at, data)
    assert not asked
    outbox.put("f", descriptor, 500_000 + WINDOW, data)  # too far away
    assert asked == [(500_000, 2_700_000)]
    outbox.flush()
    assert asked[1:] == [(500_000 + WINDOW, 200_000)]
    outbox.put("f", descriptor, 0, data[:1000])
    outbox.flush()
    assert len(asked) == 2  # not worth a call
    os.close(descriptor)


# --- what is put down -----------------------------------------------------------------------------------


def test_the_manifest_is_the_text_that_json_makes_of_it() -> None:
    content = {
        "a": [],
        "b": {},
        "c": [1, -2, 3.5, 1e300, float("inf"), True, False, None, 1 << 70],
        "d": {"ä\u2028\U0001f600": '\x00"\\é', "": [[], [{}], ({"x": (1, 2)},)]},
        "e": {2: "a", 2.5: "b", None: "c", True: "d"},
    }
    assert as_document(content) == (json.dumps(content, indent=1) + "\n").encode()


@pytest.mark.parametrize("other", [{}, {"sha256": "0" * 64}], ids=["alike", "one with more"])
def test_entries_of_tensors_are_the_text_that_json_makes_of_them(other: dict[str, str]) -> None:
    shapes = ([3, 2], [], [3, 2], [1 << 40])
    names = ("a", 'ä"\\\U0001f600', "b", "c")
    entries = [
        {"name": n, "file": "f\n", "dtype": "F32", "shape": s, "crc32": f"{k:08x}"}
        for k, (n, s) in enumerate(zip(names, shapes, strict=True))
    ]
    content = {"tensors": [*entries, entries[0] | other], "x": {"deeper": entries}}
    assert as_document(content) == (json.dumps(content, indent=1) + "\n").encode()


def test_a_library_that_takes_no_array_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        implementation = "c"

        @staticmethod
        def extend(crc: int, data: object) -> int:
            if type(data) is not bytes:
                raise TypeError("expected bytes")
            return 0

    monkeypatch.setitem(sys.modules, "google_crc32c", Library)  # type: ignore[arg-type]
    monkeypatch.setattr(castagnoli, "_library", castagnoli._library.__wrapped__)
    assert castagnoli.crc32c(b"123456789") == 0xE3069283


# --- what is loaded, and looked through -----------------------------------------------------------------


def test_only_the_reader_of_the_container_is_loaded(tmp_path: Path) -> None:
    source = VARIANTS["mobilebert-squad"].write(tmp_path / "in")
    code = (
        "import sys\nfrom ckpt_tool.program import run\n"
        f"code = run(['convert', 'mobilebert', '--in', {str(source)!r}, '--out', {str(tmp_path / 'out')!r},"
        " '--no-verify'])\nprint(code, *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    code_, *loaded = done.stdout.splitlines()[-1].split()
    assert code_ == "0" and "ckpt_tool.checkpoint.tf_bundle" in loaded
    readers = ("archive", "dcp", "hub", "tar", "torch_legacy", "torch_zip", "unpickle", "zip_reader")
    others = ("no_weights", "pickle_records", "torch_zip_writer", "wrapping")  # which only others need
    assert not {f"ckpt_tool.checkpoint.{name}" for name in (*readers, *others)} & set(loaded)
    assert "ckpt_tool.convert.tokenizers.sentencepiece" not in loaded


@pytest.mark.parametrize(
    ("command", "code", "threads"),
    [("families", 0, "1"), ("inspect missing", 2, "1"), ("verify missing", 2, "None"), ("--help", 0, "1")],
)
def test_a_command_is_not_taken_apart_and_ends_as_others_do(
    command: str, code: int, threads: str, tmp_path: Path
) -> None:
    text = (
        "import atexit, os, sys\nfrom ckpt_tool.program import main\n"
        "class Kept:\n    def __del__(self): print('taken apart')\nkept = Kept()\n"
        "said = lambda: sys.stdout.write(f\"the end, {os.environ.get('OPENBLAS_NUM_THREADS')}\")\n"
        "atexit.register(said)\nmain()"
    )
    own = {k: v for k, v in os.environ.items() if k != ONE_THREAD}
    asked = [sys.executable, "-c", text, *command.split()]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path, env=own, check=False)
    assert done.returncode == code and done.stdout.endswith(f"the end, {threads}"), done
    assert ("error[" in done.stderr) == bool(code)


@pytest.mark.parametrize(("said", "seen"), [(None, "1"), ("3", "3")])
def test_numpy_is_loaded_with_one_thread_and_the_environment_stays(said: str | None, seen: str) -> None:
    code = (
        "import os, sys\nfrom ckpt_tool.loading import load_numpy\n"
        "class Look:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'numpy': print(os.environ.get('OPENBLAS_NUM_THREADS'))\n"
        "sys.meta_path.insert(0, Look())\nload_numpy()\n"
        "print(os.environ.get('OPENBLAS_NUM_THREADS'), 'numpy' in sys.modules)"
    )
    own = {k: v for k, v in os.environ.items() if k != ONE_THREAD} | (
        {} if said is None else {ONE_THREAD: said}
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own, check=True)
    assert done.stdout.split() == [seen, str(said), "True"]


def test_nobody_looks_for_cycles_while_modules_are_loaded() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.own = self

    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), loading():
        assert not gc.isenabled()
        gone = weakref.ref(Cycle())
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() == frozen
    gc.collect()
    assert gone() is None  # what was garbage is found later
    gc.disable()
    try:
        with loading():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_lives_until_the_end_is_seldom_searched_for_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(gc, "set_threshold", lambda *numbers: asked.append(numbers))
    for command in ("families", "convert", "inspect"):
        assert program.run([command, "--help"]) == 0
    assert asked == [program.SELDOM] * 3
    assert program.run(["verify", "--help"]) == 0  # which computes: what is in cycles may be large
    assert len(asked) == 3


# --- blocks ---------------------------------------------------------------------------------------------

JOINED = (
    ("a b -> a b", {"a": 12, "b": 10}, "b", (0, 5, 10)),
    ("a b -> b a", {"a": 13, "b": 9}, "a", (0, 4, 8, 13)),
    ("(n two half) d -> (n half two) d", {"n": 6, "two": 2, "half": 3, "d": 5}, "n", (0, 2, 6)),
    ("a b c -> c a b", {"a": 7, "b": 4, "c": 6}, "c", (0, 3, 6)),
)


@pytest.mark.parametrize(("block", "tile", "copy"), [(8, 24, 10**6), (20, 60, 5), (3, 7, 10**6), (50, 50, 2)])
@pytest.mark.parametrize(("pattern", "sizes", "axis", "cuts"), JOINED)
def test_blocks_that_follow_from_the_first_move_what_the_whole_step_moves(
    pattern: str, sizes: dict[str, int], axis: str, cuts: tuple[int, ...], block: int, tile: int, copy: int
) -> None:
    left, right = (parse_dims(side) for side in pattern.split("->"))
    parts = [
        Part(f"{k}", "t", "I64", left, ((axis, *cut),)) for k, cut in enumerate(itertools.pairwise(cuts))
    ]
    there = Step(tuple(sizes.items()), tuple(parts), (Part("out", "t", "I64", right),))
    for step in (there, there.inverse()):
        shapes = [p.shape(step.sizes) for p in step.sources]
        flat = np.arange(sum(map(math.prod, shapes)))
        arrays = np.split(flat, np.cumsum([math.prod(s) for s in shapes])[:-1])
        arrays = [a.reshape(s) for a, s in zip(arrays, shapes, strict=True)]
        made = [np.full(math.prod(p.shape(step.sizes)), -1) for p in step.targets]
        for piece in step._all_blocks(block, tile, copy):
            inputs = [
                np.concatenate([arrays[a.part].ravel()[o : o + a.runs.length] for o in a.runs.offsets()])
                for a in piece.reads
            ]
            outputs = [np.empty(n, np.int64) for n in piece.filled]
            piece.shuffle(inputs, outputs)
            for access, values in zip(piece.writes, outputs, strict=True):
                for k, o in enumerate(access.runs.offsets()):
                    n = access.runs.length
                    assert (made[access.part][o : o + n] == -1).all()
                    made[access.part][o : o + n] = values[k * n : (k + 1) * n]
        for found, whole in zip(made, apply(step, arrays), strict=True):
            assert np.array_equal(found, whole.ravel())


@pytest.mark.parametrize(("shape", "most", "count"), [((6, 4, 5), 45, 3), ((6, 4, 5), 11, 12), ((7,), 3, 3)])
def test_slabs_are_the_whole_in_order(shape: tuple[int, ...], most: int, count: int) -> None:
    whole = np.arange(math.prod(shape)).reshape(shape)
    found = list(slabs(whole, most))
    assert [start for start, _ in found] == [int(piece.flat[0]) for _, piece in found]
    assert np.array_equal(np.concatenate([piece.ravel() for _, piece in found]), whole.ravel())
    assert len(found) == count


@pytest.mark.parametrize(
    ("pattern", "alone"),
    [("a b -> b a", True), ("a b c -> c a b", True), ("(a c) b -> (c a) b", True), ("a b -> a b", False)],
)
def test_an_exchange_in_slabs_writes_sums_and_sees_the_whole(
    pattern: str, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(pattern, {"a": 6, "b": 10, "c": 14})
    shapes = [p.shape(step.sizes) for side in (step.sources, step.targets) for p in side]
    given = np.arange(math.prod(shapes[0]), dtype="<f4").reshape(shapes[0])
    given.flat[-2] = np.inf
    (made,) = apply(step, [given])

    class Given(Checkpoint):
        def __init__(self) -> None:
            pass

        def read_into(self, tensor: TensorInfo, offset: int, buffer: memoryview) -> None:
            buffer[:] = given.tobytes()[offset : offset + len(buffer)]

    monkeypatch.setattr(carry, "BLOCK", 96)
    (block,) = step.blocks()
    assert (block.is_exchange and not block.is_copy) == alone
    with open(tmp_path / "out", "w+b", buffering=0) as file:
        infos = [TensorInfo("t", "F32", s, f) for f, s in zip("ab", shapes, strict=True)]
        source, target = Source(infos[0], carry.IntervalCrc()), Target(infos[1], file.fileno(), 24)
        lane = Lane()
        Carrier(Given()).carry_all([(Bound(step, [source], [target]), block)], lane)
        assert file.read() == bytes(24) + made.tobytes()
    assert source.crc is not None and source.crc.value(given.nbytes) == crc32(given.tobytes())
    assert target.crc.value(made.nbytes) == crc32(made.tobytes())
    assert (target.values.seen, target.values.non_finite) == (made.size, 1)
    assert target.values.first == np.flatnonzero(np.isinf(made.ravel()))[0]
    assert (lane.read_bytes, lane.written_bytes) == (given.nbytes, made.nbytes)


# --- ahead ----------------------------------------------------------------------------------------------


def test_pieces_made_ahead_come_in_order_with_the_failure_at_their_end() -> None:
    def make() -> Iterator[int]:
        yield from range(100)
        raise KeyError("the end")

    taken: list[int] = []
    with closing(ahead(make)) as pieces, pytest.raises(KeyError, match="the end"):
        taken.extend(pieces)
    assert taken == [*range(100)]


def test_whoever_leaves_early_leaves_no_thread_and_bounds_what_is_made() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for k in range(10_000):
            made.append(k)
            yield k

    with closing(ahead(make)) as pieces:
        assert next(pieces) == 0
    assert len(made) <= AHEAD + 4
    assert not [t for t in threading.enumerate() if t.name == "ckpt-tool-ahead"]


def test_pieces_come_without_threads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    assert list(ahead(lambda: iter("abc"))) == ["a", "b", "c"]


@pytest.mark.parametrize("damaged", [None, 100, 2_900_000])
def test_a_large_stored_member_is_checked_in_two_halves(tmp_path: Path, damaged: int | None) -> None:
    content = random.Random(0).randbytes(3_000_000)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("weights.pt", content)
    data = bytearray(path.read_bytes())
    if damaged is not None:
        data[data.index(content[:64]) + damaged] ^= 1
    path.write_bytes(data)
    archive = ZipArchive(ByteRange(path, "a.zip"))
    expected = nullcontext() if damaged is None else pytest.raises(CkptToolError, match="expected crc32")
    with closing(archive.source), expected:
        archive.check(archive.members["weights.pt"])


def test_a_signal_does_not_wait_for_the_other_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        made.writestr("weights.pt", bytes(3_000_000))
    archive = ZipArchive(ByteRange(tmp_path / "a.zip", "a.zip"))
    read, begun, left = archive.source.read_into, threading.Event(), threading.Event()
    count: list[int] = []

    def slow(offset: int, buffer: memoryview, where: str | None = None) -> None:
        if threading.current_thread() is threading.main_thread():
            begun.wait(60)
            raise KeyboardInterrupt
        count.append(offset)
        begun.set()
        left.wait(5)
        read(offset, buffer, where)

    monkeypatch.setattr(zip_reader, "Event", lambda: left)
    monkeypatch.setattr(archive.source, "read_into", slow)
    with closing(archive.source), pytest.raises(KeyboardInterrupt):
        archive.check(archive.members["weights.pt"])
    assert len(count) == 1  # of six


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_large_deflated_archive_is_inflated_ahead_to_the_same_bytes(tmp_path: Path, kind: str) -> None:
    content = random.Random(1).randbytes(3_000_000) + bytes(1_000_000)
    spool = Spool(tmp_path)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.writestr("w.pt", content)
        archive = ZipArchive(ByteRange(tmp_path / "a", "a"))
        archive.inflate(archive.members["w.pt"], spool)
        archive.source.close()
    else:
        (tmp_path / "w.pt").write_bytes(content)
        with tarfile.open(tmp_path / "a", "w:gz") as tar:
            tar.add(tmp_path / "w.pt", "w.pt")
        with closing(ByteRange(tmp_path / "a", "a")) as data:
            (member,), _ = read_tar_gz(data, lambda name: True, spool)
        assert (member.offset, member.size) == (0, len(content))
    assert b"".join(spool.pieces()) == content
    spool.close()


# --- start-up -------------------------------------------------------------------------------------------


def test_the_families_are_known_without_numpy() -> None:
    """Half of the time of `ckpt-tool families` was its import."""
    code = (
        "import sys\nfrom ckpt_tool.convert.families import FAMILIES, family\n"
        "assert len([family(n) for n in FAMILIES]) > 10\n"
        "print([m for m in ('numpy', 'rich', 'ckpt_tool.checkpoint.unpickle') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.parametrize(("stride", "rows"), [(4096, 8), (2048, 16), (3072, 32), (512, 64), (520, 64)])
def test_strips_are_as_wide_as_the_cache_holds_rows(stride: int, rows: int) -> None:
    assert side_by_side(stride) == rows
