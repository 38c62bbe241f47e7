"""Qwen3ForCausalLM in the Hugging Face layout (hf_decoder).

Source: transformers 4.57.6 and 5.23.0, models/qwen3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_blocks import only
from ckpt_tool.reference.hf_decoder import embed, forward, head, layer, phases
from ckpt_tool.reference.hf_qwen2 import windows_of

__all__ = ["ARCHITECTURES", "Config", "embed", "forward", "head", "layer", "phases"]

ARCHITECTURES = ("Qwen3ForCausalLM",)
# What Qwen3Config takes for keys that are absent; null heads are as many as there are queries.
ABSENT = {"num_key_value_heads": 32, "max_window_layers": 28}


@dataclass(frozen=True)
class Config(hf_decoder.Config):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        only(config, {"attention_bias": False})
        c = cls.read(config, {"head_dim": 128}, ABSENT, theta=10000.0, head_norms=True)
        return replace(c, windows=windows_of({"sliding_window": 4096, **ABSENT, **config}, c.n_layers))
