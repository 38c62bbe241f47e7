"""Key/value heads pooled to fewer: the one conversion that computes, so it is checked against float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.convert.casting import cast
from ckpt_tool.convert.layout import Part, Step, apply, parse_dims, with_mean
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families.llama import llama
from ckpt_tool.fixtures.families.mistral import mistral
from ckpt_tool.fixtures.families.mixtral import mixtral
from ckpt_tool.fixtures.numbers import to_bits
from ckpt_tool.fixtures.variants import VARIANTS

Written = Callable[[str], Path]
# numbers after the leading bit of each dtype
MANTISSA = {"F32": 23, "F16": 10, "BF16": 7}


def doubles(bits: np.ndarray, dtype: str) -> np.ndarray:
    out = np.empty(bits.size, dtype=DTYPES["F64"].bits)
    cast(bits.reshape(-1), dtype, "F64", out)
    return out.view("<f8").reshape(bits.shape)


def half_a_unit(value: np.ndarray, dtype: str) -> np.ndarray:
    """The largest error of rounding to `dtype`, and what float32 sums add to it."""
    size = np.maximum(np.abs(value), 2.0**-14)
    return 2.0 ** (np.floor(np.log2(size)) - MANTISSA[dtype] - 1) + size * 2.0**-21


# --- the algebra ----------------------------------------------------------------------------------------


@given(
    dtype=st.sampled_from(["F32", "F16", "BF16"]),
    groups=st.integers(1, 4),
    each=st.integers(2, 4),
    half=st.integers(1, 3),
    width=st.integers(1, 5),
    ranks=st.sampled_from([1, 2, 3, 4]),
    bias=st.booleans(),
    block=st.sampled_from([4, 64, 4096]),
)
def test_a_mean_over_heads_is_that_of_float64(
    dtype: str, groups: int, each: int, half: int, width: int, ranks: int, bias: bool, block: int
) -> None:
    heads = groups * each
    if heads % ranks or (groups % ranks and ranks % groups):
        ranks = 1
    left, right = ("(k half two)", "(k two half)") if bias else ("(k half two) d", "(k two half) d")
    share = heads // ranks
    ranges: list[Any] = [() if ranks == 1 else (("k", r * share, (r + 1) * share),) for r in range(ranks)]
    sources = tuple(Part(f"{r}", "w", dtype, parse_dims(left), ranges[r]) for r in range(ranks))
    axes = (("k", heads), ("half", half), ("two", 2), *(() if bias else (("d", width),)))
    plain = Step(axes, sources, (Part("out", "t", dtype, parse_dims(right)),))
    step = with_mean(plain, "k", groups)
    assert step.defects() == []
    columns = () if bias else (width,)
    random = np.random.default_rng(heads * width + half)
    bits = to_bits(random.normal(size=(heads * half * 2, *columns)), dtype)
    rows = len(bits) // ranks
    (made,) = apply(step, [bits[r * rows : (r + 1) * rows] for r in range(ranks)])
    (whole,) = apply(plain, [bits[r * rows : (r + 1) * rows] for r in range(ranks)])
    wanted = doubles(whole, dtype).reshape(groups, each, -1, *columns).mean(axis=1).reshape(made.shape)
    assert np.all(np.abs(doubles(made, dtype) - wanted) <= half_a_unit(wanted, dtype))
    itemsize = DTYPES[dtype].itemsize
    least = each * itemsize  # what goes into one mean stays together
    for piece in step.blocks(block, block):
        assert sum(a.numel for a in piece.reads) * itemsize <= max(block, least)
    with pytest.raises(ValueError, match="cannot be taken back"):
        step.inverse()


def test_a_share_that_is_no_group_and_no_part_of_one_is_refused() -> None:
    part = Part("0", "w", "F32", (("k",),), (("k", 0, 3),))
    with pytest.raises(ValueError, match="neither groups of 2"):
        with_mean(Step((("k", 6),), (part,), (Part("o", "t", "F32", (("k",),)),)), "k", 3)


# --- families -------------------------------------------------------------------------------------------

MODELS = {
    "mistral": mistral(48, 3, 8, 80, 6, 6, 320, theta=1e6),
    "mixtral": mixtral("C", 48, 2, 8, 40, 6, 6, 304, theta=1e6),
}
CASES = [
    ("llama-1-7b", 2, None),
    ("llama-1-7b", 1, "F32"),
    ("llama-1-13b", 2, None),
    ("llama-1-13b", 1, None),
    ("qwen1.5-0.5b", 4, None),
    ("mistral", 3, None),
    ("mixtral", 2, None),
]


@pytest.fixture
def full_heads(originals: Written, tmp_path: Path) -> Callable[[str], tuple[Path, str]]:
    """(original with as many key/value heads as query heads, its family)."""

    def written(name: str) -> tuple[Path, str]:
        if name in VARIANTS:
            return originals(name), VARIANTS[name].family
        MODELS[name].write(tmp_path / name, name, seed=3)
        return tmp_path / name, name

    return written


@pytest.mark.parametrize(("name", "groups", "dtype"), CASES)
def test_pooled_heads_are_means_and_the_rest_is_untouched(
    name: str, groups: int, dtype: str | None, full_heads: Callable[[str], tuple[Path, str]], tmp_path: Path
) -> None:
    source, family = full_heads(name)
    api.convert(source, tmp_path / "full", family=family)
    made = api.convert(source, tmp_path / "few", family=family, options=api.Options(gqa=groups, dtype=dtype))
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("full", "few"))
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    heads = config["num_attention_heads"]
    assert config["num_key_value_heads"] == groups
    assert before.keys() == after.keys()
    pooled = [n for n in after if ".k_proj." in n or ".v_proj." in n]
    assert len(pooled) == config["num_hidden_layers"] * (4 if family == "qwen2" else 2)
    for key, found in after.items():
        if key not in pooled:
            assert torch.equal(found, before[key].to(found.dtype)), key
            continue
        whole = before[key].double()
        shape = (groups, heads // groups, whole.shape[0] // heads, *whole.shape[1:])
        wanted = whole.reshape(shape).mean(1).reshape(found.shape).numpy()
        kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[found.dtype]
        assert np.all(np.abs(found.double().numpy() - wanted) <= half_a_unit(wanted, kind)), key
    assert any("--gqa" in text for text in made.plan.lossy)


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(("name", "groups", "dtype"), CASES)
def test_a_pooled_model_is_verified_against_the_pooled_definition(
    name: str, groups: int, dtype: str | None, full_heads: Callable[[str], tuple[Path, str]], tmp_path: Path
) -> None:
    source, family = full_heads(name)
    out = tmp_path / "out"
    api.convert(source, out, family=family, options=api.Options(gqa=groups, dtype=dtype))
    manifest = json.loads((out / "ckpt-tool.json").read_text())
    assert manifest["options"]["gqa"] == groups and any("--gqa" in text for text in manifest["lossy"])
    report = api.verify(out, source, against="transformers")
    assert report.exit_code == 0, [f.message for f in report.findings if f.status == "fail"]
    bits = next(f for f in report.findings if f.check == "round trip")
    assert "means over heads" in bits.message and bits.data["exactness"] == "identical after cast"
    logits = [f for f in report.findings if f.check == "logits"]
    assert len(logits) == 2 and all(f.measured is not None and f.measured <= 1e-10 for f in logits)


@pytest.mark.usefixtures("few_prompts")
def test_pooled_heads_that_changed_places_are_caught(originals: Written, tmp_path: Path) -> None:
    source, out = originals("llama-1-7b"), tmp_path / "out"
    api.convert(source, out, family="llama", options=api.Options(gqa=2))
    file, name = out / "model.safetensors", "model.layers.1.self_attn.v_proj.weight"
    tensors = load_file(file)
    tensors[name] = tensors[name].roll(tensors[name].shape[0] // 2, 0).contiguous()
    save_file(tensors, file, {"format": "pt"})
    report = api.verify(out, source, levels=("bits", "parity"))
    failed = [f for f in report.findings if f.status == "fail"]
    assert report.exit_code == 1
    assert any(f.level == "bits" and name in str(f.where) + f.message for f in failed)
    assert any(f.check == "lockstep" and f.data["first"] == "layer 1" for f in failed)


def test_one_head_of_each_group_is_not_a_mean(originals: Written, tmp_path: Path) -> None:
    """Taking the first head of a group, as a converter might, passes for no pooling."""
    source, out = originals("qwen1.5-0.5b"), tmp_path / "out"
    api.convert(source, out, options=api.Options(gqa=4))
    api.convert(source, tmp_path / "full")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors, full = load_file(out / "model.safetensors"), load_file(tmp_path / "full" / "model.safetensors")
    rows = full[name].reshape(4, 2, -1, full[name].shape[1])[:, 0]
    tensors[name] = rows.reshape(tensors[name].shape).contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    report = api.verify(out, source, levels=("bits",))
    assert report.exit_code == 1


@pytest.mark.parametrize(
    ("variant", "groups", "words"),
    [
        ("llama-1-7b", 4, "a divisor of 6"),
        ("llama-1-7b", 6, "expected fewer heads"),
        ("llama-1-7b", 12, "expected fewer heads"),
        ("llama-2-70b", 4, "as many key/value heads as query heads"),
        ("qwen2-0.5b", 1, "as many key/value heads as query heads"),
        ("mistral-7b-v0.1", 1, "as many key/value heads as query heads"),
    ],
)
def test_heads_that_cannot_be_pooled_are_refused(
    variant: str, groups: int, words: str, originals: Written, tmp_path: Path
) -> None:
    with pytest.raises(CkptToolError) as caught:
        api.convert(originals(variant), tmp_path / "out", options=api.Options(gqa=groups))
    (problem,) = caught.value.problems
    assert problem.kind == "config-mismatch" and words in problem.message and problem.where == "--gqa"
    assert not (tmp_path / "out").exists()


def test_ranks_that_cannot_share_the_new_heads_are_refused(tmp_path: Path) -> None:
    model = llama("2", 96, 1, 12, 328, 16, ranks=4)  # 3 heads to a rank, groups of 2 or 4
    model.write(tmp_path / "in", "x")
    for groups in (3, 6):
        with pytest.raises(CkptToolError, match="4 model-parallel ranks share evenly"):
            api.convert(tmp_path / "in", tmp_path / "out", family="llama", options=api.Options(gqa=groups))
    api.convert(tmp_path / "in", tmp_path / "out", family="llama", options=api.Options(gqa=4))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as f:
        assert f.get_tensor("model.layers.0.self_attn.k_proj.weight").shape == (4 * 8, 96)


@pytest.mark.parametrize(
    ("variant", "to"), [("opt-13b", "hf"), ("codegen-2b-multi", "hf"), ("llama-1-7b", "original")]
)
def test_where_it_does_not_apply_it_is_refused(
    variant: str, to: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    source = originals(variant) if to == "hf" else conversions(variant)
    with pytest.raises(CkptToolError) as caught:
        api.convert(source, tmp_path / "out", to=to, options=api.Options(gqa=2))
    (problem,) = caught.value.problems
    assert problem.kind == "usage" and problem.where == "--gqa"
    assert "llama, ministral3, mistral, mixtral, qwen2" in problem.message


def test_ranks_of_megatron_core_are_converted_first(originals: Written, tmp_path: Path) -> None:
    with pytest.raises(CkptToolError, match="Hugging Face layout, found Megatron-Core's"):
        api.convert(originals("qwen2-mcore"), tmp_path / "out", options=api.Options(gqa=1))


def test_a_pooled_model_goes_back_to_an_original_of_fewer_heads(originals: Written, tmp_path: Path) -> None:
    few, back, again = tmp_path / "few", tmp_path / "back", tmp_path / "again"
    api.convert(originals("llama-1-7b"), few, family="llama", options=api.Options(gqa=3))
    api.convert(few, back, to="original")
    assert json.loads((back / "params.json").read_text())["n_kv_heads"] == 3
    api.convert(back, again, family="llama")
    assert (few / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
