"""Checkpoints of which there are only headers, in memory: what plans are made from, and what opening the
output of a plan would give."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, Document, TensorFile, TensorInfo
from ckpt_tool.checkpoint.pickle_records import Global, Inert
from ckpt_tool.convert.plan import Plan

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # file -> tensor -> shape


Header = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


class Headers(TensorFile):
    """A container that is not on a disk: headers, and what stands beside the tensors."""

    def __init__(
        self, name: str, headers: Iterable[Header], metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.name, self.path, self.format, self.metadata = name, Path(name), "torch-zip", metadata or {}
        self.tensors = {n: TensorInfo(n, dtype, shape, name) for n, dtype, shape in headers}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        raise AssertionError(f"planning read the data of {name}")

    def extent(self, name: str) -> tuple[int, int] | None:
        return None

    def check_unchanged(self) -> None: ...

    def close(self) -> None: ...


def beside(version: float | None, told: Mapping[str, Any] | None, iteration: int = 10) -> dict[str, Any]:
    found: dict[str, Any] = {"iteration": iteration}
    if version is not None:
        found["checkpoint_version"] = version
    if told is not None:
        found["args"] = Inert(Global("argparse", "Namespace"), (), 0, dict(told))
    return found


def held(
    contents: Shapes,
    metadata: Mapping[str, Any],
    documents: Mapping[str, Path] | None = None,
) -> Checkpoint:
    found = {n: Document(n, p, p.stat().st_size) for n, p in (documents or {}).items()}
    files = {
        f: Headers(f, [(n, "F32", shape) for n, shape in shapes.items()], metadata)
        for f, shapes in contents.items()
    }
    return Checkpoint(Path("m"), files, found)


def planned(plan: Plan) -> dict[str, dict[str, tuple[int, ...]]]:
    """What each file of a plan holds."""
    return {f.name: {t.name: t.shape for t in f.tensors} for f in plan.outputs}


def hugging_face(plan: Plan, folder: Path) -> Checkpoint:
    """The output of a plan to Hugging Face; its documents are written to `folder`."""
    documents = {d.name: d.content for d in plan.documents}
    documents["ckpt-tool.json"] = json.dumps({"original": dict(plan.original)}).encode()
    for name, content in documents.items():
        (folder / name).write_bytes(content)
    return held(planned(plan), {}, {name: folder / name for name in documents})


def rank_files(plan: Plan) -> Checkpoint:
    """The output of a plan to an original of Megatron's."""
    metadata = dict(plan.outputs[0].beside)
    return held(planned(plan), {**metadata, **beside(None, args_of(plan))})


def args_of(plan: Plan) -> dict[str, Any]:
    """The pickled args that a plan to an original of Megatron's writes."""
    found: Any = plan.outputs[0].beside["args"]
    return dict(found.fields)
