"""How much a float result moves when nothing but the order of its sums changes.

The noise floor of a comparison is measured, not assumed: the same reading of the same weights is run again
while every contraction (matmul, linear, conv1d, einsum) and every sum or mean adds its terms in reverse
order. What differs then is rounding alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_MATMULS = {torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm}
_SUMS = {torch.sum, torch.mean, Tensor.sum, Tensor.mean}


class ReversedSums(TorchFunctionMode):
    """Inside `with ReversedSums():` torch adds the terms of contractions and sums in reverse order."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MATMULS:
            a, b = args
            args = (a.flip(-1), b.flip(-2 if b.ndim > 1 else -1))
        elif func is F.conv1d:
            args = (args[0].flip(-2), args[1].flip(-2), *args[2:]) if not _grouped(args, kwargs) else args
        elif func is F.linear:
            args = (args[0].flip(-1), args[1].flip(-1), *args[2:])
        elif func is torch.einsum and isinstance(args[0], str):
            args = (args[0], *_reversed_operands(args[0], args[1:]))
        elif func in _SUMS and isinstance(args[0], Tensor):
            dim = kwargs.get(
                "dim", args[1] if len(args) > 1 and not isinstance(args[1], torch.dtype) else None
            )
            dims = range(args[0].ndim) if dim is None else [dim] if isinstance(dim, int) else dim
            args = (args[0].flip(*dims), *args[1:])
        return func(*args, **kwargs)


def _grouped(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a convolution sums over a share of the channels only."""
    return int(kwargs.get("groups", args[6] if len(args) > 6 else 1)) != 1


def _reversed_operands(equation: str, operands: tuple[Tensor, ...]) -> list[Tensor]:
    """Each operand flipped along the letters that the equation sums over; the result is the same but for
    rounding."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    made = []
    for letters, x in zip(inputs.split(","), operands, strict=True):
        dims = [k for k, letter in enumerate(letters) if letter not in output]
        made.append(x.flip(*dims) if dims else x)
    return made
