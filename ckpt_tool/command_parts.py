"""What commands share: options, the consoles, and how a report is shown and written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckpt_tool.errors import fail, fail_all

if TYPE_CHECKING:
    from ckpt_tool.report_files import ReportFiles
    from ckpt_tool.terminal import Screen
    from ckpt_tool.verify.claims import Mode
    from ckpt_tool.verify.report import Report, Reports

F = TypeVar("F", bound=Callable[..., Any])


def consoles() -> tuple[Screen, Screen]:
    """Consoles on stdout and stderr; see terminal.py, which is loaded with the first."""
    from ckpt_tool import terminal

    return terminal.consoles()


def options_of(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorate in reversed(decorators):
            function = decorate(function)
        return function

    return apply


def print_json(value: Any, indent: int | None = 2) -> None:
    """On stdout; json is loaded for who asked for it."""
    import json

    print(json.dumps(value, indent=indent))


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
report_files = options_of(
    click.option("--junit", metavar="FILE", help="Write JUnit XML."),
    click.option("--html", metavar="FILE", help="Write one self-contained HTML page."),
    click.option("--markdown", metavar="FILE", help="Write Markdown."),
    click.option(
        "--json",
        "json_file",
        metavar="FILE",
        is_flag=False,
        flag_value="-",
        help="Write JSON to FILE (alone: to stdout).",
    ),
)


any_dtype = click.option(
    "--compute-dtype",
    type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
)
exact_dtype = click.option(
    "--compute-dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True
)
device_option = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
mode_options = options_of(
    click.option("--quick", is_flag=True, help="Coverage, bits, and a layer of each kind."),
    click.option("--thorough", is_flag=True, help="All prompts through all layers, whatever it costs."),
    click.option("--memory", metavar="SIZE", help="What parity may take (default: 4GiB)."),
)
ray_options = options_of(
    click.option("--ray", metavar="ADDRESS|local", help="Make the shares as tasks of a Ray cluster."),
    click.option(
        "--tasks", type=click.IntRange(1, 9999), metavar="N", help="How many of them (else two a node)."
    ),
)
facts_option = click.option(
    "--set", "pairs", multiple=True, metavar="KEY=VALUE", help="A fact the source's files lack."
)


def mode_of(asked: dict[str, Any]) -> Mode:
    """The one of `mode_options`; `usage` for both."""
    if asked.get("quick") and asked.get("thorough"):
        fail("usage", "expected --quick or --thorough, found both", where="mode")
    return "quick" if asked.get("quick") else "thorough" if asked.get("thorough") else "default"


def memory_of(asked: dict[str, Any]) -> int | None:
    """The bytes of `--memory`; None without it."""
    if asked.get("memory") is None:
        return None
    from ckpt_tool.verify.needs import read_size

    return read_size(asked["memory"])


def checked_files(asked: dict[str, Any], inputs: Iterable[str | None]) -> ReportFiles:
    """The files that reports are to be written to, checked before any work."""
    from ckpt_tool.report_files import ReportFiles

    named = {f"--{key}": asked.get(key) for key in ("junit", "html", "markdown")}
    named["--json"] = None if asked.get("json_file") == "-" else asked.get("json_file")
    files = ReportFiles({option: file for option, file in named.items() if file is not None})
    files.check([i for i in inputs if i is not None])
    return files


def write_report(report: Report | Reports, asked: dict[str, Any], files: ReportFiles) -> int:
    """Files first: they are wanted also where nobody reads the terminal to its end."""
    from ckpt_tool.verify.report import json_text

    forms = {
        "--junit": report.junit,
        "--html": report.html,
        "--markdown": report.markdown,
        "--json": lambda: json_text(report),
    }
    problems = files.write(forms)
    if asked.get("json_file") == "-":
        print(json_text(report), end="")
    else:
        screen, _ = consoles()
        report.render(screen)
    fail_all(problems)
    return report.exit_code


def following_at(log: Screen, always: str = "\0") -> Callable[[str], None]:
    """What tells a person at a terminal how far a verification is; where none is, only what begins with
    `always`."""

    def follow(text: str) -> None:
        if log.is_terminal or text.startswith(always):
            log.print(text, style="dim", markup=False)

    return follow
