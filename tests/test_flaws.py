"""Known mistakes, planted on disk: verification catches every one and names the first wrong layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tool import api
from ckpt_tool.fixtures.flaws import FLAWS, applicable, plant
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify.report import Report

Written = Callable[[str], Path]
REPRESENTATIVES = ("mistral-7b-v0.1", "mixtral-a", "llama-3.1-8b", "bert-v2-tp2", "gpt2-v2-tp2")
OTHER_VERSIONS = ("bert-2019-tp2", "gpt2-v1-bare")
ABOUT_ORDER = ("qkv-order", "qkv-bias-order")
ROTARY = ("q-not-permuted", "k-not-permuted", "k-wrong-heads", "gate-up-swapped", "rope-theta")
SEGMENTS = ("token-types", "next-sentence-classes")
MEGATRON = (*ABOUT_ORDER, "gelu", "head-count", "untied")
SPECIAL = {*ROTARY, *SEGMENTS, *MEGATRON, "experts-swapped", "conv1d-not-transposed"}
OWN: dict[str, tuple[str, ...]] = {
    "mistral": ROTARY,
    "mixtral": (*ROTARY, "experts-swapped"),
    "llama": ROTARY,
    "megatron-bert": (*MEGATRON, *SEGMENTS),
    "megatron-gpt2": (*MEGATRON, "conv1d-not-transposed"),
}
CASES = [
    (v, f) for v in REPRESENTATIVES for f in FLAWS if f not in SPECIAL or f in OWN[VARIANTS[v].family]
] + [(v, f) for v in OTHER_VERSIONS for f in ABOUT_ORDER]


@pytest.mark.parametrize("variant", REPRESENTATIVES)
def test_every_mistake_that_can_be_made_is_planted(variant: str, conversions: Written) -> None:
    assert applicable(conversions(variant)) == [f for v, f in CASES if v == variant]


@pytest.mark.parametrize("variant", ["opt-13b", "codegen-2b-multi", "qwen2.5-14b"])
def test_every_mistake_offered_elsewhere_changes_the_folder(
    variant: str, conversions: Written, tmp_path: Path
) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    right, offered = conversions(variant), applicable(conversions(variant))
    assert len(offered) >= 5
    for name in offered:
        broken = Path(shutil.copytree(right, tmp_path / name))
        assert plant(broken, name).name == name
        assert contents(broken) != contents(right)


def test_a_mistake_that_cannot_be_made_is_refused(conversions: Written) -> None:
    with pytest.raises(ValueError, match="cannot be planted"):
        plant(conversions("gpt2-v2-tp2"), "rope-theta")


def first_wrong(report: Report) -> str | int | None:
    """The phase that the lockstep comparison names as the first to differ."""
    (lockstep,) = (f for f in report.findings if f.check == "lockstep")
    named = lockstep.data.get("first")
    return int(named.removeprefix("layer ")) if named and named.startswith("layer ") else named


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(("variant", "flaw"), CASES)
def test_planted_mistakes_are_caught(
    variant: str, flaw: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(conversions(variant), broken)
    planted = plant(broken, flaw)
    settings = VARIANTS[variant].settings
    report = api.verify(broken, originals(variant), levels=("bits", "parity"), settings=settings)
    failed = {f.level for f in report.findings if f.status == "fail"}
    # where no tensor is touched, only the forward pass can tell
    assert ("parity" if planted.config_only else "bits") in failed
    if planted.where is not None:
        assert "parity" in failed
        assert first_wrong(report) == planted.where


def test_a_shard_of_another_model_is_caught(originals: Written, tmp_path: Path) -> None:
    """The output's second shard comes from a conversion of another model of the same shape."""
    variant = VARIANTS["mistral-7b-v0.3"]
    other = variant.write(tmp_path / "other", seed=7)
    options = api.Options(max_shard_bytes=100_000)
    for name, source in (("good", originals(variant.id)), ("stranger", other)):
        api.convert(source, tmp_path / name, options=options)
    shards = sorted((tmp_path / "good").glob("model-*.safetensors"))
    shutil.copy(tmp_path / "stranger" / shards[1].name, shards[1])
    report = api.verify(tmp_path / "good", originals(variant.id))
    assert report.exit_code == 1
    failed = {f.level for f in report.findings if f.status == "fail"}
    assert {"bits", "parity"} <= failed


def test_without_the_source_the_hashes_tell(conversions: Written, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(conversions("mistral-7b-v0.1"), broken)
    assert api.verify(broken, levels=("bits",), no_source=True).exit_code == 0
    plant(broken, "norm-one-ulp")
    report = api.verify(broken, levels=("bits",), no_source=True)
    assert report.exit_code == 1
    assert any(
        "post_attention_layernorm" in str(f.where) + f.message for f in report.findings if f.status == "fail"
    )
