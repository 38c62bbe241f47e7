"""Gated decoders in Megatron-Core's GPT layout, dense or with experts (see `megatron_experts`), which are
trained over tensor-parallel ranks, pipeline stages and expert-parallel ranks: another layout of a family that
is published otherwise. The ranks' own files and the joined tensors of a torch_dist folder (see `layer_axis`)
have the same names.

linear_qkv holds, for each key/value head, the queries that share it, the key and the value; a rank holds
whole groups. linear_fc1 of a rank holds the gates of its units, then their ups. The tables leave out what
stands before every name (`model.`), and number layers through all stages.

Source: NVIDIA/Megatron-LM core_v0.9.0 (core/models/gpt, core/transformer), NVIDIA-NeMo/Megatron-Bridge
@067f987d (models/conversion/param_mapping.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import compress, repeat
from shlex import quote
from typing import Any

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint
from ckpt_tool.convert import layer_axis, numbers
from ckpt_tool.convert.dialects import megatron_dist, megatron_experts, published
from ckpt_tool.convert.dialects import megatron_ranks as ranks
from ckpt_tool.convert.dialects.converted import generation_config
from ckpt_tool.convert.dialects.megatron_arguments import (
    GATED,
    UNUSED_BY_DENSE,
    UNUSED_BY_GATED,
    Only,
    answered_for,
    notes_on_precision,
    refuse_others,
)
from ckpt_tool.convert.dialects.megatron_core_numbers import FIELDS, HEAD_DIM, LENGTH, WORDS, can_be_said
from ckpt_tool.convert.dialects.megatron_experts import UNUSED_BY_ROUTED, Experts
from ckpt_tool.convert.dialects.megatron_ranks import OUTPUT, Form, Own, Run
from ckpt_tool.convert.dialects.megatron_settings import with_documents
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DTYPE,
    Class,
    Field,
    Known,
    Size,
    by_name,
    only,
)
from ckpt_tool.convert.options import EXPERT_PARALLEL, SHARDS, TENSOR_PARALLEL, Option
from ckpt_tool.convert.params import Facts, shown
from ckpt_tool.convert.plan import Options, Plan, Value
from ckpt_tool.convert.tokenizers.hf_files import template_notes
from ckpt_tool.convert.weave import Table, Written, to_hf
from ckpt_tool.errors import Problem, fail, fail_all, printable
from ckpt_tool.records import dataclass

FIRST = "decoder.layers.0."
S, T = "decoder.layers.{i}.", "model.layers.{i}."
QKV = tuple(f"{T}self_attn.{p}_proj" for p in "qkv")
NORMS = {  # name of the norm of attention and of the feed-forward, by whether Transformer Engine holds them
    True: ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
    False: ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
}
IGNORED = {
    r"(chained_\d{1,3}\.)?optimizer(\..*)?": "state of the training run",
    r"((lr|opt_param)_scheduler|rng_state|rerun_state_machine|ft_state|content_metadata)(\..*)?": (
        "state of the training run"
    ),
    r".*\._extra_state(\..*)?": "scales for 8-bit training",
    r"(.*\.)?rotary_pos_emb\.inv_freq": "recomputed from rope_theta",  # of Core 0.2, a buffer that is saved
}

EXPORT = "NVIDIA's Megatron-Bridge exports models of this kind to Hugging Face"

RANKS, FOLDER = "mcore", "torch_dist"  # words of `--form`

ARCHITECTURE: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
}
# What args do not say, or not for the model that is made of them, and changes no number.
TRAINED: dict[str, Any] = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}


@dataclass(frozen=True)
class Ends:
    """The tokens that begin and end a text (None: nothing does), in every vocabulary of as many `rows`,
    whatever it is padded to; `why` says whose they are."""

    rows: Container[int]
    begins: int | None
    ends: int | None
    why: str


@dataclass(frozen=True)
class Core:
    """A family whose models are trained in this layout. `config` is the class of its config.json, `fields`
    are written there beside those that args say; those called `unsaid` must be empty, since args have no word
    for them. `biases` says whether query, key and value have some, `head_norms` whether each head of query
    and key is normalised, `own_width` whether heads may be of another width than they share out."""

    family: str
    model: str  # as people call it
    architecture: str
    model_type: str
    config: Class
    biases: bool = False
    head_norms: bool = False
    own_width: bool = True
    fields: tuple[Field, ...] = ()
    unsaid: tuple[str, ...] = ()
    ends: tuple[Ends, ...] = ()
    title: str = "Megatron-Core"
    experts: Experts | None = None
    reads: tuple[Field, ...] = ()
    form: str = RANKS  # to write

    @property
    def options(self) -> tuple[Option, ...]:
        if self.form == FOLDER:
            return (TENSOR_PARALLEL, megatron_dist.OPTION)
        if self.experts is None:
            return ranks.OPTIONS
        own = (EXPERT_PARALLEL, megatron_experts.OPTION)
        return (*(o for o in ranks.OPTIONS if o is not SHARDS), *own)  # files are not ranks alone

    @property
    def tensors(self) -> tuple[str, ...]:
        """The one by which near misses are told."""
        if self.experts:
            return (f"{FIRST}mlp.router.weight",)
        return (f"{FIRST}self_attention.{'linear_qkv.bias' if self.biases else 'linear_qkv.weight'}",)

    def args(self, run: Run) -> dict[str, Only]:
        """The values of arguments that its tensors stand for."""
        qkv = "biases for query, key and value"
        own = {"add_qkv_bias": Only(qkv, (True, None)) if self.biases else Only(f"no {qkv}", (False, None))}
        if self.head_norms:
            own["qk_layernorm"] = Only("norms of queries and keys", (True, None))
        if not self.experts:
            return {**GATED, **own}
        dense = ("num_experts", "num_moe_experts")
        return {k: v for k, v in GATED.items() if k not in dense} | own | megatron_experts.arguments(run)

    @property
    def unused(self) -> str:
        """The arguments that it does not read."""
        return f"{UNUSED_BY_GATED} {UNUSED_BY_ROUTED if self.experts else UNUSED_BY_DENSE}"

    def holds(self, names: Collection[str]) -> bool:
        return prefix_of(names) is not None

    def recognise(self, names: Collection[str]) -> tuple[bool, str]:
        p, kinds = f"{prefix_of(names)}{FIRST}", "Megatron-Core names"
        if f"{prefix_of(names)}decoder.final_norm.weight" in names:
            return False, f"{kinds} of a HybridModel, whose layers hold attention or a feed-forward each"
        for suffix, what, has in (
            ("self_attention.linear_qkv.bias", "biases for query, key and value", self.biases),
            ("self_attention.q_layernorm.weight", "norms of queries and keys", self.head_norms),
            ("mlp.linear_fc1.bias", "biases in the feed-forward", False),
            ("mlp.router.weight", "experts", self.experts is not None),
        ):
            there = p + suffix in names
            if there != has:
                which = "which" if has else f"of which {self.model} has none"
                return False, f"{kinds} {'with' if there else 'without'} {what}, " + (
                    f"{which} {self.model} has" if has else which
                )
        own = "experts" if self.experts else "norms of queries and keys"
        own = "biases for query, key and value only" if self.biases else own
        special = self.biases or self.head_norms or self.experts
        return True, f"{kinds} with {own}" if special else f"{kinds} without biases"

    def plan(self, checkpoint: Checkpoint, options: Options) -> Plan:
        return plan(self, checkpoint, options)

    def plan_original(self, checkpoint: Checkpoint, options: Options, known: Known) -> Plan:
        """`known` are the fields of the published layout, read from config.json."""
        return plan_original(self, checkpoint, options, known)


def layouts_of(m: Core) -> dict[str, Core]:
    """What such models are written in, by the word in `--form`: the files of ranks, or a folder of
    torch.distributed that any number of ranks loads."""
    return {RANKS: m, FOLDER: replace(m, form=FOLDER, title=f"{m.title} for any number of ranks")}


def _shared(known: Known) -> int:
    """How many queries share a key and a value."""
    return int(known["num_attention_heads"] // known["num_key_value_heads"])


@dataclass(frozen=True)
class Kept:
    """How a model lies in its tensors: the names of a layer's two `norms`, whether there is an output layer
    (`head`; where words and output are tied the last stage's copy of the words), whether gates and ups are
    tensors of their own (`apart`), and how `experts` are kept (see `megatron_experts.KEPT`)."""

    norms: tuple[str, str]
    head: bool
    apart: bool = False
    experts: str | None = None

    @property
    def engine(self) -> bool:
        """Whether Transformer Engine has norms in the layers after them."""
        return self.norms[0] == NORMS[True][0]


def trained(m: Core, only: Container[str] | None = None) -> dict[str, Any]:
    """What args do not say, with the defaults of the class; of the router's, which config.json may leave
    out, those in `only` where it is given."""
    router = megatron_experts.TRAINED if m.experts is not None else {}
    return TRAINED | {k: v for k, v in router.items() if only is None or k in only}


def norms_named(engine: bool, experts: bool) -> tuple[str, str]:
    """Before experts there is always a norm of its own."""
    return NORMS[engine][0], NORMS[engine and not experts][1]


def rules(m: Core, known: Known, kept: Kept) -> tuple[Rule, ...]:
    before, after = kept.norms
    qkv = [
        rule(
            f"{S}self_attention.linear_qkv.{kind}",
            tuple(f"{name}.{kind}" for name in QKV),
            pattern,
            cut=("s", (_shared(known), 1, 1)),
            split="k",
        )
        for kind, pattern in (("weight", "(k s h) d"), ("bias", "(k s h)"))[: 1 + m.biases]
    ]
    norms = [
        rule(f"{S}self_attention.{p}_layernorm.weight", f"{T}self_attn.{p}_norm.weight", "h") for p in "qk"
    ]
    fc1, parts = f"{S}mlp.linear_fc1", [f"{T}mlp.{p}_proj.weight" for p in ("gate", "up")]
    units = [
        *(
            [
                rule(f"{fc1}.{a}.weight", b, "f d", split="f")
                for a, b in zip(("gate", "up"), parts, strict=True)
            ]
            if kept.apart
            else [rule(f"{fc1}.weight", tuple(parts), "(g f) d", cut=("g", (1, 1)), split="f")]
        ),
        rule(S + "mlp.linear_fc2.weight", T + "mlp.down_proj.weight", "d f", split="f"),
    ]
    if m.experts is not None:
        units = [*megatron_experts.rules(m.experts, kept.experts or megatron_experts.SEQUENTIAL)]
    tied = bool(known["tie_word_embeddings"])
    last = rule(
        OUTPUT, "model.embed_tokens.weight" if tied else "lm_head.weight", "v d", split="v", tied=tied
    )
    return (
        rule(WORDS, "model.embed_tokens.weight", "v d", split="v"),
        rule(S + before, T + "input_layernorm.weight", "d"),
        *qkv,
        *(norms if m.head_norms else ()),
        rule(S + "self_attention.linear_proj.weight", T + "self_attn.o_proj.weight", "d (n h)", split="n"),
        rule(S + after, T + "post_attention_layernorm.weight", "d"),
        *units,
        rule("decoder.final_layernorm.weight", "model.norm.weight", "d"),
        *((last,) if kept.head else ()),
    )


# --- numbers --------------------------------------------------------------------------------------------


def own_fields(m: Core) -> tuple[Field, ...]:
    return (*FIELDS, *((HEAD_DIM,) if m.own_width else ()), *(megatron_experts.FIELDS if m.experts else ()))


def rows_of(m: Core, known: Known, padded: int, kept: Kept) -> Table:
    """`padded` counts the words with their padding. Axes: k key/value heads, s queries that share one, the
    key and the value, n query heads, h head width, d width, g gate and up, f feed-forward width, v words, e
    experts."""
    axes: dict[str, Size] = {
        "k": "num_key_value_heads",
        "d": "hidden_size",
        "f": "intermediate_size",
        "n": "num_attention_heads",
        "s": lambda _: _shared(known) + 2,
        "h": "head_dim" if m.own_width else lambda _: known["hidden_size"] // known["num_attention_heads"],
        "g": lambda _: 2,
        "v": lambda _: padded,
        **({"e": "num_local_experts"} if m.experts else {}),
    }
    table = numbers.table_of(known, rules(m, known, kept), axes)
    indices = {"e": table.axes["e"]} if m.experts else {}
    return replace(table, words=known["vocab_size"], indices=indices)


# --- the files ------------------------------------------------------------------------------------------


def prefix_of(names: Collection[str]) -> str | None:
    """What stands before every name; None where these are no names of Megatron-Core's GPT."""
    stem = f"{FIRST}self_attention.linear_qkv.weight"
    found = next(compress(names, map(str.endswith, names, repeat(stem))), None)
    return None if found is None else found.removesuffix(stem)


def kept_as(m: Core, run: Run, options: Options) -> Kept:
    before, after = (
        next((n for n in (NORMS[True][k], NORMS[False][k]) if FIRST + n in run.tensors), NORMS[False][k])
        for k in (0, 1)
    )
    kind = megatron_experts.kind_of(run.tensors) if m.experts else None
    apart = f"{FIRST}mlp.linear_fc1.gate.weight" in run.tensors
    return Kept((before, after), run.keeps(OUTPUT, options), apart, kind)


def _is_gated(run: Run) -> bool:
    """Whether a feed-forward has gates and ups: two rows in for each column out."""
    kind = megatron_experts.kind_of(run.tensors)
    if kind == megatron_experts.APART or f"{FIRST}mlp.linear_fc1.gate.weight" in run.tensors:
        return True
    names = ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight")
    if kind is not None:
        names = megatron_experts.KEPT[kind]
    up, down = (run.first(FIRST + n.replace("{e}", "0")) for n in names)
    if up is None or down is None:
        return False
    if kind == "joined":
        return up.shape[-1] == 2 * down.shape[0]
    return up.shape[0] == 2 * down.shape[-1]


def _layers_of(run: Run, kept: Kept) -> str | None:
    """How a folder of torch.distributed has its layers (of `megatron_dist.LAYERS`); None for files of
    ranks."""
    if all(f.format != layer_axis.FORMAT for f in run.checkpoint.files.values()):
        return None
    if layer_axis.READING in run.checkpoint.readings:
        return megatron_dist.STACKED
    return (
        megatron_dist.SINGLETON
        if kept.apart or kept.experts == megatron_experts.APART
        else megatron_dist.APART
    )


def open_run(m: Core, checkpoint: Checkpoint) -> Run:
    """Kinds: `unsupported`, `missing-shard`, `shard-conflict`, `missing-tensor`."""
    ours, why = m.recognise(set(checkpoint.names()))
    if not ours:
        hint = EXPORT if "with experts" in why or "HybridModel" in why else None
        fail("unsupported", f"expected {m.model}, found {why}", file=checkpoint.path.name, hint=hint)
    prefix = prefix_of(checkpoint.names()) or ""

    # virtual stages are `model0`, `model1`, ...
    before = re.sub(r"(?<=model)\d{1,4}(?=\\\.$)", lambda _: r"(\d{1,4})", re.escape(prefix))

    def own(names: Iterable[str]) -> Iterator[Own]:
        for name in names:
            state = any(re.fullmatch(pattern, name) for pattern in IGNORED)
            if not state and (m := re.match(before, name)):
                chunk = int(m[1]) if m.re.groups else 0
                yield Own(name, chunk, *ranks.without_layer(name[m.end() :]))

    run = with_documents(ranks.open_ranks(checkpoint, "core", own))
    _refuse_formats(run)
    if _is_gated(run):
        return run
    fail(
        "unsupported",
        "expected a gated feed-forward (two rows of linear_fc1 to a column of linear_fc2), found another",
        file=checkpoint.path.name,
    )


def _refuse_formats(run: Run) -> None:
    """Megatron's formats of FSDP have the same container and other names and shapes."""
    asked, file = run.args.get("ckpt_format"), run.checkpoint.path.name
    if asked in ("fsdp_dtensor", "torch_dcp") and any(
        f.format == "dcp" for f in run.checkpoint.files.values()
    ):
        message = (
            f"expected Megatron's torch_dist, found a checkpoint of its format {asked} (args: ckpt_format)"
        )
        hint = "load it with Megatron and save it with --ckpt-format torch_dist"
        fail("unsupported", message, file=file, hint=hint)


# --- to Hugging Face ------------------------------------------------------------------------------------


def plan(m: Core, checkpoint: Checkpoint, options: Options) -> Plan:
    if options.gqa is not None:
        message = "expected the Hugging Face layout, found Megatron-Core's"
        fail("usage", message, where="--gqa", hint="convert first, then pool the heads of what comes out")
    run, why = open_run(m, checkpoint), f"family {m.family}"
    rows, ids = run.size(WORDS, 0), ("bos_token_id", "eos_token_id")
    facts = Facts(run.told, "args", options.settings, places=run.places)
    ends = ends_of(m, 0 if rows is None else rows.value)
    if ends is None and set(ids) & facts.settings.keys():
        ends = Ends((), None, None, "not set")
    texts = {} if ends is None else dict(zip(ids, (ends.begins, ends.ends), strict=True))
    fields = by_name(
        only("architectures", [m.architecture], why),
        only("model_type", m.model_type, why),
        own_fields(m),
        m.fields,
        LENGTH,
        DTYPE,
        numbers.free(f"default of {m.config.name}", **trained(m, only=facts.settings)),
        [numbers.token_ids(n, rule=numbers.given(i, ends.why if ends else "")) for n, i in texts.items()],
    )
    known = Known(fields, facts, run, options)
    left_out = refuse_others(facts, run, m.args(run), m.unused)
    config = known.values()
    if "activation_func" in run.places:
        config["hidden_act"] = Value("silu", ": ".join(run.places["activation_func"]))
    facts.check_settings({*config, *ids, *answered_for(facts, run, m.args(run))})
    facts.check()
    words, padding = known["vocab_size"], known["vocab_size"] if rows is None else rows.value
    files = published.tokenizer_files(checkpoint, options)
    tokenizer = published.copied(files)
    if config["rope_scaling"].value is None:
        del config["rope_scaling"]
    notes = [*notes_on_precision(run), *left_out, *published.counted(words, files), *template_notes(files)]
    notes += [] if tokenizer else ["no tokenizer file is beside the ranks; none was written"]
    if padding != words:
        notes.append(f"{padding - words} rows of padding after the {words} words were left out")
    kept = kept_as(m, run, options)
    original = {"form": RANKS, "tensor_parallel": run.ranks, "rows": padding}
    original |= {"engine": kept.engine, "head": kept.head, **_shared_out(run, kept)}
    if (layers := _layers_of(run, kept)) is not None:
        parallel = ranks.whole_number(run.args.get("tensor_model_parallel_size"))  # words are padded for them
        original |= {"form": FOLDER, "layers": layers, "tensor_parallel": parallel}
        if m.experts is not None:
            original["norms_fused"] = kept.norms[1] == NORMS[True][1]
    documents = [generation_config(config), *tokenizer]
    written = Written(m.family, config, documents, IGNORED, notes, original)
    table = replace(rows_of(m, known, padding, kept), head=OUTPUT)
    return to_hf(table, run, options, written)


def _shared_out(run: Run, kept: Kept) -> dict[str, Any]:
    """For the manifest: how layers and experts were shared out, where they were."""
    found: dict[str, Any] = {}
    if run.stages > 1:
        found = {"pipeline_parallel": run.stages, **ranks.uneven(run)}
    if run.chunks > 1:
        found["virtual_stages"] = run.chunks
    if run.experts > 1:
        found["expert_parallel"] = run.experts
    if kept.experts == megatron_experts.GROUPED:
        found["grouped"] = True
    return found


def ends_of(m: Core, rows: int) -> Ends | None:
    """Those of a vocabulary of as many rows. Where it is none that is published, null stands for what nothing
    tells, unless the class takes null itself."""
    found = next((e for e in m.ends if rows in e.rows), None)
    taken = all(m.config.identity.get(n) is None for n in ("bos_token_id", "eos_token_id"))
    return (
        found
        if found is not None or taken
        else Ends((), None, None, "no published vocabulary has as many rows")
    )


# --- from Hugging Face ----------------------------------------------------------------------------------


def plan_original(m: Core, checkpoint: Checkpoint, options: Options, known: Known) -> Plan:
    """The files of ranks and pipeline stages, or a torch_dist folder; with the args that reading again
    needs."""
    facts, made = known.facts, known.values(known.fields)
    facts.check()
    own = by_name(own_fields(m), LENGTH)
    known = Known(own, facts, known.source, options, m.config, known.once, back=True, made=made)
    form = _form(m, known)
    document = facts.document or {}
    asked_for = {n: made[n].value if n in made else document.get(n) for n in m.unsaid}
    fail_all(_beyond_args(known, asked_for))
    known.value(LENGTH.name)
    facts.check_settings({*known.fields, *m.unsaid})
    facts.check()
    words, tied = known["vocab_size"], bool(known["tie_word_embeddings"])
    left, notes = form.rows - words, [*ranks.split_notes(known, form), *_unsaid_notes(m, document, form)]
    if left:
        notes.append(f"{left} rows of padding follow the {words} words; they repeat the first words")
    written = Written(
        m.family,
        _args(m, known, form),
        published.copied(published.tokenizer_files(checkpoint, options)),
        {},
        notes,
        _form_written(m, form),
    )
    if m.form == FOLDER:
        return _to_folder(m, known, options, written, form)
    kept = Kept(
        norms_named(bool(known.once.get("engine", True)), m.experts is not None),
        head=not tied or form.stages > 1,  # the last stage has a copy of tied words
        experts=None if m.experts is None else megatron_experts.to_write(known).value,
    )
    table = rows_of(m, known, form.rows, kept)
    return ranks.to_ranks(table, known.source, options, written, form, str)


def _form(m: Core, known: Known) -> Form:
    """What the user asked for, else what the original was; a folder has words padded for as many ranks.
    Raises what cannot be shared out."""
    tensor_parallel = ranks.ranks_of(known)
    form = Form(tensor_parallel, ranks.padded(known, tensor_parallel))
    if m.form == RANKS:
        shared = ranks.stages_of(known)
        form = replace(form, stages=shared.stages, chunks=shared.chunks, split=shared.split)
        if m.experts is not None:
            form = _with_experts(known, form)
    if m.form == RANKS or TENSOR_PARALLEL.name in known.options.family_options:
        ranks.check_shares(known, form, "num_key_value_heads", "intermediate_size")
    return form


def _with_experts(known: Known, form: Form) -> Form:
    count = int(known["num_local_experts"])
    asked = known.options.family_options.get(EXPERT_PARALLEL.name)
    experts = ranks.whole_number(asked, known.once.get("expert_parallel"))
    if count % experts and asked is not None:
        message = f"expected num_local_experts {count} to divide by {EXPERT_PARALLEL.flag} {experts}"
        fail("config-mismatch", f"{message}, found a rest", where=EXPERT_PARALLEL.flag)
    if count % experts:
        experts = 1
    return replace(form, experts=experts, own_experts=count // experts)


def _form_written(m: Core, form: Form) -> dict[str, Any]:
    """For the manifest."""
    found: dict[str, Any] = {"form": m.form, "tensor_parallel": form.ranks}
    if form.stages > 1:
        found["pipeline_parallel"] = form.stages
    return found


def _to_folder(m: Core, known: Known, options: Options, written: Written, form: Form) -> Plan:
    """In a torch_dist folder, where the norms are called as Transformer Engine has them whoever computes
    them, and the ranks of `form` say only how far the vocabulary is padded."""
    asked = options.family_options.get("layers")
    layers = known.once.get("layers") if asked is None else asked
    if layers not in megatron_dist.LAYERS:
        layers = megatron_dist.STACKED
    apart = layers == megatron_dist.SINGLETON
    fused = m.experts is None or known.once.get("norms_fused") is True
    kept = Kept(
        norms_named(True, not fused),
        head=not known["tie_word_embeddings"],
        apart=apart,
        experts=megatron_experts.APART if apart and m.experts is not None else None,
    )
    table = rows_of(m, known, form.rows, kept)
    written = replace(written, original={**written.original, "layers": layers})
    version = form.version or 3.0
    return megatron_dist.to_folder(table, known.source, options, written, layers=layers, version=version)


def _beyond_args(known: Known, asked_for: Mapping[str, Any]) -> Iterator[Problem]:
    """Values of config.json for which the arguments of a run have no word."""
    for name, value in asked_for.items():
        if value:
            message = f"expected none, as args have no word for it, found {shown(value)}"
            hint = f"--set {name}=null leaves it out, if the model computes the same without it"
            yield Problem("unsupported", message, "config.json", name, hint)
    if not can_be_said(known):
        message = (
            "expected none but that of use_rope_scaling with factor 8, all that args can say, found another"
        )
        yield Problem("unsupported", message, "config.json", "rope_scaling")


def _unsaid_notes(m: Core, document: Mapping[str, Any], form: Form) -> list[str]:
    """The values of config.json that args have no word for, where reading the ranks again gives others."""
    ends = ends_of(m, form.rows)
    again = {**trained(m), "bos_token_id": ends and ends.begins, "eos_token_id": ends and ends.ends}
    lost = {n: document[n] for n, v in again.items() if document.get(n, v) != v}
    told = {n: printable(json.dumps(v, separators=(",", ":")), 100) for n, v in lost.items()}
    words = " ".join(f"--set {quote(f'{n}={text}')}" for n, text in told.items())
    return [f"args do not say {', '.join(lost)}: reading the ranks again takes {words}"] if lost else []


def _args(m: Core, known: Known, form: Form) -> dict[str, Value]:
    """The pickled args, under the names of core_v0.9.0 (megatron/training/arguments.py)."""
    dtype = known.options.dtype or known.source.dtype
    kv, tied = known.value("num_key_value_heads"), known.value("tie_word_embeddings")
    grouped = Value(kv.value != known["num_attention_heads"], kv.source)
    scaling = known.value("rope_scaling")
    scaled = {"use_rope_scaling": True, "rope_scaling_factor": 8.0} if scaling.value else {}
    return {
        **ranks.shared_args(known, form, {"group_query_attention": grouped, "num_query_groups": kv}),
        "norm_epsilon": known.value("rms_norm_eps"),
        "rotary_base": known.value("rope_theta"),
        "untie_embeddings_and_output_weights": Value(not tied.value, tied.source),
        **{k: Value(v, scaling.source) for k, v in scaled.items()},
        **{k: Value(v, f"{m.model}'s architecture") for k, v in ARCHITECTURE.items()},
        "add_qkv_bias": Value(m.biases, f"{m.model}'s architecture"),
        "qk_layernorm": Value(m.head_norms, f"{m.model}'s architecture"),
        **ranks.split_args(form),
        **_expert_args(m, known, form),
        "params_dtype": Value(f"torch.{DTYPES[dtype].torch}", "dtype of the tensors"),
    }


def _expert_args(m: Core, known: Known, form: Form) -> dict[str, Value]:
    if m.experts is None:
        return {}
    kept = megatron_experts.to_write(known)
    return megatron_experts.args(known, kept=kept, experts=form.experts, ranks=form.ranks)
