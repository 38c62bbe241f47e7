"""LlamaForCausalLM in the Hugging Face layout (hf_decoder)."""

from ckpt_tool.reference import hf_decoder

ARCHITECTURES = ("LlamaForCausalLM",)


class Config(hf_decoder.Config):
    computed = {**hf_decoder.Config.computed, "attention_bias": False, "mlp_bias": False}
