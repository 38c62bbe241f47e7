"""BERT as Megatron-LM trains it, in the tensors of its own checkpoints, with all heads that transformers has.

Source: Devlin et al. 2018; else that of `ckpt_tool.reference.megatron_layers`. Names, versions and the rules
for gelu are those of `ckpt_tool.reference.megatron`.

MegatronBert's config.json cannot say `apply_residual_connection_post_layernorm`, grouped queries, a head
width that is not D/N, nor two gelus: it has one `hidden_act` for feed-forward and LM head, while Megatron
with its default flags since 2021 has tanh in the one and erf in the other (at most 4.8e-4 apart).

Padding: a pair of tokens sees each other if neither is padding, so a padded query sees all keys alike where
transformers lets it see the real ones. Only the loss of question answering looks at padded positions, as its
softmax is over all; elsewhere compare real ones.

B batch, T tokens, D model width, V vocabulary, L labels, C choices. Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference import megatron
from ckpt_tool.reference.blocks import activate, affine, join_words, visible, wide
from ckpt_tool.reference.facts import Shapes
from ckpt_tool.reference.megatron_layers import embedded, norm, transformed
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, given, run, trunk

STAGED = True  # whatever its files are called: layers of a pipeline's stages are numbered apart


@dataclass(frozen=True)
class Config(megatron.Config):
    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` are the pickled args as plain values and `checkpoint_version`, each absent where the file
        has none; `shapes` those of rank 0, stages joined; `overrides` facts from the user under their Hugging
        Face names, which win. `vocab_size` there is the number of words that count, by default all rows;
        `is_decoder` hides what comes after a token; `hidden_act` is both gelus. Without args: epsilon 1e-5;
        both gelus erf for version 0, which the file cannot tell and transformers assumes. ValueError for what
        none of them tells, where they disagree, and for what this pass does not compute."""
        causal = bool(overrides.get("is_decoder", False))
        return cls.read(params, shapes, ranks, overrides, causal=causal, gelu_of_version_0="erf")


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("token_types", "mask") if c.names.tokentype else ("mask",)


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    heads = {"head": head}
    if c.names.binary + "weight" in ranks[0]:
        heads["seq_relationship_logits"] = binary_head
    return decoder_phases(embed, layer, heads, ranks, c, inputs)


def forward(
    ids: Tensor, ranks: Ranks, c: Config, *, token_types: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Logits (B, T, V) of the LM head. `token_types` (B, T) are 0 by default; `mask` (B, T) is 1 for tokens
    and 0 for padding, by default there is none."""
    logits: Tensor = run(phases(ranks, c, given(token_types=token_types, mask=mask)), ids)
    return logits


def embed(ids: Tensor, ranks: Ranks, c: Config, *, token_types: Tensor | None = None) -> Tensor:
    x = embedded(ids, ranks, c)
    if c.names.tokentype:
        types = torch.zeros_like(ids) if token_types is None else token_types
        x = x + ranks[0][c.names.tokentype + "weight"][types]
    elif token_types is not None:
        raise ValueError("expected no token types, as the checkpoint has no table of them, found some")
    return x


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    T = x.shape[1]
    seen = visible(x) if c.causal else torch.ones(1, 1, T, T, dtype=torch.bool, device=x.device)
    if mask is not None:
        seen = seen & (mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :])
    return transformed(x, i, ranks, c, seen)


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V) of the last layer's output."""
    return lm_logits(norm(x, ranks[0], c.names.final_norm, c), ranks, c)


def binary_head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Next sentence logits (B, 2) of the last layer's output."""
    return next_sentence(norm(x, ranks[0], c.names.final_norm, c), ranks, c)


def encode(
    ids: Tensor, ranks: Ranks, c: Config, *, token_types: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """The normalised sequence (B, T, D), which every head starts from. For multiple choice `ids`,
    `token_types` and `mask` are (B, C, T), and the sequence is (B, C, T, D)."""
    told = given(token_types=token_types, mask=mask)
    flat = {name: t.flatten(0, -2) for name, t in told.items()}
    x = trunk(phases(ranks, c, flat), ids.flatten(0, -2))
    return norm(x, ranks[0], c.names.final_norm, c).view(*ids.shape, -1)


def lm_logits(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The output layer is the word table: the copy of the last stage where there is one."""
    n, parts = c.names, []
    for w in ranks:
        z = norm(activate(affine(y, w, n.lm_dense), c.head_gelu), w, n.lm_norm, c)
        parts.append(z @ w[(n.head_word or n.word) + "weight"].T + w[n.lm_bias + "bias"])
    return join_words(parts, c.n_words)


def pool(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Of the first token: (B, D), or (B, C, D)."""
    return torch.tanh(affine(y[..., 0, :], ranks[0], c.names.pooler))


def next_sentence(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, 2): the segments are in order, or they are not (Megatron swaps the two it is trained on;
    transformers speaks of a random second one)."""
    return wide(affine(pool(y, ranks, c), ranks[0], c.names.binary))


def sequence_classification(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, L), or the L values of a regression; (B, C, 1) of y (B, C, T, D)."""
    return wide(affine(pool(y, ranks, c), ranks[0], "classifier."))


def question_answering(y: Tensor, ranks: Ranks, c: Config) -> tuple[Tensor, Tensor]:
    """Logits of the first and of the last token of the answer, (B, T) each."""
    both = wide(affine(y, ranks[0], "qa_outputs."))
    return both[..., 0], both[..., 1]


# What `encode` gives goes into each. The causal one wants `c.causal`.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": lambda y, ranks, c: (y, pool(y, ranks, c)),
    "masked_lm": lm_logits,
    "causal_lm": lm_logits,
    "next_sentence_prediction": next_sentence,
    "pretraining": lambda y, ranks, c: (lm_logits(y, ranks, c), next_sentence(y, ranks, c)),
    "sequence_classification": sequence_classification,
    "multiple_choice": lambda y, ranks, c: sequence_classification(y, ranks, c).squeeze(-1),
    "token_classification": lambda y, ranks, c: wide(affine(y, ranks[0], "classifier.")),
    "question_answering": question_answering,
}
