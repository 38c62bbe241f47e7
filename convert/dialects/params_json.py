"""params.json of Meta and of Mistral AI: its fields under the names of config.json, what it means that one is
not there, and the document of the way back.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.convert.facts import same
from ckpt_tool.convert.facts_rotary import OBJECTS
from ckpt_tool.convert.families import FAMILIES
from ckpt_tool.convert.numbers import (
    DEFAULT,
    Check,
    Field,
    Known,
    anything,
    count,
    counted,
    flag,
    given,
    groups,
    measured,
    number,
    object_or_null,
)
from ckpt_tool.convert.params import SET, UNKNOWN, Facts, of_rotary, opened, shown
from ckpt_tool.convert.plan import Options, OutputDocument, Value
from ckpt_tool.convert.quantised import Inventory
from ckpt_tool.convert.quantised_asked import WAY_OUT
from ckpt_tool.convert.quantised_view import carried_of
from ckpt_tool.convert.weave import TIES
from ckpt_tool.errors import CkptToolError, Problem

NAME = "params.json"
# Fields that only one publisher writes.
OF_META = frozenset(("multiple_of", "ffn_dim_multiplier", "use_scaled_rope"))
OF_MISTRAL_AI = frozenset(("hidden_dim", "head_dim", "sliding_window", "_sliding_window"))

# What only Mistral AI's models of 2025-26 have, beside those.
OF_2025 = frozenset(("yarn", "llama_4_scaling"))


def keys_of(checkpoint: Checkpoint) -> frozenset[str]:
    """The fields that hold a value; none when the file is missing or cannot be read (planning says why)."""
    if NAME not in checkpoint.documents:
        return frozenset()
    try:
        params = checkpoint.json(NAME)
    except CkptToolError:
        return frozenset()
    inner = params.get("model")
    return frozenset(k for k, v in (inner if isinstance(inner, dict) else params).items() if v is not None)


def read(checkpoint: Checkpoint, options: Options, parts: Collection[str] = ()) -> Facts:
    """The file may be missing: then what shapes do not tell is asked for. `parts` are objects whose values
    are read under dotted keys."""
    document = checkpoint.json(NAME) if NAME in checkpoint.documents else None
    facts = Facts(None if document is None else _dotted(opened(document), parts), NAME, options.settings)
    facts.problems += _twice(document or {}, facts)
    kind = (facts.document or {}).get("model_type")
    if kind not in (None, "transformer", *FAMILIES):
        facts.refuse("unsupported", f"expected transformer, found {json.dumps(kind)[:60]}", "model_type")
    return facts


def _dotted(document: Mapping[str, Any], parts: Collection[str]) -> dict[str, Any]:
    """`document` with the values of the objects in it that `parts` name, dotted names of objects inside them
    included, beside the others; an empty object is left out."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if key in parts and isinstance(value, dict):
            inside = tuple(p.removeprefix(f"{key}.") for p in parts if p.startswith(f"{key}."))
            flat.update({f"{key}.{k}": v for k, v in _dotted(value, inside).items()})
        else:
            flat[key] = value
    return flat


def _twice(document: Mapping[str, Any], facts: Facts) -> Iterator[Problem]:
    """What the file says twice and differently: beside `model` and in it, in a rotary object and beside."""
    inner, top = document.get("model"), opened(document)
    for key, value in (inner if isinstance(inner, dict) else {}).items():
        if not same(value, top[key]):
            message = f"expected one value, found model.{key} {shown(value)} and {key} {shown(top[key])}"
            yield Problem("bad-config", message, NAME, key, "keep the right one in a copy of the file")
    for problem in of_rotary(top, {}, NAME, "bad-config"):
        name = "rope_scaling" if problem.where in OBJECTS else problem.where
        if name not in facts.settings:
            yield problem


def asked(known: Known, message: str, where: str, hint: str) -> Value:
    """What stands for a value that only the user can tell; `hint` says how."""
    known.refuse("missing-fact", message, where, hint)
    return UNKNOWN


# --- sizes ----------------------------------------------------------------------------------------------

WIDTH = "layers.{i}.feed_forward.w1.weight"


def embedding_axis(known: Known) -> str:
    """The axis of tok_embeddings that ranks share: "v" where each holds all columns of some rows (Llama 3),
    "d" where each holds some columns of all rows (Llama 1, 2, Code Llama)."""
    table = known.source.first("tok_embeddings.weight")
    return "v" if table is not None and table.shape[-1:] == (known["hidden_size"],) else "d"


def words(known: Known) -> Value | None:
    """The rows of the output layer, else of the embedding."""
    shared = embedding_axis(known) == "v"
    size = known.source.size
    return size("output.weight", 0) or size("tok_embeddings.weight", 0, shared=shared)


def _words_key(known: Known) -> tuple[str, ...]:
    """Some files leave the number of words to the tokenizer."""
    return () if (known.facts.document or {}).get("vocab_size") == -1 else ("vocab_size",)


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
    return given(known["num_attention_heads"], f"n_kv_heads absent from {facts.file}, as many as query heads")


def _copies_counted(known: Known, kv: Value) -> Value:
    once = known.once.get("num_key_value_heads")
    if isinstance(once, int) and once < kv.value == known.source.ranks and kv.source != SET:
        return Value(once, "ckpt-tool.json: the heads whose copies n_kv_heads counts")
    return kv


def head_dim(check: Check | None = None) -> Field:
    return count("head_dim", "head_dim", rule=_head_width, silent=_head_width, check=check)


def of_class(name: str, own: str, **more: Any) -> Field:
    """A count under either name in params.json, absent from config.json the default of the class."""
    return count(name, own, name, silent=DEFAULT, **more)


KV = ("n_kv_heads", "num_key_value_heads")
SIZES = (
    of_class("hidden_size", "dim", rule=measured("norm.weight", 0, shared=False)),
    of_class("intermediate_size", "hidden_dim", rule=measured(WIDTH, 0)),
    of_class("num_hidden_layers", "n_layers", rule=counted),
    of_class("num_attention_heads", "n_heads", ask="the number of query heads"),
    count("num_key_value_heads", *KV, rule=_groups, silent=groups, check=_copies_counted),
    head_dim(),
    count("vocab_size", read=_words_key, rule=words, silent=DEFAULT),
    number("rms_norm_eps", "norm_eps", "rms_norm_eps", silent=DEFAULT, ask="the epsilon of the norms"),
)


def alone(*fields: Field) -> list[Field]:
    """Fields that params.json has, under their own names or those they say, and config.json has not."""
    return [replace(f, keys=f.keys or (f.name,), hidden=True, told=False) for f in fields]


TIED_KEYS = ("tied_embeddings", "tie_word_embeddings")
ACTIVATION = ("hidden_act", "activation", "act_fn")


def head_is_there(known: Known, tied: Value) -> Value:
    """A check of tie_word_embeddings: an original without a head must be said to be tied."""
    if not known.back and not tied.value and "output.weight" not in known.source.tensors:
        known.refuse("missing-tensor", "expected output.weight, found none", "output.weight", TIES)
    return tied


def length(known: Known) -> tuple[str, ...]:
    """The field that says how long texts may be; max_seq_len is that of a program where there is another."""
    return tuple(k for k in ("max_position_embeddings", "max_seq_len") if known.facts.given(k))[:1]


TIED = flag(
    "tie_word_embeddings",
    *TIED_KEYS,
    rule=given(False, "tied_embeddings absent: the head is not tied"),
    check=head_is_there,
)


def says_tied(document: OutputDocument) -> bool:
    """Whether the params.json of the way back says that the head is the embedding."""
    said = opened(parse_object(document.content, file=NAME))
    return any(said.get(key) is True for key in TIED_KEYS)


def tied(known: Known) -> dict[str, Value]:
    """The entry of the way back, which only models with tied embeddings have."""
    return {"tied_embeddings": known.value(TIED.name)} if known[TIED.name] else {}


# --- quantised weights ------------------------------------------------------------------------------------


def _with_codes(known: Known, found: Value) -> Value:
    """What the file says of codes is of codes that are there; `quantised_config` reads it."""
    inventory = carried_of(known.source.checkpoint)
    if inventory is not None:
        _check_codes(known, inventory, found.value)
    elif found.value:
        message = f"expected quantised weights, as {NAME} says, found none"
        known.refuse(
            "config-mismatch", message, PACKED, "take it out of a copy of the file if they are plain"
        )
    return found


def _check_codes(known: Known, inventory: Inventory, told: Any = None) -> None:
    """Codes of linear layers, which loaders look for, and scales of inputs for all of them or for none, as
    the file says where it does: a loader leaves a scale that is missing at whatever it is made with."""
    said = told.get("qscheme_act") if isinstance(told, Mapping) else None
    without = [w for w in inventory.weights.values() if "activation" not in w.others]
    for w in inventory.weights.values():
        if "embed" in w.name or len(w.shape) != 2:
            message = f"expected numbers, as no loader knows codes of it, found {w.words}"
            known.facts.problems.append(Problem("unsupported", message, w.codes.file, w.name, WAY_OUT))
    if 0 < len(without) < len(inventory.weights):
        w, total = without[0], len(inventory.weights)
        name = w.codes.name.removesuffix(w.form.codes) + w.form.activation
        message = f"expected a scale of the inputs of each of {total} weights, found none of {len(without)}"
        known.facts.problems.append(
            Problem("missing-tensor", message, w.codes.file, name, "get the whole release")
        )
        return
    wanted = "NO_SCALES" if without else "TENSOR"
    if said not in (None, wanted):
        message = f"expected {wanted}, as {'no' if without else 'each'} weight has a scale of its inputs"
        hint = f"say {wanted} in a copy of the file, if nothing is missing"
        known.refuse("config-mismatch", f"{message}, found {said}", f"{PACKED}.qscheme_act", hint)


PACKED = "quantization"
QUANTISED = replace(
    anything(PACKED, PACKED, rule=Value(None, "absent"), silent=Value(None, "absent"), check=_with_codes),
    hidden=True,
    told=False,
)


def packed(known: Known) -> dict[str, Value]:
    """The entry of the way back, which models with a scale for each weight have."""
    inventory = carried_of(known.source.checkpoint)
    if inventory is None:
        return {}
    _check_codes(known, inventory)
    known.facts.check()
    scaled = any("activation" in w.others for w in inventory.weights.values())
    told = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR" if scaled else "NO_SCALES"}
    return {PACKED: Value(told, "the weights' codes and scales")}


# --- Mistral AI's ---------------------------------------------------------------------------------------


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
            many = "several" if kinds else "none"
            message = f"expected one window for all layers, as config.json can hold, found {many}"
            known.refuse("unsupported", message, "sliding_window")
            return Value(None, found.source)
        found = Value(next(iter(kinds.values())), f"{found.source}, the same for all layers")
    if found.value is None:
        return found
    inner = Facts({"sliding_window": found.value}, known.facts.file, {})
    width = inner.integer("sliding_window", "sliding_window", text_ok=True, kind="bad-config")
    known.facts.problems += inner.problems
    return Value(width.value, found.source)


LATER_WORDS = 32768  # of v0.3; v0.1 and v0.2 have 32000


def _theta_of_release(known: Known) -> Value | None:
    """Where params.json is silent: the first release had 1e4 in its code, that of December 2023 reads a
    missing theta as 1e4 with a sliding window and 1e6 without; HEAD always takes 1e6, which is wrong for 7B
    v0.1. A window in a model of a later vocabulary, which none was published with, is asked about."""
    if known.facts.document is None:
        return None
    # The release is told by what the file says, whatever window the user asks for.
    if known["sliding_window"] is None and not known.facts.given("sliding_window", "_sliding_window"):
        return given(1e6, "rope_theta absent from params.json and no sliding_window: 1e6")
    if known["vocab_size"] >= LATER_WORDS:
        return None
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
SCALED = anything("rope_scaling", silent=Value(None, "absent"), check=object_or_null, hidden=True)
UNSCALED = replace(SCALED, check=_unscaled)
MISTRAL_AI = (
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


# --- the document of the way back -----------------------------------------------------------------------


def kept(known: Known, numbers: Mapping[str, Value]) -> dict[str, Any]:
    """What the Hugging Face layout does not say, for the manifest: the text of params.json together with the
    numbers it stood for (it is used again only while config.json still says the same)."""
    text = None
    if known.facts.document is not None and all(v.source != SET for v in numbers.values()):
        text = known.source.checkpoint.documents[NAME].read().decode()
    values = {k: v.value for k, v in numbers.items()}
    return {NAME: text, "numbers": values, "ranks": known.source.ranks}


def written(
    derived: Mapping[str, Value], once: Mapping[str, Any], numbers: Mapping[str, Value]
) -> tuple[OutputDocument, list[str]]:
    """The original's own text where the manifest (`once`) has it and its numbers still hold, else made from
    `derived` (dots in a name nest); with notes."""
    text, then, notes = once.get(NAME), once.get("numbers"), []
    if isinstance(text, str):
        changed = [k for k, v in numbers.items() if not isinstance(then, dict) or then.get(k) != v.value]
        if not changed:
            return OutputDocument(NAME, text.encode(), "ckpt-tool.json: the original's text"), []
        notes = [f"{NAME} is written anew: config.json has another {', '.join(changed)} than the original"]
    values: dict[str, Any] = {}
    for name, value in derived.items():
        *outer, last = name.split(".")
        place = values
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value.value
    return OutputDocument(NAME, (json.dumps(values, indent=4) + "\n").encode(), "config.json"), notes
