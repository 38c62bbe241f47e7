"""The zip files that torch.save writes since 1.6: one pickle of structure, one member for each storage."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ckpt_tool.checkpoint.base import DTYPES, Record
from ckpt_tool.checkpoint.byte_range import ByteRange, Window
from ckpt_tool.checkpoint.pickle_bytes import WINDOW
from ckpt_tool.checkpoint.pickle_records import Pickled, StorageRef, TensorRecord
from ckpt_tool.checkpoint.torch_file import TorchFile, storage_bytes
from ckpt_tool.checkpoint.torch_state import State, read_state, unsafe_problems
from ckpt_tool.checkpoint.unpickle import Machine
from ckpt_tool.checkpoint.zip_reader import Member, ZipArchive
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all, printable

PICKLE_LIMIT = 64 << 20
_ITEMSIZES = {d.torch: d.itemsize for d in DTYPES.values()}


class TorchZipFile(TorchFile):
    """A torch zip, opened. Storages that were deflated are inflated once, into an unnamed temporary file,
    when a tensor of theirs is first read."""

    format = "torch-zip"

    def __init__(self, archive: ZipArchive, root: str, state: State, members: Mapping[str, Member]) -> None:
        super().__init__(archive.source, state)
        self.notes = (*archive.notes, *self.notes)
        self.root = root
        self._archive = archive
        self._members = members
        self._spooled: dict[str, ByteRange] = {}
        self._lock = threading.Lock()
        self._inflating: dict[str, threading.Lock] = {}

    def _storage(self, key: str) -> tuple[ByteRange, int]:
        member = self._members[key]
        if member.stored:
            return self._bytes, member.data
        with self._lock:
            own = self._inflating.setdefault(key, threading.Lock())
        with own:  # each worker may inflate another
            if key not in self._spooled:
                self._spooled[key] = self._archive.spool(member)
            return self._spooled[key], 0

    def records(self, of: Container[str] | None = None) -> Mapping[str, Record]:
        """The stored storages by key; a deflated one is checked while it is inflated."""
        base = self._bytes.base
        return {k: Record(k, base + m.data, m.size, m.checksum) for k, m in self._members.items() if m.stored}

    def told(self) -> Iterator[object]:
        """As of any file, without thousands of records."""
        return ((k, m.size, m.checksum) for k, m in self._members.items() if m.stored)

    def record_of(self, name: str) -> tuple[str, int] | None:
        """(record key, first byte in the record) of a tensor that is one run of a record, else None."""
        place = self._places[name]
        return None if place.dims or not self._members[place.key].stored else (place.key, place.start)

    def check_record(self, key: str) -> bool:
        """Read a storage through and compare its checksum: fails with `checksum` where it differs; False
        where the file has none. For strided tensors, whose bytes are not copied in order."""
        self._archive.check(self._members[key])
        return self._members[key].checksum is not None

    def close(self) -> None:
        for spooled in self._spooled.values():
            spooled.close()
        super().close()


def open_torch_zip(
    path: Path, name: str, *, window: Window | None = None, lists: bool = False
) -> TorchZipFile:
    """Open `path`, or the part `window` of it, reading its structure only; `name` is how it is called, for
    `lists` see `read_state`. Kinds: those of ZipArchive and of `torch_zip`."""
    data = ByteRange(path, name, window)
    try:
        archive = ZipArchive(data)
    except BaseException:
        data.close()
        raise
    return torch_zip(archive, lists=lists)


def torch_zip(archive: ZipArchive, bare: str | None = None, *, lists: bool = False) -> TorchZipFile:
    """The torch file that the archive is, which closes it in the end, or now where it is none. With `bare`
    its pickle is a tensor and no dict, and the tensor is called that.

    Kinds: those of `read_pickle` and `read_state`, and `wrong-format`, `unsupported-byteorder`,
    `size-mismatch`, `missing-record`, `trailing-data`.
    """
    try:
        root = _root(archive)
        _check_versions(archive, root)
        pickled = _unpickle(archive, root)
        if bare is not None and type(pickled.value) is TensorRecord:
            pickled = replace(pickled, value={bare: pickled.value})
        state = read_state(pickled, file=archive.name, lists=lists)
        members = _match_storages(archive, root, state, pickled.storages)
        return TorchZipFile(archive, root, state, members)
    except BaseException:
        archive.source.close()
        raise


def zip_value(archive: ZipArchive) -> object:
    """What the pickle of a torch zip holds, as data, where that need not be tensors. Kinds: those of
    `read_pickle`."""
    root = _root(archive)
    _check_versions(archive, root)
    pickled = _unpickle(archive, root)
    fail_all(unsafe_problems(pickled, archive.name))
    return pickled.value


def zip_imports(path: Path, name: str, *, window: Window | None = None) -> tuple[str, ...]:
    """Every global that the file's pickle names, also where the pickle itself would be refused."""
    data = ByteRange(path, name, window)
    try:
        archive = ZipArchive(data)
        pickle = archive.members[f"{_root(archive)}/data.pkl"]
        return _machine(archive, pickle).scan()
    finally:
        data.close()


def _root(archive: ZipArchive) -> str:
    """The folder that all of a torch zip's members are in."""
    roots = [
        n.removesuffix("/data.pkl") for n in archive.members if n.count("/") == 1 and n.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        found = f"{len(roots)} of them" if roots else _what_else(archive)
        fail(
            "wrong-format",
            f"expected one `data.pkl` in a folder of the zip, found {found}",
            file=archive.name,
        )
    root = roots[0]
    if f"{root}/constants.pkl" in archive.members or any(
        n.startswith(f"{root}/code/") for n in archive.members
    ):
        hint = "save the module's state_dict() with torch.save"
        fail(
            "wrong-format",
            "expected a saved dict of tensors, found a TorchScript archive",
            file=archive.name,
            hint=hint,
        )
    return root


def _what_else(archive: ZipArchive) -> str:
    names = list(archive.members)
    if any(n.endswith(".npy") for n in names):
        return "a numpy archive"
    if any(n.endswith((".pt", ".pth")) for n in names):
        return "a zip of torch files"
    return f"{len(names)} other members, {printable(names[0])} first" if names else "an empty zip"


def _check_versions(archive: ZipArchive, root: str) -> None:
    order = archive.members.get(f"{root}/byteorder")
    if order is not None and (text := archive.read(order, 64)) != b"little":
        message = f"expected byteorder `little`, found {text!r}"
        fail("unsupported-byteorder", message, file=archive.name)
    version = archive.members.get(f"{root}/version") or archive.members.get(f"{root}/.data/version")
    if version is not None:
        text = archive.read(version, 64).strip()
        if not text.isdigit() or not 1 <= int(text) <= 10:
            fail(
                "wrong-format",
                f"expected a torch file version from 1 to 10, found {text!r}",
                file=archive.name,
            )


def _machine(archive: ZipArchive, pickle: Member) -> Machine:
    """The reading of a member: through a window where it is stored, else of at most PICKLE_LIMIT bytes."""
    if not pickle.stored:
        return Machine(archive.read(pickle, PICKLE_LIMIT), file=archive.name)
    for _ in archive.blocks(pickle):  # which compares the checksum at the end
        pass

    def feed(offset: int) -> bytes:
        return archive.source.read(pickle.data + offset, min(WINDOW, pickle.size - offset))

    return Machine(feed(0), file=archive.name, end=pickle.size, feed=feed)


def _unpickle(archive: ZipArchive, root: str) -> Pickled:
    pickle = archive.members[f"{root}/data.pkl"]
    machine = _machine(archive, pickle)
    try:
        pickled = machine.run()
    except CkptToolError as error:
        # What the file wanted to import matters more than where it broke.
        raise CkptToolError(*unsafe_problems(machine, archive.name), *error.problems) from None
    if pickled.end != pickle.size:
        extra = pickle.size - pickled.end
        fail(
            "trailing-data",
            f"expected the end of the pickle at byte {pickled.end}, found {extra} more bytes",
            file=archive.name,
        )
    return pickled


def _match_storages(
    archive: ZipArchive, root: str, state: State, storages: Mapping[str, StorageRef]
) -> dict[str, Member]:
    """The member of each storage, its size compared with the count of elements."""
    users: dict[str, str] = {}
    for name, tensor in state.tensors.items():
        if tensor.storage is not None:
            users.setdefault(tensor.storage.key, name)
    members: dict[str, Member] = {}
    problems: list[Problem] = []
    for key, ref in storages.items():
        where = users.get(key)
        member = archive.members.get(f"{root}/data/{key}")
        wanted = storage_bytes(ref, _ITEMSIZES)
        if member is None:
            if where is not None:
                message = f"expected a member data/{key} with its numbers, found none"
                problems.append(Problem("missing-record", message, archive.name, where))
            continue
        if wanted is not None and wanted != member.size:
            message = f"expected {wanted} bytes in data/{key} for {ref.numel} elements, found {member.size}"
            problems.append(Problem("size-mismatch", message, archive.name, where))
        members[key] = member
    fail_all(problems)
    return members
