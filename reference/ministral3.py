"""Ministral 3, Devstral 2 and others of Mistral AI's whose params.json has `yarn`, text alone.

Source: Peng et al. 2023 (arXiv 2309.00071) for yarn; vllm-project/vllm @01da88c (configs/mistral.py) and
ggml-org/llama.cpp pull request 22612 for what `apply_scale` does: with it queries and keys are 0.1 ln(factor)
+ 1 times as large each, without it they stay; the growth of queries with their position after
meta-llama/llama-models (llama4/model.py), whose length is that of `llama_4_scaling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from ckpt_tool.reference import decoder
from ckpt_tool.reference.facts import Shapes, first, opened, refuse, settings
from ckpt_tool.reference.llama import NAMES, check, names_of, numbers
from ckpt_tool.reference.mistral import WINDOWS, cycle_of
from ckpt_tool.reference.phases import Ranks
from ckpt_tool.reference.rope import CONTEXT, RopeScaling

__all__ = ["NAMES", "Config", "inputs"]

OURS = frozenset(("yarn", "llama_4_scaling"))


class Config(decoder.Config):
    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` is params.json, `overrides` facts from the user, which win. ValueError for what none of
        them tells."""
        if ranks != 1:
            raise ValueError(f"expected one rank (Mistral AI's files are not model-parallel), found {ranks}")
        params, overrides = settings(opened(params), overrides), settings(overrides)
        own = {"apply_scale", "llama_4_scaling_beta", "yarn_factor", "yarn_length", "yarn_beta", "yarn_alpha"}
        check(params, {k: v for k, v in overrides.items() if k not in own}, WINDOWS | OURS)
        made = numbers(params, overrides, 1e6)
        cycle = cycle_of(params, overrides)
        if len(set(cycle)) != 1:
            raise ValueError(f"expected one window for all layers, found {cycle}")
        scaling = _yarn(params.get("yarn") or {}, overrides)
        return cls(
            **made,
            windows=cycle[:1] * made["n_layers"],
            rope_scaling=scaling,
            names=names_of(params, overrides, shapes),
            far=_growth(params.get("llama_4_scaling") or {}, overrides, scaling.original_context),
        )


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    """A text may begin at any position: what changes beyond the first ones is seen there."""
    return ("positions",)


def _yarn(told: Mapping[str, Any], overrides: Mapping[str, Any]) -> RopeScaling:
    if (given := overrides.get("rope_scaling")) and (made := RopeScaling.from_hf(given)) is not None:
        return made
    names = {"factor": "yarn_factor", CONTEXT: "yarn_length", "beta": "yarn_beta", "alpha": "yarn_alpha"}
    found = {n: first(overrides.get(own), told.get(n)) for n, own in (*names.items(), ("apply_scale",) * 2)}
    refuse([f"expected yarn.{n} in params.json, found none" for n, value in found.items() if value is None])
    factor = float(found["factor"])
    warm = 1 + math.log(max(factor, 1.0)) / 10 if found["apply_scale"] else 1.0
    return RopeScaling(
        factor, float(found["alpha"]), float(found["beta"]), float(found[CONTEXT]), "yarn", warm
    )


def _growth(
    told: Mapping[str, Any], overrides: Mapping[str, Any], trained: float
) -> tuple[float, float] | None:
    """Beta, and the length at whose multiples queries grow."""
    given = overrides.get("rope_scaling") or {}
    beta = first(overrides.get("llama_4_scaling_beta"), given.get("llama_4_scaling_beta"), told.get("beta"))
    return (float(beta), float(first(told.get(CONTEXT), trained))) if beta else None
