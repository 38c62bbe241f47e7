"""Loading libraries at less than they take by themselves; what they do afterwards is the same."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

# numpy's library for matrices starts a thread for every core when it is loaded.
ONE_THREAD = "OPENBLAS_NUM_THREADS"


@contextmanager
def loading() -> Iterator[None]:
    """Where modules are loaded. What they make stays, half a million objects for torch, and to look for
    cycles among it again and again is a tenth of the time: nobody looks meanwhile, and afterwards all is as
    old as if somebody had."""
    looking, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    try:
        yield
    finally:
        if not frozen:  # by somebody who wants that to last
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
