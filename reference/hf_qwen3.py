"""Qwen3 and its heads in the Hugging Face layout (hf_decoder).

Source: transformers 4.57.6 and 5.23.0, models/qwen3.
"""

from collections.abc import Mapping
from typing import Any

from ckpt_tool.reference import hf_qwen2
from ckpt_tool.reference.hf_heads import DECODERS

ARCHITECTURES = tuple(f"Qwen3{end}" for end in DECODERS)


class Config(hf_qwen2.Config):
    absent = {"head_dim": 128}
    computed = {**hf_qwen2.Config.computed, "attention_bias": False}

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().traits(config), "biased": (), "head_norms": True}
