"""BERT and GPT-2 of Megatron-Core in folders of torch.distributed, as its trainer saves them by default."""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from ckpt_tool import api
from tests.megatron_models import State, args, hf_state, megatron_files, tensors

FULL = {n: t.float() for n, t in tensors().items()}


def stacked(state: State) -> State:
    """One tensor for all layers of each kind."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        found.setdefault(re.sub(r"layers\.\d+\.", "layers.", name), []).append(tensor)
    return {n: torch.stack(ts) if ".layers." in n else ts[0] for n, ts in found.items()}


@pytest.mark.parametrize("layers", ["stacked", "numbered"])
@pytest.mark.parametrize("family", ["megatron-bert", "megatron-gpt2"])
def test_what_has_learned_positions_is_read_from_torch_dist(family: str, layers: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "run" / "iter_0000100", tmp_path / "out"
    ((held,),) = megatron_files(FULL, family, 3.0, "core-fused")
    state = {n.removeprefix("model."): t for n, t in held.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed
        dcp.save(stacked(state) if layers == "stacked" else state, checkpoint_id=folder, no_dist=True)
    said = {"args": Namespace(**args()), "checkpoint_version": 3.0, "iteration": 100}
    torch.save(said, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("100")
    done = api.convert(folder.parent, out, check=False)
    assert done.plan.family == family
    wanted = hf_state(FULL, family)
    made = load_file(out / "model.safetensors")
    assert made.keys() == wanted.keys() and all(torch.equal(made[n], t) for n, t in wanted.items())
    report = api.verify(out, folder.parent, mode="quick")
    assert (report.status, report.exactness) == ("pass", "bit-identical")
    assert any(f.check == "lockstep" and f.status == "pass" for f in report.findings)
