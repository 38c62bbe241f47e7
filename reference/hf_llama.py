"""Llama and its heads in the Hugging Face layout (hf_decoder)."""

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_heads import DECODERS

ARCHITECTURES = tuple(f"Llama{end}" for end in DECODERS)


class Config(hf_decoder.Config):
    answering = "transformer."
    computed = {**hf_decoder.Config.computed, "attention_bias": False, "mlp_bias": False}
