"""What `ckpt-tool certificate` does around `verify.certificate`: looks at the key and the place before the
work, signs, writes, and says what was written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckpt_tool.convert import disk
from ckpt_tool.convert.manifest import CERTIFICATE
from ckpt_tool.errors import CkptToolError, fail
from ckpt_tool.report_files import write_whole
from ckpt_tool.terminal import Screen, paragraph
from ckpt_tool.verify.certificate import Request, as_bytes, certify
from ckpt_tool.verify.certificate_lists import beside
from ckpt_tool.verify.signing import payload_of, sign


def made(
    out: str,
    source: str,
    file: str | None,
    key: str | None,
    asked: Mapping[str, Any],
    screen: Screen,
    progress: Callable[[str], None],
) -> int:
    """Make the certificate of `out` and write it to `file`, or into `out`. The exit code is that of the
    verification, whose report is shown where it does not pass."""
    place = Path(out) / CERTIFICATE if file is None else Path(file)
    if not place.parent.is_dir() or place.is_dir():
        fail("output-failed", "expected the name of a file in an existing folder, found none", file=place)
    earlier = _earlier(place) if place.exists() else {}
    if earlier is None:
        found = "found a file that is no certificate"
        fail("output-exists", f"expected a free name or an earlier certificate, {found}", file=place)
    lists = beside(place)
    if lists.exists() and "lists" not in earlier:
        found = "found the name of its lists taken"
        hint = "move that file away, or name another certificate with --write"
        fail("output-exists", f"expected a free name for a certificate, {found}", file=lists, hint=hint)
    if key is not None:
        sign(b"", key)  # before the work: a key that cannot sign is known now
    request = Request(
        levels=tuple(asked["levels"]) or None,
        against=asked["against"],
        compute_dtype=asked["compute_dtype"],
        checkpoint_id=asked["checkpoint_id"],
        accept=tuple(asked["accept"]),
    )
    done = certify(
        out,
        source,
        request,
        settings=asked["settings"],
        device=asked["device"],
        progress=progress,
        place=place,
    )
    if done.statement is None:
        done.report.render(screen)
        paragraph(screen, "no certificate was written: only a verification that passes has one")
        return done.report.exit_code
    content = as_bytes(done.statement)
    content = content if key is None else sign(content, key)
    if done.lists is not None:
        _write(lists, done.lists.pieces())  # first: a certificate without them holds for nothing
    _write(place, content)
    if done.lists is None and "lists" in earlier:  # those of the one before
        with suppress(OSError):
            lists.unlink()
    _told(place, done.statement, key, screen)
    return 0


def _write(place: Path, data: bytes | Iterable[bytes]) -> None:
    try:
        write_whole(os.fspath(place), data)
    except OSError as error:
        raise disk.failure(error, os.fspath(place)) from None


def _earlier(place: Path) -> dict[str, Any] | None:
    """What the certificate at `place` says, signed or not; None where the file there does not begin as
    certificates do, as JSON with their types."""
    try:
        found = json.loads(place.read_bytes())
        if isinstance(found, dict) and "payloadType" in found:
            found = json.loads(payload_of(found, place.name))
    except (OSError, ValueError, RecursionError, CkptToolError):
        return None
    if not isinstance(found, dict) or "predicateType" not in found:
        return None
    said = found.get("predicate")
    return said if isinstance(said, dict) else {}


def _told(place: Path, statement: Mapping[str, Any], key: str | None, screen: Screen) -> None:
    predicate = statement["predicate"]
    said = predicate["verification"]
    exactness = f" ({said['exactness']})" if said["exactness"] else ""
    rows = [
        ("certificate", f"{place}, {'not signed' if key is None else 'signed'}"),
        ("verdict", f"{said['verdict']}{exactness}: {said['headline']}"),
        ("output", _counted(statement["subject"], predicate["target"])),
        ("source", _counted(predicate["source"]["files"], predicate["source"])),
        ("plan", str(predicate["plan"]["sha256"])),
    ]
    if "lists" in predicate:
        rows.insert(1, ("lists", f"{beside(place)}, which belongs to it"))
    rate = said["planted_mistakes"]
    if rate is not None:
        low, _ = rate["interval"]
        words = f"{rate['caught']} of {rate['planted']} caught, at 95 % confidence at least {100 * low:.1f} %"
        rows.append(("mistakes", words))
    for name, text in rows:
        paragraph(screen, text, first=f"{name:<12}")


def _counted(files: Sequence[object], side: Mapping[str, Any]) -> str:
    tensors = side["tensors"] if isinstance(side["tensors"], int) else len(side["tensors"])
    return f"{len(files)} files, {tensors} tensors, root {side['root']}"
