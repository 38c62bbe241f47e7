"""What tells one source from another without reading it, and the way to it from an output."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.remote_path import remote_of


def way_to(place: Path, source: Path) -> str | None:
    """The path from the output to the source; None for one that is no UTF-8."""
    path = os.path.relpath(os.path.realpath(source), place)
    try:
        path.encode()
    except UnicodeEncodeError:
        return None
    return path


def fingerprints(checkpoint: Checkpoint, digests: Mapping[str, str]) -> dict[str, Any]:
    """What tells one source from another without reading it: sizes and times of files, `digests` of their
    headers."""
    found: dict[str, Any] = {}
    if checkpoint.path.is_file():
        found["."] = _stamp(checkpoint.path)
    for file in checkpoint.files.values():
        inflated = file.path.is_relative_to("/proc")  # a temporary file: its times are of this run
        found[file.name] = {**({} if inflated else _stamp(file.path)), "headers": digests[file.name]}
        others = {p for p in file.paths if p != file.path and not p.is_relative_to("/proc")}
        found |= {path.name: _stamp(path) for path in sorted(others)}
    return found


def _stamp(path: Path) -> dict[str, Any]:
    if (remote := remote_of(path)) is not None:
        return dict(remote.stamp)
    status = os.stat(path)
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
