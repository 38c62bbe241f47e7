"""A remote file read by ranges: what is fetched ahead, kept for a while, tried again, and given up.

Readers ask for a few bytes of a header or for 256 KiB of a tensor, and a request costs a round trip. So
small reads take more than was asked for, the more the longer they go on in order, and what a plan is going to
read is announced (`expect`) and fetched by a few threads while earlier bytes are worked on. What is held is
bounded for all files of one `Fetcher` together.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import field
from mmap import mmap
from queue import SimpleQueue
from typing import Any, Protocol

from ckpt_tool.errors import CkptToolError, Problem, fail
from ckpt_tool.records import dataclass

CONNECTIONS = 8  # requests at a time
PIECE = 2 << 20  # bytes of one request at most
HELD = 24 << 20  # bytes kept in memory, for all files together
AHEAD = 16 << 20  # bytes announced and not read yet, from which on nothing more is announced
FIRST = 16 << 10  # bytes of the first request somewhere; four times as many with each that follows in order
PAGES = 256 << 10  # bytes of a piece from which on it has pages of its own
GAP = 64 << 10  # bytes that are fetched and thrown away rather than asked around
STREAMS = 32  # places of one file at which reading goes on in order
TRIES = 6  # in a row without a byte
WAIT = 0.5  # seconds before the second try; twice as long before each one after it
LONGEST_WAIT = 60.0  # seconds, whatever a server asks for


class Again(Exception):
    """A request failed for a reason that may be gone soon; `after` is how long the server asks to wait."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Served(Protocol):
    """How the bytes of one file are asked for."""

    size: int
    label: str  # how messages call the address

    @property
    def stamp(self) -> Mapping[str, Any]: ...

    def fetch(self, start: int, buffer: memoryview) -> Iterator[int]:
        """One request that fills `buffer` from byte `start` on, and tells each time how far it is. Raises
        `Again` where another try may succeed, else `CkptToolError`."""

    def check_unchanged(self) -> None:
        """Fail with `input-changed` where another version is served now."""


@dataclass
class Segment:
    """Bytes from `start` on, fetched or on their way. `wanted` of them were announced and not read yet."""

    start: int
    data: bytearray | mmap
    wanted: int = 0
    done: Future[None] = field(default_factory=Future)

    @property
    def end(self) -> int:
        return self.start + len(self.data)


class Fetcher:
    """The threads that fetch and the memory that is kept, for all remote files of a checkpoint. Counts the
    requests that were sent and the bytes that came. Nobody waits for the threads when the work is stopped:
    one may hang on a server that does not answer."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = 0
        self._waiting: dict[int, Future[None]] = {}  # of segments that are on their way
        self.lock = threading.RLock()
        self.stopped = threading.Event()
        self.held: OrderedDict[int, tuple[RemoteFile, Segment]] = OrderedDict()  # by age, the oldest first
        self.held_bytes = 0
        self.ahead = 0  # bytes announced and not read yet
        self.requests = 0
        self.received = 0

    def keep(self, file: RemoteFile, segment: Segment) -> None:
        """Hold a segment, and let go of the oldest where there are too many: first of those that nobody
        announced."""
        self.held[id(segment)] = (file, segment)
        self.held_bytes += len(segment.data)
        for also_announced, limit in ((False, HELD), (True, 2 * HELD)):
            if self.held_bytes <= limit:
                return
            for other_file, other in list(self.held.values()):
                if other is not segment and other.done.done() and (also_announced or not other.wanted):
                    other_file.forget(other)
                if self.held_bytes <= limit:
                    return

    def begin(self, done: Future[None], work: Callable[[], None]) -> None:
        """Have a thread do `work`; whoever waits for `done` is let go when it is done, or when the work is
        stopped before."""
        with self.lock:
            self.check_stopped()
            self._waiting[id(done)] = done
            if self._threads < min(CONNECTIONS, len(self._waiting)):
                self._threads += 1
                threading.Thread(target=self._work, name="ckpt-tool-fetch", daemon=True).start()
        self._queue.put(lambda: self._finish(done, work))

    def stop(self) -> None:
        """Give up what is on its way."""
        with self.lock:
            self.stopped.set()
            waiting, self._waiting = self._waiting, {}
            threads, self._threads = self._threads, 0
        for done in waiting.values():
            with contextlib.suppress(InvalidStateError):  # it came just now
                done.set_exception(_stopped())
        for _ in range(threads):
            self._queue.put(None)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            if not self.stopped.is_set():
                work()

    def _finish(self, done: Future[None], work: Callable[[], None]) -> None:
        error: BaseException | None = None
        try:
            work()
        except BaseException as caught:
            error = caught
        with self.lock:
            self._waiting.pop(id(done), None)
        with contextlib.suppress(InvalidStateError):  # nobody waits any more
            done.set_exception(error) if error is not None else done.set_result(None)

    def check_stopped(self) -> None:
        if self.stopped.is_set():
            raise _stopped()

    def patiently(
        self, label: str, work: Callable[[], None], progress: Callable[[], int] = lambda: 0
    ) -> None:
        """`work`, tried again with pauses for as long as it makes progress, and a few times more."""
        from random import uniform  # which files of this machine do without

        failures, before = 0, progress()
        while True:
            try:
                return work()
            except Again as error:
                reason, after = str(error), error.after
            failures = 1 if progress() > before else failures + 1
            before = progress()
            if failures == TRIES:
                fail(
                    "download-failed",
                    f"expected the bytes, found {TRIES} failures in a row, the last: {reason}",
                    file=label,
                    hint="check the network, then run this again",
                )
            pause = WAIT * 2 ** (failures - 1) * uniform(0.8, 1.2)
            self.stopped.wait(min(max(pause, after or 0), LONGEST_WAIT))
            self.check_stopped()


class RemoteFile:
    """One served file, for any number of threads."""

    def __init__(self, served: Served, fetcher: Fetcher, digest: str | None = None) -> None:
        """`digest`, `sha256:HEX` or `git-sha1:HEX`, is compared where the file is read whole at once, as
        documents are."""
        self.served, self.fetcher, self.digest = served, fetcher, digest
        self.size = served.size
        self._starts: list[int] = []
        self._segments: dict[int, Segment] = {}
        self._streams: OrderedDict[int, int] = OrderedDict()  # where reading would go on: bytes to take then

    @property
    def stamp(self) -> Mapping[str, Any]:
        return self.served.stamp

    def read_into(self, at: int, buffer: memoryview, name: str, where: str | None = None) -> None:
        try:
            done = 0
            while done < len(buffer):
                segment = self._segment_at(at + done, len(buffer) - done)
                segment.done.result()
                first = at + done - segment.start
                count = min(len(buffer) - done, len(segment.data) - first)
                buffer[done : done + count] = memoryview(segment.data)[first : first + count]
                done += count
                self._used(segment, count)
        except CkptToolError as error:
            problem = error.problems[0]
            fail(problem.kind, problem.message, file=name, where=where, hint=problem.hint)
        if self.digest is not None and at == 0 and len(buffer) == self.size:
            self._check_digest(buffer, name)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Begin to fetch these (first byte, bytes): neighbours by one request."""
        wanted = sorted((at, min(at + count, self.size)) for at, count in ranges if at < self.size and count)
        with self.fetcher.lock:
            for start, end in _joined(wanted):
                at = start
                while at < end:
                    found = self._covering(at)
                    if found is None:
                        found = self._begin(at, min(self._next_start(at), end, at + PIECE) - at)
                    at = found.end
            for at, end in wanted:
                while at < end and (found := self._covering(at)) is not None:
                    share = min(end, found.end) - at
                    found.wanted += share
                    self.fetcher.ahead += share
                    at += share

    def check_unchanged(self, name: str) -> None:
        try:
            self.fetcher.patiently(self.served.label, self.served.check_unchanged)
        except CkptToolError as error:
            fail(error.kind, error.problems[0].message, file=name, hint=error.problems[0].hint)

    def forget(self, segment: Segment) -> None:
        """Let go of a segment; whoever still reads it has it."""
        if self.fetcher.held.pop(id(segment), None) is None:
            return
        self.fetcher.held_bytes -= len(segment.data)
        self.fetcher.ahead -= segment.wanted
        segment.wanted = 0
        if self._segments.get(segment.start) is segment:
            del self._segments[segment.start]
            self._starts.remove(segment.start)

    # --- which bytes ---

    def _segment_at(self, at: int, count: int) -> Segment:
        """A segment that holds byte `at`, begun now if there is none; one that failed is begun anew."""
        with self.fetcher.lock:
            found = self._covering(at)
            if found is not None and found.done.done() and found.done.exception() is not None:
                self.forget(found)
                found = None
            if found is not None:
                self._go_on(found.end)
                return found
            known = self._streams.pop(at, None)
            take = FIRST if known is None else min(known * 4, PIECE)
            end = min(at + max(count, take), self.size, self._next_start(at))
            first = self._begin(at, min(end - at, PIECE))
            for start in range(first.end, end, PIECE):
                if self.fetcher.held_bytes < HELD:
                    self._begin(start, min(PIECE, end - start))
            self._streams[end] = take
            self._go_on(end)
            while len(self._streams) > STREAMS:
                self._streams.popitem(last=False)
            return first

    def _go_on(self, end: int) -> None:
        """Where much was read in order up to `end`, or is about to be, begin to fetch what follows."""
        take = self._streams.get(end, 0)
        size = min(end + take, self._next_start(end)) - end
        if take < PIECE or size <= 0 or self._covering(end) is not None or self.fetcher.held_bytes > HELD:
            return
        del self._streams[end]
        self._streams[self._begin(end, size).end] = take

    def _covering(self, at: int) -> Segment | None:
        place = bisect_right(self._starts, at) - 1
        if place < 0:
            return None
        found = self._segments[self._starts[place]]
        return found if at < found.end else None

    def _next_start(self, at: int) -> int:
        place = bisect_right(self._starts, at)
        return self._starts[place] if place < len(self._starts) else self.size

    def _begin(self, start: int, size: int) -> Segment:
        # Large ones as pages of their own, which go back at once and leave no holes among other memory.
        self.fetcher.check_stopped()
        segment = Segment(start, bytearray(size) if size < PAGES else mmap(-1, size))
        insort(self._starts, start)
        self._segments[start] = segment
        self.fetcher.keep(self, segment)
        self.fetcher.begin(segment.done, lambda: self._fetch(segment))
        return segment

    def _used(self, segment: Segment, count: int) -> None:
        """Of what was announced, as much as was read is not waited for any more; the rest is let go when all
        is read, or when it is the oldest."""
        with self.fetcher.lock:
            if segment.wanted:
                count = min(count, segment.wanted)
                segment.wanted -= count
                self.fetcher.ahead -= count
                if not segment.wanted:
                    self.forget(segment)
            elif id(segment) in self.fetcher.held:
                self.fetcher.held.move_to_end(id(segment))

    # --- how they come ---

    def _fetch(self, segment: Segment) -> None:
        done = 0

        def fill() -> None:
            nonlocal done
            first = done
            self.fetcher.requests += 1
            for count in self.served.fetch(segment.start + first, memoryview(segment.data)[first:]):
                self.fetcher.received += first + count - done
                done = first + count
            if done < len(segment.data):
                raise Again(f"the answer ended after {done} of {len(segment.data)} bytes")

        self.fetcher.patiently(self.served.label, fill, lambda: done)

    def _check_digest(self, data: memoryview, name: str) -> None:
        kind, _, wanted = (self.digest or "").partition(":")
        if kind == "sha256":
            found = hashlib.sha256(data).hexdigest()
        else:  # of the file as git keeps it
            digest = hashlib.sha1(b"blob %d\0" % len(data), usedforsecurity=False)
            digest.update(data)
            found = digest.hexdigest()
        if found != wanted:
            fail(
                "download-failed",
                f"expected {kind} {wanted}, found {found}",
                file=name,
                hint="the bytes that came are not those that the repository lists: run this again",
            )


def _stopped() -> CkptToolError:
    return CkptToolError(
        Problem("interrupted", "expected to go on reading, found that the work is being stopped")
    )


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(first byte, end) of sorted ranges, as one where they lie close together."""
    start = end = -1
    for first, stop in ranges:
        if end >= 0 and first - end <= GAP:
            end = max(end, stop)
            continue
        if end >= 0:
            yield start, end
        start, end = first, stop
    if end >= 0:
        yield start, end
