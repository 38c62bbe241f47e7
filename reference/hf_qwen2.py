"""Qwen2 (Qwen1.5, Qwen2 and Qwen2.5, dense) in the Hugging Face layout (hf_decoder), without `model.` in the
names for Qwen2Model and with `transformer.` in its place for Qwen2ForQuestionAnswering. Each head as its
class computes it, without dropout.

Source: transformers 4.37.2 (but for windows) and 5.23.0, models/qwen2.

B batch, T tokens, D model width, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_blocks import linear, span_logits, wide
from ckpt_tool.reference.phases import Ranks, trunk

# Architecture -> what its tensors are named by, but for those of heads.
PREFIXES = {
    "Qwen2Model": "",
    "Qwen2ForCausalLM": "model.",
    "Qwen2ForSequenceClassification": "model.",
    "Qwen2ForTokenClassification": "model.",
    "Qwen2ForQuestionAnswering": "transformer.",
}
ARCHITECTURES = tuple(PREFIXES)


class Config(hf_decoder.Config):
    or_null = {
        "num_key_value_heads": 32,
        "max_window_layers": 28,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "layer_types": None,
        "architectures": None,
    }

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        (architecture, *_) = config["architectures"] or [""]
        windows = windows_of(config, int(config["num_hidden_layers"]))
        return {"windows": windows, "biased": ("qkv",), "prefix": PREFIXES.get(architecture, "model.")}


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


def encode(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The normalised sequence (B, T, D), which every head starts from."""
    return hf_decoder.final_norm(trunk(hf_decoder.phases(ranks, c), ids), ranks, c)


# What `encode` gives goes into each. Logits are (B, T, L), of which the class for sequences gives those
# `hf_blocks.of_last_token`. 4.37.2 knows the first three.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": lambda y, ranks, c: y,
    "causal_lm": hf_decoder.lm_logits,
    "sequence_classification": lambda y, ranks, c: wide(linear(y, ranks[0], "score.", bias=False)),
    "token_classification": lambda y, ranks, c: wide(linear(y, ranks[0], "score.")),
    "question_answering": lambda y, ranks, c: span_logits(y, ranks[0]),
}
