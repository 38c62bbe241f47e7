"""The original as `--gqa` defines what is to be converted: with its key/value heads pooled, rounded to the
dtype of the output, in its own layout. A conversion that pools is compared with that model and not with the
one in the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ckpt_tool.checkpoint.base import Checkpoint, TensorFile, TensorInfo
from ckpt_tool.convert.layout import Part, Step, apply
from ckpt_tool.convert.plan import Plan


def pooled_original(checkpoint: Checkpoint, plan: Plan | None) -> Checkpoint:
    """`checkpoint`, or a view of it in which the tensors that `plan` takes means of are these means."""
    steps = {(p.file, p.name): s for s in (plan.steps if plan else ()) if s.mean for p in s.sources}
    if not steps:
        return checkpoint
    files: dict[str, TensorFile] = {
        name: _PooledFile(checkpoint, file, {t: s for (f, t), s in steps.items() if f == name})
        for name, file in checkpoint.files.items()
    }
    return checkpoint.with_files(files)


class _PooledFile(TensorFile):
    """A file some of whose tensors are means; `steps` has the plan's step for each. Reading one computes it
    whole: a layer's keys or values."""

    def __init__(self, checkpoint: Checkpoint, file: TensorFile, steps: Mapping[str, Step]) -> None:
        self.path, self.name, self.format, self.metadata = file.path, file.name, file.format, file.metadata
        self._checkpoint, self._file = checkpoint, file
        self._steps = {name: _in_own_layout(step, file.name, name) for name, step in steps.items()}
        self.tensors = {
            name: self._info(self._steps[name]) if name in self._steps else tensor
            for name, tensor in file.tensors.items()
        }

    def _info(self, step: Step) -> TensorInfo:
        (part,) = step.targets
        return TensorInfo(part.name, part.dtype, part.shape(step.sizes), part.file)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name not in self._steps:
            self._file.read_into(name, offset, buffer)
            return
        step = self._steps[name]
        arrays = [self._checkpoint.read(self._checkpoint.files[p.file].tensors[p.name]) for p in step.sources]
        data = np.ascontiguousarray(apply(step, arrays)[0]).reshape(-1).data.cast("B")
        buffer[:] = data[offset : offset + len(buffer)]

    def extent(self, name: str) -> tuple[int, int] | None:
        return None if name in self._steps else self._file.extent(name)

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        """The file that this is a view of stays open: it is its opener's."""


def _in_own_layout(step: Step, file: str, name: str) -> Step:
    """The step from the sources to the pooled tensor as `file` would hold it: in the source's axis order. A
    rank that shares a head with others holds the whole of it then, as ranks do that are more than heads."""
    part = next(p for p in step.sources if (p.file, p.name) == (file, name))
    own = Part(
        file,
        name,
        step.targets[0].dtype,
        tuple(tuple(a for a in group if a != step.mean) for group in part.dims),
        tuple(r for r in part.ranges if r[0] != step.mean),
    )
    within = {a: (lo, hi) for a, lo, hi in own.ranges}
    near = [p for p in step.sources if _meets(p, within)]
    return replace(step, sources=tuple(near), targets=(own,))


def _meets(part: Part, within: Mapping[str, tuple[int, int]]) -> bool:
    return all(lo < within[a][1] and within[a][0] < hi for a, lo, hi in part.ranges if a in within)
