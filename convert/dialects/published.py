"""Originals that are in the Hugging Face layout already: config.json, whole tensors in one file or several,
and tokenizer files. What is published under such names differs in containers, sharding, dtype, stale tensors
and fields, and converting makes one canonical folder of all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.checkpoint.weight_sets import vocabulary_kind
from ckpt_tool.convert.dialects.converted import GENERATION, generation_config
from ckpt_tool.convert.dialects.vocabulary import files_beside_or_asked, in_folder
from ckpt_tool.convert.params import BOOKKEEPING, SET, Facts
from ckpt_tool.convert.plan import Options, OutputDocument, Plan, Value, config_document
from ckpt_tool.convert.source import Source
from ckpt_tool.convert.weave import Table, Written, to_original
from ckpt_tool.errors import CkptToolError

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Fields that would make a loader run code of the download.
CODE = ("auto_map", "trust_remote_code", "custom_pipelines")


def model_type_of(checkpoint: Checkpoint) -> str | None:
    """What config.json says the model is; None without one that says it (planning says why)."""
    if "config.json" not in checkpoint.documents:
        return None
    try:
        found = checkpoint.json("config.json").get("model_type")
    except CkptToolError:
        return None
    return found if isinstance(found, str) else None


def carried(facts: Facts, config: Mapping[str, Value]) -> dict[str, Value]:
    """The other fields of config.json as they are, but for those that ask for code and bookkeeping."""
    left_out = {*config, *BOOKKEEPING, *CODE}
    found = {k: Value(v, f"config.json: {k}") for k, v in (facts.document or {}).items() if k not in left_out}
    return found | {k: Value(v, SET) for k, v in facts.settings.items() if k in found}


def tokenizer_files(checkpoint: Checkpoint, options: Options) -> dict[str, bytes]:
    """Vocabularies count too where another word stands before (`gpt2-vocab.json`); a file that the user names
    stands for those of its folder, since one alone is no tokenizer."""
    return files_beside_or_asked(
        checkpoint, options, _is_tokenizer, lambda path: in_folder(path.parent, _is_tokenizer)
    )


def _is_tokenizer(name: str) -> bool:
    return name in TOKENIZER or vocabulary_kind(name) in ("vocab.json", "merges.txt")


def copied(files: Mapping[str, bytes]) -> list[OutputDocument]:
    """Tokenizer files byte for byte, but for fields that ask for code."""
    made = []
    for name in TOKENIZER:
        if name not in files:
            continue
        content, source = files[name], "copied from beside the weights"
        if name == "tokenizer_config.json":
            fields = parse_object(content, file=name, kind="bad-tokenizer")
            if fields.keys() & set(CODE):
                fields = {k: v for k, v in fields.items() if k not in CODE}
                content = (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
                source += ", without the fields that ask for code"
        made.append(OutputDocument(name, content, source))
    return made


def generation(checkpoint: Checkpoint, config: Mapping[str, Value]) -> OutputDocument:
    """generation_config.json as it is, or what a config stands for without one."""
    if GENERATION not in checkpoint.documents:
        return generation_config(config)
    fields = checkpoint.json(GENERATION)
    fields = {k: v for k, v in fields.items() if k not in (*CODE, "transformers_version")}
    return OutputDocument(GENERATION, _json(fields), f"{GENERATION} beside the weights")


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=True) + "\n").encode()


def weight_file(options: Options, once: Mapping[str, Any], otherwise: str) -> str:
    """The one file to write on the way back: `container` as asked for, else as it was."""
    container = options.family_options.get("container", once.get("container", otherwise))
    return "pytorch_model.bin" if container == "pth" else "model.safetensors"


def container_of(checkpoint: Checkpoint) -> str:
    return "safetensors" if next(iter(checkpoint.files)).endswith(".safetensors") else "pth"


def written(
    family: str,
    source: Source,
    options: Options,
    config: Mapping[str, Value],
    ignored: Mapping[str, str],
) -> Written:
    """What goes beside the tensors in either direction, but for config.json."""
    documents = [
        generation(source.checkpoint, config),
        *copied(tokenizer_files(source.checkpoint, options)),
    ]
    return Written(family, config, documents, ignored)


def to_one_file(table: Table, source: Source, options: Options, beside: Written, file: str) -> Plan:
    """The way back to an original that is one `file` with a config.json and tokenizer files of its own."""
    beside = replace(beside, documents=[config_document(beside.config), *beside.documents])
    homes = [(file, source.dtype)]
    return to_original(table, source, options, beside, files=[file], homes=lambda _: homes)
