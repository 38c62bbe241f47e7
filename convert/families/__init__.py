"""The families: each module of this folder is one, found by its file. A family module defines `FAMILY`, a
`Family`, and adding one changes no other file of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.options import Option
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.convert.vocabularies import Vocabulary


def names() -> tuple[str, ...]:
    """The name of every family, which is that of its file with dashes."""
    files = [f.stem for folder in __path__ for f in Path(folder).glob("[a-z]*.py")]
    return tuple(sorted(f.replace("_", "-") for f in files))


FAMILIES = names()


@dataclass(frozen=True)
class Family:
    """`recognise(checkpoint)` says whether an original checkpoint is of this family, with the reason in
    words; `plan` maps an original to the Hugging Face layout, `plan_original` the way back. `targets` are
    layouts of other architectures that `plan` can write instead (family option "architecture"), `options`
    those of the command line that it has beside the general ones, `vocabulary` how its originals write their
    tokens, `foretold` names the differences that its plans may foretell."""

    name: str
    summary: str  # one line for `ckpt-tool families`
    architectures: tuple[str, ...]  # Hugging Face classes written, config.json "architectures"
    recognise: Callable[[Checkpoint], tuple[bool, str]]
    plan: Callable[[Checkpoint, Options], Plan]
    plan_original: Callable[[Checkpoint, Options], Plan]
    targets: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    vocabulary: Vocabulary = Vocabulary()
    foretold: tuple[str, ...] = ()


def family(name: str) -> Family:
    """The family called `name` (of `FAMILIES`)."""
    found: Family = import_module(f"ckpt_tool.convert.families.{name.replace('-', '_')}").FAMILY
    return found
