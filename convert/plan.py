"""What a conversion will do, as data: which tensor is made from which, the config with the source of every
value, the files to write. A plan is made and checked from headers alone; `execute` carries it out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorFile, TensorInfo
from ckpt_tool.checkpoint.dcp_names import DATA
from ckpt_tool.checkpoint.safetensors import INDEX_NAME, TENSOR_LIMIT, index_document, index_pieces
from ckpt_tool.checkpoint.spool import Spool
from ckpt_tool.checkpoint.tensor_names import fold_key, folded_name
from ckpt_tool.checkpoint.tf_names import is_data
from ckpt_tool.checkpoint.torch_zip_writer import Namespace
from ckpt_tool.convert import dtypes
from ckpt_tool.convert.expanding import Expansion
from ckpt_tool.convert.layout import Part, Step, dims_text
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import Problem, fail, fail_all, printable

PLAN_VERSION = 1
_PATTERN = re.compile(r"[*?[]")  # signs of a shell's pattern
DEFAULT_SHARD_BYTES = 5_000_000_000
SPOOLED = 50_000  # tensors, the index of more is not held in memory


@dataclass(frozen=True)
class Options:
    """What the user asked for beyond input and output. `settings` are `--set` / `--config` values in
    Hugging Face config names; `dtype` a safetensors dtype name to cast floating tensors to (lossy); `gqa` the
    key/value heads to pool those of a multi-head model to (lossy)."""

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


@dataclass(frozen=True)
class Value:
    """A config value and where it came from, in words: "params.json: norm_eps", "rows of
    tok_embeddings.weight", "rule: rope_theta absent and sliding_window set (formats: 1e4)", "--set"."""

    value: Any
    source: str


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
    # The base of rotary frequencies that are not scaled: what is stored of them and left out is held against
    # it. No part of what is done.
    turns: Value | None = None
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
        from ckpt_tool.convert.plan_text import pieces

        found = hashlib.sha256()
        for piece in pieces(self):
            found.update(piece.encode())
        return found.hexdigest()


def output_json(file: OutputFile) -> dict[str, Any]:
    """All of a file but its tensors."""
    made: dict[str, Any] = {"file": file.name, "format": file.format}
    if file.beside:
        made |= {"dicts": list(file.dicts), "beside": _beside_json(file.beside)}
    if file.constants:
        made["constants"] = [[n, d, s, c.hex()] for n, d, s, c in file.constants]
    if file.chunks:
        made["chunks"] = [[c.key, list(c.start)] for c in file.chunks]
    return made


def tensor_json(name: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def _beside_json(beside: Mapping[str, object]) -> dict[str, object]:
    return {k: dict(v.fields) if isinstance(v, Namespace) else v for k, v in beside.items()}


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
    turns: Value | None = None,
    unread: str = "",
) -> Plan:
    """A checked plan from a family's expanded table.

    `expansion` is used up. `ignored` maps regular expressions for source names to the reason for dropping
    them. For "to-hf" the target files are laid out here (size limit, index); for "to-original" each target
    part already names its file, and `outputs` lists those files in order; `compared` are steps that only
    compare, as they are to be done. Every problem of the stage is raised together: missing tensors, tensors
    nothing claims, shapes and dtypes that disagree.
    """
    steps = expansion.steps if direction == "to-hf" else expansion.steps.inverse()
    steps.extend(compared)
    steps = dtypes.typed(steps, options.dtype)
    dropped, uncovered = _unclaimed(steps, checkpoint, ignored, options)
    kept = set(options.drop) - {d.tensor.name for d in dropped}
    missing = _told_apart(expansion.problems, checkpoint)
    problems = [*_kept_problems(kept, checkpoint), *missing, *_step_problems(steps, checkpoint)]
    fail_all([*problems, *_uncovered(uncovered, family), *dtypes.mixed(steps, options.dtype)])
    wanted = _written(steps)
    if direction == "to-hf":
        files, index = place(wanted, options.max_shard_bytes)
        wanted = [t for f in files for t in f.tensors]
        steps = _set_down(steps, {t.name: t.file for t in wanted})
        documents = [*documents, *index]
    else:
        files = _outputs(outputs or (), wanted)
    return Plan(
        family=family,
        direction=direction,
        steps=steps,
        outputs=tuple(files),
        documents=tuple(documents),
        config=dict(config),
        dropped=tuple(dropped),
        notes=(*checkpoint.readings, *notes, *dtypes.kept_words(wanted, loaded=direction == "to-hf")),
        lossy=(*lossy, *dtypes.cast_words(steps, options.dtype)),
        strict_replicas=options.strict_replicas,
        original=original or {},
        foretold=tuple(foretold),
        asked=_asked(options, config),
        turns=turns,
        unread=unread,
    )


def _outputs(names: Iterable[str], wanted: Iterable[TensorInfo]) -> list[OutputFile]:
    held: dict[str, list[TensorInfo]] = {name: [] for name in names}
    for tensor in wanted:
        if tensor.file in held:
            held[tensor.file].append(tensor)
    return [OutputFile(n, _format(n), tuple(tensors), _metadata(n)) for n, tensors in held.items()]


def _written(steps: Steps) -> list[TensorInfo]:
    """The tensors that steps write, each once."""
    made: list[TensorInfo] = []
    seen: dict[str, set[str]] = {}  # names by file
    writes = [
        [
            (j, p.dtype, p.shape(step.sizes), p.file, seen.setdefault(p.file, set()))
            for j, p in enumerate(() if step.compare else step.targets, len(step.sources))
        ]
        for step in steps.templates
    ]
    for kind, names in steps.packed():
        for j, dtype, shape, file, known in writes[kind]:
            if (name := names[j]) not in known:
                known.add(name)
                made.append(TensorInfo(name, dtype, shape, file))
    return made


def _unclaimed(
    steps: Steps, checkpoint: Checkpoint, ignored: Mapping[str, str], options: Options
) -> tuple[list[Dropped], list[TensorInfo]]:
    """The tensors that no step reads: those left out for a reason, and the others that are the model's."""
    claimed: dict[str, set[str]] = {}  # names by file
    reads = [[claimed.setdefault(p.file, set()).add for p in step.sources] for step in steps.templates]
    for kind, names in steps.packed():
        for claim, name in zip(reads[kind], names, strict=False):
            claim(name)
    dropped, uncovered = [Dropped(t.tensor, t.reason) for t in checkpoint.left_out], []
    nothing: set[str] = set()
    for tensor in checkpoint:
        if tensor.name in claimed.get(tensor.file, nothing):
            continue
        reason = next((r for p, r in ignored.items() if re.fullmatch(p, tensor.name)), None)
        if reason is None and tensor.name in options.drop:
            reason = "asked for with --drop"
        if reason is None:
            uncovered.append(tensor)
        else:
            dropped.append(Dropped(tensor, reason))
    return dropped, uncovered


def _told_apart(problems: Iterable[Problem], checkpoint: Checkpoint) -> Iterator[Problem]:
    """`problems`, where a tensor is not missing but left out for its type."""
    others = {t.tensor.name: t.tensor for t in checkpoint.left_out if t.tensor.dtype not in DTYPES}
    for problem in problems:
        tensor = others.get(problem.where or "")
        if problem.kind == "missing-tensor" and tensor is not None:
            message = f"expected a dtype known here, found {tensor.dtype}"
            problem = Problem("unsupported-dtype", message, tensor.file, tensor.name)
        yield problem


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


def _kept_problems(names: Iterable[str], checkpoint: Checkpoint) -> Iterator[Problem]:
    """What was asked for with --drop and is not left out, of layers together."""
    needed: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(names):
        if checkpoint.find(name):
            needed.setdefault(fold_key(name), []).append(name)
            continue
        message = "expected a tensor that the model does not need, found none of that name"
        yield Problem("usage", message, file="--drop", where=name)
    for alike in needed.values():
        what = "one that it needs" if len(alike) == 1 else f"{len(alike)} that it needs"
        message = f"expected a tensor that the model does not need, found {what}"
        yield Problem("usage", message, file="--drop", where=folded_name(alike))


def _asked(options: Options, config: Mapping[str, Value]) -> dict[str, Any]:
    """`settings` are those that the config does not show; null leaves a key of the source out."""
    settings = {k: v for k, v in options.settings.items() if k not in config}
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


def place(tensors: list[TensorInfo], limit: int) -> tuple[list[OutputFile], list[OutputDocument]]:
    """Tensors dealt out to `model*.safetensors` files of at most `limit` bytes each (a larger tensor gets a
    file of its own) and as many tensors as one is read with, layers in natural order, and the index when
    there is more than one file."""
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and (size + tensor.nbytes > limit or len(groups[-1]) == TENSOR_LIMIT):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    total = len(groups)
    names = (
        ["model.safetensors"]
        if total == 1
        else [f"model-{k:05d}-of-{total:05d}.safetensors" for k in range(1, total + 1)]
    )
    files = []
    for name in names:  # of half a million nobody holds two
        own = groups.pop(0)
        own[:] = [TensorInfo(t.name, t.dtype, t.shape, name) for t in own]
        files.append(OutputFile(name, "safetensors", tuple(own), _metadata(name)))
    if total == 1:
        return files, []
    weight_map = {t.name: f.name for f in files for t in f.tensors}
    size = sum(t.nbytes for t in tensors)
    content: bytes | Spool = b""
    if len(tensors) <= SPOOLED:
        content = index_document(weight_map, size)
    else:
        content = Spool()
        for piece in index_pieces(weight_map, size):
            content.write(piece)
    return files, [OutputDocument(INDEX_NAME, content, "the list of output shards")]


def _set_down(steps: Steps, home: Mapping[str, str]) -> Steps:
    """The steps with the file of each target."""
    made = Steps()
    kinds: dict[tuple[object, ...], int] = {}
    sources = [len(t.sources) for t in steps.templates]
    for kind, names in steps.packed():
        files = [home[name] for name in names[sources[kind] :]]
        key = (kind, *files)
        if (new := kinds.get(key)) is None:
            template = steps.templates[kind]
            targets = tuple(p.at_home(file) for p, file in zip(template.targets, files, strict=True))
            new = kinds[key] = made.kind(template.with_targets(targets))
        made.kinds.append(new)
    made.names, made.starts = steps.names, steps.starts
    return made


def _absent(steps: Steps, checkpoint: Checkpoint) -> Iterator[Problem]:
    """One problem for each file that is not there and holds what a step reads."""
    held: dict[str, dict[str, None]] = {}
    missing_of = [
        [
            f.absent
            for p in s.sources
            if (f := checkpoint.files.get(p.file)) is not None and type(f).absent is not TensorFile.absent
        ]
        for s in steps.templates
    ]
    for kind, names in steps.packed():
        for absent, name in zip(missing_of[kind], names, strict=False):
            if (missing := absent(name)) is not None:
                held.setdefault(missing, {})[name] = None
    for missing, (first, *others) in held.items():
        more = f" and {len(others)} more tensors of the model" if others else ""
        message = f"expected this file, which holds {printable(first)}{more}, found no such file"
        yield Problem("missing-shard", message, missing, hint="download what is missing too")


def _step_problems(steps: Steps, checkpoint: Checkpoint) -> Iterator[Problem]:
    yield from _absent(steps, checkpoint)
    defects = [step.defects() for step in steps.templates]
    expected = [[(p, p.shape(s.sizes), _tensors(p, checkpoint)) for p in s.sources] for s in steps.templates]
    for kind, names in steps.packed():
        for defect in defects[kind]:
            yield Problem("shape-mismatch", defect, where=names[0])
        for (part, shape, tensors), name in zip(expected[kind], names, strict=False):
            if (found := tensors.get(name)) is not None and found.shape != shape:
                message = f"expected shape {shape} ({dims_text(part.dims)}), found {found.shape}"
                yield Problem("shape-mismatch", message, file=part.file, where=name)


def _tensors(part: Part, checkpoint: Checkpoint) -> Mapping[str, TensorInfo]:
    """Those of its file."""
    return checkpoint.files[part.file].tensors if part.file in checkpoint.files else {}


def _uncovered(tensors: list[TensorInfo], family: str) -> list[Problem]:
    """One problem for each folded name, so that 64 adapter tensors are one line and not 64."""
    folded: dict[tuple[tuple[str, ...], tuple[int, ...], str], list[TensorInfo]] = {}
    for t in tensors:
        folded.setdefault((fold_key(t.name), t.shape, t.dtype), []).append(t)
    return [
        Problem(
            "uncovered-tensors",
            f"expected a rule of family {family} for each tensor, found none for "
            f"{len(group)} tensor{'s' * (len(group) > 1)} of shape {shape} {dtype}",
            file=group[0].file,
            where=folded_name([t.name for t in group]),
            hint="--drop NAME leaves a tensor out (a pattern: several), and records it",
        )
        for (_, shape, dtype), group in folded.items()
    ]


def config_document(config: Mapping[str, Value], name: str = "config.json") -> OutputDocument:
    """config.json as `transformers` 4.x writes it (which 5.x reads too): sorted keys, indent 2."""
    content = json.dumps({k: v.value for k, v in sorted(config.items())}, indent=2, ensure_ascii=True) + "\n"
    return OutputDocument(name, content.encode(), "the plan's config values")


def dtype_option(
    text: str, option: str = "--dtype", known: Sequence[str] = ("F64", "F32", "F16", "BF16")
) -> str:
    """`bfloat16`, `bf16` or `BF16` to the safetensors name; refuses what numpy cannot cast to."""
    names = {d.name.lower(): d.name for d in DTYPES.values()} | {d.torch: d.name for d in DTYPES.values()}
    found = names.get(text.lower())
    if found is None or found not in known:
        names_known = [DTYPES[d].torch for d in known]
        expected = f"{', '.join(names_known[:-1])} or {names_known[-1]}"
        fail("usage", f"expected {expected}, found {text!r}", where=option)
    return found
