"""Casts: the one that an output shows and nothing records, and the source as a cast leaves it.

The source as `--dtype` defines what is to be converted: each tensor rounded to the dtype that the plan gives
its target. A conversion that casts is compared with that model, as the bits are, and not with the one in the
files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, FLOATS, Checkpoint, TensorFile, TensorInfo
from ckpt_tool.convert.casting import CASTABLE, cast, rounds
from ckpt_tool.convert.layout import Step
from ckpt_tool.convert.plan import Plan

Target = Callable[[str, str], TensorInfo | None]  # the output's tensor of a planned file and name


def cast_seen(plan: Plan, target: Target) -> str | None:
    """The floating dtype that tensors of the output have where the plan expects another one; None where that
    is none, or several. Others may have kept theirs, as norms often do."""
    pairs = [
        (t.dtype, found.dtype)
        for f in plan.outputs
        for t in f.tensors
        if (found := target(t.file, t.name)) is not None and {t.dtype, found.dtype} <= set(CASTABLE)
    ]
    dtypes = {b for a, b in pairs if a != b}
    return dtypes.pop() if len(dtypes) == 1 else None


def as_found(plan: Plan, cast: Plan, target: Target) -> Plan:
    """The plan with the dtypes of the output: `cast` is the same plan with all floating tensors cast. Its
    config is that of the dtype that more of the elements have."""

    def key(file: str, name: str) -> tuple[str, str]:
        return ("" if plan.direction == "to-hf" else file, name)

    held = [t for f in plan.outputs for t in f.tensors]
    kept = {
        key(t.file, t.name): t.dtype
        for t in held
        if (found := target(t.file, t.name)) is not None and found.dtype == t.dtype
    }
    count = sum(t.numel for t in held if t.dtype in FLOATS and key(t.file, t.name) not in kept)
    mostly = count * 2 > sum(t.numel for t in held if t.dtype in FLOATS)

    def step(own: Step, s: Step) -> Step:
        if s.compare and any(key(p.file, p.name) in kept for p in s.targets):
            return own
        targets = (replace(p, dtype=kept.get(key(p.file, p.name), p.dtype)) for p in s.targets)
        return replace(s, targets=tuple(targets))

    base = cast if mostly else plan
    return replace(
        base,
        steps=tuple(map(step, plan.steps, cast.steps)),
        outputs=tuple(
            replace(
                f, tensors=tuple(replace(t, dtype=kept.get(key(t.file, t.name), t.dtype)) for t in f.tensors)
            )
            for f in cast.outputs
        ),
        lossy=plan.lossy,
    )


def loses(plan: Plan) -> bool:
    """Whether any of the casts of a plan rounds: a wider dtype holds each value as it is."""
    return any(rounds(p.dtype, t.dtype) for s in plan.steps for p in s.sources for t in s.targets)


def cast_forward(checkpoint: Checkpoint, plan: Plan | None) -> Checkpoint:
    """`checkpoint`, the source of `plan`, or a view of it in which the tensors that the plan casts are cast.
    Tensors that the view holds in the target's dtype already stay as they are."""
    to = {
        (p.file, p.name): step.targets[0].dtype
        for step in (plan.steps if plan else ())
        for p in step.sources
        if p.dtype != step.targets[0].dtype
    }
    found = {
        (t.file, t.name): to[t.file, t.name]
        for t in checkpoint
        if (t.file, t.name) in to and t.dtype != to[t.file, t.name]
    }
    if not found:
        return checkpoint
    files: dict[str, TensorFile] = {
        name: _CastFile(file, {t: d for (f, t), d in found.items() if f == name})
        for name, file in checkpoint.files.items()
    }
    return checkpoint.with_files(files)


class _CastFile(TensorFile):
    """A file some of whose tensors are read in another dtype; `to` has it by name."""

    def __init__(self, file: TensorFile, to: Mapping[str, str]) -> None:
        self.path, self.name, self.format, self.metadata = file.path, file.name, file.format, file.metadata
        self._file, self._to = file, to
        self.tensors = {
            name: replace(tensor, dtype=to[name]) if name in to else tensor
            for name, tensor in file.tensors.items()
        }

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name not in self._to:
            self._file.read_into(name, offset, buffer)
            return
        stored, wanted = DTYPES[self._file.tensors[name].dtype], DTYPES[self._to[name]]
        first, last = offset // wanted.itemsize, -(-(offset + len(buffer)) // wanted.itemsize)
        read = np.empty(last - first, dtype=stored.bits)
        self._file.read_into(name, first * stored.itemsize, read.data.cast("B"))
        made = np.empty(last - first, dtype=wanted.bits)
        cast(read, stored.name, wanted.name, made)
        skipped = offset - first * wanted.itemsize
        buffer[:] = made.data.cast("B")[skipped : skipped + len(buffer)]

    def extent(self, name: str) -> tuple[int, int] | None:
        return None if name in self._to else self._file.extent(name)

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        """The file that this is a view of stays open: it is its opener's."""
