"""One side of a comparison: a reading of a layout (a module of reference/), its config, and lazy weights.

A forward pass is a row of phases, "embed", layer 0, 1, ... and "head"; each can be run alone, on any input.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import ckpt_tool.reference as reference
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.verify.subject import Subject
from ckpt_tool.verify.weights import Weights, ranks_of

Phase = int | str  # a layer, or "embed" or "head"
Tensors = Mapping[str, Tensor]


def phase_text(phase: Phase) -> str:
    return phase if isinstance(phase, str) else f"layer {phase}"


@dataclass(frozen=True)
class Change:
    """Something done to one side in memory. `tensors` makes replacements out of the side's own tensors
    (KeyError or ValueError where it cannot be done), `config` are values of config.json to put in."""

    name: str
    tensors: Callable[[Tensors], dict[str, Tensor]] = lambda w: {}
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """`raw` is config.json where this side has one, so that a `Change` can alter it."""

    module: ModuleType
    config: Any
    weights: tuple[Weights, ...]
    raw: Mapping[str, Any] = field(default_factory=dict)
    ranks: Sequence[Tensors] = ()

    @property
    def phases(self) -> list[Phase]:
        return ["embed", *range(self.config.n_layers), "head"]

    @property
    def used(self) -> set[str]:
        return set().union(*(w.used for w in self.weights))

    def run(self, phase: Phase, x: Tensor) -> Tensor:
        """The output of one phase: x is ids (B, T) for "embed", else (B, T, D)."""
        with torch.inference_mode():
            if phase == "embed":
                out: Tensor = self.module.embed(x, self.ranks, self.config)
            elif phase == "head":
                out = self.module.head(x, self.ranks, self.config)
            else:
                out = self.module.layer(x, phase, self.ranks, self.config)
            return out

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V), one phase after the other."""
        x = ids
        for phase in self.phases:
            x = self.run(phase, x)
        return x

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
        with torch.inference_mode():
            made = change.tensors(own)
        config = self.config
        if change.config:
            config = type(self.config).from_hf(with_values(self.raw, change.config))
        return replace(self, config=config, ranks=(ChainMap(made, own),))  # type: ignore[arg-type]


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with other values, also where transformers 5 keeps the rotary ones."""
    made = {**config, **values}
    newer = config.get("rope_parameters")
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
    """The source's own reading. ValueError where the facts in its files and settings are not enough."""
    assert subject.original is not None and subject.family is not None
    checkpoint = subject.original
    module = reference.original(subject.family.name)
    ranks = ranks_of(checkpoint)
    shapes = {name: info.shape for name, info in ranks[0].items()}
    config = module.Config.from_original(_facts(checkpoint), shapes, len(ranks), subject.settings)
    return _side(module, config, checkpoint, dtype, device)


def converted_side(subject: Subject, dtype: torch.dtype, device: str) -> Side:
    """The reading of the Hugging Face layout by config.json alone."""
    assert subject.hf is not None
    (architecture, *_) = subject.config.get("architectures") or [""]
    module = reference.converted(str(architecture))
    config = module.Config.from_hf(subject.config)
    return _side(module, config, subject.hf, dtype, device, subject.config)


def _side(
    module: ModuleType,
    config: Any,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str,
    raw: Mapping[str, Any] | None = None,
) -> Side:
    weights = tuple(Weights(checkpoint, names, dtype, device) for names in ranks_of(checkpoint))
    return Side(module, config, weights, raw or {}, weights)


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the publisher says about the model: params.json, or what the weight files carry beside the
    tensors."""
    for name in ("params.json", "config.json"):
        if name in checkpoint.documents:
            return checkpoint.json(name)
    return {k: v for f in checkpoint.files.values() for k, v in f.metadata.items()}
