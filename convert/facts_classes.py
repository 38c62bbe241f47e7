"""The configuration classes of transformers as data: the keys that each reads, and what an absent key stands
for.

Source: the classes themselves in transformers 4.37.2, 4.57.6 and 5.23.0 (models/*/configuration_*.py and
configuration_utils.py), which agree on every default here; tests/test_meanings.py holds the table against
those that are installed. Defaults of null that follow from other values are worked out in `convert.facts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from ckpt_tool.convert.facts_parts import Parts
from ckpt_tool.records import dataclass

# Heads that no family's rows name: by the end of the name of a class that transformers has, the modules that
# the head is made of, each a matrix and mostly a bias. A head of words has none here: rows name its tensors.
DECODER_HEADS: Mapping[str, tuple[str, ...]] = {
    "ForSequenceClassification": ("score",),
    "ForTokenClassification": ("score",),
    "ForQuestionAnswering": ("qa_outputs",),
}
ENCODER_HEADS: Mapping[str, tuple[str, ...]] = {
    "ForSequenceClassification": ("classifier",),
    "ForTokenClassification": ("classifier",),
    "ForMultipleChoice": ("classifier",),
    "ForQuestionAnswering": ("qa_outputs",),
}


def without(heads: Mapping[str, tuple[str, ...]], *ends: str) -> dict[str, tuple[str, ...]]:
    """`heads` but those of classes that transformers lacks, by the ends of their names."""
    return {end: modules for end, modules in heads.items() if end not in ends}


@dataclass(frozen=True)
class Class:
    """`numbers` change what the model computes, `identity` are the ids and the length it is for, each with
    the default; `aliases` other names of a key (attribute_map). `idle` are keys without effect on the
    numbers in this class, with the reason, `idle_numbers` defaults of keys that are read into others."""

    name: str
    numbers: Mapping[str, Any]
    identity: Mapping[str, Any]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)
    idle_numbers: Mapping[str, Any] = field(default_factory=dict)
    # Which layers of a model with a window have it: all; those from max_window_layers on, if
    # use_sliding_window; every second one, the first included. `layer_types` may say otherwise but for "all".
    windows: Literal["all", "last", "alternate"] = "all"
    causal: bool = True  # a token sees those before it only
    prefix: str = "model."  # base_model_prefix of the classes with a head
    answering: str = ""  # that of the class that answers questions, where it is another
    words: str = "embed_tokens.weight"  # the embedding, below the prefix
    positions: str = ""  # the learned positions, below the prefix
    # How the bias of a key ends, alone or in one with those of query and value, in this order: of all heads,
    # or of each head beside each other.
    key_bias: str = ".self_attn.k_proj.bias"
    fused_bias: str | None = None
    fused_by_head: bool = False
    distances: str | None = None  # how a table of numbers by distance ends, with that of none in its middle
    # What shares its values with another tensor where tie_word_embeddings says so; "" is the embedding.
    tied: Mapping[str, str] = field(default_factory=lambda: {"lm_head.weight": ""})
    # Rates of dropout in training, with what an absent key stands for.
    dropouts: Mapping[str, float] = field(default_factory=lambda: {"attention_dropout": 0.0})
    # What else acts in training alone: a loss of the router beside that of the head, noise on its way there.
    routing: Mapping[str, Any] = field(default_factory=dict)
    # Those that no row of the family names, as in DECODER_HEADS.
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: DECODER_HEADS)
    parts: Parts | None = None  # of a model that has others beside that of text
    # The tokenizer's class that loaders take by the type of the model where no file names one, if it makes
    # other tokens of some files than the class that they were written for.
    tokenizer: str | None = None
    # Keys without effect on the numbers for which every release that has the class takes a null.
    null_too: tuple[str, ...] = ()
    masked: float = -1e9  # what releases up to 4.30 set masked scores to

    @property
    def trained(self) -> dict[str, Any]:
        """What acts in training alone, with what an absent key stands for."""
        return {**self.dropouts, **self.routing}

    def in_memory(self, name: str) -> str:
        """What a tensor of that name on the disk is called in a model that is loaded."""
        for memory, disk in ({} if self.parts is None else self.parts.names).items():
            if name.startswith(disk):
                return memory + name.removeprefix(disk)
        return name


IDENTITY = (
    "model_type",
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "n_positions",
    "torch_dtype",
)

# Names of one function. Measured with transformers 5.23.0 in float64 over [-10, 10]: gelu_python is within
# 1.8e-15 of gelu, gelu_pytorch_tanh within 8.9e-16 and gelu_fast within 9.2e-13 of gelu_new, swish is silu;
# gelu and gelu_new are 4.7e-4 apart, gelu and quick_gelu 2.0e-2.
ACTIVATIONS = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
}

# Every key that names an activation, and the names that transformers has for them: ACT2FN of 4.37.2 to 5.23.0
# (activations.py). Of `ALTERNATING` a class that reads the first does not read the second.
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
ALTERNATING = ("hidden_activation", "hidden_act")
KNOWN_ACTIVATIONS = frozenset(
    (
        *ACTIVATIONS,
        *(
            "gelu",
            "gelu_10",
            "gelu_new",
            "laplace",
            "leaky_relu",
            "linear",
            "mish",
            "quick_gelu",
            "hardswish",
        ),
        *("relu", "relu2", "relu6", "sigmoid", "silu", "tanh"),
    )
)

# Keys by which a decoder lets a token see those after it.
BOTH_WAYS = ("use_bidirectional_attention",)

TRAINING = "for training only"
LOADING = "says how to run or load, not what"
GENERATION = "for generation only"

IDLE: dict[str, str] = {
    **dict.fromkeys(
        (
            "attention_dropout",
            "attention_probs_dropout_prob",
            "activation_dropout",
            "attn_pdrop",
            "classifier_dropout",
            "dropout",
            "embd_pdrop",
            "hidden_dropout",
            "hidden_dropout_prob",
            "init_std",
            "initializer_range",
            "layerdrop",
            "output_router_logits",
            "problem_type",
            "resid_pdrop",
            "router_aux_loss_coef",
            "router_jitter_noise",
            "gradient_checkpointing",
            "neftune_noise_alpha",
            "num_steps",
        ),
        TRAINING,
    ),
    **dict.fromkeys(
        (
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_flash_attn_2_enabled",
            "_name_or_path",
            "_commit_hash",
            "attn_implementation",
            "cache_implementation",
            "chunk_size_feed_forward",
            "finetuning_task",
            "keys_to_ignore_at_inference",
            "max_sequence_length",
            "model_max_length",
            "output_attentions",
            "output_hidden_states",
            "output_past",
            "padding_side",
            "predict_special_tokens",
            "return_dict",
            "task_specific_params",
            "tf_legacy_loss",
            "tokenizer_class",
            "tokenizer_model_max_length",
            "tokenizer_padding_side",
            "torchscript",
            "transformers_version",
            "transformers.js_config",
            "unsloth_fixed",
            "unsloth_version",
            "use_bfloat16",
            "use_cache",
            "use_flash_attention",
            "use_flash_attention_2",
            "use_flash_attn",
        ),
        LOADING,
    ),
    **dict.fromkeys(
        (
            "bad_words_ids",
            "begin_suppress_tokens",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "length_penalty",
            "max_length",
            "max_new_tokens",
            "min_length",
            "min_new_tokens",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "output_scores",
            "prefix",
            "remove_invalid_values",
            "repetition_penalty",
            "return_dict_in_generate",
            "suppress_tokens",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
        ),
        GENERATION,
    ),
    **dict.fromkeys(
        ("cls_token_id", "decoder_start_token_id", "mask_token_id", "sep_token_id", "unk_token_id"),
        "an id of the tokenizer's",
    ),
}

# Defaults of every class for keys that would have an effect with another value.
DEFAULTS: dict[str, Any] = {
    "add_cross_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "pretraining_tp": 1,  # which many fine-tunes carry; only LlamaConfig reads it
    "pruned_heads": {},
}

CODE = ("auto_map", "trust_remote_code", "custom_pipelines")
PACKED = ("quantization_config", "compression_config", "quantization")
REFUSED = {
    **dict.fromkeys(CODE, "asks a loader to run code beside the weights"),
    **dict.fromkeys(PACKED, "says that the tensors are packed"),
}

DECODER = {"is_decoder": "not read: always causal"}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
ROPE = {"rope_theta": 10000.0, "rope_scaling": None}
GENERIC = {
    "hidden_size": ("n_embd",),
    "num_attention_heads": ("n_head",),
    "num_hidden_layers": ("n_layer",),
    "max_position_embeddings": ("n_positions",),
}
GPT_NAMES = {own: (generic,) for generic, (own,) in GENERIC.items()}
GPT_IDS = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": None}
SUMMARY = {
    f"summary_{k}": "of a head that this architecture has not"
    for k in ("type", "use_proj", "activation", "first_dropout", "last_dropout", "proj_to_labels")
}

LLAMA_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def like_llama(name: str, numbers: Mapping[str, Any], context: int, **more: Any) -> Class:
    """A class with what LlamaConfig has and `numbers` of its own or with another default; `context` is the
    length it is for, `more` are other parts of the `Class`."""
    identity = {**IDS, "max_position_embeddings": context}
    return Class(name, {**LLAMA_SIZES, **ROPE, **numbers}, identity, **{"idle": DECODER, **more})


GPT_SIZES = {
    "vocab_size": 50400,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "n_inner": None,
    "rotary_dim": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
NOT_READ = {
    **SUMMARY,
    **DECODER,
    "n_ctx": "not read",
    "scale_attn_weights": "not read: always scaled",
    "gradient_checkpointing": TRAINING,
}
