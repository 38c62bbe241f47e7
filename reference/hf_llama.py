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

from ckpt_tool.reference import hf_rope
from ckpt_tool.reference.hf_rope import RopeScaling, rope, rotate_half

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # in config.json
DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}  # of LlamaConfig

SILU = ("silu", "swish")  # one function


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
        config = {**DEFAULTS, **config}
        if missing := [name for name in (*REQUIRED, *DEFAULTS) if config.get(name) is None]:
            raise ValueError(f"expected {', '.join(missing)} in config.json, found none")
        for name, wanted in (("attention_bias", False), ("mlp_bias", False)):
            if config.get(name, wanted) != wanted:
                raise ValueError(f"expected `{name}` {wanted} in config.json, found {config[name]}")
        if config["hidden_act"] not in SILU:
            raise ValueError(f"expected `hidden_act` silu in config.json, found {config['hidden_act']}")
        n_heads = int(config["num_attention_heads"])
        theta, scaling = rope(config, default=10000.0)
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
    return hf_rope.rotation(x, c.rope_theta, c.head_dim, c.rope_scaling)


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str) -> Tensor:
    gate, up = x @ w[p + "gate_proj.weight"].T, x @ w[p + "up_proj.weight"].T  # (B, T, F)
    return (silu(gate) * up) @ w[p + "down_proj.weight"].T


def rms_norm(x: Tensor, weight: Tensor, c: Config) -> Tensor:
    y = wide(x)
    return weight * (y / (y.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
