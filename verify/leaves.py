"""The leaves of a certificate: one for each tensor, with the SHA-256 of its dense little-endian bytes,
whatever container, strides or archive it lies in. A target leaf can be made in two ways that share nothing:
from the output that holds the tensor, and from the source through the plan's step that makes it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.convert.layout import Step
from ckpt_tool.convert.plan import Plan
from ckpt_tool.verify import merkle
from ckpt_tool.verify.bits import moved

PIECE = 1 << 20  # bytes hashed at a time
Key = tuple[str, str]
Makers = list[tuple[Step, int]]


@dataclass(frozen=True)
class Leaf:
    """`file` and `name` as the checkpoint calls them, `dtype` as safetensors does."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "sha256": self.sha256,
        }


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no blanks and ASCII only: equal values are equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def root(leaves: Iterable[Mapping[str, Any]]) -> str:
    """The Merkle root over leaves in their order, each as canonical JSON."""
    return merkle.root(map(canonical, leaves))


def of_tensors(checkpoint: Checkpoint, tensors: Iterable[TensorInfo]) -> Iterator[Leaf]:
    """The leaves of tensors as `checkpoint` holds them, in the order of (file, name)."""
    for t in sorted(tensors, key=lambda t: (t.file, t.name)):
        yield Leaf(t.file, t.name, t.dtype, t.shape, digest(checkpoint, t))


def digest(checkpoint: Checkpoint, tensor: TensorInfo) -> str:
    made = hashlib.sha256()
    buffer = memoryview(bytearray(min(PIECE, tensor.nbytes)))
    for start in range(0, tensor.nbytes, PIECE):
        piece = buffer[: min(PIECE, tensor.nbytes - start)]
        checkpoint.read_into(tensor, start, piece)
        made.update(piece)
    return made.hexdigest()


def makers(plan: Plan, wanted: Container[Key] | None = None) -> dict[Key, Makers]:
    """The steps that write each tensor of the output (or of those that are `wanted`), each with the number of
    its target, by file and name.
    On the way to the Hugging Face layout the file is "": a name is enough there, and the tensors may have
    been dealt out to other files than this plan's."""
    found: dict[Key, Makers] = defaultdict(list)
    for step in plan.steps:
        if not step.compare:
            for k, part in enumerate(step.targets):
                key = "" if plan.direction == "to-hf" else part.file, part.name
                if wanted is None or key in wanted:
                    found[key].append((step, k))
    return dict(found)


def derived(made_by: Makers, source: Checkpoint, tensor: TensorInfo) -> str:
    """The SHA-256 that a tensor of the output has by the source alone, from the steps that make it. Its bytes
    are put in order in a file without a name, so that memory does not grow with the tensor."""
    with tempfile.TemporaryFile(prefix="ckpt-tool-") as file:
        fill(file, made_by, source, tensor)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def fill(file: IO[bytes], made_by: Makers, source: Checkpoint, tensor: TensorInfo) -> None:
    """Write the dense bytes of `tensor` into an empty file, as these (step, number of its target) make it out
    of `source`."""
    size = DTYPES[tensor.dtype].itemsize
    file.truncate(tensor.nbytes)
    for step, target in made_by:
        inputs = [source.files[p.file].tensors[p.name] for p in step.sources]
        for access, values in moved(step, source, inputs, tensor.dtype):
            if access.part == target:
                _put(file.fileno(), access.runs.offsets(), access.runs.length * size, values)


def _put(descriptor: int, offsets: Iterable[int], length: int, values: np.ndarray) -> None:
    """Write runs of `length` bytes to where they begin, in elements; those that meet are written together."""
    data = np.ascontiguousarray(values).data.cast("B")
    starts = [o * values.itemsize for o in offsets]
    first = 0
    for k in range(1, len(starts) + 1):
        if k == len(starts) or starts[k] != starts[k - 1] + length:
            _write_all(descriptor, data[first * length : k * length], starts[first])
            first = k


def _write_all(descriptor: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)
