"""What both sides of a comparison may hold of their weights together, counted, and what they are going to
hold, told from headers. Nothing here computes.

A matrix is held as it is computed with where its whole layer is, with what planted mistakes make of it
beside it; else its rows are held as they are stored as far as there is room, and read again where there is
none (verify.streamed)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.checkpoint.tensor_names import layer_of, stack_of
from ckpt_tool.records import dataclass

SMALL = 1 << 20  # elements of a matrix that is held whatever room there is, in memory of its own
COPIES = 2  # of a matrix, which a planted mistake makes of it
STEPS = 4  # matrices of numbers that are there while one is made of codes: codes, scales, their product
WIDEST = 8  # bytes of a number: what float32 cannot see is judged in float64


@dataclass
class Room:
    """How many bytes may be held; `held` are those that are, `most` the most that ever were. What is taken
    here is taken `within` another one too, which several share."""

    size: int
    held: int = 0
    within: Room | None = None
    most: int = 0

    def take(self, nbytes: int) -> bool:
        fits = self.held + nbytes <= self.size and (self.within is None or self.within.take(nbytes))
        self.held += nbytes * fits
        self.most = max(self.most, self.held)
        return fits

    def give(self, nbytes: int) -> None:
        """Let go of what was taken, in every room that it was taken within."""
        self.held -= nbytes
        if self.within is not None:
            self.within.give(nbytes)

    def clear(self) -> None:
        self.give(self.held)

    @property
    def left(self) -> int:
        own = self.size - self.held
        return max(0, own if self.within is None else min(own, self.within.left))


def of_layers(tensors: Iterable[TensorInfo]) -> dict[tuple[str, int], int]:
    """Elements of each layer of each stack."""
    found: dict[tuple[str, int], int] = defaultdict(int)
    for info in tensors:
        if (stack := stack_of(info.name)) is not None:
            found[stack] += info.numel
    return dict(found)


def is_small(info: TensorInfo) -> bool:
    return len(info.shape) < 2 or info.numel < SMALL


def fits(info: TensorInfo, layers: dict[tuple[str, int], int], item: int, limit: int) -> bool:
    """Whether the layer of a tensor may be held in `limit` bytes as it is computed, `item` bytes each number,
    and what a planted mistake makes of the tensor beside it."""
    layer = layers.get(stack_of(info.name) or ("", 0), info.numel)
    return (layer + COPIES * info.numel) * item <= limit


def copies(tensors: Sequence[TensorInfo], item: int, limit: int, *, likely: bool = False) -> int:
    """Bytes that mistakes planted into a layer may make of a matrix: as it is computed where it is held as
    that, else as it is stored, and of a square one alone, as others are made by blocks of rows. Outside of
    layers blocks are made in any case. `likely`: of matrices that are not square only where none is."""
    layers = of_layers(tensors)
    large = [t for t in tensors if layer_of(t.name) is not None and not is_small(t)]
    square = {t.name for t in large if len(t.shape) > 2 or t.shape[0] == t.shape[1]}
    most = 0
    for info in large:
        if fits(info, layers, item, limit):
            if info.name in square or not (likely and square):
                most = max(most, COPIES * info.numel * item)
        elif info.name in square:
            most = max(most, info.nbytes)
    return most


def held(sides: Sequence[Sequence[Sequence[TensorInfo]]], item: int, room: int) -> tuple[int, int]:
    """Bytes that are held of a layer at most, and of a tensor outside of the layers with its copies, out of
    the tensors of each rank of each side."""
    inside, outside = 0, 0
    for ranks in sides:
        limit = room // max(1, len(ranks))
        layers: dict[int, int] = defaultdict(int)
        for tensors in ranks:
            sizes = of_layers(tensors)
            for info in tensors:
                whole = is_small(info) or fits(info, sizes, item, limit)
                layer, nbytes = layer_of(info.name), info.numel * item if whole else info.nbytes
                if layer is not None:
                    layers[layer] += nbytes
                else:
                    outside = max(outside, nbytes * len(ranks) * (1 + COPIES * whole))
        inside = max(inside, *layers.values(), 0)
    return min(inside, room), min(outside, room)


def making(most: int) -> int:
    """Bytes that are there while numbers are made of codes, of `most` in one weight: numbers are made whole,
    and those of mistakes once more out of their codes and scales."""
    return STEPS * most * WIDEST


def exchanged(names: Iterable[str], most: int, item: int) -> int:
    """Bytes of such weights that change places in a planted mistake: two matrices, or two experts' ones."""
    return (6 if any(".experts." in n for n in names) else 2) * most * item
