"""What the documents beside Megatron-Core's weights say of a model, as facts for a reading: Megatron-Bridge's
run_config.yaml, NeMo 2's context/model.yaml, NeMo 1's model_config.yaml, each parsed by the caller.

Source: NVIDIA-NeMo/Megatron-Bridge @067f987d (models/gpt_provider.py), NVIDIA/NeMo v2.4.0
(megatron_gpt_model.py, collections/llm/gpt/model: apply_rope_scaling).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tool.reference.facts import first

# Our names, and those of Megatron-Core's TransformerConfig and of NeMo 1.
SAME = """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels layernorm_epsilon rotary_base
    rotary_interleaved qk_layernorm window_size softmax_type softmax_scale attention_output_gate
    qk_l2_norm multi_latent_attention experimental_attention_variant linear_attention_freq
    is_hybrid_model no_rope_freq mtp_num_layers use_mup mrope_section glu_linear_offset
    activation_func_clamp_value layernorm_zero_centered_gamma max_position_embeddings vocab_size
"""


def facts_of(documents: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of the documents that are there, under the names of args; the first that tells one counts.
    Nothing without any. ValueError for a model whose class or block does more than its fields say."""
    found: dict[str, Any] = {}
    for name, read in READERS.items():
        if isinstance(documents.get(name), Mapping):
            found = {**read(documents[name]), **found}
    return found


def _bridge(document: Mapping[str, Any]) -> dict[str, Any]:
    model = document["model"]
    return _fields({**model, **(model.get("transformer") or {})})


def _nemo_2(document: Mapping[str, Any]) -> dict[str, Any]:
    return _fields(document["config"])


def _fields(said: Mapping[str, Any]) -> dict[str, Any]:
    made = {n: said[n] for n in SAME.split() if said.get(n) is not None}
    made["num_query_groups"] = first(said.get("num_query_groups"), said.get("num_attention_heads"))
    made["num_experts"] = said.get("num_moe_experts")
    made["hidden_act"] = _called(said.get("activation_func"))
    made["swiglu"] = said.get("gated_linear_unit")
    made["normalization"], made["add_bias_linear"] = said.get("normalization"), said.get("add_bias_linear")
    made["add_qkv_bias"] = said.get("add_qkv_bias")
    made["position_embedding_type"] = said.get("position_embedding_type")
    made["rotary_percent"] = said.get("rotary_percent")
    made["rotary_seq_len_interpolation_factor"] = said.get("seq_len_interpolation_factor")
    made["tie_word_embeddings"] = said.get("share_embeddings_and_output_weights")
    if said.get("rope_scaling") and said.get("scale_factor"):
        raise ValueError("expected frequencies that are stretched once, found rope_scaling and scale_factor")
    if said.get("rope_scaling"):
        made["rope_scaling"] = _stretched(first(said.get("rope_scaling_factor"), 8))
    if said.get("scale_factor"):
        made["rope_scaling"] = _stretched(said["scale_factor"], said)
    return {k: v for k, v in made.items() if v is not None}


def _nemo_1(said: Mapping[str, Any]) -> dict[str, Any]:
    if "num_layers" not in said:  # a document of the whole run, or Lightning's
        said = first(said.get("model"), said.get("cfg")) or said
    said = {**said, **(said.get("mcore_customization_config") or {})}
    made = {n: said[n] for n in SAME.split() if said.get(n) is not None and not _refers(said[n])}
    made["layernorm_epsilon"] = first(made.get("layernorm_epsilon"), 1e-5)
    made["rotary_base"] = first(made.get("rotary_base"), 10000)
    made["num_query_groups"] = first(said.get("num_query_groups"), said.get("num_attention_heads"))
    made["num_experts"] = said.get("num_moe_experts")
    activation = str(first(said.get("activation"), "gelu"))
    made["swiglu"] = activation.endswith("glu")
    made["hidden_act"] = {"swiglu": "silu", "fast-swiglu": "silu"}.get(activation, activation)
    norm = str(first(said.get("normalization"), "layernorm")).lower()
    made["normalization"] = {"rmsnorm": "RMSNorm"}.get(norm, norm)
    made["add_bias_linear"] = first(said.get("bias"), True)
    made["add_qkv_bias"] = first(said.get("qkv_bias"), False)
    made["position_embedding_type"] = first(said.get("position_embedding_type"), "learned_absolute")
    made["rotary_percent"] = first(said.get("rotary_percentage"), 1.0)
    made["rotary_seq_len_interpolation_factor"] = said.get("seq_len_interpolation_factor")
    made["tie_word_embeddings"] = first(said.get("share_embeddings_and_output_weights"), True)
    if said.get("scale_positional_embedding"):
        made["rope_scaling"] = _stretched(first(said.get("scale_factor"), 8), said)
    if said.get("apply_embedding_scaling"):
        raise ValueError("expected words as they are, found `apply_embedding_scaling`")
    return {k: v for k, v in made.items() if v is not None}


def _refers(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("${")


def _called(value: Any) -> str:
    """The last part of a function's name."""
    name = value.get("_target_") if isinstance(value, Mapping) else value
    return str(name).rpartition(".")[2]


def _stretched(factor: Any, said: Mapping[str, Any] | None = None) -> dict[str, Any]:
    said = said or {}
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": first(said.get("low_freq_factor"), 1),
        "high_freq_factor": first(said.get("high_freq_factor"), 4),
        "original_max_position_embeddings": first(said.get("old_context_len"), 8192),
    }


READERS = {"run_config.yaml": _bridge, "context/model.yaml": _nemo_2, "model_config.yaml": _nemo_1}
