"""Torch zip files: the same tensors as torch reads, and every hostile one refused with its kind."""

import argparse
import os
import pickle
import random
import struct
import sys
import threading
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.pickle_records import Inert
from ckpt_tool.checkpoint.torch_zip import TorchZipFile, open_torch_zip, zip_imports
from ckpt_tool.errors import CkptToolError

REAL = Path(__file__).parents[1].parent / "shared" / "real" / "aidreams260K" / "consolidated.00.pth"


def dense(file: TorchZipFile, name: str, piece: int = 1 << 40) -> bytes:
    """All bytes of a tensor, asked for in pieces."""
    data = bytearray(file.tensors[name].nbytes)
    for at in range(0, len(data), piece):
        file.read_into(name, at, memoryview(data)[at : at + piece])
    return bytes(data)


def raw(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def saved(path: Path, value: object, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


def assert_same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    file = open_torch_zip(path, path.name)
    assert list(file.tensors) == list(expected)
    for name, tensor in expected.items():
        info = file.tensors[name]
        assert (info.shape, DTYPES[info.dtype].torch) == (tuple(tensor.shape), str(tensor.dtype)[6:])
        assert dense(file, name) == raw(tensor), name
        extent = file.extent(name)
        if extent is not None:
            assert os.pread(extent[0], info.nbytes, extent[1]) == raw(tensor)
    file.close()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype(protocol: int, tmp_path: Path) -> None:
    seed = torch.arange(1, 25)
    tensors = {d.name: seed.to(getattr(torch, d.torch)).reshape(2, 3, 4) for d in DTYPES.values()}
    assert_same(saved(tmp_path / "x.pth", tensors, pickle_protocol=protocol), tensors)


def test_views_of_all_kinds(tmp_path: Path) -> None:
    base = torch.randn(37, 53, 7)
    tensors = {
        "whole": base,
        "transposed": base.transpose(0, 2),
        "strided": base[3:30:2, ::3, 1:],
        "column": base[:, 5, 3],
        "offset": base[20:],
        "overlapping": torch.arange(10.0).as_strided((3, 3), (1, 2)),
        "window": torch.arange(100.0).as_strided((5, 20), (15, 1)),
        "long rows": torch.randn(700, 900).t(),
        "empty": torch.zeros(0, 5),
        "empty in a storage": base[5:5],
        "empty behind its storage": torch.zeros(4, 0, 3)[1:, :, 1:],
        "scalar": torch.tensor(3.5),
        "one": torch.ones(1, 1).expand(1, 1),
        "parameter": torch.nn.Parameter(torch.randn(3, 4)),
        "odd halves": torch.randn(33, 17).bfloat16().t(),
    }
    assert_same(saved(tmp_path / "x.pth", tensors), tensors)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_piece_of_any_view(data: st.DataObject, tmp_path: Path) -> None:
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
    tensor = torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    for axis, size in enumerate(tensor.shape):
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        step = data.draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * axis + (slice(start, stop, step),)]
    file = open_torch_zip(saved(tmp_path / "x.pth", {"t": tensor}), "x.pth")
    first = data.draw(st.integers(0, file.tensors["t"].nbytes))
    last = data.draw(st.integers(first, file.tensors["t"].nbytes))
    piece = bytearray(last - first)
    file.read_into("t", first, memoryview(piece))
    assert bytes(piece) == raw(tensor)[first:last]
    file.close()


def test_large_transposed_tensor_in_small_pieces_by_two_threads(tmp_path: Path) -> None:
    tensor = torch.randint(0, 1 << 14, (3000, 1100), dtype=torch.int16).t()
    file = open_torch_zip(saved(tmp_path / "x.pth", {"t": tensor}), "x.pth")
    assert file.extent("t") is None
    assert file.record_of("t") is None
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(dense(file, "t", 100_001))) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [raw(tensor)] * 2
    file.close()


def test_nested_dicts_join_their_keys_and_the_rest_is_metadata(tmp_path: Path) -> None:
    shared = torch.ones(4)
    tree = {
        "iteration": 7,
        "args": argparse.Namespace(num_layers=2, params_dtype=torch.float16, eps=np.float32(1e-5)),
        "model": {"language_model": OrderedDict(a=shared, b=shared), "version": 3},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "groups": [{"lr": 0.1, "params": [0]}]},
        "rng_state": [torch.get_rng_state(), np.random.get_state()],
    }
    file = open_torch_zip(saved(tmp_path / "x.pt", tree), "x.pt")
    assert list(file.tensors) == [
        "model.language_model.a",
        "model.language_model.b",
        "optimizer.state.0.exp_avg",
    ]
    assert file.record_of("model.language_model.a") == file.record_of("model.language_model.b") == ("0", 0)
    assert file.metadata["iteration"] == 7
    assert file.metadata["model"] == {"version": 3}
    assert file.metadata["optimizer"] == {"groups": [{"lr": 0.1, "params": [0]}]}
    args = file.metadata["args"]
    assert isinstance(args, Inert) and args.fields["num_layers"] == 2
    assert str(args.fields["params_dtype"]) == "torch.float16"
    assert "argparse.Namespace" in file.imports
    assert file.notes == ()
    file.close()


class Thing:
    def __init__(self, value: int) -> None:
        self.value = value


def test_objects_of_projects_are_noted_and_stay_inert(tmp_path: Path) -> None:
    tree = {"model": {"w": torch.ones(2)}, "args": argparse.Namespace(kind=Thing(3))}
    file = open_torch_zip(saved(tmp_path / "x.pt", tree), "x.pt")
    assert len(file.notes) == 1 and "Thing" in file.notes[0]
    assert file.metadata["args"].fields["kind"].fields == {"value": 3}
    file.close()


def test_records_have_the_checksums_of_the_storages(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(300), "b": torch.randn(7, 5)[2:], "e": torch.zeros(0)}
    path = saved(tmp_path / "x.pth", tensors)
    file = open_torch_zip(path, "x.pth")
    data = path.read_bytes()
    for record in file.records().values():
        assert zlib.crc32(data[record.offset : record.offset + record.size]) == record.crc32
        assert file.check_record(record.key)
    assert file.record_of("b") == ("1", 2 * 5 * 4)
    key, start = file.record_of("b") or ("", 0)
    record = file.records()[key]
    assert data[record.offset + start : record.offset + record.size] == raw(tensors["b"])
    file.close()


def test_a_flipped_bit_in_a_storage_is_found_by_its_record(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"a": torch.randn(300)})
    file = open_torch_zip(path, "x.pth")
    at = file.records()["0"].offset + 77
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CkptToolError) as caught:
        file.check_record("0")
    assert caught.value.kind == "checksum"
    file.close()


def test_checksums_that_torch_left_out(tmp_path: Path) -> None:
    from torch.utils.serialization import config

    config.save.compute_crc32 = False
    try:
        path = saved(tmp_path / "x.pth", {"a": torch.randn(300)})
    finally:
        config.save.compute_crc32 = True
    file = open_torch_zip(path, "x.pth")
    assert file.records()["0"].crc32 is None
    assert not file.check_record("0")
    file.close()


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"a": torch.randn(300)})
    file = open_torch_zip(path, "x.pth")
    file.check_unchanged()
    os.truncate(path, path.stat().st_size - 2000)
    with pytest.raises(CkptToolError) as caught:
        file.check_unchanged()
    assert caught.value.kind == "input-changed"
    file.close()


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_signal(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"a": torch.randn(30_000)})
    file = open_torch_zip(path, "x.pth")
    os.truncate(path, 50_000)
    with pytest.raises(CkptToolError) as caught:
        dense(file, "a")
    assert caught.value.kind == "input-changed"
    assert caught.value.problems[0].where == "a"
    file.close()


def test_inside_another_zip(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(30, 20).t(), "b": torch.ones(5)}
    inner = saved(tmp_path / "inner.pt", tensors)
    outer = tmp_path / "outer.zip"
    with zipfile.ZipFile(outer, "w") as z:
        z.writestr("readme", "x" * 77)
        z.write(inner, "release/model.pt")
        z.writestr("after", "y")
    data = outer.read_bytes()
    start = data.index(inner.read_bytes())
    file = open_torch_zip(outer, "outer.zip/model.pt", window=(start, inner.stat().st_size))
    for name, tensor in tensors.items():
        assert dense(file, name) == raw(tensor)
    descriptor, offset = file.extent("b") or (-1, 0)
    assert os.pread(descriptor, 20, offset) == raw(tensors["b"])
    assert data[file.records()["1"].offset :][:20] == raw(tensors["b"])
    file.close()


def test_deflated_members_are_read_through_a_spool(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(300, 200), "t": torch.randn(30, 20).t()}
    plain = saved(tmp_path / "x.pt", tensors)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    before = set(tmp_path.iterdir())
    file = open_torch_zip(packed, "packed.pt")
    for name, tensor in tensors.items():
        assert dense(file, name) == raw(tensor)
    assert file.records() == {}
    assert file.record_of("a") is None
    descriptor, offset = file.extent("a") or (-1, 0)
    assert os.pread(descriptor, 100, offset) == raw(tensors["a"])[:100]
    assert set(tmp_path.iterdir()) == before
    file.close()


@pytest.mark.skipif(not REAL.exists(), reason="the real checkpoint is not beside the repository")
def test_a_real_checkpoint_reads_as_torch_reads_it() -> None:
    assert_same(REAL, torch.load(REAL, weights_only=True))


# Hostile files: pickles made by hand, in a zip like torch's.


def text(s: str) -> bytes:
    data = s.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<L", len(data)) + data


def integer(n: int) -> bytes:
    return pickle.dumps(n, 2)[2:-1]


def integers(*numbers: int) -> bytes:
    return b"(" + b"".join(map(integer, numbers)) + b"t"


def ref(key: str = "0", numel: int = 6, kind: str = "torch\nFloatStorage", location: str = "cpu") -> bytes:
    return (
        b"(" + text("storage") + f"c{kind}\n".encode() + text(key) + text(location) + integer(numel) + b"tQ"
    )


def tensor(
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    storage: bytes | None = None,
    rebuild: str = "torch._utils\n_rebuild_tensor_v2",
    more: bytes = b"",
) -> bytes:
    numbers = integer(offset) + integers(*shape) + integers(*strides)
    return f"c{rebuild}\n(".encode() + (storage or ref()) + numbers + b"\x89}" + more + b"tR"


def dictionary(*pairs: tuple[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(k) + v for k, v in pairs) + b"u."


def torch_zip(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data.pkl", pickled)
        for key, data in (storages if storages is not None else {"0": bytes(range(24))}).items():
            z.writestr(f"x/data/{key}", data)
        for name, data in members.items():
            z.writestr(f"x/{name}", data)
    return path


SYSTEM = b"cos\nsystem\n" + text("touch canary") + b"\x85R"
ENUM = b"cmegatron.model.enums\nModelType\nK\x01\x85R"
BIG = 1 << 40
HOSTILE: dict[str, tuple[bytes, str, str]] = {
    "system among tensors": (dictionary(("a", tensor()), ("b", SYSTEM)), "unsafe-pickle", "os.system at b"),
    "system as a tensor's storage": (dictionary(("a", tensor(storage=SYSTEM))), "unsafe-pickle", "os.system"),
    "system in the arguments": (
        dictionary(("w", tensor()), ("args", b"cargparse\nNamespace\n)\x81}" + text("x") + SYSTEM + b"sb")),
        "unsafe-pickle",
        "args(state).x",
    ),
    "system thrown away": (
        b"\x80\x02" + SYSTEM + b"0" + dictionary(("a", tensor()))[2:],
        "unsafe-pickle",
        "outside",
    ),
    "system as the root": (b"\x80\x02" + SYSTEM + b".", "unsafe-pickle", "the root"),
    "system, not called": (
        dictionary(("a", b"cposix\nsystem\n")),
        "unsafe-pickle",
        "a mention of posix.system",
    ),
    "system before a fault": (b"\x80\x02" + SYSTEM + b"\xee", "unsafe-pickle", "os.system"),
    "eval": (
        dictionary(("a", b"c__builtin__\neval\n" + text("1") + b"\x85R")),
        "unsafe-pickle",
        "__builtin__.eval",
    ),
    "getattr on a module": (
        dictionary(("a", b"cbuiltins\ngetattr\ncos\nsystem\n" + text("x") + b"\x86R")),
        "unsafe-pickle",
        "os.system",
    ),
    "loading by torch": (
        dictionary(("a", b"ctorch\nload\n" + text("x") + b"\x85R")),
        "unsafe-pickle",
        "torch.load",
    ),
    "numpy that calls": (
        dictionary(("a", b"cnumpy.testing._private.utils\nrunstring\n)R")),
        "unsafe-pickle",
        "runstring",
    ),
    "object among tensors": (
        dictionary(("a", tensor()), ("b", ENUM)),
        "unsafe-pickle",
        "megatron.model.enums.ModelType",
    ),
    "object as the root": (b"\x80\x02" + ENUM + b".", "unsafe-pickle", "ModelType"),
    "whole module": (
        dictionary(("model", b"cproject\nNet\n)\x81}" + text("_parameters") + b"}sb")),
        "unsafe-pickle",
        "Net",
    ),
    "list as the root": (b"\x80\x02].", "wrong-format", "a list"),
    "tensor as the root": (b"\x80\x02" + tensor() + b".", "wrong-format", "a tensor"),
    "container in itself": (b"\x80\x02}q\0" + text("a") + b"h\0s.", "bad-pickle", "inside itself"),
    "list in itself": (dictionary(("a", b"]q\0h\0a")), "bad-pickle", "inside itself"),
    "a million tuples": (dictionary(("a", b")" + b"\x85" * 1_000_000)), "pickle-limit", "nested containers"),
    "value bomb of dicts": (
        b"\x80\x02}"
        + text("w")
        + tensor()
        + b"s"
        + b"".join(b"q\0" + b"0}(" + text("a") + b"h\0" + text("b") + b"h\0u" for _ in range(60))
        + b".",
        "pickle-limit",
        "at one place",
    ),
    "same key twice": (dictionary(("a", tensor()), ("a", tensor())), "duplicate-tensor", "byte"),
    "same name by nesting": (
        dictionary(("a.b", tensor()), ("a", b"}" + text("b") + tensor() + b"s")),
        "duplicate-tensor",
        "at bytes",
    ),
    "storage too short": (dictionary(("a", tensor(storage=ref(numel=7)))), "size-mismatch", "expected 28"),
    "storage too long": (
        dictionary(("a", tensor(shape=(1, 3), storage=ref(numel=3)))),
        "size-mismatch",
        "found 24",
    ),
    "storage of 2^40": (dictionary(("a", tensor(storage=ref(numel=BIG)))), "size-mismatch", str(4 * BIG)),
    "no such storage": (dictionary(("a", tensor(storage=ref("9")))), "missing-record", "data/9"),
    "two dtypes": (
        dictionary(("a", tensor()), ("b", tensor(storage=ref(kind="torch\nIntStorage")))),
        "storage-conflict",
        "float32 and int32",
    ),
    "beyond the storage": (
        dictionary(("a", tensor(offset=1))),
        "bad-view",
        "offset 1, sizes (2, 3), strides (3, 1)",
    ),
    "negative offset": (dictionary(("a", tensor(offset=-1))), "bad-view", "offset -1"),
    "negative stride": (
        dictionary(("a", tensor(offset=5, strides=(-3, -1)))),
        "bad-view",
        "strides (-3, -1)",
    ),
    "negative size": (dictionary(("a", tensor(shape=(-2, 3)))), "bad-view", "sizes (-2, 3)"),
    "overflowing stride": (dictionary(("a", tensor(strides=(1 << 63, 1)))), "bad-view", str(1 << 63)),
    "too few strides": (dictionary(("a", tensor(strides=(1,)))), "bad-view", "as many strides"),
    "broadcast of 10^12": (
        dictionary(("a", tensor(shape=(10**6, 10**6), strides=(0, 0)))),
        "bad-view",
        "broadcast",
    ),
    "overlap larger than the storage": (
        dictionary(("a", tensor(shape=(3, 3), strides=(1, 1)))),
        "bad-view",
        "at most the 6 elements",
    ),
    "absurd empty": (
        dictionary(("a", tensor(shape=(0, 1 << 60, 1 << 60), strides=(1, 1, 1)))),
        "bad-view",
        "2^62",
    ),
    "complex": (
        dictionary(
            ("a", tensor(shape=(3,), strides=(1,), storage=ref(numel=3, kind="torch\nComplexFloatStorage")))
        ),
        "unsupported-dtype",
        "complex64",
    ),
    "sparse": (
        dictionary(("a", b"ctorch._utils\n_rebuild_sparse_tensor\n)R")),
        "unsupported-dtype",
        "sparse",
    ),
    "quantized": (
        dictionary(("a", b"ctorch._utils\n_rebuild_qtensor\n)R")),
        "unsupported-dtype",
        "quantized",
    ),
    "negated": (
        dictionary(("a", tensor(more=b"}" + text("neg") + b"\x88s"))),
        "unsupported-dtype",
        "negated",
    ),
    "meta storage": (dictionary(("a", tensor(storage=ref(location="meta")))), "unsupported-device", "meta"),
    "meta tensor": (
        dictionary(("a", b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R")),
        "unsupported-device",
        "meta",
    ),
    "untyped without dtype": (
        dictionary(("a", tensor(storage=ref(numel=24, kind="torch.storage\nUntypedStorage")))),
        "bad-pickle",
        "dtype",
    ),
    "empty name": (dictionary(("", tensor())), "bad-name", "empty"),
    "name with escapes": (dictionary(("a\x1b[31m", tensor())), "bad-name", "U+001B"),
    "name of 10 kB": (dictionary(("a" * 10_000, tensor())), "bad-name", "512"),
    "lone surrogate": (dictionary(("a\ud800", tensor())), "bad-name", "surrogate"),
    "after the pickle": (dictionary(("a", tensor())) + b"more", "trailing-data", "4 more bytes"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused_with_their_kind(what: str, tmp_path: Path) -> None:
    pickled, kind, words = HOSTILE[what]
    path = torch_zip(tmp_path / "x.pth", pickled)
    with pytest.raises(CkptToolError) as caught:
        open_torch_zip(path, "x.pth")
    assert caught.value.kind == kind
    assert words in caught.value.text()
    assert all(p.file == "x.pth" for p in caught.value.problems)
    assert not (tmp_path / "canary").exists()


def test_what_the_builders_make_is_read(tmp_path: Path) -> None:
    """The hostile files differ from this good one by what their names say."""
    for location in ("cpu", "cuda:7", "xla:0"):
        path = torch_zip(
            tmp_path / "x.pth", dictionary(("a", tensor(storage=ref(location=location)))), byteorder=b"little"
        )
        file = open_torch_zip(path, "x.pth")
        assert dense(file, "a") == bytes(range(24))
        file.close()


def test_all_problems_come_together(tmp_path: Path) -> None:
    path = torch_zip(
        tmp_path / "x.pth", dictionary(("a", tensor(offset=1)), ("b", tensor()), ("c", tensor(offset=2)))
    )
    with pytest.raises(CkptToolError) as caught:
        open_torch_zip(path, "x.pth")
    assert [p.where for p in caught.value.problems] == ["a", "c"]


def test_shared_values_that_are_no_tensors_are_counted_once(tmp_path: Path) -> None:
    """2^60 leaves by reference; opening must neither expand nor compare them."""
    bomb = b"]" + b"".join(b"q\0" + b"0](h\0h\0e" for _ in range(60))
    file = open_torch_zip(torch_zip(tmp_path / "x.pth", dictionary(("a", tensor()), ("z", bomb))), "x.pth")
    assert list(file.tensors) == ["a"]
    file.close()


def test_one_dict_of_many_names_without_a_tensor_is_looked_through_once(tmp_path: Path) -> None:
    """Once for each name would be 10^9 looks."""
    inner = b"}q\0(" + b"".join(b"J" + k.to_bytes(4, "little") + b"N" for k in range(30_000)) + b"u"
    names = b"".join(b"J" + k.to_bytes(4, "little") + b"h\0" for k in range(1, 30_000))
    pickled = b"\x80\x02}(K\0" + inner + names + b"u."
    file = open_torch_zip(torch_zip(tmp_path / "x.pth", pickled), "x.pth")
    assert not file.tensors and len(file.metadata) == 30_000
    file.close()


def test_every_list_has_a_place_of_its_own(tmp_path: Path) -> None:
    """Lists of lists, as a distributed optimizer saves its buffers: none is taken for another."""
    tree = {a: [[[torch.zeros(1)] for _ in range(c)] for c in range(1, 6)] for a in "abcd"}
    file = open_torch_zip(saved(tmp_path / "x.pt", tree), "x.pt", lists=True)
    assert list(file.tensors) == [
        f"{a}.{b}.{c}.0" for a in "abcd" for b in range(5) for c in range(b + 1)
    ]  # fmt: skip
    file.close()


def test_lists_of_one_list_are_not_expanded(tmp_path: Path) -> None:
    """2^60 tensors by reference."""
    bomb = b"](" + tensor() + b"eq\0" + b"0](h\0h\0eq\0" * 60
    path = torch_zip(tmp_path / "x.pth", dictionary(("z", bomb)))
    with pytest.raises(CkptToolError) as caught:
        open_torch_zip(path, "x.pth", lists=True)
    (problem,) = caught.value.problems
    assert problem.kind == "pickle-limit"
    assert problem.message.startswith("expected a list of tensors at one place, found it at `z.0.")


@pytest.mark.parametrize(
    ("members", "kind", "words"),
    [
        ({"byteorder": b"big"}, "unsupported-byteorder", "big"),
        ({"version": b"99\n"}, "wrong-format", "99"),
        ({"version": b"x"}, "wrong-format", "version"),
        ({"constants.pkl": b"."}, "wrong-format", "TorchScript"),
        ({"code/a.py": b""}, "wrong-format", "TorchScript"),
    ],
)
def test_files_of_other_kinds(members: dict[str, bytes], kind: str, words: str, tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "x.pth", dictionary(("a", tensor())), **members)
    with pytest.raises(CkptToolError) as caught:
        open_torch_zip(path, "x.pth")
    assert caught.value.kind == kind
    assert words in caught.value.text()


def test_zips_without_or_with_two_pickles(tmp_path: Path) -> None:
    for names, words in (
        (["a.npy"], "numpy"),
        ([], "empty"),
        (["x/data.pkl", "y/data.pkl"], "2 of them"),
        (["r/m.pt"], "torch files"),
    ):
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w") as z:
            for name in names:
                z.writestr(name, b"N.")
        with pytest.raises(CkptToolError) as caught:
            open_torch_zip(path, "x.zip")
        assert caught.value.kind == "wrong-format"
        assert words in caught.value.text()


def test_a_torchscript_archive(tmp_path: Path) -> None:
    torch_zip(
        tmp_path / "x.pth", dictionary(("a", tensor())), **{"constants.pkl": b".", "code/__torch__.py": b""}
    )
    with pytest.raises(CkptToolError) as caught:
        open_torch_zip(tmp_path / "x.pth", "x.pth")
    assert caught.value.problems[0].hint is not None


def test_a_pickle_larger_than_the_limit_is_not_inflated(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("x/data.pkl", b"\x80\x02" + random.Random(0).randbytes(1 << 20) + bytes(70 << 20))
    with pytest.raises(CkptToolError) as caught:
        open_torch_zip(path, "x.pth")
    assert caught.value.kind == "zip-limit"


def test_imports_of_a_refused_file_can_be_listed(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "x.pth", HOSTILE["system before a fault"][0])
    assert zip_imports(path, "x.pth") == ("os.system",)
    path = torch_zip(tmp_path / "y.pth", HOSTILE["system among tensors"][0])
    assert "os.system" in zip_imports(path, "y.pth")


def test_special_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/null"), tmp_path / "missing"):
        with pytest.raises(CkptToolError) as caught:
            open_torch_zip(path, "x.pth")
        assert caught.value.kind in ("wrong-format", "read-failed")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.99])
def test_cut_files(share: float, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"a": torch.randn(300)})
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(CkptToolError) as caught:
        open_torch_zip(path, "x.pth")
    assert caught.value.kind == ("wrong-format" if share == 0 else "truncated")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("corpus") / "x.pth"
    tree = {
        "w": torch.randn(3, 4),
        "t": torch.randn(3, 4).t(),
        "n": {"h": torch.ones(2).half()},
        "args": argparse.Namespace(a=1),
    }
    return saved(path, tree).read_bytes()


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_damaged_files_give_tensors_or_our_error(data: st.DataObject, corpus: bytes, tmp_path: Path) -> None:
    changed = bytearray(corpus)
    # Half of the changes go into the pickle, whose checksum is then made right so that they are reached.
    start, stop = corpus.index(b"\x80\x02"), corpus.index(b"PK\x07\x08")
    inside = data.draw(st.booleans())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(start, stop - 1) if inside else st.integers(0, len(corpus) - 1))
        changed[at] = changed[at] ^ 1 << data.draw(st.integers(0, 7))
    if inside:
        old, new = (zlib.crc32(x[start:stop]).to_bytes(4, "little") for x in (corpus, changed))
        changed = changed.replace(old, new)
    path = tmp_path / "fuzz.pth"
    path.write_bytes(changed)
    try:
        file = open_torch_zip(path, "fuzz.pth")
    except CkptToolError as error:
        assert all(p.message and p.file for p in error.problems)
        return
    for name in file.tensors:
        assert len(dense(file, name)) == file.tensors[name].nbytes
    file.close()


def test_weights_that_torchao_quantised_say_what_leads_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of a class of its own in a torch file, whose parts nobody here reads."""
    kind = type("Int8Tensor", (torch.Tensor,), {"__module__": "torchao.quantization"})
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["torchao.quantization"].Int8Tensor = kind  # type: ignore[attr-defined]
    torch.save({"w": torch.ones(2, 3).as_subclass(kind), "n": torch.ones(3)}, tmp_path / "x.bin")
    with pytest.raises(CkptToolError) as caught:
        open_torch_zip(tmp_path / "x.bin", "x.bin")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("unsupported-dtype", "w")
    assert problem.message.endswith("one that is of the subclass torchao.quantization.Int8Tensor")
    assert problem.hint and "`.dequantize()`" in problem.hint
