"""Objects of one class that follow one another in a pickle by the hundred thousand, read without a step for
each of their opcodes.

Python's pickler writes every such object in the same way, with the class and the names of the fields taken
from the memo. The first ones are read opcode by opcode; what their bytes have in common makes a `Form`, and
bytes that fit it do what their opcodes would have done, in one go:

    BINGET class  EMPTY_TUPLE NEWOBJ MEMOIZE  EMPTY_DICT MEMOIZE MARK
    (BINGET name  value)...                                      value: a number, None, text or a value of the
    SETITEMS BUILD                                               memo, or a torch.Size of numbers
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from ckpt_tool.checkpoint.pickle_records import Global, Inert
from ckpt_tool.records import dataclass

OPENING = b")\x81\x94}\x94("
CLOSING = b"ub"
TEXT = b"\x8c"  # and its length in one byte
SIZE, NUMBER, GET = "size", "number", "get"  # kinds of values
_GET = rb"h.|j...."
_NUMBER = rb"K.|M..|J....|\x8a(?:\x01.|\x02..|\x03...|\x04....|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8})"
_TOKEN = re.compile(rb"(?P<get>%b)|(?P<number>%b)|(?P<plain>[N\x88\x89])" % (_GET, _NUMBER), re.S)
# The opcodes that make a tuple of so many values, and those of a torch.Size after its class.
_TUPLES = (b")", b"\x85\x94", b"\x86\x94", b"\x87\x94")
_SIZE = re.compile(
    rb"(?:(?P<few>(?:%b){0,3})(?P<tuple>\)|[\x85-\x87]\x94)|\((?P<many>(?:%b){4,64})t\x94)\x85\x94R\x94"
    % (_NUMBER, _NUMBER),
    re.S,
)
_PLAIN: Mapping[bytes, object] = {b"N": None, b"\x88": True, b"\x89": False}


@dataclass(slots=True, eq=False)
class Row:
    """An object with its fields, which nothing else in the pickle refers to. `at` is as in `Inert`; `cost` is
    what it is counted with for as long as it is held, in bytes."""

    type: Global
    names: tuple[str, ...]
    values: Sequence[object]
    at: int
    cost: int

    @property
    def fields(self) -> Mapping[str, object]:
        return dict(zip(self.names, self.values, strict=True))


@lru_cache(256)
def _slots(names: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(names.index(n) if n in names else -1 for n in wanted)


def fields_of(value: object, wanted: tuple[str, ...]) -> Sequence[object]:
    """The fields of an object by these names, None for each that it has not."""
    if type(value) is Row:
        values = value.values
        return [values[k] if k >= 0 else None for k in _slots(value.names, wanted)]
    told = value.fields if type(value) is Inert else {}
    return [told.get(n) for n in wanted]


class Part(NamedTuple):
    """A run of bytes of an object: `kinds` say what the groups of the pattern are, `made` counts the memo
    entries in it, and a text follows it where `before_text` is set."""

    pattern: re.Pattern[bytes]
    kinds: tuple[str, ...]
    made: int
    before_text: bool


@dataclass(frozen=True, slots=True)
class Form:
    """What objects of one class have in common. `order` is where among all groups and texts of the parts each
    field's value is, negative (from -1 down) for one of `plain`, which are the same in all."""

    type: Global
    names: tuple[str, ...]
    parts: tuple[Part, ...]
    order: tuple[int, ...]
    plain: tuple[object, ...]


def numbers(data: bytes) -> tuple[int, ...]:
    """What the opcodes of whole numbers in `data` push."""
    found, at = [], 0
    while at < len(data):
        code = data[at]
        size = 1 if code == 0x4B else 2 if code == 0x4D else 4 if code == 0x4A else data[at + 1]
        at += 1 + (code == 0x8A)
        found.append(int.from_bytes(data[at : at + size], "little", signed=code in (0x4A, 0x8A)))
        at += size
    return tuple(found)


def number(data: bytes) -> int:
    """That of the one opcode in `data`."""
    if data[0] == 0x4B:
        return data[1]
    return int.from_bytes(data[1:], "little", signed=data[0] == 0x4A) if data[0] != 0x8A else numbers(data)[0]


def recalled(get: bytes) -> int:
    """The memo entry that a BINGET or LONG_BINGET pushes."""
    return int.from_bytes(get[1:], "little")


class _Learner:
    """Takes the bytes of one object apart; `form` is None where they are otherwise than the module says."""

    def __init__(self, data: bytes, memo: Mapping[int, object]) -> None:
        self.data, self.memo = data, memo
        self.at = 0
        self.pattern = b""
        self.parts: list[Part] = []
        self.groups: list[str] = []
        self.names: list[str] = []
        self.order: list[int] = []
        self.plain: list[object] = []
        self.values = self.entries = 0

    def literal(self, text: bytes) -> bool:
        if not self.data.startswith(text, self.at):
            return False
        self.pattern += re.escape(text)
        self.at += len(text)
        return True

    def token(self, kind: str) -> bytes | None:
        found = _TOKEN.match(self.data, self.at)
        return found[0] if found and found.lastgroup == kind else None

    def value_here(self) -> None:
        self.order.append(self.values)
        self.values += 1

    def group(self, kind: str, pattern: bytes, size: int) -> None:
        self.pattern += b"(" + pattern + b")"
        self.groups.append(kind)
        self.value_here()
        self.at += size

    def end_part(self, before_text: bool) -> None:
        pattern = re.compile(self.pattern, re.S)
        self.parts.append(Part(pattern, tuple(self.groups), self.entries, before_text))
        self.pattern, self.groups, self.entries = b"", [], 0

    def form(self) -> Form | None:
        get = self.token("get")
        kind = None if get is None else self.memo.get(recalled(get))
        if get is None or type(kind) is not Global or not (self.literal(get) and self.literal(OPENING)):
            return None
        self.entries = 2  # the object and its dict
        while not self.literal(CLOSING):
            name = self.token("get")
            text = None if name is None else self.memo.get(recalled(name))
            if name is None or type(text) is not str or text in self.names:
                return None
            self.names.append(text)
            self.literal(name)
            if not self.value():
                return None
        if self.at != len(self.data) or not self.names:
            return None
        self.end_part(before_text=False)
        return Form(kind, tuple(self.names), tuple(self.parts), tuple(self.order), tuple(self.plain))

    def value(self) -> bool:
        if (number := self.token("number")) is not None:
            self.group(NUMBER, _NUMBER, len(number))
        elif (plain := self.token("plain")) is not None:
            self.literal(plain)
            self.plain.append(_PLAIN[plain])
            self.order.append(-len(self.plain))
        elif (get := self.token("get")) is not None:
            if self.size(get):
                return True
            if type(self.memo.get(recalled(get))) is str:
                self.text(len(get))
            else:
                self.group(GET, _GET, len(get))
        elif self.data.startswith(TEXT, self.at):
            self.text(3 + self.data[self.at + 1])
        else:
            return False
        return True

    def size(self, get: bytes) -> bool:
        """A torch.Size of numbers; False, and nothing taken, where it is none."""
        size = self.memo.get(recalled(get))
        found = _SIZE.match(self.data, self.at + len(get))
        if found is None or type(size) is not Global or (size.module, size.name) != ("torch", "Size"):
            return False
        many, count = found["few"] is None, len(numbers(found["few"] or found["many"] or b""))
        if not many and _TUPLES[count] != found["tuple"]:
            return False
        self.literal(get + b"(" * many)
        self.group(SIZE, b"(?:%b){%d}" % (_NUMBER, count), found.end("many" if many else "few") - self.at)
        end = self.data[self.at : found.end()]
        self.entries += end.count(b"\x94")
        return self.literal(end)

    def text(self, size: int) -> None:
        """Text, of the memo or new in it: how long it is differs from object to object."""
        self.end_part(before_text=True)
        self.value_here()
        self.at += size


def learnt(data: bytes, memo: Mapping[int, object]) -> Form | None:
    """The form of the object whose opcodes are `data`, None where they are otherwise than the module says."""
    return _Learner(data, memo).form()
