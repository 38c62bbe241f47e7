"""Experts whose codes are stacked, with their scales, as transformers 5 holds them in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ckpt_tool.api import convert, plan, verify
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures import quantised as writers
from ckpt_tool.fixtures.quantised import FORMATS, Tensors, quantise, write
from ckpt_tool.reference import hf_mixtral

Written = Callable[[str], Path]
ONE = "model.layers.{}.block_sparse_moe.experts.{}."
PARTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


def stacked(source: Path, out: Path) -> Path:
    """A folder of codes in eight bits as state_dict() of a loaded model has them."""
    with open_checkpoint(source) as checkpoint:
        tensors: Tensors = {t.name: (t.dtype, checkpoint.read(t)) for t in checkpoint}
        config = checkpoint.json("config.json")
    made = {
        n.replace("block_sparse_moe.gate", "mlp.gate"): t for n, t in tensors.items() if ".experts." not in n
    }
    for layer in range(config["num_hidden_layers"]):
        for name, parts in PARTS.items():
            for end, own in (("", ".weight"), ("_scale_inv", ".weight_scale_inv")):
                each = [
                    [tensors[ONE.format(layer, e) + part + own] for part in parts]
                    for e in range(config["num_local_experts"])
                ]
                bits = np.stack([np.concatenate([np.atleast_2d(b) for _, b in some]) for some in each])
                made[f"model.layers.{layer}.mlp.experts.{name}{end}"] = each[0][0][0], bits
    config["quantization_config"]["expert_dtype"] = "fp8"  # which it writes beside any fp8
    out.mkdir()
    write(out / "model.safetensors", made)
    (out / "config.json").write_text(json.dumps(config))
    return out


def held(folder: Path) -> dict[str, bytes]:
    with open_checkpoint(folder) as checkpoint:
        return {t.name: checkpoint.read(t).tobytes() for t in checkpoint}


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], str]:
    """`blocks(rows)`: a format in blocks of so many rows."""

    def made(rows: int) -> str:
        make = lambda stem, x: writers._fp8(stem, x, (rows, 24), ".weight_scale_inv")  # noqa: E731
        said = {**FORMATS["fp8-blocks"].config, "weight_block_size": [rows, 24]}
        monkeypatch.setitem(FORMATS, "fp8-here", writers.Format(make, said))
        return "fp8-here"

    return made


def test_stacked_codes_are_those_of_each_expert(
    conversions: Written,
    blocks: Callable[[int], str],
    few_prompts: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Carried, as numbers, and in parity, whose reading of the source takes them apart by itself."""
    source = quantise(conversions("mixtral-c"), tmp_path / "apart", blocks(8))
    one = stacked(source, tmp_path / "stacked")
    for name, options in (("carried", Options()), ("numbers", Options(dequantize="BF16"))):
        convert(source, tmp_path / f"{name}-right", options=options)
        made = convert(one, tmp_path / name, options=options)
        assert any("stacked" in note for note in made.plan.notes)
        assert held(tmp_path / name) == held(tmp_path / f"{name}-right")
        assert verify(tmp_path / name, one, levels=("coverage", "bits")).status == "pass"
    run = partial(verify, tmp_path / "carried", one, levels=("parity",), mode="quick")
    report = run()
    assert report.status == "pass", report.headline
    apart = hf_mixtral.apart
    monkeypatch.setattr(hf_mixtral, "apart", lambda w, name: apart(w, name.replace(".w1.", ".w3.")))
    assert run().status == "fail"  # of the reading alone, whatever stands in the view


def test_a_block_of_gate_and_up_is_refused(
    conversions: Written, blocks: Callable[[int], str], tmp_path: Path
) -> None:
    source = quantise(conversions("mixtral-c"), tmp_path / "apart", blocks(16))
    with pytest.raises(CkptToolError) as caught:
        plan(stacked(source, tmp_path / "stacked"))
    problem = caught.value.problems[0]
    assert (problem.kind, problem.where) == ("unsupported", "model.layers.0.mlp.experts.gate_up_proj")
    assert "rows of both" in problem.message


def test_one_scale_for_each_half(conversions: Written, tmp_path: Path) -> None:
    """Of a matrix: transformers keeps (experts, 2, 1) of gate and up, and of inputs one for each expert."""
    source = quantise(conversions("mixtral-c"), tmp_path / "apart", "fp8-tensor")
    one = stacked(source, tmp_path / "stacked")
    with open_checkpoint(one) as checkpoint:
        assert checkpoint.find("model.layers.0.mlp.experts.gate_up_proj_scale_inv")[0].shape[1:] == (2, 1)
    convert(one, tmp_path / "out", options=Options(dequantize="BF16"))
    convert(source, tmp_path / "right", options=Options(dequantize="BF16"))
    assert held(tmp_path / "out") == held(tmp_path / "right")


def test_tables_beside_stacked_codes_are_counted(
    conversions: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and given back; of a stack no more is read than of the expert whose weight is made."""
    import torch

    from ckpt_tool.verify import holding
    from ckpt_tool.verify.sides import original_side
    from ckpt_tool.verify.stacked import StackedCodes
    from ckpt_tool.verify.subject import opened

    monkeypatch.setattr(holding, "SMALL", 1)
    one = stacked(quantise(conversions("mixtral-c"), tmp_path / "apart", "fp8-tensor"), tmp_path / "one")
    convert(one, tmp_path / "out")
    with opened(tmp_path / "out", one, {}) as subject:
        weights, shared = original_side(subject, torch.float32, "cpu").weights[0], holding.Room(10**9)
        assert isinstance(weights, StackedCodes)
        read: list[int] = []
        into = type(weights.whole).read_into
        monkeypatch.setattr(
            type(weights.whole), "read_into", lambda *given: (read.append(len(given[3])), into(*given))[1]
        )
        name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
        assert weights[name].numel() == max(read) and sum(read) <= weights[name].numel() + 4
        weights.within(10**9, shared)
        with weights.keep():
            table = weights["model.embed_tokens.weight"]
            assert weights["model.embed_tokens.weight"] is table and shared.held == table.nbytes
            weights.let_go()
            assert shared.held == weights.room.held == 0
            assert len(weights["model.embed_tokens.weight"]) > 0 < shared.held
        assert shared.held == 0


def test_stacked_codes_under_other_names_are_refused(conversions: Written, tmp_path: Path) -> None:
    source = quantise(conversions("mixtral-c"), tmp_path / "apart", "fp8-blocks")
    with open_checkpoint(source) as checkpoint:
        tensors: Tensors = {t.name: (t.dtype, checkpoint.read(t)) for t in checkpoint}
    tensors["model.layers.0.moe.experts.w1"] = "F8_E4M3", np.zeros((4, 8, 8), "u1")
    write(source / "model.safetensors", tensors)
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    assert "stacked" in caught.value.problems[0].message
    assert "dequantize" not in (caught.value.problems[0].hint or "")  # which leaves the scales out
