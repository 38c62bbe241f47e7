"""CodeGenForCausalLM in the Hugging Face layout: GPT-J's (hf_gptj) but for `attn.qkv_proj`, whose four blocks
are fixed in transformers and not in config.json.

Source: transformers 4.37.2 and 5.23.0, models/codegen.
"""

from __future__ import annotations

from ckpt_tool.reference import hf_gptj
from ckpt_tool.reference.hf_gptj import embed, forward, head, layer, phases

__all__ = ["ARCHITECTURES", "Config", "embed", "forward", "head", "layer", "phases"]

ARCHITECTURES = ("CodeGenForCausalLM",)


class Config(hf_gptj.Config):
    blocks = 4
