"""A decoder that its publisher stores in the tensors and the config.json of transformers: the names, and
where the numbers are. The pass is that of `ckpt_tool.reference.decoder` all the same, after the papers: it is
kept apart from the reading of the Hugging Face layout by what it is written after.

Source: the documentation of Qwen2Config and Qwen3Config in transformers 4.57.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from ckpt_tool.reference import decoder
from ckpt_tool.reference.decoder import Names
from ckpt_tool.reference.facts import Shapes, first, only, refuse
from ckpt_tool.reference.rope import RopeScaling
from ckpt_tool.reference.unread import unread

ASKED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta")
PART = "partial_rotary_factor"
READ = (
    *(*ASKED, "hidden_size", "intermediate_size", "head_dim", "tie_word_embeddings", "hidden_act"),
    *("rope_scaling", "rope_parameters", PART),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
)
AS_PUBLISHED = Names(
    word="model.embed_tokens.weight",
    block="model.layers.",
    norm_1="input_layernorm.",
    qkv=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    out="self_attn.o_proj.",
    norm_2="post_attention_layernorm.",
    units=("mlp.gate_proj.", "mlp.up_proj."),
    down="mlp.down_proj.",
    final_norm="model.norm.",
    output="lm_head.weight",
)


@dataclass(frozen=True)
class Published(decoder.Config):
    # Of a family: its names, what it alone calls facts that others call by the first name, what the published
    # config.json may leave out, and facts whose other values are of another model.
    layout: ClassVar[Names] = AS_PUBLISHED
    own: ClassVar[Mapping[str, str]] = {}
    documented: ClassVar[Mapping[str, Any]] = {}
    computed: ClassVar[Mapping[str, tuple[Any, ...]]] = {"hidden_act": ("silu",)}

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` is config.json, `shapes` those of all tensors, `overrides` facts from the user, which
        win. ValueError for what none of them tells and for what this pass does not compute."""
        said = ({**cls.documented, **params}, overrides)
        params, overrides = ({**f, **{k: f[own] for k, own in cls.own.items() if own in f}} for f in said)
        facts = told(params, overrides, ranks)
        own = {*cls.own, *cls.own.values(), *cls.documented, *cls.computed}
        refuse([*only(facts, cls.computed), *unread(facts, {*READ, *own})])
        made = numbers(facts, tied(cls.layout, facts), shapes)
        return cls(**{**made, **cls.traits(facts, made)})

    @classmethod
    def traits(cls, facts: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
        """What a family has besides or otherwise; `made` are its `numbers`."""
        return {}


def told(params: Mapping[str, Any], overrides: Mapping[str, Any], ranks: int = 1) -> dict[str, Any]:
    """What is known, the user's word first, with theta wherever it stands. ValueError for what is not, and
    for more than one rank."""
    if ranks != 1:
        raise ValueError(f"expected one rank (the published files are not model-parallel), found {ranks}")
    facts = {**params, **overrides}
    facts["rope_theta"] = first(theta_of(overrides), theta_of(facts))
    if "rope_scaling" in overrides and not overrides.get("rope_parameters"):
        newer = facts.pop("rope_parameters", None) or {}  # it would hide the user's word, a null too
        part = first(overrides.get(PART), newer.get(PART), facts.get(PART))
        facts |= {} if part is None else {PART: part}
    if missing := [name for name in ASKED if facts.get(name) is None]:
        raise ValueError(f"expected {', '.join(missing)} in config.json or given by name, found none")
    return facts


def tied(names: Names, facts: Mapping[str, Any]) -> Names:
    return replace(names, output=names.word) if facts.get("tie_word_embeddings") else names


def numbers(facts: Mapping[str, Any], names: Names, shapes: Shapes) -> dict[str, Any]:
    """Those of `decoder.Config`, of facts that `told` has."""
    D, n_heads = shapes[names.word][1], int(facts["num_attention_heads"])
    newer, head_dim = facts.get("rope_parameters") or {}, int(facts.get("head_dim") or D // max(1, n_heads))
    part = first(newer.get(PART), facts.get(PART), 1)
    found = newer or facts.get("rope_scaling") or {}
    return {
        "n_layers": int(facts["num_hidden_layers"]),
        "dim": D,
        "n_heads": n_heads,
        "n_kv_heads": int(facts["num_key_value_heads"]),
        "head_dim": head_dim,
        "turned": int(head_dim * float(part)),
        "norm_eps": float(facts["rms_norm_eps"]),
        "rope_theta": facts["rope_theta"],
        "rope_scaling": RopeScaling.from_hf(found, facts.get("max_position_embeddings")),
        "windows": windows_of(facts),
        "names": names,
        "neighbours": False,
    }


def theta_of(facts: Mapping[str, Any]) -> float | None:
    """transformers 5 keeps it in `rope_parameters`."""
    theta = first((facts.get("rope_parameters") or {}).get("rope_theta"), facts.get("rope_theta"))
    return None if theta is None else float(theta)


def windows_of(facts: Mapping[str, Any]) -> tuple[int | None, ...]:
    """`max_window_layers` counts the layers at the beginning that see everything, if `use_sliding_window`;
    `layer_types` says the same layer by layer and is newer. No published Qwen uses it."""
    n_layers, window = int(facts["num_hidden_layers"]), facts.get("sliding_window")
    full, kinds = facts.get("max_window_layers"), facts.get("layer_types")
    if not facts.get("use_sliding_window") or window is None:
        return (None,) * n_layers
    if kinds is None and full is None:
        raise ValueError("expected max_window_layers or layer_types beside a window, found none")
    if kinds is not None and len(kinds) != n_layers:
        raise ValueError(f"expected layer_types for {n_layers} layers, found {len(kinds)}")
    if kinds is None:
        kinds = ["sliding_attention" if i >= int(full or 0) else "" for i in range(n_layers)]
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
