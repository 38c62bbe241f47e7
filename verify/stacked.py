"""Folders in which tensors are stacked as a library holds them in memory: seen one by one, as the families
know them, while a forward pass takes them apart by its reading's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.checkpoint.base import Checkpoint, TensorFile, TensorInfo
from ckpt_tool.convert.one_by_one import OneByOne
from ckpt_tool.verify.holding import SMALL, Room
from ckpt_tool.verify.packed_weights import PackedWeights, as_stored
from ckpt_tool.verify.weights import Weights

SCALES = "_scale_inv"  # behind the name of codes
Apart = Callable[[Mapping[str, Tensor], str], Tensor]  # (stacked tensors, name of one) -> that one


class StackedWeights(Weights):
    """Names and shapes are those of the tensors one by one; what they hold comes out of the stacked ones,
    through `apart`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, TensorInfo],
        dtype: torch.dtype,
        device: str,
        apart: Apart,
    ) -> None:
        super().__init__(checkpoint, tensors, dtype, device)
        self.apart = apart
        stored = replace(checkpoint, files={n: _stored(f) for n, f in checkpoint.files.items()})
        self.stacked = Weights(stored, {t.name: t for t in stored}, dtype, device)

    def computed_in(self, dtype: torch.dtype) -> StackedWeights:
        return self._sharing(StackedWeights(self.checkpoint, self.tensors, dtype, self.device, self.apart))

    def let_go(self) -> None:
        self.stacked.let_go()  # first: what it holds counts in the room of these too
        super().let_go()

    def within(self, nbytes: int, shared: Room, spared: int = 0) -> None:
        super().within(nbytes, shared, spared)
        self.stacked.within(nbytes, self.room)

    def _has_room(self, name: str, made: Tensor) -> bool:
        """Whether one that was taken out of a stack is held beside it."""
        free = self.limit is None or name in self.stacked.tensors or made.numel() < SMALL
        return free or self.room.take(made.nbytes)

    @contextmanager
    def keep(self) -> Iterator[None]:
        with super().keep(), self.stacked.keep():
            yield

    def _load(self, info: TensorInfo) -> Tensor:
        return self.apart(self.stacked, info.name)


class StackedCodes(PackedWeights):
    """The same of codes and their scales: the numbers of one weight are made of what `apart` finds in the
    stacked ones."""

    def __init__(self, *said: Any, apart: Apart, **more: Any) -> None:
        super().__init__(*said, **more)
        self.apart = apart
        files = {n: _stored(f) for n, f in self.checkpoint.files.items()}
        self.whole = replace(self.checkpoint, files=files)
        self.held = {t.name: t for t in self.whole}
        self.plain = Weights(self.whole, self.held, self.dtype, self.device)

    def computed_in(self, dtype: torch.dtype) -> StackedCodes:
        said = (self.checkpoint, self.stored, dtype, self.device, self.inventory, self.original)
        return self._sharing(StackedCodes(*said, apart=self.apart))

    def let_go(self) -> None:
        self.plain.let_go()
        super().let_go()

    def within(self, nbytes: int, shared: Room, spared: int = 0) -> None:
        super().within(nbytes, shared, spared)
        self.plain.within(nbytes, self.room)

    @contextmanager
    def keep(self) -> Iterator[None]:
        with super().keep(), self.plain.keep():
            yield

    def _load(self, info: TensorInfo) -> Tensor:
        if info.name in self.formulas:
            return super()._load(info)
        return self.apart(self.plain, info.name)

    def _as_stored(self, info: TensorInfo) -> Tensor:
        end = SCALES if info.name.endswith(SCALES) else ""
        made: Any = self.apart(_Behind(self, end), info.name.removesuffix(end))
        return made.whole() if isinstance(made, _Stack) else made


class _Stack:
    """A tensor as it is stored, of which only what is taken of its first dimension is read."""

    def __init__(self, checkpoint: Checkpoint, info: TensorInfo) -> None:
        self.checkpoint, self.info = checkpoint, info

    def __getitem__(self, e: int) -> Tensor:
        one = replace(self.info, shape=self.info.shape[1:])
        return as_stored(self.checkpoint, one, e * one.nbytes)

    def whole(self) -> Tensor:
        return as_stored(self.checkpoint, self.info)


class _Behind(Mapping[str, Any]):
    """Tensors as they are stored, each under what stands before `end` in its name."""

    def __init__(self, weights: StackedCodes, end: str) -> None:
        self.weights, self.end = weights, end

    def __getitem__(self, name: str) -> Any:
        return _Stack(self.weights.whole, self.weights.held[name + self.end])

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.held)

    def __len__(self) -> int:
        return len(self.weights.held)


def _stored(file: TensorFile) -> TensorFile:
    return file.stored if isinstance(file, OneByOne) else file
