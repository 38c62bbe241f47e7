"""What a verification takes of memory, told from headers before it runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import TYPE_CHECKING, Any

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.remote_path import scheme_of
from ckpt_tool.checkpoint.tensor_names import layer_of
from ckpt_tool.convert.quantised import Inventory, found_in
from ckpt_tool.errors import CkptToolError, fail
from ckpt_tool.records import dataclass
from ckpt_tool.verify import holding
from ckpt_tool.verify.effort import SHORT, WIDE, costly
from ckpt_tool.verify.prompts import named_prompts, positions, prompts_for

if TYPE_CHECKING:
    from ckpt_tool.verify.gate import Check

Ranks = Sequence[Sequence[TensorInfo]]  # the tensors of each rank of a side

# Measured of tiny models, resident: what Python, numpy and the tool take, then with torch, with transformers.
PLAIN, COMPUTING, JUDGING = 100_000_000, 380_000_000, 450_000_000
USUAL = 4 << 30  # bytes of memory that parity takes, unless the user says otherwise
SPARE = 128 << 20  # bytes for weights, besides the copy of a matrix
TURNS = 5 << 26  # intermediate results of a layer, made in turns (reference.blocks.AT_ONCE)
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


# --- what a lockstep run holds ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """Tokens of prompts by their names: of all that run, of those that go as far as a head (`ends`), and of
    those that run free. `width` is that of the model."""

    tokens: Mapping[str, int]
    ends: Collection[str]
    free: Collection[str]
    width: int
    vocabulary: int

    def of_layers(self, item: int) -> int:
        """Bytes of what is held beside the weights of a layer: of all prompts its input and output, of those
        that run free two more, and intermediate results of the longest."""
        longest = max(self.tokens.values(), default=0)
        free = sum(t for n, t in self.tokens.items() if n in self.free)
        made = (2 * sum(self.tokens.values()) + 3 * free + 10 * longest) * self.width * item
        return made + min(TURNS, 64 * longest * self.width) * item // 4

    def of_heads(self, item: int) -> int:
        """The same of logits."""
        free = sum(t for n, t in self.tokens.items() if n in self.free)
        ends = [t for n, t in self.tokens.items() if n in self.ends]
        return (sum(ends) + 3 * free + 2 * max(ends, default=0)) * self.vocabulary * item

    def activations(self, item: int) -> int:
        return max(self.of_layers(item), self.of_heads(item))


def heaviest(tensors: Iterable[TensorInfo], item: int) -> int:
    """Bytes that the tensors of the heaviest layer take, `item` bytes each number."""
    layers: dict[int | None, int] = {}
    for info in tensors:
        index = layer_of(info.name)
        layers[index] = layers.get(index, 0) + prod(info.shape) * item
    return max(layers.values(), default=0)


def told(size: int) -> int:
    """The next size that its words tell to the byte, so that what is told to be needed is enough."""
    step = 10**8 if size >= 10**9 - 10**6 else 10**6
    return -(-size // step) * step


@dataclass(frozen=True)
class Need:
    """Bytes of a lockstep run: `least` is what no run goes below, `room` what weights may take, of which
    `spared` are left to what planted mistakes make of a matrix, `about` what the run takes in all, and `most`
    where what it cannot see is judged in float64, for which `wider` bytes more are left of the room."""

    least: int
    room: int
    spared: int
    about: int
    most: int
    wider: int


def of_parity(
    passes: Passes,
    original: Ranks,
    converted: Ranks,
    item: int,
    memory: int | None,
    making: int = 0,
    exchanged: int = 0,
) -> Need:
    """Of a run that may take `memory` bytes (None: what is usual, or the least where that is more), of which
    `making` are for numbers while they are made of codes, `exchanged` for those that mistakes exchange."""
    flat = [t for ranks in (original, converted) for tensors in ranks for t in tensors]
    own = [t for tensors in converted for t in tensors]
    besides = COMPUTING + making + passes.activations(item)
    copied = max(exchanged, holding.copies(own, item, 0))
    least = told(besides + copied + min(heaviest(flat, item), SPARE))
    room = max(memory or USUAL, least) - besides
    spared = max(exchanged, holding.copies(own, item, room))
    wide = holding.WIDEST
    more = passes.activations(wide) - passes.activations(item) + exchanged * (wide // item - 1)

    def taken(width: int, left: int) -> int:
        """By a run in numbers of `width` bytes, whose weights have `left` bytes of the room."""
        layers, heads = holding.held((original, converted), width, left)
        layers += max(exchanged * width // item, holding.copies(own, width, room, likely=True))
        inside = max(passes.of_layers(width) + layers, passes.of_heads(width) + heads)
        return min(told(COMPUTING + making + inside), besides + room)

    about = max(least, taken(item, room))
    return Need(least, room, spared, about, max(about, taken(wide, max(0, room - more))), more)


def width(config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> int:
    """Of a model, as far as config.json or the widest vector of the norms tells."""
    for key in ("hidden_size", "n_embd", "d_model"):
        if type(found := config.get(key)) is int:
            return int(found)
    return max((t.shape[0] for t in tensors if len(t.shape) == 1), default=0)


def vocabulary(tensors: Iterable[TensorInfo]) -> int:
    """Rows of the longest table outside the layers: more logits no head gives, whatever ids there are."""
    return max((t.shape[0] for t in tensors if len(t.shape) > 1 and layer_of(t.name) is None), default=0)


# --- what a check of a gate takes ---------------------------------------------------------------------------


def of_check(check: Check) -> int | None:
    """About how many bytes of memory a check of a gate takes; None where its checkpoints cannot be opened,
    which the check itself tells, or lie elsewhere, so that opening them would fetch them."""
    levels = {"parity", "documented"}
    asked = check.levels is None or not levels.isdisjoint(check.levels) or check.expectations is not None
    if not asked and check.against is None:
        return PLAIN
    paths = [check.source if check.convert is not None else check.out]
    if check.source is not None and not check.no_source:
        paths.append(check.source)
    if any(p is None or scheme_of(p) is not None for p in paths):
        return None
    item = ITEM_BYTES[check.compute_dtype]
    with ExitStack() as stack:
        try:
            sides = [stack.enter_context(open_checkpoint(p)) for p in paths if p is not None]
            config = next((s.json("config.json") for s in sides if "config.json" in s.documents), {})
            passes = _passes(check, sides, config)
            coded = [found_in(s, check.settings) for s in sides]
        except (CkptToolError, OSError):
            return None
        besides, weights = passes.activations(item), max(heaviest(s, item) for s in sides)
        ranks = [[_as_numbers(s, c)] for s, c in zip(sides, coded, strict=True)]
        making, exchanged = _of_codes(check, coded[0], item)
        needs = [of_parity(passes, ranks[-1], ranks[0], item, None, making, exchanged).most] * asked
        if check.against is not None:  # a library's model is in memory as a whole, its file is mapped
            whole = max(sum(t.numel * item + t.nbytes for t in s) for s in sides)
            needs.append(JUDGING + besides + weights + whole)
        return max(needs)


def _as_numbers(side: Checkpoint, coded: Inventory | None) -> list[TensorInfo]:
    """The tensors of a side as they are computed with: quantised weights have the shape of their numbers, but
    for those whose codes a reading takes itself."""
    weights = {} if coded is None else {n: w for n, w in coded.weights.items() if not w.form.own_rows}
    parts = {(t.file, t.name) for w in weights.values() for t in w.parts}
    plain = [t for t in side if (t.file, t.name) not in parts]
    return [*plain, *(TensorInfo(w.name, "BF16", w.shape, w.codes.file) for w in weights.values())]


def _of_codes(check: Check, coded: Inventory | None, item: int) -> tuple[int, int]:
    """Bytes that are there while numbers are made of the codes of an output, and where such weights change
    places; none where it has numbers, or readings take the codes themselves."""
    weights = {} if coded is None else coded.weights
    if check.dequantize is not None or all(w.form.own_rows for w in weights.values()):
        return 0, 0
    most = max(prod(w.shape) for w in weights.values())
    return holding.making(most), holding.exchanged(weights, most, item)


def _passes(check: Check, sides: Sequence[Checkpoint], config: Mapping[str, Any]) -> Passes:
    """Those of the mode of a check, before the readings say what they take."""
    words = max(map(vocabulary, sides))
    rows = prompts_for(
        {**config, "vocab_size": words}, check.prompts, table=positions(config, *sides) or sys.maxsize
    )
    tokens = {name: len(row) for name, row in rows.items()}
    ends, free = set(tokens), set(tokens)
    if check.mode == "quick":
        ends, free = {n for n, t in tokens.items() if t <= SHORT}, set()
    elif check.mode == "default":
        most = max(sum(t.numel for t in s) for s in sides)
        dear = costly(tokens, most, named_prompts(check.prompts))
        if dear < free:
            free -= dear
            ends -= {n for n in dear if tokens[n] > WIDE}
    return Passes(tokens, ends, free, max(width(config, s) for s in sides), words)


# --- sizes -------------------------------------------------------------------------------------------


def read_size(text: str, where: str = "--memory") -> int:
    """`4GiB`, `512 MB`, `2000000000` as bytes; `usage` for another text."""
    found = re.fullmatch(
        r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([kmgt]i?b?|b?)\s*", text, re.ASCII | re.IGNORECASE
    )
    unit = found[2].lower() if found else ""
    unit = unit if unit.endswith("b") or not unit else f"{unit}b"
    size = int(float(found[1]) * UNITS["" if unit == "b" else unit]) if found else 0
    if size <= 0:
        fail("usage", f"expected a size such as 4GiB or 500MB, found {text!r}", where=where)
    return size


def size_text(size: int) -> str:
    """As `read_size` takes it, to two digits or more: `420 MB`, `3.1 GB`."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{max(size / 1e6, 0.1):,.0f} MB"


def free_memory() -> int:
    """Bytes that processes can still take: what the system has available, or the container's limit leaves.
    Sources: proc(5); the kernel's documentation of cgroup v2, memory.max, memory.current, memory.stat."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _number("/proc/meminfo", "MemAvailable:", free // 1024) * 1024
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit() and used[0].isdigit():
        cache = _number("/sys/fs/cgroup/memory.stat", "file", 0)  # is given up where memory is asked for
        free = min(free, max(0, int(limit[0]) - int(used[0]) + cache))
    return free


def _number(path: str, label: str, otherwise: int) -> int:
    rows = (line.split() for line in _lines(path))
    return next((int(r[1]) for r in rows if len(r) > 1 and r[0] == label and r[1].isdigit()), otherwise)


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
