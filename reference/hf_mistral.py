"""MistralForCausalLM in the Hugging Face layout (hf_decoder)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_decoder import embed, forward, head, layer, phases

__all__ = ["ARCHITECTURES", "Config", "embed", "forward", "head", "layer", "phases"]


ARCHITECTURES = ("MistralForCausalLM",)


@dataclass(frozen=True)
class Config(hf_decoder.Config):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        absent = {"num_key_value_heads": 8, "sliding_window": 4096}
        return cls.read(config, {}, absent, theta=10000.0)
