"""OPT in the Hugging Face layout: `config.json` and tensors named `model.decoder.layers.{i}.`, or
`decoder.layers.{i}.` as in OPTModel and in some uploads of the whole.

Source: transformers 4.37.2 and 5.23.0, models/opt. Each head as its class computes it, without dropout.

B batch, T tokens, D model width, E width of a word, N heads, H head width, F feed-forward width,
V vocabulary, L labels. Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # in config.json
DEFAULTS = {"activation_function": "relu", "do_layer_norm_before": True}  # of OPTConfig
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
OFFSET = 2  # of the rows in the table of positions
Ranks = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    activation: str  # one of ACTIVATIONS
    norm_first: bool  # before each branch, else after each sum
    final_norm: bool
    projected: bool  # words have a width of their own
    tied: bool  # the embedding table is also the output layer

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what this pass does not compute."""
        config = {**DEFAULTS, **config}
        if missing := [name for name in (*REQUIRED, *DEFAULTS) if config.get(name) is None]:
            raise ValueError(f"expected {', '.join(missing)} in config.json, found none")
        for name, wanted in (("enable_bias", True), ("layer_norm_elementwise_affine", True)):
            if config.get(name, wanted) != wanted:
                raise ValueError(f"expected `{name}` {wanted} in config.json, found {config[name]}")
        if (activation := config["activation_function"]) not in ACTIVATIONS:
            raise ValueError(
                f"expected `activation_function` to be one of {', '.join(ACTIVATIONS)}, found {activation}"
            )
        first = bool(config["do_layer_norm_before"])
        words = config.get("word_embed_proj_dim") or config["hidden_size"]
        return cls(
            n_layers=int(config["num_hidden_layers"]),
            n_heads=int(config["num_attention_heads"]),
            activation=activation,
            norm_first=first,
            # models that were converted without their final norm have this since 4.20
            final_norm=first and not config.get("_remove_final_layer_norm", False),
            projected=int(words) != int(config["hidden_size"]),
            tied=bool(config.get("tie_word_embeddings", True)),
        )


def forward(ids: Tensor, ranks: Ranks, c: Config, *, mask: Tensor | None = None) -> Tensor:
    """Logits (B, T, V). `mask` (B, T) is 1 for tokens and 0 for padding, by default there is none."""
    return lm_logits(encode(ids, ranks, c, mask=mask), ranks, c)


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
        x = x + attention(layer_norm(x, w, p + "self_attn_layer_norm."), w, p + "self_attn.", c, mask)
        return x + feed_forward(layer_norm(x, w, p + "final_layer_norm."), w, p, c)
    x = layer_norm(x + attention(x, w, p + "self_attn.", c, mask), w, p + "self_attn_layer_norm.")
    return layer_norm(x + feed_forward(x, w, p, c), w, p + "final_layer_norm.")


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V) of the last layer's output."""
    return lm_logits(finish(x, ranks, c), ranks, c)


def finish(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """What the decoder gives for the last layer's output: (B, T, E)."""
    w, p = decoder(ranks)
    if c.final_norm:
        x = layer_norm(x, w, p + "final_layer_norm.")
    return F.linear(x, w[p + "project_out.weight"]) if c.projected else x


def encode(ids: Tensor, ranks: Ranks, c: Config, *, mask: Tensor | None = None) -> Tensor:
    """The decoder's output (B, T, E), which every head starts from."""
    x = embed(ids, ranks, c, mask=mask)
    for i in range(c.n_layers):
        x = layer(x, i, ranks, c, mask)
    return finish(x, ranks, c)


def base_model(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The sequence itself."""
    return y


def lm_logits(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    w, p = decoder(ranks)
    return wide(F.linear(y, w[p + "embed_tokens.weight" if c.tied else "lm_head.weight"]))


def sequence_classification(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, T, L) of every position, of which the class gives those `of_last_token`."""
    return wide(F.linear(y, ranks[0]["score.weight"]))


def of_last_token(logits: Tensor, ids: Tensor, pad: int | None) -> Tensor:
    """(B, L) of the last id of each row that is not `pad`; of the last one where there is no id for padding.
    transformers 4.37.2 looks for the first padding instead, which is the same but for padding on the left."""
    places = torch.arange(ids.shape[1], device=ids.device)
    last = places[-1:].expand(len(ids)) if pad is None else (places * (ids != pad)).argmax(-1)
    return logits[torch.arange(len(ids), device=ids.device), last]


def question_answering(y: Tensor, ranks: Ranks, c: Config) -> tuple[Tensor, Tensor]:
    """Logits of the first and of the last token of the answer, (B, T) each."""
    first, last = wide(linear(y, ranks[0], "qa_outputs.")).unbind(-1)
    return first, last


# What `encode` gives goes into each.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": base_model,
    "causal_lm": lm_logits,
    "sequence_classification": sequence_classification,
    "question_answering": question_answering,
}


def decoder(ranks: Ranks) -> tuple[Mapping[str, Tensor], str]:
    """The tensors, and what the names of the decoder's begin with."""
    (w,) = ranks
    return w, "model.decoder." if "model.decoder.embed_tokens.weight" in w else "decoder."


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config, mask: Tensor | None) -> Tensor:
    B, T, D = x.shape
    q, k, v = (
        linear(x, w, f"{p}{name}_proj.").view(B, T, c.n_heads, -1).transpose(1, 2)  # (B, N, T, H)
        for name in "qkv"
    )
    scores = wide(q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    hidden = torch.ones(1, 1, T, T, dtype=torch.bool, device=x.device).triu(1)
    if mask is not None:
        hidden = hidden | (mask == 0)[:, None, None, :]
    weights = scores.masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1).to(x.dtype)
    return linear((weights @ v).transpose(1, 2).reshape(B, T, D), w, p + "out_proj.")


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    return linear(ACTIVATIONS[c.activation](linear(x, w, p + "fc1.")), w, p + "fc2.")


def linear(x: Tensor, w: Mapping[str, Tensor], stem: str) -> Tensor:
    return F.linear(x, w[stem + "weight"], w[stem + "bias"])


def layer_norm(x: Tensor, w: Mapping[str, Tensor], stem: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[stem + "weight"], w[stem + "bias"], 1e-5)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
