"""Qwen2 (Qwen1.5, Qwen2 and Qwen2.5, dense) as it is published, which is in the tensors and the config.json
of transformers, and as Megatron-Core trains it: `decoder.layers.{i}.self_attention.linear_qkv`, with
tensor-parallel ranks. Pipeline stages are joined before (`megatron.join_stages`).

Source: Bai et al. 2023 (arXiv 2309.16609, section 2.3), Yang et al. 2024 (arXiv 2407.10671, section 2.2) for
the model; the documentation of Qwen2Config in transformers 4.57 for its numbers; NVIDIA/Megatron-LM
core_v0.9.0 and NVIDIA-NeMo/Megatron-Bridge @067f987d for the other layout.

As the published names are those of transformers, this pass is kept apart from `ckpt_tool.reference.hf_qwen2`
by what it is written after: it is the papers' model (decoder), one code for both layouts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from ckpt_tool.reference import decoder
from ckpt_tool.reference.decoder import Names, embed, forward, head, layer, phases
from ckpt_tool.reference.facts import Shapes, misshapen, only, refuse
from ckpt_tool.reference.published import AS_PUBLISHED, numbers, told

__all__ = ["Config", "embed", "forward", "head", "layer", "phases"]

# Facts under their Hugging Face names, and what Megatron's args call them; the first that is there counts.
ARGS = {
    "num_hidden_layers": ("num_layers",),
    "intermediate_size": ("ffn_hidden_size",),
    "head_dim": ("kv_channels",),
    "rms_norm_eps": ("norm_epsilon", "layernorm_epsilon"),
    "rope_theta": ("rotary_base",),
}

# Facts with another value are of another model than Qwen2.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "add_qkv_bias": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (1,),
    "apply_layernorm_1p": (False,),
    "qk_layernorm": (False,),
    "num_experts": (),
    "window_size": (),
}


@dataclass(frozen=True)
class Config(decoder.Config):
    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` is config.json, or Megatron's pickled args as plain values; `shapes` those of rank 0,
        `overrides` facts from the user under their Hugging Face names, which win. ValueError with all that is
        missing, that disagrees and that this pass does not compute."""
        facts = told(_in_hf_names(params), overrides)
        names, problems = _names(shapes, facts)
        if missing := [n for n in _wanted(names, int(facts["num_hidden_layers"])) if n not in shapes]:
            refuse([*problems, f"expected {', '.join(f'`{n}`' for n in missing[:4])}, found none"])
        c = cls(**numbers(facts, names, shapes, ranks), biased=True)
        refuse([*problems, *only(facts, COMPUTED), *_disagreements(c, facts, shapes, ranks)])
        return c


def _in_hf_names(params: Mapping[str, Any]) -> dict[str, Any]:
    args = params.get("args")
    made = {**params, **(args if isinstance(args, Mapping) else {})}
    for name, others in ARGS.items():
        value = next((made[o] for o in others if made.get(o) is not None), None)
        if made.get(name) is None and value is not None:
            made[name] = value
    if "num_query_groups" in made:  # args have a number of groups even where queries are not grouped
        grouped = made.get("group_query_attention")
        made["num_key_value_heads"] = made["num_query_groups" if grouped else "num_attention_heads"]
    if "untie_embeddings_and_output_weights" in made:
        made["tie_word_embeddings"] = not made["untie_embeddings_and_output_weights"]
    return made


def _names(shapes: Iterable[str], facts: Mapping[str, Any]) -> tuple[Names, list[str]]:
    """Those of the layout that the tensors are in, and what speaks against it."""
    shapes, tied = set(shapes), facts.get("tie_word_embeddings")
    word = next((n for n in sorted(shapes) if n.endswith("embedding.word_embeddings.weight")), None)
    if word is None:
        return (replace(AS_PUBLISHED, output=AS_PUBLISHED.word) if tied else AS_PUBLISHED), []
    root = word.removesuffix("embedding.word_embeddings.weight")
    block, output = root + "decoder.layers.", root + "output_layer.weight"
    # Transformer Engine has the norms in the layers after them.
    engine = f"{block}0.self_attention.linear_qkv.layer_norm_weight" in shapes
    names = Names(
        word=word,
        block=block,
        norm_1="self_attention.linear_qkv.layer_norm_weight" if engine else "input_layernorm.weight",
        qkv=("self_attention.linear_qkv.",),
        out="self_attention.linear_proj.weight",
        norm_2="mlp.linear_fc1.layer_norm_weight" if engine else "pre_mlp_layernorm.weight",
        units=("mlp.linear_fc1.weight",),
        down="mlp.linear_fc2.weight",
        final_norm=root + "decoder.final_layernorm.weight",
        output=output if output in shapes else word,  # the last pipeline stage has a copy of tied words
    )
    untied = tied is not None and not tied and names.output == word
    return names, [f"expected `{output}`, as the output layer is not tied, found none"] if untied else []


def _wanted(n: Names, n_layers: int) -> Iterator[str]:
    yield from (n.word, n.final_norm, n.output)
    own = [n.norm_1, n.out, n.norm_2, n.down, *n.units, *(s + k for s in n.qkv for k in ("weight", "bias"))]
    yield from (f"{n.block}{i}.{name}" for i in range(n_layers) for name in own)


def _disagreements(c: Config, facts: Mapping[str, Any], shapes: Shapes, ranks: int) -> Iterator[str]:
    n, (rows, D) = c.names, shapes[c.names.word]
    N, K, H, S = c.n_heads, c.n_kv_heads, c.head_dim, ranks
    fused, n_words = len(n.qkv) == 1, c.n_words or 0
    if S != 1 and not fused:
        yield f"expected one rank (the published files are not model-parallel), found {S}"
    if min(N, K, H) < 1 or N % K or K % S or H % 2:
        yield f"expected head counts that {S} ranks can share, found {N} and {K} of width {H}"
    if n_words > rows * S or (n_words < rows * S and not fused):
        yield f"expected {n_words} words, as told, found {rows * S} in the tensors"
    if len(c.windows) != c.n_layers:
        yield f"expected layer_types for {c.n_layers} layers, found {len(c.windows)}"
    pattern = re.escape(n.block) + r"(\d+)\."
    found = {int(m[1]) for name in shapes if (m := re.match(pattern, name))}
    if found != set(range(c.n_layers)):
        yield f"expected {c.n_layers} layers, as told, found {len(found)} in the tensors"
    first, F = n.block + "0.", shapes[f"{n.block}0.{n.down}"][1]
    for name, size in (("hidden_size", D), ("intermediate_size", F * S)):
        if facts.get(name) is not None and int(facts[name]) != size:
            yield f"expected `{name}` {facts[name]}, as told, found {size} in the tensors"
    heads = ((N + 2 * K) * H // S,) if fused else (N * H, K * H, K * H)
    wanted: dict[str, tuple[int, ...]] = {s + "weight": (r, D) for s, r in zip(n.qkv, heads, strict=True)}
    wanted |= {s + "bias": (r,) for s, r in zip(n.qkv, heads, strict=True)}
    wanted |= {n.out: (D, N * H // S)} | {unit: (2 * F if fused else F, D) for unit in n.units}
    yield from misshapen(shapes, {first + name: shape for name, shape in wanted.items()})
