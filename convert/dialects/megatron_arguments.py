"""Every argument of a Megatron run: read by the tables, without an effect on the model, at the value that the
tables take for granted, switched off, or refused by name.

A checkpoint holds all arguments of the run that saved it, some hundreds by 2024, and any of them may change
what its tensors compute. The lists say of each what it is, after NVIDIA/Megatron-LM v1.0, v2.0, v2.5, 23.06,
core_v0.4.0 to core_v0.19.0 (megatron/arguments.py, megatron/training/arguments.py, megatron/training/config,
core/transformer/transformer_config.py, core/model_parallel_config.py), with loggers that forks add. A name
that no list has is refused unless its value switches it off: forks add arguments, and only their users know
what they do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import translate
from functools import cache
from typing import Any

from ckpt_tool.checkpoint.megatron import every_argument
from ckpt_tool.convert.dialects.megatron_ranks import Run
from ckpt_tool.convert.params import Facts, left_out, shown
from ckpt_tool.errors import Problem, printable
from ckpt_tool.records import dataclass

# Read by a field or a rule of the dialects.
READ = """
num_layers hidden_size num_attention_heads ffn_hidden_size kv_channels max_position_embeddings
padded_vocab_size make_vocab_size_divisible_by orig_vocab_size vocab_size tokenizer_type layernorm_epsilon
norm_epsilon bias_gelu_fusion openai_gelu onnx_safe rotary_base untie_embeddings_and_output_weights
group_query_attention num_query_groups model_parallel_size tensor_model_parallel_size
pipeline_model_parallel_size virtual_pipeline_model_parallel_size intermediate_size bert_binary_head
params_dtype fp16 bf16 use_rope_scaling rope_scaling_factor stretched_frequencies num_experts num_moe_experts
moe_router_topk moe_ffn_hidden_size
"""

# Why arguments have no effect on what the saved tensors compute, and which; `*` stands for anything.
HARMLESS = {
    "how the layers were shared out, which the files tell themselves": """
        decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
        pipeline_model_parallel_layout account_for_*_in_pipeline_split
        num_layers_per_virtual_pipeline_stage standalone_embedding_stage
        num_virtual_stages_per_pipeline_rank pipeline_model_parallel_* encoder_num_layers
        decoder_num_layers encoder_*_model_parallel_size transformer_pipeline_model_parallel_size
        first_pipeline_num_layers last_pipeline_num_layers num_layers_in_*_pipeline_stage
        microbatch_group_size_per_vp_stage sequence_parallel context_parallel_size
        hierarchical_context_parallel_sizes expert_*_parallel_size data_parallel*
        use_tp_pp_dp_mapping cp_comm_type hybrid_context_parallel max_seqlen_per_dp_cp_rank
        scatter_gather_tensors_in_pipeline *gtp_weight_remat_size *_num_weight_shards mtp_standalone
        """,
    "the training: optimizer, schedule, batches, precision of its sums": """
        optimizer optimizer_* adam_* sgd_* lion_* muon_* soap_* weight_decay* *_weight_decay
        apply_wd_* wd_* no_weight_decay_* lr lr_* min_lr decoupled_* *_lr_scheduler
        *_opt_param_scheduler warmup head_lr_mult clip_grad train_* *_batch_size rampup_batch_size
        step_batch_size_schedule batch_size decrease_batch_size_if_needed loss_scale* *_loss_scale
        min_scale hysteresis dynamic_loss_scale exp_avg_* main_*_dtype megatron_fsdp_*
        use_precision_aware_optimizer accumulate_allreduce_* *_in_fp32 grad_* gradient_* fp32_*
        *cross_entropy* use_distributed_optimizer num_distributed_optimizer_instances consumed_*
        skipped_* iteration* curr_iteration do_train do_valid do_test eval_* skip_train
        full_validation multiple_validation_sets start_eval_at_iter validation_set_names test_mode
        exit_* freeze_* finetune calculate_per_token_loss *_dropout *_dropout_rate drop_path_rate
        num_floating_point_operations_so_far check_* result_rejected_* error_injection_* rerun_*
        iter_per_epoch wsd_decay_steps finalize_model_grads_func no_sync_func param_sync_func
        deep_init phase_transition_iterations dump_* qk_clip* z_loss_* kd_* logits_save_*
        logits_load_* rl_* grpo_* langrl_* perform_rl_step refit_method sft sft_* dpo_* kl_*
        *init_method* init_model_* perform_initialization use_cpu_initialization lazy_mpu_init
        data_parallel_random_init seed *_seed *rng* offset_sampling_seed_by_dp_rank
        start_weight_decay end_weight_decay override_* use_checkpoint_*
        """,
    "memory, kernels and messages between devices: the same sums, rounded elsewhere": """
        *_fusion *_fused *recompute* checkpoint_activations checkpoint_num_layers distribute_*
        activations_checkpoint_* cpu_optimizer cpu_torch_adam no_async_*
        *overlap* *cuda_graph* *offload* tp_comm_* tp_only_amax_red ddp_* DDP_impl *_ddp *fsdp*
        nccl_* *_nccl distributed_* local_rank rank world_size use_ring_exchange_p2p batch_p2p_*
        deallocate_* defer_* delay_* wgrad_* align_* async_tensor_model_parallel_allreduce barrier_*
        clone_scatter_* empty_unused_memory_level enable_gloo_process_groups use_gloo_process_groups
        *flash_* use_flash_attn attention_backend transformer_impl use_mcore_models
        use_legacy_models deprecated_use_mcore_models no_persist_layer_norm persist_layer_norm
        memory_efficient_layer_norm manual_gc* high_priority_* deterministic_mode
        batch_invariant_mode disable_bf16_reduced_precision_matmul disable_symmetric_registration
        disable_jit_fuser disable_mamba_mem_eff_path disable_chunked_prefill
        disable_straggler_on_startup enable_experimental use_mamba_mem_eff_path *te_rng_tracker
        apply_query_key_layer_scaling variable_seq_lengths parallel_output symmetric_ar_type
        use_transformer_engine_op_fuser use_te_activation_func te_precision_config_file
        flight_recorder_* create_all_gather_group suggested_communication_unit_size use_sharp
        sharp_* *_use_persist_buf_* keep_fp8_transpose_cache* reuse_grad_buf_*
        enable_full_sharding_in_hsdp outer_dp_sharding_strategy use_layer_wise_param_layout
        replication* fake_process_group pin_cpu_* use_torch_* enable_autocast autocast_dtype
        pipeline_dtype *_transpose_cache* use_grouped_gemm_for_* use_kitchen* kitchen_*
        fine_grained_* min_offloaded_tensor_size num_microbatches_with_* nvtx_ranges
        fused_residual_rmsnorm fused_single_qkv_rope use_flashinfer_fused_rope
        use_inference_optimized_layers
        """,
    "training with numbers of 8 or 4 bits: the saved weights are the whole model's": """
        fp8 fp8_* fp4 fp4_* first_last_layers_bf16 num_layers_at_*_in_bf16 quant_recipe
        *_quantizer_factory activation_func_fp8_input_store
        """,
    "the data and its tokenizer": """
        data_* *_data *data_path *data_args_path split dataloader_* num_workers
        num_dataset_builder_threads seq_length *_seq_length short_seq_prob mask_prob mask_factor
        mask_type sample_rate mmap_* *reset_position_ids *reset_attention_mask eod_mask_loss
        create_attention_mask_in_dataloader fim_* mock_data vocab_file merge_file vocab_extra_ids
        tokenizer_* *_tokenizer tokenizer tiktoken_* trust_remote_code pad_vocab_size special_tokens
        metadata_path chat_template null_tokenizer_* allow_ambiguous_pad_tokens *_cache_path
        mid_level_dataset_surplus renormalize_blend_weights per_dataset_* extra_vocab_size text_key
        loose_json presplit_sentences lazy_loader shuffle delim input_data_sizes_file
        resume_dataloader use_npy_data_loader split_valid batch_size_thresholds
        max_num_samples *_preds_per_seq data_epochs query_in_block_prob use_one_sent_docs cache_dir
        eos_token eod_token
        """,
    "files, checkpoints and how they were saved": """
        save save_* load load_* no_save_* no_load_* ckpt_* dist_ckpt_* use_dist_ckpt*
        *checkpoint_args pretrained_checkpoint exit_on_missing_checkpoint auto_detect_ckpt_format
        async_* non_persistent_* most_recent_k fully_parallel_* strict_fsdp_dtensor_load
        distrib_optim_* hetereogenous_dist_checkpoint use_persistent_ckpt_worker verify_integrity
        stream_ckpt_dequant *_msc* object_storage_cache_path hf_ckpt_path
        """,
    "logs and measurements": """
        log_* *_log_interval logging_level tensorboard_* wandb_* one_logger_* *_one_logger
        timing_* app_tag_* config_logger_dir profile profile_* use_pytorch_profiler
        use_nsys_profiler pytorch_profiler_* record_* memory_* throughput_window_size
        runtime_time_unit filter_warnings modules_to_filter set_level_for_all_loggers straggler_*
        ft_* enable_ft_package calc_ft_timeouts inprocess_* adlr_* run_workload_inspector_server
        gpu_sniff_test_interval mlflow_* comet_* aim_* *_timeout* workload_inspector_* start_time
        timers codecarbon_*
        """,
    "generating text with it": """
        inference_* max_tokens_to_oom output_bert_embeddings bert_embedder_type mlp_chunks_for_*
        enable_chunked_prefill num_speculative_tokens return_log_probs skip_prompt_log_probs
        use_legacy_static_engine nccl_all_reduce_for_prefill temperature top_k top_p greedy
        out_seq_length num_samples genfile sample_input_file sample_output_file port
        """,
    "other programs of Megatron: retrieval, images": """
        pretrained_bert report_topk_accuracies ict_* bert_load biencoder_* retriever_*
        embedding_path *_report_topk_accuracies titles_data_path indexer_* block_data_path
        evidence_data_path faiss_use_gpu vision_* dino_* swin_* img_* num_classes num_channels
        patch_dim classes_fraction *_per_class_fraction overlapping_eval
        strict_lambada cloze_eval iterations_to_skip num_epochs *keep_last valid_num_workers
        """,
    "what counts only beside an argument that is refused: another attention, more heads": """
        mtp_* retro_* mamba_* linear_conv_* linear_key_* linear_value_* linear_num_* dsa_*
        q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rotary_scaling_factor
        mscale mscale_all_dim beta_fast beta_slow original_max_position_embeddings cache_mla_latents
        mla_down_proj_fusion yarn_* relative_attention_* window_attn_skip_freq
        use_fused_weighted_squared_relu overlap_moe_* experimental_attention_variant_loss_scale_func
        csa_*
        """,
    "what counts only beside num_unique_layers": "param_sharing_style",
    "what kind of program saved it": "model_type yaml_cfg phase",
}


@dataclass(frozen=True)
class Only:
    """Values of an argument that the tables take for granted, the default first, and what others make of the
    model. `each`: a list of such values counts as well; `below`: so does a number below 0. `answerable`: what
    others do is for training, and --set NAME=null leaves it out."""

    what: str
    values: tuple[Any, ...]
    each: bool = False
    below: bool = False
    answerable: bool = False


def _off(what: str) -> Only:
    return Only(what, (None,))


# Arguments that change what the tensors of any model compute. A value that is switched off is always right
# where None is.
COMPUTED: Mapping[str, Only] = {
    "squared_relu": _off("squared ReLU"),
    "quick_geglu": _off("another gated activation"),
    "glu_linear_offset": _off("an offset in the gate"),
    "activation_func_clamp_value": _off("a clamped activation"),
    "apply_layernorm_1p": _off("norms that store their weight less one"),
    "layernorm_zero_centered_gamma": _off("norms that store their weight less one"),
    "qk_layernorm": _off("norms of queries and keys"),
    "qk_l2_norm": _off("norms of queries and keys"),
    "attention_output_gate": _off("a gate after attention"),
    "softmax_type": Only("the plain softmax", ("vanilla", None)),
    "softmax_scale": _off("a scale of its own before the softmax"),
    "multi_latent_attention": _off("latent attention"),
    "multi_query_attention": _off("shared keys and values"),
    "experimental_attention_variant": _off("another attention"),
    "linear_attention_freq": _off("layers of linear attention"),
    "window_size": Only("window", (None, [-1, -1], [-1, 0])),
    "no_rope_freq": _off("layers without rotary positions"),
    "mrope_section": _off("rotary positions in sections"),
    "num_experts": _off("experts"),
    "num_moe_experts": _off("experts"),
    "mtp_num_layers": _off("layers that predict further tokens"),
    "retro_add_retriever": _off("retrieval"),
    "is_hybrid_model": _off("layers of another kind"),
    "hybrid_override_pattern": _off("layers of another kind"),
    "hybrid_layer_pattern": _off("layers of another kind"),
    "hybrid_attention_ratio": _off("layers of another kind"),
    "hybrid_mlp_ratio": _off("layers of another kind"),
    "heterogeneous_layers_config_path": _off("layers that differ"),
    "heterogeneous_layers_config_encoded_json": _off("layers that differ"),
    "heterogeneous_block_specs": _off("layers that differ"),
    "use_mup": _off("factors of a width that was scaled up"),
    **dict.fromkeys(
        ("mup_width_mult", "mup_embedding_mult", "mup_output_mult", "mup_attn_scale_power"),
        Only("no factors of a width that was scaled up", (1.0, None)),
    ),
    "mup_base_hidden_size": _off("factors of a width that was scaled up"),
    "mup_base_head_dim": _off("factors of a width that was scaled up"),
}

# Of models with learned positions and a gelu; arguments of rotary positions say nothing there.
LEARNED: Mapping[str, Only] = {
    **COMPUTED,
    "swiglu": _off("a gated feed-forward"),
    "gated_linear_unit": _off("a gated feed-forward"),
    "normalization": Only("norms with means and biases", ("LayerNorm", None)),
    "position_embedding_type": Only("learned positions", ("learned_absolute", None)),
    "add_position_embedding": Only("learned positions", (True, None)),
    "use_rotary_position_embeddings": _off("rotary positions"),
    "add_bias_linear": Only("biases", (True, None)),
}
UNUSED_BY_LEARNED = (
    "rotary_* use_rope_scaling rope_* no_rope_freq mrope_section apply_rope_fusion add_qkv_bias moe_*"
)

# Of gated decoders with rotary positions and biases for query, key and value.
GATED: Mapping[str, Only] = {
    **COMPUTED,
    "swiglu": Only("a gated feed-forward", (True, None)),
    "gated_linear_unit": Only("a gated feed-forward", (True, None)),
    # of Megatron-LLM (epfLLM), whose feed-forward has ups before gates
    "glu_activation": Only("gates before ups (swiglu)", (None,)),
    "activation_func": Only("SiLU in the gate", ("silu", None)),
    "normalization": Only("norms without means", ("RMSNorm", None)),
    "add_bias_linear": Only("no biases", (False, None)),
    "add_qkv_bias": Only("biases for query, key and value", (True, None)),
    "position_embedding_type": Only("rotary positions", ("rope", None)),
    "rope_type": Only("rotary positions", ("rope", None)),
    "rotary_percent": Only("rotary positions on all channels", (1.0,)),
    "rotary_interleaved": _off("rotary positions on neighbouring channels"),
    "rotary_seq_len_interpolation_factor": Only("positions that are divided", (None, 1)),
}
# It has no effect in Megatron-Core: from 0.4.0 on its layers do not look at it; those of 0.3.0 do, where
# norms are inside linear_qkv and linear_fc1, so that what is added is the unnormalised input either way.
# Layers that read it beside norms of their own, in no release, called the second post_self_attn_layernorm,
# as no table does.
UNUSED_BY_CORE = "apply_residual_connection_post_layernorm"
# The others are of learned positions.
UNUSED_BY_GATED = f"{UNUSED_BY_CORE} add_position_embedding use_rotary_position_embeddings"
UNUSED_BY_DENSE = "moe_*"
# Older code adds what the norm gives.
RESIDUAL = {
    "apply_residual_connection_post_layernorm": _off("branches added to the normalised input"),
}


@cache
def _pattern(words: str) -> re.Pattern[str]:
    return re.compile("|".join(translate(w) for w in words.split()))


_KNOWN = " ".join((READ, *HARMLESS.values()))


def is_off(value: object) -> bool:
    """Whether a value switches its argument off: None, false, 0, "" or nothing but those."""
    if isinstance(value, list | tuple):
        return all(map(is_off, value))
    return value is None or (isinstance(value, bool | int | float | str | dict) and not value)


def refuse_others(facts: Facts, run: Run, only: Mapping[str, Only], unused: str) -> list[str]:
    """Collect a problem for each argument of any file that is not as `only` has it, or that nothing here
    knows; `unused` names those that such a model does not read. Notes on what the user answers for: a name
    that nothing knows is left out where --set says null."""
    notes: dict[str, None] = {}
    once = Only(
        "as many as there are layers", (run.args.get("num_layers"), None)
    )  # of 2020, all of them by default
    only = {**only, "num_unique_layers": once}
    for file, own, name, value in _every(run):
        if _pattern(unused).match(name):
            continue
        if name in only:
            if _fits(value, only[name]):
                continue
            if only[name].answerable and facts.settings.get(name, value) is None:
                notes[left_out(file, own, value)] = None
                continue
            hint = f"--set {name}=null leaves it out of the model" if only[name].answerable else None
            message = _said(only[name], own, value)
            facts.problems.append(Problem("unsupported", message, file, own, hint))
        elif is_off(value) or _pattern(_KNOWN).match(name):
            continue
        elif facts.settings.get(name, value) is None:
            notes[left_out(file, own, value)] = None
        else:
            message = f"expected an argument that is known here, found {printable(own, 60)} = {shown(value)}"
            hint = f"if it changes nothing that the model computes, --set {printable(name, 60)}=null"
            facts.problems.append(Problem("unsupported", message, file, printable(own, 60), hint))
    return [*notes]


def answered_for(facts: Facts, run: Run, only: Mapping[str, Only]) -> set[str]:
    """Settings that leave an argument out."""
    left_out = {name for name, value in facts.settings.items() if value is None}
    kept = {name for name, wanted in only.items() if not wanted.answerable}
    return left_out & {name for _, _, name, _ in _every(run)} - kept


def _every(run: Run) -> Iterator[tuple[str, str, str, object]]:
    """(where it is said, its name there, its name among args, value) of the arguments in the files, each with
    each value that it has in one of them, and of those in documents."""
    said: dict[str, list[object]] = {}
    for held in run.checkpoint.files.values():
        for name, value in (every_argument(held) or {}).items():
            if value not in said.setdefault(name, []):
                said[name].append(value)
                yield "args", name, name, value
    for file, args, called in run.elsewhere:
        yield from ((file, called.get(name, name), name, value) for name, value in args.items())


def _fits(value: object, wanted: Only) -> bool:
    if wanted.each and isinstance(value, list) and value:
        return all(_fits(v, replace(wanted, each=False)) for v in value)
    if wanted.below and isinstance(value, int | float) and value < 0:
        return True
    if wanted.values[0] is None and is_off(value):
        return True
    return any(value == v and isinstance(value, bool) is isinstance(v, bool) for v in wanted.values)


def _said(wanted: Only, name: str, value: object) -> str:
    default = wanted.values[0]
    bare = re.sub(r"^(an? |the )", "", re.sub(r"^another ", "other ", wanted.what))
    asked = f"no {bare}" if default is None else f"{wanted.what} ({shown(default)})"
    return f"expected {asked}, found {name} = {shown(value)}"


def notes_on_precision(run: Run) -> list[str]:
    """Training in 8 or 4 bits rounds what the model computed and not what was saved."""
    names = ("fp8", "fp8_e4m3", "fp8_hybrid", "fp4")
    found = next(((n, run.args[n]) for n in names if not is_off(run.args.get(n))), None)
    if found is None:
        return []
    return [f"args: {found[0]} = {shown(found[1])}: the run multiplied in fewer bits; the weights are whole"]
