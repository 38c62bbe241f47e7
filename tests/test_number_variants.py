"""Quantised folders as other tools write them: documents, names and files beside what the formats have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ckpt_tool.api import convert, plan, verify
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.quantised import Tensors, quantise, write
from ckpt_tool.verify import library
from ckpt_tool.verify.against_transformers import _rounded
from ckpt_tool.verify.subject import opened

Written = Callable[[str], Path]
LAYER = "model.layers.0.self_attn."


def changed(source: Path, change: Callable[[Tensors, dict[str, Any]], Tensors | None]) -> Path:
    """The folder with other tensors (dtype, bits by name) and config.json."""
    config = json.loads((source / "config.json").read_text())
    with open_checkpoint(source) as checkpoint:
        tensors: Tensors = {t.name: (t.dtype, checkpoint.read(t)) for t in checkpoint}
    write(source / "model.safetensors", change(tensors, config) or tensors)
    (source / "config.json").write_text(json.dumps(config))
    return source


def held(folder: Path) -> dict[str, bytes]:
    with open_checkpoint(folder) as checkpoint:
        return {t.name: checkpoint.read(t).tobytes() for t in checkpoint}


@pytest.mark.parametrize("name", ["fp8-blocks", "fp8-rows"])
@pytest.mark.parametrize("of", ["k_proj.k_scale v_proj.v_scale", "k_scale v_scale"])
def test_scales_of_caches_go_with_their_projections(
    of: str, name: str, conversions: Written, tmp_path: Path
) -> None:
    """As vLLM and llm-compressor call them; of a scale of an unknown kind nothing is guessed."""

    def with_caches(tensors: Tensors, config: dict[str, Any]) -> None:
        for k, end in enumerate(of.split()):
            tensors[LAYER + end] = "F32", np.float32(0.5 + k).reshape(1).view("<u4")

    source = changed(quantise(conversions("qwen3-float32"), tmp_path / "in", name), with_caches)
    convert(source, tmp_path / "out")
    assert held(tmp_path / "out") == held(source)
    assert verify(tmp_path / "out", source, levels=("coverage", "bits")).status == "pass"


@pytest.mark.parametrize("of", ["k_proj.k_scale v_proj.v_scale q_proj.output_scale", "k_scale v_scale"])
def test_scales_of_caches_that_plain_projections_fill_are_carried(
    of: str, conversions: Written, tmp_path: Path
) -> None:
    """Where only the feed-forwards are in codes; as numbers they are left out, and that is told. One that
    stands beside nothing, or is no scale, is refused by name."""
    plain: Tensors = {}
    with open_checkpoint(conversions("qwen3-float32")) as checkpoint:
        plain = {t.name: (t.dtype, checkpoint.read(t)) for t in checkpoint if t.name.startswith(LAYER)}

    def with_caches(tensors: Tensors, config: dict[str, Any]) -> Tensors:
        kept = {n: x for n, x in tensors.items() if not n.startswith(LAYER)}
        scales = {LAYER + e: ("F32", np.float32([0.5 + k]).view("<u4")) for k, e in enumerate(of.split())}
        return kept | plain | scales

    source = changed(quantise(conversions("qwen3-float32"), tmp_path / "in", "fp8-blocks"), with_caches)
    convert(source, tmp_path / "out")
    assert held(tmp_path / "out") == held(source)
    assert verify(tmp_path / "out", source, levels=("coverage", "bits")).status == "pass"
    convert(tmp_path / "out", tmp_path / "back", to="original")
    assert held(tmp_path / "back") == held(source)
    made = plan(source, options=Options(dequantize="BF16"))
    count = len({e.rpartition(".")[0] or e for e in of.split()})
    assert f"--dequantize: scales of the cached keys and values of {count} weights are left out" in made.lossy
    for odd, shape in (("nowhere.k_scale", (1,)), ("o_proj.k_scale", (2, 2))):

        def with_another(tensors: Tensors, _: dict[str, Any], odd: str = odd, shape: Any = shape) -> Tensors:
            return tensors | {LAYER + odd: ("F32", np.ones(shape, np.float32).view("<u4"))}

        again = tmp_path / odd.partition(".")[0]
        shutil.copytree(source, again)
        with pytest.raises(CkptToolError) as caught:
            plan(changed(again, with_another))
        (problem,) = caught.value.problems
        assert (problem.kind, problem.where) == ("uncovered-tensors", LAYER + odd)


def test_an_original_without_a_name_for_them_is_refused(conversions: Written, tmp_path: Path) -> None:
    def with_caches(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[f"{LAYER}k_scale"] = "F32", np.float32(0.5).reshape(1).view("<u4")

    source = changed(quantise(conversions("ministral3-3b"), tmp_path / "in", "fp8-tensor"), with_caches)
    with pytest.raises(CkptToolError) as caught:
        plan(source, to="original")
    assert f"--drop {LAYER}k_scale" in caught.value.problems[0].message


SAID = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}


def test_what_modelopt_says_beside_config_json_is_written_into_it(
    conversions: Written, tmp_path: Path
) -> None:
    """Carried without it, loaders would take the codes as numbers."""
    source = quantise(conversions("mistral-small"), tmp_path / "in", "modelopt")
    said = {**SAID, "quantization": {**SAID["quantization"], "exclude_modules": ["lm_head"]}}
    (source / "hf_quant_config.json").write_text(json.dumps(said))
    changed(source, lambda _, config: config.pop("quantization_config") and None)
    convert(source, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert made == {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ["lm_head"],
    }
    assert verify(tmp_path / "out", source, levels=("coverage", "bits")).status == "pass"


@pytest.mark.parametrize("variant", ["qwen3-float32", "mistral-float32"])
def test_codes_of_which_nothing_is_said_are_asked(variant: str, conversions: Written, tmp_path: Path) -> None:
    source = quantise(conversions(variant), tmp_path / "in", "fp8-rows")
    changed(source, lambda _, config: config.pop("quantization_config") and None)
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    problem = caught.value.problems[0]
    assert (problem.kind, problem.where) == ("missing-fact", "quantization_config")


def test_a_model_without_its_head_and_prefix_keeps_its_codes(conversions: Written, tmp_path: Path) -> None:
    """As embedding models are saved; its rows have the prefix, and its files have not."""

    def bare(tensors: Tensors, config: dict[str, Any]) -> Tensors:
        config["architectures"] = ["Qwen3Model"]
        return {n.removeprefix("model."): t for n, t in tensors.items() if not n.startswith("lm_head")}

    source = changed(quantise(conversions("qwen3-float32"), tmp_path / "in", "fp8-blocks"), bare)
    convert(source, tmp_path / "out")
    assert held(tmp_path / "out") == held(source)
    assert verify(tmp_path / "out", source, levels=("coverage", "bits")).status == "pass"


def test_a_model_that_reads_images_without_its_head_is_named(conversions: Written, tmp_path: Path) -> None:
    """The nearest of other families were named, which have nothing to do with it."""
    import shutil

    def bare(tensors: Tensors, config: dict[str, Any]) -> Tensors:
        config["architectures"] = ["Mistral3Model"]
        text = ("language_model.model.", "language_model.")
        return {n.replace(*text): t for n, t in tensors.items() if not n.endswith("lm_head.weight")}

    source = changed(Path(shutil.copytree(conversions("mistral3-images"), tmp_path / "in")), bare)
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    (problem,) = caught.value.problems
    assert problem.kind == "unknown-family"
    assert problem.message.startswith("expected Mistral3ForConditionalGeneration, found the model alone")
    assert "load it as Mistral3ForConditionalGeneration" in (problem.hint or "")


def test_what_makes_patches_of_images_is_carried_from_beside_an_original(
    originals: Written, tmp_path: Path
) -> None:
    import shutil

    source = Path(shutil.copytree(originals("mistral3-images"), tmp_path / "in"))
    made = plan(source)
    assert any("no processor_config.json and preprocessor_config.json are" in n for n in made.notes)
    (source / "preprocessor_config.json").write_text('{"patch_size": 14, "auto_map": {"x": "y.z"}}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    made = convert(source, tmp_path / "out", check=False).plan
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == {"patch_size": 14}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert any("no processor_config.json is written" in n for n in made.notes)


@pytest.mark.parametrize("inputs", [{"dynamic": True}, {"dynamic": False}])
def test_transformers_judges_weights_whose_inputs_it_would_round(
    inputs: dict[str, Any], conversions: Written, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compressed-tensors rounds inputs on every device; of that no reading of weights knows."""
    torch, own = pytest.importorskip("torch"), library.load
    folder = conversions("qwen3-float32")

    class Rounding(torch.nn.Linear):  # type: ignore[misc,name-defined]
        quantization_scheme = SimpleNamespace(input_activations=inputs)

        def forward(self, x: Any) -> Any:
            enabled = getattr(self, "quantization_enabled", True)
            return super().forward(x.bfloat16().float() if enabled else x)

    def load(*given: Any) -> tuple[Any, Any]:
        model, info = own(*given)
        for m in model.modules():
            if type(m) is torch.nn.Linear:
                m.__class__ = Rounding
        return model, {**info, library.INPUTS: library._inputs_as_they_are(model)}

    monkeypatch.setattr(library, "load", load)
    report = verify(folder, levels="coverage", against="transformers", mode="quick")
    found = {f.check: f for f in report.findings if f.level == "transformers"}
    assert found["logits"].status == "pass" and found["inputs"].status == "note"
    assert "left as they are" in found["inputs"].message


def test_experts_that_transformers_rounds_are_no_difference(conversions: Written, tmp_path: Path) -> None:
    """It stacks the numbers of int4 experts in the dtype of their scales, whatever dtype is asked."""
    torch = pytest.importorskip("torch")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    model = torch.nn.Module()
    parts = model
    for part in name.split(".")[:-1]:
        parts.add_module(part, torch.nn.Module())
        parts = parts.get_submodule(part)
    parts.register_parameter("gate_up_proj", torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))
    narrow = library._in_one_dtype(model, torch.float32)
    assert narrow == [name] and model.get_parameter(name).dtype == torch.float32
    source = quantise(conversions("mixtral-c"), tmp_path / "in", "int4")
    with opened(source, None) as subject:
        told = _rounded(subject, "5", {library.NARROW: narrow})
        assert told is not None and "bfloat16, the dtype of their scales" in told
        assert _rounded(subject, "5", {library.NARROW: ["model.norm.weight"]}) is None
    with opened(quantise(conversions("mixtral-c"), tmp_path / "wide", "fp8-rows"), None) as subject:
        assert _rounded(subject, "5", {library.NARROW: narrow}) is None  # scales in float32


def one_less(tensors: Tensors, config: dict[str, Any]) -> None:
    rows, columns = tensors[f"{LAYER}q_proj.weight_shape"][1].tolist()
    tensors[f"{LAYER}q_proj.weight_shape"] = "I64", np.array([rows, columns - 1], "<u8")


def two_of_the_whole(tensors: Tensors, config: dict[str, Any]) -> None:
    name = f"{LAYER}q_proj.weight_global_scale"
    tensors[name] = "F32", tensors[name][1].repeat(2)


def short_of_the_whole(tensors: Tensors, config: dict[str, Any]) -> None:
    name = f"{LAYER}q_proj.weight_global_scale"
    tensors[name] = "BF16", (tensors[name][1] >> 16).astype("<u2")


def divided_by_zero(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[f"{LAYER}q_proj.weight_global_scale"][1][...] = 0


def nothing_said(tensors: Tensors, config: dict[str, Any]) -> None:
    del config["quantization_config"]


@pytest.mark.parametrize(
    ("variant", "form", "change", "asked", "kind", "words"),
    [
        ("qwen3-float32", "int4", one_less, None, "shape-mismatch", "q_proj.weight_shape"),
        ("mistral-small", "nvfp4", two_of_the_whole, "BF16", "unsupported", "one number in F32"),
        ("mistral-small", "nvfp4", short_of_the_whole, None, "unsupported", "one number in F32"),
        ("mistral-small", "nvfp4", divided_by_zero, "BF16", "bad-scales", "that is zero"),
        ("llama-3-70b", "fp8-tensor", nothing_said, None, "missing-fact", "loaders know them"),
    ],
)
def test_what_is_no_weight_is_refused(
    variant: str,
    form: str,
    change: Callable[[Tensors, dict[str, Any]], None],
    asked: str | None,
    kind: str,
    words: str,
    conversions: Written,
    tmp_path: Path,
) -> None:
    """Also where the tensors alone would be carried."""
    source = changed(quantise(conversions(variant), tmp_path / "in", form), change)
    with pytest.raises(CkptToolError) as caught:
        convert(source, tmp_path / "out", options=Options(dequantize=asked))
    assert caught.value.problems[0].kind == kind and words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_none_are_no_matter_of_precision(
    conversions: Written, one_thread: None, tmp_path: Path
) -> None:
    def not_a_number(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[f"{LAYER}q_proj.scale"][1][0, 0] = 255

    source = changed(quantise(conversions("qwen3-float32"), tmp_path / "in", "fp8-powers"), not_a_number)
    convert(source, tmp_path / "out")
    report = verify(tmp_path / "out", source, levels="parity", mode="quick")
    (found,) = (f for f in report.findings if f.check == "lockstep")
    assert found.status == "undecided" and "not finite" in found.message
    assert "--compute-dtype" not in found.message


@pytest.mark.parametrize("variant", ["qwen3-float32", "llama-3-70b"])
def test_what_the_user_says_of_codes_is_written_and_read(
    variant: str, conversions: Written, few_prompts: None, tmp_path: Path
) -> None:
    """In an original that has this layout, and in a folder: parity was skipped, --set refused."""
    source = quantise(conversions(variant), tmp_path / "in", "fp8-blocks")
    asked = {"quantization_config": json.loads((source / "config.json").read_text())["quantization_config"]}
    changed(source, nothing_said)
    convert(source, tmp_path / "out", options=Options(settings=asked))
    assert json.loads((tmp_path / "out" / "config.json").read_text()).items() >= asked.items()
    report = verify(tmp_path / "out", source, settings=asked, mode="quick")
    assert report.status == "pass", report.headline
    assert ("parity", "lockstep", "pass") in {(f.level, f.check, f.status) for f in report.findings}
