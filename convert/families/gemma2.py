"""Gemma 2 (2B, 9B, 27B), published in the Hugging Face layout: norms on both sides of each branch, a tied
output layer, a window in every second layer.

Source: transformers 4.57.6 and 5.23.0 (models/gemma2), published config.json files. Norms store their weight
less one; loaders add it, and so conversion leaves it.
"""

from __future__ import annotations

from ckpt_tool.convert.dialects import published
from ckpt_tool.convert.dialects.published import GATED, T, Vocabulary, attention, divides, weights
from ckpt_tool.convert.numbers import DEFAULT, ROPE, Class, by_name, count, number, only

ROWS = (
    *weights("model.embed_tokens", pattern="v d"),
    *weights(*(f"{T}{when}_layernorm" for when in ("input", "post_attention"))),
    *weights(*(f"{T}{when}_feedforward_layernorm" for when in ("pre", "post"))),
    *attention(),
    *GATED,
    *weights("model.norm"),
)
CLASS = Class(
    "Gemma2Config",
    {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        **ROPE,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None,
        "tie_word_embeddings": True,
    },
    {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 8192},
    idle={
        "hidden_act": "not read: hidden_activation is",
        "cache_implementation": "says how to run or load, not what",
    },
    windows="alternate",
)

FAMILY = published.family(
    name="gemma2",
    title="Gemma 2",
    summary="Gemma 2 2B, 9B, 27B: safetensors in any sharding",
    architectures={"gemma2": "Gemma2ForCausalLM"},
    classes={"gemma2": CLASS},
    fields=by_name(
        published.COUNTS,
        count("num_attention_heads", check=divides("num_key_value_heads")),
        count("head_dim", silent=DEFAULT),
        published.EPSILON,
        number("rope_theta", silent=DEFAULT),
        published.SCALING,
        only("hidden_activation", "gelu_pytorch_tanh", "the only activation of Gemma 2"),
        only("attention_bias", False, "no published model has biases"),
        count("query_pre_attn_scalar", silent=DEFAULT),
        published.TIED,
    ),
    axes=published.AXES,
    rows=lambda _: ROWS,
    told_by="model.layers.0.pre_feedforward_layernorm.weight",
    ignored=published.FREQUENCIES,
    vocabulary=Vocabulary(classes=("GemmaTokenizer",)),
)
