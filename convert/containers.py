"""The containers that an output file may be written as, each by its own layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from ckpt_tool.checkpoint.safetensors import SafetensorsLayout
from ckpt_tool.convert.plan import OutputFile


class Layout(Protocol):
    """A container that is still to be written, see `SafetensorsLayout`."""

    @property
    def size(self) -> int: ...

    @property
    def offsets(self) -> Mapping[str, int]: ...

    def header_writes(self) -> Iterable[tuple[int, bytes]]: ...

    def finish(self, crcs: Mapping[str, int]) -> Iterable[tuple[int, bytes]]: ...


def layout_of(output: OutputFile) -> Layout:
    tensors = [(t.name, t.dtype, t.shape) for t in output.tensors]
    if output.format == "torch-zip":
        from ckpt_tool.checkpoint.torch_zip_writer import TorchZipLayout

        constants = {name: (dtype, shape, data) for name, dtype, shape, data in output.constants}
        return TorchZipLayout(tensors, dicts=output.dicts, beside=output.beside, constants=constants)
    if output.format == "tf-bundle":
        from ckpt_tool.checkpoint.tf_bundle_writer import BundleLayout

        return BundleLayout(tensors)
    if output.format == "dcp":
        from ckpt_tool.checkpoint.dcp_writer import DistLayout

        pieces = zip(tensors, output.chunks, strict=True)
        return DistLayout([(name, dtype, chunk.shape(shape)) for (name, dtype, shape), chunk in pieces])
    return SafetensorsLayout(tensors, dict(output.metadata))
