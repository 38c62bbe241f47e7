"""One side of a comparison: a reading of a layout (a module of reference/), its config, and lazy weights.

A forward pass is a row of phases, "embed", layer 0, 1, ..., "head", and the heads that there are besides
(reference/phases.py); each can be run alone, on any input.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import field, replace
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import ckpt_tool.reference as reference
import ckpt_tool.reference.phases as protocol
from ckpt_tool.checkpoint.arguments import read_arguments
from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.megatron import arguments, is_of_megatron
from ckpt_tool.checkpoint.pickle_records import plain
from ckpt_tool.checkpoint.run_documents import RUN_DOCUMENTS
from ckpt_tool.checkpoint.safe_yaml import read_yaml
from ckpt_tool.checkpoint.weight_sets import MODEL_ARGUMENTS, is_settings
from ckpt_tool.convert import canonical
from ckpt_tool.convert.copies import copied_rows
from ckpt_tool.convert.facts import class_of, shown
from ckpt_tool.convert.facts import read as read_facts
from ckpt_tool.convert.facts_classes import PACKED
from ckpt_tool.convert.facts_settings import overlaid
from ckpt_tool.convert.layer_axis import of_megatron
from ckpt_tool.convert.one_by_one import is_stacked
from ckpt_tool.records import dataclass
from ckpt_tool.verify import device as devices
from ckpt_tool.verify.casted import cast_forward
from ckpt_tool.verify.measure import Distance, Spread, distance, farthest, spread
from ckpt_tool.verify.packed_weights import PackedWeights, packed_in
from ckpt_tool.verify.pooled import pooled_original
from ckpt_tool.verify.prompts import Prompt
from ckpt_tool.verify.stacked import StackedCodes, StackedWeights
from ckpt_tool.verify.subject import Subject
from ckpt_tool.verify.weights import Weights, ranks_of

Phase = int | str  # a layer, or "embed", "head" or the name of a further head
Tree = protocol.Tree
Tensors = Mapping[str, Tensor]
NOTHING: Tensors = {}
MOST, LARGEST = 10_000, 1 << 31  # in a config.json that anything is computed by
# How keys begin that count what a model has, up to the first of these; labels may be more.
COUNTS = (
    "num_hidden",
    "num_attention",
    "num_key",
    "num_local",
    "num_experts",
    "num_feedforward",
    "n_layer",
    "n_head",
)
# What a pass over tensors, or with numbers, that do not fit raises.
BROKEN = (KeyError, IndexError, RuntimeError, ValueError, ArithmeticError)


def phase_text(phase: Phase) -> str:
    return phase if isinstance(phase, str) else f"layer {phase}"


@dataclass(frozen=True)
class Change:
    """Something done to one side in memory. `tensors` makes replacements out of the side's own tensors
    (KeyError or ValueError where it cannot be done), `config` are values of config.json to put in. Changes of
    one `kind` are so much alike that one stands for the others; those without stand for themselves."""

    name: str
    tensors: Callable[[Tensors], dict[str, Tensor]] = lambda w: {}
    config: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""


@dataclass(frozen=True)
class Side:
    """`raw` is config.json where this side has one, so that a `Change` can alter it."""

    module: ModuleType
    config: Any
    weights: tuple[Weights, ...]
    raw: Mapping[str, Any] = field(default_factory=dict)
    ranks: Sequence[Tensors] = ()

    def reading(self, given: protocol.Inputs = NOTHING) -> dict[Phase, protocol.Phase]:
        """The phases of the module for these further inputs."""
        found = self.module.phases(self.ranks, self.config, given)
        return {p.name if p.index is None or p.kind != "layer" else p.index: p for p in found}

    def fits(self, tokens: int) -> int:
        """The largest length up to `tokens` that a pass takes; 0 where it takes none."""
        found = getattr(self.module, "fits", None)
        return tokens if found is None else int(found(tokens, self.config))

    def padded(self, tokens: int, longest: int) -> int:
        """How many of `tokens` a row may have that is padded to `longest`."""
        found = getattr(self.module, "padding", None)
        return tokens if found is None else int(found(tokens, longest, self.config))

    @property
    def windows(self) -> list[int] | None:
        """How wide the windows of those layers are that have one; None where the reading knows of none."""
        found = getattr(self.config, "windows", None)
        return None if found is None else [w for w in found if w is not None]

    @property
    def vocabulary(self) -> int:
        """How many token ids there are; 0 where neither the reading nor config.json says it."""
        found = getattr(self.module, "vocabulary", None)
        said = self.raw.get("vocab_size") if found is None else found(self.config)
        return said if type(said) is int else 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a pass takes besides token ids."""
        found = getattr(self.module, "inputs", None)
        return () if found is None else tuple(found(self.ranks, self.config))

    @property
    def needed(self) -> frozenset[str]:
        """Those of `inputs` without which its class in the library gives nothing."""
        found = getattr(self.module, "needed", None)
        return frozenset() if found is None else frozenset(found(self.config))

    @property
    def unused(self) -> frozenset[str]:
        """Parameters that the class makes and no pass reads, so that a file may lack them."""
        found = getattr(self.module, "unused", None)
        return frozenset(() if found is None else found(self.config))

    def takes(self, given: protocol.Inputs) -> set[str]:
        """Those further inputs that a pass takes at all; the others are refused."""
        known = set()
        for name, x in given.items():
            with suppress(TypeError):
                self.reading({name: x})
                known.add(name)
        return known

    def kinds(self, givens: Iterable[Tensors] = (NOTHING,)) -> dict[Phase, str]:
        """The kind of each phase that a pass with any of these further inputs has: in order, heads last."""
        found: dict[Phase, str] = {}
        for given in givens:
            found |= {name: phase.kind for name, phase in self.reading(given).items()}
        return dict(sorted(found.items(), key=lambda item: item[1] == "head"))

    def heads(self, givens: Iterable[Tensors] = (NOTHING,)) -> list[str]:
        """Those beside "head" that the tensors hold, by the names of their logits in transformers."""
        return [str(name) for name, kind in self.kinds(givens).items() if kind == "head" and name != "head"]

    def has(self, phase: Phase, given: Tensors) -> bool:
        return phase in self.reading(given)

    @property
    def used(self) -> set[str]:
        return set().union(*(w.used for w in self.weights))

    def run(self, phase: Phase, x: Tree, given: Tensors = NOTHING) -> Tree:
        """The output of one phase: x is ids (B, T) for the first, else what the phase before gave. `given`
        are further inputs by name, the batch first. KeyError for a phase that this side does not have."""
        with torch.inference_mode(), devices.blameless():
            return self.reading(given)[phase].run(x)

    def forward(self, ids: Tensor, given: Tensors = NOTHING) -> Tensor:
        """Logits (B, T, V), one phase after the other."""
        out: Tensor = self.run("head", self.encode(ids, given))
        return out

    def outputs(self, ids: Tensor, given: Tensors = NOTHING) -> dict[str, Tensor]:
        """The logits of every head of one pass that gives any; those of `forward` are "head"."""
        with torch.inference_mode(), devices.blameless():
            found = protocol.outputs(list(self.reading(given).values()), ids)
        return {name: y for name, y in found.items() if holds_numbers(y)}

    def encode(self, ids: Tensor, given: Tensors = NOTHING) -> Tree:
        """The last layer's output, (B, T, D) in most."""
        with torch.inference_mode(), devices.blameless():
            return protocol.trunk(list(self.reading(given).values()), ids)

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Tensors read inside stay in memory until the end of the block."""
        with ExitStack() as stack:
            for w in self.weights:
                stack.enter_context(w.keep())
            yield

    def changed(self, change: Change) -> Side:
        """This side with `change` made to it; only for the converted side, which is one mapping."""
        (own,) = self.ranks
        with torch.inference_mode(), devices.blameless():
            made = change.tensors(own)
        config, raw = self.config, self.raw
        if change.config:
            raw = with_values(raw, change.config)
            config = type(self.config).from_hf(raw)
        return replace(self, config=config, raw=raw, ranks=(ChainMap(made, own),))  # type: ignore[arg-type]

    def computed_in(self, dtype: torch.dtype) -> Side:
        """This side's own weights, computed in another dtype."""
        weights = tuple(w.computed_in(dtype) for w in self.weights)
        return replace(self, weights=weights, ranks=weights)


def tensors(prompt: Prompt, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Its ids and its further inputs."""
    given = {name: torch.tensor(rows, device=device) for name, rows in prompt.given.items()}
    return torch.tensor(prompt.ids, device=device), given


@dataclass(frozen=True)
class Sample:
    """One prompt at one phase: what goes in, and what the reference makes of it. `variances` are those of all
    prompts for each tensor of the result that has only one row (C,) for each row of the prompt (see
    `variances_of`); None for the others."""

    x: Tree
    wanted: Tree
    given: Tensors = field(default_factory=dict)
    variances: tuple[float | None, ...] = ()

    @property
    def tokens(self) -> int:
        return max(t.shape[1] for t in protocol.leaves(self.x) if t.ndim > 1)

    def of(self, found: Tree) -> Distance:
        """How far `found` is from `wanted`, padding aside; of several tensors the largest of each number, and
        infinite where they are other trees, are not equal in what is no floating number, or hold nothing."""
        wanted, other = protocol.leaves(self.wanted), protocol.leaves(found)
        if not wanted or _skeleton(found) != _skeleton(self.wanted):
            return Distance(math.inf, math.inf, 0, 0.0)
        variances = self.variances or (None,) * len(wanted)
        with devices.blameless():
            pairs = zip(other, wanted, variances, self._spreads, strict=True)
            return farthest(self._between(*pair) for pair in pairs)

    def _between(
        self, found: Tensor, wanted: Tensor, variance: float | None, known: Spread | None
    ) -> Distance:
        if known is None:
            return (
                Distance(0.0, 0.0, 0, 0.0)
                if torch.equal(found, wanted)
                else Distance(math.inf, math.inf, 0, 0.0)
            )
        return distance(self.real(found), self.real(wanted), variance, known)

    @cached_property
    def _spreads(self) -> list[Spread | None]:
        """Of each tensor of what is wanted, which several results are held against; None of those that only
        are equal or not: positions, say, or a cache that is empty."""
        return [
            spread(self.real(t)) if t.is_floating_point() and t.numel() else None
            for t in protocol.leaves(self.wanted)
        ]

    def real(self, y: Tensor) -> Tensor:
        """The positions of `y` that are not padding, row after row: (1, positions, C)."""
        if y.ndim <= 2:
            return y.reshape(1, len(y), -1)
        mask = mask_of(self.given, len(y), y.shape[1], grouped=y.ndim == 3)
        y = y.flatten(2)
        return y if mask is None else y[mask][None]


def mask_of(given: Tensors, rows: int, length: int, *, grouped: bool = True) -> Tensor | None:
    """Which positions of a stream of that length are no padding, (rows, length); None where nothing tells.

    A stream is one of words, or of entities, or of the entities after the words, or one in which each
    position stands for the same number of words (`grouped`), a last group that is not whole left out: such a
    position is real where any of its words is."""
    words, named = given.get("mask"), given.get("entity_mask")
    for mask in (words, named):
        if mask is not None and mask.shape == (rows, length):
            return mask.bool()
    if words is None or len(words) != rows or not grouped:
        return None
    tokens = words.shape[1]
    if named is not None and length == tokens + named.shape[1]:
        return torch.cat([words, named], 1).bool()
    group = tokens // length if 0 < length < tokens else 0
    if group > 1 and tokens // group == length:
        return words[:, : group * length].reshape(rows, length, group).bool().any(-1)
    return None


def holds_numbers(y: Tree) -> bool:
    """Whether there is anything in a result: that of entities has nothing where there are none."""
    return any(t.numel() > 0 for t in protocol.leaves(y))


def _skeleton(x: Tree) -> Tree:
    """What a tree is without the values of its tensors."""
    return protocol.mapped(lambda t: t.is_floating_point(), x)


def same(one: Tree, other: Tree) -> bool:
    pairs = zip(protocol.leaves(one), protocol.leaves(other), strict=False)
    return bool(_skeleton(one) == _skeleton(other)) and all(torch.equal(a, b) for a, b in pairs)


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with other values, also where transformers 5 keeps the rotary ones."""
    made = {**config, **values}
    newer = values.get("rope_parameters", config.get("rope_parameters"))
    if isinstance(newer, Mapping):
        if "rope_theta" in values:
            newer = {**newer, "rope_theta": values["rope_theta"]}
        if "rope_scaling" in values:
            newer = {"rope_theta": newer.get("rope_theta"), **(values["rope_scaling"] or {})}
        made["rope_parameters"] = newer
        made.pop("rope_theta", None)
        made.pop("rope_scaling", None)
    return made


def original_side(subject: Subject, dtype: torch.dtype, device: str) -> Side:
    """The original's own reading, of its pooled heads where the conversion was asked to pool them, of weights
    cast as it was asked to cast them. ValueError where the facts in its files and settings are not enough."""
    assert subject.original is not None and subject.family is not None
    if subject.keeps_layout:
        return _same_layout(subject, dtype, device)
    pooled = pooled_original(subject.original, subject.plan)
    checkpoint = cast_forward(pooled, subject.plan) if subject.direction == "to-hf" else pooled
    module = reference.original(subject.family.name)
    staged = getattr(module, "STAGED", False) or any(map(is_of_megatron, checkpoint.files))
    ranks = ranks_of(checkpoint, stages=staged)
    shapes = {name: info.shape for name, info in ranks[0].items()}
    told = _plain(dict(subject.settings), checkpoint, subject.settings)
    if pooled is not subject.original:
        told["num_key_value_heads"] = subject.config["num_key_value_heads"]
    if staged and subject.config.get("vocab_size"):
        told.setdefault("vocab_size", subject.config["vocab_size"])  # rows of padding are not compared
    if subject.plan is not None and (rows := copied_rows(subject.plan.steps)):
        told["copied_rows"] = rows
    facts = _plain(_facts(checkpoint, subject.family.document), checkpoint, subject.settings)
    config = module.Config.from_original(facts, shapes, len(ranks), told)
    return side_of(module, config, checkpoint, ranks, dtype, device, original=True, settings=subject.settings)


def _same_layout(subject: Subject, dtype: torch.dtype, device: str) -> Side:
    """The Hugging Face layout's reading of a source that has it already, by its own config.json."""
    assert subject.original is not None and subject.family is not None
    source = canonical.as_class_writes(cast_forward(subject.original, subject.plan), subject.family)
    config = _plain(overlaid(source.json("config.json"), subject.settings), source, subject.settings)
    (architecture, *_) = config.get("architectures") or subject.config.get("architectures") or [""]
    module = reference.converted(str(architecture))
    _within_reason(config)
    made = module.Config.from_hf(config)
    return side_of(module, made, source, ranks_of(source), dtype, device, config, settings=subject.settings)


def converted_side(subject: Subject, dtype: torch.dtype, device: str) -> Side:
    """The reading of the Hugging Face layout by config.json, and on the way back by what the user says now
    against it, with which the output was planned."""
    assert subject.hf is not None
    back, insisted = subject.direction == "to-original", subject.recorded.insisted
    given = {k: v for k, v in subject.settings.items() if back and (v is None or k in insisted)}
    (architecture, *_) = subject.config.get("architectures") or [""]
    module = reference.converted(str(architecture))
    _within_reason(subject.config)
    said = overlaid(subject.config, given) if given else subject.config
    read = _plain(said, subject.hf, subject.settings)
    config = module.Config.from_hf(read)
    checkpoint = subject.hf if subject.direction == "to-hf" else cast_forward(subject.hf, subject.plan)
    return side_of(
        module, config, checkpoint, ranks_of(checkpoint), dtype, device, read, settings=subject.settings
    )


def _within_reason(config: Mapping[str, Any]) -> None:
    """ValueError for a number beyond those of any model, which would be taken for so much memory, or for none
    of what every model has."""
    kind = class_of(config)
    for name, m in read_facts(config, kind).numbers.items() if kind is not None else ():
        counted = name.startswith(COUNTS)
        least, most = (1, MOST) if counted else (-LARGEST, LARGEST)
        for key, x in (m.value if isinstance(m.value, Mapping) else {name: m.value}).items():
            if isinstance(x, int | float) and not least <= x <= most:
                bound = f"at least {least:,}" if x < least else f"at most {most:,}"
                raise ValueError(f"expected {key} of {bound}, found {shown(x)}")


def side_of(
    module: ModuleType,
    config: Any,
    checkpoint: Checkpoint,
    ranks: Sequence[Mapping[str, TensorInfo]],
    dtype: torch.dtype,
    device: str,
    raw: Mapping[str, Any] | None = None,
    *,
    original: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Side:
    """`module` over the tensors of `checkpoint` in each rank, computed in `dtype`; quantised weights are read
    by the formula of the layout, the `original` one or the library's. `usage` where the device is missing."""
    devices.check(device)
    make: Callable[..., Weights] = Weights
    if (inventory := packed_in(checkpoint, settings or {})) is not None:
        make = partial(PackedWeights, inventory=inventory, original=original)
    if is_stacked(checkpoint):
        of = (
            StackedWeights
            if inventory is None
            else partial(StackedCodes, inventory=inventory, original=original)
        )
        make = partial(of, apart=module.apart)
    weights = tuple(make(checkpoint, names, dtype, device) for names in ranks)
    return Side(module, config, weights, raw or {}, weights)


def _plain(said: dict[str, Any], checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a document says of the model once its quantised weights are read as numbers."""
    if packed_in(checkpoint, settings) is None:
        return said
    return {k: v for k, v in said.items() if k not in PACKED}


def _facts(checkpoint: Checkpoint, document: str | None) -> dict[str, Any]:
    """What the publisher says about the model: params.json or the like, the pickle that is the family's
    `document`, or what the weight files carry beside the tensors, pickled args as plain values among it."""
    if of_megatron(checkpoint.names()):
        runs = [d for name, d in checkpoint.documents.items() if name in RUN_DOCUMENTS]
        return {**{d.name: read_yaml(d.read(), file=d.name) for d in runs}, **_carried(checkpoint)}
    for name in ("params.json", *filter(is_settings, checkpoint.documents), "config.json", "metadata.json"):
        if name in checkpoint.documents:
            return checkpoint.json(name)
    if document == MODEL_ARGUMENTS and document in checkpoint.documents:
        return read_arguments(checkpoint.documents[MODEL_ARGUMENTS])
    return _carried(checkpoint)


def _carried(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the files of weights hold beside the tensors."""
    first = next(iter(checkpoint.files.values()))
    found = {k: plain(v) for f in checkpoint.files.values() for k, v in f.metadata.items()}
    return {**found, **(arguments(first) or {})}
