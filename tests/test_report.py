"""Reports: one verdict in five forms, and no name from a file does harm in any of them."""

from __future__ import annotations

import html.parser
import io
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from ckpt_tool.verify.report import Finding, Report, Reports, Status, Table, json_text, number

HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31mred\x1b]0;title\x07",
    "::set-output name=a::b",
    "line\none\r\ntwo\u2028three",
    "a|b`c`*d*[e](http://x)~",
    "=cmd|' /C calc'!A0",
    "@SUM(1)",
    "\u202eright to left\u2066",
    "nul\x00byte",
    "\ud800 lone surrogate",
    "&lt;already&gt;",
    "]]>",
]


def report(*findings: Finding, title: str = "a title") -> Report:
    return Report(title, {"output": "out"}, list(findings))


def made(status: Status, check: str = "round trip", **more: object) -> Finding:
    return Finding("bits", check, status, "a message", **more)  # type: ignore[arg-type]


def hostile_report() -> Report:
    found = [
        Finding(
            "coverage",
            name,
            status,
            name,
            where=name,
            data={name: [name]},
            tables=(Table((name,), ((name,),)),),
        )
        for name in HOSTILE
        for status in ("pass", "fail", "skipped", "undecided", "note")
    ]
    return Report(HOSTILE[0], {name: name for name in HOSTILE}, found)


def text(of: Report | Reports, width: int = 100) -> str:
    out = io.StringIO()
    of.render(Console(file=out, width=width))
    return out.getvalue()


# --- the verdict ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "status", "code"),
    [
        (["pass", "note", "skipped"], "pass", 0),
        (["pass", "fail", "pass"], "fail", 1),
        (["pass", "undecided"], "undecided", 2),
        (["undecided", "fail"], "fail", 1),
        (["skipped", "note"], "undecided", 2),
        ([], "undecided", 2),
    ],
)
def test_status_and_exit_code(states: list[Status], status: str, code: int) -> None:
    made_report = report(*(made(s) for s in states))
    assert (made_report.status, made_report.exit_code) == (status, code)


def test_the_strictest_class_holds_only_if_nothing_differs() -> None:
    bits = made("pass", data={"exactness": "bit-identical"})
    noise = made("pass", data={"exactness": "within noise floor"})
    assert report(noise, bits).exactness == "bit-identical"
    assert report(noise).exactness == "within noise floor"
    assert report(bits, made("fail", data={"exactness": "differs"})).exactness == "differs"
    assert report(bits, made("fail")).exactness == "differs"
    assert report(made("pass")).exactness is None


def test_several_reports_have_one_verdict() -> None:
    good, bad, none = report(made("pass")), report(made("fail")), report(made("skipped"))
    stopped = report(made("fail"))
    stopped.could_not_run = True
    assert Reports("all", [good, good]).exit_code == 0
    assert Reports("all", [good, none]).exit_code == 2
    assert Reports("all", [good, stopped]).exit_code == 2
    assert Reports("all", [stopped, bad]).exit_code == 1
    assert Reports("all", []).exit_code == 2


# --- the forms ------------------------------------------------------------------------------------------


def test_every_form_tells_the_numbers() -> None:
    table = Table(("layer", "NMSE"), (("layer 0", 1.5e-12), ("layer 1", None)))
    found = made("fail", where="layer 0", measured=1.5e-9, bar=1e-10, tables=(table,))
    one = report(found)
    for form in (text(one), one.junit(), one.markdown(), one.html()):
        assert "1.5e-09" in form
        assert "1e-10" in form
        assert "a message" in form
        assert "1.5e-12" in form
    data = json.loads(json_text(one))
    assert (data["findings"][0]["measured"], data["findings"][0]["bar"]) == (1.5e-9, 1e-10)
    assert data["findings"][0]["tables"][0]["rows"] == [["layer 0", 1.5e-12], ["layer 1", None]]


def test_a_terminal_gets_the_first_rows_of_a_long_table() -> None:
    rows = tuple((f"row {k}", float(k)) for k in range(9))
    one = report(made("pass", tables=(Table(("name", "x"), rows, brief=3),)))
    assert "row 2" in text(one)
    assert "row 3" not in text(one)
    assert "6 more" in text(one)
    assert "row 8" in one.html()
    assert "row 8" in one.markdown()


def test_json_is_strict_even_for_numbers_that_are_none() -> None:
    one = report(made("fail", measured=math.inf, data={"x": math.nan}))
    data = json.loads(json_text(one), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert data["findings"][0]["measured"] == "inf"
    json.loads(json.dumps(hostile_report().to_json()).encode("ascii"))


def test_the_keys_of_the_json_are_those_that_the_page_names() -> None:
    """docs/verification.md, Reports; another key is another schema."""
    made = report(Finding("bits", "c", "pass", "m")).to_json()
    page = (Path(__file__).parents[1] / "docs" / "verification.md").read_text()
    said = page[page.index("The number `schema`") : page.index("may change in any release")]
    assert made["schema"] == 2 and "`schema` in the JSON, now 2" in said
    assert [*made] == [
        *("schema", "title", "status", "headline", "exactness", "facts", "seconds", "provenance", "findings")
    ]
    assert [*made["findings"][0]] == [
        *("level", "check", "status", "message", "where", "measured", "bar", "data", "tables", "drawn")
    ]
    gate = Reports("all", [report()]).to_json()
    assert [*gate] == ["schema", "title", "status", "headline", "not_run", "reports"]
    assert all(f"`{key}`" in said for key in (*made, *made["findings"][0], *gate))


def test_junit_counts_and_places_each_finding() -> None:
    root = ET.fromstring(report(made("pass"), made("fail"), made("skipped"), made("note")).junit())
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "2", "1")
    *cases, verdict = suite.findall("testcase")
    assert [len(c.findall("failure")) for c in cases] == [0, 1, 0, 0]
    assert [len(c.findall("skipped")) for c in cases] == [0, 0, 1, 0]
    assert {c.get("classname") for c in cases} == {"verify.bits"}
    assert [e.tag for e in verdict] == ["failure"]


def test_junit_calls_what_was_not_shown_an_error() -> None:
    (suite,) = ET.fromstring(report(made("skipped")).junit())
    assert (suite.get("errors"), suite.get("failures")) == ("1", "0")
    verdict = suite.findall("testcase")[-1]
    assert [(e.tag, "nothing was compared" in e.get("message", "")) for e in verdict] == [("error", True)]


def test_numbers_are_short() -> None:
    assert [number(x) for x in (0.0, 1.0, 12345, 1.23456e-13, math.inf)] == [
        "0",
        "1",
        "12,345",
        "1.23e-13",
        "inf",
    ]


# --- hostile names --------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_html_holds_no_element_from_a_name() -> None:
    harmless, hostile = Tags(), Tags()
    harmless.feed(
        report(
            *(made(s) for s in ("pass", "fail")), made("note", where="x", tables=(Table(("a",), ((1.0,),)),))
        ).html()
    )
    page = hostile_report().html()
    hostile.feed(page)
    assert hostile.tags <= harmless.tags
    assert hostile.attributes <= harmless.attributes
    assert not hostile.tags & {"script", "img", "link", "iframe", "base", "form"}
    assert "default-src 'none'" in page
    assert "alert(1)" in page  # shown, as text


def test_junit_parses_and_keeps_names_as_text() -> None:
    root = ET.fromstring(hostile_report().junit())
    assert {e.tag for e in root.iter()} == {
        "testsuites", "testsuite", "properties", "property", "testcase", "failure", "skipped", "system-out",
    }  # fmt: skip
    names = [str(c.get("name")) for c in root.iter("testcase")]
    assert any("</script>" in n for n in names)


def test_markdown_keeps_its_rows_and_holds_no_html() -> None:
    page = hostile_report().markdown()
    assert "<" not in page
    rows = [
        line for line in page.splitlines() if line.startswith(("| pass", "| fail", "| skipped", "| note"))
    ]
    assert len(rows) == 4 * len(HOSTILE)
    for line in rows:
        assert line.replace("\\|", "").count("|") == 7
        assert "\\\\|" not in line
    assert not any(line.lstrip().startswith("::") for line in page.splitlines())


@pytest.mark.parametrize("width", [40, 100, 1000])
def test_a_terminal_and_a_ci_log_get_no_commands(width: int) -> None:
    shown = text(hostile_report(), width)
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\u202e" not in shown
    assert "::" not in shown
    assert not any(ord(c) < 32 and c != "\n" for c in shown)


def test_no_form_holds_control_characters() -> None:
    one = hostile_report()
    for form in (one.html(), one.markdown(), one.junit(), json_text(one)):
        assert not any(ord(c) < 32 and c != "\n" for c in form)
        assert not {"\u202e", "\u2066", "\u2028", "\ud800"} & set(form)
        form.encode("utf-8")
