"""Rotary frequencies that Megatron-Core 0.2 saved as a buffer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from tests.conftest import Written


@pytest.mark.parametrize("more", [0, 1])
def test_frequencies_of_core_are_left_out_where_they_fit(
    more: int, originals: Written, tmp_path: Path
) -> None:
    shutil.copytree(originals("llama-mcore"), tmp_path / "in")
    for file in (tmp_path / "in").rglob("*.pt"):
        tree = torch.load(file, weights_only=False)
        tree["model"]["rotary_pos_emb.inv_freq"] = torch.ones(tree["args"].kv_channels // 2 + more)
        torch.save(tree, file)
    options = api.Options(settings=VARIANTS["llama-mcore"].settings)
    if not more:
        dropped = api.plan(tmp_path / "in", family="llama", options=options).dropped
        assert {d.reason for d in dropped if "inv_freq" in d.tensor.name} == {"recomputed from rope_theta"}
        return
    with pytest.raises(CkptToolError, match="expected 5 rotary frequencies, half of head_dim 10") as caught:
        api.plan(tmp_path / "in", family="llama", options=options)
    assert caught.value.kind == "config-mismatch"
