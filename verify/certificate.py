"""`ckpt-tool certificate`: what a verification showed, in a form that can be kept, signed and checked again.

An in-toto Statement (in-toto/attestation, spec/v1/statement.md) whose subjects are the files of the output
and whose predicate (`PREDICATE_TYPE`, docs/certificate.md) holds the digests of the source's files, the whole
plan, a leaf for each tensor on both sides with their Merkle roots, how values were rounded, and the findings
with their numbers. It has no times and no paths: equal inputs give equal bytes, as far as the machine gives
equal numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_tool import __version__
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.hub import parts
from ckpt_tool.checkpoint.remote_path import RemotePath, scheme_of, without_secrets
from ckpt_tool.checkpoint.spool import Spool
from ckpt_tool.convert.casting import rounds
from ckpt_tool.convert.manifest import CERTIFICATE, CERTIFICATE_LISTS
from ckpt_tool.convert.plan import Plan, output_json, step_json
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import fail
from ckpt_tool.verify import verify
from ckpt_tool.verify.binomial import CONFIDENCE, interval
from ckpt_tool.verify.certificate_lists import Lists, beside
from ckpt_tool.verify.leaves import of_tensors
from ckpt_tool.verify.provenance import versions
from ckpt_tool.verify.report import Finding, Report
from ckpt_tool.verify.subject import Subject

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:ckpt-tool:certificate:v1"
PIECE = 1 << 20
ENTRIES = 100_000
ROUNDING = {
    "widen": "every value kept",
    "round": "to the nearest value, ties to the even one; too large ones become infinite",
}


@dataclass(frozen=True)
class Request:
    """What a verification was asked for, without which it cannot be done again."""

    levels: tuple[str, ...] | None = None
    against: str | None = None
    compute_dtype: str = "float32"
    checkpoint_id: str | None = None
    accept: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # facts that were given with --set

    def to_json(self) -> dict[str, Any]:
        return {
            "levels": None if self.levels is None else list(self.levels),
            "against": self.against,
            "compute_dtype": self.compute_dtype,
            "checkpoint_id": self.checkpoint_id,
            "accept": list(self.accept),
            **({"settings": _plain(dict(self.settings))} if self.settings else {}),
        }


@dataclass(frozen=True)
class Certified:
    """A verification, and its certificate where it passed."""

    report: Report
    statement: dict[str, Any] | None
    lists: Spool | None = None  # the file that belongs beside it, see `certificate_lists`


def certify(
    out: str | os.PathLike[str],
    source: str | os.PathLike[str],
    request: Request | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
    place: str | os.PathLike[str] | None = None,
) -> Certified:
    """Verify `out` against `source`, and state what was shown. Only a verification that passes has a
    certificate, in which `settings` stand beside those of the request. `place` is the file that is to hold
    it, which is no part of the output even if it lies there. Raises as `verify` does."""
    request = request or Request()
    request = replace(request, settings={**request.settings, **(settings or {})})
    tell = progress or (lambda text: None)
    _folder(out)
    made: list[Certified] = []

    def state(subject: Subject, report: Report) -> None:
        if report.status == "pass":
            tell("certificate: SHA-256 of the output's files")
            subjects = file_digests(subject.output.path, left_out(out, place))
            stated = statement(subject, report, request, os.fspath(source), subjects, tell)
            made.append(Certified(report, *stated))

    report = verify(
        out,
        source,
        levels=request.levels,
        against=request.against,
        compute_dtype=request.compute_dtype,
        checkpoint_id=request.checkpoint_id,
        accept=request.accept,
        settings=request.settings,
        device=device,
        progress=progress,
        then=state,
    )
    return made[0] if made else Certified(report, None)


def as_bytes(made: Mapping[str, Any]) -> bytes:
    return (json.dumps(made, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def statement(
    subject: Subject, report: Report, request: Request, address: str, subjects: Mapping[str, str],
    tell: Callable[[str], None],
) -> tuple[dict[str, Any], Spool | None]:  # fmt: skip
    """The certificate of a `report` on `subject`, both sides of which are read once more, and the file of its
    lists where they are long; `subjects` are the digests of the output's files."""
    plan, source = subject.plan, subject.source
    if plan is None or source is None:
        raise ValueError("a report that passes against a source has a plan")
    lists = Lists()
    tell("certificate: SHA-256 of the source")
    root = lists.leaves("source", of_tensors(source, source))
    sources = source_digests(subject)
    tell("certificate: SHA-256 of the output's tensors")
    target = {"root": lists.leaves("target", of_tensors(subject.output, subject.output))}
    lists.plan(plan)
    outputs = [output_json(f) for f in plan.outputs]
    predicate = {
        "tool": {"name": "ckpt-tool", "version": __version__},
        "family": plan.family,
        "direction": plan.direction,
        "source": {
            "repository": repository(address, subject),
            "files": [{"name": n, "sha256": s} for n, s in sorted(sources.items())],
            "root": root,
        },
        "plan": {"sha256": plan.digest(), **_plain(plan.frame_json()), "outputs": _plain(outputs)},
        "casts": casts(_alike(plan)),
        "target": target,
        "verification": verification(report, request),
    }
    apart = lists.into(predicate)
    made = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": sha}} for name, sha in sorted(subjects.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    return made, lists.spool if apart else None


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def _alike(plan: Plan) -> Iterator[tuple[dict[str, Any], int]]:
    """The steps of a plan without names, each with how many there are."""
    steps = plan.steps if isinstance(plan.steps, Steps) else Steps(plan.steps)
    for kind, count in Counter(steps.kinds).items():
        yield step_json(steps.templates[kind]), count


def _folder(out: str | os.PathLike[str]) -> None:
    if not Path(out).is_dir():
        what = "a file" if Path(out).exists() else "nothing of that name"
        fail("bad-input", f"expected the folder of a converted model, found {what}", file=os.fspath(out))


def left_out(folder: str | os.PathLike[str], place: str | os.PathLike[str] | None) -> list[str]:
    """The names below `folder` that are certificates with their lists: the usual one, and `place` where it
    lies there."""
    root = Path(os.path.abspath(folder))
    own = None if place is None else Path(os.path.abspath(place))
    names = [CERTIFICATE, CERTIFICATE_LISTS]
    if own is not None and own.is_relative_to(root):
        names += [path.relative_to(root).as_posix() for path in (own, beside(own))]
    return names


def file_digests(folder: Path, leave_out: Iterable[str]) -> dict[str, str]:
    """SHA-256 of every file below `folder` by its path there, but for those to leave out. Raises for a link
    to a folder (wrong-format): what lies in it is no part of this one, and loaders follow it."""
    away, found = set(leave_out), {}
    for within, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in (".git", ".cache"))
        link = next((f for f in folders if os.path.islink(os.path.join(within, f))), None)
        if link is not None:
            shown = (Path(within) / link).relative_to(folder).as_posix()
            fail("wrong-format", "expected folders and files, found a link to a folder", file=shown)
        for name in sorted(names):
            path = Path(within) / name
            called = path.relative_to(folder).as_posix()
            if called not in away:
                found[_in_unicode(called)] = sha256_of(path, called)
        if len(found) > ENTRIES:
            fail("limits", f"expected at most {ENTRIES:,} files, found more", file=folder)
    return found


def _in_unicode(name: str) -> str:
    """`name`, which JSON must be able to hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        fail("wrong-format", "expected a name in UTF-8, found other bytes", file=ascii(name)[1:-1])
    return name


def sha256_of(path: Path, shown: str) -> str:
    if isinstance(path, RemotePath):
        return _sha256_of_served(path, shown)
    if not path.is_file():  # a broken link, a pipe
        fail("wrong-format", "expected a regular file, found something else", file=shown)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        fail("read-failed", f"cannot be read: {error.strerror}", file=shown)


def _sha256_of_served(path: RemotePath, shown: str) -> str:
    data, made = ByteRange(path, shown), hashlib.sha256()
    room = memoryview(bytearray(min(PIECE, data.size)))
    try:
        for start in range(0, data.size, PIECE):
            piece = room[: min(PIECE, data.size - start)]
            data.read_into(start, piece)
            made.update(piece)
    finally:
        data.close()
    return made.hexdigest()


def source_digests(subject: Subject) -> dict[str, str]:
    """SHA-256 of the source's files that hold weights and of the documents that were found beside them."""
    assert subject.source is not None
    source = subject.source
    base = source.path if source.path.is_dir() else source.path.parent
    paths = [p for f in source.files.values() for p in f.paths]
    paths += [d.path for d in source.documents.values()]
    found = {}
    for path in dict.fromkeys(paths):
        name = path.relative_to(base).as_posix() if path.is_relative_to(base) else path.name
        found[name] = sha256_of(path, name)
    return found


def repository(address: str, subject: Subject) -> dict[str, str] | None:
    """The repository of the Hub and the commit that the source was read from, or its address elsewhere; None
    for what lies on this machine."""
    scheme = scheme_of(address)
    if scheme is None:
        return None
    if scheme != "hf":
        return {"address": without_secrets(address)}
    notes = () if subject.source is None else subject.source.notes
    commit = next((m[1] for n in notes if (m := re.search(r"commit ([0-9a-f]{40})\b", n))), None)
    return {"hub": parts(address)[0], **({"commit": commit} if commit else {})}


def casts(steps: Iterable[tuple[Mapping[str, Any], int]]) -> list[dict[str, Any]]:
    """How values of another dtype were made by the `steps` of a plan's JSON, each with how often it is there:
    pairs of dtypes, each with its rounding and how many tensors."""
    pairs: Counter[tuple[str, str, int]] = Counter()
    for step, times in steps:
        if step.get("compare"):
            continue
        mean = step.get("mean", 0)
        for target in step["targets"]:
            for dtype in {p["dtype"] for p in step["sources"]}:
                if dtype != target["dtype"] or mean:
                    pairs[dtype, target["dtype"], mean] += times
    return [
        {
            "from": a,
            "to": b,
            "rounding": ROUNDING["round" if rounds(a, b) or mean else "widen"],
            **({"mean_over": mean} if mean else {}),
            "tensors": n,
        }
        for (a, b, mean), n in sorted(pairs.items())
    ]


def verification(report: Report, request: Request) -> dict[str, Any]:
    """The findings with what was measured, and the catch rate of the planted mistakes with its interval."""
    kept = {k: report.facts[k] for k in ("computed",) if k in report.facts}
    if kept:
        kept["processor"] = _processor()
    return {
        "asked": request.to_json(),
        "verdict": report.status,
        "exactness": report.exactness,
        "headline": report.headline,
        "environment": {**kept, "libraries": dict(versions())},
        "planted_mistakes": catch_rate(report.findings),
        "findings": [f.to_json() for f in report.findings],
    }


def _processor() -> str:
    """As far as sums of floating numbers may depend on it."""
    import torch

    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def catch_rate(findings: Iterable[Finding]) -> dict[str, Any] | None:
    """How many of the mistakes that were planted, of numbers and of training, were caught, with the interval
    of the rate."""
    shown = [word for f in findings if f.tables for word in _caught(f)]
    if not shown:
        return None
    caught = sum(1 for word in shown if word == "yes")
    low, high = interval(caught, len(shown))
    return {
        "planted": len(shown),
        "caught": caught,
        "confidence": CONFIDENCE,
        "interval": [round(low, 6), round(high, 6)],
    }


def _caught(f: Finding) -> list[Any]:
    """The words for each planted mistake: whether it was caught."""
    if f.check == "negative control":
        return [row[-1] for row in f.tables[0].rows if row]
    if (f.level, f.check) == ("training", "self-test"):
        return [row[1] for row in f.tables[0].rows if len(row) > 1]
    return []
