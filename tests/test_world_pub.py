"""What the world's config.json, metaseq settings and vocabularies hold besides what is expected of them: keys
that nobody reads, code of the download, rows without an id and tokens that somebody added."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ckpt_tool import api
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.torch_zip_writer import TorchZipLayout
from ckpt_tool.convert import facts
from ckpt_tool.convert.dialects import metaseq_settings
from ckpt_tool.convert.families import FAMILIES
from ckpt_tool.convert.tokenizers import counting, tokenizer_documents
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families.qwen2 import qwen2
from ckpt_tool.fixtures.megatron_core import Core
from ckpt_tool.fixtures.metaseq import metaseq_vocabulary
from ckpt_tool.fixtures.tokenizers import sentencepiece_model, tekken_json, tiktoken_model
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.fixtures.vocabularies import gpt2_vocabulary, qwen_tokenizer, wordpiece_vocabulary
from ckpt_tool.verify import verify

CASES = Path(__file__).parents[2] / "shared" / "cases"
Written = Callable[[str], Path]
# One variant of each family whose original is in the Hugging Face layout.
PUBLISHED = {
    "codegen": "codegen-16b-nl",
    "qwen2": "qwen2-0.5b",
    "qwen3": "qwen3-0.6b",
    "gemma2": "gemma-2-2b",
    "gpt-neox": "pythia-410m",
}
# One variant of every family, for the way back.
CONVERTED = {
    **PUBLISHED,
    "llama": "llama-3.1-8b",
    "mistral": "mistral-7b-v0.3",
    "mixtral": "mixtral-c",
    "ministral3": "ministral3-3b",
    "gpt-oss": "gpt-oss-20b",
    "canine": "canine-s-bare",
    "mega": "mega-chunks",
    "mluke": "mluke-aware",
    "mobilebert": "mobilebert-bare",
    "opt": "opt-13b",
    "megatron-bert": "bert-ngc-cased",
    "megatron-gpt2": "gpt2-ngc-stored",
}


def case(name: str) -> Path:
    if not (CASES / name).is_dir():
        pytest.skip("the public cases are not beside this checkout")
    return CASES / name


def copied(source: Path, to: Path, change: Mapping[str, Any] | None = None) -> Path:
    """A copy with these keys of config.json changed."""
    shutil.copytree(source, to)
    if change:
        config = json.loads((to / "config.json").read_text()) | change
        (to / "config.json").write_text(json.dumps(config))
    return to


def config(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return made


def refused(act: Callable[[], object]) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        act()
    return caught.value


def bits(folder: Path) -> Iterator[tuple[str, bytes]]:
    with open_checkpoint(folder) as opened:
        for t in sorted(opened, key=lambda t: t.name):
            yield t.name, opened.read(t).tobytes()


# --- config.json: what nobody reads ---------------------------------------------------------------------


def test_every_family_is_tried() -> None:
    assert CONVERTED.keys() == set(FAMILIES)


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("key", ["logit_scale", "use_qk_norm"])
def test_a_key_that_nobody_reads_is_refused_by_name_and_the_hint_leads_out(
    key: str, name: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    value: Any = {"logit_scale": 0.5, "use_qk_norm": True}[key]
    back = name not in PUBLISHED
    source = (conversions if back else originals)(CONVERTED[name])
    folder = copied(source, tmp_path / "in", {key: value})
    told = dict(VARIANTS[CONVERTED[name]].settings) if not back else {}

    def plan(**more: Any) -> Any:
        options = api.Options(settings=told | more)
        return api.plan(folder, family=name, options=options, to="original" if back else "hf")

    (problem,) = refused(plan).problems
    assert (problem.kind, problem.file, problem.where) == ("unsupported", "config.json", key)
    assert f"--set {key}=null" in str(problem.hint)
    made = plan(**{key: None})
    assert key not in made.config
    assert any(key in note and "left out" in note for note in made.notes)
    assert made.asked["settings"][key] is None  # recorded


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_a_key_that_is_switched_off_is_carried_over(value: Any, originals: Written, tmp_path: Path) -> None:
    folder = copied(originals("qwen2-0.5b"), tmp_path / "in", {"use_mrope": value})
    assert api.plan(folder).config["use_mrope"].value == value


# What published and fine-tuned models have besides, which changes nothing.
BESIDES: dict[str, dict[str, Any]] = {
    "gemma-2-2b": {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"},
    "pythia-410m": {
        "custom_pipelines": {
            "text-generation": {"impl": "instruct_pipeline.X", "pt": "AutoModelForCausalLM"}
        },
        "classifier_dropout": 0.1,
    },
    "qwen2-0.5b": {
        "_attn_implementation_autoset": True,
        "unsloth_version": "2024.9",
        "auto_map": {
            "AutoModelForCausalLM": "modeling_qwen2.Qwen2ForCausalLM",
            "AutoTokenizer": ["a.B", None],
        },
    },
    "codegen-16b-nl": {
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "summary_type": "cls_index",
        "scale_attn_weights": True,
        "n_ctx": 620,
    },
}


# What trainers and old releases leave: GPT-2 medium and large, Polyglot, vicuna, fine-tunes.
LEFT_BY_TRAINERS: dict[str, Any] = {
    **dict.fromkeys(("output_past", "predict_special_tokens", "use_flash_attention_2"), True),
    **{"tokenizer_model_max_length": 2048, "tokenizer_padding_side": "right", "padding_side": "left"},
    **{"num_steps": "global_step320000", "cache_implementation": "static", "max_new_tokens": 512},
    **{"sep_token_id": 3, "decoder_start_token_id": 1, "pretraining_tp": 1},
}


@pytest.mark.parametrize("model_type", facts.classes())
def test_what_trainers_leave_is_known_in_every_class(model_type: str) -> None:
    unread = pytest.importorskip("ckpt_tool.reference.unread").unread
    assert not facts.read({"model_type": model_type} | LEFT_BY_TRAINERS, model_type).unknown
    assert not [*unread(LEFT_BY_TRAINERS, ())]
    if model_type != "llama":
        assert facts.read({"model_type": model_type, "pretraining_tp": 2}, model_type).unknown


@pytest.mark.parametrize("name", BESIDES)
def test_what_published_models_have_besides_converts(name: str, originals: Written, tmp_path: Path) -> None:
    plan = api.plan(copied(originals(name), tmp_path / "in", BESIDES[name]))
    code = {"auto_map", "custom_pipelines"} & BESIDES[name].keys()
    assert not code & plan.config.keys()
    assert all(any(k in n and "code of the download" in n for n in plan.notes) for k in code)


def test_a_key_of_the_published_opt_13b_changes_nothing(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """By which a right conversion failed; the class reads tie_word_embeddings alone."""
    out = copied(conversions("opt-13b"), tmp_path / "out", {"output_projection": True})
    (out / "ckpt-tool.json").unlink()
    report = verify(out, originals("opt-13b"), levels=("coverage", "parity"), mode="quick")
    assert report.status == "pass", report.headline


def test_a_second_name_of_the_window_is_compared(originals: Written, tmp_path: Path) -> None:
    width = config(originals("gemma-2-2b"))["sliding_window"]
    same = copied(originals("gemma-2-2b"), tmp_path / "same", {"sliding_window_size": width})
    assert api.convert(same, tmp_path / "out").plan.config["sliding_window"].value == width
    assert verify(tmp_path / "out", same, levels="parity", mode="quick").status == "pass"
    other = copied(originals("gemma-2-2b"), tmp_path / "other", {"sliding_window_size": width + 1})
    error = refused(lambda: api.plan(other))
    assert error.kind == "bad-config" and "sliding_window_size" in str(error)


CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "awq"),
        ("quantization", {"group_size": 64, "bits": 4}, "packing"),
        ("auto_map", CODE, "modeling_x.XForCausalLM"),
    ],
)
def test_packing_and_other_models_code_are_named(
    key: str, value: Any, words: str, name: str, originals: Written, tmp_path: Path
) -> None:
    folder = copied(originals(PUBLISHED[name]), tmp_path / "in", {key: value})
    found = [p for p in refused(lambda: api.plan(folder, family=name)).problems if p.where == key]
    assert [p.kind for p in found] == ["unsupported"] and words in found[0].message
    assert f"--set {key}=null" in str(found[0].hint)
    told = {"mp_num": 4} if (name, key) == ("codegen", "auto_map") else {}  # a sign of eight blocks
    plan = api.plan(folder, family=name, options=api.Options(settings={key: None, **told}))
    assert key not in plan.config


@pytest.mark.parametrize("name", ["qwen3", "codegen"])
def test_a_key_that_was_left_out_is_proved_and_recorded(
    name: str, originals: Written, tmp_path: Path
) -> None:
    folder = copied(originals(PUBLISHED[name]), tmp_path / "in", {"logit_scale": 0.5})
    api.convert(folder, tmp_path / "out", family=name, options=api.Options(settings={"logit_scale": None}))
    assert "logit_scale" not in config(tmp_path / "out")
    report = api.verify(tmp_path / "out", folder)
    assert report.status == "pass", report.headline
    found = {f.check: f.status for f in report.findings}
    assert found["lockstep"] == "pass"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_readings_leave_no_key_out_silently(name: str, originals: Written) -> None:
    reference = pytest.importorskip("ckpt_tool.reference")
    said = config(originals(PUBLISHED[name]))
    with open_checkpoint(originals(PUBLISHED[name])) as opened:
        shapes = {t.name: t.shape for t in opened}
    read = reference.original(name).Config.from_original
    read(said, shapes, 1, {})
    for key, value in (("logit_scale", 0.5), ("use_qk_norm", True), ("is_causal", False)):
        with pytest.raises(ValueError, match=key):
            read(said | {key: value}, shapes, 1, {})
    read(said | {"logit_scale": 0.5}, shapes, 1, {"logit_scale": None})


# --- CodeGen 2 ------------------------------------------------------------------------------------------

CODEGEN_2 = {
    "auto_map": {
        "AutoConfig": "configuration_codegen.CodeGenConfig",
        "AutoModelForCausalLM": "modeling_codegen.CodeGenForCausalLM",
    },
    "head_dim": 128,
}


@pytest.mark.parametrize("keys", [("auto_map", "head_dim"), ("auto_map",), ("head_dim",)])
def test_the_blocks_of_a_codegen_2_are_asked_for(
    keys: tuple[str, ...], originals: Written, tmp_path: Path
) -> None:
    """The signs of a CodeGen 2 are kept for the way back, which is one again."""
    change = {k: CODEGEN_2[k] for k in keys}
    folder = copied(originals("codegen-8-cores"), tmp_path / "in", change)
    error = refused(lambda: api.plan(folder))
    assert error.kind == "missing-fact" and error.problems[0].where == "mp_num"
    assert "--set mp_num=8" in str(error.problems[0].hint)
    assert all(k in error.problems[0].message for k in keys)
    if "auto_map" in keys:  # leaving it out says nothing about the blocks
        left = refused(lambda: api.plan(folder, options=api.Options(settings={"auto_map": None})))
        assert left.problems[0].where == "mp_num"
    api.convert(folder, tmp_path / "out", options=api.Options(settings={"mp_num": 8}))
    assert not config(tmp_path / "out").keys() & change.keys()
    api.convert(tmp_path / "out", tmp_path / "back", family="codegen", to="original")
    assert {k: v for k, v in config(tmp_path / "back").items() if k in CODEGEN_2} == change
    assert dict(bits(tmp_path / "back")) == dict(bits(folder))


def test_a_codegen_1_has_four_blocks_unasked(originals: Written) -> None:
    plan = api.plan(originals("codegen-16b-nl"))
    assert not any("blocks" in note for note in plan.notes)


def test_eight_blocks_as_published() -> None:
    folder = case("codegen2_eight_blocks")
    for name in ("codegen", "auto"):
        error = refused(partial(api.plan, folder / "original", family=name))
        assert error.kind == "missing-fact" and "--set mp_num=8" in str(error.problems[0].hint)


def test_eight_blocks_are_written_as_four_and_proved(tmp_path: Path) -> None:
    folder = case("codegen2_eight_blocks")
    out = tmp_path / "out"
    api.convert(folder / "original", out, family="codegen", options=api.Options(settings={"mp_num": 8}))
    assert dict(bits(out)) == dict(bits(folder / "expected.safetensors"))
    api.convert(out, tmp_path / "back", family="codegen", to="original")
    for made, source in ((out, folder / "original"), (tmp_path / "back", out)):
        report = api.verify(made, source)
        assert report.status == "pass", report.headline


def test_ids_of_single_bytes_end_no_text(originals: Written, tmp_path: Path) -> None:
    folder = copied(originals("codegen-16b-nl"), tmp_path / "in", {"eos_token_id": [0, 309]})
    assert any("eos_token_id [0, 309]" in note for note in api.plan(folder).notes)


# --- metaseq's settings ---------------------------------------------------------------------------------

# Of a run of OPT: what a training program writes down besides (metaseq, launcher/opt_baselines.py).
OF_A_RUN: dict[str, Any] = {
    "arch": "transformer_lm_megatron",
    "criterion": "vocab_parallel_cross_entropy",
    "task": "streaming_language_modeling",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "no_emb_dropout": True,
    "full_megatron_init": True,
    "megatron_init_sigma": 0.006,
    "fp16": True,
    "memory_efficient_fp16": True,
    "fp16_init_scale": 4,
    "ddp_backend": "fully_sharded",
    "checkpoint_activations": True,
    "distribute_checkpointed_activations": True,
    "tensor_parallel_init_model_on_gpu": True,
    "min_params_to_wrap": 100000000,
    "model_parallel_size": 8,
    "distributed_world_size": 992,
    "use_sharded_state": True,
    "clip_norm": 1.0,
    "clip_norm_type": "l2",
    "weight_decay": 0.1,
    "adam_betas": "(0.9, 0.95)",
    "lr_scheduler": "polynomial_decay",
    "end_learning_rate": 1.2e-5,
    "total_num_update": 286102,
    "warmup_updates": 2000,
    "batch_size": 8,
    "tokens_per_sample": 2048,
    "sample_break_mode": "none",
    "train_subset": "train",
    "valid_subset": "valid/BookCorpusFair",
    "vocab_filename": "tokenizers/gpt2-vocab.json",
    "merges_filename": "tokenizers/gpt2-merges.txt",
    "save_interval_updates": 2000,
    "log_interval": 1,
    "tensorboard_logdir": "tensorboard",
    "self_attn_doc_sep": -1,
    "attn_variant": "default",
    "xf_attn_op": "None",
    "scale_attn": False,
    "use_stable_embedding": False,
    "adaptive_softmax_factor": 4,
    "character_filters": "[(1, 64)]",
}
OTHER_MODELS: dict[str, Any] = {
    "scale_attn": True,
    "scale_fc": True,
    "use_stable_embedding": True,
    "self_attn_doc_sep": 2,
    "decoder_rotary_dim": 64,
    "adaptive_input": True,
}


def run_of_opt(folder: Path, variant: str, change: Mapping[str, Any]) -> Path:
    """The variant, whose settings are among those of a whole run."""
    original: Any = VARIANTS[variant].original
    folder.mkdir(parents=True)
    replace(original, told={**OF_A_RUN, **original.told, **change}).write(folder, variant)
    return folder


@pytest.mark.parametrize("variant", ["opt-13b", "opt-restored", "opt-350m"])  # plain, omegaconf, args
def test_the_settings_of_a_whole_run_convert(variant: str, tmp_path: Path) -> None:
    plan = api.plan(run_of_opt(tmp_path / "in", variant, {}))
    assert not any("left out" in note for note in plan.notes)
    assert plan.config["activation_function"].value == "relu"


@pytest.mark.parametrize("key", OTHER_MODELS)
@pytest.mark.parametrize("variant", ["opt-13b", "opt-350m"])
def test_a_setting_of_another_model_is_refused_by_name(key: str, variant: str, tmp_path: Path) -> None:
    folder = run_of_opt(tmp_path / "in", variant, {key: OTHER_MODELS[key]})
    (problem,) = refused(lambda: api.plan(folder)).problems
    assert (problem.kind, problem.where) == ("unsupported", key)
    assert str(OTHER_MODELS[key]).lower() in problem.message and f"--set {key}=null" in str(problem.hint)
    plan = api.plan(folder, options=api.Options(settings={key: None}))
    assert any(key in note and "left out" in note for note in plan.notes)
    assert plan.asked["settings"] == {key: None}


@pytest.mark.parametrize("key", OTHER_MODELS)
def test_the_reading_of_opt_leaves_no_setting_out_silently(key: str, originals: Written) -> None:
    reference = pytest.importorskip("ckpt_tool.reference")
    told = {**OF_A_RUN, **VARIANTS["opt-350m"].original.told}
    with open_checkpoint(originals("opt-350m")) as opened:
        shapes = {t.name: t.shape for t in opened}
    read = reference.original("opt").Config.from_original
    read({"args": told}, shapes, 1, {})
    with pytest.raises(ValueError, match=key):
        read({"args": told | {key: OTHER_MODELS[key]}}, shapes, 1, {})
    read({"args": told | {key: OTHER_MODELS[key]}}, shapes, 1, {key: None})


def test_every_list_of_settings_has_its_reason() -> None:
    names = [*OF_A_RUN, *OTHER_MODELS]
    found = dict(metaseq_settings.unread({**OF_A_RUN, **OTHER_MODELS}, ()))
    assert found == OTHER_MODELS and len(names) > 40
    assert all(reason for reason in metaseq_settings.REASONS)


# --- OPT without settings -------------------------------------------------------------------------------

SIZES = {  # layers, width, width of a word, heads
    "125m": (12, 768, 768, 12),
    "350m": (24, 1024, 512, 16),
    "6.7b": (32, 4096, 4096, 32),
    "175b": (96, 12288, 12288, 96),
}


@pytest.mark.parametrize("words", [50272, 50280])
@pytest.mark.parametrize("size", SIZES)
def test_a_published_opt_asks_nothing(size: str, words: int, tmp_path: Path) -> None:
    """Also with words that somebody added."""
    layers, width, word, heads = SIZES[size]
    plan = api.plan(bare_opt(tmp_path, layers, width, word, words))
    assert plan.config["num_attention_heads"].value == heads
    assert f"OPT {size}" in plan.config["num_attention_heads"].source
    relu = plan.config["activation_function"]
    assert relu.value == "relu" and "arXiv 2205.01068" in relu.source
    assert plan.config["do_layer_norm_before"].value is (size != "350m")


def test_other_sizes_ask_for_the_heads_alone(tmp_path: Path) -> None:
    (problem,) = refused(lambda: api.plan(bare_opt(tmp_path, 13, 768, 768, 50272))).problems
    assert (problem.kind, problem.where) == ("missing-fact", "num_attention_heads")
    assert api.plan(tmp_path, options=api.Options(settings={"num_attention_heads": 12}))


def test_a_published_size_without_its_last_norm_is_no_350m(tmp_path: Path) -> None:
    folder = bare_opt(tmp_path, 12, 768, 768, 50272, without="layer_norm")
    error = refused(lambda: api.plan(folder))
    assert error.kind == "missing-tensor" and "do_layer_norm_before=false" in str(error)


def bare_opt(
    folder: Path, layers: int, width: int, word: int, words: int, *, without: str | None = None
) -> Path:
    """Headers of an OPT of these sizes, without settings and weights."""
    prefix = "decoder."
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (words, word),
        "embed_positions.weight": (2050, width),
    }
    if word != width:
        shapes |= {"project_in_dim.weight": (width, word), "project_out_dim.weight": (word, width)}
    elif without != "layer_norm":
        shapes |= {"layer_norm.weight": (width,), "layer_norm.bias": (width,)}
    for i in range(layers):
        for name, rows, columns in (
            ("self_attn.qkv_proj", 3 * width, width),
            ("self_attn.out_proj", width, width),
            ("fc1", 4 * width, width),
            ("fc2", width, 4 * width),
        ):
            shapes |= {f"layers.{i}.{name}.weight": (rows, columns), f"layers.{i}.{name}.bias": (rows,)}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"layers.{i}.{name}.weight": (width,), f"layers.{i}.{name}.bias": (width,)}
    layout = TorchZipLayout([(prefix + n, "F16", s) for n, s in shapes.items()])
    with open(folder / "reshard.pt", "wb") as f:
        os.truncate(f.fileno(), layout.size)
        for at, piece in layout.finish({prefix + n: 0 for n in shapes}):
            f.seek(at)
            f.write(piece)
    return folder


# --- Qwen2 of Megatron-Core -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [151646, 151936, 152064, 152576, 153600, 151000, 256000])
def test_a_vocabulary_of_qwen2_is_told_whatever_it_is_padded_to(rows: int, tmp_path: Path) -> None:
    Core(qwen2(1, 8, 2, 1, 8, rows, 1)).write(tmp_path, "x")
    found = api.plan(tmp_path, family="qwen2").config
    ends = {n: found[n].value for n in ("bos_token_id", "eos_token_id") if n in found}
    of_qwen2 = 151646 <= rows <= 153600
    assert ends == (dict.fromkeys(("bos_token_id", "eos_token_id"), 151643) if of_qwen2 else {})


def test_a_tokenizer_beside_ranks_is_counted_too(tmp_path: Path) -> None:
    Core(qwen2(1, 8, 2, 1, 8, 336, 1)).write(tmp_path, "x")
    for name, data in qwen_tokenizer(336).items():
        (tmp_path / name).write_bytes(data)
    assert any("of 336 embedding rows have no id" in n for n in api.plan(tmp_path, family="qwen2").notes)
    for name, data in qwen_tokenizer(400).items():
        (tmp_path / name).write_bytes(data)
    assert refused(lambda: api.plan(tmp_path, family="qwen2")).kind == "bad-tokenizer"


# --- rows and ids ---------------------------------------------------------------------------------------

IDS = 640
VOCABULARIES: dict[str, tuple[str, Mapping[str, bytes]]] = {
    "sentencepiece of Llama": ("llama", {"tokenizer.model": sentencepiece_model(IDS)}),
    "sentencepiece of Mistral": ("mistral", {"tokenizer.model.v3": sentencepiece_model(IDS)}),
    "sentencepiece of Mixtral": ("mixtral", {"tokenizer.model": sentencepiece_model(IDS)}),
    "tekken": ("mistral", {"tekken.json": tekken_json(IDS)}),
    "tiktoken": ("llama", {"tokenizer.model": tiktoken_model(IDS)}),
    "bytes of OPT": ("opt", metaseq_vocabulary(IDS)),
    "bytes of CodeGen": ("codegen", gpt2_vocabulary(IDS)),
    "bytes of Megatron": ("megatron-gpt2", gpt2_vocabulary(IDS)),
    "wordpiece": ("megatron-bert", {"vocab.txt": wordpiece_vocabulary(IDS)}),
}
PAD = {"added_tokens.json": json.dumps({"[PAD]": IDS, "<|im_start|>": IDS + 1}).encode()}
MAP = {"special_tokens_map.json": json.dumps({"pad_token": {"content": "[PAD]"}}).encode()}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_rows_without_an_id_are_counted(name: str) -> None:
    of, files = VOCABULARIES[name]
    for rows, words in (
        (IDS + 1, "1 of 641 embedding rows has no id"),
        (IDS + 6, "6 of 646 embedding rows have"),
    ):
        made = tokenizer_documents(files, family=of, config={"vocab_size": rows})
        assert any(words in note for note in made.notes) and made.vocab_size == IDS
    made = tokenizer_documents(files, family=of, config={"vocab_size": IDS})
    assert not any("embedding rows" in note for note in made.notes)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_without_a_row_are_refused(name: str) -> None:
    of, files = VOCABULARIES[name]
    error = refused(lambda: tokenizer_documents(files, family=of, config={"vocab_size": IDS - 2}))
    assert error.kind == "bad-tokenizer" and "at most 638 ids" in str(error) and "--tokenizer" in str(error)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_tokens_that_somebody_added_get_their_ids(name: str) -> None:
    library = pytest.importorskip("tokenizers")
    of, files = VOCABULARIES[name]
    more = {"added_tokens.json": PAD["added_tokens.json"].replace(b"[PAD]", b"[MINE]")}
    role = {"special_tokens_map.json": MAP["special_tokens_map.json"].replace(b"[PAD]", b"[MINE]")}
    made = tokenizer_documents({**files, **more, **role}, family=of, config={"vocab_size": IDS + 2})
    assert made.vocab_size == IDS + 2 and made.documents["added_tokens.json"] == more["added_tokens.json"]
    read = library.Tokenizer.from_str(made.documents["tokenizer.json"].decode())
    assert read.token_to_id("[MINE]") == IDS and read.token_to_id("<|im_start|>") == IDS + 1
    assert IDS in read.encode("hello [MINE] world", add_special_tokens=False).ids
    assert read.decode([IDS, IDS + 1], skip_special_tokens=True).strip() == "<|im_start|>"
    said = json.loads(made.documents["tokenizer_config.json"])
    assert said["pad_token"] in ("[MINE]", "<pad>", "[PAD]")  # a vocabulary's own stays
    assert said["added_tokens_decoder"][str(IDS)]["content"] == "[MINE]"
    assert counting.ids_of(made.documents) == (IDS + 2, "tokenizer.json")
    too_few = refused(
        lambda: tokenizer_documents({**files, **more}, family=of, config={"vocab_size": IDS + 1})
    )
    assert too_few.kind == "bad-tokenizer"


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ({"[PAD]": IDS + 5}, f"expected id {IDS} for `[PAD]`, found {IDS + 5}"),
        ({"<s>": 7}, "expected id 1 for `<s>`, found 7"),
        ({"[PAD]": "x"}, "expected an id for each token"),
        ({"[PAD]": -1}, "expected an id for each token"),
    ],
)
def test_added_tokens_that_do_not_follow_are_refused(added: dict[str, Any], words: str) -> None:
    _, files = VOCABULARIES["sentencepiece of Llama"]
    more = {"added_tokens.json": json.dumps(added).encode()}
    error = refused(
        lambda: tokenizer_documents({**files, **more}, family="llama", config={"vocab_size": IDS + 9})
    )
    assert error.kind == "bad-tokenizer" and words in str(error)


def test_tokens_that_are_there_already_may_be_listed() -> None:
    _, files = VOCABULARIES["sentencepiece of Llama"]
    more = {"added_tokens.json": json.dumps({"<unk>": 0, "<s>": 1, "</s>": 2, "[PAD]": IDS}).encode()}
    made = tokenizer_documents({**files, **more}, family="llama", config={"vocab_size": IDS + 1})
    assert made.vocab_size == IDS + 1


@pytest.mark.parametrize("name", ["qwen2-0.5b", "qwen3-0.6b", "gemma-2-2b", "pythia-410m"])
def test_ids_of_a_published_tokenizer_are_counted(name: str, originals: Written, tmp_path: Path) -> None:
    rows = config(originals(name))["vocab_size"]
    folder = copied(originals(name), tmp_path / "in")
    read = json.loads((folder / "tokenizer.json").read_text())
    ids = 1 + max([*read["model"]["vocab"].values(), *(t["id"] for t in read["added_tokens"])])
    notes = [n for n in api.plan(folder).notes if "embedding row" in n]
    assert notes == ([f"{rows - ids} of {rows} embedding rows have no id in tokenizer.json ({ids} ids)"])
    read["added_tokens"].append({**read["added_tokens"][-1], "id": rows, "content": "] \\}"})
    (folder / "tokenizer.json").write_text(json.dumps(read))
    error = refused(lambda: api.plan(folder))
    assert error.kind == "bad-tokenizer" and f"at most {rows} ids" in str(error)
    shutil.copytree(originals(name), tmp_path / "right")
    assert api.plan(folder, options=api.Options(tokenizer=tmp_path / "right"))  # the hint leads out


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_an_added_token_after_a_gap_gets_another_id(file: str, originals: Written, tmp_path: Path) -> None:
    """And what the plan says of it is what tokenizers does."""
    folder = copied(originals("qwen3-0.6b"), tmp_path / "in")
    read = json.loads((folder / "tokenizer.json").read_text())
    free = 1 + max([*read["model"]["vocab"].values(), *(t["id"] for t in read["added_tokens"])])
    plain = {n: p.read_bytes() for n in ("tokenizer.json",) if (p := folder / n).exists()}
    assert counting.renumbered(plain) is None and counting.renumbered({}) is None
    token = {**read["added_tokens"][-1], "id": free + 3, "content": "[MINE]"}
    told = {
        "tokenizer.json": {**read, "added_tokens": [*read["added_tokens"], token]},
        "tokenizer_config.json": {"added_tokens_decoder": {str(free + 3): {"content": "[MINE]"}}},
        "added_tokens.json": {"[MINE]": free + 3},
    }[file]
    (folder / file).write_text(json.dumps(told))
    if file == "added_tokens.json":
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
    (note,) = [n for n in api.plan(folder).notes if "next free id" in n]
    assert f"id {free + 3} ({file}) the next free id, {free}," in note and "add 3 unused" in note
    if file == "tokenizer.json":
        assert Tokenizer.from_file(str(folder / file)).token_to_id("[MINE]") == free
        fill = [{**token, "id": free + k, "content": f"[unused{k}]"} for k in range(3)]
        told["added_tokens"][-1:-1] = fill
        (folder / file).write_text(json.dumps(told))
        assert not [n for n in api.plan(folder).notes if "next free id" in n]
        assert Tokenizer.from_file(str(folder / file)).token_to_id("[MINE]") == free + 3


def test_a_vocabulary_is_counted_without_being_made() -> None:
    """Texts that look like the keys that are looked for, and a vocabulary of lists, which is not counted."""
    texts = ['"vocab": {', '"added_tokens": [', "}", "]", "\\", '\\"', ' : 9, "x', "\n"]
    vocab = {text: i for i, text in enumerate(texts)}
    added = [{"id": 40 + i, "content": text} for i, text in enumerate(texts)]
    for indent in (None, 2):
        file = {
            "version": "1.0",
            "added_tokens": added,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }
        data = json.dumps(file, indent=indent).encode()
        assert counting.ids_of({"tokenizer.json": data}) == (48, "tokenizer.json")
        said = json.dumps({"added_tokens_decoder": {"60": {"content": "x"}}}, indent=indent).encode()
        found = counting.ids_of({"tokenizer.json": data, "tokenizer_config.json": said})
        assert found == (61, "tokenizer_config.json")
        old = {"added_tokens.json": json.dumps({"x": 70}, indent=indent).encode()}
        assert counting.ids_of({"tokenizer.json": data} | old) == (71, "added_tokens.json")
        assert counting.ids_of({"tokenizer.json": data, "tokenizer_config.json": said} | old) == found
        plain = {"vocab.json": json.dumps(vocab, indent=indent).encode()}
        assert counting.ids_of(plain) == (8, "vocab.json")
        more = {"added_tokens.json": json.dumps({"x": 8}, indent=indent).encode()}
        assert counting.ids_of(plain | more) == (9, "added_tokens.json")
    unigram = {"added_tokens": added, "model": {"type": "Unigram", "vocab": [["a", -1.0]]}}
    assert counting.ids_of({"tokenizer.json": json.dumps(unigram).encode()}) is None
    assert counting.ids_of({"special_tokens_map.json": b"{}"}) is None


FEWER: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "llama-2-7b": ("tokenizer.model", sentencepiece_model),
    "llama-3-8b": ("tokenizer.model", tiktoken_model),
    "mistral-nemo": ("tekken.json", tekken_json),
    "mistral-7b-v0.3": ("tokenizer.model.v3", sentencepiece_model),
    "mixtral-c": ("tokenizer.model", sentencepiece_model),
}


@pytest.mark.parametrize("name", FEWER)
def test_a_download_with_more_rows_than_ids_converts(name: str, originals: Written, tmp_path: Path) -> None:
    """Three rows more than ids, of which somebody gave one to a token."""
    folder = copied(originals(name), tmp_path / "in")
    rows = api.plan(folder).config["vocab_size"].value
    file, make = FEWER[name]
    (folder / file).write_bytes(make(rows - 3))
    assert any(f"3 of {rows} embedding rows have no id" in n for n in api.plan(folder).notes)
    (folder / "added_tokens.json").write_text(json.dumps({"[MINE]": rows - 3}))
    api.convert(folder, tmp_path / "out", options=api.Options(settings=VARIANTS[name].settings))
    read = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert [t["id"] for t in read["added_tokens"] if t["content"] == "[MINE]"] == [rows - 3]
    (folder / file).write_bytes(make(rows + 1))
    assert refused(lambda: api.plan(folder)).kind == "bad-tokenizer"


def test_a_slip_in_a_key_is_guessed(originals: Written, tmp_path: Path) -> None:
    folder = copied(originals("qwen2-0.5b"), tmp_path / "in", {"rope_thetaa": 1e4})
    (problem,) = refused(lambda: api.plan(folder)).problems
    assert "did you mean rope_theta?" in str(problem.hint)


@pytest.mark.parametrize("rows", ["rows_320", "rows_323", "rows_328"])
def test_more_rows_than_tokens(rows: str, tmp_path: Path) -> None:
    folder = case("more_rows_than_tokens") / rows
    if rows == "rows_320":
        error = refused(lambda: api.convert(folder, tmp_path / "out", family="llama"))
        assert error.kind == "bad-tokenizer" and not (tmp_path / "out").exists()
        return
    made = api.convert(folder, tmp_path / "out", family="llama")
    assert config(tmp_path / "out")["vocab_size"] == int(rows[5:])
    read = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert len(read["model"]["vocab"]) == 322
    pads = [t["id"] for t in read["added_tokens"] if t["content"] == "[PAD]"]
    assert pads == ([322] if rows == "rows_323" else [])
    assert any("6 of 328 embedding rows have no id" in n for n in made.plan.notes) is (rows == "rows_328")
    report = api.verify(tmp_path / "out", folder)
    assert report.status == "pass", report.headline
    api.convert(tmp_path / "out", tmp_path / "back", family="llama", to="original")
    for name in ("tokenizer.model", "params.json", *(["added_tokens.json"] if rows == "rows_323" else [])):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


def test_a_window_under_its_second_name_alone_is_asked(originals: Written, tmp_path: Path) -> None:
    """No release reads it: each would take 4096."""
    source = copied(originals("gemma-2-2b"), tmp_path / "in", {})
    document = config(source)
    document["sliding_window_size"] = document.pop("sliding_window")
    (source / "config.json").write_text(json.dumps(document))
    (problem,) = refused(lambda: api.plan(source)).problems
    assert (problem.kind, problem.where) == ("missing-fact", "sliding_window")
    assert problem.message.endswith("which no release of transformers reads: each takes 4096")
    settings = {"sliding_window": document["sliding_window_size"]}
    api.convert(source, tmp_path / "out", options=api.Options(settings=settings))
    assert verify(tmp_path / "out", source, levels="parity", mode="quick").status == "pass"
