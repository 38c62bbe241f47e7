"""`inspect` says what is there, also where the checkpoint is refused, and never runs any of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.errors import CkptToolError, fail
from ckpt_tool.inspect import Inspection, TensorRow, fold, inspect

PARAMS = {"dim": 6, "n_layers": 12, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5, "vocab_size": -1}


def state(ranks: int = 1) -> dict[str, np.ndarray]:
    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float16)

    made = {
        "tok_embeddings.weight": zeros(10, 6 // ranks),
        "norm.weight": zeros(6),
        "output.weight": zeros(10 // ranks, 6),
    }
    for i in range(12):
        made[f"layers.{i}.attention_norm.weight"] = zeros(6)
        made[f"layers.{i}.attention.wq.weight"] = zeros(6 // ranks, 6)
        made[f"layers.{i}.attention.wk.weight"] = zeros(4 // ranks, 6)
        made[f"layers.{i}.feed_forward.w1.weight"] = zeros(8 // ranks, 6)
    return made


def shown(found: Inspection, *, everything: bool = False) -> str:
    console = Console(width=160, file=io.StringIO(), color_system=None)
    found.render(console, everything=everything)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    safetensors.numpy.save_file(state(), tmp_path / "consolidated.safetensors", metadata={"format": "pt"})
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    return tmp_path


def test_counts_and_sizes_are_those_of_the_tensors(folder: Path) -> None:
    found = inspect(folder)
    elements = sum(a.size for a in state().values())
    assert (found.parameters, found.nbytes) == (elements, 2 * elements)
    assert found.dtypes() == {"F16": (51, elements, 2 * elements)}
    assert [(f.name, f.format, f.tensors) for f in found.files] == [
        ("consolidated.safetensors", "safetensors", 51)
    ]
    assert found.files[0].metadata == {"format": "pt"}
    assert found.documents == {"params.json": (folder / "params.json").stat().st_size}


def test_layers_are_folded_unless_all_are_asked_for(folder: Path) -> None:
    found = inspect(folder)
    text = shown(found)
    assert "layers.{0..11}.attention.wq.weight" in text and "x12" in text
    assert "layers.3.attention.wq.weight" not in text
    assert "layers.3.attention.wq.weight" in shown(found, everything=True)


def test_the_config_stands_beside_what_the_tensors_say(folder: Path) -> None:
    compared = {c.field: (c.stated, c.found, c.agrees) for c in inspect(folder).config}
    assert compared == {
        "dim": (6, 6, True),
        "n_layers": (12, 12, True),
        "vocab_size": (None, 10, None),
        "hidden_dim": (None, 8, None),
        "n_heads x head_dim": (6, 6, True),
        "n_kv_heads x head_dim": (3, 4, False),
    }
    assert "NO" in shown(inspect(folder))


def test_ranks_count_together(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save(
            {n: torch.from_numpy(a) for n, a in state(2).items()}, tmp_path / f"consolidated.{rank:02d}.pth"
        )
    (tmp_path / "params.json").write_text(json.dumps({**PARAMS, "vocab_size": 10}))
    found = inspect(tmp_path)
    compared = {c.field: c.agrees for c in found.config}
    assert compared["vocab_size"] is True and compared["n_heads x head_dim"] is True
    assert "in 2 files" in shown(found)
    assert all("torch._utils._rebuild_tensor_v2" in f.imports for f in found.files)


def test_the_families_word_is_shown(folder: Path) -> None:
    def recognise(checkpoint: Checkpoint) -> list[tuple[str, bool, str]]:
        return [("mistral", True, f"{len(checkpoint.names())} tensors fit"), ("opt", False, "no decoder")]

    found = inspect(folder, recognise=recognise)
    assert "is mistral: 51 tensors fit" in shown(found) and "is not opt: no decoder" in shown(found)
    assert found.to_json()["families"] == [
        {"name": "mistral", "recognised": True, "why": "51 tensors fit"},
        {"name": "opt", "recognised": False, "why": "no decoder"},
    ]


def test_a_document_that_cannot_be_read_does_not_hide_the_tensors(folder: Path) -> None:
    (folder / "params.json").write_text('{"dim": NaN}')
    found = inspect(folder)
    assert [(p.kind, p.where) for p in found.refused] == [("bad-config", "dim")]
    assert found.parameters


def test_a_family_that_gives_up_does_not_hide_the_tensors(folder: Path) -> None:
    def recognise(checkpoint: Checkpoint) -> list[tuple[str, bool, str]]:
        fail("bad-config", "expected a number, found none", file="params.json", where="n_heads")

    assert [p.where for p in inspect(folder, recognise=recognise).refused] == ["n_heads"]


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def evil_zip(path: Path, marker: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({"a": Evil(marker)}, protocol=2))
        archive.writestr("m/version", "3\n")


def evil_legacy(path: Path, marker: Path) -> None:
    torch.save({"a": Evil(marker)}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [evil_zip, evil_legacy])
def test_the_imports_of_a_malicious_file_are_shown_and_not_run(tmp_path: Path, write: Any) -> None:
    marker = tmp_path / "marker"
    write(tmp_path / "consolidated.00.pth", marker)
    for path in (tmp_path, tmp_path / "consolidated.00.pth"):
        found = inspect(path)
        assert any(p.kind == "unsafe-pickle" for p in found.refused)
        (file,) = found.files
        assert "posix.system" in file.imports
        assert "posix.system" in shown(found) and "unsafe-pickle" in shown(found)
        assert "posix.system" in json.dumps(found.to_json())
    assert not marker.exists()


def test_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, Path("x" * 5000)):
        with pytest.raises(CkptToolError):
            inspect(path)


def test_control_characters_reach_no_output(tmp_path: Path) -> None:
    metadata = {"title\x1b[2J": "</script>\u202e\x07"}
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "model\x1b.safetensors", metadata=metadata)
    found = inspect(tmp_path / "model\x1b.safetensors")
    for text in (shown(found), json.dumps(found.to_json(), ensure_ascii=False)):
        assert not {"\x1b", "\u202e", "\x07"} & set(text)
    assert json.loads(json.dumps(found.to_json()))["files"][0]["metadata"]


def test_it_works_without_params_and_from_an_archive(folder: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "download"), "zip", folder)
    assert inspect(archive).parameters == inspect(folder).parameters
    (folder / "params.json").unlink()
    assert inspect(folder).config == []


# Folding


def info(name: str, shape: tuple[int, ...] = (2,), file: str = "f") -> TensorInfo:
    return TensorInfo(name, "F32", shape, file)


def test_what_differs_is_not_folded() -> None:
    rows = fold([*(info(f"l.{i}.w", (3,) if i == 2 else (2,)) for i in range(5)), info("w")])
    assert [(r.name, r.shape, r.count) for r in rows] == [
        ("l.{0,1,3,4}.w", (2,), 4),
        ("l.2.w", (3,), 1),
        ("w", (2,), 1),
    ]


def test_ranges_are_products_of_indices() -> None:
    names = [f"l.{i}.e.{e}.w" for i in range(11) for e in range(8) if (i, e) != (10, 7)]
    assert [(r.name, r.count) for r in fold(map(info, names))] == [
        ("l.{0..9}.e.{0..7}.w", 80),
        ("l.10.e.{0..6}.w", 7),
    ]


def test_numbers_inside_a_word_are_part_of_it() -> None:
    assert [r.name for r in fold([info("w1.weight"), info("w2.weight"), info("0.w"), info("1.w")])] == [
        "w1.weight",
        "w2.weight",
        "{0,1}.w",
    ]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.integers(0, 3), st.sampled_from(["a", "b"]), st.sampled_from(["x", "y"])
        ),
        unique=True,
    )
)
def test_folding_neither_loses_nor_invents(tensors: list[tuple[int, int, str, str]]) -> None:
    rows = fold(info(f"l.{i}.e.{e}.{name}", file=file) for i, e, name, file in tensors)
    assert all(isinstance(r, TensorRow) for r in rows)
    assert sum(r.count * r.files for r in rows) == len(tensors)
    assert len({(r.name, r.files) for r in rows}) == len(rows)
