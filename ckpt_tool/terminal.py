"""Text for a terminal of a given width: paragraphs with a hanging indent and tables whose cells stay whole.

Lines carry no trailing blanks and are never wider than asked, short of a single number or word that is. Long
names break at dots and slashes; numbers never break. A table that is too wide first loses the columns that
its caller can spare, then folds its text columns.

On a terminal rich draws. Anywhere else there are lines without colours, and rich, which takes 15 ms to load,
is asked about what it alone knows: wide letters, and text that is not of letters.
"""

from __future__ import annotations

import builtins
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, TypeAlias

from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_WIDTH = 80
NARROWEST = 40  # columns; below it nothing can be laid out
GAP = 2  # blanks between columns
FOLDED = 16  # a column of text is not folded to less

# Where a long word may go on in the next line, best places first: after a slash or before a single dot (not
# in `{0..31}`) that a letter or `{` follows, so that no number is cut; then after a comma and before an
# underscore.
_BREAKS = (
    re.compile(r"(?<=/)(?!$)|(?<=[\w}])(?=\.[A-Za-z_{])"),
    re.compile(r"(?<=,)(?=[^\W\d])|(?<=\w)(?=_[A-Za-z])"),
)


# Of the environment: with any of them rich may take for a terminal what is none.
FORCING = ("FORCE_COLOR", "TTY_COMPATIBLE")
_LEFT_OUT = dict.fromkeys(map(ord, "\a\b\v\f\r"))  # which rich shows of no text


@dataclass(frozen=True)
class Styled:
    """Text in one of rich's styles."""

    text: str
    style: str


Line = str | Styled | Sequence[str | Styled]


class Plain:
    """A console where no terminal is."""

    is_terminal = False

    def __init__(self, *, stderr: bool, width: int) -> None:
        self.stderr, self.width = stderr, width

    @property
    def file(self) -> IO[str]:
        return sys.stderr if self.stderr else sys.stdout

    def print(self, text: str, *, style: str = "", markup: bool = True, soft_wrap: bool = False) -> None:
        """What rich prints, which is asked where that may be other text: words between colons become emoji
        (without `markup` too), brackets are styles, and what is too wide is folded."""
        rare = text.count(":") > 1 or (markup and "[" in text) or not text.isprintable()
        if rare or not (soft_wrap or cell_len(text) <= self.width):
            self.rich().print(text, style=style, markup=markup, soft_wrap=soft_wrap)
        else:
            self.write(text)

    def write(self, line: str) -> None:
        self.file.write(line + "\n")
        self.file.flush()

    def rich(self) -> Console:
        """The console that it stands for."""
        return _rich(stderr=self.stderr, width=self.width)


Screen: TypeAlias = "Console | Plain"


def consoles() -> tuple[Screen, Screen]:
    """Consoles on stdout and stderr, of rich where a terminal is. The width is the terminal's, else that of
    COLUMNS, else 80, so that output redirected to a file is the same everywhere."""
    return _console(stderr=False), _console(stderr=True)


def _console(*, stderr: bool) -> Screen:
    stream = sys.stderr if stderr else sys.stdout
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if re.fullmatch(r"[1-9][0-9]{0,3}", columns, re.ASCII) else None
    if stream.isatty():
        return _rich(stderr=stderr, width=width)
    width = DEFAULT_WIDTH if width is None else width
    if any(name in os.environ for name in FORCING) or hasattr(builtins, "get_ipython"):
        return _rich(stderr=stderr, width=width)
    return Plain(stderr=stderr, width=width)


def _rich(*, stderr: bool, width: int | None) -> Console:
    from rich.console import Console

    if os.environ.get("NO_COLOR"):
        return Console(stderr=stderr, width=width, highlight=False, color_system=None)
    return Console(stderr=stderr, width=width, highlight=False)


def cell_len(text: str) -> int:
    """The cells that `text` takes."""
    if text.isascii() and text.isprintable():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _pieces_of(line: Line) -> list[Styled]:
    pieces = [line] if isinstance(line, str | Styled) else line
    return [Styled(p, "") if isinstance(p, str) else p for p in pieces]


def _plain(line: Line) -> str:
    text = "".join(p.text for p in _pieces_of(line))
    return text if text.isprintable() else text.translate(_LEFT_OUT)


def say(console: Screen, line: Line = "", style: str = "") -> None:
    """One line as it is: nothing wrapped, padded or read as markup."""
    if isinstance(console, Plain):
        if (plain := _plain(line).rstrip()).isprintable():
            return console.write(plain)
        console = console.rich()
    from rich.text import Text

    text = Text(line, style) if isinstance(line, str) else Text(style=style)
    if not isinstance(line, str):
        for piece in _pieces_of(line):
            text.append(piece.text, piece.style or None)
    text.rstrip()
    console.print(text, soft_wrap=True)


def paragraph(
    console: Screen, text: str, *, first: Line = "", hang: int | None = None, style: str = ""
) -> None:
    """`text` after `first`, wrapped; the lines that follow start below the text, or at column `hang`."""
    head = _pieces_of(first)
    start = cell_len(_plain(first))
    indent = start if hang is None else hang
    width = max(NARROWEST, console.width)
    for k, line in enumerate(wrapped(text, max(FOLDED, width - indent), max(FOLDED, width - start))):
        say(console, [*(head if k == 0 else [" " * indent]), Styled(line, style)])


def wrapped(text: str, width: int, first: int | None = None) -> list[str]:
    """`text` in lines of at most `width` cells, the first of `first`; line ends in it are kept."""
    out: list[str] = []
    for part in text.split("\n") or [""]:
        line, room = "", first if first is not None and not out else width
        for word in part.split(" "):
            for k, piece in enumerate(_pieces(word, width)):
                glue = " " if line and k == 0 else ""
                if line and cell_len(line) + len(glue) + cell_len(piece) > room:
                    out.append(line)
                    line, room, glue = "", width, ""
                line += glue + piece
        out.append(line)
    return out


def _pieces(word: str, width: int, rank: int = 0) -> list[str]:
    """The word, or if it is wider than a line its parts, cut where a name may be cut."""
    if cell_len(word) <= width:
        return [word]
    if rank == len(_BREAKS):  # no place to break: a hostile or an unusually long name
        return _chopped(word, width)
    joined: list[str] = []
    for part in _BREAKS[rank].split(word):
        for piece in _pieces(part, width, rank + 1):
            if joined and cell_len(joined[-1] + piece) <= width:
                joined[-1] += piece
            else:
                joined.append(piece)
    return joined


def _chopped(word: str, width: int) -> list[str]:
    out = [""]
    for character in word:
        if cell_len(out[-1] + character) > width and out[-1]:
            out.append("")
        out[-1] += character
    return out


@dataclass(frozen=True)
class Column:
    """One column of a table. A column of numbers stands right and is never folded; of those with a `spare`
    number the highest is left out first where the table is too wide."""

    name: str
    right: bool = False
    spare: int = 0
    whole: bool = False  # text that is not folded either


def table(
    console: Screen,
    columns: Sequence[Column],
    rows: Iterable[Sequence[str | Styled]],
    *,
    indent: int = 0,
    title: str | None = None,
) -> list[str]:
    """Print a table with its head line; returns the names of the columns that were left out."""
    cells = [[Styled(_plain(c), c.style if isinstance(c, Styled) else "") for c in row] for row in rows]
    room = max(NARROWEST, console.width) - indent
    kept = list(range(len(columns)))
    natural = [_widest([c.name, *(row[k].text for row in cells)]) for k, c in enumerate(columns)]
    while _total(natural, kept) > room:
        spare = [k for k in kept if columns[k].spare]
        if not spare or _foldable(columns, natural, kept, room):
            break
        kept.remove(max(spare, key=lambda k: columns[k].spare))
    widths = _fit(columns, natural, kept, room)
    if title is not None:
        say(console, title, "bold")
    if any(c.name for c in columns):
        heads = [Styled(columns[k].name, "dim") for k in kept]
        _row(console, [columns[k] for k in kept], heads, widths, indent)
    for row in cells:
        _row(console, [columns[k] for k in kept], [row[k] for k in kept], widths, indent)
    return [columns[k].name for k in range(len(columns)) if k not in kept]


def _widest(texts: Iterable[str]) -> int:
    return max((cell_len(line) for t in texts for line in t.split("\n")), default=0)


def _total(widths: Sequence[int], kept: Sequence[int]) -> int:
    return sum(widths[k] for k in kept) + GAP * (len(kept) - 1)


def _folds(column: Column) -> bool:
    return not (column.right or column.whole)


def _foldable(columns: Sequence[Column], natural: Sequence[int], kept: Sequence[int], room: int) -> bool:
    """Whether folding the columns of text, none to less than half, makes the table fit."""
    least = [
        max(FOLDED, w // 2) if _folds(c) and w > FOLDED else w for c, w in zip(columns, natural, strict=True)
    ]
    return _total(least, kept) <= room


def _fit(columns: Sequence[Column], natural: Sequence[int], kept: Sequence[int], room: int) -> list[int]:
    """The widths of the kept columns: the widest that folds gives way, a cell at a time."""
    widths = {k: natural[k] for k in kept}
    while sum(widths.values()) + GAP * (len(kept) - 1) > room:
        folding = [k for k in kept if _folds(columns[k]) and widths[k] > FOLDED]
        if not folding:
            break
        widths[max(folding, key=lambda k: widths[k])] -= 1
    return [widths[k] for k in kept]


def _row(
    console: Screen,
    columns: Sequence[Column],
    cells: Sequence[Styled],
    widths: Sequence[int],
    indent: int,
) -> None:
    split = [wrapped(c.text, w) if _folds(column) else c.text.split("\n")
             for column, c, w in zip(columns, cells, widths, strict=True)]  # fmt: skip
    for k in range(max(map(len, split), default=0)):
        line: list[str | Styled] = [" " * indent]
        for j, (column, lines, width) in enumerate(zip(columns, split, widths, strict=True)):
            piece = lines[k] if k < len(lines) else ""
            blank = " " * max(0, width - cell_len(piece))
            padded = blank + piece if column.right else piece + blank
            line.append(Styled(padded + " " * (GAP if j < len(columns) - 1 else 0), cells[j].style))
        say(console, line)
