"""How the files of a TensorFlow bundle are called: PREFIX.index, PREFIX.data-00000-of-00001 and further ones,
and beside them PREFIX.meta and `checkpoint`, which nobody needs."""

from __future__ import annotations

import re
from collections.abc import Collection

DATA = re.compile(r"(?P<prefix>.+)\.data-(?P<number>\d{5})-of-(?P<count>\d{5})", re.ASCII)
_PART = re.compile(r"(?P<prefix>.+)\.(?:index|meta|data-\d{5}-of-\d{5})", re.ASCII)
STATE = (
    "checkpoint"  # which prefix is the newest, in text; paths in it are those of the machine that wrote it
)
# Of Windows too, which has other separators and ends of lines.
_NEWEST = re.compile(r'^model_checkpoint_path: *"(?:[^"]*[/\\])?([^"/\\]+)" *\r?$', re.ASCII | re.MULTILINE)


def data_name(prefix: str, shard: int, shards: int) -> str:
    return f"{prefix}.data-{shard:05d}-of-{shards:05d}"


def is_data(name: str) -> bool:
    """Whether a file (without folders) is called like one with tensors of a bundle."""
    return DATA.fullmatch(name) is not None


def is_part(name: str) -> bool:
    """Whether a file is called like one that is read of a bundle."""
    return is_data(name) or (name.endswith(".index") and len(name) > len(".index"))


def bundle_of(name: str) -> str:
    """The prefix of the bundle that a data file is a part of."""
    found = DATA.fullmatch(name)
    assert found is not None
    return found["prefix"]


def bundles(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The bundles among the files of one folder that have an index and some data file: prefix to files, the
    index first."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        part = DATA.fullmatch(name)
        if part is not None and f"{part['prefix']}.index" in names:
            found.setdefault(part["prefix"], [f"{part['prefix']}.index"]).append(name)
    return {prefix: tuple(files) for prefix, files in found.items()}


def bundle_at(name: str, beside: Collection[str]) -> str | None:
    """The prefix of the bundle that a path ending in `name` means, among the files `beside` it: the prefix
    itself, or one of its files."""
    part = _PART.fullmatch(name)
    prefixes = [name] if name not in beside else []
    prefixes += [] if part is None else [part["prefix"]]
    return next((p for p in prefixes if p in bundles(beside)), None)


def newest(state: str) -> str | None:
    """The prefix that a state file says is the newest, without the folders before it."""
    found = _NEWEST.search(state)
    return None if found is None else found[1]
