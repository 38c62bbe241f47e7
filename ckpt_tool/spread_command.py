"""`convert` and `verify` by several processes: one worker's share, what follows all of them, or both on a Ray
cluster."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ckpt_tool.checkpoint.remote_path import scheme_of
from ckpt_tool.command_parts import memory_of, mode_of, print_json
from ckpt_tool.errors import CkptToolError, fail, printable
from ckpt_tool.progress import conversion_summary, following, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckpt_tool.api import Conversion, PartMade, Shared
    from ckpt_tool.convert.shares import Worker
    from ckpt_tool.terminal import Screen
    from ckpt_tool.verify.seen import Seen

TAKEN = ("jobs", "overwrite", "overwrite_foreign", "sha256", "strict", "checksums")
TAKEN_UP = ("output-busy", "output-exists")  # kinds that say that another worker publishes, or has
SHOWN = 8  # workers named before the rest is counted


def wanted(asked: dict[str, Any]) -> bool:
    """Whether the options ask for several processes; `usage` where they contradict each other."""
    if asked["ray"] and (asked["worker"] or asked["finish"]):
        other = "--worker" if asked["worker"] else "--finish"
        fail("usage", f"expected --ray alone, which does both, found {other} beside it", where="--ray")
    if asked["tasks"] and not asked["ray"]:
        fail("usage", "expected --ray beside it, found none", where="--tasks")
    return bool(asked["worker"] or asked["finish"] or asked["ray"])


def worker_of(text: str) -> Worker:
    """`2/4` as a worker."""
    from ckpt_tool.convert.shares import Worker

    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text, re.ASCII)
    if found is None:
        message = f"expected I/N, worker I of N (from 1/N to N/N), found {text!r}"
        fail("usage", message, where="--worker")
    return Worker(int(found[1]), int(found[2]))


def carry_out(shared: Shared, asked: dict[str, Any], as_json: bool, screen: Screen, log: Screen) -> int:
    """What was asked for of --worker, --finish and --ray; the exit code."""
    from dataclasses import replace

    from ckpt_tool import api

    worker = worker_of(asked["worker"]) if asked["worker"] else None
    if (scheme := scheme_of(str(shared.out))) is not None:
        message = f"expected a folder that all workers share, found one at {scheme}://"
        fail("usage", message, where="--out", hint="publish into a folder, and upload that")
    check, beside = not asked["no_verify"], (asked["config"],) if asked["config"] else ()

    def tell(text: str) -> None:
        log.print(printable(text, 500), style="dim", markup=False)

    with following(lambda: log) as progress:
        taken = {k: asked[k] for k in TAKEN}
        shared = replace(shared, progress=progress, tell=tell, beside=beside, **taken)
        if asked["ray"]:
            from ckpt_tool.on_ray import convert_on_ray

            done = convert_on_ray(shared, asked["ray"], tasks=asked["tasks"], check=check, tell=tell)
            return _whole(done, shared, as_json, screen)
        made = None if worker is None else api.convert_part(shared, worker)
        if made is not None and (not asked["finish"] or made.part.missing):
            return _part(made, as_json, screen)
        try:
            done = api.publish_parts(shared, count=None if worker is None else worker.count, check=check)
        except CkptToolError as error:
            if made is None or error.kind not in TAKEN_UP:
                raise
            return _part(made, as_json, screen, publishing=True)
    return _whole(done, shared, as_json, screen)


def _whole(done: Conversion, shared: Shared, as_json: bool, screen: Screen) -> int:
    if as_json:
        print_json(done.to_json())
    else:
        conversion_summary(done, screen, shared.source)
    return done.report.exit_code if done.report is not None else 0


def _part(made: PartMade, as_json: bool, screen: Screen, *, publishing: bool = False) -> int:
    if as_json:
        print_json(made.to_json())
        return 0
    from ckpt_tool.terminal import Styled, paragraph

    def line(label: str, text: str, style: str = "") -> None:
        paragraph(screen, text, first=Styled(f"   {label:<10}", "dim"), style=style)

    part = made.part
    total = sum(t.nbytes for f in part.files for t in f.held)
    line("made", f"part {part.worker} of {printable(made.out)}: {len(part.files)} file(s), {size(total)}")
    if part.outcome.resumed:
        line(
            "resumed", f"{len(part.outcome.resumed)} of them were there already, and are as they were written"
        )
    for found in part.outcome.findings[:10]:
        where = f"{found.file}: {found.tensor}" if found.tensor else found.file
        line("found", f"{found.kind}: {printable(where)}: {printable(found.message, 500)}", "yellow")
    if publishing:
        line(
            "next", "nothing: another process publishes it, or has (if none does: --finish without --worker)"
        )
    elif part.missing:
        line("next", f"{listed(part.missing, part.worker.count)}, then the same command with --finish")
    else:
        line("next", "all parts are there: the same command with --finish in place of --worker")
    return 0


def listed(numbers: Sequence[int], count: int) -> str:
    """`--worker 2/4 and 3/4`."""
    shown = [f"{k}/{count}" for k in numbers[:SHOWN]]
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"--worker {', '.join(shown)}{more}"


def look(
    out: str,
    source: str | None,
    levels: Sequence[str],
    asked: dict[str, Any],
    screen: Screen,
    log: Screen,
) -> int:
    """One worker's share of a verification; 1 where it saw a difference."""
    from ckpt_tool import api

    if asked["finish"]:
        message = "expected --worker or --finish, found both"
        fail("usage", message, where="--finish", hint="the report is made once all workers have ended")
    of_report = [f"--{name}" for name in ("junit", "html", "markdown") if asked[name]]
    if of_report or asked["json_file"] not in (None, "-"):
        found = (of_report or ["--json FILE"])[0]
        fail("usage", f"expected --finish to write the report, found {found} beside --worker", where=found)

    def tell(text: str) -> None:
        log.print(printable(text, 500), style="dim", markup=False)

    def tell_at(text: str) -> None:
        if log.is_terminal or not text.startswith("parity: "):
            tell(text)

    seen = api.verify_part(out, source, worker_of(asked["worker"]), progress=tell_at, **_asked(levels, asked))
    if asked["json_file"] is not None:
        print_json(seen.to_json())
    else:
        _say_seen(seen, screen)
    return int(seen.differences > 0)


def look_on_ray(
    out: str, source: str | None, levels: Sequence[str], asked: dict[str, Any], log: Screen
) -> None:
    """All shares of a verification; the report joins them."""
    from ckpt_tool.on_ray import verify_on_ray

    def tell(text: str) -> None:
        log.print(printable(text, 500), style="dim", markup=False)

    shares = _asked(levels, asked)
    verify_on_ray(out, source, asked["ray"], tasks=asked["tasks"], tell=tell, **shares)


def _asked(levels: Sequence[str], asked: dict[str, Any]) -> dict[str, Any]:
    """What a worker is asked."""
    from ckpt_tool import api

    return {
        "levels": levels or None,
        "no_source": asked["no_source"],
        "prompts": asked["prompts"],
        "compute_dtype": asked["compute_dtype"],
        "device": asked["device"],
        "settings": api.settings(asked["pairs"]),
        "mode": mode_of(asked),
        "memory": memory_of(asked),
    }


def _say_seen(seen: Seen, screen: Screen) -> None:
    from ckpt_tool.terminal import Styled, paragraph

    def line(label: str, text: str, style: str = "") -> None:
        paragraph(screen, text, first=Styled(f"   {label:<10}", "dim"), style=style)

    read = size(sum(s.tensor.nbytes for s in seen.scans))
    line(
        "looked at",
        f"part {seen.worker}: {len(seen.scans)} tensors, {read}; {len(seen.steps)} steps of the plan",
    )
    if seen.prompts:
        line("computed", f"parity of its share of these prompts: {', '.join(seen.prompts)}")
    if seen.resumed:
        line("resumed", f"{seen.resumed} of them had been looked at before")
    if seen.differences:
        line("found", f"{seen.differences} tensors differ from the source; --finish tells which", "red")
    if seen.missing:
        line("next", f"{listed(seen.missing, seen.worker.count)}, then the same command with --finish")
    else:
        line("next", "all parts are there: the same command with --finish in place of --worker")
