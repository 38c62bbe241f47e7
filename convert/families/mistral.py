"""Mistral: 7B v0.1 to v0.3, Nemo, Small, Large, Codestral and their instruct versions, text only.

Original: `consolidated.00.pth` or `consolidated*.safetensors`, params.json, `tokenizer.model*` or
tekken.json, as mistralai/mistral-inference @2557e12d reads them (first release @c18d5b9b, December 2023
@b8181901).
"""

from __future__ import annotations

from ckpt_tool.convert.dialects import consolidated, megatron_core, params_json
from ckpt_tool.convert.dialects.consolidated import DENSE, Form, Seen
from ckpt_tool.convert.dialects.megatron_core import Ends
from ckpt_tool.convert.dialects.params_json import OF_META, OF_MISTRAL_AI
from ckpt_tool.convert.numbers import MAX_COUNT, Known, Value, count, given, like_llama, only, some

NEMO = {"hidden_size": 5120, "num_hidden_layers": 40, "head_dim": 128, "intermediate_size": 14336}


def told(seen: Seen) -> tuple[bool, str]:
    if seen.not_dense:
        return False, seen.not_dense
    if seen.keys & OF_META:
        return False, f"params.json has {', '.join(sorted(seen.keys & OF_META))}, as Llama's do"
    if seen.keys & params_json.OF_2025:
        return False, f"params.json has {', '.join(sorted(seen.keys & params_json.OF_2025))}"
    if seen.keys & OF_MISTRAL_AI:
        return True, f"dense layers, and params.json has {', '.join(sorted(seen.keys & OF_MISTRAL_AI))}"
    if seen.equal_names:
        return False, "model-parallel ranks of equal tensor names, as Llama's are"
    return True, "dense layers, and nothing in params.json that only Llama's have"


def context(known: Known) -> Value:
    """The length in config.json, which changes no number: Nemo was published with 131072, the others with
    32768."""
    if all(known[name] == size for name, size in NEMO.items()):
        return given(131072, "the shape of Mistral Nemo")
    return given(32768, "as published with Mistral models")


CLASS = like_llama(
    "MistralConfig",
    {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
    context=131072,
    tokenizer="LlamaTokenizer",
)
CORE = megatron_core.Core(
    family="mistral",
    model="Mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    config=CLASS,
    fields=(only("sliding_window", None, "Megatron-Core's GPT has no window"),),
    unsaid=("sliding_window",),
    ends=(Ends(range(1, MAX_COUNT), 1, 2, "every Mistral tokenizer"),),
    reads=(params_json.SCALED,),
)

FAMILY = consolidated.family(
    name="mistral",
    summary="Mistral 7B v0.1 to v0.3, Nemo, Small, Large, Codestral: consolidated.*; Megatron-Core",
    architecture="MistralForCausalLM",
    config=CLASS,
    told=told,
    lacks=("no experts", ("moe.num_experts",)),
    fields=(
        only("hidden_act", "silu", "the original's feed_forward", keys=params_json.ACTIVATION),
        params_json.SIZES,
        params_json.THETA,
        params_json.UNSCALED,
        params_json.WINDOW,
        count("max_position_embeddings", read=params_json.length, rule=context),
        params_json.TIED,
        params_json.QUANTISED,
    ),
    forms={
        "safetensors": Form(("consolidated.safetensors",), DENSE),  # as Mistral AI publishes today
        "pth": Form(("consolidated.00.pth",), DENSE),
    },
    params=(*params_json.MISTRAL_AI, some("sliding_window"), params_json.tied, params_json.packed),
    ids=lambda _: (1, 2, "every Mistral tokenizer"),
    options=(consolidated.CONTAINER,),
    layouts=megatron_core.layouts_of(CORE),
    vocabulary=consolidated.MISTRAL_AI,
    ignored=consolidated.IGNORED | consolidated.FAKE,
    quantised=consolidated.QSCALE,
)
