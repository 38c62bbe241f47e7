"""A temporary file without a name, for what is too large to hold in memory.

It is unlinked before the first byte is written, so that nothing is left behind however the program ends.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from ckpt_tool.errors import fail

PIECE = 1 << 20


class Spool:
    """Append-only; made on first use in `folder` (TMPDIR by default). `size` bytes are in it so far."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        import tempfile  # with what it imports as long as all of this package's readers

        self.folder = os.fspath(folder) if folder is not None else tempfile.gettempdir()
        self.size = 0
        self.descriptor = -1

    @property
    def path(self) -> Path:
        """A path that leads to the file for as long as it is open."""
        if self.descriptor < 0:
            import tempfile

            try:
                self.descriptor, name = tempfile.mkstemp(prefix=".ckpt-tool-spool-", dir=self.folder)
                os.unlink(name)
            except OSError as error:
                self._fail(error)
        return Path(f"/proc/self/fd/{self.descriptor}")

    def write(self, piece: bytes) -> None:
        """Append `piece`; a full disk is `disk-full`."""
        view = memoryview(piece)
        descriptor = self.descriptor if self.path else -1
        while view:
            try:
                count = os.write(descriptor, view)
            except OSError as error:
                self._fail(error)
            self.size += count
            view = view[count:]

    def pieces(self) -> Iterator[bytes]:
        """What was written, some of it at a time."""
        at = 0
        while at < self.size:
            piece = os.pread(self.descriptor, min(PIECE, self.size - at), at)
            if not piece:
                break
            at += len(piece)
            yield piece

    def _fail(self, error: OSError) -> NoReturn:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fail(
            "disk-full" if full else "write-failed",
            f"expected room for a temporary file after {self.size} bytes, found: {error.strerror}",
            file=self.folder,
            hint="set TMPDIR to a folder with room; an archive can be unpacked first",
        )

    def close(self) -> None:
        """Give the space back; closing twice is harmless."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()
