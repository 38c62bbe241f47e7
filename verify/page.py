"""Reports as one HTML page, or as the output of a notebook's cell: nothing is loaded, no script runs, and
names that nobody vouches for stay text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from ckpt_tool.verify.pictures import drawings, picture
from ckpt_tool.verify.report import Finding, Report, Table, cell, counts, levels, number, shown, verdict

FOLDED_ROWS = 12  # of a table, before the page folds it
PLANTED = "planted in"  # the first column of the table of planted mistakes, which is folded

BODY = """
body{max-width:76rem;margin:2rem auto;padding:0 1rem;background:#fff}
@media(max-width:40rem){body{margin:1rem auto}}
@media(prefers-color-scheme:dark){body{background:#0d1117}}
"""
# Inside of what it styles, so that it leaves a notebook around it alone. Text has a contrast of 4.5 or more.
STYLE = """
.ckpt-tool{--text:#1c1e21;--page:#fff;--quiet:#57606a;--line:#dde1e6;--axis:#6e7781;--good:#1a7f37;
--bad:#cf222e;--open:#8a5a00;--note:#0969da;--mark:#0969da;--other:#8250df;
font:15px/1.5 system-ui,sans-serif;color:var(--text);background:var(--page);
h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .4rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
p.verdict{font-size:1.15rem;border-left:.3rem solid;padding:.3rem .8rem;margin:.4rem 0 1rem;
overflow-wrap:anywhere}
a{color:var(--note)}
figure{margin:.6rem 0 1rem}figcaption{color:var(--quiet);font-size:.8rem}
svg.c{width:100%;max-width:45rem;height:auto;display:block}
svg.c text{font:12px system-ui,sans-serif;fill:var(--quiet)}svg.c .g{stroke:var(--line)}
svg.c .a{stroke:var(--axis)}svg.c .good{fill:var(--good)}svg.c .bad{fill:var(--bad)}
svg.c .same{fill:var(--line)}svg.c .own{fill:var(--mark)}svg.c .other{fill:var(--other)}
svg.c path{fill:none;stroke:var(--text);stroke-width:1.5}svg.c path.noise{stroke:var(--axis);
stroke-dasharray:2 3}
svg.c text.t{fill:var(--text);font-size:13px}svg.c text.wrong{fill:var(--bad)}
summary{cursor:pointer;color:var(--quiet);font-size:.85rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;margin:.3rem 0 .8rem;width:100%}
td,th{padding:.25rem .6rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:break-word}
table.f{table-layout:fixed}.f>tbody>tr>th:nth-child(1){width:5.4rem}
.f>tbody>tr>th:nth-child(2){width:8.5rem}.f>tbody>tr>th:nth-child(n+4){width:5.4rem;text-align:right}
.f>tbody>tr>td{overflow-wrap:anywhere}.d td{overflow-wrap:normal}
th{font-weight:600;color:var(--quiet);white-space:nowrap}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.w{font-family:ui-monospace,monospace;font-size:.85rem}.s{font-weight:600;white-space:nowrap}
.pass{color:var(--good)}.fail{color:var(--bad)}.skipped,.undecided{color:var(--open)}.note{color:var(--note)}
table.d{width:auto;font-size:.8rem}table.d td,table.d th{padding:.2rem .4rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 1rem}
dt{color:var(--quiet)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:40rem){dl{display:block}dd{margin:0 0 .4rem}
svg.c text,svg.c text.t{font-size:20px}svg.c .spare{display:none}
table.f,.f>tbody,.f>tbody>tr,.f>tbody>tr>td{display:block;text-align:left}
.f>tbody>tr:first-child{display:none}.f>tbody>tr>td{border:0;padding:.1rem 0}
.f>tbody>tr>td[title]:not(:empty)::before{content:attr(title) " ";color:var(--quiet)}
.f>tbody>tr{border-bottom:1px solid var(--axis);padding:.4rem 0}}
@media(prefers-color-scheme:dark){--text:#e6edf3;--page:#0d1117;--quiet:#9198a1;--line:#30363d;
--axis:#8b949e;--good:#3fb950;--bad:#ff6a61;--open:#d29922;--note:#58a6ff;--mark:#58a6ff;--other:#bc8cff}
}
"""


def page(reports: Sequence[Report], title: str | None = None, headline: str = "") -> str:
    """One HTML file that loads nothing: no script, no font, no image, and a policy that forbids them.
    `headline` is the verdict over several reports."""
    name = title or (reports[0].title if reports else "verification")
    body = [f"<h1>{_h(name)}</h1>"]
    several = title is not None
    if several:
        body += _summary(reports, headline)
    for k, report in enumerate(reports):
        body += _report(report, f"check-{k}", heading=several or name != report.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{_h(name)}</title><style>{BODY}{STYLE}</style></head><body><main class="ckpt-tool">\n'
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def fragment(reports: Sequence[Report], headline: str = "") -> str:
    """The same as the output of a notebook's cell."""
    body = [*_summary(reports, headline)] if headline else []
    for k, report in enumerate(reports):
        body += _report(report, f"check-{k}", heading=len(reports) > 1)
    return within("\n".join(body))


def within(body: str) -> str:
    """HTML with the style of the page, which reaches no further."""
    return f'<div class="ckpt-tool"><style>{STYLE}</style>\n{body}\n</div>'


def _summary(reports: Sequence[Report], headline: str) -> Iterable[str]:
    """A table of the reports, each a link to its own part of the page."""
    yield f"<p>{_h(headline)}</p><table class='f'>"
    yield "<tr><th></th><th>check</th><th>what was shown</th><th>class</th><th>seconds</th></tr>"
    for k, report in enumerate(reports):
        seconds = sum(report.seconds.values())
        yield (
            f'<tr><td class="s {report.status}">{report.status}</td>'
            f'<td><a href="#check-{k}">{_h(report.title)}</a></td><td>{_h(report.headline)}</td>'
            f"<td>{_h(report.exactness or '')}</td>"
            f'<td class="n" title="seconds">{seconds:.1f}</td></tr>'
        )
    yield "</table>"


def _report(report: Report, anchor: str, *, heading: bool) -> Iterable[str]:
    yield f'<section id="{anchor}">'
    if heading:
        yield f"<h2>{_h(report.title)}</h2>"
    yield f'<p class="verdict {report.status}">{_h(verdict(report))}</p>'
    yield _pairs(report.facts)
    for level, findings in levels(report):
        took = f", {report.seconds[level]:.1f} s" if level in report.seconds else ""
        yield f"<h3>{_h(level)}: {counts(findings)}{took}</h3><table class='f'>"
        yield "<tr><th></th><th>check</th><th>finding</th><th>measured</th><th>bar</th></tr>"
        yield from map(_finding, findings)
        yield "</table>"
    if report.provenance:
        yield f"<details><summary>provenance</summary>{_pairs(report.provenance)}</details>"
    yield "</section>"


def _pairs(values: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{_h(k)}</dt><dd>{_h(v)}</dd>" for k, v in values.items()) + "</dl>"


def _finding(f: Finding) -> str:
    where = f'<div class="w">{_h(f.where)}</div>' if f.where else ""
    values = "".join(
        f'<td class="n" title="{label}">{"" if x is None else _h(number(x))}</td>'
        for label, x in (("measured", f.measured), ("bar", f.bar))
    )
    below = [*map(_html_table, f.tables), *drawings(f.drawn)]
    return (
        f'<tr><td class="s {f.status}">{f.status}</td><td>{_h(f.check)}</td>'
        f"<td>{_h(f.message)}{where}{''.join(below)}</td>{values}</tr>"
    )


def _html_table(table: Table) -> str:
    drawn = picture(table)
    made = f'<div class="scroll">{plain_table(table.columns, table.rows)}</div>'
    if len(table.rows) <= FOLDED_ROWS and table.columns[0] != PLANTED:
        return drawn + made
    words = "planted mistakes" if table.columns[0] == PLANTED else "rows"
    return f"{drawn}<details><summary>{len(table.rows)} {words}</summary>{made}</details>"


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> str:
    head = "".join(f"<th>{_h(c)}</th>" for c in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td{'' if isinstance(x, str) else ' class=n'}>{_h(cell(x))}</td>" for x in row)
        + "</tr>"
        for row in rows
    )
    return f'<table class="d"><tr>{head}</tr>{body}</table>'


def _h(text: str) -> str:
    return html.escape(shown(text), quote=True)
