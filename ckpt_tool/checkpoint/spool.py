"""A temporary file without a name, for members that an archive holds deflated.

It is unlinked before the first byte is written, so that nothing is left behind however the program ends.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import NoReturn

from ckpt_tool.errors import fail


class Spool:
    """Append-only; made on first use in `folder` (TMPDIR by default). `size` bytes are in it so far."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = os.fspath(folder) if folder is not None else tempfile.gettempdir()
        self.size = 0
        self.descriptor = -1

    @property
    def path(self) -> Path:
        """A path that leads to the file for as long as it is open."""
        if self.descriptor < 0:
            try:
                self.descriptor, name = tempfile.mkstemp(prefix=".ckpt-tool-spool-", dir=self.folder)
                os.unlink(name)
            except OSError as error:
                self._fail(error)
        return Path(f"/proc/self/fd/{self.descriptor}")

    def write(self, piece: bytes) -> None:
        """Append `piece`; a full disk is `disk-full`."""
        view = memoryview(piece)
        while view:
            try:
                count = os.write(self.descriptor, view)
            except OSError as error:
                self._fail(error)
            self.size += count
            view = view[count:]

    def _fail(self, error: OSError) -> NoReturn:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fail(
            "disk-full" if full else "write-failed",
            f"expected room for inflated members after {self.size} bytes, found: {error.strerror}",
            file=self.folder,
            hint="set TMPDIR to a folder with room, or unpack the archive first",
        )

    def close(self) -> None:
        """Give the space back; closing twice is harmless."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
