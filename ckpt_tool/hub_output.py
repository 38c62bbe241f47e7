"""A conversion whose output goes to the Hub: looked at file by file before the files leave this disk, and
committed when all is accounted for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ckpt_tool import __version__
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.safetensors import open_safetensors
from ckpt_tool.convert import publishing
from ckpt_tool.convert.durable import Identity, Staging
from ckpt_tool.convert.plan import Plan
from ckpt_tool.convert.publishing import Repository
from ckpt_tool.convert.replaceable import Replace
from ckpt_tool.errors import CkptToolError, Problem

if TYPE_CHECKING:
    from ckpt_tool.api import Conversion
    from ckpt_tool.verify.coverage import Scan
    from ckpt_tool.verify.report import Report

Made = TypeVar("Made", bound="Conversion")


@dataclass
class HubOutput:
    """Where a conversion goes; `check` says whether its coverage is to be shown."""

    repository: Repository
    check: bool
    scans: list[Scan] = field(default_factory=list)

    @classmethod
    def of(cls, out: str | os.PathLike[str], *, replaces: bool, check: bool) -> HubOutput | None:
        """None for an output that is a folder on this machine; see `publishing.repository`."""
        return cls(publishing.repository(out, replaces), check) if publishing.is_hub(out) else None

    def staging(self, plan: Plan) -> Callable[[Path, Identity, Replace], Staging]:
        """How `execute` is to keep what it makes."""
        return publishing.staging(self.repository, plan, self._look)

    def _look(self, name: str, path: Path) -> None:
        if self.check:
            from ckpt_tool.verify.coverage import scan

            with Checkpoint(path, {name: open_safetensors(path, name)}) as opened:
                self.scans += scan(opened)

    def published(self, done: Made) -> Made:
        """The conversion, its output committed; where its coverage shows a difference nothing is."""
        to = self.repository
        try:
            report = self._report()
            wrong = [] if report is None else [f for f in report.findings if f.status == "fail"]
            if wrong:
                message = f"expected a result in which all is accounted for, found: {wrong[0].message}"
                raise CkptToolError(
                    Problem("upload-failed", message, to.address, wrong[0].where), exit_code=1
                )
            commit = to.commit(f"{done.plan.family} converted by ckpt-tool {__version__}")
        finally:
            to.close()
        made = "a new private repository, " if to.created else ""
        told = f"{to.address} is {made}commit {commit}"
        return replace(done, out=to.address, report=report, opened=(*done.opened, told))

    def _report(self) -> Report | None:
        from ckpt_tool.verify import verify
        from ckpt_tool.verify.seen import Joined

        if not self.check:
            return None
        return verify(self.repository.folder, levels=("coverage",), no_source=True, joined=Joined(self.scans))
