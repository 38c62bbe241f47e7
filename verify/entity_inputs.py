"""The entities of a documented input: which they are, in the output's own vocabulary of entities, and where
they are mentioned, as a pass takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.dialects.entity_vocabulary import entries, pieces
from ckpt_tool.errors import CkptToolError
from ckpt_tool.verify.beside import Beside, Damaged

VOCABULARY = "entity_vocab.json"  # title: id, the title of a language as "en:Japan"
SPANS = ("entity_spans", "entities", "tokenizer_task", "add_prefix_space")  # what a tokenizer makes them of
# By the library's names, ours.
GIVEN = {
    "entity_position_ids": "entity_positions",
    "entity_attention_mask": "entity_mask",
    "entity_start_positions": "entity_start",
    "entity_end_positions": "entity_end",
}
NAMES = {*SPANS, *GIVEN, "entity_ids", "entity_tokens"}


class NoEntities(Exception):
    """Why the entities of an input are not known here."""


def entity_inputs(told: Mapping[str, Any], checkpoint: Checkpoint, device: str) -> dict[str, Tensor]:
    """Those of an entry's input (B, E, ...); none where it has none. NoEntities where it gives only where in
    the text they are, or titles that the output has no ids of."""
    if not NAMES & told.keys():
        return {}
    if "entity_position_ids" not in told or not {"entity_ids", "entity_tokens"} & told.keys():
        raise NoEntities(
            "the entry gives entities as spans of its text, which takes a tokenizer that marks them"
        )
    ids = told.get("entity_ids")
    if ids is None:
        known = {title: i for title, i in titles(checkpoint) if title in told["entity_tokens"]}
        if missing := [t for t in told["entity_tokens"] if t not in known]:
            raise NoEntities(
                f"expected entities {', '.join(missing[:4])} in {VOCABULARY}, found none of the name"
            )
        ids = [[known[t] for t in told["entity_tokens"]]]
    found = {"entity_ids": ids, **{ours: told[name] for name, ours in GIVEN.items() if name in told}}
    return {name: torch.tensor(rows, device=device) for name, rows in found.items()}


def titles(checkpoint: Checkpoint) -> Iterator[tuple[str, int]]:
    """The titles of the output's entities and their ids, one at a time: there may be millions. NoEntities
    without a vocabulary that can be read."""
    beside = Beside.of(checkpoint)
    if VOCABULARY not in beside.names:
        raise NoEntities(f"the output has no {VOCABULARY}, which tells the ids of entities")
    try:
        yield from entries(pieces(beside.document(VOCABULARY)))
    except (Damaged, CkptToolError) as error:
        raise NoEntities(f"{VOCABULARY} cannot be read: {error}") from error
