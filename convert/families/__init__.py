"""The families: each module of this folder is one, found by its file. A family module defines `FAMILY`, a
`Family`, and adding one changes no other file of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.facts_classes import Class
from ckpt_tool.convert.plan import Options, Plan


def names() -> tuple[str, ...]:
    """The name of every family, which is that of its file with dashes."""
    files = [f.stem for folder in __path__ for f in Path(folder).glob("[a-z]*.py")]
    return tuple(sorted(f.replace("_", "-") for f in files))


FAMILIES = names()


@dataclass(frozen=True)
class Family:
    """`recognise(checkpoint)` says whether an original checkpoint is of this family, with the reason in
    words; `plan` maps an original to the Hugging Face layout, `plan_original` the way back. `targets` are
    layouts of other architectures that `plan` can write instead (family option "architecture"), `pools` says
    whether it can pool key/value heads (`Options.gqa`), `foretold` names the differences that its plans may
    foretell, `classes` are the configurations of transformers by model_type."""

    name: str
    summary: str  # one line for `ckpt-tool families`
    architectures: tuple[str, ...]  # Hugging Face classes written, config.json "architectures"
    recognise: Callable[[Checkpoint], tuple[bool, str]]
    plan: Callable[[Checkpoint, Options], Plan]
    plan_original: Callable[[Checkpoint, Options], Plan]
    targets: tuple[str, ...] = ()
    pools: bool = False
    foretold: tuple[str, ...] = ()
    classes: Mapping[str, Class] = field(default_factory=dict)


def family(name: str) -> Family:
    """The family called `name` (of `FAMILIES`)."""
    found: Family = import_module(f"ckpt_tool.convert.families.{name.replace('-', '_')}").FAMILY
    return found
