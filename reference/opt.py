"""OPT as Meta published it: metaseq's `reshard-model_part-K.pt`, one file per model-parallel rank, or a
single `reshard.pt` (350m) or `restored.pt`.

Source: Zhang et al. 2022 (arXiv 2205.01068) and facebookresearch/metaseq @f2cd3679 and @f7ffa5fd (models/
transformer.py, modules/transformer_layer.py, model_parallel). The ranks stay apart as they do there: each
computes its own heads, hidden units and words, and the partial results are added or joined. Norms, positions,
the projections of 350m and the biases after a sum are on every rank.

All sizes but 350m normalise before each branch and once more after the last layer. 350m normalises after each
sum, has no norm at the end, and words of half its width, which are projected into the model and out of it.
The 1e-5 of the norms and the scale of the words, 1, are in the code and no file has them.

B batch, T tokens, D model width, E width of a word (D but in 350m), N heads, H head width, F feed-forward
width, V vocabulary, S ranks. Linear weights are (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference.blocks import (
    activate,
    affine,
    all_reduce,
    join_words,
    layer_norm,
    products,
    visible,
    weigh,
    words,
)
from ckpt_tool.reference.facts import Shapes, disagreements, first, misshapen, only, refuse
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, given, run

NORM_EPS = 1e-5
PAD = 1  # the row of padding in the table of positions; the first token has the row after it

# Layers, width, width of a word, feed-forward width, positions, words -> heads, whether norms come first.
# Published sizes all have relu.
PUBLISHED: dict[tuple[int, ...], tuple[int, bool]] = {
    (layers, D, E, 4 * D, 2048, 50272): (heads, E == D)
    for layers, D, E, heads in (
        (12, 768, 768, 12),
        (24, 1024, 512, 16),
        (24, 2048, 2048, 32),
        (32, 2560, 2560, 32),
        (32, 4096, 4096, 32),
        (40, 5120, 5120, 40),
        (48, 7168, 7168, 56),
        (64, 9216, 9216, 72),
        (96, 12288, 12288, 96),
    )
}

# What is told about a size: its name in config.json, and in metaseq's settings.
TOLD = {
    "layers": ("num_hidden_layers", "decoder_layers"),
    "width": ("hidden_size", "decoder_embed_dim"),
    "width of a word": ("word_embed_proj_dim", "decoder_input_dim"),
    "feed-forward width": ("ffn_dim", "decoder_ffn_embed_dim"),
    "positions": ("max_position_embeddings", "max_target_positions"),
    "words": ("vocab_size", "vocab_size"),
}
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "erf",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
# Settings with another value are of another model than OPT.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "no_scale_embedding": (True,),
    "share_decoder_input_output_embed": (True,),
    "decoder_learned_pos": (True,),
    "decoder_learned_sinusoidal": (False,),
    "alibi": (False,),
    "disable_bias": (False,),
    "disable_affine_ln": (False,),
    "enable_bias": (True,),
    "layer_norm_elementwise_affine": (True,),
    "_remove_final_layer_norm": (False,),
}


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int  # of the whole model
    pre_norm: bool
    activation: str  # relu, erf or tanh; the last two are forms of gelu
    fused: bool  # key, value and query are one tensor
    projected: bool  # words have a width of their own
    prefix: str  # of all names

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` are the pickled settings as plain values: `cfg` and `args` as in the file, or what is in
        one of them, or nothing; `shapes` those of rank 0, `overrides` facts from the user under their Hugging
        Face names, which win. What nobody tells is that of the published model of the same sizes. ValueError
        with all that is missing, that disagrees, and that this pass does not compute."""
        told = _settings(params)
        prefix, n_layers = _stack(shapes)
        start = f"{prefix}layers.0."
        fused = start + "self_attn.qkv_proj.weight" in shapes
        projected, normed = f"{prefix}project_in_dim.weight" in shapes, f"{prefix}layer_norm.weight" in shapes
        if missing := list(_missing(shapes, prefix, n_layers, fused, projected, normed)):
            raise ValueError(f"expected {', '.join(f'`{name}`' for name in missing[:4])}, found none")
        sizes = _sizes(shapes, prefix, n_layers, ranks)
        known = PUBLISHED.get(tuple(sizes.values()))
        said = {size: first(overrides.get(hf), told.get(own)) for size, (hf, own) in TOLD.items()}
        problems = [*disagreements(sizes, said), *only({**told, **overrides}, COMPUTED)]
        heads = first(overrides.get("num_attention_heads"), told.get("decoder_attention_heads"))
        before = first(overrides.get("do_layer_norm_before"), told.get("decoder_normalize_before"))
        before = first(before, known[1] if known else None, True if normed else None)
        activation, unknown = _activation(told, overrides, known is not None)
        problems += unknown
        if before is None:
            problems.append(
                "expected `do_layer_norm_before` in the settings or given by name, or a final norm, "
                "found none of them"
            )
        elif bool(before) != normed:
            problems.append(
                f"expected {'a' if before else 'no'} final norm, as norms come "
                f"{'before' if before else 'after'} a branch, found {'one' if normed else 'none'}"
            )
        n_heads = int(first(heads, known[0] if known else 0))
        if n_heads:
            problems += _misshapen(shapes, start, fused, sizes, n_heads, ranks)
        else:
            problems.append("expected `num_attention_heads` in the settings or given by name, found neither")
        refuse(problems)
        return cls(n_layers, n_heads, bool(before), activation, fused, projected, prefix)


def _settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model, wherever they are, without those that are unset or refer to others; `cfg`
    is newer than `args` and wins."""
    told = dict(params)
    cfg = params.get("cfg")
    for inner in (params.get("args"), cfg, cfg.get("model") if isinstance(cfg, Mapping) else None):
        if isinstance(inner, Mapping):
            told |= inner
    return {k: v for k, v in told.items() if v is not None and not (isinstance(v, str) and "${" in v)}


def _stack(shapes: Iterable[str]) -> tuple[str, int]:
    """What all names begin with, and the number of layers."""
    layers: dict[str, set[int]] = {}
    for name in shapes:
        if found := re.fullmatch(r"(|.*\.)layers\.(\d+)\.self_attn\.out_proj\.weight", name):
            layers.setdefault(found[1], set()).add(int(found[2]))
    if len(layers) != 1 or (numbers := next(iter(layers.values()))) != set(range(len(numbers))):
        raise ValueError("expected one stack of layers 0, 1, 2, ..., found another")
    return next(iter(layers)), len(numbers)


def _missing(
    shapes: Shapes, prefix: str, n_layers: int, fused: bool, projected: bool, normed: bool
) -> Iterator[str]:
    stems = ["self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"]
    stems += ["self_attn.qkv_proj"] if fused else [f"self_attn.{n}_proj" for n in "kvq"]
    wanted = ["embed_tokens.weight", "embed_positions.weight"]
    wanted += [f"layers.{i}.{s}.{k}" for i in range(n_layers) for s in stems for k in ("weight", "bias")]
    wanted += ["layer_norm.weight", "layer_norm.bias"] if normed else []
    wanted += ["project_in_dim.weight", "project_out_dim.weight"] if projected else []
    yield from (prefix + name for name in wanted if prefix + name not in shapes)


def _sizes(shapes: Shapes, prefix: str, n_layers: int, ranks: int) -> dict[str, int]:
    """In the order of PUBLISHED."""
    words, E = shapes[prefix + "embed_tokens.weight"]
    positions, D = shapes[prefix + "embed_positions.weight"]
    return {
        "layers": n_layers,
        "width": D,
        "width of a word": E,
        "feed-forward width": shapes[f"{prefix}layers.0.fc1.weight"][0] * ranks,
        "positions": positions - PAD - 1,
        "words": words * ranks,
    }


def _activation(
    told: Mapping[str, Any], overrides: Mapping[str, Any], published: bool
) -> tuple[str, list[str]]:
    """metaseq's own `gelu` is no answer: the exact one at first, the tanh form when its kernel was fused and
    since October 2022."""
    given = overrides.get("activation_function")
    if given is None:
        own = told.get("activation_fn", "relu" if published else None)
        if own == "relu":
            return "relu", []
        found = "neither" if own is None else f"`{own}` in the settings"
        return "", [f"expected relu or `activation_function` given by name, found {found}"]
    if given not in ACTIVATIONS:
        return "", [f"expected `activation_function` to be one of {', '.join(ACTIVATIONS)}, found {given}"]
    return ACTIVATIONS[given], []


def _misshapen(
    shapes: Shapes, start: str, fused: bool, sizes: Mapping[str, int], n_heads: int, ranks: int
) -> Iterator[str]:
    D, F = sizes["width"], sizes["feed-forward width"]
    if n_heads % ranks or D % n_heads:
        yield f"expected heads that {ranks} ranks and {D} channels can share, found {n_heads}"
    rows = {"qkv_proj": 3 * D} if fused else {f"{n}_proj": D for n in "kvq"}
    wanted = {f"{start}self_attn.{n}.weight": (r // ranks, D) for n, r in rows.items()}
    wanted |= {f"{start}self_attn.out_proj.weight": (D, D // ranks), f"{start}fc2.weight": (D, F // ranks)}
    yield from misshapen(shapes, wanted)


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


def forward(ids: Tensor, ranks: Ranks, c: Config, *, mask: Tensor | None = None) -> Tensor:
    """Logits (B, T, V). `mask` (B, T) is 1 for tokens and 0 for padding, by default there is none."""
    logits: Tensor = run(phases(ranks, c, given(mask=mask)), ids)
    return logits


def embed(ids: Tensor, ranks: Ranks, c: Config, *, mask: Tensor | None = None) -> Tensor:
    """Tokens are counted from row 2 of the table of positions, past any padding, which has row 1."""
    x = words(ids, [w[c.prefix + "embed_tokens.weight"] for w in ranks])
    real = torch.ones_like(ids) if mask is None else mask.long()
    if c.projected:
        x = x @ ranks[0][c.prefix + "project_in_dim.weight"].T  # (B, T, D)
    return x + ranks[0][c.prefix + "embed_positions.weight"][real.cumsum(1) * real + PAD]


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    """Each rank normalises with its own copy of the norm weights, as it does in the original."""
    p, S, seen = f"{c.prefix}layers.{i}.", len(ranks), visible(x, mask=mask)
    y = [norm(x, w, p + "self_attn_layer_norm.") if c.pre_norm else x for w in ranks]
    heads = [attention(z, w, p + "self_attn.", c, S, seen) for z, w in zip(y, ranks, strict=True)]
    x = x + all_reduce(heads) + ranks[0][p + "self_attn.out_proj.bias"]
    y = [norm(x, w, p + f"{'final' if c.pre_norm else 'self_attn'}_layer_norm.") for w in ranks]
    x = x if c.pre_norm else y[0]
    x = x + all_reduce(feed_forward(z, w, p, c) for z, w in zip(y, ranks, strict=True))
    x = x + ranks[0][p + "fc2.bias"]
    return x if c.pre_norm else norm(x, ranks[0], p + "final_layer_norm.")


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The words are the output layer; `output_projection`, where a file has it, is a copy of them."""
    parts = []
    for w in ranks:
        y = norm(x, w, c.prefix + "layer_norm.") if c.pre_norm else x
        y = y @ w[c.prefix + "project_out_dim.weight"].T if c.projected else y  # (B, T, E)
        parts.append(y @ w[c.prefix + "embed_tokens.weight"].T)  # (B, T, V/S)
    return join_words(parts)


def norm(x: Tensor, w: Mapping[str, Tensor], stem: str) -> Tensor:
    return layer_norm(x, w, stem, NORM_EPS)


def attention(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config, S: int, seen: Tensor) -> Tensor:
    """The part of the sum over heads that this rank's heads contribute: (B, T, D). The fused tensor of a rank
    holds the keys of its heads, then their values, then their queries, whatever its name says."""
    B, T, _ = x.shape
    if c.fused:
        k, v, q = affine(x, w, p + "qkv_proj.").view(B, T, 3, c.n_heads // S, -1).unbind(2)
    else:
        k, v, q = (affine(x, w, f"{p}{n}_proj.").view(B, T, c.n_heads // S, -1) for n in "kvq")
    hidden = torch.finfo(x.dtype).min  # -inf would leave padding before the first token without any key
    return weigh(products(q * q.shape[-1] ** -0.5, k), v, seen, hidden) @ w[p + "out_proj.weight"].T


def feed_forward(x: Tensor, w: Mapping[str, Tensor], p: str, c: Config) -> Tensor:
    """The part of the sum over hidden units that this rank's F/S units contribute: (B, T, D)."""
    return activate(affine(x, w, p + "fc1."), c.activation) @ w[p + "fc2.weight"].T
