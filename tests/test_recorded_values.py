"""Values that a trusted run recorded, and those that are documented of published models: which there are, and
a model that has them, or cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ckpt_tool.api import verify
from ckpt_tool.verify.expectations import load_all, read_file
from ckpt_tool.verify.recording import record
from tests.in_process import program

Written = Callable[[str], Path]
VARIANT = "mistral-float32"
COMPUTED = ("documented",)


@pytest.fixture
def work(originals: Written, conversions: Written, tmp_path: Path) -> Path:
    (tmp_path / "source").symlink_to(originals(VARIANT))
    for name in ("model", "other"):
        shutil.copytree(conversions(VARIANT), tmp_path / name)
        (tmp_path / name / "ckpt-tool.json").unlink()
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.norm.weight"] *= 1.05
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_recorded_values_are_those_of_transformers(work: Path) -> None:
    (work / "gold.json").write_bytes(record(work / "model", "mine"))
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    seen = set()
    for e in read_file(work / "gold.json"):
        ids = torch.tensor(e.input_ids)
        with torch.inference_mode():
            made = model(ids, labels=ids)
        seen.add(e.expected.kind)
        if e.expected.kind == "logits_slice":
            part = made.logits[e.expected.index]
            torch.testing.assert_close(part, torch.tensor(e.expected.values), atol=1e-4, rtol=0)
        elif e.expected.kind == "logits_mean":
            torch.testing.assert_close(
                made.logits.mean(-1), torch.tensor(e.expected.values), atol=1e-4, rtol=0
            )
        elif e.expected.kind == "loss":
            assert made.loss.item() == pytest.approx(e.expected.values, abs=1e-4)
        else:
            asked = {k: v for k, v in (e.generate or {}).items() if k not in ("seed", "rules")}
            torch.manual_seed((e.generate or {}).get("seed", 0))
            new = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=0, return_dict_in_generate=True,
                output_scores=True, **asked,
            )  # fmt: skip
            if e.expected.kind == "token_ids":
                assert new.sequences.tolist() == e.expected.values
                continue
            beams = getattr(new, "beam_indices", None)
            scores = model.compute_transition_scores(
                new.sequences, new.scores, beams, normalize_logits=e.expected.more["normalize_logits"]
            )
            torch.testing.assert_close(scores, torch.tensor(e.expected.values), atol=1e-4, rtol=0)
    assert seen == {"logits_slice", "logits_mean", "loss", "token_ids", "transition_scores"}


def test_a_model_is_held_against_what_was_recorded_without_a_source(work: Path) -> None:
    done = program("verify", "model", "--source", "source", "--record", "gold.json", cwd=work)
    assert done.returncode == 0, done.stdout
    good = verify(work / "model", levels=COMPUTED, expectations=work / "gold.json")
    assert (good.status, good.exit_code) == ("pass", 0)
    assert "values that were asked for" in good.headline and "not compared with a source" in good.headline
    other = verify(work / "other", levels=COMPUTED, expectations=work / "gold.json")
    assert other.status == "fail" and "outside" in other.headline
    (work / "parity.toml").write_text(
        '[[check]]\nname = "a"\nout = "model"\nlevels = ["documented"]\nexpectations = "gold.json"\n'
        '[[check]]\nname = "b"\nout = "other"\nlevels = ["documented"]\nexpectations = "gold.json"\n'
    )
    done = program("gate", "parity.toml", "--json", cwd=work)
    assert [r["status"] for r in json.loads(done.stdout)["reports"]] == ["pass", "fail"]


def test_nothing_is_recorded_of_what_does_not_pass(work: Path) -> None:
    done = program("verify", "other", "--source", "source", "--record", "gold.json", cwd=work)
    assert done.returncode == 1 and not (work / "gold.json").exists()


@pytest.mark.parametrize("variant", ["bert-v2-tp2", "canine-s", "opt-125m"])
def test_of_other_heads(variant: str, conversions: Written, tmp_path: Path) -> None:
    from ckpt_tool.fixtures.variants import VARIANTS

    variant = variant if variant in VARIANTS else next(v for v in VARIANTS if v.startswith(variant[:3]))
    (tmp_path / "gold.json").write_bytes(record(conversions(variant), "mine"))
    kinds = {e.expected.kind for e in read_file(tmp_path / "gold.json")}
    assert kinds & {"logits_slice", "hidden_slice"}
    report = verify(
        conversions(variant), levels=COMPUTED, expectations=tmp_path / "gold.json", no_source=True
    )
    assert report.status == "pass", report.headline


def test_another_model_than_the_named_one_is_one_sentence(work: Path) -> None:
    report = verify(work / "model", levels=COMPUTED, checkpoint_id="mistralai/Mistral-7B-v0.1")
    failed = [f for f in report.findings if f.status == "fail"]
    assert len(failed) == 1 and "this is not mistralai/Mistral-7B-v0.1" in report.headline


@pytest.mark.parametrize(
    "content", ["", "[]", '{"schema_version": 9}', '{"schema_version": 1, "entries": [3]}']
)
def test_what_is_no_file_of_values(content: str, work: Path) -> None:
    (work / "gold.json").write_text(content)
    done = program("verify", "model", "--expectations", "gold.json", cwd=work)
    assert (done.returncode, done.stderr.split("]")[0]) == (2, "error[bad-expectations")


def _json(*arguments: str, cwd: Path) -> Any:
    done = program("expectations", *arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_documented_is_listed_and_shown(tmp_path: Path) -> None:
    rows = _json("list", cwd=tmp_path)
    assert sum(r["entries"] for r in rows) == len(load_all())
    shown = _json("show", "mistralai/Mistral-7B-v0.1", cwd=tmp_path)
    assert {"id", "values", "needs", "source"} <= shown[0].keys()
    screen = program("expectations", "show", "Mistral-7B-v0.1", cwd=tmp_path).stdout
    assert max(map(len, screen.splitlines())) <= 80 and "8 tokens" in screen
    done = program("expectations", "show", "mistralai/Mistral-7B-v0.2", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean mistralai/Mistral-7B-v0.1" in done.stderr


def test_what_is_documented_is_run(work: Path) -> None:
    done = program("expectations", "run", "model", "--checkpoint-id", "gpt2", "--json", cwd=work)
    assert done.returncode == 1 and "this is not gpt2" in json.loads(done.stdout)["headline"]
