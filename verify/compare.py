"""`ckpt-tool compare A B`: what is the same in two checkpoints of one architecture, and what is not, whatever
layout, sharding or dtype each is in. Both are read as their Hugging Face layout (`as_hf`); nothing is
written.

Equal tensors under equal values compute the same, so a pass is only made where something differs; it uses the
reading of the Hugging Face layout on both sides."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from filecmp import cmp
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, FLOATS, TensorInfo
from ckpt_tool.checkpoint.tensor_names import layer_of
from ckpt_tool.checkpoint.weight_sets import is_template
from ckpt_tool.convert import canonical
from ckpt_tool.convert.facts import Reading, class_of, classes, differences, read, shown
from ckpt_tool.convert.facts_classes import PACKED
from ckpt_tool.convert.families import FAMILIES
from ckpt_tool.convert.families import family as family_called
from ckpt_tool.convert.plan import natural
from ckpt_tool.errors import CkptToolError
from ckpt_tool.verify import generation
from ckpt_tool.verify.as_hf import Shown, shown_as_hf, shown_as_stored
from ckpt_tool.verify.claims import Judgement
from ckpt_tool.verify.comparing_codes import as_numbers
from ckpt_tool.verify.comparing_stored import (
    LEFT_OUT,
    NO_FAMILY,
    beside,
    check_matched,
    documents,
    states,
    unread,
    unrecognised,
)
from ckpt_tool.verify.comparing_tensors import Pair, compared
from ckpt_tool.verify.coverage import capped
from ckpt_tool.verify.left_over import explained, several
from ckpt_tool.verify.meanings import acts
from ckpt_tool.verify.missing import not_run
from ckpt_tool.verify.report import Finding, Report, Status, Table, number
from ckpt_tool.verify.strangers import listing, taken_for
from ckpt_tool.verify.strips import strip
from ckpt_tool.verify.tokenizer_ids import Difference

JSON, TOKENIZER = "tokenizer.json", "tokenizer_config.json"
GENERATION = "generation_config.json"
OTHERS = "others"
MODELS = (
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
ALIKE = {"config": "the values of the configuration", "tokenizer": "the tokenizer"}
WORDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(repr=False)
class Compared(Report):
    """`same` is the class of the result: bit-identical, identical after cast, or None where something
    differs."""

    same: str | None = None
    as_stored: bool = False  # no family recognised one of the sides
    asked: bool = False  # for the numbers, by name

    @property
    def judgement(self) -> Judgement:
        bad = [f for f in self.findings if f.status == "fail"]
        if bad:
            head = next((f.message for f in bad if f.check == "all tensors"), None)
            first = f"{bad[0].where}: {bad[0].message}" if bad[0].where else bad[0].message
            return Judgement("fail", head or first)
        open_ = [f for f in self.findings if f.status in ("skipped", "undecided") and f.data.get("open")]
        if self.asked and (lacking := next((f for f in open_ if f.level == "numbers"), None)) is not None:
            return Judgement("undecided", f"--logits was asked for and did not run: {lacking.message}")
        unseen = {f.level for f in open_}
        compared = ["the tensors", *(words for level, words in ALIKE.items() if level not in unseen)]
        words = f"{' and '.join(filter(None, (', '.join(compared[:-1]), compared[-1])))} are the same"
        if self.as_stored:
            words = "the tensors are the same under the names that they are stored by"
        if self.same == "identical after cast":
            codes = next((f.where for f in self.findings if f.check == "quantised"), None)
            words += f" once codes of {codes} are numbers" if codes else " once those of one side are cast"
        if left := sum(f.data["count"] for f in self.findings if f.check == LEFT_OUT):
            words += f"; {left} in the files were left out and not compared"
        for f in open_:
            words += f"; {f.level} not compared: {f.message}"
        said = {f.data["said"]: None for f in self.findings if "said" in f.data}
        words += "".join(f"; {text}" for text in said)
        return Judgement("pass", f"{words}; {NO_FAMILY}" if self.as_stored else words)

    @property
    def exactness(self) -> str | None:
        return "differs" if self.judgement.verdict == "fail" else self.same


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    family: str | None = None,
    settings: Mapping[str, Any] | None = None,
    logits: bool | None = None,
    compute_dtype: str = "float32",
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Compared:
    """Compare two checkpoints. `family` says which that of an original is where it does not tell, `settings`
    are facts that its files lack. `logits`: None makes a pass where something differs, True always, False
    never. Where no family recognises one of them, and nothing was asked that needs one, tensors are compared
    under the names that they are stored by (`comparing_stored`). Raises `CkptToolError` for what cannot be
    opened or planned."""
    tell = progress or (lambda text: None)
    began = time.monotonic()
    report = Compared("ckpt-tool compare", asked=bool(logits))
    with ExitStack() as stack:
        try:
            one, other = _both(stack, lambda path: shown_as_hf(path, settings, family), a, b)
        except CkptToolError as error:
            if family or settings or logits or not unrecognised(error):
                raise
            report.as_stored = True
            one, other = _both(stack, shown_as_stored, a, b)
            check_matched(one, other, error)
        for name, path, side in (("A", a, one), ("B", b, other)):
            size = sum(t.nbytes for t in side.checkpoint)
            count = sum(1 for _ in side.checkpoint)
            report.facts[name] = f"{os.fspath(path)}: {side.layout}, {count} tensors, {size:,} bytes"
        if report.as_stored:
            report.findings += _stored(one, other, report, tell)
        else:
            here, there, codes = as_numbers(*_named_alike(one, other), settings)
            report.findings += _tensors(here, there, report, tell)
            report.findings += [finding("tensors", "quantised", "note", text, side) for side, text in codes]
            if codes and report.same is not None:
                report.same = "identical after cast"
            report.findings += [*_config(one, other, bool(codes)), *_generation(one, other)]
            report.findings += [*_tokenizer(one, other), *_tokenizer_config(one, other), *_beside(one, other)]
            report.findings += states(one, other)
            differs = any(f.status == "fail" and f.level in ("tensors", "config") for f in report.findings)
            cast = report.same == "identical after cast"
            if logits or (logits is None and (differs or cast)):
                report.findings += _numbers(one, other, cast and not differs, compute_dtype, device, tell)
    report.facts["seconds"] = f"{time.monotonic() - began:.1f}"
    return report


def _stored(one: Shown, other: Shown, report: Compared, tell: Callable[[str], None]) -> Iterator[Finding]:
    """What is said of two that are compared as they are stored."""
    yield from _tensors(one, other, report, tell)
    yield from beside(one, other)
    yield from documents(one, other)
    yield from _generation(one, other)
    if any(n in side.documents for n in (JSON, *MODELS) for side in (one, other)):
        yield from _tokenizer(one, other)


def _both(
    stack: ExitStack, shown_as: Callable[[Any], AbstractContextManager[Shown]], a: Any, b: Any
) -> tuple[Shown, Shown]:
    """Both sides, open until `stack` ends; none is where one cannot be opened."""
    with ExitStack() as own:
        one, other = (own.enter_context(shown_as(path)) for path in (a, b))
        stack.enter_context(own.pop_all())
    return one, other


def finding(
    level: str, check: str, status: Status, message: str, where: str | None = None, **more: Any
) -> Finding:
    return Finding(level, check, status, message, where, **more)


# --- tensors --------------------------------------------------------------------------------------------


def _tensors(one: Shown, other: Shown, report: Compared, tell: Callable[[str], None]) -> Iterator[Finding]:
    here = {t.name: t for t in one.checkpoint}
    there = {t.name: t for t in other.checkpoint}
    pairs: list[Pair] = []
    alone: tuple[list[TensorInfo], list[TensorInfo]] = ([], [])
    common: dict[str, Pair] = {}
    for name in sorted(here.keys() | there.keys(), key=natural):
        tell(f"tensors: {name}")
        if name in here and name in there:
            pairs.append(compared(one.checkpoint, other.checkpoint, here[name], there[name]))
            if (rows := _rows_in_common(here[name], there[name])) is not None:
                common[name] = compared(one.checkpoint, other.checkpoint, *rows)
        else:
            alone[name in there].append((here if name in here else there)[name])
    if report.as_stored:  # what was not read cannot be missing
        alone = unread(other, alone[0]), unread(one, alone[1])
    differing = [p for p in pairs if not p.equal]
    cast = [p for p in pairs if p.equal and p.cast is not None]
    report.same = "identical after cast" if cast else "bit-identical"
    if differing:
        report.same = None
        yield _summary(pairs, differing)
    elif not pairs:
        yield finding("tensors", "all tensors", "fail", "expected tensors of the same names, found none")
        return
    elif cast:
        dtypes = ", ".join(sorted({WORDS[p.cast] for p in cast if p.cast}))
        text = f"all {len(pairs)} tensors are equal, {len(cast)} of them once cast to {dtypes}"
        yield finding("tensors", "all tensors", "pass", text, data={"exactness": report.same})
    else:
        text = f"all {len(pairs)} tensors are equal, bit for bit"
        yield finding("tensors", "all tensors", "pass", text, data={"exactness": report.same})
    yield from capped([*_alone(one, "A", alone[0]), *_alone(other, "B", alone[1])])
    differing.sort(key=lambda p: -p.relative)
    yield from capped([_differing(p, common.get(p.a.name)) for p in differing])


def _rows_in_common(a: TensorInfo, b: TensorInfo) -> tuple[TensorInfo, TensorInfo] | None:
    """The first rows of both, as many as both have, where one has more of them, as a vocabulary that was
    enlarged."""
    if not a.shape or not b.shape or a.shape[1:] != b.shape[1:] or a.shape == b.shape:
        return None
    shape = (min(a.shape[0], b.shape[0]), *a.shape[1:])
    return (replace(a, shape=shape), replace(b, shape=shape)) if shape[0] else None


def _named_alike(one: Shown, other: Shown) -> tuple[Shown, Shown]:
    """Both under the names of the model with its head, where one is the model alone."""
    if one.checkpoint.names() and not {*one.checkpoint.names()}.isdisjoint(other.checkpoint.names()):
        return one, other
    kinds = [canonical.kind_of(s.checkpoint) for s in (one, other)]
    if None in kinds or kinds[0] != kinds[1]:
        return one, other
    own = next(f for f in map(family_called, FAMILIES) if kinds[0] in f.classes)
    a, b = (replace(s, checkpoint=canonical.as_rows_say(s.checkpoint, own)) for s in (one, other))
    return a, b


def _alone(side: Shown, label: str, tensors: list[TensorInfo]) -> Iterator[Finding]:
    """Tensors that only one side has: harmless where loading makes them anew, as a head that is tied to the
    embedding or a table of frequencies, and they hold what is made."""
    wrong, equal = explained(side.checkpoint, side.config, tensors)
    harmless = {n for names in equal.values() for n in names}
    for t in tensors:
        if t.name not in harmless:
            text = f"expected it on both sides, found it in {label} alone"
            text += f"; {wrong[t.name]}" if t.name in wrong else ""
            yield finding("tensors", "only one side", "fail", text, t.name)
    for words, names in equal.items():
        text = f"only {label} stores {len(names)} that loading computes anew: {words}"
        yield finding("tensors", "only one side", "note", text, several(names))


def _summary(pairs: list[Pair], differing: list[Pair]) -> Finding:
    """How many differ, and a table of which layers moved and how far."""
    layers: dict[str, list[Pair]] = defaultdict(list)
    for p in pairs:
        layer = layer_of(p.a.name)
        stem = p.a.name.split(".")
        group = f"layer {layer}" if layer is not None else ".".join(stem[:-1][-2:])
        layers[group].append(p)
    rows: list[tuple[str | float | None, ...]] = []
    for group, members in layers.items():
        wrong = [p for p in members if not p.equal]
        moved = math.sqrt(sum(p.moved for p in members if p.comparable))
        size = math.sqrt(sum(p.size for p in members if p.comparable))
        worst = max((p.max_delta for p in members), default=0.0)
        share = math.inf if not math.isfinite(moved) else moved / size if size else math.inf if moved else 0.0
        rows.append((group, f"{len(wrong)} of {len(members)}", share, worst))
    columns = ("part", "differ", "relative change", "max |delta|")
    text = f"{len(differing)} of {len(pairs)} tensors differ"
    untouched = sum(1 for members in layers.values() if all(p.equal for p in members))
    if untouched:
        text += f"; {untouched} of {len(layers)} parts are untouched"
    largest = max((p for p in differing if p.comparable), key=lambda p: p.relative, default=None)
    if largest is not None:
        text += f"; the largest change is that of {largest.a.name}, {number(largest.relative)} of its size"
    data = {"exactness": "differs", "differing": len(differing), "tensors": len(pairs)}
    return finding("tensors", "all tensors", "fail", text, data=data, tables=(Table(columns, tuple(rows)),))


def _differing(p: Pair, common: Pair | None = None) -> Finding:
    """`common` compares the rows that both have, where one has more."""
    if common is not None and common.comparable:
        rows, more = common.a.shape[0], "A" if p.a.shape[0] > p.b.shape[0] else "B"
        added = abs(p.a.shape[0] - p.b.shape[0])
        text = f"{added:,} rows more in {more}, after the {rows:,} that both have, which are "
        text += "equal" if common.equal else (
            f"not equal: {common.count:,} elements differ {common.where()}, max |delta| "
            f"{number(common.max_delta)}"
        )  # fmt: skip
    elif p.a.shape != p.b.shape:
        text = f"expected shape {list(p.a.shape)}, found {list(p.b.shape)}"
    elif not p.comparable:
        text = f"expected {p.a.dtype}, found {p.b.dtype}, which cannot be compared"
    else:
        at = tuple(_place(p.first or 0, p.a.shape))
        x, y = p.values
        text = (
            f"{p.count:,} of {p.a.numel:,} elements differ {p.where()}, the first at {at}: {x!r} in A and "
            f"{y!r} in B; max |delta| {number(p.max_delta)}, relative change {number(p.relative)}"
        ).replace("  ", " ")
        text += f"; compared in {WORDS[p.cast]}" if p.cast else ""
        text += f"; the same rows in another order: {p.order}" if p.order else ""
    data = {"count": p.count, "relative": p.relative, "max_delta": p.max_delta, "order": p.order}
    drawn = {"rows": strip(p.rows.astype(np.float64), worst=False)} if p.count else {}
    return finding("tensors", "tensor", "fail", text, p.a.name, data=data, drawn=drawn)


def _place(element: int, shape: tuple[int, ...]) -> Iterator[int]:
    for k in range(len(shape)):
        inner = math.prod(shape[k + 1 :])
        yield element // inner
        element %= inner


# --- documents ------------------------------------------------------------------------------------------


def _config(one: Shown, other: Shown, codes: bool) -> Iterator[Finding]:
    kind = class_of(one.config)
    if kind is None or class_of(other.config) != kind:
        a, b = (shown(s.config.get("model_type")) for s in (one, other))
        if a != b:
            yield finding("config", "config", "fail", f"expected model_type {a} (A), found {b} (B)")
            return
        text = f"expected a model_type whose values are known here, found {a}"
        yield finding("config", "config", "skipped", text, data={"open": True})
        return
    here, there = read(one.config, kind), read(other.config, kind)
    found = [*_said_by_one(here, there, codes)]
    for key, x, y in differences(here, there):
        if key == "torch_dtype":
            continue  # see `_stamps`
        a, b = ("nothing" if v is None else shown(v.said) for v in (x, y))
        found.append(finding("config", "config", "fail", f"{a} in A, {b} in B", key))
    found += [*_stamps(one, other, here, there), *_acting(one.config, other.config)]
    for key in sorted(here.unknown.keys() | there.unknown.keys()):
        if here.unknown.get(key) != there.unknown.get(key):
            a, b = (shown(s.unknown.get(key, "nothing")) for s in (here, there))
            text = f"{key} has {a} in A and {b} in B, which is not known here"
            found.append(finding("config", "config", "skipped", text, key, data={"open": True}))
    found += _of_training(kind, one.config, other.config)
    yield from found
    if not any(f.status == "fail" for f in found):
        text = f"all {len(here.numbers)} values that change the numbers mean the same"
        yield finding("config", "config", "pass", text)


def _said_by_one(here: Reading, there: Reading, codes: bool) -> Iterator[Finding]:
    """What one file alone says that no value of a reading holds: two things of one value, code, and packing
    where the numbers of `codes` were not compared."""
    for side, own, others in (("A", here, there), ("B", there, here)):
        for c in own.contradictions:
            if c.text not in [o.text for o in others.contradictions]:
                yield finding("config", "config", "fail", f"of {side} alone: {c.text}", c.name)
        for key, reason in own.refused.items():
            if key not in others.refused and not (codes and key in PACKED):
                yield finding("config", "config", "fail", f"{side} alone has {key}, which {reason}", key)


def _stamps(one: Shown, other: Shown, here: Reading, there: Reading) -> Iterator[Finding]:
    """The dtype that a file says where it is none of its tensors', in which transformers 5 loads the model.
    Where one side is the other cast, a file that was not written anew is a note."""
    said, held = [], []
    for side, own in ((one, here), (other, there)):
        value = own.values["torch_dtype"].value
        held.append({DTYPES[t.dtype].torch for t in side.checkpoint if t.dtype in FLOATS})
        said.append(None if value in held[-1] or not held[-1] else value)
    if said[0] == said[1]:
        return
    words = ["that of the tensors" if x is None else shown(x) for x in said]
    text = f"{words[0]} in A, {words[1]} in B"
    if held[0] == held[1]:
        yield finding("config", "config", "fail", text, "torch_dtype")
        return
    label, stamp = next(("AB"[k], x) for k, x in enumerate(said) if x is not None)
    data = {"said": f"config.json of {label} says {shown(stamp)}, which none of its tensors is"}
    yield finding("config", "config", "note", text, "torch_dtype", data=data)


def _of_training(kind: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Finding]:
    """Values that act where the model is trained, and nowhere else."""
    data = {"said": "values for training alone are others, which are noted"}
    for key, usual in classes()[kind].trained.items():
        x, y = (s[key] if s.get(key) is not None else usual for s in (a, b))
        if x != y:
            yield finding("config", "config", "note", f"{shown(x)} in A, {shown(y)} in B", key, data=data)


def _acting(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys that no forward pass reads and that act all the same (`meanings.acts`)."""
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if x != y and (acts(key, x, y) or acts(key, y, x)):
            text = f"{shown(a.get(key, 'nothing'))} in A, {shown(b.get(key, 'nothing'))} in B"
            yield finding("config", "config", "fail", text, key)


def _generation(one: Shown, other: Shown) -> Iterator[Finding]:
    from ckpt_tool.checkpoint.strict_json import parse_object

    inside = (generation.of_config(s.config) for s in (one, other))
    data = {"said": "config.json says other sampling values, which are noted"}
    for key, text in generation.differences(*inside):
        yield finding("config", "generation config", "note", text, f"config.json: {key}", data=data)
    there = [GENERATION in s.documents for s in (one, other)]
    if not all(there):
        if any(there):
            data = {"said": f"{GENERATION} is in {'AB'[there.index(True)]} alone"}
            yield finding("config", "generation config", "note", data["said"], data=data)
        return
    a, b = (parse_object(s.documents[GENERATION](), file=GENERATION) for s in (one, other))
    found = list(generation.differences(a, b))
    data = {"said": f"{GENERATION} says other things, which are noted"}
    for key, text in found:
        yield finding("config", "generation config", "note", text, f"{GENERATION}: {key}", data=data)
    if not found:
        yield finding("config", "generation config", "pass", "generation begins, samples and ends the same")


def _tokenizer(one: Shown, other: Shown) -> Iterator[Finding]:
    from ckpt_tool.verify.tokenizer_ids import Ids, Unreadable
    from ckpt_tool.verify.tokenizer_ids import compare as compared_ids

    if JSON in one.documents and JSON in other.documents:
        a, b = one.documents[JSON](), other.documents[JSON]()
        if a == b:
            yield finding("tokenizer", "tokenizer", "pass", f"{JSON} is the same file")
            return
        try:
            segments = any(s.config.get("type_vocab_size") for s in (one, other))
            result = compared_ids(Ids(a), Ids(b), segments=segments)
        except Unreadable as error:
            yield finding("tokenizer", "tokenizer", "skipped", str(error), JSON, data={"open": True})
            return
        for d in result.differences:
            yield finding("tokenizer", "tokenizer", "fail", d.message, f"{JSON}: {d.where}")
        if not result.differences:
            text = f"written in another way, with the same ids for {result.texts:,} texts"
            yield finding("tokenizer", "tokenizer", "pass", text, JSON)
        return
    common = [n for n in MODELS if n in one.documents and n in other.documents]
    if not common:
        text = "the two have no tokenizer file in common"
        yield finding("tokenizer", "tokenizer", "skipped", text, data={"open": True})
    for name in common:
        if one.documents[name]() == other.documents[name]():
            yield finding("tokenizer", "tokenizer", "pass", f"{name} is the same file")
        else:
            yield finding("tokenizer", "tokenizer", "fail", "expected the same file, found another", name)


def _tokenizer_config(one: Shown, other: Shown) -> Iterator[Finding]:
    """What stands beside the ids: roles, frames, sides, limits and class. Notes, as tools write them of their
    own accord; the headline says that there are any."""
    from ckpt_tool.verify.beside import Beside, Damaged
    from ckpt_tool.verify.tokenizer_config import differences as other_words
    from ckpt_tool.verify.tokenizer_config import roles, templates, wrong_roles

    data = {"said": f"{TOKENIZER} says other things, which are noted"}
    there = [TOKENIZER in s.documents for s in (one, other)]
    if not any(there) or not any(JSON in s.documents for s in (one, other)):
        return
    if not all(there):
        data = {"said": f"{TOKENIZER} is in {'AB'[there.index(True)]} alone"}
        yield finding("tokenizer", "tokenizer config", "note", data["said"], data=data)
        return
    try:
        a, b = (Beside.parse(s.documents[TOKENIZER](), TOKENIZER) for s in (one, other))
    except Damaged as damage:
        yield finding("tokenizer", "tokenizer config", "note", str(damage), TOKENIZER, data=data)
        return
    found = [*wrong_roles(roles(a), roles(b), ""), *other_words(a, b, alike=(), begins=False, ends=False)]
    chats = [
        {k: text for k, (_, text) in templates({TOKENIZER: x}, _jinja(s)).items()}
        for x, s in ((a, one), (b, other))
    ]
    if chats[0] != chats[1]:
        found.append(Difference("chat_template", "expected one chat template, found two"))
    for d in found:
        yield finding(
            "tokenizer", "tokenizer config", "note", d.message, f"{TOKENIZER}: {d.where}", data=data
        )


def _jinja(side: Shown) -> dict[str, str]:
    """The files of chat templates, by name."""
    return {n: read().decode("utf-8", "replace") for n, read in side.documents.items() if is_template(n)}


def _taken(side: Shown) -> set[str]:
    """The files of a folder in the Hugging Face layout that loaders take and that are none of its own."""
    if not side.layout.startswith("Hugging Face"):
        return set()
    known = {*side.documents, *(p.name for f in side.checkpoint.files.values() for p in f.paths)}
    return {n for n in listing(side.checkpoint.path).names if n not in known and taken_for(n)}


def _other(a: Path, b: Path) -> str | None:
    """What two files are in words; None where they have the same bytes. Links to folders are compared by
    where they lead, and one to nothing cannot be."""
    try:
        return None if os.path.samefile(a, b) or cmp(a, b, shallow=False) else OTHERS
    except OSError:
        return "not readable"


def _beside(one: Shown, other: Shown) -> Iterator[Finding]:
    """Files of one folder alone that loaders take with the model (adapters, code, other weights), or that are
    others in the second."""
    a, b = (_taken(side) for side in (one, other))
    for name in sorted(a & b):
        if (how := _other(one.checkpoint.path / name, other.checkpoint.path / name)) is not None:
            data = {"said": f"files that loaders take with the model are {how}, which are noted"}
            text = "another file in B" if how == OTHERS else "cannot be read on both sides"
            yield finding("tensors", "beside", "note", f"{text}: {taken_for(name)}", name, data=data)
    for label, own, others in (("A", a, b), ("B", b, a)):
        for name in sorted(own - others):
            text = f"{label} alone has {name}: {taken_for(name)}"
            data = {"said": f"{label} alone has files that loaders take, which are noted"}
            yield finding("tensors", "beside", "note", text, name, data=data)


# --- numbers --------------------------------------------------------------------------------------------


def _numbers(
    one: Shown, other: Shown, only_cast: bool, dtype: str, device: str, tell: Callable[[str], None]
) -> list[Finding]:
    try:
        from ckpt_tool.verify.comparing_logits import numbers
    except ImportError as error:
        return [not_run("numbers", "lockstep", error)]
    try:
        return list(numbers(one, other, only_cast, dtype, device, tell))
    except CkptToolError as error:
        return [finding("numbers", "lockstep", "skipped", error.problems[0].message, data={"open": True})]
