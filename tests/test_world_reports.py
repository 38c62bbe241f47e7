"""Files after public reports, each kind with the report that it is built after: what comes out of them by the
command line, judged by the bytes that the same model without the change gives."""

from __future__ import annotations

import json
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import api, program
from ckpt_tool.errors import CkptToolError, Problem
from tests import world

Written = Callable[[str], Path]


def refusal(folder: Path, family: str, tmp_path: Path, **more: Any) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        api.convert(folder, tmp_path / "out", family=family, **more)
    assert not (tmp_path / "out").exists()
    return caught.value


def copied(folder: Path, tmp_path: Path, change: Callable[[world.Tensors], dict[str, Any]]) -> Path:
    made = Path(shutil.copytree(folder, tmp_path / "in"))
    world.rewritten(change)(made)
    return made


# --- what stands in a pickle, or among its tensors ------------------------------------------------------


def test_a_signal_among_megatron_s_arguments_is_data(originals: Written, tmp_path: Path) -> None:
    """Megatron's --exit-signal is a member of signal.Signals, which Python 3.11.4 and later pickle as a call;
    core/safe_globals.py of Megatron-Core 0.16.1 lists it (NVIDIA/Megatron-LM#1884)."""

    def change(tree: dict[str, Any]) -> dict[str, Any]:
        tree["args"].exit_signal = signal.SIGTERM
        return tree

    made = api.convert(copied(originals("qwen2-mcore-tied"), tmp_path, change), tmp_path / "out")
    plain = api.convert(originals("qwen2-mcore-tied"), tmp_path / "plain")
    assert world.equal(world.tensors_of(made.out), world.tensors_of(plain.out))


@pytest.mark.parametrize("kind", ["complex64", "float32"])
def test_rotary_factors_that_were_saved_as_a_buffer_are_left_out(
    kind: str, originals: Written, tmp_path: Path
) -> None:
    """torchtitan saved `freqs_cis` with the model (pytorch/torchtitan#634)."""
    factors = torch.polar(torch.ones(8, 4), torch.ones(8, 4))
    table = factors if kind == "complex64" else torch.view_as_real(factors)
    source = copied(originals("llama-3-8b"), tmp_path, lambda t: {**t, "freqs_cis": table})
    made = api.convert(source, tmp_path / "out", family="llama")
    told = [*made.opened, *(f"{d.tensor.name}: {d.reason}" for d in made.plan.dropped)]
    assert any("freqs_cis" in line for line in told)
    plain = api.convert(originals("llama-3-8b"), tmp_path / "plain", family="llama")
    assert world.equal(world.tensors_of(made.out), world.tensors_of(plain.out))


def test_a_file_of_complex_rotary_factors_alone_is_still_refused(tmp_path: Path) -> None:
    torch.save({"freqs_cis": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.pth")
    with pytest.raises(CkptToolError) as caught:
        api.open_checkpoint(tmp_path / "x.pth")
    assert caught.value.kind == "unsupported-dtype"


# --- what trainers save of models that they wrap or share out -------------------------------------------


@pytest.mark.parametrize("before", ["", "pretrained_model."])
def test_a_value_head_of_trl_is_left_out(before: str, originals: Written, tmp_path: Path) -> None:
    """huggingface/trl#86 and #865: one file of the model, below `pretrained_model` or not, and `v_head`."""
    head = {"v_head.summary.weight": torch.ones(1, 56), "v_head.summary.bias": torch.ones(1)}
    source = copied(
        originals("qwen2-0.5b"), tmp_path, lambda t: {**{before + k: v for k, v in t.items()}, **head}
    )
    made = api.convert(source, tmp_path / "out", family="qwen2")
    left = json.loads((made.out / "ckpt-tool.json").read_text())
    assert "value head" in json.dumps(left)
    assert world.equal(world.tensors_of(made.out), world.tensors_of(originals("qwen2-0.5b")))


@pytest.mark.parametrize("shape", [(0,), (1,)])
def test_parameters_that_were_not_gathered_are_told_once(
    shape: tuple[int], originals: Written, tmp_path: Path
) -> None:
    """huggingface/transformers#20082, OpenRLHF/OpenRLHF#839; one number each: deepspeedai/DeepSpeed#1394."""

    def change(tensors: world.Tensors) -> world.Tensors:
        return {k: v if "norm" in k else torch.ones(shape, dtype=v.dtype) for k, v in tensors.items()}

    found = refusal(copied(originals("qwen2-0.5b"), tmp_path, change), "qwen2", tmp_path)
    (problem,) = found.problems
    assert problem.kind == "unsupported" and "ZeRO-3" in problem.message
    assert problem.hint is not None and "zero_to_fp32.py" in problem.hint


def test_half_of_a_run_in_an_archive_is_unpacked_first(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive:
        archive.writestr("latest", "global_step7")
        archive.writestr("global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt", "weights")
    with pytest.raises(CkptToolError) as raised:
        api.open_checkpoint(tmp_path / "run.zip")
    hint = raised.value.problems[0].hint or ""
    assert hint.startswith("unpack the archive into DIR; files *_model_states.pt and *_optim_states.pt")


def test_the_shares_of_one_rank_are_named(tmp_path: Path) -> None:
    """pytorch/pytorch#136336: `torch.save(model.state_dict())` after fully_shard pickles DTensors. The pickle
    here calls what such a file calls, without a process group."""
    calls = [
        b"ctorch.distributed.tensor\nDTensor\n",
        b"ctorch.distributed.tensor._dtensor_spec\nDTensorSpec\n)R",
    ]
    content = b"\x80\x02}(X\x01\0\0\0a" + calls[0] + b"X\x01\0\0\0b" + calls[1] + b"%bu."
    for other, kind in ((b"", "unsupported"), (b"X\x01\0\0\0ccos\nsystem\n", "unsafe-pickle")):
        file = tmp_path / f"{kind}.bin"
        torch.save({"w": torch.ones(2)}, file)
        with zipfile.ZipFile(file) as old:
            members = {i.filename: old.read(i) for i in old.infolist()}
        with zipfile.ZipFile(file, "w") as new:
            for name, data in members.items():
                new.writestr(name, content.replace(b"%b", other) if name.endswith("data.pkl") else data)
        with pytest.raises(CkptToolError) as caught:
            api.open_checkpoint(file)
        assert caught.value.kind == kind


def test_weights_below_an_adapter_s_base_layer_are_named(originals: Written, tmp_path: Path) -> None:
    """huggingface/peft#1453: the state of a model that an adapter wraps, without the adapter."""

    def change(tensors: world.Tensors) -> world.Tensors:
        return {k.replace("q_proj.", "q_proj.base_layer."): v for k, v in tensors.items()}

    found = refusal(copied(originals("qwen2-0.5b"), tmp_path, change), "qwen2", tmp_path)
    (problem,) = found.problems
    assert "base_layer" in problem.message and problem.hint is not None and "merge_and_unload" in problem.hint


# --- files beside the model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "value_head.safetensors", "old.safetensors"])
def test_weights_beside_model_safetensors_are_left_aside_and_said(
    name: str, originals: Written, tmp_path: Path
) -> None:
    """huggingface/diffusers#14769 (an earlier save under the other name), LLaMA-Factory's value_head: loaders
    take model.safetensors."""
    source = Path(shutil.copytree(originals("qwen2-0.5b"), tmp_path / "in"))
    other = {k: v + 1 for k, v in load_file(source / "model.safetensors").items()}
    world.save(other if name != "value_head.safetensors" else {"w": torch.ones(2)}, source / name)
    made = api.convert(source, tmp_path / "out", family="qwen2")
    assert any("left aside" in note for note in made.opened)
    assert world.equal(world.tensors_of(made.out), world.tensors_of(originals("qwen2-0.5b")))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": "pt"}, None),
        ({"format": "pt", "step": "9"}, "step"),
        (None, "found none"),
        ({"step": "9"}, "found none"),
        ({"format": "tf"}, "format tf"),
    ],
)
def test_text_of_a_header_is_noted(
    metadata: dict[str, str] | None, words: str | None, conversions: Written, tmp_path: Path
) -> None:
    """ml-explore/mlx#743, safetensors/safetensors#549: transformers 4 refuses text without a format."""
    out = Path(shutil.copytree(conversions("qwen2-0.5b"), tmp_path / "out"))
    tensors = load_file(out / "model.safetensors")
    save_file(tensors, out / "model.safetensors", metadata=metadata)
    report = api.verify(out, levels=("bits",))
    said = [f for f in report.findings if f.check == "header"]
    assert [f.status for f in said] == ["note"] * (words is not None)
    assert words is None or (words in said[0].message and said[0].where == "model.safetensors")


# --- sentences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", "1e-05"), ("rope_theta", "500000"), ("rope_scaling", {"factor": "4"})]
)
def test_a_number_that_is_text_is_shown_as_text(
    key: str, value: Any, conversions: Written, tmp_path: Path
) -> None:
    """Readers of YAML 1.1 take `1e-5` for text, and so it comes into config.json."""
    source = Path(shutil.copytree(conversions("llama-2-7b"), tmp_path / "in"))
    value = {"rope_type": "linear", **value} if isinstance(value, dict) else value
    world.document("config.json", lambda c: c.update({key: value}))(source)
    found = refusal(source, "llama", tmp_path, to="original")
    said = [p.message for p in found.problems if p.kind == "bad-config"]
    assert len(said) == 1 and "number" in said[0] and 'found the text "' in said[0]


def test_problems_of_all_layers_are_one_line(
    originals: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: world.Tensors) -> world.Tensors:
        return {k: v.to(torch.int8) if v.ndim == 2 else v for k, v in tensors.items()}

    source = copied(originals("qwen2-0.5b"), tmp_path, change)
    assert program.run(["convert", "qwen2", "--in", str(source), "--out", str(tmp_path / "out")]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert len(lines) == 8 and sum("model.layers.{0..2}." in x for x in lines) == 7


def test_numbers_with_gaps_or_two_that_vary_stay_apart() -> None:
    def text(*names: str) -> list[str]:
        return CkptToolError(*(Problem("k", "m", "f", n) for n in names)).text().splitlines()

    assert text("a.0.b", "a.2.b") == ["error[k]: f: a.0.b: m", "error[k]: f: a.2.b: m"]
    assert len(text("a.0.b.0", "a.1.b.1")) == 2
    assert text("a.1.b", "c", "a.0.b") == ["error[k]: f: a.{0..1}.b: m", "error[k]: f: c: m"]
    assert text("x1y.weight", "x2y.weight") == ["error[k]: f: x1y.weight: m", "error[k]: f: x2y.weight: m"]


def test_what_a_download_lost_leads_out(originals: Written, tmp_path: Path) -> None:
    """A web page in place of a tokenizer, a shard that stops early, a last part that is not there."""
    page = Path(shutil.copytree(originals("llama-3-8b"), tmp_path / "page"))
    (page / "tokenizer.model").write_bytes(b"<!DOCTYPE html><html>")
    short = Path(shutil.copytree(originals("llama-3-8b"), tmp_path / "short"))
    weights = (short / "consolidated.00.pth").read_bytes()
    (short / "consolidated.00.pth").write_bytes(weights[:-2000])
    parts = Path(shutil.copytree(originals("opt-13b"), tmp_path / "parts"))
    (parts / "reshard-model_part-1.pt").unlink()
    told = []
    for folder, family in ((page, "llama"), (short, "llama"), (parts, "opt")):
        (problem,) = refusal(folder, family, tmp_path).problems
        told.append((problem.kind, problem.hint or ""))
    assert [kind for kind, _ in told] == ["bad-tokenizer", "truncated", "missing-shard"]
    assert "download the file again" in told[0][1] and "get the whole file" in told[1][1]
    assert told[2][1] == "download what is missing too"


# --- what contradicts what a document says --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "document", "key", "stored", "width"),
    [
        ("llama-2-7b", "llama", "params.json", "n_heads", 5, 20),
        ("llama-1-7b", "llama", "params.json", "n_heads", 4, 16),
        ("pythia-410m", "gpt-neox", "config.json", "num_attention_heads", 3, 72),
    ],
)
def test_stored_frequencies_tell_another_number_of_heads(
    name: str,
    family: str,
    document: str,
    key: str,
    stored: int,
    width: int,
    originals: Written,
    tmp_path: Path,
) -> None:
    """A params.json of another repository (jankais3r/LLaMA_MPS#11: "Results gibberish"): without groups every
    number of heads fits the matrices."""
    source = Path(shutil.copytree(originals(name), tmp_path / "in"))
    world.document(document, lambda c: c.update({key: c[key] // 2}))(source)
    (problem,) = refusal(source, family, tmp_path).problems
    assert problem.kind == "config-mismatch" and "rotary frequencies" in problem.message
    assert f"half of head_dim {width} " in problem.message and problem.message.endswith(f"found {stored}")
    assert "--set num_attention_heads=N" in str(problem.hint)


@pytest.mark.parametrize(
    ("name", "document", "text", "found"),
    [
        ("llama-2-7b", "params.json", '\ufeff{"dim": 40}', "byte order mark"),
        ("mistral-7b-v0.1", "params.json", '{"dim": 40,}', "double quotes"),
        ("llama-3-8b", "params.json", "", "nothing"),
        ("qwen2-0.5b", "config.json", "hidden_size: 40\n", "a JSON object"),
    ],
)
def test_auto_tells_a_broken_document_and_no_doubt_between_families(
    name: str, document: str, text: str, found: str, originals: Written, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(originals(name), tmp_path / "in"))
    (source / document).write_text(text)
    (problem,) = refusal(source, "auto", tmp_path).problems
    assert problem.kind == "bad-config" and problem.file == document and found in problem.message


def test_the_first_name_of_the_class_of_llama_is_read(originals: Written, tmp_path: Path) -> None:
    """LLaMAForCausalLM of March 2023 (decapoda-research/llama-7b-hf; huggingface/transformers#22222)."""
    plain = api.convert(originals("llama-1-7b"), tmp_path / "plain", family="llama").out
    old = Path(shutil.copytree(plain, tmp_path / "old"))
    (old / "ckpt-tool.json").unlink()
    world.document("config.json", lambda c: c.update(architectures=["LLaMAForCausalLM"]))(old)
    made = api.convert(old, tmp_path / "out")
    assert "config.json: LLaMAForCausalLM is LlamaForCausalLM, and written as that" in made.plan.notes
    config = json.loads((made.out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert api.verify(old, originals("llama-1-7b"), levels=("coverage", "bits")).exit_code == 0
    api.convert(old, tmp_path / "back", family="llama", to="original")
    kept, back = (world.load(f / "consolidated.00.pth") for f in (originals("llama-1-7b"), tmp_path / "back"))
    assert world.equal({k: v for k, v in kept.items() if "freqs" not in k}, back)
