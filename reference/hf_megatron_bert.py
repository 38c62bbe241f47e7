"""MegatronBert in the Hugging Face layout: `config.json` and tensors named `bert.encoder.layer.{i}.`, without
`bert.` for MegatronBertModel.

Source: transformers 4.37.2 and 5.23.0, models/megatron_bert. Each head as its class computes it, without
dropout. Cross attention is not read.

B batch, T tokens, D model width, N heads, H head width, F feed-forward width, V vocabulary, L labels,
C choices. Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

REQUIRED = ("num_hidden_layers", "num_attention_heads")  # in config.json
DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}  # of MegatronBertConfig
GELUS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
Ranks = Sequence[Mapping[str, Tensor]]


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
        config = {**DEFAULTS, **config}
        if missing := [name for name in (*REQUIRED, *DEFAULTS) if config.get(name) is None]:
            raise ValueError(f"expected {', '.join(missing)} in config.json, found none")
        for name, wanted in (("position_embedding_type", "absolute"), ("add_cross_attention", False)):
            if config.get(name, wanted) != wanted:
                raise ValueError(f"expected `{name}` {wanted} in config.json, found {config[name]}")
        if config["hidden_act"] not in GELUS:
            raise ValueError(
                f"expected `hidden_act` to be one of {', '.join(GELUS)}, found {config['hidden_act']}"
            )
        return cls(
            n_layers=int(config["num_hidden_layers"]),
            n_heads=int(config["num_attention_heads"]),
            norm_eps=float(config["layer_norm_eps"]),
            gelu=GELUS[config["hidden_act"]],
            causal=bool(config.get("is_decoder", False)),
            tied=bool(config.get("tie_word_embeddings", True)),
            prefix="" if config.get("architectures") == ["MegatronBertModel"] else "bert.",
        )


def forward(
    ids: Tensor,
    ranks: Ranks,
    c: Config,
    *,
    token_types: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Logits (B, T, V) of the LM head. `token_types` (B, T) are 0 by default; `mask` (B, T) is 1 for tokens
    and 0 for padding, by default there is none."""
    return lm_logits(encode(ids, ranks, c, token_types=token_types, mask=mask), ranks, c)


def embed(ids: Tensor, ranks: Ranks, c: Config, *, token_types: Tensor | None = None) -> Tensor:
    (w,), p = ranks, c.prefix + "embeddings."
    types = torch.zeros_like(ids) if token_types is None else token_types
    positions = torch.arange(ids.shape[1], device=ids.device)
    x = w[p + "word_embeddings.weight"][ids] + w[p + "token_type_embeddings.weight"][types]
    return x + w[p + "position_embeddings.weight"][positions]


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    (w,), p = ranks, f"{c.prefix}encoder.layer.{i}."
    heads = attention(layer_norm(x, w, p + "attention.ln.", c), w, p + "attention.self.", c, mask)
    x = x + linear(heads, w, p + "attention.output.dense.")
    units = linear(layer_norm(x, w, p + "ln.", c), w, p + "intermediate.dense.")
    return x + linear(F.gelu(units, approximate=c.gelu), w, p + "output.dense.")


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V) of the last layer's output."""
    return lm_logits(layer_norm(x, ranks[0], c.prefix + "encoder.ln.", c), ranks, c)


def lm_logits(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """An untied output layer has a bias of its own, as transformers 5 has it; a file without one is meant to
    share the head's."""
    (w,), p = ranks, "cls.predictions."
    z = F.gelu(linear(y, w, p + "transform.dense."), approximate=c.gelu)
    z = layer_norm(z, w, p + "transform.LayerNorm.", c)
    if c.tied:
        output, bias = w[c.prefix + "embeddings.word_embeddings.weight"], w[p + "bias"]
    else:
        own = p + "decoder.bias"
        output, bias = w[p + "decoder.weight"], w[own if own in w else p + "bias"]
    return wide(z @ output.T + bias)


def encode(
    ids: Tensor,
    ranks: Ranks,
    c: Config,
    *,
    token_types: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The normalised sequence (B, T, D), which every head starts from. For multiple choice `ids`,
    `token_types` and `mask` are (B, C, T), and the sequence is (B, C, T, D)."""
    types, kept = (None if t is None else t.flatten(0, -2) for t in (token_types, mask))
    x = embed(ids.flatten(0, -2), ranks, c, token_types=types)
    for i in range(c.n_layers):
        x = layer(x, i, ranks, c, kept)
    return layer_norm(x, ranks[0], c.prefix + "encoder.ln.", c).view(*ids.shape, -1)


def pool(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Of the first token: (B, D), or (B, C, D)."""
    return torch.tanh(linear(y[..., 0, :], ranks[0], c.prefix + "pooler.dense."))


def base_model(y: Tensor, ranks: Ranks, c: Config) -> tuple[Tensor, Tensor]:
    """The sequence itself, and its first token pooled (B, D)."""
    return y, pool(y, ranks, c)


def pretraining(y: Tensor, ranks: Ranks, c: Config) -> tuple[Tensor, Tensor]:
    """LM logits (B, T, V) and next sentence logits (B, 2)."""
    return lm_logits(y, ranks, c), next_sentence(y, ranks, c)


def next_sentence(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, 2) of a continuation and of a random next sentence."""
    return wide(linear(pool(y, ranks, c), ranks[0], "cls.seq_relationship."))


def sequence_classification(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, L), or the L values of a regression."""
    return wide(linear(pool(y, ranks, c), ranks[0], "classifier."))


def multiple_choice(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, C) of y (B, C, T, D)."""
    return wide(linear(pool(y, ranks, c), ranks[0], "classifier.")).squeeze(-1)


def token_classification(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, T, L)."""
    return wide(linear(y, ranks[0], "classifier."))


def question_answering(y: Tensor, ranks: Ranks, c: Config) -> tuple[Tensor, Tensor]:
    """Logits of the first and of the last token of the answer, (B, T) each."""
    first, last = wide(linear(y, ranks[0], "qa_outputs.")).unbind(-1)
    return first, last


# What `encode` gives goes into each. The causal one wants `c.causal`.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": base_model,
    "masked_lm": lm_logits,
    "causal_lm": lm_logits,
    "next_sentence_prediction": next_sentence,
    "pretraining": pretraining,
    "sequence_classification": sequence_classification,
    "multiple_choice": multiple_choice,
    "token_classification": token_classification,
    "question_answering": question_answering,
}


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("token_types", "mask")


def heads(ranks: Ranks, c: Config) -> dict[str, Callable[[Tensor, Ranks, Config], Tensor]]:
    return {"seq_relationship_logits": binary_head} if "cls.seq_relationship.weight" in ranks[0] else {}


def binary_head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Next sentence logits (B, 2) of the last layer's output."""
    return next_sentence(layer_norm(x, ranks[0], c.prefix + "encoder.ln.", c), ranks, c)


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config, mask: Tensor | None) -> Tensor:
    """The heads side by side: (B, T, D)."""
    B, T, D = x.shape
    q, k, v = (
        linear(x, w, p + name).view(B, T, c.n_heads, -1).transpose(1, 2)  # (B, N, T, H)
        for name in ("query.", "key.", "value.")
    )
    scores = wide(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5)
    hidden = torch.zeros(1, 1, T, T, dtype=torch.bool, device=x.device)
    if c.causal:
        hidden = ~torch.ones_like(hidden).tril()
    if mask is not None:
        hidden = hidden | (mask == 0)[:, None, None, :]
    weights = scores.masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1).to(x.dtype)
    return (weights @ v).transpose(1, 2).reshape(B, T, D)


def linear(x: Tensor, w: Mapping[str, Tensor], stem: str) -> Tensor:
    return F.linear(x, w[stem + "weight"], w[stem + "bias"])


def layer_norm(x: Tensor, w: Mapping[str, Tensor], stem: str, c: Config) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[stem + "weight"], w[stem + "bias"], c.norm_eps)


# The two forms of gelu are nowhere further apart than 4.7324e-4, which they are at -2.699 and 2.699.
GELU_GAP = 4.74e-4


def gelu_bound(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """How far the logits (B, T, V) of `head` can move when its gelu takes the other form, each of them.

    What leaves the gelu moves by at most GELU_GAP in each of D channels, so by GELU_GAP sqrt(D) in length.
    The layer norm subtracts the mean and divides by s = sqrt(variance + eps), which moves by at most GELU_GAP
    on the way; its derivative is a contraction over s. A logit is the product with a row of the output layer,
    so by Cauchy-Schwarz it moves by at most the length of gamma times that row, times that of the move."""
    (w,), p = ranks, "cls.predictions."
    y = layer_norm(x, w, c.prefix + "encoder.ln.", c)
    z = wide(F.gelu(linear(y, w, p + "transform.dense."), approximate=c.gelu))
    s = (z.var(-1, correction=0, keepdim=True) + c.norm_eps).sqrt() - GELU_GAP
    moved = (GELU_GAP * z.shape[-1] ** 0.5 / s).where(s > 0, torch.inf)  # (B, T, 1)
    table = c.prefix + "embeddings.word_embeddings.weight" if c.tied else p + "decoder.weight"
    reach = torch.linalg.vector_norm(wide(w[table] * w[p + "transform.LayerNorm.weight"]), dim=-1)  # (V,)
    return moved * reach


# By phase: what a difference in the value of config.json that the phase shares with others may come to.
bounds: dict[str, Callable[[Tensor, Ranks, Config], Tensor]] = {"head": gelu_bound}


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
