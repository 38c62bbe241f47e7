"""CodeGen 1 (350M, 2B, 6B, 16B; nl, multi, mono): config.json and pytorch_model.bin in a tar.gz or a folder.

The published tensors have the names of CodeGenForCausalLM; converting leaves stale masks behind, and can
write GPT-J's layout instead, which computes the same with query, key and value apart.

Source: salesforce/CodeGen @6f09e495 (codegen1/jaxformer/hf), salesforce/jaxformer @026b4ed6, transformers
4.37.2 (models/codegen, models/gptj). Linear weights are (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from ckpt_tool.convert.dialects import published
from ckpt_tool.convert.dialects.converted import GPT2_NAMES
from ckpt_tool.convert.dialects.published import Vocabulary, same
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DECODER_HEADS,
    DTYPE,
    GPT_IDS,
    GPT_NAMES,
    GPT_SIZES,
    NOT_READ,
    UNKNOWN,
    Class,
    Known,
    Size,
    Value,
    anything,
    by_name,
    count,
    counted,
    given,
    measured,
    number,
    one_of,
    only,
    shown,
    splits,
    token_ids,
    without,
)

S = "transformer.h.{i}."

# The rows of qkv_proj come in as many blocks as cores that the model was trained on; each block has the
# queries, the values and the keys of its heads. Transformers' class always reads four.
BLOCKS = 4
# CodeGen 2 has the names and the model_type of CodeGen 1, and eight blocks; its config.json has these keys,
# and that of no CodeGen 1 has them.
SIGNS = ("auto_map", "head_dim")


def qkv(cores: int, apart: bool) -> Rule:
    """Axes: s query, value, key; a and b number the blocks of `cores` and of four (one divides the other), x
    the rows of each."""
    many, four = ("a b s x", "a s b x") if cores >= BLOCKS else ("a s b x", "a b s x")
    name = f"{S}attn.qkv_proj.weight"
    if apart:
        three = tuple(f"{S}attn.{p}_proj.weight" for p in "qvk")
        return rule(name, three, f"({many}) d -> (s a b x) d", cut=("s", (1, 1, 1)))
    return rule(name, name, f"({many}) d -> ({four}) d")


def rows(known: Known) -> tuple[Rule, ...]:
    """All rows, from the original to CodeGenForCausalLM or GPTJForCausalLM."""
    return (
        same("transformer.wte.weight", "v d"),
        *(same(f"{S}ln_1.{kind}", "d") for kind in ("weight", "bias")),
        qkv(known["mp_num"], known.target == "gptj"),
        same(f"{S}attn.out_proj.weight", "d e"),
        same(f"{S}mlp.fc_in.weight", "f d"),
        same(f"{S}mlp.fc_in.bias", "f"),
        same(f"{S}mlp.fc_out.weight", "d f"),
        same(f"{S}mlp.fc_out.bias", "d"),
        *(same(f"transformer.ln_f.{kind}", "d") for kind in ("weight", "bias")),
        same("lm_head.weight", "v d"),
        same("lm_head.bias", "v"),
    )


IGNORED = {
    r"transformer\.h\.\d+\.attn\.(causal_mask|bias)": "the lower triangle, which the model makes itself",
    r"transformer\.h\.\d+\.attn\.masked_bias": "the score of what is not to be seen, which is in the code",
}
GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu")
END_OF_TEXT = 50256

# jaxformer/hf/sample.py adds these to GPT-2's vocabulary for the models that know code: runs of 31 to 2
# spaces, then of 9 to 2 tabs. It tells the models apart by their names.
WHITESPACE = (*(" " * n for n in range(31, 1, -1)), *("\t" * n for n in range(9, 1, -1)))
_NAME = re.compile(r"codegen-[\w.]+-(?P<data>nl|multi|mono)", re.ASCII | re.IGNORECASE)

# --- numbers --------------------------------------------------------------------------------------------


def turned(known: Known, channels: Value) -> Value:
    width = known["n_embd"] // known["n_head"]
    if type(channels.value) is not int or channels.value % 2 or not 0 < channels.value <= width:
        message = f"expected an even number up to the head's width, found {shown(channels.value)}"
        known.refuse("config-mismatch", message, "rotary_dim")
    return channels


def width_or_null(known: Known, inner: Value) -> Value:
    if inner.value is not None and (type(inner.value) is not int or inner.value < 1):
        known.refuse("bad-config", "expected a width or null, found neither", "n_inner")
    return inner


def inner_width(known: Known) -> dict[str, Value]:
    """n_inner as a number."""
    if known["n_inner"] is not None:
        return {}
    return {"n_inner": Value(4 * known["n_embd"], "rule: n_inner null or absent, so 4 x n_embd")}


def cores(known: Known) -> Value:
    """How many cores the model was trained on, which no file says: four for every published CodeGen 1."""
    once = known.once.get("mp_num")
    if type(once) is int:
        return Value(once, "ckpt-tool.json")
    if signs := [k for k in SIGNS if known.facts.given(k) or k in known.options.settings]:
        message = f"expected how many blocks qkv_proj has, found {' and '.join(signs)}, as CodeGen 2 has them"
        hint = "--set mp_num=8 for CodeGen 2, --set mp_num=4 for a CodeGen 1 with keys of its own"
        known.refuse("missing-fact", message, "mp_num", hint)
        return UNKNOWN
    return given(BLOCKS, "every published CodeGen 1 was trained on 4 cores")


def blocks_fit(known: Known, found: Value) -> Value:
    heads, blocks = known["n_head"], max(found.value, BLOCKS)
    if found.value % BLOCKS and BLOCKS % found.value:
        message = f"expected a multiple or a divisor of 4, found {found.value}"
        known.refuse("config-mismatch", message, "mp_num")
    elif heads % blocks:
        message = f"expected n_head {heads} to divide by {blocks} blocks, found a rest"
        known.refuse("config-mismatch", message, "n_head")
    return found


def notes(known: Known) -> list[str]:
    """Early uploads have ids of other tokenizers in config.json; GPT-2's first 256 are single bytes."""
    ids = {n: known.value(n) for n in ("bos_token_id", "eos_token_id")}
    made = [
        f"{name} {v.value} ({v.source}) is no end of text in CodeGen's vocabulary, so generation would not "
        f"stop or start there: --set {name}={END_OF_TEXT} gives <|endoftext|>"
        for name, v in ids.items()
        if any(i < 256 for i in (v.value if isinstance(v.value, list) else [v.value]))
    ]
    blocks = known.value("mp_num")
    if blocks.value != BLOCKS:
        made.append(
            f"the {blocks.value} blocks of qkv_proj ({blocks.source}) are written as the 4 that the class "
            "reads"
        )
    return made


END = given(END_OF_TEXT, "<|endoftext|> of GPT-2")
# The defaults of CodeGenConfig are those of no published model, so nothing is taken from there.
FIELDS = by_name(
    count("n_embd", silent=measured("transformer.wte.weight", 1)),
    count("n_layer", silent=counted),
    count("n_head", ask="the number of attention heads", check=splits("n_embd", "n_head")),
    count("vocab_size", silent=measured("transformer.wte.weight", 0)),
    count("n_positions", ask="the number of positions"),
    number("layer_norm_epsilon", ask="the epsilon of the norms"),
    anything(
        "activation_function",
        ask="the activation of the feed-forward",
        check=one_of("activation_function", GELUS),
    ),
    anything("rotary_dim", ask="how many channels of a head are turned", check=turned),
    only("tie_word_embeddings", False, "the output layer has weights of its own"),
    anything("n_inner", silent=given(None, "absent, so 4 x n_embd"), check=width_or_null),
    DTYPE,
    *(token_ids(name, silent=END) for name in ("bos_token_id", "eos_token_id")),
    count("mp_num", silent=cores, check=blocks_fit, hidden=True, told=False),
)


def blocks_of(which: int) -> Callable[[Known], int]:
    """The blocks of the fewer, and how many of the more are in each of them."""

    def size(known: Known) -> int:
        few, many = sorted((int(known["mp_num"]), BLOCKS))
        return (few, many // few)[which]

    return size


def rows_of_block(known: Known) -> int:
    rows: int = known["n_embd"] // max(known["mp_num"], BLOCKS)
    return rows


AXES: dict[str, Size] = {
    "d": "n_embd",
    "e": "n_embd",
    "f": "n_inner",
    "v": "vocab_size",
    "s": lambda _: 3,
    "a": blocks_of(0),
    "b": blocks_of(1),
    "x": rows_of_block,
}


def whitespace(folder: str, words: int) -> tuple[dict[str, int], list[str]]:
    """The tokens that the publisher adds to the `words` of vocab.json (0: there is none), by the name of the
    download."""
    if (named := _NAME.search(folder)) is None:
        note = "no whitespace tokens were added: models of the kinds multi and mono have them, told by their "
        return {}, [f"{note}names; added_tokens.json beside vocab.json gives them"] if words else []
    code = named["data"].lower() != "nl"
    note = (
        f"whitespace tokens are {'added' if code else 'not added'}, as the publisher does for models whose "
    )
    added = {text: words + k for k, text in enumerate(WHITESPACE)} if code and words else {}
    return added, [f"{note}name ends in {named['data']}"]


CLASS = Class(
    "CodeGenConfig",
    GPT_SIZES,
    {**GPT_IDS, "n_positions": 2048},
    aliases=GPT_NAMES,
    idle={**NOT_READ, "head_dim": "not read: n_embd / n_head"},
    prefix="transformer.",
    words="wte.weight",
    dropouts={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    heads={},
)
OF_GPTJ = {**CLASS.idle, "rotary": "not read: always rotary"}  # that of GPT-J 6B says so
GPTJ = replace(CLASS, name="GPTJConfig", idle=OF_GPTJ, heads=without(DECODER_HEADS, "ForTokenClassification"))

FAMILY = published.family(
    name="codegen",
    title="CodeGen 1",
    summary="CodeGen 1 350M to 16B (nl, multi, mono): tar.gz or folder of pytorch_model.bin; also to GPT-J",
    classes={"codegen": CLASS, "gptj": GPTJ},
    targets={"gptj": "gptj"},
    fields=FIELDS,
    axes=AXES,
    rows=rows,
    told_by="transformer.h.0.attn.qkv_proj.weight",
    layer=r"transformer\.h\.(\d+)\.",
    head=None,
    ignored=IGNORED,
    container="pth",
    generic=GPT2_NAMES,
    added_tokens=whitespace,
    derived=inner_width,
    notes=notes,
    kept={"mp_num": BLOCKS},
    signs=SIGNS,
    vocabulary=Vocabulary("byte-level", ("CodeGenTokenizer", "GPT2Tokenizer")),
)
