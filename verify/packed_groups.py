"""Which group of `quantization_config` a quantised weight is of, and what that says of its codes, as verify
reads it: apart from convert, whose plans are what is being shown.

Source: compressed-tensors 0.20.1 (utils/match.py): targets that are the module's name come first, patterns
(`re:`) that its name begins with next, classes last, each kind in the order of the texts. modelopt names each
layer with its algorithm (0.47.0, export/quant_utils.py), some of which say a block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ckpt_tool.convert.quantised_config import Scheme
from ckpt_tool.records import dataclass

# One piece of a pattern, and how often it may stand there. Each piece is a regular expression without
# repetition of its own, so that no pattern takes longer than its length times that of the name.
PIECE = re.compile(r"(\((?:\?:)?(?P<of>[^()]*)\)|\[[^\]]*\]|\\.|[^\\])([*+]?)")
BY_ALGORITHM = {"MXFP8": (1, 32), "FP8_PB": (128, 128), "FP8_PB_WO": (128, 128)}  # of modelopt
OF_32 = "mxfp8-quantized"  # the format whose name says the block: 32 neighbours in a row


@dataclass(frozen=True, slots=True)
class Codes:
    """`block` are the rows and columns that share a scale of fp8, `group` the neighbours in a row that share
    one of integers (None: all of it), `bits` those of a code."""

    block: tuple[int, int] | None
    group: int | None
    bits: int | None


def codes_of(scheme: Scheme, weight: str) -> Codes:
    """What is said of the weight of that name. ValueError where it is of no group."""
    if not scheme.groups:
        return Codes(scheme.block, scheme.group, scheme.bits)
    module = weight.removesuffix(".weight")
    raw = scheme.raw or {}
    if "quantized_layers" in raw:
        if module not in raw["quantized_layers"]:
            raise ValueError(f"{weight}: expected an entry of quantized_layers that is of it, found none")
        return Codes(BY_ALGORITHM.get(raw["quantized_layers"][module]["quant_algo"]), None, None)
    ranked = []
    for group in raw["config_groups"].values():
        for target in group["targets"] if group.get("weights") else ():
            if (rank := _rank(target, module)) is not None:
                ranked.append((rank, target, group))
    if not ranked:
        raise ValueError(f"{weight}: expected a group of config_groups that is of it, found none")
    *_, first = min(ranked, key=lambda found: found[:2])
    return _said(first, str(first.get("format") or raw.get("format")))


def _rank(target: str, module: str) -> int | None:
    """Where a target stands among those that mean the module; None for one that does not."""
    if target == module:
        return 0
    if target.startswith("re:"):
        return 1 if _begins(target[3:], module) else None
    return 2 if target == "Linear" else None


def _said(group: Mapping[str, Any], form: str) -> Codes:
    weights = group["weights"]
    size, block = weights.get("group_size"), weights.get("block_structure")
    sides = block.split("x") if isinstance(block, str) else block
    pair = None if sides is None else (int(sides[0]), int(sides[1]))
    return Codes((1, 32) if form == OF_32 else pair, size if size and size > 0 else None, weights["num_bits"])


def _begins(pattern: str, name: str) -> bool:
    """Whether `re.match` finds the pattern at the beginning of the name."""
    places = {0}
    for pieces, often in _pieces(pattern):
        if not places:
            return False
        reached = _after(pieces, places, name)
        if often:
            new = reached
            while new := _after(pieces, new, name) - reached:
                reached |= new
        places = reached | (places if often == "*" else set())
    return bool(places)


def _after(pieces: tuple[re.Pattern[str], ...], places: set[int], name: str) -> set[int]:
    return {found.end() for at in places for one in pieces if (found := one.match(name, at)) is not None}


@lru_cache(maxsize=256)
def _pieces(pattern: str) -> tuple[tuple[tuple[re.Pattern[str], ...], str], ...]:
    """Each piece, as one expression for each of its alternatives."""
    made = []
    for whole, of, often in PIECE.findall(pattern):
        texts = of.split("|") if whole.startswith("(") else [whole]
        made.append((tuple(re.compile(text, re.ASCII) for text in texts), often))
    return tuple(made)
