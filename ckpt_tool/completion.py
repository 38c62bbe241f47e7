"""What a shell offers at a tab beyond commands and options: paths, families, the names of tiny originals and
dtypes. Loaded by a shell that asks, and by nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
from click.shell_completion import CompletionItem

PATHS = re.compile(r"PATH|DIR|FILE(\.\w+)?|PARITY\.TOML|[AB]")  # how the help calls what may be a path
DTYPES = ("bfloat16", "float16", "float32", "float64")


class Words(click.types.StringParamType):
    """A text that is one of some words as a rule, or with none a path."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        if not self.words:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(w) for w in self.words if w.startswith(incomplete)]


def prepare(group: click.Group) -> None:
    """Give the parameters of the commands of `group` what a shell is to offer."""
    for command in _commands(group):
        for param in command.params:
            if param.type is click.STRING and (words := _words(command, param)) is not None:
                param.type = words


def _commands(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        yield command
        if isinstance(command, click.Group):
            yield from _commands(command)


def _words(command: click.Command, param: click.Parameter) -> Words | None:
    if param.name == "family" or "--only" in param.opts and command.name == "table":
        from ckpt_tool.convert.families import FAMILIES

        return Words(*(("auto",) if param.name == "family" else ()), *FAMILIES)
    if param.name == "name" and command.name == "fixtures":
        from ckpt_tool.fixtures.variants import VARIANTS

        return Words(*VARIANTS)
    if {"--dtype", "--dequantize"} & {*param.opts}:
        return Words(*DTYPES)
    shown = param.metavar or (param.name or "").upper()
    return Words() if PATHS.fullmatch(shown) else None
