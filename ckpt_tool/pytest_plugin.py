"""`pytest --ckpt-gate parity.toml`: the checks of a gate file as tests, one for each check and level, and one
for its verdict. Registered as the plugin `ckpt_tool`; it costs nothing where it is not asked for.

For tests of one's own there are the fixtures `assert_parity` and `ckpt_convert`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
        of = {os.fspath(Path(n.partition("::")[0]).resolve()) for n in named if "::" in n}
        config.args = [*named, *(g for g in gates if g not in of)]  # of some only the named tests


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of xdist, where it deals tests out one by one: the tests of a check share one run of it, and so one
    process. Its marks for groups do not reach the names by which it deals since pytest 9.2."""
    if not config.getoption(OPTION) or config.getoption("dist") not in ("load", "loadgroup"):
        return None
    from xdist.scheduler import LoadScopeScheduling

    known: dict[tuple[Path, str], str] = {}
    for file in map(Path, config.getoption(OPTION)):
        checks = _checks(file.resolve())
        known |= {(file.resolve(), c.name): g for c, g in zip(checks, groups(checks), strict=True)}

    class ByCheck(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            key = ((config.rootpath / file).resolve(), name.rpartition("[")[0])
            return f"{file}::{known[key]}" if key in known else nodeid

    return ByCheck(config, log)


def _checks(file: Path) -> list[Check]:
    """Those of a gate file; none of one that is none, which its collector tells."""
    from ckpt_tool.errors import CkptToolError
    from ckpt_tool.verify.gate import read_gate

    try:
        return read_gate(file)[1]
    except CkptToolError:
        return []


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"ckpt-gate: {file}" for file in config.getoption(OPTION)]


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
                yield GateItem.from_parent(self, name=f"{check.name}[{level}]", run=run, level=level)


def groups(checks: Sequence[Check]) -> list[str]:
    """For each check the name of those that one process must run in their order, since one reads what another
    writes."""
    from ckpt_tool.gate_processes import before

    made: list[str] = []
    for check, earlier in zip(checks, before(checks), strict=True):
        joined = {made[k] for k in earlier}
        name = min(joined, key=made.index) if joined else check.name
        made = [name if group in joined else group for group in made] + [name]
    return made


def levels_of(check: Check) -> list[str]:
    """The levels that a check asks for, and what is judged over all of them."""
    from ckpt_tool.verify import LEVELS

    made = list(LEVELS if check.levels is None else check.levels)
    made += [] if check.against is None else [check.against]
    return [*made, *(["gate"] if check.require or check.bars else []), VERDICT]


class Run:
    """One check, run once for all its tests that were chosen."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self._report: Report | None = None

    def report(self, chosen: set[str]) -> Report:
        """As far as the levels that are `chosen` ask for it."""
        if self._report is None:
            from ckpt_tool.api import convert
            from ckpt_tool.verify.gate import run_check

            self._report = run_check(narrowed(self.check, chosen), convert)
        return self._report


def narrowed(check: Check, chosen: set[str]) -> Check:
    """A check of some of its levels; whole where something is judged over all of them."""
    from ckpt_tool.verify import LEVELS

    if chosen & {VERDICT, "gate"}:
        return check
    return replace(
        check,
        levels=tuple(level for level in check.levels or LEVELS if level in chosen),
        against=check.against if check.against in chosen else None,
        expectations=check.expectations if "documented" in chosen else None,
        require=(),
        bars={},
    )


class GateFailure(AssertionError):
    """What a level found; shown as it is, without a traceback."""


class GateItem(pytest.Item):
    """One level of one check. It fails where a finding of it does, and where one could not be judged; it is
    skipped where all of them were."""

    def __init__(self, *, run: Run, level: str, **more: Any) -> None:
        super().__init__(**more)
        self.run_, self.level = run, level

    def runtest(self) -> None:
        mine = [i for i in self.session.items if isinstance(i, GateItem) and i.run_ is self.run_]
        report = self.run_.report({i.level for i in mine})
        if self.level in report.seconds:
            self.user_properties.append(("seconds", round(report.seconds[self.level], 3)))
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
