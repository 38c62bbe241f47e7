"""YAML as training programs dump it, read as data: values made here of the events of PyYAML's parser.

Nothing is constructed of a tag: plain scalars become null, true, numbers and text as PyYAML's safe loader
takes them, everything else is refused by its tag. Records that a program would call (`_target_`, `_partial_`,
`_args_`) are mappings like any other. An alias costs what it stands for, so that a file of a few hundred
bytes cannot stand for a billion values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from ckpt_tool.errors import fail, printable

MAX_BYTES = 4 << 20
MAX_DEPTH = 48
MAX_VALUES = 200_000  # aliases counted with all that they stand for
_PLAIN = frozenset(f"tag:yaml.org,2002:{t}" for t in ("null", "bool", "int", "float", "str", "map", "seq"))
# YAML 1.1, which PyYAML reads, wants a dot in it; OmegaConf and people do not.
_EXPONENT = re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+", re.ASCII)
_DATE = "tag:yaml.org,2002:timestamp"


def read_yaml(data: bytes, *, file: str) -> dict[str, Any]:
    """The mapping that one YAML document holds; keys that are no text become it. `bad-config` where it is
    none, holds a key twice, or a tag; `limits` where it is larger or deeper than any run's settings."""
    if len(data) > MAX_BYTES:
        fail("limits", f"expected at most {MAX_BYTES} bytes of YAML, found {len(data)}", file=file)
    value = _Builder(file).document(data)
    if not isinstance(value, dict):
        fail("bad-config", f"expected a mapping of settings, found {type(value).__name__}", file=file)
    return value


class _Builder:
    """One document being read. `sizes` has for each anchor how many values it stands for."""

    def __init__(self, file: str) -> None:
        import yaml

        self.file = file
        self.yaml = yaml
        self.resolver = yaml.resolver.Resolver()
        self.scalars = yaml.constructor.SafeConstructor()
        self.anchors: dict[str, Any] = {}
        self.sizes: dict[str, int] = {}
        self.count = 0

    def document(self, data: bytes) -> Any:
        try:
            events = self.yaml.parse(data, Loader=getattr(self.yaml, "CSafeLoader", self.yaml.SafeLoader))
            values = [self.value(e, events, 0) for e in events if isinstance(e, self.yaml.NodeEvent)]
        except self.yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = "" if mark is None else f" in line {mark.line + 1}"
            said = getattr(error, "problem", None) or getattr(error, "reason", None) or "another"
            told = printable(said, 80).removeprefix("found ")
            fail("bad-config", f"expected YAML, found {told}{place}", file=self.file)
        if len(values) != 1:
            fail("bad-config", f"expected one YAML document, found {len(values)}", file=self.file)
        return values[0]

    def value(self, event: Any, events: Iterator[Any], depth: int) -> Any:
        if depth > MAX_DEPTH:
            fail("limits", f"expected at most {MAX_DEPTH} levels of YAML, found more", file=self.file)
        if isinstance(event, self.yaml.AliasEvent):
            if event.anchor not in self.sizes:
                self.refuse(event, f"expected an anchor called {printable(event.anchor, 40)}, found none")
            self.add(self.sizes[event.anchor])
            return self.anchors[event.anchor]
        before = self.count
        self.add(1)
        if isinstance(event, self.yaml.ScalarEvent):
            made = self.scalar(event)
        elif isinstance(event, self.yaml.SequenceStartEvent):
            self.check_tag(event, "seq")
            made = [self.value(e, events, depth + 1) for e in self.until(events, self.yaml.SequenceEndEvent)]
        else:
            self.check_tag(event, "map")
            made = self.mapping(event, events, depth)
        if event.anchor is not None:
            self.anchors[event.anchor], self.sizes[event.anchor] = made, self.count - before
        return made

    def until(self, events: Iterator[Any], end: type) -> Iterator[Any]:
        for event in events:
            if isinstance(event, end):
                return
            yield event

    def mapping(self, event: Any, events: Iterator[Any], depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for e in self.until(events, self.yaml.MappingEndEvent):
            key = self.value(e, events, depth + 1)
            if isinstance(key, list | dict):
                self.refuse(e, "expected a name, found a list or a mapping")
            if key == "<<" and e.implicit[0]:
                self.refuse(e, "expected plain settings, found a merge key (<<)")
            if str(key) in made:
                self.refuse(e, f"expected each name once, found {printable(key, 60)} twice")
            made[str(key)] = self.value(next(events), events, depth + 1)
        return made

    def scalar(self, event: Any) -> Any:
        plain, quoted = event.implicit
        tag = event.tag
        if tag is None:
            tag = self.resolver.resolve(self.yaml.ScalarNode, event.value, (plain, quoted))
            if tag == _DATE or (not plain and tag != "tag:yaml.org,2002:str"):
                return event.value
        if tag == "tag:yaml.org,2002:str" and plain and _EXPONENT.fullmatch(event.value):
            return float(event.value.replace("_", ""))
        if tag in ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"):
            return event.value
        if tag not in _PLAIN:
            self.refuse_tag(event, tag)
        try:
            made = self.scalars.construct_object(self.yaml.ScalarNode(tag, event.value))
        except (ValueError, KeyError, self.yaml.YAMLError):
            self.refuse(event, f"expected {tag.rpartition(':')[2]}, found {printable(event.value, 40)}")
        if isinstance(made, int) and not -(2**63) <= made < 2**63:
            self.refuse(event, "expected a whole number of 64 bits, found a larger one")
        return made

    def check_tag(self, event: Any, kind: str) -> None:
        if event.tag not in (None, "!", f"tag:yaml.org,2002:{kind}"):
            self.refuse_tag(event, event.tag)

    def refuse_tag(self, event: Any, tag: str) -> NoReturn:
        what = printable(tag.replace("tag:yaml.org,2002:", "!!"), 80)
        hint = "such a file would run code where it is loaded; write the values out as plain YAML"
        self.refuse(event, f"expected plain values, found the tag {what}", hint)

    def refuse(self, event: Any, message: str, hint: str | None = None) -> NoReturn:
        where = f"line {event.start_mark.line + 1}"
        fail("bad-config", message, file=self.file, where=where, hint=hint)

    def add(self, values: int) -> None:
        self.count += values
        if self.count > MAX_VALUES:
            message = f"expected at most {MAX_VALUES} values, aliases written out, found more"
            fail("limits", message, file=self.file)


def inner(value: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The mapping under these names, one in the other; an empty one where there is none."""
    for name in names:
        found = value.get(name)
        if not isinstance(found, Mapping):
            return {}
        value = found
    return value
