"""Megatron-Core's checkpoints of torch.distributed hold one tensor for all layers, and of experts one for all
of a layer: read as one for each layer and expert, under the names that the ranks' own files have.

    decoder.layers.mlp.linear_fc2.weight [L, d, f]                  decoder.layers.{i}.mlp.linear_fc2.weight
    encoder.layers.mlp.linear_fc2.weight [L, d, f]  (BERT)          encoder.layers.{i}.mlp.linear_fc2.weight
    decoder.layers.mlp.experts.experts.linear_fc2.weight [L, E, d, f]
                                       decoder.layers.{i}.mlp.experts.local_experts.{e}.linear_fc2.weight

In the ranks' own files grouped experts (GroupedMLP, up to core_v0.16) are two tensors of a layer, whose bytes
are one expert after the other, whatever the shapes say:

    decoder.layers.{i}.mlp.experts.weight1 [d, E 2 f]  E times [d, 2 f], as local_experts.{e}.weight1
    decoder.layers.{i}.mlp.experts.weight2 [E f, d]    E times [f, d], as local_experts.{e}.weight2

Source: NVIDIA/Megatron-LM core_v0.9.0 to core_v0.19.2 (core/transformer/transformer_block.py,
moe/experts.py: sharded_state_dict; GroupedMLP.forward).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, Renamed, TensorFile, TensorInfo
from ckpt_tool.checkpoint.megatron import placed
from ckpt_tool.convert.one_by_one import Share, Shares
from ckpt_tool.errors import Problem, fail_all

FORMAT = "dcp"
MOST = 1 << 17  # layers, or experts in all layers
# With a number after `layers`, or without one where the first axis counts them.
_LAYERS = re.compile(r"(?P<before>(?:\w+\.)*(?:de|en)coder\.layers\.)(?!\d)(?P<rest>.+)", re.ASCII)
_EXPERTS = re.compile(r"(?P<before>.*\.mlp\.experts\.)experts\.(?P<rest>linear_fc[12]\..+)", re.ASCII)
_CORE = re.compile(r"(?:de|en)coder\.layers\.(\d+\.)?self_attention\.linear_qkv\.", re.ASCII)
# Of `singleton_local_shards`, whose gates and ups are apart.
_UNITS = re.compile(r"(?P<before>.*linear_fc1\.)weight_(?P<which>[wv])", re.ASCII)
_WHICH = {"w": "gate.weight", "v": "up.weight"}
# Of `singleton_local_shards`, whose experts are numbered and tensors of their own.
_ALONE = re.compile(r"(?P<before>.*\.mlp\.experts\.)experts\.(?P<rest>\d+\.linear_fc[12]\..+)", re.ASCII)
_JOINED = re.compile(
    r"(?P<before>(?:\w+\.)*decoder\.layers\.\d+\.mlp\.)experts\.(?P<which>weight[12])", re.ASCII
)
_WORDS = ("coder.layers.", ".mlp.experts.", "linear_fc1.")  # one of them is in every name that matters
READ_JOINED = "weight1 and weight2 of grouped experts are read as one of each for every expert"
_OWN_LAYER = re.compile(r"(?P<before>(?:\w+\.)*decoder\.layers\.)(?P<i>\d+)\.(?P<rest>.+)", re.ASCII)
_OWN_EXPERT = re.compile(
    r"(?P<before>.*\.mlp\.experts\.)local_experts\.(?P<e>\d+)\.(?P<rest>linear_fc[12]\..+)", re.ASCII
)
_OWN_UNITS = re.compile(r"(?P<before>.*linear_fc1\.)(?P<which>gate|up)\.weight", re.ASCII)
READING = "a tensor of Megatron-Core's that holds all layers is read as one for each"
READ_APART = "linear_fc1.weight_w and weight_v are read as linear_fc1.gate.weight and linear_fc1.up.weight"


class NumberedLayers(Shares):
    """A view of a folder in which layers are apart."""


def of_megatron(names: Iterable[str]) -> bool:
    """Whether these are names of Megatron-Core's, whose numbers are in its arguments."""
    return any(_CORE.search(name) for name in names)


def layers_apart(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, or a view of it in which each layer and each expert has tensors of its own. Fails with
    `shape-mismatch` for a tensor without these axes, or with another number of layers than others have."""
    files: dict[str, TensorFile] = {}
    problems: list[Problem] = []
    readings: dict[str, None] = {}
    for name, file in checkpoint.files.items():
        files[name] = file
        names = "\n".join(file.tensors)
        if not any(word in names for word in _WORDS):
            continue
        if file.format != FORMAT:
            if any(map(_JOINED.fullmatch, file.tensors)):
                files[name], readings[READ_JOINED] = _experts_apart(file, checkpoint, problems), None
            continue
        if any(_UNITS.fullmatch(n) or _ALONE.fullmatch(n) for n in file.tensors):
            file, readings[READ_APART] = Renamed(file, {_units(n): n for n in file.tensors}), None
            files[name] = file
        if not any(map(_is_stacked, file.tensors)):
            continue
        readings[READING] = None
        lengths = {t.shape[:1] for t in file.tensors.values() if _LAYERS.fullmatch(t.name)}
        short = next((t for t in file.tensors.values() if _is_stacked(t.name) and not _fits(t)), None)
        if short is not None or len(lengths) > 1:
            found = f"shape {list(short.shape)}" if short else f"{sorted(n for n, *_ in lengths)} layers"
            message = f"expected an axis for layers, as long in every tensor, found {found}"
            where = None if short is None else short.name
            problems.append(Problem("shape-mismatch", message, name, where))
            continue
        files[name] = NumberedLayers(
            file, {s.info.name: s for t in file.tensors.values() for s in _numbered(t)}
        )
    fail_all(problems)
    if not readings:
        return checkpoint
    return replace(checkpoint, files=files, readings=(*checkpoint.readings, *readings))


def _units(name: str) -> str:
    if (alone := _ALONE.fullmatch(name)) is not None:
        name = f"{alone['before']}local_experts.{alone['rest']}"
    found = _UNITS.fullmatch(name)
    return name if found is None else found["before"] + _WHICH[found["which"]]


def _experts_apart(file: TensorFile, checkpoint: Checkpoint, problems: list[Problem]) -> TensorFile:
    """A rank's grouped experts, of which it has as many as the router has rows for each expert-parallel
    rank."""
    shares: dict[str, Share] = {}
    parallel = placed(checkpoint).experts
    for tensor in file.tensors.values():
        found = _JOINED.fullmatch(tensor.name)
        if found is None:
            shares[tensor.name] = Share(tensor, tensor.name, 0)
            continue
        router = file.tensors.get(f"{found['before']}router.weight")
        experts = router.shape[0] // parallel if router is not None and router.shape else 0
        axis = 1 if found["which"] == "weight1" else 0
        if not 0 < experts <= MOST or len(tensor.shape) != 2 or tensor.shape[axis] % experts:
            message = f"expected shares of {experts} experts in dimension {axis}, found shape"
            problems.append(Problem("shape-mismatch", f"{message} {tensor.shape}", file.name, tensor.name))
            continue
        shape = tuple(n // experts if k == axis else n for k, n in enumerate(tensor.shape))
        size = prod(shape) * DTYPES[tensor.dtype].itemsize
        for e in range(experts):
            called = f"{found['before']}experts.local_experts.{e}.{found['which']}"
            shares[called] = Share(
                TensorInfo(called, tensor.dtype, shape, tensor.file), tensor.name, e * size
            )
    return NumberedLayers(file, shares)


def _is_stacked(name: str) -> bool:
    return bool(_LAYERS.fullmatch(name) or _EXPERTS.fullmatch(name))


def _fits(tensor: TensorInfo) -> bool:
    axes = bool(_LAYERS.fullmatch(tensor.name)) + bool(_EXPERTS.fullmatch(tensor.name))
    if prod(tensor.shape[:axes]) > MOST:
        return False
    return len(tensor.shape) > axes or (len(tensor.shape) == axes and not _EXPERTS.fullmatch(tensor.name))


def _numbered(tensor: TensorInfo) -> Iterator[Share]:
    """The tensor itself, or its parts: a layer's are one run of its bytes, and an expert's of those."""
    if not _is_stacked(tensor.name) or not _fits(tensor):
        yield Share(tensor, tensor.name, 0)
        return
    layers = _LAYERS.fullmatch(tensor.name)
    names = [tensor.name] if layers is None else [
        f"{layers['before']}{i}.{layers['rest']}" for i in range(tensor.shape[0])
    ]  # fmt: skip
    shape = tensor.shape if layers is None else tensor.shape[1:]
    size = prod(shape) * DTYPES[tensor.dtype].itemsize
    for i, name in enumerate(names):
        experts = _EXPERTS.fullmatch(name)
        if experts is None:
            yield Share(TensorInfo(name, tensor.dtype, shape, tensor.file), tensor.name, i * size)
            continue
        own = size // max(shape[0], 1)
        for e in range(shape[0]):
            called = f"{experts['before']}local_experts.{e}.{experts['rest']}"
            info = TensorInfo(called, tensor.dtype, shape[1:], tensor.file)
            yield Share(info, tensor.name, i * size + e * own)


def key_of(name: str, *, stacked: bool, alone: bool = False) -> tuple[str, tuple[int, ...]]:
    """The way back of `layers_apart`: what the tensor that holds the one called `name` is called in a folder,
    and which it is along each of the axes before its own. `stacked`: one holds all layers; else each has its
    own, and only experts are together, or, `alone`, each of these has its own, too."""
    if (units := _OWN_UNITS.fullmatch(name)) is not None:
        name = f"{units['before']}weight_{'w' if units['which'] == 'gate' else 'v'}"
    index: tuple[int, ...] = ()
    if (expert := _OWN_EXPERT.fullmatch(name)) is not None:
        number = f"{expert['e']}." if alone else ""
        name = f"{expert['before']}experts.{number}{expert['rest']}"
        index = () if alone else (int(expert["e"]),)
    if stacked and (layer := _OWN_LAYER.fullmatch(name)) is not None:
        name, index = layer["before"] + layer["rest"], (int(layer["i"]), *index)
    return name, index
