"""What the files of a run say of its optimizer beside the states: how many steps were made, the numbers of
the groups of parameters, the schedule. What ranks say otherwise is left out of `optimizer.json`, with a note,
and is not taken from one of them."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckpt_tool.checkpoint.base import TensorFile
from ckpt_tool.convert.optimizer_document import DOCUMENT
from ckpt_tool.convert.optimizer_ranks import SCHEDULERS, STEP, optimizers_of
from ckpt_tool.records import dataclass

# Of a group of parameters: what a number of `optimizer.json` may be.
_PLAIN = (int, float, bool, str)


@dataclass(frozen=True)
class Said:
    """By one file. `counts` are the numbers of steps that any of its parameters or groups have."""

    counts: tuple[float, ...]
    groups: tuple[dict[str, Any], ...]
    schedule: dict[str, Any] | None = None


def said_of(file: TensorFile, notes: list[str]) -> Said | None:
    """None where the file has no groups; `notes` get what JSON has not."""
    known = [told for told in optimizers_of(file) if told.groups]
    if not known:
        return None
    groups = [g for told in known for g in told.groups]
    states = [told.inner.get("state") for told in known]
    kept = [
        s.get("step")
        for own in states
        if isinstance(own, Mapping)
        for s in own.values()
        if isinstance(s, Mapping)
    ]
    kept += [g.get("step") for g in groups]
    kept += _counts(file)
    counts = tuple(float(x) for x in kept if isinstance(x, int | float) and not isinstance(x, bool))
    schedule = None
    for name in SCHEDULERS:
        if isinstance(found := file.metadata.get(name), Mapping):
            schedule = {"name": name, "values": _numbers(found, notes)}
    return Said(counts, tuple(_numbers(g, notes) for g in groups), schedule)


def agreed(runs: Sequence[Said], notes: list[str]) -> dict[str, Any]:
    """What all of them say, as `optimizer.json` has it; `notes` get what they say otherwise."""
    content: dict[str, Any] = {}
    counts = {f"{x:.15g}": x for said in runs for x in said.counts}  # runs of millions of steps too
    if len(counts) == 1 and (x := next(iter(counts.values()))) >= 0 and x.is_integer():
        content["step"] = int(x)
    elif counts:
        notes.append(f"ranks made {' and '.join(sorted(counts))} steps, so {DOCUMENT} says no number")
    most = max((said.groups for said in runs), key=len, default=None)  # a stage may have matrices alone
    if most is not None:
        if all(not Counter(map(_bare, said.groups)) - Counter(map(_bare, most)) for said in runs):
            kept = ("step",) if "step" not in content else ()
            content["groups"] = [{k: v for k, v in g.items() if k not in kept} for g in most]
        else:
            notes.append(f"ranks have other numbers for groups of parameters, so {DOCUMENT} has none")
    schedules = [said.schedule for said in runs]
    if any(s != schedules[0] for s in schedules):
        notes.append(f"ranks have other schedules, so {DOCUMENT} has none")
    elif schedules and schedules[0] is not None:
        content["schedule"] = schedules[0]
    return content


def _bare(group: Mapping[str, Any]) -> str:
    """A group without its steps, which are told by themselves."""
    return json.dumps({k: v for k, v in group.items() if k != "step"}, sort_keys=True)


def _numbers(found: Mapping[Any, Any], notes: list[str]) -> dict[str, Any]:
    """What JSON has of it; `notes` get what it has not."""
    kept = {str(k): _plain(v) for k, v in found.items() if k != "params"}
    if lost := sorted(str(k) for k, v in found.items() if v is not None and kept.get(str(k), v) is None):
        notes.append(f"{', '.join(lost)} of the optimizer are no plain numbers, and left out of {DOCUMENT}")
    return {k: v for k, v in kept.items() if k not in lost}


def _counts(file: TensorFile) -> Iterator[float]:
    """The numbers of steps that are tensors, as torch keeps them."""
    for t in file.tensors.values():
        if STEP.fullmatch(t.name) and t.dtype == "F32" and t.numel == 1:
            buffer = bytearray(4)
            file.read_into(t.name, 0, memoryview(buffer))
            yield from struct.unpack("<f", buffer)


def _plain(value: object) -> Any:
    """`value` where JSON has it, else None."""
    if isinstance(value, list | tuple):
        return None if any(_plain(x) is None for x in value) else list(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if type(value) in _PLAIN else None
