"""GPTJForCausalLM in the Hugging Face layout: `config.json` and tensors named `transformer.h.{i}.` with
`attn.q_proj`, `attn.k_proj` and `attn.v_proj`.

Source: Wang and Komatsuzaki 2021 (GPT-J-6B); transformers 4.37.2 and 5.23.0, models/gptj.

B batch, T tokens, D model width, N heads, H head width, R channels of a head that are turned, F feed-forward
width, V vocabulary. Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

REQUIRED = ("n_layer", "n_head", "n_embd")  # in config.json, under these names or those of other models
GENERIC = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
DEFAULTS = {"rotary_dim": 64, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}  # of GPTJConfig
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    rotary_dim: int
    norm_eps: float
    gelu: str  # as torch calls it: "none" is erf, or "tanh"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what this pass does not compute."""
        generic = {name: config.get(other) for name, other in GENERIC.items()}
        config = {**DEFAULTS, **generic, **config}
        if missing := [name for name in (*REQUIRED, *DEFAULTS) if config.get(name) is None]:
            raise ValueError(f"expected {', '.join(missing)} in config.json, found none")
        if config.get("tie_word_embeddings"):
            raise ValueError("expected `tie_word_embeddings` false in config.json, found true")
        if (activation := config["activation_function"]) not in GELUS:
            raise ValueError(
                f"expected `activation_function` to be one of {', '.join(GELUS)}, found {activation}"
            )
        width, heads, turned = (int(config[name]) for name in ("n_embd", "n_head", "rotary_dim"))
        if heads < 1 or width % heads:
            raise ValueError(f"expected `n_head` that divides {width}, found {heads}")
        if turned % 2 or not 0 < turned <= width // heads:
            raise ValueError(f"expected an even `rotary_dim` up to {width // heads}, found {turned}")
        return cls(
            n_layers=int(config["n_layer"]),
            n_heads=heads,
            rotary_dim=turned,
            norm_eps=float(config["layer_norm_epsilon"]),
            gelu=GELUS[activation],
        )


def forward(
    ids: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config, *, mask: Tensor | None = None
) -> Tensor:
    """Logits (B, T, V). `mask` (B, T) is 1 for tokens and 0 for padding, by default there is none."""
    x = embed(ids, ranks, c)
    for i in range(c.n_layers):
        x = layer(x, i, ranks, c, mask)
    return head(x, ranks, c)


def embed(ids: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    (w,) = ranks
    return F.embedding(ids, w["transformer.wte.weight"])


def layer(
    x: Tensor, i: int, ranks: Sequence[Mapping[str, Tensor]], c: Config, mask: Tensor | None = None
) -> Tensor:
    (w,), p = ranks, f"transformer.h.{i}."
    y = layer_norm(x, w, p + "ln_1.", c)
    units = F.gelu(linear(y, w, p + "mlp.fc_in."), approximate=c.gelu)
    return attention(y, w, p + "attn.", c, mask) + linear(units, w, p + "mlp.fc_out.") + x


def head(x: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    (w,) = ranks
    return wide(linear(layer_norm(x, w, "transformer.ln_f.", c), w, "lm_head."))


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config, mask: Tensor | None) -> Tensor:
    B, T, D = x.shape
    q, k, v = (
        F.linear(x, w[f"{p}{name}_proj.weight"]).view(B, T, c.n_heads, -1).transpose(1, 2)  # (B, N, T, H)
        for name in "qkv"
    )
    q, k = wide(rotate(q, c)), wide(rotate(k, c))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    hidden = torch.ones(1, 1, T, T, dtype=torch.bool, device=x.device).triu(1)
    if mask is not None:
        hidden = hidden | (mask == 0)[:, None, None, :]
    weights = scores.masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1).to(x.dtype)
    return F.linear((weights @ v).transpose(1, 2).reshape(B, T, D), w[p + "out_proj.weight"])


def rotate(x: Tensor, c: Config) -> Tensor:
    """Pairs of neighbours among the first R channels are turned: (a, b) -> (a cos - b sin, b cos + a sin),
    with sines and cosines rounded to the dtype of x; x (B, N, T, H)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps = torch.arange(0, c.rotary_dim, 2, dtype=dtype, device=x.device)
    angles = torch.arange(x.shape[2], dtype=dtype, device=x.device)[:, None] / 10000 ** (steps / c.rotary_dim)
    sin, cos = angles.sin().to(x.dtype), angles.cos().to(x.dtype)  # (T, R/2)
    a, b = x[..., : c.rotary_dim : 2], x[..., 1 : c.rotary_dim : 2]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., c.rotary_dim :]], dim=-1)


def linear(x: Tensor, w: Mapping[str, Tensor], stem: str) -> Tensor:
    return F.linear(x, w[stem + "weight"], w[stem + "bias"])


def layer_norm(x: Tensor, w: Mapping[str, Tensor], stem: str, c: Config) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[stem + "weight"], w[stem + "bias"], c.norm_eps)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
