"""MobileBERT as Google trains it, in the variables of its TensorFlow 1 checkpoints, with all heads.

Source: Sun et al. 2020 (arXiv 2004.02984); google-research/google-research @0c1bbe5, mobilebert/modeling.py,
run_pretraining.py, run_classifier.py and run_squad.py. The two epsilons are in the code alone: 1e-12 in
`contrib_layers.layer_norm`, 1e-6 in "manual_layer_norm"; its `gelu` is the tanh form.

Padding: this pass gives hidden keys the lowest score there is, as transformers does and, but for rounding,
the older code (-10000 added, @c3de5da). The newer code gives them a score of -6, so that a padded key keeps
some weight: rows with padding then differ by 2e-4 to 31 % of their size, as measured on tiny models, and rows
without it not at all. Which of the two trained the published weights is not known.

B batch, T tokens, E width of a word, D width between layers, W width inside a layer (D without bottlenecks),
N heads, V vocabulary, L labels, C choices. Kernels are (in, out); the weights of output layers (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference import blocks
from ckpt_tool.reference.blocks import Tensors, products, weigh, wide
from ckpt_tool.reference.facts import Shapes, disagreements, first, only, refuse
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes
from ckpt_tool.reference.unread import unread

WORDS = "bert/embeddings/word_embeddings"
POSITIONS, TYPES = (f"bert/embeddings/{name}_embeddings" for name in ("position", "token_type"))
WIDENED = "bert/embeddings/embedding_transformation/"
POOLER, LM, NEXT = "bert/pooler/dense/", "cls/predictions/", "cls/seq_relationship/"
CLASSES, SPANS = "", ("cls/squad/", "squad/")  # what the names of a fine-tuned head begin with
LAYER = "bert/encoder/layer_{}/"

# What Google calls the functions, and what config.json does, by the names of `activate`.
OWN_ACTIVATIONS = {"relu": "relu", "relu6": "relu6", "gelu": "tanh", "tanh": "tangent", "linear": "linear"}
ACTIVATIONS = {**blocks.ACTIVATIONS, **OWN_ACTIVATIONS, "gelu": "erf"}
NORMS = {"no_norm": None, "layer_norm": 1e-12, "manual_layer_norm": 1e-6}  # None: only scaled and shifted
# What a config without these keys means.
DEFAULTS = {"hidden_act": "gelu", "num_attention_heads": 12, "normalization_type": "layer_norm"}
# Published sizes (layers, D, E, W, F, feed-forward networks) -> heads and function, for a bare checkpoint.
PUBLISHED = {
    (24, 512, 128, 128, 512, 4): (4, "relu"),
    (24, 512, 128, 128, 512, 2): (4, "relu"),
    (24, 512, 128, 1024, 4096, 1): (4, "gelu"),  # the teacher
}


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    n_units: int  # feed-forward networks of each layer
    activation: str  # of `activate`
    norm_eps: float | None  # None: NoNorm
    head_eps: float  # of the LM head, whose norm is always a layer norm
    trigram: bool  # a word is seen with its neighbours
    bottleneck: bool  # layers are narrower inside
    shared: bool  # query and key come from a bottleneck of their own
    narrow: bool  # query, key and value come from the bottleneck of the residual

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` is Google's config as a document, empty without one; `overrides` are facts from the user
        under their names in config.json, which win. What the tensors show is theirs to say, and has to
        be what is told. ValueError with all that is missing, that disagrees, and that is not computed."""
        if WORDS not in shapes or LAYER.format(0) + "attention/self/query/kernel" not in shapes:
            raise ValueError("expected the variables of a MobileBERT, `bert/embeddings/...`, found others")
        seen = _seen(shapes)
        known = DEFAULTS if "vocab_size" in params or "hidden_size" in params else {}
        told = {**params, **overrides}
        sizes = (
            *(seen[k] for k in ("num_hidden_layers", "hidden_size", "embedding_size")),
            *(seen[k] for k in ("intra_bottleneck_size", "intermediate_size", "num_feedforward_networks")),
        )
        heads, function = PUBLISHED.get(sizes, (None, None)) if not known else (None, None)
        heads = first(told.get("num_attention_heads"), known.get("num_attention_heads"), heads)
        own = first(params.get("hidden_act"), known.get("hidden_act"), function)
        names = OWN_ACTIVATIONS if overrides.get("hidden_act") is None else ACTIVATIONS
        function = first(overrides.get("hidden_act"), own)
        plain = "bert/embeddings/FakeLayerNorm/gamma" in shapes
        silent = "layer_norm" if known or sizes in PUBLISHED else None
        kind = first(told.get("normalization_type"), "no_norm" if plain else silent)
        refuse([*_problems(seen, told, shapes, heads, (function, names), (kind, plain))])
        eps = NORMS[kind]
        asked = overrides.get("layer_norm_eps")
        return cls(
            n_layers=seen["num_hidden_layers"],
            n_heads=int(heads),
            n_units=seen["num_feedforward_networks"],
            activation=names[str(function).lower()],
            norm_eps=None if eps is None else float(first(asked, eps)),
            head_eps=float(first(asked, 1e-12)),
            trigram=seen["trigram_input"],
            bottleneck=seen["use_bottleneck"],
            shared=seen["key_query_shared_bottleneck"],
            narrow=_narrow(seen, told, shapes),
        )


def _seen(shapes: Shapes) -> dict[str, Any]:
    """What the tensors show, under the names of the config."""
    p = LAYER.format(0)
    (V, E), (P, D) = shapes[WORDS], shapes[POSITIONS]
    layers = {int(m[1]) for m in (re.match(LAYER.format(r"(\d+)"), name) for name in shapes) if m}
    if layers != set(range(len(layers))):
        raise ValueError(f"expected layers 0, 1, 2, ..., found {sorted(layers)}")
    stacked = {m[1] for m in (re.match(rf"{p}ffn_layer_(\d+)/", name) for name in shapes) if m}
    return {
        "vocab_size": V,
        "embedding_size": E,
        "hidden_size": D,
        "max_position_embeddings": P,
        "type_vocab_size": shapes[TYPES][0],
        "num_hidden_layers": len(layers),
        "intermediate_size": shapes[p + "intermediate/dense/kernel"][1],
        "intra_bottleneck_size": shapes[p + "attention/self/query/kernel"][1],
        "num_feedforward_networks": len(stacked) + 1,
        "trigram_input": shapes.get(WIDENED + "kernel", (E,))[0] == 3 * E,
        "use_bottleneck": p + "bottleneck/input/dense/kernel" in shapes,
        "key_query_shared_bottleneck": p + "bottleneck/attention/dense/kernel" in shapes,
        "classifier_activation": POOLER + "kernel" in shapes,
    }


def _narrow(seen: Mapping[str, Any], told: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether values come from the bottleneck: by the rows of their kernel; where it is as wide as what goes
    into it, by what is told, and silence is no."""
    if not seen["use_bottleneck"] or seen["key_query_shared_bottleneck"]:
        return False
    if seen["intra_bottleneck_size"] == seen["hidden_size"]:
        return bool(told.get("use_bottleneck_attention"))
    rows = shapes[LAYER.format(0) + "attention/self/value/kernel"][0]
    return bool(rows == seen["intra_bottleneck_size"])


def _problems(
    seen: Mapping[str, Any],
    told: Mapping[str, Any],
    shapes: Shapes,
    heads: Any,
    activation: tuple[Any, Mapping[str, str]],
    norms: tuple[Any, bool],
) -> Iterator[str]:
    """Why this is not the model that is told, or none that this pass computes."""
    without = {} if seen["use_bottleneck"] else {"intra_bottleneck_size": None}  # idle, and often told
    narrow = _narrow(seen, told, shapes)
    if told.get("use_bottleneck_attention") and seen["use_bottleneck"]:
        without["key_query_shared_bottleneck"] = None  # the code does not look at it then
    elif not seen["use_bottleneck"]:
        without |= {"key_query_shared_bottleneck": None, "use_bottleneck_attention": None}
    numbers = {k: int(v) for k, v in {**seen, "use_bottleneck_attention": narrow}.items()}
    yield from disagreements(numbers, {**told, **without})
    if any("FakeQuant" in name for name in shapes):
        yield "expected a model that computes in floating point, found the ranges of fake quantization"
    function, names = activation
    if not heads:
        yield "expected `num_attention_heads` in the config or given by name, found neither"
    elif seen["intra_bottleneck_size"] % int(heads):
        yield f"expected heads that share {seen['intra_bottleneck_size']} channels, found {heads}"
    if function is None:
        yield "expected `hidden_act` in the config or given by name, found neither"
    elif str(function).lower() not in names:
        yield f"expected `hidden_act` to be one of {', '.join(names)}, found {function}"
    kind, plain = norms
    if kind is None:
        yield "expected `normalization_type` in the config or given by name, found neither"
    elif kind not in NORMS:
        yield f"expected `normalization_type` to be one of {', '.join(NORMS)}, found {kind}"
    elif plain != (NORMS[kind] is None):
        found = "FakeLayerNorm" if plain else "LayerNorm"
        yield f"expected the variables of {kind}, found those that are called {found}"
    yield from only(told, {"tie_word_embeddings": (True,)})
    read = {*seen, *DEFAULTS, "use_bottleneck_attention", "layer_norm_eps", "tie_word_embeddings"}
    yield from unread(told, read)


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("token_types", "mask")


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    """Without an LM head "head" is the last hidden state."""
    (w,) = ranks
    lm = LM + "output_bias" in w
    heads: dict[str, Callable[..., Tensor]] = {"head": head if lm else sequence}
    if NEXT + "output_weights" in w:
        heads["seq_relationship_logits"] = next_sentence
    if CLASSES + "output_weights" in w:
        heads["logits"] = lambda x, ranks, c: classes(pool(x, ranks, c), ranks)
    if any(stem + "output_weights" in w for stem in SPANS):
        heads["start_logits"] = lambda x, ranks, c: spans(x, ranks, c)[0]
        heads["end_logits"] = lambda x, ranks, c: spans(x, ranks, c)[1]
    if not lm and len(heads) == 1:
        heads["pooler_output"] = pool
    return decoder_phases(embed, layer, heads, ranks, c, inputs)


forward, encode = passes(phases)


def dense(x: Tensor, w: Tensors, stem: str) -> Tensor:
    return x @ w[stem + "kernel"] + w[stem + "bias"]


def activate(x: Tensor, name: str) -> Tensor:
    if name == "relu6":
        return x.clamp(0, 6)
    if name == "tangent":
        return torch.tanh(x)
    return x if name == "linear" else blocks.activate(x, name)


def norm(x: Tensor, w: Tensors, stem: str, eps: float | None) -> Tensor:
    """What the paper calls NoNorm, which has no statistics, or a layer norm."""
    if eps is None:
        return x * w[stem + "FakeLayerNorm/gamma"] + w[stem + "FakeLayerNorm/beta"]
    gamma, beta = (w[f"{stem}LayerNorm/{name}"] for name in ("gamma", "beta"))
    return blocks.layer_norm(x, {"weight": gamma, "bias": beta}, "", eps)


def embed(ids: Tensor, ranks: Ranks, c: Config, *, token_types: Tensor | None = None) -> Tensor:
    """A word is seen between the next one, which comes first, and the one before it; there are zeros beyond
    both ends, and padding is a word like others."""
    (w,) = ranks
    x = w[WORDS][ids]  # (B, T, E)
    if c.trigram:
        edge = torch.zeros_like(x[:, :1])
        around = torch.cat([edge, x, edge], dim=1)
        x = torch.cat([around[:, 2:], x, around[:, :-2]], dim=-1)
    if c.trigram or WIDENED + "kernel" in w:
        x = dense(x, w, WIDENED)  # (B, T, D)
    types = torch.zeros_like(ids) if token_types is None else token_types
    return norm(x + w[TYPES][types] + w[POSITIONS][: ids.shape[1]], w, "bert/embeddings/", c.norm_eps)


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    (w,), p = ranks, LAYER.format(i)

    def narrowed(name: str) -> Tensor:
        stem = f"{p}bottleneck/{name}/"
        return norm(dense(x, w, stem + "dense/"), w, stem, c.norm_eps)  # (B, T, W)

    y = narrowed("input") if c.bottleneck else x
    values = y if c.narrow else x
    asked = narrowed("attention") if c.shared else values
    attended = attention(asked, values, w, p + "attention/self/", c, mask)
    y = norm(dense(attended, w, p + "attention/output/dense/") + y, w, p + "attention/output/", c.norm_eps)
    for stem in (*(f"{p}ffn_layer_{j}/" for j in range(c.n_units - 1)), p):
        units = activate(dense(y, w, stem + "intermediate/dense/"), c.activation)
        y = norm(dense(units, w, stem + "output/dense/") + y, w, stem + "output/", c.norm_eps)
    if not c.bottleneck:
        return y
    stem = p + "output/bottleneck/"
    return norm(dense(y, w, stem + "dense/") + x, w, stem, c.norm_eps)


def attention(asked: Tensor, values: Tensor, w: Tensors, p: str, c: Config, mask: Tensor | None) -> Tensor:
    """Queries and keys of `asked`, values of `values`, wherever they come from: (B, T, W)."""
    given = {"query": asked, "key": asked, "value": values}
    split = (c.n_heads, -1)
    q, k, v = (torch.unflatten(dense(x, w, f"{p}{name}/"), -1, split) for name, x in given.items())
    seen = torch.ones(1, 1, 1, q.shape[1], dtype=torch.bool, device=q.device)
    if mask is not None:
        seen = mask.bool()[:, None, None, :]
    return weigh(products(q, k) / q.shape[-1] ** 0.5, v, seen, torch.finfo(q.dtype).min)


def sequence(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """What the last layer gives, (B, T, D), or (B, C, T, D)."""
    return x


def pool(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Of the first token, as it is or through a layer: (B, D), or (B, C, D)."""
    (w,), y = ranks, x[..., 0, :]
    return torch.tanh(dense(y, w, POOLER)) if POOLER + "kernel" in w else y


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, T, V): the output layer is the word table, E of D columns, and beside it the others."""
    (w,), p = ranks, LM + "transform/"
    z = norm(activate(dense(x, w, p + "dense/"), c.activation), w, p, c.head_eps)
    E = w[WORDS].shape[1]
    logits = z[..., :E] @ w[WORDS].T
    if z.shape[-1] > E:
        logits = logits + z[..., E:] @ w[LM + "extra_output_weights"].T
    return wide(logits + w[LM + "output_bias"])


def next_sentence(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, 2) of a continuation and of a random next sentence."""
    return classes(pool(x, ranks, c), ranks, NEXT)


def classes(y: Tensor, ranks: Ranks, stem: str = CLASSES) -> Tensor:
    """Logits of what the classifier is put on, or the values of a regression: (..., L)."""
    (w,) = ranks
    return wide(y @ w[stem + "output_weights"].T + w[stem + "output_bias"])


def spans(x: Tensor, ranks: Ranks, c: Config) -> tuple[Tensor, Tensor]:
    """Logits of the first and of the last token of the answer, (B, T) each."""
    stem = next((stem for stem in SPANS if stem + "output_weights" in ranks[0]), SPANS[0])
    start, end = classes(x, ranks, stem).unbind(-1)
    return start, end


# What `encode` gives goes into each. Google has published no scripts for choices and for classes of tokens;
# they take the names of its classifier.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, ...]]] = {
    "base_model": lambda x, ranks, c: (x, pool(x, ranks, c)),
    "masked_lm": head,
    "next_sentence_prediction": next_sentence,
    "pretraining": lambda x, ranks, c: (head(x, ranks, c), next_sentence(x, ranks, c)),
    "sequence_classification": lambda x, ranks, c: classes(pool(x, ranks, c), ranks),
    "multiple_choice": lambda x, ranks, c: classes(pool(x, ranks, c), ranks).squeeze(-1),
    "token_classification": lambda x, ranks, c: classes(x, ranks),
    "question_answering": spans,
}
