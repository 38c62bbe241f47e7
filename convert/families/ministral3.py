"""Mistral AI's models of 2025-26: Ministral 3, Devstral 2 and others whose params.json has `yarn`, and
those that read images (Mistral Small 3.1 and later) with yarn or without.

Original: `consolidated*.safetensors`, params.json and tekken.json. Facts: mistralai/mistral-inference
@2557e12d for the tensors; vllm-project/vllm @01da88c (transformers_utils/configs/mistral.py) and transformers
5.23.0 (models/ministral3) for the values of params.json and what config.json makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.convert.dialects import consolidated, images, params_json
from ckpt_tool.convert.dialects.consolidated import DENSE, Form, Seen
from ckpt_tool.convert.numbers import (
    DEFAULT,
    IDS,
    Entry,
    Field,
    Known,
    Parts,
    Value,
    anything,
    count,
    given,
    like_llama,
    number,
    only,
    shown,
    some,
    written,
)

YARN, LLAMA_4 = "yarn", "llama_4_scaling"
LENGTH, BETA = "original_max_position_embeddings", "llama_4_scaling_beta"
ROTARY = ("rope_theta", "rope_scaling")


def told(seen: Seen) -> tuple[bool, str]:
    if seen.not_dense:
        return False, seen.not_dense
    if YARN in seen.keys:
        return True, "dense layers, and params.json has yarn"
    return False, "no yarn in params.json"


def told_with_images(seen: Seen) -> tuple[bool, str]:
    if seen.not_dense:
        return False, seen.not_dense
    if "patch_merger.merging_layer.weight" not in seen.names:
        return False, "reads images, and has no patch_merger as models from Mistral Small 3.1 on have"
    return True, "dense layers, and a part that reads images and merges patches"


def _kind(known: Known) -> Value:
    """The text model of one that reads images, by what is done to its rotary frequencies."""
    scaled = known["rope_scaling"] is not None
    return given("ministral3" if scaled else "mistral", "with yarn" if scaled else "without yarn")


# --- the rotary embedding and what queries grow by ------------------------------------------------------


def _no_yarn(known: Known) -> Value | None:
    """None, which asks, where there is some of it."""
    facts = known.facts
    if facts.document is None or any(k.startswith("yarn") for k in (*facts.document, *facts.settings)):
        return None
    return Value(None, "no yarn in params.json")


def _true_or_false(known: Known, found: Value) -> Value:
    if found.value is not None and type(found.value) is not bool:
        known.refuse("bad-config", f"expected true or false, found {shown(found.value)}", "yarn.apply_scale")
    return found


def _beta(known: Known, found: Value) -> Value:
    if type(found.value) not in (int, float) or not 0 <= found.value < math.inf:
        known.refuse("bad-config", f"expected a number from 0, found {shown(found.value)}", f"{LLAMA_4}.beta")
        return Value(0.0, found.source)
    return Value(float(found.value), found.source)


def _one_length(known: Known, found: Value) -> Value:
    """Queries grow at multiples of a length, for which the class takes that of yarn."""
    if found.value is not None and known["yarn_length"] not in (None, found.value):
        message = f"expected {known['yarn_length']}, that of yarn, whose length the class takes for both"
        known.refuse("unsupported", f"{message}, found {shown(found.value)}", f"{LLAMA_4}.{LENGTH}")
    return found


def _whole_turns(known: Known, found: Value) -> Value:
    """yarn.truncate, which no publisher wrote: from a whole channel to a whole channel."""
    if found.value not in (None, True):
        known.refuse("unsupported", f"expected true, found {shown(found.value)}", "yarn.truncate")
    return found


ASK_SCALE = (
    "true or false, which decides the factor on cosines and sines (false: 1, true: 0.1 ln(factor) + 1; "
    "readers disagree on what its absence means)"
)
# Of params.json, under the names that the user may set them by.
HIDDEN: tuple[Field, ...] = tuple(
    replace(f, hidden=True, told=False)
    for f in (
        number("yarn_factor", f"{YARN}.factor", rule=_no_yarn, ask="how many times longer texts may be"),
        count(
            "yarn_length", f"{YARN}.{LENGTH}", rule=_no_yarn, ask="the length that the model was trained for"
        ),
        number(
            "yarn_beta", f"{YARN}.beta", rule=_no_yarn, ask="the turns from which a channel stays as it is"
        ),
        number(
            "yarn_alpha", f"{YARN}.alpha", rule=_no_yarn, ask="the turns below which a channel is slowed down"
        ),
        anything("apply_scale", f"{YARN}.apply_scale", rule=_no_yarn, ask=ASK_SCALE, check=_true_or_false),
        anything("yarn_truncate", f"{YARN}.truncate", rule=Value(None, "absent"), check=_whole_turns),
        anything(
            BETA,
            f"{LLAMA_4}.beta",
            rule=Value(0.0, "rule: llama_4_scaling absent from params.json: queries do not grow"),
            check=_beta,
        ),
        anything("llama_4_length", f"{LLAMA_4}.{LENGTH}", rule=Value(None, "absent"), check=_one_length),
    )
)


def _scaling(known: Known) -> Value:
    """rope_scaling of what params.json says. The class works the factor on cosines and sines out of two
    numbers, of which equal ones make 1 and a zero 0.1 ln(factor) + 1."""
    if known["yarn_factor"] is None:
        if known[BETA]:
            message = "expected yarn beside it, whose length the class takes, found none"
            known.refuse("unsupported", message, LLAMA_4)
        return Value(None, "no yarn in params.json")
    values = {
        "rope_type": YARN,
        "factor": float(known["yarn_factor"]),
        LENGTH: known["yarn_length"],
        "beta_fast": float(known["yarn_beta"]),
        "beta_slow": float(known["yarn_alpha"]),
        BETA: known[BETA],
        "mscale": 1.0,
        "mscale_all_dim": 0.0 if known["apply_scale"] else 1.0,
    }
    why = known.value("apply_scale").source
    return Value(values, f"params.json: yarn, llama_4_scaling; mscale_all_dim from {why}")


def _attention_factor(scaling: Mapping[str, Any]) -> float:
    """As transformers works it out (modeling_rope_utils.py)."""
    factor = float(scaling["factor"])

    def grown(scale: Any = 1.0) -> float:
        return 0.1 * float(scale) * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    one, every = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(one) / grown(every) if one and every else grown()


def _applied(scaling: Mapping[str, Any]) -> bool | None:
    """apply_scale of params.json; None where it can say neither."""
    factor = float(scaling["factor"])
    made = _attention_factor(scaling)
    for scaled, wanted in ((False, 1.0), (True, 0.1 * math.log(max(factor, 1.0)) + 1.0)):
        if math.isclose(made, wanted, rel_tol=1e-12):
            return scaled
    return None


def _sayable(known: Known, found: Value) -> Value:
    """What the class computes and params.json can say."""
    scaling = found.value if isinstance(found.value, dict) else {}
    where = "rope_scaling"
    if found.value is None and KIND in known.fields:
        return found
    if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != YARN:
        message = f"expected rope_type yarn in family ministral3, found {shown(kind)}"
        known.refuse("unsupported", message, where, "a model without yarn is of family mistral")
        return found
    if scaling.get(BETA) is None:
        message = f"expected {BETA}, without which the class stops, found none"
        known.refuse("bad-config", message, where, f"{BETA} 0 in rope_parameters: queries do not grow")
        return found
    if missing := [name for name in ("factor", LENGTH) if scaling.get(name) is None]:
        known.refuse("bad-config", f"expected {' and '.join(missing)}, found none", where)
        return found
    numbers = ("factor", LENGTH, "beta_fast", "beta_slow", BETA, "mscale", "mscale_all_dim")
    for name in (*numbers, "attention_factor"):
        value, least = scaling.get(name, 1), 0 if name in (BETA, "mscale", "mscale_all_dim") else 1e-30
        if value is not None and (type(value) not in (int, float) or not least <= value < math.inf):
            known.refuse("bad-config", f"expected a number above 0 as {name}, found {shown(value)}", where)
            return found
    if float(scaling[LENGTH]) % 1:
        message = f"expected a whole number as {LENGTH}, found {shown(scaling[LENGTH])}"
        known.refuse("bad-config", message, where)
    if scaling.get("truncate", True) is not True:
        known.refuse("unsupported", "expected truncate true, as params.json means it, found false", where)
    if _applied(scaling) is None:
        message = "expected an attention factor of 1 or 0.1 ln(factor) + 1, as apply_scale can say"
        known.refuse("unsupported", f"{message}, found {_attention_factor(scaling):g}", where)
    return found


def _of_yarn(known: Known) -> dict[str, Value]:
    """The entries of params.json on the way back; one of queries only where they grow."""
    found = known.value("rope_scaling")
    if found.value is None:
        return {}
    values, beta = {**found.value, LENGTH: int(found.value[LENGTH])}, float(found.value[BETA])
    made = {
        f"{YARN}.factor": values["factor"],
        f"{YARN}.{LENGTH}": values[LENGTH],
        f"{YARN}.beta": values.get("beta_fast") or 32.0,
        f"{YARN}.alpha": values.get("beta_slow") or 1.0,
        f"{YARN}.apply_scale": _applied(values),
        **({f"{LLAMA_4}.{LENGTH}": values[LENGTH], f"{LLAMA_4}.beta": beta} if beta else {}),
    }
    return {name: Value(value, found.source) for name, value in made.items()}


def spelled(known: Known, config: dict[str, Value]) -> dict[str, Value]:
    """The rotary values in one object, where alone the class looks for those of its own."""
    theta, scaling = (config[name] for name in ROTARY)
    rotary = {"rope_theta": theta.value, **(scaling.value or {"rope_type": "default"})}
    others = {name: value for name, value in config.items() if name not in ROTARY}
    return {**others, "rope_parameters": Value(rotary, f"{theta.source}; {scaling.source}")}


# --- the classes ----------------------------------------------------------------------------------------

# Of a config.json without rope_parameters.
USUAL: Mapping[str, Any] = {
    "rope_type": YARN,
    "factor": 16.0,
    LENGTH: 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    BETA: 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
TEXT = {
    "vocab_size": 131072,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "rope_scaling": USUAL,
    "sliding_window": None,
}
CLASS = replace(
    like_llama("Ministral3Config", TEXT, context=262144),
    identity={**IDS, "pad_token_id": 11, "max_position_embeddings": 262144},
)
PLAIN = like_llama(  # of a text model without yarn, which older models that see images have
    "MistralConfig",
    {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
    context=131072,
)
# What the class takes where there is no text_config at all.
WITHOUT_TEXT = {
    **PLAIN.numbers,
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
    "sliding_window": None,
}
KIND, LONGEST = "text_config.model_type", "max_position_embeddings"
TEXTS = {"ministral3": CLASS, "mistral": PLAIN}
PARTS = Parts(
    text="text_config",
    others=(images.CONFIG,),
    top=frozenset(
        (
            *images.TOP,
            "quantization_config",
            "architectures",
            "model_type",
            "tie_word_embeddings",
            "torch_dtype",
        )
    ),
    defaults={
        **{kind: {**own.numbers, LONGEST: own.identity[LONGEST]} for kind, own in TEXTS.items()},
        "pixtral": images.DEFAULTS,
    },
    names={
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
)
SEEING_CLASS = replace(
    PLAIN,
    name="Mistral3Config",
    numbers={
        **WITHOUT_TEXT,
        "tie_word_embeddings": True,  # of the whole, which decides
        KIND: "mistral",
        f"{images.CONFIG}.model_type": "pixtral",
        **images.TOP,
        **{f"{images.CONFIG}.{name}": value for name, value in images.WITHOUT_A_PART.items()},
    },
    aliases={"image_token_index": ("image_token_id",)},
    idle={
        **PLAIN.idle,
        f"{images.CONFIG}.vocab_size": "not read: a tower has no words",
        f"{images.CONFIG}.head_dim": "not read: the width divided by the heads",
    },
    prefix="language_model.model.",
    tied={"language_model.lm_head.weight": ""},
    parts=PARTS,
)


# --- the family -----------------------------------------------------------------------------------------


def fields(*more: Field) -> tuple[Field | Iterable[Field], ...]:
    return (
        only("hidden_act", "silu", "the original's feed_forward", keys=params_json.ACTIVATION),
        params_json.SIZES,
        params_json.THETA,
        *HIDDEN,
        anything("rope_scaling", rule=_scaling, silent=DEFAULT, check=_sayable),
        params_json.WINDOW,
        count("max_position_embeddings", read=params_json.length, ask="how long texts may be"),
        params_json.TIED,
        params_json.QUANTISED,
        *more,
    )


SAID: Mapping[str, Any] = {
    "name": "ministral3",
    "summary": "Ministral 3, Mistral Small 3.x, Devstral 2: consolidated*.safetensors; images, fp8",
    "lacks": ("no experts", ("moe.num_experts", "moe")),
    "forms": {"safetensors": Form(("consolidated.safetensors",), DENSE)},
    "ids": lambda _: (1, 2, "every Mistral tokenizer"),
    "options": (),
    "vocabulary": consolidated.MISTRAL_AI,
    "spelled": spelled,
    "ignored": consolidated.IGNORED | consolidated.FAKE,
    "quantised": consolidated.QSCALE,
}
ENTRIES: tuple[Entry, ...] = (
    *params_json.MISTRAL_AI,
    lambda known: {"max_position_embeddings": known.value("max_position_embeddings")},
    some("sliding_window"),
    params_json.tied,
    params_json.packed,
    _of_yarn,
)
OF_TEXT = consolidated.family(
    **SAID,
    architecture="Ministral3ForCausalLM",
    config=CLASS,
    told=told,
    fields=fields(),
    params=ENTRIES,
    parts=(YARN, LLAMA_4),
)
SEEING = consolidated.family(
    **SAID,
    architecture="Mistral3ForConditionalGeneration",
    model_type="mistral3",
    config=SEEING_CLASS,
    told=told_with_images,
    fields=fields(written(KIND, _kind), *images.FIELDS),
    params=(*ENTRIES, images.entries),
    parts=(YARN, LLAMA_4, *images.OBJECTS),
    beside=images.beside,
    untold=images.untold,
    root="language_model.",
)
FAMILY = consolidated.one_of_two(OF_TEXT, SEEING, lambda checkpoint: images.sees(checkpoint.names()))
