"""mLUKE: XLM-RoBERTa that reads entities beside words, trained by studio-ousia.

Source: studio-ousia/luke @25165454 (luke/model.py); transformers 4.37.2 and 5.23.0 (models/luke); config.json
of studio-ousia/mluke-base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ckpt_tool.convert.dialects import studio_ousia
from ckpt_tool.convert.dialects.studio_ousia import Form
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DEFAULT,
    DTYPE,
    ENCODER_HEADS,
    Class,
    Field,
    Known,
    Size,
    Sized,
    Value,
    anything,
    by_name,
    count,
    counted,
    flag,
    free,
    given,
    measured,
    number,
    one_of,
    only,
    splits,
    token_ids,
)

LAYER = "encoder.layer.{i}."
AWARE = ("w2e_query", "e2w_query", "e2e_query")
WORDS, ENTITIES = "embeddings.word_embeddings.weight", "entity_embeddings.entity_embeddings.weight"

# v words, u entities, p positions, t token types, d and e width, m width of an entity, f feed-forward width
AXES: dict[str, Size] = {
    "v": Sized("vocab_size", -2),
    "u": Sized("entity_vocab_size", -1),
    "p": "max_position_embeddings",
    "t": "type_vocab_size",
    "d": "hidden_size",
    "e": "hidden_size",
    "m": "entity_emb_size",
    "f": "intermediate_size",
}


def both(stem: str, weight: str, to: str = "luke.") -> Iterator[Rule]:
    """The rows of a weight and its bias."""
    for kind, pattern in (("weight", weight), ("bias", weight.split()[0])):
        yield rule(f"{stem}.{kind}", f"{to}{stem}.{kind}", pattern)


def rows(form: Form) -> list[Rule]:
    def tied(decoder: str, table: str, pattern: str) -> list[Rule]:
        return [rule(decoder, table, pattern, tied=True)] if decoder in form.decoders else []

    made = [rule(WORDS, f"luke.{WORDS}", "v d"), rule(ENTITIES, f"luke.{ENTITIES}", "u m")]
    if form.projected:
        dense = "entity_embeddings.entity_embedding_dense.weight"
        made.append(rule(dense, f"luke.{dense}", "d m"))
    for stem in ("embeddings", "entity_embeddings"):
        for name, pattern in (("position", "p d"), ("token_type", "t d")):
            table = f"{stem}.{name}_embeddings.weight"
            made.append(rule(table, f"luke.{table}", pattern))
        made += both(f"{stem}.LayerNorm", "d")
    made += layer(form)
    made += both("pooler.dense", "d e")
    made += [*both("lm_head.dense", "d e", ""), *both("lm_head.layer_norm", "d", "")]
    made.append(rule("lm_head.bias", "lm_head.bias", "v"))
    made += both("entity_predictions.transform.dense", "m d", "")
    made += both("entity_predictions.transform.LayerNorm", "m", "")
    made.append(rule("entity_predictions.bias", "entity_predictions.bias", "u"))
    if form.head:  # transformers 5 does not tie it and would leave it at random
        made.append(rule(WORDS, "lm_head.decoder.weight", "v d", copied=True))
    made += tied("lm_head.decoder.weight", f"luke.{WORDS}", "v d")
    made += tied("lm_head.decoder.bias", "lm_head.bias", "v")
    return made + tied("entity_predictions.decoder.weight", f"luke.{ENTITIES}", "u m")


def layer(form: Form) -> Iterator[Rule]:
    attention = f"{LAYER}attention.self."
    for name in ("query", "key", "value", *(AWARE if form.aware else ())):
        yield from both(f"{attention}{name}", "d e")
    for name in AWARE if form.copied else ():
        for one in both(f"{attention}query", "d e"):
            (target,) = one.target
            yield replace(one, target=(target.replace(".query.", f".{name}."),), copied=True)
    yield from both(f"{LAYER}attention.output.dense", "d e")
    yield from both(f"{LAYER}attention.output.LayerNorm", "d")
    yield from both(f"{LAYER}intermediate.dense", "f d")
    yield from both(f"{LAYER}output.dense", "d f")
    yield from both(f"{LAYER}output.LayerNorm", "d")


# --- numbers --------------------------------------------------------------------------------------------


def longer(name: str, table: str, by: int, what: str) -> Field:
    """A size that config.json has with the copied rows, and the original without them."""

    def check(known: Known, found: Value) -> Value:
        if known.back or found.source == "--set":
            return found
        return Value(found.value + by, f"{found.source}, and {what}")

    return count(name, name, rule=measured(table, 0), check=check)


def aware(known: Known) -> Value:
    """Copies of the only queries give the same numbers, and are read where the config says so alone."""
    if known.source.first("encoder.layer.0.attention.self.w2e_query.weight") is not None:
        return Value(True, "queries of entity-aware attention in the file")
    copied = not studio_ousia.drops_queries(known.options)
    return Value(copied, f"{'copies' if copied else 'no queries'} for entity-aware attention")


def is_aware(known: Known, found: Value) -> Value:
    """What an original has queries for, whatever its configuration says."""
    return found if known.back else aware(known)


ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
CLASS = Class(
    "LukeConfig",
    {
        "vocab_size": 50267,
        "entity_vocab_size": 500000,
        "hidden_size": 768,
        "entity_emb_size": 256,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "use_entity_aware_attention": True,
        "tie_word_embeddings": True,
    },
    {**IDS, "max_position_embeddings": 512},
    tokenizer="LukeTokenizer",
    idle={
        "bert_model_name": "where training began",
        "cls_entity_prediction": "of a head that is left out",
        "deepspeed_transformer_layer_args": "says how to run, not what",
        "use_deepspeed_transformer_layer": "says how to run, not what",
        "position_embedding_type": "not read: always absolute",
        "is_decoder": "not read: always an encoder",
    },
    causal=False,
    null_too=("use_cache",),
    prefix="luke.",
    words=WORDS,
    positions="embeddings.position_embeddings.weight",
    key_bias=".attention.self.key.bias",
    tied={
        "lm_head.decoder.weight": "",
        "lm_head.decoder.bias": "lm_head.bias",
        "entity_predictions.decoder.weight": f"luke.{ENTITIES}",
    },
    dropouts={"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    heads={
        **ENCODER_HEADS,
        "ForEntityClassification": ("classifier",),
        "ForEntityPairClassification": ("classifier",),
        "ForEntitySpanClassification": ("classifier",),
    },
)

FAMILY = studio_ousia.family(
    name="mluke",
    title="mLUKE",
    summary="mLUKE: pytorch_model.bin, metadata.json and entity_vocab.jsonl of studio-ousia",
    architecture="LukeForMaskedLM",
    config={"luke": CLASS},
    rows=rows,
    axes=AXES,
    copies=("v", "u"),
    told_by=ENTITIES,
    layer=r"encoder\.layer\.(\d+)\.",
    fields=by_name(
        only("architectures", ["LukeForMaskedLM"], "family mluke", told=False),
        only("model_type", "luke", "family mluke", told=False),
        count("num_hidden_layers", "num_hidden_layers", rule=counted),
        count("hidden_size", "hidden_size", rule=measured(WORDS, 1)),
        count(
            "intermediate_size", "intermediate_size", rule=measured(f"{LAYER}intermediate.dense.weight", 0)
        ),
        count(
            "num_attention_heads",
            "num_attention_heads",
            ask="the number of attention heads",
            check=splits("hidden_size", "num_attention_heads"),
        ),
        count("entity_emb_size", "entity_emb_size", rule=measured(ENTITIES, 1)),
        longer("vocab_size", WORDS, 2, "<ent> and <ent2>"),
        longer("entity_vocab_size", ENTITIES, 1, "[MASK2]"),
        count(
            "max_position_embeddings",
            "max_position_embeddings",
            rule=measured("embeddings.position_embeddings.weight", 0),
        ),
        count(
            "type_vocab_size",
            "type_vocab_size",
            rule=measured("embeddings.token_type_embeddings.weight", 0),
        ),
        anything(
            "hidden_act",
            "hidden_act",
            silent=DEFAULT,
            ask="the activation of the feed-forward",
            check=one_of("hidden_act", ACTIVATIONS),
        ),
        number("layer_norm_eps", "layer_norm_eps", silent=DEFAULT, ask="the epsilon of the norms"),
        only("position_embedding_type", "absolute", "tables of positions", keys=("position_embedding_type",)),
        flag("use_entity_aware_attention", rule=aware, check=is_aware),
        only(
            "tie_word_embeddings",
            True,
            "the output layers are the tables of words and entities",
            keys=("tie_word_embeddings",),
        ),
        DTYPE,
        *(
            token_ids(name, name, rule=given(id, "XLM-R's vocabulary"), silent=DEFAULT)
            for name, id in IDS.items()
        ),
        free(
            "default of LukeConfig",
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            initializer_range=0.02,
            use_cache=True,
        ),
    ),
)
