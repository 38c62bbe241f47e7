"""The weights of an ONNX graph in the file beside it: the graph is written from tensors that have no values
(torch's fake tensors), so that what a model of any size takes is the graph and a piece of one tensor.

Source: ONNX (docs/ExternalData.md); onnx-ir 1.1.0 (ExternalTensor); torch 2.13.0 (FakeTensorMode).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.onnx_file import OnnxFile
from ckpt_tool.convert import disk
from ckpt_tool.verify.weights import Weights

INLINE = 256  # bytes up to which a tensor stands in the graph itself
LARGE = 1 << 20  # bytes beyond which a tensor begins at a multiple of PAGE, so that it can be mapped
PAGE = 1 << 16  # of every system, at most


class Some(Mapping[str, Tensor]):
    """Some of the tensors of a mapping, which are read when they are asked for; by other names."""

    def __init__(self, whole: Mapping[str, Tensor], own: Mapping[str, str]) -> None:
        self.whole, self.own = whole, own

    def __getitem__(self, name: str) -> Tensor:
        return self.whole[self.own[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def pieces(tensors: Mapping[str, Tensor], name: str) -> Iterable[Tensor]:
    """The numbers of a tensor in order, flat, some at a time where they come from a file; each piece takes
    the place of the one before."""
    weights, own = _at(tensors, name)
    return (weights[own].reshape(-1),) if not _as_stored(weights) else weights.pieces(own)


def _at(tensors: Mapping[str, Tensor], name: str) -> tuple[Mapping[str, Tensor], str]:
    while isinstance(tensors, Some):
        name, tensors = tensors.own[name], tensors.whole
    return tensors, name


def _as_stored(weights: Mapping[str, Tensor]) -> TypeGuard[Weights]:
    """Whether tensors are cast and no more: those of other classes are made of several, or of codes."""
    return type(weights) is Weights


def in_graph(file: OnnxFile, tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether a graph has the tensor under its name, in its shape, bit for bit; False as well where it is not
    to be said a piece at a time."""
    weights, own = _at(tensors, name)
    info = file.tensors.get(name)
    if info is None or not _as_stored(weights) or info.shape != weights.tensors[own].shape:
        return False
    at = 0
    for piece in weights.pieces(own):
        if DTYPES[info.dtype].torch != str(piece.dtype).removeprefix("torch."):
            return False
        wanted = piece.view(torch.uint8).numpy()
        held = np.empty_like(wanted)
        file.read_into(name, at, held.data)
        if not np.array_equal(held, wanted):
            return False
        at += len(held)
    return True


def without_values(x: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor of its shape and dtype, which takes no memory."""
    with mode:
        return torch.empty(x.shape, dtype=x.dtype)


def put_outside(graph: Any, tensors: Mapping[str, Tensor], data: Path) -> None:
    """Write the initializers of `graph` (of onnx_ir) to `data`, and in the graph say where they are. Those
    without values are the ones of that name in `tensors`. The disk's room is asked for first."""
    import onnx_ir

    outside, end = [], 0
    for value in graph.initializers.values():
        made = value.const_value
        size = int(made.nbytes)
        if size <= INLINE:
            value.const_value = onnx_ir.tensor(_whole(made, tensors, value.name), name=value.name)
            continue
        start = -(-end // PAGE) * PAGE if size > LARGE else end
        outside.append((value, start))
        end = start + size
    folder = os.open(data.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        descriptor = disk.create(folder, data.name)
    finally:
        os.close(folder)
    with closing(os.fdopen(descriptor, "wb")):
        disk.reserve(descriptor, end)
        for value, start in outside:
            made = value.const_value
            at = start
            for piece in _bytes(made, tensors, value.name):
                disk.write_at(descriptor, piece, at)
                at += len(piece)
            assert at - start == made.nbytes, value.name
            disk.start_writeback(descriptor, start, at - start)
            place = onnx_ir.ExternalTensor(
                data.name, start, made.nbytes, made.dtype, shape=made.shape, name=value.name,
                base_dir=os.fspath(data.parent),
            )  # fmt: skip
            value.const_value = place


def _is_fake(made: Any) -> bool:
    return isinstance(getattr(made, "raw", None), FakeTensor)


def _whole(made: Any, tensors: Mapping[str, Tensor], name: str) -> np.ndarray[Any, Any]:
    if not _is_fake(made):
        found: np.ndarray[Any, Any] = made.numpy()
        return found
    return tensors[name].numpy()


def _bytes(made: Any, tensors: Mapping[str, Tensor], name: str) -> Iterator[memoryview]:
    """As ONNX stores them: little-endian, one number after the other."""
    if not _is_fake(made):
        yield memoryview(made.tobytes())
        return
    for piece in pieces(tensors, name):
        yield piece.contiguous().view(torch.uint8).numpy().data
