"""The stream that torch.save wrote before 1.6: the same tensors as torch reads, hostile ones refused."""

import argparse
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.signs import LEGACY_MAGIC as MAGIC
from ckpt_tool.checkpoint.signs import is_legacy
from ckpt_tool.checkpoint.torch_legacy import (
    TorchLegacyFile,
    legacy_imports,
    open_torch_legacy,
)
from ckpt_tool.errors import CkptToolError


def dense(file: TorchLegacyFile, name: str) -> bytes:
    data = bytearray(file.tensors[name].nbytes)
    file.read_into(name, 0, memoryview(data))
    return bytes(data)


def raw(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def saved(path: Path, value: object, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_equal_what_was_saved(protocol: int, tmp_path: Path) -> None:
    base = torch.randn(7, 9, 4)
    seed = torch.arange(1, 25)
    tensors = {
        **{d.name: seed.to(getattr(torch, d.torch)).reshape(2, 3, 4) for d in DTYPES.values()},
        "base": base,
        "view": base[2:5, ::2],
        "transposed": base.transpose(0, 1),
        "flat": base.flatten()[5:],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    tree = {"model": tensors, "args": argparse.Namespace(num_layers=24), "iteration": 1}
    path = saved(tmp_path / "x.pt", tree, protocol)
    assert is_legacy(path.read_bytes()[:32])
    file = open_torch_legacy(path, "x.pt")
    assert list(file.tensors) == [f"model.{n}" for n in tensors]
    for name, tensor in tensors.items():
        info = file.tensors[f"model.{name}"]
        assert (info.shape, DTYPES[info.dtype].torch) == (tuple(tensor.shape), str(tensor.dtype)[6:])
        assert dense(file, f"model.{name}") == raw(tensor), name
    assert file.metadata["iteration"] == 1
    assert file.metadata["args"].fields == {"num_layers": 24}
    assert file.records() == {}
    descriptor, offset = file.extent("model.flat") or (-1, 0)
    assert os.pread(descriptor, 12, offset) == raw(tensors["flat"])[:12]
    file.check_unchanged()
    file.close()


def test_inside_another_file(tmp_path: Path) -> None:
    inner = saved(tmp_path / "x.pt", {"a": torch.randn(5, 6)}).read_bytes()
    outer = tmp_path / "outer"
    outer.write_bytes(b"before" + inner + b"after")
    file = open_torch_legacy(outer, "outer/x.pt", window=(6, len(inner)))
    descriptor, offset = file.extent("a") or (-1, 0)
    assert os.pread(descriptor, 120, offset) == dense(file, "a")
    file.close()


def test_a_structure_longer_than_the_first_read(tmp_path: Path) -> None:
    tensors = {f"{i}" + "x" * 400: torch.full((2,), float(i)) for i in range(2500)}
    path = saved(tmp_path / "x.pt", tensors)
    assert path.stat().st_size > 1 << 20
    file = open_torch_legacy(path, "x.pt")
    assert len(file.tensors) == 2500
    assert dense(file, "2499" + "x" * 400) == struct.pack("<2f", 2499, 2499)
    file.close()


# Streams made by hand.

HEAD = pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2)
FACTS = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def text(s: str) -> bytes:
    return b"X" + struct.pack("<L", len(s)) + s.encode()


def integers(*numbers: int) -> bytes:
    return b"(" + b"".join(pickle.dumps(n, 2)[2:-1] for n in numbers) + b"t"


def tensor(
    numel: int = 6,
    view: bytes = b"N",
    numbers: bytes = integers(1)[1:-1] + integers(2) + integers(2),
    kind: str = "torch\nFloatStorage",
    key: str = "77",
) -> bytes:
    pid = (
        b"("
        + text("storage")
        + f"c{kind}\n".encode()
        + text(key)
        + text("cuda:0")
        + integers(numel)[1:-1]
        + view
    )
    return b"ctorch._utils\n_rebuild_tensor\n(" + pid + b"tQ" + numbers + b"tR"


def stream(
    value: bytes = b"",
    keys: object = ("77",),
    counts: dict[str, int] | None = None,
    facts: object = FACTS,
    head: bytes = HEAD,
) -> bytes:
    body = b"\x80\x02}" + text("a") + (value or tensor()) + b"s."
    out = (
        head
        + pickle.dumps(facts, 2)
        + body
        + pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2)
    )
    for key in keys if isinstance(keys, tuple) else ():
        out += struct.pack("<q", (counts or {}).get(key, 6)) + struct.pack("<6f", *range(6))
    return out


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], TorchLegacyFile]:
    def opening(data: bytes) -> TorchLegacyFile:
        (tmp_path / "x.pt").write_bytes(data)
        return open_torch_legacy(tmp_path / "x.pt", "x.pt")

    return opening


def test_old_forms(opened: Callable[[bytes], TorchLegacyFile]) -> None:
    """The first rebuild function (offset 1, size 2, stride 2), and views with a key of their own."""
    assert struct.unpack("<2f", dense(opened(stream()), "a")) == (1, 3)
    view = b"(" + text("88") + integers(2, 3)[1:-1] + b"t"
    numbers = integers(0)[1:-1] + integers(3) + integers(1)
    file = opened(stream(tensor(view=view, numbers=numbers, kind="torch.cuda\nFloatStorage")))
    assert struct.unpack("<3f", dense(file, "a")) == (2, 3, 4)


def test_the_class_and_source_of_a_module_are_ignored(opened: Callable[[bytes], TorchLegacyFile]) -> None:
    module = b"(" + text("module") + b"cproject\nNet\n" + text("net.py") + text("class Net: ...") + b"tQ"
    value = b"}" + text("w") + tensor() + b"ss" + text("model") + module + b")\x81"
    file = opened(stream(value))
    assert list(file.tensors) == ["a.w"]
    assert str(file.metadata["model"].type) == "project.Net"


FAR = b"(" + text("88") + integers(4, 3)[1:-1] + b"t"
HOSTILE: dict[str, tuple[bytes, str, str]] = {
    "junk": (b"<html>" * 20, "wrong-format", "magic number"),
    "nothing": (b"", "wrong-format", "magic number"),
    "another protocol": (
        stream(head=pickle.dumps(MAGIC, 2) + pickle.dumps(1002, 2)),
        "wrong-format",
        "1001",
    ),
    "big-endian": (stream(facts=FACTS | {"little_endian": False}), "unsupported-byteorder", "big-endian"),
    "no facts": (stream(facts=[1]), "bad-pickle", "byte order"),
    "keys are no list": (stream(keys={"77": 1}), "bad-pickle", "storage keys"),
    "unknown key": (stream(keys=("77", "78")), "bad-pickle", "'78'"),
    "key twice": (stream(keys=("77", "77")), "bad-pickle", "twice"),
    "key missing": (stream(keys=()), "missing-record", "77"),
    "another count": (stream(counts={"77": 5}), "size-mismatch", "6 elements"),
    "negative count": (stream(counts={"77": -1}), "size-mismatch", "-1"),
    "count of 2^40": (stream(tensor(1 << 40), counts={"77": 1 << 40}), "truncated", "storage 77"),
    "cut by a byte": (stream()[:-1], "truncated", "1 less"),
    "cut in a count": (stream()[:-28], "truncated", "storage 77"),
    "cut in the structure": (stream()[:150], "truncated", "end of the data"),
    "bytes after the end": (stream() + b"\0", "trailing-data", "1 more"),
    "view beyond its storage": (stream(tensor(view=FAR)), "bad-view", "elements 4 to 7"),
    "tensor beyond its view": (
        stream(tensor(view=b"(" + text("88") + integers(2, 3)[1:-1] + b"t")),
        "bad-view",
        "below 3",
    ),
    "a call": (stream(b"cos\nsystem\n" + text("x") + b"\x85R"), "unsafe-pickle", "os.system at a"),
    "a call in the list of keys": (
        stream(keys=())[:-4] + b"cos\nsystem\n" + text("x") + b"\x85R.",
        "bad-pickle",
        "storage keys",
    ),
    "complex": (
        stream(
            tensor(
                3, kind="torch\nComplexFloatStorage", numbers=integers(0)[1:-1] + integers(3) + integers(1)
            ),
            counts={"77": 3},
        ),
        "unsupported-dtype",
        "complex64",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_streams_are_refused_with_their_kind(
    what: str, opened: Callable[[bytes], TorchLegacyFile]
) -> None:
    data, kind, words = HOSTILE[what]
    with pytest.raises(CkptToolError) as caught:
        opened(data)
    assert caught.value.kind == kind
    assert words in caught.value.text()


def test_the_tar_files_of_the_first_versions_are_named(opened: Callable[[bytes], TorchLegacyFile]) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("sys_info"))
    with pytest.raises(CkptToolError) as caught:
        opened(target.getvalue())
    assert caught.value.kind == "wrong-format"
    assert "tar archive" in caught.value.text()


def test_imports_of_a_refused_stream_can_be_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(stream(b"cos\nsystem\n" + text("x") + b"\x85R"))
    assert legacy_imports(path, "x.pt") == ("os.system",)


def test_a_bare_magic_number_needs_its_pickle() -> None:
    assert is_legacy(HEAD)
    assert not is_legacy(b"PK\x03\x04" + HEAD)
    assert not is_legacy(b"")


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_damaged_streams_give_tensors_or_our_error(data: st.DataObject, tmp_path: Path) -> None:
    changed = bytearray(stream())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        if data.draw(st.integers(0, 9)):
            changed[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del changed[at + 1 :]
    (tmp_path / "x.pt").write_bytes(changed)
    try:
        file = open_torch_legacy(tmp_path / "x.pt", "x.pt")
    except CkptToolError as error:
        assert all(p.message and p.file for p in error.problems)
        return
    for name in file.tensors:
        assert len(dense(file, name)) == file.tensors[name].nbytes
    file.close()
