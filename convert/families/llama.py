"""Llama 1, 2, 3, 3.1, 3.2 and 3.3 (text) and Code Llama.

Original: `consolidated.NN.pth`, one for each model-parallel rank, and params.json, as meta-llama/llama
@57b0eb62 (1) and @689c7f26 (2), meta-llama/codellama @077f7332 and meta-llama/llama-models @43e87a37 (3.x)
read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ckpt_tool.convert.dialects import consolidated, megatron_core, params_json
from ckpt_tool.convert.dialects.consolidated import DENSE, Form, Seen
from ckpt_tool.convert.dialects.layouts import FORM
from ckpt_tool.convert.dialects.megatron_core import Ends
from ckpt_tool.convert.dialects.params_json import OF_META, OF_MISTRAL_AI, asked
from ckpt_tool.convert.numbers import (
    DECODER,
    DEFAULT,
    LLAMA3,
    Field,
    Known,
    Value,
    anything,
    count,
    flag,
    given,
    like_llama,
    number,
    object_or_null,
    only,
    some,
)

# (width, layers) of Llama 3.2 1B and 3B, and the width of their feed-forward. Nothing in their files says
# that the head is tied and that rotary frequencies are stretched 32 times: Meta's code has 8 for all, its
# maintainers confirm 32 (llama-models #166, #241).
SMALL = ((2048, 16), (3072, 28))
SMALL_FEED_FORWARD = 8192
# Rows of an embedding: the vocabularies as published, which many have added to. 128000 of Llama 3's are
# words, so fewer than those are no Llama 3's; a vocabulary smaller than all tells nothing.
LLAMA3_WORDS, LLAMA3_ROWS = 128000, 128256
LLAMA2_ROWS, CODE_LLAMA_ROWS = 32000, 32016
LLAMA3_THETA = 5e5
# What a params.json may say of the scaling, and its part in config.json: `rope_scaling_factor` and
# `rope_high_freq_factor` are those of Meta's Llama 4, the others' second names those of executorch.
PARTS = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
ABSENT = Value(None, "absent")


def told(seen: Seen) -> tuple[bool, str]:
    if seen.not_dense:
        return False, seen.not_dense
    if seen.keys & OF_META:
        return True, f"dense layers, and params.json has {', '.join(sorted(seen.keys & OF_META))}"
    if seen.keys & OF_MISTRAL_AI:
        return False, f"params.json has {', '.join(sorted(seen.keys & OF_MISTRAL_AI))}, as Mistral's do"
    if seen.equal_names:
        return True, "dense layers in model-parallel ranks of equal tensor names"
    if seen.safetensors:
        return False, "in safetensors, as Mistral's are and Llama's are not"
    return True, "dense layers, and nothing in params.json that only Mistral's have"


# --- which generation -----------------------------------------------------------------------------------


def signs(known: Known, theta: float | None) -> tuple[list[str], list[str]]:
    """What speaks for Llama 3 and what against it, in words; `theta` as far as it is told."""
    rows, tokenizer = known["vocab_size"], consolidated.tokenizer_kind(known)
    yes: list[str] = []
    no: list[str] = []
    if rows >= LLAMA2_ROWS:
        (yes if rows >= LLAMA3_WORDS else no).append(f"{rows} words")
    if known.config is None and (known.facts.document or {}).get("vocab_size") == -1:
        no.append("vocab_size -1")
    if theta in (LLAMA3_THETA, 1e4, 1e6):
        (yes if theta == LLAMA3_THETA else no).append(f"rope_theta {theta:g}")
    if tokenizer is not None:
        (yes if tokenizer == "tiktoken" else no).append(f"a {tokenizer} vocabulary")
    if known.facts.given("use_scaled_rope"):
        yes.append("use_scaled_rope in params.json")
    return yes, no


def signs_of(known: Known) -> tuple[list[str], list[str]]:
    theta = known.value("rope_theta")
    return signs(known, None if theta.source.startswith("rule") else known["rope_theta"])


def stretched(known: Known) -> bool:
    """Whether the rotary frequencies are scaled as in Llama 3.1 and later."""
    block = known["rope_scaling"]
    return isinstance(block, dict) and block.get("rope_type", block.get("type")) == "llama3"


def llama3(known: Known) -> bool | None:
    """Llama 3 and later, by most of the signs; None where as many speak against it."""
    if stretched(known):
        return True
    yes, no = signs_of(known)
    return None if len(yes) == len(no) != 0 else len(yes) > len(no)


def later(known: Known) -> bool:
    """Llama 3 and Code Llama, whose params.json says more; whoever reads one that says less must come to
    the same."""
    return stretched(known) or bool(signs_of(known)[0]) or known["rope_theta"] != 1e4


def small(known: Known) -> bool:
    return (known["hidden_size"], known["num_hidden_layers"]) in SMALL


def surely_small(known: Known) -> bool:
    same = known["intermediate_size"] == SMALL_FEED_FORWARD and known["vocab_size"] >= LLAMA3_WORDS
    return small(known) and same


def first(known: Known) -> tuple[bool, str]:
    """Whether it is Llama 1 and not 2, and why. Llama 1 has a table of frequencies in every layer, Llama 2
    one in all. Where somebody left these out: Llama 1 is float16 and has an epsilon of 1e-6, but for 65B,
    Llama 2 is bfloat16 and has 1e-5; the dtype alone says little, since many cast it."""
    names, half = known.source.tensors, known.source.dtype == "F16"
    if any("inner_attention" in n for n in names):
        return True, "frequencies in every layer"
    if "rope.freqs" in names:
        return False, "one table of frequencies"
    eps, grouped = known["rms_norm_eps"], known["num_key_value_heads"] != known["num_attention_heads"]
    largest = half and (known["hidden_size"], known["num_hidden_layers"]) == (8192, 80)
    why = f"rms_norm_eps {eps:g}{', float16' if half else ''}{', grouped heads' if grouped else ''}"
    return not grouped and (eps <= 1e-6 or largest), why


def context(known: Known) -> Value:
    """The length each generation was published for, which changes no number."""
    if stretched(known):
        return given(131072, "Llama 3.1 and later (scaled rotary frequencies)")
    three, (yes, no) = llama3(known), signs_of(known)
    if three is None:
        message = f"expected the signs of one generation, found Llama 3's ({', '.join(yes)}) and others'"
        hint = "--set max_position_embeddings=8192 for Llama 3, 4096 for Llama 2, 16384 for Code Llama"
        return asked(known, f"{message} ({', '.join(no)})", "max_position_embeddings", hint)
    if three:
        return given(8192, f"Llama 3 ({', '.join(yes)}; not scaled)")
    if known["rope_theta"] == 1e6:
        return given(16384, "Code Llama (rope_theta 1e6)")
    one, why = first(known)
    if one:
        return given(2048, f"Llama 1 ({why})")
    if known["vocab_size"] >= CODE_LLAMA_ROWS and known["hidden_size"] == 8192:
        return given(4096, f"Llama 2 70B, or Code Llama 70B Python or Instruct ({', '.join(no)})")
    return given(4096, f"Llama 2 ({why})")


def ids(known: Known) -> tuple[int, int, str]:
    """Where no tokenizer tells them."""
    if not llama3(known):
        return 1, 2, "Llama 1, 2 and Code Llama tokenizers"
    return LLAMA3_WORDS, LLAMA3_WORDS + 1, "Llama 3 tokenizers"


def untold(known: Known) -> list[str]:
    """What the files leave open and the user may know."""
    notes, rows, three = [], known["vocab_size"], llama3(known)
    if three and rows >= LLAMA3_WORDS and "eos_token_id" not in known.options.settings:
        notes.append(
            "eos_token_id is the base model's, which the files do not tell from an instruct model: "
            "for one, --set eos_token_id=[128001,128008,128009]"
        )
    code = rows >= CODE_LLAMA_ROWS and (known["rope_theta"] == 1e6 or known["hidden_size"] == 8192)
    published = LLAMA3_ROWS if three else CODE_LLAMA_ROWS if code else LLAMA2_ROWS
    if rows > published:
        whose = "Llama 3" if three else "Code Llama" if code else "Llama 1 and 2"
        notes.append(f"the vocabulary was enlarged by {rows - published} rows: {whose} has {published}")
    kv, ranks = known.value("num_key_value_heads"), known.source.ranks
    if ranks == kv.value and ranks > 8 and three:
        notes.append(
            f"{kv.value} key/value heads are kept as {kv.source} has them; if pairs of ranks hold the same "
            f"head, --set num_key_value_heads={kv.value // 2} stores each once and compares the copies"
        )
    return notes


# --- numbers that params.json may leave unsaid ----------------------------------------------------------


def default_theta(known: Known) -> Value | None:
    """Llama 1 and 2 have 1e4 in their code and Code Llama as its default; Llama 3's code defaults to 5e5, and
    only that knows use_scaled_rope."""
    if known.facts.document is None:
        return None
    yes, no = signs(known, None)
    if known.facts.given("use_scaled_rope") or (known["vocab_size"] >= LLAMA3_WORDS and not no):
        return given(LLAMA3_THETA, f"rope_theta absent from params.json of a Llama 3 ({', '.join(yes)}): 5e5")
    if not yes:
        return given(1e4, "rope_theta absent from params.json of a Llama 1, 2 or Code Llama: 1e4")
    others = f" and not ({', '.join(no)})" if no else ""
    message = f"expected rope_theta, found none, and signs of Llama 3 ({', '.join(yes)}){others}"
    hint = "--set rope_theta=500000 for Llama 3, --set rope_theta=10000 for Llama 1, 2"
    return asked(known, message, "rope_theta", hint)


def block_of(**parts: object) -> dict[str, object]:
    return {**LLAMA3, **parts}


def which_scaling(factor: float) -> str:
    return f"--set 'rope_scaling={json.dumps(block_of(factor=factor))}'"


def scaling(known: Known) -> Value | None:
    """The block in config.json for use_scaled_rope and the fields beside it; see `SMALL` for its factor."""
    switch = known.value("use_scaled_rope")
    said = {n: v for n in PARTS if (v := known.value(n)).value is not None}
    if known.facts.document is None and known["vocab_size"] >= LLAMA3_WORDS:
        return None
    if said and not known.facts.given("use_scaled_rope"):
        name = next(iter(said.values())).source
        hint = f"{which_scaling(8.0)} with the right factor, or --set rope_scaling=null"
        return asked(known, f"expected use_scaled_rope beside {name}, found none", "rope_scaling", hint)
    if not switch.value:
        return Value(None, switch.source)
    parts = {PARTS[n]: v.value for n, v in said.items()}
    sources = ", ".join([switch.source, *(v.source for v in said.values())])
    if "factor" in parts:
        if surely_small(known) and parts["factor"] != 32:
            message = f"expected factor 32, as Llama 3.2 1B and 3B were trained, found {parts['factor']:g}"
            hint = f"{which_scaling(32.0)}, or the same with factor {parts['factor']:g}"
            return asked(known, f"{message} ({sources})", "rope_scaling", hint)
        return Value(block_of(**parts), sources)
    if small(known) and not surely_small(known):
        message = (
            "expected the rotary factor, found none, and a model of the width and depth of Llama 3.2 1B or 3B"
        )
        hint = f"{which_scaling(32.0)} if it is one, with factor 8 else"
        return asked(known, f"{message} that is none of them", "rope_scaling", hint)
    factor, why = (32.0, "the shape of 3.2 1B or 3B") if small(known) else (8.0, "3.1 and 3.3")
    return Value(block_of(**parts, factor=factor), f"{sources}; rule: factor {factor:g} for {why}")


def own_scaling(known: Known) -> tuple[str, ...]:
    return ("rope_scaling",) if known.facts.given("rope_scaling") else ()


def check_scaling(known: Known, found: Value) -> Value:
    """A block in a params.json must be one that a params.json can say otherwise, on the way back as well."""
    own = found.source.startswith(params_json.NAME) and "rope_scaling" in (known.facts.document or {})
    other_layout = known.back and asked_form(known) not in (None, consolidated.CONSOLIDATED)  # has its check
    if other_layout or (not known.back and not own):
        return object_or_null(known, found)
    block: Mapping[str, object] = found.value if isinstance(found.value, dict) else {}
    numbers = (block.get(part) for part in PARTS.values())
    plain = all(isinstance(n, int | float) and not isinstance(n, bool) and n > 0 for n in numbers)
    kind = block.get("rope_type", block.get("type"))
    if own and kind == "default":
        return Value(None, found.source)
    if found.value is not None and (kind != "llama3" or not plain):
        values = ", ".join(PARTS.values())
        message = f"expected rope_type llama3 with {values} (all that params.json can say), "
        known.refuse("unsupported", f"{message}found another scaling", "rope_scaling")
    elif own and found.value is not None:
        differing = [n for n, part in PARTS.items() if known[n] not in (None, block[part])]
        if differing or (known.facts.given("use_scaled_rope") and not known["use_scaled_rope"]):
            other = ", ".join(differing) or "use_scaled_rope false"
            message = f"expected one scaling, found rope_scaling and another in {other}"
            known.refuse("bad-config", message, "rope_scaling", "--set rope_scaling=VALUE says which")
    elif known.back and found.value is not None and (said := not_metas(known, block)) is not None:
        return asked(known, *said)
    return found


def not_metas(known: Known, block: Mapping[str, object]) -> tuple[str, str, str] | None:
    """A scaling that no Llama was published with, which Meta's code, that knows use_scaled_rope alone, would
    compute otherwise, for the user to say: message, field and hint. None for that of 3.1 or 3.2 (Meta's own
    originals of 3.2 have use_scaled_rope alone too, and a factor of 32) and of an original which this model
    was converted from. Source: meta-llama/llama-models @43e87a37, models/llama3/model.py; issues 166, 241."""
    small_ones: Mapping[str, object] = {**LLAMA3, "factor": 32}
    other = [key for key in PARTS.values() if block[key] not in (LLAMA3[key], small_ones[key])]
    was = known.once.get("numbers")
    said = isinstance(was, dict) and was.get("rope_scaling") == block
    if not other or said or "rope_scaling" in known.options.settings:
        return None
    found = ", ".join(f"{key} {block[key]}" for key in other)
    usual = ", ".join(f"{key} {LLAMA3[key]}" for key in other)
    message = f"expected {usual}, which Meta's code has whatever params.json says, found {found}"
    hint = (
        f"--set 'rope_scaling={json.dumps(dict(block))}' writes fields of that name, for programs that read "
        "them; Meta's code computes other numbers with these weights"
    )
    return message, "rope_scaling", hint


def asked_form(known: Known) -> object:
    """The layout that is to be written, as asked for or as the original was."""
    return known.options.family_options.get(FORM, known.once.get(FORM))


def part(known: Known, name: str) -> Value:
    """Of the block in config.json, where a reader of params.json would not come to the same by rule."""
    block, key = known["rope_scaling"], PARTS[name]
    if block is None:
        return ABSENT
    usual: Mapping[str, object] = {**LLAMA3, "factor": 32 if surely_small(known) else 8}
    unclear = key == "factor" and small(known) and not surely_small(known)
    said = unclear or block[key] != usual[key]
    return Value(block[key] if said else None, f"config.json: rope_scaling.{key}")


def of_scaling(name: str, other: str) -> Field:
    take = count if name == "original_max_position_embeddings" else number
    return take(name, name, other, rule=ABSENT, silent=lambda known: part(known, name))


def tied_if_small(known: Known) -> Value:
    """Only 3.2 1B and 3B tie the head to the embedding; their files hold it twice, and both are compared."""
    if surely_small(known) and stretched(known):
        return given(True, "the shape of 3.2 1B or 3B")
    return given(False, "only 3.2 1B and 3B tie the head")


def head_as_meta_has_it(known: Known, head: Value) -> Value:
    if known.back and head.value * known["num_attention_heads"] != known["hidden_size"]:
        message = "expected hidden_size / num_attention_heads, as Meta's code does"
        known.refuse("unsupported", message, "head_dim")
    return head


def width(known: Known) -> Value | None:
    """By the original's arithmetic where params.json says it, else as the shapes have it."""
    if known["multiple_of"] is None:
        return known.source.size(params_json.WIDTH, 0)
    made = width_of(known["hidden_size"], known["multiple_of"], known["ffn_dim_multiplier"])
    return given(made, "from dim, multiple_of and ffn_dim_multiplier in params.json")


def width_of(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Two thirds of 4 x dim, times ffn_dim_multiplier, up to a multiple of multiple_of; int() cuts off at
    both steps."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def pair_of(dim: int, wanted: int, *, later: bool) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that give the feed-forward width: a published pair where one does
    (`later` models always have a multiplier), else a pair that gives any width."""
    plain = (256, 1.0 if later else None)
    any_width = (1, (wanted + 0.5) / max(1, int(2 * (4 * dim) / 3)))
    pairs = (plain, (256, 1.5), (4096, 1.3), (1024, 1.3), (4096, 1.2), any_width)
    return next(p for p in pairs if width_of(dim, *p) == wanted)


def pair(known: Known, which: int) -> Value:
    found = pair_of(known["hidden_size"], known["intermediate_size"], later=later(known))
    return given(found[which], "gives intermediate_size of config.json")


def kv_heads(known: Known) -> dict[str, Value]:
    """With fewer key/value heads than ranks each rank holds one of them and n_kv_heads counts the copies, as
    in Llama 3.1 405B for 16 ranks."""
    kv, ranks = known.value("num_key_value_heads"), known.options.shards
    if kv.value < ranks:
        kv = Value(ranks, f"{kv.source}, one for each of {ranks} ranks")
    return {"n_kv_heads": kv} if later(known) or kv.value != known["num_attention_heads"] else {}


def theta(known: Known) -> dict[str, Value]:
    return {"rope_theta": known.value("rope_theta")} if later(known) else {}


def words_axis(known: Known) -> str:
    """Ranks share columns of the embedding before Llama 3, rows since."""
    return "v" if signs_of(known)[0] or stretched(known) else "d"


def unsaid(known: Known) -> list[str]:
    """What params.json has no field for and a reader of the original would take to be otherwise."""
    notes, block = [], known["rope_scaling"]
    said = [n for n in PARTS if block is not None and known[n] is not None]
    if said:
        notes.append(f"params.json says {', '.join(said)}, which the code of Llama 3.1 to 3.3 does not read")
    if known["tie_word_embeddings"] and not surely_small(known):
        notes.append(
            "output.weight is a copy of the embedding, which params.json cannot say: converting again needs "
            "--set tie_word_embeddings=true"
        )
    return notes


CLASS = like_llama(
    "LlamaConfig",
    {"attention_bias": False, "mlp_bias": False},
    context=2048,
    idle={**DECODER, "pretraining_tp": "the same sums in parts"},
    tokenizer="LlamaTokenizer",
    answering="transformer.",
    null_too=("attention_dropout",),
)
# Megatron pads the words of the published vocabularies to a multiple of 128 for each rank.
CORE = megatron_core.Core(
    family="llama",
    model="Llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    config=CLASS,
    fields=(
        only("attention_bias", False, "no biases in linear_qkv"),
        only("mlp_bias", False, "no biases in linear_fc1"),
        only("pretraining_tp", 1, "one process; more would imitate the rounding of ranks"),
    ),
    ends=(
        Ends(range(128256, 129281), 128000, 128001, "Llama 3's vocabulary"),
        Ends(range(32000, 32769), 1, 2, "the vocabulary of Llama 1 and 2"),
    ),
)

FAMILY = consolidated.family(
    name="llama",
    summary="Llama 1, 2, 3 to 3.3 (text), Code Llama: consolidated.NN.pth with params.json; Megatron-Core",
    architecture="LlamaForCausalLM",
    config=CLASS,
    told=told,
    lacks=(
        "no sliding window and no experts",
        ("sliding_window", "_sliding_window", "moe.num_experts"),
    ),
    fields=(
        only("hidden_act", "silu", "the original's feed_forward", keys=params_json.ACTIVATION),
        only("attention_bias", False, "the original's projections have no biases", keys=("attention_bias",)),
        only("mlp_bias", False, "the original's projections have no biases", keys=("mlp_bias",)),
        only(
            "pretraining_tp",
            1,
            "one process; more would imitate the rounding of ranks",
            keys=("pretraining_tp",),
        ),
        params_json.SIZES,
        params_json.of_class("intermediate_size", "hidden_dim", rule=width),
        params_json.head_dim(head_as_meta_has_it),
        number("rope_theta", "rope_theta", "rope_freq_base", rule=default_theta, silent=DEFAULT),
        anything(
            "rope_scaling",
            read=own_scaling,
            rule=scaling,
            silent=DEFAULT,
            check=check_scaling,
            ask="the rotary scaling of Llama 3.1 and later, or null for Llama 3",
        ),
        count("max_position_embeddings", "max_position_embeddings", rule=context),
        flag(
            "tie_word_embeddings", *params_json.TIED_KEYS, rule=tied_if_small, check=params_json.head_is_there
        ),
        *params_json.alone(
            flag(
                "use_scaled_rope",
                rule=given(False, "absent, so not scaled"),
                silent=lambda known: Value(known["rope_scaling"] is not None, "config.json: rope_scaling"),
            ),
            count("multiple_of", rule=ABSENT, silent=lambda known: pair(known, 0)),
            number("ffn_dim_multiplier", rule=ABSENT, silent=lambda known: pair(known, 1)),
            of_scaling("rope_scaling_factor", "rope_scale_factor"),
            of_scaling("rope_low_freq_factor", "low_freq_factor"),
            of_scaling("rope_high_freq_factor", "high_freq_factor"),
            of_scaling("original_max_position_embeddings", "old_context_len"),
        ),
    ),
    forms={"ranks": Form(("consolidated.{rank:02d}.pth",), DENSE)},
    words_axis=words_axis,
    params=(
        "dim",
        "n_layers",
        "n_heads",
        kv_heads,
        "vocab_size",
        "multiple_of",
        some("ffn_dim_multiplier"),
        "norm_eps",
        theta,
        some("use_scaled_rope"),
        *(some(name) for name in PARTS),
    ),
    ids=ids,
    untold=untold,
    unsaid=unsaid,
    options=(consolidated.SHARDS,),
    layouts=megatron_core.layouts_of(CORE),
    vocabulary=consolidated.Vocabulary(classes=("LlamaTokenizer", "CodeLlamaTokenizer"), ranks=True),
)
