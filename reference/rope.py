"""How rotary frequencies are stretched for texts longer than those of the training, as their authors have it.
Two channels are one complex number that position and frequency turn.

Source: linear, Chen et al. 2023 (arXiv 2306.15595), which divides positions; dynamic, the base that grows
with the text ("NTK-aware", bloc97 and emozilla 2023, section 3.1 of the next); yarn, Peng et al. 2023 (arXiv
2309.00071, section 3.3, and the rounding to whole channels of jquesnelle/yarn @3ed4b9d0); llama3,
Grattafiori et al. 2024 and meta-llama/llama-models @43e87a37.

T tokens, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference import NotComputed

ASKED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
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
        missing = [name for name in ASKED[kind] if facts.get(name) is None]
        context = facts.get("original_max_position_embeddings") if kind in ("yarn", "llama3") else None
        if context is None and kind != "llama3":
            context = longest
        if context is None and kind != "linear":
            missing.append("original_max_position_embeddings")
        if missing:
            raise ValueError(f"expected {', '.join(missing)} beside rope_type `{kind}`, found none")
        factor = float(facts["factor"])
        context = float(context or 1)
        if kind == "llama3":
            return cls(factor, float(facts["low_freq_factor"]), float(facts["high_freq_factor"]), context)
        made = cls(factor, original_context=context, kind=kind)
        return made if kind != "yarn" else made._yarn(facts)

    def _yarn(self, facts: Mapping[str, Any]) -> Self:
        """The temperature is 0.1 ln(factor) + 1 unless it is given, or a quotient of two of that kind."""
        given, growth = facts.get("attention_factor"), math.log(max(self.factor, 1.0)) / 10
        over, under = facts.get("mscale"), facts.get("mscale_all_dim")
        if not (over and under):
            over, under = 1.0, 0.0
        worked_out = (1 + growth * float(over)) / (1 + growth * float(under))
        return type(self)(
            self.factor,
            float(facts.get("beta_slow") or 1),
            float(facts.get("beta_fast") or 32),
            self.original_context,
            "yarn",
            worked_out if given is None else float(given),
            bool(facts.get("truncate", True)),
        )


def turns(x: Tensor, theta: float, width: int, s: RopeScaling | None) -> Tensor:
    """exp(i * position * frequency) for the T positions and in the precision of x (B, T, ...): complex
    (T, H/2)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    even = torch.arange(0, width, 2, dtype=dtype, device=x.device)
    positions = torch.arange(x.shape[1], dtype=dtype, device=x.device)
    if s is not None and s.kind == "dynamic":
        theta *= (1 + s.factor * beyond(len(positions), s)) ** (width / (width - 2))
    frequencies = 1.0 / theta ** (even / width)
    length = torch.ones_like(positions)
    if s is not None:
        length = length * s.temperature
        if s.kind == "linear":
            positions = positions / s.factor
        elif s.kind != "dynamic":
            frequencies = stretch(frequencies, s, theta)
    angles = torch.outer(positions, frequencies)
    return torch.polar(length[:, None].expand_as(angles), angles)


def beyond(length: int, s: RopeScaling) -> float:
    """How much longer than the original context a text is, in such contexts."""
    return max(length / s.original_context, 1.0) - 1


def stretch(frequencies: Tensor, s: RopeScaling, theta: float) -> Tensor:
    """Waves of many turns stay, those of few are slowed down by `factor`, those between are blended: by the
    number of turns (llama3), or by their place between the channels that have so many (yarn)."""
    waves = 2 * math.pi / frequencies
    if s.kind == "llama3":
        blend = (s.original_context / waves - s.low) / (s.high - s.low)
    else:
        most, least = (_place(n, s, theta, len(waves)) for n in (s.high, s.low))
        if s.whole:
            most, least = math.floor(most), math.ceil(least)
        most, least = max(most, 0), min(least, 2 * len(waves) - 1)
        place = torch.arange(len(waves), dtype=waves.dtype, device=waves.device)
        blend = (least - place) / (least - most) if least != most else (place <= most).to(waves.dtype)
    blend = blend.clamp(0, 1)
    return torch.lerp(frequencies / s.factor, frequencies, blend)


def _place(turned: float, s: RopeScaling, theta: float, pairs: int) -> float:
    """Which pair of channels, of so many, turns that often in the original context: it need not be whole."""
    return pairs * math.log(s.original_context / (2 * math.pi * turned), theta)
