"""Other layouts than the published one that models of a family are kept in; `--form` chooses one on the way
back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.numbers import Field, Known
from ckpt_tool.convert.options import Option, given
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.convert.quantised_asked import WAY_OUT
from ckpt_tool.convert.quantised_view import carried_of
from ckpt_tool.errors import fail

FORM = "form"


class Layout(Protocol):
    """Another layout that the same models are kept in. `reads` are fields of config.json that may say more
    there than where the published layout is written."""

    title: str
    reads: tuple[Field, ...]
    options: tuple[Option, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Some of its names."""

    def holds(self, names: Collection[str]) -> bool: ...

    def recognise(self, names: Collection[str]) -> tuple[bool, str]: ...

    def plan(self, checkpoint: Checkpoint, options: Options) -> Plan: ...

    def plan_original(self, checkpoint: Checkpoint, options: Options, known: Known) -> Plan: ...


def layout_option(usual: str, layouts: Mapping[str, Layout]) -> tuple[Option, ...]:
    """The options that the layouts have, and the one that chooses; `usual` stands for the published one."""
    words = "; ".join(f"{word}: {layout.title}" for word, layout in layouts.items())
    form = Option(FORM, f"Layout to write; {words}.", "original", choices=(usual, *layouts))
    found = {o.name: o for layout in layouts.values() for o in layout.options}
    return (*found.values(), form) if layouts else ()


def _of_codes(known: Known, form: str) -> str | None:
    """Of codes, which the ranks of no other layout have."""
    inventory = carried_of(known.source.checkpoint)
    if inventory is None:
        return None
    return (
        f"--form {form} keeps codes and scales ({', '.join(inventory.words)}) in whole tensors, which its "
        "loaders share out to ranks themselves: leave the option out; ranks of other layouts hold numbers "
        f"({WAY_OUT})"
    )


def layout_of(layouts: Mapping[str, Layout], names: Collection[str]) -> Layout | None:
    """The one that tensors of these names are in; None for the published one."""
    return next((layout for layout in layouts.values() if layout.holds(names)), None)


def asked_layout(
    family: str, usual: Sequence[str], layouts: Mapping[str, Layout], known: Known, own: Collection[str]
) -> Layout | None:
    """The one to write: as asked, else as the original was; None for the published one, whose forms are
    called as in `usual`, and which has the options `own`."""
    if not layouts:
        return None
    form = known.options.family_options.get(FORM, known.once.get(FORM, usual[0]))
    if form not in (*usual, *layouts):
        words = " or ".join((*usual, *layouts))
        fail("usage", f"expected {words} for family {family}, found {form}", where="--form")
    options = {word: [o.name for o in layout.options] for word, layout in layouts.items()}
    options |= {word: [n for n in own if n != FORM] for word in usual}
    for name in given(known.options):
        having = [f"--form {word}" for word, names in options.items() if name in names]
        if having and f"--form {form}" not in having:
            flag = f"--{name.replace('_', '-')}"
            message = f"expected {' or '.join(having)} beside it, found --form {form}"
            fail("usage", message, where=flag, hint=_of_codes(known, form))
    return layouts.get(form)
