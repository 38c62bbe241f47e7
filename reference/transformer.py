"""The transformer of GPT-2, BERT and OPT as its model-parallel training programs compute it: layer norms,
learned positions, a bias in every linear layer. A family says in its own module which numbers, names and
traits it has.

Source: Vaswani et al. 2017; Shoeybi et al. 2019 (arXiv 1909.08053), whose order of norms it is by default:
one before each branch and one at the end; NVIDIA/Megatron-LM v1.0 to core_v0.9.0; facebookresearch/metaseq
@f2cd3679. The tensor-parallel ranks stay apart as they do there: each computes its own heads, hidden units
and words, and the partial results are added or joined. Norms, positions and the biases after a sum are on
every rank.

B batch, T tokens, D model width, N query heads, G groups of heads (N unless queries are grouped), H head
width, F feed-forward width, V vocabulary, S ranks. Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ckpt_tool.reference.blocks import (
    Past,
    Tensors,
    activate,
    affine,
    all_reduce,
    before,
    layer_norm,
    products,
    recalled,
    split_fused,
    weigh,
    words,
)
from ckpt_tool.reference.phases import Ranks


@dataclass(frozen=True)
class Config:
    """`names` are stems, names without `weight` or `bias`, by what they are for; those of a layer follow
    `block`, its number and a dot."""

    n_layers: int
    n_heads: int  # of the whole model, as all counts here
    n_groups: int  # of heads that share a key and a value; as many as heads but with grouped queries
    norm_eps: float
    activation: str  # relu, or gelu as it is defined ("erf") or approximated ("tanh")
    names: Mapping[str, str] = field(repr=False)
    order: str | None  # of the rows of a fused query, key and value (blocks.split_fused); None: three tensors
    masked: float | None  # the score of a key that is not seen; None: the lowest that the dtype has
    pre_norm: bool = True  # norms come before each branch, else after each sum
    residual_of_norm: bool = False  # what is added to a branch is its normalised input, not its input
    norm_from_zero: bool = False  # norms store their weight less one
    layer_scaling: bool = False  # scores are divided by the layer's number, and multiplied again in float32
    n_words: int | None = None  # rows of the vocabulary that count; those after are padding


def embed(
    ids: Tensor, ranks: Ranks, c: Config, *, positions: Tensor | None = None, past: Past | None = None
) -> Tensor:
    """Words, and positions, which are 0, 1, 2, ... by default, or go on from those before."""
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device) + before(past)
    x = words(ids, [w[c.names["word"] + "weight"] for w in ranks])
    return x + ranks[0][c.names["position"] + "weight"][positions]


def norm(x: Tensor, w: Tensors, stem: str, c: Config) -> Tensor:
    return layer_norm(x, w, stem, c.norm_eps, c.norm_from_zero)


def transformed(x: Tensor, i: int, ranks: Ranks, c: Config, seen: Tensor, past: Past | None = None) -> Tensor:
    """One layer. Each rank normalises with its own copy of the norm weights, as it does in the original."""
    p, n, S = f"{c.names['block']}{i}.", c.names, len(ranks)
    y = [norm(x, w, p + n["norm_1"], c) if c.pre_norm else x for w in ranks]
    pairs = enumerate(zip(y, ranks, strict=True))
    heads = all_reduce(attention(z, w, p, (i, r), c, S, seen, past) for r, (z, w) in pairs)
    x = (y[0] if c.residual_of_norm else x) + heads + ranks[0][p + n["dense"] + "bias"]
    y = [norm(x, w, p + n["norm_2" if c.pre_norm else "norm_1"], c) for w in ranks]
    units = all_reduce(feed_forward(z, w, p, c) for z, w in zip(y, ranks, strict=True))
    x = (x if c.pre_norm and not c.residual_of_norm else y[0]) + units + ranks[0][p + n["fc2"] + "bias"]
    return x if c.pre_norm else norm(x, ranks[0], p + n["norm_2"], c)


def attention(
    x: Tensor,
    w: Tensors,
    p: str,
    place: tuple[int, int],
    c: Config,
    S: int,
    seen: Tensor,
    past: Past | None,
) -> Tensor:
    """The part of the sum over heads that this rank's heads contribute: (B, T, D). `place` is the layer and
    the rank."""
    if c.order is None:
        parts = (affine(x, w, p + c.names[name]) for name in "qkv")
        q, k, v = (torch.unflatten(y, -1, (c.n_heads // S, -1)) for y in parts)  # (B, T, N/S, H)
    else:
        q, k, v = split_fused(affine(x, w, p + c.names["qkv"]), c.n_heads // S, c.n_groups // S, c.order)
    k, v = recalled(past, place, k, v)
    k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], dim=2) for y in (k, v))
    number = place[0] + 1 if c.layer_scaling else 1
    scores = products(q / (q.shape[-1] ** 0.5 * number), k)
    masked = torch.finfo(x.dtype).min if c.masked is None else c.masked
    return weigh(scores, v, seen, masked, number) @ w[p + c.names["dense"] + "weight"].T


def feed_forward(x: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    """The part of the sum over hidden units that this rank's F/S units contribute: (B, T, D)."""
    return activate(affine(x, w, p + c.names["fc1"]), c.activation) @ w[p + c.names["fc2"] + "weight"].T
