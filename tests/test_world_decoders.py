"""Decoders as people cut, tie and save them: layers taken out, heads of their own, GPT-2 by other programs.
Each is judged by the bytes of the same model without the change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError, Problem
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify
from tests import world

Written = Callable[[str], Path]
BITS = ("coverage", "bits")


def copied(folder: Path, tmp_path: Path, *changes: world.Change) -> Path:
    made = Path(shutil.copytree(folder, tmp_path / "in"))
    (made / "ckpt-tool.json").unlink(missing_ok=True)
    for change in changes:
        change(made)
    return made


def refusal(folder: Path, tmp_path: Path, **more: Any) -> Problem:
    with pytest.raises(CkptToolError) as caught:
        api.convert(folder, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()
    return caught.value.problems[0]


# --- layers taken out -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "back", "file", "key", "pattern"),
    [
        ("llama-3.1-8b", False, "params.json", "n_layers", "layers.{}.*"),
        ("mistral-7b-v0.3", True, "config.json", "num_hidden_layers", "model.layers.{}.*"),
        ("opt-float32", True, "config.json", "num_hidden_layers", "*.layers.{}.*"),
        ("gpt-neox-tied", False, "config.json", "num_hidden_layers", "*.layers.{}.*"),
    ],
)
def test_a_layer_that_the_config_does_not_count_may_be_dropped(
    variant: str,
    back: bool,
    file: str,
    key: str,
    pattern: str,
    originals: Written,
    conversions: Written,
    tmp_path: Path,
) -> None:
    """A model whose config.json was cut and whose weights were not: the hint named --drop, which was refused
    all the same."""
    folder = (conversions if back else originals)(variant)
    source = copied(folder, tmp_path, world.document(file, lambda c: c.update({key: c[key] - 1})))
    cut = json.loads((source / file).read_text())[key]
    found = refusal(source, tmp_path)
    assert (found.kind, found.where) == ("uncovered-tensors", "num_hidden_layers")
    assert found.hint == f"--set num_hidden_layers={cut + 1} if all of them are the model's"
    api.convert(source, tmp_path / "out", options=api.Options(drop=frozenset([pattern.format(cut)])))
    whole = world.tensors_of(conversions(variant))
    expected = {k: v for k, v in whole.items() if f".layers.{cut}." not in k}
    assert len(expected) < len(whole)
    assert world.equal(world.tensors_of(tmp_path / "out"), expected)
    assert verify(tmp_path / "out", source, levels=BITS).status == "pass"


@pytest.mark.parametrize("variant", ["ministral3-3b", "mistral-7b-v0.3"])
def test_kinds_of_layers_of_another_number_are_never_taken(
    variant: str, conversions: Written, tmp_path: Path
) -> None:
    """`layer_types` of the model before layers were taken out, with which no release loads it
    (peremartra/optipfair#20): the hint named sliding_window, which wrote it all the same."""

    def longer(config: dict[str, Any]) -> None:
        config["layer_types"] = ["full_attention"] * (config["num_hidden_layers"] + 1)

    source = copied(conversions(variant), tmp_path, world.document("config.json", longer))
    for settings in ({}, {"sliding_window": None}):
        found = refusal(source, tmp_path, options=api.Options(settings=settings))
        assert (found.kind, found.where) == ("bad-config", "layer_types")
        assert found.hint is not None and "--set layer_types=null" in found.hint
    options = api.Options(settings={"layer_types": None})
    api.convert(source, tmp_path / "out", options=options)
    assert verify(tmp_path / "out", source, levels=BITS, settings=options.settings).status == "pass"
    assert json.loads((tmp_path / "out/config.json").read_text()).get("layer_types") is None


@pytest.mark.parametrize("said", [None, [], ...])
@pytest.mark.parametrize("variant", ["llama-2-7b", "qwen2-0.5b", "gpt-neox-tied"])
def test_the_way_back_needs_no_class_in_config_json(
    variant: str, said: Any, conversions: Written, tmp_path: Path
) -> None:
    """Configs of config classes alone have no `architectures` (unslothai/unsloth#1197, KeyError there);
    auto refused the way back, with a hint to leave it out, and the family by name took it."""

    def unsaid(config: dict[str, Any]) -> None:
        config.pop("architectures")
        config.update({} if said is ... else {"architectures": said})

    source = copied(conversions(variant), tmp_path, world.document("config.json", unsaid))
    api.convert(source, tmp_path / "auto", to="original")
    api.convert(conversions(variant), tmp_path / "named", to="original")
    (file, *_), (other, *_) = world.weight_files(tmp_path / "auto"), world.weight_files(tmp_path / "named")
    assert world.equal(world.load(file), world.load(other))


# --- heads ----------------------------------------------------------------------------------------------


def test_an_opt_with_a_head_of_its_own_is_read(conversions: Written, tmp_path: Path) -> None:
    """OPTForCausalLM of transformers 5 with tie_word_embeddings false, whose file has lm_head.weight: it was
    called missing."""

    def untied(folder: Path) -> None:
        tensors = world.tensors_of(folder)
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].flip(0)
        world.save(tensors, folder / "model.safetensors")
        world.document("config.json", lambda c: c.update(tie_word_embeddings=False))(folder)

    source = copied(conversions("opt-float32"), tmp_path, untied)
    api.convert(source, tmp_path / "out")
    assert world.equal(world.tensors_of(tmp_path / "out"), world.tensors_of(source))
    report = verify(tmp_path / "out", source, levels=("coverage", "bits", "parity"))
    assert report.status == "pass", [f.message for f in report.findings]
    tensors = world.tensors_of(source)
    world.save(
        tensors | {"lm_head.weight": tensors["lm_head.weight"][:-1].clone()}, source / "model.safetensors"
    )
    shutil.rmtree(tmp_path / "out")
    found = refusal(source, tmp_path)
    assert (found.kind, found.where) == ("shape-mismatch", "lm_head.weight")


def test_a_head_that_was_dropped_as_the_hint_says_fails_nothing(conversions: Written, tmp_path: Path) -> None:
    """`--drop lm_head.weight uses the embedding`, says a tied config beside a head of its own; `verify` then
    failed what that made."""

    def headed(folder: Path) -> None:
        tensors = world.tensors_of(folder)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
        world.save(tensors, folder / "model.safetensors")
        world.document("config.json", lambda c: c.update(tie_word_embeddings=True))(folder)

    source = copied(conversions("llama-2-7b"), tmp_path, headed)
    assert refusal(source, tmp_path).kind == "tied-mismatch"
    api.convert(source, tmp_path / "out", options=api.Options(drop=frozenset(["lm_head.weight"])))
    report = verify(tmp_path / "out", source, levels=BITS)
    assert report.status == "pass", [f.message for f in report.findings]
    assert any("as asked for with --drop: lm_head.weight" in f.message for f in report.findings)


def test_a_llama_without_a_head_gets_one_on_the_way_back(originals: Written, tmp_path: Path) -> None:
    """Meta's code has a head of its own and loads with strict=False: without output.weight it draws one. A
    tied original whose file has none came back without, under a note that it was there."""
    settings = VARIANTS["llama-3.2-1b"].settings

    def headless(tensors: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in tensors.items() if k != "output.weight"}

    source = copied(originals("llama-3.2-1b"), tmp_path, world.rewritten(headless))
    api.convert(source, tmp_path / "out", options=api.Options(settings=settings))
    made = api.convert(tmp_path / "out", tmp_path / "back", to="original")
    assert any(note.startswith("output.weight is a copy of the embedding") for note in made.plan.notes)
    found = world.load(tmp_path / "back/consolidated.00.pth")
    assert torch.equal(found["output.weight"], found["tok_embeddings.weight"])
    assert verify(tmp_path / "back", tmp_path / "out", levels=BITS).status == "pass"


def test_a_params_json_that_says_tied_needs_no_head(originals: Written, tmp_path: Path) -> None:
    def headless(tensors: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in tensors.items() if k != "output.weight"}

    tied = world.document("params.json", lambda p: p.update(tied_embeddings=True))
    source = copied(originals("llama-2-7b"), tmp_path, world.rewritten(headless), tied)
    api.convert(source, tmp_path / "out")
    api.convert(tmp_path / "out", tmp_path / "back", to="original")
    assert "output.weight" not in world.load(tmp_path / "back/consolidated.00.pth")
    assert (tmp_path / "back/params.json").read_bytes() == (source / "params.json").read_bytes()


@pytest.mark.parametrize("word", ["module.", "_orig_mod."])
def test_settings_of_a_wrapped_opt_come_back(word: str, originals: Written, tmp_path: Path) -> None:
    """The wrapper took the dict `model` with it, so what came back had no cfg, and its heads were asked."""
    source = copied(originals("opt-350m"), tmp_path, world.prefixed(word))
    api.convert(source, tmp_path / "out")
    api.convert(tmp_path / "out", tmp_path / "back", to="original")
    api.convert(tmp_path / "back", tmp_path / "again")
    assert world.equal(world.tensors_of(tmp_path / "again"), world.tensors_of(tmp_path / "out"))


@pytest.mark.parametrize(
    "said",
    [
        {"torch_dtype": "auto"},
        {"torch_dtype": "float32", "dtype": "bfloat16"},
        {"torch_dtype": "bf16"},
        {"dtype": {"text_config": "bfloat16"}},
    ],
)
def test_a_config_of_two_dtypes_or_of_none_gets_that_of_the_tensors(
    said: dict[str, Any], conversions: Written, tmp_path: Path
) -> None:
    """config.json was kept as it is, and the conversion ended with exit code 1."""
    source = copied(
        conversions("llama-2-7b"), tmp_path, world.document("config.json", lambda c: c.update(said))
    )
    made = api.convert(source, tmp_path / "out")
    assert made.report is not None and made.report.status == "pass"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {k: config[k] for k in said} == dict.fromkeys(said, "bfloat16")
    told = [n for n in made.plan.notes if n.endswith("; bfloat16 is written (dtype of the tensors)")]
    why = "is not what the other key says" if len(said) > 1 else "is nothing that a model is loaded by"
    assert len(told) == 1 and f": {json.dumps([*said.values()][0])} {why}" in told[0]
    assert verify(tmp_path / "out", source, levels=BITS).status == "pass"


# --- experts --------------------------------------------------------------------------------------------


def test_experts_of_a_mixtral_under_the_names_of_its_router_in_memory_are_read(
    conversions: Written, tmp_path: Path
) -> None:
    """`mlp.` for `block_sparse_moe.`, expert by expert (EfficientMoE/MoE-Infinity#109), which transformers 5
    loads."""

    def called(folder: Path) -> None:
        tensors = world.tensors_of(folder)
        moved = {k.replace("block_sparse_moe.", "mlp."): v for k, v in tensors.items()}
        assert moved.keys() != tensors.keys()
        world.save(moved, folder / "model.safetensors")

    source = copied(conversions("mixtral-b"), tmp_path, called)
    made = api.convert(source, tmp_path / "out")
    notes = [*made.opened, *made.plan.notes]
    assert any(note.startswith("experts are called as transformers 5") for note in notes)
    assert world.equal(world.tensors_of(tmp_path / "out"), world.tensors_of(conversions("mixtral-b")))
    report = verify(tmp_path / "out", source, levels=("coverage", "bits", "parity"))
    assert report.status == "pass", [f.message for f in report.findings]


def test_an_expert_under_two_names_of_memory_is_refused(conversions: Written, tmp_path: Path) -> None:
    """One of the two was read and the other left out, and nothing said so."""
    layer = "model.layers.0.mlp.experts."

    def doubled(folder: Path) -> None:
        tensors = world.tensors_of(folder)
        moved = {k.replace("block_sparse_moe.", "mlp."): v for k, v in tensors.items()}
        count = sum(k.startswith(layer) and k.endswith(".w2.weight") for k in moved)
        down = torch.stack([moved[f"{layer}{e}.w2.weight"].flip(0) for e in range(count)])
        world.save(moved | {f"{layer}down_proj": down}, folder / "model.safetensors")

    found = refusal(copied(conversions("mixtral-b"), tmp_path, doubled), tmp_path)
    own = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    places = {f"{layer}0.w2.weight", f"{layer}down_proj"}
    assert found.kind == "unsupported" and found.where in places
    assert found.message in {
        f"expected each expert once, found {own} in {one} and in {other}"
        for one in places
        for other in places - {one}
    }


@pytest.mark.parametrize("around", [lambda m: m, lambda m: {"model": m, "epoch": 1}])
def test_a_whole_model_says_how_to_keep_its_weights(around: Callable[[Any], object], tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4))
    torch.save(around(model), tmp_path / "model.pt")
    found = refusal(tmp_path / "model.pt", tmp_path)
    assert found.kind == "unsafe-pickle"
    assert found.hint is not None and "torch.save(model.state_dict(), OUT)" in found.hint


# --- GPT-2 by other programs ----------------------------------------------------------------------------


def nano(bias: bool) -> world.Tensors:
    """The names and shapes of karpathy/nanoGPT's model.py: nn.Linear throughout."""
    shapes = {"attn.c_attn": (36, 12), "attn.c_proj": (12, 12), "mlp.c_fc": (48, 12), "mlp.c_proj": (12, 48)}
    made = {"wte.weight": torch.ones(20, 12), "wpe.weight": torch.ones(8, 12), "ln_f.weight": torch.ones(12)}
    for name, shape in shapes.items():
        made[f"h.0.{name}.weight"] = torch.ones(shape)
        if bias:
            made[f"h.0.{name}.bias"] = torch.ones(shape[0])
    made |= {f"h.0.{norm}.weight": torch.ones(12) for norm in ("ln_1", "ln_2")}
    return {f"transformer.{k}": v for k, v in made.items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", [True, False])
def test_matrices_of_nanogpt_are_named(bias: bool, config: bool, tmp_path: Path) -> None:
    """Its names are GPT-2's, its matrices the transposes: the hint was to put a config.json beside them, and
    then that shapes differ, or `--set NAME=VALUE`."""
    (tmp_path / "in").mkdir()
    if config:
        torch.save(nano(bias), tmp_path / "in/pytorch_model.bin")
        said = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_embd": 12}
        (tmp_path / "in/config.json").write_text(json.dumps({**said, "n_head": 2, "vocab_size": 20}))
        source = tmp_path / "in"
    else:
        source = tmp_path / "in/ckpt.pt"
        prefixed = {f"_orig_mod.{k}": v for k, v in nano(bias).items()}
        torch.save({"model": prefixed, "model_args": {"n_layer": 1, "block_size": 8}}, source)
    found = refusal(source, tmp_path)
    assert (found.kind, found.where) == ("unsupported", "transformer.h.0.attn.c_attn.weight")
    assert "nanoGPT" in found.message and found.hint is not None and found.hint.startswith("transpose")


def test_another_class_with_these_names_is_not_called_nanogpt(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    torch.save(nano(True), tmp_path / "in/pytorch_model.bin")
    (tmp_path / "in/config.json").write_text(json.dumps({"model_type": "gpt_bigcode"}))
    assert "nanoGPT" not in refusal(tmp_path / "in", tmp_path).message
