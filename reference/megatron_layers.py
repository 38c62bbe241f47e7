"""A layer of BERT and GPT-2 as Megatron-LM computes it, from checkpoints of every age and by every rank.

Source: Shoeybi et al. 2019 (arXiv 1909.08053), whose order of norms this is: one before each branch and one
at the end, none after the embeddings; NVIDIA/Megatron-LM v1.0 to core_v0.9.0. The tensor-parallel ranks stay
apart as they do there: each computes its own heads, hidden units and words, and the partial results are added
or joined. Norms, positions, token types, the biases after a sum, and what follows the last layer but for the
words, are on every rank.

B batch, T tokens, D model width, N query heads, G groups of heads (N unless queries are grouped), H head
width, F feed-forward width, V vocabulary, S ranks. Linear weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ckpt_tool.reference.blocks import (
    activate,
    affine,
    all_reduce,
    layer_norm,
    products,
    split_fused,
    weigh,
    words,
)
from ckpt_tool.reference.megatron import Config
from ckpt_tool.reference.phases import Ranks

MASKED = -10000.0  # Megatron's score of a key that is not to be seen; its fused kernels exclude it exactly


def embedded(ids: Tensor, ranks: Ranks, c: Config, positions: Tensor | None = None) -> Tensor:
    """Words and positions, which are 0, 1, 2, ... by default."""
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)
    x = words(ids, [w[c.names.word + "weight"] for w in ranks])
    return x + ranks[0][c.names.position + "weight"][positions]


def norm(x: Tensor, w: Mapping[str, Tensor], stem: str, c: Config) -> Tensor:
    return layer_norm(x, w, stem, c.norm_eps, c.norm_from_zero)


def transformed(x: Tensor, i: int, ranks: Ranks, c: Config, seen: Tensor) -> Tensor:
    """Each rank normalises with its own copy of the norm weights, as it does in the original."""
    p, n, S = f"{c.names.block}{i}.", c.names, len(ranks)
    y = [norm(x, w, p + n.norm_1, c) for w in ranks]
    heads = all_reduce(attention(z, w, p, i, c, S, seen) for z, w in zip(y, ranks, strict=True))
    x = (y[0] if c.residual_of_norm else x) + heads + ranks[0][p + n.dense + "bias"]
    y = [norm(x, w, p + n.norm_2, c) for w in ranks]
    units = all_reduce(feed_forward(z, w, p, c) for z, w in zip(y, ranks, strict=True))
    return (y[0] if c.residual_of_norm else x) + units + ranks[0][p + n.fc2 + "bias"]


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, i: int, c: Config, S: int, seen: Tensor) -> Tensor:
    """The part of the sum over heads that this rank's heads contribute: (B, T, D)."""
    q, k, v = split_fused(affine(x, w, p + c.names.qkv), c.n_heads // S, c.n_groups // S, c.qkv)
    k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], dim=2) for y in (k, v))  # (B, T, N/S, H)
    number = i + 1 if c.layer_scaling else 1
    scores = products(q / (math.sqrt(c.head_dim) * number), k)
    return weigh(scores, v, seen, MASKED, number) @ w[p + c.names.dense + "weight"].T


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    """The part of the sum over hidden units that this rank's F/S units contribute: (B, T, D)."""
    return activate(affine(x, w, p + c.names.fc1), c.mlp_gelu) @ w[p + c.names.fc2 + "weight"].T
