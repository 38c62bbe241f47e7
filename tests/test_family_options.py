"""Options of the command line that only some families have: in their help, refused by others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from ckpt_tool import api
from ckpt_tool.cli import cli
from ckpt_tool.convert.families import FAMILIES, family
from ckpt_tool.convert.options import Option
from ckpt_tool.errors import CkptToolError

DECLARED = {o.name: o for name in FAMILIES for o in family(name).options}


def typed(option: Option) -> list[str]:
    return [option.flag, *(option.choices[:1] or (["2"] if option.most else []))]


def refusal(*arguments: str) -> CkptToolError:
    error = CliRunner().invoke(cli, [*arguments, "--in", "nothing-there"]).exception
    assert isinstance(error, CkptToolError), error
    return error


def options(**asked: object) -> api.Options:
    fields = {k: v for k, v in asked.items() if k in ("shards", "gqa")}
    return api.Options(**fields, family_options={k: v for k, v in asked.items() if k not in fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["convert", "plan"])
@pytest.mark.parametrize("name", [*FAMILIES, "auto", None])
def test_the_help_shows_the_options_of_the_family_named(name: str | None, command: str) -> None:
    shown = CliRunner().invoke(cli, [command, *([name] if name else []), "--help"], terminal_width=200).output
    own = {o.flag for o in family(name).options} if name in FAMILIES else set()
    assert {o.flag for o in DECLARED.values() if f"\n  {o.flag} " in shown} == own
    assert all(flag in shown for flag in ("--in PATH", "--dtype", "--drop", "-h, --help"))
    assert ("gptj" in shown) == (name in ("codegen", "auto", None))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_option_of_other_families_is_refused_by_name(name: str) -> None:
    own = {o.name for o in family(name).options}
    others = [o for o in DECLARED.values() if o.name not in own]
    assert others
    for option in others:
        error = refusal("plan", name, *typed(option), "--to", option.to)
        having = [n for n in FAMILIES if option.name in {o.name for o in family(n).options}]
        (problem,) = error.problems
        assert error.exit_code == 2 and problem.kind == "usage" and problem.where == option.flag
        assert f" of {', '.join(having)}, found one of {name}" in problem.message


@pytest.mark.parametrize("name", FAMILIES)
def test_an_option_of_the_family_is_taken(name: str) -> None:
    for option in family(name).options:
        assert refusal("plan", name, *typed(option), "--to", option.to).kind == "not-found"


def test_options_may_come_before_the_family(tmp_path: Path) -> None:
    """The family is known once all is read; what it does not have is then refused all the same."""
    assert refusal("plan", "--shards", "2", "--to", "original", "llama").kind == "not-found"
    done = CliRunner().invoke(cli, ["plan", "--in", "mistral", "--help"])
    assert done.exit_code == 0 and "Options of mistral" not in done.output


def test_a_family_that_was_recognised_refuses_too(originals: Callable[[str], Path]) -> None:
    source = originals("mistral-7b-v0.1")
    asked = options(keep_padding=True)
    with pytest.raises(CkptToolError, match="Hugging Face of megatron-bert, megatron-gpt2, found one of mis"):
        api.plan(source, options=asked)
    with pytest.raises(CkptToolError, match="found one in the other direction") as caught:
        api.plan(source, options=options(container="pth"))
    assert caught.value.problems[0].where == "--container"
    with pytest.raises(CkptToolError, match="expected an option that a family has, found --nonesuch"):
        api.plan(source, options=options(nonesuch="x"))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"gqa": 0}, "expected a number from 1 to 65536, found 0"),
        ({"gqa": True}, "expected a number from 1 to 65536, found True"),
        ({"gqa": "2"}, "expected a number from 1 to 65536, found '2'"),
    ],
)
def test_values_are_those_declared(
    asked: dict[str, object], words: str, originals: Callable[[str], Path]
) -> None:
    with pytest.raises(CkptToolError, match=words):
        api.plan(originals("mistral-7b-v0.1"), options=options(**asked))
    bert = originals("bert-ngc-cased")
    with pytest.raises(CkptToolError, match="expected true, found 'yes'"):
        api.plan(bert, options=options(keep_padding="yes"))
