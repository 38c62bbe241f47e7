"""The transformer of GPT-2, GPT-J, OPT and MegatronBert in the Hugging Face layout: layer norms; positions
are learned or turn part of each head. A family says in its own module which names, numbers and traits it has,
and what goes into the first layer.

Source: transformers 4.37.2 and 5.23.0 (eager attention), models/gpt2, gptj, codegen, opt and megatron_bert;
each without dropout. Cross attention is not read.

Names of sizes as in hf_blocks, and E the width of a word, which is D but in OPT 350m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from ckpt_tool.reference.hf_blocks import (
    GELUS,
    Cache,
    Tensors,
    activate,
    cached,
    complete,
    conv1d,
    grown,
    layer_norm,
    linear,
    one_of,
    only,
    rotate_neighbours,
    span_logits,
    split_heads,
    unseen,
    weigh,
    wide,
)
from ckpt_tool.reference.hf_heads import OF_WORDS, kind_of, of_class
from ckpt_tool.reference.phases import Ranks


def stems(table: str) -> dict[str, str]:
    """Names of tensors without their root and their last word, by what they are for; those of a layer follow
    `block`, its number and a dot."""
    words = table.split()
    return dict(zip(words[::2], words[1::2], strict=True))


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    norm_eps: float
    activation: str  # as `activate` calls it
    tied: bool  # the embedding table is also the output layer
    roots: tuple[str, ...] = ("", "transformer.")  # of all names but those of heads; the one that is there
    kind: str = "causal_lm"  # the head of the class
    turned: int = 0  # channels of each head; none: positions are learned
    causal: bool = True
    norm_first: bool = True  # before each branch, else after each sum
    final_norm: bool = True
    projected: bool = False  # words have a width of their own
    biased: bool = True  # projections have biases
    affine: bool = True  # norms have weights and biases
    by_depth: bool = False  # scores are divided by the number of the layer, from 1 on

    # What is so in all models of a family. `blocks` are those of a fused tensor, `order` is what each holds.
    names: ClassVar[Mapping[str, str]]
    blocks: ClassVar[int] = 1
    order: ClassVar[str] = "qkv"
    conv: ClassVar[bool] = False  # weights are (in, out)
    parallel: ClassVar[bool] = False  # of GPT-J: one norm, attention without biases, output with one
    late_scale: ClassVar[bool] = False  # scores are widened before they are scaled

    # Of config.json: what must be there, by the name of most models, which the family's `own` may replace;
    # where epsilon is, 1e-5 if nowhere; the activation, one of `known`; what its class takes for absent keys;
    # the only values of others that are computed.
    required: ClassVar[tuple[str, ...]] = ("num_hidden_layers", "num_attention_heads")
    own: ClassVar[Mapping[str, str]] = {}
    epsilon: ClassVar[str | None] = "layer_norm_epsilon"
    function: ClassVar[str] = "activation_function"
    known: ClassVar[Mapping[str, str]] = GELUS
    absent: ClassVar[Mapping[str, Any]] = {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
    computed: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what this pass does not compute."""
        named = {cls.own.get(name, name): config.get(name) for name in cls.required}
        config = complete({**named, **config}, tuple(named), cls.absent)
        only(config, cls.computed)
        layers, heads = (cls.own.get(name, name) for name in Config.required)
        numbers: dict[str, Any] = {
            "n_layers": int(config[layers]),
            "n_heads": int(config[heads]),
            "norm_eps": float(config[cls.epsilon]) if cls.epsilon else 1e-5,
            "activation": one_of(config, cls.function, cls.known),
            "tied": bool(config.get("tie_word_embeddings", True)),
            "kind": kind_of(config),
        }
        return cls(**{**numbers, **cls.traits(config)})

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a model has besides or otherwise, out of a config that is complete."""
        return {}


def rooted(ranks: Ranks, c: Config) -> tuple[Tensors, str]:
    """The tensors, and what the names of the model's begin with."""
    (w,), (*others, last) = ranks, c.roots
    return w, next((root for root in others if f"{root}{c.names['word']}weight" in w), last)


def layer(
    x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None, past: Cache | None = None
) -> Tensor:
    w, root = rooted(ranks, c)
    n, p = c.names, f"{root}{c.names['block']}{i}."
    y = norm(x, w, p + n["norm_1"], c) if c.norm_first else x
    hidden = unseen(x, mask, c.causal, cached(past, p))
    attended = attention(y, w, p, c, hidden, past, i + 1 if c.by_depth else 1)
    if c.parallel:
        return attended + feed_forward(y, w, p, c) + x
    x = x + attended
    if c.norm_first:
        return x + feed_forward(norm(x, w, p + n["norm_2"], c), w, p, c)
    x = norm(x, w, p + n["norm_1"], c)
    return norm(x + feed_forward(x, w, p, c), w, p + n["norm_2"], c)


def attention(
    x: Tensor, w: Tensors, p: str, c: Config, hidden: Tensor, past: Cache | None = None, over: int = 1
) -> Tensor:
    """CodeGen, whose projection is fused, keeps its sines and cosines in float32, GPT-J in the dtype of x.
    Scores are divided by `over`."""
    q, k, v = fused(x, w, p, c) if "fused" in c.names else apart(x, w, p, c)
    if c.turned:
        tables = wide(x).dtype if "fused" in c.names else x.dtype
        q, k = (wide(rotate_neighbours(y, c.turned, tables, cached(past, p))) for y in (q, k))
    k, v = grown(past, p, k, v)
    made = scores(q, k, c) if over == 1 else scores(q, k, c) / over
    return project(weigh(made, v, hidden), w, p + c.names["out"], c, not c.parallel)


def apart(x: Tensor, w: Tensors, p: str, c: Config) -> Iterator[Tensor]:
    """Query, key and value, (B, N, T, H) each."""
    for name in ("query", "key", "value"):
        yield split_heads(project(x, w, p + c.names[name], c, not c.parallel), c.n_heads)


def fused(x: Tensor, w: Tensors, p: str, c: Config) -> Iterator[Tensor]:
    """The same out of one tensor, in which every block has N/blocks heads of each."""
    rows = project(x, w, p + c.names["fused"], c, not c.parallel)
    parts = rows.view(*x.shape[:2], c.blocks, 3, c.n_heads // c.blocks, -1).unbind(3)
    return (parts[c.order.index(name)].flatten(2, 3).transpose(1, 2) for name in "qkv")


def scores(q: Tensor, k: Tensor, c: Config) -> Tensor:
    """(B, N, T, T) in float32 or wider, scaled where the module does it, which sixteen bits show."""
    made = q @ k.transpose(2, 3)
    if c.turned:
        return made / math.sqrt(q.shape[-1])
    scale = math.pow(q.shape[-1], -0.5)
    return wide(made) * scale if c.late_scale else wide(made * scale)


def feed_forward(x: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    units = activate(project(x, w, p + c.names["fc1"], c), c.activation)
    return project(units, w, p + c.names["fc2"], c)


def project(x: Tensor, w: Tensors, stem: str, c: Config, bias: bool = True) -> Tensor:
    return conv1d(x, w, stem) if c.conv else linear(x, w, stem, bias and c.biased)


def norm(x: Tensor, w: Tensors, stem: str, c: Config) -> Tensor:
    return layer_norm(x, w, stem, c.norm_eps, c.affine)


def finish(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """What the model gives for the last layer's output: (B, T, D), or (B, T, E) where words have their own
    width; (B, C, T, D) of choices."""
    w, root = rooted(ranks, c)
    y = norm(x, w, root + c.names["final_norm"], c) if c.final_norm else x
    return linear(y, w, root + c.names["out_of"], bias=False) if c.projected else y


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V) of the last layer's output."""
    w, root = rooted(ranks, c)
    output = root + c.names["word"] if c.tied else "lm_head."
    return wide(linear(finish(x, ranks, c), w, output, c.parallel))


# What the last layer gives goes into each. Logits of a sequence's classes are (B, T, L), of every position.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": finish,
    "causal_lm": head,
    "sequence_classification": lambda x, ranks, c: wide(
        linear(finish(x, ranks, c), ranks[0], "score.", bias=False)
    ),
    "token_classification": lambda x, ranks, c: wide(linear(finish(x, ranks, c), ranks[0], "classifier.")),
    "question_answering": lambda x, ranks, c: span_logits(finish(x, ranks, c), ranks[0]),
}


def own_heads(c: Config) -> dict[str, Callable[..., Tensor]]:
    """Those of the class, as phases."""
    return {"head": head} if c.kind in OF_WORDS else of_class(c.kind, HEADS, finish)
