"""Gemma2 and its heads in the Hugging Face layout (hf_decoder).

Source: transformers 4.57.6 and 5.23.0, models/gemma2 (eager attention).
"""

from collections.abc import Mapping
from typing import Any

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_blocks import ACTIVATIONS, one_of
from ckpt_tool.reference.hf_decoder import Names, windowed
from ckpt_tool.reference.hf_heads import DECODERS

ARCHITECTURES = tuple(f"Gemma2{end}" for end in DECODERS[:4])  # answers no questions


class Config(hf_decoder.Config):
    names = Names(
        norm_2="pre_feedforward_layernorm.",
        after=("post_attention_layernorm.", "post_feedforward_layernorm."),
    )
    absent = {
        "head_dim": 256,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",  # `hidden_act` is not read
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,  # never null, even where no layer slides: the library makes the mask anyway
    }
    or_null = {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "layer_types": None,
        "tie_word_embeddings": True,
    }
    computed = {"attention_bias": False, "use_bidirectional_attention": (False, None)}

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        n_layers = int(config["num_hidden_layers"])
        kinds = config["layer_types"] or (["sliding_attention", "full_attention"] * n_layers)[:n_layers]
        return {
            "windows": windowed(kinds, config["sliding_window"], n_layers),
            "activation": one_of(config, "hidden_activation", ACTIVATIONS),
            "plus_one": True,
            "scaled_words": True,
            "scalar": float(config["query_pre_attn_scalar"]),
            "score_cap": config["attn_logit_softcapping"],
            "logit_cap": config["final_logit_softcapping"],
        }
