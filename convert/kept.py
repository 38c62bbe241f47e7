"""What `ckpt-tool.json` in an output says about itself, read with distrust: the file may be anybody's. This
is the one reader of it.

Each field has a type, and one that has another is `bad-config`. What the manifest says decides nothing that
the source and config.json can say: it confirms them (verify.confirm), and the way back takes from it what the
Hugging Face layout has no place for (`original`, whose entries the dialects look at)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any, NoReturn

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint
from ckpt_tool.convert.manifest import MANIFEST, MANIFEST_BYTES, MANIFEST_VERSION, members_of
from ckpt_tool.convert.quantised_config import RECIPES, TARGETS
from ckpt_tool.errors import fail, printable
from ckpt_tool.records import dataclass

# how the source of a value begins that the user gave
ASKED_FOR = ("--set", "--config", "--tokenizer", "--keep-padding")

# In `original`: that the source was in the Hugging Face layout, too.
LAYOUT, HUGGING_FACE = "layout", "hugging-face"

_FORM = ("tensor_parallel", "pipeline_parallel", "checkpoint_version")
_CRC = re.compile(r"[0-9a-f]{8}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DIRECTIONS = ("to-hf", "to-original")


@dataclass(frozen=True)
class SourceFile:
    """A file of the source as it was read: `headers` is the SHA-256 of all that its headers say."""

    name: str
    tensors: int
    headers: str


@dataclass(frozen=True)
class Manifest:
    """`crcs` are CRC32s by (file, tensor), `documents` SHA-256 by file name, `config` (value, source) by
    name, `direction` "to-hf" or "to-original", `dropped` the source's tensors that were left out, `drift` the
    tensors whose model-parallel copies differ, `checkpoint_id` a published name, `original` how the
    original was, `form` how a Megatron
    original was shared out, as family options. `source` is where the source lay, from the output's folder."""

    family: str | None = None
    direction: str | None = None
    crcs: dict[tuple[str, str], int] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    config: dict[str, tuple[Any, str]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    sources: tuple[SourceFile, ...] = ()
    source: str | None = None
    dropped: frozenset[str] = frozenset()
    drift: frozenset[str] = frozenset()
    lossy: tuple[str, ...] = ()
    checkpoint_id: str | None = None
    original: dict[str, Any] = field(default_factory=dict)
    form: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The facts that the user gave when converting, and on the way back those of the original that no
        file of it says. What is written has the original's names then (norm_eps), which no fact has: they
        tell of manifests alone that record no settings."""
        facts, back = self.original.get("facts"), self.direction == "to-original"
        given = self.options.get("settings", {})
        known = {} if back and given else self.config
        shown = {k: value for k, (value, source) in known.items() if source.startswith(ASKED_FOR)}
        again = facts if back and isinstance(facts, dict) else {}
        return {**again, **given, **shown}


def read_manifest(checkpoint: Checkpoint) -> Manifest | None:
    """The manifest beside the weights; None without one, `bad-config` for one that does not read as such."""
    if MANIFEST not in checkpoint.documents:
        return None
    crcs: dict[tuple[str, str], int] = {}
    data: dict[str, Any] = {}
    content = checkpoint.documents[MANIFEST].read(MANIFEST_BYTES)
    known = members_of(content)
    del content
    for number, (key, value) in enumerate(known):
        if key != "tensors[]":
            if key in data:
                _refuse(key, "each key once", "it twice in one object")
            data[key] = value
            continue
        at = f"tensors[{number - len(data)}]"
        if not isinstance(value, dict):
            _refuse(at, "an object", value)
        crcs[_text(value, "file", f"{at}."), _text(value, "name", f"{at}.")] = _crc(value, "crc32", f"{at}.")
    if data.get("tensors") is not None:
        _refuse("tensors", "a list of objects", data["tensors"])
    version = data.get("manifest_version", MANIFEST_VERSION)
    if version != MANIFEST_VERSION:
        _refuse("manifest_version", f"{MANIFEST_VERSION}, the version that this release reads", version)
    return Manifest(
        family=_text(data, "family", optional=True),
        direction=_one_of(data, "direction", _DIRECTIONS),
        crcs=crcs,
        documents={
            _text(d, "file", at): _matching(d, "sha256", _SHA256, "a SHA-256", at)
            for at, d in _objects(data, "documents")
        },
        config=dict(_values(data)),
        options=_options(_object(data, "options")),
        sources=tuple(
            SourceFile(_text(s, "file", at), _count(s, "tensors", at), _text(s, "headers_sha256", at))
            for at, s in _objects(data, "sources")
        ),
        source=_text(data, "source", optional=True),
        dropped=frozenset(_text(d, "tensor", at) for at, d in _objects(data, "dropped")),
        drift=frozenset(_text(r, "name", at) for at, r in _objects(data, "replicas")),
        lossy=tuple(_texts(data, "lossy")),
        checkpoint_id=_text(data, "checkpoint_id", optional=True),
        original=_object(data, "original"),
        form=_form(_object(data, "original")),
    )


# --- one field at a time ----------------------------------------------------------------------------------


def _refuse(where: str, expected: str, found: object) -> NoReturn:
    shown = printable(json.dumps(found, default=repr), 60)
    fail("bad-config", f"expected {expected}, found {shown}", file=MANIFEST, where=where)


def _object(obj: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = obj.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        _refuse(key, "an object", found)
    return found


def _objects(obj: Mapping[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each entry of a list of objects, with the words for where it stands."""
    found = obj.get(key)
    if not isinstance(found, list | None):
        _refuse(key, "a list of objects", found)
    for k, entry in enumerate(found or []):
        if not isinstance(entry, dict):
            _refuse(f"{key}[{k}]", "an object", entry)
        yield f"{key}[{k}].", entry


def _text(obj: Mapping[str, Any], key: str, at: str = "", *, optional: bool = False) -> Any:
    found = obj.get(key)
    if not isinstance(found, str) and not (optional and found is None):
        _refuse(at + key, "text", found)
    return found


def _texts(obj: Mapping[str, Any], key: str, at: str = "") -> list[str]:
    found = obj.get(key)
    if found is not None and not (isinstance(found, list) and all(isinstance(x, str) for x in found)):
        _refuse(at + key, "a list of texts", found)
    return found or []


def _count(obj: Mapping[str, Any], key: str, at: str = "") -> int:
    found = obj.get(key)
    if type(found) is not int or found < 0:
        _refuse(at + key, "a number from 0", found)
    return found


def _one_of(obj: Mapping[str, Any], key: str, known: tuple[str, ...], at: str = "") -> str | None:
    found = obj.get(key)
    if found is not None and found not in known:
        _refuse(at + key, " or ".join(known), found)
    return found


def _matching(obj: Mapping[str, Any], key: str, form: re.Pattern[str], words: str, at: str) -> str:
    found = obj.get(key)
    if not isinstance(found, str) or not form.fullmatch(found):
        _refuse(at + key, words, found)
    return found


def _crc(obj: Mapping[str, Any], key: str, at: str) -> int:
    return int(_matching(obj, key, _CRC, "eight hexadecimal digits", at), 16)


def _values(data: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, str]]]:
    for name, entry in _object(data, "config").items():
        if not isinstance(entry, dict) or "value" not in entry or not isinstance(entry.get("source"), str):
            _refuse(f"config.{name}", "a value and its source", entry)
        yield name, (entry["value"], entry["source"])


def _options(found: Mapping[str, Any]) -> dict[str, Any]:
    gqa = found.get("gqa")
    if gqa is not None and (type(gqa) is not int or gqa < 1):
        _refuse("options.gqa", "a number from 1", gqa)
    asked = _object(found, "family_options")
    for name, value in asked.items():
        if not isinstance(value, str | bool | int):
            _refuse(f"options.family_options.{name}", "text, a whole number, true or false", value)
    return {
        "dtype": _one_of(found, "dtype", tuple(DTYPES), "options."),
        "drop": _texts(found, "drop", "options."),
        "gqa": gqa,
        "dequantize": _one_of(found, "dequantize", TARGETS, "options."),
        "recipe": _one_of(found, "recipe", RECIPES, "options."),
        "family_options": asked,
        "settings": _object(found, "settings"),
        "with_optimizer": found.get("with_optimizer") is True,
    }


def _form(original: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: v for k, v in original.items() if k in _FORM and v is not None}
    for name, value in found.items():
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            _refuse(f"original.{name}", "a number or a version", value)
    return found
