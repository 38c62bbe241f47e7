"""What the pickled args of Megatron-LM say of a model's numbers beside its sizes, and what it means that they
do not: by the rules of the code of their day.

Source: NVIDIA/Megatron-LM v1.0, v2.0, v2.5, 23.06 and core_v0.9.0 (arguments.py, model/utils.py,
model/transformer.py).
"""

from __future__ import annotations

from typing import Literal

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.dialects.megatron_names import has_one_order, is_core, is_engine
from ckpt_tool.convert.dialects.megatron_ranks import Run, args_of
from ckpt_tool.convert.numbers import Field, Known, anything, one_of
from ckpt_tool.convert.params import SET
from ckpt_tool.convert.plan import Value

Gelu = Literal["erf", "tanh"]
GELUS: dict[str, Gelu] = {  # what transformers calls them
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
ACTIVATION = {"erf": "gelu", "tanh": "gelu_new"}


def heads_fit(known: Known, heads: Value) -> Value:
    """A check of num_attention_heads."""
    width, ranks, args = known["hidden_size"], known.source.ranks, args_of(known)
    channels, asked = args.get("kv_channels"), f"{heads.value} heads"
    asked += "" if known.back else f" ({heads.source})"
    own = known.names.get("num_attention_heads", "num_attention_heads")
    if width % heads.value:
        name = known.names.get("hidden_size", "hidden_size")
        message = f"expected {name} {width} to divide by {asked}, found a rest"
        known.refuse("config-mismatch", message, own)
    elif heads.value % ranks:
        message = f"expected {asked} to divide by {ranks} ranks, found a rest"
        known.refuse("config-mismatch", message, own)
    elif channels not in (None, width // heads.value):
        message = f"expected heads of {width // heads.value} channels, found {channels}"
        known.refuse("unsupported", message, "kv_channels")
    # num_query_groups is there, and 1, also where queries are not grouped
    if args.get("group_query_attention") and args.get("num_query_groups") not in (None, heads.value):
        message = f"expected a key and a value for each head, found {args['num_query_groups']} groups"
        known.refuse("unsupported", message, "num_query_groups")
    return heads


# --- gelus ----------------------------------------------------------------------------------------------


def activation(of_version_0: Gelu, why: str) -> Field:
    """hidden_act is the feed-forward's, which is in every layer; `of_version_0` where nothing tells it."""

    def rule(known: Known) -> Value:
        assert isinstance(known.source, Run)
        gelu = feed_forward_gelu(known.source, Value(of_version_0, why))
        return Value(ACTIVATION[gelu.value], gelu.source)

    return anything("hidden_act", rule=rule, check=one_of("hidden_act", GELUS))


def gelus(known: Known) -> tuple[Value, Value]:
    """Which gelu the feed-forward and the LM head of an encoder compute. What config.json cannot say of the
    head holds on the way back while it still says the same of the feed-forward."""
    name, source = known["hidden_act"], known.value("hidden_act").source
    gelu, once = Value(GELUS[name], source), known.once
    if isinstance(known.source, Run):
        return gelu, gelu if source == SET else lm_head_gelu(known.source)
    same = once.get("gelu") == gelu.value and once.get("head_gelu") in list(ACTIVATION)
    return gelu, Value(once["head_gelu"], "ckpt-tool.json: the LM head's gelu") if same else gelu


def feed_forward_gelu(run: Run, of_version_0: Value) -> Value:
    """The code of each age:

    - Megatron-Core has the fused kernel, which is the tanh form, unless bias_gelu_fusion is off; it does not
      look at openai_gelu.
    - before 2020-04-14 there was no flag and only the tanh form: args of version 0 without openai_gelu.
    - later erf, tanh with openai_gelu, or with bias_gelu_fusion, which is on by default since January 2021;
      from 2023 on (args with swiglu) onnx_safe comes before the fusion.
    - Transformer Engine's layers before Core take no flag: their gelu is the tanh form.
    - no args at all: `of_version_0`, erf for versions 1 and 2 (nobody had the fusion by default), tanh for 3.
    """
    fused, openai = run.args.get("bias_gelu_fusion"), run.args.get("openai_gelu")
    if is_engine(run.age):
        return Value("tanh", "rule: Transformer Engine's gelu is the tanh form")
    if is_core(run.age):
        if fused is None:
            return Value("tanh", "rule: Megatron-Core fuses bias and gelu by default, in the tanh form")
        return Value("tanh" if fused else "erf", "args: bias_gelu_fusion (Megatron-Core)")
    if fused is None and openai is None:
        return _gelu_by_version(run, of_version_0)
    if openai:
        return Value("tanh", "args: openai_gelu")
    if run.args.get("onnx_safe") and "swiglu" in run.args:
        return Value("erf", "args: onnx_safe")
    if fused:
        return Value("tanh", "args: bias_gelu_fusion, which is the tanh form")
    return Value("erf", "args: neither openai_gelu nor bias_gelu_fusion")


_BEFORE_THE_FLAG = Value("tanh", "rule: args of version 0 without openai_gelu are of before April 2020: tanh")


def _gelu_by_version(run: Run, of_version_0: Value) -> Value:
    if run.version == 0 and "num_layers" in run.args:
        return _BEFORE_THE_FLAG
    if run.version == 0:
        gelu, why = of_version_0.value, of_version_0.source
        return Value(gelu, f"rule: version 0 without args: {gelu}, {why}")
    if run.version < 3:
        return Value("erf", f"rule: version {run.version} without flags: erf, the fusion was opt-in")
    return Value("tanh", "rule: version 3.0 without flags: the fused kernel was the default, the tanh form")


def lm_head_gelu(run: Run) -> Value:
    """Never the fused one: erf, or tanh with openai_gelu and before there was that flag."""
    if is_core(run.age):
        return Value("erf", "rule: Megatron-Core's LM head")
    if "openai_gelu" in run.args:
        return Value("tanh" if run.args["openai_gelu"] else "erf", "args: openai_gelu")
    if run.version == 0 and "num_layers" in run.args:
        return _BEFORE_THE_FLAG
    return Value("erf", "rule: the LM head is never fused")


def gelu_flags(known: Known, core: bool) -> dict[str, Value]:
    """Args that say what each part computes, whatever the code that reads them has by default."""
    gelu, head = gelus(known)
    fused = gelu.value == "tanh" and (core or head.value == "erf")
    source = f"{gelu.source}: {gelu.value}, LM head {head.value}"
    openai = gelu.value == "tanh" and not fused
    return {"bias_gelu_fusion": Value(fused, source), "openai_gelu": Value(openai, source)}


# --- notes ----------------------------------------------------------------------------------------------


def notes_on(run: Run) -> list[str]:
    """What neither architecture can say, and what was not said by the file."""
    notes = []
    if run.said_version is None and not has_one_order(run.age):
        notes.append(
            "no checkpoint_version is in the file, which makes it 0: query_key_value holds all queries, then "
            "all keys, then all values (files of two weeks of September 2020 are of 1.0 and do not say so)"
        )
    if run.args.get("apply_query_key_layer_scaling"):
        notes.append(
            "args: apply_query_key_layer_scaling divides the scores by the layer's number and multiplies "
            "them again: nothing but another rounding in float16"
        )
    if listed := _listed_tensors(run.checkpoint):
        notes.append(f"{listed} tensors in lists are left out: only training needs them")
    if run.args.get("orig_vocab_size"):
        notes.append("args: orig_vocab_size tells which rows of the vocabulary are padding")
    return notes


def _listed_tensors(checkpoint: Checkpoint) -> int:
    """How many tensors the files hold in lists, where no name leads to them."""
    from ckpt_tool.checkpoint.pickle_records import TensorRecord, children  # loaded with a file that has some

    count = 0
    for file in checkpoint.files.values():
        seen: set[int] = set()
        stack: list[object] = list(file.metadata.values())
        while stack:
            value = stack.pop()
            if isinstance(value, TensorRecord):
                count += 1
            elif id(value) not in seen and isinstance(value, dict | list | tuple):
                seen.add(id(value))
                stack += [item for _, item in children(value)]
    return count
