"""The files of a Megatron checkpoint of any age, read and written: ranks that each hold a share of every
tensor, pipeline stages that count their layers from 0, expert-parallel ranks that count their experts from 0
and hold all other tensors once more, and the pickled args beside the tensors.

    latest_checkpointed_iteration.txt, release/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, replace
from math import prod
from typing import Any, NamedTuple

from ckpt_tool.checkpoint.base import Checkpoint, TensorFile, TensorInfo
from ckpt_tool.checkpoint.megatron import (
    FILE,
    TRACKER,
    Placed,
    arguments,
    check_same_run,
    folder_name,
    placed,
)
from ckpt_tool.checkpoint.torch_zip_writer import Namespace
from ckpt_tool.convert.crosscheck import rank_problems
from ckpt_tool.convert.dialects.megatron_names import DICTS, FIRST, TUNED, is_core
from ckpt_tool.convert.layout import Home, Part
from ckpt_tool.convert.numbers import Field, Known, document, number
from ckpt_tool.convert.options import (
    PIPELINE_LAYERS,
    PIPELINE_PARALLEL,
    SHARDS,
    TENSOR_PARALLEL,
    VIRTUAL_STAGES,
)
from ckpt_tool.convert.plan import Options, OutputDocument, Plan, Value
from ckpt_tool.convert.source import Source
from ckpt_tool.convert.weave import TIES, Table, Written, to_original
from ckpt_tool.errors import Problem, fail, fail_all
from ckpt_tool.records import dataclass

OPTIONS = (SHARDS, TENSOR_PARALLEL, PIPELINE_PARALLEL, PIPELINE_LAYERS, VIRTUAL_STAGES)
SPLIT = "layers_of_parts"  # in the manifest
DIVISOR = 128  # --make-vocab-size-divisible-by, by default
RELEASE = "release"
OUTPUT = "output_layer.weight"
STRETCHED = "stretched_frequencies"  # what documents say of them, as the block of config.json
# An expert's number follows `local_experts`, or stands after `weight` where one module holds several.
EXPERT = re.compile(
    r"(?P<before>.*\.mlp\.experts\.(local_experts\.|linear_fc[12]\.weight))(?P<e>\d{1,6})(?P<after>(\..+)?)"
)
IGNORED = {
    r"(chained_\d{1,3}\.)?optimizer\..*": "state of the optimizer: only training needs it",
    r"(lr|opt_param)_scheduler\..*": "state of the schedule: only training needs it",
    r"(random_|np_|torch_|cuda_)?rng_state(\..*)?": "random numbers of the training run",
    r"rng_tracker_states\..*": "random numbers of the training run",
    r"(rerun_state_machine|ft_state|content_metadata)\..*": "state of the training run",
    r".*\._extra_state(\..*)?": "scales for 8-bit training",
}


# --- reading --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run(Source):
    """What the files say of the run beside the tensors. `told` are the pickled args, None where the file has
    none; `said_version` is None where it says no checkpoint_version, which stands for 0. `files` are
    [rank][stage], of the first of `experts` expert-parallel ranks that has some, `own` is over how many ranks
    each expert is shared out, `chunks` counts the virtual stages, `split` the layers of each part: the first
    chunks of all stages, then the second. Where documents beside the files say some of `told`, `places` has
    the file and the name there of each, and `elsewhere` for each document its name, what it says, and what it
    calls that."""

    age: str
    files: list[list[str]]
    chunks: int = 1
    split: tuple[int, ...] = ()
    experts: int = 1
    own: int = 1
    said_version: float | None = None
    iteration: int | None = None
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    elsewhere: tuple[tuple[str, Mapping[str, Any], Mapping[str, str]], ...] = ()

    @property
    def version(self) -> float:
        return self.said_version or 0.0

    @property
    def args(self) -> Mapping[str, Any]:
        return self.told or {}


class Own(NamedTuple):
    """A tensor of the model in a file: its name there, its virtual stage, its name in the tables with `{i}`
    for the layer, and that layer's number on this stage."""

    name: str
    chunk: int
    table: str
    layer: int | None


def without_layer(name: str) -> tuple[str, int | None]:
    """The name with `{i}` for its layer, and the layer's number."""
    m = re.search(r"(?<=layers\.)\d{1,6}(?=\.)", name)
    return (name, None) if m is None else (f"{name[: m.start()]}{{i}}{name[m.end() :]}", int(m[0]))


def open_ranks(checkpoint: Checkpoint, age: str, own: Callable[[Iterable[str]], Iterable[Own]]) -> Run:
    """Sort out the files; `own` finds the tensors of the model among the names in one. Kinds:
    `missing-shard`, `missing-tensor`, `shard-conflict`."""
    check_same_run(checkpoint)
    run = placed(checkpoint)
    rows = run.rows()
    found = {f: list(own(checkpoint.files[f].tensors)) for row in rows.values() for f in row}
    chunks = 1 + max((t.chunk for own in found.values() for t in own), default=0)
    joined = {at: _joined(checkpoint, {f: found[f] for f in row}, chunks) for at, row in rows.items()}
    held = {f: {t.name: checkpoint.files[f].tensors[t.name] for t in own} for f, own in found.items()}
    columns = [[row[stage] for row in rows.values()] for stage in range(run.stages)]
    fail_all(p for column in columns for p in rank_problems(column, held))
    tensors, copies = _experts_joined({at: tensors for at, (tensors, _) in joined.items()}, run)
    first: dict[int, list[str]] = {}
    for (_, t), row in rows.items():
        first.setdefault(t, row)
    files, split = [first[t] for t in range(run.ranks)], joined[0, 0][1]
    return Run(
        checkpoint,
        tensors,
        run.ranks,
        sum(split),
        arguments(checkpoint.files[files[0][0]]),
        stages=run.stages,
        copies=copies,
        age=age,
        files=files,
        chunks=chunks,
        split=split,
        experts=run.experts,
        own=run.own,
    )


def _experts_joined(
    held: Mapping[tuple[int, int], Mapping[str, TensorInfo]], run: Placed
) -> tuple[dict[str, tuple[TensorInfo, ...]], dict[tuple[str, str], tuple[Home, ...]]]:
    """`held` are tensors by their names, of each (expert-parallel rank, tensor-parallel rank). Experts are
    numbered through the expert-parallel ranks, and have a share on each of `run.own` tensor-parallel ones;
    of all else there is one on each of these. What is there again is a copy of the first."""
    first = held[0, 0]
    count = 1 + max((int(m["e"]) for n in first if (m := EXPERT.fullmatch(n))), default=-1)
    found: dict[str, dict[int, TensorInfo]] = {}
    copies: dict[tuple[str, str], tuple[Home, ...]] = {}
    for e in range(run.experts):
        called = {n: _numbered_through(n, e * count) for n in first}
        for t, tensors in ((t, tensors) for (of, t), tensors in held.items() if of == e):
            for name, tensor in tensors.items():
                through = called[name]
                share = t if through is None else t % run.own
                one = found.setdefault(through or name, {}).setdefault(share, tensor)
                if one is not tensor:
                    place, home = (one.file, one.name), (tensor.file, tensor.dtype, tensor.name)
                    copies[place] = (*copies.get(place, ()), home)
    return {n: tuple(own[k] for k in sorted(own)) for n, own in found.items()}, copies


def _numbered_through(name: str, before: int) -> str | None:
    """The name of an expert's tensor with `before` added to its number; None for another."""
    m = EXPERT.fullmatch(name)
    return None if m is None else f"{m['before']}{before + int(m['e'])}{m['after']}"


def _joined(
    checkpoint: Checkpoint, stages: Mapping[str, list[Own]], chunks: int
) -> tuple[dict[str, TensorInfo], tuple[int, ...]]:
    """The tensors of one rank by their names in the tables, and the layers of each of its parts. A stage
    counts its layers from 0, however many it has; they follow on those of the stage before, and with virtual
    stages (`model0`, `model1`, ...) the first of every stage comes before any second."""
    parts: dict[tuple[int, str], list[Own]] = {(c, file): [] for c in range(chunks) for file in stages}
    for file, own in stages.items():
        for t in own:
            parts[t.chunk, file].append(t)
    problems: list[Problem] = []
    found: dict[str, TensorInfo] = {}
    split: list[int] = []
    for (chunk, file), entries in parts.items():
        if not entries:
            message = f"expected tensors of model{chunk}, as on other stages, found none"
            problems.append(Problem("missing-tensor", message, file))
        here = {t.layer for t in entries if t.layer is not None}
        if here != set(range(len(here))):
            shown = ", ".join(map(str, sorted(here)[:8]))
            message = f"expected the stage's layers 0 to {len(here) - 1}, found {shown}"
            problems.append(Problem("missing-tensor", message, file, "layers"))
        for t in entries:
            full = t.table if t.layer is None else t.table.replace("{i}", str(sum(split) + t.layer))
            if full in found:
                message = f"expected the tensor on one stage, found it in {found[full].file} too"
                problems.append(Problem("shard-conflict", message, file, t.name))
            found[full] = checkpoint.files[file].tensors[t.name]
        split.append(len(here))
    fail_all(problems)
    return found, tuple(split)


# --- numbers that every age has -------------------------------------------------------------------------


def data_ranks(file: TensorFile) -> int:
    """How many ranks share the parameters of one out, by its args; 1 where they do not say it."""
    args = arguments(file) or {}
    return prod(whole_number(args.get(k)) for k in ("data_parallel_size", "context_parallel_size"))


def args_of(known: Known) -> Mapping[str, Any]:
    return known.source.told or {}


def epsilon(name: str, **more: Any) -> Field:
    """The norms' epsilon, which args call by either of two names."""

    def keys(known: Known) -> tuple[str, ...]:
        newer = known.facts.given("norm_epsilon")
        return ("norm_epsilon", "layernorm_epsilon") if newer else ("layernorm_epsilon",)

    return number(name, read=keys, **more)


def tie(known: Known) -> Value:
    """Whether the output layer is the embedding: unless args say that it is not, or there is an output layer
    of its own where no stage needs a copy of the embedding."""
    key, run = "untie_embeddings_and_output_weights", known.source
    if known.facts.given(key):
        untied = known.facts.boolean(key, key, rule=None)
        return Value(not untied.value, untied.source)
    assert isinstance(run, Run)
    apart = OUTPUT in run.tensors and (not is_core(run.age) or run.stages == 1)
    return Value(not apart, f"rule: {'an' if apart else 'no'} output layer apart from the embedding")


def output_is_there(known: Known, tied: Value) -> Value:
    if not known.back and not tied.value and OUTPUT not in known.source.tensors:
        message = f"expected this tensor ({tied.source}), found none"
        known.refuse("missing-tensor", message, OUTPUT, TIES)
    return tied


# --- writing --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How to write: `version` None writes no checkpoint_version, which stands for 0. `rows` is the vocabulary
    with its padding, `chunks` counts the virtual stages, `split` the layers of each part as `Run` has them,
    empty where all have as many; each of `experts` expert-parallel ranks holds `own_experts`."""

    ranks: int
    rows: int
    age: str = "core"
    version: float | None = 3.0
    stages: int = 1
    chunks: int = 1
    iteration: int = 0
    release: bool = True
    split: tuple[int, ...] = ()
    experts: int = 1
    own_experts: int = 0

    @property
    def tracker(self) -> str:
        return RELEASE if self.release else str(self.iteration)

    def files(self) -> list[list[list[str]]]:
        """[expert-parallel rank][rank][stage]."""
        folder, staged = RELEASE if self.release else f"iter_{self.iteration:07d}", self.stages > 1
        return [
            [
                [
                    f"{folder}/{folder_name(t, p, staged, e if self.experts > 1 else None)}/{FILE}"
                    for p in range(self.stages)
                ]
                for t in range(self.ranks)
            ]
            for e in range(self.experts)
        ]


def whole_number(*found: Any, otherwise: int = 1) -> int:
    """The first that is one above 0."""
    return next((n for n in found if type(n) is int and 0 < n < 10**9), otherwise)


def uneven(run: Run) -> dict[str, Any]:
    """For the manifest, where parts have different numbers of layers."""
    return {SPLIT: list(run.split)} if len(set(run.split)) > 1 else {}


@dataclass(frozen=True)
class Stages:
    """How to share layers out: as `Form` has it."""

    stages: int
    chunks: int
    split: tuple[int, ...]


def stages_of(known: Known) -> Stages:
    """As asked for, else as the original was; what only the original had is left where it no longer fits.
    Kind `usage` for what was asked for and contradicts itself."""
    asked, once, layers = known.options.family_options, known.once, known["num_hidden_layers"]
    counts = _asked_layers(asked.get(PIPELINE_LAYERS.name))
    depth, virtual = asked.get(PIPELINE_PARALLEL.name), asked.get(VIRTUAL_STAGES.name)
    was = whole_number(once.get("pipeline_parallel"))
    # a list that is longer than there are stages has as many parts again for each chunk
    chunks = whole_number(virtual, len(counts) // depth if counts and depth else None)
    stages = whole_number(depth, len(counts) // chunks if counts else None, was)
    if virtual is None and not counts and stages == was:
        chunks = whole_number(once.get("virtual_stages"))
    if counts and (len(counts) != stages * chunks or sum(counts) != layers):
        message = f"expected {stages * chunks} numbers that add up to {layers} layers, found"
        fail("usage", f"{message} {', '.join(map(str, counts))}", where=PIPELINE_LAYERS.flag)
    if 0 in counts[1:-1]:
        message = "expected layers in every stage but the first and the last, found a stage of none"
        fail("usage", message, where=PIPELINE_LAYERS.flag)
    if virtual is not None and virtual > 1 and stages == 1:
        message = "expected pipeline stages beside virtual ones, found one stage"
        fail("usage", message, where=VIRTUAL_STAGES.flag, hint="--pipeline-parallel M")
    split = counts or _split_as_it_was(known, stages, chunks)
    if not split and layers % (stages * chunks) and virtual is None:
        chunks = 1
    if not split and layers % stages and depth is None:
        stages = 1
    return Stages(stages, chunks, split if len(set(split)) > 1 else ())


def _asked_layers(text: Any) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if isinstance(text, str) else ()


def _split_as_it_was(known: Known, stages: int, chunks: int) -> tuple[int, ...]:
    """The layers of each part where the original's were shared out unevenly over as many; else none."""
    found = known.once.get(SPLIT)
    if not isinstance(found, list) or len(found) != stages * chunks:
        return ()
    counts = all(type(n) is int and n >= 0 for n in found)
    return tuple(found) if counts and sum(found) == known["num_hidden_layers"] else ()


def split_args(form: Form) -> dict[str, Value]:
    """What args say of stages and of layers that are shared out unevenly: in the words of core_v0.9.0 where
    those in the middle have as many, else in the layout of core_v0.13.0 (pipeline_parallel_layer_layout.py),
    in which E is the embedding, t a layer and L the output layer."""
    why, n = "ranks to write", len(form.split)
    found: dict[str, Any] = {
        "tensor_model_parallel_size": form.ranks,
        "pipeline_model_parallel_size": form.stages,
    }
    if form.chunks > 1:
        found["virtual_pipeline_model_parallel_size"] = form.chunks
    if form.split and form.chunks == 1 and len(set(form.split[1:-1])) <= 1 and all(form.split):
        middle = form.split[1:-1] or form.split[1:]
        ends = {"first": form.split[0], "last": form.split[-1]}
        found |= {f"decoder_{k}_pipeline_num_layers": v for k, v in ends.items() if v != middle[0]}
    elif form.split:
        parts = [f"{'E' * (k == 0)}{'t' * c}{'L' * (k == n - 1)}" for k, c in enumerate(form.split)]
        found["pipeline_model_parallel_layout"] = "|".join(parts)
    return {k: Value(v, why) for k, v in found.items()}


def split_notes(known: Known, form: Form) -> list[str]:
    if form.split:
        counts = ", ".join(map(str, form.split))
        as_asked = known.options.family_options.get(PIPELINE_LAYERS.name) is not None
        how = "as asked" if as_asked else "as the original's were"
        return [f"layers are shared out over the stages {how}: {counts}"]
    once, asked = whole_number(known.once.get("pipeline_parallel")), PIPELINE_PARALLEL.name
    if form.stages < once and known.options.family_options.get(asked) is None:
        return [f"the original had {once} pipeline stages; one is written"]
    return []


def ranks_of(known: Known) -> int:
    """How many ranks to write: as asked, else as the original had."""
    shards = known.options.shards if known.options.shards > 1 else None
    asked = known.options.family_options.get("tensor_parallel") or shards
    return whole_number(asked, known.once.get("tensor_parallel"))


def padded(known: Known, ranks: int, divisor: int = DIVISOR) -> int:
    """The rows of the vocabulary with their padding, as they were if the words and the ranks are the same."""
    words, once = known["vocab_size"], known.once
    rows: int = -(-words // (divisor * ranks)) * divisor * ranks
    if once.get("tensor_parallel") == ranks and once.get("words", words) == words:
        kept = whole_number(once.get("rows"), otherwise=rows)
        rows = kept if kept >= words else rows
    return rows


def check_shares(known: Known, form: Form, *shared: str) -> None:
    """Fail with `config-mismatch` for numbers that the ranks and stages cannot share out."""
    sizes = {name: int(known[name]) for name in shared} | {"the padded vocabulary": form.rows}
    found = [(name, size, form.ranks, "--tensor-parallel") for name, size in sizes.items()]
    if not form.split:
        by = "--pipeline-parallel" + (f" x {VIRTUAL_STAGES.flag}" if form.chunks > 1 else "")
        found.append(("num_hidden_layers", known["num_hidden_layers"], form.stages * form.chunks, by))
    fail_all(
        Problem(
            "config-mismatch",
            f"expected {name} {size} to divide by {by_name} {by}, found a rest",
            where=by_name,
            hint=f"{PIPELINE_LAYERS.flag} shares them out unevenly" if name == "num_hidden_layers" else None,
        )
        for name, size, by, by_name in found
        if size % by
    )


def shared_args(known: Known, form: Form, groups: Mapping[str, Value]) -> dict[str, Value]:
    """The args that every age has; `groups` say which queries share a key and a value."""
    length, width = known.value("max_position_embeddings"), known["hidden_size"]
    return {
        **document(
            known,
            ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
            {"ffn_hidden_size": "intermediate_size"},
        ),
        **groups,
        "kv_channels": known.value("head_dim")
        if "head_dim" in known.fields
        else Value(width // known["num_attention_heads"], "width / heads"),
        "max_position_embeddings": length,
        "seq_length": length,
        "padded_vocab_size": Value(form.rows, "rows to write"),
        "orig_vocab_size": known.value("vocab_size"),
    }


def to_ranks(
    table: Table, source: Source, options: Options, written: Written, form: Form, own: Callable[[str], str]
) -> Plan:
    """The plan of the way back; the config of `written` are the args, and `own` gives a file's name for one
    of the table, `{i}` for the layer in both."""
    tracker = OutputDocument(TRACKER, form.tracker.encode(), "names the folder of the ranks")
    files = form.files()
    dtype, layers = options.dtype or source.dtype, table.layers.value
    plan = to_original(
        table,
        source,
        options,
        replace(written, documents=[tracker, *written.documents]),
        files=[f for one in files for stage in zip(*one, strict=True) for f in stage],
        homes=_homes(form, files, layers, dtype, own),
        again=_again(files),
    )
    beside: dict[str, object] = {"args": Namespace({k: v.value for k, v in written.config.items()})}
    if form.version is not None:
        beside["checkpoint_version"] = form.version
    beside["iteration"] = form.iteration
    heads = [f"model.{t[:-1]}" for t in TUNED if any(f"{t}weight" in r.source for r in table.rows)]
    inside = (*DICTS[form.age], *(heads if not is_core(form.age) else ()))
    dicts = tuple(d.replace("model", m, 1) for m in _models(form) for d in inside)
    return replace(plan, outputs=tuple(replace(f, dicts=dicts, beside=beside) for f in plan.outputs))


def _models(form: Form) -> list[str]:
    return [f"model{k}" for k in range(form.chunks)] if form.chunks > 1 else ["model"]


def _homes(
    form: Form, files: list[list[list[str]]], layers: int, dtype: str, own: Callable[[str], str]
) -> Callable[[str], list[Home]]:
    """Where each tensor of the tables goes, and what it is called there; of those that every expert-parallel
    rank has, where the first has it."""
    parts, models = form.stages * form.chunks, _models(form)
    split = form.split or (layers // parts,) * parts
    places = [(part, local) for part, count in enumerate(split) for local in range(count)]

    def homes(name: str) -> list[Home]:
        template, layer = without_layer(name)
        if layer is None:
            part, local = (0 if name.removeprefix("embedding.").startswith(FIRST) else parts - 1), 0
        else:
            part, local = places[layer]
        rank = 0
        if form.own_experts and (m := EXPERT.fullmatch(template)) is not None:
            rank, e = divmod(int(m["e"]), form.own_experts)
            template = f"{m['before']}{e}{m['after']}"
        chunk, stage = divmod(part, form.stages)
        there = f"{models[chunk]}.{own(template).replace('{i}', str(local))}"
        return [(row[stage], dtype, there) for row in files[rank]]

    return homes


def _again(files: list[list[list[str]]]) -> Callable[[Part], list[Home]]:
    """Where else what the first expert-parallel rank holds is written, unless it is an expert's."""
    first, *others = ([f for row in one for f in row] for one in files)
    place = {f: k for k, f in enumerate(first)}

    def again(part: Part) -> list[Home]:
        if EXPERT.fullmatch(part.name) is not None:
            return []
        return [(one[place[part.file]], part.dtype, part.name) for one in others]

    return again
