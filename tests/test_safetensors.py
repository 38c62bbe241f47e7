"""Our safetensors reader and layout against the library's, and files that only look right."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.safetensors import (
    SafetensorsLayout,
    index_document,
    open_safetensors,
    read_index,
)
from ckpt_tool.errors import CkptToolError, Problem

NUMPY_DTYPES = {name: d.value for name, d in DTYPES.items() if d.value is not None}
names = st.text('abcé.0/ "\\', min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensor_lists = st.lists(
    st.tuples(names, st.sampled_from(sorted(NUMPY_DTYPES)), shapes), max_size=6, unique_by=lambda t: t[0]
)


def arrays_for(tensors: list[tuple[str, str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(len(tensors))
    made = {}
    for name, dtype, shape in tensors:
        raw = random.integers(0, 2 if dtype == "BOOL" else 120, shape)
        made[name] = raw.astype(NUMPY_DTYPES[dtype])
    return made


def write_file(path: Path, layout: SafetensorsLayout, arrays: dict[str, np.ndarray]) -> None:
    data = bytearray(layout.size)
    for offset, piece in [*layout.header_writes(), *layout.finish({})]:
        data[offset : offset + len(piece)] = piece
    for name, array in arrays.items():
        data[layout.offsets[name] : layout.offsets[name] + array.nbytes] = array.tobytes()
    path.write_bytes(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
@given(tensor_lists)
def test_the_library_reads_what_the_layout_lays_out(
    tmp_path: Path, tensors: list[tuple[str, str, tuple[int, ...]]]
) -> None:
    arrays = arrays_for(tensors)
    layout = SafetensorsLayout(tensors)
    path = tmp_path / "ours.safetensors"
    write_file(path, layout, arrays)
    assert path.stat().st_size == layout.size
    assert len(layout.header) % 8 == 0
    told = json.loads(layout.header[8:])
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
    assert layout.header[8:] == text + b" " * (-len(text) % 8)  # no other than json's
    assert all(layout.offsets[n] % DTYPES[d].itemsize == 0 for n, d, _ in tensors)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    read = safetensors.numpy.load_file(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
@given(tensor_lists, st.data())
def test_reads_what_the_library_writes(
    tmp_path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], data: st.DataObject
) -> None:
    arrays = arrays_for(tensors)
    path = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    file = open_safetensors(path, "x.safetensors")
    try:
        assert file.metadata == {"format": "np"}
        assert {n: (t.dtype, t.shape) for n, t in file.tensors.items()} == {n: (d, s) for n, d, s in tensors}
        for name, array in arrays.items():
            expected = array.tobytes()
            start = data.draw(st.integers(0, len(expected)))
            buffer = bytearray(data.draw(st.integers(0, len(expected) - start)))
            file.read_into(name, start, memoryview(buffer))
            assert bytes(buffer) == expected[start : start + len(buffer)]
            descriptor, offset = file.extent(name)
            assert os.pread(descriptor, len(expected), offset) == expected
        file.check_unchanged()
    finally:
        file.close()


def pack(header: dict[str, Any] | bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = pack({"a": entry(0, 8, [2], "F32"), "b": entry(8, 12)}, bytes(range(12)))


def refused(tmp_path: Path, content: bytes, **options: Any) -> Problem:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CkptToolError) as caught:
        open_safetensors(path, "model.safetensors", **options)
    assert caught.value.problems[0].file == "model.safetensors"
    return caught.value.problems[0]


HOSTILE: dict[str, tuple[bytes, str | None, str]] = {
    # name: content, the tensor named, part of the message
    "length beyond the file": (pack({"a": entry(0, 0)}, length=1000), None, "length of 1000"),
    "length of 2^63": (pack({"a": entry(0, 0)}, length=2**63), None, str(2**63)),
    "not an object": (pack("[]"), None, "`{`"),
    "blank first": (pack(' {"a":1}'), None, "`{`"),
    "cut header": (pack('{"a": {"dtype": "U8"'), None, "end of the file"),
    "not UTF-8": (pack(b'{"\xff": 1}'), None, "UTF-8"),
    "text after the object": (pack('{} {"a": 1}'), None, "end of the file"),
    "deep": (pack('{"a": ' + "[" * 10_000), None, "nesting"),
    "entry is a list": (pack({"a": [1]}), "a", "object"),
    "overlap": (pack({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "b", "overlap"),
    "same range twice": (pack({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "b", "overlap"),
    "empty inside another": (pack({"a": entry(0, 4), "b": entry(2, 2)}, bytes(4)), "b", "overlap"),
    "hole": (pack({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)), "b", "hole"),
    "hole at the start": (pack({"a": entry(1, 4)}, bytes(4)), "a", "hole"),
    "wrong size": (pack({"a": entry(0, 4, [5])}, bytes(4)), "a", "expected 5 bytes"),
    "backwards": (pack({"a": entry(4, 0)}, bytes(4)), "a", "from 0"),
    "wraps to 4": (pack({"a": entry(0, 4, [2**31, 2**31, 4])}, bytes(4)), "a", "2^56"),
    "overflow": (pack({"a": entry(0, 4, [2**62, 4])}, bytes(4)), "a", "2^56"),
    "size 2^80": (pack({"a": entry(0, 4, [2**80])}, bytes(4)), "a.shape[0]", "2^63"),
    "empty but absurd": (pack({"a": entry(0, 0, [0, 2**60])}), "a", "2^56"),
    "negative": (pack({"a": entry(0, 4, [-4])}, bytes(4)), "a", "from 0"),
    "negative offset": (pack({"a": entry(-4, 0, [4])}, bytes(4)), "a", "from 0"),
    "float": (pack({"a": entry(0, 4, [4.0])}, bytes(4)), "a", "integers"),
    "boolean": (pack({"a": entry(0, 1, [True])}, bytes(1)), "a", "integers"),
    "three offsets": (pack({"a": {**entry(0, 4), "data_offsets": [0, 4, 4]}}, bytes(4)), "a", "two integers"),
    "unknown dtype": (pack({"a": entry(0, 4, dtype="Q4")}, bytes(4)), "a", "Q4"),
    "dtype is a list": (pack({"a": {**entry(0, 4), "dtype": ["U8"]}}, bytes(4)), "a", "dtype"),
    "duplicate key": (pack('{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)),) * 2), bytes(4)), "a", "twice"),
    "duplicate field": (
        pack('{"a": {"dtype": "U8", "dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
        "a.dtype",
        "twice",
    ),
    "extra field": (pack({"a": {**entry(0, 4), "strides": [1]}}, bytes(4)), "a", "strides"),
    "missing field": (pack({"a": {"dtype": "U8", "shape": [4]}}, bytes(4)), "a", "data_offsets"),
    "1000 dimensions": (pack({"a": entry(0, 1, [1] * 1000)}, bytes(1)), "a", "64 dimensions"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "__metadata__", "strings"),
    "metadata is text": (pack({"__metadata__": "pt"}), "__metadata__", "strings"),
    "two metadata": (pack('{"__metadata__": {}, "__metadata__": {}}'), "__metadata__", "two"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses_a_header_that_lies(tmp_path: Path, case: str) -> None:
    content, where, message = HOSTILE[case]
    problem = refused(tmp_path, content)
    assert problem.kind == "bad-safetensors"
    assert message in problem.message
    assert problem.where == where


def test_whatever_we_accept_the_library_accepts(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (
        GOOD,
        pack({}),
        pack({"__metadata__": {"format": "pt"}}),
        pack({"__metadata__": None, "a": entry(0, 4)}, bytes(4)),
        pack({"a": entry(0, 0, [0, 7]), "b": entry(0, 4, [], "F32"), "c": entry(4, 4)}, bytes(4)),
        pack('{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}   \n', b"\xff"),
    ):
        path.write_bytes(content)
        with safetensors.safe_open(path, "numpy") as theirs:
            ours = open_safetensors(path, "x")
            assert {n: list(t.shape) for n, t in ours.tensors.items()} == {
                n: theirs.get_slice(n).get_shape()
                for n in theirs.keys()  # noqa: SIM118
            }
            ours.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=400)
@given(st.data())
def test_damaged_files_are_refused_or_read_like_the_library_does(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    whole = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        piece = data.draw(
            st.sampled_from([b"0", b"1", b"9", b"-", b",", b"}", b"]", b'"', b" ", b"\\", b"\0", b"e"])
        )
        whole[at : at + data.draw(st.integers(0, 2))] = piece
    path.write_bytes(whole)
    try:
        ours = open_safetensors(path, "x")
    except CkptToolError:
        return
    with safetensors.safe_open(path, "numpy") as theirs:
        assert sorted(ours.tensors) == sorted(theirs.keys())
        for name, info in ours.tensors.items():
            assert list(info.shape) == theirs.get_slice(name).get_shape()
            assert info.dtype == theirs.get_slice(name).get_dtype()
            if NUMPY_DTYPES.get(info.dtype):
                buffer = bytearray(info.nbytes)
                ours.read_into(name, 0, memoryview(buffer))
                assert bytes(buffer) == theirs.get_tensor(name).tobytes()
    ours.close()


@pytest.mark.parametrize(
    ("cut", "kind"),
    [
        (1, "truncated"),
        (7, "truncated"),
        (8, "truncated"),
        (40, "truncated"),
        (-1, "truncated"),
        (-12, "truncated"),
    ],
)
def test_a_cut_file_is_truncated(tmp_path: Path, cut: int, kind: str) -> None:
    assert refused(tmp_path, GOOD[:cut]).kind == kind


def test_bytes_after_the_data_are_named(tmp_path: Path) -> None:
    problem = refused(tmp_path, GOOD + b"\0")
    assert (problem.kind, problem.where) == ("trailing-data", "b")


@pytest.mark.parametrize(
    "name",
    ["", "x" * 513, "a\0b", "a\nb", "a\x1b[31mb", "a\u202eb", "a\u2028b", "\u00e9" * 257],
)
def test_names_that_cannot_be_shown_are_refused(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path, pack({name: entry(0, 0)})).kind == "bad-name"


def test_a_lone_surrogate_in_a_name_is_refused(tmp_path: Path) -> None:
    problem = refused(tmp_path, pack('{"a\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'))
    assert problem.kind == "bad-name"
    assert problem.line().encode()  # and the message can be written out


def test_names_that_differ_in_composition_only_are_refused(tmp_path: Path) -> None:
    header = {"caf\u00e9": entry(0, 0), "cafe\u0301": entry(0, 0)}
    assert refused(tmp_path, pack(header)).kind == "bad-name"


def test_other_element_types_are_unsupported(tmp_path: Path) -> None:
    assert refused(tmp_path, pack({"a": entry(0, 8, [16], "F4")}, bytes(8))).kind == "unsupported-dtype"


def test_complex_numbers_are_left_out_and_take_their_place(tmp_path: Path) -> None:
    header = {"b": entry(16, 20, [4]), "a": entry(0, 16, [2], "C64")}
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(header, bytes(16) + b"true"))
    with closing(open_safetensors(path, "model.safetensors")) as file:
        assert {*file.tensors} == {"b"} and file.others["a"].nbytes == 16
        buffer = bytearray(4)
        file.read_into("b", 0, memoryview(buffer))
        assert buffer == b"true"
    wrong = {"b": entry(16, 20, [4]), "a": entry(0, 16, [4], "C64")}
    problem = refused(tmp_path, pack(wrong, bytes(20)))
    assert problem.kind == "bad-safetensors" and "expected 32 bytes for C64 (4,)" in problem.message


def test_a_header_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    assert refused(tmp_path, pack("{" + " " * 5000 + "}"), header_limit=4096).kind == "header-limit"
    sparse = tmp_path / "sparse.safetensors"
    with open(sparse, "wb") as file:
        file.write(struct.pack("<Q", 64 << 20) + b"{")
        file.truncate(1 << 30)
    with pytest.raises(CkptToolError) as caught:
        open_safetensors(sparse, "sparse.safetensors")
    assert caught.value.kind == "header-limit"


def test_a_million_tensors_are_counted_before_they_are_parsed(tmp_path: Path) -> None:
    assert refused(tmp_path, pack('{"data_offsets"' * 1_000_001)).kind == "header-limit"


def test_a_change_after_opening_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    changes: list[Callable[[], None]] = [
        lambda: os.utime(path, ns=(1, 1)),
        lambda: os.truncate(path, len(GOOD) - 4),
    ]
    for change in changes:
        file = open_safetensors(path, "x.safetensors")
        file.check_unchanged()
        change()
        with pytest.raises(CkptToolError) as caught:
            file.check_unchanged()
        assert caught.value.kind == "input-changed"
    with pytest.raises(CkptToolError) as caught:
        file.read_into("b", 0, memoryview(bytearray(4)))
    assert (caught.value.kind, caught.value.problems[0].where) == ("input-changed", "b")
    file.close()
    path.write_bytes(GOOD)
    file = open_safetensors(path, "x.safetensors")
    os.replace(tmp_path / "x.safetensors", tmp_path / "y")
    with pytest.raises(CkptToolError, match="another file"):
        file.check_unchanged()
    file.close()


def test_a_window_is_read_as_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "outer"
    path.write_bytes(b"before" + GOOD + b"after")
    file = open_safetensors(path, "inner", window=(6, len(GOOD)))
    buffer = bytearray(4)
    file.read_into("b", 0, memoryview(buffer))
    assert bytes(buffer) == bytes(range(8, 12))
    descriptor, offset = file.extent("b")
    assert os.pread(descriptor, 4, offset) == bytes(range(8, 12))
    with pytest.raises(ValueError):
        file.read_into("b", 2, memoryview(buffer))
    file.close()


def test_an_unacceptable_name_cannot_be_laid_out() -> None:
    with pytest.raises(CkptToolError) as caught:
        SafetensorsLayout([("__metadata__", "F32", (1,))])
    assert caught.value.kind == "bad-name"


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[dict[str, Any]]:
    opened = {}
    for number, tensors in ((1, {"a": 4, "b": 8}), (2, {"c": 2})):
        name = f"model-{number:05d}-of-00002.safetensors"
        at, header = 0, {}
        for tensor, size in tensors.items():
            header[tensor] = entry(at, at + size)
            at += size
        (tmp_path / name).write_bytes(pack(header, bytes(at)))
        opened[name] = open_safetensors(tmp_path / name, name)
    yield opened
    for file in opened.values():
        file.close()


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "total", "where"),
    [
        ({"a": ONE, "b": ONE, "c": TWO}, 14, []),
        ({"a": ONE, "b": ONE, "c": TWO}, 15, []),
        ({"a": ONE, "c": TWO}, 14, []),
        ({"a": ONE, "b": TWO, "c": TWO}, 14, []),
        ({"a": ONE, "b": ONE, "c": TWO, "d": TWO}, 14, ["d"]),
    ],
)
def test_the_index_is_compared_with_the_files(
    shards: dict[str, Any], weight_map: dict[str, str], total: int, where: list[str]
) -> None:
    index = read_index(index_document(weight_map, total), name="model.safetensors.index.json")
    found = list(index.problems(shards))
    assert [p.where for p in found] == where
    assert all(p.kind == "bad-index" for p in found)
    agreed = index.agrees(shards)
    assert agreed == (weight_map == {"a": ONE, "b": ONE, "c": TWO})
    if agreed:
        assert list(index.notes(shards, agreed=True)) == list(index.notes(shards))


@pytest.mark.parametrize(
    "file", ["../x", "/etc/x", "a/../b", "a//b", "a/", "a/./b", "a/b/c/d", "a\\b", "..", "", "a\0", 7]
)
def test_an_index_may_name_only_files_in_its_folder(file: Any) -> None:
    data = json.dumps({"weight_map": {"a": file}}).encode()
    with pytest.raises(CkptToolError) as caught:
        read_index(data, name="model.safetensors.index.json")
    assert (caught.value.kind, caught.value.problems[0].where) == ("bad-index", "a")


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": "x", "a": "y"}}',
        b"[]",
    ],
)
def test_a_malformed_index_is_refused(data: bytes) -> None:
    with pytest.raises(CkptToolError) as caught:
        read_index(data, name="model.safetensors.index.json")
    assert caught.value.kind == "bad-index"


def test_an_index_of_half_a_million_tensors_is_read() -> None:
    """One of 200,000 has 18 MB; few long names are as many bytes, and quicker."""
    long = {f"{k:04}" * 50_000: ONE if k % 2 else TWO for k in range(100)}
    data = index_document(long, 14)
    assert len(data) > 19 << 20
    assert read_index(data, name="model.safetensors.index.json").weight_map == long
