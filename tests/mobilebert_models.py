"""Tiny MobileBERTs in the names of Google's code and in those of transformers, for the tests of both
readings; one for every kind of model that a config can say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool.reference import mobilebert as tf

State = dict[str, Tensor]
V, E, D, W, F, P, T = 53, 14, 26, 20, 33, 41, 17

STUDENT = {
    "vocab_size": V, "embedding_size": E, "hidden_size": D, "intra_bottleneck_size": W,
    "intermediate_size": F, "max_position_embeddings": P, "type_vocab_size": 2, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_feedforward_networks": 4, "hidden_act": "relu", "trigram_input": True,
    "use_bottleneck": True, "use_bottleneck_attention": False, "key_query_shared_bottleneck": True,
    "normalization_type": "no_norm", "classifier_activation": False,
}  # fmt: skip
# Names of config.json; `gelu_new` is what Google calls gelu.
KINDS: dict[str, dict[str, Any]] = {
    "student": STUDENT,
    "tiny": STUDENT
    | {
        "use_bottleneck_attention": True,
        "key_query_shared_bottleneck": False,
        "num_feedforward_networks": 2,
    },
    "attention as wide as the model": STUDENT
    | {"intra_bottleneck_size": D, "key_query_shared_bottleneck": False, "num_attention_heads": 2},
    "no bottleneck": STUDENT
    | {
        "use_bottleneck": False,
        "key_query_shared_bottleneck": False,
        "num_attention_heads": 2,
        "intra_bottleneck_size": D,
    },
    "one network, no neighbours": STUDENT
    | {"trigram_input": False, "num_feedforward_networks": 1, "hidden_act": "gelu_new"},
    "words as wide as the model": STUDENT
    | {"trigram_input": False, "embedding_size": D, "classifier_activation": True, "hidden_act": "tanh"},
    "words as wide, with neighbours": STUDENT | {"embedding_size": D, "hidden_act": "linear"},
    "layer norms": STUDENT
    | {"normalization_type": "layer_norm", "hidden_act": "relu6", "classifier_activation": True},
    "layer norms without a bottleneck": STUDENT
    | {
        "normalization_type": "layer_norm",
        "use_bottleneck": False,
        "key_query_shared_bottleneck": False,
        "num_attention_heads": 2,
        "intra_bottleneck_size": D,
        "hidden_act": "gelu",
    },
}


def variables(c: Mapping[str, Any], heads: Mapping[str, tuple[int, int]] | None = None) -> State:
    """A model as Google's code would store it, in float64; `heads` are further output layers by stem."""
    E, D, F = (c[k] for k in ("embedding_size", "hidden_size", "intermediate_size"))
    W = c["intra_bottleneck_size"] if c["use_bottleneck"] else D
    into = W if c["use_bottleneck_attention"] or c["key_query_shared_bottleneck"] else D
    name = "FakeLayerNorm" if c["normalization_type"] == "no_norm" else "LayerNorm"
    shapes: dict[str, tuple[int, ...]] = {
        "bert/embeddings/word_embeddings": (c["vocab_size"], E),
        "bert/embeddings/position_embeddings": (c["max_position_embeddings"], D),
        "bert/embeddings/token_type_embeddings": (2, D),
    }

    def dense(stem: str, a: int, b: int, normed: str = "") -> None:
        shapes[f"{stem}/dense/kernel"], shapes[f"{stem}/dense/bias"] = (a, b), (b,)
        if normed:
            shapes.update({f"{stem}/{normed}/gamma": (b,), f"{stem}/{normed}/beta": (b,)})

    stem = "bert/embeddings"
    if c["trigram_input"] or E != D:
        shapes[f"{stem}/embedding_transformation/kernel"] = (E * (3 if c["trigram_input"] else 1), D)
        shapes[f"{stem}/embedding_transformation/bias"] = (D,)
    shapes |= {f"{stem}/{name}/gamma": (D,), f"{stem}/{name}/beta": (D,)}
    for i in range(c["num_hidden_layers"]):
        p = f"bert/encoder/layer_{i}"
        if c["use_bottleneck"]:
            dense(f"{p}/bottleneck/input", D, W, name)
            if c["key_query_shared_bottleneck"]:
                dense(f"{p}/bottleneck/attention", D, W, name)
            dense(f"{p}/output/bottleneck", W, D, name)
        rows = {"query": into, "key": into, "value": W if c["use_bottleneck_attention"] else D}
        for part, a in rows.items():
            shapes |= {f"{p}/attention/self/{part}/kernel": (a, W), f"{p}/attention/self/{part}/bias": (W,)}
        dense(f"{p}/attention/output", W, W, name)
        for q in (*(f"{p}/ffn_layer_{j}" for j in range(c["num_feedforward_networks"] - 1)), p):
            dense(f"{q}/intermediate", W, F)
            dense(f"{q}/output", F, W, name)
    if c["classifier_activation"]:
        dense("bert/pooler", D, D)
    dense("cls/predictions/transform", D, D, "LayerNorm")
    shapes["cls/predictions/output_bias"] = (c["vocab_size"],)
    if E < D:
        shapes["cls/predictions/extra_output_weights"] = (c["vocab_size"], D - E)
    for stem, (L, width) in {"cls/seq_relationship/": (2, D), **(heads or {})}.items():
        shapes |= {f"{stem}output_weights": (L, width), f"{stem}output_bias": (L,)}
    made = {}
    for number, (key, shape) in enumerate(sorted(shapes.items())):
        seed = torch.Generator().manual_seed(number)
        made[key] = torch.randn(shape, generator=seed, dtype=torch.float64) * 0.2 + 0.8 * ("gamma" in key)
    return made


def converted(state: Mapping[str, Tensor], head: str = "classifier") -> State:
    """The same in the names and the orientation of transformers; `head` is what a fine-tuned one has."""
    made = {}
    for name, x in state.items():
        name = re.sub(r"(ffn_)?layer_(\d+)", lambda m: f"{'ffn' if m[1] else 'layer'}/{m[2]}", name)
        name = name.replace("FakeLayerNorm", "LayerNorm").replace("bert/", "mobilebert/", 1)
        name = name.replace("extra_output_weights", "dense/kernel")
        if name.startswith(("output_", "cls/squad/", "squad/")):
            name = f"{head}/{name.split('/')[-1]}"
        x = x.T.contiguous() if name.endswith("/kernel") else x
        name = re.sub(r"(kernel|gamma|output_weights)$", "weight", name)
        name = re.sub(r"(beta|output_bias)$", "bias", name)
        name = re.sub(r"_embeddings$", "_embeddings/weight", name)
        made[name.replace("/", ".")] = x
    return made


def original(state: Mapping[str, Tensor], told: Mapping[str, Any], **given: Any) -> tf.Config:
    """As Google's document says it: gelu is its tanh form."""
    function = {"gelu_new": "gelu", "gelu": None}.get(told["hidden_act"], told["hidden_act"])
    given |= {} if function else {"hidden_act": "gelu"}
    shapes = {n: tuple(x.shape) for n, x in state.items()}
    return tf.Config.from_original({**told, "hidden_act": function}, shapes, 1, given)


def cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> State:
    return {n: x.to(dtype) for n, x in state.items()}


def judge(state: State, told: Mapping[str, Any], name: str, dtype: torch.dtype, **more: Any) -> Any:
    """A class of transformers with these tensors, all of its own among them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileBertConfig(**{**told, **more}, attn_implementation="eager")
    model = getattr(transformers, f"MobileBert{name}")(config).to(dtype).eval()
    wanted = model.state_dict().keys()
    state = {n.removeprefix("mobilebert.") if name == "Model" else n: x for n, x in state.items()}
    result = model.load_state_dict({n: x for n, x in cast(state, dtype).items() if n in wanted}, strict=False)
    idle = {n for n, x in model.state_dict().items() if x.numel() == 0}
    if told["embedding_size"] == told["hidden_size"] and not told["trigram_input"]:
        idle |= {n for n in wanted if "embedding_transformation" in n}  # made, and not used
    tied = {f"cls.predictions.decoder.{kind}" for kind in ("weight", "bias")}
    assert set(result.missing_keys) <= tied | idle
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids, token types and mask, (2, T) each: two segments, and a second row with padding."""
    ids = torch.tensor([[(7 + 31 * k * k + 17 * k) % V for k in range(T)]])
    ids = torch.cat([ids, (ids + 3) % V])
    types, mask = torch.zeros_like(ids), torch.ones_like(ids)
    types[0, 9:], types[1, 4:11] = 1, 1
    mask[1, 11:] = 0
    return ids * mask, types * mask, mask


def largest(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype
    return float((one - other).abs().max())
