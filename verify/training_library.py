"""Whether the class of transformers, as it loads the output, learns as the original does: a parameter that it
freezes, or a path that it cuts off, gives equal logits."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckpt_tool.convert.facts import class_of, classes
from ckpt_tool.records import dataclass
from ckpt_tool.verify import library
from ckpt_tool.verify.gradients import Rows, Task
from ckpt_tool.verify.library import one_line
from ckpt_tool.verify.report import Finding
from ckpt_tool.verify.sides import Side, Tensors
from ckpt_tool.verify.subject import Subject

LEVEL, CHECK = "training", "transformers"
WORDS = ("logits", "prediction_logits", "last_hidden_state")  # what the head of a reading may be there


class NotComparable(Exception):
    """Why the class and the reading do not have one loss."""


@dataclass(frozen=True)
class Learned:
    """The release, its gradients by the names of the converted tensors, the parameters that it does not
    teach, of tables the row of padding, which it leaves alone, and the heads of the reading that it has no
    output for."""

    version: str
    gradients: dict[str, np.ndarray]
    frozen: list[str]
    padding: Mapping[str, int]
    without: frozenset[str]


def learned(
    subject: Subject, converted: Side, batches: Sequence[tuple[Tensor, Tensors]], task: Task, rows: Rows
) -> Learned:
    """From the loss of the heads that the class has. ImportError without transformers, NotComparable."""
    transformers = library.installed()
    for name in subject.config.get("architectures") or ():
        if isinstance(name, str) and not hasattr(transformers, name):
            version = transformers.__version__
            raise NotComparable(f"transformers {version}, which is installed, has no class {name}")
    said: list[str] = []
    without: set[str] = set()
    try:
        model, _ = library.load(transformers, subject, "float32", converted.weights[0].device, said)
        total = torch.zeros(())
        with torch.enable_grad(), library.listening(said):
            for ids, given in batches:
                out = model(**library.arguments(model, ids, given), output_hidden_states=True)
                heads = {n: (y, _named(out, n, y)) for n, y in converted.outputs(ids, given).items()}
                without |= {n for n, (_, found) in heads.items() if found is None}
                there = ((n, found) for n, (_, found) in heads.items() if found is not None)
                losses = [task.loss(n, found, ids, given) for n, found in there]
                total = total + sum(losses, torch.zeros(())) / len(batches)
        if not total.requires_grad:
            raise NotComparable(f"the class gives no output that is the {' or the '.join(sorted(without))}")
        total.backward()  # type: ignore[no-untyped-call]
    except NotComparable:
        raise
    except Exception as error:  # a library may raise anything
        raise NotComparable(one_line(error)) from error
    parameters = dict(model.named_parameters())
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    frozen = sorted(n for n, p in parameters.items() if not p.requires_grad)
    names = _in_memory(subject, converted, parameters)
    made = rows.folded(_by_name(converted, gradients, names))
    disk = {memory: name for name, memory in names.items()}
    padding = {disk.get(n, n): row for n, row in _padding(model).items()}
    version, names_of_frozen = str(transformers.__version__), [disk.get(n, n) for n in frozen]
    return Learned(version, made, names_of_frozen, padding, frozenset(without))


def _named(out: Mapping[str, Any], head: str, wanted: Tensor) -> Tensor | None:
    """The output of the class that a head of the reading is; None where it gives none."""
    for name in WORDS if head == "head" else (head,):
        found = out.get(name)
        if isinstance(found, Tensor) and found.shape[-1] == wanted.shape[-1]:
            return found
    found = (out.get("hidden_states") or [None])[-1]  # normalised last by some classes, and not by all
    if head == "head" and isinstance(found, Tensor) and found.shape == wanted.shape:
        first = found[:, 0], wanted[:, 0]  # a token that is never padding
        if torch.allclose(*first, rtol=1e-3, atol=1e-3):
            return found
    return None


def _in_memory(subject: Subject, converted: Side, parameters: Container[str]) -> dict[str, str]:
    """What the class calls each tensor of the disk."""
    kind = class_of(subject.config)
    held = {disk: memory for memory, disk in subject.family.held_as.items()} if subject.family else {}
    found = {}
    for name in converted.weights[0]:
        called = (name, held.get(name, name), name if kind is None else classes()[kind].in_memory(name))
        found[name] = next((n for n in called if n in parameters), name)
    return found


def _by_name(
    converted: Side, gradients: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """By the names on the disk: some tensors are called otherwise in memory, or stacked."""
    apart = getattr(converted.module, "apart", None)
    found = {}
    for name in converted.weights[0]:
        own = gradients.get(names[name])
        if own is None and apart is not None:
            try:
                own = apart(gradients, name)
            except KeyError:
                own = None
        if own is not None:
            found[name] = own.numpy(force=True)
    return found


def _padding(model: Any) -> dict[str, int]:
    tables = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    return {f"{n}.weight": m.padding_idx for n, m in tables.items() if m.padding_idx is not None}


def skipped(reason: str) -> Finding:
    return Finding(LEVEL, CHECK, "skipped", f"what the class learns was not compared: {reason}")
