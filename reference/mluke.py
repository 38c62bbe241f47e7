"""mLUKE in the tensors of its own checkpoints: words and entities beside each other in one encoder.

Source: Yamada et al. 2020 (arXiv 2010.01057), Ri et al. 2022 (arXiv 2110.08151); studio-ousia/luke @25165454
(luke/model.py). Words have RoBERTa's positions, which count tokens that are not padding from 2 on; an entity
has the mean of the positions of its words in a table of its own, in which the first token has 0.

The layer norms after each sum are BERT's. Entity-aware attention asks with another query from words to
entities, from entities to words and among entities; keys and values are the same.

Texts may hold the words that converting adds, `<ent>` and `<ent2>`, and the entity `[MASK2]`: they are read
as what they are copies of, and the logits have them too.

B batch, T tokens, E entities, M tokens of an entity, D model width, N heads, H head width, V words, U
entities, L labels, C choices. Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference.blocks import (
    ACTIVATIONS,
    Tensors,
    activate,
    affine,
    layer_norm,
    products,
    weigh,
    wide,
)
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes

MASKED = -10000.0  # the score of a key that is padding
WORDS = "embeddings.word_embeddings.weight"
ENTITIES = "entity_embeddings.entity_embeddings.weight"
LAYER = "encoder.layer."


@dataclass(frozen=True)
class Config:
    """`again_words` and `again_entities` are the rows that those after the last are copies of."""

    n_layers: int
    n_heads: int
    norm_eps: float
    activation: str
    padding: int
    positions: int
    again_words: tuple[int, ...] = ()
    again_entities: tuple[int, ...] = ()

    @classmethod
    def from_original(
        cls,
        params: Mapping[str, Any] | None,
        shapes: Mapping[str, tuple[int, ...]],
        ranks: int = 1,
        overrides: Mapping[str, Any] | None = None,
    ) -> Self:
        """`params` is metadata.json, or its model_config; `overrides` go by the names in config.json, with
        `copied_rows`, by the name of a table the rows that stand after its last once more. ValueError where
        neither says a number that changes the result."""
        if ranks != 1:
            raise ValueError(f"expected one file, found {ranks} model-parallel ranks")
        told = dict(params or {})
        inner = told.get("model_config")
        told = {**(inner if isinstance(inner, Mapping) else told), **(overrides or {})}
        needed = ("num_attention_heads", "layer_norm_eps", "hidden_act")
        if missing := [name for name in needed if told.get(name) is None]:
            raise ValueError(f"expected {', '.join(missing)}, found none")
        if told["hidden_act"] not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"expected `hidden_act` to be one of {known}, found {told['hidden_act']}")
        copied = told.get("copied_rows", {})
        return cls(
            n_layers=1 + max(int(n.split(".")[2]) for n in shapes if n.startswith(LAYER)),
            n_heads=int(told["num_attention_heads"]),
            norm_eps=float(told["layer_norm_eps"]),
            activation=ACTIVATIONS[told["hidden_act"]],
            padding=int(told.get("pad_token_id", 1)),
            positions=shapes["embeddings.position_embeddings.weight"][0],
            again_words=tuple(copied.get(WORDS, ())),
            again_entities=tuple(copied.get(ENTITIES, ())),
        )


# Words (B, T, D), and entities (B, E, D) where there are any.
Streams = tuple[Tensor, Tensor | None]


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("token_types", "mask", "entity_ids", "entity_mask", "entity_positions")


def fits(tokens: int, c: Config) -> int:
    """The first token has the position after that of padding."""
    return min(tokens, c.positions - c.padding - 1)


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    heads: dict[str, Callable[..., Any]] = {"head": head, "pooler_output": pool}
    if "entity_ids" in inputs:
        heads["entity_logits"] = entity_head
    return decoder_phases(embed, layer, heads, ranks, c, inputs)


forward, encode = passes(phases)


# --- the encoder ------------------------------------------------------------------------------------------


def embed(
    ids: Tensor,
    ranks: Ranks,
    c: Config,
    *,
    token_types: Tensor | None = None,
    entity_ids: Tensor | None = None,
    entity_positions: Tensor | None = None,
) -> Streams:
    (w,) = ranks
    real = ids != c.padding
    positions = c.padding + torch.where(real, real.cumsum(1), 0)
    types = torch.zeros_like(ids) if token_types is None else token_types
    x = longer(w[WORDS], c.again_words)[ids] + w["embeddings.position_embeddings.weight"][positions]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][types], w, "embeddings.LayerNorm.", c)
    if entity_ids is None:
        return x, None
    if entity_positions is None:
        raise ValueError("expected positions of the entities, found none")
    return x, embed_entities(entity_ids, entity_positions, w, c)


def embed_entities(ids: Tensor, positions: Tensor, w: Tensors, c: Config) -> Tensor:
    """(B, E) ids and the tokens (B, E, M) of each, -1 for none: (B, E, D). An entity without tokens has no
    position."""
    p = "entity_embeddings."
    e = longer(w[ENTITIES], c.again_entities)[ids]
    if p + "entity_embedding_dense.weight" in w:
        e = affine(e, w, p + "entity_embedding_dense.", biased=False)
    there = (positions >= 0).to(e.dtype)  # (B, E, M)
    table = w[p + "position_embeddings.weight"]
    summed = torch.einsum("bem,bemd->bed", there, table[positions.clamp(min=0)])
    place = summed / there.sum(-1, keepdim=True).clamp(min=1)
    return norm(e + place + w[p + "token_type_embeddings.weight"][0], w, p + "LayerNorm.", c)


def longer(table: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The table with copies of some of its rows after the last."""
    return torch.cat([table, table[list(rows)]]) if rows else table


def layer(
    x: Streams,
    i: int,
    ranks: Ranks,
    c: Config,
    mask: Tensor | None = None,
    entity_mask: Tensor | None = None,
) -> Streams:
    (w,), p, T = ranks, f"{LAYER}{i}.", x[0].shape[1]
    seen = visible(x, mask, entity_mask)
    y = x[0] if x[1] is None else torch.cat([x[0], x[1]], 1)
    attended = affine(attention(y, T, w, p + "attention.self.", c, seen), w, p + "attention.output.dense.")
    y = norm(y + attended, w, p + "attention.output.LayerNorm.", c)
    units = activate(affine(y, w, p + "intermediate.dense."), c.activation)
    y = norm(y + affine(units, w, p + "output.dense."), w, p + "output.LayerNorm.", c)
    return y[:, :T], None if x[1] is None else y[:, T:]


def visible(x: Streams, mask: Tensor | None, entity_mask: Tensor | None) -> Tensor:
    """Which keys, words and then entities, are no padding: (B, 1, 1, T + E)."""
    both = []
    for stream, own in ((x[0], mask), (x[1], entity_mask)):
        if stream is not None:
            both.append(torch.ones_like(stream[..., 0], dtype=torch.bool) if own is None else own.bool())
    return torch.cat(both, 1)[:, None, None, :]


def attention(x: Tensor, T: int, w: Tensors, p: str, c: Config, seen: Tensor) -> Tensor:
    """x (B, T + E, D), words first."""

    def heads(y: Tensor, name: str) -> Tensor:
        return affine(y, w, f"{p}{name}.").view(*y.shape[:2], c.n_heads, -1)  # (B, ., N, H)

    k, v = heads(x, "key"), heads(x, "value")
    if p + "w2e_query.weight" in w and x.shape[1] > T:
        words, entities = x[:, :T], x[:, T:]
        rows = [
            torch.cat([products(heads(y, one), k[:, :T]), products(heads(y, other), k[:, T:])], -1)
            for y, one, other in ((words, "query", "w2e_query"), (entities, "e2w_query", "e2e_query"))
        ]
        scores = torch.cat(rows, -2)
    else:
        scores = products(heads(x, "query"), k)
    hidden = torch.where(seen, 0.0, MASKED).to(scores.dtype)
    scores = scores / k.shape[-1] ** 0.5 + hidden
    return weigh(scores, v, torch.ones_like(scores, dtype=torch.bool), 0.0)


def norm(x: Tensor, w: Tensors, stem: str, c: Config) -> Tensor:
    return layer_norm(x, w, stem, c.norm_eps)


# --- heads ------------------------------------------------------------------------------------------------


def head(x: Streams, ranks: Ranks, c: Config) -> Tensor:
    """Logits of words (B, T, V); the gelu is that of its definition whatever the layers have."""
    (w,) = ranks
    y = norm(activate(affine(x[0], w, "lm_head.dense."), "erf"), w, "lm_head.layer_norm.", c)
    return wide(y @ longer(w[WORDS], c.again_words).T + longer(w["lm_head.bias"], c.again_words))


def entity_head(x: Streams, ranks: Ranks, c: Config) -> Tensor:
    """Logits of entities (B, E, U)."""
    (w,), p = ranks, "entity_predictions."
    y = activate(affine(of_entities(x), w, p + "transform.dense."), c.activation)
    y = norm(y, w, p + "transform.LayerNorm.", c)
    table = longer(w[ENTITIES], c.again_entities)
    return wide(y @ table.T + longer(w[p + "bias"], c.again_entities))


def of_entities(x: Streams) -> Tensor:
    if x[1] is None:
        raise ValueError("expected entities beside the words, found none")
    return x[1]


def pool(x: Streams, ranks: Ranks, c: Config) -> Tensor:
    """Of the first word: (B, D), or (B, C, D)."""
    return torch.tanh(affine(x[0][..., 0, :], ranks[0], "pooler.dense."))


def base(x: Streams, ranks: Ranks, c: Config) -> tuple[Tensor, ...]:
    found = (x[0], pool(x, ranks, c))
    return found if x[1] is None else (*found, x[1])


def classes(y: Tensor, ranks: Ranks, stem: str = "classifier.", biased: bool = True) -> Tensor:
    """Logits, or the values of a regression, of what the classifier is put on: (..., L)."""
    return wide(affine(y, ranks[0], stem, biased))


def pair(x: Streams, ranks: Ranks, c: Config) -> Tensor:
    """(B, L) of two entities side by side, without a bias."""
    return classes(of_entities(x)[:, :2].flatten(1), ranks, biased=False)


def spans(x: Streams, ranks: Ranks, c: Config, *, start: Tensor, end: Tensor) -> Tensor:
    """(B, E, L) of the first and the last word (B, E) of each entity, and of the entity."""
    row = torch.arange(len(start), device=start.device)[:, None]
    return classes(torch.cat([x[0][row, start], x[0][row, end], of_entities(x)], -1), ranks)


# What `encode` gives goes into each. Question answering has logits of the first and of the last token of the
# answer, (B, T) each. The head of spans takes the first and the last word of each entity too.
HEADS: dict[str, Callable[..., Any]] = {
    "base_model": base,
    "masked_lm": lambda x, ranks, c: (
        head(x, ranks, c) if x[1] is None else (head(x, ranks, c), entity_head(x, ranks, c))
    ),
    "sequence_classification": lambda x, ranks, c: classes(pool(x, ranks, c), ranks),
    "multiple_choice": lambda x, ranks, c: classes(pool(x, ranks, c), ranks).squeeze(-1),
    "token_classification": lambda x, ranks, c: classes(x[0], ranks),
    "question_answering": lambda x, ranks, c: classes(x[0], ranks, "qa_outputs.").unbind(-1),
    "entity_classification": lambda x, ranks, c: classes(of_entities(x)[:, 0], ranks),
    "entity_pair_classification": pair,
    "entity_span_classification": spans,
}
