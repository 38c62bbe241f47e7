"""The files of an output folder by name, and what those that nobody planned are to a loader.

The rules are those of from_pretrained (transformers, peft) and of servers that choose among several sets of
weights; a file that no loader looks for is named, not failed."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ckpt_tool.records import dataclass

MAX_FILES = 10_000
MAX_DEPTH = 6

# What loaders take, by how a name (in lower case) looks at the top of the folder, and what it does.
_LOADABLE = tuple((re.compile(pattern), what) for pattern, what in (
    (r"adapter_config\.json|adapter_model.*", "an adapter that is put on top of the weights"),
    (r".*\.(py|pyc|pyd|so|dll|dylib)", "code"),
    (r".*\.(pkl|pickle|joblib|dill|npy|npz|mar|nemo)", "a pickle that can run code when it is loaded"),
    (r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|tflite|distcp)",
     "weights that were not compared"),
    (r".*\.(safetensors|bin|h5|msgpack)\.index.*\.json", "an index of other weights"),
    (r"(quantize|quant|hf_quant|quantization)_config\.json|quant_strategy\.json",
     "a quantization of the weights"),
    (r"(video_|image_)?(pre)?processor_config\.json|feature_extractor_config\.json", "a processor of inputs"),
    (r"config\.yaml|params\.json|model_index\.json|tf_model\..*|flax_model\..*",
     "another model's description"),
    (r"config\.\d+\.\d+\.\d+\.json", "a configuration for other releases of a library"),
    (r"(added_tokens|special_tokens_map|tokenizer[\w.-]*|vocab[\w.-]*|tekken)\.(json|model|vocab)"
     r"|([\w.-]*[-_.])?(vocab|merges)\.txt|dict\.txt|generation_config\.json"
     r"|.*\.(spm|tiktoken)|sentencepiece\.bpe\.model|tokenizer\.model.*|spiece\.model|source\.spm",
     "a part of a tokenizer that was not compared"),
    (r"chat_template.*", "a chat template that was not compared"),
))  # fmt: skip
# Of a trainer: no reader of models takes them, though their names look like weights.
_TRAINING = re.compile(
    r"training_args\.bin|optimizer(_\d+)?\.(bin|pt)|scheduler\.(bin|pt)|scaler\.(bin|pt)|rng_state.*\.pth"
    r"|trainer_state\.json|config_sentence_transformers\.json|sentence_[\w]*config\.json"
)
# Folders whose files a loader of the folder above takes.
_ENTERED = ("custom_generate/", "additional_chat_templates/")


@dataclass(frozen=True)
class Listing:
    """Names below a folder, with `/`, links to folders and hidden folders named but not entered. `complete`
    says that no bound was met."""

    names: tuple[str, ...]
    complete: bool


def listing(folder: Path) -> Listing:
    """What lies in `folder`; nothing where it is not one. Nothing is opened."""
    if not folder.is_dir():
        return Listing((), True)
    names: list[str] = []
    complete = True
    waiting = [("", 0)]
    while waiting:
        within, depth = waiting.pop()
        try:
            entries = sorted(os.scandir(folder / within), key=lambda e: e.name)
        except OSError:
            complete = False
            continue
        for entry in entries:
            name = within + entry.name
            if len(names) >= MAX_FILES:
                return Listing(tuple(names), False)
            if not entry.is_dir(follow_symlinks=False):
                names.append(name + "/" if entry.is_symlink() and _leads_to_folder(entry) else name)
            elif entry.name.startswith(".") or depth >= MAX_DEPTH:
                names.append(name + "/")
                complete = complete and entry.name.startswith(".")
            else:
                waiting.append((name + "/", depth + 1))
    return Listing(tuple(names), complete)


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_dir()
    except OSError:  # a link in a circle
        return False


@dataclass(frozen=True)
class Stranger:
    """A file that nobody planned; `loaded` says what it is to a loader, None where none takes it."""

    name: str
    loaded: str | None


def strangers(names: Iterable[str], known: Collection[str]) -> Iterator[Stranger]:
    """Every one of `names` that is not `known`."""
    for name in names:
        if name in known:
            continue
        yield Stranger(name, taken_for(name))


def taken_for(name: str) -> str | None:
    """What a file is to a loader, by its name below the folder; None where none takes it."""
    name = base = name.lower()
    if name in _ENTERED:  # a link, whose files are not listed
        return "a link to a folder that a loader looks into"
    for folder in _ENTERED:
        base = base.removeprefix(folder)
    if "/" in base or _TRAINING.fullmatch(base):
        return None
    if base is not name and name.startswith("additional_chat_templates/"):
        return "a chat template that was not compared"
    return next((what for pattern, what in _LOADABLE if pattern.fullmatch(base)), None)
