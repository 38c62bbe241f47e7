"""Mistakes planted in an ONNX graph, which the comparison must catch: in its weights, in numbers of its
operators, and in what it is given.

Weights are exchanged without loading the graph again: those that are to be changed become inputs, which have
the weights as defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.checkpoint.onnx_file import OnnxFile
from ckpt_tool.checkpoint.tensor_names import fold_key, short
from ckpt_tool.verify.onnx_runs import Case, Graph, Interface, altered_graph, opened_graph

Array = np.ndarray
MOST = 24  # weights that are altered
LARGEST = 64 << 20  # numbers of one that is: a copy of it is held
SMALLEST = 8  # numbers of a vector that is no constant of an operator
RELOADED = 256 << 20  # bytes of weights up to which the graph is loaded again for mistakes in its operators
OTHER_COMPARISON = {
    "Greater": "GreaterOrEqual",
    "GreaterOrEqual": "Greater",
    "Less": "LessOrEqual",
    "LessOrEqual": "Less",
}


@dataclass(frozen=True)
class Mistake:
    """`graph` gives the wrong one; `cases` makes the wrong prompts where that is the mistake."""

    name: str
    graph: Callable[[], Graph]
    case: Callable[[Case], Case] = lambda case: case


def mistakes(
    file: OnnxFile, interface: Interface, sizes: tuple[int, int] | None, without: str | tuple[str, ...]
) -> Iterator[Mistake]:
    """Those of weights, but for names with an end of `without`, of operators where the graph is small enough
    to be loaded again, and of inputs. One graph is open at a time where each is forgotten before the next is
    asked for."""
    yield from _of_weights(file, interface, sizes, without)
    if sum(t.nbytes for t in file.tensors.values()) <= RELOADED:
        for name, change in _operators(file):
            model = _copy(file)
            change(model)
            yield Mistake(name, lambda model=model: altered_graph(model, file, interface, sizes))  # type: ignore[misc]
    right = lambda: opened_graph(file, interface, sizes)  # noqa: E731
    if "mask" in interface.inputs:
        yield Mistake("attention_mask not read", right, lambda c: replace(c, mask=torch.ones_like(c.mask)))
    if "token_types" in interface.inputs:
        yield Mistake("token_type_ids not read", right, lambda c: replace(c, token_types=None))


def _of_weights(
    file: OnnxFile, interface: Interface, sizes: tuple[int, int] | None, without: str | tuple[str, ...]
) -> Iterator[Mistake]:
    chosen = [t for t in _chosen(file) if not (without and t.name.endswith(without))]
    if chosen:
        graph = altered_graph(_with_inputs(file, chosen), file, interface, sizes)
        for name, feeds in _weights(file, chosen):
            yield Mistake(name, lambda feeds=feeds: replace(graph, more=feeds()))  # type: ignore[misc]


def _copy(file: OnnxFile) -> Any:
    made = type(file.model)()
    made.CopyFrom(file.model)
    return made


# --- weights ----------------------------------------------------------------------------------------------


def _chosen(file: OnnxFile) -> list[TensorInfo]:
    """Of each kind of weight one, of the first layer that has it, as many as are planted at most."""
    kinds: dict[tuple[Any, ...], TensorInfo] = {}
    for t in file.tensors.values():
        size = t.numel
        if t.dtype in ("F32", "F64", "F16") and SMALLEST <= size <= LARGEST and len(t.shape) in (1, 2):
            # weights without a name of their own (val_12) are told by their shape
            key = fold_key(t.name) if "." in t.name else (fold_key(t.name), t.shape)
            kinds.setdefault((key, len(t.shape)), t)
    return list(kinds.values())[:MOST]


def _with_inputs(file: OnnxFile, chosen: Iterable[TensorInfo]) -> Any:
    from onnx import helper

    model = _copy(file)
    types = {t.name: t.data_type for t in model.graph.initializer}
    listed = {v.name for v in model.graph.input}
    for t in chosen:
        if t.name not in listed:
            model.graph.input.append(helper.make_tensor_value_info(t.name, types[t.name], t.shape))
    return model


def _weights(
    file: OnnxFile, chosen: list[TensorInfo]
) -> Iterator[tuple[str, Callable[[], dict[str, Array]]]]:
    """Words, and the weights to be given."""
    for t in chosen:
        read = lambda t=t: values(file, t)  # noqa: E731
        if len(t.shape) == 1:
            yield f"{short(t.name)}: one weight 1 % off", lambda t=t, read=read: {t.name: _off(read())}  # type: ignore[misc]
            continue
        if min(t.shape) > 1:  # a single row is what it was
            yield f"{short(t.name)} transposed", lambda t=t, read=read: {t.name: _turned(read())}  # type: ignore[misc]
        yield f"{short(t.name)} left at zero", lambda t=t, read=read: {t.name: np.zeros_like(read())}  # type: ignore[misc]
    matrices = [t for t in chosen if len(t.shape) == 2]
    for a, b in _pairs(matrices):
        words = f"{short(a.name)} and {short(b.name)} exchanged"
        yield words, lambda a=a, b=b: {a.name: values(file, b), b.name: values(file, a)}  # type: ignore[misc]
    if matrices:
        table = max(matrices, key=lambda t: t.numel)
        words = f"{short(table.name)}: rows shifted by one"
        yield words, lambda: {table.name: np.roll(values(file, table), 1, 0)}


def values(file: OnnxFile, t: TensorInfo) -> Array:
    dtype = {"F32": "<f4", "F64": "<f8", "F16": "<f2"}[t.dtype]
    made = np.empty(t.shape, dtype)
    file.read_into(t.name, 0, made.reshape(-1).view(np.uint8).data)
    return made


def _off(x: Array) -> Array:
    made = x.copy()
    made[np.abs(made).argmax()] *= 1.01
    return made


def _turned(x: Array) -> Array:
    return np.ascontiguousarray(x.T.reshape(x.shape))


def _pairs(tensors: list[TensorInfo]) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    """Neighbours of one shape."""
    by_shape: dict[tuple[int, ...], list[TensorInfo]] = {}
    for t in tensors:
        by_shape.setdefault(t.shape, []).append(t)
    for alike in by_shape.values():
        yield from zip(alike[:3], alike[1:3], strict=False)


# --- operators --------------------------------------------------------------------------------------------


def _operators(file: OnnxFile) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Words, and what changes a model: all operators of a kind at once."""
    kinds = {node.op_type for node in file.model.graph.node}
    if "Gelu" in kinds:
        yield "gelu of the other form", _other_gelu
    if kinds & {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}:
        yield "epsilon ten times as large", _larger_epsilon
    elif any(_is_epsilon(t) for t in _constants(file.model)):
        yield "epsilon ten times as large", _larger_constants
    for kind in sorted(kinds & OTHER_COMPARISON.keys()):
        yield f"{kind} in the place of {OTHER_COMPARISON[kind]}", _renamed(kind, OTHER_COMPARISON[kind])
    if "Trilu" in kinds:
        yield "the triangle of later tokens one token off", _other_triangle


def _attribute(node: Any, name: str) -> Any:
    return next((a for a in node.attribute if a.name == name), None)


def _other_gelu(model: Any) -> None:
    from onnx import helper

    for node in model.graph.node:
        if node.op_type == "Gelu":
            found = _attribute(node, "approximate")
            if found is None:
                node.attribute.append(helper.make_attribute("approximate", "tanh"))
            else:
                found.s = b"none" if found.s == b"tanh" else b"tanh"


def _larger_epsilon(model: Any) -> None:
    from onnx import helper

    for node in model.graph.node:
        if node.op_type.endswith("Normalization"):
            found = _attribute(node, "epsilon")
            if found is None:
                node.attribute.append(helper.make_attribute("epsilon", 1e-4))
            else:
                found.f *= 10


def _constants(model: Any) -> Iterator[Any]:
    """Tensors that the graph itself holds: of constants, and small initializers."""
    yield from model.graph.initializer
    for node in model.graph.node:
        if node.op_type == "Constant" and (found := _attribute(node, "value")) is not None:
            yield found.t


def _is_epsilon(t: Any) -> bool:
    from onnx import numpy_helper

    if t.data_location == 1 or t.data_type not in (1, 11) or math.prod(t.dims) != 1:
        return False
    return 0 < float(numpy_helper.to_array(t).reshape(())) < 1e-3


def _larger_constants(model: Any) -> None:
    from onnx import numpy_helper

    for t in _constants(model):
        if _is_epsilon(t):
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t) * np.float32(10), t.name))


def _renamed(kind: str, other: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for node in model.graph.node:
            if node.op_type == kind:
                node.op_type = other

    return change


def _other_triangle(model: Any) -> None:
    """Its diagonal is an input; one is added to it, or given."""
    from onnx import helper

    one, made = "ckpt-tool one", []
    nodes = list(model.graph.node)
    model.graph.initializer.append(helper.make_tensor(one, 7, [], [1]))
    for k, node in enumerate(nodes):
        if node.op_type == "Trilu":
            if len(node.input) > 1 and node.input[1]:
                moved = f"ckpt-tool diagonal {k}"
                made.append(helper.make_node("Add", [node.input[1], one], [moved]))
                node.input[1] = moved
            else:
                del node.input[1:]
                node.input.append(one)
        made.append(node)
    del model.graph.node[:]
    model.graph.node.extend(made)
