"""What the downloads of Meta and Mistral AI have in common: `consolidated.*` files beside a params.json,
and the same names and shapes for attention, norms, embeddings and output head. Each family keeps its own
table of rows and its own rules for what params.json leaves unsaid.

Two ways of sharing a model out to files are told apart by their tensor names: model-parallel ranks hold the
same names, each a share of the tensor; otherwise files hold whole tensors under names of their own. Counts
below are those of the whole model; S model-parallel ranks each hold a share of the split axes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.weight_sets import is_tokenizer
from ckpt_tool.convert.crosscheck import rank_problems
from ckpt_tool.convert.dialects.converted import generation_config, kept_facts
from ckpt_tool.convert.dialects.vocabulary import files_beside_or_asked
from ckpt_tool.convert.layout import Rule
from ckpt_tool.convert.params import SET, Facts
from ckpt_tool.convert.plan import Options, OutputDocument, Plan, Value, natural
from ckpt_tool.convert.source import Source, layer_count, whole_tensors
from ckpt_tool.convert.tokenizers import (
    TokenizerResult,
    original_tokenizer_documents,
    tokenizer_documents,
)
from ckpt_tool.convert.weave import Table, Written
from ckpt_tool.convert.weave import to_hf as woven_to_hf
from ckpt_tool.convert.weave import to_original as woven_to_original
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all

_NOT_PLAIN_TEXT = (
    (r"(model\.)?vision_|patch_merger\.|pre_mm_projector_norm|text_model\.", "an image encoder"),
    (r".*lora_[AB]", "LoRA factors, which must be merged into the weights first"),
)
_CONVERTED = re.compile(r"model\.(layers|embed_tokens|norm)\.|lm_head\.")

# Reasons for leaving a tensor out. Llama 1 keeps a table of frequencies in every layer, Llama 2 one in all;
# old transformers wrote one for each layer.
IGNORED = {r"(.*\.)?rope\.freqs": "recomputed from rope_theta"}
IGNORED_HF = {r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "recomputed from rope_theta"}

# The config value behind each axis of the families' tables.
FIELDS = {
    "n": "num_attention_heads",
    "k": "num_key_value_heads",
    "half": "head_dim",
    "h": "head_dim",
    "d": "hidden_size",
    "f": "intermediate_size",
    "v": "vocab_size",
    "e": "num_local_experts",
}

# Fields of params.json that say how the original's own programs run, not what the model computes.
RUN_TIME = (
    "max_batch_size",
    "max_seq_len",
    "model_type",
    "ragged_attention",
    "use_kvcache",
    "eval_batch_size",
)


# --- recognising ----------------------------------------------------------------------------------------


def foreign(names: Sequence[str]) -> str | None:
    """Why tensors of these names are no plain text model in an original layout; None when they may be."""
    if any(_CONVERTED.match(n) for n in names):
        return "the tensors have Hugging Face names already"
    for pattern, what in _NOT_PLAIN_TEXT:
        if name := next((n for n in names if re.match(pattern, n)), None):
            return f"not a plain text model: holds {what} ({name})"
    return None


def feed_forward(names: Sequence[str]) -> str | None:
    """Which feed-forward the tensors are of: "dense", "experts" (one tensor each), "stacked" experts."""
    held = set(names)
    if "layers.0.feed_forward.experts.0.w1.weight" in held or "layers.0.feed_forward.gate.weight" in held:
        return "experts"
    if "layers.0.block_sparse_moe.w1" in held or "layers.0.block_sparse_moe.gate.weight" in held:
        return "stacked"
    return "dense" if "layers.0.feed_forward.w1.weight" in held else None


def params_keys(checkpoint: Checkpoint) -> set[str]:
    """The fields of params.json that hold a value; none when it is missing or cannot be read (planning says
    why)."""
    if "params.json" not in checkpoint.documents:
        return set()
    try:
        params = checkpoint.json("params.json")
    except CkptToolError:
        return set()
    inner = params.get("model")
    return {k for k, v in (inner if isinstance(inner, dict) else params).items() if v is not None}


def equal_names(checkpoint: Checkpoint) -> bool:
    """Several files that hold the same names: model-parallel ranks."""
    sets = [set(f.tensors) for f in checkpoint.files.values()]
    return len(sets) > 1 and all(s == sets[0] for s in sets)


# --- the original's files -------------------------------------------------------------------------------


def open_download(checkpoint: Checkpoint) -> Source:
    """Sort out the files. Fails for what is no plain text original (`already-converted`, `unsupported`) and
    for ranks that do not belong together (`shard-conflict`)."""
    names = checkpoint.names()
    label = checkpoint.path.name
    if reason := foreign(names):
        if any(_CONVERTED.match(n) for n in names):
            fail(
                "already-converted",
                f"expected an original layout, found Hugging Face names such as {names[0]}",
                file=label,
                hint="nothing to convert; `ckpt-tool verify` checks it and `--to original` goes back",
            )
        fail("unsupported", f"expected a plain text model, found one that is {reason}", file=label)
    if not names:
        fail("missing-tensor", "expected the tensors of a model, found none", file=label)
    files = sorted(checkpoint.files, key=natural)
    by_file = {f: checkpoint.files[f].tensors for f in files}
    tensors: dict[str, tuple[TensorInfo, ...]] = {}
    for file in files:
        for name, tensor in by_file[file].items():
            tensors[name] = (*tensors.get(name, ()), tensor)
    repeated = sum(len(ts) > 1 for ts in tensors.values())
    ranks = len(files) if repeated > len(tensors) // 2 else 1
    if ranks > 1:
        fail_all(rank_problems(files, by_file))
    else:
        fail_all(
            Problem(
                "duplicate-tensor",
                f"expected each tensor in one file, found it in {' and '.join(t.file for t in ts)} too",
                where=n,
            )
            for n, ts in tensors.items()
            if len(ts) > 1
        )
    return Source(checkpoint, tensors, ranks, layer_count(names, r"layers\.(\d+)\."))


# --- numbers --------------------------------------------------------------------------------------------


def read_params(checkpoint: Checkpoint, options: Options) -> Facts:
    """params.json, which may be missing: then what shapes do not tell is asked for."""
    here = "params.json" in checkpoint.documents
    facts = Facts(checkpoint.json("params.json") if here else None, "params.json", options.settings)
    kind = (facts.document or {}).get("model_type")
    if kind not in (None, "transformer", "llama", "mistral", "mixtral"):
        facts.refuse("unsupported", f"expected transformer, found {json.dumps(kind)[:60]}", "model_type")
    return facts


def dimensions(download: Source, facts: Facts, *, ffn: Value | None = None) -> dict[str, Value]:
    """The sizes and the epsilon that all these families have, in Hugging Face names; `ffn` is the family's
    own rule for the feed-forward width. Raises what is missing or malformed so far."""
    width = facts.integer(
        "hidden_size", "dim", "hidden_size", rule=download.size("norm.weight", 0, shared=False)
    )
    heads = facts.integer(
        "num_attention_heads", "n_heads", "num_attention_heads", ask="the number of query heads"
    )
    layers = facts.integer(
        "num_hidden_layers",
        "n_layers",
        "num_hidden_layers",
        rule=Value(download.layers, "layers in the tensor names") if download.layers else None,
        maximum=10_000,
    )
    eps = facts.number("rms_norm_eps", "norm_eps", "rms_norm_eps", ask="the epsilon of the norms")
    ffn = ffn or download.size("layers.{i}.feed_forward.w1.weight", 0)
    inner = facts.integer("intermediate_size", "hidden_dim", "intermediate_size", rule=ffn)
    open_ended = facts.document is not None and facts.document.get("vocab_size") == -1
    vocab = facts.integer(
        "vocab_size", *(() if open_ended else ("vocab_size",)), rule=_words(download, width)
    )
    facts.used.add("vocab_size")
    if facts.problems:
        facts.check()
    q, k = (download.size(f"layers.{{i}}.attention.{w}.weight", 0) for w in ("wq", "wk"))
    if facts.document is None and q is not None:
        each = Value(q.value // heads.value, f"{q.source}, divided by num_attention_heads")
    else:
        each = Value(
            width.value // heads.value, f"rule: head_dim absent from {facts.file}, width / query heads"
        )
    head = facts.integer("head_dim", "head_dim", rule=each)
    if head.source == each.source and facts.document is not None and width.value % heads.value:
        facts.refuse(
            "config-mismatch",
            f"expected hidden_size {width.value} to divide by num_attention_heads {heads.value}, "
            "found a rest",
            "num_attention_heads",
        )
    if facts.document is None and k is not None:
        groups = Value(max(1, k.value // max(1, head.value)), f"{k.source}, divided by head_dim")
    else:
        groups = Value(heads.value, f"rule: n_kv_heads absent from {facts.file}, as many as query heads")
    kv = facts.integer("num_key_value_heads", "n_kv_heads", "num_key_value_heads", rule=groups)
    once = kept_facts(download.checkpoint).get("num_key_value_heads")
    if isinstance(once, int) and once < kv.value == download.ranks and kv.source != SET:
        kv = Value(once, "ckpt-tool.json: the heads whose copies n_kv_heads counts")
    facts.check()
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head,
        "vocab_size": vocab,
        "rms_norm_eps": eps,
    }


def _words(download: Source, width: Value) -> Value | None:
    table = download.tensors.get("tok_embeddings.weight", ())
    whole = bool(table) and table[0].shape[-1:] != (width.value,)  # ranks hold columns of every row
    return download.size("output.weight", 0) or download.size("tok_embeddings.weight", 0, shared=not whole)


def embedding_axis(download: Source, width: int) -> str:
    """The axis of tok_embeddings that ranks share: "v" where each holds all columns of some rows (Llama 3),
    "d" where each holds some columns of all rows (Llama 1, 2, Code Llama)."""
    table = download.tensors.get("tok_embeddings.weight", ())
    return "v" if table and table[0].shape[-1:] == (width,) else "d"


def axes_of(sizes: Mapping[str, Value]) -> dict[str, int]:
    """Sizes of the axes of the tables: n query heads, k key/value heads, h head width as half x two, d width,
    f feed-forward width, v words, e experts."""
    axes = {a: int(sizes[field].value) for a, field in FIELDS.items() if field in sizes}
    return {**axes, "half": axes["h"] // 2, "two": 2}


def _division_problems(sizes: Mapping[str, Value], ranks: int, embedding: str) -> list[Problem]:
    heads, kv = sizes["num_attention_heads"].value, sizes["num_key_value_heads"].value
    wanted = [
        ("num_attention_heads", heads, kv, "num_key_value_heads"),
        ("head_dim", sizes["head_dim"].value, 2, "2"),
    ]
    if ranks > 1:
        shared = ["num_attention_heads", "intermediate_size", "vocab_size"]
        shared += ["hidden_size"] if embedding == "d" else []
        wanted += [(f, sizes[f].value, ranks, "model-parallel ranks") for f in shared]
        if kv % ranks:  # fewer key/value heads than ranks: each head is in several
            wanted.append(("model-parallel ranks", ranks, kv, "num_key_value_heads"))
    return [
        Problem(
            "config-mismatch",
            f"expected {field} {number} to divide by {by_name} {by if by_name != '2' else ''}".rstrip()
            + f", found a rest{_from(sizes, field, by_name)}",
            where=field if field in sizes else by_name,
        )
        for field, number, by, by_name in wanted
        if number % by
    ]


def _from(sizes: Mapping[str, Value], *fields: str) -> str:
    known = [f"{f} from {sizes[f].source}" for f in fields if f in sizes]
    return f" ({'; '.join(known)})" if known else ""


def _copies(sizes: Mapping[str, Value], ranks: int) -> list[str]:
    """With fewer key/value heads than ranks each head is in several of them; the executor compares those."""
    kv = sizes["num_key_value_heads"]
    if kv.value >= ranks:
        return []
    text = f"each of {kv.value} key/value heads ({kv.source}) is in {ranks // kv.value} of {ranks} ranks"
    return [f"{text}: written once, the copies compared"]


def _check_ranks(download: Source, sizes: Mapping[str, Value]) -> None:
    """Fail when query heads and feed-forward width both say that there are more files, or fewer."""
    rows = {
        "attention.wq": sizes["num_attention_heads"].value * sizes["head_dim"].value,
        "feed_forward.w1": sizes["intermediate_size"].value,
    }
    wanted = set()
    for name, total in rows.items():
        each = download.size(f"layers.{{i}}.{name}.weight", 0, shared=False)
        if each is None or not each.value or total % each.value:
            return
        wanted.add(total // each.value)
    if len(wanted) != 1 or wanted == {download.ranks}:
        return
    count = wanted.pop()
    files = ", ".join(sorted(download.checkpoint.files, key=natural)[:16])
    fail(
        "missing-shard" if count > download.ranks else "shard-conflict",
        f"expected {count} model-parallel ranks (each holds 1/{count} of the heads and of the feed-forward), "
        f"found {download.ranks}: {files}",
        file=download.checkpoint.path.name,
    )


# --- original to Hugging Face ---------------------------------------------------------------------------


def to_hf(
    family: str,
    download: Source,
    options: Options,
    *,
    rules: Iterable[Rule],
    sizes: Mapping[str, Value],
    config: Mapping[str, Value],
    embedding: str,
    tokenizer: TokenizerResult,
    notes: Iterable[str],
    original: Mapping[str, Any],
) -> Plan:
    """The plan of a family's table: `sizes` are checked against each other and against the shapes, `config`
    is written, `original` kept for the way back.

    No transformers_version is written: no version of it made this folder, both 4 and 5 read one without, and
    the one place that looks at it (5's repair of tokenizers saved by older versions) takes none as old.
    """
    _check_ranks(download, sizes)
    fail_all(_division_problems(sizes, download.ranks, embedding))
    return woven_to_hf(
        table_of(rules, sizes),
        download,
        options,
        Written(
            family,
            config,
            [
                generation_config(config),
                *(OutputDocument(n, d, "the download's tokenizer") for n, d in tokenizer.documents.items()),
            ],
            IGNORED,
            [*notes, *_copies(sizes, download.ranks), *tokenizer.notes],
            original,
        ),
    )


def table_of(rules: Iterable[Rule], sizes: Mapping[str, Value]) -> Table:
    axes = axes_of(sizes)
    indices = {"e": axes.get("e", 0)}
    return Table(tuple(rules), axes, FIELDS, sizes, sizes["num_hidden_layers"], indices=indices)


def tokenizer_of(
    download: Source, options: Options, *, family: str, config: Mapping[str, Value]
) -> TokenizerResult:
    """The tokenizer files beside the weights, or those the user points to, converted and compared with the
    vocabulary (unless vocab_size is not the tensors': then that is the problem to tell, see `to_hf`)."""
    documents = tokenizer_files(download.checkpoint, options)
    values = {k: v.value for k, v in config.items()}
    words = _words(download, config["hidden_size"])
    if words is not None and words.value != values["vocab_size"]:
        del values["vocab_size"]
    return tokenizer_documents(documents, family=family, config=values)


def tokenizer_files(checkpoint: Checkpoint, options: Options) -> dict[str, bytes]:
    """A file that the user names may be called anything; it then counts as tokenizer.model."""
    return files_beside_or_asked(
        checkpoint,
        options,
        lambda name: is_tokenizer(name.rpartition("/")[2]),
        lambda path: {path.name if is_tokenizer(path.name) else "tokenizer.model": path},
    )


def token_ids(facts: Facts, tokenizer: TokenizerResult, rules: Mapping[str, Value]) -> dict[str, Value]:
    """bos_token_id and eos_token_id: set by the user, told by the tokenizer, or by rule; pad_token_id only
    when set, since none of these models was trained with one."""
    found = {
        name: facts.token_ids(name, rule=tokenizer.facts.get(name, rule)) for name, rule in rules.items()
    }
    if "pad_token_id" in facts.settings:
        found["pad_token_id"] = facts.token_ids("pad_token_id", rule=Value(None, SET))
    return found


def kept(facts: Facts, download: Source, numbers: Mapping[str, Value], **more: Any) -> dict[str, Any]:
    """What the Hugging Face layout does not say, for the manifest: the text of params.json together with the
    numbers it stood for (it is used again only while config.json still says the same)."""
    text = None
    changed = any(v.source == SET for v in numbers.values())
    if facts.document is not None and not changed:
        text = download.checkpoint.documents["params.json"].read().decode()
    return {
        "params.json": text,
        "numbers": {k: v.value for k, v in numbers.items()},
        "ranks": download.ranks,
        **more,
    }


# --- Hugging Face to original ---------------------------------------------------------------------------


def hf_dimensions(facts: Facts) -> dict[str, Value]:
    """The same values as `dimensions`, from config.json. Raises what is missing or malformed so far."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {n: facts.integer(n, n, maximum=10_000 if n == "num_hidden_layers" else 2**31) for n in names}
    facts.check()
    heads = sizes["num_attention_heads"].value
    as_many = Value(heads, "rule: num_key_value_heads absent from config.json, as many as query heads")
    sizes["num_key_value_heads"] = facts.integer("num_key_value_heads", "num_key_value_heads", rule=as_many)
    each = Value(
        sizes["hidden_size"].value // heads, "rule: head_dim absent from config.json, width / query heads"
    )
    sizes["head_dim"] = facts.integer("head_dim", "head_dim", rule=each)
    sizes["vocab_size"] = facts.integer("vocab_size", "vocab_size")
    sizes["rms_norm_eps"] = facts.number("rms_norm_eps", "rms_norm_eps")
    facts.fixed("hidden_act", "silu", "the only activation of the original", "hidden_act")
    facts.check()
    return sizes


def params_document(
    derived: Mapping[str, Value], facts: Mapping[str, Any], numbers: Mapping[str, Value]
) -> tuple[OutputDocument, list[str]]:
    """params.json: the original's own text where the manifest has it and its numbers still hold, else written
    from `derived` (dots in a name nest)."""
    text = facts.get("params.json")
    if isinstance(text, str):
        then = facts.get("numbers")
        changed = [k for k, v in numbers.items() if not isinstance(then, dict) or then.get(k) != v.value]
        if not changed:
            return OutputDocument("params.json", text.encode(), "ckpt-tool.json: the original's text"), []
        note = f"params.json is written anew: config.json has another {', '.join(changed)} than the original"
        return _params(derived), [note]
    return _params(derived), []


def _params(derived: Mapping[str, Value]) -> OutputDocument:
    values: dict[str, Any] = {}
    for name, value in derived.items():
        outer, dot, inner = name.partition(".")
        if dot:
            values.setdefault(outer, {})[inner] = value.value
        else:
            values[name] = value.value
    return OutputDocument("params.json", (json.dumps(values, indent=4) + "\n").encode(), "config.json")


def to_original(
    family: str,
    checkpoint: Checkpoint,
    options: Options,
    *,
    rules: Iterable[Rule],
    sizes: Mapping[str, Value],
    embedding: str,
    files: Sequence[str],
    home: Callable[[str], Sequence[str]],
    params: Mapping[str, Value],
    document: OutputDocument,
    notes: Iterable[str],
) -> Plan:
    """The plan of the way back. `files` are the weight files to write, `home(name)` those that hold the
    tensor `name`: all of them, in rank order, where ranks share it."""
    fail_all(_division_problems(sizes, len(home("norm.weight")), embedding))
    source = whole_tensors(checkpoint, r"model\.layers\.(\d+)\.")
    tokenizers = original_tokenizer_documents(tokenizer_files(checkpoint, options))
    missing = [] if tokenizers else ["no original tokenizer file is there; none was written"]
    return woven_to_original(
        table_of(rules, sizes),
        source,
        options,
        Written(
            family,
            params,
            [document, *(OutputDocument(n, d, "the tokenizer in the folder") for n, d in tokenizers.items())],
            IGNORED_HF,
            [*notes, *missing],
            {"num_key_value_heads": sizes["num_key_value_heads"].value},
        ),
        files=files,
        homes=lambda name: [(f, source.dtype) for f in home(name)],
    )
