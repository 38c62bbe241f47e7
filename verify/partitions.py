"""The partitions of DeepSpeed's ZeRO put together a second time, by another way than the reader that
conversion uses, so that a mistake in how ranks, groups or padding follow one another is a difference of bits
and not the same on both sides.

Here every rank's file is walked as it lies, from its first element on, and each stretch of it is said to be
such elements of such a parameter; conversion asks for each parameter where its elements lie. Only the
containers are shared: a zip, a pickle as data, bytes of a file. Source: DeepSpeed's own zero_to_fp32.py
(0.19.8), whose result on folders that it wrote is the same, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, Renamed, TensorFile, View, stored
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.open_files import Files
from ckpt_tool.checkpoint.pickle_records import TensorRecord
from ckpt_tool.checkpoint.torch_zip import zip_value
from ckpt_tool.checkpoint.zero import ZeroFile
from ckpt_tool.checkpoint.zip_reader import ZipArchive
from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass

_OF_RANK = re.compile(r"pp_rank_(\d+)_")
_TRAINED = ("fp32_flat_groups", "single_partition_of_fp32_groups")


@dataclass(frozen=True)
class Stretch:
    """Elements of a tensor from `first` on, `count` of them, that begin at byte `at` of `file`."""

    first: int
    count: int
    file: str
    at: int


def joined_anew(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, with the bytes of partitions, where it has any, read by this module. Kinds: those of
    reading a torch zip, `shard-conflict` (the two readings do not find the same tensors)."""
    files = {n: Anew(f) if isinstance(stored(f), ZeroFile) else f for n, f in checkpoint.files.items()}
    return checkpoint.with_files(files) if any(isinstance(f, Anew) for f in files.values()) else checkpoint


class Anew(View):
    """The tensors of a file of partitions under the names that they have there, their bytes found anew."""

    def __init__(self, file: TensorFile) -> None:
        super().__init__(file)
        self.tensors = file.tensors
        self._own = dict(zip(file.tensors, file.tensors, strict=True))
        while isinstance(file, View):
            if isinstance(file, Renamed):
                self._own = {new: file.own[old] for new, old in self._own.items()}
            file = file.stored
        assert isinstance(file, ZeroFile)
        self._files = Files(file.places)
        try:
            self._stretches = self._walked()
            for name, told in self.tensors.items():
                count = sum(s.count for s in self._stretches.get(self._own[name], ()))
                if count != told.numel:
                    message = f"expected {told.numel} elements in the files of the ranks, found {count}"
                    fail("shard-conflict", message, file=self.name, where=name)
        except BaseException:
            self._files.close()
            raise

    def _walked(self) -> dict[str, list[Stretch]]:
        """Those of all files, which were opened as a checkpoint already: what is here of another type than
        there was read in two ways."""
        try:
            return _stretches(self._files)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration) as error:
            message = (
                f"expected partitions as they were read the first time, found another tree ({error!r:.80})"
            )
            fail("shard-conflict", message, file=self.name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        size = DTYPES[self.tensors[name].dtype].itemsize
        low, high = offset, offset + len(buffer)
        for s in self._stretches[self._own[name]]:
            start, stop = max(low, s.first * size), min(high, (s.first + s.count) * size)
            if start < stop:
                with self._files.use(s.file) as data:
                    data.read_into(s.at + start - s.first * size, buffer[start - low : stop - low], name)

    def extent(self, name: str) -> None:
        """None: a tensor is stretches of several files."""

    def close(self) -> None:
        self._files.close()
        super().close()


class _File:
    """A rank's file: what its pickle holds, and where tensors of it lie."""

    def __init__(self, data: ByteRange) -> None:
        archive = ZipArchive(data)
        held = zip_value(archive)
        self.name = data.name
        self.held: Mapping[Any, Any] = held if isinstance(held, dict) else {}
        self._at = {n.partition("/data/")[2]: m.data for n, m in archive.members.items() if "/data/" in n}

    def stretch(self, tensor: TensorRecord, skip: int, count: int, first: int) -> Stretch:
        """`count` elements of a flat tensor behind the first `skip`, as those of another from `first` on."""
        if tensor.storage is None:
            raise TypeError("a tensor without a storage")
        size = next(d.itemsize for d in DTYPES.values() if d.torch == tensor.dtype)
        at = self._at[tensor.storage.key] + (tensor.offset + skip) * size
        return Stretch(first, count, self.name, at)


def _stretches(files: Files) -> dict[str, list[Stretch]]:
    """Those of every tensor, in the order of its elements."""
    optimizers: dict[int, _File] = {}
    models: dict[int, _File] = {}
    for name in files.places:
        m = _OF_RANK.search(name)
        with files.use(name) as data:
            side = models if name.endswith("model_states.pt") else optimizers
            side[int(m[1]) if m else 0] = _File(data)
    first = models[0].held
    shapes = first["param_shapes"]
    groups = [shapes] if isinstance(shapes, dict) else list(shapes)
    found: dict[str, list[Stretch]] = {}
    before = [0] * len(groups)  # elements of each group that the ranks so far have
    world = len(optimizers)
    for rank in range(world):
        state = optimizers[rank].held["optimizer_state_dict"]
        if _TRAINED[0] in state:
            told = _of_three(optimizers[rank], state[_TRAINED[0]], groups, rank, world)
        else:
            told = _of_two(optimizers[rank], state, groups, before)
        for name, stretch in told:
            found.setdefault(name, []).append(stretch)
    _others(found, models, first)
    return found


def _of_three(
    file: _File, flat: Any, groups: list[Any], rank: int, world: int
) -> Iterator[tuple[str, Stretch]]:
    """ZeRO 3: the rank's share of each parameter in turn, as long as all ranks' are, with padding."""
    row = list(flat)
    k = used = 0
    for name, shape in ((n, s) for g in groups for n, s in g.items()):
        numel = prod(shape)
        each = (numel + world - 1) // world
        real = min(each, max(0, numel - rank * each))
        done = 0
        while done < each:
            while used == prod(row[k].shape):
                k, used = k + 1, 0
            step = min(each - done, prod(row[k].shape) - used)
            if (count := min(step, real - done)) > 0:
                yield name, file.stretch(row[k], used, count, rank * each + done)
            done, used = done + step, used + step


def _of_two(file: _File, state: Any, groups: list[Any], before: list[int]) -> Iterator[tuple[str, Stretch]]:
    """ZeRO 1 and 2: a stretch of the row of a group, behind the elements `before`, which then counts it."""
    paddings = state.get("param_alignment_paddings")
    for k, (group, tensor) in enumerate(zip(groups, state[_TRAINED[1]], strict=True)):
        start = before[k]
        before[k] = stop = start + prod(tensor.shape)
        at = 0
        for place, (name, shape) in enumerate(group.items()):
            low, high = max(at, start), min(at + prod(shape), stop)
            if low < high:
                yield name, file.stretch(tensor, low - start, high - low, low - at)
            at += prod(shape) + (paddings[k][place] if paddings else 0)


def _others(found: dict[str, list[Stretch]], models: Mapping[int, _File], first: Mapping[Any, Any]) -> None:
    """Add what is not trained, buffers, and other names of one parameter."""
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        left = prod(shape)
        for rank in sorted(models):
            part = (models[rank].held.get("frozen_param_fragments") or {}).get(name)
            if part is None:
                break
            own = found.setdefault(name, [])
            count = min(left, prod(part.shape))
            own.append(models[rank].stretch(part, 0, count, prod(shape) - left))
            left -= count
    shared = {n: of for n, of in dict(first.get("shared_params") or {}).items() if of in found}
    for name, tensor in first["module"].items():
        known = name in found or name in shared
        if not known and isinstance(tensor, TensorRecord) and 0 not in tensor.shape:
            found[name] = [models[0].stretch(tensor, 0, prod(tensor.shape), 0)]
    for name, of in shared.items():
        found.setdefault(name, found[of])
