"""Megatron BERT: the NGC zips (345M cased and uncased) and folders of ranks that Megatron-LM writes.

Source: NVIDIA/Megatron-LM v1.0 to core_v0.9.0 (model/bert_model.py, core/models/bert).
"""

from __future__ import annotations

from ckpt_tool.convert.dialects import megatron
from ckpt_tool.convert.dialects.megatron import both, token_id
from ckpt_tool.convert.dialects.megatron_args import ACTIVATION, activation, gelus
from ckpt_tool.convert.dialects.megatron_ranks import args_of
from ckpt_tool.convert.dialects.megatron_words import Published, Vocabulary, words
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DTYPE,
    ENCODER_HEADS,
    Class,
    Foretold,
    Known,
    Value,
    follows,
    free,
    given,
    only,
)

ARCHITECTURES = ("MegatronBertForPreTraining", "MegatronBertForMaskedLM")
S, T = "layers.{i}.", "bert.encoder.layer.{i}."
QKV = tuple(f"{T}attention.self.{part}." for part in ("query", "key", "value"))
WORDS = "bert.embeddings.word_embeddings.weight"
HEAD = "cls.predictions.transform."
# What Megatron's tasks put on the pooled first token, in place of the heads of pretraining; both are called
# so in transformers. Source: NVIDIA/Megatron-LM 23.06 (model/classification.py, multiple_choice.py).
TUNED = {
    "classification_head.": "MegatronBertForSequenceClassification",
    "multichoice_head.": "MegatronBertForMultipleChoice",
}
CLASSIFIER = "classifier."
MOST_LABELS = 1 << 16  # each is named in config.json, and a tensor of no columns has any number of rows


def has_binary_head(known: Known) -> bool:
    """In the names of either layout."""
    return bool(known.source.tensors.keys() & {"binary_head.weight", "cls.seq_relationship.weight"})


def tuned(known: Known) -> str | None:
    """What Megatron calls the head that a task trained, by the names in its files or the class in
    config.json."""
    if known.back:
        said = (known.facts.document or {}).get("architectures")
        return next((own for own, name in TUNED.items() if said == [name]), None)

    def kept(*names: str) -> bool:
        return any(known.source.keeps(n, known.options) for n in names)

    there = [own for own in TUNED if kept(f"{own}weight", f"{own}bias")]
    if len(there) > 1 or (there and kept("lm_head.dense.weight")):
        message = f"expected the heads of one class, found {there[0][:-1]} beside others"
        known.refuse("unsupported", message, "architectures", "--drop NAME leaves a tensor out")
    return next(iter(there), None)


def labels(known: Known) -> int:
    found = known.source.first(f"{CLASSIFIER if known.back else tuned(known)}weight")
    return found.shape[0] if found is not None and found.shape else 1


def named_labels(known: Known) -> dict[str, Value]:
    """How many classes a classifier tells apart, as transformers writes it down."""
    if tuned(known) != "classification_head.":
        return {}
    source = "rows of classification_head.weight"
    if (count := labels(known)) > MOST_LABELS:
        text = f"expected at most {MOST_LABELS} classes, found {count}"
        known.refuse("unsupported", text, source.removeprefix("rows of "))
        return {}
    names = [f"LABEL_{k}" for k in range(count)]
    return {
        "id2label": Value({str(k): n for k, n in enumerate(names)}, source),
        "label2id": Value({n: k for k, n in enumerate(names)}, source),
    }


def head_rows(known: Known) -> tuple[Rule, ...]:
    pooler = tuple(both("pooler.dense.", "bert.pooler.dense.", "e d", "e"))
    if (own := tuned(known)) is not None:
        return (*pooler, *both(own, CLASSIFIER, "l d", "l"))
    binary = (*pooler, *both("binary_head.", "cls.seq_relationship.", "two e", "two"))
    return (
        rule("lm_head.bias", "cls.predictions.bias", "v", split="v"),
        *both("lm_head.dense.", f"{HEAD}dense.", "e d", "e"),
        *both("lm_head.layernorm.", f"{HEAD}LayerNorm.", "e", "e"),
        *(binary if has_binary_head(known) else ()),
    )


def rows(known: Known, order: str) -> tuple[Rule, ...]:
    thirds = ("t", (1, 1, 1))
    fused = (f"({order}) d -> (t n h) d", f"({order}) -> (t n h)")
    return (
        rule("word_embeddings.weight", WORDS, "v d", split="v"),
        rule("position_embeddings.weight", "bert.embeddings.position_embeddings.weight", "p d"),
        rule("tokentype_embeddings.weight", "bert.embeddings.token_type_embeddings.weight", "two d"),
        *both(f"{S}input_layernorm.", f"{T}attention.ln.", "d", "d"),
        *both(f"{S}attention.query_key_value.", QKV, *fused, cut=thirds, split="n"),
        *both(f"{S}attention.dense.", f"{T}attention.output.dense.", "d (n h)", "d", split="n"),
        *both(f"{S}post_attention_layernorm.", f"{T}ln.", "d", "d"),
        *both(f"{S}mlp.dense_h_to_4h.", f"{T}intermediate.dense.", "f d", "f", split="f"),
        *both(f"{S}mlp.dense_4h_to_h.", f"{T}output.dense.", "d f", "d", split="f"),
        *both("final_layernorm.", "bert.encoder.ln.", "d", "d"),
        *head_rows(known),
    )


# Their files may hold no args.
PUBLISHED = {
    (24, 1024, 4096, 512, 30592): Published("BERT 345M v0.1 uncased", 16, 30522),
    (24, 1024, 4096, 512, 29056): Published("BERT 345M v0.1 cased", 16, 28996),
}
CLASS = Class(
    "MegatronBertConfig",
    {
        "vocab_size": 29056,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 512},
    causal=False,
    prefix="bert.",
    words="embeddings.word_embeddings.weight",
    positions="embeddings.position_embeddings.weight",
    key_bias=".attention.self.key.bias",
    tied={"cls.predictions.decoder.weight": "", "cls.predictions.decoder.bias": "cls.predictions.bias"},
    dropouts={"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    heads={**ENCODER_HEADS, "ForCausalLM": (), "ForNextSentencePrediction": ()},
    tokenizer="BertTokenizer",
)


def token_types(known: Known, found: Value) -> Value:
    """Runs without a binary head have no table of token types, which MegatronBert adds: of zeros it changes
    nothing."""
    if known.back or known.source.first("tokentype_embeddings.weight") is not None:
        return found
    hint = (
        "a run with --bert-no-binary-head has none, and MegatronBert adds one: save one of zeros in the first"
        " stage, which changes no number (model.language_model.embedding.tokentype_embeddings.weight, 2 x the"
        " width, of the dtype of the others)"
    )
    known.refuse("missing-tensor", "expected this tensor, found none", "tokentype_embeddings.weight", hint)
    return found


def architectures(known: Known) -> Value:
    there, own = has_binary_head(known), tuned(known)
    if own is not None:
        return Value([TUNED[own]], f"{own}weight in the file")
    return Value([ARCHITECTURES[not there]], f"{'a' if there else 'no'} binary_head in the file")


FIELDS = (
    follows("architectures", architectures),
    only("position_embedding_type", "absolute", "a table of positions"),
    megatron.LAYERS,
    megatron.WIDTH,
    megatron.INNER,
    megatron.POSITIONS,
    megatron.heads(PUBLISHED),
    words(PUBLISHED),
    only("type_vocab_size", 2, "rows of tokentype_embeddings", check=token_types),
    activation("erf", "which the file does not tell"),
    megatron.EPSILON,
    token_id("pad_token_id", lambda _: given(0, "BERT's vocabularies")),
    megatron.ALWAYS_TIED,
    DTYPE,
    *free(
        "default of MegatronBertConfig",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        initializer_range=0.02,
        use_cache=True,
    ),
    only("is_decoder", False, "an encoder", hidden=True),
)
TWO_GELUS = "megatron-bert-two-gelus"


def two_gelus(known: Known) -> tuple[Foretold, ...]:
    """MegatronBert has one hidden_act; the feed-forward, which is in every layer, decides it."""
    gelu, head = gelus(known)
    if gelu.value == head.value or tuned(known) is not None:
        return ()
    reason = (
        f"the feed-forward's gelu is the {gelu.value} form ({gelu.source}), the LM head's the "
        f"{head.value} form ({head.source}); hidden_act is one value for both, so the LM head's differs, by "
        "at most 4.8e-4 as it leaves the gelu"
    )
    return (Foretold(TWO_GELUS, reason, {"hidden_act": ACTIVATION[head.value]}, ("head",)),)


def notes(known: Known) -> list[str]:
    if not args_of(known).get("attention_softmax_in_fp32"):
        return []
    return [
        "args: attention_softmax_in_fp32, which MegatronBert does not have: the same in float32, another "
        "rounding in float16"
    ]


FAMILY = megatron.family(
    name="megatron-bert",
    summary="Megatron BERT: NGC zips, .pt files and folders of ranks, of every checkpoint_version",
    architectures=ARCHITECTURES,
    classes={"megatron-bert": CLASS},
    fields=FIELDS,
    vocabulary=Vocabulary("wordpiece", ("BertTokenizer",)),
    rows=rows,
    heads=True,
    tuned=tuple(TUNED.values()),
    axes={"l": labels},
    config=named_labels,
    layer=r"bert\.encoder\.layer\.(\d+)\.",
    words=WORDS,
    padded=lambda known: "the embedding" if tuned(known) else "the embedding and the LM head's bias",
    ignored={r"(bert\.)?embeddings\.position_ids": "0, 1, 2, ..."},
    args=lambda known: {"bert_binary_head": Value(has_binary_head(known), "tensors of the model")},
    notes=notes,
    foretold={TWO_GELUS: two_gelus},
)
