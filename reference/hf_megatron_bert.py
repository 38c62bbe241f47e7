"""MegatronBert in the Hugging Face layout: `config.json` and tensors named `bert.encoder.layer.{i}.`, without
`bert.` for MegatronBertModel.

Source: transformers 4.37.2 and 5.23.0, models/megatron_bert. Each head as its class computes it, without
dropout. Cross attention is not read.

B batch, T tokens, D model width, N heads, H head width, V vocabulary, L labels, C choices. Linear weights are
(out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference.hf_blocks import (
    GELUS,
    complete,
    layer_norm,
    linear,
    one_of,
    only,
    span_logits,
    split_heads,
    unseen,
    weigh,
    wide,
)
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes

ARCHITECTURES = (
    "MegatronBertModel",
    "MegatronBertForPreTraining",
    "MegatronBertForMaskedLM",
    "MegatronBertForCausalLM",
    "MegatronBertForNextSentencePrediction",
    "MegatronBertForSequenceClassification",
    "MegatronBertForMultipleChoice",
    "MegatronBertForTokenClassification",
    "MegatronBertForQuestionAnswering",
)
REQUIRED = ("num_hidden_layers", "num_attention_heads")  # in config.json
DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}  # of MegatronBertConfig


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    norm_eps: float
    gelu: str  # as torch calls it: "none" is erf, or "tanh"
    causal: bool
    tied: bool  # the embedding table is also the output layer
    prefix: str  # of all but the heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what this pass does not compute."""
        config = complete(config, REQUIRED, DEFAULTS)
        only(config, {"position_embedding_type": "absolute", "add_cross_attention": False})
        return cls(
            n_layers=int(config["num_hidden_layers"]),
            n_heads=int(config["num_attention_heads"]),
            norm_eps=float(config["layer_norm_eps"]),
            gelu=one_of(config, "hidden_act", GELUS),
            causal=bool(config.get("is_decoder", False)),
            tied=bool(config.get("tie_word_embeddings", True)),
            prefix="" if config.get("architectures") == ["MegatronBertModel"] else "bert.",
        )


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("token_types", "mask")


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    heads = {"head": head}
    if "cls.seq_relationship.weight" in ranks[0]:
        heads["seq_relationship_logits"] = next_sentence
    return decoder_phases(embed, layer, heads, ranks, c, inputs)


forward, encode = passes(phases)


def embed(ids: Tensor, ranks: Ranks, c: Config, *, token_types: Tensor | None = None) -> Tensor:
    (w,), p = ranks, c.prefix + "embeddings."
    types = torch.zeros_like(ids) if token_types is None else token_types
    positions = torch.arange(ids.shape[1], device=ids.device)
    x = w[p + "word_embeddings.weight"][ids] + w[p + "token_type_embeddings.weight"][types]
    return x + w[p + "position_embeddings.weight"][positions]


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    (w,), p = ranks, f"{c.prefix}encoder.layer.{i}."
    y = layer_norm(x, w, p + "attention.ln.", c.norm_eps)
    q, k, v = (
        split_heads(linear(y, w, f"{p}attention.self.{name}."), c.n_heads)  # (B, N, T, H)
        for name in ("query", "key", "value")
    )
    scores = wide(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5)
    x = x + linear(weigh(scores, v, unseen(x, mask, c.causal)), w, p + "attention.output.dense.")
    units = linear(layer_norm(x, w, p + "ln.", c.norm_eps), w, p + "intermediate.dense.")
    return x + linear(F.gelu(units, approximate=c.gelu), w, p + "output.dense.")


def sequence(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Normalised: (B, T, D), or (B, C, T, D)."""
    return layer_norm(x, ranks[0], c.prefix + "encoder.ln.", c.norm_eps)


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V). An untied output layer has a bias of its own, as transformers 5 has it; a file
    without one is meant to share the head's."""
    (w,), p = ranks, "cls.predictions."
    z = F.gelu(linear(sequence(x, ranks, c), w, p + "transform.dense."), approximate=c.gelu)
    z = layer_norm(z, w, p + "transform.LayerNorm.", c.norm_eps)
    own = "" if c.tied or p + "decoder.bias" not in w else "decoder."
    return wide(z @ w[output(c)].T + w[f"{p}{own}bias"])


def output(c: Config) -> str:
    return c.prefix + "embeddings.word_embeddings.weight" if c.tied else "cls.predictions.decoder.weight"


def pool(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Of the first token: (B, D), or (B, C, D)."""
    return torch.tanh(linear(sequence(x, ranks, c)[..., 0, :], ranks[0], c.prefix + "pooler.dense."))


def next_sentence(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, 2) of a continuation and of a random next sentence."""
    return wide(linear(pool(x, ranks, c), ranks[0], "cls.seq_relationship."))


def classified(y: Tensor, ranks: Ranks) -> Tensor:
    return wide(linear(y, ranks[0], "classifier."))


# What `encode` gives goes into each: (B, L) logits of a sequence or the values of a regression, (B, C) of
# choices, (B, T, L) of tokens. The causal one wants `c.causal`.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": lambda x, ranks, c: (sequence(x, ranks, c), pool(x, ranks, c)),
    "masked_lm": head,
    "causal_lm": head,
    "next_sentence_prediction": next_sentence,
    "pretraining": lambda x, ranks, c: (head(x, ranks, c), next_sentence(x, ranks, c)),
    "sequence_classification": lambda x, ranks, c: classified(pool(x, ranks, c), ranks),
    "multiple_choice": lambda x, ranks, c: classified(pool(x, ranks, c), ranks).squeeze(-1),
    "token_classification": lambda x, ranks, c: classified(sequence(x, ranks, c), ranks),
    "question_answering": lambda x, ranks, c: span_logits(sequence(x, ranks, c), ranks[0]),
}


# The two forms of gelu are nowhere further apart than 4.7324e-4, which they are at -2.699 and 2.699.
GELU_GAP = 4.74e-4


def gelu_bound(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """How far the logits (B, T, V) of `head` can move when its gelu takes the other form, each of them.

    What leaves the gelu moves by at most GELU_GAP in each of D channels, so by GELU_GAP sqrt(D) in length.
    The layer norm subtracts the mean and divides by s = sqrt(variance + eps), which moves by at most GELU_GAP
    on the way; its derivative is a contraction over s. A logit is the product with a row of the output layer,
    so by Cauchy-Schwarz it moves by at most the length of gamma times that row, times that of the move."""
    (w,), p = ranks, "cls.predictions."
    z = wide(F.gelu(linear(sequence(x, ranks, c), w, p + "transform.dense."), approximate=c.gelu))
    s = (z.var(-1, correction=0, keepdim=True) + c.norm_eps).sqrt() - GELU_GAP
    moved = (GELU_GAP * z.shape[-1] ** 0.5 / s).where(s > 0, torch.inf)  # (B, T, 1)
    rows = wide(w[output(c)] * w[p + "transform.LayerNorm.weight"])  # (V, D)
    reach: Tensor = moved * torch.linalg.vector_norm(rows, dim=-1)
    return reach


# By phase: what a difference in the value of config.json that the phase shares with others may come to.
bounds: dict[str, Callable[[Tensor, Ranks, Config], Tensor]] = {"head": gelu_bound}
