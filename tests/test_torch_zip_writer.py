"""Torch zips written piece by piece: torch, zipfile and our own reader must all read them."""

import os
import random
import sys
import zipfile
import zlib
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.crc32 import combine
from ckpt_tool.checkpoint.torch_zip import open_torch_zip
from ckpt_tool.checkpoint.torch_zip_writer import TorchZipLayout
from ckpt_tool.checkpoint.zip_reader import ZipArchive
from ckpt_tool.errors import CkptToolError

Tensors = list[tuple[str, str, tuple[int, ...]]]


def contents(tensors: Tensors) -> dict[str, bytes]:
    rng = random.Random(11)
    made = {}
    for name, dtype, shape in tensors:
        size = prod(shape) * DTYPES[dtype].itemsize
        made[name] = bytes(rng.choices((0, 1), k=size)) if dtype == "BOOL" else rng.randbytes(size)
    return made


def write(path: Path, tensors: Tensors, data: dict[str, bytes]) -> TorchZipLayout:
    """Tensors first and in another order than laid out, then the headers."""
    layout = TorchZipLayout(tensors)
    with open(path, "wb") as target:
        for name, _, _ in reversed(tensors):
            os.pwrite(target.fileno(), data[name], layout.offsets[name])
        for at, piece in layout.finish({name: zlib.crc32(d) for name, d in data.items()}):
            os.pwrite(target.fileno(), piece, at)
    return layout


def assert_all_read(path: Path, tensors: Tensors, data: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
    file = open_torch_zip(path, path.name)
    assert list(file.tensors) == [name for name, _, _ in tensors]
    for mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert list(loaded) == list(file.tensors)
        for name, dtype, shape in tensors:
            info, tensor = file.tensors[name], loaded[name]
            assert (info.dtype, info.shape) == (dtype, shape)
            assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, DTYPES[dtype].torch), shape)
            assert tensor.is_contiguous() and not tensor.requires_grad
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == data[name]
            read = bytearray(info.nbytes)
            file.read_into(name, 0, memoryview(read))
            assert read == data[name]
    for record in file.records().values():
        assert file.check_record(record.key)
        assert record.offset % 64 == 0
    file.check_unchanged()
    file.close()


def test_every_dtype_and_odd_shapes(tmp_path: Path) -> None:
    tensors: Tensors = [(f"t.{name}", name, (3, 5, 2)) for name in DTYPES]
    tensors += [
        ("scalar", "BF16", ()),
        ("empty", "F32", (0, 7)),
        ("é", "U8", (1,)),
        ("ones", "F16", (1, 1, 300, 1)),
    ]
    data = contents(tensors)
    layout = write(tmp_path / "x.pth", tensors, data)
    assert (tmp_path / "x.pth").stat().st_size == layout.size
    assert_all_read(tmp_path / "x.pth", tensors, data)


@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 20), max_size=3).map(tuple)),
        max_size=6,
    ),
    stem=st.text("abc.é字", min_size=1, max_size=150),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_list_of_tensors(shapes: list[tuple[str, tuple[int, ...]]], stem: str, tmp_path: Path) -> None:
    tensors = [(f"{stem}{i}", dtype, shape) for i, (dtype, shape) in enumerate(shapes)]
    data = contents(tensors)
    layout = write(tmp_path / "x.pth", tensors, data)
    assert (tmp_path / "x.pth").stat().st_size == layout.size
    assert_all_read(tmp_path / "x.pth", tensors, data)


def test_pieces_and_tensors_tile_the_file() -> None:
    tensors: Tensors = [("a", "F32", (3,)), ("b", "I8", (1000,)), ("c", "F64", (0,)), ("d", "BF16", (5,))]
    layout = TorchZipLayout(tensors)
    runs = [(at, len(piece)) for at, piece in layout.finish(dict.fromkeys("abd", 1))]
    runs += [(layout.offsets[n], prod(s) * DTYPES[d].itemsize) for n, d, s in tensors]
    at = 0
    for start, size in sorted(run for run in runs if run[1]):
        assert start == at
        at += size
    assert at == layout.size


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    tensors: Tensors = [("a", "F32", (3,)), ("b", "F8_E4M3", (10,))]
    data = contents(tensors)
    for name in ("one", "two"):
        write(tmp_path / name, tensors, data)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_names_are_checked() -> None:
    with pytest.raises(CkptToolError) as caught:
        TorchZipLayout([("a\n", "F32", (1,)), ("", "F32", (1,))])
    assert [p.kind for p in caught.value.problems] == ["bad-name", "bad-name"]
    with pytest.raises(ValueError, match="twice"):
        TorchZipLayout([("a", "F32", (1,)), ("a", "F32", (1,))])


def zeros_crc(size: int) -> int:
    """The CRC-32 of `size` zero bytes, from its binary digits."""
    crc, block, length = 0, zlib.crc32(b"\0"), 1
    done = 0
    while size:
        if size & 1:
            crc = combine(crc, block, length) if done else block
            done += length
        block, length, size = combine(block, block, length), 2 * length, size >> 1
    return crc


def test_the_checksum_of_zeros() -> None:
    assert zeros_crc(1_000_003) == zlib.crc32(bytes(1_000_003))


@pytest.mark.skipif(sys.platform == "darwin", reason="needs sparse files")
def test_more_than_4_gib(tmp_path: Path) -> None:
    """One tensor larger than 4 GiB, and small ones that start beyond it; the file is sparse."""
    large = (1 << 31) + 40
    tensors: Tensors = [
        ("small", "F32", (3,)),
        ("large", "BF16", (large,)),
        ("late", "I64", (5,)),
        ("last", "I8", (0,)),
    ]
    layout = TorchZipLayout(tensors)
    late = bytes(range(40))
    crcs = {"small": zeros_crc(12), "large": zeros_crc(2 * large), "late": zlib.crc32(late)}
    path = tmp_path / "x.pth"
    with open(path, "wb") as target:
        target.truncate(layout.size)
        os.pwrite(target.fileno(), late, layout.offsets["late"])
        for at, piece in layout.finish(crcs):
            os.pwrite(target.fileno(), piece, at)
    assert path.stat().st_size == layout.size
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["large"].shape == (large,) and loaded["large"][-1] == 0
    assert loaded["late"].numpy().tobytes() == late
    with zipfile.ZipFile(path) as z:
        assert z.getinfo("archive/data/1").file_size == 2 * large
        assert crcs["large"] == z.getinfo("archive/data/1").CRC
        assert z.read("archive/data/2") == late
        assert z.read("archive/data/0") == bytes(12)
    file = open_torch_zip(path, "x.pth")
    assert file.check_record("2")
    assert file.extent("late") == (file.extent("small") or (0, 0))[:1] + (layout.offsets["late"],)
    read = bytearray(16)
    file.read_into("large", 2 * large - 16, memoryview(read))
    assert read == bytes(16)
    file.close()


def test_a_directory_of_more_than_65535_members(tmp_path: Path) -> None:
    tensors: Tensors = [(f"t{i}", "U8", (1,)) for i in range(65_540)]
    layout = TorchZipLayout(tensors)
    whole = bytearray(layout.size)
    for at, piece in layout.finish(dict.fromkeys((name for name, _, _ in tensors), zlib.crc32(b"\0"))):
        whole[at : at + len(piece)] = piece
    path = tmp_path / "x.pth"
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as z:
        assert len(z.namelist()) == 65_543
    archive = ZipArchive(ByteRange(path, "x.pth"))
    assert len(archive.members) == 65_543
    last = archive.members["archive/data/65539"]
    assert (last.data, last.size, last.crc32) == (layout.offsets["t65539"], 1, zlib.crc32(b"\0"))
