"""Llama 1, 2, 3, 3.1, 3.2 and 3.3 (text) and Code Llama.

Original: `consolidated.NN.pth`, one for each model-parallel rank, and params.json, as meta-llama/llama
@57b0eb62 (1) and @689c7f26 (2), meta-llama/codellama @077f7332 and meta-llama/llama-models @43e87a37 (3.x)
read them.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_tool.convert.dialects import consolidated, params_json
from ckpt_tool.convert.dialects.consolidated import DENSE, Form, Seen
from ckpt_tool.convert.dialects.params_json import OF_META, OF_MISTRAL_AI
from ckpt_tool.convert.numbers import (
    DECODER,
    DEFAULT,
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

# (width, layers) of Llama 3.2 1B and 3B. Nothing in their files says that the head is tied and that rotary
# frequencies are stretched 32 times: Meta's code has 8 for all, its maintainers confirm 32 (llama-models
# #166, #241).
SMALL = ((2048, 16), (3072, 28))
LLAMA3_WORDS = 128256
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
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


def words(known: Known) -> int:
    rows = known.source.size("output.weight", 0)
    return 0 if rows is None else int(rows.value)


def small(known: Known) -> bool:
    return (known["hidden_size"], known["num_hidden_layers"]) in SMALL


def llama3(known: Known) -> bool:
    return known["rope_scaling"] is not None or known["vocab_size"] == LLAMA3_WORDS


def later(known: Known) -> bool:
    """Llama 3 and Code Llama, whose params.json says more."""
    return llama3(known) or known["rope_theta"] != 1e4


def default_theta(known: Known) -> Value | None:
    """Llama 1 and 2 have 1e4 in their code and Code Llama as its default; Llama 3's code defaults to 5e5."""
    if known.facts.document is None:
        return None
    if known.facts.given("use_scaled_rope") or words(known) == LLAMA3_WORDS:
        return given(5e5, "rope_theta absent from params.json of a Llama 3: 5e5")
    return given(1e4, "rope_theta absent from params.json of a Llama 1, 2 or Code Llama: 1e4")


def scaling(known: Known) -> Value | None:
    """The block in config.json for use_scaled_rope; see `SMALL` for its factor."""
    scaled = known.value("use_scaled_rope")
    if known.facts.document is None and words(known) == LLAMA3_WORDS:
        return None
    if not scaled.value:
        return Value(None, scaled.source)
    factor, why = (32.0, "the shape of 3.2 1B or 3B") if small(known) else (8.0, "3.1 and 3.3")
    block = {"factor": factor, **SCALING, "rope_type": "llama3"}
    return Value(block, f"{scaled.source}; rule: factor {factor:g} for {why}")


def scaling_can_be_said(known: Known, found: Value) -> Value:
    """params.json has one bit for the scaling: on the way back all but the factor must be what Llama 3.1's
    code has."""
    block: Mapping[str, object] = found.value if isinstance(found.value, dict) else {}
    kind, factor = block.get("rope_type", block.get("type")), block.get("factor")
    meta = kind == "llama3" and factor in (8, 32) and all(block.get(k) == v for k, v in SCALING.items())
    if found.value is not None and known.back and not meta:
        values = ", ".join(f"{k} {v:g}" for k, v in SCALING.items())
        message = f"expected rope_type llama3 with factor 8 or 32, {values} (all that params.json can say), "
        known.refuse("unsupported", f"{message}found another scaling", "rope_scaling")
        return found
    return object_or_null(known, found)


def tied_if_small(known: Known) -> Value:
    """Only 3.2 1B and 3B tie the head to the embedding; their files hold it twice, and both are compared."""
    if small(known) and known["rope_scaling"] is not None and known["vocab_size"] == LLAMA3_WORDS:
        return given(True, "the shape of 3.2 1B or 3B")
    return given(False, "only 3.2 1B and 3B tie the head")


def head_is_there(known: Known, tied: Value) -> Value:
    if not known.back and not tied.value and "output.weight" not in known.source.tensors:
        hint = "--set tie_word_embeddings=true"
        known.refuse("missing-tensor", "expected output.weight, found none", "output.weight", hint)
    return tied


def head_as_meta_has_it(known: Known, head: Value) -> Value:
    if known.back and head.value * known["num_attention_heads"] != known["hidden_size"]:
        message = "expected hidden_size / num_attention_heads, as Meta's code does"
        known.refuse("unsupported", message, "head_dim")
    return head


def context(known: Known) -> Value:
    """The length each generation was published for. Generations are told apart by what their files differ in:
    Llama 1 by float16 or its tables of frequencies, Code Llama by theta 1e6 or its 32016 words."""
    if known["rope_scaling"] is not None:
        return given(131072, "Llama 3.1 and later (scaled rotary frequencies)")
    if known["vocab_size"] == LLAMA3_WORDS:
        return given(8192, "Llama 3 (128256 words, not scaled)")
    if known["rope_theta"] == 1e6:
        return given(16384, "Code Llama (rope_theta 1e6)")
    if known["vocab_size"] == 32016:
        return given(4096, "Code Llama 70B Python and Instruct (32016 words, rope_theta 1e4)")
    if known.source.dtype == "F16" or any("inner_attention" in n for n in known.source.tensors):
        return given(2048, "Llama 1 (float16, or frequencies in every layer)")
    return given(4096, "Llama 2 (none of the others)")


def ids(known: Known) -> tuple[int, int, str]:
    if llama3(known):
        return 128000, 128001, "Llama 3 tokenizers"
    return 1, 2, "Llama 1, 2 and Code Llama tokenizers"


def untold(known: Known) -> list[str]:
    """What the files leave open and the user may know."""
    notes = []
    if known["vocab_size"] == LLAMA3_WORDS and "eos_token_id" not in known.options.settings:
        notes.append(
            "eos_token_id is the base model's, which the files do not tell from an instruct model: "
            "for one, --set eos_token_id=[128001,128008,128009]"
        )
    kv, ranks = known.value("num_key_value_heads"), known.source.ranks
    if ranks == kv.value and ranks > 8 and llama3(known):
        notes.append(
            f"{kv.value} key/value heads are kept as {kv.source} has them; if pairs of ranks hold the same "
            f"head, --set num_key_value_heads={kv.value // 2} stores each once and compares the copies"
        )
    return notes


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
    return {"n_kv_heads": kv} if llama3(known) or kv.value != known["num_attention_heads"] else {}


def theta(known: Known) -> dict[str, Value]:
    return {"rope_theta": known.value("rope_theta")} if later(known) else {}


def words_axis(known: Known) -> str:
    """Ranks share columns of the embedding before Llama 3, rows since."""
    return "v" if llama3(known) or known["rope_theta"] == 5e5 else "d"


def unsaid(known: Known) -> list[str]:
    """What params.json has no field for and a reader of the original would take to be otherwise."""
    notes, block = [], known["rope_scaling"]
    if block is not None and block["factor"] != (32 if small(known) else 8):
        notes.append(
            f"params.json cannot say the rotary factor {block['factor']:g}: converting again needs "
            "--set rope_scaling=..."
        )
    if known["tie_word_embeddings"] and not small(known):
        notes.append(
            "output.weight is a copy of the embedding, which params.json cannot say: converting again needs "
            "--set tie_word_embeddings=true"
        )
    return notes


FAMILY = consolidated.family(
    name="llama",
    summary="Llama 1, 2, 3, 3.1, 3.2, 3.3 (text) and Code Llama: consolidated.NN.pth with params.json",
    architecture="LlamaForCausalLM",
    config=like_llama(
        "LlamaConfig",
        {"attention_bias": False, "mlp_bias": False},
        context=2048,
        idle={**DECODER, "pretraining_tp": "the same sums in parts"},
    ),
    told=told,
    lacks=(
        "no sliding window and no experts",
        ("sliding_window", "_sliding_window", "moe.num_experts"),
    ),
    fields=(
        only("hidden_act", "silu", "the original's feed_forward"),
        only("attention_bias", False, "the original's projections have no biases"),
        only("mlp_bias", False, "the original's projections have no biases"),
        only("pretraining_tp", 1, "one process; more would imitate the rounding of ranks"),
        params_json.SIZES,
        count("intermediate_size", "hidden_dim", "intermediate_size", rule=width),
        params_json.head_dim(head_as_meta_has_it),
        number("rope_theta", "rope_theta", rule=default_theta, silent=DEFAULT),
        anything(
            "rope_scaling",
            rule=scaling,
            silent=DEFAULT,
            check=scaling_can_be_said,
            ask="the rotary scaling of Llama 3.1 and later, or null for Llama 3",
        ),
        count("max_position_embeddings", rule=context),
        flag("tie_word_embeddings", rule=tied_if_small, check=head_is_there),
        *params_json.alone(
            flag(
                "use_scaled_rope",
                rule=given(False, "absent, so not scaled"),
                silent=lambda known: Value(known["rope_scaling"] is not None, "config.json: rope_scaling"),
            ),
            count("multiple_of", rule=ABSENT, silent=lambda known: pair(known, 0)),
            number("ffn_dim_multiplier", rule=ABSENT, silent=lambda known: pair(known, 1)),
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
    ),
    ids=ids,
    untold=untold,
    unsaid=unsaid,
    options=(consolidated.SHARDS,),
    vocabulary=consolidated.Vocabulary(classes=("LlamaTokenizer", "CodeLlamaTokenizer"), ranks=True),
)
