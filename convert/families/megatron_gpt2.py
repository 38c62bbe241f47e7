"""Megatron GPT-2: the NGC zip (345M) and folders of ranks that Megatron-LM writes.

Source: NVIDIA/Megatron-LM v1.0 to core_v0.9.0 (model/gpt2_model.py, gpt_model.py; core/models/gpt). Conv1D
keeps weights (in, out).
"""

from __future__ import annotations

from dataclasses import replace

from ckpt_tool.convert.dialects import megatron
from ckpt_tool.convert.dialects.converted import GPT2_NAMES
from ckpt_tool.convert.dialects.megatron import both, token_id
from ckpt_tool.convert.dialects.megatron_args import activation
from ckpt_tool.convert.dialects.megatron_ranks import args_of
from ckpt_tool.convert.dialects.megatron_words import Published, Vocabulary, words
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DECODER,
    DECODER_HEADS,
    DTYPE,
    GPT_IDS,
    GPT_NAMES,
    SUMMARY,
    Class,
    Known,
    Value,
    flag,
    free,
    given,
    only,
)

S, T = "layers.{i}.", "transformer.h.{i}."
WORDS = "transformer.wte.weight"


def rows(known: Known, order: str) -> tuple[Rule, ...]:
    fused = (f"({order}) d -> d (t n h)", f"({order}) -> (t n h)")
    return (
        rule("word_embeddings.weight", WORDS, "v d", split="v"),
        rule("position_embeddings.weight", "transformer.wpe.weight", "p d"),
        *both(f"{S}input_layernorm.", f"{T}ln_1.", "d", "d"),
        *both(f"{S}attention.query_key_value.", f"{T}attn.c_attn.", *fused, split="n"),
        *both(f"{S}attention.dense.", f"{T}attn.c_proj.", "d (n h) -> (n h) d", "d", split="n"),
        *both(f"{S}post_attention_layernorm.", f"{T}ln_2.", "d", "d"),
        *both(f"{S}mlp.dense_h_to_4h.", f"{T}mlp.c_fc.", "f d -> d f", "f", split="f"),
        *both(f"{S}mlp.dense_4h_to_h.", f"{T}mlp.c_proj.", "d f -> f d", "d", split="f"),
        *both("final_layernorm.", "transformer.ln_f.", "d", "d"),
    )


# Its file may hold no args.
PUBLISHED = {(24, 1024, 4096, 1024, 50304): Published("GPT-2 345M v0.0", 16, 50257)}
CLASS = Class(
    "GPT2Config",
    {
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    {**GPT_IDS, "n_positions": 1024},
    aliases=GPT_NAMES,
    idle={
        **SUMMARY,
        **DECODER,
        "n_ctx": "not read",
        "reorder_and_upcast_attn": "the same sums in float32",
    },
    masked=-1e4,
    prefix="transformer.",
    words="wte.weight",
    positions="wpe.weight",
    fused_bias=".attn.c_attn.bias",
    dropouts={"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    heads={
        **DECODER_HEADS,
        "ForTokenClassification": ("classifier",),
        "DoubleHeadsModel": ("multiple_choice_head.summary",),
    },
)


def four_times(known: Known) -> Value:
    return given(4 * known["hidden_size"], "n_inner absent or null, four times the width")


def softmax_in_float32(known: Known) -> Value:
    """GPT2Attention can compute scores and softmax in float32; the layer scaling of Megatron implies that."""
    for name in ("attention_softmax_in_fp32", "apply_query_key_layer_scaling"):
        if args_of(known).get(name):
            return Value(True, f"args: {name}")
    return given(False, "args do not ask for scores in float32")


def end_of_text(known: Known) -> Value:
    if known.value("vocab_size").source == known.value("rows").source:
        return Value(None, "nothing tells which word ends a text")
    return given(known["vocab_size"] - 1, "GPT-2's last word is <|endoftext|>")


SCALING = "rule: what apply_query_key_layer_scaling divides by it multiplies by again"
FIELDS = (
    megatron.LAYERS,
    megatron.WIDTH,
    megatron.heads(PUBLISHED),
    replace(megatron.INNER, silent=four_times),
    megatron.POSITIONS,
    megatron.EPSILON,
    activation("tanh", "as the published GPT-2"),
    words(PUBLISHED),
    only("scale_attn_weights", True, "the scores of the original"),
    only("scale_attn_by_inverse_layer_idx", False, SCALING),
    flag("reorder_and_upcast_attn", rule=softmax_in_float32, free=True),
    megatron.TIED,
    DTYPE,
    token_id("bos_token_id", end_of_text),
    token_id("eos_token_id", end_of_text),
    *free(
        "default of GPT2Config",
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        initializer_range=0.02,
        use_cache=True,
    ),
    only("add_cross_attention", False, "a decoder alone", hidden=True),
)

FAMILY = megatron.family(
    name="megatron-gpt2",
    summary="Megatron GPT-2: NGC zips, .pt files and folders of ranks, of every checkpoint_version",
    architectures=("GPT2LMHeadModel",),
    classes={"gpt2": CLASS},
    fields=FIELDS,
    vocabulary=Vocabulary("byte-level", ("GPT2Tokenizer",)),
    rows=rows,
    heads=False,
    layer=r"transformer\.h\.(\d+)\.",
    words=WORDS,
    padded=lambda _: "the embedding",
    own_names=GPT2_NAMES,
    ignored={r"transformer\.h\.\d+\.attn\.(masked_)?bias": "the causal mask"},
    args=lambda known: {
        "untie_embeddings_and_output_weights": Value(
            not known["tie_word_embeddings"], "config.json: tie_word_embeddings"
        )
    },
)
