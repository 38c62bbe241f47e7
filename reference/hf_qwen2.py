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
from ckpt_tool.reference.hf_blocks import linear, of_last_token, span_logits, wide
from ckpt_tool.reference.hf_decoder import (
    embed,
    final_norm,
    forward,
    head,
    layer,
    lm_logits,
    phases,
    windowed,
)
from ckpt_tool.reference.phases import Ranks, trunk

__all__ = ["Config", "embed", "encode", "forward", "head", "layer", "of_last_token", "phases"]

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
        return {"windows": windows, "biased": True, "prefix": PREFIXES.get(architecture, "model.")}


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
    return windowed(kinds, window, n_layers)


def encode(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The normalised sequence (B, T, D), which every head starts from."""
    return final_norm(trunk(phases(ranks, c), ids), ranks, c)


def base_model(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The sequence itself."""
    return y


def sequence_classification(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, T, L) of every position, of which the class gives those `of_last_token`."""
    return wide(linear(y, ranks[0], "score.", bias=False))


def token_classification(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, T, L). Not in 4.37.2."""
    return wide(linear(y, ranks[0], "score."))


def question_answering(y: Tensor, ranks: Ranks, c: Config) -> tuple[Tensor, Tensor]:
    """Not in 4.37.2."""
    return span_logits(y, ranks[0])


# What `encode` gives goes into each.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": base_model,
    "causal_lm": lm_logits,
    "sequence_classification": sequence_classification,
    "token_classification": token_classification,
    "question_answering": question_answering,
}
