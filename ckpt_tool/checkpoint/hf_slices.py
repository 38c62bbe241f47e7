"""Slices of tensors, one safetensors file a rank, as torch's writer for Hugging Face leaves them with
`save_distributed=True`: all files hold the same names, and where each slice begins stands in their metadata.

    shard-00001-model-00001-of-00002.safetensors     rank 1 (of how many is said nowhere), first output file

How large a whole tensor is follows from the slices; that the last rank's file is missing does not show in
them.

Source: torch 2.13.0 (distributed/checkpoint/hf_storage.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from ckpt_tool.checkpoint.base import DTYPES, TensorFile, TensorInfo
from ckpt_tool.checkpoint.folders import Place
from ckpt_tool.checkpoint.pieces import Bits, Joined, Numbers, Piece, tiling_fault
from ckpt_tool.checkpoint.safetensors import SafetensorsFile, open_safetensors
from ckpt_tool.errors import Problem, fail, fail_all

NAME = re.compile(r"shard-(?P<rank>\d{5})-model-(?P<file>\d{5})-of-(?P<count>\d{5})\.safetensors", re.ASCII)
INFO = "DCP_SHARDING_INFO"
Slice = tuple[SafetensorsFile, str]  # and its name there


class SlicedFile(TensorFile):
    """Whole tensors of slices in several files."""

    format = "safetensors"

    def __init__(self, files: list[SafetensorsFile], pieces: Mapping[str, list[Piece[Slice]]]) -> None:
        self._files, self._pieces = files, pieces
        self.path, self.name = files[0].path, files[0].name
        self.metadata: Mapping[str, object] = {}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, own[0].place[0].tensors[name].dtype, _shape(own), self.name)
            for name, own in pieces.items()
        }
        self._joined: Joined[Slice] = Joined(_read)
        ranks = len({m["rank"] for f in files if (m := NAME.fullmatch(f.name))})
        self.notes = (
            f"slices of {ranks} ranks were joined; their files do not say how many ranks there were",
        )

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(f.path for f in self._files)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        own, told = self._pieces[name], self.tensors[name]
        if offset < 0 or offset + len(buffer) > told.nbytes:
            raise ValueError(f"{name}: bytes {offset} to {offset + len(buffer)} of {told.nbytes}")
        if len(own) == 1:
            own[0].place[0].read_into(name, offset, buffer)
        else:
            self._joined.read_into(name, told.shape, own, DTYPES[told.dtype].bits, offset, buffer)

    def extent(self, name: str) -> tuple[int, int] | None:
        own = self._pieces[name]
        return own[0].place[0].extent(name) if len(own) == 1 else None

    def check_unchanged(self) -> None:
        for file in self._files:
            file.check_unchanged()

    def close(self) -> None:
        self._joined.forget()
        for file in self._files:
            file.close()


def _read(place: Slice, first: int, out: Bits) -> None:
    file, name = place
    file.read_into(name, first * out.itemsize, out.data.cast("B"))


def _shape(pieces: list[Piece[Slice]]) -> Numbers:
    ends = ([a + n for a, n in zip(p.start, p.size, strict=True)] for p in pieces)
    return tuple(max(axis) for axis in zip(*ends, strict=True))


def slice_files(names: Collection[str]) -> list[str]:
    """The files of slices among `names`, in order of rank."""
    return sorted(n for n in names if NAME.fullmatch(n))


def open_slices(place: Callable[[str], Place], names: list[str], header_limit: int) -> SlicedFile:
    """The files `names` as one. Kinds: those of `open_safetensors`, `bad-safetensors` (no place of a slice),
    `dtype-mismatch`, `shard-conflict`, `missing-shard`."""
    files: list[SafetensorsFile] = []
    try:
        for name in names:
            there = place(name)
            files.append(open_safetensors(there.path, name, window=there.window, header_limit=header_limit))
        pieces: dict[str, list[Piece[Slice]]] = {}
        for file in files:
            offsets = _offsets(file)
            for name, told in file.tensors.items():
                start = offsets.get(name)
                if start is None or len(start) != len(told.shape):
                    message = f"expected the place of this slice in {INFO}, found none"
                    fail("bad-safetensors", message, file=file.name, where=name)
                pieces.setdefault(name, []).append(Piece(start, told.shape, (file, name)))
        for own in pieces.values():
            own.sort(key=lambda p: p.start)
        fail_all(_faults(pieces))
        return SlicedFile(files, pieces)
    except BaseException:
        for file in files:
            file.close()
        raise


def _faults(pieces: Mapping[str, list[Piece[Slice]]]) -> Iterator[Problem]:
    for name, own in pieces.items():
        dtypes = sorted({p.place[0].tensors[name].dtype for p in own})
        if len(dtypes) > 1 or len({len(p.start) for p in own}) > 1:
            found = " and ".join(dtypes)
            message = f"expected slices of one dtype and as many axes, found {found}"
            yield Problem("dtype-mismatch", message, own[0].place[0].name, name)
        elif (fault := tiling_fault(_shape(own), own)) is not None:
            yield Problem(fault[0], fault[1], own[0].place[0].name, name)


def _offsets(file: SafetensorsFile) -> dict[str, Numbers]:
    """Where each slice begins, as the file says; empty where it says nothing that can be read."""
    text = file.metadata.get(INFO)
    try:
        told = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        return {}
    found = {}
    for name, entry in told.items() if isinstance(told, dict) else ():
        start = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if isinstance(start, list) and all(type(n) is int and n >= 0 for n in start):
            found[name] = tuple(start)
    return found


def is_slice(file: TensorFile) -> str | None:
    """A tensor of which `file` says that it begins further in than at the first element, so that it is a
    slice under whatever name the file has; None without one."""
    if not isinstance(file, SafetensorsFile):
        return None
    return next((name for name, start in _offsets(file).items() if any(start) and name in file.tensors), None)
