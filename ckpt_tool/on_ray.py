"""The shares of a conversion, or of a verification, as tasks of a Ray cluster, whose nodes see the same files
under the same paths.

A task is what `--worker I/N` is, so one that died with its node goes on elsewhere from its journal. Tasks are
spread over the nodes; a node that was started with `ray start --resources '{"disk": 2}'` gets at most so many
at once, which is how the bandwidth of its disks is shared out. All nodes need the same version of ckpt-tool.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ckpt_tool.api import Conversion, Shared, convert_part, publish_parts, verify_part
from ckpt_tool.checkpoint.remote_path import scheme_of
from ckpt_tool.convert.execute import Progress
from ckpt_tool.convert.shares import MOST, Worker
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all, printable

A_NODE = 2  # tasks, unless the number is given
RETRIES = 3
DISK = "disk"  # the resource that a node may have: tasks that its disks can take at once
PASSING = ("read-failed", "write-failed", "output-busy")  # kinds of errors that another try may not meet

Tell = Callable[[str], None]


class Again(Exception):
    """A task failed for a reason that may pass; its argument is the problems."""


@dataclass(frozen=True)
class Ended:
    """How a task ended: what it made, or why not."""

    worker: Worker
    node: str
    bytes_made: int = 0
    resumed: int = 0
    problems: tuple[Problem, ...] = ()


def convert_on_ray(
    shared: Shared, address: str, *, tasks: int | None = None, check: bool = True, tell: Tell = lambda _: None
) -> Conversion:
    """Convert on the cluster at `address`, or on one that is started here for it ("local"), in `tasks` shares
    (None: two for each node), and publish. Raises what the tasks raise, all problems at once, and
    `cluster-failed` where Ray cannot carry them out; what is finished then stays, and the same call goes
    on."""
    ray = _ray()
    shared = _absolute(shared)
    with shared.planned() as begun:
        files, total = len(begun.plan.outputs), begun.plan.bytes_out
        plain = replace(shared, progress=None, on_plan=None, tell=_silent)
        work = Work("convert", partial(_made, plain), shared.jobs)
        follow = partial(_follow, shared, tell, total)
        ended = _carried_out(ray, address, work, tasks, follow, tell, most=files)
        count = len(ended)
    fail_all(p for e in ended for p in e.problems)
    return publish_parts(replace(shared, on_plan=None), count=count, check=check)


def verify_on_ray(
    out: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    address: str,
    *,
    tasks: int | None = None,
    tell: Tell = lambda _: None,
    **asked: Any,
) -> None:
    """Look at all shares of an output on the cluster at `address` ("local": one that is started here), in
    `tasks` shares (None: two for each node), for `verify(joined=True)`; `asked` is what `verify_part` takes.
    Raises as `convert_on_ray`."""
    ray = _ray()
    asked["prompts"] = None if asked.get("prompts") is None else _path(asked["prompts"])
    work = Work("verify", partial(_seen, _path(out), None if source is None else _path(source), asked), 1)

    def follow(count: int, ended: list[Ended]) -> None:
        last = ended[-1]
        state = "failed" if last.problems else f"looked at on {printable(last.node, 60)}"
        tell(f"part {last.worker} {state} ({len(ended)} of {count})")

    ended = _carried_out(ray, address, work, tasks, follow, tell)
    fail_all(p for e in ended for p in e.problems)


@dataclass(frozen=True)
class Work:
    """What a task does for a worker, and the processors that it takes; `do` gives the bytes that were made,
    and what an earlier run had done already."""

    name: str
    do: Callable[[Worker], tuple[int, int]]
    jobs: int


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a conversion goes anywhere
    import ray

    return ray


def _begin(ray: Any, address: str) -> bool:
    """Connect, unless the caller has; whether it was done here."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        quiet["include_dashboard"] = False
    ours = signal.getsignal(signal.SIGTERM)
    try:
        _answers(address)
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        message = f"expected a Ray cluster, found none that answers: {error}"
        fail("cluster-failed", message, where=f"--ray {address}", hint="--ray local starts one here")
    finally:
        signal.signal(signal.SIGTERM, ours)  # ray has put an exit of its own in its place
    return True


def _answers(address: str) -> None:
    """OSError at once where nothing listens at HOST:PORT: ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _absolute(shared: Shared) -> Shared:
    """The paths as they are on every node, whatever its working folder is."""

    tokenizer = shared.options.tokenizer
    options = replace(shared.options, tokenizer=None if tokenizer is None else _path(tokenizer))
    beside = tuple(_path(p) for p in shared.beside)
    source, out = _path(shared.source), _path(shared.out)
    return replace(shared, source=source, out=out, options=options, beside=beside)


def _path(given: str | os.PathLike[str]) -> str:
    text = os.fspath(given)
    return text if scheme_of(text) is not None else os.path.abspath(text)


def _carried_out(
    ray: Any,
    address: str,
    work: Work,
    tasks: int | None,
    follow: Callable[[int, list[Ended]], None],
    tell: Tell,
    most: int = MOST,
) -> list[Ended]:
    """Carry the work out in `tasks` shares, at most so many; `follow` is called with their number and those
    that have ended."""
    began = _begin(ray, address)
    try:
        nodes = [n for n in ray.nodes() if n["Alive"]]
        count = min(most, tasks or A_NODE * len(nodes)) or 1
        tell(f"{count} tasks on {len(nodes)} node{'s' * (len(nodes) != 1)}")
        return _run(ray, work, count, nodes, partial(follow, count))
    finally:
        if began:
            ray.shutdown()


def _run(
    ray: Any, work: Work, count: int, nodes: list[dict[str, Any]], follow: Callable[[list[Ended]], None]
) -> list[Ended]:
    """Carry out all tasks; `follow` is called with those that have ended."""
    widest = max((n["Resources"].get("CPU", 0) for n in nodes), default=0)
    disks = {DISK: 1} if any(DISK in n["Resources"] for n in nodes) else {}
    task = ray.remote(_task).options(
        name=f"ckpt-tool {work.name}",
        num_cpus=min(work.jobs, widest),
        resources=disks,
        max_retries=RETRIES,
        retry_exceptions=[Again],
        scheduling_strategy="SPREAD",
    )
    waiting = {task.remote(work, Worker(k, count)): Worker(k, count) for k in range(1, count + 1)}
    ended: list[Ended] = []
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=1.0)
        for reference in done:
            ended.append(_result(ray, reference, waiting.pop(reference)))
            follow(ended)
    return ended


def _silent(_: str) -> None:
    return None


def _task(work: Work, worker: Worker) -> Ended:
    """What runs on a node."""
    node = os.uname().nodename
    try:
        made, resumed = work.do(worker)
    except CkptToolError as error:
        if error.kind in PASSING:
            raise Again(error.problems) from None
        return Ended(worker, node, problems=error.problems)
    return Ended(worker, node, made, resumed)


def _made(shared: Shared, worker: Worker) -> tuple[int, int]:
    part = convert_part(shared, worker).part
    return sum(t.nbytes for f in part.files for t in f.tensors), len(part.outcome.resumed)


def _seen(out: str, source: str | None, asked: Mapping[str, Any], worker: Worker) -> tuple[int, int]:
    return 0, verify_part(out, source, worker, **asked).resumed


def _result(ray: Any, reference: Any, worker: Worker) -> Ended:
    try:
        found: Ended = ray.get(reference)
        return found
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        problems = cause.args[0] if isinstance(cause, Again) else (_failed(worker, cause or error),)
    except ray.exceptions.RayError as error:
        problems = (_failed(worker, error),)
    return Ended(worker, "", problems=problems)


def _failed(worker: Worker, error: BaseException) -> Problem:
    said = (str(error) or type(error).__name__).strip().splitlines()
    message = f"expected worker {worker} to end, found after {RETRIES} more tries: {said[-1] if said else ''}"
    return Problem("cluster-failed", message, hint="run it again: finished files are kept")


def _follow(shared: Shared, tell: Tell, total: int, count: int, ended: list[Ended]) -> None:
    last = ended[-1]
    state = "failed" if last.problems else f"made on {printable(last.node, 60)}"
    tell(f"part {last.worker} {state} ({len(ended)} of {count})")
    if shared.progress is not None:
        done = sum(e.bytes_made for e in ended)
        shared.progress(Progress("copy", f"{len(ended)} of {count} parts", done, total))
