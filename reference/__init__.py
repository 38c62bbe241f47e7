"""One plain forward pass per architecture and layout: what the converted model is measured against.

Every module has the same functions, so that two of them run in lockstep, phase by phase:

    Config.from_original(params, shapes, ranks, overrides)   or   Config.from_hf(config)
    phases(ranks, c, inputs) -> phases    named, in order; see phases.py
    forward(ids, ranks, c) -> logits      (B, T, V), float32 or higher; ids (B, T) int64

`ranks` holds one mapping of tensor names to tensors per model-parallel rank, one in all for a checkpoint
that is not model-parallel. A tensor is read when it is needed and never kept, so a lazy mapping streams a
large model. Pipeline stages are joined before, so that layers are numbered through (`megatron.join_stages`).
The pass computes in the dtype of the tensors it is given; angles, norms and softmax are never below float32,
and float64 tensors make every step float64. `c.n_layers` counts the layers in every module.

**Two sides.** The original layouts share blocks.py, rope.py and decoder.py, written after the papers and the
publishers' code; the Hugging Face layout shares hf_blocks.py, hf_rope.py and hf_decoder.py, written after the
library. A side never uses what is of the other (tests/test_house_reference.py), so that a mistake in one of
them does not agree with itself. A family adds its numbers, its traits and what is its own.

Those with several heads have them in `HEADS`, by what they are for; each takes what `encode(ids, ranks, c)`
gives, and losses.py has its loss. A pass that takes more than ids says so in `inputs(ranks, c)`:
"token_types" and "mask", (B, T) each.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Family -> the module that reads its original layout.
ORIGINAL: dict[str, str] = {
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "megatron-bert": "megatron_bert",
    "megatron-gpt2": "megatron_gpt2",
    "opt": "opt",
    "codegen": "codegen",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}

# Architecture in config.json -> the module that reads its Hugging Face layout.
CONVERTED: dict[str, str] = {
    "LlamaForCausalLM": "hf_llama",
    "MistralForCausalLM": "hf_mistral",
    "MixtralForCausalLM": "hf_mixtral",
    "GPT2LMHeadModel": "hf_gpt2",
    "MegatronBertModel": "hf_megatron_bert",
    "MegatronBertForPreTraining": "hf_megatron_bert",
    "MegatronBertForMaskedLM": "hf_megatron_bert",
    "MegatronBertForCausalLM": "hf_megatron_bert",
    "MegatronBertForNextSentencePrediction": "hf_megatron_bert",
    "MegatronBertForSequenceClassification": "hf_megatron_bert",
    "MegatronBertForMultipleChoice": "hf_megatron_bert",
    "MegatronBertForTokenClassification": "hf_megatron_bert",
    "MegatronBertForQuestionAnswering": "hf_megatron_bert",
    "OPTModel": "hf_opt",
    "OPTForCausalLM": "hf_opt",
    "OPTForSequenceClassification": "hf_opt",
    "OPTForQuestionAnswering": "hf_opt",
    "CodeGenForCausalLM": "hf_codegen",
    "GPTJForCausalLM": "hf_gptj",
    "Qwen2Model": "hf_qwen2",
    "Qwen2ForCausalLM": "hf_qwen2",
    "Qwen2ForSequenceClassification": "hf_qwen2",
    "Qwen2ForTokenClassification": "hf_qwen2",
    "Qwen2ForQuestionAnswering": "hf_qwen2",
    "Qwen3ForCausalLM": "hf_qwen3",
}


class NotComputed(ValueError):
    """What a config asks for is a model that no reading here computes; it may well be right."""


def original(family: str) -> ModuleType:
    """The reading of `family` in its original layout; imports torch. ValueError if there is none."""
    return _module(ORIGINAL, family, "family")


def converted(architecture: str) -> ModuleType:
    """The reading of `architecture` in the Hugging Face layout; imports torch. ValueError if there is
    none."""
    return _module(CONVERTED, architecture, "architecture")


def _module(table: dict[str, str], name: str, kind: str) -> ModuleType:
    if name not in table:
        raise ValueError(f"expected {kind} to be one of {', '.join(table)}, found `{name}`")
    return import_module(f"{__name__}.{table[name]}")


def loss(logits: Tensor, ids: Tensor) -> float:
    """Mean cross entropy, in nats, of every token given those before it; logits (B, T, V), ids (B, T), T >
    1."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def generate(forward: Callable[[Tensor], Tensor], ids: Tensor, steps: int) -> Tensor:
    """`ids` (B, T) and the `steps` most probable tokens after it, each from a whole new pass: (B, T +
    steps)."""
    import torch

    for _ in range(steps):
        ids = torch.cat([ids, forward(ids)[:, -1:].argmax(-1)], dim=1)
    return ids
