"""CodeGen 1 (350M, 2B, 6B, 16B; nl, multi, mono) as Salesforce published it: `config.json` and
`pytorch_model.bin`, whose tensors have the names that transformers took over.

Source: Nijkamp et al. 2022 (arXiv 2203.13474); salesforce/CodeGen @6f09e495, codegen1/jaxformer/hf; and for
what the order of `qkv_proj` comes from, salesforce/jaxformer @026b4ed6, which trained it on `mp_num` cores.

As the names are shared, this pass is kept apart from `ckpt_tool.reference.hf_codegen` by what it is written
after. It is the training program: each core has its own rows of `qkv_proj` and its own heads, their results
are added, and two channels are one complex number that is turned. That other one is transformers' module: one
projection, cut afterwards, and tables of sines and cosines.

B batch, T tokens, D model width, N heads, H head width, R channels of a head that are turned, F feed-forward
width, V vocabulary, M cores. Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import pi
from typing import Any, Self

import torch
from torch import Tensor

MASKED = -1e9  # the score of a key that is not to be seen
THETA = 10000.0  # fixed in the code
CORES = 4  # every published model; one that jaxformer trained on TPU v3 would have 8

# What is read from config.json: our name, its name there, and the name that serves all families.
FACTS = {
    "n_layers": ("n_layer", "num_hidden_layers"),
    "dim": ("n_embd", "hidden_size"),
    "n_heads": ("n_head", "num_attention_heads"),
    "rotary_dim": ("rotary_dim",),
    "norm_eps": ("layer_norm_epsilon",),
    "activation": ("activation_function",),
}
ACTIVATIONS = {
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu": "erf",
}


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    head_dim: int
    rotary_dim: int
    norm_eps: float
    gelu: str  # tanh or erf
    mp_num: int

    @classmethod
    def from_original(
        cls,
        params: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        ranks: int,
        overrides: Mapping[str, Any],
    ) -> Self:
        """`params` is config.json, `shapes` those of all tensors, `overrides` facts from the user under their
        Hugging Face names, and `mp_num`; they win. ValueError with all that is missing, that disagrees and
        that this pass does not compute."""
        if ranks != 1:
            raise ValueError(f"expected one rank (CodeGen's files are not model-parallel), found {ranks}")
        facts: dict[str, Any] = {
            name: next((f[key] for f in (overrides, params) for key in keys if f.get(key) is not None), None)
            for name, keys in FACTS.items()
        }
        if missing := [FACTS[name][0] for name, value in facts.items() if value is None]:
            raise ValueError(f"expected {', '.join(missing)} in config.json or given by name, found none")
        if facts["activation"] not in ACTIVATIONS:
            raise ValueError(
                f"expected `activation_function` to be one of {', '.join(ACTIVATIONS)}, "
                f"found {facts['activation']}"
            )
        D, N, M = int(facts["dim"]), int(facts["n_heads"]), int(overrides.get("mp_num") or CORES)
        if min(D, N, M) < 1 or D % N or N % M:
            raise ValueError(f"expected heads that {D} channels and {M} cores can share, found {N}")
        c = cls(
            n_layers=int(facts["n_layers"]),
            n_heads=N,
            head_dim=D // N,
            rotary_dim=int(facts["rotary_dim"]),
            norm_eps=float(facts["norm_eps"]),
            gelu=ACTIVATIONS[facts["activation"]],
            mp_num=M,
        )
        problems = []
        if c.rotary_dim % 2 or not 0 < c.rotary_dim <= c.head_dim:
            problems.append(f"expected an even rotary_dim up to {c.head_dim}, found {c.rotary_dim}")
        for name, wanted in (("qkv_proj", (3 * D, D)), ("out_proj", (D, D))):
            name = f"transformer.h.0.attn.{name}.weight"
            if (found := tuple(shapes.get(name, ()))) != wanted:
                problems.append(f"expected `{name}` of shape {wanted}, found {found}")
        numbers = {int(n.split(".")[2]) for n in shapes if n.startswith("transformer.h.")}
        if numbers != set(range(c.n_layers)):
            problems.append(f"expected layers 0 to {c.n_layers - 1}, found {len(numbers)} of them")
        if problems:
            raise ValueError("; ".join(problems))
        return c


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
    return w["transformer.wte.weight"][ids]


def layer(
    x: Tensor, i: int, ranks: Sequence[Mapping[str, Tensor]], c: Config, mask: Tensor | None = None
) -> Tensor:
    """Attention and feed-forward both start from the one norm, side by side."""
    (w,), p = ranks, f"transformer.h.{i}."
    y = norm(x, w, p + "ln_1.", c)
    return x + attention(y, w, p + "attn.", c, mask) + feed_forward(y, w, p + "mlp.", c)


def head(x: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    """The output layer has weights and a bias of its own."""
    (w,) = ranks
    return wide(linear(norm(x, w, "transformer.ln_f.", c), w, "lm_head."))


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config, mask: Tensor | None) -> Tensor:
    """Every core has the rows of its queries, then of its values, then of its keys, in `qkv_proj`, and the
    columns of its heads in `out_proj`."""
    T, M = x.shape[1], c.mp_num
    seen = torch.ones(1, 1, T, T, dtype=torch.bool, device=x.device).tril()
    if mask is not None:
        seen = seen & mask.bool()[:, None, None, :]
    turns = rotation(x, c)
    fused, out = w[p + "qkv_proj.weight"], w[p + "out_proj.weight"]
    cores = zip(fused.chunk(M, 0), out.chunk(M, 1), strict=True)
    return all_reduce(core(x, rows, columns, turns, seen, c) for rows, columns in cores)


def core(x: Tensor, rows: Tensor, columns: Tensor, turns: Tensor, seen: Tensor, c: Config) -> Tensor:
    """The part of the sum over heads that N/M heads contribute: (B, T, D). `rows` (3 D/M, D), `columns`
    (D, D/M). Queries and keys are float32 from the rotation on."""
    B, T, _ = x.shape
    q, v, k = ((x @ part.T).view(B, T, -1, c.head_dim) for part in rows.chunk(3, 0))  # (B, T, N/M, H)
    q, k = rotate(q, turns, c), rotate(k, turns, c)
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) / c.head_dim**0.5
    weights = scores.masked_fill(~seen, MASKED).softmax(-1).to(x.dtype)
    return torch.einsum("bnqk,bknh->bqnh", weights, v).reshape(B, T, -1) @ columns.T


def rotation(x: Tensor, c: Config) -> Tensor:
    """exp(i * position * frequency) for the positions and in the precision of x: complex (T, R/2)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    even = torch.arange(0, c.rotary_dim, 2, dtype=dtype, device=x.device)
    frequencies = THETA ** -(even / c.rotary_dim)
    angles = torch.outer(torch.arange(x.shape[1], dtype=dtype, device=x.device), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor, c: Config) -> Tensor:
    """Channels 2i and 2i+1 of every head below R are one complex number, turned by its position; the others
    stay. x (B, T, N, H), the result at least float32."""
    y = wide(x)
    turned, rest = y[..., : c.rotary_dim], y[..., c.rotary_dim :]
    pairs = torch.view_as_complex(turned.reshape(*turned.shape[:-1], -1, 2))
    return torch.cat([torch.view_as_real(pairs * turns[:, None]).flatten(-2), rest], dim=-1)


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    y = wide(linear(x, w, p + "fc_in."))
    bent = torch.erf(y * 0.5**0.5) if c.gelu == "erf" else torch.tanh((2 / pi) ** 0.5 * (y + 0.044715 * y**3))
    return linear((0.5 * y * (1 + bent)).to(x.dtype), w, p + "fc_out.")


def linear(x: Tensor, w: Mapping[str, Tensor], stem: str) -> Tensor:
    return x @ w[stem + "weight"].T + w[stem + "bias"]


def norm(x: Tensor, w: Mapping[str, Tensor], stem: str, c: Config) -> Tensor:
    y = wide(x)
    y = y - y.mean(-1, keepdim=True)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + c.norm_eps)
    return (y * w[stem + "weight"] + w[stem + "bias"]).to(x.dtype)


def all_reduce(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
