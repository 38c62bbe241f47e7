"""From a Hugging Face folder to a Megatron checkpoint folder: which rank of which stage holds what, under the
names of which age, and the args beside the tensors.

    latest_checkpointed_iteration.txt, release/mp_rank_TT[_PPP]/model_optim_rng.pt

Args are those that reading the folder again needs, and those that Megatron's loader compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.megatron import FILE, TRACKER, folder_name
from ckpt_tool.checkpoint.torch_zip_writer import Namespace
from ckpt_tool.convert.dialects.megatron import ACTIVATION, GELUS, Numbers, fused_order
from ckpt_tool.convert.dialects.megatron_names import AGES, DICTS, FIRST, VERSIONS, is_core, own_names
from ckpt_tool.convert.dialects.megatron_words import DIVISOR
from ckpt_tool.convert.layout import Home, Rule
from ckpt_tool.convert.options import SHARDS, TENSOR_PARALLEL, Option
from ckpt_tool.convert.params import Facts
from ckpt_tool.convert.plan import Foretold, Options, OutputDocument, Plan, Value
from ckpt_tool.convert.source import whole_tensors
from ckpt_tool.convert.tokenizers import MAX_BYTES, original_tokenizer_documents
from ckpt_tool.convert.weave import Written
from ckpt_tool.convert.weave import to_original as woven_to_original
from ckpt_tool.errors import Problem, fail, fail_all

RELEASE = "release"
OPTIONS = (
    Option("keep_padding", "Keep the rows that pad the vocabulary.", "hf"),
    SHARDS,
    TENSOR_PARALLEL,
    Option("pipeline_parallel", "Pipeline stages to write.", "original", most=1024, metavar="M"),
    Option(
        "checkpoint_version",
        "Order of query_key_value to write.",
        "original",
        choices=("0", "1.0", "2.0", "3.0"),
    ),
)


@dataclass(frozen=True)
class Form:
    """How to write: `version` None writes no checkpoint_version, which stands for 0. `rows` is the vocabulary
    with its padding."""

    age: str
    version: float | None
    ranks: int
    stages: int
    chunks: int  # virtual stages
    rows: int
    divisor: int
    iteration: int
    release: bool
    gelu: str
    head_gelu: str
    args: Mapping[str, Any]

    @property
    def folder(self) -> str:
        return RELEASE if self.release else f"iter_{self.iteration:07d}"

    @property
    def tracker(self) -> str:
        return RELEASE if self.release else str(self.iteration)

    @property
    def order(self) -> str:
        return fused_order(self.version or 0.0, is_core(self.age))

    def kept(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "age": self.age,
            "checkpoint_version": self.version,
            "tensor_parallel": self.ranks,
            "pipeline_parallel": self.stages,
            "virtual_stages": self.chunks,
            "rows": self.rows,
        }

    def files(self) -> list[list[str]]:
        """[rank][stage]."""
        staged = self.stages > 1
        return [
            [f"{self.folder}/{folder_name(t, p, staged)}/{FILE}" for p in range(self.stages)]
            for t in range(self.ranks)
        ]


def read_numbers(facts: Facts, names: Mapping[str, str], kept: Mapping[str, Any]) -> Numbers:
    """The numbers of config.json, whose own names for them are the keys of `names` where that has any."""
    own = {generic_name: name for name, generic_name in names.items()}

    def key(name: str) -> str:
        return own.get(name, name)

    counts = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    sizes = {n: facts.integer(n, key(n), maximum=10_000 if "layers" in n else 2**31) for n in counts}
    four = Value(4 * sizes["hidden_size"].value, "rule: n_inner absent or null, four times the width")
    rule = four if names else None
    sizes["intermediate_size"] = facts.integer("intermediate_size", key("intermediate_size"), rule=rule)
    words = facts.integer("vocab_size", "vocab_size")
    eps = facts.number("layer_norm_eps", key("layer_norm_eps"))
    act = facts.anything("hidden_act", key("hidden_act"))
    if act.value not in GELUS:
        facts.refuse(
            "unsupported", f"expected one of {', '.join(GELUS)}, found {act.value!r}", key("hidden_act")
        )
    facts.check()
    width, heads = sizes["hidden_size"].value, sizes["num_attention_heads"].value
    if width % heads:
        message = f"expected {key('hidden_size')} {width} to divide by {heads} heads, found a rest"
        facts.refuse("config-mismatch", message, key("num_attention_heads"))
    facts.check()
    gelu = Value(GELUS[act.value], act.source)
    head = kept.get("head_gelu")
    # what config.json could not say holds while it still says the same
    same = kept.get("gelu") == gelu.value and isinstance(head, str) and head in ACTIVATION
    head_gelu = Value(head, "ckpt-tool.json: the LM head's gelu") if same else gelu
    return Numbers(sizes, words, words, eps, gelu, head_gelu)


def form_of(options: Options, numbers: Numbers, kept: Mapping[str, Any]) -> Form:
    """What the user asked for, else what the original was, else version 3.0 of one rank. Raises what cannot
    be shared out."""
    asked = options.family_options
    version = _version(asked.get("checkpoint_version"), kept)
    age = kept.get("age")
    if (
        not isinstance(age, str)
        or age not in AGES
        or (asked.get("checkpoint_version") is not None and is_core(age) and version != 3.0)
    ):
        age = "encoder" if version == 3.0 else "transformer"
    shards = options.shards if options.shards > 1 else None
    ranks = _count(asked.get("tensor_parallel") or shards, kept.get("tensor_parallel"))
    stages = _count(asked.get("pipeline_parallel"), kept.get("pipeline_parallel"))
    found = kept.get("args")
    args = found if isinstance(found, dict) else {}
    divisor = _count(None, args.get("make_vocab_size_divisible_by"), DIVISOR)
    words = numbers.words.value
    rows = -(-words // (divisor * ranks)) * divisor * ranks
    if kept.get("words") == words and kept.get("tensor_parallel") == ranks:
        rows = _count(None, kept.get("rows"), rows)
    _check_shares(numbers, ranks, stages, rows)
    chunks = _count(None, kept.get("virtual_stages"))
    layers = numbers.sizes["num_hidden_layers"].value
    if kept.get("pipeline_parallel") != stages or layers % (stages * chunks):
        chunks = 1
    return Form(
        age=age,
        version=version,
        ranks=ranks,
        stages=stages,
        chunks=chunks,
        rows=rows,
        divisor=divisor,
        iteration=_count(None, kept.get("iteration"), 0),
        release=kept.get("release") is not False or not kept.get("iteration"),
        gelu=numbers.gelu.value,
        head_gelu=numbers.head_gelu.value,
        args=args,
    )


def _version(asked: Any, kept: Mapping[str, Any]) -> float | None:
    if asked is None:
        found = kept.get("checkpoint_version", 3.0)
        known = isinstance(found, float | int) and found in VERSIONS
        return float(found) if known else None if found is None else 3.0
    try:
        number = float(asked)
    except (TypeError, ValueError):
        number = -1.0
    if number not in VERSIONS:
        fail("usage", f"expected 0, 1.0, 2.0 or 3.0, found {asked!r}", where="--checkpoint-version")
    return number


def _count(asked: Any, kept: Any, otherwise: int = 1) -> int:
    for found in (asked, kept):
        if type(found) is int and 0 < found < 10**9:
            return found
    return otherwise


def _check_shares(numbers: Numbers, ranks: int, stages: int, rows: int) -> None:
    sizes = numbers.sizes
    shared = [
        ("num_attention_heads", sizes["num_attention_heads"].value, ranks, "--tensor-parallel"),
        ("intermediate_size", sizes["intermediate_size"].value, ranks, "--tensor-parallel"),
        ("the padded vocabulary", rows, ranks, "--tensor-parallel"),
        ("num_hidden_layers", sizes["num_hidden_layers"].value, stages, "--pipeline-parallel"),
    ]
    fail_all(
        Problem(
            "config-mismatch",
            f"expected {name} {number} to divide by {by_name} {by}, found a rest",
            where=by_name,
        )
        for name, number, by, by_name in shared
        if number % by
    )


def homes_of(form: Form, layers: int, dtype: str) -> Callable[[str], list[Home]]:
    """Where each tensor of the tables goes, and what it is called there."""
    files, names = form.files(), own_names(form.age)
    each = layers // (form.stages * form.chunks)

    def homes(name: str) -> list[Home]:
        layer = re.search(r"(?<=layers\.)\d+", name)
        if layer is not None:
            part, local = divmod(int(layer[0]), each)
            own = names[name.replace(layer[0], "{i}", 1)].replace("{i}", str(local))
        else:
            part = 0 if name.startswith(FIRST) else form.stages * form.chunks - 1
            own = names[name]
        chunk, stage = divmod(part, form.stages)
        model = f"model{chunk}" if form.chunks > 1 else "model"
        return [(row[stage], dtype, f"{model}.{own}") for row in files]

    return homes


def to_original(
    family: str,
    checkpoint: Checkpoint,
    options: Options,
    *,
    layer: str,
    rules: Iterable[Rule],
    ignored: Mapping[str, str],
    numbers: Numbers,
    form: Form,
    more_args: Mapping[str, Value],
    notes: Iterable[str],
    foretold: Sequence[Foretold] = (),
) -> Plan:
    """The plan of a family's table; `layer` finds a layer's number in a name of the converted model."""
    source = whole_tensors(checkpoint, layer)
    dtype = options.dtype or source.dtype
    words = numbers.words.value
    args = _args(numbers, form, dtype, more_args)
    documents = {n: d.read(MAX_BYTES) for n, d in checkpoint.documents.items() if _may_be_vocabulary(n)}
    vocabulary = original_tokenizer_documents(documents, family=family)
    notes = list(notes)
    if form.rows != words:
        notes.append(
            f"{form.rows - words} rows of padding follow the {words} words, up to a multiple that the ranks "
            "share: they repeat the first words"
        )
    if not vocabulary:
        notes.append("no original tokenizer file is there; none was written")
    written = Written(
        family,
        args,
        [
            OutputDocument(TRACKER, form.tracker.encode(), "names the folder of the ranks"),
            *(OutputDocument(n, d, "the tokenizer in the folder") for n, d in vocabulary.items()),
        ],
        ignored,
        notes,
        form.kept(),
        foretold,
    )
    plan = woven_to_original(
        numbers.table(rules, form.rows),
        source,
        options,
        written,
        files=[f for stage in zip(*form.files(), strict=True) for f in stage],
        homes=homes_of(form, numbers.sizes["num_hidden_layers"].value, dtype),
    )
    beside: dict[str, object] = {"args": Namespace({k: v.value for k, v in args.items()})}
    if form.version is not None:
        beside["checkpoint_version"] = form.version
    beside["iteration"] = form.iteration
    models = [f"model{k}" for k in range(form.chunks)] if form.chunks > 1 else ["model"]
    dicts = tuple(d.replace("model", m, 1) for m in models for d in DICTS[form.age])
    outputs = tuple(replace(f, dicts=dicts, beside=beside) for f in plan.outputs)
    return replace(plan, outputs=outputs)


def _may_be_vocabulary(name: str) -> bool:
    return name in ("vocab.txt", "vocab.json", "merges.txt")


def _args(numbers: Numbers, form: Form, dtype: str, more: Mapping[str, Value]) -> dict[str, Value]:
    """The pickled args. Their gelu flags say what each part computes, whatever the code that reads them has
    by default."""
    sizes = numbers.sizes
    core, later = is_core(form.age), form.age == "norm" or is_core(form.age)
    fused = form.gelu == "tanh" and (core or form.head_gelu == "erf")
    gelu = f"{numbers.gelu.source}: {form.gelu}, LM head {form.head_gelu}"
    shares = "ranks to write"
    args = {
        "num_layers": sizes["num_hidden_layers"],
        "hidden_size": sizes["hidden_size"],
        "ffn_hidden_size": sizes["intermediate_size"],
        "num_attention_heads": sizes["num_attention_heads"],
        "kv_channels": Value(numbers.axes()["h"], "width / heads"),
        "max_position_embeddings": sizes["max_position_embeddings"],
        "seq_length": sizes["max_position_embeddings"],
        "padded_vocab_size": Value(form.rows, "rows to write"),
        "orig_vocab_size": numbers.words,
        "make_vocab_size_divisible_by": Value(form.divisor, "the original's, or 128"),
        "norm_epsilon" if later else "layernorm_epsilon": numbers.eps,
        "bias_gelu_fusion": Value(fused, gelu),
        "openai_gelu": Value(form.gelu == "tanh" and not fused, gelu),
        "fp16": Value(dtype == "F16", "dtype of the tensors"),
        "bf16": Value(dtype == "BF16", "dtype of the tensors"),
    }
    if form.version is None or form.version < 3:
        args["model_parallel_size"] = Value(form.ranks, shares)
    if form.version == 3.0 or form.stages > 1:
        args["tensor_model_parallel_size"] = Value(form.ranks, shares)
        args["pipeline_model_parallel_size"] = Value(form.stages, shares)
    args |= {
        k: Value(v, "ckpt-tool.json: the original's args") for k, v in form.args.items() if k not in args
    }
    return args | dict(more)
