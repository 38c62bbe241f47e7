"""What a pickle becomes here: plain values, and these records. None of them can be called or compared deeply.

Plain values are None, bool, int, float, str, bytes, list, tuple and dict (keys str, int or bytes). A value
that the file holds once and refers to twice is one object with two owners, so walk a tree by identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpt_tool.records import dataclass


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle asked to import. It was not."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False, repr=False)
class Inert:
    """An object that the pickle asked to make by calling `type` with `args`; nobody did.

    `state` is what would have been set on it, `items` what would have been appended (pairs for a mapping),
    `at` the byte of the pickle where it was asked for."""

    type: Global
    args: tuple[object, ...]
    at: int
    state: object = None
    items: list[object] | None = None

    @property
    def fields(self) -> Mapping[str, object]:
        """The attributes by name: an argparse.Namespace's arguments, say. Empty where it has none."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        return {k: v for part in parts if isinstance(part, dict) for k, v in part.items() if type(k) is str}

    def __repr__(self) -> str:
        return f"<inert {self.type}>"


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage as tensors name it. `numel` counts elements of `dtype`, a torch dtype name; an untyped
    storage has dtype None and counts bytes. `view` is a legacy sub-range: (its own key, first element,
    elements)."""

    key: str
    dtype: str | None
    location: str
    numel: int
    view: tuple[str, int, int] | None = None


@dataclass(slots=True, eq=False, repr=False)
class TensorRecord:
    """A strided tensor; offset and strides count elements. Its numbers are as the file has them, unchecked.

    `odd` says in words what makes it no dense tensor with a storage ("sparse", "meta"); then `storage` is
    None and the numbers mean nothing. `at` is the byte of the pickle that made it."""

    storage: StorageRef | None
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    at: int
    odd: str | None = None

    def __repr__(self) -> str:
        return f"<tensor {self.dtype} {self.shape}>"


@dataclass(frozen=True)
class Limits:
    """What a pickle may ask for; beyond it the kind is `pickle-limit`. `string` and `integer_bits` limit what
    is kept of values, and what names and indices may be."""

    opcodes: int = 5_000_000
    nesting: int = 200
    memo: int = 1_000_000
    string: int = 1 << 20  # bytes of one string or name
    tensors: int = 1_000_000
    integer_bits: int = 64
    memory: int = 176 << 20  # bytes of the pickle and of all objects made from it, estimated


LIMITS = Limits()


@dataclass(frozen=True)
class Pickled:
    """One pickle, read. `imports` maps each global to the byte that first names it, `called` lists those that
    an object was to be made with; `storages` is by key; `end` is the byte after the pickle."""

    value: object
    imports: dict[Global, int]
    called: frozenset[Global]
    storages: dict[str, StorageRef]
    end: int


def describe(value: object) -> str:
    """A few words for a message; never looks inside a container."""
    match value:
        case None | bool():
            return str(value)
        case int() | float():
            return f"the number {value}"
        case Global():
            return f"the global {value}"
        case Inert():
            return f"an object made by {value.type}"
        case TensorRecord():
            return "a tensor"
        case StorageRef():
            return "a storage"
        case _:
            return f"a {type(value).__name__}"


def is_flat(value: object) -> bool:
    """Whether it is a plain value without parts, a record, or a short tuple of these."""
    flat = value if type(value) is tuple else (value,)
    known = (str, bytes, int, float, bool, Global, Inert)
    return len(flat) <= 64 and all(v is None or type(v) in known for v in flat)


def children(value: object) -> Iterator[tuple[str, object]]:
    """(step of a path, value) for everything directly inside `value`, except dict keys."""
    if type(value) is dict:
        for key, item in value.items():
            yield f".{key}" if type(key) is str else f"[{key!r}]", item
    elif type(value) is list or type(value) is tuple:
        for i, item in enumerate(value):
            yield f"[{i}]", item
    elif type(value) is Inert:
        yield "(arguments)", value.args
        yield "(state)", value.state
        yield "(items)", value.items


# Where omegaconf's containers and leaves keep what they wrap.
_WRAPPED = ("_content", "_val")


def plain(value: object, depth: int = 16) -> object:
    """`value` in dicts, lists, numbers, strings, booleans and None: an inert object becomes the dict of its
    attributes, one of omegaconf what it wraps. What is none of these, or deeper than `depth`, is left out."""
    if depth == 0:
        return None
    if type(value) is Inert:
        wrapped = next((key for key in _WRAPPED if key in value.fields), None)
        return plain(value.fields if wrapped is None else value.fields[wrapped], depth - 1)
    if isinstance(value, Mapping):
        return {k: plain(v, depth - 1) for k, v in value.items() if type(k) is str}
    if isinstance(value, list | tuple):
        return [plain(v, depth - 1) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else None
