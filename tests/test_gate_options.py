"""What a gate can be asked for in CI: some of its checks, an end at the first that fails, no more than that
nothing got worse; and the same checks as tests of pytest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from ckpt_tool.api import gate
from ckpt_tool.testing import assert_parity
from ckpt_tool.verify.baseline import MORE, hold_against, read_baseline
from ckpt_tool.verify.gate import Check, _barred
from ckpt_tool.verify.report import Finding, Report, Reports
from tests.in_process import program

Written = Callable[[str], Path]
VARIANT = "mistral-float32"
GATE = """
[[check]]
name = "good one"
source = "download"
out = "good"
levels = ["coverage", "bits"]
require = ["bits"]

[[check]]
name = "bad one"
source = "download"
out = "bad"
levels = ["bits"]

[[check]]
name = "gone"
source = "download"
out = "nowhere"
"""


def alter(folder: Path, by: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][2] += by
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def work(originals: Written, conversions: Written, tmp_path: Path) -> Path:
    (tmp_path / "download").symlink_to(originals(VARIANT))
    for name in ("good", "bad"):
        shutil.copytree(conversions(VARIANT), tmp_path / name)
    alter(tmp_path / "bad", 1.0)
    (tmp_path / "parity.toml").write_text(GATE)
    return tmp_path


def test_only_some_checks(work: Path) -> None:
    def titles(*only: str) -> list[str]:
        return [r.title for r in gate(work / "parity.toml", only=only).reports]

    assert titles("good one") == ["good one"]
    assert titles("* one") == ["good one", "bad one"]
    done = program("gate", "parity.toml", "--only", "good on", cwd=work)
    assert done.returncode == 2 and "did you mean good one?" in done.stderr


def test_the_list(work: Path) -> None:
    done = program("gate", "parity.toml", "--list", cwd=work)
    assert done.returncode == 0
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:]] == ["good one", "bad one", "gone"]


def test_the_first_that_fails_ends_it(work: Path) -> None:
    reports = gate(work / "parity.toml", fail_fast=True)
    assert [(r.title, r.status) for r in reports.reports] == [("good one", "pass"), ("bad one", "fail")]
    assert reports.exit_code == 1


def test_only_what_got_worse_fails_against_a_baseline(work: Path) -> None:
    def run(*more: str) -> int:
        return program("gate", "parity.toml", "--only", "* one", *more, cwd=work).returncode

    assert run("--json", "before.json") == 1
    assert run("--baseline", "before.json") == 0
    alter(work / "bad", 1.0)  # farther off
    assert run("--baseline", "before.json") == 1
    alter(work / "bad", -1.9)  # nearer
    assert run("--baseline", "before.json") == 0
    alter(work / "good", 1e-3)
    assert run("--baseline", "before.json") == 1


@pytest.mark.parametrize(
    ("then", "now", "stands"),
    [
        ({"measured": 0.5}, {"measured": 0.4}, True),
        ({"measured": 0.5}, {"measured": 0.6}, False),
        ({"measured": 0.9, "data": {"more_is_better": True}}, {"measured": 0.5}, False),
        ({"measured": 0.5, "data": {"more_is_better": True}}, {"measured": 0.9}, True),
        ({"message": "2 more of this kind"}, {"message": "90 more of this kind"}, False),
        ({"message": "2 more of this kind"}, {}, True),
        ({"measured": 0.5, "data": {"differing": ["layer 1"]}}, {"measured": 0.5}, True),
        (
            {"measured": 0.5, "data": {"differing": ["layer 1"]}},
            {"data": {"differing": ["layer 1", "layer 2"]}},
            False,
        ),
        ({"measured": float("inf")}, {}, True),
        ({"measured": float("inf")}, {"measured": 3.0}, True),
        ({"status": "undecided"}, {"status": "fail"}, False),
    ],
)
def test_what_is_no_worse_than_the_baseline(
    then: dict[str, Any], now: dict[str, Any], stands: bool, tmp_path: Path
) -> None:
    first = Finding(**{"level": "bits", "check": "x", "status": "fail", "message": "m", **then})
    before = Reports("gate", [Report("one", findings=[first])])
    (tmp_path / "before.json").write_text(json.dumps(before.to_json()))
    report = Report("one", findings=[replace(first, **now)])
    hold_against(report, read_baseline(tmp_path / "before.json"))
    assert (report.findings[0].status == "note") is stands


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        (Finding("parity", "lockstep", "pass", "p"), "pass"),
        (Finding("parity", "lockstep", "skipped", "no torch"), "undecided"),
        (None, "undecided"),
    ],
)
def test_what_passed_in_the_baseline_and_did_not_run_is_not_known_to_be_no_worse(
    now: Finding | None, verdict: str, tmp_path: Path
) -> None:
    """Beside a failure that stands as it was, by which alone the headline would speak."""
    bad = Finding("coverage", "x", "fail", "m")
    before = Reports("gate", [Report("one", findings=[bad, Finding("parity", "lockstep", "pass", "p")])])
    (tmp_path / "before.json").write_text(json.dumps(before.to_json()))
    report = Report("one", findings=[bad, *([now] if now is not None else [])])
    hold_against(report, read_baseline(tmp_path / "before.json"))
    assert report.status == verdict
    words = "could not be judged: parity: lockstep passed in the baseline, and was not shown now"
    assert verdict == "pass" or report.headline == words


@pytest.mark.parametrize("bar", ["top1", "catch_rate"])
def test_of_some_numbers_more_is_better(bar: str) -> None:
    data = {"rate": 0.5, "top1": 0.5}
    report = Report("x", findings=[Finding("parity", "x", "pass", "m", data=data)])
    (found,) = _barred(Check("x", "out", bars={bar: 0.9}), report)
    assert found.status == "fail" and found.data[MORE]


def test_a_class_that_got_worse_fails_though_it_would_pass(work: Path) -> None:
    gate_file = work / "parity.toml"
    before = json.dumps(gate(gate_file, only=["good one"]).to_json())
    (work / "before.json").write_text(before.replace('"within noise floor"', '"bit-identical"'))
    text = GATE.replace('levels = ["coverage", "bits"]\nrequire = ["bits"]', 'levels = ["parity"]')
    gate_file.write_text(text)
    reports = gate(gate_file, only=["good one"], baseline=work / "before.json")
    assert reports.status == "fail"
    assert "bit-identical in the baseline, within noise floor now" in str(reports.reports[0].findings)
    assert gate(gate_file, only=["good one"]).status == "pass"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"reports": 3}', '{"reports": [3]}'])
def test_what_is_no_baseline(text: str, work: Path) -> None:
    (work / "before.json").write_text(text)
    done = program("gate", "parity.toml", "--baseline", "before.json", cwd=work)
    assert (done.returncode, done.stderr.split("]")[0]) == (2, "error[bad-config")


# --- pytest ---------------------------------------------------------------------------------------------

OWN = """
import pytest

def test_mine(assert_parity, ckpt_convert):
    out = ckpt_convert("download", "mistral")
    assert out == ckpt_convert("download", "mistral")
    report = assert_parity(out, "download", levels=["coverage", "bits"])
    assert report.exactness == "bit-identical"

def test_bad(assert_parity):
    with pytest.raises(AssertionError, match="model.norm.weight"):
        assert_parity("bad", "download", levels=["bits"])
"""


# As tests/conftest.py has it: a disk that others write to lets a conversion wait for seconds.
NO_SYNC = "import os\n\nos.fsync = os.fdatasync = lambda file: None\n"


def scratch(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (work / "conftest.py").write_text(NO_SYNC)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v"]  # which finds the plugin
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    return subprocess.run(
        [*command, *arguments], cwd=work, env=environment, capture_output=True, text=True, check=False
    )


def test_the_plugin_in_a_scratch_project(work: Path) -> None:
    (work / "test_own.py").write_text(OWN)
    alone = scratch(work, "--ckpt-gate", "parity.toml", "--junit-xml", "x.xml")
    outcomes = {
        line.partition("::")[2].rpartition("]")[0].partition("]")[0] + "]": line
        for line in alone.stdout.splitlines()
        if "::" in line and "%]" in line
    }
    passed = {name for name, line in outcomes.items() if " PASSED" in line}
    failed = {name for name, line in outcomes.items() if " FAILED" in line}
    assert passed == {"good one[coverage]", "good one[bits]", "good one[gate]", "good one[verdict]"}
    assert {"bad one[bits]", "bad one[verdict]", "gone[verdict]"} <= failed
    assert "model.norm.weight" in alone.stdout and "Traceback" not in alone.stdout
    assert alone.returncode == 1 and "good one[bits]" in (work / "x.xml").read_text()
    with_own = scratch(work, "test_own.py", "--ckpt-gate", "parity.toml", "-k", "mine or bad or good")
    assert "test_mine PASSED" in with_own.stdout, with_own.stdout[-3000:]
    assert "test_bad PASSED" in with_own.stdout


def test_a_gate_that_is_none_is_told_by_pytest(work: Path) -> None:
    (work / "parity.toml").write_text("nothing = 1")
    done = scratch(work, "--ckpt-gate", "parity.toml")
    assert done.returncode != 0 and "expected one or more [[check]] tables" in done.stdout
    assert scratch(work, "--ckpt-gate", "no.toml").returncode == 4


def test_assert_parity_returns_what_it_found(work: Path) -> None:
    assert assert_parity(work / "good", work / "download", levels="bits").status == "pass"
    with pytest.raises(AssertionError, match=r"fail: .*model\.norm\.weight"):
        assert_parity(work / "bad", work / "download", levels="bits")


# --- in a workflow --------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


def gate_step() -> str:
    """The script of the action's own step."""
    import yaml

    action = yaml.safe_load((ROOT / "action.yml").read_text())
    (step,) = [s for s in action["runs"]["steps"] if s.get("name") == "Gate"]
    return str(step["run"])


def test_the_action_writes_summary_annotations_and_reports_and_keeps_the_exit_code(work: Path) -> None:
    environment = {
        **os.environ,
        "FILE": "parity.toml",
        "REPORTS": "reports",
        "ARGUMENTS": "--only *one",
        "GITHUB_STEP_SUMMARY": str(work / "summary.md"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-f", "-c", gate_step()]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("::")]
    assert lines[0].startswith("::error title=bad one::fail: ")
    assert any("model.norm.weight" in line for line in lines)
    assert not any("good one" in line for line in lines)
    assert "## bad one: fail" in (work / "summary.md").read_text()
    assert {p.name for p in (work / "reports").iterdir()} == {
        f"parity.{s}" for s in ("xml", "json", "html", "md")
    }


def test_annotations_cannot_be_broken_out_of() -> None:
    from ckpt_tool.annotations import command

    line = command("error", "a:b,c", "50 %\n::stop-commands::x")
    assert line == "::error title=a%3Ab%2Cc::50 %25%0A::stop-commands::x"
