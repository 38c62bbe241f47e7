"""Certificates of very many tensors, whose lists lie beside them, and where a source is from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from ckpt_tool.api import convert
from ckpt_tool.errors import CkptToolError
from ckpt_tool.verify import certificate_lists, verify
from ckpt_tool.verify.certificate import Certified, Request, as_bytes, certify
from ckpt_tool.verify.certificate_check import check
from tests.in_process import program
from tests.range_server import serving

Written = Callable[[str], Path]
VARIANT = "mistral-float32"
NAME, LISTS = "ckpt-tool.certificate.json", "ckpt-tool.certificate.lists.jsonl"
QUICK = Request(levels=("coverage", "bits"))


def certified(out: Path, source: Any) -> Certified:
    done = certify(out, source, QUICK)
    assert done.statement is not None, done.report.headline
    return done


@pytest.fixture
def work(originals: Written, conversions: Written, tmp_path: Path) -> Path:
    shutil.copytree(conversions(VARIANT), tmp_path / "out")
    (tmp_path / "source").symlink_to(originals(VARIANT))
    return tmp_path


@pytest.fixture
def apart(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a certificate whose lists lie beside it."""
    monkeypatch.setattr(certificate_lists, "INLINE", 10)
    done = program(
        "certificate", "out", "--source", "source", "--level", "coverage", "--level", "bits", cwd=work
    )
    assert done.returncode == 0, done.stderr
    assert LISTS in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    return work


def test_lists_apart_are_the_same_entries_and_hold(apart: Path) -> None:
    """They say what stands in a certificate that has them in it, and every way of checking reads them."""
    out, source = apart / "out", apart / "source"
    said = json.loads((out / NAME).read_bytes())["predicate"]
    certificate_lists.INLINE = 10**9
    (whole,) = (c.statement for c in [certified(out, source)])
    certificate_lists.INLINE = 10
    assert whole is not None
    lines = [json.loads(line) for line in (out / LISTS).read_bytes().splitlines()]
    plan = whole["predicate"]["plan"]
    tensors = [t for o in plan["outputs"] for t in o["tensors"]]
    held = [whole["predicate"][side]["tensors"] for side in ("source", "target")]
    assert lines == [*held[0], *held[1], *tensors, *plan["steps"]]
    assert (said["source"]["root"], said["plan"]["sha256"]) == (
        whole["predicate"]["source"]["root"],
        plan["sha256"],
    )
    assert said["source"]["tensors"] == len(held[0]) and said["plan"]["steps"] == len(plan["steps"])
    assert said["casts"] == whole["predicate"]["casts"]
    report = check(out, source=source, spot=10_000, full=True)
    assert report.status == "pass" and "byte for byte" in report.headline, report.headline
    assert f"{len(held[1])} of {len(held[1])} tensors were made again" in report.headline


def _agreeing(work: Path, edit: Callable[[list[Any]], None]) -> None:
    """A forger who writes the SHA-256 of other lists into the certificate."""
    path = work / "out" / LISTS
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    edit(lines)
    path.write_bytes(b"".join(certificate_lists.canonical(x) + b"\n" for x in lines))
    said = json.loads((work / "out" / NAME).read_bytes())
    said["predicate"]["lists"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (work / "out" / NAME).write_bytes(as_bytes(said))


def test_lists_that_were_changed_do_not_hold(apart: Path) -> None:
    place, out = apart / "out" / LISTS, apart / "out"
    right, said = place.read_bytes(), (out / NAME).read_bytes()
    place.write_bytes(right.replace(b"F32", b"F16", 1))
    report = check(out)
    assert report.status == "fail" and report.headline.startswith(f"{LISTS}: expected the lists of SHA-256")
    count = len(right.splitlines())
    edits: list[tuple[Callable[[list[Any]], None], str]] = [
        (lambda x: x[0].update(sha256="0" * 64), "source root"),
        (lambda x: x[-1]["sources"][0].update(name="x"), "plan"),
        (lambda x: x.__setitem__(slice(None), [*x[1:2], *x[:1], *x[2:]]), "source root"),
    ]
    for edit, part in edits:
        place.write_bytes(right)
        _agreeing(apart, edit)
        failed = [f.check for f in check(out).findings if f.status == "fail"]
        assert part in failed, failed
    for content, words in (
        (right + right.splitlines()[0] + b"\n", f"expected {count} entries, found {count + 1}"),
        (right.replace(b'{"', b'{ "', 1), "canonical JSON"),
        (right.replace(b'"shape":[', b'"shape":["",', 1), "expected an integer"),
        (b"[" * 100_000 + right, "expected an entry as canonical JSON"),
        (b" " * (certificate_lists.LINE + 1), "found a longer one"),
    ):
        place.write_bytes(content)
        forged = json.loads(said)
        forged["predicate"]["lists"]["sha256"] = hashlib.sha256(content).hexdigest()
        (out / NAME).write_bytes(as_bytes(forged))
        with pytest.raises(CkptToolError, match=words):
            check(out)
    (out / NAME).write_bytes(said)
    place.write_bytes(b"".join(right.splitlines(keepends=True)[1:]))  # cut between two entries
    assert check(out).headline.startswith(f"{LISTS}: expected the lists of SHA-256")
    place.unlink()
    with pytest.raises(CkptToolError, match="expected the lists of the certificate, found none") as missing:
        check(out)
    assert f"belongs to {NAME}" in str(missing.value.problems[0].hint)


def test_what_differs_in_lists_is_told_by_doing_it_again(apart: Path) -> None:
    _agreeing(apart, lambda x: x[0].update(sha256="0" * 64))
    root = json.loads((apart / "out" / NAME).read_bytes())
    entries = certificate_lists.entries_of(root["predicate"], apart / "out" / NAME)
    root["predicate"]["source"]["root"] = certificate_lists.Tree().root()
    tree = certificate_lists.Tree()
    for leaf in entries.each("source"):
        tree.add(certificate_lists.canonical(leaf))
    root["predicate"]["source"]["root"] = tree.root()
    (apart / "out" / NAME).write_bytes(as_bytes(root))
    assert check(apart / "out").status == "pass"
    report = check(apart / "out", source=apart / "source", full=True)
    assert report.status == "fail"
    assert any("entry 1 of the lists (source)" in str(f.where) for f in report.findings)


def test_a_name_that_lists_would_take_is_not_written_over(work: Path) -> None:
    lists = work / "out" / LISTS
    lists.write_text("mine")
    for earlier in (None, {"predicateType": "x", "predicate": {}}, {"payloadType": "x", "payload": "e30="}):
        if earlier is not None:
            (work / "out" / NAME).write_text(json.dumps(earlier))
        done = program("certificate", "out", "--source", "source", cwd=work)
        assert done.returncode == 2 and done.stderr.startswith("error[output-exists]"), done.stderr
        assert lists.read_text() == "mine"


def test_lists_of_an_earlier_certificate_go_with_it(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate_lists, "INLINE", 10**9)
    levels = ("--level", "coverage", "--level", "bits")
    done = program("certificate", "out", "--source", "source", *levels, cwd=apart)
    assert done.returncode == 0, done.stderr
    assert (apart / "out" / NAME).exists() and not (apart / "out" / LISTS).exists()


# --- where a source is from -----------------------------------------------------------------------------


@pytest.fixture
def address(originals: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    shutil.copytree(originals(VARIANT), tmp_path / "served" / "org" / "model")
    (tmp_path / "served" / "files").symlink_to(tmp_path / "served" / "org" / "model")
    with serving(tmp_path / "served") as (server, _):
        yield f"{server}/files/"


def test_a_source_of_a_server_is_named_and_compared(work: Path, address: str) -> None:
    done = certified(work / "out", address)
    assert done.statement is not None
    assert done.statement["predicate"]["source"]["repository"] == {"address": address}
    place = work / "out" / NAME
    place.write_bytes(as_bytes(done.statement))
    assert "address" not in check(work / "out", source=address, spot=2).headline
    here = check(work / "out", source=work / "source", spot=2)
    assert here.status == "pass" and "is a copy on a disk" in here.headline
    other = json.loads(place.read_bytes())
    other["predicate"]["source"]["repository"] = {"hub": "org/model", "commit": "1" * 40}
    place.write_bytes(as_bytes(other))
    found = check(work / "out", source=address, spot=2, full=True)
    (where, *_) = [f for f in found.findings if f.status == "fail"]
    assert found.status == "fail" and f"--source hf://org/model@{'1' * 40}" in where.message
    assert any(f.check == "verification" and f.status == "pass" for f in found.findings)


# --- models that leave out which class they are of ------------------------------------------------------


def _headless(folder: Path, family: str, **config: Any) -> Path:
    """A tiny classifier of the library's own, whose config.json names no class."""
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{family}Config")(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
        pad_token_id=0, **config,
    )  # fmt: skip
    getattr(transformers, f"{family}ForSequenceClassification")(made).save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    del said["architectures"]
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_a_class_that_config_does_not_name_can_be_given(family: str, tmp_path: Path) -> None:
    _headless(tmp_path / "in", family, num_key_value_heads=2)
    asked = ("convert", "auto", "--in", "in", "--out", "out", "--no-verify")
    done = program(*asked, cwd=tmp_path)
    hint = f"--set architectures={family}ForSequenceClassification"
    assert done.returncode == 2 and done.stderr.startswith("error[bad-config]"), done.stderr
    assert hint in done.stderr
    done = program(*asked, *hint.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == [f"{family}ForSequenceClassification"]
    report = verify(tmp_path / "out", tmp_path / "in", levels=("coverage", "bits"))
    assert report.status == "pass", report.headline


def test_an_id_for_padding_says_which_token_a_classifier_takes(tmp_path: Path) -> None:
    asked = {"architectures": ["MistralForSequenceClassification"]}
    source, out = _headless(tmp_path / "in", "Mistral", num_key_value_heads=2), tmp_path / "out"
    said = {**json.loads((source / "config.json").read_text()), **asked, "pad_token_id": None}
    (source / "config.json").write_text(json.dumps(said))
    shutil.copytree(source, out)
    (out / "config.json").write_text(json.dumps({**said, "pad_token_id": 7}))
    report = verify(out, source, levels=("coverage",))
    (found,) = [f for f in report.findings if f.where == "config.json: pad_token_id"]
    assert found.status == "fail" and "expected null" in found.message and "found 7" in found.message


def test_a_model_without_its_pooler_is_computed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = transformers.MegatronBertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=70, initializer_range=0.2,
    )  # fmt: skip
    transformers.MegatronBertModel(made, add_pooling_layer=False).save_pretrained(tmp_path / "in")
    done = convert(tmp_path / "in", tmp_path / "out")
    assert any("no pooler" in note for note in done.plan.notes)
    report = verify(tmp_path / "out", tmp_path / "in", levels=("parity",))
    assert report.status == "pass", report.headline


def test_a_model_type_of_another_class_is_told_where_there_is_no_plan(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(conversions("canine-c-training"), out)
    said = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**said, "model_type": "gpt2"}))
    report = verify(out, originals("canine-c-training"), levels=("coverage",))
    (found,) = [f for f in report.findings if f.where == "config.json: model_type"]
    assert (
        found.status == "fail"
        and found.message == "expected canine, as its class CanineModel has it, found gpt2"
    )
