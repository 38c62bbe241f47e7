"""torch.distributed folders at scale and from strangers: `.metadata` of very many pieces, files of very many
ranks, pickles and items made to do harm, dtypes that are not read."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import resource
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as classes

from ckpt_tool import api
from ckpt_tool.checkpoint import dcp_listing, dcp_metadata
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.dcp_metadata import Metadata, read_metadata
from ckpt_tool.checkpoint.opening import open_checkpoint
from tests.conftest import Written
from tests.in_process import program
from tests.test_dcp import (
    GRID,
    Chunk,
    beside,
    contents,
    cut,
    grid,
    refused,
    save,
    saved,
    weights,
    write,
)


def read(file: Path) -> Metadata:
    own = ByteRange(file, ".metadata")
    try:
        return read_metadata(own, file=".metadata")
    finally:
        own.close()


# --- the same, however it is read ---------------------------------------------------------------------------

Shape = tuple[int, ...]


def listed(shapes: Mapping[str, tuple[Shape, int]], *, own: bool, numbered: bool) -> classes.Metadata:
    """Tensors cut into so many rows each. With `own` each piece names its tensor by a text of its own, as
    those of several processes do; `numbered` is plain torch, else Megatron."""
    state: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    at = 0
    for name, (shape, parts) in shapes.items():
        borders = range(0, shape[0], -(-shape[0] // parts)) if shape else (0,)
        boxes = []
        for k, low in enumerate(borders):
            start = torch.Size((low, *(0,) * (len(shape) - 1)) if shape else ())
            high = borders[k + 1] if k + 1 < len(borders) else (shape or (1,))[0]
            size = torch.Size((high - low, *shape[1:]) if shape else ())
            boxes.append(classes.ChunkStorageMetadata(start, size))
            called = f"{name} "[:-1] if own else name
            index = classes.MetadataIndex(called, torch.Size(start), k if numbered else None)
            places[index] = filesystem._StorageInfo(f"__{k}_0.distcp", at, 700 + k)
            at += 700 + k
        properties = classes.TensorProperties(dtype=torch.bfloat16)
        state[name] = classes.TensorStorageMetadata(properties, torch.Size(shape), boxes)
    return classes.Metadata(state, {n: (n,) for n in state} if numbered else None, places)


def told(found: Metadata) -> list[object]:
    return [
        (t.name, t.dtype, t.shape, [(p.start, p.size, found.table.item(p.place)) for p in t.pieces])
        for t in map(found.told, found.tensors)
    ]


@given(
    st.dictionaries(
        st.text("abcdjhK(.", min_size=1, max_size=300).map(lambda n: f"{n}.weight"),
        st.tuples(
            st.lists(st.sampled_from([1, 3, 200, 300, 70_000]), max_size=3).map(tuple), st.integers(1, 30)
        ),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
    st.booleans(),
    st.sampled_from([2, 4, 5]),
)
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_rows_say_what_their_opcodes_say(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, tuple[Shape, int]],
    own: bool,
    numbered: bool,
    protocol: int,
) -> None:
    """Read by form, and opcode by opcode, in a whole and through a window."""
    file = tmp_path_factory.mktemp("listed") / ".metadata"
    file.write_bytes(pickle.dumps(listed(shapes, own=own, numbered=numbered), protocol=protocol))
    fast = told(read(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp_listing.Listing, "learn", lambda *_: None)
        patch.setattr(dcp_metadata, "HELD", 0)
        assert told(read(file)) == fast
    assert [t[0] for t in fast] == list(shapes)


def test_most_pieces_are_read_by_their_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is held of them but numbers: a tenth of the memory that objects would take is enough."""
    file = tmp_path / ".metadata"
    made = listed({f"layers.{i}.w": ((4096, 8), 512) for i in range(40)}, own=True, numbered=True)
    file.write_bytes(pickle.dumps(made, protocol=4))
    rows: list[int] = []
    count = dcp_listing.Listing.rows
    monkeypatch.setattr(
        dcp_listing.Listing, "rows", lambda self, kind: rows.append(n := count(self, kind)) or n
    )
    monkeypatch.setattr(dcp_metadata, "LIMITS", dcp_metadata.LIMITS.__class__(memo=1 << 20, memory=15 << 20))
    found = read(file)
    pieces = sum(len(found.told(n).pieces) for n in found.tensors)
    assert pieces == 40 * 512 and sum(rows) > 2.9 * pieces


# --- made to do harm ----------------------------------------------------------------------------------------


def of(fields: Mapping[str, bytes]) -> bytes:
    """A pickle of a Metadata with these fields, each given by its opcodes."""
    body = b"".join(pickle.dumps(k, 2)[2:-1] + v for k, v in fields.items())
    return b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}(" + body + b"ub."


EMPTY = {"state_dict_metadata": b"}", "storage_data": b"}"}
PICKLES: dict[str, tuple[bytes, str]] = {
    "a call": (of(EMPTY | {"planner_data": b"cos\nsystem\nX\x02\0\0\0id\x85R"}), "unsafe-pickle"),
    "a class of Python's": (of(EMPTY | {"planner_data": b"cbuiltins\neval\n"}), "unsafe-pickle"),
    "a class by two texts": (of(EMPTY | {"storage_meta": b"\x8c\x02os\x8c\x05popen\x93"}), "unsafe-pickle"),
    "lists in lists": (of(EMPTY | {"planner_data": b"(" * 300 + b"l" * 300}), "pickle-limit"),
    "a text without an end": (of(EMPTY | {"version": b"\x8d" + b"\xff" * 7 + b"\x0f"}), "bad-pickle"),
    "a memo entry that is not there": (of(EMPTY | {"version": b"j\xff\xff\xff\x7f"}), "bad-pickle"),
    "a memo entry far away": (
        of(EMPTY | {"version": b"]r\xff\xff\xff\xff0j\xff\xff\xff\xff"}) + b"x",
        "trailing-data",
    ),
    "a dict in itself": (
        of({"storage_data": b"}", "state_dict_metadata": b"}\x94X\1\0\0\0wh\0s"}),
        "missing-record",
    ),
    "pieces that are themselves": (
        of(
            {
                "storage_data": b"}",
                "state_dict_metadata": b"}X\1\0\0\0wcx\nT\n)\x81}(X\6\0\0\0chunks]\x94h\0aX\4\0\0\0size)ubs",
            }
        ),
        "bad-pickle",
    ),
    "an empty list": (of({"storage_data": b"]", "state_dict_metadata": b"}"}), "wrong-format"),
    "a file of another kind": (b"PK\3\4 state_dict_metadata", "bad-pickle"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_pickles_that_would_do_harm(what: str, tmp_path: Path) -> None:
    data, kind = PICKLES[what]
    grid(tmp_path / "in")
    (tmp_path / "in" / ".metadata").write_bytes(data)
    error = refused(lambda: open_checkpoint(tmp_path / "in"))
    assert error.kind == kind, str(error)
    ended = program("convert", "auto", "--in", "in", "--out", "out", "--dry-run", cwd=tmp_path)
    assert ended.returncode == 2 and f"error[{kind}]" in ended.stderr


def place(made: Any, **fields: object) -> None:
    for name, value in fields.items():
        setattr(next(iter(made.storage_data.values())), name, value)


def inside_another(made: Any) -> None:
    first, second = [p for p in made.storage_data.values() if p.relative_path == "__0_0.distcp"] * 2
    extra = classes.MetadataIndex("v", torch.Size((0,)))
    made.storage_data[extra] = filesystem._StorageInfo("__0_0.distcp", first.offset + 10, second.length - 20)


def more_places(made: Any) -> None:
    made.planner_data = dict(made.storage_data)


def not_an_axis(made: Any) -> None:
    made.state_dict_metadata["w"].chunks[0].sizes = (3, 4.0)


LISTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "NUL in a path": (lambda m: place(m, relative_path="__0_0\0.distcp"), "bad-input"),
    "a backslash in a path": (lambda m: place(m, relative_path="..\\x"), "bad-input"),
    "no text as a path": (lambda m: place(m, relative_path=7), "bad-pickle"),
    "an offset of 70 bits": (lambda m: place(m, offset=1 << 70), "bad-pickle"),
    "an offset of 64 bits": (lambda m: place(m, offset=(1 << 64) - 1), "size-mismatch"),
    "an end of 64 bits": (lambda m: place(m, offset=1 << 62, length=1 << 62), "size-mismatch"),
    "a place inside another": (inside_another, "shard-conflict"),
    "places elsewhere too": (more_places, "bad-pickle"),
    "a size that is no whole number": (not_an_axis, "bad-pickle"),
    "no size": (lambda m: setattr(m.state_dict_metadata["w"], "size", None), "bad-pickle"),
    "no dtype": (lambda m: setattr(m.state_dict_metadata["w"], "properties", 3), "bad-pickle"),
}


@pytest.mark.parametrize("what", LISTS)
def test_lists_that_no_writer_makes(what: str, tmp_path: Path) -> None:
    change, kind = LISTS[what]
    made = grid(tmp_path / "in")
    change(made)
    write(tmp_path / "in", made)
    error = refused(lambda: open_checkpoint(tmp_path / "in"))
    assert error.kind == kind, str(error)


def repacked(item: bytes, change: Callable[[str, bytes], bytes], deflated: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(item)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            kind = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
            new.writestr(name, change(name, old.read(name)), kind)
    return out.getvalue()


def one_item(folder: Path, item: bytes) -> Path:
    """A folder of one tensor, GRID, whose item is this."""
    made = save(folder, {"w": [Chunk((0, 0), GRID)]}, {"w": (7, 10)})
    (folder / "__0_0.distcp").write_bytes(item)
    place(made, length=len(item))
    write(folder, made)
    return folder


def item_of(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def replaced(name: str, old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    return lambda n, data: data.replace(old, new) if n.endswith(name) else data


ITEMS: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "deflated": (lambda: repacked(item_of(GRID), lambda _, d: d, deflated=True), None),
    "transposed": (lambda: item_of(GRID.t().contiguous().t()), None),
    "big-endian": (
        lambda: repacked(item_of(GRID), replaced("byteorder", b"little", b"big")),
        "unsupported-byteorder",
    ),
    "numbers missing": (lambda: repacked(item_of(GRID), replaced("data/0", b"\0", b"")), "size-mismatch"),
    "strides beyond the storage": (
        lambda: repacked(item_of(GRID), replaced("data.pkl", b"K\x0aK\x01\x86", b"K\x0bK\x01\x86")),
        "bad-view",
    ),
    "two tensors": (lambda: item_of({"a": GRID, "b": GRID}), "wrong-format"),
    "no tensor": (lambda: item_of(7), "wrong-format"),
    "another shape": (lambda: item_of(GRID.view(10, 7)), "size-mismatch"),
    "a call": (
        lambda: repacked(
            item_of(GRID), replaced("data.pkl", b"torch._utils\n_rebuild_tensor_v2", b"os\nsystem")
        ),
        "unsafe-pickle",
    ),
    "no zip": (lambda: b"\0" * 2000, "wrong-format"),
}


@pytest.mark.parametrize("what", ITEMS)
def test_items_of_a_stranger(what: str, tmp_path: Path) -> None:
    make, kind = ITEMS[what]
    with open_checkpoint(one_item(tmp_path / "in", make())) as checkpoint:
        if kind is None:
            assert contents(checkpoint)["w"][2] == GRID.numpy().tobytes()
        else:
            error = refused(lambda: contents(checkpoint))
            assert error.kind == kind and ("__0_0.distcp" in str(error)), str(error)


# --- many files ---------------------------------------------------------------------------------------------


@pytest.fixture
def few_descriptors() -> Any:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # which closes what other tests have left
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 190, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_descriptors")
def test_more_files_than_descriptors(tmp_path: Path) -> None:
    whole = torch.arange(600 * 3, dtype=torch.float32).view(600, 3)
    rows = cut(whole, range(0, 601, 2), (0, 3))
    save(tmp_path / "dcp", {"w": rows}, {"w": (600, 3)})
    (tmp_path / "slices").mkdir()
    for k, chunk in enumerate(rows):
        info = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": list(chunk.start)}})}
        name = f"shard-{k + 1:05d}-model-00001-of-00001.safetensors"
        save_file({"w": chunk.data}, tmp_path / "slices" / name, info)
    for folder in ("dcp", "slices"):
        with open_checkpoint(tmp_path / folder) as checkpoint:
            assert contents(checkpoint)["w"][2] == whole.numpy().tobytes()
            checkpoint.check_unchanged()


# --- dtypes -------------------------------------------------------------------------------------------------


def test_dtypes_that_are_not_read_are_named_and_others_convert(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    odd = {
        "extra.c64": torch.ones(2, dtype=torch.complex64),
        "extra.fnuz": torch.ones(2).to(torch.float8_e4m3fnuz),
    }
    source = originals("qwen2-0.5b")
    saved(weights(source) | odd, tmp_path / "in")
    beside(source, tmp_path / "in")
    shown = program("inspect", "in", cwd=tmp_path).stdout
    for name, dtype in (("extra.c64", "complex64"), ("extra.fnuz", "float8_e4m3fnuz")):
        assert name in shown and dtype in shown
    api.convert(tmp_path / "in", tmp_path / "out")
    ours, theirs = (f / "model.safetensors" for f in (tmp_path / "out", conversions("qwen2-0.5b")))
    assert ours.read_bytes() == theirs.read_bytes()


def test_every_dtype_that_is_read(tmp_path: Path) -> None:
    bits = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.bool)
    kinds = (*bits, torch.uint16, torch.uint32, torch.uint64)
    made = {str(d).partition(".")[2]: torch.arange(6).view(torch.int64).to(d).view(2, 3) for d in kinds}
    saved(made, tmp_path / "in")
    with open_checkpoint(tmp_path / "in") as checkpoint:
        found = contents(checkpoint)
    assert {n: x.view(torch.uint8).numpy().tobytes() for n, x in made.items()} == {
        n: data for n, (_, _, data) in found.items()
    }


TREES_TOO: Sequence[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = (
    ("app.model", lambda model: {"app": {"model": model, "optim": {}, "step": 3}}),
    ("state_dict", lambda model: {"state_dict": {f"model.{n}": x for n, x in model.items()}, "epoch": 1}),
)


@pytest.mark.parametrize(("name", "tree"), TREES_TOO)
def test_trees_of_trainers(
    name: str,
    tree: Callable[[dict[str, Any]], dict[str, Any]],
    originals: Written,
    conversions: Written,
    tmp_path: Path,
) -> None:
    source = originals("qwen2-0.5b")
    saved(tree(weights(source)), tmp_path / "in")
    beside(source, tmp_path / "in")
    made = api.convert(tmp_path / "in", tmp_path / "out")
    ours, theirs = (f / "model.safetensors" for f in (tmp_path / "out", conversions("qwen2-0.5b")))
    assert ours.read_bytes() == theirs.read_bytes()
    assert made.opened


def test_padded_words_of_a_written_folder_are_no_words_to_the_reading(
    conversions: Written, tmp_path: Path
) -> None:
    written = api.Options(family_options={"form": "torch_dist"})
    api.convert(conversions("llama-1-7b"), tmp_path / "made", family="llama", to="original", options=written)
    api.convert(tmp_path / "made", tmp_path / "again", family="llama")
    assert api.verify(tmp_path / "again", tmp_path / "made", levels=("parity",)).status == "pass"
