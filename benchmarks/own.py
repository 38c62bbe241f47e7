"""Mistakes that the reading of an architecture says its converters make (`mistakes` and `config_mistakes`,
reference/__init__.py), planted on disk; detection.py counts them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.tensor_names import short, stack_of
from ckpt_tool.fixtures.flaws import LAYER, Folder
from ckpt_tool.fixtures.flaws_kinds import Truth
from ckpt_tool.verify.sides import Side, converted_side
from ckpt_tool.verify.subject import opened

PREFIX = "own: "
Make = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Own:
    """The mistakes in tensors by their words, and those in values of config.json."""

    tensors: Mapping[str, Make]
    values: Mapping[str, Mapping[str, Any]]


def own(side: Side) -> Own:
    """Those of one layer of each stack, and of what is outside of them."""
    groups: dict[str | None, dict[int, list[str]]] = {}
    for name in side.weights[0]:
        prefix, number = stack_of(name) or (None, 0)
        groups.setdefault(prefix, {}).setdefault(number, []).append(name)
    made: dict[str, Make] = {}
    find = getattr(side.module, "mistakes", lambda names, c: {})
    for layers in groups.values():
        found = find(tuple(layers.get(LAYER, layers[min(layers)])), side.config)
        made |= {words: how[0] if isinstance(how, tuple) else how for words, how in found.items()}
    values = getattr(side.module, "config_mistakes", lambda config: {})(side.raw)
    return Own(made, values)


def changed(folder: Path) -> dict[str, set[str]]:
    """The tensors that each of the mistakes changes in the right model in this folder, by its words."""
    with opened(folder, None) as subject:
        side = converted_side(subject, torch.float64, "cpu")
        right = side.ranks[0]
        made = {words: make(right) for words, make in own(side).tensors.items()}
        return {w: {n for n, x in xs.items() if not torch.equal(x, right[n])} for w, xs in made.items()}


def kinds(folder: Path) -> list[str]:
    """What detection.py calls those of the model in this folder."""
    with opened(folder, None) as subject:
        found = own(converted_side(subject, torch.float64, "cpu"))
    return [PREFIX + words for words in (*found.tensors, *found.values)]


def plant(kind: str, path: Path) -> Truth | None:
    """Write the wrong tensors or values into the folder; None where this model has no such mistake, or it
    changes nothing."""
    words = kind.removeprefix(PREFIX)
    wrong: dict[str, torch.Tensor] = {}
    with opened(path, None) as subject:  # and written behind it, which insists on what it opened
        side = converted_side(subject, torch.float64, "cpu")
        found = own(side)
        if words in found.tensors:
            made = found.tensors[words](side.ranks[0])
            wrong = {n: x for n, x in made.items() if not torch.equal(x, side.ranks[0][n])}
    folder = Folder(path)
    try:
        if words in found.values:
            folder.write_config(**found.values[words])
            keys = tuple(found.values[words])
            return Truth(None, tuple(f"config.json: {key}" for key in keys), "|".join(map(re.escape, keys)))
        for name, x in wrong.items():
            kept = DTYPES[folder.info(name).dtype]
            bits = getattr(torch, f"int{8 * kept.itemsize}")
            as_kept = x.to(getattr(torch, kept.torch)).contiguous()
            folder.set(name, as_kept.view(bits).numpy().view(kept.bits))
    finally:
        folder.checkpoint.close()
    if not wrong:
        return None
    stems = sorted({re.escape(short(name).removesuffix(".bias")) for name in wrong}, reverse=True)
    each, several = "".join(f"(?=.*{s})" for s in stems), f"({'|'.join(stems)})(, ({'|'.join(stems)}))*"
    more = rf"^{several} and \d+ more hold {several} and"  # than a diagnosis lists
    copied = rf"^({'|'.join(stems)})(\.bias)? (token|element|row) \d+ holds"  # in one phase of several
    return Truth(None, tuple(wrong), rf"{re.escape(words)}|^{each}|{more}|{copied}")
