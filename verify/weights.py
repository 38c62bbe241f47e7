"""Tensors of an opened checkpoint as a lazy mapping for a forward pass: read when asked for, in the dtype of
the computation, and forgotten unless a `keep` block holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.checkpoint.megatron import expert_grids
from ckpt_tool.verify.needs import largest

PIECE = 16 << 20  # bytes read at once; bounds what exists twice, in the file's dtype and in the computation's


class Weights(Mapping[str, Tensor]):
    """`tensors` of `checkpoint`; floating ones come in `dtype`, all on `device`. `used` collects the names
    that were ever asked for, so that a report can say what no pass has touched."""

    def __init__(
        self, checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], dtype: torch.dtype, device: str
    ) -> None:
        self.checkpoint, self.tensors, self.dtype, self.device = checkpoint, tensors, dtype, device
        self.used: set[str] = set()
        self._kept: dict[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        info = self.tensors[name]
        self.used.add(name)
        if self._kept is None:
            return self._load(info)
        if name not in self._kept:
            self._kept[name] = self._load(info)
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def computed_in(self, dtype: torch.dtype) -> Weights:
        """The same tensors in another dtype."""
        return Weights(self.checkpoint, self.tensors, dtype, self.device)

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Hold every tensor read inside, so that several prompts share one reading of a layer."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def _load(self, info: TensorInfo) -> Tensor:
        stored = getattr(torch, DTYPES[info.dtype].torch)
        wanted = self.dtype if stored.is_floating_point else stored
        out = torch.empty(info.numel, dtype=wanted, device=self.device)
        step = max(1, PIECE // stored.itemsize)
        staging = torch.empty(min(step, info.numel), dtype=stored)
        for start in range(0, info.numel, step):
            piece = staging[: min(step, info.numel - start)]
            buffer = piece.view(torch.uint8).numpy().data
            self.checkpoint.read_into(info, start * stored.itemsize, buffer)
            out[start : start + len(piece)] = piece
        return out.view(info.shape)


def ranks_of(checkpoint: Checkpoint, *, stages: bool = False) -> list[Mapping[str, TensorInfo]]:
    """One mapping for each model-parallel rank. Files that share a name are ranks, each a mapping of its own;
    files of different names are one model dealt out over several files, and so one mapping. With `stages`
    they are Megatron's, whose pipeline stages and expert-parallel ranks are joined: names number layers and
    experts through the model then."""
    if stages:
        from ckpt_tool.reference.megatron import join_experts, join_stages

        return [
            join_experts([join_stages([checkpoint.files[f].tensors for f in row]) for row in rows])
            for rows in zip(*expert_grids(checkpoint), strict=True)
        ]
    files: list[Mapping[str, TensorInfo]] = [f.tensors for f in checkpoint.files.values() if f.tensors]
    if len({name for f in files for name in f}) == sum(map(len, files)):
        return [{name: info for f in files for name, info in f.items()}]
    return files


def needed(source: Checkpoint | None, output: Checkpoint, itemsize: int) -> str:
    """What parity holds at once, in words, before it starts: the heaviest layer of each side."""
    sides = [largest(c, itemsize) for c in (source, output) if c is not None]
    return f"about {sum(sides) / 1e6:,.1f} MB for a layer of each side, besides torch and the activations"
