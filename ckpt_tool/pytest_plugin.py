"""`pytest --ckpt-gate parity.toml`: the checks of a gate file as tests, one for each check and level, and one
for its verdict. Registered as the plugin `ckpt_tool`; it costs nothing where it is not asked for.

For tests of one's own there are the fixtures `assert_parity` and `ckpt_convert`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ckpt_tool.verify.gate import Check
    from ckpt_tool.verify.report import Finding, Report

OPTION = "ckpt_gate"
VERDICT = "verdict"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ckpt-tool", "checkpoints: conversion and parity")
    group.addoption(
        "--ckpt-gate",
        action="append",
        default=[],
        metavar="PARITY.TOML",
        help="run the checks of this gate file as tests; alone unless other tests are named too",
    )


def pytest_configure(config: pytest.Config) -> None:
    gates = [os.fspath(Path(f).resolve()) for f in config.getoption(OPTION)]
    for file in gates:
        if not Path(file).is_file():
            raise pytest.UsageError(f"--ckpt-gate: expected a file, found none: {file}")
    if gates:
        named = config.args if config.args_source is config.ArgsSource.ARGS else []
        config.args = [*named, *gates]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    asked = [Path(f).resolve() for f in parent.config.getoption(OPTION)]
    if file_path.resolve() in asked:
        collector: pytest.Collector = GateFile.from_parent(parent, path=file_path)
        return collector
    return None


class GateFile(pytest.File):
    """A gate file; its checks are run when the first test of each is."""

    def collect(self) -> Iterator[pytest.Item]:
        from ckpt_tool.errors import CkptToolError
        from ckpt_tool.verify.gate import read_gate

        try:
            _, checks = read_gate(self.path)
        except CkptToolError as error:
            raise self.CollectError(str(error)) from None
        for check in checks:
            run = Run(check)
            for level in levels_of(check):
                item = GateItem.from_parent(self, name=f"{check.name}[{level}]", run=run, level=level)
                item.add_marker(pytest.mark.xdist_group(check.name))
                yield item


def levels_of(check: Check) -> list[str]:
    """The levels that a check asks for, and what is judged over all of them."""
    from ckpt_tool.verify import LEVELS

    made = list(LEVELS if check.levels is None else check.levels)
    made += [] if check.against is None else [check.against]
    return [*made, *(["gate"] if check.require or check.bars else []), VERDICT]


class Run:
    """One check, run once for all its tests."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self._report: Report | None = None

    @property
    def report(self) -> Report:
        if self._report is None:
            from ckpt_tool.api import convert
            from ckpt_tool.verify.gate import run_check

            self._report = run_check(self.check, convert)
        return self._report


class GateFailure(AssertionError):
    """What a level found; shown as it is, without a traceback."""


class GateItem(pytest.Item):
    """One level of one check. It fails where a finding of it does, and where one could not be judged; it is
    skipped where all of them were."""

    def __init__(self, *, run: Run, level: str, **more: Any) -> None:
        super().__init__(**more)
        self.run_, self.level = run, level

    def runtest(self) -> None:
        report = self.run_.report
        if report.could_not_run or self.level == VERDICT:
            if report.status != "pass":
                from ckpt_tool.testing import as_text

                raise GateFailure(as_text(report))
            return
        found = report.level(self.level)
        bad = [f for f in found if f.status in ("fail", "undecided")]
        if bad:
            raise GateFailure("\n".join(map(_line, bad)))
        if not any(f.status == "pass" for f in found):
            pytest.skip("; ".join(f.message for f in found) or "nothing to measure")
        for f in found:
            if f.measured is not None:
                self.user_properties.append((f.check, f.measured))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, GateFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.name


def _line(f: Finding) -> str:
    where = f"{f.where}: " if f.where else ""
    numbers = f" ({f.numbers()})" if f.numbers() else ""
    return f"{f.status}: {f.check}: {where}{f.message}{numbers}"


@pytest.fixture(name="assert_parity")
def assert_parity_fixture() -> Callable[..., Report]:
    """`assert_parity(out, source, **asked)`, see `ckpt_tool.testing`."""
    from ckpt_tool.testing import assert_parity

    return assert_parity


@pytest.fixture(scope="session")
def ckpt_convert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`ckpt_convert(source, family="auto", **asked)`: the folder of that conversion, made once a session;
    `asked` are the arguments of `ckpt_tool.api.convert`."""
    made: dict[str, Path] = {}

    def converted(source: str | os.PathLike[str], family: str = "auto", **asked: Any) -> Path:
        key = repr((os.fspath(source), family, sorted(asked.items())))
        if key not in made:
            from ckpt_tool.api import convert

            out = tmp_path_factory.mktemp("converted") / "model"
            convert(source, out, family=family, **asked)
            made[key] = out
        return made[key]

    return converted
