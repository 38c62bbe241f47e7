"""Qwen1.5, Qwen2 and Qwen2.5 (dense): published in the Hugging Face layout, trained in Megatron-Core's.

Both are originals here. Of the first, converting makes one canonical folder; of the second (`mp_rank_*` of a
GPT model with gated feed-forward and biases for query, key and value) it takes grouped tensors apart, and
`form` "mcore" on the way back puts them together.

Source: transformers 4.37.2 and 5.23.0 (models/qwen2), NVIDIA/Megatron-LM core_v0.9.0 (core/models/gpt),
NVIDIA-NeMo/Megatron-Bridge @067f987d (models/qwen). Linear weights are (out, in) on both sides.
"""

from __future__ import annotations

from ckpt_tool.convert.dialects import megatron_core, published
from ckpt_tool.convert.dialects.megatron_core import Ends
from ckpt_tool.convert.dialects.published import GATED, T, Vocabulary, attention, head_width, weights
from ckpt_tool.convert.numbers import (
    DECODER,
    DEFAULT,
    LLAMA_SIZES,
    ROPE,
    Class,
    Known,
    Value,
    anything,
    by_name,
    count,
    flag,
    number,
    only,
    shown,
)

ROWS = (
    *weights("model.embed_tokens", pattern="v d"),
    *weights(f"{T}input_layernorm"),
    *attention(biases=True),
    *weights(f"{T}post_attention_layernorm"),
    *GATED,
    *weights("model.norm"),
)
CLASS = Class(
    "Qwen2Config",
    {
        **LLAMA_SIZES,
        **ROPE,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
    },
    {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 32768},
    idle=DECODER,
    idle_numbers={"use_sliding_window": False, "max_window_layers": 28},
    windows="last",
    answering="transformer.",
)


def heads_fit(known: Known, told: Value) -> Value:
    width, heads = known["hidden_size"], known["num_attention_heads"]
    if width % heads or told.value != width // heads:
        found = "a rest" if told.value == width // heads else f"head_dim {told.value}"
        message = f"expected heads of {width} / {heads} channels, as Qwen2's class has them, found {found}"
        known.refuse("config-mismatch", message, "num_attention_heads")
    return told


def window(known: Known, use: Value) -> Value:
    """Only with use_sliding_window there is a window, in the layers that `layer_types` or max_window_layers
    say (transformers since 4.51; before, the library's kernels disagreed)."""
    width, first = known["sliding_window"], known["max_window_layers"]
    if use.value and (type(width) is not int or width < 1):
        message = f"expected a number of tokens beside a window, found {shown(width)}"
        known.refuse("bad-config", message, "sliding_window")
    if use.value and first is None and not known.facts.given("layer_types"):
        message = "expected max_window_layers or layer_types beside a window, found neither"
        known.refuse("missing-fact", message, "max_window_layers", "--set max_window_layers=VALUE")
    return use


FIELDS = by_name(
    published.COUNTS,
    published.EPSILON,
    number("rope_theta", ask="the base of the rotary frequencies, 1000000 in published models"),
    published.SCALING,
    only("hidden_act", "silu", "the only activation of Qwen2"),
    published.TIED,
    flag("use_sliding_window", rule=None, silent=DEFAULT, check=window),
    anything("sliding_window", silent=Value(None, "rule: absent"), hidden=True),
    anything("max_window_layers", silent=Value(None, ""), hidden=True),
    anything("layer_types", silent=Value(None, ""), hidden=True),
    count("head_dim", silent=lambda known: Value(head_width(known), ""), check=heads_fit, hidden=True),
)

# 151646 tokens and up to 18 more in Qwen2.5, published with 151936 or 152064 rows; Megatron pads to a
# multiple of 128 for each rank, and people add tokens.
END = 151643
ENDS = Ends(range(151646, 153601), END, END, "<|endoftext|> in every Qwen2 vocabulary")
CORE = megatron_core.Core(
    family="qwen2",
    model="Qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    config=CLASS,
    biases=True,
    own_width=False,
    fields=(only("use_sliding_window", False, "Megatron-Core's GPT has no window"),),
    unsaid=("use_sliding_window",),
    ends=(ENDS,),
)

FAMILY = published.family(
    name="qwen2",
    title="Qwen2",
    summary="Qwen1.5, Qwen2, Qwen2.5 (dense): .bin or safetensors in any sharding, and Megatron-Core ranks",
    classes={"qwen2": CLASS},
    fields=FIELDS,
    axes={**published.AXES, "h": head_width},
    rows=lambda _: ROWS,
    told_by="model.layers.0.self_attn.q_proj.bias",
    never="model.layers.0.self_attn.o_proj.bias",
    why="Hugging Face names with biases for query, key and value, as Qwen2's are",
    layouts=megatron_core.layouts_of(CORE),
    pools=True,
    vocabulary=Vocabulary(classes=("Qwen2Tokenizer", "GPT2Tokenizer")),
)
