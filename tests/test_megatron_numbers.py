"""Args and config.json say the same numbers: what is written on one side is read back from it, in both
directions, for every age and Megatron-Core's layout."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.families import family
from ckpt_tool.convert.plan import Options, Plan
from tests.headers_only import args_of, beside, held, hugging_face, rank_files
from tests.megatron_models import FAMILIES, VERSIONS, D, F, L, P, V, megatron_files, tensors

AGES = ("transformer", "encoder", "norm", "core", "core-fused")
FULL = tensors()
# What both sides have a word for. The rest of the args says what all such models have, and how they are
# shared out.
BOTH = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "max_position_embeddings",
    "orig_vocab_size",
    "layernorm_epsilon",
    "norm_epsilon",
    "rotary_base",
    "untie_embeddings_and_output_weights",
    "bias_gelu_fusion",
    "openai_gelu",
)
epsilons = st.floats(1e-12, 1.0, exclude_min=True)


def there_and_back(name: str, source: Checkpoint, **asked: Any) -> tuple[Plan, Plan, Plan]:
    """The plans to Hugging Face, back, and to Hugging Face again."""
    with tempfile.TemporaryDirectory() as folder:
        plan = family(name).plan(source, Options())
        back = family(name).plan_original(
            hugging_face(plan, Path(folder)), Options(family_options={"form": "mcore", **asked})
        )
        return plan, back, family(name).plan(rank_files(back), Options())


def config_of(plan: Plan) -> Any:
    """config.json as it is in the folder, not as it is in memory."""
    (document,) = (d for d in plan.documents if d.name == "config.json")
    return json.loads(document.content)


def said(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: told[name] for name in BOTH if name in told}


@st.composite
def legacy(draw: st.DrawFn) -> tuple[str, Checkpoint, dict[str, Any]]:
    """One of the two families in some age with some args; no more ranks than heads."""
    name, age = draw(st.sampled_from(sorted(FAMILIES))), draw(st.sampled_from(AGES))
    version = 3.0 if age.startswith("core") else draw(st.sampled_from(VERSIONS))
    shares = draw(st.sampled_from((1, 2)))
    told = {
        "num_layers": L,
        "hidden_size": D,
        "ffn_hidden_size": F,
        "max_position_embeddings": P,
        "num_attention_heads": draw(st.sampled_from((2, 4, 6, 8))),
        "orig_vocab_size": draw(st.integers(2, V)),
        "norm_epsilon" if age in ("norm", "core", "core-fused") else "layernorm_epsilon": draw(epsilons),
        "bias_gelu_fusion": draw(st.booleans()),
        "openai_gelu": not age.startswith("core") and draw(st.booleans()),
    }
    files = megatron_files(FULL, name, version, age, shares)
    shapes = {
        f"release/mp_rank_{r:02d}/model_optim_rng.pt": {n: tuple(t.shape) for n, t in row[0].items()}
        for r, row in enumerate(files)
    }
    return name, held(shapes, beside(version, told)), told


@settings(max_examples=60, deadline=None)
@given(legacy())
def test_args_are_read_back_from_config_json(drawn: tuple[str, Checkpoint, dict[str, Any]]) -> None:
    name, source, told = drawn
    plan, back, once_more = there_and_back(name, source)
    assert config_of(once_more) == config_of(plan)
    written = said(args_of(back))
    if told["openai_gelu"]:  # what was fused too is the same function
        told = told | {"bias_gelu_fusion": written["bias_gelu_fusion"], "openai_gelu": written["openai_gelu"]}
        assert written["bias_gelu_fusion"] or written["openai_gelu"]
    assert {k: written[k] for k in told} == told
    with tempfile.TemporaryDirectory() as folder:
        twice = family(name).plan_original(hugging_face(once_more, Path(folder)), Options())
    assert args_of(twice) == args_of(back)


@st.composite
def gated(draw: st.DrawFn) -> tuple[Checkpoint, dict[str, Any]]:
    """A decoder in Megatron-Core's layout."""
    shares = draw(st.sampled_from((1, 2)))
    kv, each, channels, layers = shares * draw(st.integers(1, 2)), draw(st.integers(1, 3)), 4, 2
    heads, inner, rows, untied = kv * each, shares * 5, shares * 24, draw(st.booleans())
    width, words = heads * channels, draw(st.integers(1, rows))
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (rows // shares, width)}
    for i in range(layers):
        p, qkv = f"decoder.layers.{i}.", (each + 2) * channels * kv // shares
        shapes |= {
            f"{p}self_attention.linear_qkv.layer_norm_weight": (width,),
            f"{p}self_attention.linear_qkv.weight": (qkv, width),
            f"{p}self_attention.linear_qkv.bias": (qkv,),
            f"{p}self_attention.linear_proj.weight": (width, width // shares),
            f"{p}mlp.linear_fc1.layer_norm_weight": (width,),
            f"{p}mlp.linear_fc1.weight": (2 * inner // shares, width),
            f"{p}mlp.linear_fc2.weight": (width, inner // shares),
        }
    shapes["decoder.final_layernorm.weight"] = (width,)
    if untied:
        shapes["output_layer.weight"] = (rows // shares, width)
    told = {
        "num_layers": layers,
        "hidden_size": width,
        "ffn_hidden_size": inner,
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": kv,
        "max_position_embeddings": draw(st.integers(1, 10**6)),
        "orig_vocab_size": words,
        "norm_epsilon": draw(epsilons),
        "rotary_base": draw(st.floats(1.0, 1e9)),
        "untie_embeddings_and_output_weights": untied,
    }
    files = {
        f"release/mp_rank_{r:02d}/model_optim_rng.pt": {f"model.{n}": s for n, s in shapes.items()}
        for r in range(shares)
    }
    return held(files, beside(3.0, told)), told


@settings(max_examples=60, deadline=None)
@given(gated())
def test_args_of_core_are_read_back_from_config_json(drawn: tuple[Checkpoint, dict[str, Any]]) -> None:
    source, told = drawn
    plan, back, once_more = there_and_back("qwen2", source)
    assert config_of(once_more) == config_of(plan)
    written = said(args_of(back))
    assert {k: written[k] for k in said(told)} == said(told)
