"""OPT as metaseq saved it: `reshard-model_part-K.pt`, one for each model-parallel rank, or one file called
`reshard.pt` (350m) or `restored.pt`.

Source: facebookresearch/metaseq @f7ffa5fd (models/transformer.py, scripts/convert_to_singleton.py,
launcher/opt_job_constants.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint
from ckpt_tool.convert.casting import CASTABLE, cast
from ckpt_tool.convert.dialects.converted import generation_config, kept_facts, read_config
from ckpt_tool.convert.dialects.metaseq import (
    IGNORED,
    IGNORED_HF,
    PROJECTIONS,
    VERSION,
    Form,
    form_of,
    is_converted,
    open_original,
    prefix_of,
)
from ckpt_tool.convert.dialects.published import tokenizer_files
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.options import SHARDS
from ckpt_tool.convert.params import Facts
from ckpt_tool.convert.plan import Options, OutputDocument, OutputFile, Plan, Value, natural
from ckpt_tool.convert.source import Source, dtype_value, whole_tensors
from ckpt_tool.convert.tokenizers import original_tokenizer_documents, tokenizer_documents
from ckpt_tool.convert.vocabularies import Vocabulary
from ckpt_tool.convert.weave import Table, Written, to_hf, to_original
from ckpt_tool.errors import Problem, fail, fail_all, printable

ARCHITECTURE = "OPTForCausalLM"
RULES = Form(fused=True, projected=False, norm=True).table()

# The config value behind each axis.
FIELDS = {
    "x": "hidden_size",
    "d": "hidden_size",
    "e": "word_embed_proj_dim",
    "f": "ffn_dim",
    "v": "vocab_size",
    "p": "max_position_embeddings",
}
OFFSET = 2  # rows of the table of positions before that of the first token
# (layers, width, width of a word, feed-forward width, positions, words) -> name, heads
PUBLISHED = {
    (layers, d, e, 4 * d, 2048, 50272): (name, heads)
    for name, layers, d, e, heads in (
        ("125m", 12, 768, 768, 12),
        ("350m", 24, 1024, 512, 16),
        ("1.3b", 24, 2048, 2048, 32),
        ("2.7b", 32, 2560, 2560, 32),
        ("6.7b", 32, 4096, 4096, 32),
        ("13b", 40, 5120, 5120, 40),
        ("30b", 48, 7168, 7168, 56),
        ("66b", 64, 9216, 9216, 72),
        ("175b", 96, 12288, 12288, 96),
    )
}
# Settings of metaseq whose other values compute something that OPT does not.
COMPUTED = {
    "share_decoder_input_output_embed": True,
    "no_scale_embedding": True,
    "decoder_learned_pos": True,
    "decoder_learned_sinusoidal": False,
    "alibi": False,
    "disable_bias": False,
    "disable_affine_ln": False,
}
FREE: dict[str, Any] = {
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "layerdrop": 0.0,
    "init_std": 0.02,
    "use_cache": True,
}
IDS = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}


def recognise(checkpoint: Checkpoint) -> tuple[bool, str]:
    names = set(checkpoint.names())
    prefix = prefix_of(names)
    if prefix is None or f"{prefix}layers.0.self_attn_layer_norm.weight" not in names:
        sharded = any("shard_metadata" in f.metadata for f in checkpoint.files.values())
        return False, "FSDP shards of metaseq" if sharded else "no layers.0.self_attn_layer_norm.weight"
    if is_converted(checkpoint, prefix, names):
        return False, "the tensors have Hugging Face names already"
    if f"{prefix}embed_positions.weight" not in names:
        return False, "no learned positions"
    return True, "names of metaseq's decoder with learned positions"


# --- numbers --------------------------------------------------------------------------------------------


def dimensions(original: Source, facts: Facts) -> dict[str, Value]:
    """Sizes by Hugging Face name: what settings or user say, else what the tensors have."""
    d = original
    rows = d.size("embed_positions.weight", 0, shared=False)
    fused = "qkv_proj" if form_of(original).fused else "k_proj"
    measured = {
        "num_hidden_layers": ("decoder_layers", Value(d.layers, "layers in the tensor names")),
        "hidden_size": ("decoder_embed_dim", d.size("embed_positions.weight", 1, shared=False)),
        "word_embed_proj_dim": ("decoder_input_dim", d.size("embed_tokens.weight", 1, shared=False)),
        "ffn_dim": ("decoder_ffn_embed_dim", d.size("layers.{i}.fc1.weight", 0)),
        "vocab_size": ("vocab_size", d.size("embed_tokens.weight", 0)),
        "max_position_embeddings": (
            "max_target_positions",
            None if rows is None else Value(rows.value - OFFSET, f"{rows.source}, less {OFFSET}"),
        ),
    }
    found = {n: facts.integer(n, key, rule=value) for n, (key, value) in measured.items()}
    facts.check()
    key = tuple(
        found[n].value
        for n in (
            "num_hidden_layers",
            "hidden_size",
            "word_embed_proj_dim",
            "ffn_dim",
            "max_position_embeddings",
            "vocab_size",
        )
    )
    known = PUBLISHED.get(key)
    table = None if known is None else f"rule: all sizes are those of OPT {known[0]}"
    found["num_attention_heads"] = facts.integer(
        "num_attention_heads",
        "decoder_attention_heads",
        rule=None if known is None or table is None else Value(known[1], table),
        ask=f"the number of attention heads ({fused} does not tell)",
    )
    found["activation_function"] = activation(facts, table)
    found["do_layer_norm_before"] = norms_first(original, facts, table)
    facts.check()
    return found


def activation(facts: Facts, table: str | None) -> Value:
    """metaseq's own `gelu` is no answer: it was the exact one at first, and later the tanh form."""
    rule_ = None if table is None else Value("relu", table)
    ask = "the activation of the feed-forward, such as relu"
    own = (facts.document or {}).get("activation_fn")
    keys = () if own is not None and own != "relu" else ("activation_fn",)
    if own is not None and own != "relu":
        rule_, ask = None, f"its Hugging Face name, as activation_fn {own} has meant different things"
    found = facts.anything("activation_function", *keys, rule=rule_, ask=ask)
    if not isinstance(found.value, str | int) or isinstance(found.value, bool):
        facts.refuse("bad-config", f"expected a name, found {json.dumps(found.value)[:40]}", "activation_fn")
    return found


def norms_first(original: Source, facts: Facts, table: str | None) -> Value:
    """A model whose norms come before each branch has one more at the end; without it some readers of old
    files computed nonsense (metaseq #164), so its absence must be meant."""
    there = form_of(original).norm
    name = "do_layer_norm_before"
    told = facts.boolean(name, "decoder_normalize_before", rule=Value(None, ""))
    if told.value is None:
        if there:
            return Value(True, "rule: layer_norm.weight is there, which only such a model has")
        if table is not None or form_of(original).projected:
            return Value(False, table or "rule: no layer_norm.weight, and projections as 350m has them")
        message = "expected the norm after the last layer, found none"
        hint = f"--set {name}=false for a model that normalises after each branch, as 350m does"
        facts.refuse("missing-tensor", message, original.prefix + "layer_norm.weight", hint)
    elif told.value != there:
        message = f"expected {'a' if told.value else 'no'} norm after the last layer ({told.source}), "
        kind = "missing-tensor" if told.value else "config-mismatch"
        facts.refuse(
            kind, f"{message}found {'one' if there else 'none'}", original.prefix + "layer_norm.weight"
        )
    return told


def check_computed(facts: Facts) -> None:
    for key, wanted in COMPUTED.items():
        found = (facts.document or {}).get(key, wanted)
        if found != wanted:
            facts.refuse("unsupported", f"expected {json.dumps(wanted)}, found {json.dumps(found)}", key)


def share_problems(sizes: Mapping[str, Value], ranks: int) -> list[Problem]:
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    wanted = [(width, heads.value, f"{heads.value} heads ({heads.source})", "num_attention_heads")]
    wanted += [
        (sizes[n], ranks, f"{ranks} model-parallel parts", n)
        for n in ("num_attention_heads", "ffn_dim", "vocab_size")
    ]
    return [
        Problem("config-mismatch", f"expected {v.value} to divide by {what}, found a rest", where=name)
        for v, by, what, name in wanted
        if v.value % by
    ]


def axes_of(sizes: Mapping[str, Value]) -> dict[str, int]:
    """s key, value and query, x their rows, d width, e width of a word, f feed-forward width, v words, p rows
    of positions."""
    axes = {a: int(sizes[field].value) for a, field in FIELDS.items()}
    return {**axes, "p": axes["p"] + OFFSET, "s": len(PROJECTIONS)}


# --- original to Hugging Face ---------------------------------------------------------------------------


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    original = open_original(checkpoint)
    download = original
    facts = Facts(original.told, "cfg", options.settings)
    check_computed(facts)
    sizes = dimensions(original, facts)
    no_field = "metaseq's decoder of OPT has no other"
    config: dict[str, Value] = {
        "architectures": facts.fixed("architectures", [ARCHITECTURE], "family opt"),
        "model_type": facts.fixed("model_type", "opt", "family opt"),
        **sizes,
        "enable_bias": facts.fixed("enable_bias", True, no_field),
        "layer_norm_elementwise_affine": facts.fixed("layer_norm_elementwise_affine", True, no_field),
        "_remove_final_layer_norm": facts.fixed(
            "_remove_final_layer_norm", False, "only models converted before transformers 4.20 need it"
        ),
        "tie_word_embeddings": facts.fixed(
            "tie_word_embeddings", True, "metaseq: share_decoder_input_output_embed"
        ),
        "torch_dtype": dtype_value(download, options),
        "prefix": Value("</s>", "every text begins with it (metaseq, hub_utils)"),
        **{name: facts.like(name, v, "default of OPTConfig") for name, v in FREE.items()},
    }
    facts.check_settings({*config, *IDS})
    facts.check()
    known = {
        "padded_vocab_size": sizes["vocab_size"].value,
        "max_position_embeddings": sizes["max_position_embeddings"].value,
    }
    tokenizer = tokenizer_documents(tokenizer_files(checkpoint, options), family="opt", config=known)
    for name, number in IDS.items():
        by_rule = Value(number, "rule: metaseq's vocabulary begins with <s>, <pad>, </s>, <unk>")
        config[name] = facts.token_ids(name, rule=tokenizer.facts.get(name, by_rule))
    facts.check()
    fail_all(share_problems(sizes, download.ranks))
    beside = Written(
        "opt",
        config,
        [
            generation_config(config),
            *(OutputDocument(n, d, "the download's vocabulary") for n, d in tokenizer.documents.items()),
        ],
        IGNORED,
        tokenizer.notes,
        kept(original),
    )
    return to_hf(rows_of(form_of(original), sizes), original, options, beside)


def rows_of(form: Form, sizes: Mapping[str, Value]) -> Table:
    return Table(form.table(), axes_of(sizes), FIELDS, sizes, sizes["num_hidden_layers"])


def kept(original: Source) -> dict[str, Any]:
    """How the files were, for the way back."""
    versions = original.tensors.get(VERSION, ())
    form = form_of(original)
    return {
        "files": sorted(original.checkpoint.files, key=natural),
        "prefix": original.prefix,
        "fused": form.fused,
        "head": form.head,
        "version": versions[0].dtype if versions else None,
    }


# --- Hugging Face to original ---------------------------------------------------------------------------


def plan_original(checkpoint: Checkpoint, options: Options) -> Plan:
    """Parts as metaseq's training of `options.shards` model-parallel ranks would have saved them, with the
    names and the arrangement of the original where the manifest knows them."""
    facts = read_config(checkpoint, options.settings, (ARCHITECTURE,))
    sizes = hf_dimensions(facts)
    source = converted_model(checkpoint)
    once = _kept(checkpoint)
    form = Form(
        fused=bool(once.get("fused", True)),
        projected="model.decoder.project_in.weight" in source.tensors,
        norm="model.decoder.final_layer_norm.weight" in source.tensors,
        head=once.get("head"),
    )
    if form.norm != sizes["do_layer_norm_before"].value:
        message = "expected the norm after the last layer exactly where norms come before each branch, found "
        facts.refuse("config-mismatch", message + ("one" if form.norm else "none"), "do_layer_norm_before")
    facts.check_settings({*sizes, "tie_word_embeddings"})
    facts.check()
    fail_all(share_problems(sizes, options.shards))
    files = part_names(options.shards, once)
    prefix = once.get("prefix", "model.decoder.")
    vocabulary = original_tokenizer_documents(tokenizer_files(checkpoint, options), family="opt")
    beside = Written(
        "opt",
        sizes,
        [OutputDocument(f"gpt2-{n}", d, "the vocabulary in the folder") for n, d in vocabulary.items()],
        IGNORED_HF,
        [] if vocabulary else ["no vocabulary file is there; none was written"],
    )
    made = to_original(
        rows_of(form, sizes),
        source,
        options,
        beside,
        files=files,
        homes=lambda name: [(f, source.dtype, prefix + name) for f in files],
    )
    version = once.get("version", source.dtype)
    outputs = tuple(_as_saved(f, prefix, sizes, version, once) for f in made.outputs)
    return replace(made, outputs=outputs)


def converted_model(checkpoint: Checkpoint) -> Source:
    """Tensors by the names that OPTForCausalLM has; those of OPTModel lack the first word."""
    bare = not any(n.startswith("model.") for n in checkpoint.names())

    def full(name: str) -> str:
        return f"model.{name}" if bare and name.startswith("decoder.") else name

    return whole_tensors(checkpoint, r"model\.decoder\.layers\.(\d+)\.", full)


def hf_dimensions(facts: Facts) -> dict[str, Value]:
    """The values of `dimensions`, from config.json."""
    names = (
        "num_hidden_layers",
        "hidden_size",
        "ffn_dim",
        "vocab_size",
        "max_position_embeddings",
        "num_attention_heads",
    )
    found = {n: facts.integer(n, n) for n in names}
    as_wide = Value(found["hidden_size"].value, "rule: word_embed_proj_dim absent from config.json")
    found["word_embed_proj_dim"] = facts.integer("word_embed_proj_dim", "word_embed_proj_dim", rule=as_wide)
    default = "rule: default of OPTConfig"
    found["activation_function"] = facts.anything(
        "activation_function", "activation_function", rule=Value("relu", default)
    )
    found["do_layer_norm_before"] = facts.boolean(
        "do_layer_norm_before", "do_layer_norm_before", rule=Value(True, default)
    )
    for name, only in (("enable_bias", True), ("layer_norm_elementwise_affine", True)):
        facts.fixed(name, only, "metaseq's decoder of OPT has no other", name)
    facts.fixed(
        "_remove_final_layer_norm", False, "models converted without their norm", "_remove_final_layer_norm"
    )
    facts.fixed("tie_word_embeddings", True, "metaseq's decoder of OPT has no other", "tie_word_embeddings")
    facts.check()
    return found


def _kept(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the manifest says of the original's arrangement; `bad-config` where it cannot be that."""
    once = kept_facts(checkpoint)
    sound: dict[str, Callable[[Any], object]] = {
        "prefix": lambda x: isinstance(x, str) and re.fullmatch(r"(?:[a-z_]{1,20}\.){0,3}", x, re.ASCII),
        "head": lambda x: x in (None, "whole", "share"),
        "version": lambda x: x is None or (isinstance(x, str) and x in CASTABLE),
    }
    for key, holds in sound.items():
        if key in once and not holds(once[key]):
            message = f"expected what a conversion of OPT records, found {once[key]!r}"
            fail("bad-config", printable(message, 200), file="ckpt-tool.json", where=f"original.{key}")
    return once


def part_names(shards: int, once: Mapping[str, Any]) -> list[str]:
    names = once.get("files")
    usable = isinstance(names, list) and len(names) == shards
    if usable and all(isinstance(n, str) and re.fullmatch(r"[\w.-]{1,80}\.pt", n) for n in names or ()):
        return list(names or ())
    return [f"reshard-model_part-{k}.pt" for k in range(shards)]


def _as_saved(
    file: OutputFile, prefix: str, sizes: Mapping[str, Value], version: str | None, once: Mapping[str, Any]
) -> OutputFile:
    """`file` with what stands around the tensors: the dict of the model, its settings, its version."""
    nested = prefix.startswith("model.")
    constants = () if version is None else ((prefix + VERSION, version, (1,), _three(version)),)
    beside = {"cfg": {"_name": None, "model": settings(sizes)}} if nested else {}
    return replace(file, dicts=("model",) if nested else (), beside=beside, constants=constants)


def _three(dtype: str) -> bytes:
    """The number 3 in `dtype`."""
    out = np.empty(1, dtype=DTYPES[dtype].bits)
    cast(np.array([3.0]).view(DTYPES["F64"].bits), "F64", dtype, out)
    return out.tobytes()


def settings(sizes: Mapping[str, Value]) -> dict[str, Any]:
    """What metaseq calls the same numbers."""
    values = {n: v.value for n, v in sizes.items()}
    return {
        "_name": "transformer_lm",
        "activation_fn": values["activation_function"],
        "decoder_layers": values["num_hidden_layers"],
        "decoder_embed_dim": values["hidden_size"],
        "decoder_input_dim": values["word_embed_proj_dim"],
        "decoder_output_dim": values["word_embed_proj_dim"],
        "decoder_ffn_embed_dim": values["ffn_dim"],
        "decoder_attention_heads": values["num_attention_heads"],
        "decoder_normalize_before": values["do_layer_norm_before"],
        "max_target_positions": values["max_position_embeddings"],
        **{k: v for k, v in COMPUTED.items() if v},
    }


FAMILY = Family(
    name="opt",
    summary="OPT 125m to 175b: metaseq's reshard-model_part-K.pt, reshard.pt, restored.pt",
    architectures=(ARCHITECTURE,),
    recognise=recognise,
    plan=plan,
    plan_original=plan_original,
    options=(SHARDS,),
    vocabulary=Vocabulary(
        # metaseq's vocabulary has the special tokens of fairseq; OPT was trained with </s> before every text
        "byte-level",
        ("GPT2Tokenizer",),
        named={"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"},
        begins=True,
    ),
)
