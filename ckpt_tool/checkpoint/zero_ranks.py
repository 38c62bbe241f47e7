"""What the files of one rank of DeepSpeed's ZeRO say: its flat partitions, and how parameters lie in them.

    *_optim_states.pt   optimizer_state_dict.fp32_flat_groups                 ZeRO 3, by sub-group
                        optimizer_state_dict.single_partition_of_fp32_groups  ZeRO 1 and 2, by group
                        optimizer_state_dict.partition_count                  ranks, or a list by group
    *_model_states.pt   param_shapes    a list, or one, of dicts of shapes, in the order of the partitions
                        frozen_param_shapes, frozen_param_fragments           what is not trained
                        shared_params   other names of a parameter; of rank 0 alone
                        module          buffers, and in ZeRO 3 empty tensors in the place of parameters

Source: DeepSpeed 0.19.8 (runtime/engine.py, runtime/zero/stage3.py and stage_1_and_2.py,
runtime/bf16_optimizer.py), and folders of each stage that it wrote.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import field
from math import prod

from ckpt_tool.checkpoint.base import Record, TensorFile, TensorInfo
from ckpt_tool.checkpoint.byte_range import ByteRange, Part
from ckpt_tool.checkpoint.pickle_records import Inert
from ckpt_tool.checkpoint.torch_zip import torch_zip
from ckpt_tool.checkpoint.zip_reader import ZipArchive
from ckpt_tool.errors import fail, printable
from ckpt_tool.records import dataclass

STATE = "optimizer_state_dict"
FLAT3, FLAT12 = "fp32_flat_groups", "single_partition_of_fp32_groups"
FROZEN, MODULE = "frozen_param_fragments.", "module."
_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
_STEP = re.compile(rf"{STATE}\.(base_optimizer_state|{STATE})\.(.+\.)?step", re.ASCII)
_GROUP = re.compile(rf"{STATE}\.({FLAT3}|{FLAT12})\.(\d{{1,6}})", re.ASCII)
# Beside the tensors, of no use to whoever reads the model.
_OWN = ("param_shapes", "buffer_names", "frozen_param_shapes", "frozen_param_fragments", "shared_params")
_ELSEWHERE = "the run kept it elsewhere (compressed, or laid out anew): save the file again with torch.save"
WHOLE = "a run saves whole weights with stage3_gather_16bit_weights_on_model_save"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Flat:
    """A tensor that is one run of a file: `numel` elements of `dtype` from byte `at` of the file called
    `file` on. `record` has the checksum of the bytes around, which begin at byte `begin` of the file."""

    file: str
    at: int
    numel: int
    dtype: str
    record: Record
    begin: int


@dataclass(frozen=True)
class Partition:
    """What an optimizer's file holds: `groups` of float32 weights, of a stage (3, or 1 for 1 and 2) that
    `counts` ranks share, by group. `steps` are the optimizer's, `gaps` by group the elements of padding after
    each parameter, `slices` by group where each parameter's part lies: (first element, elements)."""

    file: str
    stage: int
    counts: tuple[int, ...]
    groups: tuple[Flat, ...]
    steps: frozenset[int]
    gaps: tuple[tuple[int, ...], ...] | None
    slices: tuple[Mapping[str, tuple[int, int]], ...] | None
    others: tuple[TensorInfo, ...] = ()  # which only training needs
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """What a file of model states says. `held` are tensors of `module` by name, those without elements
    too (None); `shared` is None in releases that do not say it."""

    file: str
    shapes: tuple[Mapping[str, Shape], ...]
    frozen: Mapping[str, Shape]
    fragments: Mapping[str, Flat]
    held: Mapping[str, tuple[Shape, Flat | None]]
    shared: Mapping[str, str] | None
    step: int | None
    metadata: Mapping[str, object] = field(default_factory=dict)
    imports: tuple[str, ...] = ()


def read_partition(data: ByteRange) -> Partition:
    """The optimizer's file `data`, which stays open. Kinds: those of a torch zip, `wrong-format` (no flat
    partitions), `unsupported` (experts with partitions of their own, a partition that is no run of bytes)."""
    with _Opened(data, lists=True) as file:
        said = file.metadata.get(STATE)
        told = said if isinstance(said, dict) else {}
        groups: dict[str, dict[int, Flat]] = {}
        flats = _Flats(file, data)
        for name in file.tensors:
            if (m := _GROUP.fullmatch(name)) is not None:
                groups.setdefault(m[1], {})[int(m[2])] = flats.of(name)
        if len(groups) != 1:
            found = "both" if groups else "none"
            message = f"expected flat partitions of the weights ({FLAT3} or {FLAT12}), found {found}"
            fail("wrong-format", message, file=data.name, where=STATE, hint=WHOLE)
        (kind, flat) = groups.popitem()
        if told.get("ds_zero_partition_groups") is not None:
            message = "expected partitions of all ranks alike, found experts with partitions of their own"
            hint = "save the whole model with the program that trained it, which knows its experts"
            fail("unsupported", message, file=data.name, where="ds_zero_partition_groups", hint=hint)
        stage = 3 if kind == FLAT3 else 1
        if (_stage(told.get("zero_stage")) == 3) != (stage == 3) and told.get("zero_stage") is not None:
            message = f"expected {FLAT12 if stage == 3 else FLAT3} of that stage, found {kind}"
            fail("wrong-format", message, file=data.name, where="zero_stage")
        return Partition(
            data.name,
            stage,
            _counts(told.get("partition_count"), data.name),
            tuple(flat[k] for k in sorted(flat)),
            frozenset(_steps(file, told)),
            _gaps(told.get("param_alignment_paddings"), data.name),
            None if _round_robin(file.metadata) else _slices(told.get("param_slice_mappings")),
            tuple(t for n, t in file.tensors.items() if not _GROUP.fullmatch(n)),
            file.imports,
        )


def read_model(data: ByteRange) -> Model:
    """The model states in `data`, which stays open. Kinds: those of a torch zip, `wrong-format`."""
    with _Opened(data) as file:
        told, flats = file.metadata, _Flats(file, data)
        fragments = {n.removeprefix(FROZEN): flats.of(n) for n in file.tensors if n.startswith(FROZEN)}
        held = {
            n.removeprefix(MODULE): (t.shape, flats.of(n) if t.numel else None)
            for n, t in file.tensors.items()
            if n.startswith(MODULE)
        }
        if not isinstance(told.get("module", {}), dict):
            message = "expected the state dict of the model, found another value"
            fail("wrong-format", message, file=data.name, where="module")
        shared = told.get("shared_params")
        step = told.get("global_steps")
        return Model(
            data.name,
            _by_group(told.get("param_shapes"), data.name),
            _shapes(told.get("frozen_param_shapes") or {}, data.name, "frozen_param_shapes"),
            fragments,
            held,
            None if shared is None else _names(shared, data.name),
            step if type(step) is int else None,
            {k: v for k, v in told.items() if k not in _OWN},
            file.imports,
        )


class _Opened:
    """A torch zip whose pickle is read, while the range stays open."""

    def __init__(self, data: ByteRange, *, lists: bool = False) -> None:
        self._file = torch_zip(ZipArchive(Part(data, 0, data.size)), lists=lists)

    def __enter__(self) -> TensorFile:
        return self._file

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Flats:
    """Where the tensors of `file` lie in `data`."""

    def __init__(self, file: TensorFile, data: ByteRange) -> None:
        self._file, self._data, self._records = file, data, file.records()

    def of(self, name: str) -> Flat:
        """`unsupported` where its numbers are no one run of the file."""
        tensor, place = self._file.tensors[name], self._file.record_of(name)
        record = None if place is None else self._records.get(place[0])
        if place is None or record is None:
            message = "expected the numbers in one run of the file, found them otherwise"
            fail("unsupported", message, file=self._data.name, where=name, hint=_ELSEWHERE)
        begin = record.offset - self._data.base
        return Flat(self._data.name, begin + place[1], tensor.numel, tensor.dtype, record, begin)


def _stage(value: object) -> int | None:
    """ZeroStageEnum(3), as any version of Python pickles it, or the number."""
    told = value.args[0] if type(value) is Inert and len(value.args) == 1 else value
    return _STAGES.get(told) if isinstance(told, str) else told if type(told) is int else None


def _counts(value: object, file: str) -> tuple[int, ...]:
    counts = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not counts or not all(type(n) is int and 0 < n <= 1 << 20 for n in counts):
        message = "expected the number of ranks that share the optimizer, found none"
        fail("wrong-format", message, file=file, where="partition_count")
    return counts


def _steps(file: TensorFile, told: Mapping[object, object]) -> Iterator[int]:
    """Those that the optimizer counted, wherever its class keeps them."""
    for name, tensor in file.tensors.items():
        if _STEP.fullmatch(name) and tensor.numel == 1 and tensor.dtype in ("F32", "I64", "I32"):
            raw = bytearray(tensor.nbytes)
            file.read_into(name, 0, memoryview(raw))
            (number,) = struct.unpack({"F32": "<f", "I64": "<q", "I32": "<i"}[tensor.dtype], raw)
            if number == number and abs(number) < 1 << 60:
                yield int(number)
    base = told.get("base_optimizer_state", told.get(STATE))
    for part in (told, base):
        step = part.get("base_optimizer_state_step", part.get("step")) if isinstance(part, dict) else None
        if type(step) is int:
            yield step


def _gaps(value: object, file: str) -> tuple[tuple[int, ...], ...] | None:
    if value is None:
        return None
    found = tuple(tuple(g) if isinstance(g, list | tuple) else None for g in _list(value))
    if not isinstance(value, dict | list | tuple) or not all(
        g is not None and all(type(n) is int and 0 <= n < 1 << 62 for n in g) for g in found
    ):
        message = "expected numbers of elements by group, found another value"
        fail("wrong-format", message, file=file, where="param_alignment_paddings")
    return tuple(g for g in found if g is not None)


def _round_robin(metadata: Mapping[str, object]) -> bool:
    """Whether the run dealt parameters out in another order than its slices say (`round_robin_gradients`,
    0.19.8), or may have."""
    config = metadata.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return not isinstance(zero, dict) or bool(zero.get("round_robin_gradients"))


def _slices(value: object) -> tuple[Mapping[str, tuple[int, int]], ...] | None:
    """Where the parts of parameters lie in a rank's partitions; None where a release does not say it."""
    made = []
    for group in _list(value):
        found: dict[str, tuple[int, int]] = {}
        for name, address in group.items() if isinstance(group, dict) else ():
            fields = address.fields if type(address) is Inert else {}
            start, numel = fields.get("start"), fields.get("numel")
            if type(start) is int and type(numel) is int:
                found[str(name)] = start, numel
        made.append(found)
    return tuple(made) or None


def _list(value: object) -> list[object]:
    """The entries of a list, which is a dict by places where it was parted."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _by_group(value: object, file: str) -> tuple[Mapping[str, Shape], ...]:
    groups = [value] if isinstance(value, dict) else value  # one dict before 0.3.17
    if not isinstance(groups, list | tuple):
        hint = f"a release of DeepSpeed from 0.3.15 on writes them; {WHOLE}"
        message = "expected the shapes of the parameters, found none"
        fail("wrong-format", message, file=file, where="param_shapes", hint=hint)
    return tuple(_shapes(g, file, "param_shapes") for g in groups)


def _shapes(value: object, file: str, where: str) -> dict[str, Shape]:
    if not isinstance(value, dict):
        fail("wrong-format", "expected shapes by name, found another value", file=file, where=where)
    found: dict[str, Shape] = {}
    for name, shape in value.items():
        fits = isinstance(shape, tuple | list) and all(type(n) is int and n >= 0 for n in shape)
        if not fits or len(shape) > 64 or prod(max(n, 1) for n in shape) > 1 << 62:
            message = "expected a shape of whole numbers, found another value"
            fail("wrong-format", message, file=file, where=printable(str(name)))
        found[str(name)] = tuple(shape)
    return found


def _names(value: object, file: str) -> dict[str, str]:
    """Pairs of names, of a dict or a list of pairs."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(p, tuple | list) and len(p) == 2 and all(type(n) is str for n in p) for p in pairs
    ):
        message = "expected names of parameters by other names, found another value"
        fail("wrong-format", message, file=file, where="shared_params")
    return {a: b for a, b in pairs}
