"""Pictures of a report's tables: well-formed, self-contained, and of what the table says."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

from ckpt_tool.verify.page import page
from ckpt_tool.verify.pictures import picture
from ckpt_tool.verify.report import Finding, Report, Table

COLUMNS = ("phase", "NMSE", "bar", "noise", "|delta|", "bar", "|value|", "at", "")


def table(values: list[float], bar: float = 1e-10) -> Table:
    names = ["embed", *(f"layer {k}" for k in range(len(values) - 2)), "head"]
    rows = [(n, v, bar, bar / 100, v, bar, 1.0, "short[1]", "") for n, v in zip(names, values, strict=True)]
    return Table(COLUMNS, tuple(rows))


def rectangles(drawn: str) -> list[tuple[str, float, str]]:
    """(class, height, title) of each column."""
    root = ET.fromstring(drawn)
    found = [e for e in root.iter() if e.tag.endswith("rect")]
    return [(e.attrib["class"], float(e.attrib["height"]), "".join(e.itertext())) for e in found]


def test_what_is_over_its_bar_is_red_and_higher_than_its_line() -> None:
    drawn = rectangles(picture(table([0.0, 1e-13, 1e-3, math.inf, 5e-12])))
    assert [kind for kind, _, _ in drawn] == ["good", "good", "bad", "bad", "good"]
    heights = [height for _, height, _ in drawn]
    assert heights[3] > heights[2] > heights[4] > heights[1] > heights[0] > 0
    assert drawn[2][2] == "layer 1: NMSE 0.001, bar 1e-10"


def test_a_hundred_layers_and_hostile_names_stay_a_picture() -> None:
    rows = tuple(
        (f"<layer {k}&\x07", 10.0 ** -(k % 9), 1e-4, 1e-6, 0.0, 0.0, 1.0, "", "") for k in range(100)
    )
    drawn = picture(Table(COLUMNS, rows))
    assert len(rectangles(drawn)) == 100
    assert drawn.count("<text") < 40


def test_tables_without_a_picture_and_of_nothing_have_none() -> None:
    assert picture(Table(("a", "b"), (("x", 1.0),))) == ""
    assert picture(Table(COLUMNS, ())) == ""
    assert picture(table([0.0, 0.0, 0.0], bar=0.0)) == ""


def test_the_page_holds_the_picture_folds_long_tables_and_loads_nothing() -> None:
    report = Report("r")
    report.findings.append(Finding("parity", "lockstep", "fail", "x", tables=(table([1e-3] * 20),)))
    text = page([report])
    assert text.count("<svg") == 1 and text.count("<details>") == 1 and "20 rows" in text
    assert text.index('class="verdict fail"') < text.index("<svg")
    assert "<script" not in text and "http://" not in text and "https://" not in text
    assert "default-src 'none'" in text


def test_changes_by_part_are_drawn_too() -> None:
    rows = (("layer 0", "1 of 9", 0.02, 0.1), ("layer 1", "0 of 9", 0.0, 0.0))
    drawn = rectangles(picture(Table(("part", "differ", "relative change", "max |delta|"), rows)))
    assert [kind for kind, _, _ in drawn] == ["bad", "good"]
