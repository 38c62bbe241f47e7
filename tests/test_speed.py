"""What makes a conversion quick and a result does not show: how large matrices are turned, how a step is
cut, what the disk is asked for, what is loaded. None of it may change a byte."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ckpt_tool import program
from ckpt_tool.checkpoint import crc32c as castagnoli
from ckpt_tool.convert import disk
from ckpt_tool.convert.carry import pieces
from ckpt_tool.convert.layout import Part, Step, parse_dims
from ckpt_tool.convert.manifest import as_document
from ckpt_tool.convert.outbox import WINDOW, Outbox
from ckpt_tool.convert.strips import LARGE, TILE, assign
from ckpt_tool.fixtures.variants import VARIANTS

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
    assert not {f"ckpt_tool.checkpoint.{name}" for name in readers} & set(loaded)


def test_what_lives_until_the_end_is_seldom_searched_for_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(gc, "set_threshold", lambda *numbers: asked.append(numbers))
    for command in ("families", "convert", "inspect"):
        assert program.run([command, "--help"]) == 0
    assert asked == [program.SELDOM] * 3
    assert program.run(["verify", "--help"]) == 0  # which computes: what is in cycles may be large
    assert len(asked) == 3
