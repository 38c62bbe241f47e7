"""Folders of torch.distributed.checkpoint: read as data, piece by piece, and refused where pieces are no
whole. The writers are torch's own, and one of ours for pieces that torch cuts only with many processes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as classes

from ckpt_tool import api
from ckpt_tool.checkpoint.base import Checkpoint, View
from ckpt_tool.checkpoint.dcp import DcpFile
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.pieces import Joined, Piece, tiling_fault
from ckpt_tool.errors import CkptToolError
from tests.conftest import Written

CASES = Path(__file__).parents[2] / "shared" / "cases"
TORCH_DIST = sorted(p.name for p in CASES.glob("torch-dist-*"))
Bytes = Mapping[str, tuple[str, tuple[int, ...], bytes]]


def contents(checkpoint: Checkpoint) -> Bytes:
    return {t.name: (t.dtype, t.shape, checkpoint.read(t).tobytes()) for t in checkpoint}


def expected(file: Path) -> Bytes:
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    return {
        name: (e["dtype"], tuple(e["shape"]), raw[8 + size + a : 8 + size + b])
        for name, e in header.items()
        if name != "__metadata__"
        for a, b in [e["data_offsets"]]
    }


def refused(action: Callable[[], object]) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        action()
    return caught.value


# --- real files ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not TORCH_DIST, reason="the folder of cases is not beside this checkout")
@pytest.mark.parametrize("case", TORCH_DIST)
def test_shared_folders_hold_the_expected_tensors(case: str) -> None:
    wanted = dict(expected(CASES / case / "expected.safetensors"))
    with open_checkpoint(CASES / case / "ckpt") as checkpoint:
        found = contents(checkpoint)
        found |= {
            left.tensor.name: (left.tensor.dtype, left.tensor.shape, b"") for left in checkpoint.left_out
        }
        notes = " ".join(checkpoint.notes)
        states = sum("_extra_state" in n for f in checkpoint.files.values() for n in f.tensors)
        checked = sum(f.check_record(k) for f in checkpoint.files.values() for k in f.records())
    assert states == 0
    if case == "torch-dist-dcp-plain":
        assert "complex64" in notes and wanted.pop("model.c64")
        assert found.pop("model.c64") == ("complex64", (3,), b"")  # left out for its dtype
        name = "opt.state.0.exp_avg"  # left out by name
        wanted[name] = (*wanted[name][:2], b"")
    assert found == wanted
    assert ("hf" in case) == (checked == 0)


# --- torch as the writer ------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    for file in sorted(folder.glob("consolidated.*.pth")):
        found |= torch.load(file, weights_only=True)
    return found


def beside(source: Path, folder: Path) -> None:
    """The small files of a model."""
    for file in source.iterdir():
        if file.suffix in (".json", ".txt", ".model"):
            shutil.copy(file, folder)


def saved(state: Mapping[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed
        dcp.save(dict(state), checkpoint_id=str(folder), no_dist=True)


Tree = dict[str, Any]
TREES: dict[str, Callable[[Tree], Tree]] = {
    "bare": lambda model: model,
    "model and optimizer": lambda model: {
        "model": model,
        "optimizer": {"state": {n: {"exp_avg": torch.zeros_like(x)} for n, x in model.items()}},
        "step": 7,
    },
    "module": lambda model: {f"module.{n}": x for n, x in model.items()},
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("variant", ["qwen2-0.5b", "llama-3-8b"])
def test_state_dicts_convert_as_what_they_are(
    variant: str, tree: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """Of Hugging Face's names and of the publisher's: the same bytes as from the original."""
    folder = tmp_path / "step-100"
    saved(TREES[tree](weights(originals(variant))), folder)
    beside(originals(variant), folder)
    api.convert(folder, tmp_path / "out")
    ours, theirs = (f / "model.safetensors" for f in (tmp_path / "out", conversions(variant)))
    assert ours.read_bytes() == theirs.read_bytes()


SAFETENSORS = filesystem.SerializationFormat.SAFETENSORS


@pytest.mark.parametrize("beside_them", [{}, {"step": 7, "sampler": {"seed": 3}}])
def test_files_of_safetensors_are_read_though_torch_cannot(
    beside_them: Tree, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """All tensors of a file are said to begin where it is one of safetensors, behind what is no tensor."""
    folder = tmp_path / "step-100"
    writer = filesystem.FileSystemWriter(folder, serialization_format=SAFETENSORS)
    held = {**weights(originals("qwen2-0.5b")), **beside_them}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(held, storage_writer=writer, no_dist=True)
    beside(originals("qwen2-0.5b"), folder)
    done = api.convert(folder, tmp_path / "out")
    ours, theirs = (f / "model.safetensors" for f in (tmp_path / "out", conversions("qwen2-0.5b")))
    assert ours.read_bytes() == theirs.read_bytes()
    assert any("entries are no tensors and were left out" in n for n in done.opened) == bool(beside_them)
    report = api.verify(tmp_path / "out", folder, levels=("coverage", "bits"))
    assert (report.status, report.exactness) == ("pass", "bit-identical")


def of_ranks(folder: Path, rows: Sequence[tuple[int, int]] = ((0, 3), (3, 2))) -> torch.Tensor:
    """A matrix of 5 rows, those from `start` on in a file of each rank, as torch writes them with many."""
    whole, places, chunks = torch.arange(20.0).reshape(5, 4), {}, []
    folder.mkdir()
    for rank, (start, count) in enumerate(rows):
        part, path = whole[start : start + count].clone(), f"__{rank}_0.distcp"
        said = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [start, 0]}})}
        save_file({"w": part}, folder / path, said)
        at = classes.MetadataIndex("w", torch.Size([start, 0]))
        places[at] = filesystem._StorageInfo(path, 0, part.nbytes)
        chunks.append(classes.ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([count, 4])))
    told = classes.TensorStorageMetadata(classes.TensorProperties(torch.float32), torch.Size([5, 4]), chunks)
    made = classes.Metadata({"w": told}, None, places)
    (folder / ".metadata").write_bytes(pickle.dumps(made))
    return whole


def test_slices_in_safetensors_are_held_against_what_metadata_lists(tmp_path: Path) -> None:
    whole = of_ranks(tmp_path / "two")
    with open_checkpoint(tmp_path / "two") as checkpoint:
        assert contents(checkpoint) == {"w": ("F32", (5, 4), whole.numpy().tobytes())}
        assert not checkpoint.notes
    (tmp_path / "two" / "__1_0.distcp").rename(tmp_path / "last")
    error = refused(lambda: open_checkpoint(tmp_path / "two"))
    assert error.kind == "missing-shard" and "__1_0.distcp, which rank 1 wrote" in error.text()
    save_file(
        {"w": torch.ones(1, 4)},
        tmp_path / "two" / "__1_0.distcp",
        {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [3, 0]}}), "more": "x" * 100},
    )
    (problem,) = refused(lambda: open_checkpoint(tmp_path / "two")).problems
    assert (problem.kind, problem.where) == ("missing-shard", "w")
    assert problem.message == "expected slices of [5, 4] as .metadata says, found [4, 4]"


def test_the_folder_around_and_a_file_inside_are_the_folder(originals: Written, tmp_path: Path) -> None:
    """accelerate puts weights into a folder of their own, and people give any of its files."""
    inner = tmp_path / "run" / "pytorch_model_fsdp_0"
    saved({"model": weights(originals("qwen2-0.5b"))}, inner)
    beside(originals("qwen2-0.5b"), inner.parent)
    plans = [api.plan(p).digest() for p in (inner.parent, inner, inner / ".metadata", inner / "__0_0.distcp")]
    assert len(set(plans)) == 1
    step = tmp_path / "trainer" / "step-100"
    shutil.copytree(inner, step)
    beside(inner.parent, step)
    assert api.plan(step.parent).digest() == plans[0]  # its documents are found where the weights are
    shutil.copytree(inner, tmp_path / "run" / "pytorch_model_fsdp_1")
    error = refused(lambda: api.plan(inner.parent))
    assert error.kind == "ambiguous-input" and "pytorch_model_fsdp_1/" in str(error)


def test_a_folder_that_is_not_whole_or_lies_deeper_is_said_so(originals: Written, tmp_path: Path) -> None:
    """Under a name that trainers do not use it is not looked for; the hidden file may be left out."""
    inner = tmp_path / "run" / "mine"
    saved({"model": weights(originals("qwen2-0.5b"))}, inner)
    beside(originals("qwen2-0.5b"), inner)
    error = refused(lambda: api.plan(inner.parent))
    assert error.kind == "wrong-format" and error.problems[0].hint == f"give that folder: --in {inner}"
    shutil.copytree(inner, tmp_path / "run" / "optimizer_0")  # no second set of weights
    assert refused(lambda: api.plan(inner.parent)).problems[0].hint == error.problems[0].hint
    ranks = tmp_path / "megatron" / "iter_0000100"
    shutil.copytree(inner, ranks)
    (ranks / ".metadata").unlink()
    (ranks / "metadata.json").write_text("{}")
    for folder in (ranks, ranks.parent):
        error = refused(lambda folder=folder: api.plan(folder))  # type: ignore[misc]
        assert "without its .metadata" in error.text() and f"into {ranks} " in error.text()


def test_a_list_of_sums_is_compared_with_every_file(originals: Written, tmp_path: Path) -> None:
    """`.metadata` alone says little of the weights."""
    inner = tmp_path / "run" / "step-100"
    saved(weights(originals("qwen2-0.5b")), inner)
    beside(originals("qwen2-0.5b"), inner.parent)
    sums = {n: hashlib.sha256((inner / n).read_bytes()).hexdigest() for n in (".metadata", "__0_0.distcp")}
    for above in ("", "step-100/"):
        listed = "".join(f"{digest}  {above}{name}\n" for name, digest in sums.items())
        (inner.parent / "SHA256SUMS").write_text(listed)
        assert "SHA256SUMS: 2 of 2 sums agree" in api.plan(inner.parent).notes
    data = inner / "__0_0.distcp"
    data.write_bytes(data.read_bytes() + b"x")
    notes = " ".join(api.plan(inner.parent).notes)
    assert "step-100/__0_0.distcp has sha256" in notes and "1 of 2 sums agree" in notes


@pytest.mark.parametrize("variant", ["llama-3-8b", "mistral-7b-v0.3"])
def test_names_of_hugging_face_where_the_original_has_others(
    variant: str, conversions: Written, tmp_path: Path
) -> None:
    """Which training with FSDP leaves: in one step, or by way of the original."""
    done, family = conversions(variant), variant.partition("-")[0]
    saved({"app": {"model": load_file(done / "model.safetensors")}}, tmp_path / "in")
    shutil.copy(done / "config.json", tmp_path / "in")
    for asked in (family, "auto"):
        api.convert(tmp_path / "in", tmp_path / asked, family=asked)
    api.convert(tmp_path / "in", tmp_path / "original", family=family, to="original")
    api.convert(tmp_path / "original", tmp_path / "out", family=family)
    for made in ("out", "auto", family):
        found = (tmp_path / made / "model.safetensors").read_bytes()
        assert found == (done / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_folder_in_an_archive(kind: str, originals: Written, tmp_path: Path) -> None:
    """As .nemo is one, with the weights in a folder of their own; and with a file gone."""
    run = tmp_path / "run"
    saved(weights(originals("qwen2-0.5b")), run / "weights")
    beside(originals("qwen2-0.5b"), run)

    def packed(name: str) -> Path:
        pack = {"tar": "tar", "tar.gz": "gztar", "zip": "zip"}[kind]
        return Path(shutil.make_archive(str(tmp_path / name), pack, run))

    whole = packed("whole")
    assert len(api.plan(whole).outputs[0].tensors) == 38
    (run / "weights" / "__0_0.distcp").rename(run / "weights" / "__1_0.distcp")
    error = refused(lambda: open_checkpoint(packed("other")))
    assert error.kind == "missing-shard" and "which rank 0 wrote" in str(error)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_files_that_stand_for_others_are_named(name: str, tmp_path: Path) -> None:
    saved({"w": GRID}, tmp_path / "in")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1234\n"
    (tmp_path / "in" / name).write_text(pointer)
    error = refused(lambda: open_checkpoint(tmp_path / "in"))
    assert error.kind == "wrong-format" and "git-lfs" in error.text().lower() and name in error.text()
    (tmp_path / "in" / name).write_text("")
    assert refused(lambda: open_checkpoint(tmp_path / "in")).kind == "truncated"


# --- pieces of any kind -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    start: tuple[int, ...]
    data: torch.Tensor


def save(folder: Path, tensors: Mapping[str, Sequence[Chunk]], shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Write a folder whose tensors lie in these pieces, each in the file of a rank of its own; the metadata
    is returned, to be changed and written again."""
    folder.mkdir()
    files: dict[str, io.BytesIO] = {}
    state, storage = {}, {}
    for name, chunks in tensors.items():
        for k, chunk in enumerate(chunks):
            path = f"__{k}_0.distcp"
            file = files.setdefault(path, io.BytesIO())
            offset = file.tell()
            torch.save(chunk.data, file)
            index = classes.MetadataIndex(name, torch.Size(chunk.start))
            storage[index] = filesystem._StorageInfo(path, offset, file.tell() - offset)
        boxes = [classes.ChunkStorageMetadata(torch.Size(c.start), c.data.shape) for c in chunks]
        properties = classes.TensorProperties(dtype=chunks[0].data.dtype)
        state[name] = classes.TensorStorageMetadata(properties, torch.Size(shapes[name]), boxes)
    for path, file in files.items():
        (folder / path).write_bytes(file.getvalue())
    made = classes.Metadata(state, storage_data=storage)
    write(folder, made)
    return made


def write(folder: Path, metadata: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=4))


def cut(whole: torch.Tensor, *borders: Sequence[int]) -> list[Chunk]:
    """A grid of pieces; `borders` are the cuts of each axis, with 0 and its end."""
    boxes = product(*(pairwise(b) for b in borders))
    return [
        Chunk(tuple(a for a, _ in box), whole[tuple(slice(a, b) for a, b in box)].clone()) for box in boxes
    ]


GRID = torch.arange(7 * 10, dtype=torch.float32).view(7, 10)


def grid(folder: Path) -> Any:
    return save(folder, {"w": cut(GRID, (0, 3, 6, 7), (0, 4, 10))}, {"w": (7, 10)})


def test_pieces_and_strides(tmp_path: Path) -> None:
    """A piece that is stored transposed has its elements elsewhere than row by row."""
    pieces = cut(GRID, (0, 4, 7), (0, 10))
    pieces[0] = Chunk(pieces[0].start, pieces[0].data.t().contiguous().t())
    whole = torch.randn(5, 3).t()
    save(tmp_path / "in", {"w": pieces, "t": [Chunk((0, 0), whole)]}, {"w": (7, 10), "t": (3, 5)})
    with open_checkpoint(tmp_path / "in") as checkpoint:
        found = contents(checkpoint)
        (file,) = checkpoint.files.values()
        assert isinstance(file, DcpFile) and file.extent("w") is None
        assert all(file.check_record(key) for key in file.records())
    assert found["w"][2] == GRID.numpy().tobytes() and found["t"][2] == whole.contiguous().numpy().tobytes()


@st.composite
def cuttings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Piece[tuple[int, ...]]]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    borders = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))}) for n in shape]
    boxes = list(product(*(pairwise(b) for b in borders)))
    made = [Piece(tuple(a for a, _ in box), tuple(b - a for a, b in box), ()) for box in boxes]
    return shape, sorted(made, key=lambda p: p.start)


@given(cuttings(), st.data())
@settings(max_examples=150, deadline=None)
def test_any_part_of_any_pieces(
    cutting: tuple[tuple[int, ...], list[Piece[Any]]], data: st.DataObject
) -> None:
    """Read in parts of any size, and with any piece gone or twice."""
    shape, pieces = cutting
    whole = np.arange(np.prod(shape, dtype=int), dtype="<u2").reshape(shape)
    assert tiling_fault(shape, pieces) is None
    boxes = [tuple(slice(a, a + n) for a, n in zip(p.start, p.size, strict=True)) for p in pieces]
    held = [Piece(p.start, p.size, k) for k, p in enumerate(pieces)]

    def read(place: int, first: int, out: np.ndarray) -> None:
        out[:] = whole[boxes[place]].reshape(-1)[first : first + len(out)]

    joined: Joined[int] = Joined(read)
    start = data.draw(st.integers(0, whole.nbytes - 1))
    room = bytearray(data.draw(st.integers(1, whole.nbytes - start)))
    joined.read_into("w", shape, held, "<u2", start, memoryview(room))
    assert bytes(room) == whole.tobytes()[start : start + len(room)]
    k = data.draw(st.integers(0, len(pieces) - 1))
    gone, twice = tiling_fault(shape, pieces[:k] + pieces[k + 1 :]), tiling_fault(shape, [*pieces, pieces[k]])
    if shape:
        assert gone is not None and gone[0] == "missing-shard"
        assert twice is not None and twice[0] == "shard-conflict"


# --- what is refused ----------------------------------------------------------------------------------------


def first_box(made: Any) -> Any:
    return made.state_dict_metadata["w"].chunks[0]


def first_place(made: Any) -> Any:
    return next(iter(made.storage_data.values()))


def no_bytes(made: Any) -> None:
    made.storage_data.pop(next(iter(made.storage_data)))


def one_place(made: Any) -> None:
    """For two pieces of one size."""
    first, second, third, *_ = made.storage_data
    made.storage_data[third] = made.storage_data[first]
    assert second


def set_size(made: Any, *size: int) -> None:
    made.state_dict_metadata["w"].size = torch.Size(size)


def box(made: Any, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    found = first_box(made)
    index = classes.MetadataIndex("w", found.offsets)
    place = made.storage_data.pop(index)
    found.offsets, found.sizes = torch.Size(offsets), torch.Size(sizes)
    made.storage_data[classes.MetadataIndex("w", found.offsets)] = place


def put(name: str, value: object) -> Callable[[Any], None]:
    return lambda made: setattr(first_place(made), name, value)


def another_dtype(made: Any) -> None:
    made.state_dict_metadata["w"].properties = classes.TensorProperties(dtype=torch.float16)


BROKEN: dict[str, tuple[Callable[[Any], object], str, str]] = {
    "a hole": (lambda m: m.state_dict_metadata["w"].chunks.pop(), "missing-shard", "[6:7, 4:10]"),
    "an overlap": (partial(box, offsets=(1, 0), sizes=(3, 4)), "shard-conflict", "[1:4, 0:4]"),
    "outside": (partial(box, offsets=(5, 0), sizes=(3, 4)), "size-mismatch", "[5:8, 0:4]"),
    "other axes": (partial(box, offsets=(0,), sizes=(3,)), "size-mismatch", "inside [7, 10]"),
    "no bytes": (no_bytes, "missing-record", "the piece at [0, 0]"),
    "another piece's bytes": (one_place, "shard-conflict", "bytes of its own"),
    "another item's size": (lambda m: set_size(m, 7, 11), "missing-shard", "[0:3, 10:11]"),
    "an absurd size": (lambda m: set_size(m, 1 << 60, 1 << 60), "size-mismatch", "2^62"),
    "a negative size": (lambda m: set_size(m, -7, 10), "size-mismatch", "2^62"),
    "a path upwards": (put("relative_path", "../__0_0.distcp"), "bad-input", "'../__0_0.distcp'"),
    "an absolute path": (put("relative_path", "/etc/hostname"), "bad-input", "'/etc/hostname'"),
    "a folder": (put("relative_path", ".."), "bad-input", "'..'"),
    "no such file": (put("relative_path", "__9_0.distcp"), "missing-shard", "which rank 9 wrote"),
    "beyond the file": (put("length", 1 << 40), "truncated", "at least 1099511627776 bytes"),
    "before the file": (put("offset", -5), "size-mismatch", "bytes at -5"),
    "transformed": (put("transform_descriptors", ["zstd"]), "unsupported", "zstd"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_pieces_that_are_no_whole_are_refused(fault: str, tmp_path: Path) -> None:
    change, kind, words = BROKEN[fault]
    made = grid(tmp_path / "in")
    change(made)
    write(tmp_path / "in", made)
    error = refused(lambda: open_checkpoint(tmp_path / "in"))
    assert error.kind == kind and words in str(error), str(error)


def test_an_item_must_be_what_the_metadata_says(tmp_path: Path) -> None:
    """Its dtype, its place and its checksum."""
    made = grid(tmp_path / "in")
    another_dtype(made)
    write(tmp_path / "in", made)
    with open_checkpoint(tmp_path / "in") as checkpoint:
        error = refused(lambda: contents(checkpoint))
    assert error.kind == "size-mismatch" and "F16 [3, 4] as .metadata says, found F32 [3, 4]" in str(error)

    made = grid(tmp_path / "odd")
    first_place(made).offset, first_place(made).length = 3, first_place(made).length - 3
    write(tmp_path / "odd", made)
    with open_checkpoint(tmp_path / "odd") as checkpoint:
        error = refused(lambda: contents(checkpoint))
    assert "__0_0.distcp" in str(error) and error.kind in ("wrong-format", "bad-zip", "truncated")

    grid(tmp_path / "damaged")
    data = bytearray((tmp_path / "damaged" / "__0_0.distcp").read_bytes())
    at = data.find(GRID[:3, :4].contiguous().numpy().tobytes())
    data[at + 5] ^= 1
    (tmp_path / "damaged" / "__0_0.distcp").write_bytes(data)
    with open_checkpoint(tmp_path / "damaged") as checkpoint:
        contents(checkpoint)
        (file,) = checkpoint.files.values()
        error = refused(lambda: [file.check_record(key) for key in file.records()])
    assert error.kind == "checksum" and "w" in str(error)


def test_a_tensor_of_complex_numbers_is_named_where_the_model_wants_it(
    conversions: Written, tmp_path: Path
) -> None:
    """And left aside where it does not."""
    there, name = conversions("qwen2-0.5b"), "model.norm.weight"
    held = load_file(there / "model.safetensors")
    for folder, odd in (("in", name), ("beside", "freqs")):
        wide = torch.complex(held[name].float(), held[name].float())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is distributed
            dcp.save(held | {odd: wide}, checkpoint_id=tmp_path / folder, no_dist=True)
        shutil.copy(there / "config.json", tmp_path / folder)
    error = refused(lambda: api.plan(tmp_path / "in"))
    (problem,) = error.problems
    assert (problem.kind, problem.where) == ("unsupported-dtype", name)
    assert problem.message == "expected a dtype known here, found complex64"
    made = api.plan(tmp_path / "beside")
    assert [(d.tensor.name, d.reason) for d in made.dropped] == [("freqs", "of a dtype that no weights have")]


def test_an_optimizer_that_is_not_whole_is_left_out(tmp_path: Path) -> None:
    """Megatron flattens its states into buckets with gaps."""
    name = "optimizer.state.exp_avg"
    save(
        tmp_path / "in",
        {"w": cut(GRID, (0, 3, 7), (0, 10)), name: cut(GRID, (0, 3, 6), (0, 10))},
        {"w": (7, 10), name: (7, 10)},
    )
    with open_checkpoint(tmp_path / "in") as checkpoint:
        assert list(contents(checkpoint)) == ["w"]
        assert "1 tensors of the optimizer" in " ".join(checkpoint.notes)


def test_thousands_of_pieces_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is parsed once, few files are open at a time, and what nobody reads is not read through."""
    monkeypatch.setattr("ckpt_tool.checkpoint.open_files.HELD", 4)
    whole = torch.arange(40 * 40, dtype=torch.float32).view(40, 40)
    tensors = {"w": cut(whole, (0, 40), range(41)), "optim.w": cut(whole, range(41), (0, 40))}
    save(tmp_path / "in", tensors, {"w": (40, 40), "optim.w": (40, 40)})
    with open_checkpoint(tmp_path / "in") as checkpoint:
        (file,) = checkpoint.files.values()
        stored = file.stored if isinstance(file, View) else file
        assert isinstance(stored, DcpFile) and len(file.paths) == 41
        parsed: list[int] = []
        parse = stored._parsed
        monkeypatch.setattr(stored, "_parsed", lambda k, *rest: parsed.append(k) or parse(k, *rest))
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            assert contents(checkpoint)["w"][2] == whole.numpy().tobytes()
        assert {r.of for r in file.records().values()} == {"w", "optim.w"}
        assert len(parsed) == len(set(parsed)) == 80
        assert len(os.listdir("/proc/self/fd")) <= before + 4
        checkpoint.check_unchanged()
        (tmp_path / "in" / "__7_0.distcp").touch()
        assert refused(checkpoint.check_unchanged).kind == "input-changed"


def test_a_conversion_does_not_go_on_with_other_bytes(originals: Written, tmp_path: Path) -> None:
    """All files of the folder tell a later run that it is the same source, not its list alone."""
    from ckpt_tool.convert.fingerprints import fingerprints

    folder = tmp_path / "step-100"
    saved(weights(originals("qwen2-0.5b")), folder)
    made = []
    for _ in range(2):
        with open_checkpoint(folder) as checkpoint:
            made.append(fingerprints(checkpoint, dict.fromkeys(checkpoint.files, "")))
        (folder / "__0_0.distcp").touch()
    assert made[0]["__0_0.distcp"] != made[1]["__0_0.distcp"] and made[0][".metadata"] == made[1][".metadata"]


class Calls:
    """What a pickle that runs something would hold; a harmless function stands for it."""

    def __reduce__(self) -> tuple[object, ...]:
        return len, ("abc",)


def test_a_metadata_is_data(tmp_path: Path) -> None:
    made = grid(tmp_path / "in")
    made.planner_data = Calls()
    write(tmp_path / "in", made)
    error = refused(lambda: open_checkpoint(tmp_path / "in"))
    assert error.kind == "unsafe-pickle" and "builtins.len" in str(error)
    write(tmp_path / "in", {"w": 1})
    error = refused(lambda: open_checkpoint(tmp_path / "in"))
    assert error.kind == "wrong-format" and "a torch.distributed checkpoint" in str(error)
    write(tmp_path / "in", {"state_dict_metadata": {}})
    error = refused(lambda: open_checkpoint(tmp_path / "in"))
    assert error.kind == "wrong-format" and "storage_data" in str(error)
    grid(tmp_path / "cut")
    (tmp_path / "in" / ".metadata").write_bytes((tmp_path / "cut" / ".metadata").read_bytes()[:-40])
    assert refused(lambda: open_checkpoint(tmp_path / "in")).kind == "bad-pickle"
    (tmp_path / "in" / ".metadata").unlink()
    error = refused(lambda: open_checkpoint(tmp_path / "in"))
    assert "without its .metadata, a hidden file" in str(error)


# --- slices in safetensors ----------------------------------------------------------------------------------


def sliced(folder: Path, whole: torch.Tensor) -> None:
    folder.mkdir()
    for k, chunk in enumerate(cut(whole, (0, 3, 7), (0, 10))):
        told = {"w": {"saved_offsets": list(chunk.start)}}
        own = {"w": chunk.data}
        if k:
            own["norm"], told["norm"] = torch.ones(3), {"saved_offsets": [0]}
        name = folder / f"shard-{k + 1:05d}-model-00001-of-00001.safetensors"
        save_file(own, name, {"format": "pt", "DCP_SHARDING_INFO": json.dumps(told)})


def test_slices_are_joined_and_never_taken_for_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    sliced(folder, GRID)
    files = sorted(folder.iterdir())
    for given_ in (folder, files[1]):
        with open_checkpoint(given_) as checkpoint:
            found = contents(checkpoint)
            assert "slices of 2 ranks were joined" in " ".join(checkpoint.notes)
        assert found["w"] == ("F32", (7, 10), GRID.numpy().tobytes()) and found["norm"][1] == (3,)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    shutil.copytree(folder, tmp_path / "run" / "sharded")  # what is left where they could not be joined
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert contents(checkpoint) == found and "config.json" in checkpoint.documents
        assert "the weights were found in sharded/" in checkpoint.notes
    files[1].rename(folder / "model.safetensors")
    error = refused(lambda: open_checkpoint(folder / "model.safetensors"))
    assert error.kind == "wrong-format" and "found a slice" in str(error)
    (folder / "model.safetensors").rename(files[1])
    files[0].unlink()
    error = refused(lambda: open_checkpoint(folder))
    assert error.kind == "missing-shard" and "[0:3, 0:10]" in str(error)


def test_slices_of_nemo_automodel_are_read_with_the_documents_kept_for_them(tmp_path: Path) -> None:
    """epoch_0_step_9/model/ has the slices and .hf_metadata/, beside the optimizer; what was joined lies in
    consolidated/, and is what is meant then."""
    step = tmp_path / "run" / "epoch_0_step_9"
    step.mkdir(parents=True)
    sliced(step / "model", GRID)
    (step / "model" / ".hf_metadata").mkdir()
    (step / "model" / ".hf_metadata" / "config.json").write_text('{"model_type": "own"}')
    (step / "optim").mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (step / "optim" / name).write_bytes(b"x")
    for given_ in (step, step / "model"):
        with open_checkpoint(given_) as checkpoint:
            assert contents(checkpoint)["w"] == ("F32", (7, 10), GRID.numpy().tobytes())
            assert checkpoint.json("config.json") == {"model_type": "own"}
    error = refused(lambda: open_checkpoint(step.parent))
    assert error.problems[0].hint == f"give that folder: --in {step}"
    (step / "model" / "consolidated").mkdir()
    save_file({"w": GRID}, step / "model" / "consolidated" / "model-00001-of-00001.safetensors")
    for given_ in (step.parent, step):
        error = refused(lambda given_=given_: open_checkpoint(given_))  # type: ignore[misc]
        assert error.problems[0].hint == f"give that folder: --in {step / 'model' / 'consolidated'}"
    save_file({"w": GRID}, step.parent / "model.safetensors")
    error = refused(lambda: open_checkpoint(tmp_path))  # whole weights around them are a model of their own
    assert error.kind == "ambiguous-input" and "run/epoch_0_step_9/model/consolidated" in str(error)
    assert error.problems[0].hint == f"give the folder that is meant: --in {step.parent}"
    (step.parent / "model.safetensors").unlink()
    shutil.rmtree(step / "model")
    error = refused(lambda: open_checkpoint(step))
    assert "found the state of an optimizer alone" in error.problems[0].message


def test_what_was_saved_as_one_value_is_written_by_torch(tmp_path: Path) -> None:
    whole = dcp.DefaultSavePlanner(flatten_state_dict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": {"w": GRID}}, checkpoint_id=tmp_path / "in", no_dist=True, planner=whole)
    (problem,) = refused(lambda: api.plan(tmp_path / "in")).problems
    assert problem.kind == "unknown-family" and "it holds no tensors" in problem.message
    assert problem.hint and f"format_utils dcp_to_torch {tmp_path / 'in'} OUT.pt`" in problem.hint
