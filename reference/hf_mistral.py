"""Mistral and its heads in the Hugging Face layout (hf_decoder)."""

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_heads import DECODERS

ARCHITECTURES = tuple(f"Mistral{end}" for end in DECODERS)


class Config(hf_decoder.Config):
    or_null = {"num_key_value_heads": 8, "sliding_window": 4096}
