"""Where in a folder the `.metadata` of a torch.distributed.checkpoint lies, and what stands beside it.

.metadata  __0_0.distcp  __1_0.distcp            dcp.save, torchtitan's step-100
iter_0000100/.metadata  common.pt  metadata.json Megatron's torch_dist; its tracker says which iteration
weights/.metadata                                NeMo 2
pytorch_model_fsdp_0/.metadata                   accelerate
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.dcp_names import COMMON, DATA, METADATA
from ckpt_tool.checkpoint.folders import Folder, Place
from ckpt_tool.checkpoint.megatron import TRACKER, current, is_iteration_folder
from ckpt_tool.checkpoint.signs import pointer
from ckpt_tool.errors import fail

if TYPE_CHECKING:
    from ckpt_tool.checkpoint.dcp import DcpFile
    from ckpt_tool.checkpoint.hf_slices import SlicedFile

HEAD = 4096
FIRST = b"state_dict_metadata"  # the first field of every `.metadata`
# Folders that trainers make for a checkpoint, or for the weights within it.
_FOLDER = re.compile(
    r"weights|model|distcp|dist_ckpt|sharded|pytorch_model_fsdp_\d+|(global_?)?step[-_]?\d+|checkpoint[-_]\d+"
    r"|epoch[-_]?\d+([-_]step[-_]?\d+)?|model_weights",
    re.ASCII | re.IGNORECASE,
)


def is_part(name: str) -> bool:
    """Whether a folder of this name is a part of the folder of a checkpoint, or of a run."""
    return is_iteration_folder(name) or _FOLDER.fullmatch(name) is not None


def find_dcp(folder: Folder) -> tuple[str, list[str]] | None:
    """The part of `folder` that holds a `.metadata` with data files, as a prefix of names, and notes; None
    where there is none. Kinds: `ambiguous-input` (several), and those of Megatron's tracker."""
    names = [*folder.names(), *folder.below(is_part)]
    inside: dict[str, set[str]] = {}
    for name in names:
        above, slash, last = name.rpartition("/")
        inside.setdefault(above + slash, set()).add(last)
    found = {
        prefix: None
        for prefix, files in inside.items()
        if METADATA in files
        and any(f.endswith(DATA) for f in files)
        and not _is_another(folder.place(prefix + METADATA))
    }
    if not found:
        return None
    if "" in found:
        return "", []

    def tracker(prefix: str) -> str | None:
        name = prefix + TRACKER
        return folder.document(name).read(1024).decode("ascii", "replace") if name in names else None

    if any(is_iteration_folder(prefix.split("/")[0]) for prefix in found):
        return current(found, folder.label, tracker)
    if len(found) > 1:
        shown = ", ".join(sorted(found)[:8])
        hint = "give the folder that is meant"
        fail("ambiguous-input", f"expected one checkpoint, found {shown}", file=folder.label, hint=hint)
    (prefix,) = found
    return prefix, [f"the weights were found in {prefix}"]


def _is_another(place: Place) -> bool:
    """Whether it is a file of something else: the names around it then say what the folder is."""
    data = ByteRange(place.path, METADATA, place.window)
    try:
        head = data.head(HEAD)
    finally:
        data.close()
    return bool(head) and FIRST not in head and pointer(head) is None


def open_folder(folder: Folder, prefix: str) -> DcpFile | SlicedFile:
    """The checkpoint in the part `prefix` of `folder`, with what Megatron keeps of the run as its metadata:
    of common.pt, or of an entry among the tensors. Kinds: those of `open_dcp`, and of a torch file."""
    from ckpt_tool.checkpoint.dcp import open_dcp
    from ckpt_tool.checkpoint.hf_slices import SlicedFile

    file = open_dcp(lambda name: folder.place(prefix + name))
    try:
        common = _common(folder, prefix)
        file.metadata = common if common or isinstance(file, SlicedFile) else file.common_state()
    except BaseException:
        file.close()
        raise
    return file


def _common(folder: Folder, prefix: str) -> Mapping[str, object]:
    if prefix + COMMON not in [*folder.names(), *folder.below(lambda n: prefix.startswith(n + "/"))]:
        return {}
    from ckpt_tool.checkpoint.pickle_records import Inert
    from ckpt_tool.checkpoint.torch_zip import zip_value
    from ckpt_tool.checkpoint.zip_reader import ZipArchive

    place = folder.place(prefix + COMMON)
    data = ByteRange(place.path, COMMON, place.window)
    try:
        value = zip_value(ZipArchive(data))
    finally:
        data.close()
    held = value.fields if type(value) is Inert else value
    return {k: v for k, v in held.items() if type(k) is str} if isinstance(held, Mapping) else {}
