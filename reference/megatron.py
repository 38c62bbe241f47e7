"""What Megatron-LM checkpoints of every age call their tensors, and which numbers the code of their day used.

Source: NVIDIA/Megatron-LM v1.0 to v2.5, 23.06 and core_v0.9.0 (model/transformer.py, bert_model.py,
arguments.py, checkpointing.py). What is common to BERT and GPT-2 is here; the passes are in megatron_bert and
megatron_gpt2.

**Names.** Nested dicts are joined with ".", as in `model.language_model.encoder.layers.0.`. Four ages are
read: block `transformer` with `attention`; `encoder` with `self_attention`; `norm` for `layernorm` (2023);
Megatron-Core (`linear_qkv`, `linear_fc1`, norms fused into them or apart).

**Ranks and stages.** A pass takes one mapping for each tensor-parallel rank, with layers numbered through the
whole model. Pipeline stages number theirs from 0: `join_stages` makes one mapping of the files of a rank, so
TP x PP is `[join_stages([file[t][p] for p in range(PP)]) for t in range(TP)]`.

**Precision.** Softmax has float32 inside in all of Megatron's kernels, fused or not, so
`attention_softmax_in_fp32` changes nothing here. `apply_query_key_layer_scaling` divides the scores by the
layer's number and multiplies them again in float32: it moves the rounding of 16-bit scores and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from ckpt_tool.reference.blocks import VERSION_0, VERSION_1, VERSION_2
from ckpt_tool.reference.facts import Shapes, disagreements, misshapen, refuse

T = TypeVar("T")

# Stems: names without their last word, `weight` or `bias`. The first that is there is the one.
LAYER_STEMS = {
    "norm_1": ("input_layernorm.", "input_norm.", "self_attention.linear_qkv.layer_norm_"),
    "qkv": ("attention.query_key_value.", "self_attention.query_key_value.", "self_attention.linear_qkv."),
    "dense": ("attention.dense.", "self_attention.dense.", "self_attention.linear_proj."),
    "norm_2": (
        "post_attention_layernorm.",
        "post_attention_norm.",
        "pre_mlp_layernorm.",
        "mlp.linear_fc1.layer_norm_",
    ),
    "fc1": ("mlp.dense_h_to_4h.", "mlp.linear_fc1."),
    "fc2": ("mlp.dense_4h_to_h.", "mlp.linear_fc2."),
}
MODEL_STEMS = {
    "word": ("word_embeddings.weight",),
    "position": ("position_embeddings.weight",),
    "final_norm": ("final_layernorm.weight", "final_norm.weight"),
}
# Not in every model: token types without a binary head, the last stage's own table without stages.
OPTIONAL_STEMS = {
    "tokentype": ("tokentype_embeddings.weight",),
    "head_word": ("word_embeddings_for_head.weight", "output_layer.weight"),
    "pooler": ("pooler.dense.weight",),
    "lm_dense": ("lm_head.dense.weight",),
    "lm_norm": ("lm_head.layernorm.weight", "lm_head.norm.weight", "lm_head.layer_norm.weight"),
    "lm_bias": ("lm_head.bias", "output_layer.bias"),
    "binary": ("binary_head.weight",),
}

# Layers, width, feed-forward width, positions, padded words -> heads: the 345M GPT-2 v0.0, BERT v0.1 cased
# and uncased, the only published files; they may carry no args.
PUBLISHED: dict[tuple[int, ...], int] = {
    (24, 1024, 4096, P, V): 16 for P, V in ((1024, 50304), (512, 29056), (512, 30592))
}

# What is told about a size: the name in args, then those in config.json of the two families.
TOLD = {
    "layers": ("num_layers", "num_hidden_layers", "n_layer"),
    "width": ("hidden_size", "hidden_size", "n_embd"),
    "feed-forward width": ("ffn_hidden_size", "intermediate_size", "n_inner"),
    "positions": ("max_position_embeddings", "max_position_embeddings", "n_positions"),
    "padded words": ("padded_vocab_size",),
    "heads": ("num_attention_heads", "num_attention_heads", "n_head"),
}
NORM_FROM_ZERO = ("apply_layernorm_1p", "layernorm_zero_centered_gamma")


@dataclass(frozen=True)
class Names:
    """Stems; those of a layer follow `block`, its number and a dot. The defaults are for tensors that not
    every checkpoint has."""

    block: str
    norm_1: str
    qkv: str
    dense: str
    norm_2: str
    fc1: str
    fc2: str
    word: str
    position: str
    final_norm: str
    tokentype: str | None = None
    head_word: str | None = None
    pooler: str = "pooler.dense."
    lm_dense: str = "lm_head.dense."
    lm_norm: str = "lm_head.layernorm."
    lm_bias: str = "lm_head."
    binary: str = "binary_head."


@dataclass(frozen=True)
class Config:
    """Counts are those of the whole model. A gelu is "erf" or "tanh"."""

    n_layers: int
    n_heads: int
    n_groups: int  # of heads that share a key and a value; as many as heads but with grouped queries
    head_dim: int
    norm_eps: float
    qkv: str  # VERSION_0, VERSION_1 or VERSION_2
    mlp_gelu: str
    head_gelu: str
    causal: bool
    residual_of_norm: bool  # what is added to a branch is its normalised input, not its input
    norm_from_zero: bool  # norms store their weight less one
    layer_scaling: bool
    n_words: int  # rows of the vocabulary that count; those after are padding
    names: Names = field(repr=False)

    @classmethod
    def read(
        cls,
        params: Mapping[str, Any],
        shapes: Shapes,
        ranks: int,
        overrides: Mapping[str, Any],
        *,
        causal: bool,
        gelu_of_version_0: str,
    ) -> Self:
        """See `from_original` of the two families. All problems of the numbers are in one ValueError."""
        names, n_layers = read_names(shapes)
        core = "linear_qkv" in names.qkv
        sizes = _sizes(shapes, names, n_layers, ranks)
        dim, words = sizes["width"], sizes["padded words"]
        version = _version(params)
        n_heads = int(_told(params, overrides, *TOLD["heads"]) or PUBLISHED.get(tuple(sizes.values()), 0))
        # args have a number of groups even where queries are not grouped
        grouped = params.get("num_query_groups") if params.get("group_query_attention") else None
        n_groups = int(grouped or n_heads)
        head_dim = int(params.get("kv_channels") or dim // max(1, n_heads))
        n_words = int(overrides.get("vocab_size") or words)
        qkv = VERSION_2 if core or version >= 2 else VERSION_1 if version == 1 else VERSION_0
        told = {size: _told(params, overrides, *TOLD[size]) for size in sizes}
        problems = [*disagreements(sizes, told), *_not_computed(params)]
        if not n_heads:
            problems.append("expected `num_attention_heads` in args or given by name, found neither")
        else:
            problems += _misshapen(shapes, names, ranks, n_heads, n_groups, head_dim)
        if n_groups != n_heads and qkv != VERSION_2:
            problems.append(f"expected a checkpoint_version that can group queries, found {version}")
        if n_words > words:
            problems.append(f"expected at least {n_words} words, as told, found {words} in the tensors")
        refuse(problems)
        gelu = overrides.get("hidden_act", overrides.get("activation_function"))
        return cls(
            n_layers=n_layers,
            n_heads=n_heads,
            n_groups=n_groups,
            head_dim=head_dim,
            norm_eps=_epsilon(params, overrides),
            qkv=qkv,
            mlp_gelu=gelu_named(gelu) if gelu else mlp_gelu(params, core, gelu_of_version_0),
            head_gelu=gelu_named(gelu) if gelu else head_gelu(params, core),
            causal=causal,
            # Megatron-Core has the flag and does not use it.
            residual_of_norm=bool(params.get("apply_residual_connection_post_layernorm")) and not core,
            norm_from_zero=any(bool(params.get(flag)) for flag in NORM_FROM_ZERO),
            layer_scaling=bool(params.get("apply_query_key_layer_scaling")),
            n_words=n_words,
            names=names,
        )


def mlp_gelu(params: Mapping[str, Any], core: bool, gelu_of_version_0: str) -> str:
    """The feed-forward gelu, by the code that args or, without them, the version belong to:

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
    variants = {
        "gelu": "erf",
        "gelu_python": "erf",
        "gelu_new": "tanh",
        "gelu_fast": "tanh",
        "gelu_pytorch_tanh": "tanh",
    }
    if activation not in variants:
        raise ValueError(f"expected activation to be one of {', '.join(variants)}, found `{activation}`")
    return variants[activation]


def _told(params: Mapping[str, Any], overrides: Mapping[str, Any], arg: str, *hf_names: str) -> Any:
    """The user's word before that of args, None without either."""
    return next((overrides[n] for n in hf_names if overrides.get(n) is not None), params.get(arg))


def _version(params: Mapping[str, Any]) -> float:
    version = params.get("checkpoint_version") or 0
    if version not in (0, 1, 2, 3):
        raise ValueError(f"expected checkpoint_version 0, 1.0, 2.0 or 3.0, found {version}")
    return float(version)


def _epsilon(params: Mapping[str, Any], overrides: Mapping[str, Any]) -> float:
    """`norm_epsilon` is the name of the flag since 2023-09; its default was always 1e-5."""
    eps = _told(params, overrides, "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")
    return float(params.get("layernorm_epsilon", 1e-5) if eps is None else eps)


def _sizes(shapes: Shapes, names: Names, n_layers: int, ranks: int) -> dict[str, int]:
    """In the order of PUBLISHED."""
    words, dim = shapes[names.word + "weight"]
    return {
        "layers": n_layers,
        "width": dim,
        "feed-forward width": shapes[f"{names.block}0.{names.fc1}weight"][0] * ranks,
        "positions": shapes[names.position + "weight"][0],
        "padded words": words * ranks,
    }


def _not_computed(params: Mapping[str, Any]) -> Iterator[str]:
    for name in ("swiglu", "squared_relu", "num_experts", "qk_layernorm"):
        if params.get(name):
            yield f"expected no `{name}`, found {params[name]}"


def _misshapen(
    shapes: Shapes, names: Names, ranks: int, n_heads: int, n_groups: int, head_dim: int
) -> Iterator[str]:
    if n_heads % n_groups or n_groups % ranks:
        yield f"expected head counts that {ranks} ranks can share, found {n_heads} in {n_groups} groups"
    first, dim = f"{names.block}0.", shapes[names.word + "weight"][1]
    wanted = {
        names.qkv: ((n_heads + 2 * n_groups) * head_dim // ranks, dim),
        names.dense: (dim, n_heads * head_dim // ranks),
        names.fc2: (dim, shapes[first + names.fc1 + "weight"][0]),
    }
    yield from misshapen(shapes, {f"{first}{name}weight": shape for name, shape in wanted.items()})


def read_names(shapes: Iterable[str]) -> tuple[Names, int]:
    """The names of one tensor-parallel rank, and the number of its layers. ValueError for tensors of a layer
    that are missing or unknown, for two tensors in one place, and for layers that are not 0, 1, 2, ..."""
    layers: dict[tuple[str, int], set[str]] = {}
    rest: list[str] = []
    for name in _of_the_model(shapes):
        block = re.fullmatch(r"(.*?\b)layers\.(\d+)\.(.+)", name)
        if block is None:
            rest.append(name)
        else:
            layers.setdefault((block[1] + "layers.", int(block[2])), set()).add(block[3])
    prefixes = {prefix for prefix, _ in layers}
    if len(prefixes) != 1 or {i for _, i in layers} != set(range(len(layers))):
        raise ValueError(
            f"expected one block of layers 0, 1, 2, ..., found {_some(f'{p}{i}' for p, i in layers)}"
        )
    (prefix,) = prefixes
    stems = {
        role: next((s for s in choice if s + "weight" in layers[prefix, 0]), choice[0])
        for role, choice in LAYER_STEMS.items()
    }
    wanted = {stem + kind for stem in stems.values() for kind in ("weight", "bias")}
    problems = []
    for (_, i), found in sorted(layers.items()):
        if missing := wanted - found:
            problems.append(f"expected {_some(f'{prefix}{i}.{n}' for n in missing)}, found none")
        if unknown := found - wanted:
            problems.append(
                f"expected no more tensors in a layer, found {_some(f'{prefix}{i}.{n}' for n in unknown)}"
            )
        if problems:
            break
    for role, endings in (MODEL_STEMS | OPTIONAL_STEMS).items():
        found_names = [n for n in rest if any(("." + n).endswith("." + e) for e in endings)]
        if len(found_names) > 1:
            problems.append(f"expected one of {', '.join(endings)}, found {_some(found_names)}")
        elif found_names:
            stems[role] = re.sub(r"(weight|bias)$", "", found_names[0])
        elif role in MODEL_STEMS:
            problems.append(f"expected {' or '.join(endings)}, found none")
    refuse(problems)
    return Names(block=prefix, **stems), len(layers)


def _of_the_model(names: Iterable[str]) -> Iterator[str]:
    """Without what training keeps beside `model`, such as the optimizer; all if there is no `model`. The
    extra state of Transformer Engine is about 8-bit scales."""
    names = [n for n in names if not n.endswith("_extra_state")]
    yield from [n for n in names if re.match(r"model\d*\.", n)] or names


def _some(names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in sorted(names)[:4]) or "none"


class Stages(Mapping[str, T]):
    """A view of several mappings under joined names; nothing is read until it is asked for."""

    def __init__(self, places: Mapping[str, tuple[Mapping[str, T], str]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> T:
        stage, own_name = self._places[name]
        return stage[own_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def join_stages(stages: Sequence[Mapping[str, T]]) -> Mapping[str, T]:
    """The pipeline stages of one tensor-parallel rank, in their order, as one mapping with layers numbered
    through; the values may be tensors or shapes. The layers of a stage follow on those of the stage before,
    however many each has. With virtual stages (`model0`, `model1`, ... in each file) the first chunk of every
    stage comes before the second of any. What is not of the model is left out. ValueError for a gap in the
    layers of a stage, for a name on two stages, and for stages with different chunks.
    """
    chunks: list[dict[tuple[str, str], str]] = []  # per stage: (chunk, name in it) -> name in the file
    for stage in stages:
        own: dict[tuple[str, str], str] = {}
        for name in _of_the_model(stage):
            chunk = re.match(r"model(\d*)\.", name)
            own[(chunk[1], name[chunk.end() :]) if chunk else ("", name)] = name
        chunks.append(own)
    numbers = sorted({v for own in chunks for v, _ in own}, key=lambda v: int(v or 0))
    for p, own in enumerate(chunks):
        if {v for v, _ in own} != set(numbers):
            raise ValueError(
                f"expected chunks {_some('model' + v for v in numbers)} on stage {p}, found fewer"
            )
    places: dict[str, tuple[Mapping[str, T], str]] = {}
    before = 0
    for v in numbers:
        for p, (stage, own) in enumerate(zip(stages, chunks, strict=True)):
            here: set[int] = set()
            for (chunk_of, name), own_name in own.items():
                if chunk_of != v:
                    continue
                if layer := re.search(r"\blayers\.(\d+)\.", name):
                    here.add(int(layer[1]))
                    name = f"{name[: layer.start(1)]}{before + int(layer[1])}{name[layer.end(1) :]}"
                name = f"model.{name}" if own_name.startswith("model") else name
                if name in places:
                    raise ValueError(f"expected `{own_name}` on one stage, found it on stage {p} too")
                places[name] = (stage, own_name)
            if here != set(range(len(here))):
                raise ValueError(
                    f"expected layers 0 to {len(here) - 1} on stage {p}, found {sorted(here)[:8]}"
                )
            before += len(here)
    return Stages(places)
