"""GPT2LMHeadModel in the Hugging Face layout: `config.json` and tensors named `transformer.h.{i}.`.

Source: transformers 4.37.2 and 5.23.0, models/gpt2. Its Conv1D keeps weights (in, out) and computes x W + b;
`c_attn` holds query, key and value side by side. Cross attention is not read.

B batch, T tokens, D model width, N heads, H head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference.hf_blocks import (
    GELUS,
    complete,
    conv1d,
    layer_norm,
    one_of,
    only,
    split_heads,
    unseen,
    weigh,
    wide,
)
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes

ARCHITECTURES = ("GPT2LMHeadModel",)
REQUIRED = ("n_layer", "n_head")  # in config.json, under these names or those of other models
GENERIC = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
DEFAULTS = {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}  # of GPT2Config
COMPUTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    norm_eps: float
    gelu: str  # as torch calls it: "none" is erf, or "tanh"
    tied: bool  # the embedding table is also the output layer

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what this pass does not compute."""
        generic = {name: config.get(other) for name, other in GENERIC.items()}
        config = complete({**generic, **config}, REQUIRED, DEFAULTS)
        only(config, COMPUTED)
        return cls(
            n_layers=int(config["n_layer"]),
            n_heads=int(config["n_head"]),
            norm_eps=float(config["layer_norm_epsilon"]),
            gelu=one_of(config, "activation_function", GELUS),
            tied=bool(config.get("tie_word_embeddings", True)),
        )


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


forward, encode = passes(phases)


def embed(ids: Tensor, ranks: Ranks, c: Config, *, positions: Tensor | None = None) -> Tensor:
    (w,) = ranks
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)
    return w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][positions]


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    (w,), p = ranks, f"transformer.h.{i}."
    fused = conv1d(layer_norm(x, w, p + "ln_1.", c.norm_eps), w, p + "attn.c_attn.")
    q, k, v = (split_heads(part, c.n_heads) for part in fused.chunk(3, dim=-1))  # (B, N, T, H)
    scores = wide(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5)
    x = x + conv1d(weigh(scores, v, unseen(x, mask)), w, p + "attn.c_proj.")
    y = layer_norm(x, w, p + "ln_2.", c.norm_eps)
    units = conv1d(y, w, p + "mlp.c_fc.")
    return x + conv1d(F.gelu(units, approximate=c.gelu), w, p + "mlp.c_proj.")


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    (w,) = ranks
    output = w["transformer.wte.weight" if c.tied else "lm_head.weight"]
    return wide(layer_norm(x, w, "transformer.ln_f.", c.norm_eps) @ output.T)
