"""Reports as JUnit XML. Source: junit-10.xsd of the Jenkins xUnit plugin, which says what elements and
attributes there are, and that times have at most three decimals."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence

from ckpt_tool.verify.report import Finding, Report, cell, shown
from ckpt_tool.verify.timing import OTHER


def junit(reports: Sequence[Report]) -> str:
    """One test suite for each report, one test case for each finding, and one for the verdict, which is an
    error where it could not be shown; notes are passing cases with output. The time of a level stands at its
    first case, what is no level's at the verdict, and that of a report at its suite."""
    root = ET.Element("testsuites")
    several = len(reports) > 1
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
            time=_time(sum(report.seconds.values())),
        )
        properties = ET.SubElement(suite, "properties")
        seconds = {f"seconds {level}": _time(s) for level, s in report.seconds.items()}
        for key, value in (report.facts | seconds).items():
            ET.SubElement(properties, "property", name=shown(key), value=shown(value))
        names: Counter[tuple[str, str]] = Counter()
        untold = dict(report.seconds)
        prefix = shown(report.title) if several else "verify"
        for f in report.findings:
            _case(suite, f"{prefix}.{shown(f.level)}", f, names, untold.pop(f.level, 0.0))
        verdict = ET.SubElement(
            suite, "testcase", classname=prefix, name="verdict", time=_time(untold.pop(OTHER, 0.0))
        )
        if report.status != "pass":
            failed = report.status == "fail"
            kind = "difference" if failed else _kind(report)
            tag = "failure" if failed else "error"
            ET.SubElement(verdict, tag, message=shown(report.headline), type=shown(kind))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ET.Element, group: str, f: Finding, names: Counter[tuple[str, str]], seconds: float) -> None:
    """One finding; what has the name of an earlier one gets a number, since a reader takes both for one."""
    name = shown(f.check) + (f" [{shown(f.where)}]" if f.where else "")
    names[group, name] += 1
    again = names[group, name]
    case = ET.SubElement(
        suite,
        "testcase",
        classname=group,
        name=name if again == 1 else f"{name} ({again})",
        time=_time(seconds),
    )
    text = shown(f.message) + (f" ({f.numbers()})" if f.numbers() else "")
    if f.status == "fail":
        ET.SubElement(case, "failure", message=text, type="difference").text = _table_text(f)
    elif f.status in ("skipped", "undecided"):
        ET.SubElement(case, "skipped", message=text)
    else:
        ET.SubElement(case, "system-out").text = "\n".join(x for x in (text, _table_text(f)) if x)


def _kind(report: Report) -> str:
    """Why it could not be shown: the kind of the error that ended it, where one has."""
    kinds = (f.data.get("kind") for f in report.findings if report.could_not_run)
    return next((str(k) for k in kinds if k), "undecided")


def _time(seconds: float) -> str:
    return f"{seconds:.3f}"


def _table_text(f: Finding) -> str:
    lines = [" | ".join(cell(x) for x in row) for t in f.tables for row in (t.columns, *t.rows)]
    return "\n".join(lines)
