"""What Megatron-LM checkpoints of every age call their tensors.

The tables of the families use one set of names for all ages, with layers numbered through the whole model:
those of the checkpoints up to v2.0 without the dicts around them. `AGES` says what each age calls the same
tensors.

Source: NVIDIA/Megatron-LM v1.0, v2.0, v2.5, 23.06 and core_v0.9.0 (model/language_model.py, transformer.py,
bert_model.py; core/models), NVIDIA/TransformerEngine (pytorch/transformer.py, module/layernorm_mlp.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from itertools import repeat

VERSIONS = (0.0, 1.0, 2.0, 3.0)

# Names of the tables, less the last word: "weight" and "bias" unless said otherwise below.
LAYER = (
    "layers.{i}.input_layernorm.",
    "layers.{i}.attention.query_key_value.",
    "layers.{i}.attention.dense.",
    "layers.{i}.post_attention_layernorm.",
    "layers.{i}.mlp.dense_h_to_4h.",
    "layers.{i}.mlp.dense_4h_to_h.",
)
# Heads of Megatron's tasks, in place of those of pretraining, each in a dict of its own.
TUNED = ("classification_head.", "multichoice_head.")
FIRST = ("word_embeddings.", "position_embeddings.", "tokentype_embeddings.")
LAST = (
    "final_layernorm.",
    "word_embeddings_for_head.",
    "output_layer.",
    "pooler.dense.",
    "lm_head.",
    "lm_head.dense.",
    "lm_head.layernorm.",
    "binary_head.",
    *TUNED,
)
_ONLY = {"lm_head.": "bias", "word_embeddings_for_head.": "weight", "output_layer.": "weight"} | {
    stem: "weight" for stem in FIRST
}

# Of these a decoder has none.
ENCODER_ONLY = (
    "tokentype_embeddings.weight",
    "lm_head.bias",
    "lm_head.dense.weight",
    "binary_head.weight",
    "classification_head.weight",
    "multichoice_head.weight",
)


def _nested(
    block: str, attention: str, norm: str, embedding: str = "embedding.", root: str = "language_model."
) -> dict[str, str]:
    """The ages that nest all but the heads under one dict."""
    within = dict.fromkeys(("layers.", "final_"), f"{root}{block}.")
    within |= dict.fromkeys(FIRST, root + embedding) | dict.fromkeys(("output_layer.", "pooler."), root)

    def own(stem: str) -> str:
        before = next((w for start, w in within.items() if stem.startswith(start)), "")
        return before + stem.replace("attention.", f"{attention}.").replace("layernorm", norm)

    return {stem: own(stem) for stem in (*LAYER, *FIRST, *LAST)}


def _engine(norm: str) -> dict[str, str]:
    """Layers that are Transformer Engine's TransformerLayer, in a model that is Megatron-LM's otherwise."""
    layer = "language_model.encoder.layers.{i}."
    modules = (
        "self_attention.layernorm_qkv.layer_norm_",
        "self_attention.layernorm_qkv.",
        "self_attention.proj.",
        "layernorm_mlp.layer_norm_",
        "layernorm_mlp.fc1_",
        "layernorm_mlp.fc2_",
    )
    own = dict(zip(LAYER, (layer + module for module in modules), strict=True))
    return _nested("encoder", "self_attention", norm) | own


def _core(block: str, norm_1: str, norm_2: str) -> dict[str, str]:
    layer = f"{block}.layers.{{i}}."
    modules = (
        norm_1,
        "self_attention.linear_qkv.",
        "self_attention.linear_proj.",
        norm_2,
        "mlp.linear_fc1.",
        "mlp.linear_fc2.",
    )
    others = {
        "final_layernorm.": f"{block}.final_layernorm.",
        "lm_head.layernorm.": "lm_head.layer_norm.",
        **dict.fromkeys(("word_embeddings_for_head.", "lm_head."), "output_layer."),
    }
    return {
        **dict(zip(LAYER, (layer + module for module in modules), strict=True)),
        **{stem: f"embedding.{stem}" for stem in FIRST},
        **{stem: others.get(stem, stem) for stem in LAST},
    }


_APART = ("input_layernorm.", "pre_mlp_layernorm.")
_JOINED = ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")

# Age -> what it calls the tensors of the tables. In Megatron-Core the copy of the embedding on the last stage
# and an output layer of its own have one name.
AGES: dict[str, dict[str, str]] = {
    "transformer": _nested("transformer", "attention", "layernorm"),  # to v2.0, 2020
    "encoder": _nested("encoder", "self_attention", "layernorm"),  # 2021 to 2023
    "norm": _nested("encoder", "self_attention", "norm"),  # 2023 on
    "engine": _engine("layernorm"),  # --transformer-impl transformer_engine, 2022 to 2023
    "engine-norm": _engine("norm"),  # 2023 on
    "flat": _nested("transformer", "attention", "layernorm", embedding=""),  # 2019
    "bare": _nested("transformer", "attention", "layernorm", embedding="", root=""),
    "core": _core("decoder", *_APART),
    "core-fused": _core("decoder", *_JOINED),
    "core-bert": _core("encoder", *_APART),
    "core-bert-fused": _core("encoder", *_JOINED),
}


def _dicts(age: str) -> tuple[str, ...]:
    if is_core(age):
        return ("model",)
    whole: tuple[str, ...] = ("", "language_model", "language_model.pooler", "lm_head", "binary_head")
    if age not in ("flat", "bare"):
        parts = ("embedding", "encoder", "transformer", "output_layer")
        whole += ("word_embeddings_for_head", *(f"language_model.{part}" for part in parts))
        whole += tuple(f"language_model.embedding.{stem[:-1]}" for stem in FIRST)
    return tuple(f"model.{name}".rstrip(".") for name in whole)


def is_core(age: str) -> bool:
    return age.startswith("core")


def is_engine(age: str) -> bool:
    return age.startswith("engine")


def has_one_order(age: str) -> bool:
    """Whether rows are in the order of version 2.0 whatever version a file says."""
    return is_core(age) or is_engine(age)


# What the same code calls tensors without Transformer Engine.
WITHOUT_ENGINE = {"engine": "encoder", "engine-norm": "norm"}


# The dicts that an age's tensors stand in; inside the innermost, the rest of a name is one key.
DICTS = {age: _dicts(age) for age in AGES}


@cache
def own_names(age: str) -> dict[str, str]:
    """Name in the tables, `{i}` for a layer, -> name in a file of this age."""
    return {
        stem + kind: own + kind
        for stem, own in AGES[age].items()
        for kind in ([_ONLY[stem]] if stem in _ONLY else ["weight", "bias"])
    }


# One of them ends a name in every age.
_FUSED = tuple({names[LAYER[1]].rpartition("}")[2] + "weight" for names in AGES.values()})


def age_of(names: Collection[str]) -> str | None:
    """The age whose names these are, with or without the `model` before them; None for other names."""
    if not any(map(str.endswith, names, repeat(_FUSED))):
        return None
    bare = {own for _, own in map(without_model, names)}
    first = re.compile(r"(?<=layers\.)\d+(?=\.)")
    bare |= {first.sub("{i}", n) for n in bare}
    wanted = [stem + kind for stem in LAYER for kind in ("weight", "bias")]
    known = [age for age in AGES if all(own_names(age)[n] in bare for n in wanted)]
    known = [age for age in known if own_names(age)["word_embeddings.weight"] in bare]
    whole = [age for age in known if own_names(age)["final_layernorm.weight"] in bare]
    return next(iter(whole or known), None)


def without_model(name: str) -> tuple[str, str]:
    """(number of the virtual stage as text, the rest) of `model0.x`; ("", name) without a `model`."""
    m = re.match(r"model(\d{0,4})\.", name)
    return ("", name) if m is None else (m[1], name[m.end() :])


def fused_order(version: float, ordered: bool) -> str:
    """The order of the rows of query_key_value: t is query, key, value; n the head; h the channel. A rank
    holds all of it for its heads. Version 3.0 renamed arguments only; `ordered` ages always have the order of
    2.0."""
    if ordered or version >= 2:
        return "n t h"
    return "n h t" if version == 1 else "t n h"
