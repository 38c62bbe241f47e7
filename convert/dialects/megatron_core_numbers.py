"""What args and tensors of a gated decoder in Megatron-Core say of its numbers: the fields of
`megatron_core`, which has the tables, with their rules and checks.

Source: NVIDIA/Megatron-LM core_v0.9.0 (training/arguments.py) and later, as the rules say.
"""

from __future__ import annotations

import json

from ckpt_tool.convert import numbers
from ckpt_tool.convert.dialects import megatron_ranks as ranks
from ckpt_tool.convert.dialects.megatron_ranks import STRETCHED, args_of
from ckpt_tool.convert.numbers import LLAMA3, Known, count, measured, only, shown
from ckpt_tool.convert.plan import Value
from ckpt_tool.errors import printable

WORDS = "embedding.word_embeddings.weight"
DOWN = "decoder.layers.{i}.mlp.linear_fc2.weight"


def _groups(known: Known) -> tuple[str, ...]:
    """num_query_groups is there, and 1, also where a run says that queries are not grouped."""
    return ("num_query_groups",) if args_of(known).get("group_query_attention", True) else ()


def _one_each(known: Known) -> Value | None:
    if not args_of(known) or _groups(known):
        return None  # num_query_groups says it, or the user is asked
    why = "args: group_query_attention is not set, so one for each query head"
    return Value(known["num_attention_heads"], why)


def _heads_fit(known: Known, kv: Value) -> Value:
    width, heads, shares = known["hidden_size"], known["num_attention_heads"], known.source.ranks
    channels = None if "head_dim" in known.fields else args_of(known).get("kv_channels")
    if "head_dim" not in known.fields and (width % heads or channels not in (None, width // heads)):
        message = f"expected heads of {width} / {heads} channels, found {channels or 'a rest'}"
        known.refuse("config-mismatch", message, "num_attention_heads")
    elif heads % kv.value or kv.value % shares:
        message = (
            f"expected {kv.value} key/value heads that divide {heads} and that {shares} ranks share evenly"
        )
        known.refuse("config-mismatch", f"{message}, found a rest", "num_key_value_heads")
    return kv


def _scaling(known: Known) -> Value | None:
    """rope_scaling_factor is an argument since core_v0.11, which pretrain_gpt.py and gpt_builders.py did not
    hand on up to core_v0.18 (NVIDIA/Megatron-LM): nothing tells whether another than 8 was applied."""
    args = args_of(known)
    if not args.get("use_rope_scaling"):
        return Value(None, "args do not ask for use_rope_scaling")
    factor = args.get("rope_scaling_factor", 8)
    if factor != 8:
        message = (
            f"expected rope_scaling_factor 8, found {shown(factor)} beside use_rope_scaling: releases up to "
            "core_v0.18 apply 8 whatever it says"
        )
        block = json.dumps({**LLAMA3, "factor": factor}, separators=(",", ":"), default=str)
        hint = f"--set 'rope_scaling={printable(block, 200)}', or with factor 8, as the run computed it"
        known.refuse("unsupported", message, "rope_scaling_factor", hint)
    return Value(LLAMA3, "args: use_rope_scaling")  # in every release that knows it


def can_be_said(known: Known) -> bool:
    block = {k: v for k, v in (known["rope_scaling"] or {}).items() if k != "rope_theta"}
    return block in ({}, LLAMA3)


def _words(known: Known) -> tuple[str, ...]:
    return tuple(k for k in ("orig_vocab_size", "vocab_size") if known.facts.given(k))[:1]


def _words_fit(known: Known, words: Value) -> Value:
    rows = known.source.size(WORDS, 0)
    if rows is not None and words.value > rows.value:
        message = f"expected at least {words.value} words ({words.source}), found"
        known.refuse("config-mismatch", f"{message} {rows.value} ({rows.source})", "vocab_size")
    return words


FIELDS = (
    only("hidden_act", "silu", "args: swiglu"),
    count("hidden_size", "hidden_size", rule=measured(WORDS, 1, shared=False)),
    count("intermediate_size", "ffn_hidden_size", rule=measured(DOWN, 1)),
    count("num_hidden_layers", "num_layers", rule=numbers.counted),
    count("num_attention_heads", "num_attention_heads", ask="the number of query heads"),
    count("num_key_value_heads", read=_groups, rule=_one_each, check=_heads_fit),
    ranks.epsilon("rms_norm_eps", ask="the epsilon of the norms"),
    numbers.number("rope_theta", "rotary_base", ask="the base of the rotary frequencies"),
    numbers.anything("rope_scaling", STRETCHED, rule=_scaling, check=numbers.object_or_null),
    count("vocab_size", read=_words, rule=measured(WORDS, 0), check=_words_fit),
    numbers.flag("tie_word_embeddings", rule=ranks.tie, check=ranks.output_is_there),
)


def _width(known: Known) -> Value | None:
    """kv_channels is among the args of every run; else heads share out the width."""
    width, heads = known["hidden_size"], known["num_attention_heads"]
    return None if width % heads else Value(width // heads, "rule: hidden_size / num_attention_heads")


HEAD_DIM = count("head_dim", "kv_channels", rule=_width, silent=_width, ask="the width of a head")
LENGTH = count("max_position_embeddings", "max_position_embeddings", ask="the longest text")
