"""OPT in the Hugging Face layout: `config.json` and tensors named `model.decoder.layers.{i}.`, or
`decoder.layers.{i}.` as in OPTModel and in some uploads of the whole.

Source: transformers 4.37.2 and 5.23.0, models/opt. Each head as its class computes it, without dropout.

B batch, T tokens, D model width, E width of a word, N heads, H head width, F feed-forward width,
V vocabulary, L labels. Linear weights are (out, in).
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
    Tensors,
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

ARCHITECTURES = ("OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering")
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # in config.json
DEFAULTS = {"activation_function": "relu", "do_layer_norm_before": True}  # of OPTConfig
ACTIVATIONS = {"relu": "relu", **GELUS}
OFFSET = 2  # of the rows in the table of positions


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    activation: str  # relu, or a form of gelu as torch calls it: "none" is erf, or "tanh"
    norm_first: bool  # before each branch, else after each sum
    final_norm: bool
    projected: bool  # words have a width of their own
    tied: bool  # the embedding table is also the output layer

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what this pass does not compute."""
        config = complete(config, REQUIRED, DEFAULTS)
        only(config, {"enable_bias": True, "layer_norm_elementwise_affine": True})
        first = bool(config["do_layer_norm_before"])
        words = config.get("word_embed_proj_dim") or config["hidden_size"]
        return cls(
            n_layers=int(config["num_hidden_layers"]),
            n_heads=int(config["num_attention_heads"]),
            activation=one_of(config, "activation_function", ACTIVATIONS),
            norm_first=first,
            # models that were converted without their final norm have this since 4.20
            final_norm=first and not config.get("_remove_final_layer_norm", False),
            projected=int(words) != int(config["hidden_size"]),
            tied=bool(config.get("tie_word_embeddings", True)),
        )


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


forward, encode = passes(phases)


def embed(ids: Tensor, ranks: Ranks, c: Config, *, mask: Tensor | None = None) -> Tensor:
    """Positions count the tokens from 0 on, and are -1 for padding."""
    w, p = decoder(ranks)
    x = F.embedding(ids, w[p + "embed_tokens.weight"])
    if c.projected:
        x = F.linear(x, w[p + "project_in.weight"])
    mask = torch.ones_like(ids) if mask is None else mask.long()
    positions = torch.cumsum(mask, dim=1) * mask - 1
    return x + F.embedding(positions + OFFSET, w[p + "embed_positions.weight"])


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    w, p = decoder(ranks)
    p += f"layers.{i}."
    if c.norm_first:
        x = x + attention(norm(x, w, p + "self_attn_layer_norm."), w, p + "self_attn.", c, mask)
        return x + feed_forward(norm(x, w, p + "final_layer_norm."), w, p, c)
    x = norm(x + attention(x, w, p + "self_attn.", c, mask), w, p + "self_attn_layer_norm.")
    return norm(x + feed_forward(x, w, p, c), w, p + "final_layer_norm.")


def finish(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """What the decoder gives for the last layer's output: (B, T, E)."""
    w, p = decoder(ranks)
    if c.final_norm:
        x = norm(x, w, p + "final_layer_norm.")
    return F.linear(x, w[p + "project_out.weight"]) if c.projected else x


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    w, p = decoder(ranks)
    return wide(F.linear(finish(x, ranks, c), w[p + "embed_tokens.weight" if c.tied else "lm_head.weight"]))


# What `encode` gives goes into each. Logits of a sequence's classes are (B, T, L), of every position.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": finish,
    "causal_lm": head,
    "sequence_classification": lambda x, ranks, c: wide(
        linear(finish(x, ranks, c), ranks[0], "score.", bias=False)
    ),
    "question_answering": lambda x, ranks, c: span_logits(finish(x, ranks, c), ranks[0]),
}


def decoder(ranks: Ranks) -> tuple[Tensors, str]:
    """The tensors, and what the names of the decoder's begin with."""
    (w,) = ranks
    return w, "model.decoder." if "model.decoder.embed_tokens.weight" in w else "decoder."


def attention(x: Tensor, w: Tensors, p: str, c: Config, mask: Tensor | None) -> Tensor:
    q, k, v = (split_heads(linear(x, w, f"{p}{name}_proj."), c.n_heads) for name in "qkv")  # (B, N, T, H)
    scores = wide(q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    return linear(weigh(scores, v, unseen(x, mask)), w, p + "out_proj.")


def feed_forward(x: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    y = linear(x, w, p + "fc1.")
    y = F.relu(y) if c.activation == "relu" else F.gelu(y, approximate=c.activation)
    return linear(y, w, p + "fc2.")


def norm(x: Tensor, w: Tensors, stem: str) -> Tensor:
    return layer_norm(x, w, stem, 1e-5)
