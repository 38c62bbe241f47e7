"""Of what bytes, plan and programs a result is: what somebody else needs to get it again."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from ckpt_tool import __version__

if TYPE_CHECKING:
    from ckpt_tool.verify.subject import Subject

LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
STEPS = 20_000  # of a plan; the text that its digest is made of takes as much memory as that of many more
FILES = 8  # of a source, before the rest is counted


@cache  # a process has one of each, and its papers take milliseconds to read
def versions() -> tuple[tuple[str, str], ...]:
    """Of the libraries that a result depends on, as far as they are installed."""
    from importlib import metadata

    found = []
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found.append((name, metadata.version(name)))
    return tuple(found)


def programs() -> dict[str, str]:
    """What computed, with its version, in the order in which it is shown."""
    python = f"{platform.python_version()} on {platform.machine()}"
    return {"ckpt-tool": __version__, "Python": python, **dict(versions())}


def origin(subject: Subject) -> dict[str, str]:
    """The plan, and the files of the source, in the order in which they are shown."""
    made = {}
    if subject.plan is not None and len(subject.plan.steps) <= STEPS:
        made["plan"] = f"SHA-256 {subject.plan.digest()}"
    if subject.manifest is not None:
        for file in subject.manifest.sources[:FILES]:
            made[file.name] = f"{file.tensors} tensors, SHA-256 of its headers {file.headers}"
        if (more := len(subject.manifest.sources) - FILES) > 0:
            made["more files"] = f"{more}, see ckpt-tool.json"
    return made
