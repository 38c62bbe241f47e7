"""What Megatron's BERT and GPT-2 have in common beside their names: sizes from the tensors, numbers from the
pickled args, by the rules of the code of their day where args do not say, padding of the vocabulary, and the
two directions.

Source of the rules: NVIDIA/Megatron-LM v1.0, v2.0, v2.5, 23.06 and core_v0.9.0 (arguments.py, model/utils.py,
model/transformer.py, tokenizer/tokenizer.py). Counts are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.pickle_records import TensorRecord, children
from ckpt_tool.convert.dialects.megatron_names import Run, is_core
from ckpt_tool.convert.dialects.megatron_words import PUBLISHED, count_words, read_tokenizer
from ckpt_tool.convert.layout import Rule
from ckpt_tool.convert.params import SET, Facts
from ckpt_tool.convert.plan import Foretold, Options, OutputDocument, Plan, Value
from ckpt_tool.convert.tokenizers import TokenizerResult
from ckpt_tool.convert.weave import Table, Written
from ckpt_tool.convert.weave import to_hf as woven_to_hf
from ckpt_tool.errors import fail

IGNORED = {
    r"optimizer\..*": "state of the optimizer: only training needs it",
    r"(lr|opt_param)_scheduler\..*": "state of the schedule: only training needs it",
    r"(random_|np_|torch_|cuda_)?rng_state(\..*)?": "random numbers of the training run",
    r"rng_tracker_states\..*": "random numbers of the training run",
    r"(rerun_state_machine|ft_state|content_metadata)\..*": "state of the training run",
    r".*\._extra_state(\..*)?": "scales for 8-bit training",
}

ARGS = {  # generic name -> name in args
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "max_position_embeddings",
}


FIELDS = {  # the config value behind each axis
    "n": "num_attention_heads",
    "d": "hidden_size",
    "e": "hidden_size",
    "f": "intermediate_size",
    "p": "max_position_embeddings",
}
GELUS = {  # what transformers calls them
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
ACTIVATION = {"erf": "gelu", "tanh": "gelu_new"}
EPSILON = 1e-5

# Args that change what is computed into something neither architecture can say.
_UNSUPPORTED = {
    "swiglu": "a gated feed-forward",
    "squared_relu": "squared ReLU",
    "num_experts": "experts",
    "qk_layernorm": "norms of queries and keys",
    "use_rotary_position_embeddings": "rotary positions",
    "apply_layernorm_1p": "norms that store their weight less one",
    "layernorm_zero_centered_gamma": "norms that store their weight less one",
    "multi_query_attention": "shared keys and values",
}
_UNSUPPORTED_VALUES = {
    "normalization": (("LayerNorm", None), "norms"),
    "position_embedding_type": (("learned_absolute", None), "positions"),
    "add_bias_linear": ((True, None), "biases"),
}


@dataclass(frozen=True)
class Numbers:
    """The numbers of a model under generic names. `rows` counts the words in the tensors, `words` those that
    are no padding; gelus are "erf" or "tanh"."""

    sizes: Mapping[str, Value]
    rows: Value
    words: Value
    eps: Value
    gelu: Value
    head_gelu: Value
    notes: list[str] = field(default_factory=list)

    def axes(self) -> dict[str, int]:
        """Axes of the tables: t query, key and value, n heads of h channels, d and e width, f feed-forward
        width, v words, p positions."""
        width, heads = self.sizes["hidden_size"].value, self.sizes["num_attention_heads"].value
        return {
            "t": 3,
            "n": heads,
            "h": width // heads,
            "d": width,
            "e": width,
            "f": self.sizes["intermediate_size"].value,
            "p": self.sizes["max_position_embeddings"].value,
            "v": self.rows.value,
            "two": 2,
        }

    def table(self, rules: Iterable[Rule], rows: int) -> Table:
        """The rows filled in; `rows` counts those of the vocabulary in the original, padding included."""
        axes = {**self.axes(), "v": rows}
        layers = self.sizes["num_hidden_layers"]
        return Table(tuple(rules), axes, FIELDS, self.sizes, layers, self.words.value)


def fused_order(version: float, core: bool) -> str:
    """The order of the rows of query_key_value: t is query, key, value; n the head; h the channel. A rank
    holds all of it for its heads. Version 3.0 renamed arguments only; Megatron-Core always has the order of
    2.0."""
    if core or version >= 2:
        return "n t h"
    return "n h t" if version == 1 else "t n h"


# --- numbers of an original -----------------------------------------------------------------------------


def read_facts(run: Run, options: Options, names: Mapping[str, str] | None = None) -> Facts:
    """The pickled args and the user's settings; `names` are other names for those, see GPT2_NAMES."""
    return Facts(run.args, "args", generic(options.settings, names or {}))


def generic(settings: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`settings` under the names that every family knows."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        other = names.get(name, name)
        if found.setdefault(other, value) != value:
            fail("usage", f"expected one value, found {found[other]!r} and {value!r}", file=SET, where=name)
    return found


def read_numbers(
    run: Run, facts: Facts, options: Options, *, family: str, gelu_of_version_0: str
) -> tuple[Numbers, TokenizerResult]:
    """The numbers, and the tokenizer that says how many words there are. Sizes are what the tensors have;
    what args or the user say otherwise is a problem. Raises what is missing or malformed."""
    _refuse_unsupported(facts)
    if "position_embeddings.weight" not in run.tensors:
        fail("missing-tensor", "expected this tensor, found none", where="position_embeddings.weight")
    found = {
        "num_hidden_layers": Value(run.source.layers, "layers in the tensor names"),
        "hidden_size": _measured(run, "word_embeddings.weight", 1, shared=False),
        "intermediate_size": _measured(run, "layers.0.mlp.dense_h_to_4h.weight", 0),
        "max_position_embeddings": _measured(run, "position_embeddings.weight", 0, shared=False),
    }
    rows = _measured(run, "word_embeddings.weight", 0)
    sizes = {n: facts.integer(n, ARGS[n], rule=v) for n, v in found.items()}
    told_rows = facts.integer("padded_vocab_size", "padded_vocab_size", rule=rows)
    for name, value in found.items():
        _agree(facts, name, sizes[name], value, layers=name == "num_hidden_layers")
    _agree(facts, "padded_vocab_size", told_rows, rows)
    known = PUBLISHED.get((*(v.value for v in found.values()), rows.value))
    rule = None if known is None else Value(known.heads, f"rule: the sizes are those of {known.name}")
    heads = facts.integer(
        "num_attention_heads", "num_attention_heads", rule=rule, ask="the number of attention heads"
    )
    eps = _epsilon(facts)
    gelu, head_gelu = _gelus(run, facts, gelu_of_version_0)
    facts.check()
    sizes["num_attention_heads"] = heads
    _check_heads(run, facts, sizes)
    facts.check()
    tokenizer = read_tokenizer(
        run, options, family=family, rows=rows, positions=sizes["max_position_embeddings"]
    )
    words = count_words(run, facts, options, rows, tokenizer, known)
    return Numbers(sizes, rows, words, eps, gelu, head_gelu, _notes(run)), tokenizer


def _measured(run: Run, name: str, dimension: int, *, shared: bool = True) -> Value:
    shape = run.tensors[name][0].shape
    if len(shape) != 2:
        fail("shape-mismatch", f"expected a matrix, found {shape}", where=name)
    count = run.source.ranks if shared else 1
    over = f" over {count} ranks" if count > 1 else ""
    return Value(shape[dimension] * count, f"{('rows', 'columns')[dimension]} of {name}{over}")


def _agree(facts: Facts, name: str, told: Value, found: Value, *, layers: bool = False) -> None:
    if told.value == found.value:
        return
    kind = "config-mismatch"
    if layers:
        kind = "uncovered-tensors" if told.value < found.value else "missing-tensor"
    message = f"expected {told.value} ({told.source}), found {found.value} ({found.source})"
    facts.refuse(kind, message, name)


def _refuse_unsupported(facts: Facts) -> None:
    args = facts.document or {}
    for name, what in _UNSUPPORTED.items():
        if args.get(name):
            facts.refuse("unsupported", f"expected no {what}, found {name} = {args[name]}", name)
    for name, (allowed, what) in _UNSUPPORTED_VALUES.items():
        if args.get(name) not in allowed:
            message = f"expected plain {what} ({allowed[0]}), found {str(args[name])[:40]}"
            facts.refuse("unsupported", message, name)
    facts.check()


def _check_heads(run: Run, facts: Facts, sizes: Mapping[str, Value]) -> None:
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    args = run.args or {}
    if width.value % heads.value:
        message = f"expected hidden_size {width.value} to divide by {heads.value} heads ({heads.source}), "
        facts.refuse("config-mismatch", message + "found a rest", "num_attention_heads")
    elif heads.value % run.source.ranks:
        message = f"expected {heads.value} heads ({heads.source}) to divide by {run.source.ranks} ranks, "
        facts.refuse("config-mismatch", message + "found a rest", "num_attention_heads")
    elif args.get("kv_channels") not in (None, width.value // heads.value):
        message = f"expected heads of {width.value // heads.value} channels, found {args['kv_channels']}"
        facts.refuse("unsupported", message, "kv_channels")
    # num_query_groups is there, and 1, also where queries are not grouped
    if args.get("group_query_attention") and args.get("num_query_groups") not in (None, heads.value):
        message = f"expected a key and a value for each head, found {args['num_query_groups']} groups"
        facts.refuse("unsupported", message, "num_query_groups")


def _epsilon(facts: Facts) -> Value:
    key = "norm_epsilon" if facts.given("norm_epsilon") else "layernorm_epsilon"
    rule = Value(EPSILON, "rule: args do not say; Megatron's default was always 1e-5")
    return facts.number("layer_norm_eps", key, rule=rule)


def _gelus(run: Run, facts: Facts, of_version_0: str) -> tuple[Value, Value]:
    """Which gelu the feed-forward and the LM head of BERT compute."""
    if "hidden_act" in facts.settings:
        name = facts.settings["hidden_act"]
        if name not in GELUS:
            facts.refuse("unsupported", f"expected one of {', '.join(GELUS)}, found {name!r}", "hidden_act")
        both = Value(GELUS.get(name, "erf"), SET)
        return both, both
    return feed_forward_gelu(run, of_version_0), lm_head_gelu(run)


def activation(numbers: Numbers, facts: Facts) -> Value:
    """The feed-forward's gelu under a name of transformers: the user's, if there is one."""
    if "hidden_act" in facts.settings:
        return Value(facts.settings["hidden_act"], SET)
    return Value(ACTIVATION[numbers.gelu.value], numbers.gelu.source)


def feed_forward_gelu(run: Run, of_version_0: str) -> Value:
    """The code of each age:

    - Megatron-Core has the fused kernel, which is the tanh form, unless bias_gelu_fusion is off; it does not
      look at openai_gelu.
    - before 2020-04-14 there was no flag and only the tanh form: args of version 0 without openai_gelu.
    - later erf, tanh with openai_gelu, or with bias_gelu_fusion, which is on by default since January 2021;
      from 2023 on (args with swiglu) onnx_safe comes before the fusion.
    - no args at all: `of_version_0`, erf for versions 1 and 2 (nobody had the fusion by default), tanh for 3.
    """
    args = run.args or {}
    fused, openai = args.get("bias_gelu_fusion"), args.get("openai_gelu")
    if is_core(run.age):
        if fused is None:
            return Value("tanh", "rule: Megatron-Core fuses bias and gelu by default, in the tanh form")
        return Value("tanh" if fused else "erf", "args: bias_gelu_fusion (Megatron-Core)")
    if fused is None and openai is None:
        return _gelu_by_version(run, of_version_0)
    if openai:
        return Value("tanh", "args: openai_gelu")
    if args.get("onnx_safe") and "swiglu" in args:
        return Value("erf", "args: onnx_safe")
    if fused:
        return Value("tanh", "args: bias_gelu_fusion, which is the tanh form")
    return Value("erf", "args: neither openai_gelu nor bias_gelu_fusion")


def _gelu_by_version(run: Run, of_version_0: str) -> Value:
    if run.version == 0 and _has_args(run):
        return Value("tanh", "rule: args of version 0 without openai_gelu are of before April 2020: tanh")
    if run.version == 0:
        why = "as the published GPT-2" if of_version_0 == "tanh" else "which the file does not tell"
        return Value(of_version_0, f"rule: version 0 without args: {of_version_0}, {why}")
    if run.version < 3:
        return Value("erf", f"rule: version {run.version} without flags: erf, the fusion was opt-in")
    return Value("tanh", "rule: version 3.0 without flags: the fused kernel was the default, the tanh form")


def lm_head_gelu(run: Run) -> Value:
    """Never the fused one: erf, or tanh with openai_gelu and before there was that flag."""
    args = run.args or {}
    if is_core(run.age):
        return Value("erf", "rule: Megatron-Core's LM head")
    if "openai_gelu" in args:
        return Value("tanh" if args["openai_gelu"] else "erf", "args: openai_gelu")
    if run.version == 0 and _has_args(run):
        return Value("tanh", "rule: args of version 0 without openai_gelu are of before April 2020: tanh")
    return Value("erf", "rule: the LM head is never fused")


def _has_args(run: Run) -> bool:
    return "num_layers" in (run.args or {})


def _notes(run: Run) -> list[str]:
    """What neither architecture can say, and what was not said by the file."""
    notes = []
    args = run.args or {}
    if not run.says_version and not is_core(run.age):
        notes.append(
            "no checkpoint_version is in the file, which makes it 0: query_key_value holds all queries, then "
            "all keys, then all values (files of two weeks of September 2020 are of 1.0 and do not say so)"
        )
    if args.get("apply_residual_connection_post_layernorm") and not is_core(run.age):
        notes.append(
            "args: apply_residual_connection_post_layernorm adds the normalised input to each branch, which "
            "the Hugging Face model cannot do: its results differ"
        )
    if args.get("apply_query_key_layer_scaling"):
        notes.append(
            "args: apply_query_key_layer_scaling divides the scores by the layer's number and multiplies "
            "them again: nothing but another rounding in float16"
        )
    if listed := _listed_tensors(run.source.checkpoint):
        notes.append(f"{listed} tensors in lists of the optimizer are left out: only training needs them")
    if run.args and run.args.get("orig_vocab_size"):
        notes.append("args: orig_vocab_size tells which rows of the vocabulary are padding")
    return notes


def _listed_tensors(checkpoint: Checkpoint) -> int:
    """How many tensors the files hold in lists, where no name leads to them."""
    count = 0
    for file in checkpoint.files.values():
        seen: set[int] = set()
        stack: list[object] = list(file.metadata.values())
        while stack:
            value = stack.pop()
            if isinstance(value, TensorRecord):
                count += 1
            elif id(value) not in seen and isinstance(value, dict | list | tuple):
                seen.add(id(value))
                stack += [item for _, item in children(value)]
    return count


# --- original to Hugging Face ---------------------------------------------------------------------------


def tie(run: Run, facts: Facts) -> Value:
    """Whether the output layer is the embedding: unless args say that it is not, or there is an output layer
    of its own where no stage needs a copy of the embedding."""
    name = "output_layer.weight"
    there = name in run.tensors
    apart = there and (not is_core(run.age) or len(run.files[0]) == 1)
    if facts.given("untie_embeddings_and_output_weights"):
        untied = facts.boolean("untied", "untie_embeddings_and_output_weights", rule=Value(False, ""))
        found = Value(not untied.value, untied.source)
    else:
        found = Value(not apart, f"rule: {'an' if apart else 'no'} output layer apart from the embedding")
    if not found.value and not there:
        facts.refuse("missing-tensor", "expected this tensor, found none", name)
    return found


def to_hf(
    family: str,
    run: Run,
    options: Options,
    *,
    rules: Iterable[Rule],
    numbers: Numbers,
    config: Mapping[str, Value],
    tokenizer: TokenizerResult,
    documents: Sequence[OutputDocument],
    notes: Iterable[str],
    foretold: Sequence[Foretold] = (),
) -> Plan:
    """The plan of a family's table."""
    beside = Written(
        family,
        config,
        [
            *documents,
            *(
                OutputDocument(n, d, "the tokenizer beside the weights")
                for n, d in tokenizer.documents.items()
            ),
        ],
        IGNORED,
        [*numbers.notes, *notes, *tokenizer.notes],
        kept(run, numbers),
        foretold,
    )
    return woven_to_hf(numbers.table(rules, numbers.rows.value), run.source, options, beside)


_KEPT_ARGS = (
    "make_vocab_size_divisible_by",
    "tokenizer_type",
    "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling",
    "apply_residual_connection_post_layernorm",
)


def kept(run: Run, numbers: Numbers) -> dict[str, Any]:
    """What the Hugging Face layout does not say, for the manifest and the way back."""
    args = run.args or {}
    return {
        "age": run.age,
        "checkpoint_version": run.version if run.says_version else None,
        "tensor_parallel": run.source.ranks,
        "pipeline_parallel": len(run.files[0]),
        "virtual_stages": run.chunks,
        "iteration": run.iteration,
        "release": run.files[0][0].startswith("release/"),
        "rows": numbers.rows.value,
        "words": numbers.words.value,
        "gelu": numbers.gelu.value,
        "head_gelu": numbers.head_gelu.value,
        "args": {k: args[k] for k in _KEPT_ARGS if k in args},
    }


TWO_GELUS = "megatron-bert-two-gelus"


def two_gelus(gelu: Value, head_gelu: Value) -> tuple[Foretold, ...]:
    """MegatronBert has one hidden_act; the feed-forward, which is in every layer, decides it."""
    if gelu.value == head_gelu.value:
        return ()
    reason = (
        f"the feed-forward's gelu is the {gelu.value} form ({gelu.source}), the LM head's the "
        f"{head_gelu.value} form ({head_gelu.source}); hidden_act is one value for both, so the LM head's "
        "differs, by at most 4.8e-4 as it leaves the gelu"
    )
    return (Foretold(TWO_GELUS, reason, {"hidden_act": ACTIVATION[head_gelu.value]}, ("head",)),)
