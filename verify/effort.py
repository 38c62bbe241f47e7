"""How much of parity a run computes: which layers, which prompts through which of them, and of which the
noise floor and the free run are made. What is left out is said, and a verdict claims no more than what ran.

    default   every layer and every prompt in lockstep. Where a prompt is long and costs more than AFFORDABLE,
              its floor is measured only where it is over that of others, it is not run free, and one longer
              than WIDE (a window's) goes through the first layer of each kind. Of those that
              are ids alone the FREED longest of the others are run free: with few tokens a pass costs what
              reading its weights does. The floor of a phase is that of the one of most different ids.
    quick     the first layer of each kind and the last one; no free run. Where a long prompt is costly, of
              those that are ids alone the shortest one of SEVERAL tokens, and a long one only if it shows a
              window. Of mistakes that are alike one is planted, in the last layer only where layers are of
              several kinds.
    thorough  everything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import field
from itertools import takewhile
from typing import TYPE_CHECKING

from ckpt_tool.checkpoint.tensor_names import short, stack_of
from ckpt_tool.records import dataclass
from ckpt_tool.verify.claims import Mode
from ckpt_tool.verify.prompts import Prompt

if TYPE_CHECKING:  # torch takes a second to load, and who asks only what is costly has no use for it
    from ckpt_tool.verify.sides import Change, Phase, Side

SHORT = 64  # tokens, up to which a prompt costs little
WIDE = 1024  # tokens, beyond which one costs much
FREED = 2  # prompts that are run free where a long one is not
SEVERAL = 8  # tokens that a prompt has which runs alone: enough for positions to count
AFFORDABLE = 3e10  # tokens x weights of one prompt: a few seconds a pass


@dataclass(frozen=True)
class Effort:
    """`layers` are those that run (None: all). A prompt of `reach` goes through these layers alone, and to no
    head; without any it does not run. `floor` and `free` are the prompts whose noise is measured in any case,
    and that are run free; None stands for all. `planted` are the layers that mistakes are planted in,
    None for the first and the last one; `few`: one of those that are alike."""

    mode: Mode = "thorough"
    layers: tuple[int, ...] | None = None
    reach: Mapping[str, frozenset[int]] = field(default_factory=dict)
    floor: frozenset[str] | None = None
    free: frozenset[str] | None = None
    left_out: tuple[str, ...] = ()
    before: frozenset[Phase] = frozenset({"embed"})  # what comes in front of the first layer
    planted: frozenset[int] | None = None
    few: bool = False

    def has(self, phase: Phase, prompt: str) -> bool:
        """Whether a prompt goes through a phase. A layer that is left out is passed over: the next one is fed
        what the one before it was."""
        if isinstance(phase, int):
            chosen = self.reach.get(prompt)
            return (self.layers is None or phase in self.layers) and (chosen is None or phase in chosen)
        if phase in self.before:
            return self.reach.get(prompt) != frozenset()  # one without any layer does not run at all
        return prompt not in self.reach

    def plants(self, phase: Phase, layers: int) -> bool:
        """Whether mistakes are planted in a phase of so many layers."""
        return isinstance(phase, str) or phase in ((0, layers - 1) if self.planted is None else self.planted)

    def chosen(self, mistakes: list[Change]) -> list[Change]:
        """Which of the mistakes of a phase are planted."""
        if not self.few:
            return mistakes
        kept: dict[tuple[str, int], Change] = {}
        for number, change in enumerate(mistakes):
            kept.setdefault((change.kind, 0 if change.kind else number), change)
        return list(kept.values())

    def measures(self, prompt: str) -> bool:
        return self.floor is None or prompt in self.floor

    def frees(self, prompt: str) -> bool:
        return self.free is None or prompt in self.free


THOROUGH = Effort()


def costly(tokens: Mapping[str, int], weights: int, given: Collection[str]) -> set[str]:
    """The prompts that are long and cost more than AFFORDABLE, but for those of the user."""
    return {n for n, t in tokens.items() if t > SHORT and t * weights > AFFORDABLE and n not in given}


def effort_for(
    mode: Mode, original: Side, converted: Side, prompts: Mapping[str, Prompt], given: frozenset[str]
) -> Effort:
    """What a mode comes to for this model; `given` are prompts of the user, of which nothing is left out but
    by `quick`."""
    if mode == "thorough":
        return THOROUGH
    weights = sum(t.numel for t in converted.weights[0].tensors.values())
    tokens = {name: sum(map(len, p.ids)) for name, p in prompts.items()}
    if mode == "quick":
        return _quick(original, converted, prompts, tokens, costly(tokens, weights, given), given)
    dear = costly(tokens, weights, given)
    if not dear:
        return Effort("default")
    firsts = frozenset(first_of_each_kind(original, converted))
    wide = [n for n in tokens if n in dear and tokens[n] > WIDE]
    cheap = frozenset(tokens) - dear
    if not cheap:
        return Effort("default")
    plain = [n for n in tokens if n in cheap - given and not prompts[n].given]
    freed = sorted(plain, key=lambda n: -tokens[n])[:FREED]
    free = cheap - frozenset(plain) | frozenset(freed)
    floor = free - frozenset(freed) | ({_most_different(freed, prompts)} if freed else set())
    long = [n for n in tokens if n not in free and n not in wide]
    said = []
    if long:
        said.append(f"{_named(long, tokens)} in lockstep only, not run free")
    if wide:
        said.append(
            f"{_named(wide, tokens)} through {layers_text(sorted(firsts))} only, the first of each kind"
        )
    reach = dict.fromkeys(wide, firsts)
    return Effort("default", None, reach, floor, free, tuple(said), _before(original))


def _quick(
    original: Side,
    converted: Side,
    prompts: Mapping[str, Prompt],
    tokens: Mapping[str, int],
    dear: Collection[str],
    given: frozenset[str],
) -> Effort:
    firsts = first_of_each_kind(original, converted)
    count = original.config.n_layers
    last = [count - 1] if count else []
    layers = tuple(sorted({*firsts, *last}))
    off = _not_in_quick(original, prompts, tokens, dear, given)
    long = [n for n, t in tokens.items() if t > SHORT and n not in off]
    said = ["no prompt was run free, so the logits of a whole pass were not compared"]
    if len(layers) < count:
        said.insert(0, f"{count - len(layers)} of {count} layers did not run, only {layers_text(layers)}")
    if long:
        said.append(f"{_named(long, tokens)} through {layers_text(firsts)} only")
    if off:
        said.append(f"{_named(off, tokens)} not run")
    planted = frozenset(layers if len(firsts) > 1 else firsts) & {0, *last}
    if not planted.issuperset(last):
        said.append(f"no mistakes were planted in layer {count - 1}, which is of the kind of layer 0")
    said.append("of planted mistakes that are alike one was")
    reach = {**dict.fromkeys(long, frozenset(firsts)), **dict.fromkeys(off, frozenset[int]())}
    short = frozenset(n for n, t in tokens.items() if t <= SHORT and n not in off)
    floor = frozenset({_most_different(short, prompts)} if short and dear else short)
    before = _before(original)
    return Effort("quick", layers, reach, floor or None, frozenset(), tuple(said), before, planted, few=True)


def _not_in_quick(
    original: Side,
    prompts: Mapping[str, Prompt],
    tokens: Mapping[str, int],
    dear: Collection[str],
    given: frozenset[str],
) -> list[str]:
    """The prompts that do not run at all: those longer than WIDE and, where any is costly, all that are ids
    alone and not the user's, but for the shortest one of SEVERAL tokens and long ones beyond a window."""
    off = {n for n, t in tokens.items() if t > WIDE}
    if dear:
        plain = [n for n in tokens if n not in given and not prompts[n].given]
        short = [n for n in plain if tokens[n] <= SHORT]
        kept = {min(short, key=lambda n: (tokens[n] < SEVERAL, abs(tokens[n] - SEVERAL)))} if short else set()
        kept |= {n for n in plain if any(SHORT < w < tokens[n] for w in original.windows or [])} - off
        off |= {*plain} - kept
    return [n for n in tokens if n in off]


def _most_different(names: Collection[str], prompts: Mapping[str, Prompt]) -> str:
    """The one of the most different ids: one that repeats a word shows no positions."""
    return max(names, key=lambda n: len({i for row in prompts[n].ids for i in row}))


def _before(original: Side) -> frozenset[Phase]:
    """The phases in front of the first layer: an embedding, as a rule alone."""
    kinds = original.kinds().items()
    return frozenset(
        p for p, kind in takewhile(lambda pair: not isinstance(pair[0], int), kinds) if kind != "head"
    )


def first_of_each_kind(original: Side, converted: Side) -> list[int]:
    """Layers are of one kind where their tensors have the same names and shapes and they see as far, on both
    sides."""
    kinds: dict[tuple[object, ...], int] = {}
    sides = [(_tensors_of(side), getattr(side.config, "windows", None)) for side in (original, converted)]
    for i in range(original.config.n_layers):
        kind = tuple(
            (tuple(sorted(tensors.get(i, ()))), None if windows is None or i >= len(windows) else windows[i])
            for tensors, windows in sides
        )
        kinds.setdefault(kind, i)
    return sorted(kinds.values())


def _tensors_of(side: Side) -> dict[int, list[tuple[str, str, tuple[int, ...]]]]:
    """By layer: of each tensor its name without the number of the layer, and its shape."""
    made: dict[int, list[tuple[str, str, tuple[int, ...]]]] = {}
    for name, info in side.weights[0].tensors.items():
        if (stack := stack_of(name)) is not None:
            made.setdefault(stack[1], []).append((stack[0], short(name), tuple(info.shape)))
    return made


def _named(names: list[str], tokens: Mapping[str, int]) -> str:
    told = ", ".join(f"{name} ({tokens[name]:,} tokens)" for name in names)
    return f"prompt{'s' * (len(names) > 1)} {told}"


def sampled(effort: Effort, count: int) -> str | None:
    """How many of `count` layers ran, in words; None where all did."""
    return (
        None if effort.layers is None or len(effort.layers) >= count else f"{len(effort.layers)} of {count}"
    )


def layers_text(layers: list[int] | tuple[int, ...]) -> str:
    """`layer 4`, `layers 0 and 31`, `layers 0 to 3 and 31`."""
    runs: list[list[int]] = []
    for i in layers:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    parts = [str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs]
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"layer{'s' * (len(layers) > 1)} {text}"
