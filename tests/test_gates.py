"""Gates in several processes, what they write for CI, pictures, notebooks, and one level as one test."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ckpt_tool import gate_processes
from ckpt_tool.api import gate, open_checkpoint, verify
from ckpt_tool.checkpoint.base import DTYPES, TensorInfo
from ckpt_tool.checkpoint.tensor import _widened
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.flaws import plant
from ckpt_tool.pytest_plugin import narrowed, pytest_xdist_make_scheduler
from ckpt_tool.verify import needs
from ckpt_tool.verify.claims import Claim
from ckpt_tool.verify.equivalence import histogram
from ckpt_tool.verify.gate import Check, read_gate
from ckpt_tool.verify.handing_over import check_line, check_of, report_line, report_of
from ckpt_tool.verify.pictures import drawings, picture
from ckpt_tool.verify.positions import drawn, positions, spelled
from ckpt_tool.verify.report import Finding, Report, Reports, Table
from ckpt_tool.verify.strips import strip
from tests import notebook
from tests.in_process import program

Written = Callable[[str], Path]
VARIANT = "mistral-float32"


@pytest.fixture
def place(originals: Written, conversions: Written, tmp_path: Path) -> Path:
    (tmp_path / "download").symlink_to(originals(VARIANT))
    (tmp_path / "good").symlink_to(conversions(VARIANT))
    return tmp_path


def checks(place: Path, *names: str, **more: str) -> Path:
    """A gate file of checks of these names."""
    text = ""
    for name in names:
        lines = {"name": f"'{name}'", "source": "'download'", "out": "'good'", "levels": "['bits']", **more}
        text += "[[check]]\n" + "".join(f"{k} = {v}\n" for k, v in lines.items())
    file = place / "parity.toml"
    file.write_text(text)
    return file


# --- several processes ----------------------------------------------------------------------------------


def test_checks_at_once_have_the_order_of_the_file_and_wait_for_what_they_read(place: Path) -> None:
    text = """
    [[check]]
    name = "made"
    convert = "auto"
    source = "download"
    out = "made"
    levels = ["bits"]
    [[check]]
    name = "of what was made"
    source = "download"
    out = "made"
    levels = ["coverage"]
    [[check]]
    name = "gone"
    out = "nowhere"
    levels = ["bits"]
    """
    file = place / "parity.toml"
    file.write_text(text)
    told: list[str] = []
    reports = gate(file, jobs=3, memory=10**9, progress=told.append)
    assert [(r.title, r.status) for r in reports.reports] == [
        ("made", "pass"), ("of what was made", "undecided"), ("gone", "undecided"),
    ]  # fmt: skip
    assert "nothing was compared with the source" in reports.reports[1].headline
    assert "memory" in reports.reports[0].facts and reports.reports[0].seconds["bits"] > 0
    assert told.index("gate: of what was made: needs about 100 MB of memory") > told.index(
        "made: bits: comparing with the source"
    )


# A check's process that says when it began and ended, and that nothing could be shown. It waits for as many
# as are to run at once, and then gives one more the time to begin.
STAND_IN = """
import json, sys, time
name = json.loads(sys.stdin.readline())["name"]
log = open({log!r}, "a", buffering=1)
log.write("+" + name + "\\n")
latest = time.monotonic() + 60
while open({log!r}).read().count("+") < {at_once} and time.monotonic() < latest:
    time.sleep(0.01)
time.sleep(0.15)
log.write("-" + name + "\\n")
claim = {{"against": "source", "asked": [], "no_source": False}}
print("report", json.dumps({{"title": name, "claim": claim, "findings": [], "could_not_run": True}}))
"""


@pytest.fixture
def at_once() -> int:
    return 1


@pytest.fixture
def stand_in(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the processes log, with those of the gate replaced."""
    log = tmp_path / "log"
    code = STAND_IN.format(log=str(log), at_once=at_once)
    monkeypatch.setattr(gate_processes, "_command", lambda: [sys.executable, "-S", "-c", code])
    return lambda: log.read_text().split()


def most(log: list[str]) -> int:
    """How many ran at once."""
    running, seen = 0, 0
    for line in log:
        running += 1 if line[0] == "+" else -1
        seen = max(seen, running)
    return seen


@pytest.mark.parametrize(
    ("jobs", "memory", "at_once"), [(3, 1000, 3), (2, 1000, 2), (3, 600, 2), (3, 350, 1), (1, 1000, 1)]
)
def test_no_more_run_at_once_than_jobs_and_memory_allow(
    jobs: int,
    memory: int,
    at_once: int,
    place: Path,
    stand_in: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(needs, "of_check", lambda check: 300)
    reports = gate(checks(place, "a", "b", "c"), jobs=jobs, memory=memory)
    assert [r.title for r in reports.reports] == ["a", "b", "c"]
    assert most(stand_in()) == at_once


def test_what_does_not_fit_is_refused_or_without_a_limit_runs_alone(
    place: Path, stand_in: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "of_check", lambda check: 9 * 10**9 if check.name == "b" else 300)
    file = checks(place, "a", "b", "c")
    reports = gate(file, jobs=3, memory=10**9)
    (found,) = reports.reports[1].findings
    assert "expected a check that fits into 1.0 GB of memory" in found.message
    assert "needs about 9.0 GB" in found.message and found.data["kind"] == "out-of-memory"
    assert not any("b" in line for line in stand_in())
    monkeypatch.setattr(
        needs, "of_check", lambda check: None
    )  # of what is not known it runs, and tells itself
    assert gate(file, only=["a"], jobs=1, memory=1000).reports[0].findings == []
    monkeypatch.setattr(needs, "of_check", lambda check: 9 * 10**9 if check.name == "b" else 300)
    monkeypatch.setattr(needs, "free_memory", lambda: 10**9)
    gate(file, jobs=3)
    log = stand_in()[6:]
    assert log.index("-b") == log.index("+b") + 1


def test_a_killed_check_is_an_error_and_the_others_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, sys; sys.stdin.readline(); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(gate_processes, "_command", lambda: [sys.executable, "-S", "-c", code])
    reports = gate(checks(place, "a", "b"), jobs=2)
    assert [r.status for r in reports.reports] == ["undecided", "undecided"] and reports.exit_code == 2
    assert "found the process killed with" in reports.reports[0].headline
    suites = ET.fromstring(reports.junit())
    errors = [(s.get("errors"), s.get("failures"), s.find(".//error")) for s in suites]
    assert all((e, f) == ("1", "0") for e, f, _ in errors)
    assert {e.get("type") for _, _, e in errors if e is not None} == {"out-of-memory"}


def test_a_crash_of_a_check_is_told_in_its_report(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(gate_processes, "run_check", broken)
    (report,) = gate(checks(place, "a")).reports
    assert report.findings[0].data["kind"] == "out-of-memory" and report.exit_code == 2


def test_an_interrupt_leaves_no_process(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, time; sys.stdin.readline(); print('tell \"here\"', flush=True); time.sleep(60)"
    monkeypatch.setattr(gate_processes, "_command", lambda: [sys.executable, "-S", "-c", code])
    started = []
    popen = gate_processes.subprocess.Popen

    def kept(*arguments: object, **more: object) -> object:
        started.append(popen(*arguments, **more))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(gate_processes.subprocess, "Popen", kept)

    def stop(text: str) -> None:
        if text == "b: here":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gate(checks(place, "a", "b"), jobs=2, progress=stop)
    assert [p.returncode for p in started] == [-signal.SIGTERM] * 2
    for p in started:
        with pytest.raises(ProcessLookupError):
            os.kill(p.pid, 0)


def test_the_first_that_does_not_pass_ends_the_others(place: Path, stand_in: Callable[[], list[str]]) -> None:
    reports = gate(checks(place, "a", "b", "c"), jobs=1, fail_fast=True)
    assert ([r.title for r in reports.reports], reports.left) == (["a"], ("b", "c"))
    assert stand_in() == ["+a", "-a"]
    assert reports.headline == "0 of 3 checks passed; 1 could not be shown: a; 2 not run: b, c"


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ({"convert": "auto", "out": "x", "source": "s"}, {"out": "x"}, True),
        ({"convert": "auto", "out": "x", "source": "s"}, {"out": "y", "source": "x/in"}, True),
        ({"out": "x"}, {"convert": "auto", "out": "x", "source": "s"}, True),
        (
            {"convert": "auto", "out": "x", "source": "s"},
            {"convert": "auto", "out": "y", "source": "s"},
            False,
        ),
        ({"out": "x"}, {"out": "x"}, False),
        ({"out": "x", "device": "cuda"}, {"out": "y", "device": "cuda:1"}, True),
        ({"convert": "auto", "out": "xy", "source": "s"}, {"out": "x"}, False),
    ],
)
def test_which_checks_are_kept_apart(one: dict[str, str], other: dict[str, str], apart: bool) -> None:
    found = gate_processes.before([Check("a", **one), Check("b", **other)])  # type: ignore[arg-type]
    assert found == [set(), {0} if apart else set()]


def test_a_check_and_a_report_come_over_whole(place: Path) -> None:
    _, (check,) = read_gate(checks(place, "a", require="['bits']", accept="['x']", settings="{ a = [1] }"))
    assert check_of(check_line(check)) == check
    table = Table(("a", "b"), (("x", 1.5), (None, math.inf)), brief=3)
    found = Finding("bits", "x", "fail", "m\ud800", "w", -math.inf, 0.1, {"k": [1]}, (table,), {"rows": {}})
    report = Report("t", {"a": "b"}, [found], True, Claim("nothing", (("bits", "w"),), True), {"bits": 0.5})
    assert report_of(report_line(report)) == report
    odd = replace(found, measured=math.nan)
    again = report_of(report_line(replace(report, findings=[odd]))).findings[0].measured
    assert again is not None and math.isnan(again)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), ("2g", 2 * 10**9), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert needs.read_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "4 XB", "1e9", "9" * 400])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(CkptToolError, match="expected a size such as 4GiB"):
        needs.read_size(text)


def test_what_a_check_needs_grows_with_what_it_does(place: Path) -> None:
    _, (plain,) = read_gate(checks(place, "a"))
    with_parity = replace(plain, levels=("parity",))
    judged = replace(with_parity, against="transformers")
    sizes = [
        needs.of_check(c) or 0 for c in (plain, with_parity, replace(with_parity, compute_dtype="float64"))
    ]
    assert sizes[0] < sizes[1] <= sizes[2] < (needs.of_check(judged) or 0)
    report = verify(plain.out, plain.source, levels=("parity",), mode="quick")
    foretold = needs.of_check(replace(with_parity, mode="quick")) or 0
    assert report.facts["needs"] == f"about {needs.size_text(foretold)} of memory"
    assert needs.of_check(replace(with_parity, out="nowhere")) is None
    assert needs.of_check(replace(plain, levels=None, out="hf://a/b")) is None


def test_no_more_logits_are_foretold_than_a_table_gives() -> None:
    """CANINE has 1,114,112 ids, which are hashed, and no table of as many rows."""
    tables = [
        ("model.embed.weight", (300, 8)),
        ("model.layers.0.up.weight", (900, 8)),
        ("model.norm", (999,)),
    ]
    assert needs.vocabulary(TensorInfo(n, "F32", s, "a") for n, s in tables) == 300


def test_the_command_lists_what_is_needed_and_says_the_end_in_one_line(place: Path) -> None:
    file = checks(place, "a", "b")
    listed = program("gate", file.name, "--list", cwd=place)
    assert listed.stdout.splitlines()[1].split()[:2] == ["a", "100"]
    done = program("gate", file.name, "--only", "a", "--junit", "x.xml", cwd=place)
    assert done.stdout.splitlines()[-1] == "pass: 1 of 1 checks passed; written: x.xml"
    for wrong in (["--jobs", "0"], ["--memory", "much"]):
        assert program("gate", file.name, *wrong, cwd=place).returncode == 2


# --- JUnit ----------------------------------------------------------------------------------------------

# Elements and attributes of junit-10.xsd (the Jenkins xUnit plugin) that a report uses.
ALLOWED = {
    "testsuites": (set(), {"testsuite"}),
    "testsuite": ({"name", "tests", "failures", "errors", "skipped", "time"}, {"properties", "testcase"}),
    "properties": (set(), {"property"}),
    "property": ({"name", "value"}, set()),
    "testcase": ({"name", "classname", "time"}, {"skipped", "error", "failure", "system-out"}),
    "skipped": ({"message"}, set()),
    "error": ({"message", "type"}, set()),
    "failure": ({"message", "type"}, set()),
    "system-out": (set(), set()),
}


def elements(root: ET.Element) -> Iterator[ET.Element]:
    yield from root.iter()


def test_junit_has_times_and_keeps_to_the_schema() -> None:
    found = [Finding("bits", "x", s, "m") for s in ("pass", "pass", "fail", "skipped", "note", "undecided")]
    one = Report("a", {"f": "g"}, found, seconds={"bits": 1.25, "other": 0.5})
    root = ET.fromstring(Reports("all", [one, Report("b")]).junit())
    for e in elements(root):
        attributes, children = ALLOWED[e.tag]
        assert set(e.attrib) <= attributes and {c.tag for c in e} <= children, ET.tostring(e)
    suite = root[0]
    cases = suite.findall("testcase")
    assert [c.get("time") for c in cases] == ["1.250", *["0.000"] * 5, "0.500"]
    assert suite.get("time") == "1.750" == f"{sum(float(c.get('time', '')) for c in cases):.3f}"
    assert len({(c.get("classname"), c.get("name")) for c in root.iter("testcase")}) == len(cases) + 1
    assert cases[0].get("classname") == "a.bits"


# --- one level as one test ------------------------------------------------------------------------------


def test_only_what_the_chosen_tests_ask_for_is_run() -> None:
    whole = Check("a", "out", source="in", against="transformers", require=("bits",), bars={"kl": 1.0})
    assert narrowed(whole, {"bits", "verdict"}) == whole == narrowed(whole, {"gate"})
    some = narrowed(whole, {"bits", "coverage"})
    assert (some.levels, some.against, some.require, some.bars) == (("coverage", "bits"), None, (), {})
    assert narrowed(whole, {"transformers"}).levels == () and narrowed(whole, {"transformers"}).against
    by_name = replace(whole, levels=("bits", "training", "generation"))
    assert narrowed(by_name, {"training", "generation"}).levels == ("training", "generation")


def test_a_named_test_runs_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checks(place, "a", "b", levels="['bits', 'parity']")
    monkeypatch.chdir(place)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    asked = ["-p", "no:cacheprovider", "-q", "--ckpt-gate", file.name, f"{file.name}::b[bits]"]
    assert pytest.main([*asked, "--junit-xml", "x.xml"]) == 0
    assert "1 passed" in capsys.readouterr().out
    case = ET.parse(place / "x.xml").find(".//testcase")
    assert case is not None and case.get("name") == "b[bits]"
    told = {p.get("name") for p in case.iter("property")}
    assert "seconds" in told


def test_xdist_keeps_the_tests_of_a_check_and_of_what_reads_it_together(place: Path) -> None:
    file = checks(place, "a", "b", "c")
    text = file.read_text().replace("'good'", "'made'\nconvert = 'auto'", 1)
    file.write_text("'made'".join(text.rsplit("'good'", 1)))  # c reads what a writes
    asked = {"ckpt_gate": [str(file)], "dist": "load"}
    config = SimpleNamespace(
        getoption=asked.get, rootpath=place, getvalue=lambda name: ["popen"] * 2, option=SimpleNamespace()
    )
    scheduler = pytest_xdist_make_scheduler(config, None)  # type: ignore[arg-type]
    named = [
        scheduler._split_scope(f"parity.toml::{n}") for n in ("a[bits]", "a[verdict]", "b[bits]", "c[bits]")
    ]
    assert named[0] == named[1] == named[3] != named[2]
    assert scheduler._split_scope("test_own.py::test_x[bits]") == "test_own.py::test_x[bits]"
    asked["dist"] = "loadfile"
    assert pytest_xdist_make_scheduler(config, None) is None  # type: ignore[arg-type]


# --- pictures -------------------------------------------------------------------------------------------


def test_the_strip_of_an_unpermuted_matrix_shows_its_heads(conversions: Written, originals: Written) -> None:
    heads, half = 3, 4
    by_row = np.ones(heads * 2 * half)
    for head in range(heads):  # the first and the last row of each head stay where they are
        by_row[[head * 2 * half, (head + 1) * 2 * half - 1]] = 0
    by_row[9] = 3.0
    made = strip(by_row)
    assert made["runs"] == [[1, 7], [9, 15], [17, 23]] and made["count"] == 18
    assert made["worst"][0] == [9, 3.0]
    (drawn,) = drawings({"rows": made})
    root = ET.fromstring(drawn)
    assert len([e for e in root.iter() if e.get("class") == "bad"]) == heads
    assert "rows that differ: 18 of 24, in 3 runs; worst first: 9 (3)" in drawn


def test_a_strip_of_very_many_runs_sees_several_rows_at_a_time() -> None:
    by_row = np.tile([1.0, 0.0], 5000)
    made = strip(by_row)
    assert made["every"] == 25 and made["runs"] == [[0, 10_000]] and made["count"] == 5000


def test_positions_and_most_probable_tokens_are_drawn_where_they_differ() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(1, 700, 11)
    found = wanted.clone()
    found[0, 650] = found[0, 650].flip(-1)
    found[0, 3, wanted[0, 3].argmin()] = math.nan
    seen = positions(found, wanted, tokens=True)
    assert seen.delta[3] == math.inf and seen.delta[650] > 0 and seen.delta[0] == 0
    assert [t["position"] for t in seen.top5][:2] == [3, 650]
    data = drawn({"long": seen}, "long", 1e-6)
    assert len(data["positions"]["delta"]) == 234 and data["positions"]["delta"][1] == math.inf
    words = spelled(data, SimpleNamespace(id_to_token=lambda k: f"<b>{k}"))
    shown = list(drawings(words))
    assert len(shown) == 2 and "&lt;b&gt;" in shown[1] and "<b>" not in shown[1]
    for one in shown:
        ET.fromstring(one)
    assert "2 of 234 marks are over it" in shown[0]
    assert positions(wanted, wanted, tokens=True).top5 == ()


@pytest.fixture
def broken(originals: Written, conversions: Written, tmp_path: Path) -> Report:
    out = Path(shutil.copytree(conversions(VARIANT), tmp_path / "broken"))
    plant(out, "q-not-permuted")
    return verify(out, originals(VARIANT), levels=("bits",))


def test_a_report_shows_itself_and_its_pictures(broken: Report, tmp_path: Path) -> None:
    assert repr(broken).startswith("<ckpt-tool verify: fail: ") and len(repr(broken)) < 300
    html = broken._repr_html_()
    assert html.startswith('<div class="ckpt-tool"><style>\n.ckpt-tool{') and "<script" not in html
    where = next(f.where for f in broken.findings if f.status == "fail")
    picture = broken.plot("rows", where)
    assert picture._repr_html_().count("<svg") == 1
    picture.save(tmp_path / "rows.svg")
    root = ET.parse(tmp_path / "rows.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and len(list(root.iter())) > 4
    with pytest.raises(CkptToolError, match="found rows of consolidated"):
        broken.plot("phases")
    assert broken.provenance["plan"].startswith("SHA-256 ")
    assert "provenance" in broken.html() and "drawn" in broken.to_json()["findings"][0]


def test_the_page_of_a_gate_has_a_table_with_links() -> None:
    page = Reports("all", [Report("<a>"), Report("b", seconds={"bits": 2.0})], ("c",)).html()
    for k, name in enumerate(("&lt;a&gt;", "b")):
        assert f'<a href="#check-{k}">{name}</a>' in page and f'<section id="check-{k}">' in page
    assert "1 not run: c" in page and ">2.0</td>" in page


# --- notebooks ------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_mapping_of_tensors_that_are_read_when_asked_for(originals: Written) -> None:
    with open_checkpoint(originals("mistral-7b-v0.1")) as checkpoint:
        name = "layers.1.attention.wq.weight"
        tensor = checkpoint[name]
        whole = tensor.numpy()
        bits = checkpoint.read(checkpoint.find(name)[0])
        assert (tensor.dtype, whole.dtype, tensor.bits().dtype) == ("BF16", np.float32, np.uint16)
        assert ((whole.view("<u4") >> 16) == bits).all() and not (whole.view("<u4") & 0xFFFF).any()
        for index in (3, -1, slice(2, 9, 3), slice(None, None, -5), (slice(4, 6), 1), (..., 0), [1, 5], ()):
            np.testing.assert_array_equal(tensor[index], whole[index])
        assert tensor[5:5].shape == (0, *whole.shape[1:]) and name in checkpoint and "x" not in checkpoint
        np.testing.assert_array_equal(np.asarray(tensor, "<f8"), whole)
        assert set(dict(checkpoint)) == set(checkpoint.names()) and len(tensor) == whole.shape[0]
        for wrong in (len(tensor), -len(tensor) - 1):
            with pytest.raises(IndexError):
                tensor[wrong]
        with pytest.raises(CkptToolError, match=f"did you mean {name}"):
            checkpoint[name[:-1]]
        with pytest.raises(CkptToolError, match="3: expected a tensor of this name, found none"):
            checkpoint[3]  # type: ignore[index]
        assert "11</td><td>layers.{0..10}.attention.wq.weight" in checkpoint._repr_html_()


def test_of_ranks_the_file_is_named_too(originals: Written) -> None:
    with open_checkpoint(originals("llama-2-70b")) as checkpoint:
        name, file = "layers.0.attention.wq.weight", "consolidated.01.pth"
        with pytest.raises(CkptToolError, match=r"name the file, too: checkpoint\['layers.0"):
            checkpoint[name]
        assert checkpoint[name, file].info.file == file


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_floats_of_8_bits_come_as_the_numbers_that_torch_reads(dtype: str) -> None:
    bits = np.arange(256, dtype=np.uint8)
    torch_type = getattr(torch, DTYPES[dtype].torch)
    wanted = torch.from_numpy(bits).view(torch_type).float().numpy()
    np.testing.assert_array_equal(_widened(bits, dtype), wanted)


def test_rows_go_to_pandas_where_it_is(broken: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(CkptToolError, match=r"pip install 'ckpt-tool\[notebook\]'"):
        broken.to_dataframe()
    stand_in = SimpleNamespace(
        DataFrame=lambda rows, columns: [dict(zip(columns, r, strict=True)) for r in rows]
    )
    monkeypatch.setitem(sys.modules, "pandas", stand_in)
    rows = broken.to_dataframe()
    assert len(rows) == len(broken.findings) and rows[0]["status"] == "fail"
    assert Reports("all", [broken]).to_dataframe()[0]["report"] == broken.title


def test_the_notebook_runs_and_its_outputs_are_true() -> None:
    content = json.loads(notebook.NOTEBOOK.read_text(encoding="utf-8"))
    for cell, outputs in notebook.executed(content):
        told = [notebook.masked(o) for o in cell["outputs"]]
        assert told == [notebook.masked(o) for o in outputs], "".join(cell["source"])


def test_the_histogram_of_the_kl_is_drawn_with_its_counts() -> None:
    kls = {"long": [0.0, 1e-13, 2e-13, 3e-11, math.inf]}
    drawn = picture(histogram(kls))
    counts = [e.text for e in ET.fromstring(drawn).iter() if e.tag == "text" and e.get("y") != "204"]
    titles = [e.text for e in ET.fromstring(drawn).iter() if e.tag == "title"]
    assert titles == ["0: 1 tokens", "1e-13: 2 tokens", "1e-12: 0 tokens", "1e-11: 1 tokens", "inf: 1 tokens"]
    assert counts[:4] == ["1", "2", "1", "1"] and "5 tokens of all prompts" in drawn
