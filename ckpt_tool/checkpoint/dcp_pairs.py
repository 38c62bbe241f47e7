"""The places of pieces as `.metadata` lists them, an index and a place in turn, read a batch at a time: both
objects in one match, their fields in columns.

Python's pickler writes a dict a thousand items at a time. A run of pairs stands on the machine's stack as one
object in place of the first key and again in place of the first value, so that whatever follows (nearly
always the end of the batch) finds what the opcodes would have left, in a shape of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat

import numpy as np

from ckpt_tool.checkpoint.pickle_rows import NUMBER, SIZE, Form, Row, number, recalled
from ckpt_tool.records import dataclass

INDEX = ("fqn", "offset")
PLACE = ("relative_path", "offset", "length", "transform_descriptors")
LONGEST = 1 << 13  # pairs of one run
ROW = 500  # bytes that a Row and its values are counted with until it is packed
PAIR = 200  # bytes that a pair of a run is counted with until then
_GONE = object()
TEXTUAL = "textual"  # the kind of a group
_TEXT = rb"(\x8c.[ -~]*\x94|h.|j.{4})"  # a new one that is plain, or one of the memo


@dataclass(frozen=True, slots=True)
class Pair:
    """An index and a place that follow one another, by their forms."""

    kind: int  # the memo's number of the class of the first
    first: Form
    second: Form
    pattern: re.Pattern[bytes]
    kinds: tuple[str, ...]
    made: int  # memo entries, without those of texts

    @property
    def most(self) -> int:
        """Memo entries of one, if all of its texts are new."""
        return self.made + self.kinds.count(TEXTUAL)

    def matches(self, data: bytes, at: int, most: int) -> tuple[list[tuple[bytes, ...]], int]:
        """The groups of those that begin at `at` one after the other, and where they end."""
        found: list[tuple[bytes, ...]] = []
        match, end = self.pattern.scanner(data, at).match, at  # type: ignore[attr-defined]
        while len(found) < most and (one := match()) is not None:
            found.append(one.groups())
            end = one.end()
        return found, end


def pair_of(kind: int, first: Form, second: Form) -> Pair | None:
    """None where they are no index and place."""
    if not {*INDEX} <= {*first.names} or not {*PLACE[:3]} <= {*second.names}:
        return None
    pattern, kinds, made = b"", [], 0
    for part in (*first.parts, *second.parts):
        pattern += part.pattern.pattern + (_TEXT if part.before_text else b"")
        kinds += [*part.kinds, *([TEXTUAL] if part.before_text else [])]
        made += part.made
    return Pair(kind, first, second, re.compile(pattern, re.S), tuple(kinds), made)


@dataclass(slots=True, eq=False)
class Run:
    """Pairs that follow one another: `columns` has a list for each group of the pattern, decoded. `at` and
    `cost` are those of a `Row`."""

    pair: Pair
    columns: list[list[object]]
    count: int
    at: int
    cost: int

    def column(self, place: bool, name: str) -> list[object] | None:
        """A field of all indices, or of all places; None where they have none of that name."""
        form = self.pair.second if place else self.pair.first
        if name not in form.names:
            return None
        k = form.order[form.names.index(name)]
        if k < 0:
            return [form.plain[-k - 1]] * self.count
        parts = self.pair.first.parts if place else ()
        return self.columns[k + sum(len(p.kinds) + p.before_text for p in parts)]

    def rows(self) -> Iterator[Row]:
        """The objects one by one, an index and its place in turn."""
        for k in range(self.count):
            for place, form in enumerate((self.pair.first, self.pair.second)):
                held = (self.column(bool(place), name) or [] for name in form.names)
                yield Row(form.type, form.names, [values[k] for values in held], self.at, 0)


def decoded(
    kinds: Sequence[str],
    groups: Sequence[tuple[bytes, ...]],
    memo: Mapping[int, object],
    sizes: Callable[[bytes], tuple[int, ...]],
) -> list[list[object]] | None:
    """The columns of the groups; None where they recall what the memo has not."""
    made: list[list[object]] = []
    for kind, column in zip(kinds, zip(*groups, strict=True), strict=True):
        known: dict[bytes, object] = {}
        if kind is SIZE:
            known = {g: sizes(g) for g in set(column)}
        elif kind is NUMBER:
            known = {g: g[1] if g[0] == 0x4B else number(g) for g in set(column)}
        elif (recalls := _long_gets(column)) is not None:
            made.append([memo.get(n, _GONE) for n in recalls])
            if _GONE in made[-1]:
                return None
            continue
        else:
            known = {g: _text(g) if g[0] == 0x8C else memo.get(recalled(g), _GONE) for g in set(column)}
            if any(v is _GONE for v in known.values()):
                return None
        made.append([known[g] for g in column])
    return made


def _long_gets(column: Sequence[bytes]) -> list[int] | None:
    """The memo entries that LONG_BINGETs recall; None where some are other opcodes."""
    data = np.frombuffer(b"".join(column), np.uint8)
    if len(data) != 5 * len(column) or bool((data[::5] != ord("j")).any()):
        return None
    found: list[int] = data.view("V1,<u4")["f1"].tolist()
    return found


def _text(data: bytes) -> object:
    return data[2:-1].decode("ascii") if data[1] == len(data) - 3 else _GONE


def new_texts(kinds: Sequence[str], groups: Sequence[tuple[bytes, ...]]) -> int:
    """How many of the groups are texts that the memo gets."""
    columns = [
        column for kind, column in zip(kinds, zip(*groups, strict=True), strict=True) if kind is TEXTUAL
    ]
    return sum(sum(map(bytes.startswith, column, repeat(b"\x8c"))) for column in columns)
