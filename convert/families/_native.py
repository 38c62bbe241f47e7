"""Originals that are in the Hugging Face layout already: config.json, whole tensors in one file or several,
and tokenizer files. What is published under such names differs in containers, sharding, dtype, stale tensors
and fields, and converting makes one canonical folder of all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.checkpoint.weight_sets import vocabulary_kind
from ckpt_tool.convert.crosscheck import disagreements
from ckpt_tool.convert.families import _decoder as decoder
from ckpt_tool.convert.families._download import Download, layer_count
from ckpt_tool.convert.families._vocabulary import files_beside_or_asked, in_folder
from ckpt_tool.convert.layout import Rule, expand
from ckpt_tool.convert.params import BOOKKEEPING, SET, Facts
from ckpt_tool.convert.plan import Options, OutputDocument, Plan, Value, assemble, config_document
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all

GENERATION = "generation_config.json"
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
# Fields that would make a loader run code of the download, or that say how its tensors were packed.
CODE = ("auto_map", "trust_remote_code", "custom_pipelines")
PACKED = ("quantization_config", "compression_config")


def model_type_of(checkpoint: Checkpoint) -> str | None:
    """What config.json says the model is; None without one that says it (planning says why)."""
    if "config.json" not in checkpoint.documents:
        return None
    try:
        found = checkpoint.json("config.json").get("model_type")
    except CkptToolError:
        return None
    return found if isinstance(found, str) else None


def open_files(checkpoint: Checkpoint, layer: str) -> Download:
    """The tensors of a model whose layer numbers `layer` finds. Kinds: `missing-tensor`,
    `duplicate-tensor`."""
    tensors: dict[str, tuple[TensorInfo, ...]] = {}
    problems = []
    for t in checkpoint:
        first = tensors.setdefault(t.name, (t,))[0]
        if first is not t:
            message = f"expected each tensor in one file, found it in {first.file} too"
            problems.append(Problem("duplicate-tensor", message, t.file, t.name))
    fail_all(problems)
    if not tensors:
        fail("missing-tensor", "expected the tensors of a model, found none", file=checkpoint.path.name)
    return Download(checkpoint, tensors, 1, layer_count(tensors, layer))


def read_config(
    checkpoint: Checkpoint,
    options: Options,
    *,
    model_type: str,
    architectures: Iterable[str],
    names: Mapping[str, str] | None = None,
) -> Facts:
    """config.json and the user's settings; `names` are those of the family for names that all families know.
    Fails for another model and for packed weights."""
    if "config.json" not in checkpoint.documents:
        fail("missing-file", "expected config.json beside the weights, found none", file=checkpoint.path.name)
    document = checkpoint.json("config.json")
    known = list(architectures)
    found = document.get("architectures") or known[:1]
    problems = []
    for name, value, wanted in (
        ("model_type", document.get("model_type", model_type), model_type),
        ("architectures", found, known[:1]),
    ):
        if value != wanted and not (name == "architectures" and len(value) == 1 and value[0] in known):
            message = f"expected {json.dumps(wanted)}, found {json.dumps(value)[:100]}"
            problems.append(Problem("unsupported", message, "config.json", name))
    for name in PACKED:
        if document.get(name) is not None:
            message = "expected plain tensors, found a way of packing them"
            problems.append(Problem("unsupported", message, "config.json", name))
    fail_all(problems)
    own = {generic: name for name, generic in (names or {}).items()}
    return Facts(document, "config.json", {own.get(k, k): v for k, v in options.settings.items()})


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
        return decoder.generation_config(config)
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


def to_one_file(
    family: str,
    checkpoint: Checkpoint,
    options: Options,
    *,
    file: str,
    rules: Iterable[Rule],
    axes: Mapping[str, int],
    layers: Value,
    layer_number: str,
    sizes: Mapping[str, Value],
    fields: Mapping[str, str],
    ignored: Mapping[str, str],
    config: Mapping[str, Value],
    dtype: str,
) -> Plan:
    """The way back to an original that is one `file` with a config.json and tokenizer files of its own.
    `layer_number` finds a layer's number in a tensor's name; `sizes` are checked against the shapes."""
    held = {t.name: t for t in checkpoint}
    expansion = expand(
        rules,
        axes=axes,
        indices={"i": layers.value},
        original=lambda _: [(file, dtype)],
        converted=lambda name: (held[name].file, held[name].dtype) if name in held else None,
    )
    counted = {"num_hidden_layers": layers}
    wrong_layers = decoder.layer_problems(counted, layer_count(held, layer_number))
    odd = disagreements(expansion.steps, checkpoint, fields, side="targets")
    if odd:
        fail_all([*wrong_layers, *(d.problem(sizes) for d in odd)])
    expansion.problems[:0] = wrong_layers
    return assemble(
        family=family,
        direction="to-original",
        checkpoint=checkpoint,
        expansion=expansion,
        ignored=ignored,
        config=config,
        documents=[
            config_document(config),
            generation(checkpoint, config),
            *copied(tokenizer_files(checkpoint, options)),
        ],
        options=options,
        outputs=[file],
    )
