"""Where the bytes of a torch.distributed checkpoint's pieces are: a million of them in a few arrays."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, repeat
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from ckpt_tool.checkpoint.dcp_pairs import INDEX, PLACE, Run
from ckpt_tool.checkpoint.pickle_records import describe
from ckpt_tool.checkpoint.pickle_rows import fields_of
from ckpt_tool.checkpoint.pieces import Numbers
from ckpt_tool.errors import Problem, fail, printable
from ckpt_tool.records import dataclass

DIMENSIONS = 16
_FILE = re.compile(r"[\w.-]{1,255}", re.ASCII)
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Item:
    """The bytes of one piece: `length` from `offset` on of the file `path` of the folder."""

    path: str
    offset: int
    length: int


class Listed:
    """The places as `.metadata` lists them, checked one by one as they are read."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.dicts: dict[int, dict[object, object]] = {}  # whose items were taken, by identity
        self.names: dict[str, int] = {}
        self.paths: dict[str, int] = {}
        self.name, self.path = array("q"), array("q")
        self.offset, self.length = array("q"), array("q")
        self.axes = array("q")  # of each piece, -1 for an entry that is no tensor
        self.starts = array("q")

    def fault(self, message: str, where: str | None = None, kind: str = "bad-pickle") -> NoReturn:
        fail(kind, message, file=self.file, where=where)

    def take(self, of: dict[object, object], flat: list[object]) -> None:
        """Items of a dict, a key and its value in turn."""
        self.dicts[id(of)] = of
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(key) is Run:
                if key is not value:
                    self.fault(f"expected a place, found {describe(value)}")
                if not self.take_run(key):
                    self.take(of, [*key.rows()])
                continue
            name, start = fields_of(key, INDEX)
            if type(name) is not str:
                self.fault(f"expected the name of a piece, found {describe(name)}")
            if start is not None:
                self.starts.extend(self.numbers(start, "the first element of a piece", name))
            self.axes.append(-1 if start is None else len(start))  # type: ignore[arg-type]
            self.name.append(self.names.setdefault(name, len(self.names)))
            self.place(value, name)

    def take_run(self, run: Run) -> bool:
        """The same at once; False, and nothing done, where something is as none of it should be."""
        called, starts = (run.column(False, field) for field in INDEX)
        files, offsets, lengths, transformed = (run.column(True, field) for field in PLACE)
        if called is None or starts is None or files is None or offsets is None or lengths is None:
            return False
        if {*map(type, called)} != {str} or {*map(type, files)} != {str} or any(transformed or ()):
            return False
        at, sizes = _places(offsets), _places(lengths)
        if at is None or sizes is None or not bool((at < MOST_BYTES - sizes).all()):
            return False
        if any(start is not None and not _is_first(start) for start in {*starts}):
            return False
        if any(f in (".", "..") or not _FILE.fullmatch(str(f)) for f in {*files}):
            return False
        for start, alike in groupby(starts):
            count = sum(1 for _ in alike)
            first: Numbers | None = start  # type: ignore[assignment]
            self.axes.extend(repeat(-1 if first is None else len(first), count))
            self.starts.extend((first or ()) * count)
        _number(called, self.names, self.name)  # type: ignore[arg-type]
        _number(files, self.paths, self.path)  # type: ignore[arg-type]
        self.offset.frombytes(at.tobytes())
        self.length.frombytes(sizes.tobytes())
        return True

    def place(self, value: object, name: str) -> None:
        path, offset, length, transformed = fields_of(value, PLACE)
        if type(path) is not str or type(offset) is not int or type(length) is not int:
            self.fault(f"expected a file, an offset and a length, found {describe(value)}", name)
        if transformed:
            what = printable(str(transformed), 60)
            self.fault(
                f"expected plain bytes, found ones that the writer transformed ({what})", name, "unsupported"
            )
        if offset < 0 or length < 0 or offset + length >= 1 << 63:
            self.fault(f"expected a place in a file, found {length} bytes at {offset}", name, "size-mismatch")
        if (number := self.paths.get(path)) is None:
            if not _FILE.fullmatch(path) or path in (".", ".."):
                self.fault(
                    f"expected the name of a file of the folder, found {printable(path)!r}", name, "bad-input"
                )
            number = self.paths[path] = len(self.paths)
        self.path.append(number)
        self.offset.append(offset)
        self.length.append(length)

    def numbers(self, value: object, what: str, name: str) -> Numbers:
        if type(value) is not tuple or len(value) > DIMENSIONS or {*map(type, value)} - {int}:
            self.fault(
                f"expected {what} in at most {DIMENSIONS} whole numbers, found {describe(value)}", name
            )
        if value and max(value) >= 1 << 63:
            self.fault(f"expected {what} below 2^63, found {value}", name, "size-mismatch")
        return value

    def table(self) -> Table:
        columns = (np.array(c, np.int64) for c in (self.path, self.offset, self.length))
        return Table(tuple(self.paths), *columns)

    def by_name(self) -> ByName:
        """The places sorted by the name of what they are of."""
        ids, axes = np.array(self.name, np.int64), np.array(self.axes, np.int64)
        order = np.argsort(ids, kind="stable")
        ends = np.cumsum(np.bincount(ids, minlength=len(self.names)))
        at = np.cumsum(np.maximum(axes, 0)) - np.maximum(axes, 0)
        flat = np.array(self.starts, np.int64)
        before = np.concatenate(([0], np.cumsum(flat != 0)))  # numbers other than 0 in front of each
        ends = np.concatenate(([0], ends))
        one = np.flatnonzero(np.diff(ends) == 1)
        row = order[ends[one]]
        first = (axes[row] >= 0) & (before[at[row]] == before[at[row] + np.maximum(axes[row], 0)])
        alone = np.full(len(self.names), -1)
        alone[one[first]] = row[first]
        return ByName(self.names, order, ends, axes, at, flat, alone.astype(np.int64))

    def conflicts(self) -> Iterator[Problem]:
        """Pieces that share bytes."""
        path, offset = np.array(self.path, np.int64), np.array(self.offset, np.int64)
        order = np.lexsort((offset, path))
        path, offset, length = path[order], offset[order], np.array(self.length, np.int64)[order]
        met = (path[1:] == path[:-1]) & (offset[:-1] + np.maximum(length[:-1], 1) > offset[1:])
        names = list(self.names)
        for k in np.flatnonzero(met)[:MOST].tolist():
            one, other = (names[self.name[int(order[i])]] for i in (k, k + 1))
            message = f"expected bytes of its own for each piece, found those of {printable(one)}"
            yield Problem("shard-conflict", message, self.file, other)


MOST = 100  # problems of one kind that are told
MOST_BYTES = (1 << 63) - 1


def _number(texts: Sequence[str], known: dict[str, int], numbers: array[int]) -> None:
    """Append the number of each, a new one where it is not `known`."""
    new = [text for text in dict.fromkeys(texts) if text not in known]
    known.update(zip(new, range(len(known), len(known) + len(new)), strict=True))
    numbers.extend(map(known.__getitem__, texts))


def _places(values: list[object]) -> Ints | None:
    """Whole numbers from 0 on, as they are in an array; None where some are others."""
    if {*map(type, values)} != {int}:
        return None
    try:
        made = np.array(values, np.int64)
    except OverflowError:
        return None
    return made if bool((made >= 0).all()) else None


def _is_first(start: object) -> bool:
    """Whether it is what `Listed.numbers` lets through."""
    few = type(start) is tuple and len(start) <= DIMENSIONS and {*map(type, start)} <= {int}
    return few and all(n < 1 << 63 for n in start)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class ByName:
    """Row numbers of `Listed` by name: those of name k are `order[ends[k] : ends[k + 1]]`."""

    names: Mapping[str, int]
    order: Ints
    ends: Ints
    axes: Ints
    at: Ints  # where in `flat` the first element of each begins
    flat: Ints
    single: Ints  # see `alone`, by the number of the name, -1 for others

    def rows(self, name: str) -> Ints:
        k = self.names.get(name)
        return self.order[:0] if k is None else self.order[self.ends[k] : self.ends[k + 1]]

    def alone(self, names: Sequence[str], axes: int) -> Ints | None:
        """The rows of pieces with so many axes that are the only ones of their names and begin where the
        tensors begin; None where one of them is another."""
        numbers = list(map(self.names.get, names))
        if None in numbers:
            return None
        rows: Ints = self.single[np.array(numbers, np.int64)]
        return rows if bool((rows >= 0).all()) and bool((self.axes[rows] == axes).all()) else None

    def starts(self, rows: Ints, axes: int) -> Ints:
        """The first elements [rows, axes] of pieces that have so many axes."""
        found: Ints = self.flat[self.at[rows][:, None] + np.arange(axes)]
        return found


@dataclass(frozen=True)
class Table:
    """The places of all pieces by number: `path` counts in `paths`."""

    paths: tuple[str, ...]
    path: Ints
    offset: Ints
    length: Ints

    def item(self, number: int) -> Item:
        return Item(self.paths[self.path[number]], int(self.offset[number]), int(self.length[number]))

    def taken(self, numbers: Ints) -> Table:
        return Table(self.paths, self.path[numbers], self.offset[numbers], self.length[numbers])

    def ends(self) -> dict[str, int]:
        """How long each file is at least."""
        found = np.zeros(len(self.paths), np.int64)
        np.maximum.at(found, self.path, self.offset + self.length)
        return {path: int(end) for path, end in zip(self.paths, found, strict=True) if end}
