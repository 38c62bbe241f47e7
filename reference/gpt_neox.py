"""GPT-NeoX-20B, Pythia and others trained with EleutherAI's library, as they are published for transformers:
attention and feed-forward side by side or in turn, each behind a norm of its own; query, key and value of a
head together in one tensor; the first channels of each head turned.

Source: Black et al. 2022 (arXiv 2204.06745, section 2); EleutherAI/gpt-neox @007003aa,
megatron/model/transformer.py; the documentation of GPTNeoXConfig in transformers 4.57 for its numbers.
"""

from collections.abc import Mapping
from typing import Any, Self

from ckpt_tool.reference.blocks import ACTIVATIONS
from ckpt_tool.reference.decoder import Names
from ckpt_tool.reference.facts import Shapes, first, known
from ckpt_tool.reference.published import Published

# What others call by the first name is called by the second here, and by that alone.
OWN = {
    "rope_theta": "rotary_emb_base",
    "partial_rotary_factor": "rotary_pct",
    "rms_norm_eps": "layer_norm_eps",
    "num_key_value_heads": "num_attention_heads",
}


class Config(Published):
    layout = Names(
        word="gpt_neox.embed_in.weight",
        block="gpt_neox.layers.",
        norm_1="input_layernorm.",
        qkv=("attention.query_key_value.",),
        out="attention.dense.",
        norm_2="post_attention_layernorm.",
        units=("mlp.dense_h_to_4h.",),
        down="mlp.dense_4h_to_h.",
        final_norm="gpt_neox.final_layer_norm.",
        output="embed_out.weight",
    )
    documented = {"hidden_act": "gelu", "use_parallel_residual": True, "attention_bias": True} | {
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
    }
    computed = {}

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        def renamed(facts: Mapping[str, Any]) -> dict[str, Any]:
            return {**facts, **{name: facts[own] for name, own in OWN.items() if own in facts}}

        return super().from_original(renamed({**cls.documented, **params}), shapes, ranks, renamed(overrides))

    @classmethod
    def traits(cls, facts: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
        newer = facts.get("rope_parameters") or {}
        part = first(newer.get("partial_rotary_factor"), facts["partial_rotary_factor"])
        return {
            "turned": int(made["head_dim"] * float(part)),
            "activation": known("hidden_act", facts, ACTIVATIONS),
            "biased": ("qkv", "out", "units") if facts["attention_bias"] else ("units",),
            "parallel": bool(facts["use_parallel_residual"]),
            "layer_norms": True,
            "gated": False,
        }
