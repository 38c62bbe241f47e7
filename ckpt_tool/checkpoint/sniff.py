"""What a file is, from its first bytes; its name is not believed.

Files that are something else entirely (a web page saved as weights, a git-lfs pointer, GGUF, ...) are refused
here with what they look like, since every reader further down could only say that they are damaged.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection
from shlex import quote
from typing import Literal, NoReturn

from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.signs import (
    GZIP,
    PAGE,
    RELEASE,
    RENAMED_INDEX,
    SQUEEZED,
    TABLE_END,
    TAR_BLOCK,
    Sign,
    by_name,
    by_start,
    is_legacy,
    is_tar_header,
    of_server,
    table_of,
    unfinished,
)
from ckpt_tool.checkpoint.tf_names import STATE, newest
from ckpt_tool.checkpoint.weight_sets import is_document
from ckpt_tool.errors import fail, printable

LINK = "copy it anew with its links followed (cp -L, rsync -L), or download it again"
Format = Literal["zip", "torch-legacy", "safetensors", "tar", "tar.gz"]

ZIP = (b"PK\x03\x04", b"PK\x05\x06")
LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # protocol 2 and the magic number of torch before 1.6

_HINTS = {
    "an empty file": "the download failed; download the file again",
    "a TorchScript archive": "torch.save(torch.jit.load(FILE).state_dict(), OUT.pt) keeps its weights",
    "a pickle that is not a torch file": "save the tensors as a dict with torch.save or as safetensors",
    "a Keras model": f"no family is read from Keras; {RELEASE}",
    "numpy arrays (.npz)": f"no family is read from .npz; {RELEASE}",
    "zeros": "the download was not finished; go on with it, or download the file again",
}


def sniff(data: ByteRange) -> Format:
    """The container format of `data`; fails with `wrong-format` (what it looks like) or `truncated`."""
    head = data.head(1024)
    if not head:
        _wrong("an empty file", data.name)
    if data.size <= 1024 and (link := re.fullmatch(rb"(\.\./)+[\w./-]+\s*", head)):
        looks_like = f"the text of a link ({printable(link[0].decode().strip(), 60)}), not the file"
        _wrong(looks_like, data.name, LINK)
    if (sign := by_start(head)) is not None:
        _wrong(sign.what, data.name, _filled(sign, data))
    if (sign := of_server(head)) is not None and (sign is PAGE or data.size <= len(head)):
        _wrong(sign.what, data.name, sign.hint)
    if head.startswith(ZIP):
        return "zip"
    if is_legacy(head[:32]):
        return "torch-legacy"
    if head.startswith(GZIP):
        if not data.name.endswith((".tar.gz", ".tgz")) and not _holds_tar(head):
            _wrong(SQUEEZED.what, data.name, SQUEEZED.hint)
        return "tar.gz"
    if is_tar_header(head[:TAR_BLOCK]) or head[257:262] == b"ustar":
        return "tar"
    if head[8:9] == b"{":
        return "safetensors"
    known = (*ZIP, LEGACY, GZIP)
    if len(head) < len(LEGACY) and any(magic.startswith(head) for magic in known):
        fail("truncated", f"expected a whole file, found its first {data.size} bytes", file=data.name)
    if data.size > 48 and data.read(data.size - len(TABLE_END), len(TABLE_END)) == TABLE_END:
        sign = table_of(head)
        if sign is RENAMED_INDEX:
            sign = by_name(data.name) or sign  # which may be called as it should be
        _wrong(sign.what, data.name, sign.hint)
    named = None if _is_text(head) else _by_name(data.name)
    if named is not None:
        return named  # the reader of that format says what is wrong with it
    if (sign := by_name(data.name)) is not None:
        _wrong(sign.what, data.name, _filled(sign, data))
    found = _looks_like(head)
    if data.name.rpartition("/")[2] == STATE and (prefix := newest(head.decode("utf-8", "replace"))):
        found = f"the state file of TensorFlow, which names {printable(prefix, 60)} as the newest checkpoint"
    _wrong(found, data.name, _onward(found, data))


def _holds_tar(head: bytes) -> bool:
    """Whether a gzip file that starts with `head` may hold a tar: as far as this shows its first block."""
    try:
        block = zlib.decompressobj(wbits=31).decompress(head, TAR_BLOCK)
    except zlib.error:
        return True  # its reader says what is wrong
    return len(block) < TAR_BLOCK or is_tar_header(block)


def _by_name(name: str) -> Format | None:
    if name.endswith(".safetensors"):
        return "safetensors"
    return "tar" if name.endswith((".tar", ".nemo")) else None


def _is_text(head: bytes) -> bool:
    """Whether a file that starts so is a text: what holds sizes or codes has other bytes by then."""
    return len(head) >= 8 and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head[:64])


def _looks_like(head: bytes) -> str:
    if re.match(rb"\x08[\x01-\x14]\x12", head) and re.search(rb"pytorch|onnx|tf2onnx|keras", head):
        return "an ONNX model"
    if re.match(rb"\x80[\x02-\x05]", head):
        return "a pickle that is not a torch file"
    if not head.strip(b"\0"):
        return "zeros"
    try:
        text = head[:64].decode().strip()
    except UnicodeDecodeError:
        text = ""
    if text.startswith(("{", "[")):
        return "a JSON text"
    if text.isprintable() and text:
        return f"text (`{printable(text, 30)}`)"
    return f"bytes that start with {head[:8].hex(' ')}"


def check_zip_names(names: Collection[str], name: str) -> bool:
    """Whether a zip with these members is a torch file; fails with `wrong-format` for other known uses."""
    tops = {member.partition("/")[2] for member in names}
    if "constants.pkl" in tops and any(member.startswith("code/") for member in tops):
        _wrong("a TorchScript archive", name)
    if "data.pkl" in tops:
        return True
    if names and all(member.endswith(".npy") for member in names):
        _wrong("numpy arrays (.npz)", name)
    if "model.weights.h5" in names:
        _wrong("a Keras model", name)
    return False


def _filled(sign: Sign, data: ByteRange) -> str:
    return sign.hint.format(at=quote(str(data.path.parent)))


def _onward(found: str, data: ByteRange) -> str | None:
    """What to do with a document, or a part of an unfinished download, that was given as the weights."""
    name = data.name.rpartition("/")[2]
    if unfinished(name) is not None:
        return "the download was not finished; go on with it, then run this again"
    if found.startswith(("a JSON text", "text", "the state file")) or is_document(name):
        return f"give the folder of the weights: --in {quote(str(data.path.parent))}"
    return None


def _wrong(looks_like: str, name: str, hint: str | None = None) -> NoReturn:
    hint = hint or next((h for what, h in _HINTS.items() if looks_like.startswith(what)), None)
    fail("wrong-format", f"expected a checkpoint, found {looks_like}", file=name, hint=hint)
