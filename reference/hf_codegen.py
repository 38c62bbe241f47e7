"""CodeGenForCausalLM in the Hugging Face layout: GPT-J's (hf_gptj) but for `attn.qkv_proj`, whose four blocks
of queries, then values, then keys are fixed in transformers and not in config.json, and for sines and cosines
that stay in float32.

Source: transformers 4.37.2 and 5.23.0, models/codegen.
"""

from ckpt_tool.reference import hf_gptj
from ckpt_tool.reference.hf_gptj import HEADS, embed, encode, forward, head, layer, phases

__all__ = ["ARCHITECTURES", "HEADS", "Config", "embed", "encode", "forward", "head", "layer", "phases"]

ARCHITECTURES = ("CodeGenForCausalLM", "CodeGenModel")
ONNX_CLASS = (1e-5, 13)  # atol_for_validation and default_onnx_opset of its OnnxConfig in 4.37.2


class Config(hf_gptj.Config):
    names = {**hf_gptj.Config.names, "fused": "attn.qkv_proj."}
    blocks, order = 4, "qvk"
