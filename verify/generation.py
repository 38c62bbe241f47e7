"""generation_config.json by meaning: how a loader's `generate` would begin, sample and end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_tool.convert.facts_classes import GENERATION as FOR_GENERATION
from ckpt_tool.convert.facts_classes import IDLE

# Who wrote it, and when.
BOOKKEEPING = frozenset(("_from_model_config", "transformers_version", "_commit_hash", "_name_or_path"))
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# What an absent key stands for (GenerationConfig of transformers 4.37 to 5.23, where it is not None).
DEFAULTS: Mapping[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "max_length": 20,
    "min_length": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "early_stopping": False,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "use_cache": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
    "token_healing": False,
    "low_memory": False,
    "is_assistant": False,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "prefill_chunk_size": None,
    "disable_compile": False,
    "target_lookbehind": 10,
    "assistant_lookbehind": 10,
    "use_model_defaults": True,
}

# Of these what a search gives beside its tokens, and how it is computed.
OUTPUT = frozenset(("output_attentions", "output_hidden_states", "output_scores", "output_logits",
                    "return_dict_in_generate", "use_cache", "low_memory"))  # fmt: skip


_ACTING = {*DEFAULTS, *(k for k, why in IDLE.items() if why == FOR_GENERATION)} - OUTPUT


def of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling values that stand in config.json, by which releases 4 of transformers generate where the file
    beside it says that it was made of that one, or is not there."""
    return {k: v for k, v in config.items() if k in _ACTING}


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what was expected and found) for every value that says another thing."""
    for key in sorted({*expected, *found} - BOOKKEEPING):
        a, b = expected.get(key), found.get(key)
        if _meaning(key, a) != _meaning(key, b):
            default = DEFAULTS.get(key)
            absent = "none" if default is None else f"none (which stands for {default!r})"
            words = [repr(side[key]) if key in side else absent for side in (expected, found)]
            yield key, f"expected {words[0]}, found {words[1]}"


def _meaning(key: str, value: Any) -> Any:
    if value is None or value == [] or value == {}:
        return DEFAULTS.get(key)
    if key in IDS:
        return frozenset(value) if isinstance(value, list) and all(map(_plain, value)) else (
            frozenset([value]) if _plain(value) else repr(value)
        )  # fmt: skip
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value


def _plain(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
