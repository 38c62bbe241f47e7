"""The command line options that only some families have, as data: a dialect or a family declares its own.

`ckpt-tool convert FAMILY --help` shows those of the family; `families.option_problems` refuses the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from ckpt_tool.convert.plan import Options


@dataclass(frozen=True)
class Option:
    """`name` is a field of `plan.Options` or a key of its `family_options`. A value is one of `choices`, a
    whole number from 1 to `most`, with `several` such numbers from 0 with commas between, or, without any of
    these, true for what was asked for. `to` is the direction in which the option has a meaning."""

    name: str
    help: str
    to: str  # "hf" or "original"
    choices: tuple[str, ...] = ()
    most: int = 0
    metavar: str = "N"
    several: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def wrong(self, value: Any) -> str | None:
        """What is expected of a value that is not one of this option's, in words."""
        if self.choices:
            return None if value in self.choices else f"expected {' or '.join(self.choices)}"
        if self.several:
            numbers = value.split(",") if isinstance(value, str) else []
            fit = all(n.isascii() and n.isdecimal() and len(n) < 7 and int(n) <= self.most for n in numbers)
            return None if numbers and fit else f"expected numbers up to {self.most} as in 3,5,4"
        if self.most:
            whole = isinstance(value, int) and not isinstance(value, bool)
            return None if whole and 1 <= value <= self.most else f"expected a number from 1 to {self.most}"
        return None if value is True else "expected true"


# Options that several dialects have.
SHARDS = Option("shards", "Model-parallel ranks to write.", "original", most=1024)
CONTAINER = Option("container", "Container to write.", "original", choices=("pth", "safetensors"))
TENSOR_PARALLEL = Option("tensor_parallel", "Tensor-parallel ranks to write.", "original", most=1024)
PIPELINE_PARALLEL = Option(
    "pipeline_parallel", "Pipeline stages to write.", "original", most=1024, metavar="M"
)
PIPELINE_LAYERS = Option(
    "pipeline_layers",
    "Layers of each pipeline stage, where they differ.",
    "original",
    most=10_000,
    metavar="N,N,...",
    several=True,
)
VIRTUAL_STAGES = Option(
    "virtual_stages", "Virtual stages of each pipeline stage to write.", "original", most=1024
)
EXPERT_PARALLEL = Option("expert_parallel", "Expert-parallel ranks to write.", "original", most=1024)
POOLING = Option("gqa", "Pool the key/value heads to N (lossy).", "hf", most=65536)


def given(options: Options) -> dict[str, Any]:
    """What was asked for of the options that only some families have, by name; another architecture's layout
    is a direction and none of them."""
    fields = {"shards": options.shards if options.shards != 1 else None, "gqa": options.gqa}
    found = {**fields, **options.family_options}
    return {k: v for k, v in found.items() if v is not None and k != "architecture"}


def fields(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, by name, as fields of `plan.Options`: the way back of `given`."""
    own = {k: asked[k] for k in ("shards", "gqa") if k in asked}
    return {**own, "family_options": {k: v for k, v in asked.items() if k not in own}}
