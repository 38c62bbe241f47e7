"""What an Adam optimizer knows of each tensor, carried through the rows that its tensor goes through.

A moment has the layout of its parameter, so each step of a plan is done once more for each state:

    torch_dist    optimizer.state.{state}.{name}         exp_avg, exp_avg_sq, fp32_param of every tensor; the
                  last is `param` where a distributed optimizer has put its buffers apart (fully_reshardable)
    mp_rank_*     by number, see optimizer_ranks.py, or of a distributed optimizer, see optimizer_buffers.py
    Hugging Face  optimizer/{state}-00001-of-0000N.safetensors holds {state}.{name}, optimizer/optimizer.json
                  the number of steps, the groups, the schedule and how ranks had them

Source: NVIDIA/Megatron-LM core_v0.9.0 to core_v0.19.2 (core/optimizer/__init__.py, optimizer.py:
sharded_state_dict; distributed_data_parallel/param_and_grad_buffer.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, NoReturn

from ckpt_tool.checkpoint.base import Checkpoint, Renamed, TensorFile, TensorInfo
from ckpt_tool.checkpoint.folders import Place
from ckpt_tool.checkpoint.megatron import FILE as RANK_FILE
from ckpt_tool.checkpoint.megatron import may_hold_ranks
from ckpt_tool.checkpoint.opening import OpenedCheckpoint
from ckpt_tool.checkpoint.pickle_records import Inert
from ckpt_tool.checkpoint.safetensors import open_safetensors
from ckpt_tool.checkpoint.sliced import Pieced, Sliced, buffers_of
from ckpt_tool.convert import optimizer_document
from ckpt_tool.convert.dialects import megatron_dist
from ckpt_tool.convert.dialects.megatron_ranks import data_ranks
from ckpt_tool.convert.layout import Part, Step
from ckpt_tool.convert.optimizer_buffers import DISTRIBUTED, FLAG, HINT, Alike, agree, open_buffers, states_of
from ckpt_tool.convert.optimizer_document import DOCUMENT, FOLDER
from ckpt_tool.convert.optimizer_ranks import (
    LISTED,
    MASTER,
    NARROW,
    NUMBERED,
    Numbered,
    Ranks,
    distributed,
    laid,
    numbered,
    optimizers_of,
    told_of,
)
from ckpt_tool.convert.optimizer_said import Said, agreed, said_of
from ckpt_tool.convert.optimizer_shards import folder_of, is_bucket, said, states_in_buckets
from ckpt_tool.convert.plan import Chunk, Options, OutputDocument, OutputFile, Plan, natural
from ckpt_tool.convert.source import each_once
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import Problem, fail, fail_all
from ckpt_tool.records import dataclass

STATES = ("exp_avg", "exp_avg_sq", "fp32_param")  # the moments, and the weights that the step is made on
_ALL = "|".join(STATES)
_NAMED = re.compile(rf"optimizer\.state\.(?P<state>{_ALL}|param)\.(?P<name>.+)", re.ASCII)
_FILE = re.compile(rf"(?P<state>{_ALL})(-\d{{5}}-of-\d{{5}})?\.safetensors", re.ASCII)
_WITHOUT = f"without {FLAG} the state is left out"

GATHERED = "dp_zero_gather_scatter"  # of torch_dist
DEEPSPEED = "_optim_states.pt"
PARTITIONS = "deepspeed-zero"  # the format of files that checkpoint/zero.py joined
FLAT = "fully_sharded_model_space"
IN_BUCKETS = {"dp_reshardable", "fully_sharded_bucket_space"}
PROVED = "where a parameter lies in {} was proved: the float32 weights there, rounded, are the model's"

Key = tuple[str, str]  # file and name


@dataclass(frozen=True)
class State:
    """Of a checkpoint: by the name of a state, where that of each tensor of the model is. `told` goes into
    `optimizer.json`."""

    of: Mapping[str, Mapping[Key, TensorInfo]]
    told: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass
class _Told:
    """What the files say beside the states, as they are read; `ranks` are those that number parameters."""

    runs: list[Said] = field(default_factory=list)
    ranks: list[Numbered] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    alike: Alike = field(default_factory=Alike)


def with_optimizer(plan: Plan, checkpoint: Checkpoint, options: Options) -> Plan:
    """`plan` with the states of the optimizer carried along. `checkpoint` is its source. Kinds:
    `missing-tensor` where there is none, or not of every tensor, `unsupported` for what is not mapped, and
    those of `states_of`."""
    if any(step.mean for step in plan.steps):
        fail(
            "unsupported", "expected heads as they are, found some to pool, which have no moments", where=FLAG
        )
    if plan.direction == "to-hf":
        return _forth(plan, checkpoint, options)
    return _back(plan, attached(checkpoint))


def of_states(plan: Plan) -> Plan:
    """The part of such a plan that is about the optimizer alone."""
    ours = [replace(f, tensors=tuple(t for t in f.tensors if is_state(t.name))) for f in plan.outputs]
    steps = Steps([s for s in plan.steps if is_state(s.targets[0].name)])
    return replace(plan, outputs=tuple(f for f in ours if f.tensors), steps=steps, dropped=())


def read_by(plan: Plan, checkpoint: Checkpoint) -> Checkpoint:
    """The source of `plan` with the files among its files that states are read from beside the model's."""
    if plan.direction != "to-hf":
        return attached(checkpoint)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for step in plan.steps:
        for p in (p for p in step.sources if p.file not in checkpoint.files):
            parts.setdefault(p.file, {})[p.name] = p.shape(step.sizes)
    files: dict[str, TensorFile] = dict(checkpoint.files)
    for label, own in parts.items():
        folder = folder_of(label)
        if folder is None:
            files[label] = Sliced(open_buffers(_place(checkpoint, label), label), own.items())
        else:
            files[label] = Pieced(checkpoint.files[folder], own.items(), label)
    return replace(checkpoint, files=files)


def buckets_of(plan: Plan) -> set[Key]:
    """The tensors of a torch_dist folder in which the states lie that `plan` reads."""
    parts = ((folder_of(p.file), p.name) for s in plan.steps for p in s.sources)
    return {(folder, name) for folder, part in parts if folder is not None for name in buffers_of(part)}


def attached(checkpoint: Checkpoint) -> Checkpoint:
    """A folder in the Hugging Face layout with the files of its optimizer among its files."""
    folder = Path(checkpoint.path) / FOLDER
    names = sorted((p.name for p in folder.glob("*.safetensors")), key=natural) if folder.is_dir() else []
    files: dict[str, TensorFile] = dict(checkpoint.files)
    for name in filter(_FILE.fullmatch, names):
        files[f"{FOLDER}/{name}"] = open_safetensors(folder / name, name=f"{FOLDER}/{name}")
    return replace(checkpoint, files=files)


def is_state(name: str) -> bool:
    """Whether a tensor of either layout is called as a state that was carried."""
    return name.startswith(("optimizer.", *(f"{s}." for s in STATES)))


# --- what there is ------------------------------------------------------------------------------------------


def state_of(checkpoint: Checkpoint, plan: Plan) -> State:
    """The states of an original."""
    named: dict[str, dict[Key, TensorInfo]] = {}
    told = _Told()
    used: dict[str, set[str]] = {}
    for p in (p for s in plan.steps for p in s.sources):
        used.setdefault(p.file, set()).add(p.name)
    apart = _apart(checkpoint)
    for label, file in checkpoint.files.items():
        ours = [t for t in file.tensors.values() if t.name.startswith(("optimizer.", "chained_"))]
        model = [t for t in file.tensors.values() if t.name in used.get(label, ())]
        for t in ours:
            if (found := _NAMED.fullmatch(t.name)) is not None:
                state = MASTER if found["state"] == "param" else found["state"]
                named.setdefault(state, {})[label, found["name"]] = t
        _refuse_moved(checkpoint, label, model, told.alike)
        _refuse_form(label, file, ours)
        if any(is_bucket(t.name) for t in ours):
            for (state, name), t in states_in_buckets(file, checkpoint, model, told.alike):
                named.setdefault(state, {})[label, name] = t
            told.notes.append(PROVED.format("buckets"))
            beside = {**file.metadata, "optimizer": said(file)}
            file = Renamed(file, {})
            file.metadata = beside
        ranks: Numbered | None = None
        if any(NUMBERED.fullmatch(t.name) for t in ours):
            ranks = numbered(label, file, model, _WITHOUT)
        elif label in apart:
            ranks = distributed(file, model, dict(_buffered(checkpoint, label, file, model, told.alike)))
        if ranks is not None:
            told.ranks.append(ranks)
            told.notes += [PROVED.format(DISTRIBUTED)] if label in apart else []
            for (state, name), t in ranks.states.items():
                named.setdefault(state, {})[label, name] = t
        fail_all(_unmapped(label, file, [t for t in ours if not _is_mapped(t)]))
        told.runs += filter(None, [said_of(file, told.notes)])
    if not named:
        _none(checkpoint)
    told.notes += filter(None, [told.alike.note()])
    return State(
        {s: named[s] for s in STATES if s in named}, _content(told), tuple(dict.fromkeys(told.notes))
    )


def _refuse_moved(checkpoint: Checkpoint, label: str, model: Sequence[TensorInfo], seen: Alike) -> None:
    """Fail where the weights in float32 that came out of buffers are not those of the model: core_v0.15.0 to
    core_v0.19.0 count the ends of buckets twice, so that behind the first one every state is another's."""
    file = checkpoint.files[label]
    for t in model:
        wide = file.tensors.get(f"optimizer.state.param.{t.name}")
        if wide is None or wide.shape != t.shape or wide.dtype != "F32":
            continue
        if not agree(checkpoint, t, [(file, wide.name, 0, wide.nbytes)], seen):
            text = f"expected weights in float32 that rounded to {t.dtype} are {t.name}, found others"
            hint = "Megatron-Core 0.15 to 0.19 may save states of fully_reshardable beside their places"
            fail("unproved", text, file=label, where=wide.name, hint=f"{hint}; {HINT}")


def _is_distributed(file: TensorFile) -> bool:
    """Whether its states are in a file of their own, as its groups say."""
    return any(told.distributed for told in optimizers_of(file))


def _beside(label: str) -> str:
    """What the file is called that has the states of a distributed optimizer of the model in `label`."""
    folder, slash, _ = label.rpartition("/")
    return f"{folder}{slash}{DISTRIBUTED}"


def _inside(checkpoint: Checkpoint) -> set[str]:
    """The files in the folders of ranks."""
    folder = checkpoint.folder if isinstance(checkpoint, OpenedCheckpoint) else None
    return set() if folder is None else {*folder.names(), *folder.below(may_hold_ranks)}


def _apart(checkpoint: Checkpoint) -> set[str]:
    """The files beside which others have their states. Fails where one of these is not there."""
    there = _inside(checkpoint)
    states = [
        label
        for label, file in checkpoint.files.items()
        if not any(map(NUMBERED.fullmatch, file.tensors)) and file.format.startswith("torch")
    ]
    wanted = [label for label in states if _is_distributed(checkpoint.files[label])]
    if not wanted and any(_beside(label) in there for label in states):
        wanted = states
    text = "expected the state of a distributed optimizer beside the model, found no such file"
    fail_all(
        Problem("missing-shard", text, _beside(label), hint=HINT)
        for label in wanted
        if _beside(label) not in there
    )
    return set(wanted)


def _place(checkpoint: Checkpoint, label: str) -> Place:
    assert isinstance(checkpoint, OpenedCheckpoint) and checkpoint.folder is not None
    return checkpoint.folder.place(label)


def _buffered(
    checkpoint: Checkpoint, label: str, file: TensorFile, model: Sequence[TensorInfo], seen: Alike
) -> Iterator[tuple[tuple[str, str], TensorInfo]]:
    """The states that lie in flat buffers beside the file of a rank."""
    buffers = open_buffers(_place(checkpoint, _beside(label)), _beside(label))
    try:
        yield from states_of(buffers, checkpoint, model, data_ranks(file), seen)
    finally:
        buffers.close()


def _content(told: _Told) -> dict[str, Any]:
    """What `optimizer.json` says beside the states."""
    content = agreed(told.runs, told.notes)
    if told.ranks:
        content["ranks"] = told_of(told.ranks)
        told.notes += (
            [] if content["ranks"] else [f"{DOCUMENT} has no way back to ranks: they differ in form"]
        )
    return content


def _none(checkpoint: Checkpoint) -> NoReturn:
    """Fail with where the state is instead, if it is anywhere."""
    text = "expected the state of an optimizer, a tensor for each of the model, found"
    for label, file in checkpoint.files.items():
        held = file.metadata.get("optimizer")
        if isinstance(held, Inert) or _objects(held):
            fail(
                "unsupported",
                f"{text} it in an object of the run's own code",
                file=label,
                where="optimizer",
                hint=HINT,
            )
    flat = [n for n, f in checkpoint.files.items() if f.format == PARTITIONS or "ds_version" in f.metadata]
    for name in (*flat, *sorted(n for n in _inside(checkpoint) if n.endswith(DEEPSPEED))):
        fail("unsupported", f"{text} flat partitions of DeepSpeed's ranks", file=name, where=FLAG, hint=HINT)
    fail("missing-tensor", f"{text} none", file=checkpoint.path.name, where=FLAG, hint=HINT)


def _objects(held: object) -> bool:
    """Whether a dict holds objects, in which tensors may be."""
    return isinstance(held, Mapping) and any(isinstance(v, Inert) for v in held.values())


def _is_mapped(t: TensorInfo) -> bool:
    """Whether it is a state of one tensor, or a number of the run, such as the scale of its gradients."""
    return any(p.fullmatch(t.name) for p in (_NAMED, NUMBERED, LISTED)) or is_bucket(t.name) or t.numel == 1


def _refuse_form(label: str, file: TensorFile, ours: Sequence[TensorInfo]) -> None:
    """Fail where a torch_dist folder says that its states lie in no tensors of its own, in buckets that it
    does not have, or where they are flattened."""
    held = file.metadata.get("optimizer")
    elements = [held, *held.values()] if isinstance(held, Mapping) else []
    where = "param_state_sharding_type"
    said_of_each = [x.get(where) for x in elements if isinstance(x, Mapping)]
    forms = {form for form in said_of_each if isinstance(form, str)}
    if GATHERED in forms:
        text = f"expected the state of an optimizer in tensors, found an object of each rank ({GATHERED})"
        way = "--dist-ckpt-optim-fully-reshardable, from one bucket, or --ckpt-format torch"
        hint = f"Megatron loads it on as many model-parallel ranks and saves it with {way}; {HINT}"
        fail("unsupported", text, file=label, where=where, hint=hint)
    if (found := forms & IN_BUCKETS) and not any(is_bucket(t.name) for t in ours):
        text = f"expected the state of an optimizer in buckets, as {min(found)} has it, found no whole ones"
        fail("missing-tensor", text, file=label, where=where, hint=HINT)
    for t in ours if FLAT in forms else ():
        m = _NAMED.fullmatch(t.name)
        of = None if m is None else file.tensors.get(m["name"])
        if of is not None and of.shape != t.shape:
            text = f"expected states in the shapes of the model, found {list(t.shape)}, flattened ({FLAT})"
            hint = f"a release of Megatron that reads it saves it with dp_reshardable; {HINT}"
            fail("unsupported", text, file=label, where=t.name, hint=hint)


def _unmapped(label: str, file: TensorFile, others: Sequence[TensorInfo]) -> Iterator[Problem]:
    """State that has no tensors of its own, or that belongs to none of the model."""
    hint = f"without {FLAG} it is left out; a run that saves its state by parameters has it apart"
    if others:
        known = f"{', '.join(STATES)} of each tensor of the model"
        text = f"expected {known}, found {len(others)} of another form, such as buffers of many parameters"
        yield Problem("unsupported", text, label, others[0].name, hint)


# --- to the Hugging Face layout -----------------------------------------------------------------------------


def _forth(plan: Plan, checkpoint: Checkpoint, options: Options) -> Plan:
    found = state_of(checkpoint, plan)
    steps: list[Step] = []
    files: list[OutputFile] = []
    for state, held in found.of.items():
        own = _cloned(plan.steps, held, state)
        made = _placed(_written(own), state, options.max_shard_bytes)
        home = {t.name: f.name for f in made for t in f.tensors}
        steps += [s.with_targets(tuple(p.at_home(home[p.name]) for p in s.targets)) for s in own]
        files += made
    content = {"states": list(found.of), **found.told}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    document = OutputDocument(DOCUMENT, text.encode(), "the optimizer of the original")
    all_steps = Steps([*plan.steps, *steps])
    carried = {(p.file, p.name) for s in steps for p in s.sources}
    carried |= buckets_of(replace(plan, steps=all_steps))
    return replace(
        plan,
        steps=all_steps,
        outputs=(*plan.outputs, *files),
        documents=(*plan.documents, document),
        dropped=tuple(d for d in plan.dropped if (d.tensor.file, d.tensor.name) not in carried),
        notes=(*plan.notes, f"{', '.join(found.of)} of the optimizer are carried along", *found.notes),
        asked={**plan.asked, "with_optimizer": True},
    )


def _cloned(steps: Iterable[Step], held: Mapping[Key, TensorInfo], state: str) -> list[Step]:
    """Each step once more, of the states of its tensors; a copy that has none is not compared."""
    made: list[Step] = []
    problems: list[Problem] = []
    dtypes: dict[Key, str] = {}
    for step in steps:
        infos = [held.get((p.file, p.name)) for p in step.sources]
        if all(i is None for i in infos) and (step.compare or _is_its_own(step, state)):
            continue
        sources = []
        for part, info in zip(step.sources, infos, strict=True):
            if info is None:
                text = f"expected {state} of this tensor too, as others have it, found none"
                problems.append(Problem("missing-tensor", text, part.file, part.name))
            elif info.shape != part.shape(step.sizes):
                text = f"expected {state} of shape {list(part.shape(step.sizes))}, found {list(info.shape)}"
                problems.append(Problem("shape-mismatch", text, part.file, info.name))
            else:
                sources.append(replace(part, file=info.file, name=info.name, dtype=info.dtype))
        if len(sources) < len(infos):
            continue
        written = {dtypes.setdefault((p.file, p.name), sources[0].dtype) for p in step.targets}
        if len(found := {*written, *(p.dtype for p in sources)}) > 1:
            said = " and ".join(sorted(found))
            text = f"expected {state} of one dtype in what becomes one tensor, found {said}"
            problems.append(Problem("dtype-mismatch", text, sources[0].file, sources[0].name, _WITHOUT))
            continue
        targets = [replace(p, name=f"{state}.{p.name}", dtype=sources[0].dtype) for p in step.targets]
        made.append(step.between(tuple(sources), tuple(targets)))
    fail_all(problems)
    return made


def _is_its_own(step: Step, state: str) -> bool:
    """Whether tensors are the weights in float32 themselves."""
    return state == MASTER and all(p.dtype == "F32" for p in step.sources)


def _written(steps: Iterable[Step]) -> list[TensorInfo]:
    """The tensors that steps write, each once."""
    made: dict[str, TensorInfo] = {}
    for step in (s for s in steps if not s.compare):
        for p in step.targets:
            made.setdefault(p.name, TensorInfo(p.name, p.dtype, p.shape(step.sizes), ""))
    return list(made.values())


def _placed(tensors: Sequence[TensorInfo], state: str, limit: int) -> list[OutputFile]:
    """Dealt out to files of at most `limit` bytes; a larger tensor gets one of its own."""
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for t in tensors:
        if groups[-1] and size + t.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(t)
        size += t.nbytes
    files = []
    for k, group in enumerate(groups, start=1):
        name = f"{FOLDER}/{state}-{k:05d}-of-{len(groups):05d}.safetensors"
        own = tuple(TensorInfo(t.name, t.dtype, t.shape, name) for t in group)
        files.append(OutputFile(name, "safetensors", own, (("format", "pt"),)))
    return files


# --- to an original -----------------------------------------------------------------------------------------


def _back(plan: Plan, checkpoint: Checkpoint) -> Plan:
    in_folder = all(f.format == "dcp" for f in plan.outputs)
    if not in_folder and not all(f.name.endswith(f"/{RANK_FILE}") for f in plan.outputs):
        text = "expected ranks of Megatron or a torch_dist folder to write, found a form without a state"
        fail("unsupported", text, where=FLAG, hint=f"without {FLAG} the model alone is written")
    held = _held(plan, checkpoint)
    parts = [p for s in plan.steps for p in s.sources]
    made: dict[str, list[Step]] = {}
    for state in (s for s in STATES if s in held):
        own = {(p.file, p.name): held[state][p.name] for p in parts if p.name in held[state]}
        made[state] = _cloned(plan.steps, own, state)
    whole = _to_folder(plan, made) if in_folder else _to_ranks(plan, checkpoint, made)
    return replace(
        whole,
        notes=(*whole.notes, f"{', '.join(made)} of the optimizer are carried along"),
        asked={**plan.asked, "with_optimizer": True},
    )


def _to_folder(plan: Plan, made: Mapping[str, Sequence[Step]]) -> Plan:
    steps: list[Step] = []
    files: list[OutputFile] = []
    for state, own in made.items():
        homes = {
            f.name: megatron_dist.data_file(len(plan.outputs) + len(files) + k)
            for k, f in enumerate(plan.outputs)
        }
        files += [_of_state(f, homes[f.name], state, own) for f in plan.outputs]
        steps += [_moved(s, state, homes) for s in own]
    files = [f for f in files if f.tensors]
    outputs = (*plan.outputs, *files)
    listed = list(megatron_dist.contents(list(outputs)))
    again = {d.name for d in listed}
    note = f"the steps and groups of {DOCUMENT} are not written: Megatron takes them from its own run"
    return replace(
        plan,
        steps=Steps([*plan.steps, *steps]),
        outputs=outputs,
        documents=(*(d for d in plan.documents if d.name not in again), *listed),
        notes=(*plan.notes, note),
    )


def _to_ranks(plan: Plan, checkpoint: Checkpoint, made: Mapping[str, Sequence[Step]]) -> Plan:
    """Each file with the states of its own tensors, numbered as the original's were."""
    ranks, schedule = optimizer_document.read(checkpoint)
    ranks = _as_many(ranks, plan)
    if unknown := [t for f in plan.outputs for t in f.tensors if not ranks.order.knows(t.name)]:
        text = f"expected the parameters of the ranks that {DOCUMENT} has in their order, found another"
        hint = f"another --form, or none, writes those that the original had; without {FLAG} the model alone"
        fail("unsupported", text, file=unknown[0].file, where=unknown[0].name, hint=hint)
    written = [p for own in made.values() for s in own if not s.compare for p in s.targets]
    dtypes = {(p.file, p.name): p.dtype for p in written}
    names: dict[Key, str] = {}
    files: list[OutputFile] = []
    for f in plan.outputs:
        has = {s: [t.name for t in f.tensors if (f.name, f"{s}.{t.name}") in dtypes] for s in made}
        _refuse_wide(f, has.get(MASTER, ()))
        # who reads them takes the order of the parameters from that of the file
        model = tuple(sorted(f.tensors, key=lambda t: ranks.order.key(t.name)))
        file, shapes = laid(ranks, model, has), {t.name: t.shape for t in model}
        names |= {(f.name, f"{state}.{name}"): called for (state, name), called in file.names.items()}
        states = [
            TensorInfo(called, dtypes[f.name, f"{state}.{name}"], shapes[name], f.name)
            for (state, name), called in file.names.items()
        ]
        files.append(
            replace(
                f,
                tensors=(*model, *states),
                constants=(*f.constants, *file.constants),
                beside={**f.beside, "optimizer": file.tree, **schedule},
            )
        )
    steps = [_renamed(s, names) for own in made.values() for s in own]
    notes = ["random states of the run are left out: Megatron loads the ranks with --no-load-rng"]
    if not schedule:
        notes.append(f"{DOCUMENT} has no schedule, which Megatron asks for beside the state of the optimizer")
    return replace(
        plan,
        steps=Steps([*plan.steps, *steps]),
        outputs=tuple(files),
        notes=(*plan.notes, *notes),
    )


def _as_many(ranks: Ranks, plan: Plan) -> Ranks:
    """A list of optimizers, one of experts, is what a run has that shares experts out, and no other."""
    told = plan.config.get("expert_model_parallel_size")
    if not ranks.counts or (told is not None and told.value not in (None, 1)):
        return ranks
    if (one := ranks.together()) is None:
        text = "expected the same numbers for experts as for other parameters, which one rank steps together"
        hint = "--expert-parallel, as the original was, keeps them apart"
        fail("unsupported", text, file=DOCUMENT, where="groups", hint=hint)
    return one


def _refuse_wide(file: OutputFile, masters: Sequence[str]) -> None:
    """Ranks list weights in float32 only of parameters that have 16 bits."""
    held = set(masters)
    if wide := [t for t in file.tensors if t.name in held and t.dtype not in NARROW]:
        text = f"expected 16 bits beside the weights in float32 that the optimizer has, found {wide[0].dtype}"
        hint = "--dtype bfloat16 or float16, as the run had it, writes them so"
        fail("unsupported", text, file=file.name, where=wide[0].name, hint=hint)


def _renamed(step: Step, names: Mapping[Key, str]) -> Step:
    return step.with_targets(tuple(p.called(names[p.file, p.name]) for p in step.targets))


def _held(plan: Plan, checkpoint: Checkpoint) -> dict[str, dict[str, TensorInfo]]:
    """The states of a folder in the Hugging Face layout, by state and by the name of the tensor: each stands
    once, and is of a tensor that the plan reads."""
    files = {n: f for n, f in checkpoint.files.items() if n.startswith(f"{FOLDER}/")}
    read = {p.name for s in plan.steps for p in s.sources}
    held: dict[str, dict[str, TensorInfo]] = {}
    problems = []
    for t in each_once(replace(checkpoint, files=files)).values():
        state, _, name = t.name.partition(".")
        if state not in STATES or name not in read:
            text = f"expected {', '.join(STATES)} of tensors of the model, found another"
            problems.append(Problem("uncovered-tensors", text, t.file, t.name, _WITHOUT))
        held.setdefault(state, {})[name] = t
    fail_all(problems)
    if not held:
        text = f"expected {FOLDER}/exp_avg-00001-of-0000N.safetensors beside the weights, found none"
        fail("missing-tensor", text, file=checkpoint.path.name, where=FLAG)
    return held


def _own(name: str, state: str) -> str:
    """The name in a folder of the state that `_cloned` calls `name`."""
    return f"optimizer.state.{name}" if name.startswith(f"{state}.") else name


def _of_state(file: OutputFile, name: str, state: str, steps: Iterable[Step]) -> OutputFile:
    """The states of the tensors of `file`, which lie in theirs as these do."""
    dtypes = {p.name: p.dtype for s in steps if not s.compare for p in s.targets if p.file == file.name}
    pairs = [
        (TensorInfo(f"optimizer.state.{state}.{t.name}", dtypes[f"{state}.{t.name}"], t.shape, name), c)
        for t, c in zip(file.tensors, file.chunks, strict=True)
        if f"{state}.{t.name}" in dtypes
    ]
    chunks = tuple(Chunk(f"optimizer.state.{state}.{c.key}", c.start) for _, c in pairs)
    return replace(file, name=name, tensors=tuple(t for t, _ in pairs), chunks=chunks)


def _moved(step: Step, state: str, homes: Mapping[str, str]) -> Step:
    def home(p: Part) -> Part:
        return replace(p, file=homes[p.file], name=_own(p.name, state))

    return step.with_targets(tuple(home(p) for p in step.targets))
