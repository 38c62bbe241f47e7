"""The folder of one repository in the Hub's cache: blobs/ with the bytes, refs/ with commits by branch,
snapshots/COMMIT/ with links by file name. Source: huggingface_hub 2.4.0, its guide on the cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from shlex import quote

from ckpt_tool.errors import fail

_REPOSITORY = re.compile(r"(?:models|datasets|spaces)--(?P<name>.+)", re.ASCII)
_LINK = re.compile(r"\.\./\.\./blobs/(?P<name>[0-9a-f]{40}|[0-9a-f]{64})\s?", re.ASCII)
_COMMIT = re.compile(r"[\w.-]{1,100}", re.ASCII)


def repository_of(path: Path) -> str | None:
    """`org/name` where a part of `path` is the cache's folder of that repository."""
    found = next((m for p in reversed(path.parts) if (m := _REPOSITORY.fullmatch(p))), None)
    return None if found is None else found["name"].replace("--", "/", 1)


def root() -> Path:
    """Where the cache is, by the variables that huggingface_hub reads (which takes a while to import)."""
    told = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if told:
        return Path(told).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser() / "hub"


def cache_around(place: Path) -> Path | None:
    """The cache, or the folder in it of one repository, that a resolved place is or is inside of."""
    own = Path(os.path.realpath(root()))
    return next((p for p in (place, *place.parents) if p == own or _is_repository(p)), None)


def _is_repository(path: Path) -> bool:
    return _REPOSITORY.fullmatch(path.name) is not None and (path / "snapshots").is_dir()


def snapshot_of(path: Path) -> tuple[Path, list[str]]:
    """(the folder with the files, notes): where `path` is the cache's folder of a repository, or one of those
    directly in it, the snapshot that refs/main names, or the only one. Kinds: `ambiguous-input`,
    `wrong-format`."""
    absolute = path.absolute()
    inside = absolute.name in ("snapshots", "blobs", "refs")
    repository = absolute.parent if inside else absolute
    if not _is_repository(repository):
        return path, []
    snapshots = sorted(p for p in (repository / "snapshots").iterdir() if p.is_dir())
    main = _main(repository)
    if main is not None and main in snapshots:
        chosen, why = main, "as refs/main says"
    elif len(snapshots) == 1:
        chosen, why = snapshots[0], "the only snapshot there"
    elif snapshots:
        names = " and ".join(p.name for p in snapshots[:4])
        fail(
            "ambiguous-input",
            f"expected one snapshot, or refs/main to say which, found {names}",
            file=path.name,
            hint=f"give the one that is meant: --in {quote(str(snapshots[0]))}",
        )
    else:
        hint = f"`hf download {repository_of(repository)}` fetches the files"
        fail("wrong-format", "expected a snapshot with the files, found none", file=path.name, hint=hint)
    return chosen, [f"{path.name} is a folder of the Hub's cache; snapshots/{chosen.name} was opened, {why}"]


def blob_of(path: Path, size: int) -> Path | None:
    """What a file of a snapshot stands for, where its link was copied as the text of it: the blob of the same
    repository that the text names; None for other files."""
    if size > 100 or path.parent.parent.name != "snapshots" or repository_of(path.absolute()) is None:
        return None
    try:
        text = path.read_bytes()[:100].decode("ascii", "replace")
    except OSError:
        return None
    found = _LINK.fullmatch(text)
    blob = None if found is None else path.parent.parent.parent / "blobs" / found["name"]
    return blob if blob is not None and blob.is_file() else None


def _main(repository: Path) -> Path | None:
    try:
        if not (repository / "refs" / "main").is_file():
            return None
        with open(repository / "refs" / "main", "rb") as file:
            text = file.read(200).decode("ascii", "replace").strip()
    except OSError:
        return None
    return repository / "snapshots" / text if _COMMIT.fullmatch(text) and text not in (".", "..") else None
