"""Mistral (7B v0.1 to v0.3, Nemo, Small, Large, Codestral, ...) as Mistral AI published it: `consolidated.*`.

Source: Jiang et al. 2023 (arXiv 2310.06825) and mistralai/mistral-inference @2557e12d, with @c18d5b9b and
@b8181901 for what the first releases left unsaid. Several files of one download hold different tensors, so
together they are one mapping.

B batch, T tokens, D model width, N query heads, K key/value heads, H head width, F feed-forward width,
V vocabulary, W window. Linear weights are (out, in).
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
    head_dim: int  # not dim / n_heads in Nemo and Small
    norm_eps: float
    rope_theta: float
    # per layer, how many keys a query sees, its own included; None sees all before it
    windows: tuple[int | None, ...]

    @classmethod
    def from_original(
        cls,
        params: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        ranks: int,
        overrides: Mapping[str, Any],
    ) -> Self:
        """`params` is params.json, `shapes` those of all tensors, `overrides` facts from the user under their
        Hugging Face names, which win. ValueError for what none of them tells or where they disagree."""
        params, overrides = params.get("model", params), _settings(overrides)
        if ranks != 1:
            raise ValueError(f"expected one rank (Mistral AI's files are not model-parallel), found {ranks}")
        dim = int(_fact("dim", "hidden_size", params, overrides))
        n_layers = int(_fact("n_layers", "num_hidden_layers", params, overrides))
        n_heads = int(_fact("n_heads", "num_attention_heads", params, overrides))
        windows = _windows(params, overrides, n_layers)
        # A file without rope_theta is one of the first releases, whose code had 10000 together with a sliding
        # window and 1000000 without (@b8181901); today's code takes 1000000 for both, wrong for 7B v0.1.
        theta = 1e4 if any(windows + _windows(params, {}, n_layers)) else 1e6
        c = cls(
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=int(_fact("n_kv_heads", "num_key_value_heads", params, overrides, n_heads)),
            head_dim=int(_fact("head_dim", "head_dim", params, overrides, dim // n_heads)),
            norm_eps=float(_fact("norm_eps", "rms_norm_eps", params, overrides)),
            rope_theta=float(_fact("rope_theta", "rope_theta", params, overrides, theta)),
            windows=windows,
        )
        if c.n_heads % c.n_kv_heads:
            raise ValueError(
                f"expected n_heads a multiple of n_kv_heads, found {c.n_heads} and {c.n_kv_heads}"
            )
        for name, heads in (("wq", c.n_heads), ("wk", c.n_kv_heads)):
            name, wanted = f"layers.0.attention.{name}.weight", (heads * c.head_dim, dim)
            if (found := tuple(shapes.get(name, ()))) != wanted:
                raise ValueError(f"expected `{name}` of shape {wanted}, found {found}")
        return c


def _settings(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """`overrides` in the names of transformers 4: 5 keeps theta in `rope_parameters`. ValueError
    for scaled frequencies, which no Mistral has."""
    newer = overrides.get("rope_parameters") or {}
    scaling = newer or overrides.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(f"expected rope_type `default`, found `{kind}`")
    return {"rope_theta": newer.get("rope_theta"), **overrides}


def _fact(
    name: str, hf_name: str, params: Mapping[str, Any], overrides: Mapping[str, Any], default: Any = None
) -> Any:
    for key, facts in ((hf_name, overrides), (name, params)):
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
    return x + feed_forward(rms_norm(x, w[p + "ffn_norm.weight"], c), w, p + "feed_forward.")


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
    or more tokens back (the rolling cache and the local mask of releases since December 2023 keep W
    keys)."""
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


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str) -> Tensor:
    gate, up = x @ w[p + "w1.weight"].T, x @ w[p + "w3.weight"].T  # (B, T, F)
    return (silu(gate) * up) @ w[p + "w2.weight"].T


def rms_norm(x: Tensor, weight: Tensor, c: Config) -> Tensor:
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + c.norm_eps)).to(x.dtype) * weight


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
