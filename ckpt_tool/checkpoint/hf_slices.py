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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ckpt_tool.checkpoint.base import DTYPES, LeftOut, OtherTensor, TensorFile, TensorInfo
from ckpt_tool.checkpoint.folders import Folder, Place
from ckpt_tool.checkpoint.open_files import Files
from ckpt_tool.checkpoint.pieces import Bits, Joined, Numbers, Piece, tiling_fault
from ckpt_tool.checkpoint.safetensors import SafetensorsFile, header_of
from ckpt_tool.errors import Problem, fail, fail_all
from ckpt_tool.records import dataclass

NAME = re.compile(r"shard-(?P<rank>\d{5})-model-(?P<file>\d{5})-of-(?P<count>\d{5})\.safetensors", re.ASCII)
INFO = "DCP_SHARDING_INFO"
PARTS = ("sharded/", "model/")  # where they may lie below a checkpoint
JOINED, KEPT = "consolidated/", ".hf_metadata"


@dataclass(frozen=True, slots=True)
class Slice:
    """The bytes of a slice of dtype `dtype`: they begin at byte `begin` of the file called `file`."""

    file: str
    begin: int
    dtype: str


class SlicedFile(TensorFile):
    """Whole tensors of slices in several files."""

    format = "safetensors"

    def __init__(
        self,
        files: Files,
        pieces: Mapping[str, list[Piece[Slice]]],
        odd: Mapping[str, list[OtherTensor]],
        *,
        listed: bool = False,
    ) -> None:
        """`odd`: slices of tensors of types that are not moved. `listed`: something else says which files
        there are."""
        self._files, self._pieces = files, pieces
        # With the bytes of all slices; what a whole one looks like matters to nobody.
        whole = [replace(own[0], stored=sum(t.stored for t in own)) for own in odd.values()]
        self.left_out = tuple(LeftOut(t, f"of type {t.dtype}, which is not converted") for t in whole)
        first = next(iter(files.places))
        self.path, self.name = files.places[first].path, first
        self.metadata: Mapping[str, object] = {}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, own[0].place.dtype, _shape(own), self.name) for name, own in pieces.items()
        }
        self._joined: Joined[Slice] = Joined(self._read)
        ranks = len({m["rank"] for f in files.places if (m := NAME.fullmatch(f))})
        unsaid = f"slices of {ranks} ranks were joined; their files do not say how many ranks there were"
        self.notes = () if listed else (unsaid,)

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(place.path for place in self._files.places.values())

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        own, told = self._pieces[name], self.tensors[name]
        if offset < 0 or offset + len(buffer) > told.nbytes:
            raise ValueError(f"{name}: bytes {offset} to {offset + len(buffer)} of {told.nbytes}")
        if len(own) == 1:
            self._fill(own[0].place, offset, buffer, name)
        else:
            self._joined.read_into(name, told.shape, own, DTYPES[told.dtype].bits, offset, buffer)

    def _fill(self, place: Slice, offset: int, buffer: memoryview, name: str | None = None) -> None:
        with self._files.use(place.file) as data:
            data.read_into(place.begin + offset, buffer, name)

    def _read(self, place: Slice, first: int, out: Bits) -> None:
        self._fill(place, first * out.itemsize, out.data.cast("B"))

    def extent(self, name: str) -> None:
        """None: files are opened while they are read, for there may be thousands of them."""

    def check_unchanged(self) -> None:
        self._files.check_unchanged()

    def close(self) -> None:
        self._joined.forget()
        self._files.close()


def _shape(pieces: list[Piece[Slice]]) -> Numbers:
    ends = ([a + n for a, n in zip(p.start, p.size, strict=True)] for p in pieces)
    return tuple(max(axis) for axis in zip(*ends, strict=True))


def slice_files(folder: Folder) -> tuple[str, list[str], list[str]] | None:
    """The part of `folder` that holds files of slices, these in order of rank, and notes; None without any.
    Where they are joined they lie in a part of their own, and alone where that failed; NeMo Automodel keeps
    them in `model/`, and what is joined of them in `model/consolidated/`."""
    if here := sorted(n for n in folder.names() if NAME.fullmatch(n)):
        return "", here, []
    inside = folder.below(lambda n: f"{n}/" in (*PARTS, JOINED))
    for part in PARTS:
        own = sorted(n.removeprefix(part) for n in inside if n.startswith(part))
        slices = [n for n in own if NAME.fullmatch(n)]
        if slices and not any(n.startswith(JOINED) for n in own):
            return part, slices, [f"the weights were found in {part}"]
    return None


def kept_documents(folder: Folder, within: str) -> dict[str, str]:
    """What NeMo Automodel keeps for the files that are to be joined of slices in the part `within`: their
    paths by name."""
    before = f"{within}{KEPT}/"
    files = folder.below(lambda n: n == KEPT or f"{n}/" == within)
    return {n.removeprefix(before): n for n in files if n.startswith(before)}


def open_slices(
    place: Callable[[str], Place],
    names: list[str],
    header_limit: int,
    lacking: Callable[[Mapping[str, TensorInfo]], Iterable[Problem]] | None = None,
) -> SlicedFile:
    """The files `names` as one; `lacking` says what their tensors lack of all that there are. Kinds: those of
    `open_safetensors`, `bad-safetensors` (no place of a slice), `dtype-mismatch`, `shard-conflict`,
    `missing-shard`."""
    files = Files({name: place(name) for name in names})
    try:
        pieces: dict[str, list[Piece[Slice]]] = {}
        odd: dict[str, list[OtherTensor]] = {}
        for name in names:
            with files.use(name) as data:
                header = header_of(data, header_limit)
                for told, start, begin in _slices(header):
                    own = Piece(start, told.shape, Slice(name, begin, told.dtype))
                    pieces.setdefault(told.name, []).append(own)
                for other in header.others.values():
                    odd.setdefault(other.name, []).append(other)
        for slices in pieces.values():
            slices.sort(key=lambda p: p.start)
        fail_all(_faults(pieces, odd))
        made = SlicedFile(files, pieces, odd, listed=lacking is not None)
        fail_all(lacking(made.tensors) if lacking is not None else ())
        return made
    except BaseException:
        files.close()
        raise


def _slices(file: SafetensorsFile) -> Iterator[tuple[TensorInfo, Numbers, int]]:
    """The slices in a file: where each begins in its tensor, and in the file."""
    offsets = _offsets(file)
    for name, told in file.tensors.items():
        start = offsets.get(name)
        if start is None or len(start) != len(told.shape):
            message = f"expected the place of this slice in {INFO}, found none"
            fail("bad-safetensors", message, file=file.name, where=name)
        yield told, start, file.begin(name)


def _faults(
    pieces: Mapping[str, list[Piece[Slice]]], odd: Mapping[str, list[OtherTensor]]
) -> Iterator[Problem]:
    for name, own in pieces.items():
        dtypes = sorted({*(p.place.dtype for p in own), *(t.dtype for t in odd.get(name, ()))})
        if len(dtypes) > 1 or len({len(p.start) for p in own}) > 1:
            found = " and ".join(dtypes)
            message = f"expected slices of one dtype and as many axes, found {found}"
            yield Problem("dtype-mismatch", message, own[0].place.file, name)
        elif (fault := tiling_fault(_shape(own), own)) is not None:
            yield Problem(fault[0], fault[1], own[0].place.file, name)


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
