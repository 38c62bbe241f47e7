"""Mixtral (8x7B, 8x22B) as Mistral AI published it, in either of its two sets of names.

Source: Jiang et al. 2024 (arXiv 2401.04088) and mistralai/mistral-inference @2557e12d and @b8181901. One
expert per tensor, `feed_forward.experts.{e}.w1.weight`, is what that code loads; the first download, eight
files of different tensors, stacks all experts of a layer in one: `block_sparse_moe.w1` (read by
ml-explore/mlx-examples @1120adab). The files of one download together are one mapping.

B batch, T tokens, D model width, N query heads, K key/value heads, H head width, F feed-forward width,
V vocabulary, E experts, A experts a token is sent to, W window. Linear weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import silu


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    # per layer, how many keys a query sees, its own included; None sees all before it
    windows: tuple[int | None, ...]
    n_experts: int
    n_experts_per_token: int
    stacked: bool  # all experts of a layer in one tensor

    @classmethod
    def from_original(
        cls,
        params: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        ranks: int,
        overrides: Mapping[str, Any],
    ) -> Self:
        """`params` is params.json with Mistral AI's or Hugging Face keys, `shapes` those of all tensors,
        `overrides` facts from the user under their Hugging Face names, which win. ValueError for what
        none of them tells or where they disagree."""
        params, overrides = params.get("model", params), _settings(overrides)
        if ranks != 1:
            raise ValueError(f"expected one rank (Mistral AI's files are not model-parallel), found {ranks}")
        params = {**params, **(params.get("moe") or {})}
        dim = int(_fact("dim", "hidden_size", params, overrides))
        n_layers = int(_fact("n_layers", "num_hidden_layers", params, overrides))
        n_heads = int(_fact("n_heads", "num_attention_heads", params, overrides))
        windows = _windows(params, overrides, n_layers)
        # The first release has no rope_theta and means what its code had: 10000 with a sliding window,
        # 1000000 without (@b8181901).
        theta = 1e4 if any(windows + _windows(params, {}, n_layers)) else 1e6
        # Both published models send a token to two experts; a file with Hugging Face keys leaves it out.
        top = _fact("num_experts_per_tok", "num_experts_per_tok", params, overrides, 2)
        c = cls(
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=int(_fact("n_kv_heads", "num_key_value_heads", params, overrides, n_heads)),
            head_dim=int(_fact("head_dim", "head_dim", params, overrides, dim // n_heads)),
            norm_eps=float(_fact("norm_eps", "rms_norm_eps", params, overrides)),
            rope_theta=float(_fact("rope_theta", "rope_theta", params, overrides, theta)),
            windows=windows,
            n_experts=int(_fact("num_experts", "num_local_experts", params, overrides)),
            n_experts_per_token=int(top),
            stacked="layers.0.block_sparse_moe.w1" in shapes,
        )
        if c.n_heads % c.n_kv_heads:
            raise ValueError(
                f"expected n_heads a multiple of n_kv_heads, found {c.n_heads} and {c.n_kv_heads}"
            )
        gate = "block_sparse_moe.gate" if c.stacked else "feed_forward.gate"
        rows = {
            "attention.wq": n_heads * c.head_dim,
            "attention.wk": c.n_kv_heads * c.head_dim,
            gate: c.n_experts,
        }
        for name, count in rows.items():
            name, wanted = f"layers.0.{name}.weight", (count, dim)
            if (found := tuple(shapes.get(name, ()))) != wanted:
                raise ValueError(f"expected `{name}` of shape {wanted}, found {found}")
        return c


def _settings(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """`overrides` in the names of transformers 4: 5 keeps theta in `rope_parameters`. ValueError
    for scaled frequencies, which no Mixtral has."""
    newer = overrides.get("rope_parameters") or {}
    scaling = newer or overrides.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(f"expected rope_type `default`, found `{kind}`")
    return {"rope_theta": newer.get("rope_theta"), **overrides}


def _fact(
    name: str, hf_name: str, params: Mapping[str, Any], overrides: Mapping[str, Any], default: Any = None
) -> Any:
    for key, facts in ((hf_name, overrides), (name, params), (hf_name, params)):
        if facts.get(key) is not None:
            return facts[key]
    if default is None:
        raise ValueError(f"expected `{name}` in params.json or `{hf_name}` given by name, found neither")
    return default


def _windows(
    params: Mapping[str, Any], overrides: Mapping[str, Any], n_layers: int
) -> tuple[int | None, ...]:
    """One window, perhaps a string, or a list that is repeated over the layers; newer files have
    `_sliding_window`."""
    if "sliding_window" in overrides:
        given = overrides["sliding_window"]
    else:
        given, newer = params.get("sliding_window"), params.get("_sliding_window")
        if given is not None and newer is not None:
            raise ValueError(
                "expected one of `sliding_window` and `_sliding_window` in params.json, found both"
            )
        given = newer if given is None else given
    cycle = given if isinstance(given, list) else [given]
    if not cycle or n_layers % len(cycle):
        raise ValueError(
            f"expected a list of windows that fills {n_layers} layers, found {len(cycle)} entries"
        )
    return tuple(None if w is None else int(w) for w in cycle) * (n_layers // len(cycle))


def forward(ids: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    x = embed(ids, ranks, c)
    for i in range(c.n_layers):
        x = layer(x, i, ranks, c)
    return head(x, ranks, c)


def embed(ids: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    (w,) = ranks
    return w["tok_embeddings.weight"][ids]


def layer(x: Tensor, i: int, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    (w,), p = ranks, f"layers.{i}."
    x = x + attention(rms_norm(x, w[p + "attention_norm.weight"], c), w, p + "attention.", c, c.windows[i])
    return x + mixture(rms_norm(x, w[p + "ffn_norm.weight"], c), w, p, c)


def head(x: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    (w,) = ranks
    return wide(rms_norm(x, w["norm.weight"], c) @ w["output.weight"].T)


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config, window: int | None) -> Tensor:
    B, T, _ = x.shape
    N, K, H = c.n_heads, c.n_kv_heads, c.head_dim
    q = (x @ w[p + "wq.weight"].T).view(B, T, N, H)
    k = (x @ w[p + "wk.weight"].T).view(B, T, K, H)
    v = (x @ w[p + "wv.weight"].T).view(B, T, K, H)
    turns = rotation(x, c)
    q, k = rotate(q, turns), rotate(k, turns)
    k, v = k.repeat_interleave(N // K, dim=2), v.repeat_interleave(N // K, dim=2)  # (B, T, N, H)
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) * H**-0.5
    weights = wide(scores.masked_fill(hidden(x, window), -math.inf)).softmax(-1).to(x.dtype)
    heads = torch.einsum("bnqk,bknh->bqnh", weights, v)
    return heads.reshape(B, T, N * H) @ w[p + "wo.weight"].T


def hidden(x: Tensor, window: int | None) -> Tensor:
    """Which keys (second axis) each query (first axis) must not see, (T, T): later ones, and those `window`
    or more tokens back."""
    position = torch.arange(x.shape[1], device=x.device)
    back = position[:, None] - position[None, :]
    return back < 0 if window is None else (back < 0) | (back >= window)


def rotation(x: Tensor, c: Config) -> Tensor:
    """exp(i * position * frequency) for the positions and in the precision of x: complex (T, H/2)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    even = torch.arange(0, c.head_dim, 2, dtype=dtype, device=x.device)
    frequencies = 1.0 / c.rope_theta ** (even / c.head_dim)
    angles = torch.outer(torch.arange(x.shape[1], dtype=dtype, device=x.device), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Channels 2i and 2i+1 of every head are one complex number, turned by its position; x (B, T, N, H)."""
    pairs = torch.view_as_complex(wide(x).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x.dtype)


def mixture(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    """The sum of the chosen experts, added in the order of the experts; x (B, T, D), p the prefix of the
    layer."""
    tokens = x.flatten(0, 1)  # (B*T, D)
    p += "block_sparse_moe." if c.stacked else "feed_forward."
    chosen, share = route(tokens, w[p + "gate.weight"], c)
    run = stacked_experts(w, p, c) if c.stacked else None
    y = torch.zeros_like(tokens)
    for e in range(c.n_experts):
        rows, place = (chosen == e).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue  # an expert nobody asks for is never read
        expert = run[e] if run else separate_expert(w, f"{p}experts.{e}.")
        y[rows] += share[rows, place, None] * feed_forward(tokens[rows], *expert)
    return y.view_as(x)


def route(tokens: Tensor, gate: Tensor, c: Config) -> tuple[Tensor, Tensor]:
    """The experts with the highest logits, and their shares: a softmax over those alone; both (B*T, A)."""
    logits, chosen = torch.topk(tokens @ gate.T, c.n_experts_per_token)
    return chosen, wide(logits).softmax(-1).to(tokens.dtype)


def separate_expert(w: Mapping[str, Tensor], p: str) -> tuple[Tensor, Tensor, Tensor]:
    """w1 (F, D), w2 (D, F), w3 (F, D)."""
    return w[p + "w1.weight"], w[p + "w2.weight"], w[p + "w3.weight"]


def stacked_experts(w: Mapping[str, Tensor], p: str, c: Config) -> list[tuple[Tensor, Tensor, Tensor]]:
    """w1, w2 and w3 of every expert out of three tensors (E*F, D); w2 alone lies there as (in, out)."""
    stacks = (w[p + name].chunk(c.n_experts) for name in ("w1", "w2", "w3"))  # each E times (F, D)
    return [(w1, w2.T, w3) for w1, w2, w3 in zip(*stacks, strict=True)]


def feed_forward(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    return (silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def rms_norm(x: Tensor, weight: Tensor, c: Config) -> Tensor:
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + c.norm_eps)).to(x.dtype) * weight


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
