"""The user's settings in place of what a config.json says of the same things, in whatever words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tool.convert.facts_classes import GENERIC
from ckpt_tool.convert.facts_rotary import OBJECTS, ROTARY, TRAINED, flat

# Keys that say one thing in different classes and releases.
NAMES = (
    ("torch_dtype", "dtype"),
    *((name, *others) for name, others in GENERIC.items()),
    ("intermediate_size", "n_inner"),
    ("layer_norm_eps", "layer_norm_epsilon"),
    ("rope_theta", "rotary_emb_base"),
    ("partial_rotary_factor", "rotary_pct"),
    ("num_local_experts", "num_experts"),
)


def overlaid(document: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`document` with `settings` in place of what it says of the same things, in whatever words."""
    names = {n for group in NAMES if settings.keys() & {*group} for n in group} | settings.keys()
    inside = {key: flat(found) for key in OBJECTS if isinstance(found := settings.get(key), Mapping)}
    names |= {n for found in inside.values() for n in ROTARY if n in found}
    scaled = bool(settings.keys() & {*OBJECTS})
    made: dict[str, Any] = {}
    for key, value in document.items():
        if key in names or (scaled and key == TRAINED):
            continue
        if key in OBJECTS and isinstance(value, Mapping):
            value = {k: v for k, v in flat(value).items() if k not in names and (not scaled or k in ROTARY)}
        if key in OBJECTS and scaled and not value:
            continue
        made[key] = value
    return {**made, **settings}
