"""CANINE as Google trains it in TensorFlow, in the variables of its own checkpoints.

Source: Clark et al. 2022 (arXiv 2103.06874); google-research/language (canine/modeling.py, bert_modeling.py,
local_attention.py). A character is looked up by hashes of its code point. One layer lets it see those in its
window, a convolution makes a molecule of `rate` characters, the deep stack is of molecules, and another
convolution and layer see the characters again, each beside what its molecule has become.

Every gelu is the tanh form, which is all that the code knows under that name; every norm has an epsilon of
1e-12; there are 16 token types whatever `type_vocab_size` says, as the code has 16, and the convolution that
makes molecules is as wide as its stride whatever `downsampling_kernel_size` says. None of them is read.

A key that is not seen has 10000 less in its score, so that a window of padding alone weighs its keys as if
they were seen. transformers weighs them all alike: what leaves such a window differs there, and with it the
two characters before it, at which the second convolution looks ahead.

B batch, T characters, M molecules (T // rate), D model width, N heads, H head width, F feed-forward width,
R rows of a table of hashes, L labels, C choices. Kernels are (in, out) or (taps, in, out).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference.blocks import Tensors, activate, layer_norm, products, wide
from ckpt_tool.reference.facts import Shapes, disagreements, first, refuse, strange
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, passes

PRIMES = (31, 43, 59, 61, 73, 97, 103, 113, 137, 149, 157, 173, 181, 193, 211, 223)
UNSEEN = -10000.0
EPSILON = 1e-12
ACTIVATIONS = {"gelu": "tanh", "relu": "relu"}  # what the original calls them
TABLE = "char_embeddings/embeddings/HashBucketCodepointEmbedder_"
DOWN = "initial_char_encoder/initial_char_encoder/chars_to_molecules/"
UP = "final_char_encoder/"
# Defaults of CanineModelConfig for what tensors do not show; a file may leave them out.
DEFAULTS = {"num_attention_heads": 12, "hidden_act": "gelu", "local_transformer_stride": 128}
# Of a run, or without effect: see above.
OF_TRAINING = {"hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "__comment__"}
OF_TRAINING |= {"type_vocab_size", "downsampling_kernel_size"}
SPANS = ("start_logits", "end_logits")
PUBLISHED = (12, 768, 3072)  # layers, width, feed-forward width of canine-s and canine-c


@dataclass(frozen=True)
class Config:
    n_layers: int  # of the deep stack
    n_heads: int
    window: int  # characters that see each other in the first layer
    rate: int
    n_hashes: int
    n_positions: int
    taps: int  # of the convolution after the deep stack
    activation: str

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` are the settings beside the checkpoint, or nothing where there is no file; `shapes` those
        of its variables; `overrides` facts from the user under their Hugging Face names, which win but for
        `hidden_act`: that says what config.json is to have. What nobody tells is the default of the code if
        there are settings, or if the sizes are those of the published models. ValueError with all that is
        missing or disagrees."""
        n_layers, n_hashes = (
            _count(shapes, r"bert/layer_(\d+)/output/dense/kernel"),
            _count(shapes, TABLE + r"(\d+)"),
        )
        (R, width), (P, D) = shapes[TABLE + "0"], shapes["char_embeddings/char_position_embeddings"]
        F = shapes["initial_char_encoder/layer_0/intermediate/dense/kernel"][1]
        rate, taps = shapes[DOWN + "conv/kernel"][0], shapes[UP + "conv/kernel"][0]
        usual = DEFAULTS if params or (n_layers, D, F) == PUBLISHED else {}
        told = {**usual, **{k: v for k, v in params.items() if v is not None}}
        heads, window = (
            first(overrides.get(name), told.get(name))
            for name in ("num_attention_heads", "local_transformer_stride")
        )
        act = str(first(told.get("hidden_act"), "gelu")).lower()
        measured = {
            "num_hidden_layers": n_layers,
            "hidden_size": D,
            "intermediate_size": F,
            "num_hash_functions": n_hashes,
            "num_hash_buckets": R,
            "max_positions": P,
            "downsampling_rate": rate,
            "upsampling_kernel_size": taps,
        }
        problems = [*disagreements(measured, params), *disagreements(measured, overrides)]
        problems += disagreements({"max_position_embeddings": P}, overrides)
        problems += strange(params, {*measured, *DEFAULTS, *OF_TRAINING})
        for name, found in (("num_attention_heads", heads), ("local_transformer_stride", window)):
            if found is None or int(found) < 1:
                problems.append(
                    f"expected `{name}` in the settings or given by name, found {found or 'neither'}"
                )
        if heads and D % int(heads):
            problems.append(f"expected heads that {D} channels can share, found {heads}")
        if act not in ACTIVATIONS:
            problems.append(f"expected `hidden_act` to be one of {', '.join(ACTIVATIONS)}, found {act}")
        if n_hashes > len(PRIMES) or width * n_hashes != D:
            problems.append(
                f"expected at most 16 tables of hashes that share {D} channels, found {n_hashes} of {width}"
            )
        refuse(problems)
        return cls(n_layers, int(heads), int(window), rate, n_hashes, P, taps, ACTIVATIONS[act])


def _count(shapes: Shapes, pattern: str) -> int:
    """How many names there are that number what they are of. ValueError unless they are 0, 1, 2, ..."""
    found = sorted(int(m[1]) for m in (re.fullmatch(pattern, name) for name in shapes) if m)
    if not found or found != list(range(len(found))):
        raise ValueError(f"expected `{pattern}` numbered from 0, found {found[:8] or 'none'}")
    return len(found)


def vocabulary(c: Config) -> int:
    """Any code point."""
    return 0x110000


def fits(tokens: int, c: Config) -> int:
    """The largest number of characters up to `tokens` that the pass takes: a molecule at least."""
    most = min(tokens, c.n_positions)
    return most if most >= c.rate else 0


def padding(tokens: int, longest: int, c: Config) -> int:
    """How many of `tokens` characters a row that is padded to `longest` may have: the second convolution sees
    molecules of what comes after the last character, and none may have left a window of padding alone."""
    for last in reversed(range(min(tokens, longest))):
        alone = (last // c.window + 1) * c.window  # the first place of a window of padding alone
        if alone >= longest or (last + c.taps // 2) // c.rate < alone // c.rate:
            return last + 1
    return 0


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("token_types", "mask")


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    """Between the phases are characters (B, T, D), and from the second on with them molecules (B, M, D). The
    pooler reads the first molecule, the other heads characters."""
    (w,) = ranks
    if unknown := sorted(inputs.keys() - {"token_types", "mask"}):
        raise TypeError(f"expected no inputs {', '.join(unknown)}, as this pass takes none of them")
    mask, asked = inputs.get("mask"), "cls/tydi/output_weights" in w

    def deep(i: int) -> Phase:
        return Phase(f"layer {i}", "layer", i, partial(deep_layer, i=i, w=w, c=c, mask=mask))

    return [
        Phase("embed", "embed", None, partial(embed, w=w, c=c, token_types=inputs.get("token_types"))),
        Phase("initial_char_encoder", "layer", None, partial(initial, w=w, c=c, mask=mask)),
        Phase("chars_to_molecules", "layer", None, partial(to_molecules, w=w, c=c)),
        *(deep(i) for i in range(c.n_layers)),
        Phase("projection", "layer", None, partial(projection, w=w, c=c)),
        Phase("final_char_encoder", "layer", None, partial(final, w=w, c=c, mask=mask)),
        Phase("head", "head", None, sequence),
        Phase("pooler_output", "head", None, lambda x: pool(x, ranks)),
        *(
            Phase(name, "head", None, partial(spans, ranks=ranks, k=k))
            for k, name in enumerate(SPANS)
            if asked
        ),
    ]


forward, encode = passes(phases)
Both = tuple[Tensor, Tensor]  # characters (B, T, D), molecules (B, M, D)


# --- the parts ------------------------------------------------------------------------------------------


def dense(x: Tensor, w: Tensors, stem: str) -> Tensor:
    return x @ w[stem + "kernel"] + w[stem + "bias"]


def norm(x: Tensor, w: Tensors, stem: str) -> Tensor:
    return layer_norm(x, {"weight": w[stem + "gamma"], "bias": w[stem + "beta"]}, "", EPSILON)


def convolution(x: Tensor, w: Tensors, stem: str, stride: int) -> Tensor:
    """Of the windows that fit into x (B, T, D): a sum over the taps of the kernel (k, D, E)."""
    kernel = w[stem + "kernel"]
    places = (x.shape[1] - len(kernel)) // stride + 1
    taps = (x[:, j : j + stride * (places - 1) + 1 : stride] @ tap for j, tap in enumerate(kernel))
    return sum(taps, w[stem + "bias"])


def hashed(ids: Tensor, prime: int, rows: int) -> Tensor:
    return (ids.long() + 1) * prime % rows


def embed(ids: Tensor, w: Tensors, c: Config, token_types: Tensor | None = None) -> Tensor:
    tables = [w[f"{TABLE}{s}"] for s in range(c.n_hashes)]  # (R, D/S)
    x = torch.cat([t[hashed(ids, prime, len(t))] for t, prime in zip(tables, PRIMES, strict=False)], dim=-1)
    types = torch.zeros_like(ids) if token_types is None else token_types
    x = x + w["char_embeddings/segment_embeddings"][types]
    x = x + w["char_embeddings/char_position_embeddings"][: ids.shape[1]]
    return norm(x, w, "char_embeddings/LayerNorm/")


def attention(x: Tensor, w: Tensors, p: str, c: Config, seen: Tensor) -> Tensor:
    """`seen` (B or 1, T) are the keys."""
    q, k, v = (
        torch.unflatten(dense(x, w, f"{p}{n}/"), -1, (c.n_heads, -1)) for n in ("query", "key", "value")
    )
    scores = wide(products(q, k)) / q.shape[-1] ** 0.5  # (B, N, T, T)
    scores = scores + (1 - seen[:, None, None, :].to(scores.dtype)) * UNSEEN
    return torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1).to(v.dtype), v).flatten(2)


def layer(x: Tensor, w: Tensors, p: str, c: Config, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """BERT's: a norm after each sum."""
    a = norm(dense(attend(x), w, p + "attention/output/dense/") + x, w, p + "attention/output/LayerNorm/")
    units = activate(dense(a, w, p + "intermediate/dense/"), c.activation)
    return norm(dense(units, w, p + "output/dense/") + a, w, p + "output/LayerNorm/")


def everything(x: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(x.shape[:2], device=x.device) if mask is None else mask


def initial(x: Tensor, w: Tensors, c: Config, mask: Tensor | None) -> Tensor:
    """Characters that see those of their window."""
    p, seen = "initial_char_encoder/layer_0/", everything(x, mask)

    def within_windows(x: Tensor) -> Tensor:
        pairs = zip(torch.split(x, c.window, 1), torch.split(seen, c.window, 1), strict=True)
        return torch.cat([attention(y, w, p + "attention/self/", c, s) for y, s in pairs], dim=1)

    return layer(x, w, p, c, within_windows)


def to_molecules(x: Tensor, w: Tensors, c: Config) -> Both:
    """The first character stands before the molecules as it is, and the last molecule makes room for it."""
    if x.shape[1] < c.rate:
        raise ValueError(f"expected at least {c.rate} characters, found {x.shape[1]}")
    made = activate(convolution(x, w, DOWN + "conv/", c.rate), c.activation)
    return x, norm(torch.cat([x[:, :1], made[:, :-1]], dim=1), w, DOWN + "LayerNorm/")


def deep_layer(x: Both, i: int, w: Tensors, c: Config, mask: Tensor | None) -> Both:
    """A molecule is seen if one of the characters in its place is; the place of the first is not moved."""
    characters, m = x
    seen = torch.unflatten(everything(characters, mask)[:, : m.shape[1] * c.rate], 1, (-1, c.rate)).amax(-1)
    p = f"bert/layer_{i}/"
    return characters, layer(m, w, p, c, lambda y: attention(y, w, p + "attention/self/", c, seen))


def repeated(m: Tensor, T: int, rate: int) -> Tensor:
    """Of every character its molecule: (B, T, D). Those at the end have the last one, whose own place the
    first character took."""
    own = torch.arange(T, device=m.device) // rate + 1
    return m[:, own.clamp(max=m.shape[1] - 1)]


def projection(x: Both, w: Tensors, c: Config) -> Both:
    """A window reaches from one character before to two after, with four taps; beyond the ends are zeros."""
    characters, m = x
    both = torch.cat([characters, repeated(m, characters.shape[1], c.rate)], dim=-1)
    before = both.new_zeros(len(both), (c.taps - 1) // 2, both.shape[-1])
    after = both.new_zeros(len(both), c.taps // 2, both.shape[-1])
    made = convolution(torch.cat([before, both, after], dim=1), w, UP + "conv/", 1)
    return norm(activate(made, c.activation), w, UP + "LayerNorm/"), m


def final(x: Both, w: Tensors, c: Config, mask: Tensor | None) -> Both:
    characters, m = x
    p, seen = UP + "layer_0/", everything(characters, mask)
    return layer(characters, w, p, c, lambda y: attention(y, w, p + "attention/self/", c, seen)), m


# --- heads ----------------------------------------------------------------------------------------------


def sequence(x: Both) -> Tensor:
    return x[0]


def pool(x: Both, ranks: Ranks) -> Tensor:
    """Of the first molecule, which was the first character: (B, D), or (B, C, D)."""
    return torch.tanh(dense(x[1][..., 0, :], ranks[0], "pooler/dense/"))


def classes(y: Tensor, ranks: Ranks, stem: str = "output_") -> Tensor:
    """Logits, or the values of a regression: (..., L). BERT's fine-tuning code keeps these weights (L, D)."""
    return wide(y @ ranks[0][stem + "weights"].T + ranks[0][stem + "bias"])


def spans(x: Both, ranks: Ranks, k: int) -> Tensor:
    """Logits (B, T) of TyDi QA, which has them of the first and of the last character of the answer."""
    return classes(sequence(x), ranks, "cls/tydi/output_")[..., k]


# What `encode` gives goes into each. Question answering has logits of the first and of the last character of
# the answer, (B, T) each.
HEADS: dict[str, Callable[[Both, Ranks, Config], Tensor | tuple[Tensor, ...]]] = {
    "base_model": lambda x, ranks, c: (sequence(x), pool(x, ranks)),
    "sequence_classification": lambda x, ranks, c: classes(pool(x, ranks), ranks),
    "multiple_choice": lambda x, ranks, c: classes(pool(x, ranks), ranks).squeeze(-1),
    "token_classification": lambda x, ranks, c: classes(sequence(x), ranks),
    "question_answering": lambda x, ranks, c: (spans(x, ranks, 0), spans(x, ranks, 1)),
}
