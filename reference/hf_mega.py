"""Mega in the Hugging Face layout, `mega.layers.{i}.`, without `mega.` for MegaModel. Each head as its class
computes it; cross attention is not read.

Source: transformers 4.37.2, models/mega, which releases from 5 on have not.

MegaRMSNorm there forgets its division: it multiplies by the weight alone. This reading does so too, as it is
to compute what the library computes; with `rms_norm_divides` in its config, which no config.json has, it
divides as the original does.

B batch, T tokens, D model width, Z width of query and key, H width of values, E averages of each channel, C
tokens of a chunk, K chunks, V vocabulary, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference.hf_blocks import (
    ACTIVATIONS,
    GELUS,
    Tensors,
    complete,
    layer_norm,
    linear,
    one_of,
    only,
    span_logits,
    traced,
    wide,
)
from ckpt_tool.reference.hf_heads import OF_WORDS, kind_of, of_class
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes

CLASSES = (
    "Model ForMaskedLM ForCausalLM ForSequenceClassification ForMultipleChoice ForTokenClassification "
    "ForQuestionAnswering"
)
ARCHITECTURES = tuple(f"Mega{name}" for name in CLASSES.split())
EPS = 1e-5
NORMS = ("layernorm", "scalenorm", "rmsnorm", "batchnorm", "syncbatchnorm")
ATTENTIONS = ("softmax", "laplace", "relu2")
BIASES = ("rotary", "simple")
DIVIDES = "rms_norm_divides"
ABSENT: dict[str, Any] = {
    "activation": "silu",
    "attention_activation": "softmax",
    "normalization_type": "scalenorm",
    "relative_positional_bias": "rotary",
    "bidirectional": True,
    "normalize_before_mega": True,
    "normalize_before_ffn": True,
    "use_normalized_ffn": True,
    "use_chunking": False,
    "chunk_size": -1,
    "add_lm_hidden_dense_layer": True,
    "add_token_type_embeddings": False,
}


@dataclass(frozen=True)
class Config:
    n_layers: int
    norm: str
    attention: str
    activation: str
    bias: str
    mega_first: bool  # the norm stands before the gated attention, else after it
    ffn_first: bool
    both_ways: bool
    causal: bool
    feed_forward: bool
    dense: bool  # of the language model's head
    token_types: bool
    chunk: int | None
    table: int | None  # distances of the simple bias are counted from the middle of one of so many tokens
    truncation: int | None
    tied: bool
    root: str = "mega."
    kind: str = "masked_lm"  # the head of the class
    divides: bool = False  # see the module

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """ValueError for a value that no reading computes."""
        config = complete(config, ("num_hidden_layers",), ABSENT)
        only(config, {"norm_affine": True, "add_cross_attention": False})
        for name, values in (("normalization_type", NORMS), ("attention_activation", ATTENTIONS)):
            one_of(config, name, dict(zip(values, values, strict=True)))
        chunk, causal = int(config["chunk_size"]), bool(config.get("is_decoder", False))
        both_ways, reach = bool(config["bidirectional"]), config.get("truncation")
        if causal and both_ways:
            raise ValueError("expected `bidirectional` false in config.json of a decoder, found true")
        return cls(
            n_layers=int(config["num_hidden_layers"]),
            norm=str(config["normalization_type"]),
            attention=str(config["attention_activation"]),
            activation=one_of(config, "activation", {**ACTIVATIONS, "linear": "linear"}),
            bias=one_of(config, "relative_positional_bias", dict(zip(BIASES, BIASES, strict=True))),
            mega_first=bool(config["normalize_before_mega"]),
            ffn_first=bool(config["normalize_before_ffn"]),
            both_ways=both_ways,
            causal=causal,
            feed_forward=bool(config["use_normalized_ffn"]),
            dense=bool(config["add_lm_hidden_dense_layer"]),
            token_types=bool(config["add_token_type_embeddings"]),
            chunk=chunk if config["use_chunking"] else None,
            table=chunk if chunk >= 0 else int(config.get("max_positions", 2048)),
            truncation=None if reach is None else int(reach),
            tied=bool(config.get("tie_word_embeddings", True)),
            root="" if config.get("architectures") == ["MegaModel"] else "mega.",
            kind=kind_of(config, "masked_lm"),
            divides=bool(config.get(DIVIDES, False)),
        )


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("token_types", "mask") if c.token_types else ("mask",)


def fits(tokens: int, c: Config) -> int:
    """Whole chunks, or less than one, which a decoder has no mask for."""
    most = tokens if c.bias == "rotary" or c.chunk is not None or c.table is None else min(tokens, c.table)
    if c.chunk is None or (most < c.chunk and not c.causal):
        return most
    return most - most % c.chunk


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    heads: dict[str, Callable[..., Tensor]] = {"head": head}
    if c.kind not in OF_WORDS:
        heads = of_class(c.kind, HEADS, lambda x, ranks, c: x)
    if c.root + "pooler.dense.weight" in ranks[0]:
        heads["pooler_output"] = pool
    return decoder_phases(embed, layer, heads, ranks, c, inputs)


forward, encode = passes(phases)


def embed(ids: Tensor, ranks: Ranks, c: Config, *, token_types: Tensor | None = None) -> Tensor:
    (w,), p = ranks, c.root + "embedding_layer."
    x = F.embedding(ids, w[p + "word_embeddings.weight"])
    if c.token_types:
        types = torch.zeros_like(ids) if token_types is None else token_types
        return x + F.embedding(types, w[p + "token_type_embeddings.weight"])
    if token_types is not None:
        raise ValueError("expected no token types, as the config has no table of them, found some")
    return x


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    (w,), p = ranks, f"{c.root}layers.{i}."
    x = gated_attention(x, w, p + "mega_layer.", c, mask)
    return feed_forward(x, w, p + "nffn.", c) if c.feed_forward else x


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V): of a masked language model, or of a decoder."""
    (w,) = ranks
    stem = "mlm_head." if "mlm_head.bias" in w else "lm_head."
    if c.dense:
        x = torch.tanh(linear(x, w, "dense."))
    table = c.root + "embedding_layer.word_embeddings." if c.tied else stem
    return wide(F.linear(x, w[table + "weight"], w[stem + "bias"]))


# --- a layer ----------------------------------------------------------------------------------------------


def gated_attention(x: Tensor, w: Tensors, p: str, c: Config, mask: Tensor | None) -> Tensor:
    y = norm(x, w, p + "norm.norm.", c) if c.mega_first else x
    value = bent(linear(y, w, p + "v_proj."), c)
    base = linear(ema(y, w, p + "ema_gate.", c, mask), w, p + "mx_proj.")
    D, H, Z = x.shape[-1], value.shape[-1], w[p + "qk_weight"].shape[-1]
    residual_weight, rest, intermediate = torch.split(base, [D, Z + H, D], dim=-1)
    query_key, gate = torch.split(F.silu(rest), [Z, H], dim=-1)
    query, key = torch.unbind(query_key[..., None, :] * w[p + "qk_weight"] + w[p + "qk_bias"], dim=-2)
    weighted = attention(query, key, value, relative(x, w, p + "rel_pos_bias.", c), c, mask)
    out = bent(intermediate + linear(weighted * gate, w, p + "h_proj."), c)
    out = torch.addcmul(x, torch.sigmoid(residual_weight), out - x)
    return out if c.mega_first else norm(out, w, p + "norm.norm.", c)


def feed_forward(x: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    y = norm(x, w, p + "norm.norm.", c) if c.ffn_first else x
    out = linear(bent(linear(y, w, p + "fc1."), c), w, p + "fc2.") + x
    return out if c.ffn_first else norm(out, w, p + "norm.norm.", c)


def bent(x: Tensor, c: Config) -> Tensor:
    if c.activation in GELUS.values():
        return F.gelu(x, approximate=c.activation)
    if c.activation == "linear":
        return x
    return F.relu(x) if c.activation == "relu" else F.silu(x)


def norm(x: Tensor, w: Tensors, stem: str, c: Config) -> Tensor:
    if c.norm == "layernorm":
        return layer_norm(x, w, stem, EPS)
    if c.norm in ("scalenorm", "rmsnorm"):
        scaled = x * w[stem + ("scalar" if c.norm == "scalenorm" else "weight")]
        divides = c.norm == "scalenorm" or c.divides
        return scaled * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) if divides else scaled
    mean, variance = (w[f"{stem}running_{name}"] for name in ("mean", "var"))
    found = F.batch_norm(x.transpose(1, 2), mean, variance, w[stem + "weight"], w[stem + "bias"], eps=EPS)
    return found.transpose(1, 2)


def ema(x: Tensor, w: Tensors, p: str, c: Config, mask: Tensor | None) -> Tensor:
    """The averages as a convolution, with the residual, gated: (B, T, D). The kernel of both ways has 2R - 1
    taps, with the one of no distance, which both ways have, in its middle."""
    T = x.shape[1]
    R = T if c.truncation is None else min(c.truncation, T)
    taps = kernel(R, w, p)
    if c.both_ways:
        ahead, back = taps.chunk(2)
        taps = F.pad(ahead, (R - 1, 0)) + F.pad(back.flip(-1), (0, R - 1))
    y = (x if mask is None else x * mask[..., None].to(x.dtype)).transpose(1, 2)  # (B, D, T)
    start = R - 1 if c.both_ways else 0
    found = (convolved if traced() else multiplied)(wide(y), taps, T + start)
    moved = found[..., start : start + T].to(x.dtype).transpose(1, 2)
    return F.silu(moved + x * w[p + "residual_weight"])


def multiplied(y: Tensor, taps: Tensor, length: int) -> Tensor:
    """The first `length` of each channel's convolution (B, D, length), by Fourier transforms."""
    n = y.shape[-1] + taps.shape[-1]
    found: Tensor = torch.fft.irfft(torch.fft.rfft(y, n=n) * torch.fft.rfft(taps, n=n), n=n)
    return found[..., :length]


def convolved(y: Tensor, taps: Tensor, length: int) -> Tensor:
    """The same as a sum of products, for graphs: the DFT of onnxruntime 1.32 is off by 6e-5 of the largest
    value at 600 numbers, unless their count is a power of two."""
    R = taps.shape[-1]
    padded = F.pad(y, (R - 1, length - y.shape[-1]))
    return F.conv1d(padded, taps.flip(-1)[:, None], groups=len(taps))


def kernel(R: int, w: Tensors, p: str) -> Tensor:
    """(D, R), or (2D, R) of both ways: what a step gives to those 0, 1, ... steps on."""
    damping, decay = (torch.sigmoid(wide(w[p + f"{name}_factor"])) for name in ("damping", "decay"))
    logs = torch.log(1.0 - damping * decay)  # (D, E, 1)
    powers = torch.exp(torch.arange(R, device=logs.device).to(logs.dtype) * logs)
    expanded = damping * wide(w[p + "ema_expansion_matrix"]) * powers
    projection = wide(w[p + "kernel_projection_matrix"])
    return torch.einsum("den,de->dn", expanded, projection * math.sqrt(1.0 / projection.shape[1]))


def relative(x: Tensor, w: Tensors, stem: str, c: Config) -> Tensor:
    """(C, C), as a strip that is tiled and cut, or from sines and cosines."""
    T = x.shape[1]
    C = T if c.chunk is None or (not traced() and c.chunk > T) else c.chunk
    if c.bias == "rotary":
        both = (rotary(w[stem + name].expand(C, -1)) for name in ("alpha", "b_param"))
        return torch.einsum("mk,nk->mn", *both)
    if c.table is None or c.table < C:
        raise ValueError(f"expected at most {c.table} tokens to see each other, found {C}")
    strip = w[stem + "rel_pos_bias"][c.table - C : c.table + C - 1]
    tiled = F.pad(strip, (0, C)).tile(C)[:-C].view(C, 3 * C - 2)
    return tiled[:, C - 1 : 2 * C - 1]


def rotary(x: Tensor) -> Tensor:
    """Row t of (C, Z) turned by t, channel i with channel i + Z/2."""
    first, second = x.chunk(2, dim=-1)
    half, dtype = first.shape[1], wide(x).dtype
    steps = torch.exp(torch.arange(half, dtype=dtype, device=x.device) * -(math.log(10000) / half))
    angles = torch.arange(len(x), dtype=dtype, device=x.device)[:, None] * steps
    sin, cos = angles.sin().to(x.dtype), angles.cos().to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, c: Config, mask: Tensor | None
) -> Tensor:
    """Inside chunks, (B, T, H). A decoder divides by how many keys come before, padding or not."""
    if traced() and c.chunk is not None:
        return attention_of_any_length(query, key, value, bias, c, mask)
    B, T, Z = query.shape
    C, H = len(bias), value.shape[-1]
    query, key = (y.view(B, T // C, C, Z) for y in (query, key))
    causal = torch.ones(C, C, dtype=query.dtype, device=query.device).tril() if c.causal else None
    padding = None if mask is None else mask.view(B, T // C, C).to(query.dtype)
    if c.attention == "softmax":
        scores = torch.matmul(query * Z**-0.5, key.transpose(2, 3)) + bias
        if causal is not None:
            scores = scores.masked_fill(causal == 0, -math.inf)
        if padding is not None:
            alone = padding.sum(-1, keepdim=True) == 0
            scores = scores.masked_fill(((padding == 0) & ~alone)[:, :, None, :], -math.inf)
        weights = scores.softmax(-1)
    else:
        lengths: Tensor | int = C if padding is None else padding.sum(-1).clamp(min=1.0)[..., None, None]
        lengths = lengths if causal is None else causal.sum(-1, keepdim=True)
        scores = torch.matmul(query, key.transpose(2, 3)) / lengths + bias
        weights = F.relu(scores).square() if c.attention == "relu2" else laplace(scores)
        weights = weights if padding is None else weights * padding[:, :, None, :]
        weights = weights if causal is None else weights * causal
    return torch.matmul(weights, value.view(B, T // C, C, H)).view(B, T, H)


def attention_of_any_length(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, c: Config, mask: Tensor | None
) -> Tensor:
    """The same for graphs, whose lengths are not known: every key is scored, and those of other chunks do not
    count. `bias` is that of a whole chunk, of which less than one has the first rows and columns."""
    T, C, Z = query.shape[1], len(bias), query.shape[2]
    place = torch.arange(T, device=query.device)
    chunk, inside = place // C, place % C
    near = chunk[:, None] == chunk
    before = near & (place[:, None] >= place) if c.causal else near
    real = None if mask is None else near & (mask != 0)[:, None, :]  # (B, T, T)
    bias = bias[inside][:, inside]
    if c.attention == "softmax":
        seen = before if real is None else before & (real | ~real.any(-1, keepdim=True))
        scores = torch.matmul(query * Z**-0.5, key.transpose(1, 2)) + bias
        return torch.matmul(scores.masked_fill(~seen, -math.inf).softmax(-1), value)
    keys = before if c.causal or real is None else real
    lengths = keys.to(query.dtype).sum(-1, keepdim=True).clamp(min=1.0)
    scores = torch.matmul(query, key.transpose(1, 2)) / lengths + bias
    weights = F.relu(scores).square() if c.attention == "relu2" else laplace(scores)
    seen = before if real is None else before & real
    return torch.matmul(weights * seen.to(weights.dtype), value)


def laplace(x: Tensor, mu: float = 0.707107, sigma: float = 0.282095) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - mu).div(sigma * math.sqrt(2.0))))


# --- heads ------------------------------------------------------------------------------------------------


def pool(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Of the first token: (B, D), or (B, C, D) of choices."""
    return torch.tanh(linear(x[..., 0, :], ranks[0], c.root + "pooler.dense."))


def classified(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, L) of a sequence, from its first token."""
    return wide(linear(torch.tanh(linear(x[:, 0], ranks[0], "classifier.dense.")), ranks[0], OUT))


OUT = "classifier.out_proj."
# What `encode` gives goes into each. The causal one wants `c.causal`.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": lambda x, ranks, c: (x, pool(x, ranks, c)),
    "masked_lm": head,
    "causal_lm": head,
    "sequence_classification": classified,
    "multiple_choice": lambda x, ranks, c: wide(linear(pool(x, ranks, c), ranks[0], "classifier.")).squeeze(
        -1
    ),
    "token_classification": lambda x, ranks, c: wide(linear(x, ranks[0], "classifier.")),
    "question_answering": lambda x, ranks, c: span_logits(x, ranks[0]),
}


# --- what the library computes otherwise ------------------------------------------------------------------


def undivided(x: Tensor, ranks: Ranks, c: Config, i: int, mask: Tensor | None = None) -> Tensor:
    """How far a layer is from what it would give if its RMS norms divided: for these weights and this input
    no less and no more than that."""
    with_it = layer(x, i, ranks, replace(c, divides=True), mask)
    return (layer(x, i, ranks, c, mask) - with_it).abs()


# By phase: what a difference that the plan foretells may come to.
bounds: dict[str, Callable[..., Tensor]] = {"layer": undivided}

# --- what converters get wrong ----------------------------------------------------------------------------

Change = Callable[[Tensors], dict[str, Tensor]]
EMA = tuple(f"ema_gate.{n}" for n in ("damping_factor", "decay_factor", "ema_expansion_matrix"))
BOTH_WAYS = (*EMA, "ema_gate.kernel_projection_matrix")


def mistakes(names: Collection[str], c: Config) -> dict[str, Change | tuple[Change, Change]]:
    """What the publisher calls alpha, beta, gamma, delta and omega is called otherwise here, and some of
    these names stand for two tensors: exchanges, and parameters stored after their sigmoid. Each in all
    layers whose tensors are among `names`; pairs of a mistake and of what takes it back."""
    ends = ".mega_layer.qk_weight"
    layers = [n.removesuffix("qk_weight") for n in names if n.endswith(ends)]
    if not layers:
        return {}
    damping, decay = EMA[:2]
    stored = in_all(layers, (damping, decay), torch.sigmoid), in_all(layers, (damping, decay), torch.logit)
    missing = in_all(layers, ("ema_gate.residual_weight",), torch.zeros_like), lost
    made: dict[str, Change | tuple[Change, Change]] = {
        "EMA: damping and decay (delta and alpha) exchanged": exchanged(layers, damping, decay),
        "EMA: damping and decay stored after their sigmoid": stored,
        "EMA: the residual weight (omega) left out": missing,
        "query and key exchanged": in_all(layers, ("qk_weight", "qk_bias"), lambda x: x.flip(0)),
        "weight and bias of query and key (gamma and beta) exchanged": exchanged(
            layers, "qk_weight", "qk_bias"
        ),
        "mx_proj: the candidate before query, key and gate of the values": (
            candidate_first(layers, back=False),
            candidate_first(layers, back=True),
        ),
    }
    if c.both_ways:
        made["EMA: forward and backward exchanged"] = in_all(
            layers, BOTH_WAYS, lambda x: x.roll(len(x) // 2, 0)
        )
    if c.bias == "rotary":
        made["rotary bias: alpha and beta exchanged"] = exchanged(
            layers, "rel_pos_bias.alpha", "rel_pos_bias.b_param"
        )
    return made


def in_all(layers: Collection[str], names: Collection[str], change: Callable[[Tensor], Tensor]) -> Change:
    return lambda w: {p + n: change(w[p + n]).contiguous() for p in layers for n in names}


def exchanged(layers: Collection[str], one: str, other: str) -> Change:
    pairs = [(p + a, p + b) for p in layers for a, b in ((one, other), (other, one))]
    return lambda w: {a: w[b] for a, b in pairs}


def candidate_first(layers: Collection[str], *, back: bool) -> Change:
    """The last D rows of `mx_proj` right after its first D; `back` puts them last again."""

    def make(w: Tensors) -> dict[str, Tensor]:
        made = {}
        for name in [f"{p}mx_proj.{kind}" for p in layers for kind in ("weight", "bias")]:
            D = len(w[name.partition("mx_proj")[0] + "ema_gate.residual_weight"])
            made[name] = torch.cat([w[name][:D], w[name][D:].roll(-D if back else D, 0)])
        return made

    return make


def lost(w: Tensors) -> dict[str, Tensor]:
    raise ValueError("expected values, which nothing tells any more")


OTHERS = {"softmax": "laplace", "laplace": "relu2", "relu2": "laplace"}


def config_mistakes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    scores, first = config.get("attention_activation", "softmax"), config.get("normalize_before_mega", True)
    made: dict[str, dict[str, Any]] = {
        f"attention_activation {OTHERS.get(scores)}": {"attention_activation": OTHERS.get(scores)},
        f"normalize_before_mega {str(not first).lower()}": {"normalize_before_mega": not first},
    }
    rotary = config.get("relative_positional_bias", "rotary") == "rotary"
    if (
        config.get("use_chunking") and rotary and int(config["chunk_size"]) <= 256
    ):  # the prompts have 600 tokens
        made["chunks taken for one"] = {"use_chunking": False}
    return made
