"""The rotary embeddings of a config.json in one spelling, whichever release wrote it.

transformers 4 reads `rope_theta` and `rope_scaling`; 5 puts both into one object, `rope_parameters`, or into
one for each kind of layer. Source: transformers 4.57.6 and 5.23.0 (modeling_rope_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OBJECTS = ("rope_scaling", "rope_parameters")  # in the order in which transformers 5 reads them
ROTARY = ("rope_theta", "partial_rotary_factor")
LAYERS = ("full_attention", "sliding_attention")
TRAINED = "original_max_position_embeddings"
# What is done to the frequencies, and the values that each needs.
NEEDED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
BOUNDED = ("yarn", "llama3", "longrope")  # which depend on the length that the model was trained for
OLD_NAMES = {"su": "longrope"}
# The scaling of Llama 3.1, in which programs take for granted what they have no word for.
LLAMA3: Mapping[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    TRAINED: 8192,
    "rope_type": "llama3",
}
# Values of a scaling that are numbers, those that it may do without included.
SCALES = ("mscale", "mscale_all_dim")  # of yarn, which mean nothing where they are 0
NUMBERS = frozenset((*NEEDED["llama3"], TRAINED, "beta_fast", "beta_slow", "attention_factor"))


def kind_of(found: Mapping[str, Any]) -> str:
    """What the object says is done to the frequencies."""
    said = str(found.get("rope_type") or found.get("type") or "default")
    return OLD_NAMES.get(said, said)


def flat(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of an object for each kind of layer the one that all share; any other as it is."""
    inner = [v for k, v in found.items() if k in LAYERS and isinstance(v, Mapping)]
    if inner and all(k in LAYERS for k in found) and all(v == inner[0] for v in inner):
        return inner[0]
    return found


def one_rope(config: Mapping[str, Any], own: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A config as transformers 4 spells it. `own` are the names that a class has instead of those in
    `ROTARY`: it does not look at these beside the object, so they are left out."""
    own = own or {}
    rest = {k: v for k, v in config.items() if k not in own and k != "rope_parameters"}
    objects = [flat(found) for key in OBJECTS if isinstance(found := config.get(key), Mapping)]
    if not objects:
        return rest
    for name in ROTARY:
        told = next((found[name] for found in objects if found.get(name) is not None), None)
        if told is not None and rest.get(own.get(name, name)) is None:
            rest[own.get(name, name)] = told
    scalings = [{k: v for k, v in found.items() if k not in ROTARY} for found in objects]
    scaling = next((s for s in scalings if kind_of(s) != "default"), None)
    if scaling is not None and kind_of(scaling) in BOUNDED and TRAINED in rest:
        trained = rest.pop(TRAINED)  # transformers 5 prefers this place, 4 does not look there
        scaling = scaling if scaling.get(TRAINED) is not None else {**scaling, TRAINED: trained}
    return rest | {"rope_scaling": scaling}
