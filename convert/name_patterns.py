"""Patterns of module names as config.json has them, matched in a time that grows with pattern times name: a
regular expression of a file that nobody vouches for may never end.

Places in a name are the bits of a number, so that a part leads from all of them on in a few operations.
What is read is what recipes write: letters and escaped points, `.` and `.*`, `\\d` and `\\d+`, sets of
characters, `(a|b)` of plain texts, `^` and `$`. As `re.match` has it, a pattern without `$` may end before
the name does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ckpt_tool.records import dataclass

_TOKEN = re.compile(
    r"(?P<any>\.)(?P<every>[*+]?)"
    r"|(?P<digit>\\d|\[(?P<set>[A-Za-z0-9_-]+)\])(?P<more>[*+]?)"
    r"|\((?:\?:)?(?P<of>(?:[\w|-]|\\\.)+)\)"
    r"|(?P<text>[\w/-]|\\[.\-_])",
    re.ASCII,
)
LONGEST = 500  # characters of a pattern
Seen = dict[str, int]


@dataclass(frozen=True)
class Token:
    """Texts of which one stands there, or else characters (none said: any), one or `+` or `*` of them."""

    texts: tuple[str, ...] = ()
    some: frozenset[str] | None = None
    count: str = ""

    def after(self, name: str, places: int, seen: Seen) -> int:
        """The places in `name` that it leads to from `places`. `seen`: where what it takes stands there."""
        if self.texts:
            made = 0
            for text in self.texts:
                made |= (places & _starts(name, text, seen)) << len(text)
            return made
        taken = (1 << len(name)) - 1
        if self.some is not None:
            taken = 0
            for character in self.some:
                taken |= _starts(name, character, seen)
        first = places & taken
        if not self.count:
            return first << 1
        # A sum carries each first one to the end of its run; those behind it in the run are set again.
        run = (((first + taken) ^ taken) | first) & taken
        return run << 1 | (places if self.count == "*" else 0)


def _starts(name: str, text: str, seen: Seen) -> int:
    """The places in `name` where `text` begins."""
    if (known := seen.get(text)) is None:
        known, at = 0, name.find(text)
        while at >= 0:
            known, at = known | 1 << at, name.find(text, at + 1)
        seen[text] = known
    return known


Pattern = tuple[list[Token], bool]  # its parts, and whether a name must end with it


def parsed(pattern: str) -> Pattern | None:
    """The parts of a pattern, and whether a name must end with it; None for one of another kind."""
    text = pattern.removeprefix("^")
    ends = text.endswith("$")
    text = text.removesuffix("$")
    if len(text) > LONGEST or not text:
        return None
    made: list[Token] = []
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or text[found.end() : found.end() + 1] in ("?", "{", "*", "+"):
            return None
        made.append(_token(found))
        at = found.end()
    return made, ends


def _token(found: re.Match[str]) -> Token:
    if found["any"]:
        return Token(count=found["every"])
    if found["digit"]:
        return Token(some=frozenset(_chosen(found["set"] or "0-9")), count=found["more"])
    return Token(tuple(t.replace("\\", "") for t in (found["of"] or found["text"]).split("|")))


def _chosen(text: str) -> Iterator[str]:
    """The characters of a set, `a-z` for all between."""
    for part in re.finditer(r"(.)-(.)|.", text):
        first, last = part[1] or part[0], part[2] or part[0]
        yield from map(chr, range(ord(first), ord(last) + 1))


def matches(pattern: Pattern, name: str) -> bool:
    """Whether `re.match` finds it in `name`: by the places that its parts lead to, one after another."""
    tokens, ends = pattern
    places, seen = 1, dict[str, int]()
    for token in tokens:
        places = token.after(name, places, seen)
        if not places:
            return False
    return bool(places >> len(name)) or not ends
