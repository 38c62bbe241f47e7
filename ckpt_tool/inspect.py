"""What a checkpoint holds, told from its headers: `ckpt-tool inspect`.

Nothing in the file is run or imported. A file that is refused is looked at as far as that is safe: its
format, and what its pickle wanted to import.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tool.checkpoint import checklist, integrity
from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorFile, TensorInfo
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.folders import Directory
from ckpt_tool.checkpoint.megatron import arguments
from ckpt_tool.checkpoint.onnx_file import is_onnx, open_onnx
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.pickle_records import describe
from ckpt_tool.checkpoint.signs import layout, packed
from ckpt_tool.checkpoint.sniff import sniff
from ckpt_tool.checkpoint.tensor_names import fold_key, numbers
from ckpt_tool.checkpoint.torch_legacy import legacy_imports
from ckpt_tool.checkpoint.torch_zip import zip_imports
from ckpt_tool.checkpoint.weight_sets import is_weights
from ckpt_tool.errors import CkptToolError, Problem, printable
from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from ckpt_tool.terminal import Screen

KEPT_METADATA = 1000  # entries; a hostile file can hold millions
SHOWN_METADATA = 20

Recognise = Callable[[Checkpoint], list[tuple[str, bool, str]]]  # (family, is it its own, why)
# Of what they say, (family, why not) of those that come near.
Near = Callable[[Checkpoint, list[tuple[str, bool, str]]], list[tuple[str, str]]]


@dataclass(frozen=True)
class FileView:
    """One container file. `imports` are the globals that its pickle names; none was imported."""

    name: str
    format: str
    tensors: int
    nbytes: int
    imports: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A number that a document states, beside what the tensors say; `agrees` is None where it states none."""

    document: str
    field: str
    stated: int | None
    found: int
    tensor: str

    @property
    def agrees(self) -> bool | None:
        return None if self.stated is None else self.stated == self.found


@dataclass(frozen=True)
class TensorRow:
    """Tensors whose names differ only in their indices, `layers.{0..31}.norm.weight`. Each one is in `files`
    files (model-parallel ranks) with this same shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    files: int


@dataclass
class Inspection:
    """Everything `inspect` found. `refused` are the problems for which the checkpoint cannot be used."""

    path: str
    files: list[FileView] = field(default_factory=list)
    tensors: list[TensorInfo] = field(default_factory=list)
    documents: dict[str, int] = field(default_factory=dict)  # name to bytes
    families: list[tuple[str, bool, str]] = field(default_factory=list)
    near: list[tuple[str, str]] | None = None  # where no family recognises it; None: not asked
    config: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[Problem] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Elements of all tensors in all files; replicated ones count in each."""
        return sum(t.numel for t in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def dtypes(self) -> dict[str, tuple[int, int, int]]:
        """Per dtype: tensors, elements, bytes."""
        found: dict[str, tuple[int, int, int]] = {}
        for t in self.tensors:
            tensors, elements, nbytes = found.get(t.dtype, (0, 0, 0))
            found[t.dtype] = (tensors + 1, elements + t.numel, nbytes + t.nbytes)
        return found

    def to_json(self) -> dict[str, object]:
        """The same as plain data; every name that comes from a file is printable."""
        return {
            "path": printable(self.path, 4096),
            "files": [
                {
                    "name": printable(f.name),
                    "format": f.format,
                    "tensors": f.tensors,
                    "bytes": f.nbytes,
                    "imports": [printable(i) for i in f.imports],
                    "metadata": {printable(k): printable(v) for k, v in f.metadata.items()},
                }
                for f in self.files
            ],
            "families": [
                {"name": name, "recognised": own, "why": printable(why, 1000)}
                for name, own, why in self.families
            ],
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtypes": {
                name: {"tensors": tensors, "parameters": elements, "bytes": nbytes}
                for name, (tensors, elements, nbytes) in self.dtypes().items()
            },
            "tensors": [
                {
                    "name": printable(t.name, 512),
                    "dtype": t.dtype,
                    "shape": list(t.shape),
                    "file": printable(t.file),
                }
                for t in self.tensors
            ],
            "documents": {printable(name): size for name, size in self.documents.items()},
            "config": [
                {
                    "document": c.document,
                    "field": c.field,
                    "stated": c.stated,
                    "found": c.found,
                    "tensor": printable(c.tensor),
                    "agrees": c.agrees,
                }
                for c in self.config
            ],
            "notes": [printable(note, 1000) for note in self.notes],
            "refused": [p.to_json() for p in self.refused],
        }

    def render(self, console: Screen, *, everything: bool = False) -> None:
        """Print it; with `everything`, each tensor on a line of its own."""
        from ckpt_tool.terminal import paragraph, say

        paragraph(console, printable(self.path, 4096), hang=2, style="bold")
        self._file_table(console)
        alike: dict[tuple[str, ...], list[str]] = {}
        for file in self.files:
            alike.setdefault(file.imports, []).append(printable(file.name))
        for imports, (first, *others) in alike.items():
            if imports:
                who = f"{first} and {len(others)} more files name" if others else f"{first} names"
                paragraph(console, f"{who} these globals; none was imported:", hang=2)
                for name in imports:
                    paragraph(console, printable(name), first="  ", hang=4)
        for file in self.files:
            known = {} if file is self.files[0] else self.files[0].metadata  # ranks repeat almost all of it
            told = [(k, v) for k, v in file.metadata.items() if known.get(k) != v]
            if told:
                paragraph(console, f"{printable(file.name)}:", hang=2)
            for key, value in told[:SHOWN_METADATA]:
                paragraph(console, f"{printable(key)} = {printable(value, 100)}", first="  ", hang=4)
            if len(told) > SHOWN_METADATA:
                say(console, f"  (+{len(told) - SHOWN_METADATA} more, in --json)")
        for name, own, why in self._telling():
            text = f"{'is' if own else 'is not'} {name}: {printable(why, 1000)}"
            paragraph(console, text, hang=2, style="" if own else "dim")
        if self.tensors:
            self._tensor_table(console, everything)
            for dtype, (tensors, elements, nbytes) in self.dtypes().items():
                say(console, f"{dtype}: {elements:,} numbers in {tensors} tensors, {nbytes:,} bytes")
        if self.config:
            self._config_table(console)
        for name, size in self.documents.items():
            paragraph(console, f"{printable(name)}: {size:,} bytes", hang=2)
        for note in self.notes:
            paragraph(console, printable(note, 1000), first="note: ")
        for problem in self.refused:
            say(console, problem.line(), "red")

    def _telling(self) -> list[tuple[str, bool, str]]:
        """The families that recognise it; where none does, the near misses."""
        own = [said for said in self.families if said[1]]
        if self.near is None:
            return self.families
        return own or [(name, False, why) for name, why in self.near]

    def _file_table(self, console: Screen) -> None:
        from ckpt_tool.terminal import Column, table

        rows = [(printable(f.name), f.format, str(f.tensors), f"{f.nbytes:,}") for f in self.files]
        heads = (Column("file"), Column("format", whole=True))
        table(console, (*heads, Column("tensors", right=True), Column("bytes", right=True)), rows, indent=2)

    def _tensor_table(self, console: Screen, everything: bool) -> None:
        from ckpt_tool.terminal import Column, table

        heads = (Column("tensor"), Column("shape", whole=True), Column("dtype", whole=True))
        if everything:
            each = [(printable(t.name, 512), str(t.shape), t.dtype, printable(t.file)) for t in self.tensors]
            table(console, (*heads, Column("file")), each, indent=2)
            return
        slots = kept_beside(self.tensors)
        folded = fold(t for t in self.tensors if t.name not in slots)
        rows = [
            (
                printable(row.name, 512),
                str(row.shape),
                row.dtype,
                f"x{row.count}" if row.count > 1 else "",
                f"in {row.files} files" if row.files > 1 else "",
            )
            for row in folded
        ]
        kinds = Counter((kind, t.dtype) for t in self.tensors if (kind := slots.get(t.name)))
        rows += [
            (f"*/{kind}", "variable's", dtype, f"x{n}", "") for (kind, dtype), n in sorted(kinds.items())
        ]
        more = [Column("count", whole=True)]
        if any(row.files > 1 for row in folded):
            more.append(Column("files", whole=True))
        table(console, (*heads, *more), [row[: 3 + len(more)] for row in rows], indent=2)

    def _config_table(self, console: Screen) -> None:
        from ckpt_tool.terminal import Column, table

        words = {True: "yes", False: "NO", None: "not stated"}
        rows = [
            (c.document, c.field, "" if c.stated is None else str(c.stated), str(c.found), words[c.agrees])
            for c in self.config
        ]
        heads = (Column("document"), Column("field"), Column("stated", right=True))
        table(
            console, (*heads, Column("tensors say", right=True), Column("agree", whole=True)), rows, indent=2
        )


def inspect(
    path: str | os.PathLike[str],
    *,
    recognise: Recognise | None = None,
    near: Near | None = None,
    checksums: bool = False,
) -> Inspection:
    """Look at a checkpoint; with `checksums` its weights are read to compare them with the publisher's sums,
    which small files are anyway. A file that is refused gives an `Inspection` with `refused` set, unless
    there is nothing to show at all: then the error is raised."""
    found = Inspection(os.fspath(path))
    if is_onnx(path):
        with closing(open_onnx(path)) as graph:
            found.files = [_view(graph)]
            found.tensors = list(graph.tensors.values())
            found.documents = {p.name: p.stat().st_size for p in graph.paths[1:]}
        return found
    try:
        checkpoint = open_checkpoint(path)
    except CkptToolError as error:
        found.refused = list(error.problems)
        found.files = list(_look_at_refused(Path(found.path)))
        if not found.files:
            raise
        return found
    with checkpoint:
        found.files = [_view(file) for file in checkpoint.files.values()]
        found.tensors = list(checkpoint)
        found.documents = {d.name: d.size for d in checkpoint.documents.values()}
        beside = Counter(left.reason for left in checkpoint.left_out if left.tensor.dtype in DTYPES)
        found.notes = [*checkpoint.notes, *checkpoint.readings, *_not_numbers(checkpoint)]
        found.notes += [f"{count} tensors are none of the model's: {why}" for why, count in beside.items()]
        try:
            found.notes += _packed(checkpoint)
            sums = checklist.notes(checkpoint, weights=checksums)
            found.notes[:0] = [*sums, *integrity.notes(checkpoint, weights=checksums)]
            found.config = list(_compare(checkpoint))
            if recognise is not None:
                found.families = recognise(checkpoint)
                own = any(is_own for _, is_own, _ in found.families)  # then nobody is told what comes near
                found.near = None if near is None else [] if own else near(checkpoint, found.families)
        except CkptToolError as error:
            found.refused = list(error.problems)
    return found


def _packed(checkpoint: Checkpoint) -> Iterator[str]:
    """What is quantised, and what is packed in a way that nobody here reads."""
    if (other := layout(checkpoint.names())) is not None:
        yield f"{other[1]}: {other[0]}, which no family reads; {other[2]}"
    held = packed(checkpoint.names())
    if held is None:
        return
    from ckpt_tool.convert.families import codes_apart
    from ckpt_tool.convert.quantised import found_in

    try:
        checkpoint = codes_apart(checkpoint)
        inventory = found_in(checkpoint)
    except CkptToolError as error:  # what stands in the way of converting it
        first = error.problems[0]
        yield f"{printable(first.where or first.file or '')}: {first.message}"
        return
    if inventory is not None:
        one = next(iter(inventory.weights.values()))
        count, formats = len(inventory.weights), ", ".join(inventory.words)
        yield f"{count} weights are codes with scales ({formats}), such as {printable(one.name)} {one.shape}"
        held = packed([t.name for t in checkpoint if (t.file, t.name) not in inventory.parts])
    if held is not None:
        yield f"{held[1]}: {held[0]}, which no family reads; {held[2]}"


def _not_numbers(checkpoint: Checkpoint) -> Iterator[str]:
    """What is left out for its type, by name."""
    others = [left for left in checkpoint.left_out if left.tensor.dtype not in DTYPES]
    for left in others[:SHOWN_METADATA]:
        t = left.tensor
        yield f"{printable(t.name)} {t.shape} {t.dtype} is left out: {left.reason}"
    if len(others) > SHOWN_METADATA:
        yield f"{len(others) - SHOWN_METADATA} more tensors are left out for their type"


def _view(file: TensorFile) -> FileView:
    nbytes = sum(t.nbytes for t in file.tensors.values())
    args = arguments(file) or {}
    items: list[tuple[object, object]] = [(k, v) for k, v in file.metadata.items() if k != "args" or not args]
    items += [(f"args.{k}", v) for k, v in args.items()]
    metadata = {str(k): v if isinstance(v, str) else _words(v) for k, v in items[:KEPT_METADATA]}
    return FileView(file.name, file.format, len(file.tensors), nbytes, file.imports, metadata)


def _words(value: object) -> str:
    return str(value) if isinstance(value, bool | int | float) else describe(value)


def _look_at_refused(path: Path) -> Iterator[FileView]:
    """The weight files at `path`, each as far as it can be read: format, size, imports."""
    names = [path.name]
    folder = Directory(path.parent)
    if os.path.isdir(path):
        folder, names = Directory(path), []
        with suppress(CkptToolError):
            names = [name for name in folder.names() if is_weights(name.rpartition("/")[2])]
    for name in names:
        candidate = folder.path / name
        if not os.path.isfile(candidate):
            continue
        with suppress(CkptToolError), closing(ByteRange(candidate, name)) as data:
            format = sniff(data)
            yield FileView(name, format, 0, data.size, _imports(candidate, name, format))


def _imports(path: Path, name: str, format: str) -> tuple[str, ...]:
    try:
        if format == "zip":
            return zip_imports(path, name)
        return legacy_imports(path, name) if format == "torch-legacy" else ()
    except CkptToolError:
        return ()


# Folding names


def fold(tensors: Iterable[TensorInfo]) -> list[TensorRow]:
    """A row for tensors of equal shape and dtype whose names differ only in indices that form full ranges."""
    groups: dict[tuple[tuple[str, ...], str, tuple[int, ...]], dict[tuple[int, ...], int]] = defaultdict(dict)
    for t in tensors:
        indices = numbers(t.name)
        seen = groups[fold_key(t.name), t.dtype, t.shape]
        seen[indices] = seen.get(indices, 0) + 1
    rows = []
    for (texts, dtype, shape), seen in groups.items():
        by_files: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for indices, files in seen.items():
            by_files[files].append(indices)
        for files, members in by_files.items():
            for ranges, count in _boxes(members):
                name = "".join(t + r for t, r in zip(texts, [*map(_range, ranges), ""], strict=True))
                rows.append(TensorRow(name, dtype, shape, count, files))
    return rows


def kept_beside(tensors: Iterable[TensorInfo]) -> dict[str, str]:
    """What TensorFlow keeps below the names of variables (slots of an optimizer, averages), by name: the word
    of it that comes last. One that a single variable has is told by its name, as the others are."""
    shapes = {t.name: t.shape for t in tensors}
    found = {}
    for name, shape in shapes.items():
        above, _, kind = name.rpartition("/")
        if above and shapes.get(above) == shape:
            found[name] = kind
    counts = Counter(found.values())
    return {name: kind for name, kind in found.items() if counts[kind] > 1}


def _boxes(members: list[tuple[int, ...]]) -> Iterator[tuple[list[list[int]], int]]:
    """Tuples of indices as full products: (the values of each index, how many tuples). Where they are none
    (layers that hold different experts), first indices with the same further ones stay together."""
    values = [sorted(set(column)) for column in zip(*members, strict=True)]
    if prod(map(len, values)) == len(members):
        yield values, len(members)
        return
    inner: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
    rest: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for first, *others in sorted(members):
        rest[first].append(tuple(others))
    for first, others_of in rest.items():
        inner[tuple(others_of)].append(first)
    for others_in_common, firsts in inner.items():
        for ranges, count in _boxes(list(others_in_common)):
            yield [firsts, *ranges], count * len(firsts)


def _range(values: list[int]) -> str:
    """`7`, `{0..31}` or `{0,2,4..6}`."""
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    shown = (f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs)
    return "{" + ",".join(shown) + "}"


# Numbers that documents and tensors both tell


@dataclass(frozen=True)
class _Fact:
    """`field` of `document` is told by a tensor: an axis of its shape (summed over the ranks that share it if
    `split`), or with `axis` None the number of different indices that stand for `{}` in such names."""

    document: str
    field: str
    tensor: str
    axis: int | None = 0
    split: bool = True
    times: tuple[str, ...] = ()  # further fields whose product with `field` is meant


_LAYER = "layers.0."
_FACTS = (
    _Fact("params.json", "dim", "norm.weight", split=False),
    _Fact("params.json", "n_layers", "layers.{}.attention_norm.weight", None),
    _Fact("params.json", "vocab_size", "output.weight"),
    _Fact("params.json", "hidden_dim", _LAYER + "feed_forward.w1.weight"),
    _Fact("params.json", "n_heads", _LAYER + "attention.wq.weight", times=("head_dim",)),
    _Fact("params.json", "n_kv_heads", _LAYER + "attention.wk.weight", times=("head_dim",)),
    _Fact("config.json", "hidden_size", "model.norm.weight", split=False),
    _Fact("config.json", "num_hidden_layers", "model.layers.{}.input_layernorm.weight", None),
    _Fact("config.json", "vocab_size", "model.embed_tokens.weight"),
    _Fact("config.json", "intermediate_size", "model." + _LAYER + "mlp.gate_proj.weight"),
    _Fact(
        "config.json",
        "num_attention_heads",
        "model." + _LAYER + "self_attn.q_proj.weight",
        times=("head_dim",),
    ),
    _Fact(
        "config.json",
        "num_key_value_heads",
        "model." + _LAYER + "self_attn.k_proj.weight",
        times=("head_dim",),
    ),
)


def _compare(checkpoint: Checkpoint) -> Iterator[Comparison]:
    documents: dict[str, Mapping[str, Any]] = {}
    for name in {fact.document: None for fact in _FACTS}:
        if name in checkpoint.documents:
            document = checkpoint.json(name)
            inner = document.get("model")  # some exports nest the numbers
            documents[name] = inner if isinstance(inner, dict) else document
    names = checkpoint.names()
    for fact in _FACTS:
        found = _measured(checkpoint, names, fact)
        if fact.document not in documents or found is None:
            continue
        values = documents[fact.document]
        stated = prod(_number(values, key) or 0 for key in (fact.field, *fact.times))
        label = " x ".join((fact.field, *fact.times))
        yield Comparison(fact.document, label, stated if stated > 0 else None, found, fact.tensor)


def _measured(checkpoint: Checkpoint, names: list[str], fact: _Fact) -> int | None:
    if fact.axis is None:
        pattern = re.compile(re.escape(fact.tensor).replace(r"\{\}", r"(\d+)"), re.ASCII)
        return len({m[1] for n in names if (m := pattern.fullmatch(n))}) or None
    shapes = [t.shape for t in checkpoint.find(fact.tensor)]
    if not shapes or any(len(shape) <= fact.axis for shape in shapes):
        return None
    sizes = [shape[fact.axis] for shape in shapes]
    return sum(sizes) if fact.split else sizes[0]


def _number(values: Mapping[str, Any], key: str) -> int | None:
    """The field as an integer. A head width that is not stated follows from the model's width."""
    value = values.get(key)
    if type(value) is int:
        return value
    if key == "head_dim":
        width = values.get("dim", values.get("hidden_size"))
        heads = values.get("n_heads", values.get("num_attention_heads"))
        if type(width) is int and type(heads) is int and heads > 0 and width % heads == 0:
            return width // heads
    return None
