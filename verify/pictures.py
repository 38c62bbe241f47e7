"""Tables of a report as pictures: plain SVG inside the page, with no script and nothing that is loaded. What
a picture shows stands in the table below it, so that nobody needs to see it."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence

from ckpt_tool.errors import printable
from ckpt_tool.verify.report import Table

WIDTH, HEIGHT = 720, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34
LABELS = 16  # names below the axis, before some are left out
Cell = str | float | None


def picture(table: Table) -> str:
    """The picture of a table that has one, else nothing: distances by phase with their bars and noise, or
    changes by part."""
    columns = table.columns
    if columns[:3] == ("phase", "NMSE", "bar"):
        noise = columns.index("noise") if "noise" in columns else None
        return _chart(table.rows, 1, bar=2, noise=noise, what="NMSE")
    if columns[:3] == ("part", "differ", "relative change"):
        return _chart(table.rows, 2, what="relative change")
    return ""


def _chart(
    rows: Sequence[tuple[Cell, ...]],
    value: int,
    *,
    what: str,
    bar: int | None = None,
    noise: int | None = None,
) -> str:
    """One column for each row on a logarithmic axis; 0 stands on the ground. What is over its bar is red."""
    values = [_number(r[value]) for r in rows]
    bars = [_number(r[bar]) if bar is not None else 0.0 for r in rows]
    floors = [_number(r[noise]) if noise is not None else 0.0 for r in rows]
    known = [v for v in (*values, *bars, *floors) if 0 < v < math.inf]
    if len(rows) < 2 or not known:
        return ""
    low, high = math.floor(math.log10(min(known))) - 1, math.ceil(math.log10(max(known)))
    high = max(high, low + 1) + any(map(math.isinf, values))
    step = (WIDTH - LEFT - RIGHT) / len(rows)

    def y(v: float) -> float:
        at = low if v <= 0 else high if math.isinf(v) else math.log10(v)
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(max(at, low), high)) / (high - low)

    def x(k: int) -> float:
        return LEFT + step * k

    parts = [*_grid(low, high, y)]
    for k, v in enumerate(values):
        wrong = bar is not None and v > bars[k]
        shade = "bad" if wrong else "good" if bar is not None else "bad" if v > 0 else "good"
        top = min(y(v), y(0) - 2)  # what is equal has a foot, too
        title = f"{_name(rows[k][0])}: {what} {v:.3g}" + (f", bar {bars[k]:.3g}" if bar is not None else "")
        parts.append(
            f'<rect class="{shade}" x="{x(k) + step * 0.15:.1f}" y="{top:.1f}" width="{step * 0.7:.1f}" '
            f'height="{y(0) - top:.1f}"><title>{html.escape(title)}</title></rect>'
        )
    parts += _steps("bar", bars, x, y, step) if bar is not None else []
    parts += _steps("noise", floors, x, y, step) if noise is not None else []
    parts += _names(rows, x, step)
    words = f"{what} by {'phase' if bar is not None else 'part'}, logarithmic"
    words += "; line: bar" if bar is not None else ""
    words += "; dotted: noise floor" if noise is not None else ""
    return (
        f'<figure><svg class="c" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(words)}">'
        f"{''.join(parts)}</svg><figcaption>{html.escape(words)}</figcaption></figure>"
    )


def _number(cell: Cell) -> float:
    if isinstance(cell, str):  # how JSON and tables spell what is not finite
        return math.inf
    return math.inf if cell is None or math.isnan(cell) else float(cell)


def _name(cell: Cell) -> str:
    return printable("" if cell is None else cell, 60)


def _grid(low: int, high: int, y: Callable[[float], float]) -> Iterable[str]:
    every = max(1, math.ceil((high - low) / 6))
    for power in range(high, low, -every):
        at = y(10.0**power)
        yield f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>'
    ground = y(0)
    yield f'<line class="a" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{ground:.1f}" y2="{ground:.1f}"/>'
    yield f'<text x="{LEFT - 6}" y="{ground + 4:.1f}" text-anchor="end">0</text>'


def _steps(
    kind: str, values: Sequence[float], x: Callable[[int], float], y: Callable[[float], float], step: float
) -> Iterable[str]:
    """A line of steps, one above each column."""
    path = " ".join(
        f"{'M' if k == 0 else 'L'}{x(k):.1f} {y(v):.1f} L{x(k) + step:.1f} {y(v):.1f}"
        for k, v in enumerate(values)
    )
    yield f'<path class="{kind}" d="{path}"/>'


def _names(rows: Sequence[tuple[Cell, ...]], x: Callable[[int], float], step: float) -> Iterable[str]:
    every = max(1, math.ceil(len(rows) / LABELS))
    for k in range(0, len(rows), every):
        name = _name(rows[k][0]).removeprefix("layer ").rpartition(".")[2][:9]
        place = f'x="{x(k) + step / 2:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle"'
        yield f"<text {place}>{html.escape(name)}</text>"
