"""GPTNeoXForCausalLM in the Hugging Face layout: `gpt_neox.layers.{i}.` and, where it is not tied,
`embed_out` (transformers 5 calls it `lm_head`, but not on disk).

Source: transformers 4.57.6 and 5.23.0, models/gpt_neox (eager attention). Both ignore `rope_theta` and
`partial_rotary_factor` outside `rope_parameters`.

B batch, T tokens, D model width, N heads, H head width. Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference.hf_blocks import (
    ACTIVATIONS,
    activate,
    complete,
    grouped_attention,
    layer_norm,
    linear,
    one_of,
    rotate,
    split_heads,
    wide,
)
from ckpt_tool.reference.hf_rope import RopeScaling, rope, rotary_part, rotation
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, run

ARCHITECTURES = ("GPTNeoXForCausalLM",)
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # in config.json
# What GPTNeoXConfig takes for keys that are absent.
ABSENT = {"layer_norm_eps": 1e-5, "hidden_act": "gelu", "use_parallel_residual": True, "attention_bias": True}


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    norm_eps: float
    activation: str  # as `activate` calls it
    rope_theta: float
    rope_scaling: RopeScaling | None
    turned: int  # channels of each head
    parallel: bool  # both branches start from the same, each behind its own norm
    biased: bool  # attention
    tied: bool  # the embedding table is also the output layer

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        config = complete(config, REQUIRED, ABSENT)
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        own = {k: v for k, v in config.items() if k not in names}
        own |= {k: config[n] for k, n in names.items() if n in config}
        theta, scaling = rope(own, default=10000.0, whole=False)
        N = int(config["num_attention_heads"])
        return cls(
            n_layers=int(config["num_hidden_layers"]),
            n_heads=N,
            norm_eps=float(config["layer_norm_eps"]),
            activation=one_of(config, "hidden_act", ACTIVATIONS),
            rope_theta=theta,
            rope_scaling=scaling,
            turned=int(int(config["hidden_size"]) // N * rotary_part(own, 0.25)),
            parallel=bool(config["use_parallel_residual"]),
            biased=bool(config["attention_bias"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


def forward(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    logits: Tensor = run(phases(ranks, c), ids)
    return logits


def embed(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    (w,) = ranks
    return F.embedding(ids, w["gpt_neox.embed_in.weight"])


def layer(x: Tensor, i: int, ranks: Ranks, c: Config) -> Tensor:
    (w,), p = ranks, f"gpt_neox.layers.{i}."
    attended = attention(layer_norm(x, w, p + "input_layernorm.", c.norm_eps), w, p + "attention.", c)
    y = layer_norm(x if c.parallel else attended + x, w, p + "post_attention_layernorm.", c.norm_eps)
    y = linear(activate(linear(y, w, p + "mlp.dense_h_to_4h."), c.activation), w, p + "mlp.dense_4h_to_h.")
    return y + attended + x


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    (w,) = ranks
    y = layer_norm(x, w, "gpt_neox.final_layer_norm.", c.norm_eps)
    return wide(F.linear(y, w["gpt_neox.embed_in.weight" if c.tied else "embed_out.weight"]))


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    """Each head has its query, its key and its value beside each other."""
    fused = split_heads(linear(x, w, p + "query_key_value.", c.biased), c.n_heads)  # (B, N, T, 3H)
    q, k, v = fused.chunk(3, dim=-1)
    cos, sin = rotation(x, c.rope_theta, c.turned, c.rope_scaling)
    return linear(grouped_attention(rotate(q, cos, sin), rotate(k, cos, sin), v), w, p + "dense.", c.biased)
