"""Gemma2ForCausalLM in the Hugging Face layout (hf_decoder).

Source: transformers 4.57.6 and 5.23.0, models/gemma2 (eager attention).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_blocks import ACTIVATIONS, complete, one_of, only
from ckpt_tool.reference.hf_decoder import embed, forward, head, layer, phases, windowed

__all__ = ["ARCHITECTURES", "Config", "embed", "forward", "head", "layer", "phases"]

ARCHITECTURES = ("Gemma2ForCausalLM",)
# What Gemma2Config takes for keys that are absent; it does not read `hidden_act`.
ABSENT = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,  # never null, even where no layer slides: the library makes the mask anyway
}
OR_NULL = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "layer_types": None,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Config(hf_decoder.Config):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        config = complete(config, (), ABSENT, OR_NULL)
        config["use_bidirectional_attention"] = bool(config.get("use_bidirectional_attention"))
        only(config, {"attention_bias": False, "use_bidirectional_attention": False})
        c = cls.read(
            config,
            {},
            {},
            theta=10000.0,
            activation=one_of(config, "hidden_activation", ACTIVATIONS),
            plus_one=True,
            four_norms=True,
            scaled_words=True,
            scalar=float(config["query_pre_attn_scalar"]),
            score_cap=config["attn_logit_softcapping"],
            logit_cap=config["final_logit_softcapping"],
        )
        turn = ["sliding_attention", "full_attention"] * c.n_layers
        kinds = config["layer_types"] or turn[: c.n_layers]
        return replace(c, windows=windowed(kinds, config["sliding_window"], c.n_layers))
