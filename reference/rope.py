"""How rotary frequencies are stretched for texts longer than those of the training, as their authors have it.
Two channels are one complex number that position and frequency turn.

Source: linear, Chen et al. 2023 (arXiv 2306.15595), which divides positions; dynamic, the base that grows
with the text ("NTK-aware", bloc97 and emozilla 2023, section 3.1 of the next); yarn, Peng et al. 2023 (arXiv
2309.00071, section 3.3, and the rounding to whole channels of jquesnelle/yarn @3ed4b9d0); llama3,
Grattafiori et al. 2024 and meta-llama/llama-models @43e87a37.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference import NotComputed

CONTEXT = "original_max_position_embeddings"
ASKED = {
    "linear": ("factor",),
    "dynamic": ("factor", CONTEXT),
    "yarn": ("factor", CONTEXT),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", CONTEXT),
}


@dataclass(frozen=True)
class RopeScaling:
    """`original_context` in tokens. `low` and `high`: waves with fewer and more turns in it are slowed down,
    or kept."""

    factor: float
    low: float = 1.0
    high: float = 4.0
    original_context: float = 8192.0
    kind: str = "llama3"
    temperature: float = 1.0  # on the turned queries and keys each
    whole: bool = True  # yarn: from a whole channel to a whole channel

    @classmethod
    def from_hf(cls, facts: Mapping[str, Any], longest: Any = None) -> Self | None:
        """`facts` is `rope_scaling` as in config.json, `longest` the number of positions that the config is
        for. None for no scaling, `NotComputed` for a kind that is not known here, ValueError for missing
        values."""
        kind = facts.get("rope_type", facts.get("type"))
        if kind in (None, "default"):
            return None
        if kind not in ASKED:
            raise NotComputed(f"expected rope_type to be one of {', '.join(ASKED)}, found `{kind}`")
        own = facts.get(CONTEXT) if kind in ("yarn", "llama3") else None
        told = {**facts, CONTEXT: longest if own is None and kind != "llama3" else own}
        if missing := [name for name in ASKED[kind] if told.get(name) is None]:
            raise ValueError(f"expected {', '.join(missing)} beside rope_type `{kind}`, found none")
        factor, context = float(facts["factor"]), float(told[CONTEXT] or 1)
        if kind == "llama3":
            return cls(factor, float(facts["low_freq_factor"]), float(facts["high_freq_factor"]), context)
        slow, fast = float(facts.get("beta_slow") or 1), float(facts.get("beta_fast") or 32)
        warm = temperature(facts, factor) if kind == "yarn" else 1.0
        return cls(factor, slow, fast, context, kind, warm, bool(facts.get("truncate", True)))


def temperature(facts: Mapping[str, Any], factor: float) -> float:
    """Of yarn: 0.1 ln(factor) + 1 unless it is given, or a quotient of two of that kind."""
    if facts.get("attention_factor") is not None:
        return float(facts["attention_factor"])
    growth, over, under = math.log(max(factor, 1.0)) / 10, facts.get("mscale"), facts.get("mscale_all_dim")
    if not (over and under):
        over, under = 1.0, 0.0
    return (1 + growth * float(over)) / (1 + growth * float(under))


def places(x: Tensor, before: int, given: Tensor | None) -> Tensor:
    """The positions (T,) of the tokens of x (B, T, ...), at least float32: those `given` (B, T), which all
    rows of a batch share, else the T after those before."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if given is not None:
        return given[0].to(dtype)
    return torch.arange(before, before + x.shape[1], dtype=dtype, device=x.device)


def turns(
    x: Tensor,
    theta: float,
    width: int,
    s: RopeScaling | None,
    before: int = 0,
    given: Tensor | None = None,
) -> Tensor:
    """exp(i * position * frequency) for the positions of x (see `places`), in its precision: complex (T,
    width/2)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    even = torch.arange(0, width, 2, dtype=dtype, device=x.device)
    positions = places(x, before, given)
    if s is not None and s.kind == "dynamic":  # by how many contexts the text is longer than the first
        beyond = max((before + len(positions)) / s.original_context, 1.0) - 1
        theta *= (1 + s.factor * beyond) ** (width / (width - 2))
    frequencies = 1.0 / theta ** (even / width)
    if s is not None and s.kind == "linear":
        positions = positions / s.factor
    elif s is not None and s.kind != "dynamic":
        frequencies = stretch(frequencies, s, theta)
    angles = torch.outer(positions, frequencies)
    return torch.polar(torch.full_like(angles, 1.0 if s is None else s.temperature), angles)


def stretch(frequencies: Tensor, s: RopeScaling, theta: float) -> Tensor:
    """Waves of many turns stay, those of few are slowed down by `factor`, those between are blended: by the
    number of turns (llama3), or by their place between the channels that have so many (yarn)."""
    waves, pairs = 2 * math.pi / frequencies, len(frequencies)
    if s.kind == "llama3":
        blend = (s.original_context / waves - s.low) / (s.high - s.low)
    else:
        spans = (s.original_context / (2 * math.pi * turned) for turned in (s.high, s.low))
        most, least = (pairs * math.log(span, theta) for span in spans)  # pairs that turn so often
        if s.whole:
            most, least = math.floor(most), math.ceil(least)
        most, least = max(most, 0), min(least, 2 * pairs - 1)
        place = torch.arange(pairs, dtype=waves.dtype, device=waves.device)
        blend = (least - place) / (least - most) if least != most else (place <= most).to(waves.dtype)
    return torch.lerp(frequencies / s.factor, frequencies, blend.clamp(0, 1))
