"""MEGA as mnaylor's masked language model holds it: layers of facebookresearch/mega between an embedding and
an output matrix of its own, in `encoder_weights.pt` and `mlm_head_weights.pt`, with the arguments of the
layers in `model_args.pkl`.

Source: Ma et al. 2022 (arXiv 2209.10655), whose damped average is computed here as it is defined, step by
step; facebookresearch/mega @aeaa4b44 (modules/moving_average_gated_attention.py,
exponential_moving_average.py, relative_positional_bias.py, sequence_norm.py,
normalized_feedforward_network.py).

The 1e-5 of the norms is in the code. A layer of one direction is a decoder's: its attention is given a mask
of what comes later. The names of the heads beside the masked language model are those of transformers.

B batch, T tokens, D model width, Z width of query and key, H width of values, E averages of each channel, F
feed-forward width, C tokens of a chunk, K chunks, V vocabulary, L labels. Linear weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference.blocks import ACTIVATIONS, Tensors, activate, affine, layer_norm, rms_norm, wide
from ckpt_tool.reference.facts import Shapes, disagreements, fact, known, refuse
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes

EPS = 1e-5
BLOCK = "encoders.{}."
NORMS = ("layernorm", "scalenorm", "rmsnorm", "batchnorm", "syncbatchnorm")
ATTENTIONS = ("softmax", "laplace", "relu2")
BIASES = ("rotary", "simple")
FUNCTIONS = {**ACTIVATIONS, "gelu_accurate": "tanh", "linear": "linear"}
MU, SIGMA = 0.707107, 0.282095  # of the Laplace function, as the code rounds them
# What config.json calls the arguments.
HF_NAMES = {
    "normalization_type": "normalization_type",
    "attention_activation_fn": "attention_activation",
    "activation_fn": "activation",
    "rel_pos_bias": "relative_positional_bias",
    "normalize_before": "normalize_before_ffn",
}


@dataclass(frozen=True)
class Config:
    n_layers: int
    norm: str  # one of NORMS
    attention: str  # one of ATTENTIONS
    activation: str  # as `activate` calls it, or "linear"
    bias: str  # one of BIASES
    norm_first: bool
    both_ways: bool  # averages run from either end
    causal: bool
    feed_forward: bool
    chunk: int | None  # tokens that see each other
    truncation: int | None  # tokens that an average reaches back, itself included
    table: int | None  # tokens that the simple bias has distances for

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` are those of the pickle as plain values, `mega_args` opened or not; `overrides` facts from
        the user under their Hugging Face names, which win. ValueError for what is missing or disagrees."""
        inner = params.get("mega_args")
        told = {**params, **(inner if isinstance(inner, Mapping) else {})}
        n_layers = sum(name.endswith(".mega_layer.move.omega") for name in shapes)
        first = BLOCK.format(0) + "mega_layer.move."
        rows, width, averaged = (
            shapes[first + "delta"][0],
            shapes[first + "omega"][0],
            shapes[first + "gamma"],
        )
        directions, rest = divmod(rows, width)
        said = {name: fact(name, hf, told, overrides) for name, hf in HF_NAMES.items()}
        problems = [*_unknown(said), *disagreements({"layers": n_layers}, {"layers": told.get("depth")})]
        if rest or directions not in (1, 2) or len(averaged) != 2:
            problems.append(f"expected averages of one or two directions, found {shapes[first + 'delta']}")
        refuse(problems)
        distances = shapes.get(BLOCK.format(0) + "mega_layer.rel_pos_bias.rel_pos_bias")
        chunk = overrides.get("chunk_size", _of_direction("chunk_size", told, directions))
        truncation = overrides.get("truncation", told.get("truncation_length"))
        return cls(
            n_layers=n_layers,
            norm=said["normalization_type"],
            attention=said["attention_activation_fn"],
            activation=known("activation_fn", said, FUNCTIONS),
            bias=said["rel_pos_bias"],
            norm_first=bool(said["normalize_before"]),
            both_ways=directions == 2,
            causal=bool(overrides.get("is_decoder", directions == 1)),
            feed_forward=BLOCK.format(0) + "nffn.fc1.weight" in shapes,
            chunk=int(chunk) if chunk is not None and chunk > 0 else None,
            truncation=None if truncation is None else int(truncation),
            table=(distances[0] + 1) // 2 if distances else None,
        )


def _of_direction(name: str, told: Mapping[str, Any], directions: int) -> Any:
    """An argument that the publisher's code calls after the encoder and the decoder."""
    return told.get(f"decoder_{name}" if directions == 1 else "", told.get(f"encoder_{name}"))


def _unknown(said: Mapping[str, Any]) -> Iterator[str]:
    values = {"normalization_type": NORMS, "attention_activation_fn": ATTENTIONS, "rel_pos_bias": BIASES}
    for name, expected in values.items():
        if said[name] not in expected:
            yield f"expected `{name}` to be one of {', '.join(expected)}, found {said[name]}"


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("mask",)


def fits(tokens: int, c: Config) -> int:
    """Whole chunks, or less than one; without chunks as many as there are distances for."""
    if c.chunk is None:
        return tokens if c.table is None else min(tokens, c.table)
    return tokens if tokens < c.chunk else tokens // c.chunk * c.chunk


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


forward, encode = passes(phases)


def embed(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    return ranks[0]["embedding_layer.weight"][ids]


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    """`mask` (B, T) is 0 for padding."""
    (w,), p = ranks, BLOCK.format(i)
    x = gated_attention(x, w, p + "mega_layer.", c, mask)
    return feed_forward(x, w, p + "nffn.", c) if c.feed_forward else x


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, T, V)."""
    return wide(affine(x, ranks[0], ""))


# --- a layer ----------------------------------------------------------------------------------------------


def gated_attention(x: Tensor, w: Tensors, p: str, c: Config, mask: Tensor | None) -> Tensor:
    D, Z = x.shape[-1], w[p + "gamma"].shape[1]
    y = norm(x, w, p + "norm.norm.", c) if c.norm_first else x
    v = bent(affine(y, w, p + "v_proj."), c)  # (B, T, H)
    real = y if mask is None else y * mask[..., None]
    memory = activate(averages(real, w, p + "move.", c) + y * w[p + "move.omega"], "silu")
    base = affine(memory, w, p + "mx_proj.")
    gate, both, candidate = base[..., :D], activate(base[..., D:-D], "silu"), base[..., -D:]
    shared, kept = both[..., :Z], both[..., Z:]
    q, k = (shared * gamma + beta for gamma, beta in zip(w[p + "gamma"], w[p + "beta"], strict=True))
    seen = attended(q, k, v, w, p + "rel_pos_bias.", c, mask)
    proposed = bent(candidate + affine(seen * kept, w, p + "h_proj."), c)
    g = torch.sigmoid(gate)
    x = g * proposed + (1 - g) * x
    return x if c.norm_first else norm(x, w, p + "norm.norm.", c)


def feed_forward(x: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    y = norm(x, w, p + "norm.norm.", c) if c.norm_first else x
    x = x + affine(bent(affine(y, w, p + "fc1."), c), w, p + "fc2.")
    return x if c.norm_first else norm(x, w, p + "norm.norm.", c)


def bent(x: Tensor, c: Config) -> Tensor:
    return x if c.activation == "linear" else activate(x, c.activation)


def norm(x: Tensor, w: Tensors, stem: str, c: Config) -> Tensor:
    """The statistics of a batch norm are those that training left."""
    if c.norm == "layernorm":
        return layer_norm(x, w, stem, EPS)
    if c.norm in ("scalenorm", "rmsnorm"):
        return rms_norm(x, w[stem + ("scalar" if c.norm == "scalenorm" else "weight")], EPS)
    mean, variance = (wide(w[f"{stem}running_{name}"]) for name in ("mean", "var"))
    y = (wide(x) - mean) / (variance + EPS).sqrt()
    return (y * w[stem + "weight"] + w[stem + "bias"]).to(x.dtype)


# --- the damped average -----------------------------------------------------------------------------------


def averages(u: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    """Of each channel E averages, weighed and added: (B, T, D). The first D rows of the parameters are those
    of the averages that run forward, the others of those that run backward; each includes its own step."""
    delta, alpha, beta = (torch.sigmoid(wide(w[p + n])) if n != "beta" else wide(w[p + n]) for n in MOVED)
    outward = wide(w[p + "gamma"]) / math.sqrt(beta.shape[1])
    inward, stays = (delta * beta).squeeze(-1), (1 - delta * alpha).squeeze(-1)  # (D or 2D, E)
    D, y = u.shape[-1], wide(u)
    there = moving(y, inward[:D], stays[:D], outward[:D], c.truncation)
    if c.both_ways:
        back = moving(y.flip(1), inward[D:], stays[D:], outward[D:], c.truncation)
        there = there + back.flip(1)
    return there.to(u.dtype)


MOVED = ("delta", "alpha", "beta")


def moving(u: Tensor, inward: Tensor, stays: Tensor, outward: Tensor, reach: int | None) -> Tensor:
    """One direction: h = stays * h + inward * u, of which outward makes the result. What is `reach` steps old
    has been multiplied as many times and is taken out again."""
    state, gone, made = torch.zeros_like(u[:, 0, :, None] * inward), inward * stays ** (reach or 0), []
    for t in range(u.shape[1]):
        state = stays * state + inward * u[:, t, :, None]  # (B, D, E)
        if reach is not None and t >= reach:
            state = state - gone * u[:, t - reach, :, None]
        made.append((state * outward).sum(-1))
    return torch.stack(made, dim=1)


# --- attention inside chunks ------------------------------------------------------------------------------


def attended(
    q: Tensor, k: Tensor, v: Tensor, w: Tensors, stem: str, c: Config, mask: Tensor | None
) -> Tensor:
    """The values as one head of width Z weighs them: (B, T, H)."""
    B, T, Z = q.shape
    C = T if c.chunk is None or c.chunk > T else c.chunk
    q, k, v = (y.reshape(B, T // C, C, -1) for y in (q, k, v))
    real = None if mask is None else mask.bool().reshape(B, T // C, 1, C)
    products, bias = q @ k.transpose(2, 3), positions(C, w, stem, c)
    later = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1) & c.causal
    if c.attention == "softmax":
        scores = wide(products * Z**-0.5 + bias).masked_fill(later, -math.inf)
        if real is not None:  # a chunk of padding alone sees itself
            scores = scores.masked_fill(~real & real.any(-1, keepdim=True), -math.inf)
        weights = scores.softmax(-1)
    else:
        weights = elementwise(products / keys(C, real, later, q) + bias, c.attention) * ~later
        weights = weights if real is None else weights * real
    return (weights.to(v.dtype) @ v).reshape(B, T, -1)


def keys(C: int, real: Tensor | None, later: Tensor, q: Tensor) -> Tensor:
    """By how many keys a product is divided: those that do not come later, of both directions those that are
    no padding, at least one."""
    if later.any():
        return (~later).sum(-1, keepdim=True).to(q.dtype)
    if real is None:
        return torch.full((1,), float(C), dtype=q.dtype, device=q.device)
    return real.sum(-1, keepdim=True).clamp(min=1).to(q.dtype)


def elementwise(x: Tensor, name: str) -> Tensor:
    """The square of the positive part, or the distribution function that comes near it (section 3.4 and
    appendix B of the paper)."""
    if name == "relu2":
        return x.clamp(min=0) ** 2
    return 0.5 * (1 + torch.erf((x - MU) / (SIGMA * math.sqrt(2))))


def positions(C: int, w: Tensors, stem: str, c: Config) -> Tensor:
    """What is added to the scores, (C, C): a number for each distance, or the product of one vector turned by
    the query's position with another turned by the key's."""
    if c.bias == "simple":
        table = w[stem + "rel_pos_bias"]
        middle, at = len(table) // 2, torch.arange(C, device=table.device)
        if middle < C - 1:
            raise ValueError(f"expected at most {middle + 1} tokens to see each other, found {C}")
        return table[middle + at[None, :] - at[:, None]]
    alpha, beta = (wide(w[stem + name])[0] for name in ("alpha", "beta"))
    half = len(alpha) // 2
    pairs = torch.arange(half, dtype=alpha.dtype, device=alpha.device)
    angles = torch.arange(C, device=alpha.device)[:, None] * torch.exp(pairs * (-math.log(10000) / half))
    turned = torch.polar(torch.ones_like(angles), angles)  # (C, Z/2)
    a, b = (torch.complex(x[:half], x[half:]) * turned for x in (alpha, beta))
    return (a @ b.conj().T).real.to(w[stem + "alpha"].dtype)


# --- heads ------------------------------------------------------------------------------------------------


def first_token(x: Tensor, ranks: Ranks, stem: str) -> Tensor:
    """(B, D), or (B, C, D) of choices."""
    return torch.tanh(affine(x[..., 0, :], ranks[0], stem))


def classes(y: Tensor, ranks: Ranks, stem: str = "classifier.") -> Tensor:
    return wide(affine(y, ranks[0], stem))


# What `encode` gives goes into each. The causal one wants `c.causal`.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, ...]]] = {
    "base_model": lambda x, ranks, c: (x, first_token(x, ranks, "pooler.dense.")),
    "masked_lm": head,
    "causal_lm": head,
    "sequence_classification": lambda x, ranks, c: classes(
        first_token(x, ranks, "classifier.dense."), ranks, "classifier.out_proj."
    ),
    "multiple_choice": lambda x, ranks, c: classes(first_token(x, ranks, "pooler.dense."), ranks).squeeze(-1),
    "token_classification": lambda x, ranks, c: classes(x, ranks),
    "question_answering": lambda x, ranks, c: classes(x, ranks, "qa_outputs.").unbind(-1),
}
