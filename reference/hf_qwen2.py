"""Qwen2 (Qwen1.5, Qwen2 and Qwen2.5, dense) in the Hugging Face layout: `config.json` and tensors named
`model.layers.{i}.self_attn.q_proj`, without `model.` for Qwen2Model and with `transformer.` in its place for
Qwen2ForQuestionAnswering.

Source: transformers 4.37.2 (but for windows) and 5.23.0, models/qwen2. Each head as its class computes it,
without dropout.

B batch, T tokens, D model width, N query heads, K key/value heads, H head width, F feed-forward width,
V vocabulary, W window, L labels. Linear weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

# In config.json. Without the last two transformers takes 32 and 10000, which no published model has.
REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "num_key_value_heads",
    "rope_theta",
)
# Architecture -> what its tensors are named by, but for those of heads; the others have `model.`.
PREFIXES = {"Qwen2Model": "", "Qwen2ForQuestionAnswering": "transformer."}
Ranks = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    # per layer, how many keys a query sees, its own included; None sees all before it
    windows: tuple[int | None, ...]
    tied: bool  # the embedding table is also the output layer
    prefix: str  # of all but the heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what this pass does not compute."""
        theta = _theta(config)
        found = {**config, "rope_theta": theta}
        missing = [name for name in REQUIRED if found.get(name) is None]
        if missing:
            raise ValueError(f"expected {', '.join(missing)} in config.json, found none")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"expected `hidden_act` silu in config.json, found {config['hidden_act']}")
        n_layers, n_heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        (architecture, *_) = config.get("architectures") or [""]
        return cls(
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=int(config["num_key_value_heads"]),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // n_heads),
            norm_eps=float(config["rms_norm_eps"]),
            rope_theta=found["rope_theta"],
            windows=_windows(config, n_layers),
            tied=bool(config.get("tie_word_embeddings", False)),
            prefix=PREFIXES.get(architecture, "model."),
        )


def _theta(config: Mapping[str, Any]) -> float | None:
    """`rope_theta` of transformers 4, or of `rope_parameters` in transformers 5."""
    newer = config.get("rope_parameters") or {}
    scaling = newer or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(f"expected rope_type `default` in config.json, found `{kind}`")
    thetas = {float(facts["rope_theta"]) for facts in (config, newer) if facts.get("rope_theta") is not None}
    if len(thetas) > 1:
        raise ValueError(
            f"expected one rope_theta in config.json, found {', '.join(map(str, sorted(thetas)))}"
        )
    return thetas.pop() if thetas else None


def _windows(config: Mapping[str, Any], n_layers: int) -> tuple[int | None, ...]:
    """`use_sliding_window` turns the window on for the layers that `layer_types` calls sliding_attention;
    without that list they are those from `max_window_layers` on. So 4.57.6 and 5.23.0 have it; 4.37.2 has
    the window in every layer with eager attention, whatever the config says, in none with sdpa, and with
    flash attention in those before `max_window_layers`."""
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    if window is None:
        return (None,) * n_layers
    kinds = config.get("layer_types")
    if kinds is None:
        if config.get("max_window_layers") is None:
            raise ValueError(
                "expected max_window_layers or layer_types in config.json beside a window, found none"
            )
        full = int(config["max_window_layers"])
        kinds = ["full_attention" if i < full else "sliding_attention" for i in range(n_layers)]
    if len(kinds) != n_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"expected full_attention or sliding_attention for {n_layers} layers, found {kinds}")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def forward(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    return lm_logits(encode(ids, ranks, c), ranks, c)


def embed(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    (w,) = ranks
    return F.embedding(ids, w[c.prefix + "embed_tokens.weight"])


def layer(x: Tensor, i: int, ranks: Ranks, c: Config) -> Tensor:
    (w,), p = ranks, f"{c.prefix}layers.{i}."
    x = x + attention(rms_norm(x, w[p + "input_layernorm.weight"], c), w, p + "self_attn.", c, c.windows[i])
    return x + feed_forward(rms_norm(x, w[p + "post_attention_layernorm.weight"], c), w, p + "mlp.")


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V) of the last layer's output."""
    return lm_logits(rms_norm(x, ranks[0][c.prefix + "norm.weight"], c), ranks, c)


def encode(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The normalised sequence (B, T, D), which every head starts from."""
    x = embed(ids, ranks, c)
    for i in range(c.n_layers):
        x = layer(x, i, ranks, c)
    return rms_norm(x, ranks[0][c.prefix + "norm.weight"], c)


def base_model(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The sequence itself."""
    return y


def lm_logits(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    (w,) = ranks
    return wide(F.linear(y, w[c.prefix + "embed_tokens.weight" if c.tied else "lm_head.weight"]))


def sequence_classification(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, T, L) of every position, of which the class gives those `of_last_token`."""
    return wide(F.linear(y, ranks[0]["score.weight"]))


def of_last_token(logits: Tensor, ids: Tensor, pad: int | None) -> Tensor:
    """(B, L) of the last id of each row that is not `pad`; of the last one where there is no id for padding.
    transformers 4.37.2 looks for the first padding instead, which is the same but for padding on the left."""
    places = torch.arange(ids.shape[1], device=ids.device)
    last = places[-1:].expand(len(ids)) if pad is None else (places * (ids != pad)).argmax(-1)
    return logits[torch.arange(len(ids), device=ids.device), last]


def token_classification(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, T, L). Not in 4.37.2."""
    return wide(F.linear(y, ranks[0]["score.weight"], ranks[0]["score.bias"]))


def question_answering(y: Tensor, ranks: Ranks, c: Config) -> tuple[Tensor, Tensor]:
    """Logits of the first and of the last token of the answer, (B, T) each. Not in 4.37.2."""
    first, last = wide(F.linear(y, ranks[0]["qa_outputs.weight"], ranks[0]["qa_outputs.bias"])).unbind(-1)
    return first, last


# What `encode` gives goes into each.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": base_model,
    "causal_lm": lm_logits,
    "sequence_classification": sequence_classification,
    "token_classification": token_classification,
    "question_answering": question_answering,
}


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config, window: int | None) -> Tensor:
    B, T, _ = x.shape
    N, K, H = c.n_heads, c.n_kv_heads, c.head_dim
    q, k, v = (
        F.linear(x, w[f"{p}{name}_proj.weight"], w[f"{p}{name}_proj.bias"]).view(B, T, -1, H).transpose(1, 2)
        for name in "qkv"
    )  # (B, N, T, H), (B, K, T, H) twice
    cos, sin = rotation(x, c)
    q = (q * cos + rotate_half(q) * sin).view(B, K, N // K, T, H)
    k = k * cos + rotate_half(k) * sin
    scores = torch.einsum("bkgqh,bkth->bkgqt", q, k) * H**-0.5
    seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    if window is not None:
        seen = seen.triu(1 - window)  # the last `window` keys, the query's own included
    weights = wide(scores.masked_fill(~seen, -math.inf)).softmax(-1).to(x.dtype)
    heads = torch.einsum("bkgqt,bkth->bqkgh", weights, v)
    return F.linear(heads.reshape(B, T, N * H), w[p + "o_proj.weight"])


def rotation(x: Tensor, c: Config) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, (T, H), equal in both halves of H; computed in the precision of
    x, at least float32, and rounded to the dtype of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps = torch.arange(0, c.head_dim, 2, dtype=dtype, device=x.device)
    frequencies = 1.0 / c.rope_theta ** (steps / c.head_dim)
    angles = torch.arange(x.shape[1], dtype=dtype, device=x.device)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """Channels i and i + H/2 are a pair: (a, b) -> (-b, a)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str) -> Tensor:
    gate, up = F.linear(x, w[p + "gate_proj.weight"]), F.linear(x, w[p + "up_proj.weight"])  # (B, T, F)
    return F.linear(F.silu(gate) * up, w[p + "down_proj.weight"])


def rms_norm(x: Tensor, weight: Tensor, c: Config) -> Tensor:
    y = wide(x)
    return weight * (y / (y.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
