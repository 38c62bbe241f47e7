"""Quantised weights for a forward pass: under their plain names, their numbers made by the formula of the
layout's own reading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.convert.quantised import Inventory, found_in
from ckpt_tool.convert.quantised_view import quantised_of
from ckpt_tool.errors import CkptToolError
from ckpt_tool.reference import hf_quantised, quantised
from ckpt_tool.verify.holding import SMALL, exchanged, making
from ckpt_tool.verify.packed_groups import Codes, codes_of
from ckpt_tool.verify.weights import Weights


class Formula(Protocol):
    """What both readings have of a weight."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def numbers(self, held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor: ...


class PackedWeights(Weights):
    """Names and shapes are those of a model that is not quantised."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, TensorInfo],
        dtype: torch.dtype,
        device: str,
        inventory: Inventory,
        original: bool,
    ) -> None:
        formulas: dict[str, Formula] = {}
        for said, shapes in _by_codes(inventory, tensors).items():
            given = shapes, said.block, said.group, said.bits or 4
            found: Mapping[str, Any] = (quantised if original else hf_quantised).packed(*given)
            formulas |= found
        self.formulas: Mapping[str, Formula] = formulas
        self.stored = tensors
        self.inventory, self.original = inventory, original
        super().__init__(checkpoint, dict(self._shown()), dtype, device)

    @property
    def of_codes(self) -> set[str]:
        """The names of all that formulas are made of."""
        return {n for f in self.formulas.values() for n in f.names}

    def _shown(self) -> Iterable[tuple[str, TensorInfo]]:
        """Weights under their plain names with the shape that the documents give them; what no formula reads
        and belongs to one is no weight."""
        hidden = {t.name for w in self.inventory.weights.values() for t in w.parts} | self.of_codes
        for name, info in self.stored.items():
            if name not in hidden:
                yield name, info
        exact = {w.name: w.shape for w in self.inventory.weights.values() if len(w.shape) == 2}
        for name, formula in self.formulas.items():
            shape = exact.get(name, formula.shape)
            yield name, TensorInfo(name, "BF16", shape, self.stored[formula.names[0]].file)

    def computed_in(self, dtype: torch.dtype) -> PackedWeights:
        own = self.checkpoint, self.stored, dtype, self.device, self.inventory, self.original
        return self._sharing(PackedWeights(*own))

    @property
    def several(self) -> frozenset[str]:
        return self._several

    @cached_property
    def _several(self) -> frozenset[str]:
        held = self.inventory.weights
        return frozenset(n for n in self.formulas if n in held and held[n].form.packed)

    @property
    def making(self) -> int:
        return making(self._most)

    @property
    def exchanged(self) -> int:
        return exchanged(self.formulas, self._most, self.dtype.itemsize)

    @cached_property
    def _most(self) -> int:
        return max((self.tensors[n].numel for n in self.formulas), default=0)

    def _has_room(self, name: str, made: Tensor) -> bool:
        """Whether numbers are kept; those that find no room are made again of their codes."""
        free = self.limit is None or name not in self.formulas or made.numel() < SMALL
        return free or self.room.take(made.nbytes)

    def _load(self, info: TensorInfo) -> Tensor:
        formula = self.formulas.get(info.name)
        if formula is None:
            return super()._load(info)
        wide = torch.promote_types(self.dtype, torch.float32)
        held = {n: self._as_stored(self.stored[n]) for n in formula.names}
        return formula.numbers(held, wide).to(self.dtype).to(self.device)

    def with_parts(self, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that these tensors, as they are stored, belong to, made with them, by plain names."""
        wide = torch.promote_types(self.dtype, torch.float32)
        made = {}
        for name, formula in self.formulas.items():
            if any(n in others for n in formula.names):
                held = {
                    n: others[n] if n in others else self._as_stored(self.stored[n]) for n in formula.names
                }
                made[name] = formula.numbers(held, wide).to(self.dtype).to(self.device)
        return made

    def _as_stored(self, info: TensorInfo) -> Tensor:
        return as_stored(self.checkpoint, info)


def _by_codes(
    inventory: Inventory, tensors: Mapping[str, TensorInfo]
) -> dict[Codes, dict[str, tuple[str, tuple[int, ...]]]]:
    """Dtypes and shapes of the tensors that are quantised in one way, by what is said of it."""
    whole = inventory.scheme
    owner = {t.name: w.name for w in inventory.weights.values() for t in w.parts} if whole.groups else {}
    said = {name: codes_of(whole, name) for name in dict.fromkeys(owner.values())}
    rest = Codes(whole.block, whole.group, whole.bits)
    apart: dict[Codes, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, info in tensors.items():
        codes = said[owner[name]] if name in owner else rest
        apart.setdefault(codes, {})[name] = (info.dtype, info.shape)
    return apart


def as_stored(checkpoint: Checkpoint, info: TensorInfo, start: int = 0) -> Tensor:
    """A tensor of the checkpoint in the dtype that it has there, or one of the shape of `info` from byte
    `start` of it on."""
    out = torch.empty(info.shape, dtype=getattr(torch, DTYPES[info.dtype].torch))
    if info.nbytes:
        checkpoint.read_into(info, start, out.view(-1).view(torch.uint8).numpy().data)
    return out


def packed_in(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Inventory | None:
    """What is quantised in the files of a side, as they are; None where it is seen as numbers, or where the
    readings take codes themselves. ValueError for codes that lack something."""
    try:
        found = None if quantised_of(checkpoint) is not None else found_in(checkpoint, settings)
    except CkptToolError as error:
        first = error.problems[0]
        raise ValueError(f"{first.where}: {first.message}") from None
    if found is None or all(w.form.own_rows for w in found.weights.values()):
        return None
    return found
