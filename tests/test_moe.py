"""Mixtral as Megatron-Core trains it, and how ranks, stages and experts are shared out over files: every way
in which experts are kept is one model, every way of sharing out is read back, and what the router does
otherwise is refused by name."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tool import api
from ckpt_tool.checkpoint import megatron
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families.llama import MCORE as LLAMA
from ckpt_tool.fixtures.families.mixtral import MCORE, mcore
from ckpt_tool.fixtures.megatron_core import Core
from tests.conftest import Written

CASE = Path(__file__).parents[2] / "shared" / "cases" / "torch-dist-moe"
ASKED = {"max_position_embeddings": 128, "num_experts_per_tok": 2}
FILE = "model_optim_rng.pt"


def bytes_of(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes()


def folders(root: Path) -> list[str]:
    return sorted(f.parent.name for f in root.rglob(FILE))


def refused(act: Callable[[], object]) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        act()
    return caught.value


def written(core: Core, folder: Path) -> Path:
    folder.mkdir(parents=True)
    return core.write(folder, "mixtral-mcore")


def changed(source: Path, change: Callable[[dict[str, Any], str], None]) -> None:
    """`change` gets the content of each rank's file and the name of its folder."""
    for file in source.rglob(FILE):
        held = torch.load(file, weights_only=False)
        change(held, file.parent.name)
        torch.save(held, file)


# --- read ---------------------------------------------------------------------------------------------------

KEPT = {
    "apart, by stages": Core(MCORE, parallel=4, stages=(2, 1), engine=False),
    "grouped": Core(MCORE, ranks=2, kept="grouped"),
    "joined": Core(MCORE, ranks=2, parallel=2, kept="joined"),
}


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("kept", KEPT)
def test_experts_are_one_model_however_they_are_kept(kept: str, conversions: Written, tmp_path: Path) -> None:
    source = written(KEPT[kept], tmp_path / "in")
    api.convert(source, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(conversions("mixtral-mcore"))
    levels = ("coverage", "bits", "parity") if kept == "joined" else ("coverage", "bits")
    report = api.verify(tmp_path / "out", source, levels=levels)
    assert (report.status, report.exactness) == ("pass", "bit-identical")


def test_a_second_number_is_an_expert_rank_without_args_too(conversions: Written, tmp_path: Path) -> None:
    """Where both a stage's number and an expert-parallel rank's are possible the tensors tell."""
    source = written(Core(MCORE, parallel=2), tmp_path / "in")
    assert folders(source) == ["mp_rank_00_000", "mp_rank_00_001"]
    args = dict(vars(torch.load(next(source.rglob(FILE)), weights_only=False)["args"]))
    changed(source, lambda held, _: held.pop("args"))
    told = json.loads((conversions("mixtral-mcore") / "config.json").read_text())
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta")
    settings = {n: told[n] for n in (*names, "max_position_embeddings", "num_experts_per_tok")}
    assert args["num_experts"] == told["num_local_experts"]
    options = api.Options(settings=settings)
    api.convert(source, tmp_path / "out", family="mixtral", options=options)
    assert bytes_of(tmp_path / "out")[0] == bytes_of(conversions("mixtral-mcore"))[0]


def test_copies_of_expert_parallel_ranks_are_compared(originals: Written, tmp_path: Path) -> None:
    source = written(Core(MCORE, ranks=2, parallel=2), tmp_path / "in")

    def other_router(held: dict[str, Any], folder: str) -> None:
        if folder == "mp_rank_01_001":
            held["model"]["decoder.layers.1.mlp.router.weight"][3, 5] += 1

    changed(source, other_router)
    error = refused(lambda: api.convert(source, tmp_path / "out"))
    assert "decoder.layers.1.mlp.router.weight" in error.text() and "mp_rank_01_001" in error.text()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("mp_rank_01_001", "", "mp_rank_01_001 not there"),
        (
            "mp_rank_00_001",
            "decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.weight",
            "local_experts.3",
        ),
    ],
)
def test_a_missing_share_of_the_experts_is_named(name: str, place: str, message: str, tmp_path: Path) -> None:
    source = written(Core(MCORE, ranks=2, parallel=2), tmp_path / "in")
    (file,) = source.rglob(f"{name}/{FILE}")
    if place:
        held = torch.load(file, weights_only=False)
        del held["model"][place]
        torch.save(held, file)
    else:
        file.unlink()
    error = refused(lambda: api.plan(source))
    assert error.kind in ("missing-shard", "shard-conflict") and message in error.text()


def thinned(core: Core, keep: Collection[str], folder: Path, **args: Any) -> Path:
    """Of the ranks only those to `keep`, by the folder's numbers, with these args."""
    source = written(core, folder)
    for rank in list(source.rglob("mp_rank_*")):
        if rank.name.removeprefix("mp_rank_") not in keep:
            shutil.rmtree(rank)
    changed(source, lambda held, _: vars(held["args"]).update(args))
    return source


WHOLE = {
    "as many expert ranks": Core(MCORE, ranks=2, parallel=2, own=1),
    "more expert ranks, by stages": Core(MCORE, ranks=2, parallel=4, stages=(2, 1), own=1, engine=False),
    "no expert ranks": Core(MCORE, ranks=2, own=1, kept="grouped"),
    "joined": Core(MCORE, ranks=2, parallel=2, own=1, kept="joined"),
}
SAVED = {
    "as many expert ranks": ["mp_rank_00_000", "mp_rank_01_001"],
    "no expert ranks": ["mp_rank_00", "mp_rank_01"],
}


@pytest.mark.parametrize("kept", WHOLE)
def test_experts_that_are_whole_on_a_rank_are_the_same_model(
    kept: str, conversions: Written, tmp_path: Path
) -> None:
    """Of each tensor-parallel rank only some expert-parallel ranks are there."""
    source = written(WHOLE[kept], tmp_path / "in")
    assert folders(source) == SAVED.get(kept, folders(source))
    api.convert(source, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(conversions("mixtral-mcore"))
    levels = ("coverage", "bits", "parity") if "stages" in kept else ("coverage", "bits")
    report = api.verify(tmp_path / "out", source, levels=levels)
    assert (report.status, report.exactness) == ("pass", "bit-identical")


WIDE = mcore(1, 64, 8, 4, 8, 48, 320, 2)  # whose heads and units four ranks share out


def test_experts_on_two_of_four_ranks_have_copies_that_are_compared(tmp_path: Path) -> None:
    """Two processes hold the same share of an expert, and which they are is told by their numbers."""
    whole = written(Core(WIDE), tmp_path / "whole")
    api.convert(whole, tmp_path / "one")
    source = written(Core(WIDE, ranks=4, own=2), tmp_path / "in")
    assert folders(source) == [f"mp_rank_0{t}" for t in range(4)]
    api.convert(source, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "one")
    assert api.verify(tmp_path / "out", source).status == "pass"

    def other_copy(held: dict[str, Any], folder: str) -> None:
        if folder == "mp_rank_02":
            held["model"]["decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"][3, 5] += 1

    changed(source, other_copy)
    error = refused(lambda: api.convert(source, tmp_path / "again"))
    assert "mp_rank_02" in error.text() and "local_experts.1.linear_fc2" in error.text()
    assert not (tmp_path / "again").exists()


def test_a_share_of_whole_experts_that_is_not_there_is_named(tmp_path: Path) -> None:
    source = written(Core(MCORE, ranks=2, parallel=4, own=1), tmp_path / "in")
    shutil.rmtree(next(source.rglob("mp_rank_01_003")))
    error = refused(lambda: api.plan(source))
    assert error.kind == "missing-shard" and "mp_rank_01_003" in error.text()


def test_tensor_parallel_ranks_that_nobody_saved_are_told_as_that(tmp_path: Path) -> None:
    """Before core_v0.18.0 the first process of each expert data parallelism saves, and no other."""
    source = written(Core(WIDE, ranks=4, parallel=2, own=1), tmp_path / "in")
    assert api.plan(source).family == "mixtral"
    for name in ("mp_rank_02_000", "mp_rank_03_001"):
        shutil.rmtree(next(source.rglob(name)))
    (problem,) = refused(lambda: api.plan(source)).problems
    assert problem.kind == "missing-shard" and "each expert shared out over 1" in problem.message
    assert "found 2 files: mp_rank_02_000, mp_rank_03_001 not there" in problem.message
    assert problem.hint is not None and "the files of the first 2 ranks only" in problem.hint


def test_absurd_numbers_of_ranks_are_refused_before_they_are_counted(tmp_path: Path) -> None:
    source = written(Core(MCORE, ranks=2, parallel=2, own=1), tmp_path / "in")
    huge = {"tensor_model_parallel_size": 1 << 19, "expert_model_parallel_size": 1 << 19}
    changed(source, lambda held, _: vars(held["args"]).update(huge))
    (problem,) = refused(lambda: api.plan(source)).problems
    assert problem.kind == "bad-config" and "524288 x 524288 x 1" in problem.message


THREE = Core(mcore(2, 60, 6, 2, 10, 44, 308, 3), ranks=2, parallel=3, stages=(1, 1), own=1)


def test_ranks_of_which_one_has_more_copies_are_the_same_model(tmp_path: Path) -> None:
    """Three processes save: two of them the first tensor-parallel rank's part of what both share."""
    api.convert(written(Core(THREE.model), tmp_path / "whole"), tmp_path / "one")
    source = written(replace(THREE, stages=()), tmp_path / "in")
    assert folders(source) == ["mp_rank_00_000", "mp_rank_00_002", "mp_rank_01_001"]
    api.convert(source, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "one")
    levels = ("coverage", "bits")
    assert api.verify(tmp_path / "out", source, levels=levels).status == "pass"

    def other_copy(held: dict[str, Any], folder: str) -> None:
        if folder == "mp_rank_00_002":
            held["model"]["decoder.layers.1.self_attention.linear_proj.weight"][3, 5] += 1

    changed(source, other_copy)
    error = refused(lambda: api.convert(source, tmp_path / "again"))
    assert error.kind == "shard-conflict" and "mp_rank_00_002" in error.text()
    assert api.verify(tmp_path / "out", source, levels=levels).status == "fail"


def test_a_rank_that_only_another_stage_has_is_named(tmp_path: Path) -> None:
    """Processes after the first three hold what those have; of one of them the second stage is gone."""
    source = written(THREE, tmp_path / "in")
    fourth = next(source.rglob("mp_rank_01_000_001"))
    shutil.copytree(fourth, fourth.parent / "mp_rank_01_000_000")
    (problem,) = refused(lambda: api.plan(source)).problems
    assert problem.kind == "missing-shard" and "7 files: mp_rank_01_001_000 not there" in problem.message


def test_an_absurd_number_of_stages_is_refused_before_they_are_counted(tmp_path: Path) -> None:
    """The tensor-parallel and expert-parallel ranks alone are those of a run with whole experts."""
    source = written(replace(THREE, stages=()), tmp_path / "in")
    changed(source, lambda held, _: vars(held["args"]).update(expert_tensor_parallel_size=2))
    for name, stage in (("00_000", 0), ("01_001", 0), ("00_002", 99999)):
        rank = next(source.rglob(f"mp_rank_{name}"))
        rank.rename(rank.parent / f"mp_rank_{name[:2]}_{stage:03d}{name[2:]}")
    (problem,) = refused(lambda: api.plan(source)).problems
    assert (problem.kind, problem.message) == (
        "missing-shard",
        "expected ranks numbered from 0 on, found 3 up to mp_rank_01_000_001",
    )


def test_a_part_of_a_grid_is_no_run_of_whole_experts(tmp_path: Path) -> None:
    """The same files of a run whose args say that experts are shared out as all else."""
    error = refused(
        lambda: api.plan(thinned(Core(MCORE, ranks=2, parallel=2), ("00_000", "01_001"), tmp_path / "part"))
    )
    assert error.kind == "missing-shard" and "mp_rank_00_001, mp_rank_01_000 not there" in error.text()


def test_a_grid_with_a_hole_is_not_compared_with_runs_of_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a run are counted through only where it would have as many files as there are."""
    counted = []

    def counting(*bounds: int) -> range:
        counted.append(range(*bounds))
        return counted[-1]

    monkeypatch.setattr(megatron, "range", counting, raising=False)
    grid = [(t, e) for t in range(30) for e in range(30)]
    assert megatron._shared_by(grid[:-1]) is None
    assert sum(map(len, counted)) < len(grid)
    assert megatron._shared_by([(r % 4, r // 2 % 2) for r in range(8)]) == 2
    assert megatron._shared_by([(0, 0), (1, 1), (0, 2)]) == 1  # three processes of six have other ranks


@pytest.mark.skipif(not CASE.is_dir(), reason="the folder of cases is not beside this checkout")
def test_the_case_of_experts_comes_out_as_megatron_core_wrote_it(tmp_path: Path) -> None:
    error = refused(lambda: api.plan(CASE / "ckpt"))
    assert {p.where for p in error.problems} == {"max_position_embeddings", "moe_router_topk"}
    assert all(f"--set {name}=" in error.text() for name in ASKED)
    api.convert(CASE / "ckpt", tmp_path / "out", options=api.Options(settings=ASKED))
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(CASE / "expected.safetensors")
    layers = "decoder.layers.mlp."
    for i in range(2):
        t = f"model.layers.{i}.block_sparse_moe."
        assert torch.equal(ours[f"{t}gate.weight"], theirs[f"{layers}router.weight"][i])
        for e in range(4):
            gate, up = theirs[f"{layers}experts.experts.linear_fc1.weight"][i, e].chunk(2)
            down = theirs[f"{layers}experts.experts.linear_fc2.weight"][i, e]
            for w, whole in (("w1", gate), ("w3", up), ("w2", down)):
                assert torch.equal(ours[f"{t}experts.{e}.{w}.weight"], whole)
    assert api.verify(tmp_path / "out", CASE / "ckpt").status == "pass"


# --- write --------------------------------------------------------------------------------------------------

SHARED = [
    ({}, ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]),  # as the original was
    ({"tensor_parallel": 1, "expert_parallel": 1}, ["mp_rank_00"]),
    (
        {"tensor_parallel": 1, "expert_parallel": 1, "pipeline_layers": "1,2"},
        ["mp_rank_00_000", "mp_rank_00_001"],
    ),
    (
        {"tensor_parallel": 1, "expert_parallel": 2, "pipeline_parallel": 2, "pipeline_layers": "0,1,1,1"},
        [f"mp_rank_00_{p:03d}_{e:03d}" for p in range(2) for e in range(2)],
    ),
]


@pytest.mark.parametrize(("asked", "made"), SHARED)
def test_ranks_are_read_back_however_they_share_the_model_out(
    asked: Mapping[str, Any], made: list[str], conversions: Written, tmp_path: Path
) -> None:
    source, out = conversions("mixtral-mcore"), tmp_path / "out"
    api.convert(source, out, to="original", options=api.Options(family_options=asked))
    assert folders(out) == made
    api.convert(out, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(source)
    assert api.verify(out, source, levels=("coverage", "bits")).status == "pass"


def test_ranks_go_back_as_they_came(conversions: Written, originals: Written, tmp_path: Path) -> None:
    """Experts with their numbers on each rank, and all else on every expert-parallel rank."""
    api.convert(conversions("mixtral-mcore"), tmp_path / "out", to="original")
    for before in originals("mixtral-mcore").rglob(FILE):
        (after,) = (tmp_path / "out").rglob(f"{before.parent.name}/{FILE}")
        one, two = (torch.load(f, weights_only=False)["model"] for f in (before, after))
        assert one.keys() == two.keys()
        assert all(torch.equal(x, two[n]) for n, x in one.items())


def test_grouped_experts_go_back_grouped(tmp_path: Path) -> None:
    source = written(Core(MCORE, parallel=2, kept="grouped"), tmp_path / "in")
    api.convert(source, tmp_path / "hf")
    api.convert(tmp_path / "hf", tmp_path / "out", to="original")
    (file,) = (tmp_path / "out").rglob(f"mp_rank_00_001/{FILE}")
    held = torch.load(file, weights_only=False)
    assert "decoder.layers.2.mlp.experts.linear_fc1.weight3" in held["model"]
    assert held["args"].moe_grouped_gemm and held["args"].expert_model_parallel_size == 2


def test_stages_of_dense_models_say_how_they_share_layers_out(tmp_path: Path) -> None:
    """In the words of the releases that read them; a tied model has its words on the last stage once more."""
    tied = Core(
        type(LLAMA)(LLAMA.shapes, {**LLAMA.config, "tie_word_embeddings": True, "num_hidden_layers": 5})
    )
    api.convert(written(tied, tmp_path / "in"), tmp_path / "hf", family="llama")
    for layers, words in (
        ("2,1,2", {"decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 2}),
        ("1,3,1", {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 1}),
        ("1,1,2,1", {"pipeline_model_parallel_layout": "Et|t|tt|tL"}),
    ):
        out, again = tmp_path / layers, tmp_path / f"{layers}-again"
        asked = {"pipeline_layers": layers}
        api.convert(tmp_path / "hf", out, to="original", options=api.Options(family_options=asked))
        *_, last = sorted(out.rglob(FILE))
        held = torch.load(last, weights_only=False)
        args = vars(held["args"])
        assert {k: v for k, v in args.items() if k in words} == words
        assert args["pipeline_model_parallel_size"] == len(layers.split(","))
        first = torch.load(sorted(out.rglob(FILE))[0], weights_only=False)["model"]
        table = first["embedding.word_embeddings.weight"]
        assert torch.equal(held["model"]["output_layer.weight"], table) and len(table) > 0
        api.convert(out, again, family="llama")
        assert bytes_of(again) == bytes_of(tmp_path / "hf")


@pytest.mark.parametrize(
    ("asked", "kind", "says"),
    [
        ({"pipeline_layers": "2,2"}, "usage", "add up to 3 layers"),
        ({"pipeline_layers": "1,0,2"}, "usage", "but the first and the last"),
        ({"pipeline_layers": "one"}, "usage", "as in 3,5,4"),
        ({"pipeline_parallel": 2}, "config-mismatch", "--pipeline-layers"),
        ({"virtual_stages": 2}, "usage", "--pipeline-parallel M"),
        ({"expert_parallel": 3}, "config-mismatch", "--expert-parallel 3"),
        ({"form": "C", "expert_parallel": 2}, "usage", "--form mcore"),
    ],
)
def test_what_cannot_be_shared_out_is_said(
    asked: Mapping[str, Any], kind: str, says: str, conversions: Written
) -> None:
    options = api.Options(family_options=asked)
    error = refused(lambda: api.plan(conversions("mixtral-mcore"), to="original", options=options))
    assert error.kind == kind and says in error.text()


def test_a_torch_dist_folder_has_the_experts_of_a_layer_in_one_tensor(
    conversions: Written, tmp_path: Path
) -> None:
    source = conversions("mixtral-mcore")
    asked = {"form": "torch_dist"}
    api.convert(source, tmp_path / "out", to="original", options=api.Options(family_options=asked))
    with api.open_checkpoint(tmp_path / "out") as folder:
        (experts,) = folder.find("decoder.layers.mlp.experts.experts.linear_fc1.weight")
        assert experts.shape == (3, 8, 88, 60) and "decoder.layers.pre_mlp_layernorm.weight" in folder.names()
    api.convert(tmp_path / "out", tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(source)


def test_a_singleton_folder_has_experts_and_gates_apart(conversions: Written, tmp_path: Path) -> None:
    """Under the names that megatron-core 0.16.1 asks for (moe/experts.py, mlp.py: sharded_state_dict)."""
    source, asked = conversions("mixtral-mcore"), {"form": "torch_dist", "layers": "singleton"}
    api.convert(source, tmp_path / "out", to="original", options=api.Options(family_options=asked))
    expert = "decoder.layers.2.mlp.experts.experts.7"
    with api.open_checkpoint(tmp_path / "out") as folder:
        found = {n.removeprefix(expert) for n in folder.names() if n.startswith(expert)}
        (gate,) = folder.find(f"{expert}.linear_fc1.weight_w")
    assert found == {".linear_fc1.weight_w", ".linear_fc1.weight_v", ".linear_fc2.weight"}
    assert gate.shape == (44, 60)
    state = f"{expert}.linear_fc1._extra_state/shard_0_1"
    assert state.encode() in (tmp_path / "out" / "release" / ".metadata").read_bytes()
    assert api.verify(tmp_path / "out", source, levels=("coverage", "bits")).status == "pass"
    api.convert(tmp_path / "out", tmp_path / "again")
    one, other = (load_file(f / "model.safetensors") for f in (source, tmp_path / "again"))
    assert one.keys() == other.keys() and all(torch.equal(x, other[n]) for n, x in one.items())
    api.convert(tmp_path / "again", tmp_path / "third", to="original")  # unasked, as it was
    for file in (tmp_path / "out" / "release").iterdir():
        assert file.read_bytes() == (tmp_path / "third" / "release" / file.name).read_bytes()


@pytest.mark.parametrize("form", ["mcore", "torch_dist"])
def test_scaled_frequencies_go_back_where_args_can_say_them(form: str, tmp_path: Path) -> None:
    """params.json, which cannot, has no say in it."""
    source = written(Core(mcore(1, 60, 6, 2, 10, 44, 308, 4)), tmp_path / "in")
    changed(source, lambda held, _: setattr(held["args"], "use_rope_scaling", True))
    api.convert(source, tmp_path / "hf", family="mixtral")
    options = api.Options(family_options={"form": form})
    api.convert(tmp_path / "hf", tmp_path / "out", to="original", options=options)
    api.convert(tmp_path / "out", tmp_path / "again", family="mixtral")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["rope_scaling"]["factor"] == 8
    published = api.Options(family_options={"form": "A"})
    error = refused(lambda: api.plan(tmp_path / "hf", to="original", options=published))
    assert error.kind == "unsupported" and "params.json" in error.text()


# --- arguments ----------------------------------------------------------------------------------------------

OTHERWISE = {
    "moe_router_pre_softmax": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_group_topk": 4,
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": ["aux_loss", "sinkhorn"],
    "moe_shared_expert_intermediate_size": 64,
    "moe_layer_freq": [0, 1, 1],
    "moe_latent_size": 8,
    "moe_expert_capacity_factor": 1.25,
    "moe_input_jitter_eps": 0.01,
    "moe_apply_probs_on_input": True,
    "moe_mlp_glu_interleave_size": 32,
    "moe_of_a_fork": 3,
    "expert_tensor_parallel_size": 2,
}
NO_EFFECT = {
    "moe_router_dtype": "fp64",
    "moe_z_loss_coeff": 0.001,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_layer_freq": 1,
    "moe_expert_capacity_factor": -1,
    "moe_router_topk_scaling_factor": 1.0,
    "moe_token_drop_policy": "position",
    "moe_ffn_hidden_size": 44,
    "ffn_hidden_size": 7,
}


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(Core(mcore(1, 60, 6, 2, 10, 44, 308, 4)), tmp_path_factory.mktemp("moe") / "in")


def with_args(source: Path, folder: Path, args: Mapping[str, Any]) -> Path:
    (file,) = source.rglob(FILE)
    held = torch.load(io.BytesIO(file.read_bytes()), weights_only=False)
    vars(held["args"]).update(args)
    folder.mkdir(exist_ok=True)
    torch.save(held, folder / FILE)
    return folder


def test_each_argument_that_changes_the_routing_is_refused(one_layer: Path, tmp_path: Path) -> None:
    found = refused(lambda: api.plan(with_args(one_layer, tmp_path / "all", OTHERWISE), family="mixtral"))
    assert {p.where for p in found.problems} == OTHERWISE.keys()
    assert {p.kind for p in found.problems} == {"unsupported"}
    api.plan(with_args(one_layer, tmp_path / "none", NO_EFFECT), family="mixtral")


def test_what_only_training_does_may_be_left_out_by_name(one_layer: Path, tmp_path: Path) -> None:
    dropped = {"moe_expert_capacity_factor": 1.25, "moe_input_jitter_eps": 0.01}
    source = with_args(one_layer, tmp_path / "in", dropped)
    error = refused(lambda: api.plan(source, family="mixtral"))
    assert all(p.hint == f"--set {p.where}=null leaves it out of the model" for p in error.problems)
    settings = dict.fromkeys(dropped)
    made = api.convert(source, tmp_path / "out", family="mixtral", options=api.Options(settings=settings))
    assert sum("left out" in n for n in made.plan.notes) >= 2
    assert api.verify(tmp_path / "out", source).status == "pass"


def test_numbers_of_experts_are_used_or_asked_for(one_layer: Path, tmp_path: Path) -> None:
    for args, kind, where in (
        ({"num_experts": 5}, "config-mismatch", "num_local_experts"),
        ({"moe_router_topk": 5}, "config-mismatch", "num_experts_per_tok"),
        ({"moe_router_topk": None}, "missing-fact", "moe_router_topk"),
        ({"moe_ffn_hidden_size": 40}, "config-mismatch", "intermediate_size"),
    ):
        source = with_args(one_layer, tmp_path / "in", args)
        error = refused(partial(api.plan, source, family="mixtral"))
        assert (error.kind, error.problems[0].where) == (kind, where), args
    plan = api.plan(with_args(one_layer, tmp_path / "in", {"moe_router_topk": 3}), family="mixtral")
    assert plan.config["num_experts_per_tok"].value == 3
