"""What a verification found, as data, and the forms it is shown in.

A `Finding` is one question with its measured answer; a `Report` is all of them for one output. Names come
from files that nobody vouches for, so every form passes each string through `shown` and then through the
escaping of its own syntax (rich `Text`, JSON, ElementTree, html.escape, Markdown)."""

from __future__ import annotations

import html
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from ckpt_tool.errors import printable
from ckpt_tool.terminal import Column, paragraph, say
from ckpt_tool.terminal import table as terminal_table
from ckpt_tool.verify.claims import Claim, Judgement, Verdict, exactness, judge

# `skipped` did not run or had nothing to compare; `undecided` ran and could not be judged
Status = Literal["pass", "fail", "skipped", "undecided", "note"]
SCHEMA = 2
COLOURS = {"pass": "green", "fail": "bold red", "skipped": "yellow", "undecided": "yellow", "note": "cyan"}
EXIT_CODES: dict[str, int] = {"pass": 0, "fail": 1, "undecided": 2}


@dataclass(frozen=True)
class Table:
    """Numbers behind a finding: a head line and rows of text and numbers. A terminal gets the first `brief`
    rows, and with 0 not even a word that there are some."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]
    brief: int = 1000


@dataclass(frozen=True)
class Finding:
    """One question and its answer. `where` names a tensor, layer, field or prompt; `measured` and `bar` are
    in the unit that the message names; `data` holds whatever else a machine may want (exactness class,
    counts)."""

    level: str
    check: str
    status: Status
    message: str
    where: str | None = None
    measured: float | None = None
    bar: float | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()

    def to_json(self) -> dict[str, Any]:
        made = {
            "level": self.level,
            "check": self.check,
            "status": self.status,
            "message": self.message,
            "where": self.where,
            "measured": self.measured,
            "bar": self.bar,
            "data": self.data,
            "tables": [{"columns": t.columns, "rows": t.rows} for t in self.tables],
        }
        plain: dict[str, Any] = _plain(made)
        return plain

    def numbers(self) -> str:
        """`measured 3.1e-13, bar 2e-12`, as far as they are there."""
        pairs = (("measured", self.measured), ("bar", self.bar))
        return ", ".join(f"{label} {number(x)}" for label, x in pairs if x is not None)


@dataclass
class Report:
    """Every finding about one output. `facts` are the circumstances, in the order they are shown in; `claim`
    is what was asked to be shown, by which the verdict is judged."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    could_not_run: bool = False
    claim: Claim = Claim()

    @property
    def judgement(self) -> Judgement:
        return judge(self.findings, self.claim, self.could_not_run)

    @property
    def status(self) -> Verdict:
        return self.judgement.verdict

    @property
    def headline(self) -> str:
        """What was shown, or the cause of a failure, in one sentence."""
        return self.judgement.headline

    @property
    def exit_code(self) -> int:
        """0 all that was asked for was shown, 1 a difference was found, 2 it could not be shown."""
        return EXIT_CODES[self.status]

    @property
    def exactness(self) -> str | None:
        """The class of the result, see `claims.CLASSES`; None where neither the bits nor the numbers were
        compared."""
        return exactness(self.findings)

    def level(self, name: str) -> list[Finding]:
        return [f for f in self.findings if f.level == name]

    def to_json(self) -> dict[str, Any]:
        made: dict[str, Any] = _plain(
            {
                "schema": SCHEMA,
                "title": self.title,
                "status": self.status,
                "headline": self.headline,
                "exactness": self.exactness,
                "facts": self.facts,
            }
        )
        return {**made, "findings": [f.to_json() for f in self.findings]}

    def junit(self) -> str:
        return junit([self])

    def markdown(self) -> str:
        return markdown([self])

    def html(self) -> str:
        return page([self])

    def render(self, console: Console) -> None:
        render([self], console)


@dataclass
class Reports:
    """Several reports with one verdict, in the same forms."""

    title: str
    reports: list[Report]

    @property
    def status(self) -> Verdict:
        states = {r.status for r in self.reports}
        return "fail" if "fail" in states else "undecided" if "undecided" in states or not states else "pass"

    @property
    def exit_code(self) -> int:
        """1 if any found a difference, else 2 if any could not be shown, else 0."""
        return EXIT_CODES[self.status]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "title": shown(self.title),
            "status": self.status,
            "reports": [r.to_json() for r in self.reports],
        }

    def junit(self) -> str:
        return junit(self.reports)

    def markdown(self) -> str:
        return markdown(self.reports)

    def html(self) -> str:
        return page(self.reports, self.title)

    def render(self, console: Console) -> None:
        render(self.reports, console)


# --- what every form shares -----------------------------------------------------------------------------


def shown(text: object, limit: int = 2000) -> str:
    """`text` without control characters, and without the `::` that begins a command in a CI log."""
    return printable(text, limit).replace("::", ":\\x3a")


def number(x: float) -> str:
    """Whole numbers in full, others with three digits."""
    if isinstance(x, bool) or not math.isfinite(x):
        return str(x)
    if isinstance(x, int):
        return f"{x:,}"
    return f"{x:.3g}"


def cell(x: str | float | None) -> str:
    return "" if x is None else shown(x) if isinstance(x, str) else number(x)


def _plain(value: Any) -> Any:
    """`value` as strict JSON has it: strings made printable, NaN and infinities as strings."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {shown(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def json_text(report: Report | Reports) -> str:
    return json.dumps(report.to_json(), indent=2, allow_nan=False, ensure_ascii=True) + "\n"


def _levels(report: Report) -> list[tuple[str, list[Finding]]]:
    return [(level, list(group)) for level, group in groupby(report.findings, key=lambda f: f.level)]


def _counts(findings: Iterable[Finding]) -> str:
    states = [f.status for f in findings]
    words = (
        ("pass", "passed"), ("fail", "failed"), ("undecided", "undecided"), ("skipped", "skipped"),
        ("note", "noted"),
    )  # fmt: skip
    return ", ".join(f"{states.count(s)} {w}" for s, w in words if s in states)


def _verdict(report: Report) -> str:
    """`pass (bit-identical): the bits and the numbers are those of its source`."""
    known = f" ({report.exactness})" if report.exactness and report.status != "fail" else ""
    return f"{report.status}{known}: {shown(report.headline)}"


def _sentence(f: Finding) -> str:
    where = f"{shown(f.where)}: " if f.where else ""
    numbers = f" ({f.numbers()})" if f.numbers() else ""
    return f"{where}{shown(f.message)}{numbers}"


# --- text -----------------------------------------------------------------------------------------------


# Columns that a narrow terminal can do without, in the order in which they stay; JSON and HTML have them all.
SPARE = ("top-1", "KL", "|delta|", "at", "|value|", "|logit|", "loss", "top-5", "noise")
STATUS_WIDTH = 10
CHECK_WIDTH = 24  # a longer name of a check pushes only its own sentence to the right


def render(reports: Sequence[Report], console: Console) -> None:
    """The report as a person reads it in a terminal; the words carry the verdict, colour only repeats it."""
    for report in reports:
        title = Text(shown(report.title) + ": ", "bold")
        paragraph(console, _verdict(report), first=title, hang=2, style=COLOURS[report.status])
        width = max((len(shown(k)) for k in report.facts), default=0)
        for key, value in report.facts.items():
            paragraph(console, shown(value), first=f"  {shown(key):<{width}}  ")
        for level, findings in _levels(report):
            say(console)
            say(console, Text.assemble((level, "bold"), f"  {_counts(findings)}"))
            width = min(CHECK_WIDTH, max(len(shown(f.check)) for f in findings))
            for f in findings:
                head = Text.assemble((f"  {f.status:<{STATUS_WIDTH - 3}} ", COLOURS[f.status]))
                head.append(f"{shown(f.check):<{width}} ")
                paragraph(console, _sentence(f), first=head, hang=STATUS_WIDTH + width + 1)
                for table in f.tables:
                    _render_table(table, console)
        say(console)


def _render_table(shown_table: Table, console: Console) -> None:
    if not shown_table.brief:
        return
    columns = []
    for k, name in enumerate(shown_table.columns):
        numeric = all(not isinstance(row[k], str) for row in shown_table.rows)
        spare = SPARE.index(name) + 1 if name in SPARE else 0
        columns.append(
            Column(shown(name), right=numeric, spare=spare, whole=name in ("at", "top-1", "top-5"))
        )
    rows = [[cell(x) for x in row] for row in shown_table.rows[: shown_table.brief]]
    missing = terminal_table(console, columns, rows, indent=4)
    more = len(shown_table.rows) - len(rows)
    parts = [f"and {more} more rows"] if more > 0 else []
    parts += [", ".join(missing)] if missing else []
    if parts:
        text = "; ".join(parts) + ": in the JSON, Markdown and HTML reports"
        paragraph(console, text, first=" " * 6, style="dim")


# --- JUnit XML ------------------------------------------------------------------------------------------


def junit(reports: Sequence[Report]) -> str:
    """One test suite for each report, one test case for each finding, and one for the verdict, which is an
    error where it could not be shown; notes are passing cases with output."""
    root = ET.Element("testsuites")
    for report in reports:
        states = [f.status for f in report.findings]
        suite = ET.SubElement(
            root,
            "testsuite",
            name=shown(report.title),
            tests=str(len(states) + 1),
            failures=str(states.count("fail") + (report.status == "fail")),
            skipped=str(states.count("skipped") + states.count("undecided")),
            errors=str(int(report.status == "undecided")),
        )
        properties = ET.SubElement(suite, "properties")
        for key, value in report.facts.items():
            ET.SubElement(properties, "property", name=shown(key), value=shown(value))
        for f in report.findings:
            name = shown(f.check) + (f" [{shown(f.where)}]" if f.where else "")
            case = ET.SubElement(suite, "testcase", classname=f"verify.{shown(f.level)}", name=name)
            text = shown(f.message) + (f" ({f.numbers()})" if f.numbers() else "")
            if f.status == "fail":
                ET.SubElement(case, "failure", message=text).text = _table_text(f)
            elif f.status in ("skipped", "undecided"):
                ET.SubElement(case, "skipped", message=text)
            else:
                ET.SubElement(case, "system-out").text = "\n".join(x for x in (text, _table_text(f)) if x)
        verdict = ET.SubElement(suite, "testcase", classname="verify", name="verdict")
        if report.status != "pass":
            kind = "failure" if report.status == "fail" else "error"
            ET.SubElement(verdict, kind, message=shown(report.headline))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _table_text(f: Finding) -> str:
    lines = [" | ".join(cell(x) for x in row) for t in f.tables for row in (t.columns, *t.rows)]
    return "\n".join(lines)


# --- Markdown -------------------------------------------------------------------------------------------


def markdown(reports: Sequence[Report]) -> str:
    """GitHub Markdown: fit for a job summary or a pull request."""
    out: list[str] = []
    for report in reports:
        out += [f"## {_md(report.title)}: {_md(_verdict(report))}", ""]
        out += [f"- {_md(k)}: {_md(v)}" for k, v in report.facts.items()]
        for level, findings in _levels(report):
            out += ["", f"### {_md(level)}: {_counts(findings)}", ""]
            out += [
                "| | check | where | finding | measured | bar |",
                "| --- | --- | --- | --- | ---: | ---: |",
            ]
            for f in findings:
                values = ("" if x is None else number(x) for x in (f.measured, f.bar))
                cells = (f.status, _md(f.check), _md(f.where or ""), _md(f.message), *values)
                out.append(f"| {' | '.join(cells)} |")
            for table in (t for f in findings for t in f.tables):
                out += ["", "| " + " | ".join(_md(c) for c in table.columns) + " |"]
                out.append("|" + " --- |" * len(table.columns))
                out += ["| " + " | ".join(_md(cell(x)) for x in row) + " |" for row in table.rows]
        out.append("")
    return "\n".join(out)


def _md(text: str) -> str:
    """`text` as literal Markdown: HTML as entities, Markdown's own marks behind a backslash; formulas that a
    spreadsheet would run on paste lose their leading sign."""
    literal = re.sub(r"([\\`*_{}\[\]()#|~!])", r"\\\1", shown(text))
    literal = literal.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^([=+@-])", r"\\\1", literal)


# --- HTML -----------------------------------------------------------------------------------------------

FOLDED_ROWS = 12  # of a table, before the page folds it

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;
color:#1c1e21;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .4rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
p.verdict{font-size:1.15rem;border-left:.3rem solid;padding:.3rem .8rem;margin:.4rem 0 1rem}
figure{margin:.4rem 0}figcaption{color:#57606a;font-size:.8rem}
svg.c{width:100%;max-width:45rem;height:auto;display:block}
svg.c text{font:11px system-ui,sans-serif;fill:#57606a}svg.c .g{stroke:#dde1e6}svg.c .a{stroke:#8b949e}
svg.c .good{fill:#2da44e}svg.c .bad{fill:#cf222e}svg.c path{fill:none;stroke:#0969da;stroke-width:1.5}
svg.c .noise{stroke:#8b949e;stroke-dasharray:2 3}summary{cursor:pointer;color:#57606a;font-size:.85rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;margin:.3rem 0 .8rem;width:100%}td,th{padding:.25rem .6rem;text-align:left;
border-bottom:1px solid #dde1e6;vertical-align:top;overflow-wrap:break-word}
table.f{table-layout:fixed}.f>tbody>tr>th:nth-child(1){width:3.6rem}.f>tbody>tr>th:nth-child(2){width:8.5rem}
.f>tbody>tr>th:nth-child(n+4){width:5rem}.f>tbody>tr>td{overflow-wrap:anywhere}.d td{overflow-wrap:normal}
@media(max-width:40rem){body{margin:1rem auto}dl{display:block}dd{margin:0 0 .4rem}
table.f,.f>tbody,.f>tbody>tr,.f>tbody>tr>td{display:block;text-align:left}.f>tbody>tr:first-child{display:none}
.f>tbody>tr>td{border:0;padding:.1rem 0}.f>tbody>tr{border-bottom:1px solid #8b949e;padding:.4rem 0}}
th{font-weight:600;color:#57606a;white-space:nowrap}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.w{font-family:ui-monospace,monospace;
font-size:.85rem}.s{font-weight:600;white-space:nowrap}.pass{color:#1a7f37}.fail{color:#cf222e}
.skipped,.undecided{color:#9a6700}
.note{color:#0969da}table.d{width:auto;font-size:.8rem}table.d td,table.d th{padding:.2rem .4rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 1rem}
dt{color:#57606a}dd{margin:0;overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}td,th{border-color:#30363d}
.pass{color:#3fb950}.fail{color:#f85149}.skipped{color:#d29922}.note{color:#58a6ff}
th,dt,figcaption,summary{color:#8b949e}.undecided,.skipped{color:#d29922}
svg.c text{fill:#8b949e}svg.c .g{stroke:#30363d}svg.c .good{fill:#3fb950}svg.c .bad{fill:#f85149}
svg.c path.bar{stroke:#58a6ff}}
"""


def page(reports: Sequence[Report], title: str | None = None) -> str:
    """One HTML file that loads nothing: no script, no font, no image, and a policy that forbids them."""
    name = title or (reports[0].title if reports else "verification")
    body = [f"<h1>{_h(name)}</h1>"]
    for report in reports:
        if name != report.title or len(reports) > 1:
            body.append(f"<h2>{_h(report.title)}</h2>")
        body.append(f'<p class="verdict {report.status}">{_h(_verdict(report))}</p>')
        body.append(
            "<dl>" + "".join(f"<dt>{_h(k)}</dt><dd>{_h(v)}</dd>" for k, v in report.facts.items()) + "</dl>"
        )
        for level, findings in _levels(report):
            body.append(f"<h3>{_h(level)}: {_counts(findings)}</h3><table class='f'>")
            body.append("<tr><th></th><th>check</th><th>finding</th><th>measured</th><th>bar</th></tr>")
            for f in findings:
                where = f'<div class="w">{_h(f.where)}</div>' if f.where else ""
                values = "".join(
                    f'<td class="n">{"" if x is None else _h(number(x))}</td>' for x in (f.measured, f.bar)
                )
                body.append(
                    f'<tr><td class="s {f.status}">{f.status}</td><td>{_h(f.check)}</td>'
                    f"<td>{_h(f.message)}{where}{''.join(map(_html_table, f.tables))}</td>{values}</tr>"
                )
            body.append("</table>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_h(name)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _html_table(table: Table) -> str:
    from ckpt_tool.verify.pictures import picture

    drawn = picture(table)
    made = f'<div class="scroll">{_plain_table(table)}</div>'
    if len(table.rows) <= FOLDED_ROWS:
        return drawn + made
    return f"{drawn}<details><summary>{len(table.rows)} rows</summary>{made}</details>"


def _plain_table(table: Table) -> str:
    head = "".join(f"<th>{_h(c)}</th>" for c in table.columns)
    rows = "".join(
        "<tr>"
        + "".join(f"<td{'' if isinstance(x, str) else ' class=n'}>{_h(cell(x))}</td>" for x in row)
        + "</tr>"
        for row in table.rows
    )
    return f'<table class="d"><tr>{head}</tr>{rows}</table>'


def _h(text: str) -> str:
    return html.escape(shown(text), quote=True)
