"""What a person sees while a conversion runs and when it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from shlex import quote
from typing import TYPE_CHECKING, Any

from ckpt_tool.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from ckpt_tool.api import Conversion
    from ckpt_tool.convert.execute import Progress
    from ckpt_tool.terminal import Screen

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal
STAGES = {"copy": "copying", "check": "checking", "finish": "finishing"}


@contextmanager
def following(make: Callable[[], Screen]) -> Iterator[Callable[[Progress], None]]:
    """A callback for `convert(progress=...)`: a bar with bytes, speed and time left on a terminal, else a
    plain line now and then. The bar appears with the first report, so errors come out clean, and its console
    is made then: what draws is loaded while the workers copy."""
    begun: list[Callable[[Progress], None]] = []
    with ExitStack() as stack:

        def follow(now: Progress) -> None:
            if not begun:
                begun.append(_follower(make(), now, stack))
            begun[0](now)

        yield follow


def _follower(log: Screen, first: Progress, stack: ExitStack) -> Callable[[Progress], None]:
    from ckpt_tool.terminal import Plain

    return _plain(log) if isinstance(log, Plain) or not log.is_terminal else _bar(log, first, stack)


def _bar(log: Console, first: Progress, stack: ExitStack) -> Callable[[Progress], None]:
    """On a terminal: a bar, until `stack` ends."""
    from rich import progress as bars

    bar = bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
        console=log,
        transient=True,
    )
    bar.start()
    stack.callback(bar.stop)
    task = bar.add_task("", total=first.bytes_total)

    def follow(now: Progress) -> None:
        text = f"{STAGES.get(now.stage, now.stage)} {printable(now.file, 60)}"
        bar.update(task, completed=now.bytes_done, total=now.bytes_total, description=text)

    return follow


def _plain(log: Screen) -> Callable[[Progress], None]:
    last = time.monotonic()

    def follow(now: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_EVERY:
            last = time.monotonic()
            share = now.bytes_done / max(1, now.bytes_total)
            stage = STAGES.get(now.stage, now.stage)
            log.print(f"{stage} {printable(now.file)}: {share:.0%} of {size(now.bytes_total)}", markup=False)

    return follow


def size(count: float) -> str:
    """Bytes for people: `14.5 GB` (10^9), `930 kB`, `12 bytes`."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} {units[0]}" if units[0] == "bytes" or count >= 100 else f"{count:.1f} {units[0]}"


def conversion_summary(done: Conversion, screen: Screen, source: Any) -> None:
    """The lines after a conversion: what was written, what is odd about it, what to do next."""
    from ckpt_tool.convert.steps import as_steps
    from ckpt_tool.terminal import Styled, paragraph, say

    plan, outcome = done.plan, done.outcome
    tensors = sum(len(f.tensors) for f in plan.outputs)
    steps = as_steps(plan.steps)
    compared = sum(bool(steps.templates[k].compare) for k in steps.kinds)
    moved = sum(steps.templates[k].note != "rename" for k in steps.kinds if not steps.templates[k].compare)

    def line(label: str, text: str, style: str = "") -> None:
        paragraph(screen, text, first=Styled(f"   {label:<10}", "dim"), style=style)

    line(
        "wrote",
        f"{printable(done.out)}: {tensors} tensors, {size(plan.bytes_out)}, {len(plan.outputs)} file(s)",
    )
    line("layout", f"{moved} steps reorder elements, {compared} compare copies, the rest are plain copies")
    reasons: dict[str, list[str]] = {}
    for dropped in plan.dropped:
        reasons.setdefault(dropped.reason, []).append(dropped.tensor.name)
    for reason, (first, *others) in reasons.items():
        more = f" and {len(others)} more, listed in ckpt-tool.json" if others else ""
        line("dropped", f"{printable(first)}{more}: {printable(reason, 500)}")
    for text in plan.lossy:
        line("lossy", text, "yellow")
    for known in plan.foretold:
        line("foretold", printable(f"{known.name}: {known.reason}", 500), "yellow")
    for note in (*done.opened, *plan.notes):
        line("note", printable(note, 500))
    for found in outcome.findings[:10]:
        where = f"{found.file}: {found.tensor}" if found.tensor else found.file
        line("found", f"{found.kind}: {printable(where)}: {printable(found.message, 500)}", "yellow")
    if len(outcome.findings) > 10:
        line("found", f"(+{len(outcome.findings) - 10} more, listed in ckpt-tool.json)", "yellow")
    if done.report is not None:
        for finding in done.report.findings:
            if finding.check == "way back":
                line("note", printable(finding.message, 500))
            elif finding.check == "generation config" and finding.status == "note":
                line("note", printable(f"{finding.where}: {finding.message}", 500))
        bad = [f for f in done.report.findings if f.status == "fail"]
        for finding in bad[:10]:
            line("coverage", printable(f"{finding.where or ''} {finding.message}", 500), "red")
        if not bad:
            line("coverage", "every source and target tensor accounted for", "green")
    if left := _left(done):
        line("left", left, "yellow")
    if plan.direction in ("to-hf", "to-original"):  # in one line, to be pasted
        say(screen, [Styled(f"   {'next':<10}", "dim"), printable(_next(done, source), 4096)])


def _left(done: Conversion) -> str:
    """What other runs have left beside the output, and the way to be rid of it."""
    from ckpt_tool.convert.durable import left_beside, partial_prefix
    from ckpt_tool.convert.places import resolved

    if isinstance(done.out, str):
        return ""
    place = resolved(done.out)
    if not (names := left_beside(place)):
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    ways = f"rm -r {quote(str(place.with_name(partial_prefix(place))))}*"
    return printable(f"{names[0]}{more} of other runs into this place; if none is at work: {ways}", 4096)


def _next(done: Conversion, source: Any) -> str:
    """The command that proves the output, with all that it has to be told: facts on which the user insisted
    against the source, and differences that the plan foretells."""
    words = ["ckpt-tool", "verify", str(done.out), "--source", str(source)]
    for name, value in done.insisted.items():
        words += ["--set", f"{name}={_given(value)}"]
    for known in done.plan.foretold:
        words += ["--accept", known.name]
    return " ".join(map(quote, words))


def _given(value: Any) -> str:
    """A value as --set reads it: text as it is, unless it reads as JSON."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)
