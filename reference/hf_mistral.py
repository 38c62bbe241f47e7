"""MistralForCausalLM in the Hugging Face layout (hf_decoder)."""

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_decoder import embed, forward, head, layer, phases

__all__ = ["ARCHITECTURES", "Config", "embed", "forward", "head", "layer", "phases"]

ARCHITECTURES = ("MistralForCausalLM",)


class Config(hf_decoder.Config):
    or_null = {"num_key_value_heads": 8, "sliding_window": 4096}
