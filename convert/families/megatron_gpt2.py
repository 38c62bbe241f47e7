"""Megatron GPT-2: the NGC zip (345M) and folders of ranks that Megatron-LM writes.

Source: NVIDIA/Megatron-LM v1.0 to core_v0.9.0 (model/gpt2_model.py, gpt_model.py; core/models/gpt).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.dialects import megatron
from ckpt_tool.convert.dialects import megatron_back as back
from ckpt_tool.convert.dialects import megatron_names as names
from ckpt_tool.convert.dialects.converted import GPT2_NAMES, generation_config, kept_facts, read_config
from ckpt_tool.convert.dialects.megatron_words import padding_notes
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.plan import Options, Plan, Value
from ckpt_tool.convert.source import dtype_value
from ckpt_tool.convert.vocabularies import Vocabulary

ARCHITECTURE = "GPT2LMHeadModel"
S, T = "layers.{i}.", "transformer.h.{i}."


def layer(order: str) -> tuple[Rule, ...]:
    """`order` is that of the rows of query_key_value, see `fused_order`. Conv1D keeps weights (in, out)."""
    return (
        rule(S + "input_layernorm.weight", T + "ln_1.weight", "d"),
        rule(S + "input_layernorm.bias", T + "ln_1.bias", "d"),
        rule(
            S + "attention.query_key_value.weight",
            T + "attn.c_attn.weight",
            f"({order}) d -> d (t n h)",
            split="n",
        ),
        rule(
            S + "attention.query_key_value.bias", T + "attn.c_attn.bias", f"({order}) -> (t n h)", split="n"
        ),
        rule(S + "attention.dense.weight", T + "attn.c_proj.weight", "d (n h) -> (n h) d", split="n"),
        rule(S + "attention.dense.bias", T + "attn.c_proj.bias", "d"),
        rule(S + "post_attention_layernorm.weight", T + "ln_2.weight", "d"),
        rule(S + "post_attention_layernorm.bias", T + "ln_2.bias", "d"),
        rule(S + "mlp.dense_h_to_4h.weight", T + "mlp.c_fc.weight", "f d -> d f", split="f"),
        rule(S + "mlp.dense_h_to_4h.bias", T + "mlp.c_fc.bias", "f", split="f"),
        rule(S + "mlp.dense_4h_to_h.weight", T + "mlp.c_proj.weight", "d f -> f d", split="f"),
        rule(S + "mlp.dense_4h_to_h.bias", T + "mlp.c_proj.bias", "d"),
    )


WORDS = "transformer.wte.weight"
EMBEDDINGS = (
    rule("word_embeddings.weight", WORDS, "v d", split="v"),
    rule("position_embeddings.weight", "transformer.wpe.weight", "p d"),
)
NORM = (
    rule("final_layernorm.weight", "transformer.ln_f.weight", "d"),
    rule("final_layernorm.bias", "transformer.ln_f.bias", "d"),
)
IGNORED_HF = {
    r"transformer\.h\.\d+\.attn\.(masked_)?bias": "the causal mask",
    r"lm_head\.weight": "the same as the embedding",
}


def table(order: str, *, head: str | None = None, tied: bool = True) -> tuple[Rule, ...]:
    """All rows. `head` is the name of the output layer: where it is `tied`, the embedding's copy on the last
    pipeline stage, which is compared."""
    last: tuple[Rule, ...] = ()
    if head is not None:
        last = (rule(head, WORDS if tied else "lm_head.weight", "v d", split="v", tied=tied),)
    return (*EMBEDDINGS, *layer(order), *NORM, *last)


FREE = {
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "initializer_range": 0.02,
    "use_cache": True,
}


def recognise(checkpoint: Checkpoint) -> tuple[bool, str]:
    return names.recognise(checkpoint, bert=False)


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    run = names.open_run(checkpoint)
    facts = megatron.read_facts(run, options, GPT2_NAMES)
    tie = megatron.tie(run, facts)
    numbers, tokenizer = megatron.read_numbers(
        run, facts, options, family="megatron-gpt2", gelu_of_version_0="tanh"
    )
    known = numbers.words.source != numbers.rows.source
    end = Value(numbers.words.value - 1, "rule: GPT-2's last word is <|endoftext|>")
    unknown = Value(None, "nothing tells which word ends a text")
    ids = {
        name: facts.token_ids(name, rule=tokenizer.facts.get(name, end if known else unknown))
        for name in ("bos_token_id", "eos_token_id")
    }
    scaling = "rule: what apply_query_key_layer_scaling divides by it multiplies by again"
    numbers_ = {
        **numbers.sizes,
        "hidden_act": megatron.activation(numbers, facts),
        "layer_norm_eps": numbers.eps,
    }
    config = {
        "architectures": facts.fixed("architectures", [ARCHITECTURE], "family megatron-gpt2"),
        "model_type": facts.fixed("model_type", "gpt2", "family megatron-gpt2"),
        **{own: numbers_[name] for own, name in GPT2_NAMES.items()},
        "vocab_size": numbers.words,
        "scale_attn_weights": facts.fixed("scale_attn_weights", True, "the scores of the original"),
        "scale_attn_by_inverse_layer_idx": facts.fixed("scale_attn_by_inverse_layer_idx", False, scaling),
        "reorder_and_upcast_attn": facts.boolean(
            "reorder_and_upcast_attn", rule=softmax_in_float32(run.args or {})
        ),
        "tie_word_embeddings": tie,
        "torch_dtype": dtype_value(run.source, options),
        **ids,
        **{name: facts.like(name, v, "default of GPT2Config") for name, v in FREE.items()},
    }
    facts.check_settings({*config, *GPT2_NAMES.values()})
    facts.check()
    heads = ("word_embeddings_for_head.weight", "output_layer.weight")
    return megatron.to_hf(
        "megatron-gpt2",
        run,
        options,
        rules=table(
            megatron.fused_order(run.version, names.is_core(run.age)),
            head=next((h for h in heads if h in run.tensors), None),
            tied=bool(tie.value),
        ),
        numbers=numbers,
        config=config,
        tokenizer=tokenizer,
        documents=[generation_config(config)],
        notes=padding_notes(numbers.words, numbers.rows, "the embedding"),
    )


def softmax_in_float32(args: Mapping[str, Any]) -> Value:
    """GPT2Attention can compute scores and softmax in float32; the layer scaling of Megatron implies that."""
    for flag in ("attention_softmax_in_fp32", "apply_query_key_layer_scaling"):
        if args.get(flag):
            return Value(True, f"args: {flag}")
    return Value(False, "rule: args do not ask for scores in float32")


def plan_original(checkpoint: Checkpoint, options: Options) -> Plan:
    facts = read_config(checkpoint, megatron.generic(options.settings, GPT2_NAMES), (ARCHITECTURE,))
    kept = kept_facts(checkpoint)
    for name, value in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        facts.fixed(name, value, "all that the original can be", name)
    default = Value(True, "rule: default of GPT2Config")
    tied = bool(facts.boolean("tie_word_embeddings", "tie_word_embeddings", rule=default).value)
    numbers = back.read_numbers(facts, GPT2_NAMES, kept)
    facts.check_settings({*GPT2_NAMES.values(), "vocab_size", "tie_word_embeddings"})
    facts.check()
    form = back.form_of(options, numbers, kept)
    head = "word_embeddings_for_head.weight" if form.stages > 1 else None
    return back.to_original(
        "megatron-gpt2",
        checkpoint,
        options,
        layer=r"transformer\.h\.(\d+)\.",
        rules=table(form.order, head=head if tied else "output_layer.weight", tied=tied),
        ignored=IGNORED_HF,
        numbers=numbers,
        form=form,
        more_args={
            "untie_embeddings_and_output_weights": Value(not tied, "config.json: tie_word_embeddings")
        },
        notes=(),
    )


FAMILY = Family(
    name="megatron-gpt2",
    summary="Megatron GPT-2: NGC zips, .pt files and folders of ranks, of every checkpoint_version",
    architectures=(ARCHITECTURE,),
    recognise=recognise,
    plan=plan,
    plan_original=plan_original,
    options=back.OPTIONS,
    vocabulary=Vocabulary("byte-level", ("GPT2Tokenizer",)),
)
