"""Llama 1, 2, 3.x (text) and Code Llama as Meta published them: `consolidated.NN.pth`, one file per rank.

Source: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288), Grattafiori et al. 2024 (arXiv 2407.21783), and
Meta's code: meta-llama/llama @57b0eb62 (1) and @689c7f26 (2), meta-llama/codellama @077f7332,
meta-llama/llama-models @43e87a37 (3.x). The model-parallel ranks stay apart as they do there: each computes
its own heads, hidden units and words, and the partial results are added or joined.

B batch, T tokens, D model width, N query heads, K key/value heads, H head width, F feed-forward width,
V vocabulary, S ranks. Linear weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import silu

from ckpt_tool.reference.rope import RopeScaling, turns


@dataclass(frozen=True)
class Config:
    n_layers: int
    dim: int
    n_heads: int  # of the whole model, as all counts here
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None

    @classmethod
    def from_original(
        cls,
        params: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        ranks: int,
        overrides: Mapping[str, Any],
    ) -> Self:
        """`params` is params.json, `shapes` those of rank 0, `overrides` facts from the user under their
        Hugging Face names, which win. ValueError for what none of them tells or where they disagree."""
        params, overrides = params.get("model", params), _settings(overrides)  # some exports nest params
        dim = int(_fact("dim", "hidden_size", params, overrides))
        n_layers = int(_fact("n_layers", "num_hidden_layers", params, overrides))
        n_heads = int(_fact("n_heads", "num_attention_heads", params, overrides))
        n_kv_heads = int(_fact("n_kv_heads", "num_key_value_heads", params, overrides, n_heads))
        theta = _fact("rope_theta", "rope_theta", params, overrides, _default_theta(params, shapes, ranks))
        c = cls(
            n_layers=n_layers,
            dim=dim,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=int(_fact("head_dim", "head_dim", params, overrides, dim // n_heads)),
            norm_eps=float(_fact("norm_eps", "rms_norm_eps", params, overrides)),
            rope_theta=float(theta),
            rope_scaling=_rope_scaling(params, overrides, dim, n_layers),
        )
        if n_heads % ranks or n_heads % n_kv_heads or (n_kv_heads % ranks and ranks % n_kv_heads):
            raise ValueError(
                f"expected head counts that {ranks} ranks can share, found {n_heads} and {n_kv_heads}"
            )
        for name, heads in (("wq", n_heads // ranks), ("wk", max(1, n_kv_heads // ranks))):
            name, wanted = f"layers.0.attention.{name}.weight", (heads * c.head_dim, dim)
            if (found := tuple(shapes.get(name, ()))) != wanted:
                raise ValueError(f"expected `{name}` of shape {wanted} on each rank, found {found}")
        return c


def _settings(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """`overrides` in the names of transformers 4: 5 keeps theta and scaling in `rope_parameters`."""
    newer = overrides.get("rope_parameters")
    if newer is None:
        return overrides
    scaled = newer.get("rope_type", "default") != "default"
    return {"rope_theta": newer.get("rope_theta"), "rope_scaling": newer if scaled else None, **overrides}


def _fact(
    name: str, hf_name: str, params: Mapping[str, Any], overrides: Mapping[str, Any], default: Any = None
) -> Any:
    for key, facts in ((hf_name, overrides), (name, params)):
        if facts.get(key) is not None:
            return facts[key]
    if default is None:
        raise ValueError(f"expected `{name}` in params.json or `{hf_name}` given by name, found neither")
    return default


def _default_theta(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], ranks: int) -> float:
    """Llama 1 and 2 have 10000 in the code and Code Llama as default, Llama 3's code defaults to 500000; only
    Llama 3 has 128256 words or knows `use_scaled_rope`."""
    words = shapes.get("output.weight", (0,))[0] * ranks
    return 500000.0 if words == 128256 or "use_scaled_rope" in params else 10000.0


def _rope_scaling(
    params: Mapping[str, Any], overrides: Mapping[str, Any], dim: int, n_layers: int
) -> RopeScaling | None:
    if "rope_scaling" in overrides:
        given = overrides["rope_scaling"]
        return None if given is None else RopeScaling.from_hf(given, overrides.get("max_position_embeddings"))
    if not params.get("use_scaled_rope", False):
        return None
    # params.json has no factor. Meta's code says 8 for every model, but 3.2 1B and 3B were trained with 32
    # (llama-models issues 166 and 241, and their config.json on the Hub).
    return RopeScaling(factor=32.0 if (dim, n_layers) in ((2048, 16), (3072, 28)) else 8.0)


def forward(ids: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    x = embed(ids, ranks, c)
    for i in range(c.n_layers):
        x = layer(x, i, ranks, c)
    return head(x, ranks, c)


def embed(ids: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    """Each rank holds D/S columns of every word (Llama 1, 2, Code Llama) or V/S whole words (Llama 3)."""
    tables = [w["tok_embeddings.weight"] for w in ranks]
    if all(table.shape[1] != c.dim for table in tables):
        return torch.cat([table[ids] for table in tables], dim=-1)  # (B, T, S * D/S)
    parts, first = [], 0
    for table in tables:  # (V/S, D)
        own = (first <= ids) & (ids < first + len(table))
        parts.append(torch.where(own[..., None], table[torch.where(own, ids - first, 0)], 0))
        first += len(table)
    return all_reduce(parts)


def layer(x: Tensor, i: int, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    """Each rank normalises with its own copy of the norm weights, as it does in the original."""
    p, S = f"layers.{i}.", len(ranks)
    x = x + all_reduce(
        attention(rms_norm(x, w[p + "attention_norm.weight"], c), w, p + "attention.", c, S) for w in ranks
    )
    return x + all_reduce(
        feed_forward(rms_norm(x, w[p + "ffn_norm.weight"], c), w, p + "feed_forward.") for w in ranks
    )


def head(x: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    logits = [rms_norm(x, w["norm.weight"], c) @ w["output.weight"].T for w in ranks]  # (B, T, V/S) each
    return wide(torch.cat(logits, dim=-1))


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config, S: int) -> Tensor:
    """The part of the sum over heads that this rank's heads contribute: (B, T, D)."""
    B, T, _ = x.shape
    N, K, H = c.n_heads // S, max(1, c.n_kv_heads // S), c.head_dim  # with K < S ranks share a kv head
    q = (x @ w[p + "wq.weight"].T).view(B, T, N, H)
    k = (x @ w[p + "wk.weight"].T).view(B, T, K, H)
    v = (x @ w[p + "wv.weight"].T).view(B, T, K, H)
    turned = rotation(x, c)
    q, k = rotate(q, turned), rotate(k, turned)
    k, v = k.repeat_interleave(N // K, dim=2), v.repeat_interleave(N // K, dim=2)  # (B, T, N, H)
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(H)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    weights = wide(scores.masked_fill(future, -math.inf)).softmax(-1).to(x.dtype)
    heads = torch.einsum("bnqk,bknh->bqnh", weights, v)
    return heads.reshape(B, T, N * H) @ w[p + "wo.weight"].T


def rotation(x: Tensor, c: Config) -> Tensor:
    return turns(x, c.rope_theta, c.head_dim, c.rope_scaling)


def rotate(x: Tensor, turned: Tensor) -> Tensor:
    """Channels 2i and 2i+1 of every head are one complex number, turned by its position; x (B, T, N, H)."""
    pairs = torch.view_as_complex(wide(x).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turned[:, None]).flatten(-2).to(x.dtype)


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str) -> Tensor:
    """The part of the sum over hidden units that this rank's F/S units contribute: (B, T, D)."""
    gate, up = x @ w[p + "w1.weight"].T, x @ w[p + "w3.weight"].T  # (B, T, F/S)
    return (silu(gate) * up) @ w[p + "w2.weight"].T


def rms_norm(x: Tensor, weight: Tensor, c: Config) -> Tensor:
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + c.norm_eps)).to(x.dtype) * weight


def all_reduce(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
