"""What one worker writes, in few system calls: small neighbours in a file are held until they make one write,
and the kernel is asked to begin with the disk once for what was written in a row.

A model of thousands of small tensors costs a third of the time so that one by one costs.
"""

from __future__ import annotations

from ckpt_tool.convert import disk

SMALL = 32 * 1024  # bytes up to which copying costs less than a system call
HELD = 256 * 1024  # bytes held at most
WINDOW = 8 << 20  # bytes of a file that the disk is asked for together, as far as they are written


class Outbox:
    """The writes of one worker. Nothing is in its file for certain before `flush`."""

    def __init__(self) -> None:
        self._held = bytearray(HELD)
        self._count = 0  # bytes held, to be written from `_start` on
        self._file, self._descriptor, self._start = "", -1, 0
        # (descriptor, first byte, byte after the last, bytes) around what was written and not asked for
        self._begun = (-1, 0, 0, 0)

    def put(self, file: str, descriptor: int, offset: int, data: memoryview) -> None:
        """Write `data` at `offset` of the open `file`, now or later. Fails with `disk-full` or
        `write-failed`, also for what came before."""
        size = len(data)
        follows = descriptor == self._descriptor and offset == self._start + self._count
        if not follows or self._count + size > HELD:
            self.write_held()
        if size > SMALL:
            self.write_held()
            self._write(file, descriptor, offset, data)
            return
        if not self._count:
            self._file, self._descriptor, self._start = file, descriptor, offset
        self._held[self._count : self._count + size] = data
        self._count += size

    def write_held(self) -> None:
        if self._count:
            data = memoryview(self._held)[: self._count]
            self._count = 0
            self._write(self._file, self._descriptor, self._start, data)

    def flush(self) -> None:
        """Write what is held, and ask for the disk to begin."""
        self.write_held()
        self._ask()

    def _write(self, file: str, descriptor: int, offset: int, data: memoryview) -> None:
        try:
            disk.write_at(descriptor, data, offset)
        except OSError as error:
            raise disk.failure(error, file, offset=offset) from None
        before, start, stop, written = self._begun
        first, last = min(start, offset), max(stop, offset + len(data))
        if before != descriptor or last - first > WINDOW:
            self._ask()
            first, last, written = offset, offset + len(data), 0
        self._begun = (descriptor, first, last, written + len(data))

    def _ask(self) -> None:
        """Not for less than is worth the call: the next in that place, or the fsync, takes it along."""
        descriptor, start, stop, written = self._begun
        self._begun = (-1, 0, 0, 0)
        if written >= disk.WORTH_WRITING:
            disk.start_writeback(descriptor, start, stop - start)
