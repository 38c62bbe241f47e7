"""The config.json of a model of several parts, such as one that reads images, as one row of values: those of
its text model under their own names, those of the others under dotted ones (`vision_config.hidden_size`).
Families and readings then look at it as at any other, and it is taken apart again where it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from ckpt_tool.convert.facts_rotary import ROTARY, flat
from ckpt_tool.records import dataclass

# Of a part without a bearing on anything: the whole model says it, or has no such head.
REPEATED = frozenset(("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"))
REPEATED |= {"id2label", "label2id", "num_labels", "tie_word_embeddings"}
# How weights are held, which transformers 5.23.0 (quantizers/auto.py) takes of the text model where the whole
# says none.
PACKING = "quantization_config"


@dataclass(frozen=True)
class Parts:
    """`text` is the part whose values keep their names, `others` those whose get dotted ones, but for `top`,
    which the whole says. `defaults` are what each part's own class takes for absent keys, by the model_type
    of the part. `names` are how names of tensors begin in memory, and how on disk."""

    text: str
    others: tuple[str, ...]
    top: frozenset[str]
    defaults: Mapping[str, Mapping[str, Any]]
    names: Mapping[str, str] = field(default_factory=dict)


def in_one_row(config: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """`config`, taken together where it is in parts. A value that the whole says beside its text model, and
    otherwise, is under the name `top.NAME`, which nothing knows."""
    found = {n: v for n in (parts.text, *parts.others) if isinstance(v := config.get(n), Mapping)}
    if not found:
        return dict(config)
    made: dict[str, Any] = {}
    for name, told in found.items():
        usual = _absent(parts.defaults.get(str(told.get("model_type")), {}), told)
        values = {k: v for k, v in {**usual, **told}.items() if k not in REPEATED and k != "model_type"}
        if name == parts.text:
            made |= {k: v for k, v in values.items() if k not in parts.top}
            if told.get(PACKING) and not config.get(PACKING):
                made[PACKING] = told[PACKING]
        else:
            made |= {f"{name}.{k}": v for k, v in _rotary(values).items()}
        made[f"{name}.model_type"] = told.get("model_type")
    for key, value in config.items():
        if key not in found and not (key == PACKING and not value and key in made):
            made[f"top.{key}" if key in made and made[key] != value else key] = value
    return made


def _absent(usual: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of keys that are not there; of rotary values where there are none in any spelling."""
    told = found.get("rope_parameters") or found.get("rope_scaling")
    given = {*found, *(flat(told) if isinstance(told, Mapping) else ())}
    rotary = ("rope_theta", "rope_scaling") if told else ()
    return {k: v for k, v in usual.items() if k not in given and not (k == "rope_scaling" and rotary)}


def _rotary(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of another part with the base of its rotary frequencies beside them, if nothing else is said."""
    found = values.get("rope_parameters")
    if not isinstance(found, Mapping) or found.get("rope_type", "axial") not in ("axial", "default"):
        return dict(values)
    beside = {k: values[k] for k in ROTARY[:1] if k in values and k in found}
    if found.keys() - {"rope_type", "type", *ROTARY[:1]} or any(found[k] != v for k, v in beside.items()):
        return dict(values)
    others = {k: v for k, v in values.items() if k != "rope_parameters"}
    return {**others, **{k: found[k] for k in ROTARY[:1] if k in found}}


def taken_apart(config: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """The other way round: a config as its class writes it."""
    made: dict[str, Any] = {parts.text: {}, **{name: {} for name in parts.others}}
    for key, value in config.items():
        name, dot, rest = key.partition(".")
        if dot and name in made:
            made[name][rest] = value
        elif key in parts.top:
            made[key] = value
        else:
            made[parts.text][key] = value
    for name in parts.others:
        if "rope_theta" in made[name]:
            made[name]["rope_parameters"] = {"rope_type": "axial", "rope_theta": made[name].pop("rope_theta")}
    return made
