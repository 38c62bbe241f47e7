"""The nouns of reading: a tensor known by its header, one opened container file, a whole checkpoint.

Opening reads headers only. Bytes are asked for by range: `read_into(name, offset, buffer)` fills the
buffer with the tensor's dense row-major little-endian bytes from `offset` on, whatever strides,
storage offset or archive the file holds it in. Memory is the caller's buffer and nothing else.
"""

from __future__ import annotations

import io
import marshal
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import lru_cache
from itertools import chain, repeat
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ckpt_tool.checkpoint.signs import stand_in
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all, near, printable
from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    import numpy as np

    from ckpt_tool.checkpoint.tensor import Tensor


@dataclass(frozen=True)
class DType:
    """An element type: its safetensors name, bytes per element, and the numpy type that holds the
    bits (`bits` moves them; `value` computes with them, None where numpy has no such number)."""

    name: str
    itemsize: int
    bits: str
    value: str | None
    torch: str


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("F64", 8, "<u8", "<f8", "float64"),
        DType("F32", 4, "<u4", "<f4", "float32"),
        DType("F16", 2, "<u2", "<f2", "float16"),
        DType("BF16", 2, "<u2", None, "bfloat16"),
        DType("F8_E4M3", 1, "u1", None, "float8_e4m3fn"),
        DType("F8_E5M2", 1, "u1", None, "float8_e5m2"),
        DType("F8_E8M0", 1, "u1", None, "float8_e8m0fnu"),  # a power of two: scales of codes
        DType("I64", 8, "<u8", "<i8", "int64"),
        DType("I32", 4, "<u4", "<i4", "int32"),
        DType("I16", 2, "<u2", "<i2", "int16"),
        DType("I8", 1, "u1", "i1", "int8"),
        DType("U64", 8, "<u8", "<u8", "uint64"),
        DType("U32", 4, "<u4", "<u4", "uint32"),
        DType("U16", 2, "<u2", "<u2", "uint16"),
        DType("U8", 1, "u1", "u1", "uint8"),
        DType("BOOL", 1, "u1", "?", "bool"),
    )
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its header tells it; `file` is the container's name inside the checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return _bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class OtherTensor(TensorInfo):
    """A tensor of a type that is not moved as numbers; `dtype` is the writing library's name of the type,
    `stored` the bytes it takes in the files."""

    stored: int = 0

    @property
    def nbytes(self) -> int:
        return self.stored


def tensor_infos(
    names: Collection[str], dtypes: Iterable[str], shapes: Iterable[tuple[int, ...]], files: Iterable[str]
) -> tuple[TensorInfo, ...]:
    """Many, made a field at a time: half a million take two thirds of what they cost one by
    one."""
    made = tuple(map(object.__new__, repeat(TensorInfo, len(names))))
    fields = ("name", names), ("dtype", dtypes), ("shape", shapes), ("file", files)
    for slot, values in fields:
        deque(map(getattr(TensorInfo, slot).__set__, made, values), maxlen=0)
    return made


@lru_cache(maxsize=1024)  # layers are alike
def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * DTYPES[dtype].itemsize


@dataclass(frozen=True)
class Fingerprint:
    """Tells whether a file is still the one that was opened.

    The time of the last change of its inode counts too, as a program can set the time of the last write back,
    not that one. It also moves with one more link, another mode or another owner, which are no writes: where
    one of those changed as well it says nothing."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int = 0
    kept_as: tuple[int, ...] = ()  # links, mode, owner and group

    @classmethod
    def of(cls, descriptor: int) -> Fingerprint:
        s = os.fstat(descriptor)
        kept_as = s.st_nlink, s.st_mode, s.st_uid, s.st_gid
        return cls(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, kept_as)

    def still(self, now: Fingerprint) -> bool:
        """Whether nothing was written since, if it is `now` that."""
        written = now.ctime_ns != self.ctime_ns and now.kept_as == self.kept_as
        mine = self.device, self.inode, self.size, self.mtime_ns
        return mine == (now.device, now.inode, now.size, now.mtime_ns) and not written


class Record(NamedTuple):
    """A run of file bytes that carries a checksum of its own (a member of a torch zip, say).

    `crc32` is None where the file does not say; such bytes are reported as unchecked, unless it carries a
    `crc32c` (the CRC of Castagnoli's polynomial) instead. `of` is the one tensor that the record is or is a
    part of: it is not looked at where that tensor is not read."""

    key: str
    offset: int
    size: int
    crc32: int | None
    crc32c: int | None = None
    of: str | None = None


Known = tuple[int, int, int]  # first byte in the file, bytes, their CRC-32
# Compares the checksum that an archive has of a file in it, reading what is not known. Fails with `checksum`.
Check = Callable[[Iterable[Known]], object]


class TensorFile(ABC):
    """One container file, opened: a mapping of tensor names to `TensorInfo`, headers already read."""

    path: Path
    name: str  # within the checkpoint, e.g. "consolidated.00.pth"
    format: str  # "torch-zip", "torch-legacy", "safetensors", "tf-bundle"
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]  # what is not a tensor: pickled args, safetensors __metadata__
    imports: tuple[str, ...] = ()  # globals that a pickle named, "module.name"; none was imported
    notes: tuple[str, ...] = ()
    check: Check | None = None  # what opening left for later
    others: Mapping[str, OtherTensor] = {}  # of types that are not moved: no tensors of a model
    may_lack = False  # whether files that are not there may hold some of its tensors, see `absent`

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that are read: `path`, and those with the bytes where it only lists them."""
        return (self.path,)

    @abstractmethod
    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the dense bytes of tensor `name` starting at byte `offset`. Thread-safe."""

    def read_whole(self, tensors: Sequence[tuple[str, memoryview]]) -> None:
        """Fill each buffer with all bytes of the tensor beside it; small neighbours in one call where they
        lie in one file. Thread-safe."""
        for name, buffer in tensors:
            self.read_into(name, 0, buffer)

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """These (tensor, first byte, bytes) will be read soon: files that are not on this machine begin to
        fetch them."""
        return None

    def absent(self, name: str) -> str | None:
        """The file that is not there and holds bytes of tensor `name`, None where all are there."""
        return None

    @abstractmethod
    def extent(self, name: str) -> tuple[int, int] | None:
        """(file descriptor, file offset) where the dense bytes of `name` lie in one plain run, else
        None (strided views, say)."""

    def records(self, of: Container[str] | None = None) -> Mapping[str, Record]:
        """Checksummed runs by key; empty where the format has none. With `of`, those of other tensors alone
        need not be there."""
        return {}

    def told(self) -> Iterator[object]:
        """What the headers say beside the tensors: the records with their checksums."""
        for key, r in self.records().items():
            yield (key, r.size, r.crc32) if r.crc32c is None else (key, r.size, r.crc32c)

    def record_of(self, name: str) -> tuple[str, int] | None:
        """(record key, first byte in the record) of a tensor that is one run of a record, else None."""
        return None

    def check_record(self, key: str) -> bool:
        """Read a record through and compare its checksum: fails with `checksum` where it differs; False where
        the file has none. For records whose bytes are not copied in order."""
        raise KeyError(key)

    def check_whole(self, crcs: Mapping[str, int]) -> None:
        """What opening left for later (`Limits.late`): compare the checksum of all the file's bytes. `crcs`
        are the CRC-32s of tensors that were read whole, which are not read again."""
        check, self.check = self.check, None
        if check is not None:
            places = ((self.extent(name), self.tensors[name].nbytes, crc) for name, crc in crcs.items())
            check([(place[1], size, crc) for place, size, crc in places if place is not None])

    @abstractmethod
    def check_unchanged(self) -> None:
        """Fail with `input-changed` if the file is not the one that was opened."""

    @abstractmethod
    def close(self) -> None: ...


KEPT_JSON = 64 << 10  # bytes of a document whose values are kept while it is open


@dataclass(frozen=True)
class Document:
    """A small file beside the weights (params.json, config.json, tokenizer.model); not read yet."""

    name: str
    path: Path
    size: int
    # What `json` found first: the values in few bytes, or why there are none.
    _parsed: bytes | tuple[Problem, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def json(self) -> dict[str, Any]:
        """The document parsed by the strict JSON reader; must hold an object, a new one each time. Many ask
        for the same few values until a family is recognised and planned: the file is read for the first of
        them, and for all where it is large."""
        from ckpt_tool.checkpoint.strict_json import parse_object

        if isinstance(self._parsed, bytes):
            found: dict[str, Any] = marshal.loads(self._parsed)
            return found
        if self._parsed is not None:
            raise CkptToolError(*self._parsed)
        data = self.read()
        try:
            found = parse_object(data, file=self.name)
        except CkptToolError as error:
            object.__setattr__(self, "_parsed", error.problems)
            raise
        if len(data) <= KEPT_JSON:
            object.__setattr__(self, "_parsed", marshal.dumps(found))
        return found

    def read(self, limit: int = 16 << 20) -> bytes:
        """The bytes; refuses a file larger than `limit` before reading any of it."""
        if self.size > limit:
            fail("bad-config", f"expected at most {limit} bytes, found {self.size}", file=self.name)
        try:
            with open(self.path, "rb") as f:
                data = f.read(limit + 1)
        except OSError as error:
            fail("read-failed", f"cannot be read: {error.strerror}", file=self.name)
        if len(data) > limit:
            fail("bad-config", f"expected at most {limit} bytes, found more", file=self.name)
        self.refuse_stand_in(data)
        return data

    def refuse_stand_in(self, data: bytes) -> None:
        """Fail with `wrong-format` where `data`, which was read of it, is something else in its place."""
        if (sign := stand_in(data, self.name)) is not None:
            fail("wrong-format", f"expected a document, found {sign.what}", file=self.name, hint=sign.hint)

    def open(self) -> BinaryIO:
        """The document, for reading as much of it as is wanted at a time; may raise OSError."""
        return open(self.path, "rb")

    def sha256(self, limit: int) -> str:
        """Of all its bytes, which are read a few at a time; refuses what `read` refuses for its size."""
        if self.size > limit:
            fail("bad-config", f"expected at most {limit} bytes, found {self.size}", file=self.name)
        import hashlib  # and with it OpenSSL, 2 ms: for who asks for a digest

        digest = hashlib.sha256()
        try:
            with self.open() as f:
                while piece := f.read(1 << 20):
                    digest.update(piece)
        except OSError as error:
            fail("read-failed", f"cannot be read: {error.strerror}", file=self.name)
        return digest.hexdigest()


@dataclass(frozen=True)
class Given(Document):
    """A document that lies beside the weights nowhere: what a user says stands in its place."""

    content: bytes = b""

    def read(self, limit: int = 16 << 20) -> bytes:
        return self.content

    def open(self) -> BinaryIO:
        return io.BytesIO(self.content)


class View(TensorFile):
    """A file seen with other tensors than it has: all but these is the `stored` file's own."""

    def __init__(self, stored: TensorFile) -> None:
        self.path, self.name, self.format = stored.path, stored.name, stored.format
        self.metadata, self.imports, self.notes = stored.metadata, stored.imports, stored.notes
        self.stored = stored
        self.may_lack = stored.may_lack

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.stored.paths

    def records(self, of: Container[str] | None = None) -> Mapping[str, Record]:
        return self.stored.records(of)

    def told(self) -> Iterator[object]:
        return self.stored.told()

    def check_record(self, key: str) -> bool:
        return self.stored.check_record(key)

    def check_whole(self, crcs: Mapping[str, int]) -> None:
        self.stored.check_whole({})

    def check_unchanged(self) -> None:
        self.stored.check_unchanged()

    def close(self) -> None:
        self.stored.close()


def stored(file: TensorFile) -> TensorFile:
    """The opened file that is seen through views."""
    while isinstance(file, View):
        file = file.stored
    return file


class Renamed(View):
    """A view of a file whose tensors have other names, or of a part of them: `own` gives for each name here
    that in the file."""

    def __init__(self, stored: TensorFile, own: Mapping[str, str]) -> None:
        super().__init__(stored)
        self.own = own
        held = list(map(stored.tensors.__getitem__, own.values()))
        fields = ([getattr(t, name) for t in held] for name in ("dtype", "shape", "file"))
        self.tensors = dict(zip(own, tensor_infos(own, *fields), strict=True))

    def absent(self, name: str) -> str | None:
        return self.stored.absent(self.own[name])

    def records(self, of: Container[str] | None = None) -> Mapping[str, Record]:
        new = {old: new for new, old in self.own.items()}
        wanted = None if of is None else {old for name, old in self.own.items() if name in of}
        return {
            key: r if r.of is None else r._replace(of=new.get(r.of, r.of))
            for key, r in self.stored.records(wanted).items()
        }

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.stored.read_into(self.own[name], offset, buffer)

    def check_whole(self, crcs: Mapping[str, int]) -> None:
        self.stored.check_whole({self.own[name]: crc for name, crc in crcs.items()})

    def read_whole(self, tensors: Sequence[tuple[str, memoryview]]) -> None:
        self.stored.read_whole([(self.own[name], buffer) for name, buffer in tensors])

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        self.stored.expect((self.own[name], offset, size) for name, offset, size in ranges)

    def extent(self, name: str) -> tuple[int, int] | None:
        return self.stored.extent(self.own[name])

    def record_of(self, name: str) -> tuple[str, int] | None:
        return self.stored.record_of(self.own[name])


@dataclass(frozen=True)
class LeftOut:
    """A tensor that stands beside the model and is none of its tensors, and what it is."""

    tensor: TensorInfo
    reason: str

    def after(self, before: str) -> LeftOut:
        """One of a type that is not moved, which the model may want, without what stands before its names."""
        if not isinstance(self.tensor, OtherTensor):
            return self
        return replace(self, tensor=replace(self.tensor, name=self.tensor.name.removeprefix(before)))


@dataclass
class Unwrapped:
    """Files with the model's own names, and what was done to come there."""

    files: dict[str, TensorFile]
    before: str = ""  # what stood before every name
    readings: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


AVERAGE = "an average of the weights; the weights were taken"  # of what stands beside a model
SHOWN_NOTES = 10  # of opening, before the rest is counted


@dataclass
class Checkpoint:
    """A checkpoint as opened: its container files in natural order, and the documents beside them.

    The same tensor name may stand in several files (model-parallel ranks); `find` lists them all. `readings`
    say what was read otherwise than it stands, for everybody who reads the model to repeat; `left_out` are
    tensors of training that are in the files and not among those of the model.
    """

    path: Path
    files: dict[str, TensorFile]
    documents: dict[str, Document] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    readings: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    # What `names` said last, and of which tensors.
    _named: tuple[list[Mapping[str, TensorInfo]], list[str]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def with_files(self, files: dict[str, TensorFile], *notes: str) -> Checkpoint:
        """The same checkpoint through views of its files."""
        return replace(self, files=files, notes=[*self.notes, *notes])

    def renamed(self, moved: Mapping[str, str], *readings: str) -> Checkpoint:
        """The same checkpoint through views of the files that hold one of the tensors `moved` has, under the
        names that it has for them."""
        files = {
            label: Renamed(file, {moved.get(n, n): n for n in file.tensors})
            if moved.keys() & file.tensors.keys()
            else file
            for label, file in self.files.items()
        }
        return replace(self, files=files, readings=(*self.readings, *readings))

    def __iter__(self) -> Iterator[TensorInfo]:
        for file in self.files.values():
            yield from file.tensors.values()

    def names(self) -> list[str]:
        """Every tensor name once, in the order of the files. Families ask again and again: it is one list for
        all of them, which nobody changes."""
        held = [f.tensors for f in self.files.values()]
        if self._named is not None and [*map(id, self._named[0])] == [*map(id, held)]:
            return self._named[1]
        found = list(held[0] if len(held) == 1 else dict.fromkeys(chain.from_iterable(held)))
        self._named = held, found
        return found

    def keys(self) -> list[str]:
        return [*self.names()]

    def __contains__(self, item: object) -> bool:
        """Whether a tensor has this name, or is this one."""
        if isinstance(item, str):
            return any(item in f.tensors for f in self.files.values())
        return any(item == t for t in self)

    def __getitem__(self, name: str | tuple[str, str]) -> Tensor:
        """The tensor called `name`, which is read when it is asked for; where several files have one, as
        ranks do, `checkpoint[name, file]` says which. Kinds: `missing-tensor`, `duplicate-tensor`."""
        from ckpt_tool.checkpoint.tensor import Tensor

        wanted, file = name if isinstance(name, tuple) else (name, None)
        found = [t for t in self.find(wanted) if file in (None, t.file)]
        if not found:
            asked = str(wanted)  # a notebook may ask for a number
            text, hint = "expected a tensor of this name, found none", near(asked, self.names())
            fail("missing-tensor", text, file=file, where=asked, hint=hint)
        if len(found) > 1:
            text = f"expected one tensor of this name, found one in each of {len(found)} files"
            hint = f"name the file, too: checkpoint[{wanted!r}, {found[0].file!r}]"
            fail("duplicate-tensor", text, where=wanted, hint=hint)
        return Tensor(self, found[0])

    def __repr__(self) -> str:
        size, count = sum(t.nbytes for t in self), sum(1 for _ in self)
        return f"<checkpoint {printable(self.path)}: {count:,} tensors, {size:,} bytes>"

    def _repr_html_(self) -> str:
        from ckpt_tool.checkpoint.listing import as_html

        return as_html(self)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame of the tensors, by header."""
        from ckpt_tool.checkpoint.frames import data_frame

        rows = [(t.name, DTYPES[t.dtype].torch, t.shape, t.numel, t.nbytes, t.file) for t in self]
        return data_frame(("name", "dtype", "shape", "elements", "bytes", "file"), rows)

    def find(self, name: str) -> list[TensorInfo]:
        """The tensors called `name`, one for each file that holds one."""
        return [f.tensors[name] for f in self.files.values() if name in f.tensors]

    def read_into(self, tensor: TensorInfo, offset: int, buffer: memoryview) -> None:
        self.files[tensor.file].read_into(tensor.name, offset, buffer)

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start:stop` of a tensor as an array of its raw bits (`DTYPES[...].bits`); a scalar
        counts as one row."""
        import numpy as np

        dtype = DTYPES[tensor.dtype]
        shape = tensor.shape or (1,)
        stop = shape[0] if stop is None else stop
        out = np.empty((stop - start, *shape[1:]), dtype=dtype.bits)
        if out.size:
            row = prod(shape[1:]) * dtype.itemsize
            self.read_into(tensor, start * row, out.data.cast("B"))
        return out.reshape(tensor.shape) if not tensor.shape else out

    def json(self, name: str) -> dict[str, Any]:
        """The document `name` parsed by the strict JSON reader; must hold an object."""
        return self.documents[name].json()

    def opened(self) -> tuple[str, ...]:
        """The notes, those that many files share once, at most `SHOWN_NOTES`; `inspect` has all."""
        told: dict[str, list[str]] = {}
        for note in self.notes:
            file, colon, text = note.partition(": ")
            whose = [file] if colon and file in self.files else []
            told.setdefault(text if whose else note, []).extend(whose)
        lines = [
            f"{files[0]}{f' and {len(files) - 1} more files' if len(files) > 1 else ''}: {text}"
            if files
            else text
            for text, files in told.items()
        ]
        left = len(lines) - SHOWN_NOTES
        more = [f"{left} more notes: see `ckpt-tool inspect`"] if left > 0 else []
        return (*lines[:SHOWN_NOTES], *more)

    def check_whole(self, crcs: Mapping[tuple[str, str], int]) -> None:
        """See `TensorFile.check_whole`; `crcs` are by file and name. Fails with all that differ."""
        left = {name: file for name, file in self.files.items() if stored(file).check is not None}
        known: dict[str, dict[str, int]] = {name: {} for name in left}
        for (of, name), crc in crcs.items() if left else ():
            if of in left:
                known[of][name] = crc
        problems: list[Problem] = []
        for name, file in left.items():
            try:
                file.check_whole(known[name])
            except CkptToolError as error:
                problems += error.problems
        fail_all(problems)

    def check_unchanged(self) -> None:
        for file in self.files.values():
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
