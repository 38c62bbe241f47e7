"""The stream that torch.save wrote before 1.6: five pickles, then each storage as a count and its bytes.

Order: magic number, protocol 1001, facts about the writing machine, the object, the list of storage keys;
then for each key an int64 count of elements and the elements, little-endian, without padding
(torch/serialization.py 1.5.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.byte_range import ByteRange, Window
from ckpt_tool.checkpoint.pickle_bytes import WINDOW
from ckpt_tool.checkpoint.pickle_records import Limits, Pickled, StorageRef
from ckpt_tool.checkpoint.signs import LEGACY_MAGIC, is_legacy
from ckpt_tool.checkpoint.torch_file import TorchFile, storage_bytes
from ckpt_tool.checkpoint.torch_state import State, read_state, unsafe_problems
from ckpt_tool.checkpoint.unpickle import Machine
from ckpt_tool.errors import CkptToolError, Problem, fail

_PROTOCOL = 1001
_FIRST_READ = 64 << 10
_ITEMSIZES = {d.torch: d.itemsize for d in DTYPES.values()} | {
    **{"complex64": 8, "complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4},
}


class TorchLegacyFile(TorchFile):
    """A legacy torch file, opened. It has no checksums."""

    format = "torch-legacy"

    def __init__(self, data: ByteRange, state: State, offsets: Mapping[str, int]) -> None:
        super().__init__(data, state)
        self._offsets = offsets

    def _storage(self, key: str) -> tuple[ByteRange, int]:
        return self._bytes, self._offsets[key]


def open_torch_legacy(path: Path, name: str, *, window: Window | None = None) -> TorchLegacyFile:
    """Open `path`, or the part `window` of it, reading pickles and counts only; `name` is how it is called.

    Kinds: those of `read_pickle` and `read_state`, and `wrong-format`, `unsupported-byteorder`, `truncated`,
    `trailing-data`, `size-mismatch`, `missing-record`.
    """
    data = ByteRange(path, name, window)
    try:
        pickled, keys, at = _read_pickles(data)
        state = read_state(pickled, file=name)
        return TorchLegacyFile(data, state, _lay_out(data, at, keys, pickled.storages))
    except BaseException:
        data.close()
        raise


def legacy_imports(path: Path, name: str, *, window: Window | None = None) -> tuple[str, ...]:
    """Every global that the file's pickles name, also where a pickle itself would be refused."""
    data = ByteRange(path, name, window)
    try:
        at = _read_head(data)
        return _machine(data, at).scan()
    finally:
        data.close()


def _read_head(data: ByteRange) -> int:
    """Check the three pickles before the object; the offset after them."""
    file = data.name
    if not is_legacy(data.head(32)):
        found = repr(data.head(16))
        if data.size > 262 and data.read(257, 5) == b"ustar":
            found = "a tar archive, as torch wrote before 0.1.10"
        fail("wrong-format", f"expected the magic number of a legacy torch file, found {found}", file=file)
    magic, at = _pickle_at(data, 0, Limits(integer_bits=80))
    protocol, at = _pickle_at(data, at)
    machine, at = _pickle_at(data, at)
    if magic.value != LEGACY_MAGIC or protocol.value != _PROTOCOL:
        fail(
            "wrong-format", f"expected protocol {_PROTOCOL} of a legacy torch file, found another", file=file
        )
    facts = machine.value
    if type(facts) is not dict or type(facts.get("little_endian")) is not bool:
        fail("bad-pickle", "expected the byte order of the writing machine, found none", file=file)
    if not facts["little_endian"]:
        fail("unsupported-byteorder", "expected a little-endian file, found a big-endian one", file=file)
    return at


def _read_pickles(data: ByteRange) -> tuple[Pickled, list[str], int]:
    """The object, the keys of the storages that follow, and the offset of the first of those."""
    pickled, at = _pickle_at(data, _read_head(data))
    listed, at = _pickle_at(data, at)
    keys = listed.value
    if type(keys) is not list or not all(type(k) is str for k in keys):
        fail("bad-pickle", "expected a list of storage keys, found something else", file=data.name)
    return pickled, keys, at


def _machine(data: ByteRange, at: int, limits: Limits | None = None) -> Machine:
    """How long the pickle at byte `at` is shows only by reading it, so a short piece is tried first."""

    def feed(offset: int, most: int = WINDOW) -> bytes:
        return data.read(offset, min(most, data.size - offset))

    return Machine(
        feed(at, _FIRST_READ),
        file=data.name,
        limits=limits or Limits(),
        base=at,
        end=data.size,
        feed=feed,
        cut="truncated",
    )


def _pickle_at(data: ByteRange, at: int, limits: Limits | None = None) -> tuple[Pickled, int]:
    """The pickle at byte `at` and the byte after it."""
    machine = _machine(data, at, limits)
    try:
        pickled = machine.run()
    except CkptToolError as error:
        raise CkptToolError(*unsafe_problems(machine, data.name), *error.problems) from None
    return pickled, at + pickled.end


def _lay_out(data: ByteRange, at: int, keys: list[str], storages: Mapping[str, StorageRef]) -> dict[str, int]:
    """The offset of each storage's bytes; the last must end with the file."""
    file = data.name
    offsets: dict[str, int] = {}
    for key in keys:
        ref = storages.get(key)
        size = None if ref is None else storage_bytes(ref, _ITEMSIZES)
        if ref is None or size is None:
            fail(
                "bad-pickle",
                f"expected a storage that a tensor uses, found key {key!r} in the list",
                file=file,
            )
        if key in offsets:
            fail("bad-pickle", f"expected each storage once, found key {key!r} twice in the list", file=file)
        if at + 8 > data.size:
            fail("truncated", f"expected storage {key} at byte {at}, found the end of the file", file=file)
        count = int.from_bytes(data.read(at, 8), "little", signed=True)
        if count != ref.numel:
            fail(
                "size-mismatch",
                f"expected {ref.numel} elements in storage {key}, found a count of {count}",
                file=file,
            )
        offsets[key] = at + 8
        at += 8 + size
        if at > data.size:
            message = f"expected {size} bytes in storage {key}, found {at - data.size} less in the file"
            fail("truncated", message, file=file)
    if at != data.size:
        fail(
            "trailing-data",
            f"expected the end of the file at byte {at}, found {data.size - at} more bytes",
            file=file,
        )
    missing = [
        Problem("missing-record", f"expected storage {k}, found it in no list", file)
        for k in storages
        if k not in offsets
    ]
    if missing:
        raise CkptToolError(*missing)
    return offsets
