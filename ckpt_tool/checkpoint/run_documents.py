"""The documents that training programs put around their checkpoints, in folders and under names of their own.

iter_0000100/run_config.yaml  tokenizer/tokenizer.json      Megatron-Bridge, beside the weights
X.nemo: model_config.yaml  0123...cdef_tokenizer.model      NeMo 1, an archive
weights/  context/model.yaml  io.json  nemo_tokenizer/...   NeMo 2

Source: NVIDIA-NeMo/Megatron-Bridge @067f987d (training/checkpointing.py: save_tokenizer_assets), NeMo v2.4.0
(core/connectors/save_restore_connector.py, lightning/io/mixin.py, artifact/file.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from ckpt_tool.checkpoint.weight_sets import is_document, is_template, is_tokenizer, vocabulary_kind

RUN_CONFIG = "run_config.yaml"  # Megatron-Bridge
MODEL_CONFIG = "model_config.yaml"  # NeMo 1
CONTEXT = "context/"
CONTEXT_MODEL = "context/model.yaml"  # NeMo 2
CONTEXT_IO = "context/io.json"
RUN_DOCUMENTS = (RUN_CONFIG, CONTEXT_MODEL, MODEL_CONFIG)
INTEGRITY = "integrity.json"  # Megatron-Core
SENTENCEPIECE = "tokenizer.model"
_FOLDER = re.compile(r"context|(nemo_|hf_)?tokenizer|[0-9a-f]{40}", re.ASCII)  # the last of a Hub's snapshot
_HASHED = re.compile(r"[0-9a-f]{32}_(?P<name>[^/]+)", re.ASCII)
_BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)


def may_hold_documents(folder: str) -> bool:
    """Whether to look into a folder of this name."""
    return _FOLDER.fullmatch(folder) is not None


def is_run_document(path: str) -> bool:
    """Whether a file of an archive may be one of them, by its path."""
    name = path.rpartition("/")[2]
    hashed = _HASHED.fullmatch(name)
    return (
        name in ("model.yaml", "io.json", RUN_CONFIG, MODEL_CONFIG)
        or hashed is not None
        or (f"/{CONTEXT}" in f"/{path}" and name.endswith(".model"))
    )


def run_documents(paths: Collection[str], within: str) -> dict[str, str]:
    """Those around the weights in the part `within` of a folder (empty, or ending in `/`) that has the files
    `paths`, by the names under which they are listed. Those nearest to the weights count."""
    above = within.rstrip("/").rpartition("/")[0]
    places = dict.fromkeys((within, f"{above}/" if above else ""))
    found = {INTEGRITY: within + INTEGRITY} if within + INTEGRITY in paths else {}
    for place in places:
        inside = {p.removeprefix(place): p for p in sorted(paths) if p.startswith(place)}
        for name in (RUN_CONFIG, MODEL_CONFIG, CONTEXT_MODEL, CONTEXT_IO):
            if name in inside:
                found.setdefault(name, inside[name])
        for short, path in _tokenizers(inside):
            found.setdefault(short, inside[path])
    return found


def _tokenizers(inside: Collection[str]) -> Iterator[tuple[str, str]]:
    """(name to list it under, path) of the files of tokenizers."""
    pieces: dict[str, str] = {}  # of SentencePiece, by what they were called
    for path in inside:
        *folders, name = path.split("/")
        if not all(map(may_hold_documents, folders)):
            continue
        hashed = None if folders else _HASHED.fullmatch(name)
        if not folders and hashed is None:
            continue
        own = name if hashed is None else hashed["name"]
        if own.endswith(".model"):
            pieces.setdefault(own, path)
        elif (kind := vocabulary_kind(own)) is not None:
            yield kind if hashed else own, path
        elif is_tokenizer(own) or own in _BESIDE_TOKENIZER or is_template(own):
            yield own, path
    usual = [p for own, p in pieces.items() if is_document(own)] or list(pieces.values())
    if len(usual) == 1:  # of several nobody knows which is the model's
        yield SENTENCEPIECE, usual[0]
