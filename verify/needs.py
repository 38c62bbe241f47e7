"""What a verification takes of memory, told from headers before it runs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from typing import TYPE_CHECKING, Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.remote_path import scheme_of
from ckpt_tool.checkpoint.tensor_names import layer_of
from ckpt_tool.errors import CkptToolError, fail

if TYPE_CHECKING:
    from ckpt_tool.verify.gate import Check

# Measured of tiny models, resident: what Python, numpy and the tool take, then with torch, with transformers.
PLAIN, COMPUTING, JUDGING = 100_000_000, 350_000_000, 450_000_000
TOKENS = 600  # of the longest prompt, where no window asks for a longer one
KEPT = 8  # arrays of one prompt's logits at once: both sides', those of the noise floor, in float64 some
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def largest(checkpoint: Checkpoint, itemsize: int) -> int:
    """Bytes that the tensors of the heaviest layer take in a dtype of `itemsize` bytes: what a lockstep pass
    holds."""
    layers: dict[int | None, int] = {}
    for info in checkpoint:
        index = layer_of(info.name)
        layers[index] = layers.get(index, 0) + prod(info.shape) * itemsize
    return max(layers.values(), default=0)


def of_check(check: Check) -> int | None:
    """About how many bytes of memory a check of a gate takes; None where its checkpoints cannot be opened,
    which the check itself tells, or lie elsewhere, so that opening them would fetch them."""
    levels = ("parity", "documented")
    computes = check.against is not None or check.expectations is not None or check.levels is None
    if not computes and not set(levels) & set(check.levels or ()):
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
        except (CkptToolError, OSError):
            return None
        need = COMPUTING if check.against is None else JUDGING
        need += sum(largest(s, item) for s in sides)
        need += KEPT * _tokens(config) * max(map(_vocabulary, sides)) * item
        if check.against is not None:  # a library's model is in memory as a whole
            need += max(sum(t.numel for t in s) for s in sides) * item
    return need


def _tokens(config: Mapping[str, Any]) -> int:
    window = config.get("sliding_window")
    return max(TOKENS, window + 100) if isinstance(window, int) and window < 8192 else TOKENS


def _vocabulary(checkpoint: Checkpoint) -> int:
    """Rows of the longest table outside the layers."""
    return max((t.shape[0] for t in checkpoint if t.shape and layer_of(t.name) is None), default=0)


def read_size(text: str, where: str = "--memory") -> int:
    """`4GiB`, `512 MB`, `2e9` as bytes; `usage` for another text."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?b?|b?)\s*", text, re.ASCII | re.IGNORECASE)
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
