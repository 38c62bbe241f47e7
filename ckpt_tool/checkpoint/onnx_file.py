"""ONNX files: a graph in one file, its large weights in files beside it.

The graph is parsed by the library `onnx`. What it says of files beside it is checked here, before anything
opens them: places in its own folder, bytes that are there and are as many as the shapes take. Source: ONNX IR
specification (onnx/docs/IR.md, onnx/docs/ExternalData.md).
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from ckpt_tool.checkpoint.base import DTYPES, TensorFile, TensorInfo
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.errors import fail, printable
from ckpt_tool.records import dataclass

SUFFIX = ".onnx"
LARGEST = (1 << 31) - 1  # bytes that a message of protobuf may have
DEEPEST = 32  # graphs within graphs
MOST_AXES = 64
KEYS = frozenset(("location", "offset", "length", "checksum", "basepath"))  # of a place outside
# Numbers of TensorProto.DataType, and how a value is called here.
TYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64",
    12: "U32", 13: "U64", 16: "BF16", 17: "F8_E4M3", 19: "F8_E5M2",
}  # fmt: skip
STANDARD = ("", "ai.onnx")  # names of the domain of the operators that every runtime has
Dim = int | str  # an axis of that many, or one that is free and has that name, which may be empty


@dataclass(frozen=True)
class Value:
    """An input or output of the graph; `dtype` as DTYPES has it, or what the file calls another type. `shape`
    is None where the file says none."""

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None

    @property
    def words(self) -> str:
        """`I64 (batch, sequence)`"""
        known = ("?" if x == "" else str(x) for x in self.shape or ())
        return self.dtype if self.shape is None else f"{self.dtype} ({', '.join(known)})"


@dataclass(frozen=True)
class Outside:
    """Where the bytes of a tensor lie in a file beside the graph."""

    file: str
    offset: int
    size: int


class OnnxFile(TensorFile):
    """`model` is the parsed message, its weights outside not loaded; `tensors` are the initializers,
    `outside` the places of those that are in another file. `opsets` are versions by domain, "" the standard
    one."""

    format = "onnx"

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._ranges: dict[str, ByteRange] = {}
        self._file = ByteRange(path, self.name)
        try:
            self.model = _parsed(self._file)
            _check_texts(_texts(self.model), self.name)
            self.opsets = _opsets(self.model, self.name)
            self.outside: dict[str, Outside] = {}
            self._inline: dict[str, Any] = {}
            self.tensors: Mapping[str, TensorInfo] = self._initializers()
            self._check_others()
            given = set(self.tensors)
            self.inputs = [_value(v, self.name) for v in self.model.graph.input if v.name not in given]
            self.outputs = [_value(v, self.name) for v in self.model.graph.output]
            self.metadata = self._told()
        except BaseException:
            self.close()
            raise

    @property
    def opset(self) -> int:
        """Of the standard operators; 0 where it has none of them."""
        return self.opsets.get("", 0)

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path, *(r.path for r in self._ranges.values()))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        place = self.outside.get(name)
        if place is not None:
            if offset < 0 or offset + len(buffer) > place.size:
                raise ValueError(f"bytes beyond the end of {name}")
            self._ranges[place.file].read_into(place.offset + offset, buffer, name)
            return
        data = self._bytes(name)
        if offset < 0 or offset + len(buffer) > len(data):
            raise ValueError(f"bytes beyond the end of {name}")
        buffer[:] = data[offset : offset + len(buffer)]

    def extent(self, name: str) -> tuple[int, int] | None:
        place = self.outside.get(name)
        return None if place is None else (self._ranges[place.file].descriptor, place.offset)

    def check_unchanged(self) -> None:
        for data in (self._file, *self._ranges.values()):
            data.check_unchanged()

    def close(self) -> None:
        for data in (self._file, *self._ranges.values()):
            data.close()

    def _bytes(self, name: str) -> bytes:
        """Those of a tensor that the graph itself holds, whichever field they are in."""
        from onnx import numpy_helper

        found: bytes = numpy_helper.to_array(self._inline[name]).tobytes()
        return found

    def _initializers(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for t in self.model.graph.initializer:
            _check_texts([t.name], self.name)
            if not t.name or t.name in found:
                what = "a second one" if t.name else "none"
                bad(f"expected a name of its own for every initializer, found {what}", self.name, t.name)
            place = self._place(t)
            dtype = TYPES.get(t.data_type)
            if dtype is None:
                kind = type_name(t.data_type)
                fail("unsupported-dtype", f"expected numbers, found {kind}", file=self.name, where=t.name)
            found[t.name] = TensorInfo(t.name, dtype, tuple(t.dims), self.name)
            if place is not None:
                self.outside[t.name] = place
            else:
                self._inline[t.name] = t
        return found

    def _check_others(self) -> None:
        """Tensors elsewhere in the graph may lie outside as well: constants, those of inner graphs."""
        for t in _tensors_within(self.model, self.name):
            self._place(t)
        if self.model.graph.sparse_initializer:
            name = self.model.graph.sparse_initializer[0].values.name
            fail("unsupported", "expected dense weights, found sparse ones", file=self.name, where=name)

    def _place(self, t: Any) -> Outside | None:
        """Where a tensor lies outside, its file opened and its bytes known to be there; None for one that
        lies in the graph."""
        _check_texts((t.name, *(x for e in t.external_data for x in (e.key, e.value))), self.name)
        numel = _numel(t, self.name)
        itemsize = DTYPES[TYPES[t.data_type]].itemsize if t.data_type in TYPES else None
        if t.data_location != 1:
            _check_inline(t, numel, itemsize, self.name)
            return None
        if itemsize is None:
            kind = type_name(t.data_type)
            fail("unsupported-dtype", f"expected numbers, found {kind}", file=self.name, where=t.name)
        said = {entry.key: entry.value for entry in t.external_data}
        if len(said) < len(t.external_data) or not said.keys() <= KEYS:
            keys = ", ".join(printable(entry.key) for entry in t.external_data[:8])
            bad(f"expected {', '.join(sorted(KEYS))}, each at most once, found {keys}", self.name, t.name)
        location = beside(self.path, said.get("location", ""), self.name, t.name)
        offset = _count(said.get("offset", "0"), "offset", self.name, t.name)
        size = numel * itemsize
        length = _count(said.get("length", str(size)), "length", self.name, t.name)
        if length != size:
            text = f"expected {size} bytes for {tuple(t.dims)} {TYPES[t.data_type]}, found {length}"
            fail("size-mismatch", text, file=self.name, where=t.name)
        if location not in self._ranges:
            self._ranges[location] = ByteRange(self.path.parent / location, location)
        if offset + size > self._ranges[location].size:
            text = f"expected at least {offset + size} bytes, found {self._ranges[location].size}"
            fail("truncated", text, file=location, where=t.name)
        return Outside(location, offset, size)

    def _told(self) -> dict[str, str]:
        """What is worth reading of a graph, besides its weights."""
        m = self.model
        made = {f"opset {domain or 'ai.onnx'}": str(version) for domain, version in self.opsets.items()}
        made |= {"IR version": str(m.ir_version), "nodes": f"{len(m.graph.node):,}"}
        if m.producer_name:
            made["producer"] = printable(f"{m.producer_name} {m.producer_version}".strip())
        made |= folded("input", self.inputs) | folded("output", self.outputs)
        return made | {printable(p.key): printable(p.value) for p in m.metadata_props}


def is_onnx(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of an ONNX file, which no checkpoint's is."""
    return os.fspath(path).lower().endswith(SUFFIX) and not os.path.isdir(path)


def open_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """The file and those beside it, all that it says of them checked; no weight is read. Kinds `bad-onnx`,
    `missing-file`, `truncated`, `size-mismatch`, `unsupported-dtype`; `missing-package` without onnx."""
    import onnx  # noqa: F401 - said before the file is looked at

    if not os.path.lexists(path):
        fail("not-found", "expected a file, found none", file=os.fspath(path))
    return OnnxFile(Path(path))


def bad(message: str, file: str, where: str | None = None) -> NoReturn:
    fail("bad-onnx", message, file=file, where=where or None)


def _parsed(data: ByteRange) -> Any:
    """The message. Each of its parts was in the file, so it takes memory as a multiple of the file's size."""
    import onnx
    from google.protobuf.message import DecodeError

    if not 0 < data.size <= LARGEST:
        text = f"expected a graph of 1 to {LARGEST:,} bytes, found {data.size:,}"
        bad(text, data.name)
    content = bytearray(data.size)
    data.read_into(0, memoryview(content))
    model = onnx.ModelProto()
    try:
        model.ParseFromString(bytes(content))
    except (DecodeError, RecursionError, ValueError):
        bad("expected an ONNX model, found bytes that are none", data.name)
    if not model.HasField("graph") or not model.opset_import:
        missing = "graph" if model.opset_import else "opset_import"
        bad(f"expected a model with a graph and versions of its operators, found no {missing}", data.name)
    return model


def _check_texts(texts: Iterable[str | bytes], file: str) -> None:
    """Refuse a text that is not UTF-8: protobuf gives it as bytes, which are the key of nothing."""
    for text in texts:
        if isinstance(text, bytes):
            bad(f"expected names and other texts as UTF-8, found {text[:40]!r}", file)


def _texts(model: Any) -> Iterator[str | bytes]:
    """All of the model's, but for those of its tensors and of graphs within the graph."""
    graph = model.graph
    yield from (model.producer_name, model.producer_version, graph.name)
    yield from (entry.domain for entry in model.opset_import)
    for prop in model.metadata_props:
        yield from (prop.key, prop.value)
    for value in chain(graph.input, graph.output):
        yield value.name
        yield from (axis.dim_param for axis in value.type.tensor_type.shape.dim)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _opsets(model: Any, file: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain in STANDARD else printable(entry.domain)
        if domain in found and found[domain] != entry.version:
            bad(f"expected one version of the operators, found {found[domain]} and {entry.version}", file)
        found[domain] = int(entry.version)
    return found


def beside(path: Path, location: str, file: str, where: str) -> str:
    """The name of a file in the folder of `path`, as the graph gives it; `bad-onnx` for a place anywhere
    else, also by way of a link, `missing-file` where nothing stands."""
    parts = PurePosixPath(location).parts
    # "*/_ORT_MEM_ADDR_/*" is no place to onnxruntime: it reads its own memory at the offset
    odd = any(c in location for c in "\0\\*")
    if not location or odd or location.startswith("/") or ".." in parts:
        bad(f"expected weights in a file of its folder, found {printable(location)!r}", file, where)
    name = str(PurePosixPath(location))
    place = path.parent / name
    try:
        status = os.stat(place)
    except OSError:
        hint = "the files of a model are moved together"
        fail(
            "missing-file",
            f"expected {printable(name)} beside it, found none",
            file=file,
            where=where,
            hint=hint,
        )
    home = os.path.realpath(path.parent)
    own = os.path.realpath(path)  # a file of the Hub's cache is a link, and so are those beside it
    real = os.path.realpath(place)
    if os.path.commonpath([home, real]) != home and os.path.dirname(real) != os.path.dirname(own):
        bad(
            f"expected weights in a file of its folder, found that {printable(name)} is a link out of it",
            file,
            where,
        )
    if not stat.S_ISREG(status.st_mode):
        bad(f"expected a regular file {printable(name)}, found something else", file, where)
    return name


def _count(text: str, what: str, file: str, where: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 19:
        bad(f"expected a number as {what}, found {printable(text)!r}", file, where)
    return int(text)


def _numel(t: Any, file: str) -> int:
    dims = tuple(t.dims)
    # an axis of none does not make others reasonable: numpy refuses such a shape too
    if len(dims) > MOST_AXES or any(d < 0 for d in dims) or prod(filter(None, dims)) >= 1 << 60:
        bad(f"expected a shape, found {printable(dims)}", file, t.name)
    return prod(dims)


def _check_inline(t: Any, numel: int, itemsize: int | None, file: str) -> None:
    if itemsize is None:
        return
    held = len(t.raw_data) if t.HasField("raw_data") else None
    if held is not None and held != numel * itemsize:
        text = f"expected {numel * itemsize} bytes for {tuple(t.dims)} {TYPES[t.data_type]}, found {held}"
        fail("size-mismatch", text, file=file, where=t.name)
    if held is None:
        counts = (
            len(t.float_data),
            len(t.int32_data),
            len(t.int64_data),
            len(t.double_data),
            len(t.uint64_data),
        )
        if max(counts) != numel or sum(counts) != numel:
            text = f"expected {numel} numbers for {tuple(t.dims)} {TYPES[t.data_type]}, found {sum(counts)}"
            fail("size-mismatch", text, file=file, where=t.name)


def _tensors_within(model: Any, file: str) -> Iterator[Any]:
    """Of attributes, of inner graphs, of functions and of training: all but the initializers of the graph
    itself."""
    trained = (g for t in model.training_info for g in (t.initialization, t.algorithm))
    waiting = deque([(model.graph, 0), *((f, 0) for f in model.functions), *((g, 0) for g in trained)])
    first = True
    while waiting:
        graph, depth = waiting.popleft()
        if depth > DEEPEST:
            bad(f"expected at most {DEEPEST} graphs within each other, found more", file)
        if not first:
            yield from getattr(graph, "initializer", ())
        first = False
        sparse = list(getattr(graph, "sparse_initializer", ()))
        usual = iter(getattr(graph, "attribute_proto", ()))  # what a function takes where nothing is given
        for attribute in chain(usual, chain.from_iterable(node.attribute for node in graph.node)):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse += [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            sparse += attribute.sparse_tensors
            inner = [attribute.g] if attribute.HasField("g") else []
            waiting += [(g, depth + 1) for g in [*inner, *attribute.graphs]]
        for tensor in sparse:
            yield from (tensor.values, tensor.indices)


def _value(v: Any, file: str) -> Value:
    if not v.name:
        bad("expected a name for every input and output, found none", file)
    if v.type.WhichOneof("value") != "tensor_type":
        return Value(v.name, v.type.WhichOneof("value") or "no type", None)
    kind = v.type.tensor_type
    dtype = TYPES.get(kind.elem_type) or type_name(kind.elem_type)
    if not kind.HasField("shape"):
        return Value(v.name, dtype, None)
    return Value(v.name, dtype, tuple(_dim(d) for d in kind.shape.dim))


def _dim(d: Any) -> Dim:
    return int(d.dim_value) if d.WhichOneof("value") == "dim_value" else printable(d.dim_param)


def type_name(number: int) -> str:
    from onnx import TensorProto

    known = dict(TensorProto.DataType.items())
    return next((name for name, n in known.items() if n == number), f"type {number}")


def folded(kind: str, values: list[Value]) -> dict[str, str]:
    """`input past_key_values.{0..31}.key` and what it is; those of layers that are alike in one."""
    import re

    groups: dict[tuple[str, str], list[str]] = {}
    for v in values:
        pattern = re.sub(r"\d+", "#", v.name)
        groups.setdefault((pattern, v.words), []).append(v.name)
    made = {}
    for (_, words), names in groups.items():
        label = names[0]
        if len(names) > 1:
            first, last = (re.findall(r"\d+", n) for n in (names[0], names[-1]))
            parts = re.split(r"\d+", names[0])
            spans = [a if a == b else f"{{{a}..{b}}}" for a, b in zip(first, last, strict=True)]
            label = "".join(p + s for p, s in zip(parts, [*spans, ""], strict=True))
        made[f"{kind} {printable(label)}"] = words
    return made
