"""Gemma 2 as Google published it for transformers: norms before and after each branch, whose weights are
stored less one; words scaled by the root of the width; scores and logits capped; windows in every other
layer; gates of gelu.

Source: Gemma Team 2024 (arXiv 2408.00118, section 2); google/gemma_pytorch @014acb7a, gemma/model.py; the
documentation of Gemma2Config in transformers 4.57 for its numbers.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.reference.blocks import ACTIVATIONS
from ckpt_tool.reference.facts import known
from ckpt_tool.reference.published import AS_PUBLISHED, Published, windows_of


class Config(Published):
    layout = replace(
        AS_PUBLISHED,
        norm_2="pre_feedforward_layernorm.",
        after=("post_attention_layernorm.", "post_feedforward_layernorm."),
    )
    documented = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "sliding_window_size": None,  # the same once more in the published 9B; the class does not read it
        "tie_word_embeddings": True,
    }
    computed = {"attention_bias": (False,), "use_bidirectional_attention": (False,)}

    @classmethod
    def traits(cls, facts: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
        """Where no list says so, the layers with even numbers have the window."""
        if facts["sliding_window"] is None:
            raise ValueError("expected sliding_window in config.json or given by name, found none")
        alternate = ("sliding_attention" if i % 2 == 0 else "" for i in range(made["n_layers"]))
        kinds = facts.get("layer_types") or list(alternate)
        return {
            "windows": windows_of({**facts, "use_sliding_window": True, "layer_types": kinds}),
            "activation": known("hidden_activation", facts, ACTIVATIONS),
            "from_zero": True,
            "word_scale": math.sqrt(made["dim"]),
            "query_scalar": float(facts["query_pre_attn_scalar"]),
            "score_cap": facts["attn_logit_softcapping"],
            "logit_cap": facts["final_logit_softcapping"],
        }
