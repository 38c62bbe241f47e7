"""JSON as RFC 8259 means it, and no more: the reader for every JSON file that comes with a checkpoint.

The standard library accepts NaN, takes the last of two equal keys, counts `true` as 1 and runs out of stack
on deep nesting. Here each of those is an error that names the field; sizes, depth and what the parsed values
take in memory have limits: a file of 16 MiB can hold five million empty objects, which take a gigabyte.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection, Generator, Iterator, Mapping
from typing import Any, Literal, NoReturn, overload

from ckpt_tool.errors import fail, printable

MAX_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_INTEGER = 2**63 - 1
# Digits of an integer that is only passed on (transformers writes 10^30 for "no limit"): less than 10^300, so
# that it is still finite as a float. What a rule reads as a count has a range of its own.
MAX_DIGITS = 300
MAX_HELD = 128 << 20  # bytes that the values of one file may take once parsed, by the estimate below

# Upper estimates for CPython: what comes with each mark outside strings. A value in a list: its slot and the
# value; a member: its key, its slot, and the pair and the decoder's record of keys while they are built.
_COST = {",": 64, ":": 160, "[": 104, "{": 72}
_MARKS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[,:\[{]', re.DOTALL)
_LONG = 1 << 20  # characters; a shorter value cannot come near the limit

_TOKENS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
# An object of scalars and flat lists.
_SHALLOW = re.compile(r'\{(?:"[^"\\]*+"|[^"{}\[\]]|\[[^"{}\[\]]*+\])*+\}')
_SPACE = re.compile(r"[ \t\n\r]*+")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class _Fault:
    """Stands in the parsed value where something was refused, until its field is known."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Hooks:
    """What the decoder asks of each value, and how many it refused. It knows no text: a decoder and its hooks
    hold each other, and what they hold is freed late."""

    def __init__(self, wide: bool) -> None:
        self.wide = wide
        self.faults = 0
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_int=self._integer,
            parse_float=self._float,
        )

    def _fault(self, message: str) -> _Fault:
        self.faults += 1
        return _Fault(message)

    def _constant(self, text: str) -> _Fault:
        return self._fault(f"expected a number, found {text}, which JSON does not have")

    def _integer(self, text: str) -> int | _Fault:
        if self.wide and len(text.lstrip("-")) <= MAX_DIGITS:
            return int(text)
        if len(text) > 20 or abs(number := int(text)) > MAX_INTEGER:
            most = f"of at most {MAX_DIGITS} digits" if self.wide else "below 2^63"
            return self._fault(f"expected an integer {most}, found {printable(text, 40)}")
        return number

    def _float(self, text: str) -> float | _Fault:
        if math.isfinite(number := float(text)):
            return number
        return self._fault(f"expected a finite number, found {printable(text, 40)}")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    found[key] = self._fault("expected each key once, found it twice in one object")
                seen.add(key)
        return found


AS_UTF8 = "save it again as UTF-8 without a byte order mark, as editors call it"


class _Reader:
    """One JSON text being parsed; knows how its errors are to be labelled.

    The decoder's hooks do not know which field they are in, so a hook that refuses leaves a `_Fault` in the
    value, and the field is found by walking the value afterwards.
    """

    def __init__(
        self,
        data: bytes,
        file: str,
        kind: str,
        max_bytes: int,
        max_depth: int,
        surrogates: bool = False,
        held: bool = True,
        wide: bool = False,
        most: int = MAX_HELD,
    ) -> None:
        self.file, self.kind, self.held, self.most = file, kind, held, most
        if len(data) > max_bytes:
            self.refuse(f"expected at most {max_bytes} bytes of JSON, found {len(data)}")
        if not data.strip(b" \t\r\n"):
            self.refuse("expected JSON, found nothing")
        if data.startswith(b"\xef\xbb\xbf"):
            self.refuse("expected UTF-8 without a byte order mark, found one", hint=AS_UTF8)
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
            self.refuse("expected UTF-8, found UTF-16 or UTF-32", hint=AS_UTF8)
        try:
            self.text = data.decode()
        except UnicodeDecodeError as error:
            self.refuse(f"expected UTF-8, found byte 0x{data[error.start]:02x} at {error.start}")
        self.look_for_surrogates = not surrogates and _SURROGATE_ESCAPE.search(self.text) is not None
        self.max_depth = max_depth
        # with so few brackets nothing nests too deep
        self.flat = held and self.text.count("{") + self.text.count("[") <= max_depth
        if held:
            self._check_memory(0, len(self.text))
        self.hooks = _Hooks(wide)

    def refuse(self, message: str, where: str | None = None, hint: str | None = None) -> NoReturn:
        fail(self.kind, message, file=self.file, where=where, hint=hint)

    def refuse_at(self, position: int, expected: str, found: str | None = None) -> NoReturn:
        line = self.text.count("\n", 0, position) + 1
        column = position - self.text.rfind("\n", 0, position)
        rest = self.text[position : position + 20]
        found = found or (f"`{printable(rest)}`" if rest else "the end of the file")
        self.refuse(f"expected {expected}, found {found} at line {line}, column {column}")

    def _check_memory(self, start: int, end: int) -> None:
        """Refuse text whose values would take more than `most` bytes, before any of them is made. Marks
        in strings count for nothing; telling them apart takes time, and is not needed where all are few."""
        text = self.text
        if sum(text.count(mark, start, end) * cost for mark, cost in _COST.items()) <= self.most:
            return
        taken = 0
        for token in _MARKS.finditer(text, start, end):
            taken += _COST.get(token[0], 0)
            if taken > self.most:
                self.refuse_at(
                    token.start(), f"values that take at most {self.most >> 20} MiB of memory", "more"
                )

    def _check_value(self, position: int) -> None:
        """Refuse a value that nests too deep before the recursive decoder meets it, and one that takes too
        much memory where values are looked at one by one."""
        if self.flat:
            return
        end = self._end_of(position)
        if not self.held and end - position > _LONG:
            self._check_memory(position, end)

    def _end_of(self, position: int) -> int:
        """Where an object or a list ends, as far as its brackets tell; `position` for any other value."""
        if self.text[position : position + 1] not in ("{", "["):
            return position
        if shallow := _SHALLOW.match(self.text, position):
            return shallow.end()
        depth = 0
        for token in _TOKENS.finditer(self.text, position):
            character = token[0][0]
            if character in "[{":
                depth += 1
                if depth > self.max_depth:
                    self.refuse_at(token.start(), f"at most {self.max_depth} levels of nesting")
            elif character in "]}":
                depth -= 1
                if depth == 0:
                    return token.end()
        return len(self.text)

    def skip(self, position: int) -> int:
        match = _SPACE.match(self.text, position)
        return match.end() if match else position

    def value(self, position: int, field: str = "") -> tuple[Any, int]:
        """The value that starts at `position`, and where it ends."""
        self._check_value(position)
        try:
            found, end = self.hooks.decoder.raw_decode(self.text, position)
        except json.JSONDecodeError as error:
            self.refuse_at(error.pos, _WORDS.get(error.msg, "JSON"))
        if self.hooks.faults or self.look_for_surrogates:
            self._check(found, field)
        return found, end

    def end(self, position: int) -> None:
        if (rest := self.skip(position)) != len(self.text):
            self.refuse_at(rest, "the end of the file")

    def _check(self, found: Any, field: str) -> None:
        """Report the first refused value below `found`, now that the path to it is known."""
        if isinstance(found, _Fault):
            self.refuse(found.message, field or None)
        if isinstance(found, str):
            if self.look_for_surrogates and not found.isascii() and _has_surrogate(found):
                self.refuse("expected Unicode text, found a lone surrogate", field or None)
        elif isinstance(found, dict):
            for key, value in found.items():
                inner = f"{field}.{key}" if field else key
                self._check(key, inner)
                self._check(value, inner)
        elif isinstance(found, list):
            for index, value in enumerate(found):
                if type(value) is not int:
                    self._check(value, f"{field}[{index}]")

    def entries(self, position: int, key: str) -> Generator[tuple[str, Any], None, int]:
        """The values of the list that starts at `position`, one at a time with `key[]`; where it
        ends."""
        text, number = self.text, 0
        self.max_depth -= 1
        position = self.skip(position + 1)
        while text[position : position + 1] != "]":
            value, position = self.value(position, f"{key}[{number}]")
            yield f"{key}[]", value
            number, position = number + 1, self.skip(position)
            mark = text[position : position + 1]
            if mark not in (",", "]"):
                self.refuse_at(position, "`,` or `]`")
            if mark == ",":
                position = self.skip(position + 1)
                if text[position : position + 1] == "]":
                    self.refuse_at(position, "a value after `,`")
        self.max_depth += 1
        return position + 1

    def members(self, listed: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
        """The keys and values of the outermost object, one at a time; of lists that are `listed` the values
        one at a time, each with `key[]`."""
        text, seen = self.text, set()
        self.max_depth -= 1  # this object is the first level
        position = self.skip(0)
        if text[position : position + 1] != "{":
            self.refuse_at(position, "a JSON object")
        position = self.skip(position + 1)
        if text[position : position + 1] == "}":
            return self.end(position + 1)
        while True:
            if text[position : position + 1] != '"':
                self.refuse_at(position, "a key in double quotes")
            key, position = self.value(position)
            position = self.skip(position)
            if text[position : position + 1] != ":":
                self.refuse_at(position, "`:` after a key")
            position = self.skip(position + 1)
            if key in listed:
                if key in seen:
                    self.refuse("expected each key once, found it twice in one object", key)
                seen.add(key)
            if key in listed and text[position : position + 1] == "[":
                position = yield from self.entries(position, key)
            else:
                value, position = self.value(position, key)
                yield key, value
            position = self.skip(position)
            mark = text[position : position + 1]
            if mark == "}":
                return self.end(position + 1)
            if mark != ",":
                self.refuse_at(position, "`,` or `}`")
            position = self.skip(position + 1)


_WORDS = {
    "Expecting value": "a value",
    "Expecting ',' delimiter": "`,`",
    "Expecting ':' delimiter": "`:`",
    "Expecting property name enclosed in double quotes": "a key in double quotes",
    "Illegal trailing comma before end of object": "a key after `,`",
    "Illegal trailing comma before end of array": "a value after `,`",
    "Unterminated string starting at": "the end of a string",
    "Invalid control character at": "a string without raw control characters",
}


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def closes(data: bytes) -> bool:
    """Whether the object or list that starts `data` also ends in it, as far as its brackets tell."""
    depth = 0
    for token in _TOKENS.finditer(data.decode("utf-8", "replace")):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth <= 0:
            return depth == 0 and token[0] in "]}"
    return False


def members(
    data: bytes,
    *,
    file: str,
    kind: str = "bad-config",
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    surrogates: bool = False,
    held: bool = True,
    wide: bool = False,
    most: int = MAX_HELD,
    listed: Collection[str] = (),
) -> Iterator[tuple[str, Any]]:
    """The members of the JSON object in `data`, one at a time, so that a large one is never held twice.

    A key that comes twice is yielded twice; with `surrogates`, lone surrogates are left in the text. Without
    `held` the caller keeps little of each member, and the limit on memory is for each and not for all. With
    `wide`, integers may have up to `MAX_DIGITS` digits. `most` is the limit on memory, in bytes.
    The values of the lists under the keys `listed` come one at a time, each with `key[]`.
    """
    return _Reader(data, file, kind, max_bytes, max_depth, surrogates, held, wide, most).members(listed)


def parse(data: bytes, *, file: str, kind: str = "bad-config") -> Any:
    """The JSON value in `data`, of any type; integers up to `MAX_DIGITS` digits as they are."""
    reader = _Reader(data, file, kind, MAX_BYTES, MAX_DEPTH, wide=True)
    value, end = reader.value(reader.skip(0))
    reader.end(end)
    return value


def parse_object(
    data: bytes,
    *,
    file: str,
    kind: str = "bad-config",
    max_bytes: int = MAX_BYTES,
    most: int = MAX_HELD,
) -> dict[str, Any]:
    """The JSON object in `data`, integers as in `parse`; anything else is refused. `most`: see `members`."""
    found: dict[str, Any] = {}
    known = members(data, file=file, kind=kind, max_bytes=max_bytes, wide=True, most=most)
    del data  # which is text now, and may be 16 MiB
    for key, value in known:
        if key in found:
            fail(kind, "expected each key once, found it twice in one object", file=file, where=key)
        found[key] = value
    return found


def _get(obj: Mapping[str, Any], key: str, expected: str, file: str, optional: bool, within: str) -> Any:
    """`obj[key]`; None when it is absent or null and may be."""
    value = obj.get(key)
    if value is None and not optional:
        found = "null" if key in obj else "none"
        fail("bad-config", f"expected {expected}, found {found}", file=file, where=within + key)
    return value


def _refuse(value: Any, key: str, expected: str, file: str, within: str) -> NoReturn:
    shown = printable(json.dumps(value, ensure_ascii=False, default=repr), 60)
    fail("bad-config", f"expected {expected}, found {shown}", file=file, where=within + key)


@overload
def integer(
    obj: Mapping[str, Any],
    key: str,
    *,
    file: str,
    minimum: int = ...,
    maximum: int = ...,
    optional: Literal[False] = ...,
    text_ok: bool = ...,
    within: str = ...,
) -> int: ...
@overload
def integer(
    obj: Mapping[str, Any],
    key: str,
    *,
    file: str,
    minimum: int = ...,
    maximum: int = ...,
    optional: bool,
    text_ok: bool = ...,
    within: str = ...,
) -> int | None: ...
def integer(
    obj: Mapping[str, Any],
    key: str,
    *,
    file: str,
    minimum: int = 1,
    maximum: int = 2**31,
    optional: bool = False,
    text_ok: bool = False,
    within: str = "",
) -> int | None:
    """`obj[key]` as an integer in `minimum..maximum`; neither `true` nor 32.0 is one.

    With `optional`, an absent or null field gives None. With `text_ok`, "4096" counts as 4096. `within` is
    put before the field in messages ("moe." for an object inside the file).
    """
    expected = f"an integer from {minimum} to {maximum}"
    value = _get(obj, key, expected, file, optional, within)
    if value is None:
        return None
    number = value
    if text_ok and isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value, re.ASCII):
        number = int(value)
    if type(number) is not int or not minimum <= number <= maximum:
        _refuse(value, key, expected, file, within)
    return number


@overload
def number(
    obj: Mapping[str, Any],
    key: str,
    *,
    file: str,
    optional: Literal[False] = ...,
    positive: bool = ...,
    within: str = ...,
) -> float: ...
@overload
def number(
    obj: Mapping[str, Any], key: str, *, file: str, optional: bool, positive: bool = ..., within: str = ...
) -> float | None: ...
def number(
    obj: Mapping[str, Any],
    key: str,
    *,
    file: str,
    optional: bool = False,
    positive: bool = True,
    within: str = "",
) -> float | None:
    """`obj[key]` as a finite float, above 0 unless `positive` is off; integers count, `true` does not."""
    expected = "a finite number above 0" if positive else "a finite number"
    value = _get(obj, key, expected, file, optional, within)
    if value is None:
        return None
    plain = type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN
    if not plain or (positive and value <= 0):
        _refuse(value, key, expected, file, within)
    return float(value)


@overload
def string(
    obj: Mapping[str, Any], key: str, *, file: str, optional: Literal[False] = ..., within: str = ...
) -> str: ...
@overload
def string(
    obj: Mapping[str, Any], key: str, *, file: str, optional: bool, within: str = ...
) -> str | None: ...
def string(
    obj: Mapping[str, Any], key: str, *, file: str, optional: bool = False, within: str = ""
) -> str | None:
    """`obj[key]` as text."""
    value = _get(obj, key, "a string", file, optional, within)
    if value is not None and not isinstance(value, str):
        _refuse(value, key, "a string", file, within)
    return value


@overload
def boolean(
    obj: Mapping[str, Any], key: str, *, file: str, optional: Literal[False] = ..., within: str = ...
) -> bool: ...
@overload
def boolean(
    obj: Mapping[str, Any], key: str, *, file: str, optional: bool, within: str = ...
) -> bool | None: ...
def boolean(
    obj: Mapping[str, Any], key: str, *, file: str, optional: bool = False, within: str = ""
) -> bool | None:
    """`obj[key]` as true or false; 0 and 1 are numbers."""
    value = _get(obj, key, "true or false", file, optional, within)
    if value is not None and not isinstance(value, bool):
        _refuse(value, key, "true or false", file, within)
    return value
