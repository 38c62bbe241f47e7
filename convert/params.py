"""Hyper-parameters with their provenance: every value of a config is a `Value` that says in words where it
is from. What the user sets wins, then the checkpoint's own file, then a rule that the family documents;
what none of them tells is asked for by name. Problems are collected, so that all are shown at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.checkpoint import strict_json
from ckpt_tool.convert.facts import read_as, same
from ckpt_tool.convert.facts_classes import Class
from ckpt_tool.convert.facts_rotary import OBJECTS, ROTARY, one_rope
from ckpt_tool.convert.plan import Value
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all, near, printable

SET = "--set"
NO_CONFIG = "put config.json of the model beside the weights, or give it by --config: they are then taken"
MAX_COUNT = 2**31
UNKNOWN = Value(1, "unknown")  # stands in for a value that was refused, until `check` raises

# Keys of a whole config.json given with --config that say nothing about the numbers: the dtype is that of the
# tensors (or --dtype), the rest is bookkeeping.
BOOKKEEPING = frozenset(
    ("transformers_version", "_name_or_path", "_commit_hash", "torch_dtype", "dtype", "_attn_implementation")
)

Read = Callable[[Mapping[str, Any], str, str], Any]  # (object, key, file) -> the typed value
# What stands where nothing is said, None to ask; a function is called only then.
Silent = Value | Callable[[], Value | None] | None


class Facts:
    """The hyper-parameters of one checkpoint while a family collects them.

    `document` is the parsed file that came with the weights (None when there is none), `file` its name;
    objects inside it are read under dotted keys ("moe.num_experts"). `settings` are the user's, in Hugging
    Face config names, `rotary` what the class calls `facts.ROTARY`, `places` the (file, key) of values that
    are from another file, or under another key. Each getter takes that name and the file's own keys for the
    same thing.
    """

    def __init__(
        self,
        document: Mapping[str, Any] | None,
        file: str,
        settings: Mapping[str, Any],
        rotary: Mapping[str, str] | None = None,
        places: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        fail_all(of_rotary(settings, rotary or {}, SET, "usage"))
        for name, said in ((file, document or {}), (SET, settings)):
            if not isinstance(said.get("rope_parameters"), Mapping | None):
                message = f"expected an object or null, found {shown(said['rope_parameters'])}"
                fail("bad-config", message, file=name, where="rope_parameters")
        self.document = None if document is None else _flat(document, rotary)
        self.file = file
        self.places = places or {}
        self.settings = one_rope(settings, rotary)
        self.problems: list[Problem] = []
        self.used: set[str] = set()
        self.notes: list[str] = []  # what was left out on reading the file

    def integer(
        self,
        name: str,
        *keys: str,
        rule: Silent = None,
        ask: str = "an integer",
        minimum: int = 1,
        maximum: int = MAX_COUNT,
        text_ok: bool = False,
        kind: str = "config-mismatch",
    ) -> Value:
        """A count. Outside `minimum..maximum` is a problem of `kind`, another type a `bad-config`."""

        def read(obj: Mapping[str, Any], key: str, file: str) -> int:
            if type(obj[key]) is int and not minimum <= obj[key] <= maximum:
                message = f"expected an integer from {minimum} to {maximum}, found {obj[key]}"
                raise CkptToolError(Problem(kind, message, file, key))
            return strict_json.integer(obj, key, file=file, minimum=minimum, maximum=maximum, text_ok=text_ok)

        return self._take(name, keys, read, rule, ask)

    def number(self, name: str, *keys: str, rule: Silent = None, ask: str = "a number") -> Value:
        """A finite number above 0."""

        def read(obj: Mapping[str, Any], key: str, file: str) -> float:
            return strict_json.number(obj, key, file=file)

        return self._take(name, keys, read, rule, ask)

    def boolean(self, name: str, *keys: str, rule: Silent) -> Value:
        def read(obj: Mapping[str, Any], key: str, file: str) -> bool:
            return strict_json.boolean(obj, key, file=file)

        return self._take(name, keys, read, rule, "true or false")

    def token_ids(self, name: str, *keys: str, rule: Silent) -> Value:
        """One token id, or a list of them."""

        def read(obj: Mapping[str, Any], key: str, file: str) -> int | list[int]:
            many = obj[key] if isinstance(obj[key], list) else [obj[key]]
            ids = [strict_json.integer({key: i}, key, file=file, minimum=0, maximum=MAX_COUNT) for i in many]
            return ids if isinstance(obj[key], list) else ids[0]

        return self._take(name, keys, read, rule, "a token id")

    def anything(self, name: str, *keys: str, rule: Silent = None, ask: str = "a value") -> Value:
        """A value whose form the caller checks; null counts as given."""
        return self._take(name, keys, lambda obj, key, _: obj[key], rule, ask, null=True)

    def like(self, name: str, default: Any, why: str) -> Value:
        """A value that does not change what the model computes: `default`, unless set to another of its
        type."""
        if isinstance(default, bool):
            return self.boolean(name, rule=Value(default, why))

        def read(obj: Mapping[str, Any], key: str, file: str) -> float:
            return strict_json.number(obj, key, file=file, positive=False)

        return self._take(name, (), read, Value(default, why), "a number")

    def fixed(self, name: str, value: Any, why: str, *keys: str) -> Value:
        """A value the family writes whatever the checkpoint; the file may only repeat it, unless the user
        says that it is so all the same."""
        self.used.update(keys)
        for obj, key, file in self._places(name, keys, null=False)[:1]:
            if not same(obj[key], value):
                hint = None if file == SET else f"--set {name}={shown(value)} if the file is wrong"
                message = f"expected {shown(value)}, found {shown(obj[key])}"
                self._problem("unsupported", message, file, key, hint)
        return Value(value, why)

    def given(self, *keys: str) -> bool:
        """Whether the file has one of `keys` with a value other than null."""
        return self.document is not None and any(self.document.get(k) is not None for k in keys)

    def refuse(self, kind: str, message: str, where: str, hint: str | None = None) -> None:
        self._problem(kind, message, None if self.document is None else self.file, where, hint)

    def check(self) -> None:
        """Raise what was collected so far."""
        fail_all(dict.fromkeys(self.problems))

    def check_settings(self, known: Iterable[str]) -> None:
        """Collect a problem for each setting that no getter knows."""
        names = sorted(known)
        for name in self.settings.keys() - {*names, *BOOKKEEPING}:
            meant = near(name, names)
            wanted = "the name of a value of this config" if meant else f"one of {', '.join(names)}"
            self._problem("usage", f"expected {wanted}, found {printable(name, 60)}", SET, name, meant)

    def _problem(
        self, kind: str, message: str, file: str | None, where: str, hint: str | None = None
    ) -> None:
        self.problems.append(self._placed(Problem(kind, message, file, where, hint)))

    def _placed(self, problem: Problem) -> Problem:
        """With the file and the key that a value is from."""
        if problem.where is None or problem.file != self.file or problem.where not in self.places:
            return problem
        file, key = self.places[problem.where]
        return replace(problem, file=file, where=key)

    def _places(
        self, name: str, keys: tuple[str, ...], null: bool
    ) -> list[tuple[Mapping[str, Any], str, str]]:
        found: list[tuple[Mapping[str, Any], str, str]] = []
        if name in self.settings:
            found.append((self.settings, name, SET))
        document = self.document or {}
        found += [
            (document, k, self.file) for k in keys if k in document and (null or document[k] is not None)
        ]
        return found

    def _take(
        self, name: str, keys: tuple[str, ...], read: Read, rule: Silent, ask: str, null: bool = False
    ) -> Value:
        self.used.update(keys)
        places = self._places(name, keys, null)
        if not places:
            if (found := rule() if callable(rule) else rule) is not None:
                return self._with_null(found, keys)
            where = keys[0] if keys and self.document is not None else name
            file = None if self.document is None else self.file
            self._problem("missing-fact", f"expected {ask}, found none", file, where, f"--set {name}=VALUE")
            return UNKNOWN
        obj, key, file = places[0]
        inside = [(k, o[k]) for o, k, f in places if f == self.file]
        if file != SET and any(value != inside[0][1] for _, value in inside[1:]):
            both = " and ".join(f"{k} = {shown(v)}" for k, v in inside)
            message, hint = f"expected one value, found {both}", f"--set {name}=VALUE says which"
            self._problem("bad-config", message, self.file, inside[0][0], hint)
        try:
            return Value(read(obj, key, file), SET if file == SET else self._source(key))
        except CkptToolError as error:
            self.problems += map(self._placed, error.problems)
            return UNKNOWN

    def _with_null(self, found: Value, keys: tuple[str, ...]) -> Value:
        """What stands where the file is silent, which says so where it has the key and no value."""
        nulls = [k for k in keys if k in (self.document or {})]
        if not nulls or found.value is None or any(k in found.source for k in nulls):
            return found
        return replace(found, source=f"{found.source}; {nulls[0]} is null in {self.file}")

    def _source(self, key: str) -> str:
        return ": ".join(self.places.get(key, (self.file, key)))


def renamed(settings: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The user's settings, those in `names` under the name there. `usage` for two values of one thing."""
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in settings.items():
        other = names.get(name, name)
        if found.setdefault(other, value) != value:
            message = (
                f"expected one value, found {said[other]} {shown(found[other])} and {name} {shown(value)}"
            )
            fail("usage", message, file=SET, where=name)
        said[other] = name
    return found


def of_rotary(
    values: Mapping[str, Any], rotary: Mapping[str, str], file: str, kind: str
) -> Iterator[Problem]:
    """Rotary values that `values` say twice and differently, a problem of `kind`, or as nobody reads them."""
    own = replace(_SETTINGS, aliases={name: (other,) for name, other in rotary.items()})
    found = read_as({k: v for k, v in values.items() if k in (*OBJECTS, *ROTARY, *rotary.values())}, own)
    for c in found.contradictions:
        (a, x, _), (b, y, _) = c.first, c.second
        message = f"expected one value, found {a} {shown(x)} and {b} {shown(y)}"
        yield Problem(kind, message, file, c.name, f"--set {c.name}=VALUE says which")
    for w in found.wrong:
        if w.where in OBJECTS:
            yield Problem(w.kind, w.text, file, w.where)


_SETTINGS = Class(
    SET,
    {"rope_theta": None, "rope_scaling": None},
    dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")),
)


def left_out(file: str, name: str, value: Any) -> str:
    """A note on what a file says and the user sets to null: no field reads it, and nobody here knows it."""
    return f"{file}: {printable(name, 60)} {shown(value)} is left out (--set {printable(name, 60)}=null)"


def overridden(*names: str) -> str:
    """A hint: values of config.json that a user may say otherwise than the file or the rule."""
    return f"{' or '.join(f'--set {n}=VALUE' for n in names)} overrides what the file or the rule says"


LONG = 1000  # characters


def shown(value: Any) -> str:
    """A value in a message, as JSON."""
    if isinstance(value, str) and len(value) > LONG:  # not copied: a file may hold 16 MiB of it
        return f"{printable(json.dumps(value[:30])[:-1])}… ({len(value)} characters)"
    return printable(json.dumps(value, default=repr), 60)


def opened(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The document with what is under `model`, where some exports nest everything."""
    inner = document.get("model")
    if not isinstance(inner, dict):
        return document
    return {**inner, **{k: v for k, v in document.items() if k != "model"}}


def _flat(document: Mapping[str, Any], rotary: Mapping[str, str] | None) -> dict[str, Any]:
    """The document with `model` and `moe` opened up, and the rotary values in one place."""
    flat = dict(one_rope(opened(document), rotary))
    moe = flat.pop("moe", None)
    if isinstance(moe, dict):
        flat.update({f"moe.{k}": v for k, v in moe.items()})
    elif moe is not None:
        flat["moe"] = moe
    return flat
