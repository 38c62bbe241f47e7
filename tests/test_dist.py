"""Training clusters: experts as megatron-core loads them, what args do not say, folders of torch.distributed
with other than Megatron's names, parity by several processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from ckpt_tool import api
from ckpt_tool.convert.shares import Worker
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import effort
from ckpt_tool.verify.report import Report
from tests.conftest import Written
from tests.test_dcp import refused

FILE = "model_optim_rng.pt"


# --- experts --------------------------------------------------------------------------------------------


def test_experts_are_kept_as_asked_for(conversions: Written, tmp_path: Path) -> None:
    """Whatever the original had; each rank counts its own from 0, and both ways read as one model."""
    there = conversions("mixtral-mcore")
    for kept, name in (
        ("grouped", "decoder.layers.2.mlp.experts.linear_fc1.weight{e}"),
        ("sequential", "decoder.layers.2.mlp.experts.local_experts.{e}.linear_fc1.weight"),
    ):
        asked = {"form": "mcore", "tensor_parallel": 1, "expert_parallel": 4, "experts": kept}
        out = tmp_path / kept
        api.convert(there, out, to="original", options=api.Options(family_options=asked))
        files = sorted(out.rglob(FILE))
        assert [f.parent.name for f in files] == [f"mp_rank_00_{e:03d}" for e in range(4)]
        for file in files:
            held = torch.load(file, weights_only=False)
            own = {n for n in held["model"] if "layers.2.mlp.experts" in n and "linear_fc1" in n}
            assert own == {name.format(e=e) for e in range(2)}
            assert held["args"].moe_grouped_gemm is (kept == "grouped")
        api.convert(out, tmp_path / f"{kept}-again")
        again = tmp_path / f"{kept}-again" / "model.safetensors"
        assert again.read_bytes() == (there / "model.safetensors").read_bytes()
    asked = {"form": "torch_dist", "experts": "grouped"}  # where both are called alike
    error = refused(lambda: api.plan(there, to="original", options=api.Options(family_options=asked)))
    assert error.kind == "usage" and error.problems[0].where == "--experts"


def test_what_trains_a_router_is_told_of(conversions: Written, tmp_path: Path) -> None:
    there = Path(shutil.copytree(conversions("mixtral-a"), tmp_path / "hf"))
    config = json.loads((there / "config.json").read_text())
    lost = {"output_router_logits": True, "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.1}
    for said, told in ((lost, True), ({}, False)):
        (there / "config.json").write_text(json.dumps(config | said))
        made = api.plan(there, to="original", options=api.Options(family_options={"form": "torch_dist"}))
        notes = [n for n in made.notes if "router" in n]
        assert bool(notes) == told
    asked = {n: f"--set {n}={json.dumps(v)}" for n, v in lost.items()}
    (there / "config.json").write_text(json.dumps(config | lost))
    options = api.Options(family_options={"form": "torch_dist"})
    made = api.convert(there, tmp_path / "out", to="original", options=options).plan
    assert all(any(words in note for note in made.notes) for words in asked.values())
    again = api.plan(tmp_path / "out", family="mixtral", options=api.Options(settings=lost))
    assert {n: again.config[n].value for n in lost} == lost
    assert not lost.keys() & api.plan(tmp_path / "out", family="mixtral").config.keys()


# --- folders of other trainers --------------------------------------------------------------------------


def beside(model: Path, folder: Path) -> Path:
    """The documents of a converted model, without the manifest."""
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "ckpt-tool.json":
            shutil.copy(file, folder)
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("variant", ["llama-3-8b"])
def test_folders_with_names_of_hugging_face_convert_in_one_step(
    variant: str, conversions: Written, tmp_path: Path
) -> None:
    """Of families whose originals have other names: as torch.distributed and as DeepSpeed keep them."""
    model = conversions(variant)
    state = load_file(model / "model.safetensors")
    trees: dict[str, Any] = {
        "plain": dict(state),
        "trainer": {"model": {f"_orig_mod.{n}": x for n, x in state.items()}, "optim": {"step": 3}},
    }
    for name, tree in trees.items():
        (tmp_path / name).mkdir()
        dcp.save(tree, checkpoint_id=str(beside(model, tmp_path / name)), no_dist=True)
    engine = tmp_path / "deepspeed" / "global_step5"
    engine.mkdir(parents=True)
    held = {"module": {f"module.{n}": x for n, x in state.items()}, "ds_version": "0.19", "global_steps": 5}
    torch.save(held, engine / "mp_rank_00_model_states.pt")
    (beside(model, engine.parent) / "latest").write_text("global_step5")
    for name, prefix in (("plain", ""), ("trainer", "model._orig_mod."), ("deepspeed", "module.module.")):
        made = api.convert(tmp_path / name, tmp_path / f"{name}-out")
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / f"{name}-out" / file).read_bytes() == (model / file).read_bytes(), name
        notes = " ".join(made.plan.notes + made.opened)
        assert ("names were read without" in notes and f"`{prefix}`" in notes) == bool(prefix)
    report = api.verify(tmp_path / "trainer-out", tmp_path / "trainer")
    assert (report.status, report.exactness) == ("pass", "bit-identical")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_documents_of_a_run_are_found_from_any_of_its_folders(conversions: Written, tmp_path: Path) -> None:
    """As a trainer leaves FSDP's shards: config.json beside the folder of the weights, or one further out."""
    model = conversions("llama-3-8b")
    for place in ("checkpoint-500", "."):
        run = tmp_path / f"run-{len(place)}"
        weights = run / "checkpoint-500" / "pytorch_model_fsdp_0"
        weights.mkdir(parents=True)
        dcp.save(dict(load_file(model / "model.safetensors")), checkpoint_id=str(weights), no_dist=True)
        beside(model, run / place)
        for given in (weights, weights.parent, run):
            out = tmp_path / "out"
            made = api.convert(given, out)
            for file in ("model.safetensors", "config.json", "tokenizer.json"):
                assert (out / file).read_bytes() == (model / file).read_bytes(), (place, given)
            holder = run / place
            told = [n for n in made.opened if "config.json" in n]
            above = f"taken from {holder.resolve().name}, above the weights"
            assert [n.partition(": ")[2] for n in told] == (
                [above] if holder.resolve() in given.parents else []
            )
            shutil.rmtree(out)


# --- parity by several processes ------------------------------------------------------------------------


def said(report: Report) -> dict[str, Any]:
    """All of a report but for times and who made it."""
    made = report.to_json()
    facts = {k: v for k, v in made["facts"].items() if k not in ("seconds", "workers")}
    return {**made, "facts": facts, "seconds": None}


def shared(out: Path, source: Path, count: int, settings: Any, **more: Any) -> Report:
    for k in range(1, count + 1):
        api.verify_part(out, source, Worker(k, count), settings=settings, **more)
    report = api.verify(out, source, settings=settings, joined=True, **more)
    assert "prompts" in report.facts["workers"] and not [*out.parent.glob(f".{out.name}.*")]
    return report


@pytest.mark.parametrize(
    ("variant", "costly"), [("mixtral-mcore", False), ("mistral-7b-v0.1", True), ("bert-v1-bare", False)]
)
def test_parity_by_workers_is_the_report_of_one(
    variant: str,
    costly: bool,
    originals: Written,
    conversions: Written,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By prompts, by phases where prompts are long for the model, or, with several heads, by who joins."""
    if costly:
        monkeypatch.setattr(effort, "AFFORDABLE", 1e6)
    out = Path(shutil.copytree(conversions(variant), tmp_path / "out"))
    source, settings = originals(variant), VARIANTS[variant].settings
    asked: dict[str, Any] = {"levels": ["parity"], **({} if costly else {"mode": "quick"})}
    right = api.verify(out, source, settings=settings, **asked)
    found = shared(out, source, 3, settings, **asked)
    assert right.status == "pass" and said(found) == said(right)
    if variant != "mixtral-mcore":
        return
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3000:-1000] = bytes(2000)
    file.write_bytes(data)
    wrong = api.verify(out, source, **asked)
    assert wrong.status == "fail" and said(shared(out, source, 2, {}, **asked)) == said(wrong)


def test_parity_by_workers_counts_only_what_was_asked_alike(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(conversions("mixtral-c"), tmp_path / "out"))
    source, asked = originals("mixtral-c"), {"levels": ["parity"], "mode": "quick"}

    def joined(**more: Any) -> Report:
        return api.verify(out, source, **{**asked, "joined": True, **more})

    first = api.verify_part(out, source, Worker(1, 2), **asked)
    assert first.prompts and first.missing == (2,) and not first.scans
    error = refused(lambda: api.verify_part(out, source, Worker(2, 2), **asked, memory=10**8))
    assert error.kind == "usage" and "expected at least" in error.text()
    error = refused(joined)
    assert (error.kind, error.problems[0].hint) == ("missing-parts", "run again: --worker 2/2")
    second = api.verify_part(out, source, Worker(2, 2), **asked)
    assert second.prompts and second.missing == ()
    for other in ({"compute_dtype": "float64"}, {"mode": "thorough"}, {"prompts": [[1, 2, 3]]}):
        error = refused(lambda other=other: joined(**other))
        assert error.kind == "resume-mismatch" and "--worker 1/2" in (error.problems[0].hint or "")
    inputs = tmp_path / ".out.ckpt-tool-verify-of-2.2.inputs"
    inputs.write_bytes(inputs.read_bytes()[:-1] + b"\x7f")
    error = refused(joined)
    assert error.kind == "resume-mismatch" and "nothing that can be read" in error.text()
    assert api.verify_part(out, source, Worker(2, 2), **asked).prompts == second.prompts
    assert said(joined()) == said(api.verify(out, source, **asked))
