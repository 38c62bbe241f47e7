"""The tokenizer of an output against that of its source, file by file and as a whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import field
from typing import Any

from ckpt_tool.checkpoint.weight_sets import vocabulary_kind
from ckpt_tool.convert.facts import class_of, classes
from ckpt_tool.convert.tokenizers import original_tokenizer_documents, sentencepiece, tokenizer_documents
from ckpt_tool.errors import CkptToolError
from ckpt_tool.records import dataclass
from ckpt_tool.verify.beside import Beside, Damaged
from ckpt_tool.verify.coverage import capped
from ckpt_tool.verify.report import Finding, Status
from ckpt_tool.verify.subject import Subject
from ckpt_tool.verify.tokenizer_config import (
    FILLED,
    GENERIC,
    LIMIT,
    differences,
    limit,
    listed,
    old_words,
    plain_class,
    roles,
    wrong_flags,
    wrong_roles,
)
from ckpt_tool.verify.tokenizer_ids import Difference, Ids, Unreadable, compare, shown

LEVEL, CHECK = "coverage", "tokenizer"
CLASS = "tokenizer_class"
ENTITIES = "entity_vocab.json"
PIECES = "sentencepiece.bpe.model"  # whose ids fairseq moved
JSON, CONFIG, MAP, ADDED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Files of the Hugging Face layout that any release may write for a tokenizer, whatever it was read from.
TOKENIZER_FILES = frozenset(
    (JSON, CONFIG, MAP, ADDED, "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")
)
# What transformers 5 builds for a class, whatever tokenizer.json says (its own `__init__`).
BUILT: Mapping[str, str] = {
    "Qwen2Tokenizer": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
}


def is_tokenizer_file(name: str) -> bool:
    """Whether a document is a part of a tokenizer, in either layout."""
    short = name.removeprefix("original/")
    return (
        short in TOKENIZER_FILES
        or short in ("tekken.json", PIECES)
        or short.startswith("tokenizer.model")
        or vocabulary_kind(short) is not None
    )


def finding(status: Status, message: str, where: str | None = None, **more: Any) -> Finding:
    return Finding(LEVEL, CHECK, status, message, where, **more)


@dataclass
class _Result:
    """What was compared and how it went, of one tokenizer."""

    wrong: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    texts: int = 0

    def fail(self, where: str, message: str) -> None:
        self.wrong.append(finding("fail", message, where))

    def take(self, where: str, found: Iterator[Difference]) -> None:
        for d in found:
            self.fail(f"{where}: {d.where}", d.message)


def tokenizer(
    subject: Subject,
    expected: Mapping[str, bytes],
    beside: Beside,
    recorded: Mapping[str, str],
    *,
    equal: Collection[str] = (),
) -> list[Finding]:
    """The findings about the tokenizer; `expected` is what the plan writes, `recorded` the manifest's. The
    files called `equal` have been compared, byte for byte."""
    want = {n: data for n, data in expected.items() if is_tokenizer_file(n)}
    held = {n for n in beside.names if is_tokenizer_file(n) and n not in equal}
    if not want:
        return list(_unexpected(subject, beside, held, recorded))
    if not held:
        if recorded.keys() & want.keys():
            return []  # each is named as missing from the manifest's files
        text = "the source has a tokenizer, the output has none"
        return [finding("skipped", text, data={"open": True})]
    result = _Result(compared=[n for n in equal if is_tokenizer_file(n)])
    _compare(subject, want, held, beside, recorded, result)
    if result.wrong and (given := _given(subject, want, beside, recorded)):
        return [given]
    if not result.wrong:
        on = f"; {result.texts:,} texts give the same ids" if result.texts else ""
        names = ", ".join(sorted(result.compared))
        result.notes.append(finding("pass", f"as the source gives it, by bytes or meaning: {names}{on}"))
    return [*capped(result.wrong), *result.notes]


def _unexpected(
    subject: Subject, beside: Beside, held: set[str], recorded: Mapping[str, str]
) -> Iterator[Finding]:
    """The source has no tokenizer; that of the output is judged by itself."""
    if not held:
        return
    wrong = (
        []
        if subject.direction != "to-hf"
        else [finding("fail", t, w) for w, t in consistent(subject, beside)]
    )
    strange = sorted(held - recorded.keys()) if recorded else []
    wrong += [
        finding("fail", "expected no tokenizer file that nobody recorded, found one", n) for n in strange
    ]
    yield from capped(wrong)
    if not wrong:
        origin = (
            "the manifest records it, as given when converting"
            if recorded
            else "nothing says where it is from"
        )
        text = f"the source has no tokenizer to compare with; {origin}"
        yield finding("note" if recorded else "skipped", text, data={} if recorded else {"open": True})


def _given(
    subject: Subject, want: Mapping[str, bytes], beside: Beside, recorded: Mapping[str, str]
) -> Finding | None:
    """The finding where the output's tokenizer is not the source's because another was given when converting:
    the manifest has these very files, and the original among them gives all the others."""
    if not want.keys() & recorded.keys() or subject.direction != "to-hf":
        return None
    try:
        made = _rebuilt(subject, beside)
        same = made and all(beside.read(n) == data for n, data in made.items())
        ours = made and all(_sha256(beside.read(n)) == recorded.get(n) for n in made)
    except (Damaged, CkptToolError):
        return None
    if not same or not ours:
        return None
    text = "another tokenizer than the source's was given when converting; the manifest records it"
    return finding("skipped", text, data={"open": True})


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _rebuilt(subject: Subject, beside: Beside) -> dict[str, bytes]:
    """The tokenizer files that the original kept in the output gives; none where there is none."""
    if subject.family is None:
        return {}
    name = subject.family.name
    files = {n: beside.read(n) for n in beside.names if is_tokenizer_file(n) and n not in (JSON, CONFIG, MAP)}
    originals = original_tokenizer_documents(files, family=name)
    if not originals:
        return {}
    return tokenizer_documents(originals, family=name, config=subject.config).documents


# --- the comparison -------------------------------------------------------------------------------------


def _compare(
    subject: Subject,
    want: Mapping[str, bytes],
    held: set[str],
    beside: Beside,
    recorded: Mapping[str, str],
    result: _Result,
) -> None:
    if held == want.keys() and all(_same_bytes(n, data, beside) for n, data in want.items()):
        result.compared += want  # the usual case, which needs no library
        return
    ids = _ids(subject, want, held, beside, result)
    for name, data in want.items():
        if name in (JSON, CONFIG, MAP, ADDED):
            continue
        if name in held:
            _copy(name, data, beside, result)
    missing = [n for n in want if n not in held and n not in recorded]
    if missing and subject.direction == "to-original":
        for name in missing:
            result.fail(name, "expected this file, found none")
    elif missing:
        _can_load(missing, held, beside, result)
    for name in sorted(held - want.keys()):
        if name in recorded or name not in TOKENIZER_FILES or name in (JSON, CONFIG, MAP, ADDED):
            continue
        _extra(name, ids, beside, result)
    _configs(subject, want, held, beside, ids, result)


def _same_bytes(name: str, data: bytes, beside: Beside) -> bool:
    try:
        return beside.read(name) == data
    except Damaged:
        return False  # told where the file is compared by itself


def _ids(
    subject: Subject, want: Mapping[str, bytes], held: set[str], beside: Beside, result: _Result
) -> Ids | None:
    """Compare tokenizer.json; the source's, read, for what follows."""
    if JSON not in want:
        return None
    try:
        expected = Ids(want[JSON])
    except Unreadable as error:
        result.notes.append(
            finding("skipped", f"the source's cannot be read: {error}", JSON, data={"open": True})
        )
        return None
    if JSON not in held:
        return expected
    result.compared.append(JSON)
    try:
        data = beside.read(JSON)
        if data == want[JSON]:
            return expected
        found = Ids(data)
    except (Damaged, Unreadable) as error:
        result.fail(JSON, str(error))
        return expected
    compared = compare(expected, found, segments=bool(subject.config.get("type_vocab_size")))
    result.texts = compared.texts
    if _is_built(want, expected, found, compared.differences):
        text = (
            "transformers 5 reads the source's files so: its class puts in a split of its own, "
            f"tokenizer.json has another ({compared.differences[0].message})"
        )
        result.notes.append(finding("note", text, JSON))
        return expected
    result.take(JSON, iter(compared.differences))
    if compared.spelled:
        text = f"{', '.join(compared.spelled)}: written in another way, with the same ids"
        result.notes.append(finding("note", f"{text} for {compared.texts:,} texts", JSON))
    if compared.apart:
        result.notes.append(
            finding("note", f"{compared.apart}, which a model without segments is not given", JSON)
        )
    return expected


def _is_built(
    want: Mapping[str, bytes], expected: Ids, found: Ids, differences: tuple[Difference, ...]
) -> bool:
    """Whether all that differs is the split that transformers 5 builds for the source's class."""
    if [d.where for d in differences] not in (["pre_tokenizer"], ["pre_tokenizer, decoder"]):
        return False
    try:
        made_by = plain_class(Beside.parse(want.get(CONFIG, b"{}"), CONFIG).get("tokenizer_class"))
    except Damaged:
        return False
    kinds = {(side.parsed.get("decoder") or {}).get("type") for side in (expected, found)}
    if made_by not in BUILT or len(kinds) > 1:
        return False
    parts = (found.parsed.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    return len(parts) == 2 and parts[0].get("pattern") == {"Regex": BUILT[made_by]}


def _copy(name: str, expected: bytes, beside: Beside, result: _Result) -> None:
    """A file of the original format: the same bytes, or the same entries."""
    result.compared.append(name)
    try:
        data = beside.read(name)
        if data == expected:
            return
        kind = vocabulary_kind(name)
        if kind == "vocab.json":
            same = beside.parse(data, name) == beside.parse(expected, name)
        elif kind is not None:
            same = _lines(data) == _lines(expected)
        else:
            same = False
    except Damaged as damage:
        result.fail(name, str(damage))
        return
    if not same:
        result.fail(name, "expected the source's content, found another")


def _lines(data: bytes) -> list[bytes]:
    """The entries of a list, without the line that tells a version."""
    lines = data.replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n")
    return lines[1:] if lines[0].startswith(b"#version") else lines


def _can_load(missing: list[str], held: set[str], beside: Beside, result: _Result) -> None:
    """What is left without the `missing` files, which no manifest asks for: one that says it all, or not."""
    slow = {"tokenizer.model"} <= held or {"vocab.json", "merges.txt"} <= held or "vocab.txt" in held
    if JSON in missing and PIECES in held:
        text = f"expected this file, found none: of {PIECES} alone transformers 5 makes other ids"
        result.fail(JSON, text)
        missing = [n for n in missing if n != JSON]
    if ENTITIES in missing:
        text = "expected this file, found none: transformers 4 reads the ids of entities from no other"
        result.fail(ENTITIES, text)
        missing = [n for n in missing if n != ENTITIES]
    if JSON in missing and not slow:
        result.fail(JSON, "expected this file, found none, nor another that a tokenizer can be made of")
        return
    if CONFIG in missing and (JSON in held or not slow):
        result.fail(CONFIG, "expected this file, found none: its class, limit and special tokens are lost")
        missing = [n for n in missing if n != CONFIG]
    if JSON in missing and _reads_json_only(beside):
        result.fail(JSON, f"expected this file, found none; the class that {CONFIG} names reads no other")
        return
    if not missing:
        return
    left = JSON if JSON in held else "the vocabulary"
    text = f"not there: {', '.join(sorted(missing))}; {left} is, and says what they say"
    result.notes.append(finding("note", text))


def _reads_json_only(beside: Beside) -> bool:
    try:
        named = beside.json(CONFIG).get("tokenizer_class") if CONFIG in beside.names else ""
    except Damaged:
        return False
    return named is None or plain_class(named) in GENERIC


def _extra(name: str, ids: Ids | None, beside: Beside, result: _Result) -> None:
    """A vocabulary that the source has not, beside one that it has: it must say the same."""
    try:
        same = ids is not None and _says(name, beside.read(name), ids)
    except (Damaged, CkptToolError) as error:
        result.fail(name, str(error))
        return
    if not same:
        result.fail(name, "expected no such file, or the source's vocabulary, found another")


def _says(name: str, data: bytes, ids: Ids) -> bool:
    """Whether a vocabulary in another format has the ids of `ids`."""
    known = ids.vocabulary
    if name == "vocab.json":
        found: Mapping[str, int] = Beside.parse(data, name)
    elif name == "vocab.txt":
        found = {line.decode("utf-8", "replace"): i for i, line in enumerate(_lines(data))}
    elif name == "merges.txt":
        merges = [
            tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in ids.model.get("merges") or []
        ]
        return [tuple(line.decode("utf-8", "replace").split(" ", 1)) for line in _lines(data)] == merges
    else:
        found = {p.text: i for i, p in enumerate(sentencepiece.read(data, name).pieces)}
    return all(known.get(piece) == i for piece, i in found.items())


# --- the documents about it -----------------------------------------------------------------------------


def _configs(
    subject: Subject,
    want: Mapping[str, bytes],
    held: set[str],
    beside: Beside,
    ids: Ids | None,
    result: _Result,
) -> None:
    try:
        expected = {n: Beside.parse(want[n], n) for n in (CONFIG, MAP, ADDED) if n in want}
    except Damaged as damage:
        text = f"the source's cannot be read: {damage}"
        result.notes.append(finding("skipped", text, damage.name, data={"open": True}))
        return
    found: dict[str, dict[str, Any]] = {}
    for name in (CONFIG, MAP, ADDED):
        if name in held:
            try:
                found[name] = beside.json(name)
            except Damaged as damage:
                result.fail(name, str(damage))
    if not expected and not found:
        return
    result.compared += sorted(found)
    wanted = roles(expected.get(CONFIG, {}), expected.get(MAP, {}))
    made_by = plain_class(expected.get(CONFIG, {}).get("tokenizer_class"))
    if not expected.get(CONFIG) and not expected.get(MAP):
        wanted = {}
    for name in (CONFIG, MAP):  # each counts for some reader, so each must be right in what it says
        if name in found:
            said = roles(found[name])
            own = {k: v for k, v in wanted.items() if k in said}
            result.take(name, wrong_roles(own, said, made_by))
    # with a table of added tokens in the config, transformers 4 does not read the map
    alone = "added_tokens_decoder" in found.get(CONFIG, {})
    said = roles(found.get(CONFIG, {}), {} if alone else found.get(MAP, {}))
    _lost({r: t for r, t in wanted.items() if r not in said and t is not None}, subject, found, result)
    known = {} if ids is None else dict(ids.added)
    table = expected.get(CONFIG, {}).get("added_tokens_decoder")
    if isinstance(table, dict):
        known |= {int(k): v for k, v in table.items() if k.isdecimal() and isinstance(v, dict)}
    if CONFIG in found:
        begins, ends = _around(ids)
        alike = () if subject.family is None else subject.family.vocabulary.classes
        whole = _with_class(subject, expected.get(CONFIG, {}), found[CONFIG], ids, result)
        other = differences(expected.get(CONFIG, {}), whole, alike=alike, begins=begins, ends=ends)
        told = {f.where for f in result.wrong}  # of the class that loaders take instead
        other = (d for d in other if f"{CONFIG}: {d.where}" not in told or d.where != CLASS)
        result.take(CONFIG, iter([d for d in other if not _left_open(d, subject, found[CONFIG], result)]))
        if known:
            result.take(CONFIG, wrong_flags(known, found[CONFIG], CONFIG, ids))
    _listed(expected, found, known, result)
    vocabulary = {} if ids is None else ids.vocabulary
    for text, i in found.get(ADDED, {}).items():
        have = vocabulary.get(text)
        if have != i:
            words = f"expected {'no such token' if have is None else have}, found {i}"
            result.fail(f"{ADDED}: {shown(text)}", words)


def _old(expected: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Keys of the tokenizer's config that act in one class of an old release alone."""
    differ = old_words(expected.get(CONFIG, {}), found.get(CONFIG, {}))
    return [finding("note", d.message, f"{CONFIG}: {d.where}") for d in differ]


def _lost(
    roles: Mapping[str, str], subject: Subject, found: Mapping[str, Mapping[str, Any]], result: _Result
) -> None:
    """Roles that no file gives, and that the class does not fill in by itself."""
    filled = FILLED.get(_taken_class(subject, found), {})
    for role, token in roles.items():
        if token not in filled.get(role, ()):
            result.fail(f"{CONFIG}: {role}", f"expected {shown(token)}, found none")


def _taken_class(subject: Subject, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The class that loaders take: the one that the files name, else that of the model's type; "" where it
    is not known here."""
    named = found.get(CONFIG, {}).get(CLASS) or subject.config.get(CLASS)
    kind = class_of(subject.config)
    return plain_class(named or (None if kind is None else classes()[kind].tokenizer))


def _with_class(
    subject: Subject,
    expected: Mapping[str, Any],
    found: Mapping[str, Any],
    ids: Ids | None,
    result: _Result,
) -> Mapping[str, Any]:
    """`found` with the class that loaders take where it names none and the source does: that of config.json,
    else the one of the model's type, as far as it is known here. A token that the class alone brings along
    gets a new id in transformers 4."""
    named = expected.get(CLASS)
    if named is None or found.get(CLASS) is not None:
        return found
    where, kind = f"{CONFIG}: {CLASS}", class_of(subject.config)
    usual = subject.config.get(CLASS) or (None if kind is None else classes()[kind].tokenizer)
    said = f"expected {shown(named)}, found none, and loaders take "
    if not isinstance(usual, str):
        result.notes.append(finding("note", f"{said}the class of the model's type", where))
        return found
    filled = FILLED.get(plain_class(usual), {})
    new = [t for r, (t, *_) in filled.items() if r not in found and ids and t not in ids.vocabulary]
    if new:
        result.fail(where, f"{said}{usual}, of which {new[0]} gets an id of its own in transformers 4")
    elif plain_class(usual) != plain_class(named) and GENERIC.isdisjoint(
        (plain_class(usual), plain_class(named))
    ):
        result.fail(where, f"{said}{usual}, which makes other ids of the same files")
        return found
    else:
        result.notes.append(finding("note", f"{said}{usual}", where))
    return {**found, CLASS: usual}


def _left_open(d: Difference, subject: Subject, found: Mapping[str, Any], result: _Result) -> bool:
    """Whether the difference is the side of padding or the limit, which neither the output's file says nor
    any of the original's: then each release of the library has its own side, and no limit, which a note
    tells."""
    documents = {} if subject.source is None else subject.source.documents
    key = d.where
    said = key in found if key == "padding_side" else limit(found) is not None
    if key not in ("padding_side", LIMIT) or said or CONFIG in documents:
        return False
    text = f"not said, nor by the original, so the library's class decides ({d.message})"
    result.notes.append(finding("note", text, f"{CONFIG}: {d.where}"))
    return True


def _around(ids: Ids | None) -> tuple[bool, bool]:
    if ids is None:
        return False, False
    try:
        before, after = ids.frame()
    except Unreadable:
        return False, False
    return bool(before), bool(after)


def _listed(
    expected: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, Mapping[str, Any]],
    known: Mapping[int, Mapping[str, Any]],
    result: _Result,
) -> None:
    """Further special tokens, each of which is one of the source's, and words of old releases."""
    result.notes += _old(expected, found)
    wanted = listed(*expected.values()) | {str(t.get("content")) for t in known.values() if t.get("special")}
    for name, document in found.items():
        if name == ADDED:
            continue
        for text in sorted(listed(document) - wanted):
            result.fail(f"{name}: additional_special_tokens", f"expected no {shown(text)}, found it")


# --- without a source -----------------------------------------------------------------------------------


def consistent(subject: Subject, beside: Beside) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) where the tokenizer files contradict config.json or each other."""
    if JSON not in beside.names:
        return
    try:
        ids = Ids(beside.read(JSON))
    except (Damaged, Unreadable) as error:
        yield JSON, str(error)
        return
    rows = subject.config.get("vocab_size")
    top = max(ids.vocabulary.values(), default=-1)
    if isinstance(rows, int) and top >= rows:
        yield JSON, f"expected ids below vocab_size {rows}, found {top}"
    for name in sorted(beside.names & {"vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"}):
        try:
            data = beside.read(name)
            if name == "tokenizer.model" and not sentencepiece.looks_like(data):
                continue
            if not _says(name, data, ids):
                yield name, f"expected what {JSON} says, found another vocabulary"
        except (Damaged, CkptToolError) as error:
            yield name, str(error)
    for name in sorted(beside.names & {CONFIG, MAP, ADDED}):
        try:
            document = beside.json(name)
        except Damaged as damage:
            yield name, str(damage)
            continue
        for role, text in roles(document).items():
            if text is not None and text not in ids.vocabulary:
                yield f"{name}: {role}", f"expected a token of {JSON}, found {shown(text)}"
