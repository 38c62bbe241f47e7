"""integrity.json, in which Megatron-Core lists the SHA-256 of every file of a torch_dist folder when it saves
with --verify-integrity: `{"algorithm": "sha256", "files": {name: digest}}`.

A program made the list of the files as it wrote them: weights that differ from it are damaged, and refused.
Small files are always compared, weights where they are small or it is asked for.

Source: megatron-core 0.19.2 (core/dist_checkpointing/validation.py: save_integrity_manifest).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

from ckpt_tool.checkpoint.base import Checkpoint, Document, TensorFile
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.checklist import DOCUMENT_BYTES, SMALL
from ckpt_tool.checkpoint.dcp_names import COMMON, DATA
from ckpt_tool.checkpoint.remote_path import remote_of
from ckpt_tool.checkpoint.run_documents import INTEGRITY
from ckpt_tool.errors import Problem, fail, fail_all, printable

SPEED = (
    450e6  # bytes of SHA-256 per second and core, as measured without instructions of the processor for it
)
_CHUNK = 1 << 20
_NAME = re.compile(r"[\w.-]{1,255}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
DAMAGED = "the file is damaged, or of another save: copy it again from where the checkpoint was saved"

Progress = Callable[[str, int], None]


def notes(checkpoint: Checkpoint, *, weights: bool = False, progress: Progress | None = None) -> list[str]:
    """What comparing with the list says, in words; nothing without one. Fails with `checksum` for files that
    are others than it lists, `bad-config` for a list of another form, `unsupported` for another algorithm."""
    if INTEGRITY not in checkpoint.documents:
        return []
    listed = _listed(checkpoint)
    if not listed:
        return [f"{INTEGRITY} lists no file: nothing was compared"]
    paths = {path.name: path for file in checkpoint.files.values() for path in _paths(file)}
    found = {name: paths[name] for name in listed if name in paths}
    if not found:
        return [f"{INTEGRITY} was not compared: the files that it lists lie in an archive or a cache"]
    sizes = {name: _size(path, name) for name, path in found.items()}
    if not weights and sum(sizes.values()) > SMALL:
        size = sum(sizes.values())
        cost = f"{size / 1e9:,.1f} GB, about {size / SPEED:,.0f} s"
        return [f"{INTEGRITY}: the sums of {len(found)} files were not compared ({cost}): --checksums does"]
    fail_all(_differences(found, listed, progress or (lambda name, count: None)))
    changed = [n for n, d in checkpoint.documents.items() if n in listed and _of_document(d) != listed[n]]
    others = [f"{name} is another than {INTEGRITY} lists" for name in changed]
    agree = f"{INTEGRITY}: the SHA-256 of all {len(found)} files of the weights agree"
    if unlisted := sorted(paths.keys() - found.keys()):
        first = ", ".join(unlisted[:4]) + (", ..." if len(unlisted) > 4 else "")
        agree = f"{INTEGRITY}: the SHA-256 of {len(found)} files agree; it lists nothing of {first}"
    if gone := sorted(n for n in listed if n.endswith(DATA) and n not in paths):
        others.append(f"{INTEGRITY} lists {gone[0]}, which no tensor lies in")
    return [*others, agree]


def _paths(file: TensorFile) -> Iterator[Path]:
    """Those of the weights, and of what Megatron keeps of the run beside them."""
    yield from file.paths
    common = file.path.parent / COMMON
    if remote_of(file.path) is None and common.is_file():
        yield common


def _of_document(document: Document) -> str:
    return hashlib.sha256(document.read(DOCUMENT_BYTES)).hexdigest()


def _listed(checkpoint: Checkpoint) -> dict[str, str]:
    told = checkpoint.json(INTEGRITY)
    algorithm, files = told.get("algorithm", "sha256"), told.get("files")
    if algorithm != "sha256":
        message = f"expected sums of SHA-256, found {printable(str(algorithm), 40)!r}"
        fail("unsupported", message, file=INTEGRITY, where="algorithm")
    if not isinstance(files, dict):
        fail(
            "bad-config", "expected a digest for each file, found no such list", file=INTEGRITY, where="files"
        )
    made: dict[str, str] = {}
    for name, digest in files.items():
        if not _NAME.fullmatch(name) or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            message = "expected the name of a file of the folder and 64 digits, found another"
            fail("bad-config", message, file=INTEGRITY, where=printable(name, 60))
        made[name] = digest
    return made


def _size(path: Path, name: str) -> int:
    with closing(ByteRange(path, name)) as data:
        return data.size


def _differences(
    found: Mapping[str, Path], listed: Mapping[str, str], progress: Progress
) -> Iterator[Problem]:
    for name, path in found.items():
        digest = _digest(path, name, progress)
        if digest != listed[name]:
            message = f"expected SHA-256 {listed[name]} as {INTEGRITY} says, found {digest}"
            yield Problem("checksum", message, name, hint=DAMAGED)


def _digest(path: Path, name: str, progress: Progress) -> str:
    digest, room = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with closing(ByteRange(path, name)) as data:
        for start in range(0, data.size, _CHUNK):
            piece = room[: min(_CHUNK, data.size - start)]
            data.read_into(start, piece)
            digest.update(piece)
            progress(name, len(piece))
    return digest.hexdigest()
