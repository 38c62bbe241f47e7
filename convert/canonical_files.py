"""The files beside the weights of a model that is in the Hugging Face layout already: as they are, but for
what the user says otherwise, and for what no loader takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.checkpoint.weight_sets import BESIDE, PROCESSORS, is_template, is_tokenizer, vocabulary_kind
from ckpt_tool.convert.facts import class_of
from ckpt_tool.convert.facts_classes import CODE, Class
from ckpt_tool.convert.facts_settings import overlaid
from ckpt_tool.convert.in_parts import OneRow, in_its_parts
from ckpt_tool.convert.params import SET, shown
from ckpt_tool.convert.plan import Options, OutputDocument, Value
from ckpt_tool.convert.quantised_view import packing_beside
from ckpt_tool.convert.source import Source, dtype_said, no_dtype
from ckpt_tool.convert.weave import Held
from ckpt_tool.convert.widths import CASTABLE, DTYPE_KEYS


def config_of(
    checkpoint: Checkpoint, options: Options, held: Held, own: Class
) -> tuple[dict[str, Value], list[OutputDocument], list[str]]:
    """config.json as it is, byte for byte, unless the user says otherwise: --dtype, or --dequantize, whose
    numbers loaders would round to a dtype that is said of the others; or unless nothing is loaded by what it
    says."""
    before = checkpoint.json("config.json")
    asked = options.settings
    out = {k for k, v in asked.items() if v is None and k not in held.facts.settings}  # left out as told
    settings = {k: v for k, v in asked.items() if k not in out}
    made = overlaid({k: v for k, v in before.items() if k not in out}, settings)
    made = {**packing_beside(checkpoint), **{k: v for k, v in made.items() if k not in CODE}}
    otherwise = {**_dtype(made, options, held.source), **_model_type(made)}
    notes = [
        f"{k}: {shown(made.get(k))} {_why(k, made, held.source)}; {v.value} is written ({v.source})"
        for k, v in otherwise.items()
        if not v.source.startswith("--") and made.get(k) != v.value
    ]
    made |= {k: v.value for k, v in otherwise.items()}
    values = {k: Value(v, SET if k in settings else f"config.json: {k}") for k, v in made.items()} | otherwise
    document = checkpoint.documents["config.json"]
    if made == before:
        stored = document.stored if isinstance(document, OneRow) else document
        return values, [OutputDocument("config.json", stored.read(), "as it is")], []
    changed = sorted(
        k for k in {*before, *made} if before.get(k) != made.get(k) or (k in before) != (k in made)
    )
    if isinstance(document, OneRow) and own.parts is not None:
        made = in_its_parts(document, made, changed, own.parts)
    text = json.dumps(made, indent=2, ensure_ascii=True) + "\n"
    source = f"config.json, but for {', '.join(changed)}"
    return values, [OutputDocument("config.json", text.encode(), source)], notes


def _dtype(config: Mapping[str, Any], options: Options, source: Source) -> dict[str, Value]:
    """That which is asked for, or where what `config` says is none or two, that of the tensors."""
    names = [k for k in DTYPE_KEYS if k in config]
    flag = "--dequantize" if options.dtype is None else "--dtype"
    dtype = options.dtype if options.dequantize is None else options.dtype or source.dtype
    if dtype is not None:
        return dict.fromkeys(names or ["torch_dtype"], Value(DTYPES[dtype].torch, flag))
    own = Value(DTYPES[source.dtype].torch, "dtype of the tensors")
    said = {str(dtype_said(config[k])) for k in names if config[k] is not None}
    two = len(said) > 1 and source.dtype in CASTABLE  # each release reads another
    return {k: own for k in names if two or no_dtype(config[k], source)}


def _why(key: str, config: Mapping[str, Any], source: Source) -> str:
    """Why what `config` says under `key` is not written."""
    if key in DTYPE_KEYS and not no_dtype(config[key], source):
        return "is not what the other key says, and each release reads one of them first"
    return "is nothing that a model is loaded by"


def _model_type(config: Mapping[str, Any]) -> dict[str, Value]:
    """That of the class that `architectures` names, where the one that is said is of none."""
    kind = class_of(config)
    own = Value(kind, "config.json: architectures")
    return {} if kind is None or config.get("model_type") == kind else {"model_type": own}


def files_beside(checkpoint: Checkpoint) -> Iterator[OutputDocument]:
    """Tokenizer files and the like as they are, but for fields that ask for code."""
    for name, document in checkpoint.documents.items():
        if not (name in BESIDE or is_template(name) or is_tokenizer(name) or vocabulary_kind(name) == name):
            continue
        content, source = document.read(), "copied from beside the weights"
        if name in ("tokenizer_config.json", "generation_config.json", *PROCESSORS):
            fields = parse_object(content, file=name, kind="bad-tokenizer")
            if fields.keys() & {*CODE}:
                fields = {k: v for k, v in fields.items() if k not in CODE}
                content = (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
                source += ", without the fields that ask for code"
        yield OutputDocument(name, content, source)
