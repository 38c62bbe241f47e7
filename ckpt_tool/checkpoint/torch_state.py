"""From an unpickled tree to named tensors: what is a tensor, what is metadata, and what makes the file
unsafe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import lru_cache
from math import prod
from typing import TypeGuard

from ckpt_tool.checkpoint.base import DTYPES, OtherTensor
from ckpt_tool.checkpoint.pickle_records import (
    LIMITS,
    Global,
    Inert,
    Pickled,
    TensorRecord,
    children,
    describe,
)
from ckpt_tool.checkpoint.signs import UNPACKED
from ckpt_tool.checkpoint.tensor_names import name_problems
from ckpt_tool.checkpoint.torch_globals import standing
from ckpt_tool.checkpoint.unpickle import Machine
from ckpt_tool.checkpoint.wrapping import beside_weights
from ckpt_tool.errors import Problem, fail, fail_all, printable
from ckpt_tool.records import dataclass

# A mixed-precision optimizer's copies of the weights, by groups of parameters. Source: NVIDIA/Megatron-LM,
# fp16/fp16.py (v1.0) and core/optimizer/optimizer.py (core_v0.16.1). A run that steps its experts apart has
# a list of optimizers.
_LISTED = "optimizer"
_IN_GROUPS = re.compile(rf"{_LISTED}(\.\d+)?\.fp32_from_fp16(_params)?", re.ASCII).fullmatch
_DTYPE_NAMES = {d.torch: d.name for d in DTYPES.values()}
# Of no weights, such as tables of rotations: the name in safetensors, where it has one, and bytes of an
# element. Two of bfloat16 are new in torch 2.15.
COMPLEX = {
    **{"complex64": ("C64", 8), "complex128": ("C128", 16)},
    **{"complex32": ("complex32", 4), "bcomplex32": ("bcomplex32", 4)},
}
_ITEMSIZES = {d.torch: d.itemsize for d in DTYPES.values()} | {n: size for n, (_, size) in COMPLEX.items()}
_ELEMENT_LIMIT = 1 << 62
_SHARES = ("DTensor", "ShardedTensor")
# Saved as a buffer by code after Meta's, in a dtype that no weights have: pytorch/torchtitan#634.
_COMPLEX_TURNS = re.compile(r"(.*\.)?freqs_cis", re.ASCII).fullmatch
_ONE = (
    "torch.save({'NAME': torch.load(FILE)}, OUT) gives a tensor its name; of parameters that have a file "
    "each, as in universal checkpoints of DeepSpeed, give the folder that they were made from"
)
_HINT = "nothing was imported or called; save a dict of tensors instead, or get the file from its publisher"
_WHOLE = (  # where torch.save got the model and not its weights
    "nothing was imported or called; this is a whole model: torch.save(model.state_dict(), OUT), where its "
    "classes are, keeps its weights"
)


# What makes a tensor of torch one with numbers of its own.
_ELSEWHERE = "the model was saved while its weights were elsewhere (offloaded): load all of it, then save it"
_DENSE = {
    "quantized": "in torch, `.dequantize()` makes numbers of it; better get what it was made from",
    "sparse": "in torch, `.to_dense()` makes one of it; save that",
}
_LAID_OUT = "in torch, `.contiguous()` lays its elements out; save that"


@dataclass
class State:
    """A checkpoint's tensors by name, those of complex numbers (`others`), and all else as it stands."""

    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    others: dict[str, OtherTensor] = field(default_factory=dict)
    metadata: dict[str, object] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_state(pickled: Pickled, *, file: str, lists: bool = False) -> State:
    """The tensors of the dict that `pickled` holds; nested dicts that hold tensors join their keys with ".".

    Lists and objects are metadata even where they hold tensors, but for the weights of a mixed-precision
    optimizer, whose numbers of group and place join the name, and lists of optimizers. With `lists` every
    list is parted like a dict whose keys are the places in it. Fails with every problem found:
    `unsafe-pickle`, `bad-pickle` (a container inside itself), `pickle-limit` (nesting, a dict of tensors
    reached twice), `wrong-format` (no dict), `bad-name`, `duplicate-tensor`, `unsupported-dtype`,
    `unsupported-device`, `bad-view`.
    """
    root = pickled.value
    paths = surveyed(root, file)
    _refuse_shares(pickled, file)
    fail_all(unsafe_problems(pickled, file, paths))
    if lists and type(root) is list:
        root = dict(enumerate(root))
    if type(root) is not dict:
        kind, hint = ("unsafe-pickle", _HINT) if type(root) is Inert else ("wrong-format", None)
        if type(root) is TensorRecord:
            hint = _ONE
        if type(root) in (list, tuple):
            hint = "torch.save(torch.load(FILE)[0], OUT) keeps the first of it, where that is the dict"
        fail(kind, f"expected a dict of tensors, found {describe(root)}", file=file, hint=hint)
    state = State(imports=tuple(map(str, pickled.imports)), notes=tuple(_notes(pickled)))
    splitter = _Splitter(state, file, lists)
    splitter.split(root, "", state.metadata, root)
    if not state.tensors:
        splitter.problems += [
            Problem("unsafe-pickle", f"expected a dict of tensors, found {describe(v)}", file, str(k), _WHOLE)
            for k, v in root.items()
            if type(v) is Inert and v.fields.keys() & {"_parameters", "_modules"}  # a whole torch module
        ]
        splitter.problems += _arrays(root, file)
    fail_all([*splitter.problems, *name_problems(state.tensors, file=file)])
    turns = [n for n, t in state.tensors.items() if _COMPLEX_TURNS(n) and t.dtype in COMPLEX]
    for name in turns if len(turns) < len(state.tensors) else ():
        del state.tensors[name]
        state.notes = (*state.notes, f"{name} is left out: complex rotary factors, which models make anew")
    odd = {n: p for n, t in state.tensors.items() if (p := _tensor_problem(n, t, file))}
    if len(odd) == len(state.tensors):
        fail_all(odd.values())
    needed = [n for n in odd if beside_weights(n.partition(".")[0]) is None]
    state.others = {n: _other(n, t, file) for n in needed if (t := state.tensors[n]).dtype in COMPLEX}
    fail_all(odd[n] for n in needed if n not in state.others or odd[n].kind != "unsupported-dtype")
    for name in odd:  # of training, where nobody needs it, or of complex numbers
        del state.tensors[name]
    if count := len(odd) - len(needed):
        state.notes = (*state.notes, f"{count} tensors of training are no dense ones: not read")
    return state


def _other(name: str, t: TensorRecord, file: str) -> OtherTensor:
    dtype, itemsize = COMPLEX[t.dtype]
    return OtherTensor(name, dtype, t.shape, file, prod(t.shape) * itemsize)


def _refuse_shares(pickled: Pickled, file: str) -> None:
    """Fail with `unsupported` where tensors are one rank's shares (FSDP 2, tensor parallelism), and nothing
    but torch's own classes for them would be called: pytorch/pytorch#136336."""
    refused = [g for g in pickled.imports if standing(g, called=g in pickled.called) == "refused"]
    kinds = [
        g.name for g in pickled.imports if g.module.startswith("torch.distributed.") and g.name in _SHARES
    ]
    if kinds and all(g.module.startswith("torch.distributed.") for g in refused):
        fail(
            "unsupported",
            f"expected whole tensors, found {kinds[0]}s, which hold the share of one rank",
            file=file,
            hint="save it by torch.distributed.checkpoint, whose folder is read, or whole: "
            "get_model_state_dict with StateDictOptions(full_state_dict=True)",
        )


def unsafe_problems(
    read: Pickled | Machine, file: str, paths: Mapping[Global, str] | None = None
) -> list[Problem]:
    """One problem for each global that may not stand in a checkpoint at all. `paths` says where it stands in
    the tree; None for a pickle that broke off before it was one."""
    problems = []
    for g, at in read.imports.items():
        called = g in read.called
        if standing(g, called=called) != "refused":
            continue
        path = None if paths is None else paths.get(g)
        where = (
            "" if paths is None else " outside the result" if path is None else f" at {path or 'the root'}"
        )
        found = f"a {'call' if called else 'mention'} of {g}{where} (byte {at} of the pickle)"
        hint = _WHOLE if "_modules" in (path or "") or str(g).startswith("torch.nn.modules.") else _HINT
        problems.append(
            Problem("unsafe-pickle", f"expected tensors and plain data, found {found}", file, path, hint)
        )
    return problems


def _notes(pickled: Pickled) -> Iterator[str]:
    foreign = [str(g) for g in pickled.imports if standing(g, called=g in pickled.called) == "foreign"]
    if foreign:
        shown = ", ".join(printable(g) for g in foreign[:8]) + (", ..." if len(foreign) > 8 else "")
        yield f"kept as inert data, not imported: {shown}"


def surveyed(root: object, file: str) -> dict[Global, str]:
    """Check nesting and self-reference, visiting each container once; where each global first stands."""
    paths: dict[Global, str] = {}
    heights: dict[int, int] = {}  # of finished containers, and 0 of those still open
    steps: list[str] = []
    open_: list[tuple[int, Iterator[tuple[str, object]]]] = []
    highest: list[int] = []  # among the finished children of each open container

    def enter(value: object) -> int | None:
        """The height of `value`, or None when it was opened and has to be finished first."""
        kind = type(value)
        if kind is Global:
            paths.setdefault(value, "".join(steps).lstrip("."))  # type: ignore[arg-type]
            return 0
        if kind is Inert:
            paths.setdefault(value.type, "".join(steps).lstrip("."))  # type: ignore[attr-defined]
        elif kind is not dict and kind is not list and kind is not tuple:
            return 0
        known = heights.get(id(value))
        if known == 0:
            fail(
                "bad-pickle",
                "expected a tree, found a container inside itself",
                file=file,
                where="".join(steps),
            )
        if known is not None:
            return known
        heights[id(value)] = 0
        open_.append((id(value), children(value)))
        highest.append(0)
        return None

    enter(root)
    while open_:
        identity, rest = open_[-1]
        for step, item in rest:
            steps.append(step)
            height = enter(item)
            if height is None:
                break
            steps.pop()
            if height > highest[-1]:
                highest[-1] = height
        else:
            open_.pop()
            height = heights[identity] = 1 + highest.pop()
            if open_:
                steps.pop()
                highest[-1] = max(highest[-1], height)
        if len(open_) > LIMITS.nesting or (not open_ and heights[identity] > LIMITS.nesting):
            limit = LIMITS.nesting
            where = printable("".join(steps[:3]))
            fail(
                "pickle-limit",
                f"expected at most {limit} nested containers, found more",
                file=file,
                where=where,
            )
    return paths


def _arrays(root: dict[object, object], file: str) -> Iterator[Problem]:
    """That the weights are numpy's arrays, in the dict or in one in it."""
    inner = {id(v): v for v in root.values() if type(v) is dict}  # each once, however often it is named
    for key, value in ((k, v) for held in (root, *inner.values()) for k, v in held.items()):
        if (
            type(value) is Inert
            and value.type.module.startswith("numpy")
            and value.type.name == "_reconstruct"
        ):
            hint = (
                "torch.save({k: torch.from_numpy(v) for k, v in ARRAYS.items()}, OUT) writes them as tensors"
            )
            yield Problem("wrong-format", "expected tensors, found numpy arrays", file, str(key), hint)
            return


class _Splitter:
    """Parts a tree of dicts into tensors by name and metadata."""

    def __init__(self, state: State, file: str, lists: bool = False) -> None:
        self.state = state
        self.file = file
        self.lists = lists
        self.problems: list[Problem] = []
        self.holders: dict[int, bool] = {}  # dict -> whether dicts from it on lead to a tensor
        self.placed: dict[int, str] = {}  # dict or list with tensors -> where it stands

    def holds_tensors(self, value: object) -> bool:
        kind = type(value)
        if kind is TensorRecord:
            return True
        if kind is not dict and not (kind is list and self.lists):
            return False
        known = self.holders.get(id(value))
        if known is None:
            inner = value.values() if isinstance(value, dict) else value
            known = self.holders[id(value)] = any(map(self.holds_tensors, inner))  # type: ignore[call-overload]
        return known

    def parted(self, name: str, value: object) -> dict[object, object] | None:
        """`value` where its tensors have names of their own: a dict, or a list that is parted like one."""
        if type(value) is dict:
            return value if self.holds_tensors(value) else None
        if type(value) is not list or not (self.lists or name == _LISTED):
            return None
        apart = {id(v) for v in value if type(v) is dict}
        if len(apart) == sum(type(v) is dict for v in value) and any(map(self.holds_tensors, value)):
            return dict(enumerate(value))
        return None

    def split(
        self, value: dict[object, object], prefix: str, metadata: dict[str, object], held: object
    ) -> None:
        """`held` is what the file has for `value`, which is made anew of a list."""
        first = self.placed.setdefault(id(held), prefix)
        if first != prefix:
            kind = type(held).__name__
            message = f"expected a {kind} of tensors at one place, found it at `{first}` and `{prefix}`"
            fail("pickle-limit", message, file=self.file, where=prefix)
        direct = any(type(v) is TensorRecord for v in value.values())
        for key, item in value.items():
            name = prefix + self.text(key, prefix)
            if type(item) is TensorRecord:
                self.add(name, item)
            elif (inner := self.parted(name, item)) is not None:
                rest: dict[str, object] = {}
                self.split(inner, name + ".", rest, item)
                if rest:
                    metadata[self.text(key, prefix)] = rest
            elif _IN_GROUPS(name) and _is_groups(item):
                for g, group in enumerate(item):
                    for k, tensor in enumerate(group):
                        self.add(f"{name}.{g}.{k}", tensor)
            else:
                if direct and type(item) is Inert and standing(item.type, called=True) == "foreign":
                    message = f"expected a tensor among tensors, found {describe(item)}"
                    self.problems.append(Problem("unsafe-pickle", message, self.file, name, _HINT))
                metadata[self.text(key, prefix)] = item

    def add(self, name: str, tensor: TensorRecord) -> None:
        first = self.state.tensors.setdefault(name, tensor)
        if first is not tensor:
            message = f"expected each name once, found it at bytes {first.at} and {tensor.at} of the pickle"
            self.problems.append(Problem("duplicate-tensor", message, self.file, name))

    def text(self, key: object, prefix: str) -> str:
        if type(key) is bytes:
            try:
                return key.decode()
            except UnicodeDecodeError:
                fail(
                    "bad-name", f"expected a name in UTF-8, found {key[:80]!r}", file=self.file, where=prefix
                )
        if type(key) is Inert and len(key.args) == 1:  # dtypes, by which buffers are told apart
            (own,) = key.args
            if type(own) is tuple and own and all(type(k) is Global for k in own):
                return f"({', '.join(map(str, own))})"
            return str(own) if type(own) is Global else str(key)
        return str(key)


def _is_groups(value: object) -> TypeGuard[list[list[TensorRecord]]]:
    """Lists of tensors, none of them twice."""
    return (
        type(value) is list
        and all(type(group) is list and all(type(x) is TensorRecord for x in group) for group in value)
        and len({id(group) for group in value}) == len(value)
    )


def dtype_of(tensor: TensorRecord) -> str:
    """The name in DTYPES of a tensor that `read_state` let through."""
    return _DTYPE_NAMES[tensor.dtype]


def _tensor_problem(name: str, t: TensorRecord, file: str) -> Problem | None:
    if t.odd is not None or t.storage is None:
        if t.odd == "meta" or (t.odd or "").startswith("of a device"):
            message = f"expected a tensor with its data in the file, found one that is {t.odd}"
            return Problem("unsupported-device", message, file, name, _ELSEWHERE)
        odd = t.odd or ""
        message = f"expected a dense tensor, found one that is {t.odd}"
        way = _DENSE.get("quantized" if odd.startswith("of the subclass torchao.") else odd)
        return Problem("unsupported-dtype", message, file, name, way)
    if t.dtype in COMPLEX and (fault := view_fault(t)) is not None:
        return Problem("bad-view", fault, file, name, _LAID_OUT)
    if t.dtype not in _DTYPE_NAMES:
        known = ", ".join(_DTYPE_NAMES)
        message = f"expected one of the dtypes {known}, found {printable(t.dtype, 40)}"
        hint = UNPACKED if "float" in t.dtype else None
        return Problem("unsupported-dtype", message, file, name, hint)
    if t.storage.location == "meta":
        message = "expected a tensor with its data in the file, found one of the device meta"
        return Problem("unsupported-device", message, file, name, _ELSEWHERE)
    fault = view_fault(t)
    return None if fault is None else Problem("bad-view", fault, file, name, _LAID_OUT)


def view_fault(t: TensorRecord) -> str | None:
    """What is wrong with a tensor's place in its storage, or None. All arithmetic is exact."""
    if t.storage is None:
        return "expected a storage, found none"
    itemsize = _ITEMSIZES[t.dtype]
    numel = t.storage.numel
    if t.storage.dtype is None:
        numel //= itemsize  # an untyped storage counts bytes
    return _fault(t.shape, t.strides, t.offset, numel, t.storage.view)


@lru_cache(maxsize=1024)  # layers are alike
def _fault(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
    numel: int,
    view: tuple[str, int, int] | None,
) -> str | None:
    """See `view_fault`; `numel` elements are in the storage."""
    if len(shape) != len(strides):
        return f"expected as many strides as sizes, found sizes {shape} and strides {strides}"
    if offset < 0 or min((0, *shape, *strides)) < 0:
        return f"expected numbers from 0 on, found offset {offset}, sizes {shape}, strides {strides}"
    if view is not None:
        _, start, length = view
        if start < 0 or length < 0 or start + length > numel:
            return f"expected a part of {numel} elements, found elements {start} to {start + length}"
        numel = length
    if prod(max(n, 1) for n in shape) > _ELEMENT_LIMIT:
        return f"expected at most 2^62 elements, found sizes {shape}"
    if prod(shape) == 0:
        return None  # torch counts offsets as if every axis had an element: they may lie behind the storage
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    numbers = f"offset {offset}, sizes {shape}, strides {strides}"
    if last >= numel:
        return f"expected elements below {numel}, found {numbers}, which reach element {last}"
    if any(n > 1 and step == 0 for n, step in zip(shape, strides, strict=True)):
        return f"expected every element in the storage, found a broadcast view: {numbers}"
    if prod(shape) > numel:
        return f"expected at most the {numel} elements of the storage, found {numbers}"
    return None
