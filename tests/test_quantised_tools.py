"""Quantised folders by what each tool writes beside the same codes: its documents, its names, the scales that
it keeps besides; and what is not read of them, said in one sentence with a way out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_tool.api import convert, plan, verify
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.quantised import found_in
from ckpt_tool.convert.quantised_methods import scheme_of
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.numbers import to_bits
from ckpt_tool.fixtures.quantised import (
    FORMATS,
    LINEAR,
    Format,
    Tensors,
    in_blocks,
    int8,
    quantise,
    rows,
    write,
)
from ckpt_tool.verify import packed_mistakes as known

Written = Callable[[str], Path]
Change = Callable[[Tensors, dict[str, Any]], object]
MODEL, ATTENTION = "qwen3-float32", "model.layers.0.self_attn."
KEY = "quantization_config"


@pytest.fixture
def made(conversions: Written, tmp_path: Path) -> Callable[[str | Format, Change], Path]:
    """A tiny model in that format, with other tensors and another config.json."""

    def make(name: str | Format, change: Change, model: str = MODEL) -> Path:
        source = quantise(conversions(model), tmp_path / "in", name)
        config = json.loads((source / "config.json").read_text())
        tensors = held(source)
        change(tensors, config)
        write(source / "model.safetensors", tensors)
        (source / "config.json").write_text(json.dumps(config))
        return source

    return make


def held(folder: Path) -> Tensors:
    with open_checkpoint(folder) as checkpoint:
        return {t.name: (t.dtype, checkpoint.read(t)) for t in checkpoint}


def same(a: Path, b: Path) -> bool:
    one, other = ({n: (d, x.shape, x.tobytes()) for n, (d, x) in held(f).items()} for f in (a, b))
    return one == other


def called(tensors: Tensors, old: str, new: str) -> None:
    for name in [n for n in tensors if n.endswith(old)]:
        tensors[name.removesuffix(old) + new] = tensors.pop(name)


def number(value: float) -> tuple[str, np.ndarray]:
    return "F32", np.float32(value).reshape(()).view("<u4")


def said(**more: object) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config[KEY] = more

    return change


def groups(form: str, *weights: dict[str, Any], **more: object) -> dict[str, Any]:
    """As compressed-tensors says it; `format` of a group's weights is that of the group."""
    each = {}
    for k, w in enumerate(weights):
        own = {n: v for n, v in w.items() if n != "format"}
        each[f"group_{k}"] = {"targets": ["Linear"], "weights": own or None, "format": w.get("format")}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": each, **more}


FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FLOATS = {**FLOAT, "format": "float-quantized"}
PACKED = {**INT4, "format": "pack-quantized"}
NV = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
EIGHT = {"dtype": "fp8_e4m3", "is_dynamic": False, "qscheme": "per_tensor"}


# --- what is read ---------------------------------------------------------------------------------------


def autofp8(tensors: Tensors, config: dict[str, Any]) -> None:
    """As vLLM calls them, with the one scale that older releases of it had for keys and values."""
    called(tensors, ".weight_scale_inv", ".weight_scale")
    called(tensors, ".activation_scale", ".input_scale")
    tensors[f"{ATTENTION}kv_scale"] = number(0.5)
    config[KEY] = {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}


def quark(tensors: Tensors, config: dict[str, Any]) -> None:
    called(tensors, ".weight_scale_inv", ".weight_scale")
    called(tensors, ".activation_scale", ".input_scale")
    for name in ("k_proj", "v_proj"):
        tensors[f"{ATTENTION}{name}.output_scale"] = number(0.75)
    whole = {"weight": EIGHT, "input_tensors": EIGHT, "output_tensors": None}
    layers = {"*k_proj": {**whole, "output_tensors": EIGHT}}
    config[KEY] = {"quant_method": "quark", "global_quant_config": whole, "layer_quant_config": layers}
    config[KEY] |= {
        "exclude": ["lm_head"],
        "export": {"weight_format": "real_quantized"},
        "algo_config": None,
    }


def quark_of_four(tensors: Tensors, config: dict[str, Any]) -> None:
    called(tensors, ".weight_packed", ".weight")
    spec = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    config[KEY] = {"quant_method": "quark", "global_quant_config": {"weight": [spec]}}


def by_channel(tensors: Tensors, config: dict[str, Any]) -> None:
    for name in [n for n in tensors if n.endswith(".weight_scale")]:
        tensors[name] = tensors[name][0], tensors[name][1].reshape(-1)
    config[KEY] = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}


def spread_blocks(tensors: Tensors, config: dict[str, Any]) -> None:
    called(tensors, ".weight_scale_inv", ".weight_scale")
    for name in [n for n in tensors if n.endswith(".weight_scale")]:
        dtype, grid = tensors[name]
        tensors[name] = dtype, grid.reshape(grid.shape[0], 1, grid.shape[1], 1)
    config[KEY] = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}


def with_heads(tensors: Tensors, config: dict[str, Any]) -> None:
    """A scale for each head of what is cached, and one for queries."""
    tensors[f"{ATTENTION}k_scale"] = "F32", np.float32([0.5, 2]).reshape(2, 1, 1).view("<u4")
    tensors[f"{ATTENTION}q_scale"] = number(3)


def bytes_for_exponents(tensors: Tensors, config: dict[str, Any]) -> None:
    called(tensors, ".scale", ".weight_scale")
    for name in [n for n in tensors if n.endswith(".weight_scale")]:
        tensors[name] = "U8", tensors[name][1]
    config[KEY] = groups("mxfp8-quantized", {**FLOAT, "group_size": 32})


def mixed(other: Callable[[str, np.ndarray], Tensors]) -> Change:
    """The attention in the format `other`, beside the rest."""

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for stem in [
            n.removesuffix(".weight_scale") for n in tensors if "attn" in n and n.endswith(".weight_scale")
        ]:
            for name in [n for n in tensors if n.startswith(f"{stem}.")]:
                del tensors[name]
            shape = (config["hidden_size"],) * 2
            rng = np.random.default_rng(len(stem))
            heads = config["head_dim"] * config["num_attention_heads"]
            of_keys = config["head_dim"] * config["num_key_value_heads"]
            shape = {"q": (heads, shape[1]), "o": (shape[0], heads)}.get(stem[-6], (of_keys, shape[1]))
            tensors.update(other(stem, rng.normal(size=shape) / 5))
        each = {**NV, "format": "nvfp4-pack-quantized"}, {**FLOAT, "format": "float-quantized"}
        config[KEY] = groups("mixed-precision", *each, {})

    return change


def of_modules(other: Callable[[str, np.ndarray], Tensors], *told: tuple[str, dict[str, Any]]) -> Change:
    """The attention in the format `other`, and each group with its target."""

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        called(tensors, ".weight_scale_inv", ".weight_scale")
        mixed(other)(tensors, config)
        config[KEY] = groups("mixed-precision", *(weights for _, weights in told))
        for group, (target, _) in zip(config[KEY]["config_groups"].values(), told, strict=True):
            group["targets"] = [target]

    return change


def of_layers(tensors: Tensors, config: dict[str, Any]) -> None:
    mixed(rows)(tensors, config)
    layers = {n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")}
    names = {
        True: {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        False: {"quant_algo": "NVFP4", "group_size": 16},
    }
    each = {n: names["attn" in n] for n in layers}
    config[KEY] = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": each}


def of_layers_with_blocks(tensors: Tensors, config: dict[str, Any]) -> None:
    """Scales of rows of the attention, and of 32 neighbours of the rest: its layers alone tell them apart."""
    bytes_for_exponents(tensors, config)
    mixed(rows)(tensors, config)
    layers = [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]
    each = {n: {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN" if "attn" in n else "MXFP8"} for n in layers}
    config[KEY] = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": each}


def shifted_inputs(tensors: Tensors, config: dict[str, Any]) -> None:
    """int8 with zero points, of the inputs too."""
    for stem in [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]:
        shape = tensors[f"{stem}.weight_scale"][1].shape
        zeros = np.random.default_rng(5).integers(-9, 9, shape).astype("i1")
        tensors[f"{stem}.weight_zero_point"] = "I8", zeros.view("u1")
        tensors[f"{stem}.input_scale"] = number(0.03)
        tensors[f"{stem}.input_zero_point"] = "I8", np.array([3], "u1")
    config[KEY] = groups("int-quantized", {**FLOAT, "type": "int", "symmetric": False})


def of_a_tensor(tensors: Tensors, config: dict[str, Any]) -> None:
    for name in [n for n in tensors if n.endswith(".weight_scale")]:
        tensors[name] = "BF16", to_bits(np.array([0.0123]), "BF16")
    config[KEY] = groups("naive-quantized", {**FLOAT, "type": "int", "strategy": "tensor"})


TOOLS: dict[str, tuple[str | Format, Change, list[str]]] = {
    "AutoFP8": ("fp8-tensor", autofp8, ["fp8, a scale for each tensor"]),
    "FBGEMM": (
        "fp8-rows",
        said(quant_method="fbgemm_fp8", activation_scale_ub=1200.0, modules_to_not_convert=["lm_head"]),
        ["fp8, a scale for each row"],
    ),
    "Quark": ("fp8-tensor", quark, ["fp8, a scale for each tensor"]),
    "Quark MXFP4": ("mxfp4", quark_of_four, ["MXFP4"]),
    "modelopt by channel": ("fp8-rows", by_channel, ["fp8, a scale for each row"]),
    "modelopt by block": (in_blocks((128, 128), "F32"), spread_blocks, ["fp8 in blocks of 128 x 128"]),
    "modelopt mixed": ("nvfp4", of_layers, ["fp8, a scale for each row", "NVFP4"]),
    "modelopt in blocks": (
        in_blocks((1, 32), "F8_E8M0"),
        of_layers_with_blocks,
        ["fp8 in blocks of 1 x 32", "fp8, a scale for each row"],
    ),
    "heads": ("fp8-rows", with_heads, ["fp8, a scale for each row"]),
    "MXFP8": (in_blocks((1, 32), "F8_E8M0"), bytes_for_exponents, ["fp8 in blocks of 1 x 32"]),
    "mxfp8 of SGLang": (
        in_blocks((1, 32), "F8_E8M0"),
        said(quant_method="mxfp8", scale_fmt="ue8m0"),
        ["fp8 in blocks of 1 x 32"],
    ),
    "mixed precision": ("nvfp4", mixed(rows), ["fp8, a scale for each row", "NVFP4"]),
    "blocks beside rows": (
        "fp8-blocks",
        of_modules(rows, ("re:.*self_attn.*", FLOATS), ("Linear", {**FLOATS, "block_structure": [16, 24]})),
        ["fp8 in blocks of 16 x 24", "fp8, a scale for each row"],
    ),
    "integers of two widths": (
        "int4",
        of_modules(
            int8,
            (r"re:^model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj$", {**INT8, "format": "int-quantized"}),
            ("re:.*mlp.*_proj", PACKED),
        ),
        ["int4 in groups of 32", "int8, a scale for each row"],
    ),
    "not sparse": (
        "fp8-rows",
        said(**groups("float-quantized", FLOAT, sparsity_config={"format": "dense"}, transform_config={})),
        ["fp8, a scale for each row"],
    ),
    "int8": ("int8", shifted_inputs, ["int8, a scale for each row with zero points"]),
    "int8 of a tensor": ("int8", of_a_tensor, ["int8, a scale for each tensor"]),
}


@pytest.mark.parametrize("name", TOOLS)
def test_what_a_tool_writes_is_carried_and_proved(
    name: str, made: Callable[..., Path], tmp_path: Path, one_thread: None
) -> None:
    form, change, words = TOOLS[name]
    wide = "mistral-small" if name in ("modelopt mixed", "mixed precision", "Quark MXFP4") else MODEL
    source = made(form, change, model=wide)
    with open_checkpoint(source) as checkpoint:
        found = found_in(checkpoint)
    assert found is not None and sorted(found.words) == sorted(words)
    convert(source, tmp_path / "out")
    assert same(tmp_path / "out", source)
    report = verify(tmp_path / "out", source, levels=("coverage", "bits"))
    assert report.status == "pass", report.headline
    convert(source, tmp_path / "numbers", options=Options(dequantize="F32"), check=False)
    report = verify(tmp_path / "numbers", source, levels=("coverage", "bits"))
    assert report.status == "pass", report.headline
    assert not any("scale" in n or "zero" in n for n in held(tmp_path / "numbers"))


@pytest.mark.parametrize("name", ["Quark MXFP4", "modelopt in blocks", "int8", "blocks beside rows"])
def test_both_readings_take_them(
    name: str, made: Callable[..., Path], tmp_path: Path, one_thread: None
) -> None:
    form, change, _ = TOOLS[name]
    source = made(form, change, model="mistral-small" if name == "Quark MXFP4" else MODEL)
    convert(source, tmp_path / "out", check=False)
    report = verify(tmp_path / "out", source, levels="parity", mode="quick")
    assert report.status == "pass", report.headline


def test_int8_is_the_code_without_its_zero_point_times_the_scale(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    source = made("int8", shifted_inputs)
    convert(source, tmp_path / "out", options=Options(dequantize="F32"), check=False)
    stored, stem = held(source), f"{ATTENTION}q_proj.weight"
    codes, zeros = (stored[n][1].view("i1").astype("<f8") for n in (stem, f"{stem}_zero_point"))
    scales = (stored[f"{stem}_scale"][1].astype("<u4") << 16).view("<f4").astype("<f8")
    wanted = ((codes - zeros) * scales).astype("<f4")
    assert np.array_equal(held(tmp_path / "out")[stem][1].view("<f4"), wanted)


# --- what is wrong --------------------------------------------------------------------------------------


def wrong(part: str, bits: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        name = f"model.layers.1.mlp.up_proj.{part}"
        dtype, right = tensors[name]
        tensors[name] = dtype, np.ascontiguousarray(bits(right.copy())).reshape(right.shape)

    return change


def of_words(turned: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda bits: (bits.view("u1") ^ np.uint8(turned)).view(bits.dtype)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("int8-packed", wrong("weight_packed", of_words(0x80)), known.SIGNED),
        (
            "int8-packed",
            wrong("weight_zero_point", lambda b: np.full(b.shape, 0x8080_8080, b.dtype)),
            known.UNSHIFTED,
        ),
        ("int8-packed", wrong("weight_scale", lambda b: np.roll(b, 1, 0)), known.ROWS_OFF),
        ("int8", wrong("weight_scale", lambda b: np.full(b.shape, 0x3F80, b.dtype)), "every scale is one"),
    ],
)
def test_a_mistake_with_carried_integers_is_named(
    name: str, change: Change, words: str, conversions: Written, tmp_path: Path
) -> None:
    source = quantise(conversions(MODEL), tmp_path / "in", name)
    convert(source, tmp_path / "out", check=False)
    tensors = held(tmp_path / "out")
    change(tensors, {})
    write(tmp_path / "out" / "model.safetensors", tensors)
    report = verify(tmp_path / "out", source, levels="bits")
    assert report.status == "fail" and any(words in f.message for f in report.findings), report.headline


def test_integers_taken_without_their_sign_are_named(conversions: Written, tmp_path: Path) -> None:
    source = quantise(conversions(MODEL), tmp_path / "in", "int8")
    convert(source, tmp_path / "out", options=Options(dequantize="F32"), check=False)
    stored, made = held(source), held(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    scales = (stored[f"{name}_scale"][1].astype("<u4") << 16).view("<f4")
    made[name] = "F32", (stored[name][1].astype("<f4") * scales).view("<u4")
    write(tmp_path / "out" / "model.safetensors", made)
    report = verify(tmp_path / "out", source, levels="bits")
    assert report.status == "fail" and any(known.UNSIGNED in f.message for f in report.findings)


# --- what is refused ------------------------------------------------------------------------------------

BEFORE = "get the release in 16 or 32 bits"


def two(first: dict[str, Any], second: dict[str, Any]) -> Change:
    return said(**groups("mixed-precision", first, second))


SPEC = {"weight": {"dtype": "int4", "qscheme": "per_group", "group_size": 128}}
SAYINGS: dict[str, tuple[str, Change, str, str]] = {  # field, what is said of it
    "another method": ("fp8-rows", said(quant_method="bitnet"), "quant_method", 'found "bitnet"'),
    "marlin": ("fp8-rows", said(**groups("marlin-24", FLOAT)), "format", 'found "marlin-24"'),
    "three bits": (
        "int4",
        said(**groups("pack-quantized", {**INT4, "num_bits": 3})),
        "weights",
        '"3 bits, int"',
    ),
    "an order of columns": (
        "int4",
        said(**groups("pack-quantized", {**INT4, "actorder": "group"})),
        "weights.actorder",
        "which needs no g_idx",
    ),
    "zeros left out": (
        "fp8-rows",
        said(**groups("float-quantized", FLOAT, sparsity_config={"format": "sparse-24-bitmask"})),
        "sparsity_config",
        "every number to have a code",
    ),
    "rotated inputs": (
        "fp8-rows",
        said(**groups("float-quantized", FLOAT, transform_config={"config_groups": {"R1": {}}})),
        "transform_config",
        "inputs as the model gives them",
    ),
    "two blocks": (
        "fp8-blocks",
        two({**FLOATS, "block_structure": [16, 24]}, FLOATS),
        "config_groups",
        "one block for all codes of fp8",
    ),
    "a pattern that may never end": (
        "fp8-blocks",
        of_modules(rows, ("re:(a+)+$", FLOATS), ("Linear", {**FLOATS, "block_structure": [16, 24]})),
        "config_groups.targets",
        "a pattern of letters",
    ),
    "patterns without end": (
        "fp8-blocks",
        of_modules(
            rows,
            *[("re:" + f".*{k}" * 160, FLOATS) for k in "abcdefghijklmnopqrstu"],
            ("Linear", {**FLOATS, "block_structure": [16, 24]}),
        ),
        "config_groups.targets",
        "patterns of at most 10,000 characters in all, found 10143",
    ),
    "two groups": ("int4", two(PACKED, {**PACKED, "group_size": 64}), "config_groups", "one group, width"),
    "floats around another number": (
        "fp8-rows",
        said(**groups("float-quantized", {**FLOAT, "symmetric": False})),
        "weights.symmetric",
        "around zero",
    ),
    "scaled inputs": (
        "modelopt",
        said(quant_method="modelopt", quant_algo="NVFP4_AWQ"),
        "quant_algo",
        'found "NVFP4_AWQ"',
    ),
    "another group": (
        "modelopt",
        said(quant_method="modelopt", quant_algo="NVFP4", group_size=32),
        "group_size",
        "expected 16",
    ),
    "int4 of Quark": (
        "fp8-tensor",
        said(quant_method="quark", global_quant_config=SPEC),
        "global_quant_config.weight",
        "dtype int4, qscheme per_group, group_size 128",
    ),
    "rotated by Quark": (
        "fp8-tensor",
        said(quant_method="quark", global_quant_config={"weight": EIGHT}, algo_config=[{"name": "rotation"}]),
        "algo_config",
        'found "rotation"',
    ),
    "only made up": (
        "fp8-tensor",
        said(
            quant_method="quark",
            global_quant_config={"weight": EIGHT},
            export={"weight_format": "fake_quantized"},
        ),
        "export.weight_format",
        "real_quantized",
    ),
    "e5m2": ("fp8-tensor", said(quant_method="fp8", fmt="e5m2"), "fmt", "expected e4m3"),
}


@pytest.mark.parametrize("name", SAYINGS)
def test_what_is_not_read_is_one_sentence_with_a_way_out(name: str, made: Callable[..., Path]) -> None:
    form, change, where, words = SAYINGS[name]
    source = made(form, change, model="mistral-small" if form == "modelopt" else MODEL)
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.file) == ("unsupported", "config.json")
    assert str(problem.where).endswith(where) and words in problem.message
    assert problem.hint is not None and problem.hint.startswith(BEFORE)


ODD: list[dict[str, Any]] = [
    {"quant_method": ["fp8"]},
    {"quant_method": "modelopt", "quant_algo": ["FP8"]},
    {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 3}},
    {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"a": {"quant_algo": [1]}},
    },
    {"quant_method": "quark", "global_quant_config": {"weight": [[], {}]}},
    {"quant_method": "quark", "layer_quant_config": {"a": 5}, "algo_config": 7},
    groups("float-quantized"),
    groups("float-quantized", {**FLOAT, "num_bits": [8], "type": {}}),
    groups("float-quantized", {**FLOAT, "format": ["x"]}),
    {**groups("float-quantized", FLOAT), "config_groups": [FLOAT]},
]


@pytest.mark.parametrize("odd", ODD, ids=[str(k) for k in range(len(ODD))])
def test_values_of_another_type_are_no_crash(odd: dict[str, Any], made: Callable[..., Path]) -> None:
    source = made("fp8-rows", said(**odd))
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    assert caught.value.problems[0].kind in ("bad-config", "unsupported")
    assert str(caught.value.problems[0].where).startswith(KEY)


def test_groups_that_another_method_carries_are_not_read(made: Callable[..., Path]) -> None:
    """Those of compressed-tensors say how many share a scale; what is no group of it was a crash."""
    source = made("int4", said(quant_method="modelopt", quant_algo="NVFP4", config_groups={"a": 1}))
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    assert {p.kind for p in caught.value.problems} == {"missing-fact"}
    assert "how many neighbours share a scale" in caught.value.problems[0].message


def test_a_layer_that_modelopt_does_not_list_is_asked(made: Callable[..., Path]) -> None:
    form, change, _ = TOOLS["modelopt in blocks"]
    source = made(form, change)
    config = json.loads((source / "config.json").read_text())
    del config[KEY]["quantized_layers"]["model.layers.1.mlp.up_proj"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("missing-fact", "model.layers.1.mlp.up_proj.weight")
    assert problem.message.startswith("expected an entry of quantized_layers that is of this weight")


def test_scales_of_a_cache_beside_numbers_say_what_they_are(conversions: Written, tmp_path: Path) -> None:
    """No codes are beside them: what a calibration of the cache alone leaves."""
    source = quantise(conversions(MODEL), tmp_path / "in", "fp8-tensor")
    tensors = held(conversions(MODEL))
    for name in ("k_proj.k_scale", "v_proj.v_scale"):
        tensors[f"{ATTENTION}{name}"] = number(0.5)
    write(source / "model.safetensors", tensors)
    shutil.copy(conversions(MODEL) / "config.json", source)
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    assert {p.kind for p in caught.value.problems} == {"uncovered-tensors"}
    assert all(
        "cache them in 8 bits" in str(p.hint) and "--drop '*.[kvq]_scale'" in str(p.hint)
        for p in caught.value.problems
    )
    made = convert(source, tmp_path / "out", options=Options(drop=("*.[kvq]_scale",)))
    assert sorted(d.tensor.name for d in made.plan.dropped) == sorted(
        n for n in tensors if n.endswith("_scale")
    )


def test_layers_that_each_say_another_size_are_read_once(made: Callable[..., Path]) -> None:
    """Each compared with all before it would be 2 * 10^8 times."""
    each = {f"layers.{k}": {"quant_algo": "FP8", "group_size": k} for k in range(20_000)}
    raw = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": each}
    with open_checkpoint(made("fp8-rows", said())) as checkpoint:
        scheme = scheme_of(checkpoint, {KEY: raw})
    assert (scheme.method, scheme.block, scheme.group) == ("modelopt", None, None)


def test_the_width_of_codes_in_words_is_asked(made: Callable[..., Path]) -> None:
    source = made("int8-packed", lambda t, c: c.pop(KEY))
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    problem = caught.value.problems[0]
    assert problem.kind == "missing-fact" and "how many bits a code has" in problem.message


@pytest.mark.parametrize(
    ("form", "end", "bits"),
    [
        ("int4", "weight_g_idx", np.zeros(56, "<u4")),
        ("modelopt", "pre_quant_scale", np.zeros(56, "<u4")),
    ],
)
@pytest.mark.parametrize("drop", [(), ("*.weight_g_idx", "*.pre_quant_scale")])
def test_what_changes_numbers_besides_is_no_tensor_to_drop(
    form: str, end: str, bits: np.ndarray, drop: tuple[str, ...], made: Callable[..., Path]
) -> None:
    """The hint was to leave it out, and then other numbers were proved."""
    name = f"{ATTENTION}q_proj.{end}"
    source = made(
        form,
        lambda t, c: t.update({name: ("I32", bits)}),
        model="mistral-small" if form == "modelopt" else MODEL,
    )
    with pytest.raises(CkptToolError) as caught:
        plan(source, options=Options(drop=drop, dequantize="BF16"))
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("unsupported", name) and BEFORE in str(problem.hint)


def few(end: str, dtype: str, *, keep: bool = False) -> Change:
    """Matrices of layers under another name, as tools pack them."""

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [n for n in tensors if LINEAR.fullmatch(n) and tensors[n][1].ndim == 2]:
            _, bits = tensors[name] if keep else tensors.pop(name)
            tensors[name.removesuffix(".weight") + end] = (
                dtype,
                np.zeros(bits.shape, f"u{ {'F16': 2}.get(dtype, 1) }"),
            )

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (few(".qweight", "U8"), "GPTQ or AWQ"),
        (few(".SCB", "U8", keep=True), "bitsandbytes"),
        (few("._weight_qdata", "F8_E4M3"), "torchao"),
        (few(".weight:_data", "I8"), "torchao"),
        (few(".weight._data", "I8"), "quanto"),
        (few(".W_q", "U8"), "HQQ"),
        (few(".weight_scales", "F16", keep=True), "EETQ"),
    ],
)
@pytest.mark.parametrize("asked", [None, "BF16"])
def test_few_bits_of_other_tools_are_named_either_way(
    change: Change, words: str, asked: str | None, conversions: Written, tmp_path: Path
) -> None:
    """Where numbers are asked for as well: it said that plain weights can be cast."""
    tensors = held(conversions(MODEL))
    change(tensors, {})
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "model.safetensors", tensors)
    (tmp_path / "in" / "config.json").write_text((conversions(MODEL) / "config.json").read_text())
    with pytest.raises(CkptToolError) as caught:
        plan(tmp_path / "in", options=Options(dequantize=asked))
    problem = caught.value.problems[0]
    assert problem.kind == "unsupported" and words in problem.message and BEFORE in str(problem.hint)


def test_of_a_method_that_is_not_read_no_numbers_are_made(conversions: Written, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "model.safetensors", held(conversions(MODEL)))
    config = json.loads((conversions(MODEL) / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {KEY: {"quant_method": "gptq"}}))
    with pytest.raises(CkptToolError) as caught:
        plan(tmp_path / "in", options=Options(dequantize="BF16"))
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("unsupported", f"{KEY}.quant_method")
    assert 'found "gptq"' in problem.message and BEFORE in str(problem.hint)


@pytest.mark.parametrize("codes", ["lm_head", "model.embed_tokens"])
def test_a_head_in_codes_and_embeddings_in_numbers_are_not_tied(
    codes: str, made: Callable[..., Path]
) -> None:
    """It ended in a KeyError for the head, and compared codes with numbers for the embeddings."""

    def one_of_both(tensors: Tensors, config: dict[str, Any]) -> None:
        plain = tensors["model.embed_tokens.weight"]
        config["tie_word_embeddings"] = True
        tensors["lm_head.weight"] = plain
        numbers = np.full(plain[1].shape, 0.5)
        tensors.update(FORMATS["fp8-blocks"].make(codes, numbers))

    source = made("fp8-blocks", one_of_both)
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    problem = caught.value.problems[0]
    assert (problem.kind, problem.where) == ("tied-mismatch", "lm_head.weight")
    assert "expected numbers or codes of both" in problem.message


def test_a_scale_of_the_whole_that_is_missing_is_asked_for(made: Callable[..., Path]) -> None:
    gone = "model.layers.0.mlp.up_proj.weight_global_scale"
    source = made("nvfp4", lambda t, c: t.pop(gone), model="mistral-small")
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("missing-tensor", gone)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("experts.gate_up_proj", "experts.gate_up_projs.0.weight", "as Unsloth, vLLM or MLX holds them"),
        ("experts.gate_up_proj", "experts.gate_proj.weight", "as Unsloth, vLLM or MLX holds them"),
        ("experts.gate_up_proj_blocks", "experts.w13_weight", "found them joined, as vLLM holds them"),
        (
            "router.weight",
            "router.linear.weight",
            "expected the router under its own name, found it as Unsloth",
        ),
    ],
)
def test_experts_as_others_hold_them_are_named(
    old: str, new: str, words: str, conversions: Written, tmp_path: Path
) -> None:
    asked = Options(dequantize="BF16") if old.endswith("proj") else Options()
    folder = tmp_path / "in"
    convert(conversions("gpt-oss-20b"), folder, options=asked, check=False)
    tensors = held(folder)
    for name in [n for n in tensors if ".mlp." in n]:
        bits = tensors.pop(name)
        if name.endswith(old):
            tensors[name.replace(old, new)] = bits
    write(folder / "model.safetensors", tensors)
    with pytest.raises(CkptToolError) as caught:
        plan(folder)
    assert words in caught.value.problems[0].message


def test_what_joins_images_to_a_text_is_left_out_by_its_name_in_memory(
    conversions: Written, tmp_path: Path
) -> None:
    """compressed-tensors compares names of modules in memory, which are longer than those on the disk."""
    source = quantise(conversions("mistral3-images"), tmp_path / "in", "fp8-rows")
    ignored = json.loads((source / "config.json").read_text())[KEY]["ignore"]
    patterns = [n.removeprefix("re:") for n in ignored if n.startswith("re:")]
    plain = [
        n
        for n, (d, b) in held(source).items()
        if n.startswith("multi_modal_projector.linear") and b.ndim == 2
    ]
    assert len(plain) == 2
    for name in plain:
        assert any(re.match(p, f"model.{name.removesuffix('.weight')}") for p in patterns), name


@pytest.mark.parametrize("whole", [{}, {KEY: None}])
def test_the_text_part_says_it_where_the_whole_does_not(
    whole: dict[str, Any], conversions: Written, tmp_path: Path
) -> None:
    """So does transformers 5.23.0 take it (quantizers/auto.py); what the whole says goes before."""
    source = quantise(conversions("mistral3-images"), tmp_path / "in", "fp8-tensor")
    config = json.loads((source / "config.json").read_text())
    config["text_config"][KEY] = config.pop(KEY)
    (source / "config.json").write_text(json.dumps(config | whole))
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert verify(tmp_path / "out", source, levels=("coverage", "bits")).status == "pass"
    convert(source, tmp_path / "numbers", options=Options(dequantize="bfloat16"))
    written = json.loads((tmp_path / "numbers" / "config.json").read_text())
    assert KEY not in written and KEY not in written["text_config"]
    assert verify(tmp_path / "numbers", source, levels=("coverage", "bits")).status == "pass"
    (source / "config.json").write_text(json.dumps(config | {KEY: {"quant_method": "awq"}}))
    with pytest.raises(CkptToolError, match='found "awq"'):
        plan(source)
