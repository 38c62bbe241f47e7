"""Does the manifest tell the truth? Everything in it that the source and config.json say by themselves is
compared with them; what only the manifest says is listed."""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_tool.convert.dtypes import that_lose
from ckpt_tool.convert.kept import Manifest
from ckpt_tool.convert.manifest import MANIFEST, headers_digest
from ckpt_tool.convert.plan import ASKED
from ckpt_tool.errors import printable
from ckpt_tool.verify.report import Finding, Status
from ckpt_tool.verify.subject import Subject

ASIDE = "the adapter beside the source's weights was left aside"
ADAPTER = "the adapter beside the weights"  # how opening says it
LEVEL, CHECK = "coverage", "manifest"
SHOWN = 8


def confirm(subject: Subject) -> list[Finding]:
    """The findings about the manifest, where there is one."""
    if subject.manifest is None:
        return []
    wrong = [*_family(subject, subject.manifest), *_settings(subject), *_plan(subject, subject.manifest)]
    notes = [*_notes(subject, subject.manifest)]
    if not wrong and subject.plan is not None:
        text = "family, values, dropped tensors and losses are those that the source gives"
        notes.insert(0, _finding("pass", text))
    return [*wrong, *notes]


def said(subject: Subject, *, confirmed: bool) -> list[Finding]:
    """What the verdict rests on besides the files, for its headline; `confirmed` where `confirm` has told
    what the manifest alone tells."""
    found = [*insisted(subject), *left_aside(subject), *dropped(subject)]
    return found if confirmed else [*trusted(subject), *found]


def trusted(subject: Subject) -> Iterator[Finding]:
    """The facts that the manifest alone tells."""
    if subject.recorded.trusted:
        facts = "; ".join(subject.recorded.trusted[:SHOWN])
        text = f"facts that only the manifest tells, as given with --set when converting: {facts}"
        names = ", ".join(t.split(" ")[0] for t in subject.recorded.trusted[:SHOWN])
        where = f"{MANIFEST}: options"
        yield Finding(LEVEL, CHECK, "note", text, where, data={"trusted": names})


def dropped(subject: Subject) -> Iterator[Finding]:
    """The source's tensors that the user had left out by name, which nothing was compared with."""
    plan, manifest = subject.plan, subject.manifest
    names = list(manifest.options.get("drop") or ()) if manifest is not None else []
    if plan is not None:  # which knows whether they were there
        names = [d.tensor.name for d in plan.dropped if d.reason == ASKED]
    if names:
        count = f"{len(names)} tensor{'s' * (len(names) > 1)} of the source"
        data = {"tensors": names[:100], "without": count}
        text = f"left out of the output as asked for with --drop: {', '.join(names[:SHOWN])}"
        yield Finding(LEVEL, CHECK, "note", text, f"{MANIFEST}: options.drop", data=data)


def insisted(subject: Subject) -> list[Finding]:
    """What the user says now that the source's files say otherwise: the verdict is of these facts."""
    found = subject.recorded.insisted
    if not found:
        return []
    text = f"given with --set, against what the source says: {'; '.join([*found.values()][:SHOWN])}"
    data = {"insisted": ", ".join([*found][:SHOWN])}
    return [Finding(LEVEL, "settings", "note", text, data=data)]


def left_aside(subject: Subject) -> list[Finding]:
    """What lies beside the source's weights and loaders put on top of them: the verdict is of these alone."""
    notes = () if subject.source is None else subject.source.notes
    found = [note for note in notes if note.startswith(ADAPTER)]
    return [Finding(LEVEL, "source", "note", note, data={"aside": ASIDE}) for note in found]


def _finding(status: Status, message: str, where: str | None = None) -> Finding:
    return Finding(LEVEL, CHECK, status, message, f"{MANIFEST}: {where}" if where else MANIFEST)


def _family(subject: Subject, manifest: Manifest) -> Iterator[Finding]:
    if subject.family is not None and manifest.family not in (None, subject.family.name):
        text = f"expected {subject.family.name} as the source and config.json tell, found {manifest.family}"
        yield _finding("fail", text, "family")
    if subject.hf is not None and manifest.direction not in (None, subject.direction):
        text = f"expected {subject.direction} as the files tell, found {manifest.direction}"
        yield _finding("fail", text, "direction")


def _settings(subject: Subject) -> Iterator[Finding]:
    for text in subject.recorded.contradicts:
        yield _finding("fail", text, "options")
    yield from trusted(subject)


def _plan(subject: Subject, manifest: Manifest) -> Iterator[Finding]:
    plan = subject.plan
    if plan is None:
        return
    for name, value in plan.config.items():
        if name in manifest.config and manifest.config[name][0] != value.value:
            found = manifest.config[name][0]
            text = f"expected {value.value!r} ({value.source}), found {found!r}"
            yield _finding("fail", printable(text, 300), f"config.{name}")
    dropped = {d.tensor.name for d in plan.dropped}
    if manifest.sources and dropped != manifest.dropped:
        odd = ", ".join(sorted(dropped ^ manifest.dropped)[:SHOWN])
        text = f"expected the {len(dropped)} tensors that the plan leaves out, found others: {odd}"
        yield _finding("fail", text, "dropped")
    held = that_lose(manifest.lossy)
    if subject.undeclared_cast is None and list(plan.lossy) != held:
        words = "; ".join(plan.lossy) or "nothing lossy"
        text = f"expected {words}, found {'; '.join(held) or 'nothing lossy'}"
        yield _finding("fail", printable(text, 300), "lossy")


def _notes(subject: Subject, manifest: Manifest) -> Iterator[Finding]:
    if subject.source is not None and subject.found is None and manifest.sources:
        recorded = {s.name: s.headers for s in manifest.sources}
        states = subject.carried.source if subject.carried is not None else None
        files = {**(states.files if states is not None else {}), **subject.source.files}
        given = {f.name: headers_digest(f) for f in files.values()}
        if recorded != given:
            odd = sorted(n for n in recorded.keys() | given if recorded.get(n) != given.get(n))
            text = f"the source given is not the one recorded: {', '.join(odd[:SHOWN])} differ"
            yield _finding("note", text, "sources")
