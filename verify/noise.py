"""How much a float result moves when nothing but the order of its sums changes.

The noise floor of a comparison is measured, not assumed: the same reading of the same weights is run again
while every contraction (matmul, linear, conv1d, einsum) and every sum or mean adds its terms in reverse
order. What differs then is rounding alone. Large matrices are not copied for that: their terms come
in eighths, the last one first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ckpt_tool.verify.streamed import Streamed, product

_MATMULS = {torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm}
LARGE, EIGHTHS = 1 << 20, 8  # elements of a matrix that is not copied; the parts it is taken in
_SUMS = {torch.sum, torch.mean, Tensor.sum, Tensor.mean}


class ReversedSums(TorchFunctionMode):
    """Inside `with ReversedSums():` torch adds the terms of contractions and sums in reverse order."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MATMULS:
            a, b = args
            if b.ndim == 2 and (isinstance(b, Streamed) or b.numel() >= LARGE):
                return _in_eighths(a, b)
            args = (a.flip(-1), b.flip(-2 if b.ndim > 1 else -1))
        elif func is F.conv1d:
            args = (args[0].flip(-2), args[1].flip(-2), *args[2:]) if not _grouped(args, kwargs) else args
        elif func is F.linear:
            if isinstance(args[1], Streamed) or args[1].numel() >= LARGE:
                y = _in_eighths(args[0], args[1].T)
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                return y if bias is None else y + bias
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


def _in_eighths(a: Tensor, b: Tensor) -> Tensor:
    """a (..., K) @ b (K, N), as the sum over eighths of K from the last to the first."""
    if isinstance(b, Streamed):
        return product(a, b, _in_eighths, backwards=True)
    share = -(-len(b) // EIGHTHS)
    starts = reversed(range(0, len(b), share))
    parts = ((a[..., k : k + share], b[k : k + share]) for k in starts)
    x, w = next(parts)
    y = x.flatten(0, -2) @ w
    for x, w in parts:
        y.addmm_(x.flatten(0, -2), w)
    return y.view(*a.shape[:-1], b.shape[1])


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
