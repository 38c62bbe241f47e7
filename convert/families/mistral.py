"""Mistral: 7B v0.1 to v0.3, Nemo, Small, Large, Codestral and their instruct versions, text only.

Original: `consolidated.00.pth` or `consolidated*.safetensors`, params.json, `tokenizer.model*` or
tekken.json, as mistralai/mistral-inference @2557e12d reads them (first release @c18d5b9b, December 2023
@b8181901).
"""

from __future__ import annotations

from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.dialects import consolidated as decoder
from ckpt_tool.convert.dialects.consolidated import (
    equal_names,
    feed_forward,
    foreign,
    open_download,
    params_keys,
)
from ckpt_tool.convert.dialects.converted import kept_facts, read_config
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.options import CONTAINER, POOLING
from ckpt_tool.convert.params import Facts
from ckpt_tool.convert.plan import Options, Plan, Value
from ckpt_tool.convert.source import dtype_value
from ckpt_tool.convert.vocabularies import MISTRAL_AI

ARCHITECTURE = "MistralForCausalLM"
S, T = "layers.{i}.", "model.layers.{i}."

# The published files hold whole tensors. `split` is for copies that were resharded the way Meta's are.
LAYER = (
    rule(S + "attention_norm.weight", T + "input_layernorm.weight", "d"),
    rule(
        S + "attention.wq.weight",
        T + "self_attn.q_proj.weight",
        "(n half two) d -> (n two half) d",
        split="n",
    ),
    rule(
        S + "attention.wk.weight",
        T + "self_attn.k_proj.weight",
        "(k half two) d -> (k two half) d",
        split="k",
    ),
    rule(S + "attention.wv.weight", T + "self_attn.v_proj.weight", "(k h) d", split="k"),
    rule(S + "attention.wo.weight", T + "self_attn.o_proj.weight", "d (n h)", split="n"),
    rule(S + "ffn_norm.weight", T + "post_attention_layernorm.weight", "d"),
    rule(S + "feed_forward.w1.weight", T + "mlp.gate_proj.weight", "f d", split="f"),
    rule(S + "feed_forward.w3.weight", T + "mlp.up_proj.weight", "f d", split="f"),
    rule(S + "feed_forward.w2.weight", T + "mlp.down_proj.weight", "d f", split="f"),
)
NORM = rule("norm.weight", "model.norm.weight", "d")


def table(*, embedding: str = "v", tied: bool = False) -> tuple[Rule, ...]:
    """All rows; `embedding` is the axis of tok_embeddings that ranks share, if there are several."""
    head = rule(
        "output.weight",
        "model.embed_tokens.weight" if tied else "lm_head.weight",
        "v d",
        split="v",
        tied=tied,
    )
    words = rule("tok_embeddings.weight", "model.embed_tokens.weight", "v d", split=embedding)
    return (words, *LAYER, NORM, head)


RULES = table()
FREE = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
PARAMS = (*decoder.RUN_TIME, "max_position_embeddings")


def recognise(checkpoint: Checkpoint) -> tuple[bool, str]:
    names = checkpoint.names()
    if reason := foreign(names):
        return False, reason
    form = feed_forward(names)
    if form != "dense":
        return False, "has experts" if form else "no layers.0.feed_forward.w1.weight"
    keys = params_keys(checkpoint)
    if told := sorted(keys & {"multiple_of", "ffn_dim_multiplier", "use_scaled_rope"}):
        return False, f"params.json has {', '.join(told)}, as Llama's do"
    if told := sorted(keys & {"hidden_dim", "head_dim", "sliding_window", "_sliding_window"}):
        return True, f"dense layers, and params.json has {', '.join(told)}"
    if equal_names(checkpoint):
        return False, "model-parallel ranks of equal tensor names, as Llama's are"
    return True, "dense layers, and nothing in params.json that only Llama's have"


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    download = open_download(checkpoint)
    facts = decoder.read_params(checkpoint, options)
    if facts.given("moe.num_experts"):
        facts.refuse("unsupported", "expected no experts in family mistral, found some", "moe")
    window = sliding_window(facts)
    theta = rope_theta(facts, window)
    sizes = decoder.dimensions(download, facts)
    config = {
        "architectures": facts.fixed("architectures", [ARCHITECTURE], "family mistral"),
        "model_type": facts.fixed("model_type", "mistral", "family mistral"),
        "hidden_act": facts.fixed("hidden_act", "silu", "the original's feed_forward"),
        **sizes,
        "rope_theta": theta,
        "sliding_window": window,
        "max_position_embeddings": context(facts, sizes),
        "tie_word_embeddings": facts.boolean(
            "tie_word_embeddings", rule=Value(False, "rule: no Mistral model ties its head")
        ),
        "torch_dtype": dtype_value(download, options),
        **{name: facts.like(name, v, "default of MistralConfig") for name, v in FREE.items()},
    }
    numbers = {k: config[k] for k in (*sizes, "rope_theta", "sliding_window", "tie_word_embeddings")}
    facts.check_settings({*config, "bos_token_id", "eos_token_id", "pad_token_id"})
    notes = facts.unused(PARAMS)
    facts.check()
    tokenizer = decoder.tokenizer_of(download, options, family="mistral", config=config)
    ids = {
        "bos_token_id": Value(1, "rule: every Mistral tokenizer"),
        "eos_token_id": Value(2, "rule: every Mistral tokenizer"),
    }
    config |= decoder.token_ids(facts, tokenizer, ids)
    facts.check()
    tied = bool(config["tie_word_embeddings"].value)
    embedding = decoder.embedding_axis(download, sizes["hidden_size"].value)
    container = "pth" if next(iter(checkpoint.files)).endswith((".pth", ".pt")) else "safetensors"
    return decoder.to_hf(
        "mistral",
        download,
        options,
        rules=table(embedding=embedding, tied=tied),
        sizes=sizes,
        config=config,
        embedding=embedding,
        tokenizer=tokenizer,
        notes=notes,
        original=decoder.kept(facts, download, numbers, container=container),
    )


def sliding_window(facts: Facts) -> Value:
    """How many positions a query sees, itself included; None for all. params.json may hold a number, the same
    as text, a list that is repeated over the layers, or nothing; newer ones call it `_sliding_window`."""
    if facts.document is None and "sliding_window" not in facts.settings:
        return facts.anything("sliding_window", ask="the attention window, or null for none")
    absent = Value(None, "rule: sliding_window absent from params.json, every query sees all before it")
    keys = ("sliding_window", "_sliding_window")
    found = facts.anything("sliding_window", *(k for k in keys if facts.given(k)), rule=absent)
    if isinstance(found.value, list):
        kinds = {str(v): v for v in found.value}
        if len(kinds) != 1:
            facts.refuse(
                "unsupported",
                "expected one window for all layers, as config.json can hold, found several",
                "sliding_window",
            )
            return Value(None, found.source)
        found = Value(next(iter(kinds.values())), f"{found.source}, the same for all layers")
    if found.value is None:
        facts.used.update(keys)
        return found
    inner = Facts({"sliding_window": found.value}, facts.file, {})
    number = inner.integer("sliding_window", "sliding_window", text_ok=True, kind="bad-config")
    facts.problems += inner.problems
    return Value(number.value, found.source)


def rope_theta(facts: Facts, window: Value) -> Value:
    """Where params.json is silent: the first release had 1e4 in its code, that of December 2023 reads a
    missing theta as 1e4 with a sliding window and 1e6 without; HEAD always takes 1e6, which is wrong for 7B
    v0.1."""
    if facts.document is None:
        return facts.number("rope_theta", ask="the base of the rotary frequencies")
    theta, why = (1e6, "no sliding_window: 1e6") if window.value is None else (1e4, "a sliding_window: 1e4")
    return facts.number(
        "rope_theta", "rope_theta", rule=Value(theta, f"rule: rope_theta absent from params.json and {why}")
    )


def context(facts: Facts, sizes: dict[str, Value]) -> Value:
    """The length in config.json, which changes no number: Nemo was published with 131072, the others with
    32768."""
    shape = tuple(
        sizes[k].value for k in ("hidden_size", "num_hidden_layers", "head_dim", "intermediate_size")
    )
    if shape == (5120, 40, 128, 14336):
        rule_ = Value(131072, "rule: the shape of Mistral Nemo")
    else:
        rule_ = Value(32768, "rule: as published with Mistral models")
    return facts.integer("max_position_embeddings", "max_position_embeddings", "max_seq_len", rule=rule_)


def plan_original(checkpoint: Checkpoint, options: Options) -> Plan:
    facts = read_config(checkpoint, options.settings, (ARCHITECTURE,))
    sizes = decoder.hf_dimensions(facts)
    theta = facts.number("rope_theta", "rope_theta", rule=Value(1e4, "rule: default of MistralConfig"))
    window = facts.anything(
        "sliding_window", "sliding_window", rule=Value(4096, "rule: default of MistralConfig")
    )
    tie = facts.boolean(
        "tie_word_embeddings", "tie_word_embeddings", rule=Value(False, "rule: default of MistralConfig")
    )
    if facts.anything("rope_scaling", "rope_scaling", rule=Value(None, "absent")).value is not None:
        facts.refuse(
            "unsupported", "expected no rope_scaling, which params.json cannot say, found one", "rope_scaling"
        )
    facts.check_settings({*sizes, "rope_theta", "sliding_window", "tie_word_embeddings", "rope_scaling"})
    facts.check()
    original = kept_facts(checkpoint)
    files = weight_files(options, original)
    numbers = {**sizes, "rope_theta": theta, "sliding_window": window, "tie_word_embeddings": tie}
    params: dict[str, Value] = {
        "dim": sizes["hidden_size"],
        "n_layers": sizes["num_hidden_layers"],
        "head_dim": sizes["head_dim"],
        "hidden_dim": sizes["intermediate_size"],
        "n_heads": sizes["num_attention_heads"],
        "n_kv_heads": sizes["num_key_value_heads"],
        "norm_eps": sizes["rms_norm_eps"],
        "vocab_size": sizes["vocab_size"],
        "rope_theta": theta,  # always written: readers disagree on what its absence means
    }
    if window.value is not None:
        params["sliding_window"] = window
    document, notes = decoder.params_document(params, original, numbers)
    tied = bool(tie.value) and not checkpoint.find("lm_head.weight")
    return decoder.to_original(
        "mistral",
        checkpoint,
        options,
        rules=table(tied=tied),
        sizes=sizes,
        embedding="v",
        files=files,
        home=lambda _: files,
        params=params,
        document=document,
        notes=notes,
    )


def weight_files(options: Options, original: dict[str, Any]) -> list[str]:
    """The container asked for, else the one the model came in, else safetensors as Mistral AI publishes
    today."""
    container = options.family_options.get("container", original.get("container"))
    return ["consolidated.00.pth"] if container == "pth" else ["consolidated.safetensors"]


FAMILY = Family(
    name="mistral",
    summary="Mistral 7B v0.1 to v0.3, Nemo, Small, Large, Codestral: consolidated.* with params.json",
    architectures=(ARCHITECTURE,),
    recognise=recognise,
    plan=plan,
    plan_original=plan_original,
    options=(POOLING, CONTAINER),
    vocabulary=MISTRAL_AI,
)
