"""Two checkpoints of which one has codes and scales where the other has numbers, or codes of another form or
block: the numbers that both mean are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint
from ckpt_tool.convert.quantised import Inventory, found_in
from ckpt_tool.convert.quantised_config import RECIPES, TARGETS
from ckpt_tool.convert.quantised_view import dequantised
from ckpt_tool.errors import CkptToolError
from ckpt_tool.verify.as_hf import Shown
from ckpt_tool.verify.comparing_tensors import compared

TRIED = 4  # of the smallest weights, by which a recipe is told


def as_numbers(
    one: Shown, other: Shown, settings: Mapping[str, Any] | None
) -> tuple[Shown, Shown, list[tuple[str, str]]]:
    """Both sides as they are compared, and of each that is seen as numbers (A or B, in words what was done).
    Codes that both have under the same names, in the same blocks, stay codes."""
    found = [_codes_of(s, settings) for s in (one, other)]
    if _parts(found[0]) == _parts(found[1]):
        return one, other, []
    both = found[0] is not None and found[1] is not None
    made, said = [one, other], []
    for k, inventory in enumerate(found):
        dtype = None if inventory is None else "F32" if both else _dtype(inventory, made[1 - k].checkpoint)
        if inventory is None or dtype is None:
            continue
        checkpoint = made[k].checkpoint
        ways = [(r, dequantised(checkpoint, inventory, dtype, r)) for r in RECIPES]
        recipe, view = ways[0]
        if not both:
            against = made[1 - k].checkpoint
            recipe, view = next((w for w in ways if _equal(w[1], against, inventory)), ways[0])
        made[k] = replace(made[k], checkpoint=view)
        text = f"{len(inventory.weights)} weights ({', '.join(inventory.words)}) are compared as the "
        said.append(("AB"[k], f"{text}{DTYPES[dtype].torch} numbers that they make by the recipe {recipe}"))
    return made[0], made[1], said


def _parts(inventory: Inventory | None) -> Mapping[str, Any]:
    """The tensors of each weight, and what they are."""
    weights = {} if inventory is None else inventory.weights
    return {n: (w.words, w.block, sorted(t.name for t in w.parts)) for n, w in weights.items()}


def _codes_of(side: Shown, settings: Mapping[str, Any] | None) -> Inventory | None:
    try:
        return found_in(side.checkpoint, {**_said(side), **(settings or {})})
    except CkptToolError:  # codes that lack something are compared as what they are
        return None


def _said(side: Shown) -> Mapping[str, Any]:
    """What config.json would say of an original that is seen as one."""
    return {k: v for k, v in side.config.items() if k == "quantization_config" and v}


def _dtype(inventory: Inventory, numbers: Checkpoint) -> str | None:
    """The dtype that most of the weights have there as numbers."""
    counts = Counter(t.dtype for t in numbers if t.name in inventory.weights and t.dtype in TARGETS)
    return counts.most_common(1)[0][0] if counts else None


def _equal(view: Checkpoint, numbers: Checkpoint, inventory: Inventory) -> bool:
    pairs = sorted(_pairs(view, numbers, inventory), key=lambda p: p[0].numel)[:TRIED]
    return bool(pairs) and all(compared(view, numbers, a, b).equal for a, b in pairs)


def _pairs(view: Checkpoint, numbers: Checkpoint, inventory: Inventory) -> Iterator[tuple[Any, Any]]:
    there = {t.name: t for t in numbers if t.name in inventory.weights}
    yield from ((t, there[t.name]) for t in view if t.name in there)
