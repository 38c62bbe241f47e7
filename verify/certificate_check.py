"""`ckpt-tool check-certificate`: does a certificate hold for the files that lie there?

Three depths. Without the source: the signature, the digests of the output's files and tensors, and whether
the certificate agrees with itself (the plan's digest, the roots, the verdict and its findings). With
`spot`: tensors chosen at random are made again from the source through the plan, which bounds the share of
wrong ones. With `full`: the verification is done again, and the certificate must come out as it was."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.convert.layer_axis import layers_apart
from ckpt_tool.convert.manifest import CERTIFICATE
from ckpt_tool.convert.optimizer_state import is_state
from ckpt_tool.convert.plan import OutputFile, Plan
from ckpt_tool.convert.replaceable import is_model_file
from ckpt_tool.errors import fail
from ckpt_tool.verify import certificate as made
from ckpt_tool.verify import leaves as trees
from ckpt_tool.verify.binomial import excluded
from ckpt_tool.verify.certificate_form import must_fit
from ckpt_tool.verify.certificate_lists import SECTIONS, Entries, Filed, Section, entries_of, lines_of
from ckpt_tool.verify.claims import Claim, Judgement, claimed_without_numbers, exactness, judge, words_for
from ckpt_tool.verify.coverage import capped
from ckpt_tool.verify.leaves import Leaf
from ckpt_tool.verify.report import Finding, Report, Status, Table, shown
from ckpt_tool.verify.signing import payload_of, signed_by
from ckpt_tool.verify.strangers import taken_for
from ckpt_tool.verify.subject import Subject, opened

BYTES = 192 << 20  # of a certificate: some 160,000 tensors on both sides
HELD = 2 << 30  # bytes that such a one takes at most once it is parsed


@dataclass
class Checked(Report):
    """A report whose verdict says whether the certificate holds; `depth` is what was compared."""

    depth: list[str] = field(default_factory=list)

    @property
    def judgement(self) -> Judgement:
        bad = [f for f in self.findings if f.status == "fail"]
        if bad:
            where = f"{bad[0].where}: " if bad[0].where else ""
            return Judgement("fail", where + bad[0].message)
        return Judgement("pass", "; ".join(dict.fromkeys(self.depth)))


def check(
    out: str | os.PathLike[str],
    *,
    file: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    spot: int | None = None,
    full: bool = False,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Checked:
    """Check the certificate of the folder `out`, which lies in it or in `file`. `key` is the public key that
    it must be signed with; `spot` tensors (chosen by `seed` where one is given) or all (`full`) are made
    again from `source`, with the facts that the certificate has as given where the source does not tell
    them; where it says otherwise, `settings` must give them again. Raises `CkptToolError` for what cannot be
    read."""
    if (spot is not None or full) != (source is not None):
        words = "--spot K or --full" if source is not None else "--source PATH"
        fail("usage", f"expected {words} too, found none", where="--source")
    if spot is not None and spot < 1:
        fail("usage", f"expected at least 1 tensor, found {spot}", where="--spot")
    tell = progress or (lambda text: None)
    path = Path(out) / CERTIFICATE if file is None else Path(file)
    content = _read(path)
    report = Checked("ckpt-tool check-certificate", {"certificate": os.fspath(path)})
    statement, signature = _opened(content, path.name, key, report)
    report.findings.append(signature)
    predicate = _predicate(statement, path.name)
    entries = entries_of(predicate, path)
    report.findings += _lists(predicate, entries)
    if report.status == "pass":
        report.findings += _itself(predicate, entries)
        report.findings += _output(Path(out), statement, entries, path, tell)
    report.depth.append("the files of the output are those that it names")
    _verdict_facts(report, predicate)
    if source is not None and report.status == "pass":
        report.facts["source"] = os.fspath(source)
        if spot is not None:
            report.findings += _spot(out, source, statement, entries, spot, seed, settings, report, tell)
        if full:
            report.findings += _full(out, source, statement, entries, path, settings, device, report, tell)
    return report


def _finding(level: str, name: str, status: Status, message: str, where: str | None = None) -> Finding:
    return Finding(level, name, status, message, where)


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(BYTES + 1)
    except FileNotFoundError:
        hint = (
            f"`ckpt-tool certificate {path.parent} --source ORIGINAL` writes one; --certificate names another"
        )
        fail("not-found", "expected a certificate, found none", file=path, hint=hint)
    except OSError as error:
        fail("read-failed", f"cannot be read: {error.strerror}", file=path)
    if len(data) > BYTES:
        fail("limits", f"expected at most {BYTES:,} bytes, found more", file=path)
    return data


def _opened(
    content: bytes, name: str, key: str | os.PathLike[str] | None, report: Checked
) -> tuple[dict[str, Any], Finding]:
    """The statement, and the finding about its signature."""
    found = parse_object(content, file=name, max_bytes=BYTES, most=HELD)
    if "payloadType" not in found:
        status: Status = "fail" if key is not None else "note"
        words = "it is not signed"
        return found, _finding("signature", "signature", status, words + _unsigned(key))
    statement = parse_object(payload_of(found, name), file=name, max_bytes=BYTES, most=HELD)
    if key is None:
        words = "it is signed, and no --key was given to check by whom: anybody can sign"
        return statement, _finding("signature", "signature", "note", words)
    if signed_by(found, key, name):
        report.depth.append("it is signed with the key")
        return statement, _finding("signature", "signature", "pass", "signed with the key that was given")
    words = f"expected a signature of the key {os.path.basename(os.fspath(key))}, found none that fits"
    return statement, _finding("signature", "signature", "fail", words)


def _unsigned(key: object) -> str:
    if key is not None:
        return ", but a --key was given that it should be signed with"
    return ": whoever could change the output could write another certificate too"


def _predicate(statement: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The predicate, everything in it of the types that are used here."""
    if statement.get("_type") != made.STATEMENT_TYPE or statement.get("predicateType") != made.PREDICATE_TYPE:
        found = f"{statement.get('_type')!r} with {statement.get('predicateType')!r}"[:200]
        expected = f"an in-toto Statement with {made.PREDICATE_TYPE}"
        fail("bad-config", f"expected {expected}, found {found}", file=name, where="predicateType")
    must_fit(statement, name)
    predicate: dict[str, Any] = statement["predicate"]
    return predicate


# --- without the source ---------------------------------------------------------------------------------


def _lists(predicate: Mapping[str, Any], entries: Entries) -> Iterator[Finding]:
    """Whether the lists beside a certificate are those that it names."""
    if isinstance(entries, Filed):
        name, said = entries.path.name, predicate["lists"]["sha256"]
        if entries.sha256 == said:
            yield _finding("certificate", "lists", "pass", f"SHA-256 of {name} is that of the certificate")
        else:
            words = f"expected the lists of SHA-256 {said}, found {entries.sha256}"
            yield _finding("certificate", "lists", "fail", words, name)


def _itself(predicate: Mapping[str, Any], entries: Entries) -> Iterator[Finding]:
    """Whether the certificate's own parts belong together."""
    plan = predicate["plan"]
    for key in ("family", "direction"):
        yield _equal(key, plan[key], predicate[key], f"the {key} is that of the plan")
    words = "the casts are those of the plan's rows"
    casts = made.casts((step, 1) for step in entries.each("steps"))
    yield _equal("casts", casts, predicate["casts"], words)
    yield _equal("plan", entries.plan_digest(), plan["sha256"], "the plan's digest is that of its rows")
    sides: tuple[Section, ...] = ("source", "target")
    for side in sides:
        words = f"the root stands for the {entries.count(side)} tensors of the {side}"
        yield _equal(f"{side} root", trees.root(entries.each(side)), predicate[side]["root"], words)
    constants = ({"name": n, "dtype": d, "shape": s} for o in plan["outputs"] for n, d, s, _ in
                 o.get("constants", ()))  # fmt: skip
    planned = _marks(chain(entries.each("outputs"), constants))
    held = _marks(entries.each("target"))
    words = f"{len(held)} tensors of the target are those of the plan"
    yield _equal("tensors", sorted(held), sorted(planned), words)
    yield from _verdict(predicate["verification"])


def _marks(tensors: Iterable[Mapping[str, Any]]) -> set[bytes]:
    """What stands for names, dtypes and shapes, in little memory."""
    texts = (repr((t["name"], t["dtype"], t["shape"])) for t in tensors)
    return {hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:20] for text in texts}


def _verdict(said: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether what a verification claims follows from its findings."""
    findings = [_as_finding(f) for f in said["findings"]]
    asked = said["asked"]
    named = words_for(asked.get("levels") or (), asked.get("against"), asked.get("checkpoint_id"))
    judgement = judge(findings, Claim(asked=tuple(dict(named).items())))
    verdict = judgement.verdict
    words = f"the verdict follows from its {len(findings)} findings"
    yield _equal("verdict", verdict, said["verdict"], words)
    words = "the headline is that of its findings"
    yield _equal("headline", shown(judgement.headline), shown(said["headline"]), words)
    words = "the class of exactness is that of its findings"
    yield _equal("exactness", exactness(findings), said.get("exactness"), words)
    if verdict != "pass":
        yield _finding("certificate", "verdict", "fail", "expected findings that prove it, found others")
    rate = made.catch_rate(findings)
    words = "the catch rate follows from the mistakes that were planted"
    yield _equal("planted mistakes", rate, said.get("planted_mistakes"), words)


def _as_finding(f: Mapping[str, Any]) -> Finding:
    tables = tuple(Table(tuple(t["columns"]), tuple(map(tuple, t["rows"]))) for t in f["tables"])
    where = None if f.get("where") is None else str(f["where"])
    return Finding(f["level"], f["check"], f["status"], f["message"], where, data=f["data"], tables=tables)


def _equal(name: str, found: Any, said: Any, words: str) -> Finding:
    if found == said:
        return _finding("certificate", name, "pass", words)
    shown = f"expected {_short(said)}, found {_short(found)}" if name != "tensors" else (
        f"expected those of the plan, found {len(set(found) - set(said))} others and "
        f"{len(set(said) - set(found))} missing"
    )  # fmt: skip
    return _finding("certificate", name, "fail", f"it does not agree with itself: {shown}")


def _short(value: Any) -> str:
    return json.dumps(value, default=repr)[:200]


def _output(
    out: Path, statement: Mapping[str, Any], entries: Entries, path: Path,
    tell: Callable[[str], None],
) -> Iterator[Finding]:  # fmt: skip
    if not out.is_dir():
        fail("not-found", "expected the folder that the certificate is of, found none", file=out)
    tell("files of the output")
    said = {s["name"]: s["digest"].get("sha256") for s in statement["subject"]}
    found = made.file_digests(out, made.left_out(out, path))
    wrong = []
    for name in sorted(said.keys() | found.keys()):
        if name not in found:
            wrong.append(_finding("output", "files", "fail", "expected this file, found none", name))
        elif name not in said:
            taken = taken_for(name)
            serious: Status = "fail" if taken or is_model_file(Path(name).name) else "note"
            words = f"the certificate does not speak of this file{f', {taken}' if taken else ''}"
            wrong.append(_finding("output", "files", serious, words, name))
        elif found[name] != said[name]:
            words = f"expected SHA-256 {said[name]}, found {found[name]}"
            wrong.append(_finding("output", "files", "fail", words, name))
    yield from capped(wrong)
    if not any(f.status == "fail" for f in wrong):
        yield _finding(
            "output", "files", "pass", f"SHA-256 of all {len(said)} files is that of the certificate"
        )
    tell("tensors of the output")
    yield _tensors(out, entries)


def _tensors(out: Path, entries: Entries) -> Finding:
    """The leaves made again from the files, which the files' digests say nothing of."""
    prefer: Any = "original" if entries.plan["direction"] == "to-original" else "hf"
    count = 0
    with open_checkpoint(out, prefer=prefer) as stored:
        checkpoint = layers_apart(stored) if prefer == "original" else stored
        # states of an optimizer that ranks hold among their tensors have no leaves: files' digests are theirs
        model = [t for t in checkpoint if not (prefer == "original" and is_state(t.name))]
        found = (leaf.to_json() for leaf in trees.of_tensors(checkpoint, model))
        for here, said in zip_longest(found, entries.each("target")):
            if here != said:
                either = [t for t in (here, said) if t is not None]
                first = min(either, key=lambda t: (t["file"], t["name"]))
                words = "expected the tensors of the certificate's leaves in their order, found others"
                return _finding("output", "tensors", "fail", words, f"{first['file']}: {first['name']}")
            count += 1
    return _finding("output", "tensors", "pass", f"SHA-256 of all {count} tensors is that of its leaf")


def _verdict_facts(report: Checked, predicate: Mapping[str, Any]) -> None:
    said = predicate["verification"]
    exactness = f" ({said['exactness']})" if said.get("exactness") else ""
    report.facts["it says"] = f"{said.get('verdict')}{exactness}: {said.get('headline')}"
    if given := said["asked"].get("settings"):
        report.facts["given"] = ", ".join(f"{shown(k)} = {_short(v)}" for k, v in given.items())
        report.depth.append(f"facts were given with --set: {', '.join(map(shown, given))}")
    rate = said.get("planted_mistakes")
    if isinstance(rate, dict):
        report.facts["mistakes"] = f"{rate.get('caught')} of {rate.get('planted')} planted were caught"


# --- with the source ------------------------------------------------------------------------------------


def _spot(
    out: str | os.PathLike[str], source: str | os.PathLike[str], statement: Mapping[str, Any],
    entries: Entries, spot: int, seed: int | None, settings: Mapping[str, Any] | None, report: Checked,
    tell: Callable[[str], None],
) -> Iterator[Finding]:  # fmt: skip
    predicate = statement["predicate"]
    said = {s["name"]: s["digest"]["sha256"] for s in statement["subject"]}
    with opened(out, source, {**_given(statement), **(settings or {})}) as subject:
        if subject.plan is None or subject.source is None:
            text = subject.problems[0].message if subject.problems else "no plan"
            yield _finding("source", "plan", "fail", f"the source cannot be planned: {text}")
            return
        if subject.plan.digest() != predicate["plan"]["sha256"]:
            words = f"expected a source that gives the plan {predicate['plan']['sha256'][:16]}…, found"
            yield _finding("source", "plan", "fail", f"{words} another plan {subject.plan.digest()[:16]}…")
            return
        if insisted := _insisted(subject.recorded.insisted, settings):
            yield from insisted
            return
        yield _finding("source", "plan", "pass", "the source's headers give the plan of the certificate")
        origin = _origin(predicate, made.repository(os.fspath(source), subject))
        yield from origin
        yield from _documents(subject.plan, said)
        yield from _made_again(subject, entries, spot, seed, report, tell)
        report.depth += [f.message for f in origin if f.status == "note"]
        if subject.carried is not None:
            words = "the states of its optimizer were not made again: only --full compares them"
            report.depth.append(words)
            yield _finding("source", "optimizer", "note", words)


def _given(statement: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that the verification was given with --set."""
    return dict(statement["predicate"]["verification"]["asked"].get("settings", {}))


def _insisted(names: Iterable[str], settings: Mapping[str, Any] | None) -> list[Finding]:
    """A failure for each fact that the certificate has against what the source says, and nobody gives now."""
    return [
        _finding("source", "settings", "fail", "the source says otherwise: --set says that it is right", name)
        for name in names
        if name not in (settings or {})
    ]


def _made_again(
    subject: Subject, entries: Entries, spot: int, seed: int | None, report: Checked,
    tell: Callable[[str], None],
) -> Iterator[Finding]:  # fmt: skip
    """Tensors that were chosen at random, each held against its leaf."""
    assert subject.plan is not None and subject.source is not None
    total, chosen = _choice(subject.plan.outputs, entries, spot, seed)
    to_hf = subject.direction == "to-hf"
    keys = {("" if to_hf else leaf.file, leaf.name): leaf for leaf in chosen}
    wrong, made_by = [], trees.makers(subject.plan, keys)
    for k, (key, leaf) in enumerate(keys.items(), start=1):
        tell(f"source: tensor {k} of {len(keys)}")
        tensor, steps = subject.target(leaf.file, leaf.name), made_by.get(key)
        sha256 = None if tensor is None or not steps else trees.derived(steps, subject.source, tensor)
        if sha256 != leaf.sha256:
            words = "expected the tensor that the source gives, found another"
            wrong.append(_finding("source", "spot", "fail", words, f"{leaf.file}: {leaf.name}"))
    yield from capped(wrong)
    if not wrong:
        words = _share(excluded(total, len(chosen)), total, len(chosen))
        report.depth.append(words)
        yield _finding("source", "spot", "pass", words)


def _documents(plan: Plan, said: Mapping[str, str]) -> Iterator[Finding]:
    """The files beside the weights are not made again: which of them are those that the plan writes."""
    other = [d.name for d in plan.documents if d.name in said and said[d.name] != d.sha256]
    if other:
        words = "not the file that the plan writes of this source: only --full compares what it means"
        yield _finding("source", "documents", "note", words, ", ".join(sorted(other)))


def _share(most: int, leaves: int, checked: int) -> str:
    text = f"{checked} of {leaves} tensors were made again from the source, bit for bit"
    if checked == leaves:
        return text
    if not most:
        return f"{text}: at 95 % confidence none is wrong"
    share = 100 * most / leaves
    return f"{text}: at 95 % confidence no more than {most} ({share:.2g} %) are wrong"


def _choice(
    outputs: Iterable[OutputFile], entries: Entries, count: int, seed: int | None
) -> tuple[int, list[Leaf]]:
    """How many leaves are of tensors that are made of the source (constants are the plan's own), and some of
    them: chosen after the certificate was made, so that nobody could prepare for it."""
    own = {name for o in outputs for name, *_ in o.constants}

    def made_of_it() -> Iterator[dict[str, Any]]:
        return (t for t in entries.each("target") if t["name"] not in own)

    total = sum(1 for _ in made_of_it())
    chance = random.SystemRandom() if seed is None else random.Random(seed)
    numbers = set(chance.sample(range(total), min(count, total)))
    chosen = (t for k, t in enumerate(made_of_it()) if k in numbers)
    return total, [Leaf(t["file"], t["name"], t["dtype"], tuple(t["shape"]), t["sha256"]) for t in chosen]


def _full(
    out: str | os.PathLike[str], source: str | os.PathLike[str], statement: Mapping[str, Any],
    entries: Entries, path: Path, settings: Mapping[str, Any] | None, device: str, report: Checked,
    tell: Callable[[str], None],
) -> Iterator[Finding]:  # fmt: skip
    again = made.certify(
        out, source, _request(statement), settings=settings, device=device, progress=tell, place=path
    )
    if again.statement is None:
        yield _finding("again", "verification", "fail", f"it does not pass now: {again.report.headline}")
        return
    said = (str(f.data["insisted"]) for f in again.report.findings if "insisted" in f.data)
    if insisted := _insisted([name for text in said for name in text.split(", ")], settings):
        yield from insisted
        return
    found = json.loads(made.as_bytes(again.statement))
    if not _given(statement):  # one that was made before certificates held them
        found["predicate"]["verification"]["asked"].pop("settings", None)
    origin = _origin(statement["predicate"], found["predicate"]["source"]["repository"])
    yield from origin
    if origin:
        found["predicate"]["source"]["repository"] = statement["predicate"]["source"]["repository"]
    notes = [f.message for f in origin if f.status == "note"]
    if _but_for_the_tool(found) == _but_for_the_tool(statement):
        words = "the verification was done again, and the certificate came out byte for byte"
        if origin:
            words += ", but for the repository"
        if found["predicate"]["tool"] != statement["predicate"]["tool"]:
            words += f", but for the tool: {_versions(statement)} then, {_versions(found)} now"
        report.depth += [words, *notes]
        yield _finding("again", "verification", "pass", words)
        return
    before, after = (_without_numbers(s) for s in (statement, found))
    if before == after:
        finding = _other_numbers(statement, found, report)
        if finding.status == "pass":
            report.depth += notes
        yield finding
        return
    where = ", ".join([*_differing(before, after), *_other_entry(entries, again)]) or "its parts"
    yield _finding("again", "verification", "fail", "expected the certificate again, found another", where)


def _other_entry(entries: Entries, again: made.Certified) -> Iterator[str]:
    """Where lists that lie beside a certificate begin to be others, in words."""
    if again.lists is None or not isinstance(entries, Filed):
        return
    sections = [s for s in SECTIONS for _ in range(entries.count(s))]
    before = (line for s in SECTIONS for line in entries.lines(s))
    now = (line + b"\n" for line in lines_of(again.lists.pieces()))
    for k, pair in enumerate(zip_longest(before, now)):
        if pair[0] != pair[1]:
            yield f"entry {k + 1} of the lists ({sections[k] if k < len(sections) else 'one more'})"
            return


def _origin(predicate: Mapping[str, Any], here: Mapping[str, str] | None) -> list[Finding]:
    """Whether this source is from where the certificate says that it is; all else is compared."""
    named = predicate["source"].get("repository")
    if named == here:
        return []
    status: Status = "note"
    if named is None:
        words = f"it names no repository; this source is {_short(here)}"
    elif here is None:
        words = f"not shown, as this source is a copy on a disk: that it is {_short(named)}, which it names"
    else:
        status, words = "fail", f"expected the source {_short(named)}, which it names, found {_short(here)}"
        if isinstance(named, dict) and {"hub", "commit"} <= named.keys():
            words += f": --source hf://{named['hub']}@{named['commit']} is the one"[:300]
    return [_finding("source", "repository", status, words)]


def _but_for_the_tool(statement: Mapping[str, Any]) -> bytes:
    return trees.canonical({**statement, "predicate": {**statement["predicate"], "tool": None}})


def _versions(statement: Mapping[str, Any]) -> str:
    tool = statement["predicate"]["tool"]
    return f"{tool['name']} {tool['version']}"[:100]


def _other_numbers(said: Mapping[str, Any], found: Mapping[str, Any], report: Checked) -> Finding:
    """Everything came out as it was but what was measured."""
    before, after = (
        {"tool": _versions(s), **s["predicate"]["verification"]["environment"]} for s in (said, found)
    )
    if before == after:
        words = "the same libraries on the same kind of processor measured other numbers than it says"
        return _finding("again", "verification", "fail", words)
    report.depth.append("it passes again, with other measured numbers")
    words = (
        "all but the measured numbers came out byte for byte; these were computed with other libraries, "
        f"threads or another processor: {_short(before)} then, {_short(after)} now"
    )
    return _finding("again", "verification", "pass", words)


def _request(statement: Mapping[str, Any]) -> made.Request:
    asked = statement["predicate"]["verification"]["asked"]
    levels = asked.get("levels")
    return made.Request(
        levels=None if levels is None else tuple(levels),
        against=asked.get("against"),
        compute_dtype=asked["compute_dtype"],
        checkpoint_id=asked.get("checkpoint_id"),
        accept=tuple(asked["accept"]),
        settings=_given(statement),
    )


def _without_numbers(statement: Mapping[str, Any]) -> dict[str, Any]:
    """A statement without what was measured: of the headline its claims, of each finding the
    question and the answer are left."""
    predicate = dict(statement["predicate"])
    said = dict(predicate["verification"])
    said.pop("environment", None)
    said["headline"] = claimed_without_numbers(str(said.get("headline")))
    said["findings"] = [
        {k: f.get(k) for k in ("level", "check", "status", "where")}
        for f in said.get("findings", [])
        if isinstance(f, dict)
    ]
    predicate["verification"] = said
    predicate.pop("tool", None)
    return {**statement, "predicate": predicate}


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in before.keys() | after.keys():
        if before.get(key) == after.get(key):
            continue
        if key == "predicate":
            inner = before[key].keys() | after[key].keys()
            yield from sorted(f"{k}" for k in inner if before[key].get(k) != after[key].get(k))
        else:
            yield key
