"""The documentation says what the program does, no more and no less."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from ckpt_tool.cli import cli
from ckpt_tool.convert.families import FAMILIES
from ckpt_tool.fixtures.variants import VARIANTS

ROOT = Path(__file__).parents[1]
FOLDERS = ("ckpt_tool", "convert", "verify", "fixtures")
KIND = re.compile(r"""(?:\bfail|Problem|\.refuse)\(\s*"([a-z]+(?:-[a-z]+)*)",""")


def kinds_in_code() -> set[str]:
    found = set()
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            found |= set(KIND.findall(file.read_text(encoding="utf-8")))
    return found


def test_every_kind_of_error_is_documented() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`([a-z-]+)`", text))
    found = kinds_in_code()
    assert len(found) > 30
    assert not found - documented


def test_links_in_the_documents_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    assert len(documents) > 5
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readme_names_every_family_and_only_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in FAMILIES:
        assert f"`{name}`" in text
    named = set(re.findall(r"ckpt-tool ([a-z]+(?:-[a-z]+)*)", text))
    assert named <= set(cli.commands)


def test_the_readme_counts_the_variants_of_each_family_and_of_the_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([a-z0-9-]+)` \|.*\| (\d+) variants \|$", text, re.MULTILINE))
    held = [v.family for v in VARIANTS.values()]
    assert {name: int(count) for name, count in told.items()} == {name: held.count(name) for name in held}
    assert f"for all {len(VARIANTS)}." in text


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_has_a_help_text(command: str) -> None:
    shown = CliRunner().invoke(cli, [command, "--help"])
    assert shown.exit_code == 0
    help_text = cli.commands[command].help
    assert help_text and len(help_text.splitlines()[0]) > 10


def test_the_program_runs_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ckpt_tool", "--version"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"ckpt-tool, version \d+\.\d+\.\d+\n", run.stdout)


def test_every_threat_has_its_test() -> None:
    """The rows of docs/threats.md are numbered without a gap, and the tests that they name are there."""
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", (ROOT / "docs/threats.md").read_text(), re.MULTILINE)
    assert [int(n) for n, _ in rows] == list(range(1, 76))
    listed = import_module("tests.test_threats").LISTED
    for number, names in rows:
        assert "`" in names, number
        for name in re.findall(r"`([^`]+)`", names):
            module, function, case = re.fullmatch(r"(\w+)(?:::(\w+))?(?:\[(.+)\])?", name).groups()  # type: ignore[union-attr]
            text = (ROOT / f"tests/{module}.py").read_text()
            assert function is None or f"def {function}(" in text, f"row {number}: {name}"
            assert case is None or case in listed, f"row {number}: {name}"
