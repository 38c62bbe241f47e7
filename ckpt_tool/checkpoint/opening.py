"""`open_checkpoint`: from a path to the tensors, whatever container or folder layout it is.

Opening reads headers and nothing else; every problem of the files of one checkpoint is reported together.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_tool.checkpoint.base import Checkpoint, LeftOut, TensorFile, Unwrapped
from ckpt_tool.checkpoint.beside import (
    add_documents,
    add_run_documents,
    documents_of,
    documents_of_pieces,
    outers,
)
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.checklist import LIST_BYTES, listed
from ckpt_tool.checkpoint.dcp_folders import find_dcp
from ckpt_tool.checkpoint.dcp_folders import open_folder as open_dcp_folder
from ckpt_tool.checkpoint.dcp_names import METADATA
from ckpt_tool.checkpoint.deepspeed import (
    LATEST,
    Shares,
    check_one_rank,
    find_states,
    is_masters,
    is_model_states,
    is_share,
    may_be_step,
)
from ckpt_tool.checkpoint.folders import Directory, Folder, Place, kind_of, status_given
from ckpt_tool.checkpoint.hf_slices import NAME as SLICE
from ckpt_tool.checkpoint.hf_slices import is_slice, open_slices, slice_files
from ckpt_tool.checkpoint.hub_cache import snapshot_of
from ckpt_tool.checkpoint.megatron import (
    TRACKER,
    RankFolders,
    find_ranks,
    is_iteration_folder,
    is_of_megatron,
    is_rank_folder,
    may_hold_ranks,
)
from ckpt_tool.checkpoint.remote_path import RemotePath, Way, scheme_of
from ckpt_tool.checkpoint.run_documents import MODEL_CONFIG
from ckpt_tool.checkpoint.safetensors import (
    HEADER_LIMIT,
    INDEX_BYTES,
    STRAY,
    TWICE,
    WeightIndex,
    open_safetensors,
    read_index,
    ties,
)
from ckpt_tool.checkpoint.sniff import check_zip_names, sniff
from ckpt_tool.checkpoint.tf_names import STATE, bundle_at, newest
from ckpt_tool.checkpoint.weight_sets import (
    CHECKLISTS,
    FETCH_IT,
    INDEXES,
    ORIGINAL_FOLDER,
    Prefer,
    WeightSet,
    adapter_notes,
    belongs,
    bundle_set,
    check_complete,
    check_finished,
    is_one_of_several,
    is_weights,
    locate,
    refuse_flat,
    set_of,
    vocabulary_kind,
)
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all
from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from ckpt_tool.checkpoint.zip_reader import ZipArchive

HUB = "hf://"
SHOWN_LOST = 10  # files of an index that are not there, before the rest is counted
STATE_BYTES = 1 << 20
NO_LINK = "put the files themselves into a folder of that name beside the index"


@dataclass(frozen=True)
class Limits:
    """What opening accepts beyond what the formats themselves say."""

    safetensors_header: int = HEADER_LIMIT  # bytes
    # What archives on this machine say of the files in them is compared later, by `check_whole`, or where
    # opening fails: nothing of the checkpoint is to be believed before.
    late: bool = False
    as_it_stands: bool = False  # names are those in the files, whatever a training program put before them


@dataclass(repr=False)
class OpenedCheckpoint(Checkpoint):
    """A checkpoint together with the folder it came from, which may hold a temporary file open."""

    folder: Folder | None = field(default=None, repr=False)

    def close(self) -> None:
        super().close()
        if self.folder is not None:
            self.folder.close()


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    prefer: Prefer | None = None,
    limits: Limits | None = None,
    spool_dir: str | os.PathLike[str] | None = None,
    hub: Way = "stream",
) -> Checkpoint:
    """Open a folder, a weight file, a zip or tar(.gz) of a folder, or an address: `hf://org/name[@rev]`,
    http(s) or what fsspec knows. `hub` says whether repositories of the Hub are read by ranges or downloaded
    into its cache, where the environment does not.

    `prefer` says which weights to take where a folder holds the original and the converted ones: without it
    the originals are taken if params.json stands beside them. `spool_dir` (TMPDIR by default) takes the
    inflated members of archives. A weight file that is one of a numbered set opens the whole set.

    The reader of each container is loaded when one of its kind is opened: starting takes half the time.
    """
    text = os.fspath(path)
    limits = limits or Limits()
    if scheme_of(text) is not None:
        return _open_address(text, prefer, limits, None if spool_dir is None else Path(spool_dir), hub)
    given = Path(text)
    if (bundle := _bundle_at(given, limits)) is not None:
        return bundle
    status = status_given(given, text)
    if stat.S_ISDIR(status.st_mode):
        checkpoint = _open_directory(given, prefer, limits)
    elif stat.S_ISREG(status.st_mode):
        spool = None if spool_dir is None else Path(spool_dir)
        checkpoint = _open_single(given, prefer, limits, spool)
    else:
        fail("wrong-format", f"expected a folder or a file, found {kind_of(status)}", file=text)
    if given.is_symlink():
        checkpoint.notes.append(f"{text} is a link to {given.resolve()}")
    return checkpoint


def _open_address(
    text: str, prefer: Prefer | None, limits: Limits, spool_dir: Path | None, hub: Way
) -> Checkpoint:
    """Open what is not on this machine. Files are asked for as they are wanted."""
    from ckpt_tool.checkpoint.hub import fetch
    from ckpt_tool.checkpoint.remote_folder import open_folder

    scheme, single = scheme_of(text) or "", None
    text = scheme + text[len(scheme) :]  # which is written in any case
    if text.startswith(HUB):
        found, notes = fetch(text, prefer=prefer, wish=hub)
        if isinstance(found, Path):
            checkpoint = _open_directory(found, prefer, limits)
            checkpoint.notes[:0] = notes
            return checkpoint
    else:
        found, single = open_folder(text)
        notes = found.notes
    try:
        if single is None:
            checkpoint = _open_folder(found, found.path, prefer, limits)
        else:
            checkpoint = _open_named(found, found.path / single, prefer, limits, spool_dir)
    except BaseException:
        found.close()
        raise
    checkpoint.notes[:0] = notes
    return checkpoint


def _bundle_at(given: Path, limits: Limits) -> Checkpoint | None:
    """The bundle of TensorFlow that a path means: one of its files, or what their names have in common."""
    if os.path.isdir(given) or not os.path.isdir(given.parent):
        return None
    directory = Directory(given.parent)
    try:
        beside = os.listdir(given.parent)
    except OSError:
        return None
    prefix = bundle_at(given.name, beside)
    if prefix is None:
        return None
    chosen = bundle_set(prefix, beside, file=directory.label)
    checkpoint = _open_bundle(directory, chosen, given.with_name(chosen.files[0]), limits)
    if given.name != prefix:
        checkpoint.notes.append(
            f"{given.name} is a part of the TensorFlow checkpoint {prefix}; all of it was opened"
        )
    return checkpoint


def _open_single(path: Path, prefer: Prefer | None, limits: Limits, spool_dir: Path | None) -> Checkpoint:
    directory = Directory(path.parent)
    if is_weights(path.name) and (ranks := _around_rank(directory)) is not None:
        return _open_ranks(*ranks, path, limits)
    if is_model_states(path.name) or is_share(path.name):
        states = _open_states(directory, path, limits, masters=is_masters(path.name))
        if states is not None:
            return states
    beside = [n for n in directory.names() if "/" not in n]
    refuse_flat(path.name, beside)
    part = SLICE.fullmatch(path.name) or path.name == METADATA or path.name.endswith(".distcp")
    if part or is_share(path.name):
        return _open_directory(path.parent, prefer, limits)  # which is read whole
    return _open_named(directory, path, prefer, limits, spool_dir)


def _open_named(
    folder: Folder, path: Path, prefer: Prefer | None, limits: Limits, spool_dir: Path | None
) -> Checkpoint:
    """Open the file of `folder` that has the name of `path`, and the set that it belongs to."""
    name, beside = path.name, [n for n in folder.names() if "/" not in n]
    numbered = set_of(name, beside)
    single = WeightSet(name, (name,), None, "original")
    check_finished(numbered or single, beside, file=folder.label)
    if numbered is not None and numbered.index is not None and is_one_of_several(numbered, beside):
        own = name in _listed(folder, beside, numbered.index)
        numbered = numbered if own else replace(numbered, index=None)  # which is that of the other set
    if numbered is None and (listed := _indexed(folder, beside, name)) is not None:
        numbered = listed[1]
    if numbered is not None:
        check_complete(numbered, file=folder.label, expected=_checklist(folder))
        checkpoint = _open_set(folder, numbered, path.parent, limits)
        if len(numbered.files) > 1:
            what = "shards" if numbered.numbered else "files of one model"
            checkpoint.notes.append(f"{name} is one of {len(numbered.files)} {what}; all were opened")
        return checkpoint
    seen = _look(folder.place(name), name)
    if seen.format in ("zip", "tar", "tar.gz"):
        from ckpt_tool.checkpoint.archive import open_archive

        archive = open_archive(seen.archive or seen.data, seen.format, spool_dir=spool_dir)
        return _open_folder(archive, path, prefer, limits)
    return _open_set(folder, single, path, limits, seen=seen)


def _open_directory(path: Path, prefer: Prefer | None, limits: Limits) -> Checkpoint:
    path, notes = snapshot_of(path)
    directory = Directory(path)
    if (ranks := _around_rank(directory)) is not None:
        return _open_ranks(*ranks, path, limits)
    checkpoint = _open_folder(directory, path, prefer, limits)
    checkpoint.notes[:0] = notes
    files = checkpoint.files.items()
    if any(f.path.parent.name == "blobs" and not (path / name).is_symlink() for name, f in files):
        checkpoint.notes.append("links of the Hub's cache that had been copied as texts were followed")
    return checkpoint


def _open_folder(folder: Folder, path: Path, prefer: Prefer | None, limits: Limits) -> Checkpoint:
    try:
        names = folder.names()
        if not any(map(is_weights, names)) and (whole := _open_pieces(folder, path, limits)) is not None:
            return whole
        ranks = None if prefer == "hf" else _rank_folders(folder, path)
        if ranks is not None:
            return _open_ranks(folder, ranks, path, limits)
        found = _indexed(folder, names) or locate(
            names,
            file=folder.label,
            prefer=prefer,
            checklist=lambda within: _checklist(folder, within),
            state=lambda within: _state(folder, within),
            listed=lambda index: _listed(folder, names, index),
        )
        if found is None and prefer == "hf" and (ranks := _rank_folders(folder, path)) is not None:
            return _open_ranks(folder, ranks, path, limits)  # a wish: nothing else is there
        if found is None:
            fail_all(p for i in INDEXES for p in _lost(i, _listed(folder, names, i), names))
        if found is None and (states := _open_states(folder, path, limits)) is not None:
            return states
        if found is None:
            from ckpt_tool.checkpoint.no_weights import around_of, refuse

            refuse(folder.survey(), around_of(folder, path), newest(_state(folder)))
        within, chosen = found
        return _open_set(folder, chosen, path, limits, within)
    except BaseException:
        folder.close()
        raise


def _listed(folder: Folder, names: Collection[str], index: str) -> list[str]:
    """The files that `index` lists; none where it is not there."""
    if index not in names:
        return []
    return read_index(folder.document(index).read(INDEX_BYTES), name=index).files()


def _with_inner(folder: Folder, names: Collection[str], listed: Iterable[str], index: str) -> Collection[str]:
    """`names` with those in the folders that an index lists files of. Kind `bad-index` for a folder that is a
    link, which may lead anywhere."""
    inner = {f.rpartition("/")[0] for f in listed if "/" in f}
    if not inner:
        return names
    parts = {part for path in inner for part in path.split("/")}
    found = folder.below(parts.__contains__)
    for path in sorted(inner & {f.rpartition("/")[0] for f in found}):  # an index may list millions
        if any(map(folder.is_link, (path, path.partition("/")[0]))):
            fail("bad-index", f"expected a folder {path}, found a link", file=index, hint=NO_LINK)
    return [*names, *found]


def _lost(index: str, listed: Collection[str], names: Collection[str]) -> Iterator[Problem]:
    """Those of the files that `index` lists that are not there: the first ones, and how many more."""
    there = frozenset(names)
    lost = [name for name in listed if name not in there]
    for name in lost[:SHOWN_LOST]:
        yield Problem("bad-index", f"expected {name}, found no such file", index, hint=FETCH_IT)
    if (left := len(lost) - SHOWN_LOST) > 0:
        yield Problem("bad-index", f"expected {left} more files, found none of them", index, hint=FETCH_IT)


def _indexed(folder: Folder, names: Collection[str], name: str | None = None) -> tuple[str, WeightSet] | None:
    """As `locate`: the files that an index lists, `name` among them, where none is called as weights usually
    are. Kind `bad-index` where some of them are not there: the rest is no model."""
    if name is None and any(is_weights(n.removeprefix(ORIGINAL_FOLDER)) for n in names):
        return None
    for index in INDEXES:
        try:
            listed = _listed(folder, names, index)
            names = _with_inner(folder, names, listed, index) if name is None else names
        except CkptToolError as error:
            if name is None or error.kind != "bad-index" or _mentions(folder, index, name):
                raise
            continue  # of another model, whatever it should say
        if name in listed or (name is None and not {*listed}.isdisjoint(names)):
            fail_all(_lost(index, listed, names))
        if listed and {*listed} <= {*names} and (name is None or name in listed):
            found = WeightSet(
                f"the files of {index}", tuple(listed), index, "hf", tuple(adapter_notes(names))
            )
            check_finished(found, names, file=folder.label)
            return "", found
    return None


def _mentions(folder: Folder, index: str, name: str) -> bool:
    """Whether an index that cannot be read has the name of a file in it."""
    return name.encode() in folder.document(index).read(INDEX_BYTES)


def _open_pieces(folder: Folder, path: Path, limits: Limits) -> OpenedCheckpoint | None:
    """A folder in which no file holds whole tensors: a checkpoint of torch.distributed, or slices; None for
    another."""
    if (there := find_dcp(folder)) is not None:
        within, notes = there
        file: TensorFile = (saved := open_dcp_folder(folder, within))
        odd = saved.left_out
    elif (apart := slice_files(folder)) is not None:
        within, slices, notes = apart
        file = joined = open_slices(lambda n: folder.place(within + n), slices, limits.safetensors_header)
        odd = joined.left_out
    else:
        return None
    around = outers(folder, path.resolve().name)
    return _opened_pieces(folder, within, file, notes, path, limits, around, odd)


def _opened_pieces(
    folder: Folder,
    within: str,
    file: TensorFile,
    notes: list[str],
    path: Path,
    limits: Limits,
    around: list[Folder],
    odd: Collection[LeftOut] = (),
) -> OpenedCheckpoint:
    """The `file` that the part `within` of `folder` was read as, with what belongs to it, also in the folders
    `around`."""
    try:
        documents = documents_of_pieces(folder, within, around, notes)
        own = _unwrapped({file.name: file}, path, limits)
    except BaseException:
        file.close()
        raise
    notes += file.notes
    left_out = (*own.left_out, *(o.after(own.before) for o in odd))
    return OpenedCheckpoint(path, own.files, documents, notes, tuple(own.readings), left_out, folder=folder)


def _open_states(
    folder: Folder, path: Path, limits: Limits, *, masters: bool = False
) -> OpenedCheckpoint | None:
    """The model that DeepSpeed keeps in one file, or in those of all ranks; with `masters` its weights in
    float32 where it has both. What belongs to it may lie in the folder above."""
    inside = folder.names()
    latest = folder.document(LATEST).read(1024).decode("utf-8", "replace").strip() if LATEST in inside else ""
    paths = [*inside, *folder.below(lambda n: may_be_step(n) or n == latest, 1)]
    found = find_states(paths, label=folder.label, latest=latest, masters=masters)
    if found is None:
        return None
    if isinstance(found, Shares):
        return _open_shares(folder, found, path, limits)
    within, chosen = found
    checkpoint = _open_set(folder, chosen, path, limits, within)
    for file in checkpoint.files.values():
        check_one_rank(file.metadata, file=file.name)
    outer = folder if within else folder.outer()
    if outer is not None and (within or LATEST in outer.names()):
        beside = [n for n in outer.names() if belongs(n) and n not in checkpoint.documents]
        checkpoint.documents |= {n: outer.document(n) for n in beside}
    return checkpoint


def _open_shares(folder: Folder, shares: Shares, path: Path, limits: Limits) -> OpenedCheckpoint:
    from ckpt_tool.checkpoint.zero import open_zero

    notes = [*shares.notes, *([f"the weights were found in {shares.within}"] if shares.within else [])]
    outer = None if shares.within else folder.outer()
    around = [outer] if outer is not None and LATEST in outer.names() else []
    file = open_zero(folder.place, shares)
    return _opened_pieces(folder, shares.within, file, notes, path, limits, around, file.left_out)


def _unwrapped(files: dict[str, TensorFile], path: Path, limits: Limits) -> Unwrapped:
    """The files without what training programs put around a model, unless they are wanted as they stand."""
    from ckpt_tool.checkpoint.megatron_legacy import named_as_core
    from ckpt_tool.checkpoint.wrapping import unwrapped

    if limits.as_it_stands:
        return Unwrapped(files)
    own = unwrapped(files, label=path.name)
    own.files, notes = named_as_core(own.files)
    own.readings += notes
    return own


def _rank_folders(folder: Folder, path: Path) -> RankFolders | None:
    """Megatron's rank folders in `folder`, unless there are other weights beside them."""
    names = [*folder.names(), *folder.below(may_hold_ranks)]
    if any(is_weights(n) for n in names if "/" not in n):
        return None
    if not any(is_weights(n.rpartition("/")[2]) for n in names) and any(map(is_of_megatron, names)):
        from ckpt_tool.checkpoint.no_weights import around_of, refuse, tells

        around = around_of(folder, path)
        if tells(paths := folder.survey(), around):
            refuse(paths, around)

    def tracker(prefix: str) -> str | None:
        name = prefix + TRACKER
        return folder.document(name).read(1024).decode("ascii", "replace") if name in names else None

    return find_ranks(names, label=folder.label, tracker=tracker)


def _around_rank(directory: Directory) -> tuple[Folder, RankFolders] | None:
    """The folder around `directory` and its rank folders, if `directory` is one of them."""
    absolute = Path(os.path.abspath(directory.path))
    outer = Directory(absolute.parent)
    if not is_rank_folder(absolute.name):
        return None
    inside = [n for n in outer.below(is_rank_folder, 1) if is_weights(n.rpartition("/")[2])]
    found = find_ranks(inside, label=outer.label, tracker=lambda _: None)
    if found is not None and len(found.files) > 1:
        note = f"{absolute.name} is one of {len(found.files)} ranks; all were opened"
        found = replace(found, notes=(*found.notes, note))
    return None if found is None else (outer, found)


def _open_ranks(folder: Folder, ranks: RankFolders, path: Path, limits: Limits) -> Checkpoint:
    chosen = WeightSet("mp_rank_*", ranks.files, None, "original", ranks.notes)
    checkpoint = _open_set(folder, chosen, path, limits)
    beside = [*folder.names(), *folder.below(may_hold_ranks)]
    outer = folder.outer()
    if (
        isinstance(folder, Directory)
        and outer is not None
        and is_iteration_folder(folder.path.resolve().name)
    ):
        add_documents(checkpoint, outer, [n for n in outer.names() if vocabulary_kind(n)])
    add_documents(checkpoint, folder, sorted(beside, key=lambda n: n.count("/")))
    add_run_documents(checkpoint.documents, folder, "/".join([*ranks.files[0].split("/")[:-2], ""]))
    return checkpoint


def _open_set(
    folder: Folder,
    chosen: WeightSet,
    path: Path,
    limits: Limits,
    within: str = "",
    seen: _Seen | None = None,
) -> OpenedCheckpoint:
    """Open the files of `chosen`, which lie in the part `within` of `folder`, and what belongs to them.
    `seen` is the only file, where that was looked into already."""
    if chosen.files[0].endswith(".index"):
        return _open_bundle(folder, chosen, path, limits, within)
    notes = list(chosen.notes)
    if within:
        notes.append(f"the weights were found in {within}")
    documents = documents_of(folder, within, chosen.origin == "original", notes)
    index = None
    problems: list[Problem] = []
    if chosen.index is not None:
        index = read_index(documents[chosen.index].read(INDEX_BYTES), name=chosen.index)
        problems += _lost(chosen.index, listed := index.files(), chosen.files)
        for stray in [name for name in chosen.files if name not in listed]:
            message = f"expected only listed files, found {stray} too"
            problems.append(Problem("bad-index", message, chosen.index, hint=STRAY))
    files: dict[str, TensorFile] = {}
    try:
        for name in chosen.files:
            try:
                files[name] = _open_file(folder.place(within + name), name, limits, seen)
            except CkptToolError as error:
                problems.extend(error.problems)
        if not problems:
            agreed = index is not None and index.agrees(files)
            if index is not None and not agreed and "config.json" in documents:
                index = replace(index, tied=ties(documents["config.json"].read()))
            problems.extend(_across(files, chosen, index, agreed))
        fail_all(problems)
        readings = [] if index is None else list(index.notes(files, agreed=agreed))
        own = _unwrapped(files, path, limits)
        if MODEL_CONFIG in documents:
            add_run_documents(documents, folder, within)
    except BaseException as error:
        try:
            if isinstance(error, CkptToolError):
                Checkpoint(path, files).check_whole({})
        finally:
            for file in files.values():
                file.close()
        raise
    for file in files.values():
        notes.extend(f"{file.name}: {note}" for note in file.notes)
    readings += own.readings
    others = (t for f in files.values() for t in f.others.values())
    named = (replace(t, name=t.name.removeprefix(own.before)) for t in others)
    odd = (LeftOut(t, f"of type {t.dtype}, which is not converted") for t in named)
    left_out = (*own.left_out, *odd)
    return OpenedCheckpoint(path, own.files, documents, notes, tuple(readings), left_out, folder=folder)


def _open_bundle(
    folder: Folder, chosen: WeightSet, path: Path, limits: Limits, within: str = ""
) -> OpenedCheckpoint:
    """Open a bundle of TensorFlow, whose names are those of variables."""
    from ckpt_tool.checkpoint.tf_bundle import open_bundle

    notes = [*chosen.notes, *([f"the weights were found in {within}"] if within else ())]
    documents = documents_of(folder, within, True, notes)
    prefix = chosen.files[0].removesuffix(".index")
    found = open_bundle(folder, prefix, within=within, as_it_stands=limits.as_it_stands)
    own = (tuple(found.readings), tuple(found.left_out))
    return OpenedCheckpoint(path, found.files, documents, [*notes, *found.notes], *own, folder=folder)


@dataclass(frozen=True)
class _Seen:
    """A file that was looked into: its container format, "torch-zip" for a zip that torch wrote, the open
    file, and the directory of a zip."""

    format: str
    data: ByteRange
    archive: ZipArchive | None = None


def _look(place: Place, name: str) -> _Seen:
    data = ByteRange(place.path, name, place.window)
    try:
        format: str = sniff(data)
        if format != "zip":
            return _Seen(format, data)
        from ckpt_tool.checkpoint.zip_reader import ZipArchive

        archive = ZipArchive(data)
        return _Seen("torch-zip" if check_zip_names(archive.members, name) else format, data, archive)
    except BaseException:
        data.close()
        raise


def _open_file(place: Place, name: str, limits: Limits, seen: _Seen | None = None) -> TensorFile:
    seen = seen or _look(place, name)
    if seen.format == "torch-zip" and seen.archive is not None:  # the only one with checksums of its own
        from ckpt_tool.checkpoint.torch_zip import torch_zip

        return torch_zip(seen.archive)
    seen.data.close()
    if not limits.late or isinstance(place.path, RemotePath):
        place.check(())
        return _open_plain(place, name, limits, seen.format)
    try:
        file = _open_plain(place, name, limits, seen.format)
    except CkptToolError:
        place.check(())
        raise
    file.check = place.check
    return file


def _open_plain(place: Place, name: str, limits: Limits, format: str) -> TensorFile:
    """Of those without checksums of their own."""
    match format:
        case "torch-legacy":
            from ckpt_tool.checkpoint.torch_legacy import open_torch_legacy

            return open_torch_legacy(place.path, name, window=place.window)
        case "safetensors":
            return open_safetensors(
                place.path, name, window=place.window, header_limit=limits.safetensors_header
            )
        case _:
            found = {"tar": "a tar", "tar.gz": "a gzip file", "zip": "a zip of other files"}[format]
            fail("wrong-format", f"expected a torch or safetensors file, found {found}", file=name)


def _across(
    files: dict[str, TensorFile], chosen: WeightSet, index: WeightIndex | None, agreed: bool
) -> Iterable[Problem]:
    """What the opened files say against each other, and against being whole; `agreed`: the index agrees."""
    for name, file in files.items():
        if (cut := is_slice(file)) is not None:
            message = "expected whole tensors, found a slice that torch.distributed wrote"
            hint = "give the folder with the slices of all ranks, under the names that they were written with"
            yield Problem("wrong-format", message, name, cut, hint)
    if index is not None:
        yield from () if agreed else index.problems(files)
    elif "-of-" in chosen.label:  # whole tensors, spread over files; model-parallel shards repeat names
        owner: dict[str, str] = {}
        for name, file in files.items():
            for tensor in file.tensors:
                first = owner.setdefault(tensor, name)
                if first != name:
                    message = f"expected the tensor in one file, found it in {first} as well"
                    yield Problem("shard-conflict", message, name, tensor, TWICE)


def _state(folder: Folder, within: str = "") -> str:
    """The text of TensorFlow's state file; nothing where there is none of a size for it."""
    name = within + STATE
    there = name in folder.names() and folder.place(name).size <= STATE_BYTES
    return folder.document(name).read(STATE_BYTES).decode("utf-8", "replace") if there else ""


def _checklist(folder: Folder, within: str = "") -> list[str]:
    """The file names that lists of the publisher's have; one too large for that is none."""
    names = folder.names()
    there = [name for n in CHECKLISTS if (name := within + n) in names]
    texts = [folder.document(n).read(LIST_BYTES) for n in there if folder.place(n).size <= LIST_BYTES]
    return [n for text in texts for n in listed(text) if "/" not in n]
