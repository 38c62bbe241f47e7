"""Llama 1, 2, 3, 3.1, 3.2 and 3.3 (text) and Code Llama.

Original: `consolidated.NN.pth`, one for each model-parallel rank, and params.json, as meta-llama/llama
@57b0eb62 (1) and @689c7f26 (2), meta-llama/codellama @077f7332 and meta-llama/llama-models @43e87a37 (3.x)
read them.
"""

from __future__ import annotations

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.dialects import consolidated as decoder
from ckpt_tool.convert.dialects.consolidated import (
    equal_names,
    feed_forward,
    foreign,
    open_download,
    params_keys,
)
from ckpt_tool.convert.dialects.converted import kept_facts, read_config
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.options import POOLING, SHARDS
from ckpt_tool.convert.params import Facts
from ckpt_tool.convert.plan import Options, Plan, Value
from ckpt_tool.convert.source import Source, dtype_value
from ckpt_tool.convert.vocabularies import Vocabulary

ARCHITECTURE = "LlamaForCausalLM"
S, T = "layers.{i}.", "model.layers.{i}."

LAYER = (
    rule(S + "attention_norm.weight", T + "input_layernorm.weight", "d"),
    rule(
        S + "attention.wq.weight",
        T + "self_attn.q_proj.weight",
        "(n half two) d -> (n two half) d",
        split="n",
    ),
    rule(
        S + "attention.wk.weight",
        T + "self_attn.k_proj.weight",
        "(k half two) d -> (k two half) d",
        split="k",
    ),
    rule(S + "attention.wv.weight", T + "self_attn.v_proj.weight", "(k h) d", split="k"),
    rule(S + "attention.wo.weight", T + "self_attn.o_proj.weight", "d (n h)", split="n"),
    rule(S + "ffn_norm.weight", T + "post_attention_layernorm.weight", "d"),
    rule(S + "feed_forward.w1.weight", T + "mlp.gate_proj.weight", "f d", split="f"),
    rule(S + "feed_forward.w3.weight", T + "mlp.up_proj.weight", "f d", split="f"),
    rule(S + "feed_forward.w2.weight", T + "mlp.down_proj.weight", "d f", split="f"),
)
NORM = rule("norm.weight", "model.norm.weight", "d")


def table(*, embedding: str = "d", tied: bool = False, head: bool = True) -> tuple[Rule, ...]:
    """All rows. `embedding` is the axis of tok_embeddings that ranks share: columns "d" before Llama 3,
    rows "v" since. A tied head is compared with the embedding; without `head` the original has none."""
    words = rule("tok_embeddings.weight", "model.embed_tokens.weight", "v d", split=embedding)
    last = rule(
        "output.weight",
        "model.embed_tokens.weight" if tied else "lm_head.weight",
        "v d",
        split="v",
        tied=tied,
    )
    return (words, *LAYER, NORM, last) if head else (words, *LAYER, NORM)


RULES = table()
FREE = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}

# (width, layers) of Llama 3.2 1B and 3B. Nothing in their files says that the head is tied and that rotary
# frequencies are stretched 32 times: Meta's code has 8 for all, its maintainers confirm 32 (llama-models
# #166, #241).
SMALL = ((2048, 16), (3072, 28))
LLAMA3_WORDS = 128256
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def recognise(checkpoint: Checkpoint) -> tuple[bool, str]:
    names = checkpoint.names()
    if reason := foreign(names):
        return False, reason
    form = feed_forward(names)
    if form != "dense":
        return False, "has experts" if form else "no layers.0.feed_forward.w1.weight"
    keys = params_keys(checkpoint)
    if told := sorted(keys & {"multiple_of", "ffn_dim_multiplier", "use_scaled_rope"}):
        return True, f"dense layers, and params.json has {', '.join(told)}"
    if told := sorted(keys & {"hidden_dim", "head_dim", "sliding_window", "_sliding_window"}):
        return False, f"params.json has {', '.join(told)}, as Mistral's do"
    if equal_names(checkpoint):
        return True, "dense layers in model-parallel ranks of equal tensor names"
    if any(f.endswith(".safetensors") for f in checkpoint.files):
        return False, "in safetensors, as Mistral's are and Llama's are not"
    return True, "dense layers, and nothing in params.json that only Mistral's have"


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    download = open_download(checkpoint)
    facts = decoder.read_params(checkpoint, options)
    if facts.given("sliding_window", "_sliding_window", "moe.num_experts"):
        facts.refuse(
            "unsupported",
            "expected no sliding window and no experts in family llama, found some",
            "sliding_window",
        )
    unnamed = facts.document is None
    theta = facts.number("rope_theta", "rope_theta", rule=None if unnamed else default_theta(facts, download))
    scaled = facts.boolean(
        "use_scaled_rope", "use_scaled_rope", rule=Value(False, "rule: absent, so not scaled")
    )
    if unnamed and "rope_scaling" not in facts.settings and words(download) == LLAMA3_WORDS:
        facts.anything("rope_scaling", ask="the rotary scaling of Llama 3.1 and later, or null for Llama 3")
    sizes = decoder.dimensions(download, facts, ffn=feed_forward_width(facts, download))
    small = (sizes["hidden_size"].value, sizes["num_hidden_layers"].value) in SMALL
    scaling = rope_scaling(facts, scaled, small)
    tie = tied_head(facts, download, sizes, scaling, small)
    llama3 = scaling.value is not None or sizes["vocab_size"].value == LLAMA3_WORDS
    config: dict[str, Value] = {
        **fixed_values(facts),
        **sizes,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": context(facts, download, sizes, theta, scaling),
        "tie_word_embeddings": tie,
        "torch_dtype": dtype_value(download, options),
        **{name: facts.like(name, v, "default of LlamaConfig") for name, v in FREE.items()},
    }
    numbers = {k: v for k, v in config.items() if k in NUMBERS}
    facts.check_settings({*config, "bos_token_id", "eos_token_id", "pad_token_id"})
    notes = facts.unused(decoder.RUN_TIME)
    facts.check()
    tokenizer = decoder.tokenizer_of(download, options, family="llama", config=config)
    config |= decoder.token_ids(facts, tokenizer, default_ids(llama3))
    facts.check()
    notes += untold(facts, download, sizes, llama3)
    axis = decoder.embedding_axis(download, sizes["hidden_size"].value)
    return decoder.to_hf(
        "llama",
        download,
        options,
        rules=table(
            embedding=axis, tied=bool(tie.value), head="output.weight" in download.tensors or not tie.value
        ),
        sizes=sizes,
        config=config,
        embedding=axis,
        tokenizer=tokenizer,
        notes=notes,
        original=decoder.kept(
            facts, download, numbers, **({"embedding": axis} if download.ranks > 1 else {})
        ),
    )


def fixed_values(facts: Facts) -> dict[str, Value]:
    """What is the same for every Llama."""
    no_bias = "the original's projections have no biases"
    return {
        "architectures": facts.fixed("architectures", [ARCHITECTURE], "family llama"),
        "model_type": facts.fixed("model_type", "llama", "family llama"),
        "hidden_act": facts.fixed("hidden_act", "silu", "the original's feed_forward"),
        "attention_bias": facts.fixed("attention_bias", False, no_bias),
        "mlp_bias": facts.fixed("mlp_bias", False, no_bias),
        "pretraining_tp": facts.fixed(
            "pretraining_tp", 1, "one process; more would imitate the rounding of ranks"
        ),
    }


def untold(facts: Facts, download: Source, sizes: dict[str, Value], llama3: bool) -> list[str]:
    """What the files leave open and the user may know."""
    notes = []
    if sizes["vocab_size"].value == LLAMA3_WORDS and "eos_token_id" not in facts.settings:
        notes.append(
            "eos_token_id is the base model's, which the files do not tell from an instruct model: "
            "for one, --set eos_token_id=[128001,128008,128009]"
        )
    kv, ranks = sizes["num_key_value_heads"], download.ranks
    if ranks == kv.value and ranks > 8 and llama3:
        notes.append(
            f"{kv.value} key/value heads are kept as {kv.source} has them; if pairs of ranks hold the same "
            f"head, --set num_key_value_heads={kv.value // 2} stores each once and compares the copies"
        )
    return notes


NUMBERS = (
    *decoder.FIELDS.values(),
    "num_hidden_layers",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
)


def words(download: Source) -> int:
    rows = download.size("output.weight", 0)
    return 0 if rows is None else int(rows.value)


def default_theta(facts: Facts, download: Source) -> Value:
    """Llama 1 and 2 have 1e4 in their code and Code Llama as its default; Llama 3's code defaults to 5e5."""
    if facts.given("use_scaled_rope") or words(download) == LLAMA3_WORDS:
        return Value(5e5, "rule: rope_theta absent from params.json of a Llama 3: 5e5")
    return Value(1e4, "rule: rope_theta absent from params.json of a Llama 1, 2 or Code Llama: 1e4")


def feed_forward_width(facts: Facts, download: Source) -> Value | None:
    """The original's arithmetic: two thirds of 4 x dim, times ffn_dim_multiplier, up to a multiple of
    multiple_of; int() cuts off at both steps. None when params.json does not say, and shapes decide."""
    if not facts.given("multiple_of"):
        return None
    multiple = facts.integer("multiple_of", "multiple_of").value
    factor = facts.number("ffn_dim_multiplier", "ffn_dim_multiplier", rule=Value(None, "absent")).value
    dim = facts.integer("hidden_size", "dim", rule=download.size("norm.weight", 0, shared=False)).value
    return Value(
        width_rule(dim, multiple, factor), "rule: from dim, multiple_of and ffn_dim_multiplier in params.json"
    )


def width_rule(dim: int, multiple_of: int, multiplier: float | None) -> int:
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def rope_scaling(facts: Facts, scaled: Value, small: bool) -> Value:
    """The block in config.json for use_scaled_rope; see `SMALL` for its factor."""
    if "rope_scaling" in facts.settings:
        given = facts.anything("rope_scaling")
        if given.value is not None and not isinstance(given.value, dict):
            facts.refuse("bad-config", "expected an object or null, found neither", "rope_scaling")
        return given
    if not scaled.value:
        return Value(None, scaled.source)
    factor, why = (32.0, "the shape of 3.2 1B or 3B") if small else (8.0, "3.1 and 3.3")
    return Value(
        {"factor": factor, **SCALING, "rope_type": "llama3"},
        f"{scaled.source}; rule: factor {factor:g} for {why}",
    )


def tied_head(facts: Facts, download: Source, sizes: dict[str, Value], scaling: Value, small: bool) -> Value:
    """Only 3.2 1B and 3B tie the head to the embedding; their files hold it twice, and both are compared."""
    tied = small and scaling.value is not None and sizes["vocab_size"].value == LLAMA3_WORDS
    why = "the shape of 3.2 1B or 3B" if tied else "only 3.2 1B and 3B tie the head"
    found = facts.boolean("tie_word_embeddings", rule=Value(tied, f"rule: {why}"))
    if "output.weight" not in download.tensors and not found.value:
        facts.refuse(
            "missing-tensor",
            "expected output.weight, found none",
            "output.weight",
            "--set tie_word_embeddings=true",
        )
    return found


def context(facts: Facts, download: Source, sizes: dict[str, Value], theta: Value, scaling: Value) -> Value:
    """The length each generation was published for. Generations are told apart by what their files differ in:
    Llama 1 by float16 or its tables of frequencies, Code Llama by theta 1e6 or its 32016 words."""
    if scaling.value is not None:
        length, why = 131072, "Llama 3.1 and later (scaled rotary frequencies)"
    elif sizes["vocab_size"].value == LLAMA3_WORDS:
        length, why = 8192, "Llama 3 (128256 words, not scaled)"
    elif theta.value == 1e6:
        length, why = 16384, "Code Llama (rope_theta 1e6)"
    elif sizes["vocab_size"].value == 32016:
        length, why = 4096, "Code Llama 70B Python and Instruct (32016 words, rope_theta 1e4)"
    elif download.dtype == "F16" or any("inner_attention" in n for n in download.tensors):
        length, why = 2048, "Llama 1 (float16, or frequencies in every layer)"
    else:
        length, why = 4096, "Llama 2 (none of the others)"
    return facts.integer("max_position_embeddings", rule=Value(length, f"rule: {why}"))


def default_ids(llama3: bool) -> dict[str, Value]:
    bos, eos, why = (128000, 128001, "Llama 3") if llama3 else (1, 2, "Llama 1, 2 and Code Llama")
    return {
        "bos_token_id": Value(bos, f"rule: {why} tokenizers"),
        "eos_token_id": Value(eos, f"rule: {why} tokenizers"),
    }


# --- the way back ---------------------------------------------------------------------------------------


def plan_original(checkpoint: Checkpoint, options: Options) -> Plan:
    facts = read_config(checkpoint, options.settings, (ARCHITECTURE,))
    theta = facts.number("rope_theta", "rope_theta", rule=Value(1e4, "rule: default of LlamaConfig"))
    scaling = facts.anything("rope_scaling", "rope_scaling", rule=Value(None, "rule: default of LlamaConfig"))
    tie = facts.boolean(
        "tie_word_embeddings", "tie_word_embeddings", rule=Value(False, "rule: default of LlamaConfig")
    )
    for name in ("attention_bias", "mlp_bias"):
        facts.fixed(name, False, "the original has none", name)
    sizes = decoder.hf_dimensions(facts)
    small = (sizes["hidden_size"].value, sizes["num_hidden_layers"].value) in SMALL
    scaled = use_scaled_rope(facts, scaling)
    if sizes["head_dim"].value * sizes["num_attention_heads"].value != sizes["hidden_size"].value:
        facts.refuse(
            "unsupported", "expected hidden_size / num_attention_heads, as Meta's code does", "head_dim"
        )
    facts.check_settings({*sizes, "rope_theta", "rope_scaling", "tie_word_embeddings"})
    facts.check()
    original = kept_facts(checkpoint)
    llama3 = scaled or sizes["vocab_size"].value == LLAMA3_WORDS
    ranks = options.shards
    files = [f"consolidated.{k:02d}.pth" for k in range(ranks)]
    numbers = {**sizes, "rope_theta": theta, "rope_scaling": scaling, "tie_word_embeddings": tie}
    params = native_params(sizes, theta, scaled, llama3, ranks)
    same = original.get("ranks") == ranks or sizes["num_key_value_heads"].value >= ranks
    document, notes = decoder.params_document(params, original if same else {}, numbers)
    notes += unsaid(scaling, tie, small)
    if original.get("ranks", ranks) != ranks:
        notes.append(
            f"the original had {original['ranks']} ranks: --shards {original['ranks']} writes as many"
        )
    axis = "v" if original.get("embedding", "v" if llama3 or theta.value == 5e5 else "d") == "v" else "d"
    tied = bool(tie.value) and not checkpoint.find("lm_head.weight")
    return decoder.to_original(
        "llama",
        checkpoint,
        options,
        rules=table(embedding=axis, tied=tied),
        sizes=sizes,
        embedding=axis,
        files=files,
        home=lambda _: files,
        params=params,
        document=document,
        notes=notes,
    )


def use_scaled_rope(facts: Facts, scaling: Value) -> bool:
    """params.json has one bit for the scaling: all but the factor must be what Llama 3.1's code has."""
    if scaling.value is None:
        return False
    given = scaling.value if isinstance(scaling.value, dict) else {}
    kind = given.get("rope_type", given.get("type"))
    if (
        kind != "llama3"
        or any(given.get(k) != v for k, v in SCALING.items())
        or given.get("factor") not in (8, 32)
    ):
        wanted = ", ".join(f"{k} {v:g}" for k, v in SCALING.items())
        facts.refuse(
            "unsupported",
            f"expected rope_type llama3 with factor 8 or 32, {wanted} (all that params.json can say), "
            "found another scaling",
            "rope_scaling",
        )
    return True


def unsaid(scaling: Value, tie: Value, small: bool) -> list[str]:
    """What params.json has no field for and a reader of the original would take to be otherwise."""
    notes = []
    if scaling.value is not None and scaling.value.get("factor") != (32 if small else 8):
        notes.append(
            f"params.json cannot say the rotary factor {scaling.value['factor']:g}: converting again needs "
            "--set rope_scaling=..."
        )
    if tie.value and not small:
        notes.append(
            "output.weight is a copy of the embedding, which params.json cannot say: converting again needs "
            "--set tie_word_embeddings=true"
        )
    return notes


def native_params(
    sizes: dict[str, Value], theta: Value, scaled: bool, llama3: bool, ranks: int
) -> dict[str, Value]:
    """params.json as Meta writes it. With fewer key/value heads than ranks each rank holds one of them and
    n_kv_heads counts the copies, as in Llama 3.1 405B for 16 ranks."""
    kv = sizes["num_key_value_heads"]
    if kv.value < ranks:
        kv = Value(ranks, f"{kv.source}, one for each of {ranks} ranks")
    params = {
        "dim": sizes["hidden_size"],
        "n_layers": sizes["num_hidden_layers"],
        "n_heads": sizes["num_attention_heads"],
    }
    if llama3 or kv.value != sizes["num_attention_heads"].value:
        params["n_kv_heads"] = kv
    params["vocab_size"] = sizes["vocab_size"]
    params |= width_params(sizes, later=llama3 or theta.value != 1e4)
    params["norm_eps"] = sizes["rms_norm_eps"]
    if llama3 or theta.value != 1e4:
        params["rope_theta"] = theta
    if scaled:
        params["use_scaled_rope"] = Value(True, "config.json: rope_scaling")
    return params


def width_params(sizes: dict[str, Value], *, later: bool) -> dict[str, Value]:
    """multiple_of and ffn_dim_multiplier that give the feed-forward width: a published pair where one does
    (`later` models always have a multiplier), else a pair that gives any width."""
    dim, width = sizes["hidden_size"].value, sizes["intermediate_size"].value
    plain: tuple[int, float | None] = (256, 1.0 if later else None)
    published: list[tuple[int, float | None]] = [plain, (256, 1.5), (4096, 1.3), (1024, 1.3), (4096, 1.2)]
    hidden = int(2 * (4 * dim) / 3)
    published.append((1, (width + 0.5) / max(1, hidden)))
    multiple, factor = next(pair for pair in published if width_rule(dim, *pair) == width)
    source = "rule: gives intermediate_size of config.json"
    found = {"multiple_of": Value(multiple, source)}
    if factor is not None:
        found["ffn_dim_multiplier"] = Value(factor, source)
    return found


FAMILY = Family(
    name="llama",
    summary="Llama 1, 2, 3, 3.1, 3.2, 3.3 (text) and Code Llama: consolidated.NN.pth with params.json",
    architectures=(ARCHITECTURE,),
    recognise=recognise,
    plan=plan,
    plan_original=plan_original,
    options=(POOLING, SHARDS),
    vocabulary=Vocabulary(classes=("LlamaTokenizer", "CodeLlamaTokenizer"), ranks=True),
)
