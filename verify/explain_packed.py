"""Which mistake with codes and scales explains tensors that hold other bits than the source gives: of weights
that are carried, what became of their parts; of numbers, how they were made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from ckpt_tool.checkpoint.base import Checkpoint, TensorFile
from ckpt_tool.convert.layout import Part, Step
from ckpt_tool.verify.bits import moved
from ckpt_tool.verify.packed import Packed
from ckpt_tool.verify.packed_mistakes import altered, other_bits, readings
from ckpt_tool.verify.subject import Subject

Changed = Mapping[str, tuple[np.ndarray, np.ndarray]]  # by name: expected and found
Ways = Iterator[tuple[str, Mapping[str, TensorFile]]]


def of_codes(
    subject: Subject, where: Mapping[str, tuple[Step, Part]], changed: Changed
) -> Iterator[tuple[str, list[str]]]:
    """Mistakes in words, each with the tensors of the Hugging Face side that it gives in every element.
    `where` has the step that makes a tensor, and its place in it."""
    packed = subject.packed
    if packed is None or packed.inventory is None or packed.stored is None or subject.source is None:
        return
    made: dict[str, list[str]] = defaultdict(list)
    for name, (expected, found) in changed.items():
        words = _of_one(subject, packed, name, where[name], expected, found)
        if words is not None:
            made[words].append(name)
    yield from made.items()


def _of_one(
    subject: Subject,
    packed: Packed,
    name: str,
    place: tuple[Step, Part],
    expected: np.ndarray,
    found: np.ndarray,
) -> str | None:
    step, part = place
    forward = subject.direction == "to-hf"
    assert packed.inventory is not None and packed.stored is not None and subject.source is not None
    if packed.dtype is not None:
        if not forward or not any(p.name in packed.by_name for p in step.sources):
            return None
        ways = readings(packed.stored, packed.inventory, packed.dtype, packed.recipe)
        return next((words for words, files in ways if _gives(subject, files, place, found)), None)
    if not forward:
        weight = packed.parts.get((part.file, name))
        own = next((t for t in weight.parts if t.name == name), None) if weight is not None else None
        if weight is None or own is None:
            return None
        ways_back = other_bits(expected, weight, own)
        return next((words for words, bits in ways_back if np.array_equal(bits, found)), None)
    for p in step.sources:
        weight = packed.parts.get((p.file, p.name))
        if weight is None:
            continue
        own = packed.stored.files[p.file].tensors[p.name]
        as_written = other_bits(expected, weight, own)  # after rows were permuted
        words = next((w for w, bits in as_written if np.array_equal(bits, found)), None)
        if words is None:
            of_source = altered(packed.stored, weight, own)
            words = next((w for w, files in of_source if _gives(subject, files, place, found)), None)
        if words is not None:
            return words
    return None


def _gives(
    subject: Subject, files: Mapping[str, TensorFile], place: tuple[Step, Part], found: np.ndarray
) -> bool:
    """Whether the step makes of these files what was found; up to the first piece that it does not."""
    assert subject.source is not None
    source: Checkpoint = subject.source.with_files(dict(files))
    step, part = place
    inputs = [source.files[p.file].tensors[p.name] for p in step.sources]
    at, flat = step.targets.index(part), found.reshape(-1)
    for access, values in moved(step, source, inputs, part.dtype):
        if access.part == at:
            n = access.runs.length
            for k, start in enumerate(access.runs.offsets()):
                if not np.array_equal(flat[start : start + n], values[k * n : (k + 1) * n]):
                    return False
    return True
