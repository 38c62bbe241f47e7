"""What whole passes show position by position, in little memory: for pictures, not for verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ckpt_tool.records import dataclass
from ckpt_tool.verify.measure import at_once

MARKS = 300  # of a prompt's positions; of more the largest of several is kept
SHOWN = 4  # positions whose most probable tokens are shown


@dataclass(frozen=True)
class Positions:
    """Of one prompt: the largest |difference| of any logit at each position, and where the sets of the five
    most probable tokens differ, the largest difference first; `differing` counts these positions."""

    delta: tuple[float, ...]
    differing: int = 0
    top5: tuple[Mapping[str, Any], ...] = ()


def positions(found: Tensor, wanted: Tensor, *, tokens: bool) -> Positions:
    """Of logits (1, T, V) that are real, on both sides; `tokens` asks for the most probable ones."""
    some = at_once(wanted.shape[-1])
    delta: list[float] = []
    for start in range(0, wanted.shape[1], some):
        apart = found[:, start : start + some] - wanted[:, start : start + some]
        delta += apart.abs_().amax((0, -1)).nan_to_num(nan=math.inf).tolist()
    if not tokens or wanted.shape[-1] < 5:
        return Positions(tuple(delta))
    differing = []
    for start in range(0, wanted.shape[1], some):
        one, other = (x[0, start : start + some].topk(5).indices.sort(-1).values for x in (wanted, found))
        differing += [start + k for k in (one != other).any(-1).nonzero().flatten().tolist()]
    worst = sorted(differing, key=lambda t: -delta[t])[:SHOWN]
    top5 = tuple(
        {"position": t, "original": _five(wanted[0, t]), "converted": _five(found[0, t])} for t in worst
    )
    return Positions(tuple(delta), len(differing), top5)


def _five(row: Tensor) -> list[dict[str, Any]]:
    likely = row.double().softmax(-1).topk(5)
    return [{"id": int(k), "p": float(p)} for p, k in zip(likely.values, likely.indices, strict=True)]


def drawn(by_prompt: Mapping[str, Positions], worst: str, bar: float) -> dict[str, Any]:
    """The data of the pictures: the positions of the worst prompt, the tokens of all of them."""
    made: dict[str, Any] = {}
    if worst in by_prompt:
        delta = by_prompt[worst].delta
        every = -(-len(delta) // MARKS)
        marks = [max(delta[k : k + every]) for k in range(0, len(delta), every)]
        made["positions"] = {
            "prompt": worst, "tokens": len(delta), "every": every, "delta": marks, "bar": bar,
        }  # fmt: skip
    places = [(name, x, by_prompt[name].delta) for name in by_prompt for x in by_prompt[name].top5]
    places.sort(key=lambda p: -p[2][p[1]["position"]])
    if places:
        made["top5"] = {
            "of": sum(x.differing for x in by_prompt.values()),
            "positions": [{"prompt": name, **x} for name, x, _ in places[:SHOWN]],
        }
    return made


def spelled(data: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The same with the words of the tokens, as far as the tokenizer has them; None: as they are."""
    if tokenizer is None or "top5" not in data:
        return dict(data)

    def words(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**t, "word": tokenizer.id_to_token(t["id"])} for t in tokens]

    places = [
        {**p, "original": words(p["original"]), "converted": words(p["converted"])}
        for p in data["top5"]["positions"]
    ]
    return {**data, "top5": {**data["top5"], "positions": places}}
