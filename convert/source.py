"""A checkpoint sorted out: which of its files hold which tensor, by the names that a family's table uses.

Files differ in how they share a model out: whole tensors in one file or several, model-parallel ranks that
each hold a share of every tensor under the same name, pipeline stages that number their layers from 0, and a
word or two in front of every name. A `Source` is the same for all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from itertools import chain, islice
from math import prod
from operator import attrgetter
from typing import Any

from ckpt_tool.checkpoint.base import DTYPES, FLOATS, Checkpoint, TensorInfo
from ckpt_tool.convert.expanding import Column
from ckpt_tool.convert.layout import Home
from ckpt_tool.convert.plan import Options, Value
from ckpt_tool.convert.widths import ALIASES, CASTABLE
from ckpt_tool.errors import Problem, fail, fail_all
from ckpt_tool.records import dataclass

_PLACE, _NAME, _KIND = attrgetter("file", "dtype"), attrgetter("name"), attrgetter("dtype", "shape")


class Single(Mapping[str, tuple[TensorInfo, ...]]):
    """Whole tensors by the names of the table, for each of which there is the one in `held`."""

    def __init__(self, held: Mapping[str, TensorInfo]) -> None:
        self.held = held

    def __getitem__(self, name: str) -> tuple[TensorInfo, ...]:
        return (self.held[name],)

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


@dataclass(frozen=True)
class Source:
    """`tensors` holds each name of the table once for every model-parallel rank, in their order, or for those
    that have a share of it; `ranks` is 1 where files hold whole tensors. `told` are the hyper-parameters that
    a file of weights carries beside its tensors, None without any; `prefix` stood before every name. `copies`
    are further tensors that must equal one of `tensors`, by the file and the name of that. `layer` is the
    pattern that finds a layer's number in a name, where files say how many `layers` there are by names."""

    checkpoint: Checkpoint
    tensors: Mapping[str, tuple[TensorInfo, ...]]
    ranks: int
    layers: int
    told: Mapping[str, Any] | None = None
    prefix: str = ""
    stages: int = 1
    copies: Mapping[tuple[str, str], tuple[Home, ...]] = field(default_factory=dict)
    layer: str = ""

    def homes(self, name: str) -> list[Home]:
        """Where the tensor is and what it is called there, for each rank."""
        found = self.tensors.get(name, ())
        if len(found) == 1:
            return [(found[0].file, found[0].dtype, found[0].name)]
        return [(t.file, t.dtype, t.name) for t in found]

    def home(self, name: str) -> Home | None:
        """The first of them; None where it is nowhere."""
        found = self.tensors.held.get(name) if isinstance(self.tensors, Single) else self.first(name)
        return None if found is None else (found.file, found.dtype, found.name)

    def column(self, names: Sequence[str]) -> Column | None:
        """The same of many; None where they are not all there, or not in one file each."""
        if not isinstance(self.tensors, Single):
            return None
        found = list(map(self.tensors.held.get, names))
        if None in found:
            return None
        return list(map(_PLACE, found)), list(map(_NAME, found))

    def keeps(self, name: str, options: Options) -> bool:
        """Whether the tensor is there, and not asked to be left out."""
        found = self.tensors.get(name, ())
        return bool(found) and not all(t.name in options.drop for t in found)

    def kept_layers(self, options: Options) -> int:
        """How many layers there are without what is asked to be left out."""
        if not options.drop or not self.layer:
            return self.layers
        return layer_count((n for n in self.tensors if self.keeps(n, options)), self.layer)

    def first(self, name: str) -> TensorInfo | None:
        """The tensor as rank 0 holds it."""
        return next(iter(self.tensors.get(name, ())), None)

    def size(self, name: str, dimension: int, *, shared: bool = True) -> Value | None:
        """The size that most tensors called `name` ({i}: of any layer) have, over all ranks if `shared`."""
        names = [name.format(i=i) for i in range(self.layers)] if "{i}" in name else [name]
        found = [t for n in names for t in self.tensors.get(n, ())[:1] if len(t.shape) > dimension]
        if not found:
            return None
        each, _ = Counter(t.shape[dimension] for t in found).most_common(1)[0]
        what = ("rows", "columns")[dimension] if len(found[0].shape) == 2 else "length"
        ranks = max(len(self.tensors[n]) for n in names if n in self.tensors) if shared else 1
        over = f" over {ranks} ranks" if ranks > 1 else ""
        return Value(each * ranks, f"{what} of {found[0].name}{over}")

    @property
    def counted_layers(self) -> Value | None:
        return Value(self.layers, "layers in the tensor names") if self.layers else None

    @cached_property
    def dtype(self) -> str:
        """The safetensors name of the dtype that most of the floating numbers have; norms kept in a wider one
        may be more tensors than the matrices."""
        counts: Counter[str] = Counter()
        held = self.tensors
        first = held.held.values() if isinstance(held, Single) else (t for t, *_ in held.values())
        for (dtype, shape), tensors in Counter(map(_KIND, first)).items():
            counts[dtype] += prod(shape) * tensors * (dtype in FLOATS)
        for code in CODES if len(counts) > 1 else ():  # codes of weights are no numbers
            counts.pop(code, None)
        return counts.most_common(1)[0][0]


def whole_tensors(checkpoint: Checkpoint, layer: str, rename: Callable[[str], str] = str) -> Source:
    """Files of whole tensors. `layer` is a pattern that finds a layer's number in a name, `rename` gives the
    name of the table for that in the file. Kinds: `missing-tensor`, `duplicate-tensor`."""
    held = [f.tensors for f in checkpoint.files.values()]
    tensors: Mapping[str, TensorInfo] = held[0] if len(held) == 1 and rename is str else {}
    if len(held) > 1 and rename is str:
        tensors = dict(chain.from_iterable(one.items() for one in held))
    if rename is not str or len(tensors) < sum(map(len, held)):
        tensors = each_once(checkpoint, rename)
    if not tensors:
        fail("missing-tensor", "expected the tensors of a model, found none", file=checkpoint.path.name)
    return Source(checkpoint, Single(tensors), 1, layer_count(tensors, layer), layer=layer)


def each_once(checkpoint: Checkpoint, rename: Callable[[str], str] = str) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    problems = []
    for t in checkpoint:
        first = tensors.setdefault(rename(t.name), t)
        if first is not t:
            message = f"expected each tensor in one file, found it in {first.file} too"
            problems.append(Problem("duplicate-tensor", message, t.file, t.name))
    fail_all(problems)
    return tensors


MAX_LAYERS = 10_000
CODES = ("F8_E4M3", "F8_E5M2")


def layer_count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number of a layer. No model has MAX_LAYERS: a tensor of a later one is none
    of the layers', and left for the plan to refuse by name."""
    # A line for each name, none of which has a line's end; begun with one, which is quicker than re.M.
    numbered = re.compile(f"\n(?:{pattern})")
    assert numbered.groups == 1
    found: set[str] = set()
    left = iter(names)
    while batch := list(islice(left, 4096)):
        found.update(numbered.findall("\n".join(("", *batch))))
    return max((n + 1 for text in found if (n := int(text[:9])) < MAX_LAYERS), default=0)


def dtype_value(source: Source, options: Options) -> Value:
    """torch_dtype of the config: what the user asked for, else that of most numbers."""
    if options.dtype is not None:
        return Value(DTYPES[options.dtype].torch, "--dtype")
    return Value(DTYPES[source.dtype].torch, "dtype of the tensors")


def no_dtype(said: object, source: Source) -> bool:
    """Whether what a config.json says as its dtype is none that a model is loaded in ("auto", say), while its
    tensors have one."""
    known = [DTYPES[d].torch for d in CASTABLE]  # no set: what JSON holds may be no key
    return said is not None and dtype_said(said) not in known and source.dtype in CASTABLE


def dtype_said(said: object) -> object:
    """What a config.json says as its dtype, by the first of its names in torch: loaders take all of them."""
    text = said.removeprefix("torch.") if isinstance(said, str) else None
    return said if text is None else ALIASES.get(text, text)
