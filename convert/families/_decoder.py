"""What the downloads of Meta and Mistral AI have in common: `consolidated.*` files beside a params.json,
and the same names and shapes for attention, norms, embeddings and output head. Each family keeps its own
table of rows and its own rules for what params.json leaves unsaid.

Counts below are those of the whole model; S model-parallel ranks each hold a share of the split axes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint
from ckpt_tool.checkpoint.weight_sets import is_tokenizer
from ckpt_tool.convert.crosscheck import disagreements
from ckpt_tool.convert.families._download import Download, layer_count
from ckpt_tool.convert.families._heads import pooled
from ckpt_tool.convert.families._vocabulary import files_beside_or_asked
from ckpt_tool.convert.layout import Rule, Step, expand
from ckpt_tool.convert.params import SET, Facts
from ckpt_tool.convert.plan import (
    Options,
    OutputDocument,
    Plan,
    Value,
    assemble,
    config_document,
    natural,
)
from ckpt_tool.convert.tokenizers import (
    TokenizerResult,
    original_tokenizer_documents,
    tokenizer_documents,
)
from ckpt_tool.errors import Problem, fail, fail_all

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

_FLOATS = ("F64", "F32", "F16", "BF16")


# --- numbers --------------------------------------------------------------------------------------------


def read_params(checkpoint: Checkpoint, options: Options) -> Facts:
    """params.json, which may be missing: then what shapes do not tell is asked for."""
    here = "params.json" in checkpoint.documents
    facts = Facts(checkpoint.json("params.json") if here else None, "params.json", options.settings)
    kind = (facts.document or {}).get("model_type")
    if kind not in (None, "transformer", "llama", "mistral", "mixtral"):
        facts.refuse("unsupported", f"expected transformer, found {json.dumps(kind)[:60]}", "model_type")
    return facts


def dimensions(download: Download, facts: Facts, *, ffn: Value | None = None) -> dict[str, Value]:
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


def _words(download: Download, width: Value) -> Value | None:
    table = download.tensors.get("tok_embeddings.weight", ())
    whole = bool(table) and table[0].shape[-1:] != (width.value,)  # ranks hold columns of every row
    return download.size("output.weight", 0) or download.size("tok_embeddings.weight", 0, shared=not whole)


def embedding_axis(download: Download, width: int) -> str:
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


def layer_problems(sizes: Mapping[str, Value], found: int) -> list[Problem]:
    layers = sizes["num_hidden_layers"]
    if layers.value == found:
        return []
    fewer = layers.value < found
    left = f"{layers.value}..{found - 1}" if found - layers.value > 1 else str(layers.value)
    which = f"{found}: layer {left} left over" if fewer else f"{found}"
    return [
        Problem(
            "uncovered-tensors" if fewer else "missing-tensor",
            f"expected {layers.value} layers ({layers.source}), found tensors of {which}",
            where="num_hidden_layers",
        )
    ]


def _check_ranks(download: Download, sizes: Mapping[str, Value]) -> None:
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


def dtype_problems(steps: Iterable[Step]) -> list[Problem]:
    parts = [p for s in steps for p in s.sources]
    common = Counter(p.dtype for p in parts).most_common(1)
    odd = {p.dtype for p in parts if p.dtype.startswith("F8")} | {d for d, _ in common if d not in _FLOATS}
    return [
        Problem("unsupported-dtype", f"expected {', '.join(_FLOATS)}, found {p.dtype}", p.file, p.name)
        for p in parts
        if p.dtype in odd
    ]


# --- original to Hugging Face ---------------------------------------------------------------------------


def to_hf(
    family: str,
    download: Download,
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
    dtype = download.dtype
    expansion = expand(
        rules,
        axes=axes_of(sizes),
        indices={"i": sizes["num_hidden_layers"].value, "e": axes_of(sizes).get("e", 0)},
        original=download.places,
        converted=lambda _: ("", dtype),
    )
    wrong_layers = layer_problems(sizes, download.layers)
    odd = disagreements(expansion.steps, download.checkpoint, FIELDS)
    if odd:
        fail_all([*wrong_layers, *(d.problem(sizes) for d in odd)])
    expansion.problems[:0] = [*wrong_layers, *dtype_problems(expansion.steps)]
    lossy = []
    if options.gqa is not None:
        fewer = pooled(expansion.steps, options.gqa, sizes, ranks=download.ranks)
        expansion.steps[:] = fewer.steps
        config = {**config, "num_key_value_heads": fewer.heads}
        lossy = [fewer.lossy]
    return assemble(
        family=family,
        direction="to-hf",
        checkpoint=download.checkpoint,
        expansion=expansion,
        ignored=IGNORED,
        config=config,
        documents=[
            config_document(config),
            generation_config(config),
            *(OutputDocument(n, d, "the download's tokenizer") for n, d in tokenizer.documents.items()),
        ],
        options=options,
        notes=[*notes, *_copies(sizes, download.ranks), *tokenizer.notes],
        lossy=lossy,
        original=original,
    )


def generation_config(config: Mapping[str, Value]) -> OutputDocument:
    """What transformers 4 derives from a config: the ids at which generation starts and ends."""
    ids = {k: config[k].value for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config}
    text = json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n"
    return OutputDocument("generation_config.json", text.encode(), "token ids of config.json")


def dtype_value(download: Download, options: Options) -> Value:
    if options.dtype is not None:
        return Value(DTYPES[options.dtype].torch, "--dtype")
    return Value(DTYPES[download.dtype].torch, "dtype of the tensors")


def tokenizer_of(
    download: Download, options: Options, *, family: str, config: Mapping[str, Value]
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


def kept(facts: Facts, download: Download, numbers: Mapping[str, Value], **more: Any) -> dict[str, Any]:
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


def read_config(checkpoint: Checkpoint, options: Options, architecture: str) -> Facts:
    """config.json of a converted model of this architecture."""
    if "config.json" not in checkpoint.documents:
        fail("missing-file", "expected config.json beside the weights, found none", file=checkpoint.path.name)
    document = checkpoint.json("config.json")
    named = document.get("architectures") or [architecture]
    if named != [architecture]:
        fail(
            "unsupported",
            f"expected {architecture}, found {json.dumps(named)[:100]}",
            file="config.json",
            where="architectures",
        )
    return Facts(document, "config.json", options.settings)


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


def kept_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `kept` left in the manifest of an output of ours; empty for other folders."""
    if "ckpt-tool.json" not in checkpoint.documents:
        return {}
    found = checkpoint.json("ckpt-tool.json").get("original")
    return found if isinstance(found, dict) else {}


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
    ranks = len(home("norm.weight"))
    fail_all(_division_problems(sizes, ranks, embedding))
    held = {t.name: t for t in checkpoint}
    if any(t.name in held and t is not held[t.name] for t in checkpoint):
        twice = sorted(n for n, c in Counter(t.name for t in checkpoint).items() if c > 1)
        fail("duplicate-tensor", "expected each tensor in one file, found it in two", where=twice[0])
    common = Counter(t.dtype for t in held.values()).most_common(1)
    dtype = common[0][0] if common else "BF16"
    expansion = expand(
        rules,
        axes=axes_of(sizes),
        indices={"i": sizes["num_hidden_layers"].value, "e": axes_of(sizes).get("e", 0)},
        original=lambda name: [(f, dtype) for f in home(name)],
        converted=lambda name: (held[name].file, held[name].dtype) if name in held else None,
    )
    wrong_layers = layer_problems(sizes, layer_count(held, r"model\.layers\.(\d+)\."))
    odd = disagreements(expansion.steps, checkpoint, FIELDS, side="targets")
    if odd:
        fail_all([*wrong_layers, *(d.problem(sizes) for d in odd)])
    inverted = [s.inverse() for s in expansion.steps]
    expansion.problems[:0] = [*wrong_layers, *dtype_problems(inverted)]
    tokenizers = original_tokenizer_documents(tokenizer_files(checkpoint, options))
    missing = [] if tokenizers else ["no original tokenizer file is there; none was written"]
    return assemble(
        family=family,
        direction="to-original",
        checkpoint=checkpoint,
        expansion=expansion,
        ignored=IGNORED_HF,
        config=params,
        documents=[
            document,
            *(OutputDocument(n, d, "the tokenizer in the folder") for n, d in tokenizers.items()),
        ],
        options=options,
        outputs=list(files),
        notes=[*notes, *missing],
        original={"num_key_value_heads": sizes["num_key_value_heads"].value},
    )
