"""The Hugging Face layout's reading as an ONNX graph, by torch.onnx.export (dynamo): tensors keep the names
and shapes of the checkpoint, so that they can be compared bit by bit.

Source: torch 2.13.0 (torch.onnx, ONNXProgram), onnx 1.23.2 (ExternalData.md).
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ckpt_tool
import ckpt_tool.reference.phases as protocol
from ckpt_tool.checkpoint.onnx_file import open_onnx
from ckpt_tool.errors import fail
from ckpt_tool.reference.hf_blocks import of_last_token
from ckpt_tool.verify.library import ARGUMENTS, one_line
from ckpt_tool.verify.onnx_names import (
    BATCH,
    CHOICE,
    NEWEST,
    OLDEST,
    ONE_ROW,
    PAST,
    SEQUENCE,
    TASKS,
    WHOLE,
    Task,
    layer_names,
    of_words,
)
from ckpt_tool.verify.onnx_weights import Some, put_outside, without_values
from ckpt_tool.verify.prompts import padding_of
from ckpt_tool.verify.sides import BROKEN, Side

DATA = ".data"  # after the name of the graph
PRODUCER = "ckpt-tool"
EXAMPLE = {BATCH: 2, CHOICE: 3, SEQUENCE: 6, PAST: 4}  # sizes, pairwise different


@dataclass(frozen=True)
class Port:
    """An input or output: `name` in the graph, `own` as the reading calls it, the names of its free axes."""

    name: str
    own: str
    axes: Mapping[int, str]


@dataclass(frozen=True)
class Form:
    """What a graph takes and gives, in order. `kept` are the reading's names of keys and values."""

    task: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    kept: tuple[str, ...] = ()

    @property
    def kind(self) -> Task:
        return TASKS[self.task]


def for_task(side: Side, task: str) -> Side:
    """The side whose heads are those of the task: a language model's own, or those of the model alone."""
    kind = TASKS[task].kind
    own = getattr(side.config, "kind", None)
    if kind != "base_model":
        return side
    (ranks,) = side.ranks
    bare = {n: n for n in ranks if not n.startswith("cls.")}  # of readings that tell a head by its tensors
    side = replace(side, ranks=(Some(ranks, bare),))
    return side if own is None else replace(side, config=replace(side.config, kind="base_model"))


def form_of(side: Side, task: str, *, with_past: bool) -> Form:
    """`side` is as `for_task` made it. `unsupported` where its pass keeps nothing of earlier tokens."""
    kind = TASKS[task]
    kept = kept_by(side) if with_past else ()
    choices = {1: CHOICE} if task == "multiple-choice" else {}
    tokens = {0: BATCH, **choices, len(choices) + 1: SEQUENCE}
    whole = {0: BATCH, 1: WHOLE} if kept else tokens
    inputs = [Port("input_ids", "ids", tokens)]
    mask = [Port("attention_mask", "mask", whole)] if _takes(side, "mask") else []
    types = [Port("token_type_ids", "token_types", tokens)] if _takes_types(side) else []
    past = [
        Port(n, own, {0: BATCH, 2: PAST})
        for n, own in zip(layer_names(len(kept) // 2, "past_key_values"), kept, strict=True)
    ]
    inputs += [*types, *past, *mask] if kept else [*mask, *types]
    sizes = _sizes(side)
    given = {p.own: _example(p, sizes) for p in inputs if p.own not in ("ids", *kept)}
    heads = side.reading({**given, **({"past": {}} if kept else {})})
    outputs = [
        Port(name, head, {0: BATCH} if name in ONE_ROW else dict(enumerate(kind.axes)))
        for head, name in kind.heads.items()
        if head in heads and _runs(side, head)
    ]
    if not outputs:
        fail("unsupported", f"expected a head for {task}, found none in this model", where="--task")
    present = zip(layer_names(len(kept) // 2, "present"), kept, strict=True)
    outputs += [Port(n, own, {0: BATCH, 2: WHOLE}) for n, own in present]
    return Form(task, tuple(inputs), tuple(outputs), kept)


def _takes(side: Side, name: str) -> bool:
    return name in side.takes({name: torch.ones(1, 1, dtype=torch.long)})


def _takes_types(side: Side) -> bool:
    return "token_types" in side.inputs and side.raw.get("type_vocab_size") not in (0, 1)


@contextmanager
def computed() -> Iterator[None]:
    """Around passes of tensors that a user has: `missing-tensor` for one that is not there, `unsupported`
    where they do not fit each other."""
    try:
        yield
    except KeyError as error:
        hint = "`ckpt-tool inspect` shows what is there; config.json may say another class, or no tie"
        fail("missing-tensor", "expected this tensor, found none", where=str(error.args[0]), hint=hint)
    except BROKEN as error:
        text = "expected tensors that are computed as config.json says, found others"
        fail("unsupported", f"{text} ({one_line(error)})", file="config.json")


def kept_by(side: Side) -> tuple[str, ...]:
    """The names of keys and values that a pass keeps, layer by layer; `unsupported` where it keeps none, or
    other things."""
    return tuple(kept_shapes(side))


@computed()
def kept_shapes(side: Side) -> dict[str, tuple[int, ...]]:
    """By these names (batch, heads, tokens, width), of one token."""
    past: dict[str, Tensor] = {}
    if "past" in side.takes({"past": past}):
        with torch.inference_mode(), side.keep():
            protocol.trunk(list(side.reading({"past": past}).values()), torch.zeros(1, 1, dtype=torch.long))
    if not past or len(past) % 2 or any(y.ndim != 4 for y in past.values()):
        (named, *_) = side.raw.get("architectures") or ["one that does not"]
        text = f"expected a decoder that keeps keys and values of earlier tokens, found {named}"
        fail("unsupported", text, where="--with-past", hint="leave --with-past out")
    return {name: tuple(y.shape) for name, y in past.items()}


def _runs(side: Side, head: str) -> bool:
    """Whether the tensors of a head that the class may have are there: a pooler is in some files only."""
    if head == "head":
        return True
    ids = _few(side)
    with torch.inference_mode(), computed():
        phases = side.reading()
        x = protocol.trunk(list(phases.values()), ids)
    try:
        with torch.inference_mode():
            phases[head].run(x)
    except KeyError:
        return False
    except BROKEN:
        return True  # said by the exporter, with its reason
    return True


def _few(side: Side) -> Tensor:
    """Token ids (1, T), as few as the pass takes: a table of positions may be short."""
    tokens = next((found for n in (8, 16, 64, 256) if (found := side.fits(n))), 1)
    return torch.zeros(1, tokens, dtype=torch.long)


class Reading(nn.Module):
    """A side as a module: parameters of the names of its tensors, which have no values, inputs and outputs
    in a form's order."""

    def __init__(self, side: Side, form: Form, mode: FakeTensorMode) -> None:
        super().__init__()
        self.side, self.form, self.pad = side, form, padding_of(side.raw)
        (tensors,) = side.ranks
        read = needed(side, form)
        self.names = [name for name in tensors if name in read]
        for name in self.names:
            self._put(name, without_values(read[name], mode))

    def _put(self, name: str, x: Tensor) -> None:
        *path, last = name.split(".")
        home: nn.Module = self
        for part in path:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home._modules[part] or home
        parameter = nn.Parameter(x, requires_grad=False)
        home.register_parameter(last, parameter)

    def _get(self, name: str) -> Tensor:
        found: Any = self
        for part in name.split("."):
            found = getattr(found, part)
        tensor: Tensor = found
        return tensor

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        form, side = self.form, self.side
        ranks = ({name: self._get(name) for name in self.names},)
        given: dict[str, Any] = {p.own: x for p, x in zip(form.inputs, args, strict=True)}
        ids = given.pop("ids")
        choices = ids.shape[:-1]
        if len(choices) > 1:
            ids, given = ids.flatten(0, 1), {n: x.flatten(0, 1) for n, x in given.items()}
        past = {name: given.pop(name) for name in form.kept}
        if form.kept:
            given["past"] = past
        phases = {p.name: p for p in side.module.phases(ranks, side.config, given)}
        x = protocol.trunk(list(phases.values()), ids)
        made = [p for p in form.outputs if p.own not in form.kept]
        found = [shaped(phases[p.own].run(x), form.task, ids, self.pad, choices) for p in made]
        return (*found, *(past[name] for name in form.kept))


def shaped(y: Tensor, task: str, ids: Tensor, pad: int | None, rows: Any) -> Tensor:
    """What a head gives, as the class of the library gives it: one row of classes for a sequence, one number
    for each of the choices."""
    if task == "sequence-classification" and y.ndim == 3:
        return of_last_token(y, ids, pad)
    if task == "multiple-choice":
        return y.reshape(rows)
    return y


@computed()
def needed(side: Side, form: Form) -> dict[str, Tensor]:
    """The tensors that a graph of that form is made of, as they are on the device "meta": those that a pass
    reads, and of experts all."""
    (tensors,) = side.ranks
    seen = _Seen(tensors)
    module, config = side.module, side.config
    ids = _few(side)
    with torch.inference_mode():
        phases = {p.name: p for p in module.phases((seen,), config, {})}
        x = protocol.trunk(list(phases.values()), ids)
        for port in form.outputs:
            if port.own not in form.kept:
                phases[port.own].run(x)
    experts = {name.partition(".experts.")[0] for name in seen.read if ".experts." in name}
    for name in tensors:
        if ".experts." in name and name.partition(".experts.")[0] in experts and name not in seen.read:
            seen[name]
    return seen.read


class _Seen(Some):
    def __init__(self, whole: Mapping[str, Tensor]) -> None:
        super().__init__(whole, {n: n for n in whole})
        self.read: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        found = super().__getitem__(name)
        self.read[name] = torch.empty(found.shape, dtype=found.dtype, device="meta")
        return found


def _sizes(side: Side) -> dict[str, int]:
    """The sizes of what a pass is traced with: its own where it has few tokens of fewer, since a size of 0 or
    1 stays what it is in a graph."""
    tokens = getattr(side.module, "traced_with", None)
    sequence = EXAMPLE[SEQUENCE] if tokens is None else int(tokens(side.config))
    return {**EXAMPLE, SEQUENCE: sequence, WHOLE: EXAMPLE[PAST] + sequence}


def _example(
    port: Port, sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Tensor:
    if shapes is None or port.own not in shapes:
        shape = [sizes[port.axes[k]] for k in range(len(port.axes))]
        return (
            torch.zeros(shape, dtype=torch.long)
            if port.own != "mask"
            else torch.ones(shape, dtype=torch.long)
        )
    batch, heads, _, width = shapes[port.own]
    return torch.zeros(sizes[BATCH], heads, sizes[PAST], width)


def export(side: Side, form: Form, opset: int, folder: Path, name: str) -> None:
    """Write `name` and `name`.data into `folder`: float32, which holds every value of narrower dtypes. Kind
    `unsupported` where the exporter cannot write the pass, `usage` where it writes other versions of the
    operators than `opset`."""
    if not OLDEST <= opset <= NEWEST:
        hint = f"--opset {OLDEST} is the oldest that it writes, {NEWEST} the newest"
        text = f"expected a version of the operators from {OLDEST} to {NEWEST}, found {opset}"
        fail("usage", text, where="--opset", hint=hint)
    import torch._dynamo

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module = Reading(side, form, mode).eval()
    shapes, sizes = kept_shapes(side) if form.kept else {}, _sizes(side)
    args = tuple(mode.from_tensor(_example(p, sizes, shapes), static_shapes=True) for p in form.inputs)
    axes = tuple(dict(p.axes) for p in form.inputs)
    with torch.inference_mode(False), _quiet(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        # looking shapes of symbols up in a cache costs more than working them out
        try:
            program = torch.onnx.export(
                module, args, dynamo=True, dynamic_shapes=(axes,), opset_version=opset, optimize=False,
                input_names=[p.name for p in form.inputs], output_names=[p.name for p in form.outputs],
                verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            reason = error.__cause__ or error
            text = "expected a pass that torch.onnx.export can write, found one that it cannot"
            fail("unsupported", f"{text}: {_reason(reason)}")
    assert program is not None
    (tensors,) = side.ranks
    put_outside(program.model.graph, tensors, folder / (name + DATA))
    _write(program.model, folder / name, side, form)
    with closing(open_onnx(folder / name)) as written:
        if written.opset != opset:
            text = f"expected version {opset} of the operators, found {written.opset} in what was exported"
            fail("usage", text, where="--opset", hint=f"--opset {written.opset} asks for what it writes")


def _reason(error: BaseException) -> str:
    """The first lines of what the exporter says; the rest is a trace of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(" ".join(lines[:3]))[:400] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says on the way: of packages that it does not need, of names it chose."""
    loggers = [
        logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.fx", "onnxscript", "onnx_ir")
    ]
    before = [logger.level for logger in loggers]
    nowhere = io.StringIO()  # a graph that fails is printed there, in thousands of lines
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _write(made: Any, path: Path, side: Side, form: Form) -> None:
    """Without what the exporter notes of the machine it ran on (paths of sources, node by node), and with the
    names of the axes and what the graph is. `made` is of onnx_ir."""
    import onnx
    import onnx_ir

    model = onnx_ir.to_proto(made)
    for graph in (model.graph, *model.functions):
        del graph.metadata_props[:]
        graph.doc_string = ""
        del graph.value_info[:]  # any runtime infers them
        for part in (*graph.node, *getattr(graph, "initializer", ())):
            del part.metadata_props[:]
            part.doc_string = ""
    del model.metadata_props[:]
    model.producer_name, model.producer_version = PRODUCER, ckpt_tool.__version__
    ports = {p.name: p for p in (*form.inputs, *form.outputs)}
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
        for axis, dim in ports[value.name].axes.items():
            value.type.tensor_type.shape.dim[axis].dim_param = dim
    told = {
        "architecture": (side.raw.get("architectures") or [""])[0],
        "model_type": side.raw.get("model_type"),
        "task": form.task,
        "past": "yes" if form.kept else "no",
    }
    for key, value in told.items():
        model.metadata_props.add(key=f"ckpt-tool.{key}", value=str(value))
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path)


def heads_left_out(side: Side, form: Form) -> list[str]:
    """Heads of the model that the task has no output for."""
    given = {p.own for p in form.outputs}
    return [] if not of_words(form.kind.kind) else [h for h in side.heads() if h not in given]


__all__ = [
    "ARGUMENTS",
    "DATA",
    "PRODUCER",
    "Form",
    "Port",
    "Reading",
    "computed",
    "export",
    "for_task",
    "form_of",
    "heads_left_out",
    "kept_by",
    "kept_shapes",
]
