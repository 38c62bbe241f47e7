"""The families: each module of this folder is one, found by its file. A family module defines `FAMILY`, a
`Family`, and adding one changes no other file of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.facts_classes import Class
from ckpt_tool.convert.in_parts import in_one
from ckpt_tool.convert.layer_axis import layers_apart
from ckpt_tool.convert.one_by_one import InMemory, as_numbers, as_on_disk, one_by_one, with_scales
from ckpt_tool.convert.options import Option, given
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.convert.tied_head import tables_named
from ckpt_tool.convert.vocabularies import Vocabulary
from ckpt_tool.errors import CkptToolError, Problem
from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from ckpt_tool.convert.weave import Held


def names() -> tuple[str, ...]:
    """The name of every family, which is that of its file with dashes."""
    files = [f.stem for folder in __path__ for f in Path(folder).glob("[a-z]*.py")]
    return tuple(sorted(f.replace("_", "-") for f in files))


FAMILIES = names()


@dataclass(frozen=True)
class Family:
    """`recognise(checkpoint)` says whether an original checkpoint is of this family, with the reason in
    words; `plan` maps an original to the Hugging Face layout, `plan_original` the way back. `targets` are
    layouts of other architectures that `plan` can write instead (family option "architecture"), `options`
    those of the command line that it has beside the general ones, `vocabulary` how its originals write their
    tokens, `foretold` names the differences that its plans may foretell, `classes` are the configurations of
    transformers by model_type. `tensors` are some of an original's names, by which near misses are told;
    `document` is the file beside the weights that says what shapes do not, where it may be missing;
    `published` says whether originals are in the Hugging Face layout themselves, `packed` whether tensors of
    codes are what its rows are about."""

    name: str
    summary: str  # one line for `ckpt-tool families`
    architectures: tuple[str, ...]  # Hugging Face classes written, config.json "architectures"
    recognise: Callable[[Checkpoint], tuple[bool, str]]
    plan: Callable[[Checkpoint, Options], Plan]
    plan_original: Callable[[Checkpoint, Options], Plan]
    # a model in the Hugging Face layout, of the class named, under the names of the rows
    held: Callable[[Checkpoint, Options, str], Held]
    targets: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    vocabulary: Vocabulary = Vocabulary()
    foretold: tuple[str, ...] = ()
    classes: Mapping[str, Class] = field(default_factory=dict)
    in_memory: InMemory = field(default_factory=dict)  # what its Hugging Face layout may have stacked
    held_as: Mapping[str, str] = field(default_factory=dict)  # or called otherwise: to the name on disk
    numbers: tuple[str, ...] = ()  # of codes: what may be called as these; see `as_numbers`
    tensors: tuple[str, ...] = ()
    document: str | None = None
    published: bool = False
    packed: bool = False
    unread: str = ""  # a pattern of the names of tensors, in either layout, that no pass reads


def family(name: str) -> Family:
    """The family called `name` (of `FAMILIES`)."""
    found: Family = import_module(f"ckpt_tool.convert.families.{name.replace('-', '_')}").FAMILY
    return found


def as_family_knows(checkpoint: Checkpoint, chosen: Family) -> Checkpoint:
    """`checkpoint` with the names that `chosen` has on disk, and what it may find stacked one by one."""
    checkpoint = as_on_disk(layers_apart(checkpoint), chosen.held_as, chosen.tensors)
    checkpoint = as_numbers(checkpoint, chosen.numbers)
    checkpoint = tables_named(in_one(checkpoint, chosen.classes), chosen.classes)
    return one_by_one(checkpoint, chosen.in_memory)


def as_families_know(checkpoint: Checkpoint, *, as_loaders_do: bool = False) -> Checkpoint:
    """The same for any family; see `one_by_one` and `layers_apart`. `as_loaders_do` leaves names as they are
    that no loader knows."""
    checkpoint = layers_apart(checkpoint)
    for chosen in map(family, FAMILIES):
        checkpoint = checkpoint if as_loaders_do else as_numbers(checkpoint, chosen.numbers)
        checkpoint = in_one(as_on_disk(checkpoint, chosen.held_as, chosen.tensors), chosen.classes)
        checkpoint = tables_named(checkpoint, chosen.classes)
    meant = _meant(checkpoint) or [family(f) for f in FAMILIES]
    return one_by_one(checkpoint, {n: parts for f in meant for n, parts in f.in_memory.items()})


def codes_apart(checkpoint: Checkpoint) -> Checkpoint:
    """The same for experts whose codes of eight bits are stacked, with their scales: before anything looks
    for codes."""
    if not any(t.dtype == "F8_E4M3" and len(t.shape) == 3 for t in checkpoint):
        return checkpoint
    meant = _meant(checkpoint) or [family(f) for f in FAMILIES]
    return one_by_one(checkpoint, with_scales({n: parts for f in meant for n, parts in f.in_memory.items()}))


def _meant(checkpoint: Checkpoint) -> list[Family]:
    """Whose class config.json names: families have names in common that one stacks and another does not."""
    if "config.json" not in checkpoint.documents:
        return []
    try:
        said = checkpoint.json("config.json").get("model_type")
    except CkptToolError:
        return []  # whoever reads it says why
    return [f for f in map(family, FAMILIES) if said in f.classes] if isinstance(said, str) else []


def option_problems(chosen: Family, options: Options, to: str) -> list[Problem]:
    """What was asked for that `chosen` does not have in the direction `to` ("hf" or "original"), and values
    that it cannot have; kind `usage`."""
    other = options.family_options.get("architecture")
    if other is not None and (to != "hf" or other not in chosen.targets):
        known = ", ".join(("hf", *chosen.targets, "original"))
        return [Problem("usage", f"expected {known} for family {chosen.name}, found {other}", where="--to")]
    own = {o.name: o for o in chosen.options if o.to == to}
    made = []
    for name, value in given(options).items():
        if name not in own:
            made.append(foreign_option(name, chosen))
        elif (expected := own[name].wrong(value)) is not None:
            made.append(Problem("usage", f"{expected}, found {value!r}", where=own[name].flag))
    return made


def foreign_option(name: str, chosen: Family) -> Problem:
    """That `chosen` has no such option in the direction asked for, and who has it."""
    having = {n: o for n in FAMILIES for o in family(n).options if o.name == name}
    flag = "--" + name.replace("_", "-")
    if not having:
        return Problem("usage", f"expected an option that a family has, found {flag}", where=flag)
    sides = {"hf": "Hugging Face", "original": "an original"}
    ways = " or ".join(dict.fromkeys(sides[o.to] for o in having.values()))
    found = "one in the other direction" if chosen.name in having else f"one of {chosen.name}"
    return Problem(
        "usage", f"expected a conversion to {ways} of {', '.join(having)}, found {found}", where=flag
    )
