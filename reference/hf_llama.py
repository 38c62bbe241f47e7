"""LlamaForCausalLM in the Hugging Face layout: `config.json` and tensors named
`model.layers.{i}.self_attn.q_proj`.

Source: transformers 4.37.2 and 5.23.0, models/llama and modeling_rope_utils (rope_type llama3).

B batch, T tokens, D model width, N query heads, K key/value heads, H head width, F feed-forward width,
V vocabulary. Linear weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import silu

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")  # in config.json


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretched rotary frequencies; `original_context` in tokens."""

    factor: float
    low: float
    high: float
    original_context: float

    @classmethod
    def from_hf(cls, facts: Mapping[str, Any]) -> Self:
        """`facts` is `rope_scaling` as in config.json; ValueError unless it is all of rope_type llama3."""
        kind = facts.get("rope_type", facts.get("type"))
        if kind != "llama3":
            raise ValueError(f"expected rope_type `default` or `llama3`, found `{kind}`")
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        missing = [name for name in names if facts.get(name) is None]
        if missing:
            raise ValueError(f"expected {', '.join(missing)} beside rope_type `llama3`, found none")
        return cls(*(float(facts[name]) for name in names))


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool  # the embedding table is also the output layer

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what this pass does not compute."""
        missing = [name for name in REQUIRED if config.get(name) is None]
        if missing:
            raise ValueError(f"expected {', '.join(missing)} in config.json, found none")
        for name, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if config.get(name, wanted) != wanted:
                raise ValueError(f"expected `{name}` {wanted} in config.json, found {config[name]}")
        n_heads = int(config["num_attention_heads"])
        theta, scaling = _rope(config)
        return cls(
            n_layers=int(config["num_hidden_layers"]),
            n_heads=n_heads,
            n_kv_heads=int(config.get("num_key_value_heads") or n_heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // n_heads),
            norm_eps=float(config["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=bool(config.get("tie_word_embeddings", False)),
        )


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 both in `rope_parameters`; a
    config without theta is older than the key (4.33) and means 10000."""
    newer = config.get("rope_parameters") or {}
    thetas = {float(facts["rope_theta"]) for facts in (config, newer) if facts.get("rope_theta") is not None}
    if len(thetas) > 1:
        raise ValueError(
            f"expected one rope_theta in config.json, found {', '.join(map(str, sorted(thetas)))}"
        )
    theta = thetas.pop() if thetas else 10000.0
    scaling = newer or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return theta, None if kind == "default" else RopeScaling.from_hf(scaling)


def forward(ids: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    x = embed(ids, ranks, c)
    for i in range(c.n_layers):
        x = layer(x, i, ranks, c)
    return head(x, ranks, c)


def embed(ids: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    (w,) = ranks
    return w["model.embed_tokens.weight"][ids]


def layer(x: Tensor, i: int, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    (w,), p = ranks, f"model.layers.{i}."
    x = x + attention(rms_norm(x, w[p + "input_layernorm.weight"], c), w, p + "self_attn.", c)
    return x + feed_forward(rms_norm(x, w[p + "post_attention_layernorm.weight"], c), w, p + "mlp.")


def head(x: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    (w,) = ranks
    output = w["model.embed_tokens.weight" if c.tied else "lm_head.weight"]
    return wide(rms_norm(x, w["model.norm.weight"], c) @ output.T)


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    B, T, _ = x.shape
    N, K, H = c.n_heads, c.n_kv_heads, c.head_dim
    q = (x @ w[p + "q_proj.weight"].T).view(B, T, N, H).transpose(1, 2)  # (B, N, T, H)
    k = (x @ w[p + "k_proj.weight"].T).view(B, T, K, H).transpose(1, 2)  # (B, K, T, H)
    v = (x @ w[p + "v_proj.weight"].T).view(B, T, K, H).transpose(1, 2)
    cos, sin = rotation(x, c)
    q = (q * cos + rotate_half(q) * sin).view(B, K, N // K, T, H)  # (B, K, N/K, T, H)
    k = k * cos + rotate_half(k) * sin
    scores = torch.einsum("bkgqh,bkth->bkgqt", q, k) * H**-0.5
    past = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    weights = wide(scores.masked_fill(~past, -math.inf)).softmax(-1).to(x.dtype)
    heads = torch.einsum("bkgqt,bkth->bqkgh", weights, v)
    return heads.reshape(B, T, N * H) @ w[p + "o_proj.weight"].T


def rotation(x: Tensor, c: Config) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, (T, H), equal in both halves of H; computed in the precision of
    x, at least float32, and rounded to the dtype of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps = torch.arange(0, c.head_dim, 2, dtype=dtype, device=x.device)
    frequencies = 1.0 / c.rope_theta ** (steps / c.head_dim)
    if c.rope_scaling is not None:
        frequencies = stretch(frequencies, c.rope_scaling)
    angles = torch.arange(x.shape[1], dtype=dtype, device=x.device)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def stretch(frequencies: Tensor, s: RopeScaling) -> Tensor:
    """`keep` is the part of a frequency that is not divided by `factor`: 1 for waves that turn `high` times
    or more within the original context, 0 for those that turn at most `low` times, and linear between."""
    turns = s.original_context * frequencies / (2 * math.pi)
    keep = ((turns - s.low) / (s.high - s.low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * (frequencies / s.factor)


def rotate_half(x: Tensor) -> Tensor:
    """Channels i and i + H/2 are a pair: (a, b) -> (-b, a)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str) -> Tensor:
    gate, up = x @ w[p + "gate_proj.weight"].T, x @ w[p + "up_proj.weight"].T  # (B, T, F)
    return (silu(gate) * up) @ w[p + "down_proj.weight"].T


def rms_norm(x: Tensor, weight: Tensor, c: Config) -> Tensor:
    y = wide(x)
    return weight * (y / (y.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
