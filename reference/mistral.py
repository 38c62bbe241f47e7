"""Mistral (7B v0.1 to v0.3, Nemo, Small, Large, Codestral, ...) as Mistral AI published it: `consolidated.*`.

Source: Jiang et al. 2023 (arXiv 2310.06825) and mistralai/mistral-inference @2557e12d, with @c18d5b9b and
@b8181901 for what the first releases left unsaid. Several files of one download hold different tensors, so
together they are one mapping.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from ckpt_tool.reference import decoder, megatron_core
from ckpt_tool.reference.facts import Shapes, first, opened, settings
from ckpt_tool.reference.llama import check, names_of, numbers

# Settings that only Mistral AI's have.
WINDOWS = frozenset(("sliding_window", "_sliding_window"))
EXPERTS = frozenset(("moe", "num_experts", "num_local_experts", "num_experts_per_tok"))


class Config(decoder.Config):
    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any], **more: Any
    ) -> Self:
        """`params` is params.json, `shapes` those of all tensors, `overrides` facts from the user under their
        Hugging Face names, which win; `more` are further fields. ValueError for what none of them tells and
        for scaled frequencies, which no model of Mistral AI's in this layout has."""
        if megatron_core.words_of(shapes) is not None:
            return cls(**megatron_core.made(params, shapes, ranks, overrides))
        if ranks != 1:
            raise ValueError(f"expected one rank (Mistral AI's files are not model-parallel), found {ranks}")
        params, overrides = settings(opened(params), overrides), settings(overrides)
        check(params, overrides, WINDOWS | EXPERTS if more else WINDOWS)
        scaling = {**(params.get("rope_scaling") or {}), **(overrides.get("rope_scaling") or {})}
        if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
            raise ValueError(f"expected rope_type `default`, found `{kind}`")
        # A file without rope_theta is one of the first releases, whose code had 10000 together with a sliding
        # window and 1000000 without (@b8181901); today's code takes 1000000 for both, wrong for 7B v0.1.
        cycle = cycle_of(params, overrides)
        theta = 1e4 if any(cycle) or any(cycle_of(params, {})) else 1e6
        made = numbers(params, overrides, theta)
        n_layers = made["n_layers"]
        if not cycle or n_layers % len(cycle):
            raise ValueError(
                f"expected a list of windows that fills {n_layers} layers, found {len(cycle)} entries"
            )
        windows, names = cycle * (n_layers // len(cycle)), names_of(params, overrides, shapes)
        return cls(**made, windows=windows, rope_scaling=None, names=names, **more)


def cycle_of(params: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One window, perhaps a string, or a list that is repeated over the layers; newer files have
    `_sliding_window`."""
    older, newer = params.get("sliding_window"), params.get("_sliding_window")
    if "sliding_window" in overrides:
        older, newer = overrides["sliding_window"], None
    if older is not None and newer is not None:
        raise ValueError("expected one of `sliding_window` and `_sliding_window` in params.json, found both")
    given = first(older, newer)
    return tuple(None if w is None else int(w) for w in (given if isinstance(given, list) else [given]))
