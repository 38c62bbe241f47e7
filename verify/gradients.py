"""Gradients of a loss through a reading, and the same gradients as another layout's tensors have them.

A plan's steps move elements, so the gradient of a tensor moves as the tensor does: one that is permuted has a
permuted gradient. An element of which the original has several copies (tied, or one for each rank) has the
sum of theirs, and so has one of which the Hugging Face layout has several.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor

from ckpt_tool.convert.casting import CASTABLE
from ckpt_tool.convert.layout import Access, Part, Step
from ckpt_tool.reference import losses
from ckpt_tool.reference.hf_blocks import of_last_token
from ckpt_tool.reference.phases import Phase, Tree, leaves, mapped
from ckpt_tool.verify.sides import Side, Tensors
from ckpt_tool.verify.weights import Weights

Key = tuple[str, str]  # file and name
Gradients = dict[Key, np.ndarray]
EVERY = 3  # of the words that a model without an order is asked for, one of so many
NO_LABEL = -100


class Leaves(Mapping[str, Tensor]):
    """Tensors of one rank that collect gradients; those of one (file, name) are one, in all ranks and under
    all names. `asked` gets those that are read."""

    def __init__(self, weights: Weights, made: dict[Key, Tensor], asked: set[Key]) -> None:
        self.weights, self.made, self.asked = weights, made, asked

    def key(self, name: str) -> Key:
        info = self.weights.tensors[name]
        return (info.file, info.name)

    def __getitem__(self, name: str) -> Tensor:
        key = self.key(name)
        self.asked.add(key)
        if key not in self.made:
            x = self.weights[name].detach().clone()
            learns = (
                self.weights.tensors[name].dtype in CASTABLE
            )  # and not a code, packed with others or scaled
            self.made[key] = x.requires_grad_() if learns else x
        return self.made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights


class Cut(Mapping[str, Tensor]):
    """The same tensors, those of `shared` without their gradients."""

    def __init__(self, whole: Leaves, shared: Container[Key]) -> None:
        self.whole, self.shared = whole, shared

    def __getitem__(self, name: str) -> Tensor:
        x = self.whole[name]
        return x.detach() if self.whole.key(name) in self.shared else x

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __len__(self) -> int:
        return len(self.whole)

    def __contains__(self, name: object) -> bool:
        return name in self.whole


@dataclass(frozen=True)
class Task:
    """What is learned: which words there are, whether each is foretold by those before it, and what fills
    rows."""

    vocabulary: int
    causal: bool
    padding: int | None
    sequence: bool = False  # the class labels a sequence by its last token
    problem: str | None = None
    left_out: frozenset[str] = frozenset()  # heads that nothing is asked of

    def loss(self, head: str, y: Tensor, ids: Tensor, given: Tensors) -> Tensor:
        """That of one head, as its class has it, for labels that are made up of the ids and of places; of
        a model without a head the mean square of what it gives."""
        if y.ndim == 3 and y.shape[-1] == self.vocabulary and y.shape[:2] == ids.shape:
            return self._words(y, ids, given.get("mask"))
        if head in ("start_logits", "end_logits"):
            at = torch.full((len(y),), y.shape[1] // 2, device=y.device)
            return torch.nn.functional.cross_entropy(y, at)
        if head in ("head", "last_hidden_state", "pooler_output", "entity_last_hidden_state"):
            return self._hidden(y, given.get("mask"))
        if y.ndim == 3 and self.sequence:
            y = of_last_token(y, ids, self.padding)
        return self._classes(y)

    def _words(self, y: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        labels = ids if mask is None else ids.masked_fill(mask == 0, NO_LABEL)
        if self.causal:
            return losses.next_token(y, labels)
        asked = torch.arange(ids.shape[1], device=ids.device) % EVERY == 1
        return losses.labelled(y, labels.masked_fill(~asked, NO_LABEL))

    @staticmethod
    def _hidden(y: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and y.shape[:2] == mask.shape:
            y = y[mask.bool()]
        wave = torch.arange(y.numel(), device=y.device, dtype=y.dtype).sin().view_as(y)
        return (y - wave).square().mean()

    def _classes(self, y: Tensor) -> Tensor:
        rows = y.flatten(0, -2)
        if y.shape[-1] == 1 or self.problem == "regression":
            return (rows - 0.5).square().mean()
        labels = torch.arange(len(rows), device=y.device) % y.shape[-1]
        if self.problem == "multi_label_classification":
            wanted = torch.nn.functional.one_hot(labels, y.shape[-1]).to(y.dtype)
            return losses.classification(rows, wanted, self.problem)
        return losses.labelled(rows, labels)


@dataclass
class Taught:
    """Gradients of one side by tensor, the loss, and the tensors themselves."""

    gradients: Gradients
    loss: float
    tensors: dict[Key, Tensor] = field(default_factory=dict)
    shared: frozenset[Key] = frozenset()  # that heads use, and what comes before them too


@dataclass(frozen=True)
class Flaw:
    """A mistake of training in one side: what comes out of the phase is cut off from those before it
    (`detached`), or what the heads make of tensors that were used before them does not count (`output`)."""

    detached: str | None = None
    output: bool = False


def taught(side: Side, prompts: Sequence[tuple[Tensor, Tensors]], task: Task, flaw: Flaw = Flaw()) -> Taught:
    """The gradients of the mean loss over the prompts and heads."""
    made: dict[Key, Tensor] = {}
    asked: set[Key] = set()
    ranks = [Leaves(w, made, asked) for w in side.weights]
    total, both = 0.0, set[Key]()
    for ids, given in prompts:
        asked.clear()
        shared: set[Key] = set()
        phases = _phases(side, ranks, given, shared if flaw.output else None)
        with torch.enable_grad():
            x: Tree = ids
            for phase in (p for p in phases if p.kind != "head"):
                x = phase.run(x)
                if phase.name == flaw.detached:
                    x = mapped(lambda t: t.detach(), x)
            shared |= asked
            asked.clear()
            heads = [(p.name, p.run(x)) for p in phases if p.kind == "head" and p.name not in task.left_out]
            loss = sum(
                (task.loss(n, y, ids, given) for n, y in heads if any(t.numel() for t in leaves(y))),
                torch.zeros((), dtype=side.weights[0].dtype, device=ids.device),
            )
            loss = loss / len(prompts)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
        both |= shared & asked
    found = {k: t.grad.cpu().numpy() for k, t in made.items() if t.grad is not None}
    return Taught(found, total, {k: t.detach() for k, t in made.items()}, frozenset(both))


def _phases(
    side: Side, ranks: Sequence[Leaves], given: Tensors, shared: Container[Key] | None
) -> list[Phase]:
    own: list[Phase] = side.module.phases(ranks, side.config, given)
    if shared is None:
        return own
    cut: list[Phase] = side.module.phases([Cut(r, shared) for r in ranks], side.config, given)
    return [b if a.kind == "head" else a for a, b in zip(own, cut, strict=True)]


# --- through the rows of a plan -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The steps of a plan from the original to the Hugging Face layout, whichever way it converts. `key` is
    where the original has a part, `name` what the other layout calls one."""

    steps: tuple[Step, ...]
    key: Callable[[Part], Key]
    shapes: Mapping[str, tuple[int, ...]]  # of the Hugging Face layout

    @property
    def own(self) -> Iterator[Step]:
        """Those that say where each element is at home there: all but those that write it again."""
        return (s for s in self.steps if not s.copied)

    @property
    def copies(self) -> Iterator[Step]:
        return (s for s in self.steps if s.copied)

    def forth(self, gradients: Gradients) -> dict[str, np.ndarray]:
        """Those of an original as the other layout has them, summed where it has one place for several."""
        found: dict[str, np.ndarray] = {}
        for step in self.own:
            sources = [gradients.get(self.key(p)) for p in step.sources]
            if all(x is None for x in sources):
                continue
            made = moved(step, _whole(step.sources, step, sources))
            for part, x in zip(step.targets, made, strict=True):
                _add(found, part.name, x.reshape(self.shapes.get(part.name, x.shape)))
        return found

    def folded(self, gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Those of the Hugging Face layout with what its copies have added to where the elements are at
        home, and nothing in the copies."""
        found = {name: x.copy() for name, x in gradients.items()}
        back: Gradients = {}
        whole: dict[str, int] = {}  # elements of each that are copies
        for step in self.copies:
            taken = [gradients.get(p.name) for p in step.targets]
            if all(x is None for x in taken):
                continue
            way = Step(step.axes, step.targets, step.sources)
            for part, x in zip(step.sources, moved(way, _whole(step.targets, step, taken)), strict=True):
                _add(back, self.key(part), x)
            ones = [np.ones(prod(p.shape(step.sizes))) for p in step.sources]
            for part, hit in zip(step.targets, moved(step, ones), strict=True):
                if part.name in found:
                    found[part.name][hit.reshape(found[part.name].shape) > 0] = 0
                    whole[part.name] = whole.get(part.name, 0) + int(hit.sum())
        found = {name: x for name, x in found.items() if whole.get(name) != x.size}
        for name, x in self.forth(back).items():
            _add(found, name, x)
        return found

    def left_out(self, gradients: Gradients) -> list[tuple[Key, float]]:
        """Elements of the original that go nowhere and have a gradient: their largest, by tensor."""
        seen: dict[Key, np.ndarray] = {}
        for step in self.steps:
            for block in step.blocks():
                for access in block.reads:
                    part = step.sources[access.part]
                    key = self.key(part)
                    if key in gradients:
                        hit = seen.setdefault(key, np.zeros(gradients[key].size, bool))
                        hit[_places(access)] = True
        found = []
        for key, x in gradients.items():
            rest = x.ravel() if key not in seen else x.ravel()[~seen[key]]
            if rest.size and (top := float(np.abs(rest).max())) > 0:
                found.append((key, top))
        return found


def moved(step: Step, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The targets of `step`, with zeros where it puts nothing."""
    flat = [np.ascontiguousarray(x).reshape(-1) for x in arrays]
    out = [np.zeros(prod(p.shape(step.sizes)), dtype=flat[0].dtype) for p in step.targets]
    for block in step.blocks():
        inputs = [flat[a.part][_places(a)] for a in block.reads]
        outputs = [np.zeros(n, dtype=flat[0].dtype) for n in block.filled]
        block.shuffle(inputs, outputs)
        for access, values in zip(block.writes, outputs, strict=True):
            out[access.part][_places(access)] = values
    return [x.reshape(p.shape(step.sizes)) for x, p in zip(out, step.targets, strict=True)]


def _places(access: Access) -> np.ndarray | slice:
    """Which elements of a flat tensor."""
    runs = access.runs
    starts = runs.offsets()
    if len(starts) == 1:
        return slice(starts[0], starts[0] + runs.length)
    return (np.array(starts)[:, None] + np.arange(runs.length)).reshape(-1)


def _whole(parts: Sequence[Part], step: Step, arrays: Iterable[np.ndarray | None]) -> list[np.ndarray]:
    """The arrays, with zeros for what has no gradient."""
    known = list(arrays)
    dtype = next(x.dtype for x in known if x is not None)
    pairs = zip(parts, known, strict=True)
    return [np.zeros(p.shape(step.sizes), dtype) if x is None else x for p, x in pairs]


def _add(found: dict[Key, np.ndarray] | dict[str, np.ndarray], key: Key | str, x: np.ndarray) -> None:
    found[key] = found[key] + x if key in found else x  # type: ignore[index]
