"""CANINE-S and CANINE-C, which read characters: pre-trained, or fine-tuned on TyDi QA.

Source: google-research/language, canine/ (modeling.py, bert_modeling.py, config_utils.py, tydiqa/);
transformers 4.37.2 and 5.23.0 (models/canine).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ckpt_tool.convert.dialects import tensorflow
from ckpt_tool.convert.dialects.tensorflow import (
    Vocabulary,
    activation,
    dense,
    has,
    norm,
    output,
    shape_count,
    share,
    silence,
    size,
)
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DEFAULT,
    DTYPE,
    ENCODER_HEADS,
    Class,
    Field,
    Foretold,
    Known,
    Size,
    Value,
    anything,
    count,
    counted,
    follows,
    given,
    only,
    special,
)

HASHED = "char_embeddings/embeddings/HashBucketCodepointEmbedder_"
POSITIONS, TYPES = "char_embeddings/char_position_embeddings", "char_embeddings/segment_embeddings"
DOWN = "initial_char_encoder/initial_char_encoder/chars_to_molecules/"  # the scope is opened twice
UP = "final_char_encoder/"
SPANS = ("cls/tydi/output_weights", "qa_outputs.weight")
MOST_TABLES = 16  # as many primes as the code has

# --- rows -----------------------------------------------------------------------------------------------


def rows(known: Known) -> list[Rule]:
    """Axes: d and c the width, r the rows of a table of hashes and h its columns, p positions, y token types,
    f the feed-forward's width, j the taps of one convolution, m those of the other, w the width of characters
    beside molecules."""
    C = "canine."
    return [
        rule(HASHED + "{s}", f"{C}char_embeddings.HashBucketCodepointEmbedder_{{s}}.weight", "r h"),
        rule(TYPES, f"{C}char_embeddings.token_type_embeddings.weight", "y d"),
        rule(POSITIONS, f"{C}char_embeddings.char_position_embeddings.weight", "p d"),
        *norm("char_embeddings/LayerNorm", f"{C}char_embeddings.LayerNorm", "d"),
        *layer("initial_char_encoder/layer_0", f"{C}initial_char_encoder.layer.0"),
        rule(f"{DOWN}conv/kernel", f"{C}chars_to_molecules.conv.weight", "j d c -> c d j"),
        rule(f"{DOWN}conv/bias", f"{C}chars_to_molecules.conv.bias", "c"),
        *norm(f"{DOWN}LayerNorm", f"{C}chars_to_molecules.LayerNorm", "d"),
        *layer("bert/layer_{i}", f"{C}encoder.layer.{{i}}"),
        rule(f"{UP}conv/kernel", f"{C}projection.conv.weight", "m w c -> c w m"),
        rule(f"{UP}conv/bias", f"{C}projection.conv.bias", "c"),
        *norm(f"{UP}LayerNorm", f"{C}projection.LayerNorm", "d"),
        *layer(f"{UP}layer_0", f"{C}final_char_encoder.layer.0"),
        *dense("pooler/dense", f"{C}pooler.dense", "d", "c"),
        *(output("cls/tydi/", "qa_outputs", "two", "d") if has(known, *SPANS) else ()),
    ]


def layer(source: str, target: str) -> list[Rule]:
    """BERT's."""
    made = list[Rule]()
    for part in ("query", "key", "value"):
        made += dense(f"{source}/attention/self/{part}", f"{target}.attention.self.{part}", "d", "c")
    made += dense(f"{source}/attention/output/dense", f"{target}.attention.output.dense", "d", "c")
    made += norm(f"{source}/attention/output/LayerNorm", f"{target}.attention.output.LayerNorm", "d")
    made += dense(f"{source}/intermediate/dense", f"{target}.intermediate.dense", "d", "f")
    made += dense(f"{source}/output/dense", f"{target}.output.dense", "f", "d")
    return [*made, *norm(f"{source}/output/LayerNorm", f"{target}.output.LayerNorm", "d")]


def axes(known: Known) -> dict[str, Size]:
    return {
        "d": "hidden_size",
        "c": "hidden_size",
        "f": "intermediate_size",
        "r": "num_hash_buckets",
        "p": "num_hash_buckets",  # of transformers, and of an original where that is not refused
        "y": "type_vocab_size",
        "j": "downsampling_rate",
        "m": "upsampling_kernel_size",
        "h": lambda k: int(k["hidden_size"]) // int(k["num_hash_functions"]),
        "w": lambda k: 2 * int(k["hidden_size"]),
        "two": lambda _: 2,
    }


def architecture(known: Known) -> Value:
    if known.back:
        said = (known.facts.document or {}).get("architectures") or ["CanineModel"]
        return Value(said, "config.json: architectures")
    if has(known, *SPANS):
        return Value(["CanineForQuestionAnswering"], f"{SPANS[0]} in the file")
    return Value(["CanineModel"], "transformers has no class with the heads of pre-training")


# --- what the files do not say ----------------------------------------------------------------------------

PUBLISHED = (12, 768, 3072)  # layers, width and feed-forward width of canine-s and canine-c
_TABLE = re.compile(HASHED + r"(\d{1,4})", re.ASCII)


def published(value: int) -> Callable[[Known], Value | None]:
    def rule(known: Known) -> Value | None:
        found = tuple(known[n] for n in ("num_hidden_layers", "hidden_size", "intermediate_size"))
        return given(value, "the sizes are those of canine-s and canine-c") if found == PUBLISHED else None

    return rule


def tables(known: Known) -> Value | None:
    numbers = [int(m[1]) for n in known.source.tensors if (m := _TABLE.fullmatch(n))]
    return Value(max(numbers) + 1, f"{HASHED}N in the names") if numbers else None


def tanh(known: Known) -> Value:
    return given("gelu", "every published model has it, which is the tanh form in this code")


def shared_out(name: str) -> Callable[[Known, Value], Value]:
    """A check of the field `name`: the width divides by it."""

    def check(known: Known, found: Value) -> Value:
        if known["hidden_size"] % found.value:
            message = f"expected hidden_size {known['hidden_size']} to divide by it, found {found.value}"
            known.refuse("config-mismatch", f"{message} ({found.source})", name)
        elif name == "num_hash_functions" and found.value > MOST_TABLES:
            message = f"expected at most {MOST_TABLES}, as there are primes for, found {found.value}"
            known.refuse("unsupported", message, name)
        return found

    return check


def as_many_as_buckets(known: Known, found: Value) -> Value:
    if not known.back and found.value != known["num_hash_buckets"]:
        message = (
            f"expected as many positions as hash buckets, {known['num_hash_buckets']}, as transformers has "
            f"that many rows in its table of positions, found {found.value} ({found.source})"
        )
        known.refuse("unsupported", message, "max_position_embeddings")
    return found


def sixteen(known: Known, found: Value) -> Value:
    """The code has 16 whatever its settings say, and says 2 itself."""
    if not known.back:
        return given(16, "token types of the code, which does not read type_vocab_size")
    if found.value != 16:
        known.refuse(
            "unsupported", f"expected 16, which the code has, found {found.value}", "type_vocab_size"
        )
    return found


def unread(name: str, *keys: str) -> Field:
    """What the code takes for a setting and does not use."""
    idle = given(None, "not used by the code")
    return anything(name, *keys, rule=idle, silent=idle, hidden=True, told=False)


# --- the family -------------------------------------------------------------------------------------------

CLASS = Class(
    "CanineConfig",
    {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "type_vocab_size": 16,
        "layer_norm_eps": 1e-12,
        "downsampling_rate": 4,
        "upsampling_kernel_size": 4,
        "num_hash_functions": 8,
        "num_hash_buckets": 16384,
        "local_transformer_stride": 128,
    },
    {
        "bos_token_id": 57344,
        "eos_token_id": 57345,
        "pad_token_id": 0,
        "max_position_embeddings": 16384,
    },
    idle={"tie_word_embeddings": "no output layer to tie"},
    idle_numbers={
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
    },
    causal=False,
    prefix="canine.",
    words="char_embeddings.HashBucketCodepointEmbedder_0.weight",
    positions="char_embeddings.char_position_embeddings.weight",
    key_bias=".attention.self.key.bias",
    tied={},
    dropouts={"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    heads=ENCODER_HEADS,
)

FIELDS = (
    follows("architectures", architecture),
    count("num_hidden_layers", "num_hidden_layers", rule=silence(12, counted), silent=DEFAULT),
    size("hidden_size", 768, POSITIONS, 1),
    count(
        "num_attention_heads",
        "num_attention_heads",
        rule=silence(12, published(12)),
        silent=DEFAULT,
        ask="the number of attention heads",
        check=shared_out("num_attention_heads"),
    ),
    size("intermediate_size", 3072, "bert/layer_{i}/intermediate/dense/kernel", 1),
    activation("gelu", tanh, names={"gelu": "gelu_new", "relu": "relu"}, besides=("gelu",)),
    size("num_hash_buckets", 16384, f"{HASHED}0", 0),
    shape_count("num_hash_functions", 8, tables),
    count(
        "max_position_embeddings",
        "max_positions",
        rule=silence(16384, lambda known: known.source.size(POSITIONS, 0, shared=False)),
        silent=DEFAULT,
        check=as_many_as_buckets,
    ),
    count("type_vocab_size", "type_vocab_size", rule=given(16, ""), silent=DEFAULT, check=sixteen),
    size("downsampling_rate", 4, f"{DOWN}conv/kernel", 0),
    size("upsampling_kernel_size", 4, f"{UP}conv/kernel", 0),
    count(
        "local_transformer_stride",
        "local_transformer_stride",
        rule=silence(128, published(128)),
        silent=DEFAULT,
        ask="how many characters see each other in the first layer",
    ),
    unread("downsampling_kernel_size", "downsampling_kernel_size"),
    unread("__comment__", "__comment__", "__COMMENT__"),
    only("layer_norm_eps", 1e-12, "that of tf_slim's layer_norm"),
    special("pad_token_id", given(0, "[PAD]")),
    special("bos_token_id", given(57344, "[CLS]")),
    special("eos_token_id", given(57345, "[SEP]")),
    share("hidden_dropout_prob", 0.1, unsaid=0.1),
    share("attention_probs_dropout_prob", 0.1, unsaid=0.1),
    share("initializer_range", 0.02, unsaid=0.02),
    DTYPE,
)

ERF = "canine-erf-gelu"
# The settings of the code, and the fields behind them.
KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "type_vocab_size"),
    *("downsampling_rate", "upsampling_kernel_size", "num_hash_functions", "num_hash_buckets"),
    "local_transformer_stride",
)


def other_gelu(known: Known) -> tuple[Foretold, ...]:
    if known["hidden_act"] != "gelu":
        return ()
    reason = (
        "every gelu of the original is the tanh form, and gelu in config.json, as models published for "
        "transformers have it, is the erf form: at most 4.8e-4 apart as they leave a gelu"
    )
    deep = range(known["num_hidden_layers"])
    where = ("initial_char_encoder", "chars_to_molecules", *deep, "projection", "final_char_encoder")
    return (Foretold(ERF, reason, {"hidden_act": "gelu_new"}, where),)


def notes(known: Known) -> list[str]:
    if known["hidden_act"] in ("gelu", "relu"):
        return []
    return [
        f"hidden_act is {known['hidden_act']}, the tanh form of gelu, which the original computes; models "
        "published for transformers have gelu, the erf form, which --set hidden_act=gelu writes: a foretold "
        "difference"
    ]


def check(known: Known) -> None:
    said = known.value("architectures").value
    if known.back and said not in (["CanineModel"], ["CanineForQuestionAnswering"]):
        message = f"expected a class whose head Google's code has, found {said[0]}"
        known.refuse("unsupported", message, "architectures")


FAMILY = tensorflow.family(
    name="canine",
    title="CANINE",
    summary="CANINE-S and CANINE-C, pre-trained or fine-tuned on TyDi QA: TensorFlow bundles",
    architectures=(
        "CanineModel",
        "CanineForQuestionAnswering",
        "CanineForSequenceClassification",
        "CanineForMultipleChoice",
        "CanineForTokenClassification",
    ),
    classes={"canine": CLASS},
    fields=FIELDS,
    rows=rows,
    axes=axes,
    indices=lambda known: {"s": known["num_hash_functions"]},
    needed=(f"{HASHED}0", f"{DOWN}conv/kernel"),
    told_by=(POSITIONS,),
    layer=(r"bert/layer_(\d+)/", r"canine\.encoder\.layer\.(\d+)\."),
    documents=("canine_config.json", "model_config.json"),
    entries={**{key: key for key in KEYS}, "max_positions": "num_hash_buckets"},
    stem="model.ckpt",
    ignored={
        r"cls/(?!tydi/).*": "a head of pre-training, which transformers has no class for",
        r"(.+/)?(autoregressive_decoder|char_output_weights)(/.*)?": "the decoder of pre-training",
        r"answer_type_output_(weights|bias)": "the kind of answer of TyDi QA: transformers has no such head",
    },
    bare=("CanineModel",),
    outside=("qa_outputs.", "classifier."),
    check=check,
    notes=notes,
    foretold={ERF: other_gelu},
    vocabulary=Vocabulary("codepoints", ("CanineTokenizer",)),
)
