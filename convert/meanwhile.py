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

    def run() -> None:
        try:
            work()
        except BaseException as error:  # told to whoever waits, whatever it is
            failed.append(error)

    thread = threading.Thread(target=run, name="ckpt-tool-beside")

    def done() -> None:
        if thread.ident is not None:
            thread.join()
        if failed:
            raise failed.pop()

    try:
        thread.start()
    except RuntimeError:  # a limit of threads
        run()
    try:
        yield done
    finally:
        done()
