"""A gated decoder with rotary positions as Megatron-Core trains it, whatever it is called when it is
published: `decoder.layers.{i}.self_attention.linear_qkv`, in tensor-parallel ranks or joined. Pipeline stages
and expert-parallel ranks are joined before (`megatron.join_stages`, `join_ranks`). A token goes to the
experts of its highest logits, whose shares are a softmax over those alone.

Source: NVIDIA/Megatron-LM core_v0.9.0 to core_v0.19.2 (core/models/gpt, core/transformer),
NVIDIA-NeMo/Megatron-Bridge @067f987d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tool.reference.decoder import Names
from ckpt_tool.reference.facts import Shapes, first, one_of, only, refuse
from ckpt_tool.reference.megatron_documents import facts_of
from ckpt_tool.reference.published import numbers, told

# Facts under their Hugging Face names, and what args call them.
ARGS = {
    "num_hidden_layers": ("num_layers",),
    "head_dim": ("kv_channels",),
    "rms_norm_eps": ("norm_epsilon", "layernorm_epsilon"),
    "rope_theta": ("rotary_base",),
    "num_experts_per_tok": ("moe_router_topk",),
}
WORDS = "embedding.word_embeddings.weight"
COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (1,),
    "apply_layernorm_1p": (False,),
    "window_size": (),
    "layernorm_zero_centered_gamma": (False,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (),
    "no_rope_freq": (),
    "mrope_section": (),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0,),
    "activation_func_clamp_value": (),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (),
    "linear_attention_freq": (),
    "is_hybrid_model": (False,),
    "mtp_num_layers": (0,),
    "use_mup": (False,),
}
# Of models with experts; of others `num_experts` may not be told.
ROUTED: dict[str, tuple[Any, ...]] = {
    "moe_router_pre_softmax": (False,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (1,),
    "moe_router_group_topk": (),
    "moe_router_topk_limited_devices": (),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_shared_expert_intermediate_size": (0,),
    "moe_layer_freq": (1,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (0,),
    "moe_mlp_glu_interleave_size": (0,),
}
# How experts are kept: of each the gates with the ups, or those, down, and ups.
IN_ONE = "mlp.experts."
KEPT = (
    ("local_experts.{e}.linear_fc1.weight", "local_experts.{e}.linear_fc2.weight"),
    ("linear_fc1.weight{e}", "linear_fc2.weight{e}"),
    ("local_experts.{e}.weight1", "local_experts.{e}.weight2"),
    (
        "local_experts.{e}.linear_fc1.gate.weight",
        "local_experts.{e}.linear_fc2.weight",
        "local_experts.{e}.linear_fc1.up.weight",
    ),
)


def words_of(shapes: Shapes) -> str | None:
    """The name of the word table where these are tensors of Megatron-Core's."""
    return next((name for name in sorted(shapes) if name.endswith(WORDS)), None)


def made(
    params: Mapping[str, Any],
    shapes: Shapes,
    ranks: int,
    overrides: Mapping[str, Any],
    *,
    biased: bool = False,
) -> dict[str, Any]:
    """The parts of a `decoder.Config`. `params` is what the files carry, Megatron's pickled args as plain
    values among it; `shapes` those of rank 0, `overrides` facts from the user under their Hugging Face names,
    which win; `biased` says whether query, key and value have biases. ValueError with all that is missing and
    that this pass does not compute."""
    words = words_of(shapes)
    assert words is not None
    said = _in_hf_names(params, overrides)
    if said.get("use_rope_scaling") and "rope_scaling" not in overrides:
        said["rope_scaling"] = _stretched(said.get("rope_scaling_factor"))
    facts = told(said, overrides, 1)
    names = _of_megatron(words, shapes, facts.get("tie_word_embeddings"))
    normed = any(name.endswith("q_layernorm.weight") for name in shapes)
    own = {"add_qkv_bias": (biased,), "qk_layernorm": (normed,)}
    router = shapes.get(f"{names.block}0.mlp.router.weight")
    refuse(only(facts, {**COMPUTED, **own, **({"num_experts": ()} if router is None else ROUTED)}))
    # Those after it are padding.
    rows = first(facts.get("vocab_size"), facts.get("orig_vocab_size"), shapes[words][0] * ranks)
    found = numbers(facts, names, shapes)
    found["n_words"] = int(rows)
    if biased:
        found["biased"] = ("qkv",)
    if router is not None:
        top = facts.get("num_experts_per_tok")
        if top is None:
            raise ValueError("expected `moe_router_topk` or num_experts_per_tok given by name, found neither")
        found |= {"n_experts": router[0], "n_experts_per_token": int(top)}
        found["expert_ranks"] = _sharing(facts.get("expert_tensor_parallel_size"), ranks)
    if normed:
        found["head_norms"] = ("self_attention.q_layernorm.", "self_attention.k_layernorm.")
    return found


def _sharing(said: Any, ranks: int) -> int | None:
    """How many ranks have shares of experts, where these are not all. ValueError for a number that the ranks
    are no multiple of."""
    if said is None or ranks == 1 or said == ranks:
        return None
    if type(said) is not int or said < 1 or ranks % said:
        raise ValueError(f"expected `expert_tensor_parallel_size` that {ranks} ranks divide by, found {said}")
    return said


def _stretched(factor: Any) -> dict[str, Any]:
    """What `RotaryEmbedding._apply_scaling` computes by default (core_v0.12.0, rotary_pos_embedding.py); the
    argument for another factor reached it in some releases only."""
    if factor not in (None, 8):
        raise ValueError(f"expected `rope_scaling_factor` 8 or rope_scaling given by name, found {factor}")
    turned = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": 8, **turned}


def _in_hf_names(params: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    args = params.get("args")
    made = {**facts_of(params), **params, **(args if isinstance(args, Mapping) else {})}
    unsaid = [n for n in ARGS if made.get(n) is None and overrides.get(n) is None]
    made |= {name: one_of(made, *ARGS[name]) for name in unsaid}
    marked = made.get("no_rope_freq")  # layers marked 1 are not turned
    if isinstance(marked, list) and not any(marked):
        del made["no_rope_freq"]
    for name in ("moe_layer_freq", "moe_router_load_balancing_type"):  # of each layer, or each loss
        told_each = made.get(name)
        if isinstance(told_each, list) and told_each and all(v in ROUTED[name] for v in told_each):
            made[name] = told_each[0]
    if made.get("window_size") in ([-1, -1], [-1, 0]):  # all that is before a token
        del made["window_size"]
    if "num_query_groups" in made:  # args have a number of groups even where queries are not grouped
        grouped = made.get("group_query_attention", True)
        made["num_key_value_heads"] = made["num_query_groups" if grouped else "num_attention_heads"]
    if "untie_embeddings_and_output_weights" in made:
        made["tie_word_embeddings"] = not made["untie_embeddings_and_output_weights"]
    return made


def _of_megatron(words: str, shapes: Shapes, tied: bool | None) -> Names:
    root = words.removesuffix(WORDS)
    block, output = root + "decoder.layers.", root + "output_layer.weight"
    # Transformer Engine has norms in the layers after them.
    norms = [
        within if f"{block}0.{within}weight" in shapes else apart
        for within, apart in (
            ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
            ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
        )
    ]
    apart = f"{block}0.mlp.linear_fc1.gate.weight" in shapes  # of `singleton_local_shards`
    experts = next((k for k in KEPT if f"{block}0.{IN_ONE}{k[0].format(e=0)}" in shapes), KEPT[0])
    # The last pipeline stage has a copy of tied words.
    own_output = output in shapes or (tied is not None and not tied)
    return Names(
        word=words,
        block=block,
        norm_1=norms[0],
        qkv=("self_attention.linear_qkv.",),
        out="self_attention.linear_proj.",
        norm_2=norms[1],
        units=("mlp.linear_fc1.gate.", "mlp.linear_fc1.up.") if apart else ("mlp.linear_fc1.",),
        down="mlp.linear_fc2.",
        final_norm=root + "decoder.final_layernorm.",
        output=output if own_output else words,
        router="mlp.router.weight",
        expert=tuple(IN_ONE + name for name in experts),
        inward=experts == KEPT[2],
    )
