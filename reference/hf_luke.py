"""LUKE in the Hugging Face layout, `luke.encoder.layer.{i}.`, without `luke.` for LukeModel: words and
entities side by side. Each head as its class computes it.

Source: transformers 4.37.2 and 5.23.0 (eager attention), models/luke; without dropout.

B batch, T tokens, E entities, M tokens of an entity, D model width, V words, U entities, L labels, C choices.
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
    weigh,
    wide,
)
from ckpt_tool.reference.hf_heads import OF_WORDS, kind_of, of_class
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes

CLASSES = (
    "Model ForMaskedLM ForEntityClassification ForEntityPairClassification ForEntitySpanClassification "
    "ForSequenceClassification ForTokenClassification ForQuestionAnswering ForMultipleChoice"
)
ARCHITECTURES = tuple(f"Luke{name}" for name in CLASSES.split())
REQUIRED = ("num_hidden_layers", "num_attention_heads")
ABSENT = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "use_entity_aware_attention": True,
    "pad_token_id": 1,
}
AWARE = ("w2e_query", "e2w_query", "e2e_query")


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    norm_eps: float
    activation: str  # as `activate` calls it
    aware: bool  # entities have queries of their own
    padding: int
    positions: int
    root: str  # of all names but those of heads
    kind: str = "masked_lm"  # the head of the class

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what this pass does not compute."""
        config = complete(config, REQUIRED, ABSENT)
        only(config, {"tie_word_embeddings": True, "position_embedding_type": "absolute"})
        return cls(
            n_layers=int(config["num_hidden_layers"]),
            n_heads=int(config["num_attention_heads"]),
            norm_eps=float(config["layer_norm_eps"]),
            activation=one_of(config, "hidden_act", ACTIVATIONS),
            aware=bool(config["use_entity_aware_attention"]),
            padding=int(config["pad_token_id"]),
            positions=int(config["max_position_embeddings"]),
            root="" if config.get("architectures") == ["LukeModel"] else "luke.",
            kind=kind_of(config, "masked_lm"),
        )


# States of words (B, T, D), and of entities (B, E, D) where there are any.
Hidden = tuple[Tensor, Tensor | None]


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    spans = ("entity_start", "entity_end") if c.kind == "entity_span_classification" else ()
    return ("token_types", "mask", "entity_ids", "entity_mask", "entity_positions", *spans)


def needed(c: Config) -> tuple[str, ...]:
    """What the class cannot do without, of `inputs`."""
    return ("entity_ids",) if c.kind.startswith("entity_") else ()


def fits(tokens: int, c: Config) -> int:
    """Positions begin after that of padding."""
    return min(tokens, c.positions - c.padding - 1)


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    if c.kind not in OF_WORDS:
        given = dict(inputs)
        names = [name for name in ("start", "end") if f"entity_{name}" in given]
        ends = {name: given.pop(f"entity_{name}") for name in names}
        known = {n: h for n, h in HEADS.items() if not n.startswith("entity_") or "entity_ids" in inputs}
        known.pop("entity_span_classification", None)
        if c.kind == "entity_span_classification" and len(ends) == 2:
            known[c.kind] = partial(of_spans, start=ends["start"], end=ends["end"])
        own = of_class(c.kind, known, lambda x, ranks, c: x[0])
        own |= {"pooler_output": pool} if c.kind == "base_model" else {}
        return decoder_phases(embed, layer, own, ranks, c, given)
    heads: dict[str, Callable[..., Any]] = {"head": head, "pooler_output": pool}
    if "entity_ids" in inputs:
        heads["entity_logits"] = entity_logits
    return decoder_phases(embed, layer, heads, ranks, c, inputs)


forward, encode = passes(phases)


# --- the model --------------------------------------------------------------------------------------------


def embed(
    ids: Tensor,
    ranks: Ranks,
    c: Config,
    *,
    token_types: Tensor | None = None,
    entity_ids: Tensor | None = None,
    entity_positions: Tensor | None = None,
) -> Hidden:
    (w,), p = ranks, c.root + "embeddings."
    mask = ids.ne(c.padding).int()
    positions = (mask.cumsum(dim=1) * mask).long() + c.padding
    types = torch.zeros_like(ids) if token_types is None else token_types
    x = F.embedding(ids, w[p + "word_embeddings.weight"])
    x = x + F.embedding(positions, w[p + "position_embeddings.weight"])
    x = x + F.embedding(types, w[p + "token_type_embeddings.weight"])
    words = layer_norm(x, w, p + "LayerNorm.", c.norm_eps)
    if entity_ids is None:
        return words, None
    if entity_positions is None:
        raise ValueError("expected entity_position_ids beside entity_ids, found none")
    return words, entity_embeddings(entity_ids, entity_positions, w, c)


def entity_embeddings(ids: Tensor, positions: Tensor, w: Tensors, c: Config) -> Tensor:
    """The positions (B, E, M) are raw ones of the words in a table of the entities' own, -1 where there is
    none; their mean divides by at least 1e-7."""
    p = c.root + "entity_embeddings."
    x = F.embedding(ids, w[p + "entity_embeddings.weight"])
    if p + "entity_embedding_dense.weight" in w:
        x = linear(x, w, p + "entity_embedding_dense.", bias=False)
    mask = (positions != -1).type_as(x).unsqueeze(-1)
    places = F.embedding(positions.clamp(min=0), w[p + "position_embeddings.weight"]) * mask
    x = x + places.sum(dim=-2) / mask.sum(dim=-2).clamp(min=1e-7)
    x = x + F.embedding(torch.zeros_like(ids), w[p + "token_type_embeddings.weight"])
    return layer_norm(x, w, p + "LayerNorm.", c.norm_eps)


def layer(
    x: Hidden,
    i: int,
    ranks: Ranks,
    c: Config,
    mask: Tensor | None = None,
    entity_mask: Tensor | None = None,
) -> Hidden:
    (w,), p = ranks, f"{c.root}encoder.layer.{i}."
    hidden = of_padding(x, mask, entity_mask)
    attended = linear(attention(x, w, p + "attention.self.", c, hidden), w, p + "attention.output.dense.")
    y = layer_norm(attended + together(x), w, p + "attention.output.LayerNorm.", c.norm_eps)
    z = linear(activate(linear(y, w, p + "intermediate.dense."), c.activation), w, p + "output.dense.")
    y = layer_norm(z + y, w, p + "output.LayerNorm.", c.norm_eps)
    T = x[0].shape[1]
    return y[:, :T], None if x[1] is None else y[:, T:]


def together(x: Hidden) -> Tensor:
    """Words before entities: (B, T + E, D)."""
    return x[0] if x[1] is None else torch.cat([x[0], x[1]], dim=1)


def of_padding(x: Hidden, mask: Tensor | None, entity_mask: Tensor | None) -> Tensor:
    """Where a key is padding, words before entities: (B, 1, 1, T + E)."""

    def of(stream: Tensor, own: Tensor | None) -> Tensor:
        return (
            torch.zeros(stream.shape[:2], dtype=torch.bool, device=stream.device) if own is None else own == 0
        )

    parts = [of(x[0], mask)] + ([] if x[1] is None else [of(x[1], entity_mask)])
    return torch.cat(parts, dim=-1)[:, None, None, :]


def attention(x: Hidden, w: Tensors, p: str, c: Config, hidden: Tensor) -> Tensor:
    """(B, T + E, D). With entity-aware attention the four blocks of scores stand beside each other before one
    softmax over all keys."""

    def heads(y: Tensor, name: str) -> Tensor:
        return split_heads(linear(y, w, f"{p}{name}."), c.n_heads)

    key, value = heads(together(x), "key"), heads(together(x), "value")  # (B, N, T + E, H)
    if c.aware and x[1] is not None:
        keys, T = key.transpose(-1, -2), x[0].shape[1]
        to_words, to_entities = keys[..., :T], keys[..., T:]
        w2w, w2e = heads(x[0], "query") @ to_words, heads(x[0], "w2e_query") @ to_entities
        e2w, e2e = heads(x[1], "e2w_query") @ to_words, heads(x[1], "e2e_query") @ to_entities
        scores = torch.cat([torch.cat([w2w, w2e], dim=3), torch.cat([e2w, e2e], dim=3)], dim=2)
    else:
        scores = heads(together(x), "query") @ key.transpose(-1, -2)
    return weigh(wide(scores / key.shape[-1] ** 0.5), value, hidden)


# --- heads ------------------------------------------------------------------------------------------------


def head(x: Hidden, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V) of words; the activation is gelu whatever config.json says. A file may hold the
    output layer too, which transformers 4 ties to the words and 5.23.0 reads."""
    (w,), p = ranks, "lm_head."
    y = layer_norm(activate(linear(x[0], w, p + "dense."), "none"), w, p + "layer_norm.", c.norm_eps)
    name = "lm_head.decoder.weight"
    table = w[name if name in w else c.root + "embeddings.word_embeddings.weight"]
    return wide(F.linear(y, table, w[p + "bias"]))


def entity_logits(x: Hidden, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, E, U) of entities."""
    (w,), p = ranks, "entity_predictions."
    y = activate(linear(entities(x), w, p + "transform.dense."), c.activation)
    y = layer_norm(y, w, p + "transform.LayerNorm.", c.norm_eps)
    return wide(F.linear(y, w[c.root + "entity_embeddings.entity_embeddings.weight"]) + w[p + "bias"])


def entities(x: Hidden) -> Tensor:
    if x[1] is None:
        raise ValueError("expected entity_ids, found none")
    return x[1]


def pool(x: Hidden, ranks: Ranks, c: Config) -> Tensor:
    """pooler_output, of the first token: (B, D), or (B, C, D)."""
    return torch.tanh(linear(x[0][..., 0, :], ranks[0], c.root + "pooler.dense."))


def masked_lm(x: Hidden, ranks: Ranks, c: Config) -> Tensor | tuple[Tensor, Tensor]:
    words = head(x, ranks, c)
    return words if x[1] is None else (words, entity_logits(x, ranks, c))


def model(x: Hidden, ranks: Ranks, c: Config) -> tuple[Tensor, ...]:
    """last_hidden_state, pooler_output, and entity_last_hidden_state where there are entities."""
    return (x[0], pool(x, ranks, c), *([] if x[1] is None else [x[1]]))


def classified(y: Tensor, ranks: Ranks, bias: bool = True) -> Tensor:
    return wide(linear(y, ranks[0], "classifier.", bias))


def of_pair(x: Hidden, ranks: Ranks, c: Config) -> Tensor:
    """(B, L) of the first two entities; the classifier has no bias, whatever a config.json says."""
    e = entities(x)
    return classified(torch.cat([e[:, 0], e[:, 1]], dim=1), ranks, bias=False)


def of_spans(x: Hidden, ranks: Ranks, c: Config, *, start: Tensor, end: Tensor) -> Tensor:
    """(B, E, L) from entity_start_positions and entity_end_positions, (B, E) each, the last word included."""
    width = x[0].shape[-1]
    first, last = (torch.gather(x[0], -2, at.unsqueeze(-1).expand(-1, -1, width)) for at in (start, end))
    return classified(torch.cat([first, last, entities(x)], dim=2), ranks)


# What `encode` gives goes into each; the head of spans takes `start` and `end` too.
HEADS: dict[str, Callable[..., Any]] = {
    "base_model": model,
    "masked_lm": masked_lm,
    "sequence_classification": lambda x, ranks, c: classified(pool(x, ranks, c), ranks),
    "multiple_choice": lambda x, ranks, c: classified(pool(x, ranks, c), ranks).squeeze(-1),
    "token_classification": lambda x, ranks, c: classified(x[0], ranks),
    "question_answering": lambda x, ranks, c: span_logits(x[0], ranks[0]),
    "entity_classification": lambda x, ranks, c: classified(entities(x)[:, 0], ranks),
    "entity_pair_classification": of_pair,
    "entity_span_classification": of_spans,
}


# --- typical mistakes -------------------------------------------------------------------------------------

Change = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def mistakes(names: Collection[str], c: Config) -> dict[str, Change | tuple[Change, Change]]:
    """What converters of LUKE get wrong in these tensors, of one phase: how to plant it, and how to undo it
    where that is not the same."""
    made: dict[str, Change | tuple[Change, Change]] = {}
    words, places = (f"{c.root}{x}.position_embeddings.weight" for x in ("embeddings", "entity_embeddings"))
    if {words, places} <= {*names}:
        made["positions of words and entities exchanged"] = _exchanged(words, places)
        made["positions of entities counted from 2"] = (_rolled(places, -2), _rolled(places, 2))
    table = f"{c.root}entity_embeddings.entity_embeddings.weight"
    if "entity_predictions.bias" in names:  # whose logits show each row
        made["[MASK2] left at zero"] = (_last_zero(table), _last_of(table, 2))
    if "lm_head.bias" in names:
        tables = [n for n in names if n in ("lm_head.decoder.weight", f"{c.root}{WORDS}", "lm_head.bias")]
        made["<ent> and <ent2> copied from # and @"] = _last_exchanged(*tables)
    for query in (n for n in names if n.endswith("attention.self.query.weight")):
        pair = [query, query.replace("query", "key")]
        both = [*pair, *(n.replace("weight", "bias") for n in pair)]
        if {*both} <= {*names}:
            made["query and key exchanged"] = _pairs(both)
    return made


def config_mistakes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values that conversions have written otherwise: LukeConfig's own where the original has another."""
    return {} if config.get("layer_norm_eps") == 1e-12 else {"default epsilon": {"layer_norm_eps": 1e-12}}


WORDS = "embeddings.word_embeddings.weight"


def _exchanged(one: str, other: str) -> Change:
    return lambda w: {one: w[other], other: w[one]}


def _pairs(names: list[str]) -> Change:
    """The first two in each other's places, and the other two."""
    first, second, third, fourth = names
    return lambda w: _exchanged(first, second)(w) | _exchanged(third, fourth)(w)


def _rolled(name: str, by: int) -> Change:
    return lambda w: {name: torch.roll(w[name], by, 0)}


def _last_exchanged(*names: str) -> Change:
    """The last two rows, which are copies of two others, the other way round."""
    return lambda w: {n: torch.cat([w[n][:-2], w[n][-2:].flip(0)]) for n in names}


def _last_zero(name: str) -> Change:
    return lambda w: {name: torch.cat([w[name][:-1], torch.zeros_like(w[name][-1:])])}


def _last_of(name: str, row: int) -> Change:
    """The last row a copy of another."""
    return lambda w: {name: torch.cat([w[name][:-1], w[name][row : row + 1]])}
