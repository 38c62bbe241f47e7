"""The decoder of Llama and those after it in the Hugging Face layout: `config.json` and tensors named
`model.layers.{i}.self_attn.q_proj`. A family says in its own module which numbers and traits it has.

Source: transformers 4.37.2 (eager attention) and 5.23.0, models/llama, mistral, mixtral and qwen2; experts as
they lie on disk, one tensor each (transformers 5 stacks them only in memory).

B batch, T tokens, D model width, N query heads, K key/value heads, H head width, F feed-forward width,
V vocabulary. Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference.hf_blocks import (
    complete,
    gated,
    grouped_attention,
    linear,
    mixture,
    rms_norm,
    rotate_half,
    split_heads,
    wide,
)
from ckpt_tool.reference.hf_rope import RopeScaling, rope, rotation
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, run

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # in config.json


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    # per layer, how many keys a query sees, its own included; None sees all before it
    windows: tuple[int | None, ...]
    tied: bool  # the embedding table is also the output layer
    prefix: str = "model."  # of all but the heads
    biased: bool = False  # query, key and value have a bias
    head_norms: bool = False  # each head of query and key is normalised before it is turned
    n_experts: int = 0
    n_experts_per_token: int = 0

    @classmethod
    def read(
        cls,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any],
        or_null: Mapping[str, Any],
        *,
        theta: float,
        **traits: Any,
    ) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it, the others what its class takes for
        absent keys. ValueError for a missing value that changes the numbers and for what this pass does not
        compute."""
        base, scaling = rope(config, default=theta)
        config = complete(config, REQUIRED, {"rms_norm_eps": 1e-6, "hidden_act": "silu", **defaults}, or_null)
        if config["hidden_act"] not in ("silu", "swish"):  # one function
            raise ValueError(f"expected `hidden_act` silu in config.json, found {config['hidden_act']}")
        n_layers, n_heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        window = config.get("sliding_window") if "sliding_window" in or_null else None
        numbers: dict[str, Any] = {
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": int(config.get("num_key_value_heads") or n_heads),
            "head_dim": int(config.get("head_dim") or int(config["hidden_size"]) // n_heads),
            "norm_eps": float(config["rms_norm_eps"]),
            "rope_theta": base,
            "rope_scaling": scaling,
            "windows": (None if window is None else int(window),) * n_layers,
            "tied": bool(config.get("tie_word_embeddings", False)),
        }
        return cls(**{**numbers, **traits})


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


def forward(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    logits: Tensor = run(phases(ranks, c), ids)
    return logits


def embed(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    (w,) = ranks
    return F.embedding(ids, w[c.prefix + "embed_tokens.weight"])


def layer(x: Tensor, i: int, ranks: Ranks, c: Config) -> Tensor:
    (w,), p = ranks, f"{c.prefix}layers.{i}."
    y = rms_norm(x, w[p + "input_layernorm.weight"], c.norm_eps)
    x = x + attention(y, w, p + "self_attn.", c, c.windows[i])
    y = rms_norm(x, w[p + "post_attention_layernorm.weight"], c.norm_eps)
    if c.n_experts:
        return x + mixture(y, w, p + "block_sparse_moe.", c.n_experts_per_token)
    return x + gated(y, w, *(f"{p}mlp.{name}_proj.weight" for name in ("gate", "up", "down")))


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V) of the last layer's output."""
    return lm_logits(final_norm(x, ranks, c), ranks, c)


def final_norm(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    return rms_norm(x, ranks[0][c.prefix + "norm.weight"], c.norm_eps)


def lm_logits(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    (w,) = ranks
    return wide(F.linear(y, w[c.prefix + "embed_tokens.weight" if c.tied else "lm_head.weight"]))


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config, window: int | None) -> Tensor:
    q, k, v = (
        split_heads(linear(x, w, f"{p}{name}_proj.", c.biased), n)  # (B, N, T, H), (B, K, T, H) twice
        for name, n in (("q", c.n_heads), ("k", c.n_kv_heads), ("v", c.n_kv_heads))
    )
    if c.head_norms:
        q, k = (rms_norm(y, w[f"{p}{n}_norm.weight"], c.norm_eps) for n, y in (("q", q), ("k", k)))
    cos, sin = rotation(x, c.rope_theta, c.head_dim, c.rope_scaling)
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    return F.linear(grouped_attention(q, k, v, window), w[p + "o_proj.weight"])
