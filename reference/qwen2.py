"""Qwen2 (Qwen1.5, Qwen2 and Qwen2.5, dense) as it is published, which is in the tensors and the config.json
of transformers, and as Megatron-Core trains it (megatron_core.py).

Source: Bai et al. 2023 (arXiv 2309.16609, section 2.3), Yang et al. 2024 (arXiv 2407.10671, section 2.2) for
the model; the documentation of Qwen2Config in transformers 4.57 for its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from ckpt_tool.reference import megatron_core
from ckpt_tool.reference.facts import Shapes
from ckpt_tool.reference.published import Published


class Config(Published):
    computed = {"hidden_act": ("silu",), "num_experts": ()}

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` is config.json, or what Megatron's files carry; else as `Published` has it."""
        if megatron_core.words_of(shapes) is not None:
            return cls(**megatron_core.made(params, shapes, ranks, overrides, biased=True))
        return super().from_original(params, shapes, ranks, overrides)

    @classmethod
    def traits(cls, facts: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
        return {"biased": ("qkv",)}
