"""Where the rows of a tensor come from: rows are matched by hashes, and an order that explains all of them is
put into words.

`m[r]` is the row of the right tensor that stands at row r of the one found. Words are given only where the
order that they describe gives every row found (`Rows.fits`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import permutations
from math import prod

import numpy as np

from ckpt_tool.records import dataclass

BLOCK = 1 << 22  # elements hashed at a time
WORDS = {"n": "head", "k": "head", "e": "expert", "a": "group", "b": "group", "g": "group", "t": "third"}
WORDS |= {"s": "third", "v": "token", "p": "position", "rank": "rank", "two": "half"}
PLURALS = {"half": "halves"}
SHIFTED = {"v": "vocabulary", "p": "positions"}
BARE = ("row", "column", "element", "token", "position")
RUNS = 4  # runs of rows from elsewhere that are listed
PERMUTED_AXES = 5


def hashes(x: np.ndarray) -> np.ndarray:
    """One 64-bit number for each row: a sum of the elements with odd random weights, modulo 2^64, mixed."""
    rows = x.reshape(len(x), -1)
    drawn = np.random.default_rng(20240229).integers(1 << 63, size=rows.shape[1], dtype=np.int64)
    weights = (drawn.astype(np.uint64) << np.uint64(1)) | np.uint64(1)
    made = np.empty(len(rows), np.uint64)
    step = max(1, BLOCK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        piece = rows[start : start + step].astype(np.uint64)
        piece ^= piece << np.uint64(29)
        made[start : start + step] = (piece * weights).sum(axis=1, dtype=np.uint64)
    return made ^ (made >> np.uint64(31))


def located(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The index in `among` of each hash, -1 where it is not there; a row that stands in its own place keeps
    it."""
    order = np.argsort(among, kind="stable")
    at = np.searchsorted(among[order], wanted)
    at = np.minimum(at, len(among) - 1)
    found = np.where(among[order][at] == wanted, order[at], -1)
    own = np.arange(len(wanted))
    if len(wanted) == len(among):
        found = np.where(among == wanted, own, found)
    return np.asarray(found)


@dataclass(frozen=True)
class Rows:
    """The rows of one dimension: those expected and those found, by hash; the axes that make up the
    dimension, outer first; how many ranks share them out; `noun` is "row" or "column"."""

    expected: np.ndarray
    found: np.ndarray
    axes: tuple[tuple[str, int], ...]
    ranks: int
    noun: str
    rotary: bool = False

    def __len__(self) -> int:
        return len(self.expected)

    @cached_property
    def m(self) -> np.ndarray:
        return located(self.found, self.expected)

    def fits(self, order: np.ndarray) -> bool:
        return np.array_equal(self.expected[order], self.found)

    @property
    def levels(self) -> Iterator[tuple[str, int, int, int]]:
        """(word, blocks outside, blocks in each, rows of a block), from the coarsest."""
        if (
            self.ranks > 1
            and len(self) % self.ranks == 0
            and (not self.axes or self.axes[0][1] != self.ranks)
        ):
            yield "rank", 1, self.ranks, len(self) // self.ranks
        outer = 1
        for axis, size in self.axes:
            known = axis in WORDS and (axis != "two" or len(self.axes) > 1)
            if size > 1 and (outer > 1 or known):
                yield WORDS.get(axis, axis), outer, size, len(self) // outer // size
            outer *= size
        if len(self.axes) != 1 or self.axes[0][0] not in WORDS:
            yield self.noun, 1, len(self), 1

    def words(self) -> str | None:
        """Which order of its own rows the tensor has; None where some are not its own, or it is none that
        has a name."""
        if (self.m < 0).any():
            return _filled_shift(self)
        for find in (_shift, _blocks, _inside, _as_text, _shift_of_a_part, _runs, _axes, _listed, _any_order):
            if words := find(self):
                return words
        return None


def _named(rows: Rows) -> str:
    """What is shifted or listed: the vocabulary, positions, rows."""
    first = rows.axes[0][0] if len(rows.axes) == 1 and rows.noun == "row" else ""
    return SHIFTED.get(first, f"{plural(rows.noun)}")


def _offset(rows: Rows) -> int:
    """By how many rows most have moved up, around the end."""
    n = len(rows)
    own = np.flatnonzero(rows.m >= 0)
    if not own.size:
        return 0
    moved = (own - rows.m[own]) % n
    by = int(np.bincount(moved).argmax())
    return by - n if by > n // 2 else by


def _shift(rows: Rows) -> str | None:
    n, by = len(rows), _offset(rows)
    if by == 0 or n < 3:
        return None
    around = np.roll(np.arange(n), by)
    if rows.fits(around):
        return _blocks_rolled(rows, by) or f"{_named(rows)} shifted by {by:+d}"
    gap = slice(0, by) if by > 0 else slice(n + by, n)
    kept = around.copy()
    kept[gap] = np.arange(n)[gap]
    if rows.fits(kept):
        return (
            f"{_named(rows)} shifted by {by:+d}, the {'first' if by > 0 else 'last'} {abs(by)} left in place"
        )
    return None


def _blocks_rolled(rows: Rows, by: int) -> str | None:
    for word, outer, blocks, size in rows.levels:
        if outer == 1 and size > 1 and by % size == 0 and blocks > 2:
            return f"{plural(word)} rolled by {by // size}"
        if outer == 1 and size > 1 and by % size == 0 and blocks == 2:
            return f"{plural(word)} 0 and 1 exchanged"
    return None


def _filled_shift(rows: Rows) -> str | None:
    """Shifted, with rows of zeros (or any one row) where none of the own are left."""
    n, by = len(rows), _offset(rows)
    if by == 0 or abs(by) > n // 2:
        return None
    gap = slice(0, by) if by > 0 else slice(n + by, n)
    rest = slice(by, n) if by > 0 else slice(0, n + by)
    if not np.array_equal(np.roll(rows.expected, by)[rest], rows.found[rest]) or rows.found[gap].any():
        return None  # the hash of zeros is zero
    return f"{_named(rows)} shifted by {by:+d}, the {'first' if by > 0 else 'last'} {abs(by)} are zeros"


def plural(word: str) -> str:
    return PLURALS.get(word, f"{word}s")


def _order_words(word: str, p: np.ndarray) -> str | None:
    """An order of blocks in words: block i is block p[i] of the right ones."""
    n = len(p)
    moved = [int(i) for i in np.flatnonzero(p != np.arange(n))]
    if len(moved) == 2 and p[moved[0]] == moved[1] and p[moved[1]] == moved[0]:
        return f"{plural(word)} {moved[0]} and {moved[1]} exchanged"
    by = int(-p[0]) % n
    if n > 2 and np.array_equal(p, np.roll(np.arange(n), by)):
        return f"{plural(word)} rolled by {by if by <= n // 2 else by - n}"
    if n > 2 and np.array_equal(p, np.arange(n)[::-1]):
        return f"{plural(word)} in reverse order"
    if np.array_equal(p, as_text(n)):
        return f"{plural(word)} in the order of their numbers as text (10 before 2)"
    several = word in BARE and len(moved) > 1  # runs of them are told as such
    if len(moved) <= RUNS and len(set(p.tolist())) < n and not several:
        return ", ".join(f"{word} {i} holds {word} {p[i]}" for i in moved)
    return None


def as_text(n: int) -> np.ndarray:
    return np.array([int(s) for s in sorted(map(str, range(n)))])


def _blocks(rows: Rows) -> str | None:
    """Whole blocks in another order, the same inside each outer block or inside one alone."""
    for word, outer, blocks, size in rows.levels:
        first = rows.m.reshape(outer, blocks, size)[:, :, 0] // size
        p = first - np.arange(outer)[:, None] * blocks
        order = (first[:, :, None] * size + np.arange(size)).reshape(-1)
        if not rows.fits(order):
            continue
        if outer == 1:
            words = _order_words(word, p[0])
        else:
            changed = [o for o in range(outer) if not np.array_equal(p[o], np.arange(blocks))]
            same = all(np.array_equal(p[o], p[changed[0]]) for o in changed)
            inside = (p >= 0).all() and (p < blocks).all()
            if not same or not inside:
                words = _order_words(word, first.reshape(-1)) if size > 1 else None
            else:
                told = _order_words(word, p[changed[0]])
                where = "each block" if len(changed) == outer else f"block {', '.join(map(str, changed[:6]))}"
                words = told and f"{told} in {where} of {blocks}"
        if words:
            return words
    return None


def _inside(rows: Rows) -> str | None:
    """Some heads whose own rows have the order of interleaved pairs, or the other way round."""
    for word, outer, blocks, size in rows.levels:
        if word != "head" or size % 2 or size < 4:
            continue
        n = outer * blocks
        inner = rows.m.reshape(n, size) - np.arange(n)[:, None] * size
        moved = np.flatnonzero((inner != np.arange(size)).any(1))
        pairs = np.arange(size).reshape(2, -1).T.reshape(-1)
        halves = np.arange(size).reshape(-1, 2).T.reshape(-1)
        for pattern, told in ((pairs, "interleaved"), (halves, "split in halves")):
            order = np.arange(len(rows)).reshape(n, size).copy()
            order[moved] = order[moved][:, pattern]
            if moved.size and rows.fits(order.reshape(-1)):
                if moved.size == n:
                    return None if rows.rotary else f"rows of every head {told}, as for rotary"
                listed = ", ".join(map(str, moved[:8].tolist()))
                how = f"left {told} (not permuted for rotary)" if rows.rotary and pattern is pairs else told
                return f"head{'s' if moved.size > 1 else ''} {listed} {how}"
    return None


def _as_text(rows: Rows) -> str | None:
    n = len(rows)
    for blocks in (b for b in range(11, min(n, 1025)) if n % b == 0):
        order = np.arange(n).reshape(blocks, -1)[as_text(blocks)].reshape(-1)
        if rows.fits(order):
            each = f"{blocks} blocks of {n // blocks} {plural(rows.noun)}"
            return f"{each} in the order of their numbers as text (10 before 2)"
    return None


def runs(m: np.ndarray) -> list[tuple[int, int, int]]:
    """(start, rows, start there) of runs of neighbours that are neighbours there too."""
    edges = np.flatnonzero(np.diff(m) != 1) + 1
    starts = [0, *edges.tolist()]
    return [(a, b - a, int(m[a])) for a, b in zip(starts, [*starts[1:], len(m)], strict=True)]


def _shift_of_a_part(rows: Rows) -> str | None:
    """A share cut off too early or too late."""
    elsewhere = [r for r in runs(rows.m) if r[0] != r[2]]
    if len(elsewhere) != 1 or elsewhere[0][1] < 2:
        return None
    start, count, there = elsewhere[0]
    by = there - start
    if abs(by) > 8 or abs(by) >= count:
        return None
    share = f"{plural(rows.noun)} {start} to {start + count - 1} hold {there} to {there + count - 1}"
    return (
        f"a share of the {plural(rows.noun)} off by {abs(by)}: {share}"
        if abs(by) > 1
        else f"a share of the {plural(rows.noun)} off by one: {share}"
    )


def span(start: int, count: int) -> str:
    return f"{start} to {start + count - 1}" if count > 1 else str(start)


def _runs(rows: Rows) -> str | None:
    moved = [r for r in runs(rows.m) if r[0] != r[2]]
    noun = WORDS.get(rows.axes[0][0], rows.noun) if _named(rows) in SHIFTED.values() else rows.noun
    if (
        len(moved) == 2
        and moved[0][1] == moved[1][1]
        and moved[0][2] == moved[1][0]
        and moved[1][2] == moved[0][0]
    ):
        return f"{plural(noun)} {span(*moved[0][:2])} and {span(*moved[1][:2])} exchanged"
    if not moved or len(moved) > RUNS:
        return None
    told = [
        f"{noun}{'s' * (c > 1)} {span(a, c)} hold{'s' * (c == 1)} {noun}{'s' * (c > 1)} {span(b, c)}"
        for a, c, b in moved
    ]
    return ", ".join(told)


def _axes(rows: Rows) -> str | None:
    """The rows as they come when the axes are taken to lie in another order; an axis may be split in two."""
    axes = [(a, n) for a, n in rows.axes if n > 1]
    for cut in (None, *range(len(axes))):
        split = list(axes)
        if cut is not None:
            name, size = axes[cut]
            if size % 2 or size < 4:
                continue
            split[cut : cut + 1] = [(f"{name}1", 2), (f"{name}2", size // 2)]
            _also = [(f"{name}1", size // 2), (f"{name}2", 2)]
            options = [split, [*axes[:cut], *_also, *axes[cut + 1 :]]]
        else:
            options = [split]
        for option in options:
            if len(option) > PERMUTED_AXES or prod(n for _, n in option) != len(rows):
                continue
            if told := _axes_permuted(rows, option):
                return told
    return None


def _axes_permuted(rows: Rows, axes: Sequence[tuple[str, int]]) -> str | None:
    shaped = np.arange(len(rows)).reshape([n for _, n in axes])
    for order in permutations(range(len(axes))):
        if order != tuple(range(len(axes))) and rows.fits(shaped.transpose(order).reshape(-1)):
            names = [f"{a} {n}" for a, n in axes]
            read, right = ", ".join(names[k] for k in order), ", ".join(names)
            return f"blocks of {plural(rows.noun)} in the order ({read}) where it is ({right})"
    return None


def _listed(rows: Rows) -> str | None:
    """Heads or ranks in an order that has no name."""
    for word, outer, blocks, size in rows.levels:
        p = rows.m.reshape(-1, size)[:, 0] // size
        order = (p[:, None] * size + np.arange(size)).reshape(-1)
        if size > 1 and outer == 1 and rows.fits(order):
            more = ", ..." if blocks > 12 else ""
            return f"{plural(word)} in the order {', '.join(map(str, p[:12].tolist()))}{more}"
    return None


def _any_order(rows: Rows) -> str | None:
    if len(set(rows.m.tolist())) == len(rows) and rows.fits(rows.m):
        first = int(np.flatnonzero(rows.m != np.arange(len(rows)))[0])
        return (
            f"{plural(rows.noun)} in another order, {rows.noun} {first} is {rows.noun} {int(rows.m[first])}"
        )
    return None
