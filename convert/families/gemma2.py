"""Gemma 2 (2B, 9B, 27B) as published: norms on both sides of each branch, a tied output layer, windows.

Source: transformers 4.57.6 and 5.23.0 (models/gemma2), published config.json files. Norms store their weight
less one; loaders add it, and so conversion leaves it.
"""

from ckpt_tool.convert.dialects import published
from ckpt_tool.convert.dialects.published import GATED, T, Vocabulary, attention, weights
from ckpt_tool.convert.numbers import (
    DECODER_HEADS,
    DEFAULT,
    ROPE,
    Class,
    by_name,
    count,
    number,
    only,
    without,
)

ROWS = (
    *weights("model.embed_tokens", pattern="v d"),
    *weights(f"{T}input_layernorm", f"{T}post_attention_layernorm"),
    *weights(f"{T}pre_feedforward_layernorm", f"{T}post_feedforward_layernorm"),
    *attention(),
    *GATED,
    *weights("model.norm"),
)
SIZES = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
CLASS = Class(
    "Gemma2Config",
    {
        **SIZES,
        **HEADS,
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
    aliases={"sliding_window": ("sliding_window_size",)},  # both are in the published 9B
    idle={"hidden_act": "not read: hidden_activation is"},
    windows="alternate",
    null_too=("attention_dropout",),
    heads=without(DECODER_HEADS, "ForQuestionAnswering"),
)

FAMILY = published.family(
    name="gemma2",
    title="Gemma 2",
    summary="Gemma 2 2B, 9B, 27B: safetensors in any sharding",
    classes={"gemma2": CLASS},
    fields=by_name(
        published.FIELDS,
        count("head_dim", silent=DEFAULT),
        number("rope_theta", silent=DEFAULT),
        only("hidden_activation", "gelu_pytorch_tanh", "the only activation of Gemma 2"),
        only("attention_bias", False, "no published model has biases"),
        count("query_pre_attn_scalar", silent=DEFAULT),
        published.window("sliding_window", unread="sliding_window_size"),
        map(published.cap_or_null, ("attn_logit_softcapping", "final_logit_softcapping")),
    ),
    rows=lambda _: ROWS,
    told_by="model.layers.0.pre_feedforward_layernorm.weight",
    vocabulary=Vocabulary(classes=("GemmaTokenizer",)),
)
