"""The gate: conversions and verifications from a file, bars of its own, one verdict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool.api import gate
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.flaws import plant
from ckpt_tool.verify.gate import read_gate
from ckpt_tool.verify.report import Reports

Written = Callable[[str], Path]
VARIANT = "mistral-float32"


def write(folder: Path, text: str) -> Path:
    path = folder / "parity.toml"
    path.write_text(text, encoding="utf-8")
    return path


def states(reports: Reports, index: int = 0) -> dict[str, str]:
    return {f.check: f.status for f in reports.reports[index].findings if f.level == "gate"}


def test_a_gate_converts_verifies_and_holds_its_bars(originals: Written, tmp_path: Path) -> None:
    shutil.copytree(originals(VARIANT), tmp_path / "download")
    path = write(
        tmp_path,
        """
        title = "nightly"

        [bars]
        catch_rate = 1.0

        [[check]]
        name = "tiny"
        convert = "auto"
        source = "download"
        out = "converted"
        require = ["bits", "parity"]

        [check.bars]
        nmse = 1e-10
        top1 = 1.0
        exactness = "bit-identical"
        """,
    )
    reports = gate(path)
    assert (reports.title, reports.status, reports.exit_code) == ("nightly", "pass", 0)
    assert (tmp_path / "converted" / "config.json").exists()
    assert reports.reports[0].title == "tiny"
    assert states(reports) == dict.fromkeys(("require", "catch_rate", "nmse", "top1", "exactness"), "pass")


def test_a_gate_converts_with_the_options_of_the_family(originals: Written, tmp_path: Path) -> None:
    check = f"convert = 'auto'\nsource = '{originals('bert-ngc-cased')}'\nlevels = ['coverage']\n"
    asked = {"kept": "keep_padding = true", "shared": "shards = 2", "unknown": "nonesuch = 2"}
    text = "".join(
        f"[[check]]\nname = '{name}'\nout = '{name}'\n{check}options = {{ {option} }}\n"
        for name, option in asked.items()
    )
    kept, *others = gate(write(tmp_path, text)).reports
    manifest = json.loads((tmp_path / "kept" / "ckpt-tool.json").read_text())
    assert manifest["options"]["family_options"] == {"keep_padding": True} and not kept.could_not_run
    for report, flag in zip(others, ("--shards", "--nonesuch"), strict=True):
        (finding,) = report.findings
        assert report.could_not_run and finding.data["kind"] == "usage" and finding.where == flag


@pytest.mark.usefixtures("few_prompts")
def test_a_wrong_conversion_fails_the_gate_and_the_others_are_still_told(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    bad = shutil.copytree(conversions(VARIANT), tmp_path / "bad")
    plant(bad, "rope-theta")
    path = write(
        tmp_path,
        f"""
        [[check]]
        name = "bad"
        out = "bad"
        source = '{originals(VARIANT)}'

        [[check]]
        name = "absent"
        out = "nowhere"

        [[check]]
        name = "good"
        out = '{conversions(VARIANT)}'
        levels = ["coverage", "bits"]
        """,
    )
    reports = gate(path)
    assert [(r.title, r.exit_code) for r in reports.reports] == [("bad", 1), ("absent", 2), ("good", 0)]
    assert reports.exit_code == 1
    assert "absent" in reports.junit()
    (problem,) = reports.reports[1].findings
    assert (problem.check, problem.status) == ("run", "undecided")


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(
    ("extra", "check", "status"),
    [
        ("levels = ['parity']\n[check.bars]\nnmse = 1e-30", "nmse", "fail"),
        ("levels = ['bits']\n[check.bars]\nexactness = 'identical after cast'\n", None, "pass"),
        ("levels = ['bits', 'documented']\nrequire = ['documented']", "require", "undecided"),
        ("levels = ['bits']\nrequire = ['transformers']", "require", "undecided"),
    ],
)
def test_a_bar_of_the_gate_decides(
    extra: str, check: str | None, status: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    path = write(
        tmp_path,
        f"[[check]]\nname = 'x'\nout = '{conversions(VARIANT)}'\nsource = '{originals(VARIANT)}'\n{extra}\n",
    )
    reports = gate(path)
    found = states(reports)
    if check is None:
        assert set(found.values()) == {"pass"}
        assert reports.exit_code == 0
    else:
        assert found[check] == status
        assert reports.exit_code == {"fail": 1, "undecided": 2}[status]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("settings = { a = [1979-05-27] }", "a: settings: .*such as a date"),
        (r'source = "fx\u0000"', "a: source: expected text without NUL"),
        (f"bars = {{ nmse = {'9' * 400} }}", "a: bars.nmse: .*that a float holds"),
        (f"settings = {{ a = {'9' * 5000} }}", "expected TOML, found none"),
    ],
)
def test_what_toml_has_and_no_check_can_take_is_refused(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CkptToolError, match=message) as caught:
        read_gate(write(tmp_path, f"[[check]]\nname = 'a'\nout = 'out'\n{line}\n"))
    assert {p.kind for p in caught.value.problems} == {"bad-config"}


def test_a_bar_on_what_was_not_measured_is_undecided(conversions: Written, tmp_path: Path) -> None:
    out = conversions(VARIANT)
    path = write(
        tmp_path, f"[[check]]\nname = 'x'\nout = '{out}'\nlevels = ['bits']\n[check.bars]\nkl = 1.0\n"
    )
    reports = gate(path)
    assert states(reports) == {"kl": "undecided"}
    assert reports.exit_code == 2


def test_without_a_source_a_check_passes_only_where_it_says_so(conversions: Written, tmp_path: Path) -> None:
    out = shutil.copytree(conversions(VARIANT), tmp_path / "far" / "from" / "it")
    for extra, code in (("", 2), ("no_source = true\n", 0)):
        path = write(tmp_path, f"[[check]]\nname = 'x'\nout = '{out}'\n{extra}")
        assert gate(path).exit_code == code


def test_a_level_named_in_a_check_must_run(conversions: Written, originals: Written, tmp_path: Path) -> None:
    sides = f"out = '{conversions(VARIANT)}'\nsource = '{originals(VARIANT)}'"
    path = write(tmp_path, f"[[check]]\nname = 'x'\n{sides}\nlevels = ['bits', 'documented']\n")
    (one,) = gate(path).reports
    assert one.exit_code == 2
    assert one.headline.startswith("level documented was asked for and did not run: no published name")


def problems(folder: Path, text: str) -> set[str | None]:
    with pytest.raises(CkptToolError) as caught:
        read_gate(write(folder, text))
    assert {p.kind for p in caught.value.problems} == {"bad-config"}
    return {p.where for p in caught.value.problems}


def test_all_problems_of_a_file_are_told_together(tmp_path: Path) -> None:
    text = """
    titel = "x"
    [[check]]
    name = "a"
    levels = ["bit"]
    convert = "mistral"
    devise = "cuda"
    compute_dtype = "float8"
    [check.bars]
    nmse = -1
    speed = 2
    exactness = "nearly"
    [[check]]
    out = 3
    """
    assert problems(tmp_path, text) == {
        "titel",
        "a: out",
        "a: source",
        "a: levels",
        "a: devise",
        "a: compute_dtype",
        "a: bars.nmse",
        "a: bars.speed",
        "a: bars.exactness",
        "check 1: name",
        "check 1: out",
    }


@pytest.mark.parametrize(
    "text",
    ["", "check = 3", "[[check]", "bars = 1\n[[check]]\nname='a'\nout='b'", "\ufeffx", "[check]\nname = 'a'"],
)
def test_what_is_no_gate_file_is_refused(text: str, tmp_path: Path) -> None:
    assert problems(tmp_path, text)


def test_equal_names_are_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, "[[check]]\nname='a'\nout='b'\n[[check]]\nname='a'\nout='c'\n") == {"a"}


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    other = "transformers_python='old/bin/python'"
    path = write(tmp_path, f"[[check]]\nname='a'\nout='b/c'\nsource='/abs'\nprompts='p.json'\n{other}\n")
    _, (check,) = read_gate(path)
    made: dict[str, Any] = {"out": check.out, "source": check.source, "prompts": check.prompts}
    assert check.transformers_python == str(tmp_path / "old" / "bin" / "python")
    assert made == {
        "out": str(tmp_path / "b" / "c"),
        "source": "/abs",
        "prompts": str(tmp_path / "p.json"),
    }


def test_what_could_not_run_is_undecided_on_the_screen_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ckpt_tool import program

    path = write(tmp_path, "[[check]]\nname = 'absent'\nout = 'nowhere'\n")
    assert program.run(["gate", str(path)]) == 2
    assert "\n  undecided run " in capsys.readouterr().out
