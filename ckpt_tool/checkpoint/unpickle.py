"""A stack machine that reads pickles as data.

It knows the opcodes of protocols 0 to 5, imports nothing and calls nothing: a global becomes its name, an
object a record of what would have been called (pickle_records.py), and torch's rebuild functions become
tensor records (torch_globals.py says which global means what). Python's own `pickle` module is not involved.

The memory used is bounded by what the file's bytes can hold and by `Limits.memory`; no number in the file
makes an allocation. Values that no model needs are passed over: an integer wider than `Limits.integer_bits`,
text or bytes longer than `Limits.string`. Of them there is a record without content. Opcodes and their
arguments: Python's Lib/pickletools.py, 3.11.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from ckpt_tool.checkpoint.pickle_bytes import Cut, Feed, PickleBytes
from ckpt_tool.checkpoint.pickle_records import (
    LIMITS,
    Global,
    Inert,
    Limits,
    Pickled,
    StorageRef,
    TensorRecord,
    describe,
    is_flat,
)
from ckpt_tool.checkpoint.pickle_tensors import tensor_row
from ckpt_tool.checkpoint.torch_globals import MEANINGS, enum_member, storage
from ckpt_tool.errors import CkptToolError, fail

SHORT = 1024  # bytes of text that is taken in one go


def read_pickle(
    data: bytes, *, file: str, limits: Limits = LIMITS, base: int = 0, cut: str = "bad-pickle"
) -> Pickled:
    """The pickle that starts at `data[0]`; what follows it is left alone.

    `base` is the file offset of `data`, for messages. Where the data ends too early the error kind is `cut`.
    Kinds: `bad-pickle`, `unsafe-pickle` (a key that is no plain value, a call of something that is no global,
    state that shadows a method), `pickle-limit`, `duplicate-tensor`, `storage-conflict`.
    """
    return Machine(data, file=file, limits=limits, base=base, cut=cut).run()


class Machine(PickleBytes):
    """One reading of one pickle."""

    def __init__(
        self,
        data: bytes,
        *,
        file: str,
        limits: Limits = LIMITS,
        base: int = 0,
        end: int | None = None,
        feed: Feed | None = None,
        cut: str = "bad-pickle",
    ) -> None:
        super().__init__(data, file=file, base=base, end=end, feed=feed, cut=cut)
        self.limits = limits
        self.stack: list[object] = []
        self.marked: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.imports: dict[Global, int] = {}
        self.names: dict[Global, Global] = {}
        self.short = min(SHORT, limits.string)
        self.lines_known: dict[bytes, object] = {}  # by the lines that name them
        self.called: set[Global] = set()
        self.storages: dict[str, StorageRef] = {}
        self.tensors = 0
        self.in_rows = 0  # opcodes that were done without a step
        self.memory = limits.memory - len(data)

    def run(self) -> Pickled:
        steps = [
            getattr(self, _OPCODES[code][1].__name__) if code in _OPCODES else self.unknown
            for code in range(256)
        ]
        data, end = self.data, len(self.data)
        left = most = self.limits.opcodes
        try:
            while True:
                at = self.start = self.pos
                try:
                    if at >= end:
                        raise Cut
                    left -= 1
                    if left < self.in_rows:
                        self.fault("pickle-limit", f"expected at most {most} opcodes, found more")
                    self.pos = at + 1
                    if steps[data[at]]():
                        break
                except Cut:
                    self.move_on()
                    data, end = self.data, len(self.data)
        except IndexError:
            self.fault("bad-pickle", "expected a value on the stack, found it empty")
        if len(self.stack) != 1 or self.marked:
            self.fault("bad-pickle", f"expected one value at the end, found {len(self.stack)}")
        return Pickled(
            self.stack[0],
            self.imports,
            frozenset(self.called),
            self.storages,
            self.base + self.pos - self.first,
        )

    def scan(self) -> tuple[str, ...]:
        """The globals that are named up to the end or the first fault, "module.name" in order."""
        with suppress(CkptToolError):
            self.run()
        return tuple(map(str, self.imports))

    def opcode(self) -> str:
        if self.start >= len(self.data):
            return "the end"
        code = self.data[self.start]
        return _OPCODES[code][0] if code in _OPCODES else f"{code:#04x}"

    def unknown(self) -> NoReturn:
        self.fault(
            "bad-pickle", f"expected an opcode of a torch pickle, found byte {self.data[self.start]:#04x}"
        )

    # Reading arguments

    def counted(self, width: int, read: Callable[[bytes], object]) -> object:
        """What `read` makes of the bytes after a length of `width` bytes."""
        size = self.number(width)
        if size > self.limits.string:
            self.pass_over(size)
            return self.passed_over("bytes")
        raw = self.take(size)
        self.spend(size)
        return read(raw)

    def passed_over(self, kind: str) -> Inert:
        """A record of a value of which nothing is kept."""
        self.spend(200)
        return Inert(Global("builtins", kind), (), self.at)

    def value_line(self, read: Callable[[bytes], object]) -> object:
        """What `read` makes of the rest of the line."""
        size = self.rest_of_line()
        if size > self.limits.string:
            self.pass_over(size + 1)
            return self.passed_over("str")
        raw = self.take(size + 1)[:-1]
        self.spend(4 * size)
        return read(raw)

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.pos, self.pos + self.limits.string + 1)
        if end < 0:
            if len(self.data) - self.pos > self.limits.string:
                self.fault(
                    "pickle-limit", f"expected at most {self.limits.string} bytes in a line, found more"
                )
            self.cut("the end of a line")
        text = self.data[self.pos : end]
        self.pos = end + 1
        return text

    def text(self, raw: bytes) -> str:
        try:
            text = raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            self.fault("bad-pickle", f"expected UTF-8 text, found byte {raw[error.start]:#04x}")
        if not text.isascii():
            self.spend(4 * len(text))
        return text

    def integer(self, raw: bytes) -> int | Inert:
        """The integer of these little-endian bytes."""
        if len(raw) > 256:  # to read a long one takes time
            return self.passed_over("int")
        return self.bounded(int.from_bytes(raw, "little", signed=True))

    def bounded(self, value: int) -> int | Inert:
        bits = self.limits.integer_bits
        return value if -(1 << (bits - 1)) <= value < 1 << bits else self.passed_over("int")

    # The stack

    def spend(self, size: int) -> None:
        self.memory -= size
        if self.memory < 0:
            self.fault("pickle-limit", f"expected at most {self.limits.memory} bytes of objects, found more")

    def push(self, value: object, cost: int = 16) -> None:
        self.memory -= cost
        if self.memory < 0:
            self.spend(0)
        self.stack.append(value)

    def pop_mark(self) -> list[object]:
        if not self.marked:
            self.fault("bad-pickle", "expected a mark on the stack, found none")
        items = self.stack
        self.stack = self.marked.pop()
        self.memory += 72
        return items

    def set_items(self, target: object, flat: list[object]) -> None:
        """Set `flat`, key after value after key, on a dict or an inert mapping."""
        if len(flat) % 2:
            self.fault("bad-pickle", "expected as many values as keys, found one key more")
        self.spend(64 * len(flat))
        keys = flat[::2]
        if type(target) is dict and {*map(type, keys)} == {str} and target.keys().isdisjoint(keys):
            before = len(target)
            target.update(zip(keys, flat[1::2], strict=True))
            if len(target) == before + len(keys):
                return
            for key in keys:  # to find the one that comes twice
                target.pop(key, None)
        for key, value in zip(keys, flat[1::2], strict=True):
            if type(key) is not str and type(key) is not int and type(key) is not bytes:
                key = self.odd_key(key)
            if type(target) is dict:
                if key in target:
                    self.duplicate(key, target[key], value)
                target[key] = value
            elif type(target) is Inert:
                target.items = target.items or []
                target.items.append((key, value))
            else:
                self.fault("bad-pickle", f"expected a dict to put items in, found {describe(target)}")

    def odd_key(self, key: object) -> Inert:
        """A key that is no name: a record that is equal to itself only, so that no key of the file's making
        is ever hashed by its content. Optimizers that are saved whole keep what they know by parameter."""
        if type(key) is not TensorRecord and not is_flat(key):
            self.fault("unsafe-pickle", f"expected a dict key of plain values, found {describe(key)}")
        self.spend(200)
        return key if type(key) is Inert else Inert(Global("builtins", "object"), (key,), self.at)

    def duplicate(self, key: object, first: object, second: object) -> NoReturn:
        places = [v.at if isinstance(v, TensorRecord | Inert) else None for v in (first, second)]
        shown = " and ".join("a plain value" if p is None else f"the one made at byte {p}" for p in places)
        fail(
            "duplicate-tensor",
            f"expected each key once, found it again at byte {self.at} of the pickle: {shown}",
            file=self.file,
            where=key,
        )

    def append_items(self, target: object, items: list[object]) -> None:
        self.spend(16 * len(items))
        if type(target) is list:
            target.extend(items)
        elif type(target) is Inert:
            target.items = target.items or []
            target.items.extend(items)
        else:
            self.fault("bad-pickle", f"expected a list to append to, found {describe(target)}")

    def remember(self, index: int) -> None:
        if len(self.memo) >= self.limits.memo:
            self.fault("pickle-limit", f"expected at most {self.limits.memo} memo entries, found more")
        self.memory -= 128  # what it comes to is checked when the next value is pushed
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            self.fault("bad-pickle", f"expected memo entry {index}, found none of that number")
        self.push(self.memo[index])

    # Globals and objects

    def find(self, module: str, name: str) -> None:
        wanted = Global(module, name)
        found = self.names.setdefault(wanted, wanted)
        self.imports.setdefault(found, self.at)
        self.push(found, 300 + len(module) + len(name) if found is wanted else 16)

    def make(self, function: object, args: object) -> object:
        """What a call stands for: a tensor or plain value where the function is known, else an inert
        object."""
        if type(function) is not Global:
            self.fault(
                "unsafe-pickle", f"expected a call of a named global, found a call of {describe(function)}"
            )
        if type(args) is not tuple:
            self.fault("bad-pickle", f"expected a tuple of arguments, found {describe(args)}")
        meaning = MEANINGS.get((function.module, function.name))
        if meaning is not enum_member:  # which says for itself when it stands for a call
            self.called.add(function)
        self.spend(64 + 8 * len(args))  # the length too, as the same tuple may be passed many times
        if meaning is None:
            self.spend(96)
            return Inert(function, args, self.at)
        return meaning(self, function, args)

    def count_tensor(self, dimensions: int) -> None:
        self.tensors += 1
        if self.tensors > self.limits.tensors:
            self.fault("pickle-limit", f"expected at most {self.limits.tensors} tensors, found more")
        self.spend(640 + 16 * dimensions)  # with what the reader keeps of it later

    # Opcodes

    def op_proto(self) -> None:
        version = self.number(1)
        if self.at != self.first:
            self.fault("bad-pickle", "expected the protocol at the start, found it again later")
        if version > 5:
            self.fault("bad-pickle", f"expected pickle protocol 0 to 5, found {version}")

    def op_frame(self) -> None:
        size = self.number(8)
        if self.at < self.frame_end:
            self.fault("bad-pickle", f"expected the frame to last until byte {self.frame_end}, found another")
        self.frame_end = self.base + self.pos + size
        if self.frame_end > self.end:
            found = f"found the end of the data at byte {self.end}"
            self.fault(self.cut_kind, f"expected a frame of {size} bytes, {found}")

    def op_stop(self) -> bool:
        return True

    def op_unsupported(self) -> None:
        self.fault("bad-pickle", "expected an opcode that torch files use, found one that they do not")

    def op_mark(self) -> None:
        if self.data.startswith(b"(", self.pos) and tensor_row(self):
            return
        if len(self.marked) >= self.limits.nesting:
            self.fault("pickle-limit", f"expected at most {self.limits.nesting} open containers, found more")
        self.memory -= 72
        if self.memory < 0:
            self.spend(0)
        self.marked.append(self.stack)
        self.stack = []

    def op_pop(self) -> None:
        if self.stack or not self.marked:
            self.stack.pop()
        else:
            self.pop_mark()

    def op_pop_mark(self) -> None:
        self.pop_mark()

    def op_dup(self) -> None:
        self.push(self.stack[-1])

    def op_none(self) -> None:
        self.push(None)

    def op_newtrue(self) -> None:
        self.push(True)

    def op_newfalse(self) -> None:
        self.push(False)

    def op_binint(self) -> None:
        self.push(int.from_bytes(self.take(4), "little", signed=True), 48)

    def op_binint1(self) -> None:
        self.push(self.byte())

    def op_binint2(self) -> None:
        self.push(self.number(2), 48)

    def op_long1(self) -> None:
        self.push(self.counted(1, self.integer), 48)

    def op_long4(self) -> None:
        self.push(self.counted(4, self.integer), 48)

    def op_int(self) -> None:
        raw = self.line()
        if raw in (b"00", b"01"):
            self.push(raw == b"01")
        else:
            self.push(self.decimal(raw), 48)

    def op_long(self) -> None:
        self.push(self.decimal(self.line().removesuffix(b"L")), 48)

    def decimal(self, raw: bytes) -> int | Inert:
        if not _DECIMAL.fullmatch(raw):
            self.fault("bad-pickle", f"expected a decimal integer, found {raw[:40]!r}")
        return self.bounded(int(raw)) if len(raw) <= 80 else self.passed_over("int")

    def index(self) -> int:
        """The number of a memo entry."""
        found = self.decimal(self.line())
        if type(found) is not int:
            self.fault("pickle-limit", "expected the number of a memo entry, found one of more than 64 bits")
        return found

    def op_float(self) -> None:
        raw = self.line()
        if not _FLOAT.fullmatch(raw):
            self.fault("bad-pickle", f"expected a decimal number, found {raw[:40]!r}")
        self.push(float(raw), 48)

    def op_binfloat(self) -> None:
        self.push(struct.unpack(">d", self.take(8))[0], 48)

    def op_string(self) -> None:
        self.push(self.value_line(self.quoted), 80)

    def quoted(self, raw: bytes) -> str | bytes:
        if len(raw) < 2 or raw[:1] not in (b"'", b'"') or raw[-1:] != raw[:1]:
            self.fault("bad-pickle", f"expected a quoted string, found {raw[:40]!r}")
        try:
            return self.old_string(codecs.escape_decode(raw[1:-1])[0])
        except ValueError:
            self.fault("bad-pickle", f"expected a string with whole escapes, found {raw[:40]!r}")

    def op_short_binstring(self) -> None:
        self.push(self.counted(1, self.old_string), 80)

    def op_binstring(self) -> None:
        self.push(self.counted(4, self.old_string), 80)

    def old_string(self, raw: bytes) -> str | bytes:
        """A Python 2 str: text where it is UTF-8, as torch reads it, else bytes."""
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return raw
        if not text.isascii():
            self.spend(4 * len(text))
        return text

    def op_unicode(self) -> None:
        self.push(self.value_line(self.escaped), 80)

    def escaped(self, raw: bytes) -> str:
        try:
            return raw.decode("raw-unicode-escape")
        except UnicodeDecodeError:
            self.fault("bad-pickle", f"expected text with whole escapes, found {raw[:40]!r}")

    def op_short_binunicode(self) -> None:
        self.push(self.counted(1, self.text), 80)

    def op_binunicode(self) -> None:
        begin = self.pos + 4
        end = begin + int.from_bytes(self.data[self.pos : begin], "little")
        if end - begin > self.short or end > len(self.data) or not (raw := self.data[begin:end]).isascii():
            self.push(self.counted(4, self.text), 80)
            return
        self.pos = end
        self.push(raw.decode("ascii"), 80 + end - begin)

    def op_binunicode8(self) -> None:
        self.push(self.counted(8, self.text), 80)

    def op_short_binbytes(self) -> None:
        self.push(self.counted(1, bytes), 48)

    def op_binbytes(self) -> None:
        self.push(self.counted(4, bytes), 48)

    def op_binbytes8(self) -> None:
        self.push(self.counted(8, bytes), 48)

    def op_empty_list(self) -> None:
        self.push([], 72)

    def op_empty_dict(self) -> None:
        self.push({}, 80)

    def op_empty_tuple(self) -> None:
        self.push(())

    def op_empty_set(self) -> None:
        self.push(Inert(Global("builtins", "set"), (), self.at), 200)

    def op_list(self) -> None:
        items = self.pop_mark()
        self.push(items, 72)

    def op_dict(self) -> None:
        flat = self.pop_mark()
        made: dict[object, object] = {}
        self.set_items(made, flat)
        self.push(made, 80)

    def op_tuple(self) -> None:
        items = self.pop_mark()
        self.push(tuple(items), 64 + 8 * len(items))

    def op_tuple1(self) -> None:
        self.push((self.stack.pop(),), 72)

    def op_tuple2(self) -> None:
        second, first = self.stack.pop(), self.stack.pop()
        self.push((first, second), 80)

    def op_tuple3(self) -> None:
        third, second, first = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.push((first, second, third), 88)

    def op_frozenset(self) -> None:
        items = self.pop_mark()
        self.push(Inert(Global("builtins", "frozenset"), (items,), self.at), 240)

    def op_append(self) -> None:
        item = self.stack.pop()
        self.append_items(self.stack[-1], [item])

    def op_appends(self) -> None:
        items = self.pop_mark()
        self.append_items(self.stack[-1], items)

    def op_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is not Inert:
            self.fault("bad-pickle", f"expected a set to add to, found {describe(target)}")
        self.append_items(target, items)

    def op_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items(self.stack[-1], [key, value])

    def op_setitems(self) -> None:
        flat = self.pop_mark()
        self.set_items(self.stack[-1], flat)

    def op_get(self) -> None:
        self.recall(self.index())

    def op_binget(self) -> None:
        self.recall(self.byte())

    def op_long_binget(self) -> None:
        self.recall(self.number(4))

    def op_put(self) -> None:
        self.remember(self.index())

    def op_binput(self) -> None:
        self.remember(self.byte())

    def op_long_binput(self) -> None:
        self.remember(self.number(4))

    def op_memoize(self) -> None:
        self.remember(len(self.memo))

    def op_global(self) -> None:
        begin = self.pos
        end = self.data.find(b"\n", self.data.find(b"\n", begin, begin + 256) + 1, begin + 512)
        known = self.lines_known.get(self.data[begin:end])
        if known is not None:  # some programs name it in full each time
            self.pos = end + 1
            self.push(known)
            return
        module = self.text(self.line())
        self.find(module, self.text(self.line()))
        if end >= 0 and self.pos == end + 1:
            self.lines_known[self.data[begin:end]] = self.stack[-1]

    def op_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            found = f"{describe(module)} and {describe(name)}"
            self.fault("bad-pickle", f"expected a module and a name as text, found {found}")
        self.find(module, name)

    def op_binpersid(self) -> None:
        self.push(storage(self, self.stack.pop()), 160)

    def op_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.push(self.make(function, args))

    def op_newobj_ex(self) -> None:
        named, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if type(named) is not dict or type(args) is not tuple:
            self.fault("bad-pickle", "expected a tuple and a dict of arguments, found other types")
        self.push(self.make(function, (*args, named) if named else args))

    def op_inst(self) -> None:
        module, name = self.text(self.line()), self.text(self.line())
        args = tuple(self.pop_mark())
        self.find(module, name)
        self.push(self.make(self.stack.pop(), args))

    def op_obj(self) -> None:
        items = self.pop_mark()
        function = items.pop(0)
        self.push(self.make(function, tuple(items)))

    def op_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is dict:
            if state is not None and (type(state) is not dict or state.keys() - {"_metadata"}):
                found = describe(state) if type(state) is not dict else ", ".join(map(repr, list(state)[:4]))
                message = f"expected only `_metadata` as the state of an ordered dict, found {found[:200]}"
                self.fault("unsafe-pickle", message)
        elif type(target) is Inert and target.state is None:
            for part in state if type(state) is tuple else (state,):
                self.spend(16 * len(part) if type(part) is dict else 16)
                for name in part if type(part) is dict else ():
                    if type(name) is str and name.startswith("__") and not _STATE.fullmatch(name):
                        self.fault(
                            "unsafe-pickle", f"expected plain attributes of an object, found `{name[:80]}`"
                        )
            target.state = state
        else:
            self.fault("unsafe-pickle", f"expected an object to give a state, found {describe(target)}")


_DECIMAL = re.compile(rb"[+-]?[0-9]+")
# Attributes of any name, and those in which pydantic and typing keep what they know of an object's fields.
_STATE = re.compile(
    r"__.*(?<!__)|__(dict|fields_set|private_attribute_values|orig_class|pydantic_\w+)__", re.S
)
_FLOAT = re.compile(rb"[+-]?([0-9]{1,20}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,4})?|[+-]?(inf|nan)")

# Opcode byte -> its name in pickletools and what it does here. Those marked `op_unsupported` are legal
# pickle, but stand for tables or buffers that are not in the file, or are written by no version of torch.
_OPCODES: dict[int, tuple[str, Callable[[Machine], object]]] = {
    ord("("): ("MARK", Machine.op_mark),
    ord("."): ("STOP", Machine.op_stop),
    ord("0"): ("POP", Machine.op_pop),
    ord("1"): ("POP_MARK", Machine.op_pop_mark),
    ord("2"): ("DUP", Machine.op_dup),
    ord("F"): ("FLOAT", Machine.op_float),
    ord("I"): ("INT", Machine.op_int),
    ord("J"): ("BININT", Machine.op_binint),
    ord("K"): ("BININT1", Machine.op_binint1),
    ord("L"): ("LONG", Machine.op_long),
    ord("M"): ("BININT2", Machine.op_binint2),
    ord("N"): ("NONE", Machine.op_none),
    ord("P"): ("PERSID", Machine.op_unsupported),
    ord("Q"): ("BINPERSID", Machine.op_binpersid),
    ord("R"): ("REDUCE", Machine.op_reduce),
    ord("S"): ("STRING", Machine.op_string),
    ord("T"): ("BINSTRING", Machine.op_binstring),
    ord("U"): ("SHORT_BINSTRING", Machine.op_short_binstring),
    ord("V"): ("UNICODE", Machine.op_unicode),
    ord("X"): ("BINUNICODE", Machine.op_binunicode),
    ord("a"): ("APPEND", Machine.op_append),
    ord("b"): ("BUILD", Machine.op_build),
    ord("c"): ("GLOBAL", Machine.op_global),
    ord("d"): ("DICT", Machine.op_dict),
    ord("}"): ("EMPTY_DICT", Machine.op_empty_dict),
    ord("e"): ("APPENDS", Machine.op_appends),
    ord("g"): ("GET", Machine.op_get),
    ord("h"): ("BINGET", Machine.op_binget),
    ord("i"): ("INST", Machine.op_inst),
    ord("j"): ("LONG_BINGET", Machine.op_long_binget),
    ord("l"): ("LIST", Machine.op_list),
    ord("]"): ("EMPTY_LIST", Machine.op_empty_list),
    ord("o"): ("OBJ", Machine.op_obj),
    ord("p"): ("PUT", Machine.op_put),
    ord("q"): ("BINPUT", Machine.op_binput),
    ord("r"): ("LONG_BINPUT", Machine.op_long_binput),
    ord("s"): ("SETITEM", Machine.op_setitem),
    ord("t"): ("TUPLE", Machine.op_tuple),
    ord(")"): ("EMPTY_TUPLE", Machine.op_empty_tuple),
    ord("u"): ("SETITEMS", Machine.op_setitems),
    ord("G"): ("BINFLOAT", Machine.op_binfloat),
    ord("B"): ("BINBYTES", Machine.op_binbytes),
    ord("C"): ("SHORT_BINBYTES", Machine.op_short_binbytes),
    0x80: ("PROTO", Machine.op_proto),
    0x81: ("NEWOBJ", Machine.op_reduce),  # makes the same record
    0x82: ("EXT1", Machine.op_unsupported),
    0x83: ("EXT2", Machine.op_unsupported),
    0x84: ("EXT4", Machine.op_unsupported),
    0x85: ("TUPLE1", Machine.op_tuple1),
    0x86: ("TUPLE2", Machine.op_tuple2),
    0x87: ("TUPLE3", Machine.op_tuple3),
    0x88: ("NEWTRUE", Machine.op_newtrue),
    0x89: ("NEWFALSE", Machine.op_newfalse),
    0x8A: ("LONG1", Machine.op_long1),
    0x8B: ("LONG4", Machine.op_long4),
    0x8C: ("SHORT_BINUNICODE", Machine.op_short_binunicode),
    0x8D: ("BINUNICODE8", Machine.op_binunicode8),
    0x8E: ("BINBYTES8", Machine.op_binbytes8),
    0x8F: ("EMPTY_SET", Machine.op_empty_set),
    0x90: ("ADDITEMS", Machine.op_additems),
    0x91: ("FROZENSET", Machine.op_frozenset),
    0x92: ("NEWOBJ_EX", Machine.op_newobj_ex),
    0x93: ("STACK_GLOBAL", Machine.op_stack_global),
    0x94: ("MEMOIZE", Machine.op_memoize),
    0x95: ("FRAME", Machine.op_frame),
    0x96: ("BYTEARRAY8", Machine.op_binbytes8),
    0x97: ("NEXT_BUFFER", Machine.op_unsupported),
    0x98: ("READONLY_BUFFER", Machine.op_unsupported),
}
