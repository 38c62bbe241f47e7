"""Llama 1, 2, 3.x (text) and Code Llama as Meta published them: `consolidated.NN.pth`, one file per rank.

Source: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288), Grattafiori et al. 2024 (arXiv 2407.21783), and
Meta's code: meta-llama/llama @57b0eb62 (1) and @689c7f26 (2), meta-llama/codellama @077f7332,
meta-llama/llama-models @43e87a37 (3.x).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from ckpt_tool.reference import decoder, megatron_core
from ckpt_tool.reference.decoder import Names
from ckpt_tool.reference.facts import Shapes, fact, first, one_of, only, opened, refuse, settings, strange
from ckpt_tool.reference.rope import RopeScaling

NAMES = Names(
    word="tok_embeddings.weight",
    block="layers.",
    norm_1="attention_norm.",
    qkv=("attention.wq.", "attention.wk.", "attention.wv."),
    out="attention.wo.",
    norm_2="ffn_norm.",
    units=("feed_forward.w1.", "feed_forward.w3."),
    down="feed_forward.w2.",
    final_norm="norm.",
    output="output.weight",
)


# Settings of programs that read such files (llama, llama-models, codellama, mistral-inference and -finetune,
# executorch, llama2.c): those that sizes follow from, which the tensors have; those of a run, of training
# (`lora`: factors, merged in where weights are whole) and of sampling; and ids of the tokenizer.
SIZES = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "hidden_dim",
    "vocab_size",
    "multiple_of",
) + (
    "ffn_dim_multiplier",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
)
RUNS = (
    "max_batch_size",
    "max_seq_len",
    "max_context_len",
    "eval_batch_size",
    "use_kvcache",
    "use_kv_cache",
) + (
    "use_cache",
    "use_sdpa_with_kv_cache_op",
    "use_flash_attn",
    "generate_full_logits",
    "enable_dynamic_shape",
    "ragged_attention",
    "vocab_parallel",
    "model_parallel_size",
    "dtype",
    "torch_dtype",
    "temperature",
    "top_k",
    "top_p",
)
TRAINING = ("dropout", "attention_dropout", "initializer_range", "init_std", "depth_init") + (
    "gradient_checkpointing",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "lora",
)
WORDS = ("bos_idx", "eos_idx", "bos_count", "eos_count", "bos_id", "eos_id", "pad_id") + (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
ORIGIN = ("model_type", "architectures", "_name_or_path", "transformers_version")
READ = ("norm_eps", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling")
KNOWN = frozenset((*SIZES, *RUNS, *TRAINING, *WORDS, *ORIGIN, *READ))
TIED = ("tied_embeddings", "tie_word_embeddings")
# What the settings may only say as it is computed here; nothing, where they may not say it at all.
COMPUTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("hidden_act", "activation", "act_fn"), ("silu",)),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_biases", "attention_qkv_bias"), (False,)),
    **dict.fromkeys(("use_qk_norm", "qk_norm_before_rope", "post_attention_norm", "post_ffn_norm"), (False,)),
    **dict.fromkeys(("use_hf_rope", "use_ffn_learnable_scales", "attn_temperature_tuning"), (False,)),
    **dict.fromkeys(("attention_chunk_size", "nope_layer_interval", "no_rope_layer_interval"), (0,)),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), (0,)),
    **dict.fromkeys(("partial_rotary_factor", "embedding_scale_factor", "residual_multiplier"), (1,)),
    **dict.fromkeys(("causal", "apply_embedding", "apply_output"), (True,)),
    **dict.fromkeys(("norm_topk_prob", "moe.norm_topk_prob"), (True,)),
    **dict.fromkeys(("vision_chunk_size", "vision_num_cross_attention_layers"), (-1, 0)),
    "vision_max_num_chunks": (4, 0),
    "floor_scale": (8192,),
    "attn_scale": (0.1,),
    "norm_type": ("rmsnorm",),
    "pretraining_tp": (1,),
    "is_eagle": (False,),
}
STRETCH = {
    "factor": ("rope_scaling_factor", "rope_scale_factor"),
    "low": ("rope_low_freq_factor", "low_freq_factor"),
    "high": ("rope_high_freq_factor", "high_freq_factor"),
    "original_context": ("original_max_position_embeddings", "old_context_len"),
}
OF_META = frozenset(("use_scaled_rope", "rope_freq_base", *(n for names in STRETCH.values() for n in names)))


def check(params: Mapping[str, Any], overrides: Mapping[str, Any], more: frozenset[str]) -> None:
    """ValueError for settings with which the model is another than the one computed here. `more` are read
    by a family, and null in `overrides` leaves a name out that is not known; a document without any size is
    none of settings, but whatever a file of weights carries."""
    if params.get("dim") is None and params.get("hidden_size") is None:
        return
    nulls = {name for name, told in overrides.items() if told is None}
    refuse([*only(params, COMPUTED), *strange(params, {*KNOWN, *TIED, *COMPUTED, *more, *nulls})])


def names_of(params: Mapping[str, Any], overrides: Mapping[str, Any], shapes: Shapes) -> Names:
    """The embedding is the head where that is said and no other is there."""
    tied = overrides.get("tie_word_embeddings")
    tied = one_of(params, *TIED) if tied is None else tied
    return replace(NAMES, output=NAMES.word) if tied and NAMES.output not in shapes else NAMES


def numbers(params: Mapping[str, Any], overrides: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """Those that params.json of Meta and of Mistral AI have alike; `theta` where none is told."""
    dim = int(fact("dim", "hidden_size", params, overrides))
    n_heads = int(fact("n_heads", "num_attention_heads", params, overrides))
    return {
        "n_layers": int(fact("n_layers", "num_hidden_layers", params, overrides)),
        "dim": dim,
        "n_heads": n_heads,
        "n_kv_heads": int(fact("n_kv_heads", "num_key_value_heads", params, overrides, n_heads)),
        "head_dim": int(fact("head_dim", "head_dim", params, overrides, dim // n_heads)),
        "norm_eps": float(fact("norm_eps", "rms_norm_eps", params, overrides)),
        "rope_theta": float(fact("rope_theta", "rope_theta", params, overrides, theta)),
    }


class Config(decoder.Config):
    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` is params.json, `shapes` those of rank 0, `overrides` facts from the user under their
        Hugging Face names, which win. ValueError for what none of them tells."""
        if megatron_core.words_of(shapes) is not None:
            return cls(**megatron_core.made(params, shapes, ranks, overrides))
        params, overrides = settings(opened(params), overrides), settings(overrides)
        check(params, overrides, OF_META)
        # Llama 1 and 2 have 10000 in the code and Code Llama as default, Llama 3's code defaults to 500000;
        # only Llama 3 has the 128000 words of its tokenizer, and more, or knows `use_scaled_rope`.
        words = shapes.get("output.weight", shapes.get("tok_embeddings.weight", (0,)))[0] * ranks
        newer = words >= 128000 or params.get("use_scaled_rope") is not None
        if overrides.get("rope_theta") is None:
            params = {**params, "rope_theta": one_of(params, "rope_theta", "rope_freq_base")}
        made = numbers(params, overrides, 500000.0 if newer else 10000.0)
        scaling = _rope_scaling(params, overrides, made["dim"], made["n_layers"])
        windows, names = (None,) * made["n_layers"], names_of(params, overrides, shapes)
        return cls(**made, windows=windows, rope_scaling=scaling, names=names)


def _rope_scaling(
    params: Mapping[str, Any], overrides: Mapping[str, Any], dim: int, n_layers: int
) -> RopeScaling | None:
    if "rope_scaling" in overrides:
        return RopeScaling.from_hf(overrides["rope_scaling"] or {}, overrides.get("max_position_embeddings"))
    said = {part: first(*map(overrides.get, names)) for part, names in STRETCH.items()}
    told = {p: one_of(params, *names) if said[p] is None else said[p] for p, names in STRETCH.items()}
    told = {part: float(value) for part, value in told.items() if value is not None}
    switch, block = params.get("use_scaled_rope"), params.get("rope_scaling")
    if block is not None:
        found = RopeScaling.from_hf(block)
        if switch is False or any(found is None or getattr(found, k) != v for k, v in told.items()):
            raise ValueError(f"expected one scaling, found rope_scaling {block} and another")
        return found
    if told and switch is None:
        raise ValueError(f"expected `use_scaled_rope` beside {', '.join(told)} of a scaling, found none")
    if not switch:
        return None
    # Most params.json have no factor. Meta's code says 8 for every model, but 3.2 1B and 3B were trained with
    # 32 (llama-models issues 166 and 241, and their config.json on the Hub).
    usual = 32.0 if (dim, n_layers) in ((2048, 16), (3072, 28)) else 8.0
    return RopeScaling(**{"factor": usual, **told})
