"""BERT as Megatron-LM trains it, in the tensors of its own checkpoints, with all heads that transformers has.

Source: Devlin et al. 2018; else that of transformer.py. Names, ages and numbers are those of megatron.py.

MegatronBert's config.json cannot say `apply_residual_connection_post_layernorm`, grouped queries, a head
width that is not D/N, nor two gelus: it has one `hidden_act` for feed-forward and LM head, while Megatron
with its default flags since 2021 has tanh in the one and erf in the other (at most 4.8e-4 apart).

Padding: a pair of tokens sees each other if neither is padding, so a padded query sees all keys alike where
transformers lets it see the real ones. Only the loss of question answering looks at padded positions, as its
softmax is over all; elsewhere compare real ones.

B batch, T tokens, D model width, V vocabulary, L labels, C choices. Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ckpt_tool.reference import megatron, transformer
from ckpt_tool.reference.blocks import Past, activate, affine, join_words, remembered, visible, wide
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes
from ckpt_tool.reference.transformer import norm, transformed

STAGED = True  # whatever its files are called: layers of a pipeline's stages are numbered apart


class Config(megatron.Config):
    gelu_of_version_0 = "erf"  # without args; which the file cannot tell and transformers assumes


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("token_types", "mask") if "tokentype" in c.names else ("mask",)


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    if "tuned" in c.names:  # on one text, or one choice of several
        tuned = c.names["tuned"]
        heads = {"head": sequence, "logits": lambda x, ranks, c: classes(pool(x, ranks, c), ranks, tuned)}
        return decoder_phases(embed, layer, heads, ranks, c, inputs)
    heads = {"head": head}
    if c.names["binary"] + "weight" in ranks[0]:
        heads["seq_relationship_logits"] = next_sentence
    return decoder_phases(embed, layer, heads, ranks, c, inputs)


forward, encode = passes(phases)


def embed(
    ids: Tensor, ranks: Ranks, c: Config, *, token_types: Tensor | None = None, past: Past | None = None
) -> Tensor:
    x = transformer.embed(ids, ranks, c, past=past)
    if "tokentype" in c.names:
        types = torch.zeros_like(ids) if token_types is None else token_types
        x = x + ranks[0][c.names["tokentype"] + "weight"][types]
    elif token_types is not None:
        raise ValueError("expected no token types, as the checkpoint has no table of them, found some")
    return x


def layer(
    x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None, past: Past | None = None
) -> Tensor:
    seen = visible(x, before=remembered(past, (i, 0)))
    seen = seen if c.causal else torch.ones_like(seen)
    if mask is not None:
        seen = seen & (mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :])
    return transformed(x, i, ranks, c, seen, past)


def sequence(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Normalised: (B, T, D), or (B, C, T, D)."""
    return norm(x, ranks[0], c.names["final_norm"], c)


def pool(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Of the first token: (B, D), or (B, C, D)."""
    return torch.tanh(affine(sequence(x, ranks, c)[..., 0, :], ranks[0], c.names["pooler"]))


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, T, V). The output layer is the word table: the copy of the last stage where there is one."""
    n, y, parts = c.names, sequence(x, ranks, c), []
    for w in ranks:
        z = norm(activate(affine(y, w, n["lm_dense"]), c.head_gelu), w, n["lm_norm"], c)
        parts.append(z @ w[n["head_word"] + "weight"].T + w[n["lm_bias"] + "bias"])
    return join_words(parts, c.n_words)


def next_sentence(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, 2): the segments are in order, or they are not (Megatron swaps the two it is trained on;
    transformers speaks of a random second one)."""
    return wide(affine(pool(x, ranks, c), ranks[0], c.names["binary"]))


def classes(y: Tensor, ranks: Ranks, stem: str = "classifier.") -> Tensor:
    """Logits of what the classifier is put on, or the values of a regression: (..., L)."""
    return wide(affine(y, ranks[0], stem))


# What `encode` gives goes into each. The causal one wants `c.causal`. Question answering has logits of the
# first and of the last token of the answer, (B, T) each.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, ...]]] = {
    "base_model": lambda x, ranks, c: (sequence(x, ranks, c), pool(x, ranks, c)),
    "masked_lm": head,
    "causal_lm": head,
    "next_sentence_prediction": next_sentence,
    "pretraining": lambda x, ranks, c: (head(x, ranks, c), next_sentence(x, ranks, c)),
    "sequence_classification": lambda x, ranks, c: classes(pool(x, ranks, c), ranks),
    "multiple_choice": lambda x, ranks, c: classes(pool(x, ranks, c), ranks).squeeze(-1),
    "token_classification": lambda x, ranks, c: classes(sequence(x, ranks, c), ranks),
    "question_answering": lambda x, ranks, c: classes(sequence(x, ranks, c), ranks, "qa_outputs.").unbind(-1),
}
