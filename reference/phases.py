"""The protocol of a reading: a forward pass as named phases in order, each a function from any tree of
tensors to another: a tensor, or a tuple, list, dict or dataclass of trees, with numbers and None among them.

The first phase takes the token ids and each later one what the one before gave, so that a stack may change
the length of its sequence, or carry two streams. Heads all start from what the last phase that is not a head
has given, and give one tensor, the batch first.

A pass that takes the input `past`, an empty dict at first, keeps in it what later tokens need of these: the
next pass with the same dict gets the tokens after them alone. What it keeps are trees with the batch first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from inspect import signature
from typing import Any

from torch import Tensor

Tree = Any
Ranks = Sequence[Mapping[str, Tensor]]
Inputs = Mapping[str, Any]  # tensors, and `past`: what a pass takes besides token ids, by name
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
    into_embed, into_layer = taken(embed, inputs), taken(layer, inputs)
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


def taken(function: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    """Those inputs that the function has a parameter for."""
    return {name: x for name, x in inputs.items() if name in _parameters(function)} if inputs else {}


@lru_cache(maxsize=64)
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(signature(function).parameters)


def passes(phases: Callable[..., list[Phase]]) -> tuple[Callable[..., Tree], Callable[..., Tree]]:
    """`forward(ids, ranks, c)` and `encode(ids, ranks, c)` of a reading: what its head gives, and what all
    heads start from. Both take further inputs by name, None where there is none; where ids are (B, C, T),
    rows of C choices, so are the inputs, and what `encode` gives begins with (B, C) where it begins with
    the batch otherwise."""

    def forward(ids: Tensor, ranks: Ranks, c: Any, **inputs: Tensor | None) -> Tree:
        return run(phases(ranks, c, given(**inputs)), ids)

    def encode(ids: Tensor, ranks: Ranks, c: Any, **inputs: Tensor | None) -> Tree:
        flat = {name: x.flatten(0, ids.ndim - 2) for name, x in given(**inputs).items()}
        x = trunk(phases(ranks, c, flat), ids.flatten(0, -2))
        return x if ids.ndim == 2 else mapped(lambda t: t.view(*ids.shape[:-1], *t.shape[1:]), x)

    return forward, encode


def given(**inputs: Tensor | None) -> dict[str, Tensor]:
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


def mapped(function: Callable[[Tensor], Any], x: Tree) -> Tree:
    """The same tree of what `function` makes of each tensor, those of a dict in the order of their names;
    what is no tensor stays."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {name: mapped(function, x[name]) for name in sorted(x, key=str)}
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: mapped(function, getattr(x, f.name)) for f in fields(x)})
    if isinstance(x, list | tuple):
        parts = [mapped(function, part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


def leaves(x: Tree) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(found.append, x)
    return found
