"""safetensors: a reader that is stricter than the library's, and the layout of a file to be written.

A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes. The header gives each
tensor's dtype, shape and byte range; together the ranges cover the data exactly, without holes or overlap
(https://github.com/huggingface/safetensors, "Format"). Accepted files read the same in the library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from itertools import chain, repeat
from json.encoder import encode_basestring
from math import prod
from operator import sub
from pathlib import Path
from typing import Any, NoReturn

from ckpt_tool.checkpoint.base import DTYPES, OtherTensor, TensorFile, TensorInfo, tensor_infos
from ckpt_tool.checkpoint.byte_range import ByteRange, Window
from ckpt_tool.checkpoint.signs import UNPACKED
from ckpt_tool.checkpoint.strict_json import closes, members, parse_object
from ckpt_tool.checkpoint.tensor_names import RESERVED, faultless, name_problems
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all, printable
from ckpt_tool.records import dataclass

HEADER_LIMIT = 32 << 20
# In one file: to open 100,000 takes 50 MB. The largest published models have 91,000 in 163 files.
TENSOR_LIMIT = 50_000
DIMENSION_LIMIT = 64
ELEMENT_LIMIT = 1 << 56  # elements of the non-empty dimensions; no file holds as many bytes

# Element types that the format has and this project does not move.
_OTHER_DTYPES = frozenset(("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "U4", "I4"))
COMPLEX = {"C64": 8}  # bytes of an element: no weights, such as tables of rotations, which are left out
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))


class SafetensorsFile(TensorFile):
    """One safetensors file, opened: every tensor lies in one plain run of bytes."""

    format = "safetensors"

    def __init__(
        self,
        data: ByteRange,
        data_start: int,
        tensors: dict[str, TensorInfo],
        begins: dict[str, int],
        metadata: dict[str, str],
    ) -> None:
        self.path, self.name = data.path, data.name
        self.others = {n: t for n, t in tensors.items() if isinstance(t, OtherTensor)}
        self.tensors = {n: t for n, t in tensors.items() if n not in self.others} if self.others else tensors
        self.metadata = metadata
        self.fingerprint = data.fingerprint
        self._bytes, self._data_start, self._begins = data, data_start, begins

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.tensors[name].nbytes:
            raise ValueError(f"bytes {offset} to {offset + len(buffer)} are outside tensor {name}")
        self._bytes.read_into(self._data_start + self._begins[name] + offset, buffer, name)

    def read_whole(self, tensors: Sequence[tuple[str, memoryview]]) -> None:
        if any(len(buffer) != self.tensors[name].nbytes for name, buffer in tensors):
            raise ValueError("expected buffers of the tensors' sizes")
        self._bytes.read_each((self.begin(name), buffer, name) for name, buffer in tensors)

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        start = self._data_start
        self._bytes.expect((start + self._begins[name] + offset, size) for name, offset, size in ranges)

    def begin(self, name: str) -> int:
        """The byte of the file that a tensor begins with."""
        return self._data_start + self._begins[name]

    def extent(self, name: str) -> tuple[int, int]:
        return self._bytes.descriptor, self._bytes.base + self._data_start + self._begins[name]

    def check_unchanged(self) -> None:
        self._bytes.check_unchanged()

    def close(self) -> None:
        self._bytes.close()


def open_safetensors(
    path: Path, name: str, *, window: Window | None = None, header_limit: int = HEADER_LIMIT
) -> SafetensorsFile:
    """Open `path`, or the part `window` of it, reading its header only; `name` is how it is called.

    `header_limit` bytes is the longest header accepted. Kinds: `bad-safetensors`, `truncated`,
    `trailing-data`, `header-limit`, `bad-name`, `unsupported-dtype`, `read-failed`.
    """
    data = ByteRange(path, name, window)
    try:
        return header_of(data, header_limit)
    except BaseException:
        data.close()
        raise


def header_of(data: ByteRange, limit: int) -> SafetensorsFile:
    """The file that `data` is, which closes it."""
    file = data.name
    if data.size < 8:
        fail("truncated", f"expected 8 bytes of header length, found {data.size} bytes", file=file)
    size = int.from_bytes(data.head(8), "little")
    available = data.size - 8
    start = data.read(8, min(1, available))
    if size <= available and size > limit:
        fail("header-limit", f"expected a header of at most {limit} bytes, found {size}", file=file)
    if size > available:
        if size <= limit and start in (b"{", b"") and not closes(data.read(8, available)):
            fail("truncated", f"expected a header of {size} bytes, found the end of the file", file=file)
        fail(
            "bad-safetensors",
            f"expected a header that fits the file ({available} bytes), found a length of {size}",
            file=file,
        )
    if start != b"{":
        fail("bad-safetensors", f"expected `{{` at byte 8, found {printable(ascii(start)[1:])}", file=file)
    header = data.read(8, size)
    if header.count(b'"data_offsets"') > TENSOR_LIMIT:
        fail("header-limit", f"expected at most {TENSOR_LIMIT} tensors, found more", file=file)

    plain, held = _plain_header(header, limit, available - size, file), [header]
    del header
    tensors, begins, metadata = plain or _strict_header(held, limit, file)
    if not faultless(list(tensors)):
        fail_all(name_problems(tensors, file=file))
    if plain is None:
        _check_coverage(tensors, begins, available - size, file)
    return SafetensorsFile(data, 8 + size, tensors, begins, metadata)


# The tensors of a header, where each begins, and what is no tensor.
_Header = tuple[dict[str, TensorInfo], dict[str, int], dict[str, str]]
_INTEGER = rb"(?:0|[1-9][0-9]{0,17})"
# Entries as nearly all writers have them; others are for the strict reader.
_ENTRY = re.compile(
    rb'(?:,|\A\{)"([ !#-\[\]-~]+)":\{("dtype":"[A-Z0-9_]{1,16}","shape":\[(?:I(?:,I){0,15})?\]),'
    rb'"data_offsets":\[(I),(I)\]\}'.replace(b"I", _INTEGER)
)
_FIRST = re.compile(rb'\{"__metadata__":\{[^{}\\]{0,65536}\}(?=,")')
_END = re.compile(rb"\} *")
_BESIDE = len(b',"":{,"data_offsets":[,]}')  # bytes of an entry beside those groups
BATCH = 256 << 10  # bytes of entries that are taken at once


def _plain_header(header: bytes, limit: int, size: int, file: str) -> _Header | None:
    """What the strict reader makes of a header in which all is as writers have it, in a tenth of the time;
    None for another, in which something may be wrong. The tensors fill the `size` bytes behind it."""
    metadata: dict[str, str] = {}
    at = 0
    if (first := _FIRST.match(header)) is not None:
        try:
            _, _, metadata = _strict_header([first[0] + b"}"], limit, file)
        except CkptToolError:  # which the strict reader says with what follows
            return None
        at = first.end()
    kinds: dict[bytes, tuple[str, tuple[int, ...], int]] = {}
    begins: dict[str, int] = {}
    found: list[tuple[str, tuple[int, ...], int]] = []
    spans: list[tuple[int, int]] = []
    last = header.rfind(b"}")
    if last < 0 or not _END.fullmatch(header, last):
        return None
    while at < last:
        next_ = header.find(b'},"', at + BATCH, last)
        end = last if next_ < 0 else next_ + 1
        entries = _ENTRY.findall(header, at, end)
        if not entries or _length(entries) != end - at:  # something between them
            return None
        names, told, starts, ends = zip(*entries, strict=True)
        for text in set(told) - kinds.keys():
            if (kind := _kind(text)) is None:
                return None
            kinds[text] = kind
        own, firsts, lasts = [kinds[text] for text in told], list(map(int, starts)), list(map(int, ends))
        if list(map(sub, lasts, firsts)) != [nbytes for *_, nbytes in own]:
            return None
        spans += zip(firsts, lasts, strict=True)
        begins.update(zip(b"\n".join(names).decode("ascii").split("\n"), firsts, strict=True))
        found += own
        at = end
    if not found or len(begins) < len(found) or RESERVED in begins or not _fill(spans, size):
        return None
    dtypes, shapes, _ = zip(*found, strict=True)
    made = tensor_infos(begins, dtypes, shapes, repeat(file))
    return dict(zip(begins, made, strict=True)), begins, metadata


def _fill(spans: list[tuple[int, int]], size: int) -> bool:
    """Whether these (first byte, byte after the last) are bytes 0 to `size`, each once."""
    firsts, lasts = zip(*sorted(spans), strict=True)
    return firsts == (0, *lasts[:-1]) and lasts[-1] == size


def _length(entries: Sequence[tuple[bytes, ...]]) -> int:
    """The bytes of entries that were matched, each with what stands before it."""
    return sum(map(len, chain.from_iterable(entries))) + len(entries) * _BESIDE


def _kind(told: bytes) -> tuple[str, tuple[int, ...], int] | None:
    """The dtype and shape that an entry tells, and the bytes of such a tensor; None where they are for the
    strict reader."""
    about = json.loads(b"{" + told + b"}")
    if about["dtype"] not in DTYPES or prod(max(n, 1) for n in about["shape"]) > ELEMENT_LIMIT:
        return None
    return about["dtype"], tuple(about["shape"]), prod(about["shape"]) * DTYPES[about["dtype"]].itemsize


def _strict_header(held: list[bytes], limit: int, file: str) -> _Header:
    """`held` has the header, and is emptied: it is text next, and may have 32 MiB."""
    tensors: dict[str, TensorInfo] = {}
    begins: dict[str, int] = {}
    metadata: dict[str, str] | None = None
    entries = members(
        held.pop(),
        file=file,
        kind="bad-safetensors",
        max_bytes=limit,
        max_depth=8,
        surrogates=True,
        held=False,
    )
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal shapes share one tuple
    for name, entry in entries:
        if name == RESERVED:
            if metadata is not None:
                fail("bad-safetensors", "expected one entry, found two", file=file, where=name)
            metadata = _metadata(entry, file)
            continue
        if len(tensors) == TENSOR_LIMIT:  # the count above misses fields that are spelled with escapes
            fail("header-limit", f"expected at most {TENSOR_LIMIT} tensors, found more", file=file)
        if name in tensors:
            fail("bad-safetensors", "expected each tensor once, found it twice", file=file, where=name)
        dtype, shape, begin = _entry(entry, file, name)
        if dtype in COMPLEX:
            tensors[name] = OtherTensor(name, dtype, shape, file, prod(shape) * COMPLEX[dtype])
        else:
            tensors[name] = TensorInfo(name, dtype, shapes.setdefault(shape, shape), file)
        begins[name] = begin
    return tensors, begins, metadata or {}


def _metadata(entry: Any, file: str) -> dict[str, str]:
    """Null is what mlx writes for none."""
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
        fail("bad-safetensors", "expected an object of strings", file=file, where=RESERVED)
    return entry


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _entry(entry: Any, file: str, name: str) -> tuple[str, tuple[int, ...], int]:
    """(dtype, shape, first byte) of one tensor, its numbers checked against each other."""

    def bad(message: str) -> NoReturn:
        fail("bad-safetensors", message, file=file, where=name)

    if not isinstance(entry, dict):
        bad("expected an object with dtype, shape and data_offsets")
    if entry.keys() != _FIELDS:
        odd = sorted(entry.keys() ^ _FIELDS)[0]
        bad(f"expected the fields dtype, shape, data_offsets, found {printable(odd)} missing or extra")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in {*DTYPES, *COMPLEX}:
        if isinstance(dtype, str) and dtype in _OTHER_DTYPES:
            message = f"expected a dtype known here, found {dtype}"
            fail("unsupported-dtype", message, file=file, where=name, hint=UNPACKED)
        bad(f"expected a dtype of the format, found {printable(dtype, 40)}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        bad(f"expected a shape of integers from 0, found {printable(shape, 80)}")
    if len(shape) > DIMENSION_LIMIT:
        bad(f"expected at most {DIMENSION_LIMIT} dimensions, found {len(shape)}")
    if prod(max(n, 1) for n in shape) > ELEMENT_LIMIT:
        bad(f"expected a shape of at most 2^56 elements, found {printable(shape, 80)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        bad(f"expected data_offsets of two integers from 0, found {printable(offsets, 80)}")
    begin, end = offsets
    nbytes = prod(shape) * (COMPLEX.get(dtype) or DTYPES[dtype].itemsize)
    if end - begin != nbytes:
        bad(f"expected {nbytes} bytes for {dtype} {tuple(shape)}, found data_offsets {begin} to {end}")
    return dtype, tuple(shape), begin


def _check_coverage(
    tensors: Mapping[str, TensorInfo], begins: Mapping[str, int], size: int, file: str
) -> None:
    """The byte ranges, in order, must be the data section, each byte once."""
    end = 0
    for begin, nbytes in sorted(zip(begins.values(), (t.nbytes for t in tensors.values()), strict=True)):
        if begin != end:
            break
        end += nbytes
    else:
        if end == size:
            return
    at, last = 0, None  # now for the message
    # Two stable sorts: by where they begin, and the empty ones first where several begin.
    for name in sorted(sorted(tensors, key=lambda n: tensors[n].nbytes), key=begins.__getitem__):
        begin = begins[name]
        if begin != at:
            word = "an overlap" if begin < at else "a hole"
            message = f"expected its data from byte {at} on, found {word}: {begin}"
            fail("bad-safetensors", message, file=file, where=name)
        at, last = begin + tensors[name].nbytes, name
    if at != size:
        kind = "truncated" if at > size else "trailing-data"
        fail(kind, f"expected {at} bytes of tensor data, found {size}", file=file, where=last)


@dataclass(frozen=True)
class SafetensorsLayout:
    """Where everything goes in a safetensors file that is still to be written.

    `offsets` are absolute byte offsets of the tensors' data, `size` is the whole file's. Tensors are placed
    by falling element size, so each starts at a multiple of it; equal sizes keep the order given.
    """

    tensors: Sequence[tuple[str, str, tuple[int, ...]]]  # name, dtype, shape
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    size: int = field(init=False)
    offsets: Mapping[str, int] = field(init=False)
    header: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        fail_all(name_problems((name for name, _, _ in self.tensors), file="the output"))
        ordered = sorted(self.tensors, key=lambda t: -DTYPES[t[1]].itemsize)
        compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
        entries = [f'"{RESERVED}":{compact(dict(self.metadata))}'] if self.metadata else []
        begins: dict[str, int] = {}
        kinds: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}  # layers are alike
        at = 0
        for name, dtype, shape in ordered:
            if name in begins:
                raise ValueError(f"tensor {name} is laid out twice")
            if (kind := kinds.get((dtype, shape))) is None:
                told = compact({"dtype": dtype, "shape": list(shape), "data_offsets": []})
                kind = kinds[dtype, shape] = told.removesuffix("]}"), prod(shape) * DTYPES[dtype].itemsize
            end = at + kind[1]
            entries.append(f"{encode_basestring(name)}:{kind[0]}{at},{end}]}}")
            begins[name] = at
            at = end
        text = f"{{{','.join(entries)}}}".encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        object.__setattr__(self, "header", len(text).to_bytes(8, "little") + text)
        object.__setattr__(self, "offsets", {name: start + begin for name, begin in begins.items()})
        object.__setattr__(self, "size", start + at)

    def header_writes(self) -> Iterator[tuple[int, bytes]]:
        """(file offset, bytes) of everything but the tensors that is known before they are."""
        yield 0, self.header

    def finish(self, crcs: Mapping[str, int]) -> Iterable[tuple[int, bytes]]:
        """What is written after the tensors, given their CRC32s: nothing, the format has no checksums."""
        return ()


DEPTH = 2  # folders between an index and a file that it lists
INDEX_NAME = "model.safetensors.index.json"
INDEX_LINES = 4096  # that are put together at once
INDEX_BYTES = 64 << 20  # one grows with the number of tensors: half a million have 50 MB, the published 5 MiB
_quoted = json.JSONEncoder(ensure_ascii=False).encode


def index_document(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The bytes of `model.safetensors.index.json`: which file holds each tensor, and the tensors' bytes."""
    return b"".join(index_pieces(weight_map, total_size))


def index_pieces(weight_map: Mapping[str, str], total_size: int) -> Iterator[bytes]:
    """The same some of it at a time, as `json` writes it with an indent of 2: half a million tensors have
    50 MB of it."""
    yield f'{{\n  "metadata": {{\n    "total_size": {total_size}\n  }},\n  "weight_map": {{'.encode()
    names = sorted(weight_map)
    for at in range(0, len(names), INDEX_LINES):
        lines = [f"\n    {_quoted(n)}: {_quoted(weight_map[n])}" for n in names[at : at + INDEX_LINES]]
        yield (("," if at else "") + ",".join(lines)).encode()
    yield b"\n  }\n}\n" if names else b"}\n}\n"


UNLISTED = "does not list"  # in a note of an index, of tensors that it leaves out
STRAY = "a file of another release, or an index of one: move the one aside, or get the other again"
TWICE = "files of two releases are in one folder: take away those of the other, or get the files again"
_AGAIN = "get the index again from where the weights are from, into the folder with its files"
# Which writers that leave shared tensors out list all the same, and every loader ties.
OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight")
_ASIDE = "get the file again; where the files hold a whole model without it, move the index aside"


@dataclass(frozen=True)
class WeightIndex:
    """An index file as read: tensor name to file name, and the tensors' bytes as it says them, unchecked.

    Loaders take from it which files there are and read all that these hold, so a place that has changed since
    is no reason to refuse; a tensor that is in no file, or in two, is.
    """

    name: str
    weight_map: Mapping[str, str]
    total_size: object = None
    tied: bool = False  # config.json says that the output layer is the embedding

    def files(self) -> list[str]:
        """The files named, each once, in order of first mention."""
        return list(dict.fromkeys(self.weight_map.values()))

    def agrees(self, files: Mapping[str, TensorFile]) -> bool:
        """Whether each of the opened `files` holds what it is said to hold, and all that is listed is there:
        so that it has no problems, and no notes of tensors."""
        place = self.weight_map.get
        held = sum(len(opened.tensors) for opened in files.values())
        return held == len(self.weight_map) and all(
            {*map(place, opened.tensors)} <= {file} for file, opened in files.items()
        )

    def problems(self, files: Mapping[str, TensorFile]) -> Iterator[Problem]:
        """Tensors that are not in exactly one of the opened `files`."""

        def bad(message: str, where: str, hint: str | None = None) -> Problem:
            return Problem("bad-index", message, self.name, where, hint)

        homes, several = _homes(files)
        lost = () if self.weight_map.keys() <= homes.keys() else self.weight_map.items()
        for tensor, file in lost:
            if file in files and tensor not in homes and not (self.tied and tensor in OUTPUT_LAYERS):
                yield bad(f"expected the tensor in {file}, found it in no file", tensor, _ASIDE)
        for tensor, found in several.items():
            there = " and ".join(printable(f, 80) for f in found[:4])
            yield bad(f"expected the tensor in one file, found it in {there}", tensor, TWICE)

    def notes(self, files: Mapping[str, TensorFile], *, agreed: bool = False) -> Iterator[str]:
        """What the index says otherwise than the opened `files`, in words: nothing that is read depends on
        it. `agreed`: see `agrees`."""
        said = self.weight_map
        homes = said if agreed else _homes(files)[0]
        unlisted = [] if agreed or homes.keys() <= said.keys() else [t for t in homes if t not in said]
        moved = [] if agreed or homes == said else [t for t, f in homes.items() if said.get(t, f) != f]
        lost = [t for t in OUTPUT_LAYERS if self.tied and t in said and t not in homes]
        for tensor in lost:
            yield f"{self.name} lists {tensor}, which no file holds: config.json ties it to the embedding"
        for tensors, what in (
            (unlisted, UNLISTED + " {} that the files hold"),
            (moved, "lists {} in another file than holds it"),
        ):
            if tensors:
                more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
                yield f"{self.name} {what.format(printable(tensors[0], 80) + more)}: read where it is"
        held = [t for opened in files.values() for t in (opened.tensors, opened.others)]
        total = sum(t.nbytes for tensors in held for t in tensors.values())
        safetensors_only = all(opened.format == self.name.split(".")[1] for opened in files.values())
        size = self.total_size
        known = type(size) in (int, float)
        if size is not None and not (known and (size == total or not safetensors_only)):
            found = "" if not safetensors_only else f", the tensors have {total}"  # pickles may share storage
            shown = printable(json.dumps(size, ensure_ascii=False), 40)
            yield f"{self.name}: metadata.total_size says {shown}{found}: it was not used"


def _homes(files: Mapping[str, TensorFile]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The first file that holds each tensor, and all files of those that are in several, in the order of the
    files."""
    homes: dict[str, str] = {}
    several: dict[str, list[str]] = {}
    for file, opened in files.items():
        names = [*opened.tensors, *opened.others] if opened.others else opened.tensors
        if homes.keys().isdisjoint(names):
            homes.update(dict.fromkeys(names, file))
            continue
        for tensor in names:
            if (first := homes.setdefault(tensor, file)) != file:
                several.setdefault(tensor, [first]).append(file)
    return homes, {t: several[t] for t in homes if t in several} if several else {}


def ties(config: bytes) -> bool:
    """Whether a config.json says that the output layer is the embedding; one that cannot be read does not."""
    try:
        return parse_object(config, file="config.json", kind="bad-config").get("tie_word_embeddings") is True
    except CkptToolError:
        return False


def _is_elsewhere(file: object) -> bool:
    """Whether that is no name of a file in a folder, or in one of at most `DEPTH` levels in it."""
    if not isinstance(file, str) or set(file) & set("\\\0") or file.count("/") > DEPTH:
        return True
    return any(part in ("", ".", "..") for part in file.split("/"))


def read_index(data: bytes, *, name: str) -> WeightIndex:
    """The index in `data`; refuses one whose file names are not those of files beside it or in a folder
    there (`bad-index`), each once. `./` before a name is the same file to every loader."""
    index = parse_object(data, file=name, kind="bad-index", max_bytes=INDEX_BYTES)
    del data
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        message = "expected an object of tensor names"
        fail("bad-index", message, file=name, where="weight_map", hint=_AGAIN)
    texts = {*map(type, weight_map.values())} <= {str}
    if texts and any(file.startswith("./") for file in {*weight_map.values()}):
        weight_map = {tensor: file.removeprefix("./") for tensor, file in weight_map.items()}
    if not texts or any(map(_is_elsewhere, {*weight_map.values()})):
        first = {repr(f): (t, f) for t, f in reversed(weight_map.items()) if _is_elsewhere(f)}
        fail_all(
            Problem(
                "bad-index",
                f"expected the name of a file in the folder of the index, found {printable(file)}",
                name,
                tensor,
                "put the files beside the index, and take what stands before their names out of it",
            )
            for tensor, file in reversed(first.values())
        )
    details = index.get("metadata")
    once = {file: file for file in weight_map.values()}
    weight_map = dict(zip(weight_map, map(once.__getitem__, weight_map.values()), strict=True))
    return WeightIndex(name, weight_map, details.get("total_size") if isinstance(details, dict) else None)
