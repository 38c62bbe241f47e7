"""Quantised folders as other tools write them: documents, names and files beside what the formats have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_tool.api import convert, plan, verify
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.quantised import Tensors, quantise, write

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
