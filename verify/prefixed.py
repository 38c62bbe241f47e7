"""A Hugging Face folder whose tensors are named without the prefix of their model, as `wte.weight` for
`transformer.wte.weight`: transformers adds it when it loads them (from_pretrained, base_model_prefix), and
the first GPT-2 files have no other names. They are read under the names that the model gives them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, Renamed, TensorFile
from ckpt_tool.convert.facts import class_of, classes
from ckpt_tool.errors import CkptToolError

HEADS = ("lm_head.", "cls.", "score.", "classifier.", "qa_outputs.")
NOTE = "tensors are named without `{}`, which transformers adds when it loads them"


def without_head(config: Mapping[str, Any]) -> bool:
    """Whether config.json names a model alone, whose tensors have no prefix."""
    return str(config.get("architectures")).endswith("Model']") and "LMHead" not in str(config)


def is_bare(checkpoint: Checkpoint) -> bool:
    """Whether it is such a model, told by its embedding."""
    config = checkpoint.json("config.json")
    kind = class_of(config) if without_head(config) else None
    return kind is not None and classes()[kind].words in checkpoint.names()


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
    names = checkpoint.names()
    if without_head(config) or words not in names or any(n.startswith(prefix) for n in names):
        return checkpoint
    return _renamed(checkpoint, prefix)


def whole(checkpoint: Checkpoint, targets: Collection[str]) -> Checkpoint:
    """`checkpoint`, or, where it is a model without the head of the plan that writes `targets`, a view of it
    with the names that a class with the head reads: transformers adds the prefix then too."""
    if not is_bare(checkpoint):
        return checkpoint
    kind = class_of(checkpoint.json("config.json"))
    assert kind is not None
    prefix, words = classes()[kind].prefix, classes()[kind].words
    return _renamed(checkpoint, prefix) if prefix + words in targets else checkpoint


def _renamed(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    files: dict[str, TensorFile] = {
        name: Renamed(file, {n if n.startswith(HEADS) else prefix + n: n for n in file.tensors})
        for name, file in checkpoint.files.items()
    }
    return checkpoint.with_files(files, NOTE.format(prefix))
