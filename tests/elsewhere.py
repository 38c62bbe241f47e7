"""A device that is not there: tensors that say they lie on `elsewhere:0`, hold a CPU tensor, and refuse as
those of a GPU do to meet one that lies on the CPU. Not a test module.

torch asks its Python backend (PrivateUse1) for the device, and `Elsewhere` sees each operation below it. What
a GPU computes otherwise, lacks or runs out of is not seen here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "elsewhere"
DEVICE = f"{NAME}:0"
COPIES = (torch.ops.aten.copy_, torch.ops.aten._to_copy)
# of a tensor by indices, which may lie on the CPU
INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
# Their results share memory and carry a bit instead of another sign, which no wrapper shows.
LAZY = {
    torch.ops.aten._conj: torch.ops.aten.conj_physical.default,
    torch.ops.aten._neg_view: torch.ops.aten.neg.default,
}


class There(Tensor):
    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        with torch.inference_mode(False):
            made = Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=DEVICE,
            )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Inside, what is made on `elsewhere` is made so, too."""

    def __enter__(self) -> Elsewhere:
        if not hasattr(torch, NAME):
            backend_registration._setup_privateuseone_for_python_backend(NAME)
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) comes by `computed`
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self.before)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What `func` makes of the tensors that are held, on the device on which a GPU would leave it."""
    if func.overloadpacket is torch.ops.aten.to:
        func, args, kwargs = _copy(func, args, kwargs)
        if func is None:
            return args
    given = [*_tensors(args), *_tensors(kwargs.values())]
    there = any(isinstance(x, There) for x in given)
    strangers = [x for x in given if not isinstance(x, There) and x.ndim]
    indexed = func.overloadpacket in INDEXED and isinstance(args[0], There)
    if there and strangers and func.overloadpacket not in COPIES and not indexed:
        raise RuntimeError(f"Expected all tensors to be on the same device, found {DEVICE} and cpu ({func})")
    if "device" in kwargs:
        there, kwargs = torch.device(kwargs["device"] or "cpu").type == NAME, kwargs | {"device": "cpu"}
    known = {id(_held(x)): x for x in given}

    def placed(y: Any) -> Any:
        if isinstance(y, tuple | list):
            return type(y)(map(placed, y))
        if not isinstance(y, Tensor):
            return y
        return known.get(id(y), There(y) if there else y)

    func = LAZY.get(func.overloadpacket, func)
    return placed(func(*map(_held, args), **{k: _held(x) for k, x in kwargs.items()}))


def _copy(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """`Tensor.to`, which inference mode leaves whole, as a copy; None where it gives the tensor back."""
    told = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs
    x, other = told["self"], told.get("other")
    device = torch.device(told.get("device") or (x if other is None else other).device)
    dtype = told.get("dtype") or (x if other is None else other).dtype
    if (device.type, dtype, bool(told.get("copy"))) == (x.device.type, x.dtype, False):
        return None, x, {}
    return torch.ops.aten._to_copy.default, (x,), {"device": device, "dtype": dtype}


def _held(x: Any) -> Any:
    if isinstance(x, There):
        return x.held
    return [_held(y) for y in x] if isinstance(x, list) else x


def _tensors(given: Iterable[Any]) -> Iterator[Tensor]:
    for x in given:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)
