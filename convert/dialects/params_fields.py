"""The fields of params.json that no number is read from: those that change nothing, those that stand at their
default, and all others, which are refused by name. A field that nobody here knows may well change what the
model computes, and no tensor would show it.

Sources: the arguments that the programs which read such a file have, with their defaults: meta-llama/llama,
codellama and llama-models (llama3 and llama4 `args.py`), mistralai/mistral-inference and mistral-finetune
(`args.py`), pytorch/executorch (`model_args.py`), karpathy/llama2.c; and config.json, copied by some.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckpt_tool.convert.params import Facts, left_out, shown
from ckpt_tool.errors import printable

RUN, SAMPLING, TRAINING, IDS, NAMED = (
    "how a program runs, not what the model computes",
    "how words are drawn from what the model computes",
    "for training only",
    "ids are those of the tokenizer",
    "names where the file is from",
)
_OF_RUNS = (
    "max_batch_size",
    "max_seq_len",
    "max_context_len",
    "eval_batch_size",
    "use_kvcache",
    "use_kv_cache",
    "use_cache",
    "use_sdpa_with_kv_cache_op",
    "generate_full_logits",
    "enable_dynamic_shape",
    "ragged_attention",
    "vocab_parallel",
    "model_parallel_size",
    "use_flash_attn",
    "dtype",
    "torch_dtype",
    "vocab_size",  # of -1: left to the tokenizer
    "model_type",  # looked at where the file is opened
)
_OF_TRAINING = (
    "dropout",
    "attention_dropout",
    "initializer_range",
    "init_std",
    "depth_init",
    "gradient_checkpointing",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
)
_OF_TOKENIZERS = ("bos_idx", "eos_idx", "bos_count", "eos_count", "bos_id", "eos_id", "pad_id") + (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
HARMLESS: Mapping[str, str] = {
    **dict.fromkeys(_OF_RUNS, RUN),
    **dict.fromkeys(("temperature", "top_k", "top_p"), SAMPLING),
    **dict.fromkeys(_OF_TRAINING, TRAINING),
    **dict.fromkeys(_OF_TOKENIZERS, IDS),
    **dict.fromkeys(("_name_or_path", "transformers_version"), NAMED),
}

OFF = (False, 0)
# mistral-finetune writes with every checkpoint how it was trained, with factors or without, which are merged
# into weights that it saves whole. Names of factors among the tensors are refused elsewhere.
FACTORS = ("enable", "rank", "dropout", "scaling")
LATENT = "queries, keys and values are made of smaller vectors (multi-head latent attention)"
# By field: what it does, and the values with which it does nothing.
OTHER_MODELS: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "use_qk_norm": ("queries and keys are normalised", OFF),
    "qk_norm_before_rope": ("queries and keys are normalised", OFF),
    "attention_chunk_size": ("a token sees its own chunk only", OFF),
    "nope_layer_interval": ("some layers do not turn queries and keys", OFF),
    "no_rope_layer_interval": ("some layers do not turn queries and keys", OFF),
    "attn_temperature_tuning": ("queries grow with their position", OFF),
    "floor_scale": ("queries grow with their position", (8192,)),
    "attn_scale": ("queries grow with their position", (0.1,)),
    "use_hf_rope": ("queries and keys lie in halves of a head, not in pairs of channels", OFF),
    "partial_rotary_factor": ("only some channels of a head are turned", (1,)),
    "final_logit_softcapping": ("logits are capped", OFF),
    "attn_logit_softcapping": ("scores are capped", OFF),
    "attention_qkv_bias": ("the projections have biases", OFF),
    "use_biases": ("the projections have biases", OFF),
    "post_attention_norm": ("there are more norms", OFF),
    "post_ffn_norm": ("there are more norms", OFF),
    "use_ffn_learnable_scales": ("the feed-forward is scaled", OFF),
    "embedding_scale_factor": ("the embedding is scaled", (1,)),
    "residual_multiplier": ("branches are scaled", (1,)),
    "norm_type": ("the norms are others", ("rmsnorm",)),
    "causal": ("a token sees those after it", (True,)),
    "apply_embedding": ("this is a part of a model", (True,)),
    "apply_output": ("this is a part of a model", (True,)),
    "vision_chunk_size": ("the model sees images", (-1, *OFF)),
    "vision_max_num_chunks": ("the model sees images", (4, *OFF)),
    "vision_num_cross_attention_layers": ("the model sees images", (-1, *OFF)),
    "is_eagle": ("the model only drafts for another", OFF),
    "q_lora_rank": (LATENT, OFF),
    "kv_lora_rank": (LATENT, OFF),
    "qk_nope_head_dim": (LATENT, OFF),
    "qk_rope_head_dim": (LATENT, OFF),
    "v_head_dim": (LATENT, OFF),
    "moe": ("there are experts", OFF),
    "norm_topk_prob": ("the chosen experts do not share one whole", (True,)),
    "moe.norm_topk_prob": ("the chosen experts do not share one whole", (True,)),
}


def check_unread(facts: Facts) -> list[str]:
    """Collect a problem for each field that nothing read and that is not known to change nothing; notes on
    unknown ones that are off. To be called when all that is read has been."""
    notes = []
    for key, value in (facts.document or {}).items():
        if key in facts.used or key in HARMLESS or value is None or value in ("", [], {}):
            continue
        if key in OTHER_MODELS:
            effect, defaults = OTHER_MODELS[key]
            if value not in defaults:
                usual = "none" if defaults is OFF else json.dumps(defaults[0])
                message = f"expected {usual}, found {shown(value)}, with which {effect}"
                facts.refuse("unsupported", message, key)
        elif key == "lora" and isinstance(value, dict) and value.keys() <= set(FACTORS):
            said = "is of the training run; the weights hold no factors, or have them merged in"
            notes.append(f"{facts.file}: lora = {shown(value)} {said}")
        elif key in unknown_set_to_null(facts):
            notes.append(left_out(facts.file, key, value))
        elif value in OFF:
            notes.append(f"{facts.file}: {printable(key)} = {shown(value)} is not known, and taken as off")
        elif "." in key or isinstance(value, dict):
            facts.refuse("unsupported", f"expected a plain text model, found {key} = {shown(value)}", key)
        else:
            message = f"expected fields that are known here, found {printable(key)} = {shown(value)}"
            hint = f"--set {printable(key)}=null leaves it out, if the model computes the same without it"
            facts.refuse("unsupported", message, key, hint)
    return notes


def unknown_set_to_null(facts: Facts) -> set[str]:
    """The fields that nobody here knows and that the user leaves out. One that is known to make another model
    cannot be left out."""
    told = {k for k, v in (facts.document or {}).items() if "." not in k and not isinstance(v, dict)}
    nulls = {k for k, v in facts.settings.items() if v is None}
    return nulls & told - facts.used - HARMLESS.keys() - OTHER_MODELS.keys()
