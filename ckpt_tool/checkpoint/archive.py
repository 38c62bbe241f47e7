"""A zip or tar(.gz) of a whole download, opened as if it were a folder; nothing is extracted.

Members that lie in the archive as they are get read in place. Deflated ones are inflated into temporary files
without a name (spool.py), only those that are needed, with their checksums compared on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from shlex import quote

from ckpt_tool.checkpoint.base import Known
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.dcp_folders import is_part as is_dcp_part
from ckpt_tool.checkpoint.dcp_names import COMMON, DATA, METADATA
from ckpt_tool.checkpoint.deepspeed import LATEST, is_model_states, root_of
from ckpt_tool.checkpoint.folders import Folder, Place
from ckpt_tool.checkpoint.megatron import is_of_megatron
from ckpt_tool.checkpoint.no_weights import Around, refuse
from ckpt_tool.checkpoint.run_documents import is_run_document
from ckpt_tool.checkpoint.safetensors import DEPTH
from ckpt_tool.checkpoint.spool import Spool
from ckpt_tool.checkpoint.tar import read_tar, read_tar_gz
from ckpt_tool.checkpoint.tf_names import STATE, is_part
from ckpt_tool.checkpoint.weight_sets import (
    INDEXES,
    ORIGINAL_FOLDER,
    exports,
    is_document,
    is_template,
    is_weights,
)
from ckpt_tool.checkpoint.zip_reader import ZipArchive
from ckpt_tool.errors import fail, printable


class Members:
    """The files of an archive: their names, and where each lies once it is asked for."""

    def __init__(self, label: str, names: Collection[str], locate: Callable[[str], Place]) -> None:
        self.label, self.names, self._locate = label, names, locate
        self._all = frozenset(names)
        self._places: dict[str, Place] = {}
        self.held: list[ByteRange | Spool] = []  # open for as long as the members may be read

    def place(self, name: str) -> Place:
        if name not in self._places:
            if name not in self._all:
                fail("not-found", "expected a member of that name, found none", file=name)
            self._places[name] = self._locate(name)
        return self._places[name]

    def close(self) -> None:
        for file in self.held:
            file.close()


class ArchiveFolder(Folder):
    """One folder inside an archive; `prefix` is empty or ends in `/`."""

    def __init__(self, members: Members, prefix: str = "") -> None:
        self.members, self.prefix = members, prefix
        self.label = f"{members.label}/{prefix}".rstrip("/")

    def names(self) -> list[str]:
        inside = [name[len(self.prefix) :] for name in self.members.names if name.startswith(self.prefix)]
        return sorted(n for n in inside if "/" not in n.removeprefix(ORIGINAL_FOLDER) or is_template(n))

    def below(self, enter: Callable[[str], bool], depth: int = 2) -> list[str]:
        """All of them: they are listed already."""
        inside = [name[len(self.prefix) :] for name in self.members.names if name.startswith(self.prefix)]
        return sorted(name for name in inside if "/" in name)

    def survey(self) -> list[str]:
        return [name[len(self.prefix) :] for name in self.members.names if name.startswith(self.prefix)]

    def place(self, name: str) -> Place:
        return self.members.place(self.prefix + name)

    def outer(self) -> Folder | None:
        if not self.prefix:
            return None
        parent = str(PurePosixPath(self.prefix).parent)
        return ArchiveFolder(self.members, "" if parent == "." else parent + "/")

    def close(self) -> None:
        self.members.close()


def needed(name: str) -> bool:
    """Whether a member may be part of a checkpoint."""
    path = PurePosixPath(name)
    inner = is_template(f"{path.parent.name}/{path.name}")
    return (
        inner
        or is_document(path.name)
        or is_run_document(name)
        or is_weights(path.name)
        or is_part(path.name)
        or path.name in (STATE, METADATA, COMMON, LATEST)
        or is_model_states(path.name)
        or path.suffix == DATA
    )


def open_archive(
    archive: ZipArchive | ByteRange, format: str, *, spool_dir: Path | None = None
) -> ArchiveFolder:
    """The folder of the archive that holds the weights: of a zip, whose directory was read, or of an open
    file that is a "tar" or "tar.gz".

    Fails with `wrong-format` when no folder does, `ambiguous-input` when several do.
    """
    if isinstance(archive, ZipArchive):
        members = _of_zip(archive, spool_dir)
    else:
        members = {"tar": _open_tar, "tar.gz": _open_tar_gz}[format](archive, spool_dir)
    try:
        return ArchiveFolder(members, _root(members))
    except BaseException:
        members.close()
        raise


def _root(members: Members) -> str:
    """The prefix of the folder with the weights; `original/` beside weights belongs to the one around it, so
    do the folders that trainers make for a torch.distributed checkpoint, and Megatron's rank folders belong
    to the archive; an index beside no weights lists those in the folders below it. What was exported as a
    SavedModel is passed over where there is more."""
    if any(map(is_of_megatron, members.names)):
        return ""
    paths = [PurePosixPath(name) for name in members.names]
    dcp = {p.parent for p in paths if p.suffix == DATA} & {p.parent for p in paths if p.name == METADATA}
    plain = {p.parent for p in paths if is_weights(p.name)} - dcp
    exported = exports(members.names)
    plain = {p for p in plain if str(p) not in exported} or plain
    listing = {p.parent for p in paths if p.name in INDEXES}
    outer = listing - plain
    plain = {p if p in listing else next((a for a in p.parents[:DEPTH] if a in outer), p) for p in plain}
    parents = {str(p) for p in (*plain, *(p.parent if is_dcp_part(p.name) else p for p in dcp))}
    prefixes = {"" if parent == "." else parent + "/" for parent in parents}
    roots = sorted(
        p for p in prefixes if not (p.endswith("original/") and p[: -len("original/")] in prefixes)
    )
    if not roots and (root := root_of(members.names)) is not None:
        return root
    if not roots:
        if {"pickle", "storages", "tensors"} <= set(members.names):
            found = "a torch file of a version before 0.1.10"
            hint = "a torch of that time or later loads it: save it again with torch.save"
            fail(
                "wrong-format",
                f"expected weights in the archive, found {found}",
                file=members.label,
                hint=hint,
            )
        refuse(list(members.names), around(members.label))
    if len(roots) > 1:
        found = ", ".join(printable(root or "./", 60) for root in roots[:5])
        fail(
            "ambiguous-input",
            f"expected weights in one folder of the archive, found some in {len(roots)}: {found}",
            file=members.label,
            hint="unpack the archive and give the folder that is meant",
        )
    return roots[0]


def around(label: str) -> Around:
    """How to speak of an archive's files, which must be unpacked for all but the folder of its weights."""
    return Around(
        label,
        label,
        lambda sub: f"unpack the archive, then --in {quote(sub)}",
        lambda sub: sub.removeprefix(label).lstrip("/") or "DIR",
        first="unpack the archive into DIR; ",
    )


def _of_zip(archive: ZipArchive, spool_dir: Path | None) -> Members:
    data = archive.source

    def locate(name: str) -> Place:
        member = archive.members[name]
        if member.stored:
            begin = data.base + member.data

            def check(known: Iterable[Known] = ()) -> None:
                archive.check(member, [(at - begin, size, crc) for at, size, crc in known])

            return Place(data.path, member.size, (begin, member.size), check)
        # One file for each: a file that grows after it was opened counts as changed.
        spool = Spool(spool_dir)
        members.held.append(spool)
        path = spool.path
        archive.inflate(member, spool)
        return Place(path, spool.size, (0, spool.size))

    members = Members(data.name, [n for n in archive.members if not n.endswith("/")], locate)
    members.held.append(data)
    return members


def _open_tar(data: ByteRange, spool_dir: Path | None) -> Members:
    with closing(data):
        found = read_tar(data)
    places = {m.name: Place(m.path, m.size, (m.offset, m.size)) for m in found}
    return Members(data.name, list(places), places.__getitem__)


def _open_tar_gz(data: ByteRange, spool_dir: Path | None) -> Members:
    spool = Spool(spool_dir)
    with closing(data), _closed_on_error(spool):
        found, names = read_tar_gz(data, needed, spool)
    places = {m.name: Place(m.path, m.size, (m.offset, m.size)) for m in found}

    def locate(name: str) -> Place:
        if name not in places:
            text = "expected a part of the model, found a file that was not inflated with the others"
            fail("unsupported", text, file=name, hint="unpack the archive, and give the folder")
        return places[name]

    members = Members(data.name, names, locate)
    members.held.append(spool)
    return members


@contextmanager
def _closed_on_error(file: ByteRange | Spool) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.close()
        raise
