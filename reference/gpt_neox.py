"""GPT-NeoX-20B, Pythia and others trained with EleutherAI's library, as they are published for transformers:
attention and feed-forward side by side or in turn, each behind a norm of its own; query, key and value of a
head together in one tensor; the first channels of each head turned.

Source: Black et al. 2022 (arXiv 2204.06745, section 2); EleutherAI/gpt-neox @007003aa,
megatron/model/transformer.py; the documentation of GPTNeoXConfig in transformers 4.57 for its numbers.

B batch, T tokens, D model width, N heads, H head width. Linear weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from ckpt_tool.reference.blocks import (
    ACTIVATIONS,
    VERSION_2,
    activate,
    affine,
    layer_norm,
    products,
    rotate_halves,
    split_fused,
    visible,
    weigh,
    wide,
)
from ckpt_tool.reference.facts import Shapes, first, known
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, run
from ckpt_tool.reference.published import scaling_of, told
from ckpt_tool.reference.rope import RopeScaling, turns

ASKED = ("num_hidden_layers", "num_attention_heads", "rope_theta")
WORDS = "gpt_neox.embed_in.weight"
# What the published config.json may leave out.
DOCUMENTED = {
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "attention_bias": True,
}


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    norm_eps: float
    activation: str
    rope_theta: float
    rope_scaling: RopeScaling | None
    rotary_dim: int  # channels of a head that are turned
    parallel: bool
    biased: bool  # query, key, value and the projection out of the heads; the others always are
    output: str

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` is config.json, `shapes` those of all tensors, `overrides` facts from the user, which
        win. ValueError for what none of them tells and for what this pass does not compute."""
        older = {"rope_theta": params.get("rotary_emb_base", 10000)}
        facts = told({**DOCUMENTED, **params, **older}, overrides, ranks, ASKED)
        newer, N = facts.get("rope_parameters") or {}, int(facts["num_attention_heads"])
        part = first(newer.get("partial_rotary_factor"), facts["rotary_pct"])
        return cls(
            n_layers=int(facts["num_hidden_layers"]),
            n_heads=N,
            norm_eps=float(facts["layer_norm_eps"]),
            activation=known("hidden_act", facts, ACTIVATIONS),
            rope_theta=facts["rope_theta"],
            rope_scaling=scaling_of(facts),
            rotary_dim=int(shapes[WORDS][1] // N * float(part)),
            parallel=bool(facts["use_parallel_residual"]),
            biased=bool(facts["attention_bias"]),
            output=WORDS if facts.get("tie_word_embeddings") else "embed_out.weight",
        )


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


def forward(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    logits: Tensor = run(phases(ranks, c), ids)
    return logits


def embed(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    return ranks[0][WORDS][ids]


def layer(x: Tensor, i: int, ranks: Ranks, c: Config) -> Tensor:
    w, p = ranks[0], f"gpt_neox.layers.{i}."
    y = x + attention(layer_norm(x, w, p + "input_layernorm.", c.norm_eps), w, p + "attention.", c)
    z = layer_norm(x if c.parallel else y, w, p + "post_attention_layernorm.", c.norm_eps)
    units = activate(affine(z, w, p + "mlp.dense_h_to_4h."), c.activation)
    return y + affine(units, w, p + "mlp.dense_4h_to_h.")


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    q, k, v = split_fused(affine(x, w, p + "query_key_value.", c.biased), c.n_heads, c.n_heads, VERSION_2)
    turned = turns(x, c.rope_theta, c.rotary_dim, c.rope_scaling)
    q, k = (rotate_halves(y, turned).to(x.dtype) for y in (q, k))  # (B, T, N, H)
    scores = products(q, k) / math.sqrt(q.shape[-1])
    return affine(weigh(scores, v, visible(x), -math.inf), w, p + "dense.", c.biased)


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    w = ranks[0]
    return wide(layer_norm(x, w, "gpt_neox.final_layer_norm.", c.norm_eps) @ w[c.output].T)
