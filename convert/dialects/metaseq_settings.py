"""The settings of metaseq and, before it, fairseq that change nothing a forward pass computes. A setting
that is not here, that no field reads and that is switched on may: it is refused by name.

Source: facebookresearch/metaseq @809e49cf (May 2022) to @f7ffa5fd (June 2023): every dataclass of settings
and every argument, and what the decoder and its layers look up by name; facebookresearch/fairseq v0.10.2,
options.py, for what older runs carried along.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

REASONS: Mapping[str, str] = {
    "names what made it": r"""
        _name | arch | criterion | optimizer | lr_scheduler | task | bpe | tokenizer | scoring | path
        | model_overrides | user_dir""",
    "for training: dropout and how weights began": r"""
        \w*dropout\w* | \w*layerdrop | full_megatron_init(_scalar)? | megatron_init_sigma
        | pos_init_scalar | truncate_init | no_emb_dropout""",
    "for training: batches, steps and their sizes": r"""
        (max_)?(tokens|sentences)(_valid)? | max_(epoch|update) | batch_size\w* | update_freq | seed\w*
        | curriculum | required_\w*batch_size_multiple | sentence_avg | stop_(time_hours|min_lr)
        | patience | num_shards | shard_id | train_with_epoch_remainder_batch
        | skip_(batches|invalid\w+|gradient\w+) | ewm_ratio_to_skip_batch | fixed_validation_seed
        | (disable|validate)_(validation|interval\w*|after_updates) | max_valid_steps | num_workers\w*""",
    "for training: the optimizer": r"""
        lr\w* | (warmup|zero_lr_warmup)_\w+ | (min|max)_lr | (\w+_)?weight_decay | wd
        | (adam|adagrad|nag)_\w+ | use_old_adam | block_wise | momentum | clip_norm\w* | power | t_mult
        | force_anneal | end_learning_rate | total_num_update\w* | label_smoothing | ema_\w+ | store_ema""",
    "for training: how numbers are held": r"""
        (memory_efficient_)?(fp16|bf16)\w* | (min|threshold)_loss_scale | amp\w* | tpu | cpu(_offload)?
        | fp32_reduce_scatter""",
    "for training: machines and memory": r"""
        distributed_\w+ | \w*ddp\w* | device_id | local_rank | world_size | (zero|use)_shard\w+
        | pipeline_\w+ | model_parallel_size | sequence_parallel | bucket_cap_mb | broadcast_buffers
        | fix_batches_to_gpus | find_unused_parameters | fast_stat_sync | gradient_predivide_factor
        | heartbeat_timeout | nprocs_per_node | all_gather_list_size | empty_cache_freq
        | no_reshard_after_forward | \w*checkpoint\w* | (slowmo|localsgd)_\w+ | offload_activations
        | min_params_to_wrap | recompute_fc1_num_layers | tensor_parallel_init_model_on_gpu | xf_attn_op
        | attn_variant | use_plasma_view | plasma_path | cluster_env""",
    "for training: data": r"""
        data\w* | \w*subset\w* | \w*vocab_filename | merges_filename | hf_tokenizer | (bpe|gpt2)_\w+
        | dict_size | (end_of_document|eod)_symbol | final_vocab_size | output_dictionary_size
        | sample_break_mode | shorten_\w+ | tokens_per_sample | max_source_positions | pad_to_fixed_\w+
        | shuffle_docs | multicorpus_\w+ | cm3_\w+ | language_modeling_type | add_bos_token
        | (self|future|past)_target""",
    "for training: logs and files": r"""
        log_\w+ | quiet\w* | no_progress_bar | (new_)?profiler? | \w*tensorboard\w*
        | (aim|wandb|azureml)_\w+ | dont_log_\w+ | save_\w+ | no_save\w* | keep_\w+ | no_\w+_checkpoints
        | restore_file | finetune_from_model | reset_\w+ | optimizer_overrides | local_save_\w+
        | (cloud|nfs)_\w+ | write_\w+ | maximize_\w+ | results_path | target_world_size | do_pad
        | benchmark""",
    "for generation": r"""
        beam | nbest | max_len_[ab] | min_len | sampling\w* | temperature | buffer_size | input
        | no_seed_provided | context_window | softmax_batch | score_sequences | output_word_\w+""",
    "read beside another that is switched on": r"""
        adaptive_(input|softmax)_factor | character_(embedding_dim|filters)
        | char_embedder_highway_layers | base_(sublayers|shuffle) | quant_noise_pq_block_size""",
}
# Values that switch nothing on, beside null, false, 0 and no text: -1 is no id of a document's end
OFF: Mapping[str, Any] = {"self_attn_doc_sep": -1}


def _without_effect(name: str) -> bool:
    return any(re.fullmatch(names, name, re.VERBOSE | re.ASCII) for names in REASONS.values())


def unread(told: Mapping[str, Any], read: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The settings that are switched on, that no field reads and that are on no list."""
    for name, value in told.items():
        off = value in (None, False, 0, "", "None", "none") or (name in OFF and value == OFF[name])
        if name not in read and not off and not _without_effect(name):
            yield name, value
