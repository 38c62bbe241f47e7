"""Adam's state as the files of Megatron's ranks number it, read and written.

    optimizer[.optimizer].state.{n}.{exp_avg,exp_avg_sq}        of the n-th parameter
    optimizer.{fp32_from_fp16_params,fp32_from_fp16}.{g}.{k}    the weights in float32 that the step is made
                                                                on: of the k-th in group g that has 16 bits

A run that steps its experts apart has a list of two optimizers, so a number stands behind `optimizer`, and
each counts its own parameters. A distributed optimizer has its states elsewhere (optimizer_buffers.py), and
here groups without numbers.

Numbers run through the groups, and in each group in the order of the modules, which is that of the file. No
file says that order for a run that shares its layers out otherwise, so `optimizer.json` keeps it: the names
with `{}` for the numbers in them, each where it first stands, and a checksum: of two norms that have changed
places there, each would get the other's state, and nobody could tell.

Source: NVIDIA/Megatron-LM core_v0.9.0 to core_v0.16.1 (core/optimizer/__init__.py: _get_param_groups;
optimizer.py: Float16OptimizerWithFloat16Params); torch 2.13 (optim/optimizer.py, state_dict).
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from ckpt_tool.checkpoint.base import TensorFile, TensorInfo
from ckpt_tool.checkpoint.torch_zip_writer import Held
from ckpt_tool.convert.optimizer_buffers import stepped
from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass

T = TypeVar("T")
MASTER = "fp32_param"  # what the state of the lists is called elsewhere
NARROW = ("F16", "BF16")
MOMENTS = ("exp_avg", "exp_avg_sq")
LISTS = ("fp32_from_fp16_params", "fp32_from_fp16")
SCHEDULERS = ("opt_param_scheduler", "lr_scheduler")
_HEAD = r"optimizer(\.(?P<chain>\d{1,3}))?"
NUMBERED = re.compile(
    rf"(?P<inside>{_HEAD}(\.optimizer)?)\.state\.(?P<n>\d{{1,9}})\.(?P<state>{'|'.join(MOMENTS)})", re.ASCII
)
LISTED = re.compile(rf"{_HEAD}\.(?P<list>{'|'.join(LISTS)})\.(?P<g>\d{{1,9}})\.(?P<k>\d{{1,9}})", re.ASCII)
STEP = re.compile(rf"{_HEAD}\.(optimizer\.)?state\.\d+\.step", re.ASCII)
_NUMBER = re.compile(r"(?<=\.)\d{1,6}(?=\.)|(?<=\.weight)\d{1,6}$|(?<=\.bias)\d{1,6}$", re.ASCII)
_CHUNK = re.compile(r"model(?P<chunk>\d{0,4})\.", re.ASCII)
# What a group holds: matrices, which decay, or the others, or both.
DECAY, OTHERS, ALL = "decay", "others", "all"


def decays(t: TensorInfo) -> bool:
    return len(t.shape) > 1 and not t.name.endswith(".bias")


def is_in(t: TensorInfo, group: str) -> bool:
    """Whether a parameter belongs to a group of that word."""
    return group == ALL or decays(t) == (group == DECAY)


@dataclass(frozen=True)
class Told:
    """What the file of a rank has of one optimizer beside its tensors. `chain` is its place in a list of
    them, None for the only one."""

    chain: int | None
    inner: Mapping[Any, Any]
    groups: tuple[Mapping[Any, Any], ...]

    def parameters(self, model: Sequence[TensorInfo]) -> list[TensorInfo]:
        """Those of `model` that it steps."""
        return stepped(model, self.chain)

    @property
    def distributed(self) -> bool:
        """Whether its states lie in a file of their own."""
        return bool(self.groups) and "state" not in self.inner and not any("params" in g for g in self.groups)


def optimizers_of(file: TensorFile) -> list[Told]:
    """The optimizers of a file, each with its groups of parameters."""
    held = file.metadata.get("optimizer")
    if isinstance(held, Mapping) and held and all(str(k).isdecimal() for k in held):
        return [_told(int(k), x) for k, x in sorted(held.items(), key=lambda item: int(item[0]))]
    if isinstance(held, list):
        return [_told(k, x) for k, x in enumerate(held)]
    return [_told(None, held)]


def _chained(known: Sequence[Told]) -> tuple[int, ...]:
    """How many groups each optimizer of a list has; none where there is no list."""
    return tuple(len(told.groups) for told in known if told.chain is not None)


def _told(chain: int | None, held: object) -> Told:
    inner = held.get("optimizer", held) if isinstance(held, Mapping) else {}
    inner = inner if isinstance(inner, Mapping) else {}
    found = inner.get("param_groups")
    groups = tuple(g for g in found if isinstance(g, Mapping)) if isinstance(found, list) else ()
    return Told(chain, inner, groups)


# --- the order of parameters --------------------------------------------------------------------------------


def _parts(name: str) -> tuple[int, str, list[int]]:
    """The virtual stage of a parameter, its name with `{}` for numbers, and these."""
    m = _CHUNK.match(name)
    own = name if m is None else name[m.end() :]
    numbers = [int(n) for n in _NUMBER.findall(own)]
    return (int(m["chunk"] or 0) if m else 0), _NUMBER.sub("{}", own), numbers


class Order:
    """An order of parameters by their names, whatever layers and experts there are: what is numbered stands
    where the first of its kind does, by number."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._first: dict[str, int] = {}
        for place, name in enumerate(names):
            parts = name.split("{}")
            for k in range(1, len(parts)):
                self._first.setdefault("{}".join(parts[:k]) + "{", place)
            self._first[name] = place

    @classmethod
    def of(cls, files: Iterable[Sequence[str]]) -> Order | None:
        """That of the names in files; None where they follow none that this class can say."""
        known = [list(names) for names in files]
        found = cls(list(dict.fromkeys(_parts(n)[1] for names in known for n in names)))
        return found if all(sorted(names, key=found.key) == names for names in known) else None

    def knows(self, name: str) -> bool:
        return _parts(name)[1] in self._first

    def key(self, name: str) -> tuple[int, ...]:
        chunk, template, numbers = _parts(name)
        parts, places = template.split("{}"), [chunk]
        for k, number in enumerate(numbers, 1):
            places += [self._first["{}".join(parts[:k]) + "{"], number]
        return (*places, self._first[template])


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbered:
    """The parameters of one file by name in the order of modules, what each group of them holds, the states
    by state and name, where the file has what is no tensor (see `told_of`), and how many groups each
    optimizer of a list has."""

    order: tuple[str, ...]
    words: tuple[str, ...]
    states: Mapping[tuple[str, str], TensorInfo]
    forms: Mapping[str, str]
    chained: tuple[int, ...] = ()


def numbered(label: str, file: TensorFile, model: Sequence[TensorInfo], hint: str) -> Numbered:
    """See the module docstring; `model` are the tensors of the model in the order of the file. Kinds:
    `unsupported` where groups do not fit, `shape-mismatch`."""
    words: list[str] = []
    states: dict[tuple[str, str], TensorInfo] = {}
    known = optimizers_of(file)
    if len(known) > 2:
        _refuse(label, f"expected an optimizer, and one of experts, found {len(known)}", hint)
    forms: dict[str, str] = {}
    for told in known:
        ours = [t for t in file.tensors.values() if _chain(t.name) == told.chain]
        own_words, own = _of_one(label, told, ours, told.parameters(model), hint)
        words += own_words
        states |= own
        forms |= dict(_forms(told, ours))
    return Numbered(tuple(t.name for t in model), tuple(words), states, forms, _chained(known))


def _chain(name: str) -> int | None:
    """The place of the optimizer that a state belongs to; -1 for a tensor that is none."""
    m = NUMBERED.fullmatch(name) or LISTED.fullmatch(name) or STEP.fullmatch(name)
    return -1 if m is None else None if m["chain"] is None else int(m["chain"])


def _refuse(label: str, text: str, hint: str, where: str = "optimizer.param_groups") -> NoReturn:
    fail("unsupported", text, file=label, where=where, hint=hint)


def _of_one(
    label: str, told: Told, ours: Sequence[TensorInfo], model: Sequence[TensorInfo], hint: str
) -> tuple[tuple[str, ...], dict[tuple[str, str], TensorInfo]]:
    """What each group of an optimizer holds, and the states of its parameters, of which it has `model`."""
    numbers = [g["params"] if isinstance(g.get("params"), list) else [] for g in told.groups]
    if any(type(n) is not int for own in numbers for n in own):
        _refuse(label, "expected numbers of parameters, found others", hint)
    words = _words(ours, numbers)
    own = [[t for t in model if is_in(t, w)] if n else [] for w, n in zip(words, numbers, strict=True)]
    if [len(o) for o in own] != [len(n) for n in numbers] or sum(map(len, own)) != len(model):
        counts = " and ".join(str(len(n)) for n in numbers) or "none"
        two = [t for t in model if decays(t)], [t for t in model if not decays(t)]
        wanted = " and ".join(str(len(o)) for o in two if o) or "0"
        of = " of experts" if told.chain else ""
        text = (
            f"expected groups of {wanted} parameters{of} (those that decay, and the others), found {counts}"
        )
        _refuse(label, text, hint)
    pairs = [(n, t) for ns, o in zip(numbers, own, strict=True) for n, t in zip(ns, o, strict=True)]
    return words, dict((*_moments(label, ours, dict(pairs)), *_masters(label, ours, own)))


def distributed(
    file: TensorFile, model: Sequence[TensorInfo], states: Mapping[tuple[str, str], TensorInfo]
) -> Numbered:
    """The same of a file beside which the states of a distributed optimizer lie, as they were found there:
    its groups have no numbers, but say whether they decay."""
    words: list[str] = []
    known = optimizers_of(file)
    forms: dict[str, str] = {}
    for told in known:
        own = [DECAY if g.get("wd_mult", g.get("weight_decay")) else OTHERS for g in told.groups]
        words += own if len(own) > 1 else [ALL for _ in own]
        if any("step" in g for g in told.groups):
            forms["step"] = "group"
    wide = any(state == MASTER for state, _ in states)
    forms |= {"inside": "optimizer.optimizer", "master": LISTS[0]} if wide else {"inside": "optimizer"}
    return Numbered(tuple(t.name for t in model), tuple(words), states, forms, _chained(known))


def _words(ours: Sequence[TensorInfo], numbers: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """What each group holds, by the shape of the first moment in it."""
    shapes: dict[int, int] = {}
    for t in ours:
        if (known := NUMBERED.fullmatch(t.name)) is not None:
            shapes.setdefault(int(known["n"]), len(t.shape))
    if sum(map(bool, numbers)) < 2:
        return tuple(ALL for _ in numbers)
    return tuple(DECAY if n and shapes.get(n[0], 0) > 1 else OTHERS for n in numbers)


def _moments(
    label: str, ours: Sequence[TensorInfo], names: Mapping[int, TensorInfo]
) -> Iterator[tuple[tuple[str, str], TensorInfo]]:
    for state in ours:
        if (known := NUMBERED.fullmatch(state.name)) is None:
            continue
        of = names.get(int(known["n"]))
        if of is None or of.shape != state.shape:
            what = "no such parameter" if of is None else f"{list(of.shape)} of {of.name}"
            text = f"expected the shape of parameter {known['n']}, found {list(state.shape)}, and {what}"
            fail("shape-mismatch", text, file=label, where=state.name)
        yield (known["state"], of.name), state


def _masters(
    label: str, ours: Sequence[TensorInfo], groups: Sequence[Sequence[TensorInfo]]
) -> Iterator[tuple[tuple[str, str], TensorInfo]]:
    found: dict[int, dict[int, TensorInfo]] = {}
    for t in ours:
        if (known := LISTED.fullmatch(t.name)) is not None:
            found.setdefault(int(known["g"]), {})[int(known["k"])] = t
    for g, group in enumerate(groups if found else ()):
        narrow, lists = [t for t in group if t.dtype in NARROW], found.pop(g, {})
        if len(narrow) != len(lists):
            text = f"expected weights in float32 of the {len(narrow)} parameters of group {g} in 16 bits"
            fail("unsupported", f"{text}, found {len(lists)}", file=label, where="optimizer")
        for k, of in enumerate(narrow):
            if (state := lists[k]).shape != of.shape:
                text = f"expected the shape {list(of.shape)} of {of.name}, found {list(state.shape)}"
                fail("shape-mismatch", text, file=label, where=state.name)
            yield (MASTER, of.name), state
    if found:
        text = f"expected weights in float32 of {len(groups)} groups of parameters, found more"
        fail("unsupported", text, file=label, where="optimizer")


def told_of(files: Sequence[Numbered]) -> dict[str, Any]:
    """What the way back to ranks needs, for `optimizer.json`: empty where the order of the parameters, what
    the groups hold, or what holds the steps, is none that can be said again."""
    order = Order.of(n.order for n in files)
    words = {n.words for n in files}
    whole = {w for w in words if ALL not in w[:2]}  # a stage may have matrices alone
    words = whole or words
    places = {tuple(n.forms.items()) for n in files}
    chained = {n.chained for n in files}
    if order is None or len(words) != 1 or len(places) != 1 or len(chained) != 1:
        return {}
    groups, counts = words.pop(), chained.pop()
    if not sound(groups, counts):
        return {}
    told: dict[str, Any] = {"groups": list(groups), "order": list(order.names), **dict(places.pop())}
    if counts:
        told["optimizers"] = list(counts)
    return told | {"crc32": crc32_of(told)}


def sound(words: Sequence[object], counts: Sequence[int] = ()) -> bool:
    """Whether each parameter is in one group of those that hold this; of a list of optimizers, `counts` are
    the groups of each."""
    if counts and (len(counts) != 2 or sum(counts) != len(words)):
        return False
    return all(sorted(map(str, own)) in ([DECAY, OTHERS], [ALL]) for own in parted(words, counts))


def parted(groups: Sequence[T], counts: Sequence[int]) -> list[Sequence[T]]:
    """What stands for each group, by optimizers."""
    if not counts:
        return [groups]
    return [groups[: counts[0]], groups[counts[0] :]]


def crc32_of(told: Mapping[str, Any]) -> int:
    """The checksum of what `told_of` says, itself aside."""
    rest = {k: v for k, v in told.items() if k != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _forms(told: Told, ours: Sequence[TensorInfo]) -> Iterator[tuple[str, str]]:
    """Where the states, the number of steps and the weights in float32 stand."""
    names = [t.name for t in ours]
    moments = filter(None, map(NUMBERED.fullmatch, names))
    if (first := next(moments, None)) is not None:
        yield "inside", first["inside"].replace(f".{first['chain']}", "", 1)
    states = told.inner.get("state")
    kept = states.values() if isinstance(states, Mapping) else ()
    if any(STEP.fullmatch(t.name) and t.dtype == "F32" and not t.shape for t in ours):
        yield "step", "tensor"
    elif any(isinstance(s, Mapping) and "step" in s for s in kept):
        yield "step", "number"
    elif any("step" in g for g in told.groups):
        yield "step", "group"
    if listed := next(filter(None, map(LISTED.fullmatch, names)), None):
        yield "master", listed["list"]


# --- writing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """What `optimizer.json` says of ranks: see `told_of`. `numbers` are those of each group, `steps` how many
    were made, `counts` the groups of each optimizer of a list."""

    words: tuple[str, ...]
    order: Order
    inside: str
    step: str | None
    master: str | None
    numbers: tuple[Mapping[str, Any], ...]
    steps: int | None
    counts: tuple[int, ...] = ()

    def apart(self) -> list[Ranks]:
        """Each optimizer of a list, with the numbers before its states."""
        words, numbers = parted(self.words, self.counts), parted(self.numbers, self.counts)
        inside = self.inside.removeprefix("optimizer")
        return [
            replace(self, words=tuple(w), numbers=tuple(n), inside=f"optimizer.{c}{inside}")
            for c, (w, n) in enumerate(zip(words, numbers, strict=True))
        ]

    def together(self) -> Ranks | None:
        """One optimizer of all parameters, as a run has that shares no experts out; None where those of
        experts have other numbers."""
        one, two = parted(self.numbers, self.counts)
        plain = [{k: v for k, v in g.items() if k != "is_expert_parallel"} for g in (*one, *two)]
        kinds = dict(zip(self.words[: len(one)], plain, strict=False))
        others = zip(self.words[len(one) :], plain[len(one) :], strict=True)
        if any(kinds.get(word, kinds.get(DECAY)) != numbers for word, numbers in others):
            return None
        return replace(self, words=self.words[: len(one)], numbers=tuple(one), counts=())


@dataclass(frozen=True)
class Laid:
    """The state of one file: what each state is called by state and parameter, the dict that holds them, and
    tensors that are numbers of steps."""

    names: Mapping[tuple[str, str], str]
    tree: object
    constants: tuple[tuple[str, str, tuple[int, ...], bytes], ...]


def laid(ranks: Ranks, model: Sequence[TensorInfo], states: Mapping[str, Iterable[str]]) -> Laid:
    """`model` are the parameters of a file in their order, `states` by state those that have it."""
    if not ranks.counts:
        return _laid(ranks, "optimizer", model, states)
    made = [_laid(own, f"optimizer.{c}", stepped(model, c), states) for c, own in enumerate(ranks.apart())]
    names = {key: name for one in made for key, name in one.names.items()}
    return Laid(names, [one.tree for one in made], tuple(c for one in made for c in one.constants))


def _laid(ranks: Ranks, head: str, model: Sequence[TensorInfo], states: Mapping[str, Iterable[str]]) -> Laid:
    """The same of one optimizer, whose names begin with `head`."""
    groups = [[t for t in model if is_in(t, w)] for w in ranks.words]
    has = {state: set(names) for state, names in states.items()}
    names: dict[tuple[str, str], str] = {}
    constants: list[tuple[str, str, tuple[int, ...], bytes]] = []
    state: dict[object, object] = {}
    params: list[dict[str, Any]] = []
    n = 0
    for group, numbers in zip(groups, ranks.numbers, strict=True):
        for number, t in enumerate(group, n):
            at = f"{ranks.inside}.state.{number}"
            own: dict[str, object] = {}
            if ranks.step == "number":
                own["step"] = ranks.steps
            elif ranks.step == "tensor":
                own["step"] = Held(f"{at}.step")
                constants.append((f"{at}.step", "F32", (), struct.pack("<f", ranks.steps)))
            for moment in (m for m in MOMENTS if t.name in has.get(m, ())):
                names[moment, t.name] = f"{at}.{moment}"
                own[moment] = Held(f"{at}.{moment}")
            state[number] = own
        params.append({**numbers, "params": [*range(n, n + len(group))]})
        n += len(group)
    inner: dict[str, object] = {"state": state, "param_groups": params}
    tree = inner if ranks.inside == head else {"optimizer": inner}
    if ranks.master is not None:
        lists: list[list[Held]] = []
        for g, group in enumerate(groups):
            with_one = [t.name for t in group if t.name in has.get(MASTER, ())]
            own_names = {name: f"{head}.{ranks.master}.{g}.{k}" for k, name in enumerate(with_one)}
            names |= {(MASTER, name): called for name, called in own_names.items()}
            lists.append([Held(called) for called in own_names.values()])
        tree = {**tree, ranks.master: lists}
    return Laid(names, tree, tuple(constants))
