"""OPT as metaseq saved it: `reshard-model_part-K.pt`, one for each model-parallel rank, or one file called
`reshard.pt` (350m) or `restored.pt`.

The rows leave out what stands before every name, `model.decoder.` as a rule. A rank's fused projection holds
the keys of its heads, then their values, then their queries, whatever its name says.

Source: facebookresearch/metaseq @f7ffa5fd (models/transformer.py, model_parallel, scripts/reshard_mp.py,
launcher/opt_job_constants.py). Linear weights are (out, in) on both sides.
"""

from __future__ import annotations

from ckpt_tool.convert.dialects import metaseq
from ckpt_tool.convert.dialects.metaseq import Form, Vocabulary, form_of
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DECODER,
    DECODER_HEADS,
    DEFAULT,
    DTYPE,
    Class,
    Known,
    Size,
    Sized,
    Value,
    anything,
    by_name,
    count,
    counted,
    flag,
    free,
    given,
    measured,
    only,
    shown,
    special,
    without,
    written,
)

S, T = "layers.{i}.", "model.decoder.layers.{i}."
PROJECTIONS = ("k", "v", "q")  # in the order of the fused tensor


def both(
    source: str, target: str, weight: str, bias: str, split: str | None = None, split_bias: str | None = None
) -> tuple[Rule, Rule]:
    """The weight and the bias of a module."""
    return (
        rule(f"{source}.weight", f"{target}.weight", weight, split=split),
        rule(f"{source}.bias", f"{target}.bias", bias, split=split_bias),
    )


FUSED = tuple(
    rule(
        f"{S}self_attn.qkv_proj.{kind}",
        tuple(f"{T}self_attn.{p}_proj.{kind}" for p in PROJECTIONS),
        pattern,
        cut=("s", (1, 1, 1)),
        split="x",
    )
    for kind, pattern in (("weight", "(s x) d"), ("bias", "(s x)"))
)
APART = tuple(
    row
    for p in PROJECTIONS
    for row in both(f"{S}self_attn.{p}_proj", f"{T}self_attn.{p}_proj", "x d", "x", "x", "x")
)
LAYER = (
    *both(f"{S}self_attn.out_proj", f"{T}self_attn.out_proj", "d x", "d", "x"),
    *both(f"{S}self_attn_layer_norm", f"{T}self_attn_layer_norm", "d", "d"),
    *both(f"{S}final_layer_norm", f"{T}final_layer_norm", "d", "d"),
    *both(f"{S}fc1", f"{T}fc1", "f d", "f", "f", "f"),
    *both(f"{S}fc2", f"{T}fc2", "d f", "d", "f"),
)
WORDS = "model.decoder.embed_tokens.weight"
PROJECTED = (
    rule("project_in_dim.weight", "model.decoder.project_in.weight", "d e"),
    rule("project_out_dim.weight", "model.decoder.project_out.weight", "e d"),
)


def rows(form: Form) -> tuple[Rule, ...]:
    split = "v" if form.head == "share" else None
    tied = rule("output_projection.weight", WORDS, "v e", split=split, tied=True)
    own = rule("output_projection.weight", "lm_head.weight", "v e")
    return (
        rule("embed_tokens.weight", WORDS, "v e", split="v"),
        *((own,) if form.unties else (tied,) if form.head else ()),
        rule("embed_positions.weight", "model.decoder.embed_positions.weight", "p d"),
        *(PROJECTED if form.projected else ()),
        *(FUSED if form.fused else APART),
        *LAYER,
        *(both("layer_norm", "model.decoder.final_layer_norm", "d", "d") if form.norm else ()),
    )


OFFSET = 2  # rows of the table of positions before that of the first token
AXES: dict[str, Size] = {
    "s": lambda _: len(PROJECTIONS),
    "x": "hidden_size",
    "d": "hidden_size",
    "e": "word_embed_proj_dim",
    "f": "ffn_dim",
    "v": "vocab_size",
    "p": Sized("max_position_embeddings", OFFSET),
}

# --- numbers --------------------------------------------------------------------------------------------

MEASURED = (
    "num_hidden_layers",
    "hidden_size",
    "word_embed_proj_dim",
    "ffn_dim",
    "max_position_embeddings",
    "vocab_size",
)
# (layers, width, width of a word, feed-forward width) -> name, heads: Table 1 of arXiv 2205.01068, and 350m,
# whose words have a width of their own. Words and positions are left out, which people add.
PUBLISHED = {
    (layers, d, e, 4 * d): (name, heads)
    for name, layers, d, e, heads in (
        ("125m", 12, 768, 768, 12),
        ("350m", 24, 1024, 512, 16),
        ("1.3b", 24, 2048, 2048, 32),
        ("2.7b", 32, 2560, 2560, 32),
        ("6.7b", 32, 4096, 4096, 32),
        ("13b", 40, 5120, 5120, 40),
        ("30b", 48, 7168, 7168, 56),
        ("66b", 64, 9216, 9216, 72),
        ("175b", 96, 12288, 12288, 96),
    )
}


def published(known: Known) -> tuple[int, str] | None:
    """The heads of the published model of these sizes, and the reason."""
    found = PUBLISHED.get(tuple(known[n] for n in MEASURED[:4]))
    return None if found is None else (found[1], f"rule: layers and widths are those of OPT {found[0]}")


def heads(known: Known) -> Value | None:
    found = published(known)
    return None if found is None else Value(*found)


def which_projection(known: Known) -> str:
    fused = "qkv_proj" if form_of(known.source).fused else "k_proj"
    return f"the number of attention heads ({fused} does not tell)"


def positions(known: Known) -> Value | None:
    rows = known.source.size("embed_positions.weight", 0, shared=False)
    return None if rows is None else Value(rows.value - OFFSET, f"{rows.source}, less {OFFSET}")


def own_gelu(known: Known) -> str | None:
    """metaseq's own name is an answer for relu only: `gelu` was the exact one at first, and later the tanh
    form."""
    own = (known.facts.document or {}).get("activation_fn")
    return None if own in (None, "relu") else str(own)


def activation(known: Known) -> Value | None:
    if own_gelu(known):
        return None
    return given("relu", "activation_fn is not said; every published OPT has relu (arXiv 2205.01068)")


def ask_activation(known: Known) -> str:
    return f"its Hugging Face name, as activation_fn {own_gelu(known)} has meant different things"


def is_name(known: Known, found: Value) -> Value:
    if known.config is None and type(found.value) not in (str, int):
        message = f"expected a name, found {shown(found.value)}"
        known.refuse("bad-config", message, "activation_fn")
    return found


def norms_first(known: Known, told: Value) -> Value:
    """A model whose norms come before each branch has one more at the end; without it some readers of old
    files computed nonsense (metaseq #164), so its absence must be meant."""
    name, norm = "do_layer_norm_before", known.source.prefix + "layer_norm.weight"
    if known.back:
        if _without_last_norm(known):
            return told  # refused by the key that says so
        if ("model.decoder.final_layer_norm.weight" in known.source.tensors) != told.value:
            message = "expected the norm after the last layer exactly where norms come before each branch, "
            found = "none" if told.value else "one"
            known.refuse("config-mismatch", f"{message}found {found}", name)
        return told
    there, form = form_of(known.source).norm, form_of(known.source)
    if told.value is None and there:
        return Value(True, "rule: layer_norm.weight is there, which only such a model has")
    if told.value is None:
        if form.projected:
            return given(False, "no layer_norm.weight, and projections as 350m has them")
        hint = f"--set {name}=false for a model that normalises after each branch, as 350m does"
        message = "expected the norm after the last layer, found none"
        known.refuse("missing-tensor", message, norm, hint)
    elif told.value != there:
        message = f"expected {'a' if told.value else 'no'} norm after the last layer ({told.source}), "
        kind = "missing-tensor" if told.value else "config-mismatch"
        known.refuse(kind, f"{message}found {'one' if there else 'none'}", norm)
    return told


def _without_last_norm(known: Known) -> bool:
    """Whether config.json says that there is no norm after the last layer, or that norms have no weights."""
    said = known.facts.document or {}
    return said.get("_remove_final_layer_norm") is True or said.get("layer_norm_elementwise_affine") is False


def as_wide(known: Known) -> Value:
    return Value(known["hidden_size"], "rule: word_embed_proj_dim absent from config.json")


COMPUTED = "metaseq's decoder of OPT has no other"
IDS = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
CLASS = Class(
    "OPTConfig",
    {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "word_embed_proj_dim": None,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    {**IDS, "max_position_embeddings": 2048},
    idle={
        **DECODER,
        "learned_embeddings": "not read: positions are always learned",  # of Galactica
        "output_projection": "not read: tie_word_embeddings decides",  # of the published 13B
    },
    words="decoder.embed_tokens.weight",
    positions="decoder.embed_positions.weight",
    dropouts={"dropout": 0.1, "attention_dropout": 0.0, "layerdrop": 0.0},
    heads=without(DECODER_HEADS, "ForTokenClassification"),
)

FAMILY = metaseq.family(
    name="opt",
    title="OPT",
    summary="OPT 125m to 175b: metaseq's reshard-model_part-K.pt, reshard.pt, restored.pt",
    architecture="OPTForCausalLM",
    model_type="opt",
    config=CLASS,
    rows=rows,
    axes=AXES,
    fields=by_name(
        only("architectures", ["OPTForCausalLM"], "family opt", told=False),
        only("model_type", "opt", "family opt", told=False),
        count("num_hidden_layers", "decoder_layers", rule=counted),
        count("hidden_size", "decoder_embed_dim", rule=measured("embed_positions.weight", 1, shared=False)),
        count(
            "word_embed_proj_dim",
            "decoder_input_dim",
            rule=measured("embed_tokens.weight", 1, shared=False),
            silent=as_wide,
        ),
        count("ffn_dim", "decoder_ffn_embed_dim", rule=measured("layers.{i}.fc1.weight", 0)),
        count("vocab_size", "vocab_size", rule=measured("embed_tokens.weight", 0)),
        count("max_position_embeddings", "max_target_positions", rule=positions),
        count("num_attention_heads", "decoder_attention_heads", rule=heads, ask=which_projection),
        anything(
            "activation_function",
            read=lambda known: () if own_gelu(known) else ("activation_fn",),
            rule=activation,
            silent=DEFAULT,
            ask=ask_activation,
            check=is_name,
        ),
        flag("do_layer_norm_before", "decoder_normalize_before", rule=Value(None, ""), check=norms_first),
        only("enable_bias", True, COMPUTED),
        only("layer_norm_elementwise_affine", True, COMPUTED),
        only("_remove_final_layer_norm", False, "only models converted before transformers 4.20 need it"),
        only("tie_word_embeddings", True, "metaseq: share_decoder_input_output_embed"),
        DTYPE,
        written("prefix", lambda _: Value("</s>", "every text begins with it (metaseq, hub_utils)")),
        free(
            "default of OPTConfig",
            dropout=0.1,
            attention_dropout=0.0,
            activation_dropout=0.0,
            layerdrop=0.0,
            init_std=0.02,
            use_cache=True,
        ),
        *(
            special(name, given(number, "metaseq's vocabulary begins with <s>, <pad>, </s>, <unk>"))
            for name, number in IDS.items()
        ),
    ),
    ids=tuple(IDS),
    sizes=(*MEASURED, "num_attention_heads", "activation_function", "do_layer_norm_before"),
    shared=("num_attention_heads", "ffn_dim", "vocab_size"),
    settings={
        "activation_fn": "activation_function",
        "decoder_layers": "num_hidden_layers",
        "decoder_embed_dim": "hidden_size",
        "decoder_input_dim": "word_embed_proj_dim",
        "decoder_output_dim": "word_embed_proj_dim",
        "decoder_ffn_embed_dim": "ffn_dim",
        "decoder_attention_heads": "num_attention_heads",
        "decoder_normalize_before": "do_layer_norm_before",
        "max_target_positions": "max_position_embeddings",
    },
    # other values compute something that OPT does not
    computed={
        "share_decoder_input_output_embed": True,
        "no_scale_embedding": True,
        "decoder_learned_pos": True,
        "decoder_learned_sinusoidal": False,
        "alibi": False,
        "disable_bias": False,
        "disable_affine_ln": False,
    },
    # metaseq's vocabulary has the special tokens of fairseq; OPT was trained with </s> before every text
    vocabulary=Vocabulary(
        "byte-level",
        ("GPT2Tokenizer",),
        named={"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"},
        begins=True,
    ),
)
