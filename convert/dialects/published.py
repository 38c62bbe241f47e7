"""Originals that are in the Hugging Face layout already: config.json, whole tensors in one file or several,
and tokenizer files. What is published under such names differs in containers, sharding, dtype, stale tensors
and fields, and converting makes one canonical folder of all; the way back is one file.

A family says which tensors it has (`Published`), and which of config.json's fields change what they compute;
the other fields are carried as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.checkpoint.weight_sets import is_template, vocabulary_kind
from ckpt_tool.convert.dialects.converted import (
    FREQUENCIES,
    GENERATION,
    generation_config,
    kept_facts,
    read_config,
)
from ckpt_tool.convert.dialects.layouts import Layout, asked_layout, layout_of, layout_option
from ckpt_tool.convert.dialects.vocabulary import files_beside_or_asked, in_folder
from ckpt_tool.convert.facts_classes import CODE
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DEFAULT,
    DTYPE,
    Check,
    Class,
    Field,
    Known,
    Size,
    anything,
    by_name,
    count,
    flag,
    given,
    groups,
    number,
    object_or_null,
    shown,
    table_of,
    written,
)
from ckpt_tool.convert.options import CONTAINER, POOLING
from ckpt_tool.convert.params import BOOKKEEPING, SET, Facts, renamed
from ckpt_tool.convert.plan import Options, OutputDocument, Plan, Value, config_document
from ckpt_tool.convert.quantised_view import carried_of
from ckpt_tool.convert.source import whole_tensors
from ckpt_tool.convert.tokenizers import rows_without_ids, tokenizer_documents, too_many_ids
from ckpt_tool.convert.tokenizers.counting import ids_of, renumbered
from ckpt_tool.convert.tokenizers.hf_files import template_notes
from ckpt_tool.convert.vocabularies import Vocabulary as Vocabulary
from ckpt_tool.convert.weave import Held, Table, Written, misread_config, to_hf, to_original
from ckpt_tool.errors import CkptToolError, fail, fail_all
from ckpt_tool.records import dataclass

AS_PUBLISHED = "hf"  # in `--form`
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


def model_type_of(checkpoint: Checkpoint) -> str | None:
    """What config.json says the model is; None without one that says it (planning says why)."""
    if "config.json" not in checkpoint.documents:
        return None
    try:
        found = checkpoint.json("config.json").get("model_type")
    except CkptToolError:
        return None
    return found if isinstance(found, str) else None


def carried(
    facts: Facts, config: Mapping[str, Value], own: Class, signs: Sequence[str] = ()
) -> dict[str, Value]:
    """The other fields of config.json as they are, but for those that ask for code, bookkeeping, other names
    of what is written, and the `signs` of an original that is otherwise."""
    others = {o for name, names in own.aliases.items() if name in config for o in names}
    left_out = {*config, *others, *BOOKKEEPING, *CODE, *signs}
    found = {k: Value(v, f"config.json: {k}") for k, v in (facts.document or {}).items() if k not in left_out}
    return found | {k: Value(v, SET) for k, v in facts.settings.items() if k in found}


def tokenizer_files(checkpoint: Checkpoint, options: Options) -> dict[str, bytes]:
    """Vocabularies count too where another word stands before (`gpt2-vocab.json`); a file that the user names
    stands for those of its folder, since one alone is no tokenizer."""
    return files_beside_or_asked(
        checkpoint, options, _is_tokenizer, lambda path: in_folder(path.parent, _is_tokenizer)
    )


def _is_tokenizer(name: str) -> bool:
    return name in TOKENIZER or is_template(name) or vocabulary_kind(name) in ("vocab.json", "merges.txt")


def copied(files: Mapping[str, bytes]) -> list[OutputDocument]:
    """Tokenizer files byte for byte, but for fields that ask for code."""
    made = []
    for name in (*TOKENIZER, *sorted(n for n in files if is_template(n) and n not in TOKENIZER)):
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


def tokenizer_of(p: Published, known: Known) -> tuple[list[OutputDocument], list[str]]:
    """The tokenizer files as they are, with notes; a family that was published without a tokenizer.json has
    one made of vocab.json and merges.txt."""
    files = tokenizer_files(known.source.checkpoint, known.options)
    if p.added_tokens is None or "tokenizer.json" in files:
        none = [] if files or p.added_tokens else ["the download has no tokenizer file; none was written"]
        return copied(files), none or [*counted(known["vocab_size"], files), *template_notes(files)]
    facts: dict[str, Any] = {"vocab_size": known["vocab_size"], "n_positions": known["n_positions"]}
    notes: list[str] = []
    if "added_tokens.json" not in files:
        words = len(parse_object(files["vocab.json"], file="vocab.json")) if "vocab.json" in files else 0
        added, notes = p.added_tokens(known.source.checkpoint.path.name, words)
        facts |= {"added_tokens": added} if added else {}
    result = tokenizer_documents(files, family=p.name, config=facts)
    made = [OutputDocument(n, d, "the download's vocabulary") for n, d in result.documents.items()]
    made += [d for d in copied(files) if is_template(d.name)]
    return made, [*notes, *result.notes, *template_notes(files)]


def counted(rows: int, files: Mapping[str, bytes]) -> list[str]:
    """A note on rows of the embedding that have no id in a tokenizer which is carried over as it is;
    `bad-tokenizer` for ids that have no row."""
    if (found := ids_of(files)) is None:
        return []
    ids, name = found
    if ids > rows:
        too_many_ids(rows, f"{ids} ({name})", name)
    return [*rows_without_ids(rows, ids, name), *_renumbered(files)]


def _renumbered(files: Mapping[str, bytes]) -> list[str]:
    if (found := renumbered(files)) is None:
        return []
    said, name, free = found
    return [
        f"transformers gives the added token of id {said} ({name}) the next free id, {free}, whose row is "
        f"another's: add {said - free} unused tokens before it to tokenizer.json"
    ]


def generation(checkpoint: Checkpoint, config: Mapping[str, Value]) -> OutputDocument:
    """generation_config.json as it is, or what a config stands for without one."""
    if GENERATION not in checkpoint.documents:
        return generation_config(config)
    fields = checkpoint.json(GENERATION)
    fields = {k: v for k, v in fields.items() if k not in (*CODE, "transformers_version")}
    return OutputDocument(GENERATION, _json(fields), f"{GENERATION} beside the weights")


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=True) + "\n").encode()


def container_of(checkpoint: Checkpoint) -> str:
    return "safetensors" if next(iter(checkpoint.files)).endswith(".safetensors") else "pth"


# --- what a family says of itself -----------------------------------------------------------------------


# (name of the download, words in vocab.json) -> tokens to add with their ids, notes
AddedTokens = Callable[[str, int], tuple[Mapping[str, int], list[str]]]


@dataclass(frozen=True)
class Published:
    """A model under names of its own. `rows` are those of its tensors but the output layer; where that is,
    says `head`; the class, the embedding which it may share. `axes` give the size of every axis: the
    field behind it, or a function. `told_by` is a tensor that no other family has, `never` one that this has
    not.

    `classes` are the configurations by model_type, this family's own first; of the others, which compute the
    same under other names, `targets` says what they are called in `--to`. `generic` are the names by which
    the user may set a field too, `layouts` others that the models are published in, by the word in `--form`.
    """

    name: str
    title: str  # as people call it
    classes: Mapping[str, Class]
    fields: Mapping[str, Field]
    rows: Callable[[Known], Sequence[Rule]]
    told_by: str
    axes: Mapping[str, Size] = field(default_factory=lambda: AXES)
    layer: str = ""  # finds a layer's number in a name; else it follows `layers` below the class's prefix
    never: str = ""
    why: str = ""
    head: str | None = "lm_head.weight"  # None: it is among the rows
    ignored: Mapping[str, str] = field(default_factory=lambda: FREQUENCIES)
    container: str = "safetensors"  # of the way back, unless it is known
    generic: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    added_tokens: AddedTokens | None = None  # of a tokenizer that is put together where there is none
    derived: Callable[[Known], Mapping[str, Value]] = lambda _: {}  # numbers behind axes that no field has
    notes: Callable[[Known], list[str]] = lambda _: []
    # hidden fields that the way back asks for again, with the value of every published model
    kept: Mapping[str, Any] = field(default_factory=dict)
    held_as: Mapping[str, str] = field(default_factory=dict)  # name in memory -> on disk, where they differ
    signs: tuple[str, ...] = ()  # keys of config.json by which an original is told that is otherwise

    @property
    def model_type(self) -> str:
        return next(iter(self.classes))

    @property
    def own(self) -> Class:
        return self.classes[self.model_type]

    @property
    def architectures(self) -> dict[str, str]:
        """The class of the model by model_type."""
        return {m: f"{c.name.removesuffix('Config')}ForCausalLM" for m, c in self.classes.items()}


def family(*, summary: str, pools: bool = False, vocabulary: Vocabulary, **said: Any) -> Family:
    """The record of a family that is published like this; `said` are the parts of `Published`, `pools` says
    whether key/value heads can be pooled."""
    p = Published(**said)
    others = layout_option(AS_PUBLISHED, p.layouts)
    return Family(
        name=p.name,
        summary=summary,
        architectures=tuple(p.architectures.values()),
        recognise=partial(recognise, p),
        plan=partial(plan, p),
        plan_original=partial(plan_original, p),
        held=partial(held, p),
        targets=tuple(p.targets),
        options=((POOLING,) if pools else ()) + (CONTAINER, *others),
        vocabulary=vocabulary,
        classes=p.classes,
        tensors=(p.told_by, *(t for layout in p.layouts.values() for t in layout.tensors)),
        published=True,
        held_as=p.held_as,
    )


# --- fields and rows that many decoders have ------------------------------------------------------------

T = "model.layers.{i}."
AXES: dict[str, Size] = {
    "n": "num_attention_heads",
    "k": "num_key_value_heads",
    "h": "head_dim",
    "d": "hidden_size",
    "f": "intermediate_size",
    "v": "vocab_size",
}


def divides(name: str, by: str) -> Check:
    """A check of the field `name`: it divides by another."""

    def check(known: Known, found: Value) -> Value:
        if found.value % known[by]:
            told = known.value(by).source
            message = f"expected {name} {found.value} to divide by {by} {known[by]} ({told}), found a rest"
            hint = f"--set {by}=VALUE" if told.startswith("rule") else None
            known.refuse("config-mismatch", message, by, hint)
        return found

    return check


def head_width(known: Known) -> int:
    """Of heads that share out the width."""
    width: int = known["hidden_size"] // known["num_attention_heads"]
    return width


# Of heads whose query, key and value are in one tensor.
FUSED: dict[str, Size] = {a: s for a, s in AXES.items() if a != "k"} | {"t": lambda _: 3, "h": head_width}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
COUNTS = (
    *map(count, SIZES[:3]),
    count("num_attention_heads", check=divides("num_attention_heads", "num_key_value_heads")),
    count("num_key_value_heads", silent=groups),
    count("vocab_size"),
)
EPSILON = number("rms_norm_eps", ask="the epsilon of the norms")


def cap_or_null(name: str) -> Field:
    """A bound on scores, which the class takes as a float or null for none."""

    def check(known: Known, found: Value) -> Value:
        if found.value is None:
            return found
        if type(found.value) not in (int, float) or not found.value > 0:
            message = f"expected a number above 0, or null, found {shown(found.value)}"
            known.refuse("bad-config", message, name)
            return found
        return Value(float(found.value), found.source)

    return anything(name, silent=DEFAULT, check=check)


def window(name: str, unread: str | None = None) -> Field:
    """A window without which no release computes anything: each makes its mask, whatever layers do. `unread`
    is another name of it, which releases do not read: alone it leaves open which width is meant."""

    def check(known: Known, found: Value) -> Value:
        said = {**(known.facts.document or {}), **known.facts.settings}
        if unread is not None and unread in said and name not in said:
            usual = shown(known.config.numbers[name]) if known.config else "its default"
            message = f"expected {name}, found {unread} {shown(said[unread])} alone, which no release of "
            message += f"transformers reads: each takes {usual}"
            known.refuse("missing-fact", message, name, f"--set {name}=VALUE says which width is meant")
        if type(found.value) is not int or found.value < 1:
            message = (
                f"expected an integer above 0, without which no release runs, found {shown(found.value)}"
            )
            known.refuse("bad-config", message, name, f"--set {name}=VALUE")
        return found

    return anything(name, silent=DEFAULT, check=check)


def outspoken(name: str) -> Field:
    """A flag for which null is no answer: the class refuses it, and readers take it either way."""

    def check(known: Known, found: Value) -> Value:
        if type(found.value) is not bool:
            known.refuse("bad-config", f"expected true or false, found {shown(found.value)}", name)
        return found

    return anything(name, silent=DEFAULT, check=check)


SCALING = anything("rope_scaling", silent=given(None, "absent"), check=object_or_null)
TIED = flag("tie_word_embeddings", rule=None)


# The default of few classes is that of the published models, so it is asked for.
THETA = number("rope_theta", ask="the base of the rotary frequencies")
FIELDS = (*COUNTS, EPSILON, THETA, SCALING, TIED)


def same(name: str, pattern: str) -> Rule:
    """A tensor that stays as it is."""
    return rule(name, name, pattern)


def attention(*, biases: bool = False) -> tuple[Rule, ...]:
    """The four projections of grouped attention; `biases` has all but the last."""
    query = weights(f"{T}self_attn.q_proj", pattern="(n h) d", biases=biases)
    others = weights(f"{T}self_attn.k_proj", f"{T}self_attn.v_proj", pattern="(k h) d", biases=biases)
    return (*query, *others, *weights(f"{T}self_attn.o_proj", pattern="d (n h)"))


def weights(*names: str, pattern: str = "d", biases: bool = False) -> tuple[Rule, ...]:
    """Those called `NAME.weight`, of one shape; `biases` are beside them, along the first axis."""
    first = pattern[: pattern.index(")") + 1] if pattern.startswith("(") else pattern.split()[0]
    kinds = {"weight": pattern, "bias": first} if biases else {"weight": pattern}
    return tuple(same(f"{name}.{kind}", shape) for name in names for kind, shape in kinds.items())


def decoder(*own: Rule) -> Callable[[Known], tuple[Rule, ...]]:
    """The rows of a decoder with gated feed-forward and two norms a layer: `own` are those of its attention,
    and what else it has."""
    made = (
        *weights("model.embed_tokens", pattern="v d"),
        *weights(f"{T}input_layernorm", f"{T}post_attention_layernorm", "model.norm"),
        *own,
        *GATED,
    )
    return lambda _: made


GATED = (
    *weights(f"{T}mlp.gate_proj", f"{T}mlp.up_proj", pattern="f d"),
    *weights(f"{T}mlp.down_proj", pattern="d f"),
)


# --- recognising and reading ----------------------------------------------------------------------------


def recognise(p: Published, checkpoint: Checkpoint) -> tuple[bool, str]:
    names = checkpoint.names()
    if (layout := layout_of(p.layouts, names)) is not None:
        return layout.recognise(set(names))
    if p.told_by not in checkpoint:
        return False, f"no {p.told_by}"
    found = model_type_of(checkpoint)
    if found not in (None, p.model_type):
        return False, f"Hugging Face names, but config.json is that of {found}"
    if found is None and p.never in checkpoint:
        return False, f"{p.never}, which {p.title} has not"
    return True, p.why or f"{p.told_by} is of {p.title} alone"


def read(
    p: Published,
    checkpoint: Checkpoint,
    options: Options,
    model_type: str,
    *,
    back: bool,
    architecture: str | None = None,
) -> Known:
    """config.json and the tensors beside it, as the class of `model_type` reads them; `architecture` is the
    class with a head, where it is not the family's."""
    own = {generic: name for name, generic in p.generic.items()}
    settings = renamed(options.settings, own)
    own_class, name = p.classes[model_type], (architecture or p.architectures[model_type],)
    facts = read_config(checkpoint, settings, name, model_type=model_type, own=own_class)
    source = whole_tensors(checkpoint, p.layer or rf"{re.escape(p.own.prefix)}layers\.(\d+)\.")
    once = kept_facts(checkpoint) if back else {}
    target = model_type if back else p.targets.get(options.family_options.get("architecture", ""))
    named = target or p.model_type

    def says(name: str, value: Any) -> Field:
        why = "the layout asked for" if p.targets and not back else f"family {p.name}"
        return written(name, lambda _: Value(value, why))

    fields = by_name(
        says("architectures", [p.architectures[p.model_type if back else named]]),
        says("model_type", p.model_type if back else named),
        p.fields.values(),
    )
    if "torch_dtype" not in fields:
        fields |= {"torch_dtype": DTYPE}
    return Known(fields, facts, source, options, own_class, once, back=back, target=named)


def config_of(p: Published, known: Known) -> dict[str, Value]:
    """config.json as it is written; raises what was collected."""
    config = known.values()
    for name, f in known.fields.items():
        if f.hidden:
            known.value(name)
    assert known.config is not None
    config |= carried(known.facts, config, known.config, p.signs)
    known.facts.check_settings({*config, *known.fields, *p.generic.values()})
    known.facts.check()
    if known.back:
        fail_all(misread_config(config, known.config))
    return config


def signs_of(p: Published, known: Known) -> dict[str, Value]:
    """The keys that told how the original was, for the way back to one that is so again."""
    once = known.once.get("signs")
    found = once if isinstance(once, dict) else {}
    return {k: Value(found[k], "ckpt-tool.json: the original's") for k in p.signs if k in found}


def rows_of(p: Published, known: Known) -> Table:
    """The rows with the sizes of their axes. Where the output layer is stored though the config ties it, it
    is compared with the embedding, either way."""
    tied, rows = bool(known["tie_word_embeddings"]), list(p.rows(known))
    there = p.head is not None and known.source.keeps(p.head, known.options)
    if p.head is not None and (there or not tied or known.once.get("head")):
        rows.append(rule(p.head, p.own.prefix + p.own.words if tied else p.head, "v d", tied=tied))
    return table_of(known, rows, p.axes, p.derived(known))


# --- the two directions ---------------------------------------------------------------------------------


def plan(p: Published, checkpoint: Checkpoint, options: Options) -> Plan:
    if (layout := layout_of(p.layouts, checkpoint.names())) is not None:
        return layout.plan(checkpoint, options)
    own, why = recognise(p, checkpoint)
    if not own:
        fail("unsupported", f"expected {p.title}, found {why}", file=checkpoint.path.name)
    known = read(p, checkpoint, options, p.model_type, back=False)
    config = config_of(p, known)
    documents, notes = tokenizer_of(p, known)
    kept = {"container": container_of(checkpoint), **{n: known[n] for n in p.kept}}
    if signs := {k: v for k, v in (known.facts.document or {}).items() if k in p.signs and v is not None}:
        kept["signs"] = signs
    if p.head is not None:
        kept["head"] = p.head in known.source.tensors
    beside = Written(
        p.name,
        config,
        [generation(checkpoint, config), *documents],
        p.ignored,
        [*known.facts.notes, *p.notes(known), *notes],
        kept,
    )
    return to_hf(rows_of(p, known), known.source, options, beside)


def held(p: Published, checkpoint: Checkpoint, options: Options, architecture: str) -> Held:
    """See `Family.held`."""
    said = model_type_of(checkpoint)
    model_type = said if said is not None and said in p.classes else p.model_type
    known = read(p, checkpoint, options, model_type, back=True, architecture=architecture)
    return Held(rows_of(p, known), known.source, known.facts, p.ignored)


def _usual_container(p: Published, known: Known) -> str:
    """As the original was; of codes the one from which loaders take them."""
    if carried_of(known.source.checkpoint) is not None:
        return "safetensors"
    return str(known.once.get("container", p.container))


def plan_original(p: Published, checkpoint: Checkpoint, options: Options) -> Plan:
    """The published layout in one file, or another: as `form` asks, else as the original was."""
    said = model_type_of(checkpoint)
    known = read(
        p, checkpoint, options, said if said in p.classes and said is not None else p.model_type, back=True
    )
    if (layout := asked_layout(p.name, (AS_PUBLISHED,), p.layouts, known, [CONTAINER.name])) is not None:
        return layout.plan_original(checkpoint, options, known)
    config = config_of(p, known) | signs_of(p, known)
    container = options.family_options.get("container") or _usual_container(p, known)
    file = "pytorch_model.bin" if container == "pth" else "model.safetensors"
    files = tokenizer_files(checkpoint, options)
    documents = [config_document(config), generation(checkpoint, config), *copied(files)]
    homes = [(file, known.source.dtype)]
    facts = {n: known[n] for n, usual in p.kept.items() if known[n] != usual}
    kept = {"facts": facts} if facts else {}
    notes = [*known.facts.notes, *template_notes(files)]
    if container != known.once.get("container", p.container) and "container" not in options.family_options:
        notes.append("codes and scales are written as safetensors, as which they are published")
    beside = Written(p.name, config, documents, p.ignored, notes, kept, keeps_codes=True)
    return to_original(rows_of(p, known), known.source, options, beside, files=[file], homes=lambda _: homes)
