"""GPT-NeoX (20B, Pythia, RedPajama-INCITE), published in the Hugging Face layout: query, key and value of a
head fused, part of each head turned, both branches of a layer from one input or one after the other.

Source: transformers 4.57.6 and 5.23.0 (models/gpt_neox), published config.json files of Pythia and 20B.
Linear weights are (out, in).
"""

from __future__ import annotations

from ckpt_tool.convert.dialects import published
from ckpt_tool.convert.dialects.published import Vocabulary, divides, same
from ckpt_tool.convert.layout import Rule
from ckpt_tool.convert.numbers import (
    DECODER,
    DEFAULT,
    Class,
    Known,
    anything,
    by_name,
    count,
    flag,
    given,
    number,
)

T = "gpt_neox.layers.{i}."


def linear(name: str, weight: str, bias: str) -> tuple[Rule, ...]:
    """A weight and its bias; no bias where there is no layout for it."""
    apart = (same(f"{name}.bias", bias),) if bias else ()
    return (same(f"{name}.weight", weight), *apart)


def rows(known: Known) -> tuple[Rule, ...]:
    fused, out = ("(n t h)", "d") if known["attention_bias"] else ("", "")
    return (
        same("gpt_neox.embed_in.weight", "v d"),
        *linear(f"{T}input_layernorm", "d", "d"),
        *linear(f"{T}post_attention_layernorm", "d", "d"),
        *linear(f"{T}attention.query_key_value", "(n t h) d", fused),
        *linear(f"{T}attention.dense", "d (n h)", out),
        *linear(f"{T}mlp.dense_h_to_4h", "f d", "f"),
        *linear(f"{T}mlp.dense_4h_to_h", "d f", "d"),
        *linear("gpt_neox.final_layer_norm", "d", "d"),
    )


CLASS = Class(
    "GPTNeoXConfig",
    {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "rope_scaling": None,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": None, "max_position_embeddings": 2048},
    aliases={"rope_theta": ("rotary_emb_base",), "partial_rotary_factor": ("rotary_pct",)},
    idle=DECODER,
    prefix="gpt_neox.",
    words="embed_in.weight",
    tied={"embed_out.weight": ""},
)
COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

FAMILY = published.family(
    name="gpt-neox",
    title="GPT-NeoX",
    summary="GPT-NeoX 20B, Pythia, RedPajama-INCITE: .bin or safetensors in any sharding",
    classes={"gpt_neox": CLASS},
    fields=by_name(
        map(count, COUNTS),
        count("hidden_size", check=divides("hidden_size", "num_attention_heads")),
        number("layer_norm_eps", ask="the epsilon of the norms"),
        anything("hidden_act", silent=DEFAULT),
        # beside `rope_parameters` the class reads these and not the names that others have
        number("rotary_emb_base", silent=given(10000, "default of GPTNeoXConfig")),
        number("rotary_pct", silent=given(0.25, "default of GPTNeoXConfig")),
        flag("use_parallel_residual", rule=None),
        flag("attention_bias", rule=None),
        published.TIED,
    ),
    axes={
        "n": "num_attention_heads",
        "t": lambda _: 3,
        "h": lambda known: known["hidden_size"] // known["num_attention_heads"],
        "d": "hidden_size",
        "f": "intermediate_size",
        "v": "vocab_size",
    },
    rows=rows,
    told_by="gpt_neox.layers.0.attention.query_key_value.weight",
    layer=r"gpt_neox\.layers\.(\d+)\.",
    words="gpt_neox.embed_in.weight",
    head="embed_out.weight",
    ignored={
        r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias": "the causal mask, which the model makes itself",
        r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq": "recomputed from rotary_emb_base",
    },
    container="pth",
    generic={"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    vocabulary=Vocabulary(classes=("GPTNeoXTokenizer",)),
)
