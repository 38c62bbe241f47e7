"""GPT-NeoX-20B, Pythia and others trained with EleutherAI's library, as they are published for transformers:
attention and feed-forward side by side or in turn, each behind a norm of its own; query, key and value of a
head together in one tensor; the first channels of each head turned.

Source: Black et al. 2022 (arXiv 2204.06745, section 2); EleutherAI/gpt-neox @007003aa,
megatron/model/transformer.py; the documentation of GPTNeoXConfig in transformers 4.57 for its numbers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.reference.blocks import ACTIVATIONS
from ckpt_tool.reference.facts import known
from ckpt_tool.reference.published import AS_PUBLISHED, Published

NUMBERS = {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25}


class Config(Published):
    layout = replace(
        AS_PUBLISHED,
        word="gpt_neox.embed_in.weight",
        block="gpt_neox.layers.",
        qkv=("attention.query_key_value.",),
        out="attention.dense.",
        units=("mlp.dense_h_to_4h.",),
        down="mlp.dense_4h_to_h.",
        final_norm="gpt_neox.final_layer_norm.",
        output="embed_out.weight",
    )
    own = {
        "rope_theta": "rotary_emb_base",
        "partial_rotary_factor": "rotary_pct",
        "rms_norm_eps": "layer_norm_eps",
        "num_key_value_heads": "num_attention_heads",
    }
    documented = {**NUMBERS, "hidden_act": "gelu", "use_parallel_residual": True, "attention_bias": True}
    computed = {}

    @classmethod
    def traits(cls, facts: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "activation": known("hidden_act", facts, ACTIVATIONS),
            "biased": ("qkv", "out", "units") if facts["attention_bias"] else ("units",),
            "parallel": bool(facts["use_parallel_residual"]),
            "layer_norms": True,
            "gated": False,
        }
