"""The files of an output by name, read with limits: nothing of them is trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, Document
from ckpt_tool.convert.manifest import CERTIFICATE, CERTIFICATE_LISTS
from ckpt_tool.errors import CkptToolError
from ckpt_tool.records import dataclass
from ckpt_tool.verify.strangers import listing

LIMIT = 64 << 20  # bytes; the largest tokenizer.json published is near 35 MB
LARGER = {"entity_vocab.json": 1 << 30, "entity_vocab.jsonl": 1 << 30}  # a hundred million as published


class Damaged(Exception):
    """A file that cannot be read as what its name says; the message is one for the report."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Beside:
    """`names` are all files of the folder, `documents` those that opening knows, which may lie elsewhere."""

    folder: Path
    names: frozenset[str]
    complete: bool
    documents: Mapping[str, Document]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Beside:
        found = listing(checkpoint.path)
        names = frozenset(found.names) - {CERTIFICATE, CERTIFICATE_LISTS}  # made of an earlier report
        return cls(checkpoint.path, names, found.complete, checkpoint.documents)

    def document(self, name: str) -> Document:
        found, path = self.documents.get(name), self.folder / name
        if found is None and not path.is_file():
            raise Damaged(name, "expected a file, found something else")
        return found or Document(name, path, path.stat().st_size)

    def read(self, name: str) -> bytes:
        try:
            return self.document(name).read(LARGER.get(name, LIMIT))
        except CkptToolError as error:
            raise Damaged(name, error.problems[0].message) from error

    def sha256(self, name: str) -> str:
        """Of the file's bytes, which are not held at once."""
        try:
            return self.document(name).sha256(LARGER.get(name, LIMIT))
        except CkptToolError as error:
            raise Damaged(name, error.problems[0].message) from error

    def text(self, name: str) -> str:
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise Damaged(name, f"expected UTF-8, found byte {error.start} to break it") from error

    def json(self, name: str) -> dict[str, Any]:
        return self.parse(self.read(name), name)

    @staticmethod
    def parse(data: bytes, name: str) -> dict[str, Any]:
        """A JSON object; numbers of any size (transformers writes 10**30 for no limit)."""
        try:
            found = json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_refuse)
        except RecursionError as error:
            raise Damaged(name, "expected JSON, found it nested too deeply") from error
        except ValueError as error:
            raise Damaged(name, f"expected JSON, found other text ({error})") from error
        if not isinstance(found, dict):
            raise Damaged(name, f"expected an object, found {type(found).__name__}")
        return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(k for k, _ in pairs if sum(k == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice!r} twice")
    return found


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no number")
