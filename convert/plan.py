"""What a conversion will do, as data: which tensor is made from which, the config with the source of every
value, the files to write. A plan is made and checked from headers alone; `execute` carries it out.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate, chain, pairwise, repeat
from math import prod
from typing import TYPE_CHECKING, Any, cast

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo, tensor_infos
from ckpt_tool.checkpoint.dcp_names import DATA
from ckpt_tool.checkpoint.safetensors import INDEX_NAME, TENSOR_LIMIT, index_document, index_pieces
from ckpt_tool.checkpoint.spool import Spool
from ckpt_tool.checkpoint.tf_names import is_data
from ckpt_tool.convert import dtypes
from ckpt_tool.convert.expanding import Expansion
from ckpt_tool.convert.layout import Part, Step, dims_text
from ckpt_tool.convert.plan_checks import (
    frequency_problems,
    kept_problems,
    step_problems,
    told_apart,
    too_many,
    uncovered_problems,
)
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import Problem, fail, fail_all
from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from ckpt_tool.convert.quantised import Inventory

PLAN_VERSION = 1
_PATTERN = re.compile(r"[*?[]")  # signs of a shell's pattern
DEFAULT_SHARD_BYTES = 5_000_000_000
SPOOLED = 50_000  # tensors, the index of more is not held in memory


@dataclass(frozen=True)
class Options:
    """What the user asked for beyond input and output. `settings` are `--set` / `--config` values in
    Hugging Face config names; `dtype` a safetensors dtype name to cast floating tensors to (lossy where it
    rounds); `gqa` the key/value heads to pool those of a multi-head model to (lossy)."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    shards: int = 1  # model-parallel ranks to write, for --to original
    drop: tuple[str, ...] = ()
    strict_replicas: bool = False
    tokenizer: str | None = None
    gqa: int | None = None
    with_optimizer: bool = False  # carry the states of the optimizer, too (optimizer_state.py)
    dequantize: str | None = None  # dtype of the numbers that quantised weights become (lossy)
    recipe: str = "fp32-product"  # in which order is rounded there, see quantised_values
    family_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Dtypes by any of their names; kind `usage` for what is none."""
        from ckpt_tool.convert.quantised_config import RECIPES, TARGETS  # which imports this module

        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_option(self.dtype))
        if self.dequantize is not None:
            object.__setattr__(self, "dequantize", dtype_option(self.dequantize, "--dequantize", TARGETS))
        if self.recipe not in RECIPES:
            fail("usage", f"expected {' or '.join(RECIPES)}, found {self.recipe!r}", where="--recipe")


@dataclass(frozen=True)
class Value:
    """A config value and where it came from, in words: "params.json: norm_eps", "rows of
    tok_embeddings.weight", "rule: rope_theta absent and sliding_window set (formats: 1e4)", "--set"."""

    value: Any
    source: str


@dataclass(frozen=True)
class Turns:
    """What the rotary frequencies of a model are made of: their base, None where they are scaled, and how
    many there are, None where it is not known."""

    base: Value | None
    pairs: Value | None


@dataclass(frozen=True)
class Foretold:
    """A difference that the target layout cannot avoid: config.json has one value for what the original
    computes in two ways. `values` are those of config.json by which the phases `where` (as `verify` names
    them) would compute what the original does; `name` is what a user accepts it by."""

    name: str
    reason: str
    values: Mapping[str, Any]
    where: tuple[str | int, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "reason": self.reason,
            "values": dict(self.values),
            "where": list(self.where),
        }


@dataclass(frozen=True)
class Dropped:
    """A source tensor that is not carried over, and why."""

    tensor: TensorInfo
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Where a tensor to write lies in one of a torch.distributed folder: that is called `key`, and `start` is
    its first element there. Axes of that which the tensor has not come first, and it is one long there."""

    key: str
    start: tuple[int, ...]

    def shape(self, own: tuple[int, ...]) -> tuple[int, ...]:
        """That of a tensor of the shape `own` there."""
        return (1,) * (len(self.start) - len(own)) + own


@dataclass(frozen=True)
class OutputFile:
    """A container to write: `format` is "safetensors", "torch-zip", "tf-bundle" (a data file; the index is
    made when all of them are written, in the order of their numbers) or "dcp" (a data file of a
    torch.distributed folder); tensors in file order. A torch file may
    nest its tensors in `dicts`, hold plain values `beside` them, and tensors that are the same for every
    model (`constants`: name, dtype, shape, bytes), see `TorchZipLayout`. The tensors of a data file are
    `chunks`, one for each, of tensors of their folder."""

    name: str
    format: str
    tensors: tuple[TensorInfo, ...]
    metadata: tuple[tuple[str, str], ...] = ()
    dicts: tuple[str, ...] = ()
    beside: Mapping[str, object] = field(default_factory=dict)
    constants: tuple[tuple[str, str, tuple[int, ...], bytes], ...] = ()
    chunks: tuple[Chunk, ...] = ()

    @cached_property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def held(self) -> tuple[TensorInfo, ...]:
        """All tensors of the file, constants last."""
        known = (TensorInfo(name, dtype, shape, self.name) for name, dtype, shape, _ in self.constants)
        return (*self.tensors, *known)


@dataclass(frozen=True)
class OutputDocument:
    """A file to write beside the weights, with its content and where it came from. What may be too large to
    hold in memory is in a temporary file."""

    name: str
    held: bytes | Spool
    source: str

    @property
    def content(self) -> bytes:
        return self.held if isinstance(self.held, bytes) else b"".join(self.held.pieces())

    @property
    def size(self) -> int:
        return len(self.held) if isinstance(self.held, bytes) else self.held.size

    @cached_property
    def sha256(self) -> str:
        import hashlib  # and with it OpenSSL, 2 ms

        found = hashlib.sha256()
        for piece in self.pieces():
            found.update(piece)
        return found.hexdigest()

    def pieces(self) -> Iterable[bytes]:
        return (self.held,) if isinstance(self.held, bytes) else self.held.pieces()


@dataclass(frozen=True)
class Plan:
    """See the module docstring. `direction` is "to-hf" or "to-original"; sources are named by the
    checkpoint's own file names, so a plan holds no path."""

    family: str
    direction: str
    steps: Sequence[Step]
    outputs: tuple[OutputFile, ...]
    documents: tuple[OutputDocument, ...]
    config: Mapping[str, Value]
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()
    lossy: tuple[str, ...] = ()  # what the user asked for that loses bits, in words
    strict_replicas: bool = False
    # Facts of the original that the Hugging Face layout has no place for (the text of params.json, how many
    # ranks): the manifest keeps them under "original", for the way back.
    original: Mapping[str, Any] = field(default_factory=dict)
    foretold: tuple[Foretold, ...] = ()
    # Options beyond dtype and dropped tensors without which the same plan is not made again.
    asked: Mapping[str, Any] = field(default_factory=dict)
    # What is stored of rotary frequencies and left out is held against it. No part of what is done.
    turns: Turns | None = None
    # The quantised weights of the source: what their scales hold is looked at. No part of what is done.
    quantised: Inventory | None = None
    # Tensors that no pass reads, by a pattern of their names: what they hold says nothing of the model.
    unread: str = ""

    @property
    def bytes_out(self) -> int:
        return sum(f.nbytes for f in self.outputs)

    def __repr__(self) -> str:
        tensors = sum(len(f.tensors) for f in self.outputs)
        return f"<plan {self.family}, {self.direction}: {tensors:,} tensors, {self.bytes_out:,} bytes>"

    def _repr_html_(self) -> str:
        from ckpt_tool.convert.render import as_html

        return as_html(self)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each tensor that is read for one that is written or compared."""
        from ckpt_tool.checkpoint.frames import data_frame
        from ckpt_tool.convert.render import CELLS, cells

        return data_frame(CELLS, cells(self))

    def to_json(self) -> dict[str, Any]:
        return {
            **self.frame_json(),
            "steps": [step_json(s) for s in self.steps],
            "outputs": [
                {**output_json(f), "tensors": [tensor_json(t.name, t.dtype, t.shape) for t in f.tensors]}
                for f in self.outputs
            ],
        }

    def frame_json(self) -> dict[str, Any]:
        """All but the steps and the outputs."""
        return {
            "plan_version": PLAN_VERSION,
            "family": self.family,
            "direction": self.direction,
            "config": {k: {"value": v.value, "source": v.source} for k, v in self.config.items()},
            "dropped": [
                {"file": d.tensor.file, "name": d.tensor.name, "bytes": d.tensor.nbytes, "reason": d.reason}
                for d in self.dropped
            ],
            "documents": [{"file": d.name, "sha256": d.sha256, "source": d.source} for d in self.documents],
            "notes": list(self.notes),
            "lossy": list(self.lossy),
            "original": dict(self.original),
            **({"foretold": [f.to_json() for f in self.foretold]} if self.foretold else {}),
        }

    def digest(self) -> str:
        """SHA-256 of the plan's JSON: equal plans of equal inputs have equal digests."""
        import hashlib

        from ckpt_tool.convert.plan_text import pieces

        found = hashlib.sha256()
        for piece in pieces(self):
            found.update(piece.encode())
        return found.hexdigest()


def output_json(file: OutputFile) -> dict[str, Any]:
    """All of a file but its tensors."""
    made: dict[str, Any] = {"file": file.name, "format": file.format}
    if file.beside:
        from ckpt_tool.checkpoint.torch_zip_writer import in_json

        made |= {"dicts": list(file.dicts), "beside": in_json(file.beside)}
    if file.constants:
        made["constants"] = [[n, d, s, c.hex()] for n, d, s, c in file.constants]
    if file.chunks:
        made["chunks"] = [[c.key, list(c.start)] for c in file.chunks]
    return made


def tensor_json(name: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def step_json(step: Step) -> dict[str, Any]:
    def part(p: Part) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "file": p.file,
            "name": p.name,
            "dtype": p.dtype,
            "layout": dims_text(p.dims),
        }
        if p.ranges:
            entry["ranges"] = {a: [lo, hi] for a, lo, hi in p.ranges}
        if p.taken:
            entry["taken"] = {a: [lo, hi] for a, lo, hi in p.taken}
        return entry

    made: dict[str, Any] = {
        "axes": step.sizes,
        "sources": [part(p) for p in step.sources],
        "targets": [part(p) for p in step.targets],
        "note": step.note,
    }
    if step.compare:
        made["compare"] = step.compare
    if step.mean:
        made["mean"] = step.mean
    if step.copied:
        made["copied"] = True
    return made


# --- from steps to a checked plan -----------------------------------------------------------------------


def natural(name: str) -> tuple[Any, ...]:
    """A sort key in which layer 10 comes after layer 9."""
    return tuple(int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name))


def assemble(
    *,
    family: str,
    direction: str,
    checkpoint: Checkpoint,
    expansion: Expansion,
    compared: Iterable[Step] = (),
    ignored: Mapping[str, str],
    config: Mapping[str, Value],
    documents: Iterable[OutputDocument],
    options: Options,
    outputs: Sequence[str] | None = None,
    notes: Iterable[str] = (),
    lossy: Iterable[str] = (),
    original: Mapping[str, Any] | None = None,
    foretold: Iterable[Foretold] = (),
    turns: Turns | None = None,
    unread: str = "",
) -> Plan:
    """A checked plan from a family's expanded table.

    `expansion` is used up. `ignored` maps regular expressions for source names to the reason for dropping
    them. For "to-hf" the target files are laid out here (size limit, index); for "to-original" each target
    part names its file, and `outputs` lists these in order; `compared` are steps that only compare. Problems
    are raised together: tensors missing or claimed by nothing, shapes, dtypes.
    """
    steps = expansion.steps if direction == "to-hf" else expansion.steps.inverse()
    steps.extend(compared)
    steps = dtypes.typed(steps, options.dtype)
    dropped, uncovered = _unclaimed(steps, checkpoint, ignored, options)
    kept = set(options.drop) - {d.tensor.name for d in dropped}
    missing = told_apart(expansion.problems, checkpoint)
    problems = [*kept_problems(kept, checkpoint), *missing, *step_problems(steps, checkpoint)]
    problems += frequency_problems(dropped, turns, options.drop)
    fail_all([*problems, *uncovered_problems(uncovered, family), *dtypes.mixed(steps, options.dtype)])
    wanted = _written(steps, in_files=direction != "to-hf")
    told, rounded = dtypes.words(steps, options.dtype, wanted.counts(), loaded=direction == "to-hf")
    if direction == "to-hf":
        files, index, home = place(wanted, options.max_shard_bytes)
        steps, documents = _set_down(steps, home), [*documents, *index]
    else:
        files = [wanted.whole(name) for name in outputs or ()]
        fail_all(too_many(files))
    return Plan(
        family=family,
        direction=direction,
        steps=steps,
        outputs=tuple(files),
        documents=tuple(documents),
        config=dict(config),
        dropped=tuple(dropped),
        notes=(*checkpoint.readings, *notes, *told),
        lossy=(*lossy, *rounded),
        strict_replicas=options.strict_replicas,
        original=original or {},
        foretold=tuple(foretold),
        asked=_asked(options, config, direction),
        turns=turns,
        unread=unread,
    )


@dataclass
class ToWrite:
    """The tensors that a plan writes, each once: `names` by file in the order of writing, each with its
    number in `kinds`, which are the dtypes and shapes that they have."""

    names: dict[str, dict[str, int]] = field(default_factory=dict)
    kinds: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict)

    def kind(self, dtype: str, shape: tuple[int, ...]) -> int:
        return self.kinds.setdefault((dtype, shape), len(self.kinds))

    def add(self, file: str, dtype: str, shape: tuple[int, ...], names: Sequence[str]) -> None:
        """Those of `names` that are not there yet."""
        number = self.kind(dtype, shape)
        held = self.names.setdefault(file, {})
        if not held.keys().isdisjoint(names):
            names = [name for name in names if name not in held]
        held.update(dict.fromkeys(names, number))

    def file(self, name: str, names: Collection[str], numbers: Sequence[int]) -> OutputFile:
        """The file `name` with the tensors of these names and kinds."""
        dtypes, shapes = [dtype for dtype, _ in self.kinds], [shape for _, shape in self.kinds]
        fields = map(dtypes.__getitem__, numbers), map(shapes.__getitem__, numbers)
        tensors = tensor_infos(names, *fields, repeat(name))
        return OutputFile(name, _format(name), tensors, _metadata(name))

    def whole(self, name: str) -> OutputFile:
        """The file `name` with all that is in it."""
        own = self.names.get(name, {})
        return self.file(name, own, [*own.values()])

    def counts(self) -> Counter[str]:
        """How many there are of each dtype."""
        made: Counter[str] = Counter()
        numbers = Counter(chain.from_iterable(held.values() for held in self.names.values()))
        for (dtype, _), number in self.kinds.items():
            made[dtype] += numbers[number]
        return made


def _written(steps: Steps, *, in_files: bool) -> ToWrite:
    """What steps write. Unless they say the files that it comes `in_files`, these are still to be found."""
    made = ToWrite()
    writes = [
        [
            (j, p.file if in_files else "", p.dtype, p.shape(step.sizes))
            for j, p in enumerate(() if step.compare else step.targets, len(step.sources))
        ]
        for step in steps.templates
    ]
    if {len(own) for own in writes} == {1} and len({own[0][1] for own in writes}) == 1:  # nearly always
        written = steps.named([own[0][0] for own in writes])
        kinds = {kind: made.kind(*writes[kind][0][2:]) for kind in dict.fromkeys(steps.kinds)}
        held = dict(zip(written, map(kinds.__getitem__, steps.kinds), strict=True))
        if len(held) == len(written):
            made.names[writes[0][0][1]] = held
            return made
    for kind, columns in steps.runs():
        if len(writes[kind]) == 1:
            ((j, file, dtype, shape),) = writes[kind]
            made.add(file, dtype, shape, columns[j])
            continue
        for names in zip(*columns, strict=True):
            for j, file, dtype, shape in writes[kind]:
                made.add(file, dtype, shape, (names[j],))
    return made


ASKED = "asked for with --drop"


def _unclaimed(
    steps: Steps, checkpoint: Checkpoint, ignored: Mapping[str, str], options: Options
) -> tuple[list[Dropped], list[TensorInfo]]:
    """The tensors that no step reads: those left out for a reason, and the others that are the model's."""
    dropped, uncovered = [Dropped(t.tensor, t.reason) for t in checkpoint.left_out], []
    for tensor in _others(checkpoint, steps.read()):
        reason = next((r for p, r in ignored.items() if re.fullmatch(p, tensor.name)), None)
        if reason is None and tensor.name in options.drop:
            reason = ASKED
        if reason is None:
            uncovered.append(tensor)
        else:
            dropped.append(Dropped(tensor, reason))
    return dropped, uncovered


def _others(checkpoint: Checkpoint, claimed: Mapping[str, set[str]]) -> Iterator[TensorInfo]:
    """The tensors that are not claimed, by file."""
    for name, file in checkpoint.files.items():
        own: set[str] = claimed.get(name, set())
        if not file.tensors.keys() <= own:
            yield from (tensor for called, tensor in file.tensors.items() if called not in own)


def dropped_names(asked: Iterable[str], checkpoint: Checkpoint) -> tuple[str, ...]:
    """The tensors that --drop means: names, or patterns as a shell has them (`*` stands for `/` and `.` too).
    `usage` for a pattern without a tensor; a name without one is told when the plan is made."""
    asked = list(asked)
    there = dict.fromkeys(checkpoint.names() if asked else ())
    there |= dict.fromkeys(t.tensor.name for t in checkpoint.left_out)
    found: dict[str, None] = {}
    problems = []
    for text in asked:
        if text in there or not _PATTERN.search(text):
            found[text] = None
            continue
        matched = [name for name in there if fnmatchcase(name, text)]
        if not matched:
            message = (
                f"expected a pattern of the names of tensors, found none that it fits among {len(there)}"
            )
            hint = "`ckpt-tool inspect --all` lists the names"
            problems.append(Problem("usage", message, "--drop", text, hint))
        found |= dict.fromkeys(matched)
    fail_all(problems)
    return tuple(found)


def _asked(options: Options, config: Mapping[str, Value], direction: str) -> dict[str, Any]:
    """`settings` are those that the config does not show, and all where it has the original's names; null
    leaves a key of the source out."""
    back = direction == "to-original"
    settings = {k: v for k, v in options.settings.items() if back or k not in config}
    packed = (
        {} if options.dequantize is None else {"dequantize": options.dequantize, "recipe": options.recipe}
    )
    found = {
        "gqa": options.gqa,
        **packed,
        "family_options": dict(options.family_options),
        "settings": settings,
    }
    return {k: v for k, v in found.items() if v}


def _format(name: str) -> str:
    if is_data(name):
        return "tf-bundle"
    if name.endswith(DATA):
        return "dcp"
    return "safetensors" if name.endswith(".safetensors") else "torch-zip"


def _metadata(name: str) -> tuple[tuple[str, str], ...]:
    return (("format", "pt"),) if name.endswith(".safetensors") else ()


def place(wanted: ToWrite, limit: int) -> tuple[list[OutputFile], list[OutputDocument], Mapping[str, str]]:
    """Tensors dealt out to `model*.safetensors` files of at most `limit` bytes each (a larger tensor gets a
    file of its own) and as many tensors as one is read with, layers in natural order; the index when there is
    more than one file; and the file of each tensor. `wanted` is used up."""
    tensors = wanted.names.pop("", {})
    numbers = list(tensors.values())
    kinds = [prod(shape) * DTYPES[dtype].itemsize for dtype, shape in wanted.kinds]
    ends = list(accumulate(map(kinds.__getitem__, numbers)))
    total, edges = ends[-1] if ends else 0, [0]
    while (at := edges[-1]) < len(tensors):
        fit = bisect_right(ends, limit + (ends[at - 1] if at else 0), at)
        edges.append(min(max(fit, at + 1), at + TENSOR_LIMIT))
    count = max(len(edges) - 1, 1)
    names = [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    files, home = [], cast(dict[str, str], tensors)  # of half a million nobody holds two
    left = list(tensors)
    for name, (start, stop) in zip(names, pairwise(edges if len(tensors) else (0, 0)), strict=True):
        own = left[start:stop]
        files.append(wanted.file(name, own, numbers[start:stop]))
        home.update(dict.fromkeys(own, name))
    if count == 1:
        return files, [], home
    if len(home) <= SPOOLED:
        content: bytes | Spool = index_document(home, total)
    else:
        content = Spool()
        for piece in index_pieces(home, total):
            content.write(piece)
    return files, [OutputDocument(INDEX_NAME, content, "the list of output shards")], home


def _set_down(steps: Steps, home: Mapping[str, str]) -> Steps:
    """The steps with the file of each target."""
    if len(of := set(home.values())) == 1:
        (only,) = of
        return steps.alike(lambda t: t.with_targets(tuple(p.at_home(only) for p in t.targets)))
    made = Steps()
    kinds: dict[tuple[object, ...], int] = {}
    sources = [len(t.sources) for t in steps.templates]
    for kind, columns in steps.runs():
        files = [list(map(home.__getitem__, names)) for names in columns[sources[kind] :]]
        together = all(own.count(own[0]) == len(own) for own in files)  # nearly always
        for own in [tuple(own[0] for own in files)] if together else zip(*files, strict=True):
            if (new := kinds.get((kind, *own))) is None:
                template = steps.templates[kind]
                targets = tuple(p.at_home(file) for p, file in zip(template.targets, own, strict=True))
                new = kinds[(kind, *own)] = made.kind(template.with_targets(targets))
            made.kinds.extend(repeat(new, len(files[0]) if together else 1))
    made.names, made.starts = steps.names, steps.starts
    return made


def config_document(config: Mapping[str, Value], name: str = "config.json") -> OutputDocument:
    """config.json as `transformers` 4.x writes it (which 5.x reads too): sorted keys, indent 2."""
    content = json.dumps({k: v.value for k, v in sorted(config.items())}, indent=2, ensure_ascii=True) + "\n"
    return OutputDocument(name, content.encode(), "the plan's config values")


def dtype_option(
    text: str, option: str = "--dtype", known: Sequence[str] = ("F64", "F32", "F16", "BF16")
) -> str:
    """`float16`, `fp16`, `f16` or `F16` to the safetensors name; refuses what numpy cannot cast to."""
    names = {d.name.lower(): d.name for d in DTYPES.values()} | {d.torch: d.name for d in DTYPES.values()}
    names |= {f"fp{bits}": f"F{bits}" for bits in (16, 32, 64)}
    found = names.get(text.lower())
    if found is None or found not in known:
        names_known = [DTYPES[d].torch for d in known]
        expected = f"{', '.join(names_known[:-1])} or {names_known[-1]}"
        fail("usage", f"expected {expected}, found {text!r}", where=option)
    return found
