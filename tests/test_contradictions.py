"""A config.json that says one number twice and differently is refused with both values, unless the user says
which; where both say the same it converts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import api
from ckpt_tool.convert import facts
from ckpt_tool.convert.facts import classes, ranges
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS

Written = Callable[[str], Path]
# A variant of each family whose config.json has a rotary base, with the direction in which it is read.
ROTARY = {
    "mistral-7b-v0.1": "original",
    "mixtral-c": "original",
    "llama-3.1-8b": "original",
    "qwen2-0.5b": "hf",
    "qwen3-0.6b": "hf",
    "gemma-2-2b": "hf",
    "pythia-410m": "hf",
}


@pytest.fixture
def edited(originals: Written, conversions: Written, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the variant in the Hugging Face layout with these keys of config.json changed."""

    def made(variant: str, change: Callable[[dict[str, Any]], None]) -> Path:
        source = conversions(variant) if ROTARY[variant] == "original" else originals(variant)
        folder = tmp_path / "in"
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return made


def theta_key(config: dict[str, Any]) -> str:
    return classes()[config["model_type"]].aliases.get("rope_theta", ("rope_theta",))[0]


def twice(by: float) -> Callable[[dict[str, Any]], None]:
    """The base in `rope_parameters` too, `by` times as large."""

    def change(config: dict[str, Any]) -> None:
        scaling = config.get("rope_scaling") or {"rope_type": "default"}
        config["rope_parameters"] = {**scaling, "rope_theta": by * config[theta_key(config)]}

    return change


@pytest.mark.parametrize("variant", ROTARY)
def test_two_rotary_bases_are_refused_with_both(
    variant: str, edited: Callable[..., Path], tmp_path: Path
) -> None:
    folder, to = edited(variant, twice(25.0)), ROTARY[variant]
    theta = json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"]
    with pytest.raises(CkptToolError) as caught:
        api.convert(folder, tmp_path / "out", to=to)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.file, problem.where) == ("bad-config", "config.json", "rope_theta")
    assert f"rope_parameters.rope_theta {theta:g}" in problem.message.replace(".0 ", " ") or str(
        int(theta)
    ) in (problem.message)
    assert problem.hint == "--set rope_theta=VALUE says which"
    assert not (tmp_path / "out").exists()
    made = api.convert(folder, tmp_path / "out", to=to, options=api.Options(settings={"rope_theta": theta}))
    assert theta in [v.value for v in made.plan.config.values()]


@pytest.mark.parametrize("variant", ROTARY)
def test_the_same_base_twice_converts(variant: str, edited: Callable[..., Path], tmp_path: Path) -> None:
    made = api.convert(edited(variant, twice(1.0)), tmp_path / "out", to=ROTARY[variant])
    assert made.plan.steps


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("said", [{"rope_type": "linear", "factor": 2.0}, None], ids=["another", "none"])
@pytest.mark.parametrize("variant", [v for v, way in ROTARY.items() if way == "hf"])
def test_the_user_s_scaling_goes_before_that_of_either_object(
    variant: str, said: Any, originals: Written
) -> None:
    """Both objects in one file, of which the newer one hid the user's word from the original's reading."""
    pytest.importorskip("torch")
    from ckpt_tool import reference

    folder = originals(variant)
    with api.open_checkpoint(folder) as opened:
        shapes = {t.name: t.shape for t in opened}
    config = json.loads((folder / "config.json").read_text())
    base = config.pop(theta_key(config), 1e4)
    read = reference.original(VARIANTS[variant].family).Config.from_original
    asked = {"rope_scaling": said}
    alone = read({**config, theta_key(config): base}, shapes, 1, asked)
    for newer in ({"rope_type": "default"}, LINEAR):
        both = {**config, "rope_scaling": LINEAR, "rope_parameters": {**newer, "rope_theta": base}}
        assert read(both, shapes, 1, asked) == alone
    assert (alone.rope_scaling is None) == (said is None)


def test_a_window_that_every_release_needs_is_no_null(edited: Callable[..., Path], tmp_path: Path) -> None:
    """Gemma 2's class makes the mask of its window even where no layer slides, and stops at null."""
    folder = edited("gemma-2-2b", lambda config: config.update(sliding_window=None))
    with pytest.raises(CkptToolError) as caught:
        api.convert(folder, tmp_path / "out")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.hint) == ("bad-config", "--set sliding_window=VALUE")
    plan = api.plan(folder, options=api.Options(settings={"sliding_window": 16}))
    assert plan.config["sliding_window"].value == 16


def test_layers_that_are_counted_twice_are_refused(edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited("qwen3-0.6b", lambda config: config.update(layer_types=["full_attention"] * 3))
    with pytest.raises(CkptToolError) as caught:
        api.convert(folder, tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.kind == "bad-config" and "num_hidden_layers 4" in problem.message
    assert "layer_types 3 kinds" in problem.message and "--set layer_types=" in str(problem.hint)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [({"layer_types": None}, [1, 2, 3]), ({"max_window_layers": 2}, [2, 3])],
)
def test_two_lists_of_windows_lead_out_either_way(
    settings: dict[str, Any], layers: list[int], edited: Callable[..., Path], tmp_path: Path
) -> None:
    """A list of the user's own would contradict the number as the file's does."""
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 2
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": kinds}
    folder = edited("qwen3-0.6b", lambda config: config.update(window))
    with pytest.raises(CkptToolError) as caught:
        api.plan(folder)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("bad-config", "layers with a window")
    told = ("--set layer_types=null takes max_window_layers", "; --set max_window_layers=VALUE")
    assert all(text in str(problem.hint) for text in told)
    made = {k: v.value for k, v in api.plan(folder, options=api.Options(settings=settings)).config.items()}
    found = facts.read(made, "qwen3").numbers["layers with a window"]
    assert found.value == ranges(layers)


def test_the_dtype_is_the_tensors_own(edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited("qwen3-0.6b", lambda config: config.update(dtype="float16", torch_dtype="float32"))
    made = api.convert(folder, tmp_path / "out")
    assert made.plan.config["torch_dtype"].value == "bfloat16"
