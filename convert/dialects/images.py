"""The part of Mistral AI's models that reads images: a tower of layers over patches, a layer that merges
neighbours, and two that lead into the text model.

Facts: mistralai/mistral-inference @2557e12d (vision_encoder.py, args.py) for names and values of params.json;
transformers 5.23.0 (models/pixtral, models/mistral3) for what config.json makes of them. Queries and keys are
turned by the row and the column of their patch, and lie in pairs of channels as those of the text do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.checkpoint.weight_sets import PROCESSORS
from ckpt_tool.convert.dialects.consolidated import Beside
from ckpt_tool.convert.layout import rule
from ckpt_tool.convert.numbers import (
    DEFAULT,
    Field,
    Known,
    Value,
    anything,
    count,
    flag,
    given,
    measured,
    number,
    only,
)

ENCODER, PLACES = "vision_encoder", ("vision_encoder", "multimodal.vision_encoder_args")
OBJECTS = ("vision_encoder", "multimodal", "multimodal.vision_encoder_args")  # of params.json
CONFIG = "vision_config"
S, T = "vision_encoder.transformer.layers.{j}.", "vision_tower.transformer.layers.{j}."


def _heads(source: str, target: str, pattern: str) -> Any:
    return rule(f"{S}attention.{source}.weight", f"{T}attention.{target}_proj.weight", pattern)


TURNED = "(vm vhalf two) vd -> (vm two vhalf) vd"
TOWER = (
    rule("vision_encoder.patch_conv.weight", "vision_tower.patch_conv.weight", "vd vc vp vq"),
    rule("vision_encoder.ln_pre.weight", "vision_tower.ln_pre.weight", "vd"),
    rule(f"{S}attention_norm.weight", f"{T}attention_norm.weight", "vd"),
    _heads("wq", "q", TURNED),
    _heads("wk", "k", TURNED),
    _heads("wv", "v", "(vm vh) vd"),
    _heads("wo", "o", "vd (vm vh)"),
    rule(f"{S}ffn_norm.weight", f"{T}ffn_norm.weight", "vd"),
    rule(f"{S}feed_forward.w1.weight", f"{T}feed_forward.gate_proj.weight", "vf vd"),
    rule(f"{S}feed_forward.w3.weight", f"{T}feed_forward.up_proj.weight", "vf vd"),
    rule(f"{S}feed_forward.w2.weight", f"{T}feed_forward.down_proj.weight", "vd vf"),
)
_P = "multi_modal_projector."
PROJECTOR = (
    rule("pre_mm_projector_norm.weight", f"{_P}norm.weight", "vd"),
    rule("patch_merger.merging_layer.weight", f"{_P}patch_merger.merging_layer.weight", "vd vs"),
    rule("vision_language_adapter.w_in.weight", f"{_P}linear_1.weight", "d vd"),
    rule("vision_language_adapter.w_out.weight", f"{_P}linear_2.weight", "d de"),
)
BIASES = (
    rule("vision_language_adapter.w_in.bias", f"{_P}linear_1.bias", "d"),
    rule("vision_language_adapter.w_out.bias", f"{_P}linear_2.bias", "d"),
)


def sees(names: Any) -> bool:
    """Whether there is such a part among tensors of these names, in either layout."""
    return any(n.startswith(("vision_encoder.", "vision_tower.", "model.vision_tower.")) for n in names)


def _keys(key: str) -> tuple[str, ...]:
    return tuple(f"{place}.{key}" for place in PLACES)


def _size(name: str, **more: Any) -> Field:
    return count(f"{CONFIG}.{name}", *_keys(name), silent=DEFAULT, **more)


def _side(known: Known) -> tuple[str, ...]:
    """image_size, else max_image_size: the longer side of the largest image."""
    own = _keys("image_size")
    return own if known.facts.given(*own) else _keys("max_image_size")


def _biased(known: Known) -> Value:
    """Whether the adapter has biases, which readers take for granted either way."""
    return given(BIASES[0].source[0] in known.source.tensors, "adapter_bias absent: as the tensors have it")


def _beside(*fields: Field) -> tuple[Field, ...]:
    """Values that config.json has no place for."""
    return tuple(replace(f, hidden=True, told=False) for f in fields)


MERGED, NORMED = "patch_merge", True
FIELDS: tuple[Field, ...] = (
    only(f"{CONFIG}.model_type", "pixtral", "the tower of these models"),
    only(f"{CONFIG}.hidden_act", "silu", "the original's feed_forward"),
    _size("hidden_size", ask="the width of the tower"),
    _size("intermediate_size", rule=measured(S.replace("{j}", "0") + "feed_forward.w1.weight", 0)),
    _size("num_hidden_layers", ask="the layers of the tower"),
    _size("num_attention_heads", ask="the heads of the tower"),
    _size("num_channels", rule=measured("vision_encoder.patch_conv.weight", 1)),
    _size("patch_size", rule=measured("vision_encoder.patch_conv.weight", 2)),
    count(f"{CONFIG}.image_size", read=_side, silent=DEFAULT, ask="the longer side of the largest image"),
    number(
        f"{CONFIG}.rope_theta",
        *_keys("rope_theta"),
        rule=given(1e4, "rope_theta of the tower absent: 10000, as the publisher's code has it"),
        silent=DEFAULT,
    ),
    count(
        "spatial_merge_size", *_keys("spatial_merge_size"), silent=DEFAULT, ask="how many patches are merged"
    ),
    flag(
        "multimodal_projector_bias",
        *_keys("adapter_bias"),
        rule=_biased,
    ),
    count(
        "image_token_index", *_keys("image_token_id"), silent=DEFAULT, ask="the id that stands for an image"
    ),
    only("projector_hidden_act", "gelu", "the original's adapter"),
    only("vision_feature_layer", -1, "the original takes what the last layer gives"),
    *_beside(
        only("mm_projector_id", MERGED, "the models with a merging layer", keys=_keys("mm_projector_id")),
        only(
            "pre_mm_norm",
            NORMED,
            "the models with a norm before the adapter",
            keys=_keys("add_pre_mm_projector_layer_norm"),
        ),
        *(
            anything(name, *_keys(key), rule=Value(None, "absent"))
            for name, key in (
                ("image_break", "image_break_token_id"),
                ("image_end", "image_end_token_id"),
                ("max_image", "max_image_size"),
            )
        ),
    ),
)
BREAK, END = 12, 13  # the ids of every tokenizer of these models


def entries(known: Known) -> dict[str, Value]:
    """What params.json says of it."""
    names = ("hidden_size", "num_channels", "image_size", "patch_size", "rope_theta", "intermediate_size")
    made = {n: known.value(f"{CONFIG}.{n}") for n in (*names, "num_hidden_layers", "num_attention_heads")}
    made |= {
        "adapter_bias": known.value("multimodal_projector_bias"),
        "mm_projector_id": given(MERGED, "models with a merging layer"),
        "spatial_merge_size": known.value("spatial_merge_size"),
        "add_pre_mm_projector_layer_norm": given(NORMED, "models with a norm before the adapter"),
        "image_token_id": known.value("image_token_index"),
        "image_break_token_id": given(BREAK, "every Mistral tokenizer"),
        "image_end_token_id": given(END, "every Mistral tokenizer"),
    }
    return {f"{ENCODER}.{name}": value for name, value in made.items()}


def beside(known: Known) -> Beside:
    """The rows with the sizes of the tower."""
    fields = {
        "vd": "hidden_size",
        "vf": "intermediate_size",
        "vm": "num_attention_heads",
        "vc": "num_channels",
        "vp": "patch_size",
        "vq": "patch_size",
    }
    axes = {a: int(known[f"{CONFIG}.{name}"]) for a, name in fields.items()}
    if axes["vd"] % (4 * axes["vm"]):
        message = (
            f"expected {CONFIG}.hidden_size {axes['vd']} to divide into {axes['vm']} heads of pairs for "
        )
        known.refuse("config-mismatch", f"{message}rows and columns, found a rest", f"{CONFIG}.hidden_size")
        known.facts.check()
    width = axes["vd"] // axes["vm"]
    merged = axes["vd"] * known["spatial_merge_size"] ** 2
    axes |= {"vh": width, "vhalf": width // 2, "vs": merged, "de": known["hidden_size"]}
    rows = (*TOWER, *PROJECTOR, *(BIASES if known["multimodal_projector_bias"] else ()))
    behind = {a: f"{CONFIG}.{name}" for a, name in fields.items()} | {"de": "hidden_size"}
    return Beside(rows, axes, behind, {"j": int(known[f"{CONFIG}.num_hidden_layers"])})


def untold(known: Known) -> list[str]:
    """The files by which transformers makes patches of images are no part of an original, and carried where
    they stand beside it."""
    missing = [name for name in PROCESSORS[::-1] if name not in known.source.checkpoint.documents]
    patch, merged = known[f"{CONFIG}.patch_size"], known["spatial_merge_size"]
    if not missing:
        return []
    verb, those = ("is", "that") if len(missing) == 1 else ("are", "those")
    return [
        f"no {' and '.join(missing)} {verb} written, which AutoProcessor reads: take {those} of the release "
        f"(patch_size {patch}, spatial_merge_size {merged})"
    ]


# What the classes take for absent keys.
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
    "hidden_act": "gelu",
    "rope_theta": 10000.0,
}
WITHOUT_A_PART: Mapping[str, Any] = {**DEFAULTS, "image_size": 1540, "patch_size": 14}
TOP: Mapping[str, Any] = {
    "image_token_index": 10,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "multimodal_projector_bias": False,
    "spatial_merge_size": 2,
}
