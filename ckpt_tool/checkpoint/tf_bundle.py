"""TensorFlow's checkpoints since 2017 ("V2", tensor bundles): an index and one or more data files, read
without TensorFlow. Each data file is a `TensorFile`; a tensor in slices belongs to the file of its first one.

Opening reads the index and compares the checksums of its blocks. Those of tensors are compared while they are
read (`records`). A data file that is not there is missed only by whoever wants a tensor in it. Nothing in
these files can be executed, and the graph beside them (`.meta`) is not opened.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from typing import Any, NoReturn

from ckpt_tool.checkpoint.base import LeftOut, OtherTensor, Record, TensorFile, TensorInfo
from ckpt_tool.checkpoint.byte_range import ByteRange, Wanted
from ckpt_tool.checkpoint.crc32c import PIECE, crc32c
from ckpt_tool.checkpoint.folders import Folder
from ckpt_tool.checkpoint.pieces import Bits, Joined, Piece, tiling_fault
from ckpt_tool.checkpoint.tensor_names import name_problems
from ckpt_tool.checkpoint.tf_coding import (
    OBJECT_GRAPH,
    VARIABLE,
    by_start,
    object_path,
    slice_key,
    slice_name,
    whole_box,
)
from ckpt_tool.checkpoint.tf_entries import TYPES, Entry, Index, read_index
from ckpt_tool.checkpoint.tf_names import data_name
from ckpt_tool.checkpoint.tf_scopes import without_scopes
from ckpt_tool.errors import Problem, fail, fail_all
from ckpt_tool.records import dataclass

INDEX_LIMIT = 256 << 20  # bytes; a model of 1,100 tensors has an index of 50 kB
_STRINGS = {
    "string": "text, no numbers",
    "resource": "a handle of the program that saved it",
    "variant": "a value that only TensorFlow's own code reads",
}


@dataclass
class _Places:
    """The data files of a bundle by number, those that are there, and their names."""

    names: Sequence[str]
    there: Mapping[int, ByteRange]

    def read(self, entry: Entry, offset: int, buffer: memoryview, where: str) -> None:
        """Fill `buffer` from byte `offset` of what `entry` holds."""
        data = self.there.get(entry.shard)
        if data is None:
            self.miss(entry.shard, where)
        data.read_into(entry.offset + offset, buffer, where)

    def miss(self, shard: int, where: str) -> NoReturn:
        fail(
            "missing-shard",
            f"expected {self.names[shard]}, which holds this tensor, found no such file",
            file=self.names[shard],
            where=where,
            hint="download what is missing too",
        )


class BundleFile(TensorFile):
    """One data file of a bundle. `others` are its tensors that are no numbers, or of a type that is not
    moved; their stored bytes can be read, `index` is shared with the other data files."""

    format = "tf-bundle"

    def __init__(
        self,
        shard: int,
        index: ByteRange,
        places: _Places,
        entries: Mapping[str, Entry],
        pieces: Mapping[str, Sequence[Piece[Entry]]],
    ) -> None:
        self._shard, self._index, self._places = shard, index, places
        self._entries, self._pieces = entries, pieces
        self._joined: Joined[Entry] = Joined(
            lambda entry, first, bits: self._read(entry, first * bits.itemsize, bits)
        )
        self.name = places.names[shard]
        self.path = places.there[shard].path if shard in places.there else index.path
        self.tensors, self.others, self.metadata = {}, {}, {}
        for name, entry in entries.items():
            if (dtype := entry.dtype) is not None:
                self.tensors[name] = TensorInfo(name, dtype, entry.shape, self.name)
            else:
                kind = TYPES[entry.type][0]
                self.others[name] = OtherTensor(
                    name, kind, entry.shape, self.name, sum(e.size for e in self._runs(name))
                )
        shards = {e.shard for e in entries.values()} | {p.place.shard for own in pieces.values() for p in own}
        self.may_lack = not shards <= places.there.keys()
        self._missing = (
            {n for n in entries if any(e.shard not in places.there for e in self._runs(n))}
            if self.may_lack
            else set[str]()
        )

    tensors: dict[str, TensorInfo]
    others: dict[str, OtherTensor]

    def _runs(self, name: str) -> Sequence[Entry]:
        """Where the bytes of a tensor lie: itself, or its slices."""
        found = self._pieces.get(name)
        return (self._entries[name],) if found is None else [p.place for p in found]

    def _read(self, entry: Entry, offset: int, bits: Bits) -> None:
        self._places.read(entry, offset, bits.data.cast("B"), self.name)

    def absent(self, name: str) -> str | None:
        """The data file that is not there, of those that hold a tensor."""
        if name not in self._missing:
            return None
        entry = next(e for e in self._runs(name) if e.shard not in self._places.there)
        return self._places.names[entry.shard]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        info = self.tensors.get(name) or self.others[name]
        if offset < 0 or offset + len(buffer) > info.nbytes:
            raise ValueError(f"bytes {offset} to {offset + len(buffer)} are outside tensor {name}")
        entry = self._entries[name]
        if name not in self._pieces:
            self._places.read(entry, offset, buffer, name)
            return
        itemsize = TYPES[entry.type][2]
        bits = f"<u{itemsize}" if itemsize <= 8 else f"V{itemsize}"
        self._joined.read_into(name, entry.shape, self._pieces[name], bits, offset, buffer)

    def read_whole(self, tensors: Sequence[tuple[str, memoryview]]) -> None:
        plain: dict[int, list[Wanted]] = {}
        for name, buffer in tensors:
            entry = self._entries[name]
            if name in self._pieces or len(buffer) != entry.size or entry.shard not in self._places.there:
                self.read_into(name, 0, buffer)
            else:
                plain.setdefault(entry.shard, []).append((entry.offset, buffer, name))
        for shard, pieces in plain.items():
            self._places.there[shard].read_each(pieces)

    def extent(self, name: str) -> tuple[int, int] | None:
        entry = self._entries[name]
        data = self._places.there.get(entry.shard)
        if name in self._pieces or data is None:
            return None
        return data.descriptor, data.base + entry.offset

    def records(self, of: Container[str] | None = None) -> Mapping[str, Record]:
        """Each tensor, and each slice of one, has a checksum of its own."""
        return self._records

    @cached_property
    def _records(self) -> dict[str, Record]:
        found: dict[str, Record] = {}
        for name in self.tensors:
            if name in self._missing:
                continue
            if name not in self._pieces:
                _, _, _, offset, size, crc, _ = self._entries[name]
                found[name] = Record(name, offset, size, None, crc, name)
                continue
            for k, entry in enumerate(self._runs(name)):
                key = f"{name} {k}"
                found[key] = Record(key, entry.offset, entry.size, None, crc32c=entry.crc32c, of=name)
        return found

    def record_of(self, name: str) -> tuple[str, int] | None:
        return None if name in self._pieces or name not in self.tensors else (name, 0)

    def check_record(self, key: str) -> bool:
        name, k = key, 0
        if key not in self._entries:
            name, _, number = key.rpartition(" ")
            k = int(number)
        entry = self._runs(name)[k]
        crc, room = 0, memoryview(bytearray(min(PIECE, entry.size)))
        for start in range(0, entry.size, PIECE):
            piece = room[: min(PIECE, entry.size - start)]
            self._places.read(entry, start, piece, name)
            crc = crc32c(piece, crc)
        if crc != entry.crc32c:
            part = f", slice {k + 1} of {len(self._runs(name))}" if name in self._pieces else ""
            fail(
                "checksum",
                f"expected CRC-32C {entry.crc32c:08x} as the index says, found {crc:08x} in the {entry.size} "
                f"bytes from byte {entry.offset} on{part}",
                file=self._places.names[entry.shard],
                where=name,
                hint="the file is damaged: download it again",
            )
        return True

    def check_unchanged(self) -> None:
        self._index.check_unchanged()
        if self._shard in self._places.there:
            self._places.there[self._shard].check_unchanged()

    def close(self) -> None:
        self._joined.forget()
        self._index.close()
        for data in self._places.there.values():
            data.close()


@dataclass
class Bundle:
    """A bundle, opened: its data files in order, those without tensors left out, and what to say of it."""

    files: dict[str, TensorFile] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    readings: list[str] = field(default_factory=list)


def open_bundle(folder: Folder, prefix: str, *, within: str = "", as_it_stands: bool = False) -> Bundle:
    """The bundle `prefix` in the part `within` of `folder`, without what a program put around the names of
    variables unless they are wanted `as_it_stands`. Kinds: those of `read_index`, `missing-shard` (no
    data file at all), `bad-bundle`, `truncated`, `bad-name`, `read-failed`."""
    opened: list[ByteRange] = []

    def open_(name: str) -> ByteRange:
        place = folder.place(within + name)
        place.check(())
        opened.append(ByteRange(place.path, name, place.window))
        return opened[-1]

    try:
        data = open_(f"{prefix}.index")
        if data.size > INDEX_LIMIT:
            message = f"expected an index of at most {INDEX_LIMIT} bytes, found {data.size}"
            fail("header-limit", message, file=data.name)
        index = read_index(data)
        fail_all(name_problems(index.tensors, file=data.name))
        pieces = _joined(index, data.name)
        used = {e.shard for name, entry in index.tensors.items() for e in _runs(name, entry, pieces)}
        names = _Names(prefix, index.shards)
        have = {n.removeprefix(within) for n in folder.names() if n.startswith(within)}
        there = {k: open_(names[k]) for k in sorted(used) if names[k] in have}
        if used and not there:
            message = f"expected {names[min(used)]} beside its index, found no data file"
            fail("missing-shard", message, file=data.name, hint="download what is missing too")
        places = _Places(names, there)
        fail_all(_data_problems(index, pieces, places))
        found = _bundle(index, data, places, pieces, used)
        if not as_it_stands:
            own = without_scopes(found.files)
            found.files, found.readings = own.files, own.readings
            found.left_out += own.left_out
        return found
    except BaseException:
        for file in opened:
            file.close()
        raise


class _Names(Sequence[str]):
    """The names of the data files by number: not made before they are asked for."""

    def __init__(self, prefix: str, shards: int) -> None:
        self.prefix, self.shards = prefix, shards

    def __len__(self) -> int:
        return self.shards

    def __getitem__(self, shard: Any) -> Any:
        return data_name(self.prefix, shard, self.shards)


Pieces = dict[str, list[Piece[Entry]]]  # of the tensors that are kept in slices, in order


def _joined(index: Index, file: str) -> Pieces:
    """The slices of each tensor that is kept in some. Each must be there once, fit the type and, together,
    make up the shape; none may be left over."""
    found: Pieces = {}
    left = dict(index.slices)
    problems: list[Problem] = []
    for name, entry in index.tensors.items():
        if not entry.slices:
            continue
        own = found[name] = []
        for box in by_start(entry.slices):
            piece = Piece(*whole_box(box, entry.shape), left.pop(slice_key(name, box), None))
            part = piece.place
            if part is None:
                text = f"expected the slice {piece} of {list(entry.shape)}, found none"
                problems.append(Problem("bad-bundle", text, file, name))
            elif (part.type, part.shape) != (entry.type, piece.size):
                text = f"expected {_typed(entry.type, piece.size)} in the slice {piece}, found "
                problems.append(Problem("bad-bundle", text + _typed(part.type, part.shape), file, name))
            else:
                own.append(Piece(piece.start, piece.size, part))
        if len(own) == len(entry.slices) and (wrong := tiling_fault(entry.shape, own)) is not None:
            kind = "limits" if wrong[0] == "limits" else "bad-bundle"
            problems.append(Problem(kind, wrong[1], file, name))
    for key in left:
        text = "expected slices of tensors that the index has, found one of another"
        problems.append(Problem("bad-bundle", text, file, slice_name(key)))
    fail_all(problems)
    return found


def _typed(kind: int, shape: Sequence[int]) -> str:
    return f"{TYPES[kind][0]} {list(shape)}"


def _data_problems(index: Index, pieces: Pieces, places: _Places) -> Iterator[Problem]:
    """What the entries say of the data files that is not so: bytes past their ends, bytes of two tensors."""
    runs: dict[int, list[tuple[int, int, str]]] = {shard: [] for shard in places.there}
    for name, entry in index.tensors.items():
        for part in _runs(name, entry, pieces):
            if part.size and part.shard in runs:
                runs[part.shard].append((part.offset, part.size, name))
    for shard, held in runs.items():
        file, size = places.names[shard], places.there[shard].size
        end = max((offset + count for offset, count, _ in held), default=0)
        if end > size:
            missing = [name for offset, count, name in held if offset + count > size]
            message = f"expected {end} bytes, found {size}: {len(set(missing))} tensors are not all there"
            yield Problem("truncated", message, file, missing[0], "the download was cut: download it again")
        at, last = 0, ""
        for offset, count, name in sorted(held):
            if offset < at:
                message = f"expected bytes of its own, found some from byte {offset} on that {last} has too"
                yield Problem("bad-bundle", message, file, name)
            at, last = offset + count, name


def _runs(name: str, entry: Entry, pieces: Pieces) -> list[Entry]:
    """Where the bytes of a tensor lie: itself, or its slices."""
    return [p.place for p in pieces[name]] if name in pieces else [entry]


def _bundle(index: Index, data: ByteRange, places: _Places, pieces: Pieces, used: set[int]) -> Bundle:
    made = Bundle(notes=_notes(index, places, used))
    homes: dict[int, dict[str, Entry]] = {shard: {} for shard in sorted(used)}
    for name, entry in index.tensors.items():
        homes[_runs(name, entry, pieces)[0].shard][name] = entry
    for shard, entries in homes.items():
        own = {name: pieces[name] for name in entries if name in pieces}
        file = BundleFile(shard, data, places, entries, own)
        made.files[file.name] = file
        made.left_out += [LeftOut(t, _reason(t)) for t in file.others.values()]
    return made


def _reason(tensor: OtherTensor) -> str:
    if tensor.name == OBJECT_GRAPH:
        return "the object graph of tf.train.Checkpoint: which names lead to which variable"
    return _STRINGS.get(tensor.dtype, f"of type {tensor.dtype}, which is not converted")


def _notes(index: Index, places: _Places, used: set[int]) -> list[str]:
    found = []
    for shard in sorted(used - places.there.keys()):
        held = sum(
            e.shard == shard for e in (*index.tensors.values(), *index.slices.values()) if not e.slices
        )
        found.append(f"{places.names[shard]} is not there: {held} tensors or slices in it cannot be read")
    sliced = sum(bool(e.slices) for e in index.tensors.values())
    if sliced:
        found.append(f"{sliced} partitioned variables were joined from {len(index.slices)} slices")
    paths = [n for n in index.tensors if n.endswith(VARIABLE)]
    if paths:
        found.append(_objects(paths))
    return found


def _objects(keys: Sequence[str]) -> str:
    """What kind of names a checkpoint of objects has."""
    roots = {path[0] for k in keys if (path := object_path(k))}
    text = "a TensorFlow 2 checkpoint of objects (tf.train.Checkpoint): its names are paths of attributes"
    if roots == {"optimizer"} and any("/_trainable_variables/" in k for k in keys):
        return f"{text}; the weights of a Keras model stand under optimizer/_trainable_variables, numbered"
    sample = next((path for k in keys if len(path := object_path(k) or ()) > 1), None)
    return text if sample is None else f"{text}, `{'` `'.join(sample)}` say"
