"""Where the hyper-parameters of Megatron-Core's checkpoints come from when they are not in its files: a run's
YAML beside the weights, archives of NeMo 1, folders of NeMo 2. The same weights come out as with args."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ckpt_tool import api
from ckpt_tool.checkpoint.run_documents import run_documents
from ckpt_tool.checkpoint.safe_yaml import read_yaml
from ckpt_tool.convert.dialects.megatron_settings import _resolved
from ckpt_tool.reference.megatron_documents import _nemo_1
from tests.conftest import Written
from tests.test_dcp import Chunk, refused, save
from tests.test_torch_dist import joined, loaded

Args = dict[str, Any]


def call(target: str, **more: Any) -> Args:
    """A record of something that a program would call."""
    return {"_call_": False, "_target_": target, **more}


def args_of(source: Path) -> Args:
    return dict(vars(loaded(source)[0]["args"]))


def provider(args: Args, **more: Any) -> Args:
    """What Megatron-Bridge dumps of its provider, from args."""
    return {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        **{n: args[n] for n in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
        **{n: args[n] for n in ("num_query_groups", "kv_channels", "rotary_base", "normalization")},
        **{n: args[n] for n in ("add_bias_linear", "add_qkv_bias", "qk_layernorm", "rotary_percent")},
        "activation_func": call("torch.nn.functional.silu"),
        "gated_linear_unit": True,
        "layernorm_epsilon": args["norm_epsilon"],
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": not args["untie_embeddings_and_output_weights"],
        "seq_length": args["max_position_embeddings"],
        "vocab_size": args["padded_vocab_size"],
        "params_dtype": call("torch.float32"),
        "init_method": {"_target_": "torch.nn.init.normal_", "_partial_": True, "_args_": [], "std": 0.02},
        "attention_backend": {"_target_": "megatron.core.transformer.enums.AttnBackend", "_args_": [5]},
        "transformer_layer_spec": call("megatron.bridge.models.gpt_provider.default_layer_spec"),
        "generation_config": {**call("transformers.GenerationConfig.from_dict"), "config_dict": {"top_k": 5}},
        "scale_factor": None,
        "window_size": None,
        "moe_router_topk": 2,
        "tensor_model_parallel_size": args["tensor_model_parallel_size"],
        **more,
    }


def nemo_1(args: Args, **more: Any) -> Args:
    """What NeMo 1 writes into an archive's model_config.yaml."""
    return {
        "mcore_gpt": True,
        "encoder_seq_length": args["max_position_embeddings"],
        "max_position_embeddings": "${.encoder_seq_length}",
        **{n: args[n] for n in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
        **{n: args[n] for n in ("num_query_groups", "kv_channels", "rotary_base", "qk_layernorm")},
        "tensor_model_parallel_size": args["tensor_model_parallel_size"],
        "normalization": "rmsnorm",
        "layernorm_epsilon": args["norm_epsilon"],
        "bias": False,
        "qkv_bias": args["add_qkv_bias"],
        "activation": "fast-swiglu",
        "rotary_percentage": 1.0,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": not args["untie_embeddings_and_output_weights"],
        "apply_query_key_layer_scaling": True,
        "megatron_amp_O2": True,
        "tokenizer": {"library": "sentencepiece", "model": "nemo:0_tokenizer.model"},
        "optim": {"name": "fused_adam", "lr": 2e-4},
        "precision": "bf16",
        **more,
    }


def bare(source: Path, folder: Path) -> Path:
    """The torch_dist folder of the ranks in `source` without its args."""
    joined(source, folder)
    common = folder / "iter_0000100" / "common.pt"
    torch.save({"iteration": 100}, common)
    return folder


def with_yaml(folder: Path, name: str, value: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(yaml.safe_dump(dict(value)))
    return folder


def archived(parts: Mapping[str, bytes], path: Path, mode: str = "w") -> Path:
    """A tar of these files, named as NeMo does, with the entry of its folder."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        root = tarfile.TarInfo("./")
        root.type = tarfile.DIRTYPE
        tar.addfile(root)
        for name, data in parts.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def below(folder: Path, under: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.iterdir()):
        yield under + path.name, path.read_bytes()


def same(out: Path, reference: Path) -> None:
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (reference / file).read_bytes(), file


@pytest.mark.parametrize(("variant", "family"), [("qwen3-mcore", "qwen3"), ("llama-mcore", "llama")])
def test_a_run_config_stands_for_the_args(
    variant: str, family: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    args = args_of(originals(variant))
    source = bare(originals(variant), tmp_path / "in")
    inner = with_yaml(source / "iter_0000100", "run_config.yaml", {"model": provider(args), "train": None})
    made = api.convert(source, tmp_path / "out", family=family)
    same(tmp_path / "out", conversions(variant))
    said = {n: v.source for n, v in made.plan.config.items()}
    assert said["max_position_embeddings"] == "run_config.yaml: seq_length"
    assert said["rms_norm_eps"] == "run_config.yaml: layernorm_epsilon"
    assert said["hidden_act"] == "run_config.yaml: activation_func"
    assert api.verify(tmp_path / "out", source).status == "pass"
    api.convert(inner, tmp_path / "of-iteration", family=family)
    same(tmp_path / "of-iteration", conversions(variant))


def ranks_of_nemo(source: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    for k, file in enumerate(loaded(source)):
        named = {f"{prefix}{name}": value for name, value in file["model"].items()}
        yield f"mp_rank_{k:02d}/model_weights.ckpt", saved(named)


@pytest.mark.parametrize("kind", ["ranks", "ranks-gz", "joined-gz", "joined"])
def test_an_archive_of_nemo_1_is_the_model(
    kind: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    source = originals("llama-mcore")
    config = yaml.safe_dump(nemo_1(args_of(source))).encode()
    if kind.startswith("ranks"):
        weights = dict(ranks_of_nemo(source, "model.module."))
    else:
        weights = dict(below(bare(source, tmp_path / "in") / "iter_0000100", "model_weights/"))
    mode = "w:gz" if kind.endswith("gz") else "w"
    path = archived({"model_config.yaml": config, **weights}, tmp_path / "a.nemo", mode)
    made = api.convert(path, tmp_path / "out", family="llama")
    same(tmp_path / "out", conversions("llama-mcore"))
    assert made.plan.config["rms_norm_eps"].source == "model_config.yaml: layernorm_epsilon"
    if kind == "joined":
        assert api.verify(tmp_path / "out", path).status == "pass"


def test_one_file_of_an_archive_that_was_unpacked(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """In stages and ranks of NeMo's names; with one of them missing, its config tells."""
    source = originals("qwen3-mcore")
    folder = with_yaml(tmp_path / "in", "model_config.yaml", nemo_1(args_of(source)))
    for k, file in enumerate(loaded(source)):
        at = folder / f"tp_rank_{k:02d}_pp_rank_000"
        at.mkdir()
        torch.save({f"model.{n}": x for n, x in file["model"].items()}, at / "model_weights.ckpt")
    api.convert(folder, tmp_path / "out", family="qwen3")
    same(tmp_path / "out", conversions("qwen3-mcore"))
    shutil.rmtree(folder / "tp_rank_01_pp_rank_000")
    error = refused(lambda: api.plan(folder, family="qwen3"))
    assert error.kind == "missing-shard" and "model_config.yaml: tensor_model_parallel_size" in str(error)


def test_a_folder_of_nemo_2_is_the_model(originals: Written, conversions: Written, tmp_path: Path) -> None:
    source = originals("llama-mcore")
    folder = tmp_path / "in"
    shutil.copytree(bare(source, tmp_path / "run") / "iter_0000100", folder / "weights")
    config = provider(args_of(source), _target_="nemo.collections.llm.gpt.model.llama.Llama3Config8B")
    with_yaml(folder / "context", "model.yaml", {"config": config})
    (folder / "context" / "io.json").write_text("{}")
    for given in (folder, folder / "weights"):
        out = tmp_path / f"of-{given.name}"
        made = api.convert(given, out, family="llama")
        same(out, conversions("llama-mcore"))
        assert made.plan.config["rope_theta"].source == "context/model.yaml: rotary_base"
    (folder / "context" / "model.yaml").unlink()
    error = refused(lambda: api.plan(folder, family="llama"))
    assert error.kind == "missing-file" and "context/model.yaml" in str(error)


REFUSED: dict[str, tuple[Args, str]] = {
    "norm": ({"normalization": "LayerNorm"}, "run_config.yaml: normalization"),
    "gelu": ({"activation_func": call("torch.nn.functional.gelu")}, "run_config.yaml: activation_func"),
    "ungated": ({"gated_linear_unit": False}, "run_config.yaml: gated_linear_unit"),
    "window": ({"window_size": [4096, 0]}, "run_config.yaml: window_size"),
    "unknown": ({"twist": 3}, "--set twist=null"),
    "class": ({"_target_": "a.b.GemmaModelProvider"}, "_target_"),
    "layers": ({"transformer_layer_spec": call("my.own_spec")}, "transformer_layer_spec"),
    "divided": ({"seq_len_interpolation_factor": 4}, "run_config.yaml: seq_len_interpolation_factor"),
    "both": ({"rope_scaling": True, "scale_factor": 8.0}, "run_config.yaml: rope_scaling"),
    "text": ({"hidden_size": "wide"}, "run_config.yaml: hidden_size"),
    "share": ({"rotary_percent": None}, "run_config.yaml: rotary_percent: expected rotary positions on all"),
    "nan": ({"rotary_base": float("nan")}, "run_config.yaml: rotary_base: expected a finite number above 0"),
    "scaled": ({"softmax_scale": 0.3}, "expected no scale of its own before the softmax"),
    "null": (
        {"normalization": None, "activation_func": None},
        "found none of normalization, activation_func",
    ),
    "args": ({"norm_epsilon": 0.5}, "run_config.yaml: norm_epsilon: expected fields of the model's class"),
    "tied": ({"share_embeddings_and_output_weights": "no"}, "share_embeddings_and_output_weights"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_change_the_numbers_is_refused_by_name(
    what: str, originals: Written, tmp_path: Path
) -> None:
    changed, said = REFUSED[what]
    source = bare(originals("llama-mcore"), tmp_path / "in")
    config = provider(args_of(originals("llama-mcore")), **changed)
    with_yaml(source / "iter_0000100", "run_config.yaml", {"model": config})
    error = refused(lambda: api.plan(source, family="llama"))
    assert said in error.text(), error.text()


def test_places_that_contradict_are_named(originals: Written, tmp_path: Path) -> None:
    source = joined(originals("llama-mcore"), tmp_path / "in")
    config = provider(args_of(originals("llama-mcore")), rotary_base=10000)
    with_yaml(source / "iter_0000100", "run_config.yaml", {"model": config})
    error = refused(lambda: api.plan(source, family="llama"))
    assert error.kind == "config-mismatch"
    assert "run_config.yaml: rotary_base: expected 51250.0 as args (rotary_base) says" in error.text()


SCALED = {"scale_factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
BLOCK = {
    "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip


@pytest.mark.parametrize("said", [SCALED, {"rope_scaling": True, "rope_scaling_factor": 32.0}])
def test_stretched_frequencies_are_those_that_were_applied(
    said: Args, originals: Written, tmp_path: Path
) -> None:
    """Which a program hands on as it says, unlike args of use_rope_scaling."""
    source = bare(originals("llama-mcore"), tmp_path / "in")
    config = provider(args_of(originals("llama-mcore")), **said)
    with_yaml(source / "iter_0000100", "run_config.yaml", {"model": {"transformer": config, "seq_length": 9}})
    api.convert(source, tmp_path / "out", family="llama")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_scaling"] == BLOCK and written["max_position_embeddings"] == 4096
    report = api.verify(tmp_path / "out", source)
    assert report.status == "pass" and "parity" not in report.headline


def test_what_nemo_1_does_not_say_is_as_its_code_has_it(originals: Written, tmp_path: Path) -> None:
    config = nemo_1(args_of(originals("llama-mcore")))
    del config["rotary_base"], config["layernorm_epsilon"], config["share_embeddings_and_output_weights"]
    weights = dict(ranks_of_nemo(originals("llama-mcore"), "model."))
    parts = {"model_config.yaml": yaml.safe_dump(config).encode(), **weights}
    plan = api.plan(archived(parts, tmp_path / "a.nemo"), family="llama", options=api.Options(
        settings={"tie_word_embeddings": False}))  # fmt: skip
    assert plan.config["rope_theta"].value == 10000
    assert plan.config["rope_theta"].source == "model_config.yaml: rotary_base (NeMo's default)"
    assert plan.config["rms_norm_eps"].value == 1e-5
    for name, value in {"normalization": None, "norm_epsilon": 0.5}.items():
        wrong = yaml.safe_dump({**config, name: value}).encode()
        path = archived({**parts, "model_config.yaml": wrong}, tmp_path / f"{name}.nemo")
        assert (
            f"model_config.yaml: {name}: " in refused(lambda path=path: api.plan(path, family="llama")).text()
        )  # type: ignore[misc]
    del config["bias"]
    parts["model_config.yaml"] = yaml.safe_dump(config).encode()
    error = refused(lambda: api.plan(archived(parts, tmp_path / "b.nemo"), family="llama"))
    assert "bias (NeMo's default)" in error.text()


@pytest.mark.parametrize("word", ["cfg", "model"])
def test_the_model_s_part_of_a_whole_run_is_read(word: str, originals: Written, tmp_path: Path) -> None:
    """Lightning's hparams.yaml has the model below `cfg` (NVIDIA-NeMo/Speech#4993), a run's below `model`."""
    config = nemo_1(args_of(originals("qwen3-mcore")))
    weights = dict(ranks_of_nemo(originals("qwen3-mcore"), "model."))
    plans = []
    for k, document in enumerate((config, {word: config, "trainer": {"devices": 8}})):
        parts = {"model_config.yaml": yaml.safe_dump(document).encode(), **weights}
        plans.append(api.plan(archived(parts, tmp_path / f"{k}.nemo"), family="qwen3"))
        assert _nemo_1(document) == _nemo_1(config)  # of the original's own reading
    assert plans[0].config == plans[1].config


def test_references_and_products_in_nemo_s_yaml() -> None:
    """NVIDIA's configurations have `ffn_hidden_size: ${multiply:4, ${.hidden_size}}`."""
    said = {
        "hidden_size": 56,
        "a": "${.hidden_size}",
        "b": "${multiply:4, ${.hidden_size}}",
        "c": "${data.x}",
    }
    assert _resolved(said) == {"hidden_size": 56, "a": 56, "b": 224, "c": "${data.x}"}
    for value in ("${.none}", "${.a}", "${multiply:4, ${.name}}", "${multiply:2, ${.x}}"):
        wrong = {**said, "name": "t", "x": value}
        assert "which stands for none" in refused(lambda wrong=wrong: _resolved(wrong)).text()  # type: ignore[misc]


BAD_YAML = {
    "a: !!python/object/apply:os.system [ls]\n": "the tag !!python/object/apply:os.system",
    "a: &a [x]\nb: [*a, *c]\n": "an anchor called c",
    "a: 1\na: 2\n": "found a twice",
    "<<: {a: 1}\n": "a merge key",
    "a: " + "[" * 5000 + "]" * 5000: "levels of YAML",
    "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}x]\n" for i in range(8)): "aliases",
    "a: " + "9" * 5000: "expected int",
    "a: 18446744073709551615\n": "64 bits",
    "- 1\n": "a mapping of settings",
    "a: b: c": "found mapping values are not allowed",
    "---\na: 1\n---\nb: 2\n": "one YAML document, found 2",
    "a: '" + "x" * (4 << 20) + "'": "at most 4194304 bytes",
}


@pytest.mark.parametrize("text", BAD_YAML, ids=range(len(BAD_YAML)))
def test_yaml_is_read_as_data(text: str) -> None:
    assert BAD_YAML[text] in refused(lambda: read_yaml(text.encode(), file="a.yaml")).text()


def test_numbers_of_yaml_are_those_that_people_mean() -> None:
    """PyYAML reads 1e-5 as text."""
    text = b"a: 1e-5\nb: '1e-5'\nc: 1.0e-05\nd: 2020-01-01\ne: &x [1, null]\nf: *x\n1: true\n"
    assert read_yaml(text, file="a.yaml") == {
        "a": 1e-5, "b": "1e-5", "c": 1e-5, "d": "2020-01-01", "e": [1, None], "f": [1, None], "1": True,
    }  # fmt: skip


# --- DeepSpeed ------------------------------------------------------------------------------------------


def deepspeed(source: Path, folder: Path, **beside: Any) -> Path:
    """What DeepSpeed 0.19.8 saves of a model in ZeRO 2, over two processes."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    module = {n: x for f in sorted(source.glob("*.safetensors")) for n, x in load_file(f).items()}
    state = {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{n: x.shape for n, x in module.items()}],
        "dp_world_size": 2,
        "mp_world_size": 1,
        "ds_config": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
        "ds_version": "0.19.8",
        **beside,
    }
    torch.save(state, step / "mp_rank_00_model_states.pt")
    for k in range(2):
        torch.save({"ds_version": "0"}, step / f"bf16_zero_pp_rank_{k}_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text("global_step7")
    (folder / "zero_to_fp32.py").write_text("raise SystemExit\n")
    for document in source.glob("*.json"):
        if "index" not in document.name:
            shutil.copy(document, folder)
    return folder


def test_the_module_of_deepspeed_is_the_model(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    source = deepspeed(originals("qwen2-0.5b"), tmp_path / "in")
    step = source / "global_step7"
    for k, given in enumerate((source, step, step / "mp_rank_00_model_states.pt")):
        made = api.convert(given, tmp_path / f"out{k}", family="qwen2")
        same(tmp_path / f"out{k}", conversions("qwen2-0.5b"))
        assert any("in float32 are read where" in note for note in made.opened)
    assert api.verify(tmp_path / "out0", source).status == "pass"
    shutil.copytree(step, source / "global_step8")
    api.plan(source, family="qwen2")
    (source / "latest").write_text("../elsewhere")
    assert refused(lambda: api.plan(source, family="qwen2")).kind == "ambiguous-input"


@pytest.mark.parametrize(("kind", "inside"), [("zip", "run"), ("zip", "."), ("tar", "run"), ("gztar", "run")])
def test_the_folder_of_deepspeed_may_be_in_an_archive(
    kind: str, inside: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    source = deepspeed(originals("qwen2-0.5b"), tmp_path / "a" / "run")
    root = tmp_path / "a" if inside == "run" else source
    archive = shutil.make_archive(str(tmp_path / "packed"), kind, root, inside)
    api.convert(archive, tmp_path / "out", family="qwen2")
    same(tmp_path / "out", conversions("qwen2-0.5b"))
    (source / "global_step7" / "layer_0_expert_1_mp_rank_00_model_states.pt").write_bytes(b"x")
    archive = shutil.make_archive(str(tmp_path / "parts"), kind, root, inside)
    assert refused(lambda: api.plan(archive, family="qwen2")).kind == "wrong-format"


def test_parts_of_a_model_of_deepspeed_are_refused_by_name(originals: Written, tmp_path: Path) -> None:
    source = deepspeed(originals("qwen2-0.5b"), tmp_path / "in")
    step = source / "global_step7"
    shutil.copy(step / "mp_rank_00_model_states.pt", step / "mp_rank_01_model_states.pt")
    for given in (source, step, step / "mp_rank_01_model_states.pt"):
        error = refused(lambda given=given: api.plan(given, family="qwen2"))  # type: ignore[misc]
        assert error.kind == "unsupported" and "one model-parallel rank" in error.text()
    (step / "mp_rank_01_model_states.pt").unlink()
    (step / "layer_0_expert_1_mp_rank_00_model_states.pt").write_bytes(b"x")
    assert "experts" in refused(lambda: api.plan(step, family="qwen2")).text()
    for name in [*step.iterdir()]:
        name.unlink()
    share = step / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": {"a": torch.zeros(0)}}, share)
    for given in (source, step, share):
        error = refused(lambda given=given: api.plan(given, family="qwen2"))  # type: ignore[misc]
        assert "*_optim_states.pt of all ranks" in (error.problems[0].hint or "")
    alone = deepspeed(originals("qwen2-0.5b"), tmp_path / "two", mp_world_size=2)
    error = refused(lambda: api.plan(alone, family="qwen2"))
    assert error.kind == "unsupported" and "mp_world_size 2" in error.text()


# --- integrity.json -------------------------------------------------------------------------------------


def test_files_are_those_that_megatron_listed(originals: Written, tmp_path: Path) -> None:
    source = joined(originals("llama-mcore"), tmp_path / "in")
    inner = source / "iter_0000100"
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in inner.iterdir()}
    listed = inner / "integrity.json"

    def told(**more: Any) -> str:
        listed.write_text(json.dumps({"algorithm": "sha256", "files": {**sums, **more}}))
        return " ".join(api.plan(source, family="llama").notes)

    assert f"the SHA-256 of all {len(sums)} files of the weights agree" in told()
    for name in ("__0_0.distcp", ".metadata"):  # what it does not list is not said to agree
        digest = sums.pop(name)
        assert f"files agree; it lists nothing of {name}" in told()
        sums[name] = digest
    assert "lists __9_9.distcp, which no tensor lies in" in told(**{"__9_9.distcp": "0" * 64})
    told(**{"run_config.yaml": "0" * 64})  # not there, and nothing of the weights
    with_yaml(inner, "run_config.yaml", {"model": provider(args_of(originals("llama-mcore")))})
    assert "run_config.yaml is another than" in told(**{"run_config.yaml": "0" * 64})  # changed on purpose
    common = (inner / "common.pt").read_bytes()
    (inner / "common.pt").write_bytes(common + b"x")
    assert refused(told).problems[0].file == "common.pt"
    (inner / "common.pt").write_bytes(common)
    data = inner / "__0_0.distcp"
    right = data.read_bytes()
    data.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    error = refused(told)
    assert error.kind == "checksum" and error.problems[0].file == "__0_0.distcp"
    data.write_bytes(right)
    for name, digest in (("../x", "0" * 64), ("a", "0" * 63), ("b", 5)):
        assert refused(lambda n=name, d=digest: told(**{n: d})).kind == "bad-config"  # type: ignore[misc]
    listed.write_text('{"files": {}}')
    assert "lists no file" in " ".join(api.plan(source, family="llama").notes)
    listed.write_text('{"algorithm": "md5", "files": {}}')
    assert refused(lambda: api.plan(source, family="llama")).kind == "unsupported"


# --- what is not read -----------------------------------------------------------------------------------


def test_other_formats_of_megatron_are_refused_by_name(originals: Written, tmp_path: Path) -> None:
    source = joined(originals("llama-mcore"), tmp_path / "in")
    common = source / "iter_0000100" / "common.pt"
    for asked in ("fsdp_dtensor", "torch_dcp"):
        args = argparse.Namespace(**{**args_of(originals("llama-mcore")), "ckpt_format": asked})
        torch.save({"args": args}, common)
        error = refused(lambda: api.plan(source, family="llama"))
        assert error.kind == "unsupported" and f"its format {asked}" in error.text()


def test_layers_of_a_hybrid_model_are_refused_by_name(tmp_path: Path) -> None:
    x = torch.ones(4, 4)
    names = ("embedding.word_embeddings", "decoder.layers.0.self_attention.linear_qkv", "decoder.final_norm",
             "decoder.layers.1.mlp.linear_fc1", "output_layer")  # fmt: skip
    save(
        tmp_path / "in",
        {f"{n}.weight": [Chunk((0, 0), x)] for n in names},
        {f"{n}.weight": (4, 4) for n in names},
    )
    error = refused(lambda: api.plan(tmp_path / "in", family="llama"))
    assert "HybridModel" in error.text() and "Megatron-Bridge" in error.text()


def test_models_of_nemo_that_are_no_gated_decoders_are_refused(originals: Written, tmp_path: Path) -> None:
    """Whose rows of query_key_value would be read as those of version 0."""
    with api.open_checkpoint(originals("gpt2-2023-float32")) as checkpoint:
        names = {t.name: torch.zeros(t.shape) for t in checkpoint}
    flat = {n if n.startswith("model.") else f"model.{n}": x for n, x in names.items()}
    parts = {"model_config.yaml": b"mcore_gpt: false\n", "model_weights.ckpt": saved(flat)}
    error = refused(lambda: api.plan(archived(parts, tmp_path / "a.nemo"), family="megatron-gpt2"))
    assert error.kind == "unsupported" and "convert_gpt_nemo_to_mcore.py" in error.text()


# --- tokenizers -----------------------------------------------------------------------------------------

VOCABULARY = b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'


def test_tokenizers_around_the_weights_are_carried(originals: Written, tmp_path: Path) -> None:
    """Of Megatron-Bridge and NeMo 2 in folders, of NeMo 1 under names that begin with an MD5."""
    source = originals("llama-mcore")
    bridge = bare(source, tmp_path / "bridge")
    inner = bridge / "iter_0000100"
    with_yaml(inner, "run_config.yaml", {"model": provider(args_of(source))})
    (inner / "tokenizer").mkdir()
    (inner / "tokenizer" / "tokenizer.json").write_bytes(VOCABULARY)
    nemo = tmp_path / "nemo"
    shutil.copytree(inner, nemo / "weights", ignore=shutil.ignore_patterns("tokenizer", "*.yaml"))
    with_yaml(nemo / "context", "model.yaml", {"config": provider(args_of(source))})
    (nemo / "context" / "nemo_tokenizer").mkdir()
    (nemo / "context" / "nemo_tokenizer" / "tokenizer.json").write_bytes(VOCABULARY)
    md5 = "0123456789abcdef" * 2
    parts = {"model_config.yaml": yaml.safe_dump(nemo_1(args_of(source))).encode()}
    parts |= {f"{md5}_tokenizer.json": VOCABULARY, **dict(ranks_of_nemo(source, "model."))}
    for given in (bridge, inner, nemo, nemo / "weights", archived(parts, tmp_path / "a.nemo", "w:gz")):
        plan = api.plan(given, family="llama")
        (found,) = (d for d in plan.documents if d.name == "tokenizer.json")
        assert found.content == VOCABULARY


def test_of_several_sentencepiece_models_none_is_taken(tmp_path: Path) -> None:
    one, other = "a" * 32, "b" * 32
    assert run_documents([f"{one}_x.model"], "") == {"tokenizer.model": f"{one}_x.model"}
    assert run_documents([f"{one}_x.model", f"{other}_x.model"], "") == {"tokenizer.model": f"{one}_x.model"}
    assert run_documents([f"{one}_x.model", f"{other}_y.model"], "") == {}
    assert run_documents([f"{one}_tokenizer.model", f"{other}_y.model"], "") == {
        "tokenizer.model": f"{one}_tokenizer.model"
    }
    assert run_documents(["context/any.model", "weights/x"], "weights/") == {
        "tokenizer.model": "context/any.model"
    }


def test_a_dump_that_is_not_whole_is_refused(originals: Written, tmp_path: Path) -> None:
    """The class of a model may have other defaults than Megatron-Core's."""
    source = bare(originals("llama-mcore"), tmp_path / "in")
    config = provider(args_of(originals("llama-mcore")))
    del config["rotary_base"], config["normalization"]
    with_yaml(source / "iter_0000100", "run_config.yaml", {"model": config})
    error = refused(lambda: api.plan(source, family="llama"))
    assert error.kind == "missing-fact" and "found none of normalization, rotary_base" in error.text()
    unknown = provider(args_of(originals("llama-mcore")), twist=3)
    with_yaml(source / "iter_0000100", "run_config.yaml", {"model": unknown})
    made = api.plan(source, family="llama", options=api.Options(settings={"twist": None}))
    assert any(note.startswith("run_config.yaml: twist 3 is left out") for note in made.notes)
