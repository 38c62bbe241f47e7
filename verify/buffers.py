"""Memory for weights that is used again: to give hundreds of megabytes back to the system after every layer,
and to have the next ones zeroed page by page, costs more than to cast the weights does."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LINE = 64  # bytes of a line of the processor's cache, at whose beginning a buffer starts


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
