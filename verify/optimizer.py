"""AdamW, as the libraries that train these models compute it: one step of it on one tensor, and which tensors
decay.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101); torch 2.13 (optim/adamw.py), transformers 4.37.2
(optimization.py, AdamW), Megatron-LM (optimizer/__init__.py, apex FusedAdam), google-research/bert
(optimization.py, AdamWeightDecayOptimizer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from ckpt_tool.records import dataclass

# Where epsilon stands, v being the second moment and c its bias correction: sqrt(v / c) + eps,
# sqrt(v) + eps before the root of c is taken off, or sqrt(v / c + eps).
Epsilon = Literal["corrected", "raw", "inside"]


@dataclass(frozen=True)
class AdamW:
    """`decay_first`: the weight decays before the step, else what the step has made of it does."""

    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.01
    correct_bias: bool = True
    eps_at: Epsilon = "corrected"
    decay_first: bool = True
    name: str = "torch.optim.AdamW"

    def words(self) -> str:
        bias = "bias corrected" if self.correct_bias else "bias not corrected"
        return (
            f"{self.name}: rate {self.rate:g}, betas {self.betas[0]:g} and {self.betas[1]:g}, "
            f"eps {self.eps:g} ({self.eps_at}), decay {self.decay:g}, {bias}"
        )


@dataclass(frozen=True)
class Moments:
    """Those of one tensor after `steps` steps."""

    first: Tensor
    second: Tensor
    steps: int = 0


TORCH = AdamW()
RELEASE_4 = AdamW(eps=1e-6, decay=0.0, eps_at="raw", decay_first=False, name="transformers 4 AdamW")
MEGATRON = AdamW(decay=0.01, name="Megatron-LM (FusedAdam)")
GOOGLE = AdamW(eps=1e-6, correct_bias=False, eps_at="raw", name="AdamWeightDecayOptimizer")


def start(p: Tensor) -> Moments:
    return Moments(torch.zeros_like(p), torch.zeros_like(p))


def step(
    recipe: AdamW, p: Tensor, gradient: Tensor, moments: Moments, *, decays: bool
) -> tuple[Tensor, Moments]:
    """The tensor and its moments after one more step, as new tensors."""
    one, two = recipe.betas
    t = moments.steps + 1
    m = one * moments.first + (1 - one) * gradient
    v = two * moments.second + (1 - two) * gradient.square()
    c_1, c_2 = (1 - one**t, 1 - two**t) if recipe.correct_bias else (1.0, 1.0)
    shrink = 1 - recipe.rate * recipe.decay if decays else 1.0
    if recipe.eps_at == "corrected":
        moved = recipe.rate / c_1 * (m / (v.sqrt() / c_2**0.5 + recipe.eps))
    elif recipe.eps_at == "raw":
        moved = recipe.rate * c_2**0.5 / c_1 * (m / (v.sqrt() + recipe.eps))
    else:
        moved = recipe.rate / c_1 * (m / (v / c_2 + recipe.eps).sqrt())
    new = p * shrink - moved if recipe.decay_first else (p - moved) * shrink
    return new, Moments(m, v, t)


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is in the group that decays: matrices are, biases and vectors, of norms say, are not.
    So in Megatron-LM, and in transformers 5.23.0, which leaves out biases and the weights of norms."""
    return len(shape) > 1 and not name.rpartition(".")[2].startswith("bias")


# Names of Megatron's arguments for the numbers.
ARGUMENTS: Mapping[str, str] = {"rate": "lr", "decay": "weight_decay", "eps": "adam_eps"}


def of_arguments(arguments: Mapping[str, Any]) -> AdamW | None:
    """Megatron's with the numbers of its own arguments; None where they say none."""
    said = {own: arguments[key] for own, key in ARGUMENTS.items() if _is_number(arguments.get(key))}
    betas = (arguments.get("adam_beta1"), arguments.get("adam_beta2"))
    if not said and None in betas:
        return None
    usual = MEGATRON
    one, two = (float(b) if _is_number(b) else u for b, u in zip(betas, usual.betas, strict=True))
    rate = float(said.get("rate", usual.rate))
    return replace(
        usual,
        rate=rate if rate > 0 else usual.rate,  # a run that was only evaluated has none
        betas=(one, two),
        eps=float(said.get("eps", usual.eps)),
        decay=float(said.get("decay", usual.decay)),
    )


def _is_number(x: object) -> TypeGuard[int | float]:
    return type(x) in (int, float)
