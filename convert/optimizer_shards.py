"""States in a torch_dist folder that lie in buckets of each model-parallel rank (`dp_reshardable`, in older
releases `fully_sharded_bucket_space`), and where in them each tensor of the model lies.

    [chained_{c}.]optimizer.distributed.dp_group_idx_{g}.gbuf_idx_{b}.dtype_{dtype}.bucket_idx_{k}.{state}

g counts the model-parallel ranks: tensor-parallel ones first, then stages, and of experts (c = 1) the
expert-parallel ones between these; b the virtual stages. A rank holds its shares of tensors, as the pieces of
the model in the folder are cut, in the reverse order of its modules; a parameter begins at the next multiple
of 64 in its bucket, in older releases at once. No padding follows the last one of a bucket, but for that to
64.

No entry says the order of the modules, nor which layers a stage has. The orders are those of layers with and
without Transformer Engine, whose buckets differ; layers are dealt out as the lengths of buckets allow. What
fits is proved as in optimizer_buffers.py: the float32 weights of every tensor, rounded, are the model's.

Source: NVIDIA/Megatron-LM core_v0.9.0 to core_v0.16.1 (core/optimizer/__init__.py, distrib_optimizer.py:
sharded_param_state_dp_reshardable; core/distributed/param_and_grad_buffer.py; transformer_layer.py,
attention.py, mlp.py, moe/experts.py), Transformer Engine 2 (module/layernorm_linear.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from itertools import product
from math import prod
from typing import NoReturn

import numpy as np

from ckpt_tool.checkpoint.base import Checkpoint, Renamed, TensorFile, TensorInfo, stored
from ckpt_tool.checkpoint.dcp import DcpFile
from ckpt_tool.checkpoint.sliced import Pieced, joined_of, part_of
from ckpt_tool.convert.one_by_one import Shares
from ckpt_tool.convert.optimizer_buffers import (
    ALIGNED,
    HINT,
    MASTER,
    STATES,
    WAYS,
    Alike,
    Buffer,
    State,
    agree,
    buffer_of,
)
from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass

BLOCK = 1 << 20  # bytes of copies that are compared at a time
_BUCKET = re.compile(
    r"(?P<chain>chained_\d{1,3}\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d{1,6})"
    r"\.gbuf_idx_(?P<buffer>\d{1,3})\.dtype_(?P<dtype>\(torch\.\w+, torch\.\w+\)|torch\.\w+)"
    r"\.bucket_idx_(?P<bucket>\d{1,6})\.(?P<state>param|exp_avg|exp_avg_sq)",
    re.ASCII,
)
_IN_BUCKETS = " (buckets)"
_SAID = "{chain}optimizer.distributed.dp_group_idx_0.optimizer/shard_0_1"
_LAYER = re.compile(r"(?:\w+\.)*decoder\.layers\.(?P<i>\d{1,6})\.(?P<rest>.+)", re.ASCII)
_OUTSIDE = re.compile(
    r"(?:\w+\.)*(?P<rest>embedding\..+|decoder\.final_layernorm\..+|output_layer\..+)", re.ASCII
)
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(?P<e>\d{1,6})\.(?P<rest>.+)", re.ASCII)
_UNITS = re.compile(r"(?P<before>.*linear_fc1\.)(gate|up)\.weight", re.ASCII)
WORDS = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"

_IN = ("input_layernorm.weight", "input_layernorm.bias")
_NORM = ("self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.layer_norm_bias")
_OUT = ("self_attention.linear_proj.weight", "self_attention.linear_proj.bias")
_QKV = tuple(
    f"self_attention.{name}.{kind}"
    for name in ("linear_qkv", "q_layernorm", "k_layernorm")
    for kind in ("weight", "bias")
)
_MLP = (
    *("pre_mlp_layernorm.weight", "pre_mlp_layernorm.bias"),
    *("mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.layer_norm_bias"),
    *("mlp.linear_fc1.weight", "mlp.linear_fc1.bias", "mlp.linear_fc2.weight", "mlp.linear_fc2.bias"),
    *("mlp.router.weight", "mlp.router.bias", "mlp.experts"),
)
# Of a layer, without Transformer Engine, whose norm is a module before the attention, and with it.
ORDERS = ((*_IN, *_NORM, *_OUT, *_QKV, *_MLP), (*_IN, *_OUT, *_NORM, *_QKV, *_MLP))
_FIRST = (WORDS, "embedding.position_embeddings.weight")
_LAST = ("decoder.final_layernorm.weight", "decoder.final_layernorm.bias", OUTPUT, "output_layer.bias")
_OF_EXPERT = ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias")

Cut = tuple[str, int]  # a tensor, and which of its cuts
Place = tuple[Mapping[str, str], int]  # a bucket, as the names of its tensors by state, and the first element


def label_of(folder: str) -> str:
    """What the states in the buckets of a folder are called as a file."""
    return folder + _IN_BUCKETS


def folder_of(label: str) -> str | None:
    """The way back; None for another file."""
    return label.removesuffix(_IN_BUCKETS) if label.endswith(_IN_BUCKETS) else None


def is_bucket(name: str) -> bool:
    return _BUCKET.fullmatch(name) is not None


def states_in_buckets(
    file: TensorFile, checkpoint: Checkpoint, model: Sequence[TensorInfo], seen: Alike
) -> Iterator[State]:
    """The states in the buckets of a folder, `file`; `model` are the tensors that are converted. Kinds:
    `unsupported`, `unproved`, `shard-conflict` where copies differ."""
    if odd := [t for t in model if t.dtype not in ("F32", "F16", "BF16")]:
        _refuse(file, odd[0].name, "parameters in 16 or 32 bits", odd[0].dtype)
    ranks = _ranks(file)
    parameters = Parameters(model, file)
    found: list[Places] = []
    for way in _ways(parameters):
        found += [places for places in _placed(ranks, parameters, way) if places not in found]
    proved: list[Placement] = []
    wrong = None
    for p in (Placement(parameters, places, file) for places in found):
        failed = next((t for t in model if not p.holds(checkpoint, t, seen)), None)
        wrong = wrong or failed
        proved += [p] if failed is None else []
    if len(proved) != 1:
        _unproved(file, len(found), wrong, several=len(proved) > 1)
    for t in model:
        proved[0].compare(t)
        for state, held in STATES.items():
            if state != "fp32_param" or t.dtype != "F32":  # else it is the weight itself
                name = proved[0].name(t, held)
                yield (state, t.name), TensorInfo(name, "F32", t.shape, label_of(file.name))


def _unproved(file: TensorFile, fitting: int, wrong: TensorInfo | None, *, several: bool) -> NoReturn:
    expected = "buckets of the lengths that its parameters have in an order of Megatron's"
    found = "others"
    if several:
        expected, found = "one place for each parameter where its float32 weights are", "more than one"
    elif fitting and wrong is not None:
        expected = f"weights in float32 that rounded to {wrong.dtype} are {wrong.name}"
        found = "others where they may be"
    hint = f"nothing else tells where a parameter lies in them, so its state is not carried; {HINT}"
    fail("unproved", f"expected {expected}, found {found}", file=file.name, where="dp_group_idx_0", hint=hint)


def _refuse(file: TensorFile, where: str | None, expected: str, found: str) -> NoReturn:
    fail("unsupported", f"expected {expected}, found {found}", file=file.name, where=where, hint=HINT)


def said(file: TensorFile) -> object:
    """What the optimizer of the first rank says of its groups: a list, of a run that has several."""
    folder = stored(file)
    assert isinstance(folder, DcpFile)
    chains = sorted({m["chain"] or "" for m in map(_BUCKET.fullmatch, file.tensors) if m})
    held = [folder.entry(_SAID.format(chain=chain)) for chain in chains]
    inner = [x[0] if isinstance(x, list) and len(x) == 1 else x for x in held]
    return inner[0] if chains == [""] else inner


# --- what there is ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """The buffers of each model-parallel rank, one for each virtual stage; of `experts` those of a second
    optimizer."""

    dense: tuple[tuple[Buffer, ...], ...]
    experts: tuple[tuple[Buffer, ...], ...]


def _ranks(file: TensorFile) -> Ranks:
    found: dict[str, dict[tuple[int, int], dict[int, dict[str, str]]]] = {}
    for name in file.tensors:
        if (m := _BUCKET.fullmatch(name)) is not None:
            own = found.setdefault(m["chain"] or "", {})
            bucket = own.setdefault((int(m["group"]), int(m["buffer"])), {}).setdefault(int(m["bucket"]), {})
            if bucket.setdefault(m["state"], name) != name:
                _refuse(file, name, "parameters of one dtype in a buffer", "another in it")
    if sorted(found) not in ([""], ["chained_0."], ["chained_0.", "chained_1."]):
        _refuse(file, None, "an optimizer, and one of experts", f"{len(found)}")
    made = []
    for own in found.values():
        groups, buffers = (1 + max(key[k] for key in own) for k in (0, 1))
        if len(own) != groups * buffers:
            _refuse(file, None, f"buffers of {groups} ranks with {buffers} each", f"{len(own)}")
        exact = {"per_bucket_numel_unpadded": True}
        made.append(
            tuple(
                tuple(
                    buffer_of(file, f"dp_group_idx_{g}.gbuf_idx_{b}", "any", own[g, b], exact, None)
                    for b in range(buffers)
                )
                for g in range(groups)
            )
        )
    by_chain = dict(zip(found, made, strict=True))
    return Ranks(by_chain.get("") or by_chain["chained_0."], by_chain.get("chained_1.", ()))


class Parameters:
    """The tensors of a model, how they are cut, and what is one parameter of a rank."""

    def __init__(self, model: Sequence[TensorInfo], file: TensorFile) -> None:
        self.file = file
        self.tensors = {t.name: t for t in model}
        self._boxes: dict[str, dict[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]] = {}
        self.cuts = {t.name: self._cut(t) for t in model}
        self.outside: dict[str, list[str]] = {}
        self.layers: dict[int, dict[str, list[str]]] = {}
        self.experts: dict[int, dict[int, dict[str, list[str]]]] = {}
        for name in self.tensors:
            self._sorted(name)

    def _sorted(self, name: str) -> None:
        """A name goes under what it is in its layer; gates and ups that are apart are one parameter."""
        whole = _UNITS.fullmatch(name)
        of = name if whole is None else f"{whole['before']}weight"
        if (layer := _LAYER.fullmatch(of)) is not None:
            expert = _EXPERT.fullmatch(layer["rest"])
            i, rest = int(layer["i"]), layer["rest"]
            if expert is not None and expert["rest"] in _OF_EXPERT:
                own = self.experts.setdefault(i, {}).setdefault(int(expert["e"]), {})
                own.setdefault(expert["rest"], []).append(name)
                return
            if rest in ORDERS[0]:
                self.layers.setdefault(i, {}).setdefault(rest, []).append(name)
                return
        elif (known := _OUTSIDE.fullmatch(of)) is not None and known["rest"] in (*_FIRST, *_LAST):
            self.outside.setdefault(known["rest"], []).append(name)
            return
        _refuse(self.file, name, "parameters whose place among Megatron's modules is known", "another")

    def _cut(self, t: TensorInfo) -> tuple[int, list[int]]:
        """The axis along which its pieces share it out, and the first element of each and the end on it."""
        boxes = self._boxes_of(self.file, t.name)
        axes = [k for k, n in enumerate(t.shape) if any(size[k] != n for _, size in boxes)]
        axis = axes[0] if axes else 0
        if len(axes) > 1 or (not axes and len(boxes) > 1):
            _refuse(self.file, t.name, "pieces that share one axis out", f"{len(boxes)} others")
        edges = sorted(start[axis] for start, _ in boxes) if t.shape else [0]
        return axis, [*edges, t.shape[axis] if t.shape else 1]

    def _boxes_of(self, file: TensorFile, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The pieces of a tensor in a view of the folder."""
        index: tuple[int, ...] = ()
        while not isinstance(file, DcpFile):
            if isinstance(file, Renamed):
                name, file = file.own[name], file.stored
            elif isinstance(file, Shares) and not index:
                share = file.shares[name]
                file, name = file.stored, share.stored
                lead = file.tensors[name].shape[: len(file.tensors[name].shape) - len(share.info.shape)]
                at = share.start // max(share.info.nbytes, 1)
                index = tuple(int(k) for k in np.unravel_index(at, lead)) if lead else ()
            else:
                _refuse(self.file, name, "a tensor as the folder has it", "a part of another")
        if name not in self._boxes:
            made = self._boxes[name] = {}
            axes = len(index)
            for p in file.boxes(name):
                if any(n != 1 for n in p.size[:axes]):
                    _refuse(self.file, name, "pieces of one layer each", f"one of {list(p.size)}")
                made.setdefault(p.start[:axes], []).append((p.start[axes:], p.size[axes:]))
        return self._boxes[name].get(index, [])

    @cached_property
    def width(self) -> int:
        """How many tensor-parallel ranks share the model."""
        words = self.outside.get(WORDS)
        if words is None:
            _refuse(self.file, None, f"{WORDS}, which all tensor-parallel ranks share", "none")
        return len(self.cuts[words[0]][1]) - 1

    @cached_property
    def expert_width(self) -> int:
        """The same of experts."""
        known = [
            n for i in self.experts.values() for own in i.values() for n in own.get("linear_fc2.weight", ())
        ]
        return len(self.cuts[known[0]][1]) - 1 if known else 1

    def share(self, names: Iterable[str], rank: int, width: int) -> list[Cut]:
        """What a rank has of a parameter, one after the other in its memory."""
        made: list[Cut] = []
        for name in names:
            axis, edges = self.cuts[name]
            count = len(edges) - 1
            if count == 1:
                made.append((name, 0))
                continue
            if count % width or (count > width and axis):
                _refuse(self.file, name, f"pieces of {width} tensor-parallel ranks", f"{count}")
            made += [(name, k) for k in range(rank, count, width)]
        return made

    def numel(self, cut: Cut) -> int:
        name, k = cut
        axis, edges = self.cuts[name]
        shape = self.tensors[name].shape
        return prod(shape) // max(shape[axis], 1) * (edges[k + 1] - edges[k]) if shape else 1


# --- where they may be --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One of the ways in which Megatron lays buffers out; `together`: the matrices of one kind of all experts
    come after each other."""

    order: tuple[str, ...]
    aligned: bool
    together: bool


def _ways(parameters: Parameters) -> Iterator[Way]:
    fused = any(rest in _NORM for own in parameters.layers.values() for rest in own)
    for order, aligned, together in product(
        ORDERS if fused else ORDERS[:1], (True, False), (False, True) if parameters.experts else (False,)
    ):
        yield Way(order, aligned, together)


def _of_experts(own: Mapping[int, Mapping[str, list[str]]], way: Way, some: range) -> Iterator[list[str]]:
    if way.together:
        yield from (own[e][rest] for rest in _OF_EXPERT for e in some if rest in own.get(e, {}))
    else:
        yield from (own[e][rest] for e in some for rest in _OF_EXPERT if rest in own.get(e, {}))


Places = dict[Cut, list[Place]]
Path = tuple[int, ...]  # the layer behind the last one of each stage


def _placed(ranks: Ranks, parameters: Parameters, way: Way) -> Iterator[Places]:
    """The places of all cuts, for each way in which layers may be dealt out to stages."""
    width, groups, virtual = parameters.width, len(ranks.dense), len(ranks.dense[0])
    if groups % width:
        _refuse(parameters.file, None, f"buckets of a multiple of {width} tensor-parallel ranks", f"{groups}")
    stages = groups // width
    if len(ranks.experts) % (stages * parameters.expert_width):
        _refuse(
            parameters.file, None, f"buckets of experts for each of {stages} stages", f"{len(ranks.experts)}"
        )
    slots = [(v, p) for v in range(virtual) for p in range(stages)]
    ends: dict[int, list[tuple[Path, list[Places]]]] = {0: [((), [])]}
    layers = 1 + max(parameters.layers, default=-1)
    sums = [(0, 0)]
    for i in range(layers):
        own = _Stage(parameters, way, range(i, i + 1), first=False, last=False).lengths(ranks)
        sums.append((sums[-1][0] + own[0], sums[-1][1] + own[1]))
    for number, (v, p) in enumerate(slots):
        reached: dict[int, list[tuple[Path, list[Places]]]] = {}
        last = number + 1 == len(slots)
        there = ranks.dense[p * width][v].length
        rest, count = _Stage(parameters, way, range(0), first=not number, last=last).lengths(ranks)
        for begin, known in ends.items():
            for end in range(layers if last else begin, layers + 1):
                least = rest + sums[end][0] - sums[begin][0]
                most = least + (ALIGNED - 1) * (count + sums[end][1] - sums[begin][1])
                if not least <= there <= most:
                    if least > there:
                        break
                    continue
                stage = _Stage(parameters, way, range(begin, end), first=not number, last=last)
                if (made := stage.placed(ranks, v, p, stages)) is None:
                    continue
                paths = reached.setdefault(end, [])
                paths += [((*path, end), [*before, made]) for path, before in known]
                if len(paths) > WAYS:
                    _refuse(parameters.file, None, "layers that are dealt out in one way", "many")
        ends = reached
    for _, parts in ends.get(layers, ()):
        whole: Places = {}
        for part in parts:
            for cut, places in part.items():
                whole.setdefault(cut, []).extend(places)
        yield whole


@dataclass(frozen=True)
class _Stage:
    """A virtual stage, with the layers `held`."""

    parameters: Parameters
    way: Way
    held: range
    first: bool
    last: bool

    def dense(self, *, experts: bool) -> Iterator[list[str]]:
        """The names of each parameter in the order of the modules; a stage that is not the first has words of
        its own where the output layer is tied to them."""
        outside, layers = self.parameters.outside, self.parameters.layers
        if self.first:
            yield from (outside[n] for n in _FIRST if n in outside)
        for i in self.held:
            own = layers.get(i, {})
            yield from (own[rest] for rest in self.way.order if rest in own)
            if experts and (all_of := self.parameters.experts.get(i)) is not None:
                yield from _of_experts(all_of, self.way, range(1 + max(all_of)))
        if self.last:
            yield from (outside[n] for n in _LAST if n in outside)
            if OUTPUT not in outside and not self.first:
                yield outside[WORDS]

    def lengths(self, ranks: Ranks) -> tuple[int, int]:
        """How many elements, and parameters, the first of its ranks has."""
        own = self.parameters
        shares = [own.share(n, 0, own.width) for n in self.dense(experts=not ranks.experts)]
        return sum(own.numel(cut) for share in shares for cut in share), len(shares)

    def placed(self, ranks: Ranks, v: int, p: int, stages: int) -> Places | None:
        """The places of what each of its ranks holds; None where their buckets have other lengths."""
        own = self.parameters
        made: Places = {}
        names = list(self.dense(experts=not ranks.experts))
        for rank in range(own.width):
            buffer = ranks.dense[p * own.width + rank][v]
            if not self.laid(buffer, names, rank, own.width, made):
                return None
        count = len(ranks.experts) // stages
        for k in range(count):
            parallel, (part, rank) = count // own.expert_width, divmod(k, own.expert_width)
            of_all = [own.experts.get(i, {}) for i in self.held]
            names = []
            for held in of_all:
                each, rest = divmod(len(held), parallel)
                if rest:
                    return None
                names += _of_experts(held, self.way, range(part * each, (part + 1) * each))
            if not self.laid(ranks.experts[p * count + k][v], names, rank, own.expert_width, made):
                return None
        return made

    def laid(self, buffer: Buffer, names: Sequence[list[str]], rank: int, width: int, made: Places) -> bool:
        """Whether what a rank has of these parameters fills its buffer, and where each cut is then."""
        shares = [self.parameters.share(n, rank, width) for n in reversed(names)]
        sizes = [sum(map(self.parameters.numel, share)) for share in shares]
        if not sum(sizes) <= buffer.length <= sum(sizes) + (ALIGNED - 1) * len(sizes):
            return False
        starts = _starts([n for _, n in buffer.buckets], sizes, ALIGNED if self.way.aligned else 1)
        if starts is None:
            return False
        for share, (bucket, at) in zip(shares, starts, strict=True):
            for cut in share:
                made.setdefault(cut, []).append((buffer.buckets[bucket][0], at))
                at += self.parameters.numel(cut)
        return True


def _starts(buckets: Sequence[int], sizes: Sequence[int], unit: int) -> list[tuple[int, int]] | None:
    """The bucket of each parameter and its first element there; None where buckets of such lengths do not
    hold them. The last of a bucket ends where it ends, or at the multiple of `unit` before that."""
    made = []
    bucket, end = 0, 0
    for n in sizes:
        at = end + -end % unit
        if bucket < len(buckets) and at + n > buckets[bucket] and buckets[bucket] in (end, at):
            bucket, at = bucket + 1, 0
        if bucket >= len(buckets) or at + n > buckets[bucket]:
            return None
        made.append((bucket, at))
        end = at + n
    filled = bucket + 1 == len(buckets) and buckets[bucket] in (end, end + -end % unit)
    return made if filled or not (sizes or buckets) else None


# --- where they are -----------------------------------------------------------------------------------------


@dataclass
class Placement:
    """Places of all cuts; more than one of what ranks have copies of."""

    parameters: Parameters
    places: Places
    file: TensorFile
    _views: dict[str, Pieced] = field(default_factory=dict)

    def _name(self, t: TensorInfo, stored_as: str, copy: int) -> str:
        axis, edges = self.parameters.cuts[t.name]
        parts = []
        for k in range(len(edges) - 1):
            names, first = self.places[t.name, k][copy]
            parts.append(part_of(names[stored_as], first, first + self.parameters.numel((t.name, k))))
        return joined_of(parts, axis)

    def name(self, t: TensorInfo, stored_as: str) -> str:
        return self._name(t, stored_as, 0)

    def copies(self, t: TensorInfo) -> int:
        return len(self.places[t.name, 0])

    def holds(self, checkpoint: Checkpoint, t: TensorInfo, seen: Alike) -> bool:
        """Whether the float32 weights at its places are its own."""
        count = len(self.parameters.cuts[t.name][1]) - 1
        found = {len(self.places.get((t.name, k), ())) for k in range(count)}
        if len(found) != 1 or 0 in found:
            return False
        names = [self._name(t, MASTER, copy) for copy in range(self.copies(t))]
        view = Pieced(self.file, [(n, t.shape) for n in names], self.file.name)
        return all(agree(checkpoint, t, [(view, n, 0, 4 * t.numel)], seen) for n in names)

    def compare(self, t: TensorInfo) -> None:
        """Fail where ranks have other states of one parameter than others: they step copies alike."""
        for held in STATES.values() if self.copies(t) > 1 else ():
            names = [self._name(t, held, copy) for copy in range(self.copies(t))]
            view = Pieced(self.file, [(n, t.shape) for n in names], self.file.name)
            for name in names[1:]:
                for at in range(0, 4 * t.numel, BLOCK):
                    one, other = (bytearray(min(BLOCK, 4 * t.numel - at)) for _ in range(2))
                    view.read_into(names[0], at, memoryview(one))
                    view.read_into(name, at, memoryview(other))
                    if one != other:
                        text = f"expected {held} of {t.name} as on other ranks, found another"
                        fail("shard-conflict", text, file=self.file.name, where=name, hint=HINT)
