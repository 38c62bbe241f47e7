"""A decoder that its publisher stores in the tensors and the config.json of transformers: the names, and
where the numbers are. The pass is that of `ckpt_tool.reference.decoder` all the same, after the papers.

Source: the documentation of Qwen2Config and Qwen3Config in transformers 4.57.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tool.reference.decoder import Names
from ckpt_tool.reference.facts import Shapes, first
from ckpt_tool.reference.rope import RopeScaling

ASKED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta")
AS_PUBLISHED = Names(
    word="model.embed_tokens.weight",
    block="model.layers.",
    norm_1="input_layernorm.weight",
    qkv=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    out="self_attn.o_proj.weight",
    norm_2="post_attention_layernorm.weight",
    units=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    down="mlp.down_proj.weight",
    final_norm="model.norm.weight",
    output="lm_head.weight",
)


def told(
    params: Mapping[str, Any], overrides: Mapping[str, Any], ranks: int = 1, asked: tuple[str, ...] = ASKED
) -> dict[str, Any]:
    """What is known, the user's word first, with theta wherever it stands. ValueError for what is not, and
    for more than one rank."""
    if ranks != 1:
        raise ValueError(f"expected one rank (the published files are not model-parallel), found {ranks}")
    facts = {**params, **overrides}
    facts["rope_theta"] = first(theta_of(overrides), theta_of(facts))
    if missing := [name for name in asked if facts.get(name) is None]:
        raise ValueError(f"expected {', '.join(missing)} in config.json or given by name, found none")
    return facts


def numbers(facts: Mapping[str, Any], names: Names, shapes: Shapes, ranks: int) -> dict[str, Any]:
    """Those of `decoder.Config`, of facts that `told` has; `shapes` are those of rank 0."""
    words, D = shapes[names.word]
    n_heads = int(facts["num_attention_heads"])
    return {
        "n_layers": int(facts["num_hidden_layers"]),
        "dim": D,
        "n_heads": n_heads,
        "n_kv_heads": int(facts["num_key_value_heads"]),
        "head_dim": int(facts.get("head_dim") or D // max(1, n_heads)),
        "norm_eps": float(facts["rms_norm_eps"]),
        "rope_theta": facts["rope_theta"],
        "rope_scaling": scaling_of(facts),
        "windows": windows_of(facts),
        "n_words": int(facts.get("vocab_size") or words * ranks),
        "names": names,
        "neighbours": False,
    }


def theta_of(facts: Mapping[str, Any]) -> float | None:
    """transformers 5 keeps it in `rope_parameters`."""
    newer = facts.get("rope_parameters") or {}
    theta = facts.get("rope_theta") if newer.get("rope_theta") is None else newer["rope_theta"]
    return None if theta is None else float(theta)


def scaling_of(facts: Mapping[str, Any]) -> RopeScaling | None:
    found = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    return RopeScaling.from_hf(found, facts.get("max_position_embeddings"))


def windows_of(facts: Mapping[str, Any]) -> tuple[int | None, ...]:
    """`max_window_layers` counts the layers at the beginning that see everything, if `use_sliding_window`;
    `layer_types` says the same layer by layer and is newer. No published model uses it."""
    n_layers, window = int(facts["num_hidden_layers"]), facts.get("sliding_window")
    if not facts.get("use_sliding_window") or window is None:
        return (None,) * n_layers
    if facts.get("layer_types") is not None:
        return tuple(int(window) if kind == "sliding_attention" else None for kind in facts["layer_types"])
    if facts.get("max_window_layers") is None:
        raise ValueError("expected max_window_layers or layer_types beside a window, found none")
    full = min(n_layers, int(facts["max_window_layers"]))
    return (None,) * full + (int(window),) * (n_layers - full)
