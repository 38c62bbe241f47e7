"""Rotary embeddings as transformers computes them: where config.json has their values, and what is done to
the frequencies for longer texts. Two channels H/2 apart are a pair.

Source: transformers 4.57.6 and 5.23.0, modeling_rope_utils.py (rope_type default, linear, dynamic, yarn and
llama3); a dynamic one as in a forward pass of a fresh model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference import NotComputed

TRAINED, LONGEST = "original_max_position_embeddings", "max_position_embeddings"
KINDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", LONGEST),
    "yarn": ("factor", TRAINED),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", TRAINED),
}


@dataclass(frozen=True)
class RopeScaling:
    """`low` and `high` are turns within `original_context` tokens: waves that turn less than `low` times are
    slowed down by `factor`, those that turn more than `high` times are left alone (llama3 and yarn).
    `attention` multiplies cosines and sines."""

    factor: float
    low: float = 1.0
    high: float = 4.0
    original_context: float = 8192.0
    kind: str = "llama3"
    attention: float = 1.0
    truncate: bool = True  # yarn: to whole channels

    @classmethod
    def from_hf(cls, facts: Mapping[str, Any], longest: Any) -> Self | None:
        """`facts` as in config.json, `longest` its max_position_embeddings; None for the default.
        `NotComputed` for another kind, ValueError for one that lacks values."""
        kind = facts.get("rope_type") or facts.get("type") or "default"
        if kind not in KINDS:
            raise NotComputed(f"expected rope_type to be one of {', '.join(KINDS)}, found `{kind}`")
        found = {**facts, TRAINED: facts.get(TRAINED) or longest, LONGEST: longest}
        if missing := [name for name in KINDS[kind] if found.get(name) is None]:
            raise ValueError(f"expected {', '.join(missing)} beside rope_type `{kind}`, found none")
        numbers = [float(found[name]) for name in KINDS[kind]]
        if kind == "llama3":
            factor, low, high, trained = numbers
            return cls(factor, low, high, trained)
        if kind == "yarn":
            slow, fast = (float(facts.get(name) or n) for name, n in (("beta_slow", 1), ("beta_fast", 32)))
            truncate = bool(facts.get("truncate", True))
            return cls(numbers[0], slow, fast, numbers[1], kind, _attention(facts, numbers[0]), truncate)
        return None if kind == "default" else cls(numbers[0], 1.0, 1.0, float(longest or 0), kind)


def _attention(facts: Mapping[str, Any], factor: float) -> float:
    """Of yarn: as given, else from the factor and, if there are both, the two scales."""

    def scale(m: Any = 1.0) -> float:
        return 0.1 * float(m) * math.log(factor) + 1.0 if factor > 1 else 1.0

    if (given := facts.get("attention_factor")) is not None:
        return float(given)
    one, all_channels = facts.get("mscale"), facts.get("mscale_all_dim")
    return scale(one) / scale(all_channels) if one and all_channels else scale()


def rope(config: Mapping[str, Any], default: float, whole: bool = True) -> tuple[float, RopeScaling | None]:
    """Theta and the scaling. transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 both in
    `rope_parameters`; a config without theta means that of its class, `default`. ValueError for two
    values, `NotComputed` for heads that are not turned as a whole where they should be."""
    theta = told_once(config, "rope_theta", None if "rope_theta" in config else default)
    if theta is None:
        raise ValueError("expected a number as rope_theta in config.json, found null")
    if whole and (part := told_once(config, "partial_rotary_factor", 1.0)) != 1:
        raise NotComputed(f"expected whole heads to be turned, found partial_rotary_factor {part}")
    older, newer = _places(config)
    scalings = {RopeScaling.from_hf(facts, config.get(LONGEST)) for facts in (older, newer) if facts}
    if config.get("rope_scaling", {}) is None and newer:
        scalings.add(None)
    if len(scalings) > 1:
        raise ValueError(
            "expected one rotary scaling in config.json, found two in rope_scaling and rope_parameters"
        )
    return theta, scalings.pop() if scalings else None


def told_once(config: Mapping[str, Any], name: str, default: float | None) -> float | None:
    found = {float(f[name]) for f in (config, *_places(config)) if f.get(name) is not None}
    if len(found) > 1:
        raise ValueError(f"expected one {name} in config.json, found {', '.join(map(str, sorted(found)))}")
    return found.pop() if found else default


def _places(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """`rope_scaling` and `rope_parameters`; of values for each kind of layer, those for all."""
    made = []
    for facts in (config.get(key) or {} for key in ("rope_scaling", "rope_parameters")):
        if not isinstance(facts, Mapping):
            raise ValueError(f"expected rotary values as an object in config.json, found {facts!r}")
        kinds = [v for v in facts.values() if isinstance(v, Mapping)]
        nested = bool(kinds) and len(kinds) == len(facts)
        if nested and any(v != kinds[0] for v in kinds):
            raise NotComputed("expected the same rotary values for all kinds of layers, found others")
        made.append(kinds[0] if nested else facts)
    return made


def position_ids(x: Tensor, offset: int, told: Tensor | None) -> Tensor:
    """(T,) of x (B, T, ...), at least float32: as told (B, T), each row of a batch the same, or from `offset`
    on."""
    wide = torch.promote_types(x.dtype, torch.float32)
    made = torch.arange(offset, offset + x.shape[1], device=x.device) if told is None else told[0]
    return made.to(wide)


def rotation(
    x: Tensor,
    theta: float,
    width: int,
    scaling: RopeScaling | None,
    offset: int = 0,
    told: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency for x (B, T, ...), each (T, width), equal in both halves; computed
    in the precision of x, at least float32, and rounded to the dtype of x. The first position is `offset`; a
    frequency that depends on the length of the text counts those before, and keys that were turned stay, as
    they do in the library's cache. `told` as in `position_ids`."""
    dtype, T = torch.promote_types(x.dtype, torch.float32), offset + x.shape[1]
    steps = torch.arange(0, width, 2, dtype=dtype, device=x.device)
    if scaling is not None and scaling.kind == "dynamic":
        factor, trained = scaling.factor, scaling.original_context
        theta *= (factor * max(float(T), trained) / trained - (factor - 1)) ** (width / (width - 2))
    frequencies = 1.0 / theta ** (steps / width)
    if scaling is not None:
        frequencies = stretch(frequencies, theta, scaling)
    angles = position_ids(x, offset, told)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    attention = 1.0 if scaling is None else scaling.attention
    return (angles.cos() * attention).to(x.dtype), (angles.sin() * attention).to(x.dtype)


def stretch(frequencies: Tensor, theta: float, s: RopeScaling) -> Tensor:
    """`keep` is the part of a frequency that is not divided by `factor`: 1 for waves that turn `high` times
    or more within the original context, 0 for those that turn at most `low` times, and linear between, for
    llama3 in the turns, for yarn in the number of the channel."""
    if s.kind in ("dynamic", "linear"):
        return frequencies / s.factor if s.kind == "linear" else frequencies
    if s.kind == "llama3":
        turns = s.original_context * frequencies / (2 * math.pi)
        keep = ((turns - s.low) / (s.high - s.low)).clamp(0, 1)
    else:
        first, last = _channels(theta, 2 * len(frequencies), s)
        number = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
        keep = 1 - ((number - first) / (last - first)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * (frequencies / s.factor)


def _channels(theta: float, width: int, s: RopeScaling) -> tuple[float, float]:
    """The pairs of channels between which yarn goes from one end to the other."""

    def pair(turns: float) -> float:
        return width * math.log(s.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(s.high), pair(s.low)
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    return (first, last + 0.001) if first == last else (first, last)
