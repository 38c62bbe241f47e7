"""Config values against tensor shapes, from headers: each axis of a table's rows is a number in the config.

A single tensor of another shape is that tensor's fault and is reported as such where plans are assembled.
Here it is about numbers that fit none of the tensors they measure, and about ranks that do not fit each
other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.convert.layout import Dims, Part
from ckpt_tool.convert.params import overridden
from ckpt_tool.convert.plan import Value
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import Problem
from ckpt_tool.records import dataclass


@dataclass(frozen=True)
class Disagreement:
    """The config values `fields` give `expected` for dimension `dimension` of `part`, its header `found`;
    `split` when ranks share that dimension out."""

    fields: tuple[str, ...]
    part: Part
    dimension: int
    expected: int
    found: int
    split: bool

    def problem(self, config: Mapping[str, Value]) -> Problem:
        values = " x ".join(f"{f} {config[f].value} ({config[f].source})" for f in self.fields)
        share = ", shared by the ranks" if self.split else ""
        return Problem(
            "config-mismatch",
            f"expected {self.expected} in dimension {self.dimension} of {self.part.name} "
            f"from {values}{share}, found {self.found}",
            file=self.part.file,
            where=self.fields[0],
            hint=self._way_out(config),
        )

    def _way_out(self, config: Mapping[str, Value]) -> str:
        """Each of the fields with the value that the tensor has of it, where that is a whole number."""
        ways = [
            f"--set {f}={value * self.found // self.expected}"
            for f in dict.fromkeys(self.fields)
            if type(value := config[f].value) is int
            and self.expected
            and value * self.found % self.expected == 0
        ]
        if ways:
            return f"{' or '.join(ways)} if the tensors are right"
        return overridden(*dict.fromkeys(self.fields))


def disagreements(
    steps: Steps, checkpoint: Checkpoint, fields: Mapping[str, str], *, side: str = "sources"
) -> list[Disagreement]:
    """One for each combination of config values (`fields` names the value behind an axis) that no tensor on
    the `side` of the steps confirms."""
    if not _disagreements(steps, steps.by_kind(), checkpoint, fields, side):
        return []
    return _disagreements(steps, steps.runs(), checkpoint, fields, side)


def _disagreements(
    steps: Steps,
    runs: Iterable[tuple[int, list[list[str]]]],
    checkpoint: Checkpoint,
    fields: Mapping[str, str],
    side: str,
) -> list[Disagreement]:
    """Those of the names in these runs, in their order."""
    confirmed: set[tuple[str, ...]] = set()
    first: dict[tuple[str, ...], Disagreement] = {}
    seen: list[set[tuple[int, tuple[int, ...]]]] = [set() for _ in steps.templates]  # layers are alike
    held = [_held(s.sources if side == "sources" else s.targets, checkpoint) for s in steps.templates]
    alike = [_numbered(parts) for parts in held]
    before = [0 if side == "sources" else len(step.sources) for step in steps.templates]
    measured_by: dict[Dims, list[tuple[str, ...]]] = {}
    for number, columns in runs:
        for j, tensor in _of_new_shapes(held[number], alike[number], columns[before[number] :], seen[number]):
            part, step = held[number][j][0], steps.templates[number]
            if len(tensor.shape) != len(part.dims):
                continue
            if (each := measured_by.get(part.dims)) is None:
                each = [tuple(dict.fromkeys(fields[a] for a in g if a in fields)) for g in part.dims]
                measured_by[part.dims] = each
            shape = part.shape(step.sizes)
            confirmed.update(m for m, a, b in zip(each, shape, tensor.shape, strict=True) if a == b)
            if shape == tensor.shape:
                continue
            longer = any(p.taken for p in step.sources)  # ranges say where copies lie
            for k, (measured, expected, found) in enumerate(zip(each, shape, tensor.shape, strict=True)):
                if expected != found and measured not in first:
                    split = not longer and any(a in part.dims[k] for a, _, _ in part.ranges)
                    part = part.called(tensor.name)
                    first[measured] = Disagreement(measured, part, k, expected, found, split)
    return [d for measured, d in first.items() if measured not in confirmed and measured]


_Held = list[tuple[Part, Mapping[str, TensorInfo]]]


def _numbered(held: _Held) -> list[int]:
    """For each part the first that is of its shape, whatever that is."""
    first: dict[object, int] = {}
    return [first.setdefault(part.sized, j) for j, (part, _) in enumerate(held)]


def _of_new_shapes(
    held: _Held,
    alike: Sequence[int],
    columns: Sequence[Sequence[str]],
    seen: set[tuple[int, tuple[int, ...]]],
) -> Iterator[tuple[int, TensorInfo]]:
    """The tensors of these names, a column for each part, whose shapes were not `seen` of a part `alike`,
    with the number of the part."""
    gets = [tensors.get for _, tensors in held]
    if len(gets) == 1:  # as of nearly all
        names, get, latest = columns[0], gets[0], None
        for tensor in map(get, names):
            if tensor is not None and tensor.shape != latest:
                latest = tensor.shape
                if (0, latest) not in seen:
                    seen.add((0, latest))
                    yield 0, tensor
        return
    for step in zip(*columns, strict=True):
        tensors = [get(name) for get, name in zip(gets, step, strict=False)]
        if {(k, t.shape) for k, t in zip(alike, tensors, strict=True) if t is not None} <= seen:
            continue
        for j, (tensor, first) in enumerate(zip(tensors, alike, strict=True)):
            if tensor is not None and (first, tensor.shape) not in seen:
                seen.add((first, tensor.shape))
                yield j, tensor


def _held(parts: Iterable[Part], checkpoint: Checkpoint) -> _Held:
    """The parts of a template with the tensors of their files."""
    files = checkpoint.files
    return [(p, files[p.file].tensors if p.file in files else {}) for p in parts]


_OTHER = "the files of one download belong together; was one taken from another model?"


def rank_problems(files: list[str], tensors: Mapping[str, Mapping[str, TensorInfo]]) -> list[Problem]:
    """Where model-parallel ranks differ in names, shapes or dtypes from rank 0: every rank holds an equal
    share, so they must not."""
    base_file, base = files[0], tensors[files[0]]
    problems = []
    for rank, file in enumerate(files[1:], start=1):
        here = tensors[file]
        odd = sorted(base.keys() ^ here.keys())
        if odd:
            holder, other = (base_file, file) if odd[0] in base else (file, base_file)
            problems.append(
                Problem(
                    "shard-conflict",
                    f"expected the same tensors in rank 0 ({base_file}) and rank {rank}, found {odd[0]} "
                    f"in {holder} and not in {other}{_and_more(len(odd) - 1)}",
                    file=file,
                    where=odd[0],
                    hint=_OTHER,
                )
            )
        differing = [
            (n, t, here[n])
            for n, t in base.items()
            if n in here and (t.shape, t.dtype) != (here[n].shape, here[n].dtype)
        ]
        if differing:
            name, one, two = differing[0]
            problems.append(
                Problem(
                    "shard-conflict",
                    f"expected {one.shape} {one.dtype} in rank {rank} as in rank 0 ({base_file}), "
                    f"found {two.shape} {two.dtype}{_and_more(len(differing) - 1)}",
                    file=file,
                    where=name,
                    hint=_OTHER,
                )
            )
    return problems


def _and_more(count: int) -> str:
    return f" (and {count} more tensor{'s' * (count > 1)})" if count > 0 else ""
