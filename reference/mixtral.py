"""Mixtral (8x7B, 8x22B) as Mistral AI published it, in either of its two sets of names.

Source: Jiang et al. 2024 (arXiv 2401.04088) and mistralai/mistral-inference @2557e12d and @b8181901. One
expert per tensor, `feed_forward.experts.{e}.w1.weight`, is what that code loads; the first download, eight
files of different tensors, stacks all experts of a layer in one: `block_sparse_moe.w1` (read by
ml-explore/mlx-examples @1120adab). The files of one download together are one mapping.
"""

from collections.abc import Mapping
from typing import Any, Self

from ckpt_tool.reference import megatron_core, mistral
from ckpt_tool.reference.facts import Shapes, fact, opened


class Config(mistral.Config):
    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any], **more: Any
    ) -> Self:
        """`params` is params.json with Mistral AI's or Hugging Face keys, or what Megatron's files carry;
        else as for Mistral."""
        if megatron_core.words_of(shapes) is not None:
            return cls(**megatron_core.made(params, shapes, ranks, overrides))
        params = opened(params)
        params = {**params, **(params.get("moe") or {})}
        # Both published models send a token to two experts; a file with Hugging Face keys leaves it out.
        top = int(fact("num_experts_per_tok", "num_experts_per_tok", params, overrides, 2))
        counts = {
            "n_experts": int(fact("num_experts", "num_local_experts", params, overrides)),
            "n_experts_per_token": top,
            "stacked": "layers.0.block_sparse_moe.w1" in shapes,
        }
        return super().from_original(params, shapes, ranks, overrides, **counts, **more)
