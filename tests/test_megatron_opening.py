"""Finding the files of a Megatron checkpoint, whatever path is given; and what broken ones get to hear."""

from __future__ import annotations

import io
import json
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import cli
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.megatron import arguments, find_ranks, folder_name, placed
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.torch_zip_writer import Namespace, TorchZipLayout
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures import variants
from ckpt_tool.fixtures.megatron import Megatron
from ckpt_tool.inspect import inspect
from tests.conftest import Written

VARIANTS: dict[str, Any] = {k: v for k, v in variants.VARIANTS.items() if isinstance(v.original, Megatron)}
FILE = "model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"


def grid(checkpoint: Checkpoint) -> list[list[str]]:
    """The files as [tensor-parallel rank][pipeline stage]."""
    run = placed(checkpoint)
    return [run.rows()[0, t] for t in range(run.ranks)]


@pytest.fixture
def written(originals: Written) -> Callable[[str], Path]:
    """`written(id)`: the path of that variant. Copy it before changing it."""
    return originals


def opened(path: Path) -> Checkpoint:
    with open_checkpoint(path) as checkpoint:
        return checkpoint


def refused(path: Path) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        open_checkpoint(path)
    return caught.value


# --- finding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["gpt2-ngc-stored", "gpt2-ngc-deflated", "bert-ngc-uncased", "bert-ngc-cased"])
def test_an_ngc_zip_is_opened_as_it_is(id: str, written: Callable[[str], Path]) -> None:
    checkpoint = opened(written(id))
    assert list(checkpoint.files) == [f"release/mp_rank_00/{FILE}"]
    assert {*VARIANTS[id].original.vocabulary, TRACKER} == set(checkpoint.documents)


def test_unpacked_it_is_the_same(written: Callable[[str], Path], tmp_path: Path) -> None:
    archive = written("gpt2-ngc-deflated")
    with zipfile.ZipFile(archive) as z:
        z.extractall(tmp_path)
    inside, outside = opened(archive), opened(tmp_path)
    assert inside.files.keys() == outside.files.keys()
    assert inside.names() == outside.names()
    assert inside.documents.keys() == outside.documents.keys()


@pytest.mark.parametrize(
    "part", ["", "iter_0001000", "iter_0001000/mp_rank_01_000", f"iter_0001000/mp_rank_01_000/{FILE}"]
)
def test_every_part_of_a_folder_leads_to_all_ranks(part: str, written: Callable[[str], Path]) -> None:
    checkpoint = opened(written("bert-v3-tp2-pp2") / part)
    rows = grid(checkpoint)
    assert [[name.split("/")[-2] for name in row] for row in rows] == [
        ["mp_rank_00_000", "mp_rank_00_001"],
        ["mp_rank_01_000", "mp_rank_01_001"],
    ]
    assert any(name.endswith("vocab.txt") for name in checkpoint.documents)
    assert any("is one of 4 ranks" in note for note in checkpoint.notes) == ("mp_rank" in part)


def test_a_bare_file_is_a_rank_alone(written: Callable[[str], Path], tmp_path: Path) -> None:
    source = written("gpt2-v1-bare")
    assert grid(opened(source)) == [[FILE]]
    shutil.copy(source, tmp_path / "gpt2.pt")
    checkpoint = opened(tmp_path / "gpt2.pt")
    assert grid(checkpoint) == [["gpt2.pt"]] and arguments(checkpoint.files["gpt2.pt"]) is None


def test_the_tracker_says_which_iteration(written: Callable[[str], Path], tmp_path: Path) -> None:
    root = tmp_path / "in"
    shutil.copytree(written("gpt2-v2-tp2"), root)
    shutil.copytree(root / "iter_0005000", root / "iter_0000100")
    checkpoint = opened(root)
    assert all(name.startswith("iter_0005000/") for name in checkpoint.files)
    assert any("iter_0000100/ left aside" in note for note in checkpoint.notes)
    (root / TRACKER).write_text("100\n")
    assert all(name.startswith("iter_0000100/") for name in opened(root).files)
    (root / TRACKER).write_text("7")
    assert refused(root).kind == "missing-shard"
    (root / TRACKER).write_text("newest")
    assert refused(root).kind == "bad-config"
    (root / TRACKER).unlink()
    assert refused(root).kind == "ambiguous-input"
    assert all(name.startswith("mp_rank_") for name in opened(root / "iter_0000100").files)


def test_a_loop_of_links_is_no_endless_way_down(written: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(written("gpt2-v2-tp2"), tmp_path / "in")
    (tmp_path / "in" / "iter_0005000" / "release").symlink_to(tmp_path / "in")
    assert len(opened(tmp_path / "in").files) == 2


@pytest.mark.parametrize(
    ("missing", "of"),
    [
        (["mp_rank_00_000"], "mp_rank_00_000"),
        (["mp_rank_00_001"], "mp_rank_00_001"),
        (["mp_rank_00_000", "mp_rank_01_000"], "mp_rank_00_000, mp_rank_01_000"),
    ],
)
def test_a_gap_in_the_ranks_is_named(missing: list[str], of: str) -> None:
    present = {folder_name(t, p, True) for t in range(2) for p in range(2)} - set(missing)
    with pytest.raises(CkptToolError) as caught:
        find_ranks([f"release/{f}/{FILE}" for f in present], label="m", tracker=lambda _: None)
    assert caught.value.kind == "missing-shard" and f"{of} not there" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ([TRACKER], "missing-shard"),
        (["release/mp_rank_00/optim.pt"], "missing-shard"),
        (["iter_0000010/.metadata", "iter_0000010/__0_0.distcp"], "missing-shard"),
        ([f"mp_rank_00_000/{FILE}", f"mp_rank_00/{FILE}"], "ambiguous-input"),
        ([f"a/mp_rank_00/{FILE}", f"b/mp_rank_00/{FILE}"], "ambiguous-input"),
        ([f"mp_rank_00_000_001/{FILE}"], "missing-shard"),
        ([f"mp_rank_9999_99999/{FILE}"], "missing-shard"),
    ],
)
def test_names_that_are_no_set_of_ranks(names: list[str], kind: str) -> None:
    with pytest.raises(CkptToolError) as caught:
        find_ranks(names, label="m", tracker=lambda _: None)
    assert caught.value.kind == kind


def test_other_names_are_nobodys_ranks() -> None:
    assert find_ranks(["release/notes.txt", "a/b"], label="m", tracker=lambda _: None) is None


# --- inspect --------------------------------------------------------------------------------------------


def test_inspect_shows_args_iteration_and_version(written: Callable[[str], Path]) -> None:
    from ckpt_tool.api import recognise

    found = inspect(written("bert-v3-tp2-pp2"), recognise=recognise)
    shown = found.files[0].metadata
    assert (shown["iteration"], shown["checkpoint_version"], shown["args.num_layers"]) == (
        "1000",
        "3.0",
        "12",
    )
    assert "args.data_path" not in shown  # a list, which no reading needs
    assert [n for n, own, _ in found.families if own] == ["megatron-bert"]
    assert "megatron.model.enums.ModelType" in found.files[0].imports


# --- nested torch files ---------------------------------------------------------------------------------


def test_nested_dicts_and_plain_values_are_written() -> None:
    import torch

    tensors = [("m.a.x.y", "F32", (2,)), ("m.b", "F32", (1,)), ("c.d", "F32", (1,))]
    told = {"n": -5, "big": 1 << 40, "eps": 1e-5, "no": None, "yes": True, "list": [1, (2, "x")], "s": "é"}
    layout = TorchZipLayout(tensors, dicts=("m", "m.a"), beside={"args": Namespace(told), "iteration": 300})
    data = bytearray(layout.size)
    for at, piece in layout.finish(
        {name: zlib.crc32(bytes(size)) for name, size in (("m.a.x.y", 8), ("m.b", 4), ("c.d", 4))}
    ):
        data[at : at + len(piece)] = piece
    loaded = torch.load(io.BytesIO(bytes(data)), weights_only=False)
    assert vars(loaded["args"]) == told and loaded["iteration"] == 300
    assert loaded["m"]["a"]["x.y"].tolist() == [0, 0] and loaded["m"]["b"].tolist() == [0]
    assert loaded["c.d"].shape == (1,)
    with pytest.raises(ValueError, match="stands there already"):
        TorchZipLayout([("a", "F32", (1,))], beside={"a": 1})
    with pytest.raises(TypeError, match="plain value"):
        TorchZipLayout([], beside={"a": object()})


# --- broken input, through the command line -------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["ckpt-tool", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return int(str(caught.value.code)), captured.out + captured.err


def slip(source: Path, to: Path) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(to / "slip.zip", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
        new.writestr("../../mp_rank_00/model_optim_rng.pt", b"x")
    return to / "slip.zip"


def encrypted(source: Path, to: Path) -> Path:
    """The flag of encryption in every header: our reader has no password to give."""
    data = bytearray(source.read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = data.find(signature)
        while start >= 0:
            data[start + at] |= 1
            start = data.find(signature, start + 4)
    (to / "locked.zip").write_bytes(data)
    return to / "locked.zip"


def without_weights(source: Path, to: Path) -> Path:
    with zipfile.ZipFile(to / "empty.zip", "w") as z:
        z.writestr(TRACKER, "release")
        z.writestr("release/mp_rank_00/optim.pt", b"x")
    return to / "empty.zip"


def cut(source: Path, to: Path) -> Path:
    with zipfile.ZipFile(source) as z:
        data = z.read(f"release/mp_rank_00/{FILE}")
    (to / "cut.pt").write_bytes(data[:-100])
    return to / "cut.pt"


def short_storage(source: Path, to: Path) -> Path:
    """The count before the first storage says less than the tensors that use it."""
    with zipfile.ZipFile(source) as z:
        data = bytearray(z.read(f"release/mp_rank_00/{FILE}"))
    words = (384 * 48).to_bytes(8, "little")
    at = data.rfind(words)
    data[at : at + 8] = (100).to_bytes(8, "little")
    (to / "short.pt").write_bytes(data)
    return to / "short.pt"


def rank_missing(source: Path, to: Path) -> Path:
    shutil.copytree(source, to / "ranks")
    shutil.rmtree(to / "ranks" / "iter_0005000" / "mp_rank_01")
    return to / "ranks"


def mixed_iterations(source: Path, to: Path) -> Path:
    shutil.copytree(source, to / "mixed")
    at = to / "mixed" / "iter_0005000" / "mp_rank_01" / FILE
    data = at.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as z, zipfile.ZipFile(at, "w", zipfile.ZIP_STORED) as new:
        for info in z.infolist():
            content = z.read(info)
            if info.filename.endswith("data.pkl"):
                content = content.replace(b"M\x88\x13", b"M\x89\x13")  # 5000 to 5001
            new.writestr(info.filename, content)
    return to / "mixed"


BROKEN = {
    "zip slip": ("gpt2-ngc-deflated", slip, (), "bad-zip", "../../mp_rank_00"),
    "a password": ("gpt2-ngc-deflated", encrypted, (), "bad-zip", "encrypt"),
    "no weights in the zip": ("gpt2-ngc-deflated", without_weights, (), "missing-shard", FILE),
    "a legacy stream cut off": ("gpt2-ngc-stored", cut, (), "truncated", "cut.pt"),
    "a storage too short": ("gpt2-ngc-stored", short_storage, (), "size-mismatch", "storage"),
    "a rank missing": ("gpt2-v2-tp2", rank_missing, (), "missing-shard", "mp_rank_01 not there"),
    "two iterations": ("gpt2-v2-tp2", mixed_iterations, (), "shard-conflict", "iteration 5000"),
    "heads that do not divide": (
        "gpt2-ngc-stored",
        lambda source, to: source,
        ("--set", "num_attention_heads=5"),
        "config-mismatch",
        "divide by 5 heads",
    ),
    "no number of heads": (
        "gpt2-ngc-stored",
        lambda source, to: source,
        (),
        "missing-fact",
        "--set num_attention_heads=VALUE",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_refused_in_words(
    name: str,
    written: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    id, make, more, kind, words = BROKEN[name]
    (tmp_path / "bad").mkdir()
    source = make(written(id), tmp_path / "bad")
    out = tmp_path / "out"
    code, text = run(
        monkeypatch, capsys, "convert", "megatron-gpt2", "--in", str(source), "--out", str(out), *more
    )
    assert code == 2, text
    assert f"error[{kind}]" in text and words in text
    assert not out.exists() and [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_one_command_converts_a_zip_and_another_brings_it_back(
    written: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out, back = str(written("bert-ngc-cased")), str(tmp_path / "out"), tmp_path / "back"
    code, text = run(monkeypatch, capsys, "inspect", source)
    assert code == 0 and "is megatron-bert" in text
    code, text = run(monkeypatch, capsys, "convert", "auto", "--in", source, "--out", out)
    assert code == 0, text
    options = ("--tensor-parallel", "2", "--pipeline-parallel", "2", "--checkpoint-version", "1.0")
    code, text = run(
        monkeypatch,
        capsys,
        *(
            "convert",
            "megatron-bert",
            "--to",
            "original",
            "--in",
            out,
            "--out",
            str(back),
            *options,
            "--json",
        ),
    )
    assert code == 0, text
    assert json.loads(text)["direction"] == "to-original"
    assert [len(row) for row in grid(opened(back))] == [2, 2]
    code, _ = run(
        monkeypatch, capsys, "convert", "megatron-bert", "--in", str(back), "--out", str(tmp_path / "again")
    )
    assert code == 0
    first, second = (Path(p) / "model.safetensors" for p in (out, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
