"""GPT2LMHeadModel in the Hugging Face layout: `config.json` and tensors named `transformer.h.{i}.`.

Source: transformers 4.37.2 and 5.23.0, models/gpt2. Its Conv1D keeps weights (in, out) and computes x W + b;
`c_attn` holds query, key and value side by side. Cross attention is not read.

B batch, T tokens, D model width, N heads, H head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

REQUIRED = ("n_layer", "n_head")  # in config.json, under these names or those of other models
GENERIC = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
DEFAULTS = {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}  # of GPT2Config
GELUS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
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
        config = {**DEFAULTS, **generic, **config}
        if missing := [name for name in (*REQUIRED, *DEFAULTS) if config.get(name) is None]:
            raise ValueError(f"expected {', '.join(missing)} in config.json, found none")
        for name, wanted in (
            ("scale_attn_weights", True),
            ("scale_attn_by_inverse_layer_idx", False),
            ("add_cross_attention", False),
        ):
            if config.get(name, wanted) != wanted:
                raise ValueError(f"expected `{name}` {wanted} in config.json, found {config[name]}")
        activation = config["activation_function"]
        if activation not in GELUS:
            raise ValueError(
                f"expected `activation_function` to be one of {', '.join(GELUS)}, found {activation}"
            )
        return cls(
            n_layers=int(config["n_layer"]),
            n_heads=int(config["n_head"]),
            norm_eps=float(config["layer_norm_epsilon"]),
            gelu=GELUS[activation],
            tied=bool(config.get("tie_word_embeddings", True)),
        )


def forward(
    ids: Tensor,
    ranks: Sequence[Mapping[str, Tensor]],
    c: Config,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits (B, T, V). `mask` (B, T) is 1 for tokens and 0 for padding, `positions` (B, T) are 0, 1, 2, ...
    in every row by default."""
    x = embed(ids, ranks, c, positions=positions)
    for i in range(c.n_layers):
        x = layer(x, i, ranks, c, mask)
    return head(x, ranks, c)


def embed(
    ids: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config, *, positions: Tensor | None = None
) -> Tensor:
    (w,) = ranks
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)
    return w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][positions]


def layer(
    x: Tensor, i: int, ranks: Sequence[Mapping[str, Tensor]], c: Config, mask: Tensor | None = None
) -> Tensor:
    (w,), p = ranks, f"transformer.h.{i}."
    x = x + attention(layer_norm(x, w, p + "ln_1.", c), w, p + "attn.", c, mask)
    units = conv1d(layer_norm(x, w, p + "ln_2.", c), w, p + "mlp.c_fc.")
    return x + conv1d(F.gelu(units, approximate=c.gelu), w, p + "mlp.c_proj.")


def head(x: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    (w,) = ranks
    output = w["transformer.wte.weight" if c.tied else "lm_head.weight"]
    return wide(layer_norm(x, w, "transformer.ln_f.", c) @ output.T)


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config, mask: Tensor | None) -> Tensor:
    B, T, D = x.shape
    q, k, v = (
        part.view(B, T, c.n_heads, -1).transpose(1, 2)  # (B, N, T, H)
        for part in conv1d(x, w, p + "c_attn.").chunk(3, dim=-1)
    )
    scores = wide(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5)
    hidden = torch.ones(1, 1, T, T, dtype=torch.bool, device=x.device).triu(1)
    if mask is not None:
        hidden = hidden | (mask == 0)[:, None, None, :]
    weights = scores.masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1).to(x.dtype)
    return conv1d((weights @ v).transpose(1, 2).reshape(B, T, D), w, p + "c_proj.")


def conv1d(x: Tensor, w: Mapping[str, Tensor], stem: str) -> Tensor:
    return x @ w[stem + "weight"] + w[stem + "bias"]


def layer_norm(x: Tensor, w: Mapping[str, Tensor], stem: str, c: Config) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[stem + "weight"], w[stem + "bias"], c.norm_eps)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
