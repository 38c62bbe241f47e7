"""The numbers that the readings of Megatron's BERT and GPT-2 take from args, version, shapes, config.json and
user, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ckpt_tool.reference import converted, original
from ckpt_tool.reference.blocks import VERSION_0
from tests.megatron_models import (
    EPS,
    FAMILIES,
    L,
    N,
    args,
    hf_config,
    megatron_files,
    ours,
    shapes_of,
    tensors,
)

# What the file tells -> the two gelus of BERT, and that of GPT-2. None: it has no args.
GELU: dict[str, tuple[dict[str, Any] | None, float | None, str, tuple[str, str, str]]] = {
    "no-args-0": (None, None, "transformer", ("erf", "erf", "tanh")),
    "no-args-1": (None, 1.0, "transformer", ("erf", "erf", "erf")),
    "no-args-2": (None, 2.0, "transformer", ("erf", "erf", "erf")),
    "no-args-3": (None, 3.0, "encoder", ("tanh", "erf", "tanh")),
    "no-args-core": (None, 3.0, "core", ("tanh", "erf", "tanh")),
    "2020-03": ({}, None, "transformer", ("tanh", "tanh", "tanh")),
    "v1.0": ({"openai_gelu": False}, None, "transformer", ("erf", "erf", "erf")),
    "v1.0-openai": ({"openai_gelu": True}, None, "transformer", ("tanh", "tanh", "tanh")),
    "v2.0": ({"openai_gelu": False, "bias_gelu_fusion": True}, 3.0, "transformer", ("tanh", "erf", "tanh")),
    "v2.0-unfused": ({"openai_gelu": False, "bias_gelu_fusion": False}, 3.0, "encoder", ("erf",) * 3),
    "v2.5-onnx": ({"bias_gelu_fusion": True, "onnx_safe": True}, 3.0, "encoder", ("tanh", "erf", "tanh")),
    "23.06-onnx": (
        {"bias_gelu_fusion": True, "onnx_safe": True, "swiglu": False},
        3.0,
        "encoder",
        ("erf", "erf", "erf"),
    ),
    "openai": ({"openai_gelu": True, "bias_gelu_fusion": False}, 3.0, "encoder", ("tanh", "tanh", "tanh")),
    "written-by-transformers": ({"bias_gelu_fusion": False}, 3.0, "encoder", ("erf", "erf", "erf")),
    "core-openai": ({"openai_gelu": True, "bias_gelu_fusion": False}, 3.0, "core", ("erf", "erf", "erf")),
    "core-fused": ({"bias_gelu_fusion": True}, 3.0, "core-fused", ("tanh", "erf", "tanh")),
}


@pytest.mark.parametrize("name", GELU)
def test_the_gelu_is_that_of_the_code_of_its_day(name: str) -> None:
    flags, version, age, expected = GELU[name]
    bare = {n: v for n, v in args().items() if n not in ("openai_gelu", "bias_gelu_fusion")}
    params = {} if flags is None else bare | flags
    told: dict[str, Any] = {"num_attention_heads": N}
    bert, gpt2 = (ours(f, version, age, params=params, overrides=told).c for f in FAMILIES)
    assert (bert.activation, bert.head_gelu, gpt2.activation) == expected
    for activation, variant in (("gelu", "erf"), ("gelu_new", "tanh")):
        told |= {"hidden_act": activation}
        c = ours("megatron-bert", version, age, params=params, overrides=told).c
        assert (c.activation, c.head_gelu) == (variant, variant)


@pytest.mark.parametrize("family", FAMILIES)
def test_epsilon_is_what_args_or_the_user_say(family: str) -> None:
    bare = {n: v for n, v in args().items() if n != "layernorm_epsilon"}
    assert ours(family, params=bare).c.norm_eps == 1e-5
    assert ours(family, params=bare | {"norm_epsilon": 1e-6}).c.norm_eps == 1e-6
    assert ours(family).c.norm_eps == EPS
    assert ours(family, overrides={"layer_norm_eps": 1e-12}).c.norm_eps == 1e-12
    assert ours(family, overrides={"layer_norm_epsilon": 1e-7}).c.norm_eps == 1e-7
    both = args() | {"norm_epsilon": 1e-6}
    with pytest.raises(ValueError, match="expected one value, found norm_epsilon"):
        ours(family, params=both)
    assert ours(family, params=both, overrides={"layer_norm_eps": 1e-7}).c.norm_eps == 1e-7


def header(layers: int, D: int, F: int, P: int, V: int, ranks: int = 1) -> dict[str, tuple[int, ...]]:
    root = "model.language_model."
    shapes: dict[str, tuple[int, ...]] = {root + "embedding.word_embeddings.weight": (V // ranks, D)}
    shapes[root + "embedding.position_embeddings.weight"] = (P, D)
    for i in range(layers):
        for name, shape in (
            ("input_layernorm", (D,)),
            ("attention.query_key_value", (3 * D // ranks, D)),
            ("attention.dense", (D, D // ranks)),
            ("post_attention_layernorm", (D,)),
            ("mlp.dense_h_to_4h", (F // ranks, D)),
            ("mlp.dense_4h_to_h", (D, F // ranks)),
        ):
            p = f"{root}transformer.layers.{i}.{name}."
            shapes |= {p + "weight": shape, p + "bias": shape[:1]}
    return shapes | {f"{root}transformer.final_layernorm.{kind}": (D,) for kind in ("weight", "bias")}


def test_the_published_sizes_have_16_heads_and_others_must_be_told() -> None:
    gpt2, bert = original("megatron-gpt2"), original("megatron-bert")
    c = gpt2.Config.from_original({}, header(24, 1024, 4096, 1024, 50304), 1, {})
    assert (c.n_heads, c.order, c.norm_eps, c.activation) == (16, VERSION_0, 1e-5, "tanh")
    for words in (29056, 30592):
        assert bert.Config.from_original({}, header(24, 1024, 4096, 512, words), 1, {}).n_heads == 16
    other = header(23, 1024, 4096, 1024, 50304)
    with pytest.raises(ValueError, match="expected `num_attention_heads` in args or given by name"):
        gpt2.Config.from_original({}, other, 1, {})
    assert gpt2.Config.from_original({}, other, 1, {"n_head": 8}).n_heads == 8
    halves = header(24, 1024, 4096, 1024, 50432, 2)
    params = {"num_attention_heads": 32, "kv_channels": 32}
    assert gpt2.Config.from_original(params, halves, 2, {}).n_heads == 32


REFUSED: dict[str, tuple[dict[str, Any], Mapping[str, Any], dict[str, tuple[int, ...] | None], str]] = {
    "layers": ({"num_layers": 5}, {}, {}, "expected layers 5, as told, found 4 in the tensors"),
    "more-words": ({}, {"vocab_size": 45}, {}, "expected at least 45 words, as told, found 44"),
    "groups": (
        {"group_query_attention": True, "num_query_groups": 3},
        {},
        {},
        "expected head counts that 1 ranks can share, found 4 in 3 groups",
    ),
    "version": (
        {"checkpoint_version": 4.0},
        {},
        {},
        "expected checkpoint_version 0, 1.0, 2.0 or 3.0, found 4.0",
    ),
    "half-a-version": ({"checkpoint_version": 0.5}, {}, {}, "expected checkpoint_version .* found 0.5"),
    "grouped-version": (
        {"checkpoint_version": 1.0, "group_query_attention": True, "num_query_groups": 2},
        {},
        {},
        "expected a checkpoint_version that can group queries, found 1.0",
    ),
    "swiglu": ({"swiglu": True}, {}, {}, "expected no `swiglu`, found True"),
    "activation": ({}, {"hidden_act": "relu"}, {}, "expected activation to be one of gelu, .* found `relu`"),
    "gap": (
        {},
        {},
        {"model.language_model.encoder.layers.7.x": (1,)},
        "expected one block of layers 0, 1, 2, ",
    ),
    "two-tables": (
        {},
        {},
        {"model.word_embeddings.weight": (44, 24)},
        "expected one of word_embeddings.weight, ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    params, overrides, changes, message = REFUSED[name]
    (((state,),)) = megatron_files(tensors(), "megatron-gpt2", 3.0, "encoder")
    shapes: dict[str, Any] = shapes_of(state) | changes
    shapes = {n: s for n, s in shapes.items() if s is not None}
    with pytest.raises(ValueError, match=message):
        original("megatron-gpt2").Config.from_original(
            args(checkpoint_version=3.0) | params, shapes, 1, overrides
        )


def test_all_problems_of_the_numbers_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="layers.*; .*swiglu.*; .*head counts.*; .*words"):
        ours(
            "megatron-gpt2",
            params=args(num_layers=9, swiglu=True, num_query_groups=3, group_query_attention=True),
            overrides={"vocab_size": 45},
        )


def test_extra_state_and_the_optimizer_are_not_of_the_model() -> None:
    (((state,),)) = megatron_files(tensors(), "megatron-gpt2", 3.0, "core-fused")
    shapes = shapes_of(state) | {"model.decoder.layers.0.mlp.linear_fc1._extra_state": (0,)}
    shapes |= {f"optimizer.state.{n}": s for n, s in shapes_of(state).items()}
    c = original("megatron-gpt2").Config.from_original(args(checkpoint_version=3.0), shapes, 1, {})
    assert c.names["word"] == "model.embedding.word_embeddings." and c.n_layers == L


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("megatron-bert", {"hidden_act": "relu"}, "expected `hidden_act` to be one of gelu, .* found relu"),
        ("megatron-bert", {"layer_norm_eps": None}, "expected layer_norm_eps in config.json, found none"),
        ("megatron-bert", {"add_cross_attention": True}, "expected `add_cross_attention` False"),
        (
            "megatron-bert",
            {"position_embedding_type": "relative_key"},
            "expected `position_embedding_type` abs",
        ),
        ("megatron-gpt2", {"activation_function": "silu"}, "expected `activation_function` to be one of"),
        ("megatron-gpt2", {"n_head": None}, "expected n_head in config.json, found none"),
        ("megatron-gpt2", {"scale_attn_weights": False}, "expected `scale_attn_weights` True"),
    ],
)
def test_a_config_that_is_not_computed_is_refused(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        converted(FAMILIES[family]).Config.from_hf(hf_config(family, **change))
