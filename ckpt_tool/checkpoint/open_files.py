"""Many files that are read in any order by several threads, of which a few are open at a time: the number of
open files that a process may have is often 1,024, and a checkpoint of a large run has more."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ckpt_tool.checkpoint.base import Fingerprint
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.folders import Place
from ckpt_tool.errors import fail

HELD = 64  # open files that nobody reads just now


class Files:
    """The files at `places`, by name. One that is opened again must be the one that it was."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.places = places
        self._open: dict[str, ByteRange] = {}  # those used last come last
        self._users: dict[str, int] = {}
        self._were: dict[str, Fingerprint] = {}
        self._lock = threading.Lock()

    @contextmanager
    def use(self, name: str) -> Iterator[ByteRange]:
        """The file, open until the end of the block at least."""
        with self._lock:
            found = self._open.pop(name, None) or self._opened(name)
            self._open[name] = found
            self._users[name] = self._users.get(name, 0) + 1
        try:
            yield found
        finally:
            with self._lock:
                self._users[name] -= 1
                idle = [n for n in self._open if not self._users[n]] if len(self._open) > HELD else []
                for other in idle[: len(self._open) - HELD]:
                    self._open.pop(other).close()

    def _opened(self, name: str) -> ByteRange:
        place = self.places[name]
        data = ByteRange(place.path, name, place.window)
        if not self._were.setdefault(name, data.fingerprint).still(data.fingerprint):
            data.close()
            hint = "nothing else may write to the input while it is read"
            fail("input-changed", "expected the file as it was, found another", file=name, hint=hint)
        return data

    def check_unchanged(self) -> None:
        """Fail with `input-changed` if a file that was read is not the one that it was."""
        for name in list(self._were):
            with self.use(name) as data:
                data.check_unchanged()

    def close(self) -> None:
        for data in self._open.values():
            data.close()
