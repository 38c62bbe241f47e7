"""What a plan is held against before it is one: what the headers of a checkpoint say of the tensors that its
steps read, what was asked for, and what the readers of its files take. All problems are told together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.checkpoint.safetensors import TENSOR_LIMIT
from ckpt_tool.checkpoint.tensor_names import fold_key, folded_name
from ckpt_tool.convert.fitting import expected_alike, fit
from ckpt_tool.convert.layout import Part, dims_text
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import Problem, printable

if TYPE_CHECKING:
    from ckpt_tool.convert.plan import Dropped, OutputFile, Turns


ROTARY = re.compile(r"(.*\.)?(inv_freq|rope\.freqs)")


def frequency_problems(
    left_out: Iterable[Dropped], turns: Turns | None, asked: Collection[str]
) -> Iterator[Problem]:
    """Rotary frequencies that are stored and left out, but not `asked` for, in another number than heads of
    the width that the config says have: nothing else tells the heads of a model without groups."""
    if turns is None or turns.pairs is None:
        return
    pairs = turns.pairs
    for tensor in (d.tensor for d in left_out if d.tensor.name not in asked):
        if ROTARY.fullmatch(tensor.name) and len(tensor.shape) == 1 and tensor.shape != (pairs.value,):
            message = f"expected {pairs.value} rotary frequencies, {pairs.source}, found {tensor.shape[0]}"
            hint = "--set num_attention_heads=N says how many heads; --drop leaves the frequencies out"
            yield Problem("config-mismatch", message, tensor.file, tensor.name, hint)
            return  # each layer says the same


_OTHERWISE = "the model needs its numbers: get a release that has them in a dtype of torch's for weights"


def told_apart(problems: Iterable[Problem], checkpoint: Checkpoint) -> Iterator[Problem]:
    """`problems`, where a tensor is not missing but left out for its type."""
    others = {t.tensor.name: t.tensor for t in checkpoint.left_out if t.tensor.dtype not in DTYPES}
    for problem in problems:
        tensor = others.get(problem.where or "")
        if problem.kind == "missing-tensor" and tensor is not None:
            message = f"expected a dtype known here, found {tensor.dtype}"
            problem = Problem("unsupported-dtype", message, tensor.file, tensor.name, _OTHERWISE)
        yield problem


def kept_problems(names: Iterable[str], checkpoint: Checkpoint) -> Iterator[Problem]:
    """What was asked for with --drop and is not left out, of layers together."""
    needed: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(names):
        if checkpoint.find(name):
            needed.setdefault(fold_key(name), []).append(name)
            continue
        message = "expected a tensor that the model does not need, found none of that name"
        yield Problem("usage", message, file="--drop", where=name)
    for alike in needed.values():
        what = "one that it needs" if len(alike) == 1 else f"{len(alike)} that it needs"
        message = f"expected a tensor that the model does not need, found {what}"
        yield Problem("usage", message, file="--drop", where=folded_name(alike))


def _absent(steps: Steps, checkpoint: Checkpoint) -> Iterator[Problem]:
    """One problem for each file that is not there and holds what a step reads."""
    held: dict[str, dict[str, None]] = {}
    files = [[checkpoint.files.get(p.file) for p in step.sources] for step in steps.templates]
    lacking = [[f.absent if f is not None and f.may_lack else None for f in own] for own in files]
    for kind, columns in steps.runs() if any(map(any, lacking)) else ():
        for absent, names in zip(lacking[kind], columns, strict=False):
            for name in names if absent is not None else ():
                if absent is not None and (missing := absent(name)) is not None:
                    held.setdefault(missing, {})[name] = None
    for missing, (first, *others) in held.items():
        more = f" and {len(others)} more tensors of the model" if others else ""
        message = f"expected this file, which holds {printable(first)}{more}, found no such file"
        yield Problem("missing-shard", message, missing, hint="download what is missing too")


def step_problems(steps: Steps, checkpoint: Checkpoint) -> Iterator[Problem]:
    yield from _absent(steps, checkpoint)
    defects = [step.defects() for step in steps.templates]
    expected = [
        [(p, shape, _tensors(p, checkpoint)) for p, shape in zip(s.sources, s.source_shapes(), strict=True)]
        for s in steps.templates
    ]
    together = [expected_alike((shape, tensors) for _, shape, tensors in parts) for parts in expected]

    def fine(kind: int, columns: Sequence[Sequence[str]]) -> bool:
        return not defects[kind] and fit(together[kind], columns)

    if all(fine(kind, columns) for kind, columns in steps.by_kind()):
        return
    for kind, columns in steps.runs():
        parts = expected[kind]
        if fine(kind, columns):
            continue
        for names in zip(*columns, strict=True):
            for defect in defects[kind]:
                yield Problem("shape-mismatch", defect, where=names[0])
            for (part, shape, tensors), name in zip(parts, names, strict=False):
                if (found := tensors.get(name)) is not None and found.shape != shape:
                    message = f"expected shape {shape} ({dims_text(part.dims)}), found {found.shape}"
                    yield Problem("shape-mismatch", message, file=part.file, where=name)


def _tensors(part: Part, checkpoint: Checkpoint) -> Mapping[str, TensorInfo]:
    """Those of its file."""
    return checkpoint.files[part.file].tensors if part.file in checkpoint.files else {}


DROP = "--drop NAME leaves a tensor out (a pattern: several), and records it"
OF_CACHES = (
    "it scales keys or values for servers that cache them in 8 bits, and is carried with quantised weights "
    "alone: --drop '*.[kvq]_scale' leaves all of them out, and records it"
)
_CACHE = re.compile(r".*(attn|attention|_proj)\.[kvq]_scale", re.ASCII).fullmatch


def uncovered_problems(tensors: list[TensorInfo], family: str) -> list[Problem]:
    """One problem for each folded name, so that 64 adapter tensors are one line and not 64."""
    folded: dict[tuple[tuple[str, ...], tuple[int, ...], str], list[TensorInfo]] = {}
    for t in tensors:
        folded.setdefault((fold_key(t.name), t.shape, t.dtype), []).append(t)
    return [
        Problem(
            "uncovered-tensors",
            f"expected a rule of family {family} for each tensor, found none for "
            f"{len(group)} tensor{'s' * (len(group) > 1)} of shape {shape} {dtype}",
            file=group[0].file,
            where=folded_name([t.name for t in group]),
            hint=OF_CACHES if _CACHE(group[0].name) else DROP,
        )
        for (_, shape, dtype), group in folded.items()
    ]


def too_many(files: Iterable[OutputFile]) -> Iterator[Problem]:
    """Files that would hold more tensors than the readers take from one."""
    for file in files:
        limit = {"safetensors": TENSOR_LIMIT, "tf-bundle": TENSOR_LIMIT}.get(file.format)
        if file.format == "torch-zip":
            from ckpt_tool.checkpoint.torch_zip_writer import TENSOR_LIMIT as limit
        if limit is not None and len(file.tensors) > limit:
            message = f"expected at most {limit:,} tensors in one file, found {len(file.tensors):,}"
            hint = "--form or --container, where the family has them, write other files"
            yield Problem("unsupported", message, file.name, hint=hint)
