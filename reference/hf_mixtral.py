"""MixtralForCausalLM in the Hugging Face layout (hf_decoder), its experts in
`model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_blocks import complete
from ckpt_tool.reference.hf_decoder import embed, forward, head, layer, phases

__all__ = ["ARCHITECTURES", "Config", "embed", "forward", "head", "layer", "phases"]


ARCHITECTURES = ("MixtralForCausalLM",)


@dataclass(frozen=True)
class Config(hf_decoder.Config):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """A newer name of `num_local_experts` is `num_experts`."""
        generic = {"num_local_experts": config["num_experts"]} if "num_experts" in config else {}
        own = {"num_local_experts": 8, "num_experts_per_tok": 2}
        counts = complete({**generic, **config}, (), own)
        return cls.read(
            config,
            {"rms_norm_eps": 1e-5},
            {"num_key_value_heads": 8, "sliding_window": None},
            theta=1000000.0,
            n_experts=int(counts["num_local_experts"]),
            n_experts_per_token=int(counts["num_experts_per_tok"]),
        )
