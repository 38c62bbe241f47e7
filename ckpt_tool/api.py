"""Everything the command line does, as functions: open, recognise, plan, convert, verify.

    from ckpt_tool.api import convert, verify

    convert("Mistral-7B-v0.1", "out", family="mistral")
    report = verify("out", source="Mistral-7B-v0.1")
    assert report.status == "pass"

Nothing here imports torch but `verify`, which does so when it runs the parity level.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tool.checkpoint import checklist, integrity
from ckpt_tool.checkpoint.base import Checkpoint, stored
from ckpt_tool.checkpoint.opening import Limits, open_checkpoint
from ckpt_tool.checkpoint.remote_path import scheme_of, without_secrets
from ckpt_tool.convert import canonical
from ckpt_tool.convert.families import (
    FAMILIES,
    Family,
    as_family_knows,
    codes_apart,
    family,
    option_problems,
)
from ckpt_tool.convert.layer_axis import layers_apart
from ckpt_tool.convert.plan import Options, Plan, dropped_names
from ckpt_tool.convert.quantised_view import as_asked, as_read
from ckpt_tool.convert.recognising import (
    check_layout,
    check_own,
    check_plain,
    check_whole,
    explained,
    is_original,
    no_config,
    only_family,
    recognise,
    spelled,
    unknown_name,
    with_config,
)
from ckpt_tool.convert.shares import Worker
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all, fail_unread, printable
from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from ckpt_tool.convert.execute import Outcome, Progress
    from ckpt_tool.convert.parts import Part, Settings
    from ckpt_tool.verify.report import Report, Reports
    from ckpt_tool.verify.seen import Seen

__all__ = ["Conversion", "Options", "choose", "convert", "open_checkpoint", "plan", "recognise", "verify"]

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the plan, what executing it measured, and the cheap verification levels; `opened`
    are the notes of opening the input (which folder, which of two sets of weights), `insisted` the settings
    whose value is not the source's own: `verify` has to be told them again."""

    out: Path | str  # an address, where it is no folder on this machine
    plan: Plan
    outcome: Outcome
    report: Report | None = field(default=None)
    opened: tuple[str, ...] = ()
    insisted: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The numbers and findings of the run, and the coverage report where it ran."""
        return {
            "out": printable(self.out),
            "family": self.plan.family,
            "direction": self.plan.direction,
            "plan_digest": self.plan.digest(),
            "bytes_read": self.outcome.bytes_read,
            "bytes_written": self.outcome.bytes_written,
            "dropped": [printable(d.tensor.name) for d in self.plan.dropped],
            "lossy": list(self.plan.lossy),
            "opened": [printable(n, 2000) for n in self.opened],
            "notes": [printable(n, 2000) for n in self.plan.notes],
            "findings": [f.to_json() for f in self.outcome.findings],
            "resumed": list(self.outcome.resumed),
            "report": None if self.report is None else self.report.to_json(),
        }


def choose(checkpoint: Checkpoint, name: str = "auto", to: str = "hf") -> Family:
    """The family called `name`; for "auto" the only one that recognises the checkpoint. On the way back
    (`to="original"`) the Hugging Face config's architecture and the manifest decide."""
    if name == "auto":
        return _family_of_converted(checkpoint) if to == "original" else family(only_family(checkpoint))
    check_name(name)
    return family(name)


def check_name(name: str) -> None:
    """Fail with `usage` unless a family is called so, or it is "auto"."""
    if name not in (*FAMILIES, "auto"):
        fail_all([unknown_name(name)])


def _family_of_converted(checkpoint: Checkpoint) -> Family:
    if "config.json" not in checkpoint.documents or is_original(checkpoint):
        fail_all([no_config(checkpoint)])
    config = checkpoint.json("config.json")
    architectures = config.get("architectures") or []
    made_by = None
    if "ckpt-tool.json" in checkpoint.documents:
        made_by = checkpoint.json("ckpt-tool.json").get("family")
    own = [n for n in FAMILIES if set(family(n).architectures) & set(map(str, architectures))]
    if made_by in own:
        return family(made_by)
    if len(own) == 1:
        return family(own[0])
    name = canonical.whose(checkpoint)
    if name is not None and not architectures:  # a family takes it for the class that it writes
        return family(name)
    if name is not None and not own:
        fail(
            "unsupported",
            f"expected a class that originals of {name} are of, "
            f"found {printable(json.dumps(architectures), 100)}",
            file="config.json",
            where="architectures",
            hint="without --to original it is kept, as canonical safetensors",
        )
    fail(
        "unknown-family",
        f"expected an architecture that one family writes, found {printable(json.dumps(architectures), 100)}",
        file="config.json",
        where="architectures",
        hint="`ckpt-tool families` shows the classes; `convert FAMILY --to original` names the family",
    )


def plan(
    source: Source | Checkpoint,
    *,
    family: str = "auto",
    to: str = "hf",
    options: Options | None = None,
    checksums: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> Plan:
    """What converting `source` would do, from headers alone. `to` is "hf" or "original". Files that a
    publisher's list of sums (checklist.chk, SHA256SUMS, integrity.json) names are compared with it, large
    weights only with `checksums`; `progress` is told of each file of weights and the bytes read of it."""
    check_name(family)
    if not isinstance(source, Checkpoint):
        with open_for(source, to, options) as opened:
            return plan(opened, family=family, to=to, options=options, checksums=checksums)
    options = options or Options()
    source = layers_apart(as_asked(source, options))
    check_plain(source)
    check_whole(source)
    chosen = choose(source, family, to)
    fail_all(option_problems(chosen, options, to))
    make = _forth(chosen) if to == "hf" else chosen.plan_original
    seen = _as_read_by(source, chosen, to)
    options = replace(options, drop=dropped_names(options.drop, seen))
    try:
        made = make(seen, options)
    except CkptToolError as error:  # without the frames, which hold what was read of large documents
        raise explained(error.with_traceback(None), source, chosen, to) from None
    if options.with_optimizer:
        from ckpt_tool.convert.optimizer_state import with_optimizer

        made = with_optimizer(made, seen, options)
    if to == "hf":
        check_own(source, chosen)
    sums = checklist.notes(source, weights=checksums, progress=progress)
    sums += integrity.notes(source, weights=checksums, progress=progress)
    return replace(made, notes=(*sums, *made.notes))


def _as_read_by(checkpoint: Checkpoint, chosen: Family, to: str) -> Checkpoint:
    """`checkpoint` under the names that the plan of `chosen` in that direction asks for."""
    seen = as_family_knows(checkpoint, chosen)
    return seen if to == "hf" else canonical.of_rows(seen, chosen)


def _as_planned(checkpoint: Checkpoint, chosen: Family, made: Plan) -> Checkpoint:
    """What carrying the plan out reads."""
    seen = _as_read_by(checkpoint, chosen, "hf" if made.direction == "to-hf" else "original")
    if not made.asked.get("with_optimizer"):
        return seen
    from ckpt_tool.convert.optimizer_state import read_by

    return read_by(made, seen)


def _forth(chosen: Family) -> Callable[[Checkpoint, Options], Plan]:
    """How `chosen` plans what is to be in the Hugging Face layout, whichever it has now."""
    return lambda checkpoint, options: canonical.plan(checkpoint, chosen, options)


def open_for(
    source: Source, to: str = "hf", options: Options | None = None, *, late: bool = False
) -> Checkpoint:
    """`open_checkpoint`, preferring the side a conversion in that direction reads; with the config.json that
    the settings of `options` are, where there is none. `late`: see `Limits`."""
    found = open_checkpoint(source, prefer="original" if to == "hf" else "hf", limits=Limits(late=late))
    try:
        check_layout(found)
        found = spelled(codes_apart(found))
        return found if options is None else with_config(found, options.settings)
    except BaseException as error:
        try:
            if isinstance(error, CkptToolError):
                found.check_whole({})
        finally:
            found.close()
        raise


def convert(
    source: Source,
    out: Source,
    *,
    family: str = "auto",
    to: str = "hf",
    options: Options | None = None,
    jobs: int = 2,
    overwrite: bool = False,
    overwrite_foreign: bool = False,
    resume: bool = False,
    sha256: bool = False,
    strict: bool = False,
    check: bool = True,
    checksums: bool = False,
    progress: Callable[[Progress], None] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    beside: Iterable[Source] = (),
) -> Conversion:
    """Convert `source` into the folder `out`, or the repository `hf://org/name`: crash-safe, bounded memory.

    `jobs` worker threads; `strict` refuses non-finite weights; `check` runs the coverage level on the result;
    `checksums` compares large weights too with the publisher's sums. `overwrite` replaces an empty folder or
    an untouched earlier output, `overwrite_foreign` also a folder of other weights, configs and tokenizer
    files and nothing else, never one that holds an input or a file of `beside`, which the caller has read.
    Raises `CkptToolError` with all problems of a stage; `out` then does not exist (or is what it was before).
    """
    from ckpt_tool.convert.durable import Staging
    from ckpt_tool.convert.execute import execute
    from ckpt_tool.convert.places import check_output

    check_name(family)
    asked, check = options or Options(), check and to == "hf"
    hub = None
    if scheme_of(os.fspath(out)) is not None:
        from ckpt_tool.hub_output import HubOutput

        hub = HubOutput.of(out, replaces=overwrite or overwrite_foreign, check=check)
    if hub is not None:  # what stands there is replaced by a commit, and nothing on this machine
        overwrite = overwrite_foreign = False
    target = Path(out) if hub is None else hub.repository.folder
    beside = [*beside, *([] if asked.tokenizer is None else [asked.tokenizer])]
    check_output(target, source, overwrite=overwrite, overwrite_foreign=overwrite_foreign, beside=beside)
    with open_for(source, to, asked, late=True) as checkpoint, _checked(checkpoint):
        read = as_read(checkpoint, asked)
        chosen = choose(as_asked(read, asked), family, to)
        said = _reading(checkpoint, progress)
        made = plan(checkpoint, family=chosen.name, to=to, options=asked, checksums=checksums, progress=said)
        opened = checkpoint.opened()
        if on_plan is not None:
            on_plan(made)
        outcome = execute(
            made, _rest_seen(checkpoint, _as_planned(read, chosen, made)), target, jobs=jobs, resume=resume,
            sha256=sha256, strict=strict, progress=progress, address=_address(source), overwrite=overwrite,
            overwrite_foreign=overwrite_foreign, keep=Staging if hub is None else hub.staging(made),
        )  # fmt: skip
        insisted = _insisted(checkpoint, chosen, asked) if to == "hf" else {}
    report = _coverage(target) if check and hub is None else None
    done = Conversion(target, made, outcome, report, opened, insisted)
    return done if hub is None else hub.published(done)


@contextmanager
def _checked(checkpoint: Checkpoint) -> Iterator[None]:
    """What opening left for later is looked at before anything else is said to be wrong with the source."""
    from ckpt_tool.convert.durable import resumable

    try:
        yield
    except CkptToolError as error:
        if not resumable(error):
            checkpoint.check_whole({})
        raise


def _rest_seen(checkpoint: Checkpoint, executed: Checkpoint) -> Checkpoint:
    """`executed`, after a look at the files of `checkpoint` that it does not see: nobody else reads them."""
    seen = {id(stored(file)) for file in executed.files.values()}
    others = {name: file for name, file in checkpoint.files.items() if id(stored(file)) not in seen}
    checkpoint.with_files(others).check_whole({})
    return executed


def _insisted(checkpoint: Checkpoint, chosen: Family, options: Options) -> dict[str, Any]:
    """The settings to which the source itself says something else."""
    if not options.settings:
        return {}
    from ckpt_tool.verify.recorded import settled

    seen = as_family_knows(as_asked(checkpoint, options), chosen)
    options = replace(options, drop=dropped_names(options.drop, seen))
    settings = options.settings
    try:
        alone = canonical.plan(seen, chosen, replace(options, settings={})).config
        doubted = {n for n, v in settings.items() if n in alone and alone[n].value != v}
    except CkptToolError:  # it needs some of them
        doubted = set(settings)
    agreed = {n: v for n, v in settings.items() if n not in doubted}
    _, kept = settled(lambda o: canonical.plan(seen, chosen, o), options, agreed)
    return {n: v for n, v in settings.items() if n not in kept.settings}


def _coverage(out: Path) -> Report:
    from ckpt_tool.verify import verify as run

    return run(out, levels=("coverage",), no_source=True)


def _address(source: Source) -> str | None:
    text = os.fspath(source)
    return None if scheme_of(text) is None else without_secrets(text)


def _reading(
    checkpoint: Checkpoint, progress: Callable[[Progress], None] | None
) -> Callable[[str, int], None] | None:
    """`progress` as the reading of source files tells it."""
    if progress is None:
        return None
    from ckpt_tool.convert.execute import Progress

    total, done = sum(t.nbytes for t in checkpoint), 0

    def follow(file: str, count: int) -> None:
        nonlocal done
        done = min(total, done + count)
        progress(Progress("check", file, done, total))

    return follow


@dataclass(frozen=True)
class PartMade:
    """What `convert_part` did: the plan of the whole, and this worker's part of it."""

    out: Path
    plan: Plan
    part: Part
    opened: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The numbers and findings of this part, and the workers that are not done."""
        outcome = self.part.outcome
        return {
            "out": printable(self.out),
            "family": self.plan.family,
            "direction": self.plan.direction,
            "plan_digest": self.plan.digest(),
            "worker": str(self.part.worker),
            "files": [f.name for f in self.part.files],
            "bytes_read": outcome.bytes_read,
            "bytes_written": outcome.bytes_written,
            "findings": [f.to_json() for f in outcome.findings],
            "resumed": list(outcome.resumed),
            "missing": list(self.part.missing),
        }


@dataclass(frozen=True)
class _Begun:
    """A plan, its source as the family knows it, how to carry it out, the notes of opening the source, and
    the settings to which the source says something else."""

    plan: Plan
    checkpoint: Checkpoint
    settings: Settings
    opened: tuple[str, ...]
    insisted: Mapping[str, Any]


@dataclass(frozen=True)
class Shared:
    """A conversion that several processes carry out: what `convert` takes, the same in each of them. `tell`
    is called with what a process waits for."""

    source: Source
    out: Source
    family: str = "auto"
    to: str = "hf"
    options: Options = field(default_factory=Options)
    jobs: int = 2
    overwrite: bool = False
    overwrite_foreign: bool = False
    sha256: bool = False
    strict: bool = False
    checksums: bool = False
    progress: Callable[[Progress], None] | None = None
    tell: Callable[[str], None] = lambda _: None
    on_plan: Callable[[Plan], None] | None = None
    beside: tuple[Source, ...] = ()

    @contextmanager
    def planned(self) -> Iterator[_Begun]:
        """Open the source and plan."""
        from ckpt_tool.convert.parts import Settings
        from ckpt_tool.convert.places import check_output

        check_name(self.family)
        if scheme_of(os.fspath(self.out)) is not None:
            message = "expected a folder that all workers see, found an address"
            fail("usage", message, file=self.out, where="--out")
        replaced = {"overwrite": self.overwrite, "overwrite_foreign": self.overwrite_foreign}
        beside = [p for p in (*self.beside, self.options.tokenizer) if p is not None]
        check_output(Path(self.out), self.source, beside=beside, **replaced)
        with open_for(self.source, self.to, self.options) as checkpoint:
            read = as_read(checkpoint, self.options)
            chosen = choose(as_asked(read, self.options), self.family, self.to)
            made = plan(
                checkpoint,
                family=chosen.name,
                to=self.to,
                options=self.options,
                checksums=self.checksums,
                progress=_reading(checkpoint, self.progress),
            )
            if self.on_plan is not None:
                self.on_plan(made)
            settings = Settings(
                jobs=self.jobs,
                sha256=self.sha256,
                strict=self.strict,
                progress=self.progress or (lambda _: None),
                tell=self.tell,
                address=_address(self.source),
                **replaced,
            )
            insisted = _insisted(checkpoint, chosen, self.options) if self.to == "hf" else {}
            yield _Begun(made, _as_planned(read, chosen, made), settings, checkpoint.opened(), insisted)


def convert_part(asked: Shared, worker: Worker) -> PartMade:
    """Make the share of the output files that is `worker`'s, in a hidden folder beside `asked.out` which all
    workers fill, or go on with what a stopped one of the same number has left. See convert/parts.py."""
    from ckpt_tool.convert.parts import carry_part

    with asked.planned() as begun:
        part = carry_part(begun.plan, begun.checkpoint, Path(asked.out), worker, begun.settings)
    return PartMade(Path(asked.out), begun.plan, part, begun.opened)


def publish_parts(asked: Shared, *, count: int | None = None, check: bool = True) -> Conversion:
    """Check the parts of all workers and publish them as the folder `asked.out`: the very bytes that
    `convert` writes. `count` workers; None takes it from the parts. `check` runs the coverage level on it."""
    from ckpt_tool.convert.parts import publish

    with asked.planned() as begun:
        outcome = publish(begun.plan, begun.checkpoint, Path(asked.out), begun.settings, count=count)
    report = _coverage(Path(asked.out)) if check and asked.to == "hf" else None
    return Conversion(Path(asked.out), begun.plan, outcome, report, begun.opened, begun.insisted)


def verify(out: Source, source: Source | None = None, **asked: Any) -> Report:
    """Prove the converted folder `out` right; see `ckpt_tool.verify.verify`."""
    from ckpt_tool.verify import verify as run

    return run(out, source, **asked)


def verify_part(out: Source, source: Source | None, worker: Worker, **asked: Any) -> Seen:
    """Look at a worker's share of `out`; see `ckpt_tool.verify.verify_part`."""
    from ckpt_tool.verify import verify_part as run

    return run(out, source, worker, **asked)


def gate(
    file: Source,
    *,
    jobs: int | None = None,
    memory: int | None = None,
    progress: Callable[[str], None] | None = None,
    **asked: Any,
) -> Reports:
    """Run the conversions and verifications that a gate file lists; see `ckpt_tool.verify.gate.run_gate`.

    With `jobs` or `memory` each check has a process of its own: up to `jobs` at once (None: as many as there
    are processors), as far as `memory` bytes go (None: what is free now) by what is foretold of each. A check
    of which more is foretold than `memory` is an error in its report, as is one whose process was killed."""
    from ckpt_tool.gate_processes import at_once, one_by_one
    from ckpt_tool.verify.gate import run_gate

    tell = progress or (lambda text: None)
    if jobs is None and memory is None:
        return run_gate(file, one_by_one(tell), **asked)
    most = (os.cpu_count() or 1) if jobs is None else jobs
    return run_gate(file, at_once(most, memory, tell), **asked)


def export_onnx(folder: Source, out: Source, source: Source | None = None, **asked: Any) -> Report:
    """Write a model as an ONNX graph, where onnxruntime computes of it what its source does; see
    `ckpt_tool.verify.onnx_made.export_onnx`."""
    from ckpt_tool.verify.onnx_made import export_onnx as run

    return run(folder, out, source=source, **asked)


def verify_onnx(
    graph: Source, source: Source, *, settings: Mapping[str, Any] | None = None, **asked: Any
) -> Report:
    """Whether an ONNX graph computes what `source` does, an original or a folder in the Hugging Face layout;
    see `ckpt_tool.verify.onnx_parity.verify_file`."""
    from ckpt_tool.verify.onnx_judges import source_at
    from ckpt_tool.verify.onnx_parity import verify_file

    with source_at(source, settings) as found:
        return verify_file(Path(graph), found, **asked)


def settings(pairs: Iterable[str], file: Source | None = None) -> Mapping[str, Any]:
    """`--set KEY=VALUE` pairs over the values of a `--config` JSON file. A value is JSON where it parses as
    such (`1e6`, `null`, `{"factor": 8}`), else text."""
    from ckpt_tool.checkpoint.strict_json import parse_object
    from ckpt_tool.convert.facts_settings import overlaid

    document: dict[str, Any] = {}
    if file is not None:
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            fail_unread(error, file, "--config")
        document = parse_object(data, file=Path(file).name)
    found: dict[str, Any] = {}
    problems = []
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            problems.append(Problem("usage", f"expected KEY=VALUE, found {pair!r}", where="--set"))
            continue
        try:
            found[key.strip()] = json.loads(text)
        except ValueError:
            found[key.strip()] = text
    fail_all(problems)
    return overlaid(document, found) if document else found
