"""MobileBERT: the published models and what was fine-tuned from them, as TensorFlow saved them.

Source: google-research/google-research @0c1bbe5f mobilebert/ (modeling.py, run_pretraining.py, run_squad.py,
run_classifier.py, config/); transformers 4.37.2 and 5.23.0 (models/mobilebert).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ckpt_tool.convert.dialects import tensorflow
from ckpt_tool.convert.dialects.tensorflow import (
    Vocabulary,
    activation,
    agrees,
    dense,
    has,
    norm,
    output,
    shape_count,
    shape_flag,
    share,
    silence,
    size,
)
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DEFAULT,
    DTYPE,
    ENCODER_HEADS,
    UNKNOWN,
    Class,
    Foretold,
    Known,
    Size,
    Value,
    anything,
    count,
    flag,
    follows,
    given,
    only,
    shown,
    special,
)

S, T = "bert/encoder/layer_{i}/", "mobilebert.encoder.layer.{i}."
FIRST = "bert/encoder/layer_0/"
WORDS, TURNED = "bert/embeddings/word_embeddings", "bert/embeddings/embedding_transformation"
POOLER = "bert/pooler/dense/kernel"
NORMS = {"no_norm": "FakeLayerNorm", "layer_norm": "LayerNorm"}  # what the variables are called

# --- heads ----------------------------------------------------------------------------------------------

# A head, by the variables that tell it: their names on both sides. Those of question answering have had two.
MASKED, NEXT, SPANS, CLASSIFIER = "masked LM", "next sentence", "question answering", "classification"
OLD_SPANS = ("squad/output_weights", "qa_outputs.weight")
CLASSES_OF = ("output_weights", "classifier.weight")
TOLD_BY: Mapping[str, tuple[tuple[str, str], ...]] = {
    MASKED: (("cls/predictions/output_bias", "cls.predictions.bias"),),
    NEXT: (("cls/seq_relationship/output_weights", "cls.seq_relationship.weight"),),
    SPANS: (("cls/squad/output_weights", "qa_outputs.weight"), OLD_SPANS),
    CLASSIFIER: (CLASSES_OF,),
}
CLASSES: Mapping[frozenset[str], str] = {
    frozenset({MASKED, NEXT}): "MobileBertForPreTraining",
    frozenset({MASKED}): "MobileBertForMaskedLM",
    frozenset({NEXT}): "MobileBertForNextSentencePrediction",
    frozenset({SPANS}): "MobileBertForQuestionAnswering",
    frozenset({CLASSIFIER}): "MobileBertForSequenceClassification",
    frozenset(): "MobileBertModel",
}
# Which transformers has too, and no original of Google's code.
OTHERS = ("MobileBertForTokenClassification", "MobileBertForMultipleChoice")
UNPOOLED = ("MobileBertForMaskedLM", "MobileBertForQuestionAnswering")  # classes without a pooler


def heads(known: Known) -> frozenset[str]:
    return frozenset(head for head, names in TOLD_BY.items() if any(has(known, *pair) for pair in names))


def architecture(known: Known) -> Value:
    """The class whose heads are there; a folder of transformers says its own."""
    there = heads(known)
    if known.back:
        said = (known.facts.document or {}).get("architectures") or [CLASSES.get(there)]
        return Value(said, "config.json: architectures")
    found = CLASSES.get(there)
    if found is None:
        message = f"expected the heads of one class, found those of {', '.join(sorted(there))}"
        known.refuse("unsupported", message, "architectures", "--drop NAME leaves a variable out")
        return UNKNOWN
    return Value([found], f"the heads in the file: {', '.join(sorted(there)) or 'none'}")


def spans(known: Known) -> str:
    """What stands before the variables of question answering."""
    old = known.once.get("spans") == "squad/" if known.back else has(known, *OLD_SPANS)
    return "squad/" if old else "cls/squad/"


def head_rows(known: Known) -> list[Rule]:
    there, made = heads(known), list[Rule]()
    stem, target = "cls/predictions/", "cls.predictions."
    if MASKED in there:
        made += dense(f"{stem}transform/dense", f"{target}transform.dense", "d", "c")
        made += norm(f"{stem}transform/LayerNorm", f"{target}transform.LayerNorm", "d")
        made.append(rule(f"{stem}output_bias", f"{target}bias", "v"))
        if known["hidden_size"] > known["embedding_size"]:
            made.append(rule(f"{stem}extra_output_weights", f"{target}dense.weight", "v x -> x v"))
    if NEXT in there:
        made += output("cls/seq_relationship/", "cls.seq_relationship", "two", "d")
    if SPANS in there:
        made += output(spans(known), "qa_outputs", "two", "d")
    if CLASSIFIER in there:
        made += output("", "classifier", "l", "d")
    return made


# --- rows -----------------------------------------------------------------------------------------------


def rows(known: Known) -> list[Rule]:
    """Axes: d and c the width, e that of a word, b and a that of the block between the bottlenecks, q and r
    what query and value are made of, f the feed-forward's, g the words in a trigram, x what the output layer
    has beyond the embedding."""
    n = NORMS[known["normalization_type"]]
    made = [
        rule(WORDS, "mobilebert.embeddings.word_embeddings.weight", "v e"),
        rule(
            "bert/embeddings/position_embeddings", "mobilebert.embeddings.position_embeddings.weight", "p d"
        ),
        rule(
            "bert/embeddings/token_type_embeddings",
            "mobilebert.embeddings.token_type_embeddings.weight",
            "t d",
        ),
        *(dense(TURNED, "mobilebert.embeddings.embedding_transformation", "ge", "d") if turns(known) else ()),
        *norm(f"bert/embeddings/{n}", "mobilebert.embeddings.LayerNorm", "d"),
        *layer_rows(known, n),
    ]
    if known["classifier_activation"] and has_pooler(known):
        made += dense("bert/pooler/dense", "mobilebert.pooler.dense", "d", "c")
    return [*made, *head_rows(known)]


def has_pooler(known: Known) -> bool:
    return known["architectures"][0] not in UNPOOLED


def unpooled(known: Known) -> dict[str, str]:
    return {} if has_pooler(known) else {r"bert/pooler/.*": f"{known['architectures'][0]} has no pooler"}


def unread(known: Known) -> dict[str, str]:
    """What transformers makes and saves whatever config.json says, and then does not use."""
    made = {}
    if not turns(known):
        name = r"(mobilebert\.)?embeddings\.embedding_transformation\.(weight|bias)"
        made[name] = "transformers does not use it: words are as wide as the model, without trigrams"
    if known["hidden_size"] == known["embedding_size"]:
        made[r"cls\.predictions\.dense\.weight"] = "it has no elements: words are as wide as the model"
    return made


def layer_rows(known: Known, n: str) -> list[Rule]:
    made = list[Rule]()

    def block(source: str, target: str, inputs: str, outputs: str) -> None:
        made.extend(dense(f"{S}{source}/dense", f"{T}{target}.dense", inputs, outputs))
        made.extend(norm(f"{S}{source}/{n}", f"{T}{target}.LayerNorm", outputs))

    if known["use_bottleneck"]:
        block("bottleneck/input", "bottleneck.input", "d", "b")
        if known["key_query_shared_bottleneck"]:
            block("bottleneck/attention", "bottleneck.attention", "d", "b")
    for part, width in (("query", "q"), ("key", "q"), ("value", "r")):
        made += dense(f"{S}attention/self/{part}", f"{T}attention.self.{part}", width, "b")
    block("attention/output", "attention.output", "a", "b")
    if known["num_feedforward_networks"] > 1:
        made += dense(f"{S}ffn_layer_{{j}}/intermediate/dense", f"{T}ffn.{{j}}.intermediate.dense", "b", "f")
        block("ffn_layer_{j}/output", "ffn.{j}.output", "f", "b")
    made += dense(f"{S}intermediate/dense", f"{T}intermediate.dense", "b", "f")
    block("output", "output", "f", "b")
    if known["use_bottleneck"]:
        block("output/bottleneck", "output.bottleneck", "b", "d")
    return made


def axes(known: Known) -> dict[str, Size]:
    inner = "intra_bottleneck_size" if known["use_bottleneck"] else "hidden_size"
    whole = not known["use_bottleneck_attention"]
    return {
        "v": "vocab_size",
        "p": "max_position_embeddings",
        "t": "type_vocab_size",
        "d": "hidden_size",
        "c": "hidden_size",
        "e": "embedding_size",
        "ge": lambda k: int(k["embedding_size"]) * (3 if k["trigram_input"] else 1),
        "b": inner,
        "a": inner,
        "q": inner if not whole or known["key_query_shared_bottleneck"] else "hidden_size",
        "r": "hidden_size" if whole else inner,
        "f": "intermediate_size",
        "x": lambda k: int(k["hidden_size"]) - int(k["embedding_size"]),
        "two": lambda _: 2,
        "l": labels,
    }


def turns(known: Known) -> bool:
    """Whether words are brought to the width by a matrix."""
    return bool(known["trigram_input"] or known["embedding_size"] != known["hidden_size"])


def labels(known: Known) -> int:
    found = known.source.first(CLASSES_OF[known.back])
    return found.shape[0] if found is not None and found.shape else 1


def named_labels(known: Known) -> dict[str, Value]:
    """How many classes a classifier tells apart, as transformers writes it down."""
    if CLASSIFIER not in heads(known):
        return {}
    names, source = [f"LABEL_{k}" for k in range(labels(known))], f"rows of {CLASSES_OF[0]}"
    return {
        "id2label": Value({str(k): n for k, n in enumerate(names)}, source),
        "label2id": Value({n: k for k, n in enumerate(names)}, source),
    }


# --- what the variables tell ----------------------------------------------------------------------------


def there(variable: str) -> Callable[[Known], Value]:
    def measure(known: Known) -> Value:
        found = variable in known.source.tensors
        return Value(found, f"{'a' if found else 'no'} variable {variable}")

    return measure


def width(known: Known, variable: str, dimension: int = 0) -> int | None:
    found = known.source.first(variable)
    return None if found is None or len(found.shape) <= dimension else found.shape[dimension]


def trigram(known: Known) -> Value | None:
    turned, word = width(known, f"{TURNED}/kernel"), width(known, WORDS, 1)
    if turned is None:
        return Value(False, f"no variable {TURNED}/kernel")
    if word is None or turned not in (word, 3 * word):
        return None
    return Value(turned == 3 * word, f"rows of {TURNED}/kernel")


def of_bottleneck(known: Known) -> Value | None:
    """Value's input is the block's with use_bottleneck_attention, and else the model's; only where these are
    equally wide, shapes do not tell."""
    if not there(f"{FIRST}bottleneck/input/dense/kernel")(known).value:
        return Value(False, "no bottleneck")
    if there(f"{FIRST}bottleneck/attention/dense/kernel")(known).value:
        return Value(False, "query and key have a bottleneck of their own")
    value, whole, inner = (
        width(known, f"{FIRST}{name}/kernel", k)
        for name, k in (
            ("attention/self/value", 0),
            ("bottleneck/input/dense", 0),
            ("bottleneck/input/dense", 1),
        )
    )
    if value is None or whole == inner or value not in (whole, inner):
        return None
    return Value(value == inner, f"rows of {FIRST}attention/self/value/kernel")


_FFN = re.compile(r"bert/encoder/layer_\d+/ffn_layer_(\d{1,6})/.*", re.ASCII)


def stacked(known: Known) -> Value:
    numbers = {m[1] for n in known.source.tensors if (m := _FFN.fullmatch(n))}  # however large they are
    return Value(len(numbers) + 1, "ffn_layer_N in the names, and one more")


# (layers, width, width of a word, of the block, feed-forward, feed-forwards) -> name, activation: config/ of
# the code. All have 4 heads.
PUBLISHED = {
    (24, 512, 128, 128, 512, 4): ("uncased_L-24_H-128_B-512_A-4_F-4_OPT", "relu"),
    (24, 512, 128, 128, 512, 2): ("uncased_L-24_H-128_B-512_A-4_F-2_tiny_OPT", "relu"),
    (24, 512, 128, 1024, 4096, 1): ("uncased_L-24_H-1024_B-512_A-4", "gelu"),
}


def published(known: Known) -> tuple[str, str] | None:
    names = (
        "num_hidden_layers",
        "hidden_size",
        "embedding_size",
        "intra_bottleneck_size",
        "intermediate_size",
    )
    return PUBLISHED.get((*(known[n] for n in names), known["num_feedforward_networks"]))


def published_heads(known: Known) -> Value | None:
    found = published(known)
    return None if found is None else given(4, f"the sizes are those of {found[0]}")


def published_activation(known: Known) -> Value | None:
    found = published(known)
    return (
        None if found is None else given(found[1], f"the sizes are those of {found[0]}, whose activation is")
    )


def inner_size(known: Known) -> Value | None:
    """Of a model without a bottleneck it is nothing's."""
    found = known.source.size(f"{S}bottleneck/input/dense/kernel", 1, shared=False)
    return found or Value(known["hidden_size"], "rule: no bottleneck, so hidden_size")


def kind_of_norm(known: Known) -> Value | None:
    """One that has no statistics has another name; which of the two others it is no variable tells."""
    if f"bert/embeddings/{NORMS['no_norm']}/gamma" in known.source.tensors:
        return Value("no_norm", f"variables called {NORMS['no_norm']}")
    found = published(known)
    return None if found is None else given("layer_norm", f"the sizes are those of {found[0]}")


# --- checks ---------------------------------------------------------------------------------------------


def heads_fit(known: Known, found: Value) -> Value:
    inner = "intra_bottleneck_size" if known["use_bottleneck"] else "hidden_size"
    if known[inner] % found.value:
        message = f"expected {inner} {known[inner]} to divide by {found.value} heads, found a rest"
        known.refuse("config-mismatch", message, "num_attention_heads")
    return found


def is_norm(known: Known, found: Value) -> Value:
    """manual_layer_norm has another epsilon than the norm in the masked LM's head; config.json has one."""
    if found.value not in NORMS:
        message = f"expected {' or '.join(NORMS)}, found {shown(found.value)}"
        known.refuse("unsupported", message, "normalization_type")
        return UNKNOWN
    name = f"bert/embeddings/{NORMS[found.value]}/gamma"
    if not known.back and name not in known.source.tensors:
        message = f"expected {name} for {found.value} ({found.source}), found none"
        known.refuse("config-mismatch", message, "normalization_type")
    return found


def shares(known: Known, found: Value) -> Value:
    """The code makes no bottleneck for query and key where attention has that of its input, or where there is
    none; transformers makes one whenever the flag is on, and would leave it untrained. Without either, query
    and key are made of hidden_size channels, for which transformers has no layer."""
    if known.back:
        return found
    if not known["use_bottleneck"] or known["use_bottleneck_attention"]:
        why = f"{found.source} is true, and the code makes nothing of it here"
        return given(False, why) if found.value else found
    of_files = there(f"{FIRST}bottleneck/attention/dense/kernel")
    agrees("key_query_shared_bottleneck", of_files)(known, found)
    inner, width = known["intra_bottleneck_size"], known["hidden_size"]
    if not found.value and not of_files(known).value and inner != width:
        message = (
            "expected query and key to be made of a bottleneck's output, for which transformers has layers, "
            f"found hidden_size {width} channels beside a bottleneck of {inner}, as the teacher has them"
        )
        known.refuse("unsupported", message, "key_query_shared_bottleneck")
    return found


def pools(known: Known, found: Value) -> Value:
    """A class without a pooler tells nothing of it."""
    if known.back or known.value("architectures") is UNKNOWN or not has_pooler(known):
        return found
    return agrees("classifier_activation", there(POOLER))(known, found)


def wide_enough(known: Known, found: Value) -> Value:
    if found.value > known["hidden_size"]:
        message = f"expected at most hidden_size {known['hidden_size']}, found {found.value} ({found.source})"
        known.refuse("config-mismatch", message, "embedding_size")
    return found


_RANGES = re.compile(r".*FakeQuantWithMinMaxVars(_\d+)?/.*", re.ASCII)


def quantised(known: Known) -> Value:
    found = next((n for n in known.source.checkpoint.names() if _RANGES.fullmatch(n)), None)
    return Value(
        found is not None, f"variables such as {found}" if found else "no ranges of fake quantisation"
    )


def not_quantised(known: Known, found: Value) -> Value:
    """Training with fake quantisation rounds weights and activations to 8 bits within ranges that it keeps,
    and clips scores; a model of transformers does not."""
    if not known.back and found.value:
        message = f"expected a model that computes in floating point, found {quantised(known).source}"
        hint = (
            "--set use_quantized_training=false leaves the ranges out: the weights are kept as they are, and "
            "nothing is rounded to 8 bits any more"
        )
        known.refuse("unsupported", message, "use_quantized_training", hint)
    return found


def check(known: Known) -> None:
    said = known.value("architectures")
    if known.back and said.value[0] in OTHERS:
        message = f"expected a class whose head Google's code has, found {said.value[0]}"
        known.refuse("unsupported", message, "architectures")


def notes(known: Known) -> list[str]:
    made = []
    if known["normalization_type"] == "no_norm" and known["torch_dtype"] == "float16":
        made.append(
            "without norms activations grow: those of the published model reach 2.5e7, and float16 ends "
            "at 65504; run it in float32 or bfloat16"
        )
    if CLASSIFIER in heads(known):
        made.append("output_weights are read as run_classifier.py has them, on the pooled first token")
    if not turns(known):
        made.append(
            "transformers makes an embedding_transformation all the same, which it does not use: it says "
            "that the file lacks it"
        )
    if MASKED in heads(known) and known["hidden_size"] == known["embedding_size"]:
        made.append("cls.predictions.dense.weight has no elements, and is not written")
    return made


# --- the family -----------------------------------------------------------------------------------------

CLASS = Class(
    "MobileBertConfig",
    {
        "vocab_size": 30522,
        "hidden_size": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "hidden_act": "relu",
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "embedding_size": 128,
        "trigram_input": True,
        "use_bottleneck": True,
        "intra_bottleneck_size": 128,
        "true_hidden_size": None,  # what the layers are wide between the bottlenecks; transformers 5 reads it
        "use_bottleneck_attention": False,
        "key_query_shared_bottleneck": True,
        "num_feedforward_networks": 4,
        "normalization_type": "no_norm",
        "classifier_activation": True,
        "tie_word_embeddings": True,
    },
    {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 512},
    idle_numbers={
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
    },
    causal=False,
    prefix="mobilebert.",
    words="embeddings.word_embeddings.weight",
    positions="embeddings.position_embeddings.weight",
    key_bias=".attention.self.key.bias",
    tied={"cls.predictions.decoder.weight": "", "cls.predictions.decoder.bias": "cls.predictions.bias"},
    dropouts={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.1},
    heads=ENCODER_HEADS,
    tokenizer="MobileBertTokenizer",
)


def as_wide(known: Known) -> int:
    return int(known["hidden_size"])


FIELDS = (
    follows("architectures", architecture),
    count(
        "num_hidden_layers",
        "num_hidden_layers",
        rule=silence(12, lambda known: known.source.counted_layers),
        silent=DEFAULT,
    ),
    size("hidden_size", 768, "bert/embeddings/position_embeddings", 1),
    size("embedding_size", as_wide, WORDS, 1, check=wide_enough),
    size("vocab_size", lambda k: width(k, WORDS), WORDS, 0),
    size("max_position_embeddings", 512, "bert/embeddings/position_embeddings", 0),
    size("type_vocab_size", 16, "bert/embeddings/token_type_embeddings", 0),
    size("intermediate_size", 3072, f"{S}intermediate/dense/kernel", 1),
    count(
        "intra_bottleneck_size", "intra_bottleneck_size", rule=silence(as_wide, inner_size), silent=DEFAULT
    ),
    shape_flag("use_bottleneck", False, there(f"{FIRST}bottleneck/input/dense/kernel")),
    shape_flag("use_bottleneck_attention", False, of_bottleneck),
    flag(
        "key_query_shared_bottleneck",
        "key_query_shared_bottleneck",
        rule=silence(False, there(f"{FIRST}bottleneck/attention/dense/kernel")),
        check=shares,
    ),
    shape_count("num_feedforward_networks", 1, stacked),
    shape_flag("trigram_input", False, trigram),
    flag("classifier_activation", "classifier_activation", rule=silence(True, there(POOLER)), check=pools),
    count(
        "num_attention_heads",
        "num_attention_heads",
        rule=silence(12, published_heads),
        silent=DEFAULT,
        ask="the number of attention heads",
        check=heads_fit,
    ),
    anything(
        "normalization_type",
        "normalization_type",
        rule=silence("layer_norm", kind_of_norm),
        silent=DEFAULT,
        ask="layer_norm, if the norms are called LayerNorm for that",
        check=is_norm,
    ),
    activation("gelu", published_activation),
    flag(
        "use_quantized_training",
        rule=quantised,
        silent=given(False, "transformers has none"),
        check=not_quantised,
        hidden=True,
        told=False,
    ),
    only("layer_norm_eps", 1e-12, "that of tf.contrib.layers.layer_norm"),
    only("tie_word_embeddings", True, "the output layer begins with the embedding"),
    special("pad_token_id", given(0, "BERT's vocabularies")),
    share("hidden_dropout_prob", 0.1, unsaid=0.0),
    share("attention_probs_dropout_prob", 0.1, unsaid=0.1),
    share("initializer_range", 0.02, unsaid=0.02),
    DTYPE,
)
EPS = "mobilebert-norm-epsilon"
INNER_EPS = "eps of torch.nn.LayerNorm"  # no key of config.json: what the reading of it calls that number


def norm_epsilon(known: Known) -> tuple[Foretold, ...]:
    """Two of the norms are made without config.json's epsilon in transformers (modeling_mobilebert.py,
    MobileBertEmbeddings and MobileBertOutput)."""
    if known["normalization_type"] != "layer_norm":
        return ()
    eps = known["layer_norm_eps"]
    reason = (
        f"every norm of the original has epsilon {eps}; transformers gives that of the embeddings and "
        "output.LayerNorm of each layer PyTorch's 1e-5, whatever config.json says"
    )
    where = ("embed", *range(known["num_hidden_layers"]))
    return (Foretold(EPS, reason, {INNER_EPS: eps}, where),)


# The keys of the code's own config files, in their order, then the others.
KEYS = (
    "attention_probs_dropout_prob",
    "hidden_act",
    "hidden_dropout_prob",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "type_vocab_size",
    "vocab_size",
    "embedding_size",
    "trigram_input",
    "use_bottleneck",
    "intra_bottleneck_size",
    "use_bottleneck_attention",
    "key_query_shared_bottleneck",
    "num_feedforward_networks",
    "normalization_type",
    "classifier_activation",
)

FAMILY = tensorflow.family(
    name="mobilebert",
    title="MobileBERT",
    summary="MobileBERT, pre-trained or fine-tuned: TensorFlow bundles",
    architectures=(*CLASSES.values(), *OTHERS),
    classes={"mobilebert": CLASS},
    fields=FIELDS,
    rows=rows,
    axes=axes,
    indices=lambda known: {"j": known["num_feedforward_networks"] - 1},
    needed=(WORDS, f"{FIRST}attention/self/query/kernel"),
    told_by=(
        f"{FIRST}bottleneck/input/dense/kernel",
        f"{FIRST}ffn_layer_0/output/dense/kernel",
        f"{TURNED}/kernel",
        "bert/embeddings/FakeLayerNorm/gamma",
    ),
    why_not="variables of BERT without those that MobileBERT has besides (bottleneck, ffn_layer_0)",
    layer=(r"bert/encoder/layer_(\d+)/", r"mobilebert\.encoder\.layer\.(\d+)\."),
    documents=("bert_config.json", "mobilebert_config.json"),
    entries={key: key for key in KEYS},
    stem="mobilebert_variables.ckpt",
    ignored={
        r"teacher/.*": "the teacher that it was distilled from",
        r"hidden_distill_\d+/.*": "norms of the distillation's loss",
        _RANGES.pattern: "ranges of fake quantisation",
    },
    bare=("MobileBertModel",),
    outside=("cls.", "qa_outputs.", "classifier."),
    config=named_labels,
    kept=lambda known: {"spans": spans(known)} if SPANS in heads(known) else {},
    check=check,
    dropped=unpooled,
    unread=unread,
    notes=notes,
    foretold={EPS: norm_epsilon},
    vocabulary=Vocabulary("wordpiece", ("BertTokenizer", "MobileBertTokenizer")),
)
