"""What the downloads of Meta and Mistral AI have in common: `consolidated.*` files beside a params.json (see
`params_json`), and the same names and shapes for attention, norms, embeddings and output head. A family says
what it has of its own: feed-forward, head, and what params.json leaves unsaid.

Two ways of sharing a model out to files are told apart by their tensor names: model-parallel ranks hold the
same names, each a share of the tensor; otherwise files hold whole tensors under names of their own. Counts
below are those of the whole model; S model-parallel ranks each hold a share of the split axes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.checkpoint.weight_sets import PROCESSORS, is_template, is_tokenizer
from ckpt_tool.convert.crosscheck import rank_problems
from ckpt_tool.convert.dialects import params_fields, params_json
from ckpt_tool.convert.dialects.converted import FREQUENCIES, generation_config, kept_facts, read_config
from ckpt_tool.convert.dialects.layouts import FORM, Layout, asked_layout, layout_of, layout_option
from ckpt_tool.convert.dialects.vocabulary import files_beside_or_asked
from ckpt_tool.convert.facts_classes import CODE
from ckpt_tool.convert.facts_parts import taken_apart
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DTYPE,
    TIE,
    Class,
    Entry,
    Field,
    Known,
    by_name,
    document,
    free,
    given,
    head_of,
    may_untie,
    only,
    repeats,
    turns,
)
from ckpt_tool.convert.options import CONTAINER as CONTAINER
from ckpt_tool.convert.options import POOLING
from ckpt_tool.convert.options import SHARDS as SHARDS
from ckpt_tool.convert.options import Option as Option
from ckpt_tool.convert.params import NO_CONFIG, overridden
from ckpt_tool.convert.plan import Options, OutputDocument, Plan, Value, config_document, natural
from ckpt_tool.convert.quantised import QSCALE as QSCALE
from ckpt_tool.convert.quantised import QuantFormat
from ckpt_tool.convert.source import Source, layer_count, whole_tensors
from ckpt_tool.convert.tokenizers import (
    ADDED,
    MAP,
    TokenizerResult,
    original_tokenizer_documents,
    tokenizer_documents,
)
from ckpt_tool.convert.vocabularies import MISTRAL_AI as MISTRAL_AI
from ckpt_tool.convert.vocabularies import Vocabulary as Vocabulary
from ckpt_tool.convert.weave import Held, Table, Written, to_hf, to_original
from ckpt_tool.errors import Problem, fail, fail_all
from ckpt_tool.records import dataclass

_NOT_PLAIN_TEXT = (
    (r"(model\.)?vision_|patch_merger\.|pre_mm_projector_norm|text_model\.", "an image encoder"),
    (r".*lora_[AB]", "LoRA factors, which must be merged into the weights first"),
)
_WORDS_OF = {  # one of them is in every name that fits
    _NOT_PLAIN_TEXT[0][0]: ("vision_", "patch_merger.", "pre_mm_projector_norm", "text_model."),
    _NOT_PLAIN_TEXT[1][0]: ("lora_",),
}
_CONVERTED = re.compile(r"model\.(layers|embed_tokens|norm)\.|lm_head\.")

# Reasons for leaving a tensor out. Llama 1 keeps a table of frequencies in every layer, Llama 2 one in all;
# torchtitan kept what they make of positions (pytorch/torchtitan#634).
IGNORED = {r"(.*\.)?(rope\.freqs|freqs_cis)": "recomputed from rope_theta"}

# Of Mistral AI's models in eight bits.
FAKE = {r".*fake_quantizer.*": "scales of a cache of keys and values, for which transformers has no place"}

CONSOLIDATED = "consolidated"  # in `--form`
LAYER = r"model\.layers\.(\d+)\."

# The config value behind each axis of the rows; beside them `half` and `two` make a head.
AXES = {
    "n": "num_attention_heads",
    "k": "num_key_value_heads",
    "half": "head_dim",
    "h": "head_dim",
    "d": "hidden_size",
    "f": "intermediate_size",
    "v": "vocab_size",
    "e": "num_local_experts",
}

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
    def container(self) -> str:
        return _container(self.files[0])

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


def _container(file: str) -> str:
    return "pth" if file.endswith((".pth", ".pt")) else "safetensors"


@dataclass(frozen=True)
class Seen:
    """What a download shows of itself: the names of its tensors, the kind of its feed-forward (see
    `feed_forward`), the fields of params.json that hold a value, and of its files whether several hold the
    same names and whether some are safetensors."""

    names: Collection[str]
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
class Beside:
    """Rows of another part of a model, with the sizes of their axes, the fields behind these, and the indices
    of their names."""

    rows: tuple[Rule, ...]
    axes: Mapping[str, int]
    fields: Mapping[str, str]
    indices: Mapping[str, int]


@dataclass(frozen=True)
class Consolidated:
    """A decoder that is published like this. `told` says whether a download is of the family, and why.
    `forms` are by the word in the option of the family that chooses one, if there is any, the usual one
    first. `params` is what params.json says, in order. `ids` gives the first and the last token and whose
    they are, where no tokenizer tells.

    `layouts` are others that such models are trained in, by the word in `--form`.

    `lacks` are parts that the family has not, in words, and the fields of params.json for them. `words_axis`
    is the axis of tok_embeddings that ranks share, unless the original tells. `untold` and `unsaid` are notes
    on what an original, or its params.json of the way back, leaves open.
    """

    name: str
    architecture: str
    config: Class
    fields: Mapping[str, Field]
    forms: Mapping[str, Form]
    params: Sequence[Entry]
    told: Callable[[Seen], tuple[bool, str]]
    ids: Callable[[Known], tuple[int | None, int | None, str]]
    options: tuple[Option, ...]
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    lacks: tuple[str, tuple[str, ...]] = ("", ())
    words_axis: Callable[[Known], str] = lambda _: "v"
    untold: Callable[[Known], list[str]] = lambda _: []
    unsaid: Callable[[Known], list[str]] = lambda _: []
    parts: tuple[str, ...] = ()  # objects in params.json whose values are read
    beside: Callable[[Known], Beside] | None = None  # what it has beside the text model
    ignored: Mapping[str, str] = field(default_factory=lambda: IGNORED)
    quantised: QuantFormat | None = None  # as `Written` has it
    root: str = ""  # before the names of the text model in the Hugging Face layout
    # config.json as the class has it, out of the values under the names of fields
    spelled: Callable[[Known, dict[str, Value]], dict[str, Value]] = lambda _, config: config

    @property
    def numbers(self) -> tuple[str, ...]:
        """What changes the numbers, and may differ from model to model."""
        return tuple(n for n, f in self.fields.items() if n in self.config.numbers and not f.fixed)

    @property
    def option(self) -> str | None:
        """The option that chooses a form."""
        return next((o.name for o in self.options if set(o.choices) >= self.forms.keys()), None)


def family(
    *,
    summary: str,
    fields: Iterable[Field | Iterable[Field]],
    vocabulary: Vocabulary,
    training: Mapping[str, Any] | None = None,
    in_memory: Mapping[str, tuple[str, ...]] | None = None,
    **said: Any,
) -> Family:
    """The record of a family that is published like this: `said` are the parts of `Consolidated`, `fields`
    those beside the names of the class and what every decoder has; `training` adds to what is for training
    only, with the defaults of the class; `in_memory` is that of `Family`."""
    name, config = said["name"], said["config"]
    model_type = said.pop("model_type", name)
    every = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
    own = by_name(
        only("architectures", [said["architecture"]], f"family {name}", keys=("architectures",)),
        only("model_type", model_type, f"family {name}"),
        *fields,
        DTYPE,
        free(f"default of {config.name}", **every, **(training or {})),
    )
    d = Consolidated(fields=own, **said)
    form = layout_option(CONSOLIDATED, d.layouts)
    return Family(
        name=name,
        summary=summary,
        architectures=(d.architecture,),
        recognise=partial(recognise, d),
        plan=partial(plan, d),
        plan_original=partial(plan_original, d),
        held=partial(held, d),
        options=tuple({o.name: o for o in (POOLING, *form, *d.options)}.values()),
        vocabulary=vocabulary,
        classes={model_type: config},
        document=params_json.NAME,
        in_memory=in_memory or {},
        tensors=(
            *(t for layout in d.layouts.values() for t in layout.tensors),
            S.format(i=0) + "attention.wq.weight",
            *(form.rows[0].source[0].format(i=0, e=0) for form in d.forms.values()),
        ),
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


# --- recognising and opening ----------------------------------------------------------------------------


def foreign(names: Sequence[str], sees: bool = False) -> str | None:
    """Why tensors of these names are no plain text model in an original layout; None when they may be, or of
    one that `sees` images."""
    every = "\n".join(names)  # in which words are looked for before any name is looked at
    if ("model." in every or "lm_head." in every) and any(_CONVERTED.match(n) for n in names):
        return "the tensors have Hugging Face names already"
    for pattern, what in _NOT_PLAIN_TEXT[sees:]:
        if not any(word in every for word in _WORDS_OF[pattern]):
            continue
        if name := next((n for n in names if re.match(pattern, n)), None):
            return f"not a plain text model: holds {what} ({name})"
    return None


def feed_forward(held: Container[str]) -> str | None:
    """Which feed-forward the tensors of these names are of: "dense", "experts" (one tensor each), "stacked"
    experts."""
    if "layers.0.feed_forward.experts.0.w1.weight" in held or "layers.0.feed_forward.gate.weight" in held:
        return "experts"
    if "layers.0.block_sparse_moe.w1" in held or "layers.0.block_sparse_moe.gate.weight" in held:
        return "stacked"
    return "dense" if "layers.0.feed_forward.w1.weight" in held else None


def recognise(d: Consolidated, checkpoint: Checkpoint) -> tuple[bool, str]:
    names = checkpoint.names()
    if (layout := layout_of(d.layouts, names)) is not None:
        return layout.recognise(set(names))
    if reason := foreign(names, d.beside is not None):
        return False, reason
    tensors = [f.tensors.keys() for f in checkpoint.files.values()]
    equal = len(tensors) > 1 and all(t == tensors[0] for t in tensors)
    safe = any(f.endswith(".safetensors") for f in checkpoint.files)
    return d.told(Seen(set(names), feed_forward(checkpoint), params_json.keys_of(checkpoint), equal, safe))


def open_download(checkpoint: Checkpoint, sees: bool = False) -> Source:
    """Sort out the files. Fails for what is no plain text original (`already-converted`, `unsupported`) and
    for ranks that do not belong together (`shard-conflict`)."""
    names, label = checkpoint.names(), checkpoint.path.name
    if any(_CONVERTED.match(n) for n in names):
        message = f"expected an original layout, found Hugging Face names such as {names[0]}"
        fail("already-converted", message, file=label, hint=NO_CONFIG)
    if reason := foreign(names, sees):
        fail("unsupported", f"expected a plain text model, found one that is {reason}", file=label)
    files = sorted(checkpoint.files, key=natural)
    layer = r"layers\.(\d+)\."
    if len(names) == sum(len(f.tensors) for f in checkpoint.files.values()):
        return whole_tensors(checkpoint, layer)
    tensors: dict[str, tuple[TensorInfo, ...]] = {}
    for file in files:
        for name, tensor in checkpoint.files[file].tensors.items():
            tensors[name] = (*tensors.get(name, ()), tensor)
    if sum(len(ts) > 1 for ts in tensors.values()) <= len(tensors) // 2:
        return whole_tensors(checkpoint, layer)
    fail_all(rank_problems(files, {f: checkpoint.files[f].tensors for f in files}))
    return Source(checkpoint, tensors, len(files), layer_count(names, layer), layer=layer)


def one_of_two(text: Family, seeing: Family, sees: Callable[[Checkpoint], bool]) -> Family:
    """A family whose models may see images: `sees` tells which of the two records has a checkpoint, in either
    layout."""

    def of(checkpoint: Checkpoint) -> Family:
        return seeing if sees(checkpoint) else text

    return replace(
        text,
        architectures=text.architectures + seeing.architectures,
        recognise=lambda checkpoint: of(checkpoint).recognise(checkpoint),
        plan=lambda checkpoint, options: of(checkpoint).plan(checkpoint, options),
        plan_original=lambda checkpoint, options: of(checkpoint).plan_original(checkpoint, options),
        held=lambda checkpoint, options, architecture: of(checkpoint).held(checkpoint, options, architecture),
        classes={**text.classes, **seeing.classes},
    )


# --- numbers that files share ---------------------------------------------------------------------------


def _division_problems(values: Mapping[str, Value], ranks: int, embedding: str) -> list[Problem]:
    share = "model-parallel ranks"
    wanted = [("num_attention_heads", "num_key_value_heads"), ("head_dim", "")]
    if ranks > 1:
        shared = ["num_attention_heads", "intermediate_size", "vocab_size"]
        wanted += [(n, share) for n in (*shared, *(["hidden_size"] if embedding == "d" else []))]
        if values["num_key_value_heads"].value % ranks:  # fewer of them than ranks: each head is in several
            wanted.append((share, "num_key_value_heads"))
    counts = {n: values[n].value for pair in wanted for n in pair if n in values} | {share: ranks, "": 2}
    made = []
    for name, by in wanted:
        if counts[name] % counts[by]:
            told = "; ".join(f"{n} from {values[n].source}" for n in (name, by) if n in values)
            divisor = f"{by} {counts[by]}".strip()
            message = f"expected {name} {counts[name]} to divide by {divisor}, found a rest ({told})"
            hint = overridden(*(n for n in (name, by) if n in values))
            made.append(Problem("config-mismatch", message, where=name if name in values else by, hint=hint))
    return made


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
    count = wanted.pop()
    if wanted or count == download.ranks:
        return
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
    if (layout := layout_of(d.layouts, checkpoint.names())) is not None:
        return layout.plan(checkpoint, options)
    download = open_download(checkpoint, d.beside is not None)
    facts = params_json.read(checkpoint, options, d.parts)
    known = Known(d.fields, facts, download, options, once=kept_facts(checkpoint))
    what, keys = d.lacks
    if facts.given(*keys):
        where = keys[0].partition(".")[0]
        facts.refuse("unsupported", f"expected {what} in family {d.name}, found some", where)
        facts.used |= {k for k in facts.document or {} if k.startswith(f"{where}.")}  # said once
    config = known.values()
    known.values(n for n, f in d.fields.items() if f.hidden and f.keys)
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    asked = (n for n, f in d.fields.items() if f.hidden and f.ask is not None)
    facts.check_settings({*config, *ids, *asked, *params_fields.unknown_set_to_null(facts)})
    notes = params_fields.check_unread(facts)
    facts.check()
    tokenizer = tokenizer_of(d, known, config)
    config |= token_ids(d, known, tokenizer)
    facts.check()
    axis = params_json.embedding_axis(known)
    _check_ranks(download, config)
    fail_all(_division_problems(config, download.ranks, axis))
    word = form_of(d, download)
    tied = bool(known["tie_word_embeddings"])
    head = download.keeps("output.weight", options) or not tied
    rows = decoder_rows(d.forms[word].rows, embedding=axis, tied=tied, head=head)
    original = params_json.kept(known, {n: config[n] for n in d.numbers if n in config})
    if d.option is not None:
        original[d.option] = word
    if d.forms[word].ranked and download.ranks > 1:
        original["embedding"] = axis
    if tied:
        original["head"] = head
    beside = [OutputDocument(n, c, "the download's tokenizer") for n, c in tokenizer.documents.items()]
    beside += of_the_library(checkpoint, {*tokenizer.documents}, sees=d.beside is not None)
    written = Written(
        d.name,
        d.spelled(known, config),
        [generation_config(config), *beside],
        d.ignored,
        [*notes, *d.untold(known), *no_ids(config), *_copies(config, download.ranks), *tokenizer.notes],
        original,
        spelled=partial(config_of, d.config),
    )
    untied = "output.weight" if may_untie(d.fields) else ""
    table = _whole(d, known, table_of(rows, config))
    return to_hf(replace(table, turns=turns(known), head=untied), download, options, written)


def of_the_library(checkpoint: Checkpoint, made: Container[str], *, sees: bool) -> Iterator[OutputDocument]:
    """Files of transformers that a publisher put beside the original, as they are but for code: templates of
    chats, and of a model that `sees` images what makes patches of them."""
    for name, file in checkpoint.documents.items():
        if name in made or not (is_template(name) or (sees and name in PROCESSORS)):
            continue
        content = file.read()
        if name in PROCESSORS:
            fields = parse_object(content, file=name)
            if fields.keys() & set(CODE):
                left = {k: v for k, v in fields.items() if k not in CODE}
                content = (json.dumps(left, indent=2, ensure_ascii=False) + "\n").encode()
        yield OutputDocument(name, content, "copied from beside the weights")


def config_of(own: Class, config: Mapping[str, Value]) -> OutputDocument:
    """config.json, of a model of several parts in the parts."""
    if own.parts is None:
        return config_document(config)
    made = taken_apart({k: v.value for k, v in config.items()}, own.parts)
    return config_document({k: Value(v, "") for k, v in made.items()})


def _whole(d: Consolidated, known: Known, text: Table) -> Table:
    """The table of the text model with all that is beside it."""
    rows = [replace(row, target=tuple(d.root + name for name in row.target)) for row in text.rows]
    if d.beside is None:
        return replace(text, rows=rows)
    more = d.beside(known)
    return replace(
        text,
        rows=[*rows, *more.rows],
        axes={**text.axes, **more.axes},
        fields={**text.fields, **more.fields},
        numbers={**text.numbers, **known.values(more.fields.values())},
        indices={**text.indices, **more.indices},
    )


def form_of(d: Consolidated, download: Source) -> str:
    """The form whose feed-forward is there, in the container that it comes in if there are several."""
    fitting = [w for w, form in d.forms.items() if form.holds(download.tensors)] or list(d.forms)
    container = _container(next(iter(download.checkpoint.files)))
    return next((w for w in fitting if d.forms[w].container == container), fitting[0])


def table_of(rows: Sequence[Rule], values: Mapping[str, Value]) -> Table:
    axes = {a: int(values[field].value) for a, field in AXES.items() if field in values}
    axes |= {"half": axes["h"] // 2, "two": 2}
    return Table(rows, axes, AXES, values, values["num_hidden_layers"], indices={"e": axes.get("e", 0)})


def tokenizer_of(d: Consolidated, known: Known, config: Mapping[str, Value]) -> TokenizerResult:
    """The tokenizer files beside the weights, or those the user points to, converted and compared with the
    vocabulary (unless vocab_size is not the tensors': then that is the problem to tell, see `plan`)."""
    values = {k: v.value for k, v in config.items()}
    words = params_json.words(known)
    if words is not None and words.value != values["vocab_size"]:
        del values["vocab_size"]
    files = tokenizer_files(known.source.checkpoint, known.options)
    return tokenizer_documents(files, family=d.name, config=values)


def tokenizer_files(checkpoint: Checkpoint, options: Options) -> dict[str, bytes]:
    """A file that the user names may be called anything; it then counts as tokenizer.model."""
    return files_beside_or_asked(
        checkpoint,
        options,
        lambda name: is_tokenizer(name.rpartition("/")[2]) or name in (ADDED, MAP),
        lambda path: {path.name if is_tokenizer(path.name) else "tokenizer.model": path},
    )


def tokenizer_kind(known: Known) -> str | None:
    """What the tokenizer.model beside the weights, or the one asked for, is: "sentencepiece", "tiktoken", or
    None for none of these."""
    from ckpt_tool.convert.tokenizers import sentencepiece, tiktoken

    for data in tokenizer_files(known.source.checkpoint, known.options).values():
        if sentencepiece.looks_like(data):
            return "sentencepiece"
        if tiktoken.looks_like(data):
            return "tiktoken"
    return None


def token_ids(d: Consolidated, known: Known, tokenizer: TokenizerResult) -> dict[str, Value]:
    """bos_token_id and eos_token_id: set by the user, told by the tokenizer, else by params.json, or by rule;
    pad_token_id only when set, since none of these models was trained with one."""
    bos, eos, whose = d.ids(known)
    words = known["vocab_size"]
    rules = {
        n: given(i, whose)
        if i is None or i < words
        else given(None, f"{i} of {whose} is none of {words} words")
        for n, i in (("bos_token_id", bos), ("eos_token_id", eos))
    }
    found = {}
    for name, otherwise in rules.items():
        keys = () if name in tokenizer.facts else (name,)
        found[name] = known.facts.token_ids(name, *keys, rule=tokenizer.facts.get(name, otherwise))
    if "pad_token_id" in known.facts.settings:
        found["pad_token_id"] = known.facts.token_ids("pad_token_id", rule=None)
    return found


def no_ids(config: Mapping[str, Value]) -> list[str]:
    """A note on ids that nothing tells and no rule gives."""
    unknown = [n for n in ("bos_token_id", "eos_token_id") if config[n].value is None]
    if not unknown:
        return []
    why, first = config[unknown[0]].source, unknown[0]
    return [f"null stands for {' and '.join(unknown)} ({why}): --set {first}=ID says which it is"]


# --- Hugging Face to original ---------------------------------------------------------------------------


def plan_original(d: Consolidated, checkpoint: Checkpoint, options: Options) -> Plan:
    facts = read_config(checkpoint, options.settings, (d.architecture,), own=d.config)
    source = whole_tensors(checkpoint, re.escape(d.root) + LAYER)
    once = kept_facts(checkpoint)
    known = Known(d.fields, facts, source, options, d.config, once, back=True)
    usual = tuple(d.forms) if d.option == FORM else (CONSOLIDATED,)
    layout = asked_layout(d.name, usual, d.layouts, known, [o.name for o in d.options])
    if layout is not None:
        apart = ("head_dim",)  # which params.json has otherwise
        own = {n: f for n, f in d.fields.items() if n in d.config.numbers and n not in apart or f is DTYPE}
        own |= {f.name: f for f in layout.reads}
        return layout.plan_original(checkpoint, options, replace(known, fields=own))
    values = known.values(n for n in d.fields if n in d.config.numbers)
    facts.check_settings(values)
    facts.check()
    form = asked_form(d, options, once)
    files = form.names(options.shards)
    ranks = len(files) if form.ranked else 1
    axis = "v" if once.get("embedding", d.words_axis(known)) == "v" else "d"
    fail_all(_division_problems(values, ranks, axis))
    params = document(known, d.params, {"vocab_size": "vocab_size"})
    same = once.get("ranks") == ranks or known["num_key_value_heads"] >= ranks
    numbers = {n: v for n, v in values.items() if n in d.numbers and not d.fields[n].hidden}
    said, notes = params_json.written(params, once if same else {}, numbers)
    notes += facts.notes
    if said.source == "config.json":  # the original's own text says whatever it said
        notes += d.unsaid(known)
    if form.ranked and once.get("ranks", ranks) != ranks:
        notes.append(f"the original had {once['ranks']} ranks: --shards {once['ranks']} writes as many")
    tokenizers = original_tokenizer_documents(tokenizer_files(checkpoint, options))
    if not tokenizers:
        notes.append("no original tokenizer file is there; none was written")
    beside = [OutputDocument(n, c, "the tokenizer in the folder") for n, c in tokenizers.items()]
    kept = {"num_key_value_heads": known["num_key_value_heads"]}
    tied = bool(known[TIE])
    unsaid = not params_json.says_tied(said)  # its readers look for a head then
    head = not tied or unsaid or bool(once.get("head", False))
    rows = decoder_rows(form.rows, embedding=axis, tied=tied, head=head)
    table = _whole(d, known, table_of(rows, values))
    return to_original(
        replace(table, repeats=repeats(known), turns=turns(known), head=head_of(known)),
        source,
        options,
        Written(d.name, params, [said, *beside], FREQUENCIES, notes, kept, quantised=d.quantised),
        files=files,
        homes=lambda n: [(f, source.dtype) for f in form.homes(n, files, known["num_hidden_layers"])],
    )


def held(d: Consolidated, checkpoint: Checkpoint, options: Options, architecture: str) -> Held:
    """See `Family.held`. Files and ranks of an original do not matter, so any form has the rows."""
    facts = read_config(checkpoint, options.settings, (architecture,), own=d.config)
    source = whole_tensors(checkpoint, re.escape(d.root) + LAYER)
    known = Known(d.fields, facts, source, options, d.config, {}, back=True)
    sizes = known.values(n for n in d.fields if n in {*AXES.values(), "num_hidden_layers"})
    form, tied = next(iter(d.forms.values())), bool(known[TIE])
    table = _whole(d, known, table_of(decoder_rows(form.rows, embedding="v", tied=tied, head=True), sizes))
    made = replace(table, repeats=repeats(known), turns=turns(known), head=head_of(known))
    return Held(made, source, facts, FREQUENCIES)


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
    if options.family_options.get("container", form.container) != form.container:
        fail("usage", f"expected a container that fits form {word}, found another", where="--container")
    return form
