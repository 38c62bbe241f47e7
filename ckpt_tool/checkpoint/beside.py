"""The documents that belong to weights: beside them, in the folders between them and the one that was given,
and in the folders above it that are parts of the same run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckpt_tool.checkpoint.base import Checkpoint, Document
from ckpt_tool.checkpoint.dcp_folders import is_part
from ckpt_tool.checkpoint.folders import Directory, Folder
from ckpt_tool.checkpoint.hf_slices import kept_documents
from ckpt_tool.checkpoint.run_documents import may_hold_documents, run_documents
from ckpt_tool.checkpoint.weight_sets import (
    OF_TOKENIZER,
    ORIGINAL_FOLDER,
    belongs,
    is_document,
    is_template,
    is_tokenizer,
)

TOKENIZER, READY = "tokenizer.model", "tokenizer.json"
# What a repository has around its folder `original`, where that has no tokenizer of its own.
AROUND = (
    *(READY, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    "generation_config.json",
)


def documents_of(folder: Folder, within: str, original: bool, notes: list[str]) -> dict[str, Document]:
    """The documents beside the weights, by their names there; those of an `original/` further in keep that
    prefix. Llama 1 and 2 keep tokenizer.model and its sum one level above the weights, so they are looked
    for there too."""
    listed = [*folder.names(), *folder.below(lambda n: n in within.split("/"))] if within else folder.names()
    inside = [name for name in listed if name.startswith(within)]
    called = {name.removeprefix(within): name for name in inside}
    found = {short: folder.document(name, short) for short, name in called.items() if belongs(short)}
    outer = folder if within else folder.outer()
    if not original or any(map(is_tokenizer, found)) or outer is None:
        return found
    if outer.has(TOKENIZER):
        found |= {n: outer.document(n) for n in (TOKENIZER, OF_TOKENIZER) if outer.has(n)}
        notes.append(f"{TOKENIZER} was taken from the folder above the weights")
    elif (within or within_original(folder)) and outer.has(READY):
        around = [n for n in outer.names() if n in AROUND and n not in found]
        found |= {n: outer.document(n) for n in around}
        notes.append(f"{', '.join(sorted(around))}: taken from the folder above the weights")
    return found


def within_original(folder: Folder) -> bool:
    """Whether it is the part of a repository that holds the original download."""
    return isinstance(folder, Directory) and f"{folder.path.resolve().name}/" == ORIGINAL_FOLDER


def outers(folder: Folder, name: str) -> list[Folder]:
    """The folders around `folder`, which is called `name`, nearest first, as long as each is a part of the
    one around it: a run, for its checkpoint's weights."""
    found: list[Folder] = []
    while is_part(name) and (outer := folder.outer()) is not None:
        found.append(outer)
        folder, name = outer, outer.label
    return found


def documents_of_pieces(
    folder: Folder, within: str, around: Iterable[Folder], notes: list[str]
) -> dict[str, Document]:
    """Those of what lies in the part `within` of `folder`, and in the folders between; then those that are
    only in the folders `around` it. The nearest of one name counts."""
    found = documents_of(folder, within, False, notes)
    listed = [*folder.names(), *folder.below(lambda n: n in within.split("/"))]
    for above in _between(within):
        here = [n.removeprefix(above) for n in listed if n.startswith(above)]
        found |= {n: folder.document(above + n, n) for n in here if belongs(n) and n not in found}
    for outer in around:
        more = {n: outer.document(n) for n in outer.names() if belongs(n) and n not in found}
        if more:
            notes.append(f"{', '.join(sorted(more))}: taken from {outer.label}, above the weights")
        found |= more
    kept = kept_documents(folder, within)
    found |= {n: folder.document(path, n) for n, path in kept.items() if belongs(n) and n not in found}
    add_run_documents(found, folder, within)
    for outer in around:
        add_run_documents(found, outer, "")
    return found


def _between(within: str) -> Iterator[str]:
    """The folders around that of the prefix `within`, inside out: `a/` and the whole, of `a/b/`."""
    while within:
        within = within[: within.rstrip("/").rfind("/") + 1]
        yield within


def add_run_documents(documents: dict[str, Document], folder: Folder, within: str) -> None:
    """What the program that trained it put around the weights in the part `within` of `folder`."""
    paths = [*folder.names(), *folder.below(lambda n: may_hold_documents(n) or n in within.split("/"))]
    for short, path in run_documents(paths, within).items():
        if short not in documents:
            documents[short] = folder.document(path, short)


def add_documents(checkpoint: Checkpoint, folder: Folder, names: Iterable[str]) -> None:
    """The documents among `names`, listed without their folders; later ones come before earlier ones."""
    for name in names:
        short = name if is_template(name) else name.rpartition("/")[2]
        if is_document(short) or is_template(short):
            checkpoint.documents[short] = folder.document(name, short)
