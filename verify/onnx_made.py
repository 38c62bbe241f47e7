"""`ckpt-tool export onnx`: a graph written beside its place, proved there, then published whole."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckpt_tool.checkpoint.onnx_file import SUFFIX
from ckpt_tool.convert import aside, disk
from ckpt_tool.errors import fail
from ckpt_tool.verify.compute import computing_for
from ckpt_tool.verify.onnx_export import DATA, export, for_task, form_of, heads_left_out
from ckpt_tool.verify.onnx_judges import Source, source_of
from ckpt_tool.verify.onnx_names import USUAL, chosen_task, documented_opset
from ckpt_tool.verify.onnx_parity import rows_of, verify_file
from ckpt_tool.verify.prompts import Prompts
from ckpt_tool.verify.report import Finding, Report

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What an export is asked for; `task` None is that of the model's class."""

    task: str | None = None
    with_past: bool = False
    opset: int = USUAL
    overwrite: bool = False


def export_onnx(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    asked: Asked = Asked(),
    source: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    prompts: Prompts | None = None,
    tell: Tell = lambda text: None,
) -> Report:
    """Export `folder` to `out` and beside it `out`.data. The report is of the files as they were published;
    one that does not pass is of files that were not."""
    import onnx  # noqa: F401 - what is missing is said before any work
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    aside.sweep(os.path.realpath(Path(out).parent), _taken_back)
    place = _place(Path(out), asked.overwrite)
    with source_of(folder, source, settings) as found, _beside(place, os.fspath(out)) as hidden:
        task = chosen_task(asked.task, found.config, with_past=asked.with_past)
        tell("onnx: exporting")
        notes = _export(found, task, asked, hidden, place.name, prompts)
        report = verify_file(hidden / place.name, found, prompts=prompts, tell=tell)
        report.title = "ckpt-tool export onnx"
        report.findings[:0] = notes
        size = sum((hidden / name).stat().st_size for name in _names(place))
        where = os.fspath(out) if report.status == "pass" else "none: what was exported does not pass"
        report.facts["output"] = (
            f"{where} and {place.name}{DATA} ({size:,} bytes)" if report.status == "pass" else where
        )
        if report.status == "pass":
            _publish(hidden, place)
        return report


@contextmanager
def _beside(place: Path, out: str) -> Iterator[Path]:
    try:
        with aside.folder(os.fspath(place.parent)) as hidden:
            yield hidden
    except OSError as error:
        raise disk.failure(error, out) from error


def _names(place: Path) -> tuple[str, str]:
    return place.name, place.name + DATA


def _place(out: Path, overwrite: bool) -> Path:
    """Where the graph goes: kinds `usage`, `output-failed`, `output-exists`."""
    if not out.name.lower().endswith(SUFFIX):
        fail("usage", f"expected a name that ends in {SUFFIX}, found {out.name!r}", where="--out")
    place = Path(os.path.realpath(out.parent)) / out.name
    if not place.parent.is_dir():
        hint = f"mkdir -p {shlex.quote(str(place.parent))}"
        text = f"expected an existing folder {place.parent}, found none"
        fail("output-failed", text, file=os.fspath(out), hint=hint)
    if not os.access(place.parent, os.W_OK | os.X_OK):
        fail(
            "output-failed",
            f"expected to be allowed to write into {place.parent}, found it read-only",
            file=os.fspath(out),
        )
    for name in _names(place):
        there = place.parent / name
        if there.is_symlink() or (there.exists() and not there.is_file()):
            fail(
                "not-replaceable",
                "expected a free name or a file, found something else",
                file=os.fspath(there),
            )
        if there.exists() and not overwrite:
            hint = "--overwrite replaces it"
            fail("output-exists", "expected a free name, found a file", file=os.fspath(there), hint=hint)
    return place


def _export(
    source: Source, task: str, asked: Asked, folder: Path, name: str, prompts: Prompts | None
) -> list[Finding]:
    with computing_for(source.checkpoint):
        side = for_task(source.converted(torch.float32), task)
        rows_of(source, side, prompts)  # that the model does not take them is said before any work
        form = form_of(side, task, with_past=asked.with_past)
        export(side, form, asked.opset, folder, name)
    notes = []
    documented = documented_opset(side.module)
    if documented is not None and documented != asked.opset:
        text = f"opset {asked.opset}; the configuration class asks for {documented}, which is not written"
        notes.append(Finding("onnx", "opset", "note", text))
    if left := heads_left_out(side, form):
        text = f"not in the task {task}, and left out: {', '.join(left)}"
        notes.append(Finding("onnx", "heads", "note", text))
    return notes


def _publish(hidden: Path, place: Path) -> None:
    """The weights first, as the graph is nothing without them. An older graph goes before its weights are
    replaced, so that nobody reads it with others."""
    graph, data = _names(place)
    for name in (data, graph):
        with open(hidden / name, "rb") as file:
            disk.fsync(file.fileno())
    with suppress(FileNotFoundError):
        os.unlink(place)
    linked = hidden / f"{data}.link"  # a second name, by which they are known if this process is killed now
    try:
        os.link(hidden / data, linked)
    except OSError:  # a file system without
        linked = hidden / data
    os.replace(linked, place.parent / data)
    os.replace(hidden / graph, place)


def _taken_back(left: Path) -> None:
    """Remove the weights that an export published if its process was killed before the graph: they are those
    in the folder that it `left`, where the graph still is."""
    for own in left.glob(f"*{DATA}"):
        data = left.parent / own.name
        graph = own.name.removesuffix(DATA)
        waits = (left / graph).exists() and not os.path.lexists(left.parent / graph)
        if waits and data.exists() and own.samefile(data):
            data.unlink()
