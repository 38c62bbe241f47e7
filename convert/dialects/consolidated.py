"""What the downloads of Meta and Mistral AI have in common: `consolidated.*` files beside a params.json,
and the same names and shapes for attention, norms, embeddings and output head. A family says what it has of
its own: feed-forward, head, and what params.json leaves unsaid.

Two ways of sharing a model out to files are told apart by their tensor names: model-parallel ranks hold the
same names, each a share of the tensor; otherwise files hold whole tensors under names of their own. Counts
below are those of the whole model; S model-parallel ranks each hold a share of the split axes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.weight_sets import is_tokenizer
from ckpt_tool.convert.crosscheck import rank_problems
from ckpt_tool.convert.dialects.converted import generation_config, kept_facts, read_config
from ckpt_tool.convert.dialects.vocabulary import files_beside_or_asked
from ckpt_tool.convert.families import FAMILIES, Family
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DEFAULT,
    DTYPE,
    Check,
    Class,
    Entry,
    Field,
    Known,
    anything,
    by_name,
    count,
    counted,
    document,
    free,
    given,
    measured,
    number,
    only,
)
from ckpt_tool.convert.options import CONTAINER as CONTAINER
from ckpt_tool.convert.options import POOLING
from ckpt_tool.convert.options import SHARDS as SHARDS
from ckpt_tool.convert.options import Option as Option
from ckpt_tool.convert.params import SET, Facts
from ckpt_tool.convert.plan import Options, OutputDocument, Plan, Value, natural
from ckpt_tool.convert.source import Source, layer_count, whole_tensors
from ckpt_tool.convert.tokenizers import (
    TokenizerResult,
    original_tokenizer_documents,
    tokenizer_documents,
)
from ckpt_tool.convert.vocabularies import MISTRAL_AI as MISTRAL_AI
from ckpt_tool.convert.vocabularies import Vocabulary as Vocabulary
from ckpt_tool.convert.weave import Table, Written, to_hf, to_original
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

# The config value behind each axis of the rows; beside them `half` and `two` make a head.
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

# Fields of params.json that say how the original's own programs run, not what the model computes, and a
# number of words that may be left open.
RUN_TIME = (
    "max_batch_size",
    "max_seq_len",
    "model_type",
    "ragged_attention",
    "use_kvcache",
    "eval_batch_size",
    "vocab_size",
)
# Fields of params.json that only one publisher writes.
OF_META = frozenset(("multiple_of", "ffn_dim_multiplier", "use_scaled_rope"))
OF_MISTRAL_AI = frozenset(("hidden_dim", "head_dim", "sliding_window", "_sliding_window"))

# --- what a family says of itself -----------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A way in which an original lies in its files: `rows` are those of the feed-forward. A file called by
    its `{rank}` stands for one for each model-parallel rank, which all share every tensor; else several files
    hold whole layers each, and the first and the last of them the two ends of the model."""

    files: tuple[str, ...]
    rows: tuple[Rule, ...]

    @property
    def ranked(self) -> bool:
        return "{rank" in self.files[0]

    @property
    def zipped(self) -> bool:
        return _zipped(self.files[0])

    def holds(self, names: Mapping[str, object]) -> bool:
        """Whether there is a tensor of the feed-forward under its name here."""
        return any(source.format(i=0, e=0) in names for row in self.rows for source in row.source)

    def names(self, ranks: int) -> list[str]:
        return [f.format(rank=k) for f in self.files for k in range(ranks)] if self.ranked else [*self.files]

    def homes(self, name: str, files: Sequence[str], layers: int) -> Sequence[str]:
        """Those of `files` that hold the tensor, in the order of ranks."""
        if self.ranked:
            return files
        if name.startswith("layers."):
            return [files[int(name.split(".")[1]) * len(files) // layers]]
        return [files[0] if name.startswith("tok_embeddings") else files[-1]]


@dataclass(frozen=True)
class Seen:
    """What a download shows of itself: the kind of its feed-forward (see `feed_forward`), the fields of
    params.json that hold a value, and of its files whether several hold the same names and whether some are
    safetensors."""

    kind: str | None
    keys: frozenset[str]
    equal_names: bool
    safetensors: bool

    @property
    def not_dense(self) -> str | None:
        """Why its feed-forward is no dense one; None for one that is."""
        if self.kind == "dense":
            return None
        return "has experts" if self.kind else "no layers.0.feed_forward.w1.weight"


@dataclass(frozen=True)
class Consolidated:
    """A decoder that is published like this. `told` says whether a download is of the family,
    with the reason. `forms` are by the word in the family
    option `option`, the usual one first. `params` is what params.json says, in order. `ids` gives the first
    and the last token and whose they are, where no tokenizer tells.

    `lacks` are parts that the family has not, in words, and the fields of params.json for them. `words_axis`
    is the axis of tok_embeddings that ranks share, unless the original tells (see `embedding_axis`). `untold`
    and `unsaid` are notes on what an original, or its params.json of the way back, leaves open.
    """

    name: str
    architecture: str
    config: Class
    fields: Mapping[str, Field]
    forms: Mapping[str, Form]
    params: Sequence[Entry]
    told: Callable[[Seen], tuple[bool, str]]
    ids: Callable[[Known], tuple[int, int, str]]
    option: str | None = None
    lacks: tuple[str, tuple[str, ...]] = ("", ())
    words_axis: Callable[[Known], str] = lambda _: "v"
    untold: Callable[[Known], list[str]] = lambda _: []
    unsaid: Callable[[Known], list[str]] = lambda _: []

    @property
    def numbers(self) -> tuple[str, ...]:
        """What changes the numbers, and may differ from model to model."""
        return tuple(n for n, f in self.fields.items() if n in self.config.numbers and not f.fixed)


def family(
    *,
    summary: str,
    fields: Iterable[Field | Iterable[Field]],
    training: Mapping[str, Any] | None = None,
    options: tuple[Option, ...],
    vocabulary: Vocabulary,
    **said: Any,
) -> Family:
    """The record of a family that is published like this: `said` are the parts of `Consolidated`, `fields`
    those beside the names of the class and what every decoder has; `training` adds to what is for training
    only, with the defaults of the class."""
    name = said["name"]
    every = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
    own = by_name(
        only("architectures", [said["architecture"]], f"family {name}"),
        only("model_type", name, f"family {name}"),
        *fields,
        DTYPE,
        free(f"default of {said['config'].name}", **every, **(training or {})),
    )
    d = Consolidated(fields=own, **said)
    return Family(
        name=name,
        summary=summary,
        architectures=(d.architecture,),
        recognise=partial(recognise, d),
        plan=partial(plan, d),
        plan_original=partial(plan_original, d),
        options=(POOLING, *options),
        vocabulary=vocabulary,
        classes={name: d.config},
    )


# --- rows -----------------------------------------------------------------------------------------------

S, T = "layers.{i}.", "model.layers.{i}."
DENSE = (
    rule(S + "feed_forward.w1.weight", T + "mlp.gate_proj.weight", "f d", split="f"),
    rule(S + "feed_forward.w3.weight", T + "mlp.up_proj.weight", "f d", split="f"),
    rule(S + "feed_forward.w2.weight", T + "mlp.down_proj.weight", "d f", split="f"),
)


def _projection(source: str, target: str, pattern: str, split: str) -> Rule:
    return rule(f"{S}attention.{source}.weight", f"{T}self_attn.{target}_proj.weight", pattern, split=split)


ATTENTION = (
    rule(S + "attention_norm.weight", T + "input_layernorm.weight", "d"),
    _projection("wq", "q", "(n half two) d -> (n two half) d", "n"),
    _projection("wk", "k", "(k half two) d -> (k two half) d", "k"),
    _projection("wv", "v", "(k h) d", "k"),
    _projection("wo", "o", "d (n h)", "n"),
    rule(S + "ffn_norm.weight", T + "post_attention_layernorm.weight", "d"),
)


def decoder_rows(feed_forward: Iterable[Rule], *, embedding: str, tied: bool, head: bool) -> tuple[Rule, ...]:
    """All rows. `embedding` is the axis of tok_embeddings that ranks share. A tied head is compared with the
    embedding; without `head` the original has none."""
    words = "model.embed_tokens.weight"
    last = rule("output.weight", words if tied else "lm_head.weight", "v d", split="v", tied=tied)
    return (
        rule("tok_embeddings.weight", words, "v d", split=embedding),
        *ATTENTION,
        *feed_forward,
        rule("norm.weight", "model.norm.weight", "d"),
        *((last,) if head else ()),
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


def params_keys(checkpoint: Checkpoint) -> frozenset[str]:
    """The fields of params.json that hold a value; none when it is missing or cannot be read (planning says
    why)."""
    if "params.json" not in checkpoint.documents:
        return frozenset()
    try:
        params = checkpoint.json("params.json")
    except CkptToolError:
        return frozenset()
    inner = params.get("model")
    return frozenset(k for k, v in (inner if isinstance(inner, dict) else params).items() if v is not None)


def recognise(d: Consolidated, checkpoint: Checkpoint) -> tuple[bool, str]:
    names = checkpoint.names()
    if reason := foreign(names):
        return False, reason
    tensors = [set(f.tensors) for f in checkpoint.files.values()]
    equal = len(tensors) > 1 and all(t == tensors[0] for t in tensors)
    safe = any(f.endswith(".safetensors") for f in checkpoint.files)
    return d.told(Seen(feed_forward(names), params_keys(checkpoint), equal, safe))


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


def _open_ended(known: Known) -> tuple[str, ...]:
    """Some files leave the number of words to the tokenizer."""
    told = (known.facts.document or {}).get("vocab_size")
    return () if told == -1 else ("vocab_size",)


def _rows_of_words(known: Known) -> Value | None:
    return _words(known.source, known["hidden_size"])


def _words(download: Source, width: int) -> Value | None:
    table = download.tensors.get("tok_embeddings.weight", ())
    whole = bool(table) and table[0].shape[-1:] != (width,)  # ranks hold columns of every row
    return download.size("output.weight", 0) or download.size("tok_embeddings.weight", 0, shared=not whole)


def _head_width(known: Known) -> Value:
    """Without params.json as the tensors have it, else the width divided by the query heads."""
    facts, width, heads = known.facts, known["hidden_size"], known["num_attention_heads"]
    rows = known.source.size("layers.{i}.attention.wq.weight", 0)
    if facts.document is None and rows is not None:
        return Value(rows.value // heads, f"{rows.source}, divided by num_attention_heads")
    if facts.document is not None and width % heads:
        message = f"expected hidden_size {width} to divide by num_attention_heads {heads}, found a rest"
        known.refuse("config-mismatch", message, "num_attention_heads")
    return given(width // heads, f"head_dim absent from {facts.file}, width / query heads")


def _groups(known: Known) -> Value:
    facts, rows = known.facts, known.source.size("layers.{i}.attention.wk.weight", 0)
    if facts.document is None and rows is not None:
        return Value(max(1, rows.value // max(1, known["head_dim"])), f"{rows.source}, divided by head_dim")
    name = "num_key_value_heads" if known.back else "n_kv_heads"
    return given(known["num_attention_heads"], f"{name} absent from {facts.file}, as many as query heads")


def head_dim(check: Check | None = None) -> Field:
    return count("head_dim", "head_dim", rule=_head_width, silent=_head_width, check=check)


def own_words(*fields: Field) -> list[Field]:
    """Fields that params.json alone has, under the same name."""
    return [replace(f, keys=(f.name,), hidden=True, told=False) for f in fields]


def _copies_counted(known: Known, kv: Value) -> Value:
    once = known.once.get("num_key_value_heads")
    if isinstance(once, int) and once < kv.value == known.source.ranks and kv.source != SET:
        return Value(once, "ckpt-tool.json: the heads whose copies n_kv_heads counts")
    return kv


WIDTH = "layers.{i}.feed_forward.w1.weight"
SIZES = (
    count("hidden_size", "dim", "hidden_size", rule=measured("norm.weight", 0, shared=False)),
    count("intermediate_size", "hidden_dim", "intermediate_size", rule=measured(WIDTH, 0)),
    count("num_hidden_layers", "n_layers", "num_hidden_layers", rule=counted),
    count("num_attention_heads", "n_heads", "num_attention_heads", ask="the number of query heads"),
    count(
        "num_key_value_heads",
        "n_kv_heads",
        "num_key_value_heads",
        rule=_groups,
        silent=_groups,
        check=_copies_counted,
    ),
    head_dim(),
    count("vocab_size", read=_open_ended, rule=_rows_of_words),
    number("rms_norm_eps", "norm_eps", "rms_norm_eps", ask="the epsilon of the norms"),
)

# What Mistral AI's params.json says, and what it means that it does not.


def _windows(known: Known) -> tuple[str, ...]:
    return tuple(k for k in ("sliding_window", "_sliding_window") if known.facts.given(k))


def _no_window(known: Known) -> Value | None:
    if known.facts.document is None:
        return None
    return given(None, "sliding_window absent from params.json, every query sees all before it")


def _one_window(known: Known, found: Value) -> Value:
    """How many positions a query sees, itself included; None for all. params.json may hold a number, the same
    as text, a list that is repeated over the layers, or nothing; newer ones call it `_sliding_window`."""
    if isinstance(found.value, list):
        kinds = {str(v): v for v in found.value}
        if len(kinds) != 1:
            message = "expected one window for all layers, as config.json can hold, found several"
            known.refuse("unsupported", message, "sliding_window")
            return Value(None, found.source)
        found = Value(next(iter(kinds.values())), f"{found.source}, the same for all layers")
    if found.value is None:
        return found
    inner = Facts({"sliding_window": found.value}, known.facts.file, {})
    width = inner.integer("sliding_window", "sliding_window", text_ok=True, kind="bad-config")
    known.facts.problems += inner.problems
    return Value(width.value, found.source)


def _theta_of_release(known: Known) -> Value | None:
    """Where params.json is silent: the first release had 1e4 in its code, that of December 2023 reads a
    missing theta as 1e4 with a sliding window and 1e6 without; HEAD always takes 1e6, which is wrong for 7B
    v0.1."""
    if known.facts.document is None:
        return None
    if known["sliding_window"] is None:
        return given(1e6, "rope_theta absent from params.json and no sliding_window: 1e6")
    return given(1e4, "rope_theta absent from params.json and a sliding_window: 1e4")


def _unscaled(known: Known, found: Value) -> Value:
    if found.value is not None:
        message = "expected no rope_scaling, which params.json cannot say, found one"
        known.refuse("unsupported", message, "rope_scaling")
    return found


WINDOW = anything(
    "sliding_window",
    read=_windows,
    rule=_no_window,
    silent=DEFAULT,
    check=_one_window,
    ask="the attention window, or null for none",
)
THETA = number(
    "rope_theta",
    "rope_theta",
    rule=_theta_of_release,
    silent=DEFAULT,
    ask="the base of the rotary frequencies",
)
UNSCALED = anything("rope_scaling", silent=Value(None, "absent"), check=_unscaled, hidden=True)
PARAMS = (
    "dim",
    "n_layers",
    "head_dim",
    "hidden_dim",
    "n_heads",
    "n_kv_heads",
    "norm_eps",
    "vocab_size",
    "rope_theta",  # always written: readers disagree on what its absence means
)


def read_params(checkpoint: Checkpoint, options: Options) -> Facts:
    """params.json, which may be missing: then what shapes do not tell is asked for."""
    here = "params.json" in checkpoint.documents
    facts = Facts(checkpoint.json("params.json") if here else None, "params.json", options.settings)
    kind = (facts.document or {}).get("model_type")
    if kind not in (None, "transformer", *FAMILIES):
        facts.refuse("unsupported", f"expected transformer, found {json.dumps(kind)[:60]}", "model_type")
    return facts


def embedding_axis(download: Source, width: int) -> str:
    """The axis of tok_embeddings that ranks share: "v" where each holds all columns of some rows (Llama 3),
    "d" where each holds some columns of all rows (Llama 1, 2, Code Llama)."""
    table = download.tensors.get("tok_embeddings.weight", ())
    return "v" if table and table[0].shape[-1:] == (width,) else "d"


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


def plan(d: Consolidated, checkpoint: Checkpoint, options: Options) -> Plan:
    """No transformers_version is written: no version of it made this folder, both 4 and 5 read one without,
    and the one place that looks at it (5's repair of tokenizers saved by older versions) takes none as old.
    """
    download = open_download(checkpoint)
    facts = read_params(checkpoint, options)
    known = Known(d.fields, facts, download, options, once=kept_facts(checkpoint))
    if facts.given(*d.lacks[1]):
        where = d.lacks[1][0].partition(".")[0]
        facts.refuse("unsupported", f"expected {d.lacks[0]} in family {d.name}, found some", where)
    config = known.values()
    known.values(n for n, f in d.fields.items() if f.hidden and f.keys)
    facts.check_settings({*config, "bos_token_id", "eos_token_id", "pad_token_id"})
    notes = facts.unused(RUN_TIME)
    facts.check()
    tokenizer = tokenizer_of(download, options, family=d.name, config=config)
    config |= token_ids(facts, tokenizer, d.ids(known))
    facts.check()
    axis = embedding_axis(download, known["hidden_size"])
    _check_ranks(download, config)
    fail_all(_division_problems(config, download.ranks, axis))
    word = form_of(d, download)
    tied = bool(known["tie_word_embeddings"])
    rows = decoder_rows(
        d.forms[word].rows, embedding=axis, tied=tied, head="output.weight" in download.tensors or not tied
    )
    arranged = {} if d.option is None else {d.option: word}
    if d.forms[word].ranked and download.ranks > 1:
        arranged["embedding"] = axis
    written = Written(
        d.name,
        config,
        [
            generation_config(config),
            *(OutputDocument(n, c, "the download's tokenizer") for n, c in tokenizer.documents.items()),
        ],
        IGNORED,
        [*notes, *d.untold(known), *_copies(config, download.ranks), *tokenizer.notes],
        {**kept(facts, download, {n: config[n] for n in d.numbers if n in config}), **arranged},
    )
    return to_hf(table_of(rows, config), download, options, written)


def form_of(d: Consolidated, download: Source) -> str:
    """The form whose feed-forward is there, in the container that it comes in if there are several."""
    fitting = [w for w, form in d.forms.items() if form.holds(download.tensors)] or list(d.forms)
    zipped = _zipped(next(iter(download.checkpoint.files)))
    return next((w for w in fitting if d.forms[w].zipped == zipped), fitting[0])


def _zipped(file: str) -> bool:
    return file.endswith((".pth", ".pt"))


def table_of(rows: Sequence[Rule], values: Mapping[str, Value]) -> Table:
    axes = {a: int(values[field].value) for a, field in FIELDS.items() if field in values}
    axes |= {"half": axes["h"] // 2, "two": 2}
    return Table(rows, axes, FIELDS, values, values["num_hidden_layers"], indices={"e": axes.get("e", 0)})


def tokenizer_of(
    download: Source, options: Options, *, family: str, config: Mapping[str, Value]
) -> TokenizerResult:
    """The tokenizer files beside the weights, or those the user points to, converted and compared with the
    vocabulary (unless vocab_size is not the tensors': then that is the problem to tell, see `plan`)."""
    documents = tokenizer_files(download.checkpoint, options)
    values = {k: v.value for k, v in config.items()}
    words = _words(download, config["hidden_size"].value)
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


def token_ids(facts: Facts, tokenizer: TokenizerResult, rule: tuple[int, int, str]) -> dict[str, Value]:
    """bos_token_id and eos_token_id: set by the user, told by the tokenizer, or by rule; pad_token_id only
    when set, since none of these models was trained with one."""
    bos, eos, whose = rule
    found = {
        name: facts.token_ids(name, rule=tokenizer.facts.get(name, given(number, whose)))
        for name, number in (("bos_token_id", bos), ("eos_token_id", eos))
    }
    if "pad_token_id" in facts.settings:
        found["pad_token_id"] = facts.token_ids("pad_token_id", rule=Value(None, SET))
    return found


def kept(facts: Facts, download: Source, numbers: Mapping[str, Value]) -> dict[str, Any]:
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
    }


# --- Hugging Face to original ---------------------------------------------------------------------------


def plan_original(d: Consolidated, checkpoint: Checkpoint, options: Options) -> Plan:
    facts = read_config(checkpoint, options.settings, (d.architecture,))
    source = whole_tensors(checkpoint, r"model\.layers\.(\d+)\.")
    once = kept_facts(checkpoint)
    known = Known(d.fields, facts, source, options, d.config, once, back=True)
    values = known.values(n for n in d.fields if n in d.config.numbers)
    facts.check_settings(d.numbers)
    facts.check()
    form = asked_form(d, options, once)
    files = form.names(options.shards)
    ranks = len(files) if form.ranked else 1
    shared = "v" if once.get("embedding", d.words_axis(known)) == "v" else "d"
    fail_all(_division_problems(values, ranks, shared))
    params = document(known, d.params, {"vocab_size": "vocab_size"})
    same = once.get("ranks") == ranks or known["num_key_value_heads"] >= ranks
    numbers = {n: v for n, v in values.items() if n in d.numbers and not d.fields[n].hidden}
    said, notes = params_document(params, once if same else {}, numbers)
    notes += d.unsaid(known)
    if form.ranked and once.get("ranks", ranks) != ranks:
        notes.append(f"the original had {once['ranks']} ranks: --shards {once['ranks']} writes as many")
    tied = bool(known["tie_word_embeddings"]) and "lm_head.weight" not in source.tensors
    tokenizers = original_tokenizer_documents(tokenizer_files(checkpoint, options))
    written = Written(
        d.name,
        params,
        [said, *(OutputDocument(n, c, "the tokenizer in the folder") for n, c in tokenizers.items())],
        IGNORED_HF,
        [*notes, *([] if tokenizers else ["no original tokenizer file is there; none was written"])],
        {"num_key_value_heads": known["num_key_value_heads"]},
    )
    layers = known["num_hidden_layers"]
    return to_original(
        table_of(decoder_rows(form.rows, embedding=shared, tied=tied, head=True), values),
        source,
        options,
        written,
        files=files,
        homes=lambda name: [(f, source.dtype) for f in form.homes(name, files, layers)],
    )


def asked_form(d: Consolidated, options: Options, once: Mapping[str, Any]) -> Form:
    """The form asked for, else the one the model came in, else the usual one."""
    usual = next(iter(d.forms))
    if d.option is None:
        return d.forms[usual]
    word = str(options.family_options.get(d.option, once.get(d.option, usual)))
    if word not in d.forms:
        *others, last = sorted(d.forms)
        message = f"expected {d.option} {', '.join(others)} or {last}, found {word!r}"
        fail("usage", message, where=f"--{d.option}")
    form = d.forms[word]
    fits = "pth" if form.zipped else "safetensors"
    if options.family_options.get("container", fits) != fits:
        fail("usage", f"expected a container that fits form {word}, found another", where="--container")
    return form


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
