"""Which tensor names are accepted, whatever container they come from.

A name ends up in terminals, reports, JSON keys and safetensors headers, so one that cannot be shown, cannot
be told from another, or means something else in the output format is refused when the file is opened.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator

from ckpt_tool.errors import Problem

NAME_BYTES = 512
RESERVED = "__metadata__"  # what safetensors calls its own entry in the header
_INVISIBLE = ("Cc", "Cf", "Zl", "Zp")  # control characters, bidirectional marks, line separators


def name_fault(name: str) -> str | None:
    """What is wrong with a tensor name, or None."""
    if name.isascii():
        if not name:
            return "expected a tensor name, found an empty one"
        size = len(name)
    else:
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            return "expected a tensor name of Unicode text, found a lone surrogate"
    if size > NAME_BYTES:
        return f"expected a tensor name of at most {NAME_BYTES} bytes, found {size}"
    if not name.isprintable():
        for c in name:
            if unicodedata.category(c) in _INVISIBLE:
                return f"expected a tensor name of visible characters, found U+{ord(c):04X}"
    if name == RESERVED:
        return f"expected a tensor name, found {RESERVED}, which safetensors keeps for itself"
    return None


def name_problems(names: Iterable[str], *, file: str) -> Iterator[Problem]:
    """Every unacceptable name of one file, and every pair that differs only in Unicode composition."""
    composed: dict[str, str] = {}
    for name in names:
        fault = name_fault(name)
        if fault is not None:
            yield Problem("bad-name", fault, file, name)
        elif not name.isascii():
            # An ASCII name is its own composed form and has no other, so it cannot have a twin.
            other = composed.setdefault(unicodedata.normalize("NFC", name), name)
            if other != name:
                yield Problem("bad-name", "two tensor names differ only in Unicode composition", file, name)
