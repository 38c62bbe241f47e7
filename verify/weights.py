"""Tensors of an opened checkpoint as a lazy mapping for a forward pass: read when asked for, in the dtype of
the computation, and forgotten unless a `keep` block holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.checkpoint.megatron import placed
from ckpt_tool.verify.buffers import Buffers
from ckpt_tool.verify.holding import SMALL, Room, fits, is_small, of_layers
from ckpt_tool.verify.streamed import Rows, Streamed, give_back

PIECE = 1 << 19  # bytes read at once, which stay in a cache of the processor while they are cast


W = TypeVar("W", bound="Weights")


class Weights(Mapping[str, Tensor]):
    """`tensors` of `checkpoint`; floating ones come in `dtype`, all on `device`. `used` collects the names
    that were ever asked for, so that a report can say what no pass has touched."""

    def __init__(
        self, checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], dtype: torch.dtype, device: str
    ) -> None:
        self.checkpoint, self.tensors, self.dtype, self.device = checkpoint, tensors, dtype, device
        self.used: set[str] = set()
        self.limit: int | None = None  # bytes of a layer that is held as computed; None: whatever it takes
        self.room = Room(0)  # for all that is held, where there is a limit
        self.wider = 0  # bytes of it that are left free where it is computed in a wider dtype
        self.buffers: Buffers | None = None  # memory for large tensors; None: as torch comes by it
        self._kept: dict[str, Tensor] | None = None

    @property
    def several(self) -> frozenset[str]:
        """Names of those made of codes of which several lie in an element: no step of a plan moves numbers
        of that shape."""
        return frozenset()

    def __getitem__(self, name: str) -> Tensor:
        info = self.tensors[name]
        self.used.add(name)
        if self._kept is None:
            return self._load(info)
        if name not in self._kept:
            made = self._load(info)
            if not self._has_room(name, made):
                return made
            self._kept[name] = made
        return self._kept[name]

    def _has_room(self, name: str, made: Tensor) -> bool:
        """Whether what was read is kept: here what finds no room is read by rows, which count themselves."""
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def computed_in(self, dtype: torch.dtype) -> Weights:
        """The same tensors in another dtype, which hold no more than what these leave."""
        return self._sharing(Weights(self.checkpoint, self.tensors, dtype, self.device))

    def _sharing(self, made: W) -> W:
        if self.limit is not None:
            made.within(max(0, self.limit - self.room.held), self.room, self.wider)
        return made

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Hold every tensor read inside, so that several prompts share one reading of a layer; inside of
        another such block those until its end."""
        if self._kept is not None:
            yield
            return
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None
            self.room.clear()

    def let_go(self) -> None:
        """Hold nothing for now of what was read; what is asked for again is read again."""
        if self._kept is not None:
            self._kept = {}
            self.room.clear()
        if self.buffers is not None:
            self.buffers.drop()

    def within(self, nbytes: int, shared: Room, spared: int = 0) -> None:
        """Hold the layers that take at most so many bytes as they are computed, with copies of a matrix as
        planted mistakes make them, and of others what finds room in that `shared` with others, of which
        `spared` are left free."""
        self.limit, self.room = nbytes, Room(max(0, shared.size - spared), within=shared)

    @property
    def at_hand(self) -> int | None:
        """Bytes that all sides together may hold; None: whatever there is."""
        return None if self.limit is None else (self.room.within or self.room).size

    @property
    def making(self) -> int:
        """Bytes that are there while a tensor is made, besides what is held: none that count where it is read
        as it is, or by rows."""
        return 0

    @property
    def exchanged(self) -> int:
        """Bytes of what changes places where a mistake is planted, and is not held: none of rows, which are
        read from where they are."""
        return 0

    @cached_property
    def _of_layers(self) -> dict[tuple[str, int], int]:
        return of_layers(self.tensors.values())

    @property
    def streams(self) -> bool:
        """Whether any matrix is held by rows, for want of room."""
        return not all(is_small(t) or self._whole(t) for t in self.tensors.values())

    def _whole(self, info: TensorInfo) -> bool:
        limit = self.limit
        return limit is None or fits(info, self._of_layers, self.dtype.itemsize, limit)

    def _fits(self, info: TensorInfo) -> bool:
        """Whether a tensor is held as it is computed, with its layer, and two copies of it beside, as a
        planted mistake makes them; what is kept so is counted."""
        if self.limit is None or is_small(info):
            return True
        return self._whole(info) and (self._kept is None or self.room.take(info.numel * self.dtype.itemsize))

    def _streamed(self, info: TensorInfo) -> Tensor:
        give_back()
        if self.buffers is not None:
            self.buffers.drop()
        stored = getattr(torch, DTYPES[info.dtype].torch)
        wanted = self.dtype if stored.is_floating_point else stored
        width = prod(info.shape[1:])

        def fill(first: int, rows: Tensor) -> None:
            buffer = rows.view(torch.uint8).numpy().reshape(-1).data
            self.checkpoint.read_into(info, first * width * stored.itemsize, buffer)

        def read(first: int, last: int) -> Tensor:
            rows = torch.empty(last - first, *info.shape[1:], dtype=stored)
            fill(first, rows)
            return rows

        room = self.room if self._kept is not None else Room(0)
        return Streamed(Rows(tuple(info.shape), read, wanted, torch.device(self.device), room, fill=fill))

    def _load(self, info: TensorInfo) -> Tensor:
        stored = getattr(torch, DTYPES[info.dtype].torch)
        if (stored.is_floating_point or len(info.shape) > 2) and not self._fits(info):
            return self._streamed(info)
        wanted = self.dtype if stored.is_floating_point else stored
        out = self._empty(info.numel, wanted)
        if stored == wanted and out.device.type == "cpu":
            if info.nbytes:
                self.checkpoint.read_into(info, 0, out.view(torch.uint8).numpy().data)
            return out.view(info.shape)
        start = 0
        for piece in self._stored(info):
            out[start : start + len(piece)] = piece
            start += len(piece)
        return out.view(info.shape)

    def _stored(self, info: TensorInfo) -> Iterator[Tensor]:
        """Its numbers in order, some at a time, as they are stored; each piece takes the place of the one
        before."""
        stored = getattr(torch, DTYPES[info.dtype].torch)
        step = max(1, PIECE // stored.itemsize)
        staging = torch.empty(min(step, info.numel), dtype=stored)
        for start in range(0, info.numel, step):
            piece = staging[: min(step, info.numel - start)]
            buffer = piece.view(torch.uint8).numpy().data
            self.checkpoint.read_into(info, start * stored.itemsize, buffer)
            yield piece

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The numbers of a tensor as it is computed with, in order, flat, some at a time."""
        info = self.tensors[name]
        self.used.add(name)
        for piece in self._stored(info):
            yield piece.to(self.dtype) if piece.is_floating_point() else piece

    def _empty(self, count: int, dtype: torch.dtype) -> Tensor:
        if self.buffers is None or self.device != "cpu" or count < SMALL:
            return torch.empty(count, dtype=dtype, device=self.device)
        return self.buffers.lend(count * dtype.itemsize).view(dtype)


@contextmanager
def reused(*weights: Weights) -> Iterator[None]:
    """Inside, what one of these held and let go of is where the next one is read to."""
    shared = Buffers()
    for w in weights:
        w.buffers = shared
    try:
        yield
    finally:
        for w in weights:
            w.buffers = None


def ranks_of(checkpoint: Checkpoint, *, stages: bool = False) -> list[Mapping[str, TensorInfo]]:
    """One mapping for each model-parallel rank. Files that share a name are ranks, each a mapping of its own;
    files of different names are one model dealt out over several files, and so one mapping. With `stages`
    they are Megatron's, whose pipeline stages and expert-parallel ranks are joined: names number layers and
    experts through the model then."""
    if stages:
        from ckpt_tool.reference.megatron import join_ranks, join_stages

        run = placed(checkpoint)
        rows = run.rows().items()
        joined = {at: join_stages([checkpoint.files[f].tensors for f in row]) for at, row in rows}
        return [*join_ranks(joined, run.own)]
    files: list[Mapping[str, TensorInfo]] = [f.tensors for f in checkpoint.files.values() if f.tensors]
    if len({name for f in files for name in f}) == sum(map(len, files)):
        return [{name: info for f in files for name, info in f.items()}]
    return files
