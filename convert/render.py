"""A plan as tables for people: one row for each rule of the family's table, layers folded into ranges."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.convert.layout import Part, Step, dims_text
from ckpt_tool.convert.plan import Dropped, Plan, fold_key, folded_name
from ckpt_tool.errors import printable

SHOWN_FILES = 20


@dataclass
class _Row:
    """Steps that differ in the numbers in their names only."""

    first: Step
    sources: list[list[str]] = field(default_factory=list)  # for each source of the first step, its names
    targets: list[list[str]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    count: int = 0


def plan_table(plan: Plan, console: Console) -> None:
    """Print what the plan does: tensors, config, what is left out, files, and what to know about it."""
    way = "original to Hugging Face" if plan.direction == "to-hf" else "Hugging Face to original"
    tensors = sum(len(f.tensors) for f in plan.outputs)
    console.print(
        Text(f"{plan.family}, {way}: {tensors} tensors, {_size(plan.bytes_out)} in {len(plan.outputs)} file")
        + Text("s" * (len(plan.outputs) != 1))
    )
    console.print(_steps(plan))
    console.print(_config(plan))
    if plan.dropped:
        console.print(_dropped(plan.dropped))
    console.print(_outputs(plan))
    foretold = [f"{f.name}, in {', '.join(f.where)}: {f.reason}" for f in plan.foretold]
    for label, lines in (("note", plan.notes), ("lossy", plan.lossy), ("foretold", foretold)):
        for line in lines:
            console.print(Text(f"{label}: {printable(line, 1000)}"))


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for column in columns:
        table.add_column(
            column, overflow="fold", header_style="dim", justify="right" if column in right else "left"
        )
    return table


def _steps(plan: Plan) -> Table:
    table = _table("Tensors", "steps", "source", "shape", "layout", "target", "shape ", right=("steps",))
    for row in _rows(plan.steps):
        step, sizes = row.first, row.first.sizes
        source, target = step.sources[0], step.targets[0]
        table.add_row(
            str(row.count),
            _names(row.sources, step.sources, row.files),
            _shape(source, sizes),
            Text(_layout(step)),
            _names(row.targets, step.targets, set()),
            _shape(target, sizes),
        )
    return table


def _rows(steps: Iterable[Step]) -> list[_Row]:
    rows: dict[tuple[object, ...], _Row] = {}
    for step in steps:
        # A side of one name in many files (ranks) is one entry; so are copies on other ranks.
        names = [list(dict.fromkeys(p.name for p in side)) for side in (step.sources, step.targets)]
        key = (step.compare, step.note, *(fold_key(n) for side in names for n in side))
        row = rows.get(key)
        if row is None:
            row = rows[key] = _Row(step, [[] for _ in names[0]], [[] for _ in names[1]])
        for held, new in zip((*row.sources, *row.targets), (*names[0], *names[1]), strict=True):
            held.append(new)
        row.files.update(p.file for p in step.sources)
        row.count += 1
    return list(rows.values())


def _names(names: list[list[str]], parts: Sequence[Part], files: set[str]) -> Text:
    """Folded names; with several parts under one name, how many files share it."""
    alike: dict[str, list[str]] = {}
    for group in names:
        alike.setdefault(fold_key(group[0]), []).extend(group)
    text = "\n".join(printable(folded_name(list(dict.fromkeys(g)))) for g in alike.values())
    ranks = len(parts) // max(1, len({p.name for p in parts}))
    if ranks > 1:
        text += f"  ({ranks} ranks)"
    return Text(text)


def _shape(part: Part, sizes: dict[str, int]) -> Text:
    return Text(f"{'x'.join(map(str, part.shape(sizes)))} {DTYPES[part.dtype].torch}")


def _layout(step: Step) -> str:
    left, right = dims_text(step.sources[0].dims), dims_text(step.targets[0].dims)
    change = left if left == right else f"{left} -> {right}"
    words = {"tied": "compared: tied", "replicated": "compared: copies on other ranks"}
    return f"{words[step.compare]}, {change}" if step.compare else change


def _config(plan: Plan) -> Table:
    original = "params.json" if any(d.name == "params.json" for d in plan.documents) else "args"
    name = "config.json" if plan.direction == "to-hf" else original
    table = _table(name, "field", "value", "from")
    for key, value in plan.config.items():
        table.add_row(Text(key), Text(printable(json.dumps(value.value))), Text(printable(value.source, 400)))
    return table


def _dropped(dropped: Iterable[Dropped]) -> Table:
    table = _table("Left out", "tensors", "name", "bytes", "why", right=("tensors", "bytes"))
    groups: dict[tuple[str, str], list[Dropped]] = {}
    for d in dropped:
        groups.setdefault((fold_key(d.tensor.name), d.reason), []).append(d)
    for (_, reason), group in groups.items():
        names = list(dict.fromkeys(d.tensor.name for d in group))
        table.add_row(
            str(len(group)),
            Text(printable(folded_name(names))),
            _size(sum(d.tensor.nbytes for d in group)),
            Text(printable(reason)),
        )
    return table


def _outputs(plan: Plan) -> Table:
    table = _table("Files", "file", "tensors", "size", "what", right=("tensors", "size"))
    for f in plan.outputs[:SHOWN_FILES]:
        size = _size(sum(t.nbytes for t in f.tensors))
        table.add_row(Text(f.name), str(len(f.tensors)), size, Text(f.format))
    if len(plan.outputs) > SHOWN_FILES:
        table.add_row(Text(f"... and {len(plan.outputs) - SHOWN_FILES} more"), "", "", "")
    for d in plan.documents:
        table.add_row(Text(d.name), "", _size(len(d.content)), Text(printable(d.source)))
    return table


def _size(count: int) -> str:
    for unit, power in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= power:
            return f"{count / power:.2f} {unit}"
    return f"{count} bytes"
