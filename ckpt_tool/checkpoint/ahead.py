"""Pieces that are made ahead of whoever takes them, on a thread: to inflate and to write is the work of two
cores, where the functions that do the work let go of the interpreter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from queue import Empty, Queue
from typing import TypeVar

T = TypeVar("T")
AHEAD = 8  # pieces, which bounds the memory
_LOOK = 0.05  # seconds after which a thread that waits for the other looks whether it is still wanted


def ahead(make: Callable[[], Iterator[T]]) -> Generator[T, None, None]:
    """What `make()` gives, in order and with its exception where it ends with one; up to `AHEAD` pieces are
    made on a thread before they are asked for. To be closed where it is not taken to its end
    (`contextlib.closing`). Where no thread can be started, pieces are made as they are asked for."""
    ready: Queue[tuple[T] | BaseException | None] = Queue(AHEAD)
    left = threading.Event()

    def work() -> None:
        last: BaseException | None = None
        try:
            for piece in make():
                ready.put((piece,))
                if left.is_set():
                    break
        except BaseException as error:  # told to whoever takes the pieces, whatever it is
            last = error
        ready.put(last)

    thread = threading.Thread(target=work, name="ckpt-tool-ahead", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # a limit of threads
        yield from make()
        return
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        left.set()
        while thread.is_alive():  # it may wait for room
            try:
                ready.get(timeout=_LOOK)
            except Empty:
                continue
        thread.join()
