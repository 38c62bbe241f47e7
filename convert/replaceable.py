"""What an output may replace: an empty folder; one that this tool wrote and that holds nothing else; or,
where that is asked for, one of weights, configs and tokenizer files and nothing else.

Whatever could be somebody's work is a stranger, and one stranger is enough to refuse. Files that changed
after the manifest was written are compared by their checksums: a fine-tune saved under the same names is
somebody's work too.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.dcp_names import DATA
from ckpt_tool.checkpoint.dcp_names import FORMAT as DISTRIBUTED
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.sniff import sniff
from ckpt_tool.checkpoint.weight_sets import is_document, is_weights
from ckpt_tool.checkpoint.zlibs import crc32
from ckpt_tool.convert.layer_axis import layers_apart
from ckpt_tool.convert.manifest import (
    CERTIFICATE,
    CERTIFICATE_LISTS,
    MANIFEST,
    MANIFEST_BYTES,
    MANIFEST_VERSION,
    members_of,
)
from ckpt_tool.errors import CkptToolError, fail, printable
from ckpt_tool.records import dataclass

# nothing; an empty folder or an output of this tool; that or a folder of a model's files
Replace = Literal["nothing", "outputs", "models"]

ENTRIES = 100_000  # a folder with more is no output, and not worth a longer look
SHOWN = 3
DOCUMENT_BYTES = 256 << 20
REPOSITORIES = (".git", ".hg", ".svn", ".jj")
AWAY = "move it away, or choose another --out"
_CHUNK = 1 << 20
_ESCAPED = re.compile(r"\\([0-7]{3})")
_MORE_DOCUMENTS = re.compile(
    r"(special_tokens_map|preprocessor_config|processor_config)\.json|spiece\.model|sentencepiece\.bpe\.model"
    r"|[\w.-]+\.(safetensors|bin|pth|pt)\.index\.json",
    re.ASCII,
)
_WEIGHTS = re.compile(r"[\w.-]+\.(safetensors|bin|pth|pt)", re.ASCII)
# Weights by their ending, and yet the state of a training or a small file that stands for days of it.
_TRAINING = re.compile(
    r"(adapter|lora|optimizer|scheduler|scaler|rng_state|training_args|trainer)[_.-].*|.*_(adapter|lora)[_.-].*"
)


@dataclass(frozen=True)
class Stamp:
    """One entry below a folder, as far as a later look must agree. `kind` is "file", "folder" or words for
    what else it is."""

    kind: str
    inode: int = 0
    size: int = 0
    modified: int = 0  # nanoseconds
    changed: int = 0  # of the inode: nobody can set it back


Contents = dict[str, Stamp]  # by path below the folder


@dataclass(frozen=True)
class Written:
    """What a manifest says that the tool wrote: sizes of weight files, SHA-256 of documents, and of each
    weight file its tensors' (dtype, shape, CRC32)."""

    direction: str
    weights: Mapping[str, int]
    documents: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, tuple[str, tuple[int, ...], str]]]

    @property
    def names(self) -> set[str]:
        return {MANIFEST, CERTIFICATE, CERTIFICATE_LISTS, *self.weights, *self.documents}


def look(folder: Path, replace: Replace, *, shown: Path | None = None, read: bool = True) -> Contents:
    """What `folder` holds, if all of it may be replaced; `not-replaceable` otherwise. Without `read` nothing
    larger than the manifest is read, and changed weights are not found out."""
    said = folder if shown is None else shown
    found = contents_of(folder, said)
    if not found:
        return found
    written = _manifest(folder, found)
    if replace == "models":
        if (strange := _strange_to_models(folder, found, written)) is not None:
            _refuse(said, f"expected weights, configs and tokenizer files and nothing else, found {strange}")
        return found
    problem = _not_ours(folder, found, written, read)
    if problem is not None:
        foreign = _strange_to_models(folder, found, written) is None
        hint = "--overwrite-foreign replaces a folder of weights, configs and tokenizer files"
        _refuse(said, problem, hint if foreign else None)
    return found


def refuse_existing(place: Path, shown: Path, status: os.stat_result, *, flags: bool = True) -> NoReturn:
    """`output-exists`, with the way out that there is for what stands there."""
    ways: tuple[tuple[str, Replace], ...] = (("--overwrite", "outputs"), ("--overwrite-foreign", "models"))
    hint = "choose another --out"
    for option, replace in ways if flags else ():
        with suppress(CkptToolError):
            look(place, replace, read=False)
            hint = f"{option} replaces it"
            break
    what = "a folder" if stat.S_ISDIR(status.st_mode) else "a file"
    fail("output-exists", f"expected a free name, found {what}", file=shown, hint=hint)


def contents(folder: Path) -> Contents:
    """Every entry below `folder`; links are not followed. Raises OSError, and ValueError for a folder with
    more than `ENTRIES` entries."""
    found: Contents = {}
    pending = [""]
    while pending:
        within = pending.pop()
        with os.scandir(folder / within) as entries:
            for entry in entries:
                path = f"{within}/{entry.name}" if within else entry.name
                status = entry.stat(follow_symlinks=False)
                found[path] = _stamp(status)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(path)
        if len(found) > ENTRIES:
            raise ValueError(f"more than {ENTRIES} files")
    return found


def _stamp(status: os.stat_result) -> Stamp:
    if stat.S_ISDIR(status.st_mode):
        # its times change with what it holds, and what it holds is compared
        return Stamp("folder", status.st_dev)
    kind = "file" if stat.S_ISREG(status.st_mode) else "a link" if stat.S_ISLNK(status.st_mode) else "special"
    return Stamp(kind, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def remove(folder: Path, known: Contents) -> bool:
    """Remove what `known` lists below `folder`, and the folder; whether nothing else was there."""
    for path, stamp in sorted(known.items(), reverse=True):  # what a folder holds sorts after it
        with suppress(OSError):
            (os.rmdir if stamp.kind == "folder" else os.unlink)(folder / path)
    try:
        os.rmdir(folder)
    except OSError:
        return False
    return True


# --- what stands there ----------------------------------------------------------------------------------


def contents_of(folder: Path, shown: Path) -> Contents:
    """`contents`; `not-replaceable` for a file, a repository, and a folder with mounts."""
    try:
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode):
            _refuse(shown, "expected a folder, found a file")
        for name in REPOSITORIES:
            if os.path.lexists(folder / name):
                _refuse(shown, f"expected an output, found the root of a repository ({name})")
        if mounts := mounts_below(folder):
            below = ", ".join(printable(m) for m in mounts[:SHOWN])
            _refuse(shown, f"expected one file system, found a mount at {below}")
        found = contents(folder)
    except OSError as error:
        _refuse(shown, f"expected to read what it holds, found that it cannot be: {error.strerror or error}")
    except ValueError as error:
        _refuse(shown, f"expected an output, found {error}")
    for path, stamp in found.items():
        if stamp.kind == "folder" and stamp.inode != status.st_dev:
            _refuse(shown, f"expected one file system, found another at {printable(path)}")
    return found


def mounts_below(folder: Path) -> list[Path]:
    """Mount points at or below a resolved folder, bind mounts of the same file system included."""
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return []
    found = []
    for line in table.splitlines():
        fields = line.split(" ")
        if len(fields) > 4:
            point = Path(_ESCAPED.sub(lambda m: chr(int(m[1], 8)), fields[4]))
            if point == folder or folder in point.parents:
                found.append(point)
    return found


def _refuse(shown: Path, message: str, hint: str | None = None) -> NoReturn:
    fail("not-replaceable", message, file=shown, hint=AWAY if hint is None else f"{hint}; or {AWAY}")


def _listed(names: list[str]) -> str:
    text = ", ".join(printable(n) for n in sorted(names)[:SHOWN])
    return text if len(names) <= SHOWN else f"{text} and {len(names) - SHOWN} more"


# --- an output of this tool -----------------------------------------------------------------------------


def _manifest(folder: Path, found: Contents) -> Written | None:
    """What the manifest in the folder says; None where none reads as one of this tool."""
    stamp = found.get(MANIFEST)
    if stamp is None or stamp.kind != "file" or stamp.size > MANIFEST_BYTES:
        return None
    try:
        tensors: dict[str, dict[str, tuple[str, tuple[int, ...], str]]] = {}
        data: dict[str, Any] = {}
        content = (folder / MANIFEST).read_bytes()
        for key, value in members_of(content):
            if key == "tensors[]":
                entry = value["dtype"], tuple(value["shape"]), value["crc32"]
                tensors.setdefault(value["file"], {})[value["name"]] = entry
            else:
                data[key] = value
        if data["tool"] != "ckpt-tool" or data["manifest_version"] not in range(1, MANIFEST_VERSION + 1):
            return None
        return Written(
            str(data["direction"]),
            {o["file"]: o["bytes"] for o in data["outputs"]},
            {d["file"]: d["sha256"] for d in data["documents"]},
            tensors,
        )
    except (CkptToolError, OSError, KeyError, TypeError, AttributeError):
        return None


def _not_ours(folder: Path, found: Contents, written: Written | None, read: bool) -> str | None:
    """Why the folder is not an untouched output of this tool, in words."""
    if written is None:
        what = f"{MANIFEST} is none of its manifests" if MANIFEST in found else _listed(_outermost(found))
        return f"expected an empty folder or an output of this tool, found {what}"
    strangers = _strangers(found, written.names)
    if strangers:
        return f"expected nothing but what {MANIFEST} lists, found {_listed(strangers)}"
    altered = _altered(folder, found, written) if read else []
    if altered:
        return (
            f"expected the files that {MANIFEST} lists as they were written, found {_listed(altered)} changed"
        )
    return None


def _outermost(found: Contents) -> list[str]:
    return [path for path in found if "/" not in path]


def _strangers(found: Contents, names: set[str]) -> list[str]:
    """Entries that are neither files called so nor the folders on the way to them."""
    folders = {parent.as_posix() for name in names for parent in Path(name).parents}
    odd = {
        path: stamp
        for path, stamp in found.items()
        if not (path in names and stamp.kind == "file") and not (path in folders and stamp.kind == "folder")
    }
    # of a strange folder its own name says enough
    outer = [p for p in odd if not any(parent.as_posix() in odd for parent in Path(p).parents)]
    return [f"{p} ({odd[p].kind})" if odd[p].kind not in ("file", "folder") else p for p in outer]


def _altered(folder: Path, found: Contents, written: Written) -> list[str]:
    """Files that do not hold what the tool wrote. Documents are hashed; a weight file is read only if it
    changed after the manifest was written, which comes last."""
    names = [n for n in written.documents if n in found]
    altered = [n for n in names if _digest(folder / n, found[n].size) != written.documents[n]]
    weights = {n: found[n] for n in written.weights if n in found}
    resized = [n for n, stamp in weights.items() if stamp.size != written.weights[n]]
    later = [n for n, s in weights.items() if n not in resized and s.changed >= found[MANIFEST].changed]
    if later:
        stamps = tuple((n, found[n]) for n in (MANIFEST, *later))
        altered += _other_tensors(folder, stamps)
    return [*altered, *resized]


def _digest(path: Path, size: int) -> str | None:
    if size > DOCUMENT_BYTES:
        return None
    with suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


@lru_cache(maxsize=16)
def _other_tensors(folder: Path, stamps: tuple[tuple[str, Stamp], ...]) -> tuple[str, ...]:
    """Those of the files (all but the first, which is the manifest) whose tensors are not the manifest's. The
    stamps make the answer good for as long as the files stay as they are."""
    names = tuple(name for name, _ in stamps[1:])
    written = _manifest(folder, dict(stamps))
    if written is None:
        return names
    try:
        with open_checkpoint(folder, prefer="hf" if written.direction == "to-hf" else "original") as opened:
            apart = layers_apart(opened)
            return tuple(n for n in names if not _holds(apart, n, written.tensors.get(n, {})))
    except (CkptToolError, OSError):
        return names


def _holds(
    checkpoint: Checkpoint, name: str, tensors: Mapping[str, tuple[str, tuple[int, ...], str]]
) -> bool:
    file = checkpoint.files.get(name)
    if file is None and name.endswith(DATA):  # a part of a folder that reads as one file
        file = next((f for f in checkpoint.files.values() if f.format == DISTRIBUTED), None)
        own = set() if file is None else set(file.tensors) & set(tensors)
    else:
        own = set() if file is None else set(file.tensors)
    if file is None or own != set(tensors):
        return False
    return all(
        (t.dtype, tuple(t.shape)) == tensors[t.name][:2]
        and f"{_crc(checkpoint, t):08x}" == tensors[t.name][2]
        for t in map(file.tensors.__getitem__, own)
    )


def _crc(checkpoint: Checkpoint, tensor: TensorInfo) -> int:
    crc, room = 0, memoryview(bytearray(min(_CHUNK, tensor.nbytes)))
    for start in range(0, tensor.nbytes, _CHUNK):
        piece = room[: min(_CHUNK, tensor.nbytes - start)]
        checkpoint.read_into(tensor, start, piece)
        crc = crc32(piece, crc)
    return crc


# --- a model of somebody else ---------------------------------------------------------------------------


def _strange_to_models(folder: Path, found: Contents, written: Written | None) -> str | None:
    """What the folder holds besides the files of a model, in words."""
    names = set() if written is None else written.names
    for path, stamp in found.items():
        if "/" in path or stamp.kind != "file" or not is_model_file(path):
            continue
        if is_weights(path) or _is_document(path) or _holds_tensors(folder / path):
            names.add(path)
    strangers = _strangers(found, names)
    return _listed(strangers) if strangers else None


def is_model_file(name: str) -> bool:
    """Whether a file called so (without folders) is of a model: weights, an index, a config, a tokenizer."""
    if is_weights(name) or _is_document(name):
        return True
    return _WEIGHTS.fullmatch(name) is not None and _TRAINING.fullmatch(name) is None


def _is_document(name: str) -> bool:
    return is_document(name) or _MORE_DOCUMENTS.fullmatch(name) is not None


def _holds_tensors(path: Path) -> bool:
    """Whether a file that is only called like weights begins like some."""
    try:
        data = ByteRange(path, path.name)
    except CkptToolError:
        return False
    try:
        return sniff(data) in ("zip", "torch-legacy", "safetensors")
    except CkptToolError:
        return False
    finally:
        data.close()
