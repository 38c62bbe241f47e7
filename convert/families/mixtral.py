"""Mixtral 8x7B and 8x22B, and Mixtrals that were trained in Megatron-Core.

Three published forms. A: one `consolidated.00.pth` with a tensor for each expert; B: `consolidated.00.pt`
to `.07.pt` that hold different tensors, with the experts of a layer stacked and w2 transposed; C:
`consolidated.safetensors` named as A. Sources: mistralai/mistral-inference @b8181901 (A, C), transformers
4.37.2 and ml-explore/mlx-examples @1120adab (B). params.json has native names in A and C and may have
Hugging Face names in B.
"""

from __future__ import annotations

from dataclasses import replace

from ckpt_tool.convert.dialects import consolidated, megatron_core, params_json
from ckpt_tool.convert.dialects.consolidated import Form, S, Seen, T
from ckpt_tool.convert.dialects.megatron_core import Ends
from ckpt_tool.convert.dialects.megatron_experts import Experts
from ckpt_tool.convert.layout import rule
from ckpt_tool.convert.numbers import (
    DEFAULT,
    MAX_COUNT,
    Known,
    Value,
    count,
    flag,
    given,
    like_llama,
    only,
    some,
)

SE, TE = S + "feed_forward.experts.{e}.", T + "block_sparse_moe.experts.{e}."
EXPERTS = (
    rule(S + "feed_forward.gate.weight", T + "block_sparse_moe.gate.weight", "e d"),
    rule(SE + "w1.weight", TE + "w1.weight", "f d"),
    rule(SE + "w3.weight", TE + "w3.weight", "f d"),
    rule(SE + "w2.weight", TE + "w2.weight", "d f"),
)
STACKED = (
    rule(S + "block_sparse_moe.gate.weight", T + "block_sparse_moe.gate.weight", "e d"),
    rule(S + "block_sparse_moe.w1", TE + "w1.weight", "(e f) d", cut="e"),
    rule(S + "block_sparse_moe.w3", TE + "w3.weight", "(e f) d", cut="e"),
    rule(S + "block_sparse_moe.w2", TE + "w2.weight", "(e f) d -> d (e f)", cut="e"),
)
# What transformers 5.23.0 (models/mixtral, conversion_mapping.py) makes of the experts when it loads them.
IN_MEMORY = {
    T + "mlp.gate.weight": (T + "block_sparse_moe.gate.weight",),
    **{T + f"mlp.experts.{{e}}.{w}.weight": (TE + f"{w}.weight",) for w in ("w1", "w2", "w3")},
    T + "mlp.experts.gate_up_proj": (TE + "w1.weight", TE + "w3.weight"),
    T + "mlp.experts.down_proj": (TE + "w2.weight",),
}


def told(seen: Seen) -> tuple[bool, str]:
    found = {"experts": "a tensor for each expert", "stacked": "stacked experts"}.get(seen.kind or "")
    return found is not None, found or "no experts in layer 0"


def experts(known: Known) -> Value | None:
    size = known.source.size
    return size(EXPERTS[0].source[0], 0, shared=False) or size(STACKED[0].source[0], 0, shared=False)


def width(known: Known) -> Value | None:
    stacked = known.source.size(STACKED[1].source[0], 0)
    if stacked is None:
        return known.source.size(EXPERTS[1].source[0].replace("{e}", "0"), 0)
    return Value(
        stacked.value // known["num_local_experts"], f"{stacked.source}, divided by num_local_experts"
    )


def two(known: Known) -> Value | None:
    """How many experts each token is sent to: 2 in both published models, and in a params.json without it."""
    return None if known.facts.document is None else given(2, "both Mixtral models choose 2 experts")


def not_more_than_there_are(known: Known, chosen: Value) -> Value:
    if chosen.value > known["num_local_experts"]:
        message = f"expected at most {known['num_local_experts']} experts per token, found {chosen.value}"
        known.refuse("config-mismatch", message, "num_experts_per_tok")
    return chosen


def theta(known: Known) -> Value | None:
    """1e6 where params.json is silent, as both published models have it. With a window the code of that
    time took 1e4, which no published model has: that is asked."""
    if known.facts.document is None or known["sliding_window"] is not None:
        return None
    return given(1e6, "rope_theta absent from params.json and no sliding_window: 1e6")


def context(known: Known) -> Value:
    """The length in config.json, which changes no number: 65536 for 8x22B, 32768 for 8x7B."""
    if (known["hidden_size"], known["num_hidden_layers"]) == (6144, 56):
        return given(65536, "the shape of 8x22B")
    return given(32768, "as published with 8x7B")


CLASS = like_llama(
    "MixtralConfig",
    {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    context=131072,
    aliases={"num_local_experts": ("num_experts",)},
    tokenizer="LlamaTokenizer",
    routing={"output_router_logits": False, "router_jitter_noise": 0.0},
)
CORE = megatron_core.Core(
    family="mixtral",
    model="Mixtral",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    config=CLASS,
    experts=Experts(
        router=T + "block_sparse_moe.gate.weight",
        gate=TE + "w1.weight",
        up=TE + "w3.weight",
        down=TE + "w2.weight",
    ),
    fields=(only("sliding_window", None, "Megatron-Core's GPT has no window"),),
    unsaid=("sliding_window",),
    ends=(Ends(range(1, MAX_COUNT), 1, 2, "every Mistral tokenizer"),),
    reads=(flag("tie_word_embeddings", rule=None), params_json.SCALED),
)

FAMILY = consolidated.family(
    name="mixtral",
    summary="Mixtral 8x7B, 8x22B: consolidated.*, the eight .pt files; Megatron-Core",
    architecture="MixtralForCausalLM",
    config=CLASS,
    told=told,
    fields=(
        only("hidden_act", "silu", "the original's experts", keys=params_json.ACTIVATION),
        params_json.SIZES,
        params_json.of_class("intermediate_size", "hidden_dim", rule=width),
        params_json.of_class("num_local_experts", "moe.num_experts", rule=experts),
        count(
            "num_experts_per_tok",
            "moe.num_experts_per_tok",
            "num_experts_per_tok",
            rule=two,
            silent=DEFAULT,
            check=not_more_than_there_are,
            ask="the number of experts per token",
        ),
        replace(params_json.THETA, rule=theta),
        params_json.UNSCALED,
        params_json.WINDOW,
        count("max_position_embeddings", read=params_json.length, rule=context),
        only("tie_word_embeddings", False, "rule: no Mixtral ties its head", keys=params_json.TIED_KEYS),
    ),
    training={"output_router_logits": False, "router_aux_loss_coef": 0.001},  # the second of the loss only
    forms={
        "C": Form(("consolidated.safetensors",), EXPERTS),
        "A": Form(("consolidated.00.pth",), EXPERTS),
        "B": Form(tuple(f"consolidated.{k:02d}.pt" for k in range(8)), STACKED),
    },
    params=(*params_json.MISTRAL_AI, "moe.num_experts_per_tok", "moe.num_experts", some("sliding_window")),
    ids=lambda _: (1, 2, "Mistral tokenizers"),
    options=(
        consolidated.CONTAINER,
        consolidated.Option(
            "form", "Layout to write.", "original", choices=("A", "B", "C", "mcore", "torch_dist")
        ),
    ),
    layouts=megatron_core.layouts_of(CORE),
    vocabulary=consolidated.MISTRAL_AI,
    in_memory=IN_MEMORY,
)
