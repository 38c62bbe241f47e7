"""Qwen1.5, Qwen2 and Qwen2.5 (dense): published in the Hugging Face layout, trained in Megatron-Core's.

Both are originals here. Of the first, converting makes one canonical folder; of the second (`mp_rank_*` of a
GPT model with gated feed-forward and biases for query, key and value) it takes grouped tensors apart, and
`form` "mcore" on the way back puts them together.

Source: transformers 4.37.2 and 5.23.0 (models/qwen2), NVIDIA/Megatron-LM core_v0.9.0 (core/models/gpt),
NVIDIA-NeMo/Megatron-Bridge @067f987d (models/qwen). Linear weights are (out, in) on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.dialects import consolidated as decoder
from ckpt_tool.convert.dialects import megatron_core, published
from ckpt_tool.convert.dialects.converted import kept_facts, read_config
from ckpt_tool.convert.facts_classes import CLASSES
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import Known, only
from ckpt_tool.convert.params import Facts
from ckpt_tool.convert.plan import Options, Plan, Value
from ckpt_tool.convert.source import Source, dtype_value, whole_tensors
from ckpt_tool.convert.weave import Table, to_hf
from ckpt_tool.errors import fail

ARCHITECTURE = "Qwen2ForCausalLM"
T = "model.layers.{i}."
LAYER_NUMBER = r"model\.layers\.(\d+)\."
WORDS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _same(name: str, pattern: str) -> Rule:
    return rule(name, name, pattern)


LAYER = (
    _same(f"{T}input_layernorm.weight", "d"),
    *(
        _same(f"{T}self_attn.{p}_proj.{kind}", pattern)
        for p, a in (("q", "n"), ("k", "k"), ("v", "k"))
        for kind, pattern in (("weight", f"({a} h) d"), ("bias", f"({a} h)"))
    ),
    _same(f"{T}self_attn.o_proj.weight", "d (n h)"),
    _same(f"{T}post_attention_layernorm.weight", "d"),
    _same(f"{T}mlp.gate_proj.weight", "f d"),
    _same(f"{T}mlp.up_proj.weight", "f d"),
    _same(f"{T}mlp.down_proj.weight", "d f"),
)


def table(*, tied: bool, head: bool) -> tuple[Rule, ...]:
    """All rows; `head`: lm_head.weight is there, a copy of the embedding where it is `tied`."""
    last = rule(HEAD, WORDS if tied else HEAD, "v d", tied=tied)
    return (_same(WORDS, "v d"), *LAYER, _same("model.norm.weight", "d"), *((last,) if head else ()))


RULES = table(tied=False, head=True)
IGNORED = {r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "recomputed from rope_theta"}
CORE = megatron_core.Core(
    family="qwen2",
    title="Qwen2",
    architecture=ARCHITECTURE,
    model_type="qwen2",
    config=CLASSES["qwen2"],
    fields=(only("use_sliding_window", False, "Megatron-Core's GPT has no window"),),
    unsaid=("rope_scaling", "use_sliding_window"),
    published_rows=(151936, 152064),
    end_of_text=151643,
)


def recognise(checkpoint: Checkpoint) -> tuple[bool, str]:
    names = set(checkpoint.names())
    if CORE.holds(names):
        return CORE.recognise(names)
    if "model.layers.0.self_attn.q_proj.bias" not in names:
        why = "no model.layers.0.self_attn.q_proj.bias; these may be Hugging Face names of another model"
        return False, why
    found = published.model_type_of(checkpoint)
    if found not in (None, "qwen2"):
        return False, f"Hugging Face names, but config.json is that of {found}"
    if found is None and "model.layers.0.self_attn.o_proj.bias" in names:
        return False, "biases in the output projection, which Qwen2 has none of"
    return True, "Hugging Face names with biases for query, key and value, as Qwen2's are"


# --- numbers --------------------------------------------------------------------------------------------


def dimensions(facts: Facts) -> dict[str, Value]:
    """What changes the numbers, from config.json. Defaults of Qwen2Config that no published model has (32
    key/value heads, rope_theta 10000) are asked for instead."""
    counts = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    made = {n: facts.integer(n, n, maximum=10_000 if "layers" in n else 2**31) for n in counts}
    made["rms_norm_eps"] = facts.number("rms_norm_eps", "rms_norm_eps", ask="the epsilon of the norms")
    made["rope_theta"] = facts.number(
        "rope_theta", "rope_theta", ask="the base of the rotary frequencies, 1000000 in published models"
    )
    made["rope_scaling"] = facts.anything("rope_scaling", "rope_scaling", rule=Value(None, "rule: absent"))
    made["hidden_act"] = facts.fixed("hidden_act", "silu", "the only activation of Qwen2", "hidden_act")
    default = "rule: default of Qwen2Config"
    made["tie_word_embeddings"] = facts.boolean(
        "tie_word_embeddings", "tie_word_embeddings", rule=Value(False, default)
    )
    facts.check()
    return made | windows(facts)


def windows(facts: Facts) -> dict[str, Value]:
    """Only with use_sliding_window there is a window, in the layers that `layer_types` or max_window_layers
    say (transformers since 4.51; before, the library's kernels disagreed)."""
    use = facts.boolean(
        "use_sliding_window", "use_sliding_window", rule=Value(False, "rule: default of Qwen2Config")
    )
    made = {"use_sliding_window": use}
    window = facts.anything("sliding_window", "sliding_window", rule=Value(None, "rule: absent"))
    if not use.value:
        return made
    layers = facts.anything("max_window_layers", "max_window_layers", rule=Value(None, ""))
    if type(window.value) is not int or window.value < 1:
        found = json.dumps(window.value)[:40]
        facts.refuse(
            "bad-config", f"expected a number of tokens beside a window, found {found}", "sliding_window"
        )
    if layers.value is None and not facts.given("layer_types"):
        facts.refuse(
            "missing-fact",
            "expected max_window_layers or layer_types beside a window, found neither",
            "max_window_layers",
            "--set max_window_layers=VALUE",
        )
    return made


def check_heads(facts: Facts, sizes: Mapping[str, Value]) -> None:
    width, heads, kv = (sizes[n].value for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    facts.integer("head_dim", "head_dim", rule=Value(width // heads, ""))
    told = (facts.document or {}).get("head_dim")
    if width % heads or told not in (None, width // heads):
        found = f"head_dim {told}" if told is not None else "a rest"
        message = f"expected heads of {width} / {heads} channels, as Qwen2's class has them, found {found}"
        facts.refuse("config-mismatch", message, "num_attention_heads")
    elif heads % kv:
        message = f"expected num_attention_heads {heads} to divide by num_key_value_heads {kv}, found a rest"
        facts.refuse("config-mismatch", message, "num_key_value_heads")
    facts.check()


def axes_of(sizes: Mapping[str, Value]) -> dict[str, int]:
    """n query heads, k key/value heads, h head width, d width, f feed-forward width, v words."""
    axes = {a: int(sizes[f].value) for a, f in decoder.FIELDS.items() if f in sizes}
    return {**axes, "h": axes["d"] // axes["n"]}


FIELDS = {a: f for a, f in decoder.FIELDS.items() if a in "nkdfv"}


# --- original to canonical Hugging Face -----------------------------------------------------------------


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    if CORE.holds(checkpoint.names()):
        return CORE.plan(checkpoint, options)
    own, why = recognise(checkpoint)
    if not own:
        fail("unsupported", f"expected Qwen2, found {why}", file=checkpoint.path.name)
    download = whole_tensors(checkpoint, LAYER_NUMBER)
    facts = read_config(checkpoint, options.settings, (ARCHITECTURE,), model_type="qwen2")
    sizes = dimensions(facts)
    check_heads(facts, sizes)
    config: dict[str, Value] = {
        "architectures": Value([ARCHITECTURE], "family qwen2"),
        "model_type": Value("qwen2", "family qwen2"),
        **sizes,
        "torch_dtype": dtype_value(download, options),
    }
    config |= published.carried(facts, config)
    facts.check_settings({*config, "head_dim", "sliding_window", "max_window_layers", "layer_types"})
    facts.check()
    tied = bool(sizes["tie_word_embeddings"].value)
    head = HEAD in download.tensors
    beside = published.written("qwen2", download, options, config, IGNORED)
    if len(beside.documents) == 1:
        beside = replace(beside, notes=["the download has no tokenizer file; none was written"])
    beside = replace(beside, original={"container": published.container_of(checkpoint), "head": head})
    return to_hf(rows_of(sizes, tied=tied, head=head or not tied), download, options, beside)


def rows_of(sizes: Mapping[str, Value], *, tied: bool, head: bool) -> Table:
    return Table(table(tied=tied, head=head), axes_of(sizes), FIELDS, sizes, sizes["num_hidden_layers"])


# --- the way back ---------------------------------------------------------------------------------------


def plan_original(checkpoint: Checkpoint, options: Options) -> Plan:
    """The published layout in one file, or Megatron-Core's: as `form` asks, else as the original was."""
    facts = read_config(checkpoint, options.settings, (ARCHITECTURE,), model_type="qwen2")
    sizes = dimensions(facts)
    check_heads(facts, sizes)
    once = kept_facts(checkpoint)
    form = options.family_options.get("form", once.get("form", "hf"))
    if form not in ("hf", "mcore"):
        fail("usage", f"expected hf or mcore for family qwen2, found {form}", where="--form")
    download = whole_tensors(checkpoint, LAYER_NUMBER)
    if form == "mcore":
        return CORE.plan_original(checkpoint, options, Known({}, facts, download, options, made=dict(sizes)))
    config = _config(facts, sizes, download, options)
    tied = bool(sizes["tie_word_embeddings"].value)
    apart = HEAD in download.tensors
    file = published.weight_file(options, once, "safetensors")
    return published.to_one_file(
        rows_of(sizes, tied=tied and not apart, head=apart or not tied or bool(once.get("head"))),
        download,
        options,
        published.written("qwen2", download, options, config, IGNORED),
        file,
    )


def _config(facts: Facts, sizes: Mapping[str, Value], download: Source, options: Options) -> dict[str, Value]:
    config: dict[str, Any] = {
        "architectures": Value([ARCHITECTURE], "family qwen2"),
        "model_type": Value("qwen2", "family qwen2"),
        **sizes,
        "torch_dtype": dtype_value(download, options),
    }
    config |= published.carried(facts, config)
    facts.check_settings(config)
    facts.check()
    return config


FAMILY = Family(
    name="qwen2",
    summary="Qwen1.5, Qwen2, Qwen2.5 (dense): .bin or safetensors in any sharding, and Megatron-Core ranks",
    architectures=(ARCHITECTURE,),
    recognise=recognise,
    plan=plan,
    plan_original=plan_original,
    pools=True,
)
