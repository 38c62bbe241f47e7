"""Something done on a thread of its own while something else goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """`work` beside the body, which is not left before both have ended; what is given waits for `work`, and
    raises what that raised. Where no thread can be started, `work` is done first."""
    failed: list[BaseException] = []
    claimed, ended = threading.Lock(), threading.Event()

    def run() -> None:
        if not claimed.acquire(blocking=False):
            return
        try:
            work()
        except BaseException as error:  # told to whoever waits, whatever it is
            failed.append(error)
        finally:
            ended.set()

    def done() -> None:
        ended.wait()  # not `join`: on Python 3.11 one that is interrupted takes the thread for ended
        if failed:
            raise failed.pop()

    try:
        try:
            threading.Thread(target=run, name="ckpt-tool-beside").start()
        except RuntimeError:  # a limit of threads
            run()
            done()
        yield done
    finally:
        if claimed.acquire(blocking=False):  # interrupted before there was a thread
            ended.set()
        done()
