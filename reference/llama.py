"""Llama 1, 2, 3.x (text) and Code Llama as Meta published them: `consolidated.NN.pth`, one file per rank.

Source: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288), Grattafiori et al. 2024 (arXiv 2407.21783), and
Meta's code: meta-llama/llama @57b0eb62 (1) and @689c7f26 (2), meta-llama/codellama @077f7332,
meta-llama/llama-models @43e87a37 (3.x).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from ckpt_tool.reference import decoder
from ckpt_tool.reference.decoder import Names
from ckpt_tool.reference.facts import Shapes, fact, settings
from ckpt_tool.reference.rope import RopeScaling

NAMES = Names(
    word="tok_embeddings.weight",
    block="layers.",
    norm_1="attention_norm.",
    qkv=("attention.wq.", "attention.wk.", "attention.wv."),
    out="attention.wo.",
    norm_2="ffn_norm.",
    units=("feed_forward.w1.", "feed_forward.w3."),
    down="feed_forward.w2.",
    final_norm="norm.",
    output="output.weight",
)


def numbers(params: Mapping[str, Any], overrides: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """Those that params.json of Meta and of Mistral AI have alike; `theta` where none is told."""
    dim = int(fact("dim", "hidden_size", params, overrides))
    n_heads = int(fact("n_heads", "num_attention_heads", params, overrides))
    return {
        "n_layers": int(fact("n_layers", "num_hidden_layers", params, overrides)),
        "dim": dim,
        "n_heads": n_heads,
        "n_kv_heads": int(fact("n_kv_heads", "num_key_value_heads", params, overrides, n_heads)),
        "head_dim": int(fact("head_dim", "head_dim", params, overrides, dim // n_heads)),
        "norm_eps": float(fact("norm_eps", "rms_norm_eps", params, overrides)),
        "rope_theta": float(fact("rope_theta", "rope_theta", params, overrides, theta)),
        "names": NAMES,
    }


class Config(decoder.Config):
    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` is params.json, `shapes` those of rank 0, `overrides` facts from the user under their
        Hugging Face names, which win. ValueError for what none of them tells."""
        params, overrides = params.get("model", params), settings(overrides)  # some exports nest params
        # Llama 1 and 2 have 10000 in the code and Code Llama as default, Llama 3's code defaults to 500000;
        # only Llama 3 has 128256 words or knows `use_scaled_rope`.
        words = shapes.get("output.weight", (0,))[0] * ranks
        theta = 500000.0 if words == 128256 or "use_scaled_rope" in params else 10000.0
        made = numbers(params, overrides, theta)
        scaling = _rope_scaling(params, overrides, made["dim"], made["n_layers"])
        return cls(**made, windows=(None,) * made["n_layers"], rope_scaling=scaling)


def _rope_scaling(
    params: Mapping[str, Any], overrides: Mapping[str, Any], dim: int, n_layers: int
) -> RopeScaling | None:
    if "rope_scaling" in overrides:
        return RopeScaling.from_hf(overrides["rope_scaling"] or {}, overrides.get("max_position_embeddings"))
    if not params.get("use_scaled_rope", False):
        return None
    # params.json has no factor. Meta's code says 8 for every model, but 3.2 1B and 3B were trained with 32
    # (llama-models issues 166 and 241, and their config.json on the Hub).
    return RopeScaling(factor=32.0 if (dim, n_layers) in ((2048, 16), (3072, 28)) else 8.0)
