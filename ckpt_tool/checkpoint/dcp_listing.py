"""The pickle machine for a `.metadata`, which may list a million pieces: what nobody needs of it is let go as
soon as it is read, and pieces and their places are packed into numbers.

Memory stays near what is kept: values of the memo that nothing recalls are not held, as a look through the
bytes for BINGET and LONG_BINGET shows; so a piece's objects are gone when it is packed.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt

from ckpt_tool.checkpoint.dcp_pairs import LONGEST, PAIR, ROW, Pair, Run, decoded, new_texts, pair_of
from ckpt_tool.checkpoint.pickle_alike import Alike
from ckpt_tool.checkpoint.pickle_bytes import WINDOW, Feed
from ckpt_tool.checkpoint.pickle_records import Global, Inert, Limits
from ckpt_tool.checkpoint.pickle_rows import (
    CLOSING,
    NUMBER,
    OPENING,
    SIZE,
    TEXT,
    Form,
    Row,
    fields_of,
    learnt,
    number,
    numbers,
    recalled,
)  # fmt: skip
from ckpt_tool.checkpoint.unpickle import Machine

SHORT = 256  # memo entries that BINGET reaches: one byte more or less is no pointer, so all are held
TRIED = 32  # objects of one class that a form is looked for in
CACHED = 1 << 14
BOX = ("offsets", "sizes")
_GETS = {b"j": 5, b"h": 2}  # opcodes that recall an entry of the memo, and how long they are
PLANNER = "planner_data"
_NAMED = re.compile(rb"(?:j.{4}j.{4}\x85\x94){1,4096}", re.S)
_NEW_TEXT = rb"\x8c[\x01-\xff]([ -~]+)\x94"  # that is plain
Places = Callable[[dict[object, object], list[object]], None]


class Chunks:
    """The boxes of one tensor's pieces: `numbers` has the first element of each and then its size."""

    __slots__ = ("axes", "count", "numbers")

    def __init__(self, axes: int, count: int, numbers: array[int]) -> None:
        self.axes, self.count, self.numbers = axes, count, numbers


def packed(chunks: list[object]) -> Chunks | None:
    """The boxes, None where one of them is none, or they differ in the number of their axes."""
    found: array[int] = array("q")
    axes = -1
    for chunk in chunks:
        start, size = fields_of(chunk, BOX)
        if type(start) is not tuple or type(size) is not tuple:
            return None
        axes = len(start) if axes < 0 else axes
        if len(start) != axes or len(size) != axes:
            return None
        try:
            found.extend(start)
            found.extend(size)
        except (OverflowError, TypeError):
            return None
    return Chunks(max(axes, 0), len(chunks), found)


class Listing(Machine):
    """One reading of a `.metadata`. `pairs` takes the items of a dict whose keys are indices of pieces, in
    whatever dict they are; the dict itself stays empty."""

    def __init__(
        self,
        data: bytes,
        *,
        file: str,
        limits: Limits,
        end: int,
        feed: Feed,
        pairs: Places,
    ) -> None:
        super().__init__(data, file=file, limits=limits, end=end, feed=feed)
        self.pairs = pairs
        self.recalls = wanted(feed, end)
        self.each = array("q", self.recalls.tobytes())  # the same, quicker one by one
        self.spend(end // 8 + 16 * len(self.recalls))
        self.next = 0  # of `recalls`
        self.awaited = self.awaited_from(0)
        self.memoised = 0
        self.put = False  # whether an opcode has numbered its entry itself
        self.forms: dict[int, list[Form]] = {}
        self.tried: dict[Global, int] = {}
        self.sizes: dict[bytes, tuple[int, ...]] = {}
        self.alike: dict[int, Alike] = {}  # tensors, by the memo's number of their class
        self.pair: Pair | None = None  # as the latest place was listed
        self.before: tuple[int, Form] | None = None  # the row on top of the stack, if it is a key

    # --- the memo ---

    def awaited_from(self, index: int) -> int:
        """The first entry from `index` on that something may recall."""
        if index < SHORT:
            return index
        each = self.each
        while self.next < len(each) and each[self.next] < index:
            self.next += 1
        return each[self.next] if self.next < len(each) else 1 << 62

    def op_memoize(self) -> None:
        if self.put:
            self.remember(self.memoised)
            return
        if self.memoised >= self.limits.memo:
            self.fault("pickle-limit", f"expected at most {self.limits.memo} memo entries, found more")
        if self.memoised == self.awaited:
            self.memory -= 128
            self.memo[self.memoised] = self.stack[-1]
            self.awaited = self.awaited_from(self.memoised + 1)
        self.memoised += 1

    def remember(self, index: int) -> None:
        """Entries that are numbered: all before the first of them are made already, in order."""
        if not self.put:
            self.put, self.dense = True, self.memoised
        if index >= self.dense and index not in self.memo:
            self.memoised += 1
        super().remember(index)

    # --- rows ---

    def op_binget(self) -> None:
        index = self.take(1)[0]
        if not (index in self.forms and self.rows(index)) and not (index in self.alike and self.again(index)):
            self.recall(index)

    def op_long_binget(self) -> None:
        index = self.number(4)
        if index in self.forms and self.rows(index):
            return
        if not (index in self.alike and self.again(index)) and not self.passed():
            self.recall(index)

    def passed(self) -> bool:
        """Pass over the names of tensors that begin here, each with itself, which the planner alone needs."""
        if self.put or not self.at_key() or self.marked[-1][-2:-1] != [PLANNER]:
            return False
        found = _NAMED.match(self.data, self.start)
        if found is None or self.awaited < SHORT:
            return False
        numbers = np.frombuffer(found[0], "V1,<u4,V1,<u4,V2")
        numbers = numbers[: min(self.awaited, self.limits.memo) - self.memoised]
        memo, names = self.memo, {*numbers["f1"].tolist()} | {*numbers["f3"].tolist()}
        if not len(numbers) or not all(type(memo.get(n)) is str for n in names):
            return False
        self.memoised, self.pos = self.memoised + len(numbers), self.start + 12 * len(numbers)
        return True

    def again(self, kind: int) -> bool:
        """Push the tensor that begins at this opcode, where one with the same bytes was read and nothing may
        recall a part of it."""
        found = self.alike[kind].at(self.data, self.start)
        if found is None or self.put:
            return False
        entry = self.memoised + found[2]
        if entry > self.awaited or entry > self.limits.memo:
            return False
        self.push(found[1])
        self.memoised, self.pos = entry, self.start + len(found[0])
        self.named(*found)
        return True

    def named(self, same: bytes, made: Inert, entries: int) -> None:
        """Push what follows as long as it is a new text and again the object with these bytes."""
        if self.awaited < SHORT or self.put:
            return
        data, at, names = self.data, self.pos, []
        for found in iter(re.compile(_NEW_TEXT + re.escape(same)).scanner(data, at).match, None):  # type: ignore[attr-defined]
            text = found[1]
            if len(text) != data[at + 1]:
                break
            names.append(text)
            at = found.end()
        entry, step = self.memoised, entries + 1
        room = (self.limits.memo - entry) // step
        low, high = np.searchsorted(self.recalls, (entry, entry + step * min(len(names), room)))
        recalled = self.recalls[low:high] - entry
        inner = np.flatnonzero(recalled % step)  # something may recall a part of the object
        count = min(len(names), room, int(recalled[inner[0]]) // step if len(inner) else len(names))
        if not count:
            return
        texts = [name.decode("ascii") for name in names[:count]]
        numbers = [k for k in (recalled // step).tolist() if k < count]
        self.memo.update((entry + step * k, texts[k]) for k in numbers)
        length = sum(map(len, texts))
        self.spend(128 * len(numbers) + 96 * count + length)
        self.stack.extend(chain.from_iterable(zip(texts, repeat(made))))
        self.memoised, self.pos = entry + step * count, self.pos + count * (3 + len(same)) + length
        self.awaited = self.awaited_from(self.memoised)

    def rows(self, kind: int) -> int:
        """Push the object that begins at this opcode, where one of its class's forms fits it, and those that
        follow; how many."""
        pushed = 0
        while known := self.forms.get(kind):
            if self.pair is not None and self.pair.kind == kind and (count := self.run_of(self.pair)):
                pushed += 2 * count
                if (next_kind := self.kind_here()) is None:
                    return pushed
                kind = next_kind
                continue
            for form in known:
                if (values := self.fitting(form)) is not None:
                    break
            else:
                return pushed
            if form is not known[0]:  # others like it follow
                known.remove(form)
                known.insert(0, form)
            if form.plain:
                values = [values[k] if k >= 0 else form.plain[-k - 1] for k in form.order]
            self.push(Row(form.type, form.names, values, self.at, ROW), ROW)
            pushed += 1
            self.remember_pair(kind, form)
            if (next_kind := self.kind_here()) is None:
                return pushed
            kind = next_kind
        return pushed

    def kind_here(self) -> int | None:
        """The memo's number that the next opcode recalls, which becomes the current one; None for another."""
        data, at = self.data, self.pos
        self.start = at
        code = data[at : at + 1]
        if code == b"j" and at + 5 <= len(data):
            return int.from_bytes(data[at + 1 : at + 5], "little")
        return data[at + 1] if code == b"h" and at + 2 <= len(data) else None

    def at_key(self) -> bool:
        """Whether a key of a dict comes next, if the mark stands for a batch of one."""
        if not self.marked or len(self.stack) % 2:
            return False
        below = self.marked[-1]
        return bool(below) and type(below[-1]) is dict

    def remember_pair(self, kind: int, form: Form) -> None:
        """Of the row just pushed, and the one before it."""
        if not self.at_key():
            self.before = (kind, form)
        elif self.before is not None and (
            self.pair is None or self.pair.first is not self.before[1] or self.pair.second is not form
        ):
            self.pair = pair_of(*self.before, form) or self.pair

    def run_of(self, pair: Pair) -> int:
        """Push the pairs that begin here as one; how many there are, 0 and nothing done where none fits."""
        if self.put or not self.at_key():
            return 0
        room = (min(self.awaited, self.limits.memo) - self.memoised) // max(pair.most, 1)
        groups, end = pair.matches(self.data, self.pos, min(room, LONGEST))
        columns = decoded(pair.kinds, groups, self.memo, self.decoded) if groups else None
        if columns is None:
            return 0
        cost = PAIR * len(groups)
        run = Run(pair, columns, len(groups), self.at, cost)
        self.push(run, cost)
        self.push(run)
        self.memoised += pair.made * len(groups) + new_texts(pair.kinds, groups)
        self.pos = end
        return len(groups)

    def fitting(self, form: Form) -> list[object] | None:
        """The values of the object that begins at this opcode, and the reading moved behind it; None, and
        nothing done, where it is otherwise than `form` says or something may recall a part of it."""
        data, at, entry, memo = self.data, self.start, self.memoised, self.memo
        values: list[object] = []
        texts: dict[int, str] = {}
        for pattern, kinds, made, after in form.parts:
            if (found := pattern.match(data, at)) is None:
                return None
            for what, part in zip(kinds, found.groups(), strict=True):
                if what is SIZE:
                    values.append(self.sizes.get(part) or self.decoded(part))
                elif what is NUMBER:
                    values.append(part[1] if part[0] == 0x4B else number(part))
                elif (recall := recalled(part)) in memo:
                    values.append(memo[recall])
                else:
                    return None
            at, entry = found.end(), entry + made
            if not after:
                continue
            if data.startswith(TEXT, at):
                end = at + 2 + data[at + 1] if at + 1 < len(data) else len(data)
                if data[end : end + 1] != b"\x94":
                    return None
                texts[entry] = self.text(data[at + 2 : end])
                values.append(texts[entry])
                entry, at = entry + 1, end + 1
            else:
                get = data[at : at + _GETS.get(data[at : at + 1], 0)]
                if not get or (recall := recalled(get)) not in memo:
                    return None
                values.append(memo[recall])
                at += len(get)
        if self.put or entry > self.limits.memo or (entry > self.awaited and not self.kept(entry, texts)):
            return None
        if texts:
            self.memory -= sum(map(len, texts.values()))
        self.memoised, self.pos = entry, at
        return values

    def kept(self, entry: int, texts: Mapping[int, str]) -> bool:
        """Keep those of the `texts` that something may recall; False, and nothing done, where that may recall
        another entry before `entry`."""
        if self.awaited < SHORT:
            return False
        low, high = np.searchsorted(self.recalls, (self.memoised, entry))
        numbers = self.recalls[low:high].tolist()
        if not texts.keys() >= set(numbers):
            return False
        for k in numbers:
            self.memory -= 128
            self.memo[k] = texts[k]
        self.awaited = self.awaited_from(entry)
        return True

    def decoded(self, data: bytes) -> tuple[int, ...]:
        if len(self.sizes) >= CACHED:
            self.sizes.clear()
        found = self.sizes[data] = numbers(data)
        return found

    def op_dup(self) -> None:
        super().op_dup()
        if type(self.stack[-1]) is Row:
            self.stack[-1].cost = 0  # as it is held elsewhere too

    def learn(self, target: Inert) -> None:
        """Keep the form of the object that this BUILD ends, if it has one."""
        tried = self.tried.get(target.type, 0)
        made = target.at - self.base  # of its NEWOBJ, in the window
        if tried >= TRIED or self.memoised < SHORT or not self.data.startswith(OPENING, made - 1):
            return
        self.tried[target.type] = tried + 1
        for get, size in _GETS.items():
            begin = made - 1 - size
            if begin < 0 or not self.data.startswith(get, begin):
                continue
            form = learnt(self.data[begin : self.pos], self.memo)
            if form is None or form.type is not target.type:
                continue
            known = self.forms.setdefault(recalled(self.data[begin : made - 1]), [])
            if form.parts not in [f.parts for f in known]:
                known.insert(0, form)
            return

    def keep(self, target: Inert) -> None:
        """Others may have the bytes of this object, which a BUILD ends."""
        made = target.at - self.base
        for get, size in _GETS.items():
            begin = made - 1 - size
            if begin >= 0 and self.data.startswith(get, begin) and self.data.startswith(b")\x81", made - 1):
                kind = recalled(self.data[begin : made - 1])
                if self.memo.get(kind) is target.type:
                    known = self.alike.setdefault(kind, Alike())
                    known.keep(self.data[begin : self.pos], target, self.memo)
                    return

    # --- what is kept ---

    def op_build(self) -> None:
        super().op_build()
        target = self.stack[-1]
        if type(target) is not Inert or type(target.state) is not dict:
            return
        state = target.state
        chunks = state.get("chunks")
        if type(chunks) is list and (boxes := packed(chunks)) is not None:
            state["chunks"] = boxes
            self.let_go(chunks)
            self.spend(16 * len(boxes.numbers) + 200)
            self.keep(target)
        elif "tensor_data" in state:  # of a rank's plan, which nobody needs
            target.state = None
        elif self.data.endswith(CLOSING, 0, self.pos):
            self.learn(target)

    def set_items(self, target: object, flat: list[object]) -> None:
        first = flat[0] if flat else None
        index = type(first) in (Row, Run, Inert)
        if not index or type(target) is not dict or len(flat) % 2:
            super().set_items(self.kept_of(target, flat), flat)
            return
        self.pairs(target, flat)
        self.let_go(flat)
        self.spend(100 * len(flat))

    def kept_of(self, target: object, flat: list[object]) -> object:
        """Where these items go: nowhere, if the planner knows them by names, which nobody needs."""
        planner = len(self.stack) > 1 and self.stack[-2] == PLANNER and type(target) is dict
        return {} if planner and type(flat[0] if flat else None) is str else target

    def let_go(self, values: list[object]) -> None:
        """No longer hold these, whoever else has the list."""
        for value in values:
            if type(value) is Row or type(value) is Run:
                self.memory += value.cost
                value.cost = 0
        values.clear()


def wanted(feed: Feed, end: int) -> npt.NDArray[np.int64]:
    """Every memo entry that LONG_BINGET may recall, in order: bytes that look like one are counted in."""
    bits = np.zeros(end // 8 + 1, np.uint8)  # one for each entry that there may be
    for at in range(0, end, WINDOW - 4):  # the last four bytes are seen twice
        data = np.frombuffer(feed(at), np.uint8)
        starts = np.flatnonzero(data[:-4] == ord("j")) if len(data) > 4 else np.zeros(0, np.int64)
        values = sum((data[starts + 1 + k].astype(np.int64) << (8 * k) for k in range(4)), starts * 0)
        values = values[(values >= SHORT) & (values < end)]
        np.bitwise_or.at(bits, values >> 3, np.left_shift(1, values & 7).astype(np.uint8))
    return np.concatenate(
        [
            8 * at + np.flatnonzero(np.unpackbits(bits[at : at + WINDOW], bitorder="little"))
            for at in range(0, len(bits), WINDOW)
        ]
    )
