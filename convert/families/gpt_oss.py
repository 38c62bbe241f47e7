"""gpt-oss 20B and 120B: the publisher's `original/` folder, and the Hugging Face layout with the experts in
MXFP4 under other names, or as numbers.

Source: openai/gpt-oss @7b58334 (gpt_oss/torch/model.py: the keys of config.json, and what is fixed in code);
transformers 4.57.6 and 5.23.0 (models/gpt_oss, integrations/mxfp4.py). Rows of mlp1 are gate, up, gate, up,
... on both sides; heads turn by halves on both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ckpt_tool.convert.dialects import openai
from ckpt_tool.convert.dialects.openai import Vocabulary
from ckpt_tool.convert.layout import rule
from ckpt_tool.convert.numbers import (
    DECODER_HEADS,
    DEFAULT,
    Class,
    Field,
    Known,
    Size,
    Value,
    anything,
    count,
    given,
    number,
    object_or_null,
    only,
    shown,
    without,
    written,
)

S, T = "block.{i}.", "model.layers.{i}."
A, M, E = S + "attn.", S + "mlp.", T + "mlp.experts."
QKV = tuple(f"{T}self_attn.{part}_proj" for part in "qkv")
HEADS = ("x", ("n", "k", "k"))  # x: those of queries, then of keys, then of values
MXFP4_ROWS = (
    rule(M + "mlp1_weight.blocks", E + "gate_up_proj_blocks", "e u g c"),
    rule(M + "mlp1_weight.scales", E + "gate_up_proj_scales", "e u g"),
    rule(M + "mlp2_weight.blocks", E + "down_proj_blocks", "e d m c"),
    rule(M + "mlp2_weight.scales", E + "down_proj_scales", "e d m"),
)
NUMBER_ROWS = (
    rule(M + "mlp1_weight", E + "gate_up_proj", "e u d -> e d u"),
    rule(M + "mlp2_weight", E + "down_proj", "e d f -> e f d"),
)
ROWS = (
    rule("embedding.weight", "model.embed_tokens.weight", "v d"),
    rule(A + "norm.scale", T + "input_layernorm.weight", "d"),
    rule(A + "qkv.weight", tuple(f"{name}.weight" for name in QKV), "(x h) d", cut=HEADS),
    rule(A + "qkv.bias", tuple(f"{name}.bias" for name in QKV), "(x h)", cut=HEADS),
    rule(A + "sinks", T + "self_attn.sinks", "n"),
    rule(A + "out.weight", T + "self_attn.o_proj.weight", "d (n h)"),
    rule(A + "out.bias", T + "self_attn.o_proj.bias", "d"),
    rule(M + "norm.scale", T + "post_attention_layernorm.weight", "d"),
    rule(M + "gate.weight", T + "mlp.router.weight", "e d"),
    rule(M + "gate.bias", T + "mlp.router.bias", "e"),
    rule(M + "mlp1_bias", E + "gate_up_proj_bias", "e u"),
    rule(M + "mlp2_bias", E + "down_proj_bias", "e d"),
    rule("norm.scale", "model.norm.weight", "d"),
    rule("unembedding.weight", "lm_head.weight", "v d"),
)
AXES: Mapping[str, Size] = {
    "n": "num_attention_heads",
    "k": "num_key_value_heads",
    "h": "head_dim",
    "d": "hidden_size",
    "f": "intermediate_size",
    "v": "vocab_size",
    "e": "num_local_experts",
    "x": lambda known: known["num_attention_heads"] + 2 * known["num_key_value_heads"],
    "u": lambda known: 2 * known["intermediate_size"],
    "g": lambda known: known["hidden_size"] // openai.BLOCK,
    "m": lambda known: known["intermediate_size"] // openai.BLOCK,
    "c": lambda _: openai.BLOCK // 2,
}

# --- numbers ----------------------------------------------------------------------------------------------

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
USUAL_LIMIT, GAIN = 7.0, 1.702  # as constants in transformers 4
CLASS = Class(
    "GptOssConfig",
    {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": YARN,
        "sliding_window": 128,
        "swiglu_limit": USUAL_LIMIT,
        "swiglu_alpha": GAIN,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 131072},
    aliases={"num_local_experts": ("num_experts",)},
    idle={
        "is_decoder": "not read: always causal",
        "experts_per_token": "not read: num_experts_per_tok is",
        "initial_context_length": "not read: that of the scaling is",
        "quantization_config": "says how the experts are stored",
    },
    windows="alternate",
    heads=without(DECODER_HEADS, "ForQuestionAnswering"),
    routing={"output_router_logits": False},
)
SAME = ("num_hidden_layers", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads")
PACKING = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def scaling(known: Known) -> Value:
    """The four values as transformers has them. Where nothing is scaled that is said: without a word its
    class would take the scaling of the published models."""
    factor = known["rope_scaling_factor"]
    if factor <= 1:
        return given({"rope_type": "default"}, "rope_scaling_factor of at most 1 scales nothing")
    made = {
        "factor": float(factor),
        "beta_fast": float(known["rope_ntk_beta"]),
        "beta_slow": float(known["rope_ntk_alpha"]),
        "original_max_position_embeddings": known["initial_context_length"],
    }
    named = "rope_scaling_factor, rope_ntk_beta, rope_ntk_alpha, initial_context_length"
    return Value({**YARN, **made}, f"config.json: {named}")


def stretched(name: str, key: str, unscaled: float) -> Field:
    """A value that an original has by itself and transformers in its object of the scaling."""

    def back(known: Known) -> Value:
        found = known["rope_scaling"] or {}
        if found.get("rope_type", found.get("type", "default")) == "default":
            return given(unscaled, "nothing is scaled")
        return Value(found.get(key, YARN[key]), f"{known.value('rope_scaling').source}: {key}")

    field = count if isinstance(unscaled, int) else number
    return field(name, name, silent=back, told=False, hidden=name != "initial_context_length")


def longest(known: Known) -> Value:
    """transformers 4 up to 4.56 works the factor out of this and the first length."""
    factor = max(1.0, float(known["rope_scaling_factor"]))
    return given(
        round(known["initial_context_length"] * factor), "initial_context_length x rope_scaling_factor"
    )


def not_more_than_there_are(known: Known, chosen: Value) -> Value:
    if chosen.value > known["num_local_experts"]:
        message = f"expected at most {known['num_local_experts']} experts per token, found {chosen.value}"
        known.refuse("config-mismatch", message, "experts_per_token")
    return chosen


def again(name: str, of: str) -> Field:
    """A key that published config.json files have besides, for programs that read the original's name."""
    return written(name, lambda known: known.value(of))


FIELDS = (
    [count(name, name, silent=DEFAULT) for name in SAME],
    count("num_key_value_heads", "num_key_value_heads", silent=DEFAULT),
    count("vocab_size", "vocab_size", silent=DEFAULT),
    count("num_local_experts", "num_experts", silent=DEFAULT, ask="the number of experts"),
    count(
        "num_experts_per_tok",
        "experts_per_token",
        silent=DEFAULT,
        check=not_more_than_there_are,
        ask="the number of experts per token",
    ),
    again("experts_per_token", "num_experts_per_tok"),
    count("sliding_window", "sliding_window", silent=DEFAULT, ask="the window of every other layer"),
    number("swiglu_limit", "swiglu_limit", silent=DEFAULT, ask="the bound of the gated units"),
    number("rope_theta", "rope_theta", silent=DEFAULT),
    stretched("rope_scaling_factor", "factor", 1.0),
    stretched("rope_ntk_beta", "beta_fast", 32.0),
    stretched("rope_ntk_alpha", "beta_slow", 1.0),
    stretched("initial_context_length", "original_max_position_embeddings", 4096),
    anything("rope_scaling", rule=scaling, silent=DEFAULT, check=object_or_null),
    count("max_position_embeddings", rule=longest, silent=DEFAULT),
    only("rms_norm_eps", 1e-5, "the epsilon in the original's code"),
    only("attention_bias", True, "projections have biases"),
    only("tie_word_embeddings", False, "unembedding.weight is a tensor of its own"),
    written("quantization_config", lambda _: Value(PACKING, "the experts are packed in MXFP4")),
)
# Of these nothing is written: the class has them as they are in the original's code.
UNWRITTEN = {"hidden_act": "silu", "swiglu_alpha": GAIN}
DOCUMENT = (
    "num_hidden_layers",
    "num_experts",
    "experts_per_token",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "swiglu_limit",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
    "initial_context_length",
    "rope_theta",
    "rope_scaling_factor",
    "rope_ntk_alpha",
    "rope_ntk_beta",
)


def checks(known: Known) -> None:
    """What the original's code asserts or takes for granted."""
    heads, groups = known["num_attention_heads"], known["num_key_value_heads"]
    if heads % groups:
        message = f"expected {heads} query heads to divide by {groups} key/value heads, found a rest"
        known.refuse("config-mismatch", message, "num_key_value_heads")
    if known["head_dim"] % 2:
        message = f"expected an even number of channels to turn, found {known['head_dim']}"
        known.refuse("config-mismatch", message, "head_dim")
    if known.back:
        said_otherwise(known)
    if known["rope_scaling_factor"] > 1:
        ends_of_the_blend(known)


def ends_of_the_blend(known: Known) -> None:
    pairs, theta, context = known["head_dim"] / 2, known["rope_theta"], known["initial_context_length"]
    if theta <= 1:
        message = f"expected a base above 1 to blend frequencies of, found {theta:g}"
        known.refuse("unsupported", message, "rope_theta")
        return
    low, high = (
        pairs * math.log(context / (known[name] * 2 * math.pi)) / math.log(theta)
        for name in ("rope_ntk_beta", "rope_ntk_alpha")
    )
    if not 0 < low < high < pairs - 1:
        message = (
            f"expected 0 < low < high < {pairs - 1:g} of the blend of frequencies, as the publisher's code "
            f"asserts, found {low:.3f} and {high:.3f}"
        )
        known.refuse("unsupported", message, "rope_ntk_beta")


def said_otherwise(known: Known) -> None:
    """What a config.json of transformers may say and no original can."""
    document: Mapping[str, Any] = {**(known.facts.document or {}), **known.facts.settings}
    for name, value in UNWRITTEN.items():
        known.facts.fixed(name, value, "as in the original's code", name)
    layers, kinds = known["num_hidden_layers"], document.get("layer_types")
    usual = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    if kinds is not None and kinds != usual:
        message = "expected windows in layers 0, 2, 4, ..., as the original's code has them, found others"
        known.refuse("unsupported", message, "layer_types")
    found = known["rope_scaling"] or {}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "yarn"):
        known.refuse(
            "unsupported", f"expected rope_type yarn or default, found {shown(kind)}", "rope_scaling"
        )
    if kind != "yarn":
        return
    if found.get("truncate", True) is not False:
        message = "expected truncate false, as the original blends between whole channels, found true"
        known.refuse("unsupported", message, "rope_scaling")
    factor, own = float(found["factor"]), found.get("attention_factor")
    told = {k: found[k] for k in ("mscale", "mscale_all_dim") if found.get(k)}
    if own is not None and not math.isclose(own, 0.1 * math.log(max(factor, 1.0)) + 1, rel_tol=1e-12):
        told["attention_factor"] = own
    for key, value in told.items():
        message = f"expected cosines and sines times 0.1 ln(factor) + 1, found {key} {shown(value)}"
        known.refuse("unsupported", message, "rope_scaling")


def notes(known: Known) -> list[str]:
    if known["swiglu_limit"] == USUAL_LIMIT:
        return []
    found = f"swiglu_limit {known['swiglu_limit']:g}"
    return [f"{found}: transformers before 5 computes {USUAL_LIMIT:g} whatever config.json says"]


FAMILY = openai.family(
    name="gpt-oss",
    model_type="gpt_oss",
    title="gpt-oss",
    summary="gpt-oss 20B, 120B: the folder `original`, experts in MXFP4",
    config=CLASS,
    fields=FIELDS,
    document=DOCUMENT,
    rows=ROWS,
    packed_rows=MXFP4_ROWS,
    numbers_rows=NUMBER_ROWS,
    told_by=("block.0.attn.sinks", "model.layers.0.self_attn.sinks"),
    layer=r"(?:block|model\.layers)\.(\d+)\.",
    axes=AXES,
    checks=checks,
    twice={
        "experts_per_token": lambda known: known.value("num_experts_per_tok"),
        "initial_context_length": lambda known: known.value("initial_context_length"),
    },
    notes=notes,
    vocabulary=Vocabulary(classes=("PreTrainedTokenizerFast", "TokenizersBackend")),
)
