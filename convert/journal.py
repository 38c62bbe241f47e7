"""The journal of a run: one line for each group of files that is finished and on the disk, by which
`--resume` goes on.

A line is a checksum of its JSON text, and the text. The first says whose work it is. What a line holds is
believed only if it has the right types and, for a reader who knows the plan, the names of that plan; at the
first line that has not, reading stops.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from functools import cached_property
from typing import Any, TypeVar

from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.convert.manifest import FINDINGS, Finding
from ckpt_tool.convert.source_checks import Key
from ckpt_tool.errors import CkptToolError
from ckpt_tool.records import dataclass

JOURNAL_BYTES = 256 << 20  # also of one line: a file may hold a hundred thousand tensors
V = TypeVar("V")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What was learnt while a group of files was made: CRC32s of the tensors in them by file and name, CRC32s
    of source tensors, SHA-256 where asked for, what was odd."""

    files: Mapping[str, Mapping[str, int]]
    sources: Mapping[Key, int] = field(default_factory=dict)
    sha256: Mapping[Key, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "files": {name: dict(crcs) for name, crcs in self.files.items()},
            "sources": [[*key, crc] for key, crc in self.sources.items()],
            "sha256": [[*key, digest] for key, digest in self.sha256.items()],
            "findings": [f.to_json() for f in self.findings],
        }

    @cached_property
    def line(self) -> bytes:
        """Its line of the journal."""
        return line(self.to_json())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """Raises ValueError, TypeError or KeyError for anything but what `to_json` gives."""
        if data.keys() != {"files", "sources", "sha256", "findings"}:
            raise ValueError("not the fields of an entry")
        files = {
            _text(name): {_text(t): _crc(crc) for t, crc in crcs.items()}
            for name, crcs in _items(data["files"])
        }
        if not files:
            raise ValueError("no files")
        return cls(
            files,
            _keyed(data["sources"], _crc),
            _keyed(data["sha256"], _digest),
            tuple(_finding(f) for f in _list(data["findings"])),
        )


def line(content: Mapping[str, Any]) -> bytes:
    """`content` as a line of the journal, in its own order: a manifest is written from it."""
    text = json.dumps(content, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read(descriptor: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The JSON objects of an open journal and where each of their lines ends, up to the first line that is
    cut, damaged, or no object."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > JOURNAL_BYTES:
        return
    end = 0
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        while text := file.readline(JOURNAL_BYTES):
            checksum, _, body = text.rstrip(b"\n").partition(b" ")
            if not text.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(body):
                return
            try:
                content = parse_object(body, file="journal", max_bytes=JOURNAL_BYTES)
            except CkptToolError:
                return
            end += len(text)
            yield content, end


# --- types ----------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("expected a name")
    return value


def _crc(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise TypeError("expected a CRC32")
    return value


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise TypeError("expected a SHA-256")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("expected a list")
    return value


def _items(value: Any) -> Any:
    if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
        raise TypeError("expected objects by name")
    return value.items()


def _keyed(rows: Any, typed: Callable[[Any], V]) -> dict[Key, V]:
    found: dict[Key, V] = {}
    for row in _list(rows):
        file, tensor, value = _list(row)
        found[_text(file), _text(tensor)] = typed(value)
    return found


def _finding(data: Any) -> Finding:
    if not isinstance(data, dict) or data.keys() != Finding("", "", "").to_json().keys():
        raise TypeError("expected a finding")
    if data["kind"] not in FINDINGS or not isinstance(data["details"], dict):
        raise TypeError("expected a known finding")
    tensor = None if data["tensor"] is None else _text(data["tensor"])
    return Finding(data["kind"], _text(data["message"]), _text(data["file"]), tensor, data["details"])
