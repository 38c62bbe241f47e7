"""Qwen2 (Qwen1.5, Qwen2 and Qwen2.5, dense) in the Hugging Face layout (hf_decoder), without `model.` in the
names for Qwen2Model and with `transformer.` in its place for Qwen2ForQuestionAnswering.

Source: transformers 4.37.2 (but for windows) and 5.23.0, models/qwen2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_heads import DECODERS

ARCHITECTURES = tuple(f"Qwen2{end}" for end in DECODERS)


class Config(hf_decoder.Config):
    answering = "transformer."
    or_null = {
        "num_key_value_heads": 32,
        "max_window_layers": 28,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "layer_types": None,
    }

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        windows = windows_of(config, int(config["num_hidden_layers"]))
        return {"windows": windows, "biased": ("qkv",)}


def windows_of(config: Mapping[str, Any], n_layers: int) -> tuple[int | None, ...]:
    """`use_sliding_window` turns the window on for the layers that `layer_types` calls sliding_attention;
    without that list they are those from `max_window_layers` on. So 4.57.6 and 5.23.0 have it; 4.37.2 has
    the window in every layer with eager attention, whatever the config says, in none with sdpa, and with
    flash attention in those before `max_window_layers`."""
    window, kinds, full = (config[n] for n in ("sliding_window", "layer_types", "max_window_layers"))
    if not config["use_sliding_window"] or window is None:
        return (None,) * n_layers
    if kinds is None and full is None:
        raise ValueError("expected max_window_layers or layer_types beside a window, found null")
    if kinds is None:
        kinds = ["full_attention" if i < int(full) else "sliding_attention" for i in range(n_layers)]
    return hf_decoder.windowed(kinds, window, n_layers)
