"""What tells one source from another without reading it, and the way to it from an output."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.remote_path import remote_of

INODE = "inode"  # device, number, time of its last change; links, mode, owner and group


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
    s = os.stat(path)
    inode = [s.st_dev, s.st_ino, s.st_ctime_ns, s.st_nlink, s.st_mode, s.st_uid, s.st_gid]
    return {"size": s.st_size, "mtime_ns": s.st_mtime_ns, INODE: inode}


def same(before: object, now: object) -> bool:
    """Whether two of the fingerprints tell no source from another: a file that was copied with its time is
    the same one, one that was written in its place and its time set back is not (see `Fingerprint`)."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return before == now
    then, found = before.get(INODE), now.get(INODE)
    if {**before, INODE: None} != {**now, INODE: None}:
        return False
    if not isinstance(then, list) or not isinstance(found, list):
        return then == found
    return then[:2] != found[:2] or then[2:3] == found[2:3] or then[3:] != found[3:]
