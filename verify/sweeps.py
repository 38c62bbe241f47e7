"""Tables of which every row is compared as it leaves the embedding, whether a prompt uses it or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ckpt_tool.records import dataclass
from ckpt_tool.reference.phases import mapped
from ckpt_tool.verify.measure import Distance
from ckpt_tool.verify.prompts import ENTITIES
from ckpt_tool.verify.sides import BROKEN, Sample, Side
from ckpt_tool.verify.steps import Step

EVERY_ROW = "every row"  # the sweep over the embedding, beside the prompts
EVERY_ENTITY = "every entity"
PLACES = "entity_embeddings.position_embeddings.weight"  # positions where entities are mentioned
SWEEP = 512  # ids at once


@dataclass(frozen=True)
class Sweep:
    """A table whose rows are each sent through the embedding: `inputs` makes a batch of ids (B, 1) and the
    further inputs of a prompt each out of numbers of rows (B, 1)."""

    name: str
    rows: int
    inputs: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


def sweeps(original: Side, converted: Side, shapes: Mapping[str, tuple[int, ...]]) -> list[Sweep]:
    """Of the words, and of the entities where a pass takes them. Where ids are hashed to fewer rows, each row
    has one of twice as many ids that follow each other."""
    table = max((shape[0] for shape in shapes.values() if shape), default=0)
    made = [Sweep(EVERY_ROW, min(converted.vocabulary, 2 * table), lambda ids: (ids, {}))]
    named = converted.raw.get("entity_vocab_size")
    if type(named) is int and set(ENTITIES) <= {*original.inputs} & {*converted.inputs}:
        places = max((shape[0] for n, shape in shapes.items() if n.endswith(PLACES)), default=1)
        inputs = partial(as_entities, named=named, places=places)
        made.append(Sweep(EVERY_ENTITY, max(named, places), inputs))
    return made


def as_entities(rows: Tensor, named: int, places: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Prompts of the first word alone, each with an entity, and each somewhere else: all of both tables."""
    zeros = torch.zeros_like(rows)
    positions = (rows % places)[..., None]
    return zeros, {"entity_ids": rows % named, "entity_mask": zeros + 1, "entity_positions": positions}


def sweep(
    original: Side,
    converted: Side,
    step: Step,
    samples: dict[str, Sample],
    rows: Sweep,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Every row of a table, whether a prompt uses it or not, each as a prompt of its own. The first block
    that differs joins the samples for the diagnosis. `share` is (k, n) for the k-th of n processes, which
    take the blocks in turns."""
    device = original.weights[0].device
    for start in range(share[0] * SWEEP, rows.rows, share[1] * SWEEP):
        at = torch.arange(start, min(start + SWEEP, rows.rows), device=device).view(-1, 1)
        ids, given = rows.inputs(at)
        try:
            sample = Sample(ids, original.run("embed", ids, given), given)
            one_row = [mapped(_as_one_row, y) for y in (sample.wanted, converted.run("embed", ids, given))]
            d = Sample(ids, one_row[0]).of(one_row[1])
        except BROKEN as error:
            step.broken = step.broken or f"{type(error).__name__}: {error}"
            return
        worst = step.distances.get(rows.name)
        if worst is None or d.nmse > worst.nmse:
            step.distances[rows.name] = Distance(d.max_delta, d.nmse, start + d.worst, d.magnitude)
        if not step.bar.holds(d) and rows.name not in samples:
            samples[rows.name] = sample


def _as_one_row(y: Tensor) -> Tensor:
    """(B, 1, C), a batch of prompts of one token each, as one prompt of B tokens."""
    return y.transpose(0, 1) if y.ndim > 2 else y
