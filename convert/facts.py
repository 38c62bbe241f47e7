"""What a config.json says, by meaning and not by spelling: one reader for every release that wrote one.

The same number is `rope_theta` in a file of transformers 4 and `rope_parameters.rope_theta` in one of 5, a
window is a width and three other keys, an absent key stands for the default of the class. `read` gives each
value once, under one name, and where the file says it; two files mean the same where their readings are
equal. What a file says twice and differently is a `Contradiction`. How the values of a class are read, and
which keys have none, is data that the families have (`convert.facts_classes.Class`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import cache
from typing import Any

from ckpt_tool.convert.facts_classes import (
    ACTIVATION_KEYS,
    ACTIVATIONS,
    ALTERNATING,
    BOTH_WAYS,
    DEFAULTS,
    IDENTITY,
    IDLE,
    IDS,
    KNOWN_ACTIVATIONS,
    REFUSED,
    Class,
)
from ckpt_tool.convert.facts_parts import in_one_row
from ckpt_tool.convert.facts_rotary import (
    BOUNDED,
    LAYERS,
    NEEDED,
    NUMBERS,
    OBJECTS,
    ROTARY,
    SCALES,
    TRAINED,
    flat,
    kind_of,
)
from ckpt_tool.errors import near
from ckpt_tool.records import dataclass

ABSENT = object()  # of a key that is not in the file, where null is a value


@dataclass(frozen=True)
class Meaning:
    """One value of a config. `value` is what compares, `said` how the file has it, `where` the key that says
    it; of a `default` that the file does not say, `where` is the key that is absent."""

    value: Any
    said: Any
    where: str
    default: bool = False

    @property
    def text(self) -> str:
        """The value as a reader would look for it in the file."""
        if self.default:
            return f"the default {shown(self.said)} ({self.where} absent)"
        return shown(self.said)


@dataclass(frozen=True)
class Contradiction:
    """Two keys of one file that say the same thing differently: (key, value, who reads it) each."""

    name: str
    first: tuple[str, Any, str]
    second: tuple[str, Any, str]

    @property
    def text(self) -> str:
        (a, x, by), (b, y, other) = self.first, self.second
        return f"expected one value, found {a} {shown(x)} ({by}) and {b} {shown(y)} ({other})"


@dataclass(frozen=True)
class Wrong:
    """A value that no release reads as what it should be (`bad-config`), or that none computes
    (`unsupported`); `where` is the key that says it."""

    kind: str
    where: str
    text: str


@dataclass(frozen=True)
class Reading:
    """`numbers` change what the model computes, `identity` says what it is. `idle` are keys without effect,
    with the reason, `unknown` keys on no list, `refused` keys that no plain reading of the weights can
    honour, with the reason."""

    model_type: str
    numbers: Mapping[str, Meaning] = field(default_factory=dict)
    identity: Mapping[str, Meaning] = field(default_factory=dict)
    contradictions: tuple[Contradiction, ...] = ()
    wrong: tuple[Wrong, ...] = ()
    idle: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Meaning]:
        return {**self.identity, **self.numbers}


@cache
def classes() -> Mapping[str, Class]:
    """The configuration classes of all families by model_type."""
    from ckpt_tool.convert.families import FAMILIES, family  # which import this module's parts

    return {m: c for name in FAMILIES for m, c in family(name).classes.items()}


def class_of(config: Mapping[str, Any]) -> str | None:
    """The model_type whose class reads this config: what it says, else what its architecture belongs to; None
    for one that is not known here."""
    said = config.get("model_type")
    if isinstance(said, str) and said in classes():
        return said
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    for model_type, own in classes().items():
        if re.match(rf"{own.name.removesuffix('Config')}(For|Model|LMHead|DoubleHeads)", first):
            return model_type
    return None


def read(config: Mapping[str, Any], model_type: str) -> Reading:
    """What `config` says when the class of `model_type` reads it; KeyError for an unknown class."""
    return _Reader(dict(config), classes()[model_type]).read(model_type)


def read_as(config: Mapping[str, Any], own: Class) -> Reading:
    """What `config` says to the class `own`, whatever model_type it has."""
    return _Reader(dict(config), own).read(own.name)


def same(a: Any, b: Any) -> bool:
    """Whether two values of JSON are one: 1 is 1.0, and neither is true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float) and a != b:
        return math.isclose(a, b, rel_tol=1e-15, abs_tol=0.0)  # one was worked out, in another order
    return bool(a == b)


def shown(value: Any, limit: int = 200) -> str:
    """A value in a message: as JSON, with whole floats as integers."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        return str(int(value))
    if isinstance(value, Mapping) and value:
        text = ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    else:
        try:
            text = value if isinstance(value, str) else json.dumps(value)
        except (TypeError, ValueError):
            text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _Reader:
    """One pass over a config; `used` are the keys that some value was read from."""

    def __init__(self, config: dict[str, Any], own: Class) -> None:
        self.own, self.used, self.contradictions = own, set[str](), list[Contradiction]()
        self.wrong: list[Wrong] = []
        self.config = config if own.parts is None else in_one_row(config, own.parts)
        self.values: dict[str, Meaning] = {}

    def read(self, model_type: str) -> Reading:
        for name, default in {**self.own.numbers, **self.own.identity}.items():
            absent = Meaning(default, default, name, default=True)  # until `_rope` reads it
            self.values[name] = absent if name in ROTARY else self.value(name, default)
        for name in ("model_type", "architectures"):
            self.values[name] = self.value(name, None)
        self._dtype()
        self._labels()
        self._derived()
        if "rope_theta" in self.own.numbers:
            self._rope()
        if "sliding_window" in self.own.numbers:
            self._windows()
        self._types()
        self._activations()
        self._canonical()
        identity = {n: m for n, m in self.values.items() if n in IDENTITY}
        numbers = {n: m for n, m in self.values.items() if n not in IDENTITY}
        idle, unknown, refused = self._others()
        twice, wrong = tuple(self.contradictions), tuple(self.wrong)
        return Reading(model_type, numbers, identity, twice, wrong, idle, unknown, refused)

    def value(self, name: str, default: Any) -> Meaning:
        """The value under any of its names; the class's own name wins where both are there, and say so."""
        spelled = [k for k in (name, *self.own.aliases.get(name, ())) if k in self.config]
        self.used |= set(spelled)
        if not spelled:
            return Meaning(default, default, name, default=True)
        first, *others = spelled
        for other in others:
            if not same(self.config[first], self.config[other]):
                by = "the key of the class", "its generic name"
                self.contradict(name, (first, by[0]), (other, by[1]))
        return Meaning(self.config[first], self.config[first], first)

    def contradict(self, name: str, first: tuple[str, str], second: tuple[str, str]) -> None:
        """Two keys (dotted where they are in an object), each with who reads it."""
        (a, by), (b, other) = first, second
        self.contradictions.append(Contradiction(name, (a, self.at(a), by), (b, self.at(b), other)))

    def refuse(self, kind: str, where: str, expected: str, found: Any) -> None:
        text = isinstance(found, str) and "number" in expected  # "1e-5" is none, though it looks like one
        told = f"the text {json.dumps(shown(found))}" if text else shown(found)
        self.wrong.append(Wrong(kind, where, f"expected {expected}, found {told}"))

    def at(self, path: str) -> Any:
        found: Any = self.config
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def number(self, name: str) -> Any:
        """A value that others are worked out from; None where it is no number."""
        found = self.values[name].value if name in self.values else None
        return found if isinstance(found, int | float) and not isinstance(found, bool) else None

    def _dtype(self) -> None:
        """`torch_dtype` until transformers 4.55, `dtype` since; each reads the other. Null and absent: what
        the tensors are."""
        made = []
        for key in ("dtype", "torch_dtype"):
            self.used.add(key)
            if (said := self.config.get(key)) is not None:
                value = said.removeprefix("torch.") if isinstance(said, str) else shown(said)
                made.append(Meaning(value, said, key))
        if len(made) == 2 and made[0].value != made[1].value:
            since, until = "read by transformers 4.56 and later", "read by those before"
            self.contradict("torch_dtype", ("dtype", since), ("torch_dtype", until))
        self.values["torch_dtype"] = made[0] if made else Meaning(None, None, "dtype", default=True)

    def _labels(self) -> None:
        """Heads that classify have as many rows as `id2label` has entries, two without one."""
        names = self.config.get("id2label")
        self.used |= {"id2label", "label2id", "num_labels"}
        count = self.config.get("num_labels")
        if isinstance(names, Mapping):
            self.values["num_labels"] = Meaning(len(names), len(names), "id2label")
            if count is not None and not same(count, len(names)):
                self.contradict("num_labels", ("num_labels", "a number"), ("id2label", "names"))
            if any(v != f"LABEL_{k}" for k, v in names.items()):
                plain = {str(k): v for k, v in names.items()}
                self.values["id2label"] = Meaning(plain, plain, "id2label")
        elif count is not None:
            self.values["num_labels"] = Meaning(count, count, "num_labels")
        else:
            self.values["num_labels"] = Meaning(2, 2, "num_labels", default=True)

    def _derived(self) -> None:
        """Null or absent for what follows from other values."""
        width, heads = self.number("hidden_size"), self.number("num_attention_heads")
        follows: dict[str, tuple[Any, str]] = {}
        if width is not None and heads:
            follows["head_dim"] = width // heads, "hidden_size / num_attention_heads"
        follows["num_key_value_heads"] = heads, "num_attention_heads"
        follows["word_embed_proj_dim"] = width, "hidden_size"
        narrow = "use_bottleneck" in self.values and self.values["use_bottleneck"].value is True
        inside = "intra_bottleneck_size" if narrow else "hidden_size"
        follows["true_hidden_size"] = self.number(inside), inside
        if (inner := self.number("n_embd")) is not None:
            follows["n_inner"] = 4 * inner, "4 x n_embd"
        for name, (value, _) in follows.items():
            m = self.values.get(name)
            if m is not None and m.value is None and value is not None:
                self.values[name] = Meaning(value, value, m.where, default=True)

    def _types(self) -> None:
        """Flags are true or false, and numbers are neither. Null is the default of a flag that is off."""
        for name in BOTH_WAYS:
            if self.config.get(name):
                self.refuse("unsupported", name, "a token to see those before it only", self.config[name])
        for name, default in {**self.own.numbers, **self.own.idle_numbers}.items():
            m = self.values.get(name)
            said = self.config.get(name) if m is None else m.said
            if isinstance(default, bool):
                empty = said is None and (not default or (m is not None and m.default) or m is None)
                if not isinstance(said, bool) and not empty:
                    self.refuse("bad-config", name, "true or false", said)
            elif isinstance(default, int | float) and isinstance(said, bool | str):
                where = name if m is None else m.where
                if not any(w.where == where for w in self.wrong):
                    self.refuse("bad-config", where, "a number", said)

    def _activations(self) -> None:
        """The name of a function that transformers has; a class that reads one of the two names of
        `ALTERNATING` does not look at the other, which some readers do."""
        for name in ACTIVATION_KEYS:
            m = self.values.get(name)
            if m is not None and (not isinstance(m.value, str) or m.value not in KNOWN_ACTIVATIONS):
                meant = near(str(m.value), sorted(KNOWN_ACTIVATIONS))
                known = f"an activation of transformers{f' ({meant})' if meant else ''}"
                self.refuse("unsupported", m.where, known, m.said)
        read, other = ALTERNATING
        said, m = self.config.get(other), self.values.get(read)
        if m is not None and said is not None:
            names = [ACTIVATIONS.get(str(x), str(x)) for x in (m.value, said)]
            if names[0] != names[1]:
                here = (m.where if not m.default else f"{read} (absent)", m.said, "read")
                self.contradictions.append(Contradiction(read, here, (other, said, "not read")))

    def _canonical(self) -> None:
        """One value for what has several names itself: activations, a list of one id."""
        for name in ("hidden_act", "activation_function"):
            if (m := self.values.get(name)) is not None and isinstance(m.value, str):
                self.values[name] = Meaning(ACTIVATIONS.get(m.value, m.value), m.said, m.where, m.default)
        for name in IDS:
            m = self.values[name]
            if isinstance(m.value, list) and len(m.value) == 1:
                self.values[name] = Meaning(m.value[0], m.said, m.where, m.default)

    # --- rotary embeddings ------------------------------------------------------------------------------

    def _rope(self) -> None:
        """transformers 4 reads `rope_theta` and `rope_scaling`; 5 reads the object under `rope_scaling`, or
        `rope_parameters` where that is empty, and `rope_theta` where the object has none."""
        self.used |= {*OBJECTS, *ROTARY, TRAINED}
        objects = {key: self._object(key) for key in OBJECTS}
        for name, usual in (("rope_theta", None), ("partial_rotary_factor", 1.0)):
            self._turned(name, objects, self.own.numbers.get(name, usual))
        scalings = {key: self._scaling(key, found) for key, found in objects.items()}
        spoken = [k for k, found in objects.items() if found.keys() - {*ROTARY}]
        if "rope_parameters" in spoken and self.config.get("rope_scaling", ABSENT) is None:
            spoken.insert(0, "rope_scaling")  # an outspoken null
        if len(spoken) == 2 and not same(scalings["rope_scaling"], scalings["rope_parameters"]):
            if objects["rope_scaling"]:
                by = "read by transformers 4 and 5", "read by transformers 5 where it is alone"
            else:
                by = "read by transformers 4", "read by transformers 5"
            self.contradict("rope_scaling", ("rope_scaling", by[0]), ("rope_parameters", by[1]))
        said = next((k for k in OBJECTS if scalings[k] is not None), None)
        if said is not None:
            self.values["rope_scaling"] = Meaning(scalings[said], scalings[said], said)
        else:
            where = spoken[-1] if spoken else "rope_scaling"
            absent = not spoken and "rope_scaling" not in self.config
            usual = None if any(objects.values()) else self.own.numbers.get("rope_scaling")
            if usual and not absent:  # null, which 5 takes for silence, and fills with what is usual
                readers = (None, "read by transformers 4"), (usual, "the default, read by transformers 5")
                one, two = (("rope_scaling", *reader) for reader in readers)
                self.contradictions.append(Contradiction("rope_scaling", one, two))
                usual = None
            value = self._scaling("rope_scaling", usual) if usual else None
            self.values["rope_scaling"] = Meaning(value, value, where, default=absent)

    def _turned(self, name: str, objects: Mapping[str, Mapping[str, Any]], default: Any) -> None:
        """A number that the objects say, or a key beside them."""
        said = [
            (f"{key}.{name}", found[name]) for key, found in objects.items() if found.get(name) is not None
        ]
        own = self.own.aliases.get(name, (name,))
        self.used |= {*own}
        for key in own:
            if self.config.get(key) is not None or (not said and key in self.config):
                said.append((key, self.config[key]))
        lost = [pair for pair in said if pair[0].startswith("rope_parameters.") and objects["rope_scaling"]]
        if lost and said[0] == lost[0]:  # 5 passes over the whole object beside the other
            said = [pair for pair in said if pair not in lost] or [(f"{own[0]} (absent)", default)]
            said += lost
        if name not in own and not said and self.config.get(name) is not None:  # which the class ignores
            said = [(f"{own[0]} (absent)", default), (name, self.config[name])]
        self.values[name] = self._one(name, said, default)
        value = self.values[name].value
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        whole = name not in (*self.own.numbers, *self.own.aliases) and "rope_theta" in self.own.numbers
        if not number and value is not None:
            self.refuse("bad-config", self.values[name].where, "a finite number above 0", value)
        elif name == "partial_rotary_factor" and whole and value not in (None, 1):
            self.refuse("unsupported", self.values[name].where, "heads that are turned whole", value)

    def _object(self, key: str) -> Mapping[str, Any]:
        """An object of rotary values; of one for each kind of layer, the one that all share."""
        found = self.config.get(key)
        if not isinstance(found, Mapping):
            if found is not None:
                self.values[key] = Meaning(found, found, key)  # no object: differs from every other
                self.refuse("bad-config", key, "an object or null", found)
            return {}
        one = flat(found)
        if one is found and any(isinstance(v, Mapping) for v in found.values()):
            self.refuse("unsupported", key, "the same rotary values in all layers", found)
        return one

    def _one(self, name: str, said: list[tuple[str, Any]], default: Any) -> Meaning:
        """The one value that all places say, the first of which is what transformers 5 reads."""
        if not said:
            return Meaning(default, default, name, default=True)
        (first, value), *others = said
        for path, other in others:
            if not same(value, other):
                by = "the other object" if "." in path else "read by transformers 4"
                one, two = (first, value, "read by transformers 5"), (path, other, by)
                self.contradictions.append(Contradiction(name, one, two))
        return Meaning(value, value, first)

    def _scaling(self, key: str, found: Mapping[str, Any]) -> dict[str, Any] | None:
        """What is done to the frequencies, with every value that it depends on; None for nothing."""
        kind, older = kind_of(found), found.get("type")
        if older is not None and kind_of({"type": older}) != kind:
            by = "read by transformers 5", "read by transformers 4, in most classes"
            self.contradict("rope_scaling", (f"{key}.rope_type", by[0]), (f"{key}.type", by[1]))
        left = {"rope_type", "type", *ROTARY}
        given = {k: v for k, v in found.items() if k not in left and v is not None}
        if kind == "default":
            if given and not (found.get("rope_type") or older):
                self.refuse("bad-config", key, f"rope_type beside {', '.join(given)}", "none")
            return None
        if kind not in NEEDED:
            expected = f"rope_type {', '.join(['default', *NEEDED])}"
            self.refuse("unsupported", f"{key}.rope_type", expected, kind)
            return {"rope_type": kind, **given}
        if kind == "yarn":
            given.pop("max_position_embeddings", None)  # which nobody reads there
        if kind in ("linear", "dynamic") and same(given.get("factor"), 1):
            return None
        if kind in BOUNDED:
            longest, trained = self.values["max_position_embeddings"].value, self.config.get(TRAINED)
            if None not in (trained, given.get(TRAINED)) and not same(trained, given[TRAINED]):
                by = "read by transformers 5", "read by transformers 4"
                self.contradict("rope_scaling", (TRAINED, by[0]), (f"{key}.{TRAINED}", by[1]))
            given.setdefault(TRAINED, longest if trained is None else trained)
        self._scales(key, kind, given)
        return {"rope_type": kind, **(_yarn(given) if kind == "yarn" else given)}

    def _scales(self, key: str, kind: str, given: Mapping[str, Any]) -> None:
        """Every value that the kind needs is there, and a number (of longrope a list for each channel)."""
        for name in NEEDED[kind]:
            if given.get(name) is None:
                self.refuse("bad-config", f"{key}.{name}", f"a value beside rope_type {kind}", "none")
        for name, value in given.items():
            plain = isinstance(value, int | float) and not isinstance(value, bool)
            if name in NUMBERS and (not plain or not 0 < value < math.inf):
                self.refuse("bad-config", f"{key}.{name}", "a finite number above 0", value)
            if name in SCALES and (not plain or not 0 <= value < math.inf):
                self.refuse("bad-config", f"{key}.{name}", "a finite number from 0", value)

    # --- windows ----------------------------------------------------------------------------------------

    def _windows(self) -> None:
        """How wide the window is, and in which layers: `sliding_window` null for none."""
        self.used |= {"layer_types", "use_sliding_window", "max_window_layers"}
        width, layers = self.values["sliding_window"], self.number("num_hidden_layers")
        count = layers if isinstance(layers, int) and 0 <= layers <= 10_000 else 0
        kinds = self.config.get("layer_types")
        on = self.own.windows != "last" or self.config.get("use_sliding_window", False) is True
        whole = isinstance(width.value, int) and not isinstance(width.value, bool)
        if width.value is not None and (not whole or (on and width.value < 1)):
            self.refuse("bad-config", width.where, "a number of tokens from 1, or null", width.said)
        if isinstance(kinds, list):
            for kind in dict.fromkeys(k for k in map(shown, kinds) if k not in LAYERS):
                self.refuse("unsupported", "layer_types", " or ".join(LAYERS), kind)
        if kinds is not None and (not isinstance(kinds, list) or len(kinds) != count):
            text = f"{len(kinds)} kinds" if isinstance(kinds, list) else kinds
            self.contradictions.append(
                Contradiction(
                    "layer_types",
                    ("num_hidden_layers", layers, "the layers"),
                    ("layer_types", text, "a kind for each"),
                )
            )
            kinds = None
        if self.own.windows == "all":
            self._whole(width, kinds)
            return
        slid = None if kinds is None else [i for i, k in enumerate(kinds) if k == "sliding_attention"]
        if not on or width.value is None:
            where = "sliding_window" if on else "use_sliding_window"
            if slid:
                self.contradict("layer_types", ("layer_types", "since 4.51"), (where, "no window"))
            said = where in self.config
            self.values["sliding_window"] = Meaning(None, None, where, default=not said)
            return
        if self.own.windows == "alternate":
            usual, where = list(range(0, count, 2)), "layer_types"
        else:
            first = self.config.get("max_window_layers", self.own.idle_numbers["max_window_layers"])
            usual = list(range(first, count)) if isinstance(first, int) and first >= 0 else []
            where = "max_window_layers" if slid is None else "layer_types"
        if slid is not None and "max_window_layers" in self.config and slid != usual:
            by = "read by transformers 4.51 and later", "read by those before"
            self.contradict("layers with a window", ("layer_types", by[0]), ("max_window_layers", by[1]))
        chosen = usual if slid is None else slid
        if not chosen:
            self.values["sliding_window"] = Meaning(None, None, where)
            return
        absent = slid is None and "max_window_layers" not in self.config
        text = ranges(chosen)
        self.values["layers with a window"] = Meaning(text, text, where, default=absent)

    def _whole(self, width: Meaning, kinds: list[Any] | None) -> None:
        """A class with one kind of attention in all layers: `layer_types` may only say that again."""
        one = LAYERS[width.value is not None]
        if kinds is not None and any(k != one for k in kinds):
            self.contradict("sliding_window", ("sliding_window", "read"), ("layer_types", "not read"))

    # --- the rest ---------------------------------------------------------------------------------------

    def _others(self) -> tuple[dict[str, str], dict[str, Any], dict[str, str]]:
        idle, unknown, refused = {}, {}, {}
        for key, value in self.config.items():
            name = key.rpartition(".")[2]  # that of a part has the part's before it
            if key in self.used:
                continue
            if key in REFUSED and key not in self.own.idle and value not in (None, False, {}):
                refused[key] = REFUSED[key]
            elif key == "is_causal" and value is not self.own.causal:
                unknown[key] = value  # transformers 5 then builds another mask; null counts as false there
            elif key in self.own.idle or name in IDLE or key == "is_causal":
                idle[key] = self.own.idle.get(key) or IDLE.get(name, "as the class has it")
            elif (
                value in (None, False, "", 0) or value in ([], {}) or same(value, DEFAULTS.get(name, ABSENT))
            ):
                idle[key] = "empty, or the default of every class"
            else:
                unknown[key] = value
        return idle, unknown, refused


def _yarn(given: dict[str, Any]) -> dict[str, Any]:
    """YaRN's values with the library's defaults; the two scales are the factor on cosines and sines."""
    made = {"beta_fast": 32, "beta_slow": 1, "truncate": True, **given}
    made |= {k: d for k, d in (("beta_fast", 32), ("beta_slow", 1)) if not made[k]}
    one, all_dims = (made.pop(name, None) for name in SCALES)
    factor = made.get("factor")
    if made.get("attention_factor") is None and isinstance(factor, int | float) and factor > 0:
        both = one and all_dims and all(isinstance(x, int | float) for x in (one, all_dims))
        scales = (one, all_dims) if both else (1, 0)
        over, under = (0.1 * s * math.log(factor) + 1.0 if factor > 1 else 1.0 for s in scales)
        made["attention_factor"] = over / under
    return made


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as text: 2-4, 7."""
    made: list[list[int]] = []
    for n in numbers:
        if made and made[-1][-1] == n - 1:
            made[-1].append(n)
        else:
            made.append([n])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in made)


def differences(expected: Reading, found: Reading) -> Iterator[tuple[str, Meaning | None, Meaning | None]]:
    """The values of two readings by one class that are not the same, by name."""
    for name in dict.fromkeys([*expected.values, *found.values]):
        want, have = expected.values.get(name), found.values.get(name)
        if want is None or have is None or not same(want.value, have.value):
            yield name, want, have
