"""The protocol of a reading: a forward pass as named phases in order, each a function from any tree of
tensors to another.

The first phase takes the token ids and each later one what the one before gave, so that a stack may change
the length of its sequence, carry two streams, or keep a cache beside its activations: what goes from phase to
phase is a tensor, or a tuple, list or dict of such trees. Heads do not follow on each other: all of them
start from what the last phase that is not a head has given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor

Tree = Any  # a tensor, or a tuple, list or dict of trees
Ranks = Sequence[Mapping[str, Tensor]]
Inputs = Mapping[str, Tensor]  # what a pass takes besides token ids, by name
NOTHING: Inputs = {}


@dataclass(frozen=True)
class Phase:
    """`kind` is "embed", "layer" or "head"; `index` counts those of its kind that are numbered, from 0. The
    head whose logits `forward` gives has the name "head"."""

    name: str
    kind: str
    index: int | None
    run: Callable[[Tree], Tree]


def decoder_phases(
    embed: Callable[..., Tree],
    layer: Callable[..., Tree],
    heads: Mapping[str, Callable[..., Tree]],
    ranks: Ranks,
    c: Any,
    inputs: Inputs,
) -> list[Phase]:
    """Those of the usual stack: `embed(ids, ranks, c)`, `c.n_layers` times `layer(x, i, ranks, c)`, and
    heads(x, ranks, c). The first two get those of `inputs` that they have a parameter for; TypeError for an
    input that neither takes, as it would be ignored."""
    into_embed, into_layer = _taken(embed, inputs), _taken(layer, inputs)
    if unknown := sorted(inputs.keys() - into_embed.keys() - into_layer.keys()):
        raise TypeError(f"expected no inputs {', '.join(unknown)}, as this pass takes none of them")

    def nth(i: int) -> Callable[[Tree], Tree]:
        return lambda x: layer(x, i, ranks, c, **into_layer)

    def last(head: Callable[..., Tree]) -> Callable[[Tree], Tree]:
        return lambda x: head(x, ranks, c)

    return [
        Phase("embed", "embed", None, lambda ids: embed(ids, ranks, c, **into_embed)),
        *(Phase(f"layer {i}", "layer", i, nth(i)) for i in range(c.n_layers)),
        *(Phase(name, "head", None, last(head)) for name, head in heads.items()),
    ]


def _taken(function: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    known = signature(function).parameters
    return {name: x for name, x in inputs.items() if name in known}


def given(**inputs: Tensor | None) -> dict[str, Tensor]:
    """Those that are there."""
    return {name: x for name, x in inputs.items() if x is not None}


def trunk(phases: Sequence[Phase], x: Tree) -> Tree:
    """What the heads start from."""
    for phase in phases:
        if phase.kind != "head":
            x = phase.run(x)
    return x


def outputs(phases: Sequence[Phase], x: Tree) -> dict[str, Tree]:
    """What every head of one pass gives, by its name."""
    x = trunk(phases, x)
    return {phase.name: phase.run(x) for phase in phases if phase.kind == "head"}


def run(phases: Sequence[Phase], x: Tree) -> Tree:
    """What the head of that name gives."""
    return next(p for p in phases if p.name == "head").run(trunk(phases, x))
