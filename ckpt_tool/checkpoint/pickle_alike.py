"""Objects that a pickle writes in the very same bytes, one for each of half a million tensors: made once.

Python's pickler numbers what it remembers by itself (MEMOIZE), and refers to what it wrote near the start by
fixed numbers; so two objects that are alike, with all that is in them, are two equal runs of bytes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Mapping

from ckpt_tool.checkpoint.pickle_records import Inert

LONGEST = 1024  # bytes
MOST = 64  # that are kept, the latest used first
TRIED = 4096  # objects that are looked at
# Opcodes of the pickler's: those that take so many values and push one, those that push one, and those that
# take what lies above a mark, with the number of values below it that they need.
_TAKING = {
    "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "NEWOBJ": 2, "REDUCE": 2, "BUILD": 2, "APPEND": 2, "SETITEM": 3,
}  # fmt: skip
_NEW = {"EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_LIST", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1"}
_NEW |= {"BININT2", "LONG1", "SHORT_BINUNICODE", "BINGET", "LONG_BINGET"}
_MARKED = {"TUPLE": 0, "SETITEMS": 1, "APPENDS": 1}


def entries_made(data: bytes, memo: Mapping[int, object]) -> int | None:
    """How many memo entries the opcodes in `data` make, where all that they do is to push one value: they
    neither touch what was on the stack before nor change what the memo holds; else None."""
    made, depths = 0, [0]
    for opcode, argument, _ in pickletools.genops(data + b"."):
        name = opcode.name
        if name in _NEW:
            if name.endswith("GET") and (
                type(argument) is not int or isinstance(memo.get(argument), dict | list | None)
            ):
                return None
            depths[-1] += 1
        elif name == "MARK":
            depths.append(0)
        elif name == "MEMOIZE":
            made += 1
        elif name in _TAKING:
            depths[-1] -= _TAKING[name] - 1
        elif name in _MARKED and len(depths) > 1:
            depths.pop()
            depths[-1] += 1 - _MARKED[name]
        elif name != "STOP":
            return None
        if depths[-1] < (name not in ("MARK", "STOP")):
            return None
    return made if depths == [1] else None


class Alike:
    """The latest objects that were made, each with its bytes and the memo entries in it."""

    def __init__(self) -> None:
        self._known: list[tuple[bytes, Inert, int]] = []
        self._tried = 0

    def keep(self, data: bytes, made: Inert, memo: Mapping[int, object]) -> None:
        if len(data) > LONGEST or self._tried >= TRIED or self.at(data, 0) is not None:
            return
        self._tried += 1
        if (entries := entries_made(data, memo)) is not None:
            self._known.insert(0, (data, made, entries))
            del self._known[MOST:]

    def at(self, data: bytes, at: int) -> tuple[bytes, Inert, int] | None:
        """The object that begins there."""
        for k, known in enumerate(self._known):
            if data.startswith(known[0], at):
                if k:
                    self._known.insert(0, self._known.pop(k))
                return known
        return None
