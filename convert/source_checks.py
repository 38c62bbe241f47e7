"""What the source files must agree on, from the checksums that were taken while copying: those that the files
carry, and shares that no two ranks can have alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import field
from functools import lru_cache

from ckpt_tool.checkpoint.base import Checkpoint, TensorFile
from ckpt_tool.checkpoint.crc32 import Combine, IntervalCrc, combine
from ckpt_tool.checkpoint.crc32c import combine_c
from ckpt_tool.checkpoint.zlibs import crc32
from ckpt_tool.convert.layout import Step
from ckpt_tool.errors import Problem
from ckpt_tool.records import dataclass

Key = tuple[str, str]  # (file, tensor name)
Hole = tuple[Key, IntervalCrc, int, int]  # the tensor, its checksum so far, first byte, bytes
HOLES = 64  # of a tensor that are read one by one; one with more is read again from its first byte


def holes(checkpoint: Checkpoint, crcs: Mapping[Key, IntervalCrc | None]) -> list[Hole]:
    """What no step read of tensors of which one read a part: rows of padding, say."""
    found: list[Hole] = []
    for key, crc in crcs.items():
        size = checkpoint.files[key[0]].tensors[key[1]].nbytes
        left = None if crc is None else crc.holes(size)
        if crc is not None and left and len(left) <= HOLES and left != [(0, size)]:
            found += [(key, crc, *hole) for hole in left]
    return found


@dataclass
class RecordCheck:
    """The records of a checkpoint after a copy: `wrong` ones, those `unread` (not read in order by the copy,
    so still to be read through) as (file, key), and for each file how many have no checksum."""

    wrong: list[Problem] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)
    unchecked: dict[str, int] = field(default_factory=dict)


def check_records(
    checkpoint: Checkpoint, crcs: Mapping[Key, int], crcs_c: Mapping[Key, int] | None = None
) -> RecordCheck:
    """Put together the checksum of each record from those of the tensors in it (whole tensors; `crcs` are
    CRC-32s, `crcs_c` CRC-32Cs)."""
    found = RecordCheck()
    read, read_c = _by_file(crcs), _by_file(crcs_c or {})
    for file in checkpoint.files.values():
        known, known_c = read.get(file.name, {}), read_c.get(file.name, {})
        tensors = _tensors_by_record(file, known)
        for key, record in file.records(known).items():
            _, offset, size, wanted, wanted_c, of = record
            if size == 0 or (of is not None and of not in known):
                continue
            other = wanted_c is not None
            wanted = wanted_c if other else wanted
            if wanted is None:
                found.unchecked[file.name] = found.unchecked.get(file.name, 0) + 1
                continue
            own, names = known_c if other else known, tensors.get(key, [])
            if len(names) == 1 and names[0][0] == 0 and file.tensors[names[0][1]].nbytes == size:
                crc = own.get(names[0][1])  # nearly always
            else:
                crc = _joined(size, file, names, own, _WAYS[other])
            if crc is None:
                found.unread.append((file.name, key))
            elif crc != wanted:
                what = "CRC-32C" if other else "CRC32"
                message = f"expected {what} {wanted:08x} as the file says, found {crc:08x}"
                if other:
                    message += f" in the {size} bytes from byte {offset} on"
                hint = "the file is damaged: download it again"
                found.wrong.append(Problem("checksum", message, file.name, names[0][1], hint))
    return found


def _by_file(crcs: Mapping[Key, int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (file, name), crc in crcs.items():
        found.setdefault(file, {})[name] = crc
    return found


_WAYS: Mapping[bool, Combine] = {False: combine, True: combine_c}


def _tensors_by_record(file: TensorFile, read: Collection[str]) -> dict[str, list[tuple[int, str]]]:
    """For each record the tensors, of those `read`, that are runs of it, as (first byte, name)."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in file.tensors:
        if name in read and (place := file.record_of(name)) is not None:
            found.setdefault(place[0], []).append((place[1], name))
    return found


def _joined(
    size: int,
    file: TensorFile,
    names: list[tuple[int, str]],
    crcs: Mapping[str, int],
    combine: Combine,
) -> int | None:
    """The checksum of a record of `size` bytes if some of its tensors follow one another from its first byte
    to its last."""
    at = crc = 0
    for start, name in sorted(names):
        known = crcs.get(name)
        if start == at and known is not None and file.tensors[name].nbytes:
            crc = combine(crc, known, file.tensors[name].nbytes)
            at += file.tensors[name].nbytes
    return crc if at == size else None


def repeated_shares(steps: Iterable[Step], checkpoint: Checkpoint, crcs: Mapping[Key, int]) -> list[Problem]:
    """Files that hold the very bytes of another rank's in every tensor that ranks share out, or of another
    pipeline stage's in every tensor: one file under two numbers. Headers cannot tell it, and neither can
    copies, which are then equal. Zeros tell nothing."""
    if len(checkpoint.files) == 1:
        return []
    held: dict[str, list[_Held]] = {}
    for k, step in enumerate(steps):
        if step.compare:
            continue
        shared = len({p.file for p in step.sources}) > 1
        for p in step.sources:
            crc, size = crcs[p.file, p.name], checkpoint.files[p.file].tensors[p.name].nbytes
            held.setdefault(p.file, []).append(_Held(k, p.name, crc, shared, crc != _of_zeros(size)))
    shares = {f: tuple((h.step, h.name, h.crc) for h in hs if h.shared) for f, hs in held.items()}
    stages = {f: tuple(sorted((h.name, h.crc) for h in hs)) for f, hs in held.items()}
    telling = [{f for f, hs in held.items() if any(h.tells for h in hs if h.shared)}]
    telling.append({f for f, hs in held.items() if any(h.tells for h in hs)})
    ranks = list(_repeated(shares, telling[0], "another share of each tensor", "that ranks share out"))
    named = {p.file for p in ranks}
    layers = _repeated(stages, telling[1], "other layers", "it holds")
    return [*ranks, *(p for p in layers if p.file not in named)]


@dataclass(frozen=True)
class _Held:
    """A tensor that a step reads from a file; `shared` with other files, `tells` unless it is zeros."""

    step: int
    name: str
    crc: int
    shared: bool
    tells: bool


def _repeated(
    held: Mapping[str, tuple[object, ...]], telling: set[str], expected: str, all_: str
) -> Iterator[Problem]:
    """A problem for each of the files `telling` that holds what another does."""
    first: dict[tuple[object, ...], str] = {}
    for file, own in held.items():
        other = first.setdefault(own, file) if file in telling else file
        if other != file:
            message = f"expected {expected} than in {other}, found the same bytes in all {len(own)} {all_}"
            hint = "one file is there under two numbers: get the one that is missing"
            yield Problem("shard-conflict", message, file, hint=hint)


@lru_cache(maxsize=1024)
def _of_zeros(size: int) -> int:
    """The CRC32 of so many zero bytes."""
    crc, length, found = crc32(bytes(1)), 1, 0
    while size:
        if size & 1:
            found = combine(found, crc, length)
        crc, length, size = combine(crc, crc, length), length * 2, size >> 1
    return found
