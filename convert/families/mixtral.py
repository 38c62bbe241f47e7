"""Mixtral 8x7B and 8x22B.

Three published forms. A: one `consolidated.00.pth` with a tensor for each expert; B: `consolidated.00.pt`
to `.07.pt` that hold different tensors, with the experts of a layer stacked and w2 transposed; C:
`consolidated.safetensors` named as A. Sources: mistralai/mistral-inference @b8181901 (A, C), transformers
4.37.2 and ml-explore/mlx-examples @1120adab (B). params.json has native names in A and C and may have
Hugging Face names in B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.dialects import consolidated as decoder
from ckpt_tool.convert.dialects.consolidated import feed_forward, foreign, open_download
from ckpt_tool.convert.dialects.converted import kept_facts, read_config
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.families.mistral import rope_theta, sliding_window
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.options import CONTAINER, POOLING, Option
from ckpt_tool.convert.params import Facts
from ckpt_tool.convert.plan import Options, Plan, Value
from ckpt_tool.convert.source import dtype_value
from ckpt_tool.convert.vocabularies import MISTRAL_AI
from ckpt_tool.errors import fail

ARCHITECTURE = "MixtralForCausalLM"
STACKED_FILES = 8
S, T = "layers.{i}.", "model.layers.{i}."
SE, TE = S + "feed_forward.experts.{e}.", T + "block_sparse_moe.experts.{e}."

ATTENTION = (
    rule("tok_embeddings.weight", "model.embed_tokens.weight", "v d"),
    rule(S + "attention_norm.weight", T + "input_layernorm.weight", "d"),
    rule(S + "attention.wq.weight", T + "self_attn.q_proj.weight", "(n half two) d -> (n two half) d"),
    rule(S + "attention.wk.weight", T + "self_attn.k_proj.weight", "(k half two) d -> (k two half) d"),
    rule(S + "attention.wv.weight", T + "self_attn.v_proj.weight", "(k h) d"),
    rule(S + "attention.wo.weight", T + "self_attn.o_proj.weight", "d (n h)"),
    rule(S + "ffn_norm.weight", T + "post_attention_layernorm.weight", "d"),
)
EXPERTS = (
    rule(S + "feed_forward.gate.weight", T + "block_sparse_moe.gate.weight", "e d"),
    rule(SE + "w1.weight", TE + "w1.weight", "f d"),
    rule(SE + "w3.weight", TE + "w3.weight", "f d"),
    rule(SE + "w2.weight", TE + "w2.weight", "d f"),
)
STACKED = (
    rule(S + "block_sparse_moe.gate.weight", T + "block_sparse_moe.gate.weight", "e d"),
    rule(S + "block_sparse_moe.w1", TE + "w1.weight", "(e f) d", cut="e"),
    rule(S + "block_sparse_moe.w3", TE + "w3.weight", "(e f) d", cut="e"),
    rule(S + "block_sparse_moe.w2", TE + "w2.weight", "(e f) d -> d (e f)", cut="e"),
)
HEAD = (
    rule("norm.weight", "model.norm.weight", "d"),
    rule("output.weight", "lm_head.weight", "v d"),
)


def table(form: str) -> tuple[Rule, ...]:
    """The rows of form "A", "B" or "C"; A and C differ in their container only."""
    return (*ATTENTION, *(STACKED if form == "B" else EXPERTS), *HEAD)


RULES = table("C")
FREE = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,  # of the training loss only
}


def recognise(checkpoint: Checkpoint) -> tuple[bool, str]:
    names = checkpoint.names()
    if reason := foreign(names):
        return False, reason
    form = feed_forward(names)
    if form in ("experts", "stacked"):
        return True, "a tensor for each expert" if form == "experts" else "stacked experts"
    return False, "no experts in layer 0"


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    download = open_download(checkpoint)
    stacked = feed_forward(checkpoint.names()) == "stacked"
    facts = decoder.read_params(checkpoint, options)
    window = sliding_window(facts)
    theta = rope_theta(facts, window)
    chosen = experts_per_token(facts)
    block = S + ("block_sparse_moe." if stacked else "feed_forward.")
    gate = download.size(block + "gate.weight", 0, shared=False)
    experts = facts.integer("num_local_experts", "moe.num_experts", "num_local_experts", rule=gate)
    ffn = download.size(block + ("w1" if stacked else "experts.0.w1.weight"), 0)
    if stacked and ffn is not None:
        ffn = Value(ffn.value // experts.value, f"{ffn.source}, divided by num_local_experts")
    sizes = {**decoder.dimensions(download, facts, ffn=ffn), "num_local_experts": experts}
    config = {
        "architectures": facts.fixed("architectures", [ARCHITECTURE], "family mixtral"),
        "model_type": facts.fixed("model_type", "mixtral", "family mixtral"),
        "hidden_act": facts.fixed("hidden_act", "silu", "the original's experts"),
        **sizes,
        "num_experts_per_tok": chosen,
        "rope_theta": theta,
        "sliding_window": window,
        "max_position_embeddings": context(facts, sizes),
        "tie_word_embeddings": facts.fixed("tie_word_embeddings", False, "rule: no Mixtral ties its head"),
        "torch_dtype": dtype_value(download, options),
        **{name: facts.like(name, v, "default of MixtralConfig") for name, v in FREE.items()},
    }
    if chosen.value > experts.value:
        facts.refuse(
            "config-mismatch",
            f"expected at most {experts.value} experts per token, found {chosen.value}",
            "num_experts_per_tok",
        )
    facts.check_settings({*config, "bos_token_id", "eos_token_id", "pad_token_id"})
    notes = facts.unused(decoder.RUN_TIME)
    facts.check()
    numbers = {k: config[k] for k in (*sizes, "num_experts_per_tok", "rope_theta", "sliding_window")}
    tokenizer = decoder.tokenizer_of(download, options, family="mixtral", config=config)
    ids = {
        "bos_token_id": Value(1, "rule: Mistral tokenizers"),
        "eos_token_id": Value(2, "rule: Mistral tokenizers"),
    }
    config |= decoder.token_ids(facts, tokenizer, ids)
    facts.check()
    in_zip = next(iter(checkpoint.files)).endswith((".pth", ".pt"))
    form = "B" if stacked else "A" if in_zip else "C"
    return decoder.to_hf(
        "mixtral",
        download,
        options,
        rules=table(form),
        sizes=sizes,
        config=config,
        embedding="v",
        tokenizer=tokenizer,
        notes=notes,
        original=decoder.kept(facts, download, numbers, form=form),
    )


def experts_per_token(facts: Facts) -> Value:
    """How many experts each token is sent to: 2 in both published models, and in a params.json without it."""
    two = None if facts.document is None else Value(2, "rule: both Mixtral models choose 2 experts")
    keys = ("moe.num_experts_per_tok", "num_experts_per_tok")
    return facts.integer("num_experts_per_tok", *keys, rule=two, ask="the number of experts per token")


def context(facts: Facts, sizes: dict[str, Value]) -> Value:
    """The length in config.json, which changes no number: 65536 for 8x22B, 32768 for 8x7B."""
    large = (sizes["hidden_size"].value, sizes["num_hidden_layers"].value) == (6144, 56)
    known = (
        Value(65536, "rule: the shape of 8x22B") if large else Value(32768, "rule: as published with 8x7B")
    )
    return facts.integer("max_position_embeddings", "max_position_embeddings", "max_seq_len", rule=known)


def plan_original(checkpoint: Checkpoint, options: Options) -> Plan:
    facts = read_config(checkpoint, options.settings, (ARCHITECTURE,))
    experts = facts.integer("num_local_experts", "num_local_experts")
    chosen = facts.integer("num_experts_per_tok", "num_experts_per_tok")
    theta = facts.number("rope_theta", "rope_theta", rule=Value(1e6, "rule: default of MixtralConfig"))
    window = facts.anything(
        "sliding_window", "sliding_window", rule=Value(None, "rule: default of MixtralConfig")
    )
    facts.fixed("tie_word_embeddings", False, "params.json cannot say otherwise", "tie_word_embeddings")
    if facts.anything("rope_scaling", "rope_scaling", rule=Value(None, "absent")).value is not None:
        facts.refuse(
            "unsupported", "expected no rope_scaling, which params.json cannot say, found one", "rope_scaling"
        )
    sizes = {**decoder.hf_dimensions(facts), "num_local_experts": experts}
    numbers = {**sizes, "num_experts_per_tok": chosen, "rope_theta": theta, "sliding_window": window}
    facts.check_settings({*numbers, "rope_scaling"})
    facts.check()
    original = kept_facts(checkpoint)
    form = str(options.family_options.get("form", original.get("form", "C")))
    if form not in ("A", "B", "C"):
        fail("usage", f"expected form A, B or C, found {form!r}", where="--form")
    if options.family_options.get("container", "safetensors" if form == "C" else "pth") != (
        "safetensors" if form == "C" else "pth"
    ):
        fail("usage", f"expected a container that fits form {form}, found another", where="--container")
    files = weight_files(form)
    layers = sizes["num_hidden_layers"].value

    def home(name: str) -> Sequence[str]:
        """Form B deals whole layers out to its files; the ends of the model go to the first and the last."""
        if name.startswith("layers."):
            return [files[int(name.split(".")[1]) * len(files) // layers]]
        return [files[0] if name.startswith("tok_embeddings") else files[-1]]

    params = native_params(numbers)
    document, notes = decoder.params_document(params, original, numbers)
    return decoder.to_original(
        "mixtral",
        checkpoint,
        options,
        rules=table(form),
        sizes=sizes,
        embedding="v",
        files=files,
        home=home,
        params=params,
        document=document,
        notes=notes,
    )


def native_params(numbers: Mapping[str, Value]) -> dict[str, Value]:
    """params.json as Mistral AI writes it."""
    params: dict[str, Value] = {
        "dim": numbers["hidden_size"],
        "n_layers": numbers["num_hidden_layers"],
        "head_dim": numbers["head_dim"],
        "hidden_dim": numbers["intermediate_size"],
        "n_heads": numbers["num_attention_heads"],
        "n_kv_heads": numbers["num_key_value_heads"],
        "norm_eps": numbers["rms_norm_eps"],
        "vocab_size": numbers["vocab_size"],
        "rope_theta": numbers["rope_theta"],
        "moe.num_experts_per_tok": numbers["num_experts_per_tok"],
        "moe.num_experts": numbers["num_local_experts"],
    }
    if numbers["sliding_window"].value is not None:
        params["sliding_window"] = numbers["sliding_window"]
    return params


def weight_files(form: str) -> list[str]:
    if form == "B":
        return [f"consolidated.{k:02d}.pt" for k in range(STACKED_FILES)]
    return ["consolidated.00.pth" if form == "A" else "consolidated.safetensors"]


FAMILY = Family(
    name="mixtral",
    summary="Mixtral 8x7B, 8x22B: consolidated.*.pth, the eight .pt files, or consolidated.safetensors",
    architectures=(ARCHITECTURE,),
    recognise=recognise,
    plan=plan,
    plan_original=plan_original,
    options=(POOLING, CONTAINER, Option("form", "Layout to write.", "original", choices=("A", "B", "C"))),
    vocabulary=MISTRAL_AI,
)
