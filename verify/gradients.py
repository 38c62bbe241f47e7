"""Gradients of a loss through a reading, and the same gradients as another layout's tensors have them.

A plan's steps move elements, so the gradient of a tensor moves as the tensor does: one that is permuted has a
permuted gradient. An element of which the original has several copies (tied, or one for each rank) has the
sum of theirs, and so has one of which the Hugging Face layout has several.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from ckpt_tool.convert.casting import CASTABLE
from ckpt_tool.convert.layout import Access, Part, Step
from ckpt_tool.reference import losses
from ckpt_tool.reference.hf_blocks import of_last_token
from ckpt_tool.reference.phases import Phase, Tree, leaves, mapped
from ckpt_tool.verify.sides import Side, Tensors, holds_numbers
from ckpt_tool.verify.weights import Weights

Key = tuple[str, str]  # file and name
Gradients = dict[Key, np.ndarray]
Batches = Sequence[tuple[Tensor, Tensors]]
Take = Callable[[Key, np.ndarray | None], None]
Grads = list[Tensor | None]  # of the tensors of a tree, in order
HEADS = "heads"
EVERY = 3  # of the words that a model without an order is asked for, one of so many
NO_LABEL = -100


class Leaves(Mapping[str, Tensor]):
    """Tensors of one rank that collect gradients; those of one (file, name) are one, in all ranks and under
    all names. `asked` gets those that are read, and `begun` are gradients that are added to."""

    def __init__(
        self, weights: Weights, made: dict[Key, Tensor], asked: set[Key], begun: dict[Key, Tensor]
    ) -> None:
        self.weights, self.made, self.asked, self.begun = weights, made, asked, begun

    def key(self, name: str) -> Key:
        info = self.weights.tensors[name]
        return (info.file, info.name)

    def __getitem__(self, name: str) -> Tensor:
        key = self.key(name)
        self.asked.add(key)
        if key not in self.made:
            x = self.weights[name].detach()
            if self.weights.tensors[name].dtype in CASTABLE and name not in self.weights.several:
                x.requires_grad_()
                x.grad = self.begun.get(key)
            self.made[key] = x
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


@dataclass(frozen=True)
class Taught:
    """What is known when all gradients of a side are handed on: the loss, the tensors that were read, and
    those of them that heads use and what comes before them too."""

    loss: float
    read: frozenset[Key]
    shared: frozenset[Key]


@dataclass(frozen=True)
class Flaw:
    """A mistake of training in one side: what comes out of the phase is cut off from those before it
    (`detached`), or what the heads make of tensors that were used before them does not count (`output`)."""

    detached: str | None = None
    output: bool = False


def taught(side: Side, prompts: Batches, task: Task, take: Take, flaw: Flaw = Flaw()) -> Taught:
    """The gradients of the mean loss over the prompts and heads: `take` gets each as soon as it is whole,
    those of the last phase first, and None of a tensor that was read and has none.

    Each phase is computed twice, the second time from what went into it with what its gradients need. So the
    weights of one phase are in memory at a time, and of gradients those of tensors that phases share."""
    walk = _Walk(side, prompts, task, flaw, take)
    walk.forth()
    walk.back()
    return Taught(walk.loss, frozenset(walk.first), walk.shared)


class _Walk:
    """A pass of one side over prompts, and back. `into` is what goes into each phase, by prompt; `first` the
    phase that reads a tensor before all others, after which its gradient is whole."""

    def __init__(self, side: Side, prompts: Batches, task: Task, flaw: Flaw, take: Take) -> None:
        self.side, self.prompts, self.task, self.flaw, self.take = side, prompts, task, flaw, take
        self.made: dict[Key, Tensor] = {}
        self.asked: set[Key] = set()
        self.begun: dict[Key, Tensor] = {}
        self.ranks = [Leaves(w, self.made, self.asked, self.begun) for w in side.weights]
        self.into: list[dict[str, Tree]] = [{} for _ in prompts]
        self.first: dict[Key, str] = {}
        self.shared: frozenset[Key] = frozenset()
        self.loss = 0.0
        phases = (p for k in range(len(prompts)) for p in self._phases(k).values())
        self.order = list(dict.fromkeys(p.name for p in phases if p.kind != "head"))

    def _phases(self, k: int, cut: Container[Key] = ()) -> dict[str, Phase]:
        """Those of a prompt; `cut` are tensors without their gradients."""
        ranks = [Cut(r, cut) for r in self.ranks] if cut else self.ranks
        found: list[Phase] = self.side.module.phases(ranks, self.side.config, self.prompts[k][1])
        return {p.name: p for p in found}

    def _done(self, name: str) -> None:
        """Forget the weights of a phase, and note what it has read."""
        for key in self.asked:
            self.first.setdefault(key, name)
        self.begun.update((key, x.grad) for key, x in self.made.items() if x.grad is not None)
        self.asked.clear()
        self.made.clear()

    def _hand_on(self, name: str) -> None:
        """The gradients of tensors that no earlier phase reads."""
        for key in [key for key, first in self.first.items() if first == name]:
            x = self.begun.pop(key, None)
            self.take(key, None if x is None else x.cpu().numpy())

    def forth(self) -> None:
        """What goes into each phase, and into the heads, of which nothing else is kept."""
        x: list[Tree] = [ids for ids, _ in self.prompts]
        with torch.no_grad():
            for name in self.order:
                for k, own in enumerate(self.into):
                    if (phase := self._phases(k).get(name)) is not None:
                        own[name] = x[k]
                        x[k] = phase.run(x[k])
                self._done(name)
        for own, last in zip(self.into, x, strict=True):
            own[HEADS] = last

    def back(self) -> None:
        before = frozenset(self.first)
        after = [self._of_heads(k, before) for k in range(len(self.prompts))]
        self.shared = before & self.asked
        self._done(HEADS)
        self._hand_on(HEADS)
        for name in reversed(self.order):
            if name == self.flaw.detached:
                after = [[None] * len(grads) for grads in after]
            after = [self._of_phase(name, k, grads) for k, grads in enumerate(after)]
            self._done(name)
            self._hand_on(name)

    def _of_heads(self, k: int, before: frozenset[Key]) -> Grads:
        """The gradients of what the heads start from."""
        x, (ids, given) = _leaves_of(self.into[k].pop(HEADS)), self.prompts[k]
        phases = self._phases(k, before if self.flaw.output else ())
        with torch.enable_grad():
            heads = ((n, p.run(x)) for n, p in phases.items() if p.kind == "head")
            asked = ((n, y) for n, y in heads if n not in self.task.left_out and holds_numbers(y))
            loss = torch.zeros((), dtype=self.side.weights[0].dtype, device=ids.device)
            loss = sum((self.task.loss(n, y, ids, given) for n, y in asked), loss) / len(self.prompts)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        self.loss += float(loss.detach())
        return [t.grad for t in leaves(x)]

    def _of_phase(self, name: str, k: int, after: Grads) -> Grads:
        """The gradients of what goes into a phase, by those of what comes out of it."""
        if name not in self.into[k]:
            return after
        x = _leaves_of(self.into[k].pop(name))
        if any(g is not None for g in after):
            with torch.enable_grad():
                made = leaves(self._phases(k)[name].run(x))
            known = [(y, g) for y, g in zip(made, after, strict=True) if y.requires_grad and g is not None]
            if known:
                torch.autograd.backward([y for y, _ in known], [g for _, g in known])
        return [t.grad for t in leaves(x)]


def _leaves_of(x: Tree) -> Tree:
    """The same tree, which collects gradients."""
    return mapped(lambda t: t.detach().requires_grad_(t.is_floating_point()), x)


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
        carried = Carried(self, found.__setitem__)
        for key, x in gradients.items():
            carried.take(key, x)
        carried.close()
        return found

    def folded(self, gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Those of the Hugging Face layout with what its copies have added to where the elements are at
        home, and nothing in the copies. What no copy concerns is handed on as it is."""
        found, back = dict(gradients), Gradients()
        whole: dict[str, int] = {}  # elements of each that are copies
        for step in self.copies:
            taken = [gradients.get(p.name) for p in step.targets]
            if all(x is None for x in taken):
                continue
            way = Step(step.axes, step.targets, step.sources)
            for part, x in zip(step.sources, moved(way, _whole(step.targets, step, taken)), strict=True):
                _add(back, self.key(part), x)
            ones = [np.ones(prod(p.shape(step.sizes)), bool) for p in step.sources]
            for part, hit in zip(step.targets, moved(step, ones), strict=True):
                if (own := found.get(part.name)) is not None:
                    found[part.name] = np.where(hit.reshape(own.shape), own.dtype.type(0), own)
                    whole[part.name] = whole.get(part.name, 0) + int(hit.sum())
        found = {name: x for name, x in found.items() if whole.get(name) != x.size}
        for name, x in self.forth(back).items():
            _add(found, name, x)
        return found

    @cached_property
    def of_copies(self) -> frozenset[str]:
        """Tensors of the Hugging Face layout that copies take from or add to."""
        keys = {self.key(p) for s in self.copies for p in s.sources}
        home = {p.name for s in self.own if keys & {self.key(x) for x in s.sources} for p in s.targets}
        return frozenset(home | {p.name for s in self.copies for p in s.targets})

    @cached_property
    def readers(self) -> Mapping[Key, list[Step]]:
        """The steps that read each tensor of the original, copies among them."""
        found: dict[Key, list[Step]] = {}
        for step in self.steps:
            for key in {self.key(p) for p in step.sources}:
                found.setdefault(key, []).append(step)
        return found

    def left_out(self, key: Key, x: np.ndarray) -> float:
        """The largest of the elements of an original's tensor that go nowhere; 0 where all do."""
        rest = np.ones(x.size, bool)
        for step in self.readers.get(key, ()):
            for block in step.blocks():
                for access in block.reads:
                    if self.key(step.sources[access.part]) == key:
                        rest[_places(access)] = False
        return float(np.abs(x.ravel()[rest]).max()) if rest.any() else 0.0


class Carried:
    """Gradients of an original on their way through the rows: `give` gets each tensor of the other layout as
    soon as all that goes into it is there, and nothing is held longer than it is needed."""

    def __init__(self, rows: Rows, give: Callable[[str, np.ndarray], None]) -> None:
        self.rows, self.give = rows, give
        self.held: Gradients = {}
        self.made: dict[str, np.ndarray] = {}
        self.steps = dict(enumerate(rows.own))  # those that are still to come
        self.waits: dict[int, set[Key]] = {}
        self.readers: dict[Key, set[int]] = {}
        self.writers: dict[str, set[int]] = {}
        for n, step in self.steps.items():
            self.waits[n] = {rows.key(p) for p in step.sources}
            for key in self.waits[n]:
                self.readers.setdefault(key, set()).add(n)
            for part in step.targets:
                self.writers.setdefault(part.name, set()).add(n)

    def take(self, key: Key, x: np.ndarray | None) -> None:
        """None of a tensor that has no gradient."""
        if x is not None and key in self.readers:
            self.held[key] = x
        for n in list(self.readers.get(key, ())):
            self.waits[n].discard(key)
            if not self.waits[n]:
                self._run(n)

    def close(self) -> None:
        """What did not come has no gradient."""
        for n in list(self.steps):
            self._run(n)

    def _run(self, n: int) -> None:
        step = self.steps.pop(n)
        keys = [self.rows.key(p) for p in step.sources]
        if any(key in self.held for key in keys):
            for part, x in zip(step.targets, self._moved(step, keys), strict=True):
                _add(self.made, part.name, x.reshape(self.rows.shapes.get(part.name, x.shape)))
        for key in set(keys):
            self.readers[key].discard(n)
            if not self.readers[key]:
                self.held.pop(key, None)
        for name in {p.name for p in step.targets}:
            self.writers[name].discard(n)
            if not self.writers[name] and name in self.made:
                self.give(name, self.made.pop(name))

    def _moved(self, step: Step, keys: Sequence[Key]) -> list[np.ndarray]:
        return moved(step, _whole(step.sources, step, [self.held.get(key) for key in keys]))


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
