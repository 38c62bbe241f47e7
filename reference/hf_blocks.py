"""What the readings of the Hugging Face layout share, as transformers documents and computes it: its reading
of config.json, its norms, its heads side by side, (batch, heads, tokens, channels).

Source: transformers 4.37.2 and 5.23.0 (eager attention).

B batch, T tokens, D model width, N query heads, K key/value heads, H head width, F feed-forward width,
V vocabulary, E experts, A experts a token is sent to, L labels. Linear weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = Mapping[str, Tensor]
# Names of config.json for the two forms, as torch calls them.
GELUS = {
    **dict.fromkeys(("gelu", "gelu_python"), "none"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "tanh"),
}
ACTIVATIONS = {**GELUS, "relu": "relu", "silu": "silu", "swish": "silu"}  # of `activate`

HELD = 1 << 24  # numbers of one intermediate result: scores of queries with keys, hidden units
ROWS = 128  # of scores that are made at once, without the keys that none of these queries sees


def traced() -> bool:
    """Whether a pass is being written down as a graph, whose sizes are symbols: nothing may be chosen by them
    then, and by no number in a tensor."""
    return torch.compiler.is_compiling()


# --- config.json ------------------------------------------------------------------------------------------


def complete(
    config: Mapping[str, Any],
    required: tuple[str, ...],
    defaults: Mapping[str, Any],
    or_null: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`config` with what its class takes for keys that are absent; those of `or_null` may be null as well.
    ValueError for others that are not there or null."""
    made = {**defaults, **(or_null or {}), **config}
    if missing := [name for name in (*required, *defaults) if made.get(name) is None]:
        raise ValueError(f"expected {', '.join(missing)} in config.json, found none")
    return made


def only(config: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """ValueError where a value is there that the pass does not compute, which is one or any of a tuple."""
    for name, wanted in computed.items():
        values = wanted if isinstance(wanted, tuple) else (wanted,)
        if config.get(name, values[0]) not in values:
            raise ValueError(f"expected `{name}` {values[0]} in config.json, found {config[name]}")


def one_of(config: Mapping[str, Any], name: str, known: Mapping[str, str]) -> str:
    if (found := config[name]) not in known:
        raise ValueError(f"expected `{name}` to be one of {', '.join(known)}, found {found}")
    return known[found]


# --- blocks -----------------------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, w: Tensors, stem: str, bias: bool = True) -> Tensor:
    return F.linear(x, w[stem + "weight"], w[stem + "bias"] if bias else None)


def conv1d(x: Tensor, w: Tensors, stem: str) -> Tensor:
    """GPT-2's own: the weight is (in, out)."""
    return x @ w[stem + "weight"] + w[stem + "bias"]


def layer_norm(x: Tensor, w: Tensors, stem: str, eps: float, affine: bool = True) -> Tensor:
    if not affine:
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return F.layer_norm(x, x.shape[-1:], w[stem + "weight"], w[stem + "bias"], eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    y = wide(x)
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    return (y * (1.0 + wide(weight))).to(x.dtype) if plus_one else weight * y.to(x.dtype)


def activate(x: Tensor, name: str) -> Tensor:
    known = {"relu": F.relu, "silu": F.silu}
    return known[name](x) if name in known else F.gelu(x, approximate=name)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else torch.tanh(x / cap) * cap


def rotate_half(x: Tensor) -> Tensor:
    """Channels i and i + H/2 are a pair: (a, b) -> (-b, a)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first channels of each head turned, as many as cos and sin (T, R) have; x (B, N, T, H)."""
    R = cos.shape[-1]
    y = x[..., :R] * cos + rotate_half(x[..., :R]) * sin
    return y if x.shape[-1] == R else torch.cat([y, x[..., R:]], dim=-1)


def position_scaled(q: Tensor, positions: Tensor, beta: float, trained: float) -> Tensor:
    """q (B, N, T, H) by the position of each token (T,): a factor that is 1 up to `trained`, steps up there
    and at each of its multiples, and is rounded to the dtype of q."""
    steps = torch.floor(positions / trained)
    factor = 1.0 + beta * torch.log(1.0 + steps)
    return q * factor.to(q.dtype)[:, None]


def split_heads(x: Tensor, n: int) -> Tensor:
    """(B, T, n * H) -> (B, n, T, H)."""
    return x.view(*x.shape[:2], n, -1).transpose(1, 2)


Cache = dict[str, Tensor]  # keys and values (B, K, P, H) of the P tokens before, by what made them


def cached(past: Cache | None, stem: str = "") -> int:
    """P, of the first names that begin with `stem`."""
    return next((y.shape[2] for name, y in (past or {}).items() if name.startswith(stem)), 0)


def grown(past: Cache | None, stem: str, *new: Tensor) -> tuple[Tensor, ...]:
    """What is kept as `stem` 0, 1, ..., each followed by its new tokens: (B, K, P + T, H)."""
    if past is None:
        return new
    for number, y in enumerate(new):
        name = f"{stem}{number}"
        past[name] = torch.cat((past[name], y), dim=2) if name in past else y
    return tuple(past[f"{stem}{number}"] for number in range(len(new)))


def unseen(x: Tensor, mask: Tensor | None, causal: bool = True, offset: int = 0) -> Tensor:
    """Which keys (last axis) a query (the axis before) does not see, (B or 1, 1, T, offset + T): later ones,
    and padding, where `mask` (B, T) is 0."""
    T = x.shape[1]
    hidden = torch.ones(1, 1, T, offset + T, dtype=torch.bool, device=x.device).triu(offset + 1)
    hidden = hidden if causal else torch.zeros_like(hidden)
    return hidden if mask is None else hidden | (mask == 0)[:, None, None, :]


def weigh(scores: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """The values (B, N, T, H) as the scores (B, N, T, T) weigh them, the heads side by side: (B, T, D). What
    is hidden has the lowest score that v's dtype has, so that a query without any key sees all alike."""
    weights = torch.where(hidden, torch.finfo(v.dtype).min, scores).softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    scalar: float | None = None,
    cap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """q (B, N, T, H), k and v (B, K, P + T, H), each shared by N/K queries: (B, T, N * H). A query sees
    itself and what was before it, with a window that many keys, and no padding, where `mask` (B, P + T) is 0.
    `scalar` stands in the place of H in the scores."""
    (B, N, T, H), K, S = q.shape, k.shape[1], k.shape[2]
    q = q.view(B, K, -1, T, H)

    def of(some: Tensor, first: int) -> Tensor:
        """Of the queries from `first` on: (B, t, N * H)."""
        own, low, high = S - T + first, 0, S  # `own`: which key is the first query's own
        if mask is None and some.shape[3] < T:  # else a query of padding may see keys that are later, too
            low, high = max(0, own + 1 - (window or S)), own + some.shape[3]
        keys, values, own = k[:, :, low:high], v[:, :, low:high], own - low
        scores = torch.einsum("bkgqh,bkth->bkgqt", some, keys) * (scalar or H) ** -0.5
        scores = softcap(scores, cap)
        seen = torch.ones(some.shape[3], high - low, dtype=torch.bool, device=q.device).tril(own)
        if window is not None:
            seen = seen.triu(own + 1 - window)  # the last `window` keys, the query's own included
        if mask is not None:
            seen = seen & (mask != 0)[:, None, None, None, :]
        # the lowest number: a query of padding that sees no key at all sees all alike
        lowest = -math.inf if mask is None else torch.finfo(scores.dtype).min
        weights = wide(torch.where(seen, scores, lowest)).softmax(-1).to(q.dtype)
        return torch.einsum("bkgqt,bkth->bqkgh", weights, values).flatten(2)

    if traced():
        return of(q, 0)
    rows = max(1, min(ROWS, HELD // (B * N * S)))
    made = [of(q[:, :, :, first : first + rows], first) for first in range(0, T, rows)]
    return made[0] if len(made) == 1 else torch.cat(made, dim=1)


def gated(x: Tensor, w: Tensors, gate: str, up: str, down: str, activation: str = "silu") -> Tensor:
    """Of x (..., D), as many rows of it at a time as have HELD hidden units."""

    def one(rows: Tensor) -> Tensor:
        return F.linear(activate(F.linear(rows, w[gate]), activation) * F.linear(rows, w[up]), w[down])

    units = w[gate].shape[0]
    if traced() or x.numel() // x.shape[-1] * units <= HELD:
        return one(x)
    return torch.cat([one(rows) for rows in torch.split(x.flatten(0, -2), max(1, HELD // units))]).view_as(x)


def mixture(x: Tensor, w: Tensors, p: str, top: int) -> Tensor:
    """The sum of the chosen experts, each weighed in float32 (transformers 5) and then added in the dtype
    of x."""
    tokens = x.flatten(0, 1)  # (B*T, D)
    gate = w[p + "gate.weight"]
    chosen, share = route(tokens, gate, top)
    y = torch.zeros_like(tokens)
    # an expert nobody asks for is never read
    asked = range(gate.shape[0]) if traced() else sorted(set(chosen.flatten().tolist()))
    for e in asked:
        rows, place = torch.where(chosen == e)
        names = (f"{p}experts.{e}.{name}.weight" for name in ("w1", "w3", "w2"))
        out = gated(tokens[rows], w, *names) * share[rows, place, None]
        y.index_add_(0, rows, out.to(y.dtype))
    return y.view_as(x)


def route(tokens: Tensor, gate: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The most probable experts by a softmax over all, and their shares, made to sum to one; both (B*T,
    A)."""
    probabilities, chosen = wide(tokens @ gate.T).softmax(-1).topk(top)
    return chosen, probabilities / probabilities.sum(-1, keepdim=True)


def rotate_neighbours(x: Tensor, width: int, keep: torch.dtype, offset: int = 0) -> Tensor:
    """Pairs of neighbours among the first `width` channels are turned by position / 10000 ** (2i / width):
    (a, b) -> (a cos - b sin, b cos + a sin), with sines and cosines rounded to `keep`; x (B, N, T, H), whose
    first position is `offset`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps = torch.arange(0, width, 2, dtype=dtype, device=x.device)
    positions = torch.arange(offset, offset + x.shape[2], dtype=dtype, device=x.device)
    angles = positions[:, None] / 10000 ** (steps / width)
    sin, cos = angles.sin().to(keep), angles.cos().to(keep)  # (T, R/2)
    a, b = x[..., :width:2], x[..., 1:width:2]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., width:].to(turned.dtype)], dim=-1)


# --- heads ------------------------------------------------------------------------------------------------


def span_logits(y: Tensor, w: Tensors) -> tuple[Tensor, Tensor]:
    """Question answering: logits of the first and of the last token of the answer, (B, T) each."""
    first, last = wide(linear(y, w, "qa_outputs.")).unbind(-1)
    return first, last


def of_last_token(logits: Tensor, ids: Tensor, pad: int | None) -> Tensor:
    """(B, L) of the last id of each row that is not `pad`; of the last one where there is no id for padding.
    transformers 4.37.2 looks for the first padding instead and takes what is before it, or the last id where
    nothing is: the same for padding on one side of a row that has more than padding on it."""
    places = torch.arange(ids.shape[1], device=ids.device)
    last = places[-1:].expand(len(ids)) if pad is None else (places * (ids != pad)).argmax(-1)
    return logits[torch.arange(len(ids), device=ids.device), last]
