"""Ministral 3 in the Hugging Face layout (hf_decoder): yarn, and queries that grow with their position.

Source: transformers 5.23.0, models/ministral3 (eager attention).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_heads import DECODERS
from ckpt_tool.reference.hf_rope import TRAINED
from ckpt_tool.reference.phases import Ranks

ARCHITECTURES = tuple(f"Ministral3{end}" for end in DECODERS)
BETA = "llama_4_scaling_beta"
# Of a config.json without rope_parameters.
USUAL: Mapping[str, Any] = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, TRAINED: 16384, "beta_fast": 32.0},
    **{"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, BETA: 0.1},
}


class Config(hf_decoder.Config):
    absent = {"head_dim": 128}
    or_null = {"num_key_value_heads": 8, "sliding_window": None}
    theta, epsilon = 1000000.0, ("rms_norm_eps", 1e-5)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        rotary = config.get("rope_parameters") or config.get("rope_scaling") or USUAL
        return super().from_hf({**config, "rope_parameters": rotary})

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Both numbers are in the rotary values; the class stops without them."""
        found = config["rope_parameters"]
        if missing := [name for name in (BETA, TRAINED) if found.get(name) is None]:
            raise ValueError(f"expected {', '.join(missing)} in rope_parameters, found none")
        return {"growth": (float(found[BETA]), float(found[TRAINED]))}


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("positions",)


def config_mistakes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What other converters make of params.json."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or USUAL

    def other(**values: Any) -> dict[str, Any]:
        return {"rope_parameters": {**found, **values}}

    ratio = found.get("mscale") and found.get("mscale_all_dim")
    return {
        "queries do not grow with their position": other(**{BETA: 0.0}),
        "queries grow at another length": other(**{TRAINED: 2 * int(found[TRAINED])}),
        "attention factor of the other apply_scale": other(mscale=1.0, mscale_all_dim=0.0 if ratio else 1.0),
        "yarn between parts of channels": other(truncate=False),
    }
