"""Which globals of a pickle mean something here, and which may stand in a file at all.

A global has one of three standings. *Known* ones are tensors or plain data. *Foreign* ones are classes of
projects (megatron.model.enums.ModelType): kept as inert data, reported, and refused only where a tensor
should stand. *Refused* ones are the rest of Python, torch and numpy: nothing that a checkpoint needs is
there, and what can do harm is.

Functions of torch 1.0 to 2.13 that rebuild tensors: torch/_utils.py and torch/_tensor.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import NoReturn, Protocol

from ckpt_tool.checkpoint.pickle_records import Global, Inert, StorageRef, TensorRecord, describe


class Reader(Protocol):
    """What a meaning needs of the stack machine."""

    storages: dict[str, StorageRef]
    called: set[Global]

    @property
    def at(self) -> int: ...

    def fault(self, kind: str, message: str) -> NoReturn: ...

    def spend(self, size: int) -> None: ...

    def count_tensor(self, dimensions: int) -> None: ...

    def set_items(self, target: object, flat: list[object]) -> None: ...


DIMENSION_LIMIT = 64

Args = tuple[object, ...]
Meaning = Callable[[Reader, Global, Args], object]

# Storage class name -> torch dtype name. "Untyped" storages leave the dtype to the tensor.
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QUInt8Storage": "quint8",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}


def storage_dtype(kind: object) -> str | None:
    """The torch dtype name of a storage class; None for the untyped one, "" for what is no storage class."""
    if type(kind) is not Global or kind.module not in ("torch", "torch.cuda", "torch.storage"):
        return ""
    return None if kind.name == "UntypedStorage" else _STORAGES.get(kind.name, "")


# Storages and tensors

_STORAGE_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")
_LAST_KEY = 2**63 - 1


def storage(reader: Reader, pid: object) -> object:
    """What a persistent id stands for: the storage it names, or the class of a pickled module."""
    if type(pid) is not tuple or not pid:
        reader.fault("bad-pickle", f"expected a persistent id tuple, found {describe(pid)}")
    if pid[0] == "module" and len(pid) == 4:
        return pid[1]
    if pid[0] != "storage" or len(pid) not in (5, 6):
        reader.fault("bad-pickle", "expected a persistent id of a storage, found another")
    kind, key, location, numel = pid[1:5]
    dtype = storage_dtype(kind)
    if dtype == "":
        reader.fault("bad-pickle", f"expected a torch storage class, found {describe(kind)}")
    if type(key) is int and 0 <= key <= _LAST_KEY:
        key = str(key)  # LitGPT writes the number itself, and torch takes it for the name of its record
    if type(key) is not str or not _STORAGE_KEY.fullmatch(key):
        found = repr(key[:80]) if isinstance(key, str) else describe(key)
        reader.fault("bad-pickle", f"expected a storage key of letters, digits, `_` and `-`, found {found}")
    if type(location) is not str or type(numel) is not int:
        reader.fault("bad-pickle", f"expected a location and a count for storage {key}, found other types")
    if numel < 0:
        reader.fault("size-mismatch", f"expected a count of elements for storage {key}, found {numel}")
    view = _storage_view(reader, pid[5]) if len(pid) == 6 else None
    ref = StorageRef(key, dtype, location, numel, view)
    first = reader.storages.setdefault(key, ref)
    if first == ref:
        return first
    for what in ("dtype", "location", "numel"):
        before, now = getattr(first, what), getattr(ref, what)
        if before != now:
            reader.fault(
                "storage-conflict", f"expected one {what} for storage {key}, found {before} and {now}"
            )
    return ref


def _storage_view(reader: Reader, view: object) -> tuple[str, int, int] | None:
    match view:
        case None:
            return None
        case (str() as key, int() as start, int() as count) if type(view) is tuple:
            return key, start, count
    reader.fault("bad-pickle", f"expected key, offset and count of a storage's view, found {describe(view)}")


def _integers(reader: Reader, value: object, what: str) -> tuple[int, ...]:
    if type(value) is not tuple and type(value) is not list:
        reader.fault("bad-pickle", f"expected a {what} of integers, found {describe(value)}")
    if len(value) > DIMENSION_LIMIT:
        limit = DIMENSION_LIMIT
        reader.fault("pickle-limit", f"expected a {what} of at most {limit} dimensions, found {len(value)}")
    for n in value:
        if type(n) is not int:
            reader.fault("bad-pickle", f"expected a {what} of integers, found {describe(n)} in it")
    return tuple(value)


def _tensor(reader: Reader, args: Args, dtype: str | None = None) -> TensorRecord:
    """A record of (storage, offset, shape, strides), checked for their types only: its name, which messages
    about its numbers need, is known when the whole tree is."""
    source, offset, shape, strides = args
    if type(source) is not StorageRef:
        reader.fault("bad-pickle", f"expected a tensor's storage, found {describe(source)}")
    if type(offset) is not int:
        reader.fault("bad-pickle", f"expected an integer storage offset, found {describe(offset)}")
    sizes = _integers(reader, shape, "shape")
    steps = _integers(reader, strides, "strides")
    reader.count_tensor(len(sizes))
    element = dtype or source.dtype
    if element is None:
        reader.fault("bad-pickle", "expected a dtype for a tensor of an untyped storage, found none")
    return TensorRecord(source, element, offset, sizes, steps, reader.at)


def _arguments(reader: Reader, function: Global, args: Args, least: int, most: int) -> Args:
    if not least <= len(args) <= most:
        reader.fault("bad-pickle", f"expected {least} to {most} arguments for {function}, found {len(args)}")
    return args


def _tensor_v1(reader: Reader, function: Global, args: Args) -> object:
    return _tensor(reader, _arguments(reader, function, args, 4, 4))


def _tensor_v2(reader: Reader, function: Global, args: Args) -> object:
    made = _tensor(reader, _arguments(reader, function, args, 6, 7)[:4])
    return _lazily_negated(made, args[6:])


def _tensor_v3(reader: Reader, function: Global, args: Args) -> object:
    dtype = _arguments(reader, function, args, 7, 8)[6]
    if type(dtype) is not Global or dtype.module != "torch":
        reader.fault("bad-pickle", f"expected a torch dtype, found {describe(dtype)}")
    return _lazily_negated(_tensor(reader, args[:4], dtype.name), args[7:])


def _lazily_negated(tensor: TensorRecord, metadata: Args) -> TensorRecord:
    """torch can save a tensor whose sign or conjugation is still to be applied to the stored numbers."""
    flags = metadata[0] if metadata else None
    if type(flags) is dict and (flags.get("neg") or flags.get("conj")):
        tensor.odd = "lazily negated or conjugated"
    return tensor


def _odd(what: str) -> Meaning:
    def meaning(reader: Reader, function: Global, args: Args) -> object:
        return TensorRecord(None, "unknown", 0, (), (), reader.at, what)

    return meaning


def _parameter(reader: Reader, function: Global, args: Args) -> object:
    data = _arguments(reader, function, args, 1, 4)[0]
    if type(data) is not TensorRecord:
        reader.fault("bad-pickle", f"expected a parameter's tensor, found {describe(data)}")
    return data


def _typed_tensor(reader: Reader, function: Global, args: Args) -> object:
    """A tensor with attributes of its own, or of a subclass, whose attributes are dropped."""
    rebuild, kind, inner = _arguments(reader, function, args, 4, 4)[:3]
    meaning = MEANINGS.get((rebuild.module, rebuild.name)) if type(rebuild) is Global else None
    if meaning not in _REBUILDS or type(inner) is not tuple or type(rebuild) is not Global:
        reader.fault("bad-pickle", f"expected a function that rebuilds a tensor, found {describe(rebuild)}")
    made = meaning(reader, rebuild, inner)
    plain = (Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter"))
    if kind not in plain and type(made) is TensorRecord:
        made.odd = f"of the subclass {kind}" if type(kind) is Global else "of an unknown subclass"
    return made


_wrapper = _odd("a wrapper of another tensor")
_REBUILDS: tuple[Meaning, ...] = (_tensor_v1, _tensor_v2, _tensor_v3, _parameter, _wrapper)


# Plain data


def _mapping(reader: Reader, function: Global, args: Args) -> object:
    pairs = args[0] if args and function.name != "defaultdict" else []
    made: dict[object, object] = {}
    if type(pairs) is dict:
        pairs = list(pairs.items())
    if type(pairs) is not list and type(pairs) is not tuple:
        reader.fault("bad-pickle", f"expected a list of pairs for {function}, found {describe(pairs)}")
    for pair in pairs:
        if (type(pair) is not tuple and type(pair) is not list) or len(pair) != 2:
            reader.fault("bad-pickle", f"expected a pair of key and value, found {describe(pair)}")
        reader.set_items(made, list(pair))
    return made


def _size(reader: Reader, function: Global, args: Args) -> object:
    return _integers(reader, args[0] if len(args) == 1 else args, "torch.Size")


def _bytes(reader: Reader, function: Global, args: Args) -> object:
    """bytes and bytearray, and text that stands for bytes in protocol 2; never a length."""
    match args:
        case ():
            return b""
        case (bytes() as data,):
            return data
        case (str() as text, "latin1" | "latin-1"):
            reader.spend(len(text))
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError:
                reader.fault("bad-pickle", f"expected Latin-1 text for {function}, found other characters")
        case (int() as size, *_):
            reader.fault("pickle-limit", f"expected the content for {function}, found a length of {size}")
    return Inert(function, args, reader.at)


def _buffer(reader: Reader, function: Global, args: Args) -> object:
    """A tensor or storage made from a size is memory on the word of the file; none is needed to hold data."""
    if any(isinstance(a, int) for a in args):
        found = next(a for a in args if isinstance(a, int))
        reader.fault("pickle-limit", f"expected a stored tensor, found {function} of size {found}")
    return Inert(function, args, reader.at)


def enum_member(reader: Reader, function: Global, args: Args) -> object:
    """`getattr(Class, "NAME")`, as Python 3.11.0 to 3.11.3 wrote enum members, and the function with which
    time zones are made again. Any other counts as called."""
    match args:
        case (Global("zoneinfo", "ZoneInfo"), "_unpickle"):
            return Global("zoneinfo", "ZoneInfo._unpickle")
        case (Global() as owner, str() as name) if standing(owner) == "foreign" and not name.startswith("_"):
            return Inert(owner, (name,), reader.at)
    reader.called.add(function)
    return Inert(function, args, reader.at)


def _reconstructed(reader: Reader, function: Global, args: Args) -> object:
    """An object of protocol 0 or 1: (class, base class, base state)."""
    owner = _arguments(reader, function, args, 3, 3)[0]
    if type(owner) is not Global:
        reader.fault("bad-pickle", f"expected a class to reconstruct, found {describe(owner)}")
    return Inert(owner, args[1:], reader.at)


_BUILTINS = ("builtins", "__builtin__")
MEANINGS: dict[tuple[str, str], Meaning] = {
    ("torch._utils", "_rebuild_tensor"): _tensor_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed_tensor,
    ("torch._utils", "_rebuild_qtensor"): _odd("quantized"),
    ("torch._utils", "_rebuild_sparse_tensor"): _odd("sparse"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _odd("sparse"),
    ("torch._utils", "_rebuild_nested_tensor"): _odd("nested"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _wrapper,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _odd("meta"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _odd("of a device, stored as a numpy array"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _odd("of a device, stored as another tensor"),
    ("torch._utils", "_rebuild_xla_tensor"): _odd("of a device, stored as a numpy array"),
    ("torch", "Size"): _size,
    ("_codecs", "encode"): _bytes,
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): _mapping,
    **{(b, n): _bytes for b in _BUILTINS for n in ("bytes", "bytearray")},
    **{(b, "getattr"): enum_member for b in _BUILTINS},
    **{(b, "dict"): _mapping for b in _BUILTINS},
    ("copyreg", "_reconstructor"): _reconstructed,
    ("copy_reg", "_reconstructor"): _reconstructed,
    **{
        (m, n): _buffer
        for m in ("torch", "torch.cuda", "torch.storage", "torch._tensor", "torch.sparse")
        for n in (
            *_STORAGES,
            *(s.replace("Storage", "Tensor") for s in _STORAGES),
            "Tensor",
            "UntypedStorage",
        )
    },
}

# Plain data of Python and numpy: kept as inert records.
_DATA = {
    "argparse": {"Namespace"},
    "types": {"SimpleNamespace", "GenericAlias"},
    "collections": {
        *("OrderedDict", "defaultdict", "Counter", "deque", "ChainMap", "UserDict", "UserList", "UserString")
    },
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "zoneinfo": {"ZoneInfo", "ZoneInfo._unpickle"},
    "time": {"struct_time"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "random": {"Random"},
    "array": {"array", "_array_reconstructor"},
    "itertools": {"chain", "count", "cycle", "islice", "repeat"},
    "re": {"_compile"},
    "logging": {"getLogger"},
    **{
        module: {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"}
        for module in ("pathlib", "pathlib._local")  # where Python 3.13 has them
    },
    "uuid": {"UUID", "SafeUUID"},
    "signal": {"Signals"},  # Megatron's --exit-signal; on the list of its core/safe_globals.py (0.16.1)
    # The types that fields of saved settings are said to have: omegaconf's typing.Any, int | None, list[int].
    "typing": {
        *("Any", "Callable", "Dict", "FrozenSet", "Generic", "Iterable", "List", "Literal", "Mapping"),
        *("Optional", "Sequence", "Set", "Tuple", "Type", "TypeVar", "Union"),
    },
    **{module: {"getitem", "or_"} for module in ("operator", "_operator")},
    **{module: {"partial", "reduce"} for module in ("functools", "_functools")},
    "io": {"BytesIO"},
    "_io": {"BytesIO"},
    "_codecs": {"encode"},
    "copyreg": {"_reconstructor"},
    "copy_reg": {"_reconstructor"},
    **{
        module: {
            *("object", "set", "frozenset", "list", "dict", "tuple", "bytes", "bytearray", "complex"),
            *("bool", "int", "float", "str", "slice", "range", "long", "unicode", "NoneType"),
            *("xrange", "type", "reduce", "Ellipsis", "NotImplemented"),  # as protocol 2 calls them
        }
        for module in _BUILTINS
    },
    "torch": {"device", "Generator"},
    "torch.torch_version": {"TorchVersion"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    **{
        package: {"ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer"}
        for package in (
            *("numpy", "numpy.core.multiarray", "numpy._core.multiarray"),
            *("numpy.core.numeric", "numpy._core.numeric"),
        )
    },
    "numpy.ma.core": {"_mareconstruct"},
    "numpy.random": {"__RandomState_ctor"},  # before 1.17
    "numpy.random._pickle": {"__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor"},
    "numpy.random.bit_generator": {
        *("__pyx_unpickle_SeedSequence", "__pyx_unpickle_SeedlessSeedSequence", "SeedlessSequence"),
    },
}
# Classes of training that are saved whole.
_CLASSES = ("torch.optim.", "torch.amp.", "torch.cuda.amp.")

# Parts of Python that the running version no longer has, or had under another name.
_OLD_PYTHON = {
    "__builtin__",
    "copy_reg",
    "commands",
    "popen2",
    "cPickle",
    "imp",
    "distutils",
    "urllib2",
    "asyncore",
}


def standing(name: Global, *, called: bool = False) -> str:
    """ "known", "foreign" or "refused". Of torch and numpy only what is `called` can be refused: a dtype or
    an activation function may stand in saved arguments as a name."""
    if name.name in _DATA.get(name.module, ()):
        return "known"
    meaning = MEANINGS.get((name.module, name.name))
    root = name.module.partition(".")[0]
    if name.module.startswith(_CLASSES) and name.name[:1].isupper():
        return "known"
    if root in ("torch", "numpy"):
        return "known" if not called or meaning not in (None, _buffer) else "refused"
    if meaning is not None:
        return "known" if meaning is not enum_member or not called else "refused"
    return "refused" if root in sys.stdlib_module_names or root in _OLD_PYTHON else "foreign"
