"""Fuzzing itself: that it sees what it looks for, that every reader passes a short run, and the corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tool.errors import fail
from tests import fuzzing
from tests.fuzz_targets import TARGETS
from tests.fuzzing import Fault, Read, Target, bounded, fuzz, look, made, recipes

RIGHT = b"\x05abcde"
SLOW = ("plan-config", "plan-params", "plan-arguments", "certificate")  # 10 ms each


def toy(read: Callable[[Path], Read | None], outside: Callable[[Path], Read | None] | None = None) -> Target:
    return Target("toy", {"file": RIGHT}, ("file",), read, outside=outside)


def looked(target: Target, folder: Path) -> fuzzing.Seen:
    with bounded():
        return look(target, target.files, folder)


@pytest.mark.parametrize("name", TARGETS)
def test_every_reader_passes_a_short_run(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]()
    assert looked(target, tmp_path).read, "the right input"
    executions = 20 if name in SLOW else 60
    tally = fuzz(target, 1, executions=executions)
    assert not tally.faults, tally.faults[0][1]
    assert tally.executions == executions
    assert tally.places, "nothing was refused"


@pytest.mark.parametrize("name", recipes())
def test_the_corpus_passes(name: str, tmp_path: Path) -> None:
    target, held = TARGETS[name](), recipes()[name]
    with bounded():
        for recipe in held:
            files = made(target, recipe)
            assert files == made(target, recipe), "a recipe makes one input"
            look(target, files, tmp_path)
            for path in tmp_path.iterdir():
                path.unlink()


def test_the_corpus_has_every_reader() -> None:
    assert set(recipes()) == set(TARGETS)


def test_other_errors_than_ours_are_faults(tmp_path: Path) -> None:
    def read(folder: Path) -> Read | None:
        size, *rest = (folder / "file").read_bytes()
        return {"x": bytes(rest[k] for k in range(size))}  # as a reader that trusts a length would

    assert looked(toy(read), tmp_path).read
    faults = fuzz(toy(read), 0, executions=200).faults
    assert len(faults) == 5
    assert any("IndexError" in what for _, what in faults)


def test_memory_that_a_number_in_the_file_asks_for_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="MemoryError"):
        looked(toy(lambda folder: {"x": bytes(1 << 31)}), tmp_path)


def test_an_input_that_is_not_done_with_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "TIME", 0.05)

    def read(folder: Path) -> Read | None:
        while True:
            try:
                folder.stat()
            except Exception:  # an error of its own, as it believes
                continue

    with pytest.raises(Fault, match=r"not read within 0\.05 seconds"):
        looked(toy(read), tmp_path)


def test_files_that_are_left_and_words_that_are_missing_are_faults(tmp_path: Path) -> None:
    def leaves(folder: Path) -> Read | None:
        (folder / "more").write_bytes(b"")
        return None

    def silent(folder: Path) -> Read | None:
        fail("bad-config", "")

    with pytest.raises(Fault, match="left behind: more"):
        looked(toy(leaves), tmp_path)
    (tmp_path / "more").unlink()
    with pytest.raises(Fault, match="without a word"):
        looked(toy(silent), tmp_path)


def test_an_outside_reader_that_reads_otherwise_is_heard(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"'x' of 1: b'a', b'b'"):
        looked(toy(lambda folder: {"x": b"a"}, lambda folder: {"x": b"b"}), tmp_path)
    assert not looked(toy(lambda folder: {"x": b"a"}, lambda folder: None), tmp_path).both
