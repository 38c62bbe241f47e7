"""What is said where something is missing or not as it should be, and whether what is said leads out: the
command that proves an output, patterns of names, files that are not there, values that are null."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import split

import click
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ckpt_tool import api
from ckpt_tool.checkpoint.base import Document
from ckpt_tool.checkpoint.hub_cache import root
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.tf_bundle_writer import Content, write_bundle
from ckpt_tool.cli import cli
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import CkptToolError, Problem
from ckpt_tool.program import as_told, in_words_of
from ckpt_tool.verify import verify
from tests.in_process import program

Written = Callable[[str], Path]
STEM = "model.ckpt-240000"


def said(arguments: str, where: Path, code: int = 0) -> str:
    """All that a command says in the folder `where`, on one line."""
    done = program(*split(arguments), cwd=where)
    assert done.returncode == code, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def changed(original: Path, folder: Path, document: str, **values: object) -> Path:
    """A copy with other values in a document; `...` leaves one out."""
    shutil.copytree(original, folder)
    told = {**json.loads((folder / document).read_text()), **values}
    (folder / document).write_text(json.dumps({k: v for k, v in told.items() if v is not ...}))
    return folder


# --- the command that comes next ------------------------------------------------------------------------


def test_the_next_command_is_told_what_the_conversion_was_told(tmp_path: Path, originals: Written) -> None:
    """A value that the source says otherwise, and the foretold difference that it makes."""
    archive = originals("canine-s")
    text = said(f"convert canine --in {archive} --out 'an out' --set hidden_act=gelu", tmp_path)
    command = text.partition("next ckpt-tool ")[2]
    assert command.endswith("--set hidden_act=gelu --accept canine-erf-gelu") and "'an out'" in command
    assert "pass (within the foretold difference)" in said(command, tmp_path)


def test_a_value_that_the_source_says_too_is_not_repeated(tmp_path: Path, originals: Written) -> None:
    source = originals("qwen2-0.5b")
    told = json.loads((source / "config.json").read_text())
    options = Options(settings={"rope_theta": told["rope_theta"]})
    assert api.convert(source, tmp_path / "out", options=options, check=False).insisted == {}
    options = Options(settings={"rope_theta": 5e5, "num_attention_heads": told["num_attention_heads"]})
    other = changed(source, tmp_path / "other", "config.json", num_attention_heads=...)
    done = api.convert(other, tmp_path / "again", options=options, check=False)
    assert done.insisted == {"rope_theta": 5e5}


# --- names by pattern -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looking_ahead(originals: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CANINE with the slow weights of each variable beside it, as the Lookahead optimizer saves them."""
    folder = tmp_path_factory.mktemp("ahead")
    tensors = {}
    with open_checkpoint(originals("canine-s-bare")) as checkpoint:
        for t in [t for t in checkpoint if not t.name.startswith("cls/")]:
            found = np.frombuffer(b"".join(checkpoint.read(t)), "<f4").reshape(t.shape)
            tensors[t.name] = tensors[f"{t.name}/Lookahead"] = Content.of(found, "F32")
    write_bundle(folder / "model.ckpt", tensors)
    return folder


SIZES = {"num_attention_heads": 4, "local_transformer_stride": 36}
SLOW = "*/Lookahead"


def test_a_pattern_leaves_out_what_it_fits_and_is_recorded_as_that(
    looking_ahead: Path, tmp_path: Path
) -> None:
    with pytest.raises(CkptToolError) as error:
        api.plan(looking_ahead, options=Options(settings=SIZES))
    assert error.value.kind == "uncovered-tensors" and "a pattern" in str(error.value.problems[0].hint)
    options = Options(settings=SIZES, drop=(SLOW,))
    plan = api.convert(looking_ahead, tmp_path / "out", options=options, check=False).plan
    recorded = json.loads((tmp_path / "out" / "ckpt-tool.json").read_text())["options"]["drop"]
    with open_checkpoint(looking_ahead) as checkpoint:
        wanted = [n for n in checkpoint.names() if n.endswith("/Lookahead")]
    assert len(wanted) > 100 and sorted(recorded) == sorted(wanted)
    assert {d.tensor.name for d in plan.dropped} == set(wanted)
    assert "pass" in said(f"verify out --source {looking_ahead} --level coverage --level bits", tmp_path)


def test_patterns_that_fit_nothing_or_what_is_needed(looking_ahead: Path) -> None:
    for pattern, message in (
        ("*/Momentum", "expected a pattern of the names of tensors, found none that it fits among"),
        ("bert/layer_?/output/dense/kernel", "expected a tensor that the model does not need, found 10 that"),
        ("no/such", "expected a tensor that the model does not need, found none of that name"),
    ):
        with pytest.raises(CkptToolError) as error:
            api.plan(looking_ahead, options=Options(settings=SIZES, drop=(SLOW, pattern)))
        (problem,) = error.value.problems
        assert problem.kind == "usage" and problem.file == "--drop" and message in problem.message


def test_what_training_keeps_of_variables_is_one_line_of_each_kind(
    looking_ahead: Path, originals: Written
) -> None:
    text = program("inspect", str(looking_ahead), cwd=looking_ahead, columns=80).stdout
    (line,) = [t for t in text.splitlines() if "Lookahead" in t]
    assert line.split() == ["*/Lookahead", "variable's", "F32", "x230"]
    training = originals("mobilebert-training")
    text = program("inspect", str(training), cwd=training, columns=80).stdout
    lines = [t.split()[0] for t in text.splitlines() if "adam" in t]
    assert lines == ["*/adam_m", "*/adam_v"]
    assert "adam_m" in program("inspect", "--all", str(training), cwd=training).stdout


# --- files that are not there, or not those -------------------------------------------------------------


def bundle_without(originals: Written, folder: Path, *suffixes: str) -> Path:
    shutil.copytree(originals("mobilebert-training"), folder)
    for suffix in suffixes:
        (folder / f"{STEM}{suffix}").unlink()
    return folder


def test_a_missing_data_file_is_one_sentence(tmp_path: Path, originals: Written) -> None:
    name = f"{STEM}.data-00001-of-00002"
    folder = bundle_without(originals, tmp_path / "in", ".data-00001-of-00002")
    with pytest.raises(CkptToolError) as error:
        api.plan(folder)
    (problem,) = error.value.problems
    assert (problem.kind, problem.file) == ("missing-shard", name)
    assert problem.message.startswith("expected this file, which holds bert/embeddings/word_embeddings and 2")


def test_parts_of_a_bundle_say_what_they_are(tmp_path: Path, originals: Written) -> None:
    data = (".data-00000-of-00002", ".data-00001-of-00002")
    index = bundle_without(originals, tmp_path / "index", *data)
    text = said(f"inspect index/{STEM}.index", tmp_path, 2)
    assert "index of a TensorFlow checkpoint without its data files" in text and "download the files" in text
    assert "names model.ckpt-240000 as the newest checkpoint" in said("inspect index/checkpoint", tmp_path, 2)
    whole = bundle_without(originals, tmp_path / "whole")
    hint = said("inspect whole/checkpoint", tmp_path, 2).partition("hint: give the folder of the weights: ")[
        2
    ]
    assert hint == "whole" and "is mobilebert" in said(f"inspect {hint}", tmp_path)
    shutil.copy(index / f"{STEM}.index", whole / "renamed")
    assert "call it PREFIX.index again" in said("inspect whole/renamed", tmp_path, 2)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("convert auto --in runs --out o", "--in runs/a"),
        ("inspect runs", "runs/a"),
        ("compare runs runs/a", "runs/a"),
        ("compare runs/a runs", "runs/a"),
        ("verify other --source runs", "--source runs/a"),
        ("verify other --source=runs --level bits", "--source runs/a"),
        ("verify runs --source other", "runs/a"),
        ("verify runs --no-source", "runs/a"),
        ("certificate other --source runs", "--source runs/a"),
    ],
)
def test_a_folder_is_given_by_the_words_of_the_command(
    arguments: str, hint: str, tmp_path: Path, originals: Written, conversions: Written
) -> None:
    """One too high, with the weights of a model below."""
    for name, folder in (("runs", originals("mistral-7b-v0.1")), ("other", conversions("mistral-7b-v0.1"))):
        inner = tmp_path / name / "a" if name == "runs" else tmp_path / name
        inner.parent.mkdir(exist_ok=True)
        inner.symlink_to(folder)
    text = said(arguments, tmp_path, 2)
    assert text.partition("hint: give that folder: ")[2] == hint, text


def test_a_folder_in_an_archive_may_have_any_name(tmp_path: Path) -> None:
    """Its name is a stranger's: a quote in it was an internal error, and exit code 1 of `compare`."""
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for folder in ("it's", "other"):
            for states in ("model", "optim"):
                archive.writestr(f"{folder}/zero_pp_rank_0_mp_rank_00_{states}_states.pt", b"")
    for arguments, give in (("compare two.zip two.zip", "give"), ("plan auto --in two.zip", "--in")):
        hint = said(arguments, tmp_path, 2).partition("hint: give the folder that is meant: ")[2]
        assert hint == f"""unpack the archive, then {give} 'it'"'"'s'"""
    (problem,) = in_words_of(
        ["verify"], CkptToolError(Problem("kind", "text", hint="give --in it's"))
    ).problems
    assert problem.hint == "give it's"


def test_a_checkpoint_of_before_2017_is_called_that(tmp_path: Path) -> None:
    for name in ("model.ckpt-5.meta", "model.ckpt-5", "checkpoint"):
        (tmp_path / name).write_bytes(b"\0")
    text = said("inspect .", tmp_path, 2)
    assert "found a TensorFlow V1 checkpoint" in text and "model.ckpt-5')" in text
    (tmp_path / "model.ckpt-5").unlink()
    assert "the graph of a TensorFlow checkpoint without its weights" in said("inspect .", tmp_path, 2)


def test_a_config_of_another_name_is_asked_for_by_its_own(tmp_path: Path, originals: Written) -> None:
    folder = tmp_path / "in"
    shutil.copytree(originals("mobilebert-squad"), folder)
    (folder / "bert_config.json").rename(folder / "settings.json")
    text = said("plan mobilebert --in in", tmp_path, 2)
    assert "put the download's bert_config.json there, under that name" in text and "by --config" in text
    assert "99 tensors" in said("plan mobilebert --in in --config in/settings.json", tmp_path)


# --- values that are null -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_attention_heads", "classifier_activation", "hidden_dropout_prob"])
def test_null_is_no_silence_in_googles_config(tmp_path: Path, originals: Written, name: str) -> None:
    folder = changed(originals("mobilebert-squad"), tmp_path / "in", "bert_config.json", **{name: None})
    with pytest.raises(CkptToolError) as error:
        api.plan(folder)
    (problem,) = error.value.problems
    assert (problem.kind, problem.where) == ("bad-config", name) and "found null" in problem.message
    heads = 4 if name == "num_attention_heads" else 0.0 if "dropout" in name else False
    assert api.plan(folder, options=Options(settings={name: heads})).config[name].value == heads


def test_no_activation_is_the_linear_one(tmp_path: Path, originals: Written) -> None:
    folder = changed(originals("mobilebert-squad"), tmp_path / "in", "bert_config.json", hidden_act=None)
    assert api.plan(folder).config["hidden_act"].value == "linear"


def test_a_null_for_which_a_rule_stands_is_told(tmp_path: Path, originals: Written) -> None:
    folder = changed(originals("gpt-neox-20b"), tmp_path / "in", "config.json", rotary_pct=None)
    source = api.plan(folder).config["rotary_pct"].source
    assert source == "rule: default of GPTNeoXConfig; rotary_pct is null in config.json"


def test_key_value_heads_that_are_null_are_the_query_heads(tmp_path: Path, originals: Written) -> None:
    """Each of the two numbers is checked by way of the other."""
    folder = changed(originals("qwen1.5-0.5b"), tmp_path / "in", "config.json", num_key_value_heads=None)
    found = api.plan(folder).config
    assert found["num_key_value_heads"].value == found["num_attention_heads"].value
    other = changed(originals("qwen2-0.5b"), tmp_path / "other", "config.json", num_key_value_heads=None)
    with pytest.raises(CkptToolError, match="num_key_value_heads"):
        api.plan(other)


# --- arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4])
def test_arguments_of_numpy_are_numbers(tmp_path: Path, originals: Written, protocol: int) -> None:
    folder = tmp_path / "in"
    shutil.copytree(originals("mega-chunks"), folder)
    told = pickle.loads((folder / "model_args.pkl").read_bytes())
    told["depth"] = np.int64(told["depth"])
    inner = vars(told["mega_args"])
    inner |= {"encoder_chunk_size": np.dtype(">i4").type(20), "bidirectional": np.bool_(True)}
    inner |= {"attention_dropout": np.float32(0.5)}
    (folder / "model_args.pkl").write_bytes(pickle.dumps(told, protocol=protocol))
    found, plain = api.plan(folder).config, api.plan(originals("mega-chunks")).config
    differ = {n for n in plain if found[n].value != plain[n].value}
    assert differ == {"attention_probs_dropout_prob"}
    inner["encoder_chunk_size"] = np.arange(2)
    (folder / "model_args.pkl").write_bytes(pickle.dumps(told, protocol=protocol))
    with pytest.raises(CkptToolError, match="encoder_chunk_size"):
        api.plan(folder)


# --- other layouts, and the table -----------------------------------------------------------------------


def test_what_args_of_megatron_cannot_say_is_said(tmp_path: Path, conversions: Written) -> None:
    """The note's own words, given when the ranks are read again, give the same config.json."""
    told = {"eos_token_id": [5, 6], "attention_dropout": 0.125, "bos_token_id": 4}
    folder = changed(conversions("llama-mcore"), tmp_path / "hf", "config.json", **told)
    options = Options(family_options={"form": "mcore"})
    plan = api.convert(folder, tmp_path / "back", to="original", options=options).plan
    (note,) = [n for n in plan.notes if "args do not say" in n]
    words = note.partition("reading the ranks again takes ")[2]
    said(f"convert llama --in back --out again {words}", tmp_path)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    same = api.plan(conversions("llama-mcore"), to="original", options=options)
    assert not [n for n in same.notes if "args do not say" in n]


def test_a_refused_scaling_is_held_against_the_layout_to_write(tmp_path: Path, conversions: Written) -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    folder = changed(conversions("llama-mcore"), tmp_path / "hf", "config.json", rope_scaling=linear)
    for form, whose in (("mcore", "args"), ("consolidated", "params.json")):
        with pytest.raises(CkptToolError) as error:
            api.plan(folder, to="original", options=Options(family_options={"form": form}))
        (problem,) = error.value.problems
        assert problem.kind == "unsupported" and f"all that {whose} can say" in problem.message


def test_the_table_says_why_a_row_is_no_pass() -> None:
    from rich.console import Console

    from ckpt_tool import table

    row = table.Row("mega", "mega-base", 1, "pass", 1e-12, None, "equal", "undecided", "no judge was there")
    screen = Console(width=80, record=True, file=io.StringIO())
    table.draw([row, replace(row, variant="mega-two"), replace(row, verdict="pass", why="")], screen)
    text = screen.export_text()
    assert text.splitlines()[-1] == "mega-base undecided (and 1 more): no judge was there"
    assert text.count("no judge was there") == 1


# --- sums beside the weights, and places that are not for outputs ---------------------------------------


@pytest.mark.parametrize("name", ["SHA256SUMS", "sha256sum.txt", "MD5SUMS"])
def test_lists_of_sums_are_compared(tmp_path: Path, originals: Written, name: str) -> None:
    folder = tmp_path / "in"
    shutil.copytree(originals("llama-2-70b"), folder)
    for old in folder.glob("*checklist.chk"):
        old.unlink()
    algorithm = "md5" if name.startswith("MD5") else "sha256"
    files = sorted(p for p in folder.iterdir() if p.is_file())
    sums = {p.name: hashlib.new(algorithm, p.read_bytes()).hexdigest() for p in files}
    plain = "".join(f"{x}  ./{n}\n" for n, x in sums.items())
    tagged = "".join(f"{algorithm.upper()} ({n}) = {x.upper()}\n" for n, x in sums.items())
    called = {"md5": "MD5", "sha256": "SHA2-256"}[algorithm]  # by OpenSSL 3
    openssl = "".join(f"{called}({n})= {x}\n" for n, x in sums.items())
    for text in (plain, tagged, openssl, openssl.replace("SHA2-", "SHA")):
        (folder / name).write_text(text)
        assert f"{name}: {len(sums)} of {len(sums)} sums agree" in api.plan(folder).notes
    (folder / "params.json").write_text((folder / "params.json").read_text() + "\n")
    first, second = [n for n in api.plan(folder).notes if name in n]
    assert first.startswith(f"params.json has {algorithm} ") and sums["params.json"] in first
    assert second == f"{name}: {len(sums) - 1} of {len(sums)} sums agree"
    max(folder.glob("consolidated.*")).unlink()  # the last shard, which nothing but the list tells of
    with pytest.raises(CkptToolError, match=r"missing-shard.*consolidated.07.pth not there"):
        api.plan(folder)


def test_no_output_goes_into_the_hubs_cache(
    tmp_path: Path, originals: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    repository = tmp_path / "elsewhere" / "models--org--name"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    cache.mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    for out in (cache / "out", cache, repository / "snapshots" / "abc", repository / "snapshots" / "new"):
        with pytest.raises(CkptToolError) as error:
            api.convert(originals("qwen2-0.5b"), out, overwrite=True)
        assert error.value.kind == "output-conflict" and "in the Hub's cache" in str(error.value)
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert root() == tmp_path / "home" / "hub"


# --- what other releases leave out, and lists that are too long to hold ---------------------------------


def test_a_tied_copy_that_is_missing_says_what_comes_of_it(
    tmp_path: Path, conversions: Written, originals: Written
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(conversions("mluke-base"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.decoder.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "ckpt-tool.json").unlink()
    report = verify(folder, originals("mluke-base"), levels=("coverage",))
    (found,) = [f for f in report.findings if f.status == "fail"]
    assert (
        found.where == "lm_head.decoder.weight" and "luke.embeddings.word_embeddings.weight" in found.message
    )
    (folder / "tokenizer.json").unlink()  # as release 4 saves it
    texts = [f.message for f in verify(folder, originals("mluke-base"), levels=("coverage",)).findings]
    assert any("of sentencepiece.bpe.model alone transformers 5 makes other ids" in t for t in texts)


def test_a_list_of_entities_is_compared_without_being_held(
    tmp_path: Path, conversions: Written, originals: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, held = Document.read, []

    def reading(document: Document, limit: int = 16 << 20) -> bytes:
        held.append(document.name)
        return read(document, limit)

    monkeypatch.setattr(Document, "read", reading)
    folder, source = tmp_path / "hf", originals("mluke-base")
    shutil.copytree(conversions("mluke-base"), folder)
    report = verify(folder, source, levels=("coverage", "bits"))
    assert report.exit_code == 0 and "entity_vocab.json" not in held
    (compared,) = [f.message for f in report.findings if f.check == "tokenizer"]
    assert "entity_vocab.json" in compared
    words = folder / "entity_vocab.json"
    words.write_text(words.read_text().replace("Japan", "Japon", 1))
    failed = [f.where for f in verify(folder, source, levels=("coverage",)).findings if f.status == "fail"]
    assert failed and all("entity_vocab.json" in str(where) for where in failed)


# --- values that fit no tensor, words that are no command ------------------------------------------------


def hints(folder: Path, **settings: object) -> dict[str, str]:
    """What is said below each problem of planning with these settings, by where it is."""
    with pytest.raises(CkptToolError) as error:
        api.plan(folder, options=Options(settings=settings))
    return {str(p.where): str(p.hint) for p in error.value.problems}


def test_a_number_that_fits_no_tensor_is_told_by_the_one_that_does(originals: Written) -> None:
    folder = originals("llama-3-8b")
    config = {k: v.value for k, v in api.plan(folder).config.items()}
    vocabulary, layers, kv = (config[n] for n in ("vocab_size", "num_hidden_layers", "num_key_value_heads"))
    said = hints(folder, vocab_size=vocabulary + 8)
    assert said == {"vocab_size": f"--set vocab_size={vocabulary} if the tensors are right"}
    width = config["hidden_size"] // config["num_attention_heads"]
    said = hints(folder, num_key_value_heads=1)
    two = f"--set num_key_value_heads={kv} or --set head_dim={width * kv}"
    assert said == {"num_key_value_heads": f"{two} if the tensors are right"}
    ways = "all of them are the model's", "those are all; else get the rest of the model"
    for other, way in zip((layers - 1, layers + 1), ways, strict=True):
        said = hints(folder, num_hidden_layers=other)
        assert said["num_hidden_layers"] == f"--set num_hidden_layers={layers} if {way}"
    assert {h for w, h in said.items() if w.startswith("layers.")} == {
        "get the rest of the model, or save all of it again"
    }
    said = hints(folder, num_attention_heads=config["num_attention_heads"] + 1)
    assert said["num_attention_heads"] == (
        "--set num_attention_heads=VALUE overrides what the file or the rule says"
    )


def test_what_args_of_megatron_cannot_say_is_named_with_a_way_out(conversions: Written) -> None:
    folder = conversions("mistral-7b-v0.1")
    options = Options(family_options={"form": "torch_dist"})
    window = json.loads((folder / "config.json").read_text())["sliding_window"]
    with pytest.raises(CkptToolError) as error:
        api.plan(folder, to="original", options=options)
    (problem,) = error.value.problems
    assert (problem.kind, problem.where) == ("unsupported", "sliding_window")
    assert problem.message == f"expected none, as args have no word for it, found {window}"
    assert str(problem.hint).startswith("--set sliding_window=null leaves it out")
    options = replace(options, settings={"sliding_window": None})
    assert api.plan(folder, to="original", options=options).direction == "to-original"


def test_a_hint_that_several_problems_share_stands_once() -> None:
    one, two = (Problem("bad-name", f"m{k}", "f", None, "h") for k in (1, 2))
    three, four = Problem("bad-name", "m3", "f"), replace(one, message="m4")
    five = replace(one, message="m5", hint="other")
    assert CkptToolError(one, two, three, four, five).text().splitlines() == [
        "error[bad-name]: f: m1",
        "error[bad-name]: f: m2",
        "  hint: h",
        "error[bad-name]: f: m3",
        "error[bad-name]: f: m4",
        "  hint: h",
        "error[bad-name]: f: m5",
        "  hint: other",
    ]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_codes_without_scales_say_how_they_become_numbers(
    dtype: str, conversions: Written, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(conversions("llama-3-8b"), tmp_path / "in"))
    (folder / "ckpt-tool.json").unlink()
    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    state = load_file(folder / "model.safetensors")
    state = {n: x.to(kind) if "_proj" in n else x for n, x in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for options, kind_of in ((Options(), "unsupported-dtype"), (Options(dequantize="BF16"), "usage")):
        with pytest.raises(CkptToolError) as error:
            api.plan(folder, options=options)
        assert error.value.kind == kind_of
        assert {
            "`.to(torch.bfloat16)` in torch makes numbers" in str(p.hint) for p in error.value.problems
        } == {True}


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("convert auto", "Missing option '--in'.", "convert FAMILY --in PATH --out DIR"),
        ("convert auto a b", "Missing option '--in'.", "convert FAMILY --in PATH --out DIR"),
        ("verify", "Missing argument 'DIR'.", "verify DIR"),
        ("compare a", "Missing argument 'B'.", "compare A B"),
        ("verify a b", "Got unexpected extra argument (b)", "verify DIR"),
        ("verify a --sorce b", "No such option '--sorce'. (Did you mean", None),
    ],
)
def test_what_is_missing_of_a_command_is_told_with_what_it_takes(
    arguments: str, message: str, hint: str | None, tmp_path: Path
) -> None:
    text = said(arguments, tmp_path, 2)
    assert text.startswith(f"error[usage]: {message}")
    command = arguments.split()[0]
    told = f" hint: ckpt-tool {hint} ...; `ckpt-tool {command} --help` tells more"
    assert text.endswith(told) if hint else "hint:" not in text


def test_what_a_command_takes_is_told_with_click_before_8_2_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose `make_metavar` takes no context."""
    for kind in (click.Argument, click.Option):
        monkeypatch.setattr(kind, "make_metavar", lambda self: "WORD")
    for command, words in (("verify", "verify DIR"), ("certificate", "certificate DIR --source PATH")):
        context = click.Context(cli.commands[command], info_name=f"ckpt-tool {command}")
        (problem,) = as_told(click.UsageError("m", context)).problems
        assert problem.hint == f"ckpt-tool {words} ...; `ckpt-tool {command} --help` tells more"


def test_a_dtype_may_be_called_as_trainers_call_it() -> None:
    from ckpt_tool.convert.plan import dtype_option

    assert [dtype_option(t) for t in ("fp16", "FP32", "bf16", "f16")] == ["F16", "F32", "BF16", "F16"]


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ("gate {}", ""),
        ("gate there.toml --baseline {}", "--baseline: "),
        ("convert auto --in {in} --out out --config {}", "--config: "),
        ("verify {in} --no-source --expectations {}", "--expectations: "),
        ("verify {in} --no-source --prompts {}", ""),
        ("generate {in} --prompts {}", "--prompts: "),
        ("certificate {in} --source {in} --sign {}", "--sign: "),
    ],
)
def test_a_file_that_is_not_there_is_told_with_what_is_near(
    arguments: str, where: str, conversions: Written, tmp_path: Path
) -> None:
    (tmp_path / "values.json").write_text("{}")
    gate = '[[check]]\nname = "a"\nout = "b"\nno_source = true\n'
    (tmp_path / "there.toml").write_text(gate)
    folder = str(conversions("llama-3-8b"))
    for name, found, kind in (
        ("valeus.json", "expected a file, found none hint: did you mean values.json?", "not-found"),
        (".", "expected a file, found a folder", "wrong-format"),
    ):
        told = said(arguments.replace("{in}", folder).format(name), tmp_path, 2)
        assert told == f"error[{kind}]: {name}: {where}{found}"


def test_a_report_for_which_there_is_no_folder_says_how_to_make_it(
    conversions: Written, tmp_path: Path
) -> None:
    told = said(f"verify {conversions('llama-3-8b')} --no-source --html 'a b/x.html'", tmp_path, 2)
    assert told.endswith(f"found none hint: mkdir -p '{tmp_path}/a b'")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("convert mi", ["plain,ministral3", "plain,mistral", "plain,mixtral"]),
        ("convert auto --in D", ["file,D"]),
        ("export onnx D", ["file,D"]),
    ],
)
def test_a_shell_is_told_what_may_follow(words: str, offered: list[str]) -> None:
    asked = {"COMP_WORDS": f"ckpt-tool {words}", "COMP_CWORD": str(len(words.split()))}
    command = [sys.executable, "-m", "ckpt_tool"]
    environment = {**os.environ, **asked, "_CKPT_TOOL_COMPLETE": "bash_complete"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, offered), done.stderr
