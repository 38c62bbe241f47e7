"""Findings as pictures: plain SVG inside the page, with no script and nothing that is loaded. What a picture
shows also stands in words or in a table beside it, so that nobody needs to see it."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ckpt_tool.errors import printable
from ckpt_tool.verify.report import Table, number

WIDTH, HEIGHT = 720, 220
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 18, 36
LABELS = 16  # names below the axis, before some are left out; a narrow screen shows every second one
MARKED = 60  # columns that are wide enough for a sign above them
TOKEN = 13  # letters of a token that fit beside its bar
LINE = 24  # units from one token to the next
HISTOGRAM = ("KL from", "to", "tokens")
Cell = str | float | None
Scale = Callable[[float], float]


def picture(table: Table) -> str:
    """The picture of a table that has one, else nothing: distances by phase with their bars and noise,
    changes by part, or how many tokens have which KL."""
    columns = table.columns
    if columns[:3] == ("phase", "NMSE", "bar"):
        noise = columns.index("noise") if "noise" in columns else None
        return _chart(table.rows, 1, bar=2, noise=noise, what="NMSE")
    if columns[:3] == ("part", "differ", "relative change"):
        return _chart(table.rows, 2, what="relative change")
    if columns == HISTOGRAM:
        return _histogram(table.rows)
    return ""


def drawings(drawn: Mapping[str, Any]) -> Iterator[str]:
    """The pictures that a finding brings data for, in the order of `KINDS`."""
    for kind, draw in KINDS.items():
        if kind in drawn and (made := draw(drawn[kind])):
            yield made


def _figure(parts: Iterable[str], words: str, height: int = HEIGHT, caption: str | None = None) -> str:
    label = html.escape(printable(words, 1000))
    return (
        f'<figure><svg class="c" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg><figcaption>{caption or label}</figcaption></figure>"
    )


# --- columns on a logarithmic axis ----------------------------------------------------------------------


def _chart(
    rows: Sequence[tuple[Cell, ...]],
    value: int,
    *,
    what: str,
    bar: int | None = None,
    noise: int | None = None,
) -> str:
    """One column for each row; 0 stands on the ground. What is over its bar is red, and has a cross."""
    values = [_number(r[value]) for r in rows]
    bars = [_number(r[bar]) if bar is not None else 0.0 for r in rows]
    floors = [_number(r[noise]) if noise is not None else 0.0 for r in rows]
    axis = _axis([*values, *bars, *floors])
    if len(rows) < 2 or axis is None:
        return ""
    low, high, y = axis
    step = (WIDTH - LEFT - RIGHT) / len(rows)

    def x(k: float) -> float:
        return LEFT + step * k

    parts = [*_grid(low, high, y)]
    over = []
    for k, v in enumerate(values):
        wrong = bar is not None and v > bars[k]
        over += [_name(rows[k][0])] if wrong else []
        shade = "bad" if wrong else "good" if bar is not None else "bad" if v > 0 else "good"
        top = min(y(v), y(0) - 2)  # what is equal has a foot, too
        title = f"{_name(rows[k][0])}: {what} {v:.3g}" + (f", bar {bars[k]:.3g}" if bar is not None else "")
        parts.append(
            f'<rect class="{shade}" x="{x(k) + step * 0.15:.1f}" y="{top:.1f}" width="{step * 0.7:.1f}" '
            f'height="{y(0) - top:.1f}"><title>{html.escape(title)}</title></rect>'
        )
        if wrong and len(rows) <= MARKED:
            parts.append(_text(x(k + 0.5), top - 4, "×", "middle", "wrong"))
    parts += _steps("bar", bars, x, y, step) if bar is not None else []
    parts += _steps("noise", floors, x, y, step) if noise is not None else []
    parts += _names([_name(r[0]) for r in rows], x, step)
    words = f"{what} by {'phase' if bar is not None else 'part'}, logarithmic"
    words += "; line: bar" if bar is not None else ""
    words += "; dotted: noise floor" if noise is not None else ""
    words += f"; over the bar: {', '.join(over[:6])}{' ...' if len(over) > 6 else ''}" if over else ""
    return _figure(parts, words)


def _axis(values: Iterable[float]) -> tuple[int, int, Scale] | None:
    """The powers of ten below and above what is to be seen, and where a value stands between them."""
    seen = list(values)
    known = [v for v in seen if 0 < v < math.inf]
    if not known:
        return None
    low, high = math.floor(math.log10(min(known))) - 1, math.ceil(math.log10(max(known)))
    high = max(high, low + 1) + any(map(math.isinf, seen))

    def y(v: float) -> float:
        at = low if v <= 0 else high if math.isinf(v) else math.log10(v)
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(max(at, low), high)) / (high - low)

    return low, high, y


def _number(cell: Cell) -> float:
    if isinstance(cell, str):  # how JSON and tables spell what is not finite
        return math.inf
    return math.inf if cell is None or math.isnan(cell) else float(cell)


def _name(cell: Cell) -> str:
    return printable("" if cell is None else cell, 60)


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    group = f'class="{kind}" ' if kind else ""
    return f'<text {group}x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _grid(low: int, high: int, y: Scale) -> Iterator[str]:
    every = max(1, math.ceil((high - low) / 6))
    for power in range(high, low, -every):
        at = y(10.0**power)
        yield f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        if at < HEIGHT - BOTTOM - 16:  # beside the 0 there is no room
            yield _text(LEFT - 6, at + 4, f"1e{power}", "end")
    yield _ground()
    yield _text(LEFT - 6, HEIGHT - BOTTOM + 4, "0", "end")


def _ground() -> str:
    at = HEIGHT - BOTTOM
    return f'<line class="a" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'


def _steps(kind: str, values: Sequence[float], x: Scale, y: Scale, step: float) -> Iterator[str]:
    """A line of steps, one above each column."""
    path = " ".join(
        f"{'M' if k == 0 else 'L'}{x(k):.1f} {y(v):.1f} L{x(k) + step:.1f} {y(v):.1f}"
        for k, v in enumerate(values)
    )
    yield f'<path class="{kind}" d="{path}"/>'


def _names(names: Sequence[str], x: Scale, step: float) -> Iterator[str]:
    every = max(1, math.ceil(len(names) / LABELS))
    for k in range(0, len(names), every):
        name = names[k].removeprefix("layer ").rpartition(".")[2][:9]
        spare = "spare" if (k // every) % 2 else ""
        yield _text(x(k) + step / 2, HEIGHT - BOTTOM + 20, name, "middle", spare)


# --- positions of a prompt ------------------------------------------------------------------------------


def _positions(drawn: Mapping[str, Any]) -> str:
    """The largest |difference| of any logit, position by position; each mark is that of `every` of them."""
    values = [_number(v) for v in drawn["delta"]]
    bar, every, tokens = _number(drawn["bar"]), int(drawn["every"]), int(drawn["tokens"])
    axis = _axis([*values, bar])
    if axis is None or not values:
        return ""
    low, high, y = axis
    step = (WIDTH - LEFT - RIGHT) / len(values)
    ground, thick = y(0), max(1.0, min(step * 0.8, 12.0))
    lines: dict[str, list[str]] = {"good": [], "bad": []}
    for k, v in enumerate(values):
        kind = "bad" if v > bar else "good"
        lines[kind].append(f"M{LEFT + step * (k + 0.5):.1f} {ground:.1f}V{min(y(v), ground - 2):.1f}")
    parts = [*_grid(low, high, y)]
    for kind, marks in lines.items():
        style = f"stroke:var(--{kind});stroke-width:{thick:.1f}"
        parts += [f'<path style="{style}" d="{"".join(marks)}"/>'] if marks else []
    parts.append(f'<path class="bar" d="M{LEFT} {y(bar):.1f}H{WIDTH - RIGHT}"/>')
    for at in sorted({0, tokens // 4, tokens // 2, 3 * tokens // 4, tokens - 1}):
        anchor = "end" if at == tokens - 1 else "middle"
        parts.append(_text(LEFT + (at + 0.5) * step / every, HEIGHT - BOTTOM + 20, str(at), anchor))
    over = sum(v > bar for v in values)
    each = "" if every == 1 else f", the largest of every {every}"
    words = f"largest |logit difference| by position of prompt {drawn['prompt']} ({tokens} tokens){each}"
    words += f", logarithmic; line: bar; {over} of {len(values)} marks are over it"
    return _figure(parts, words)


# --- how many tokens have which KL ----------------------------------------------------------------------


def _histogram(rows: Sequence[tuple[Cell, ...]]) -> str:
    """Columns of counts, one for each power of ten, 0 before them and what is not finite after them."""
    counts = [int(_number(n)) for _, _, n in rows]
    names = [f"1e{round(math.log10(v))}" if 0 < (v := _number(r[0])) < math.inf else f"{v:g}" for r in rows]
    if not counts or not max(counts):
        return ""
    step = (WIDTH - LEFT - RIGHT) / len(counts)
    room = HEIGHT - TOP - BOTTOM

    def x(k: float) -> float:
        return LEFT + step * k

    parts = [_ground()]
    for k, n in enumerate(counts):
        tall = room * n / max(counts)
        top = HEIGHT - BOTTOM - (max(tall, 2.0) if n else 0)
        title = f"{names[k]}: {n} tokens"
        parts.append(
            f'<rect class="own" x="{x(k + 0.1):.1f}" y="{top:.1f}" width="{step * 0.8:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{html.escape(title)}</title></rect>'
        )
        parts += [_text(x(k + 0.5), top - 4, f"{n:,}", "middle")] if n else []
    parts += _names(names, x, step)
    words = (
        f"{sum(counts):,} tokens of all prompts by their KL(source || output) in nats; a column has those "
        "from its power of ten up"
    )
    return _figure(parts, words)


# --- the five most probable tokens ----------------------------------------------------------------------


def _top5(drawn: Mapping[str, Any]) -> str:
    """Both sides' tokens with their probabilities, at the positions where they differ most."""
    shown = list(drawn["positions"])
    if not shown:
        return ""
    parts: list[str] = []
    known = [_number(t["p"]) for p in shown for side in ("original", "converted") for t in p[side]]
    most = max(filter(math.isfinite, known), default=1.0)
    at = 0
    for place in shown:
        at += LINE + 6
        parts.append(_text(4, at, f"{place['prompt']}[{place['position']}]", kind="t"))
        parts += [_text(150, at, "original"), _text(510, at, "converted")]
        sides = [list(place["original"]), list(place["converted"])]
        ids = [{t["id"] for t in side} for side in sides]
        for side, other, left, kind in ((0, 1, 4, "own"), (1, 0, 364, "other")):
            for k, token in enumerate(sides[side]):
                y = at + LINE * (k + 1)
                missing = token["id"] not in ids[other]
                parts.append(_text(left, y, _token(token), kind="wrong" if missing else "t"))
                likely = _number(token["p"])  # not finite where the other side's logits are none
                width = max(1.0, 130 * min(1.0, likely / most))
                parts.append(
                    f'<rect class="{"bad" if missing else kind}" x="{left + 146}" y="{y - 11}" '
                    f'width="{width:.1f}" height="12"/>'
                )
                parts.append(
                    _text(left + 152 + width, y, f"{likely:.2g}" if math.isfinite(likely) else "no number")
                )
        at += LINE * 5
    of = int(drawn["of"])
    words = (
        f"the five most probable tokens of original and converted at {len(shown)} of {of:,} positions where "
        "they differ, the largest difference first; bars: probabilities; red: not among the other side's five"
    )
    table = "; ".join(
        f"{p['prompt']}[{p['position']}]: "
        + " against ".join(", ".join(map(_token, p[side])) for side in ("original", "converted"))
        for p in shown
    )
    return _figure(parts, f"{words}: {table}", at + 12, html.escape(words))


def _token(token: Mapping[str, Any]) -> str:
    """As a tokenizer spells it, else its number."""
    word = token.get("word")
    text = f"#{token['id']}" if word is None else repr(printable(word, 40))
    return text if len(text) <= TOKEN else f"{text[: TOKEN - 1]}…"


# --- the rows of a tensor that differ -------------------------------------------------------------------


def _rows(drawn: Mapping[str, Any]) -> str:
    """A strip as long as the tensor has rows, with a mark at each run of rows that differ."""
    total, every = int(drawn["of"]), int(drawn["every"])
    if total < 2:
        return ""
    height, top, tall = 64, 8, 30
    scale = (WIDTH - 8) / total
    parts = [f'<rect class="same" x="4" y="{top}" width="{WIDTH - 8}" height="{tall}"/>']
    for first, stop in drawn["runs"]:
        wide = max(0.5, (stop - first) * scale)
        parts.append(
            f'<rect class="bad" x="{4 + first * scale:.1f}" y="{top}" width="{wide:.1f}" height="{tall}"/>'
        )
    parts += [_text(4, height - 6, "row 0"), _text(WIDTH - 4, height - 6, f"{total - 1:,}", "end")]
    worst = ", ".join(f"{int(row):,} ({number(_number(far))})" for row, far in drawn["worst"])
    words = f"rows that differ: {int(drawn['count']):,} of {total:,}"
    words += f", seen by {every} at a time" if every > 1 else f", in {len(drawn['runs'])} runs"
    words += f"; worst first: {worst}" if worst else ""
    return _figure(parts, words, height)


KINDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "positions": _positions,
    "top5": _top5,
    "rows": _rows,
}
