"""Which tensor names are accepted, whatever container they come from, and what a name says: its words, which
`.` or, in TensorFlow, `/` parts, its layer, and how names of many layers fold into one.

A name ends up in terminals, reports, JSON keys and safetensors headers, so one that cannot be shown, cannot
be told from another, or means something else in the output format is refused when the file is opened.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from ckpt_tool.errors import Problem

NAME_BYTES = 512
RESERVED = "__metadata__"  # what safetensors calls its own entry in the header
# A number that is a word of its own (layers.3.), or that TensorFlow glues to one (layer_3/, h3/).
# What stands before it is looked at behind its first digit, so that others are passed over quickly.
_NUMBER = re.compile(
    r"([0-9](?:(?<=^.)|(?<=[./].)|(?<=[./]layer_.)|(?<=[./]block_.)|(?<=[./]h.))[0-9]{0,8})(?=[./]|$)"
)
_INVISIBLE = ("Cc", "Cf", "Zl", "Zp")  # control characters, bidirectional marks, line separators


def name_fault(name: str) -> str | None:
    """What is wrong with a tensor name, or None."""
    if name.isascii():
        if not name:
            return "expected a tensor name, found an empty one"
        size = len(name)
    else:
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            return "expected a tensor name of Unicode text, found a lone surrogate"
    if size > NAME_BYTES:
        return f"expected a tensor name of at most {NAME_BYTES} bytes, found {size}"
    if not name.isprintable():
        for c in name:
            if unicodedata.category(c) in _INVISIBLE:
                return f"expected a tensor name of visible characters, found U+{ord(c):04X}"
    if name == RESERVED:
        return f"expected a tensor name, found {RESERVED}, which safetensors keeps for itself"
    return None


def faultless(names: Sequence[str]) -> bool:
    """Whether they are all in order, as a look at many of them at once tells; False may mean either."""
    text = "".join(names)
    if not (text.isascii() and text.isprintable()) or "" in names or RESERVED in text:
        return False
    return not names or max(map(len, names)) <= NAME_BYTES


def name_problems(names: Iterable[str], *, file: str) -> Iterator[Problem]:
    """Every unacceptable name of one file, and every pair that differs only in Unicode composition."""
    composed: dict[str, str] = {}
    for name in names:
        fault = name_fault(name)
        if fault is not None:
            yield Problem("bad-name", fault, file, name)
        elif not name.isascii():
            # An ASCII name is its own composed form and has no other, so it cannot have a twin.
            other = composed.setdefault(unicodedata.normalize("NFC", name), name)
            if other != name:
                yield Problem("bad-name", "two tensor names differ only in Unicode composition", file, name)


# --- what a name says -----------------------------------------------------------------------------------


def words_of(name: str) -> list[str]:
    return re.split(r"[./]", name)


def numbers(name: str) -> tuple[int, ...]:
    """The numbers in a name: of its layer, of an expert ..."""
    return tuple(map(int, _NUMBER.findall(name)))


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to: the first number in its name."""
    return next(iter(numbers(name)), None)


def stack_of(name: str) -> tuple[str, int] | None:
    """The layer a tensor belongs to with what stands before its number, as a model may have several stacks of
    layers; None outside of them."""
    found = _NUMBER.search(name)
    return None if found is None else (name[: found.start()], int(found[1]))


def short(name: str) -> str:
    """A tensor's name within its layer, without `weight`: `self_attn.q_proj`."""
    inside = _NUMBER.split(name, maxsplit=1)[-1].lstrip("./")
    return re.sub(r"(?:^|[./])weight(?=[./]|$)", "", inside).lstrip("./") or name


def fold_key(name: str) -> tuple[str, ...]:
    """The text around the numbers: equal for names that differ in these only."""
    return tuple(_NUMBER.split(name)[::2])


class Folded:
    """Names with equal `fold_key`, as the numbers that stand in each place of them."""

    def __init__(self, first: str) -> None:
        self.key = fold_key(first)
        self.columns: list[set[int]] = [set() for _ in self.key[1:]]
        self._pattern = re.compile(f"^{'([0-9]{1,9})'.join(map(re.escape, self.key))}$", re.M)

    def fits(self, name: str) -> bool:
        return self._pattern.match(name) is not None

    def take(self, names: Sequence[str]) -> bool:
        """Add `names`; False, and nothing done, where one of them has another key."""
        found = self._pattern.findall("\n".join(names))
        if len(found) != len(names):
            return False
        columns = [found] if len(self.columns) == 1 else zip(*found, strict=True)
        for column, values in zip(self.columns, columns if self.columns else (), strict=True):
            column.update(map(int, set(values)))
        return True

    def join(self, other: Folded) -> None:
        """Add the names of another of the same key."""
        for column, more in zip(self.columns, other.columns, strict=True):
            column |= more

    def __str__(self) -> str:
        """`layers.{2..3}.norm.weight`."""
        ranges = []
        for column in self.columns:
            found = sorted(column)
            runs = [f"{found[0]}..{found[-1]}"] if found[-1] - found[0] == len(found) - 1 else []
            shown = runs or [",".join(map(str, found[:8])) + ",..." * (len(found) > 8)]
            ranges.append(str(found[0]) if len(found) == 1 else f"{{{shown[0]}}}")
        return "".join(f + r for f, r in zip(self.key, [*ranges, ""], strict=True))


def folded_name(names: Sequence[str]) -> str:
    """`layers.{2..3}.norm.weight` for names with equal `fold_key`."""
    made = Folded(names[0])
    assert made.take(names)
    return str(made)
