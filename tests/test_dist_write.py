"""`--form torch_dist`: folders that torch and megatron-core load, and that come back as they were.

megatron-core 0.16.1 judges on the CPU; skipped where `make test` has not set it up.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ckpt_tool import api
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.dcp_metadata import Item
from ckpt_tool.checkpoint.dcp_writer import DistLayout, Stored, metadata_of
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.pieces import Piece
from ckpt_tool.convert.layer_axis import key_of
from tests import megatron_judge
from tests.conftest import Written
from tests.test_dcp import refused
from tests.test_judges import reference_logits

ROOT = Path(__file__).parents[1]
JUDGE = ROOT / ".judges" / "megatron"
CASES = ROOT.parent / "shared" / "cases"
LAYERS = ("stacked", "non_homogeneous", "singleton")
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SMALL = 40_000  # bytes of a data file: several of them

needs_judge = pytest.mark.skipif(
    not JUDGE.is_dir(), reason="megatron-core is not set up; `make test` does it"
)


def written(model: Path, out: Path, layers: str = "stacked", **more: Any) -> Path:
    asked = {"form": "torch_dist", "layers": layers, **more}
    options = api.Options(max_shard_bytes=SMALL, family_options=asked)
    api.convert(model, out, to="original", options=options)
    return out


def tensors(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {t.name: (t.dtype, t.shape, checkpoint.read(t).tobytes()) for t in checkpoint}


def numbers(folder: Path) -> dict[str, list[Any]]:
    """The tensors' values, and the entries beside them as they are counted."""
    with open_checkpoint(folder) as checkpoint:
        found: dict[str, list[Any]] = {
            t.name: torch.frombuffer(bytearray(checkpoint.read(t).tobytes()), dtype=TYPES[t.dtype]).tolist()
            for t in checkpoint
        }
        return {**found, "beside": [n for n in checkpoint.notes if "extra state" in n]}


# --- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", LAYERS)
def test_a_folder_comes_back_as_the_model_it_was_made_of(
    layers: str, conversions: Written, tmp_path: Path
) -> None:
    model = conversions("llama-mcore")
    out = written(model, tmp_path / "dist", layers)
    assert len(list((out / "release").glob("__0_*.distcp"))) > 3
    report = api.verify(out, model, levels=("coverage", "bits"))
    assert report.status == "pass"
    assert all(f.status == "pass" for f in report.findings if f.check in ("documents", "strangers"))
    api.convert(out, tmp_path / "again", family="llama")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes()
    kept = json.loads((tmp_path / "again" / "ckpt-tool.json").read_text())["original"]
    assert (kept["form"], kept["layers"]) == ("torch_dist", layers)  # and is written so again, unasked
    api.convert(
        tmp_path / "again", tmp_path / "third", to="original", options=api.Options(max_shard_bytes=SMALL)
    )
    for file in sorted((out / "release").iterdir()):
        assert file.read_bytes() == (tmp_path / "third" / "release" / file.name).read_bytes()


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases is not beside this checkout")
@pytest.mark.parametrize("case", ["gated-tp2pp2", "singleton"])
def test_folders_of_megatron_core_come_back_equal(case: str, tmp_path: Path) -> None:
    source = CASES / f"torch-dist-{case}" / "ckpt"
    length = api.Options(settings={"max_position_embeddings": 128})
    api.convert(source, tmp_path / "hf", family="llama", options=length)
    api.convert(tmp_path / "hf", tmp_path / "back", to="original")
    with open_checkpoint(source) as one, open_checkpoint(tmp_path / "back") as other:
        assert tensors(one) == tensors(other)
        states = [next(n for n in c.notes if "extra state" in n) for c in (one, other)]
        assert states[0] == states[1]


# --- torch --------------------------------------------------------------------------------------------------


def test_torch_reads_every_tensor(conversions: Written, tmp_path: Path) -> None:
    out = written(conversions("qwen3-mcore"), tmp_path / "dist")
    dcp_to_torch_save(out / "release", tmp_path / "whole.pt")
    found: Mapping[str, Any] = torch.load(tmp_path / "whole.pt", weights_only=True)
    with open_checkpoint(out) as checkpoint:
        ours = tensors(checkpoint)
    theirs = {k: x for k, x in found.items() if isinstance(x, torch.Tensor)}
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name][2] == x.contiguous().view(torch.uint8).numpy().tobytes(), name
    assert "decoder.layers.self_attention.q_layernorm.weight" in ours
    states = {k for k in found if "_extra_state" in k}
    assert len(states) == 4 * ours["decoder.layers.mlp.linear_fc2.weight"][1][0]
    assert all(found[k] == [None] for k in states)


def test_metadata_is_what_torch_makes_of_it() -> None:
    """Pickled by our own hand, read by Python's: texts and numbers of any length."""
    long = "x" * 300
    pieces = [
        Piece((0, 0), (1, 70_000), Item("__0_0.distcp", 0, 1 << 40)),
        Piece((1, 0), (2, 70_000), Item(long, 3, 5)),
    ]
    many = {f"t{k}": Stored("BF16", (3,), [Piece((0,), (3,), Item("f", k, 7))]) for k in range(300)}
    data = metadata_of(
        {long: Stored("F8_E4M3", (3, 70_000), pieces), **many}, {"s/shard_0_1": Item("o", 1, 2)}
    )
    found = pickle.loads(data)
    told = found.state_dict_metadata[long]
    assert told.properties.dtype is torch.float8_e4m3fn and told.size == torch.Size((3, 70_000))
    assert [(c.offsets, c.sizes) for c in told.chunks] == [(p.start, p.size) for p in pieces]
    places = {(i.fqn, i.offset): (s.relative_path, s.offset, s.length) for i, s in found.storage_data.items()}
    assert places[long, torch.Size((0, 0))] == ("__0_0.distcp", 0, 1 << 40)
    assert places["t299", torch.Size((0,))] == ("f", 299, 7) and places["s/shard_0_1", None] == ("o", 1, 2)
    assert len(places) == 303 and found.version == "1.0.0"


def test_an_item_is_a_file_of_torch_wherever_it_begins(tmp_path: Path) -> None:
    layout = DistLayout(
        [("a", "BF16", (3,)), ("b", "F8_E4M3", (2, 2)), ("empty", "F32", (0, 3)), ("c", "F32", ())]
    )
    values = {"a": b"\1\2" * 3, "b": bytes(range(4)), "empty": b"", "c": b"\0\0\x80?"}
    with open(tmp_path / "f", "wb") as f:
        f.truncate(layout.size)
        for name, data in values.items():
            os.pwrite(f.fileno(), data, layout.offsets[name])
        for at, data in layout.finish({n: zlib.crc32(x) for n, x in values.items()}):
            os.pwrite(f.fileno(), data, at)
    raw = (tmp_path / "f").read_bytes()
    assert layout.items["b"][0] % 64  # which nothing aligns
    for name, (at, length) in layout.items.items():
        (tmp_path / name).write_bytes(raw[at : at + length])
        x = torch.load(tmp_path / name, weights_only=True)
        assert x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == values[name]


@pytest.mark.parametrize(
    ("name", "stacked", "key", "index"),
    [
        ("decoder.layers.11.mlp.linear_fc1.weight", True, "decoder.layers.mlp.linear_fc1.weight", (11,)),
        ("decoder.layers.11.mlp.linear_fc1.weight", False, "decoder.layers.11.mlp.linear_fc1.weight", ()),
        ("decoder.layers.1.mlp.linear_fc1.up.weight", False, "decoder.layers.1.mlp.linear_fc1.weight_v", ()),
        (
            "decoder.layers.2.mlp.experts.local_experts.5.linear_fc2.weight",
            True,
            "decoder.layers.mlp.experts.experts.linear_fc2.weight",
            (2, 5),
        ),
        ("output_layer.weight", True, "output_layer.weight", ()),
    ],
)
def test_names_lead_back_to_keys(name: str, stacked: bool, key: str, index: tuple[int, ...]) -> None:
    assert key_of(name, stacked=stacked) == (key, index)


# --- what is asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"form": "mcore", "layers": "stacked"}, "expected --form torch_dist beside it, found --form mcore"),
        ({"form": "torch_dist", "shards": 2}, "expected"),
        ({"form": "torch_dist", "layers": "some"}, "stacked or non_homogeneous or singleton"),
    ],
)
def test_options_of_another_form_are_refused(asked: dict[str, Any], words: str, conversions: Written) -> None:
    shards = asked.pop("shards", 1)
    options = api.Options(family_options=asked, shards=shards)
    error = refused(lambda: api.plan(conversions("llama-mcore"), to="original", options=options))
    assert error.kind == "usage" and words in error.text()


@pytest.mark.parametrize("form", ["mcore", "torch_dist"])
@pytest.mark.parametrize(
    ("variant", "words"),
    [("mixtral-mcore", "--form A"), ("mistral-7b-v0.1", "--form consolidated"), ("qwen3-mcore", "--form hf")],
)
def test_the_container_is_one_of_the_published_layout(
    form: str, variant: str, words: str, conversions: Written, tmp_path: Path
) -> None:
    """And the form that the message names takes it."""
    asked = {"form": form, "container": "pth"}
    options = api.Options(family_options=asked)
    error = refused(lambda: api.plan(conversions(variant), to="original", options=options))
    assert (error.kind, error.problems[0].where) == ("usage", "--container") and words in error.text()
    options = api.Options(family_options={**asked, "form": words.split()[1]})
    (file,) = api.plan(conversions(variant), to="original", options=options).outputs
    assert Path(file.name).suffix in (".pth", ".bin")


def test_ranks_of_a_folder_only_pad_the_words_unless_asked_for(conversions: Written, tmp_path: Path) -> None:
    """Since core_v0.14 a folder may come from more ranks than there are key/value heads."""
    out = written(conversions("llama-mcore"), tmp_path / "dist")
    common = torch.load(out / "release" / "common.pt", weights_only=False)
    common["args"].tensor_model_parallel_size = 64
    torch.save(common, out / "release" / "common.pt")
    api.convert(out, tmp_path / "hf", family="llama")
    api.convert(tmp_path / "hf", tmp_path / "again", to="original")
    with open_checkpoint(out) as one, open_checkpoint(tmp_path / "again") as other:
        assert tensors(one) == tensors(other)
    asked = api.Options(family_options={"form": "torch_dist", "tensor_parallel": 64})
    error = refused(lambda: api.plan(tmp_path / "hf", to="original", options=asked))
    assert error.kind == "config-mismatch" and "num_key_value_heads" in error.text()


def test_an_output_is_replaced_and_a_changed_one_is_not(conversions: Written, tmp_path: Path) -> None:
    out = written(conversions("llama-mcore"), tmp_path / "dist")
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    asked = api.Options(family_options={"form": "torch_dist"})
    with open(copy / "release" / "__0_1.distcp", "r+b") as f:
        f.seek(800)
        f.write(b"\7")

    def again(folder: Path) -> None:
        api.convert(conversions("llama-mcore"), folder, to="original", options=asked, overwrite=True)

    assert refused(lambda: again(copy)).kind == "not-replaceable"
    (out / "release" / "__0_1.distcp").touch()
    again(out)
    assert len(list((out / "release").glob("__0_*.distcp"))) == 1


# --- megatron-core ------------------------------------------------------------------------------------------

Judged = Callable[[int, list[Path]], Mapping[str, np.ndarray]]


@pytest.fixture
def judged(tmp_path: Path) -> Judged:
    def asked(ranks: int, folders: list[Path]) -> Mapping[str, np.ndarray]:
        out = tmp_path / "logits.npz"
        script = [sys.executable, "-W", "ignore", str(Path(megatron_judge.__file__))]
        run = subprocess.run(
            [*script, str(ranks), str(tmp_path / "meeting"), str(out), *map(str, folders)],
            env={**os.environ, "PYTHONPATH": str(JUDGE), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-4000:]
        return np.load(out)

    return asked


@needs_judge
def test_megatron_core_loads_every_form_on_two_ranks_and_agrees(
    judged: Judged, conversions: Written, originals: Written, tmp_path: Path
) -> None:
    """In its strictest mode: no entry more or less than it asks for. What it saves reads as the same."""
    made = {
        written(conversions(v), tmp_path / f"{v}-{layers}", layers) / "release": v
        for v, layers in (
            ("llama-mcore", "stacked"),
            ("qwen2-mcore-tied", "singleton"),
            ("qwen3-mcore", "non_homogeneous"),
            ("mixtral-mcore", "singleton"),
            ("mixtral-mcore", "stacked"),
        )
    }
    found = judged(2, list(made))
    for folder, variant in made.items():
        expected = reference_logits(variant, conversions(variant), originals(variant))
        ours = found[str(folder)]
        nmse = float(((ours - expected) ** 2).mean() / expected.var())
        assert ours.shape == expected.shape and nmse <= 1e-10, (variant, nmse)
    first = next(iter(made))
    assert numbers(first.with_suffix(".again")) == numbers(first)
