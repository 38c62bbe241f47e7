"""Writing the folder that Megatron-Core's `dist_checkpointing` loads: joined tensors, whatever the ranks and
stages of the loader.

    latest_checkpointed_iteration.txt
    release/.metadata  common.pt  metadata.json  __0_0.distcp ...

In three forms, as Megatron's own `sharded_state_dict(metadata=...)` asks for them: one tensor for all layers,
a piece for each (`stacked`, the default there too); one for each layer (`non_homogeneous`); and that with the
gates apart from the ups, and experts from each other (`singleton`). Beside the tensors, each linear module
has an entry of extra state, without which loading fails.

Source: NVIDIA/Megatron-LM core_v0.16.1 (core/dist_checkpointing, core/transformer/mlp.py,
core/tensor_parallel/layers.py: sharded_state_dict; megatron/training/checkpointing.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.checkpoint.dcp_names import COMMON, DATA, METADATA
from ckpt_tool.checkpoint.megatron import TRACKER
from ckpt_tool.checkpoint.torch_zip_writer import Namespace, whole_zip
from ckpt_tool.convert.dialects.megatron_ranks import RELEASE
from ckpt_tool.convert.layer_axis import key_of
from ckpt_tool.convert.options import Option
from ckpt_tool.convert.plan import Chunk, Options, OutputDocument, OutputFile, Plan
from ckpt_tool.convert.source import Source
from ckpt_tool.convert.weave import Table, Written, to_original

if TYPE_CHECKING:
    from ckpt_tool.checkpoint.dcp_places import Item
    from ckpt_tool.checkpoint.dcp_writer import Stored
    from ckpt_tool.checkpoint.pieces import Piece

STACKED, APART, SINGLETON = LAYERS = ("stacked", "non_homogeneous", "singleton")
OPTION = Option(
    "layers",
    "Tensors of a torch_dist folder: one for all layers (stacked, the default), one for each "
    "(non_homogeneous), or that with gates apart from ups and experts from each other (singleton).",
    "original",
    choices=LAYERS,
)
# What Megatron is to ask for, besides what it would anyway.
_CONTENT: Mapping[str, dict[str, Any]] = {
    STACKED: {"singleton_local_shards": False},
    APART: {"singleton_local_shards": False, "non_homogeneous_layers": True},
    SINGLETON: {"singleton_local_shards": True},
}
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_LINEAR = re.compile(r"(?P<module>.*decoder\.layers\..*\.linear_\w+\.)weight(_w)?", re.ASCII)


def to_folder(
    table: Table, source: Source, options: Options, written: Written, *, layers: str, version: float
) -> Plan:
    """The plan of the way back; the config of `written` are the args. `layers` is one of `LAYERS`."""
    dtype = options.dtype or source.dtype
    first = data_file(0)
    plan = to_original(
        table, source, options, written, files=[first], homes=lambda name: [(first, dtype, name)]
    )
    files = _dealt(plan.outputs[0], options.max_shard_bytes, layers=layers)
    home = {t.name: f.name for f in files for t in f.tensors}
    steps = tuple(
        replace(s, targets=tuple(replace(p, file=home[p.name]) for p in s.targets)) for s in plan.steps
    )
    common = {
        "args": Namespace({k: v.value for k, v in written.config.items()}),
        "checkpoint_version": version,
        "iteration": 0,
        "content_metadata": _CONTENT[layers],
    }
    documents = [
        OutputDocument(TRACKER, RELEASE.encode(), "names the folder of the checkpoint"),
        OutputDocument(f"{RELEASE}/{COMMON}", whole_zip(common, root="common"), "the args"),
        OutputDocument(f"{RELEASE}/metadata.json", json.dumps(_CONFIG).encode(), "names the container"),
        *contents(files),
    ]
    return replace(plan, outputs=tuple(files), steps=steps, documents=(*plan.documents, *documents))


def data_file(number: int, rank: int = 0) -> str:
    """The name of a file of tensors."""
    return f"{RELEASE}/__{rank}_{number}{DATA}"


def _dealt(whole: OutputFile, limit: int, *, layers: str) -> list[OutputFile]:
    """The tensors of `whole` in files of at most `limit` bytes each; a larger tensor has one of its own."""
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for t in whole.tensors:
        if groups[-1] and size + t.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(t)
        size += t.nbytes
    return [
        replace(
            whole,
            name=data_file(k),
            tensors=tuple(replace(t, file=data_file(k)) for t in group),
            chunks=tuple(_chunk(t.name, len(t.shape), layers=layers) for t in group),
        )
        for k, group in enumerate(groups)
    ]


def _chunk(name: str, axes: int, *, layers: str) -> Chunk:
    key, index = key_of(name, stacked=layers == STACKED, alone=layers == SINGLETON)
    return Chunk(key, (*index, *(0,) * axes))


def contents(files: list[OutputFile]) -> Iterator[OutputDocument]:
    """`.metadata`, and a data file with the entries that are no tensors."""
    from ckpt_tool.checkpoint.dcp_places import Item
    from ckpt_tool.checkpoint.dcp_writer import DistLayout, Stored, metadata_of
    from ckpt_tool.checkpoint.pieces import Piece

    dtypes: dict[str, str] = {}
    pieces: dict[str, list[Piece[Item]]] = {}
    for file in files:
        path = file.name.removeprefix(f"{RELEASE}/")
        shapes = [c.shape(t.shape) for t, c in zip(file.tensors, file.chunks, strict=True)]
        headers = [(t.name, t.dtype, shape) for t, shape in zip(file.tensors, shapes, strict=True)]
        items = DistLayout(headers).items
        for (name, dtype, shape), chunk in zip(headers, file.chunks, strict=True):
            dtypes[chunk.key] = dtype
            pieces.setdefault(chunk.key, []).append(Piece(chunk.start, shape, Item(path, *items[name])))
    tensors = {
        key: Stored(dtypes[key], tuple(max(ends) for ends in zip(*map(_end, own), strict=True)), own)
        for key, own in pieces.items()
    }
    states = list(_states(tensors, files))
    last, state = data_file(0, rank=1), whole_zip([None])  # called so however many the others are
    objects = {
        name: Item(last.removeprefix(f"{RELEASE}/"), k * len(state), len(state))
        for k, name in enumerate(states)
    }
    why = "extra state, empty, which Megatron-Core asks for"
    yield OutputDocument(last, state * len(states), why)
    yield OutputDocument(f"{RELEASE}/{METADATA}", metadata_of(tensors, objects), "the list of tensors")


def _end(piece: Piece[Item]) -> tuple[int, ...]:
    return tuple(a + n for a, n in zip(piece.start, piece.size, strict=True))


def _states(tensors: Mapping[str, Stored], files: Iterable[OutputFile]) -> Iterator[str]:
    """The names of the entries of extra state: of each linear module of each layer and expert one, numbered
    along the axes that stand before those of its weight."""
    axes = {
        c.key: len(c.start) - len(t.shape) for f in files for t, c in zip(f.tensors, f.chunks, strict=True)
    }
    for key, told in tensors.items():
        module = _LINEAR.fullmatch(key)
        if module is None or key.startswith("optimizer."):
            continue
        counts = told.shape[: axes[key]] or (1,)
        for index in product(*map(range, counts)):
            where, of = (".".join(map(str, numbers)) for numbers in (index, counts))
            yield f"{module['module']}_extra_state/shard_{where}_{of}"
