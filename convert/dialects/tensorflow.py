"""What Google's TensorFlow 1 code trained: a bundle of variables, the config json of its code beside it, and
vocab.txt where the model has words.

Variables have `/` in their names. A kernel is (in, out), so it is transposed; a norm has gamma and beta; what
the optimizer keeps of a variable stands below the variable's name. The config json is what `BertConfig` of
google-research/bert (modeling.py) and its descendants read: what it does not say has the default of that
class, and not of the one in transformers. Without the file sizes are measured.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.tf_names import bundle_of, data_name, is_data
from ckpt_tool.checkpoint.weight_sets import is_settings, vocabulary_kind
from ckpt_tool.convert.dialects.converted import kept_facts, read_config
from ckpt_tool.convert.dialects.vocabulary import files_beside_or_asked
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DEFAULT,
    Check,
    Class,
    Field,
    Known,
    Size,
    Value,
    anything,
    by_name,
    count,
    flag,
    given,
    only,
    shown,
    table_of,
)
from ckpt_tool.convert.params import SET, Facts, left_out
from ckpt_tool.convert.plan import Foretold, Options, OutputDocument, Plan, config_document
from ckpt_tool.convert.source import Source, layer_count, whole_tensors
from ckpt_tool.convert.tokenizers import (
    ADDED,
    TokenizerResult,
    original_tokenizer_documents,
    tokenizer_documents,
)
from ckpt_tool.convert.vocabularies import Vocabulary as Vocabulary
from ckpt_tool.convert.weave import Held, Table, Written, to_hf, to_original
from ckpt_tool.errors import Problem, fail, fail_all, printable
from ckpt_tool.records import dataclass

OPTIMIZER = "state of the optimizer"
RUN = "state of the training run"
# By the names of TensorFlow's optimizers and of those in Google's code (optimization.py, lamb_optimizer.py),
# of mesh-tensorflow, of NVIDIA's sums of gradients and of tf.contrib.mixed_precision.
_OTHERS = "LAMB|Momentum|(Proximal)?Adagrad(DA)?|Adadelta|Adafactor|Ftrl"
_KERAS = "Adam(W|WeightDecay|ax)?|Nadam|SGD|RMSprop"
STATE = {
    r".+/((adam|lamb)_[mv]|adafactor_(m|v|vr|vc)|accum)": OPTIMIZER,
    r".+_slot_(m|v|vr|vc)": OPTIMIZER,
    rf".+/((Lazy|Weighted)?Adam(W|WeightDecay)?|{_OTHERS}|RMSProp)(Optimizer)?(_\d+)?": OPTIMIZER,
    rf"(training(_\d+)?/)?({_KERAS}|{_OTHERS})(_\d+)?/.+": OPTIMIZER,
    r"(.+/)?beta[12]_power(_\d+)?": OPTIMIZER,
    r"signal_early_stopping/STOP": RUN,
    r"(.+/)?(global_step|local_step|batch_finite|(good|bad)_steps|(current_)?loss_scale)(_\d+)?": RUN,
}


@dataclass(frozen=True)
class Trained:
    """A model of Google's. `told_by` are variables that it has and no other model, one of them at least,
    beside those of `needed`; `why_not` says what a model is that has none of them. `layer` are the patterns
    that find a layer's number in a name of the original and of the converted model, `ignored` the variables
    to leave out beside those of training. `rows` name the converted tensors with the prefix of the class
    before them; `bare` are the architectures that are saved without it, `outside` how the names begin that
    never have it.

    `documents` is what the config json may be called, as it is written first; `entries` are its keys, in
    order, and the fields behind them. `indices` are those of the rows beside the layer's, `config` what
    config.json says beside the fields, `kept` what the manifest keeps, `check` collects what else stands in
    the way, `dropped` adds to what is left out, `unread` to what is left out of a folder of transformers.
    `stem` is what the bundle is called that is written where nothing is known of the original's."""

    name: str
    title: str
    architectures: tuple[str, ...]
    classes: Mapping[str, Class]  # one, by model_type
    fields: Sequence[Field]
    rows: Callable[[Known], Sequence[Rule]]
    axes: Callable[[Known], Mapping[str, Size]]
    needed: tuple[str, ...]
    told_by: tuple[str, ...]
    layer: tuple[str, str]
    documents: tuple[str, ...]
    entries: Mapping[str, str]
    stem: str
    ignored: Mapping[str, str] = field(default_factory=dict)
    bare: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    why_not: str = ""
    indices: Callable[[Known], Mapping[str, int]] = lambda _: {}
    config: Callable[[Known], Mapping[str, Value]] = lambda _: {}
    kept: Callable[[Known], Mapping[str, Any]] = lambda _: {}
    check: Callable[[Known], None] = lambda _: None
    dropped: Callable[[Known], Mapping[str, str]] = lambda _: {}
    unread: Callable[[Known], Mapping[str, str]] = lambda _: {}
    notes: Callable[[Known], list[str]] = lambda _: []
    foretold: Mapping[str, Callable[[Known], Sequence[Foretold]]] = field(default_factory=dict)  # by name

    @property
    def own(self) -> Class:
        return next(iter(self.classes.values()))

    @property
    def left_out(self) -> dict[str, str]:
        return {**STATE, **self.ignored}

    def known(self, facts: Facts, source: Source, options: Options, **more: Any) -> Known:
        (model_type,) = self.classes
        fields = by_name(only("model_type", model_type, f"family {self.name}", told=False), self.fields)
        return Known(fields, facts, source, options, **more)

    def table(self, known: Known) -> Table:
        made = table_of(known, self.rows(known), self.axes(known))
        return replace(made, indices={**made.indices, **self.indices(known)})


def family(*, summary: str, vocabulary: Vocabulary, **said: Any) -> Family:
    """The record of a family; `said` are the parts of `Trained`."""
    t = Trained(**said)
    return Family(
        name=t.name,
        summary=summary,
        architectures=t.architectures,
        recognise=partial(recognise, t),
        plan=partial(plan, t),
        plan_original=partial(plan_original, t),
        held=partial(held, t),
        vocabulary=vocabulary,
        foretold=tuple(t.foretold),
        classes=t.classes,
        tensors=(*t.needed, *t.told_by),
        document=t.documents[0],
    )


# --- rows -----------------------------------------------------------------------------------------------


def dense(source: str, target: str, inputs: str, outputs: str) -> Iterator[Rule]:
    """A layer with a bias; the axes of its inputs and outputs must have two names."""
    yield rule(f"{source}/kernel", f"{target}.weight", f"{inputs} {outputs} -> {outputs} {inputs}")
    yield rule(f"{source}/bias", f"{target}.bias", outputs)


def norm(source: str, target: str, width: str) -> Iterator[Rule]:
    yield rule(f"{source}/gamma", f"{target}.weight", width)
    yield rule(f"{source}/beta", f"{target}.bias", width)


def output(source: str, target: str, classes: str, width: str) -> Iterator[Rule]:
    """A layer whose weights are used transposed, and so are (out, in) on both sides."""
    yield rule(f"{source}output_weights", f"{target}.weight", f"{classes} {width}")
    yield rule(f"{source}output_bias", f"{target}.bias", classes)


def has(known: Known, original: str, converted: str) -> bool:
    """Whether a variable is there, by its name on either side, and not asked to be left out."""
    return known.source.keeps(converted if known.back else original, known.options)


# --- fields ---------------------------------------------------------------------------------------------

Measure = Callable[[Known], "Value | None"]


def silence(default: Any, measure: Measure | None = None) -> Measure:
    """What it means that no config json says a value: where the file is there the default of the publisher's
    class (a function where that follows from other values), else what the tensors tell."""

    def rule(known: Known) -> Value | None:
        if known.facts.document is None:
            return None if measure is None else measure(known)
        value = default(known) if callable(default) else default
        return Value(
            value, f"rule: {known.facts.file} does not say; the default of the publisher's BertConfig"
        )

    return rule


def size(name: str, default: Any, variable: str, dimension: int, **more: Any) -> Field:
    """A size that a variable shows, which is held against it when the rows are filled in."""

    def measure(known: Known) -> Value | None:
        return known.source.size(variable, dimension, shared=False)

    return count(name, name, rule=silence(default, measure), silent=DEFAULT, **more)


def shape_flag(name: str, default: bool, measure: Measure, **more: Any) -> Field:
    """A flag that shows in which variables there are: what the file or the user says otherwise is refused."""
    return flag(name, name, rule=silence(default, measure), check=agrees(name, measure), **more)


def shape_count(name: str, default: int, measure: Measure, **more: Any) -> Field:
    """The same for a number."""
    return count(
        name, name, rule=silence(default, measure), silent=DEFAULT, check=agrees(name, measure), **more
    )


def agrees(name: str, measure: Measure) -> Check:
    """A check that the variables say what was read; they may say nothing."""

    def check(known: Known, told: Value) -> Value:
        there = None if known.back else measure(known)
        if there is not None and there.value != told.value:
            message = (
                f"expected {shown(told.value)} ({told.source}), found {shown(there.value)} ({there.source})"
            )
            hint = f"--set {name}={shown(there.value)} if the file is wrong"
            known.refuse("config-mismatch", message, name, hint)
        return told

    return check


def share(name: str, default: float, *, unsaid: float) -> Field:
    """What is dropped in training, from 0 to 1, or another small number that changes nothing computed: by
    default of the publisher's class, and of the one in transformers where there is no config json."""

    def check(known: Known, told: Value) -> Value:
        if type(told.value) not in (int, float) or not 0 <= told.value <= 1:
            known.refuse("bad-config", f"expected a number from 0 to 1, found {shown(told.value)}", name)
            return told
        return Value(float(told.value), told.source)

    rule = silence(default, lambda _: given(unsaid, "nothing says it, and it is for training only"))
    return anything(name, name, rule=rule, silent=DEFAULT, check=check)


# Those of the publisher's code, and what each is called in transformers. Its gelu is the tanh form
# (google-research/bert, modeling.py); "gelu" of transformers is another function.
ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "relu6": "relu6", "tanh": "tanh", "linear": "linear"}
TANH_FORMS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")


def activation(
    default: str, measure: Measure, *, names: Mapping[str, str] = ACTIVATIONS, besides: Sequence[str] = ()
) -> Field:
    """`hidden_act`, by the name that transformers has for what the original computes; the user gives it by
    that name too. `names` are those of the original, `default` and what `measure` gives are among them;
    `besides` are others that config.json may have though the original computes none of them."""

    def check(known: Known, told: Value) -> Value:
        if not known.back and told.source != SET:
            return _own_activation(known, told, names)
        name = told.value
        if not isinstance(name, str) or name not in {*TANH_FORMS, *names.values(), *besides}:
            known_ones = ", ".join(dict.fromkeys((*names.values(), *besides)))
            found = f"expected one of {known_ones}, found {shown(name)}"
            hint = "gelu_new is the tanh form, which the original's gelu is" if name == "gelu" else None
            known.refuse("unsupported", found, "hidden_act", hint)
        return told

    return anything(
        "hidden_act",
        "hidden_act",
        rule=silence(default, measure),
        silent=DEFAULT,
        check=check,
        ask="the activation, by its name in transformers",
    )


def _own_activation(known: Known, told: Value, names: Mapping[str, str]) -> Value:
    """What the original's name for an activation is in transformers; no name at all is none."""
    own = str(told.value or "linear").lower()
    if own in names:
        same = names[own] == own
        return told if same and told.value == own else Value(names[own], f"{told.source} {shown(told.value)}")
    message = f"expected one of {', '.join(names)}, found {shown(told.value)}"
    known.refuse("unsupported", message, "hidden_act", "--set hidden_act=NAME, as transformers calls it")
    return told


def own_activation(name: str, names: Mapping[str, str] = ACTIVATIONS) -> str:
    """What the original calls an activation of transformers."""
    return next(
        (own for own, other in names.items() if other == name), "gelu" if name in TANH_FORMS else name
    )


# --- opening --------------------------------------------------------------------------------------------


def recognise(t: Trained, checkpoint: Checkpoint) -> tuple[bool, str]:
    missing = [n for n in t.needed if n not in checkpoint]
    if missing:
        return False, f"no variable {missing[0]}"
    found = next((n for n in t.told_by if n in checkpoint), None)
    if found is None:
        return False, t.why_not or f"none of {', '.join(t.told_by)}"
    return True, f"variable {found}"


def original_source(t: Trained, checkpoint: Checkpoint) -> Source:
    """The model's variables: those of training are not among them, whose dtype may be another. Fails for what
    is no original of this family."""
    own, why = recognise(t, checkpoint)
    if not own:
        scopes = {n.removesuffix(t.needed[0]) for n in checkpoint.names() if n.endswith(f"/{t.needed[0]}")}
        message, hint = f"expected {t.title} of TensorFlow 1, found {why}", None
        if scopes:
            shown = ", ".join(printable(s) for s in sorted(scopes)[:4])
            which = f"each of {len(scopes)} scopes:" if len(scopes) > 1 else "the scope"
            message += f", but one in {which} {shown}"
            hint = (
                "save the one that is meant without its scope: tf.compat.v1.train.Saver takes a dict of names"
                " and variables"
            )
        fail("unsupported", message, file=checkpoint.path.name, hint=hint)
    left_out = re.compile("|".join(f"(?:{pattern})" for pattern in t.left_out) or r"(?!)")
    whole = whole_tensors(checkpoint, t.layer[0])
    tensors = {n: x for n, x in whole.tensors.items() if not left_out.fullmatch(n)}
    return replace(whole, tensors=tensors, layers=layer_count(tensors, t.layer[0]))


def settings_of(t: Trained, checkpoint: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """The config json of the publisher's code beside the weights, by any of its names; None without one. A
    config.json counts where it is no model's of transformers."""
    found = {n: checkpoint.json(n) for n in checkpoint.documents if is_settings(n)}
    if "config.json" in checkpoint.documents and not found:
        document = checkpoint.json("config.json")
        if not {"model_type", "architectures", "transformers_version"} & document.keys():
            found = {"config.json": document}
    named = [n for n in t.documents if n in found] or list(found)
    if len(named) > 1 and any(found[n] != found[named[0]] for n in named):
        message = f"expected one config json, found {' and '.join(named)}, which differ"
        fail("ambiguous-input", message, file=checkpoint.path.name, hint="leave the model's own there")
    return (named[0], found[named[0]]) if named else None


def read_settings(t: Trained, checkpoint: Checkpoint, options: Options) -> Facts:
    """What the config json says, with the user's settings; a key that nothing here reads is refused by name,
    unless the user sets it to null: it may be of other code that computes another model."""
    name, document = settings_of(t, checkpoint) or (t.documents[0], None)
    read = {k for f in t.fields if isinstance(f.keys, tuple) for k in f.keys}
    others = {k: v for k, v in (document or {}).items() if k not in read}
    out = {k for k in others if k in options.settings and options.settings[k] is None}
    left = None if document is None else {k: v for k, v in document.items() if k not in out}
    facts = Facts(left, name, {k: v for k, v in options.settings.items() if k not in out})
    facts.notes += [left_out(name, k, others[k]) for k in sorted(out)]
    for key in _nulls(t, left or {}, facts.settings):
        message = "expected a value, found null, which the publisher's code does not take for its default"
        facts.refuse("bad-config", message, key, f"--set {key}=VALUE says it")
    facts.check()  # what would follow from a default says nothing
    for key in sorted(others.keys() - out):
        message = f"expected keys that the publisher's code reads, found {shown(others[key])}"
        hint = f"--set {printable(key, 60)}=null leaves it out, if it changes nothing"
        facts.refuse("unsupported", message, printable(key, 60), hint)
    return facts


def _nulls(t: Trained, document: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """The keys of values that are null and may not be: no activation is one too."""
    for f in t.fields:
        for key in f.keys if isinstance(f.keys, tuple) else ():
            told = f.told and f.name not in ("hidden_act", *settings)
            if told and key in document and document[key] is None:
                yield key


# --- the two directions ---------------------------------------------------------------------------------


def plan(t: Trained, checkpoint: Checkpoint, options: Options) -> Plan:
    source = original_source(t, checkpoint)
    facts = read_settings(t, checkpoint, options)
    known = t.known(facts, source, options)
    known.values(known.fields)
    t.check(known)
    facts.check_settings(known.fields)
    facts.check()
    tokenizer = read_tokenizer(t, known)
    known.told = tokenizer.facts
    for name in tokenizer.facts:  # which the tokenizer may know better
        known.made.pop(name, None)
    config = {**known.values(), **t.config(known)}
    facts.check()
    beside = Written(
        t.name,
        config,
        [OutputDocument(n, d, "the download's vocabulary") for n, d in tokenizer.documents.items()],
        {**t.left_out, **t.dropped(known)},
        [*_no_settings(t, known), *_counted(t, known), *facts.notes, *t.notes(known), *tokenizer.notes],
        {**_kept(source, facts), **t.kept(known)},
        [f for tell in t.foretold.values() for f in tell(known)],
    )
    made = t.table(known)
    return to_hf(replace(made, rows=_bare(t, config, made.rows)), source, options, beside)


def _no_settings(t: Trained, known: Known) -> list[str]:
    """That the config json is missing; a config.json of transformers in its place says other things."""
    if known.facts.document is not None:
        return []
    note = f"no {t.documents[0]} is there: sizes are those of the variables, and the rest as each value says"
    if "config.json" in known.source.checkpoint.documents:
        note += "; config.json is a model's of transformers, and was not read"
    return [note]


def _counted(t: Trained, known: Known) -> list[str]:
    """How many variables are left out, for each reason: training keeps more of them than the model has."""
    patterns = [(re.compile(p), reason) for p, reason in {**t.left_out, **t.dropped(known)}.items()]
    any_ = re.compile("|".join(f"(?:{p.pattern})" for p, _ in patterns) or r"(?!)")
    names = [n for n in known.source.checkpoint.names() if any_.fullmatch(n)]
    reasons = Counter(next((why for p, why in patterns if p.fullmatch(n)), "") for n in names)
    return [f"{n} variable{'s' * (n > 1)} left out: {why}" for why, n in reasons.items() if why]


def _bare(t: Trained, config: Mapping[str, Value], rows: Iterable[Rule]) -> list[Rule]:
    """The rows with the names that the architecture has in its files."""
    if config["architectures"].value[0] not in t.bare:
        return list(rows)
    return [replace(r, target=tuple(n.removeprefix(t.own.prefix) for n in r.target)) for r in rows]


def _kept(source: Source, facts: Facts) -> dict[str, Any]:
    """What the files were called, for the way back."""
    first = next(iter(source.checkpoint.files))
    return {
        "stem": bundle_of(first) if is_data(first) else first,
        **({} if facts.document is None else {"document": facts.file}),
    }


def read_tokenizer(t: Trained, known: Known) -> TokenizerResult:
    """The vocabulary beside the weights, or the one the user points to, converted."""
    checkpoint, options = known.source.checkpoint, known.options
    files = files_beside_or_asked(checkpoint, options, _is_vocabulary, _as_vocabulary)
    sizes = ("vocab_size", "max_position_embeddings")
    config = {n: known[n] for n in sizes if n in known.fields}
    return tokenizer_documents(files, family=t.name, config=config)


def _is_vocabulary(name: str) -> bool:
    return vocabulary_kind(name) == "vocab.txt" or name == ADDED


def _as_vocabulary(path: Path) -> dict[str, Path]:
    """Any name is taken for vocab.txt."""
    return {path.name if vocabulary_kind(path.name) else "vocab.txt": path}


def plan_original(t: Trained, checkpoint: Checkpoint, options: Options) -> Plan:
    """A bundle, the config json and the vocabulary, under the names that the original had where the manifest
    knows them."""
    (model_type,) = t.classes
    facts = read_config(checkpoint, options.settings, t.architectures, model_type=model_type, own=t.own)
    source, once = converted_model(t, checkpoint), _once(t, checkpoint)
    known = t.known(facts, source, options, config=t.own, once=once, back=True)
    said = [n for n, f in known.fields.items() if f.told and not f.free]
    known.values(said)
    t.check(known)
    facts.check_settings(said)
    facts.check()
    settings = {key: own_value(known, name) for key, name in t.entries.items()}
    document = config_document(settings, once["document"])
    words = {n: d.read() for n, d in checkpoint.documents.items() if n in ("vocab.txt", ADDED)}
    vocabulary = original_tokenizer_documents(words, family=t.name)
    no_words = "vocab_size" in t.entries and not vocabulary
    files = [data_name(once["stem"], 0, 1)]
    beside = Written(
        t.name,
        settings,
        [document, *(OutputDocument(n, d, "the vocabulary in the folder") for n, d in vocabulary.items())],
        _unread(t, known),
        [*facts.notes, *(["no vocab.txt is there; none was written"] if no_words else [])],
        {"stem": once["stem"], "document": once["document"]},
        [f for tell in t.foretold.values() for f in tell(known)],
    )
    dtype = options.dtype or source.dtype
    return to_original(
        t.table(known), source, options, beside, files=files, homes=lambda name: [(files[0], dtype, name)]
    )


def held(t: Trained, checkpoint: Checkpoint, options: Options, architecture: str) -> Held:
    """See `Family.held`."""
    (model_type,) = t.classes
    facts = read_config(checkpoint, options.settings, (architecture,), model_type=model_type, own=t.own)
    source = converted_model(t, checkpoint)
    known = t.known(facts, source, options, config=t.own, once={}, back=True)
    return Held(t.table(known), source, facts, _unread(t, known))


def _unread(t: Trained, known: Known) -> dict[str, str]:
    """Tensors of a folder of transformers that no original has."""
    return {rf"({re.escape(t.own.prefix)})?embeddings\.position_ids": "0, 1, 2, ...", **t.unread(known)}


def own_value(known: Known, name: str) -> Value:
    """A field as the original's config json says it."""
    found = known.value(name)
    return Value(own_activation(found.value), found.source) if name == "hidden_act" else found


def converted_model(t: Trained, checkpoint: Checkpoint) -> Source:
    """Tensors by the names of a class with a head; those of the model without one lack the prefix."""
    prefix = t.own.prefix
    bare = not any(n.startswith(prefix) for n in checkpoint.names())

    def full(name: str) -> str:
        return name if not bare or name.startswith(t.outside) else prefix + name

    return whole_tensors(checkpoint, t.layer[1], full)


_STEM = re.compile(r"[A-Za-z0-9][\w.-]{0,80}", re.ASCII)


def _once(t: Trained, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the manifest says of the original's names, and those of this family where it says nothing;
    `bad-config` for names that no conversion records."""
    once = {"stem": t.stem, "document": t.documents[0], **kept_facts(checkpoint)}
    sound: dict[str, Callable[[Any], object]] = {
        "stem": lambda x: isinstance(x, str) and _STEM.fullmatch(x),
        "document": lambda x: isinstance(x, str) and (is_settings(x) or x == "config.json"),
    }
    fail_all(
        Problem(
            "bad-config",
            printable(f"expected what a conversion of {t.title} records, found {once[key]!r}", 200),
            "ckpt-tool.json",
            f"original.{key}",
        )
        for key, holds in sound.items()
        if not holds(once[key])
    )
    return once
