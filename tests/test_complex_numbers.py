"""Tensors of complex numbers: no weights, and in no converted model."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import filesystem

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify
from tests.conftest import Written


@pytest.mark.parametrize("shards", [1, 2])
def test_complex_numbers_are_left_out_of_a_source_and_wrong_in_an_output(
    shards: int, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """A table of rotations that somebody stored: as a source it is dropped, no loader has a place for it."""
    stored = tmp_path / "in"
    shutil.copytree(conversions("llama-3.2-1b"), stored)
    (stored / "ckpt-tool.json").unlink()
    tensors = load_file(stored / "model.safetensors")
    parts = [tensors, {}][:shards]
    parts[-1]["freqs_cis"] = torch.ones(5, 3, dtype=torch.complex64)
    (stored / "model.safetensors").unlink()
    names = ["model.safetensors"]
    if shards > 1:
        names = [f"model-{k:05}-of-{shards:05}.safetensors" for k in range(1, shards + 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, stored / name, {"format": "pt"})
    places = {n: name for name, part in zip(names, parts, strict=True) for n in part}
    size = sum(t.nbytes for part in parts for t in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    if shards > 1:
        (stored / "model.safetensors.index.json").write_text(json.dumps(index))

    done = api.convert(stored, tmp_path / "out", check=False)
    dropped = [(d.tensor.name, d.reason) for d in done.plan.dropped]
    assert dropped == [("freqs_cis", "of type C64, which is not converted")]
    assert not [n for n in done.plan.notes if "index.json" in n]
    assert verify(tmp_path / "out", stored, levels=("coverage", "bits")).status == "pass"
    settings = VARIANTS["llama-3.2-1b"].settings
    report = verify(stored, originals("llama-3.2-1b"), settings=settings, levels=("coverage", "bits"))
    wrong = [(f.message, f.where) for f in report.findings if f.status == "fail"]
    assert wrong == [("expected no tensor of type C64, found one", "freqs_cis")]


def test_a_weight_of_complex_numbers_is_refused(conversions: Written, tmp_path: Path) -> None:
    shutil.copytree(conversions("llama-3.2-1b"), tmp_path / "in")
    file, name = tmp_path / "in" / "model.safetensors", "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(file)
    tensors[name] = tensors[name].to(torch.complex64)
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "in" / "ckpt-tool.json").unlink()
    with pytest.raises(CkptToolError) as caught:
        api.plan(tmp_path / "in")
    assert (caught.value.kind, caught.value.problems[0].where) == ("unsupported-dtype", name)
    assert caught.value.problems[0].message == "expected a dtype known here, found C64"


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_in_a_torch_file_are_left_out(
    form: str, dtype: torch.dtype, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """Whatever they are called, and with the weights in a dict of their own."""
    stored = tmp_path / "in"
    shutil.copytree(originals("llama-3-8b"), stored)
    (file,) = stored.glob("*.pth")
    weights = {f"module.{n}": t for n, t in torch.load(file).items()}
    weights["module.turns"] = torch.ones(5, 3, dtype=dtype)
    torch.save(weights, file, _use_new_zipfile_serialization=form == "zip")
    done = api.convert(stored, tmp_path / "out", family="llama", check=False)
    called = "C64" if dtype == torch.complex64 else "C128"
    dropped = [(d.tensor.name, d.reason) for d in done.plan.dropped]
    assert ("turns", f"of type {called}, which is not converted") in dropped
    same = [(f / "model.safetensors").read_bytes() for f in (tmp_path / "out", conversions("llama-3-8b"))]
    assert same[0] == same[1]
    assert verify(tmp_path / "out", stored, levels=("coverage", "bits")).status == "pass"


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", ["turns", "freqs_cis"])
@pytest.mark.parametrize("dtype", ["complex32", "bcomplex32"])
def test_complex_numbers_of_16_bits_are_left_out(
    dtype: str, name: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """`bcomplex32` is of torch 2.15, whose files differ from those of complex32 in this name."""
    stored = tmp_path / "in"
    shutil.copytree(originals("llama-3-8b"), stored)
    (file,) = stored.glob("*.pth")
    turns = torch.ones(5, 3, dtype=torch.complex32)
    torch.save({**torch.load(file), name: turns}, file)
    with zipfile.ZipFile(file) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in members.items():
            if member.endswith("/data.pkl"):
                assert content.count(b"torch\ncomplex32\n") == 1
                content = content.replace(b"torch\ncomplex32\n", f"torch\n{dtype}\n".encode())
            archive.writestr(member, content)
    done = api.convert(stored, tmp_path / "out", family="llama", check=False)
    told = [*done.opened, *(f"{d.tensor.name}: {d.reason}" for d in done.plan.dropped)]
    reasons = {"turns": f": of type {dtype}, which is not converted", "freqs_cis": " is left out: complex"}
    assert any(f"{name}{reasons[name]}" in line for line in told), told
    same = [(f / "model.safetensors").read_bytes() for f in (tmp_path / "out", conversions("llama-3-8b"))]
    assert same[0] == same[1]


def test_a_weight_of_complex_numbers_in_a_torch_file_is_refused(originals: Written, tmp_path: Path) -> None:
    shutil.copytree(originals("llama-3-8b"), tmp_path / "in")
    (file,) = (tmp_path / "in").glob("*.pth")
    weights, name = torch.load(file), "layers.0.attention.wo.weight"
    weights[name] = weights[name].to(torch.complex64)
    torch.save({f"module.{n}": t for n, t in weights.items()}, file)
    with pytest.raises(CkptToolError) as caught:
        api.plan(tmp_path / "in", family="llama")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("unsupported-dtype", name)
    assert problem.message == "expected a dtype known here, found C64"


SAFETENSORS = filesystem.SerializationFormat.SAFETENSORS


def of_ranks(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """As torch's writer for Hugging Face leaves them: the rows of every tensor in files of two ranks."""
    for rank in range(2):
        parts = {n: t.tensor_split(2)[rank].clone() for n, t in tensors.items()}
        starts = {n: [rank * len(t.tensor_split(2)[0]), *(0,) * (t.ndim - 1)] for n, t in tensors.items()}
        told = {n: {"saved_offsets": start} for n, start in starts.items()}
        name = f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        save_file(parts, folder / name, {"format": "pt", "DCP_SHARDING_INFO": json.dumps(told)})


def by_dcp(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    writer = filesystem.FileSystemWriter(folder, serialization_format=SAFETENSORS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed
        dcp.save(dict(tensors), storage_writer=writer, no_dist=True)


@pytest.mark.parametrize("written", [of_ranks, by_dcp])
@pytest.mark.parametrize("before", ["", "module."])
def test_complex_numbers_in_slices_are_left_out_and_a_weight_of_them_refused(
    before: str,
    written: Callable[[Path, Mapping[str, torch.Tensor]], None],
    conversions: Written,
    tmp_path: Path,
) -> None:
    """Folders of torch.distributed whose files are safetensors, and the slices of its writer."""
    there, name = conversions("qwen2-0.5b"), "model.norm.weight"
    tensors = load_file(there / "model.safetensors")
    wide = torch.complex(tensors[name].float(), tensors[name].float())
    for folder, odd in (("beside", "freqs"), ("in", name)):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder, {before + n: t for n, t in (tensors | {odd: wide}).items()})
        shutil.copy(there / "config.json", tmp_path / folder)
    done = api.convert(tmp_path / "beside", tmp_path / "out", check=False)
    told = [(d.tensor.name, d.tensor.nbytes, d.reason) for d in done.plan.dropped]
    assert told == [("freqs", wide.nbytes, "of type C64, which is not converted")]
    assert verify(tmp_path / "out", tmp_path / "beside", levels=("coverage", "bits")).status == "pass"
    same = [(f / "model.safetensors").read_bytes() for f in (tmp_path / "out", there)]
    assert same[0] == same[1]
    with pytest.raises(CkptToolError) as caught:
        api.plan(tmp_path / "in")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("unsupported-dtype", name)
    assert problem.message == "expected a dtype known here, found C64"
