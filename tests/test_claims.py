"""What a verdict may claim: nothing that was not shown, and the cause first where it fails."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ckpt_tool import api
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.flaws import plant
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify
from ckpt_tool.verify.claims import Claim, judge
from ckpt_tool.verify.report import Finding, Report
from tests.in_process import program

Written = Callable[[str], Path]
PLAIN, RANKS = "mistral-7b-v0.3", "llama-3-70b"
CHEAP = ("coverage", "bits")
NOT_COMPARED = "not compared with a source"


def statuses(report: Report, check: str) -> list[str]:
    return [f.status for f in report.findings if f.check == check]


@pytest.fixture
def pair(originals: Written, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """`pair(variant)`: a copy of an original, and its conversion beside it."""

    def made(variant: str) -> tuple[Path, Path]:
        source = Path(shutil.copytree(originals(variant), tmp_path / "original"))
        chosen = VARIANTS[variant]
        api.convert(source, tmp_path / "out", family=chosen.family, options=Options(settings=chosen.settings))
        return source, tmp_path / "out"

    return made


Pair = Callable[[str], tuple[Path, Path]]


def in_manifest(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = out / "ckpt-tool.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- nothing that was not shown ---------------------------------------------------------------------------


def test_random_weights_of_which_nothing_could_be_compared_do_not_pass(pair: Pair) -> None:
    """Without params.json the head counts are unknown, so there is no plan, and nothing to compare with."""
    source, out = pair("mistral-float32")
    (source / "params.json").unlink()
    (out / "ckpt-tool.json").unlink()
    weights = load_file(out / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, x in weights.items():
        weights[name] = rng.permutation(x.reshape(-1)).reshape(x.shape)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    found = program("verify", str(out), "--source", str(source), cwd=out.parent)
    assert found.returncode == 2, found.stdout
    assert "pass" not in found.stdout.splitlines()[0]
    assert "nothing was compared with the source, neither bits nor numbers" in " ".join(found.stdout.split())


def test_coverage_alone_proves_nothing_of_a_source(pair: Pair) -> None:
    source, out = pair(PLAIN)
    report = verify(out, source, levels="coverage")
    assert (report.status, report.exit_code) == ("undecided", 2)
    assert report.headline.startswith("nothing was compared with the source")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"levels": ("bits", "documented")}, "level documented was asked for and did not run"),
        ({"checkpoint_id": "nobody/knows"}, "--checkpoint-id nobody/knows was asked for and did not run"),
    ],
)
def test_what_was_asked_for_by_name_and_did_not_run_is_said(
    asked: dict[str, Any], words: str, pair: Pair
) -> None:
    source, out = pair(PLAIN)
    report = verify(out, source, **{"levels": CHEAP, **asked})
    assert report.exit_code == 2
    assert report.headline.startswith(words)
    assert statuses(report, "round trip") == ["pass"]


def test_an_output_is_not_compared_with_itself(pair: Pair, tmp_path: Path) -> None:
    _, out = pair("qwen2-window")  # its original is in the Hugging Face layout too
    (tmp_path / "link").symlink_to(out)
    for source in (out, tmp_path / "link"):
        with pytest.raises(CkptToolError) as caught:
            verify(out, source)
        assert caught.value.kind == "usage"


def test_a_level_that_is_only_part_of_all_may_be_skipped(pair: Pair) -> None:
    source, out = pair(PLAIN)
    report = verify(out, source)
    assert statuses(report, "documented values") == ["skipped"]
    assert report.exit_code == 0
    assert re.fullmatch(
        r"the bits and the numbers are those of its source; KL at most [1-9](\.\d)?e-1\d nats a token on "
        r"prompts like those tried \(95 %, margin 1e-09\)",
        report.headline,
    )


def test_an_open_question_is_part_of_the_headline() -> None:
    proof = Finding("bits", "round trip", "pass", "equal")
    left = Finding("coverage", "tokenizer", "skipped", "the output has none", data={"open": True})
    assert judge([proof, left], Claim()).headline == (
        "the bits are those of its source; tokenizer not compared: the output has none"
    )


def test_what_could_not_be_judged_never_passes() -> None:
    proof = Finding("bits", "round trip", "pass", "equal")
    unsure = Finding("parity", "lockstep", "undecided", "bfloat16 cannot see it")
    said = judge([proof, unsure], Claim())
    assert (said.verdict, said.headline) == ("undecided", "could not be judged: bfloat16 cannot see it")


@pytest.mark.usefixtures("few_prompts")
def test_the_cause_comes_first(pair: Pair) -> None:
    source, out = pair(PLAIN)
    plant(out, "q-not-permuted")
    report = verify(out, source)
    assert report.exit_code == 1
    assert report.headline.startswith("layer 1: self_attn.q_proj rows not permuted for rotary")
    said = program("verify", str(out), "--source", str(source), cwd=out.parent).stdout
    first = said.splitlines()[0]
    assert first.startswith("ckpt-tool verify: fail: layer 1: self_attn.q_proj rows not")


# --- without a source -------------------------------------------------------------------------------------


def test_the_source_is_found_where_the_manifest_left_it(pair: Pair) -> None:
    source, out = pair(PLAIN)
    report = verify(out, levels=CHEAP)
    assert (report.exit_code, report.exactness) == (0, "bit-identical")
    assert str(source) in report.facts["source"]


@pytest.mark.parametrize("how", ["moved", "changed", "another", "hub", "nowhere"])
def test_a_source_that_is_not_there_as_it_was_is_not_used(how: str, pair: Pair, originals: Written) -> None:
    source, out = pair(PLAIN)
    if how == "moved":
        source.rename(source.with_name("elsewhere"))
    elif how == "changed":
        (source / "consolidated.safetensors").unlink()
    elif how == "another":
        shutil.rmtree(source)
        shutil.copytree(originals("mistral-nemo"), source)
    else:
        address = {"hub": "hf://org/name", "nowhere": "\0/../../"}[how]
        in_manifest(out, lambda m: m.update(source=address))
    report = verify(out, levels=CHEAP)
    assert report.exit_code == 2
    assert f"consistent with its manifest; {NOT_COMPARED}" in report.headline
    assert verify(out, levels=CHEAP, no_source=True).exit_code == 0


def test_without_manifest_and_source_there_is_nothing_to_compare_with(pair: Pair) -> None:
    _, out = pair(PLAIN)
    (out / "ckpt-tool.json").unlink()
    for no_source in (False, True):
        report = verify(out, levels="coverage", no_source=no_source)
        assert report.exit_code == 2
        assert report.headline.startswith(f"there is no manifest either; {NOT_COMPARED}")


def test_what_only_the_manifest_tells_is_in_the_headline(pair: Pair) -> None:
    """The source does not say its rotary base: a rule does, and manifest and config say another one."""
    source, out = pair("mistral-7b-v0.1")
    config = json.loads((out / "config.json").read_text()) | {"rope_theta": 5e5}
    (out / "config.json").write_text(json.dumps(config))
    in_manifest(out, lambda m: m["config"]["rope_theta"].update(value=5e5, source="--set"))
    sha256 = hashlib.sha256((out / "config.json").read_bytes()).hexdigest()
    in_manifest(
        out, lambda m: [d.update(sha256=sha256) for d in m["documents"] if d["file"] == "config.json"]
    )
    report = verify(out, source, levels=CHEAP)
    assert report.headline == "the bits are those of its source; only the manifest tells rope_theta"


def test_a_cast_is_part_of_the_headline(pair: Pair, tmp_path: Path) -> None:
    source, _ = pair("mistral-float32")
    api.convert(source, tmp_path / "cast", options=Options(dtype="BF16"))
    report = verify(tmp_path / "cast", source, levels=CHEAP)
    assert report.headline == (
        "the bits are those of its source once it is cast or pooled as recorded or accepted"
    )


@pytest.mark.parametrize("value", [False, None, 0])
def test_a_mask_that_is_not_causal_fails(value: object, pair: Pair) -> None:
    source, out = pair(PLAIN)
    (out / "ckpt-tool.json").unlink()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"is_causal": True}))
    assert verify(out, source, levels=CHEAP).exit_code == 0
    (out / "config.json").write_text(json.dumps(config | {"is_causal": value}))
    report = verify(out, source, levels=CHEAP)
    assert [f.where for f in report.findings if f.status == "fail"] == ["config.json: is_causal"]


def test_sampling_values_in_config_json_count_where_nothing_else_says_them(pair: Pair) -> None:
    source, out = pair(PLAIN)
    (out / "ckpt-tool.json").unlink()
    (out / "generation_config.json").unlink()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"repetition_penalty": 1.5}))
    report = verify(out, source, levels=CHEAP)
    assert [f.where for f in report.findings if f.status == "fail"] == ["config.json: repetition_penalty"]


@pytest.mark.parametrize("more", [{"max_len": 5}, {"model_input_names": ["input_ids"]}])
def test_other_names_in_a_tokenizers_config_count(more: dict[str, Any], pair: Pair) -> None:
    source, out = pair(PLAIN)
    (out / "ckpt-tool.json").unlink()
    path = out / "tokenizer_config.json"
    found = json.loads(path.read_text())
    found.pop("model_max_length", None)
    path.write_text(json.dumps(found | more))
    assert verify(out, source, levels=CHEAP).exit_code == 1


@pytest.mark.parametrize("names", [5, 0, "input_ids"])
def test_what_a_tokenizer_gives_is_a_list_of_names(names: object, pair: Pair) -> None:
    source, out = pair(PLAIN)
    (out / "ckpt-tool.json").unlink()
    path = out / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
    failed = [f for f in verify(out, source, levels=CHEAP).findings if f.status == "fail"]
    assert [f.where for f in failed] == ["tokenizer_config.json: model_input_names"]
    assert failed[0].message == f"expected a list of names, found {json.dumps(names)}"


def test_no_command_shows_the_help_as_it_is_laid_out(tmp_path: Path) -> None:
    found = program(cwd=tmp_path)
    assert found.returncode == 2
    assert found.stderr.startswith("Usage:") and "\n" in found.stderr.strip()


def test_slips_of_the_caller_are_usage_errors(pair: Pair) -> None:
    source, out = pair(PLAIN)
    for slip in ({"device": "bogus"}, {"device": ""}, {"settings": {"foo": 1}}):
        with pytest.raises(CkptToolError) as caught:
            verify(out, source, **slip)  # type: ignore[arg-type]
        assert caught.value.kind == "usage"


def test_odd_neighbours_and_values_end_in_one_sentence(pair: Pair) -> None:
    source, out = pair(PLAIN)
    (out / "loop").symlink_to("loop")
    assert verify(out, source, levels=CHEAP).exit_code == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"architectures": 5}))
    with pytest.raises(CkptToolError) as caught:
        verify(out, source, levels=CHEAP)
    assert caught.value.kind == "bad-config"


# --- the manifest confirms, and decides nothing -----------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda m: m.update(family="llama"), "family"),
        (lambda m: m["config"]["rope_theta"].update(value=10000.0), "config.rope_theta"),
        (lambda m: m.update(lossy=["everything"]), "lossy"),
        (lambda m: m["dropped"].append({"file": "a", "tensor": "norm.weight", "reason": "x"}), "dropped"),
    ],
)
def test_a_manifest_that_lies_fails_and_misleads_nobody(
    change: Callable[[dict[str, Any]], None], where: str, pair: Pair
) -> None:
    source, out = pair(PLAIN)
    in_manifest(out, change)
    report = verify(out, source, levels=CHEAP)
    assert report.exit_code == 1
    assert [f.where for f in report.findings if f.status == "fail"] == [f"ckpt-tool.json: {where}"]
    assert statuses(report, "round trip") == ["pass"]


def test_a_recorded_setting_that_the_source_contradicts_fails(pair: Pair) -> None:
    """Config and manifest were changed together: the value claims to have been given with --set."""
    source, out = pair(PLAIN)
    told = json.loads((source / "params.json").read_text())["norm_eps"]
    config = json.loads((out / "config.json").read_text()) | {"rms_norm_eps": told * 10}
    (out / "config.json").write_text(json.dumps(config))
    in_manifest(out, lambda m: m["config"]["rms_norm_eps"].update(value=told * 10, source="--set"))
    report = verify(out, source, levels=CHEAP)
    wrong = [f.where for f in report.findings if f.status == "fail" and f.level == "coverage"]
    assert report.exit_code == 1
    assert {"ckpt-tool.json: options", "config.json: rms_norm_eps"} <= set(wrong)
    said = next(f.message for f in report.findings if f.where == "ckpt-tool.json: options")
    assert f"expected {told} (params.json: norm_eps), found rms_norm_eps = {told * 10}" in said


def test_a_setting_given_now_is_not_questioned(pair: Pair, tmp_path: Path) -> None:
    source, _ = pair(PLAIN)
    given = {"rms_norm_eps": 0.125}
    api.convert(source, tmp_path / "asked", options=Options(settings=given))
    assert verify(tmp_path / "asked", source, levels=CHEAP).exit_code == 1
    assert verify(tmp_path / "asked", source, levels=CHEAP, settings=given).exit_code == 0


def test_recorded_settings_that_the_source_does_not_tell_are_listed(pair: Pair) -> None:
    source, out = pair("llama-3.2-1b")
    report = verify(out, source, levels=CHEAP)
    assert report.exit_code == 0
    (note,) = (f for f in report.findings if f.where == "ckpt-tool.json: options")
    assert note.status == "note"
    for name in VARIANTS["llama-3.2-1b"].settings:
        assert name in note.message


OWN = ("original", "options", "family", "direction")  # of a manifest, what a dialect reads


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value; of a list its first entry."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in list(value)[:12]:
            yield from paths(value[key], (*at, key))
    elif isinstance(value, list) and value:
        yield from paths(value[0], (*at, 0))


def with_value(content: Any, at: tuple[Any, ...], value: Any) -> Any:
    made = copy.deepcopy(content)
    inner = made
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return made


@pytest.mark.parametrize("variant", [PLAIN, "bert-v2-tp2", "opt-350m"])
def test_no_value_of_a_manifest_ends_in_a_traceback(variant: str, pair: Pair) -> None:
    """Everything is either read, or `bad-config`, or told as a finding; on the way back too. Of a second
    family what its own dialect reads: the rest is read for all by the same lines."""
    source, out = pair(variant)
    path = out / "ckpt-tool.json"
    right = json.loads(path.read_text())
    refused, tried = 0, 0
    for at in paths(right if variant == PLAIN else {k: right[k] for k in OWN}):
        for value in (None, True, -1, "x", [], [1], {}):
            path.unlink()  # a file that is cut and written again is forced to the disk by some systems
            path.write_text(json.dumps(with_value(right, at, value)))
            for attempt in (
                lambda: verify(out, levels="coverage", no_source=True),
                lambda: api.plan(out, family=VARIANTS[variant].family, to="original"),
            ):
                tried += 1
                try:
                    attempt()
                except CkptToolError as error:
                    refused += error.kind == "bad-config"
    assert refused > tried / 5


def test_a_given_fact_that_the_source_contradicts_is_no_parity(
    conversions: Written, originals: Written
) -> None:
    """Nothing that is computed depends on it here, and nothing is claimed under it all the same."""
    report = verify(
        conversions("opt-13b"),
        originals("opt-13b"),
        levels=("parity",),
        settings={"max_position_embeddings": 7},
    )
    assert report.exit_code == 2
    assert "contradicts a fact that was given" in report.headline
    assert "max_position_embeddings 7 (--set)" in report.headline
