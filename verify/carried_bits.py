"""The states of the optimizer that a conversion carried along: are they what was written, and what the source
has, byte for byte, and do ranks say of them what its document says?"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.checkpoint.strict_json import MAX_BYTES, parse_object
from ckpt_tool.checkpoint.torch_zip_writer import Held
from ckpt_tool.convert.optimizer_buffers import TRUSTED
from ckpt_tool.convert.optimizer_document import DOCUMENT, FOLDER
from ckpt_tool.convert.optimizer_ranks import LISTS, MASTER, SCHEDULERS
from ckpt_tool.convert.optimizer_state import STATES, attached, is_state
from ckpt_tool.errors import CkptToolError
from ckpt_tool.verify.bits import compare
from ckpt_tool.verify.carried import Carried
from ckpt_tool.verify.coverage import scan
from ckpt_tool.verify.report import Finding
from ckpt_tool.verify.subject import Subject

SHOWN = 5


def carried_bits(subject: Subject) -> list[Finding]:
    """Whether they are what was written, and what the source has."""
    carried = subject.carried
    if carried is None:
        return [*_unrecorded(subject)]
    wrong = list(_checksums(subject, carried))
    if not wrong and carried.source is not None:
        wrong = list(_compared(subject, carried))
    if wrong:
        return wrong[:SHOWN]
    text = f"{_kinds(carried)} of the optimizer, {len(carried.crcs)} tensors, are those of the manifest"
    if carried.source is not None:
        text += " and of the source, byte for byte"
    notes = carried.plan.notes if carried.plan is not None else ()
    text = "; ".join([text, *(n for n in notes if n.startswith(TRUSTED) or DOCUMENT in n)])
    return [Finding("bits", "optimizer", "pass", text)]


def _unrecorded(subject: Subject) -> Iterator[Finding]:
    """States beside a model of which no manifest says that they were carried: nobody has compared them."""
    if subject.direction != "to-hf":
        return
    try:
        found = {t.name.partition(".")[0] for t in _states(subject) if is_state(t.name)}
    except CkptToolError as error:
        text = f"what lies in {FOLDER}/ cannot be read as states: {error.problems[0].message}"
        yield Finding("bits", "optimizer", "skipped", text, data={"open": True})
        return
    if kinds := ", ".join(s for s in STATES if s in found):
        text = f"no manifest records the {kinds} that lie in {FOLDER}/, and they were compared with nothing"
        yield Finding("bits", "optimizer", "skipped", text, data={"open": True})


def _states(subject: Subject) -> list[TensorInfo]:
    """The tensors that lie in the output's folder of states. Raises what opening a file raises."""
    whole = attached(subject.output)
    own = [f for n, f in whole.files.items() if n not in subject.output.files]
    found = [t for f in own for t in f.tensors.values()]
    for file in own:
        file.close()
    return found


def _kinds(carried: Carried) -> str:
    """The states that there are, where ranks give them numbers those that their plan carries."""
    plan = carried.plan
    targets = (p.name for s in plan.steps for p in s.targets) if plan is not None else ()
    words = {w for n in (*(name for _, name in carried.crcs), *targets) for w in n.split(".")}
    if words & set(LISTS):
        words.add(MASTER)
    return ", ".join(s for s in STATES if s in words) or "states"


def _fail(text: str, where: str | None = None) -> Finding:
    return Finding("bits", "optimizer", "fail", text, where, data={"exactness": "differs"})


def _checksums(subject: Subject, carried: Carried) -> Iterator[Finding]:
    left = {(subject.named(file), name): crc for (file, name), crc in carried.crcs.items()}
    for s in scan(carried.output):
        want = left.pop((subject.named(s.tensor.file), s.tensor.name), None)
        if want != s.crc32:
            told = "none" if want is None else f"{want:08x}"
            yield _fail(f"expected the checksum of the manifest ({told}), found {s.crc32:08x}", s.tensor.name)
    for _, name in left:
        yield _fail("expected this state of the optimizer, found none", name)


def _compared(subject: Subject, carried: Carried) -> Iterator[Finding]:
    if carried.plan is None:
        yield _fail(f"the states of the source cannot be planned: {carried.problem}")
        return
    forth = subject.direction == "to-hf"
    hf = carried.output if forth else carried.source
    own = replace(
        subject, output=carried.output, source=carried.source, hf=hf, plan=carried.plan, carried=None
    )
    result = compare(own, carried.plan.steps)
    for d in result.differences:
        text = f"{d.against.name} differs from it in {d.count:,} of {d.tensor.numel:,} elements"
        yield _fail(text, f"{d.tensor.file}: {d.tensor.name}")
    for name in result.missing:
        yield _fail("expected a state of the planned shape and dtype, found none", name)
    yield from _document(subject, carried) if forth else _beside(carried)


def _document(subject: Subject, carried: Carried) -> Iterator[Finding]:
    """Whether the document has the steps, groups, schedule and numbers that the source gives."""
    assert carried.plan is not None
    planned = next(d for d in carried.plan.documents if d.name == DOCUMENT)
    place = Path(subject.output.path) / DOCUMENT
    try:
        if not place.is_file():  # opening a FIFO would wait for who writes into it
            raise FileNotFoundError
        with place.open("rb") as file:
            found = parse_object(file.read(MAX_BYTES + 1), file=DOCUMENT)
    except OSError:
        yield _fail("expected this file, found none that can be read", DOCUMENT)
        return
    except CkptToolError as error:
        yield _fail(error.problems[0].message, DOCUMENT)
        return
    odd = _unlike(parse_object(planned.content, file=DOCUMENT), found, DOCUMENT)
    if odd is not None:
        yield _fail("expected what the source says of its optimizer, found another", odd)


def _beside(carried: Carried) -> Iterator[Finding]:
    """What ranks say beside the tensors: groups, numbers, steps and the schedule."""
    assert carried.plan is not None
    for f in (f for f in carried.plan.outputs if "optimizer" in f.beside):
        file = carried.output.files[f.name]
        for key in ("optimizer", *SCHEDULERS):
            if (where := _unlike(f.beside.get(key), file.metadata.get(key), key)) is not None:
                yield _fail(
                    "expected what the source says of its optimizer, found another", f"{f.name}: {where}"
                )
        for name, _, _, content in (c for c in f.constants if is_state(c[0])):
            if carried.crcs.get((f.name, name)) != zlib.crc32(content):
                yield _fail("expected the steps that the source has made, found others", f"{f.name}: {name}")


def _unlike(planned: object, found: object, where: str) -> str | None:
    """Where a value is another than the planned one, tensors aside, which a reader has elsewhere."""
    if isinstance(planned, Mapping):
        own = found if isinstance(found, Mapping) else {}
        there = {str(k): x for k, x in own.items()}
        wanted = {str(k): x for k, x in planned.items()}
        for key in sorted(wanted.keys() | there):
            if (odd := _unlike(wanted.get(key), there.get(key), f"{where}.{key}")) is not None:
                return odd
        return None
    if isinstance(planned, list | tuple):
        listed = found if isinstance(found, list | tuple) else ()
        if isinstance(found, Mapping):  # a reader parts a list with tensors in it by places
            listed = [found.get(str(k)) for k in range(len(found))]
        for k, (one, other) in enumerate(zip_longest(planned, listed)):
            if (odd := _unlike(one, other, f"{where}.{k}")) is not None:
                return odd
        return None
    same = isinstance(planned, Held) or (type(planned) is type(found) and planned == found)
    return None if same else where
