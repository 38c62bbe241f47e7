"""`dataclass` whose methods are written when they are needed.

A command makes instances of a third of the classes that it imports, compares and prints those of a few, and
all methods of one take half a millisecond to write: a third of the time to start. The first instance gets its
class an `__init__`, a third of that half; the first that is compared, hashed or printed gets it all others.
Until then what looks at a class as a dataclass finishes it (a subclass, `inspect.signature`), as does
unpickling, which makes instances without `__init__`. One with slots becomes another class, and is finished at
once. An instance that a subclass makes without this `__init__`, and is no dataclass, is not seen: none may.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

_lock = threading.RLock()
_UNSET = object()  # a parameter whose value is made
_ASKED = ("__dataclass_params__", "__match_args__", "__signature__", "__dataclass_fields__", "__setstate__")
_WRITTEN = ("__repr__", "__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__", "__replace__")


class _Pending:
    """What is asked of a class that is not finished: finishes it, and answers."""

    def __init__(self, name: str, finish: Callable[[], None]) -> None:
        self.name, self.finish = name, finish

    def __get__(self, _: object, owner: type) -> Any:
        self.finish()
        return getattr(owner, self.name)


def _later(cls: Any, options: Mapping[str, Any]) -> Any:
    body: dict[str, Any] | None = None  # of a class that has been begun
    finished = False

    def finish() -> None:
        nonlocal finished
        with _lock:
            if not finished:
                _finish(cls, options, body)
                finished = True

    def init(self: object, *values: Any, **named: Any) -> None:
        nonlocal body
        with _lock:
            if cls.__dict__["__init__"] is init:
                own = _body(cls)
                if _begin(cls, own, options, finish):
                    body = own
                else:
                    finish()
        cls.__init__(self, *values, **named)

    cls.__init__ = init
    for name in _ASKED:
        if name not in cls.__dict__:
            setattr(cls, name, _Pending(name, finish))
    return cls


def _body(cls: Any) -> dict[str, Any]:
    """What the source says of the class."""
    asked = [name for name in _ASKED if isinstance(cls.__dict__.get(name), _Pending)]
    left_out = {"__init__", "__dict__", "__weakref__", *asked}
    own = {name: value for name, value in cls.__dict__.items() if name not in left_out}
    own["__qualname__"] = cls.__qualname__
    own["__doc__"] = cls.__doc__ or " "  # a signature for it takes longer than all else
    return own


def _begin(cls: Any, body: Mapping[str, Any], options: Mapping[str, Any], finish: Callable[[], None]) -> bool:
    """Give the class what an instance needs to be made and read, `__init__` last; whoever first compares,
    hashes or prints one calls `finish`. False, and nothing done, for classes of rarer kinds."""
    told = " ".join(map(str, body.get("__annotations__", {}).values()))
    derived = any(hasattr(base, "__dataclass_fields__") for base in cls.__bases__)
    if derived or options.keys() - {"frozen", "eq", "repr"} or "InitVar" in told or "KW_ONLY" in told:
        return False
    twin = dataclasses.dataclass(
        type(cls)(cls.__name__, cls.__bases__, dict(body)), init=False, repr=False, eq=False
    )
    made, fields = twin.__dict__, dataclasses.fields(twin)
    if any(f.kw_only or f.name == "self" for f in fields):
        return False
    _set_defaults(cls, body, made)
    frozen, eq = options.get("frozen", False), options.get("eq", True)
    hashed = "__hash__" in body and not (body["__hash__"] is None and "__eq__" in body)
    wanted = ["__repr__"] * options.get("repr", True) + ["__eq__"] * eq
    wanted += ["__replace__"] * (sys.version_info >= (3, 13))
    for name in (n for n in wanted if n not in body):
        setattr(cls, name, _stub(cls, name, finish))
    if eq and not hashed:
        cls.__hash__ = _stub(cls, "__hash__", finish) if frozen else None
    if frozen:
        cls.__setattr__, cls.__delattr__ = _refusals(cls, made["__dataclass_fields__"])
    for name in ("__dataclass_fields__", "__match_args__"):
        if name in made:
            setattr(cls, name, made[name])
    cls.__init__ = _init(cls, fields, frozen)
    return True


def _stub(cls: Any, name: str, finish: Callable[[], None]) -> Callable[..., Any]:
    """Stands for a method that is not written yet."""

    def stub(self: object, *others: object, **named: object) -> Any:
        finish()
        return getattr(cls, name)(self, *others, **named)

    return stub


def _init(cls: Any, fields: Iterable[dataclasses.Field[Any]], frozen: bool) -> Callable[..., None]:
    """The `__init__` that dataclasses writes, for fields by position."""
    known: dict[str, Any] = {"_set_field": object.__setattr__, "_unset_field": _UNSET}
    head, lines = ["self"], []
    for f in fields:
        value = f.name
        if f.default_factory is not dataclasses.MISSING:
            known[f"_make_{f.name}"] = f.default_factory
            value = f"_make_{f.name}()" + f" if {f.name} is _unset_field else {f.name}" * f.init
            head += [f"{f.name}=_unset_field"] * f.init
        elif f.default is not dataclasses.MISSING:
            known[f"_value_{f.name}"] = f.default
            head += [f"{f.name}=_value_{f.name}"] * f.init
        else:
            head += [f.name] * f.init
        if f.init or f.default_factory is not dataclasses.MISSING:
            lines.append(f"_set_field(self, {f.name!r}, {value})" if frozen else f"self.{f.name} = {value}")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    text = f"def made({', '.join(known)}):\n def __init__({', '.join(head)}):\n  "
    space: dict[str, Any] = {}
    exec(text + "\n  ".join(lines or ["pass"]) + "\n return __init__", space)  # names of fields only
    init: Callable[..., None] = space["made"](**known)
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    return init


def _set_defaults(cls: Any, body: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """In place of what says how to make a field's value, that value, if it is one."""
    for name in made["__dataclass_fields__"]:
        if isinstance(body.get(name), dataclasses.Field):
            setattr(cls, name, made[name]) if name in made else delattr(cls, name)


def _finish(cls: Any, options: Mapping[str, Any], begun: Mapping[str, Any] | None) -> None:
    """Take what dataclasses writes from a twin, `__init__` last: until then another thread that makes an
    instance waits in the one that is there. `begun` is the body of a class whose fields are there."""
    asked = [name for name in _ASKED if isinstance(cls.__dict__.get(name), _Pending)]
    own = _body(cls) if begun is None else begun
    twin = dataclasses.dataclass(type(cls)(cls.__name__, cls.__bases__, dict(own)), **options)
    made = twin.__dict__
    if begun is None:
        _set_defaults(cls, own, made)
    for name in _WRITTEN:
        if name in made and made[name] is not own.get(name, twin):
            setattr(cls, name, made[name])
    if options.get("frozen"):
        cls.__setattr__, cls.__delattr__ = _refusals(cls, made["__dataclass_fields__"])
    for name in asked:
        setattr(cls, name, made[name]) if name in made else delattr(cls, name)
    cls.__init__ = made["__init__"]


def _refusals(cls: Any, names: Collection[str]) -> tuple[Callable[..., None], Callable[..., None]]:
    """`__setattr__` and `__delattr__` of a frozen class with these fields."""

    def set_(self: object, name: str, value: object) -> None:
        if type(self) is cls or name in names:
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
        super(cls, self).__setattr__(name, value)

    def delete(self: object, name: str) -> None:
        if type(self) is cls or name in names:
            raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
        super(cls, self).__delattr__(name)

    return set_, delete


def _fits(cls: Any) -> bool:
    """Whether nobody would notice: an object without fields is unpickled without a look at its class, slots
    are there once, and bases that are told of subclasses would be told of the twin."""
    told = any("__init_subclass__" in base.__dict__ for base in cls.__mro__[1:-1])
    body = cls.__dict__
    return not (told or "__init__" in body or "__slots__" in body or not body.get("__annotations__"))


# mypy knows what it means; release 3.14 keeps annotations in another place, and nobody has tried this there.
if TYPE_CHECKING or sys.version_info >= (3, 14):
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls=None, /, **options):
        """As in dataclasses. Where that would look at the class at once, it does."""
        if cls is None:
            return partial(dataclass, **options)
        at_once = options.keys() & {"slots", "init", "weakref_slot"} or not _fits(cls)
        return dataclasses.dataclass(cls, **options) if at_once else _later(cls, options)
