"""What an Adam optimizer knows of each tensor, carried through the rows that its tensor goes through.

A moment has the layout of its parameter, so each step of a plan is done once more for each state:

    torch_dist    optimizer.state.{state}.{name}         exp_avg, exp_avg_sq, fp32_param of every tensor
    mp_rank_*     optimizer[.optimizer].state.{n}.{state}   exp_avg, exp_avg_sq of the n-th parameter
    Hugging Face  optimizer/{state}-00001-of-0000N.safetensors holds {state}.{name}, optimizer/optimizer.json
                  the number of steps and the groups

The numbers of Megatron's ranks count the parameters that decay, then the others, each in the order of the
modules, which is that of the file. Flat buffers of a distributed optimizer have no tensors of their own, and
are refused.

Source: NVIDIA/Megatron-LM core_v0.9.0 to core_v0.19.2 (core/optimizer/__init__.py, optimizer.py:
sharded_state_dict); torch 2.13 (optim/optimizer.py, state_dict).
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from ckpt_tool.checkpoint.base import Checkpoint, TensorFile, TensorInfo
from ckpt_tool.checkpoint.pickle_records import Inert
from ckpt_tool.checkpoint.safetensors import open_safetensors
from ckpt_tool.convert.dialects import megatron_dist
from ckpt_tool.convert.layout import Part, Step
from ckpt_tool.convert.plan import Chunk, Options, OutputDocument, OutputFile, Plan, natural
from ckpt_tool.convert.source import each_once
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import Problem, fail, fail_all

FLAG = "--with-optimizer"
FOLDER = "optimizer"
DISTRIBUTED = "distrib_optim.pt"  # of a distributed optimizer
DOCUMENT = f"{FOLDER}/optimizer.json"
STATES = ("exp_avg", "exp_avg_sq", "fp32_param")  # the moments, and the weights that the step is made on
_ALL = "|".join(STATES)
_NAMED = re.compile(rf"optimizer\.state\.(?P<state>{_ALL})\.(?P<name>.+)", re.ASCII)
_NUMBERED = re.compile(rf"optimizer\.(optimizer\.)?state\.(?P<n>\d{{1,9}})\.(?P<state>{_ALL})", re.ASCII)
_STEP = re.compile(r"optimizer\.(optimizer\.)?state\.\d+\.step", re.ASCII)
_FILE = re.compile(rf"(?P<state>{_ALL})(-\d{{5}}-of-\d{{5}})?\.safetensors", re.ASCII)
_WITHOUT = f"without {FLAG} the state is left out"
# Of a group of parameters: what a number of `optimizer.json` may be.
_PLAIN = (int, float, bool, str)

Key = tuple[str, str]  # file and name


@dataclass(frozen=True)
class State:
    """Of a checkpoint: by the name of a state, where that of each tensor of the model is. `told` goes into
    `optimizer.json`."""

    of: Mapping[str, Mapping[Key, TensorInfo]]
    told: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def with_optimizer(plan: Plan, checkpoint: Checkpoint, options: Options) -> Plan:
    """`plan` with the states of the optimizer carried along. `checkpoint` is its source, from a folder in the
    Hugging Face layout `attached`. Kinds: `missing-tensor` where there is none, or not of every tensor,
    `unsupported` for what is not mapped."""
    if any(step.mean for step in plan.steps):
        fail(
            "unsupported", "expected heads as they are, found some to pool, which have no moments", where=FLAG
        )
    if plan.direction == "to-hf":
        return _forth(plan, checkpoint, options)
    return _back(plan, checkpoint)


def of_states(plan: Plan) -> Plan:
    """The part of such a plan that is about the optimizer alone."""
    ours = [f for f in plan.outputs if any(is_state(t.name) for t in f.tensors)]
    files = {f.name for f in ours}
    steps = Steps([s for s in plan.steps if all(p.file in files for p in s.targets)])
    return replace(plan, outputs=tuple(ours), steps=steps, dropped=())


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
    return name.startswith(("optimizer.state.", *(f"{s}." for s in STATES)))


# --- what there is ------------------------------------------------------------------------------------------


def state_of(checkpoint: Checkpoint, plan: Plan) -> State:
    """The states of an original."""
    named: dict[str, dict[Key, TensorInfo]] = {}
    told: list[dict[str, Any]] = []
    notes: list[str] = []
    for label, file in checkpoint.files.items():
        ours = [t for t in file.tensors.values() if t.name.startswith("optimizer.")]
        for t in ours:
            if (found := _NAMED.fullmatch(t.name)) is not None:
                named.setdefault(found["state"], {})[label, found["name"]] = t
        if any(_NUMBERED.fullmatch(t.name) for t in ours):
            for (state, name), t in _numbered(label, file, plan).items():
                named.setdefault(state, {})[label, name] = t
        fail_all(_unmapped(label, file, [t for t in ours if not _is_mapped(t)]))
        told += filter(None, [_told(file)])
        notes += _notes(label, file)
    if not named:
        _none(checkpoint)
    steps = sorted({t["step"] for t in told if "step" in t})
    content = told[0] if told else {}
    if len(steps) > 1:
        notes.append(f"ranks made {' and '.join(map(str, steps))} steps, so {DOCUMENT} says no number")
        content = {k: v for k, v in content.items() if k != "step"}
    return State({s: named[s] for s in STATES if s in named}, content, tuple(dict.fromkeys(notes)))


def _none(checkpoint: Checkpoint) -> NoReturn:
    """Fail with where the state is instead, if it is anywhere."""
    hint = f"without {FLAG} the model alone is converted"
    text = "expected the state of an optimizer, a tensor for each of the model, found"
    for label, file in checkpoint.files.items():
        if isinstance(held := file.metadata.get("optimizer"), Inert) or _objects(held):
            fail(
                "unsupported",
                f"{text} it in an object of the run's own code",
                file=label,
                where="optimizer",
                hint=hint,
            )
        if found := next((p for p in file.paths if p.with_name(DISTRIBUTED).is_file()), None):
            where = f"{found.parent.name}/{DISTRIBUTED}"
            fail(
                "unsupported",
                f"{text} it in flat buffers of many parameters",
                file=where,
                where=FLAG,
                hint=hint,
            )
    fail("missing-tensor", f"{text} none", file=checkpoint.path.name, where=FLAG, hint=hint)


def _objects(held: object) -> bool:
    """Whether a dict holds objects, in which tensors may be."""
    return isinstance(held, Mapping) and any(isinstance(v, Inert) for v in held.values())


def _is_mapped(t: TensorInfo) -> bool:
    """Whether it is a state of one tensor, or a number of the run, such as the scale of its gradients."""
    return bool(_NAMED.fullmatch(t.name) or _NUMBERED.fullmatch(t.name)) or t.numel == 1


def _unmapped(label: str, file: TensorFile, others: Sequence[TensorInfo]) -> Iterator[Problem]:
    """State that has no tensors of its own, or that belongs to none of the model."""
    hint = f"without {FLAG} it is left out; a run that saves its state by parameters has it apart"
    if others:
        known = f"{', '.join(STATES)} of each tensor of the model"
        text = f"expected {known}, found {len(others)} of another form, such as buffers of many parameters"
        yield Problem("unsupported", text, label, others[0].name, hint)


def _notes(label: str, file: TensorFile) -> Iterator[str]:
    held = file.metadata.get("optimizer")
    if isinstance(held, Mapping) and any(k in held for k in ("fp32_from_fp16_params", "fp32_from_fp16")):
        yield f"{label}: master weights in lists are left out, as no name leads to them; moments are carried"


def _groups(file: TensorFile) -> tuple[Mapping[Any, Any], list[Mapping[Any, Any]]]:
    """What an optimizer has beside its tensors, and its groups of parameters."""
    held = file.metadata.get("optimizer")
    inner = held.get("optimizer", held) if isinstance(held, Mapping) else {}
    inner = inner if isinstance(inner, Mapping) else {}
    found = inner.get("param_groups")
    groups = [g for g in found if isinstance(g, Mapping)] if isinstance(found, list) else []
    return inner, groups


def _told(file: TensorFile) -> dict[str, Any]:
    """How many steps were made, and the numbers of the groups."""
    inner, groups = _groups(file)
    if not groups:
        return {}
    states = inner.get("state")
    kept = (
        [s.get("step") for s in states.values() if isinstance(s, Mapping)]
        if isinstance(states, Mapping)
        else []
    )
    kept += [g.get("step") for g in groups]
    counted = {
        int(x) for x in (*kept, *_counts(file)) if isinstance(x, int | float) and _plain(x) is not None
    }
    made = [
        {str(k): _plain(v) for k, v in g.items() if k != "params" and _plain(v) is not None} for g in groups
    ]
    return {**({"step": counted.pop()} if len(counted) == 1 else {}), "groups": made}


def _counts(file: TensorFile) -> Iterator[float]:
    """The numbers of steps that are tensors, as torch keeps them."""
    for t in file.tensors.values():
        if _STEP.fullmatch(t.name) and t.dtype == "F32" and t.numel == 1:
            buffer = bytearray(4)
            file.read_into(t.name, 0, memoryview(buffer))
            yield from struct.unpack("<f", buffer)


def _plain(value: object) -> Any:
    """`value` where JSON has it, else None."""
    if isinstance(value, list | tuple):
        return None if any(_plain(x) is None for x in value) else list(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if type(value) in _PLAIN else None


def _numbered(label: str, file: TensorFile, plan: Plan) -> dict[tuple[str, str], TensorInfo]:
    """The states of a rank's parameters by state and name; see the module docstring."""
    used = {p.name for s in plan.steps for p in s.sources if p.file == label}
    model = [t for t in file.tensors.values() if t.name in used]
    order = [[t for t in model if _decays(t)], [t for t in model if not _decays(t)]]
    _, groups = _groups(file)
    numbers = [g["params"] for g in groups if isinstance(g.get("params"), list) and g["params"]]
    if len(numbers) == 1:
        order = [[*model]]
    elif not order[1]:
        order = order[:1]
    if any(type(n) is not int for own in numbers for n in own):
        fail("unsupported", "expected numbers of parameters, found others", file=label,
             where="optimizer.param_groups", hint=_WITHOUT)  # fmt: skip
    if [len(o) for o in order] != [len(n) for n in numbers]:
        counts = " and ".join(str(len(n)) for n in numbers) or "none"
        wanted = " and ".join(str(len(o)) for o in order)
        text = f"expected groups of {wanted} parameters (those that decay, and the others), found {counts}"
        fail("unsupported", text, file=label, where="optimizer.param_groups",
             hint=_WITHOUT)  # fmt: skip
    names = {
        n: t for own, tensors in zip(numbers, order, strict=True) for n, t in zip(own, tensors, strict=True)
    }
    found: dict[tuple[str, str], TensorInfo] = {}
    for state in file.tensors.values():
        if (known := _NUMBERED.fullmatch(state.name)) is None:
            continue
        of = names.get(int(known["n"]))
        if of is None or of.shape != state.shape:
            what = "no such parameter" if of is None else f"{list(of.shape)} of {of.name}"
            text = f"expected the shape of parameter {known['n']}, found {list(state.shape)}, and {what}"
            fail("shape-mismatch", text, file=label, where=state.name)
        found[known["state"], of.name] = state
    return found


def _decays(t: TensorInfo) -> bool:
    return len(t.shape) > 1 and not t.name.endswith(".bias")


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
    carried = {(p.file, p.name) for s in steps for p in s.sources}
    return replace(
        plan,
        steps=Steps([*plan.steps, *steps]),
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
        if step.compare and all(i is None for i in infos):
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


# --- to a torch_dist folder ---------------------------------------------------------------------------------


def _back(plan: Plan, checkpoint: Checkpoint) -> Plan:
    if not all(f.format == "dcp" for f in plan.outputs):
        text = "expected a torch_dist folder to write, found another form, which numbers the parameters"
        hint = (
            f"--form torch_dist writes one where the family has it; without {FLAG} the model alone is written"
        )
        fail("unsupported", text, where=FLAG, hint=hint)
    held = _held(plan, checkpoint)
    steps: list[Step] = []
    files: list[OutputFile] = []
    for state in (s for s in STATES if s in held):
        own = {
            (p.file, p.name): held[state][p.name]
            for s in plan.steps
            for p in s.sources
            if p.name in held[state]
        }
        made = _cloned(plan.steps, own, state)
        homes = {
            f.name: megatron_dist.data_file(len(plan.outputs) + len(files) + k)
            for k, f in enumerate(plan.outputs)
        }
        files += [_of_state(f, homes[f.name], state, made) for f in plan.outputs]
        steps += [_moved(s, state, homes) for s in made]
    files = [f for f in files if f.tensors]
    outputs = (*plan.outputs, *files)
    listed = list(megatron_dist.contents(list(outputs)))
    again = {d.name for d in listed}
    return replace(
        plan,
        steps=Steps([*plan.steps, *steps]),
        outputs=outputs,
        documents=(*(d for d in plan.documents if d.name not in again), *listed),
        notes=(*plan.notes, *_left_to_the_run([s for s in STATES if s in held])),
        asked={**plan.asked, "with_optimizer": True},
    )


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


def _left_to_the_run(states: Sequence[str]) -> Iterator[str]:
    yield f"{', '.join(states)} of the optimizer are carried along"
    yield f"the steps and groups of {DOCUMENT} are not written: Megatron takes them from its own run"


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
