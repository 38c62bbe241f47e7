"""TensorFlow's bundles: read without TensorFlow, and written byte for byte as it writes them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tool.checkpoint import open_checkpoint
from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.crc32c import MULTIPLES, combine_c, crc32c, masked, unmasked
from ckpt_tool.checkpoint.tf_bundle import BundleFile
from ckpt_tool.checkpoint.tf_bundle_writer import Content, write_bundle
from ckpt_tool.checkpoint.tf_coding import Box, object_path, slice_key
from ckpt_tool.checkpoint.tf_table import entries, table

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
