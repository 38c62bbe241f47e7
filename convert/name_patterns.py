"""Patterns of module names as config.json has them, matched in a time that grows with pattern times name: a
regular expression of a file that nobody vouches for may never end.

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


@dataclass(frozen=True)
class Token:
    """Texts of which one stands there, or else characters (none said: any), one or `+` or `*` of them."""

    texts: tuple[str, ...] = ()
    some: frozenset[str] | None = None
    count: str = ""

    def after(self, name: str, places: set[int]) -> set[int]:
        """The places in `name` that it leads to from `places`."""
        if self.texts:
            return {at + len(t) for at in places for t in self.texts if name.startswith(t, at)}
        if not self.count:
            return {at + 1 for at in places if at < len(name) and self._takes(name[at])}
        made: set[int] = set()
        inside = False  # whether a run that began at one of the places goes on to here
        for at in range(min(places), len(name) + 1):
            if inside or (at in places and self.count == "*"):
                made.add(at)
            inside = (inside or at in places) and at < len(name) and self._takes(name[at])
        return made

    def _takes(self, character: str) -> bool:
        return self.some is None or character in self.some


def parsed(pattern: str) -> tuple[list[Token], bool] | None:
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


def matches(pattern: tuple[list[Token], bool], name: str) -> bool:
    """Whether `re.match` finds it in `name`: by the places that its parts lead to, one after another."""
    tokens, ends = pattern
    places = {0}
    for token in tokens:
        places = token.after(name, places)
        if not places:
            return False
    return len(name) in places or not ends
