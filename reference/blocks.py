"""What the readings of original layouts share, after the papers and the publishers' own code: two channels
are one complex number that is turned, every model-parallel rank computes its own heads, hidden units and
words, and the partial results are added or joined. Heads stand beside the tokens: (batch, tokens, heads,
channels).

Source: Vaswani et al. 2017; Ba et al. 2016; Zhang and Sennrich 2019 (arXiv 1910.07467); Su et al. 2021 (arXiv
2104.09864); Shazeer 2020 (arXiv 2002.05202); Shoeybi et al. 2019 (arXiv 1909.08053); Jiang et al. 2024 (arXiv
2401.04088).

B batch, T tokens, D model width, N query heads, K key/value heads (G groups of them in Megatron), H head
width, F feed-forward width, V vocabulary, S ranks, E experts, A experts a token is sent to. Linear weights
are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
# Orders of the rows of a fused query, key and value: t is which of them; n the head; h the channel; g the
# group of heads that share a key and a value.
VERSION_0, VERSION_1, VERSION_2 = "t n h", "n h t", "g t h"
KEYS_FIRST = "t n h, key, value, query"  # metaseq's; the others have the query first
ALL = slice(None)
AT_ONCE = 1 << 24  # numbers of one intermediate result: scores of queries with keys, hidden units
QUERIES = 128  # whose scores are made at once: of keys after all of them, or out of their window, none are
# What transformers calls the two forms of gelu, which are the user's words for them.
GELUS = {"gelu": "erf", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}
# What config.json calls the functions of `activate`.
ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "erf"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "relu": "relu",
}


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def all_reduce(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def words(ids: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """The rows of tables that hold V/S whole words each: every rank gives zeros for the words of others. The
    zeros of one that has none of these are not added."""
    if len(tables) == 1:
        return tables[0][ids]
    parts, first = [], 0
    for table in tables:  # (V/S, D)
        own = (first <= ids) & (ids < first + len(table))
        if first == 0 or own.is_meta or own.any():  # on `meta` nobody can tell
            parts.append(torch.where(own[..., None], table[torch.where(own, ids - first, 0)], 0))
        first += len(table)
    return all_reduce(parts)


def join_words(parts: Iterable[Tensor], n_words: int | None = None) -> Tensor:
    """Logits (B, T, V) of the parts (B, T, V/S) that the ranks have, without those of padding."""
    return wide(torch.cat(list(parts), dim=-1))[..., :n_words]


def affine(x: Tensor, w: Tensors, stem: str, biased: bool = True) -> Tensor:
    y = x @ w[stem + "weight"].T
    return y + w[stem + "bias"] if biased else y


def rms_norm(x: Tensor, weight: Tensor, eps: float, from_zero: bool = False) -> Tensor:
    """`from_zero`: what is stored is the weight less one, and the product is rounded but once."""
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y + y * wide(weight)).to(x.dtype) if from_zero else y.to(x.dtype) * weight


def layer_norm(x: Tensor, w: Tensors, stem: str, eps: float, from_zero: bool = False) -> Tensor:
    """`from_zero`: what is stored is the weight less one."""
    y, gamma = wide(x), wide(w[stem + "weight"])
    y = y - y.mean(-1, keepdim=True)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * (gamma + 1 if from_zero else gamma) + w[stem + "bias"]).to(x.dtype)


def activate(x: Tensor, name: str) -> Tensor:
    """relu, silu, or gelu as it is defined ("erf") or approximated ("tanh"), rounded once."""
    if name == "relu":
        return x.clamp(min=0)
    y = wide(x)
    if name == "silu":
        return (y * torch.sigmoid(y)).to(x.dtype)
    if name == "erf":
        bent = torch.erf(y / math.sqrt(2))
    else:
        bent = torch.tanh(math.sqrt(2 / math.pi) * y * (1 + 0.044715 * y * y))
    return (0.5 * y * (1 + bent)).to(x.dtype)


def gated(gate: Tensor, up: Tensor, name: str = "silu") -> Tensor:
    """A gated linear unit: with silu SwiGLU, with gelu GeGLU."""
    return activate(gate, name) * up


def capped(x: Tensor, cap: float | None) -> Tensor:
    """x, bent so that it stays between -cap and cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def rotate_neighbours(x: Tensor, turned: Tensor) -> Tensor:
    """Channels 2i and 2i+1 of every head are one complex number, turned by its position; those beyond the
    last of `turned` (T, pairs) stay. x (B, T, N, H), the result at least float32."""
    y = wide(x)
    moved, rest = y[..., : 2 * turned.shape[1]], y[..., 2 * turned.shape[1] :]
    pairs = torch.view_as_complex(moved.reshape(*moved.shape[:-1], -1, 2))
    return torch.cat([torch.view_as_real(pairs * turned[:, None]).flatten(-2), rest], dim=-1)


def rotate_halves(x: Tensor, turned: Tensor) -> Tensor:
    """Channels i and i + R/2 of the first R of every head are one complex number, with R/2 pairs in `turned`;
    else as `rotate_neighbours`."""
    y, R = wide(x), 2 * turned.shape[1]
    both = torch.complex(*y[..., :R].chunk(2, dim=-1)) * turned[:, None]
    return torch.cat([both.real, both.imag, y[..., R:]], dim=-1)


def with_distance(q: Tensor, positions: Tensor, beta: float, length: float) -> Tensor:
    """Queries (B, T, N, H), each times 1 + beta ln(1 + how often `length` fits into its position); those
    before the first `length` stay. Keys do not grow."""
    growth = 1 + beta * torch.log1p(torch.floor(wide(positions) / length))
    return (wide(q) * growth[:, None, None]).to(q.dtype)


def visible(
    x: Tensor,
    *,
    window: int | None = None,
    mask: Tensor | None = None,
    before: int = 0,
    queries: slice = ALL,
) -> Tensor:
    """Which keys (last axis) a query (the axis before) sees, (B or 1, 1, T, before + T): none that come
    later, none `window` or more tokens back, none that are padding, where `mask` (B, T) is 0; of these
    `queries` of the T tokens after the first `before`."""
    position = torch.arange(before + x.shape[1], device=x.device)
    back = position[before:][queries, None] - position[None, :]
    seen = (back >= 0) if window is None else (back >= 0) & (back < window)
    return seen[None, None] if mask is None else seen & mask.bool()[:, None, None, :]


def reached(own: slice, tokens: int, before: int = 0, window: int | None = None) -> slice:
    """The keys that some of the queries `own` see, of `tokens` tokens after the first `before`."""
    first, last, _ = own.indices(tokens)
    return slice(0 if window is None else max(0, before + first + 1 - window), before + last)


def in_turn(part: Callable[[slice], Tensor], tokens: int, each: int, most: int | None = None) -> Tensor:
    """What `part` makes of all tokens, (B, tokens, C), of so many at a time that it makes at most AT_ONCE
    numbers on its way, which are `each` for a token, and of at most `most`."""
    turns = max(1, -(-tokens * each // AT_ONCE), 1 if most is None else -(-tokens // most))
    if turns == 1:
        return part(ALL)
    share = -(-tokens // turns)
    return torch.cat([part(slice(start, start + share)) for start in range(0, tokens, share)], dim=1)


Past = dict[tuple[int, int], tuple[Tensor, Tensor]]  # keys and values of the tokens before, by layer and rank


def before(past: Past | None) -> int:
    """How many tokens a pass goes on from."""
    return next(iter(past.values()))[0].shape[1] if past else 0


def remembered(past: Past | None, place: tuple[int, int]) -> int:
    """The same for one layer, which may be ahead of others."""
    return past[place][0].shape[1] if past is not None and place in past else 0


def recalled(past: Past | None, place: tuple[int, int], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, before + T, K, H): those of one layer and rank so far, then these, which are
    kept."""
    if past is None:
        return k, v
    if place in past:
        k, v = (torch.cat(pair, dim=1) for pair in zip(past[place], (k, v), strict=True))
    past[place] = k, v
    return k, v


def products(q: Tensor, k: Tensor) -> Tensor:
    """Of every query with every key: (B, N, T, T)."""
    return torch.einsum("bqnh,bknh->bnqk", q, k)


def weigh(scores: Tensor, v: Tensor, seen: Tensor, masked: float, times: int = 1) -> Tensor:
    """The values (B, T, N, H) as the scores, `times` what they are, weigh them, the heads side by side:
    (B, T, N * H). `masked` is the score of a key that is not seen: if it is finite, a query without any key
    sees all alike."""
    scores = wide(scores) if times == 1 else wide(scores) * times
    weights = torch.where(seen, scores, masked).softmax(-1).to(v.dtype)
    return torch.einsum("bnqk,bknh->bqnh", weights, v).flatten(2)


def split_fused(x: Tensor, n_heads: int, n_groups: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, T, N, H), key and value (B, T, G, H) out of what a rank's fused tensor gives, (B, T, (N + 2G)
    * H), for the heads and groups of that rank. A group of VERSION_2 has its queries, its key, its value."""
    B, T, _ = x.shape
    if order == VERSION_2:
        M = n_heads // n_groups
        groups = x.view(B, T, n_groups, M + 2, -1)
        return groups[..., :M, :].flatten(2, 3), groups[..., M, :], groups[..., M + 1, :]
    if order == VERSION_0:
        q, k, v = x.view(B, T, 3, n_heads, -1).unbind(2)
    elif order == KEYS_FIRST:
        k, v, q = x.view(B, T, 3, n_heads, -1).unbind(2)
    else:
        q, k, v = x.view(B, T, n_heads, -1, 3).unbind(4)
    return q, k, v


Expert = tuple[Tensor, Tensor, Tensor]  # w1 (F, D), w2 (D, F), w3 (F, D)


def mixture(x: Tensor, gate: Tensor, n_experts: int, top: int, expert: Callable[[int], Expert]) -> Tensor:
    """The sum of the chosen experts, added in the order of the experts; x (B, T, D)."""
    tokens = x.flatten(0, 1)  # (B*T, D)
    chosen, share = route(tokens, gate, top)
    y = torch.zeros_like(tokens)
    for e in range(n_experts):
        rows, place = (chosen == e).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue  # an expert nobody asks for is never read
        w1, w2, w3 = expert(e)
        y[rows] += share[rows, place, None] * (gated(tokens[rows] @ w1.T, tokens[rows] @ w3.T) @ w2.T)
    return y.view_as(x)


def route(tokens: Tensor, gate: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The experts with the highest logits, and their shares: a softmax over those alone; both (B*T, A)."""
    logits, chosen = torch.topk(tokens @ gate.T, top)
    return chosen, wide(logits).softmax(-1).to(tokens.dtype)
