"""`hf://org/name[@rev]`: a repository of the Hugging Face Hub, read by ranges or as a folder on this machine.

By ranges, what the cache holds already is read from there, and nothing is added to it. Where the files are
downloaded, only those that will be opened are: which they are is decided from the repository's list of files,
as it is for a folder. Without a network, what an earlier download left in the cache is used.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ckpt_tool.checkpoint.folders import Place
from ckpt_tool.checkpoint.http_ranges import BUSY, HttpFile, streams
from ckpt_tool.checkpoint.no_weights import Around, refuse
from ckpt_tool.checkpoint.remote_file import Again, Fetcher, Served
from ckpt_tool.checkpoint.remote_folder import RemoteFolder
from ckpt_tool.checkpoint.remote_path import Way
from ckpt_tool.checkpoint.weight_sets import Prefer, belongs, locate
from ckpt_tool.errors import CkptToolError, fail, missing_package

WAY = "CKPT_TOOL_HUB"  # the environment variable that says which
ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_BUFFER = 1 << 20


def way(wish: Way) -> Way:
    """How repositories are read: as the environment says, else as the caller wishes."""
    said = os.environ.get(WAY, "")
    if said not in ("", "stream", "download"):
        fail("usage", f"expected stream or download, found {said!r}", where=WAY)
    return wish if said == "" else "stream" if said == "stream" else "download"


def parts(address: str) -> tuple[str, str | None]:
    """(repository, revision) of an address; `bad-input` for a malformed one."""
    match = ADDRESS.fullmatch(address)
    if match is None:
        fail("bad-input", "expected hf://org/name or hf://org/name@revision", file=address)
    return match["repo"], match["revision"]


def fetch(
    address: str, *, prefer: Prefer | None = None, wish: Way = "stream"
) -> tuple[Path | RemoteFolder, list[str]]:
    """(the folder with the downloaded files, or the files to be read by ranges; notes that name the commit).
    Kinds: `bad-input` for a malformed address, `download-failed`, and those of choosing among the files."""
    repo, revision = parts(address)
    chosen = way(wish)
    try:
        from huggingface_hub import HfApi, get_session, snapshot_download
    except ImportError as error:
        problem = missing_package(error)
        if problem is None:
            _failed(address, error)
        raise CkptToolError(replace(problem, file=address)) from None
    started = time.time()
    try:
        info = _told(address, lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))
    except Exception as error:
        # Offline, or the Hub cannot be asked: the cache may still hold the files.
        try:
            folder = _kept(address, repo, revision, prefer)
        except Exception:
            _failed(address, error)
        return folder, [f"{address} was read from the cache at commit {folder.name}"]
    if chosen == "stream" and streams(get_session()):
        return _by_ranges(address, repo, info)
    names = wanted([sibling.rfilename for sibling in info.siblings or ()], address, prefer)
    try:
        # by the name that was given: of that the cache keeps which commit it is, for when there is no network
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[_literal(n) for n in names]))
    except Exception as error:
        _failed(address, error)
    if folder.name != info.sha:
        found = f"expected commit {info.sha}, found {folder.name}: the branch has moved"
        fail("download-failed", found, file=address, hint="run this again")
    check_digests([folder / name for name in names], address, since=started)
    return folder, [f"{address} is commit {info.sha}"]


def _kept(address: str, repo: str, revision: str | None, prefer: Prefer | None) -> Path:
    """The folder of the cache that an earlier download left, if it holds all that is to be opened."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except FileNotFoundError as error:
        told = getattr(error, "snapshot_path", None)  # files are missing; maybe of those that nobody reads
        if told is None:
            raise
        from huggingface_hub import get_cached_repo_tree

        folder, tree = Path(told), get_cached_repo_tree(repo, revision=Path(told).name)
        names = wanted([entry.path for entry in tree], address, prefer)
        if not all((folder / name).is_file() for name in names):
            raise
        return folder


def _told(address: str, ask: Callable[[], Any]) -> Any:
    """What the Hub answers, asked again while it is busy."""
    found: list[Any] = []

    def once() -> None:
        try:
            found.append(ask())
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in BUSY:
                raise Again(f"status {status}") from None
            raise

    Fetcher().patiently(address, once)
    return found[0]


# --- by ranges ------------------------------------------------------------------------------------------


def _by_ranges(address: str, repo: str, info: Any) -> tuple[RemoteFolder, list[str]]:
    """The files of one commit: those in the cache as they lie there, the others as the Hub serves them."""
    listed = [s for s in info.siblings or () if _inside(s.rfilename)]
    cached = _cached(repo, info.sha, {s.rfilename: s.size for s in listed})
    files: dict[str, Callable[[], Served]] = {}
    digests: dict[str, str] = {}
    for sibling in listed:
        name = sibling.rfilename
        if sibling.lfs is not None:
            digests[name] = f"sha256:{sibling.lfs.sha256}"
        elif sibling.blob_id is not None:
            digests[name] = f"git-sha1:{sibling.blob_id}"
        files[name] = _served(repo, info.sha, sibling, digests.get(name))
    around, notes = _around(address), [f"{address} is commit {info.sha}"]
    folder = RemoteFolder(address, files, Fetcher(), around=around, digests=digests, local=cached)
    if cached:
        notes.append(f"{len(cached)} of its {len(files)} files were read from the cache")
    return folder, notes


def _served(repo: str, commit: str, sibling: Any, digest: str | None) -> Callable[[], Served]:
    from huggingface_hub import constants, hf_hub_url

    def served() -> Served:
        name = sibling.rfilename
        named = {} if digest is None else dict([digest.split(":", 1)])
        label = f"hf://{repo}/{name}"
        size = -1 if sibling.size is None else sibling.size
        url = hf_hub_url(repo, name, revision=commit, endpoint=constants.ENDPOINT)
        return HttpFile(url, label, size, token_headers, named, True)

    return served


def token_headers(url: str) -> Mapping[str, str]:
    """What huggingface_hub sends with a request. The token goes to the Hub and to nobody else."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    def origin(address: str) -> tuple[str, str | None, int | None]:
        told = urlsplit(address)
        return told.scheme, told.hostname, told.port

    mine = origin(url) == origin(constants.ENDPOINT)
    headers: dict[str, str] = build_hf_headers(token=None if mine else False, library_name="ckpt-tool")
    return headers


def _inside(name: str) -> bool:
    """Whether a name in a list is one of a file in that repository."""
    return name.isprintable() and not any(part in ("", ".", "..") for part in name.split("/"))


def _cached(repo: str, commit: str, sizes: Mapping[str, int | None]) -> dict[str, Place]:
    """The files of these names and sizes that the cache holds; one of another size was damaged there."""
    from huggingface_hub import try_to_load_from_cache

    found: dict[str, Place] = {}
    for name, size in sizes.items():
        held = try_to_load_from_cache(repo, name, revision=commit)
        if isinstance(held, str):
            path = Path(held)
            there = path.stat().st_size
            if size in (None, there):
                found[name] = Place(path, there)
    return found


# --- as a folder on this machine ------------------------------------------------------------------------


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
        lambda sub: (
            f"`hf download {repo} --include {quote(f'{sub}*')} --local-dir DIR`, "
            f"then --in {quote(f'DIR/{sub}')}"
        ),
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


_MEANS = {  # the classes of huggingface_hub that are raised by a status: in words, and what to do
    "GatedRepoError": ("a repository that asks for its terms to be accepted",
                       "accept them on its page, and let HF_TOKEN or `hf auth login` say who you are"),
    "RepositoryNotFoundError": ("no repository of that name, or one that is private",
                                "where it is private, `hf auth login`, or HF_TOKEN, says who you are"),
    "RevisionNotFoundError": ("no such branch, tag or commit", None),
    "DisabledRepoError": ("a repository that was disabled", None),
    "OfflineModeIsEnabled": ("HF_HUB_OFFLINE set, and not all of it in the cache",
                             "`hf download` fetches it where there is a network"),
}  # fmt: skip


def _failed(address: str, error: Exception) -> NoReturn:
    if isinstance(error, CkptToolError):
        raise error
    for kind in type(error).__mro__:
        if kind.__name__ in _MEANS:
            found, hint = _MEANS[kind.__name__]
            fail("download-failed", f"expected the files of a model, found {found}", file=address, hint=hint)
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    fail("download-failed", f"expected a download, found: {reason}", file=address)
