"""TensorFlow bundles to be written: data files laid out before their tensors are known, the index made of
their checksums when they are, and whole bundles at once.

Equal tensors give equal bytes, those that TensorFlow's own writer gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.crc32c import crc32c
from ckpt_tool.checkpoint.pieces import Piece, tiling_fault
from ckpt_tool.checkpoint.tensor_names import name_problems
from ckpt_tool.checkpoint.tf_coding import Box, by_start, slice_key, whole_box
from ckpt_tool.checkpoint.tf_entries import NUMBER_OF, Entry, header
from ckpt_tool.checkpoint.tf_names import data_name
from ckpt_tool.checkpoint.tf_table import table
from ckpt_tool.errors import fail_all

Header = tuple[str, str, tuple[int, ...]]  # name, dtype of DTYPES, shape


class BundleLayout:
    """Where everything goes in one data file of `tensors`: one after another, in the order of their names'
    bytes as TensorFlow's writer has them, without padding. `size` is the whole file's. The index is a file
    of its own, see `index_of`. Fails with `bad-name`.
    """

    def __init__(self, tensors: Sequence[Header]) -> None:
        fail_all(name_problems((name for name, _, _ in tensors), file="data"))
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, dtype, shape in sorted(tensors, key=lambda t: t[0].encode()):
            if name in self.offsets:
                raise ValueError(f"a tensor name is given twice: {name}")
            self.offsets[name] = self.size
            self.size += prod(shape) * DTYPES[dtype].itemsize

    def header_writes(self) -> Iterator[tuple[int, bytes]]:
        """What can be written before the tensors: the file is nothing but these."""
        return iter(())

    def finish(self, crcs: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """What is written after the tensors: nothing."""
        return iter(())


def index_of(files: Sequence[Sequence[Header]], crcs: Mapping[str, int]) -> bytes:
    """The content of the index of data files (in order, each with its tensors, as `BundleLayout` places
    them); `crcs` has the CRC-32C of each tensor's bytes."""
    entries: dict[bytes, Entry] = {}
    for shard, tensors in enumerate(files):
        offsets = BundleLayout(tensors).offsets
        for name, dtype, shape in tensors:
            if name.encode() in entries:
                raise ValueError(f"a tensor name is given twice: {name}")
            size = prod(shape) * DTYPES[dtype].itemsize
            entries[name.encode()] = Entry(NUMBER_OF[dtype], shape, shard, offsets[name], size, crcs[name])
    return _index(entries, len(files))


def _index(entries: Mapping[bytes, Entry], shards: int) -> bytes:
    ordered = sorted(entries.items(), key=lambda item: item[0])
    return table([(b"", header(shards)), *((key, entry.message()) for key, entry in ordered)])


# --- whole bundles --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """A tensor to be written: its dtype (as in DTYPES), shape, and its bytes in pieces, asked for once."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[bytes | memoryview]]

    @classmethod
    def of(cls, bits: np.ndarray, dtype: str) -> Content:
        """Of an array of raw bits (`DTYPES[dtype].bits`), or of numbers whose bytes are these."""
        if bits.dtype.itemsize != DTYPES[dtype].itemsize:
            raise ValueError(f"expected elements of {dtype}, found {bits.dtype}")
        return cls(dtype, bits.shape, lambda: (np.ascontiguousarray(bits).tobytes(),))


def write_bundle(
    prefix: Path,
    tensors: Mapping[str, Content],
    *,
    shards: int = 1,
    slices: Mapping[str, Sequence[Box]] | None = None,
) -> list[Path]:
    """Write `tensors` as the bundle PREFIX.index, PREFIX.data-00000-of-0000N and so on; the paths of these
    files. Tensors, or their slices, are dealt out to the `shards` data files in turn. `slices` has the boxes
    that the tensors named in it are cut into, which then are held in memory whole."""
    entries: dict[bytes, Entry] = {}
    paths = [prefix.with_name(data_name(prefix.name, k, shards)) for k in range(shards)]
    at = [0] * shards
    for path in paths:
        path.write_bytes(b"")
    for turn, (key, content) in enumerate(_in_order(tensors, slices or {}, entries)):
        shard = turn % shards
        size, crc = 0, 0
        with open(paths[shard], "ab") as f:
            for piece in content.pieces():
                f.write(piece)
                crc = crc32c(piece, crc)
                size += len(memoryview(piece).cast("B"))
        if size != prod(content.shape) * DTYPES[content.dtype].itemsize:
            raise ValueError(f"{key!r}: {size} bytes for {content.dtype} of shape {content.shape}")
        entries[key] = Entry(NUMBER_OF[content.dtype], content.shape, shard, at[shard], size, crc)
        at[shard] += size
    index = prefix.with_name(f"{prefix.name}.index")
    index.write_bytes(_index(entries, shards))
    return [index, *paths]


def _in_order(
    tensors: Mapping[str, Content], slices: Mapping[str, Sequence[Box]], entries: dict[bytes, Entry]
) -> Iterator[tuple[bytes, Content]]:
    """What is written under which key, in the order in which it lies: by the names of the tensors, slices by
    where they begin. `entries` gets those of the tensors that are cut."""
    for name, content in sorted(tensors.items(), key=lambda item: item[0].encode()):
        if name not in slices:
            yield name.encode(), content
            continue
        boxes = by_start(slices[name])
        parts = [whole_box(box, content.shape) for box in boxes]
        if (wrong := tiling_fault(content.shape, [Piece(*part, None) for part in parts])) is not None:
            raise ValueError(f"{name}: {wrong[1]}")
        entries[name.encode()] = Entry(NUMBER_OF[content.dtype], content.shape, slices=tuple(boxes))
        bits = np.frombuffer(b"".join(content.pieces()), DTYPES[content.dtype].bits).reshape(content.shape)
        for box, (starts, lengths) in zip(boxes, parts, strict=True):
            cut = bits[tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))]
            yield slice_key(name, box), Content.of(cut, content.dtype)
