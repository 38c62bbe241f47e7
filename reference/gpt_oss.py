"""gpt-oss (20B, 120B) as OpenAI published it: `original/`, a config.json of its own and safetensors under
names of its own, with the experts' matrices in MXFP4.

Source: OpenAI 2025, the model card (arXiv 2508.10925, section 2); openai/gpt-oss @7b58334, gpt_oss/torch; the
MX formats, OCP Microscaling Formats v1.0 (2023, sections 5.3.3 and 6.3): elements of a sign, two bits of
exponent and one of mantissa, 32 of them under one power of two. Xiao et al. 2023 (arXiv 2309.17453) for
sinks, Peng et al. 2023 (arXiv 2309.00071) for the frequencies.

Sizes as in `blocks`; E experts. Linear weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference.blocks import (
    Past,
    Tensors,
    affine,
    in_turn,
    join_words,
    products,
    recalled,
    remembered,
    rotate_halves,
    visible,
    wide,
    words,
)
from ckpt_tool.reference.facts import Shapes, disagreements, first, only, refuse, strange
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, run
from ckpt_tool.reference.rope import RopeScaling, turns

GAIN = 1.702  # of the sigmoid that approximates gelu: Hendrycks and Gimpel 2016 (arXiv 1606.08415)
EPS = 1e-5
# What config.json says, by the names that Hugging Face has for it.
COUNTS = {
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "sliding_window": "sliding_window",
}
SIZES = {"hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "vocab_size": "vocab_size"}
VALUES = ("swiglu_limit", "rope_theta")
STRETCH = ("rope_scaling_factor", "rope_ntk_beta", "rope_ntk_alpha", "initial_context_length")
# Values of a Hugging Face config that no original says and that stand in the publisher's code.
CODE: dict[str, tuple[Any, ...]] = {
    "rms_norm_eps": (EPS,),
    "attention_bias": (True,),
    "tie_word_embeddings": (False,),
}
CODE |= {"hidden_act": ("silu",), "swiglu_alpha": (GAIN,)}
BESIDE = frozenset(
    ("rope_scaling", "rope_parameters", "max_position_embeddings", "layer_types", "torch_dtype")
)


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts: int
    n_experts_per_token: int
    window: int
    limit: float
    rope_theta: float
    rope_scaling: RopeScaling | None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many keys a query sees in each layer, its own included; None: all before it."""
        return tuple(None if i % 2 else self.window for i in range(self.n_layers))

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` is config.json, `shapes` those of all tensors, `overrides` facts from the user under their
        Hugging Face names, which win. ValueError for what none of them tells, and for what this pass does not
        compute."""
        if ranks != 1:
            raise ValueError(f"expected one rank (the published files are not model-parallel), found {ranks}")
        told = {own: first(overrides.get(hf), params.get(own)) for own, hf in (COUNTS | SIZES).items()}
        told |= {name: first(overrides.get(name), params.get(name)) for name in VALUES}
        told |= stretched(params, overrides)
        if missing := [name for name, value in told.items() if value is None]:
            raise ValueError(f"expected {', '.join(missing)} in config.json or given by name, found none")
        known = {*told, *COUNTS.values(), *CODE, *BESIDE}
        seen = {own: size for own, size in sizes_of(shapes).items() if own in told}
        facts = {**params, **overrides}
        refuse([*only(facts, CODE), *strange(facts, known), *disagreements(seen, told)])
        return cls(
            n_layers=int(told["num_hidden_layers"]),
            n_heads=int(told["num_attention_heads"]),
            n_kv_heads=int(told["num_key_value_heads"]),
            head_dim=int(told["head_dim"]),
            n_experts=int(told["num_experts"]),
            n_experts_per_token=int(told["experts_per_token"]),
            window=int(told["sliding_window"]),
            limit=float(told["swiglu_limit"]),
            rope_theta=float(told["rope_theta"]),
            rope_scaling=scaling_of(told),
        )


def stretched(params: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The four values of the frequencies; the user has them in an object, or none where nothing is scaled."""
    told = {name: params.get(name) for name in STRETCH}
    if "rope_scaling" in overrides:
        found = overrides["rope_scaling"] or {"factor": 1}
        keys = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
        told |= {own: first(found.get(key), told[own]) for own, key in zip(STRETCH, keys, strict=True)}
    return told


def sizes_of(shapes: Shapes) -> dict[str, int]:
    words_shape = shapes.get("embedding.weight", (0, 0))
    down = shapes.get("block.0.mlp.mlp2_weight.scales")
    router = shapes.get("block.0.mlp.gate.weight")
    found = {"vocab_size": words_shape[0], "hidden_size": words_shape[-1]}
    found |= {} if down is None else {"intermediate_size": down[-1] * BLOCK}
    return found if router is None else found | {"num_experts": router[0]}


def scaling_of(told: Mapping[str, Any]) -> RopeScaling | None:
    """Between whole channels, and warmer the longer the stretch; ValueError where the two ends of the blend
    are not inside the channels, in order, as the publisher's code asserts."""
    factor, fast, slow, context = (float(told[name]) for name in STRETCH)
    if factor <= 1:
        return None
    pairs, theta = int(told["head_dim"]) / 2, float(told["rope_theta"])
    low, high = (pairs * math.log(context / (turned * 2 * math.pi), theta) for turned in (fast, slow))
    if not 0 < low < high < pairs - 1:
        raise ValueError(
            f"expected 0 < low < high < {pairs - 1:g} of the blend, found {low:.3f} and {high:.3f}"
        )
    return RopeScaling(factor, slow, fast, context, "yarn", 0.1 * math.log(factor) + 1, whole=False)


# --- MXFP4 ------------------------------------------------------------------------------------------------

BLOCK = 32  # numbers under one scale


def matrix(w: Tensors, stem: str, e: int, dtype: torch.dtype) -> Tensor:
    """The matrix of expert e, (out, in), in `dtype`: from the bits of each element, and the power of two of
    its block. Out of numbers as they are where the files hold those."""
    if stem in w:
        return w[stem][e]
    codes, scales = w[stem + ".blocks"][e], w[stem + ".scales"][e]  # (out, G, 16) and (out, G) bytes
    bits = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).int()  # (out, G, 32)
    sign, exponent, fraction = bits >> 3, (bits >> 1) & 3, bits & 1
    small = 0.5 * fraction
    large = (1 + 0.5 * fraction) * torch.exp2(exponent - 1.0)
    size = torch.where(exponent == 0, small, large).to(torch.promote_types(dtype, torch.float32))
    signed = torch.where(sign == 1, -size, size)
    if scales.dtype != torch.uint8:  # E8M0, which is read as the powers themselves
        return (scales[..., None].to(signed.dtype) * signed).flatten(-2).to(dtype)
    return torch.ldexp(signed, scales.int()[..., None] - 127).flatten(-2).to(dtype)


# --- the pass ---------------------------------------------------------------------------------------------


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


def forward(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    logits: Tensor = run(phases(ranks, c), ids)
    return logits


def embed(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    return words(ids, [w["embedding.weight"] for w in ranks])


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, past: Past | None = None) -> Tensor:
    w, p = ranks[0], f"block.{i}."
    x = x + attention(norm(x, w[p + "attn.norm.scale"]), w, p + "attn.", i, c, past)
    return x + experts(norm(x, w[p + "mlp.norm.scale"]), w, p + "mlp.", c)


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    return join_words(norm(x, w["norm.scale"]) @ w["unembedding.weight"].T for w in ranks)


def norm(x: Tensor, scale: Tensor) -> Tensor:
    """Rounded once, after the scale."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * wide(scale)).to(x.dtype)


def attention(x: Tensor, w: Tensors, p: str, i: int, c: Config, past: Past | None) -> Tensor:
    """Rows of `qkv` are all queries, then all keys, then all values: (B, T, D)."""
    heads = (c.n_heads, c.n_kv_heads, c.n_kv_heads)
    made = torch.split(affine(x, w, p + "qkv."), [n * c.head_dim for n in heads], dim=-1)
    q, k, v = (y.view(*y.shape[:2], -1, c.head_dim) for y in made)
    ahead = remembered(past, (i, 0))
    turned = turns(x, c.rope_theta, c.head_dim, c.rope_scaling, ahead)
    q, k = (rotate_halves(y, turned).to(x.dtype) for y in (q, k))
    k, v = recalled(past, (i, 0), k, v)
    k, v = (y.repeat_interleave(c.n_heads // c.n_kv_heads, dim=2) for y in (k, v))  # (B, T, N, H)

    def attended(own: slice) -> Tensor:
        scores = products(q[:, own], k) / math.sqrt(c.head_dim)
        seen = visible(x, window=c.windows[i], before=ahead, queries=own)
        return weigh(scores, v, seen, w[p + "sinks"])

    y = in_turn(attended, x.shape[1], len(x) * c.n_heads * k.shape[1])
    return affine(y, w, p + "out.")


def weigh(scores: Tensor, v: Tensor, seen: Tensor, sinks: Tensor) -> Tensor:
    """The values (B, T, N, H) as the scores (B, N, T, T) weigh them, heads side by side. What a head leaves
    to its sink, a score that is the same for every query, no value gets."""
    scores = wide(scores).masked_fill(~seen, -math.inf)
    all_of_it = torch.logaddexp(scores.logsumexp(-1, keepdim=True), wide(sinks)[:, None, None])
    return torch.einsum("bnqk,bknh->bqnh", torch.exp(scores - all_of_it).to(v.dtype), v).flatten(2)


def experts(x: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    """The sum of the chosen experts of each token, in the order of the experts: (B, T, D)."""
    tokens = x.flatten(0, 1)
    chosen, share = route(tokens, w, p, c)
    y = torch.zeros_like(tokens)
    for e in range(c.n_experts):
        rows, place = (chosen == e).nonzero(as_tuple=True)
        if len(rows):  # an expert nobody asks for is never read
            y[rows] += share[rows, place, None] * expert(tokens[rows], w, p, e, c)
    return y.view_as(x)


def route(tokens: Tensor, w: Tensors, p: str, c: Config) -> tuple[Tensor, Tensor]:
    """The experts with the highest logits, and a softmax over those alone; both (B*T, A)."""
    logits, chosen = torch.topk(affine(tokens, w, p + "gate."), c.n_experts_per_token)
    return chosen, wide(logits).softmax(-1).to(tokens.dtype)


def expert(tokens: Tensor, w: Tensors, p: str, e: int, c: Config) -> Tensor:
    """Of (R, D) tokens: (R, D)."""
    units = tokens @ matrix(w, p + "mlp1_weight", e, tokens.dtype).T + w[p + "mlp1_bias"][e]
    down = matrix(w, p + "mlp2_weight", e, tokens.dtype)
    return bent(units, c.limit) @ down.T + w[p + "mlp2_bias"][e]


def bent(units: Tensor, limit: float) -> Tensor:
    """Gates are the even ones and bounded above, what they open for the odd ones, bounded on both sides and
    one more than it is."""
    gate, up = wide(units).view(len(units), -1, 2).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    bent: Tensor = gate * torch.sigmoid(GAIN * gate) * (up + 1)
    return bent.to(units.dtype)
