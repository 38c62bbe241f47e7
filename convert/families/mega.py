"""MEGA: the masked language model of mnaylor/mega-wikitext-103, and others of the layers of
facebookresearch/mega that were saved like it.

The plain names of the original hold on this side of the table: `weight` and `bias` are those of the output
layer. A layer whose averages run in one direction only is a decoder's, and becomes MegaForCausalLM.

Source: facebookresearch/mega @aeaa4b44 (fairseq/modules); transformers 4.37.2 (models/mega, its script for
originals). Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Callable

from ckpt_tool.convert.dialects import state_dicts
from ckpt_tool.convert.dialects.state_dicts import Vocabulary
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.numbers import (
    DEFAULT,
    DTYPE,
    ENCODER_HEADS,
    UNKNOWN,
    Class,
    Entry,
    Field,
    Foretold,
    Known,
    Size,
    Value,
    anything,
    by_name,
    count,
    counted,
    flag,
    follows,
    given,
    measured,
    only,
    shown,
    special,
)

ARCHITECTURES = ("MegaForMaskedLM", "MegaForCausalLM")
S, T = "encoders.{i}.", "mega.layers.{i}."
A, B = f"{S}mega_layer.", f"{T}mega_layer."
WORDS = "mega.embedding_layer.word_embeddings.weight"
FIRST = "encoders.0.mega_layer.move.delta"

# --- rows -----------------------------------------------------------------------------------------------


def both(name: str, weight: str, bias: str) -> tuple[Rule, Rule]:
    """The weight and the bias of a linear layer."""
    return (
        rule(f"{S}{name}.weight", f"{T}{name}.weight", weight),
        rule(f"{S}{name}.bias", f"{T}{name}.bias", bias),
    )


# The tensors of a norm and their shapes; the last of a batch norm counts the batches of its training.
BATCH = {"weight": "d", "bias": "d", "running_mean": "d", "running_var": "d", "num_batches_tracked": ""}
NORMS = {
    "layernorm": {"weight": "d", "bias": "d"},
    "scalenorm": {"scalar": "one"},
    "rmsnorm": {"weight": "d"},
    "batchnorm": BATCH,
    "syncbatchnorm": BATCH,
}
AVERAGES = (
    rule(f"{A}move.delta", f"{B}ema_gate.damping_factor", "(w d) e one"),
    rule(f"{A}move.alpha", f"{B}ema_gate.decay_factor", "(w d) e one"),
    rule(f"{A}move.beta", f"{B}ema_gate.ema_expansion_matrix", "(w d) e one"),
    rule(f"{A}move.gamma", f"{B}ema_gate.kernel_projection_matrix", "(w d) e"),
    rule(f"{A}move.omega", f"{B}ema_gate.residual_weight", "d"),
)
BIASES = {
    "rotary": (
        rule(f"{A}rel_pos_bias.alpha", f"{B}rel_pos_bias.alpha", "one z"),
        rule(f"{A}rel_pos_bias.beta", f"{B}rel_pos_bias.b_param", "one z"),
        rule(f"{A}rel_pos_bias._float_tensor", f"{B}rel_pos_bias._float_tensor", "one"),
    ),
    "simple": (rule(f"{A}rel_pos_bias.rel_pos_bias", f"{B}rel_pos_bias.rel_pos_bias", "r"),),
}


def norm(module: str, known: Known) -> tuple[Rule, ...]:
    kinds = NORMS[known["normalization_type"]]
    return tuple(
        rule(f"{S}{module}.norm.norm.{n}", f"{T}{module}.norm.norm.{n}", shape) for n, shape in kinds.items()
    )


def rows(known: Known) -> tuple[Rule, ...]:
    head, tied = ("lm_head." if known["is_decoder"] else "mlm_head."), bool(known["tie_word_embeddings"])
    fed = known["use_normalized_ffn"]
    return (
        rule("embedding_layer.weight", WORDS, "v d"),
        rule(f"{A}gamma", f"{B}qk_weight", "two z"),
        rule(f"{A}beta", f"{B}qk_bias", "two z"),
        *norm("mega_layer", known),
        *AVERAGES,
        *both("mega_layer.v_proj", "h d", "h"),
        *both("mega_layer.mx_proj", "m d", "m"),
        *both("mega_layer.h_proj", "d h", "d"),
        *BIASES[known["relative_positional_bias"]],
        *(norm("nffn", known) if fed else ()),
        *(both("nffn.fc1", "f d", "f") if fed else ()),
        *(both("nffn.fc2", "d f", "d") if fed else ()),
        rule("weight", WORDS if tied else f"{head}weight", "v d", tied=tied),
        rule("bias", f"{head}bias", "v"),
    )


AXES: dict[str, Size] = {
    "v": "vocab_size",
    "d": "hidden_size",
    "z": "shared_representation_size",
    "h": "intermediate_size",
    "e": "ema_projection_size",
    "f": "nffn_hidden_size",
    "w": lambda known: 2 if known["bidirectional"] else 1,
    "m": lambda known: (
        sum(known[n] for n in ("shared_representation_size", "intermediate_size")) + 2 * known["hidden_size"]
    ),
    "r": lambda known: 2 * known["max_positions"] - 1,
    "one": lambda _: 1,
    "two": lambda _: 2,
}

# --- numbers --------------------------------------------------------------------------------------------

CLASS = Class(
    "MegaConfig",
    {
        "vocab_size": 30522,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "intermediate_size": 256,
        "ema_projection_size": 16,
        "bidirectional": True,
        "shared_representation_size": 64,
        "use_chunking": False,
        "chunk_size": -1,
        "truncation": None,
        "normalize_before_mega": True,
        "normalization_type": "scalenorm",
        "norm_affine": True,
        "activation": "silu",
        "attention_activation": "softmax",
        "use_normalized_ffn": True,
        "nffn_hidden_size": 256,
        "normalize_before_ffn": True,
        "max_positions": 2048,
        "add_token_type_embeddings": False,
        "relative_positional_bias": "rotary",
        "add_lm_hidden_dense_layer": True,
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    idle={
        **dict.fromkeys(
            ("dropout_prob", "nffn_activation_dropout_prob", "use_feature_dropout"), "for training"
        ),
        **dict.fromkeys(("ema_delta_alpha_range", "ema_beta_range"), "for training: how weights begin"),
        "ema_gamma_omega_range": "for training: how weights begin",
        "num_attention_heads": "not read: there is one",
        "type_vocab_size": "read with add_token_type_embeddings alone",
    },
    causal=False,
    distances=".rel_pos_bias.rel_pos_bias",
    prefix="mega.",
    words="embedding_layer.word_embeddings.weight",
    tied={"mlm_head.weight": "", "lm_head.weight": ""},
    dropouts={
        "dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "nffn_activation_dropout_prob": 0.1,
    },
    heads={**ENCODER_HEADS, "ForSequenceClassification": ("classifier.dense", "classifier.out_proj")},
)


def directed(name: str) -> Callable[[Known], tuple[str, ...]]:
    """The key of what the publisher's code calls after encoder and decoder; a decoder may have been built
    from the arguments of an encoder."""

    def keys(known: Known) -> tuple[str, ...]:
        own = f"decoder_{name}"
        decoder = not known["bidirectional"] and known.facts.given(own)
        return (own if decoder else f"encoder_{name}",)

    return keys


def directions(known: Known) -> Value | None:
    """Averages of both directions have two rows for each channel, whatever the arguments say: the encoder's
    layer does not read them."""
    there, width = known.source.first(FIRST), known.source.first("encoders.0.mega_layer.move.omega")
    if (
        there is None
        or width is None
        or not there.shape
        or there.shape[0] not in (width.numel, 2 * width.numel)
    ):
        return None
    many = there.shape[0] // max(1, width.numel)
    return Value(many == 2, f"rows of {FIRST}, {many} for each channel of move.omega")


def one_of(*values: str) -> Callable[[Known, Value], Value]:
    """A check: one of these names."""

    def check(known: Known, found: Value) -> Value:
        if found.value not in values:
            message = f"expected {' or '.join(values)}, found {shown(found.value)}"
            known.refuse("unsupported", message, found.source.rpartition(": ")[2])
            return UNKNOWN
        return found

    return check


# The publisher's names, and those of transformers for the same functions.
FUNCTIONS = {n: n for n in ("silu", "relu", "gelu", "gelu_accurate", "gelu_fast", "linear")} | {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), "gelu_accurate"),
    **{"swish": "silu", "gelu_python": "gelu"},
}


def even(known: Known, found: Value) -> Value:
    """The rotary bias turns pairs of query and key; transformers asks it of the width too."""
    if known["relative_positional_bias"] == "rotary" and found.value % 2:
        message = f"expected an even number with the rotary bias, found {found.value}"
        known.refuse("config-mismatch", message, found.source.rpartition(": ")[2])
    return found


def least(smallest: int, *others: object) -> Callable[[Known, Value], Value]:
    """A check: a whole number from `smallest`, or one of `others`."""

    def check(known: Known, found: Value) -> Value:
        whole = type(found.value) is int and found.value >= smallest
        if not whole and not any(found.value is o or (o is not None and found.value == o) for o in others):
            wanted = " or ".join([f"a number from {smallest}", *map(shown, others)])
            message = f"expected {wanted}, found {shown(found.value)}"
            known.refuse("bad-config", message, found.source.rpartition(": ")[2])
            return UNKNOWN
        return found if found.value is None else Value(int(found.value), found.source)

    return check


def chunked(known: Known) -> Value:
    return Value(known["chunk_size"] > 0, "rule: chunk_size above 0")


def as_chunked(known: Known, found: Value) -> Value:
    """The original has one argument for both."""
    if found.value != (known["chunk_size"] > 0):
        message = f"expected {shown(not found.value)} beside chunk_size {known['chunk_size']}, found "
        known.refuse("config-mismatch", f"{message}{shown(found.value)}", "use_chunking")
    return found


def reach(known: Known, found: Value) -> Value:
    """The table of the simple bias is as long as a chunk where there are chunks. MegaConfig has one number
    for its length and the positions."""
    chunk = known["chunk_size"]
    if known["relative_positional_bias"] != "simple" or chunk < 1 or found.value == chunk:
        return found
    if not known.back:
        return Value(chunk, "rule: the table of distances is for one chunk")
    message = f"expected chunk_size {chunk} with the simple bias, found {found.value}"
    known.refuse("config-mismatch", message, "max_positions")
    return found


def fed(known: Known) -> Value:
    name = "mega.layers.0.nffn.fc1.weight" if known.back else "encoders.0.nffn.fc1.weight"
    there = name in known.source.tensors
    return Value(there, f"{'a' if there else 'no'} nffn.fc1.weight in the file")


def inner(known: Known, found: Value) -> Value:
    """Not above 0 for a layer without feed-forward, whose size in config.json means nothing then."""
    if known["use_normalized_ffn"] or known.back:
        return least(1)(known, found)
    if type(found.value) is int and found.value > 0 and found.source.endswith("embed_dim"):
        message = f"expected nffn.fc1.weight of {found.value} rows, found none"
        known.refuse("missing-tensor", message, found.source.rpartition(": ")[2])
    return Value(256, "rule: default of MegaConfig, as there is no feed-forward")


def of_one_direction(known: Known, found: Value) -> Value:
    if known.back and found.value == known["bidirectional"]:
        wanted = shown(not found.value)
        message = f"expected {wanted} beside bidirectional {shown(known['bidirectional'])}, found "
        known.refuse("unsupported", f"{message}{shown(found.value)}", "is_decoder")
    elif found.value and known["bidirectional"]:
        message = "expected false beside averages of both directions, found true"
        known.refuse("config-mismatch", message, "is_decoder")
    return found


def both_norms(known: Known, found: Value) -> Value:
    if found.value != known["normalize_before_mega"]:
        message = f"expected normalize_before_mega's {shown(known['normalize_before_mega'])}, found "
        known.refuse("unsupported", f"{message}{shown(found.value)}", "normalize_before_ffn")
    return found


def architectures(known: Known) -> Value:
    causal = known["is_decoder"]
    return Value(
        [ARCHITECTURES[bool(causal)]], f"averages of {'one direction' if causal else 'both directions'}"
    )


def unread(name: str, key: str, default: float | bool) -> Field:
    """What only training reads, carried over from the arguments and back."""

    def take(known: Known) -> Value:
        of_class = 0.1 if isinstance(default, float) else default
        where, usual = (name, of_class) if known.back else (key, default)
        return state_dicts.beside(known, name, usual, where)

    return follows(name, take, free=True)


OWN_HEAD = given(False, "mlm_head_weights.pt is an output matrix of its own")
ONE = "a decoder's layers; those of both directions are an encoder's"
RATES = {
    "dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "hidden_dropout_prob": "hidden_dropout",
    "nffn_activation_dropout_prob": "activation_dropout",
}
IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
FIELDS = by_name(
    follows("architectures", architectures),
    only("model_type", "mega", "family mega", told=False),
    flag("bidirectional", rule=directions),
    flag(
        "is_decoder",
        rule=lambda known: Value(not known["bidirectional"], f"rule: {ONE}"),
        check=of_one_direction,
    ),
    count("num_hidden_layers", "depth", "encoder_layers", rule=counted, silent=DEFAULT),
    count("vocab_size", "vocab_size", rule=measured("embedding_layer.weight", 0), silent=DEFAULT),
    count(
        "hidden_size",
        read=directed("embed_dim"),
        rule=measured("embedding_layer.weight", 1),
        silent=DEFAULT,
        check=even,
    ),
    count(
        "shared_representation_size",
        read=directed("z_dim"),
        rule=measured(f"{A}gamma", 1),
        silent=DEFAULT,
        check=even,
    ),
    count(
        "intermediate_size",
        read=directed("hidden_dim"),
        rule=measured(f"{A}v_proj.weight", 0),
        silent=DEFAULT,
    ),
    count("ema_projection_size", read=directed("n_dim"), rule=measured(f"{A}move.gamma", 1), silent=DEFAULT),
    flag("use_normalized_ffn", rule=fed),
    anything(
        "nffn_hidden_size",
        read=directed("ffn_embed_dim"),
        rule=lambda known: known.source.size(f"{S}nffn.fc1.weight", 0) or given(0, "no feed-forward"),
        silent=DEFAULT,
        check=inner,
    ),
    anything(
        "activation",
        "activation_fn",
        silent=DEFAULT,
        check=one_of(*FUNCTIONS),
        ask="the function of values, candidates and feed-forward",
    ),
    anything(
        "attention_activation",
        "attention_activation_fn",
        silent=DEFAULT,
        check=one_of("softmax", "laplace", "relu2"),
        ask="the function of scores",
    ),
    anything(
        "chunk_size",
        read=directed("chunk_size"),
        silent=DEFAULT,
        check=least(1, -1),
        ask="how many tokens see each other, -1 for all",
    ),
    flag("use_chunking", rule=chunked, check=as_chunked),
    anything(
        "truncation",
        "truncation_length",
        silent=DEFAULT,
        check=least(1, None),
        ask="how many tokens an average reaches back, null for all",
    ),
    anything(
        "normalization_type",
        "normalization_type",
        silent=DEFAULT,
        check=one_of(*NORMS),
        ask="the kind of norm",
    ),
    flag("normalize_before_mega", "normalize_before", rule=None),
    flag("normalize_before_ffn", "normalize_before", rule=None, check=both_norms),
    only("norm_affine", True, "the publisher's layers have no other"),
    anything(
        "relative_positional_bias",
        "rel_pos_bias",
        silent=DEFAULT,
        check=one_of(*BIASES),
        ask="the kind of bias of the scores",
    ),
    count(
        "max_positions",
        read=lambda known: (
            "max_target_positions" if directed("embed_dim")(known)[0][0] == "d" else "max_source_positions",
        ),
        silent=DEFAULT,
        check=reach,
    ),
    only("add_token_type_embeddings", False, "the original has none"),
    only("add_lm_hidden_dense_layer", False, "the original's head is one linear layer"),
    only("add_cross_attention", False, "an encoder, or a decoder alone"),
    flag("tie_word_embeddings", rule=OWN_HEAD),
    DTYPE,
    *(unread(name, key, 0.0 if key == "activation_dropout" else 0.1) for name, key in RATES.items()),
    unread("use_feature_dropout", "feature_dropout", False),
    *(
        special(name, given(i, "RoBERTa's vocabulary begins with <s>, <pad>, </s>, <unk>"))
        for name, i in IDS.items()
    ),
)

# --- the arguments of the way back ----------------------------------------------------------------------


def argument(key: str, name: str) -> Entry:
    """The argument `key`, called after encoder or decoder where it is of either."""

    def entry(known: Known) -> dict[str, Value]:
        side = "decoder" if known["is_decoder"] else "encoder"
        return {key.format(side=side, place="target" if known["is_decoder"] else "source"): known.value(name)}

    return entry


def width_inside(known: Known) -> dict[str, Value]:
    side = "decoder" if known["is_decoder"] else "encoder"
    size = known["nffn_hidden_size"] if known["use_normalized_ffn"] else 0
    return {f"{side}_ffn_embed_dim": Value(size, "config.json")}


def function(known: Known) -> dict[str, Value]:
    return {"activation_fn": Value(FUNCTIONS[known["activation"]], "config.json: activation")}


WRITTEN: tuple[Entry, ...] = (
    argument("depth", "num_hidden_layers"),
    argument("vocab_size", "vocab_size"),
    *(
        argument(f"{{side}}_{key}", name)
        for key, name in (
            ("embed_dim", "hidden_size"),
            ("z_dim", "shared_representation_size"),
            ("hidden_dim", "intermediate_size"),
            ("n_dim", "ema_projection_size"),
            ("chunk_size", "chunk_size"),
        )
    ),
    width_inside,
    function,
    argument("attention_activation_fn", "attention_activation"),
    argument("bidirectional", "bidirectional"),
    argument("truncation_length", "truncation"),
    argument("normalization_type", "normalization_type"),
    argument("normalize_before", "normalize_before_mega"),
    argument("rel_pos_bias", "relative_positional_bias"),
    argument("max_{place}_positions", "max_positions"),
    argument("feature_dropout", "use_feature_dropout"),
    *(argument(key, name) for name, key in RATES.items()),
)
NAMES = ("embed_dim", "ffn_embed_dim", "z_dim", "hidden_dim", "n_dim", "chunk_size", "layers")
ARGUMENTS = (
    *(f"{side}_{name}" for side in ("encoder", "decoder") for name in NAMES),
    *("max_source_positions", "max_target_positions", "bidirectional", "truncation_length"),
    *("activation_fn", "attention_activation_fn", "normalization_type", "normalize_before", "rel_pos_bias"),
    *("feature_dropout", *RATES.values()),
)

# --- what transformers does otherwise -------------------------------------------------------------------

RMS_NORM = "mega-rms-norm"


def rms_norm(known: Known) -> tuple[Foretold, ...]:
    if known["normalization_type"] != "rmsnorm":
        return ()
    reason = (
        "MegaRMSNorm of transformers 4.37.2 multiplies by the weight and forgets to divide by the root of "
        "the mean square, as the original does: it computes other numbers in every layer"
    )
    return (Foretold(RMS_NORM, reason, {"rms_norm_divides": True}, ("layer",)),)


def notes(known: Known) -> list[str]:
    made = ["Mega is in transformers before 5: a later release does not load the output"]
    said = (known.facts.document or {}).get("bidirectional")
    if isinstance(said, bool) and said != known["bidirectional"]:
        told = known.value("bidirectional").source
        made.append(f"bidirectional {shown(said)} of the arguments is not what was built ({told})")
    if known["is_decoder"] and known["use_chunking"]:
        made.append(
            f"transformers computes a decoder's text of whole chunks of {known['chunk_size']} tokens alone"
        )
    if known["is_decoder"] and known["truncation"] is not None:
        made.append("transformers leaves the truncation out where it caches (use_cache true, its default)")
    return made


FAMILY = state_dicts.family(
    name="mega",
    title="MEGA",
    summary="MEGA: encoder_weights.pt, mlm_head_weights.pt and model_args.pkl",
    config=CLASS,
    model_type="mega",
    architectures=ARCHITECTURES,
    fields=FIELDS,
    rows=rows,
    axes=AXES,
    files={"encoder_weights.pt": r"(embedding_layer|encoders)\..*", "mlm_head_weights.pt": r".*"},
    head="weight",
    told_by=FIRST,
    layer=(r"encoders\.(\d+)\.", r"mega\.layers\.(\d+)\."),
    inner="mega_args",
    outer=("depth", "vocab_size"),
    arguments=ARGUMENTS,
    written=WRITTEN,
    ids=tuple(IDS),
    unread=r".*\.(_float_tensor|num_batches_tracked)",
    notes=notes,
    foretold={RMS_NORM: rms_norm},
    vocabulary=Vocabulary(
        "byte-level",
        ("RobertaTokenizer",),
        named={
            **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>"},
            **{"pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"},
        },
        frames=True,
    ),
)
