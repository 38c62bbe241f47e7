"""GptOss in the Hugging Face layout: experts of a layer in one tensor of numbers, which is (in, out) for
each, or in MXFP4 as `_blocks` and `_scales`, which are (out, in).

Source: transformers 4.57.6 and 5.23.0 (models/gpt_oss, eager attention and experts; integrations/mxfp4.py).
Names of sizes as in hf_blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_blocks import (
    HELD,
    Cache,
    Tensors,
    cached,
    grown,
    linear,
    rotate,
    split_heads,
    traced,
    wide,
)
from ckpt_tool.reference.hf_decoder import windowed
from ckpt_tool.reference.hf_heads import OF_WORDS, of_class
from ckpt_tool.reference.hf_rope import rotation
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, run, trunk

ARCHITECTURES = tuple(
    f"GptOss{end}" for end in ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0 to 7; 8 to 15 are these, negated
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
PACKING = {"quant_method": "mxfp4"}


@dataclass(frozen=True)
class Config(hf_decoder.Config):
    limit: float = 7.0
    alpha: float = 1.702

    absent = {"head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_limit": 7.0}
    or_null = {"num_key_value_heads": 8, "layer_types": None, "swiglu_alpha": 1.702, "sliding_window": 128}
    theta, epsilon = 150000.0, ("rms_norm_eps", 1e-5)
    computed = {"hidden_act": "silu", "attention_bias": True, "tie_word_embeddings": False}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Frequencies are scaled where nothing is said of them. A newer name of `num_local_experts` is
        `num_experts`."""
        scaled = any(config.get(key) is not None for key in ("rope_scaling", "rope_parameters"))
        generic = {"num_local_experts": config["num_experts"]} if "num_experts" in config else {}
        usual = {} if scaled or "rope_scaling" in config else {"rope_scaling": YARN}
        packing = config.get("quantization_config") or PACKING
        if packing.get("quant_method") != PACKING["quant_method"]:
            raise ValueError(f"expected experts packed as mxfp4, found {packing.get('quant_method')}")
        return super().from_hf({**generic, **usual, **config})

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        n_layers, window = int(config["num_hidden_layers"]), config["sliding_window"]
        kinds = config["layer_types"] or (["sliding_attention", "full_attention"] * n_layers)[:n_layers]
        if window is None and "sliding_attention" in kinds:
            raise ValueError("expected sliding_window beside layers that slide, found null")
        return {
            "windows": windowed(kinds, window or 0, n_layers),
            "n_experts": int(config["num_local_experts"]),
            "n_experts_per_token": int(config["num_experts_per_tok"]),
            "limit": float(config["swiglu_limit"]),
            "alpha": float(config["swiglu_alpha"]),
        }


# --- the pass ---------------------------------------------------------------------------------------------


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    own = {"head": head} if c.kind in OF_WORDS else of_class(c.kind, _OF_LAST, final_norm)
    return decoder_phases(hf_decoder.embed, layer, own, ranks, c, inputs)


def forward(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    logits: Tensor = run(phases(ranks, c), ids)
    return logits


def encode(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    return final_norm(trunk(phases(ranks, c), ids), ranks, c)


def layer(
    x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None, past: Cache | None = None
) -> Tensor:
    """`mask` (B, P + T) is 0 for padding, of which positions count as of other tokens."""
    w, p = ranks[0], f"{c.prefix}layers.{i}."
    y = norm(x, w, p + "input_layernorm.", c)
    x = x + attention(y, w, p + "self_attn.", c, c.windows[i], past, mask)
    return x + mixture(norm(x, w, p + "post_attention_layernorm.", c), w, p + "mlp.", c)


def norm(x: Tensor, w: Tensors, stem: str, c: Config) -> Tensor:
    """The weight is multiplied before the cast back, other than in Llama."""
    y = wide(x)
    y = y / (y.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
    return (wide(w[stem + "weight"]) * y).to(x.dtype)


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    return hf_decoder.lm_logits(final_norm(x, ranks, c), ranks, c)


def final_norm(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    return norm(x, ranks[0], c.prefix + "norm.", c)


HEADS = {k: hf_decoder.HEADS[k] for k in ("base_model", "causal_lm", "sequence_classification")}
HEADS |= {"token_classification": hf_decoder.HEADS["token_classification"]}


def _of_last(name: str) -> Callable[[Tensor, Ranks, Config], Any]:
    return lambda x, ranks, c: HEADS[name](final_norm(x, ranks, c), ranks, c)


_OF_LAST = {name: _of_last(name) for name in HEADS}


def attention(
    x: Tensor,
    w: Tensors,
    p: str,
    c: Config,
    window: int | None,
    past: Cache | None,
    mask: Tensor | None,
) -> Tensor:
    counts = {"q": c.n_heads, "k": c.n_kv_heads, "v": c.n_kv_heads}
    q, k, v = (split_heads(linear(x, w, f"{p}{name}_proj."), n) for name, n in counts.items())
    cos, sin = rotation(x, c.rope_theta, c.head_dim, c.rope_scaling, cached(past, p))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k, v = grown(past, p, k, v)
    return linear(with_sinks(q, k, v, w[p + "sinks"], window, mask), w, p + "o_proj.")


def with_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None, mask: Tensor | None = None
) -> Tensor:
    """q (B, N, T, H), k and v (B, K, P + T, H), each shared by N/K queries: (B, T, N * H). The score of a
    head's sink is one more column, which is dropped after the softmax. `mask` (B, P + T) is 0 for padding."""
    (B, N, T, H), K, S = q.shape, k.shape[1], k.shape[2]
    q, column = q.view(B, K, -1, T, H), sinks.view(1, K, -1, 1, 1)

    def of(some: Tensor, first: int) -> Tensor:
        """Of the queries from `first` on: (B, t, N * H)."""
        scores = torch.einsum("bkgqh,bkth->bkgqt", some, k) * H**-0.5
        own = S - T + first  # which key is the first query's own
        seen = torch.ones(some.shape[3], S, dtype=torch.bool, device=q.device).tril(own)
        if window is not None:
            seen = seen.triu(own + 1 - window)
        if mask is not None:
            seen = seen & (mask != 0)[:, None, None, None, :]
        scores = scores.masked_fill(~seen, -math.inf)
        scores = wide(torch.cat([scores, column.expand(*scores.shape[:-1], 1).to(scores.dtype)], dim=-1))
        weights = scores.softmax(-1)[..., :-1].to(q.dtype)
        return torch.einsum("bkgqt,bkth->bqkgh", weights, v).flatten(2)

    if traced():
        return of(q, 0)
    rows = max(1, HELD // (B * N * S))
    return torch.cat([of(q[:, :, :, i : i + rows], i) for i in range(0, T, rows)], dim=1)


def mixture(x: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    """Each chosen expert weighed and added, one expert after the other."""
    tokens = x.flatten(0, 1)  # (B*T, D)
    best, chosen = linear(tokens, w, p + "router.").topk(c.n_experts_per_token)
    share = F.softmax(wide(best), dim=-1).to(best.dtype)
    y = torch.zeros_like(tokens)
    # an expert nobody asks for is never read
    asked = range(c.n_experts) if traced() else sorted(set(chosen.flatten().tolist()))
    for e in asked:
        rows, place = torch.where(chosen == e)
        out = one_expert(tokens[rows], w, p + "experts.", e, c) * share[rows, place, None]
        y.index_add_(0, rows, out.to(y.dtype))
    return y.view_as(x)


def one_expert(tokens: Tensor, w: Tensors, p: str, e: int, c: Config) -> Tensor:
    gate_up = tokens @ numbers(w, p + "gate_up_proj", e, tokens.dtype) + w[p + "gate_up_proj_bias"][e]
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    opened = gate.clamp(max=c.limit)
    opened = opened * torch.sigmoid(opened * c.alpha)
    inner = (up.clamp(min=-c.limit, max=c.limit) + 1) * opened
    return inner @ numbers(w, p + "down_proj", e, tokens.dtype) + w[p + "down_proj_bias"][e]


def numbers(w: Tensors, stem: str, e: int, dtype: torch.dtype) -> Tensor:
    """The matrix of expert e, (in, out): stored so, or looked up for each half of a byte, the lower one
    first, and scaled by two to the power of its block's byte less 127, or by scales (E8M0) that came as the
    numbers they are."""
    if stem in w:
        return w[stem][e]
    blocks, scales = w[stem + "_blocks"][e], w[stem + "_scales"][e].unsqueeze(-1)
    table = torch.tensor([*FP4, *(-x for x in FP4)], dtype=torch.promote_types(dtype, torch.float32))
    table = table.to(blocks.device)
    out = torch.empty(*blocks.shape[:-1], 2 * blocks.shape[-1], dtype=table.dtype, device=blocks.device)
    out[..., 0::2] = table[(blocks & 0x0F).long()]
    out[..., 1::2] = table[(blocks >> 4).long()]
    scaled = out * scales if scales.is_floating_point() else torch.ldexp(out, scales.to(torch.int32) - 127)
    return scaled.reshape(blocks.shape[0], -1).to(dtype).T


# --- what converters get wrong ----------------------------------------------------------------------------

Change = Callable[[Tensors], dict[str, Tensor]]


def mistakes(names: Collection[str], c: Config) -> dict[str, Change | tuple[Change, Change]]:
    """In the tensors of one layer: how to plant it, and how to undo it where that is not the same. Those with
    codes and scales are of the format, of whatever model."""
    made: dict[str, Change | tuple[Change, Change]] = {}
    units = [n for n in names if ".experts.gate_up_proj" in n]
    if units:
        made["gates and ups exchanged"] = _along(units, lambda n: torch.arange(n).view(-1, 2).flip(-1))
        made["gates, then ups, where they alternate"] = (
            _along(units, lambda n: torch.arange(n).view(-1, 2).T),
            _along(units, lambda n: torch.arange(n).view(2, -1).T),
        )
    for name in names:
        if name.endswith(".sinks"):
            made["sinks ignored"] = (_of([name], lambda s: torch.full_like(s, -1e4)), _lost)
        if name.endswith(".experts.down_proj"):
            made["down_proj transposed"] = _of([name], lambda x: x.mT.reshape(x.shape).contiguous())
    return made


def _of(names: Collection[str], how: Callable[[Tensor], Tensor]) -> Change:
    return lambda w: {name: how(w[name]) for name in names}


def _lost(w: Tensors) -> dict[str, Tensor]:
    raise ValueError("expected values to put back, found none")


def _along(names: Collection[str], order: Callable[[int], Tensor]) -> Change:
    """Gates and ups in another order: rows of codes and their scales, columns of numbers and biases."""

    def change(w: Tensors) -> dict[str, Tensor]:
        made = {}
        for name in names:
            dim = 1 if name.endswith(("_blocks", "_scales")) else -1
            index = order(w[name].shape[dim]).flatten().to(w[name].device)
            made[name] = w[name].index_select(dim, index)
        return made

    return change


def config_mistakes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values with which the tensors still fit, and give another model; what prompts do not reach is left."""
    c = Config.from_hf(config)
    kinds = ["full_attention" if w is not None else "sliding_attention" for w in c.windows]
    made: dict[str, dict[str, Any]] = {"windows in the other layers": {"layer_types": kinds}}
    s = c.rope_scaling
    if s is not None and s.kind == "yarn":
        told = {"rope_type": "yarn", "factor": s.factor, "beta_fast": s.high, "beta_slow": s.low}
        told |= {"original_max_position_embeddings": s.original_context, "truncate": s.truncate}
        other = {**told, "truncate": not s.truncate}
        made["frequencies blended between whole channels"] = {"rope_scaling": other}
        made["sines and cosines as they are"] = {"rope_scaling": {**told, "attention_factor": 1.0}}
    if c.limit != 7:
        made["a bound of 7"] = {"swiglu_limit": 7.0}
    if c.n_experts_per_token > 1:
        made["one expert fewer for a token"] = {"num_experts_per_tok": c.n_experts_per_token - 1}
    return made
