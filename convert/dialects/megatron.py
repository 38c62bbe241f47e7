"""What Megatron-LM trained and Hugging Face's layout has classes for: encoders and decoders with learned
positions, norms with biases and a gelu. Checkpoints of every age are read, and written as folders of ranks
with the args that reading them again needs, and those that Megatron's loader compares.

Source of the rules: NVIDIA/Megatron-LM v1.0, v2.0, v2.5, 23.06 and core_v0.9.0 (arguments.py, model/utils.py,
model/transformer.py, tokenizer/tokenizer.py). Counts are those of the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from typing import Any, NoReturn

from ckpt_tool.checkpoint.base import Checkpoint, TensorFile
from ckpt_tool.checkpoint.megatron import check_complete, check_same_run, every_argument
from ckpt_tool.checkpoint.run_documents import RUN_DOCUMENTS
from ckpt_tool.convert import numbers
from ckpt_tool.convert.dialects import megatron_ranks as ranks
from ckpt_tool.convert.dialects.converted import generation_config, kept_facts, read_config
from ckpt_tool.convert.dialects.megatron_args import (
    gelu_flags,
    gelus,
    heads_fit,
    notes_on,
)
from ckpt_tool.convert.dialects.megatron_arguments import (
    LEARNED,
    RESIDUAL,
    UNUSED_BY_CORE,
    UNUSED_BY_LEARNED,
    answered_for,
    notes_on_precision,
    refuse_others,
)
from ckpt_tool.convert.dialects.megatron_names import (
    AGES,
    ENCODER_ONLY,
    VERSIONS,
    WITHOUT_ENGINE,
    age_of,
    fused_order,
    has_one_order,
    is_core,
    is_engine,
    own_names,
    without_model,
)
from ckpt_tool.convert.dialects.megatron_ranks import OUTPUT, Form, Own, Run, whole_number
from ckpt_tool.convert.dialects.megatron_words import Sizes, padding_notes, published_as, read_tokenizer
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import Class, Field, Known, Size, by_name, count, flag, follows, only, special
from ckpt_tool.convert.options import Option
from ckpt_tool.convert.params import NO_CONFIG, UNKNOWN, Facts, renamed
from ckpt_tool.convert.plan import Foretold, Options, OutputDocument, Plan, Value
from ckpt_tool.convert.source import Source, whole_tensors
from ckpt_tool.convert.tokenizers import MAX_BYTES, original_tokenizer_documents
from ckpt_tool.convert.vocabularies import Vocabulary
from ckpt_tool.convert.weave import Held, Table, Written, to_hf
from ckpt_tool.errors import CkptToolError, fail, printable
from ckpt_tool.records import dataclass

COPY = "word_embeddings_for_head.weight"
EXPORTS = "NeMo's scripts/checkpoint_converters and Megatron-Bridge export it to Hugging Face"
ASKED_VERSIONS = ("0", "1.0", "2.0", "3.0")
OPTIONS = (
    Option("keep_padding", "Keep the rows that pad the vocabulary.", "hf"),
    *ranks.OPTIONS,
    Option("checkpoint_version", "Order of query_key_value to write.", "original", ASKED_VERSIONS),
)


@dataclass(frozen=True)
class Megatron:
    """A model that Megatron-LM trained. `rows` are those of its tensors, for an order of the rows of
    query_key_value, but the output layer: where that is, it is a copy of the embedding `words` or, apart from
    it, `head`. `heads`: it is an encoder and has those of pretraining. `fields` are the numbers beside
    model_type and the like, in the order of config.json, which calls some by names of its own (`own_names`,
    to those that every family knows). `padded` says in words what the vocabulary's padding is left out of,
    `layer` finds a layer's number in a name of the converted model."""

    name: str
    architectures: tuple[str, ...]
    classes: Mapping[str, Class]  # one, by model_type
    fields: Sequence[Field]
    rows: Callable[[Known, str], Sequence[Rule]]
    heads: bool
    layer: str
    words: str
    padded: Callable[[Known], str]
    head: str = "lm_head.weight"
    tuned: tuple[str, ...] = ()  # other classes whose heads Megatron's tasks have
    own_names: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)  # of the converted model
    axes: Mapping[str, Size] = field(default_factory=dict)  # beside those of all models
    args: Callable[[Known], Mapping[str, Value]] = lambda _: {}  # the same
    config: Callable[[Known], Mapping[str, Value]] = lambda _: {}  # beside the fields
    notes: Callable[[Known], list[str]] = lambda _: []
    foretold: Mapping[str, Callable[[Known], Sequence[Foretold]]] = field(default_factory=dict)  # by name

    def known(self, facts: Facts, source: Source, options: Options, **more: Any) -> Known:
        (model_type,) = self.classes
        why = f"family {self.name}"
        fields = by_name(
            only("architectures", [self.architectures[0]], why, told=False),
            only("model_type", model_type, why, told=False),
            self.fields,
            ROWS,
            PADDED,
        )
        return Known(fields, facts, source, options, **more)

    @property
    def written_names(self) -> dict[str, str]:
        """What config.json calls fields that it has other names for."""
        return {generic: name for name, generic in self.own_names.items()}

    def settings(self, options: Options) -> dict[str, Any]:
        """Those of the user under the names that every family knows."""
        return renamed(options.settings, self.own_names)


def family(*, summary: str, vocabulary: Vocabulary, **said: Any) -> Family:
    """The record of a family; `said` are the parts of `Megatron`."""
    m = Megatron(**said)
    return Family(
        name=m.name,
        summary=summary,
        architectures=m.architectures,
        recognise=partial(recognise, m),
        plan=partial(plan, m),
        plan_original=partial(plan_original, m),
        held=partial(held, m),
        options=OPTIONS,
        vocabulary=vocabulary,
        foretold=tuple(m.foretold),
        classes=m.classes,
        tensors=(
            "language_model.encoder.layers.0.self_attention.query_key_value.weight",
            "language_model.transformer.layers.0.attention.query_key_value.weight",
            "decoder.layers.0.self_attention.linear_qkv.weight",
        ),
    )


def both(
    source: str, target: str | tuple[str, ...], weight: str, bias: str, *, split: str = "", cut: Any = None
) -> Iterator[Rule]:
    """The rows of a weight and its bias, whose names end in that; ranks share out `split` where it is."""
    stems = (target,) if isinstance(target, str) else target
    for kind, pattern in (("weight", weight), ("bias", bias)):
        shared = split if split in re.findall(r"\w+", pattern) else None
        yield rule(source + kind, tuple(stem + kind for stem in stems), pattern, cut=cut, split=shared)


# --- fields ---------------------------------------------------------------------------------------------


def _measured(source: Source, name: str, dimension: int, *, shared: bool = True) -> Value:
    """The size of a matrix as its ranks have it, all together if `shared`."""
    tensor = source.first(name)
    if tensor is None:
        fail("missing-tensor", "expected this tensor, found none", where=name)
    if len(tensor.shape) != 2:
        fail("shape-mismatch", f"expected a matrix, found {tensor.shape}", where=name)
    times = source.ranks if shared else 1
    over = f" over {times} ranks" if times > 1 else ""
    return Value(tensor.shape[dimension] * times, f"{('rows', 'columns')[dimension]} of {name}{over}")


def _size(name: str, key: str, measure: Callable[[Source], Value], **more: Any) -> Field:
    """A count that the tensors tell: what args or the user say otherwise is a problem."""

    def agrees(known: Known, told: Value) -> Value:
        if known.back or told.value == measure(known.source).value:
            return told
        kind, there = "config-mismatch", measure(known.source)
        if name == "num_hidden_layers":
            kind = "uncovered-tensors" if told.value < there.value else "missing-tensor"
        message = f"expected {told.value} ({told.source}), found {there.value} ({there.source})"
        known.refuse(kind, message, name)
        return UNKNOWN

    return count(name, key, rule=lambda known: measure(known.source), check=agrees, **more)


def _layers(source: Source) -> Value:
    return Value(source.layers, "layers in the tensor names")


_rows = partial(_measured, name="word_embeddings.weight", dimension=0)
_positions = partial(_measured, name="position_embeddings.weight", dimension=0, shared=False)
_width = partial(_measured, name="word_embeddings.weight", dimension=1, shared=False)
_inner = partial(_measured, name="layers.0.mlp.dense_h_to_4h.weight", dimension=0)
ROWS = follows("rows", lambda known: _rows(known.source), hidden=True)
PADDED = _size("padded_vocab_size", "padded_vocab_size", _rows, hidden=True, told=False)
LAYERS = _size("num_hidden_layers", "num_layers", _layers)
WIDTH = _size("hidden_size", "hidden_size", _width)
INNER = _size("intermediate_size", "ffn_hidden_size", _inner)
POSITIONS = _size("max_position_embeddings", "max_position_embeddings", _positions)
EPSILON = ranks.epsilon(
    "layer_norm_eps", rule=Value(1e-5, "rule: args do not say; Megatron's default was always 1e-5")
)
TIED = flag("tie_word_embeddings", rule=ranks.tie, check=ranks.output_is_there)


def heads(published: Sizes) -> Field:
    def rule(known: Known) -> Value | None:
        model = published_as(known, published)
        return model and Value(model.heads, f"rule: the sizes are those of {model.name}")

    ask = "the number of attention heads"
    return count("num_attention_heads", "num_attention_heads", rule=rule, ask=ask, check=heads_fit)


def token_id(name: str, rule: Callable[[Known], Value]) -> Field:
    """One that the tokenizer tells, or else a rule; no original says it."""
    return replace(special(name, rule), free=True)


def _must_tie(known: Known, found: Value) -> Value:
    if known.back:
        return found
    said = ranks.output_is_there(known, ranks.tie(known))
    if not said.value:
        message = "expected the embedding as output layer, found another"
        known.refuse("unsupported", message, "output_layer")
    return Value(True, said.source)


ALWAYS_TIED = only("tie_word_embeddings", True, "all that the original can be", check=_must_tie)

# t query, key and value, n heads of h channels, d and e width, f feed-forward width, p positions
AXES: dict[str, Size] = {
    "t": lambda _: 3,
    "n": "num_attention_heads",
    "h": lambda known: int(known["hidden_size"] // known["num_attention_heads"]),
    "d": "hidden_size",
    "e": "hidden_size",
    "f": "intermediate_size",
    "p": "max_position_embeddings",
    "two": lambda _: 2,
}


def _table(m: Megatron, known: Known, order: str, rows: int, output: str | None) -> Table:
    """The rows filled in; `rows` counts the vocabulary's, padding included."""
    tied = bool(known["tie_word_embeddings"])
    last = rule(output or OUTPUT, m.words if tied else m.head, "v d", split="v", tied=tied)
    table = (*m.rows(known, order), *((last,) if output else ()))
    axes: dict[str, Size] = {**AXES, **m.axes, "v": lambda _: rows}
    made = replace(numbers.table_of(known, table, axes), words=known["vocab_size"])
    # on the way to Hugging Face: a stage's copy of the embedding is no output layer of its own
    own_head = output != COPY and numbers.may_untie(known.fields)
    return made if known.back else replace(made, head=OUTPUT if own_head else "")


# --- opening --------------------------------------------------------------------------------------------


def recognise(m: Megatron, checkpoint: Checkpoint) -> tuple[bool, str]:
    try:
        names = checkpoint.names()
        age = age_of(names)
    except CkptToolError as error:
        return False, error.problems[0].message
    if age is None:
        return False, "no Megatron names such as language_model.embedding.word_embeddings.weight"
    held = {without_model(n)[1] for n in names}
    there = [n for n in ENCODER_ONLY if own_names(age)[n] in held]
    if bool(there) != m.heads:
        return False, f"Megatron names with{f' {there[0]}' if there else 'out the heads of BERT'}"
    return True, f"Megatron names of the age `{age}`" + (f", with {there[0]}" if there else "")


def open_run(checkpoint: Checkpoint) -> Run:
    """Sort out the files. Kinds: `already-converted`, `unsupported` (names of no known age), `missing-shard`,
    `shard-conflict`, `config-mismatch` (an unknown checkpoint_version)."""
    age = age_of(checkpoint.names())
    if age is None:
        _refuse_names(checkpoint)
    _refuse_other_programs(checkpoint, is_core(age))
    table = {own: name for name, own in own_names(age).items()}
    if is_core(age):  # one name for two things; which one it is the families decide
        table[own_names(age)[OUTPUT]] = OUTPUT

    def own(names: Iterable[str]) -> Iterator[Own]:
        named = [(name, *without_model(name)) for name in names]
        prefixed = any(rest != name for name, _, rest in named)
        for name, chunk, rest in named:
            template, layer = ranks.without_layer(rest)
            if template in table and not (prefixed and rest == name):
                yield Own(name, int(chunk or 0), table[template], layer)

    run = ranks.open_ranks(checkpoint, age, own)
    _check_complete(run)
    first = checkpoint.files[run.files[0][0]]
    iteration = first.metadata.get("iteration")
    iteration = iteration if isinstance(iteration, int) and not isinstance(iteration, bool) else None
    return replace(run, said_version=_version(first, checkpoint), iteration=iteration)


def _refuse_other_programs(checkpoint: Checkpoint, core: bool) -> None:
    """NeMo and Megatron-Bridge keep what their models compute in documents that no family of this dialect
    reads, and NeMo's own classes have the rows of query_key_value in another order than version 0."""
    found = [n for n in RUN_DOCUMENTS if n in checkpoint.documents]
    found += [n for n in checkpoint.files if n.rpartition("/")[2] == "model_weights.ckpt"]
    if found:
        older = (
            "NeMo's scripts/checkpoint_converters/convert_gpt_nemo_to_mcore.py writes it as Megatron-Core's"
        )
        message = "expected a checkpoint of Megatron-LM, found one of NeMo or Megatron-Bridge of this kind"
        hint = f"{older}; of those gated decoders are read" if not core else EXPORTS
        fail("unsupported", message, file=found[0], hint=hint)


def _refuse_names(checkpoint: Checkpoint) -> NoReturn:
    names, label = checkpoint.names(), checkpoint.path.name
    if any(re.match(r"bert\.|transformer\.h\.|cls\.", n) for n in names):
        fail(
            "already-converted",
            f"expected an original layout, found Hugging Face names such as {names[0]}",
            file=label,
            hint=NO_CONFIG,
        )
    if any(".distcp" in n for n in checkpoint.files):
        fail("wrong-format", "expected ranks, found a torch_dist checkpoint", file=label)
    check_same_run(checkpoint)
    shown = ", ".join(printable(n, 60) for n in names[:3]) or "none"
    fail("unsupported", f"expected tensor names of a Megatron of some age, found {shown}", file=label)


def _version(file: TensorFile, checkpoint: Checkpoint) -> float | None:
    """checkpoint_version: 0 is written by nobody and what a file without one has."""
    if "checkpoint_version" not in file.metadata:
        names = [*checkpoint.names(), *(t.tensor.name for t in checkpoint.left_out)]
        within = [n for n in names if n.rpartition(".")[2] == "checkpoint_version"]
        within += [f"{k}.checkpoint_version" for k, v in file.metadata.items() if _holds_version(v)]
        if within:
            message = "expected checkpoint_version as a number beside the model, found it elsewhere"
            hint = "save it there with torch.save: query_key_value is of another order without it"
            fail("config-mismatch", message, file=file.name, where=within[0], hint=hint)
        return None
    found = file.metadata["checkpoint_version"]
    if isinstance(found, bool) or not isinstance(found, int | float) or found not in VERSIONS:
        shown = printable(repr(found), 60) if isinstance(found, int | float | str) else "another type"
        fail(
            "config-mismatch",
            f"expected checkpoint_version 0, 1.0, 2.0 or 3.0, found {shown}",
            file=file.name,
            where="checkpoint_version",
            hint="it says in which order the rows of query_key_value are; no other order is known",
        )
    return float(found)


def _holds_version(value: object, depth: int = 3) -> bool:
    if not isinstance(value, dict) or not depth:
        return False
    return "checkpoint_version" in value or any(_holds_version(v, depth - 1) for v in value.values())


def _check_complete(run: Run) -> None:
    """Fail with `missing-shard` where a last stage is not there, or where the output projection of attention,
    of which each rank holds its heads' columns, says that there are more ranks."""
    if "final_layernorm.weight" not in run.tensors and "word_embeddings.weight" in run.tensors:
        why = "no file holds the final norm, which is on the last stage"
        check_complete(run.checkpoint, stages=run.stages + 1, why=why)
    shape = run.tensors["layers.0.attention.dense.weight"][0].shape
    if len(shape) != 2 or not shape[1] or run.args.get("kv_channels"):
        return
    wanted = shape[0] // shape[1]
    if shape[0] == wanted * shape[1] and wanted > run.ranks:
        why = f"each holds {shape[1]} of {shape[0]} columns of attention.dense"
        check_complete(run.checkpoint, ranks=wanted, why=why)


# --- original to Hugging Face ---------------------------------------------------------------------------


def plan(m: Megatron, checkpoint: Checkpoint, options: Options) -> Plan:
    run = open_run(checkpoint)
    facts = Facts(run.told, "args", m.settings(options))
    core = is_core(run.age)
    wanted = LEARNED if core else {**LEARNED, **RESIDUAL}
    unused = f"{UNUSED_BY_LEARNED} {UNUSED_BY_CORE}" if core else UNUSED_BY_LEARNED
    left_out = refuse_others(facts, run, wanted, unused)
    facts.check()
    sizes = {"rows": _rows(run).value, "positions": _positions(run).value}
    tokenizer = read_tokenizer(m.name, run, options, **sizes)
    where = "the tokenizer beside the weights" if options.tokenizer is None else "--tokenizer"
    ids = Value(tokenizer.vocab_size, f"{where}: its number of ids")
    known = m.known(facts, run, options, told={**tokenizer.facts, "ids": ids})  # as `words` reads it
    config = {m.written_names.get(name, name): value for name, value in known.values().items()}
    config |= m.config(known)
    known.value(PADDED.name)
    facts.check_settings({*config, *m.own_names.values(), *answered_for(facts, run, wanted)})
    facts.check()
    words, rows = known.value("vocab_size"), known.value("rows")
    documents = [
        OutputDocument(n, d, "the tokenizer beside the weights") for n, d in tokenizer.documents.items()
    ]
    beside = Written(
        m.name,
        config,
        [*([generation_config(config)] if "eos_token_id" in config else []), *documents],
        ranks.IGNORED,
        [
            *notes_on(run),
            *notes_on_precision(run),
            *left_out,
            *padding_notes(words, rows, m.padded(known)),
            *m.notes(known),
            *tokenizer.notes,
        ],
        _kept(run, known),
        [f for tell in m.foretold.values() for f in tell(known)],
    )
    output = next((name for name in (COPY, OUTPUT) if run.keeps(name, options)), None)
    table = _table(m, known, fused_order(run.version, has_one_order(run.age)), rows.value, output)
    return to_hf(table, run, options, beside)


_KEPT_ARGS = (
    "make_vocab_size_divisible_by",
    "tokenizer_type",
    "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling",
    "apply_residual_connection_post_layernorm",
)


# How the layers were shared out over pipeline stages, where not evenly.
_SPLIT_ARGS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
    "standalone_embedding_stage",
)


def _split_args(run: Run) -> dict[str, Any]:
    said = every_argument(run.checkpoint.files[run.files[0][0]]) or {}
    return {k: said[k] for k in _SPLIT_ARGS if said.get(k)} if ranks.uneven(run) else {}


def _kept(run: Run, known: Known) -> dict[str, Any]:
    """What the Hugging Face layout does not say, for the manifest and the way back."""
    gelu, head_gelu = gelus(known)
    return {
        "age": run.age,
        "checkpoint_version": run.said_version,
        "tensor_parallel": run.ranks,
        "pipeline_parallel": run.stages,
        "virtual_stages": run.chunks,
        "iteration": run.iteration,
        "release": run.files[0][0].startswith("release/"),
        "rows": known["rows"],
        "words": known["vocab_size"],
        "gelu": gelu.value,
        "head_gelu": head_gelu.value,
        "args": {k: run.args[k] for k in _KEPT_ARGS if k in run.args} | _split_args(run),
        **ranks.uneven(run),
    }


# --- from Hugging Face ----------------------------------------------------------------------------------


def plan_original(m: Megatron, checkpoint: Checkpoint, options: Options) -> Plan:
    """Ranks, as asked for or as the original was, with the args that reading again needs."""
    (config,) = m.classes.values()
    classes = (*m.architectures, *m.tuned)
    facts = read_config(checkpoint, m.settings(options), classes, own=config)
    once, source = kept_facts(checkpoint), whole_tensors(checkpoint, m.layer)
    known = m.known(facts, source, options, config=config, once=once, back=True, names=m.written_names)
    said = [n for n, f in known.fields.items() if f.told and not f.free]
    known.values(said)
    facts.check()
    facts.check_settings(said)
    facts.check()
    form, words = _form(known), known["vocab_size"]
    documents = {n: d.read(MAX_BYTES) for n, d in checkpoint.documents.items() if n in _VOCABULARY}
    vocabulary = original_tokenizer_documents(documents, family=m.name)
    notes = ranks.split_notes(known, form)
    if form.rows != words:
        notes.append(
            f"{form.rows - words} rows of padding follow the {words} words, up to a multiple that the ranks "
            "share: they repeat the first words"
        )
    if not vocabulary:
        notes.append("no original tokenizer file is there; none was written")
    written = Written(
        m.name,
        _args(m, known, form),
        [OutputDocument(n, d, "the tokenizer in the folder") for n, d in vocabulary.items()],
        m.ignored,
        [*facts.notes, *notes],
        {
            "age": form.age,
            "checkpoint_version": form.version,
            "tensor_parallel": form.ranks,
            "pipeline_parallel": form.stages,
            "virtual_stages": form.chunks,
            "rows": form.rows,
        },
        [f for tell in m.foretold.values() for f in tell(known)],
    )
    copy = COPY if form.stages > 1 else None
    output = copy if known["tie_word_embeddings"] else OUTPUT
    table = _table(m, known, fused_order(form.version or 0.0, has_one_order(form.age)), form.rows, output)
    return ranks.to_ranks(table, source, options, written, form, own_names(form.age).__getitem__)


def held(m: Megatron, checkpoint: Checkpoint, options: Options, architecture: str) -> Held:
    """See `Family.held`."""
    (config,) = m.classes.values()
    facts = read_config(checkpoint, m.settings(options), (architecture,), own=config)
    source = whole_tensors(checkpoint, m.layer)
    known = m.known(facts, source, options, config=config, once={}, back=True, names=m.written_names)
    output = None if known["tie_word_embeddings"] else OUTPUT
    table = _table(m, known, fused_order(VERSIONS[-1], False), known["vocab_size"], output)
    return Held(table, source, facts, m.ignored)


_VOCABULARY = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json")


def _form(known: Known) -> Form:
    """What the user asked for, else what the original was, else version 3.0 of one rank. Raises what cannot
    be shared out."""
    asked, once = known.options.family_options, known.once
    version = _version_to_write(known)
    age = once.get("age")
    if isinstance(age, str) and is_engine(age) and gelus(known)[0].value != "tanh":
        age = WITHOUT_ENGINE[age]  # whose layers take another gelu too
    as_core = isinstance(age, str) and has_one_order(age) and asked.get("checkpoint_version") is not None
    if not isinstance(age, str) or age not in AGES or (as_core and version != 3.0):
        age = "encoder" if version == 3.0 else "transformer"
    tensor_parallel, shared = ranks.ranks_of(known), ranks.stages_of(known)
    form = Form(
        tensor_parallel,
        ranks.padded(known, tensor_parallel, _divisor(known)),
        age,
        version,
        shared.stages,
        shared.chunks,
        whole_number(once.get("iteration"), otherwise=0),
        once.get("release") is not False or not once.get("iteration"),
        shared.split,
    )
    ranks.check_shares(known, form, "num_attention_heads", "intermediate_size")
    return form


def _once_args(known: Known) -> Mapping[str, Any]:
    found = known.once.get("args")
    return found if isinstance(found, dict) else {}


def _divisor(known: Known) -> int:
    return whole_number(_once_args(known).get("make_vocab_size_divisible_by"), otherwise=ranks.DIVISOR)


def _version_to_write(known: Known) -> float | None:
    asked, once = known.options.family_options.get("checkpoint_version"), known.once
    if asked is None:
        found = once.get("checkpoint_version", 3.0)
        said = isinstance(found, float | int) and found in VERSIONS
        return float(found) if said else None if found is None else 3.0
    # a manifest says numbers, the command line their text
    number = next((v for v, text in zip(VERSIONS, ASKED_VERSIONS, strict=True) if asked in (v, text)), None)
    if number is None:
        message = f"expected {' or '.join(ASKED_VERSIONS)}, found {asked!r}"
        fail("usage", message, where="--checkpoint-version")
    return number


def _args(m: Megatron, known: Known, form: Form) -> dict[str, Value]:
    """The pickled args."""
    dtype, core, sharing = known.options.dtype or known.source.dtype, is_core(form.age), "ranks to write"
    epsilon = "norm_epsilon" if core or form.age in ("norm", "engine-norm") else "layernorm_epsilon"
    shares = {"model_parallel_size": Value(form.ranks, sharing)} if (form.version or 0) < 3 else {}
    if form.version == 3.0 or form.stages > 1:
        shares |= ranks.split_args(form)
    args = {
        **ranks.shared_args(known, form, {}),
        "make_vocab_size_divisible_by": Value(_divisor(known), "the original's, or 128"),
        epsilon: known.value("layer_norm_eps"),
        **gelu_flags(known, core),
        "fp16": Value(dtype == "F16", "dtype of the tensors"),
        "bf16": Value(dtype == "BF16", "dtype of the tensors"),
        **shares,
    }
    once = {k: Value(v, "ckpt-tool.json: the original's args") for k, v in _once_args(known).items()}
    if not form.split or form.split != tuple(known.once.get(ranks.SPLIT) or ()):
        once = {k: v for k, v in once.items() if k not in _SPLIT_ARGS}
    elif once.keys() & _SPLIT_ARGS:  # the original's own words for the same
        args = {k: v for k, v in args.items() if k not in _SPLIT_ARGS}
    return {**args, **{k: v for k, v in once.items() if k not in args}, **m.args(known)}
