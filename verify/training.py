"""The level `training`: does the converted model learn as the original does?

Equal logits do not show it: a parameter that is frozen, an output layer that is tied or not, a path that is
cut off, another group of weight decay, another dropout. So the loss is taken back through both readings, the
original's gradients go through the rows of the plan as its tensors did, and both take one step of AdamW.
Gradients are judged in float32 against the original's in float64, by how far the original's own float32 is
from those; the step is taken in float64, as one of rounding alone is a whole step where a gradient is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from torch import Tensor

from ckpt_tool.checkpoint.tensor_names import stack_of
from ckpt_tool.convert.casting import CASTABLE
from ckpt_tool.convert.copies import apart as copies_apart
from ckpt_tool.convert.facts import class_of, classes
from ckpt_tool.convert.layout import Part, Step
from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass
from ckpt_tool.verify import optimizer, training_groups, training_library
from ckpt_tool.verify.gradients import Batches, Carried, Flaw, Key, Rows, Task, Taught, taught
from ckpt_tool.verify.measure import MARGIN
from ckpt_tool.verify.needs import free_memory, size_text, told
from ckpt_tool.verify.optimizer import AdamW
from ckpt_tool.verify.packed_weights import PackedWeights
from ckpt_tool.verify.prompts import Prompt, padding_of
from ckpt_tool.verify.report import Finding, Status, Table, number
from ckpt_tool.verify.sides import BROKEN, Side, tensors
from ckpt_tool.verify.subject import Subject

LEVEL = "training"
FEW = 160  # tokens of a prompt to learn from
MOVED = 3  # times the largest tensor: a gradient beside the sum of others, and on its way through the rows
LIBRARIES = 400 << 20  # bytes that torch and the readers take before any weight
USUAL = 4 << 30
CAP = 1e-6  # of the energy of a gradient, whatever the noise
NOTHING = 1e-20  # of the mean square of all gradients: what is below is rounding, not a gradient
STEP = 1e-6  # of the learning rate: how far tensors may be apart after one step
PIECE = 1 << 20  # elements that take the step at once
RIGHT = Flaw()  # none
NAMED = 5  # tensors that are told one by one

Found = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Wanted:
    """The original's gradients as the Hugging Face layout has them, in float64. `noise` is how far those in
    float32 are off, as a sum of squares for each tensor."""

    gradients: Found
    energies: Mapping[str, float]
    noise: Mapping[str, float]
    loss: float
    left_out: Sequence[tuple[Key, float]]
    typical: float  # noise over energy, of the median tensor
    mean_square: float  # of all gradients

    def energy(self, name: str) -> float:
        return self.energies.get(name, 0.0)


@dataclass(frozen=True)
class Apart:
    """One tensor's gradient: the share of its energy that is off, and the bar; `lost` where there should be
    one and is none."""

    name: str
    nmse: float
    bar: float
    lost: bool
    seen: bool  # the loss depends on it at all
    alone: bool = False  # the original has no such tensor
    noisy: bool = False  # float32 is off by more than the cap on the original's own side: no judge

    @property
    def holds(self) -> bool:
        return self.noisy or self.nmse <= self.bar


def training(
    subject: Subject,
    original: Side,
    converted: Side,
    prompts: Mapping[str, Prompt],
    *,
    memory: int | None = None,
    against: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Finding]:
    """The findings of this level; `against` transformers its class is asked, too. `usage` for a `memory` that
    is not enough."""
    if (why := unmapped(subject, converted)) is not None:
        return [Finding(LEVEL, "gradients", "skipped", why)]
    batches = _batches(original, prompts)
    if not batches:
        return [Finding(LEVEL, "gradients", "skipped", "no prompt is short enough to learn from")]
    needed = _needed(original, converted, batches, against)
    if memory is not None and needed > memory:
        fail("usage", f"expected at least {size_text(needed)} for gradients, found {size_text(memory)}",
             where="memory")  # fmt: skip
    if memory is None and needed > USUAL:
        text = f"gradients of the whole model need {size_text(needed)} of memory, more than "
        return [Finding(LEVEL, "gradients", "skipped", f"{text}{size_text(USUAL)} (--memory allows more)")]
    if needed > (free := free_memory()) and converted.weights[0].device == "cpu":
        text = f"expected {size_text(needed)} of free memory for gradients, found {size_text(free)}"
        fail("out-of-memory", text, where="--level training", hint="other levels take less")
    tell(f"training: gradients, needs about {size_text(needed)} of memory")
    return _compared(subject, original, converted, batches, against, tell)


def unmapped(subject: Subject, converted: Side) -> str | None:
    """Why gradients cannot be taken, or not through the plan; None where they can."""
    if subject.plan is None:
        return subject.problems[0].message if subject.problems else "there is no plan"
    if any(name.endswith(".running_mean") for name in converted.weights[0]):
        return "batch norms take their numbers from each batch in training, and this pass does not"
    if any(step.mean for step in subject.plan.steps):
        return "heads were pooled: the converted model is another one, and learns otherwise"
    if any(_unpacks(step) for step in subject.plan.steps):
        return "weights are packed in one layout and numbers in the other: only the second can learn"
    return None


def _unpacks(step: Step) -> bool:
    """Whether numbers become codes, or codes numbers."""
    return len({p.dtype in CASTABLE for p in (*step.sources, *step.targets)}) > 1


def _batches(original: Side, prompts: Mapping[str, Prompt]) -> Batches:
    device = original.weights[0].device
    sizes = {name: sum(map(len, p.ids)) for name, p in prompts.items()}
    return [tensors(prompts[n], device) for n, size in sizes.items() if 1 < size <= FEW]


def _needed(original: Side, converted: Side, batches: Batches, against: str | None) -> int:
    """Bytes: what is wanted of the whole model in float64 (with `against` its class and gradients in float32
    beside it), of the largest phase weights and gradients, of the largest tensor what moves through the rows,
    and what a layer of the longest prompt keeps."""
    sides = (original, converted)
    counts = [_sizes(s) for s in sides]
    whole = max(sum(sizes.values()) for sizes, _ in counts)
    phase, tensor = max(max(sizes.values()) for sizes, _ in counts), max(largest for _, largest in counts)
    longest = max((ids.numel() for ids, _ in batches), default=0)
    config = converted.raw
    width = max((int(config[k]) for k in ("hidden_size", "n_embd") if type(config.get(k)) is int), default=1)
    heads = max((int(config[k]) for k in ("num_attention_heads", "n_head") if type(config.get(k)) is int),
                default=1)  # fmt: skip
    layers = converted.config.n_layers * sum(ids.numel() for ids, _ in batches) * width * 8
    kept = layers + longest * (40 * width + 4 * heads * longest) * 8
    held = 8 * whole + 16 * phase + MOVED * 8 * tensor + (12 * whole if against is not None else 0)
    return told(LIBRARIES + held + kept + 8 * longest * converted.vocabulary * 4)


def _sizes(side: Side) -> tuple[dict[tuple[str, int], int], int]:
    """The elements of each layer, and of each tensor outside of them; and those of the largest tensor."""
    sizes: dict[tuple[str, int], int] = {}
    largest = 0
    for w in side.weights:
        for name, t in w.tensors.items():
            group = stack_of(name) or (name, 0)
            sizes[group] = sizes.get(group, 0) + t.numel
            largest = max(largest, t.numel)
    return sizes, largest


def task_of(subject: Subject, converted: Side) -> Task:
    kind = class_of(subject.config)
    causal = kind is None or classes()[kind].causal
    architecture = str((subject.config.get("architectures") or [""])[0])
    masked = architecture.endswith(("MaskedLM", "ForPreTraining"))
    return Task(
        converted.vocabulary,
        causal and not masked,
        padding_of(subject.config),
        architecture.endswith("ForSequenceClassification"),
        subject.config.get("problem_type"),
    )


# --- gradients ----------------------------------------------------------------------------------------------


def rows_of(subject: Subject, converted: Side) -> Rows:
    """The steps of the plan from the original on."""
    assert subject.plan is not None
    shapes = {name: tuple(t.shape) for name, t in converted.weights[0].tensors.items()}
    if subject.direction == "to-hf":
        steps = tuple(one for step in subject.plan.steps for one in copies_apart(step))
        if subject.keeps_layout:  # its reading knows the names that the class writes
            steps = tuple(s for s in steps if not s.compare)
            pairs = [(p, t) for s in steps for p, t in zip(s.sources, s.targets, strict=False)]
            renamed = {(p.file, p.name): t.name for p, t in pairs}
            return Rows(steps, lambda p: (p.file, renamed.get((p.file, p.name), p.name)), shapes)
        return Rows(steps, lambda p: (p.file, p.name), shapes)

    def held(part: Part) -> Key:
        found = subject.target(part.file, part.name)
        return (part.file, part.name) if found is None else (found.file, found.name)

    # what is compared on the way back is a copy of what is at home elsewhere
    steps = tuple(replace(s.inverse(), copied=s.copied or bool(s.compare)) for s in subject.plan.steps)
    return Rows(steps, held, shapes)


def _wanted(original: Side, rows: Rows, batches: Batches, task: Task) -> Wanted:
    """What is held of the whole model: these gradients, and of those in float32 a number for each tensor."""
    gradients: dict[str, np.ndarray] = {}
    noise: dict[str, float] = {}
    left: list[tuple[Key, float]] = []
    carried = Carried(rows, gradients.__setitem__)

    def take(key: Key, x: np.ndarray | None) -> None:
        if x is not None and (top := rows.left_out(key, x)) != 0:
            left.append((key, top))
        carried.take(key, x)

    exact = taught(original.computed_in(torch.float64), batches, task, take)
    carried.close()

    def compare(name: str, x: np.ndarray) -> None:
        if name in gradients:
            noise[name] = _energy(x, gradients[name])

    rough = Carried(rows, compare)
    taught(original.computed_in(torch.float32), batches, task, rough.take)
    rough.close()
    noise = {name: noise.get(name, math.inf) for name in gradients}
    energies = {n: _energy(x) for n, x in gradients.items()}
    count = sum(x.size for x in gradients.values())
    mean_square = sum(energies.values()) / max(1, count)
    shares = [noise[n] / e for n, e in energies.items() if e > NOTHING * mean_square * gradients[n].size]
    return Wanted(gradients, energies, noise, exact.loss, left, median(shares or [0.0]), mean_square)


def _learned(
    converted: Side,
    rows: Rows,
    batches: Batches,
    task: Task,
    give: Callable[[str, np.ndarray | None], None],
    flaw: Flaw = RIGHT,
) -> Taught:
    """`give` gets the gradients of the converted side by name, with what copies add where their elements are
    at home, and None of a tensor that was read and has none."""
    (weights,) = converted.weights
    names = {(info.file, info.name): name for name, info in weights.tensors.items()}
    copied: dict[str, np.ndarray] = {}

    def take(key: Key, x: np.ndarray | None) -> None:
        if x is not None and names[key] in rows.of_copies:
            copied[names[key]] = x
        else:
            give(names[key], x)

    made = taught(converted, batches, task, take, flaw)
    for name, x in rows.folded(copied).items() if copied else ():
        give(name, x)
    return made


def apart(wanted: Wanted, found: Found) -> list[Apart]:
    """Each tensor that has a gradient on either side."""
    return [_apart(wanted, name, found.get(name)) for name in sorted({*wanted.gradients, *found})]


def _apart(wanted: Wanted, name: str, other: np.ndarray | None) -> Apart:
    right = wanted.gradients.get(name)
    one = right if right is not None else other
    assert one is not None
    floor = NOTHING * wanted.mean_square * one.size
    energy = max(wanted.energy(name), floor)
    off = _energy(one) if right is None or other is None else _energy(other, right)
    noise = max(wanted.noise.get(name, 0.0), wanted.typical * energy, floor)
    bar = MARGIN**2 * noise / energy
    if energy > floor:
        bar = min(bar, CAP)
    seen = energy > floor
    noisy = seen and not wanted.noise.get(name, 0.0) <= CAP * energy
    lost = seen and not noisy and (other is None or not other.any())
    return Apart(name, off / energy, bar, lost, seen, right is None, noisy)


def _all_apart(
    wanted: Wanted, converted: Side, rows: Rows, batches: Batches, task: Task, flaw: Flaw = RIGHT
) -> tuple[list[Apart], Taught]:
    """As `apart`, of the converted side in float32, one gradient after the other."""
    made: dict[str, Apart] = {}

    def give(name: str, x: np.ndarray | None) -> None:
        if x is not None:
            made[name] = _apart(wanted, name, x)

    done = _learned(converted.computed_in(torch.float32), rows, batches, task, give, flaw)
    made |= {name: _apart(wanted, name, None) for name in wanted.gradients.keys() - made.keys()}
    return [made[name] for name in sorted(made)], done


def _energy(x: np.ndarray, other: np.ndarray | None = None) -> float:
    """The sum of the squares of x, or of x - other, some elements at a time."""
    total, flat = 0.0, x.reshape(-1)
    for start in range(0, x.size, PIECE):
        piece = flat[start : start + PIECE].astype(np.float64, copy=False)
        if other is not None:
            piece = piece - other.reshape(-1)[start : start + PIECE]
        total += float(piece @ piece)
    return total


def _compared(
    subject: Subject,
    original: Side,
    converted: Side,
    batches: Batches,
    against: str | None,
    tell: Callable[[str], None],
) -> list[Finding]:
    rows, task = rows_of(subject, converted), task_of(subject, converted)
    try:
        wanted = _wanted(original, rows, batches, task)
    except BROKEN as error:
        return [Finding(LEVEL, "gradients", "undecided", f"the original's own pass cannot learn: {error}")]
    if not math.isfinite(wanted.loss + wanted.mean_square):
        text = f"the original's own loss is {number(wanted.loss)}, and teaches nothing"
        return [Finding(LEVEL, "gradients", "undecided", text)]
    tell("training: gradients of the converted model")
    try:
        each, rough = _all_apart(wanted, converted, rows, batches, task)
        if (other := _other_heads(original, converted, each)) is not None:
            return [other]
        tell("training: one step of both")
        after = _Steps(converted, wanted, recipe_of(subject), _strongest(wanted, each))
        exact = _learned(after.converted, rows, batches, task, after.take)
    except BROKEN as error:
        return [Finding(LEVEL, "gradients", "fail", f"the converted model cannot learn: {error}")]
    what = f"{len(batches)} prompts, {sum(ids.numel() for ids, _ in batches)} tokens"
    packed = _packed(converted)
    made = [*_gradient_findings(wanted, each, _twins(after.converted, each), exact.loss, what, packed)]
    made += training_groups.findings(rows)
    made += after.findings()
    made += [*training_groups.dropouts(subject), *_unread(after.converted)]
    if against is not None:
        tell("training: gradients of transformers")
        made += _of_library(subject, original, converted, batches, task, rows, wanted)
    if not any(f.status == "fail" for f in made):
        tell("training: planting mistakes")
        made.append(_planted(converted, rows, batches, task, wanted, rough, after, subject))
    return made


def _unread(converted: Side) -> list[Finding]:
    """The tensors that no prompt reached: of what they learn nothing is known."""
    (weights,) = converted.weights
    unread = [n for n in weights if n not in weights.used]
    if not unread:
        return []
    count = f"{len(unread)} of {len(weights)} tensors"
    text = f"{count} were not read by any prompt (experts never chosen, or unused)"
    data = {"tensors": unread[:100], "part": f"what no prompt reached ({count})"}
    return [Finding(LEVEL, "unseen", "note", text, ", ".join(unread[:3]), data=data)]


def _strongest(wanted: Wanted, each: Sequence[Apart]) -> str | None:
    """The tensor whose gradient has the most energy, of those that have one on both sides."""
    both = (a.name for a in each if not a.alone and not a.lost)
    return max(both, key=wanted.energy, default=None)


def _other_heads(original: Side, converted: Side, each: Sequence[Apart]) -> Finding | None:
    """That the sides learn different things, where gradients differ and a head of one is not in the other."""
    own = original.heads(), converted.heads()
    new = [a.name for a in each if a.alone and not a.holds]
    if set(own[0]) == set(own[1]) or all(a.holds for a in each):
        return None
    what = f"one with {', '.join(new[:NAMED])}" if new else f"another ({', '.join(own[1]) or 'none'})"
    text = f"expected the head of the original, found {what}: a head that it does not have cannot be compared"
    return Finding(LEVEL, "gradients", "fail", text, "config.json: architectures")


def _of_library(
    subject: Subject,
    original: Side,
    converted: Side,
    batches: Batches,
    task: Task,
    rows: Rows,
    wanted: Wanted,
) -> list[Finding]:
    try:
        own = training_library.learned(subject, converted, batches, task, rows)
    except (ImportError, training_library.NotComparable) as error:
        return [training_library.skipped(str(error))]
    if own.without:  # and what it has learns without them
        wanted = _wanted(original, rows, batches, replace(task, left_out=own.without))
    version, found, frozen, padding = own.version, own.gradients, own.frozen, own.padding
    for name in padding.keys() & found.keys() & wanted.gradients.keys():
        found[name][padding[name]] = wanted.gradients[name][padding[name]]
    each = apart(wanted, found)
    bad = sorted((a for a in each if not a.holds), key=lambda a: (a.name not in frozen, -a.nmse))
    made = []
    for a in bad[:NAMED]:
        why = f"transformers {version} does not teach it (requires_grad is false)"
        text = why if a.name in frozen else f"transformers {version}: {_in_words(a, bad, {})}"
        made.append(Finding(LEVEL, "transformers", "fail", text, a.name, a.nmse, a.bar))
    if made:
        return made
    seen = [a for a in each if a.seen]
    text = f"transformers {version} gives {len(seen)} tensors the gradients of the original"
    if padding:
        text += f"; rows of padding are not taught, so not compared ({', '.join(sorted(padding))})"
    if own.without:
        text += f"; from the loss without the {', '.join(sorted(own.without))}, which the class does not give"
    worst = max(seen, key=lambda a: a.nmse / a.bar if a.bar else 0.0)
    return [Finding(LEVEL, "transformers", "pass", text, None, worst.nmse, worst.bar)]


def _twins(converted: Side, each: Sequence[Apart]) -> dict[str, str]:
    """Of tensors that the original has not: another that differs in its gradient and has equal values."""
    (weights,) = converted.weights
    found = {}
    for own in (a.name for a in each if a.alone and a.name in weights):
        for other in (a.name for a in each if not a.alone and not a.holds and a.name in weights):
            alike = weights.tensors[own].shape == weights.tensors[other].shape
            if alike and torch.equal(weights[own], weights[other]):
                found[own] = other
    return found


def _gradient_findings(
    wanted: Wanted, each: list[Apart], twins: Mapping[str, str], loss: float, what: str, packed: str
) -> list[Finding]:
    bad = sorted((a for a in each if not a.holds), key=lambda a: (not a.alone, -a.nmse))
    made = [
        Finding(LEVEL, "gradients", "fail", _in_words(a, bad, twins), a.name, a.nmse, a.bar)
        for a in bad[:NAMED]
    ]
    if len(bad) > NAMED:
        made.append(Finding(LEVEL, "gradients", "fail", f"{len(bad) - NAMED} more tensors differ"))
    for (file, name), top in wanted.left_out[:NAMED]:
        text = f"expected no gradient where convert leaves elements out, found up to {number(top)}"
        made.append(Finding(LEVEL, "gradients", "fail", text, f"{file}: {name}" if file else name))
    if made:
        return made
    seen = [a for a in each if a.seen]
    if not seen:
        return [Finding(LEVEL, "gradients", "undecided", "the loss depends on no tensor")]
    if noisy := [a.name for a in seen if a.noisy]:
        text = (
            f"the original's own gradients in float32 are off by more than {CAP:g} in {len(noisy)} tensors, "
            f"which are not judged ({', '.join(noisy[:NAMED])})"
        )
        return [Finding(LEVEL, "gradients", "undecided", text)]
    worst = max(seen, key=lambda a: a.nmse / a.bar if a.bar else 0.0)
    text = (
        f"the loss {wanted.loss:.6g} gives {len(seen)} tensors the gradients of the original "
        f"({what}; NMSE, nearest to its bar {worst.name})"
    )
    text += packed
    if len(seen) < len(each):
        text += f"; {len(each) - len(seen)} have none on either side"
    table = Table(
        ("tensor", "NMSE", "bar"),
        tuple((a.name, a.nmse, a.bar) for a in sorted(seen, key=lambda a: -a.nmse)),
        brief=0,
    )
    data = {"loss": wanted.loss, "tensors": len(seen), "loss_apart": abs(loss - wanted.loss)}
    return [Finding(LEVEL, "gradients", "pass", text, None, worst.nmse, worst.bar, data, (table,))]


def _packed(converted: Side) -> str:
    """What of its weights are codes."""
    (weights,) = converted.weights
    still = sum(t.dtype not in CASTABLE for t in weights.tensors.values())
    coded = len(weights.formulas) - len(weights.several) if isinstance(weights, PackedWeights) else 0
    still += len(weights.several)
    text = f"; {still} hold packed weights, which no step changes" if still else ""
    return text + (f"; {coded} are codes, taught here as the numbers that they stand for" if coded else "")


def _in_words(a: Apart, bad: Sequence[Apart], twins: Mapping[str, str]) -> str:
    if a.name in twins:
        return f"expected it tied to {twins[a.name]}, whose values it has, found it learning apart"
    if a.alone:
        return "expected no gradient, as the original has no such tensor, found one"
    if a.lost:
        lost = sum(b.lost for b in bad)
        rest = f"{lost - 1} others have none either: a path is cut off" if lost > 1 else "frozen, or not read"
        return f"expected the gradient of the original, found none ({rest})"
    return f"expected the gradient of the original, found one that is off by NMSE {number(a.nmse)}"


# --- one step -----------------------------------------------------------------------------------------------


def recipe_of(subject: Subject) -> AdamW:
    """The optimizer of the original, as far as its kind and its own arguments tell: else torch's."""
    source = subject.original
    if source is None:
        return optimizer.TORCH
    formats = {f.format for f in source.files.values()}
    if "tf-bundle" in formats:
        return optimizer.GOOGLE
    told = training_groups.arguments_of(source)
    return optimizer.of_arguments(told) or optimizer.TORCH


@dataclass(frozen=True)
class _Other:
    """A mistake of the step, in words, and where it is: another recipe, or one tensor in the wrong group."""

    name: str
    place: str
    recipe: AdamW | None = None
    flipped: str | None = None


class _Steps:
    """One step of both sides from zero moments, in float64, from the values that the converted side has: what
    these are is for the other levels to say. Each tensor takes it when its gradient comes, by the right
    recipe and by wrong ones, and how far apart it is then, in learning rates, is all that stays."""

    def __init__(self, converted: Side, wanted: Wanted, recipe: AdamW, strong: str | None) -> None:
        self.converted = converted.computed_in(torch.float64)
        self.wanted, self.recipe, self.strong = wanted, recipe, strong
        self.others = [
            _Other("bias corrected otherwise", "step", replace(recipe, correct_bias=not recipe.correct_bias)),
            _Other("eps 100 times as large", "step", replace(recipe, eps=recipe.eps * 100)),
        ]
        if recipe.decay and strong:
            self.others.append(_Other("wrong group of decay", strong, None, strong))
        self.right: dict[str, float] = {}
        self.wrong: list[dict[str, float]] = [{} for _ in self.others]

    def take(self, name: str, gradient: np.ndarray | None) -> None:
        (weights,) = self.converted.weights
        value = weights[name]
        if not value.is_floating_point():
            return
        right = self.wanted.gradients.get(name)
        decays = optimizer.decays(name, tuple(weights.tensors[name].shape))
        ways = [(self.recipe, decays)]
        ways += [(o.recipe or self.recipe, decays != (name == o.flipped)) for o in self.others]
        far = [0.0] * len(ways)
        for start in range(0, value.numel(), PIECE):
            piece = slice(start, start + PIECE)
            p = value.reshape(-1)[piece]
            theirs = _moved(p, right, piece, self.recipe, decays)
            found = [_moved(p, gradient, piece, *way) for way in ways]
            far = [_farther(d, x - theirs, p) for d, x in zip(far, found, strict=True)]
        for each, d in zip((self.right, *self.wrong), far, strict=True):
            each[name] = d / self.recipe.rate

    def findings(self) -> list[Finding]:
        each = self.right
        bad = sorted((n for n, x in each.items() if not x <= STEP), key=lambda n: -each[n])
        if bad:
            text = "expected the step of the original, found another (in learning rates)"
            return [Finding(LEVEL, "step", "fail", text, n, each[n], STEP) for n in bad[:NAMED]]
        text = f"{len(each)} tensors take the one step that the original takes ({self.recipe.words()})"
        return [Finding(LEVEL, "step", "pass", text, None, max(each.values(), default=0.0), STEP)]

    def planted(self) -> Iterator[tuple[str, str, list[str]]]:
        """The mistakes, and the tensors that show them."""
        for other, each in zip(self.others, self.wrong, strict=True):
            yield other.name, other.place, [n for n, x in each.items() if not x <= STEP]


def _farther(far: float, apart: Tensor, p: Tensor) -> float:
    """The larger, or the one that is no number; what starts from none (p) goes nowhere in any layout."""
    return float(np.maximum(far, apart.abs().where(p.isfinite(), 0.0).max().item()))


def _moved(p: Tensor, gradient: np.ndarray | None, piece: slice, recipe: AdamW, decays: bool) -> Tensor:
    """Some elements of a tensor after one step; without a gradient they take none."""
    if gradient is None:
        return p
    g = torch.from_numpy(gradient.reshape(-1)[piece].astype(np.float64, copy=False)).to(p.device)
    return optimizer.step(recipe, p, g, optimizer.start(p), decays=decays)[0]


# --- planted mistakes ---------------------------------------------------------------------------------------


def _planted(
    converted: Side,
    rows: Rows,
    batches: Batches,
    task: Task,
    wanted: Wanted,
    rough: Taught,
    after: _Steps,
    subject: Subject,
) -> Finding:
    """Mistakes of training, made in memory: the share that is caught, and where."""
    caught: list[tuple[str, str, str, str]] = []

    def learned(flaw: Flaw) -> list[str]:
        each, _ = _all_apart(wanted, converted, rows, batches, task, flaw)
        return [a.name for a in each if not a.holds]

    def note(mistake: str, place: str, where: Sequence[str]) -> None:
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        caught.append((mistake, place, "yes" if where else "no", f"{where[0]}{more}" if where else ""))

    if after.strong:
        note("frozen", after.strong, [after.strong] if _apart(wanted, after.strong, None).lost else [])
    layer = next((str(p) for p, kind in converted.kinds().items() if kind == "layer"), None)
    if layer is not None:
        name = f"layer {layer}" if layer.isdigit() else layer
        note("path cut off", f"after {name}", learned(Flaw(detached=name)))
    if rough.shared:
        note("not tied", "heads", learned(Flaw(output=True)))
    for mistake, place, where in after.planted():
        note(mistake, place, where)
    if (planted := training_groups.planted_dropout(subject)) is not None:
        note(*planted)
    count = sum(yes == "yes" for _, _, yes, _ in caught)
    text = f"{count} of {len(caught)} planted mistakes of training are caught"
    rows_of_table = tuple((m, yes, place, by) for m, place, yes, by in caught)
    table = Table(("planted mistake", "caught", "in", "found by"), rows_of_table)
    data = {"caught": count, "planted": len(caught)}
    status: Status = "pass" if count == len(caught) else "undecided"
    return Finding(LEVEL, "self-test", status, text, data=data, tables=(table,))
