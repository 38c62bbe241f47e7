"""What a verification found, as data, and the forms it is shown in.

A `Finding` is one question with its measured answer; a `Report` is all of them for one output. Names come
from files that nobody vouches for, so every form passes each string through `shown` and then through the
escaping of its own syntax (`Styled`, JSON, ElementTree, html.escape, Markdown)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from ckpt_tool.checkpoint.frames import data_frame
from ckpt_tool.errors import printable
from ckpt_tool.records import dataclass
from ckpt_tool.terminal import Column, Screen, Styled, paragraph, say
from ckpt_tool.terminal import table as terminal_table
from ckpt_tool.verify.claims import Claim, Judgement, Verdict, exactness, judge

if TYPE_CHECKING:
    from ckpt_tool.verify.plotting import Drawing

# `skipped` did not run or had nothing to compare; `undecided` ran and could not be judged
Status = Literal["pass", "fail", "skipped", "undecided", "note"]
SCHEMA = 2
SHOWN_NAMES = 5  # of checks in one sentence
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
    counts), and `drawn` what pictures of it are made of, by their kind (see `pictures`)."""

    level: str
    check: str
    status: Status
    message: str
    where: str | None = None
    measured: float | None = None
    bar: float | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    drawn: Mapping[str, Any] = field(default_factory=dict)

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
    is what was asked to be shown, by which the verdict is judged; `seconds` are those that each level took,
    and `origin` says of what plan and files the result is, where there are any to name."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    could_not_run: bool = False
    claim: Claim = Claim()
    seconds: dict[str, float] = field(default_factory=dict)
    origin: Mapping[str, str] | None = None

    @property
    def provenance(self) -> dict[str, str]:
        """Of what programs, plan and bytes the result is."""
        if self.origin is None:
            return {}
        from ckpt_tool.verify.provenance import programs  # whose papers take 15 ms, and few reports show them

        return {**programs(), **self.origin}

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
                "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            }
        )
        findings = [{**f.to_json(), "drawn": _plain(f.drawn)} for f in self.findings]
        return {**made, "provenance": _plain(self.provenance), "findings": findings}

    def junit(self) -> str:
        from ckpt_tool.verify.junit import junit

        return junit([self])

    def markdown(self) -> str:
        return markdown([self])

    def html(self) -> str:
        from ckpt_tool.verify.page import page

        return page([self])

    def render(self, console: Screen) -> None:
        render([self], console)

    def __repr__(self) -> str:
        return f"<{shown(self.title)}: {verdict(self)}; {len(self.findings)} findings>"

    def _repr_html_(self) -> str:
        from ckpt_tool.verify.page import fragment

        return fragment([self])

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each finding."""
        return data_frame(CELLS, map(_cells, self.findings))

    def plot(self, kind: str | None = None, where: str | None = None) -> Drawing:
        """A picture that shows itself in a notebook: of `phases` (distances by layer), `positions`, `kl`,
        `top5`, or the `rows` of a tensor that differ, `where` names which. None: the phases, else the first
        there is."""
        from ckpt_tool.verify.plotting import plot

        return plot(self, kind, where)


@dataclass
class Reports:
    """Several reports with one verdict, in the same forms; `left` are the names of those that an earlier one
    has kept from being made."""

    title: str
    reports: list[Report]
    left: tuple[str, ...] = ()

    @property
    def status(self) -> Verdict:
        states = {r.status for r in self.reports}
        return "fail" if "fail" in states else "undecided" if "undecided" in states or not states else "pass"

    @property
    def exit_code(self) -> int:
        """1 if any found a difference, else 2 if any could not be shown, else 0."""
        return EXIT_CODES[self.status]

    @property
    def headline(self) -> str:
        """How many passed, and the names of those that did not."""
        words = {"fail": "found a difference", "undecided": "could not be shown"}
        named = {w: [r.title for r in self.reports if r.status == s] for s, w in words.items()}
        parts = [f"{sum(r.status == 'pass' for r in self.reports)} of {self._count()} checks passed"]
        parts += [f"{len(names)} {w}: {_few(names)}" for w, names in named.items() if names]
        parts += [f"{len(self.left)} not run: {_few(self.left)}"] if self.left else []
        return "; ".join(parts)

    def _count(self) -> int:
        return len(self.reports) + len(self.left)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "title": shown(self.title),
            "status": self.status,
            "headline": shown(self.headline),
            "not_run": [shown(name) for name in self.left],
            "reports": [r.to_json() for r in self.reports],
        }

    def junit(self) -> str:
        from ckpt_tool.verify.junit import junit

        return junit(self.reports)

    def markdown(self) -> str:
        return markdown(self.reports)

    def html(self) -> str:
        from ckpt_tool.verify.page import page

        return page(self.reports, self.title, self.headline)

    def render(self, console: Screen) -> None:
        render(self.reports, console)

    def __repr__(self) -> str:
        return f"<{shown(self.title)}: {self.status}: {shown(self.headline)}>"

    def _repr_html_(self) -> str:
        from ckpt_tool.verify.page import fragment

        return fragment(self.reports, self.headline)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each finding of each report."""
        rows = [(r.title, *_cells(f)) for r in self.reports for f in r.findings]
        return data_frame(("report", *CELLS), rows)


CELLS = ("level", "check", "status", "where", "measured", "bar", "message")


def _cells(f: Finding) -> tuple[object, ...]:
    return f.level, f.check, f.status, f.where, f.measured, f.bar, f.message


# --- what every form shares -----------------------------------------------------------------------------


def shown(text: object, limit: int = 2000) -> str:
    """`text` without control characters, and without the `::` that begins a command in a CI log."""
    return printable(text, limit).replace("::", ":\\x3a")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


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


def levels(report: Report) -> list[tuple[str, list[Finding]]]:
    return [(level, list(group)) for level, group in groupby(report.findings, key=lambda f: f.level)]


def counts(findings: Iterable[Finding]) -> str:
    states = [f.status for f in findings]
    words = (
        ("pass", "passed"), ("fail", "failed"), ("undecided", "undecided"), ("skipped", "skipped"),
        ("note", "noted"),
    )  # fmt: skip
    return ", ".join(f"{states.count(s)} {w}" for s, w in words if s in states)


def verdict(report: Report) -> str:
    """`pass (bit-identical): the bits and the numbers are those of its source`."""
    known = f" ({report.exactness})" if report.exactness and report.status != "fail" else ""
    return f"{report.status}{known}: {shown(report.headline)}"


def sentence(f: Finding) -> str:
    where = f"{shown(f.where)}: " if f.where else ""
    numbers = f" ({f.numbers()})" if f.numbers() else ""
    return f"{where}{shown(f.message)}{numbers}"


# --- text -----------------------------------------------------------------------------------------------


# Columns that a narrow terminal can do without, in the order in which they stay; JSON and HTML have them all.
SPARE = ("top-1", "KL", "|delta|", "at", "|value|", "|logit|", "loss", "top-5", "noise")
STATUS_WIDTH = 10
CHECK_WIDTH = 24  # a longer name of a check pushes only its own sentence to the right


def render(reports: Sequence[Report], console: Screen) -> None:
    """The report as a person reads it in a terminal; the words carry the verdict, colour only repeats it."""
    for report in reports:
        title = Styled(shown(report.title) + ": ", "bold")
        paragraph(console, verdict(report), first=title, hang=2, style=COLOURS[report.status])
        width = max((len(shown(k)) for k in report.facts), default=0)
        for key, value in report.facts.items():
            paragraph(console, shown(value), first=f"  {shown(key):<{width}}  ")
        for level, findings in levels(report):
            say(console)
            say(console, [Styled(level, "bold"), f"  {counts(findings)}"])
            width = min(CHECK_WIDTH, max(len(shown(f.check)) for f in findings))
            for f in findings:
                status = Styled(f"  {f.status:<{STATUS_WIDTH - 3}} ", COLOURS[f.status])
                head: list[str | Styled] = [status, f"{shown(f.check):<{width}} "]
                paragraph(console, sentence(f), first=head, hang=STATUS_WIDTH + width + 1)
                for table in f.tables:
                    _render_table(table, console)
        say(console)


def _render_table(shown_table: Table, console: Screen) -> None:
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


# --- Markdown -------------------------------------------------------------------------------------------


def markdown(reports: Sequence[Report]) -> str:
    """GitHub Markdown: fit for a job summary or a pull request."""
    out: list[str] = []
    for report in reports:
        out += [f"## {_md(report.title)}: {_md(verdict(report))}", ""]
        out += [f"- {_md(k)}: {_md(v)}" for k, v in report.facts.items()]
        for level, findings in levels(report):
            out += ["", f"### {_md(level)}: {counts(findings)}", ""]
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
