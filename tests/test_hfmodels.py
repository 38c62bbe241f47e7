"""Models in the Hugging Face layout already, of any head: made canonical, and verified as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import api, program
from ckpt_tool.convert import canonical
from ckpt_tool.convert.families import FAMILIES, family
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import CkptToolError
from ckpt_tool.verify import compare, verify
from ckpt_tool.verify.compute import ONE_READING
from ckpt_tool.verify.recording import record
from ckpt_tool.verify.report import Report

transformers = pytest.importorskip("transformers")

GPT = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
SIZES = {"vocab_size": 89, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 64,
}  # fmt: skip
LUKE = BERT | {"entity_vocab_size": 23, "entity_emb_size": 12, "pad_token_id": 1}
MOBILE = BERT | {"embedding_size": 12, "intra_bottleneck_size": 20, "true_hidden_size": 20}
LLAMA = BERT | {"num_key_value_heads": 2}
# class -> configuration, numbers, what transformers calls the results that are compared
MODELS: dict[str, tuple[str, Mapping[str, Any], set[str | None]]] = {
    "LlamaForSequenceClassification": ("LlamaConfig", LLAMA, {"logits"}),
    "LlamaForQuestionAnswering": ("LlamaConfig", LLAMA | {"num_labels": 2}, {"start_logits", "end_logits"}),
    "LlamaModel": ("LlamaConfig", LLAMA, {None}),
    # as stanford-crfm's models of 2021 and BioMedLM compute
    "GPT2LMHeadModel": ("GPT2Config", GPT | {"scale_attn_by_inverse_layer_idx": True}, {None}),
    "GPTNeoXForTokenClassification": ("GPTNeoXConfig", BERT, {"logits"}),
    "GPT2ForSequenceClassification": ("GPT2Config", GPT, {"logits"}),
    "MobileBertForMultipleChoice": ("MobileBertConfig", MOBILE, {"logits"}),
    "LukeForEntityPairClassification": ("LukeConfig", LUKE, {"logits"}),
    "LukeForEntitySpanClassification": ("LukeConfig", LUKE, {"logits"}),
}
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`model(architecture)`: a tiny one, as transformers saves it."""
    root = tmp_path_factory.mktemp("hf")

    def made(architecture: str) -> Path:
        folder = root / architecture
        if not folder.is_dir():
            named, numbers, _ = MODELS[architecture]
            torch.manual_seed(5)
            config = getattr(transformers, named)(**{**SIZES, **numbers})
            built = getattr(transformers, architecture)(config)
            with torch.no_grad():
                for p in built.parameters():
                    p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
            built.save_pretrained(folder)
        return folder

    return made


def rewritten(
    source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any
) -> Path:
    """The model with other tensors, in two files of pickles, and other values of config.json."""
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    names = sorted(tensors)
    halves = {n: f"pytorch_model-0000{1 + (k % 2)}-of-00002.bin" for k, n in enumerate(names)}
    for file in sorted(set(halves.values())):
        torch.save({n: tensors[n] for n in names if halves[n] == file}, out / file)
    index = {"metadata": {"total_size": 0}, "weight_map": halves}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    document = json.loads((source / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    return out


def failed(report: Report) -> list[tuple[str, str, str, str | None]]:
    return [
        (f.level, f.check, f.message, f.where) for f in report.findings if f.status in ("fail", "undecided")
    ]


def refused(folder: Path, **options: Any) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        api.plan(folder, options=Options(**options))
    return caught.value


def opt(folder: Path, **numbers: Any) -> Path:
    """A tiny OPT as transformers saves it."""
    sizes = {k: v for k, v in BERT.items() if k != "intermediate_size"}
    sizes |= {"ffn_dim": 40, "word_embed_proj_dim": 24, "vocab_size": 89}
    torch.manual_seed(7)
    built = transformers.OPTForCausalLM(transformers.OPTConfig(**{**sizes, **numbers}))
    with torch.no_grad():
        for p in built.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    built.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "numbers",
    [
        # as the large models of Galactica have it (transformers, pull request 20390)
        {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "learned_embeddings": True,
            "scale_embeddings": False,
        },
        {"layer_norm_elementwise_affine": False},
        {"_remove_final_layer_norm": True},
    ],
    ids=["no biases", "no weights of norms", "no last norm"],
)
def test_an_opt_that_lacks_what_config_json_denies(
    numbers: dict[str, Any], tmp_path: Path, few_prompts: None
) -> None:
    """huggingface/transformers#20390: refused as missing tensors, or exit code 1 of a right conversion."""
    source = opt(tmp_path / "in", **numbers)
    assert program.run(["convert", "auto", "--in", str(source), "--out", str(tmp_path / "out")]) == 0
    a, b = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    report = verify(tmp_path / "out", source, against="transformers")
    assert (report.status, failed(report)) == ("pass", [])


def test_tensors_that_config_json_denies_are_refused(tmp_path: Path) -> None:
    source = opt(tmp_path / "in")
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"enable_bias": False}))
    error = refused(source, settings={})
    (problem,) = error.problems
    assert (problem.kind, problem.where) == ("config-mismatch", "enable_bias")
    assert problem.hint == "--set enable_bias=true if the file is wrong"
    api.plan(source, options=Options(settings={"enable_bias": True}))


def test_a_dtype_that_config_json_says_otherwise_is_carried(
    model: Made, tmp_path: Path, few_prompts: None
) -> None:
    """Fine-tunes are saved in another dtype than their config.json says; exit code 1 said a difference."""
    source = rewritten(model("LlamaModel"), tmp_path / "in", lambda w: None, dtype="float16")
    assert program.run(["convert", "auto", "--in", str(source), "--out", str(tmp_path / "out")]) == 0
    report = verify(tmp_path / "out", source, levels=("coverage", "bits"))
    assert (report.status, failed(report)) == ("pass", [])
    (told,) = (f for f in report.findings if f.where == "config.json: dtype")
    assert (told.status, told.message) == ("note", "expected float32 (dtype of the tensors), found float16")
    (tmp_path / "out" / "config.json").write_text(
        (source / "config.json").read_text().replace("float16", "auto")
    )
    assert verify(tmp_path / "out", source, levels=("coverage", "bits")).status == "fail"


def test_what_no_reading_computes_is_no_difference(model: Made, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(model("GPT2ForSequenceClassification"), source)
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scale_attn_weights": False}))
    api.convert(source, tmp_path / "out")
    report = verify(tmp_path / "out", source)
    assert failed(report) == [] and report.exit_code == 0
    (lockstep,) = (f for f in report.findings if f.check == "lockstep")
    assert lockstep.status == "skipped" and "scale_attn_weights" in lockstep.message


def test_a_source_that_the_library_does_not_load_says_nothing_of_what_was_made_of_it(
    tmp_path: Path, few_prompts: None
) -> None:
    """On the way back the library reads the source, here weights in a dict of a trainer's."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**{**LLAMA, "vocab_size": 89})
    source = tmp_path / "in"
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save({"model_state_dict": weights, "epoch": 3}, source / "pytorch_model.bin")
    api.convert(source, tmp_path / "out", family="llama", to="original")
    report = verify(tmp_path / "out", source, levels="bits", against="transformers")
    (load,) = (f for f in report.findings if f.check == "load")
    assert load.status == "undecided" and "loads the source with missing keys" in load.message
    assert failed(report) == [(load.level, "load", load.message, None)] and report.exit_code == 2


# --- verified as they are -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", MODELS)
def test_a_head_is_computed_as_its_class_does(architecture: str, model: Made) -> None:
    report = verify(model(architecture), no_source=True, levels="coverage", against="transformers")
    assert failed(report) == []
    found = {f.where for f in report.findings if f.level == "transformers" and f.check == "logits"}
    assert MODELS[architecture][2] <= found
    (whole,) = (f for f in report.findings if f.check == "target tensors" and f.status == "pass")
    assert architecture in whole.message
    assert report.status == "undecided", "nothing says where the weights come from"


def test_what_is_recorded_of_a_head_is_held_against_it(model: Made, tmp_path: Path) -> None:
    source, file = model("LlamaForQuestionAnswering"), tmp_path / "values.json"
    file.write_bytes(record(source, "me/tiny"))
    entries = json.loads(file.read_bytes())["entries"]
    assert {e["expected"]["tensor"] for e in entries} == {"start_logits", "end_logits"}
    report = verify(source, no_source=True, levels="documented", expectations=file)
    assert report.status == "pass" and f"gives the {len(entries)} values" in report.headline

    def other(w: dict[str, torch.Tensor]) -> None:
        w["qa_outputs.bias"] = w["qa_outputs.bias"] + 0.01

    wrong = rewritten(source, tmp_path / "wrong", other)
    assert verify(wrong, no_source=True, levels="documented", expectations=file).status == "fail"


def test_the_published_model_of_a_download_is_found_by_its_folder(model: Made, tmp_path: Path) -> None:
    """As huggingface_hub keeps it; this one only has its name."""
    folder = tmp_path / "models--openai-community--gpt2" / "snapshots" / "0123abcd"
    shutil.copytree(model("GPT2ForSequenceClassification"), folder)
    report = verify(folder, no_source=True, levels="documented")
    (told,) = (f for f in report.findings if f.status == "fail")
    assert told.message.startswith(
        "this is not openai-community/gpt2, whose documented values it cannot have"
    )


# --- made canonical -----------------------------------------------------------------------------------------


def test_every_family_says_how_it_is_held() -> None:
    assert all(callable(family(name).held) for name in FAMILIES)


@pytest.mark.parametrize("architecture", ["LlamaForQuestionAnswering", "LukeForEntityPairClassification"])
def test_pickles_become_what_the_class_itself_writes(architecture: str, model: Made, tmp_path: Path) -> None:
    source = rewritten(model(architecture), tmp_path / "in", lambda w: None)
    api.convert(source, tmp_path / "out")
    here, there = (load_file(p / "model.safetensors") for p in (tmp_path / "out", model(architecture)))
    assert here.keys() == there.keys() and all(torch.equal(here[n], there[n]) for n in here)
    config = "config.json"
    assert (tmp_path / "out" / config).read_bytes() == (source / config).read_bytes()
    report = verify(tmp_path / "out", source, levels=("coverage", "bits"))
    assert report.status == "pass" and report.exactness == "bit-identical"
    again = api.convert(tmp_path / "out", tmp_path / "again", options=Options(max_shard_bytes=20_000))
    assert len(again.plan.outputs) > 1 and {s.note for s in again.plan.steps} == {"rename"}


def test_both_sides_of_parity_have_one_reading_and_it_says_so(model: Made, tmp_path: Path) -> None:
    source = model("LlamaForSequenceClassification")
    api.convert(source, tmp_path / "out")
    report = verify(tmp_path / "out", source, levels="parity")
    assert report.status == "pass" and ONE_READING in {f.message for f in report.findings}
    wrong = load_file(tmp_path / "out" / "model.safetensors")
    wrong["score.weight"] = wrong["score.weight"].flip(0)
    save_file(wrong, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert verify(tmp_path / "out", source, levels="parity").status == "fail"


def test_names_and_tables_of_old_releases(model: Made, tmp_path: Path) -> None:
    def old(w: dict[str, torch.Tensor]) -> None:
        """As the first GPT-2 files: no prefix, a mask in each layer, the head again."""
        for name in list(w):
            if name != "score.weight":
                w[name.removeprefix("transformer.")] = w.pop(name)
        del w["score.weight"]
        for i in range(2):
            w[f"h.{i}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
            w[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        w["lm_head.weight"] = w["wte.weight"].clone()

    source = model("GPT2ForSequenceClassification")
    plain = rewritten(source, tmp_path / "gpt2", old, architectures=["GPT2LMHeadModel"])
    made = api.convert(plain, tmp_path / "out").plan
    found = load_file(tmp_path / "out" / "model.safetensors")
    theirs = {n: t for n, t in load_file(source / "model.safetensors").items() if n != "score.weight"}
    assert found.keys() == theirs.keys() and all(torch.equal(found[n], theirs[n]) for n in found)
    assert {d.reason for d in made.dropped} == {"the causal mask"} and len(made.dropped) == 4
    assert any("tensors get the names that GPT2LMHeadModel writes" in n for n in made.notes)
    assert [s.sources[0].name for s in made.steps if s.compare == "tied"] == ["lm_head.weight"]
    assert verify(tmp_path / "out", plain, levels=("coverage", "bits")).status == "pass"

    def both_ways(w: dict[str, torch.Tensor]) -> None:
        old(w)
        w["h.1.attn.bias"][..., 0, 1] = 1

    seen = rewritten(source, tmp_path / "seen", both_ways, architectures=["GPT2LMHeadModel"])
    api.convert(seen, tmp_path / "blind")
    report = verify(tmp_path / "blind", seen, levels=("coverage", "bits"))
    assert report.status == "fail" and [f.where for f in report.findings if f.status == "fail"] == [
        "h.1.attn.bias"
    ]

    def other(w: dict[str, torch.Tensor]) -> None:
        old(w)
        w["lm_head.weight"] += 1

    apart = rewritten(source, tmp_path / "apart", other, architectures=["GPT2LMHeadModel"])
    with pytest.raises(CkptToolError) as caught:
        api.convert(apart, tmp_path / "none")
    assert "lm_head.weight" in caught.value.text() and not (tmp_path / "none").exists()


def test_norms_called_gamma_and_beta(model: Made, tmp_path: Path) -> None:
    def old(w: dict[str, torch.Tensor]) -> None:
        for name in [n for n in w if "LayerNorm." in n]:
            w[name.replace(".weight", ".gamma").replace(".bias", ".beta")] = w.pop(name)

    source = model("MobileBertForMultipleChoice")
    made = api.convert(rewritten(source, tmp_path / "in", old), tmp_path / "out").plan
    found, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "out", source))
    assert found.keys() == theirs.keys() and all(torch.equal(found[n], theirs[n]) for n in found)
    assert any("gamma and beta" in n for n in made.notes)


def test_a_folder_is_refused_that_its_class_does_not_fit(model: Made, tmp_path: Path) -> None:
    source = model("LlamaForSequenceClassification")

    def case(name: str, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Path:
        return rewritten(source, tmp_path / name, lambda w: [change(w)].clear(), **config)

    error = refused(case("headless", lambda w: w.pop("score.weight")))
    assert error.kind == "missing-tensor" and "score.weight" in error.text()
    error = refused(case("scalar", lambda w: w.update({"score.weight": torch.tensor(1.0)})))
    assert error.kind == "config-mismatch" and "found no rows" in error.text()
    error = refused(case("labels", lambda w: None, id2label={"0": "a", "1": "b"}))
    assert error.kind == "config-mismatch" and "2 labels" in error.text()
    error = refused(case("layer", lambda w: w.pop("model.layers.1.mlp.up_proj.weight")))
    assert error.kind == "missing-tensor" and "layers.1.mlp.up_proj" in error.text()
    error = refused(case("more", lambda w: w.update({"model.extra.weight": torch.ones(2, 2)})))
    assert error.kind == "uncovered-tensors"
    error = refused(case("width", lambda w: None, intermediate_size=44))
    assert error.kind == "config-mismatch" and "intermediate_size" in error.text()
    error = refused(case("class", lambda w: None, architectures=["LlamaForPigs"]))
    assert error.kind == "unsupported" and "LlamaForPigs" in error.text()
    error = refused(case("packed", lambda w: w.update({"score.weight": w["score.weight"].to(torch.int8)})))
    assert error.kind == "unsupported-dtype" and "score.weight" in error.text()
    assert refused(source, gqa=1).kind == "usage"
    assert refused(source, settings={"numm_heads": 3}).kind == "usage"


def test_answers_have_two_rows_whatever_labels_there_are(model: Made, tmp_path: Path) -> None:
    """A decoder's class asks for two; the head of others is as high as config.json has labels."""
    decoder = model("LlamaForQuestionAnswering")
    three = {"id2label": {str(k): f"LABEL_{k}" for k in range(3)}}
    api.plan(rewritten(decoder, tmp_path / "right", lambda w: None, **three))

    def cut(w: dict[str, torch.Tensor]) -> None:
        w["qa_outputs.weight"] = w["qa_outputs.weight"][:1].clone()

    error = refused(rewritten(decoder, tmp_path / "one", cut))
    assert error.kind == "config-mismatch" and "2 rows" in error.text()

    def encoder(w: dict[str, torch.Tensor]) -> None:
        w["qa_outputs.weight"] = w.pop("classifier.weight")[:2, :24].clone()
        w["qa_outputs.bias"] = torch.ones(2)

    asked = {"architectures": ["LukeForQuestionAnswering"]}
    source = model("LukeForEntityPairClassification")
    error = refused(rewritten(source, tmp_path / "luke", encoder, **asked, **three))
    assert error.kind == "config-mismatch" and "3 labels" in error.text()
    two = {"id2label": {"0": "a", "1": "b"}}
    assert api.plan(rewritten(source, tmp_path / "two", encoder, **asked, **two)).family == "mluke"


def worded(w: dict[str, torch.Tensor]) -> None:
    """A model alone with a head of words."""
    for name in list(w):
        w[f"model.{name}"] = w.pop(name)
    w["lm_head.weight"] = torch.ones(89, 24)


@pytest.mark.parametrize("before", ["model.", ""])
def test_what_answers_questions_is_written_as_its_class_loads_it(
    before: str, model: Made, tmp_path: Path
) -> None:
    """Other names than `transformer.` its class would leave out, and draw all weights at random."""
    source = model("LlamaForQuestionAnswering")

    def moved(w: dict[str, torch.Tensor]) -> None:
        for name in [n for n in w if n.startswith("transformer.")]:
            w[before + name.removeprefix("transformer.")] = w.pop(name)

    other = rewritten(source, tmp_path / "in", moved)
    api.convert(other, tmp_path / "out")
    theirs, found = (load_file(f / "model.safetensors") for f in (source, tmp_path / "out"))
    assert found.keys() == theirs.keys() and all(torch.equal(found[n], theirs[n]) for n in found)
    report = verify(tmp_path / "out", other, levels=("coverage", "bits", "parity"))
    assert report.status == "pass", report.headline


HEADLESS: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, torch.Tensor]], Any], str, str]] = {
    "another head": (
        "LlamaForSequenceClassification", {}, lambda w: w.update({"lm_head.weight": torch.ones(89, 24)}),
        "uncovered-tensors", "lm_head.weight",
    ),
    "columns": (
        "LlamaForSequenceClassification", {}, lambda w: w.update({"score.weight": torch.ones(3, 25)}),
        "config-mismatch", "24 columns",
    ),
    "a bias that is not read": (
        "LlamaForSequenceClassification", {}, lambda w: w.update({"score.bias": torch.ones(3)}),
        "unsupported", "score.bias",
    ),
    "a second matrix of the head": (
        "LlamaForSequenceClassification", {}, lambda w: w.update({"score.dense.weight": torch.ones(24, 24)}),
        "uncovered-tensors", "score.dense.weight",
    ),
    "a head as other classes call it": (
        "LlamaForSequenceClassification", {},
        lambda w: w.update({"classifier.weight": w.pop("score.weight")}),
        "missing-tensor", "(score.weight)",
    ),
    "a pooler": (
        "LlamaForSequenceClassification", {},
        lambda w: w.update({"model.pooler.dense.weight": torch.ones(24, 24)}),
        "uncovered-tensors", "model.pooler.dense.weight",
    ),
    "a bias of the head of words": (
        "LlamaModel", {"architectures": ["LlamaForCausalLM"]},
        lambda w: [worded(w), w.update({"lm_head.bias": torch.zeros(89)})],
        "uncovered-tensors", "lm_head.bias",
    ),
    "two heads of words": (
        "LlamaModel", {"architectures": ["LlamaForCausalLM"]},
        lambda w: [worded(w), w.update({"embed_out.weight": torch.ones(89, 24)})],
        "uncovered-tensors", "embed_out.weight",
    ),
    "a class that is not there": (
        "LlamaModel", {"architectures": ["LlamaForMaskedLM"]}, worded,
        "unsupported", "LlamaForMaskedLM",
    ),
    "no bias": (
        "LukeForEntitySpanClassification", {}, lambda w: w.pop("classifier.bias"),
        "missing-tensor", "classifier.bias",
    ),
    "no pooler": (
        "LukeForEntitySpanClassification", {"architectures": ["LukeForSequenceClassification"]},
        lambda w: [w.pop(f"luke.pooler.dense.{n}") for n in ("weight", "bias")],
        "missing-tensor", "luke.pooler",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADLESS)
def test_a_head_is_whole_and_the_only_one(name: str, model: Made, tmp_path: Path) -> None:
    """What is missing the class would make at random, what is too much it would leave out."""
    architecture, config, change, kind, words = HEADLESS[name]
    changed = rewritten(model(architecture), tmp_path / "in", lambda w: [change(w)].clear(), **config)
    error = refused(changed)
    assert kind in {p.kind for p in error.problems} and words in error.text()


def test_classes_have_the_heads_that_transformers_gives_them() -> None:
    """Each class with a head is one of the family's own or in the table, and the modules of the table are
    those of the class, tried where its models are made here anyway; of MEGA, which no installed release has,
    nothing is asked."""
    there = set(dir(transformers))
    built = {config: numbers for config, numbers, _ in MODELS.values()}
    for own in map(family, FAMILIES):
        for kind in own.classes.values():
            stem = kind.name.removesuffix("Config")
            theirs = {e for e in canonical.HEADS if stem + e in there} - {canonical.SEEING}
            here = {a.removeprefix(stem) for a in own.architectures if a.startswith(stem)} - {"Model"}
            assert not theirs or theirs == {*kind.heads} | (here - {canonical.SEEING}), stem
            if (
                kind.name in (*built, "MistralConfig", "Qwen2Config")
                and f"{stem}{canonical.ANSWERING}" in there
            ):
                prefix = getattr(transformers, stem + canonical.ANSWERING).base_model_prefix
                assert f"{prefix}." == (kind.answering or kind.prefix), stem
            for end, modules in kind.heads.items() if kind.name in built else ():
                with torch.device("meta"):
                    config = getattr(transformers, kind.name)(**{**SIZES, **built[kind.name]})
                    made = getattr(transformers, stem + end)(config)
                held = {n for n in made.state_dict() if not n.startswith(f"{made.base_model_prefix}.")}
                assert {n.rpartition(".")[0] for n in held} - {"lm_head"} == {*modules}, stem + end


def test_a_model_alone_whose_names_an_original_has_too(model: Made, tmp_path: Path) -> None:
    def alone(w: dict[str, torch.Tensor]) -> None:
        for name in list(w):
            w[name.removeprefix("luke.")] = w.pop(name)
        del w["classifier.weight"]

    source = model("LukeForEntityPairClassification")
    bare = rewritten(source, tmp_path / "in", alone, architectures=["LukeModel"])
    made = api.plan(bare)
    assert made.family == "mluke" and {s.note for s in made.steps} == {"rename"}
    (bare / "metadata.json").write_text("{}")  # as beside an original
    with api.open_checkpoint(bare) as checkpoint:
        assert not canonical.is_one(checkpoint, family("mluke"))


def test_biases_that_the_family_has_not_are_no_tensors_to_drop(model: Made, tmp_path: Path) -> None:
    def biased(w: dict[str, torch.Tensor]) -> None:
        w["layers.0.self_attn.o_proj.bias"] = torch.ones(24)

    source = rewritten(model("LlamaModel"), tmp_path / "in", biased, attention_bias=True)
    for drop in ((), ("layers.0.self_attn.o_proj.bias",)):
        error = refused(source, drop=drop)
        assert error.kind == "unsupported" and error.problems[0].where == "attention_bias"
        assert "--drop" not in error.text()
    told = {"drop": ("layers.0.self_attn.o_proj.bias",), "settings": {"attention_bias": False}}
    assert api.plan(source, options=Options(**told)).config["attention_bias"].value is False


def test_a_folder_without_config_takes_the_one_that_is_given(model: Made, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(model("LlamaForSequenceClassification"), source)
    (source / "config.json").rename(tmp_path / "config.json")
    error = refused(source)
    assert error.kind == "missing-file" and "--config" in (error.problems[0].hint or "")
    assert len(error.problems) == 1, "what comes near is another question"
    settings = api.settings([], tmp_path / "config.json")
    api.convert(source, tmp_path / "out", options=Options(settings=settings))
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    report = verify(tmp_path / "out", source, levels=("coverage", "bits"))
    assert report.status == "pass" and report.exactness == "bit-identical"


def test_a_value_that_no_original_can_say_is_kept(model: Made, tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    source = rewritten(model("LlamaModel"), tmp_path / "in", lambda w: None, rope_parameters=scaled)
    made = api.convert(source, tmp_path / "out", options=Options(dtype="BF16"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == scaled and config["dtype"] == "bfloat16"
    assert {t.dtype for f in made.plan.outputs for t in f.tensors} == {"BF16"}
    assert verify(tmp_path / "out", source, levels="bits").exactness == "identical after cast"


# --- compared -----------------------------------------------------------------------------------------------


def test_a_model_alone_and_one_with_more_words_are_compared(model: Made, tmp_path: Path) -> None:
    bare = model("LlamaModel")

    def headed(w: dict[str, torch.Tensor]) -> None:
        for name in list(w):
            w[f"model.{name}"] = w.pop(name)
        w["model.embed_tokens.weight"] = torch.cat([w["model.embed_tokens.weight"], torch.ones(3, 24)])
        w["lm_head.weight"] = torch.ones(92, 24)

    grown = rewritten(bare, tmp_path / "b", headed, architectures=["LlamaForCausalLM"], vocab_size=92)
    report = compare.compare(bare, grown, logits=False)
    words = {f.where: f.message for f in report.findings if f.level == "tensors"}
    assert (
        "3 rows more in B, after the 89 that both have, which are equal" in words["model.embed_tokens.weight"]
    )
    assert "lm_head.weight" in words and words[None].startswith("1 of 20 tensors differ")


def test_a_class_is_found_by_its_names_alone(model: Made, tmp_path: Path) -> None:
    silent = rewritten(model("LlamaModel"), tmp_path / "in", lambda w: None, architectures=None)
    with api.open_checkpoint(silent) as checkpoint:
        assert canonical.whose(checkpoint) == "llama"
        names = {t.name for f in api.plan(checkpoint).outputs for t in f.tensors}
    assert names == load_file(model("LlamaModel") / "model.safetensors").keys()
