"""GPTNeoX and its heads in the Hugging Face layout (hf_decoder): `gpt_neox.layers.{i}.` and, where it is not
tied, `embed_out` (transformers 5 calls it `lm_head`, but not on disk).

Source: transformers 4.57.6 and 5.23.0, models/gpt_neox (eager attention).
"""

from collections.abc import Mapping
from typing import Any

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_blocks import ACTIVATIONS, one_of
from ckpt_tool.reference.hf_decoder import Names
from ckpt_tool.reference.hf_heads import DECODERS

ARCHITECTURES = tuple(f"GPTNeoX{end}" for end in DECODERS)


class Config(hf_decoder.Config):
    names = Names(
        words="embed_in.",
        qkv=("attention.query_key_value.",),
        out="attention.dense.",
        gate="",
        up="mlp.dense_h_to_4h.",
        down="mlp.dense_4h_to_h.",
        final_norm="final_layer_norm.",
        output="embed_out.",
    )
    # Under the names of others the library ignores them outside `rope_parameters`.
    own = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    absent = {"hidden_act": "gelu", "use_parallel_residual": True, "attention_bias": True}
    of_tokens = "classifier."
    part, epsilon, computed = 0.25, ("layer_norm_eps", 1e-5), {}

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "activation": one_of(config, "hidden_act", ACTIVATIONS),
            "biased": ("qkv", "out", "units") if config["attention_bias"] else ("units",),
            "parallel": bool(config["use_parallel_residual"]),
            "layer_norms": True,
            "prefix": "gpt_neox.",
        }
