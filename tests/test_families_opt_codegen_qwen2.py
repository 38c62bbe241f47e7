"""OPT, CodeGen and Qwen2: what their own files are like, what cannot be told from them, and what is wrong."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from ckpt_tool import api, table
from ckpt_tool.checkpoint.torch_zip_writer import TorchZipLayout
from ckpt_tool.cli import cli
from ckpt_tool.convert.families.opt import PUBLISHED
from ckpt_tool.convert.tokenizers import tokenizer_documents
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families.codegen import whitespace_tokens
from ckpt_tool.fixtures.families.opt import opt
from ckpt_tool.fixtures.families.qwen2 import qwen2
from ckpt_tool.fixtures.megatron_core import Core, write_file
from ckpt_tool.fixtures.numbers import drawn
from ckpt_tool.fixtures.pickles import Global, Instance, write_torch_zip
from ckpt_tool.fixtures.published import tensor
from ckpt_tool.fixtures.variants import VARIANTS

Written = Callable[[str], Path]
OPT, CODEGEN, QWEN2 = (
    {k: v for k, v in VARIANTS.items() if v.family == family} for family in ("opt", "codegen", "qwen2")
)


def convert(source: Path, out: Path, **options: Any) -> api.Conversion:
    return api.convert(source, out, options=api.Options(**options))


def refused(source: Path, out: Path, **options: Any) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        convert(source, out, **options)
    assert not out.exists()
    return caught.value


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def config(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return made


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def copied(source: Path, to: Path) -> Path:
    return Path(shutil.copytree(source, to))


# --- OPT ------------------------------------------------------------------------------------------------


def load_parts(folder: Path) -> list[dict[str, torch.Tensor]]:
    files = sorted(folder.glob("reshard-model_part-*.pt"))
    return [torch.load(f, weights_only=False)["model"] for f in files]


def test_eight_parts_are_merged_and_split_back_bit_for_bit(originals: Written, tmp_path: Path) -> None:
    source, variant = originals("opt-66b"), OPT["opt-66b"]
    convert(source, tmp_path / "hf", settings=variant.settings)
    back = tmp_path / "back"
    api.convert(tmp_path / "hf", back, to="original", options=api.Options(shards=8))
    before, after = load_parts(source), load_parts(back)
    assert len(before) == len(after) == 8
    for one, two in zip(before, after, strict=True):
        assert one.keys() == two.keys() and "decoder.version" in two
        assert all(one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one)
    for name, content in ((p.name, p.read_bytes()) for p in source.glob("gpt2-*")):
        assert (back / name).read_bytes() == content


def test_rows_of_a_fused_part_are_keys_then_values_then_queries(
    originals: Written, conversions: Written
) -> None:
    parts, whole = load_parts(originals("opt-66b")), weights(conversions("opt-66b"))
    for k, projection in enumerate("kvq"):
        for kind in ("weight", "bias"):
            shares = [p[f"decoder.layers.1.self_attn.qkv_proj.{kind}"].chunk(3)[k] for p in parts]
            found = whole[f"model.decoder.layers.1.self_attn.{projection}_proj.{kind}"]
            assert torch.equal(found, torch.cat(shares))


def test_layouts_of_one_model_convert_to_the_same(conversions: Written) -> None:
    first = conversions("opt-13b")
    for other in ("opt-restored", "opt-bare"):
        assert equal(weights(first), weights(conversions(other)))
        assert config(first) == config(conversions(other))


@pytest.mark.parametrize("shards", [1, 4])
def test_parts_of_another_number_hold_the_same_model(
    shards: int, conversions: Written, tmp_path: Path
) -> None:
    whole = conversions("opt-66b")
    api.convert(whole, tmp_path / "parts", to="original", options=api.Options(shards=shards))
    convert(tmp_path / "parts", tmp_path / "again")  # the settings are in the files now
    assert equal(weights(whole), weights(tmp_path / "again"))


def test_the_arrangement_of_350m_keeps_its_projections_and_has_no_last_norm(conversions: Written) -> None:
    found = weights(conversions("opt-350m"))
    assert {n for n in found if "layers" not in n} == {
        "model.decoder.embed_tokens.weight",
        "model.decoder.embed_positions.weight",
        "model.decoder.project_in.weight",
        "model.decoder.project_out.weight",
    }
    assert config(conversions("opt-350m"))["do_layer_norm_before"] is False


def sparse(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    """A torch file with real headers and holes for data."""
    layout = TorchZipLayout(tensors)
    with open(path, "wb") as f:
        os.truncate(f.fileno(), layout.size)
        for at, piece in layout.finish({name: 0 for name, _, _ in tensors}):
            f.seek(at)
            f.write(piece)


@pytest.mark.parametrize("size", ["125m", "350m", "175b"])
def test_head_count_and_activation_of_published_sizes_come_from_a_table(size: str, tmp_path: Path) -> None:
    (layers, width, word, ffn), heads = next((k, h) for k, (n, h) in PUBLISHED.items() if n == size)
    positions, words = 2048, 50272
    small = opt(1, 48, 6, 88, 336, word=None if word == width else 4)
    sizes = {48: width, 4: word, 88: ffn, 336: words, 622: positions + 2, 144: 3 * width}
    one = {n: t.shape for n, t in small.tree(0, drawn("x", 0))["model"].items() if not n.endswith("version")}
    every = {
        n.replace("layers.0.", f"layers.{i}."): tuple(sizes[x] for x in shape)
        for n, shape in one.items()
        for i in range(layers if "layers.0." in n else 1)
    }
    sparse(tmp_path / "reshard.pt", [(n, "F16", s) for n, s in every.items()])
    plan = api.plan(tmp_path)
    assert plan.family == "opt"
    assert plan.config["num_attention_heads"].value == heads
    assert f"layers and widths are those of OPT {size}" in plan.config["num_attention_heads"].source
    assert plan.config["activation_function"].value == "relu"
    assert plan.config["do_layer_norm_before"].value is (size != "350m")
    if size == "125m":
        assert sum(t.numel for f in plan.outputs for t in f.tensors) == 125_239_296


def test_what_the_files_do_not_tell_is_asked_for_by_name(originals: Written, tmp_path: Path) -> None:
    error = refused(originals("opt-66b"), tmp_path / "out")
    assert {p.kind for p in error.problems} == {"missing-fact"}
    assert {p.where for p in error.problems} == {"num_attention_heads"}


def opt_with(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """The variant with each of its trees changed."""
    original: Any = OPT[name].original
    folder.mkdir()
    for part, file in enumerate(original.files):
        tree = original.tree(part, drawn(name, 0))
        change(tree)
        with open(folder / file, "wb") as f:
            write_torch_zip(tree, f)
    return folder


def test_the_gelu_of_metaseq_is_asked_for(tmp_path: Path) -> None:
    def gelu(tree: dict[str, Any]) -> None:
        fields = {**tree["cfg"]["model"].attributes, "activation_fn": "gelu"}
        tree["cfg"] = {"model": Instance(Global("argparse", "Namespace"), fields)}

    source = opt_with(tmp_path / "in", "opt-13b", gelu)
    error = refused(source, tmp_path / "out")
    assert error.kind == "missing-fact" and "different things" in str(error)
    made = convert(source, tmp_path / "out", settings={"activation_function": "gelu"})
    assert made.plan.config["activation_function"].value == "gelu"


def without(*endings: str) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        model = tree["model"]
        for name in [n for n in model if n.endswith(endings)]:
            del model[name]

    return change


def added(name: str, size: int) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["model"].update({f"decoder.layers.0.{name}": tensor("F16", np.ones(size))})


def told(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["cfg"]["model"].attributes.update(fields)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (without("decoder.layer_norm.weight", "decoder.layer_norm.bias"), "missing-tensor", "layer_norm"),
        (without("layers.3.fc1.bias"), "missing-tensor", "layers.3.fc1.bias"),
        (added("extra", 3), "uncovered-tensors", "extra"),
        (added("fc2.bias", 9), "shape-mismatch", "(9,)"),
        (told(alibi=True), "unsupported", "alibi"),
        (told(decoder_layers=11), "uncovered-tensors", "layer 11 left over"),
        (told(decoder_attention_heads=7), "config-mismatch", "7 heads"),
        (told(decoder_ffn_embed_dim=90), "config-mismatch", "90"),
    ],
)
def test_a_faulty_original_is_refused(
    change: Callable[[dict[str, Any]], None], kind: str, words: str, tmp_path: Path
) -> None:
    error = refused(opt_with(tmp_path / "in", "opt-13b", change), tmp_path / "out")
    assert kind in {p.kind for p in error.problems} and words in str(error)


@pytest.mark.parametrize("missing", [0, 3, 7])
def test_a_missing_part_is_named(missing: int, originals: Written, tmp_path: Path) -> None:
    folder = copied(originals("opt-66b"), tmp_path / "in")
    (folder / f"reshard-model_part-{missing}.pt").unlink()
    error = refused(folder, tmp_path / "out", settings=OPT["opt-66b"].settings)
    assert error.kind == "missing-shard" and "8" in str(error)


def test_parts_of_two_models_are_refused(originals: Written, tmp_path: Path) -> None:
    """Of other sizes when planning; of the same sizes when the copies on both are compared."""
    folder, settings = copied(originals("opt-66b"), tmp_path / "in"), OPT["opt-66b"].settings
    part = "reshard-model_part-5.pt"
    other = opt(3, 64, 16, 160, 344, parts=8, form=None, head=True)
    (tmp_path / "other").mkdir()
    shutil.copy(other.write(tmp_path / "other", "other") / part, folder / part)
    assert refused(folder, tmp_path / "out", settings=settings).kind == "shard-conflict"
    stranger = OPT["opt-66b"].write(tmp_path / "stranger", seed=9)
    shutil.copy(stranger / part, folder / part)
    error = refused(folder, tmp_path / "out", settings=settings)
    assert error.kind == "shard-conflict" and part in str(error)


def test_fsdp_shards_are_refused_with_the_way_out(tmp_path: Path) -> None:
    tree = {
        "model": {"flat_param_0": tensor("F16", np.ones(8))},
        "shard_metadata": {"param_metadata": [], "buffer_names": []},
    }
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "restored.pt", "wb") as f:
        write_torch_zip(tree, f)
    with pytest.raises(CkptToolError) as caught:
        api.convert(tmp_path / "in", tmp_path / "out", family="opt")
    assert caught.value.kind == "unsupported" and "reshard_fsdp" in str(caught.value.problems[0].hint)


def test_a_converted_opt_is_no_original(conversions: Written, tmp_path: Path) -> None:
    """It stays as it is; without its config.json nothing says what it is, and the hint does."""
    done, bare = conversions("opt-13b"), tmp_path / "bare"
    api.convert(done, tmp_path / "out", family="opt")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (done / "model.safetensors").read_bytes()
    bare.mkdir()
    shutil.copy(done / "model.safetensors", bare)
    with pytest.raises(CkptToolError) as caught:
        api.convert(bare, tmp_path / "other", family="opt")
    assert caught.value.kind == "already-converted" and "config.json" in str(caught.value.problems[0].hint)


TEXTS = ("Hello world", " Hello world", "In the city of", "été  生活 😀\n\n2020's", "")


def test_every_text_begins_with_the_end_of_text(originals: Written, conversions: Written) -> None:
    """Ids are those of the vocabulary's own BPE, with </s> (2) before them."""
    from tokenizers import models, pre_tokenizers

    source, out = originals("opt-13b"), conversions("opt-13b")
    plain = Tokenizer(models.BPE.from_file(str(source / "gpt2-vocab.json"), str(source / "gpt2-merges.txt")))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in TEXTS:
        assert made.encode(text).ids == [2, *plain.encode(text).ids]
        assert made.decode(made.encode(text).ids) == text
    named = json.loads((out / "special_tokens_map.json").read_text())
    assert named == {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    assert made.token_to_id("<pad>") == config(out)["pad_token_id"] == 1


DOCUMENTED = {
    "Hello world": [2, 31414, 232],
    " Hello world": [2, 20920, 232],
    "A photo of a cat": [2, 250, 1345, 9, 10, 4758],
    "Paris is the capital of France and": [2, 32826, 16, 5, 812, 9, 1470, 8],
    "Computers and mobile phones have taken": [2, 14721, 43990, 8, 1830, 4247, 33, 551],
}


def test_documented_ids_on_the_published_vocabulary(tmp_path: Path) -> None:
    """gpt2-vocab.json and gpt2-merges.txt of facebookresearch/metaseq, projects/OPT/assets, where they are
    beside this checkout."""
    folder = Path(__file__).parents[2] / "shared" / "real" / "metaseq"
    if not (folder / "gpt2-vocab.json").is_file():
        pytest.skip("the published vocabulary is not beside this checkout")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    made = tokenizer_documents(files, family="opt", config={"padded_vocab_size": 50272})
    tokenizer = Tokenizer.from_str(made.documents["tokenizer.json"].decode())
    assert {text: tokenizer.encode(text).ids for text in DOCUMENTED} == DOCUMENTED


# --- CodeGen --------------------------------------------------------------------------------------------


def logits_of(folder: Path, name: str, ids: torch.Tensor) -> torch.Tensor:
    import transformers

    model = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits.double()
    return found


@pytest.mark.parametrize("name", CODEGEN)
def test_gpt_j_computes_what_codegen_computes(
    name: str,
    originals: Written,
    conversions: Written,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    variant = CODEGEN[name]
    options = {"settings": variant.settings, "family_options": {"architecture": "gptj"}}
    convert(originals(name), tmp_path / "gptj", **options)
    made = config(tmp_path / "gptj")
    assert made["model_type"] == "gptj" and made["architectures"] == ["GPTJForCausalLM"]
    ids = torch.arange(64).mul(37).remainder(variant.true_config["vocab_size"]).view(2, 32)
    one = logits_of(conversions(name), "CodeGenForCausalLM", ids)
    two = logits_of(tmp_path / "gptj", "GPTJForCausalLM", ids)
    assert one.std() > 0.5
    assert float((one - two).square().mean() / one.var()) <= 1e-10
    if name != "codegen-350m-mono":
        request.getfixturevalue("few_prompts")
    report = api.verify(tmp_path / "gptj", originals(name), against="transformers")
    assert report.exit_code == 0, [f.message for f in report.findings if f.status == "fail"]


def test_gpt_j_goes_back_to_the_blocks_it_came_from(originals: Written, tmp_path: Path) -> None:
    options = {"settings": {"mp_num": 8}, "family_options": {"architecture": "gptj"}}
    source = originals("codegen-8-cores")
    convert(source, tmp_path / "gptj", **options)
    api.convert(tmp_path / "gptj", tmp_path / "back", to="original")
    with api.open_checkpoint(source) as a, api.open_checkpoint(tmp_path / "back") as b:
        assert table.compare(a, b) == []
    assert config(tmp_path / "back")["model_type"] == "codegen"


def test_blocks_hold_queries_values_and_keys(originals: Written, tmp_path: Path) -> None:
    """By the formula of the model's own code: row t of q, v or k is in block t // B."""
    source = originals("codegen-2b-multi")
    convert(source, tmp_path / "out", family_options={"architecture": "gptj"})
    name = "transformer.h.5.attn."
    fused = torch.load(source / "pytorch_model.bin", weights_only=True)[f"{name}qkv_proj.weight"]
    found, width = weights(tmp_path / "out"), fused.shape[1]
    block = width // 4
    t = torch.arange(width)
    for k, projection in enumerate("qvk"):
        row = t // block * 3 * block + k * block + t % block
        assert torch.equal(found[f"{name}{projection}_proj.weight"], fused[row])


def test_stale_masks_are_dropped_with_the_reason(originals: Written, tmp_path: Path) -> None:
    made = convert(originals("codegen-350m-mono"), tmp_path / "out")
    dropped = {d.tensor.name: d.reason for d in made.plan.dropped}
    assert set(dropped) == {
        f"transformer.h.{i}.attn.{n}" for i in range(3) for n in ("causal_mask", "masked_bias")
    }
    assert all(dropped.values())
    assert not any("mask" in n for n in weights(tmp_path / "out"))


def test_an_archive_and_its_folder_convert_to_the_same(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    with tarfile.open(originals("codegen-350m-mono")) as archive:
        archive.extractall(tmp_path, filter="data")
    convert(tmp_path / "codegen-350M-mono", tmp_path / "out")
    assert equal(weights(tmp_path / "out"), weights(conversions("codegen-350m-mono")))
    assert config(tmp_path / "out") == config(conversions("codegen-350m-mono"))


def test_ids_of_other_vocabularies_are_kept_and_told(originals: Written, tmp_path: Path) -> None:
    made = convert(originals("codegen-350m-mono"), tmp_path / "out")
    assert sum("--set eos_token_id=50256" in n for n in made.plan.notes) == 1
    assert config(tmp_path / "out")["eos_token_id"] == 2
    again = convert(originals("codegen-350m-mono"), tmp_path / "set", settings={"eos_token_id": 309})
    assert config(tmp_path / "set")["eos_token_id"] == 309
    assert not any("eos_token_id" in n for n in again.plan.notes)


def test_whitespace_tokens_follow_the_vocabulary(conversions: Written) -> None:
    made = Tokenizer.from_file(str(conversions("codegen-2b-multi") / "tokenizer.json"))
    plain = Tokenizer.from_file(str(conversions("codegen-16b-nl") / "tokenizer.json"))
    listed = json.loads(whitespace_tokens(310))
    assert listed[" " * 31] == 310 and listed["  "] == 339 and listed["\t\t"] == 347 and len(listed) == 38
    for text in ("    ", "\t\t\t", " " * 31):
        assert made.encode(text).ids == [listed[text]]
    text = "def f():\n    return 1\n"
    assert made.encode(text).ids.count(listed["    "]) == 1
    assert made.decode(made.encode(text).ids) == text == plain.decode(plain.encode(text).ids)
    assert "    " not in plain.get_vocab()


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"rotary_dim": 5}, "config-mismatch", "rotary_dim"),
        ({"rotary_dim": 14}, "config-mismatch", "rotary_dim"),
        ({"n_head": 7}, "config-mismatch", "n_head"),
        ({"n_head": ...}, "missing-fact", "n_head"),
        ({"layer_norm_epsilon": ...}, "missing-fact", "layer_norm_epsilon"),
        ({"rotary_dim": ...}, "missing-fact", "rotary_dim"),
        ({"n_layer": 11}, "uncovered-tensors", "layer 11 left over"),
        ({"tie_word_embeddings": True}, "unsupported", "tie_word_embeddings"),
        ({"activation_function": "relu"}, "unsupported", "relu"),
        ({"vocab_size": 400}, "config-mismatch", "400"),
        ({"quantization_config": {"bits": 4}}, "unsupported", "quantization_config"),
        ({"model_type": "gpt2"}, "unknown-family", "gpt2"),
    ],
)
def test_a_config_that_does_not_fit_codegen_is_refused(
    change: dict[str, Any], kind: str, words: str, originals: Written, tmp_path: Path
) -> None:
    folder = copied(originals("codegen-2b-multi"), tmp_path / "in")
    values = {k: v for k, v in {**config(folder), **change}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CkptToolError) as caught:
        api.convert(folder, tmp_path / "out", family="codegen")
    assert kind in {p.kind for p in caught.value.problems} and words in str(caught.value)


def test_code_of_a_download_is_never_asked_for_again(originals: Written, tmp_path: Path) -> None:
    folder = copied(originals("qwen2-0.5b"), tmp_path / "in")
    values = config(folder) | {"auto_map": {"AutoModel": "evil.Qwen2Model"}, "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text()) | {"auto_map": {"x": "evil"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    convert(folder, tmp_path / "out")
    for name in ("config.json", "tokenizer_config.json"):
        assert "evil" not in (tmp_path / "out" / name).read_text()
    assert not config(tmp_path / "out").keys() & {"auto_map", "trust_remote_code", "transformers_version"}


@pytest.mark.parametrize("member", ["link", "hard link", "traversal", "absolute"])
def test_archives_that_reach_outside_are_refused(member: str, originals: Written, tmp_path: Path) -> None:
    packed = io.BytesIO(gzip.decompress(originals("codegen-350m-mono").read_bytes()))
    with tarfile.open(fileobj=packed, mode="a") as archive:
        info = tarfile.TarInfo("codegen-350M-mono/vocab.json")
        if member in ("link", "hard link"):
            info.type = tarfile.SYMTYPE if member == "link" else tarfile.LNKTYPE
            info.linkname = "/etc/passwd"
        else:
            info.name = "../vocab.json" if member == "traversal" else "/vocab.json"
        archive.addfile(info)
    path = tmp_path / "bad.tar.gz"
    path.write_bytes(gzip.compress(packed.getvalue()))
    error = refused(path, tmp_path / "out")
    assert error.kind == "bad-tar"
    assert [p.name for p in tmp_path.iterdir()] == ["bad.tar.gz"]


def test_gptj_is_a_target_of_codegen_alone(originals: Written, tmp_path: Path) -> None:
    run = CliRunner()
    source, out = str(originals("codegen-2b-multi")), str(tmp_path / "out")
    done = run.invoke(cli, ["convert", "auto", "--to", "gptj", "--in", source, "--out", out])
    assert done.exit_code == 0, done.output
    assert config(tmp_path / "out")["model_type"] == "gptj"
    other = str(originals("qwen2-0.5b"))
    asked = ["convert", "auto", "--to", "gptj", "--in", other, "--out", str(tmp_path / "o2")]
    failed = run.invoke(cli, asked)
    assert isinstance(failed.exception, CkptToolError) and failed.exception.kind == "usage"
    assert "expected hf, original for family qwen2, found gptj" in str(failed.exception)


# --- Qwen2 ----------------------------------------------------------------------------------------------


def test_every_container_and_sharding_is_one_model(conversions: Written, tmp_path: Path) -> None:
    """Shards to one file and to others; through .bin; the same tensors and the same config."""
    first = conversions("qwen2.5-14b")
    assert [p.name for p in first.glob("*.safetensors")] == ["model.safetensors"]
    convert(first, tmp_path / "small", max_shard_bytes=60_000)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 3
    options = api.Options(family_options={"container": "pth"})
    api.convert(tmp_path / "small", tmp_path / "bin", to="original", options=options)
    assert (tmp_path / "bin" / "pytorch_model.bin").is_file()
    convert(tmp_path / "bin", tmp_path / "again")
    assert equal(weights(first), weights(tmp_path / "again"))
    assert config(first) == config(tmp_path / "again")


def test_tokenizer_and_generation_files_are_carried_over(originals: Written, conversions: Written) -> None:
    source, out = originals("qwen2-0.5b"), conversions("qwen2-0.5b")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        assert (source / name).read_bytes() == (out / name).read_bytes()
    one, two = (json.loads((f / "generation_config.json").read_text()) for f in (source, out))
    assert one == two and two["eos_token_id"] == [3, 4]


def test_a_tied_head_is_compared_and_left_out(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    assert "lm_head.weight" not in weights(conversions("qwen1.5-0.5b"))
    convert(originals("qwen1.5-0.5b"), tmp_path / "one")
    folder = copied(tmp_path / "one", tmp_path / "in")
    found = load_file(folder / "model.safetensors")
    head = found["model.embed_tokens.weight"].clone()
    head[7, 3] += 1
    save_file({**found, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    error = refused(folder, tmp_path / "out")
    assert error.kind == "tied-mismatch" and "lm_head.weight" in str(error)
    convert(folder, tmp_path / "untied", settings={"tie_word_embeddings": False})
    assert torch.equal(weights(tmp_path / "untied")["lm_head.weight"], head)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"rope_theta": ...}, "missing-fact", "rope_theta"),
        ({"num_key_value_heads": ...}, "config-mismatch", "num_key_value_heads 32"),
        ({"rms_norm_eps": ...}, "missing-fact", "rms_norm_eps"),
        ({"model_type": "qwen2_moe"}, "unsupported", "qwen2_moe"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "missing-tensor", "score.weight"),
        ({"num_key_value_heads": 7}, "config-mismatch", "num_key_value_heads"),
        ({"num_attention_heads": 12}, "config-mismatch", "num_attention_heads"),
        ({"use_sliding_window": True, "max_window_layers": ...}, "missing-fact", "max_window_layers"),
        ({"use_sliding_window": True, "sliding_window": None}, "bad-config", "sliding_window"),
        ({"hidden_act": "gelu"}, "unsupported", "gelu"),
        ({"tie_word_embeddings": False}, "missing-tensor", "lm_head.weight"),
        ({"intermediate_size": 96}, "config-mismatch", "96"),
    ],
)
def test_a_config_that_does_not_fit_qwen2_is_refused(
    change: dict[str, Any], kind: str, words: str, originals: Written, tmp_path: Path
) -> None:
    folder = copied(originals("qwen2-0.5b"), tmp_path / "in")
    values = {k: v for k, v in {**config(folder), **change}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CkptToolError) as caught:
        api.convert(folder, tmp_path / "out", family="qwen2")
    assert kind in {p.kind for p in caught.value.problems} and words in str(caught.value)


def test_a_missing_bias_is_told(originals: Written, tmp_path: Path) -> None:
    folder = copied(originals("qwen2-0.5b"), tmp_path / "in")
    found = load_file(folder / "model.safetensors")
    del found["model.layers.1.self_attn.v_proj.bias"]
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    error = refused(folder, tmp_path / "out")
    assert error.kind == "missing-tensor" and "layers.1.self_attn.v_proj.bias" in str(error)


def test_a_missing_shard_is_told(originals: Written, tmp_path: Path) -> None:
    folder = copied(originals("qwen2.5-14b"), tmp_path / "in")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert refused(folder, tmp_path / "out").kind in ("missing-shard", "bad-index")


# --- Megatron-Core --------------------------------------------------------------------------------------


def load_ranks(folder: Path) -> list[dict[str, torch.Tensor]]:
    files = sorted(folder.rglob("model_optim_rng.pt"))
    return [torch.load(f, weights_only=False)["model"] for f in files]


def test_ranks_and_published_files_of_one_model_convert_to_the_same(conversions: Written) -> None:
    for core, published in (("qwen2-mcore", "qwen2.5-14b"), ("qwen2-mcore-tied", "qwen2-0.5b")):
        assert equal(weights(conversions(core)), weights(conversions(published)))
        a, b = config(conversions(core)), config(conversions(published))
        assert {k: b[k] for k in a if k in b and k != "architectures"} == {
            k: v for k, v in a.items() if k in b and k != "architectures"
        }


def test_a_published_model_becomes_the_ranks_that_megatron_writes(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    options = api.Options(family_options={"form": "mcore", "tensor_parallel": 2})
    api.convert(conversions("qwen2.5-14b"), tmp_path / "ranks", to="original", options=options)
    before, after = load_ranks(originals("qwen2-mcore")), load_ranks(tmp_path / "ranks")
    assert len(before) == len(after) == 2
    for one, two in zip(before, after, strict=True):
        rows = {n: len(t) for n, t in one.items()}  # the last rank's words are followed by padding
        assert one.keys() == two.keys()
        words = ("embedding.word_embeddings.weight", "output_layer.weight")
        assert all(torch.equal(one[k], two[k][: rows[k]]) for k in one if k not in words)
    whole = torch.cat([r["embedding.word_embeddings.weight"] for r in after])
    assert len(whole) == 512  # the next multiple of 128 x 2 after 320
    convert(tmp_path / "ranks", tmp_path / "again")
    assert equal(weights(tmp_path / "again"), weights(conversions("qwen2.5-14b")))
    assert config(tmp_path / "again")["vocab_size"] == 320


def stages(folder: Path, m: Core, cut: int) -> Path:
    """The model in two pipeline stages, the first of `cut` layers."""
    numbers = drawn("staged", 0)
    for rank in range(m.ranks):
        whole = m.rank(rank, numbers)
        parts: list[dict[str, Any]] = [{}, {}]
        for name, value in whole.items():
            if not name.startswith("decoder.layers."):
                parts[name.startswith(("decoder.final", "output"))][name] = value
                continue
            number, rest = name.removeprefix("decoder.layers.").split(".", 1)
            stage, local = (0, int(number)) if int(number) < cut else (1, int(number) - cut)
            parts[stage][f"decoder.layers.{local}.{rest}"] = value
        for stage, tensors in enumerate(parts):
            args = {**m.args(), "pipeline_model_parallel_size": 2}
            write_file(folder / "release" / f"mp_rank_{rank:02d}_{stage:03d}", tensors, args)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


@pytest.mark.usefixtures("few_prompts")
def test_pipeline_stages_are_joined_and_verified(tmp_path: Path) -> None:
    model = qwen2(5, 48, 6, 2, 72, 320, 5, rms_norm_eps=1e-5)
    source = stages(tmp_path / "in", Core(model, ranks=2), 3)
    convert(source, tmp_path / "out")
    numbers, found = drawn("staged", 0), weights(tmp_path / "out")
    for name, shape in model.rows():
        assert isinstance(shape, tuple)
        wanted = torch.from_numpy(numbers(name, shape)).to(torch.bfloat16)
        assert torch.allclose(found[name].float(), wanted.float(), atol=0, rtol=0.01), name
    report = api.verify(tmp_path / "out", source, levels=("coverage", "bits", "parity"))
    assert report.exit_code == 0, [f.message for f in report.findings if f.status == "fail"]


@pytest.mark.usefixtures("few_prompts")
def test_padding_of_the_vocabulary_is_left_out_when_told(originals: Written, tmp_path: Path) -> None:
    made = convert(originals("qwen2-mcore"), tmp_path / "out", settings={"vocab_size": 311})
    assert any("9 rows of padding" in n for n in made.plan.notes)
    assert len(weights(tmp_path / "out")["lm_head.weight"]) == 311
    report = api.verify(tmp_path / "out", originals("qwen2-mcore"))
    assert report.exit_code == 0, [f.message for f in report.findings if f.status == "fail"]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"swiglu": False}, "unsupported", "swiglu"),
        ({"normalization": "LayerNorm"}, "unsupported", "normalization"),
        ({"num_experts": 8}, "unsupported", "num_experts"),
        ({"num_query_groups": 3}, "config-mismatch", "num_key_value_heads"),
        ({"rotary_base": None}, "missing-fact", "rotary_base"),
        ({"kv_channels": 16}, "config-mismatch", "channels"),
        ({"num_layers": 11}, "uncovered-tensors", "layer 11 left over"),
        ({"tensor_model_parallel_size": 4}, "missing-shard", "mp_rank_02"),
    ],
)
def test_args_that_do_not_fit_qwen2_are_refused(
    change: dict[str, Any], kind: str, words: str, tmp_path: Path
) -> None:
    m: Any = QWEN2["qwen2-mcore"].original
    for rank in range(2):
        path = tmp_path / "in" / "release" / f"mp_rank_{rank:02d}"
        write_file(path, m.rank(rank, drawn("x", 0)), {**m.args(), **change})
    error = refused(tmp_path / "in", tmp_path / "out")
    assert kind in {p.kind for p in error.problems} and words in str(error)


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("opt-66b", {"shards": 4}),
        ("opt-350m", {}),
        ("codegen-8-cores", {}),
        ("qwen2-window", {}),
        ("qwen2.5-14b", {"family_options": {"form": "mcore", "tensor_parallel": 2}}),
    ],
)
def test_what_goes_back_is_verified_too(
    name: str, options: dict[str, Any], conversions: Written, tmp_path: Path
) -> None:
    api.convert(conversions(name), tmp_path / "back", to="original", options=api.Options(**options))
    report = api.verify(tmp_path / "back", conversions(name), settings=VARIANTS[name].settings)
    assert report.exit_code == 0, [f.message for f in report.findings if f.status == "fail"]
    assert report.facts["family"].endswith("to-original")


@pytest.mark.parametrize("name", [*OPT, *CODEGEN, *QWEN2])
def test_one_family_recognises_each(name: str, originals: Written) -> None:
    with api.open_checkpoint(originals(name)) as checkpoint:
        said = {f: (own, why) for f, own, why in api.recognise(checkpoint)}
    assert [f for f, (own, _) in said.items() if own] == [VARIANTS[name].family]
    assert all(why for _, why in said.values())


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("name", ["opt-13b", "codegen-16b-nl", "qwen2-window", "qwen2-mcore-tied"])
def test_float64_parity(name: str, originals: Written, conversions: Written) -> None:
    report = api.verify(
        conversions(name),
        originals(name),
        levels=("parity",),
        compute_dtype="float64",
        settings=VARIANTS[name].settings,
    )
    assert report.exit_code == 0, [f.message for f in report.findings if f.status == "fail"]
    (logits,) = (f for f in report.findings if f.check == "logits")
    assert logits.data["max_delta"] <= 1e-9


def test_equal_inputs_give_equal_bytes(originals: Written, tmp_path: Path) -> None:
    for name in ("opt-13b", "codegen-2b-multi", "qwen2-mcore"):
        (tmp_path / name).mkdir()
        for copy in ("a", "b"):
            convert(originals(name), tmp_path / name / copy)
        one, two = (
            {p.name: p.read_bytes() for p in (tmp_path / name / c).iterdir() if p.is_file()} for c in "ab"
        )
        assert one == two
