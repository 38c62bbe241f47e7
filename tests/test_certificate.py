"""Certificates: what they say can be made again by other means, and whatever is changed in them, in the
output or in the source is found out."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ckpt_tool.api import Options, convert
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import merkle
from ckpt_tool.verify.binomial import excluded, interval
from ckpt_tool.verify.certificate import Certified, Request, as_bytes, certify
from ckpt_tool.verify.certificate_check import check
from ckpt_tool.verify.leaves import derived, digest, makers
from ckpt_tool.verify.report import Report
from ckpt_tool.verify.signing import PASSWORD, sign
from ckpt_tool.verify.subject import opened
from tests.in_process import program

VARIANT = "mistral-float32"
NAME = "ckpt-tool.certificate.json"
Written = Callable[[str], Path]
Statement = dict[str, Any]


@pytest.fixture(scope="module")
def certified(originals: Written, conversions: Written) -> bytes:
    done = certify(conversions(VARIANT), originals(VARIANT))
    assert done.statement is not None, done.report.headline
    return as_bytes(done.statement)


@pytest.fixture(scope="module")
def quick(originals: Written, conversions: Written) -> bytes:
    """One without what was computed, which is soon made again."""
    done = certify(conversions(VARIANT), originals(VARIANT), Request(levels=("coverage", "bits")))
    assert done.statement is not None
    return as_bytes(done.statement)


@pytest.fixture
def work(certified: bytes, originals: Written, conversions: Written, tmp_path: Path) -> Path:
    shutil.copytree(conversions(VARIANT), tmp_path / "out")
    (tmp_path / "source").symlink_to(originals(VARIANT))
    (tmp_path / "out" / NAME).write_bytes(certified)
    return tmp_path


# --- the mathematics ------------------------------------------------------------------------------------


def test_roots_are_those_of_certificate_transparency() -> None:
    """The leaves and roots that implementations of RFC 6962 test with."""
    leaves = [
        bytes.fromhex(x)
        for x in (
            *("", "00", "10", "2021", "3031", "40414243", "5051525354555657"),
            "606162636465666768696a6b6c6d6e6f",
        )
    ]
    assert merkle.root([]) == hashlib.sha256().hexdigest()
    assert merkle.root(leaves[:1]) == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert merkle.root(leaves[:3]) == "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"
    assert merkle.root(leaves) == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


@given(st.integers(1, 60), st.data())
@settings(max_examples=40, deadline=None)
def test_the_interval_holds_the_share_as_often_as_it_says(trials: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, trials))
    low, high = interval(hits, trials)
    assert 0 <= low <= hits / trials <= high <= 1

    def tail(p: float, k: range) -> float:
        return sum(math.comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in k)

    assert hits == 0 or tail(low, range(hits, trials + 1)) == pytest.approx(0.025, rel=1e-6)
    assert hits == trials or tail(high, range(hits + 1)) == pytest.approx(0.025, rel=1e-6)


@given(st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_the_excluded_share_by_counting(leaves: int, data: st.DataObject) -> None:
    checked = data.draw(st.integers(1, leaves))
    most = excluded(leaves, checked)

    def unseen(wrong: int) -> float:
        return math.comb(leaves - wrong, checked) / math.comb(leaves, checked)

    assert most == 0 or unseen(most) > 0.05
    assert most == leaves - checked or unseen(most + 1) <= 0.05 + 1e-9


# --- what it says ---------------------------------------------------------------------------------------


def test_leaves_are_the_tensors_as_another_library_reads_them(certified: bytes, conversions: Written) -> None:
    predicate = json.loads(certified)["predicate"]
    held = load_file(conversions(VARIANT) / "model.safetensors")
    said = {t["name"]: t["sha256"] for t in predicate["target"]["tensors"]}
    assert said == {n: hashlib.sha256(a.tobytes()).hexdigest() for n, a in held.items()}


def test_equal_inputs_give_equal_bytes_elsewhere(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    request = Request(levels=("coverage", "bits"))
    shutil.copytree(originals(VARIANT), tmp_path / "there" / "original")
    shutil.copytree(conversions(VARIANT), tmp_path / "elsewhere")
    first = certify(conversions(VARIANT), originals(VARIANT), request)
    second = certify(tmp_path / "elsewhere", tmp_path / "there" / "original", request)
    assert first.statement is not None and second.statement is not None
    assert as_bytes(first.statement) == as_bytes(second.statement)
    text = as_bytes(second.statement).decode()
    assert str(tmp_path) not in text and os.path.realpath(conversions(VARIANT)) not in text


def test_a_catch_rate_with_its_interval(certified: bytes) -> None:
    said = json.loads(certified)["predicate"]["verification"]
    rate = said["planted_mistakes"]
    assert rate["caught"] == rate["planted"] >= 20
    assert rate["interval"][0] == pytest.approx(0.025 ** (1 / rate["planted"]), abs=1e-5)
    assert said["verdict"] == "pass" and said["exactness"] == "bit-identical"


@pytest.mark.parametrize(
    ("variant", "asked"),
    [("mixtral-b", {}), ("llama-1-13b", {}), ("gpt2-v3-tp2-pp2", {}), ("mistral-float32", {"dtype": "BF16"})],
)
def test_every_leaf_can_be_made_from_the_source(
    variant: str, asked: dict[str, Any], originals: Written, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(originals(variant), out, family=VARIANTS[variant].family, options=Options(**asked))
    with opened(out, originals(variant)) as subject:
        assert subject.plan is not None and subject.source is not None
        known = makers(subject.plan)
        for tensor in subject.output:
            made = derived(known["", tensor.name], subject.source, tensor)
            assert made == digest(subject.output, tensor), tensor.name


def test_of_an_original_that_was_written(conversions: Written, tmp_path: Path) -> None:
    options = Options(shards=2)
    convert(conversions("llama-1-13b"), tmp_path / "back", family="llama", to="original", options=options)
    hf = conversions("llama-1-13b")
    done = certify(tmp_path / "back", hf, Request(levels=("coverage", "bits")))
    assert done.statement is not None
    (tmp_path / "c.json").write_bytes(as_bytes(done.statement))
    report = check(tmp_path / "back", file=tmp_path / "c.json", source=hf, spot=1000)
    assert report.status == "pass", report.headline
    assert len(done.statement["predicate"]["target"]["tensors"]) > 2


def test_an_output_in_other_shards_than_a_plan_has_unasked(originals: Written, tmp_path: Path) -> None:
    """The size of shards is no part of the manifest's options: the plan that is made again has one file."""
    out = tmp_path / "out"
    options = Options(max_shard_bytes=100_000)
    convert(originals("mistral-7b-v0.1"), out, family="mistral", options=options)
    assert len(list(out.glob("*.safetensors"))) > 2
    done = certify(out, originals("mistral-7b-v0.1"), Request(levels=("coverage", "bits")))
    assert done.statement is not None
    (out / NAME).write_bytes(as_bytes(done.statement))
    report = check(out, source=originals("mistral-7b-v0.1"), spot=1000, full=True)
    assert report.status == "pass", report.headline


# --- three ways to check --------------------------------------------------------------------------------


def test_checked_without_the_source_by_samples_and_in_full(work: Path, quick: bytes) -> None:
    out, source = work / "out", work / "source"
    (out / NAME).write_bytes(quick)
    assert check(out).status == "pass"
    by_sample = check(out, source=source, spot=5, seed=3)
    assert by_sample.status == "pass" and "5 of" in by_sample.headline and "95 %" in by_sample.headline
    everything = check(out, source=source, spot=10_000)
    assert "95 %" not in everything.headline
    full = check(out, source=source, full=True)
    assert full.status == "pass" and "byte for byte" in full.headline, full.headline


def change(path: Path, edit: Callable[[Statement], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_bytes(as_bytes(content))


def _leaf(s: Statement, side: str = "target") -> Statement:
    found: Statement = s["predicate"][side]["tensors"][4]
    return found


def _set(*path: Any, to: Any) -> Callable[[Statement], None]:
    def edit(s: Any) -> None:
        for key in path[:-1]:
            s = s[key]
        s[path[-1]] = to

    return edit


P, V = "predicate", ("predicate", "verification")
OTHER = "0" * 64
FORGED: dict[str, Callable[[Statement], None]] = {
    "a subject's digest": _set("subject", 0, "digest", "sha256", to=OTHER),
    "a subject less": lambda s: s["subject"].pop(),
    "a subject more": lambda s: s["subject"].append({"name": "x.json", "digest": {"sha256": OTHER}}),
    "a subject's name": _set("subject", 0, "name", to="other.json"),
    "a target leaf's digest": lambda s: _leaf(s).update(sha256=OTHER),
    "a target leaf's name": lambda s: _leaf(s).update(name="model.other"),
    "a target leaf's dtype": lambda s: _leaf(s).update(dtype="F16"),
    "a target leaf less": lambda s: s[P]["target"]["tensors"].pop(),
    "target leaves exchanged": lambda s: s[P]["target"]["tensors"].reverse(),
    "the target root": _set(P, "target", "root", to=OTHER),
    "a source leaf's digest": lambda s: _leaf(s, "source").update(sha256=OTHER),
    "a source leaf less": lambda s: s[P]["source"]["tensors"].pop(),
    "the source root": _set(P, "source", "root", to=OTHER),
    "the plan's digest": _set(P, "plan", "sha256", to=OTHER),
    "a value of the plan": _set(P, "plan", "config", "rms_norm_eps", "value", to=1.0),
    "a row of the plan": _set(P, "plan", "steps", 0, "targets", 0, "name", to="x"),
    "a planned output": lambda s: s[P]["plan"]["outputs"][0]["tensors"].pop(),
    "a finding that failed": _set(*V, "findings", 0, "status", to="fail"),
    "no proof among the findings": lambda s: s[P]["verification"].update(findings=[]),
    "the verdict": _set(*V, "verdict", to="fail"),
    "the planted mistakes": _set(*V, "planted_mistakes", "planted", to=500),
    "the interval": _set(*V, "planted_mistakes", "interval", to=[0.999, 1.0]),
    "the family": _set(P, "family", to="llama"),
    "the direction": _set(P, "direction", to="to-original"),
    "the casts": _set(P, "casts", to=[{"from": "F32", "to": "BF16"}]),
    "the headline": _set(*V, "headline", to="every bit is proved"),
    "the class": _set(*V, "exactness", to="within noise floor"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_certificate_does_not_hold(what: str, work: Path) -> None:
    change(work / "out" / NAME, FORGED[what])
    assert check(work / "out").status == "fail"


def _whole(s: Statement, edit: Callable[[Statement], None]) -> None:
    """A forger who makes the certificate agree with itself again."""
    from ckpt_tool.verify.leaves import canonical, root

    edit(s)
    for side in ("source", "target"):
        s[P][side]["root"] = root(s[P][side]["tensors"])
    plan = {k: v for k, v in s[P]["plan"].items() if k != "sha256"}
    s[P]["plan"]["sha256"] = hashlib.sha256(canonical(plan)).hexdigest()


@pytest.mark.parametrize(
    "edit",
    [
        _set(P, "plan", "config", "rms_norm_eps", "value", to=1.0),
        lambda s: _leaf(s, "source").update(sha256=OTHER),
        _set(P, "source", "files", 0, "sha256", to=OTHER),
        _set(*V, "findings", -1, "message", to="all is well"),
        lambda s: s.update(more=1),
    ],
)
def test_what_agrees_with_itself_and_is_not_so_is_seen_by_doing_it_again(
    edit: Callable[[Statement], None], work: Path, quick: bytes
) -> None:
    (work / "out" / NAME).write_bytes(quick)
    change(work / "out" / NAME, lambda s: _whole(s, edit))
    assert check(work / "out").status == "pass"
    assert check(work / "out", source=work / "source", full=True).status == "fail"


def test_a_copy_of_a_repository_shows_all_but_where_it_came_from(
    work: Path, quick: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = _set(P, "source", "repository", to={"hub": "someone/else", "commit": "1" * 40})
    (work / "out" / NAME).write_bytes(quick)
    plain = json.loads(quick)
    change(work / "out" / NAME, lambda s: _whole(s, edit))
    of_hub = json.loads((work / "out" / NAME).read_bytes())
    for said, now, words in ((of_hub, plain, "not shown"), (plain, of_hub, "names no repository")):
        (work / "out" / NAME).write_text(json.dumps(said))
        again = Certified(Report("as before"), copy.deepcopy(now))
        monkeypatch.setattr("ckpt_tool.verify.certificate.certify", lambda *_, again=again, **__: again)
        report = check(work / "out", source=work / "source", full=True)
        (note,) = [f for f in report.findings if f.check == "repository"]
        assert note.status == "note" and "someone/else" in note.message and words in note.message
        assert report.status == "pass" and note.message in report.headline
        assert "byte for byte, but for the repository" in report.to_json()["headline"]
    other = copy.deepcopy(of_hub)
    other[P]["source"]["repository"]["hub"] = "someone/new"
    again = Certified(Report("as before"), other)
    monkeypatch.setattr("ckpt_tool.verify.certificate.certify", lambda *_, **__: again)
    (work / "out" / NAME).write_text(json.dumps(of_hub))
    assert check(work / "out", source=work / "source", full=True).status == "fail"


def test_numbers_of_another_machine_are_told_and_of_the_same_refused(
    work: Path, certified: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(s: Statement) -> None:
        found = next(f for f in s[P]["verification"]["findings"] if f["measured"])
        found["measured"] /= 1000
        said = s[P]["verification"]
        bar = next(f for f in said["findings"] if f["check"] == "equivalence")["data"]
        before = f"{bar['upper']:.2g}"
        bar["upper"] /= 2
        said["headline"] = said["headline"].replace(before, f"{bar['upper']:.2g}")

    again = Certified(Report("as before"), json.loads(certified))
    monkeypatch.setattr("ckpt_tool.verify.certificate.certify", lambda *_, **__: again)
    change(work / "out" / NAME, measured)
    report = check(work / "out", source=work / "source", full=True)
    assert report.status == "fail" and "other numbers" in report.headline
    change(work / "out" / NAME, _set(*V, "environment", "processor", to="another"))
    report = check(work / "out", source=work / "source", full=True)
    assert report.status == "pass" and "other measured numbers" in report.headline


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((P, "plan", "outputs"), 3),
        ((P, "plan", "outputs"), ["x"]),
        ((P, "plan", "outputs", 0, "tensors"), {"a": 3}),
        ((P, "plan", "outputs", 0, "tensors", 0, "shape"), 3),
        ((P, "plan", "outputs", 0, "constants"), [[]]),
        ((P, "plan", "steps", 0, "sources"), [None]),
        ((P, "target", "tensors", 0, "shape"), [[]]),
        ((*V, "findings"), True),
        ((*V, "findings", 0), 1.5),
        ((*V, "findings", 0, "status"), "failed"),
        ((*V, "findings", 0, "tables"), [{"columns": [], "rows": [3]}]),
        ((*V, "asked", "levels"), 3),
        ((*V, "asked", "against"), ["transformers"]),
        (("subject", 0, "digest"), {"sha512": OTHER}),
        (("subject", 0, "digest", "sha512"), OTHER),
        (("subject", 0, "name"), "config.json"),
    ],
)
def test_what_is_no_certificate_is_told_where_it_is_not(
    path: tuple[Any, ...], value: Any, work: Path, quick: bytes
) -> None:
    (work / "out" / NAME).write_bytes(quick)
    change(work / "out" / NAME, _set(*path, to=value))
    with pytest.raises(CkptToolError) as caught:
        check(work / "out")
    assert caught.value.kind == "bad-config" and caught.value.problems[0].where


def test_of_another_version_of_the_tool(work: Path, quick: bytes) -> None:
    (work / "out" / NAME).write_bytes(quick)
    change(work / "out" / NAME, _set(P, "tool", "version", to="9"))
    report = check(work / "out", source=work / "source", full=True)
    assert report.status == "pass" and "but for the tool: ckpt-tool 9 then" in report.headline


def test_under_another_name_within_the_output(work: Path) -> None:
    """It is no part of what it speaks of, neither when it is made again nor when it is checked."""
    (work / "out" / NAME).unlink()
    levels = ("--level", "coverage", "--level", "bits")
    for _ in range(2):
        made = program(
            "certificate", "out", "--source", "source", "--write", "out/own.json", *levels, cwd=work
        )
        assert made.returncode == 0, made.stderr
    assert "own.json" not in {s["name"] for s in json.loads((work / "out/own.json").read_text())["subject"]}
    report = check(work / "out", file=work / "out/own.json", source=work / "source", full=True)
    assert report.status == "pass", report.headline


def test_what_lies_behind_a_link_to_a_folder_is_not_passed_over(work: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (work / "out" / "code").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CkptToolError, match="found a link to a folder"):
        check(work / "out")


def test_a_sample_says_which_documents_are_not_those_of_the_source(work: Path, quick: bytes) -> None:
    config = work / "out" / "config.json"
    config.write_text(config.read_text().replace("\n", "\n\n", 1))
    digest = hashlib.sha256(config.read_bytes()).hexdigest()
    (work / "out" / NAME).write_bytes(quick)

    def edit(s: Statement) -> None:
        next(e for e in s["subject"] if e["name"] == "config.json")["digest"]["sha256"] = digest

    change(work / "out" / NAME, edit)
    report = check(work / "out", source=work / "source", spot=3)
    assert report.status == "pass"
    assert [f.where for f in report.findings if f.check == "documents"] == ["config.json"]


def _altered(out: Path) -> None:
    tensors = load_file(out / "model.safetensors")
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    tensors[name].flat[7] += 1e-3
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("alter", "where"),
    [
        (_altered, "model.safetensors"),
        (lambda out: (out / "config.json").write_text("{}"), "config.json"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda out: shutil.copy(out / "model.safetensors", out / "x.safetensors"), "x.safetensors"),
    ],
)
def test_an_output_that_was_changed_does_not_hold(
    alter: Callable[[Path], None], where: str, work: Path
) -> None:
    alter(work / "out")
    report = check(work / "out")
    assert report.status == "fail" and where in report.headline


def test_a_file_that_no_loader_takes_is_a_note(work: Path) -> None:
    (work / "out" / "README.md").write_text("words")
    report = check(work / "out")
    assert report.status == "pass"
    assert any(f.status == "note" and f.where == "README.md" for f in report.findings)


def test_a_sample_finds_a_wrong_source(work: Path, originals: Written) -> None:
    (work / "source").unlink()
    shutil.copytree(originals(VARIANT), work / "source")
    weights = next((work / "source").glob("*.safetensors"), None)
    assert weights is not None
    with safe_open(weights, "numpy") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    tensors["norm.weight"] = tensors["norm.weight"] + 1
    save_file(tensors, weights)
    report = check(work / "out", source=work / "source", spot=10_000)
    assert report.status == "fail" and "model.norm.weight" in report.headline


def test_only_what_passes_has_a_certificate(work: Path) -> None:
    _altered(work / "out")
    (work / "out" / NAME).unlink()
    done = program("certificate", "out", "--source", "source", "--level", "bits", cwd=work)
    assert done.returncode == 1 and "no certificate was written" in done.stdout
    assert not (work / "out" / NAME).exists()


def test_a_step_of_training_is_certified(originals: Written, conversions: Written, tmp_path: Path) -> None:
    """With the mistakes that were planted in it."""
    out = conversions(VARIANT)
    done = certify(out, originals(VARIANT), Request(levels=("training",)))
    assert done.statement is not None, done.report.headline
    rate = done.statement["predicate"]["verification"]["planted_mistakes"]
    assert rate["caught"] == rate["planted"] == 6
    place = tmp_path / NAME
    place.write_bytes(as_bytes(done.statement))
    assert check(out, file=place).status == "pass"

    def uncaught(s: Any) -> None:
        (own,) = (f for f in s["predicate"]["verification"]["findings"] if f["check"] == "self-test")
        own["tables"][0]["rows"][0][1] = "no"

    change(place, uncaught)
    report = check(out, file=place)
    assert report.status == "fail" and '"caught": 5' in report.headline


# --- signatures -----------------------------------------------------------------------------------------


def keys(kind: str, folder: Path, password: bytes | None = None) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    private: Any = {
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
    }[kind]()
    hidden = form.BestAvailableEncryption(password) if password else form.NoEncryption()
    pem = form.Encoding.PEM
    folder.mkdir(exist_ok=True)
    (folder / "key.pem").write_bytes(private.private_bytes(pem, form.PrivateFormat.PKCS8, hidden))
    public = private.public_key().public_bytes(pem, form.PublicFormat.SubjectPublicKeyInfo)
    (folder / "pub.pem").write_bytes(public)
    return folder / "key.pem", folder / "pub.pem"


@pytest.mark.parametrize("kind", ["ed25519", "p256", "p384"])
def test_signed_and_checked_here_and_by_another_library(kind: str, work: Path, certified: bytes) -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    key, public = keys(kind, work / kind)
    place = work / "out" / NAME
    place.write_bytes(sign(certified, key))
    assert check(work / "out", key=public).status == "pass"
    judge = Envelope.from_dict(json.loads(place.read_text()))
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    known = SSlibKey.from_crypto(load_pem_public_key(public.read_bytes()))
    known.keyid = next(iter(judge.signatures))
    assert judge.verify([known], 1)
    assert judge.payload == certified


def test_another_key_and_a_changed_payload_do_not_hold(work: Path, certified: bytes) -> None:
    key, public = keys("ed25519", work / "a")
    _, other = keys("ed25519", work / "b")
    place = work / "out" / NAME
    place.write_bytes(sign(certified, key))
    assert check(work / "out", key=other).status == "fail"
    envelope = json.loads(place.read_text())
    numbers = json.loads(certified)
    numbers["predicate"]["tool"]["version"] = "9"
    envelope["payload"] = base64.b64encode(as_bytes(numbers)).decode()
    place.write_text(json.dumps(envelope))
    assert check(work / "out", key=public).status == "fail"
    assert any("no --key" in f.message for f in check(work / "out").findings)
    place.write_bytes(certified)
    assert check(work / "out", key=public).status == "fail"  # not signed at all


def test_both_alphabets_of_base64_and_no_others(work: Path, certified: bytes) -> None:
    key, public = keys("ed25519", work)
    envelope = json.loads(sign(certified, key))
    place = work / "out" / NAME
    for part, text in (("payload", envelope["payload"]), ("sig", envelope["signatures"][0]["sig"])):
        other = json.loads(json.dumps(envelope))
        (other if part == "payload" else other["signatures"][0])[part] = text.translate(
            str.maketrans("+/", "-_")
        )
        place.write_text(json.dumps(other))
        assert check(work / "out", key=public).status == "pass"
    envelope["signatures"].insert(0, {"sig": "\u00e9"})
    place.write_text(json.dumps(envelope))
    with pytest.raises(CkptToolError, match="expected base64"):
        check(work / "out", key=public)


def test_keys_that_cannot_sign(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rsa, _ = keys("rsa", work / "rsa")
    hidden, public = keys("p256", work / "hidden", b"word")
    for key, word in ((rsa, "another kind"), (hidden, "no password"), (public, "something else")):
        with pytest.raises(CkptToolError, match=word):
            sign(b"", key)
    monkeypatch.setenv(PASSWORD, "word")
    assert json.loads(sign(b"x", hidden))["payload"] == base64.b64encode(b"x").decode()


# --- the command line -----------------------------------------------------------------------------------


def test_the_commands(work: Path) -> None:
    key, public = keys("ed25519", work / "keys")
    (work / "out" / NAME).unlink()
    arguments = ("out", "--source", "source", "--level", "bits", "--sign", str(key))
    done = program("certificate", *arguments, cwd=work)
    assert done.returncode == 0, done.stderr
    assert "signed" in done.stdout and "bit-identical" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    done = program("check-certificate", "out", "--key", str(public), "--json", cwd=work)
    assert done.returncode == 0 and json.loads(done.stdout)["status"] == "pass"
    (work / "out" / "config.json").write_text("{}")
    assert program("check-certificate", "out", "--key", str(public), cwd=work).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("check-certificate", "nowhere"), "not-found"),
        (("check-certificate", "out", "--spot", "3"), "usage"),
        (("check-certificate", "out", "--source", "source"), "usage"),
        (("check-certificate", "out", "--source", "source", "--spot", "0"), "usage"),
        (("check-certificate", "out", "--certificate", "out/config.json"), "bad-config"),
        (("check-certificate", "out", "--key", "out/config.json", "--certificate", "s.json"), "bad-input"),
        (("certificate", "out", "--source", "source", "--write", "out/config.json"), "output-exists"),
        (("certificate", "out", "--source", "source", "--write", "no/where.json"), "output-failed"),
        (("certificate", "out", "--source", "source", "--sign", "out/config.json"), "bad-input"),
        (("certificate", "source", "--source", "source"), "usage"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], kind: str, work: Path, certified: bytes) -> None:
    key, _ = keys("ed25519", work / "keys")
    (work / "s.json").write_bytes(sign(certified, key))
    done = program(*arguments, cwd=work)
    assert (done.returncode, done.stderr.split("]")[0]) == (2, f"error[{kind}"), done.stderr


def test_an_output_with_a_certificate_can_be_replaced(work: Path) -> None:
    done = program("convert", "mistral", "--in", "source", "--out", "out", "--overwrite", cwd=work)
    assert done.returncode == 0, done.stderr
    assert not (work / "out" / NAME).exists()


# --- facts that were given ------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [{"spot": 3, "seed": 1}, {"full": True}])
def test_facts_that_the_source_lacks_are_held_by_the_certificate(
    depth: dict[str, Any], originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """A right certificate failed where nobody gave them again."""
    variant, source = VARIANTS["mistral-nemo"], originals("mistral-nemo")
    out = shutil.copytree(conversions("mistral-nemo"), tmp_path / "out")
    (out / "ckpt-tool.json").unlink()
    request = Request(levels=("coverage", "bits"))
    done = certify(out, source, request, settings=variant.settings)
    assert done.statement is not None, done.report.headline
    (out / NAME).write_bytes(as_bytes(done.statement))
    report = check(out, source=source, **depth)
    assert report.status == "pass"
    assert "facts were given with --set: max_position_embeddings" in report.headline
    assert report.facts["given"] == "max_position_embeddings = 131072"
    asked = done.statement["predicate"]["verification"]["asked"]
    assert asked.pop("settings") == variant.settings  # one that was made before they were held
    (out / NAME).write_bytes(as_bytes(done.statement))
    assert check(out, source=source, **depth).status == "fail"
    assert check(out, source=source, settings=variant.settings, **depth).status == "pass"


def test_facts_against_the_source_must_be_given_again(originals: Written, tmp_path: Path) -> None:
    source, given = originals(VARIANT), {"rope_theta": 5000.0}
    convert(source, tmp_path / "out", family="mistral", options=Options(settings=given))
    done = certify(tmp_path / "out", source, Request(levels=("coverage", "bits")), settings=given)
    assert done.statement is not None, done.report.headline
    (tmp_path / "out" / NAME).write_bytes(as_bytes(done.statement))
    for depth in ({"spot": 3, "seed": 1}, {"full": True}):
        report = check(tmp_path / "out", source=source, **depth)  # type: ignore[arg-type]
        assert report.status == "fail"
        assert report.headline == "rope_theta: the source says otherwise: --set says that it is right"
        assert check(tmp_path / "out", source=source, settings=given, **depth).status == "pass"  # type: ignore[arg-type]
