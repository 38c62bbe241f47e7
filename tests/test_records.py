"""Dataclasses that are finished late are those of the standard library once anybody looks."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import field
from functools import cached_property
from typing import Any, ClassVar

import pytest

from ckpt_tool import records

Decorator = Callable[..., Any]


def classes(dataclass: Decorator) -> dict[str, Any]:
    """The same classes by either decorator."""

    @dataclass
    class Plain:
        a: int
        b: list[int] = field(default_factory=list)
        c: str = "c"
        kind: ClassVar[str] = "k"

        @cached_property
        def twice(self) -> int:
            return 2 * self.a

    @dataclass(frozen=True)
    class Frozen:
        """Told."""

        a: int
        b: int = field(default=3, repr=False, compare=False)

        def __post_init__(self) -> None:
            object.__setattr__(self, "a", self.a + 1)

    @dataclass(frozen=True)
    class Under(Frozen):
        d: str = "d"

        def more(self) -> str:
            return super().__repr__() + self.d

    @dataclass(frozen=True, slots=True)
    class Slotted(Frozen):
        e: int = 0

    @dataclass(order=True, kw_only=True)
    class Ordered:
        x: int
        y: float = 0.5

    @dataclass(eq=False, repr=False)
    class Bare(ABC):
        x: int

        @abstractmethod
        def told(self) -> str: ...

    class Own(Bare):
        def __init__(self) -> None:
            super().__init__(7)

        def told(self) -> str:
            return str(self.x)

    class Loose(Frozen):
        pass

    assert Frozen.__doc__ == "Told."
    return {c.__name__: c for c in (Plain, Frozen, Under, Slotted, Ordered, Own, Loose)}


MADE: dict[str, Callable[[Any], list[Any]]] = {
    "Plain": lambda c: [c(1), c(1, [2]), c(1, b=[2], c="x"), c(a=1)],
    "Frozen": lambda c: [c(1), c(1, 4), c(a=2)],
    "Under": lambda c: [c(1), c(1, 4, "e"), c(1, d="e")],
    "Slotted": lambda c: [c(1), c(1, 4, 5)],
    "Ordered": lambda c: [c(x=1), c(x=1, y=0.25), c(x=0)],
    "Own": lambda c: [c()],
    "Loose": lambda c: [c(1), c(2)],
}


def fresh(cls: type, **options: bool) -> Any:
    """The class of that name and body, not yet finished."""
    body = {k: v for k, v in cls.__dict__.items() if not k.startswith("__") or k == "__setstate__"}
    body |= {"__annotations__": cls.__annotations__, "__module__": cls.__module__}
    return records.dataclass(type(cls.__name__, (), body), **options)


def tried(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (TypeError, AttributeError) as error:
        return type(error), str(error)


def looks(cls: Any, instances: list[Any]) -> list[Any]:
    """What is seen of a class and its instances."""
    seen: list[Any] = [str(inspect.signature(cls)), getattr(cls, "__match_args__", None)]
    seen += [[(f.name, f.type, f.repr, f.compare, f.kw_only) for f in dataclasses.fields(cls)]]
    seen += [hasattr(cls, name) for name in ("a", "b", "c", "x", "y")]
    seen += [cls.__dict__.keys() - {"__init__"}]  # copy.replace asks for one more from 3.13 on
    for x in instances:
        seen += [repr(x).partition(" object at")[0], dataclasses.asdict(x), getattr(x, "twice", None)]
        seen += [[x == y for y in instances], tried(lambda x=x: [x < y for y in instances])]
        seen += [tried(lambda x=x: isinstance(hash(x), int)), tried(lambda x=x: setattr(copy(x), "a", 5))]
        seen += [tried(lambda x=x: setattr(copy(x), "other", 5)), tried(lambda x=x: delattr(copy(x), "a"))]
        seen += [tried(lambda x=x: x.more()), tried(lambda: cls(1, 2, 3, 4, 5, 6))]
    return seen


@pytest.mark.parametrize("name", MADE)
def test_a_class_is_what_the_standard_library_makes(name: str) -> None:
    expected, found = (classes(d)[name] for d in (dataclasses.dataclass, records.dataclass))
    assert looks(found, MADE[name](found)) == looks(expected, MADE[name](expected))


@pytest.mark.parametrize(
    "look",
    [
        dataclasses.fields,
        inspect.signature,
        dataclasses.is_dataclass,
        lambda c: c.__match_args__,
        lambda c: c(1),
    ],
    ids=["fields", "signature", "is_dataclass", "match", "instance"],
)
def test_a_class_is_finished_when_it_is_looked_at(look: Callable[[Any], object]) -> None:
    Frozen = classes(records.dataclass)["Frozen"]
    assert "__eq__" in Frozen.__dict__  # what is derived of it has looked
    made = records.dataclass(type("One", (), {"__annotations__": {"a": "int"}, "__module__": __name__}))
    assert "__eq__" not in made.__dict__
    look(made)
    assert "__eq__" in made.__dict__ and made(1) == made(1)
    assert str(inspect.signature(made)).startswith("(a: 'int')")


class Sent:
    a: int
    b: str = "b"


class SentItself:
    a: int

    def __setstate__(self, state: dict[str, int]) -> None:
        self.a = state["a"] + 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_another_process_sent_is_equal_hashed_and_told_as_here(
    protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unpickling calls no `__init__`."""
    for cls in (Sent, SentItself):
        monkeypatch.setattr(sys.modules[__name__], cls.__name__, fresh(cls, frozen=cls is Sent))
    sent = pickle.dumps([Sent(1), {Sent(1): "x"}, SentItself(1)], protocol)
    for cls in (Sent, SentItself):  # as in a process that has made none yet
        monkeypatch.setattr(sys.modules[__name__], cls.__name__, fresh(cls, frozen=cls is Sent))
    one, held, itself = pickle.loads(sent)
    assert held[one] == "x" and repr(one) == "Sent(a=1, b='b')" and itself.a == 2
    assert one == Sent(1) and hash(one) == hash(Sent(1)) and not hasattr(Sent, "__setstate__")


def test_threads_that_make_the_first_instance_together_all_get_one() -> None:
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            made = records.dataclass(
                type("One", (), {"__annotations__": {"a": "int"}, "__module__": __name__})
            )
            barrier, got = threading.Barrier(4), []

            def make(made: Any = made, barrier: Any = barrier, got: Any = got) -> None:
                barrier.wait()
                got.append(made(1).a)

            threads = [threading.Thread(target=make) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert got == [1] * 4
    finally:
        sys.setswitchinterval(switch)
