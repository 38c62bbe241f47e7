"""A plan as tables for people: one row for each rule of the family's table, layers folded into ranges."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.tensor_names import Folded, fold_key, folded_name
from ckpt_tool.convert.copies import in_words
from ckpt_tool.convert.durable import SPARE_BYTES
from ckpt_tool.convert.facts import ranges
from ckpt_tool.convert.kept import HUGGING_FACE, LAYOUT
from ckpt_tool.convert.layout import Part, Step, dims_text
from ckpt_tool.convert.plan import Dropped, Foretold, Plan
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import printable
from ckpt_tool.terminal import Column, Screen, paragraph, say, table

SHOWN_FILES = 20
MEMORY_BYTES = 250_000_000  # what converting stays below, for any number and size of tensors


@dataclass
class _Row:
    """Steps that differ in the numbers in their names only."""

    first: Step
    sources: list[Folded]  # for each source of the first step, the names
    targets: list[Folded]
    count: int = 0


def plan_table(plan: Plan, console: Screen, opened: Iterable[str] = ()) -> None:
    """Print what the plan does: tensors, config, what is left out, files, what it needs and what to know;
    `opened` are notes on the files that were opened."""
    kept = plan.original.get(LAYOUT) == HUGGING_FACE and plan.direction == "to-hf"
    way = "original to Hugging Face" if plan.direction == "to-hf" else "Hugging Face to original"
    way = "Hugging Face, as it is" if kept else way
    tensors = sum(len(f.tensors) for f in plan.outputs)
    files = f"{len(plan.outputs)} file" + "s" * (len(plan.outputs) != 1)
    say(console, f"{plan.family}, {way}: {tensors} tensors, {_size(plan.bytes_out)} in {files}")
    for part in (_steps, _config, _dropped, _outputs):
        part(plan, console)
    paragraph(console, needs(plan), first="needs: ", hang=7)
    foretold = [f"{f.name}, in {_places(f)}: {f.reason}" for f in plan.foretold]
    notes = (*opened, *plan.notes)
    for label, lines in (("note", notes), ("lossy", plan.lossy), ("foretold", foretold)):
        for line in lines:
            paragraph(console, printable(line, 1000), first=f"{label}: ", hang=len(label) + 2)


def as_html(plan: Plan) -> str:
    """What a terminal of 100 columns shows, for a notebook."""
    from rich.console import Console

    screen = Console(file=io.StringIO(), width=100, highlight=False, color_system=None)
    plan_table(plan, screen)
    assert isinstance(screen.file, io.StringIO)
    text = html.escape(screen.file.getvalue().rstrip())
    return f'<pre style="white-space:pre;overflow-x:auto;line-height:1.35">{text}</pre>'


CELLS = ("source", "source_file", "target", "target_file", "dtype", "shape", "layout", "compared")


def cells(plan: Plan) -> Iterator[tuple[object, ...]]:
    """A row for each source and target of each step; see `CELLS`."""
    for step in plan.steps:
        for source in step.sources:
            for target in step.targets:
                dtype, shape = DTYPES[target.dtype].torch, target.shape(step.sizes)
                files = (source.name, source.file, target.name, target.file)
                yield (*files, dtype, shape, _layout(step), step.compare)


def needs(plan: Plan) -> str:
    """What converting takes, in words: bytes to write, room on the disk, memory."""
    documents = sum(d.size for d in plan.documents)
    written = plan.bytes_out + documents
    free = written + written // 100 + SPARE_BYTES  # as the executor asks before it starts
    memory = f"at most {MEMORY_BYTES // 10**6} MB of memory"
    return f"{_size(written)} to write, {_size(free)} free where the output goes, {memory}"


def _places(foretold: Foretold) -> str:
    layers = [place for place in foretold.where if isinstance(place, int)]
    named = [place for place in foretold.where if isinstance(place, str)]
    return ", ".join([*named, *([f"layers {ranges(layers)}"] if layers else [])])


def _steps(plan: Plan, console: Screen) -> None:
    """Three lines for each rule: the source, the target, and how the axes move if they do."""
    rows = []
    for row in _rows(plan.steps):
        step, sizes = row.first, row.first.sizes
        source, target = step.sources[0], step.targets[0]
        names = _names(row.sources, step.sources)
        made = _names(row.targets, step.targets)
        layout = _layout(step)
        lines = [*names, *(f"-> {n}" for n in made), *([layout] if layout else [])]
        shapes = [_shape(source, sizes), *[""] * (len(names) - 1), _shape(target, sizes)]
        for k, line in enumerate(lines):
            rows.append((str(row.count) if k == 0 else "", line, shapes[k] if k < len(shapes) else ""))
    heads = (Column("steps", right=True), Column("source -> target"), Column("shape", whole=True))
    table(console, heads, rows, title="Tensors")


def _rows(steps: Sequence[Step]) -> list[_Row]:
    packed = steps if isinstance(steps, Steps) else Steps(steps)
    rows: dict[tuple[object, ...], _Row] = {}
    for first, count, sources, targets in sorted(_folded(packed), key=lambda part: part[0]):
        template = packed.templates[packed.kinds[first]]
        key = (template.compare, template.note, *[f.key for f in (*sources, *targets)])
        if (row := rows.get(key)) is None:
            rows[key] = _Row(packed[first], sources, targets, count)
            continue
        for held, new in zip((*row.sources, *row.targets), (*sources, *targets), strict=True):
            held.join(new)
        row.count += count
    return list(rows.values())


# The first of some steps, how many they are, and for each name of a side of the first those of all.
_Found = tuple[int, int, list[Folded], list[Folded]]
_Keys = tuple[int, tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]


def _folded(steps: Steps) -> list[_Found]:
    """Steps of one template by what their names are but for the numbers in them."""
    groups: dict[_Keys, _Found] = {}
    at = 0
    for kind, columns in steps.runs():
        before = len(steps.templates[kind].sources)
        if len(columns) == 2:
            _fold_pairs(groups, kind, at, columns[0], columns[1])
        else:
            for k, names in enumerate(zip(*columns, strict=True), at):
                # A side of one name in many files (ranks) is one entry; so are copies on other ranks.
                sides = [list(dict.fromkeys(side)) for side in (names[:before], names[before:])]
                if not _taken(groups, kind, k, *([side] for side in sides), count=1):
                    _taken(groups, kind, k, *map(_alike, sides), count=1)
        at += len(columns[0])
    return list(groups.values())


def _alike(names: Iterable[str]) -> list[list[str]]:
    """The names of one side by what they are but for numbers: experts of a layer are one entry."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        found.setdefault(fold_key(name), []).append(name)
    return list(found.values())


def _fold_pairs(
    groups: dict[_Keys, _Found], kind: int, first: int, sources: Sequence[str], targets: Sequence[str]
) -> None:
    """Those from one tensor to one. Rows of a table that follow one another may have one template: halves are
    tried, and halves of these, until each holds names of one row."""
    if _taken(groups, kind, first, [sources], [targets]):
        return
    half = len(sources) // 2
    _fold_pairs(groups, kind, first, sources[:half], targets[:half])
    _fold_pairs(groups, kind, first + half, sources[half:], targets[half:])


def _taken(
    groups: dict[_Keys, _Found], kind: int, first: int, *sides: Sequence[Sequence[str]], count: int = 0
) -> bool:
    """Add steps, a column for each of their names, to those that differ from them in numbers only; False, and
    nothing done, where they differ in more. A column holds a name of each step, or all names of its kind in
    the only one where `count` says that there is one."""
    texts = [tuple(fold_key(names[0]) for names in side) for side in sides]
    key = (kind, texts[0], texts[1])
    number, before, *held = groups.get(key) or (
        first,
        0,
        [Folded(names[0]) for names in sides[0]],
        [Folded(names[0]) for names in sides[1]],
    )
    folded = [f for side in held for f in side]
    columns = [names for side in sides for names in side]
    read = [f.read(names) for f, names in zip(folded, columns, strict=True)]
    if None in read:
        return False
    for f, numbers in zip(folded, read, strict=True):
        f.add(numbers or ())
    groups[key] = (number, before + (count or len(columns[0])), held[0], held[1])
    return True


def _names(names: list[Folded], parts: Sequence[Part]) -> list[str]:
    """Folded names; with several parts under one name, how many files share it."""
    alike: dict[tuple[str, ...], Folded] = {}
    for group in names:
        alike.setdefault(group.key, group).join(group)
    folded = [printable(str(g)) for g in alike.values()]
    own = [p for p in parts if not p.taken] or parts  # copies are told in words
    ranks = len(own) // max(1, len({p.name for p in own}))
    return [*folded[:-1], f"{folded[-1]}  ({ranks} ranks)"] if ranks > 1 else folded


def _shape(part: Part, sizes: dict[str, int]) -> str:
    return f"{'x'.join(map(str, part.shape(sizes)))} {DTYPES[part.dtype].torch}"


def _layout(step: Step) -> str:
    """How the axes move, and what is compared; nothing for a plain copy."""
    left, right = dims_text(step.sources[0].dims), dims_text(step.targets[0].dims)
    change = "" if left == right else f"{left} -> {right}"
    words = {"tied": "compared: tied", "replicated": "compared: copies on other ranks"}
    return ", ".join(x for x in (words.get(step.compare, ""), change, in_words(step)) if x)


def _config(plan: Plan, console: Screen) -> None:
    original = "params.json" if any(d.name == "params.json" for d in plan.documents) else "args"
    rows = [
        (key, printable(json.dumps(value.value)), printable(value.source, 400))
        for key, value in plan.config.items()
    ]
    heads = (Column("field", whole=True), Column("value"), Column("from"))
    table(console, heads, rows, title="config.json" if plan.direction == "to-hf" else original)


def _dropped(plan: Plan, console: Screen) -> None:
    if not plan.dropped:
        return
    groups: dict[tuple[tuple[str, ...], str], list[Dropped]] = {}
    for d in plan.dropped:
        groups.setdefault((fold_key(d.tensor.name), d.reason), []).append(d)
    rows = []
    for (_, reason), group in groups.items():
        names = list(dict.fromkeys(d.tensor.name for d in group))
        size = _size(sum(d.tensor.nbytes for d in group))
        rows.append((str(len(group)), printable(folded_name(names)), size, printable(reason)))
    heads = (Column("tensors", right=True), Column("name"), Column("size", right=True), Column("why"))
    table(console, heads, rows, title="Left out")


def _outputs(plan: Plan, console: Screen) -> None:
    rows = [
        (printable(f.name), str(len(f.tensors)), _size(f.nbytes), f.format)
        for f in plan.outputs[:SHOWN_FILES]
    ]
    if len(plan.outputs) > SHOWN_FILES:
        rows.append((f"... and {len(plan.outputs) - SHOWN_FILES} more", "", "", ""))
    rows += [(printable(d.name), "", _size(d.size), printable(d.source)) for d in plan.documents]
    heads = (Column("file"), Column("tensors", right=True), Column("size", right=True), Column("what"))
    table(console, heads, rows, title="Files")


def _size(count: int) -> str:
    for unit, power in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= power:
            return f"{count / power:.2f} {unit}"
    return f"{count} bytes"
