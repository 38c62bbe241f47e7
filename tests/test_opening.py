"""What `open_checkpoint` takes from a folder or a file, and what it says about everything else."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from ckpt_tool.checkpoint.archive import around
from ckpt_tool.checkpoint.base import KEPT_JSON, Checkpoint, Document
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.folders import Directory
from ckpt_tool.checkpoint.no_weights import refuse, weight_folders
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.safetensors import index_document
from ckpt_tool.checkpoint.weight_sets import Prefer
from ckpt_tool.checkpoint.zip_reader import ZipArchive
from ckpt_tool.errors import CkptToolError, Problem

REAL = Path(__file__).parents[1].parent / "shared" / "real" / "aidreams260K"


def tensors(*names: str) -> dict[str, np.ndarray]:
    return {name: np.arange(6, dtype=np.float32).reshape(2, 3) + len(name) for name in names}


def torch_bytes(*names: str, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    state = {n: torch.from_numpy(a) for n, a in tensors(*names).items()}
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def safe_bytes(*names: str) -> bytes:
    return safetensors.numpy.save(tensors(*names))


def fill(folder: Path, **files: bytes) -> Path:
    """A folder with files; `__` in a keyword stands for `.`, use a dict for other names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def refused(path: Path | str, *, prefer: Prefer | None = None) -> tuple[Problem, ...]:
    with pytest.raises(CkptToolError) as caught:
        open_checkpoint(path, prefer=prefer).close()
    assert caught.value.exit_code == 2
    return caught.value.problems


def read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.read(checkpoint.find(name)[0]).view("<f4")


PTH = torch_bytes("a", "norm")
SAFE = safe_bytes("a", "norm")


@pytest.mark.parametrize(
    ("content", "format"),
    [(PTH, "torch-zip"), (torch_bytes("a", "norm", legacy=True), "torch-legacy"), (SAFE, "safetensors")],
)
def test_a_file_is_known_by_its_content(tmp_path: Path, content: bytes, format: str) -> None:
    fill(tmp_path, **{"weights.xyz": content, "params.json": b'{"dim": 3}'})
    with open_checkpoint(tmp_path / "weights.xyz") as checkpoint:
        assert [f.format for f in checkpoint.files.values()] == [format]
        assert checkpoint.json("params.json") == {"dim": 3}
        for name, array in tensors("a", "norm").items():
            np.testing.assert_array_equal(read(checkpoint, name), array)
        checkpoint.check_unchanged()


def test_shards_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    fill(tmp_path, **{f"consolidated.{i:02d}.pth": PTH for i in range(12)})
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.files) == [f"consolidated.{i:02d}.pth" for i in range(12)]
        assert len(checkpoint.find("a")) == 12
    fill(tmp_path / "b", **{f"consolidated.{i}.pt": PTH for i in range(12)})
    with open_checkpoint(tmp_path / "b") as checkpoint:
        assert list(checkpoint.files) == [f"consolidated.{i}.pt" for i in range(12)]


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["consolidated.01.pth", "consolidated.02.pth"], ["consolidated.00.pth"]),
        (["consolidated.00.pth", "consolidated.02.pth"], ["consolidated.01.pth"]),
        (["consolidated.00.pt", "consolidated.03.pt"], ["consolidated.01.pt", "consolidated.02.pt"]),
        (["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"], ["model-00003-of-00003"]),
        (["consolidated-00002-of-00002.safetensors"], ["consolidated-00001-of-00002.safetensors"]),
        (["pytorch_model-00001-of-00002.bin"], ["pytorch_model-00002-of-00002.bin"]),
        (["model-00000-of-00003.safetensors", "model-00002-of-00003.safetensors"], ["model-00001-of-00003"]),
        (["model-00000-of-00002.safetensors", "model-00002-of-00002.safetensors"], ["model-00001-of-00002"]),
    ],
)
def test_missing_shards_are_named(tmp_path: Path, names: list[str], missing: list[str]) -> None:
    fill(tmp_path, **{name: SAFE if name.endswith(".safetensors") else PTH for name in names})
    for path in (tmp_path, tmp_path / names[0]):
        (problem,) = refused(path)
        assert problem.kind == "missing-shard"
        assert all(name in problem.message for name in missing)
        assert not any(name in problem.message for name in names)


@pytest.mark.parametrize("form", ["model-{:05d}-of-00002.safetensors", "pytorch_model-{:05d}-of-00002.bin"])
@pytest.mark.parametrize("count", [2, 3], ids=["how many there are", "the last of them"])
def test_shards_may_be_counted_from_0(count: int, form: str, tmp_path: Path) -> None:
    """With their last number in the names as of openai/gpt-oss-20b, or with how many there are."""
    content = safe_bytes if form.startswith("model") else torch_bytes
    names = [form.format(k) for k in range(count)]
    fill(tmp_path, **{name: content(f"w{k}") for k, name in enumerate(names)})
    for path in (tmp_path, tmp_path / names[0]):
        with open_checkpoint(path) as checkpoint:
            assert list(checkpoint.files) == names
            assert checkpoint.names() == [f"w{k}" for k in range(count)]
    fill(tmp_path, **{form.format(4): content("w4")})
    (problem,) = (p for p in refused(tmp_path) if p.kind == "ambiguous-input")
    assert problem.message == f"expected shards up to {count - 1}, found number 4"


def test_the_publishers_checklist_tells_the_last_shard(tmp_path: Path) -> None:
    lines = "".join(
        f"{'0' * 32}  {n}\n" for n in ("consolidated.00.pth", "consolidated.01.pth", "params.json")
    )
    fill(tmp_path, **{"consolidated.00.pth": PTH, "checklist.chk": lines.encode()})
    (problem,) = refused(tmp_path)
    assert problem.kind == "missing-shard" and "consolidated.01.pth" in problem.message


@pytest.mark.parametrize(
    "names",
    [
        ["consolidated.00.pth", "consolidated.safetensors", "params.json"],
        ["consolidated.00.pth", "consolidated.00.pt"],
        ["consolidated.0.pth", "consolidated.00.pth"],
        ["consolidated.safetensors", "consolidated-00001-of-00001.safetensors"],
        ["consolidated.safetensors", "model.safetensors"],  # no params.json beside the original
        ["model-00001-of-00001.safetensors", "model-00001-of-00002.safetensors"],
        ["model.safetensors", "model-00001-of-00001.safetensors"],
    ],
)
def test_two_sets_side_by_side_are_ambiguous(tmp_path: Path, names: list[str]) -> None:
    fill(tmp_path, **{n: SAFE if n.endswith(".safetensors") else PTH for n in names})
    assert refused(tmp_path)[0].kind == "ambiguous-input"


def shards(count: int, *names: str, folder: str = "") -> tuple[dict[str, bytes], bytes]:
    """Files of one tensor each, and their index."""
    files = {f"{folder}model-{k + 1:05d}-of-{count:05d}.safetensors": n for k, n in enumerate(names)}
    return {f: safe_bytes(n) for f, n in files.items()}, index_document({n: f for f, n in files.items()}, 48)


def test_of_two_sets_of_shards_the_index_or_a_named_file_says_which(tmp_path: Path) -> None:
    """Loaders go by the index."""
    (two, index), (three, _) = shards(2, "a", "b"), shards(3, "x", "y", "z")
    fill(tmp_path, **two, **three)
    (problem,) = refused(tmp_path)
    assert problem.message == "expected shards of one set, found sets of 2, 3 side by side"
    hint = "give one file of the set that is meant: --in FOLDER/model-00001-of-00002.safetensors"
    assert (problem.kind, problem.hint) == ("ambiguous-input", hint)
    for content in (None, index):
        if content is not None:
            (tmp_path / "model.safetensors.index.json").write_bytes(content)
        for files in (two, three):
            with open_checkpoint(tmp_path / [*files][-1]) as checkpoint:
                assert list(checkpoint.files) == list(files)
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.files) == list(two) and checkpoint.names() == ["a", "b"]
        left = "model-00001-of-00003.safetensors and 2 more left aside"
        assert f"{left}: model.safetensors.index.json does not list them" in checkpoint.notes
    (tmp_path / [*two][0]).unlink()  # then it says nothing of what is there
    assert [p.kind for p in refused(tmp_path)] == ["ambiguous-input"]


def test_an_index_may_list_files_in_folders_of_its_own(tmp_path: Path) -> None:
    """As transformers 5.24.0 reads them; not through a link, which may lead anywhere."""
    files, index = shards(2, "a", "b", folder="weights/step/")
    given = fill(tmp_path / "given", **files, **{"model.safetensors.index.json": index, "config.json": b"{}"})
    linked = tmp_path / "linked"
    linked.symlink_to(given)
    packed = shutil.make_archive(str(tmp_path / "around"), "zip", tmp_path, "given")
    for path in (given, linked, Path(packed), Path(shutil.make_archive(str(tmp_path / "in"), "tar", given))):
        with open_checkpoint(path) as checkpoint:
            assert list(checkpoint.files) == list(files) and checkpoint.names() == ["a", "b"]
            np.testing.assert_array_equal(read(checkpoint, "b"), tensors("b")["b"])
            assert "config.json" in checkpoint.documents
    for level in ("weights/step", "weights"):
        (given / level).rename(tmp_path / "outside")
        (given / level).symlink_to(tmp_path / "outside")
        (problem,) = refused(given)
        assert problem.message == "expected a folder weights/step, found a link"
        assert problem.kind == "bad-index" and problem.hint is not None
        (given / level).unlink()
        (tmp_path / "outside").rename(given / level)
    (given / [*files][1]).unlink()
    (problem,) = refused(given)
    assert problem.message == f"expected {[*files][1]}, found no such file"


def test_folders_that_an_index_lists_and_are_not_there_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index of 64 MiB may list millions of them."""
    files, index = shards(2, "a", "b", folder="weights/")
    listed = json.loads(index)
    listed["weight_map"] |= {f"t{k}": f"x{k}/model.safetensors" for k in range(5)}
    fill(tmp_path, **files, **{"model.safetensors.index.json": json.dumps(listed).encode()})
    asked: list[str] = []
    monkeypatch.setattr(Directory, "is_link", lambda self, name: bool(asked.append(name)))
    assert [p.message for p in refused(tmp_path)] == [
        f"expected x{k}/model.safetensors, found no such file" for k in range(5)
    ]
    assert {*asked} == {"weights"}


class Passes(list[str]):
    """Paths that count how often someone goes through them."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        self.count += 1
        return super().__iter__()

    def __contains__(self, path: object) -> bool:
        self.count += 1
        return super().__contains__(path)


def test_paths_of_many_folders_are_gone_through_as_often_as_those_of_few() -> None:
    """An archive may have a hundred thousand."""
    names = (
        "consolidated/shard-00001-model-00001-of-00001.safetensors",
        *(".metadata", "saved_model.pb", "x.data-00000-of-00001"),
    )
    passes = []
    for count in (3, 30):
        paths = [f"run{k}/{name}" for k in range(count) for name in names]
        looked, told = Passes(paths), Passes(paths)
        assert len(weight_folders(looked)) == count
        with pytest.raises(CkptToolError):
            refuse(told, around("x.zip"))
        passes.append((looked.count, told.count))
    assert passes[0] == passes[1]


def test_weights_beside_the_folder_original_are_told_to_be_left(tmp_path: Path) -> None:
    inner = {"original/consolidated.00.pth": PTH, "original/params.json": b'{"dim": 1}'}
    fill(tmp_path, **inner, **{"model.safetensors": SAFE, "config.json": b"{}"})
    note = "model.safetensors beside original/ left aside: to read those, give one of the files"
    for path, prefer, told in ((tmp_path, "original", True), (tmp_path, "hf", False)):
        with open_checkpoint(path, prefer=prefer) as checkpoint:
            assert (note in checkpoint.notes) == told
    with open_checkpoint(tmp_path / "model.safetensors", prefer="original") as checkpoint:
        assert list(checkpoint.files) == ["model.safetensors"]


def test_naming_a_file_settles_the_ambiguity(tmp_path: Path) -> None:
    fill(
        tmp_path, **{"consolidated.00.pth": PTH, "consolidated.01.pth": PTH, "consolidated.safetensors": SAFE}
    )
    with open_checkpoint(tmp_path / "consolidated.safetensors") as checkpoint:
        assert list(checkpoint.files) == ["consolidated.safetensors"]
    with open_checkpoint(tmp_path / "consolidated.01.pth") as checkpoint:
        assert list(checkpoint.files) == ["consolidated.00.pth", "consolidated.01.pth"]
        assert any("all were opened" in note for note in checkpoint.notes)


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """As Mistral's repositories are: the original, and the same converted."""
    converted = {f"model-0000{i}-of-00002.safetensors": safe_bytes(f"model.{i}") for i in (1, 2)}
    weight_map = {f"model.{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    index = index_document(weight_map, 48)
    return fill(
        tmp_path / "hub",
        **{"consolidated.safetensors": SAFE, "params.json": b"{}", "config.json": b"{}"},
        **{
            "tekken.json": b"{}",
            "tokenizer.json": b"{}",
            "tokenizer.model.v3": b"x",
            "adapter.safetensors": b"x",
        },
        **{"model.safetensors.index.json": index, **converted},
    )


def test_the_original_is_taken_from_a_hub_repository(hub_folder: Path) -> None:
    with open_checkpoint(hub_folder) as checkpoint:
        assert list(checkpoint.files) == ["consolidated.safetensors"]
        assert any("left aside" in note for note in checkpoint.notes)
        assert {"params.json", "config.json", "tekken.json", "tokenizer.json", "tokenizer.model.v3"} <= set(
            checkpoint.documents
        )
    with open_checkpoint(hub_folder, prefer="hf") as checkpoint:
        assert checkpoint.names() == ["model.1", "model.2"]


def test_safetensors_are_taken_before_pickles_of_the_same_model(tmp_path: Path) -> None:
    fill(tmp_path, **{"model.safetensors": SAFE, "pytorch_model.bin": PTH, "config.json": b"{}"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.files) == ["model.safetensors"]
        assert any("pytorch_model" in note for note in checkpoint.notes)


def test_the_folder_original_is_used_when_the_outer_has_no_weights(tmp_path: Path) -> None:
    inner = {"original/consolidated.00.pth": PTH, "original/params.json": b'{"dim": 1}'}
    fill(tmp_path, **inner, **{"original/tokenizer.model": b"x", "config.json": b"{}"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.files) == ["consolidated.00.pth"]
        assert checkpoint.json("params.json") == {"dim": 1}
        assert checkpoint.documents["tokenizer.model"].read() == b"x"
    fill(tmp_path, **{"model.safetensors": SAFE})
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.files) == ["model.safetensors"]
        assert "original/params.json" in checkpoint.documents
        assert any("original/" in note for note in checkpoint.notes)
    with open_checkpoint(tmp_path, prefer="original") as checkpoint:
        assert list(checkpoint.files) == ["consolidated.00.pth"]


def test_the_tokenizer_one_level_up_is_found(tmp_path: Path) -> None:
    fill(tmp_path, **{"7B/consolidated.00.pth": PTH, "7B/params.json": b"{}", "tokenizer.model": b"up"})
    with open_checkpoint(tmp_path / "7B") as checkpoint:
        assert checkpoint.documents["tokenizer.model"].read() == b"up"
        assert any("tokenizer.model" in note for note in checkpoint.notes)
    fill(tmp_path / "7B", **{"tokenizer.model": b"own"})
    with open_checkpoint(tmp_path / "7B") as checkpoint:
        assert checkpoint.documents["tokenizer.model"].read() == b"own"


def test_a_converted_folder_takes_no_tokenizer_from_outside(tmp_path: Path) -> None:
    fill(tmp_path, **{"out/model.safetensors": SAFE, "out/config.json": b"{}", "tokenizer.model": b"up"})
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert "tokenizer.model" not in checkpoint.documents


def edit_index(folder: Path, change: Callable[[dict[str, str]], object], total: int = 48) -> None:
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_bytes())["weight_map"]
    change(weight_map)
    path.write_bytes(index_document(weight_map, total))


@pytest.mark.parametrize(
    ("change", "total"),
    [
        (lambda m: m.update({"x": "model-00009-of-00009.safetensors"}), 48),
        (lambda m: m.update({"x": "../outside.safetensors"}), 48),
        (lambda m: m.pop("model.1"), 48),  # which leaves its file unlisted
        (lambda m: m.update({"model.2": "model-00001-of-00002.safetensors"}), 48),
        (lambda m: m.update({"x": "model-00001-of-00002.safetensors"}), 48),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    hub_folder: Path, change: Callable[[dict[str, str]], object], total: int
) -> None:
    edit_index(hub_folder, change, total)
    assert {p.kind for p in refused(hub_folder, prefer="hf")} == {"bad-index"}


def test_an_index_with_another_total_is_noted(hub_folder: Path) -> None:
    edit_index(hub_folder, lambda m: None, 49)
    with open_checkpoint(hub_folder, prefer="hf") as checkpoint:
        (note,) = checkpoint.readings
        assert "total_size says 49, the tensors have 48" in note


def test_an_index_without_its_files_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, **{"model.safetensors.index.json": index_document({"a": "x.safetensors"}, 1)})
    assert refused(tmp_path)[0].kind == "bad-index"


def test_one_tensor_in_two_shards_without_an_index_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, **{f"consolidated-0000{i}-of-00002.safetensors": SAFE for i in (1, 2)})
    problems = refused(tmp_path)
    assert [(p.kind, p.where) for p in problems] == [("shard-conflict", "a"), ("shard-conflict", "norm")]


def test_all_damaged_files_are_reported_together(tmp_path: Path) -> None:
    fill(
        tmp_path,
        **{"consolidated.00.pth": PTH[:-1], "consolidated.01.pth": PTH, "consolidated.02.pth": b"<html>"},
    )
    assert [(p.kind, p.file) for p in refused(tmp_path)] == [
        ("truncated", "consolidated.00.pth"),
        ("wrong-format", "consolidated.02.pth"),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html><body>Access denied", "a web page"),
        (b"\n  <HTML>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git-lfs"),
        (b"GGUF\x03\0\0\0" + bytes(60), "GGUF"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5"),
        (b"\x93NUMPY\x01\0" + bytes(60), "numpy"),
        (b"\x08\x07\x12\x07pytorch\x1a\x05" + bytes(60), "ONNX"),
        (b"\x80\x04}\x94.", "a pickle that is not a torch file"),
        (b'{"error": "Repository not found"}', "JSON"),
        (b"404: not found", "404: not found"),
        (bytes(5000), "zeros"),
        (b"\xde\xad\xbe\xef" * 8, "de ad be ef"),
        (b"%PDF-1.7", "PDF"),
        (b"\xfd7zXZ\0" + bytes(20), "xz"),
    ],
)
def test_other_things_are_called_by_name(tmp_path: Path, content: bytes, says: str) -> None:
    fill(tmp_path, **{"consolidated.00.pth": content})
    for path in (tmp_path, tmp_path / "consolidated.00.pth"):
        (problem,) = refused(path)
        assert (problem.kind, problem.file) == ("wrong-format", "consolidated.00.pth")
        assert says in problem.message


def test_an_lfs_pointer_comes_with_what_to_do(tmp_path: Path) -> None:
    fill(tmp_path, **{"model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"})
    assert "git lfs pull" in (refused(tmp_path)[0].hint or "")


def test_torchscript_and_numpy_archives_are_called_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    assert "numpy" in refused(tmp_path / "w.npz")[0].message
    import zipfile

    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"m/{name}", b"x")
    assert "TorchScript" in refused(tmp_path / "script.pt")[0].message


@pytest.mark.parametrize(
    "content", [PTH, SAFE, torch_bytes("a", legacy=True)], ids=["zip", "safetensors", "legacy"]
)
@pytest.mark.parametrize("part", [1, 2, 0.01, 0.25, 0.5, 0.99, -1])
def test_a_cut_file_is_truncated(tmp_path: Path, content: bytes, part: float) -> None:
    size = int(part) if part in (1, 2, -1) else int(len(content) * part)
    name = "model.safetensors" if content is SAFE else "consolidated.00.pth"
    fill(tmp_path, **{name: content[:size]})
    (problem,) = refused(tmp_path)
    assert (problem.kind, problem.file) == ("truncated", name)


@pytest.mark.parametrize(
    "content", [PTH, SAFE, torch_bytes("a", legacy=True)], ids=["zip", "safetensors", "legacy"]
)
def test_junk_after_the_end_is_refused(tmp_path: Path, content: bytes) -> None:
    fill(tmp_path, **{"x": content + b"junk" * 100})
    assert refused(tmp_path / "x")[0].kind == "trailing-data"


def test_special_files_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "a FIFO" in refused(tmp_path / "fifo")[0].message
    assert "a character device" in refused("/dev/zero")[0].message
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s"))
        assert "a socket" in refused(tmp_path / "s")[0].message
    os.mkfifo(tmp_path / "consolidated.00.pth")
    (problem,) = refused(tmp_path)
    assert (problem.kind, problem.file) == ("wrong-format", "consolidated.00.pth")


def test_a_fifo_among_the_documents_is_not_opened(tmp_path: Path) -> None:
    fill(tmp_path, **{"model.safetensors": SAFE})
    os.mkfifo(tmp_path / "config.json")
    assert refused(tmp_path)[0].file == "config.json"


@pytest.mark.parametrize("path", ["nothing", "nothing/inside", "file/inside"])
def test_a_missing_path_is_not_found(tmp_path: Path, path: str) -> None:
    fill(tmp_path, file=b"x")
    assert refused(tmp_path / path)[0].kind == "not-found"


def test_links_are_followed_and_loops_refused(tmp_path: Path) -> None:
    fill(tmp_path / "real", **{"consolidated.00.pth": PTH})
    (tmp_path / "link").symlink_to("real")
    with open_checkpoint(tmp_path / "link") as checkpoint:
        assert any(str(tmp_path / "real") in note for note in checkpoint.notes)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert refused(tmp_path / "a")[0].kind == "bad-input"
    (tmp_path / "dangling").symlink_to("gone")
    assert refused(tmp_path / "dangling")[0].kind == "bad-input"
    fill(tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").symlink_to("../a")
    assert refused(tmp_path / "hub")[0].kind == "bad-input"


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_impossible_paths_are_bad_input(path: str) -> None:
    assert refused(path)[0].kind == "bad-input"


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    fill(tmp_path, **{"params.json": b"{}", "weights.dat": SAFE})
    (problem,) = refused(tmp_path)
    assert problem.kind == "wrong-format" and "consolidated" in problem.message


def test_odd_names_in_any_container_are_refused(tmp_path: Path) -> None:
    for name in ("", "a\x1b[0m", "__metadata__", "x" * 600, "a\u202eb"):
        buffer = io.BytesIO()
        torch.save({name: torch.zeros(1)}, buffer)
        fill(tmp_path, **{"x.pth": buffer.getvalue()})
        assert refused(tmp_path / "x.pth")[0].kind == "bad-name"


def test_no_file_stays_open_after_a_refusal(hub_folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fill(hub_folder, **{"model-00002-of-00002.safetensors": SAFE[:-1]})
    for prefer in ("hf", None):
        with open_checkpoint(hub_folder) as checkpoint:
            checkpoint.check_unchanged()
        if prefer:
            refused(hub_folder, prefer="hf")
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_many_open_files_is_one_line(tmp_path: Path) -> None:
    import resource

    fill(tmp_path, **{f"consolidated.{i:02d}.pth": PTH for i in range(40)})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, hard))
    try:
        problems = refused(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {p.kind for p in problems} == {"limits"}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real checkpoint is not beside the repository")
def test_a_real_checkpoint_opens() -> None:
    with open_checkpoint(REAL) as checkpoint:
        assert checkpoint.json("params.json")["dim"] == 64
        (info,) = checkpoint.find("tok_embeddings.weight")
        assert (info.shape, info.dtype) == ((512, 64), "F32")
        assert np.isfinite(read(checkpoint, "tok_embeddings.weight")).all()


# --- once -----------------------------------------------------------------------------------------------


def test_each_zip_is_opened_once_and_its_directory_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published file has up to 10,000 entries, a training state more: reading them again is seconds."""
    opened, read_directory = [], ZipArchive.__init__

    def count(self: ZipArchive, source: ByteRange) -> None:
        opened.append((source.name, source.base))
        read_directory(self, source)

    monkeypatch.setattr(ZipArchive, "__init__", count)
    folder = fill(tmp_path / "f", **{f"consolidated.0{k}.pth": torch_bytes("x") for k in range(2)})
    single = fill(tmp_path / "s", **{"model.pt": torch_bytes("x")}) / "model.pt"
    with zipfile.ZipFile(tmp_path / "around.zip", "w") as around:
        around.write(single, "release/consolidated.00.pth")
    for path, files in ((folder, 2), (single, 1), (tmp_path / "around.zip", 2)):
        opened.clear()
        before = len(os.listdir("/proc/self/fd"))
        open_checkpoint(path).close()
        assert len(opened) == len(set(opened)) == files, path
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("named", [False, True])
def test_an_index_of_which_some_files_are_there_is_refused(named: bool, tmp_path: Path) -> None:
    """Six digits are no pattern of numbers: the index alone says what belongs together."""
    one, two = (f"model-00000{i}-of-000002.safetensors" for i in (1, 2))
    index = index_document({"a": one, "norm": one, "b": two}, 1)
    fill(tmp_path, **{"model.safetensors.index.json": index, one: SAFE})
    (problem,) = refused(tmp_path / one if named else tmp_path)
    assert (problem.kind, problem.message) == ("bad-index", f"expected {two}, found no such file")


def test_a_document_says_to_all_what_it_said_first(tmp_path: Path) -> None:
    """Its few values are kept, and why there are none; each who asks has an object of its own."""
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2.5, null, "\\u00e9"], "n": 1000000000000000000000000000000}')
    document = Document("config.json", path, path.stat().st_size)
    first = document.json()
    first["a"].clear()
    path.write_text("{}")
    assert document.json() == {"a": [1, 2.5, None, "é"], "n": 10**30}
    path.write_text("[]")
    wrong = Document("config.json", path, 2)
    said = []
    for _ in range(2):
        with pytest.raises(CkptToolError) as caught:
            wrong.json()
        said.append(caught.value.problems)
        path.unlink(missing_ok=True)
    assert said[0] == said[1] and said[0][0].kind == "bad-config"


def test_the_values_of_a_large_document_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": "' + "x" * KEPT_JSON + '"}')
    document = Document("config.json", path, path.stat().st_size)
    assert len(document.json()["a"]) == KEPT_JSON
    path.write_text('{"a": 1}')
    assert document.json() == {"a": 1}
