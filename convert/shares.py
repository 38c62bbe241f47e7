"""How the output files of a plan hang together, and how they are dealt out to several processes.

A share follows from the plan and the number of processes alone, so that machines that never speak to each
other agree on it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace

from ckpt_tool.convert.layout import Step
from ckpt_tool.convert.plan import OutputFile, Plan
from ckpt_tool.convert.source_checks import Key
from ckpt_tool.convert.steps import as_steps
from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass

MOST = 9999  # workers


@dataclass(frozen=True)
class Worker:
    """Process `number` (from 1) of `count` that carry out one plan."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count <= MOST:
            message = f"expected a worker from 1 to N, N at most {MOST}, found {self}"
            fail("usage", message, where="--worker")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def groups(plan: Plan) -> list[tuple[list[OutputFile], list[int]]]:
    """Output files that some step writes together or compares, with the indices of those steps."""
    found: dict[str, tuple[list[OutputFile], list[int]]] = {}
    leader = _leaders(plan.outputs, as_steps(plan.steps).templates)
    for file in plan.outputs:
        found.setdefault(leader[file.name], ([], []))[0].append(file)
    steps = as_steps(plan.steps)
    own = [found[leader[t.targets[0].file]][1] for t in steps.templates]
    for k, kind in enumerate(steps.kinds):
        own[kind].append(k)
    return list(found.values())


def _leaders(outputs: Iterable[OutputFile], steps: Iterable[Step]) -> dict[str, str]:
    """For each file the one that stands for all files it is connected with by steps."""
    leader = {f.name: f.name for f in outputs}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for step in steps:
        first = find(step.targets[0].file)
        for part in step.targets[1:]:
            leader[find(part.file)] = first
    return {name: find(name) for name in leader}


class _Every(Container[tuple[int, int]]):
    """What holds everything."""

    def __contains__(self, _: object) -> bool:
        return True


def first_readers(steps: Sequence[Step]) -> Container[tuple[int, int]]:
    """(step, index of its source) of the first step that reads each tensor: only what it reads counts towards
    the tensor's checksum, so that no byte counts twice."""
    packed = as_steps(steps)
    widths = [len(t.sources) for t in packed.templates]
    if sum(map(widths.__getitem__, packed.kinds)) == sum(map(len, packed.read().values())):
        return _Every()  # nearly always each tensor is read once
    first: dict[Key, tuple[int, int]] = {}
    for k, keys in enumerate(packed.sources()):
        for i, key in enumerate(keys):
            first.setdefault(key, (k, i))
    return set(first.values())


# --- shares ---------------------------------------------------------------------------------------------


def shares(plan: Plan, count: int) -> list[tuple[OutputFile, ...]]:
    """The output files of each of `count` workers: neighbours in the plan, so that few steps are needed by
    two of them, and the largest share as small as it can then be. Files that a comparison connects stay
    together; with fewer files than workers some have none."""
    leader = _leaders(plan.outputs, (t for t in as_steps(plan.steps).templates if t.compare))
    atoms: dict[str, list[OutputFile]] = {}
    for file in plan.outputs:
        atoms.setdefault(leader[file.name], []).append(file)
    together = list(atoms.values())
    sizes = [sum(t.nbytes for f in files for t in f.held) for files in together]
    low, high = max(sizes, default=0), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(list(_runs(sizes, middle, 0))) <= count else (middle + 1, high)
    made = [tuple(f for k in run for f in together[k]) for run in _runs(sizes, low, count)]
    return [*made, *[()] * (count - len(made))]


def _runs(sizes: Sequence[int], most: int, count: int) -> Iterator[range]:
    """Neighbours of at most `most` bytes together; while there are fewer than `count` runs, none so long that
    the others would be left with nothing."""
    start = size = made = 0
    for k, own in enumerate(sizes):
        if k > start and (size + own > most or len(sizes) - k <= count - made - 1):
            yield range(start, k)
            start, size, made = k, 0, made + 1
        size += own
    if sizes:
        yield range(start, len(sizes))


def restricted(plan: Plan, files: Sequence[OutputFile]) -> Plan:
    """What of `plan` makes `files`: a step that also writes others is cut down to their part of it."""
    own = {f.name for f in files}
    steps = []
    for step in plan.steps:
        kept = tuple(p for p in step.targets if p.file in own)
        if kept:
            steps.append(step if len(kept) == len(step.targets) else replace(step, targets=kept))
    return replace(plan, steps=tuple(steps), outputs=tuple(files))


def whole_reads(plan: Plan, files: Sequence[OutputFile]) -> dict[str, list[Key]]:
    """By output file, the source tensors whose checksum whoever makes the file sees to: every tensor has one
    such file, that of a target of the first step that reads it (of the targets in turn)."""
    own = {f.name for f in files}
    found: dict[str, list[Key]] = {}
    seen: set[Key] = set()
    for k, step in enumerate(plan.steps):
        home = step.targets[k % len(step.targets)].file
        for part in step.sources:
            key = (part.file, part.name)
            if key not in seen and home in own:
                found.setdefault(home, []).append(key)
            seen.add(key)
    return found
