"""TensorFlow's bundles: read without TensorFlow, and written byte for byte as it writes them."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ckpt_tool import program
from ckpt_tool.checkpoint import open_checkpoint
from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.crc32 import IntervalCrc
from ckpt_tool.checkpoint.crc32c import MULTIPLES, combine_c, crc32c, masked, unmasked
from ckpt_tool.checkpoint.tf_bundle import BundleFile
from ckpt_tool.checkpoint.tf_bundle_writer import Content, write_bundle
from ckpt_tool.checkpoint.tf_coding import (
    Box,
    message_field,
    number_field,
    object_path,
    slice_key,
    to_varint,
)
from ckpt_tool.checkpoint.tf_entries import NUMBER_OF, Entry, _any, _entry, _usual
from ckpt_tool.checkpoint.tf_table import entries, table
from ckpt_tool.convert.execute import Outcome, execute
from ckpt_tool.convert.layout import Part, Step, parse_dims
from ckpt_tool.convert.plan import OutputFile, Plan
from ckpt_tool.convert.plan_checks import step_problems, told_apart
from ckpt_tool.convert.recognising import only_family
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import CkptToolError, Problem

ROOT = Path(__file__).parents[1]
CASES = Path(__file__).parents[2] / "shared" / "cases"


# --- checksums and spelling -----------------------------------------------------------------------------


def bitwise(data: bytes) -> int:
    """RFC 3720's checksum, one bit after another."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


CHECKS = {b"": 0, b"a": 0xC1D04330, b"123456789": 0xE3069283, bytes(32): 0x8A9136AA}
MASKED = {b"": 0xA282EAD8, b"a": 0x28E46E78, b"123456789": 0xC78AB0E5}


def test_crc32c_has_the_published_check_values() -> None:
    assert {data: crc32c(data) for data in CHECKS} == CHECKS
    assert {data: masked(crc32c(data)) for data in MASKED} == MASKED
    assert all(unmasked(masked(crc)) == crc for crc in (*CHECKS.values(), 0xFFFFFFFF, 1 << 31))


@given(st.binary(max_size=1500), st.integers(0, 40), st.integers(1, 60))
@settings(max_examples=40)
def test_crc32c_of_any_length_and_in_any_pieces(start: bytes, times: int, cut: int) -> None:
    data = start * times  # around the lengths at which each fold begins
    want = bitwise(data)
    assert crc32c(data) == want
    at = len(data) * cut // 61
    assert crc32c(data[at:], crc32c(data[:at])) == want
    assert combine_c(crc32c(data[:at]), crc32c(data[at:]), len(data) - at) == want


@given(
    st.lists(st.integers(0, 2**17), max_size=4),
    st.integers(0, 99_998),
    st.integers(0, 2**48),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_entries_are_read_alike_at_once_and_field_by_field(
    shape: list[int], shard: int, offset: int, crc: int
) -> None:
    entry = Entry(NUMBER_OF["F16"], tuple(shape), shard, offset, 2 * prod(shape), crc)
    message = entry.message()
    assert _usual(message) == _any(message) == _entry(message) == entry
    head, rest = message[:2], message[2:]
    for other in (rest + head, message + b"\x40\1", message + head, head + message):
        assert _usual(other) is None and _entry(other) == entry  # in another order, with more, a field twice
    assert _usual(b"\x08\x7d" + rest) is None  # a type that there is not


@given(st.data(), st.binary(min_size=9, max_size=400))
@settings(max_examples=40)
def test_crc32c_of_intervals_in_any_order(data: st.DataObject, content: bytes) -> None:
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, len(content) - 1), max_size=9))), len(content)]
    collector = IntervalCrc(combine_c)
    for start, stop in data.draw(st.permutations(list(pairwise(edges)))):
        collector.add(start, stop - start, crc32c(content[start:stop]))
    assert collector.value(len(content)) == crc32c(content)


def test_the_folding_polynomials_are_multiples_of_the_generator() -> None:
    generator = 0x11EDC6F41
    for exponents in MULTIPLES:
        rest = sum(1 << k for k in exponents)
        for k in range(rest.bit_length() - 1, 31, -1):
            rest ^= generator << (k - 32) if rest >> k & 1 else 0
        assert rest == 0 and exponents[-1] == 0


ORDERED = {
    64: "c040", 8191: "dfff", 8192: "e02000", 70001: "e11171", 1 << 20: "f0100000", 1 << 40: "fd0000000000"
}  # fmt: skip


def test_keys_of_slices_are_spelled_as_tensorflow_does() -> None:
    for number, spelled in ORDERED.items():
        assert slice_key("a", ((number, None),)).hex() == f"00610001{'0101'}{spelled}7f"
    assert slice_key("p/w", ((3, 2), (0, 2))).hex() == "00702f77000101028382" + "8082"
    assert slice_key("a\0\xff", ()).hex() == "0061" + "00ff" + "c3bf" + "0001" + "00"
    keys = [slice_key("w", ((n, 1),)) for n in (0, 1, 63, 64, 200, 8191, 8192, 1 << 30, 1 << 40)]
    assert keys == sorted(keys)


def test_paths_of_objects_are_unescaped_after_they_are_parted() -> None:
    end = "/.ATTRIBUTES/VARIABLE_VALUE"
    assert object_path(f"model/by_name/a..b{end}") == ("model", "by_name", "a.b")
    assert object_path(f"model/by_name/x.Sy{end}") == ("model", "by_name", "x/y")
    assert object_path(f"m/...S{end}") == ("m", "./")
    assert object_path("bert/embeddings/word_embeddings") is None


# --- TensorFlow's own bytes -----------------------------------------------------------------------------

TINY = bytes.fromhex(
    "00000608011a02080100130f626572742f656d62656464696e67732f706f7308011204120208022808353d33c8f410041577"
    "6f72640801120812020802120208032008281835c0db3d17000b0d676c6f62616c5f73746570080912002020280835bbd79f"
    "11000000000100000000f30f9464000000000100000000c0f2a1b000010268006d0000000001000000005e013bc972087f0e"
    "00000000000000000000000000000000000000000000000000000000000000000000000057fb808b247547db"
)
TINY_DATA = bytes.fromhex("0000c03f000000c0000000000000803f0000004000004040000080400000a0400700000000000000")
SLICED = bytes.fromhex(
    "00000608011a020801000c1300702f770001010280838082080112081202080312020802281835c0db3d1708041583828082"
    "08011208120208021202080220182810351f8265700804158582808208011208120208021202080220282810355a6e83b000"
    "032e702f770801120812020807120208023a080a0210030a0210023a0a0a04080310020a0210023a0a0a04080510020a0210"
    "0200000000010000000063b4d10f000000000100000000c0f2a1b000010371009f0100000000010000000002ca426ca40108"
    "b1010f0000000000000000000000000000000000000000000000000000000000000000000057fb808b247547db"
)
SLICED_DATA = bytes.fromhex(
    "000000000000803f0000004000004040000080400000a04000803b4500903b4500a03b4500b03b4500409c4500489c4500509c4500"
    "589c45"
)
SHARDED = bytes.fromhex(
    "00000608021a0208010001156108011208120208021202080218012810352337cbbb00010f620801120412020803280c3599"
    "413d0d000000000100000000660be314000000000100000000c0f2a1b000010263003d000000000100000000ebb6695a4208"
    "4f0e00000000000000000000000000000000000000000000000000000000000000000000000057fb808b247547db"
)
V1 = bytes.fromhex(
    "0000300a2e0a1a0a06626572742f7712081202080212020803180122040a000a000a0c0a0473746570120018092200120208"
    "01000f2c00626572742f7700010102807f807f122a0a06626572742f7712040a000a001a1a2a18000000000000803f000000"
    "4000004040000080400000a04001070f73746570000100120d0a047374657012001a03520107000000000100000000373a40"
    "85000000000100000000c0f2a1b00001030100920100000000010000000019027ed0970108a4010f00000000000000000000"
    "00000000000000000000000000000000000000000000000057fb808b247547db"
)


def put(folder: Path, **files: bytes) -> Path:
    """A bundle `p` of these files: `index`, `d0of1` and so on."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        end = "index" if name == "index" else f"data-0000{name[1]}-of-0000{name[4]}"
        (folder / f"p.{end}").write_bytes(content)
    return folder


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype="<f4")


def arrays(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {t.name: checkpoint.read(t).view(DTYPES[t.dtype].value or "<u2") for t in checkpoint}


def read_whole(file: BundleFile, tensor: TensorInfo) -> bytes:
    room = bytearray(tensor.nbytes)
    file.read_into(tensor.name, 0, memoryview(room))
    return bytes(room)


def test_tensorflows_bytes_are_read(tmp_path: Path) -> None:
    with open_checkpoint(put(tmp_path / "tiny", index=TINY, d0of1=TINY_DATA)) as tiny:
        found = arrays(tiny)
        assert found["bert/embeddings/pos"].tolist() == [1.5, -2.0]
        assert found["bert/embeddings/word"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert found["global_step"].tolist() == 7 and found["global_step"].dtype == "<i8"
        (file,) = tiny.files.values()
        crcs = {r.of: r.crc32c for r in file.records().values()}
        assert {n: masked(c or 0) for n, c in crcs.items()} == {
            "bert/embeddings/pos": 4106761021,
            "bert/embeddings/word": 389929920,
            "global_step": 295688123,
        }
    with open_checkpoint(put(tmp_path / "sliced", index=SLICED, d0of1=SLICED_DATA)) as sliced:
        rows = [[0, 1], [2, 3], [4, 5], [3000, 3001], [3002, 3003], [5000, 5001], [5002, 5003]]
        assert arrays(sliced)["p/w"].tolist() == rows
    files = {"index": SHARDED, "d0of2": bytes(12), "d1of2": b"\x00\x00\x80\x3f" * 4}
    with open_checkpoint(put(tmp_path / "sharded", **files)) as sharded:
        found = arrays(sharded)
        assert found["a"].tolist() == [[1, 1], [1, 1]] and found["b"].tolist() == [0, 0, 0]
        assert [t.file for t in sharded] == ["p.data-00000-of-00002", "p.data-00001-of-00002"]


def test_what_is_written_is_what_tensorflow_writes(tmp_path: Path) -> None:
    word = np.arange(6, dtype="<f4").reshape(2, 3)
    tensors = {
        "global_step": Content.of(np.array(7, "<i8"), "I64"),
        "bert/embeddings/word": Content.of(word, "F32"),
        "bert/embeddings/pos": Content.of(floats(1.5, -2), "F32"),
    }
    index, data = write_bundle(tmp_path / "tiny", tensors)
    assert index.read_bytes() == TINY and data.read_bytes() == TINY_DATA
    rows = floats(0, 1, 2, 3, 4, 5, 3000, 3001, 3002, 3003, 5000, 5001, 5002, 5003).reshape(7, 2)
    cut: dict[str, list[Box]] = {"p/w": [((0, 3), (0, 2)), ((3, 2), (0, 2)), ((5, 2), (0, 2))]}
    index, data = write_bundle(tmp_path / "sliced", {"p/w": Content.of(rows, "F32")}, slices=cut)
    assert index.read_bytes() == SLICED and data.read_bytes() == SLICED_DATA


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33, 9000])
def test_tables_of_any_length(count: int, tmp_path: Path) -> None:
    """Around the entries that stand whole, and over several blocks."""
    items = [(b"layer_%06d/kernel" % k, bytes([k % 251]) * 50) for k in range(count)]
    (tmp_path / "t").write_bytes(table(items))
    data = ByteRange(tmp_path / "t", "t")
    assert list(entries(data)) == items
    data.close()
    assert count < 9000 or (tmp_path / "t").stat().st_size > 2 * 262144


# --- files that TensorFlow wrote ------------------------------------------------------------------------


def expected(case: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Of a safetensors file, by its header alone: what holds complex numbers no library reads here."""
    raw = (case / "expected.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    found = {}
    for name, told in header.items():
        if name != "__metadata__":
            begin, end = (8 + size + at for at in told["data_offsets"])
            found[name] = (told["dtype"], told["shape"], raw[begin:end])
    return found


@pytest.fixture(params=["tf-plain", "tf-dtypes", "tf-shards", "tf-slices", "tf-object", "tf-keras"])
def case(request: pytest.FixtureRequest) -> Path:
    found = CASES / str(request.param)
    if not found.is_dir():
        pytest.skip(f"{found} is not there")
    return found


def bundle_files(checkpoint: Checkpoint) -> Iterator[BundleFile]:
    for file in checkpoint.files.values():
        assert isinstance(file, BundleFile)
        yield file


def held(checkpoint: Checkpoint) -> Mapping[str, tuple[str, list[int], bytes]]:
    """Every numeric tensor with its bytes, those of types that are not converted too."""
    found = {}
    for file in bundle_files(checkpoint):
        numbers = [t for t in file.others.values() if t.dtype == "complex64"]
        for t in (*file.tensors.values(), *numbers):
            dtype = "C64" if t in numbers else t.dtype
            found[t.name] = (dtype, list(t.shape), read_whole(file, t))
    return found


def test_a_file_of_tensorflow_comes_out_bit_for_bit(case: Path) -> None:
    (index,) = (case / "ckpt").glob("*.index")
    prefix = index.with_suffix("")
    ways = [case / "ckpt", prefix, index, next(index.parent.glob("*.data-00000-*"))]
    for way in ways:
        with open_checkpoint(way) as checkpoint:
            assert held(checkpoint) == expected(case)
            for file in bundle_files(checkpoint):
                assert all(file.check_record(key) for key in file.records())


def test_a_v1_checkpoint_is_named_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_bytes(V1)
    long = table([(b"", b"\x0a" + b"x" * 40_000)])
    (tmp_path / "long.ckpt").write_bytes(long)
    for name in ("old.ckpt", "long.ckpt"):
        problem = refused(tmp_path / name)
        assert problem.kind == "wrong-format" and "TensorFlow V1 checkpoint" in problem.message
        assert problem.hint is not None and "tf.train.load_checkpoint" in problem.hint
    (tmp_path / "weights").write_bytes(TINY)
    problem = refused(tmp_path / "weights")
    assert "the index of a TensorFlow checkpoint" in problem.message and "V1" not in problem.message


# --- which files are meant ------------------------------------------------------------------------------


def some(folder: Path, *prefixes: str) -> Path:
    folder.mkdir(exist_ok=True)
    for k, prefix in enumerate(prefixes):
        write_bundle(folder / prefix, {f"w{k}": Content.of(floats(k), "F32")})
    return folder


def names(path: Path) -> list[str]:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.names()


def test_of_several_prefixes_the_state_file_names_one(tmp_path: Path) -> None:
    folder = some(tmp_path / "run", "model.ckpt-1", "model.ckpt-2")
    problem = refused(folder)
    assert problem.kind == "ambiguous-input" and "model.ckpt-1, model.ckpt-2" in problem.message
    state = folder / "checkpoint"
    for text, meant in (
        ('model_checkpoint_path: "/home/author/run/model.ckpt-2"\nall_model_checkpoint_paths: "x"\n', "w1"),
        ('model_checkpoint_path: "model.ckpt-1"\n', "w0"),
    ):
        state.write_text(text)
        with open_checkpoint(folder) as checkpoint:
            assert checkpoint.names() == [meant]
            assert any("which the file `checkpoint` names" in note for note in checkpoint.notes)
    state.write_text('model_checkpoint_path: "/elsewhere/model.ckpt-3"\n')
    assert refused(folder).kind == "ambiguous-input"
    assert names(folder / "model.ckpt-1") == names(folder / "model.ckpt-1.index") == ["w0"]


def test_other_weights_in_the_folder_come_first(tmp_path: Path) -> None:
    folder = some(tmp_path / "repository", "bert_model.ckpt")
    save_file({"x": np.zeros(3, np.float32)}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.names() == ["x"]
        assert "the TensorFlow checkpoint bert_model.ckpt was left aside" in checkpoint.notes
    with open_checkpoint(folder, prefer="original") as checkpoint:
        assert checkpoint.names() == ["w0"]


@pytest.mark.parametrize("kind", ["zip", "gztar", "tar"])
def test_in_an_archive_as_they_are_published(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    folder = some(tmp_path / "in" / "uncased", "bert_model.ckpt")
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "bert_model.ckpt.meta").write_bytes(b"graph" * 100)
    archive = shutil.make_archive(str(tmp_path / "model"), kind, tmp_path / "in")
    with open_checkpoint(archive) as checkpoint:
        assert arrays(checkpoint)["w0"].tolist() == [0] and list(checkpoint.documents) == ["vocab.txt"]
        (file,) = checkpoint.files.values()
        assert file.check_record("w0")


def test_a_data_file_is_missed_by_whoever_wants_it(tmp_path: Path) -> None:
    tensors = {f"w{k}": Content.of(floats(k, k), "F32") for k in range(3)}
    cut: list[Box] = [((k, 1), (0, None)) for k in range(3)]
    tensors["emb"] = Content.of(floats(1, 2, 3, 4, 5, 6).reshape(3, 2), "F32")
    paths = write_bundle(tmp_path / "p", tensors, shards=3, slices={"emb": cut})
    assert len(paths) == 4
    paths[2].unlink()
    with open_checkpoint(tmp_path) as checkpoint:
        (note,) = [n for n in checkpoint.notes if "not there" in n]
        assert note == "p.data-00001-of-00003 is not there: 2 tensors or slices in it cannot be read"
        lost = [t.name for t in checkpoint if checkpoint.files[t.file].absent(t.name)]
        assert sorted(lost) == ["emb", "w1"]
        assert checkpoint.read(checkpoint.find("w0")[0]).view("<f4").tolist() == [0, 0]
        for name in lost:
            with pytest.raises(CkptToolError, match="p.data-00001-of-00003"):
                checkpoint.read(checkpoint.find(name)[0])
    for path in paths[1:]:
        path.unlink(missing_ok=True)
    assert refused(tmp_path / "p.index").kind == "wrong-format"


# --- carried over ---------------------------------------------------------------------------------------


def one(name: str, source: str, target: str, dims: str, out: str, **sizes: int) -> Step:
    return Step(
        tuple(sizes.items()),
        (Part(source, name, "F32", parse_dims(dims), ()),),
        (Part(target, name, "F32", parse_dims(out), ()),),
    )


def carried(source: Path, out: Path, outputs: tuple[str, ...], format: str, *steps: Step) -> Outcome:
    infos = [TensorInfo(p.name, p.dtype, p.shape(s.sizes), p.file) for s in steps for p in s.targets]
    files = tuple(OutputFile(n, format, tuple(t for t in infos if t.file == n)) for n in outputs)
    plan = Plan("test", "to-hf", steps, files, (), {})
    with open_checkpoint(source) as checkpoint:
        return execute(plan, checkpoint, out)


DATA_FILE = "p.data-00000-of-00001"


def test_a_bundle_is_converted_and_made_again(tmp_path: Path) -> None:
    """Transposed and cut rows, in several chunks, a partitioned variable, and back to the same bytes."""
    rng = np.random.default_rng(3)
    kernel, table_ = rng.normal(size=(700, 300)).astype("<f4"), rng.normal(size=(900, 200)).astype("<f4")
    tensors = {"a/kernel": Content.of(kernel, "F32"), "b/table": Content.of(table_, "F32")}
    (tmp_path / "in").mkdir()
    write_bundle(tmp_path / "in" / "p", {**tensors, "adam_m": Content.of(kernel, "F32")})
    there = (
        one("a/kernel", DATA_FILE, "model.safetensors", "r c", "c r", r=700, c=300),
        one("b/table", DATA_FILE, "model.safetensors", "r c", "r c", r=900, c=200),
    )
    carried(tmp_path / "in", tmp_path / "hf", ("model.safetensors",), "safetensors", *there)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert np.array_equal(found["a/kernel"], kernel.T) and np.array_equal(found["b/table"], table_)
    names = ("p.data-00000-of-00002", "p.data-00001-of-00002")
    back = (
        one("a/kernel", "model.safetensors", names[1], "c r", "r c", r=700, c=300),
        one("b/table", "model.safetensors", names[0], "r c", "r c", r=900, c=200),
    )
    outcome = carried(tmp_path / "hf", tmp_path / "tf", names, "tf-bundle", *back)
    listed = {d["file"] for d in outcome.manifest["documents"]}
    assert listed == {"p.index"}
    with open_checkpoint(tmp_path / "tf") as checkpoint:
        assert np.array_equal(arrays(checkpoint)["a/kernel"], kernel)
        assert all(f.check_record(key) for f in checkpoint.files.values() for key in f.records())
        assert [t.file for t in checkpoint] == ["p.data-00000-of-00002", "p.data-00001-of-00002"]


@pytest.mark.parametrize("dims", ["r c", "c r"])
@pytest.mark.parametrize("sliced", [False, True])
def test_a_flipped_bit_stops_a_conversion(dims: str, sliced: bool, tmp_path: Path) -> None:
    """Read in order and not, whole and in slices; in a tensor that is not wanted it is not looked for."""
    (tmp_path / "in").mkdir()
    kernel = Content.of(np.random.default_rng(3).normal(size=(700, 300)).astype("<f4"), "F32")
    cut: dict[str, list[Box]] = {"k": [((0, 700), (0, 100)), ((0, 700), (100, 200))]} if sliced else {}
    write_bundle(tmp_path / "in" / "p", {"k": kernel, "z": kernel}, slices=cut)
    data = tmp_path / "in" / DATA_FILE
    step = one("k", DATA_FILE, "model.safetensors", "r c", dims, r=700, c=300)
    outputs = ("model.safetensors",)
    with open(data, "r+b") as f:
        f.seek(840_000 + 5)  # of z
        f.write(b"\x55")
    carried(tmp_path / "in", tmp_path / "fine", outputs, "safetensors", step)
    with open(data, "r+b") as f:
        f.seek(300_001)
        f.write(b"\x55")
    with pytest.raises(CkptToolError) as caught:
        carried(tmp_path / "in", tmp_path / "out", outputs, "safetensors", step)
    (problem,) = caught.value.problems
    assert problem.kind == "checksum" and problem.where == "k" and problem.file == DATA_FILE
    assert ("from byte 280000 on, slice 2 of 2" if sliced else "from byte 0 on") in problem.message
    assert "CRC-32C" in problem.message and not (tmp_path / "out").exists()


def test_planning_names_the_data_file_that_a_tensor_needs(tmp_path: Path) -> None:
    tensors = {name: Content.of(floats(1, 2), "F32") for name in ("a", "b")}
    paths = write_bundle(tmp_path / "p", tensors, shards=2)
    paths[2].unlink()
    with open_checkpoint(tmp_path) as checkpoint:
        steps = {t.name: one(t.name, t.file, "", "r", "r", r=2) for t in checkpoint}
        for name, kinds in (("a", []), ("b", ["missing-shard"])):
            found = list(step_problems(Steps([steps[name]]), checkpoint))
            assert [p.kind for p in found] == kinds
            assert all(p.file == "p.data-00001-of-00002" and "which holds b," in p.message for p in found)


def test_what_is_no_number_is_shown_by_name_and_refused_where_it_is_claimed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [
        entry(b"c", message(type=8, shape=(2,), size=16)),
        entry(b"h", message(type=20, size=4, offset=16)),
    ]
    items += [entry(b"s", message(type=7, size=5, offset=20)), entry(b"w", message(offset=32))]
    folder = put(tmp_path / "in", index=forged(block(HEAD, *items)), d0of1=TINY_DATA)
    assert program.run(["inspect", str(folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "c (2,) complex64 is left out: of type complex64, which is not converted" in shown
    assert "h (2,) resource is left out" in shown and "s (2,) string is left out: text, no numbers" in shown
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.names() == ["w"]
        missing = [Problem("missing-tensor", "expected this tensor, found none", where=n) for n in "cx"]
        found = list(told_apart(missing, checkpoint))
    assert [(p.kind, p.where) for p in found] == [("unsupported-dtype", "c"), ("missing-tensor", "x")]
    assert found[0].message == "expected a dtype known here, found complex64" and found[0].file == DATA_FILE


def test_a_bundle_that_no_family_reads_is_named(tmp_path: Path) -> None:
    some(tmp_path / "names", "p")
    with open_checkpoint(tmp_path / "names") as checkpoint, pytest.raises(CkptToolError) as caught:
        only_family(checkpoint)
    assert caught.value.kind == "unknown-family" and "(a TensorFlow checkpoint)" in str(caught.value)
    (tmp_path / "objects").mkdir()
    names = [f"model/{n}/.ATTRIBUTES/VARIABLE_VALUE" for n in ("a..b", "x.Sy")]
    write_bundle(tmp_path / "objects" / "p", {n: Content.of(floats(1), "F32") for n in names})
    with open_checkpoint(tmp_path / "objects") as checkpoint, pytest.raises(CkptToolError) as caught:
        only_family(checkpoint)
    assert "TensorFlow 2 checkpoint of objects, named after attributes" in str(caught.value)


# --- damaged and hostile --------------------------------------------------------------------------------


def refused(path: Path) -> Problem:
    with pytest.raises(CkptToolError) as caught:
        open_checkpoint(path).close()
    assert caught.value.exit_code == 2
    return caught.value.problems[0]


def sealed(content: bytes, kind: int = 0) -> bytes:
    stored = content + bytes([kind])
    return stored + masked(crc32c(stored)).to_bytes(4, "little")


def entry(key: bytes, value: bytes, shared: int = 0) -> bytes:
    return to_varint(shared) + to_varint(len(key)) + to_varint(len(value)) + key + value


def block(*items: bytes, restarts: int = 1) -> bytes:
    return b"".join(items) + bytes(4) + restarts.to_bytes(4, "little")


def forged(content: bytes, *, kind: int = 0, handle: bytes | None = None, separator: bytes = b"zzz") -> bytes:
    """A table of one block, whose checksums are right whatever it says."""
    out = sealed(content, kind)
    place = to_varint(0) + to_varint(len(content)) if handle is None else handle
    index = sealed(block(entry(separator, place)))
    footer = to_varint(len(out)) + to_varint(8) + to_varint(len(out) + 13) + to_varint(len(index) - 5)
    return out + sealed(block()) + index + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


HEAD = entry(b"", bytes.fromhex("08011a020801"))


def message(**fields: object) -> bytes:
    """A BundleEntryProto of float32 by the names of its fields; `raw` is put after them."""
    told: dict[str, Any] = {
        "type": 1,
        "shape": (2,),
        "shard": 0,
        "offset": 0,
        "size": 8,
        "raw": b"",
        **fields,
    }
    dims = b"".join(message_field(2, number_field(1, n)) for n in told["shape"])
    made = number_field(1, told["type"]) + message_field(2, dims) + number_field(3, told["shard"])
    made += number_field(4, told["offset"]) + number_field(5, told["size"])
    return made + b"\x35" + bytes(4) + bytes(told["raw"])


def tensor(name: bytes = b"w", **fields: object) -> bytes:
    return forged(block(HEAD, entry(name, message(**fields))))


def extent(start: int, length: int) -> bytes:
    return message_field(1, number_field(1, start) + number_field(2, length))


def slices_of(
    *rows: tuple[int, int], keys: Sequence[tuple[int, int]] | None = None, **fields: object
) -> bytes:
    """`w` of 4 rows in these, the entries of which stand under `keys`."""
    raw = b"".join(message_field(7, extent(*r)) for r in rows)
    own = sorted({slice_key("w", (r,)): message(shape=(r[1],), size=4 * r[1], offset=4 * k, **fields)
                  for k, r in enumerate(rows if keys is None else keys)}.items())  # fmt: skip
    items = [entry(k, v) for k, v in own]
    return forged(block(HEAD, *items, entry(b"w", message(shape=(4,), size=0, raw=raw))))


TRUST = "bad-bundle"
HOSTILE: dict[str, tuple[bytes, str, str]] = {
    "a flipped byte in a block": (
        TINY[:20] + b"\xff" + TINY[21:],
        "checksum",
        "block of 109 bytes at byte 0",
    ),
    "a flipped checksum of a block": (TINY[:0x6E] + b"\0" + TINY[0x6F:], "checksum", "CRC-32C"),
    "a flipped byte in the index block": (TINY[:0x83] + b"\xff" + TINY[0x84:], "checksum", "at byte 127"),
    "a flipped byte in the footer": (TINY[:0x92] + b"\x72\xff" + TINY[0x94:], TRUST, "block"),
    "cut": (TINY[:100], "truncated", "the end of a table"),
    "cut to nothing": (TINY[:5], "truncated", "5 bytes"),
    "a place outside the file": (
        forged(block(HEAD), handle=to_varint(0) + to_varint(1 << 40)),
        TRUST,
        "within",
    ),
    "a place before the last": (forged(block(HEAD), handle=b"\xff" * 11), TRUST, "more than 10 bytes"),
    "a place of 64 bits": (forged(block(HEAD), handle=to_varint(-1) + to_varint(-1)), TRUST, "within"),
    "a billion restarts": (forged(block(HEAD, restarts=10**9)), TRUST, "found 1000000000"),
    "no room for restarts": (forged(b"\0\0\0"), TRUST, "at least 4 bytes"),
    "a key longer than the block": (
        forged(block(HEAD, to_varint(0) + to_varint(1 << 60) + b"\0")),
        TRUST,
        "within",
    ),
    "a value longer than the block": (
        forged(block(HEAD, b"\0\1" + to_varint(1 << 62) + b"w")),
        TRUST,
        "within",
    ),
    "a length of 11 bytes": (forged(block(HEAD, b"\xff" * 11)), TRUST, "more than 10 bytes"),
    "a length of 70 bits": (forged(block(HEAD, b"\xff" * 9 + b"\x7f\1\1w")), TRUST, "more than 64 bits"),
    "shared with no key": (forged(block(entry(b"x", b"", 9))), TRUST, "at most 0 shared bytes"),
    "keys in no order": (
        forged(block(HEAD, entry(b"b", message()), entry(b"a", message()))),
        TRUST,
        "`a` after `b`",
    ),
    "a key twice": (forged(block(HEAD, entry(b"a", message()), entry(b"a", message()))), TRUST, "in order"),
    "a key past its block's": (forged(block(HEAD, entry(b"zzzz", message()))), TRUST, "keys up to `zzz`"),
    "a key of a megabyte": (forged(block(HEAD, entry(b"w" * (1 << 20), b""))), TRUST, "at most 8192 bytes"),
    "a Snappy block": (forged(block(HEAD), kind=1), "unsupported", "Snappy"),
    "another compression": (forged(block(HEAD), kind=2), TRUST, "found 2"),
    "an empty table": (table([]), TRUST, "an empty table"),
    "no header": (forged(block(entry(b"w", message()))), TRUST, "the header of a bundle first"),
    "big-endian": (forged(block(entry(b"", b"\x08\x01\x10\x01"))), "unsupported-byteorder", "big-endian"),
    "a later version": (
        forged(block(entry(b"", bytes.fromhex("08011a0408021002")))),
        "unsupported",
        "found one for 2",
    ),
    "no data files": (forged(block(entry(b"", b""))), TRUST, "found 0"),
    "too many data files": (forged(block(entry(b"", b"\x08" + to_varint(1 << 40)))), TRUST, "data files"),
    "a header that is cut": (forged(block(entry(b"", b"\x1a\x7f"))), TRUST, "a field of 127 bytes"),
    "another data file": (tensor(shard=1), TRUST, "found number 1"),
    "an unknown type": (tensor(type=77), TRUST, "the type 77"),
    "a reference type": (tensor(type=101), TRUST, "the type 101"),
    "a size that does not fit": (tensor(size=12), TRUST, "12 bytes for float32 of shape (2,)"),
    "a product past 2^64": (tensor(shape=(1 << 40, 1 << 40)), TRUST, "2^56"),
    "a product that wraps to 8 bytes": (tensor(shape=(1 << 62, 6)), TRUST, "2^56"),
    "a negative size": (tensor(shape=(-1,)), TRUST, "a dimension of -1"),
    "300 axes": (tensor(shape=(1,) * 300), TRUST, "more than 64 dimensions"),
    "a place after the end": (tensor(offset=40), "truncated", "expected 48 bytes, found 40"),
    "a place of 2^63": (tensor(offset=(1 << 63) - 1), "truncated", "found 40"),
    "a wire type of a group": (tensor(raw=b"\x0b"), TRUST, "wire type 3"),
    "a field of another type": (tensor(raw=b"\x22\0"), TRUST, "field 4 as wire type 2"),
    "bytes of two tensors": (
        forged(block(HEAD, entry(b"a", message(offset=4)), entry(b"b", message(offset=8)))),
        TRUST,
        "that a has too",
    ),
    "a control character": (tensor(b"w\x1b[31mx"), "bad-name", "visible characters"),
    "a name in other bytes": (tensor(b"w\xff"), "bad-name", "UTF-8"),
    "slices that overlap": (slices_of((0, 3), (2, 2)), TRUST, "[0:3] and [2:4]"),
    "a hole between slices": (slices_of((0, 1), (2, 2)), TRUST, "expected a piece for [1:2]"),
    "a slice that is missing": (slices_of((0, 2), (2, 2), keys=[(0, 2)]), TRUST, "the slice [2:4] of [4]"),
    "a slice of nothing": (slices_of((0, 4), keys=[(0, 4), (1, 2)]), TRUST, "of another"),
    "a slice outside": (slices_of((0, 2), (3, 2)), TRUST, "inside [4]"),
    "a slice twice": (slices_of((0, 4), (0, 4)), TRUST, "[0:4]"),
    "a slice of another type": (slices_of((0, 4), type=3), TRUST, "int32"),
    "a slice of negative length": (slices_of((0, 4), (4, -1), keys=[(0, 4)]), TRUST, "has -1"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_broken_index_is_refused_by_name_and_in_little_memory(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, kind, words = HOSTILE[what]
    folder = put(tmp_path / "in", index=index, d0of1=TINY_DATA)
    tracemalloc.start()
    try:
        problem = refused(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert problem.kind == kind and words in problem.message, problem.line()
    assert problem.file in ("p.index", DATA_FILE) and peak < 20 << 20
    assert program.run(["inspect", str(folder)]) == 2
    told = capsys.readouterr()
    assert f"error[{kind}]" in told.err and "\x1b[31mx" not in told.out + told.err


@given(st.integers(0, len(SLICED) - 1), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_no_changed_byte_of_an_index_goes_unnoticed(at: int, change: int) -> None:
    """Every byte but the zeros that pad the footer is under a checksum, or leads to one."""
    with tempfile.TemporaryDirectory() as scratch:
        broken = SLICED[:at] + bytes([SLICED[at] ^ change]) + SLICED[at + 1 :]
        folder = put(Path(scratch) / "in", index=broken, d0of1=SLICED_DATA)
        try:
            with open_checkpoint(folder) as checkpoint:
                assert arrays(checkpoint)["p/w"].size == 14 and at >= len(SLICED) - 48
        except CkptToolError as error:
            assert error.exit_code == 2


def test_a_large_index_takes_little_memory_and_too_large_a_one_is_refused(tmp_path: Path) -> None:
    def listed(count: int) -> list[tuple[bytes, bytes]]:
        own = [(b"w%06d" % k, message(offset=0, size=0, shape=(0,))) for k in range(count)]
        return [(b"", bytes.fromhex("08011a020801")), *own]

    folder = put(tmp_path / "many", index=table(listed(50_001)), d0of1=b"")
    problem = refused(folder)
    assert problem.kind == "header-limit" and "50000" in problem.message


# --- TensorFlow as the judge ----------------------------------------------------------------------------


Read = dict[str, dict[str, tuple[str, list[int], str]]]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Read]:
    """A folder of bundles, TensorFlow's and ours, and what TensorFlow reads in each of them."""
    judge = ROOT / ".judges" / "tensorflow"
    if not (judge / "tensorflow").is_dir():
        pytest.skip("TensorFlow is not set up; `make test` does it where it can be installed")
    out = tmp_path_factory.mktemp("tensorflow")
    (out / "old.ckpt").write_bytes(V1)
    tensors = every_type()
    write_bundle(out / "ours", tensors)
    write_bundle(out / "shards", tensors, shards=3, slices={"grid": GRID})
    script = [sys.executable, str(Path(__file__).with_name("tensorflow_script.py")), str(out)]
    given_ = [str(out / name) for name in ("old.ckpt", "ours", "shards")]
    environment = {**os.environ, "PYTHONPATH": str(judge), "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run([*script, *given_], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return out, json.loads(run.stdout)


GRID: list[Box] = [((a, m), (b, n)) for a, m in ((0, 4), (4, 5)) for b, n in ((0, 3), (3, 1), (4, 3))]
OF_TENSORFLOW = ("saver-12", "raw", "many", "objects-1", "anew")


def every_type() -> dict[str, Content]:
    random = np.random.default_rng(5)
    made = {"grid": Content.of(random.normal(size=(9, 7)).astype("<f4"), "F32")}
    for dtype in (DTYPES[d] for d in NUMBER_OF):
        for name, shape in (("matrix", (3, 5)), ("scalar", ()), ("empty", (0, 4))):
            bits = random.integers(0, 2 if dtype.name == "BOOL" else 50, shape, dtype=dtype.bits)
            made[f"{dtype.name}/{name}"] = Content.of(np.asarray(bits), dtype.name)
    return made


@pytest.mark.parametrize("prefix", [*OF_TENSORFLOW, "ours", "shards"])
def test_tensorflow_and_we_read_the_same(prefix: str, judged: tuple[Path, Read]) -> None:
    out, read = judged
    with open_checkpoint(out / prefix) as checkpoint:
        found = {}
        for file in bundle_files(checkpoint):
            for t in (*file.tensors.values(), *file.others.values()):
                found[t.name] = (list(t.shape), read_whole(file, t).hex())
            assert all(file.check_record(key) for key in file.records())
        text = {t.tensor.name for t in checkpoint.left_out if t.tensor.dtype == "string"}
    assert found.keys() == read[prefix].keys()
    for name, (_, shape, content) in read[prefix].items():
        assert found[name][0] == shape and (name in text or found[name][1] == content), name


def test_tensorflow_reads_our_types_as_what_they_are(judged: tuple[Path, Read]) -> None:
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
    names |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    names |= {f"{s}{n}": f"{w}{n}" for s, w in (("I", "int"), ("U", "uint")) for n in (8, 16, 32, 64)}
    for prefix in ("ours", "shards"):
        types = {n: dtype for n, (dtype, _, _) in judged[1][prefix].items() if n != "grid"}
        assert types == {f"{d}/{s}": names[d] for d in NUMBER_OF for s in ("matrix", "scalar", "empty")}


def test_an_index_of_many_blocks_is_written_as_tensorflow_does(judged: tuple[Path, Read]) -> None:
    out, _ = judged
    with open_checkpoint(out / "many") as checkpoint:
        own = {t.name: Content(t.dtype, t.shape, partial(pieces_of, checkpoint, t)) for t in checkpoint}
        index, _ = write_bundle(out / "many-again", own)
    assert index.read_bytes() == (out / "many.index").read_bytes() and index.stat().st_size > 262144


def pieces_of(checkpoint: Checkpoint, tensor: TensorInfo) -> list[bytes]:
    return [checkpoint.read(tensor).tobytes()]
