"""Whether a loader finds the tensors of a Hugging Face folder: the index that lists the shards, and what a
file of safetensors says it was written for. Our own reading takes the tensors where they are; a loader goes
by these.

Measured with transformers 4.37.2, 4.57.6 and 5.23.0: none takes shards without an index; 4.57.6 draws a
tensor at random that the index leaves out; 4 hands a file whose `format` is tf or flax to TensorFlow or Flax,
and 4.37.2 refuses one with another word or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpt_tool.checkpoint.base import TensorFile
from ckpt_tool.checkpoint.safetensors import INDEX_NAME, UNLISTED
from ckpt_tool.checkpoint.weight_sets import TORCH_INDEX
from ckpt_tool.verify.report import Finding, Status
from ckpt_tool.verify.subject import Subject

LEVEL, CHECK = "coverage", "shards"
ALONE = {"model.safetensors": INDEX_NAME, "pytorch_model.bin": TORCH_INDEX}
OTHER_LIBRARIES = ("tf", "flax")


def listed(subject: Subject) -> list[Finding]:
    """The findings about how the output's weight files are found and taken; none where it is no folder in the
    Hugging Face layout."""
    if subject.direction != "to-hf" or not subject.output.path.is_dir():
        return []
    made = [_left_out(text) for text in subject.output.readings if leaves_out(subject, text)]
    return [*made, *_unlisted(subject), *_formats(subject.output.files)]


def leaves_out(subject: Subject, text: str) -> bool:
    """Whether a note of opening the output says that its index lacks tensors, which a loader then lacks."""
    return subject.direction == "to-hf" and any(
        text.startswith(f"{name} {UNLISTED}") for name in ALONE.values()
    )


def _left_out(text: str) -> Finding:
    index, _, rest = text.partition(f" {UNLISTED} ")
    tensors = rest.partition(" that the files hold")[0]
    found = f"expected an entry for each tensor of the files, found none for {tensors}"
    return _finding("fail", f"{found}: transformers 4.57 draws what the index leaves out at random", index)


def _unlisted(subject: Subject) -> Iterator[Finding]:
    """Files that no loader looks for by their names, and that no index lists."""
    for alone, index in ALONE.items():
        end = alone[alone.rindex(".") :]
        named = [name for name in subject.output.files if name.endswith(end) and name != alone]
        if named and index not in subject.output.documents:
            text = f"expected this file, which tells loaders of {named[0]}, found none"
            yield _finding("fail", text, index)


def _formats(files: Mapping[str, TensorFile]) -> Iterator[Finding]:
    said: dict[object, list[str]] = {}
    for name, file in files.items():
        if file.format == "safetensors":
            said.setdefault(file.metadata.get("format"), []).append(name)
    for word, names in said.items():
        where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        if word in OTHER_LIBRARIES:
            text = f"expected format pt in its metadata, found {word}: transformers 4 then reads "
            text += "the tensors in that library's layout"
            yield _finding("fail", text, where)
        elif word != "pt":
            found = "no format" if word is None else f"format {str(word)[:40]}"
            text = f"its metadata has {found}, where transformers 4.37 loads nothing but pt"
            yield _finding("note", text, where)


def _finding(status: Status, message: str, where: str | None = None) -> Finding:
    return Finding(LEVEL, CHECK, status, message, where)
