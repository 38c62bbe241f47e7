"""What the results of an ONNX graph are held against: the readings of its source, phase by phase over all
cases, with the weights of one phase in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ckpt_tool.reference as reference
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.families import as_family_knows, family
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.convert.recognising import only_family
from ckpt_tool.errors import CkptToolError, fail
from ckpt_tool.reference.hf_heads import kind_of
from ckpt_tool.verify.as_hf import Made, shown_as_hf
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.onnx_export import computed, kept_by, shaped
from ckpt_tool.verify.onnx_names import TASKS, layer_names, of_rows
from ckpt_tool.verify.onnx_runs import Case
from ckpt_tool.verify.prompts import padding_of
from ckpt_tool.verify.sides import BROKEN, Side, original_side, side_of
from ckpt_tool.verify.subject import Subject, opened
from ckpt_tool.verify.weights import ranks_of


@dataclass(frozen=True)
class Source:
    """A model under Hugging Face names with its config.json, and what `subject` knows of the original that it
    comes from, if it does."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    words: str
    subject: Subject | None

    def converted(self, dtype: torch.dtype) -> Side:
        """The reading of the Hugging Face layout; `unsupported` where there is none for it."""
        (architecture, *_) = self.config.get("architectures") or [""]
        try:
            module = reference.converted(str(architecture))
            made = module.Config.from_hf(self.config)
            ranks = ranks_of(self.checkpoint)
            return side_of(module, made, self.checkpoint, ranks, dtype, "cpu", self.config)
        except (*BROKEN, TypeError) as error:
            fail(
                "unsupported",
                f"expected a model that is computed here, found another ({error})",
                file="config.json",
            )

    def original(self, dtype: torch.dtype, task: str) -> Side | None:
        """The reading of the original, where there is one whose heads give what the task asks for."""
        heads_differ = task == "default" and kind_of(self.config) != "base_model"
        if self.subject is None or heads_differ:
            return None
        try:
            side = original_side(self.subject, dtype, "cpu")
            known = side.kinds()
        except (*BROKEN, TypeError) as error:
            text = f"expected an original that is computed here, found another ({error})"
            fail("unsupported", text, file=self.subject.source and self.subject.source.path.name)
        return side if any(head in known for head in TASKS[task].heads) else None


@contextmanager
def source_at(path: str | os.PathLike[str], settings: Mapping[str, Any] | None) -> Iterator[Source]:
    """A folder in the Hugging Face layout, or an original, seen as a conversion would write it."""
    with shown_as_hf(path, settings) as shown:
        files = list(shown.checkpoint.files.values())
        made = files[0] if len(files) == 1 else None
        subject = None
        plan: Plan | None
        if isinstance(made, Made):
            known, plan = made.source, made.plan  # as a conversion would write it
        else:
            known, plan = _as_original(shown.checkpoint, settings)
        if plan is not None:
            subject = Subject(
                output=shown.checkpoint, source=known, hf=shown.checkpoint, original=known,
                config=dict(shown.config), manifest=None, settings=dict(settings or {}),
                family=family(plan.family), plan=plan,
            )  # fmt: skip
        yield Source(shown.checkpoint, shown.config, shown.layout, subject)


def _as_original(
    checkpoint: Checkpoint, settings: Mapping[str, Any] | None
) -> tuple[Checkpoint, Plan | None]:
    """Hugging Face names are also those of the originals of some families, which have a reading of their
    own."""
    try:
        known = family(only_family(checkpoint))
        source = as_family_knows(checkpoint, known)
        return source, known.plan(source, Options(settings=dict(settings or {})))
    except CkptToolError:
        return checkpoint, None


@contextmanager
def source_of(
    path: str | os.PathLike[str], original: str | os.PathLike[str] | None, settings: Mapping[str, Any] | None
) -> Iterator[Source]:
    """The folder `path`, beside the `original` it was made from where one is given."""
    if original is None:
        with source_at(path, settings) as found:
            yield found
        return
    with opened(path, original, settings) as subject:
        if subject.hf is None or subject.original is None:
            text = "expected a folder in the Hugging Face layout and its original, found two of one layout"
            fail("usage", text, where="--source")
        if subject.problems:
            problem = subject.problems[0]
            fail(problem.kind, problem.message, file=problem.file, where="--source", hint=problem.hint)
        words = (
            f"Hugging Face, made from an original of {subject.family.name if subject.family else 'no family'}"
        )
        kept = None if subject.keeps_layout else subject
        yield Source(subject.hf, subject.config, words, kept)


# --- passes -----------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One pass: rows that run together, on their way through the phases. `rows` are those of the case."""

    case: Case
    rows: slice
    ids: Tensor
    given: dict[str, Any]
    kept: Tensor  # which of the case's positions the pass has, (T,), or (B, T) where it has them all
    x: Any = None
    past: dict[str, Tensor] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)


Results = dict[str, Tensor]  # by output: (positions, C), those of no padding


@computed()
def results(
    side: Side, task: str, cases: Sequence[Case], *, with_past: bool, reversed_sums: bool = False
) -> list[Results]:
    """What a reading gives for each case, of the tokens after `case.past`; of `present.N.key` all."""
    kept = kept_by(side) if with_past else ()
    jobs = [job for case in cases for job in _jobs(side, case, bool(kept))]
    heads = TASKS[task].heads
    with torch.inference_mode(), ExitStack() as sums:
        if reversed_sums:
            sums.enter_context(ReversedSums())
        for phase, kind in side.kinds([{}, *(j.given for j in jobs)]).items():
            if kind == "head" and str(phase) not in heads:
                continue
            with side.keep():
                for job in jobs:
                    run = side.reading(job.given)[phase].run
                    if kind == "head":
                        job.made[heads[str(phase)]] = run(job.x)
                    else:
                        job.x = run(job.ids if phase == "embed" else job.x)
    names = dict(zip(kept, layer_names(len(kept) // 2, "present"), strict=True))
    for job in jobs:
        job.made |= {names[own]: x for own, x in job.past.items()}
    return [_joined(side, task, case, [j for j in jobs if j.case is case]) for case in cases]


def _jobs(side: Side, case: Case, with_past: bool) -> list[Job]:
    """All rows in one pass, with the mask where the reading takes one: else each row alone, without its
    padding."""
    flat, mask = case.ids.flatten(0, -2), case.mask.flatten(0, -2)
    types = None if case.token_types is None else case.token_types.flatten(0, -2)
    given: dict[str, Any] = {} if types is None else {"token_types": types}
    masked = "mask" in side.takes({"mask": mask}) and (
        "mask" in side.inputs or (case.left and not case.counted)
    )
    jobs = []
    if not case.padded or masked:
        given |= {"mask": mask} if case.padded else {}
        jobs = [Job(case, slice(0, len(flat)), flat, given, mask.bool())]
    else:
        for r, row in enumerate(flat):
            own = mask[r].bool()
            alone = {n: x[r : r + 1, own] for n, x in given.items()}
            jobs.append(Job(case, slice(r, r + 1), row[own][None], alone, own))
    for job in jobs:
        if with_past:
            job.given["past"] = job.past
    return jobs


def _joined(side: Side, task: str, case: Case, jobs: list[Job]) -> Results:
    found: dict[str, list[Tensor]] = {}
    for job in jobs:
        for name, y in job.made.items():
            found.setdefault(name, []).append(_picked(side, task, case, job, name, y))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _picked(side: Side, task: str, case: Case, job: Job, name: str, y: Tensor) -> Tensor:
    if not name.startswith("present."):
        y = shaped(y, task, job.ids, padding_of(side.raw), case.ids.shape[:-1])
    if of_rows(task, name):
        return y.reshape(-1, y.shape[-1])
    if name.startswith("present."):
        y = y.transpose(1, 2)
    places = torch.arange(case.ids.shape[-1])
    late = (places >= 0) if name.startswith("present.") else places >= case.past
    return _rows(y[0][late[job.kept]] if job.kept.ndim == 1 else y[job.kept & late])


def _rows(y: Tensor) -> Tensor:
    """(positions, C), of results that are one number for each token as well."""
    return y.reshape(len(y), -1)


def picked(task: str, case: Case, name: str, y: Tensor) -> Tensor:
    """The same of what a graph gave, which has no results for the tokens before; with a third axis, which is
    none of the right ones, where it has other rows or tokens."""
    kept = name.startswith("present.")
    rows, places = of_rows(task, name), case.mask if kept else case.real
    axes = (4,) if kept else (2,) if rows else (2, 3)
    if y.ndim not in axes:
        return y.reshape(1, 1, -1)
    if rows and len(y) == len(case.ids):
        return y.reshape(-1, y.shape[-1])
    y = y.transpose(1, 2) if kept else y
    return y.reshape(1, 1, -1) if rows or y.shape[:2] != places.shape else _rows(y[places.bool()])
