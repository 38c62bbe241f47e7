"""GPT-2 as Megatron-LM trains it, in the tensors of its own checkpoints, and its language-model head.

Source: Radford et al. 2019; Shoeybi et al. 2019 (arXiv 1909.08053); NVIDIA/Megatron-LM v1.0 to core_v0.9.0.
Names, versions and the rules for gelu are those of `ckpt_tool.reference.megatron`. The tensor-parallel ranks
stay apart as they do there: each computes its own heads, hidden units and words, and the partial results are
added or joined. Norms, positions and the biases after a sum are on every rank.

GPT2LMHeadModel has one value for each number used here, except that it cannot say
`apply_residual_connection_post_layernorm`, grouped queries or a head width that is not D/N.

B batch, T tokens, D model width, N query heads, G groups of heads (N unless queries are grouped), H head
width, F feed-forward width, V vocabulary, S ranks. Linear weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference import megatron
from ckpt_tool.reference.megatron import VERSION_0, VERSION_1

MASKED = -10000.0  # Megatron's score of a key that is not to be seen; its fused kernels exclude it exactly


@dataclass(frozen=True)
class Config(megatron.Config):
    @classmethod
    def from_original(
        cls,
        params: Mapping[str, Any],
        shapes: megatron.Shapes,
        ranks: int,
        overrides: Mapping[str, Any],
    ) -> Self:
        """`params` are the pickled args as plain values and `checkpoint_version`, each absent where the file
        has none; `shapes` those of rank 0, stages joined; `overrides` facts from the user under their Hugging
        Face names, which win. `vocab_size` there is the number of words without padding, by default all rows
        count. Without args: epsilon 1e-5; gelu tanh for version 0, as in the published v0.0. ValueError for
        what none of them tells, where they disagree, and for what this pass does not compute."""
        return cls.read(params, shapes, ranks, overrides, causal=True, gelu_of_version_0="tanh")


def forward(
    ids: Tensor,
    ranks: Sequence[Mapping[str, Tensor]],
    c: Config,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits (B, T, V). `mask` (B, T) is 1 for tokens and 0 for padding, `positions` (B, T) are 0, 1, 2, ...
    in every row by default."""
    x = embed(ids, ranks, c, positions=positions)
    for i in range(c.n_layers):
        x = layer(x, i, ranks, c, mask)
    return head(x, ranks, c)


def embed(
    ids: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config, *, positions: Tensor | None = None
) -> Tensor:
    """Each rank holds V/S whole words."""
    parts, first = [], 0
    for w in ranks:
        table = w[c.names.word + "weight"]  # (V/S, D)
        own = (first <= ids) & (ids < first + len(table))
        parts.append(torch.where(own[..., None], table[torch.where(own, ids - first, 0)], 0))
        first += len(table)
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)
    return all_reduce(parts) + ranks[0][c.names.position + "weight"][positions]


def layer(
    x: Tensor, i: int, ranks: Sequence[Mapping[str, Tensor]], c: Config, mask: Tensor | None = None
) -> Tensor:
    """Each rank normalises with its own copy of the norm weights, as it does in the original."""
    p, n, S = f"{c.names.block}{i}.", c.names, len(ranks)
    seen = visible(x, c, mask)
    y = [layer_norm(x, w, p + n.norm_1, c) for w in ranks]
    heads = all_reduce(attention(z, w, p, i, c, S, seen) for z, w in zip(y, ranks, strict=True))
    x = (y[0] if c.residual_of_norm else x) + heads + ranks[0][p + n.dense + "bias"]
    y = [layer_norm(x, w, p + n.norm_2, c) for w in ranks]
    units = all_reduce(feed_forward(z, w, p, c) for z, w in zip(y, ranks, strict=True))
    return (y[0] if c.residual_of_norm else x) + units + ranks[0][p + n.fc2 + "bias"]


def head(x: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    """The output layer is the word table: the copy of the last stage where there is one."""
    n = c.names
    parts = [layer_norm(x, w, n.final_norm, c) @ w[(n.head_word or n.word) + "weight"].T for w in ranks]
    return wide(torch.cat(parts, dim=-1))[..., : c.n_words]


def visible(x: Tensor, c: Config, mask: Tensor | None) -> Tensor:
    """Which keys (last axis) a query (the axis before) sees: (B or 1, 1, T, T)."""
    T = x.shape[1]
    seen = torch.ones(1, 1, T, T, dtype=torch.bool, device=x.device).tril()
    return seen if mask is None else seen & mask.bool()[:, None, None, :]


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, i: int, c: Config, S: int, seen: Tensor) -> Tensor:
    """The part of the sum over heads that this rank's heads contribute: (B, T, D)."""
    B, T, _ = x.shape
    q, k, v = split_qkv(linear(x, w, p + c.names.qkv), c, S)  # (B, T, N/S, H)
    number = i + 1 if c.layer_scaling else 1
    scores = torch.einsum("bqnh,bknh->bnqk", q / (math.sqrt(c.head_dim) * number), k)
    weights = (wide(scores) * number).masked_fill(~seen, MASKED).softmax(-1).to(x.dtype)
    heads = torch.einsum("bnqk,bknh->bqnh", weights, v)
    return heads.reshape(B, T, -1) @ w[p + c.names.dense + "weight"].T


def split_qkv(x: Tensor, c: Config, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of each head of a rank, (B, T, N/S, H) each, out of (B, T, (N + 2G)/S * H)."""
    B, T, _ = x.shape
    N, G, H = c.n_heads // S, c.n_groups // S, c.head_dim
    if c.qkv == VERSION_0:
        q, k, v = x.view(B, T, 3, N, H).unbind(2)
        return q, k, v
    if c.qkv == VERSION_1:
        q, k, v = x.view(B, T, N, H, 3).unbind(4)
        return q, k, v
    M = N // G  # queries of a group, followed by its key and its value
    groups = x.view(B, T, G, M + 2, H)
    q, k, v = groups[..., :M, :], groups[..., M, :], groups[..., M + 1, :]
    return q.reshape(B, T, N, H), k.repeat_interleave(M, dim=2), v.repeat_interleave(M, dim=2)


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    """The part of the sum over hidden units that this rank's F/S units contribute: (B, T, D)."""
    return gelu(linear(x, w, p + c.names.fc1), c.mlp_gelu) @ w[p + c.names.fc2 + "weight"].T


def linear(x: Tensor, w: Mapping[str, Tensor], stem: str) -> Tensor:
    return x @ w[stem + "weight"].T + w[stem + "bias"]


def layer_norm(x: Tensor, w: Mapping[str, Tensor], stem: str, c: Config) -> Tensor:
    y, gamma = wide(x), wide(w[stem + "weight"])
    y = y - y.mean(-1, keepdim=True)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + c.norm_eps)
    gamma = gamma + 1 if c.norm_from_zero else gamma
    return (y * gamma + w[stem + "bias"]).to(x.dtype)


def gelu(x: Tensor, variant: str) -> Tensor:
    y = wide(x)
    if variant == "erf":
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    else:
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * y * (1 + 0.044715 * y * y)))
    return y.to(x.dtype)


def all_reduce(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
