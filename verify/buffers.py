"""Memory for weights that is used again: to give hundreds of megabytes back to the system after every layer,
and to have the next ones zeroed page by page, costs more than to cast the weights does."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckpt_tool.records import dataclass
from ckpt_tool.verify.streamed import give_back

LINE = 64  # bytes of a line of the processor's cache, at whose beginning a buffer starts
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
AT_HAND = 1 << 30  # bytes: what is let go of up to here is kept
USUAL = {M_TRIM_THRESHOLD: 64 << 20, M_MMAP_THRESHOLD: 32 << 20}  # the most that glibc comes to by itself


@dataclass(eq=False)
class _Buffer:
    """`lent` is the view that a tensor was made of, as long as that tensor, or any view of it, lives."""

    memory: np.ndarray[Any, Any]
    lent: weakref.ref[np.ndarray[Any, Any]]


class Buffers:
    """Those of all weights that are held at a time. What nobody holds any longer is lent again for as many
    bytes, and given back to the system once other sizes are asked for: there are never more than are held at
    once of one phase."""

    def __init__(self) -> None:
        self._made: list[_Buffer] = []

    def drop(self) -> None:
        """Give back what nobody holds, for whoever needs the room for something else."""
        self._made = [b for b in self._made if b.lent() is not None]

    def lend(self, nbytes: int) -> Tensor:
        """So many bytes, with any values in them (uint8)."""
        idle = [b for b in self._made if b.lent() is None]
        found = next((b for b in idle if len(b.memory) == nbytes), None)
        if found is not None:
            view = found.memory[:]
            found.lent = weakref.ref(view)
            return torch.from_numpy(view)
        self._made = [b for b in self._made if b not in idle]
        room = np.empty(nbytes + LINE, np.uint8)
        first = -room.ctypes.data % LINE
        memory = room[first : first + nbytes]
        view = memory[:]
        self._made.append(_Buffer(memory, weakref.ref(view)))
        return torch.from_numpy(view)


@contextmanager
def memory_at_hand() -> Iterator[None]:
    """Inside, activations are made in memory of those before. glibc asks the system for each one above 32 MB,
    and gives what is free at the end of its heap back: a seventh of the time of parity of 0.25 B weights. At
    the end all that is free is given back. Where activations are large this leaves holes between them: a
    quarter more memory at 7B and 4,160 tokens. Source: mallopt(3), malloc_trim(3)."""
    library = ctypes.CDLL(None)
    with suppress(AttributeError):  # another library of C has no such settings
        for setting in USUAL:
            library.mallopt(setting, AT_HAND)
    try:
        yield
    finally:
        with suppress(AttributeError):
            for setting, size in USUAL.items():
                library.mallopt(setting, size)
            library.malloc_trim(0)
        give_back.cache_clear()  # whose setting is another now
