"""Megatron's arguments are used, harmless, or refused by name; stages of any length are read; a conversion is
not judged by the way back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ckpt_tool import api
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.cli import cli
from ckpt_tool.convert.families import Family, family
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.errors import CkptToolError, Problem
from ckpt_tool.fixtures.families.qwen2 import qwen2
from ckpt_tool.fixtures.megatron_core import Core, write_file
from ckpt_tool.fixtures.numbers import drawn
from ckpt_tool.fixtures.pickles import StateDict, Tensor, write_torch_zip
from ckpt_tool.fixtures.variants import VARIANTS
from tests.headers_only import held
from tests.megatron_models import FAMILIES as MEGATRON
from tests.megatron_models import args
from tests.test_megatron_families import WITH_WORDS, again, carried_out, check, converted, original, truth

Written = Callable[[str], Path]
CASES = Path(__file__).parents[2] / "shared" / "cases"
QWEN = qwen2(4, 48, 6, 2, 72, 320, 5)
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
    assert code == 1 and "model.norm.weight: expected this tensor, found none" in text


def test_published_ids_that_are_no_words_are_not_written(tmp_path: Path) -> None:
    folder = case("checklist_says_otherwise", "intact")
    code, text = said("convert", "llama", "--in", folder, "--out", tmp_path / "out")
    assert code == 0 and "coverage every source and target tensor accounted for" in text, text
    assert '"eos_token_id": null' in (tmp_path / "out" / "config.json").read_text()


# --- stages of any length -------------------------------------------------------------------------------

# Layers of each part: the first chunk of each stage, then the second of each.
SPLITS = {
    "longer first": ((3, 1), 1),
    "longer last": ((1, 3), 1),
    "embedding alone": ((0, 4), 1),
    "head alone": ((2, 2, 0), 1),
    "virtual": ((0, 1, 2, 1), 2),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("age", ["encoder", "core-fused"])
@pytest.mark.parametrize("name", MEGATRON)
def test_stages_of_any_length_are_read_and_written_again(
    name: str, age: str, split: str, tmp_path: Path
) -> None:
    counts, chunks = SPLITS[split]
    depth = len(counts) // chunks
    checkpoint, bits = original(name, 3.0, age, 2, counts, chunks)
    plan = family(name).plan(checkpoint, WITH_WORDS)
    made = carried_out(plan, bits)
    check(made, truth(name))
    folder = converted(plan, made, tmp_path)
    for asked in ({}, {"pipeline_parallel": depth}):
        back = family(name).plan_original(folder, Options(family_options=asked))
        returned = carried_out(back, made)
        assert returned.keys() == bits.keys()
        assert any(", ".join(map(str, counts)) in note for note in back.notes)
        check(carried_out(family(name).plan(again(back, returned), Options()), returned), truth(name))
    one = family(name).plan_original(folder, Options(family_options={"pipeline_parallel": 1}))
    assert len(one.outputs) == 2 and one.config["pipeline_model_parallel_size"].value == 1
    check(
        carried_out(family(name).plan(again(one, carried_out(one, made)), Options()), carried_out(one, made)),
        truth(name),
    )


@pytest.mark.parametrize("name", MEGATRON)
def test_a_split_that_nothing_records_becomes_one_stage_unless_asked_for(name: str, tmp_path: Path) -> None:
    checkpoint, bits = original(name, stages=(1, 2, 1))
    plan = family(name).plan(checkpoint, WITH_WORDS)
    forgotten = {k: v for k, v in plan.original.items() if k != "layers_of_parts"}
    folder = converted(replace(plan, original=forgotten), carried_out(plan, bits), tmp_path)
    back = family(name).plan_original(folder, Options())
    assert len(back.outputs) == 1
    assert "the original had 3 pipeline stages; one is written" in back.notes
    with pytest.raises(CkptToolError) as caught:
        family(name).plan_original(folder, Options(family_options={"pipeline_parallel": 3}))
    assert caught.value.problems[0].where == "--pipeline-parallel"


@pytest.mark.parametrize("split", [*SPLITS, "even"])
def test_stages_of_core_of_any_length_are_read(split: str, tmp_path: Path) -> None:
    counts, chunks = SPLITS.get(split, ((2, 2), 1))
    core = Core(QWEN, ranks=2)
    write_stages(tmp_path / "in", core, counts, chunks)
    core.write(tmp_path / "whole", "qwen", 0)
    for source in ("in", "whole"):
        folder = tmp_path / source
        out = tmp_path / f"{source}-hf"
        assert said("convert", "qwen2", "--in", folder, "--out", out, "--no-verify")[0] == 0
    one, other = ((tmp_path / f"{s}-hf" / "model.safetensors").read_bytes() for s in ("in", "whole"))
    assert one == other
    if split != "virtual":
        return  # the same bytes: what follows is the same
    code, text = said("verify", tmp_path / "in-hf", "--source", tmp_path / "in", "--level", "parity")
    assert code == 0, text
    out = tmp_path / "back"
    code, text = said("convert", "qwen2", "--to", "original", "--in", tmp_path / "in-hf", "--out", out)
    shared_out = ", ".join(map(str, counts))
    assert code == 0 and f"layers are shared out over the stages as the original's were: {shared_out}" in text
    assert said("convert", "qwen2", "--in", out, "--out", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == one


def write_stages(folder: Path, core: Core, counts: tuple[int, ...], chunks: int) -> None:
    """The model of `core` with these layers in each part."""
    numbers, depth = drawn("qwen", 0), len(counts) // chunks
    places = [(part, local) for part, count in enumerate(counts) for local in range(count)]
    args = {**core.args(), "pipeline_model_parallel_size": depth}
    for rank in range(core.ranks):
        parts: list[dict[str, Tensor]] = [{} for _ in counts]
        for name, tensor in core.rank(rank, numbers).items():
            part, own = 0 if name.startswith("embedding.") else -1, name
            if found := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
                part, local = places[int(found[1])]
                own = f"decoder.layers.{local}.{found[2]}"
            parts[part][own] = tensor
        for stage in range(depth):
            models = [StateDict(parts[chunk * depth + stage]) for chunk in range(chunks)]
            named = {"model": models[0]} if chunks == 1 else {f"model{k}": m for k, m in enumerate(models)}
            at = folder / "iter_0000100" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
            at.parent.mkdir(parents=True)
            with open(at, "wb") as f:
                write_torch_zip({"args": args, "iteration": 100, **named}, f)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")


def test_two_stages_of_two_layers_and_one(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    source, out = case("uneven_pipeline_stages", "two_and_one"), tmp_path / "out"
    code, text = said("convert", "megatron-gpt2", "--in", source, "--out", out)
    assert code == 0 and "coverage every source and target tensor accounted for" in text, text
    wanted, found = load_file(source.parent / "expected.safetensors"), load_file(out / "model.safetensors")
    assert wanted.keys() == found.keys()
    assert all(np.array_equal(wanted[n].view("u2"), found[n].view("u2")) for n in wanted)
    code, text = said("verify", out, "--source", source)
    assert code == 0, text
    code, text = said("convert", "megatron-gpt2", "--to", "original", "--in", out, "--out", tmp_path / "back")
    assert code == 0 and "as the original's were: 2, 1" in text
    both = [
        (f.name, sorted(f.tensors))
        for p in (source, tmp_path / "back")
        for f in open_checkpoint(p).files.values()
    ]
    assert sorted(both[:2]) == sorted(both[2:])


# --- arguments of a run ---------------------------------------------------------------------------------

ROPE = "qwen2_core_rope_scaling_args"
BLOCK = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BLOCK["original_max_position_embeddings"] = 8192
# Arguments that make another model of the same tensors, with a value that does.
OTHER_MODELS: dict[str, Any] = {
    "softmax_type": "off-by-one",
    "softmax_scale": 0.1,
    "squared_relu": True,
    "quick_geglu": True,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "apply_layernorm_1p": True,
    "layernorm_zero_centered_gamma": True,
    "qk_layernorm": True,
    "qk_l2_norm": True,
    "attention_output_gate": True,
    "multi_latent_attention": True,
    "experimental_attention_variant": "dsa",
    "linear_attention_freq": 4,
    "window_size": (128, 0),
    "num_experts": 8,
    "mtp_num_layers": 1,
    "retro_add_retriever": True,
    "is_hybrid_model": True,
    "hybrid_override_pattern": "M-*",
    "heterogeneous_layers_config_path": "layers.json",
    "use_mup": True,
    "mup_output_mult": 0.5,
    "num_unique_layers": 1,
}
LEARNED_ONLY: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "use_rotary_position_embeddings": True,
    "add_position_embedding": False,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": True,
}
GATED_ONLY: dict[str, Any] = {
    "swiglu": False,
    "normalization": "LayerNorm",
    "position_embedding_type": "yarn",
    "rope_type": "yarn",
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "rotary_seq_len_interpolation_factor": 4,
    "no_rope_freq": [0, 1],
    "mrope_section": [16, 24, 24],
}
OF_DIALECT = {"megatron-bert": LEARNED_ONLY, "megatron-gpt2": LEARNED_ONLY, "qwen2": GATED_ONLY}
REFUSED = [(f, n, v) for f, own in OF_DIALECT.items() for n, v in (OTHER_MODELS | own).items()]
# Of a run of 2024 and 2025, with an effect on it and none on what was saved.
HARMLESS: dict[str, Any] = {
    "lr": 3e-4,
    "lr_decay_style": "cosine",
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "train_iters": 500_000,
    "global_batch_size": 1024,
    "micro_batch_size": 1,
    "init_method_std": 0.02,
    "attention_dropout": 0.0,
    "data_path": ["0.6", "/data/web", "0.4", "/data/code"],
    "split": "99,1,0",
    "tokenizer_model": "/models/tokenizer",
    "tiktoken_num_special_tokens": 1000,
    "save": "/out",
    "ckpt_format": "torch",
    "dist_ckpt_strictness": "assume_ok_unexpected",
    "wandb_project": "pretraining",
    "tensorboard_dir": "/logs",
    "recompute_granularity": "selective",
    "recompute_modules": ["core_attn"],
    "overlap_grad_reduce": True,
    "use_distributed_optimizer": True,
    "sequence_parallel": True,
    "transformer_impl": "transformer_engine",
    "apply_rope_fusion": True,
    "masked_softmax_fusion": True,
    "moe_router_topk": 2,
    "moe_layer_freq": 1,
    "moe_token_dispatcher_type": "allgather",
    "kv_lora_rank": 32,
    "qk_head_dim": 128,
    "mscale": 1.0,
    "retro_encoder_layers": 2,
    "mtp_loss_scaling_factor": 0.1,
    "mup_width_mult": 1.0,
    "mamba_state_dim": 128,
    "window_size": (-1, 0),
    "softmax_type": "vanilla",
    "rope_scaling_factor": 8.0,
    "vision_backbone_type": "vit",
    "img_h": 224,
    "inference_max_seq_length": 2560,
    "distributed_timeout_minutes": 10,
    "profile_ranks": [0],
    "error_injection_type": "transient_error",
    "fork_switch": False,
    "fork_list": [],
    "fork_text": "",
    "fork_number": 0,
}


# Of runs of 2019 to 2022, as they stood in all of them or in many.
OLDER: dict[str, Any] = {
    "param_sharing_style": "grouped",
    "activations_checkpoint_method": "uniform",
    "activations_checkpoint_num_layers": 1,
    "distribute_checkpointed_activations": True,
    "no_async_tensor_model_parallel_allreduce": True,
    "resume_dataloader": True,
    "cpu_optimizer": True,
    "batch_size_thresholds": "0,1000",
    "DDP_impl": "local",
    "no_one_logger": True,
}


def plan_with(name: str, changes: dict[str, Any], **settings: Any) -> Plan:
    """The plan of a model of the family whose args have these too."""
    if name == "qwen2":
        tensors = {n: t.shape for n, t in Core(QWEN).rank(0, drawn("qwen", 0)).items()}
        file, told = {"release/mp_rank_00/model_optim_rng.pt": tensors}, Core(QWEN).args()
        source = held(file, {"args": {**told, **changes}, "checkpoint_version": 3.0})
    else:
        source, _ = original(name, told={**args(), **changes})
    return family(name).plan(source, Options(settings=settings))


@pytest.mark.parametrize(
    ("name", "argument", "value"), REFUSED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_an_argument_of_another_model_is_refused_by_name(name: str, argument: str, value: Any) -> None:
    with pytest.raises(CkptToolError) as caught:
        plan_with(name, {argument: value})
    problem = next(p for p in caught.value.problems if p.where == argument)
    assert problem.kind == "unsupported" and f"found {argument} = " in problem.message
    with pytest.raises(CkptToolError):  # nor can it be left out
        plan_with(name, {argument: value}, **{argument: None})


@pytest.mark.parametrize("name", OF_DIALECT)
def test_harmless_arguments_change_nothing(name: str) -> None:
    plain, full = plan_with(name, {}), plan_with(name, HARMLESS | OLDER)
    assert plain.digest() == full.digest()
    if name != "qwen2":
        once = args()["num_layers"]  # as the code of 2020 fills in
        assert plan_with(name, {"num_unique_layers": once}).digest() == plain.digest()
    noted = plan_with(name, {"fp8": "hybrid"})
    assert any("fp8" in note for note in noted.notes)


@pytest.mark.parametrize("value", [3, "sometimes", True, [0, 2]], ids=str)
@pytest.mark.parametrize("name", OF_DIALECT)
def test_an_argument_that_nothing_knows_is_refused_with_a_way_out(name: str, value: Any) -> None:
    with pytest.raises(CkptToolError) as caught:
        plan_with(name, {"fork_attention": value})
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("unsupported", "fork_attention")
    assert problem.hint and problem.hint.endswith("--set fork_attention=null")
    plan = plan_with(name, {"fork_attention": value}, fork_attention=None)
    assert any("is left out (--set fork_attention=null)" in note for note in plan.notes)
    with pytest.raises(CkptToolError) as caught:
        plan_with(name, {}, fork_attention=None)
    assert caught.value.kind == "usage"


@pytest.mark.parametrize("name", OF_DIALECT)
def test_one_epsilon_of_two_may_be_said(name: str) -> None:
    """Until 2025 `norm_epsilon` went before the other name, since then it is no longer read."""
    both, key = {"norm_epsilon": 1e-6, "layernorm_epsilon": 3e-4}, "layer_norm_eps"
    key = "rms_norm_eps" if name == "qwen2" else key
    with pytest.raises(CkptToolError) as caught:
        plan_with(name, both)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.hint) == ("bad-config", f"--set {key}=VALUE says which")
    assert "norm_epsilon = 1e-06 and layernorm_epsilon = 0.0003" in problem.message
    written = "layer_norm_epsilon" if name == "megatron-gpt2" else key
    assert plan_with(name, both, **{key: 3e-4}).config[written].value == 3e-4
    assert plan_with(name, both | {"norm_epsilon": 3e-4}).config[written].value == 3e-4


def test_what_is_left_out_is_recorded_and_verified(tmp_path: Path) -> None:
    core, source, out = Core(QWEN), tmp_path / "in", tmp_path / "out"
    told = {**core.args(), "fork_logger": "http"}
    write_file(source / "release" / "mp_rank_00", core.rank(0, drawn("qwen", 0)), told)
    (source / "latest_checkpointed_iteration.txt").write_text("release")
    code, text = said("convert", "qwen2", "--in", source, "--out", out)
    assert code == 2 and "args: fork_logger" in text and not out.exists()
    code, text = said("convert", "qwen2", "--in", source, "--out", out, "--set", "fork_logger=null")
    assert code == 0 and 'note args: fork_logger "http" is left out' in text
    code, text = said("verify", out, "--source", source, "--level", "coverage", "--level", "bits")
    assert code == 0 and "fork_logger = null" in text, text


def test_scaled_frequencies_of_core_are_those_of_llama(tmp_path: Path) -> None:
    source, out = case(ROPE, "scaled"), tmp_path / "out"
    code, text = said("convert", "qwen2", "--in", source, "--out", out)
    assert code == 0, text
    assert json.loads((out / "config.json").read_text())["rope_scaling"] == BLOCK
    code, text = said("verify", out, "--source", source, "--level", "parity")
    assert code == 0, text
    code, text = said("convert", "qwen2", "--to", "original", "--in", out, "--out", tmp_path / "back")
    assert code == 0, text
    with open_checkpoint(tmp_path / "back") as back:
        (file,) = back.files.values()
        told = file.metadata["args"].fields
    assert (told["use_rope_scaling"], told["rope_scaling_factor"]) == (True, 8.0)
    config = json.loads((out / "config.json").read_text()) | {"rope_scaling": None}
    (out / "config.json").write_text(json.dumps(config))
    assert said("verify", out, "--source", source, "--level", "parity")[0] == 1


@pytest.mark.parametrize(
    ("folder", "argument", "value"),
    [
        ("scaled_32", "rope_scaling_factor", "32.0"),
        ("no_rope_freq", "no_rope_freq", "[0, 1]"),
        ("softmax_off_by_one", "softmax_type", "off-by-one"),
    ],
)
def test_other_frequencies_and_softmaxes_are_refused(
    folder: str, argument: str, value: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, text = said("convert", "qwen2", "--in", case(ROPE, folder), "--out", out)
    assert code == 2 and f"unsupported: error[unsupported]: args: {argument}:" in text and value in text, text
    assert not out.exists()
    if folder == "scaled_32":
        block = text.split("--set '")[1].split("'")[0]
        code, text = said("convert", "qwen2", "--in", case(ROPE, folder), "--out", out, "--set", block)
        assert code == 0, text
        assert json.loads((out / "config.json").read_text())["rope_scaling"] == BLOCK | {"factor": 32.0}
        assert said("verify", out, "--source", case(ROPE, folder), "--level", "parity")[0] == 0


def test_a_plain_run_converts_as_before(tmp_path: Path) -> None:
    code, text = said("convert", "qwen2", "--in", case(ROPE, "plain"), "--out", tmp_path / "out")
    assert code == 0, text
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("rope_scaling") is None
