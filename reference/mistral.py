"""Mistral (7B v0.1 to v0.3, Nemo, Small, Large, Codestral, ...) as Mistral AI published it: `consolidated.*`.

Source: Jiang et al. 2023 (arXiv 2310.06825) and mistralai/mistral-inference @2557e12d, with @c18d5b9b and
@b8181901 for what the first releases left unsaid. Several files of one download hold different tensors, so
together they are one mapping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ckpt_tool.reference import decoder
from ckpt_tool.reference.decoder import embed, forward, head, layer, phases
from ckpt_tool.reference.facts import Shapes, misshapen, refuse, settings
from ckpt_tool.reference.llama import numbers

__all__ = ["Config", "embed", "forward", "head", "layer", "phases"]


@dataclass(frozen=True)
class Config(decoder.Config):
    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any], **more: Any
    ) -> Self:
        """`params` is params.json, `shapes` those of all tensors, `overrides` facts from the user under their
        Hugging Face names, which win; `more` are further fields. ValueError for what none of them tells or
        where they disagree."""
        if ranks != 1:
            raise ValueError(f"expected one rank (Mistral AI's files are not model-parallel), found {ranks}")
        params, overrides = params.get("model", params), _unscaled(overrides)
        # A file without rope_theta is one of the first releases, whose code had 10000 together with a sliding
        # window and 1000000 without (@b8181901); today's code takes 1000000 for both, wrong for 7B v0.1.
        cycles = _cycle(params, overrides), _cycle(params, {})
        theta = 1e4 if any(map(any, cycles)) else 1e6
        made = numbers(params, overrides, theta)
        n_layers, N, K = made["n_layers"], made["n_heads"], made["n_kv_heads"]
        if not cycles[0] or n_layers % len(cycles[0]):
            raise ValueError(
                f"expected a list of windows that fills {n_layers} layers, found {len(cycles[0])} entries"
            )
        windows = cycles[0] * (n_layers // len(cycles[0]))
        c = cls(**made, windows=windows, rope_scaling=None, **more)
        if N % K:
            raise ValueError(f"expected n_heads a multiple of n_kv_heads, found {N} and {K}")
        rows = {"attention.wq": N * c.head_dim, "attention.wk": K * c.head_dim}
        if c.n_experts:
            rows["block_sparse_moe.gate" if c.stacked else "feed_forward.gate"] = c.n_experts
        refuse(misshapen(shapes, {f"layers.0.{n}.weight": (r, c.dim) for n, r in rows.items()}, each=""))
        return c


def _unscaled(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """ValueError for scaled frequencies, which no model of Mistral AI's in this layout has."""
    told = settings(overrides)
    scaling = told.get("rope_scaling") or {}
    if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
        raise ValueError(f"expected rope_type `default`, found `{kind}`")
    return told


def _cycle(params: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One window, perhaps a string, or a list that is repeated over the layers; newer files have
    `_sliding_window`."""
    if "sliding_window" in overrides:
        given = overrides["sliding_window"]
    else:
        given, newer = params.get("sliding_window"), params.get("_sliding_window")
        if given is not None and newer is not None:
            raise ValueError(
                "expected one of `sliding_window` and `_sliding_window` in params.json, found both"
            )
        given = newer if given is None else given
    return tuple(None if w is None else int(w) for w in (given if isinstance(given, list) else [given]))
