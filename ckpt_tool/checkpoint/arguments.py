"""A pickle of arguments beside the weights, read as data: the machine that reads torch files reads it, and
nothing that it names is imported or called."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, TypeGuard

from ckpt_tool.checkpoint.base import Document
from ckpt_tool.checkpoint.pickle_records import Inert, children, describe, plain
from ckpt_tool.errors import CkptToolError, fail, fail_all

LIMIT = 1 << 20  # bytes; arguments are names and numbers
MOST = 10_000  # values inside one, each as often as it is reached


def read_arguments(document: Document) -> dict[str, object]:
    """The dict that the pickle holds, with each argparse.Namespace (itself too) as the dict of its arguments,
    and numpy's scalars as numbers. A value that is no plain one becomes the words for what it is. Kinds:
    those of `read_pickle`, `unsafe-pickle` for a call of what may not stand in data, `wrong-format` for what
    is no dict, `trailing-data`, `bad-config` (too large)."""
    from ckpt_tool.checkpoint.torch_state import surveyed, unsafe_problems
    from ckpt_tool.checkpoint.unpickle import Machine

    data, file = document.read(LIMIT), document.name
    machine = Machine(data, file=file)
    try:
        pickled = machine.run()
    except CkptToolError as error:
        raise CkptToolError(*unsafe_problems(machine, file), *error.problems) from None
    fail_all(unsafe_problems(pickled, file, surveyed(pickled.value, file)))
    if pickled.end != len(data):
        extra = len(data) - pickled.end
        message = f"expected the end of the pickle at byte {pickled.end}, found {extra} more bytes"
        fail("trailing-data", message, file=file)
    value = pickled.value
    if _is_namespace(value):
        return _told(value.fields)
    if not isinstance(value, Mapping):
        fail("wrong-format", f"expected a dict of arguments, found {describe(value)}", file=file)
    return _told(value)


def _is_namespace(value: object) -> TypeGuard[Inert]:
    return isinstance(value, Inert) and str(value.type) == "argparse.Namespace"


def _told(fields: Mapping[Any, object]) -> dict[str, object]:
    return {k: _value(v) for k, v in fields.items() if type(k) is str}


def _value(value: object) -> object:
    if _is_namespace(value):
        return _told(value.fields)
    if isinstance(value, Inert) and (number := _number(value)) is not None:
        return number
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | Mapping) and _reached(value, {}) <= MOST:
        return plain(value)
    return describe(value)


# What numpy calls its numbers, and struct the same bytes.
_NUMBERS = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
    "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip


def _number(value: Inert) -> int | float | bool | None:
    """The number that a scalar of numpy holds: programs compute with them, and keep what comes out."""
    if str(value.type).rpartition(".")[0] not in ("numpy.core.multiarray", "numpy._core.multiarray"):
        return None
    match value.args:
        case (Inert(args=(str() as kind, *_), state=(_, ("<" | ">" | "|") as order, *_)), bytes() as data):
            form = _NUMBERS.get(kind)
        case _:
            return None
    layout = f"{'>' if order == '>' else '<'}{form}"
    if form is None or value.type.name != "scalar" or len(data) != struct.calcsize(layout):
        return None
    found: int | float | bool = struct.unpack(layout, data)[0]
    return found


def _reached(value: object, known: dict[int, int]) -> int:
    """The values inside a container: shared ones, of which a few bytes make billions, count each time."""
    if not isinstance(value, list | tuple | dict | Inert):
        return 1
    if id(value) not in known:
        known[id(value)] = 1 + sum(_reached(v, known) for _, v in children(value))
    return known[id(value)]
