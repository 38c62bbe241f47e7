"""Rotary scaling: both readings against the library's own tables, below and beyond the original context."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_tool.reference import NotComputed, hf_rope
from ckpt_tool.reference import rope as original
from tests import loaded

ROOT = Path(__file__).parents[1]
BASE = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_hidden_layers": 1,
    "rope_theta": 70000.0,
    "max_position_embeddings": 128,
}
CONTEXT = {"original_max_position_embeddings": 64}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **CONTEXT}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "linear-old-key": {"type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **CONTEXT},
    "yarn-old-key": {"type": "yarn", "factor": 4.0, **CONTEXT},
    "yarn-context-absent": {"rope_type": "yarn", "factor": 4.0},
    "yarn-attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7, **CONTEXT},
    "yarn-not-truncated": {"rope_type": "yarn", "factor": 8.0, "truncate": False, **CONTEXT},
    "yarn-betas": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 8.0, "beta_slow": 0.5, **CONTEXT},
    "yarn-scales": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.8, "mscale_all_dim": 0.5, **CONTEXT},
    "yarn-one-scale": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.8, **CONTEXT},
    "yarn-long": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-one-place": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "truncate": False, **CONTEXT},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
}
LENGTHS = (20, 100, 300)


@pytest.mark.parametrize("release", ["tf5", "tf4.57"])
def test_both_readings_turn_as_the_library_does(release: str, tmp_path: Path) -> None:
    jobs = [(name, {**BASE, "rope_scaling": s}, n) for name, s in SCALINGS.items() for n in LENGTHS]
    listed = tmp_path / "jobs.json"
    listed.write_text(json.dumps([job[1:] for job in jobs]))
    script = ROOT / "tests" / "rotary_script.py"
    command = [loaded.python(release), "-W", "ignore", str(script), str(listed), str(tmp_path / "out.npz")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    tables = np.load(tmp_path / "out.npz")
    for i, (name, config, length) in enumerate(jobs):
        wanted = tables[f"cos{i}"] + 1j * tables[f"sin{i}"]  # (T, H), both halves alike
        theta, scaling = hf_rope.rope(config, default=1.0)
        x = torch.zeros(1, length, 1)
        cos, sin = hf_rope.rotation(x, theta, 16, scaling)
        own = original.RopeScaling.from_hf(config["rope_scaling"] or {}, 128)
        turned = original.turns(x, theta, 16, own).numpy()
        found = (cos + 1j * sin).numpy()
        assert np.abs(found - wanted).max() < 5e-5, (name, length)  # 300 radians in float32
        assert np.abs(turned - wanted[:, :8]).max() < 5e-5, (name, length)


@pytest.mark.parametrize("name", [n for n in SCALINGS if n != "none"])
def test_a_scaling_is_not_the_default(name: str) -> None:
    x = torch.zeros(1, 300, 1, dtype=torch.float64)
    plain = original.turns(x, 7e4, 16, None)
    scaled = original.turns(x, 7e4, 16, original.RopeScaling.from_hf(SCALINGS[name] or {}, 128))
    assert (plain - scaled).abs().max() > 0.1


def test_frequencies_in_rope_parameters_of_each_kind_of_layer() -> None:
    inner = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    nested = {"rope_parameters": {"full_attention": inner, "sliding_attention": inner}}
    assert hf_rope.rope(nested, 1e4) == hf_rope.rope({"rope_parameters": inner}, 1e4)
    other = {**inner, "factor": 3.0}
    with pytest.raises(NotComputed, match="the same rotary values for all kinds of layers"):
        hf_rope.rope({"rope_parameters": {"full_attention": inner, "sliding_attention": other}}, 1e4)


@pytest.mark.parametrize("kind", ["longrope", "su", "proportional", "made-up"])
def test_another_kind_is_not_computed_and_says_so(kind: str) -> None:
    facts = {"rope_type": kind, "factor": 2.0}
    for read in (hf_rope.RopeScaling.from_hf, original.RopeScaling.from_hf):
        with pytest.raises(NotComputed, match=f"found `{kind}`"):
            read(facts, 128)
