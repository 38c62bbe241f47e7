"""Tensors that a library holds otherwise in memory, and a folder therefore has so: read as on disk.

transformers 5 stacks the experts of a layer when it loads a model and takes them apart again in
save_pretrained(); who saves state_dict() itself, or asks for no original format, has the stacked ones on the
disk. A family says which tensors these are (`Family.in_memory`); here they are seen as those it knows, each a
run of the bytes of the stacked one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import replace
from math import prod

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, Record, TensorFile, TensorInfo, View
from ckpt_tool.errors import Problem, fail_all
from ckpt_tool.records import dataclass

# Name of the stacked tensor, of any layer {i}, to those it is made of: equal shares of its first dimension,
# or with {e} of its second one, while the first counts e; with {e} on both sides it is only called otherwise.
InMemory = Mapping[str, tuple[str, ...]]
READING = "experts are stacked as transformers 5 holds them in memory: read one by one"
CALLED = "experts are called as transformers 5 calls them in memory: read under their names on disk"
# How what belongs to stacked codes is called behind their name, and behind that of one expert's.
OF_CODES = {"_scale_inv": ".weight_scale_inv", "_activation_scale": ".activation_scale"}
CODES, SCALES = "_blocks", "_scales"  # of MXFP4, behind the name of the numbers
WIDE = ("F64", "F32", "F16", "BF16")
SAVED = "load the model with transformers 5 and save_pretrained() it: that writes them one by one"
# What servers join of a decoder's own projections, as vLLM holds them.
_JOINED = re.compile(
    r"(?:\w+\.)?model\.layers\.\d+\.(?:(?P<kind>self_attn\.qkv_proj|mlp\.gate_up_proj)\.(weight|bias)"
    r"|\w+\.(?P<experts>experts\.w13_weight))",
    re.ASCII,
)
_PARTS = {
    "self_attn.qkv_proj": "q_proj, k_proj and v_proj",
    "mlp.gate_up_proj": "gate_proj and up_proj",
    "experts.w13_weight": "gate and up of each expert",
}


@dataclass(frozen=True, slots=True)
class Share:
    """A tensor that is a run of the bytes of another in the same file."""

    info: TensorInfo
    stored: str
    start: int


class Shares(View):
    """A view of a file in which tensors are runs of the bytes of others; `shares` are by the names here."""

    def __init__(self, stored: TensorFile, shares: Mapping[str, Share]) -> None:
        super().__init__(stored)
        self.shares = shares
        self.tensors = {name: share.info for name, share in shares.items()}

    def records(self, of: Container[str] | None = None) -> Mapping[str, Record]:
        """That of a tensor which is apart here is its first share's."""
        first: dict[str, str] = {}
        for name, share in self.shares.items():
            first.setdefault(share.stored, name)
        wanted = None if of is None else {s.stored for name, s in self.shares.items() if name in of}
        return {
            key: r if r.of is None else r._replace(of=first.get(r.of, r.of))
            for key, r in self.stored.records(wanted).items()
        }

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        share = self.shares[name]
        self.stored.read_into(share.stored, share.start + offset, buffer)

    def extent(self, name: str) -> tuple[int, int] | None:
        found = self.stored.extent(self.shares[name].stored)
        return None if found is None else (found[0], found[1] + self.shares[name].start)

    def record_of(self, name: str) -> tuple[str, int] | None:
        found = self.stored.record_of(self.shares[name].stored)
        return None if found is None else (found[0], found[1] + self.shares[name].start)


class OneByOne(Shares):
    """A view of a file in which what a library stacks in memory is apart."""


def with_scales(in_memory: InMemory) -> InMemory:
    """`in_memory` with what stands beside stacked codes of eight bits."""
    return {
        **in_memory,
        **{
            one + end: tuple(part.removesuffix(".weight") + own for part in parts)
            for one, parts in in_memory.items()
            if "{e}" in parts[0]
            for end, own in OF_CODES.items()
        },
    }


def one_by_one(checkpoint: Checkpoint, in_memory: InMemory) -> Checkpoint:
    """`checkpoint`, or a view of it in which the tensors of `in_memory` are apart. Fails with `unsupported`
    where some layers are stacked and others are not, where an expert is there twice, or where projections are
    joined as no family has them; with `shape-mismatch` for a stacked tensor that has no such shares."""
    names = checkpoint.names()
    fail_all(_joined_problems(names, checkpoint))
    patterns = [(_pattern(one), parts) for one, parts in in_memory.items()]
    tails = tuple(map(_tail, in_memory))
    likely = [n for n in names if n.endswith(tails)]
    if not any(pattern.fullmatch(n) for pattern, _ in patterns for n in likely):
        return checkpoint
    apart = [_pattern(part) for parts in in_memory.values() for part in parts]
    single = next((n for n in names if any(p.fullmatch(n) for p in apart)), None)
    problems: list[Problem] = []
    if single is not None:
        stacked = next(n for n in names if any(p.fullmatch(n) for p, _ in patterns))
        message = f"expected experts stacked in every layer or in none, found {single} beside {stacked}"
        problems.append(Problem("unsupported", message, checkpoint.path.name, single, SAVED))
    files: dict[str, TensorFile] = {}
    for file in checkpoint.files.values():
        shares: dict[str, Share] = {}
        for tensor in file.tensors.values():
            made = _shares(tensor, patterns)
            if not made:
                problems.append(_no_shares(tensor))
            again = next((shares[s.info.name] for s in made if s.info.name in shares), None)
            if again is not None and single is None:
                problems.append(_twice(tensor, again))
            shares |= {share.info.name: share for share in made}
        files[file.name] = OneByOne(file, shares)
    fail_all(problems)
    several = [p for p, parts in patterns if "e" not in p.groupindex and "{e}" in parts[0]]
    reading = READING if any(p.fullmatch(n) for p in several for n in likely) else CALLED
    return replace(checkpoint, files=files, readings=(*checkpoint.readings, reading))


def as_on_disk(checkpoint: Checkpoint, held_as: Mapping[str, str], told_by: Collection[str]) -> Checkpoint:
    """`checkpoint`, or, where it has one of the tensors `told_by`, a view of it in which those that are
    called as in memory have the names that save_pretrained() writes."""
    moved = {old: new for old, new in held_as.items() if old in checkpoint and new not in checkpoint}
    if not moved or not any(name in checkpoint for name in told_by):
        return checkpoint
    readings = [f"{old} was read as {new}, its name on disk; transformers 5 has the other in memory, and 4"
                " does not load it" for old, new in moved.items()]  # fmt: skip
    return checkpoint.renamed(moved, *readings)


def as_numbers(checkpoint: Checkpoint, matrices: Collection[str]) -> Checkpoint:
    """`checkpoint`, or a view of it in which numbers that are called as codes have the names of numbers:
    `matrices`, of any layer {i}, with or without the first word, which a model without its head leaves out.
    transformers 5.23.0 saves what it made of MXFP4 under the names of the codes it had read."""
    patterns = [_pattern(name) for one in matrices for name in (one, one.partition(".")[2])]
    moved = {}
    for name in checkpoint.names() if matrices else ():
        stem = name.removesuffix(CODES)
        if stem == name or stem in checkpoint or stem + SCALES in checkpoint:
            continue
        if checkpoint.find(name)[0].dtype in WIDE and any(p.fullmatch(stem) for p in patterns):
            moved[name] = stem
    if not moved:
        return checkpoint
    first, more = next(iter(moved)), f" and {len(moved) - 1} more" if len(moved) > 1 else ""
    reading = (
        f"{first}{more}: numbers under the name of codes, as transformers 5 saves them and no release loads "
        f"them; read without `{CODES}`"
    )
    return checkpoint.renamed(moved, reading)


def is_stacked(checkpoint: Checkpoint) -> bool:
    """Whether it is such a view."""
    return any(isinstance(f, OneByOne) for f in checkpoint.files.values())


def stacked_from(checkpoint: Checkpoint, tensor: TensorInfo) -> TensorInfo:
    """The stacked tensor of which `tensor` is a run; itself where it is none."""
    file = checkpoint.files[tensor.file]
    if not isinstance(file, OneByOne):
        return tensor
    return file.stored.tensors[file.shares[tensor.name].stored]


def _tail(template: str) -> str:
    """What every name that it stands for ends with."""
    return template.rpartition("}")[2]


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{i\}", r"(?P<i>\d{1,9})").replace(r"\{e\}", r"(?P<e>\d{1,9})")
    return re.compile(text, re.ASCII)


def _shares(tensor: TensorInfo, patterns: list[tuple[re.Pattern[str], tuple[str, ...]]]) -> list[Share]:
    """The tensor itself unless it is a stacked one; empty where that cannot be taken apart."""
    for pattern, parts in patterns:
        if found := pattern.fullmatch(tensor.name):
            if (expert := found.groupdict().get("e")) is not None:
                parts = tuple(part.replace("{e}", expert) for part in parts)
            return list(_apart(tensor, parts, found["i"]))
    return [Share(tensor, tensor.name, 0)]


def _apart(tensor: TensorInfo, parts: tuple[str, ...], layer: str) -> Iterator[Share]:
    many = "{e}" in parts[0]
    if many and len(tensor.shape) == 1 and not parts[0].endswith(".weight"):  # one number of each expert
        for e in range(tensor.shape[0]):
            for part in parts:
                name = part.replace("{i}", layer).replace("{e}", str(e))
                info = TensorInfo(name, tensor.dtype, (), tensor.file)
                yield Share(info, tensor.name, e * DTYPES[tensor.dtype].itemsize)
        return
    shape = tensor.shape if many else (1, *tensor.shape)
    if len(shape) < 2 or shape[1] % len(parts):
        return
    own = (shape[1] // len(parts), *shape[2:])
    size = prod(own) * DTYPES[tensor.dtype].itemsize
    for e in range(shape[0]):
        for k, part in enumerate(parts):
            name = part.replace("{i}", layer).replace("{e}", str(e))
            info = TensorInfo(name, tensor.dtype, own, tensor.file)
            yield Share(info, tensor.name, (e * len(parts) + k) * size)


def _no_shares(tensor: TensorInfo) -> Problem:
    message = f"expected shares of experts in its first two dimensions, found shape {tensor.shape}"
    return Problem("shape-mismatch", message, tensor.file, tensor.name)


def _twice(tensor: TensorInfo, other: Share) -> Problem:
    message = f"expected each expert once, found {other.info.name} in {tensor.name} and in {other.stored}"
    return Problem("unsupported", message, tensor.file, tensor.name, SAVED)


def _joined_problems(names: list[str], checkpoint: Checkpoint) -> Iterator[Problem]:
    """One for each kind of projections that some server joined."""
    first: dict[str, str] = {}
    text = "\n".join(names)
    for name in names if any(kind in text for kind in _PARTS) else ():
        if found := _JOINED.fullmatch(name):
            first.setdefault(found["kind"] or found["experts"], name)
    for kind, name in first.items():
        yield Problem(
            "unsupported",
            f"expected {_PARTS[kind]} as tensors of their own, found them joined, as vLLM holds them",
            checkpoint.find(name)[0].file,
            name,
            "convert the folder that the server loaded: how its ranks share joined rows, no file tells",
        )
