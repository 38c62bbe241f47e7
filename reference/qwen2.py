"""Qwen2 (Qwen1.5, Qwen2 and Qwen2.5, dense) as it is published, which is in the tensors and the config.json
of transformers, and as Megatron-Core trains it: `decoder.layers.{i}.self_attention.linear_qkv`, with
tensor-parallel ranks. Pipeline stages are joined before (`megatron.join_stages`).

Source: Bai et al. 2023 (arXiv 2309.16609, section 2.3), Yang et al. 2024 (arXiv 2407.10671, section 2.2) for
the model; the documentation of Qwen2Config in transformers 4.57 for its numbers; NVIDIA/Megatron-LM
core_v0.9.0 and NVIDIA-NeMo/Megatron-Bridge @067f987d for the other layout.

As the published names are those of transformers, this pass is kept apart from `ckpt_tool.reference.hf_qwen2`
by what it is written after. It is the papers' model, and one code for both layouts: two channels are one
complex number that is turned, every query head has its own copy of a key and a value, a window is a distance,
and the ranks' parts of a sum are added. That other one is transformers' module.

B batch, T tokens, D model width, N query heads, K key/value heads, H head width, F feed-forward width,
V vocabulary, S ranks. Linear weights are (out, in).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference.rope import RopeScaling, turns

# Facts under their Hugging Face names, and what Megatron's args call them; the first that is there counts.
ARGS = {
    "num_hidden_layers": ("num_layers",),
    "intermediate_size": ("ffn_hidden_size",),
    "head_dim": ("kv_channels",),
    "rms_norm_eps": ("norm_epsilon", "layernorm_epsilon"),
    "rope_theta": ("rotary_base",),
}
ASKED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta")

# Facts with another value are of another model than Qwen2.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "add_qkv_bias": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (1,),
    "apply_layernorm_1p": (False,),
    "qk_layernorm": (False,),
}
NOT_COMPUTED = ("num_experts", "window_size")  # None or absent


@dataclass(frozen=True)
class Names:
    """Of one layout. Those of a layer follow `block`, its number and a dot."""

    fused: bool  # query, key and value are one tensor, and so are gate and up: Megatron-Core
    word: str
    block: str
    norm_1: str
    attention: str  # stem of the projections
    out: str
    norm_2: str
    feed_forward: str  # likewise
    down: str
    final_norm: str
    output: str  # the words themselves where they are the output layer too


AS_PUBLISHED = Names(
    fused=False,
    word="model.embed_tokens.weight",
    block="model.layers.",
    norm_1="input_layernorm.weight",
    attention="self_attn.",
    out="self_attn.o_proj.weight",
    norm_2="post_attention_layernorm.weight",
    feed_forward="mlp.",
    down="mlp.down_proj.weight",
    final_norm="model.norm.weight",
    output="lm_head.weight",
)


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int  # of the whole model, as all counts here
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    # per layer, how many keys a query sees, its own included; None sees all before it
    windows: tuple[int | None, ...]
    n_words: int  # rows of the vocabulary that count; those after are Megatron's padding
    names: Names

    @classmethod
    def from_original(
        cls,
        params: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        ranks: int,
        overrides: Mapping[str, Any],
    ) -> Self:
        """`params` is config.json, or Megatron's pickled args as plain values; `shapes` those of rank 0,
        `overrides` facts from the user under their Hugging Face names, which win. ValueError with all that is
        missing, that disagrees and that this pass does not compute."""
        facts = {**_in_hf_names(params), **overrides}
        theta = _theta(overrides)
        facts["rope_theta"] = _theta(facts) if theta is None else theta
        if missing := [name for name in ASKED if facts.get(name) is None]:
            raise ValueError(f"expected {', '.join(missing)} in config.json or given by name, found none")
        names, problems = _names(shapes, facts)
        if missing := [n for n in _wanted(names, int(facts["num_hidden_layers"])) if n not in shapes]:
            problems.append(f"expected {', '.join(f'`{n}`' for n in missing[:4])}, found none")
            raise ValueError("; ".join(problems))
        words, D = shapes[names.word]
        n_heads = int(facts["num_attention_heads"])
        c = cls(
            n_layers=int(facts["num_hidden_layers"]),
            n_heads=n_heads,
            n_kv_heads=int(facts["num_key_value_heads"]),
            head_dim=int(facts.get("head_dim") or D // max(1, n_heads)),
            norm_eps=float(facts["rms_norm_eps"]),
            rope_theta=facts["rope_theta"],
            rope_scaling=_scaling(facts),
            windows=_windows(facts),
            n_words=int(facts.get("vocab_size") or words * ranks),
            names=names,
        )
        problems += [*_not_computed(facts), *_disagreements(c, facts, shapes, ranks)]
        if problems:
            raise ValueError("; ".join(problems))
        return c


def _in_hf_names(params: Mapping[str, Any]) -> dict[str, Any]:
    args = params.get("args")
    made = {**params, **(args if isinstance(args, Mapping) else {})}
    for name, others in ARGS.items():
        value = next((made[o] for o in others if made.get(o) is not None), None)
        if made.get(name) is None and value is not None:
            made[name] = value
    if "num_query_groups" in made:  # args have a number of groups even where queries are not grouped
        grouped = made.get("group_query_attention")
        made["num_key_value_heads"] = made["num_query_groups" if grouped else "num_attention_heads"]
    if "untie_embeddings_and_output_weights" in made:
        made["tie_word_embeddings"] = not made["untie_embeddings_and_output_weights"]
    return made


def _theta(facts: Mapping[str, Any]) -> float | None:
    """transformers 5 keeps it in `rope_parameters`."""
    newer = facts.get("rope_parameters") or {}
    theta = facts.get("rope_theta") if newer.get("rope_theta") is None else newer["rope_theta"]
    return None if theta is None else float(theta)


def _scaling(facts: Mapping[str, Any]) -> RopeScaling | None:
    found = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    return RopeScaling.from_hf(found, facts.get("max_position_embeddings"))


def _windows(facts: Mapping[str, Any]) -> tuple[int | None, ...]:
    """`max_window_layers` counts the layers at the beginning that see everything, if `use_sliding_window`;
    `layer_types` says the same layer by layer and is newer. No published model uses it."""
    n_layers, window = int(facts["num_hidden_layers"]), facts.get("sliding_window")
    if not facts.get("use_sliding_window") or window is None:
        return (None,) * n_layers
    if facts.get("layer_types") is not None:
        return tuple(int(window) if kind == "sliding_attention" else None for kind in facts["layer_types"])
    if facts.get("max_window_layers") is None:
        raise ValueError("expected max_window_layers or layer_types beside a window, found none")
    full = min(n_layers, int(facts["max_window_layers"]))
    return (None,) * full + (int(window),) * (n_layers - full)


def _names(shapes: Iterable[str], facts: Mapping[str, Any]) -> tuple[Names, list[str]]:
    """Those of the layout that the tensors are in, and what speaks against it."""
    shapes, tied = set(shapes), facts.get("tie_word_embeddings")
    word = next((n for n in sorted(shapes) if n.endswith("embedding.word_embeddings.weight")), None)
    if word is None:
        return (replace(AS_PUBLISHED, output=AS_PUBLISHED.word) if tied else AS_PUBLISHED), []
    root = word.removesuffix("embedding.word_embeddings.weight")
    block, output = root + "decoder.layers.", root + "output_layer.weight"
    # Transformer Engine has the norms in the layers after them.
    engine = f"{block}0.self_attention.linear_qkv.layer_norm_weight" in shapes
    names = Names(
        fused=True,
        word=word,
        block=block,
        norm_1="self_attention.linear_qkv.layer_norm_weight" if engine else "input_layernorm.weight",
        attention="self_attention.linear_qkv.",
        out="self_attention.linear_proj.weight",
        norm_2="mlp.linear_fc1.layer_norm_weight" if engine else "pre_mlp_layernorm.weight",
        feed_forward="mlp.linear_fc1.",
        down="mlp.linear_fc2.weight",
        final_norm=root + "decoder.final_layernorm.weight",
        output=output if output in shapes else word,  # the last pipeline stage has a copy of tied words
    )
    untied = tied is not None and not tied and names.output == word
    return names, [f"expected `{output}`, as the output layer is not tied, found none"] if untied else []


def _wanted(names: Names, n_layers: int) -> Iterator[str]:
    yield from (names.word, names.final_norm, names.output)
    kinds = ("weight", "bias")
    qkv = [""] if names.fused else ["q_proj.", "k_proj.", "v_proj."]
    units = ["weight"] if names.fused else ["gate_proj.weight", "up_proj.weight"]
    for i in range(n_layers):
        own = [names.norm_1, names.out, names.norm_2, names.down]
        own += [names.attention + part + kind for part in qkv for kind in kinds]
        own += [names.feed_forward + part for part in units]
        yield from (f"{names.block}{i}.{name}" for name in own)


def _not_computed(facts: Mapping[str, Any]) -> Iterator[str]:
    for name, values in COMPUTED.items():
        if facts.get(name) is not None and facts[name] not in values:
            yield f"expected `{name}` {values[0]}, found {facts[name]}"
    for name in NOT_COMPUTED:
        if facts.get(name) is not None:
            yield f"expected no `{name}`, found {facts[name]}"


def _disagreements(
    c: Config, facts: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], ranks: int
) -> Iterator[str]:
    n, (rows, D) = c.names, shapes[c.names.word]
    N, K, H, S = c.n_heads, c.n_kv_heads, c.head_dim, ranks
    if S != 1 and not n.fused:
        yield f"expected one rank (the published files are not model-parallel), found {S}"
    if min(N, K, H) < 1 or N % K or K % S or H % 2:
        yield f"expected head counts that {S} ranks can share, found {N} and {K} of width {H}"
    if c.n_words > rows * S or (c.n_words < rows * S and not n.fused):
        yield f"expected {c.n_words} words, as told, found {rows * S} in the tensors"
    if len(c.windows) != c.n_layers:
        yield f"expected layer_types for {c.n_layers} layers, found {len(c.windows)}"
    pattern = re.escape(n.block) + r"(\d+)\."
    found = {int(m[1]) for name in shapes if (m := re.match(pattern, name))}
    if found != set(range(c.n_layers)):
        yield f"expected {c.n_layers} layers, as told, found {len(found)} in the tensors"
    first, F = n.block + "0.", shapes[f"{n.block}0.{n.down}"][1]
    for name, size in (("hidden_size", D), ("intermediate_size", F * S)):
        if facts.get(name) is not None and int(facts[name]) != size:
            yield f"expected `{name}` {facts[name]}, as told, found {size} in the tensors"
    if n.fused:
        rows_of = {"": (N + 2 * K) * H // S}
        units = {"weight": 2 * F}
    else:
        rows_of = {"q_proj.": N * H, "k_proj.": K * H, "v_proj.": K * H}
        units = {"gate_proj.weight": F, "up_proj.weight": F}
    for name, wanted in (
        *((n.attention + part + "weight", (r, D)) for part, r in rows_of.items()),
        *((n.attention + part + "bias", (r,)) for part, r in rows_of.items()),
        (n.out, (D, N * H // S)),
        *((n.feed_forward + part, (r, D)) for part, r in units.items()),
    ):
        if (shape := tuple(shapes[first + name])) != wanted:
            yield f"expected `{first}{name}` of shape {wanted} on each rank, found {shape}"


def forward(ids: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    x = embed(ids, ranks, c)
    for i in range(c.n_layers):
        x = layer(x, i, ranks, c)
    return head(x, ranks, c)


def embed(ids: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    """Each rank holds V/S whole words."""
    parts, first = [], 0
    for w in ranks:
        table = w[c.names.word]  # (V/S, D)
        own = (first <= ids) & (ids < first + len(table))
        parts.append(torch.where(own[..., None], table[torch.where(own, ids - first, 0)], 0))
        first += len(table)
    return all_reduce(parts)


def layer(x: Tensor, i: int, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    """Each rank normalises with its own copy of the norm weights."""
    p, n, S = f"{c.names.block}{i}.", c.names, len(ranks)
    x = x + all_reduce(attention(norm(x, w[p + n.norm_1], c), w, p, i, c, S) for w in ranks)
    return x + all_reduce(feed_forward(norm(x, w[p + n.norm_2], c), w, p, c) for w in ranks)


def head(x: Tensor, ranks: Sequence[Mapping[str, Tensor]], c: Config) -> Tensor:
    parts = [norm(x, w[c.names.final_norm], c) @ w[c.names.output].T for w in ranks]  # (B, T, V/S) each
    return wide(torch.cat(parts, dim=-1))[..., : c.n_words]


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, i: int, c: Config, S: int) -> Tensor:
    """The part of the sum over heads that this rank's heads contribute: (B, T, D)."""
    B, T, _ = x.shape
    q, k, v = project(x, w, p + c.names.attention, c, S)
    turned = rotation(x, c)
    q, k = rotate(q, turned), rotate(k, turned)
    k, v = (y.repeat_interleave(c.n_heads // c.n_kv_heads, dim=2) for y in (k, v))  # (B, T, N/S, H)
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(c.head_dim)
    weights = wide(scores.masked_fill(hidden(x, c.windows[i]), -math.inf)).softmax(-1).to(x.dtype)
    heads = torch.einsum("bnqk,bknh->bqnh", weights, v)
    return heads.reshape(B, T, -1) @ w[p + c.names.out].T


def project(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, T, N/S, H), keys and values (B, T, K/S, H). The rows of a fused tensor, and of its bias, go
    by groups: the queries that share a key, that key, its value."""
    B, T, _ = x.shape
    H, M = c.head_dim, c.n_heads // c.n_kv_heads
    if not c.names.fused:
        q, k, v = (linear(x, w, f"{p}{part}_proj.").view(B, T, -1, H) for part in "qkv")
        return q, k, v
    groups = linear(x, w, p).view(B, T, c.n_kv_heads // S, M + 2, H)
    return groups[..., :M, :].reshape(B, T, -1, H), groups[..., M, :], groups[..., M + 1, :]


def hidden(x: Tensor, window: int | None) -> Tensor:
    """Which keys (second axis) each query (first axis) must not see, (T, T): later ones, and those `window`
    or more tokens back."""
    position = torch.arange(x.shape[1], device=x.device)
    back = position[:, None] - position[None, :]
    return back < 0 if window is None else (back < 0) | (back >= window)


def rotation(x: Tensor, c: Config) -> Tensor:
    return turns(x, c.rope_theta, c.head_dim, c.rope_scaling)


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Channels i and i + H/2 of every head are one complex number, turned by its position; x (B, T, N, H)."""
    turned = torch.complex(*wide(x).chunk(2, dim=-1)) * by[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    """The part of the sum over hidden units that this rank's F/S units contribute: (B, T, D). A fused tensor
    has the gates of its units, then their ups."""
    p, down = p + c.names.feed_forward, w[p + c.names.down]
    if c.names.fused:
        gate, up = (x @ w[p + "weight"].T).chunk(2, dim=-1)
    else:
        gate, up = x @ w[p + "gate_proj.weight"].T, x @ w[p + "up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ down.T


def linear(x: Tensor, w: Mapping[str, Tensor], stem: str) -> Tensor:
    return x @ w[stem + "weight"].T + w[stem + "bias"]


def norm(x: Tensor, weight: Tensor, c: Config) -> Tensor:
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + c.norm_eps)).to(x.dtype) * weight


def all_reduce(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
