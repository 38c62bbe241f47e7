"""Megatron's arguments are used, harmless, or refused by name; stages of any length are read; a conversion is
not judged by the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ckpt_tool import api
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.cli import cli
from ckpt_tool.convert.families import Family, family
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.errors import CkptToolError, Problem
from ckpt_tool.fixtures.variants import VARIANTS

Written = Callable[[str], Path]
CASES = Path(__file__).parents[2] / "shared" / "cases"
LINEAR = 'rope_scaling={"rope_type":"linear","factor":4.0}'


def case(*names: str) -> Path:
    folder = CASES.joinpath(*names)
    if not folder.exists():
        pytest.skip("the cases are not beside this checkout")
    return folder


def said(*arguments: object) -> tuple[int, str]:
    """Exit code, and the screen or the problems with their hints as one line."""
    done = CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)
    if isinstance(done.exception, CkptToolError):
        told = [f"{p.kind}: {p.line()} hint: {p.hint}" for p in done.exception.problems]
        return 2, " ".join(" ".join(told).split())
    if done.exception is not None:
        raise done.exception
    return done.return_value or 0, " ".join(done.output.split())


# --- a conversion is not judged by the way back ---------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama-2-7b", "llama-3.1-8b"])
def test_what_the_original_cannot_say_is_a_note(variant: str, originals: Written, tmp_path: Path) -> None:
    source, out = originals(variant), tmp_path / "out"
    code, text = said("convert", "llama", "--in", source, "--out", out, "--set", LINEAR)
    assert code == 0, text
    assert "note `--to original` is not possible: expected rope_type llama3" in text
    assert "coverage every source and target tensor accounted for" in text
    for how in (("--source", source), ("--no-source",)):
        code, text = said("verify", out, *how, "--level", "coverage", "--level", "bits")
        assert code == 0 if "--source" in how else 2, text
        assert "`--to original` is not possible" in text
    code, text = said("convert", "llama", "--to", "original", "--in", out, "--out", tmp_path / "back")
    assert code == 2 and "unsupported" in text and "rope_scaling" in text
    assert not (tmp_path / "back").exists()


FIRST = {v.family: id for id, v in reversed(VARIANTS.items())}


@pytest.mark.parametrize("variant", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize(
    "problem",
    [
        Problem("unsupported", "expected a value that the original has a word for, found another"),
        Problem("config-mismatch", "expected 3 to divide by 2, found a rest", where="--pipeline-parallel"),
    ],
    ids=["no word", "no share"],
)
def test_no_family_is_judged_by_the_way_back(
    variant: str, problem: Problem, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(checkpoint: Checkpoint, options: Options) -> Plan:
        raise CkptToolError(problem)

    def no_way_back(name: str) -> Family:
        return replace(family(name), plan_original=refuse)

    monkeypatch.setattr("ckpt_tool.verify.subject.family", no_way_back)
    report = api.verify(conversions(variant), levels=("coverage",), no_source=True)
    assert report.status == "pass", report.to_json()
    (note,) = (f for f in report.findings if f.check == "way back")
    assert note.status == "note" and problem.message in note.message
    (tensors,) = (f for f in report.findings if f.check == "target tensors")
    assert tensors.status == "pass" and tensors.message.endswith("are those of the manifest")


def test_tensors_are_still_accounted_for_without_a_way_back(originals: Written, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    out = tmp_path / "out"
    assert not said("convert", "llama", "--in", originals("llama-1-7b"), "--out", out, "--set", LINEAR)[0]
    weights: dict[str, Any] = load_file(out / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    code, text = said("verify", out, "--no-source", "--level", "coverage")
    assert code == 1 and "model.norm.weight: expected this tensor of the manifest, found none" in text
    (out / "ckpt-tool.json").unlink()
    code, text = said("verify", out, "--no-source", "--level", "coverage")
    assert code == 2 and "neither a plan of the way back nor a manifest" in text


def test_published_ids_that_are_no_words_are_not_written(tmp_path: Path) -> None:
    folder = case("checklist_says_otherwise", "intact")
    code, text = said("convert", "llama", "--in", folder, "--out", tmp_path / "out")
    assert code == 0 and "coverage every source and target tensor accounted for" in text, text
    assert '"eos_token_id": null' in (tmp_path / "out" / "config.json").read_text()
