"""Experts in Megatron-Core's layout: a router, and the feed-forward of each expert, as tensors of its own
(SequentialMLP; so they are in every torch_dist folder), as numbered weights of one module (TEGroupedMLP), or
joined in two tensors of a rank (GroupedMLP, up to core_v0.16), of which each expert's are one run of bytes:
`layer_axis` reads them apart, as weight1 [d, 2 f] and weight2 [f, d].

    mlp.experts.local_experts.{e}.linear_fc1.weight   [2 f, d]    gates, then ups
    mlp.experts.linear_fc1.weight{e}                  [2 f, d]
    mlp.experts.weight1                               [d, E 2 f]
    mlp.experts.weight2                               [E f, d]

The tables number experts through all expert-parallel ranks. Source: NVIDIA/Megatron-LM core_v0.9.0 to
core_v0.19.0 (core/transformer/moe: experts.py, router.py, moe_utils.py, moe_layer.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_tool.convert.dialects.megatron_arguments import Only
from ckpt_tool.convert.dialects.megatron_ranks import Run
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import Field, Known, count, measured
from ckpt_tool.convert.options import Option
from ckpt_tool.convert.plan import Value
from ckpt_tool.records import dataclass

S = "decoder.layers.{i}."
ROUTER = f"{S}mlp.router.weight"
# What the experts' matrices are called, by how they are kept: in, then out.
KEPT = {
    "sequential": (
        "mlp.experts.local_experts.{e}.linear_fc1.weight",
        "mlp.experts.local_experts.{e}.linear_fc2.weight",
    ),
    "grouped": ("mlp.experts.linear_fc1.weight{e}", "mlp.experts.linear_fc2.weight{e}"),
    "joined": ("mlp.experts.local_experts.{e}.weight1", "mlp.experts.local_experts.{e}.weight2"),
    "apart": (
        "mlp.experts.local_experts.{e}.linear_fc1.gate.weight",
        "mlp.experts.local_experts.{e}.linear_fc2.weight",
    ),
}
SEQUENTIAL, GROUPED, APART = "sequential", "grouped", "apart"
OPTION = Option(
    "experts",
    "Experts in files of ranks: modules of their own (sequential), or numbered weights of one module, as "
    "Transformer Engine's --moe-grouped-gemm loads them (grouped).",
    "original",
    choices=(SEQUENTIAL, GROUPED),
)


@dataclass(frozen=True)
class Experts:
    """What a family calls the router and the gate, up and down matrices of an expert when it is published."""

    router: str
    gate: str
    up: str
    down: str


def to_write(known: Known) -> Value:
    """How to keep experts in files of ranks: as asked, else as the original's were."""
    if (asked := known.options.family_options.get(OPTION.name)) is not None:
        return Value(asked, OPTION.flag)
    once = GROUPED if known.once.get("grouped") is True else SEQUENTIAL
    return Value(once, "as the original had it, or false")


def kind_of(names: Iterable[str]) -> str | None:
    """How the experts of the first layer are kept; None for a model without any."""
    held = set(names)
    first = {kind: (S + one).format(i=0, e=0) for kind, (one, _) in KEPT.items()}
    return next((kind for kind, name in first.items() if name in held), None)


def rules(published: Experts, kind: str) -> tuple[Rule, ...]:
    """The rows of the router and the experts. Axes: e experts, f width of one, g gate and up, d width."""
    one, two = (S + name for name in KEPT[kind])
    parts = (published.gate, published.up)
    router = rule(ROUTER, published.router, "e d")
    if kind == "joined":
        fc1 = [rule(one, parts, "d (g f) -> (g f) d", cut=("g", (1, 1)), split="f")]
        return router, *fc1, rule(two, published.down, "f d -> d f", split="f")
    if kind == APART:
        names = (one, one.replace(".gate.", ".up."))
        fc1 = [rule(a, b, "f d", split="f") for a, b in zip(names, parts, strict=True)]
    else:
        fc1 = [rule(one, parts, "(g f) d", cut=("g", (1, 1)), split="f")]
    return router, *fc1, rule(two, published.down, "d f", split="f")


# --- numbers --------------------------------------------------------------------------------------------


def _width_keys(known: Known) -> tuple[str, ...]:
    """moe_ffn_hidden_size is null where experts are as wide as args say of all feed-forwards."""
    return ("moe_ffn_hidden_size",) if known.facts.given("moe_ffn_hidden_size") else ("ffn_hidden_size",)


def _width(known: Known) -> Value | None:
    for kind, dimension in (("sequential", 1), ("grouped", 1), ("joined", 0)):
        found = known.source.size(S + KEPT[kind][1].replace("{e}", "0"), dimension)
        if found is not None:
            return found
    return None


def _not_more_than_there_are(known: Known, chosen: Value) -> Value:
    if chosen.value > known["num_local_experts"]:
        message = f"expected at most {known['num_local_experts']} experts per token, found {chosen.value}"
        known.refuse("config-mismatch", message, "num_experts_per_tok")
    return chosen


def _as_many_as_rows(known: Known, experts: Value) -> Value:
    rows = known.source.size(ROUTER, 0, shared=False)
    if not known.back and rows is not None and rows.value != experts.value:
        message = f"expected {experts.value} experts ({experts.source}), found {rows.value} ({rows.source})"
        known.refuse("config-mismatch", message, "num_local_experts")
    return experts


FIELDS: tuple[Field, ...] = (
    count("intermediate_size", read=_width_keys, rule=_width),
    count(
        "num_local_experts",
        "num_experts",
        "num_moe_experts",
        rule=measured(ROUTER, 0, shared=False),
        check=_as_many_as_rows,
    ),
    count(
        "num_experts_per_tok",
        "moe_router_topk",
        check=_not_more_than_there_are,
        ask="the number of experts per token",
    ),
)

# What training alone reads of config.json; args have words for some, which another program applied.
TRAINED: Mapping[str, Any] = {
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
}
LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
_FORCED = "experts chosen at random"
_DROPPED = "tokens dropped beyond a capacity"

# Of a model whose router chooses the experts of the highest logits and shares them by a softmax over those.
# Tokens over the capacity are dropped, and inputs jitter, outside training too.
ROUTED: Mapping[str, Only] = {
    "moe_router_pre_softmax": Only("softmax before experts are chosen", (None,)),
    "moe_router_score_function": Only("a softmax over the chosen experts", ("softmax", None)),
    "moe_router_topk_scaling_factor": Only("scaled shares of experts", (None, 1.0)),
    "moe_router_topk_limited_devices": Only("choice among some devices", (None,)),
    "moe_router_group_topk": Only("choice among some groups of experts", (None,)),
    "moe_router_enable_expert_bias": Only("bias in the choice of experts", (None,)),
    "moe_router_load_balancing_type": Only("experts chosen by logits", (*LOSSES, None), each=True),
    "moe_router_force_load_balancing": Only(_FORCED, (None,)),
    "moe_router_force_biased": Only(_FORCED, (None,)),
    "moe_apply_probs_on_input": Only("shares of the experts' inputs", (None,)),
    "moe_expert_capacity_factor": Only(_DROPPED, (None,), answerable=True, below=True),
    "moe_expert_rank_capacity_factor": Only(_DROPPED, (None,), answerable=True, below=True),
    "moe_token_dropping": Only(_DROPPED, (None,), answerable=True),
    "moe_input_jitter_eps": Only("noise in what experts see", (None,), answerable=True),
    "moe_layer_freq": Only("experts in every layer", (1, None), each=True),
    "moe_shared_expert_intermediate_size": Only("shared experts", (None,)),
    "moe_shared_expert_gate": Only("shared experts", (None,)),
    "moe_latent_size": Only("experts narrower than the model", (None,)),
    "moe_extended_tp": Only("experts shared out over ranks of two kinds", (None,)),
    "moe_single_grouped_weight": Only("experts joined in one tensor", (None,)),
    "moe_mlp_glu_interleave_size": Only("gates and ups in turns", (None,)),
}
# Losses and updates of training, kernels, messages between devices, and what counts only beside the above.
UNUSED_BY_ROUTED = """moe_aux_loss_coeff moe_z_loss_coeff moe_router_bias_update_rate
    moe_router_quantile_balancing_ema moe_router_num_groups moe_router_dtype moe_router_padding_for_*
    moe_router_fusion moe_enable_routing_replay moe_routing_trace_* moe_token_dispatcher_type
    moe_token_drop_policy moe_pad_expert_input_to_capacity moe_pad_experts_for_cuda_graph_inference
    moe_grouped_gemm moe_use_legacy_grouped_gemm moe_layer_recompute moe_permute_fusion*
    moe_per_layer_logging moe_shared_expert_overlap moe_enable_deepep moe_deepep_num_sms moe_hybridep_*
    moe_ncclep_* moe_flex_dispatcher_* moe_use_upcycling moe_upcycling_granularity moe_grad_scale_func
    moe_single_grouped_bias moe_shared_expert_glu_interleave_size moe_paged_stash* moe_combine_bwd_dtype
    moe_dispatch_fwd_dtype"""


def arguments(run: Run) -> dict[str, Only]:
    """`ROUTED` for a run; the ranks' own files have experts shared out over all ranks or some of them."""
    joined = any(f.format == "dcp" for f in run.checkpoint.files.values())
    shares = Only("experts shared out over ranks of which all else has a multiple", (run.own, None))
    return {**ROUTED, **({} if joined else {"expert_tensor_parallel_size": shares})}


def args(known: Known, *, kept: Value, experts: int, ranks: int) -> dict[str, Value]:
    """What args say of the experts, in the words of core_v0.9.0 and later."""
    why = "the architecture"
    said: dict[str, Any] = {
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_layer_freq": 1,
    }
    return {
        "num_experts": known.value("num_local_experts"),
        "moe_router_topk": known.value("num_experts_per_tok"),
        "moe_ffn_hidden_size": known.value("intermediate_size"),
        **{k: Value(v, why) for k, v in said.items()},
        "moe_grouped_gemm": Value(kept.value == GROUPED, kept.source),
        "expert_model_parallel_size": Value(experts, "ranks to write"),
        "expert_tensor_parallel_size": Value(ranks, "ranks to write"),
    }
