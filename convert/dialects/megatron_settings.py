"""Hyper-parameters that lie beside Megatron-Core's weights and not in them, in the words of Megatron's args.

run_config.yaml       Megatron-Bridge: `model`, the fields of its provider or config (`transformer` inside it)
context/model.yaml    NeMo 2: `config`, the fields of its GPTConfig
model_config.yaml     NeMo 1, the whole file; what it leaves out has a default in NeMo's code

Each value keeps the place that it is from. What the programs call otherwise than Megatron-LM, or hand on to
Megatron-Core as something else, is put in its words here; every other name is left for the lists of
`megatron_arguments`, so that a name that nothing knows is refused as it is among args.

Source: NVIDIA-NeMo/Megatron-Bridge @067f987d (models/gpt_provider.py, models/gpt/model_config.py),
NVIDIA/NeMo v2.4.0 (collections/llm/gpt/model, collections/nlp/models/language_modeling/megatron_gpt_model.py
and megatron_base_model.py), NVIDIA/Megatron-LM core_v0.19.0 (core/models/common/embeddings).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.megatron import check_complete
from ckpt_tool.checkpoint.run_documents import CONTEXT_IO, CONTEXT_MODEL, MODEL_CONFIG, RUN_CONFIG
from ckpt_tool.checkpoint.safe_yaml import inner, read_yaml
from ckpt_tool.convert.dialects.megatron_ranks import STRETCHED, Run
from ckpt_tool.convert.numbers import LLAMA3
from ckpt_tool.convert.params import shown
from ckpt_tool.errors import Problem, fail, fail_all, printable
from ckpt_tool.records import dataclass

ACTIVATION = "activation_func"
CLASS = "_target_"


@dataclass(frozen=True)
class Beside:
    """What one of the documents says: `args` in the words of Megatron's, `called` what the file calls those
    that have another name there."""

    file: str
    args: Mapping[str, Any]
    called: Mapping[str, str]

    def place(self, name: str) -> tuple[str, str]:
        return self.file, self.called.get(name, name)


def with_documents(run: Run) -> Run:
    """`run` with what the documents beside its files say; what the files themselves say comes first. Fails
    with `config-mismatch` where two places say two things, with `missing-shard` where fewer ranks are there
    than a document speaks of."""
    found = list(_documents(run.checkpoint))
    if not found:
        return run
    told: dict[str, Any] = dict(run.told or {})
    fail_all(_contradictions(told, found))
    places: dict[str, tuple[str, str]] = {}
    for beside in found:
        for name, value in beside.args.items():
            if name not in told:
                told[name], places[name] = value, beside.place(name)
        _check_ranks(run, beside)
    elsewhere = tuple((b.file, b.args, b.called) for b in found)
    return replace(run, told=told, places=places, elsewhere=elsewhere)


def _documents(checkpoint: Checkpoint) -> Iterator[Beside]:
    readers: Mapping[str, Callable[[Mapping[str, Any], str], Beside]] = {
        RUN_CONFIG: _of_bridge,
        CONTEXT_MODEL: _of_nemo_2,
        MODEL_CONFIG: _of_nemo_1,
    }
    for name, reader in readers.items():
        if name in checkpoint.documents:
            yield reader(read_yaml(checkpoint.documents[name].read(), file=name), name)
    if CONTEXT_IO in checkpoint.documents and CONTEXT_MODEL not in checkpoint.documents:
        hint = (
            "copy it from where the checkpoint was saved: io.json leaves out all that is as its class has it"
        )
        fail("missing-file", f"expected {CONTEXT_MODEL} beside {CONTEXT_IO}, found none", hint=hint)


# Values that two places must say alike.
_BOTH = """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
    max_position_embeddings layernorm_epsilon rotary_base rotary_percent normalization position_embedding_type
    untie_embeddings_and_output_weights add_bias_linear add_qkv_bias qk_layernorm swiglu
    tensor_model_parallel_size"""


def _contradictions(told: Mapping[str, Any], found: Iterable[Beside]) -> Iterator[Problem]:
    said = {name: ("args", name, value) for name, value in told.items()}
    if "norm_epsilon" in said:
        said["layernorm_epsilon"] = said["norm_epsilon"]
    if told.get("group_query_attention") is False:  # its number of groups says nothing then
        said.pop("num_query_groups", None)
    for beside in found:
        for name in _BOTH.split():
            value = beside.args.get(name)
            if value is None:
                continue
            file, own, other = said.setdefault(name, (*beside.place(name), value))
            both_nan = other != other and value != value  # which the field refuses by its own words
            if other is not None and other != value and not both_nan:
                where = beside.place(name)[1]
                message = f"expected {shown(other)} as {file} ({own}) says, found {shown(value)}"
                hint = f"one of the two is of another run: move {beside.file} out of the folder if it is that"
                yield Problem("config-mismatch", message, beside.file, where, hint)


def _check_ranks(run: Run, beside: Beside) -> None:
    """Files of ranks are as many as the document says; those of torch.distributed are joined."""
    if any(f.format == "dcp" for f in run.checkpoint.files.values()):
        return
    wanted = {
        "ranks": ("tensor_model_parallel_size", run.ranks),
        "stages": ("pipeline_model_parallel_size", run.stages),
        "experts": ("expert_model_parallel_size", run.experts),
    }
    for what, (name, found) in wanted.items():
        size = beside.args.get(name)
        if type(size) is int and size > found:
            check_complete(run.checkpoint, **{what: size}, why=f"{beside.file}: {name}")


# --- values ---------------------------------------------------------------------------------------------


def in_words(value: Any, depth: int = 6) -> Any:
    """A record of something that a program would call by its name; other values as they are."""
    if isinstance(value, Mapping) and isinstance(value.get(CLASS), str):
        listed = value.get("_args_") or []
        return f"{value[CLASS]}({', '.join(map(str, listed))})" if listed else value[CLASS]
    if isinstance(value, list) and depth:
        return [in_words(v, depth - 1) for v in value]
    return value


def _last(value: Any) -> Any:
    return value.rpartition(".")[2] if isinstance(value, str) else value


def llama3(factor: Any, low: Any = None, high: Any = None, length: Any = None) -> dict[str, Any]:
    """The block of config.json for frequencies that are stretched as Llama 3.1's are; what is not told is as
    Megatron-Core and NeMo have it."""
    told = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    told["original_max_position_embeddings"] = length
    return {**LLAMA3, **{k: v for k, v in told.items() if v is not None}}


# --- Megatron-Bridge and NeMo 2 -------------------------------------------------------------------------

# Classes whose models compute what their fields say and nothing else. Others scale the words, cap the
# logits, or turn some layers otherwise in code of their own.
_CLASSES = (
    r"(?:Bridge)?GPTModelConfig|GPTModelProvider|GPTProvider\d+[MB]|GPTConfig(?:\d+[MB])?"
    r"|(?:(?:Code)?Llama(?:2|3|31|32)?|Mistral(?:NeMo|Small3)?|Mixtral|Qwen(?:2|25|3)(?:MoE)?)"
    r"(?:ModelProvider|Config)(?:\d+(?:[xP]\d+)?[MB](?:_A\d+B)?)?"
)
# Functions that make the layers of Megatron-Core's GPT, of its own modules or Transformer Engine's.
_LAYERS = r"(default|local|transformer_engine(_full)?|modelopt_transformer)_layer_spec"
# What every dump of such a class has. Silence would mean what its class says, which the file does not.
_ASKED = """num_layers hidden_size num_attention_heads normalization activation_func gated_linear_unit
    add_bias_linear position_embedding_type rotary_base layernorm_epsilon
    share_embeddings_and_output_weights"""
# Of the model's section, without an effect on what it computes.
_OF_PROGRAMS = (
    r"generation_config|forward_step_fn|data_step_fn|hf_model_id|hf_model_revision|extra_checkpoint_metadata"
    r"|should_pad_vocab|scatter_embedding_sequence_parallel|restore_modelopt_state|fp8_interval|_builder_"
    r"|builder|grad_scale_func|grad_sync_func|timers|mtp_enabled|use_transformer_engine_full_layer_spec"
    r"|use_arbitrary_attention_mask|heterogeneous_dist_checkpoint|.*_hooks?|logit_dtype|_call_|_partial_"
)
_FACTORS = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
# Words of Megatron-LM's args alone.
_OF_ARGS = ("norm_epsilon", "swiglu", "untie_embeddings_and_output_weights", "use_rope_scaling", STRETCHED)
_RENAMED = {"seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor"}


def _of_bridge(document: Mapping[str, Any], file: str) -> Beside:
    model = document.get("model")
    if not isinstance(model, Mapping):
        fail("bad-config", f"expected the model's fields, found {shown(model)}", file=file, where="model")
    fields = {**model, **inner(model, "transformer")}
    fields.pop("transformer", None)
    return _of_fields(fields, file)


def _of_nemo_2(document: Mapping[str, Any], file: str) -> Beside:
    config = document.get("config")
    if not isinstance(config, Mapping):
        fail("bad-config", f"expected the model's fields, found {shown(config)}", file=file, where="config")
    return _of_fields(config, file)


def _of_fields(fields: Mapping[str, Any], file: str) -> Beside:
    """Of a dump of the fields of Megatron-Core's TransformerConfig and what GPT models add."""
    said = {k: in_words(v) for k, v in fields.items()}
    _refuse_words_of_args(said, file)
    if missing := [n for n in _ASKED.split() if said.get(n) is None]:
        message = f"expected all fields of the model's class, found none of {', '.join(missing)}"
        hint = "its class may have defaults of its own: copy the file from where the checkpoint was saved"
        fail("missing-fact", message, file=file, hint=hint)
    args = {_RENAMED.get(k, k): v for k, v in said.items() if not re.fullmatch(_OF_PROGRAMS, k, re.ASCII)}
    called = {new: old for old, new in _RENAMED.items()}
    args[CLASS] = None if re.fullmatch(_CLASSES, str(_last(said.get(CLASS))), re.ASCII) else said.get(CLASS)
    spec = args.get("transformer_layer_spec")
    args["transformer_layer_spec"] = None if re.fullmatch(_LAYERS, str(_last(spec)), re.ASCII) else spec
    args[ACTIVATION] = _last(said[ACTIVATION])
    args["swiglu"], called["swiglu"] = args.pop("gated_linear_unit"), "gated_linear_unit"
    _tie(args, called)
    _groups(args)
    if said.get("max_position_embeddings") is None:
        args["max_position_embeddings"], called["max_position_embeddings"] = (
            said.get("seq_length"),
            "seq_length",
        )
    stretched = {k: args.pop(k, None) for k in _FACTORS}
    asked = args.pop("rope_scaling", None)
    factor = args.pop("rope_scaling_factor", None)
    if stretched["scale_factor"] is not None and asked:
        message = f"expected scale_factor or rope_scaling, found both ({shown(stretched['scale_factor'])})"
        fail("bad-config", message, file=file, where="rope_scaling")
    if stretched["scale_factor"] is not None:
        args[STRETCHED], called[STRETCHED] = llama3(*stretched.values()), "scale_factor"
    elif asked is True:
        args[STRETCHED] = llama3(8.0 if factor is None else factor)
        called[STRETCHED] = "rope_scaling"
    elif asked not in (None, False):
        fail("bad-config", f"expected true or false, found {shown(asked)}", file=file, where="rope_scaling")
    return Beside(file, _without_null(args), called)


def _refuse_words_of_args(said: Mapping[str, Any], file: str) -> None:
    """What the document's program calls otherwise would be taken for what it never read."""
    for name in _OF_ARGS:
        if said.get(name) is not None:
            message = (
                f"expected fields of the model's class, found {name} = {shown(said[name])}, a word of args"
            )
            hint = f"take {name} out of a copy of {file}: no program that writes this file knows it"
            fail("unsupported", message, file=file, where=name, hint=hint)


def _tie(args: dict[str, Any], called: dict[str, str]) -> None:
    name = "share_embeddings_and_output_weights"
    tied = args.pop(name)
    untied = "untie_embeddings_and_output_weights"
    args[untied], called[untied] = not tied if isinstance(tied, bool) else tied, name


def _groups(args: dict[str, Any]) -> None:
    """No number of groups is one for each query, in TransformerConfig."""
    if args.get("num_query_groups") is None:
        args["num_query_groups"] = args.get("num_attention_heads")
    args["group_query_attention"] = True


def _without_null(args: Mapping[str, Any]) -> dict[str, Any]:
    """Null is what silence is, but for a share of the channels, of which no program has any then."""
    return {k: v for k, v in args.items() if v is not None or k == "rotary_percent"}


# --- NeMo 1 ---------------------------------------------------------------------------------------------

# What NeMo's code takes where its config is silent, for models of Megatron-Core's.
_DEFAULTS: Mapping[str, Any] = {
    "bias": True,
    "qkv_bias": False,
    "activation": "gelu",
    "normalization": "layernorm",
    "position_embedding_type": "learned_absolute",
    "rotary_percentage": 1.0,
    "rotary_base": 10000,
    "rotary_interleaved": False,
    "share_embeddings_and_output_weights": True,
    "layernorm_epsilon": 1e-5,
}
_NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm", "layernorm1p": "LayerNorm"}
_GATED = {"swiglu": "silu", "fast-swiglu": "silu"}
# Read by NeMo's own code only, which leaves the model of Megatron-Core as it is: training, data, files, and
# what is of its older models alone.
_OF_NEMO = (
    r"tokenizer|optim|data|peft|nsys_profile|sched|target|nemo_version|precision|restore_from_(path|ckpt)"
    r"|resume_from_checkpoint|skip_train|micro_batch_size|global_batch_size|rampup_batch_size|mcore_gpt"
    r"|use_scaled_init_method|ffn_dropout|do_layer_norm_weight_decay|pre_process|post_process|headscale"
    r"|transformer_block_type|normalize_attention_scores|attention_type|reset_lr(_steps)?|native_amp_.*"
    r"|megatron_(amp_O2|legacy|timer_kwargs)|grad_.*|gradient_as_bucket_view|bias_dropout_add_fusion"
    r"|get_attention_mask_from_fusion|apex_transformer_log_level|sync_batch_comm|nccl_communicator_.*"
    r"|validation_.*|fsdp.*|dist_ckpt_.*|activations_checkpoint_.*|num_micro_batches_.*|transformer_engine"
    r"|reduce_amax|use_emha|ub_tp_.*|use_flash_attention|sharp|enable_megatron_timers|gc_.*|seed|openai_gelu"
    r"|answer_only_loss|save_nemo_on_validation_end|output_sequence|use_avg_pool|pretrained_checkpoint"
    r"|init_method_std|name|encoder_seq_length|use_loss_mask|sample_weight|with_fp32_embedding_grads"
    r"|drop_last|async_grad_allreduce|dist_ckpt_format|fp8_params|skip_fp8_.*|use_te_rng_tracker"
    r"|rotary_(percentage|base|interleaved)|apply_query_key_layer_scaling|bias_activation_fusion"
    r"|override_vocab_size"
)
_NEMO_NULL = ("bias", "qkv_bias", "rotary_interleaved", "share_embeddings_and_output_weights")  # as false
_NEMO_READ = ("bias", "qkv_bias", "activation", "rotary_percentage", "mcore_customization_config")
_NEMO_SCALED = ("scale_positional_embedding", *_FACTORS)


def _of_nemo_1(document: Mapping[str, Any], file: str) -> Beside:
    own = _resolved(_of_the_model(document))
    custom = own.get("mcore_customization_config") or {}
    if not isinstance(custom, Mapping):
        place = "mcore_customization_config"
        fail("bad-config", f"expected fields of the model, found {shown(custom)}", file=file, where=place)
    said = {**_DEFAULTS, **{k: in_words(v) for k, v in own.items()}}
    _refuse_words_of_args({**own, **custom}, file)
    if missing := [k for k in _DEFAULTS if said[k] is None and k not in _NEMO_NULL]:
        message = f"expected a value, found null, for {', '.join(missing)}"
        fail("missing-fact", message, file=file, where=missing[0])
    called = {k: f"{k} (NeMo's default)" for k in _DEFAULTS if k not in own}
    left = (*_NEMO_READ, *_NEMO_SCALED)
    args = {k: v for k, v in said.items() if k not in left and not re.fullmatch(_OF_NEMO, k, re.ASCII)}
    for new, old in {
        "add_bias_linear": "bias",
        "add_qkv_bias": "qkv_bias",
        "rotary_percent": "rotary_percentage",
        "rotary_base": "rotary_base",
        "rotary_interleaved": "rotary_interleaved",
        "padded_vocab_size": "override_vocab_size",
    }.items():
        args[new], called[new] = said.get(old), called.get(old, old)
    activation = str(said["activation"])
    args["swiglu"], called["swiglu"] = activation.endswith("glu"), "activation"
    args[ACTIVATION], called[ACTIVATION] = _GATED.get(activation, activation), "activation"
    norm = str(said["normalization"]).lower()
    args["normalization"] = _NORMS.get(norm, said["normalization"])
    args["apply_layernorm_1p"], called["apply_layernorm_1p"] = norm == "layernorm1p", "normalization"
    _tie(args, called)
    _groups(args)
    if own.get("max_position_embeddings") is None:
        args["max_position_embeddings"] = own.get("encoder_seq_length")
        called["max_position_embeddings"] = "encoder_seq_length"
    if args.pop("seq_len_interpolation_factor", None) is not None:
        args[_RENAMED["seq_len_interpolation_factor"]] = own["seq_len_interpolation_factor"]
    if said.get("scale_positional_embedding"):
        block = llama3(8.0, *(said.get(k) for k in _FACTORS[1:]))
        args[STRETCHED] = block | ({"factor": f} if (f := said.get("scale_factor")) is not None else {})
        called[STRETCHED] = "scale_positional_embedding"
    args |= {k: in_words(v) for k, v in custom.items()}
    called |= {k: f"mcore_customization_config.{k}" for k in custom}
    return Beside(file, _without_null(args), called)


_REFERENCE = r"\$\{(?:model)?\.?(\w+)\}"
_REFERS = re.compile(rf"{_REFERENCE}|\$\{{multiply: ?(\d{{1,9}}), ?{_REFERENCE}\}}", re.ASCII)


def _resolved(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with what OmegaConf's `${.name}` stands for, another value of it, and the products of such
    (`${multiply:4, ${.hidden_size}}`), as NeMo writes them out."""
    made = dict(document)
    for name, value in document.items():
        found = _REFERS.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            continue
        plain, factor, other = found.groups()
        meant = document.get(plain or other, name)
        if meant is name or (factor and type(meant) is not int) or _refers(meant):
            message = f"expected a value, found {printable(value, 60)}, which stands for none"
            fail("bad-config", message, file=MODEL_CONFIG, where=printable(name, 60))
        made[name] = int(factor) * meant if factor else meant
    return made


def _refers(value: Any) -> bool:
    return isinstance(value, str) and _REFERS.fullmatch(value) is not None


def _of_the_model(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that is the model's, of a document of the whole run or of Lightning's hparams.yaml
    (NVIDIA-NeMo/Speech#4993)."""
    inner = [document.get(word) for word in ("cfg", "model") if "num_layers" not in document]
    return next((part for part in inner if isinstance(part, Mapping) and "num_layers" in part), document)
