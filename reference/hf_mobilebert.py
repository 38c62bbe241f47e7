"""MobileBert in the Hugging Face layout, `mobilebert.encoder.layer.{i}.`, without `mobilebert.` for
MobileBertModel. Each head as its class computes it.

Source: transformers 4.37.2 and 5.23.0, models/mobilebert. What config.json says and the classes do not do:
`layer_norm_eps` is not that of the norm of the embeddings nor of the one before the way out of the bottleneck
(`output.LayerNorm`), which have PyTorch's 1e-5; where bottlenecks are neither shared nor taken for attention,
queries and keys come from hidden_size channels and their layers are built for intra_bottleneck_size.

B batch, T tokens, E width of a word, D width between layers, W width inside a layer (D without bottlenecks),
V vocabulary, L labels, C choices. Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference import hf_blocks
from ckpt_tool.reference.hf_blocks import (
    Tensors,
    complete,
    layer_norm,
    linear,
    only,
    span_logits,
    split_heads,
    unseen,
    weigh,
    wide,
)
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes

CLASSES = (
    "Model ForPreTraining ForMaskedLM ForNextSentencePrediction ForSequenceClassification "
    "ForMultipleChoice ForTokenClassification ForQuestionAnswering"
)
ARCHITECTURES = tuple(f"MobileBert{name}" for name in CLASSES.split())

# What the class takes for keys that are absent.
ABSENT = {
    "hidden_size": 512,
    "hidden_act": "relu",
    "layer_norm_eps": 1e-12,
    "embedding_size": 128,
    "trigram_input": True,
    "use_bottleneck": True,
    "intra_bottleneck_size": 128,
    "use_bottleneck_attention": False,
    "key_query_shared_bottleneck": True,
    "num_feedforward_networks": 4,
    "normalization_type": "no_norm",
    "classifier_activation": True,
}
# No key of config.json: a comparison puts it in to see what the two norms do with the epsilon of the others.
INNER_EPS = "eps of torch.nn.LayerNorm"
EXTRA = "cls.predictions.dense.weight"  # (D - E, V), what the words are too narrow for
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    n_networks: int  # feed-forward networks of each layer
    function: str  # as config.json calls it
    layer_norms: bool  # else NoNorm
    eps: float
    inner_eps: float  # of the norms to which the library gives none
    trigram: bool
    bottleneck: bool
    into_attention: str  # what queries and keys, and values, are made of: "input", "shared", or neither
    widened: bool  # words go through a layer
    pooled: bool  # the first token goes through a layer
    tied: bool  # the embedding table is also part of the output layer
    factored: bool  # and has fewer columns than it
    architecture: str

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what the class does not compute."""
        config = complete(config, ("num_hidden_layers", "num_attention_heads"), ABSENT)
        only(config, {"normalization_type": ("no_norm", "layer_norm")})
        function, D, E = str(config["hidden_act"]), config["hidden_size"], config["embedding_size"]
        if function not in {**FUNCTIONS, **hf_blocks.ACTIVATIONS}:
            known = ", ".join({**FUNCTIONS, **hf_blocks.ACTIVATIONS})
            raise ValueError(f"expected `hidden_act` to be one of {known}, found {function}")
        if E > D:
            raise ValueError(f"expected `embedding_size` of at most {D}, as `hidden_size`, found {E}")
        into = _into_attention(config)
        if config["use_bottleneck"] and not into and config["intra_bottleneck_size"] != D:
            raise ValueError(
                "expected `use_bottleneck_attention` or `key_query_shared_bottleneck` in config.json, found "
                "neither: the class builds no other attention"
            )
        return cls(
            n_layers=int(config["num_hidden_layers"]),
            n_heads=int(config["num_attention_heads"]),
            n_networks=int(config["num_feedforward_networks"]),
            function=function,
            layer_norms=config["normalization_type"] == "layer_norm",
            eps=float(config["layer_norm_eps"]),
            inner_eps=float(config.get(INNER_EPS, 1e-5)),
            trigram=bool(config["trigram_input"]),
            bottleneck=bool(config["use_bottleneck"]),
            into_attention=into,
            widened=bool(config["trigram_input"]) or E != D,
            pooled=bool(config["classifier_activation"]),
            tied=bool(config.get("tie_word_embeddings", True)),
            factored=E < D,
            architecture=str((config.get("architectures") or [""])[0]),
        )

    @property
    def root(self) -> str:
        return "" if self.architecture == "MobileBertModel" else "mobilebert."


def _into_attention(config: Mapping[str, Any]) -> str:
    if not config["use_bottleneck"]:
        return ""
    if config["use_bottleneck_attention"]:
        return "input"
    return "shared" if config["key_query_shared_bottleneck"] else ""


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("token_types", "mask")


def unused(c: Config) -> tuple[str, ...]:
    """Parameters that the class makes whatever config.json says, and that no pass reads or that are empty."""
    turned = f"{c.root}embeddings.embedding_transformation."
    return (
        *(() if c.widened else (f"{turned}weight", f"{turned}bias")),
        *(() if c.factored else (EXTRA,)),
    )


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    """Without an LM head "head" is the last hidden state. Of choices it is the logits of one."""
    (w,), kind = ranks, c.architecture.removeprefix("MobileBertFor")
    lm = "cls.predictions.bias" in w
    heads: dict[str, Callable[..., Tensor]] = {"head": head if lm else last}
    if "cls.seq_relationship.weight" in w:
        heads["seq_relationship_logits"] = next_sentence
    if kind in ("SequenceClassification", "TokenClassification", "MultipleChoice"):
        of_tokens = kind == "TokenClassification"
        heads["logits"] = lambda x, ranks, c: classified(x if of_tokens else pool(x, ranks, c), ranks)
    if kind == "QuestionAnswering":
        heads["start_logits"] = lambda x, ranks, c: span_logits(x, ranks[0])[0]
        heads["end_logits"] = lambda x, ranks, c: span_logits(x, ranks[0])[1]
    if not lm and len(heads) == 1:
        heads["pooler_output"] = pool
    return decoder_phases(embed, layer, heads, ranks, c, inputs)


forward, encode = passes(phases)


def bent(x: Tensor, c: Config) -> Tensor:
    known = FUNCTIONS.get(c.function)
    return hf_blocks.activate(x, hf_blocks.ACTIVATIONS[c.function]) if known is None else known(x)


def norm(x: Tensor, w: Tensors, stem: str, c: Config, eps: float) -> Tensor:
    if c.layer_norms:
        return layer_norm(x, w, stem, eps)
    return x * w[stem + "weight"] + w[stem + "bias"]


def embed(ids: Tensor, ranks: Ranks, c: Config, *, token_types: Tensor | None = None) -> Tensor:
    x = embedded(ids, ranks, c, token_types)
    return norm(x, ranks[0], c.root + "embeddings.LayerNorm.", c, c.inner_eps)


def embedded(ids: Tensor, ranks: Ranks, c: Config, token_types: Tensor | None) -> Tensor:
    """Before the norm: (B, T, D)."""
    (w,), p = ranks, c.root + "embeddings."
    x = F.embedding(ids, w[p + "word_embeddings.weight"])  # (B, T, E)
    if c.trigram:
        following, before = F.pad(x[:, 1:], (0, 0, 0, 1)), F.pad(x[:, :-1], (0, 0, 1, 0))
        x = torch.cat((following, x, before), dim=2)
    if c.widened:
        x = linear(x, w, p + "embedding_transformation.")
    positions = torch.arange(ids.shape[1], device=ids.device)
    x = x + F.embedding(positions, w[p + "position_embeddings.weight"])
    segments = w[p + "token_type_embeddings.weight"]
    return x + (segments[0] if token_types is None else F.embedding(token_types, segments))


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    (w,), p = ranks, f"{c.root}encoder.layer.{i}."
    y, added = networks(x, i, ranks, c, mask)
    y = norm(added + y, w, p + "output.LayerNorm.", c, c.inner_eps)
    return way_out(y, x, w, p, c) if c.bottleneck else y


def networks(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What goes into the last feed-forward network of a layer, and what it gives."""
    (w,), p = ranks, f"{c.root}encoder.layer.{i}."
    residual = bottleneck(x, w, p + "bottleneck.input.", c) if c.bottleneck else x
    qk, v = x, x
    if c.into_attention == "shared":
        qk = bottleneck(x, w, p + "bottleneck.attention.", c)
    elif c.into_attention == "input":
        qk = v = residual
    y = self_attention(qk, v, w, p + "attention.self.", c, unseen(x, mask, causal=False))
    y = linear(y, w, p + "attention.output.dense.") + residual
    y = norm(y, w, p + "attention.output.LayerNorm.", c, c.eps)
    for j in range(c.n_networks - 1):
        q = f"{p}ffn.{j}."
        y = norm(feed_forward(y, w, q, c) + y, w, q + "output.LayerNorm.", c, c.eps)
    return y, feed_forward(y, w, p, c)


def bottleneck(x: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    """(B, T, D) -> (B, T, W)."""
    return norm(linear(x, w, p + "dense."), w, p + "LayerNorm.", c, c.eps)


def way_out(y: Tensor, x: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    """(B, T, W) -> (B, T, D), beside what the layer was given."""
    y = linear(y, w, p + "output.bottleneck.dense.") + x
    return norm(y, w, p + "output.bottleneck.LayerNorm.", c, c.eps)


def self_attention(qk: Tensor, v: Tensor, w: Tensors, p: str, c: Config, hidden: Tensor) -> Tensor:
    query, key = (split_heads(linear(qk, w, f"{p}{name}."), c.n_heads) for name in ("query", "key"))
    value = split_heads(linear(v, w, p + "value."), c.n_heads)
    return weigh(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, value, hidden)


def feed_forward(x: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    return linear(bent(linear(x, w, p + "intermediate.dense."), c), w, p + "output.dense.")


def last(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    return x


def pool(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Of the first token: (B, D), or (B, C, D)."""
    x = x[..., 0, :]
    return torch.tanh(linear(x, ranks[0], c.root + "pooler.dense.")) if c.pooled else x


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V). Only transformers 5 gives an output layer that is not tied a bias of its own; a
    file without one is meant to share the head's."""
    (w,), p = ranks, "cls.predictions."
    z = bent(linear(x, w, p + "transform.dense."), c)
    z = layer_norm(z, w, p + "transform.LayerNorm.", c.eps)
    own = "" if c.tied or p + "decoder.bias" not in w else "decoder."
    return wide(z @ output(w, c) + w[f"{p}{own}bias"])


def output(w: Tensors, c: Config) -> Tensor:
    """The output layer, (D, V): the words, and below them the others."""
    words = w[word_table(c)].T
    return torch.cat((words, w[EXTRA])) if c.factored else words


def word_table(c: Config) -> str:
    return f"{c.root}embeddings.word_embeddings.weight" if c.tied else "cls.predictions.decoder.weight"


def next_sentence(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, 2) of a continuation and of a random next sentence."""
    return wide(linear(pool(x, ranks, c), ranks[0], "cls.seq_relationship."))


def classified(y: Tensor, ranks: Ranks) -> Tensor:
    return wide(linear(y, ranks[0], "classifier."))


# What `encode` gives goes into each: (B, L) logits of a sequence or the values of a regression, (B, C) of
# choices, (B, T, L) of tokens.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": lambda x, ranks, c: (x, pool(x, ranks, c)),
    "masked_lm": head,
    "next_sentence_prediction": next_sentence,
    "pretraining": lambda x, ranks, c: (head(x, ranks, c), next_sentence(x, ranks, c)),
    "sequence_classification": lambda x, ranks, c: classified(pool(x, ranks, c), ranks),
    "multiple_choice": lambda x, ranks, c: classified(pool(x, ranks, c), ranks).squeeze(-1),
    "token_classification": lambda x, ranks, c: classified(x, ranks),
    "question_answering": lambda x, ranks, c: span_logits(x, ranks[0]),
}


# --- typical mistakes of converters -----------------------------------------------------------------------

Make = Callable[[Tensors], dict[str, Tensor]]


def mistakes(names: Collection[str], c: Config) -> dict[str, Make | tuple[Make, Make]]:
    """What goes wrong with these tensors, in words, as a function that makes the wrong ones out of the right
    ones; with a second one that takes it back where the first does not."""
    made: dict[str, Make | tuple[Make, Make]] = {}
    widen = f"{c.root}embeddings.embedding_transformation.weight"
    if c.trigram and widen in names:
        made["trigram: the word before first, the next one last"] = lambda w: {widen: _thirds_back(w[widen])}
    if c.factored and EXTRA in names:
        table = word_table(c)
        made["embedding factor: the words after the extra output weights"] = (
            lambda w: _refactored(w, table, w[EXTRA].shape[0]),
            lambda w: _refactored(w, table, w[table].shape[1]),
        )
    p = f"{c.root}encoder.layer."
    layers = sorted({int(n.removeprefix(p).split(".")[0]) for n in names if n.startswith(p)})
    roots = [f"{p}{i}." for i in layers]
    pairs = {
        "query and key exchanged": ("attention.self.query.", "attention.self.key."),
        "bottlenecks of input and attention exchanged": ("bottleneck.input.", "bottleneck.attention."),
    }
    for words, (one, other) in pairs.items():
        if there := [r for r in roots if any(n.startswith(r + other) for n in names)]:
            made[words] = _moved(names, [(r + one, r + other) for r in there])
    if c.n_networks > 1 and roots:
        rows = [[*(f"{r}ffn.{j}." for j in range(c.n_networks - 1)), r] for r in roots]
        made["feed-forward networks: the last one first"] = (
            _moved(names, rows, FEED_FORWARD),
            _moved(names, [row[::-1] for row in rows], FEED_FORWARD),
        )
    square = [f"{r}attention.{n}.weight" for r in roots for n in ("self.query", "self.key", "output.dense")]
    if square and all(n in names for n in square):
        made["kernels of attention not transposed"] = lambda w: {n: w[n].T.contiguous() for n in square}
    return made


# What a feed-forward network is made of; the last one of a layer is beside its bottlenecks.
FEED_FORWARD = ("intermediate.dense.", "output.dense.", "output.LayerNorm.")


def _moved(names: Collection[str], rows: Sequence[Sequence[str]], inside: Sequence[str] = ("",)) -> Make:
    """The tensors of each stem of a row under the names of the next one, those of the last under the first.
    ValueError where their shapes are not the same."""

    def make(w: Tensors) -> dict[str, Tensor]:
        found = {}
        for row in rows:
            for source, target in zip(row, [*row[1:], row[0]], strict=True):
                for name in [n for n in names if any(n.startswith(target + part) for part in inside)]:
                    taken = w[source + name.removeprefix(target)]
                    if taken.shape != w[name].shape:
                        raise ValueError(f"{name} and what would take its place differ in shape")
                    found[name] = taken
        return found

    return make


def _thirds_back(weight: Tensor) -> Tensor:
    return torch.cat(weight.chunk(3, dim=1)[::-1], dim=1)


def _refactored(w: Tensors, table: str, by: int) -> dict[str, Tensor]:
    """The two parts of the output layer after its rows (D, V) were moved on by as many, in a circle."""
    E = w[table].shape[1]
    whole = torch.cat([w[table].T, w[EXTRA]]).roll(by, 0)
    return {table: whole[:E].T.contiguous(), EXTRA: whole[E:].contiguous()}


def config_mistakes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values of config.json with which the tensors still fit, and give another model."""
    c, told = Config.from_hf(config), {**ABSENT, **config}
    inside = told["intra_bottleneck_size" if c.bottleneck else "hidden_size"]
    other, words = "layer_norm", "normalised where it is scaled and shifted alone"
    if c.layer_norms:
        other, words = "no_norm", "scaled and shifted alone where it is normalised"
    made: dict[str, dict[str, Any]] = {words: {"normalization_type": other}}
    if inside % (2 * c.n_heads) == 0:
        made["twice as many heads"] = {"num_attention_heads": 2 * c.n_heads}
    if c.n_networks > 1:
        made["a feed-forward network left out"] = {"num_feedforward_networks": c.n_networks - 1}
    if c.function in ("relu", "relu6"):
        made["gelu where it is relu"] = {"hidden_act": "gelu"}
    return made


# --- the epsilon that config.json cannot say --------------------------------------------------------------


def gap(x: Tensor, w: Tensors, stem: str, c: Config) -> Tensor:
    """How much more a norm gives with the epsilon of config.json than with the one the library gives it."""
    if not c.layer_norms:
        return torch.zeros_like(x)
    away, variance = x - x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return away * ((variance + c.eps).rsqrt() - (variance + c.inner_eps).rsqrt()) * w[stem + "weight"]


def embed_gap(ids: Tensor, ranks: Ranks, c: Config, *, token_types: Tensor | None = None) -> Tensor:
    """How far what `embed` gives moves with that epsilon, (B, T, D)."""
    x = embedded(ids, ranks, c, token_types)
    return gap(x, ranks[0], c.root + "embeddings.LayerNorm.", c).abs()


def layer_bound(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    """How far what a layer gives can move with that epsilon, (B, T, D). Without a bottleneck it is the gap
    of its last norm. The way out of one is a matrix, after which the gap has some length, and a layer norm,
    which is a contraction over its standard deviation s; that falls by at most length / sqrt(D)."""
    (w,), p = ranks, f"{c.root}encoder.layer.{i}."
    y, added = networks(x, i, ranks, c, mask)
    moved = gap(added + y, w, p + "output.LayerNorm.", c)
    if not c.bottleneck:
        return moved.abs()
    y = norm(added + y, w, p + "output.LayerNorm.", c, c.inner_eps)
    q = p + "output.bottleneck."
    length = torch.linalg.vector_norm(F.linear(moved, w[q + "dense.weight"]), dim=-1, keepdim=True)
    z = linear(y, w, q + "dense.") + x
    s = (z.var(-1, correction=0, keepdim=True) + c.eps).sqrt() - length / z.shape[-1] ** 0.5
    reach: Tensor = (length / s).where(s > 0, torch.inf) * w[q + "LayerNorm.weight"].abs()
    return reach


# By phase, "layer" for all of them: what a foretold difference may come to.
bounds: dict[str, Callable[..., Tensor]] = {"embed": embed_gap, "layer": layer_bound}
