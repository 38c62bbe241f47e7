"""The bytes of a pickle, read through a window that moves on: how long a pickle is shows only at its end, and
a value in it can be as long as the file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NoReturn

from ckpt_tool.errors import fail

WINDOW = 4 << 20  # more than any opcode with its argument, of what is kept

Feed = Callable[[int], bytes]  # the bytes from an offset on, WINDOW of them where there are as many


class Cut(Exception):
    """An opcode reaches beyond the window; it is read again from its start."""


class PickleBytes(ABC):
    """`data` are the first bytes, from the offset `base` on, and all where there is no `feed`; `end` is the
    offset at which they end at the latest. Where they end too early the error kind is `cut`."""

    def __init__(
        self,
        data: bytes,
        *,
        file: str,
        base: int = 0,
        end: int | None = None,
        feed: Feed | None = None,
        cut: str = "bad-pickle",
    ) -> None:
        self.data = data
        self.file = file
        self.base = base  # the offset of the window
        self.first = base
        self.end = base + len(data) if end is None else end
        self.feed = feed
        self.cut_kind = cut
        self.pos = 0  # of the next byte to read, in the window
        self.start = 0  # of the opcode being executed
        self.frame_end = 0  # an offset

    @property
    def at(self) -> int:
        """Where the current opcode stands in the file."""
        return self.base + self.start

    @abstractmethod
    def opcode(self) -> str:
        """The name of the current opcode, or "the end"."""

    def fault(self, kind: str, message: str) -> NoReturn:
        hint = "save the weights alone with torch.save" if kind == "pickle-limit" else None
        message = f"{message} (opcode {self.opcode()} at byte {self.at} of the pickle)"
        fail(kind, message, file=self.file, hint=hint)

    def cut(self, what: str) -> NoReturn:
        if self.feed is not None and (self.start > 0 or len(self.data) < min(WINDOW, self.end - self.base)):
            raise Cut(what)
        self.fault(self.cut_kind, f"expected {what}, found the end of the data at byte {self.end}")

    def move_on(self) -> None:
        """Begin the window at the current opcode, or behind a value that reached beyond it."""
        at = self.at
        if self.feed is None or at >= self.end:
            self.fault(
                self.cut_kind, f"expected the next opcode, found the end of the data at byte {self.end}"
            )
        self.data, self.base = self.feed(at), at
        self.start = self.pos = 0

    def take(self, size: int) -> bytes:
        at = self.pos
        self.pos = at + size
        if self.pos > len(self.data):
            self.cut(f"{size} bytes")
        return self.data[at : self.pos]

    def byte(self) -> int:
        at = self.pos
        if at >= len(self.data):
            self.cut("1 bytes")
        self.pos = at + 1
        return self.data[at]

    def pass_over(self, size: int) -> None:
        if size > self.end - self.base - self.pos:
            self.fault(self.cut_kind, f"expected {size} bytes, found the end of the data at byte {self.end}")
        self.pos += size

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def rest_of_line(self) -> int:
        """The bytes of the line before its end, which may lie beyond the window."""
        found, reached = self.data.find(b"\n", self.pos), self.base + len(self.data)
        while found < 0:
            more = b"" if self.feed is None or reached >= self.end else self.feed(reached)
            if not more:
                self.fault(
                    self.cut_kind,
                    f"expected the end of a line, found the end of the data at byte {self.end}",
                )
            inside = more.find(b"\n")
            found = inside if inside < 0 else reached - self.base + inside
            reached += len(more)
        return found - self.pos
