"""Commands about one family, which have the options that the family declares beside the general ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from ckpt_tool.errors import fail_all

if TYPE_CHECKING:
    from ckpt_tool.convert.options import Option

NAMED = "ckpt_tool.families"  # in the context: the families whose options are taken


class FamilyCommand(click.Command):
    """A command whose argument FAMILY comes first as a rule. Where it names a family, the help shows the
    options of that family and others are refused here; else (`auto`, or options first) those of all families
    are taken, and `api` refuses what the family chosen does not have. The command gets them as `own`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from ckpt_tool.convert.families import FAMILIES, family, foreign_option

        named = tuple(args[:1]) if set(args[:1]) & set(FAMILIES) else ()
        ctx.meta[NAMED] = named or FAMILIES
        try:
            rest = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.lstrip("-").replace("-", "_")
            if named and any(o.name == name for o in _declared(FAMILIES)):
                fail_all([foreign_option(name, family(named[0]))])
            raise
        found = {o.name: ctx.params.pop(o.name, None) for o in _declared(ctx.meta[NAMED])}
        ctx.params["own"] = {k: v for k, v in found.items() if v}
        return rest

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        families = ctx.meta.get(NAMED, ())
        general = [_direction(families) if p.name == "to" else p for p in super().get_params(ctx)]
        return [*general[:-1], *map(_as_click, _declared(families)), general[-1]]  # --help comes last

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        families = ctx.meta.get(NAMED, ())
        own = [o.name for o in _declared(families)]
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        records = [(p.name, r) for p in options if (r := p.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl([r for name, r in records if name not in own])
        if len(families) != 1:
            formatter.write_paragraph()
            formatter.write_text(f"`{ctx.command_path} FAMILY --help` shows the options of a family besides.")
        elif own:
            with formatter.section(f"Options of {families[0]}"):
                formatter.write_dl([r for name, r in records if name in own])


def _declared(families: Sequence[str]) -> list[Option]:
    """The options of the families, each once; one that has several forms takes the values of all."""
    from ckpt_tool.convert.families import family

    found: dict[str, Option] = {}
    for option in (o for name in families for o in family(name).options):
        known = found.setdefault(option.name, option)
        choices = tuple(dict.fromkeys((*known.choices, *option.choices)))
        found[option.name] = replace(known, choices=choices)
    return list(found.values())


def _as_click(option: Option) -> click.Option:
    text = option.help if option.to == "hf" else f"{option.help.rstrip('.')} (--to original)."
    if option.choices:
        return click.Option([option.flag], type=click.Choice(option.choices), help=text)
    if option.several:
        return click.Option([option.flag], metavar=option.metavar, help=text)
    if option.most:
        number = click.IntRange(1, option.most)
        return click.Option([option.flag], type=number, metavar=option.metavar, help=text)
    return click.Option([option.flag], is_flag=True, help=text)


def _direction(families: Sequence[str]) -> click.Option:
    from ckpt_tool.convert.families import family

    others = tuple(dict.fromkeys(t for name in families for t in family(name).targets))
    text = "Direction, or the layout of another architecture." if others else "Direction."
    choices = click.Choice(["hf", *others, "original"])
    return click.Option(["--to"], type=choices, default="hf", show_default=True, help=text)
