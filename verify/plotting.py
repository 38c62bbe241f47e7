"""`report.plot()`: one picture of a report, as an object that shows itself in a notebook and can be kept."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckpt_tool.errors import fail
from ckpt_tool.verify.page import STYLE, within
from ckpt_tool.verify.pictures import HISTOGRAM, KINDS, drawings, picture
from ckpt_tool.verify.report import Report

KL = "kl"  # of tokens, how many have which: the picture of a table, too
PHASES = "phases"  # distances by phase, or changes by part: the pictures of tables


@dataclass(frozen=True)
class Drawing:
    """A picture and what it is of. `svg` stands alone; `save` writes it."""

    kind: str
    where: str | None
    figure: str  # with its caption, for a page that has the style

    @property
    def svg(self) -> str:
        found = re.search(r'<svg class="c" viewBox="([0-9 ]+)".*</svg>', self.figure, re.DOTALL)
        assert found is not None
        size = found[1].split()
        name = "http://www.w3.org/2000/svg"
        return (
            f'<svg xmlns="{name}" viewBox="{found[1]}" width="{size[2]}" height="{size[3]}" '
            f'class="ckpt-tool"><style>{STYLE}</style>{found[0]}</svg>'
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """As an SVG file."""
        Path(path).write_text(self.svg + "\n", encoding="utf-8")

    def _repr_html_(self) -> str:
        return within(self.figure)

    def __repr__(self) -> str:
        of = f" of {self.where}" if self.where else ""
        return f"<drawing {self.kind}{of}: {len(self.svg):,} bytes of SVG>"


def plot(report: Report, kind: str | None = None, where: str | None = None) -> Drawing:
    """The first picture of that kind, and of that tensor or head; None: of any, best of the phases. `usage`
    where there is none."""
    made = sorted(_all(report), key=lambda d: kind is None and d.kind != PHASES)
    fitting = (d for d in made if kind in (None, d.kind) and where in (None, d.where))
    found = next(fitting, None)
    if found is None:
        there = ", ".join(dict.fromkeys(f"{d.kind} of {d.where}" if d.where else d.kind for d in made))
        hint = "the level parity, and tensors that differ, have pictures"
        wanted = f"a picture {f'called {kind}' if kind else 'of any kind'}" + (
            f" of {where}" if where else ""
        )
        fail(
            "usage", f"expected {wanted}, found {there or 'none'}", where="plot", hint=None if made else hint
        )
    return found


def _all(report: Report) -> Iterator[Drawing]:
    for f in report.findings:
        for table in f.tables:
            if drawn := picture(table):
                yield Drawing(KL if table.columns == HISTOGRAM else PHASES, f.where, drawn)
        for kind in KINDS:
            for drawn in drawings({k: v for k, v in f.drawn.items() if k == kind}):
                yield Drawing(kind, f.where, drawn)
