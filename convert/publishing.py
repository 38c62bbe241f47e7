"""`--out hf://org/name`: a repository of the Hub as the place of an output.

Each file of weights is looked at and sent as soon as it is finished, and then gives its room on this disk
back: holes take the place of its bytes. All becomes visible by one commit at the end, made on the commit
that was there when the work began: complete or not at all. What was sent and never committed nobody sees.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from ckpt_tool.checkpoint.hub import parts
from ckpt_tool.checkpoint.remote_path import scheme_of
from ckpt_tool.checkpoint.safetensors import open_safetensors
from ckpt_tool.checkpoint.weight_sets import belongs, is_weights
from ckpt_tool.convert.durable import Identity, Staging
from ckpt_tool.convert.journal import Entry
from ckpt_tool.convert.manifest import MANIFEST
from ckpt_tool.convert.plan import Plan
from ckpt_tool.convert.replaceable import Replace
from ckpt_tool.convert.shares import groups
from ckpt_tool.errors import CkptToolError, Problem, fail, missing_package, printable

BUNDLE = "tf-bundle"
LARGE = 8 << 20  # bytes of a tensor from which on its room is given back; tables of positions are smaller
_PUNCH = 0x02 | 0x01  # linux/falloc.h: FALLOC_FL_PUNCH_HOLE, which goes with FALLOC_FL_KEEP_SIZE
_KEPT_BYTES = 64 << 20  # headers of all files, and documents
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Repository:
    """Where an output goes, as it was when the work began: `head` is the commit that ours will follow."""

    address: str
    repo: str
    branch: str | None
    head: str | None
    there: frozenset[str]
    folder: Path  # on this machine, for what is being made
    created: bool = False
    sent: dict[str, Any] = field(default_factory=dict)  # file -> its operation, the bytes of which are sent

    def prepare(self) -> None:
        """Make the repository, private, where there is none; and ask whether we may write before there is
        anything to write."""
        from huggingface_hub import CommitOperationAdd, HfApi

        with _told(self.address):
            if self.head is None:
                HfApi().create_repo(self.repo, private=True)
                self.head, self.created = HfApi().model_info(self.repo).sha, True
            HfApi().preupload_lfs_files(
                self.repo, [CommitOperationAdd(MANIFEST, b"{}")], revision=self.branch
            )

    def send(self, name: str, path: Path) -> None:
        """Send a finished file of weights."""
        from huggingface_hub import CommitOperationAdd, HfApi

        with _told(self.address, name):
            added = CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
            HfApi().preupload_lfs_files(self.repo, [added], revision=self.branch)
            if (
                path.exists() and added.path_or_fileobj == b""
            ):  # it was sent: what is left to do is to name it
                self.sent[name] = added
                _give_back(path)

    def commit(self, message: str) -> str:
        """Make the files of the folder visible, and take away what an earlier model left; the commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        folder = self.folder
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        with _told(self.address):
            added = [self.sent.get(n) or CommitOperationAdd(n, os.fspath(folder / n)) for n in names]
            gone = [CommitOperationDelete(n) for n in sorted(self.there) if n not in names and _of_a_model(n)]
            made = HfApi().create_commit(
                self.repo,
                [*added, *gone],
                commit_message=message,
                revision=self.branch,
                parent_commit=self.head,
            )
            listed = {s.rfilename for s in HfApi().model_info(self.repo, revision=made.oid).siblings or ()}
        if missing := sorted(set(names) - listed):
            message = (
                f"expected {printable(missing[0])} in commit {made.oid}, found none of {len(missing)} files"
            )
            hint = "the .gitignore of the repository keeps it out: take that away, and run this again"
            fail("upload-failed", message, file=self.address, hint=hint)
        return str(made.oid)

    def close(self) -> None:
        """Remove the folder on this machine."""
        shutil.rmtree(self.folder, ignore_errors=True)


def is_hub(out: str | os.PathLike[str]) -> bool:
    """Whether an output goes to the Hub; `usage` for another address."""
    scheme = scheme_of(os.fspath(out))
    if scheme not in (None, "hf"):
        fail("usage", "expected a folder or hf://org/name, found another address", file=out, where="--out")
    return scheme == "hf"


def repository(out: str | os.PathLike[str], overwrite: bool) -> Repository:
    """The repository that an address names. Kinds: `bad-input`, `upload-failed` (the Hub cannot be asked),
    `output-exists` (a model is there and nothing may be replaced), `missing-package`."""
    address = os.fspath(out)
    repo, branch = parts(address)
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        problem = missing_package(error)
        if problem is None:
            raise
        raise CkptToolError(replace(problem, file=address)) from None
    head, there = None, frozenset[str]()
    with _told(address):
        try:
            info = HfApi().model_info(repo, revision=branch)
            head, there = info.sha, frozenset(s.rfilename for s in info.siblings or ())
        except RevisionNotFoundError:
            hint = f"`hf repos branch create {repo} {branch}` makes it"
            fail("upload-failed", f"expected the branch {branch}, found none", file=address, hint=hint)
        except RepositoryNotFoundError:
            if branch is not None:
                fail("upload-failed", "expected the repository of a branch, found none", file=address)
    model = sorted(n for n in there if _of_a_model(n))
    if model and not overwrite:
        fail(
            "output-exists",
            f"expected a repository without a model, found {printable(model[0])}",
            file=address,
            hint="--overwrite replaces it by a commit; the one before stays in the history",
        )
    made = Repository(address, repo, branch, head, there, _folder(repo))
    made.close()  # a folder that is there was never committed
    return made


def _of_a_model(name: str) -> bool:
    """Whether a file of a repository belongs to a model as it is written here, and goes with it."""
    return is_weights(name) or belongs(name) or name == MANIFEST or name.endswith(".index.json")


def _folder(repo: str) -> Path:
    """A folder of our own under TMPDIR; the same for every run into a repository, so that one can go on."""
    root = Path(tempfile.gettempdir(), f"ckpt-tool-{os.getuid()}")
    root.mkdir(mode=0o700, exist_ok=True)
    status = os.lstat(root)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        hint = "set TMPDIR to a folder of your own"
        fail(
            "output-failed", "expected a folder that only you can write, found another", file=root, hint=hint
        )
    return root / repo.replace("/", "--")


def staging(
    to: Repository, plan: Plan, look: Callable[[str, Path], None]
) -> Callable[[Path, Identity, Replace], Staging]:
    """How `execute` is to keep what it makes. `look` is given each finished file (its name, where it is)
    before it is sent, as its bytes are gone afterwards."""
    to.prepare()
    sizes = [sum(t.nbytes for f in files for t in f.tensors) for files, _ in groups(plan)]
    largest = None if any(f.format == BUNDLE for f in plan.outputs) else max(sizes, default=0)
    return lambda place, identity, replaced: _Sending(
        place, identity, replaced, to=to, look=look, largest=largest
    )


@dataclass
class _Sending(Staging):
    """A staging folder whose finished files are sent."""

    to: Repository | None = None
    look: Callable[[str, Path], None] = lambda name, path: None
    looked_at: set[str] = field(default_factory=set)
    largest: int | None = None  # bytes that are there at a time; None where all are there until the end

    def check_space(self, size: int) -> None:
        super().check_space(size if self.largest is None else min(size, self.largest + _KEPT_BYTES))

    def record(self, entry: Entry) -> None:
        super().record(entry)
        self._send(entry.files)

    def publish(self) -> None:
        for entry in self.entries:  # those too that an interrupted run had finished
            self._send(entry.files)
        super().publish()

    def _send(self, names: Iterable[str]) -> None:
        assert self.to is not None
        for name in names:
            if name not in self.looked_at:
                self.look(name, self.path / name)
                self.looked_at.add(name)
                self.to.send(name, self.path / name)


def _give_back(path: Path) -> None:
    """Free the room of what was sent. Of safetensors the header and small tensors stay, which the check of
    the result reads, and holes take the place of the others, where the file system knows them; torch files
    are not read again, and bundles of TensorFlow are, for their index."""
    if path.suffix in (".pt", ".pth", ".bin"):
        os.truncate(path, 0)
    punch = getattr(_libc, "fallocate", None)
    if path.suffix != ".safetensors" or punch is None:
        return
    with open(path, "rb+") as file, closing(open_safetensors(path, path.name)) as held:
        for name, tensor in held.tensors.items():
            if tensor.nbytes > LARGE:
                start, size = held.extent(name)[1], tensor.nbytes
                punch(file.fileno(), _PUNCH, ctypes.c_int64(start), ctypes.c_int64(size))


_MEANS: Mapping[int, tuple[str, str | None]] = {
    401: ("that it does not know who you are", "`hf auth login`, or HF_TOKEN with a token that may write"),
    403: ("that you may not write there", "the token must be one that may write, of somebody who may"),
    404: ("no repository of that name for you", "see the name; a token of somebody who may see it"),
    409: ("that another change is being made", "run this again"),
    413: ("that the file is too large", "--max-shard-size makes smaller ones"),
}


@contextmanager
def _told(address: str, where: str | None = None) -> Iterator[None]:
    """What huggingface_hub raises, as one sentence; without its bars of progress, which would break ours."""
    from huggingface_hub import utils as bars

    shown = not bars.are_progress_bars_disabled()  # type: ignore[attr-defined]
    try:
        if shown:
            bars.disable_progress_bars()  # type: ignore[attr-defined]
        yield
    except CkptToolError:
        raise
    except Exception as error:
        _raise(error, address, where)
    finally:
        if shown:
            bars.enable_progress_bars()  # type: ignore[attr-defined]


def _raise(error: BaseException, address: str, where: str | None) -> NoReturn:
    while getattr(error, "response", None) is None and error.__cause__ is not None:
        error = error.__cause__  # around it there are words only
    answer = getattr(error, "response", None)
    status = getattr(answer, "status_code", 0)
    said = printable(answer.headers.get("x-error-message", ""), 200) if answer is not None else ""
    if status == 412:
        fail(
            "output-changed",
            "expected the repository as it was when the work began, found another commit",
            file=address,
            hint="run this again: what was sent is not sent twice",
        )
    found, hint = _MEANS.get(status, ("", None))
    if not found:
        lines = [line for line in str(error).splitlines() if line.strip()]
        found = f"status {status}" if status else printable(lines[0] if lines else type(error).__name__, 200)
    text = f"expected the Hub to take it, found {found}{f': {said}' if said else ''}"
    raise CkptToolError(Problem("upload-failed", text, address, where, hint)) from None
