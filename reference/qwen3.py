"""Qwen3 (dense) as it is published: as Qwen2, but without biases, and each head of query and key is
normalised before it is turned.

Source: Yang et al. 2025 (arXiv 2505.09388, section 2); the documentation of Qwen3Config in transformers 4.57
for its numbers.
"""

from collections.abc import Mapping
from typing import Any, Self

from ckpt_tool.reference import megatron_core
from ckpt_tool.reference.facts import Shapes
from ckpt_tool.reference.published import Published


class Config(Published):
    documented = {
        "num_key_value_heads": 32,
        "head_dim": 128,  # in every published size, whatever D/N is
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }
    computed = {"hidden_act": ("silu",), "attention_bias": (False,), "num_experts": ()}

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` is config.json, or what Megatron's files carry; else as `Published` has it."""
        if megatron_core.words_of(shapes) is not None:
            return cls(**megatron_core.made(params, shapes, ranks, overrides))
        return super().from_original(params, shapes, ranks, overrides)

    @classmethod
    def traits(cls, facts: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
        return {"head_norms": ("self_attn.q_norm.", "self_attn.k_norm.")}
