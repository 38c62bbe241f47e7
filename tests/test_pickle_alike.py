"""Objects of a `.metadata` that are written in the same bytes: made once, where that is all."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata as classes
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.dcp_metadata import Metadata, read_metadata
from ckpt_tool.checkpoint.pickle_alike import Alike, entries_made

SHAPES = ((3, 2), (3, 2), (2, 3), (4,), (), (0, 2), (3, 2))
DTYPES = (torch.bfloat16, torch.float32)


def read(folder: Path, state: dict[str, object], storage: dict[object, object]) -> Metadata:
    made = classes.Metadata(state, {n: (n,) for n in state}, storage)
    made.storage_meta = classes.StorageMeta("x", "0")
    (folder / ".metadata").write_bytes(pickle.dumps(made, protocol=4))
    own = ByteRange(folder / ".metadata", ".metadata")
    try:
        return read_metadata(own, file=".metadata")
    finally:
        own.close()


def test_tensors_that_are_alike_keep_what_is_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: dict[str, object] = {}
    storage: dict[object, object] = {}
    for k in range(600):
        name, shape = f"layers.{k}.w", SHAPES[k % len(SHAPES)]
        box = classes.ChunkStorageMetadata(torch.Size((0,) * len(shape)), torch.Size(shape))
        properties = classes.TensorProperties(dtype=DTYPES[k // 100 % 2])
        state[name] = classes.TensorStorageMetadata(properties, torch.Size(shape), [box])
        index = classes.MetadataIndex(name, torch.Size((0,) * len(shape)), 0)
        storage[index] = _StorageInfo(f"__{k % 3}_0.distcp", 1000 * k, 900)
    shared = read(tmp_path, state, storage)
    monkeypatch.setattr(Alike, "at", lambda *_: None)
    apart = read(tmp_path, state, storage)
    for found in (shared, apart):
        assert [(t.name, t.dtype, t.shape) for t in found.tensors.values()] == [
            (f"layers.{k}.w", ("BF16", "F32")[k // 100 % 2], SHAPES[k % len(SHAPES)]) for k in range(600)
        ]
        for k, told in enumerate(map(found.told, found.tensors)):
            (piece,) = told.pieces
            assert (piece.start, piece.size) == ((0,) * len(told.shape), told.shape)
            assert found.table.item(piece.place).offset == 1000 * k
            assert found.owner(piece.place).name == told.name


@pytest.mark.parametrize(
    ("data", "made"),
    [
        (b"h\x00)\x81\x94}\x94(h\x01K\x94ub", 2),  # a number that looks like MEMOIZE is none
        (b"h\x00)\x81\x94", 1),
        (b"h\x00)\x81\x94(h\x01\x88t\x94b", 2),
        (b"h\x00)\x81\x940h\x01", None),  # takes away what it made
        (b"\x86\x94", None),  # takes what was there before
        (b"h\x00)\x81s", None),
        (b"(h\x00h\x01", None),
        (b"h\x00)", None),  # two values
        (b"h\x02h\x01K\x01s", None),  # sets an item of what the memo holds
        (b"h\x03", None),
        (b"h\x00)\x81q\x05", None),  # numbers an entry itself
    ],
)
def test_what_does_more_than_make_one_object_is_read_each_time(data: bytes, made: int | None) -> None:
    assert entries_made(data, {0: "class", 1: "name", 2: {}}) == made
