"""Checkpoints as programs beside transformers write and keep them, each kind with the report that it is built
after: read where it can be, else named in one sentence with what leads out of it."""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.checkpoint import signs
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.errors import CkptToolError, Problem
from tests import world
from tests.test_world_reports import Written, refusal

Q, L = "qwen2-0.5b", "llama-3-8b"
Store = Callable[[Mapping[str, torch.Tensor], Path], object]


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "in"))


def only(folder: Path, family: str, tmp_path: Path) -> Problem:
    (problem,) = refusal(folder, family, tmp_path).problems
    assert problem.hint
    return problem


def in_two(folder: Path, names: tuple[str, str], index: str | None, save: Store = torch.save) -> None:
    """model.safetensors of `folder` as two files, listed in `index`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = sorted(tensors)[: len(tensors) // 2]
    where = {k: names[k not in half] for k in tensors}
    for name in names:
        save({k: v for k, v in tensors.items() if where[k] == name}, folder / name)
    if index is not None:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def with_number_keys(file: Path) -> None:
    """A torch file whose pickle names storages by numbers, as LitGPT's incremental_save writes them."""
    with zipfile.ZipFile(file) as old:
        members = {i.filename: old.read(i) for i in old.infolist()}
    for name, data in members.items():
        if name.endswith("data.pkl"):
            for n in range(100):
                word = str(n).encode()
                text = b"X" + len(word).to_bytes(4, "little") + word
                data = data.replace(text, b"K" + bytes([n]))
            members[name] = data
    with zipfile.ZipFile(file, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)


# --- what is read ---------------------------------------------------------------------------------------


def test_storages_that_are_numbers(originals: Written, tmp_path: Path) -> None:
    """`litgpt convert_from_litgpt` writes model.pth so (Lightning-AI/litgpt#1359, #1871); torch reads it."""
    source = copied(originals(Q), tmp_path)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "model.pth")
    with_number_keys(source / "model.pth")
    assert world.equal(torch.load(source / "model.pth"), tensors)
    made = api.convert(source / "model.pth", tmp_path / "out", family="qwen2")
    assert world.equal(world.tensors_of(made.out), tensors)


@pytest.mark.parametrize(
    ("names", "index"),
    [
        (("model-00001-of-00002.bin", "model-00002-of-00002.bin"), "pytorch_model.bin.index.json"),
        (("model-00001-of-00002.bin", "model-00002-of-00002.bin"), None),
        (("hf_model_0001_0.pt", "hf_model_0002_0.pt"), "pytorch_model.bin.index.json"),
        (("hf_model_0001_0.pt", "hf_model_0002_0.pt"), "model.safetensors.index.json"),
        (("pytorch_model-00001.bin", "pytorch_model-00002.bin"), "pytorch_model.bin.index.json"),
    ],
)
@pytest.mark.parametrize("single", [False, True])
def test_an_index_says_which_files_are_the_model(
    names: tuple[str, str], index: str | None, single: bool, originals: Written, tmp_path: Path
) -> None:
    """torchtune's names of 2024 and 2025 (meta-pytorch/torchtune#878, #958, #1068), ColossalAI's."""
    source = copied(originals(Q), tmp_path)
    in_two(source, names, index)
    torch.save({"other": torch.ones(2)}, source / "recipe_state.pt")
    made = api.convert(source / names[1] if single else source, tmp_path / "out", family="qwen2")
    assert world.equal(world.tensors_of(made.out), world.tensors_of(originals(Q)))


def test_what_an_index_lists_and_is_not_there(originals: Written, tmp_path: Path) -> None:
    source = copied(originals(Q), tmp_path)
    in_two(source, ("a.pt", "b.pt"), "pytorch_model.bin.index.json")
    (source / "b.pt").unlink()
    problem = only(source, "qwen2", tmp_path)
    assert (problem.kind, problem.message) == ("bad-index", "expected b.pt, found no such file")
    assert problem.hint == "download what is missing too"


@pytest.mark.parametrize("said", ["../x.pt", 'a.pt", oops', "a.pt/"])
def test_a_broken_index_keeps_nobody_from_a_file_that_it_does_not_name(
    said: str, originals: Written, tmp_path: Path
) -> None:
    source = copied(originals(Q), tmp_path)
    (source / "model.safetensors").rename(source / "own.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"a": "{said}"}}}}')
    assert len(api.plan(source / "own.safetensors").steps) > 10
    index.write_text(f'{{"weight_map": {{"b": "own.safetensors", "a": "{said}"}}}}')
    assert refusal(source / "own.safetensors", "qwen2", tmp_path).kind == "bad-index"


def test_many_files_of_an_index_that_are_not_there_are_counted(tmp_path: Path) -> None:
    names = [f"{i}.pt" for i in range(100_000)]
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CkptToolError) as caught:
        open_checkpoint(tmp_path)
    told = [p.message for p in caught.value.problems]
    assert told[:10] == [f"expected {name}, found no such file" for name in names[:10]]
    assert told[10:] == ["expected 99990 more files, found none of them"]


def test_the_text_of_an_error_is_bounded_by_the_number_of_its_problems() -> None:
    error = CkptToolError(*[Problem("bad-index", f"expected {i}, found none") for i in range(5000)])
    assert str(error).splitlines()[-2:] == [
        "error[bad-index]: expected 999, found none",
        "(+4000 more problems)",
    ]


@pytest.mark.parametrize("name", ["consolidated.00.safetensors", "model-00001-of-00001.bin"])
def test_an_original_under_names_of_other_formats(name: str, originals: Written, tmp_path: Path) -> None:
    """torchtune's FullModelMetaCheckpointer; ranks that somebody saved as safetensors."""
    source = copied(originals(L), tmp_path)
    tensors = torch.load(source / "consolidated.00.pth")
    (source / "consolidated.00.pth").unlink()
    world.save(tensors, source / name)
    made = api.convert(source, tmp_path / "out", family="llama")
    plain = api.convert(originals(L), tmp_path / "plain", family="llama")
    assert world.equal(world.tensors_of(made.out), world.tensors_of(plain.out))


def assert_converts_whole_only(source: Path, original: Path, rank: str, tmp_path: Path) -> None:
    """`source` becomes what `original` does, and without that rank nothing."""
    made = api.convert(source, tmp_path / "out", family="llama")
    plain = api.convert(original, tmp_path / "plain", family="llama")
    assert world.equal(world.tensors_of(made.out), world.tensors_of(plain.out))
    (source / rank).unlink()
    shutil.rmtree(made.out)
    assert only(source, "llama", tmp_path).kind == "missing-shard"


def test_ranks_as_safetensors_are_ranks(originals: Written, tmp_path: Path) -> None:
    source = copied(originals("llama-1-13b").parent, tmp_path) / originals("llama-1-13b").name
    for file in source.glob("*.pth"):
        world.save(torch.load(file), file.with_suffix(".safetensors"))
        file.unlink()
    assert_converts_whole_only(source, originals("llama-1-13b"), "consolidated.00.safetensors", tmp_path)


def test_ranks_of_llama2_accessory(originals: Written, tmp_path: Path) -> None:
    """Alpha-VLLM/LLaMA2-Accessory#87: consolidated.KK-of-NN.model.pth, and `llma.` before every name."""
    source = copied(originals("llama-1-13b").parent, tmp_path) / originals("llama-1-13b").name
    for k, file in enumerate(sorted(source.glob("*.pth"))):
        weights = {f"llma.{name}": t for name, t in torch.load(file).items()}
        torch.save({"model": weights}, source / f"consolidated.{k:02}-of-02.model.pth")
        file.unlink()
    assert_converts_whole_only(source, originals("llama-1-13b"), "consolidated.01-of-02.model.pth", tmp_path)


@pytest.mark.parametrize("index", [False, True])
def test_an_adapter_beside_its_merged_model_is_noted(index: bool, originals: Written, tmp_path: Path) -> None:
    """torchtune's LoRA recipes write both into one folder."""
    source = copied(originals(Q), tmp_path)
    if index:
        in_two(source, ("a.bin", "b.bin"), "pytorch_model.bin.index.json")
    else:
        (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / "adapter_config.json").write_text("{}")
    made = api.convert(source, tmp_path / "out", family="qwen2")
    assert any("adapter" in note and "not merged" in note for note in made.opened)


# --- what is named --------------------------------------------------------------------------------------


def test_an_unpacked_torch_file_is_packed_again(originals: Written, tmp_path: Path) -> None:
    """Programs of macOS unpack what is a zip, whatever it is called (tinygrad/tinygrad#446 is about one)."""
    source = copied(originals(L), tmp_path)
    file = source / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        archive.extractall(source / "consolidated.00")
    file.unlink()
    problem = only(source, "llama", tmp_path)
    assert (
        problem.kind == "wrong-format"
        and "unpacked" in problem.message
        and "zip -0 -r" in (problem.hint or "")
    )
    (top,) = (source / "consolidated.00").iterdir()
    assert str(top) in (problem.hint or "")
    with zipfile.ZipFile(file, "w") as again:  # as `zip -0 -r` does, folders and their order as they come
        for path in (top, *sorted(top.rglob("*"))):
            again.write(path, path.relative_to(top.parent))
    shutil.rmtree(source / "consolidated.00")
    assert api.convert(source, tmp_path / "out", family="llama").plan.outputs


@pytest.mark.parametrize("compressed", ["model.safetensors", "config.json", "model.safetensors.gz"])
def test_a_gzip_file_is_told_from_a_tar(compressed: str, originals: Written, tmp_path: Path) -> None:
    source = copied(originals(Q), tmp_path)
    plain = source / compressed.removesuffix(".gz")
    data = gzip.compress(plain.read_bytes())
    plain.unlink()
    (source / compressed).write_bytes(data)
    problem = only(source, "qwen2", tmp_path)
    assert (problem.kind, "a gzip file" in problem.message, "gunzip" in (problem.hint or "")) == (
        "wrong-format",
        True,
        True,
    )


@pytest.mark.parametrize(
    "text",
    [
        "Entry not found",
        "Invalid username or password.",
        "404: Not Found",
        "Access to model Qwen/Qwen2 is restricted.",
        '{"error":"Repository not found"}',
        "<!DOCTYPE html><html>",
        "<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_what_a_server_sent_in_place_of_a_file(
    name: str, text: str, originals: Written, tmp_path: Path
) -> None:
    source = copied(originals(Q), tmp_path)
    (source / name).write_text(text)
    problem = only(source, "qwen2", tmp_path)
    assert problem.kind == "wrong-format" and problem.file == name
    assert problem.message.endswith(
        "a web page"
    ) or f"a message of a server ({'JSON ' * (text[0] == '{')}`" in (problem.message)
    assert problem.hint == signs.DOWNLOAD


@pytest.mark.parametrize(
    "data", [b'{"error": "x", "model_type": "qwen2"}', b"<s>", b"Not found: a word\n", b"{}"]
)
def test_a_document_of_such_words_is_one(data: bytes) -> None:
    assert signs.of_server(data) is None


def test_a_text_called_safetensors_is_shown(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("see the other repository\n")
    with pytest.raises(api.CkptToolError) as caught:
        api.open_checkpoint(tmp_path / "model.safetensors")
    assert "found text (`see the other repository`)" in str(caught.value)


@pytest.mark.parametrize(("before", "encoding"), [(b"\xef\xbb\xbf", "utf-8"), (b"", "utf-16")])
def test_an_encoding_of_windows_leads_out(
    before: bytes, encoding: str, originals: Written, tmp_path: Path
) -> None:
    source = copied(originals(L), tmp_path)
    text = (source / "params.json").read_text()
    (source / "params.json").write_bytes(before + text.encode(encoding))
    assert "as UTF-8 without" in (only(source, "llama", tmp_path).hint or "")


@pytest.mark.parametrize("family", ["llama", "auto"])
@pytest.mark.parametrize("name", ["params.json.txt", "orig_params.json", "params (1).json", "config.json"])
def test_params_under_another_name(name: str, family: str, originals: Written, tmp_path: Path) -> None:
    source = copied(originals(L), tmp_path)
    (source / "params.json").rename(source / name)
    first = refusal(source, family, tmp_path).problems[0]
    assert first.kind == "missing-file" and name in first.message and "params.json" in (first.hint or "")
    (source / name).rename(source / "params.json")
    assert api.convert(source, tmp_path / "out", family="llama").plan.outputs


def test_params_in_a_checkpoint_of_llama2_c(originals: Written, tmp_path: Path) -> None:
    """karpathy/llama2.c#314: its train.py keeps `model_args` beside the weights."""
    source = copied(originals(L), tmp_path)
    said = json.loads((source / "params.json").read_text())
    args = {k: v for k, v in said.items() if k not in ("norm_eps", "rope_theta")}
    tensors = {f"_orig_mod.{k}": v for k, v in torch.load(source / "consolidated.00.pth").items()}
    (source / "consolidated.00.pth").unlink()
    (source / "params.json").unlink()
    torch.save({"model": tensors, "model_args": {**args, "dropout": 0.0}, "iter_num": 5}, source / "ckpt.pt")
    first = refusal(source / "ckpt.pt", "llama", tmp_path).problems[0]
    assert first.kind == "missing-file" and "model_args in ckpt.pt" in first.message
    assert "torch.load('ckpt.pt')['model_args']" in (first.hint or "")
    args = {
        **torch.load(source / "ckpt.pt")["model_args"],
        "norm_eps": 1e-5,
        "rope_theta": said["rope_theta"],
    }
    (source / "params.json").write_text(json.dumps(args))
    assert api.convert(source / "ckpt.pt", tmp_path / "out", family="llama").plan.outputs


def test_params_beside_an_archive_of_weights(originals: Written, tmp_path: Path) -> None:
    source = copied(originals(L), tmp_path)
    with zipfile.ZipFile(source / "weights.zip", "w") as archive:
        archive.write(source / "consolidated.00.pth", "consolidated.00.pth")
    (source / "consolidated.00.pth").unlink()
    first = refusal(source / "weights.zip", "llama", tmp_path).problems[0]
    assert "beside the archive weights.zip" in first.message and "unpack the archive" in (first.hint or "")


def test_what_modelscope_has_not_all_of(originals: Written, tmp_path: Path) -> None:
    source = copied(originals(Q), tmp_path)
    (source / "._____temp").mkdir()
    (source / "model.safetensors").rename(source / "._____temp" / "model.safetensors")
    problem = only(source, "qwen2", tmp_path)
    assert problem.kind == "truncated" and "._____temp/model.safetensors" in problem.message


@pytest.mark.parametrize(
    ("name", "word", "way"),
    [
        ("transformer.h.0.attn.attn.weight", "LitGPT", "convert_from_litgpt"),
        ("model.transformer.h.0.attn.qkv.weight", "LitGPT", "convert_from_litgpt"),
        ("layers.0.sa_norm.scale", "torchtune", "FullModelHFCheckpointer"),
        ("language_model.encoder.layers.0.self_attention.key_value.weight", "DeepSpeed", "hf2megads"),
        ("language_model.decoder.layers.0.inter_attention.key_value.weight", "T5", "ckpt-tool families"),
        ("decoder.layers.0.cross_attention.linear_kv.weight", "T5", "ckpt-tool families"),
        ("layers.0.attention.wqkv.weight", "gpt-fast", "made from"),
        ("layers.0.attention.q_norm.weight", "torchtitan", "convert_to_hf.py"),
        ("layers.0.moe.experts.mlp1_weight", "torchtitan", "last_save_in_hf"),
        ("sequential.2.attention.query_key_value.weight", "GPT-NeoX", "convert_neox_to_hf.py"),
        ("model_state_dict.embedder.weight", "gemma_pytorch", "release for transformers"),
        ("model.layers.0.mlp.up_proj.weight._data", "quanto", "16 or 32 bits"),
        ("model.layers.0.mlp.up_proj.W_q", "HQQ", "16 or 32 bits"),
        ("model.layers.0.mlp.up_proj.q_weight", "ExLlama 2", "16 or 32 bits"),
        ("model.layers.0.mlp.up_proj.trellis", "ExLlama 3", "16 or 32 bits"),
        ("model.layers.0.mlp.up_proj.centroids.weight", "VPTQ", "16 or 32 bits"),
        ("model.layers.0.mlp.up_proj.B", "Marlin", "16 or 32 bits"),
        ("layers.0.attention.wq.adaptor.A.weight", "LoRA", "merge"),
    ],
)
@pytest.mark.parametrize("family", ["auto", "llama", "gemma2"])
def test_names_of_other_programs(name: str, word: str, way: str, family: str, tmp_path: Path) -> None:
    """Lightning-AI/litgpt#1847, meta-pytorch/torchtune#1744, ggml-org/llama.cpp#9252."""
    (tmp_path / "in").mkdir()
    save_file({name: torch.ones(4, 4)}, tmp_path / "in" / "model.safetensors")
    problem = only(tmp_path / "in", family, tmp_path)
    assert problem.kind == "unsupported" and word in problem.message and way in (problem.hint or "")


def test_a_state_file_of_windows_says_which_is_the_newest(originals: Written, tmp_path: Path) -> None:
    source = copied(originals("mobilebert-training"), tmp_path)
    for file in list(source.glob("model.ckpt-240000.*")):
        shutil.copy(file, source / file.name.replace("240000", "100"))
    (source / "checkpoint").write_text('model_checkpoint_path: "C:\\\\out\\\\model.ckpt-240000"\r\n')
    with api.open_checkpoint(source) as opened:
        assert any("model.ckpt-240000 was taken" in note for note in opened.notes)


def test_a_file_for_metal_is_told_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"GPT-OSS v1.0\0" + bytes(64))
    with pytest.raises(api.CkptToolError) as caught:
        api.open_checkpoint(tmp_path / "model.bin")
    assert "Metal" in str(caught.value) and "original/" in str(caught.value)


def test_no_usual_name_is_taken_for_a_part() -> None:
    names = ("model.safetensors.bak", "model.safetensors.index.json", "x.pt.old", "consolidated.00.pth")
    assert [n for n in names if signs.by_name(n) is not None] == []
    parts = ("a.pth.001", "a.tar.gz.ab", "a.safetensors.part-00002", "a.bin.part_aa")
    assert {s.what for n in parts if (s := signs.by_name(n))} == {"one part of a file that was split"}


def test_numpy_arrays_are_named(originals: Written, tmp_path: Path) -> None:
    source = copied(originals(L), tmp_path)
    file = source / "consolidated.00.pth"
    arrays = {k: v.float().numpy() for k, v in torch.load(file).items()}
    torch.save(arrays, file)
    first = refusal(source, "llama", tmp_path).problems[0]
    assert "numpy arrays" in first.message and "torch.from_numpy" in (first.hint or "")
    file.write_bytes(pickle.dumps(arrays))
    assert "save the tensors" in (only(source, "llama", tmp_path).hint or "")


@pytest.mark.parametrize(
    ("change", "kind", "way"),
    [
        (lambda t: t.to("meta"), "unsupported-device", "load all of it"),
        (lambda t: t.float().to_sparse(), "unsupported-dtype", ".to_dense()"),
        (lambda t: t[:1].expand(t.shape), "bad-view", ".contiguous()"),
    ],
)
def test_tensors_without_numbers_of_their_own_lead_out(
    change: Callable[[torch.Tensor], torch.Tensor], kind: str, way: str, originals: Written, tmp_path: Path
) -> None:
    """Weights that accelerate had offloaded, pruned ones, constants."""
    source = copied(originals(L), tmp_path)
    file = source / "consolidated.00.pth"
    torch.save(
        {k: change(v) if k == "tok_embeddings.weight" else v for k, v in torch.load(file).items()}, file
    )
    problem = only(source, "llama", tmp_path)
    assert problem.kind == kind and way in (problem.hint or "")


@pytest.mark.parametrize(
    ("change", "kind"),
    [(lambda data: data + data, "bad-zip"), (lambda data: data + bytes(9), "trailing-data")],
)
def test_a_file_with_something_after_it_leads_out(
    change: Callable[[bytes], bytes], kind: str, originals: Written, tmp_path: Path
) -> None:
    """A download that was begun again and appended, or written into a longer file."""
    source = copied(originals(L), tmp_path)
    file = source / "consolidated.00.pth"
    file.write_bytes(change(file.read_bytes()))
    problem = only(source, "llama", tmp_path)
    assert problem.kind == kind and "get the file again" in (problem.hint or "")


@pytest.mark.parametrize("kind", ["list", "tuple"])
def test_weights_in_a_list_lead_out(kind: str, originals: Written, tmp_path: Path) -> None:
    source = copied(originals(L), tmp_path)
    file = source / "consolidated.00.pth"
    tensors = torch.load(file)
    torch.save([tensors] if kind == "list" else (tensors, {"epoch": 1}), file)
    problem = only(source, "llama", tmp_path)
    assert f"found a {kind}" in problem.message and "torch.save" in (problem.hint or "")


def test_a_folder_called_like_a_file_of_weights(originals: Written, tmp_path: Path) -> None:
    """`zero_to_fp32.py . pytorch_model.bin` makes a folder of that name (JIA-Lab-research/LISA#155)."""
    source = copied(originals(Q), tmp_path)
    (source / "pytorch_model.bin").mkdir()
    (source / "model.safetensors").rename(source / "pytorch_model.bin" / "model.safetensors")
    problem = only(source, "qwen2", tmp_path)
    assert problem.message == "expected a file, found a folder of weights"
    assert str(source / "pytorch_model.bin") in (problem.hint or "")
    shutil.copy(source / "config.json", source / "pytorch_model.bin")
    assert api.convert(source / "pytorch_model.bin", tmp_path / "out", family="qwen2").plan.outputs


# --- Megatron-LM before Core ----------------------------------------------------------------------------


def as_before_core(folder: Path, norm: str, attention: str = "self_attention", **args: object) -> None:
    """The ranks in `folder` with the names and dicts that Megatron-LM gave the tensors before Core."""
    words = {
        "decoder.": "",
        "self_attention.linear_qkv": f"{attention}.query_key_value",
        "self_attention.linear_proj": f"{attention}.dense",
        "linear_fc1": "dense_h_to_4h",
        "linear_fc2": "dense_4h_to_h",
        "input_layernorm": f"input_{norm}",
        "pre_mlp_layernorm": f"post_attention_{norm}",
        "final_layernorm": f"final_{norm}",
    }
    for file in folder.rglob("*.pt"):
        tree = torch.load(file, weights_only=False)
        model: dict[str, dict[str, object]] = {"embedding": {}, "encoder": {}}
        for name, tensor in tree["model"].items():
            if name.startswith("embedding."):
                model["embedding"]["word_embeddings"] = {"weight": tensor}
            elif name == "output_layer.weight":
                model["output_layer"] = {"weight": tensor}
            else:
                for core, before in words.items():
                    name = name.replace(core, before)
                model["encoder"][name] = tensor
        version = args.pop("checkpoint_version", 3.0)
        vars(tree["args"]).update(args)
        torch.save({**tree, "model": {"language_model": model}, "checkpoint_version": version}, file)


@pytest.mark.parametrize("norm", ["norm", "layernorm"])
@pytest.mark.parametrize("variant", ["llama-mcore", "qwen2-mcore-tied"])
def test_a_gated_decoder_of_megatron_before_core(
    variant: str, norm: str, originals: Written, tmp_path: Path
) -> None:
    """huggingface/transformers#32486 (KeyError: 'input_norm'), NVIDIA/Megatron-LM#1553; rows are Core's."""
    family = variant.partition("-")[0]
    source = copied(originals(variant), tmp_path)
    as_before_core(source, norm)
    made = api.convert(source, tmp_path / "out", family=family)
    assert any("before Core" in note for note in made.plan.notes)
    plain = api.convert(originals(variant), tmp_path / "plain", family=family)
    assert world.equal(world.tensors_of(made.out), world.tensors_of(plain.out))
    assert api.verify(made.out, source, levels=("coverage", "bits")).status == "pass"


@pytest.mark.parametrize("norm", ["norm", "layernorm"])
@pytest.mark.parametrize("variant", ["qwen2-mcore", "llama-mcore"])
def test_a_gated_decoder_of_transformer_engine_before_core(
    variant: str, norm: str, originals: Written, tmp_path: Path
) -> None:
    """`--transformer-impl transformer_engine`: norms are held by what follows them."""
    family, source = variant.partition("-")[0], copied(originals(variant), tmp_path)
    as_before_core(source, norm)
    layers = {
        f"input_{norm}.": "self_attention.layernorm_qkv.layer_norm_",
        "self_attention.query_key_value.layer_norm_": "self_attention.layernorm_qkv.layer_norm_",
        "self_attention.query_key_value.": "self_attention.layernorm_qkv.",
        "self_attention.dense.": "self_attention.proj.",
        f"post_attention_{norm}.": "layernorm_mlp.layer_norm_",
        "mlp.dense_h_to_4h.layer_norm_": "layernorm_mlp.layer_norm_",
        "mlp.dense_h_to_4h._extra_state": "layernorm_mlp._extra_state",
        "mlp.dense_h_to_4h.": "layernorm_mlp.fc1_",
        "mlp.dense_4h_to_h._extra_state": "layernorm_mlp.own._extra_state",
        "mlp.dense_4h_to_h.": "layernorm_mlp.fc2_",
    }
    for file in source.rglob("*.pt"):
        tree = torch.load(file, weights_only=False)
        block = tree["model"]["language_model"]["encoder"]
        for name in [*block]:
            new = name
            for old, own in layers.items():
                new = new.replace(old, own)
            if not new.endswith("own._extra_state"):
                block[new] = block[name]
            if new != name:
                del block[name]
        torch.save(tree, file)
    made = api.convert(source, tmp_path / "out", family=family)
    assert any("before Core" in note and "layernorm_qkv" in note for note in made.plan.notes)
    plain = api.convert(originals(variant), tmp_path / "plain", family=family)
    assert world.equal(world.tensors_of(made.out), world.tensors_of(plain.out))
    assert api.verify(made.out, source, levels=("coverage", "bits")).status == "pass"


def test_other_models_with_joined_queries_keep_their_names(conversions: Written) -> None:
    """GPT-NeoX and BERT call a tensor so, too."""
    with api.open_checkpoint(conversions("pythia-410m")) as opened:
        assert not opened.readings


@pytest.mark.parametrize(
    "args",
    [
        {"apply_residual_connection_post_layernorm": True},
        {"position_embedding_type": "learned_absolute"},
        {"checkpoint_version": 1.0},
    ],
)
def test_what_computes_otherwise_keeps_its_names(
    args: dict[str, object], originals: Written, tmp_path: Path
) -> None:
    source = copied(originals("llama-mcore"), tmp_path)
    as_before_core(source, "norm", **args)
    found = refusal(source, "llama", tmp_path)
    assert found.kind == "unknown-family" and "input_norm" in found.problems[0].message
    assert not any("alone" in (p.hint or "") for p in found.problems)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("language_model.output_layer", "word_embeddings_for_head"),
        ("language_model.encoder.layers.0.input_norm", "language_model.encoder.layers.0.input_layernorm"),
    ],
)
def test_two_tensors_that_core_calls_the_same_are_refused(
    first: str, second: str, originals: Written, tmp_path: Path
) -> None:
    source = copied(originals("llama-mcore"), tmp_path)
    as_before_core(source, "norm")
    for file in source.rglob("*.pt"):
        tree = torch.load(file, weights_only=False)
        model = tree["model"]
        held = model["language_model"]
        wanted = held["encoder"].get("layers.0.input_norm.weight")
        if first.endswith("output_layer"):
            wanted = held.get("output_layer", {}).get("weight")
        if wanted is not None:
            model[f"{second}.weight"] = wanted + 1
        torch.save(tree, file)
    found = refusal(source, "llama", tmp_path).problems[0]
    assert (found.kind, found.where) == ("duplicate-tensor", f"model.{second}.weight")
    assert found.message.endswith(f"found model.{first}.weight too")


def test_ups_before_gates_are_refused(originals: Written, tmp_path: Path) -> None:
    """epfLLM/Megatron-LLM has the halves of its feed-forward the other way round."""
    source = copied(originals("llama-mcore"), tmp_path)
    as_before_core(source, "layernorm", glu_activation="swiglu")
    (problem,) = refusal(source, "llama", tmp_path).problems
    assert (problem.kind, problem.where) == ("unsupported", "glu_activation")


def test_a_tracker_of_another_iteration_leads_out(originals: Written, tmp_path: Path) -> None:
    source = copied(originals("llama-mcore"), tmp_path)
    (source / "latest_checkpointed_iteration.txt").write_text("9999")
    problem = only(source, "llama", tmp_path)
    assert problem.kind == "missing-shard" and "latest_checkpointed_iteration.txt" in (problem.hint or "")


def test_arguments_of_mega_may_be_a_namespace(originals: Written, tmp_path: Path) -> None:
    source = copied(originals("mega-wikitext"), tmp_path)
    args = pickle.loads((source / "model_args.pkl").read_bytes())  # one of our own
    (source / "model_args.pkl").write_bytes(pickle.dumps(argparse.Namespace(**args)))
    made = api.convert(source, tmp_path / "out", family="mega")
    plain = api.convert(originals("mega-wikitext"), tmp_path / "plain", family="mega")
    assert made.plan.config == plain.plan.config


# --- the way back from names of old releases ------------------------------------------------------------


def bare(prefix: str) -> Callable[[world.Tensors], world.Tensors]:
    return lambda tensors: {k.removeprefix(prefix): v for k, v in tensors.items()}


def old_norms(tensors: world.Tensors) -> world.Tensors:
    kinds = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def old(name: str) -> str:
        return next((name.replace(new, was) for new, was in kinds.items() if name.endswith(new)), name)

    return {old(k): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("gpt2-v2-tp2", bare("transformer.")),  # as openai-community/gpt2 is published
        ("llama-3.2-1b", bare("model.")),  # ggml-org/llama.cpp#9211
        ("mistral-7b-v0.1", bare("model.")),
        ("opt-13b", bare("model.")),
        ("mobilebert-training", old_norms),  # ggml-org/llama.cpp#7924
    ],
)
def test_the_way_back_reads_names_of_old_releases(
    variant: str, change: Callable[[world.Tensors], world.Tensors], conversions: Written, tmp_path: Path
) -> None:
    source = copied(conversions(variant), tmp_path)
    plain = api.convert(source, tmp_path / "plain", family="auto", to="original")
    world.rewritten(change)(source)
    made = api.convert(source, tmp_path / "out", family="auto", to="original")
    assert any("names of an old release" in note for note in made.plan.notes)
    files = {p.relative_to(plain.out) for p in plain.out.rglob("*") if p.is_file()}
    weights = [p for p in files if p.suffix in (*world.WEIGHTS, ".index") or ".data-" in p.name]
    assert weights and all((plain.out / p).read_bytes() == (made.out / p).read_bytes() for p in weights)
