"""metaseq's decoders: `reshard-model_part-K.pt`, one for each model-parallel rank, or one file of any name;
the model under a prefix of its age, its settings beside it, and a number that says which format it is.

Source: facebookresearch/metaseq @f7ffa5fd (models/transformer.py, scripts/convert_to_singleton.py,
launcher/opt_job_constants.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import compress, repeat
from typing import Any

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.convert.crosscheck import rank_problems
from ckpt_tool.convert.dialects.converted import generation_config, kept_facts, read_config
from ckpt_tool.convert.dialects.metaseq_settings import unread
from ckpt_tool.convert.dialects.published import tokenizer_files
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule
from ckpt_tool.convert.numbers import TIE, Class, Field, Known, Size, table_of
from ckpt_tool.convert.options import SHARDS
from ckpt_tool.convert.params import NO_CONFIG, Facts, left_out, overridden, shown
from ckpt_tool.convert.plan import Options, OutputDocument, OutputFile, Plan, natural
from ckpt_tool.convert.source import Source, layer_count, whole_tensors
from ckpt_tool.convert.tokenizers import original_tokenizer_documents, tokenizer_documents
from ckpt_tool.convert.vocabularies import Vocabulary as Vocabulary
from ckpt_tool.convert.weave import Held, Written, to_hf, to_original
from ckpt_tool.convert.widths import CASTABLE
from ckpt_tool.errors import Problem, fail, fail_all, printable
from ckpt_tool.records import dataclass


@dataclass(frozen=True)
class Form:
    """What metaseq's files differ in: query, key and value in one tensor, projections between the widths of a
    word and of the model, a norm after the last layer; `head`: the output layer is stored too, "whole" or as
    a "share"; `unties`: it has values of its own, which only a model in the Hugging Face layout may have."""

    fused: bool
    projected: bool
    norm: bool
    head: str | None = None
    unties: bool = False


@dataclass(frozen=True)
class Decoder:
    """A family that metaseq trained. `settings` are the fields by metaseq's names, as the way back writes
    them, with `computed`, settings whose other values would compute something that the family does not;
    `sizes` are the fields that config.json and the original share, `ids` those of special tokens, which the
    tokenizer may know better. `shared` are the fields whose values the ranks share out."""

    name: str
    title: str  # as people call it
    architecture: str
    model_type: str
    config: Class
    fields: Mapping[str, Field]
    sizes: Sequence[str]
    ids: Sequence[str]
    rows: Callable[[Form], Sequence[Rule]]
    axes: Mapping[str, Size]
    settings: Mapping[str, str]
    computed: Mapping[str, Any]
    shared: Sequence[str]


def family(*, summary: str, vocabulary: Vocabulary, **said: Any) -> Family:
    """The record of a family; `said` are the parts of `Decoder`."""
    d = Decoder(**said)
    return Family(
        name=d.name,
        summary=summary,
        architectures=(d.architecture,),
        recognise=recognise,
        plan=partial(plan, d),
        plan_original=partial(plan_original, d),
        held=partial(held, d),
        options=(SHARDS,),
        vocabulary=vocabulary,
        classes={d.model_type: d.config},
        tensors=("decoder.layers.0.self_attn_layer_norm.weight", "decoder.embed_positions.weight"),
    )


def recognise(checkpoint: Checkpoint) -> tuple[bool, str]:
    prefix = prefix_of(checkpoint.names())
    if prefix is None or f"{prefix}layers.0.self_attn_layer_norm.weight" not in checkpoint:
        sharded = any("shard_metadata" in f.metadata for f in checkpoint.files.values())
        return False, "FSDP shards of metaseq" if sharded else "no layers.0.self_attn_layer_norm.weight"
    if is_converted(checkpoint, prefix, checkpoint):
        return False, "the tensors have Hugging Face names already"
    if f"{prefix}embed_positions.weight" not in checkpoint:
        return False, "no learned positions"
    return True, "names of metaseq's decoder with learned positions"


VERSION = "version"
IGNORED = {
    rf"(.*\.)?{VERSION}": "the version of metaseq's format, 3 in every OPT",
    r"(last_optimizer_state|optimizer_history|extra_state)\..*": "state of the training run",
}

# --- the original's files -------------------------------------------------------------------------------


def prefix_of(names: Collection[str]) -> str | None:
    """What stands before every name of the model; None when these are no names of metaseq's."""
    words = "embed_tokens.weight"
    found = {n.removesuffix(words) for n in compress(names, map(str.endswith, names, repeat(words)))}
    return found.pop() if len(found) == 1 else None


def is_converted(checkpoint: Checkpoint, prefix: str, names: Container[str]) -> bool:
    """Most names are the same on both sides; those of the last norm and the projections are not."""
    if "config.json" in checkpoint.documents:
        return True
    return any(f"{prefix}{n}.weight" in names for n in ("final_layer_norm", "project_in"))


def form_of(source: Source) -> Form:
    head, words = source.first("output_projection.weight"), source.first("embed_tokens.weight")
    whole = head is not None and words is not None and head.shape[:1] != words.shape[:1]
    return Form(
        fused="layers.0.self_attn.qkv_proj.weight" in source.tensors,
        projected="project_in_dim.weight" in source.tensors,
        norm="layer_norm.weight" in source.tensors,
        head=None if head is None else "whole" if whole else "share",
    )


def open_original(checkpoint: Checkpoint) -> Source:
    """Sort out the files. Kinds: `already-converted`, `unsupported`, `shard-conflict`, `missing-shard`."""
    label, names = checkpoint.path.name, set(checkpoint.names())
    prefix = prefix_of(names)
    if prefix is None:
        sharded = any("shard_metadata" in f.metadata for f in checkpoint.files.values())
        if sharded:
            hint = "metaseq's scripts/reshard_fsdp.py joins them to one file for each model-parallel rank"
            fail("unsupported", "expected joined files, found FSDP shards", file=label, hint=hint)
        fail("missing-tensor", "expected this tensor, found none", where="decoder.embed_tokens.weight")
    if is_converted(checkpoint, prefix, names):
        message = "expected metaseq's layout, found that of Hugging Face"
        fail("already-converted", message, file=label, hint=NO_CONFIG)
    files = sorted(checkpoint.files, key=natural)
    tensors: dict[str, tuple[TensorInfo, ...]] = {}
    for file in files:
        for name, tensor in checkpoint.files[file].tensors.items():
            if name.startswith(prefix):
                short = name.removeprefix(prefix)
                tensors[short] = (*tensors.get(short, ()), tensor)
    if len(files) > 1:
        by_file = {f: _of_model(checkpoint.files[f].tensors, prefix) for f in files}
        fail_all(rank_problems(files, by_file))
    layer = r"layers\.(\d+)\."
    told = settings_of(checkpoint, files)
    source = Source(checkpoint, tensors, len(files), layer_count(tensors, layer), told, prefix, layer=layer)
    _check_ranks(source)
    return source


def _of_model(tensors: Mapping[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    return {n: t for n, t in tensors.items() if n.startswith(prefix)}


def settings_of(checkpoint: Checkpoint, files: Sequence[str]) -> dict[str, Any] | None:
    """What `cfg` or, before it, `args` of the first file say about the model; None where there is neither.
    References to other settings ("${...}") say nothing."""
    from ckpt_tool.checkpoint.pickle_records import plain  # loaded with a file that has some

    metadata = checkpoint.files[files[0]].metadata
    found: dict[str, Any] = {}
    for key in ("args", "cfg"):
        value = plain(metadata.get(key))
        inner = value.get("model") if isinstance(value, dict) else None
        for part in (value, inner):
            if isinstance(part, dict):
                found |= {
                    k: v
                    for k, v in part.items()
                    if isinstance(v, int | float | str) and not (isinstance(v, str) and "${" in v)
                }
    return found or None


def _check_ranks(source: Source) -> None:
    """The output projection of a rank has columns for its heads, so it tells how many ranks there are."""
    found = source.first("layers.0.self_attn.out_proj.weight")
    if found is None or len(found.shape) != 2 or not found.shape[1] or found.shape[0] % found.shape[1]:
        return
    ranks = found.shape[0] // found.shape[1]
    if ranks != source.ranks:
        missing = ranks > source.ranks
        fail(
            "missing-shard" if missing else "shard-conflict",
            f"expected {ranks} parts (each has 1/{ranks} of the heads), found {source.ranks}: "
            f"{', '.join(list(source.checkpoint.files)[:16])}",
            file=source.checkpoint.path.name,
            hint="download what is missing too" if missing else None,
        )


# --- the two directions ---------------------------------------------------------------------------------


def plan(d: Decoder, checkpoint: Checkpoint, options: Options) -> Plan:
    source = open_original(checkpoint)
    facts = read_settings(d, source.told, options)
    for key, wanted in d.computed.items():
        found = (facts.document or {}).get(key, wanted)
        if found != wanted:
            facts.refuse("unsupported", f"expected {json.dumps(wanted)}, found {json.dumps(found)}", key)
    known = Known(d.fields, facts, source, options)
    config = known.values([n for n in d.fields if n not in d.ids])
    facts.check_settings(d.fields)
    facts.check()
    lengths = ("vocab_size", "max_position_embeddings")
    tokenizer = tokenizer_documents(
        tokenizer_files(checkpoint, options),
        family=d.name,
        config={n: config[n].value for n in lengths},
    )
    known.told = tokenizer.facts
    config |= known.values(d.ids)
    facts.check()
    fail_all(share_problems(d, known, source.ranks))
    beside = Written(
        d.name,
        config,
        [
            generation_config(config),
            *(OutputDocument(n, b, "the download's vocabulary") for n, b in tokenizer.documents.items()),
        ],
        IGNORED,
        [*facts.notes, *tokenizer.notes],
        kept(source),
    )
    return to_hf(table_of(known, d.rows(form_of(source)), d.axes), source, options, beside)


def read_settings(d: Decoder, told: Mapping[str, Any] | None, options: Options) -> Facts:
    """The settings of the run, but for those that the user sets to null; what nobody reads and may change the
    numbers is refused by name."""
    keys = {k for f in d.fields.values() if isinstance(f.keys, tuple) for k in f.keys}
    found = dict(unread(told or {}, {*keys, *d.settings, *d.computed}))
    out = {k for k in found if k in options.settings and options.settings[k] is None}
    left = None if told is None else {k: v for k, v in told.items() if k not in out}
    facts = Facts(left, "cfg", {k: v for k, v in options.settings.items() if k not in out})
    facts.notes += [left_out("cfg", k, found[k]) for k in sorted(out)]
    for key in sorted(found.keys() - out):
        message = f"expected settings that {d.title} reads or that change nothing, found {shown(found[key])}"
        hint = f"--set {printable(key)}=null leaves it out, if it changes nothing"
        facts.refuse("unsupported", message, printable(key), hint)
    return facts


def share_problems(d: Decoder, known: Known, ranks: int) -> list[Problem]:
    heads, width = known.value("num_attention_heads"), known["hidden_size"]
    wanted = [(width, heads.value, f"{heads.value} heads ({heads.source})", "num_attention_heads")]
    wanted += [(known[n], ranks, f"{ranks} model-parallel parts", n) for n in d.shared]
    return [
        Problem(
            "config-mismatch",
            f"expected {value} to divide by {what}, found a rest",
            where=name,
            hint=overridden(name),
        )
        for value, by, what, name in wanted
        if value % by
    ]


def kept(source: Source) -> dict[str, Any]:
    """How the files were, for the way back."""
    versions = source.tensors.get(VERSION, ())
    form = form_of(source)
    return {
        "files": sorted(source.checkpoint.files, key=natural),
        "prefix": _nested(source),
        "fused": form.fused,
        "head": form.head,
        "version": versions[0].dtype if versions else None,
    }


def plan_original(d: Decoder, checkpoint: Checkpoint, options: Options) -> Plan:
    """Parts as metaseq's training of `options.shards` model-parallel ranks would have saved them, with the
    names and the arrangement of the original where the manifest knows them."""
    facts = read_config(checkpoint, options.settings, (d.architecture,), own=d.config)
    source = converted_model(checkpoint)
    once = _kept(d, checkpoint)
    form = _form_there(source, once)
    known = Known(d.fields, facts, source, options, d.config, once, back=True)
    sizes = known.values(d.sizes)
    always = known.values(n for n, f in d.fields.items() if f.fixed)
    facts.check_settings({*sizes, *always})
    facts.check()
    fail_all(share_problems(d, known, options.shards))
    files = part_names(options.shards, once)
    prefix = once.get("prefix", "model.decoder.")
    vocabulary = original_tokenizer_documents(tokenizer_files(checkpoint, options), family=d.name)
    notes = [] if vocabulary else ["no vocabulary file is there; none was written"]
    beside = Written(
        d.name,
        sizes,
        [OutputDocument(_own_name(n), b, "the vocabulary in the folder") for n, b in vocabulary.items()],
        {},
        [*facts.notes, *notes],
    )
    made = to_original(
        table_of(known, d.rows(form), d.axes),
        source,
        options,
        beside,
        files=files,
        homes=lambda name: [(f, source.dtype, prefix + name) for f in files],
    )
    version = once.get("version", source.dtype)
    settings = {key: known[name] for key, name in d.settings.items()}
    settings |= {k: v for k, v in d.computed.items() if v}
    return replace(made, outputs=tuple(_as_saved(f, prefix, settings, version) for f in made.outputs))


def held(d: Decoder, checkpoint: Checkpoint, options: Options, architecture: str) -> Held:
    """See `Family.held`."""
    facts = read_config(checkpoint, options.settings, (architecture,), own=d.config)
    source = converted_model(checkpoint)
    known = Known(d.fields, facts, source, options, d.config, {}, back=True)
    said = {**(facts.document or {}), **facts.settings}
    form = replace(_form_there(source), unties=said.get(TIE) is False and "lm_head.weight" in source.tensors)
    return Held(table_of(known, d.rows(form), d.axes), source, facts)


def _form_there(source: Source, once: Mapping[str, Any] | None = None) -> Form:
    """That of a converted model, and what the manifest says of the original's."""
    kept = once or {}
    return Form(
        fused=bool(kept.get("fused", True)),
        projected="model.decoder.project_in.weight" in source.tensors,
        norm="model.decoder.final_layer_norm.weight" in source.tensors,
        head=kept.get("head"),
    )


def _own_name(name: str) -> str:
    """What metaseq calls a file of the vocabulary."""
    return f"gpt2-{name}" if name in ("vocab.json", "merges.txt") else name


def converted_model(checkpoint: Checkpoint) -> Source:
    """Tensors by the names of the whole model; those of the model without its head lack the first word."""
    bare = not any(n.startswith("model.") for n in checkpoint.names())

    def full(name: str) -> str:
        return f"model.{name}" if bare and name.startswith("decoder.") else name

    return whole_tensors(checkpoint, r"model\.decoder\.layers\.(\d+)\.", full)


def _kept(d: Decoder, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the manifest says of the original's arrangement; `bad-config` where it cannot be that."""
    once = kept_facts(checkpoint)
    sound: dict[str, Callable[[Any], object]] = {
        "prefix": lambda x: isinstance(x, str) and re.fullmatch(r"(?:[a-z_]{1,20}\.){0,3}", x, re.ASCII),
        "head": lambda x: x in (None, "whole", "share"),
        "version": lambda x: x is None or (isinstance(x, str) and x in CASTABLE),
    }
    for key, holds in sound.items():
        if key in once and not holds(once[key]):
            message = f"expected what a conversion of {d.title} records, found {once[key]!r}"
            fail("bad-config", printable(message, 200), file="ckpt-tool.json", where=f"original.{key}")
    return once


def _nested(source: Source) -> str:
    """What stands before the names of the way back: the dict `model` also where a training program's wrapper
    was taken off, as the settings that the file has stand beside it."""
    beside = source.told is not None and not source.prefix.startswith("model.")
    return f"model.{source.prefix}" if beside else source.prefix


def part_names(shards: int, once: Mapping[str, Any]) -> list[str]:
    names = once.get("files")
    usable = isinstance(names, list) and len(names) == shards
    if usable and all(isinstance(n, str) and re.fullmatch(r"[\w.-]{1,80}\.pt", n) for n in names or ()):
        return list(names or ())
    return [f"reshard-model_part-{k}.pt" for k in range(shards)]


def _as_saved(file: OutputFile, prefix: str, settings: Mapping[str, Any], version: str | None) -> OutputFile:
    """`file` with what stands around the tensors: the dict of the model, its settings, its version."""
    nested = prefix.startswith("model.")
    constants = () if version is None else ((prefix + VERSION, version, (1,), _three(version)),)
    model = {"_name": "transformer_lm", **settings}
    beside = {"cfg": {"_name": None, "model": model}} if nested else {}
    return replace(file, dicts=("model",) if nested else (), beside=beside, constants=constants)


def _three(dtype: str) -> bytes:
    """The number 3 in `dtype`."""
    import numpy as np

    from ckpt_tool.convert.casting import cast

    out = np.empty(1, dtype=DTYPES[dtype].bits)
    cast(np.array([3.0]).view(DTYPES["F64"].bits), "F64", dtype, out)
    return out.tobytes()
