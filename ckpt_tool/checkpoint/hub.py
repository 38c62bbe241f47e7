"""`hf://org/name[@rev]`: a repository of the Hugging Face Hub as a folder on this machine.

Only the files that will be opened are downloaded: which those are is decided from the repository's list of
files, as it is for a folder. Without a network, what an earlier download left in the cache is used.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from ckpt_tool.checkpoint.no_weights import Around, refuse
from ckpt_tool.checkpoint.weight_sets import Prefer, belongs, locate
from ckpt_tool.errors import CkptToolError, fail, missing_package

_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_BUFFER = 1 << 20


def fetch(address: str, *, prefer: Prefer | None = None) -> tuple[Path, list[str]]:
    """(the folder with the downloaded files, notes that name the commit). Kinds: `bad-input` for a malformed
    address, `download-failed`, and those of choosing among the files."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        fail("bad-input", "expected hf://org/name or hf://org/name@revision", file=address)
    repo, revision = match["repo"], match["revision"]
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        problem = missing_package(error)
        if problem is None:
            _failed(address, error)
        raise CkptToolError(replace(problem, file=address)) from None
    started = time.time()
    try:
        info = HfApi().model_info(repo, revision=revision)
    except Exception as error:
        # Offline, or the Hub cannot be asked: the cache may still hold the files.
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except Exception:
            _failed(address, error)
        return folder, [f"{address} was read from the cache at commit {folder.name}"]
    names = wanted([sibling.rfilename for sibling in info.siblings or ()], address, prefer)
    try:
        folder = Path(snapshot_download(repo, revision=info.sha, allow_patterns=[_literal(n) for n in names]))
    except Exception as error:
        _failed(address, error)
    check_digests([folder / name for name in names], address, since=started)
    return folder, [f"{address} is commit {info.sha}"]


def wanted(names: Iterable[str], address: str, prefer: Prefer | None = None) -> list[str]:
    """Of a repository's files, those that opening it will read."""
    names = list(names)
    found = locate(names, file=address, prefer=prefer)
    if found is None:
        refuse(names, _around(address))
    within, chosen = found
    documents = [n for n in names if belongs(n)]
    return [*(within + n for n in chosen.files), *documents]


def _around(address: str) -> Around:
    """How to speak of the files of a repository, of which a folder is downloaded by its name."""
    repo = address.removeprefix("hf://").partition("@")[0]
    return Around(
        address,
        repo.rpartition("/")[2],
        lambda sub: f"`hf download {repo} --include '{sub}*' --local-dir DIR`, then --in DIR/{sub}",
        lambda sub: repo,
    )


def check_digests(paths: Iterable[Path], address: str, *, since: float) -> None:
    """Compare each file that was downloaded after `since` with its SHA-256, which the cache's blobs of large
    files are named after."""
    for path in paths:
        blob = path.resolve()
        expected = blob.name
        if not re.fullmatch(r"[0-9a-f]{64}", expected) or blob.stat().st_mtime < since - 1:
            continue
        digest = hashlib.sha256()
        with open(blob, "rb") as file:
            while piece := file.read(_BUFFER):
                digest.update(piece)
        if digest.hexdigest() != expected:
            fail(
                "download-failed",
                f"expected SHA-256 {expected}, found {digest.hexdigest()}",
                file=address,
                where=path.name,
                hint="delete the file from the cache and download it again",
            )


def _literal(name: str) -> str:
    """`name` as a pattern that matches nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _failed(address: str, error: Exception) -> NoReturn:
    if isinstance(error, CkptToolError):
        raise error
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    fail("download-failed", f"expected a download, found: {reason}", file=address)
