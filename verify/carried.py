"""The states of the optimizer that a conversion carried along, taken apart from the model that all other
checks are about; see carried_bits.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import TYPE_CHECKING

from ckpt_tool.checkpoint.base import Checkpoint, Renamed
from ckpt_tool.convert.optimizer_state import (
    attached,
    buckets_of,
    is_state,
    of_states,
    read_by,
    with_optimizer,
)
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.errors import CkptToolError
from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from ckpt_tool.convert.kept import Manifest

Crcs = Mapping[tuple[str, str], int]


@dataclass
class Carried:
    """`output` holds the states that were written, `source` those that they were made from; `plan` is about
    them alone."""

    output: Checkpoint
    crcs: Crcs
    source: Checkpoint | None = None
    plan: Plan | None = None
    problem: str | None = None
    opened: list[Checkpoint] = field(default_factory=list)

    @property
    def buckets(self) -> set[tuple[str, str]]:
        """By file and name, the tensors of the source in which states lie together."""
        return set() if self.plan is None else buckets_of(self.plan)

    def close(self) -> None:
        for checkpoint in self.opened:
            checkpoint.close()


def apart(output: Checkpoint, manifest: Manifest) -> tuple[Checkpoint, Manifest, Carried]:
    """The output and its manifest without the states, and these."""
    own: Crcs = {key: crc for key, crc in manifest.crcs.items() if is_state(key[1])}
    rest = {key: crc for key, crc in manifest.crcs.items() if key not in own}
    if manifest.direction == "to-hf":
        whole = attached(output)
        states = replace(output, files={n: f for n, f in whole.files.items() if n not in output.files})
        return output, replace(manifest, crcs=rest), Carried(states, own, opened=[states])
    views = {n: (_of(output, n, states=False), _of(output, n, states=True)) for n in output.files}
    model = replace(output, files={n: one for n, (one, _) in views.items()})
    states = replace(output, files={n: other for n, (_, other) in views.items()})
    return model, replace(manifest, crcs=rest), Carried(states, own)


def _of(checkpoint: Checkpoint, file: str, *, states: bool) -> Renamed:
    stored = checkpoint.files[file]
    return Renamed(stored, {n: n for n in stored.tensors if is_state(n) == states})


def planned(carried: Carried, plan: Plan, source: Checkpoint) -> Plan:
    """`plan` as it was made with the states; what is about these alone goes into `carried`."""
    try:
        whole = with_optimizer(plan, source, Options())
    except CkptToolError as error:
        carried.problem = error.problems[0].message
        carried.source = source
        return plan
    own = read_by(whole, source)
    carried.opened.append(replace(own, files={n: f for n, f in own.files.items() if n not in source.files}))
    carried.source, carried.plan = own, of_states(whole)
    return replace(plan, dropped=whole.dropped, asked=whole.asked)
