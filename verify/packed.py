"""What became of the quantised weights of a source: carried as they are, or numbers by some recipe. The
manifest says which, or the output itself shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.kept import Manifest
from ckpt_tool.convert.quantised import Inventory, Quantised, found_in
from ckpt_tool.convert.quantised_values import RECIPES, TARGETS
from ckpt_tool.verify.dequantised import recomputed


class Packed:
    """`dtype` is that of the numbers which quantised weights became, None where they are carried or there are
    none; `recipe` in which order was rounded, and `declared` whether a manifest says so."""

    def __init__(self, out: Checkpoint, manifest: Manifest | None, settings: Mapping[str, Any]) -> None:
        options = {} if manifest is None else manifest.options
        self.settings = {**({} if manifest is None else manifest.settings), **settings}
        self.out = out
        self.dtype: str | None = options.get("dequantize")
        self.recipe: str = options.get("recipe") or RECIPES[0]
        self.declared = self.dtype is not None
        self.inventory: Inventory | None = None
        self.stored: Checkpoint | None = None
        self.known = self.declared  # whether the numbers are those of the recipe
        self.tried = 0  # differences that were to be explained

    def seen(self, source: Checkpoint) -> Checkpoint:
        """The source with numbers in place of codes where the output has numbers."""
        self.stored, self.inventory = source, found_in(source, self.settings)
        if self.inventory is None:
            self.dtype = None
            return source
        if self.dtype is None:
            self.dtype = self._shown(self.inventory)
        if self.dtype is None:
            return source
        return recomputed(source, self.inventory, self.dtype, self.recipe)

    def _shown(self, inventory: Inventory) -> str | None:
        """The dtype of most numbers of an output that has no codes."""
        codes = {w.codes.dtype for w in inventory.weights.values()}
        counts: Counter[str] = Counter()
        for t in self.out:
            counts[t.dtype] += t.numel * (len(t.shape) > 1)
        (most, _), *_ = counts.most_common(1) or [("", 0)]
        return most if most in TARGETS and not codes & counts.keys() else None

    @property
    def carried(self) -> bool:
        """Whether the output has codes, as its source has; without a source, whether it has any."""
        if self.stored is None:
            return found_in(self.out, self.settings) is not None
        return self.inventory is not None and self.dtype is None

    @property
    def by_name(self) -> Mapping[str, Quantised]:
        """Quantised weights that are seen as numbers."""
        return {} if self.inventory is None or self.dtype is None else self.inventory.weights

    @cached_property
    def parts(self) -> dict[tuple[str, str], Quantised]:
        """The quantised weight that each of its tensors belongs to, by (file, name)."""
        weights = {} if self.inventory is None else self.inventory.weights
        return {(t.file, t.name): w for w in weights.values() for t in w.parts}

    @property
    def options(self) -> dict[str, Any]:
        """As fields of `plan.Options`."""
        return {} if self.dtype is None else {"dequantize": self.dtype, "recipe": self.recipe}
