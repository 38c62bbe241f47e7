"""CANINE in the Hugging Face layout, below `canine.` but for CanineModel. Each head as its class computes it.

Source: transformers 4.37.2 and 5.23.0, models/canine. The first layer's windows are as wide as their stride,
and its first position is like any other: the library has arguments for both and its model does not use them.
The table of positions has `num_hash_buckets` rows there, whatever `max_position_embeddings` says.

B batch, T characters, M molecules (T // rate), D model width, N heads, H head width, W width of a window,
L labels, C choices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference.hf_blocks import (
    ACTIVATIONS,
    Tensors,
    activate,
    complete,
    layer_norm,
    linear,
    one_of,
    only,
    span_logits,
    split_heads,
    traced,
    weigh,
    wide,
)
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, passes

CLASSES = "Model ForSequenceClassification ForMultipleChoice ForTokenClassification ForQuestionAnswering"
ARCHITECTURES = tuple(f"Canine{name}" for name in CLASSES.split())
CLASSIFIERS = {
    "CanineForSequenceClassification": "sequence_classification",
    "CanineForTokenClassification": "token_classification",
    "CanineForMultipleChoice": "multiple_choice",
}
PRIMES = (31, 43, 59, 61, 73, 97, 103, 113, 137, 149, 157, 173, 181, 193, 211, 223)
ABSENT = {  # what CanineConfig takes for absent keys
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 16384,
    "downsampling_rate": 4,
    "upsampling_kernel_size": 4,
    "num_hash_functions": 8,
    "num_hash_buckets": 16384,
    "local_transformer_stride": 128,
}


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    window: int
    rate: int
    kernel: int  # of the convolution that makes characters of molecules
    n_hashes: int
    n_buckets: int
    n_positions: int
    norm_eps: float
    activation: str
    root: str  # of all names but those of heads
    classifies: str | None = None  # which of the heads the classifier is

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for values that this pass does
        not compute, or that fit no model."""
        config = complete(config, (), ABSENT)
        only(config, {"is_decoder": False, "add_cross_attention": False})
        counts = {name: int(config[name]) for name, value in ABSENT.items() if isinstance(value, int)}
        D, heads, hashes = (counts[n] for n in ("hidden_size", "num_attention_heads", "num_hash_functions"))
        if min(counts.values()) < 1 or D % heads or D % hashes or hashes > len(PRIMES):
            raise ValueError(
                f"expected {heads} heads and {hashes} of at most 16 tables to share {D} channels"
            )
        return cls(
            n_layers=counts["num_hidden_layers"],
            n_heads=heads,
            window=counts["local_transformer_stride"],
            rate=counts["downsampling_rate"],
            kernel=counts["upsampling_kernel_size"],
            n_hashes=hashes,
            n_buckets=counts["num_hash_buckets"],
            n_positions=min(counts["num_hash_buckets"], counts["max_position_embeddings"]),
            norm_eps=float(config["layer_norm_eps"]),
            activation=one_of(config, "hidden_act", ACTIVATIONS),
            root="" if config.get("architectures") == ["CanineModel"] else "canine.",
            classifies=CLASSIFIERS.get((config.get("architectures") or [""])[0]),
        )


def vocabulary(c: Config) -> int:
    """As many as there are code points in Unicode."""
    return 1114112


def fits(tokens: int, c: Config) -> int:
    """The largest number of characters up to `tokens` that the pass takes: a molecule at least."""
    found = min(tokens, c.n_positions)
    return 0 if found < c.rate else found


def traced_with(c: Config) -> int:
    """Characters of several molecules, and some over."""
    return 5 * c.rate + 2


def padding(tokens: int, longest: int, c: Config) -> int:
    """How many of `tokens` characters a row may have that is padded to `longest`, so that both layouts agree
    on them: what leaves a window of padding alone differs, and its molecules are seen from before it."""
    for found in range(min(tokens, longest), 0, -1):
        first = -(-found // c.window) * c.window  # place of a window of padding alone
        if first >= longest or first - first % c.rate - found >= c.kernel // 2:
            return found
    return 0


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("token_types", "mask")


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    """What goes from one to the next is what it is in the original: characters (B, T, D), and then with them
    molecules (B, M, D)."""
    given = dict(inputs)
    types, mask = given.pop("token_types", None), given.pop("mask", None)
    if given:
        raise TypeError(f"expected no inputs {', '.join(sorted(given))}, as this pass takes none of them")
    own: dict[str, Any] = {"w": ranks[0], "c": c}
    made = [
        Phase("embed", "embed", None, partial(embed, token_types=types, **own)),
        Phase("initial_char_encoder", "layer", None, partial(local_layer, mask=mask, **own)),
        Phase("chars_to_molecules", "layer", None, partial(downsample, **own)),
    ]
    made += [
        Phase(f"layer {i}", "layer", i, partial(encoder_layer, i=i, mask=mask, **own))
        for i in range(c.n_layers)
    ]
    made += [
        Phase("projection", "layer", None, partial(upsample, **own)),
        Phase("final_char_encoder", "layer", None, partial(final_layer, mask=mask, **own)),
        Phase("head", "head", None, lambda x: x[0]),
        Phase("pooler_output", "head", None, lambda x: pool(x, ranks, c)),
    ]
    return [*made, *(Phase(name, "head", None, head) for name, head in own_heads(ranks, c).items())]


def own_heads(ranks: Ranks, c: Config) -> dict[str, Callable[[Both], Tensor]]:
    """Those of the class with a head, by the names of its outputs."""
    if "qa_outputs.weight" in ranks[0]:
        return {
            "start_logits": lambda x: span_logits(x[0], ranks[0])[0],
            "end_logits": lambda x: span_logits(x[0], ranks[0])[1],
        }
    if c.classifies is None or "classifier.weight" not in ranks[0]:
        return {}
    if c.classifies == "multiple_choice":  # of one choice
        return {"logits": lambda x: classified(pool(x, ranks, c), ranks)}
    pooled = c.classifies == "sequence_classification"
    return {"logits": lambda x: classified(pool(x, ranks, c) if pooled else x[0], ranks)}


forward, encode = passes(phases)
Both = tuple[Tensor, Tensor]  # characters (B, T, D), molecules (B, M, D)


# --- the parts ------------------------------------------------------------------------------------------


def embed(ids: Tensor, w: Tensors, c: Config, token_types: Tensor | None = None) -> Tensor:
    p = c.root + "char_embeddings."
    buckets = (ids[..., None] + 1) * torch.tensor(PRIMES[: c.n_hashes], device=ids.device) % c.n_buckets
    shards = [
        F.embedding(buckets[..., s], w[f"{p}HashBucketCodepointEmbedder_{s}.weight"])
        for s in range(c.n_hashes)
    ]
    types = torch.zeros_like(ids) if token_types is None else token_types
    positions = torch.arange(ids.shape[1], device=ids.device)
    x = torch.cat(shards, dim=-1) + F.embedding(types, w[p + "token_type_embeddings.weight"])
    x = x + F.embedding(positions, w[p + "char_position_embeddings.weight"])
    return layer_norm(x, w, p + "LayerNorm.", c.norm_eps)


def self_attention(x: Tensor, w: Tensors, p: str, c: Config, seen: Tensor | None) -> Tensor:
    """`seen` (B, T), or (B, T, T) for each query, is 1 for keys that are seen, 0 for padding, and -1 for what
    is not there at all."""
    q, k, v = (split_heads(linear(x, w, f"{p}{name}."), c.n_heads) for name in ("query", "key", "value"))
    keys = torch.ones_like(x[:, None, None, :, 0]) if seen is None else seen[:, None]
    keys = keys[:, :, None] if keys.ndim == 3 else keys
    scores = wide(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(keys < 0, -torch.inf)
    return weigh(scores, v, keys == 0)


def attended_norm(x: Tensor, attended: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    y = linear(attended, w, p + "attention.output.dense.") + x
    return layer_norm(y, w, p + "attention.output.LayerNorm.", c.norm_eps)


def bert_layer(x: Tensor, attended: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    y = attended_norm(x, attended, w, p, c)
    units = activate(linear(y, w, p + "intermediate.dense."), c.activation)
    return layer_norm(linear(units, w, p + "output.dense.") + y, w, p + "output.LayerNorm.", c.norm_eps)


def local_layer(x: Tensor, w: Tensors, c: Config, mask: Tensor | None) -> Tensor:
    p = c.root + "initial_char_encoder.layer.0."
    return bert_layer(x, local_attention(x, w, c, mask), w, p, c)


def local_attention(x: Tensor, w: Tensors, c: Config, mask: Tensor | None) -> Tensor:
    """The windows as a batch of their own, the last one filled up with what nobody sees."""
    B, T, D = x.shape
    p = c.root + "initial_char_encoder.layer.0.attention.self."
    if traced():
        return self_attention(x, w, p, c, windows_seen(x, c, mask))
    more = -T % c.window
    windows = F.pad(x, (0, 0, 0, more)).view(-1, c.window, D)  # (B * T/W, W, D)
    seen = torch.ones(B, T, device=x.device) if mask is None else mask
    # a last window of padding weighs all its own characters alike, and none of those that fill it up
    filled = F.pad(seen.to(x.dtype), (0, more), value=-1.0).view(-1, c.window)
    return self_attention(windows, w, p, c, filled).view(B, -1, D)[:, :T]


def windows_seen(x: Tensor, c: Config, mask: Tensor | None) -> Tensor:
    """For graphs, whose lengths are not known, what each character of x (B, T, D) has of the others: those of
    its window, (B, T, T)."""
    window = torch.arange(x.shape[1], device=x.device) // c.window
    seen = torch.ones_like(x[..., 0]) if mask is None else mask.to(x.dtype)
    return seen[:, None, :].masked_fill(window[:, None] != window, -1.0)


def downsampled(x: Tensor, w: Tensors, c: Config) -> Tensor:
    """One molecule of each `rate` characters, but for the last, before which comes the first character:
    (B, M, D)."""
    if not traced() and x.shape[1] < c.rate:
        raise ValueError(f"expected at least {c.rate} characters, found {x.shape[1]}")
    p = c.root + "chars_to_molecules."
    if traced():  # the same products, with as many molecules as the mask has
        flat = whole_molecules(x, c).flatten(2)
        made = F.linear(flat, w[p + "conv.weight"].mT.flatten(1), w[p + "conv.bias"])
    else:
        made = F.conv1d(x.mT, w[p + "conv.weight"], w[p + "conv.bias"], stride=c.rate).mT
    return torch.cat([x[:, :1], activate(made, c.activation)[:, :-1]], dim=1)


def downsample(x: Tensor, w: Tensors, c: Config) -> Both:
    return x, layer_norm(downsampled(x, w, c), w, c.root + "chars_to_molecules.LayerNorm.", c.norm_eps)


def molecules_seen(mask: Tensor | None, c: Config) -> Tensor | None:
    """(B, M)."""
    if mask is not None and traced():
        return whole_molecules(wide(mask)[..., None], c).amax((2, 3))
    return None if mask is None else F.max_pool1d(wide(mask)[:, None], c.rate)[:, 0]


def whole_molecules(x: Tensor, c: Config) -> Tensor:
    """(B, T, D) as (B, M, R, D), without the last characters where they are fewer than `rate`."""
    B, T, D = x.shape
    M = T // c.rate
    return x[:, : M * c.rate].reshape(B, M, c.rate, D)


def encoder_layer(x: Both, i: int, w: Tensors, c: Config, mask: Tensor | None) -> Both:
    (characters, m), p = x, f"{c.root}encoder.layer.{i}."
    attended = self_attention(m, w, p + "attention.self.", c, molecules_seen(mask, c))
    return characters, bert_layer(m, attended, w, p, c)


def upsampled(x: Both, w: Tensors, c: Config) -> Tensor:
    """Each character beside its molecule, those without one beside the last; then a convolution that keeps
    the length, and its gelu: (B, T, D)."""
    (characters, m), p = x, c.root + "projection."
    if traced():
        own = torch.arange(characters.shape[1], device=m.device) // c.rate + 1
        repeated = m[:, own.clamp(max=m.shape[1] - 1)]
    else:
        lengths = torch.full((m.shape[1],), c.rate, device=m.device)
        lengths[0] = 0
        lengths[-1] += characters.shape[1] - int(lengths.sum())
        repeated = m.repeat_interleave(lengths, dim=1)
    both = torch.cat([characters, repeated], dim=-1)
    before = (c.kernel - 1) // 2
    both = F.pad(both.mT, (before, c.kernel - 1 - before))
    return activate(F.conv1d(both, w[p + "conv.weight"], w[p + "conv.bias"]).mT, c.activation)


def upsample(x: Both, w: Tensors, c: Config) -> Both:
    return layer_norm(upsampled(x, w, c), w, c.root + "projection.LayerNorm.", c.norm_eps), x[1]


def final_layer(x: Both, w: Tensors, c: Config, mask: Tensor | None) -> Both:
    (characters, m), p = x, c.root + "final_char_encoder.layer.0."
    attended = self_attention(characters, w, p + "attention.self.", c, mask)
    return bert_layer(characters, attended, w, p, c), m


# --- heads ----------------------------------------------------------------------------------------------


def pool(x: Both, ranks: Ranks, c: Config) -> Tensor:
    """Of the first molecule: (B, D), or (B, C, D)."""
    return torch.tanh(linear(x[1][..., 0, :], ranks[0], c.root + "pooler.dense."))


def classified(y: Tensor, ranks: Ranks) -> Tensor:
    return wide(linear(y, ranks[0], "classifier."))


# What `encode` gives goes into each: (B, L) logits of a sequence or the values of a regression, (B, C) of
# choices, (B, T, L) of characters.
HEADS: dict[str, Callable[[Both, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": lambda x, ranks, c: (x[0], pool(x, ranks, c)),
    "sequence_classification": lambda x, ranks, c: classified(pool(x, ranks, c), ranks),
    "multiple_choice": lambda x, ranks, c: classified(pool(x, ranks, c), ranks).squeeze(-1),
    "token_classification": lambda x, ranks, c: classified(x[0], ranks),
    "question_answering": lambda x, ranks, c: span_logits(x[0], ranks[0]),
}


# --- foretold differences -------------------------------------------------------------------------------

# The two forms of gelu are nowhere further apart than 4.7324e-4, which they are at -2.699 and 2.699.
GELU_GAP = 4.74e-4


def after_norm(z: Tensor, reach: Tensor | float, gamma: Tensor, eps: float) -> Tensor:
    """How far each number that a layer norm makes of z (B, T, D) can move when z moves by `reach` in length.

    The norm takes the mean away and divides by s, the root of variance and epsilon. Its derivative is a
    contraction over s, and s itself moves by at most reach / sqrt(D) on the way."""
    y = wide(z)
    s = (y.var(-1, correction=0, keepdim=True) + eps).sqrt() - reach / y.shape[-1] ** 0.5
    return torch.where(s > 0, reach / s, torch.inf) * wide(gamma).abs()


def layer_bound(x: Tensor, w: Tensors, p: str, c: Config, attended: Tensor) -> Tensor:
    """Of a layer: what leaves its gelu moves by at most GELU_GAP in each of F units, so what the next matrix
    makes of it by that times sqrt(F) and its largest singular value."""
    y = attended_norm(x, attended, w, p, c)
    units = activate(linear(y, w, p + "intermediate.dense."), c.activation)
    matrix = wide(w[p + "output.dense.weight"])
    reach = GELU_GAP * units.shape[-1] ** 0.5 * torch.linalg.matrix_norm(matrix, 2)
    gamma = w[p + "output.LayerNorm.weight"]
    return after_norm(linear(units, w, p + "output.dense.") + y, reach, gamma, c.norm_eps)


def initial_bound(x: Tensor, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    w, p = ranks[0], c.root + "initial_char_encoder.layer.0."
    return layer_bound(x, w, p, c, local_attention(x, w, c, mask))


def molecules_bound(x: Tensor, ranks: Ranks, c: Config) -> Both:
    """The first molecule has not been through the gelu."""
    w, p = ranks[0], c.root + "chars_to_molecules."
    z = downsampled(x, w, c)
    bound = after_norm(z, GELU_GAP * z.shape[-1] ** 0.5, w[p + "LayerNorm.weight"], c.norm_eps)
    bound[:, 0] = 0
    return torch.zeros_like(x), bound


def deep_bound(x: Both, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Both:
    (characters, m), w, p = x, ranks[0], f"{c.root}encoder.layer.{i}."
    attended = self_attention(m, w, p + "attention.self.", c, molecules_seen(mask, c))
    return torch.zeros_like(characters), layer_bound(m, w, p, c, attended)


def projection_bound(x: Both, ranks: Ranks, c: Config) -> Both:
    w, p = ranks[0], c.root + "projection."
    z = upsampled(x, w, c)
    bound = after_norm(z, GELU_GAP * z.shape[-1] ** 0.5, w[p + "LayerNorm.weight"], c.norm_eps)
    return bound, torch.zeros_like(x[1])


def final_bound(x: Both, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Both:
    (characters, m), w, p = x, ranks[0], c.root + "final_char_encoder.layer.0."
    attended = self_attention(characters, w, p + "attention.self.", c, mask)
    return layer_bound(characters, w, p, c, attended), torch.zeros_like(m)


# By phase, "layer" for those of the deep stack: what the other form of gelu may come to.
bounds: dict[str, Callable[..., Tensor | Both]] = {
    "initial_char_encoder": initial_bound,
    "chars_to_molecules": molecules_bound,
    "layer": deep_bound,
    "projection": projection_bound,
    "final_char_encoder": final_bound,
}


# --- known mistakes -------------------------------------------------------------------------------------

Make = Callable[[Tensors], dict[str, Tensor]]
Pair = tuple[Make, Make]  # how it is made, and how it is taken back


def mistakes(names: Collection[str], c: Config) -> dict[str, Pair]:
    """What converters of these models get wrong, for the tensors among `names`. A reader that is wrong by
    one in the hash, or in a molecule's place, is seen as tables whose rows, or a kernel whose taps, moved."""
    tables = [f"{c.root}char_embeddings.HashBucketCodepointEmbedder_{s}.weight" for s in range(c.n_hashes)]
    down, up = c.root + "chars_to_molecules.conv.weight", c.root + "projection.conv.weight"
    made = _of_tables(tables) if set(tables) <= set(names) else {}
    for name in (n for n in (down, up) if n in names):
        made[f"{name}: taps reversed"] = _change(name, lambda x: x.flip(-1))
        made[f"{name}: taps off by one"] = _change(name, lambda x: x.roll(1, -1), lambda x: x.roll(-1, -1))
    if down in names:
        made[f"{down}: in and out exchanged"] = _change(down, lambda x: x.transpose(0, 1).contiguous())
    if up in names:
        halves = f"{up}: characters and molecules exchanged"
        made[halves] = _change(up, lambda x: x.roll(x.shape[1] // 2, 1))
    for layer in ("initial_char_encoder.layer.0.", "final_char_encoder.layer.0."):
        p = f"{c.root}{layer}attention."
        query, key, out = (f"{p}{n}.weight" for n in ("self.query", "self.key", "output.dense"))
        if {query, key, out} <= set(names):
            made[f"{query} and that of the key exchanged"] = _reordered([query, key], [1, 0])
            made[f"{out} transposed"] = _change(out, lambda x: x.T.contiguous())
    return made


def _of_tables(tables: list[str]) -> dict[str, Pair]:
    order, text = list(range(len(tables))), sorted(range(len(tables)), key=str)
    made = {"hash of the code point and not of the one after it": (_rolled(tables, 1), _rolled(tables, -1))}
    if len(order) > 1:
        made["tables of hashes moved on by one"] = _reordered(tables, [*order[1:], 0])
    if text != order:
        made["tables of hashes in the order of their names"] = _reordered(tables, text)
    return made


def _change(
    name: str, make: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor] | None = None
) -> Pair:
    """Of one tensor; without `back` a change that takes itself back."""

    def made(change: Callable[[Tensor], Tensor]) -> Make:
        return lambda w: {name: change(w[name])}

    return made(make), made(back or make)


def _rolled(tables: list[str], by: int) -> Make:
    """Every row where the hash of the code point `by` after its own looks for it."""
    return lambda w: {n: w[n].roll(by * prime, 0) for n, prime in zip(tables, PRIMES, strict=False)}


def _reordered(names: list[str], order: list[int]) -> Pair:
    """Each tensor under the name of another."""

    def made(order: list[int]) -> Make:
        return lambda w: {name: w[names[s]] for name, s in zip(names, order, strict=True)}

    return made(order), made(sorted(range(len(order)), key=order.__getitem__))


def config_mistakes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Other values of config.json by what they would be; a window shows where a text is longer than it."""
    window = int(complete(config, (), ABSENT)["local_transformer_stride"])
    return {
        f"windows of {other} characters where they have {window}": {"local_transformer_stride": other}
        for other in (window + 1, window // 2)
        if other > 0
    }
