"""Half a million steps in little memory: those that differ in the names of their tensors share a template.

A step of a model's layers or experts is a few kilobytes of objects, all of them the same but for the names;
here it is its names and the number of its template, and is made when it is asked for. What a plan checks of
steps it checks of templates, wherever names do not matter.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise, repeat
from operator import is_
from typing import overload

from ckpt_tool.convert.layout import Part, Step


def nameless(step: Step) -> Step:
    """The template of a step."""
    blank = (tuple(p.called("") for p in side) for side in (step.sources, step.targets))
    return step.between(*blank)


class Steps(Sequence[Step]):
    """Steps in order, each made anew when it is asked for. `templates` have parts without names; `kinds` is
    the template of each step, and its `names`, those of the sources first, begin at `starts`."""

    __slots__ = ("_known", "kinds", "names", "starts", "templates")

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        self.templates: list[Step] = []
        self.kinds = array("i")
        self.names: list[str] = []
        self.starts = array("q", [0])
        self._known: dict[Step, int] = {}
        self.extend(steps)

    # --- to fill in ---

    def kind(self, template: Step) -> int:
        """The number of a template, which is new or known."""
        found = self._known.setdefault(template, len(self.templates))
        if found == len(self.templates):
            self.templates.append(template)
        return found

    def add(self, kind: int, names: Sequence[str]) -> None:
        self.kinds.append(kind)
        self.names += names
        self.starts.append(len(self.names))

    def add_alike(self, kind: int, *columns: Sequence[str]) -> None:
        """Steps of one template; a column has the names of one part of them all."""
        count, width, end = len(columns[0]), len(columns), len(self.names)
        self.kinds.extend(repeat(kind, count))
        self.names.extend(columns[0] if width == 1 else chain.from_iterable(zip(*columns, strict=True)))
        self.starts.extend(range(end + width, end + width * count + 1, width))

    def add_pairs(self, kinds: Sequence[int], names: Sequence[str]) -> None:
        """Steps of these templates, each of one source and one target, whose `names` follow one another."""
        end = len(self.names)
        self.kinds.extend(kinds)
        self.names.extend(names)
        self.starts.extend(range(end + 2, end + len(names) + 1, 2))

    def extend(self, steps: Iterable[Step]) -> None:
        if isinstance(steps, Steps):
            kinds = [self.kind(t) for t in steps.templates]
            for kind, columns in steps.runs():
                self.add_alike(kinds[kind], *columns)
            return
        for step in steps:
            names = [p.name for p in (*step.sources, *step.targets)]
            self.add(self.kind(nameless(step)), names)

    # --- to look at ---

    def __len__(self) -> int:
        return len(self.kinds)

    @overload
    def __getitem__(self, key: int) -> Step: ...
    @overload
    def __getitem__(self, key: slice) -> list[Step]: ...
    def __getitem__(self, key: int | slice) -> Step | list[Step]:
        if isinstance(key, slice):
            return [self[k] for k in range(*key.indices(len(self)))]
        k = range(len(self))[key]
        return _made(self.templates[self.kinds[k]], self.names[self.starts[k] : self.starts[k + 1]])

    def __iter__(self) -> Iterator[Step]:
        templates = self.templates
        return (_made(templates[kind], names) for kind, names in self.packed())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def packed(self) -> Iterator[tuple[int, list[str]]]:
        """The template and the names of each step."""
        names, start = self.names, 0
        for kind, stop in zip(self.kinds, self.starts[1:], strict=True):
            yield kind, names[start:stop]
            start = stop

    def runs(self) -> Iterator[tuple[int, list[list[str]]]]:
        """The template of neighbours that share it, and for each of its parts their names in order."""
        if not self.kinds:
            return
        widths = [len(t.sources) + len(t.targets) for t in self.templates]
        edges = [k for k, (a, b) in enumerate(pairwise(self.kinds), 1) if a != b]
        for first, end in pairwise([0, *edges, len(self.kinds)]):
            kind, at, stop = self.kinds[first], self.starts[first], self.starts[end]
            yield kind, self._columns(range(at, stop, widths[kind]), widths[kind])

    def by_kind(self) -> Iterator[tuple[int, list[list[str]]]]:
        """As `runs`, but once for each template where runs are short: for what asks for no order."""
        if sum(a != b for a, b in pairwise(self.kinds)) < len(self.kinds) // 4:
            yield from self.runs()
            return
        starts: list[list[int]] = [[] for _ in self.templates]
        for kind, at in zip(self.kinds, self.starts, strict=False):
            starts[kind].append(at)
        for kind, own in enumerate(starts):
            step = self.templates[kind]
            width = len(step.sources) + len(step.targets)
            if not own:
                continue
            at, end, stride = own[0], own[-1], own[1] - own[0] if len(own) > 1 else 1
            if stride > 0 and own == list(range(at, end + 1, stride)):  # those of the layers
                yield kind, self._columns(range(at, end + 1, stride), width)
            else:
                yield kind, self._columns(own, width)

    def _columns(self, starts: Sequence[int], width: int) -> list[list[str]]:
        """The names of steps of `width` parts that begin at `starts`, a column for each part."""
        if len(starts) < width:  # a thousand experts in one step
            return list(map(list, zip(*[self.names[at : at + width] for at in starts], strict=True)))
        if isinstance(starts, range):
            first, end = starts[0], starts[-1]
            return [self.names[first + j : end + j + 1 : starts.step] for j in range(width)]
        return [[self.names[at + j] for at in starts] for j in range(width)]

    def named(self, places: Sequence[int]) -> list[str]:
        """Of each step one name: `places` says for its template which."""
        names = self.names
        return [names[at + places[kind]] for kind, at in zip(self.kinds, self.starts, strict=False)]

    def read(self) -> dict[str, set[str]]:
        """The names of all sources by file."""
        found: dict[str, set[str]] = {}
        reads = [[found.setdefault(p.file, set()).update for p in step.sources] for step in self.templates]
        for kind, columns in self.by_kind():
            for take, names in zip(reads[kind], columns, strict=False):
                take(names)
        return found

    def sources(self) -> Iterator[list[tuple[str, str]]]:
        """(file, name) of the sources of each step, which is not made for it."""
        files = [[p.file for p in t.sources] for t in self.templates]
        for kind, names in self.packed():
            yield list(zip(files[kind], names, strict=False))

    def where(self, wanted: Callable[[Step], object]) -> Iterator[Step]:
        """The steps whose templates are `wanted`."""
        chosen = [bool(wanted(t)) for t in self.templates]
        if not any(chosen):
            return
        for k, kind in enumerate(self.kinds):
            if chosen[kind]:
                yield self[k]

    # --- to change ---

    def alike(self, change: Callable[[Step], Step]) -> Steps:
        """The steps that `change` makes of them, which looks at no names and leaves as many parts."""
        made, templates = Steps(), [change(t) for t in self.templates]
        if all(map(is_, templates, self.templates)):
            return self
        kinds = [made.kind(t) for t in templates]
        made.kinds, made.names, made.starts = self.kinds, self.names, self.starts
        if kinds != list(range(len(kinds))):
            made.kinds = array("i", [kinds[k] for k in self.kinds])
        return made

    def changed(
        self, change: Callable[[Step], Step | Iterable[Step]], *, where: Callable[[Step], object]
    ) -> Steps:
        """The steps with, in place of each whose template `where` finds, what `change` makes of it."""
        chosen = [bool(where(t)) for t in self.templates]
        if not any(chosen):
            return self
        made = Steps()
        kinds = [-1 if c else made.kind(t) for c, t in zip(chosen, self.templates, strict=True)]
        for kind, columns in self.runs():
            if not chosen[kind]:
                made.add_alike(kinds[kind], *columns)
                continue
            for names in zip(*columns, strict=True):
                new = change(_made(self.templates[kind], names))
                made.extend((new,) if isinstance(new, Step) else new)
        return made

    def inverse(self) -> Steps:
        """The way back of each: see `Step.inverse`."""
        made = Steps()
        kinds = [made.kind(t.inverse()) for t in self.templates]
        sources = [len(t.sources) for t in self.templates]
        for kind, columns in self.runs():
            made.add_alike(kinds[kind], *columns[sources[kind] :], *columns[: sources[kind]])
        return made


def as_steps(steps: Sequence[Step]) -> Steps:
    """The same steps packed, so that what does not depend on names is looked up once a template."""
    return steps if isinstance(steps, Steps) else Steps(steps)


def _made(template: Step, names: Sequence[str]) -> Step:
    sources, targets = template.sources, template.targets
    if len(names) == 2 and len(sources) == 1:
        return template.between((sources[0].called(names[0]),), (targets[0].called(names[1]),))
    parts: list[Part] = [p.called(n) for p, n in zip((*sources, *targets), names, strict=True)]
    return template.between(tuple(parts[: len(sources)]), tuple(parts[len(sources) :]))
