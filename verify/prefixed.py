"""A Hugging Face folder whose tensors are named without the prefix of their model, as `wte.weight` for
`transformer.wte.weight`: transformers adds it when it loads them (from_pretrained, base_model_prefix), and
the first GPT-2 files have no other names. They are read under the names that the model gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckpt_tool.checkpoint.base import Checkpoint, Record, TensorFile
from ckpt_tool.convert.facts import class_of, classes
from ckpt_tool.errors import CkptToolError

HEADS = ("lm_head.", "cls.", "score.", "classifier.", "qa_outputs.")
NOTE = "tensors are named without `{}`, which transformers adds when it loads them"


def with_prefix(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, or a view of it with the prefix added where config.json names a model with a head and no
    tensor has it."""
    if "config.json" not in checkpoint.documents:
        return checkpoint
    try:
        config = checkpoint.json("config.json")
    except CkptToolError:
        return checkpoint  # whoever needs the config says what is wrong with it
    kind = class_of(config)
    if kind is None:
        return checkpoint
    prefix, words = classes()[kind].prefix, classes()[kind].words
    bare = str(config.get("architectures")).endswith("Model']") and "LMHead" not in str(config)
    names = checkpoint.names()
    if bare or words not in names or any(n.startswith(prefix) for n in names):
        return checkpoint
    files: dict[str, TensorFile] = {name: _Prefixed(file, prefix) for name, file in checkpoint.files.items()}
    notes = [*checkpoint.notes, NOTE.format(prefix)]
    return Checkpoint(checkpoint.path, files, checkpoint.documents, notes)


class _Prefixed(TensorFile):
    """A file whose tensors have longer names."""

    def __init__(self, file: TensorFile, prefix: str) -> None:
        self.path, self.name, self.format, self.metadata = file.path, file.name, file.format, file.metadata
        self.imports, self.notes = file.imports, file.notes
        self._file = file
        self._own = {n if n.startswith(HEADS) else prefix + n: n for n in file.tensors}
        self.tensors = {new: replace(file.tensors[own], name=new) for new, own in self._own.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._file.read_into(self._own[name], offset, buffer)

    def extent(self, name: str) -> tuple[int, int] | None:
        return self._file.extent(self._own[name])

    def records(self) -> Mapping[str, Record]:
        return self._file.records()

    def record_of(self, name: str) -> tuple[str, int] | None:
        return self._file.record_of(self._own[name])

    def check_record(self, key: str) -> bool:
        return self._file.check_record(key)

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()
