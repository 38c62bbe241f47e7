"""Loading libraries at less than they take by themselves; what they do afterwards is the same."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# numpy's library for matrices starts a thread for every core when it is loaded.
ONE_THREAD = "OPENBLAS_NUM_THREADS"


@contextmanager
def loading() -> Iterator[None]:
    """Where modules are loaded. What they make stays, half a million objects for torch, and to look for
    cycles among it again and again is a tenth of the time: nobody looks meanwhile, and afterwards all is as
    old as if somebody had."""
    looking, there = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        # What somebody froze is to last. To ask for it counts all that is: only where something was loaded.
        if len(sys.modules) > there and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        if looking:
            gc.enable()


def load_numpy() -> None:
    """Load numpy with one thread for matrices, unless the environment says how many; that is left as it was,
    for other libraries and for children."""
    if ONE_THREAD in os.environ:
        import numpy

        return
    os.environ[ONE_THREAD] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        os.environ.pop(ONE_THREAD, None)  # by another thread, should it be gone
