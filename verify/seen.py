"""What was seen of an output where several processes looked at it, or one that looks at every byte once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from ckpt_tool.convert.shares import Worker
    from ckpt_tool.verify.bits import Comparison
    from ckpt_tool.verify.coverage import Scan

Line = Mapping[str, Any]
Tell = Callable[[str], None]
# What takes a worker's prompts through parity: given what it wrote down before and the place of its inputs,
# what it is to write down now, None where it has.
Walk = Callable[[Line | None, Path], Line | None]
SHARED = ("coverage", "bits", "parity")  # the levels that workers share
READ = {"coverage", "bits"}  # those that look at every byte of the output


@dataclass(frozen=True)
class Seen:
    """What one worker looked at: tensors of the output, and steps of the plan by their place in it."""

    worker: Worker
    scans: tuple[Scan, ...]
    steps: Mapping[int, Comparison]
    resumed: int = 0  # lines that an earlier run of it had written
    missing: tuple[int, ...] = ()  # workers that have not finished
    prompts: tuple[str, ...] | None = None  # that went through parity; None where that was not asked for

    @property
    def differences(self) -> int:
        """Tensors that differ from the source, or have nothing to be compared with."""
        return sum(len(c.differences) + len(c.missing) for c in self.steps.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "worker": str(self.worker),
            "tensors": len(self.scans),
            "bytes": sum(s.tensor.nbytes for s in self.scans),
            "steps": len(self.steps),
            "differences": self.differences,
            "prompts": self.prompts and list(self.prompts),
            "resumed": self.resumed,
            "missing": list(self.missing),
        }


@dataclass
class Joined:
    """What all `workers` saw, in the order in which one process sees it. `compared` is None where the steps
    of the plan were not compared; `paths` are the files it was read from. `walks` are what they wrote down of
    parity, with the places of its inputs, none where they left that out."""

    scans: list[Scan] = field(default_factory=list)
    compared: Comparison | None = None
    workers: int = 0
    paths: list[Path] = field(default_factory=list)
    walks: list[tuple[Line, Path]] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, str]:
        shared = ["tensors", "steps", *(["prompts"] if self.walks else [])]
        text = f"{self.workers}, each with a share of the {', '.join(shared[:-1])} and {shared[-1]}"
        return {"workers": text} if self.workers else {}
