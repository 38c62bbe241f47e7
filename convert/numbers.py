"""The numbers of a model as descriptions, which are read and written either way.

A `Field` says once how a value is called in config.json and in an original's own document, of what type it
is, and what silence means on either side. `Known` reads the fields of one checkpoint: each when it is first
asked for, so that a rule may look at any other value. `document` writes an original's document from them.

What must think is a function: a rule gets the `Known` and gives a `Value` with its reason, or None where the
user has to be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import Any, TypeAlias

from ckpt_tool.convert import layout
from ckpt_tool.convert.facts_classes import DECODER as DECODER
from ckpt_tool.convert.facts_classes import DECODER_HEADS as DECODER_HEADS
from ckpt_tool.convert.facts_classes import ENCODER_HEADS as ENCODER_HEADS
from ckpt_tool.convert.facts_classes import GPT_IDS as GPT_IDS
from ckpt_tool.convert.facts_classes import GPT_NAMES as GPT_NAMES
from ckpt_tool.convert.facts_classes import GPT_SIZES as GPT_SIZES
from ckpt_tool.convert.facts_classes import IDS as IDS
from ckpt_tool.convert.facts_classes import LLAMA_SIZES as LLAMA_SIZES
from ckpt_tool.convert.facts_classes import NOT_READ as NOT_READ
from ckpt_tool.convert.facts_classes import ROPE as ROPE
from ckpt_tool.convert.facts_classes import SUMMARY as SUMMARY
from ckpt_tool.convert.facts_classes import Class as Class
from ckpt_tool.convert.facts_classes import like_llama as like_llama
from ckpt_tool.convert.facts_classes import without as without
from ckpt_tool.convert.facts_parts import Parts as Parts
from ckpt_tool.convert.facts_rotary import LLAMA3 as LLAMA3
from ckpt_tool.convert.params import MAX_COUNT as MAX_COUNT
from ckpt_tool.convert.params import UNKNOWN as UNKNOWN
from ckpt_tool.convert.params import Facts, Silent, overridden
from ckpt_tool.convert.params import shown as shown
from ckpt_tool.convert.plan import Foretold as Foretold
from ckpt_tool.convert.plan import Options, Turns
from ckpt_tool.convert.plan import Value as Value
from ckpt_tool.convert.source import MAX_LAYERS, Source, dtype_value
from ckpt_tool.convert.weave import Table
from ckpt_tool.errors import CkptToolError
from ckpt_tool.records import dataclass


@dataclass(frozen=True)
class Default:
    """Stands for what the class in transformers takes where config.json is silent."""


DEFAULT = Default()
Rule: TypeAlias = "Value | Callable[[Known], Value | None] | None"
Keys: TypeAlias = "tuple[str, ...] | Callable[[Known], tuple[str, ...]]"
Ask: TypeAlias = "str | Callable[[Known], str]"
Check: TypeAlias = "Callable[[Known, Value], Value]"


@dataclass(frozen=True)
class Field:
    """`name` is that of config.json, `keys` are those of the original's document, in the order in which they
    are looked for; `rule` and `silent` say what it means that neither the user nor the original's document,
    or config.json, says anything: None asks. `check` may refuse what was read, or make another value of it.
    `free` fields change nothing that is computed, `fixed` ones have one value in every model of the family;
    `hidden` ones are read and not written to config.json, and not looked for there either unless `told`;
    `ask` says what is missing where the user is asked."""

    name: str
    take: Callable[..., Value]
    keys: Keys = ()
    rule: Rule = None
    silent: Rule | Default = None
    check: Check | None = None
    free: bool = False
    fixed: bool = False
    hidden: bool = False
    told: bool = True
    ask: Ask | None = None


def count(
    name: str,
    *keys: str,
    rule: Rule = None,
    silent: Rule | Default = None,
    ask: Ask = "an integer",
    maximum: int = MAX_COUNT,
    **more: Any,
) -> Field:
    """A whole number from 1; `more` are other parts of the `Field`."""
    take = partial(Facts.integer, maximum=MAX_LAYERS if name in _LAYERS else maximum)
    return Field(name, take, more.pop("read", keys), rule, silent, ask=ask, **more)


_LAYERS = ("num_hidden_layers", "n_layer")


def number(
    name: str,
    *keys: str,
    rule: Rule = None,
    silent: Rule | Default = None,
    ask: Ask = "a number",
    **more: Any,
) -> Field:
    """A finite number above 0."""
    return Field(name, Facts.number, more.pop("read", keys), rule, silent, ask=ask, **more)


def flag(name: str, *keys: str, rule: Rule, silent: Rule | Default = DEFAULT, **more: Any) -> Field:
    """True or false."""
    return Field(name, Facts.boolean, more.pop("read", keys), rule, silent, **more)


def token_ids(name: str, *keys: str, rule: Rule = None, silent: Rule | Default = None) -> Field:
    """One token id, or a list of them."""
    return Field(name, Facts.token_ids, keys, rule, silent)


def special(name: str, otherwise: Rule, silent: Rule | Default = DEFAULT) -> Field:
    """The id of a special token: the user's, the tokenizer's, or `otherwise`."""

    def rule(known: Known) -> Value | None:
        return known.told.get(name) or (otherwise(known) if callable(otherwise) else otherwise)

    return token_ids(name, rule=rule, silent=silent)


def anything(
    name: str,
    *keys: str,
    rule: Rule = None,
    silent: Rule | Default = None,
    ask: Ask = "a value",
    **more: Any,
) -> Field:
    """A value whose form `check` looks at; null counts as given."""
    return Field(name, Facts.anything, more.pop("read", keys), rule, silent, ask=ask, **more)


def only(name: str, value: Any, why: str, **more: Any) -> Field:
    """What every model of the family has: a file or the user may only repeat it."""

    def take(facts: Facts, name: str, *keys: str, rule: Silent) -> Value:
        return facts.fixed(name, value, why, *keys)

    return Field(name, take, fixed=True, **more)


def written(name: str, rule: Callable[[Known], Value], **more: Any) -> Field:
    """What follows from the rest, whatever config.json says; the user may only repeat it."""

    def take(facts: Facts, name: str, *keys: str, rule: Silent) -> Value:
        found = rule() if callable(rule) else rule
        assert found is not None
        return facts.fixed(name, found.value, found.source)

    return Field(name, take, (), rule, rule, **more)


def free(why: str, **defaults: Any) -> tuple[Field, ...]:
    """Values that change nothing that is computed, each with what is written unless the user says another."""
    return tuple(_free(name, default, why) for name, default in defaults.items())


def _free(name: str, default: Any, why: str) -> Field:
    def take(facts: Facts, name: str, *keys: str, rule: Silent) -> Value:
        return facts.like(name, default, why)

    return Field(name, take, free=True)


def _dtype(known: Known) -> Value:
    return dtype_value(known.source, known.options)


def follows(name: str, rule: Callable[[Known], Value], **more: Any) -> Field:
    """What follows from the rest, whatever the user and either document say."""
    return Field(name, lambda facts, name, *keys, rule: rule(), (), rule, rule, told=False, **more)


DTYPE = follows("torch_dtype", _dtype)


class _Refused(CkptToolError):
    """A value was asked for that had been refused; carries what was collected so far."""


def object_or_null(known: Known, found: Value) -> Value:
    """A check of rope_scaling."""
    if found.value is not None and not isinstance(found.value, dict):
        known.refuse("bad-config", f"expected an object or null, found {shown(found.value)}", "rope_scaling")
    return found


def one_of(name: str, known_ones: Collection[str]) -> Check:
    """A check of the field `name`, which is an activation or the like."""

    def check(known: Known, found: Value) -> Value:
        if found.value in tuple(known_ones):  # which compares: what is written there may have no hash
            return found
        message = f"expected one of {', '.join(known_ones)}, found {shown(found.value)}"
        known.refuse("unsupported", message, known.names.get(name, name))
        return UNKNOWN

    return check


def splits(width: str, name: str) -> Check:
    """A check of the field `name`, the number of heads: they split a width evenly."""

    def check(known: Known, heads: Value) -> Value:
        if known[width] % heads.value:
            asked = f"{heads.value} heads ({heads.source})"
            message = f"expected {width} {known[width]} to divide by {asked}, found a rest"
            known.refuse("config-mismatch", message, name)
        return heads

    return check


def given(value: Any, why: str) -> Value:
    """A rule that always gives the same."""
    return Value(value, f"rule: {why}")


def measured(name: str, dimension: int, *, shared: bool = True) -> Rule:
    """The size that the tensors called `name` have, see `Source.size`."""
    return lambda known: known.source.size(name, dimension, shared=shared)


def counted(known: Known) -> Value | None:
    """The layers that tensor names count."""
    return known.source.counted_layers


def groups(known: Known) -> Value:
    """The key/value heads of a config.json without a number for them: where it is null as many as query
    heads, where the key is absent the default of the class, which is null in few."""
    name, own = "num_key_value_heads", known.config
    default = None if own is None else own.numbers.get(name)
    if own is not None and default is not None and name not in (known.facts.document or {}):
        return Value(default, f"rule: default of {own.name}")
    said = "null in" if name in (known.facts.document or {}) else "absent from"
    return given(known["num_attention_heads"], f"{name} {said} {known.facts.file}, as many as query heads")


@dataclass
class Known:
    """The values of one checkpoint, read when they are asked for. With a class `config` the facts are those
    of a config.json, whose silence means what the class has; without one they are an original's own. `once`
    is what the manifest of an output of ours says of its original, `names` what config.json calls fields that
    have another name here."""

    fields: Mapping[str, Field]
    facts: Facts
    source: Source
    options: Options
    config: Class | None = None
    once: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, Value] = field(default_factory=dict)  # what the tokenizer says
    back: bool = False
    target: str = ""  # model_type of the Hugging Face side
    names: Mapping[str, str] = field(default_factory=dict)
    made: dict[str, Value] = field(default_factory=dict)

    def value(self, name: str) -> Value:
        """The value with where it is from; problems are collected in `facts`."""
        if name not in self.made:
            f = self.fields[name]
            try:
                asked = {} if f.ask is None else {"ask": f.ask(self) if callable(f.ask) else f.ask}
                found = f.take(self.facts, name, *self._keys(f), rule=partial(self._rule, f), **asked)
                self.made[name] = found  # which a check may ask for, by way of another value
                if f.check is not None and found is not UNKNOWN:
                    self.made[name] = f.check(self, found)
            except _Refused:
                self.made[name] = UNKNOWN
        return self.made[name]

    def __getitem__(self, name: str) -> Any:
        """The value alone. What follows from a value that was refused is not told, and unknown as well;
        outside a rule or check this raises what was collected so far."""
        if self.value(name) is UNKNOWN:
            raise _Refused(*dict.fromkeys(self.facts.problems))
        return self.made[name].value

    def values(self, names: Iterable[str] | None = None) -> dict[str, Value]:
        """Those called `names`, all but hidden ones by default, in the order of the fields."""
        wanted = [n for n, f in self.fields.items() if not f.hidden] if names is None else names
        return {n: self.value(n) for n in wanted}

    def refuse(self, kind: str, message: str, where: str, hint: str | None = None) -> None:
        if hint is None and kind == "config-mismatch" and where in {*self.fields, *self.names.values()}:
            hint = overridden(where)
        self.facts.refuse(kind, message, where, hint)

    def _keys(self, f: Field) -> tuple[str, ...]:
        if self.config is not None:
            name = self.names.get(f.name, f.name)
            others = self.config.aliases.get(name, ())
            return (name, *(o for o in others if o not in self.fields)) if f.told and not f.free else ()
        return f.keys if isinstance(f.keys, tuple) else f.keys(self)

    def _rule(self, f: Field) -> Value | None:
        rule = f.rule if self.config is None else f.silent
        if isinstance(rule, Default):
            assert self.config is not None
            of_class = {**self.config.numbers, **self.config.identity, **self.config.idle_numbers}
            of_class |= {n: of_class[k] for k, names in self.config.aliases.items() for n in names}
            default = of_class[self.names.get(f.name, f.name)]
            return Value(default, f"rule: default of {self.config.name}")
        return rule(self) if callable(rule) else rule


def by_name(*fields: Field | Iterable[Field]) -> dict[str, Field]:
    """Fields under their names, in order; a later one of the same name stands in the place of the first."""
    flat = [f for one in fields for f in ([one] if isinstance(one, Field) else one)]
    return {f.name: f for f in flat}


@dataclass(frozen=True)
class Sized:
    """The size of an axis that is `more` than a field."""

    name: str
    more: int


# of an axis: the field behind it, or how to work it out
Size: TypeAlias = "str | Sized | Callable[[Known], int]"


def table_of(
    known: Known,
    rows: Sequence[layout.Rule],
    axes: Mapping[str, Size],
    derived: Mapping[str, Value] | None = None,
) -> Table:
    """The rows with the size of every axis; `derived` are numbers that stand for what a field says."""
    named = {a: Sized(s, 0) if isinstance(s, str) else s for a, s in axes.items()}
    behind = {a: s.name for a, s in named.items() if isinstance(s, Sized)}
    wanted = [n for n in known.fields if n in {*behind.values(), *_LAYERS}]
    numbers = known.values(wanted) | dict(derived or {})
    sizes = {
        a: int(numbers[s.name].value) + s.more if isinstance(s, Sized) else s(known) for a, s in named.items()
    }
    layers = next(v for n, v in numbers.items() if n in _LAYERS)
    return Table(
        rows, sizes, behind, numbers, layers, repeats=repeats(known), turns=turns(known), head=head_of(known)
    )


TIE = "tie_word_embeddings"


def may_untie(fields: Mapping[str, Field]) -> bool:
    """Whether the user may say whether the output layer is the embedding."""
    return TIE in fields and not fields[TIE].fixed


def head_of(known: Known) -> str:
    """The output layer of a model in the Hugging Face layout that `may_untie`; else empty."""
    if known.config is None or not may_untie(known.fields):
        return ""
    return next(iter(known.config.tied))


def turns(known: Known) -> Turns | None:
    """What the rotary frequencies are made of; None for a model without."""
    own = {} if known.config is None else known.config.aliases
    name = next((n for n in (*own.get("rope_theta", ()), "rope_theta") if n in known.fields), None)
    said = known.made.get("rope_scaling", Value((known.facts.document or {}).get("rope_scaling"), ""))
    if name is None:
        return None
    return Turns(None if said.value is not None else known.value(name), _pairs(known))


def _pairs(known: Known) -> Value | None:
    """How many rotary frequencies a head has: half of its channels, or of the part of them that is turned."""
    share = next((n for n in ("rotary_pct", "partial_rotary_factor") if n in known.fields), None)
    width, part = _head_width(known), 1 if share is None else known[share]
    if width is None or not isinstance(width.value, int) or not isinstance(part, int | float):
        return None
    told = f" ({width.source})" if width.source else ""
    told += "" if share is None else f" x {share} {part:g}"
    return Value((int(width.value * part) + 1) // 2, f"half of head_dim {width.value}{told}")


def _head_width(known: Known) -> Value | None:
    """The channels of a head; None where a class without a field for them may read them of config.json."""
    if "head_dim" in known.fields:
        return known.value("head_dim")
    sizes = [known.value(n) for n in ("hidden_size", "num_attention_heads") if n in known.fields]
    counted = len(sizes) == 2 and all(isinstance(v.value, int) and v.value > 0 for v in sizes)
    if not counted or "head_dim" in (known.facts.document or {}):
        return None
    return Value(sizes[0].value // sizes[1].value, f"hidden_size / {sizes[1].value} heads")


def repeats(known: Known) -> dict[str, str]:
    """On the way back the tensors that are stored though config.json ties them, each with that whose values
    it must have: an original has a place for one of the two."""
    own = known.config
    if not known.back or own is None or TIE not in known.fields or not known[TIE]:
        return {}
    words = own.prefix + own.words
    return {n: to or words for n, to in own.tied.items() if known.source.keeps(n, known.options)}


Entry = str | Callable[[Known], Mapping[str, Value]]


def some(name: str) -> Entry:
    """The entry of a field under its own name, left out where its value is null or false."""
    return lambda known: {name: known.value(name)} if known[name] not in (None, False) else {}


def document(
    known: Known, entries: Sequence[Entry], own: Mapping[str, str] | None = None
) -> dict[str, Value]:
    """What an original's document says, in order: an entry is the document's name of a field (the first of
    its keys, or by `own`, from that name to the field's), or a function for what must think."""
    fields = {f.keys[0]: n for n, f in known.fields.items() if isinstance(f.keys, tuple) and f.keys}
    fields |= own or {}
    made: dict[str, Value] = {}
    for entry in entries:
        if isinstance(entry, str):
            made[entry] = known.value(fields[entry])
        else:
            made |= entry(known)
    return made
