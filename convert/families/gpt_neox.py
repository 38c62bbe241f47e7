"""GPT-NeoX (20B, Pythia, RedPajama-INCITE), published in the Hugging Face layout: query, key and value of a
head fused, part of each head turned, both branches of a layer from one input or one after the other.

Source: transformers 4.57.6 and 5.23.0 (models/gpt_neox), published config.json files of Pythia and 20B.
Linear weights are (out, in).
"""

from ckpt_tool.convert.dialects import published
from ckpt_tool.convert.dialects.published import Vocabulary, divides, weights
from ckpt_tool.convert.layout import Rule
from ckpt_tool.convert.numbers import (
    DECODER,
    DECODER_HEADS,
    DEFAULT,
    Class,
    Known,
    anything,
    by_name,
    count,
    number,
)

T = "gpt_neox.layers.{i}."


def rows(known: Known) -> tuple[Rule, ...]:
    biases = known["attention_bias"]
    return (
        *weights("gpt_neox.embed_in", pattern="v d"),
        *weights(f"{T}input_layernorm", f"{T}post_attention_layernorm", biases=True),
        *weights(f"{T}attention.query_key_value", pattern="(n t h) d", biases=biases),
        *weights(f"{T}attention.dense", pattern="d (n h)", biases=biases),
        *weights(f"{T}mlp.dense_h_to_4h", pattern="f d", biases=True),
        *weights(f"{T}mlp.dense_4h_to_h", pattern="d f", biases=True),
        *weights("gpt_neox.final_layer_norm", biases=True),
    )


SIZES = {"vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44}
ROTARY = {"rope_theta": 10000, "partial_rotary_factor": 0.25, "rope_scaling": None}
CLASS = Class(
    "GPTNeoXConfig",
    {
        **SIZES,
        **ROTARY,
        "num_attention_heads": 64,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": None, "max_position_embeddings": 2048},
    aliases={"rope_theta": ("rotary_emb_base",), "partial_rotary_factor": ("rotary_pct",)},
    idle=DECODER,
    prefix="gpt_neox.",
    words="embed_in.weight",
    fused_bias=".attention.query_key_value.bias",
    fused_by_head=True,
    tied={"embed_out.weight": ""},
    dropouts={"hidden_dropout": 0.0, "attention_dropout": 0.0},
    heads={**DECODER_HEADS, "ForTokenClassification": ("classifier",)},
)

FAMILY = published.family(
    name="gpt-neox",
    title="GPT-NeoX",
    summary="GPT-NeoX 20B, Pythia, RedPajama-INCITE: .bin or safetensors in any sharding",
    classes={"gpt_neox": CLASS},
    fields=by_name(
        map(count, published.SIZES),
        count("hidden_size", check=divides("hidden_size", "num_attention_heads")),
        number("layer_norm_eps", ask="the epsilon of the norms"),
        anything("hidden_act", silent=DEFAULT),
        # beside `rope_parameters` the class reads these and not the names that others have
        number("rotary_emb_base", silent=DEFAULT),
        number("rotary_pct", silent=DEFAULT),
        published.outspoken("use_parallel_residual"),
        published.outspoken("attention_bias"),
        published.TIED,
    ),
    axes=published.FUSED,
    rows=rows,
    told_by="gpt_neox.layers.0.attention.query_key_value.weight",
    head="embed_out.weight",
    held_as={"lm_head.weight": "embed_out.weight"},  # of transformers 5
    ignored={
        r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias": "the causal mask, which the model makes itself",
        r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq": "recomputed from rotary_emb_base",
    },
    container="pth",
    generic={"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    vocabulary=Vocabulary(classes=("GPTNeoXTokenizer",)),
)
