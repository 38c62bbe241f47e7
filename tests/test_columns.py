"""What is done to half a million tensors at once says what is done to each of them one by one."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tool.checkpoint.base import Checkpoint, Renamed, TensorInfo, tensor_infos
from ckpt_tool.checkpoint.safetensors import _plain_header, _strict_header, open_safetensors
from ckpt_tool.checkpoint.tensor_names import Folded, faultless, name_fault
from ckpt_tool.convert.expanding import Expansion, expand
from ckpt_tool.convert.layout import Home, Part, Step, rule
from ckpt_tool.convert.source import MAX_LAYERS, Single, Source, layer_count
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import CkptToolError

# --- headers --------------------------------------------------------------------------------------------

ENTRIES = {
    "__metadata__": {"format": "pt"},
    "a.0.b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "a.1.b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    "c d": {"dtype": "U8", "shape": [0, 7], "data_offsets": [16, 16]},
    "e": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [16, 28]},
}
SIZE = 28  # bytes of their data
PIECES = [b"", b"{", b"}", b",", b'"', b"0", b"1", b"00", b"-", b" ", b"\\", b'"e":', b"{}", b"\xff", b"1e3"]
PIECES += [b'"__metadata__":{"x":1},', b'"dtype":"BF16",', b'"F8_X"', b"99999999999999999999", "é".encode()]


def header() -> bytes:
    return json.dumps(ENTRIES, separators=(",", ":")).encode() + b"   "


def strictly(data: bytes) -> object:
    try:
        return _strict_header([data], 1 << 20, "f")
    except CkptToolError as error:
        return error


def test_a_header_as_writers_have_it_is_read_the_quick_way() -> None:
    assert _plain_header(header(), 1 << 20, SIZE - 1, "f") is None  # whose data end elsewhere
    plain = _plain_header(header(), 1 << 20, SIZE, "f")
    assert plain is not None and plain == strictly(header())
    assert list(plain[0]) == [n for n in ENTRIES if n != "__metadata__"] and plain[2] == {"format": "pt"}
    assert plain[0]["c d"] == TensorInfo("c d", "U8", (0, 7), "f")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_header_is_never_read_otherwise_than_strictly(data: st.DataObject) -> None:
    whole = header()
    for _ in range(data.draw(st.integers(1, 2))):
        start = data.draw(st.integers(0, len(whole)))
        stop = min(len(whole), start + data.draw(st.integers(0, 3)))
        whole = whole[:start] + data.draw(st.sampled_from(PIECES)) + whole[stop:]
    plain = _plain_header(whole, 1 << 20, SIZE, "f") if whole.startswith(b"{") else None
    assert plain is None or plain == strictly(whole)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'},"e":', b'}{"e":'),
        (b'"e":', b'"a.0.b":'),
        (b'"e":', b'"__metadata__":'),
        (b"[16,28]", b"[16,29]"),
        (b"[16,28]", b"[016,028]"),
        (b'"shape":[2,3],"data_offsets":[16', b'"shape":[-2,-3],"data_offsets":[16'),
        (b"   ", b" x"),
        (b'"pt"', b"1"),
    ],
)
def test_what_is_wrong_with_a_header_is_told(old: bytes, new: bytes, tmp_path: Path) -> None:
    text = header().replace(old, new)
    assert text != header()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(28))
    with pytest.raises(CkptToolError) as caught:
        open_safetensors(tmp_path / "f", "f")
    assert caught.value.kind == "bad-safetensors"


# --- names ----------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["a.b", "", "x" * 513, "é", "a\nb", "__metadata__", "c d", "\u202e"])))
def test_names_that_are_looked_at_together(names: list[str]) -> None:
    assert not faultless(names) or not any(map(name_fault, names))
    assert faultless([n for n in names if n in ("a.b", "c d")])


def test_layers_are_counted_from_all_names() -> None:
    names = [f"layers.{i}.x" for i in range(5000)] + [
        "layers.x",
        "my.layers.7000.x",
        f"layers.{MAX_LAYERS}.x",
    ]
    random.Random(0).shuffle(names)
    assert layer_count(names, r"layers\.(\d+)\.") == 5000
    assert layer_count(["x.layers.3.y"], r"(?:x\.)?layers\.(\d+)\.") == 4
    assert layer_count(["other"], r"layers\.(\d+)\.") == 0


def test_names_of_another_kind_are_not_folded_in() -> None:
    made = Folded("layers.0.experts.1.w")
    assert made.take([f"layers.{i}.experts.{e}.w" for i in range(3) for e in range(4)])
    assert not made.take(["layers.9.experts.9.w", "layers.9.norm"])
    assert str(made) == "layers.{0..2}.experts.{0..3}.w"


# --- steps ----------------------------------------------------------------------------------------------

ONE = Step((("d", 4),), (Part("f", "", "BF16", (("d",),)),), (Part("", "", "BF16", (("d",),)),))
TWO = replace(ONE, sources=(*ONE.sources, Part("g", "", "BF16", (("d",),))))


@given(st.lists(st.tuples(st.sampled_from([ONE, TWO]), st.integers(1, 4))))
def test_neighbours_of_one_template_come_in_columns(runs: list[tuple[Step, int]]) -> None:
    one_by_one, together = Steps(), Steps()
    for k, (template, count) in enumerate(runs):
        width = len(template.sources) + 1
        columns = [[f"{k}.{j}.{n}" for n in range(count)] for j in range(width)]
        together.add_alike(together.kind(template), *columns)
        for names in zip(*columns, strict=True):
            one_by_one.add(one_by_one.kind(template), names)
    assert together == one_by_one and together.starts == one_by_one.starts
    pairs = [(kind, list(n)) for kind, cs in together.runs() for n in zip(*cs, strict=True)]
    assert pairs == list(one_by_one.packed())
    assert Steps(together) == one_by_one and together.inverse().inverse() == one_by_one


def filled(held: dict[str, TensorInfo], together: bool) -> Expansion:
    source = Source(Checkpoint(Path("x"), {}), Single(held), 1, 2)

    def many(names: Sequence[str]) -> tuple[list[tuple[str, str]], Sequence[str]]:
        return [("", "BF16")] * len(names), names

    def target(_: str) -> Home:
        return "", "BF16"

    table = (rule("l.{i}.e.{e}.w", "m.{i}.x.{e}.w", "a b"), rule("l.{i}.n", "m.{i}.n", "a"))
    return expand(
        table,
        axes={"a": 2, "b": 3},
        indices={"i": 2, "e": 5},
        original=source.homes,
        converted=target,
        originals=source.column if together else None,
        converteds=many if together else None,
    )


@pytest.mark.parametrize("odd", ["", "another file", "another dtype", "another name", "missing"])
def test_a_row_is_filled_in_at_once_as_it_is_one_by_one(odd: str) -> None:
    names = [f"l.{i}.e.{e}.w" for i in range(2) for e in range(5)] + ["l.0.n", "l.1.n"]
    held = {n: TensorInfo(n, "BF16", (2, 3) if ".e." in n else (2,), "f") for n in names}
    change = {"another file": {"file": "g"}, "another dtype": {"dtype": "F32"}, "another name": {"name": "z"}}
    if odd in change:
        held["l.1.e.3.w"] = replace(held["l.1.e.3.w"], **change[odd])
    elif odd:
        del held["l.1.e.3.w"]
    one, other = filled(held, True), filled(held, False)
    assert one.steps == other.steps and one.problems == other.problems
    assert len(one.steps) == len(held) and bool(one.problems) == (odd == "missing")


# --- tensors --------------------------------------------------------------------------------------------


def test_tensors_made_together_are_those_made_one_by_one() -> None:
    made = tensor_infos(["a", "b"], ["BF16", "F32"], [(1, 2), ()], ["f", "g"])
    assert made == (TensorInfo("a", "BF16", (1, 2), "f"), TensorInfo("b", "F32", (), "g"))
    assert {*made} == {TensorInfo("b", "F32", (), "g"), made[0]} and "a" in repr(made[0])


def test_names_are_listed_again_when_the_files_are_others(tmp_path: Path) -> None:
    text = header()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(28))
    file = open_safetensors(tmp_path / "f", "f")
    with Checkpoint(tmp_path, {"f": file}) as checkpoint:
        assert checkpoint.names() is checkpoint.names()
        assert "e" in checkpoint and checkpoint["e"].shape == (2, 3) and file.tensors["e"] in checkpoint
        checkpoint.files["f"] = Renamed(file, {"new": "e"})
        assert checkpoint.names() == ["new"] and "e" not in checkpoint
