"""The losses of the heads, from logits and labels, as transformers 5.23.0 defines them: means in nats.

A label of -100 does not count; where none counts the mean is nan. B batch, T tokens, V vocabulary, L labels,
C choices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def labelled(logits: Tensor, labels: Tensor) -> Tensor:
    """Masked LM (B, T, V), token classification (B, T, L), next sentence (B, 2), multiple choice (B, C): the
    cross entropy against one label for each distribution, (B, T) or (B,)."""
    return cross_entropy(logits.flatten(0, -2), labels.flatten())


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Causal LM: logits (B, T, V), labels (B, T), of which each is foretold by the position before it."""
    return labelled(logits[:, :-1], labels[:, 1:])


def pretraining(lm: Tensor, next_sentence: Tensor, labels: Tensor, next_sentence_label: Tensor) -> Tensor:
    """The sum of the masked LM loss and the next sentence loss."""
    return labelled(lm, labels) + labelled(next_sentence, next_sentence_label)


def classification(logits: Tensor, labels: Tensor, problem: str | None = None) -> Tensor:
    """Sequence classification: logits (B, L). `problem` is `problem_type` of config.json, one of PROBLEMS. By
    default a single logit is a regression, integer labels (B,) are of a single one of L, and others (B, L)
    are truth values of each. ValueError for another problem."""
    if problem is None:
        integer = labels.dtype in (torch.int64, torch.int32)
        problem = PROBLEMS[0 if logits.shape[-1] == 1 else 1 if integer else 2]
    if problem == "regression":
        one = logits.shape[-1] == 1
        return mse_loss(logits.squeeze(), labels.squeeze()) if one else mse_loss(logits, labels)
    if problem == "single_label_classification":
        return labelled(logits, labels)
    if problem == "multi_label_classification":
        return binary_cross_entropy_with_logits(logits, labels)
    raise ValueError(f"expected problem to be one of {', '.join(PROBLEMS)}, found `{problem}`")


def span(start: Tensor, end: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Question answering: logits (B, T) each, positions (B,) of the answer. Positions below 0 count as 0,
    those from T on do not count."""
    T = start.shape[1]
    losses = [
        cross_entropy(logits, positions.clamp(0, T), ignore_index=T)
        for logits, positions in ((start, first), (end, last))
    ]
    return (losses[0] + losses[1]) / 2


def words_and_entities(words: Tensor, entities: Tensor, labels: Tensor, entity_labels: Tensor) -> Tensor:
    """The sum of the masked LM losses of words (B, T, V) and of entities (B, E, U), labels (B, T), (B, E)."""
    return labelled(words, labels) + labelled(entities, entity_labels)


def of_entities(logits: Tensor, labels: Tensor) -> Tensor:
    """Classification of an entity or of two (B, L), or of spans (B, E, L): labels with an axis less name one
    class each; those of the same shape are truth values of each class."""
    if labels.ndim < logits.ndim:
        return labelled(logits, labels)
    return binary_cross_entropy_with_logits(logits.flatten(), labels.flatten().to(logits.dtype))
