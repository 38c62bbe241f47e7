"""Keys of a config.json that no forward pass reads. A key that is on neither list, the pass's own and this
one, and that is switched on may change what the model computes: leaving it out would be a guess.

Source: the documentation of PretrainedConfig and of the configurations of decoders in transformers 4.57,
which says of each argument what it is for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# By what they are for: names and versions, token ids, training, heads that are not read, running and loading,
# generation.
NOT_FOR_A_PASS = re.compile(
    r"""
    model_type | architectures | _?name_or_path | _commit_hash | transformers(_version | \.js_config)
    | (tokenizer | processor)_class | (torch_)?dtype | finetuning_task | task_specific_params | unsloth_\w+
    | (bos | eos | pad | unk | sep | cls | mask | decoder_start)_token_id | vocab_size
    | \w*dropout\w* | \w+_pdrop | layerdrop | init_std | initializer_range | gradient_checkpointing
    | router_(aux_loss_coef | jitter_noise) | output_router_logits | pretraining_tp
    | id2label | label2id | num_labels | problem_type | summary_\w+
    | use_cache | use_bfloat16 | torchscript | return_dict | output_(attentions | hidden_states)
    | tf_legacy_loss | chunk_size_feed_forward | keys_to_ignore_at_inference
    | _?attn_implementation\w* | _flash_attn_2_enabled | auto_map | trust_remote_code | custom_pipelines
    | is_decoder | max_position_embeddings | n_positions | n_ctx
    | cache_implementation | (tokenizer_)?padding_side | (tokenizer_)?model_max_length | max_sequence_length
    | use_flash_att(n | ention(_2)?) | output_past | predict_special_tokens | num_steps | neftune_noise_alpha
    | do_sample | early_stopping | num_(beams | beam_groups | return_sequences) | temperature | typical_p
    | top_[kp] | (max | min)_(length | new_tokens) | \w+_penalty
    | bad_words_ids | (encoder_)?no_repeat_ngram_size
    | (begin_)?suppress_tokens | forced_(bos | eos)_token_id | remove_invalid_values | output_scores
    | return_dict_in_generate | exponential_decay_length_penalty | prefix
    """,
    re.VERBOSE | re.ASCII,
)


def unread(facts: Mapping[str, Any], read: Collection[str]) -> Iterator[str]:
    """What is told, switched on, not among `read` and not known to be without effect."""
    for name, value in facts.items():
        off = value is None or value is False or value == 0 or value in ("", [], {})
        off = value is True if name == "is_causal" else off  # transformers 5 takes null for false
        if name not in read and not off and not NOT_FOR_A_PASS.fullmatch(name):
            yield f"expected keys that this pass reads or that change nothing, found `{name}` {value}"
