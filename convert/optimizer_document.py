"""`optimizer/optimizer.json` read again: what ranks need beside the states, written by optimizer_state.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.strict_json import MAX_BYTES, integer, parse_object
from ckpt_tool.convert.optimizer_ranks import (
    ALL,
    DECAY,
    LISTS,
    OTHERS,
    SCHEDULERS,
    Order,
    Ranks,
    crc32_of,
    sound,
)
from ckpt_tool.errors import fail

FOLDER = "optimizer"
DOCUMENT = f"{FOLDER}/optimizer.json"
_WORDS: Mapping[str, tuple[str, ...]] = {
    "inside": ("optimizer", "optimizer.optimizer"),
    "step": ("tensor", "number", "group"),
    "master": LISTS,
}


def read(checkpoint: Checkpoint) -> tuple[Ranks, dict[str, Any]]:
    """How ranks had their state, and their schedule by its name, none where it is not known. Kinds:
    `missing-file` without the document, `bad-config`, `unsupported` where it does not say it."""
    path = Path(checkpoint.path) / DOCUMENT
    if not path.is_file():
        text = "expected how Megatron's ranks had the state of their optimizer, found no such file"
        fail("missing-file", text, file=DOCUMENT)
    with path.open("rb") as file:
        said = parse_object(file.read(MAX_BYTES + 1), file=DOCUMENT)
    ranks = said.get("ranks")
    if not isinstance(ranks, dict) or not ranks:
        text = "expected how ranks number their parameters, found a state that comes from no ranks"
        if isinstance(ranks, dict):
            text = "expected one form of state for all ranks, found a state whose ranks differed"
        hint = "--form torch_dist writes a folder, in which states go by name, where the family has it"
        fail("unsupported", text, file=DOCUMENT, where="ranks", hint=hint)
    return _ranks(said, ranks), _schedule(said)


def _ranks(said: Mapping[str, Any], ranks: Mapping[str, Any]) -> Ranks:
    groups, words, order = said.get("groups"), ranks.get("groups"), ranks.get("order")
    if groups is None:
        text = "expected the numbers of the groups, found none: ranks that differ have none in common"
        fail("unsupported", text, file=DOCUMENT, where="groups")
    if not isinstance(groups, list) or not groups or not all(isinstance(g, dict) for g in groups):
        _refuse("groups", "a list of objects")
    counts = ranks.get("optimizers", [])
    if not isinstance(counts, list) or any(type(n) is not int or n < 0 for n in counts):
        _refuse("ranks.optimizers", "how many groups each of two optimizers has")
    if not isinstance(words, list) or len(words) != len(groups) or not sound(words, counts):
        _refuse("ranks.groups", f"`{DECAY}`, `{OTHERS}` or `{ALL}` for each of {len(groups)} groups")
    if not isinstance(order, list) or not order or not all(isinstance(n, str) for n in order):
        _refuse("ranks.order", "a list of names")
    for key, known in _WORDS.items():
        if ranks.get(key) not in (known if key == "inside" else (*known, None)):
            _refuse(f"ranks.{key}", " or ".join(known))
    if ranks.get("crc32") != crc32_of(ranks):
        text = "expected the checksum of how ranks number their parameters, found another or none"
        hint = (
            "convert the original once more; `groups`, `schedule` and `step` may be changed, `ranks` may not"
        )
        fail("bad-config", text, file=DOCUMENT, where="ranks.crc32", hint=hint)
    steps = integer(said, "step", file=DOCUMENT, minimum=0, maximum=2**24, optional=True)
    in_groups = ranks.get("step") == "group" and not all("step" in g for g in groups)
    if in_groups or (steps is None and ranks.get("step") in ("tensor", "number")):
        text = (
            "expected the number of steps that were made, found none: ranks that differ have none in common"
        )
        fail("unsupported", text, file=DOCUMENT, where="step")
    return Ranks(
        tuple(words),
        Order(order),
        ranks["inside"],
        ranks.get("step"),
        ranks.get("master"),
        tuple(groups),
        steps,
        tuple(counts),
    )


def _schedule(said: Mapping[str, Any]) -> dict[str, Any]:
    found = said.get("schedule")
    if found is None:
        return {}
    if (
        not isinstance(found, dict)
        or found.get("name") not in SCHEDULERS
        or not isinstance(found.get("values"), dict)
    ):
        _refuse("schedule", f"a `name` ({' or '.join(SCHEDULERS)}) and `values`")
    return {found["name"]: found["values"]}


def _refuse(key: str, expected: str) -> NoReturn:
    fail("bad-config", f"expected {expected}, found something else", file=DOCUMENT, where=key)
