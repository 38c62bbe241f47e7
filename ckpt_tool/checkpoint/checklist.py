"""The sums that a publisher lists beside the files: checklist.chk, SHA256SUMS and their like, in the format
of `md5sum -c` or `sha256sum -c`, with or without the algorithm's name before each, or of `openssl dgst`.

A sum that differs is told and never refused: published lists were wrong themselves, and people change
params.json on purpose. Small files are always compared, weights where they are small or it is asked for.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from pathlib import Path

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.remote_path import remote_of
from ckpt_tool.checkpoint.weight_sets import CHECKLISTS
from ckpt_tool.errors import CkptToolError
from ckpt_tool.records import dataclass

LIST_BYTES = 1 << 20
DOCUMENT_BYTES = 32 << 20  # of a file beside the weights; the largest tokenizers have 28 MB
SMALL = 64 << 20  # bytes of weights that are compared without being asked to: a tenth of a second
SPEED = 600e6  # bytes per second and core, as measured of MD5 and of SHA-256
SHOWN = 8  # files in notes, before the rest is counted
_CHUNK = 1 << 20
_SUM = r"([0-9a-fA-F]{32}|[0-9a-fA-F]{64})"
_LINE = re.compile(rf"\\?{_SUM}[ \t]+\*?(.+)|(?:MD5|SHA256|SHA2-256) ?\((.+)\) ?= {_SUM}", re.ASCII)


def listed(data: bytes) -> dict[str, str]:
    """The sums in a list by the names of the files, in order: of MD5 or, twice as long, of SHA-256. What is
    no line of a list is skipped, as are names that lead elsewhere; of two lines for one name the first
    counts."""
    found: dict[str, str] = {}
    wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what PowerShell writes
    for line in data.decode("utf-16" if wide else "utf-8-sig", "replace").splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None:
            continue
        name = (match[2] or match[3]).strip().removeprefix("./")
        parts = name.split("/")
        if name and "\\" not in name and not {"", ".", ".."} & set(parts):
            found.setdefault(name, (match[1] or match[4]).lower())
    return found


@dataclass
class Sums:
    """What comparing with one list found, by the names of files. `other` has (as listed, as found), `left`
    the bytes of weights that were not read."""

    name: str
    agree: list[str] = field(default_factory=list)
    other: dict[str, tuple[str, str]] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def notes(self) -> Iterator[str]:
        """In words, what differs first."""
        for name, (wanted, found) in list(self.other.items())[:SHOWN]:
            yield f"{name} has {_algorithm(wanted)} {found}, {self.name} lists {wanted}"
        if len(self.other) > SHOWN:
            yield f"{len(self.other) - SHOWN} more files have other sums than {self.name} lists"
        compared = len(self.agree) + len(self.other)
        told = [f"{len(self.agree)} of {compared} sums agree"] if compared else []
        if self.left:
            size = sum(self.left.values())
            files = f"{len(self.left)} weight file{'s' * (len(self.left) > 1)}"
            cost = f"{size / 1e9:,.1f} GB, about {size / SPEED:,.0f} s"
            told.append(f"those of {files} not compared ({cost}): --checksums does")
        if told:
            yield f"{self.name}: {'; '.join(told)}"


def compare(
    checkpoint: Checkpoint, *, weights: bool = False, progress: Callable[[str, int], None] | None = None
) -> list[Sums]:
    """Compare files with the lists beside them; with `weights` also large ones. `progress` is told of each
    file of weights and the bytes read of it. A list that cannot be read is none."""
    made = []
    for name in CHECKLISTS:
        if name not in checkpoint.documents:
            continue
        try:
            sums = listed(checkpoint.documents[name].read(LIST_BYTES))
        except CkptToolError:
            continue
        above = f"{checkpoint.path.name}/"  # of a list made one level above
        sums = {n.removeprefix(above): s for n, s in sums.items()}
        sums.pop(name, None)  # `md5sum * > LIST` lists the list, as it was before it was written
        if sums:
            made.append(_compare(checkpoint, name, sums, weights, progress or (lambda name, count: None)))
    return made


def _compare(
    checkpoint: Checkpoint,
    name: str,
    sums: Mapping[str, str],
    weights: bool,
    progress: Callable[[str, int], None],
) -> Sums:
    made = Sums(name)
    paths = {n: path for n, path in _weights(checkpoint) if n in sums}
    sizes = {n: s for n, path in paths.items() if (s := _size(path)) is not None}
    small = sum(sizes.values()) <= SMALL
    for file, wanted in sums.items():
        document = checkpoint.documents.get(file)
        if document is not None and document.size <= DOCUMENT_BYTES:
            found = hashlib.new(_algorithm(wanted), document.read(DOCUMENT_BYTES), usedforsecurity=False)
        elif file in sizes and (weights or small):
            found = _of_weights(paths[file], file, _algorithm(wanted), progress)
        else:
            made.left |= {file: sizes[file]} if file in sizes else {}
            continue
        if found.hexdigest() == wanted:
            made.agree.append(file)
        else:
            made.other[file] = (wanted, found.hexdigest())
    return made


def _weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """Each file of the weights that lies in a folder (one inside an archive has the archive's own checksum),
    by the names that a list may have for it: of many files one only lists what the others hold."""
    for name, file in checkpoint.files.items():
        if len(file.paths) == 1 and file.path.name == name.rpartition("/")[2]:
            yield name, file.path
        elif len(file.paths) > 1:
            for path in file.paths:
                yield path.name, path
                if path.is_relative_to(checkpoint.path):
                    yield path.relative_to(checkpoint.path).as_posix(), path


def _size(path: Path) -> int | None:
    if (remote := remote_of(path)) is not None:
        return remote.size
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _algorithm(listed: str) -> str:
    """That of a sum, by its length."""
    return "md5" if len(listed) == 32 else "sha256"


def _of_weights(path: Path, name: str, algorithm: str, progress: Callable[[str, int], None]) -> hashlib._Hash:
    digest, room = hashlib.new(algorithm, usedforsecurity=False), memoryview(bytearray(_CHUNK))
    data = ByteRange(path, name)
    try:
        for start in range(0, data.size, _CHUNK):
            piece = room[: min(_CHUNK, data.size - start)]
            data.read_into(start, piece)
            digest.update(piece)
            progress(name, len(piece))
    finally:
        data.close()
    return digest


def notes(
    checkpoint: Checkpoint, *, weights: bool = False, progress: Callable[[str, int], None] | None = None
) -> list[str]:
    """What the lists beside a checkpoint say of its files, in words."""
    return [note for sums in compare(checkpoint, weights=weights, progress=progress) for note in sums.notes()]
