"""Matrices that are larger than what may be held of them: their rows are read, cast and used some at a time,
so that a forward pass of a reading, which knows nothing of this, runs in the memory that there is.

`Streamed` is a tensor to whoever multiplies by it, takes rows of it, or reorders it; for all else it becomes
an ordinary one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import field
from functools import cache
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.records import dataclass
from ckpt_tool.verify.holding import Room

BLOCK = 16 << 20  # bytes of rows that are cast at once
NEAR = 2  # times as many rows as are asked for may be read to have them at once
M_MMAP_THRESHOLD = -3  # malloc.h
Multiply = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """A matrix (or, in memory, any tensor) as it is stored. `read` gives rows first to last of it in their
    own dtype; those that find room are kept. `dtype` and `device` are what it is computed in and on. `fill`,
    where rows are read from a file, does that into a tensor that is there."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    dtype: torch.dtype
    device: torch.device
    room: Room
    kept: dict[int, Tensor] = field(default_factory=dict)
    fill: Callable[[int, Tensor], None] | None = None

    @property
    def step(self) -> int:
        width = max(1, prod(self.shape[1:]))
        return max(1, BLOCK // (width * self.dtype.itemsize))

    def block(self, first: int, spare: Spare | None = None) -> Tensor:
        """Rows as they are stored; those that find no room may be read into a `spare` place."""
        if first in self.kept:
            return self.kept[first]
        count = min(self.step, self.shape[0] - first)
        if spare is not None and spare.stored is not None and self.fill is not None:
            made = spare.stored[:count]
            if self.room.left < made.nbytes:
                self.fill(first, made)
                return made
        made = self.read(first, first + count)
        if self.room.take(made.nbytes):
            self.kept[first] = made
        elif spare is not None and spare.stored is None and count == self.step:
            spare.stored = made
        return made

    def blocks(self, backwards: bool = False) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows in the dtype of the computation), in order or the last ones first. Each takes the
        place of the one before, unless a gradient may still ask for that: pages that the system gives, zeroes
        and takes back for every block cost several times what casting does."""
        firsts = range(0, self.shape[0], self.step)
        spare = None if torch.is_grad_enabled() or self.device.type != "cpu" else Spare()
        for first in reversed(firsts) if backwards else firsts:
            rows = self.block(first, spare)
            if spare is None or rows.dtype == self.dtype:
                yield first, rows.to(self.device, self.dtype)
            else:
                yield first, spare.cast(rows, self)

    def some(self, first: int, last: int) -> Tensor:
        """Rows as they are stored."""
        start = first - first % self.step
        parts = [self.block(at)[max(first - at, 0) : last - at] for at in range(start, last, self.step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def part(self, first: int, last: int) -> Rows:
        """Rows first to last as a matrix of its own, which are kept with these."""
        shape = (last - first, *self.shape[1:])
        return Rows(shape, lambda a, b: self.some(first + a, first + b), self.dtype, self.device, Room(0))

    def whole(self) -> Tensor:
        """All of it, as it is stored; no more of it is in memory than that."""
        if not self.kept:
            return self.read(0, self.shape[0])
        made = self.block(0).new_empty(self.shape)
        for first in range(0, self.shape[0], self.step):
            rows = self.block(first)
            made[first : first + len(rows)] = rows
        return made


@dataclass
class Spare:
    """Where the blocks of one run through a matrix are read and cast."""

    stored: Tensor | None = None
    computed: Tensor | None = None

    def cast(self, rows: Tensor, of: Rows) -> Tensor:
        if self.computed is None:
            self.computed = torch.empty(min(of.step, of.shape[0]), *of.shape[1:], dtype=of.dtype)
        return self.computed[: len(rows)].copy_(rows)


@cache
def give_back() -> None:
    """Have memory of blocks go back to the system once nobody holds it. glibc would keep what it gave back
    before for the next ones, and holes of hundreds of megabytes with it. Source: mallopt(3)."""
    with suppress(OSError, AttributeError):  # another library of C has no such setting
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, BLOCK // 4)


class Streamed(Tensor):
    """`turned`: the transpose of its rows."""

    rows: Rows
    turned: bool

    @staticmethod
    def __new__(cls, rows: Rows, turned: bool = False) -> Streamed:
        shape = rows.shape[::-1] if turned else rows.shape
        made: Streamed = Tensor._make_wrapper_subclass(cls, shape, dtype=rows.dtype, device=rows.device)
        made.rows, made.turned = rows, turned
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Streamed({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        own = _OWN.get(func)
        if own is not None:
            found = own(*args, **kwargs)
            if found is not NotImplemented:
                return found
        if func in _ASKED or getattr(func, "__name__", "") == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _MOVES:
            moved = func(*_mapped(_stored, args), **_mapped(_stored, kwargs))
            like = next(x for x in _flat([*args, *kwargs.values()]) if isinstance(x, Streamed))
            return _mapped(lambda x: held(x, like), moved)
        return func(*_mapped(_whole, args), **_mapped(_whole, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*_mapped(_whole, args), **_mapped(_whole, kwargs or {}))


def held(x: Tensor, like: Streamed) -> Streamed:
    """A stored tensor in memory, to be computed in what `like` is computed in."""
    rows = Rows(tuple(x.shape), lambda a, b: x[a:b], like.rows.dtype, like.rows.device, Room(0))
    return Streamed(rows)


def by_rows(x: Tensor) -> Tensor:
    """A large matrix in memory as one of rows that are read from there, so that others of these rows need no
    copy of it; a small one as it is."""
    if isinstance(x, Streamed) or x.ndim != 2 or x.numel() * x.element_size() <= BLOCK:
        return x
    return Streamed(Rows(tuple(x.shape), lambda a, b: x[a:b], x.dtype, x.device, Room(0)))


def product(a: Tensor, b: Streamed, multiply: Multiply = torch.matmul, backwards: bool = False) -> Tensor:
    """a (..., K) @ b (K, N); `multiply` is done with each part of b, and where these are terms of one sum the
    last ones may come first."""
    columns = b.shape[1]
    out = a.new_zeros(*a.shape[:-1], columns)
    if b.turned:
        for first, w in b.rows.blocks():
            out[..., first : first + len(w)] = multiply(a, w.T)
        return out
    for first, w in b.rows.blocks(backwards):
        out += multiply(a[..., first : first + len(w)], w)
    return out


def turned_by_blocks(x: Streamed) -> Streamed:
    """As many rows at a time as are cast at once, each of these blocks transposed in the shape it had: which
    needs no copy of the matrix, and reads the rows that are used alone."""
    rows = x.rows

    def read(first: int, last: int) -> Tensor:
        start = first - first % rows.step
        made = [
            block.T.reshape(block.shape)[max(first - at, 0) : last - at]
            for at in range(start, last, rows.step)
            for block in [rows.some(at, min(at + rows.step, rows.shape[0]))]
        ]
        return made[0] if len(made) == 1 else torch.cat(made)

    return Streamed(Rows(rows.shape, read, rows.dtype, rows.device, Room(0)))


def transposed(x: Streamed) -> Streamed:
    """The transpose as it is stored, in memory: one copy of the matrix, made by blocks of its rows."""
    rows = x.rows
    made = rows.block(0).new_empty(rows.shape[::-1])
    for first in range(0, rows.shape[0], rows.step):
        block = rows.block(first)
        made[:, first : first + len(block)] = block.T
    return held(made, x)


@dataclass(frozen=True)
class Ordered(Rows):
    """Row k is row `order[k]` of `base`, from where that is: no copy is made."""

    base: Rows | None = None
    order: Tensor | None = None


def with_order(x: Streamed, order: Tensor) -> Streamed:
    """The matrix with the row `order[k]` (int64, on the CPU) of it as its row k."""
    base, own = x.rows, x.rows
    if isinstance(own, Ordered) and own.base is not None and own.order is not None:
        base, order = own.base, own.order[order]

    def read(first: int, last: int) -> Tensor:
        asked = order[first:last]
        low, high = int(asked.min()), int(asked.max()) + 1
        if high - low <= NEAR * (last - first):
            return base.some(low, high).index_select(0, asked - low)
        return torch.cat([_outside(base, int(r[0]), int(r[-1]) + 1) for r in _runs(asked)])

    shape = (len(order), *base.shape[1:])
    return Streamed(Ordered(shape, read, base.dtype, base.device, Room(0), base=base, order=order))


def beside(parts: Sequence[Streamed]) -> Streamed:
    """The rows of several matrices, one after the other."""
    starts = [0, *accumulate(len(p) for p in parts)]

    def read(first: int, last: int) -> Tensor:
        found = [
            p.rows.some(max(first - at, 0), min(last - at, len(p)))
            for p, at in zip(parts, starts, strict=False)
            if first < at + len(p) and at < last
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    like = parts[0].rows
    return Streamed(Rows((starts[-1], *like.shape[1:]), read, like.dtype, like.device, Room(0)))


def _runs(ids: Tensor) -> list[Tensor]:
    """Ids in parts that follow each other."""
    cuts = [0, *((ids.diff() != 1).nonzero().flatten() + 1).tolist(), len(ids)]
    return [ids[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


# --- what is done with some rows at a time ----------------------------------------------------------------


def _matmul(a: Tensor, b: Tensor) -> Any:
    if not isinstance(b, Streamed) or isinstance(a, Streamed) or b.dim() != 2:
        return NotImplemented
    return product(a, b)


def _linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(w, Streamed) or w.dim() != 2:
        return NotImplemented
    y = product(x, Streamed(w.rows, not w.turned))
    return y if bias is None else y + bias


def _transposed(x: Streamed) -> Any:
    return Streamed(x.rows, not x.turned) if x.dim() == 2 else NotImplemented


def _embedding(ids: Tensor, w: Tensor, *rest: Any, **more: Any) -> Any:
    return _taken(w, ids) if isinstance(w, Streamed) and int(ids.min()) >= 0 else NotImplemented


def _taken(x: Any, at: Any) -> Any:
    """Some rows: those of ids, or a range of them; one matrix of a stack of them."""
    if isinstance(x, Streamed) and not x.turned and isinstance(at, int) and 0 <= at < x.shape[0]:
        return _outside(x.rows, at, at + 1)[0].to(x.rows.device, x.rows.dtype)
    if not isinstance(x, Streamed) or x.turned or x.dim() != 2:
        return NotImplemented
    if isinstance(at, slice) and at.step in (None, 1):
        first, last, _ = at.indices(x.shape[0])
        return Streamed(x.rows.part(first, max(first, last)))
    if not isinstance(at, Tensor) or at.dtype != torch.int64 or at.numel() == 0:
        return NotImplemented
    if int(at.min()) < -x.shape[0] or int(at.max()) >= x.shape[0]:
        return NotImplemented  # an error, as of an ordinary tensor
    ids, back = torch.unique(at.cpu() % x.shape[0], return_inverse=True)
    found = torch.cat([_outside(x.rows, int(r[0]), int(r[-1]) + 1) for r in _runs(ids)])
    return found.to(x.rows.device, x.rows.dtype)[back.to(x.rows.device)]


def _outside(rows: Rows, first: int, last: int) -> Tensor:
    """Few rows, which are read without the block that they are in."""
    kept = rows.kept.get(first - first % rows.step)
    return rows.read(first, last) if kept is None or last - first > 1 else rows.some(first, last)


def _chunks(x: Streamed, n: int, dim: int = 0) -> Any:
    if x.turned or dim != 0 or x.dim() != 2 or x.shape[0] % n:
        return NotImplemented
    size = x.shape[0] // n
    return tuple(Streamed(x.rows.part(k * size, (k + 1) * size)) for k in range(n))


def _rolled(x: Tensor, shifts: Any, dims: Any = None) -> Any:
    """Rows that begin with other ones, read from where they are: no copy of a table is made."""
    if not isinstance(x, Streamed) or x.turned or type(shifts) is not int or dims != 0:
        return NotImplemented
    rows, count = x.rows, x.shape[0]

    def read(first: int, last: int) -> Tensor:
        first, last = first - shifts, last - shifts
        turn = first // count * count
        first, last = first - turn, last - turn
        parts = [rows.some(first, min(last, count)), *([rows.some(0, last - count)] if last > count else [])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return Streamed(Rows(rows.shape, read, rows.dtype, rows.device, Room(0)))


def _equal(a: Tensor, b: Tensor) -> Any:
    """Block by block, which does not need two whole matrices."""
    if not all(isinstance(x, Tensor) and x.dim() == 2 for x in (a, b)) or a.shape != b.shape:
        return NotImplemented
    if any(isinstance(x, Streamed) and x.turned for x in (a, b)):
        return NotImplemented
    first = a if isinstance(a, Streamed) else b
    assert isinstance(first, Streamed)
    step = first.rows.step
    return all(
        torch.equal(*(_rows_of(x, k, min(k + step, len(first))) for x in (a, b)))
        for k in range(0, len(first), step)
    )


def _rows_of(x: Tensor, first: int, last: int) -> Tensor:
    return (
        x.rows.some(first, last).to(x.rows.device, x.rows.dtype) if isinstance(x, Streamed) else x[first:last]
    )


_OWN: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    F.linear: _linear,
    F.embedding: _embedding,
    **dict.fromkeys((Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t), _transposed),  # type: ignore[attr-defined]
    Tensor.__getitem__: _taken,
    Tensor.chunk: _chunks,
    torch.chunk: _chunks,
    **dict.fromkeys((torch.roll, Tensor.roll), _rolled),
    torch.equal: _equal,
    Tensor.equal: _equal,
}
# What is asked of a tensor without its values.
_ASKED = {
    Tensor.__len__, Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point,
    Tensor.element_size, torch.is_floating_point, torch.numel, Tensor.is_complex,
}  # fmt: skip
# What puts values elsewhere and changes none, so that it may be done to them as they are stored.
_MOVES = {
    Tensor.reshape, Tensor.view, Tensor.permute, Tensor.transpose, Tensor.contiguous, Tensor.roll, torch.roll,
    Tensor.index_select, torch.cat, torch.split, Tensor.split, Tensor.flip, torch.flip, Tensor.clone,
}  # fmt: skip


def _whole(x: Any) -> Any:
    """An ordinary tensor in the place of a streamed one."""
    if not isinstance(x, Streamed):
        return x
    stored = x.rows.whole().to(x.rows.device, x.rows.dtype)
    return stored.T if x.turned else stored


def _stored(x: Any) -> Any:
    if not isinstance(x, Streamed):
        return x
    return x.rows.whole().T if x.turned else x.rows.whole()


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, list | tuple):
        return type(x)(_mapped(function, y) for y in x)
    if isinstance(x, dict):
        return {k: _mapped(function, v) for k, v in x.items()}
    return x


def _flat(x: Any) -> Iterator[Any]:
    if isinstance(x, list | tuple):
        for y in x:
            yield from _flat(y)
    else:
        yield x
