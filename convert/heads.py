"""Fewer key/value heads than a multi-head model has: each new head is the mean of neighbouring ones (Ainslie
et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023).

What comes out computes something else than what went in, and needs more training to be as good.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_tool.convert.layout import with_mean
from ckpt_tool.convert.plan import Value
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import Problem, fail_all
from ckpt_tool.records import dataclass

OPTION = "--gqa"
AXIS = "k"  # of the tables of every family that can do this: key/value heads


@dataclass(frozen=True)
class Pooled:
    """The steps with means in them, the new num_key_value_heads, and what is lost, in words."""

    steps: Steps
    heads: Value
    lossy: str


def pooled(steps: Steps, groups: int, sizes: Mapping[str, Value], *, ranks: int = 1) -> Pooled:
    """`steps` with the key/value heads of the original pooled to `groups`. Fails with `config-mismatch`
    unless there are as many of them as query heads and `groups` divides them."""
    query, kv = (sizes[f"num_{k}_heads"] for k in ("attention", "key_value"))
    problems = []

    def refuse(message: str) -> None:
        problems.append(Problem("config-mismatch", message, where=OPTION))

    if kv.value != query.value:
        refuse(
            f"expected a model of as many key/value heads as query heads, found {kv.value} ({kv.source}) "
            f"for {query.value} ({query.source})"
        )
    elif groups >= kv.value or kv.value % groups:
        refuse(f"expected fewer heads, a divisor of {kv.value} ({kv.source}), found {groups}")
    elif kv.value % ranks or (groups % ranks and ranks % groups):
        refuse(f"expected heads that {ranks} model-parallel ranks share evenly, found {groups}")
    fail_all(problems)
    each = kv.value // groups
    return Pooled(
        steps.changed(lambda s: with_mean(s, AXIS, groups), where=lambda s: AXIS in s.sizes),
        Value(groups, f"{OPTION}: means over {each} of {kv.value} heads each"),
        f"{OPTION}: {kv.value} key/value heads pooled to {groups}, each the float32 mean of {each}",
    )
