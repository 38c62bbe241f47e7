"""Mistral AI's originals of 2025-26: what params.json says of them and what config.json makes of it, both
ways; mistakes of others, which are caught and named; positions past the length of the training."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tool import api
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.recognising import recognise
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families.ministral3 import LENGTH, ministral3
from ckpt_tool.verify import verify
from ckpt_tool.verify.sides import converted_side, original_side
from ckpt_tool.verify.subject import opened
from tests import world

pytestmark = pytest.mark.usefixtures("one_thread")

Written = Callable[[str], Path]
VARIANT = "ministral3-3b"
CASES = Path(__file__).parents[2] / "shared" / "cases"
BETA = "llama_4_scaling_beta"


def small(folder: Path, **told: Any) -> Path:
    """An original of two layers."""
    made = ministral3(40, 2, 12, 56, 4, 2, 320, theta=3e4, longest=1024, length=64, betas=(4, 1), **told)
    return made.write(folder, "small")


def altered(source: Path, folder: Path, **values: Any) -> Path:
    """A copy of the original with other values in params.json; None takes one out, `__` goes inwards."""
    shutil.copytree(source, folder)
    params = json.loads((folder / "params.json").read_text())
    for name, value in values.items():
        *outer, last = name.split("__")
        place = params
        for key in outer:
            place = place[key]
        place.pop(last, None)
        if value is not None:
            place[last] = value
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def document(folder: Path, name: str = "config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def changed(folder: Path, **rotary: Any) -> None:
    """Other values among the rotary ones of config.json; None takes one out."""
    config = document(folder)
    made = {**config["rope_parameters"], **rotary}
    config["rope_parameters"] = {k: v for k, v in made.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))


# --- params.json ----------------------------------------------------------------------------------------

REFUSED = {
    "apply_scale is not told": ({"yarn__apply_scale": None}, "missing-fact", "readers disagree"),
    "apply_scale is no flag": ({"yarn__apply_scale": 1}, "bad-config", "expected true or false, found 1"),
    "two lengths": ({"llama_4_scaling__original_max_position_embeddings": 32}, "unsupported", "expected 64"),
    "no length of texts": ({"max_position_embeddings": None}, "missing-fact", "how long texts may be"),
    "beta is text": ({"llama_4_scaling__beta": "a"}, "bad-config", "llama_4_scaling.beta"),
    "a factor that is not there": ({"yarn__factor": None}, "missing-fact", "yarn.factor"),
    "yarn not in whole channels": ({"yarn__truncate": False}, "unsupported", "expected true, found false"),
    "an unknown value of yarn": ({"yarn__gamma": 3}, "unsupported", "yarn.gamma"),
    "windows that differ": ({"sliding_window": [8, None]}, "unsupported", "one window for all layers"),
    "experts": ({"moe": {"num_experts": 4, "num_experts_per_tok": 2}}, "unsupported", "moe"),
    "latent attention": ({"q_lora_rank": 8}, "unsupported", "q_lora_rank"),
    "a draft of another": ({"is_eagle": True}, "unsupported", "is_eagle"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_params_that_leave_a_question_are_refused(name: str, originals: Written, tmp_path: Path) -> None:
    values, kind, said = REFUSED[name]
    source = altered(originals(VARIANT), tmp_path / "in", **values)
    with pytest.raises(CkptToolError) as caught:
        api.convert(source, tmp_path / "out", family="ministral3")
    assert caught.value.problems[0].kind == kind
    assert said in caught.value.text()
    assert not (tmp_path / "out").exists()


def test_what_was_asked_can_be_told(originals: Written, tmp_path: Path) -> None:
    source = altered(
        originals(VARIANT), tmp_path / "in", yarn__apply_scale=None, max_position_embeddings=None
    )
    told = api.Options(settings={"apply_scale": True, "max_position_embeddings": 2048})
    plan = api.convert(source, tmp_path / "out", options=told, check=False).plan
    assert plan.config["max_position_embeddings"].value == 2048
    rotary = plan.config["rope_parameters"].value
    assert (rotary["mscale"], rotary["mscale_all_dim"]) == (1.0, 0.0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("growth", [None, 0.25])
def test_params_come_back_from_config_alone(scaled: bool, growth: float | None, tmp_path: Path) -> None:
    """Without the manifest, which has the original's own text."""
    source = small(tmp_path / "in", scaled=scaled, growth=growth)
    api.convert(source, tmp_path / "hf", check=False)
    (tmp_path / "hf" / "ckpt-tool.json").unlink()
    assert document(tmp_path / "hf")["rope_parameters"][BETA] == (growth or 0.0)
    api.convert(tmp_path / "hf", tmp_path / "back", to="original", family="ministral3", check=False)
    found, told = (document(folder, "params.json") for folder in (tmp_path / "back", source))
    assert found == {k: v for k, v in told.items() if v is not False or k != "tied_embeddings"}
    assert world.equal(world.tensors_of(tmp_path / "back"), world.tensors_of(source))


def test_the_window_may_be_text_or_a_list_of_one(tmp_path: Path, originals: Written) -> None:
    for k, value in enumerate(("48", [48], [48, 48])):
        source = altered(originals(VARIANT), tmp_path / f"in{k}", sliding_window=value)
        plan = api.plan(source, family="ministral3")
        assert plan.config["sliding_window"].value == 48


NOT_SAID = {
    "no growth is told": ({BETA: None}, "bad-config", BETA),
    "another attention factor": ({"attention_factor": 1.1}, "unsupported", "found 1.1"),
    "one scale of two": ({"mscale_all_dim": 0.5}, "unsupported", "expected an attention factor"),
    "not in whole channels": ({"truncate": False}, "unsupported", "truncate"),
    "another rotary": ({"rope_type": "linear"}, "unsupported", "expected rope_type yarn"),
    "beta below 0": ({BETA: -0.1}, "bad-config", BETA),
}


@pytest.mark.parametrize("name", NOT_SAID)
def test_what_params_cannot_say_is_refused(name: str, conversions: Written, tmp_path: Path) -> None:
    values, kind, said = NOT_SAID[name]
    folder = Path(shutil.copytree(conversions(VARIANT), tmp_path / "hf"))
    changed(folder, **values)
    with pytest.raises(CkptToolError) as caught:
        api.convert(folder, tmp_path / "out", to="original", family="ministral3")
    assert caught.value.problems[0].kind == kind
    assert said in caught.value.text()


def test_yarn_tells_the_family(originals: Written, tmp_path: Path) -> None:
    def owners(folder: Path) -> list[str]:
        return [name for name, own, _ in recognise(open_checkpoint(folder)) if own]

    assert owners(originals(VARIANT)) == ["ministral3"]
    plain = altered(originals(VARIANT), tmp_path / "in", yarn=None, llama_4_scaling=None)
    assert owners(plain) == ["mistral"]


def test_the_layout_is_chosen_by_the_names_of_files(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(originals(VARIANT), tmp_path / "in"))
    for file in ("model.safetensors", "config.json"):
        shutil.copyfile(conversions(VARIANT) / file, folder / file)
    made = api.convert(folder, tmp_path / "out", check=False)
    assert any("model.safetensors" in note for note in made.opened)
    out, wanted = (f / "model.safetensors" for f in (tmp_path / "out", conversions(VARIANT)))
    assert out.read_bytes() == wanted.read_bytes()


# --- what verification sees -----------------------------------------------------------------------------

MISTAKES: Mapping[str, tuple[dict[str, Any], str]] = {
    "the other apply_scale": ({"mscale_all_dim": 0.0}, "mscale_all_dim"),
    "queries do not grow": ({BETA: 0.0}, BETA),
    "yarn between channels": ({"truncate": False}, "truncate"),
    "another length": ({LENGTH: 128}, LENGTH),
}


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("two-layers")
    source = small(root / "in")
    api.convert(source, root / "hf", check=False)
    (root / "hf" / "ckpt-tool.json").unlink()
    return source, root / "hf"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_others_is_caught_and_named(
    name: str, two_layers: tuple[Path, Path], tmp_path: Path
) -> None:
    values, words = MISTAKES[name]
    source, right = two_layers
    folder = Path(shutil.copytree(right, tmp_path / "hf"))
    changed(folder, **values)
    report = verify(folder, source, levels="parity")
    assert report.exit_code == 1
    causes = [str(f.data["cause"]) for f in report.level("diagnosis") if f.data["cause"] is not None]
    assert causes and all(words in cause for cause in causes), causes


def test_no_growth_of_queries_shows_beyond_the_length_alone(
    two_layers: tuple[Path, Path], tmp_path: Path
) -> None:
    """Prompts of 600 tokens end before the 16,384 of the published models; one that begins there does not."""
    source, right = two_layers
    params = {"yarn__" + LENGTH: 16384, "llama_4_scaling__" + LENGTH: 16384}
    source = altered(source, tmp_path / "in", **params)
    folder = Path(shutil.copytree(right, tmp_path / "hf"))
    changed(folder, **{LENGTH: 16384, BETA: 0.0})
    report = verify(folder, source, levels="parity")
    assert report.exit_code == 1
    (found,) = (f for f in report.findings if f.check == "logits")
    assert "worst prompt far" in found.message
    notes = [f.message for f in report.findings if f.check == "unseen"]
    assert any("positions 49,132 to 49,171" in n for n in notes)


def test_the_case_of_2025_has_the_values_of_its_readme(tmp_path: Path) -> None:
    case = CASES / "mistral-2025-tiny"
    if not case.is_dir():
        pytest.skip("the cases are not beside this checkout")
    api.convert(case, tmp_path / "out", check=False)
    wanted, config = document(case, "hf_config.json"), document(tmp_path / "out")
    wanted["torch_dtype"] = wanted.pop("dtype")
    assert {k: config[k] for k in wanted} == wanted
    tensors = world.tensors_of(tmp_path / "out")
    digests = {n: [str(t.dtype).removeprefix("torch."), [*t.shape], digest(t)] for n, t in tensors.items()}
    assert digests == document(case, "hf_names.json")
    expected = load_file(case / "expected.safetensors")
    with opened(tmp_path / "out", case, {}) as subject:
        for side in (original_side, converted_side):
            logits = side(subject, torch.float32, "cpu").forward(expected["ids"][None])[0]
            assert (logits - expected["logits_float32"]).abs().max() < 1e-3  # of a deviation of 7.3


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
