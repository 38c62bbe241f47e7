"""The files beside the weights: every planted mistake is named through the command line, right ones pass."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ckpt_tool.api import Options, convert
from ckpt_tool.checkpoint.safetensors import INDEX_NAME, index_document
from ckpt_tool.cli import main
from ckpt_tool.fixtures.flaws_documents import HARMLESS, MISTAKES
from ckpt_tool.fixtures.tokenizers import sentencepiece_model
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify
from ckpt_tool.verify.documents import documents
from ckpt_tool.verify.listed import listed
from ckpt_tool.verify.report import Finding, Report
from ckpt_tool.verify.subject import opened
from ckpt_tool.verify.tokenizer_config import differences, wrong_flags
from ckpt_tool.verify.tokenizer_ids import Ids, compare
from tests import loaded

Written = Callable[[str], Path]
CHECKS = ("tokenizer", "generation config", "chat template", "documents", "shards", "strangers")
# One of each family, and of each format of tokenizer: of few tensors, which are read again for each mistake.
WITH_TOKENIZER = (
    "mistral-7b-v0.3",
    "mistral-nemo",
    "mixtral-c",
    "llama-1-7b",
    "llama-3-8b",
    "bert-2023-float32",
    "gpt2-2023-float32",
    "opt-350m",
    "codegen-2b-multi",
    "qwen2-0.5b",
)
LEAST = 55  # kinds of mistakes that each of them can have
# Without a manifest a folder looks as if saved again by transformers, which leaves these out; and where an
# original has no chat template, there is nothing to compare one with.
SAID_ONLY = ("deleted: ", "chat: ")


def copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


def run(
    monkey: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: Path,
    source: Path,
    variant: str,
    *levels: str,
) -> Any:
    """Exit code and findings of `ckpt-tool verify` over these levels, of those that need no torch."""
    settings = [f"--set={k}={json.dumps(v)}" for k, v in VARIANTS[variant].settings.items()]
    asked = [word for level in levels for word in ("--level", level)]
    command = ["verify", str(out), "--source", str(source), *asked, "--json", *settings]
    monkey.setattr(sys, "argv", ["ckpt-tool", *command])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, json.loads(capsys.readouterr().out)["findings"]


def about_documents(found: Report | list[Finding], *states: str) -> list[Finding]:
    findings = found.findings if isinstance(found, Report) else found
    return [f for f in findings if f.check in CHECKS and f.status in states]


@pytest.mark.parametrize("variant", WITH_TOKENIZER)
def test_every_mistake_beside_the_weights_is_named(
    variant: str,
    originals: Written,
    conversions: Written,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the first through the command line, whose exit code is that of the report."""
    first = variant == WITH_TOKENIZER[0]
    missed, planted = [], 0
    for name, plant in MISTAKES.items():
        out = copied(conversions(variant), tmp_path / "out")
        where = plant(out)
        if where is None:
            continue
        planted += 1
        if first:  # bits that agree must not outvote the files; which bits, does not matter
            given = (originals(variant), variant, "coverage", "bits")
            code, findings = run(monkeypatch, capsys, out, *given)
        else:
            report = verify(out, originals(variant), levels="coverage", settings=VARIANTS[variant].settings)
            code, findings = report.exit_code, report.to_json()["findings"]
        wrong = [f for f in findings if f["status"] == "fail" and f["check"] in CHECKS]
        if code != 1 or not any(where in f"{f['where']} {f['message']}" for f in wrong):
            missed.append((name, code, [f["message"] for f in wrong]))
    assert missed == []
    assert planted >= LEAST


@pytest.mark.parametrize("variant", WITH_TOKENIZER)
def test_without_a_manifest_what_acts_is_still_named(
    variant: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """Of the first by `verify`, of others by the parts of coverage that read the files."""
    settings = VARIANTS[variant].settings
    for name, plant in MISTAKES.items():
        out = copied(conversions(variant), tmp_path / "out")
        (out / "ckpt-tool.json").unlink()
        where = plant(out)
        if where is None:
            continue
        if variant == WITH_TOKENIZER[0]:
            findings = verify(out, originals(variant), levels="coverage", settings=settings).findings
        else:
            with opened(out, originals(variant), settings) as subject:
                findings = [*listed(subject), *documents(subject)]
        wrong = about_documents(findings, "fail")
        if name.startswith(SAID_ONLY) and not wrong:
            assert about_documents(findings, "note", "skipped"), name
        else:
            assert any(where in f"{f.where} {f.message}" for f in wrong), name


@pytest.mark.parametrize("variant", WITH_TOKENIZER)
def test_harmless_files_beside_a_model_are_named_in_one_note(
    variant: str,
    originals: Written,
    conversions: Written,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = copied(conversions(variant), tmp_path / "out")
    planted = [where for plant in HARMLESS.values() if (where := plant(out)) is not None]
    code, findings = run(monkeypatch, capsys, out, originals(variant), variant, "coverage", "bits")
    assert code == 0, [f for f in findings if f["status"] == "fail"]
    (note,) = [f for f in findings if f["check"] == "strangers" and f["status"] == "note"]
    assert len(planted) >= 10 and "README.md" in note["message"]


# --- outputs saved again by a library -------------------------------------------------------------------

SAVE = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from transformers import AutoTokenizer, GenerationConfig, logging
logging.set_verbosity_error()
for folder, to in zip(sys.argv[1::2], sys.argv[2::2]):
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    if (Path(folder) / "generation_config.json").exists():
        GenerationConfig.from_pretrained(folder).save_pretrained(to)
"""


# Also one whose class puts roles in that the source's files do not have.
SAVED_AGAIN = (*WITH_TOKENIZER, "pythia-410m")


@pytest.mark.parametrize("release", ["tf4.37", "tf4.57", "tf5"])
def test_tokenizers_saved_again_by_transformers_pass(
    release: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    pairs = [str(p) for v in SAVED_AGAIN for p in (conversions(v), tmp_path / v)]
    command = [loaded.python(release), "-W", "ignore", "-c", SAVE, *pairs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for variant in SAVED_AGAIN:
        out = tmp_path / variant
        assert (out / "tokenizer.json").is_file()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(conversions(variant) / name, out)
        report = verify(
            out, originals(variant), levels=("coverage", "bits"), settings=VARIANTS[variant].settings
        )
        assert report.exit_code == 0, (variant, about_documents(report, "fail"))
        assert any(f.check == "tokenizer" and f.status == "pass" for f in report.findings)


def test_a_tokenizer_that_takes_spaces_away_is_told_what_that_does() -> None:
    """As the scripts of transformers 4.37 write a GPT-2's, whose original decodes what it encodes."""
    key = "clean_up_tokenization_spaces"
    (found,) = differences({key: False}, {key: True}, alike=(), begins=False, ends=False)
    text = "expected false, found true, with which decoding takes spaces before punctuation away"
    assert (found.where, found.message) == (key, text)
    assert not [*differences({}, {key: True}, alike=(), begins=False, ends=False)]


NORMALIZED = 'added_tokens: 0 "<a>"'


@pytest.mark.parametrize(
    ("normalizer", "flags", "told"),
    [
        (None, (True,), []),  # of a GPT-2, as transformers has it
        (None, (True, True), []),
        (None, (True, False), [NORMALIZED]),  # the one is looked for before the other
        ({"type": "NFC"}, (True,), [NORMALIZED]),
    ],
)
def test_whether_a_token_is_looked_for_in_normalized_text_acts_where_text_is_normalized(
    normalizer: Any, flags: tuple[bool, ...], told: list[str]
) -> None:
    def ids(flags: tuple[bool, ...]) -> Ids:
        off = {"special": True, "lstrip": False, "rstrip": False, "single_word": False}
        added = [{"id": i, "content": f"<{'ab'[i]}>", "normalized": f, **off} for i, f in enumerate(flags)]
        model = {"type": "BPE", "vocab": {"<a>": 0, "<b>": 1, "a": 2}, "merges": []}
        parts = {"added_tokens": added, "normalizer": normalizer, "model": model}
        return Ids(json.dumps({"version": "1.0", **parts}).encode())

    right, other = ids((False,) * len(flags)), ids(flags)
    found = compare(right, other)
    assert [d.where for d in found.differences] == told
    assert found.spelled == (() if told else ("added_tokens: normalized",))
    table = {"added_tokens_decoder": {str(i): token for i, token in other.added.items()}}
    assert len([*wrong_flags(right.added, table, "here", right)]) == len(told)


@pytest.mark.parametrize(
    ("variant", "status", "told"),
    [
        ("mistral-nemo", "note", "LlamaTokenizer"),
        ("qwen2-0.5b", "note", "the class of the model's type"),
        # which transformers 4.37.2 and 4.57.6 put behind the last row of the embedding
        ("llama-3-8b", "fail", "LlamaTokenizer, of which <unk> gets an id of its own in transformers 4"),
        ("mluke-base", "fail", "LukeTokenizer, which makes other ids of the same files"),
    ],
)
def test_the_class_that_loaders_take_where_the_file_names_none_is_told(
    variant: str, status: str, told: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    out = copied(conversions(variant), tmp_path / "out")
    (out / "ckpt-tool.json").unlink()
    config = json.loads((out / "tokenizer_config.json").read_text())
    named = config.pop("tokenizer_class")
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    report = verify(out, originals(variant), levels="coverage", settings=VARIANTS[variant].settings)
    (found,) = [f for f in report.findings if f.where == "tokenizer_config.json: tokenizer_class"]
    text = f'expected "{named}", found none, and loaders take {told}'
    assert (found.status, found.message) == (status, text)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, ["unk", "sep", "pad", "cls", "mask"]),
        ({"mask_token": "[PAD]"}, ["mask"]),
        ({"model_max_length": 77}, ["expected 600, found 77"]),
    ],
)
def test_roles_of_the_class_that_loaders_take_and_a_limit_that_nobody_says(
    change: dict[str, Any], told: list[str], originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """As MobileBERT is published: all releases give the roles of its class, and none a limit."""
    out = copied(conversions("mobilebert-uncased"), tmp_path / "out")
    for name in ("ckpt-tool.json", "special_tokens_map.json"):
        (out / name).unlink()
    said = {"do_lower_case": True, "clean_up_tokenization_spaces": True} | change
    (out / "tokenizer_config.json").write_text(json.dumps(said))
    report = verify(out, originals("mobilebert-uncased"), levels="coverage")
    found = [f for f in report.findings if f.status == "fail"]
    for f, words in zip(found, told, strict=True):
        assert words in f"{f.where} {f.message}"
    notes = [f.message for f in report.findings if f.where == "tokenizer_config.json: model_max_length"]
    text = "not said, nor by the original, so the library's class decides (expected 600, found no limit)"
    assert notes == ([text] if "model_max_length" not in change else ["expected 600, found 77"])


def test_roles_that_loaders_give_a_megatron_bert_are_not_lost(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """All releases take BertTokenizer by the type of the model."""
    out = copied(conversions("bert-ngc-cased"), tmp_path / "out")
    for name in ("ckpt-tool.json", "special_tokens_map.json"):
        (out / name).unlink()
    said = {"do_lower_case": False, "clean_up_tokenization_spaces": True}
    (out / "tokenizer_config.json").write_text(json.dumps(said))
    report = verify(out, originals("bert-ngc-cased"), levels="coverage")
    assert [f for f in report.findings if f.status == "fail"] == []


def test_another_class_that_brings_a_token_is_one_difference(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """The class that config.json names, where the file names none."""
    out = copied(conversions("llama-3-8b"), tmp_path / "out")
    (out / "ckpt-tool.json").unlink()
    for name, change in (
        ("tokenizer_config.json", {"tokenizer_class": None}),
        ("config.json", {"tokenizer_class": "CodeGenTokenizer"}),
    ):
        document = json.loads((out / name).read_text()) | change
        (out / name).write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    report = verify(out, originals("llama-3-8b"), levels="coverage", settings=VARIANTS["llama-3-8b"].settings)
    (found,) = [f for f in report.findings if f.where == "tokenizer_config.json: tokenizer_class"]
    assert found.status == "fail" and "CodeGenTokenizer, of which <|endoftext|> gets an id" in found.message


LLAMA, OTHER = {"tokenizer_class": "LlamaTokenizerFast"}, {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize(
    ("expected", "found", "told"),
    [
        # as the scripts of transformers 4.37 write a Mistral's: its class pads on the left unasked
        ({**OTHER, "padding_side": "left"}, LLAMA, []),
        (LLAMA, {**OTHER, "padding_side": "left"}, []),
        (LLAMA, {**LLAMA, "padding_side": "right"}, ['expected "left", found "right"']),
        (LLAMA, OTHER, ['expected "left", found "right"']),
        (OTHER, {**OTHER, "padding_side": "left"}, ['expected "right", found "left"']),
    ],
)
def test_a_class_pads_on_its_own_side_where_the_file_says_none(
    expected: dict[str, Any], found: dict[str, Any], told: list[str]
) -> None:
    made = differences(expected, found, alike=("LlamaTokenizer",), begins=False, ends=False)
    assert [d.message for d in made if d.where == "padding_side"] == told


@pytest.mark.parametrize(
    ("variant", "status"),
    [("mistral-7b-v0.1", "note"), ("pythia-410m", "pass")],  # of an original that says nothing of it
)
def test_a_side_of_padding_that_nobody_says_is_no_difference(
    variant: str, status: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    out = copied(conversions(variant), tmp_path / "out")
    (out / "ckpt-tool.json").unlink()
    config = json.loads((out / "tokenizer_config.json").read_text())
    config.pop("padding_side", None)
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    found = about_documents(verify(out, originals(variant), levels="coverage"), "fail", "note")
    text = "not said, nor by the original, so the library's class decides"
    assert [f.status for f in found if text in f.message] == [status] * (status == "note")
    assert not [f for f in found if f.status == "fail"]


def test_shards_in_other_files_than_the_index_says_are_a_note(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    variant = "mixtral-c"
    out = copied(conversions(variant), tmp_path / "out")
    MISTAKES["shards: no index"](out)
    files = sorted(f.name for f in out.glob("*.safetensors"))
    home = {name: file for file in files for name in load_file(out / file)}
    moved = min(home)
    home[moved] = next(f for f in files if f != home[moved])
    (out / INDEX_NAME).write_bytes(index_document(home, 0))
    (out / "ckpt-tool.json").unlink()
    report = verify(out, originals(variant), levels=("coverage", "bits"))
    assert report.exit_code == 0
    (note,) = [f for f in report.findings if f"lists {moved} in another file" in f.message]
    assert note.status == "note"


@pytest.mark.parametrize("said", [None, {"format": "np"}])
def test_safetensors_that_old_releases_do_not_load_are_told(
    said: dict[str, str] | None, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    out = copied(conversions("mixtral-c"), tmp_path / "out")
    (out / "ckpt-tool.json").unlink()
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors", metadata=said)
    report = verify(out, originals("mixtral-c"), levels=("coverage", "bits"))
    assert report.exit_code == 0
    (note,) = about_documents(report, "note")
    found = "format np" if said else "no format"
    assert note.message == f"its metadata has {found}, where transformers 4.37 loads nothing but pt"


def test_a_split_that_transformers_5_builds_for_the_class_is_told_with_the_text(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """Qwen2Tokenizer of transformers 5 puts in a split of its own, whatever tokenizer.json says."""

    def split(folder: Path, pattern: str) -> None:
        document = json.loads((folder / "tokenizer.json").read_text())
        document["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
        (folder / "tokenizer.json").write_text(json.dumps(document))

    source = copied(originals("qwen2-0.5b"), tmp_path / "source")
    out = copied(conversions("qwen2-0.5b"), tmp_path / "out")
    (out / "ckpt-tool.json").unlink()
    split(source, r"\p{N}")
    report = verify(out, source, levels=("coverage", "bits"))
    assert report.exit_code == 0
    (note,) = [f for f in about_documents(report, "note") if f.where == "tokenizer.json"]
    assert "transformers 5" in note.message and "expected ids" in note.message
    split(out, r"\p{L}")
    assert verify(out, source, levels="coverage").exit_code == 1


# --- what is not there ----------------------------------------------------------------------------------


def test_weights_saved_without_a_tokenizer_pass_and_the_headline_says_so(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    out = copied(conversions("llama-2-7b"), tmp_path / "out")
    for name in ("ckpt-tool.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        (out / name).unlink()
    (out / "special_tokens_map.json").unlink()
    report = verify(out, originals("llama-2-7b"), levels=("coverage", "bits"))
    assert report.exit_code == 0
    assert "the source has a tokenizer, the output has none" in report.headline


def test_a_tokenizer_that_was_given_when_converting_is_not_called_a_mistake(
    originals: Written, tmp_path: Path
) -> None:
    own = copied(originals("llama-2-7b"), tmp_path / "own")
    words = VARIANTS["llama-2-7b"].true_config["vocab_size"]
    (own / "tokenizer.model").write_bytes(sentencepiece_model(words))
    other = tmp_path / "tokenizer.model"
    other.write_bytes(sentencepiece_model(words, control=("[INST]",)))
    out = tmp_path / "out"
    convert(own, out, family="llama", options=Options(tokenizer=str(other)))
    report = verify(out, own, levels=("coverage", "bits"))
    assert report.exit_code == 0, about_documents(report, "fail")
    assert "given when converting" in report.headline
    MISTAKES["copy: tokenizer.model changed"](out)
    assert verify(out, own, levels="coverage").exit_code == 1


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_without_a_source_what_the_manifest_records_must_be_there(
    name: str, conversions: Written, tmp_path: Path
) -> None:
    out = copied(conversions("llama-2-7b"), tmp_path / "out")
    assert verify(out, levels=("coverage", "bits"), no_source=True).exit_code == 0
    (out / name).unlink()
    report = verify(out, levels=("coverage", "bits"), no_source=True)
    assert report.exit_code == 1 and name in report.headline


def test_an_id_that_no_token_has_is_a_fault_of_the_original(
    originals: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = copied(originals("qwen2-0.5b"), tmp_path / "in"), tmp_path / "out"
    said = json.loads((source / "generation_config.json").read_text()) | {"eos_token_id": 151645999}
    (source / "generation_config.json").write_text(json.dumps(said))
    monkeypatch.setattr(
        sys, "argv", ["ckpt-tool", "convert", "qwen2", "--in", str(source), "--out", str(out)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "found 151645999, as the conversion wrote it" in shown
    said["eos_token_id"] += 1
    (out / "generation_config.json").write_text(json.dumps(said))
    report = verify(out, levels="coverage", no_source=True)
    assert [f.where for f in about_documents(report, "fail")][-1] == "generation_config.json: eos_token_id"


def test_without_a_source_files_that_contradict_each_other_fail(conversions: Written, tmp_path: Path) -> None:
    out = copied(conversions("gpt2-ngc-deflated"), tmp_path / "out")
    (out / "ckpt-tool.json").unlink()
    MISTAKES["copy: ids of vocab.json exchanged"](out)
    report = verify(out, levels="coverage", no_source=True)
    assert [f.where for f in about_documents(report, "fail")] == ["vocab.json"]


def test_a_name_in_the_manifest_that_leads_out_of_the_folder_is_not_followed(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    out = copied(conversions("llama-2-7b"), tmp_path / "out")
    manifest = json.loads((out / "ckpt-tool.json").read_text())
    manifest["documents"].append({"file": "../secret", "sha256": "0" * 64, "source": "x"})
    (out / "ckpt-tool.json").write_text(json.dumps(manifest))
    (tmp_path / "secret").write_text("x")
    report = verify(out, originals("llama-2-7b"), levels="coverage")
    (wrong,) = about_documents(report, "fail")
    assert wrong.where == "../secret" and "found none" in wrong.message


# --- the way back ---------------------------------------------------------------------------------------

ORIGINALS = {
    "llama-2-7b": ("params.json", "tokenizer.model"),
    "opt-13b": ("gpt2-vocab.json", "gpt2-merges.txt"),
    "codegen-2b-multi": ("config.json", "tokenizer.json"),
    "mistral-nemo": ("tekken.json",),
}


@pytest.mark.parametrize("variant", list(ORIGINALS))
def test_documents_of_an_original_are_compared_too(
    variant: str, conversions: Written, tmp_path: Path
) -> None:
    back = tmp_path / "back"
    convert(conversions(variant), back, family=VARIANTS[variant].family, to="original")
    assert about_documents(verify(back, conversions(variant), levels="coverage"), "fail") == []
    for name in ORIGINALS[variant]:
        kept = (back / name).read_bytes()
        (back / name).unlink()
        report = verify(back, conversions(variant), levels="coverage")
        assert name in {f.where for f in about_documents(report, "fail")}
        (back / name).write_bytes(kept.replace(b"1", b"2") if name.endswith("json") else kept[:-1] + b"\x03")
        report = verify(back, conversions(variant), levels="coverage")
        assert any(name in str(f.where) for f in about_documents(report, "fail")), name
        (back / name).write_bytes(kept)


@pytest.mark.parametrize(
    ("variant", "name", "values"),
    [
        ("mluke-aware", "entity_vocab.json", None),  # which no tokenizer.json says
        ("canine-tydi", "tokenizer_config.json", None),  # a tokenizer without a vocabulary
        ("mluke-aware", "tokenizer_config.json", {"task": "entity_pair_classification"}),
        ("mluke-aware", "tokenizer_config.json", {"max_mention_length": 3}),
    ],
)
def test_what_only_one_file_of_a_tokenizer_says_is_not_done_without(
    variant: str,
    name: str,
    values: dict[str, Any] | None,
    originals: Written,
    conversions: Written,
    tmp_path: Path,
) -> None:
    out = copied(conversions(variant), tmp_path / "out")
    (out / "ckpt-tool.json").unlink()
    if values is None:
        (out / name).unlink()
    else:
        (out / name).write_text(json.dumps(json.loads((out / name).read_text()) | values))
    (wrong,) = about_documents(verify(out, originals(variant), levels="coverage"), "fail")
    assert all(word in f"{wrong.where} {wrong.message}" for word in (name, *(values or ())))
