"""LlamaForCausalLM in the Hugging Face layout (hf_decoder)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_blocks import only
from ckpt_tool.reference.hf_decoder import embed, forward, head, layer, phases
from ckpt_tool.reference.hf_rope import RopeScaling

__all__ = ["ARCHITECTURES", "Config", "RopeScaling", "embed", "forward", "head", "layer", "phases"]


ARCHITECTURES = ("LlamaForCausalLM",)


@dataclass(frozen=True)
class Config(hf_decoder.Config):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        only(config, {"attention_bias": False, "mlp_bias": False})
        return cls.read(config, {}, {}, theta=10000.0)
