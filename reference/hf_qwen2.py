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

from ckpt_tool.reference import hf_rope
from ckpt_tool.reference.hf_rope import RopeScaling, rope, rotate_half

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # in config.json
# What Qwen2Config takes for other keys that are absent; null heads are as many as there are queries.
DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
OR_NULL = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
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
    rope_scaling: RopeScaling | None
    # per layer, how many keys a query sees, its own included; None sees all before it
    windows: tuple[int | None, ...]
    tied: bool  # the embedding table is also the output layer
    prefix: str  # of all but the heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what this pass does not compute."""
        config = {**DEFAULTS, **OR_NULL, **config}
        theta, scaling = rope(config, default=10000.0)
        if missing := [name for name in (*REQUIRED, *DEFAULTS) if config.get(name) is None]:
            raise ValueError(f"expected {', '.join(missing)} in config.json, found none")
        if config["hidden_act"] not in ("silu", "swish"):
            raise ValueError(f"expected `hidden_act` silu in config.json, found {config['hidden_act']}")
        n_layers, n_heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        (architecture, *_) = config.get("architectures") or [""]
        return cls(
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=int(config["num_key_value_heads"] or n_heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // n_heads),
            norm_eps=float(config["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling=scaling,
            windows=_windows(config, n_layers),
            tied=bool(config.get("tie_word_embeddings", False)),
            prefix=PREFIXES.get(architecture, "model."),
        )


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
        if config["max_window_layers"] is None:
            raise ValueError("expected max_window_layers or layer_types beside a window, found null")
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
    return hf_rope.rotation(x, c.rope_theta, c.head_dim, c.rope_scaling)


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str) -> Tensor:
    gate, up = F.linear(x, w[p + "gate_proj.weight"]), F.linear(x, w[p + "up_proj.weight"])  # (B, T, F)
    return F.linear(F.silu(gate) * up, w[p + "down_proj.weight"])


def rms_norm(x: Tensor, weight: Tensor, c: Config) -> Tensor:
    y = wide(x)
    return weight * (y / (y.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
