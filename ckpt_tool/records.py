"""`dataclass` whose methods are written when the first instance is made.

A command makes instances of a third of the classes that it imports, and the methods of one take half a
millisecond to write: a third of the time to start. Until then a class has an `__init__` that finishes it, and
what looks at it as a dataclass does so too (`fields`, a subclass, `inspect.signature`, a pattern), as does
unpickling, which makes instances without `__init__`. One with slots becomes another class, and is finished
at once.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

_lock = threading.RLock()
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
    def finish() -> None:
        with _lock:
            if cls.__dict__["__init__"] is init:
                _finish(cls, options)

    def init(self: object, *values: Any, **named: Any) -> None:
        finish()
        cls.__init__(self, *values, **named)

    cls.__init__ = init
    for name in _ASKED:
        if name not in cls.__dict__:
            setattr(cls, name, _Pending(name, finish))
    return cls


def _finish(cls: Any, options: Mapping[str, Any]) -> None:
    """Take what dataclasses writes from a twin, `__init__` last: until then another thread that makes an
    instance waits in the one that is there."""
    asked = [name for name in _ASKED if isinstance(cls.__dict__.get(name), _Pending)]
    left_out = {"__init__", "__dict__", "__weakref__", *asked}
    own = {name: value for name, value in cls.__dict__.items() if name not in left_out}
    own["__qualname__"] = cls.__qualname__
    own["__doc__"] = cls.__doc__ or " "  # a signature for it takes longer than all else
    twin = dataclasses.dataclass(type(cls)(cls.__name__, cls.__bases__, own), **options)
    made = twin.__dict__
    for name in made["__dataclass_fields__"]:
        if isinstance(own.get(name), dataclasses.Field):  # which says how to make the value
            setattr(cls, name, made[name]) if name in made else delattr(cls, name)
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


# mypy knows what it means; release 3.14 keeps annotations in another place, and nobody has tried this there.
if TYPE_CHECKING or sys.version_info >= (3, 14):
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls=None, /, **options):
        """As in dataclasses. Where that would look at the class at once, it does."""
        if cls is None:
            return partial(dataclass, **options)
        at_once = options.keys() & {"slots", "init", "weakref_slot"} or "__init__" in cls.__dict__
        return dataclasses.dataclass(cls, **options) if at_once else _later(cls, options)
