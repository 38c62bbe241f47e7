"""What stands in the way of reading a config.json: values said twice and differently, values that no class
takes, each as a problem with a way out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ckpt_tool.convert.facts import Contradiction, read_as
from ckpt_tool.convert.facts_classes import Class
from ckpt_tool.convert.params import SET
from ckpt_tool.errors import Problem

CONFIG = "config.json"
# said by both of these, what a model computes does not change: tensors have a dtype, a head its rows
_DECIDED = ("torch_dtype", "num_labels")
LAYERS = "num_hidden_layers"


def misread(config: Mapping[str, Any], own: Class, given: Collection[str] = ()) -> Iterator[Problem]:
    """What of `config`, with the user's values in it, the class `own` cannot read. `given` are the keys that
    the user gave: what they decide is no contradiction where the class reads nothing else."""
    found = read_as(config, own)
    for c in found.contradictions:
        keys = {c.name, *own.aliases.get(c.name, ())}
        decided = bool(keys & {*given}) and (
            own.windows == "all" or "layer_types" not in (c.first[0], c.second[0])
        )
        decided = decided and c.first[0] != LAYERS  # no release loads a list of another length
        if not decided and c.name not in _DECIDED:
            yield Problem("bad-config", c.text, _place(c.second[0], given), c.name, _way_out(c, own))
    for w in found.wrong:
        hint = f"--set {w.where}=VALUE" if re.fullmatch(r"\w+", w.where) else None
        yield Problem(w.kind, w.text, _place(w.where, given), w.where, None if w.where in given else hint)


def _place(path: str, given: Collection[str]) -> str:
    return SET if path.partition(".")[0] in given else CONFIG


def _way_out(c: Contradiction, own: Class) -> str | None:
    if "max_window_layers" in (c.first[0], c.second[0]):  # a list of the user's would say otherwise still
        return (
            "--set layer_types=null takes max_window_layers; --set max_window_layers=VALUE, the first layer "
            "of layer_types that has the window, takes that where all after it have it"
        )
    if c.name == "layer_types" and c.first[0] == LAYERS:
        return (
            "--set layer_types=[...] with a kind for each layer says which, --set layer_types=null takes "
            "what the class has without"
        )
    if own.windows != "all" and "layer_types" in (c.first[0], c.second[0]):
        return "--set layer_types=[...] with a kind for each layer says which"
    return f"--set {c.name}=VALUE says which" if c.name in own.numbers else None
