"""Training clusters: experts as megatron-core loads them, what args do not say, folders of torch.distributed
with other than Megatron's names, parity by several processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ckpt_tool import api
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
