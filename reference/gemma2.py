"""Gemma 2 as Google published it for transformers: norms before and after each branch, whose weights are
stored less one; words scaled by the root of the width; scores and logits capped; windows in every other
layer; gates of gelu.

Source: Gemma Team 2024 (arXiv 2408.00118, section 2); google/gemma_pytorch @014acb7a, gemma/model.py; the
documentation of Gemma2Config in transformers 4.57 for its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from ckpt_tool.reference import decoder
from ckpt_tool.reference.blocks import ACTIVATIONS
from ckpt_tool.reference.decoder import embed, forward, head, layer, phases
from ckpt_tool.reference.facts import Shapes, known, only, refuse
from ckpt_tool.reference.published import AS_PUBLISHED, ASKED, numbers, told

__all__ = ["Config", "embed", "forward", "head", "layer", "phases"]

NAMES = replace(
    AS_PUBLISHED,
    norm_2="pre_feedforward_layernorm.weight",
    after=("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"),
)
# What the published config.json may leave out.
DOCUMENTED = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Config(decoder.Config):
    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """As for Qwen3. Where no list says so, the layers with even numbers have the window."""
        facts = told(
            {**DOCUMENTED, **params}, overrides, ranks, (*ASKED, "sliding_window", "query_pre_attn_scalar")
        )
        refuse(only(facts, {"attention_bias": (False,), "use_bidirectional_attention": (False,)}))
        if not facts.get("layer_types"):
            kinds = "sliding_attention", "full_attention"
            facts["layer_types"] = [kinds[i % 2] for i in range(int(facts["num_hidden_layers"]))]
        facts["use_sliding_window"] = True
        names = replace(NAMES, output=NAMES.word) if facts["tie_word_embeddings"] else NAMES
        made = numbers(facts, names, shapes, ranks)
        return cls(
            **made,
            activation=known("hidden_activation", facts, ACTIVATIONS),
            from_zero=True,
            word_scale=math.sqrt(made["dim"]),
            query_scalar=float(facts["query_pre_attn_scalar"]),
            score_cap=facts["attn_logit_softcapping"],
            logit_cap=facts["final_logit_softcapping"],
        )
