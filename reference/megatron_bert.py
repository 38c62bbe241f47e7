"""BERT as Megatron-LM trains it, in the tensors of its own checkpoints, with all heads that transformers has.

Source: Devlin et al. 2018; Shoeybi et al. 2019 (arXiv 1909.08053), whose order of norms this is: one before
each branch and one at the end, none after the embeddings; NVIDIA/Megatron-LM v1.0 to core_v0.9.0. Names,
versions and the rules for gelu are those of `ckpt_tool.reference.megatron`. The tensor-parallel ranks stay
apart as they do there: each computes its own heads, hidden units and words, and the partial results are added
or joined. Norms, positions, token types, the biases after a sum, the pooler and what follows it are on every
rank.

MegatronBert's config.json cannot say `apply_residual_connection_post_layernorm`, grouped queries, a head
width that is not D/N, nor two gelus: it has one `hidden_act` for feed-forward and LM head, while Megatron
with its default flags since 2021 has tanh in the one and erf in the other (at most 4.8e-4 apart).

Padding: a pair of tokens sees each other if neither is padding, so a padded query sees all keys alike where
transformers lets it see the real ones. Only the loss of question answering looks at padded positions, as its
softmax is over all; elsewhere compare real ones.

B batch, T tokens, D model width, N query heads, G groups of heads (N unless queries are grouped), H head
width, F feed-forward width, V vocabulary, S ranks, L labels, C choices. Linear weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference import megatron
from ckpt_tool.reference.megatron import VERSION_0, VERSION_1

MASKED = -10000.0  # Megatron's score of a key that is not to be seen
Ranks = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Config(megatron.Config):
    @classmethod
    def from_original(
        cls,
        params: Mapping[str, Any],
        shapes: megatron.Shapes,
        ranks: int,
        overrides: Mapping[str, Any],
    ) -> Self:
        """`params` are the pickled args as plain values and `checkpoint_version`, each absent where the file
        has none; `shapes` those of rank 0, stages joined; `overrides` facts from the user under their Hugging
        Face names, which win. `vocab_size` there is the number of words that count, by default all rows;
        `is_decoder` hides what comes after a token; `hidden_act` is both gelus. Without args: epsilon 1e-5;
        both gelus erf for version 0, which the file cannot tell and transformers assumes. ValueError for what
        none of them tells, where they disagree, and for what this pass does not compute."""
        causal = bool(overrides.get("is_decoder", False))
        return cls.read(params, shapes, ranks, overrides, causal=causal, gelu_of_version_0="erf")


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
    """Each rank holds V/S whole words."""
    parts, first = [], 0
    for w in ranks:
        table = w[c.names.word + "weight"]  # (V/S, D)
        own = (first <= ids) & (ids < first + len(table))
        parts.append(torch.where(own[..., None], table[torch.where(own, ids - first, 0)], 0))
        first += len(table)
    positions = torch.arange(ids.shape[1], device=ids.device)
    x = all_reduce(parts) + ranks[0][c.names.position + "weight"][positions]
    if c.names.tokentype:
        types = torch.zeros_like(ids) if token_types is None else token_types
        x = x + ranks[0][c.names.tokentype + "weight"][types]
    elif token_types is not None:
        raise ValueError("expected no token types, as the checkpoint has no table of them, found some")
    return x


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    """Each rank normalises with its own copy of the norm weights, as it does in the original."""
    p, n, S = f"{c.names.block}{i}.", c.names, len(ranks)
    seen = visible(x, c, mask)
    y = [layer_norm(x, w, p + n.norm_1, c) for w in ranks]
    heads = all_reduce(attention(z, w, p, i, c, S, seen) for z, w in zip(y, ranks, strict=True))
    x = (y[0] if c.residual_of_norm else x) + heads + ranks[0][p + n.dense + "bias"]
    y = [layer_norm(x, w, p + n.norm_2, c) for w in ranks]
    units = all_reduce(feed_forward(z, w, p, c) for z, w in zip(y, ranks, strict=True))
    return (y[0] if c.residual_of_norm else x) + units + ranks[0][p + n.fc2 + "bias"]


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V) of the last layer's output."""
    return lm_logits(layer_norm(x, ranks[0], c.names.final_norm, c), ranks, c)


def lm_logits(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The output layer is the word table: the copy of the last stage where there is one."""
    n, parts = c.names, []
    for w in ranks:
        z = layer_norm(gelu(linear(y, w, n.lm_dense), c.head_gelu), w, n.lm_norm, c)
        parts.append(z @ w[(n.head_word or n.word) + "weight"].T + w[n.lm_bias + "bias"])
    return wide(torch.cat(parts, dim=-1))[..., : c.n_words]


def pool(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Of the first token: (B, D), or (B, C, D)."""
    return torch.tanh(linear(y[..., 0, :], ranks[0], c.names.pooler))


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
    return layer_norm(x, ranks[0], c.names.final_norm, c).view(*ids.shape, -1)


def base_model(y: Tensor, ranks: Ranks, c: Config) -> tuple[Tensor, Tensor]:
    """The sequence itself, and its first token pooled (B, D)."""
    return y, pool(y, ranks, c)


def pretraining(y: Tensor, ranks: Ranks, c: Config) -> tuple[Tensor, Tensor]:
    """LM logits (B, T, V) and next sentence logits (B, 2)."""
    return lm_logits(y, ranks, c), next_sentence(y, ranks, c)


def next_sentence(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, 2): the segments are in order, or they are not (Megatron swaps the two it is trained on;
    transformers speaks of a random second one)."""
    return wide(linear(pool(y, ranks, c), ranks[0], c.names.binary))


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
    return ("token_types", "mask") if c.names.tokentype else ("mask",)


def heads(ranks: Ranks, c: Config) -> dict[str, Callable[[Tensor, Ranks, Config], Tensor]]:
    return {"seq_relationship_logits": binary_head} if c.names.binary + "weight" in ranks[0] else {}


def binary_head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Next sentence logits (B, 2) of the last layer's output."""
    return next_sentence(layer_norm(x, ranks[0], c.names.final_norm, c), ranks, c)


def visible(x: Tensor, c: Config, mask: Tensor | None) -> Tensor:
    """Which keys (last axis) a query (the axis before) sees: (B or 1, 1, T, T)."""
    T = x.shape[1]
    seen = torch.ones(1, 1, T, T, dtype=torch.bool, device=x.device)
    seen = seen.tril() if c.causal else seen
    return seen if mask is None else seen & (mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :])


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, i: int, c: Config, S: int, seen: Tensor) -> Tensor:
    """The part of the sum over heads that this rank's heads contribute: (B, T, D)."""
    B, T, _ = x.shape
    q, k, v = split_qkv(linear(x, w, p + c.names.qkv), c, S)  # (B, T, N/S, H)
    number = i + 1 if c.layer_scaling else 1
    scores = torch.einsum("bqnh,bknh->bnqk", q / (math.sqrt(c.head_dim) * number), k)
    weights = (wide(scores) * number).masked_fill(~seen, MASKED).softmax(-1).to(x.dtype)
    heads = torch.einsum("bnqk,bknh->bqnh", weights, v)
    return heads.reshape(B, T, -1) @ w[p + c.names.dense + "weight"].T


def split_qkv(x: Tensor, c: Config, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of each head of a rank, (B, T, N/S, H) each, out of (B, T, (N + 2G)/S * H)."""
    B, T, _ = x.shape
    N, G, H = c.n_heads // S, c.n_groups // S, c.head_dim
    if c.qkv == VERSION_0:
        q, k, v = x.view(B, T, 3, N, H).unbind(2)
        return q, k, v
    if c.qkv == VERSION_1:
        q, k, v = x.view(B, T, N, H, 3).unbind(4)
        return q, k, v
    M = N // G  # queries of a group, followed by its key and its value
    groups = x.view(B, T, G, M + 2, H)
    q, k, v = groups[..., :M, :], groups[..., M, :], groups[..., M + 1, :]
    return q.reshape(B, T, N, H), k.repeat_interleave(M, dim=2), v.repeat_interleave(M, dim=2)


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    """The part of the sum over hidden units that this rank's F/S units contribute: (B, T, D)."""
    return gelu(linear(x, w, p + c.names.fc1), c.mlp_gelu) @ w[p + c.names.fc2 + "weight"].T


def linear(x: Tensor, w: Mapping[str, Tensor], stem: str) -> Tensor:
    return x @ w[stem + "weight"].T + w[stem + "bias"]


def layer_norm(x: Tensor, w: Mapping[str, Tensor], stem: str, c: Config) -> Tensor:
    y, gamma = wide(x), wide(w[stem + "weight"])
    y = y - y.mean(-1, keepdim=True)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + c.norm_eps)
    gamma = gamma + 1 if c.norm_from_zero else gamma
    return (y * gamma + w[stem + "bias"]).to(x.dtype)


def gelu(x: Tensor, variant: str) -> Tensor:
    y = wide(x)
    if variant == "erf":
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    else:
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * y * (1 + 0.044715 * y * y)))
    return y.to(x.dtype)


def all_reduce(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
