"""Megatron BERT: the NGC zips (345M cased and uncased) and folders of ranks that Megatron-LM writes.

Source: NVIDIA/Megatron-LM v1.0 to core_v0.9.0 (model/bert_model.py, core/models/bert).
"""

from __future__ import annotations

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.dialects import megatron
from ckpt_tool.convert.dialects import megatron_back as back
from ckpt_tool.convert.dialects import megatron_names as names
from ckpt_tool.convert.dialects.converted import kept_facts, read_config
from ckpt_tool.convert.dialects.megatron_words import padding_notes
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.plan import Options, Plan, Value
from ckpt_tool.convert.source import dtype_value
from ckpt_tool.convert.vocabularies import Vocabulary

ARCHITECTURE = "MegatronBertForPreTraining"
WITHOUT_BINARY_HEAD = "MegatronBertForMaskedLM"
S, T = "layers.{i}.", "bert.encoder.layer.{i}."
QKV = tuple(T + f"attention.self.{part}." for part in ("query", "key", "value"))


def layer(order: str) -> tuple[Rule, ...]:
    """`order` is that of the rows of query_key_value, see `fused_order`."""
    thirds = ("t", (1, 1, 1))
    fused, apart = f"({order})", "(t n h)"
    return (
        rule(S + "input_layernorm.weight", T + "attention.ln.weight", "d"),
        rule(S + "input_layernorm.bias", T + "attention.ln.bias", "d"),
        rule(
            S + "attention.query_key_value.weight",
            tuple(part + "weight" for part in QKV),
            f"{fused} d -> {apart} d",
            cut=thirds,
            split="n",
        ),
        rule(
            S + "attention.query_key_value.bias",
            tuple(part + "bias" for part in QKV),
            f"{fused} -> {apart}",
            cut=thirds,
            split="n",
        ),
        rule(S + "attention.dense.weight", T + "attention.output.dense.weight", "d (n h)", split="n"),
        rule(S + "attention.dense.bias", T + "attention.output.dense.bias", "d"),
        rule(S + "post_attention_layernorm.weight", T + "ln.weight", "d"),
        rule(S + "post_attention_layernorm.bias", T + "ln.bias", "d"),
        rule(S + "mlp.dense_h_to_4h.weight", T + "intermediate.dense.weight", "f d", split="f"),
        rule(S + "mlp.dense_h_to_4h.bias", T + "intermediate.dense.bias", "f", split="f"),
        rule(S + "mlp.dense_4h_to_h.weight", T + "output.dense.weight", "d f", split="f"),
        rule(S + "mlp.dense_4h_to_h.bias", T + "output.dense.bias", "d"),
    )


WORDS = "bert.embeddings.word_embeddings.weight"
EMBEDDINGS = (
    rule("word_embeddings.weight", WORDS, "v d", split="v"),
    rule("position_embeddings.weight", "bert.embeddings.position_embeddings.weight", "p d"),
    rule("tokentype_embeddings.weight", "bert.embeddings.token_type_embeddings.weight", "two d"),
)
NORM = (
    rule("final_layernorm.weight", "bert.encoder.ln.weight", "d"),
    rule("final_layernorm.bias", "bert.encoder.ln.bias", "d"),
)
LM_HEAD = (
    rule("lm_head.bias", "cls.predictions.bias", "v", split="v"),
    rule("lm_head.dense.weight", "cls.predictions.transform.dense.weight", "e d"),
    rule("lm_head.dense.bias", "cls.predictions.transform.dense.bias", "e"),
    rule("lm_head.layernorm.weight", "cls.predictions.transform.LayerNorm.weight", "e"),
    rule("lm_head.layernorm.bias", "cls.predictions.transform.LayerNorm.bias", "e"),
)
BINARY_HEAD = (
    rule("pooler.dense.weight", "bert.pooler.dense.weight", "e d"),
    rule("pooler.dense.bias", "bert.pooler.dense.bias", "e"),
    rule("binary_head.weight", "cls.seq_relationship.weight", "two e"),
    rule("binary_head.bias", "cls.seq_relationship.bias", "two"),
)
IGNORED_HF = {
    r"(bert\.)?embeddings\.position_ids": "0, 1, 2, ...",
    r"cls\.predictions\.decoder\.(weight|bias)": "the same as the embedding and cls.predictions.bias",
}


def table(order: str, *, copy: str | None = None, binary: bool = True) -> tuple[Rule, ...]:
    """All rows. `copy` is the name of the embedding's copy on the last pipeline stage, which is compared."""
    tied = () if copy is None else (rule(copy, WORDS, "v d", split="v", tied=True),)
    return (*EMBEDDINGS, *layer(order), *NORM, *LM_HEAD, *(BINARY_HEAD if binary else ()), *tied)


FREE = {
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "use_cache": True,
}


def recognise(checkpoint: Checkpoint) -> tuple[bool, str]:
    return names.recognise(checkpoint, bert=True)


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    run = names.open_run(checkpoint)
    facts = megatron.read_facts(run, options)
    tie = megatron.tie(run, facts)
    if not tie.value:
        facts.refuse("unsupported", "expected the embedding as output layer, found another", "output_layer")
    numbers, tokenizer = megatron.read_numbers(
        run, facts, options, family="megatron-bert", gelu_of_version_0="erf"
    )
    binary = "binary_head.weight" in run.tensors
    heads = Value(
        [ARCHITECTURE if binary else WITHOUT_BINARY_HEAD],
        f"{'a' if binary else 'no'} binary_head in the file",
    )
    config = {
        "architectures": heads,
        "model_type": facts.fixed("model_type", "megatron-bert", "family megatron-bert"),
        "position_embedding_type": facts.fixed("position_embedding_type", "absolute", "a table of positions"),
        **numbers.sizes,
        "vocab_size": numbers.words,
        "type_vocab_size": facts.fixed("type_vocab_size", 2, "rows of tokentype_embeddings"),
        "hidden_act": megatron.activation(numbers, facts),
        "layer_norm_eps": numbers.eps,
        "pad_token_id": facts.token_ids(
            "pad_token_id", rule=tokenizer.facts.get("pad_token_id", Value(0, "rule: BERT's vocabularies"))
        ),
        "tie_word_embeddings": facts.fixed("tie_word_embeddings", True, tie.source),
        "torch_dtype": dtype_value(run.source, options),
        **{name: facts.like(name, v, "default of MegatronBertConfig") for name, v in FREE.items()},
    }
    facts.check_settings(config)
    facts.check()
    notes = padding_notes(numbers.words, numbers.rows, "the embedding and the LM head's bias")
    if (run.args or {}).get("attention_softmax_in_fp32"):
        notes.append(
            "args: attention_softmax_in_fp32, which MegatronBert does not have: the same in float32, another "
            "rounding in float16"
        )
    copies = ("word_embeddings_for_head.weight", "output_layer.weight")
    return megatron.to_hf(
        "megatron-bert",
        run,
        options,
        rules=table(
            megatron.fused_order(run.version, names.is_core(run.age)),
            copy=next((c for c in copies if c in run.tensors), None),
            binary=binary,
        ),
        numbers=numbers,
        config=config,
        tokenizer=tokenizer,
        documents=(),
        notes=notes,
        foretold=megatron.two_gelus(numbers.gelu, numbers.head_gelu),
    )


def plan_original(checkpoint: Checkpoint, options: Options) -> Plan:
    architectures = (ARCHITECTURE, WITHOUT_BINARY_HEAD)
    facts = read_config(checkpoint, options.settings, architectures)
    kept = kept_facts(checkpoint)
    for name, value in (
        ("position_embedding_type", "absolute"),
        ("type_vocab_size", 2),
        ("tie_word_embeddings", True),
        ("is_decoder", False),
    ):
        facts.fixed(name, value, "all that the original can be", name)
    numbers = back.read_numbers(facts, {}, kept)
    facts.check_settings({*numbers.sizes, "vocab_size", "layer_norm_eps", "hidden_act"})
    facts.check()
    form = back.form_of(options, numbers, kept)
    stages = "word_embeddings_for_head.weight" if form.stages > 1 else None
    binary = bool(checkpoint.find("cls.seq_relationship.weight"))
    return back.to_original(
        "megatron-bert",
        checkpoint,
        options,
        layer=r"bert\.encoder\.layer\.(\d+)\.",
        rules=table(form.order, copy=stages, binary=binary),
        ignored=IGNORED_HF,
        numbers=numbers,
        form=form,
        more_args={"bert_binary_head": Value(binary, "tensors of the model")},
        notes=(),
        foretold=megatron.two_gelus(numbers.gelu, numbers.head_gelu),
    )


FAMILY = Family(
    name="megatron-bert",
    summary="Megatron BERT: NGC zips, .pt files and folders of ranks, of every checkpoint_version",
    architectures=(ARCHITECTURE, WITHOUT_BINARY_HEAD),
    recognise=recognise,
    plan=plan,
    plan_original=plan_original,
    foretold=(megatron.TWO_GELUS,),
    options=back.OPTIONS,
    vocabulary=Vocabulary("wordpiece", ("BertTokenizer",)),
)
