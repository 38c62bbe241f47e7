"""A folder of a model of several parts seen as one: its config.json as one row of values (`facts_parts`), and
its tensors under the names that save_pretrained() writes, whichever the folder has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, Document, Given, Renamed, TensorFile
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.convert.facts_classes import Class
from ckpt_tool.convert.facts_parts import REPEATED, Parts, in_one_row, taken_apart
from ckpt_tool.errors import CkptToolError
from ckpt_tool.records import dataclass

CONFIG = "config.json"


@dataclass(frozen=True)
class OneRow(Given):
    """A config.json read otherwise than it lies there: the sum is that of the file."""

    stored: Document = field(kw_only=True)

    def sha256(self, limit: int) -> str:
        return self.stored.sha256(limit)


def in_its_parts(
    document: OneRow, row: Mapping[str, Any], changed: Iterable[str], parts: Parts
) -> dict[str, Any]:
    """The file with what of its row was changed: of the whole in its place, and where it is a part's all as
    the class writes it."""
    keys = {*changed}
    if keys - parts.top - REPEATED:
        return taken_apart(row, parts)
    stored = parse_object(document.stored.read(), file=CONFIG)
    kept = {k: v for k, v in stored.items() if k not in keys or k in row}
    return {**kept, **{k: v for k, v in row.items() if k in keys}}


def described(checkpoint: Checkpoint, classes: Mapping[str, Class]) -> tuple[dict[str, Any], Class] | None:
    """The config.json of `checkpoint`, with the one of `classes` that its model_type names; None without
    either, and where it cannot be read, which whoever needs it says."""
    if CONFIG not in checkpoint.documents:
        return None
    try:
        config = checkpoint.json(CONFIG)
    except CkptToolError:
        return None
    own = classes.get(str(config.get("model_type")))
    return None if own is None else (config, own)


def in_one(checkpoint: Checkpoint, classes: Mapping[str, Class]) -> Checkpoint:
    """`checkpoint`, or a view of it where its config.json is of one of `classes` that has parts."""
    if all(own.parts is None for own in classes.values()) or not (found := described(checkpoint, classes)):
        return checkpoint
    config, own = found
    if own.parts is None:
        return checkpoint
    made = _renamed(checkpoint, own.parts.names)
    if (row := in_one_row(config, own.parts)) == config:
        return made
    text, stored = json.dumps(row).encode(), made.documents[CONFIG]
    seen = OneRow(CONFIG, stored.path, len(text), text, stored=stored)
    return replace(made, documents={**made.documents, CONFIG: seen})


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Names that begin as in memory, as on disk."""
    found = [old for old in names if any(n.startswith(old) for n in checkpoint.names())]
    if not found:
        return checkpoint

    def on_disk(name: str) -> str:
        old = next((old for old in found if name.startswith(old)), "")
        return names.get(old, "") + name.removeprefix(old)

    files: dict[str, TensorFile] = {
        name: Renamed(file, {on_disk(n): n for n in file.tensors}) for name, file in checkpoint.files.items()
    }
    reading = f"names that begin with {', '.join(found)} were read as those that save_pretrained() writes"
    return replace(checkpoint, files=files, readings=(*checkpoint.readings, reading))
