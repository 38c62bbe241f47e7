"""config.json is read by meaning: spellings that say the same read the same, and nothing else does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool.convert.facts import class_of, classes, differences, ranges, read, same, shown
from ckpt_tool.convert.facts_classes import IDENTITY
from ckpt_tool.convert.families import FAMILIES, family
from ckpt_tool.verify import meanings
from tests import loaded

ROOT = Path(__file__).parents[1]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 4096,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def changed(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in {**base, **change}.items() if v is not ...}


def told_apart(model_type: str, a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    """The names of the values that two configs of one class differ in."""
    return {n for n, *_ in differences(read({**SIZES, **a}, model_type), read({**SIZES, **b}, model_type))}


# What is newer than a release, or was dropped before it.
NEW = ("ministral3", "mistral3")
LACKING = {"tf5": ("mega",), "tf4.57": NEW[:1], "tf4.37": ("qwen3", "gemma2", "gpt_oss", *NEW)}


@pytest.mark.parametrize("release", LACKING)
def test_the_table_of_defaults_is_that_of_the_release(release: str) -> None:
    names = [c.name for c in classes().values()]
    script = str(ROOT / "tests" / "config_defaults_script.py")
    command = [loaded.python(release), "-W", "ignore", script, *names]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    defaults = json.loads(run.stdout.splitlines()[-1])
    for model_type, own in classes().items():
        if defaults[own.name] is None:
            assert model_type in LACKING[release], own.name
            continue
        empty, full = read({}, model_type), read(defaults[own.name], model_type)
        found = {
            n: (a, b) for n, a, b in differences(empty, full) if n not in ("model_type", "architectures")
        }
        assert found == {}, (own.name, found)
        assert full.unknown == {} and full.contradictions == () and full.refused == {}, own.name


def test_every_architecture_that_a_family_writes_has_a_class() -> None:
    for name in FAMILIES:
        for architecture in family(name).architectures:
            assert class_of({"architectures": [architecture]}) in classes()


SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("llama", {"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
    "theta-whole": ("llama", {"rope_theta": 500000.0}, {"rope_theta": 500000}),
    "theta-twice": (
        "llama",
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}},
    ),
    "theta-of-the-class": ("mixtral", {}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "scaling": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    ),
    "scaling-by-layer": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
                "sliding_attention": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
            }
        },
    ),
    "names-of-its-own": (
        "gpt_neox",
        {"rotary_emb_base": 5e4, "rotary_pct": 0.5},
        {"rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.5, "rope_type": "default"}},
    ),
    "names-not-its-own": ("gpt_neox", {"rotary_emb_base": 5e4}, {"rotary_emb_base": 5e4, "rope_theta": 3.0}),
    "every-second-window": (
        "gemma2",
        {"num_hidden_layers": 3},
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "scaling-null": ("llama", {}, {"rope_scaling": None}),
    "scaling-by-one": ("llama", {}, {"rope_scaling": {"type": "linear", "factor": 1.0}}),
    "yarn": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 4096,
                "attention_factor": 1.1386294361119891,
                "truncate": True,
            }
        },
    ),
    "yarn-equal-scales": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
    ),
    "dtype": ("llama", {"torch_dtype": "bfloat16"}, {"dtype": "torch.bfloat16"}),
    "dtype-twice": ("llama", {"torch_dtype": "float16"}, {"dtype": "float16", "torch_dtype": "float16"}),
    "head-dim": ("llama", {}, {"head_dim": 8}),
    "head-dim-null": ("mistral", {"head_dim": None}, {"head_dim": 8}),
    "heads-null": ("mistral", {"num_key_value_heads": None}, {"num_key_value_heads": 6}),
    "heads-absent-in-llama": ("llama", {"num_key_value_heads": 6}, {"num_key_value_heads": None}),
    "window-off": ("qwen2", {"sliding_window": 32768}, {"sliding_window": None, "use_sliding_window": False}),
    "window-layers": (
        "qwen2",
        {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2},
        {
            "sliding_window": 32,
            "use_sliding_window": True,
            "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 3,
        },
    ),
    "window-in-no-layer": ("qwen2", {}, {"sliding_window": 32, "use_sliding_window": True}),
    "window-in-all": (
        "mistral",
        {"sliding_window": 32},
        {"sliding_window": 32, "layer_types": ["sliding_attention"] * 5},
    ),
    "no-window": (
        "mistral",
        {"sliding_window": None},
        {"sliding_window": None, "layer_types": ["full_attention"] * 5},
    ),
    "silu": ("llama", {"hidden_act": "silu"}, {"hidden_act": "swish"}),
    "gelu": ("gpt2", {"activation_function": "gelu_new"}, {"activation_function": "gelu_pytorch_tanh"}),
    "generic-names": ("gpt2", {"hidden_size": 48}, {"hidden_size": ..., "n_embd": 48}),
    "inner": ("gptj", {"n_inner": None}, {"n_inner": 192}),
    "bottleneck": (
        "mobilebert",
        {"intra_bottleneck_size": 24},
        {"intra_bottleneck_size": 24, "true_hidden_size": 24},
    ),
    "no-bottleneck": (
        "mobilebert",
        {"use_bottleneck": False},
        {"use_bottleneck": False, "true_hidden_size": 48},
    ),
    "words": ("opt", {"word_embed_proj_dim": 48}, {}),
    "experts": ("mixtral", {"num_local_experts": 4}, {"num_experts": 4}),
    "one-id": ("llama", {"eos_token_id": 2}, {"eos_token_id": [2]}),
    "ids-of-the-class": ("llama", {}, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}),
    "labels": ("megatron-bert", {"num_labels": 3}, {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}}),
}


@pytest.mark.parametrize("name", SAME)
def test_two_spellings_of_one_value_mean_the_same(name: str) -> None:
    model_type, a, b = SAME[name]
    first, second = (read(changed(SIZES, config), model_type) for config in (a, b))
    assert [n for n, *_ in differences(first, second)] == []
    for reading in (first, second):
        assert reading.contradictions == () and set(reading.unknown) <= set(SIZES) and reading.refused == {}


OTHER: dict[str, tuple[str, dict[str, Any], dict[str, Any], set[str]]] = {
    "theta": ("llama", {"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 1e4}}, {"rope_theta"}),
    "theta-absent": ("llama", {"rope_theta": 5e5}, {}, {"rope_theta"}),
    "theta-text": ("llama", {"rope_theta": 5e5}, {"rope_theta": "5e5"}, {"rope_theta"}),
    "scaling-kind": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"type": "dynamic", "factor": 2}},
        {"rope_scaling"},
    ),
    "scaling-factor": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 1e4}},
        {"rope_scaling"},
    ),
    "yarn-context": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 2048}},
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        {"rope_scaling"},
    ),
    "yarn-truncate": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        {"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}},
        {"rope_scaling"},
    ),
    "heads-of-mistral": ("mistral", {}, {"num_key_value_heads": None}, {"num_key_value_heads"}),
    "window-of-mistral": ("mistral", {"sliding_window": None}, {}, {"sliding_window"}),
    "window-width": ("mistral", {"sliding_window": 32}, {"sliding_window": 31}, {"sliding_window"}),
    "window-layers": (
        "qwen2",
        {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3},
        {"layers with a window"},
    ),
    "window-on": (
        "qwen2",
        {"sliding_window": 32, "max_window_layers": 0},
        {"sliding_window": 32, "max_window_layers": 0, "use_sliding_window": True},
        {"sliding_window", "layers with a window"},
    ),
    "bottleneck": (
        "mobilebert",
        {"intra_bottleneck_size": 24},
        {"intra_bottleneck_size": 24, "true_hidden_size": 48},
        {"true_hidden_size"},
    ),
    "tied": ("opt", {}, {"tie_word_embeddings": False}, {"tie_word_embeddings"}),
    "true-is-not-one": ("opt", {}, {"tie_word_embeddings": 1}, {"tie_word_embeddings"}),
    "gelu": ("gpt2", {}, {"activation_function": "gelu"}, {"activation_function"}),
    "several-ids": ("llama", {}, {"eos_token_id": [2, 3]}, {"eos_token_id"}),
    "labels": ("megatron-bert", {}, {"num_labels": 3}, {"num_labels"}),
}


@pytest.mark.parametrize("name", OTHER)
def test_two_values_are_told_apart_by_name(name: str) -> None:
    model_type, a, b, names = OTHER[name]
    assert told_apart(model_type, a, b) == names


TWICE: dict[str, tuple[str, dict[str, Any], str]] = {
    "theta": (
        "llama",
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 25e4, "rope_type": "default"}},
        "rope_parameters.rope_theta 250000 (read by transformers 5) and rope_theta 10000 (read by transf",
    ),
    "theta-in-scaling": (
        "qwen2",
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 1e6}},
        "rope_scaling.rope_theta 1000000 (read by transformers 5) and rope_theta 10000",
    ),
    "scaling": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
        "found rope_scaling type linear, factor 2 (read by transformers 4 and 5) and rope_parameters rope_t",
    ),
    "theta-passed-over": (
        "llama",
        {
            "rope_scaling": {"type": "linear", "factor": 2},
            "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e6},
        },
        "rope_theta (absent) 10000 (read by transformers 5) and rope_parameters.rope_theta 1000000",
    ),
    "theta-beside-both": (
        "llama",
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "factor": 2},
            "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e6},
        },
        "rope_theta 500000 (read by transformers 5) and rope_parameters.rope_theta 1000000 (the",
    ),
    "kind": (
        "llama",
        {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2}},
        "default (read by transformers 5) and rope_scaling.type linear (read by transformers 4, in most",
    ),
    "scaling-null": (
        "llama",
        {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 2}},
        "found rope_scaling null (read by transformers 4) and rope_parameters rope_type linear, factor 2",
    ),
    "dtype": ("llama", {"dtype": "float16", "torch_dtype": "float32"}, "found dtype float16 (read by"),
    "window": (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 5, "use_sliding_window": False, "sliding_window": 9},
        "and use_sliding_window false (no window)",
    ),
    "window-layers": (
        "qwen2",
        {
            "layer_types": ["sliding_attention"] * 5,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 3,
        },
        "and max_window_layers 3 (read by those before)",
    ),
    "window-of-mistral": (
        "mistral",
        {"layer_types": ["full_attention"] * 5, "sliding_window": 9},
        "found sliding_window 9 (read) and layer_types",
    ),
    "layers": ("qwen2", {"layer_types": ["full_attention"]}, "num_hidden_layers 5 (the layers) and layer_ty"),
    "names": ("gpt2", {"n_embd": 48, "hidden_size": 50}, "found n_embd 48 (the key of the class) and hidden"),
    "null": (
        "gpt_oss",
        {"rope_scaling": None},
        "found rope_scaling null (read by transformers 4) and rope_sc",
    ),
    "labels": ("megatron-bert", {"num_labels": 3, "id2label": {"0": "a", "1": "b"}}, "found num_labels 3"),
}


@pytest.mark.parametrize("name", TWICE)
def test_what_a_file_says_twice_differently_is_told_with_both_values(name: str) -> None:
    model_type, config, said = TWICE[name]
    texts = [c.text for c in read({**SIZES, **config}, model_type).contradictions]
    assert len(texts) == 1 and said in texts[0], texts


def test_every_key_is_a_value_without_effect_refused_or_unknown() -> None:
    config = {
        **SIZES,
        "model_type": "llama",
        "use_cache": False,
        "temperature": 0.6,
        "cross_attention_hidden_size": None,
        "tie_encoder_decoder": False,
        "auto_map": {"AutoModel": "x.Y"},
        "quantization_config": None,
        "logit_scale": 0.5,
        "is_encoder_decoder": True,
    }
    reading = read(config, "llama")
    assert set(reading.unknown) == {"logit_scale", "is_encoder_decoder"}
    assert set(reading.refused) == {"auto_map"}
    assert {"use_cache", "temperature", "cross_attention_hidden_size"} <= set(reading.idle)
    assert all(reading.idle.values()) and not set(reading.idle) & set(reading.values)
    assert set(reading.identity) == set(IDENTITY) - {"n_positions"}


@pytest.mark.parametrize(
    "value", [None, True, "x", -1, 1e400, [], {}, [1], {"rope_type": 3}, {"factor": "x"}, "linear"]
)
@pytest.mark.parametrize("model_type", classes())
def test_a_value_of_another_kind_differs_and_breaks_nothing(model_type: str, value: Any) -> None:
    own = classes()[model_type]
    keys = [
        *own.numbers,
        *own.identity,
        "layer_types",
        "rope_parameters",
        "id2label",
        "dtype",
        "architectures",
    ]
    plain = read(SIZES, model_type)
    for key in keys:
        reading = read({**SIZES, key: value}, model_type)
        assert all(m.text for m in reading.values.values())
        assert all(c.text for c in reading.contradictions)
        assert {n for n, *_ in differences(plain, reading)} <= {*reading.values, *plain.values}
    size = "vocab_size" if "vocab_size" in own.numbers else "hidden_size"  # one of characters has no words
    odd = read({**SIZES, size: value}, model_type)
    assert size in {n for n, *_ in differences(plain, odd)}


def test_a_value_is_shown_as_one_looks_for_it() -> None:
    assert [shown(v) for v in (1e6, 1e-5, None, True, "silu")] == ["1000000", "1e-05", "null", "true", "silu"]
    assert shown({"factor": 8.0, "rope_type": "llama3"}) == "factor 8, rope_type llama3"
    assert len(shown(["sliding_attention"] * 100)) == 200
    assert ranges([0, 2, 3, 4, 9]) == "0, 2-4, 9"
    theta = read({}, "llama").numbers["rope_theta"]
    assert theta.text == "the default 10000 (rope_theta absent)"


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (0.1 + 0.2, 0.3, True),
        ([1], [1.0], True),
        ({"a": 1}, {"a": 2}, False),
    ],
)
def test_values_of_json_are_one_by_meaning(a: Any, b: Any, equal: bool) -> None:
    assert same(a, b) is equal and same(b, a) is equal


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"no": 0, "yes": 1}, None),
        ({"LABEL_0": 0, "LABEL_1": 1}, None),  # what the class fills in beside names of one's own
        ({"no": 1, "yes": 0}, "expected no to be 0, as id2label says, found 1"),
    ],
)
def test_classes_have_one_number(numbers: dict[str, int], message: str | None) -> None:
    config = {"id2label": {"0": "no", 1: "yes"}, "label2id": numbers}
    assert [f.message for f in meanings._labels(config)] == ([message] if message else [])


NULL = "found null, with which releases of transformers do not load or run it"
TUPLES = "with which results are tuples, or releases of transformers raise"


@pytest.mark.parametrize(
    ("key", "value", "planned", "message"),
    [
        # seen of 4.37.2, 4.57.6 and 5.23.0 with a Mistral, a GPT-2 and a Megatron BERT
        ("use_cache", None, {"use_cache": True}, f"expected true, {NULL}"),
        ("attention_dropout", None, {"attention_dropout": 0.0}, f"expected 0, {NULL}"),
        ("num_labels", None, {}, f"expected a value or no such key, {NULL}"),
        ("pruned_heads", None, {}, f"expected a value or no such key, {NULL}"),
        ("return_dict", False, {}, f"expected true or no such key, found false, {TUPLES}"),
        ("return_dict", None, {}, f"expected true or no such key, found null, {TUPLES}"),
        ("torchscript", True, {}, f"expected false or no such key, found true, {TUPLES}"),
        ("return_dict", False, {"return_dict": False}, None),  # as the source has it
        ("return_dict", True, {}, None),
        ("torchscript", False, {}, None),
        ("attn_pdrop", None, {}, None),  # of another class
        ("prefix", None, {"prefix": "</s>"}, None),
        ("classifier_dropout", None, {"classifier_dropout": None}, None),
        ("activation_dropout", None, {"activation_dropout": 0.0}, None),  # of OPT: none of the three asks
    ],
)
def test_keys_without_effect_on_numbers_fail_with_values_that_releases_raise_at(
    key: str, value: Any, planned: dict[str, Any], message: str | None
) -> None:
    config = {**SIZES, key: value}
    found = [*meanings._raising(config, read(config, "mistral"), {**SIZES, **planned})]
    assert [(f.where, f.message) for f in found] == ([(f"config.json: {key}", message)] if message else [])


@pytest.mark.parametrize(
    ("model_type", "key", "planned"),
    [
        # loaded and run with a null by 4.37.2, 4.57.6 and 5.23.0, as far as they have the class
        ("opt", "activation_dropout", 0.0),
        ("codegen", "scale_attn_weights", True),
        ("gpt_oss", "experts_per_token", 4),
        ("gpt_oss", "initial_context_length", 4096),
        ("mega", "use_feature_dropout", False),
        ("luke", "use_cache", True),
        ("llama", "attention_dropout", 0.0),
        ("gemma2", "attention_dropout", 0.0),
    ],
)
def test_a_null_that_every_release_takes_is_no_difference(model_type: str, key: str, planned: Any) -> None:
    found = read({key: None}, model_type)
    assert key in found.idle
    assert [*meanings._raising({key: None}, found, {key: planned})] == []
