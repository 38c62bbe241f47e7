"""Gated decoders with biases for query, key and value in Megatron-Core's GPT layout, which are trained over
tensor-parallel ranks and pipeline stages: another layout of a family that is published in Hugging Face's.

linear_qkv holds, for each key/value head, the queries that share it, the key and the value; a rank holds
whole groups. linear_fc1 of a rank holds the gates of its units, then their ups. The tables leave out what
stands before every name (`model.`), and number layers through all stages.

Source: NVIDIA/Megatron-LM core_v0.9.0 (core/models/gpt, core/transformer), NVIDIA-NeMo/Megatron-Bridge
@067f987d (models/conversion/param_mapping.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.checkpoint.megatron import FILE, TRACKER, arguments, check_same_run, folder_name, grid
from ckpt_tool.checkpoint.torch_zip_writer import Namespace
from ckpt_tool.convert.crosscheck import rank_problems
from ckpt_tool.convert.dialects import published
from ckpt_tool.convert.dialects.converted import generation_config, kept_facts
from ckpt_tool.convert.facts_classes import Class
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import Field, Known, by_name
from ckpt_tool.convert.params import Facts
from ckpt_tool.convert.plan import Options, OutputDocument, Plan, Value
from ckpt_tool.convert.source import Source, dtype_value, layer_count
from ckpt_tool.convert.weave import Table, Written, to_hf, to_original
from ckpt_tool.errors import Problem, fail, fail_all

WORDS = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
S, T = "decoder.layers.{i}.", "model.layers.{i}."
QKV = tuple(f"{T}self_attn.{p}_proj" for p in "qkv")
NORMS = {  # name of the norm of attention and of the feed-forward, by whether Transformer Engine holds them
    True: ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
    False: ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
}
IGNORED = {
    r"(optimizer|(lr|opt_param)_scheduler|rng_state|rerun_state_machine|ft_state|content_metadata)(\..*)?": (
        "state of the training run"
    ),
    r".*\._extra_state(\..*)?": "scales for 8-bit training",
}
FIELDS = {
    "k": "num_key_value_heads",
    "d": "hidden_size",
    "f": "intermediate_size",
    "n": "num_attention_heads",
}
DIVISOR = 128  # --make-vocab-size-divisible-by, by default

# Args of other values are of another model.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "swiglu": (True, None),
    "normalization": ("RMSNorm", None),
    "add_bias_linear": (False, None),
    "add_qkv_bias": (True, None),
    "position_embedding_type": ("rope", None),
    "rotary_percent": (1, 1.0, None),
    "rotary_interleaved": (False, None),
    "rotary_seq_len_interpolation_factor": (1, None),
    "apply_layernorm_1p": (False, None),
    "qk_layernorm": (False, None),
    "num_experts": (None,),
    "window_size": (None,),
}


def table(shared: int, *, engine: bool, tied: bool, head: bool) -> tuple[Rule, ...]:
    """All rows. `shared` queries go with each key; `engine`: the norms stand in the layers after them;
    `head`: there is an output layer, where it is `tied` the last stage's copy of the words."""
    before, after = NORMS[engine]
    qkv = [
        rule(
            f"{S}self_attention.linear_qkv.{kind}",
            tuple(f"{name}.{kind}" for name in QKV),
            pattern,
            cut=("s", (shared, 1, 1)),
            split="k",
        )
        for kind, pattern in (("weight", "(k s h) d"), ("bias", "(k s h)"))
    ]
    last = rule(HEAD, "model.embed_tokens.weight" if tied else "lm_head.weight", "v d", split="v", tied=tied)
    return (
        rule(WORDS, "model.embed_tokens.weight", "v d", split="v"),
        rule(S + before, T + "input_layernorm.weight", "d"),
        *qkv,
        rule(S + "self_attention.linear_proj.weight", T + "self_attn.o_proj.weight", "d (n h)", split="n"),
        rule(S + after, T + "post_attention_layernorm.weight", "d"),
        rule(
            S + "mlp.linear_fc1.weight",
            (T + "mlp.gate_proj.weight", T + "mlp.up_proj.weight"),
            "(g f) d",
            cut=("g", (1, 1)),
            split="f",
        ),
        rule(S + "mlp.linear_fc2.weight", T + "mlp.down_proj.weight", "d f", split="f"),
        rule("decoder.final_layernorm.weight", "model.norm.weight", "d"),
        *((last,) if head else ()),
    )


@dataclass(frozen=True)
class Core:
    """A family whose models are trained in this layout. `config` is the class of its config.json, `fields`
    are written there beside those that args say; those called `unsaid` must be empty, since args have no word
    for them. A vocabulary of one of `published_rows`, padding included, is the published one, whose
    `end_of_text` begins and ends a text."""

    family: str
    title: str  # as people call it
    architecture: str
    model_type: str
    config: Class
    fields: tuple[Field, ...] = ()
    unsaid: tuple[str, ...] = ("rope_scaling",)
    published_rows: tuple[int, ...] = ()
    end_of_text: int = 0

    def holds(self, names: Iterable[str]) -> bool:
        return prefix_of(names) is not None

    def recognise(self, names: Collection[str]) -> tuple[bool, str]:
        p = prefix_of(names)
        if f"{p}decoder.layers.0.self_attention.linear_qkv.bias" not in names:
            why = "Megatron-Core names without biases for query, key and value, which "
            return False, f"{why}{self.title} has"
        if f"{p}decoder.layers.0.mlp.linear_fc1.bias" in names:
            why = f"Megatron-Core names with biases in the feed-forward, which {self.title} has none of"
            return False, why
        return True, "Megatron-Core names with biases for query, key and value only"

    def plan(self, checkpoint: Checkpoint, options: Options) -> Plan:
        return plan(self, checkpoint, options)

    def plan_original(self, checkpoint: Checkpoint, options: Options, known: Known) -> Plan:
        """`known` are the fields of the published layout, read from config.json."""
        return plan_original(self, checkpoint, options, known)


# --- the files ------------------------------------------------------------------------------------------


def prefix_of(names: Iterable[str]) -> str | None:
    """What stands before every name; None where these are no names of Megatron-Core's GPT."""
    stem = "decoder.layers.0.self_attention.linear_qkv.weight"
    return next((n.removesuffix(stem) for n in names if n.endswith(stem)), None)


def engine_of(source: Source) -> bool:
    """Whether Transformer Engine holds the norms."""
    return f"decoder.layers.0.{NORMS[True][0]}" in source.tensors


def open_ranks(m: Core, checkpoint: Checkpoint) -> Source:
    """Kinds: `unsupported`, `missing-shard`, `shard-conflict`, `missing-tensor`."""
    own, why = m.recognise(set(checkpoint.names()))
    if not own:
        fail("unsupported", f"expected {m.title}, found {why}", file=checkpoint.path.name)
    check_same_run(checkpoint)
    rows = grid(checkpoint)
    prefix = prefix_of(checkpoint.names()) or ""
    fail_all(
        p
        for stage in range(len(rows[0]))
        for p in rank_problems(
            [row[stage] for row in rows],
            {row[stage]: _of_model(checkpoint, row[stage], prefix) for row in rows},
        )
    )
    tensors: dict[str, tuple[TensorInfo, ...]] = {}
    for row in rows:
        for name, tensor in _joined(checkpoint, row, prefix).items():
            tensors[name] = (*tensors.get(name, ()), tensor)
    layers = layer_count(tensors, r"decoder\.layers\.(\d+)\.")
    told = arguments(checkpoint.files[rows[0][0]])
    source = Source(checkpoint, tensors, len(rows), layers, told, prefix, len(rows[0]))
    _check_gated(source)
    return source


def _of_model(checkpoint: Checkpoint, file: str, prefix: str) -> dict[str, TensorInfo]:
    found = checkpoint.files[file].tensors
    return {n: t for n, t in found.items() if n.startswith(prefix) and not _is_state(n)}


def _is_state(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in IGNORED)


def _joined(checkpoint: Checkpoint, stages: list[str], prefix: str) -> dict[str, TensorInfo]:
    """The stages of one rank, which number their layers from 0 each."""
    made: dict[str, TensorInfo] = {}
    before = 0
    for file in stages:
        own = _of_model(checkpoint, file, prefix)
        here = set()
        for name, tensor in own.items():
            short = name.removeprefix(prefix)
            if m := re.match(r"decoder\.layers\.(\d{1,6})\.", short):
                here.add(int(m[1]))
                short = f"decoder.layers.{before + int(m[1])}.{short[m.end() :]}"
            if short in made:
                message = f"expected the tensor on one stage, found it in {made[short].file} too"
                fail("shard-conflict", message, file=file, where=name)
            made[short] = tensor
        if here != set(range(len(here))):
            message = f"expected the stage's layers 0 to {len(here) - 1}, found {sorted(here)[:8]}"
            fail("missing-tensor", message, file=file)
        before += len(here)
    return made


def _check_gated(source: Source) -> None:
    down, up = (source.first(f"decoder.layers.0.mlp.linear_fc{k}.weight") for k in (2, 1))
    if down is None or up is None or up.shape[0] != 2 * down.shape[-1]:
        fail(
            "unsupported",
            "expected a gated feed-forward (two rows of linear_fc1 to a column of linear_fc2), found another",
            file=source.checkpoint.path.name,
        )


# --- numbers --------------------------------------------------------------------------------------------


def dimensions(d: Source, facts: Facts) -> dict[str, Value]:
    for name, allowed in COMPUTED.items():
        found = (facts.document or {}).get(name)
        if found not in allowed:
            facts.refuse("unsupported", f"expected {allowed[0]}, found {str(found)[:40]}", name)
    layers = Value(d.layers, "layers in the tensor names")
    sizes = {
        "hidden_size": facts.integer("hidden_size", "hidden_size", rule=d.size(WORDS, 1, shared=False)),
        "intermediate_size": facts.integer(
            "intermediate_size", "ffn_hidden_size", rule=d.size(f"{S}mlp.linear_fc2.weight", 1)
        ),
        "num_hidden_layers": facts.integer("num_hidden_layers", "num_layers", rule=layers, maximum=10_000),
        "num_attention_heads": facts.integer(
            "num_attention_heads", "num_attention_heads", ask="the number of query heads"
        ),
    }
    facts.check()
    told = facts.document or {}
    grouped = told.get("group_query_attention")
    key = ("num_query_groups",) if grouped else ()
    heads = sizes["num_attention_heads"]
    as_many = Value(heads.value, "args: group_query_attention is not set, so one for each query head")
    sizes["num_key_value_heads"] = facts.integer(
        "num_key_value_heads", *key, rule=as_many if told and not grouped else None
    )
    facts.used.add("num_query_groups")
    key_eps = "norm_epsilon" if facts.given("norm_epsilon") else "layernorm_epsilon"
    sizes["rms_norm_eps"] = facts.number("rms_norm_eps", key_eps, ask="the epsilon of the norms")
    sizes["rope_theta"] = facts.number("rope_theta", "rotary_base", ask="the base of the rotary frequencies")
    rows = d.size(WORDS, 0)
    words = next((k for k in ("orig_vocab_size", "vocab_size") if facts.given(k)), None)
    sizes["vocab_size"] = facts.integer("vocab_size", *([words] if words else []), rule=rows)
    if rows is not None and sizes["vocab_size"].value > rows.value:
        message = f"expected at least {sizes['vocab_size'].value} words ({sizes['vocab_size'].source}), found"
        facts.refuse("config-mismatch", f"{message} {rows.value} ({rows.source})", "vocab_size")
    sizes["tie_word_embeddings"] = _tie(d, facts)
    facts.check()
    width, kv = sizes["hidden_size"].value, sizes["num_key_value_heads"].value
    if width % heads.value or told.get("kv_channels") not in (None, width // heads.value):
        found = told.get("kv_channels") or "a rest"
        message = f"expected heads of {width} / {heads.value} channels, found {found}"
        facts.refuse("config-mismatch", message, "num_attention_heads")
    elif heads.value % kv or kv % d.ranks:
        message = (
            f"expected {kv} key/value heads that divide {heads.value} and that {d.ranks} ranks share evenly"
        )
        facts.refuse("config-mismatch", f"{message}, found a rest", "num_key_value_heads")
    facts.check()
    return sizes


def _tie(ranks: Source, facts: Facts) -> Value:
    key, name = "untie_embeddings_and_output_weights", "tie_word_embeddings"
    apart = HEAD in ranks.tensors and ranks.stages == 1
    rule_ = Value(not apart, f"rule: {'an' if apart else 'no'} output layer apart from the embedding")
    if name not in facts.settings and facts.given(key):
        untied = facts.boolean(key, key, rule=rule_)
        found = Value(not untied.value, untied.source)
    else:
        found = facts.boolean(name, rule=rule_)
    if not found.value and HEAD not in ranks.tensors:
        facts.refuse("missing-tensor", f"expected this tensor ({found.source}), found none", HEAD)
    return found


def axes_of(sizes: Mapping[str, Value], rows: int) -> dict[str, int]:
    """k key/value heads, s queries that share one, the key and the value, n query heads, h head width, d
    width, g gate and up, f feed-forward width, v words with their padding."""
    n, k, d = (sizes[f"{x}"].value for x in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    return {
        "n": n,
        "k": k,
        "s": n // k + 2,
        "h": d // n,
        "d": d,
        "g": 2,
        "f": sizes["intermediate_size"].value,
        "v": rows,
    }


# --- to Hugging Face ------------------------------------------------------------------------------------

FREE = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}


def plan(m: Core, checkpoint: Checkpoint, options: Options) -> Plan:
    if options.gqa is not None:
        message = "expected the Hugging Face layout, found Megatron-Core's"
        fail("usage", message, where="--gqa", hint="convert first, then pool the heads of what comes out")
    download = open_ranks(m, checkpoint)
    facts = Facts(download.told, "args", options.settings)
    sizes = dimensions(download, facts)
    rows = download.size(WORDS, 0)
    padded = sizes["vocab_size"] if rows is None else rows
    why = f"family {m.family}"
    config: dict[str, Value] = {
        "architectures": facts.fixed("architectures", [m.architecture], why),
        "model_type": facts.fixed("model_type", m.model_type, why),
        "hidden_act": facts.fixed("hidden_act", "silu", "args: swiglu"),
        **sizes,
        **Known(by_name(m.fields), facts, download, options).values(),
        "max_position_embeddings": facts.integer(
            "max_position_embeddings", "max_position_embeddings", ask="the longest text"
        ),
        "torch_dtype": dtype_value(download, options),
        **{name: facts.like(name, v, f"default of {m.config.name}") for name, v in FREE.items()},
    }
    ids = ("bos_token_id", "eos_token_id")
    if padded.value in m.published_rows or set(ids) & facts.settings.keys():
        end = Value(m.end_of_text, f"rule: <|endoftext|> in every {m.title} vocabulary")
        config |= {name: facts.token_ids(name, rule=end) for name in ids}
    facts.check_settings({*config, *ids})
    facts.check()
    words = sizes["vocab_size"].value
    tokenizer = published.copied(published.tokenizer_files(checkpoint, options))
    notes = [] if tokenizer else ["no tokenizer file is beside the ranks; none was written"]
    if padded.value != words:
        notes.append(f"{padded.value - words} rows of padding after the {words} words were left out")
    engine, head = engine_of(download), HEAD in download.tensors
    kept = {
        "form": "mcore",
        "tensor_parallel": download.ranks,
        "rows": padded.value,
        "engine": engine,
        "head": head,
    }
    beside = Written(m.family, config, [generation_config(config), *tokenizer], IGNORED, notes, kept)
    return to_hf(rows_of(sizes, padded.value, engine=engine, head=head), download, options, beside)


def rows_of(sizes: Mapping[str, Value], rows: int, *, engine: bool, head: bool) -> Table:
    tied = bool(sizes["tie_word_embeddings"].value)
    shared = sizes["num_attention_heads"].value // sizes["num_key_value_heads"].value
    return Table(
        table(shared, engine=engine, tied=tied, head=head),
        axes_of(sizes, rows),
        FIELDS,
        sizes,
        sizes["num_hidden_layers"],
        sizes["vocab_size"].value,
    )


# --- from Hugging Face ----------------------------------------------------------------------------------


def plan_original(m: Core, checkpoint: Checkpoint, options: Options, known: Known) -> Plan:
    """Ranks in the layout of Megatron-Core, one pipeline stage, with the args that reading again needs."""
    facts, download, sizes = known.facts, known.source, known.values(known.fields)
    once = kept_facts(checkpoint)
    asked = options.family_options.get("tensor_parallel") or (options.shards if options.shards > 1 else None)
    count = int(asked or once.get("tensor_parallel") or 1)
    words = sizes["vocab_size"].value
    multiple = DIVISOR * count
    rows = -(-words // multiple) * multiple
    if once.get("tensor_parallel") == count and type(once.get("rows")) is int and once["rows"] >= words:
        rows = once["rows"]
    _check_shares(sizes, rows, count)
    if any(sizes[name].value for name in m.unsaid):
        message = (
            "expected no scaled frequencies and no window, which the args written here do not say, found some"
        )
        fail("unsupported", message, file="config.json")
    length = facts.integer("max_position_embeddings", "max_position_embeddings")
    facts.check_settings({*sizes, "max_position_embeddings"})
    facts.check()
    tied = bool(sizes["tie_word_embeddings"].value)
    files = [f"release/{folder_name(t, 0, False)}/{FILE}" for t in range(count)]
    dtype = options.dtype or download.dtype
    args = arguments_of(m, sizes, length, rows, count, dtype)
    notes = []
    if rows != words:
        notes.append(f"{rows - words} rows of padding follow the {words} words; they repeat the first words")
    written = Written(
        m.family,
        args,
        [
            OutputDocument(TRACKER, b"release", "names the folder of the ranks"),
            *published.copied(published.tokenizer_files(checkpoint, options)),
        ],
        {"lm_head.weight": "the same as the embedding"} if tied else {},
        notes,
        {"form": "mcore", "tensor_parallel": count},
    )
    made = to_original(
        rows_of(sizes, rows, engine=bool(once.get("engine", True)), head=not tied),
        download,
        options,
        written,
        files=files,
        homes=lambda name: [(f, dtype, f"model.{name}") for f in files],
    )
    beside = {
        "args": Namespace({k: v.value for k, v in args.items()}),
        "checkpoint_version": 3.0,
        "iteration": 0,
    }
    return replace(made, outputs=tuple(replace(f, dicts=("model",), beside=beside) for f in made.outputs))


def _check_shares(sizes: Mapping[str, Value], rows: int, count: int) -> None:
    shared = {n: sizes[n].value for n in ("num_key_value_heads", "intermediate_size")} | {
        "padded words": rows
    }
    fail_all(
        Problem(
            "config-mismatch",
            f"expected {name} {number} to divide by {count} tensor-parallel ranks, found a rest",
            where="--tensor-parallel",
        )
        for name, number in shared.items()
        if number % count
    )


def arguments_of(
    m: Core, sizes: Mapping[str, Value], length: Value, rows: int, count: int, dtype: str
) -> dict[str, Value]:
    """The pickled args, under the names of core_v0.9.0 (megatron/training/arguments.py)."""
    architecture = f"{m.title}'s architecture"
    kv = sizes["num_key_value_heads"]
    return {
        "num_layers": sizes["num_hidden_layers"],
        "hidden_size": sizes["hidden_size"],
        "ffn_hidden_size": sizes["intermediate_size"],
        "num_attention_heads": sizes["num_attention_heads"],
        "group_query_attention": Value(kv.value != sizes["num_attention_heads"].value, kv.source),
        "num_query_groups": kv,
        "kv_channels": Value(
            sizes["hidden_size"].value // sizes["num_attention_heads"].value, "width / heads"
        ),
        "max_position_embeddings": length,
        "seq_length": length,
        "padded_vocab_size": Value(rows, "rows to write"),
        "orig_vocab_size": sizes["vocab_size"],
        "norm_epsilon": sizes["rms_norm_eps"],
        "rotary_base": sizes["rope_theta"],
        "untie_embeddings_and_output_weights": Value(
            not sizes["tie_word_embeddings"].value, sizes["tie_word_embeddings"].source
        ),
        "swiglu": Value(True, architecture),
        "normalization": Value("RMSNorm", architecture),
        "add_bias_linear": Value(False, architecture),
        "add_qkv_bias": Value(True, architecture),
        "position_embedding_type": Value("rope", architecture),
        "rotary_percent": Value(1.0, architecture),
        "tensor_model_parallel_size": Value(count, "ranks to write"),
        "pipeline_model_parallel_size": Value(1, "one stage"),
        "params_dtype": Value(f"torch.{DTYPES[dtype].torch}", "dtype of the tensors"),
    }
