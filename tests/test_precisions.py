"""What a precision cannot decide is said, with one that can; it is no difference, and hides none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool.fixtures.flaws import Folder
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import against_transformers, controls, library, parity, verify
from ckpt_tool.verify.report import Finding, Report
from ckpt_tool.verify.sides import Change

Written = Callable[[str], Path]
JUDGED = ("parity",)
SMALL = (
    "llama-2-7b", "mistral-7b-v0.1", "qwen2-window", "opt-350m", "codegen-2b-multi", "bert-2023-float32",
    "gpt2-v2-tp2",
)  # fmt: skip

ALL_PROMPTS = "mistral-7b-v0.1"  # whose long prompt two prompts give too narrow a bar in bfloat16


def of(report: Report, check: str, level: str = "parity") -> Finding:
    found = [f for f in report.level(level) if f.check == check]
    return found[0]


def run(variant: str, out: Path, source: Path, **asked: Any) -> Report:
    return verify(out, source, settings=VARIANTS[variant].settings, **{"levels": JUDGED, **asked})


# --- 16 bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", SMALL)
def test_sixteen_bits_cannot_decide_and_say_what_can(
    variant: str, dtype: str, originals: Written, conversions: Written, request: pytest.FixtureRequest
) -> None:
    if variant != ALL_PROMPTS:
        request.getfixturevalue("few_prompts")
    report = run(variant, conversions(variant), originals(variant), compute_dtype=dtype)
    assert (report.exit_code, [f.message for f in report.findings if f.status == "fail"]) == (2, [])
    assert of(report, "lockstep").status == "pass"
    control = of(report, "negative control")
    assert control.status == "undecided"
    assert f"{dtype} cannot see" in control.message and "--compute-dtype float32 sees" in control.message
    assert {seen for _, _, seen in control.data["blind"]} <= {"float32", "float64"}
    assert "could not be judged" in report.headline
    (table,) = control.tables
    assert all(row[3] != "NO" for row in table.rows)
    kinds = ("permuted", "exchanged", "shifted")
    coarse = [row[3] for row in table.rows if any(k in str(row[1]) for k in kinds)]
    assert coarse and set(coarse) == {"yes"}


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_still_see_a_wrong_matrix(
    dtype: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(conversions("llama-2-7b"), tmp_path / "broken"))
    _transposed(Folder(broken))
    report = run("llama-2-7b", broken, originals("llama-2-7b"), compute_dtype=dtype)
    assert report.exit_code == 1 and of(report, "lockstep").data["first"] == "layer 1"


def _transposed(folder: Folder) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    folder.set(name, folder.get(name).T)
    folder.checkpoint.close()


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_in_sixteen_bits_are_undecided(dtype: str, originals: Written, conversions: Written) -> None:
    report = run(
        "mixtral-a", conversions("mixtral-a"), originals("mixtral-a"),
        compute_dtype=dtype, levels=None, against="transformers",
    )  # fmt: skip
    assert (report.exit_code, of(report, "lockstep").status) == (2, "undecided")
    assert "float32 or float64 only" in of(report, "lockstep").message
    assert not [f for f in report.findings if f.status == "fail"]


@pytest.mark.usefixtures("few_prompts")
def test_a_mistake_missed_though_it_is_large_fails(
    originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the precision is at fault then, but the bar."""

    def wide_open(bar: object, d: object) -> bool:
        return True

    monkeypatch.setattr(parity.Bar, "holds", wide_open)
    monkeypatch.setattr(controls, "_effect", lambda side, change, phase, samples: (1.0, True))
    report = run("llama-2-7b", conversions("llama-2-7b"), originals("llama-2-7b"))
    control = of(report, "negative control")
    assert control.status == "fail" and "not caught" in control.message


@pytest.mark.usefixtures("few_prompts")
def test_a_mistake_without_effect_is_undecided(
    originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Change("nothing at all", lambda w: {n: w[n] * (1 + 1e-40) for n in list(w)[:0]})
    monkeypatch.setattr(parity, "to_plant", lambda *a: [nothing])
    monkeypatch.setattr(controls, "_changed", lambda side, change: side.changed(change))
    report = run("llama-2-7b", conversions("llama-2-7b"), originals("llama-2-7b"))
    control = of(report, "negative control")
    assert control.status == "undecided" and "no effect on these prompts" in control.message


# --- the outside judge ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("variant", ["llama-2-7b", "qwen2-window", "opt-350m", "mixtral-a"])
def test_transformers_in_float64_is_judged_by_its_float32_parts(
    variant: str, originals: Written, conversions: Written
) -> None:
    report = run(
        variant, conversions(variant), originals(variant), compute_dtype="float64", against="transformers"
    )
    assert [f.message for f in report.findings if f.status in ("fail", "undecided")] == []
    judged = of(report, "logits", "transformers")
    assert judged.measured is not None and judged.bar is not None and judged.measured <= judged.bar <= 1e-10
    assert "float32" in judged.message


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_transformers_still_sees_a_wrong_matrix(
    dtype: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(conversions("llama-2-7b"), tmp_path / "broken"))
    _transposed(Folder(broken))
    report = run("llama-2-7b", broken, originals("llama-2-7b"), compute_dtype=dtype, against="transformers")
    assert of(report, "logits", "transformers").status == "fail" and report.exit_code == 1


@pytest.mark.usefixtures("few_prompts")
def test_what_the_judge_raises_is_no_difference(
    originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*args: object, **more: object) -> None:
        raise RuntimeError("Expected mat_a to be Float32,\nfound Double")

    import transformers

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", raises)
    found = run("llama-2-7b", conversions("llama-2-7b"), originals("llama-2-7b"), against="transformers")
    judged = of(found, "logits", "transformers")
    assert (found.exit_code, judged.status) == (2, "undecided")
    assert "RuntimeError: Expected mat_a to be Float32, found Double" in judged.message


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("error", [MemoryError("no room"), ImportError("needs accelerate")])
def test_a_judge_that_cannot_load_a_right_output_is_no_difference(
    error: Exception, originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*args: object) -> None:
        raise error

    monkeypatch.setattr(library, "load", raises)
    found = run("llama-2-7b", conversions("llama-2-7b"), originals("llama-2-7b"), against="transformers")
    assert (found.exit_code, of(found, "load", "transformers").status) == (2, "undecided")
    assert str(error) in of(found, "load", "transformers").message


def _other_width(folder: Path) -> None:
    _config(folder, intermediate_size=8)


def _unknown_act(folder: Path) -> None:
    _config(folder, hidden_act="no such thing")


def _config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("harm", [_other_width, _unknown_act])
def test_an_output_that_cannot_be_loaded_by_its_own_fault_fails(
    harm: Callable[[Path], None], originals: Written, conversions: Written, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(conversions("llama-2-7b"), tmp_path / "broken"))
    harm(broken)
    report = run("llama-2-7b", broken, originals("llama-2-7b"), levels=("bits",), against="transformers")
    assert of(report, "load", "transformers").status == "fail" and report.exit_code == 1


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("Some weights of M were not initialized from the model checkpoint: ['a']", "fail"),
        ("copying a param with shape (2, 3), the shape in current model is (3, 2)", "fail"),
        ("`rope_config_validation` is deprecated", "pass"),
        ("generation flags are not valid and may be ignored: temperature", "pass"),
    ],
)
def test_only_warnings_about_weights_fail(said: str, status: str) -> None:
    made = against_transformers._loading("5.0", {}, [said])
    assert made[0].status == status
    assert [f.status for f in made[1:]] == (["note"] if status == "pass" else [])


def test_large_numbers_are_over_the_absolute_cap_by_their_own_rounding() -> None:
    """Activations of four million in float64: what noise makes of them decides nothing, a mistake does."""
    from ckpt_tool.verify.measure import Distance, bar_for, cap_of

    noise = Distance(1.9e-9, 6e-29, 0, 4e6)
    bar = bar_for([noise], torch.float64)
    assert bar.max_delta == 1e-9 and cap_of("float64") == "the cap 1e-18 (or |delta| 1e-09) for float64"
    for worst, differs in (
        (Distance(4e-9, 3e-30, 8, 4e6), False),
        (Distance(3e-8, 3e-30, 8, 4e6), True),
        (Distance(4e-9, 1e-20, 8, 4e6), True),
    ):
        found = controls.Wider(0, "float64", ("one",), worst, bar)
        assert not found.holds and found.differs is differs


def test_a_wider_precision_is_never_a_narrower_one() -> None:
    from ckpt_tool.verify.measure import CAPS, wider

    for name in CAPS:
        assert all(
            torch.finfo(getattr(torch, w)).eps < torch.finfo(getattr(torch, name)).eps for w in wider(name)
        )
