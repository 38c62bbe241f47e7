"""Tensors of a torch pickle, read without a step for each of their thirty opcodes.

torch's pickler writes every tensor in the same way. Where the opcodes after the function that rebuilds it fit
that, they are done in one go: what is on the stack, in the memo and counted is what they would have left.
What does not fit, or is wrong in any way, is left to the steps, which say so.

    MARK MARK "storage" class key location numel TUPLE BINPERSID
    offset shape strides requires_grad OrderedDict EMPTY_TUPLE REDUCE TUPLE REDUCE

Source: torch/_tensor.py and torch/serialization.py of 1.0 to 2.13.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, TypeGuard

from ckpt_tool.checkpoint.pickle_records import Global, StorageRef, TensorRecord
from ckpt_tool.checkpoint.pickle_rows import number, recalled
from ckpt_tool.checkpoint.torch_globals import Args, storage_dtype

if TYPE_CHECKING:
    from ckpt_tool.checkpoint.unpickle import Machine

_NUMBER = rb"(?:K.|M..|J....)"
_PUT = rb"(q.|r....)?"
_GET = rb"(h.|j....)"
_SIZES = rb"(\)|%b\x85|%b{2}\x86|%b{3}\x87|\(%b{0,8}t)" % ((_NUMBER,) * 4) + _PUT
# From the second mark on, without what remembers the tensor.
_ROW = re.compile(
    rb"\((?:X\x07\0\0\0storage%b|%b)" % (_PUT, _GET)
    + rb"(?:c(torch\n\w{1,40})\n%b|%b)" % (_PUT, _GET)
    + rb"X(.)\0\0\0([0-9]{1,9})%b" % _PUT
    + rb"(?:X\x03\0\0\0cpu%b|%b)" % (_PUT, _GET)
    + rb"(%b)(N?)t%bQ" % (_NUMBER, _PUT)
    + rb"(%b)" % _NUMBER
    + _SIZES
    + _SIZES
    + rb"([\x88\x89])(?:c(collections\nOrderedDict)\n%b|%b)\)R%bt%bR" % (_PUT, _GET, _PUT, _PUT),
    re.S,
).match
_ENTRY = 128  # what a memo entry is counted with
_MOST = 16  # more memo entries than a row makes
# What the steps of a row count beside numbers, sizes and what is new in it, one by one (tests hold the sum to
# theirs), and its opcodes likewise.
_COST = 3 * 16 + 80 + 104 + 160 + 3 * 16 + 64 + 16 + 112 + 112 + 640 + 16
_OPCODES = 15


def tensor_row(machine: Machine) -> bool:
    """At the mark after a function that rebuilds a tensor: that tensor in place of the function. False, and
    nothing done, where that is for the steps to do."""
    function = machine.stack[-1] if machine.stack else None
    if type(function) is not Global or function.name != "_rebuild_tensor_v2":
        return False
    row = _ROW(machine.data, machine.pos)
    if row is None or function.module != "torch._utils":
        return False
    (
        word_put, word, kind_line, kind_put, kind_get, key_size, key_text, key_put, cpu_put, place,
        count, none, pid_put, start, sizes, sizes_put, steps, steps_put,
        grad, hooks_line, hooks_put, hooks_get, made_put, args_put,
    ) = row.groups()  # fmt: skip
    recall, known_line = machine.memo.get, machine.lines_known.get
    text = recall(_recalled(word)) if word else "storage"
    kind = recall(_recalled(kind_get)) if kind_get else known_line(kind_line)
    hooks = recall(_recalled(hooks_get)) if hooks_get else known_line(hooks_line)
    location = recall(_recalled(place)) if place else "cpu"
    if text != "storage" or type(kind) is not Global or type(location) is not str or not _is_hooks(hooks):
        return False
    key, dtype = key_text.decode("ascii"), storage_dtype(kind)
    (numel, numel_cost), (offset, offset_cost) = _number(count), _number(start)
    ref = StorageRef(key, dtype, location, numel)
    held = machine.storages.get(key, ref)
    shape, shape_cost, shape_opcodes = _sizes(sizes)
    strides, strides_cost, strides_opcodes = _sizes(steps)
    cost = _COST + shape_cost + strides_cost + len(key) + 16 * len(shape) + 24 * len(none)
    cost += numel_cost + offset_cost + (0 if word else 71) + (0 if place else 67)
    wrong = numel < 0 or key_size[0] != len(key) or (held is not ref and held != ref)
    if not dtype or wrong or not _has_room(machine, cost):
        return False
    puts = (
        word_put, kind_put, key_put, cpu_put, pid_put, sizes_put, steps_put, hooks_put, made_put, args_put,
    )  # fmt: skip
    entries = [recalled(put) for put in puts if put is not None]
    if not machine.memo.keys().isdisjoint(entries):  # what is recalled may have changed since
        return False
    if entries:
        pid = ("storage", kind, key, location, numel, *[None] * len(none))
        args: Args = (held, offset, shape, strides, grad == b"\x88", {})
        values = (text, kind, key, location, pid, shape, strides, hooks, args[-1], args)
        new = [value for put, value in zip(puts, values, strict=True) if put is not None]
        machine.memo.update(zip(entries, new, strict=True))
    if not machine.in_rows:
        machine.called |= {function, hooks}
    machine.storages[key] = held
    machine.tensors += 1
    machine.memory -= cost + _ENTRY * len(entries)
    machine.in_rows += _OPCODES + shape_opcodes + strides_opcodes + len(none) + len(entries)
    machine.pos = row.end()
    machine.stack[-1] = TensorRecord(held, dtype, offset, shape, strides, machine.base + machine.pos - 1)
    return True


def _is_hooks(value: object) -> TypeGuard[Global]:
    """Whether it is what an empty dict is made with, where a tensor's hooks stand."""
    return type(value) is Global and value.name == "OrderedDict" and value.module == "collections"


def _has_room(machine: Machine, cost: int) -> bool:
    """Whether a row that is counted with `cost` keeps to every limit, wherever in it that is looked at."""
    limits = machine.limits
    return (
        machine.memory >= cost + _MOST * _ENTRY + 4 * 72
        and machine.tensors < limits.tensors
        and len(machine.memo) + _MOST <= limits.memo
        and len(machine.marked) + 3 <= limits.nesting
    )


@lru_cache(4096)  # layers are alike
def _sizes(data: bytes) -> tuple[tuple[int, ...], int, int]:
    """The tuple of numbers that the opcodes in `data` push, what it is counted with, and their number."""
    if data == b")":
        return (), 16, 1
    marked = data[0] == ord("(")
    found = _EACH.findall(data[marked:-1])
    cost = 64 + sum(8 + _number_cost(n) for n in found)
    return tuple(map(number, found)), cost, len(found) + 1 + marked


_EACH = re.compile(_NUMBER, re.S)


_recalled = lru_cache(4096)(recalled)  # neighbours recall the same


@lru_cache(4096)
def _number(data: bytes) -> tuple[int, int]:
    """The number that the opcode in `data` pushes, and what it is counted with."""
    return number(data), _number_cost(data)


def _number_cost(data: bytes) -> int:
    return 16 if data[0] == ord("K") else 48
