"""The decoder of Llama and those after it, as its publishers store it: norms by root mean square before each
branch, queries and keys turned by their positions, keys and values shared by groups of queries, gated units
or experts. A family says in its own module which numbers, names and traits it has.

Source: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288), Jiang et al. 2023 and 2024 (arXiv 2310.06825,
2401.04088), Yang et al. 2024 (arXiv 2407.10671). The model-parallel ranks stay apart as they do there: each
computes its own heads, hidden units and words, and the partial results are added or joined.

B batch, T tokens, D model width, N query heads, K key/value heads, H head width, F feed-forward width,
V vocabulary, S ranks. Linear weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ckpt_tool.reference.blocks import (
    QUERIES,
    VERSION_2,
    Expert,
    Past,
    activate,
    affine,
    all_reduce,
    capped,
    gated,
    in_turn,
    join_words,
    layer_norm,
    mixture,
    products,
    reached,
    recalled,
    remembered,
    rms_norm,
    rotate_halves,
    rotate_neighbours,
    split_fused,
    visible,
    weigh,
    with_distance,
    words,
)
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, run
from ckpt_tool.reference.rope import RopeScaling, places, turns


@dataclass(frozen=True)
class Names:
    """Of one layout. Those of a layer follow `block`, its number and a dot. Words and output are whole names,
    the others stems, before "weight" and "bias"; `qkv` and `units` have one for each part, or one of all."""

    word: str
    block: str
    norm_1: str
    qkv: tuple[str, ...]
    out: str
    norm_2: str
    units: tuple[str, ...]  # gate, then up, or those that have no gate
    down: str
    final_norm: str
    output: str  # the words themselves where they are the output layer too
    router: str = "feed_forward.gate.weight"
    # of expert {e}: gate, down and up as whole names, or gates with ups and down
    expert: tuple[str, ...] = tuple(f"feed_forward.experts.{{e}}.{w}.weight" for w in ("w1", "w2", "w3"))
    inward: bool = False  # those of experts lie as (in, out)
    after: tuple[str, str] = ("", "")  # norms of what the two branches give, if there are any


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
    # per layer, how many keys a query sees, its own included; None sees all before it
    windows: tuple[int | None, ...]
    names: Names = field(repr=False)
    neighbours: bool = True  # a turned pair is two channels beside each other, not half a head apart
    turned: int | None = None  # channels of each head; else all
    biased: tuple[str, ...] = ()  # which have biases: "qkv", "out" and "units", with the projection down
    head_norms: tuple[str, ...] = ()  # of query and key, which are normalised head by head before they turn
    n_words: int | None = None  # rows of the vocabulary that count; those after are padding
    n_experts: int = 0
    n_experts_per_token: int = 0
    expert_ranks: int | None = None  # the first so many ranks have shares of the experts; else all
    stacked: bool = False  # all experts of a layer in one tensor
    activation: str = "silu"
    gated: bool = True  # two sets of units, of which one opens and closes the other
    parallel: bool = False  # both branches start from the same
    layer_norms: bool = False  # with the mean taken off, and a bias
    from_zero: bool = False  # norms store their weight less one
    word_scale: float = 1.0  # rounded to the dtype of the words
    query_scalar: float | None = None  # scores are divided by the root of this, or of the width of a head
    score_cap: float | None = None
    logit_cap: float | None = None
    far: tuple[float, float] | None = None  # beta and length of `with_distance`, if queries grow


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


def forward(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    logits: Tensor = run(phases(ranks, c), ids)
    return logits


def embed(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Each rank holds D/S columns of every word (Llama 1, 2, Code Llama) or V/S whole words."""
    tables = [w[c.names.word] for w in ranks]
    if all(table.shape[1] != c.dim for table in tables):
        return torch.cat([table[ids] for table in tables], dim=-1)  # (B, T, S * D/S)
    x = words(ids, tables)
    return x if c.word_scale == 1 else x * torch.tensor(c.word_scale, dtype=x.dtype, device=x.device)


def layer(
    x: Tensor, i: int, ranks: Ranks, c: Config, past: Past | None = None, positions: Tensor | None = None
) -> Tensor:
    """Each rank normalises with its own copy of the norm weights, as it does in the originals. `positions` as
    in `places`."""
    p, n, S = f"{c.names.block}{i}.", c.names, len(ranks)
    y = all_reduce(
        attention(norm(x, w, p + n.norm_1, c), w, p, (i, r), c, S, past, positions)
        for r, w in enumerate(ranks)
    )
    attended = x + (norm(y, ranks[0], p + n.after[0], c) if n.after[0] else y)
    x, branch = x if c.parallel else attended, experts if c.n_experts else feed_forward
    y = all_reduce(branch(norm(x, w, p + n.norm_2, c), w, p, c) for w in ranks[: c.expert_ranks])
    return attended + (norm(y, ranks[0], p + n.after[1], c) if n.after[1] else y)


def norm(x: Tensor, w: Mapping[str, Tensor], stem: str, c: Config) -> Tensor:
    if c.layer_norms:
        return layer_norm(x, w, stem, c.norm_eps)
    return rms_norm(x, w[stem + "weight"], c.norm_eps, c.from_zero)


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    n = c.names
    parts = (norm(x, w, n.final_norm, c) @ w[n.output].T for w in ranks)  # (B, T, V/S) each
    return capped(join_words(parts, c.n_words), c.logit_cap)


def attention(
    x: Tensor,
    w: Mapping[str, Tensor],
    p: str,
    place: tuple[int, int],
    c: Config,
    S: int,
    past: Past | None,
    positions: Tensor | None,
) -> Tensor:
    """The part of the sum over heads that this rank's heads contribute: (B, T, D). `place` is the layer and
    the rank."""
    q, k, v = project(x, w, p, c, S)
    ahead = remembered(past, place)
    if c.head_norms:
        q, k = (norm(y, w, p + n, c) for y, n in zip((q, k), c.head_norms, strict=True))
    turned = turns(x, c.rope_theta, c.turned or c.head_dim, c.rope_scaling, ahead, positions)
    rotate = rotate_neighbours if c.neighbours else rotate_halves
    q, k = (rotate(y, turned).to(x.dtype) for y in (q, k))
    if c.far:
        q = with_distance(q, places(x, ahead, positions), *c.far)
    k, v = recalled(past, place, k, v)
    k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], dim=2) for y in (k, v))  # (B, T, N/S, H)
    window = c.windows[place[0]]

    def attended(own: slice) -> Tensor:
        keys = reached(own, x.shape[1], ahead, window)
        scores = products(q[:, own], k[:, keys]) / math.sqrt(c.query_scalar or c.head_dim)
        seen = visible(x, window=window, before=ahead, queries=own)[..., keys]
        return weigh(capped(scores, c.score_cap), v[:, keys], seen, -math.inf)

    y = in_turn(attended, x.shape[1], len(x) * q.shape[2] * k.shape[1], QUERIES)
    return affine(y, w, p + c.names.out, "out" in c.biased)


def project(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, T, N/S, H), keys and values (B, T, K/S, H). With K < S ranks share a key and a value."""
    made = [affine(x, w, p + stem, "qkv" in c.biased) for stem in c.names.qkv]
    if len(made) == 1:
        return split_fused(made[0], c.n_heads // S, c.n_kv_heads // S, VERSION_2)
    q, k, v = (y.view(*y.shape[:2], -1, c.head_dim) for y in made)
    return q, k, v


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    """The part of the sum over hidden units that this rank's F/S units contribute: (B, T, D). A fused tensor
    has the gates of its units, then their ups."""
    biased, down = "units" in c.biased, w[p + c.names.down + "weight"]

    def branch(own: slice) -> Tensor:
        made = [affine(x[:, own], w, p + stem, biased) for stem in c.names.units]
        if c.gated:
            gate, up = made[0].chunk(2, dim=-1) if len(made) == 1 else made
            y = gated(gate, up, c.activation)
        else:
            y = activate(made[0], c.activation)
        return affine(y, w, p + c.names.down, biased)

    return in_turn(branch, x.shape[1], len(x) * down.shape[1])


def experts(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    """The part of the sum over hidden units that this rank's units of all experts contribute: (B, T, D). Out
    of tensors of each expert, or of three of all (E*F, D), in which w2 alone lies as (in, out)."""
    if c.stacked:
        p += "block_sparse_moe."
        stacks = [w[p + name].chunk(c.n_experts) for name in ("w1", "w2", "w3")]  # each E times (F, D)

    def expert(e: int) -> Expert:
        if c.stacked:
            w1, w2, w3 = (stack[e] for stack in stacks)
            return w1, w2.T, w3
        made = [w[p + name.replace("{e}", str(e))] for name in c.names.expert]
        made = [matrix.T for matrix in made] if c.names.inward else made
        if len(made) == 2:
            gates_and_ups, w2 = made
            w1, w3 = gates_and_ups.chunk(2)
            return w1, w2, w3
        w1, w2, w3 = made
        return w1, w2, w3

    router = w[p + ("gate.weight" if c.stacked else c.names.router)]
    return mixture(x, router, c.n_experts, c.n_experts_per_token, expert)
