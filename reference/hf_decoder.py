"""The decoder of Llama and those after it in the Hugging Face layout: `config.json` and tensors named
`model.layers.{i}.self_attn.q_proj`. A family says in its own module which numbers and traits it has.

Source: transformers 4.37.2 (eager attention), 4.57.6 and 5.23.0, models/llama, mistral, mixtral, qwen2,
qwen3, gemma2 and gpt_neox; experts as they lie on disk, one tensor each (transformers 5 stacks them only in
memory).

Names of sizes as in hf_blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference.hf_blocks import (
    Cache,
    activate,
    cached,
    complete,
    gated,
    grouped_attention,
    grown,
    layer_norm,
    linear,
    mixture,
    only,
    position_scaled,
    rms_norm,
    rotate,
    softcap,
    span_logits,
    split_heads,
    wide,
)
from ckpt_tool.reference.hf_heads import OF_WORDS, kind_of, of_class
from ckpt_tool.reference.hf_rope import RopeScaling, position_ids, rope, rotation, told_once
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, given, run, trunk

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # in config.json


@dataclass(frozen=True)
class Names:
    """Stems, before "weight" and "bias"; those of a layer are in `block`. `qkv` has one for each, or one of
    all; `after` are norms of what the two branches give. All but the output layer follow `Config.prefix`."""

    words: str = "embed_tokens."
    norm_1: str = "input_layernorm."
    qkv: tuple[str, ...] = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
    out: str = "self_attn.o_proj."
    norm_2: str = "post_attention_layernorm."
    gate: str = "mlp.gate_proj."  # none: the units are not gated
    up: str = "mlp.up_proj."
    down: str = "mlp.down_proj."
    after: tuple[str, str] = ("", "")
    final_norm: str = "norm."
    output: str = "lm_head."


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    turned: int  # channels of each head
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    # per layer, how many keys a query sees, its own included; None sees all before it
    windows: tuple[int | None, ...]
    tied: bool  # the embedding table is also the output layer
    prefix: str = "model."  # of all but the heads
    kind: str = "causal_lm"  # the head of the class
    biased: tuple[str, ...] = ()  # which have biases: "qkv", "out", and "units" that are not gated
    head_norms: bool = False  # each head of query and key is normalised before it is turned
    n_experts: int = 0
    n_experts_per_token: int = 0
    activation: str = "silu"  # of the gates, as `activate` calls it
    plus_one: bool = False  # norms store their weight less one
    layer_norms: bool = False  # with the mean taken off, and a bias
    parallel: bool = False  # both branches start from the same, each behind its own norm
    scaled_words: bool = False  # by the root of D, rounded to the dtype of the words
    scalar: float | None = None  # in the place of the width of a head, where scores are scaled
    score_cap: float | None = None
    logit_cap: float | None = None
    growth: tuple[float, float] | None = None  # beta and length of `position_scaled`, for queries alone

    # What the configuration class of a family takes for keys that are absent; those of `or_null` may be null.
    names: ClassVar[Names] = Names()
    own: ClassVar[Mapping[str, str]] = {}  # what the family alone calls values of `from_hf`, by those names
    absent: ClassVar[Mapping[str, Any]] = {}
    or_null: ClassVar[Mapping[str, Any]] = {}
    theta: ClassVar[float] = 10000.0
    part: ClassVar[float] = 1.0  # of the channels of a head that is turned
    epsilon: ClassVar[tuple[str, float]] = ("rms_norm_eps", 1e-6)
    computed: ClassVar[Mapping[str, Any]] = {"hidden_act": ("silu", "swish")}  # other values are not
    answering: ClassVar[str | None] = (
        None  # the prefix below the head of question answering, if it is its own
    )
    of_tokens: ClassVar[str] = "score."  # the head that labels tokens

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what this pass does not compute."""
        others = {k: v for k, v in config.items() if k not in cls.own}
        config = others | {k: config[own] for k, own in cls.own.items() if own in config}
        theta, scaling = rope(config, default=cls.theta, whole=cls.part == 1)
        part = told_once(config, "partial_rotary_factor", cls.part) or 0.0
        eps, usual = cls.epsilon
        config = complete(config, REQUIRED, {eps: usual, **cls.absent}, cls.or_null)
        only(config, cls.computed)
        n_layers, n_heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        width = int(config.get("head_dim") or int(config["hidden_size"]) // n_heads)
        window = config.get("sliding_window") if "sliding_window" in cls.or_null else None
        numbers: dict[str, Any] = {
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": int(config.get("num_key_value_heads") or n_heads),
            "head_dim": width,
            "turned": int(width * part),
            "norm_eps": float(config[eps]),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "windows": (None if window is None else int(window),) * n_layers,
            "tied": bool(config.get("tie_word_embeddings", False)),
        }
        made, kind = {**numbers, **cls.traits(config)}, kind_of(config)
        if kind == "base_model":
            made["prefix"] = ""
        elif kind == "question_answering" and cls.answering is not None:
            made["prefix"] = cls.answering
        return cls(**{**made, "kind": kind})

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a family has besides or otherwise, out of a config that is complete."""
        return {}


def windowed(kinds: Sequence[str], window: int, n_layers: int) -> tuple[int | None, ...]:
    """Those that `layer_types` of config.json says. ValueError where it does not fit the layers."""
    if len(kinds) != n_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"expected full_attention or sliding_attention for {n_layers} layers, found {kinds}")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    own = {"head": head} if c.kind in OF_WORDS else of_class(c.kind, _OF_LAST, final_norm)
    return decoder_phases(embed, layer, own, ranks, c, inputs)


def forward(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    logits: Tensor = run(phases(ranks, c), ids)
    return logits


def embed(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    x = F.embedding(ids, ranks[0][f"{c.prefix}{c.names.words}weight"])
    return x * torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype, device=x.device) if c.scaled_words else x


def layer(
    x: Tensor,
    i: int,
    ranks: Ranks,
    c: Config,
    mask: Tensor | None = None,
    past: Cache | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    w, p, n = ranks[0], f"{c.prefix}layers.{i}.", c.names
    y = attention(norm(x, w, p + n.norm_1, c), w, p, c, c.windows[i], past, positions, mask)
    attended = x + (norm(y, w, p + n.after[0], c) if n.after[0] else y)
    y = feed_forward(norm(x if c.parallel else attended, w, p + n.norm_2, c), w, p, c)
    return attended + (norm(y, w, p + n.after[1], c) if n.after[1] else y)


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    n, biased = c.names, "units" in c.biased
    if c.n_experts:
        return mixture(x, w, p + "block_sparse_moe.", c.n_experts_per_token)
    if n.gate:
        gate, up, down = (f"{p}{stem}weight" for stem in (n.gate, n.up, n.down))
        return gated(x, w, gate, up, down, c.activation)
    return linear(activate(linear(x, w, p + n.up, biased), c.activation), w, p + n.down, biased)


def norm(x: Tensor, w: Mapping[str, Tensor], stem: str, c: Config) -> Tensor:
    if c.layer_norms:
        return layer_norm(x, w, stem, c.norm_eps)
    return rms_norm(x, w[stem + "weight"], c.norm_eps, c.plus_one)


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V) of the last layer's output."""
    return lm_logits(final_norm(x, ranks, c), ranks, c)


def final_norm(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    return norm(x, ranks[0], c.prefix + c.names.final_norm, c)


def lm_logits(y: Tensor, ranks: Ranks, c: Config) -> Tensor:
    logits = linear(y, ranks[0], c.prefix + c.names.words if c.tied else c.names.output, bias=False)
    return wide(softcap(logits, c.logit_cap))


def encode(ids: Tensor, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    """The normalised sequence (B, T, D), which every head starts from; `mask` (B, T) is 0 for padding."""
    return final_norm(trunk(phases(ranks, c, given(mask=mask)), ids), ranks, c)


# What `encode` gives goes into each. Logits are (B, T, L), of which the class for sequences gives those
# `hf_blocks.of_last_token`.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": lambda y, ranks, c: y,
    "causal_lm": lm_logits,
    "sequence_classification": lambda y, ranks, c: wide(linear(y, ranks[0], "score.", bias=False)),
    "token_classification": lambda y, ranks, c: wide(linear(y, ranks[0], c.of_tokens)),
    "question_answering": lambda y, ranks, c: span_logits(y, ranks[0]),
}


def _of_last(name: str) -> Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]:
    """That head of the last layer's output, which is not normalised yet."""
    return lambda x, ranks, c: HEADS[name](final_norm(x, ranks, c), ranks, c)


_OF_LAST = {name: _of_last(name) for name in HEADS}


def attention(
    x: Tensor,
    w: Mapping[str, Tensor],
    p: str,
    c: Config,
    window: int | None,
    past: Cache | None,
    positions: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    q, k, v = project(x, w, p, c)
    if c.head_norms:
        q, k = (norm(y, w, f"{p}self_attn.{n}_norm.", c) for n, y in (("q", q), ("k", k)))
    ahead = cached(past, p)
    cos, sin = rotation(x, c.rope_theta, c.turned, c.rope_scaling, ahead, positions)
    q, k = (rotate(y, cos, sin) for y in (q, k))
    if c.growth is not None:
        q = position_scaled(q, position_ids(x, ahead, positions), *c.growth)
    k, v = grown(past, p, k, v)
    y = grouped_attention(q, k, v, window, c.scalar, c.score_cap, mask)
    return linear(y, w, p + c.names.out, "out" in c.biased)


def project(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> list[Tensor]:
    """Queries (B, N, T, H), keys and values (B, K, T, H). In one tensor each head has its query, its key and
    its value beside each other."""
    made = [linear(x, w, p + stem, "qkv" in c.biased) for stem in c.names.qkv]
    if len(made) == 1:
        return list(split_heads(made[0], c.n_heads).chunk(3, dim=-1))
    heads = (c.n_heads, c.n_kv_heads, c.n_kv_heads)
    return [split_heads(y, n) for y, n in zip(made, heads, strict=True)]
