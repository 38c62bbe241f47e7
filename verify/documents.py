"""The files beside the weights: is each what the source gives, do they mean the same, is any a stranger?

What the plan would write is compared with what lies there: equal bytes are equal; other bytes are read and
compared by meaning, since every release of a library writes the same tokenizer in another way. Without a
source the manifest and the files' agreement with each other are all there is. config.json is compared in
`coverage`."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping
from contextlib import suppress
from typing import Any

from ckpt_tool.checkpoint.dcp_names import METADATA
from ckpt_tool.checkpoint.weight_sets import is_template
from ckpt_tool.convert.manifest import MANIFEST
from ckpt_tool.convert.plan import Plan
from ckpt_tool.errors import CkptToolError
from ckpt_tool.verify import generation
from ckpt_tool.verify.beside import Beside, Damaged
from ckpt_tool.verify.coverage import capped
from ckpt_tool.verify.report import Finding, Status
from ckpt_tool.verify.strangers import Stranger, strangers
from ckpt_tool.verify.subject import Subject
from ckpt_tool.verify.tokenizer_config import templates
from ckpt_tool.verify.tokenizer_files import TOKENIZER_FILES, consistent, is_tokenizer_file, tokenizer
from ckpt_tool.verify.tokenizer_ids import shown

LEVEL = "coverage"
GENERATION = "generation_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
NAMED = 8  # files named in one note


def documents(subject: Subject) -> list[Finding]:
    """The findings about documents, of the level coverage."""
    beside = Beside.of(subject.output)
    if not beside.names:
        return []  # one weight file alone, or an archive
    recorded = {} if subject.manifest is None else dict(subject.manifest.documents)
    found = [*_recorded(beside, recorded, subject)]
    if subject.plan is None:
        found += _alone(subject, beside, recorded)
        return [*found, *_strangers(subject, beside, {}, recorded)]
    large = _large_and_equal(subject.plan, beside)
    expected = _expected(subject, large)
    found += tokenizer(subject, expected, beside, recorded, equal=large)
    found += _generation(subject, expected, beside, recorded)
    found += _templates(subject, expected, beside, recorded)
    found += _others(expected, beside, recorded, large)
    return [*found, *_strangers(subject, beside, {**expected, **dict.fromkeys(large, b"")}, recorded)]


def finding(check: str, status: Status, message: str, where: str | None = None, **more: Any) -> Finding:
    return Finding(LEVEL, check, status, message, where, **more)


def _large_and_equal(plan: Plan, beside: Beside) -> frozenset[str]:
    """The documents that may be too large to hold and lie there byte for byte as the plan writes them."""
    large = [d for d in plan.documents if not isinstance(d.held, bytes) and d.name in beside.names]
    with suppress(Damaged):  # told where the file is compared by itself
        return frozenset(d.name for d in large if beside.sha256(d.name) == d.sha256)
    return frozenset()


def _expected(subject: Subject, known: Container[str]) -> dict[str, bytes]:
    """What the plan would write beside the weights, but for what other checks compare, or is `known`."""
    assert subject.plan is not None
    other = {"config.json"} if subject.direction == "to-hf" else set()
    return {
        d.name: d.content
        for d in subject.plan.documents
        if d.name not in (*other, MANIFEST) and d.name not in known and not _is_list(d.name)
    }


def _is_list(name: str) -> bool:
    """Whether a document says which file has which tensor, which others may deal out otherwise."""
    return name.endswith(".index.json") or name.rpartition("/")[2] == METADATA


def _recorded(beside: Beside, recorded: Mapping[str, str], subject: Subject) -> Iterator[Finding]:
    """Every document of the manifest is there; those that the level bits cannot see have its SHA-256."""
    wrong = []
    for name, sha256 in recorded.items():
        if name not in beside.names:
            text = "expected this file, which the manifest records, found none"
            wrong.append(finding("documents", "fail", text, name))
        elif name not in subject.output.documents:
            try:
                if beside.sha256(name) != sha256:
                    text = "expected the SHA-256 that the manifest has for this file, found another"
                    wrong.append(finding("documents", "fail", text, name))
            except Damaged as damage:
                wrong.append(finding("documents", "fail", str(damage), name))
    yield from capped(wrong)
    if recorded and not wrong:
        text = f"all {len(recorded)} files that the manifest records beside the weights are there"
        yield finding("documents", "pass", text)


def _as_recorded(name: str, beside: Beside, recorded: Mapping[str, str]) -> bool:
    """Whether the file has the bytes that the manifest has the SHA-256 of."""
    try:
        return recorded.get(name) == beside.sha256(name)
    except Damaged:
        return False


def _alone(subject: Subject, beside: Beside, recorded: Mapping[str, str]) -> Iterator[Finding]:
    """Without a source: do the files read, and agree with each other and with config.json?"""
    if subject.direction != "to-hf":
        return
    held = [n for n in beside.names if is_tokenizer_file(n)]
    if not all(_as_recorded(n, beside, recorded) for n in held):  # else the conversion has compared them
        wrong = [finding("tokenizer", "fail", text, where) for where, text in consistent(subject, beside)]
        yield from capped(wrong)
    if GENERATION in beside.names:
        try:
            fields = beside.json(GENERATION)
        except Damaged as damage:
            yield finding("generation config", "fail", str(damage), GENERATION)
            return
        vocabulary = subject.config.get("vocab_size")
        carried = _as_recorded(GENERATION, beside, recorded)  # what its source says is no fault of the output
        status: Status = "note" if carried else "fail"
        for key in generation.IDS:
            for i in fields[key] if isinstance(fields.get(key), list) else [fields.get(key)]:
                if isinstance(i, int) and isinstance(vocabulary, int) and not -1 <= i < vocabulary:
                    text = f"expected an id below vocab_size {vocabulary}, found {i}"
                    text += ", as the conversion wrote it" if carried else ""
                    yield finding("generation config", status, text, f"{GENERATION}: {key}")


def _generation(
    subject: Subject, expected: Mapping[str, bytes], beside: Beside, recorded: Mapping[str, str]
) -> Iterator[Finding]:
    if GENERATION in expected:
        want = beside.parse(expected[GENERATION], GENERATION)
    elif recorded or subject.direction != "to-hf" or GENERATION not in beside.names:
        return
    else:  # such a model needs none; another tool may repeat the ids of config.json
        want = {k: subject.config[k] for k in generation.IDS if k in subject.config}
    if GENERATION not in beside.names:
        if GENERATION in recorded:
            return  # said already
        inside = {k: v for k, v in subject.config.items() if k in generation.DEFAULTS}
        for key, text in generation.differences({k: want[k] for k in want if k in inside}, inside):
            text = f"{text}; without {GENERATION} a loader generates with it"
            yield finding("generation config", "fail", text, f"config.json: {key}")
        derived = bool(want.get("_from_model_config"))
        text = "expected this file, found none; "
        text += "loaders then take the ids of config.json" if derived else "its sampling values are lost"
        yield finding("generation config", "note" if derived else "fail", text, GENERATION)
        return
    try:
        found = beside.json(GENERATION)
    except Damaged as damage:
        yield finding("generation config", "fail", str(damage), GENERATION)
        return
    wrong = [
        finding("generation config", "fail", f"{text}; it changes what is generated", f"{GENERATION}: {key}")
        for key, text in generation.differences(want, found)
    ]
    if found.get("_from_model_config"):
        wrong += _from_config(subject, want)
    yield from capped(wrong)
    if not wrong:
        yield finding("generation config", "pass", "generation begins, samples and ends as the source says")


def _from_config(subject: Subject, want: Mapping[str, Any]) -> Iterator[Finding]:
    """Sampling values of config.json that the source's has not, by which releases 4 generate where the file
    beside it says that it was made of that one (4.37.2 and 4.57.6, generation/utils.py)."""
    assert subject.plan is not None
    planned = {k: v.value for k, v in subject.plan.config.items()}
    held = generation.of_config(subject.config)
    inside = {k: v for k, v in held.items() if planned.get(k, ()) != v}
    for key, text in generation.differences({k: want[k] for k in want if k in inside}, inside):
        text += f"; releases 4 of transformers generate with it, as {GENERATION} says _from_model_config"
        yield finding("generation config", "fail", text, f"config.json: {key}")


def _templates(
    subject: Subject, expected: Mapping[str, bytes], beside: Beside, recorded: Mapping[str, str]
) -> Iterator[Finding]:
    if subject.direction != "to-hf":
        return
    try:
        parsed = {
            n: beside.parse(expected[n], n)
            for n in (*TEMPLATES[1:], "tokenizer_config.json")
            if n in expected
        }
        want = templates(parsed, {n: expected[n].decode() for n in expected if n.endswith(".jinja")})
    except (Damaged, UnicodeDecodeError):
        return
    try:
        held = {n: beside.json(n) for n in (*TEMPLATES[1:], "tokenizer_config.json") if n in beside.names}
        files = {n: beside.text(n) for n in sorted(beside.names) if is_template(n)}
    except Damaged as damage:
        yield finding("chat template", "fail", str(damage), damage.name)
        return
    found = templates(held, files)
    wrong = []
    for name, (_, text) in want.items():
        if name not in found:
            wrong.append(finding("chat template", "fail", "expected the source's, found none", name))
        elif found[name][1].rstrip("\n") != text.rstrip("\n"):
            message = f"expected {shown(text)}, found {shown(found[name][1])}"
            wrong.append(finding("chat template", "fail", message, f"{found[name][0]}: {name}"))
    for name, (_, text) in found.items():  # a second file with the same name in another place
        for other, (place, said) in templates(held, {}).items():
            if other == name and said.rstrip("\n") != text.rstrip("\n"):
                message = f"expected one template, found another than in {found[name][0]}"
                wrong.append(finding("chat template", "fail", message, f"{place}: {name}"))
    more = sorted(found.keys() - want.keys())
    for name in more:
        place = found[name][0]
        native = subject.source is not None and "tokenizer_config.json" in subject.source.documents
        if _as_recorded(place, beside, recorded):
            continue  # given when converting
        if native or recorded:
            message = "expected none, as the source has none, found a chat template"
            wrong.append(finding("chat template", "fail", message, f"{place}: {name}"))
        else:
            message = "the source has none to compare this chat template with"
            yield finding("chat template", "skipped", message, f"{place}: {name}", data={"open": True})
    yield from capped(wrong)
    if want and not wrong:
        yield finding("chat template", "pass", f"{len(want)} chat template(s) as in the source")


def _others(
    expected: Mapping[str, bytes], beside: Beside, recorded: Mapping[str, str], equal: Collection[str]
) -> Iterator[Finding]:
    """Documents that nothing else compares: of an original that was written back, params.json and so on.
    Those called `equal` have been compared."""
    compared = {n for n in expected if n in TEMPLATES or is_template(n)}  # on the way to Hugging Face
    rest = [n for n in expected if n not in (GENERATION, *compared) and not is_tokenizer_file(n)]
    wrong = []
    for name in rest:
        if name not in beside.names:
            if name not in recorded:
                wrong.append(finding("documents", "fail", "expected this file, found none", name))
            continue
        try:
            if beside.read(name) != expected[name]:
                wrong += _by_value(name, expected[name], beside)
        except Damaged as damage:
            wrong.append(finding("documents", "fail", str(damage), name))
    yield from capped(wrong)
    rest += sorted(n for n in equal if not is_tokenizer_file(n))
    if rest and not wrong:
        yield finding("documents", "pass", f"{', '.join(rest)}: as the plan writes them")


def _by_value(name: str, expected: bytes, beside: Beside) -> Iterator[Finding]:
    if not name.endswith(".json"):
        yield finding("documents", "fail", "expected the plan's bytes, found others", name)
        return
    a, b = beside.parse(expected, name), beside.json(name)
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if x != y or isinstance(x, bool) != isinstance(y, bool):
            text = f"expected {shown(x)}, found {shown(y)}"
            yield finding("documents", "fail", text, f"{name}: {key}")


# --- strangers ------------------------------------------------------------------------------------------


def _strangers(
    subject: Subject, beside: Beside, expected: Mapping[str, bytes], recorded: Mapping[str, str]
) -> Iterator[Finding]:
    known = _known(subject, beside, expected, recorded)
    unknown = [s for s in strangers(sorted(beside.names), known) if not _is_sources(subject, s.name)]
    loaded = [s for s in unknown if s.loaded is not None]
    yield from capped(
        [finding("strangers", "fail", f"expected no such file, found {s.loaded}", s.name) for s in loaded]
    )
    rest = [s for s in unknown if s.loaded is None]
    if rest:
        yield finding("strangers", "note", f"beside the model, and read by no loader: {_names(rest)}")
    if not beside.complete:
        text = "the folder has more files than are looked at, or folders that cannot be listed"
        yield finding("strangers", "skipped", text, data={"open": True})
    elif not loaded:
        text = f"none of the {len(beside.names)} files of the folder is one that a loader takes unasked"
        yield finding("strangers", "pass", text)


def _known(
    subject: Subject, beside: Beside, expected: Mapping[str, bytes], recorded: Mapping[str, str]
) -> set[str]:
    """The files that are planned, recorded, or compared by another check whoever wrote them."""
    carried = subject.carried.output.files if subject.carried is not None else ()
    known = {*subject.output.files, *carried, *expected, *recorded, MANIFEST, "config.json"}
    root = subject.output.path
    paths = (p for f in subject.output.files.values() for p in f.paths)
    known |= {p.relative_to(root).as_posix() for p in paths if p.is_relative_to(root)}
    if len(subject.output.files) > 1:
        known |= {n for n in subject.output.documents if n.endswith(".index.json")}
    if subject.direction != "to-hf":
        return known
    if expected or not recorded:
        known |= {n for n in beside.names if is_template(n) or n in TEMPLATES}
    if recorded:
        return known
    if subject.plan is None:  # nothing to compare with: the original's own file is one of the model's
        known |= {n for n in beside.names if is_tokenizer_file(n)}
    return known | {GENERATION, *TOKENIZER_FILES}


def _names(found: list[Stranger]) -> str:
    names = ", ".join(s.name for s in found[:NAMED])
    return names + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")


def _is_sources(subject: Subject, name: str) -> bool:
    """Whether the file is one of the source's own, where both lie in one folder, or a copy of one of its
    documents."""
    if subject.source is None:
        return False
    path = subject.output.path / name
    others = [f.path for f in subject.source.files.values()]
    if path.exists() and any(other.exists() and path.samefile(other) for other in others):
        return True
    document = subject.source.documents.get(name)
    if document is None or name not in Beside.of(subject.output).names:
        return False
    try:
        return document.read() == Beside.of(subject.output).read(name)
    except (CkptToolError, Damaged):
        return False
