"""A model whose output layer is its embedding, stored under the name of the output layer alone.

Of tensors that share memory huggingface_hub's save_torch_model keeps the first by the alphabet, which is
`lm_head.weight` before `model.embed_tokens.weight`. transformers 4.37.2 and 5.23.0 load such a folder as it
was meant, since config.json ties the two. Here the one tensor is seen under the embedding's name, the
only one that save_pretrained() writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.facts_classes import Class
from ckpt_tool.convert.in_parts import described

TIE = "tie_word_embeddings"
MASKED = "mlm_head.weight"  # beside which the class that goes on with a text has lm_head.weight
# Ends of the names of classes whose logits are over the vocabulary: nothing of others shares the embedding.
OVER_WORDS = (
    "LMHeadModel",
    "DoubleHeadsModel",
    "ForCausalLM",
    "ForMaskedLM",
    "ForPreTraining",
    "ForConditionalGeneration",
)


def tables_named(checkpoint: Checkpoint, classes: Mapping[str, Class]) -> Checkpoint:
    """`checkpoint`, or, where its config.json is of one of `classes` and ties tables that are stored under
    the name of the head alone, a view of it in which they have the names that the class writes."""
    if (found := described(checkpoint, classes)) is None:
        return checkpoint
    config, own = found
    if not _ties(config, own) or not any(n.startswith(own.prefix) for n in checkpoint.names()):
        return checkpoint
    moved: dict[str, str] = {}
    for head in _heads(config, own):
        table = own.tied[head] or own.prefix + own.words
        if head in checkpoint and table not in (*checkpoint.names(), *moved.values()):
            moved[head] = table
    if not moved:
        return checkpoint
    readings = [f"{head} stands for {table} too, to which config.json ties it: read as that"
                for head, table in moved.items()]  # fmt: skip
    return checkpoint.renamed(moved, *readings)


def _heads(config: Mapping[str, Any], own: Class) -> list[str]:
    """Those of `Class.tied` that the class of config.json has: one that masks words may have its own."""
    if MASKED not in own.tied:
        return [*own.tied]
    named = str(config.get("architectures"))
    return [
        head for head in own.tied if named.endswith("ForMaskedLM']" if head == MASKED else "ForCausalLM']")
    ]


def _ties(config: Mapping[str, Any], own: Class) -> bool:
    """Whether the class that config.json names has a head which it ties; one that names none has it."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and len(named) == 1 else None
    said = config.get(TIE)
    tied = own.numbers.get(TIE) if said is None else said
    return tied is True and (not named or (isinstance(first, str) and first.endswith(OVER_WORDS)))
