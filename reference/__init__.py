"""One plain forward pass per architecture and layout: what the converted model is measured against.

Every module has the same functions, so that two of them run in lockstep, layer by layer:

    Config.from_original(params, shapes, ranks, overrides)   or   Config.from_hf(config)
    embed(ids, ranks, c) -> x        ids (B, T) int64, x (B, T, D)
    layer(x, i, ranks, c) -> x
    head(x, ranks, c) -> logits      (B, T, V), float32 or higher
    forward(ids, ranks, c) -> logits

`ranks` holds one mapping of tensor names to tensors per model-parallel rank, one in all for a checkpoint
that is not model-parallel. A tensor is read when it is needed and never kept, so a lazy mapping streams a
large model. The pass computes in the dtype of the tensors it is given; angles, norms and softmax are never
below float32, and float64 tensors make every step float64. `c.n_layers` counts the layers in every module.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Family -> the module that reads its original layout.
ORIGINAL: dict[str, str] = {"llama": "llama", "mistral": "mistral", "mixtral": "mixtral"}

# Architecture in config.json -> the module that reads its Hugging Face layout.
CONVERTED: dict[str, str] = {
    "LlamaForCausalLM": "hf_llama",
    "MistralForCausalLM": "hf_mistral",
    "MixtralForCausalLM": "hf_mixtral",
}


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
