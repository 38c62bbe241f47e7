"""The numbers a reading takes from params.json, shapes, config.json and the user, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ckpt_tool.reference import converted, hf_rope, original

# params.json of the public models. What they leave out, the code of their day filled in.

L2 = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
L3 = L2 | {"n_kv_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "use_scaled_rope": True}
M1 = {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8} | {
    "norm_eps": 1e-5,
    "vocab_size": 32000,
    "sliding_window": 4096,
}
X1 = {k: v for k, v in M1.items() if k != "sliding_window"} | {
    "moe": {"num_experts_per_tok": 2, "num_experts": 8}
}
X_HF = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
}


def without(facts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in facts.items() if k not in names}


def header(wq: int, wk: int, D: int, V: int = 32000) -> dict[str, tuple[int, ...]]:
    """Shapes on one rank, given rows of wq and wk."""
    return {
        "layers.0.attention.wq.weight": (wq, D),
        "layers.0.attention.wk.weight": (wk, D),
        "layers.0.feed_forward.gate.weight": (8, D),
        "output.weight": (V, D),
    }


SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MHA, GQA = header(4096, 4096, 4096), header(4096, 1024, 4096)
FACTS: dict[
    str, tuple[str, Mapping[str, Any], dict[str, tuple[int, ...]], int, Mapping[str, Any], dict[str, Any]]
] = {
    "llama-2-7b": ("llama", L2, MHA, 1, {}, {"rope_theta": 1e4, "n_kv_heads": 32, "rope_scaling": None}),
    "llama-2-7b-nested": ("llama", {"model": L2}, MHA, 1, {}, {"n_layers": 32, "head_dim": 128}),
    "llama-2-70b": (
        "llama",
        L2 | {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8},
        header(1024, 128, 8192, 4000),
        8,
        {},
        {"n_kv_heads": 8, "head_dim": 128, "rope_theta": 1e4},
    ),
    "code-llama-7b": ("llama", L2 | {"rope_theta": 1000000}, MHA, 1, {}, {"rope_theta": 1e6}),
    "llama-3-8b-without-theta": (
        "llama",
        without(L3, "rope_theta", "use_scaled_rope"),
        header(4096, 1024, 4096, 128256),
        1,
        {},
        {"rope_theta": 5e5, "rope_scaling": None},
    ),
    "llama-3-70b-without-theta-in-eight": (
        "llama",
        without(L3, "rope_theta", "use_scaled_rope") | {"dim": 8192, "n_layers": 80, "n_heads": 64},
        header(1024, 128, 8192, 16032),
        8,
        {},
        {"rope_theta": 5e5},
    ),
    "llama-3.1-405b-mp16": (
        "llama",
        L3 | {"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 16},
        header(1024, 128, 16384, 8016),
        16,
        {},
        {"n_kv_heads": 16},
    ),
    "llama-3.1-405b-mp16-merged-heads": (
        "llama",
        L3 | {"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 16},
        header(1024, 128, 16384, 8016),
        16,
        {"num_key_value_heads": 8},
        {"n_kv_heads": 8},
    ),
    "override": (
        "llama",
        without(L2, "norm_eps"),
        GQA,
        1,
        {"rms_norm_eps": 1e-6, "rope_theta": 5e3, "num_key_value_heads": 8},
        {"norm_eps": 1e-6, "rope_theta": 5e3, "n_kv_heads": 8},
    ),
    "override-transformers-5": (
        "llama",
        L3,
        GQA,
        1,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}},
        {"rope_scaling": None, "rope_theta": 7e3},
    ),
    "mistral-transformers-5": (
        "mistral",
        M1,
        GQA,
        1,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}},
        {"rope_theta": 7e3},
    ),
    "override-no-scaling": ("llama", L3, GQA, 1, {"rope_scaling": None}, {"rope_scaling": None}),
    "mistral-7b-v0.1": ("mistral", M1, GQA, 1, {}, {"rope_theta": 1e4, "windows": (4096,) * 32}),
    "mistral-7b-v0.1-window-off": (
        "mistral",
        M1,
        GQA,
        1,
        {"sliding_window": None},
        {"rope_theta": 1e4, "windows": (None,) * 32},
    ),
    "mistral-window-given": (
        "mistral",
        without(M1, "sliding_window"),
        GQA,
        1,
        {"sliding_window": 4096},
        {"rope_theta": 1e4, "windows": (4096,) * 32},
    ),
    "mistral-7b-v0.2": (
        "mistral",
        without(M1, "sliding_window") | {"rope_theta": 1000000.0},
        GQA,
        1,
        {},
        {"rope_theta": 1e6, "windows": (None,) * 32},
    ),
    "mistral-window-as-text": (
        "mistral",
        M1 | {"sliding_window": "4096"},
        GQA,
        1,
        {},
        {"windows": (4096,) * 32},
    ),
    "mistral-window-new-name": (
        "mistral",
        without(M1, "sliding_window") | {"_sliding_window": 512},
        GQA,
        1,
        {},
        {"windows": (512,) * 32},
    ),
    "mistral-nemo": (
        "mistral",
        without(M1, "sliding_window") | {"dim": 5120, "n_layers": 40, "rope_theta": 1e6},
        header(4096, 1024, 5120),
        1,
        {},
        {"head_dim": 128},
    ),
    "mixtral-8x7b": (
        "mixtral",
        X1,
        GQA,
        1,
        {},
        {"rope_theta": 1e6, "n_experts": 8, "n_experts_per_token": 2, "stacked": False},
    ),
    "mixtral-8x7b-hugging-face-keys": (
        "mixtral",
        X_HF,
        without(GQA, "layers.0.feed_forward.gate.weight")
        | {
            "layers.0.block_sparse_moe.gate.weight": (8, 4096),
            "layers.0.block_sparse_moe.w1": (8 * 14336, 4096),
        },
        1,
        {},
        {"rope_theta": 1e6, "n_experts": 8, "n_experts_per_token": 2, "stacked": True, "head_dim": 128},
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_config_from_original_files(name: str) -> None:
    family, params, shapes, ranks, overrides, expected = FACTS[name]
    c = original(family).Config.from_original(params, shapes, ranks, overrides)
    assert {k: getattr(c, k) for k in expected} == expected


@pytest.mark.parametrize(
    ("dim", "layers", "heads", "overrides", "factor"),
    [
        (4096, 32, 32, {}, 8.0),
        (2048, 16, 32, {}, 32.0),
        (3072, 28, 24, {}, 32.0),
        (2048, 16, 32, {"rope_scaling": SCALING}, 8.0),
    ],
)
def test_scaling_factor_of_llama_3(
    dim: int, layers: int, heads: int, overrides: Mapping[str, Any], factor: float
) -> None:
    params = L3 | {"dim": dim, "n_layers": layers, "n_heads": heads}
    shapes = header(dim, 8 * dim // heads, dim, 128256)
    c = original("llama").Config.from_original(params, shapes, 1, overrides)
    assert c.rope_scaling == original("llama").RopeScaling(factor, 1.0, 4.0, 8192.0)


@pytest.mark.parametrize(
    ("family", "params", "shapes", "ranks", "overrides", "said"),
    [
        ("llama", without(L2, "norm_eps"), MHA, 1, {}, "`norm_eps` in params.json or `rms_norm_eps`"),
        ("llama", without(L2, "n_heads"), MHA, 1, {}, "`n_heads` in params.json or `num_attention_heads`"),
        ("llama", L2, GQA, 1, {}, r"wk.weight` of shape \(4096, 4096\) on each rank, found \(1024, 4096\)"),
        (
            "llama",
            L2 | {"n_kv_heads": 3},
            MHA,
            1,
            {},
            "expected head counts that 1 ranks can share, found 32 and 3",
        ),
        ("llama", L2, MHA, 3, {}, "expected head counts that 3 ranks can share"),
        ("llama", L2, MHA, 1, {"rope_scaling": {"rope_type": "su"}}, "yarn, llama3, found `su`"),
        ("mistral", M1 | {"head_dim": 64}, GQA, 1, {}, r"wq.weight` of shape \(2048, 4096\), found \(4096"),
        ("mistral", M1 | {"_sliding_window": 9}, GQA, 1, {}, "expected one of `sliding_window`"),
        ("mistral", M1 | {"sliding_window": [1, 2, 3]}, GQA, 1, {}, "fills 32 layers, found 3 entries"),
        ("mistral", M1, GQA, 2, {}, "expected one rank"),
        ("mixtral", X1, GQA, 1, {"rope_scaling": SCALING}, "rope_type `default`, found `llama3`"),
        ("mixtral", without(X1, "moe"), GQA, 1, {}, "`num_experts` in params.json or `num_local_experts`"),
        (
            "mixtral",
            X1,
            GQA,
            1,
            {"num_local_experts": 7},
            r"gate.weight` of shape \(7, 4096\), found \(8, 4096\)",
        ),
    ],
)
def test_config_from_original_says_what_it_cannot_know(
    family: str,
    params: Mapping[str, Any],
    shapes: dict[str, tuple[int, ...]],
    ranks: int,
    overrides: Mapping[str, Any],
    said: str,
) -> None:
    with pytest.raises(ValueError, match=said):
        original(family).Config.from_original(params, shapes, ranks, overrides)


HF = X_HF | {"hidden_act": "silu", "rope_theta": 3e4, "num_experts_per_tok": 2, "sliding_window": None}


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        ("Llama", {"rope_scaling": SCALING, "tie_word_embeddings": True, "max_position_embeddings": 131072}),
        ("Llama", {"num_key_value_heads": 32, "rope_scaling": None}),
        ("Mistral", {"sliding_window": 512, "head_dim": 64}),
        ("Mistral", {}),
        ("Mixtral", {"num_experts_per_tok": 3}),
    ],
)
def test_config_from_transformers_4_and_5_is_the_same(model: str, facts: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    newer = transformers.AutoConfig.for_model(model.lower(), **HF | facts).to_dict()
    assert "rope_parameters" in newer and "rope_theta" not in newer
    reading = converted(model + "ForCausalLM")
    assert reading.Config.from_hf(newer) == reading.Config.from_hf(HF | facts)


def test_config_from_hf_takes_every_number() -> None:
    c = converted("MixtralForCausalLM").Config.from_hf(HF | {"sliding_window": 9, "head_dim": 64})
    assert (c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim) == (32, 32, 8, 64)
    assert (c.norm_eps, c.rope_theta, c.windows) == (1e-5, 3e4, (9,) * 32)
    assert (c.n_experts, c.n_experts_per_token, c.tied) == (8, 2, False)
    c = converted("LlamaForCausalLM").Config.from_hf(
        without(HF, "num_key_value_heads") | {"rope_scaling": SCALING}
    )
    assert (c.n_kv_heads, c.head_dim) == (32, 128)
    assert c.rope_scaling == hf_rope.RopeScaling(8.0, 1.0, 4.0, 8192.0)


@pytest.mark.parametrize(
    ("model", "change", "said"),
    [
        (
            "Llama",
            {"rms_norm_eps": None, "hidden_size": None},
            "expected hidden_size, rms_norm_eps in config",
        ),
        ("Llama", {"hidden_act": "gelu"}, "`hidden_act` silu in config.json, found gelu"),
        ("Llama", {"attention_bias": True}, "`attention_bias` False in config.json, found True"),
        (
            "Llama",
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "one of default, linear, dynamic, yarn, llama3, found `longrope`",
        ),
        (
            "Llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "expected low_freq_factor, high_freq",
        ),
        (
            "Llama",
            {"rope_parameters": {"rope_theta": 1.0}},
            "expected one rope_theta .* found 1.0, 30000.0",
        ),
        ("Mistral", {"rope_scaling": {"rope_type": "yarn"}}, "expected factor, .*beside rope_type `yarn`"),
        (
            "Llama",
            {"rope_scaling": None, "rope_parameters": SCALING},
            "expected one rotary scaling in config.json",
        ),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("Mixtral", {"num_local_experts": None}, "expected num_local_experts in config.json"),
    ],
)
def test_config_from_hf_says_what_it_cannot_compute(model: str, change: dict[str, Any], said: str) -> None:
    config = {k: v for k, v in (HF | change).items() if v is not ...}
    with pytest.raises(ValueError, match=said):
        converted(model + "ForCausalLM").Config.from_hf(config)


@pytest.mark.parametrize(("model", "theta"), [("Llama", 1e4), ("Mistral", 1e4), ("Mixtral", 1e6)])
def test_theta_that_config_json_leaves_out(model: str, theta: float) -> None:
    assert converted(model + "ForCausalLM").Config.from_hf(without(HF, "rope_theta")).rope_theta == theta
