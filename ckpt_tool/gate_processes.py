"""Who carries out the checks of a gate: this process, one after the other, or several processes at once, as
far as the memory goes that they need by their headers."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_tool.checkpoint.remote_path import scheme_of
from ckpt_tool.errors import CkptToolError, Problem, fail, printable
from ckpt_tool.verify import needs
from ckpt_tool.verify.gate import Carry, Check, could_not_run, run_check
from ckpt_tool.verify.needs import size_text

if TYPE_CHECKING:
    from ckpt_tool.terminal import Screen
    from ckpt_tool.verify.report import Report, Reports

Tell = Callable[[str], None]
Done = Callable[[int, "Report"], bool]
PATIENCE = 10.0  # seconds for a process that was told to end, which cleans up
READ = 1 << 16


def run_one(check: Check, tell: Tell) -> Report:
    """The report of one check; a crash of it is told there, as are its own errors."""
    from ckpt_tool.api import convert
    from ckpt_tool.program import as_told

    try:
        return run_check(check, convert, tell)
    except Exception as error:
        return could_not_run(check.name, as_told(error))


def one_by_one(tell: Tell) -> Carry:
    """In this process, in the order of the file."""

    def carry(checks: Sequence[Check], done: Done) -> None:
        for place, check in enumerate(checks):
            tell(f"gate: {check.name}")
            if not done(place, run_one(check, tell)):
                return

    return carry


def at_once(jobs: int, memory: int | None, tell: Tell) -> Carry:
    """Up to `jobs` processes, together below `memory` bytes by what is foretold of each: without a number,
    what is free now. A check that needs more than all of it runs alone, but is refused where the number was
    given."""
    if jobs < 1:
        fail("usage", f"expected one process or more, found {jobs}", where="--jobs")

    def carry(checks: Sequence[Check], done: Done) -> None:
        budget = needs.free_memory() if memory is None else memory
        crew = _Crew(checks, jobs, budget, memory is not None, tell)
        try:
            crew.work(done)
        finally:
            crew.stop()

    return carry


@dataclass
class _Worker:
    """A process, what is foretold that it needs, and what it has said that is no whole line yet."""

    place: int
    check: Check
    process: subprocess.Popen[bytes]
    need: int
    said: bytearray = field(default_factory=bytearray)
    report: Report | None = None
    peak: int = 0  # bytes


class _Crew:
    """The processes of one run of a gate."""

    def __init__(self, checks: Sequence[Check], jobs: int, budget: int, strict: bool, tell: Tell) -> None:
        self.checks, self.jobs, self.budget, self.strict, self.tell = checks, jobs, budget, strict, tell
        self.waiting = list(range(len(checks)))
        self.before = before(checks)
        self.needs: dict[int, int | None] = {}
        self.running: dict[int, _Worker] = {}
        self.selector = selectors.DefaultSelector()

    def work(self, done: Done) -> None:
        """Until every check has its report, or one is enough."""
        while self.waiting or self.running:
            for place in [p for p in self.waiting if self._may_start(p)]:
                if not self._may_start(place):  # one that was started meanwhile takes the room
                    continue
                self.waiting.remove(place)
                refused = self._start(place)
                if refused is not None and not done(place, refused):
                    return
            for key, _ in self.selector.select() if self.running else ():
                worker: _Worker = key.data
                if self._heard(worker) and not done(worker.place, self._ended(worker)):
                    return

    def _need(self, place: int) -> int:
        """What a check needs; looked at when what it reads is there."""
        if place not in self.needs:
            self.needs[place] = needs.of_check(self.checks[place])
        known = self.needs[place]
        return min(needs.COMPUTING, self.budget) if known is None else known

    def _may_start(self, place: int) -> bool:
        if len(self.running) >= self.jobs or not self.before[place].isdisjoint(self._open()):
            return False
        taken = sum(w.need for w in self.running.values())
        return not self.running or taken + self._need(place) <= self.budget

    def _open(self) -> set[int]:
        return {*self.waiting, *self.running}

    def _start(self, place: int) -> Report | None:
        """Begin; the report of a check that does not fit into the memory that was given."""
        check, need = self.checks[place], self._need(place)
        known = self.needs[place] is not None
        words = f"needs about {size_text(need)} of memory" if known else "what it needs is not known"
        self.tell(f"gate: {check.name}: {words}")
        if self.strict and need > self.budget:
            message = (
                f"expected a check that fits into {size_text(self.budget)} of memory, found that it {words}"
            )
            return could_not_run(
                check.name,
                CkptToolError(Problem("out-of-memory", message, hint="a larger --memory, or fewer levels")),
            )
        process = subprocess.Popen(
            _command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(min(self.jobs, len(self.checks))),
            process_group=0,  # so that what it starts ends with it
        )
        worker = _Worker(place, check, process, need)
        self.running[place] = worker
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)
        from ckpt_tool.verify.handing_over import check_line

        with suppress(BrokenPipeError):  # it has ended: its end says why
            process.stdin.write(check_line(check).encode() + b"\n")
            process.stdin.flush()
        return None

    def _heard(self, worker: _Worker) -> bool:
        """Take in what a process says; whether it has said all."""
        assert worker.process.stdout is not None
        data = worker.process.stdout.read(READ)
        if data is None:
            return False
        worker.said += data
        if b"\n" not in data:  # a report may be long, and comes in many pieces
            return not data
        *lines, rest = worker.said.split(b"\n")
        worker.said = bytearray(rest)
        for line in lines:
            word, _, text = line.decode("ascii").partition(" ")
            if word == "tell":
                self.tell(f"{worker.check.name}: {json.loads(text)}")
            elif word == "report":
                from ckpt_tool.verify.handing_over import report_of

                worker.report = report_of(text)
        return not data

    def _ended(self, worker: _Worker) -> Report:
        """The report of a process that has said all, or how it ended without one."""
        self._wait(worker)
        code = worker.process.returncode
        report = worker.report or could_not_run(worker.check.name, _without_report(code, worker.peak))
        known = self.needs[worker.place] is not None
        foretold = f"about {size_text(worker.need)} foretold" if known else "none foretold"
        report.facts["memory"] = f"{size_text(worker.peak)} at most, {foretold}"
        return report

    def _wait(self, worker: _Worker) -> None:
        """Until the process has ended, whatever it started with it."""
        _, status, usage = os.wait4(worker.process.pid, 0)
        worker.process.returncode = os.waitstatus_to_exitcode(status)
        worker.peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self._forget(worker)

    def _forget(self, worker: _Worker) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        assert worker.process.stdin is not None and worker.process.stdout is not None
        self.selector.unregister(worker.process.stdout)
        worker.process.stdout.close()
        with suppress(BrokenPipeError):
            worker.process.stdin.close()
        del self.running[worker.place]

    def stop(self) -> None:
        """End what still runs: told to, which cleans up, and killed where that takes too long."""
        workers = list(self.running.values())
        for worker in workers:
            with suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        for worker in workers:
            try:
                worker.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            self._forget(worker)
        self.selector.close()


def _without_report(code: int, peak: int) -> CkptToolError:
    if code == -signal.SIGKILL:
        message = f"expected a report, found the process killed with {size_text(peak)} of memory"
        hint = "a system kills what it has no memory for; a smaller --memory or --jobs runs fewer at once"
        return CkptToolError(Problem("out-of-memory", message, hint=hint))
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    message = f"expected a report, found the process ended by {ended}"
    return CkptToolError(Problem("internal", message, hint="the same check with --only and without --jobs"))


def _command() -> list[str]:
    """Python that finds the packages this one does, and none in the working folder that this one does not."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from ckpt_tool.gate_child import main; main()"
    return [sys.executable, "-P", "-c", code]


def _environment(processes: int) -> dict[str, str]:
    """So that they share the processors, unless it is said how many threads each may have."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


# --- which check must wait for which --------------------------------------------------------------------


def before(checks: Sequence[Check]) -> list[set[int]]:
    """For each check the earlier ones that must have ended: those of which one writes what the other reads or
    writes, and those that compute on a device, which is not shared."""
    made: list[set[int]] = []
    for k, later in enumerate(checks):
        made.append({j for j, earlier in enumerate(checks[:k]) if _apart(earlier, later)})
    return made


def _apart(one: Check, other: Check) -> bool:
    if one.device != "cpu" and other.device != "cpu":
        return True
    written, also = _written(one), _written(other)
    return _meet(written, _used(other)) or _meet(_used(one), also)


def _written(check: Check) -> list[Path]:
    return [] if check.convert is None else _local(check.out)


def _used(check: Check) -> list[Path]:
    return _local(check.out, check.source, check.prompts, check.expectations)


def _local(*paths: str | None) -> list[Path]:
    return [Path(os.path.realpath(p)) for p in paths if p is not None and scheme_of(p) is None]


def _meet(some: list[Path], others: list[Path]) -> bool:
    """Whether one lies in another, or is it."""
    return any(a == b or a in b.parents or b in a.parents for a in some for b in others)


# --- what the command says ------------------------------------------------------------------------------


def listing(checks: Sequence[Check], screen: Screen) -> None:
    """The checks of a gate, with what each needs of memory as far as its files are there to tell."""
    from ckpt_tool.terminal import Column, table

    heads = [Column("check", whole=True), Column("needs", whole=True)]
    heads += [Column("convert"), Column("source"), Column("out")]
    rows = []
    for c in checks:
        need = needs.of_check(c)
        told = "" if need is None else size_text(need)
        rows.append((c.name, told, c.convert or "", c.source or "", c.out))
    table(screen, heads, rows)


def last_line(reports: Reports, files: Iterable[str]) -> str:
    """The verdict in one line: how many passed, which did not, and where that is written."""
    written = ", ".join(files)
    return printable(
        f"{reports.status}: {reports.headline}" + (f"; written: {written}" if written else ""), 2000
    )
