"""What Megatron-LM checkpoints of every age call their tensors, and which numbers the code of their day used.

Source: NVIDIA/Megatron-LM v1.0 to v2.5, 23.06 and core_v0.9.0 (model/transformer.py, bert_model.py,
arguments.py, checkpointing.py). Numbers and names of BERT and GPT-2 are here; their layer is that of
`ckpt_tool.reference.transformer`, what else they compute is in megatron_bert and megatron_gpt2.

**Names.** Nested dicts are joined with ".", as in `model.language_model.encoder.layers.0.`. Five ages are
read: block `transformer` with `attention`; `encoder` with `self_attention`; `norm` for `layernorm` (2023);
Megatron-Core (`linear_qkv`, `linear_fc1`, norms fused into them or apart); Transformer Engine's layers before
Core (`layernorm_qkv`, `layernorm_mlp`), with the order of version 2 and the tanh gelu.

**Ranks and stages.** A pass takes one mapping for each tensor-parallel rank, its pipeline stages joined: TP x
PP is `[join_stages([file[t][p] for p in range(PP)]) for t in range(TP)]`.

**Precision.** Softmax has float32 inside in all of Megatron's kernels, fused or not, so
`attention_softmax_in_fp32` changes nothing here. `apply_query_key_layer_scaling` divides the scores by the
layer's number and multiplies them again in float32: it moves the rounding of 16-bit scores and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from ckpt_tool.reference import transformer
from ckpt_tool.reference.blocks import GELUS, VERSION_0, VERSION_1, VERSION_2
from ckpt_tool.reference.facts import Shapes, disagreements, first, one_of, only, refuse

T = TypeVar("T")
MASKED = -10000.0  # Megatron's score of a key that is not to be seen; its fused kernels exclude it exactly

# Stems: names without their last word, `weight` or `bias`. The first that is there is the one; where none is,
# the first of all is what a pass asks for in vain.
LAYER_STEMS = {
    "norm_1": (
        "input_layernorm.",
        "input_norm.",
        "self_attention.linear_qkv.layer_norm_",
        "self_attention.layernorm_qkv.layer_norm_",
    ),
    "qkv": (
        "attention.query_key_value.",
        "self_attention.query_key_value.",
        "self_attention.linear_qkv.",
        "self_attention.layernorm_qkv.",
    ),
    "dense": (
        "attention.dense.",
        "self_attention.dense.",
        "self_attention.linear_proj.",
        "self_attention.proj.",
    ),
    "norm_2": (
        "post_attention_layernorm.",
        "post_attention_norm.",
        "pre_mlp_layernorm.",
        "mlp.linear_fc1.layer_norm_",
        "layernorm_mlp.layer_norm_",
    ),
    "fc1": ("mlp.dense_h_to_4h.", "mlp.linear_fc1.", "layernorm_mlp.fc1_"),
    "fc2": ("mlp.dense_4h_to_h.", "mlp.linear_fc2.", "layernorm_mlp.fc2_"),
}
MODEL_STEMS = {
    "word": ("word_embeddings.weight",),
    "position": ("position_embeddings.weight",),
    "final_norm": ("final_layernorm.weight", "final_norm.weight"),
    "tokentype": ("tokentype_embeddings.weight",),
    "head_word": ("word_embeddings_for_head.weight", "output_layer.weight"),
    "pooler": ("pooler.dense.weight",),
    "lm_dense": ("lm_head.dense.weight",),
    "lm_norm": ("lm_head.layernorm.weight", "lm_head.norm.weight", "lm_head.layer_norm.weight"),
    "lm_bias": ("lm_head.bias", "output_layer.bias"),
    "binary": ("binary_head.weight",),
    "tuned": ("classification_head.weight", "multichoice_head.weight"),
}
# The last stage's own table of words, of which there is none without stages, and the head that a task trained
# in place of those of pretraining, are among them.
OPTIONAL = ("tokentype", "head_word", "tuned")

# Layers, width, feed-forward width, positions, padded words -> heads: the 345M GPT-2 v0.0, BERT v0.1 cased
# and uncased, the only published files; they may carry no args.
PUBLISHED = {(24, 1024, 4096, P, V): 16 for P, V in ((1024, 50304), (512, 29056), (512, 30592))}
# Arguments of other models, where they are not switched off.
NOT_COMPUTED = (
    *("swiglu", "gated_linear_unit", "squared_relu", "quick_geglu", "activation_func_clamp_value"),
    *(
        "num_experts",
        "num_moe_experts",
        "qk_layernorm",
        "qk_l2_norm",
        "attention_output_gate",
        "softmax_scale",
    ),
    *("multi_latent_attention", "experimental_attention_variant", "linear_attention_freq", "window_size"),
    *("use_rotary_position_embeddings", "multi_query_attention", "retro_add_retriever", "mtp_num_layers"),
    *("is_hybrid_model", "heterogeneous_layers_config_path", "use_mup"),
)
VALUES = {
    "softmax_type": ("vanilla",),
    "normalization": ("LayerNorm",),
    "position_embedding_type": ("learned_absolute",),
    "add_bias_linear": (True,),
}
NORM_FROM_ZERO = ("apply_layernorm_1p", "layernorm_zero_centered_gamma")


@dataclass(frozen=True)
class Config(transformer.Config):
    """Of BERT alone are the gelu of the masked LM head, and whether what comes after a token is hidden."""

    head_gelu: str = "erf"
    causal: bool = False
    gelu_of_version_0: ClassVar[str]

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` are the pickled args as plain values and `checkpoint_version`, each absent where the file
        has none; `shapes` those of rank 0, stages joined; `overrides` facts from the user under their Hugging
        Face names, which win. `vocab_size` there is the number of words that count, by default all rows; an
        activation is both gelus, `is_decoder` hides what comes after a token. Without args: epsilon 1e-5.
        ValueError for what none of them tells, where they disagree, and for what this pass does not
        compute."""
        names, n_layers = read_names(shapes)
        version, core = _version(params), "linear_qkv" in names["qkv"]
        engine = "layernorm_qkv" in names["qkv"]
        (rows, D), (P, _) = (shapes[names[role] + "weight"] for role in ("word", "position"))
        units = shapes[f"{names['block']}0.{names['fc1']}weight"][0]
        known = PUBLISHED.get((n_layers, D, units * ranks, P, rows * ranks), 0)

        def told(*hf_names: str, args: tuple[str, ...] = ()) -> Any:
            return first(*map(overrides.get, hf_names), *map(params.get, args))

        n_heads = int(first(told("num_attention_heads", "n_head", args=("num_attention_heads",)), known))
        # args have a number of groups even where queries are not grouped
        grouped = params.get("num_query_groups") if params.get("group_query_attention") else None
        gelu, eps = told("hidden_act", "activation_function"), told("layer_norm_eps", "layer_norm_epsilon")
        eps = one_of(params, "norm_epsilon", "layernorm_epsilon") if eps is None else eps
        c = cls(
            n_layers=n_layers,
            n_heads=n_heads,
            n_groups=int(grouped or n_heads),
            norm_eps=float(first(eps, 1e-5)),
            activation=gelu_named(gelu) if gelu else mlp_gelu(params, core, cls.gelu_of_version_0, engine),
            names=names,
            order=VERSION_2 if core or engine or version >= 2 else VERSION_1 if version == 1 else VERSION_0,
            masked=MASKED,
            # Megatron-Core has the flag and does not use it.
            residual_of_norm=bool(params.get("apply_residual_connection_post_layernorm")) and not core,
            norm_from_zero=any(bool(params.get(flag)) for flag in NORM_FROM_ZERO),
            layer_scaling=bool(params.get("apply_query_key_layer_scaling")),
            n_words=int(overrides.get("vocab_size") or rows * ranks),
            head_gelu=gelu_named(gelu) if gelu else head_gelu(params, core),
            causal=bool(overrides.get("is_decoder", False)),
        )
        layers = told("num_hidden_layers", "n_layer", args=("num_layers",))
        refuse([*disagreements({"layers": n_layers}, {"layers": layers}), *_problems(c, params, ranks, rows)])
        return c


def _problems(c: Config, params: Mapping[str, Any], ranks: int, rows: int) -> Iterator[str]:
    """`rows` of words are on each rank."""
    everything = params.get("args") or {}  # lists too
    said = {**(everything if isinstance(everything, Mapping) else {}), **params}
    off: tuple[Any, ...] = (None, False, 0, "", [], [-1, -1], [-1, 0])
    yield from (f"expected no `{n}`, found {said[n]}" for n in NOT_COMPUTED if said.get(n) not in off)
    yield from only(said, {**VALUES, "num_unique_layers": (c.n_layers,)})
    if not c.n_heads:
        yield "expected `num_attention_heads` in args or given by name, found neither"
    elif c.n_heads % c.n_groups or c.n_groups % ranks:
        found = f"{c.n_heads} in {c.n_groups} groups"
        yield f"expected head counts that {ranks} ranks can share, found {found}"
    if c.n_groups != c.n_heads and c.order != VERSION_2:
        yield f"expected a checkpoint_version that can group queries, found {_version(params)}"
    if (c.n_words or 0) > rows * ranks:
        yield f"expected at least {c.n_words} words, as told, found {rows * ranks} in the tensors"


def mlp_gelu(params: Mapping[str, Any], core: bool, gelu_of_version_0: str, engine: bool = False) -> str:
    """The feed-forward gelu, by the code that args or, without them, the version belong to:

    - Transformer Engine's layers before Core: tanh, whatever the flags say.
    - Megatron-Core: tanh if `bias_gelu_fusion`, which is on by default; `openai_gelu` is not used.
    - args of version 0 without the flag `openai_gelu`, so before 2020-04-14: tanh.
    - otherwise tanh if `openai_gelu` or `bias_gelu_fusion`, else erf; once there is a flag `swiglu` (2023),
      `onnx_safe` overrules the fusion.
    - neither flag is told: `gelu_of_version_0`, erf for versions 1 and 2 (the fusion was opt-in), tanh for 3.

    The constants of the tanh forms are one float32 number. `onnx_safe` writes 1.41421 for the root of 2,
    which moves the result by less than 1e-6 and is not followed.
    """
    fused, openai = params.get("bias_gelu_fusion"), params.get("openai_gelu")
    version = _version(params)
    if engine:
        return "tanh"
    if core:
        return "erf" if fused is not None and not fused else "tanh"
    if fused is None and openai is None:
        if version == 0:
            return "tanh" if has_args(params) else gelu_of_version_0
        return "erf" if version < 3 else "tanh"
    if params.get("onnx_safe") and "swiglu" in params:
        return "tanh" if openai else "erf"
    return "tanh" if fused or openai else "erf"


def head_gelu(params: Mapping[str, Any], core: bool) -> str:
    """The gelu of BERT's masked LM head, never the fused one: tanh if `openai_gelu` and, in args of version
    0, where that flag is not there yet; else erf. Megatron-Core: erf."""
    if core:
        return "erf"
    before_the_flag = not params.get("checkpoint_version") and has_args(params)
    return "tanh" if params.get("openai_gelu", before_the_flag) else "erf"


def has_args(params: Mapping[str, Any]) -> bool:
    return "num_layers" in params


def gelu_named(activation: str) -> str:
    """Of a name that transformers has for it. ValueError for any other function."""
    known = {"gelu": "erf", "gelu_python": "erf", **GELUS}
    if activation not in known:
        raise ValueError(f"expected activation to be one of {', '.join(known)}, found `{activation}`")
    return known[activation]


def _version(params: Mapping[str, Any]) -> float:
    version = params.get("checkpoint_version") or 0
    if version not in (0, 1, 2, 3):
        raise ValueError(f"expected checkpoint_version 0, 1.0, 2.0 or 3.0, found {version}")
    return float(version)


def read_names(shapes: Iterable[str]) -> tuple[dict[str, str], int]:
    """The stems of one tensor-parallel rank by their roles, and the number of its layers. ValueError for two
    tensors in one place, and for layers that are not 0, 1, 2, ..."""
    layers: set[tuple[str, int]] = set()
    first_layer, rest = set(), []
    for name in _of_the_model(shapes):
        if found := re.fullmatch(r"(.*?\blayers\.)(\d+)\.(.+)", name):
            layers.add((found[1], int(found[2])))
            first_layer |= {found[3]} if int(found[2]) == 0 else set()
        else:
            rest.append(name)
    block = min(layers)[0] if layers else ""
    if not layers or layers != {(block, i) for i in range(len(layers))}:
        some = _some(f"{p}{i}" for p, i in layers)
        raise ValueError(f"expected one block of layers 0, 1, 2, ..., found {some}")
    names = {"block": block}
    for role, stems in LAYER_STEMS.items():
        names[role] = next((s for s in stems if s + "weight" in first_layer), stems[0])
    for role, endings in MODEL_STEMS.items():
        there = [n for n in rest if f".{n}".endswith(tuple(f".{e}" for e in endings))]
        if len(there) > 1:
            raise ValueError(f"expected one of {', '.join(endings)}, found {_some(there)}")
        if there or role not in OPTIONAL:
            names[role] = re.sub(r"(weight|bias)$", "", [*there, endings[0]][0])
    return {"head_word": names["word"], **names}, len(layers)


def _of_the_model(names: Iterable[str]) -> Iterator[str]:
    """Without what training keeps beside `model`, such as the optimizer; all if there is no `model`. The
    extra state of Transformer Engine is about 8-bit scales."""
    names = [n for n in names if not n.endswith("_extra_state")]
    yield from [n for n in names if re.match(r"model\d*\.", n)] or names


def _some(names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in sorted(names)[:4]) or "none"


def join_stages(stages: Sequence[Mapping[str, T]]) -> dict[str, T]:
    """The pipeline stages of one tensor-parallel rank, in order, as one mapping: each numbers its layers from
    0, however many it has, and they follow on those of the stage before. Values may be tensors or what is
    known of them. With virtual stages (`model0`, `model1`, ... in each file) the first chunk of every stage
    comes before the second of any. What is not of the model is left out. ValueError for a gap in the layers
    of a stage, for a name on two stages, and for stages with different chunks."""
    chunks: dict[tuple[int, int], list[str]] = {}  # by number and stage
    for p, stage in enumerate(stages):
        for name in _of_the_model(stage):
            chunk = re.match(r"model(\d*)\.", name)
            chunks.setdefault((int(chunk[1] or 0) if chunk else 0, p), []).append(name)
    numbers = sorted({v for v, _ in chunks})
    for p in range(len(stages)):
        if any((v, p) not in chunks for v in numbers):
            raise ValueError(
                f"expected chunks {_some(f'model{v}' for v in numbers)} on stage {p}, found fewer"
            )
    joined: dict[str, T] = {}
    before = 0
    for v, p in sorted(chunks):
        here: set[int] = set()
        for own in chunks[v, p]:
            name = re.sub(r"^model\d*\.", "model.", own)
            if layer := re.search(r"\blayers\.(\d+)\.", name):
                here.add(int(layer[1]))
                name = f"{name[: layer.start(1)]}{before + int(layer[1])}{name[layer.end(1) :]}"
            if name in joined:
                raise ValueError(f"expected `{own}` on one stage, found it on stage {p} too")
            joined[name] = stages[p][own]
        if here != set(range(len(here))):
            raise ValueError(f"expected layers 0 to {len(here) - 1} on stage {p}, found {sorted(here)[:8]}")
        before += len(here)
    return joined


def join_ranks(parts: Mapping[tuple[int, int], Mapping[str, T]], own: int) -> list[dict[str, T]]:
    """One mapping for each tensor-parallel rank. `parts` are by (expert-parallel rank, tensor-parallel rank):
    each numbers its experts from 0, and has a copy of all other tensors, of which the first's is taken. Each
    expert is shared out over `own` ranks, whose shares those after them repeat: so the first `own` mappings
    have the experts, the others none, and a pair that only repeats need not be there. ValueError where one
    has another number of experts, or where a share is in none."""
    pattern = re.compile(r"(.*\.mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)((?:\..+)?)")
    counts = {len({m[2] for name in part if (m := pattern.fullmatch(name))}) for part in parts.values()}
    if len(counts) != 1:
        raise ValueError(f"expected as many experts on every expert-parallel rank, found {sorted(counts)}")
    (count,) = counts
    parallel, size = (1 + max(at[k] for at in parts) for k in range(2))
    ranks: list[dict[str, T]] = []
    for rank in range(size):
        joined: dict[str, T] = {}
        for part in [part for (_, t), part in sorted(parts.items()) if t == rank]:
            for name, tensor in part.items():
                if pattern.fullmatch(name) is None:
                    joined.setdefault(name, tensor)
        for e in range(parallel if count and rank < own else 0):
            holder = next((t for k, t in sorted(parts) if k == e and t % own == rank), None)
            if holder is None:
                raise ValueError(
                    f"expected share {rank} of the experts of expert-parallel rank {e}, found none"
                )
            for name, tensor in parts[e, holder].items():
                if (m := pattern.fullmatch(name)) is not None:
                    joined[f"{m[1]}{e * count + int(m[2])}{m[3]}"] = tensor
        ranks.append(joined)
    return ranks
