"""A difference that config.json cannot avoid: named by the plan, exact but for that, inside its bound, and
passed only when it is accepted by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ckpt_tool import api
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.families import family
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families.megatron_bert import TWO_GELUS
from ckpt_tool.fixtures.flaws import Folder
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.reference import hf_megatron_bert
from ckpt_tool.verify import verify
from ckpt_tool.verify.report import Finding, Report

NAME = "megatron-bert-two-gelus"
Written = Callable[[str], Path]


def of(report: Report, check: str, level: str = "parity") -> Finding:
    (found,) = (f for f in report.level(level) if f.check == check)
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A BERT with two gelus, and its conversion."""
    root = tmp_path_factory.mktemp("foretold")
    source = TWO_GELUS.write(root / "in")
    api.convert(source, root / "out", family=TWO_GELUS.family, check=False)
    return source, root / "out"


def test_the_plan_and_the_manifest_name_it(pair: tuple[Path, Path]) -> None:
    source, out = pair
    with open_checkpoint(source) as checkpoint:
        made = family("megatron-bert").plan(checkpoint, Options())
    (known,) = made.foretold
    assert (known.name, dict(known.values), known.where) == (NAME, {"hidden_act": "gelu"}, ("head",))
    assert made.to_json()["foretold"] == [known.to_json()]
    assert json.loads((out / "ckpt-tool.json").read_text())["foretold"] == [known.to_json()]
    assert NAME in family("megatron-bert").foretold


def test_a_plan_without_one_has_no_word_of_it(originals: Written) -> None:
    """The digests of all other plans are what they were."""
    with open_checkpoint(originals("bert-v2-tp2"), prefer="original") as checkpoint:
        variant = VARIANTS["bert-v2-tp2"]
        made = family("megatron-bert").plan(checkpoint, Options(settings=variant.settings))
    assert made.foretold == () and "foretold" not in made.to_json()


@pytest.mark.usefixtures("few_prompts")
def test_it_fails_until_it_is_accepted(pair: tuple[Path, Path]) -> None:
    source, out = pair
    report = verify(out, source)
    assert (report.exit_code, report.exactness) == (1, "differs")
    assert [(f.level, f.check) for f in report.findings if f.status == "fail"] == [("parity", "foretold")]
    found = of(report, "foretold")
    assert f"--accept {NAME}" in found.message and "differs as foretold" in report.headline
    assert found.measured is not None and found.bar is not None
    assert 1e-4 < found.measured < found.bar < 0.1
    assert of(report, "lockstep").status == "pass" and NAME in of(report, "lockstep").message


def test_accepted_it_passes_in_its_own_class(pair: tuple[Path, Path]) -> None:
    source, out = pair
    report = verify(out, source, accept=[NAME], against="transformers")
    assert [(f.check, f.message) for f in report.findings if f.status == "fail"] == []
    assert (report.exit_code, report.exactness) == (0, "within the foretold difference")
    assert of(report, "negative control").measured == 1.0
    judged = of(report, "foretold", "transformers")
    assert judged.status == "pass" and judged.data["foretold"] == NAME


@pytest.mark.usefixtures("few_prompts")
def test_mistakes_in_the_accepted_head_are_caught_at_the_ordinary_bar(pair: tuple[Path, Path]) -> None:
    source, out = pair
    report = verify(out, source, accept=[NAME], levels=("parity",))
    (table,) = of(report, "negative control").tables
    heads = [row for row in table.rows if row[0] == "head"]
    assert {row[3] for row in heads} == {"yes"}
    assert any("hidden_act gelu_new where it is gelu" in str(row[1]) for row in heads)


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("cls.predictions.transform.LayerNorm.weight", 1.001),
        ("cls.predictions.transform.dense.bias", 1.01),
        ("cls.predictions.bias", 1.001),
    ],
)
def test_a_mistake_hidden_behind_it_still_fails(
    pair: tuple[Path, Path], tmp_path: Path, tensor: str, value: float
) -> None:
    """Inside the bound and accepted, but not all that differs."""
    source, out = pair
    broken = Folder(Path(shutil.copytree(out, tmp_path / "broken")))
    info = broken.info(tensor)
    bits = torch.from_numpy(broken.get(tensor).copy().view("<i2" if info.dtype == "F16" else "<i4"))
    held = bits.view(torch.float16 if info.dtype == "F16" else torch.float32)
    held *= value
    broken.set(tensor, bits.numpy())
    broken.checkpoint.close()
    report = verify(tmp_path / "broken", source, levels=("parity",), accept=[NAME])
    assert report.exit_code == 1
    assert of(report, "lockstep").status == "fail" and of(report, "lockstep").data["first"] == "head"
    assert of(report, "foretold").status == "note"


@pytest.mark.usefixtures("few_prompts")
def test_the_other_gelu_in_config_json_is_not_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """With erf for both the layers differ, and that is not foretold."""
    source, out = pair
    wrong = Path(shutil.copytree(out, tmp_path / "wrong"))
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    report = verify(wrong, source, levels=("parity",), accept=[NAME])
    assert report.exit_code == 1 and of(report, "lockstep").data["first"] == "layer 0"


@pytest.mark.usefixtures("few_prompts")
def test_the_way_back_foretells_it_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = pair
    made = api.convert(out, tmp_path / "back", to="original", check=False)
    assert [f.name for f in made.plan.foretold] == [NAME]
    assert verify(tmp_path / "back", out).exit_code == 1
    assert verify(tmp_path / "back", out, accept=[NAME]).exit_code == 0


def test_a_name_that_nothing_has_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(CkptToolError, match=f"{NAME}.*found 'two-gelus'"):
        verify(pair[1], pair[0], accept=["two-gelus"])


def test_a_name_that_is_not_needed_is_a_note(originals: Written, conversions: Written) -> None:
    variant = "bert-v2-tp2"
    settings = VARIANTS[variant].settings
    report = verify(
        conversions(variant), originals(variant), settings=settings, accept=[NAME], levels=("bits",)
    )
    assert report.exit_code == 0 and of(report, "accept", "coverage").status == "note"


# --- the bound ------------------------------------------------------------------------------------------


def test_the_two_gelus_are_nowhere_further_apart() -> None:
    x = torch.linspace(-30, 30, 2_000_001, dtype=torch.float64)
    gap = float((F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max())
    assert 4.732e-4 < gap < hf_megatron_bert.GELU_GAP < gap * 1.01


@pytest.mark.parametrize("width", [4, 48, 1024])
def test_the_bound_holds_for_any_head(width: int) -> None:
    """Also where the norm divides by little, and it is not so wide that everything passes."""
    torch.manual_seed(width)
    said = {"num_hidden_layers": 0, "num_attention_heads": 1, "layer_norm_eps": 1e-5}
    config, other = (
        hf_megatron_bert.Config.from_hf({**said, "hidden_act": name}) for name in ("gelu_new", "gelu")
    )
    largest = 0.0
    for scale in (0.02, 0.2, 2.0):
        shapes = {
            "bert.encoder.ln.weight": (width,),
            "bert.encoder.ln.bias": (width,),
            "cls.predictions.transform.dense.weight": (width, width),
            "cls.predictions.transform.dense.bias": (width,),
            "cls.predictions.transform.LayerNorm.weight": (width,),
            "cls.predictions.transform.LayerNorm.bias": (width,),
            "cls.predictions.bias": (70,),
            "bert.embeddings.word_embeddings.weight": (70, width),
        }
        w = {name: torch.randn(shape, dtype=torch.float64) * scale for name, shape in shapes.items()}
        x = torch.randn(3, 50, width, dtype=torch.float64)
        one = hf_megatron_bert.head(x, [w], config)
        two = hf_megatron_bert.head(x, [w], other)
        used = (one - two).abs() / hf_megatron_bert.gelu_bound(x, [w], config)
        assert bool((used <= 1).all())
        largest = max(largest, float(used.max()))
    assert largest > 0.02
