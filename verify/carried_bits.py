"""The states of the optimizer that a conversion carried along: are they what was written, and what the source
has, byte for byte?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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
        return []
    wrong = list(_checksums(subject, carried))
    if not wrong and carried.source is not None:
        wrong = list(_compared(subject, carried))
    if wrong:
        return wrong[:SHOWN]
    kinds = ", ".join(
        sorted({name.split(".")[2 if name.startswith("optimizer.") else 0] for _, name in carried.crcs})
    )
    text = f"{kinds} of the optimizer, {len(carried.crcs)} tensors, are those of the manifest"
    if carried.source is not None:
        text += " and of the source, byte for byte"
    return [Finding("bits", "optimizer", "pass", text)]


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
