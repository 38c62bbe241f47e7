"""Flat buffers of Megatron's distributed optimizer, and where in them each parameter lies.

    mp_rank_TT[_PPP]/distrib_optim.pt     what data-parallel rank 0 has gathered of a model-parallel rank
    [c.]{b}.{dtype}.{param,exp_avg,exp_avg_sq}[.{bucket}]

b counts the buffers: one for each virtual stage and each dtype of parameters in it; c the optimizers of a run
that steps its experts apart (the dense one first). A buffer holds its parameters in the reverse order of the
modules, in one of these ways:

    to core_v0.3     one tensor, a parameter after the other, filled up to a multiple of the ranks
    core_v0.4        a list of buckets, each filled up so
    core_v0.5, 0.6   a list of buckets, nothing filled up
    core_v0.7        the buckets joined into one tensor
    from core_v0.8   that, and a parameter begins at the next multiple of 64 in its bucket

No file says where a bucket ends, nor which of the ways it is. So all of them are tried, parameter by
parameter, and a place counts where the float32 weights at it, rounded to the dtype of the model, are the
model's own bit for bit. Where nothing fits, or more than one thing does, the state is refused. The order of
the modules itself is taken from the file of the model, and where two parameters have the same weights, as
norms do before they are trained, nothing but it says which of two places is whose: `Alike` finds these.

Source: NVIDIA/Megatron-LM (optimizer/distrib_optimizer.py at core_v0.2.0 to core_v0.5.0; at core_v0.6.0 to
core_v0.19.0 core/optimizer/distrib_optimizer.py, core/distributed/param_and_grad_buffer.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any, NoReturn

import numpy as np

from ckpt_tool.checkpoint import folders
from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorFile, TensorInfo
from ckpt_tool.checkpoint.sliced import part_of
from ckpt_tool.checkpoint.torch_zip import open_torch_zip
from ckpt_tool.checkpoint.zlibs import crc32
from ckpt_tool.convert.casting import converted
from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass

DISTRIBUTED = "distrib_optim.pt"
STATES: Mapping[str, str] = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "fp32_param": "param"}
MASTER = "param"
ALIGNED = 64  # elements
BLOCK = 1 << 18  # elements that are compared at a time
WAYS = 64  # that are followed at once
_BUFFER = re.compile(
    r"((?P<chain>\d{1,3})\.)?(?P<buffer>\d{1,3})\.(?P<dtype>\D.*?)\.(?P<state>param|exp_avg|exp_avg_sq)"
    r"(\.(?P<bucket>\d{1,6}))?",
    re.ASCII,
)
_PAIR = re.compile(r"\(torch\.(?P<own>\w+), torch\.\w+\)", re.ASCII)  # of parameters and of gradients
_CHUNK = re.compile(r"model(\d*)\.", re.ASCII)
EXPERT = ".mlp.experts."  # whose parameters another optimizer has where they are shared out
FLAG = "--with-optimizer"
TRUSTED = "by the order of the modules alone it was told which state is whose of"
HINT = f"without {FLAG} the model alone is converted"

State = tuple[tuple[str, str], TensorInfo]  # (state, parameter), and where it is


@dataclass(frozen=True)
class Buffer:
    """`buckets` have the name of the tensor of each state, and the number of elements. `dtype` is the torch
    dtype of its parameters, None where the file does not say it; `exact` that no bucket is filled up."""

    label: str
    buckets: tuple[tuple[Mapping[str, str], int], ...]
    dtype: str | None
    exact: bool

    @property
    def length(self) -> int:
        return sum(n for _, n in self.buckets)


@dataclass
class Alike:
    """Which parameters have weights that would be found at each other's places: all of one value, or the same
    numbers. `marks` are by file and name."""

    marks: dict[tuple[str, str], tuple[object, ...]] = field(default_factory=dict)

    def note(self) -> str | None:
        """What was not proved of their places."""
        groups: dict[tuple[object, ...], list[str]] = {}
        for (_, name), mark in self.marks.items():
            groups.setdefault(mark, []).append(name)
        names = [n for own in groups.values() if len(own) > 1 for n in own]
        if not names:
            return None
        return f"{TRUSTED} {len(names)} parameters with weights that others have: {', '.join(names[:2])}, ..."


def states_of(
    file: TensorFile, checkpoint: Checkpoint, model: Sequence[TensorInfo], spare: int, seen: Alike
) -> Iterator[State]:
    """The states in `file`, which lies beside the file that has the parameters `model` in the order of their
    modules. Buckets may be filled up with fewer than `spare` elements; `seen` gets the weights. Kinds:
    `unsupported`, `size-mismatch`, `unproved`."""
    found = buffers_of(file)
    if odd := [t for t in model if t.dtype not in ("F32", "F16", "BF16")]:
        _refuse(odd[0].file, odd[0].name, "parameters in 16 or 32 bits", odd[0].dtype)
    for chain, buffers in found.items():
        groups = _groups(file.name, stepped(model, chain), buffers)
        for buffer, group in zip(buffers, groups, strict=True):
            for t, (bucket, start) in placed(buffer, file, checkpoint, group[::-1], spare, seen):
                names, _ = buffer.buckets[bucket]
                for state, stored in STATES.items():
                    if state == "fp32_param" and t.dtype == "F32":
                        continue  # which is the weight itself
                    name = part_of(names[stored], start, start + t.numel)
                    yield (state, t.name), TensorInfo(name, "F32", t.shape, file.name)


def stepped(model: Sequence[TensorInfo], chain: int | None) -> list[TensorInfo]:
    """Those of `model` that an optimizer steps: the only one (None) all, of two the second the experts."""
    return [t for t in model if chain is None or (EXPERT in t.name) == (chain > 0)]


def open_buffers(place: folders.Place, name: str) -> TensorFile:
    """The file of buffers at `place`. Kinds: those of reading a torch file."""
    return open_torch_zip(place.path, name, window=place.window, lists=True)


# --- what there is ------------------------------------------------------------------------------------------


def buffers_of(file: TensorFile) -> dict[int | None, list[Buffer]]:
    """The buffers of each optimizer, in their order; one that is in no list is called None."""
    found: dict[tuple[int, int, str], dict[int, dict[str, str]]] = {}
    for name in file.tensors:
        m = _BUFFER.fullmatch(name)
        if m is None:
            _refuse(file.name, name, "a buffer of param, exp_avg or exp_avg_sq", "another tensor")
        key = int(m["chain"] or -1), int(m["buffer"]), m["dtype"]
        found.setdefault(key, {}).setdefault(int(m["bucket"] or 0), {})[m["state"]] = name
    made: dict[int | None, list[Buffer]] = {}
    for (chain, number, dtype), buckets in sorted(found.items(), key=lambda item: item[0][:2]):
        own = made.setdefault(None if chain < 0 else chain, [])
        if number != len(own):
            _refuse(file.name, f"{number}", f"one buffer with the number {len(own)}", f"number {number}")
        inside: Any = file.metadata if chain < 0 else _inside(file.metadata, str(chain))
        told = _inside(_inside(inside, str(number)), dtype)
        own.append(buffer_of(file, f"buffer {number}, {dtype}", dtype, buckets, inside, told))
    if len(made) > 2:
        _refuse(file.name, None, "an optimizer, and one of experts", f"{len(made)}")
    return made


def _inside(found: Any, key: str) -> Any:
    return found.get(key, {}) if isinstance(found, Mapping) else {}


def buffer_of(
    file: TensorFile,
    label: str,
    dtype: str,
    buckets: Mapping[int, Mapping[str, str]],
    beside: Any,
    told: Any,
) -> Buffer:
    """`buckets` are the names of tensors by number and state, `beside` what the file says of all its buffers,
    `told` what of this one. Kinds: `unsupported`, `size-mismatch`."""
    held = []
    for number in range(len(buckets)):
        names = buckets.get(number, {})
        tensors = {s: file.tensors[n] for s, n in names.items()}
        if sorted(names) != sorted(STATES.values()) or len({t.shape for t in tensors.values()}) != 1:
            _refuse(file.name, label, "param, exp_avg and exp_avg_sq of one length", _shown(tensors))
        if any(len(t.shape) != 1 or t.dtype != "F32" for t in tensors.values()):
            _refuse(file.name, label, "flat tensors in float32", _shown(tensors))
        held.append((names, tensors[MASTER].numel))
    said = _inside(told, "numel_unpadded")
    if type(said) is int and said != held[0][1]:
        text = f"expected {said:,} elements as numel_unpadded says, found {held[0][1]:,}"
        fail("size-mismatch", text, file=file.name, where=label)
    pair = _PAIR.fullmatch(dtype)
    exact = type(said) is int or bool(_inside(beside, "per_bucket_numel_unpadded"))
    return Buffer(label, tuple(held), pair["own"] if pair else None, exact)


def _shown(tensors: Mapping[str, TensorInfo]) -> str:
    return ", ".join(f"{s} {t.dtype} {list(t.shape)}" for s, t in sorted(tensors.items()))


def _groups(file: str, model: Sequence[TensorInfo], buffers: Sequence[Buffer]) -> list[list[TensorInfo]]:
    """The parameters of each buffer: of each virtual stage, those of one dtype, in the order in which these
    first come; of each stage all, where a buffer does not say of what dtype they are."""
    chunks: dict[str, list[TensorInfo]] = {}
    for t in model:
        m = _CHUNK.match(t.name)
        chunks.setdefault(m[1] if m else "", []).append(t)
    apart: dict[tuple[str, str], list[TensorInfo]] = {}
    for chunk, own in chunks.items():
        for t in own:
            apart.setdefault((chunk, DTYPES[t.dtype].torch), []).append(t)
    dtypes = [dtype for _, dtype in apart]
    if dtypes == [b.dtype for b in buffers]:
        return list(apart.values())
    if len(chunks) == len(buffers) and all(b.dtype is None for b in buffers):
        return list(chunks.values())
    told = ", ".join(b.dtype or "any" for b in buffers)
    _refuse(file, None, f"a buffer for each dtype of parameters ({', '.join(dtypes) or 'none'})", told)


def _refuse(file: str, where: str | None, expected: str, found: str) -> NoReturn:
    fail("unsupported", f"expected {expected}, found {found}", file=file, where=where, hint=HINT)


# --- where parameters lie -----------------------------------------------------------------------------------

Place = tuple[int, int]  # bucket, first element
Node = tuple[int, int, int]  # bucket, end of the last parameter, where counting to a multiple of 64 begins


def placed(
    buffer: Buffer,
    file: TensorFile,
    checkpoint: Checkpoint,
    params: Sequence[TensorInfo],
    spare: int,
    seen: Alike,
) -> Iterator[tuple[TensorInfo, Place]]:
    """The place of each parameter, of `params` in the order of the buffer. See the module docstring."""
    elements, size = sum(t.numel for t in params), sum(n for _, n in buffer.buckets)
    most = elements + (ALIGNED - 1) * len(params) + max(spare - 1, 0) * len(buffer.buckets)
    if not elements <= size <= most:
        text = f"expected {elements:,} elements of {len(params)} parameters, found {size:,}"
        fail("size-mismatch", text, file=file.name, where=buffer.label, hint=HINT)
    levels: list[dict[Node, tuple[Node, Place]]] = []
    nodes: list[Node] = [(0, 0, 0)]
    spare = 1 if buffer.exact else spare
    for t in params:
        reached: dict[Node, tuple[Node, Place]] = {}
        for node in nodes:
            for place, base in _starts(buffer, node, t.numel, spare):
                if not _holds(buffer, file, checkpoint, t, place, seen):
                    continue
                end = (place[0], place[1] + t.numel, base % ALIGNED)
                if end in reached or len(reached) == WAYS:
                    _unproved(file, buffer, t, "more than one place where they are")
                reached[end] = node, place
        if not reached:
            _unproved(file, buffer, t, "others at every place that it may have")
        levels.append(reached)
        nodes = list(reached)
    ends = [n for n in nodes if _is_end(buffer, n, spare)]
    if len(ends) != 1:
        found = "more than one place where they are" if ends else "some behind all parameters"
        _unproved(file, buffer, params[-1], found)
    places: list[Place] = []
    node = ends[0]
    for level in reversed(levels):
        node, place = level[node]
        places.append(place)
    return zip(params, reversed(places), strict=True)


def _starts(buffer: Buffer, node: Node, numel: int, spare: int) -> Iterator[tuple[Place, int]]:
    """Where a parameter may begin behind `node`, each with where counting begins then: at once (as the first
    of a bucket, too), at the next multiple of 64, or in the next bucket."""
    bucket, at, base = node
    size = buffer.buckets[bucket][1]
    aligned = at + (base - at) % ALIGNED
    for start in sorted({at, aligned}):
        if start + numel <= size:
            yield (bucket, start), (base if start == aligned else start)
    if bucket + 1 < len(buffer.buckets) and size - at < spare and numel <= buffer.buckets[bucket + 1][1]:
        yield (bucket + 1, 0), 0


def _is_end(buffer: Buffer, node: Node, spare: int) -> bool:
    bucket, at, _ = node
    return bucket + 1 == len(buffer.buckets) and buffer.buckets[bucket][1] - at < spare


def _unproved(file: TensorFile, buffer: Buffer, t: TensorInfo, found: str) -> NoReturn:
    text = f"expected weights in float32 that rounded to {t.dtype} are {t.name}, found {found}"
    hint = "nothing else tells where a parameter lies in it, so its state is not carried; " + HINT
    fail("unproved", text, file=file.name, where=buffer.label, hint=hint)


def _holds(
    buffer: Buffer, file: TensorFile, checkpoint: Checkpoint, t: TensorInfo, place: Place, seen: Alike
) -> bool:
    """Whether the weights in float32 at `place` are those of `t`."""
    bucket, start = place
    name = buffer.buckets[bucket][0][MASTER]
    return agree(checkpoint, t, ((file, name, start * 4, t.numel * 4),), seen)


def agree(
    checkpoint: Checkpoint, t: TensorInfo, runs: Iterable[tuple[TensorFile, str, int, int]], seen: Alike
) -> bool:
    """Whether the float32 numbers in `runs` (file, tensor, first byte, bytes), rounded to the dtype of `t`,
    are the numbers of it bit for bit; a NaN is like any other. Where they are, `seen` gets them."""
    width, done = DTYPES[t.dtype].itemsize, 0
    crc, first, plain = 0, None, True
    for file, name, first, size in runs:
        for at in range(0, size, 4 * BLOCK):
            wide = np.empty(min(4 * BLOCK, size - at) // 4, "<u4")
            file.read_into(name, first + at, wide.data.cast("B"))
            own = np.empty(len(wide), DTYPES[t.dtype].bits)
            checkpoint.read_into(t, done * width, own.data.cast("B"))
            if not _alike(wide, own, t.dtype):
                return False
            crc, first = crc32(own.data.cast("B"), crc), own[0] if first is None else first
            plain = plain and bool((own == first).all())
            done += len(wide)
    if done != t.numel:
        return False
    mark = (int(first),) if plain and first is not None else (t.numel, crc)
    seen.marks[t.file, t.name] = (t.dtype, *mark)
    return True


def _alike(wide: np.ndarray, own: np.ndarray, dtype: str) -> bool:
    made = wide if dtype == "F32" else converted(wide, "F32", dtype)
    odd = made != own
    if not odd.any():
        return True
    back = own if dtype == "F32" else converted(own, dtype, "F32")
    return bool((np.isnan(wide.view("<f4")) & np.isnan(back.view("<f4")))[odd].all())
