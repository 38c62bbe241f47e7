"""What a manifest records of a conversion, held against what the source says by itself: where the source
lies, and the facts that the user gave with --set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.remote_path import scheme_of
from ckpt_tool.checkpoint.weight_sets import Prefer
from ckpt_tool.convert.families import as_families_know, codes_apart
from ckpt_tool.convert.kept import Manifest
from ckpt_tool.convert.manifest import headers_digest
from ckpt_tool.convert.plan import Options, Plan, Value
from ckpt_tool.errors import CkptToolError, printable
from ckpt_tool.records import dataclass
from ckpt_tool.verify.partitions import joined_anew

NOTHING: Mapping[str, Value] = {}
# How the source of a value begins that a rule gave, or the shape of a table that may be padded, and no file
# of the source says: a user may know better.
RULES = re.compile(
    r"(.*; )?(rule|default|family |the layout asked for|nothing tells|absent|unknown|rows of )"
)


@dataclass(frozen=True)
class Recorded:
    """Facts that the manifest records as given with --set, in words: those that the source `contradicts`, and
    those that stand although nothing in the source says so (`trusted`). `insisted` are those that are given
    now, each by its name, against what the source's files say."""

    contradicts: tuple[str, ...] = ()
    trusted: tuple[str, ...] = ()
    insisted: Mapping[str, str] = field(default_factory=dict)


def find_source(
    out: Checkpoint, manifest: Manifest, seen: Callable[[Checkpoint], Checkpoint]
) -> Checkpoint | None:
    """The source that the manifest records, opened, where it lies there still: the same files with the same
    headers, as `seen`. Nobody else is asked, and what cannot be opened is not the source."""
    if manifest.source is None or scheme_of(manifest.source) is not None or not manifest.sources:
        return None
    folder = out.path if out.path.is_dir() else out.path.parent
    prefer: Prefer = "original" if manifest.direction != "to-original" else "hf"
    try:
        found = codes_apart(joined_anew(open_checkpoint(folder / manifest.source, prefer=prefer)))
        found = as_families_know(seen(found))
    except (CkptToolError, OSError, ValueError):
        return None
    recorded = {(s.name, s.headers) for s in manifest.sources}
    if {(f.name, headers_digest(f)) for f in found.files.values()} == recorded:
        return found
    found.close()
    return None


def settled(
    plan: Callable[[Options], Plan],
    options: Options,
    given: Mapping[str, Any],
    said: Mapping[str, Value] = NOTHING,
) -> tuple[Recorded, Options]:
    """The options as the source lets them stand. Each recorded setting is left out once: where the source
    then says another value, that one is used; `given` now by the user is not questioned. `said` are values of
    the source that a plan has under other names. Raises what `plan` raises."""

    def without(name: str) -> Value | None:
        rest = {k: v for k, v in options.settings.items() if k != name}
        return plan(replace(options, settings=rest)).config.get(name, said.get(name))

    contradicts, trusted = [], []
    kept = dict(options.settings)
    for name in [n for n in options.settings if n not in given]:
        value, shown = options.settings[name], _shown(options.settings[name])
        try:
            alone = without(name)
        except CkptToolError:
            why = "nothing in the source tells it" if value is not None else "left out of the source"
            trusted.append(f"{name} = {shown}: {why}")
            continue
        if alone is None:
            trusted.append(f"{name} = {shown}")
        elif alone.value == value:
            continue
        elif RULES.match(alone.source):
            trusted.append(f"{name} = {shown} instead of {_shown(alone.value)} ({alone.source})")
        else:
            contradicts.append(
                f"expected {_shown(alone.value)} ({alone.source}), found {name} = {shown}, recorded in the "
                f"manifest as given by the user; --set {name}={shown} says that it is right"
            )
            del kept[name]
    insisted = _insisted(without, {n: v for n, v in kept.items() if n in given})
    return Recorded(tuple(contradicts), tuple(trusted), insisted), replace(options, settings=kept)


def _insisted(without: Callable[[str], Value | None], given: Mapping[str, Any]) -> dict[str, str]:
    """What is given now where the source's files say another value, in words; `without` tells it."""
    made = {}
    for name, value in given.items():
        try:
            alone = without(name)
        except CkptToolError:
            continue  # which does not tell it
        if alone is not None and alone.value != value and not RULES.match(alone.source):
            made[name] = f"{name} = {_shown(value)} instead of {_shown(alone.value)} ({alone.source})"
    return made


def _shown(value: Any) -> str:
    return printable(json.dumps(value, default=repr), 60)
