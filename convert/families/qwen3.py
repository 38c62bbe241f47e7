"""Qwen3 (dense), published in the Hugging Face layout: Qwen2 without biases, and a norm for each head of
query and key.

Source: transformers 4.57.6 and 5.23.0 (models/qwen3), published config.json files.
"""

from ckpt_tool.convert.dialects import megatron_core, published
from ckpt_tool.convert.dialects.megatron_core import Ends
from ckpt_tool.convert.dialects.published import T, Vocabulary, attention, decoder, weights
from ckpt_tool.convert.numbers import DECODER, DEFAULT, LLAMA_SIZES, ROPE, Class, by_name, count, only

SIZES = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128}
CLASS = Class(
    "Qwen3Config",
    {**LLAMA_SIZES, **ROPE, **SIZES, "sliding_window": 4096, "attention_bias": False},
    {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 32768},
    idle=DECODER,
    idle_numbers={"use_sliding_window": False, "max_window_layers": 28},
    windows="last",
    answering="transformer.",
)
# 151669 tokens, published with 151936 rows; Megatron pads to a multiple of 128 for each rank.
END = 151643
CORE = megatron_core.Core(
    family="qwen3",
    model="Qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    config=CLASS,
    head_norms=True,
    fields=(only("attention_bias", False, "no published model has biases"),),
    unsaid=("use_sliding_window",),
    ends=(Ends(range(151669, 153601), END, END, "<|endoftext|> of Qwen3"),),
)

FAMILY = published.family(
    name="qwen3",
    title="Qwen3",
    summary="Qwen3 0.6B to 32B (dense): .bin or safetensors in any sharding, and Megatron-Core ranks",
    classes={"qwen3": CLASS},
    fields=by_name(
        published.FIELDS,
        count("head_dim", silent=DEFAULT),
        only("hidden_act", "silu", "the only activation of Qwen3"),
        only("attention_bias", False, "no published model has biases"),
    ),
    rows=decoder(*attention(), *weights(f"{T}self_attn.q_norm", f"{T}self_attn.k_norm", pattern="h")),
    told_by="model.layers.0.self_attn.q_norm.weight",
    layouts=megatron_core.layouts_of(CORE),
    vocabulary=Vocabulary(classes=("Qwen2Tokenizer", "GPT2Tokenizer")),
)
