"""Qwen3 (dense) as it is published: as Qwen2, but without biases, and each head of query and key is
normalised before it is turned.

Source: Yang et al. 2025 (arXiv 2505.09388, section 2); the documentation of Qwen3Config in transformers 4.57
for its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from ckpt_tool.reference import decoder
from ckpt_tool.reference.decoder import embed, forward, head, layer, phases
from ckpt_tool.reference.facts import Shapes, only, refuse
from ckpt_tool.reference.published import AS_PUBLISHED, numbers, told

__all__ = ["Config", "embed", "forward", "head", "layer", "phases"]

# What the published config.json may leave out; heads are 128 wide in every size, whatever D/N is.
DOCUMENTED = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


@dataclass(frozen=True)
class Config(decoder.Config):
    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` is config.json, `shapes` those of all tensors, `overrides` facts from the user, which
        win. ValueError for what none of them tells and for what this pass does not compute."""
        facts = told({**DOCUMENTED, **params}, overrides, ranks)
        refuse(only(facts, {"hidden_act": ("silu",), "attention_bias": (False,), "num_experts": ()}))
        tied = facts.get("tie_word_embeddings")
        names = replace(AS_PUBLISHED, output=AS_PUBLISHED.word) if tied else AS_PUBLISHED
        head_norms = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
        return cls(**numbers(facts, names, shapes, ranks), head_norms=head_norms)
