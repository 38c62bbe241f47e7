"""What a person sees, at 80 and at 120 columns, compared with tests/golden; and what holds at any width.

`CKPT_TOOL_GOLDEN=write pytest tests/test_screens.py` writes the golden files anew: read the difference.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from ckpt_tool.fixtures.flaws import plant
from ckpt_tool.terminal import Column, Plain, Styled, consoles, paragraph, say, table, wrapped
from tests.in_process import TERMINAL, program

GOLDEN = Path(__file__).parent / "golden"
# Measured numbers and times differ from run to run and from machine to machine; their width does not matter
# here, so runs of blanks beside them are one blank.
MASKS = (
    (re.compile(r"\b\d+(\.\d+)?e[+-]\d+\b"), "#"),
    (re.compile(r"^  seconds +.*$", re.M), "  seconds #"),
    (re.compile(r"^  computed +.*$", re.M), "  computed #"),
)
SCREENS: dict[str, list[list[str]]] = {
    "families": [["families"]],
    "help": [["convert", "--help"], ["plan", "megatron-bert", "--help"], ["plan", "codegen", "--help"]],
    "fixtures": [["fixtures"]],
    "convert": [["convert", "auto", "--in", "bert/original.zip", "--out", "bert-hf"]],
    "plan": [["plan", "auto", "--in", "original"]],
    "plan-ranks": [["plan", "auto", "--in", "ranks"]],
    "plan-training-state": [["plan", "auto", "--in", "bert/original.zip"]],
    "inspect": [["inspect", "original"]],
    "inspect-training-state": [["inspect", "bert/original.zip"]],
    "verify": [["verify", "converted", "--source", "original", "--level", "coverage", "--level", "bits"]],
    "verify-fail": [["verify", "broken", "--source", "original", "--level", "coverage", "--level", "bits"]],
    "gate": [["gate", "parity.toml"]],
    "errors": [
        ["convert", "nonesuch", "--in", "original", "--out", "x"],
        ["convert", "opt", "--in", "original", "--out", "x"],
        ["convert", "mistral", "--shards", "8", "--in", "original", "--out", "x"],
        ["convert", "mistral", "--in", "a/path/that/is/not/there/" + "x" * 90, "--out", "x"],
    ],
}
GATE = """title = "screens"
[[check]]
name = "good"
source = "original"
out = "converted"
levels = ["coverage", "bits"]
[[check]]
name = "broken"
source = "original"
out = "broken"
levels = ["coverage", "bits"]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, originals: Callable[[str], Path]) -> Path:
    import shutil

    from ckpt_tool.api import convert

    folder = tmp_path_factory.mktemp("screens")
    shutil.copytree(originals("mistral-7b-v0.1"), folder / "original")
    shutil.copytree(originals("llama-2-70b"), folder / "ranks")
    (folder / "bert").mkdir()
    shutil.copy(originals("bert-ngc-cased"), folder / "bert" / "original.zip")
    convert(folder / "original", folder / "converted")
    shutil.copytree(folder / "converted", folder / "broken")
    plant(folder / "broken", "q-not-permuted")
    (folder / "parity.toml").write_text(GATE)
    return folder


def shown(arguments: list[str], cwd: Path, columns: int | None) -> str:
    done = program(*arguments, cwd=cwd, columns=columns)
    return done.stdout + done.stderr


def printed(arguments: list[str], cwd: Path, columns: int | None) -> str:
    """By a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in TERMINAL}
    if columns is not None:
        environment["COLUMNS"] = str(columns)
    command = [sys.executable, "-m", "ckpt_tool", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


def masked(text: str) -> str:
    for pattern, sign in MASKS:
        text = pattern.sub(sign, text)
    return text


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("screen", SCREENS)
def test_screens(screen: str, columns: int, place: Path) -> None:
    import shutil

    shutil.rmtree(place / "bert-hf", ignore_errors=True)
    text = "".join(shown(arguments, place, columns) for arguments in SCREENS[screen])
    assert "\x1b" not in text and "Traceback" not in text
    for line in text.splitlines():
        assert line == line.rstrip(), repr(line)
        assert cell_len(line) <= columns or screen == "errors", line  # an error is one line, for machines
    file = GOLDEN / f"{screen}-{columns}.txt"
    if os.environ.get("CKPT_TOOL_GOLDEN") == "write":
        file.write_text(masked(text), encoding="utf-8")
    assert masked(text) == file.read_text(encoding="utf-8")


def test_redirected_output_is_80_columns_wide_and_follows_columns(place: Path) -> None:
    narrow, wide = printed(["families"], place, None), printed(["families"], place, 120)
    assert narrow == shown(["families"], place, 80) != wide == shown(["families"], place, 120)


def test_no_class_of_a_family_is_broken_and_json_names_all(place: Path) -> None:
    told = json.loads(shown(["families", "--json"], place, 80))
    words = {word.rstrip(",") for word in shown(["families"], place, 80).split()}
    for family in told:
        names = family["architectures"]
        few = len(names) < 3 and max(map(len, names)) < 30
        assert set(names if few else names[:1]) <= words, family["name"]
    assert any(len(family["architectures"]) > 2 for family in told)


def test_a_process_shows_what_was_shown_here(place: Path) -> None:
    arguments = SCREENS["verify-fail"][0]
    assert masked(printed(arguments, place, 80)) == masked(shown(arguments, place, 80))


def test_no_color_leaves_no_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert consoles()[0].color_system is None


# --- the layout itself ----------------------------------------------------------------------------------

NUMBERS = tuple(f"1.23e-{k:02d}" for k in range(10, 22))


def drawn(width: int, columns: list[Column], rows: list[tuple[str, ...]]) -> tuple[list[str], list[str]]:
    out = io.StringIO()
    missing = table(Console(file=out, width=width), columns, rows)
    return out.getvalue().splitlines(), missing


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160])
def test_a_wide_table_of_numbers_loses_columns_and_breaks_no_number(width: int) -> None:
    columns = [Column("phase", whole=True)]
    columns += [Column(f"n{k}", right=True, spare=k) for k in range(12)]
    lines, missing = drawn(width, columns, [("layer 10", *NUMBERS), ("head", *NUMBERS)])
    assert all(len(line) <= width for line in lines)
    kept = [n for k, n in enumerate(NUMBERS) if f"n{k}" not in missing]
    assert lines[1].split() == ["layer", "10", *kept] and kept[0] == NUMBERS[0]
    assert len(kept) + len(missing) == len(NUMBERS)


@pytest.mark.parametrize("width", [20, 24, 30, 44])
def test_names_fold_at_dots_and_ranges_stay_whole(width: int) -> None:
    name = "model.layers.{0..31}.self_attn.q_proj.weight"
    lines = wrapped(name, width)
    assert "".join(lines) == name and all(len(line) <= width for line in lines)
    assert any("{0..31}" in line for line in lines)
    assert all(line.startswith(".") for line in lines[1:])


@pytest.mark.parametrize("text", ["a  b", "", "\n", "日本語" * 30, "x" * 300, "1,234,567 1.5e-12 " * 9])
def test_wrapping_loses_nothing_but_blanks_and_line_ends(text: str) -> None:
    lines = wrapped(text, 24)
    assert all(cell_len(line) <= 24 for line in lines)
    assert "".join(lines).replace(" ", "") == re.sub(r"\s", "", text)
    assert all(n in lines or any(n in line for line in lines) for n in re.findall(r"[\d.,e-]{5,}", text))


def test_the_lines_of_a_paragraph_hang_below_its_text() -> None:
    out = io.StringIO()
    paragraph(Console(file=out, width=40), "words " * 20, first="  note      ")
    first, *others = out.getvalue().splitlines()
    assert first.startswith("  note      words") and others
    assert all(line.startswith(" " * 12 + "words") and len(line) <= 40 for line in others)


# --- without rich ---------------------------------------------------------------------------------------

ODD = (
    "a line of words that is longer than the console is wide, and so is folded",
    "x" * 50,
    "two\nlines  ",
    "a\ttab",
    "bells\a and returns\r, \x1b[31mred",
    ":warning: and :fire:",
    "[bold]styles[/bold] and [0, 1]",
    "日本語 " * 9,
    "soft\u00adhyphen, fixed\u00a0blank, joined\u200d",
    "café … → 10:30",
    "   blanks   ",
    "",
)


@pytest.mark.parametrize("text", ODD)
def test_a_console_where_no_terminal_is_writes_what_rich_writes(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    out = io.StringIO()
    columns = [Column("name"), Column("number", right=True)]
    for screen in (Plain(stderr=False, width=40), Console(file=out, width=40, highlight=False)):
        for markup in (False, True):
            for soft in (False, True):
                screen.print(text, style="dim", markup=markup, soft_wrap=soft)
        say(screen, text, "bold")
        say(screen, [Styled(text, "green"), " and ", text])
        paragraph(screen, text, first=Styled(text[:9], "dim"), hang=4, style="red")
        table(screen, columns, [(text, "1"), ("b", Styled(text[:5], "red"))], title="Title")
    assert isinstance(sys.stdout, io.StringIO) and sys.stdout.getvalue() == out.getvalue()


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_rich_decides_where_the_environment_says_what_a_terminal_is(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    assert [type(c) for c in consoles()] == [Plain, Plain]
    monkeypatch.setenv(variable, "1")
    assert [(type(c), c.is_terminal) for c in consoles()] == [(Console, True)] * 2


def test_what_only_rich_knows_is_asked_of_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(Plain, "rich", lambda self: asked.append("rich") or Console(file=io.StringIO()))
    screen = Plain(stderr=False, width=20)
    say(screen, [Styled("a line of letters", "bold"), ", as wide as it is"])
    screen.print("short", style="dim", markup=False)
    assert not asked
    for text in ("tab\t", "x" * 21, ":a: b"):
        screen.print(text, markup=False)
    assert len(asked) == 3
