"""Ministral 3 in the Hugging Face layout (hf_decoder): yarn, and queries that grow with their position; and
the text model of Mistral 3, which reads images too, in `language_model.`.

Source: transformers 5.23.0, models/ministral3 and mistral3 (eager attention).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from ckpt_tool.reference import NotComputed, hf_decoder
from ckpt_tool.reference.hf_heads import DECODERS
from ckpt_tool.reference.hf_rope import TRAINED
from ckpt_tool.reference.phases import Ranks

SEEING = "Mistral3ForConditionalGeneration"
ARCHITECTURES = (*(f"Ministral3{end}" for end in DECODERS), SEEING)
# Tensors that no pass here reads, by what they are of.
UNREAD = {"the part that reads images": r"(vision_tower|multi_modal_projector)\..*"}
KIND = "text_config.model_type"
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
    root: ClassVar[str] = "model."

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        if SEEING in (config.get("architectures") or ()) and cls is Config:
            return Seeing.from_hf(config)  # type: ignore[return-value]
        rotary = config.get("rope_parameters") or config.get("rope_scaling") or USUAL
        return super().from_hf({**config, "rope_parameters": rotary})

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Both numbers are in the rotary values; the class stops without them."""
        found = config["rope_parameters"]
        if config.get(KIND) == "mistral":
            return {"prefix": cls.root}
        if missing := [name for name in (BETA, TRAINED) if found.get(name) is None]:
            raise ValueError(f"expected {', '.join(missing)} in rope_parameters, found none")
        return {"growth": (float(found[BETA]), float(found[TRAINED])), "prefix": cls.root}


class Seeing(Config):
    """Of a config.json in parts, or of one in which the text model's values stand beside the others."""

    names = replace(hf_decoder.Names(), output="language_model.lm_head.")
    root = "language_model.model."

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        text = config.get("text_config")
        if text is not None:
            whole = {"architectures": [SEEING], KIND: text.get("model_type", "mistral")}
            config = {**text, **whole, "tie_word_embeddings": config.get("tie_word_embeddings", True)}
        if (kind := config.get(KIND, "mistral")) not in ("mistral", "ministral3"):
            raise NotComputed(f"expected a text model of mistral or ministral3, found {kind}")
        return super().from_hf({"tie_word_embeddings": True, **config})


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("positions",)


def config_mistakes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What other converters make of params.json."""
    if config.get(KIND) == "mistral":
        return {}
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
