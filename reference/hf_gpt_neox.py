"""GPTNeoXForCausalLM in the Hugging Face layout: `gpt_neox.layers.{i}.` and, where it is not tied,
`embed_out` (transformers 5 calls it `lm_head`, but not on disk).

Source: transformers 4.57.6 and 5.23.0, models/gpt_neox (eager attention).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_blocks import (
    ACTIVATIONS,
    activate,
    grouped_attention,
    layer_norm,
    linear,
    one_of,
    rotate,
    split_heads,
    wide,
)
from ckpt_tool.reference.hf_rope import rotation
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, run

ARCHITECTURES = ("GPTNeoXForCausalLM",)
# What the library calls them here; under the names of others it ignores them outside `rope_parameters`.
ROTARY = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


@dataclass(frozen=True)
class Config(hf_decoder.Config):
    parallel: bool = True  # both branches start from the same, each behind its own norm

    absent = {"hidden_act": "gelu", "use_parallel_residual": True, "attention_bias": True}
    part, epsilon, computed = 0.25, ("layer_norm_eps", 1e-5), {}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        others = {k: v for k, v in config.items() if k not in ROTARY}
        return super().from_hf(others | {k: config[own] for k, own in ROTARY.items() if own in config})

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "activation": one_of(config, "hidden_act", ACTIVATIONS),
            "biased": bool(config["attention_bias"]),
            "parallel": bool(config["use_parallel_residual"]),
        }


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


def forward(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    logits: Tensor = run(phases(ranks, c), ids)
    return logits


def embed(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    return F.embedding(ids, ranks[0]["gpt_neox.embed_in.weight"])


def layer(x: Tensor, i: int, ranks: Ranks, c: Config) -> Tensor:
    w, p = ranks[0], f"gpt_neox.layers.{i}."
    attended = attention(layer_norm(x, w, p + "input_layernorm.", c.norm_eps), w, p + "attention.", c)
    y = layer_norm(x if c.parallel else attended + x, w, p + "post_attention_layernorm.", c.norm_eps)
    y = activate(linear(y, w, p + "mlp.dense_h_to_4h."), c.activation)
    return linear(y, w, p + "mlp.dense_4h_to_h.") + attended + x


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    """Each head has its query, its key and its value beside each other."""
    fused = split_heads(linear(x, w, p + "query_key_value.", c.biased), c.n_heads)  # (B, N, T, 3H)
    q, k, v = fused.chunk(3, dim=-1)
    cos, sin = rotation(x, c.rope_theta, c.turned, c.rope_scaling)
    return linear(grouped_attention(rotate(q, cos, sin), rotate(k, cos, sin), v), w, p + "dense.", c.biased)


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    y = layer_norm(x, ranks[0], "gpt_neox.final_layer_norm.", c.norm_eps)
    return wide(F.linear(y, ranks[0]["gpt_neox.embed_in.weight" if c.tied else "embed_out.weight"]))
