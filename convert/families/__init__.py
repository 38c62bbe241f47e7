"""The families: each module is one row of the table in DESIGN terms, found here by name.

A family module defines `FAMILY`, a `Family`. Adding one means a module here, one in reference/, one in
fixtures/, and its name in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.plan import Options, Plan

FAMILIES = (
    "mistral",
    "mixtral",
    "llama",
    "megatron-bert",
    "megatron-gpt2",
    "opt",
    "codegen",
    "qwen2",
)


@dataclass(frozen=True)
class Family:
    """`recognise(checkpoint)` says whether an original checkpoint is of this family, with the reason in
    words; `plan` maps an original to the Hugging Face layout, `plan_original` the way back. `targets` are
    layouts of other architectures that `plan` can write instead (family option "architecture"), `pools` says
    whether it can pool key/value heads (`Options.gqa`), `foretold` names the differences that its plans may
    foretell."""

    name: str
    summary: str  # one line for `ckpt-tool families`
    architectures: tuple[str, ...]  # Hugging Face classes written, config.json "architectures"
    recognise: Callable[[Checkpoint], tuple[bool, str]]
    plan: Callable[[Checkpoint, Options], Plan]
    plan_original: Callable[[Checkpoint, Options], Plan]
    targets: tuple[str, ...] = ()
    pools: bool = False
    foretold: tuple[str, ...] = ()


def family(name: str) -> Family:
    """The family called `name` (of `FAMILIES`)."""
    found: Family = import_module(f"ckpt_tool.convert.families.{name.replace('-', '_')}").FAMILY
    return found
